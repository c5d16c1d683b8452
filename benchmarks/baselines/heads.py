"""Alignment of any two kinds of features: a projection for each, and one of the objectives."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retriever import objectives
from retriever.towers import MAX_LOGIT_SCALE, Projection


def alignment_loss(
    objective: str, images: Tensor, texts: Tensor, owners: Tensor, logit_scale: Tensor
) -> Tensor:
    """One of the documents' objectives, of (b, d) pictures and (b·c, d) captions, unit rows.

    Args:
        objective: "squared", "squared+uniformity" or "clip".
        images: one row a picture.
        texts: the captions, c of each picture, picture by picture.
        owners: (b·c,) int64, the picture of each caption.
        logit_scale: 1 / temperature, for "clip".
    """
    images, texts = images.float(), texts.float()
    if objective == "clip":
        return objectives.clip_loss(images[owners], texts, logit_scale, owners)
    if objective == "squared":
        return objectives.squared_distance_loss(images[owners], texts)
    # Copies of a picture would count as pictures that are too near: one caption of each.
    each = len(texts) // len(images)
    return objectives.squared_uniformity_loss(images, texts[::each])


class Aligned(nn.Module):
    """What aligns pairs by an objective of `alignment_loss`, at a temperature that it learns."""

    def __init__(self, objective: str) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.objective = objective

    @property
    def logit_scale(self) -> Tensor:
        """1 / temperature."""
        return self.log_scale.exp().clamp(max=MAX_LOGIT_SCALE)


class Heads(Aligned):
    """Two projections: (b, f) image features and (b, g) text features → (b, d)."""

    def __init__(self, features: tuple[int, int], dim: int, objective: str) -> None:
        super().__init__(objective)
        self.image, self.text = (Projection(width, dim, 0.1) for width in features)

    def loss(self, images: Tensor, texts: Tensor, owners: Tensor) -> Tensor:
        """See `fit.System`."""
        embedded = self.embed_images(images), self.embed_texts(texts)
        return alignment_loss(self.objective, *embedded, owners, self.logit_scale)

    def embed_images(self, images: Tensor) -> Tensor:
        """(b, d) unit rows."""
        return F.normalize(self.image(images).float(), dim=1)

    def embed_texts(self, texts: Tensor) -> Tensor:
        """(b, d) unit rows."""
        return F.normalize(self.text(texts).float(), dim=1)
