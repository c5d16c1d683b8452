"""The two towers of an open_clip model by themselves, from what a query has to unit rows.

In open_clip's modules both towers are mixed, rows are made unit rows outside, and every text is
padded to the full length. Here each tower stands alone, to be loaded, copied or exported without
the other.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from retriever.errors import EncoderError

# What timm's modules are called on to become one convolution.
_FOLDS = ("fuse", "reparameterize", "switch_to_deploy")
_POOLS = ("first", "last", "argmax", "eos")


class ImageTower(nn.Module):
    """(b, s, s, 3) uint8 RGB → (b, d) float32 unit rows.

    Args:
        visual: open_clip's image tower.
        mean: of red, green and blue, where 1 is full.
        std: likewise.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, visual: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.visual = visual
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """(b, s, s, 3) uint8 → (b, d)."""
        scaled = pixels.permute(0, 3, 1, 2).float() / 255
        return _unit_rows(self.visual((scaled - self.mean) / self.std))


class TextTower(nn.Module):
    """(b, t) int64 tokens → (b, d) float32 unit rows, through any text tower of open_clip."""

    # Whether a token changes nothing before it, so that what follows the end may be left out.
    is_causal = False

    def __init__(self, text: nn.Module) -> None:
        super().__init__()
        self.text = text

    def read(self, tokens: NDArray[Any]) -> int:
        """How many of the columns of (b, t) tokens must be read: all, unless it is causal."""
        return int(tokens.shape[1])

    def forward(self, input_ids: Tensor) -> Tensor:
        """(b, t) int64 → (b, d)."""
        return _unit_rows(self.text(input_ids))


