"""A store's folder: the names in it, rights to it, and bytes that must reach the disk."""

from __future__ import annotations

import os
from pathlib import Path

from indexes.errors import StoreDamagedError, StoreNotFoundError, StoreReadOnlyError

CATALOGUE = "catalogue.sqlite"
LOCK = "writer.lock"
# What `repair` saved of a damaged catalogue, from the moment that it is to take its place.
REPLACEMENT = "catalogue.replacement.sqlite"


def absolute(path: Path) -> Path:
    """`path` from the root of the file system, links not followed: a root is where it was named."""
    return Path(os.path.abspath(path))  # noqa: PTH100 (Path.resolve would follow links)


def find_catalogue(folder: Path) -> Path:
    """The catalogue in a store's folder; raises StoreNotFoundError, StoreDamagedError."""
    file = folder / CATALOGUE
    if (folder / REPLACEMENT).exists():
        raise StoreDamagedError(f"{folder}: a repair was cut off; `retriever repair` finishes it")
    if file.is_file():
        return file
    if any(folder.glob("*.faiss")):
        raise StoreDamagedError(
            f"{file} is missing, and the other files are nothing without it: restore a backup, "
            "or remove the library and index again"
        )
    raise StoreNotFoundError(f"there is no library at {folder}")


def check_there(folder: Path) -> None:
    """Raise StoreReadOnlyError if the folder of an open store is gone."""
    if not folder.is_dir():
        raise StoreReadOnlyError(
            f"{folder} is gone: was it moved, removed or unmounted while it was open?"
        )


def may_write(path: Path) -> bool:
    """Whether this process may write to an existing file or folder."""
    return os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, reach the disk; raises OSError."""
    if os.name == "nt":  # needs a handle for writing, and folders cannot be opened at all
        if path.is_dir():
            return
        handle = os.open(path, os.O_RDWR)
    else:
        handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
