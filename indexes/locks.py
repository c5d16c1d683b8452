"""Who may write: WriterLock, one writer at a time, by a lock of the operating system."""

from __future__ import annotations

import json
import os
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from indexes.errors import StoreLockedError, StoreReadOnlyError
from indexes.files import LOCK, check_there

_held: weakref.WeakSet[WriterLock] = weakref.WeakSet()


class WriterLock:
    """Holds `path` from construction to `release`; raises StoreLockedError naming the holder.

    The kernel's lock decides, and it falls with the process that held it, however that ended: a
    stale lock is simply free, with no guessing from process numbers that may have been reused.
    The text in the file (pid, host, start) is only there to be read by people. The file stays
    when the lock is released, because removing it would let two writers lock two files.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._handle: int | None = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise _refusal(path.parent, error) from error
        try:
            _lock(self._handle)
        except OSError as error:
            holder = _describe(os.read(self._handle, 4096))
            os.close(self._handle)
            self._handle = None
            raise StoreLockedError(
                f"{path.parent} is being written by {holder}; try again when it is done"
            ) from error
        import socket  # only who writes needs it

        note = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        try:
            os.ftruncate(self._handle, 0)
            os.write(self._handle, json.dumps(note).encode())
        except OSError as error:  # a disk without room for the note has none for anything else
            self.forget()
            raise _refusal(path.parent, error) from error
        _held.add(self)

    def release(self) -> None:
        """Let others write; a second call does nothing."""
        if self._handle is not None:
            os.ftruncate(self._handle, 0)
            self.forget()

    def forget(self) -> None:
        """Close our handle; the lock falls when the last copy of the handle is closed."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
            _held.discard(self)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Write to a store's folder, alone, for the length of a `with` block."""
    lock = WriterLock(folder / LOCK)
    try:
        yield
    finally:
        lock.release()


def _refusal(folder: Path, error: OSError) -> StoreReadOnlyError:
    check_there(folder)
    return StoreReadOnlyError(
        f"{folder} cannot be written ({error.strerror}); searching it still works"
    )


def _describe(note: bytes) -> str:
    try:
        fields = json.loads(note)
        return f"process {fields['pid']} on {fields['host']} since {fields['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


if sys.platform == "win32":
    import msvcrt

    def _lock(handle: int) -> None:
        # Windows forbids others to read a locked range, so a byte far behind the text is locked.
        os.lseek(handle, 1 << 30, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        os.lseek(handle, 0, os.SEEK_SET)
else:
    import fcntl

    def _lock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _forget_inherited() -> None:
        # A forked worker that outlives its parent must not keep the parent's lock.
        for lock in list(_held):
            lock.forget()

    os.register_at_fork(after_in_child=_forget_inherited)
