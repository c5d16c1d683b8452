"""Store: one folder with a SQLite catalogue, which is the truth, and FAISS files made from it.

    photos.lib/catalogue.sqlite           items, captions, embeddings (see `catalogue`)
               image-1-00000007.faiss     vectors of model 1 as of generation 7 (see `vectors`)
               caption-1-00000007.faiss
               writer.lock                who writes (see `locks`)

A FAISS file is used only if it is the one that the catalogue recorded. What was committed since is
read from the catalogue into a small index in memory and searched beside it; what was removed since
is masked. Without a usable file all vectors are searched that way, so the answer is the same, and
the file is made again where the store can be written.

The catalogue and FAISS are imported when a store is opened and searched: they take a while.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from indexes.errors import (
    InvalidRowsError,
    StoreDamagedError,
    StoreExistsError,
    StoreLockedError,
    StoreNotFoundError,
    StoreReadOnlyError,
    WrongModelError,
)
from indexes.locks import WriterLock, may_write
from indexes.records import (
    KINDS,
    CaptionRow,
    IndexFile,
    ItemRow,
    ItemWrite,
    Kind,
    KindInfo,
    KnownFile,
    Match,
    ModelSpec,
    StoreInfo,
)

if TYPE_CHECKING:
    from indexes.catalogue import Catalogue, Snapshot, Transaction
    from indexes.vectors import VectorIndex

__all__ = [
    "CaptionRow",
    "ItemRow",
    "ItemWrite",
    "Kind",
    "KnownFile",
    "Match",
    "ModelSpec",
    "Store",
    "StoreInfo",
    "Writer",
]

CATALOGUE = "catalogue.sqlite"
LOCK = "writer.lock"
UNIT_TOLERANCE = 1e-3  # of the length of embeddings and queries handed to the store
STORED_TOLERANCE = 2e-3  # the same, after rounding to float16
# From so many rows beside the FAISS file (a run was killed before it finished), opening writes
# them into it: reading 20,000 vectors from the catalogue takes about 0.1 s, at every start.
LONG_TAIL = 20_000
_FAISS_NAME = re.compile(r"(image|caption)-\d+-\d+\.faiss(\.tmp)?")


@dataclass(frozen=True, slots=True, eq=False)
class _Gallery:
    """What is searched for one kind, in one state of the catalogue."""

    version: tuple[int, int]
    file: IndexFile | None
    index: VectorIndex | None
    alive: NDArray[np.bool_] | None  # rows of `index` that still hold; None means all
    tail: VectorIndex
    is_stale: bool  # the file should be made again


class Store:
    """One folder of items, captions and embeddings, searched exactly.

    Searches and reads may run in several threads, and beside a writer in this or another process;
    each sees what was committed when it began.
    """

    def __init__(
        self, path: Path, catalogue: Catalogue, model: ModelSpec, *, read_only: bool
    ) -> None:
        """Used by `create` and `open`."""
        self.path = path
        self.model = model
        self._catalogue = catalogue
        self._read_only = read_only
        self._galleries: dict[Kind, _Gallery] = {}
        self._guard = threading.Lock()

    @classmethod
    def create(cls, path: Path, model: ModelSpec) -> Store:
        """A new, empty store in the folder `path`, made if absent.

        Raises StoreExistsError if a store or other files are there, StoreReadOnlyError.
        """
        from indexes.catalogue import Catalogue

        path = _absolute(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            names = {entry.name for entry in path.iterdir()}
        except OSError as error:
            raise StoreReadOnlyError(
                f"{path} cannot be made a library ({error.strerror})"
            ) from error
        if foreign := sorted(
            name for name in names if name != LOCK and not name.startswith(CATALOGUE)
        ):
            exists = CATALOGUE in names
            raise StoreExistsError(
                f"{path} is a library already"
                if exists
                else f"{path} holds other files ({foreign[0]!r}): give a folder of its own"
            )
        lock = WriterLock(path / LOCK)
        catalogue = Catalogue(path / CATALOGUE)
        try:
            # A process that was killed here leaves an empty catalogue, which is completed.
            catalogue.migrate(create=True)
            if catalogue.read_model() is not None:
                raise StoreExistsError(f"{path} is a library already")
            catalogue.create_model(model)
        except BaseException:
            catalogue.close()
            raise
        finally:
            lock.release()
        return cls(path, catalogue, model, read_only=False)

    @classmethod
    def open(
        cls, path: Path, model: ModelSpec | None = None, *, read_only: bool | None = None
    ) -> Store:
        """The store at `path`.

        Args:
            path: the store's folder.
            model: the encoder that will be used; another one than the store's is refused.
            read_only: never write, not even to mend FAISS files; None finds out by permissions.

        Raises:
            StoreNotFoundError, StoreDamagedError, StoreTooNewError, WrongModelError.
        """
        from indexes.catalogue import Catalogue

        path = _absolute(path)
        file = path / CATALOGUE
        if not file.is_file():
            raise StoreNotFoundError(f"there is no library at {path}")
        if read_only is None:
            read_only = not (may_write(path) and may_write(file))
        catalogue = Catalogue(file, read_only=read_only)
        try:
            catalogue.migrate()
            found = catalogue.read_model()
            if found is None:
                raise StoreNotFoundError(f"the library at {path} was never completed: create it")
            if model is not None and (model.fingerprint, model.dim) != (
                found.fingerprint,
                found.dim,
            ):
                raise WrongModelError(
                    f"{path} was made with {found.name} ({found.fingerprint[:12]}, "
                    f"{found.dim} dimensions), not with {model.name} ({model.fingerprint[:12]}, "
                    f"{model.dim} dimensions): use that model, or another library"
                )
        except BaseException:
            catalogue.close()
            raise
        return cls(path, catalogue, found, read_only=read_only)

    def close(self) -> None:
        """Close the catalogue and let go of FAISS files."""
        self._galleries.clear()
        self._catalogue.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def generation(self) -> int:
        """Number of times that FAISS files were written."""
        with self._catalogue.read() as rows:
            return rows.version()[0]

    @contextmanager
    def writer(self) -> Iterator[Writer]:
        """The one writer, for the length of a `with` block.

        Everything it did is committed as it goes; `Writer.finish` then brings the FAISS files up
        to date. Raises StoreLockedError naming the other writer, StoreReadOnlyError.
        """
        if self._read_only:
            raise StoreReadOnlyError(f"{self.path} is opened for reading only")
        lock = WriterLock(self.path / LOCK)
        try:
            yield Writer(self.path, self._catalogue, self.model.dim)
        finally:
            lock.release()

    def roots(self) -> list[tuple[int, Path]]:
        """Ids and absolute paths of the roots, in the order they were added."""
        with self._catalogue.read() as rows:
            return rows.roots()

    def known_files(self, root_id: int) -> dict[str, KnownFile]:
        """Everything known under a root, by file: posix path relative to the root."""
        with self._catalogue.read() as rows:
            return rows.known_files(root_id)

    def find_by_hash(self, hashes: Collection[bytes]) -> dict[bytes, int]:
        """An item with an image embedding for each of these content hashes that the store has."""
        with self._catalogue.read() as rows:
            return rows.find_by_hash(hashes)

    def search(
        self,
        kind: Kind,
        queries: NDArray[np.float32],
        k: int,
        *,
        among: Collection[int] | None = None,
    ) -> list[Match]:
        """The k best of a kind for each query, exactly; equal scores are ordered by id.

        Args:
            kind: "image" searches pictures and answers item ids, "caption" answers caption ids.
            queries: (q, d) float32, unit rows.
            k: results wanted, at least 1; fewer come only if there are fewer candidates.
            among: ids that may be returned; None means all.

        Raises:
            InvalidRowsError: queries of another shape, type or length.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, not {k}")
        _check_embeddings("queries", queries, self.model.dim)
        from indexes.vectors import merge

        gallery = self._gallery(kind)
        wanted = None
        if among is not None:
            wanted = np.unique(np.fromiter(among, dtype=np.int64, count=len(among)))
        parts = []
        for index, alive in ((gallery.index, gallery.alive), (gallery.tail, None)):
            if index is None:
                continue
            allowed = alive
            if wanted is not None:
                allowed = np.zeros(len(index), dtype=np.bool_)
                allowed[index.find(wanted)[0]] = True
                if alive is not None:
                    allowed &= alive
            parts.append(index.search(queries, k, allowed=allowed))
        return [merge(several, k) for several in zip(*parts, strict=True)]

    def items(self, ids: Sequence[int]) -> list[ItemRow]:
        """Items in the order asked; removed ones are absent."""
        with self._catalogue.read() as rows:
            found = rows.items(ids)
        return [found[item_id] for item_id in ids if item_id in found]

    def item_by_path(self, path: Path) -> ItemRow | None:
        """The item of this file, under the deepest root that knows it."""
        path = _absolute(path)
        with self._catalogue.read() as rows:
            for root_id, root in sorted(rows.roots(), key=lambda row: -len(row[1].parts)):
                if path.is_relative_to(root):
                    item_id = rows.item_at(root_id, path.relative_to(root).as_posix())
                    if item_id is not None:
                        return rows.items([item_id])[item_id]
        return None

    def captions(self, caption_ids: Sequence[int]) -> list[tuple[int, CaptionRow]]:
        """(item id, caption) in the order asked; removed ones are absent."""
        with self._catalogue.read() as rows:
            found = rows.captions(caption_ids)
        return [found[caption_id] for caption_id in caption_ids if caption_id in found]

    def caption_ids(self, item_id: int) -> list[int]:
        """Ids of an item's captions, in their order."""
        with self._catalogue.read() as rows:
            return rows.caption_ids([item_id])

    def embeddings(self, kind: Kind, ids: Sequence[int]) -> NDArray[np.float32]:
        """(n, d) float32 in the order asked, as stored: rounded to float16.

        Raises InvalidRowsError for an id without an embedding.
        """
        with self._catalogue.read() as rows:
            found = rows.embeddings(kind, ids)
        if missing := [owner_id for owner_id in ids if owner_id not in found]:
            raise InvalidRowsError(f"there is no {kind} embedding of {missing[0]}")
        vectors = np.empty((len(ids), self.model.dim), dtype=np.float32)
        for row, owner_id in enumerate(ids):
            vectors[row] = found[owner_id]
        return vectors

    def failures(self) -> list[ItemRow]:
        """Items that failed, with their reasons."""
        with self._catalogue.read() as rows:
            return rows.failures()

    def info(self) -> StoreInfo:
        """Counts, model, generation and sizes."""
        with self._catalogue.read() as rows:
            counts = rows.counts()
            index: dict[str, KindInfo] = {}
            for kind in KINDS:
                file = rows.index_file(kind)
                after = file.change if file is not None else -1
                index[kind] = {
                    "rows": rows.vector_count(kind),
                    "indexed": file.rows if file is not None else 0,
                    "tail": rows.vector_count(kind, after=after),
                    "removed": len(rows.removed(kind)),
                }
            generation = rows.version()[0]
        size_bytes = 0
        for path in self.path.iterdir():
            with suppress(OSError):  # a writer took an older file away
                size_bytes += path.stat().st_size
        return {
            "items": counts["items"],
            "captions": counts["captions"],
            "failures": counts["failures"],
            "model": asdict(self.model),
            "generation": generation,
            "index": index,
            "size_bytes": size_bytes,
        }

    def verify(self) -> list[str]:
        """Problems found by reading everything; empty means clean.

        Checks SQLite's integrity, foreign keys, that exactly what should have an embedding has
        one, that embeddings are finite and of unit length, and that the FAISS files have the
        recorded generation, size and checksum and hold the very vectors of the catalogue.
        """
        found: list[str] = []
        try:
            with self._catalogue.read() as rows:
                found += rows.problems()
                for kind in KINDS:
                    found += self._verify_kind(rows, kind)
        except StoreDamagedError as error:
            found.append(str(error))
        return found

    def _verify_kind(self, rows: Snapshot, kind: Kind) -> list[str]:
        from indexes.vectors import IndexFileError, VectorIndex

        found: list[str] = []
        generation, change = rows.version()
        file, index = rows.index_file(kind), None
        if file is not None:
            if file.generation > generation or file.change > change:
                found.append(f"{file.name} is of a later generation than the catalogue")
            try:
                index = VectorIndex.load(
                    self.path / file.name,
                    dim=self.model.dim,
                    rows=file.rows,
                    stamp=file.stamp,
                    full=True,
                )
            except IndexFileError as error:
                found.append(f"{error}; rebuild makes it again")
        after = file.change if file is not None else -1
        tail = [ids for ids, _ in rows.vectors(kind, after=after)]
        beside = np.concatenate([*tail, np.empty(0, dtype=np.int64)])
        missing = 0
        expected = np.zeros(len(index) if index is not None else 0, dtype=np.bool_)
        for ids, stored in rows.vectors(kind):
            if stored.shape[1] != self.model.dim:
                return [*found, f"{kind} embeddings have {stored.shape[1]} dimensions"]
            lengths = np.linalg.norm(stored.astype(np.float64), axis=1)
            found += [
                f"the {kind} embedding of {owner_id} is not a unit vector"
                for owner_id in ids[~(np.abs(lengths - 1) <= STORED_TOLERANCE)]  # catches NaN too
            ]
            if index is None:
                continue
            in_file = ~np.isin(ids, beside)
            positions, present = index.find(ids[in_file])
            missing += int((~present).sum())
            expected[positions] = True
            differs = (index.vectors(positions) != stored[in_file][present]).any(axis=1)
            found += [
                f"the FAISS file has another {kind} vector for {owner_id}"
                for owner_id in index.ids[positions[differs]]
            ]
        if index is not None:
            expected[index.find(np.concatenate([rows.removed(kind), beside]))[0]] = True
            extra = int((~expected).sum())
            if missing or extra:
                found.append(f"the FAISS file of {kind}s lacks {missing} rows and has {extra} more")
        return found

    def rebuild(self) -> None:
        """Make the FAISS files anew from the catalogue; raises as `writer` does."""
        with self.writer() as writer:
            writer.finish(anew=KINDS)

    def _gallery(self, kind: Kind) -> _Gallery:
        with self._guard:
            gallery = self._galleries[kind] = self._read_gallery(kind)
            if gallery.is_stale and not self._read_only:
                try:
                    with self.writer() as writer:
                        writer.finish(anew=(kind,))
                    gallery = self._galleries[kind] = self._read_gallery(kind)
                except (StoreLockedError, StoreReadOnlyError):
                    # Whoever writes now will mend it; until then memory serves.
                    gallery = self._galleries[kind] = replace(gallery, is_stale=False)
            return gallery

    def _read_gallery(self, kind: Kind) -> _Gallery:
        from indexes.vectors import IndexFileError, VectorIndex

        while True:
            with self._catalogue.read() as rows:
                version = rows.version()
                known = self._galleries.get(kind)
                if known is not None and known.version == version:
                    return known
                file = rows.index_file(kind)
                index = None
                is_broken = False
                if file is not None and known is not None and known.file == file:
                    index, is_broken = known.index, known.index is None
                elif file is not None:
                    try:
                        index = VectorIndex.load(
                            self.path / file.name,
                            dim=self.model.dim,
                            rows=file.rows,
                            stamp=file.stamp,
                        )
                    except IndexFileError:
                        is_broken = True
                if not is_broken or not self._is_superseded(version):
                    after = file.change if file is not None and index is not None else -1
                    tail = VectorIndex.build(self.model.dim, rows.vectors(kind, after=after))
                    alive = None
                    if index is not None:
                        gone = index.find(np.concatenate([rows.removed(kind), tail.ids]))
                        if gone[0].size:
                            alive = np.ones(len(index), dtype=np.bool_)
                            alive[gone[0]] = False
                    is_stale = is_broken or len(tail) >= LONG_TAIL
                    return _Gallery(version, file, index, alive, tail, is_stale)

    def _is_superseded(self, version: tuple[int, int]) -> bool:
        """Whether the catalogue has moved on, and a writer may have taken older files away."""
        with self._catalogue.read() as rows:
            return rows.version()[0] != version[0]


