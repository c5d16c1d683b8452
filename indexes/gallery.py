"""Gallery: all vectors of one kind in one state of a store, searched exactly or approximately.

What the approximate index does not hold yet, and what the FAISS file does not, is searched exactly
beside it; what is gone is struck out of whatever it is found in.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from indexes.approximate import ApproximateIndex, rerank
from indexes.records import SOURCES, Direction, IndexFile, Match, Source
from indexes.vectors import Ids, Mask, VectorIndex, merge

Queries = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Approximate:
    """An approximate index of a gallery, the settings that were proved, and what it lacks."""

    file: IndexFile
    index: ApproximateIndex
    directions: Mapping[Source, Sequence[Direction]]
    beside: Mask | None  # rows of the gallery's `index` that are new to it; None: none
    holds: Mask | None  # rows whose vector it has as it is now; None: all

    def direction(self, source: Source | None, k: int) -> Direction | None:
        """The setting that was proved for k results; of an unknown source, for every source."""
        sources = SOURCES if source is None else (source,)
        found = [
            next((one for one in self.directions.get(name, ()) if one.k >= k), None)
            for name in sources
        ]
        proved = [one for one in found if one is not None]
        if not proved or len(proved) < len(found):
            return None
        return replace(
            proved[0],
            probes=max(one.probes for one in proved),
            candidates=max(one.candidates for one in proved),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Gallery:
    """What is searched for one kind, in one state of the catalogue."""

    version: tuple[int, int]
    file: IndexFile | None
    index: VectorIndex | None
    alive: Mask | None  # rows of `index` that still hold; None means all
    tail: VectorIndex  # what was committed since the file was written
    is_stale: bool  # the file should be made again
    approximate: Approximate | None = None

    def search(
        self,
        queries: Queries,
        k: int,
        *,
        among: Collection[int] | Ids | None = None,
        source: Source | None = None,
        exact: bool = False,
    ) -> list[Match]:
        """The k best for each query; see `Store.search`. Raises IndexFileError."""
        wanted = None
        if among is not None:
            wanted = (
                among.astype(np.int64, copy=False)
                if isinstance(among, np.ndarray)
                else np.fromiter(among, dtype=np.int64, count=len(among))
            )
        parts = [self.tail.search(queries, k, allowed=_only(self.tail, wanted, None))]
        if self.index is not None:
            found = None
            if wanted is None and not exact:
                found = self._approximately(self.index, queries, k, source)
            if found is None:
                allowed = _only(self.index, wanted, self.alive)
                found = self.index.search(queries, k, allowed=allowed)
            parts.append(found)
        return [merge(several, k) for several in zip(*parts, strict=True)]

    def _approximately(
        self, exact: VectorIndex, queries: Queries, k: int, source: Source | None
    ) -> list[Match] | None:
        """The best of what the approximate index finds and of the rows that it lacks.

        None if no setting was proved for these queries, or k results are not found with it.
        """
        approximate = self.approximate
        direction = approximate.direction(source, k) if approximate is not None else None
        if approximate is None or direction is None:
            return None
        ids = approximate.index.candidates(queries, direction.candidates, direction.probes)
        found = [
            rerank(exact, query, some, k, allowed=approximate.holds)
            for query, some in zip(queries, ids, strict=True)
        ]
        if any(len(match.ids) < min(k, len(approximate.index)) for match in found):
            return None
        if approximate.beside is None:
            return found
        fresh = exact.search(queries, k, allowed=approximate.beside)
        return [merge(pair, k) for pair in zip(found, fresh, strict=True)]


def _only(index: VectorIndex, wanted: Ids | None, alive: Mask | None) -> Mask | None:
    """Rows of `index` that are alive and, unless `wanted` is None, have one of those ids."""
    if wanted is None:
        return alive
    allowed = np.zeros(len(index), dtype=np.bool_)
    allowed[index.find(wanted)[0]] = True
    return allowed if alive is None else allowed & alive
