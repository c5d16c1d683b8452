"""Texts that several threads ask at once go through the encoder together.

A server answers many people with one model. While it embeds a text, others come in; they wait for
the model anyway, so whoever gets it next takes them all: each text costs less, and nobody waits
longer than for the one before.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image

    from retriever.encoders import Encoder

MOST_TEXTS = 64  # in one go


class BatchingEncoder:
    """An encoder that any number of threads may ask for texts at the same time.

    Pictures go through one at a time: a model that reads one uses all cores as it is.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self.name = encoder.name
        self.dim = encoder.dim
        self.fingerprint = encoder.fingerprint
        self.max_text_tokens = encoder.max_text_tokens
        self.image_size = encoder.image_size
        self._guard = threading.Lock()
        self._model = threading.Lock()
        self._waiting: list[_Wish] = []

    def encode_images(
        self, images: Sequence[Image.Image | Path | NDArray[np.uint8]]
    ) -> NDArray[np.float32]:
        """As the encoder's own; see `retriever.encoders.Encoder`."""
        with self._model:
            return self._encoder.encode_images(images)

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """As the encoder's own, with what others ask meanwhile."""
        wish = _Wish(texts)
        with self._guard:
            self._waiting.append(wish)
        with self._model:
            if wish.rows is None and wish.error is None:
                self._serve()
        if wish.error is not None:
            raise wish.error
        assert wish.rows is not None, "whoever had the model served this wish or left it to us"
        return wish.rows

    def _serve(self) -> None:
        """Embeds what is waiting, this thread's own wish among it."""
        with self._guard:
            wishes, self._waiting = self._waiting, []
        while wishes:
            batch = [wishes.pop(0)]
            count = len(batch[0].texts)
            while wishes and count + len(wishes[0].texts) <= MOST_TEXTS:
                batch.append(wishes.pop(0))
                count += len(batch[-1].texts)
            try:
                rows = self._encoder.encode_texts([text for one in batch for text in one.texts])
            except Exception as error:  # whoever waits for it must hear of it
                for one in batch:
                    one.error = error
                continue
            begin = 0
            for one in batch:
                one.rows = rows[begin : begin + len(one.texts)]
                begin += len(one.texts)

    def is_cut(self, texts: Sequence[str]) -> list[bool]:
        """As the encoder's own."""
        return self._encoder.is_cut(texts)


class _Wish:
    """Texts that a thread waits for."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts
        self.rows: NDArray[np.float32] | None = None
        self.error: Exception | None = None
