"""What a training batch is made of: decoded pictures, augmented, and tokenised captions."""

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from tokenizers import Tokenizer
from torch import Tensor

from retriever.data import Pair, read_image, read_pairs
from retriever.errors import PictureError, UsageError


def split_pairs(datasets: Sequence[Path], seed: int) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs. Test splits are never touched.

    The held-out pairs are the `val` splits; where no data set has one, a tenth drawn at random.
    """
    train: list[Pair] = []
    held_out: list[Pair] = []
    for dataset in datasets:
        for pair in read_pairs(dataset)[0]:
            if pair.split == "val":
                held_out.append(pair)
            elif pair.split in (None, "train"):
                train.append(pair)
    if not held_out:
        order = np.random.default_rng(seed).permutation(len(train))
        size = min(max(len(train) // 10, 2), 1000)
        held_out = [train[i] for i in sorted(order[:size])]
        train = [train[i] for i in sorted(order[size:])]
    if min(len(train), len(held_out)) < 2:
        names = ", ".join(str(d) for d in datasets)
        raise UsageError(
            f"{names}: too few pictures with captions: {len(train)} to train on and "
            f"{len(held_out)} to measure with, at least two of each are needed"
        )
    return train, held_out


def augment(pixels: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """A random crop of at least half the area, mirrored half the time, colours slightly changed.

    Args:
        pixels: (s, s, 3) RGB.
        rng: the source of all chance.
    """
    side = pixels.shape[0]
    area = rng.uniform(0.5, 1.0)
    ratio = math.exp(rng.uniform(-0.25, 0.25))
    width = min(math.sqrt(area * ratio), 1.0) * side
    height = min(math.sqrt(area / ratio), 1.0) * side
    left, top = rng.uniform(0, side - width), rng.uniform(0, side - height)
    image = Image.fromarray(pixels).resize(
        (side, side), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height)
    )
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        if rng.random() < 0.5:
            image = enhance(image).enhance(rng.uniform(0.7, 1.3))
    return np.asarray(image)


def _decode_all(pairs: Sequence[Pair], size: int, path: Path) -> dict[str, str]:
    """Write (n, size, size, 3) pixels to `path`; what is wrong with a picture, by its number."""
    shape = (len(pairs), size, size, 3)
    pixels = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    faults = {}
    for row, pair in enumerate(pairs):
        try:
            image = read_image(pair.path, target=size).image
        except PictureError as exc:
            faults[str(row)] = str(exc)
        else:
            pixels[row] = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
    pixels.flush()
    return faults


class Pictures:
    """Pixels of a list of pairs, decoded once into a memory-mapped file of the cache folder.

    Attributes:
        pixels: (n, s, s, 3) uint8.
        pairs: the n pairs whose picture could be read.
        key: a hash of the files' names, sizes and times, of the side, and of which could be read.
    """

    def __init__(
        self, pairs: Sequence[Pair], size: int, cache: Path, warn: Callable[[str], None]
    ) -> None:
        digest = xxhash.xxh3_128(f"2 {size}".encode())
        for pair in pairs:
            stat = pair.path.stat()
            digest.update(
                f"{pair.path}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode(
                    "utf-8", "surrogateescape"
                )
            )
        self.key = digest.hexdigest()
        cache.mkdir(parents=True, exist_ok=True)
        path, done = cache / f"pixels-{self.key}.npy", cache / f"pixels-{self.key}.json"
        # Faults may pass (a drive, rights), so only a whole set is believed without looking again.
        if not (path.is_file() and done.is_file()) or json.loads(done.read_text("utf-8")):
            # Written beside and renamed, under a name of this process: another may do the same.
            beside = cache / f"pixels-{self.key}.{os.getpid()}.tmp"
            faults = _decode_all(pairs, size, beside)
            beside.replace(path)
            beside.write_text(json.dumps(faults), "utf-8")
            beside.replace(done)
        faults = json.loads(done.read_text("utf-8"))
        for fault in faults.values():
            warn(fault)
        self.rows = np.array([i for i in range(len(pairs)) if str(i) not in faults], np.int64)
        self.key += "-" + xxhash.xxh3_64_hexdigest(self.rows.tobytes())
        self.pixels = np.load(path, mmap_mode="r")
        self.pairs = [pairs[row] for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Iterable[int], seed: Sequence[int] | None) -> Tensor:
        """(b, s, s, 3) uint8; with a seed, each picture augmented in its own reproducible way."""
        views = [self.pixels[self.rows[i]] for i in indices]
        if seed is not None:
            rngs = [np.random.default_rng((*seed, int(i))) for i in indices]
            views = [augment(view, rng) for view, rng in zip(views, rngs, strict=True)]
        return torch.from_numpy(np.stack(views))


class Captions:
    """Token ids of all captions of a list of pairs, padded only when a batch is made."""

    def __init__(self, pairs: Sequence[Pair], tokenizer: Tokenizer, max_tokens: int) -> None:
        texts = [caption.text for pair in pairs for caption in pair.captions]
        tokenizer.enable_truncation(max_tokens)
        tokenizer.no_padding()
        self.ids = [encoding.ids or [0] for encoding in tokenizer.encode_batch(texts)]
        counts = [len(pair.captions) for pair in pairs]
        self.picture = np.repeat(np.arange(len(pairs)), counts)
        self.first = np.concatenate([[0], np.cumsum(counts)])

    def __len__(self) -> int:
        return len(self.ids)

    def draw(self, picture: int, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """`count` captions of a picture, different ones as long as there are enough."""
        first, last = int(self.first[picture]), int(self.first[picture + 1])
        choices = rng.permutation(np.arange(first, last))
        return np.resize(choices, count)

    def batch(self, indices: Iterable[int]) -> tuple[Tensor, Tensor]:
        """(b, t) ids and mask, t the longest caption among them."""
        rows = [self.ids[i] for i in indices]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        return ids, mask
