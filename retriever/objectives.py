"""Training objectives: each a small function of two embedding matrices, rows of unit length.

Row i of `images` and row i of `texts` are a positive pair. Where a picture stands in several rows
(one for each of its captions), `groups` says which rows belong to the same picture: those are never
negatives of each other.

The memory of a loss and of its gradient grows with b, not with b²: of a large batch a few rows are
compared with all others at a time, and compared again when the gradient is asked for.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# The logit of a pair that must not count as a negative: exp() of it is 0 in every dtype, and unlike
# -inf it cannot turn a row of nothing but such pairs into NaN.
_MASKED = -1e4


# Pairs compared at a time: 4 MB of logits, which stay in a CPU's cache.
_PAIRS_AT_A_TIME = 1 << 20

Compare = Callable[..., tuple[Tensor, ...]]


class _Again(torch.autograd.Function):
    """`compare(rows, *tensors)`, of which nothing is kept: the backward pass makes it again.

    torch's own checkpoint() does that too, but loads the whole of its compiler for it.
    """

    @staticmethod
    def forward(ctx: Any, compare: Compare, rows: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.compare = compare
        ctx.save_for_backward(rows, *tensors)
        return compare(rows, *tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        with torch.enable_grad():
            inputs = [
                one.detach().requires_grad_(is_wanted)
                for one, is_wanted in zip(tensors, wanted, strict=True)
            ]
            made = ctx.compare(rows, *inputs)
        leaves = [one for one in inputs if one.requires_grad]
        found = iter(torch.autograd.grad(made, leaves, gradients))
        return None, None, *(next(found) if is_wanted else None for is_wanted in wanted)


def _in_blocks(compare: Compare, embeddings: Tensor, *others: Tensor | float) -> list[list[Tensor]]:
    """What `compare` gives for each block of rows, in a list for each of its results.

    Args:
        compare: (r,) row numbers, their (r, d) embeddings and the others → tensors.
        embeddings: (b, d), all rows.
        others: what `compare` needs besides, whole.
    """
    b = len(embeddings)
    rows = torch.arange(b, device=embeddings.device)
    whole = [torch.as_tensor(one, device=embeddings.device) for one in others]
    size = max(_PAIRS_AT_A_TIME // b, 1)
    if b <= size:
        return [[one] for one in compare(rows, embeddings, *whole)]
    blocks = zip(torch.split(rows, size), torch.split(embeddings, size), strict=True)
    found = [_Again.apply(compare, *block, *whole) for block in blocks]
    return list(map(list, zip(*found, strict=True)))


def _same_picture(groups: Tensor | None, rows: Tensor, b: int) -> Tensor:
    """(r, b) bool: the pairs of a row and another one that are the same picture."""
    if groups is None:
        return torch.zeros(len(rows), b, dtype=torch.bool, device=rows.device)
    return (groups[rows, None] == groups) & ~_itself(rows, b)


def _itself(rows: Tensor, b: int) -> Tensor:
    """(r, b) bool: where each row meets itself."""
    return rows[:, None] == torch.arange(b, device=rows.device)


def squared_distance_loss(images: Tensor, texts: Tensor) -> Tensor:
    """Mean squared distance of positive pairs, `mean ‖f(x) − g(t)‖²`, in [0, 4].

    It has no term that keeps different pictures apart, so its minimum is reached with every
    embedding on one point: use it only with what prevents that (`squared_uniformity_loss`).
    It is the alignment of Wang & Isola 2020 with α = 2, arXiv:2005.10242.

    Args:
        images: (b, d) float, unit rows.
        texts: (b, d) float, unit rows.
    """
    return (images - texts).square().sum(dim=1).mean()


def squared_uniformity_loss(
    images: Tensor, texts: Tensor, weight: float = 1.0, t: float = 2.0
) -> Tensor:
    """Squared distance plus `weight` times the uniformity of both sides.

    Uniformity is the log of the mean Gaussian potential of all pairs, `log mean exp(−t‖x − x′‖²)`:
    0 when all rows coincide, about −2t for rows spread over the sphere. Wang & Isola 2020,
    arXiv:2005.10242.

    Args:
        images: (b, d) float, unit rows; b ≥ 2.
        texts: (b, d) float, unit rows.
        weight: of the uniformity term, averaged over both sides.
        t: steepness of the potential.
    """

    def uniformity(points: Tensor) -> Tensor:
        b = len(points)

        def compare(rows: Tensor, block: Tensor, points: Tensor) -> tuple[Tensor, ...]:
            # Of unit rows ‖x − x′‖² is 2 − 2 cos; each pair is counted once.
            potentials = 2 * t * (block @ points.T - 1)
            counted = rows[:, None] < torch.arange(b, device=rows.device)
            return (potentials.masked_fill(~counted, _MASKED).logsumexp(dim=(0, 1)),)

        (sums,) = _in_blocks(compare, points, points)
        return torch.stack(sums).logsumexp(dim=0) - math.log(b * (b - 1) / 2)

    spread = (uniformity(images) + uniformity(texts)) / 2
    return squared_distance_loss(images, texts) + weight * spread


def clip_loss(
    images: Tensor, texts: Tensor, logit_scale: Tensor | float, groups: Tensor | None = None
) -> Tensor:
    """Symmetric InfoNCE: each row must pick its partner among all rows of the other side.

    The mean of the cross-entropies image-to-text and text-to-image over scaled cosines. Radford et
    al. 2021 (CLIP), arXiv:2103.00020.

    Args:
        images: (b, d) float, unit rows.
        texts: (b, d) float, unit rows.
        logit_scale: 1 / temperature.
        groups: (b,) int, the picture of each row; None when all differ.
    """
    b = len(images)

    def compare(
        rows: Tensor, block: Tensor, texts: Tensor, logit_scale: Tensor
    ) -> tuple[Tensor, ...]:
        logits = logit_scale * block @ texts.T
        logits = logits.masked_fill(_same_picture(groups, rows, b), _MASKED)
        image_to_text = F.cross_entropy(logits, rows, reduction="sum")
        return image_to_text, logits.logsumexp(dim=0), logits.gather(1, rows[:, None]).squeeze(1)

    image_to_text, columns, partners = _in_blocks(compare, images, texts, logit_scale)
    # A column is whole only when all blocks are there.
    text_to_image = torch.stack(columns).logsumexp(dim=0) - torch.cat(partners)
    return (torch.stack(image_to_text).sum() + text_to_image.sum()) / (2 * b)


def siglip_loss(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    groups: Tensor | None = None,
) -> Tensor:
    """Pairwise sigmoid: every pair of rows is a yes-or-no question of its own.

    The sum over all pairs divided by b, as in the paper, so that positives keep their weight in
    larger batches. Zhai et al. 2023 (SigLIP), arXiv:2303.15343.

    Args:
        images: (b, d) float, unit rows.
        texts: (b, d) float, unit rows.
        logit_scale: multiplies the cosines; the paper starts at 10.
        logit_bias: added to the logits; the paper starts at −10, as nearly all pairs are negative.
        groups: (b,) int, the picture of each row; None when all differ.
    """
    b = len(images)

    def compare(
        rows: Tensor, block: Tensor, texts: Tensor, logit_scale: Tensor, logit_bias: Tensor
    ) -> tuple[Tensor, ...]:
        logits = logit_scale * block @ texts.T + logit_bias
        losses = -F.logsigmoid(torch.where(_itself(rows, b), logits, -logits))
        return (losses.masked_fill(_same_picture(groups, rows, b), 0.0).sum(),)

    (sums,) = _in_blocks(compare, images, texts, logit_scale, logit_bias)
    return torch.stack(sums).sum() / b


def triplet_loss(
    images: Tensor, texts: Tensor, margin: float = 0.2, groups: Tensor | None = None
) -> Tensor:
    """Hinge on the hardest negative of each row in the batch, both directions, mean over rows.

    Faghri et al. 2018 (VSE++), arXiv:1707.05612 (there the sum over rows).

    Args:
        images: (b, d) float, unit rows.
        texts: (b, d) float, unit rows.
        margin: by how much a positive's cosine must exceed the hardest negative's.
        groups: (b,) int, the picture of each row; None when all differ.
    """
    b = len(images)

    def compare(rows: Tensor, block: Tensor, texts: Tensor) -> tuple[Tensor, ...]:
        cosines = block @ texts.T
        excluded = _itself(rows, b) | _same_picture(groups, rows, b)
        negatives = cosines.masked_fill(excluded, _MASKED)
        partners = cosines.gather(1, rows[:, None]).squeeze(1)
        return negatives.amax(dim=1), negatives.amax(dim=0), partners

    by_row, by_column, partners = _in_blocks(compare, images, texts)
    positives = torch.cat(partners)
    image_to_text = (margin + torch.cat(by_row) - positives).relu()
    text_to_image = (margin + torch.stack(by_column).amax(dim=0) - positives).relu()
    return (image_to_text + text_to_image).mean()
