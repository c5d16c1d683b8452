"""Bags of words and of patches: the features of the years before networks were trained on both.

A caption is its words, by TF-IDF. A picture is the histogram of its patches: each is normalised,
whitened and named by the nearest of some hundred cluster centres; counted in the whole picture and
in its quarters (Lazebnik, Schmid & Ponce 2006), and the square root taken (Hellinger distance).
Coates, Lee & Ng 2011, "An analysis of single-layer networks in unsupervised feature learning".
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from baselines.features import Rows
from torch import Tensor
from torch.nn import functional as F

from retriever.samples import Pictures

SIDE, STRIDE = 8, 4  # of patches, in pixels
_FITTED = 40_000  # patches that centres are found among
_PICTURES = 100  # at a time


def words(text: str) -> list[str]:
    """Lower-case words and numbers."""
    return re.findall(r"[a-z]+|\d+|[^\W\d_]", text.lower())


class BagOfWords:
    """TF-IDF rows of unit length, (1 + log tf) · log(n / df), over the most frequent words."""

    def __init__(self, texts: Sequence[str], vocabulary: int = 2000) -> None:
        documents = Counter(word for text in texts for word in set(words(text)))
        known = sorted(documents.items(), key=lambda one: (-one[1], one[0]))[:vocabulary]
        self.places = {word: place for place, (word, _) in enumerate(known)}
        self.idf = np.log(len(texts) / np.array([count for _, count in known]))

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(m, vocabulary) float32."""
        rows = np.zeros((len(texts), len(self.places)), np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word, count in Counter(words(text)).items():
                if word in self.places:
                    place = self.places[word]
                    row[place] = (1 + np.log(count)) * self.idf[place]
        return F.normalize(torch.from_numpy(rows), dim=1)


def patches_of(pixels: Tensor) -> Tensor:
    """(b, s, s, 3) uint8 → (b, p, 192), each with mean 0 and variance 1."""
    scaled = pixels.permute(0, 3, 1, 2).float() / 255
    patches = F.unfold(scaled, SIDE, stride=STRIDE).transpose(1, 2)
    centred = patches - patches.mean(dim=2, keepdim=True)
    return centred / (centred.var(dim=2, keepdim=True) + 0.001).sqrt()


@dataclass(frozen=True, slots=True, eq=False)
class BagOfPatches:
    """Histograms of patches.

    mean: (192,) of patches. whitening: (192, 192). centres: (c, 192), of whitened patches.
    """

    mean: Tensor
    whitening: Tensor
    centres: Tensor

    @classmethod
    def fit(cls, pictures: Pictures, count: int = 400, seed: int = 0) -> "BagOfPatches":
        """Centres by k-means on patches drawn from some pictures. Lloyd 1982."""
        rng = torch.Generator().manual_seed(seed)
        rows = np.linspace(0, len(pictures) - 1, min(len(pictures), 1000), dtype=np.int64)
        patches = patches_of(pictures.batch(rows, None)).flatten(0, 1)
        patches = patches[torch.randperm(len(patches), generator=rng)[:_FITTED]]
        mean = patches.mean(dim=0)
        values, axes = torch.linalg.eigh(torch.cov(patches.T))
        whitening = axes @ torch.diag((values.clamp(min=0) + 0.1).rsqrt()) @ axes.T
        points = (patches - mean) @ whitening
        centres = points[torch.randperm(len(points), generator=rng)[:count]].clone()
        for _ in range(15):
            nearest = _nearest(points, centres)
            sums = torch.zeros_like(centres).index_add_(0, nearest, points)
            sizes = torch.bincount(nearest, minlength=len(centres))
            is_used = sizes > 0
            centres[is_used] = sums[is_used] / sizes[is_used, None]
        return cls(mean, whitening, centres)

    def __call__(self, pictures: Pictures) -> Tensor:
        """(n, 5c) float32 rows of unit length: the whole picture, then its quarters."""
        parts = np.array_split(np.arange(len(pictures)), -(-len(pictures) // _PICTURES))
        return torch.cat([self._histograms(pictures, part) for part in parts])

    def _histograms(self, pictures: Pictures, rows: Rows) -> Tensor:
        patches = patches_of(pictures.batch(rows, None))
        b, p, width = patches.shape
        points = (patches.reshape(-1, width) - self.mean) @ self.whitening
        names = _nearest(points, self.centres).view(b, p)
        across = round(p**0.5)
        place = torch.arange(p)
        quarter = 2 * (place // across * 2 // across) + place % across * 2 // across
        c = len(self.centres)
        counts = torch.zeros(b, 4 * c)
        counts.scatter_add_(1, quarter * c + names, torch.ones(b, p))
        whole = counts.view(b, 4, c).sum(dim=1)
        return F.normalize(torch.cat([whole, counts], dim=1).sqrt(), dim=1)


def _nearest(points: Tensor, centres: Tensor) -> Tensor:
    """(n,) the centre nearest to each point."""
    half = centres.square().sum(dim=1) / 2
    parts = [(part @ centres.T - half).argmax(dim=1) for part in points.split(1 << 14)]
    return torch.cat(parts)
