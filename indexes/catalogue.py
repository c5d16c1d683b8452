"""Catalogue: the SQLite database of a store, for those who write. The only home of sqlalchemy.

Reading is `snapshot`'s, on which this builds. A Transaction writes all or nothing. Every one has a
change number, and every embedding the number of the change that wrote it: what a FAISS file does
not hold yet is what has a higher number than the file.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from indexes import words
from indexes.errors import InvalidRowsError, StoreDamagedError
from indexes.heads import Head
from indexes.migrations import MIGRATIONS, RECORD, WORDS
from indexes.records import (
    ApproximateFile,
    CaptionRow,
    Extras,
    Fit,
    IndexFile,
    ItemWrite,
    Kind,
    ModelSpec,
    SearchPolicy,
)
from indexes.snapshot import (
    OWNER,
    OWNERS,
    TABLES,
    Reader,
    Snapshot,
    Vectors,
    applied_migrations,
    chunks,
    our_error,
    translated,
)

_TYPES: Mapping[str, sa.types.TypeEngine[Any]] = {
    "integer": sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
    "text": sa.Text(),
    "blob": sa.LargeBinary(),
    "real": sa.Double(),
    "time": sa.DateTime(),
}
metadata = sa.MetaData()


def _table(name: str) -> sa.Table:
    columns = (
        sa.Column(column, _TYPES[kind], primary_key=column == "id")
        for column, kind in TABLES[name].items()
    )
    return sa.Table(name, metadata, *columns)


models = _table("models")
store_info = _table("store_info")
roots = _table("roots")
items = _table("items")
captions = _table("captions")
embeddings: Mapping[Kind, sa.Table] = {
    "image": _table("image_embeddings"),
    "caption": _table("caption_embeddings"),
}
tombstones = _table("tombstones")
index_files = _table("index_files")
approximate_files = _table("approximate_files")
extras = _table("extras")
fits = _table("fits")
schema_migrations = _table("schema_migrations")


class Catalogue(Reader):
    """A database of items, captions and embeddings, and of what was derived from them."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Open the SQLite file at `path`, made if it is absent and may be written."""
        super().__init__(path, read_only=read_only)
        self._engine = sa.create_engine("sqlite://", creator=self.connect, poolclass=sa.QueuePool)
        # IMMEDIATE takes the write lock at once. A transaction that began by reading could not get
        # it later if another one had written in between.
        sa.event.listen(
            self._engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE")
        )

    def close(self) -> None:
        """Close every connection."""
        super().close()
        self._engine.dispose()

    @contextmanager
    def write(self) -> Iterator[Transaction]:
        """A transaction, committed when the block ends well and undone when it raises."""
        self._follow()
        with _translated(self.path), self._engine.begin() as connection:
            yield Transaction(connection, self.model_id, self.path)

    def migrate(self) -> None:
        """Bring the schema up to date; the caller holds the store's lock.

        A database with rows is copied first, to `catalogue.schema-N.sqlite` beside it.
        """
        with translated(self.path), self._connected() as database:
            applied = applied_migrations(database)
        if applied == len(MIGRATIONS):
            return
        if applied:
            self.copy(self.path.with_name(f"{self.path.stem}.schema-{applied}.sqlite"))
        with _translated(self.path), self._engine.begin() as connection:
            connection.exec_driver_sql(RECORD)
            dialect = WORDS[self._engine.dialect.name]
            for number in range(applied, len(MIGRATIONS)):
                migration = MIGRATIONS[number]
                for statement in migration(dialect):
                    connection.exec_driver_sql(statement)
                connection.execute(
                    schema_migrations.insert().values(
                        number=number + 1,
                        name=migration.__name__,
                        applied_at=datetime.now(UTC).isoformat(timespec="seconds"),
                    )
                )
            if applied:
                Transaction(connection, self.model_id, self.path).make_words()

    def vacuum(self) -> None:
        """Give the space of what was deleted back to the file system.

        For a while that needs the room of what is left twice more. Raises StoreReadOnlyError.
        """
        with translated(self.path), self._connected() as connection:
            connection.execute("VACUUM")
            # While others read, the log stays as long as it is; a later checkpoint cuts it.
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def add_model(self, model: ModelSpec) -> None:
        """Take a model up and work with it; the first one of a catalogue becomes its default."""
        with self.write() as rows:
            self.model_id = rows.add_model(model)


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """SQLAlchemy's errors as ours too, each with what happened and the way out."""
    with translated(path):
        try:
            yield
        except sa.exc.IntegrityError as error:
            raise InvalidRowsError(f"nothing was written: {error.orig}") from error
        except sa.exc.DatabaseError as error:
            raise our_error(path, error.orig) from error
        except sa.exc.SQLAlchemyError as error:
            raise our_error(path, f"{type(error).__name__}: {error}") from error


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
        "camera": item.camera,
        "latitude": item.latitude,
        "longitude": item.longitude,
        "perceptual_hash": item.perceptual_hash,
        "facts": item.facts,
    }


