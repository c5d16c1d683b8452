"""Autoencoder alignment: one code for both kinds of features, from which each is decoded.

The code of a picture decodes its own features and its caption's, and so does the code of the
caption; the distance of the two codes is part of the loss. The code, at unit length, is the
embedding. Ngiam et al. 2011, "Multimodal deep learning"; Feng, Wang & Li 2014, "Cross-modal
retrieval with correspondence autoencoder".
"""

import torch
from baselines.heads import Aligned, alignment_loss
from torch import Tensor, nn
from torch.nn import functional as F


def perceptron(inputs: int, outputs: int, hidden: int) -> nn.Sequential:
    """One hidden layer, with dropout."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.GELU(), nn.Dropout(0.1), nn.Linear(hidden, outputs)
    )


class Decoders(nn.Module):
    """Both kinds of features from a code, and how far they are from the true ones.

    Features are compared as they are after normalisation, channel by channel, so that one unit of
    error is one standard deviation on either side.
    """

    def __init__(self, features: tuple[int, int], dim: int, hidden: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(width, affine=False) for width in features)
        self.decoders = nn.ModuleList(perceptron(dim, width, hidden) for width in features)

    def normalise(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Features with mean 0 and variance 1 in each channel."""
        return self.norms[0](images.float()), self.norms[1](texts.float())

    def error(self, codes: Tensor, images: Tensor, texts: Tensor) -> Tensor:
        """(b,) mean squared error of each side from (b, d) codes, both added."""
        sides = zip(self.decoders, (images, texts), strict=True)
        errors = [(decode(codes).float() - true).square().mean(dim=1) for decode, true in sides]
        return errors[0] + errors[1]


class Autoencoder(Aligned):
    """Two encoders into one code, two decoders out of it.

    Args:
        features: widths of image and text features.
        dim: of the code.
        objective: of the two codes of a pair, beside reconstruction: "squared", or "clip".
        hidden: width of encoders and decoders.
    """

    def __init__(
        self, features: tuple[int, int], dim: int, objective: str, hidden: int = 768
    ) -> None:
        super().__init__(objective)
        self.decoders = Decoders(features, dim, hidden)
        self.encoders = nn.ModuleList(perceptron(width, dim, hidden) for width in features)

    def loss(self, images: Tensor, texts: Tensor, owners: Tensor) -> Tensor:
        """See `fit.System`."""
        images, texts = self.decoders.normalise(images, texts)
        seen, read = self.encoders[0](images), self.encoders[1](texts)
        rebuilt = self.decoders.error(torch.cat([seen[owners], read]), *(
            torch.cat([side, side]) for side in (images[owners], texts)
        )).mean()  # fmt: skip
        if self.objective == "squared":
            # Of the codes themselves: their length matters to the decoders, and keeps them apart.
            return rebuilt + (seen[owners] - read).float().square().mean()
        rows = F.normalize(seen.float(), dim=1), F.normalize(read.float(), dim=1)
        return rebuilt + alignment_loss(self.objective, *rows, owners, self.logit_scale)

    def embed_images(self, images: Tensor) -> Tensor:
        """(b, d) unit rows."""
        return F.normalize(self.encoders[0](self.decoders.norms[0](images.float())), dim=1)

    def embed_texts(self, texts: Tensor) -> Tensor:
        """(b, d) unit rows."""
        return F.normalize(self.encoders[1](self.decoders.norms[1](texts.float())), dim=1)
