"""Catalogue: the SQLite database of a store. The only home of sqlalchemy.

A Snapshot reads one consistent state; a Transaction also writes, all or nothing. Every
transaction that writes has a change number, and every embedding the number of the change that
wrote it: what a FAISS file does not hold yet is what has a higher number than the file.
"""

from __future__ import annotations

import os
import sqlite3
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from indexes.errors import (
    InvalidRowsError,
    StoreDamagedError,
    StoreError,
    StoreLockedError,
    StoreNotFoundError,
    StoreReadOnlyError,
    StoreTooNewError,
    WrongModelError,
)
from indexes.files import may_write, sync
from indexes.migrations import MIGRATIONS, WORDS
from indexes.records import (
    CaptionRow,
    FileStamp,
    IndexFile,
    ItemRow,
    ItemWrite,
    Kind,
    KnownFile,
    ModelSpec,
    RootInfo,
    Status,
)

BUSY_SECONDS = 30
# Ids in one statement: below every database's limit, and few enough to compile quickly.
IN_CHUNK = 500
# No encoder has more dimensions, and a damaged number must not ask for all memory.
MAX_DIM = 1 << 16
# Vectors read at a time while building an index: 4096 x 512-d are 4 MiB.
VECTOR_CHUNK = 4096
# Rows fetched at a time where all of a table are: they take more memory than what is made of them.
ROW_CHUNK = 1000

metadata = sa.MetaData()
_key = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

models = sa.Table(
    "models",
    metadata,
    sa.Column("id", _key, primary_key=True),
    sa.Column("name", sa.Text),
    sa.Column("dim", sa.Integer),
    sa.Column("fingerprint", sa.Text),
)
store_info = sa.Table(
    "store_info",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("model_id", sa.BigInteger),
    sa.Column("generation", sa.BigInteger),
    sa.Column("change", sa.BigInteger),
)
# Paths are the bytes of the file system (os.fsencode), because names need not be valid text.
roots = sa.Table(
    "roots",
    metadata,
    sa.Column("id", _key, primary_key=True),
    sa.Column("path", sa.LargeBinary),
    sa.Column("indexed_at", sa.DateTime),  # UTC
)
items = sa.Table(
    "items",
    metadata,
    sa.Column("id", _key, primary_key=True),
    sa.Column("root_id", sa.BigInteger),
    sa.Column("file", sa.LargeBinary),
    sa.Column("size", sa.BigInteger),
    sa.Column("mtime_ns", sa.BigInteger),
    sa.Column("content_hash", sa.LargeBinary),
    sa.Column("width", sa.Integer),
    sa.Column("height", sa.Integer),
    sa.Column("taken", sa.DateTime),
    sa.Column("status", sa.Text),
    sa.Column("reason", sa.Text),
)
captions = sa.Table(
    "captions",
    metadata,
    sa.Column("id", _key, primary_key=True),
    sa.Column("item_id", sa.BigInteger),
    sa.Column("position", sa.Integer),
    sa.Column("text", sa.Text),
    sa.Column("source", sa.Text),
)


def _embeddings(name: str) -> sa.Table:
    return sa.Table(
        name,
        metadata,
        sa.Column("owner_id", sa.BigInteger, primary_key=True),
        sa.Column("model_id", sa.BigInteger, primary_key=True),
        sa.Column("change", sa.BigInteger),
        sa.Column("vector", sa.LargeBinary),  # little-endian float16
    )


embeddings: dict[Kind, sa.Table] = {
    "image": _embeddings("image_embeddings"),
    "caption": _embeddings("caption_embeddings"),
}
# Embeddings that are gone but may still be in a FAISS file.
tombstones = sa.Table(
    "tombstones",
    metadata,
    sa.Column("kind", sa.Text, primary_key=True),
    sa.Column("model_id", sa.BigInteger, primary_key=True),
    sa.Column("owner_id", sa.BigInteger, primary_key=True),
    sa.Column("change", sa.BigInteger),
)
index_files = sa.Table(
    "index_files",
    metadata,
    sa.Column("kind", sa.Text, primary_key=True),
    sa.Column("model_id", sa.BigInteger, primary_key=True),
    sa.Column("name", sa.Text),
    sa.Column("generation", sa.BigInteger),
    sa.Column("change", sa.BigInteger),
    sa.Column("rows", sa.BigInteger),
    sa.Column("size_bytes", sa.BigInteger),
    sa.Column("checksum", sa.Text),
)
schema_migrations = sa.Table(
    "schema_migrations",
    metadata,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("applied_at", sa.Text, nullable=False),
)

Ids = NDArray[np.int64]
Vectors = NDArray[np.float16]


class _Immutable(sqlite3.Connection):
    """To a file that is believed not to change while it is read."""


