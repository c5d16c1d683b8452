"""Torch modules: image towers, text towers, and the dual encoder that joins two of them.

A tower turns its input into features; a projection turns features into embeddings in the shared
space. Everything is built from one plain dictionary (`DualEncoder.config`), which is what a
checkpoint stores beside the weights.
"""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

# CLIP's bound on the logit scale: beyond it the softmax is a hard maximum and training blows up.
MAX_LOGIT_SCALE = 100.0


def fold_batch_norms(module: nn.Module) -> None:
    """Merge every BatchNorm into the convolution before it, in place, on a module in eval mode.

    Statistics of small batches harm a fine-tuned backbone, so they stay frozen; folded away they
    also cost nothing.
    """
    for part in module.children():
        fold_batch_norms(part)
    for name, following in pairwise(list(module._modules)):
        child, norm = module._modules[name], module._modules[following]
        if isinstance(child, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            module._modules[name] = fuse_conv_bn_eval(child, norm)
            # timm's BatchNormAct2d carries the activation that follows; it must survive.
            module._modules[following] = getattr(norm, "act", nn.Identity())


class BackboneTower(nn.Module):
    """A convolutional network of timm, average-pooled, no classifier: (b, 3, s, s) → (b, f)."""

    def __init__(self, architecture: str) -> None:
        super().__init__()
        import timm

        backbone: Any = timm.create_model(architecture, num_classes=0).eval()
        self.features: int = backbone.num_features
        fold_batch_norms(backbone)
        self.backbone = backbone

    def train(self, mode: bool = True) -> Self:
        """As of any module; but BatchNorms that could not be folded stay frozen."""
        super().train(mode)
        self.backbone.eval()
        return self

    def stages(self) -> list[nn.Module]:
        """The parts from the input upwards, so that the lowest can be frozen."""
        parts = [getattr(self.backbone, name, None) for name in ("conv_stem", "conv_head")]
        blocks = getattr(self.backbone, "blocks", None)
        if blocks is None or None in parts:
            return list(self.backbone.children())
        return [self.backbone.conv_stem, *blocks, self.backbone.conv_head]

    def forward(self, pixels: Tensor) -> Tensor:
        """(b, 3, s, s) normalised pixels → (b, f) features."""
        maps: Tensor = self.backbone.forward_features(pixels)
        return maps.mean(dim=(2, 3))


class SmallCNN(nn.Module):
    """Four strided convolutions learned from scratch: (b, 3, s, s) → (b, f)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        widths = [3, width, 2 * width, 4 * width, 8 * width]
        self.layers = nn.Sequential()
        for before, after in pairwise(widths):
            # GroupNorm: the same in training and use, whatever the batch.
            conv = nn.Conv2d(before, after, 3, stride=2, padding=1)
            self.layers.extend([conv, nn.GroupNorm(8, after), nn.ReLU()])
        self.features = widths[-1]

    def stages(self) -> list[nn.Module]:
        """The parts from the input upwards, so that the lowest can be frozen."""
        return [layer for layer in self.layers if isinstance(layer, nn.Conv2d)]

    def forward(self, pixels: Tensor) -> Tensor:
        """(b, 3, s, s) normalised pixels → (b, f) features."""
        maps: Tensor = self.layers(pixels)
        return maps.mean(dim=(2, 3))


def _mean_of_tokens(states: Tensor, attention_mask: Tensor) -> Tensor:
    """(b, t, f) states and (b, t) mask → (b, f), the mean over real tokens."""
    weights = attention_mask.to(states.dtype)[:, :, None]
    return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


class Dropout(nn.Dropout):
    """As torch's, which on a CPU draws its random numbers one by one: that takes ten times as long.

    Four values share 64 random bits there, so the probability is a multiple of 1/65536. Kept for
    the gradient is one byte a value. Srivastava et al. 2014, jmlr.org/papers/v15/srivastava14a.
    """

    def forward(self, values: Tensor) -> Tensor:
        """Values of any shape → the same, some of them 0 and the others larger by 1 / (1 − p)."""
        dropped = round(self.p * 65536)
        if not self.training or values.device.type != "cpu" or dropped in (0, 65536):
            return super().forward(values)
        words = torch.empty(-(-values.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        halves = words.view(torch.int16)[: values.numel()].view(values.shape)
        return torch.where(halves >= dropped - 32768, values, 0.0) * (65536 / (65536 - dropped))


class TransformerLayer(nn.Module):
    """One post-norm encoder layer of BERT. Devlin et al. 2019, arXiv:1810.04805."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=1e-12)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = Dropout(dropout)

    def forward(self, states: Tensor, bias: Tensor) -> Tensor:
        """(b, t, width) states, (b, 1, 1, t) attention bias → (b, t, width)."""
        b, t, width = states.shape
        qkv = self.qkv(states).view(b, t, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        # Spelled out: for texts this short torch's fused kernel takes 1.6 times as long on a CPU.
        scores = (query / math.sqrt(width // self.heads)) @ key.transpose(2, 3) + bias
        mixed = scores.softmax(dim=3).to(value.dtype) @ value
        mixed = mixed.transpose(1, 2).reshape(b, t, width)
        states = self.attention_norm(states + self.dropout(self.out(mixed)))
        changed = self.down(F.gelu(self.up(states)))
        out: Tensor = self.norm(states + self.dropout(changed))
        return out


class TransformerTower(nn.Module):
    """A BERT-like sentence encoder, mean over tokens: (b, t) ids → (b, f)."""

    def __init__(
        self,
        vocabulary: int,
        positions: int,
        width: int,
        layers: int,
        heads: int,
        hidden: int,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(positions, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = Dropout(dropout)
        self.layers = nn.ModuleList(
            TransformerLayer(width, heads, hidden, dropout) for _ in range(layers)
        )
        self.features = width

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(b, t) int64 ids and their mask, 1 for real tokens → (b, f) features."""
        place = torch.arange(input_ids.shape[1], device=input_ids.device)
        states = self.tokens(input_ids) + self.positions(place)
        states = self.dropout(self.norm(states))
        bias = (1.0 - attention_mask.to(states.dtype))[:, None, None, :] * -1e4
        for layer in self.layers:
            states = layer(states, bias)
        return _mean_of_tokens(states, attention_mask)


class StaticTower(nn.Module):
    """One vector a token, weighted by a learned importance and averaged: (b, t) ids → (b, f)."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.importance = nn.Embedding(vocabulary, 1)
        nn.init.zeros_(self.importance.weight)
        self.features = width

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(b, t) int64 ids and their mask, 1 for real tokens → (b, f) features."""
        weights = self.importance(input_ids).squeeze(2).exp() * attention_mask
        weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-6)
        mixed: Tensor = (self.tokens(input_ids) * weights[:, :, None]).sum(dim=1)
        return mixed


class GRUTower(nn.Module):
    """Token embeddings and a bidirectional GRU learned from scratch: (b, t) ids → (b, f)."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.gru = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.features = 2 * width

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(b, t) int64 ids and their mask, 1 for real tokens → (b, f) features."""
        # Up to the last real token: tokens that training hides leave holes in the mask.
        place = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
        lengths = (attention_mask * place).amax(dim=1).clamp(min=1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(
            self.tokens(input_ids) * attention_mask[:, :, None],
            lengths,
            batch_first=True,
            enforce_sorted=False,
        )
        states, _ = nn.utils.rnn.pad_packed_sequence(
            self.gru(packed)[0], batch_first=True, total_length=input_ids.shape[1]
        )
        return _mean_of_tokens(states, attention_mask)


class Projection(nn.Module):
    """Features to the shared space: a linear map plus a gated correction, (b, f) → (b, d).

    The correction starts at zero, so that training begins from the linear map.
    """

    def __init__(self, features: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.linear = nn.Linear(features, dim)
        self.up = nn.Linear(features, 2 * dim)
        self.down = nn.Linear(2 * dim, dim)
        self.dropout = Dropout(dropout)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, features: Tensor) -> Tensor:
        """(b, f) features → (b, d), not yet of unit length."""
        features = self.dropout(self.norm(features))
        change = self.down(self.dropout(F.gelu(self.up(features))))
        embeddings: Tensor = self.linear(features) + change
        return embeddings


def build_image_tower(config: Mapping[str, Any]) -> BackboneTower | SmallCNN:
    """The image tower that `config["tower"]` names: "cnn", or an architecture of timm."""
    if config["tower"] == "cnn":
        return SmallCNN(config.get("width", 32))
    return BackboneTower(config["tower"])


def build_text_tower(
    config: Mapping[str, Any], dropout: float
) -> TransformerTower | StaticTower | GRUTower:
    """The text tower that `config["tower"]` names: "transformer", "static" or "gru"."""
    vocabulary, width = config["vocabulary"], config["width"]
    if config["tower"] == "transformer":
        return TransformerTower(
            vocabulary,
            config["max_tokens"],
            width,
            config["layers"],
            config["heads"],
            config["hidden"],
            dropout,
        )
    if config["tower"] == "static":
        return StaticTower(vocabulary, width)
    if config["tower"] == "gru":
        return GRUTower(vocabulary, width)
    raise ValueError(f"unknown text tower {config['tower']!r}: transformer, static or gru")


class DualEncoder(nn.Module):
    """An image tower, a text tower, a projection for each, and a learned logit scale and bias.

    Args:
        config: `dim`, `dropout`, and a mapping for each side: `image` with `tower`, `size`, `mean`,
            `std`; `text` with `tower`, `vocabulary`, `width`, `max_tokens` and, for a transformer,
            `layers`, `heads`, `hidden`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = dict(config)
        image, text = config["image"], config["text"]
        self.image_tower = build_image_tower(image)
        dropout = config.get("dropout", 0.1)
        self.text_tower = build_text_tower(text, dropout)
        self.image_projection = Projection(self.image_tower.features, config["dim"], dropout)
        self.text_projection = Projection(self.text_tower.features, config["dim"], dropout)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))
        shape = (1, 3, 1, 1)
        self.register_buffer("mean", torch.tensor(image["mean"]).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(image["std"]).view(shape), persistent=False)

    @property
    def logit_scale(self) -> Tensor:
        """1 / temperature, at most 100."""
        return self.log_scale.exp().clamp(max=MAX_LOGIT_SCALE)

    def image_features(self, pixels: Tensor) -> Tensor:
        """(b, h, w, 3) uint8 RGB → (b, f) features, before the projection."""
        # permute() keeps the memory as it is: the channels-last layout that CPUs like best.
        scaled = pixels.permute(0, 3, 1, 2).float() / 255
        features: Tensor = self.image_tower((scaled - self.mean) / self.std)
        return features.float()

    def text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(b, t) int64 token ids and (b, t) mask → (b, f) features, before the projection."""
        features: Tensor = self.text_tower(input_ids, attention_mask)
        return features.float()

    def project_images(self, features: Tensor) -> Tensor:
        """(b, f) image features → (b, d) unit rows."""
        return F.normalize(self.image_projection(features).float(), dim=1)

    def project_texts(self, features: Tensor) -> Tensor:
        """(b, f) text features → (b, d) unit rows."""
        return F.normalize(self.text_projection(features).float(), dim=1)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(b, h, w, 3) uint8 RGB → (b, d) unit rows."""
        return self.project_images(self.image_features(pixels))

    def encode_texts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(b, t) int64 token ids and (b, t) mask → (b, d) unit rows."""
        return self.project_texts(self.text_features(input_ids, attention_mask))
