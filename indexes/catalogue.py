"""Catalogue: the SQLite database of a store. The only home of sqlalchemy.

A Snapshot reads one consistent state; a Transaction also writes, all or nothing. Every
transaction that writes has a change number, and every embedding the number of the change that
wrote it: what a FAISS file does not hold yet is what has a higher number than the file.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from indexes.errors import (
    InvalidRowsError,
    StoreDamagedError,
    StoreLockedError,
    StoreReadOnlyError,
    StoreTooNewError,
)
from indexes.locks import may_write
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
)

BUSY_SECONDS = 30
# Ids in one statement: below every database's limit, and few enough to compile quickly.
IN_CHUNK = 500
# Vectors read at a time while building an index: 4096 x 512-d are 4 MiB.
VECTOR_CHUNK = 4096

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
    sa.Column("mtime_ns", sa.BigInteger),
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


class Catalogue:
    """A database of items, captions and embeddings, and of what was derived from them."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Open the SQLite file at `path`, made if it is absent and may be written."""
        self.path = path
        self.read_only = read_only
        self.model_id = 0  # set by `create_model` or `read_model`
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
        with _translated(self.path), self._engine.connect() as connection, connection.begin():
            yield Snapshot(connection, self.model_id, self.path)

    @contextmanager
    def write(self) -> Iterator[Transaction]:
        """A transaction, committed when the block ends well and undone when it raises."""
        with _translated(self.path), self._engine.connect() as connection:
            connection = connection.execution_options(writes=True)
            with connection.begin():
                yield Transaction(connection, self.model_id, self.path)

    def migrate(self, *, create: bool = False) -> None:
        """Bring the schema up to date; tables come into an empty database only with `create`.

        Raises StoreTooNewError if the schema is ahead of us.
        """
        with _translated(self.path), self._engine.connect() as connection:
            applied = _applied_migrations(connection)
        if not applied and not create:
            raise StoreDamagedError(
                f"{self.path} is not a catalogue of ours, or is empty; restore it from a copy, "
                "or remove the library and index again"
            )
        if applied > len(MIGRATIONS):
            raise StoreTooNewError(
                f"{self.path} has schema {applied}, this version knows up to {len(MIGRATIONS)}: "
                "update the software, or use a library of its own for each version"
            )
        if applied == len(MIGRATIONS):
            return
        if self.read_only:
            raise StoreReadOnlyError(
                f"{self.path} must be upgraded from schema {applied} to {len(MIGRATIONS)}, "
                "but may not be written"
            )
        with _translated(self.path), self._engine.connect() as connection:
            connection = connection.execution_options(writes=True)
            with connection.begin():
                metadata.create_all(connection, tables=[schema_migrations])
                words = WORDS[self._engine.dialect.name]
                # Counted again: another process may have been here before our lock.
                for number in range(_applied_migrations(connection), len(MIGRATIONS)):
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

    def create_model(self, model: ModelSpec) -> None:
        """Make `model` the one of this new catalogue; raises InvalidRowsError if it has one."""
        with self.write() as rows:
            self.model_id = rows.add_model(model)

    def read_model(self) -> ModelSpec | None:
        """The model that made the embeddings; None in a catalogue that was never completed."""
        with _translated(self.path), self._engine.connect() as connection, connection.begin():
            row = connection.execute(
                sa.select(models).join(store_info, store_info.c.model_id == models.c.id)
            ).first()
        if row is None:
            return None
        self.model_id = row.id
        return ModelSpec(row.name, row.dim, row.fingerprint)

    def _connect_read_only(self) -> sqlite3.Connection:
        # SQLite can read a database in WAL mode only beside its -wal and -shm files, which it
        # cannot make where it may not write. With nothing in the log the file alone is the whole
        # truth and may be called immutable; decided anew for each snapshot, so that a writer
        # elsewhere, with more rights than ours, is seen.
        log = self.path.with_name(self.path.name + "-wal")
        alone = not may_write(self.path.parent) and not (log.exists() and log.stat().st_size)
        uri = self.path.absolute().as_uri() + "?mode=ro" + ("&immutable=1" if alone else "")
        return sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, check_same_thread=False)

    def _on_connect(self, connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # BEGIN is ours: see _on_begin
        connection.execute("PRAGMA foreign_keys = ON")
        if not self.read_only:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")  # a commit survives a power cut


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Database errors as ours, each with what happened and the way out."""
    try:
        yield
    except sa.exc.IntegrityError as error:
        raise InvalidRowsError(f"nothing was written: {error.orig}") from error
    except (sa.exc.DatabaseError, sqlite3.DatabaseError) as error:
        words = str(getattr(error, "orig", error))
        if "locked" in words:
            raise StoreLockedError(
                f"{path} is in use by another process; try again when it is done"
            ) from error
        if "full" in words or "readonly" in words:
            raise StoreReadOnlyError(
                f"{path} could not be written ({words}); what was there before is kept"
            ) from error
        if "unable to open" in words:
            raise StoreReadOnlyError(
                f"{path} cannot be opened ({words}); check its permissions and, if "
                f"{path.name}-wal lies beside it, open it once where it may be written"
            ) from error
        raise StoreDamagedError(
            f"{path} cannot be read as a catalogue ({words}); restore it from a copy, "
            "or remove the library and index again"
        ) from error


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


def _on_begin(connection: sa.Connection) -> None:
    # IMMEDIATE takes the write lock at once. A transaction that began by reading could not get
    # it later if another one had written in between.
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _applied_migrations(connection: sa.Connection) -> int:
    if not sa.inspect(connection).has_table(schema_migrations.name):
        return 0
    return int(connection.execute(sa.select(sa.func.max(schema_migrations.c.number))).scalar() or 0)


class Snapshot:
    """Reads one consistent state of a catalogue."""

    def __init__(self, connection: sa.Connection, model_id: int, path: Path) -> None:
        self._connection = connection
        self._path = path
        self.model_id = model_id

    def _all(self, statement: sa.Select[Any]) -> Sequence[Any]:
        return self._connection.execute(statement).all()

    def _chunked(
        self, statement: sa.Select[Any], column: sa.ColumnElement[Any], values: Iterable[Any]
    ) -> Iterator[Any]:
        distinct = list(dict.fromkeys(values))
        for start in range(0, len(distinct), IN_CHUNK):
            yield from self._all(statement.where(column.in_(distinct[start : start + IN_CHUNK])))

    def version(self) -> tuple[int, int]:
        """(generation, change): equal pairs mean equal contents."""
        row = self._connection.execute(
            sa.select(store_info.c.generation, store_info.c.change)
        ).one()
        return row.generation, row.change

    def roots(self) -> list[tuple[int, Path]]:
        """Ids and absolute paths of the roots, in the order they were added."""
        rows = self._all(sa.select(roots).order_by(roots.c.id))
        return [(row.id, Path(os.fsdecode(row.path))) for row in rows]

    def known_files(self, root_id: int) -> dict[str, KnownFile]:
        """Everything known under a root, by file."""
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
        for item_id, name, size, mtime_ns, content_hash, status in self._all(
            sa.select(*columns).where(items.c.root_id == root_id).order_by(items.c.file)
        ):
            file = os.fsdecode(name)
            known[file] = KnownFile(
                item_id, file, size, mtime_ns, content_hash, status, texts.get(item_id, ())
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
        for start in range(0, len(ids), IN_CHUNK):
            chunk = ids[start : start + IN_CHUNK]
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
        for row in self._all(statement.order_by(captions.c.item_id, captions.c.position)):
            gathered.setdefault(row.item_id, []).append(CaptionRow(row.text, row.source))
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
                raise StoreDamagedError(f"embeddings of {kind}s differ in length") from error

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
        stamp = FileStamp(row.size_bytes, row.mtime_ns, row.checksum)
        return IndexFile(row.name, row.generation, row.change, row.rows, stamp)

    def index_file_names(self) -> set[str]:
        """Names of all FAISS files of any model that are in use."""
        return {row.name for row in self._all(sa.select(index_files.c.name))}

    def problems(self) -> list[str]:
        """What is wrong with the database itself and between its tables."""
        found = []
        for (line,) in self._connection.exec_driver_sql("PRAGMA integrity_check"):
            if line != "ok":
                found.append(f"SQLite integrity: {line}")
        for table, row_id, parent, _ in self._connection.exec_driver_sql(
            "PRAGMA foreign_key_check"
        ):
            found.append(f"row {row_id} of {table} points to a missing row of {parent}")
        images, texts = embeddings["image"], embeddings["caption"]
        expectations = [
            ("without an embedding", items.c.id, "ok", images, False),
            ("failed, yet with an embedding", items.c.id, "failed", images, True),
            ("with a caption without an embedding", captions.c.id, "ok", texts, False),
            ("failed, yet with an embedded caption", captions.c.id, "failed", texts, True),
        ]
        for words, owner, status, table, present in expectations:
            has_one = (
                sa.select(1)
                .where(table.c.owner_id == owner, table.c.model_id == self.model_id)
                .exists()
            )
            statement = sa.select(items.c.id, items.c.file).where(items.c.status == status)
            if owner.table is captions:
                statement = statement.join(captions, captions.c.item_id == items.c.id)
            found += [
                f"item {row.id} ({os.fsdecode(row.file)!r}) is {words}"
                for row in self._all(statement.where(has_one if present else ~has_one))
            ]
        return found


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
        with _translated(self._path), self._connection.begin_nested():
            yield

    def add_model(self, model: ModelSpec) -> int:
        """Id of the model, now the one of this new catalogue."""
        model_id = self._insert(
            models, name=model.name, dim=model.dim, fingerprint=model.fingerprint
        )
        self._insert(store_info, id=1, model_id=model_id, generation=0, change=0)
        return model_id

    def add_root(self, path: Path) -> int:
        """Id of the root, made if absent."""
        name = os.fsencode(path)
        found = self._connection.execute(sa.select(roots.c.id).where(roots.c.path == name)).scalar()
        return int(found) if found is not None else self._insert(roots, path=name)

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
        """Replace an item's captions; their ids are new ones."""
        self._drop_captions([item_id])
        self._put_captions([(item_id, rows, vectors)])

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

    def record_index(self, kind: Kind, file: IndexFile | None) -> None:
        """Make `file` the one to use (None: there are no vectors), as a new generation."""
        mine = (index_files.c.kind == kind) & (index_files.c.model_id == self.model_id)
        self._connection.execute(index_files.delete().where(mine))
        if file is not None:
            self._connection.execute(
                index_files.insert().values(
                    kind=kind,
                    model_id=self.model_id,
                    name=file.name,
                    generation=file.generation,
                    change=file.change,
                    rows=file.rows,
                    size_bytes=file.stamp.size_bytes,
                    mtime_ns=file.stamp.mtime_ns,
                    checksum=file.stamp.checksum,
                )
            )
        # The file was made of what is here now, so nothing in it waits to be struck out.
        self._connection.execute(
            tombstones.delete().where(
                tombstones.c.kind == kind, tombstones.c.model_id == self.model_id
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
    ) -> None:
        texts: list[dict[str, Any]] = []
        vectors: list[Vectors | None] = []
        for item_id, several, matrix in rows:
            texts += [
                {"item_id": item_id, "position": position, "text": row.text, "source": row.source}
                for position, row in enumerate(several)
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
        distinct = list(dict.fromkeys(values))
        for start in range(0, len(distinct), IN_CHUNK):
            chunk = distinct[start : start + IN_CHUNK]
            self._connection.execute(table.delete().where(column.in_(chunk), *conditions))
