"""Store: one folder with a SQLite catalogue, which is the truth, and FAISS files made from it.

    photos.lib/catalogue.sqlite           items, captions, embeddings (see `snapshot`)
               image-1-00000007.faiss     vectors of model 1 as of generation 7 (see `vectors`)
               caption-1-00000007.faiss
               image-1-00000008-approximate.faiss   where that pays (see `optimizer`)
               writer.lock                who writes (see `locks`)

A FAISS file is used only if it is the one that the catalogue recorded. What was committed since is
read from the catalogue into a small index in memory and searched beside it; what was removed since
is masked. Without a usable file all vectors are searched that way, so the answer is the same, and
the file is made again where the store can be written.

FAISS is imported when a store is searched, and `catalogue` when it is written: they take a while.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
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
    callers_own,
)
from indexes.files import CATALOGUE, LOCK, absolute, find_catalogue, may_write
from indexes.locks import locked
from indexes.records import (
    KINDS,
    ApproximateInfo,
    CaptionRow,
    Derivation,
    Fit,
    ItemRow,
    ItemWrite,
    Kind,
    KindInfo,
    KnownFile,
    Match,
    ModelSpec,
    Owners,
    RootInfo,
    SearchPolicy,
    Source,
    StoredModel,
    StoreInfo,
    WordMatch,
)
from indexes.snapshot import MODEL_LOST, Reader, Snapshot
from indexes.writer import Writer, check_embeddings

if TYPE_CHECKING:
    from indexes.catalogue import Catalogue
    from indexes.filters import Condition
    from indexes.gallery import Approximate, Gallery
    from indexes.vectors import VectorIndex
    from indexes.words import WordLists

__all__ = [
    "CaptionRow",
    "ItemRow",
    "ItemWrite",
    "Kind",
    "KnownFile",
    "Match",
    "ModelSpec",
    "RootInfo",
    "Snapshot",
    "Store",
    "StoreInfo",
    "StoredModel",
    "Writer",
]

# From so many rows beside the FAISS file (a run was killed before it finished), opening writes
# them into it: reading 20,000 vectors from the catalogue takes about 0.1 s, at every start.
LONG_TAIL = 20_000
# From so many queries on in one state of a store, words are looked for in memory, where a query of
# 8,000 pictures costs 0.3 ms instead of 5, and so is whose captions are whose. To read all that of
# 8,000 pictures with 40,000 captions takes 35 ms.
OFTEN = 32
FEW = 50_000  # items of a store of which that takes no more than a moment, with FEW_EACH captions
FEW_EACH = 5


@dataclass(frozen=True, slots=True)
class _AtHand:
    """What is kept in memory of one state of the catalogue."""

    words: WordLists
    owners: Owners


class Store:
    """One folder of items, captions and embeddings, searched exactly unless it has proved better.

    Searches and reads may run in several threads, and beside a writer in this or another process;
    each sees what was committed when it began.
    """

    def __init__(self, path: Path, catalogue: Reader, model: ModelSpec, *, read_only: bool) -> None:
        """Used by `create` and `open`."""
        self.path = path
        self.model = model
        self._catalogue = catalogue
        self._read_only = read_only
        self._hindrance: str | None = None  # why it is, unless that was asked for
        self._galleries: dict[Kind, Gallery] = {}
        self._at_hand: _AtHand | None = None
        self._at_hand_version, self._asked = (-1, -1), 0
        self._guard = threading.Lock()

    @classmethod
    def create(cls, path: Path, model: ModelSpec) -> Store:
        """A new, empty store in the folder `path`, made if absent.

        Raises StoreExistsError if a store or other files are there, StoreReadOnlyError.
        """
        from indexes.catalogue import Catalogue

        path = absolute(path)
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
        with locked(path):
            catalogue = Catalogue(path / CATALOGUE)
            try:
                # A process that was killed here leaves an empty catalogue, which is completed.
                catalogue.pending_migrations(create=True)
                catalogue.migrate()
                if catalogue.use_model() is not None:
                    raise StoreExistsError(f"{path} is a library already")
                catalogue.add_model(model)
            except BaseException:
                catalogue.close()
                raise
        return cls(path, catalogue, model, read_only=False)

    @classmethod
    def open(
        cls,
        path: Path,
        model: ModelSpec | None = None,
        *,
        add_model: bool = False,
        read_only: bool | None = None,
    ) -> Store:
        """The store at `path`, seen by one of its models.

        A store of an older schema is brought up to date, after a copy of its catalogue was made.

        Args:
            path: the store's folder.
            model: the encoder that will be used; None is the store's default.
            add_model: take up a model that the store does not have, beside its others.
            read_only: never write, not even to mend FAISS files; None finds out by permissions,
                and by trying: what cannot be written, as on a full disk, can still be searched.

        Raises:
            StoreNotFoundError, StoreDamagedError, StoreTooNewError, WrongModelError,
            StoreLockedError, StoreReadOnlyError.
        """
        path = absolute(path)
        file = find_catalogue(path)
        if read_only is not None:
            return cls._open(file, model, add_model, read_only)
        if not (may_write(path) and may_write(file)):
            store = cls._open(file, model, add_model, True)
            store._hindrance = (
                f"{path} may not be written, so it can be searched but not changed: check the"
                " permissions of the folder and its files, or work on a copy (`retriever backup`)"
            )
            return store
        try:
            return cls._open(file, model, add_model, False)
        except StoreReadOnlyError as error:
            try:
                store = cls._open(file, model, add_model, True)
            except StoreReadOnlyError:
                raise error from None
            store._hindrance = str(error)
            return store

    @classmethod
    def _open(cls, file: Path, model: ModelSpec | None, add_model: bool, read_only: bool) -> Store:
        path = file.parent
        catalogue = Reader(file, read_only=read_only)
        try:
            if catalogue.pending_migrations():
                if read_only:
                    raise StoreReadOnlyError(
                        f"{path} was made by an older version and must be brought up to date, but "
                        "may not be written: open it once where it may be"
                    )
                with locked(path), closing(_for_writing(catalogue)) as writable:
                    writable.migrate()
            default = catalogue.use_model()
            if default is None and catalogue.is_used():
                raise StoreDamagedError(f"{path} {MODEL_LOST}")
            if default is None:
                raise StoreNotFoundError(f"the library at {path} was never completed")
            found = default if model is None else catalogue.use_model(model.fingerprint)
            if found is None and model is not None and add_model:
                if read_only:
                    raise StoreReadOnlyError(
                        f"{path} may not be written: {model.name} is not in it"
                    )
                with locked(path), closing(_for_writing(catalogue)) as writable:
                    writable.add_model(model)
                found = catalogue.use_model(model.fingerprint)
            if found is None or (model is not None and model.dim != found.dim):
                assert model is not None
                raise WrongModelError(
                    f"{path} was made with {default.name} ({default.fingerprint[:12]}, "
                    f"{default.dim} dimensions), not with {model.name} ({model.fingerprint[:12]}, "
                    f"{model.dim} dimensions): use that model, or index the pictures with this one"
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
            raise StoreReadOnlyError(self._hindrance or f"{self.path} is opened for reading only")
        with locked(self.path):
            with self._catalogue.read() as rows:
                rows.check_model()
            reader, writable = self._catalogue, _for_writing(self._catalogue)
            if writable is not reader:
                self._catalogue = writable
                reader.close()
            yield Writer(self.path, writable, self.model.dim)

    def models(self) -> list[StoredModel]:
        """The models whose embeddings are here, the default first."""
        with self._catalogue.read() as rows:
            return [
                StoredModel(
                    model_id,
                    spec,
                    is_default=place == 0,
                    pictures=rows.of_model(model_id).vector_count("image"),
                    captions=rows.of_model(model_id).vector_count("caption"),
                    pending=len(rows.of_model(model_id).pending()),
                    derived=rows.of_model(model_id).derivation(),
                )
                for place, (model_id, spec) in enumerate(rows.models().items())
            ]

    @cached_property
    def derivation(self) -> Derivation | None:
        """What this store's model follows from, if its embeddings were made of another's."""
        with self._catalogue.read() as rows:
            return rows.derivation()

    def root_infos(self) -> list[RootInfo]:
        """What is known of each root, in the order they were added."""
        with self._catalogue.read() as rows:
            return rows.root_infos()

    def item_ids(self, root_id: int | None = None) -> list[int]:
        """Ids of all items, or of those under a root, ascending."""
        with self._catalogue.read() as rows:
            return rows.item_ids(root_id)

    @contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        """One state of the store, which what others write meanwhile does not change."""
        with callers_own(self._catalogue.read()) as rows:
            yield rows

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
        among: Collection[int] | NDArray[np.int64] | None = None,
        source: Source | None = None,
        exact: bool = False,
    ) -> list[Match]:
        """The k best of a kind for each query; equal scores are ordered by id.

        The answer is exact, unless there is an approximate index that was proved for queries of
        this source and for k (see `Writer.optimize`); its scores are exact all the same.

        Args:
            kind: "image" searches pictures and answers item ids, "caption" answers caption ids.
            queries: (q, d) float32, unit rows.
            k: results wanted, at least 1; fewer come only if there are fewer candidates.
            among: ids that may be returned, exactly; None means all.
            source: what the queries are embeddings of; None: anything.
            exact: leave out the approximate index.

        Raises:
            InvalidRowsError: queries of another shape, type or length.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, not {k}")
        check_embeddings("queries", queries, self.model.dim)
        from indexes.vectors import IndexFileError

        while True:
            gallery = self._gallery(kind)
            try:
                return gallery.search(queries, k, among=among, source=source, exact=exact)
            except IndexFileError:  # found damaged where it had not been read before
                with self._guard:
                    if self._galleries.get(kind) is gallery:
                        self._galleries[kind] = replace(
                            gallery, version=(-1, -1), index=None, approximate=None
                        )

    def is_exact(self, kind: Kind, k: int, source: Source | None) -> bool:
        """Whether `search` looks at everything for k results to such queries."""
        approximate = self._gallery(kind).approximate
        return approximate is None or approximate.direction(source, k) is None

    def words(self, text: str, *, among: NDArray[np.int64] | None = None) -> WordMatch:
        """Items that have any of a text's words, up to `words.SCORED`; see `Snapshot.words`."""
        with self._catalogue.read() as rows:
            kept = self._kept(rows, asks=True)
            return rows.words(text, among=among, lists=kept.words if kept else None)

    def titled(self, text: str) -> NDArray[np.int64]:
        """Items whose name and folders have all words of a text, ascending."""
        with self._catalogue.read() as rows:
            kept = self._kept(rows)
            return rows.titled(text, lists=kept.words if kept else None)

    def caption_owners(self, caption_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n,) the item of each caption; -1 for one that is gone."""
        with self._catalogue.read() as rows:
            kept = self._kept(rows)
            owners = kept.owners if kept else rows.owners(captions=caption_ids)
        return owners.of(caption_ids)

    def captions_of(self, item_ids: NDArray[np.int64]) -> Owners:
        """All captions of these items."""
        with self._catalogue.read() as rows:
            kept = self._kept(rows)
            return kept.owners.among(item_ids) if kept else rows.owners(items=item_ids)

    def _kept(self, rows: Snapshot, *, asks: bool = False) -> _AtHand | None:
        """What serves those who ask often, once they do."""
        with self._guard:
            version = rows.version()
            if version != self._at_hand_version:
                self._at_hand_version, self._asked, self._at_hand = version, 0, None
            self._asked += asks
            # Tried once only: what is damaged there must not be met by every query from then on.
            if asks and self._asked == OFTEN:
                counts = rows.counts()
                if counts["items"] <= FEW and counts["captions"] <= FEW * FEW_EACH:
                    self._at_hand = _AtHand(rows.word_lists(), rows.owners())
            return self._at_hand

    def items(self, ids: Sequence[int]) -> list[ItemRow]:
        """Items in the order asked; removed ones are absent."""
        with self._catalogue.read() as rows:
            found = rows.items(ids)
        return [found[item_id] for item_id in ids if item_id in found]

    def item_by_path(self, path: Path) -> ItemRow | None:
        """The item of this file, under the deepest root that knows it."""
        path = absolute(path)
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

    def nearest_captions(
        self, item_ids: Collection[int], query: NDArray[np.float32]
    ) -> dict[int, CaptionRow]:
        """The caption of each item that is nearest to a query (d,); absent if it has none.

        Of a few items, rows of the catalogue cost less than the FAISS file of all captions.
        """
        with self._catalogue.read() as rows:
            told = rows.embedded_captions(item_ids)
            if not told:
                return {}
            # Within, so that vectors of several lengths are told as damage.
            vectors = np.stack([vector for _, _, vector in told]).astype(np.float64)
            scores = (vectors * query).sum(axis=1).tolist()
        nearest: dict[int, tuple[float, CaptionRow]] = {}
        for (item_id, caption, _), score in zip(told, scores, strict=True):
            if item_id not in nearest or score > nearest[item_id][0]:  # else the first of equals
                nearest[item_id] = (score, caption)
        return {item_id: caption for item_id, (_, caption) in nearest.items()}

    def embeddings(self, kind: Kind, ids: Sequence[int]) -> NDArray[np.float32]:
        """(n, d) float32 in the order asked, as stored: rounded to float16.

        Raises InvalidRowsError for an id without an embedding.
        """
        vectors = np.empty((len(ids), self.model.dim), dtype=np.float32)
        with self._catalogue.read() as rows:
            found = rows.embeddings(kind, ids)
            if missing := [owner_id for owner_id in ids if owner_id not in found]:
                raise InvalidRowsError(f"there is no {kind} embedding of {missing[0]}")
            for row, owner_id in enumerate(ids):
                vectors[row] = found[owner_id]  # one of another length is told as damage
        return vectors

    def embedded(self, kind: Kind, ids: Collection[int]) -> set[int]:
        """Those of the ids that have an embedding of this model."""
        with self._catalogue.read() as rows:
            return set(rows.embeddings(kind, ids))

    def select(self, condition: Condition) -> NDArray[np.int64]:
        """Ids of the items that fulfil a condition; see `Snapshot.select`."""
        with self._catalogue.read() as rows:
            return rows.select(condition)

    def fit(self) -> Fit | None:
        """What was measured of this store for its model."""
        with self._catalogue.read() as rows:
            return rows.fit()

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
                index[kind] = self._kind_info(rows, kind)
            generation = rows.version()[0]
        return {
            "items": counts["items"],
            "captions": counts["captions"],
            "failures": counts["failures"],
            "model": asdict(self.model),
            "models": [
                asdict(one.spec)
                | {"default": one.is_default, "pictures": one.pictures, "captions": one.captions}
                | {"pending": one.pending}
                | {"base": one.derived.base.name if one.derived else None}
                | {"facts": one.derived.facts if one.derived else None}
                for one in self.models()
            ],
            "generation": generation,
            "index": index,
            "size_bytes": self._size_bytes(),
        }

    def _kind_info(self, rows: Snapshot, kind: Kind) -> KindInfo:
        from indexes.optimizer import reason

        file, policy = rows.index_file(kind), rows.policy()
        built = None if policy.exact else rows.approximate_file(kind)
        count = rows.vector_count(kind)
        approximate: ApproximateInfo | None = None
        if built is not None:
            approximate = {
                "kind": built.kind,
                "rows": built.file.rows,
                "beside": rows.vector_count(kind, after=built.file.change),
                "memory_bytes": built.memory_bytes,
                "build_seconds": built.build_seconds,
                "directions": {
                    source: [asdict(one) for one in several]
                    for source, several in built.directions.items()
                },
            }
        return {
            "rows": count,
            "indexed": file.rows if file is not None else 0,
            "tail": rows.vector_count(kind, after=file.change if file is not None else -1),
            "removed": len(rows.removed(kind)),
            "approximate": approximate,
            "reason": reason(count, self.model.dim, policy, built),
        }

    def policy(self) -> SearchPolicy:
        """How searches may be answered."""
        with self._catalogue.read() as rows:
            return rows.policy()

    def _size_bytes(self) -> int:
        size_bytes = 0
        with suppress(OSError):  # the folder itself is gone
            for path in self.path.iterdir():
                with suppress(OSError):  # a writer took an older file away
                    size_bytes += path.stat().st_size
        return size_bytes

    def verify(self) -> list[str]:
        """Problems found by reading everything (see `indexes.care.verify`); empty means clean."""
        from indexes.care import verify

        return verify(self.path, self._catalogue)

    def compact(self) -> tuple[int, int]:
        """Give the space of what was removed back to the disk; bytes on disk before and after.

        Raises as `writer` does; readers go on meanwhile.
        """
        before = self._size_bytes()
        with self.writer() as writer:
            writer.compact()
        return before, self._size_bytes()

    def backup(self, destination: Path) -> None:
        """A consistent copy of the store in a new folder; others may read and write meanwhile.

        Raises StoreExistsError if something is at `destination`, StoreReadOnlyError.
        """
        from indexes.care import backup

        backup(self.path, self._catalogue, absolute(destination))

    def rebuild(self) -> None:
        """Make the FAISS files anew from the catalogue; raises as `writer` does."""
        with self.writer() as writer:
            writer.finish(anew=KINDS)

    def _gallery(self, kind: Kind) -> Gallery:
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

    def _read_gallery(self, kind: Kind) -> Gallery:
        from indexes.gallery import Gallery
        from indexes.vectors import IndexFileError, VectorIndex

        while True:
            with self._catalogue.read() as rows:
                version = rows.version()
                known = self._galleries.get(kind)
                if known is not None and known.version == version:
                    return known
                rows.check_model()
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
                    approximate = None
                    if index is not None:
                        approximate = self._read_approximate(rows, kind, known, index, alive)
                    return Gallery(version, file, index, alive, tail, is_stale, approximate)

    def _read_approximate(
        self,
        rows: Snapshot,
        kind: Kind,
        known: Gallery | None,
        index: VectorIndex,
        alive: NDArray[np.bool_] | None,
    ) -> Approximate | None:
        from indexes.approximate import ApproximateIndex
        from indexes.gallery import Approximate
        from indexes.optimizer import is_proved
        from indexes.vectors import IndexFileError

        built = rows.approximate_file(kind)
        if built is None or rows.policy().exact:
            return None
        proved = {
            source: [one for one in several if is_proved(one, built.policy)]
            for source, several in built.directions.items()
        }
        if not any(proved.values()):
            return None
        if known is not None and known.approximate and known.approximate.file == built.file:
            found = known.approximate.index
        else:
            try:
                found = ApproximateIndex.load(
                    self.path / built.file.name,
                    dim=self.model.dim,
                    rows=built.file.rows,
                    stamp=built.file.stamp,
                )
            except IndexFileError:  # searches are exact; `optimize` makes it again
                return None
        newer = index.find(rows.ids_after(kind, built.file.change))[0]
        beside, holds = None, alive
        if newer.size:
            beside = np.zeros(len(index), dtype=np.bool_)
            beside[newer] = True
            if alive is not None:
                beside &= alive
            holds = ~beside if alive is None else alive & ~beside
        return Approximate(built.file, found, proved, beside, holds)

    def _is_superseded(self, version: tuple[int, int]) -> bool:
        """Whether the catalogue has moved on, and a writer may have taken older files away."""
        with self._catalogue.read() as rows:
            return rows.version()[0] != version[0]


def _for_writing(reader: Reader) -> Catalogue:
    """The catalogue that is read here, or this very one, as one that can be written."""
    from indexes.catalogue import Catalogue

    if isinstance(reader, Catalogue):
        return reader
    catalogue = Catalogue(reader.path)
    catalogue.model_id = reader.model_id
    return catalogue
