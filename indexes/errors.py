"""What a store raises on purpose; each text is one sentence for the user.

StoreError
├── StoreNotFoundError   no store at this path
├── StoreExistsError     a store is there already
├── StoreDamagedError    the catalogue cannot be read
├── StoreTooNewError     made by a newer version of this software
├── StoreLockedError     another process is writing; names it
├── StoreReadOnlyError   cannot be written: permissions, read-only disk, disk full
├── WrongModelError      made by another model
├── InvalidRowsError     what was handed over is not what the store takes; nothing was written
└── InvalidConditionError  a condition that cannot be asked of pictures
"""

import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

T = TypeVar("T")


class StoreError(Exception):
    """Base of every error that a store raises on purpose."""


class StoreNotFoundError(StoreError):
    """There is no store at this path."""


class StoreExistsError(StoreError):
    """A store exists where a new one was to be made."""


class StoreDamagedError(StoreError):
    """The catalogue cannot be read as one of ours."""


class StoreTooNewError(StoreError):
    """The catalogue's schema is newer than this software knows."""


class StoreLockedError(StoreError):
    """Another process holds the store for writing; the text names it and says since when."""


class StoreReadOnlyError(StoreError):
    """The store cannot be written: permissions, a read-only disk, or no space left."""


class WrongModelError(StoreError):
    """The store was made by another model, whose embeddings cannot be compared."""


class InvalidRowsError(StoreError, ValueError):
    """Rows or embeddings are not what the store takes; nothing of the batch was written."""


class InvalidConditionError(StoreError, ValueError):
    """A condition names a field that there is not, compares what cannot be, or is too large."""


@contextmanager
def callers_own(opened: AbstractContextManager[T]) -> Iterator[T]:
    """`opened`, for a block of the caller's: what that raises comes out as it is.

    A fault in it says nothing about the state of the database, which `opened` would take it for,
    unless the database itself has raised it.
    """
    fault: BaseException | None = None
    try:
        with opened as value:
            try:
                yield value
            except BaseException as error:
                fault = error
                raise
    except StoreError as error:
        if fault is None or fault is error or isinstance(fault, sqlite3.Error):
            raise
        raise fault from None
