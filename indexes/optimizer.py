"""Approximate indexes, built where they pay and proved against exact search with real queries.

A query by text lies elsewhere in the shared space than the pictures do, and more of an index must
be searched for the same answers (Jaiswal et al. 2022, arXiv:2211.12850). So each side is tuned by
queries of its own kind: vectors of the library's captions stand for texts, those of its pictures
for pictures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from indexes.approximate import ApproximateIndex, choose, tune
from indexes.records import ApproximateFile, Direction, IndexFile, SearchPolicy, Source
from indexes.vectors import VectorIndex

Queries = NDArray[np.float32]
Progress = Callable[[int, int], None]

# Results that an index is tuned for; whoever wants more is answered exactly.
DEPTHS = (10, 100)
# Queries of each source: the mean overlap of so many is known to a quarter of a point.
SAMPLE = 500
SEED = 0


def sample(index: VectorIndex) -> Queries:
    """Some of the vectors as unit rows, (q, d) float32: the same ones each time."""
    count = min(SAMPLE, len(index))
    chosen = np.random.default_rng(SEED).choice(len(index), count, replace=False)
    rows: Queries = index.vectors(np.sort(chosen))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def build(
    path: Path,
    exact: VectorIndex,
    flat: IndexFile,
    queries: Mapping[Source, Queries],
    policy: SearchPolicy,
    *,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
) -> ApproximateFile | None:
    """An approximate index of the vectors in a FAISS file, tuned and written to `path`.

    Args:
        path: of the file to be made.
        exact, flat: the vectors, and the file that they are in as the catalogue has it.
        queries: some hundred unit rows (q, d) of each source.
        policy: how much memory it may take and how much it must find.
        progress: called with (done, total) rows.
        stop: asked every second or so.

    Returns:
        What to record; None if `stop` said so, and nothing is at `path` then.

    Raises:
        UnsuitableError: the memory allowed is too small, or the vectors are all alike.
        OSError: `path` cannot be written.
        IndexFileError: a vector cannot be read.
    """
    started = time.monotonic()
    index = ApproximateIndex.build(
        exact, memory_bytes=policy.memory_bytes, seed=SEED, progress=progress, stop=stop
    )
    if index is None:
        return None
    seconds = time.monotonic() - started
    directions: dict[Source, list[Direction]] = {}
    for source, rows in queries.items():
        directions[source] = []
        for depth in DEPTHS:
            tuned = tune(index, exact, rows, k=depth, target=policy.overlap, stop=stop)
            if tuned is None:
                return None
            directions[source].append(tuned)
    stamp = index.save(path)
    return ApproximateFile(
        file=IndexFile(path.name, flat.generation, flat.change, len(index), stamp),
        policy=policy,
        kind=index.kind,
        memory_bytes=index.memory_bytes,
        build_seconds=round(seconds, 3),
        directions=directions,
    )


def reason(rows: int, dim: int, policy: SearchPolicy, built: ApproximateFile | None) -> str:
    """Why vectors are searched exactly or approximately, in one sentence with numbers."""
    if policy.exact:
        return "exact search was asked for; `retriever optimize` lets the library decide"
    choice = choose(rows, dim, policy.memory_bytes)
    if choice.is_exact:
        return choice.why
    if built is None:
        return (
            f"{choice.why}; `retriever optimize` or the next run of `index` builds it, unless the "
            "vectors are all alike"
        )
    sides = []
    for source, several in built.directions.items():
        first = several[0]
        side = (
            f"by {source} {first.p50_ms:.2f} ms instead of {first.exact_p50_ms:.1f} and "
            f"{100 * first.overlap:.1f} % of the {first.k} best"
        )
        sides.append(side if is_proved(first, built.policy) else f"{side}, so exact after all")
    return "; ".join(sides)


def is_proved(direction: Direction, policy: SearchPolicy) -> bool:
    """Whether a setting finds what the policy asks for, and sooner than exact search."""
    return direction.overlap >= policy.overlap and direction.p50_ms < direction.exact_p50_ms