class Catalogue:
    """A database of items, captions and embeddings, and of what was derived from them."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Open the SQLite file at `path`, made if it is absent and may be written."""
        self.path = path
        self.read_only = read_only
        self.model_id = 0  # set by `add_model` or `use_model`
        self._identity: tuple[int, int] | None = None
        self._stamp = (0, 0)
        if read_only:
            # A new connection for each snapshot: see _connect_read_only.
            self._engine = sa.create_engine(
                "sqlite://", creator=self._connect_read_only, poolclass=sa.NullPool
            )
        else:
            self._engine = sa.create_engine(
                sa.URL.create("sqlite", database=path.absolute().as_uri(), query={"uri": "true"}),
                connect_args={"timeout": BUSY_SECONDS},
            )
        sa.event.listen(self._engine, "connect", self._on_connect)
        sa.event.listen(self._engine, "begin", _on_begin)

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    @contextmanager
    def read(self) -> Iterator[Snapshot]:
        """One consistent state, whatever others write meanwhile."""
        self._follow()
        before, is_immutable = self._stamp, False
        try:
            with _translated(self.path), self._engine.connect() as connection, connection.begin():
                driver = connection.connection.driver_connection
                is_immutable = isinstance(driver, _Immutable)
                yield Snapshot(connection, self.model_id, self.path)
        finally:
            self._follow()
            if is_immutable and self._stamp != before:  # nothing kept its pages as they were
                raise StoreLockedError(
                    f"{self.path} was written while it was read; try again when that is done"
                )

    @contextmanager
    def write(self) -> Iterator[Transaction]:
        """A transaction, committed when the block ends well and undone when it raises."""
        self._follow()
        with _translated(self.path), self._engine.connect() as connection:
            connection = connection.execution_options(writes=True)
            with connection.begin():
                yield Transaction(connection, self.model_id, self.path)

    def _follow(self) -> None:
        """Let go of connections to a database that `repair` has put another one in place of."""
        with suppress(OSError):
            status = self.path.stat()
            before, self._identity = self._identity, (status.st_dev, status.st_ino)
            self._stamp = (status.st_mtime_ns, status.st_size)
            if before not in (None, self._identity):
                self._engine.dispose()

    def pending_migrations(self, *, create: bool = False) -> int:
        """How many migrations this database lacks; an empty one is ours only with `create`.

        Raises StoreNotFoundError if its making was cut off, StoreDamagedError, and
        StoreTooNewError if the schema is ahead of us.
        """
        with _translated(self.path), self._engine.connect() as connection:
            applied = _applied_migrations(connection)
            is_blank = not applied and not sa.inspect(connection).get_table_names()
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

    def migrate(self) -> None:
        """Bring the schema up to date; the caller holds the store's lock.

        A database with rows is copied first, to `catalogue.schema-N.sqlite` beside it.
        """
        with _translated(self.path), self._engine.connect() as connection:
            applied = _applied_migrations(connection)
        if applied == len(MIGRATIONS):
            return
        if applied:
            self.copy(self.path.with_name(f"{self.path.stem}.schema-{applied}.sqlite"))
        with _translated(self.path), self._engine.connect() as connection:
            connection = connection.execution_options(writes=True)
            with connection.begin():
                metadata.create_all(connection, tables=[schema_migrations])
                words = WORDS[self._engine.dialect.name]
                for number in range(applied, len(MIGRATIONS)):
                    migration = MIGRATIONS[number]
                    for statement in migration(words):
                        connection.exec_driver_sql(statement)
                    connection.execute(
                        schema_migrations.insert().values(
                            number=number + 1,
                            name=migration.__name__,
                            applied_at=datetime.now(UTC).isoformat(timespec="seconds"),
                        )
                    )

    def copy(self, destination: Path) -> None:
        """A consistent copy of the database, whole or absent, whatever others write meanwhile.

        Raises StoreReadOnlyError.
        """
        beside = destination.with_name(destination.name + ".tmp")
        beside.unlink(missing_ok=True)
        try:
            with self._plainly() as connection:
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

    def vacuum(self) -> None:
        """Give the space of what was deleted back to the file system.

        For a while that needs the room of what is left twice more. Raises StoreReadOnlyError.
        """
        with self._plainly() as connection:
            connection.execute("VACUUM")
            # While others read, the log stays as long as it is; a later checkpoint cuts it.
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    @contextmanager
    def _plainly(self) -> Iterator[Any]:
        """A connection outside any transaction, for what SQLite does only there."""
        with _translated(self.path):
            connection = self._engine.raw_connection()
            try:
                yield connection.driver_connection
            finally:
                connection.close()

    def add_model(self, model: ModelSpec) -> None:
        """Take a model up and work with it; the first one of a catalogue becomes its default."""
        with self.write() as rows:
            self.model_id = rows.add_model(model)

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

    def _on_connect(self, connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # BEGIN is ours: see _on_begin
        connection.execute("PRAGMA foreign_keys = ON")
        tables = connection.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table'"
        ).fetchall()
        is_ours = not tables or (schema_migrations.name,) in tables
        if not self.read_only and is_ours:  # the mode is written into the file
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")  # a commit survives a power cut


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
_DAMAGE = (
    sa.exc.SQLAlchemyError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    OverflowError,
)


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Database errors as ours, each with what happened and the way out."""
    try:
        yield
    except sa.exc.IntegrityError as error:
        raise InvalidRowsError(f"nothing was written: {error.orig}") from error
    except (sa.exc.DatabaseError, sqlite3.DatabaseError) as error:
        raise _our_error(path, getattr(error, "orig", error)) from error
    except StoreError:
        raise
    except _DAMAGE as error:
        raise _our_error(path, f"{type(error).__name__}: {error}") from error


def _our_error(path: Path, error: Any) -> StoreError:
    words = str(error)
    code = getattr(error, "sqlite_errorname", "")
    if code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return StoreLockedError(f"{path} is in use by another process; try again when it is done")
    if code.startswith("SQLITE_FULL"):
        return StoreReadOnlyError(
            f"{path} could not be written: the disk is full; what was there before is kept, "
            "and the same command goes on once there is room"
        )
    if code.startswith("SQLITE_READONLY"):
        return StoreReadOnlyError(
            f"{path} could not be written ({words}); what was there before is kept"
        )
    if code.startswith("SQLITE_IOERR") and code != "SQLITE_IOERR_SHORT_READ":
        return StoreReadOnlyError(
            f"{path} could not be read or written ({words}): is the disk full, over a quota or "
            "failing? What was committed before is kept"
        )
    if code.startswith("SQLITE_CANTOPEN"):
        return StoreReadOnlyError(
            f"{path} cannot be opened ({words}); check its permissions and, if "
            f"{path.name}-wal lies beside it, open it once where it may be written"
        )
    return StoreDamagedError(f"{path} cannot be read as a catalogue ({words}); {_WAY_OUT}")


def _item_values(root_id: int, item: ItemWrite) -> dict[str, Any]:
    return {
        "root_id": root_id,
        "file": os.fsencode(item.file),
        "size": item.size,
        "mtime_ns": item.mtime_ns,
        "content_hash": item.content_hash,
        "width": item.width,
        "height": item.height,
        "taken": item.taken.replace(tzinfo=None) if item.taken is not None else None,
        "status": "ok" if item.failure is None else "failed",
        # A reason may quote a file name that is not valid text.
        "reason": item.failure and item.failure.encode("utf-8", "backslashreplace").decode(),
    }


def _stored_type(column: sa.Column[Any]) -> str:
    """What SQLite calls the type of a column's values."""
    if isinstance(column.type, sa.Integer):
        return "integer"
    return "blob" if isinstance(column.type, sa.LargeBinary) else "text"


