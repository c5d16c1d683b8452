"""Snapshot: one consistent state of a store's catalogue, read with the standard library alone.

Whoever only reads, such as a search from the shell, imports no SQLAlchemy, which costs more than
all the rest of a query. So every question that is asked of the catalogue stands here, as plain SQL
with named parameters, and `catalogue`, which writes, asks them here too. But for the PRAGMAs of
`problems` it is standard SQL: over another database, what `execute` is called on is all that
changes.
"""

from __future__ import annotations

import json
import os
import sqlite3
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from indexes import words
from indexes.errors import (
    StoreDamagedError,
    StoreError,
    StoreLockedError,
    StoreNotFoundError,
    StoreReadOnlyError,
    StoreTooNewError,
    WrongModelError,
)
from indexes.files import may_write, sync
from indexes.migrations import MIGRATIONS
from indexes.records import (
    ApproximateFile,
    CaptionRow,
    Derivation,
    Direction,
    Extras,
    FileStamp,
    Fit,
    IndexFile,
    ItemRow,
    Kind,
    KnownFile,
    ModelSpec,
    Owners,
    RootInfo,
    SearchPolicy,
    Status,
    WordMatch,
    in_order,
)
from indexes.words import WordLists

if TYPE_CHECKING:
    from indexes.filters import Condition

BUSY_SECONDS = 30
# Ids in one statement: below every database's limit, and few enough to compile quickly.
IN_CHUNK = 500
# No encoder has more dimensions, and a damaged number must not ask for all memory.
MAX_DIM = 1 << 16
# Vectors read at a time while building an index: 4096 x 512-d are 4 MiB.
VECTOR_CHUNK = 4096

# The tables as the migrations leave them, but for `words`: of which type are each column's values.
# Paths are the bytes of the file system (os.fsencode), because names need not be valid text.
# Tombstones stand for embeddings that are gone but may still be in a FAISS file.
_EMBEDDINGS = {"owner_id": "integer", "model_id": "integer", "change": "integer", "vector": "blob"}
TABLES: Mapping[str, Mapping[str, str]] = {
    "models": {
        "id": "integer",
        "name": "text",
        "dim": "integer",
        "fingerprint": "text",
        "base_id": "integer",  # of a model whose embeddings follow from another's
        "head": "blob",  # by which they do: safetensors, see `heads`
        "facts": "text",  # JSON
    },
    "store_info": {
        "id": "integer",
        "model_id": "integer",
        "generation": "integer",
        "change": "integer",
        "policy": "text",
    },
    "roots": {"id": "integer", "path": "blob", "indexed_at": "time"},  # UTC
    "items": {
        "id": "integer",
        "root_id": "integer",
        "file": "blob",
        "size": "integer",
        "mtime_ns": "integer",
        "content_hash": "blob",
        "width": "integer",
        "height": "integer",
        "taken": "time",
        "status": "text",
        "reason": "text",
        "camera": "text",
        "latitude": "real",
        "longitude": "real",
        "perceptual_hash": "integer",
        "facts": "integer",
    },
    "captions": {
        "id": "integer",
        "item_id": "integer",
        "position": "integer",
        "text": "text",
        "source": "text",
    },
    "extras": {  # either a text or a number
        "id": "integer",
        "item_id": "integer",
        "key": "text",
        "text": "text",
        "number": "real",
    },
    "image_embeddings": _EMBEDDINGS,  # of little-endian float16
    "caption_embeddings": _EMBEDDINGS,
    "tombstones": {
        "kind": "text",
        "model_id": "integer",
        "owner_id": "integer",
        "change": "integer",
    },
    "index_files": {
        "kind": "text",
        "model_id": "integer",
        "name": "text",
        "generation": "integer",
        "change": "integer",
        "rows": "integer",
        "size_bytes": "integer",
        "checksum": "text",
    },
    "approximate_files": {
        "kind": "text",
        "model_id": "integer",
        "name": "text",
        "generation": "integer",
        "change": "integer",
        "rows": "integer",
        "size_bytes": "integer",
        "checksum": "text",
        "facts": "text",  # JSON: the fields of ApproximateFile but for `file`
    },
    "fits": {
        "model_id": "integer",
        "change": "integer",
        "rows": "integer",
        "facts": "text",  # JSON
        "means": "blob",  # (2, d) of little-endian float32
    },
    "schema_migrations": {"number": "integer", "name": "text", "applied_at": "text"},
}
# Items or captions with their items, and what an embedding of that kind belongs to.
OWNERS: Mapping[Kind, str] = {
    "image": "items",
    "caption": "items JOIN captions ON captions.item_id = items.id",
}
OWNER: Mapping[Kind, str] = {"image": "items.id", "caption": "captions.id"}

