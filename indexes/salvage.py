"""What can still be read of a damaged catalogue, row by row, as a new one.

SQLite stops at the first page that makes no sense; the rows on all other pages can be had by
asking for them by number. The tables are copied one after the other, and what belongs together is
put in order afterwards (`indexes.care`).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from indexes.catalogue import Catalogue
from indexes.errors import StoreDamagedError, StoreReadOnlyError
from indexes.files import sync

TABLES = (
    "models",
    "store_info",
    "roots",
    "items",
    "captions",
    "extras",
    "image_embeddings",
    "caption_embeddings",
    "index_files",
    "tombstones",
)
# The one row of store_info, if it is lost: the first model was the default, unless it was changed.
RESTORE_INFO = """
    INSERT OR IGNORE INTO store_info (id, model_id, generation, change)
    SELECT 1, (SELECT min(id) FROM models),
        (SELECT coalesce(max(generation), 0) + 1 FROM index_files),
        (SELECT coalesce(max(change), 0) + 1 FROM image_embeddings)
        + (SELECT coalesce(max(change), 0) FROM caption_embeddings)
    WHERE EXISTS (SELECT 1 FROM models)"""
KINDS = {
    "INT": int,
    "TEXT": str,
    "TIMESTAMP": str,
    "BLOB": bytes,
    "REAL": float,
}  # by a word of the declaration
STEP = 1 << 14  # rows asked for at once; where that fails, ever fewer
GIVE_UP = 20_000  # single rows in a row that cannot be read: the rest of the table is gone


def salvage(damaged: Path, saved: Path) -> list[str]:
    """Write what can be read of the database `damaged` to a new one, which appears whole.

    Returns a sentence for each table that lost rows. Raises StoreDamagedError if nothing can be
    read, StoreReadOnlyError.
    """
    beside = saved.with_name(saved.name + ".tmp")
    beside.unlink(missing_ok=True)
    fresh = Catalogue(beside)
    try:
        fresh.migrate()
    finally:
        fresh.close()
    try:
        lost = _copy(damaged, beside)
        sync(beside)
        beside.replace(saved)
        sync(saved.parent)
    except OSError as error:
        raise StoreReadOnlyError(
            f"{saved} could not be written ({error.strerror}); the damaged catalogue is as it was"
        ) from error
    finally:
        for suffix in ("", "-wal", "-shm"):
            Path(f"{beside}{suffix}").unlink(missing_ok=True)
    return lost


def restore_info(file: Path) -> None:
    """Write the one row of store_info again, if it is lost and a model is there."""
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute(RESTORE_INFO)


def _copy(damaged: Path, fresh: Path) -> list[str]:
    target = sqlite3.connect(fresh, isolation_level=None)
    try:
        source = sqlite3.connect(f"{damaged.absolute().as_uri()}?mode=ro", uri=True)
        source.execute("PRAGMA writable_schema = ON")  # a schema with a fault is read all the same
        target.execute("PRAGMA foreign_keys = OFF")
        target.execute("BEGIN")
        lost = []
        try:
            total = 0
            for table in TABLES:
                copied, failed = _copy_table(source, target, table)
                total += copied
                if failed:
                    lost.append(f"{table}: {copied} rows were saved, others could not be read")
                if failed and table == "captions":
                    # Those inside the files come back only if every picture is read again.
                    target.execute("UPDATE items SET content_hash = NULL, mtime_ns = -1")
                if failed and table == "tombstones":
                    # Nobody knows any more which vectors of the FAISS files still hold.
                    target.execute("DELETE FROM index_files")
        finally:
            source.close()
        if not total:
            raise StoreDamagedError(
                f"{damaged}: nothing in it can be read; restore a backup, or remove the library "
                "and index again"
            )
        target.execute(RESTORE_INFO)
        target.execute("COMMIT")
        target.execute("PRAGMA journal_mode = DELETE")  # leaves one file that holds everything
        return lost
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorname.startswith(("SQLITE_FULL", "SQLITE_IOERR")):
            raise StoreReadOnlyError(
                f"{fresh} could not be written ({error}): is the disk full? The damaged catalogue "
                "is as it was, and the same command goes on once there is room"
            ) from error
        raise StoreDamagedError(
            f"{damaged}: it cannot be read at all ({error}); restore a backup, or remove the "
            "library and index again"
        ) from error
    finally:
        target.close()


def _copy_table(
    source: sqlite3.Connection, target: sqlite3.Connection, table: str
) -> tuple[int, bool]:
    """Copies a table; how many rows, and whether some could not be read."""
    ours = [
        (name, next(kind for word, kind in KINDS.items() if word in declared))
        for _, name, declared, *_ in target.execute(f"PRAGMA table_info({table})")
    ]
    try:
        theirs = {row[1] for row in source.execute(f"PRAGMA table_info({table})")}
    except sqlite3.DatabaseError:
        theirs = set()
    shared = [(name, kind) for name, kind in ours if name in theirs]
    if not shared:
        return 0, True
    columns, marks = ", ".join(name for name, _ in shared), ", ".join("?" for _ in shared)
    insert = f"INSERT OR IGNORE INTO {table} ({columns}) VALUES ({marks})"
    reader = _Reader(source, f"SELECT {columns} FROM {table} WHERE rowid BETWEEN ? AND ?")
    copied = 0
    for rows in reader.rows(_last_row(source, table)):
        for row in rows:
            is_copied = False
            if _is_whole(row, shared):
                with suppress(sqlite3.IntegrityError):  # text where a number belongs
                    is_copied = bool(target.execute(insert, row).rowcount)
            copied += is_copied
            reader.has_failed |= not is_copied
    return copied, reader.has_failed


class _Reader:
    def __init__(self, source: sqlite3.Connection, query: str) -> None:
        self._source = source
        self._query = query
        self._failures = 0  # single rows, one after the other
        self.has_failed = False

    def rows(self, last: int) -> Iterator[list[tuple[Any, ...]]]:
        for start in range(0, last + 1, STEP):
            yield from self._range(start, start + STEP - 1)
            if self._failures >= GIVE_UP:
                return

    def _range(self, first: int, last: int) -> Iterator[list[tuple[Any, ...]]]:
        if self._failures >= GIVE_UP:
            return
        try:
            found = self._source.execute(self._query, (first, last)).fetchall()
        except (sqlite3.DatabaseError, UnicodeDecodeError):
            self.has_failed = True
            if first == last:
                self._failures += 1
                return
            middle = (first + last) // 2
            yield from self._range(first, middle)
            yield from self._range(middle + 1, last)
        else:
            if found:
                self._failures = 0
                yield found


def _last_row(source: sqlite3.Connection, table: str) -> int:
    """The highest row number, or a bound on it where the page that has it is damaged."""
    bounds = []
    for query in (
        f"SELECT max(rowid) FROM {table}",
        f"SELECT seq FROM sqlite_sequence WHERE name = '{table}'",
    ):
        try:
            row = source.execute(query).fetchone()
        except sqlite3.DatabaseError:
            continue
        bounds += [int(row[0])] if row and row[0] is not None else []
    if bounds:
        return max(bounds)
    (page_count,) = source.execute("PRAGMA page_count").fetchone()
    return int(page_count) * 64  # rows on a page, at most: none is smaller than 64 bytes


def _is_whole(row: tuple[Any, ...], columns: Sequence[tuple[str, type]]) -> bool:
    """Whether a row can be one that was written, by the names and types of its columns.

    The last page of a file that was cut off is filled up with zeros, in the middle of its rows.
    """
    for value, (name, kind) in zip(row, columns, strict=True):
        if value is not None and not isinstance(value, kind):
            return False
        if isinstance(value, str) and "\0" in value:
            return False
        if name in ("path", "file") and isinstance(value, bytes) and b"\0" in value:
            return False
    return True
