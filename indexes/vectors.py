"""VectorIndex: float16 unit vectors in FAISS, addressed by our ids and searched exactly.

The only home of faiss. Nothing here pads: a result holds as many ids as there are candidates.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import faiss as _faiss
import numpy as np
import xxhash
from numpy.typing import NDArray

from indexes.files import sync
from indexes.records import FileStamp, Match

faiss: Any = _faiss  # its own type hints leave out half of what stands below

# FAISS 1.15 compares this with queries x dimension and by default leaves batches of up to a few
# hundred queries on its slow path: 14 s instead of 1 s for 64 queries over a million 512-d rows.
faiss.cvar.distance_compute_blas_threshold = 2048

# Up to this many candidates are scored straight from their codes; more go through FAISS.
SMALL = 256
# Candidates fetched beyond k, so that ties at the k-th place are usually settled at once.
SLACK = 16
# Rows decoded at a time when many are scored: 4096 x 512-d are 8 MiB as float32.
CHUNK = 4096
# Bytes of a file that one checksum covers: 64 rows of 512-d.
BLOCK = 65_536
# What FAISS writes of an index beside its codes and ids: 126 bytes today.
HEADER = 256

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
        first = start + positions * width
        last = (first + width - 1) // BLOCK
        blocks = np.minimum(
            (first // BLOCK)[:, None] + np.arange(width // BLOCK + 2), last[:, None]
        ).ravel()
        self._check(np.unique(blocks[~self._checked[blocks]]))

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
        self._start = file.offset(self._flat.codes.data()) if file is not None else 0
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
            keyed.add_with_ids(np.ascontiguousarray(vectors, dtype=np.float32), ids)
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
        rows: NDArray[np.float32] = self._flat.reconstruct_batch(positions)
        return rows

    def search(
        self, queries: NDArray[np.float32], k: int, *, allowed: Mask | None = None
    ) -> list[Match]:
        """The k best of the allowed rows for each query, exactly.

        FAISS finds the candidates; their scores are then computed again in float64 from the
        stored codes, so that a score depends on query and vector alone (not on the batch or the
        place in the file), and equal vectors tie and are ordered by id.

        Args:
            queries: (q, d) float32, unit rows.
            k: results wanted, at least 1; fewer come only if fewer rows are allowed.
            allowed: (n,) which rows may be returned; None means all.

        Raises IndexFileError.
        """
        count = len(self) if allowed is None else int(np.count_nonzero(allowed))
        fetch = k + SLACK
        if count <= max(fetch, SMALL):
            every = np.arange(len(self)) if allowed is None else np.flatnonzero(allowed)
            return [self._best(query, every, k) for query in queries]
        self.check()
        parameters = None
        if allowed is not None:
            bits = np.packbits(allowed, bitorder="little")
            parameters = faiss.SearchParameters(sel=faiss.IDSelectorBitmap(bits))
        approximate, places = self._flat.search(queries, fetch, params=parameters)
        # Summing d float32 products of unit vectors is off by less than this, in any order.
        margin = self.dim * 2.0**-23
        found = []
        for query, rough, positions in zip(queries, approximate, places, strict=True):
            best = self._best(query, positions, k)
            # A row that was not fetched scores at most rough[-1] + margin. Where that could still
            # reach the k-th place (many near-equal rows), everything in reach is fetched.
            if rough[-1] + margin >= best.scores[-1]:
                radius = float(best.scores[-1]) - 2 * margin
                _, _, positions = self._flat.range_search(query[None], radius, params=parameters)
                best = self._best(query, positions, k)
            found.append(best)
        return found

    def _best(self, query: NDArray[np.float32], positions: Positions, k: int) -> Match:
        wide = query.astype(np.float64)
        parts = [
            (self.vectors(positions[start : start + CHUNK]) * wide).sum(axis=1)
            for start in range(0, len(positions), CHUNK)
        ]
        scores = (
            np.concatenate(parts).astype(np.float32) if parts else np.empty(0, dtype=np.float32)
        )
        return _first(self.ids[positions], scores, k)


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
