"""The loop that trains what `retriever.training` does not: any system with a loss and embeddings.

It follows the same rules: AdamW on a cosine schedule, several captions of each picture in a batch,
the same record of every epoch on held-out pairs, and the weights of the best epoch are kept.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from baselines.features import Features, Rows, autocast
from numpy.typing import NDArray
from torch import Tensor, nn

from retriever import metrics
from retriever.samples import Captions, Pictures
from retriever.training import EpochLog

Embeddings = tuple[NDArray[np.float32], NDArray[np.float32]]
_AT_ONCE = 250  # embedded


@dataclass(frozen=True, slots=True)
class FitConfig:
    """How a system is trained."""

    epochs: int = 20
    batch_size: int = 256  # pictures
    captions_per_picture: int = 2
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.1  # share of all steps
    patience: int = 5  # epochs without a better rSum before it ends
    seed: int = 0


class Source(Protocol):
    """What a system is trained on: n pictures, and m captions that belong to them."""

    picture: Rows  # (m,), rising

    def images(self, rows: Rows, seed: tuple[int, int] | None) -> Any:
        """Pictures as the system takes them; with a seed as they are in training."""

    def texts(self, rows: Rows) -> Any:
        """Captions as the system takes them."""


class System(Protocol):
    """What `fit_embeddings` trains, a torch module."""

    def loss(self, images: Any, texts: Any, owners: Tensor) -> Tensor:
        """Of b pictures and b·c captions; caption i belongs to picture owners[i]."""

    def embed_images(self, images: Any) -> Tensor:
        """(b, d) unit rows."""

    def embed_texts(self, texts: Any) -> Tensor:
        """(b, d) unit rows."""


class PooledSource:
    """Pooled features of towers that stay as they are."""

    def __init__(self, images: Tensor, texts: Tensor, picture: Rows) -> None:
        self._images, self._texts, self.picture = images, texts, picture

    @classmethod
    def of(cls, features: Features) -> "PooledSource":
        """Of one split."""
        return cls(features.images, features.texts, features.picture)

    def images(self, rows: Rows, seed: tuple[int, int] | None) -> Tensor:
        """(b, f) features."""
        return self._images[torch.from_numpy(rows)]

    def texts(self, rows: Rows) -> Tensor:
        """(b, g) features."""
        return self._texts[torch.from_numpy(rows)]


class PixelSource:
    """Pixels, augmented in training, and token ids: for towers that learn."""

    def __init__(self, pictures: Pictures, captions: Captions) -> None:
        self._pictures, self._captions, self.picture = pictures, captions, captions.picture

    def images(self, rows: Rows, seed: tuple[int, int] | None) -> Tensor:
        """(b, s, s, 3) uint8."""
        return self._pictures.batch(rows, seed)

    def texts(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """(b, t) ids and mask."""
        return self._captions.batch(rows)


def draw_captions(picture: Rows, count: int, rng: np.random.Generator) -> Rows:
    """(n, count) captions of every picture, different ones as long as it has enough."""
    shuffled = np.lexsort((rng.random(len(picture)), picture))
    sizes = np.bincount(picture)
    first = np.cumsum(sizes) - sizes
    return shuffled[first[:, None] + np.arange(count) % sizes[:, None]]


def optimiser_of(module: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW, whose weight decay is on matrices only."""
    parameters = [one for one in module.parameters() if one.requires_grad]
    groups = [
        {"params": [one for one in parameters if one.ndim > 1], "weight_decay": weight_decay},
        {"params": [one for one in parameters if one.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)


def descend(system: nn.Module, optimiser: torch.optim.Optimizer, loss: Tensor, lr: float) -> None:
    """One step of training."""
    for group in optimiser.param_groups:
        group["lr"] = lr
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(system.parameters(), 1.0)
    optimiser.step()


def lr_factor(step: int, total: int, warmup: float) -> float:
    """Share of the peak learning rate: it rises in a line, then falls along a cosine."""
    rising = max(int(total * warmup), 1)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * min((step - rising) / max(total - rising, 1), 1.0)))