def _extra_values(item_id: int, pairs: Extras) -> Iterator[dict[str, Any]]:
    for key, value in pairs:
        is_text = isinstance(value, str)
        yield {
            "item_id": item_id,
            "key": key,
            "text": value if is_text else None,
            "number": None if is_text else value,
        }


def _file_values(model_id: int, kind: Kind, file: IndexFile) -> dict[str, Any]:
    return {
        "kind": kind,
        "model_id": model_id,
        "name": file.name,
        "generation": file.generation,
        "change": file.change,
        "rows": file.rows,
        "size_bytes": file.stamp.size_bytes,
        "checksum": file.stamp.checksum,
    }


class Transaction(Snapshot):
    """Changes a catalogue; what one transaction writes carries one change number."""

    def __init__(self, core: sa.Connection, model_id: int, path: Path) -> None:
        # What is read goes past SQLAlchemy, on the same connection and in the same transaction.
        connection: Any = core.connection.driver_connection
        super().__init__(connection, model_id, path)
        self._core = core
        self._change: int | None = None
        self._heads: dict[int, Head] = {}  # of derived models, once they are needed

    @property
    def change(self) -> int:
        """This transaction's number, drawn when it first writes."""
        if self._change is None:
            self._core.execute(store_info.update().values(change=store_info.c.change + 1))
            self._change = self.version()[1]
        return self._change

    def _for_words(self) -> sqlite3.Connection:
        """What words are written through: those who hold them in memory look again."""
        _ = self.change
        return self._connection

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """What is written inside is undone if the block raises, and nothing else."""
        with _translated(self._path):
            nested = self._core.begin_nested()
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
        if self._first("SELECT id FROM store_info") is None:
            self._insert(store_info, id=1, model_id=model_id, generation=0, change=0)
        return model_id

    def add_derived(self, model: ModelSpec, head: bytes, facts: Mapping[str, Any]) -> int:
        """Id of a new model whose embeddings follow from this one's by a head; see `derive`."""
        return self._insert(
            models,
            **asdict(model),
            base_id=self.model_id,
            head=head,
            facts=json.dumps(facts, allow_nan=False),
        )

    def derive(self, kind: Kind) -> Iterator[int]:
        """Gives models derived from this one what they lack; after each batch, how many those were.

        A batch takes a few MB, and no picture is looked at.
        """
        for model_id in self.derived_ids():
            last = -1
            theirs = self.of_model(model_id)
            while True:
                ids, vectors = self.vectors_beyond(kind, last)
                if not len(ids):
                    break
                last = int(ids[-1])
                have = theirs.embeddings(kind, ids.tolist())
                lacking = [at for at, one in enumerate(ids.tolist()) if one not in have]
                if lacking:
                    self._derive(model_id, kind, ids[lacking].tolist(), vectors[lacking])
                yield len(lacking)

    def set_default_model(self, model_id: int) -> None:
        """Open the store with this model from now on."""
        self._core.execute(store_info.update().values(model_id=model_id))

    def drop_model(self, model_id: int) -> None:
        """Forget a model that is not the default, with all that it embedded."""
        _ = self.change  # drawn, so that those who have the store open look again
        # What only this model has seen would be left with no embedding at all: such items are
        # read again by the next run, as those are whose bytes could not be read.
        for table in (*embeddings.values(), tombstones, index_files, approximate_files, fits):
            self._core.execute(table.delete().where(table.c.model_id == model_id))
        self._core.execute(models.delete().where(models.c.id == model_id))
        self.forget_contents(
            [item_id for item_id, _ in self.at_odds("image", "ok", False)],
            "was embedded only by a model that was dropped; index its folder again",
        )

    def forget_contents(self, ids: Collection[int], reason: str) -> None:
        """Items as failed, with no hash, so that the next run over them reads them again."""
        self._drop_embeddings("image", ids)
        self._drop_embeddings("caption", self.caption_ids(ids))
        for chunk in chunks(ids):
            self._core.execute(
                items.update()
                .where(items.c.id.in_(chunk))
                .values(status="failed", reason=reason, content_hash=None)
            )
        words.remove(self._for_words(), ids)

    def make_words(self) -> None:
        """Make the table of words anew."""
        words.make(self._for_words())

    def optimize_words(self) -> None:
        """Have as little to read for each word as can be."""
        words.optimize(self._connection)

    def remove_orphans(self) -> int:
        """Delete rows that point to rows that are gone; how many."""
        count = 0
        while True:
            found = self._each("PRAGMA foreign_key_check").fetchall()
            for table, row_id, _, _ in found:
                self._core.execute(
                    sa.delete(metadata.tables[table]).where(sa.text("rowid = :id")), {"id": row_id}
                )
            if not found:
                return count
            count += len(found)

    def misfits(self, kind: Kind, dim: int, is_unit: Callable[[Vectors], Any]) -> set[int]:
        """Ids of embeddings that are not of `dim` dimensions or not unit rows."""
        found: set[int] = set()
        for rows in self._vector_batches(kind):
            whole = [row for row in rows if len(row[1]) == 2 * dim]
            packed = np.frombuffer(b"".join(vector for _, vector in whole), dtype="<f2")
            fits = is_unit(packed.reshape(-1, dim))
            fine = {owner_id for (owner_id, _), fit in zip(whole, fits, strict=True) if fit}
            found |= {owner_id for owner_id, _ in rows} - fine
        return found

    def lacking(self, kind: Kind) -> list[int]:
        """Items that could be read, or captions of such, that this model has no embedding of."""
        rows = self._each(
            f"SELECT {OWNER[kind]} FROM {OWNERS[kind]}"
            f" WHERE items.status = 'ok' AND NOT {self._embedded(kind)}"
        )
        return [owner_id for (owner_id,) in rows]

    def replace_embeddings(
        self, kind: Kind, gone: Collection[int], rows: Sequence[tuple[int, Vectors]]
    ) -> None:
        """Delete embeddings of this model, by id, and put others; what was derived stays."""
        table = embeddings[kind]
        self._delete(table, table.c.owner_id, gone, table.c.model_id == self.model_id)
        self._insert_embeddings(self.model_id, kind, rows)

    def embed(self, kind: Kind, rows: Sequence[tuple[int, Vectors]]) -> None:
        """Set this model's embeddings of items or captions that have none of its."""
        have = self.embeddings(kind, [owner_id for owner_id, _ in rows])
        self._put_embeddings(kind, [row for row in rows if row[0] not in have])

    def add_root(self, path: Path) -> int:
        """Id of the root, made if absent."""
        name = os.fsencode(path)
        found = self._first("SELECT id FROM roots WHERE path = :path", path=name)
        return int(found[0]) if found else self._insert(roots, path=name)

    def remove_root(self, root_id: int) -> int:
        """Forget a root with its items; how many these were."""
        ids = self.item_ids(root_id)
        self.remove(ids)
        self._core.execute(roots.delete().where(roots.c.id == root_id))
        return len(ids)

    def update_root(self, root_id: int, **values: Any) -> None:
        """Set a root's path or the time of its last full run."""
        if "path" in values:
            values["path"] = os.fsencode(values["path"])
        self._core.execute(roots.update().where(roots.c.id == root_id).values(**values))
        if "path" in values:  # whose last part is a folder's name
            words.follow(self._for_words(), self.item_ids(root_id))

    def write_items(self, root_id: int, batch: Sequence[ItemWrite]) -> list[int]:
        """Ids of these items, in order, which are now as the batch says."""
        # Looked up before anything is written: an item that changes would otherwise be found
        # under its new hash with its old embedding.
        vectors = self._image_vectors(batch)
        known = dict(
            self._among(
                "SELECT file, id FROM items WHERE root_id = :root AND file IN (:values)",
                [os.fsencode(item.file) for item in batch if item.item_id is None],
                root=root_id,
            )
        )
        ids = [
            known.get(os.fsencode(item.file)) if item.item_id is None else item.item_id
            for item in batch
        ]
        changed = [item_id for item_id in ids if item_id is not None]
        self._drop_embeddings("image", changed)
        self._drop_captions(changed)
        self._delete(extras, extras.c.item_id, changed)
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
        self._put_extras((item_id, item.extras) for item_id, item in zip(whole, batch, strict=True))
        words.follow(self._for_words(), whole)
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
        words.follow(self._for_words(), [item_id])

    def set_extras(self, item_id: int, pairs: Extras) -> None:
        """Replace an item's further columns."""
        self._delete(extras, extras.c.item_id, [item_id])
        self._put_extras([(item_id, pairs)])

    def set_facts(self, item_id: int, **values: Any) -> None:
        """Set what was read of an item's file beside its embedding."""
        self._update_item(item_id, values)

    def update_place(self, item_id: int, **values: Any) -> None:
        """Set where an item is (root_id, file) or its size and time stamp."""
        is_moved = "file" in values
        if is_moved:
            values["file"] = os.fsencode(values["file"])
        self._update_item(item_id, values)
        if is_moved:
            words.follow(self._for_words(), [item_id])

    def remove(self, ids: Collection[int]) -> None:
        """Remove items with their captions and embeddings."""
        self._drop_embeddings("image", ids)
        self._drop_captions(ids)
        words.remove(self._for_words(), ids)
        self._delete(extras, extras.c.item_id, ids)
        self._delete(items, items.c.id, ids)

    def record_index(self, model_id: int, kind: Kind, file: IndexFile | None) -> None:
        """Make `file` the one to use (None: there are no vectors), in this generation."""
        for table in (index_files, tombstones):
            # The file was made of what is here now, so nothing in it waits to be struck out.
            self._core.execute(
                table.delete().where(table.c.kind == kind, table.c.model_id == model_id)
            )
        if file is not None:
            self._core.execute(index_files.insert().values(_file_values(model_id, kind, file)))

    def record_approximate(self, model_id: int, kind: Kind, built: ApproximateFile | None) -> None:
        """Make `built` the approximate index to use; None: search is exact."""
        table = approximate_files
        self._core.execute(table.delete().where(table.c.kind == kind, table.c.model_id == model_id))
        if built is not None:
            facts = asdict(built)
            del facts["file"]
            values = _file_values(model_id, kind, built.file) | {"facts": json.dumps(facts)}
            self._core.execute(table.insert().values(values))

    def record_fit(self, fit: Fit) -> None:
        """What was measured of this library for this model, from now on."""
        self._core.execute(fits.delete().where(fits.c.model_id == self.model_id))
        self._core.execute(
            fits.insert().values(
                model_id=self.model_id,
                change=fit.change,
                rows=fit.rows,
                facts=json.dumps(fit.facts, allow_nan=False),
                means=fit.means.astype("<f4").tobytes(),
            )
        )

    def set_policy(self, policy: SearchPolicy) -> None:
        """How this store may search from now on."""
        self._core.execute(store_info.update().values(policy=json.dumps(asdict(policy))))

    def next_generation(self) -> int:
        """A new generation's number."""
        self._core.execute(store_info.update().values(generation=store_info.c.generation + 1))
        return self.version()[0]

    def _insert(self, table: sa.Table, **values: Any) -> int:
        key = self._core.execute(table.insert().values(**values)).inserted_primary_key
        assert key is not None
        return int(key[0])

    def _update_item(self, item_id: int, values: dict[str, Any]) -> None:
        result = self._core.execute(items.update().where(items.c.id == item_id).values(**values))
        if not result.rowcount:
            raise InvalidRowsError(f"there is no item {item_id}")

    def _insert_many(self, table: sa.Table, rows: Sequence[dict[str, Any]]) -> list[int]:
        if not rows:
            return []
        statement = table.insert().returning(table.c.id, sort_by_parameter_order=True)
        return [row.id for row in self._core.execute(statement, rows)]

    def _put_embeddings(self, kind: Kind, rows: Sequence[tuple[int, Vectors]]) -> None:
        """Writes embeddings of this model, and of those that are derived from it."""
        if not rows:
            return
        if self.derivation() is not None:
            raise InvalidRowsError(
                "the embeddings of a tuned model follow from those of the model it is tuned from"
            )
        self._insert_embeddings(self.model_id, kind, rows)
        if derived := self.derived_ids():
            ids, vectors = [row[0] for row in rows], np.stack([row[1] for row in rows])
            for model_id in derived:
                self._derive(model_id, kind, ids, vectors)

    def _derive(self, model_id: int, kind: Kind, ids: Sequence[int], vectors: Vectors) -> None:
        """Writes what a derived model has for these embeddings of its base."""
        table = embeddings[kind]
        # It may have one still where its base lost its own, and is given it again.
        self._delete(table, table.c.owner_id, ids, table.c.model_id == model_id)
        carried = self._head(model_id)(kind, vectors).astype("<f2")
        self._insert_embeddings(model_id, kind, list(zip(ids, carried, strict=True)))

    def _head(self, model_id: int) -> Head:
        if model_id not in self._heads:
            derivation = self.of_model(model_id).derivation()
            try:
                self._heads[model_id] = Head.unpack(derivation.head if derivation else b"")
            except ValueError as error:
                raise StoreDamagedError(
                    f"{self._path}: what tuned this library is damaged ({error}): `retriever tune"
                    " --undo` goes back to what was there before"
                ) from error
        return self._heads[model_id]

    def _insert_embeddings(
        self, model_id: int, kind: Kind, rows: Sequence[tuple[int, Vectors]]
    ) -> None:
        if rows:
            self._core.execute(
                embeddings[kind].insert(),
                [
                    {
                        "owner_id": owner_id,
                        "model_id": model_id,
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

    def _put_extras(self, rows: Iterable[tuple[int, Extras]]) -> None:
        values = [one for item_id, pairs in rows for one in _extra_values(item_id, pairs)]
        if values:
            self._core.execute(extras.insert(), values)

    def _drop_captions(self, item_ids: Collection[int]) -> None:
        old = self.caption_ids(item_ids)
        self._drop_embeddings("caption", old)
        self._delete(captions, captions.c.id, old)

    def _drop_embeddings(self, kind: Kind, ids: Collection[int]) -> None:
        """Delete the embeddings that these ids have, of every model, each with a tombstone."""
        table = embeddings[kind]
        found = list(
            self._among(
                f"SELECT owner_id, model_id FROM {table.name} WHERE owner_id IN (:values)", ids
            )
        )
        if not found:
            return
        # An id may have been struck out before, if its item failed, recovered and failed again.
        for model_id in {model_id for _, model_id in found}:
            self._delete(
                tombstones,
                tombstones.c.owner_id,
                [owner_id for owner_id, other in found if other == model_id],
                tombstones.c.kind == kind,
                tombstones.c.model_id == model_id,
            )
        self._core.execute(
            tombstones.insert(),
            [
                {
                    "kind": kind,
                    "model_id": model_id,
                    "owner_id": owner_id,
                    "change": self.change,
                }
                for owner_id, model_id in found
            ],
        )
        self._delete(table, table.c.owner_id, [owner_id for owner_id, _ in found])

    def _delete(
        self,
        table: sa.Table,
        column: sa.ColumnElement[Any],
        values: Collection[int],
        *conditions: sa.ColumnElement[bool],
    ) -> None:
        for chunk in chunks(values):
            self._core.execute(table.delete().where(column.in_(chunk), *conditions))