def _spec(row: Any) -> ModelSpec:
    if (
        not isinstance(row.name, str)
        or not isinstance(row.fingerprint, str)
        or not isinstance(row.dim, int)
        or not 0 < row.dim <= MAX_DIM
    ):
        raise ValueError(f"model {row.id} has {row.dim!r} dimensions, or no name or fingerprint")
    return ModelSpec(row.name, row.dim, row.fingerprint)


def _on_begin(connection: sa.Connection) -> None:
    # IMMEDIATE takes the write lock at once. A transaction that began by reading could not get
    # it later if another one had written in between.
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _applied_migrations(connection: sa.Connection) -> int:
    if not sa.inspect(connection).has_table(schema_migrations.name):
        return 0
    return int(connection.execute(sa.select(sa.func.max(schema_migrations.c.number))).scalar() or 0)


def _chunks(values: Iterable[Any]) -> Iterator[list[Any]]:
    """The values, each once, as many at a time as go into one statement."""
    distinct = list(dict.fromkeys(values))
    for start in range(0, len(distinct), IN_CHUNK):
        yield distinct[start : start + IN_CHUNK]


class Snapshot:
    """Reads one consistent state of a catalogue."""

    def __init__(self, connection: sa.Connection, model_id: int, path: Path) -> None:
        self._connection = connection
        self._path = path
        self.model_id = model_id

    def _all(self, statement: sa.Select[Any]) -> Sequence[Any]:
        return self._connection.execute(statement).all()

    def _each(self, statement: sa.Select[Any]) -> Iterator[Any]:
        options = {"yield_per": ROW_CHUNK}
        yield from self._connection.execute(statement, execution_options=options)

    def _chunked(
        self, statement: sa.Select[Any], column: sa.ColumnElement[Any], values: Iterable[Any]
    ) -> Iterator[Any]:
        for chunk in _chunks(values):
            yield from self._all(statement.where(column.in_(chunk)))

    def version(self) -> tuple[int, int]:
        """(generation, change): equal pairs mean equal contents."""
        row = self._connection.execute(
            sa.select(store_info.c.generation, store_info.c.change)
        ).one()
        return row.generation, row.change

    def of_model(self, model_id: int) -> Self:
        """The same state as seen by another model."""
        return type(self)(self._connection, model_id, self._path)

    def model(self, fingerprint: str | None = None) -> tuple[int, ModelSpec] | None:
        """Id and description of the model of this fingerprint, or of the default."""
        statement = sa.select(models)
        if fingerprint is None:
            statement = statement.join(store_info, store_info.c.model_id == models.c.id)
        else:
            statement = statement.where(models.c.fingerprint == fingerprint)
        row = self._connection.execute(statement).first()
        return (row.id, _spec(row)) if row else None

    def check_model(self) -> None:
        """Raise WrongModelError if another process has dropped this model meanwhile."""
        found = sa.select(models.c.id).where(models.c.id == self.model_id)
        if self._connection.execute(found).first() is None:
            raise WrongModelError(
                f"{self._path.parent} no longer has the model that it was opened with"
            )

    def models(self) -> dict[int, ModelSpec]:
        """All models by id, the default first, then as they were added."""
        default = self._connection.execute(sa.select(store_info.c.model_id)).scalar()
        rows = self._all(sa.select(models).order_by(models.c.id != default, models.c.id))
        return {row.id: _spec(row) for row in rows}

    def pending(self) -> set[int]:
        """Items that can be read and that this model has not embedded, or not all captions of."""
        return self._pending("image") | self._pending("caption")

    def _pending(self, kind: Kind) -> set[int]:
        """Items that can be read and that this model has not embedded, or a caption of which."""
        owners = sa.select(sa.func.count()).select_from(items)
        statement = sa.select(items.c.id)
        if kind == "caption":
            owners = owners.join(captions, captions.c.item_id == items.c.id)
            statement = statement.join(captions, captions.c.item_id == items.c.id).distinct()
        is_ok = items.c.status == "ok"
        # Most often there are none, and to count is quicker than to look at each.
        if self._connection.execute(owners.where(is_ok)).scalar_one() == self.vector_count(kind):
            return set()
        return {row.id for row in self._all(statement.where(is_ok, ~self._embedded(kind)))}

    def _embedded(self, kind: Kind, *, by_any: bool = False) -> sa.ColumnElement[bool]:
        """Whether this model, or any, has embedded the item or caption of the outer query."""
        table, owner = embeddings[kind], (items if kind == "image" else captions).c.id
        statement = sa.select(1).where(table.c.owner_id == owner)
        if not by_any:
            statement = statement.where(table.c.model_id == self.model_id)
        return statement.exists()

    def roots(self) -> list[tuple[int, Path]]:
        """Ids and absolute paths of the roots, in the order they were added."""
        rows = self._all(sa.select(roots).order_by(roots.c.id))
        return [(row.id, Path(os.fsdecode(row.path))) for row in rows]

    def root_infos(self) -> list[RootInfo]:
        """The roots and what is known of each, in the order they were added."""
        failed = sa.func.sum(sa.case((items.c.status == "failed", 1), else_=0))
        statement = (
            sa.select(roots, sa.func.count(items.c.id).label("count"), failed.label("failed"))
            .outerjoin(items, items.c.root_id == roots.c.id)
            .group_by(roots.c.id)
            .order_by(roots.c.id)
        )
        return [
            RootInfo(
                row.id,
                Path(os.fsdecode(row.path)),
                row.count,
                row.failed,
                row.indexed_at.replace(tzinfo=UTC) if row.indexed_at else None,
            )
            for row in self._all(statement)
        ]

    def item_ids(self, root_id: int | None = None) -> list[int]:
        """Ids of all items, or of those under a root, ascending."""
        statement = sa.select(items.c.id).order_by(items.c.id)
        if root_id is not None:
            statement = statement.where(items.c.root_id == root_id)
        return [row.id for row in self._all(statement)]

    def known_files(self, root_id: int) -> dict[str, KnownFile]:
        """Everything known under a root, by file."""
        pending_pictures, pending_captions = self._pending("image"), self._pending("caption")
        texts = self._captions_by_item(
            sa.select(captions)
            .join(items, items.c.id == captions.c.item_id)
            .where(items.c.root_id == root_id)
        )
        columns = (
            items.c.id,
            items.c.file,
            items.c.size,
            items.c.mtime_ns,
            items.c.content_hash,
            items.c.status,
        )
        known = {}
        for item_id, name, size, mtime_ns, content_hash, status in self._each(
            sa.select(*columns).where(items.c.root_id == root_id).order_by(items.c.file)
        ):
            file = os.fsdecode(name)
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
            )
        return known

    def find_by_hash(self, hashes: Collection[bytes]) -> dict[bytes, int]:
        """The oldest item with an image embedding for each content hash that there is."""
        images = embeddings["image"]
        statement = (
            sa.select(items.c.content_hash, sa.func.min(items.c.id))
            .join(images, images.c.owner_id == items.c.id)
            .where(images.c.model_id == self.model_id)
            .group_by(items.c.content_hash)
        )
        return {row[0]: row[1] for row in self._chunked(statement, items.c.content_hash, hashes)}

    def items(self, ids: Collection[int]) -> dict[int, ItemRow]:
        """Those items that exist, by id."""
        return self._item_rows(items.c.id, ids)

    def failures(self) -> list[ItemRow]:
        """Items that failed, in the order of their ids."""
        statement = sa.select(items.c.id).where(items.c.status == "failed").order_by(items.c.id)
        found = self._item_rows(items.c.id, [row.id for row in self._all(statement)])
        return [found[item_id] for item_id in sorted(found)]

    def item_at(self, root_id: int, file: str) -> int | None:
        """Id of the item at this place."""
        statement = sa.select(items.c.id).where(
            items.c.root_id == root_id, items.c.file == os.fsencode(file)
        )
        item_id: int | None = self._connection.execute(statement).scalar()
        return item_id

    def _item_rows(
        self, column: sa.ColumnElement[Any], values: Iterable[Any]
    ) -> dict[int, ItemRow]:
        statement = sa.select(items, roots.c.path).join(roots, roots.c.id == items.c.root_id)
        rows = list(self._chunked(statement, column, values))
        texts: dict[int, tuple[CaptionRow, ...]] = {}
        ids = [row.id for row in rows]
        for chunk in _chunks(ids):
            texts |= self._captions_by_item(
                sa.select(captions).where(captions.c.item_id.in_(chunk))
            )
        found = {}
        for row in rows:
            root, file = Path(os.fsdecode(row.path)), os.fsdecode(row.file)
            found[row.id] = ItemRow(
                item_id=row.id,
                path=root / file,
                root=root,
                file=file,
                size=row.size,
                mtime_ns=row.mtime_ns,
                content_hash=row.content_hash,
                width=row.width,
                height=row.height,
                taken=row.taken,
                status=row.status,
                reason=row.reason,
                captions=texts.get(row.id, ()),
            )
        return found

    def _captions_by_item(self, statement: sa.Select[Any]) -> dict[int, tuple[CaptionRow, ...]]:
        gathered: dict[int, list[CaptionRow]] = {}
        for row in self._each(statement.order_by(captions.c.item_id, captions.c.position)):
            caption = CaptionRow(row.text, sys.intern(row.source))  # of thousands, few differ
            gathered.setdefault(row.item_id, []).append(caption)
        return {item_id: tuple(texts) for item_id, texts in gathered.items()}

    def captions(self, caption_ids: Collection[int]) -> dict[int, tuple[int, CaptionRow]]:
        """(item id, caption) of those captions that exist, by caption id."""
        return {
            row.id: (row.item_id, CaptionRow(row.text, row.source))
            for row in self._chunked(sa.select(captions), captions.c.id, caption_ids)
        }

    def caption_ids(self, item_ids: Collection[int]) -> list[int]:
        """Ids of the captions of these items, in the order of their positions."""
        statement = sa.select(captions.c.id, captions.c.item_id, captions.c.position)
        rows = self._chunked(statement, captions.c.item_id, item_ids)
        return [row.id for row in sorted(rows, key=lambda row: (row.item_id, row.position))]

    def counts(self) -> dict[str, int]:
        """Numbers of items (failed ones included), captions and failures."""

        def count(statement: sa.Select[Any]) -> int:
            return int(self._connection.execute(statement).scalar_one())

        return {
            "items": count(sa.select(sa.func.count()).select_from(items)),
            "captions": count(sa.select(sa.func.count()).select_from(captions)),
            "failures": count(
                sa.select(sa.func.count()).select_from(items).where(items.c.status == "failed")
            ),
        }

    def embeddings(self, kind: Kind, ids: Collection[int]) -> dict[int, Vectors]:
        """(d,) float16 embeddings of those ids that have one."""
        table = embeddings[kind]
        statement = sa.select(table.c.owner_id, table.c.vector).where(
            table.c.model_id == self.model_id
        )
        return {
            row.owner_id: np.frombuffer(row.vector, dtype="<f2")
            for row in self._chunked(statement, table.c.owner_id, ids)
        }

    def vectors(self, kind: Kind, *, after: int = -1) -> Iterator[tuple[Ids, Vectors]]:
        """Batches of ids (n,) and embeddings (n, d) written after a change, ids ascending.

        Raises StoreDamagedError if their lengths differ.
        """
        table = embeddings[kind]
        statement = (
            sa.select(table.c.owner_id, table.c.vector)
            .where(table.c.model_id == self.model_id, table.c.change > after)
            .order_by(table.c.owner_id)
            .execution_options(yield_per=VECTOR_CHUNK)
        )
        for rows in self._connection.execute(statement).partitions():
            ids = np.fromiter((row[0] for row in rows), dtype=np.int64, count=len(rows))
            packed = np.frombuffer(b"".join(row[1] for row in rows), dtype="<f2")
            try:
                yield ids, packed.reshape(len(rows), -1)
            except ValueError as error:
                raise StoreDamagedError(
                    f"{self._path}: embeddings of {kind}s differ in length; {_WAY_OUT}"
                ) from error

    def vector_count(self, kind: Kind, *, after: int = -1) -> int:
        """How many embeddings were written after a change."""
        table = embeddings[kind]
        statement = sa.select(sa.func.count()).where(
            table.c.model_id == self.model_id, table.c.change > after
        )
        return int(self._connection.execute(statement).scalar_one())

    def removed(self, kind: Kind) -> Ids:
        """Ids whose embeddings are gone but may still be in the FAISS file."""
        statement = sa.select(tombstones.c.owner_id).where(
            tombstones.c.kind == kind, tombstones.c.model_id == self.model_id
        )
        return np.array([row.owner_id for row in self._all(statement)], dtype=np.int64)

    def index_file(self, kind: Kind) -> IndexFile | None:
        """The FAISS file of this kind, as recorded when it was written."""
        row = self._connection.execute(
            sa.select(index_files).where(
                index_files.c.kind == kind, index_files.c.model_id == self.model_id
            )
        ).first()
        if row is None:
            return None
        stamp = FileStamp(row.size_bytes, row.checksum)
        return IndexFile(row.name, row.generation, row.change, row.rows, stamp)

    def index_file_names(self) -> set[str]:
        """Names of all FAISS files of any model that are in use."""
        return {row.name for row in self._all(sa.select(index_files.c.name))}

    def structure_problems(self) -> list[str]:
        """What SQLite finds wrong with the database file."""
        lines = self._connection.exec_driver_sql("PRAGMA integrity_check")
        found = [f"SQLite integrity: {line}" for (line,) in lines if line != "ok"]
        for table in metadata.sorted_tables:
            # SQLite takes a value of any type, and a flipped bit can make one of another.
            wrong = [
                sa.func.typeof(column).not_in([_stored_type(column), "null"])
                for column in table.columns
            ]
            statement = sa.select(sa.func.count()).select_from(table).where(sa.or_(*wrong))
            if count := self._connection.execute(statement).scalar_one():
                found.append(f"{count} rows of {table.name} hold values of a wrong type")
        return found

    def problems(self) -> list[str]:
        """What is wrong with the database itself and between its tables."""
        found = self.structure_problems()
        for table, row_id, parent, _ in self._connection.exec_driver_sql(
            "PRAGMA foreign_key_check"
        ):
            found.append(f"row {row_id} of {table} points to a missing row of {parent}")
        expectations: list[tuple[str, Kind, Status, bool]] = [
            ("without an embedding", "image", "ok", False),
            ("failed, yet with an embedding", "image", "failed", True),
            ("failed, yet with an embedded caption", "caption", "failed", True),
        ]
        for words, kind, status, present in expectations:
            found += [
                f"item {item_id} ({file!r}) is {words}"
                for item_id, file in self.at_odds(kind, status, present)
            ]
        return found

    def at_odds(self, kind: Kind, status: Status, present: bool) -> list[tuple[int, str]]:
        """Id and file of items with this status that have, or lack, embeddings of any model.

        An item that could be read has one of itself, a failed one has none; a caption may still
        have to be embedded.
        """
        has_one = self._embedded(kind, by_any=True)
        statement = sa.select(items.c.id, items.c.file).where(items.c.status == status)
        if kind == "caption":
            statement = statement.join(captions, captions.c.item_id == items.c.id).distinct()
        rows = self._all(statement.where(has_one if present else ~has_one))
        return [(row.id, os.fsdecode(row.file)) for row in rows]