def parameters_of(module: nn.Module) -> int:
    """How many numbers it learns."""
    return sum(one.numel() for one in module.parameters() if one.requires_grad)


@torch.inference_mode()
def embed(system: Any, source: Source) -> Embeddings:
    """(n, d) rows of all pictures and (m, d) of all captions."""
    system.eval()
    n, m = int(source.picture[-1]) + 1, len(source.picture)

    def rows(make: Callable[[Rows], Tensor], count: int) -> NDArray[np.float32]:
        parts = np.array_split(np.arange(count), -(-count // _AT_ONCE))
        return torch.cat([make(part) for part in parts]).numpy()

    return (
        rows(lambda part: system.embed_images(source.images(part, None)), n),
        rows(lambda part: system.embed_texts(source.texts(part)), m),
    )


def fit_embeddings(
    system: Any, train: Source, held_out: Source, config: FitConfig, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Train a `System`, which has the weights of its best epoch afterwards.

    Returns:
        One record an epoch, as `EpochLog`.
    """
    n = int(train.picture[-1]) + 1
    steps = max(n // config.batch_size, 1)
    optimiser = optimiser_of(system, config.lr, config.weight_decay)
    log: list[dict[str, Any]] = []
    best: dict[str, Tensor] = {}
    for epoch in range(config.epochs):
        started = time.perf_counter()
        torch.manual_seed(config.seed * 100_003 + epoch)
        system.train()
        losses = []
        for step, (rows, drawn) in enumerate(_batches(train.picture, steps, epoch, config)):
            owners = torch.arange(len(rows)).repeat_interleave(config.captions_per_picture)
            with autocast():
                images = train.images(rows, (config.seed, epoch))
                loss = system.loss(images, train.texts(drawn.reshape(-1)), owners)
            factor = lr_factor(epoch * steps + step, steps * config.epochs, config.warmup)
            descend(system, optimiser, loss, config.lr * factor)
            losses.append(loss.item())
        entry = measure(system, held_out, epoch, float(np.mean(losses)), started)
        if not log or entry["metrics"]["rsum"] > max(one["metrics"]["rsum"] for one in log):
            best = {name: value.clone() for name, value in system.state_dict().items()}
        log.append(entry)
        say(f"epoch {epoch}: loss {entry['loss']:.3f}, rSum {entry['metrics']['rsum']:.1f}")
        sums = [one["metrics"]["rsum"] for one in log]
        if len(sums) - 1 - int(np.argmax(sums)) >= config.patience:
            break
    system.load_state_dict(best)
    system.eval()
    return log


def _batches(
    picture: Rows, steps: int, epoch: int, config: FitConfig
) -> Iterator[tuple[Rows, Rows]]:
    """Pictures (b,) and their captions (b, c)."""
    rng = np.random.default_rng((config.seed, epoch))
    order = rng.permutation(int(picture[-1]) + 1)
    drawn = draw_captions(picture, config.captions_per_picture, rng)[order]
    b = min(config.batch_size, len(order))
    for start in range(0, steps * b, b):
        yield order[start : start + b], drawn[start : start + b]


def measure(
    system: Any, held_out: Source, epoch: int, loss: float, started: float
) -> dict[str, Any]:
    """The record of an epoch."""
    images, texts = embed(system, held_out)
    return asdict(
        EpochLog(
            epoch=epoch,
            loss=loss,
            seconds=time.perf_counter() - started,
            logit_scale=torch.as_tensor(getattr(system, "logit_scale", 1.0)).item(),
            alignment=metrics.alignment(images[held_out.picture], texts),
            uniformity=(metrics.uniformity(images) + metrics.uniformity(texts)) / 2,
            modality_gap=metrics.modality_gap(images, texts),
            metrics=metrics.retrieval_metrics(images, texts, held_out.picture),
        )
    )