Ids = NDArray[np.int64]
Vectors = NDArray[np.float16]

MODEL_LOST = (
    "no longer says which model made it: restore a backup, or remove the library and index again"
)
_REFUSALS = ("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_READONLY")
_WAY_OUT = (
    "`retriever repair` saves what can be read; or restore a backup, or remove the library and "
    "index again"
)

# What reading raises where a bit flipped that SQLite has no checksum of: a number where a text was,
# a time of day that is none, a message of SQLite's own that quotes what is no text.
_DAMAGE = (sqlite3.Error, ValueError, TypeError, AttributeError, LookupError, OverflowError)


class _Immutable(sqlite3.Connection):
    """To a file that is believed not to change while it is read."""


class Reader:
    """A database of items, captions and embeddings, for those who only read it."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Open the SQLite file at `path`, made if it is absent and may be written."""
        self.path = path
        self.read_only = read_only
        self.model_id = 0  # set by `use_model`
        self._idle: list[sqlite3.Connection] = []
        self._identity: tuple[int, int] | None = None
        self._stamp = (0, 0)

    def close(self) -> None:
        """Close every connection; those in use are closed when they are no longer."""
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    @contextmanager
    def read(self) -> Iterator[Snapshot]:
        """One consistent state, whatever others write meanwhile."""
        self._follow()
        before, is_immutable = self._stamp, False
        try:
            with translated(self.path), self._connected() as connection:
                is_immutable = isinstance(connection, _Immutable)
                connection.execute("BEGIN")
                yield Snapshot(connection, self.model_id, self.path)
        finally:
            self._follow()
            if is_immutable and self._stamp != before:  # nothing kept its pages as they were
                raise StoreLockedError(
                    f"{self.path} was written while it was read; try again when that is done"
                )

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        """A connection that nobody else uses meanwhile, outside any transaction."""
        idle = self._idle
        try:
            connection = idle.pop()
        except IndexError:
            connection = self.connect()
        try:
            yield connection
            connection.rollback()
            # One that only reads decides anew for each snapshot: see _connect_read_only.
            is_kept = idle is self._idle and not self.read_only
        except BaseException:
            connection.close()
            raise
        if is_kept:
            idle.append(connection)
        else:
            connection.close()

    def _follow(self) -> None:
        """Let go of connections to a database that `repair` has put another one in place of."""
        with suppress(OSError):
            status = self.path.stat()
            before, self._identity = self._identity, (status.st_dev, status.st_ino)
            self._stamp = (status.st_mtime_ns, status.st_size)
            if before not in (None, self._identity):
                self.close()

    def pending_migrations(self, *, create: bool = False) -> int:
        """How many migrations this database lacks; an empty one is ours only with `create`.

        Raises StoreNotFoundError if its making was cut off, StoreDamagedError, and
        StoreTooNewError if the schema is ahead of us.
        """
        with translated(self.path), self._connected() as connection:
            applied = applied_migrations(connection)
            is_blank = not applied and not table_names(connection)
        # With a FAISS file beside it, it had been complete once.
        if is_blank and not create and not any(self.path.parent.glob("*.faiss")):
            raise StoreNotFoundError(f"the library at {self.path.parent} was never completed")
        if not applied and not create:
            raise StoreDamagedError(
                f"{self.path} is not a catalogue of ours, or is empty; {_WAY_OUT}"
            )
        if applied > len(MIGRATIONS):
            raise StoreTooNewError(
                f"{self.path} has schema {applied}, this version knows up to {len(MIGRATIONS)}: "
                "update the software, or use a library of its own for each version"
            )
        return len(MIGRATIONS) - applied

    def copy(self, destination: Path) -> None:
        """A consistent copy of the database, whole or absent, whatever others write meanwhile.

        Raises StoreReadOnlyError.
        """
        beside = destination.with_name(destination.name + ".tmp")
        beside.unlink(missing_ok=True)
        try:
            with translated(self.path), self._connected() as connection:
                connection.execute("VACUUM INTO ?", (beside.absolute().as_uri(),))
            sync(beside)
            beside.replace(destination)
            sync(destination.parent)
        except OSError as error:
            raise StoreReadOnlyError(
                f"{destination} could not be written ({error.strerror}); nothing was changed"
            ) from error
        finally:
            beside.unlink(missing_ok=True)

    def use_model(self, fingerprint: str | None = None) -> ModelSpec | None:
        """Work with the model of this fingerprint, or with the default; None if there is none."""
        with self.read() as rows:
            found = rows.model(fingerprint)
        if found is None:
            return None
        self.model_id, model = found
        return model

    def is_used(self) -> bool:
        """Whether anything was ever indexed."""
        with self.read() as rows:
            return bool(rows.roots())

    def connect(self) -> sqlite3.Connection:
        """A new connection that begins no transaction by itself."""
        if self.read_only:
            connection = self._connect_read_only()
        else:
            connection = sqlite3.connect(
                self.path.absolute().as_uri(),
                uri=True,
                timeout=BUSY_SECONDS,
                check_same_thread=False,
            )
        try:
            connection.isolation_level = None
            connection.execute("PRAGMA foreign_keys = ON")
            tables = table_names(connection)
            is_ours = not tables or "schema_migrations" in tables
            if not self.read_only and is_ours:  # the mode is written into the file
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = FULL")  # a commit survives a power cut
        except BaseException:
            connection.close()
            raise
        return connection

    def _connect_read_only(self) -> sqlite3.Connection:
        # SQLite can read a database in WAL mode only beside its -wal and -shm files, which it
        # cannot make where it may not write, nor on a full disk. With nothing in the log the file
        # alone is the whole truth and may be called immutable; decided anew for each snapshot, so
        # that a writer elsewhere, with more rights than ours, is seen.
        log = self.path.with_name(self.path.name + "-wal")
        has_log = False
        with suppress(OSError):  # it comes and goes
            has_log = log.stat().st_size > 0
        uri = self.path.absolute().as_uri() + "?mode=ro"
        connection = None
        if has_log or may_write(self.path.parent):
            connection = sqlite3.connect(
                uri, uri=True, timeout=BUSY_SECONDS, check_same_thread=False
            )
            try:
                connection.execute("SELECT 1 FROM sqlite_master")
            except sqlite3.OperationalError as error:
                is_refused = error.sqlite_errorname.startswith(_REFUSALS)
                connection.close()
                if has_log or not is_refused:
                    raise
                connection = None
        return connection or sqlite3.connect(
            uri + "&immutable=1", uri=True, check_same_thread=False, factory=_Immutable
        )


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Database errors as ours, each with what happened and the way out."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        raise our_error(path, error) from error
    except StoreError:
        raise
    except _DAMAGE as error:
        raise our_error(path, f"{type(error).__name__}: {error}") from error


