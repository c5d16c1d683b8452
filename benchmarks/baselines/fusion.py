"""Fusion match classifiers: is this a caption of that picture, asked of both at once.

A dual encoder sees each side alone; a classifier sees them together, so it cannot be indexed and
serves to re-rank what a dual encoder found. Pooled features are fused by concatenation, sum or
product. With cross-attention, each token of the caption looks for the regions of the picture that
show it, is compared with what it found, and how telling that is decides how much it counts (Lee et
al. 2018 (SCAN), arXiv:1803.08024; Diao et al. 2021 (SGRAF), arXiv:2101.01368).
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from baselines.features import Features, Rows, autocast
from baselines.fit import descend, draw_captions, lr_factor, optimiser_of
from baselines.heads import Heads
from baselines.reranking import Shortlist, rerank
from torch import Tensor, nn
from torch.nn import functional as F

POOLED = ("concatenation", "sum", "product")
Encoded = tuple[Tensor, ...]
_HARDEST = 3  # negatives of each row and column that the loss looks at


@dataclass(frozen=True, slots=True)
class FusionConfig:
    """How a classifier is trained."""

    epochs: int = 10
    batch_size: int = 32  # pictures, each with one caption; all pairs are compared
    neighbours: int = 8  # of a batch, pictures that the dual encoder confuses with each other
    depth: int = 50  # of each picture's neighbours that are drawn from
    listwise: float = 1.0  # weight of the softmax over each row and column, beside the classifier's
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    seed: int = 0


class PooledMatcher(nn.Module):
    """Pooled features, fused → a logit.

    Args:
        features: widths of image and text features.
        fusion: one of `POOLED`.
    """

    def __init__(self, features: tuple[int, int], fusion: str, width: int = 512) -> None:
        super().__init__()
        self.fusion = fusion
        self.image, self.text = (
            nn.Sequential(nn.LayerNorm(f), nn.Dropout(0.2), nn.Linear(f, width), nn.GELU())
            for f in features
        )
        fused = 2 * width if fusion == "concatenation" else width
        self.judge = nn.Sequential(
            nn.LayerNorm(fused), nn.Linear(fused, width // 2), nn.GELU(), nn.Linear(width // 2, 1)
        )

    def encode_images(self, images: Tensor) -> Encoded:
        """(b, f) features, as they are kept for `compare`."""
        return (self.image(images),)

    def encode_texts(self, texts: Tensor) -> Encoded:
        """The same of (c, g) features."""
        return (self.text(texts),)

    def compare(self, images: Encoded, texts: Encoded) -> Tensor:
        """(b, c) logits."""
        seen, read = images[0][:, None], texts[0][None]
        match self.fusion:
            case "concatenation":
                shape = len(seen), read.shape[1], -1
                fused = torch.cat([seen.expand(shape), read.expand(shape)], dim=2)
            case "sum":
                fused = seen + read
            case _:
                fused = seen * read
        logits: Tensor = self.judge(fused).squeeze(2)
        return logits

    def images_of(self, features: Features, rows: Rows) -> Tensor:
        """What `encode_images` takes of some pictures."""
        return features.images[torch.from_numpy(rows)]

    def texts_of(self, features: Features, rows: Rows) -> Tensor:
        """What `encode_texts` takes of some captions."""
        return features.texts[torch.from_numpy(rows)]


class CosineMatcher(Heads):
    """No fusion at all: a second dual encoder, to tell what fusion adds from what two models do."""

    def encode_images(self, images: Tensor) -> Encoded:
        """(b, f) features, as they are kept for `compare`."""
        return (self.embed_images(images),)

    def encode_texts(self, texts: Tensor) -> Encoded:
        """The same of (c, g) features."""
        return (self.embed_texts(texts),)

    def compare(self, images: Encoded, texts: Encoded) -> Tensor:
        """(b, c) cosines."""
        return images[0] @ texts[0].T

    images_of, texts_of = PooledMatcher.images_of, PooledMatcher.texts_of


class CrossAttentionMatcher(nn.Module):
    """Tokens look at regions → a logit, which is added to that of a dual encoder.

    Args:
        widths: of regions and tokens.
        heads: the dual encoder, trained before on pooled features: it knows what a picture is about
            as a whole, and learns on.
        width: in which tokens and regions are compared.
        relation: numbers that a comparison comes down to.
    """

    def __init__(
        self, widths: tuple[int, int], heads: CosineMatcher, width: int = 128, relation: int = 32
    ) -> None:
        super().__init__()
        self.heads = heads
        self.region, self.token = (
            nn.Sequential(nn.LayerNorm(size), nn.Dropout(0.2), nn.Linear(size, width))
            for size in widths
        )
        self.sharpness = nn.Parameter(torch.tensor(math.log(9.0)))
        self.local = nn.Linear(width, relation)
        self.gate = nn.Linear(relation, 1)
        self.judge = nn.Sequential(
            nn.LayerNorm(relation), nn.Linear(relation, relation), nn.GELU(),
            nn.Linear(relation, 1),
        )  # fmt: skip

    def encode_images(self, images: tuple[Tensor, Tensor]) -> Encoded:
        """(b, r, p) regions and (b, f) pooled features, as they are kept for `compare`."""
        regions, pooled = images
        return F.normalize(self.region(regions), dim=2), *self.heads.encode_images(pooled)

    def encode_texts(self, texts: tuple[Tensor, Tensor, Tensor]) -> Encoded:
        """The same of (c, t, g) tokens, their (c, t) mask, and (c, g) pooled features."""
        tokens, mask, pooled = texts
        return F.normalize(self.token(tokens), dim=2), mask, *self.heads.encode_texts(pooled)

    def compare(self, images: Encoded, texts: Encoded) -> Tensor:
        """(b, c) logits."""
        (regions, seen), (tokens, mask, read) = images, texts
        b, (c, t, width) = len(regions), tokens.shape
        cosines = torch.einsum("ctw,brw->bctr", tokens, regions)
        looked = (self.sharpness.exp() * cosines).softmax(dim=3).to(regions.dtype)
        found = torch.bmm(looked.reshape(b, c * t, -1), regions).view(b, c, t, width)
        compared = self.local(F.normalize(found, dim=3) * tokens * math.sqrt(width))
        counts = self.gate(compared).squeeze(3).float().masked_fill(~mask, -1e4).softmax(dim=2)
        local = (counts[..., None] * compared).sum(dim=2)
        whole = self.heads.logit_scale * self.heads.compare((seen,), (read,))
        logits: Tensor = self.judge(local).squeeze(2) + whole
        return logits

    def images_of(self, features: Features, rows: Rows) -> tuple[Tensor, Tensor]:
        """What `encode_images` takes of some pictures."""
        return features.regions_of(rows), features.images[torch.from_numpy(rows)]

    def texts_of(self, features: Features, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """What `encode_texts` takes of some captions."""
        return *features.tokens_of(rows), features.texts[torch.from_numpy(rows)]


Matcher = PooledMatcher | CrossAttentionMatcher | CosineMatcher


def match_loss(logits: Tensor, listwise: float) -> Tensor:
    """Of (b, b) logits whose diagonal are the matched pairs.

    Binary cross-entropy of the matched pairs and of the hardest mismatched ones, each half of it;
    and, weighted, the cross-entropy of the partner among each row and column.
    """
    logits = logits.float()
    matched = torch.eye(len(logits), dtype=torch.bool)
    others = logits.masked_fill(matched, -1e4)
    k = min(_HARDEST, len(logits) - 1)
    hardest = torch.cat([others.topk(k, dim=1).values, others.topk(k, dim=0).values.T])
    loss = -F.logsigmoid(logits.diagonal()).mean() - F.logsigmoid(-hardest).mean()
    if listwise:
        places = torch.arange(len(logits))
        both = F.cross_entropy(logits, places) + F.cross_entropy(logits.T, places)
        loss = loss + listwise * both / 2
    return loss


def confusing_batches(
    neighbours: Rows, config: FusionConfig, rng: np.random.Generator
) -> Iterator[Rows]:
    """(b,) pictures at a time, each one once, in groups that a dual encoder holds for alike.

    Args:
        neighbours: (n, depth) the pictures that each is most often confused with.
        config: how many of these come together.
        rng: the source of all chance.
    """
    n = len(neighbours)
    is_left = np.ones(n, np.bool_)
    groups: list[int] = []
    for seed in rng.permutation(n).tolist():
        if not is_left[seed]:
            continue
        near = [one for one in rng.permutation(neighbours[seed]).tolist() if is_left[one]]
        group = [seed, *[one for one in near if one != seed][: config.neighbours - 1]]
        is_left[group] = False
        groups += group
    # Whole groups, in an order in which those of the end, that found few neighbours, are spread.
    blocks = [groups[start : start + config.neighbours] for start in range(0, n, config.neighbours)]
    order = [one for place in rng.permutation(len(blocks)) for one in blocks[place]]
    b = min(config.batch_size, n)
    for start in range(0, n - b + 1, b):
        yield np.array(order[start : start + b])


def fit_matcher(
    matcher: Matcher,
    train: Features,
    neighbours: Rows,
    held_out: tuple[Features, Shortlist],
    config: FusionConfig,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Train a classifier, which has the weights of its best epoch afterwards.

    Args:
        matcher: to be trained.
        train: what it is trained on.
        neighbours: see `confusing_batches`.
        held_out: features, and the candidates that are to be ranked again.
        config: the settings.
        say: gets a line an epoch.

    Returns:
        One record an epoch: loss, seconds, recalls after re-ranking, by the classifier alone and
        together with the dual encoder.
    """
    optimiser = optimiser_of(matcher, config.lr, config.weight_decay)
    total = config.epochs * max(len(neighbours) // config.batch_size, 1)
    log: list[dict[str, Any]] = []
    best: dict[str, Tensor] = {}
    done = 0
    for epoch in range(config.epochs):
        started = time.perf_counter()
        torch.manual_seed(config.seed * 100_003 + epoch)
        rng = np.random.default_rng((config.seed, epoch))
        drawn = draw_captions(train.picture, 1, rng)[:, 0]
        matcher.train()
        losses = []
        for rows in confusing_batches(neighbours, config, rng):
            with autocast():
                images = matcher.encode_images(matcher.images_of(train, rows))
                texts = matcher.encode_texts(matcher.texts_of(train, drawn[rows]))
                logits = matcher.compare(images, texts)
            loss = match_loss(logits, config.listwise)
            descend(matcher, optimiser, loss, config.lr * lr_factor(done, total, config.warmup))
            losses.append(loss.item())
            done += 1
        features, shortlist = held_out
        found = rerank(shortlist, matcher, features)
        alone, fused = found.at(math.inf), found.best()
        seconds = time.perf_counter() - started
        entry = {"epoch": epoch, "loss": float(np.mean(losses)), "seconds": seconds}
        entry |= {"alone": alone.recalls(), "metrics": fused.recalls(), "weight": fused.weight}
        if not log or fused.worth > max(one["worth"] for one in log):
            best = {name: value.clone() for name, value in matcher.state_dict().items()}
        log.append(entry | {"worth": fused.worth})
        say(
            f"epoch {epoch}: loss {entry['loss']:.3f}, t2i R@1 {alone.recalls()['t2i_r@1']:.1f}"
            f" alone, {fused.recalls()['t2i_r@1']:.1f} fused"
        )
    matcher.load_state_dict(best)
    matcher.eval()
    return log
