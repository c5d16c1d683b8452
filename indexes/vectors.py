"""VectorIndex: float16 unit vectors in FAISS, addressed by our ids and searched exactly.

The only home of faiss. Nothing here pads: a result holds as many ids as there are candidates.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import faiss as _faiss
import numpy as np
import xxhash
from numpy.typing import NDArray

from indexes.files import sync
from indexes.records import FileStamp, Match
from indexes.threads import Threads

faiss: Any = _faiss  # its own type hints leave out half of what stands below

# FAISS 1.15 compares this with queries x dimension and by default leaves batches of up to a few
# hundred queries on its slow path: 14 s instead of 1 s for 64 queries over a million 512-d rows.
faiss.cvar.distance_compute_blas_threshold = 2048

# Up to this many candidates are scored straight from their codes; more go through FAISS.
SMALL = 256
# So is one allowed row in so many: to pass by all the others would take longer.
NARROW = 256
# Candidates fetched beyond k, so that ties at the k-th place are usually settled at once.
SLACK = 16
# Rows decoded at a time when many are scored: 4096 x 512-d are 8 MiB as float32.
CHUNK = 4096
# Threads that a search is split over: as many as FAISS takes, by the processor or OMP_NUM_THREADS.
THREADS: int = faiss.omp_get_max_threads()
# Bytes of codes for which no thread is woken: they are read in a third of a millisecond.
PART = 8 << 20
# From so many queries on, decoding the rows once and multiplying costs less than so many scans.
BATCH = 8
# Up to so many candidates a query, choosing them costs less than the product that they come from.
DEEP = 1024
# Queries and rows multiplied at a time: with 512-d, 45 MiB a thread for k = 10 and 85 for k = 1000.
QUERIES, ROWS = 1024, 1024
# A GPU gets its copy of the vectors, which takes as long as tens of scans, after so many queries.
GPU_AFTER = 256
GPU_MOST = 2048  # candidates that FAISS can choose there
GPU_MARGIN = 2.0**-10  # it rounds queries to float16 as well, each number by up to 2**-11 of itself
# Rounded to int8, vectors are half as much to read, in which nearly all of the time of a scan goes.
# Whoever asks often gets such a copy, unless it would take more than half of so many bytes, and
# keeps it while it settles most queries.
ROUND_AFTER = 32
ROUND_MOST = 128 << 20
STEPS = 127  # from nothing to the largest component
# Bytes of a file that one checksum covers: 64 rows of 512-d.
BLOCK = 65_536
# What FAISS writes of an index beside its codes and ids: 126 bytes today.
HEADER = 256

_HAS_GPUS = hasattr(faiss, "StandardGpuResources")
# Shifting a float16's bits to where a float32 has them leaves an exponent too small by 112.
_SIGN_AND_REST = np.int32(-0x7000_2000)
_EXPONENT = np.float32(2.0**112)

Ids = NDArray[np.int64]
Positions = NDArray[np.int64]
Mask = NDArray[np.bool_]


class IndexFileError(Exception):
    """A FAISS file is missing, torn, damaged or not the one recorded; it can be made again."""


class CheckedFile:
    """A file that FAISS wrote, memory-mapped, of which no byte is used before it was checked.

    Behind what FAISS wrote stands one xxh3_64 for each BLOCK of it, little-endian; the recorded
    checksum is the xxh3_128 of those. So a file is opened by reading a ten-thousandth of it, and a
    block is checked the first time that it is needed. Threads may share it.
    """

    def __init__(self, path: Path, stamp: FileStamp) -> None:
        """Map the file at `path` if its checksums are those that `stamp` describes.

        Raises IndexFileError.
        """
        self.name = path.name
        try:
            if not path.is_file() and path.exists():  # a pipe would be waited for
                raise IndexFileError(f"{self.name} is no file")
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != stamp.size_bytes or not size:
                    raise IndexFileError(f"{self.name} has {size} bytes, not {stamp.size_bytes}")
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise IndexFileError(f"{self.name} cannot be read ({error.strerror})") from error
        count = -(-size // (BLOCK + 8))
        length = max(0, size - 8 * count)
        checksum = xxhash.xxh3_128_hexdigest(memoryview(mapped)[length:])
        is_older = checksum != stamp.checksum
        if is_older:  # older versions recorded the checksum of the whole file, and wrote no others
            length = size
            if xxhash.xxh3_128_hexdigest(mapped) != stamp.checksum:
                raise IndexFileError(f"{self.name} has checksum {checksum}, not {stamp.checksum}")
        self._bytes = memoryview(mapped)[:length]
        self.content: NDArray[np.uint8] = np.frombuffer(self._bytes, dtype=np.uint8)
        self._sums = np.frombuffer(mapped, dtype="<u8", offset=length)
        self._checked = np.full(-(-length // BLOCK), is_older)

    def check(self, start: int = 0, stop: int | None = None) -> None:
        """Make sure of the bytes from `start` up to `stop`; None is the end.

        Raises IndexFileError.
        """
        first = start // BLOCK
        last = -(-(len(self.content) if stop is None else stop) // BLOCK)
        self._check(first + np.flatnonzero(~self._checked[first:last]))

    def check_rows(self, start: int, width: int, positions: Positions) -> None:
        """Make sure of some rows (n,) of a table of `width` bytes a row that begins at `start`.

        Raises IndexFileError.
        """
        if self._checked.all():
            return
        first = start + positions * width
        last = (first + width - 1) // BLOCK
        blocks = np.minimum(
            (first // BLOCK)[:, None] + np.arange(width // BLOCK + 2), last[:, None]
        ).ravel()
        wanted = np.zeros_like(self._checked)  # np.unique would import numpy.ma: 20 ms
        wanted[blocks] = True
        self._check(np.flatnonzero(wanted & ~self._checked))

    def _check(self, blocks: NDArray[np.int64]) -> None:
        for block, expected in zip(blocks.tolist(), self._sums[blocks].tolist(), strict=True):
            start = block * BLOCK
            if xxhash.xxh3_64_intdigest(self._bytes[start : start + BLOCK]) != expected:
                raise IndexFileError(f"{self.name} is damaged in the 64 KiB from byte {start:,}")
            self._checked[block] = True

    def read(self) -> Any:
        """The FAISS index in the file, its large parts left where they are.

        What FAISS looks at must have been checked. The index points into this file: keep both.
        Raises IndexFileError.
        """
        try:
            return faiss.read_index(
                faiss.ZeroCopyIOReader(faiss.swig_ptr(self.content), self.content.size),
                faiss.IO_FLAG_READ_ONLY,
            )
        except RuntimeError as error:
            raise IndexFileError(f"{self.name} is not an index of ours: {error}") from error

    def offset(self, pointer: Any) -> int:
        """Where in the file something is that FAISS points to, as `index.codes.data()`."""
        return int(pointer) - self.content.ctypes.data if pointer is not None else 0


def save_checked(index: Any, path: Path) -> FileStamp:
    """Write a FAISS index as a `CheckedFile`; `path` is the whole of it or what it was before.

    Raises OSError, after which nothing new is at `path`.
    """
    beside = path.with_name(path.name + ".tmp")
    try:
        with beside.open("wb") as file:
            sums = _write(index, file).tobytes()
            file.write(sums)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        beside.replace(path)
    except BaseException:
        with suppress(OSError):  # a full disk must not stay full of our half file
            beside.unlink()
        raise
    sync(path.parent)
    return FileStamp(size, xxhash.xxh3_128_hexdigest(sums))


def _write(index: Any, file: BinaryIO) -> NDArray[np.uint64]:
    sums: list[int] = []
    rest = b""
    failure: list[BaseException] = []

    def write(chunk: bytes) -> int:
        nonlocal rest
        try:
            file.write(chunk)
            rest += chunk
            whole = len(rest) // BLOCK * BLOCK
            view = memoryview(rest)
            blocks = [view[start : start + BLOCK] for start in range(0, whole, BLOCK)]
            sums.extend(xxhash.xxh3_64_intdigest(block) for block in blocks)
            rest = bytes(view[whole:])
        except BaseException as error:  # FAISS would hide the reason, or Ctrl-C, behind its own
            failure.append(error)
            return 0
        return len(chunk)

    try:
        # Through a callback, because FAISS takes only names that are valid text.
        faiss.write_index(index, faiss.PyCallbackIOWriter(write))
    except RuntimeError as error:
        raise (failure[0] if failure else error) from None
    if rest:
        sums.append(xxhash.xxh3_64_intdigest(rest))
    return np.array(sums, dtype="<u8")


class VectorIndex:
    """Vectors of one kind under ascending ids; its file is memory-mapped, never read whole."""

    def __init__(self, keyed: Any, file: CheckedFile | None = None) -> None:
        """Take an IndexIDMap over float16 codes, and the file that it points into."""
        self._keyed = keyed
        self._flat = faiss.downcast_index(keyed.index)
        self._file = file
        codes = self._flat.codes
        self._start = file.offset(codes.data()) if file is not None else 0
        self._codes: NDArray[np.float16] = np.empty((0, self.dim), dtype=np.float16)
        if codes.size():
            content = faiss.rev_swig_ptr(codes.data(), codes.size())
            self._codes = content.view(np.float16).reshape(-1, self.dim)
        self._asked = 0
        self._copies: list[_Copy] | None = None
        self._rounded: _Rounded | None = None
        self._guard = threading.Lock()
        self.ids: Ids = faiss.vector_to_array(keyed.id_map)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def dim(self) -> int:
        """Dimension of the vectors."""
        return int(self._flat.d)

    @classmethod
    def build(cls, dim: int, batches: Iterable[tuple[Ids, NDArray[np.float16]]]) -> VectorIndex:
        """An index in memory of (ids (n,), vectors (n, dim)) batches, ids ascending throughout."""
        flat = faiss.IndexScalarQuantizer(
            dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        )
        keyed = faiss.IndexIDMap(flat)
        for ids, vectors in batches:
            if vectors.shape[1] != dim:
                raise ValueError(f"vectors have {vectors.shape[1]} dimensions, not {dim}")
            # As they are: turned into float32 and back they would take four times as long.
            codes = np.ascontiguousarray(vectors, dtype=np.float16).view(np.uint8)
            keyed.add_sa_codes(codes, np.ascontiguousarray(ids, dtype=np.int64))
        index = cls(keyed)
        assert bool((np.diff(index.ids) > 0).all()), "ids must ascend"
        return index

    def save(self, path: Path) -> FileStamp:
        """Write the index so that `path` is either the whole of it or what it was before.

        Raises OSError, after which nothing new is at `path`.
        """
        return save_checked(self._keyed, path)

    @classmethod
    def load(cls, path: Path, *, dim: int, rows: int, stamp: FileStamp) -> VectorIndex:
        """The index at `path`, memory-mapped, if it is the one that `stamp` describes.

        Only its ids are read: its vectors are checked when they are first looked at, by `vectors`,
        `search` or `check`, which then raise IndexFileError, as this does.
        """
        file = CheckedFile(path, stamp)
        header = len(file.content) - rows * (2 * dim + 8)
        if 0 < header <= HEADER:  # else FAISS would look elsewhere than at what is checked
            # FAISS writes header, codes and ids. It reads from our own mapping: what was checked
            # is what is used, and any file name will do. Only the ids are copied.
            file.check(0, header)
            file.check(len(file.content) - rows * 8 - 8)
            try:
                index = cls(file.read(), file)
            except AttributeError as error:  # FAISS read something else
                raise IndexFileError(f"{path.name} is not an index of ours: {error}") from error
            if (index.dim, index._flat.ntotal, len(index)) == (dim, rows, rows):
                return index
        raise IndexFileError(f"{path.name} holds other vectors than the catalogue says")

    def check(self) -> None:
        """Make sure of the whole file that this came from; raises IndexFileError."""
        if self._file is not None:
            self._file.check()

    def find(self, ids: Ids) -> tuple[Positions, Mask]:
        """Positions of those ids that are here, and which of `ids` (n,) they are."""
        places = np.searchsorted(self.ids, ids)
        present = np.zeros(len(ids), dtype=np.bool_)
        inside = places < len(self.ids)
        present[inside] = self.ids[places[inside]] == ids[inside]
        return places[present].astype(np.int64), present

    def vectors(self, positions: Positions) -> NDArray[np.float32]:
        """(n, d) float32 vectors at these positions; raises IndexFileError."""
        if self._file is not None:
            self._file.check_rows(self._start, 2 * self.dim, positions)
        codes = self._codes[positions]
        rows = _decode(codes, np.empty(codes.shape, dtype=np.float32))
        if np.abs(rows).max(initial=0) < 2**16:
            return rows
        return codes.astype(np.float32)  # damaged: infinite, or no number

    def search(
        self, queries: NDArray[np.float32], k: int, *, allowed: Mask | None = None
    ) -> list[Match]:
        """The k best of the allowed rows for each query, exactly.

        FAISS finds the candidates, by one scan for each query or, for BATCH or more, by matrix
        products over blocks of rows; large galleries are split over THREADS. Their scores are then
        computed again in float64 from the stored codes, so that a score depends on query and
        vector alone (not on the batch or the place in the file), and equal vectors tie and are
        ordered by id.

        Args:
            queries: (q, d) float32, unit rows.
            k: results wanted, at least 1; fewer come only if fewer rows are allowed.
            allowed: (n,) which rows may be returned; None means all.

        Raises IndexFileError.
        """
        count = len(self) if allowed is None else int(np.count_nonzero(allowed))
        fetch = k + SLACK
        few = len(self) // NARROW if len(queries) < BATCH else 0
        if count <= max(fetch, SMALL, few):
            every = np.arange(len(self)) if allowed is None else np.flatnonzero(allowed)
            return [self.best(query, every, k) for query in queries]
        found = []
        for start in range(0, len(queries), QUERIES):
            found += self._search(queries[start : start + QUERIES], k, allowed)
        return found

    def _search(self, queries: NDArray[np.float32], k: int, allowed: Mask | None) -> list[Match]:
        self._asked += len(queries)
        copy = self._copy_rounded() if len(queries) < BATCH else None
        if copy is not None:
            found = [self._roughly(copy, query, k, allowed) for query in queries]
            settled = [one for one in found if one is not None]
            if len(settled) == len(queries):
                return settled
        return self._finely(queries, k, allowed)

    def _roughly(
        self, copy: _Rounded, query: NDArray[np.float32], k: int, allowed: Mask | None
    ) -> Match | None:
        """As `search` for a query (d,), by way of the rounded copy; None if that is not enough."""
        rounded, unit, margin = copy.asked(query)
        fetch = k + k // 2 + SLACK
        scores, places = self._scanned(copy.index, rounded[None], fetch, allowed)
        best = self.best(query, places[0][places[0] >= 0], k)
        # What was not fetched scores at most so much.
        rest = float(scores[0, -1]) * unit + margin + self._margin
        is_settled = len(best.ids) == k and rest < best.scores[-1]
        copy.count(is_settled=is_settled)
        return best if is_settled else None

    def _finely(self, queries: NDArray[np.float32], k: int, allowed: Mask | None) -> list[Match]:
        approximate, places, margin = self._nearest(queries, k + SLACK, allowed)
        found = []
        for query, rough, positions in zip(queries, approximate, places, strict=True):
            # Fewer than asked for only where damaged vectors, which are no numbers, are passed by.
            best = self.best(query, positions[positions >= 0], k)
            # A row that was not fetched scores at most rough[-1] + margin. Where that could still
            # reach the k-th place (many near-equal rows), everything in reach is fetched.
            if len(best.ids) and rough[-1] + margin >= best.scores[-1]:
                radius = float(best.scores[-1]) - 2 * self._margin
                selector = _selector(0, len(self), allowed)
                _, _, positions = self._flat.range_search(query[None], radius, params=selector)
                best = self.best(query, positions, k)
            found.append(best)
        return found

    def best(self, query: NDArray[np.float32], positions: Positions, k: int) -> Match:
        """The k best of some rows for a query (d,), scored as `search` does; may raise as it."""
        wide = query.astype(np.float64)
        parts = [
            (self.vectors(positions[start : start + CHUNK]) * wide).sum(axis=1)
            for start in range(0, len(positions), CHUNK)
        ]
        scores = (
            np.concatenate(parts).astype(np.float32) if parts else np.empty(0, dtype=np.float32)
        )
        return _first(self.ids[positions], scores, k)

    @property
    def _margin(self) -> float:
        """What summing d float32 products of unit vectors is off by at most, in any order."""
        return self.dim * 2.0**-23

    def _nearest(
        self, queries: NDArray[np.float32], fetch: int, allowed: Mask | None
    ) -> tuple[NDArray[np.float32], Positions, float]:
        """The best `fetch` of the allowed rows, of which there are as many, roughly scored.

        Each part of the rows gives its own best `fetch`. So a row that is not among the best of
        all parts does not score above the last of those.

        Returns:
            Scores (q, fetch), best first; their rows; what a score may be off by.
        """
        copies = self._on_gpus() if allowed is None and fetch <= GPU_MOST else []
        if copies:
            self.check()
            with self._guard:  # what FAISS keeps on a GPU serves one search at a time
                found = _each(lambda copy: copy.search(queries, fetch), copies)
            return *_together(found, fetch), GPU_MARGIN + self._margin
        if len(queries) < BATCH or fetch > DEEP:
            return *self._scanned(self._flat, queries, fetch, allowed), self._margin
        found = _each(
            lambda part: self._multiply(part, queries, fetch, allowed), self._parts(self._flat)
        )
        return *_together(found, fetch), self._margin

    def _scanned(
        self, flat: Any, queries: NDArray[np.float32], fetch: int, allowed: Mask | None
    ) -> tuple[NDArray[np.float32], Positions]:
        """The best of an index of these rows, which are all read for each query."""
        found = _each(
            lambda part: self._scan(flat, part, queries, fetch, allowed), self._parts(flat)
        )
        return _together(found, fetch)

    def _parts(self, flat: Any) -> list[tuple[int, int]]:
        """Ranges of rows of an index of these rows, one for each thread that is worth waking."""
        return self._split(max(1, min(THREADS, len(self) * flat.code_size // PART)))

    def _split(self, count: int) -> list[tuple[int, int]]:
        edges = [len(self) * part // count for part in range(count + 1)]
        return list(pairwise(edges))

    def _check_between(self, first: int, last: int) -> None:
        if self._file is not None:
            width = 2 * self.dim
            self._file.check(self._start + first * width, self._start + last * width)

    def _scan(
        self,
        flat: Any,
        part: tuple[int, int],
        queries: NDArray[np.float32],
        fetch: int,
        allowed: Mask | None,
    ) -> tuple[NDArray[np.float32], Positions]:
        """The best of rows from the first of `part` up to its last, read for each query."""
        first, last = part
        self._check_between(first, last)
        is_all = allowed is None and last - first == len(self)
        selector = None if is_all else _selector(first, last, allowed)
        scores, places = flat.search(queries, fetch, params=selector)
        return np.where(places < 0, np.float32(-np.inf), scores), places

    def _multiply(
        self,
        part: tuple[int, int],
        queries: NDArray[np.float32],
        fetch: int,
        allowed: Mask | None,
    ) -> tuple[NDArray[np.float32], Positions]:
        """The same, each row decoded once for all queries."""
        first, last = part
        self._check_between(first, last)
        # FAISS' name for a matrix product, with its own BLAS: that keeps to the calling thread.
        product = faiss.LinearTransform(self.dim, len(queries), False)
        faiss.copy_array_to_vector(np.ascontiguousarray(queries).ravel(), product.A)
        product.is_trained = True
        best = _Best(len(queries), fetch)
        rows = np.empty((ROWS, self.dim), dtype=np.float32)
        # Fewer queries, more rows at a time for what chooses among the products.
        several = ROWS * max(1, min(16, QUERIES // len(queries)))
        scores = np.empty((several, len(queries)), dtype=np.float32)
        places = np.arange(first, last)
        if allowed is not None:
            places = first + np.flatnonzero(allowed[first:last])
        for start in range(0, len(places), several):
            batch = places[start : start + several]
            for done in range(0, len(batch), ROWS):
                block = batch[done : done + ROWS]
                is_whole = block[-1] - block[0] == len(block) - 1
                codes = self._codes[block[0] : block[-1] + 1] if is_whole else self._codes[block]
                _decode(codes, rows[: len(block)])
                into = faiss.swig_ptr(scores[done:])
                product.apply_noalloc(len(block), faiss.swig_ptr(rows), into)
            best.add(scores[: len(batch)], batch)
        return best.scores, best.places

    def _copy_rounded(self) -> _Rounded | None:
        """The vectors as int8, for who asks often; None where that is not worth its memory."""
        if self._asked < ROUND_AFTER or self._codes.nbytes > ROUND_MOST or _HAS_GPUS:
            return None
        with self._guard:
            if self._rounded is None:
                self.check()
                self._rounded = _Rounded.of(self)
        return self._rounded if self._rounded.is_worth_it else None

    def _on_gpus(self) -> list[_Copy]:
        """The vectors as float16 on all GPUs, a range of rows on each; none without GPUs."""
        if self._asked < GPU_AFTER or not _HAS_GPUS:
            return []
        with self._guard:
            if self._copies is None:
                self._copies = []
                with suppress(RuntimeError):  # no room there
                    self._copies = self._copy_to_gpus(faiss.get_num_gpus())
            return self._copies

    def _copy_to_gpus(self, count: int) -> list[_Copy]:
        copies = []
        for device, (first, last) in enumerate(self._split(count)):
            options = faiss.GpuIndexFlatConfig()
            options.useFloat16, options.device = True, device
            resources = faiss.StandardGpuResources()
            copy = faiss.GpuIndexFlatIP(resources, self.dim, options)
            for start in range(first, last, 64 * CHUNK):
                copy.add(self.vectors(np.arange(start, min(start + 64 * CHUNK, last))))
            copies.append(_Copy(first, copy, resources))
        return copies


@dataclass(frozen=True, slots=True)
class _Copy:
    """Rows from `first` on, on one GPU."""

    first: int
    index: Any
    resources: Any  # which the index uses and does not keep

    def search(
        self, queries: NDArray[np.float32], fetch: int
    ) -> tuple[NDArray[np.float32], Positions]:
        """The best of these rows: scores (q, fetch), -inf where there are fewer, and places."""
        scores, places = self.index.search(queries, fetch)
        return np.where(places < 0, np.float32(-np.inf), scores), places + self.first


class _Rounded:
    """Vectors as int8, and how far scores with them may be off.

    A component is so many steps; the same number for all vectors, and another one for each query.
    What rounding takes from a vector is a vector of known length, and so is what it adds to the
    product with a query of known length (Cauchy and Schwarz).

    Attributes:
        index: a FAISS index that multiplies int8 with int8.
        is_worth_it: whether it settles most queries, as it does where no few components are far
            larger than all others.
    """

    def __init__(self, dim: int, step: float) -> None:
        """Used by `of`."""
        kind = faiss.ScalarQuantizer.QT_8bit_direct_signed
        self.index = faiss.IndexScalarQuantizer(dim, kind, faiss.METRIC_INNER_PRODUCT)
        self.is_worth_it = True
        self._step = step
        self._off = self._longest = 0.0
        self._asked = self._settled = 0

    @classmethod
    def of(cls, exact: VectorIndex) -> _Rounded:
        """A copy of all vectors; raises IndexFileError."""
        starts = range(0, len(exact), CHUNK)
        parts = [np.arange(start, min(start + CHUNK, len(exact))) for start in starts]
        largest = float(np.max([np.abs(exact.vectors(part)).max() for part in parts], initial=0.0))
        copy = cls(exact.dim, largest / STEPS)
        copy.is_worth_it = 0 < largest < np.inf  # else damaged, or there is nothing
        for part in parts if copy.is_worth_it else ():
            rows = exact.vectors(part)
            rounded = np.rint(rows / np.float32(copy._step))
            copy.index.add(rounded)
            # In float64, beside whose own rounding the margin of `VectorIndex` is large.
            stands_for = rounded.astype(np.float64) * copy._step
            copy._off = max(copy._off, float(np.linalg.norm(stands_for - rows, axis=1).max()))
            copy._longest = max(copy._longest, float(np.linalg.norm(stands_for, axis=1).max()))
        return copy

    def asked(self, query: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, float]:
        """A query (d,) rounded, what one of FAISS' scores is worth, and how far off that may be."""
        wide = query.astype(np.float64)
        step = float(np.abs(wide).max()) / STEPS
        rounded = np.rint(wide / step)
        off = float(np.linalg.norm(rounded * step - wide))
        margin = float(np.linalg.norm(wide)) * self._off + off * self._longest
        return rounded.astype(np.float32), step * self._step, margin

    def count(self, *, is_settled: bool) -> None:
        """Take note of a query."""
        self._asked += 1
        self._settled += is_settled
        if self._asked >= ROUND_AFTER and self._settled < self._asked * 3 // 4:
            self.is_worth_it = False