class PlainTextTower(TextTower):
    """CLIP's text transformer, which may read as many tokens as there are.

    It is causal as CLIP trained it: a query of six tokens then needs six positions, not 77.

    Args:
        owner: open_clip's `CLIP` or `TextTransformer`, whose parts have the same names.
    """

    mask: Tensor | None

    def __init__(self, owner: Any) -> None:
        super().__init__(nn.Identity())
        prefix = "text_" if hasattr(owner, "text_pool_type") else ""
        self.pool: str = getattr(owner, f"{prefix}pool_type")
        self.end: int = getattr(owner, f"{prefix}eos_id")
        self.tokens = owner.token_embedding
        self.positions = owner.positional_embedding
        self.transformer = owner.transformer
        self.norm = owner.ln_final
        self.projection = owner.text_projection
        self.register_buffer("mask", owner.attn_mask)
        self.is_causal = self.mask is not None and self.pool in ("argmax", "eos")

    def read(self, tokens: NDArray[Any]) -> int:
        """How many of the columns of (b, t) tokens must be read."""
        if not self.is_causal or not len(tokens):
            return int(tokens.shape[1])
        return int(self._places(tokens).max()) + 1

    def _places(self, tokens: Any) -> Any:
        """Where each text is read off, for causal towers: (b,) columns."""
        if self.pool == "argmax":  # the end has the highest number of all tokens
            return tokens.argmax(-1)
        found = tokens == self.end
        return (found.int() if isinstance(found, Tensor) else found).argmax(-1)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(b, t) int64 → (b, d)."""
        t, kind = input_ids.shape[1], self.transformer.get_cast_dtype()
        states = self.tokens(input_ids).to(kind) + self.positions[:t].to(kind)
        mask = None if self.mask is None else self.mask[:t, :t]
        states = self.transformer(states, attn_mask=mask)
        if self.pool in ("argmax", "eos"):
            places = self._places(input_ids)[:, None, None].expand(-1, 1, states.shape[2])
            pooled = states.gather(1, places)[:, 0]
        else:
            pooled = states[:, 0 if self.pool == "first" else -1]
        pooled = self.norm(pooled)  # works on each token alone, so one is enough
        if isinstance(self.projection, nn.Linear):
            pooled = self.projection(pooled)
        elif self.projection is not None:
            pooled = pooled @ self.projection
        return _unit_rows(pooled)


class WithoutToken(nn.Module):
    """A text tower that reads 0 in place of a token that its tokenizer adds (`strip_sep_token`)."""

    def __init__(self, tower: nn.Module, token: int) -> None:
        super().__init__()
        self.tower = tower
        self.token = token

    def forward(self, input_ids: Tensor) -> Tensor:
        """(b, t) int64 → (b, d)."""
        kept = torch.where(input_ids == self.token, torch.zeros_like(input_ids), input_ids)
        rows: Tensor = self.tower(kept)
        return rows


def text_tower(model: Any) -> TextTower:
    """The text tower of an open_clip model, cut free of the rest."""
    owner = getattr(model, "text", model)
    is_plain = hasattr(owner, "token_embedding") and getattr(owner, "cls_emb", None) is None
    if not is_plain or getattr(owner, "use_pad_mask", False):
        return TextTower(owner)
    pool = getattr(owner, "text_pool_type", None) or owner.pool_type
    if pool not in _POOLS:
        raise EncoderError(f"a text tower that pools by {pool!r} gives no row for a text")
    return PlainTextTower(owner)


def folded(visual: nn.Module) -> nn.Module:
    """The same tower with the branches of its convolutions made one, as timm knows how to.

    Parts of MobileCLIP are trained as sums of several convolutions; folded they run in half the
    time, and answer alike but for rounding. The original stays as it is.
    """
    if not any(hasattr(part, name) for part in visual.modules() for name in _FOLDS):
        return visual
    from timm.utils.model import reparameterize_model

    whole: nn.Module = reparameterize_model(visual.eval())
    return whole


def causal_mask(length: int) -> Tensor:
    """(length, length) float32 to be added to attention scores: -inf from a token to later ones."""
    return torch.full((length, length), -torch.inf).triu_(1)


class PlainAttention(nn.Module):
    """`nn.MultiheadAttention` without dropout or weights to show, spelled out.

    torch's own takes a fused path that no exporter knows, and fixes the number of tokens.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads = attention.num_heads
        self.scale = attention.head_dim**-0.5
        self.is_batch_first = attention.batch_first
        joint: Tensor | None = attention.in_proj_weight
        if joint is not None:
            weights = joint.chunk(3)
        else:
            weights = tuple(getattr(attention, f"{part}_proj_weight") for part in "qkv")
        bias: Tensor | None = attention.in_proj_bias
        biases = (None, None, None) if bias is None else bias.chunk(3)
        self.inputs = nn.ModuleList(map(_linear, weights, biases))
        self.out = attention.out_proj

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Like `nn.MultiheadAttention.forward`; masks are added to the scores."""
        parts = (query, key, value)
        if not self.is_batch_first:
            parts = tuple(part.transpose(0, 1) for part in parts)  # type: ignore[assignment]
        query, key, value = (
            project(part).reshape(*part.shape[:2], self.heads, -1).transpose(1, 2)
            for project, part in zip(self.inputs, parts, strict=True)
        )
        scores = (query * self.scale) @ key.transpose(2, 3)
        if attn_mask is not None:
            if attn_mask.dim() == 3:  # (b × heads, t, t)
                attn_mask = attn_mask.reshape(-1, self.heads, *attn_mask.shape[1:])
            scores = scores + attn_mask
        mixed = (scores.softmax(3) @ value).transpose(1, 2).flatten(2)
        mixed = self.out(mixed)
        return (mixed if self.is_batch_first else mixed.transpose(0, 1)), None


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def with_plain_attention(tower: nn.Module) -> nn.Module:
    """A copy of a tower that can be exported: with `PlainAttention` wherever torch's is."""
    return _replaced(deepcopy(tower), lambda part: isinstance(part, nn.MultiheadAttention))


def _replaced(module: nn.Module, is_old: Callable[[nn.Module], bool]) -> nn.Module:
    for name, part in module.named_children():
        if is_old(part):
            setattr(module, name, PlainAttention(part))  # type: ignore[arg-type]
        else:
            _replaced(part, is_old)
    return module


def _unit_rows(features: Any) -> Tensor:
    """(b, d) float32 of length 1; towers that caption (CoCa) give their tokens as well."""
    if isinstance(features, tuple):
        features = features[0]
    return F.normalize(features.float(), dim=-1)