def our_error(path: Path, error: Any) -> StoreError:
    """The error of ours that stands for one of the database's, or for a text."""
    said = str(error)
    code = getattr(error, "sqlite_errorname", "")
    if "no such module: fts5" in said:
        return StoreError(
            f"the SQLite of this Python ({sqlite3.sqlite_version}) was built without FTS5, which "
            "finds words: take a Python whose SQLite has it, as those of python.org, conda and "
            "every larger Linux distribution do"
        )
    if code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return StoreLockedError(f"{path} is in use by another process; try again when it is done")
    if code.startswith("SQLITE_FULL"):
        return StoreReadOnlyError(
            f"{path} could not be written: the disk is full; what was there before is kept, "
            "and the same command goes on once there is room"
        )
    if code.startswith("SQLITE_READONLY"):
        return StoreReadOnlyError(
            f"{path} could not be written ({said}); what was there before is kept"
        )
    if code.startswith("SQLITE_IOERR") and code != "SQLITE_IOERR_SHORT_READ":
        return StoreReadOnlyError(
            f"{path} could not be read or written ({said}): is the disk full, over a quota or "
            "failing? What was committed before is kept"
        )
    if code.startswith("SQLITE_CANTOPEN"):
        return StoreReadOnlyError(
            f"{path} cannot be opened ({said}); check its permissions and, if "
            f"{path.name}-wal lies beside it, open it once where it may be written"
        )
    return StoreDamagedError(f"{path} cannot be read as a catalogue ({said}); {_WAY_OUT}")


def table_names(connection: sqlite3.Connection) -> set[str]:
    """Every table that there is."""
    names = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
    return {name for (name,) in names}


def applied_migrations(connection: sqlite3.Connection) -> int:
    """How many migrations made the schema."""
    if "schema_migrations" not in table_names(connection):
        return 0
    (number,) = connection.execute("SELECT max(number) FROM schema_migrations").fetchone()
    return int(number or 0)


def chunks(values: Iterable[Any]) -> Iterator[list[Any]]:
    """The values, each once, as many at a time as go into one statement."""
    distinct = list(dict.fromkeys(values))
    for start in range(0, len(distinct), IN_CHUNK):
        yield distinct[start : start + IN_CHUNK]


def _name(stored: object) -> str:
    """A file's name as Python has it."""
    if not isinstance(stored, bytes):
        raise TypeError(f"a file name is stored as {type(stored).__name__}")
    return os.fsdecode(stored)


def _time(stored: str | None) -> datetime | None:
    return None if stored is None else datetime.fromisoformat(stored)