class Writer:
    """Changes a store; every method is one transaction unless called inside `together`.

    Reads of the Store show what was committed, not what an open `together` has done so far.
    """

    def __init__(self, path: Path, catalogue: Catalogue, dim: int) -> None:
        """Used by `Store.writer`."""
        self._path = path
        self._catalogue = catalogue
        self._dim = dim
        self._joined: Transaction | None = None

    @contextmanager
    def together(self) -> Iterator[None]:
        """All calls inside are one transaction, for many small ones: a commit costs an fsync."""
        with self._catalogue.write() as transaction:
            self._joined = transaction
            try:
                yield
            finally:
                self._joined = None

    @contextmanager
    def _transaction(self) -> Iterator[Transaction]:
        if self._joined is None:
            with self._catalogue.write() as transaction:
                yield transaction
        else:
            with self._joined.savepoint():
                yield self._joined

    def add_root(self, path: Path) -> int:
        """Id of the root, made if absent."""
        with self._transaction() as rows:
            return rows.add_root(_absolute(path))

    def write(self, root_id: int, items: Sequence[ItemWrite]) -> list[int]:
        """Ids of the items written, in order; all or none.

        Raises InvalidRowsError naming the file if an embedding is not float32, finite and of unit
        length within 1e-3, or a row contradicts itself; nothing is written then.
        """
        places = set()
        for item in items:
            self._check_item(item)
            if item.file in places:
                raise InvalidRowsError(f"{item.file!r} is in the batch twice")
            places.add(item.file)
        with self._transaction() as rows:
            return rows.write_items(root_id, items)

    def move(self, item_id: int, root_id: int, file: str, size: int, mtime_ns: int) -> None:
        """The item is now at another place, with all that is known of it.

        Raises InvalidRowsError if there is no such item or another one is at that place: a file
        with new content at a known place is a change, to be written.
        """
        _check_file(file)
        with self._transaction() as rows:
            if rows.item_at(root_id, file) not in (None, item_id):
                raise InvalidRowsError(f"another item is at {file!r} already")
            rows.update_place(item_id, root_id=root_id, file=file, size=size, mtime_ns=mtime_ns)

    def set_captions(
        self,
        item_id: int,
        captions: Sequence[CaptionRow],
        embeddings: NDArray[np.float32] | None,
    ) -> None:
        """Replace an item's captions; `embeddings` (n_captions, d), None if there are none.

        Raises InvalidRowsError, also for captions of a failed item: those come with `write`.
        """
        self._check_captions(f"captions of item {item_id}", captions, embeddings)
        with self._transaction() as rows:
            item = rows.items([item_id]).get(item_id)
            if item is None or item.status != "ok":
                raise InvalidRowsError(f"there is no item {item_id} that can have captions")
            rows.set_captions(item_id, captions, embeddings)

    def touch(self, item_id: int, size: int, mtime_ns: int) -> None:
        """Same content, other size or time stamp on disk."""
        with self._transaction() as rows:
            rows.update_place(item_id, size=size, mtime_ns=mtime_ns)

    def remove(self, ids: Collection[int]) -> None:
        """Forget items with their captions and embeddings; unknown ids are ignored."""
        with self._transaction() as rows:
            rows.remove(ids)

    def finish(self, *, anew: Collection[Kind] = ()) -> None:
        """Bring the FAISS files up to date, as a new generation; nothing to do is done in no time.

        A file is written whole beside its final name, synced, renamed, then recorded; killed
        anywhere in between, the one before stays in use. Kinds in `anew` are written in any case.
        Raises StoreReadOnlyError (disk full, permissions); searches are right without the files.
        """
        from indexes.vectors import VectorIndex

        assert self._joined is None, "finish is a transaction of its own"
        written: dict[Kind, IndexFile | None] = {}
        for kind in KINDS:
            with self._catalogue.read() as rows:
                generation, change = rows.version()
                if kind not in anew and self._is_current(rows, kind):
                    continue
                index = VectorIndex.build(self._dim, rows.vectors(kind))
                name = f"{kind}-{rows.model_id}-{generation + 1:08d}.faiss"
            written[kind] = None
            if len(index):
                try:
                    stamp = index.save(self._path / name)
                except OSError as error:
                    raise StoreReadOnlyError(
                        f"{self._path / name} could not be written ({error.strerror}); nothing "
                        "is lost, searches go on without it, only slower"
                    ) from error
                written[kind] = IndexFile(name, generation + 1, change, len(index), stamp)
        if written:
            with self._catalogue.write() as rows:
                rows.next_generation()
                for kind, file in written.items():
                    rows.record_index(kind, file)
        self._sweep()

    def _is_current(self, rows: Snapshot, kind: Kind) -> bool:
        file = rows.index_file(kind)
        if file is None:
            return not rows.vector_count(kind)
        if rows.removed(kind).size or rows.vector_count(kind, after=file.change):
            return False
        try:
            status = (self._path / file.name).stat()
        except OSError:
            return False
        return (status.st_size, status.st_mtime_ns) == (file.stamp.size_bytes, file.stamp.mtime_ns)

    def _sweep(self) -> None:
        """Remove FAISS files that are no longer, or were never, recorded."""
        with self._catalogue.read() as rows:
            used = rows.index_file_names()
        for file in self._path.iterdir():
            if _FAISS_NAME.fullmatch(file.name) and file.name not in used:
                # Windows keeps a file that a reader has mapped; a later sweep takes it.
                with suppress(OSError):
                    file.unlink()

    def _check_item(self, item: ItemWrite) -> None:
        _check_file(item.file)
        what = f"{item.file!r}"
        if item.failure is not None:
            if item.image_embedding is not None or item.caption_embeddings is not None:
                raise InvalidRowsError(f"{what} failed and yet has embeddings")
            self._check_texts(what, item.captions)
            return
        if item.image_embedding is not None:
            _check_embeddings(what, item.image_embedding[None], self._dim)
        elif item.content_hash is None:
            raise InvalidRowsError(f"{what} has neither an embedding nor a content hash")
        self._check_captions(what, item.captions, item.caption_embeddings)

    def _check_captions(
        self, what: str, captions: Sequence[CaptionRow], embeddings: NDArray[np.float32] | None
    ) -> None:
        self._check_texts(what, captions)
        count = len(embeddings) if embeddings is not None else 0
        if count != len(captions):
            raise InvalidRowsError(f"{what}: {len(captions)} captions, {count} embeddings")
        if embeddings is not None:
            _check_embeddings(f"{what}, captions", embeddings, self._dim)

    def _check_texts(self, what: str, captions: Sequence[CaptionRow]) -> None:
        for caption in captions:
            for text in (caption.text, caption.source):
                try:
                    text.encode("utf-8")
                except UnicodeEncodeError as error:
                    raise InvalidRowsError(f"{what}: a caption is not valid text") from error


def _absolute(path: Path) -> Path:
    # Without following links, as Path.resolve would: a root is where the user says it is.
    return Path(os.path.abspath(path))  # noqa: PTH100


def _check_file(file: str) -> None:
    if not file or file.startswith("/") or "\0" in file:
        raise InvalidRowsError(f"{file!r} is not a path relative to a root")


def _check_embeddings(what: str, embeddings: NDArray[np.float32], dim: int) -> None:
    if embeddings.dtype != np.float32 or embeddings.ndim != 2 or embeddings.shape[1] != dim:
        raise InvalidRowsError(
            f"{what}: embeddings are {embeddings.dtype} {embeddings.shape}, not float32 (n, {dim})"
        )
    lengths = np.linalg.norm(embeddings, axis=1)
    if not (np.abs(lengths - 1) <= UNIT_TOLERANCE).all():  # False for NaN and infinity
        row = int(np.flatnonzero(~(np.abs(lengths - 1) <= UNIT_TOLERANCE))[0])
        raise InvalidRowsError(f"{what}: embedding {row} has length {lengths[row]:.4g}, not 1")
