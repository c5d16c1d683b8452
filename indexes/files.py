"""A store's folder: the names in it, rights to it, and bytes that must reach the disk."""

from __future__ import annotations

import os
from pathlib import Path

CATALOGUE = "catalogue.sqlite"
LOCK = "writer.lock"


def absolute(path: Path) -> Path:
    """`path` from the root of the file system, links not followed: a root is where it was named."""
    return Path(os.path.abspath(path))  # noqa: PTH100 (Path.resolve would follow links)


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
