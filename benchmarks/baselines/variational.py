"""Variational autoencoder alignment: Gaussian codes, and a joint posterior of both sides.

Each side says where the code lies and how sure it is of that. What both together say is the product
of their Gaussians and the prior's (a product of experts): Wu & Goodman 2018 (MVAE),
arXiv:1802.05335. Codes drawn from all three posteriors must decode both sides, so that a caption
alone tells of the picture; and the two sides' posteriors are drawn together as in Schönfeld et al.
2019 (CADA-VAE), arXiv:1812.01784. The mean, at unit length, is the embedding.
"""

import torch
from baselines.autoencoder import Decoders, perceptron
from torch import Tensor, nn
from torch.nn import functional as F

Gaussian = tuple[Tensor, Tensor]  # mean and log variance, (b, d) each


def product_of_experts(*experts: Gaussian) -> Gaussian:
    """The product of Gaussians and of the standard normal prior, normalised.

    Precisions add up, and the mean is that of all means, weighted by precision.
    """
    precisions = [torch.ones_like(experts[0][0]), *(torch.exp(-log) for _, log in experts)]
    total = torch.stack(precisions).sum(dim=0)
    weighted = [mean * one for (mean, _), one in zip(experts, precisions[1:], strict=True)]
    return torch.stack(weighted).sum(dim=0) / total, -total.log()


def kl_to_prior(mean: Tensor, log_variance: Tensor) -> Tensor:
    """(b,) Kullback-Leibler divergence from the standard normal, in nats."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1)


def sample(mean: Tensor, log_variance: Tensor) -> Tensor:
    """A code drawn so that gradients reach mean and variance. Kingma & Welling 2013, 1312.6114."""
    return mean + torch.randn_like(mean) * (0.5 * log_variance).exp()


class VariationalAutoencoder(nn.Module):
    """Two encoders into Gaussians, two decoders.

    Args:
        features: widths of image and text features.
        dim: of the code.
        kl_weight: of the divergence per dimension, beside the error per channel; reached in a line
            over `warmup` steps, so that the codes are of use before they are made simple.
        align_weight: of the distance of both sides' Gaussians.
    """

    steps: Tensor

    def __init__(
        self,
        features: tuple[int, int],
        dim: int,
        kl_weight: float = 0.02,
        align_weight: float = 1.0,
        hidden: int = 768,
        warmup: int = 100,
    ) -> None:
        super().__init__()
        self.decoders = Decoders(features, dim, hidden)
        self.encoders = nn.ModuleList(perceptron(width, 2 * dim, hidden) for width in features)
        self.kl_weight, self.align_weight, self.warmup = kl_weight, align_weight, warmup
        self.register_buffer("steps", torch.zeros(()))

    def posterior(self, side: int, features: Tensor) -> Gaussian:
        """Of normalised features; side 0 is images."""
        mean, log_variance = self.encoders[side](features).float().chunk(2, dim=1)
        return mean, log_variance.clamp(-8, 4)

    def loss(self, images: Tensor, texts: Tensor, owners: Tensor) -> Tensor:
        """See `fit.System`."""
        images, texts = self.decoders.normalise(images, texts)
        images = images[owners]
        seen, read = self.posterior(0, images), self.posterior(1, texts)
        self.steps += 1
        weight = self.kl_weight * (self.steps / self.warmup).clamp(max=1)
        total = torch.zeros(())
        for mean, log_variance in (seen, read, product_of_experts(seen, read)):
            error = self.decoders.error(sample(mean, log_variance), images, texts)
            divergence = kl_to_prior(mean, log_variance) / mean.shape[1]
            total = total + (error + weight * divergence).mean()
        # The squared 2-Wasserstein distance of two Gaussians with diagonal covariances.
        spreads = (0.5 * seen[1]).exp() - (0.5 * read[1]).exp()
        apart = ((seen[0] - read[0]).square() + spreads.square()).mean()
        return total + self.align_weight * apart

    def embed_images(self, images: Tensor) -> Tensor:
        """(b, d) unit rows."""
        return F.normalize(self.posterior(0, self.decoders.norms[0](images.float()))[0], dim=1)

    def embed_texts(self, texts: Tensor) -> Tensor:
        """(b, d) unit rows."""
        return F.normalize(self.posterior(1, self.decoders.norms[1](texts.float()))[0], dim=1)