def _spec(model_id: int, name: object, dim: object, fingerprint: object) -> ModelSpec:
    if (
        not isinstance(name, str)
        or not isinstance(fingerprint, str)
        or not isinstance(dim, int)
        or not 0 < dim <= MAX_DIM
    ):
        raise ValueError(f"model {model_id} has {dim!r} dimensions, or no name or fingerprint")
    return ModelSpec(name, dim, fingerprint)


class Snapshot:
    """Reads one consistent state of a catalogue."""

    def __init__(self, connection: sqlite3.Connection, model_id: int, path: Path) -> None:
        self._connection = connection
        self._path = path
        self.model_id = model_id

    def _each(self, statement: str, **parameters: Any) -> sqlite3.Cursor:
        """The rows of a statement, read as they are asked for; `:model` is this model's id."""
        return self._connection.execute(statement, {"model": self.model_id, **parameters})

    def _first(self, statement: str, **parameters: Any) -> Any:
        return self._each(statement, **parameters).fetchone()

    def _count(self, statement: str, **parameters: Any) -> int:
        (count,) = self._first(f"SELECT count(*) FROM {statement}", **parameters)
        return int(count)

    def _among(self, statement: str, values: Iterable[Any], **parameters: Any) -> Iterator[Any]:
        """The rows of a statement for some values, which it has as `IN (:values)`."""
        for chunk in chunks(values):
            named = {f"v{place}": value for place, value in enumerate(chunk)}
            names = ", ".join(f":{name}" for name in named)
            yield from self._each(statement.replace(":values", names), **named, **parameters)

    def version(self) -> tuple[int, int]:
        """(generation, change): equal pairs mean equal contents."""
        [(generation, change)] = self._each("SELECT generation, change FROM store_info")
        return generation, change

    def of_model(self, model_id: int) -> Self:
        """The same state as seen by another model."""
        other = copy(self)
        other.model_id = model_id
        return other

    def model(self, fingerprint: str | None = None) -> tuple[int, ModelSpec] | None:
        """Id and description of the model of this fingerprint, or of the default."""
        which = (
            "id IN (SELECT model_id FROM store_info)"
            if fingerprint is None
            else "fingerprint = :fingerprint"
        )
        row = self._first(
            f"SELECT id, name, dim, fingerprint FROM models WHERE {which}", fingerprint=fingerprint
        )
        return (row[0], _spec(*row)) if row else None

    def check_model(self) -> None:
        """Raise WrongModelError if another process has dropped this model meanwhile."""
        if self._first("SELECT id FROM models WHERE id = :model") is None:
            raise WrongModelError(
                f"{self._path.parent} no longer has the model that it was opened with"
            )

    def models(self) -> dict[int, ModelSpec]:
        """All models by id, the default first, then as they were added."""
        default = self._first("SELECT model_id FROM store_info")
        rows = self._each(
            "SELECT id, name, dim, fingerprint FROM models"
            " ORDER BY CASE WHEN id = :default THEN 0 ELSE 1 END, id",
            default=default and default[0],
        )
        return {row[0]: _spec(*row) for row in rows}

    def derivation(self) -> Derivation | None:
        """What this model's embeddings follow from; None if it is no derived one."""
        row = self._first(
            "SELECT base.id, base.name, base.dim, base.fingerprint, own.head, own.facts"
            " FROM models AS own JOIN models AS base ON base.id = own.base_id"
            " WHERE own.id = :model"
        )
        if row is None:
            return None
        try:
            facts = dict(json.loads(row[5] or "{}"))
        except (ValueError, TypeError):
            facts = {}
        return Derivation(_spec(*row[:4]), bytes(row[4] or b""), facts)

    def of_base(self) -> Self:
        """The same state as seen by the model that this one is derived from, or by itself.

        What embeddings say of pictures alone, such as that two are nearly one, is its to say.
        """
        row = self._first("SELECT base_id FROM models WHERE id = :model")
        return self.of_model(row[0]) if row and row[0] is not None else self

    def derived_ids(self) -> list[int]:
        """The models whose embeddings follow from this one's."""
        rows = self._each("SELECT id FROM models WHERE base_id = :model ORDER BY id")
        return [model_id for (model_id,) in rows]

    def pending(self) -> set[int]:
        """Items that can be read and that this model has not embedded, or not all captions of."""
        return self._pending("image") | self._pending("caption")

    def _pending(self, kind: Kind) -> set[int]:
        """Items that can be read and that this model has not embedded, or a caption of which."""
        readable = f"{OWNERS[kind]} WHERE items.status = 'ok'"
        # Most often there are none, and to count is quicker than to look at each.
        if self._count(readable) == self.vector_count(kind):
            return set()
        rows = self._each(f"SELECT items.id FROM {readable} AND NOT {self._embedded(kind)}")
        return {item_id for (item_id,) in rows}

    def _embedded(self, kind: Kind, *, by_any: bool = False) -> str:
        """Whether this model, or any, has embedded the item or caption of the outer query."""
        model = "" if by_any else " AND model_id = :model"
        return (
            f"EXISTS (SELECT 1 FROM {kind}_embeddings AS own"
            f" WHERE own.owner_id = {OWNER[kind]}{model})"
        )

    def roots(self) -> list[tuple[int, Path]]:
        """Ids and absolute paths of the roots, in the order they were added."""
        rows = self._each("SELECT id, path FROM roots ORDER BY id")
        return [(root_id, Path(_name(path))) for root_id, path in rows]

    def root_infos(self) -> list[RootInfo]:
        """The roots and what is known of each, in the order they were added."""
        rows = self._each(
            "SELECT roots.id, roots.path, count(items.id),"
            " sum(CASE WHEN items.status = 'failed' THEN 1 ELSE 0 END), roots.indexed_at"
            " FROM roots LEFT JOIN items ON items.root_id = roots.id"
            " GROUP BY roots.id, roots.path, roots.indexed_at ORDER BY roots.id"
        )
        return [
            RootInfo(
                root_id,
                Path(_name(path)),
                count,
                failed,
                at.replace(tzinfo=UTC) if (at := _time(indexed_at)) else None,
            )
            for root_id, path, count, failed, indexed_at in rows
        ]

    def item_ids(self, root_id: int | None = None) -> list[int]:
        """Ids of all items, or of those under a root, ascending."""
        under = "" if root_id is None else "WHERE root_id = :root"
        rows = self._each(f"SELECT id FROM items {under} ORDER BY id", root=root_id)
        return [item_id for (item_id,) in rows]

    def known_files(self, root_id: int) -> dict[str, KnownFile]:
        """Everything known under a root, by file."""
        pending_pictures, pending_captions = self._pending("image"), self._pending("caption")
        texts = _by_item(
            self._each(
                "SELECT captions.item_id, captions.text, captions.source FROM captions"
                " JOIN items ON items.id = captions.item_id WHERE items.root_id = :root"
                " ORDER BY captions.item_id, captions.position",
                root=root_id,
            )
        )
        extras = _extras(
            self._each(
                "SELECT extras.item_id, extras.key, extras.text, extras.number FROM extras"
                " JOIN items ON items.id = extras.item_id WHERE items.root_id = :root",
                root=root_id,
            )
        )
        known = {}
        for item_id, name, size, mtime_ns, content_hash, status, facts in self._each(
            "SELECT id, file, size, mtime_ns, content_hash, status, facts FROM items"
            " WHERE root_id = :root ORDER BY file",
            root=root_id,
        ):
            file = _name(name)
            known[file] = KnownFile(
                item_id,
                file,
                size,
                mtime_ns,
                content_hash,
                status,
                texts.get(item_id, ()),
                item_id not in pending_pictures,
                item_id not in pending_captions,
                extras.get(item_id, ()),
                facts,
            )
        return known

    def find_by_hash(self, hashes: Collection[bytes]) -> dict[bytes, int]:
        """The oldest item with an image embedding for each content hash that there is."""
        rows = self._among(
            "SELECT items.content_hash, min(items.id) FROM items"
            " JOIN image_embeddings ON image_embeddings.owner_id = items.id"
            " WHERE image_embeddings.model_id = :model AND items.content_hash IN (:values)"
            " GROUP BY items.content_hash",
            hashes,
        )
        return dict(rows)

    def items(self, ids: Collection[int]) -> dict[int, ItemRow]:
        """Those items that exist, by id."""
        texts: dict[int, tuple[CaptionRow, ...]] = {}
        for chunk in chunks(ids):
            texts |= _by_item(
                self._among(
                    "SELECT item_id, text, source FROM captions WHERE item_id IN (:values)"
                    " ORDER BY item_id, position",
                    chunk,
                )
            )
        extras = _extras(
            self._among(
                "SELECT item_id, key, text, number FROM extras WHERE item_id IN (:values)", ids
            )
        )
        found = {}
        for row in self._among(
            "SELECT items.id, roots.path, items.file, items.size, items.mtime_ns,"
            " items.content_hash, items.width, items.height, items.taken, items.status,"
            " items.reason, items.camera, items.latitude, items.longitude, items.perceptual_hash,"
            " items.facts FROM items JOIN roots ON roots.id = items.root_id"
            " WHERE items.id IN (:values)",
            ids,
        ):
            item_id, path, name, size, mtime_ns, content_hash, width, height, *others = row
            taken, status, reason, camera, latitude, longitude, perceptual_hash, facts = others
            root, file = Path(_name(path)), _name(name)
            found[item_id] = ItemRow(
                item_id=item_id,
                path=root / file,
                root=root,
                file=file,
                size=size,
                mtime_ns=mtime_ns,
                content_hash=content_hash,
                width=width,
                height=height,
                taken=_time(taken),
                status=status,
                reason=reason,
                captions=texts.get(item_id, ()),
                camera=camera,
                latitude=latitude,
                longitude=longitude,
                perceptual_hash=perceptual_hash,
                extras=extras.get(item_id, ()),
                facts=facts,
            )
        return found

    def failures(self) -> list[ItemRow]:
        """Items that failed, in the order of their ids."""
        rows = self._each("SELECT id FROM items WHERE status = 'failed'")
        found = self.items([item_id for (item_id,) in rows])
        return [found[item_id] for item_id in sorted(found)]

    def item_at(self, root_id: int, file: str) -> int | None:
        """Id of the item at this place."""
        row = self._first(
            "SELECT id FROM items WHERE root_id = :root AND file = :file",
            root=root_id,
            file=os.fsencode(file),
        )
        return row[0] if row else None

    def captions(self, caption_ids: Collection[int]) -> dict[int, tuple[int, CaptionRow]]:
        """(item id, caption) of those captions that exist, by caption id."""
        rows = self._among(
            "SELECT id, item_id, text, source FROM captions WHERE id IN (:values)", caption_ids
        )
        return {row_id: (item_id, CaptionRow(*caption)) for row_id, item_id, *caption in rows}

    def embedded_captions(self, item_ids: Collection[int]) -> list[tuple[int, CaptionRow, Vectors]]:
        """(item id, caption, its (d,) embedding) of all captions of some items, by caption id."""
        rows = self._each(
            # Said so that SQLite does not read all captions, or all embeddings, to find these.
            "SELECT item_id, text, source, vector FROM captions CROSS JOIN caption_embeddings"
            " ON owner_id = captions.id AND model_id = :model"
            " WHERE item_id IN (SELECT value FROM json_each(:ids)) ORDER BY +captions.id",
            ids=words.listed(item_ids),
        )
        return [
            (item_id, CaptionRow(text, source), np.frombuffer(vector, dtype="<f2"))
            for item_id, text, source, vector in rows
        ]

    def caption_ids(self, item_ids: Collection[int] | Ids) -> list[int]:
        """Ids of the captions of these items, by item and position; quick for 100,000 items."""
        rows = self._each(
            "SELECT id FROM captions WHERE item_id IN (SELECT value FROM json_each(:ids))"
            " ORDER BY item_id, position",
            ids=words.listed(item_ids),
        )
        return [caption_id for (caption_id,) in rows]

    def owners(
        self, *, captions: Collection[int] | Ids | None = None, items: Ids | None = None
    ) -> Owners:
        """The items of these captions that exist, of all captions of these items, or of all."""
        which, ids = "", None
        if captions is not None:
            which, ids = "WHERE id IN (SELECT value FROM json_each(:ids))", captions
        elif items is not None:
            which, ids = "WHERE item_id IN (SELECT value FROM json_each(:ids))", items
        rows = self._each(
            f"SELECT id, item_id FROM captions {which}",
            ids=None if ids is None else words.listed(ids),
        ).fetchall()
        found = np.array(rows, dtype=np.int64).reshape(-1, 2)
        found = found[np.argsort(found[:, 0])]
        return Owners(found[:, 0].copy(), found[:, 1].copy())

    def extra_keys(self) -> dict[str, int]:
        """The further columns that captions files had, and how many items have each."""
        rows = self._each(
            "SELECT key, count(DISTINCT item_id) FROM extras GROUP BY key ORDER BY key"
        )
        return dict(rows)

    def values(self, field: str, most: int) -> list[tuple[str, int]]:
        """The commonest texts of a field or a further column, and how many items have each."""
        from indexes.filters import values

        return values(self._connection, field, most)

    def select(self, condition: Condition) -> Ids:
        """Ids of the items that could be read and fulfil a condition (see `filters`), ascending."""
        from indexes.filters import select

        return select(self._connection, condition)

    def words(
        self,
        text: str,
        limit: int | None = None,
        *,
        among: Collection[int] | Ids | None = None,
        lists: WordLists | None = None,
    ) -> WordMatch:
        """The items whose captions, names and folders have most of a text's words; see `words`."""
        return words.search(self._connection, text, limit, among=among, lists=lists)

    def titled(self, text: str, *, lists: WordLists | None = None) -> Ids:
        """Ids of the items whose name and folders have all words of a text; see `words`."""
        return words.titled(self._connection, text, lists)

    def word_lists(self) -> WordLists:
        """All items as `words` can take them, while the store stays as it is."""
        return WordLists(self._connection)

    def word_scores(self, text: str, ids: Sequence[int] | Ids) -> NDArray[np.float32]:
        """(n,) float32: what `words` scores these items for a text; 0: no word."""
        return words.scores(self._connection, text, ids)

    def fit(self) -> Fit | None:
        """What was measured of this library for this model; None: nothing, or it is damaged."""
        row = self._first("SELECT change, rows, facts, means FROM fits WHERE model_id = :model")
        if row is None:
            return None
        try:
            change, rows, facts, packed = row
            means = np.frombuffer(packed, dtype="<f4").reshape(2, -1)
            return Fit(int(change), int(rows), dict(json.loads(facts)), means)
        except (ValueError, TypeError):
            return None

    def counts(self) -> dict[str, int]:
        """Numbers of items (failed ones included), captions and failures."""
        return {
            "items": self._count("items"),
            "captions": self._count("captions"),
            "failures": self._count("items WHERE status = 'failed'"),
        }

    def embeddings(self, kind: Kind, ids: Collection[int]) -> dict[int, Vectors]:
        """(d,) float16 embeddings of those ids that have one."""
        rows = self._among(
            f"SELECT owner_id, vector FROM {kind}_embeddings"
            " WHERE model_id = :model AND owner_id IN (:values)",
            ids,
        )
        return {owner_id: np.frombuffer(vector, dtype="<f2") for owner_id, vector in rows}

    def vectors(self, kind: Kind, *, after: int = -1) -> Iterator[tuple[Ids, Vectors]]:
        """Batches of ids (n,) and embeddings (n, d) written after a change, ids ascending.

        Raises StoreDamagedError if their lengths differ.
        """
        for rows in self._vector_batches(kind, after):
            ids = np.fromiter((row[0] for row in rows), dtype=np.int64, count=len(rows))
            packed = np.frombuffer(b"".join(row[1] for row in rows), dtype="<f2")
            try:
                yield ids, packed.reshape(len(rows), -1)
            except ValueError as error:
                raise StoreDamagedError(
                    f"{self._path}: embeddings of {kind}s differ in length; {_WAY_OUT}"
                ) from error

    def _vector_batches(self, kind: Kind, after: int = -1) -> Iterator[list[tuple[int, bytes]]]:
        cursor = self._each(
            f"SELECT owner_id, vector FROM {kind}_embeddings"
            " WHERE model_id = :model AND change > :after ORDER BY owner_id",
            after=after,
        )
        while rows := cursor.fetchmany(VECTOR_CHUNK):
            yield rows

    def vectors_beyond(self, kind: Kind, owner_id: int) -> tuple[Ids, Vectors]:
        """The next ids (n,) above one and their embeddings (n, d); none at the end.

        Unlike those of `vectors`, batches may be asked for while embeddings are written.
        """
        rows = self._each(
            f"SELECT owner_id, vector FROM {kind}_embeddings"
            " WHERE model_id = :model AND owner_id > :owner ORDER BY owner_id LIMIT :count",
            owner=owner_id,
            count=VECTOR_CHUNK,
        ).fetchall()
        ids = np.array([row[0] for row in rows], dtype=np.int64)
        packed = np.frombuffer(b"".join(row[1] for row in rows), dtype="<f2")
        return ids, packed.reshape(len(rows), -1) if rows else packed.reshape(0, 0)

    def ids_after(self, kind: Kind, change: int) -> Ids:
        """Ids of the embeddings that were written after a change, ascending."""
        rows = self._each(
            f"SELECT owner_id FROM {kind}_embeddings"
            " WHERE model_id = :model AND change > :after ORDER BY owner_id",
            after=change,
        )
        return np.array([owner_id for (owner_id,) in rows], dtype=np.int64)

    def vector_count(self, kind: Kind, *, after: int = -1) -> int:
        """How many embeddings were written after a change."""
        return self._count(
            f"{kind}_embeddings WHERE model_id = :model AND change > :after", after=after
        )

    def removed(self, kind: Kind) -> Ids:
        """Ids whose embeddings are gone but may still be in the FAISS file."""
        rows = self._each(
            "SELECT owner_id FROM tombstones WHERE kind = :kind AND model_id = :model", kind=kind
        )
        return np.array([owner_id for (owner_id,) in rows], dtype=np.int64)

    def index_file(self, kind: Kind) -> IndexFile | None:
        """The FAISS file of this kind, as recorded when it was written."""
        row = self._first(
            "SELECT name, generation, change, rows, size_bytes, checksum FROM index_files"
            " WHERE kind = :kind AND model_id = :model",
            kind=kind,
        )
        return _index_file(*row) if row else None

    def approximate_file(self, kind: Kind) -> ApproximateFile | None:
        """The approximate index of this kind, as recorded when it was built and measured."""
        row = self._first(
            "SELECT facts, name, generation, change, rows, size_bytes, checksum"
            " FROM approximate_files WHERE kind = :kind AND model_id = :model",
            kind=kind,
        )
        if row is None:
            return None
        try:
            facts = json.loads(row[0])
            facts["policy"] = SearchPolicy(**facts["policy"])
            facts["directions"] = {
                source: [Direction(**one) for one in several]
                for source, several in facts["directions"].items()
            }
            return ApproximateFile(file=_index_file(*row[1:]), **facts)
        except (ValueError, TypeError, KeyError, AttributeError):
            return None  # as one that was never built; the next to optimise builds it

    def policy(self) -> SearchPolicy:
        """How this store may search."""
        [(policy,)] = self._each("SELECT policy FROM store_info")
        try:
            return SearchPolicy(**json.loads(policy)) if policy else SearchPolicy()
        except (ValueError, TypeError):
            return SearchPolicy()

    def index_file_names(self) -> set[str]:
        """Names of all FAISS files of any model that are in use."""
        rows = self._each("SELECT name FROM index_files UNION SELECT name FROM approximate_files")
        return {name for (name,) in rows}

    def structure_problems(self) -> list[str]:
        """What SQLite finds wrong with the database file."""
        lines = self._each("PRAGMA integrity_check")
        # What newer versions of SQLite say of FTS5's tables, `words.problems` says as well.
        found = [
            f"SQLite integrity: {line}"
            for (line,) in lines
            if line != "ok" and "FTS5 table" not in line
        ]
        for table, columns in TABLES.items():
            # SQLite takes a value of any type, and a flipped bit can make one of another.
            wrong = " OR ".join(
                f"typeof({column}) NOT IN ('{'text' if kind == 'time' else kind}', 'null')"
                for column, kind in columns.items()
            )
            if count := self._count(f"{table} WHERE {wrong}"):
                found.append(f"{count} rows of {table} hold values of a wrong type")
        return found

    def problems(self) -> list[str]:
        """What is wrong with the database itself and between its tables."""
        found = self.structure_problems()
        for table, row_id, parent, _ in self._each("PRAGMA foreign_key_check"):
            found.append(f"row {row_id} of {table} points to a missing row of {parent}")
        expectations: list[tuple[str, Kind, Status, bool]] = [
            ("without an embedding", "image", "ok", False),
            ("failed, yet with an embedding", "image", "failed", True),
            ("failed, yet with an embedded caption", "caption", "failed", True),
        ]
        for wrong, kind, status, present in expectations:
            found += [
                f"item {item_id} ({file!r}) is {wrong}"
                for item_id, file in self.at_odds(kind, status, present)
            ]
        return found

    def word_problems(self) -> list[str]:
        """What is wrong with the table of words, which can be made again."""
        return words.problems(self._connection)

    def can_mend_words(self) -> bool:
        """Whether that table can be made again in place."""
        return words.can_replace(self._connection)

    def at_odds(self, kind: Kind, status: Status, present: bool) -> list[tuple[int, str]]:
        """Id and file of items with this status that have, or lack, embeddings of any model.

        An item that could be read has one of itself, a failed one has none; a caption may still
        have to be embedded.
        """
        has_one = ("" if present else "NOT ") + self._embedded(kind, by_any=True)
        rows = self._each(
            f"SELECT DISTINCT items.id, items.file FROM {OWNERS[kind]}"
            f" WHERE items.status = :status AND {has_one}",
            status=status,
        )
        return [(item_id, _name(file)) for item_id, file in rows]


def _index_file(
    name: str, generation: int, change: int, rows: int, size_bytes: int, checksum: str
) -> IndexFile:
    return IndexFile(name, generation, change, rows, FileStamp(size_bytes, checksum))


def _by_item(rows: Iterable[tuple[int, str, str]]) -> dict[int, tuple[CaptionRow, ...]]:
    """The captions of each item, from (item id, text, source) in the order of their positions."""
    gathered: dict[int, list[CaptionRow]] = {}
    for item_id, text, source in rows:
        # Of thousands of sources, few differ.
        gathered.setdefault(item_id, []).append(CaptionRow(text, sys.intern(source)))
    return {item_id: tuple(texts) for item_id, texts in gathered.items()}


def _extras(rows: Iterable[tuple[int, str, str | None, float | None]]) -> dict[int, Extras]:
    """The further columns of each item, from (item id, key, text, number), sorted."""
    gathered: dict[int, list[tuple[str, str | float]]] = {}
    for item_id, key, text, number in rows:
        value = number if text is None else sys.intern(text)
        if value is not None:  # else damaged; the next run writes it again
            gathered.setdefault(item_id, []).append((sys.intern(key), value))
    return {item_id: in_order(pairs) for item_id, pairs in gathered.items()}
