"""ApproximateIndex: finds a few hundred candidates among millions without looking at most of them.

Vectors lose their mean and are turned to their principal axes, of which the first ones hold nearly
all that tells them apart (128 of CLIP's 512, say). Those are divided among the lists of an inverted
file, and within a list each vector is kept as its difference from the list's centre, four bits for
each axis (Jégou et al. 2011, product quantization; André et al. 2015, its scan in registers).

Queries are turned, but do not lose the mean: the order of inner products with x - mean is that with
x, whichever side of the modality gap a query comes from. What the gap adds to a query lies where
vectors do not vary, so that turning takes it away.

Candidates are ordered roughly. `rerank` scores them from the stored float16 vectors, so an answer
is the exact one but for what was not among the candidates, and `tune` measures how much that is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss as _faiss
import numpy as np
from numpy.typing import NDArray

from indexes.records import Direction, FileStamp, Match
from indexes.vectors import (
    CheckedFile,
    Ids,
    IndexFileError,
    Mask,
    VectorIndex,
    save_checked,
)

faiss: Any = _faiss

# Bytes of float16 vectors that two cores scan in 10 ms; with fewer an index would gain nothing
# that anyone notices, and exact answers are worth more.
EXACT_BYTES = 160 << 20
VARIANCE = 0.95  # share that the axes kept must hold
LEAST_VARIANCE = 1e-6  # rounding to float16 is of this size
STEP = 16  # axes are kept in multiples of this
LEAST_ROWS = 1000  # with fewer there is nothing to learn codes from
SAMPLE = 32  # rows for each list that its centre is learned from
PCA_SAMPLE = 32_768
ROUNDS = 8  # of k-means
CHUNK = 16_384  # rows that are read, turned and added at a time
CODE_BLOCK = 32  # vectors that are scanned together: lists are filled up to this

MOST = 1024  # candidates that are looked at when an index is tuned
# Candidates for each result that tuning tries.
SHARES = (1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 70, 100)
TIMED = 100  # queries that settings are timed with


class UnsuitableError(ValueError):
    """No approximate index can be built: of so few vectors, of such ones, in so little memory."""


@dataclass(frozen=True, slots=True)
class Choice:
    """How some rows should be searched, and in one sentence why.

    lists: of the inverted file; 0 means exact search. dims: axes that may be kept at most.
    sample: rows that the centres are learned from.
    """

    lists: int
    dims: int
    sample: int
    why: str

    @property
    def is_exact(self) -> bool:
        """Whether there should be no approximate index."""
        return not self.lists


def choose(rows: int, dim: int, memory_bytes: int | None = None) -> Choice:
    """Exact search or an approximate index, by the time that a scan takes and by memory.

    Args:
        rows, dim: of the vectors.
        memory_bytes: what the index may take; None: what suits its size.
    """
    scan = f"to scan {rows:,} vectors of {dim} is to read {2 * rows * dim / 1e6:,.1f} MB"
    if 2 * rows * dim < EXACT_BYTES or rows < LEAST_ROWS:
        limit = EXACT_BYTES / 1e6
        return Choice(0, 0, 0, f"{scan}; below {limit:,.0f} MB exact search takes milliseconds")
    try:
        plan = _plan(rows, dim, memory_bytes)
    except UnsuitableError as error:
        return Choice(0, 0, 0, f"{scan}, but {error}")
    return Choice(plan.lists, plan.dims, plan.sample, f"{scan}: {plan.why}")


def _plan(rows: int, dim: int, memory_bytes: int | None) -> Choice:
    """The index for so many rows; raises UnsuitableError, with numbers, if none fits."""
    if rows < LEAST_ROWS:
        raise UnsuitableError(f"{rows:,} vectors are too few for an approximate index")
    # With 4 √n lists the nearest centres are found, and 1 % of the rows scanned, in as much time.
    # Twice as many take twice as long to build; half as many, a third longer to search for a text.
    lists = 1 << round(np.log2(4 * np.sqrt(rows)))
    most = -(-dim // STEP) * STEP
    dims = most
    if memory_bytes is not None:
        while dims and _size(rows, dim, lists, dims) > memory_bytes:
            dims -= STEP
        if not dims:
            least = _size(rows, dim, lists, STEP)
            raise UnsuitableError(
                f"the smallest index takes {least / 1e6:,.1f} MB, more than the "
                f"{memory_bytes / 1e6:,.1f} MB allowed"
            )
    sample = min(rows, SAMPLE * lists)
    if memory_bytes is not None:  # before any row is added, the index is empty
        sample = min(sample, max(2 * lists, memory_bytes // (8 * dims)))
    kept = "" if dims == most else f" of at most {dims} axes"
    return Choice(lists, dims, sample, f"an inverted file of {lists:,} lists{kept} looks at few")


def _size(rows: int, dim: int, lists: int, dims: int) -> int:
    """Bytes of an index: codes and ids, centres with half-filled blocks, axes."""
    code = dims // 2
    return rows * (code + 8) + lists * (4 * dims + CODE_BLOCK // 2 * code) + 4 * dim * dims


class ApproximateIndex:
    """An inverted file of short codes under our ids."""

    def __init__(self, whole: Any, file: CheckedFile | None = None) -> None:
        """Take an IndexPreTransform of one LinearTransform, and the file that it points into."""
        self._whole = whole
        self._file = file
        turn = faiss.downcast_VectorTransform(whole.chain.at(0))
        self._lists = faiss.downcast_index(whole.index)
        self._axes: NDArray[np.float32] = np.ascontiguousarray(
            faiss.vector_to_array(turn.A).reshape(turn.d_out, turn.d_in).T
        )

    def __len__(self) -> int:
        return int(self._lists.ntotal)

    @property
    def dim(self) -> int:
        """Dimension of the vectors."""
        return len(self._axes)

    @property
    def lists(self) -> int:
        """Lists that the vectors are divided among: probing all looks at every vector."""
        return int(self._lists.nlist)

    @property
    def kind(self) -> str:
        """What it is, in FAISS' words: "PCA128,IVF2048,PQ128x4fs"."""
        dims = self._axes.shape[1]
        return f"PCA{dims},IVF{self.lists},PQ{dims}x4fs"

    @property
    def memory_bytes(self) -> int:
        """What searching it takes in memory."""
        return _size(len(self), self.dim, self.lists, self._axes.shape[1])

    @classmethod
    def build(
        cls,
        exact: VectorIndex,
        *,
        memory_bytes: int | None = None,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> ApproximateIndex | None:
        """An index over all vectors of `exact`, which are read twice, chunk by chunk.

        Args:
            exact: at least LEAST_ROWS vectors.
            memory_bytes: what the index may take; building it takes up to twice as much, and 0.1 GB
                for 512-d. None: what suits its size.
            seed: of samples and k-means; equal seeds build equal indexes.
            progress: is told how many rows are in, and of how many.
            stop: is asked between steps of a second or so.

        Returns:
            The index, or None if `stop` said so.

        Raises:
            UnsuitableError: there are too few vectors, or they are all alike, or no index fits into
                `memory_bytes`.
            IndexFileError: a vector cannot be read.
        """
        rows = len(exact)
        plan = _plan(rows, exact.dim, memory_bytes)
        rng = np.random.default_rng(seed)
        stopped = stop if stop is not None else lambda: False
        if progress is not None:
            progress(0, rows)

        mean, axes = _principal_axes(exact, plan.dims, rng)
        sample = np.empty((plan.sample, axes.shape[1]), dtype=np.float32)
        chosen = np.sort(rng.choice(rows, plan.sample, replace=False))
        for start in range(0, plan.sample, CHUNK):
            if stopped():
                return None
            part = slice(start, start + CHUNK)
            sample[part] = (exact.vectors(chosen[part]) - mean) @ axes
        rng.shuffle(sample)  # codes are learned from the first ones
        index = cls._empty(mean, axes, plan.lists)
        centres = sample[: plan.lists]
        for _ in range(ROUNDS):
            if stopped():
                return None
            centres = _next_centres(sample, centres, seed)
        index._lists.quantizer.add(centres)
        index._lists.pq.cp.seed = seed + 1
        index._lists.train(sample)
        index._whole.is_trained = True
        del sample

        for start in range(0, rows, CHUNK):
            if stopped():
                return None
            part = slice(start, min(start + CHUNK, rows))
            turned = (exact.vectors(np.arange(part.start, part.stop)) - mean) @ axes
            index._lists.add_with_ids(turned, exact.ids[part])
            if progress is not None:
                progress(part.stop, rows)
        index._whole.ntotal = rows
        return index

    @classmethod
    def _empty(
        cls, mean: NDArray[np.float32], axes: NDArray[np.float32], lists: int
    ) -> ApproximateIndex:
        dim, dims = axes.shape
        turn = faiss.LinearTransform(dim, dims, True)
        faiss.copy_array_to_vector(np.ascontiguousarray(axes.T).ravel(), turn.A)
        faiss.copy_array_to_vector(-(mean @ axes), turn.b)
        turn.is_trained = True
        inner = faiss.METRIC_INNER_PRODUCT
        centres = faiss.IndexFlatIP(dims)
        inverted = faiss.IndexIVFPQFastScan(centres, dims, lists, dims, 4, inner, CODE_BLOCK)
        # Two fifths of the error: without, twice the candidates are needed for the same overlap.
        inverted.by_residual = True
        inverted.is_trained = False
        return cls(faiss.IndexPreTransform(turn, inverted))

    def save(self, path: Path) -> FileStamp:
        """Write the index so that `path` is either the whole of it or what it was before.

        Raises OSError, after which nothing new is at `path`.
        """
        return save_checked(self._whole, path)

    @classmethod
    def load(cls, path: Path, *, dim: int, rows: int, stamp: FileStamp) -> ApproximateIndex:
        """The index at `path`, memory-mapped, if it is the one that `stamp` describes.

        It is checked as a whole: FAISS looks at all of it, and it is a tenth of the vectors' file.

        Raises IndexFileError.
        """
        file = CheckedFile(path, stamp)
        file.check()
        try:
            index = cls(file.read(), file)
            found = (index.dim, len(index), index._lists.pq.nbits)
        except (AttributeError, ValueError) as error:  # FAISS read something else
            raise IndexFileError(f"{path.name} is not an index of ours: {error}") from error
        if found != (dim, rows, 4):
            raise IndexFileError(f"{path.name} holds other vectors than the catalogue says")
        return index

    def candidates(self, queries: NDArray[np.float32], count: int, probes: int) -> list[Ids]:
        """Ids of what is probably best for each query, best first.

        Args:
            queries: (q, d) float32.
            count: candidates wanted; fewer come if the probed lists hold fewer.
            probes: lists looked at for each query, at most `lists`.
        """
        count, probes = min(count, len(self)), min(probes, self.lists)
        parameters = faiss.SearchParametersIVF(nprobe=probes)
        _, ids = self._lists.search(queries @ self._axes, count, params=parameters)
        return [row[row >= 0] for row in ids]


def rerank(
    exact: VectorIndex,
    query: NDArray[np.float32],
    ids: Ids,
    k: int,
    *,
    allowed: Mask | None = None,
) -> Match:
    """The k best of some candidates, scored as `VectorIndex.search` does; raises IndexFileError.

    Args:
        exact: whose vectors count; ids that are not in it are left out.
        query: (d,) float32, unit length.
        ids: of candidates, each once, in any order.
        k: results wanted, at least 1.
        allowed: (n,) which rows of `exact` may be returned; None means all.
    """
    positions, _ = exact.find(ids)
    if allowed is not None:
        positions = positions[allowed[positions]]
    return exact.best(query, positions, k)


def tune(
    index: ApproximateIndex,
    exact: VectorIndex,
    queries: NDArray[np.float32],
    *,
    k: int = 10,
    target: float = 0.99,
    stop: Callable[[], bool] | None = None,
) -> Direction | None:
    """The cheapest setting that finds at least `target` of the exact k best, with measurements.

    The queries should be of the kind that will be asked: captions are not distributed as pictures
    are, and need more probes. The mean over them must reach the target by two standard errors, so
    that others of their kind reach it too. If no setting does, the one that finds most is returned:
    its `overlap` tells.

    Args:
        index: to be tuned.
        exact: the same vectors.
        queries: (q, d) float32 unit rows, some hundreds.
        k: results asked for.
        target: least share, in [0, 1].
        stop: asked between settings, each of which takes as long as a search of all queries.

    Returns:
        The setting, or None if `stop` said so.

    Raises:
        ValueError: there are no queries.
        IndexFileError: a vector cannot be read.
    """
    if not len(queries):
        raise ValueError("an approximate index is tuned with real queries: there are none")
    truth = [match.ids for match in exact.search(queries, k)]
    stopped = stop if stop is not None else lambda: False
    good, best = _settings(index, queries, truth, k, target, stopped)
    costs = {
        setting: _cost(index, exact, queries[:TIMED], k, setting)
        for setting in good
        if not stopped()
    }
    if stopped():
        return None
    setting, overlap = best, -1.0
    for candidate in sorted(costs, key=costs.__getitem__):
        # Once more as it will be searched: the order among equal codes depends on the count.
        measured = _overlap(_answers(index, exact, queries, k, candidate), truth)
        if measured > overlap:
            setting, overlap = candidate, measured
        if overlap >= target:
            break
    answers, seconds = _timed(lambda one: _answers(index, exact, one, k, setting), queries)
    _, exact_seconds = _timed(lambda one: exact.search(one, k), queries[:TIMED])
    return Direction(
        k=k,
        probes=setting[0],
        candidates=setting[1],
        overlap=_overlap([answer for (answer,) in answers], truth),
        p50_ms=1000 * float(np.median(seconds)),
        exact_p50_ms=1000 * float(np.median(exact_seconds)),
        queries=len(queries),
    )


Setting = tuple[int, int]  # probes, candidates


def _settings(
    index: ApproximateIndex,
    queries: NDArray[np.float32],
    truth: Sequence[Ids],
    k: int,
    target: float,
    stopped: Callable[[], bool],
) -> tuple[list[Setting], Setting]:
    """For ascending probes the fewest candidates that reach the target; and the best of all."""
    most = min(max(MOST, int(2 * k)), len(index))
    counts = sorted({min(most, int(np.ceil(k * share))) for share in SHARES})
    good: list[Setting] = []
    best, best_overlap = (index.lists, counts[-1]), -1.0
    for probes in _grid(index.lists):
        if stopped():
            break
        found = index.candidates(queries, counts[-1], probes)
        # Of each query the places that the right answers have among its candidates.
        places = [
            np.flatnonzero(np.isin(ids, right)) for ids, right in zip(found, truth, strict=True)
        ]
        for count in counts:
            shares = np.array(
                [(one < count).sum() / len(ids) for one, ids in zip(places, truth, strict=True)]
            )
            overlap = float(shares.mean())
            if overlap > best_overlap:
                best, best_overlap = (probes, count), overlap
            if overlap - 2 * shares.std() / np.sqrt(len(shares)) >= target:
                good.append((probes, count))
                break
        # Looking at more of the lists no longer spares candidates.
        if len(good) > 2 and good[-1][1] == good[-2][1] == good[-3][1]:
            break
    return good or [best], best


def _grid(most: int) -> list[int]:
    """Probes to try: each about √2 times the one before."""
    steps = np.arange(2 * np.log2(most) + 1)
    return sorted({min(most, round(2 ** (step / 2))) for step in steps} | {most})


def _answers(
    index: ApproximateIndex,
    exact: VectorIndex,
    queries: NDArray[np.float32],
    k: int,
    setting: Setting,
) -> list[Match]:
    probes, count = setting
    found = index.candidates(queries, count, probes)
    return [rerank(exact, query, ids, k) for query, ids in zip(queries, found, strict=True)]


def _overlap(answers: Sequence[Match], truth: Sequence[Ids]) -> float:
    shares = [
        len(np.intersect1d(answer.ids, right)) / len(right)
        for answer, right in zip(answers, truth, strict=True)
    ]
    return float(np.mean(shares))


def _cost(
    index: ApproximateIndex,
    exact: VectorIndex,
    queries: NDArray[np.float32],
    k: int,
    setting: Setting,
) -> float:
    """Processor time of these queries, one after the other: what else runs does not count."""
    _answers(index, exact, queries[:1], k, setting)
    before = time.thread_time()
    for row in range(len(queries)):
        _answers(index, exact, queries[row : row + 1], k, setting)
    return time.thread_time() - before


def _timed(
    search: Callable[[NDArray[np.float32]], list[Match]], queries: NDArray[np.float32]
) -> tuple[list[list[Match]], list[float]]:
    """What is found for each query alone, and the seconds that each took."""
    answers, seconds = [], []
    for row in range(len(queries)):
        before = time.perf_counter()
        answers.append(search(queries[row : row + 1]))
        seconds.append(time.perf_counter() - before)
    return answers, seconds


def _principal_axes(
    exact: VectorIndex, most: int, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The mean (d,) of the vectors, and the axes (d, m) that they vary along, m at most `most`.

    The axes are turned among themselves, so that each holds about as much as any other and equal
    numbers of bits suit them all. Where more are asked for than there are, the others are zero.
    """
    chosen = np.sort(rng.choice(len(exact), min(PCA_SAMPLE, len(exact)), replace=False))
    total = np.zeros(exact.dim)
    products = np.zeros((exact.dim, exact.dim))
    for start in range(0, len(chosen), CHUNK):
        vectors = exact.vectors(chosen[start : start + CHUNK])
        total += vectors.sum(axis=0, dtype=np.float64)
        products += vectors.T @ vectors
    mean = total / len(chosen)
    variances, axes = np.linalg.eigh(products / len(chosen) - np.outer(mean, mean))
    if variances.sum() < LEAST_VARIANCE:
        raise UnsuitableError(
            f"{len(exact):,} vectors hardly differ: their variance is less than 1e-6"
        )
    held = np.cumsum(variances[::-1]) / variances.sum()
    needed = int(np.searchsorted(held, VARIANCE)) + 1
    count = min(most, -(-needed // STEP) * STEP)
    kept = np.zeros((exact.dim, count))
    largest = axes[:, ::-1][:, :count]
    kept[:, : largest.shape[1]] = largest
    turn = np.linalg.qr(rng.standard_normal((count, count)))[0]
    return mean.astype(np.float32), (kept @ turn).astype(np.float32)


def _next_centres(
    sample: NDArray[np.float32], centres: NDArray[np.float32], seed: int
) -> NDArray[np.float32]:
    """One round of k-means."""
    lists, dims = centres.shape
    rounds = faiss.Kmeans(
        dims,
        lists,
        niter=1,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=-(-len(sample) // lists),
    )
    rounds.train(sample, init_centroids=centres)
    following: NDArray[np.float32] = rounds.centroids
    return following