class _Best:
    """The best of scores that come block by block, for each query, in no order.

    scores (q, fetch) and places (q, fetch); where there are fewer, the rest is -inf and -1.
    """

    def __init__(self, count: int, fetch: int) -> None:
        self.scores = np.full((count, fetch), -np.inf, dtype=np.float32)
        self.places = np.full((count, fetch), -1, dtype=np.int64)
        self._floor = np.full(count, -np.inf, dtype=np.float32)  # the least of each query's

    def add(self, scores: NDArray[np.float32], places: Positions) -> None:
        """Take up the scores (n, q) of rows (n,)."""
        row, query = np.divmod(np.flatnonzero(scores > self._floor), scores.shape[1])
        if 16 * len(row) > scores.size:  # as at the beginning, when nothing is known
            every = np.arange(scores.shape[1])
            self._take(every, scores.T, np.broadcast_to(places, scores.T.shape))
        elif len(row):
            order = np.argsort(query, kind="stable")
            row, query = row[order], query[order]
            whose, starts, counts = np.unique(query, return_index=True, return_counts=True)
            line = np.repeat(np.arange(len(whose)), counts)
            column = np.arange(len(query)) - np.repeat(starts, counts)
            better = np.full((len(whose), counts.max()), -np.inf, dtype=np.float32)
            where = np.full(better.shape, -1, dtype=np.int64)
            better[line, column], where[line, column] = scores[row, query], places[row]
            self._take(whose, better, where)

    def _take(self, queries: Ids, scores: NDArray[np.float32], places: Positions) -> None:
        fetch = self.scores.shape[1]
        both = np.concatenate([self.scores[queries], scores], axis=1)
        keep = np.argpartition(-both, fetch - 1, axis=1)[:, :fetch]
        where = np.concatenate([self.places[queries], places], axis=1)
        self.scores[queries] = np.take_along_axis(both, keep, axis=1)
        self.places[queries] = np.take_along_axis(where, keep, axis=1)
        self._floor[queries] = self.scores[queries].min(axis=1)


