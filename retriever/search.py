"""A query → ranked pictures, each with the caption that fits best, or ranked captions.

Every part of a query, text or picture, is one unit row. The parts are added with their weights and
the sum is made a unit row again, so that the scores shown are cosines whatever the query was.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from indexes.errors import StoreDamagedError
from retriever.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image

    from indexes.records import Source
    from indexes.store import Store
    from retriever.encoders import Encoder

Rows = NDArray[np.float32]

# Parts that cancel each other out leave rounding noise of this order, which points nowhere.
MIN_QUERY_LENGTH = 1e-4


@dataclass(frozen=True, slots=True)
class Query:
    """What is asked: texts and pictures, each with its weight; a negative one pushes away."""

    texts: tuple[tuple[str, float], ...] = ()
    images: tuple[tuple[Path | Image.Image, float], ...] = ()

    @property
    def source(self) -> Source | None:
        """Where its embedding comes from; None if from texts and pictures together."""
        if self.texts and self.images:
            return None
        return "text" if self.texts else "image"


@dataclass(frozen=True, slots=True)
class Hit:
    """A picture found; rank 1 is the best, the score is the cosine between query and picture.

    caption: the caption of this picture that is nearest to the query; None if it has none.
    """

    rank: int
    score: float
    path: Path
    caption: str | None
    item_id: int


@dataclass(frozen=True, slots=True)
class CaptionHit:
    """A caption found; rank 1 is the best, the score is the cosine between query and caption.

    path, item_id: the first picture in the library that has this caption.
    """

    rank: int
    score: float
    caption: str
    path: Path
    item_id: int


class Searcher:
    """Answers queries from a store with the encoder that made it.

    The encoder is asked for at the first query, and a text query uses its text tower only.
    """

    def __init__(self, store: Store, encoder: Callable[[], Encoder]) -> None:
        self._store = store
        self._encoder = encoder

    def embed(self, query: Query) -> Rows:
        """The query as one unit row: (d,) float32.

        Raises:
            UsageError: nothing is asked, or the parts cancel each other out.
            PictureError: a query picture cannot be read.
        """
        if not query.texts and not query.images:
            raise UsageError("The query is empty: give a text, a picture or both")
        if not all(math.isfinite(weight) for _, weight in (*query.texts, *query.images)):
            raise UsageError("A weight must be a finite number")
        for text, _ in query.texts:
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as exc:
                raise UsageError("The text is not UTF-8") from exc
        encoder = self._encoder()
        total = np.zeros(encoder.dim, dtype=np.float64)
        if query.texts:
            rows = encoder.encode_texts([text for text, _ in query.texts])
            total += np.asarray([weight for _, weight in query.texts]) @ rows
        if query.images:
            rows = encoder.encode_images([image for image, _ in query.images])
            total += np.asarray([weight for _, weight in query.images]) @ rows
        length = np.linalg.norm(total)
        if length < MIN_QUERY_LENGTH:
            raise UsageError("The parts of the query cancel each other out: change the weights")
        return (total / length).astype(np.float32)

    def images(self, query: Query, k: int = 10, *, exact: bool = False) -> list[Hit]:
        """The k best pictures, fewer only if the library has fewer.

        A query picture that is in the library is an answer like any other: it comes first, with a
        score near 1, and so do its copies.

        Raises:
            UsageError: k < 1, or as `embed`.
            PictureError: a query picture cannot be read.
        """
        row = self._row(query, k)
        absent: set[int] = set()
        while True:
            (match,) = self._store.search("image", row, k, source=query.source, exact=exact)
            items = self._store.items(match.ids.tolist())
            if len(items) == len(match.ids):
                break
            # Another process removed some since the search: ask again.
            gone = set(match.ids.tolist()) - {item.item_id for item in items}
            absent = _not_again(absent, gone)
        scores = dict(zip(match.ids.tolist(), match.scores.tolist(), strict=True))
        captions = self._store.nearest_captions(match.ids.tolist(), row[0])
        hits = []
        for rank, item in enumerate(items, start=1):
            # Captions that another process replaces meanwhile were compared with no query.
            caption = captions.get(item.item_id, item.captions[0] if item.captions else None)
            text = caption.text if caption else None
            hits.append(Hit(rank, scores[item.item_id], item.path, text, item.item_id))
        return hits

    def captions(self, query: Query, k: int = 10, *, exact: bool = False) -> list[CaptionHit]:
        """The k best captions, each text once, fewer only if the library has fewer texts.

        The captions of a query picture that is in the library are answers like any others.

        Raises:
            UsageError: k < 1, or as `embed`.
            PictureError: a query picture cannot be read.
        """
        row = self._row(query, k)
        absent: set[int] = set()
        wanted = k
        while True:
            (match,) = self._store.search("caption", row, wanted, source=query.source, exact=exact)
            found = self._store.captions(match.ids.tolist())
            if len(found) < len(match.ids):
                # Another process removed some since the search: ask again.
                gone = {one for one in match.ids.tolist() if not self._store.captions([one])}
                absent = _not_again(absent, gone)
                continue
            nearest: dict[str, tuple[int, float]] = {}
            for (item_id, caption), score in zip(found, match.scores.tolist(), strict=True):
                nearest.setdefault(caption.text, (item_id, score))
            if len(nearest) < k and len(found) == wanted:
                wanted *= 4  # the same text stands under many pictures
                continue
            best = list(nearest.items())[:k]
            items = self._store.items([item_id for _, (item_id, _) in best])
            paths = {item.item_id: item.path for item in items}
            if all(item_id in paths for _, (item_id, _) in best):
                break
            absent = _not_again(absent, {item_id for _, (item_id, _) in best} - paths.keys())
        return [
            CaptionHit(rank, score, text, paths[item_id], item_id)
            for rank, (text, (item_id, score)) in enumerate(best, start=1)
        ]

    def _row(self, query: Query, k: int) -> Rows:
        if k < 1:
            raise UsageError(f"k must be at least 1, not {k}")
        return self.embed(query)[None]


def _not_again(absent: set[int], gone: set[int]) -> set[int]:
    """Ids found that are of nothing; raises StoreDamagedError for one that was so before."""
    if absent & gone:
        raise StoreDamagedError(
            "vectors of removed pictures are found: `retriever repair` mends it"
        )
    return absent | gone
