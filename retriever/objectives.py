"""Training objectives: each a small function of two embedding matrices, rows of unit length.

Row i of `images` and row i of `texts` are a positive pair. Where a picture stands in several rows
(one for each of its captions), `groups` says which rows belong to the same picture: those are never
negatives of each other.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

# The logit of a pair that must not count as a negative: exp() of it is 0 in every dtype, and unlike
# -inf it cannot turn a row of nothing but such pairs into NaN.
_MASKED = -1e4


def _same_picture(groups: Tensor | None, b: int, device: torch.device) -> Tensor:
    """(b, b) bool: the off-diagonal pairs whose two rows are the same picture."""
    if groups is None:
        return torch.zeros(b, b, dtype=torch.bool, device=device)
    same = groups[:, None] == groups[None, :]
    return same & ~torch.eye(b, dtype=torch.bool, device=device)


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

    def uniformity(rows: Tensor) -> Tensor:
        squared = torch.pdist(rows).square()
        return torch.logsumexp(-t * squared, dim=0) - math.log(squared.numel())

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
    logits = logit_scale * images @ texts.T
    logits = logits.masked_fill(_same_picture(groups, b, images.device), _MASKED)
    targets = torch.arange(b, device=images.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


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
    logits = logit_scale * images @ texts.T + logit_bias
    signs = 2 * torch.eye(b, device=images.device, dtype=images.dtype) - 1
    losses = -F.logsigmoid(signs * logits)
    return losses.masked_fill(_same_picture(groups, b, images.device), 0.0).sum() / b


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
    cosines = images @ texts.T
    positives = cosines.diagonal()
    excluded = torch.eye(b, dtype=torch.bool, device=images.device)
    excluded = excluded | _same_picture(groups, b, images.device)
    negatives = cosines.masked_fill(excluded, _MASKED)
    image_to_text = (margin + negatives.amax(dim=1) - positives).relu()
    text_to_image = (margin + negatives.amax(dim=0) - positives).relu()
    return (image_to_text + text_to_image).mean()
