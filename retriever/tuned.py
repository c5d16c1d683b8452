"""An encoder in a library that was tuned: what the model says, carried over by a head.

NumPy alone: who searches a tuned library needs no torch, and a query costs one small product more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from indexes.heads import Head

if TYPE_CHECKING:
    from indexes.records import ModelSpec
    from retriever.encoders import Array, Encoder, ImageInput


class TunedEncoder:
    """`base`, then a head; see `retriever.encoders.Encoder`.

    What `base` tells of itself besides, such as how pictures are prepared, holds here too.
    """

    def __init__(self, base: Encoder, head: Head, model: ModelSpec) -> None:
        self.base = base
        self.name = model.name
        self.dim = model.dim
        self.fingerprint = model.fingerprint
        self.max_text_tokens = base.max_text_tokens
        self.image_size = base.image_size
        self._head = head

    def __getattr__(self, name: str) -> Any:
        if name == "base":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self.base, name)

    def encode_images(self, images: Sequence[ImageInput]) -> Array:
        """Embeddings of pictures: (n, d) float32 unit rows; see `Encoder.encode_images`."""
        return self._head("image", self.base.encode_images(images))

    def encode_texts(self, texts: Sequence[str]) -> Array:
        """Embeddings of texts: (n, d) float32 unit rows; see `Encoder.encode_texts`."""
        return self._head("caption", self.base.encode_texts(texts))

    def is_cut(self, texts: Sequence[str]) -> list[bool]:
        """Which texts are read only in part; see `Encoder.is_cut`."""
        return self.base.is_cut(texts)