class Transaction(Snapshot):
    """Changes a catalogue; what one transaction writes carries one change number."""

    def __init__(self, connection: sa.Connection, model_id: int, path: Path) -> None:
        super().__init__(connection, model_id, path)
        self._change: int | None = None

    @property
    def change(self) -> int:
        """This transaction's number, drawn when it first writes."""
        if self._change is None:
            self._connection.execute(store_info.update().values(change=store_info.c.change + 1))
            self._change = self.version()[1]
        return self._change

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """What is written inside is undone if the block raises, and nothing else."""
        with _translated(self._path):
            nested = self._connection.begin_nested()
            try:
                yield
            except BaseException:
                # On a full disk SQLite undoes the whole transaction, and there is no savepoint.
                with suppress(sa.exc.OperationalError):
                    nested.rollback()
                raise
            nested.commit()

    def add_model(self, model: ModelSpec) -> int:
        """Id of the model, made if absent; the first one becomes the default."""
        if found := self.model(model.fingerprint):
            return found[0]
        model_id = self._insert(
            models, name=model.name, dim=model.dim, fingerprint=model.fingerprint
        )
        if self._connection.execute(sa.select(store_info.c.id)).first() is None:
            self._insert(store_info, id=1, model_id=model_id, generation=0, change=0)
        return model_id

    def set_default_model(self, model_id: int) -> None:
        """Open the store with this model from now on."""
        self._connection.execute(store_info.update().values(model_id=model_id))

    def drop_model(self, model_id: int) -> None:
        """Forget a model that is not the default, with all that it embedded."""
        _ = self.change  # drawn, so that those who have the store open look again
        # What only this model has seen would be left with no embedding at all: such items are
        # read again by the next run, as those are whose bytes could not be read.
        for table in (*embeddings.values(), tombstones, index_files):
            self._connection.execute(table.delete().where(table.c.model_id == model_id))
        self._connection.execute(models.delete().where(models.c.id == model_id))
        self.forget_contents(
            [item_id for item_id, _ in self.at_odds("image", "ok", False)],
            "was embedded only by a model that was dropped; index its folder again",
        )

    def forget_contents(self, ids: Collection[int], reason: str) -> None:
        """Items as failed, with no hash, so that the next run over them reads them again."""
        self._drop_embeddings("image", ids)
        self._drop_embeddings("caption", self.caption_ids(ids))
        for chunk in _chunks(ids):
            self._connection.execute(
                items.update()
                .where(items.c.id.in_(chunk))
                .values(status="failed", reason=reason, content_hash=None)
            )

    def remove_orphans(self) -> int:
        """Delete rows that point to rows that are gone; how many."""
        count = 0
        while True:
            found = self._connection.exec_driver_sql("PRAGMA foreign_key_check").all()
            for table, row_id, _, _ in found:
                self._connection.execute(
                    sa.delete(metadata.tables[table]).where(sa.text("rowid = :id")), {"id": row_id}
                )
            if not found:
                return count
            count += len(found)

    def misfits(self, kind: Kind, dim: int, is_unit: Callable[[Vectors], Any]) -> set[int]:
        """Ids of embeddings that are not of `dim` dimensions or not unit rows."""
        table = embeddings[kind]
        found: set[int] = set()
        statement = (
            sa.select(table.c.owner_id, table.c.vector)
            .where(table.c.model_id == self.model_id)
            .execution_options(yield_per=VECTOR_CHUNK)
        )
        for rows in self._connection.execute(statement).partitions():
            whole = [row for row in rows if len(row.vector) == 2 * dim]
            packed = np.frombuffer(b"".join(row.vector for row in whole), dtype="<f2")
            fits = {
                row.owner_id
                for row, fine in zip(whole, is_unit(packed.reshape(-1, dim)), strict=True)
                if fine
            }
            found |= {row.owner_id for row in rows} - fits
        return found

    def lacking(self, kind: Kind) -> list[int]:
        """Items that could be read, or captions of such, that this model has no embedding of."""
        owner = (items if kind == "image" else captions).c.id
        statement = sa.select(owner).where(items.c.status == "ok", ~self._embedded(kind))
        if kind == "caption":
            statement = statement.join(items, items.c.id == captions.c.item_id)
        return [row.id for row in self._all(statement)]

    def replace_embeddings(
        self, kind: Kind, gone: Collection[int], rows: Sequence[tuple[int, Vectors]]
    ) -> None:
        """Delete embeddings of this model, by id, and put others."""
        table = embeddings[kind]
        self._delete(table, table.c.owner_id, gone, table.c.model_id == self.model_id)
        self._put_embeddings(kind, rows)

    def embed(self, kind: Kind, rows: Sequence[tuple[int, Vectors]]) -> None:
        """Set this model's embeddings of items or captions that have none of its."""
        have = self.embeddings(kind, [owner_id for owner_id, _ in rows])
        self._put_embeddings(kind, [row for row in rows if row[0] not in have])

    def add_root(self, path: Path) -> int:
        """Id of the root, made if absent."""
        name = os.fsencode(path)
        found = self._connection.execute(sa.select(roots.c.id).where(roots.c.path == name)).scalar()
        return int(found) if found is not None else self._insert(roots, path=name)

    def remove_root(self, root_id: int) -> int:
        """Forget a root with its items; how many these were."""
        ids = self.item_ids(root_id)
        self.remove(ids)
        self._connection.execute(roots.delete().where(roots.c.id == root_id))
        return len(ids)

    def update_root(self, root_id: int, **values: Any) -> None:
        """Set a root's path or the time of its last full run."""
        if "path" in values:
            values["path"] = os.fsencode(values["path"])
        self._connection.execute(roots.update().where(roots.c.id == root_id).values(**values))

    def write_items(self, root_id: int, batch: Sequence[ItemWrite]) -> list[int]:
        """Ids of these items, in order, which are now as the batch says."""
        # Looked up before anything is written: an item that changes would otherwise be found
        # under its new hash with its old embedding.
        vectors = self._image_vectors(batch)
        known = {
            row.file: row.id
            for row in self._chunked(
                sa.select(items.c.id, items.c.file).where(items.c.root_id == root_id),
                items.c.file,
                [os.fsencode(item.file) for item in batch if item.item_id is None],
            )
        }
        ids = [
            known.get(os.fsencode(item.file)) if item.item_id is None else item.item_id
            for item in batch
        ]
        changed = [item_id for item_id in ids if item_id is not None]
        self._drop_embeddings("image", changed)
        self._drop_captions(changed)
        added = []
        for item_id, item in zip(ids, batch, strict=True):
            values = _item_values(root_id, item)
            if item_id is None:
                added.append(values)
            else:
                self._update_item(item_id, values)
        fresh = iter(self._insert_many(items, added))
        whole = [item_id if item_id is not None else next(fresh) for item_id in ids]
        images = [(item_id, v) for item_id, v in zip(whole, vectors, strict=True) if v is not None]
        self._put_embeddings("image", images)
        self._put_captions(
            (item_id, item.captions, item.caption_embeddings)
            for item_id, item in zip(whole, batch, strict=True)
        )
        return whole

    def _image_vectors(self, batch: Sequence[ItemWrite]) -> list[Vectors | None]:
        """The embedding of each item: its own, or that of the same content; None if it failed."""
        given = {
            item.content_hash: item.image_embedding.astype("<f2")
            for item in batch
            if item.image_embedding is not None and item.content_hash is not None
        }
        wanted = {
            item.content_hash
            for item in batch
            if item.failure is None and item.image_embedding is None
            if item.content_hash is not None and item.content_hash not in given
        }
        sources = self.find_by_hash(wanted)
        stored = self.embeddings("image", sources.values())
        given |= {content: stored[item_id] for content, item_id in sources.items()}
        vectors: list[Vectors | None] = []
        for item in batch:
            if item.failure is not None:
                vectors.append(None)
            elif item.image_embedding is not None:
                vectors.append(item.image_embedding.astype("<f2"))
            elif item.content_hash in given:
                vectors.append(given[item.content_hash])
            else:
                raise InvalidRowsError(
                    f"{item.file!r} came without an embedding, and no item has the same content"
                )
        return vectors

    def set_captions(
        self,
        item_id: int,
        rows: Sequence[CaptionRow],
        vectors: NDArray[np.float32] | None,
    ) -> None:
        """Replace an item's captions.

        Those that stay, from the first on, keep their ids and the embeddings of every model.
        """
        old = self.caption_ids([item_id])
        texts = self.captions(old)
        kept = [
            caption_id
            for caption_id, one in zip(old, rows, strict=False)
            if texts[caption_id][1] == one
        ]
        if kept != old[: len(kept)]:
            kept = []
        have = self.embeddings("caption", kept)
        gone = old[len(kept) :]
        self._drop_embeddings("caption", gone)
        self._delete(captions, captions.c.id, gone)
        if vectors is not None:
            given = list(vectors.astype("<f2"))
            self._put_embeddings(
                "caption",
                [(one, v) for one, v in zip(kept, given, strict=False) if one not in have],
            )
            self._put_captions([(item_id, rows[len(kept) :], vectors[len(kept) :])], len(kept))

    def update_place(self, item_id: int, **values: Any) -> None:
        """Set where an item is (root_id, file) or its size and time stamp."""
        if "file" in values:
            values["file"] = os.fsencode(values["file"])
        self._update_item(item_id, values)

    def remove(self, ids: Collection[int]) -> None:
        """Remove items with their captions and embeddings."""
        self._drop_embeddings("image", ids)
        self._drop_captions(ids)
        self._delete(items, items.c.id, ids)

    def record_index(self, model_id: int, kind: Kind, file: IndexFile | None) -> None:
        """Make `file` the one to use (None: there are no vectors), in this generation."""
        for table in (index_files, tombstones):
            # The file was made of what is here now, so nothing in it waits to be struck out.
            self._connection.execute(
                table.delete().where(table.c.kind == kind, table.c.model_id == model_id)
            )
        if file is not None:
            self._connection.execute(
                index_files.insert().values(
                    kind=kind,
                    model_id=model_id,
                    name=file.name,
                    generation=file.generation,
                    change=file.change,
                    rows=file.rows,
                    size_bytes=file.stamp.size_bytes,
                    checksum=file.stamp.checksum,
                )
            )

    def next_generation(self) -> int:
        """A new generation's number."""
        self._connection.execute(store_info.update().values(generation=store_info.c.generation + 1))
        return self.version()[0]

    def _insert(self, table: sa.Table, **values: Any) -> int:
        key = self._connection.execute(table.insert().values(**values)).inserted_primary_key
        assert key is not None
        return int(key[0])

    def _update_item(self, item_id: int, values: dict[str, Any]) -> None:
        result = self._connection.execute(
            items.update().where(items.c.id == item_id).values(**values)
        )
        if not result.rowcount:
            raise InvalidRowsError(f"there is no item {item_id}")

    def _insert_many(self, table: sa.Table, rows: Sequence[dict[str, Any]]) -> list[int]:
        if not rows:
            return []
        statement = table.insert().returning(table.c.id, sort_by_parameter_order=True)
        return [row.id for row in self._connection.execute(statement, rows)]

    def _put_embeddings(self, kind: Kind, rows: Sequence[tuple[int, Vectors]]) -> None:
        if rows:
            self._connection.execute(
                embeddings[kind].insert(),
                [
                    {
                        "owner_id": owner_id,
                        "model_id": self.model_id,
                        "change": self.change,
                        "vector": vector.tobytes(),
                    }
                    for owner_id, vector in rows
                ],
            )

    def _put_captions(
        self,
        rows: Iterable[tuple[int, Sequence[CaptionRow], NDArray[np.float32] | None]],
        start: int = 0,
    ) -> None:
        texts: list[dict[str, Any]] = []
        vectors: list[Vectors | None] = []
        for item_id, several, matrix in rows:
            texts += [
                {"item_id": item_id, "position": position, "text": row.text, "source": row.source}
                for position, row in enumerate(several, start)
            ]
            vectors += [None] * len(several) if matrix is None else list(matrix.astype("<f2"))
        ids = self._insert_many(captions, texts)
        embedded = [(row_id, v) for row_id, v in zip(ids, vectors, strict=True) if v is not None]
        self._put_embeddings("caption", embedded)

    def _drop_captions(self, item_ids: Collection[int]) -> None:
        old = self.caption_ids(item_ids)
        self._drop_embeddings("caption", old)
        self._delete(captions, captions.c.id, old)

    def _drop_embeddings(self, kind: Kind, ids: Collection[int]) -> None:
        """Delete the embeddings that these ids have, of every model, each with a tombstone."""
        table = embeddings[kind]
        found = list(
            self._chunked(sa.select(table.c.owner_id, table.c.model_id), table.c.owner_id, ids)
        )
        if not found:
            return
        # An id may have been struck out before, if its item failed, recovered and failed again.
        for model_id in {row.model_id for row in found}:
            self._delete(
                tombstones,
                tombstones.c.owner_id,
                [row.owner_id for row in found if row.model_id == model_id],
                tombstones.c.kind == kind,
                tombstones.c.model_id == model_id,
            )
        self._connection.execute(
            tombstones.insert(),
            [
                {
                    "kind": kind,
                    "model_id": row.model_id,
                    "owner_id": row.owner_id,
                    "change": self.change,
                }
                for row in found
            ],
        )
        self._delete(table, table.c.owner_id, [row.owner_id for row in found])

    def _delete(
        self,
        table: sa.Table,
        column: sa.ColumnElement[Any],
        values: Collection[int],
        *conditions: sa.ColumnElement[bool],
    ) -> None:
        for chunk in _chunks(values):
            self._connection.execute(table.delete().where(column.in_(chunk), *conditions))
