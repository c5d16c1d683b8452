"""Every picture as a point on a map: those that show alike lie together.

t-SNE of the stored embeddings (van der Maaten & Hinton 2008, jmlr.org/papers/v9/vandermaaten08a),
by scikit-learn, which takes a minute for 10,000 pictures. Of a larger library as many are placed
so, evenly drawn, and every other one among those that it is nearest to; so are pictures that come
later. The map is kept on disk: it is a cache, which may be deleted.
"""

from __future__ import annotations

import io
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from retriever.errors import MissingExtraError

if TYPE_CHECKING:
    from retriever.library import Library

MOST_PLACED = 10_000  # by t-SNE itself
NEIGHBOURS = 5
COMPONENTS = 50  # that t-SNE looks at
ANEW = 0.2  # of the pictures are newer than the map: it is drawn anew
MOST_SHOWN = 50_000
_BLOCK = 2048

Ids = NDArray[np.int64]
Points = NDArray[np.float32]
Rows = NDArray[np.float32]


class Map:
    """The map of a library, drawn in a thread of its own when it is first asked for."""

    def __init__(self, library: Library, file: Path) -> None:
        self._library = library
        self._file = file
        self._guard = threading.Lock()
        self._version: tuple[int, int] | None = None
        self._drawing: threading.Thread | None = None
        self._ids = np.empty(0, dtype=np.int64)
        self._points = np.empty((0, 2), dtype=np.float32)
        self.error: str | None = None

    def current(self) -> tuple[Ids, Points, bool] | None:
        """Ids (n,), places (n, 2) in [0, 1], and whether a newer map is on its way.

        None: the first one is being drawn, or see `error`.
        """
        version = self._library.version
        with self._guard:
            if version == self._version:
                return self._ids, self._points, False
            if self._drawing is None or not self._drawing.is_alive():
                if self._drawing is not None and self.error is not None:
                    return None  # it would fail again
                self._drawing = threading.Thread(target=self._draw, args=[version], daemon=True)
                self._drawing.start()
            # The former map, while the new one is drawn.
            return (self._ids, self._points, True) if len(self._ids) else None

    def _draw(self, version: tuple[int, int]) -> None:
        try:
            ids, rows = self._library.image_embeddings(MOST_SHOWN)
            known = self._read() if not len(self._ids) else (self._ids, self._points)
            points = placed(ids, rows, *known)
            self._write(ids, points)
        except Exception as error:  # told to whoever looks at the map
            self.error = str(error)
            return
        with self._guard:
            self._ids, self._points, self._version, self.error = ids, points, version, None

    def _read(self) -> tuple[Ids, Points]:
        try:
            with np.load(io.BytesIO(self._file.read_bytes()), allow_pickle=False) as kept:
                ids, points = kept["ids"], kept["points"]
                if str(kept["model"]) == self._library.model.fingerprint and len(ids) == len(
                    points
                ):
                    return ids.astype(np.int64), points.reshape(-1, 2).astype(np.float32)
        except (OSError, ValueError, KeyError, EOFError, TypeError):
            pass  # absent, or damaged, or of something else
        return np.empty(0, dtype=np.int64), np.empty((0, 2), dtype=np.float32)

    def _write(self, ids: Ids, points: Points) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, ids=ids, points=points, model=self._library.model.fingerprint)
        beside = self._file.with_suffix(f".{os.getpid()}.tmp")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            beside.write_bytes(buffer.getvalue())
            beside.replace(self._file)
        except OSError:
            beside.unlink(missing_ok=True)  # it is drawn again the next time


def placed(ids: Ids, rows: Rows, known_ids: Ids, known_points: Points) -> Points:
    """(n, 2) places in [0, 1] of pictures, those of a former map kept as far as they go.

    Args:
        ids: (n,) ascending.
        rows: (n, d) unit rows.
        known_ids: (m,) of a former map, ascending.
        known_points: (m, 2), their places there.

    Raises MissingExtraError if scikit-learn is not installed.
    """
    is_known = np.isin(ids, known_ids)
    if is_known.sum() >= (1 - ANEW) * len(ids) and len(ids):
        first = known_points[np.searchsorted(known_ids, ids[is_known])]
        return _among(rows, is_known, first)
    if len(ids) <= MOST_PLACED:
        return drawn(rows)
    chosen = np.zeros(len(ids), dtype=np.bool_)
    chosen[np.random.default_rng(0).choice(len(ids), MOST_PLACED, replace=False)] = True
    return _among(rows, chosen, drawn(rows[chosen]))


def drawn(rows: Rows) -> Points:
    """(n, 2) places in [0, 1] of unit rows (n, d), by t-SNE; the same rows give the same map."""
    if len(rows) < 4:  # nothing to lay out
        return np.stack(
            [np.linspace(0.25, 0.75, len(rows)), np.full(len(rows), 0.5)], axis=1
        ).astype(np.float32)
    try:
        from sklearn.decomposition import PCA  # type: ignore[import-untyped]
        from sklearn.manifold import TSNE  # type: ignore[import-untyped]
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
    except ModuleNotFoundError as exc:
        raise MissingExtraError("The map", "web") from exc
    count, dim = rows.shape
    if min(count, dim) > COMPONENTS:
        rows = PCA(COMPONENTS, svd_solver="randomized", random_state=0).fit_transform(rows)
    tsne = TSNE(perplexity=min(30.0, (count - 1) / 3), init="pca", random_state=0)
    # While others search, threads that wait for each other in a loop take ten times as long.
    with threadpool_limits(1):
        points = tsne.fit_transform(rows)
    low, high = points.min(axis=0), points.max(axis=0)
    scale = float((high - low).max()) or 1.0
    centred = (points - (low + high) / 2) / scale + 0.5
    inside: Points = np.clip(centred, 0, 1).astype(np.float32)
    return inside


def _among(rows: Rows, is_placed: NDArray[np.bool_], points: Points) -> Points:
    """Places of all: those given, and for each other row the mean of its nearest ones' places."""
    found = np.empty((len(rows), 2), dtype=np.float32)
    found[is_placed] = points
    others = np.flatnonzero(~is_placed)
    anchors = rows[is_placed]
    several = min(NEIGHBOURS, len(anchors))
    for begin in range(0, len(others), _BLOCK):
        block = others[begin : begin + _BLOCK]
        scores = rows[block] @ anchors.T
        nearest = np.argpartition(-scores, several - 1, axis=1)[:, :several]
        found[block] = points[nearest].mean(axis=1)
    return found