def _decode(codes: NDArray[np.float16], rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """The float32 numbers that finite float16 `codes` (n, d) stand for, in `rows` (n, d).

    Exact, and five times as fast as numpy or FAISS, which take one number at a time.
    """
    bits = rows.view(np.int32)
    np.copyto(bits, codes.view(np.int16))
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, _SIGN_AND_REST, out=bits)
    return np.multiply(rows, _EXPONENT, out=rows)


def _selector(first: int, last: int, allowed: Mask | None) -> Any:
    selector = faiss.IDSelectorRange(first, last)
    if allowed is not None:
        bits = faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
        selector = faiss.IDSelectorAnd(selector, bits)
    return faiss.SearchParameters(sel=selector)


def _together(
    found: list[tuple[NDArray[np.float32], Positions]], fetch: int
) -> tuple[NDArray[np.float32], Positions]:
    """The best `fetch` of what several parts gave, for each query."""
    scores = np.concatenate([part[0] for part in found], axis=1)
    places = np.concatenate([part[1] for part in found], axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :fetch]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(places, order, axis=1)


def _each(work: Callable[[Any], Any], parts: list[Any]) -> list[Any]:
    """What `work` gives for each part, in threads of ours.

    In others FAISS would wake its own for each query, of which all but one only wait, in a loop.
    """
    running = [_THREADS.submit(work, part) for part in parts]
    return [one.result() for one in running]


# In them FAISS uses no further threads; the setting is one of each thread.
_THREADS = Threads("search", THREADS, partial(faiss.omp_set_num_threads, 1))


def merge(parts: Iterable[Match], k: int) -> Match:
    """The k best of several results over disjoint rows."""
    several = list(parts)
    return _first(
        np.concatenate([part.ids for part in several]),
        np.concatenate([part.scores for part in several]),
        k,
    )


def _first(ids: Ids, scores: NDArray[np.float32], k: int) -> Match:
    order = np.lexsort((ids, -scores))[:k]
    return Match(ids[order], scores[order])
