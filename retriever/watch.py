"""watch: keeps a library up to date as files in its folders change.

What the operating system tells is a hint that a folder deserves a look, nothing more: the run over
it compares sizes and time stamps, so notices that come twice, late or for nothing do no harm, and
those that got lost cost time only. A folder is indexed when it has been quiet for a moment, so that
a burst of changes is one run and a file that is being copied is mostly whole by then; one that is
not fails, changes again, and is read again.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from collections.abc import Set as AbstractSet
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from indexes.errors import StoreError, StoreLockedError
from retriever.captions import may_be_captions
from retriever.data import IMAGE_SUFFIXES, is_skipped
from retriever.errors import MissingExtraError, RetrieverError, UsageError, printable

if TYPE_CHECKING:
    from retriever.ingest import Failure, IndexReport
    from retriever.library import Library

POLL_SECONDS = 5.0  # between two looks at everything, where the system gives no notices
BUSY_SECONDS = 60.0  # a folder that is never quiet is indexed nevertheless after this time
LOCKED_SECONDS = 2.0  # until the next try, while another process writes
RETRY_SECONDS = 60.0  # until the next try at a folder that could not be indexed
RESCAN_SECONDS = 3600.0  # a quiet folder is looked at all the same: notices get lost

OnReport = Callable[[Path, "IndexReport"], None]
Changes = AbstractSet[tuple[int, str]]  # (1 added, 2 modified or 3 deleted; path)
_ADDED, _DELETED = 1, 3
_UNKNOWN = (-1, -1)  # the identity of no folder


def watch(
    library: Library,
    folders: Sequence[str | Path] | None = None,
    *,
    on_report: OnReport,
    stop: threading.Event,
    settle_seconds: float = 2.0,
    polling: bool = False,
) -> None:
    """Brings folders up to date, then again whenever something in them changes, until `stop`.

    Changes of pictures and of the texts that caption them count; hidden files, and what else
    `retriever.data.list_pictures` passes over, do not. The library is locked for writing only
    while a folder is indexed; while another process holds it, the run waits. After a run there is
    a pause at least as long as the run.

    A folder that cannot be indexed (its drive is not mounted) ends nothing: it is reported once,
    looked at again from time to time, and taken up again when it is back.

    Args:
        library: written to by the calling thread, while others may search it.
        folders: roots of the library, parts of such, or new ones; None means all its roots.
        on_report: called with a folder and the report of a run over it that changed something or
            met a new failure or problem. Where the run itself failed, the report has the reason
            among its problems and nothing else.
        stop: ends the watch; a run finishes and commits the batch in hand.
        settle_seconds: how long a folder must be quiet before it is indexed.
        polling: look at all files every few seconds instead of waiting for notices, which network
            drives do not send.

    Raises:
        UsageError: a folder does not exist and is no part of the library, or there is none.
        MissingExtraError: watchfiles is not installed.
    """
    watched = [_Watched(folder) for folder in _folders(library, folders)]
    tick = min(max(settle_seconds / 2, 0.05), 1.0)
    rest_until = 0.0
    with closing(_Watcher(tick, stop, polling=polling)) as watcher:
        while not stop.is_set():
            for folder, problem in watcher.wait(watched, library.path):
                on_report(folder.path, _only(problem))
            now = time.monotonic()
            due = [folder for folder in watched if folder.is_due(now, settle_seconds)]
            if now < rest_until or not due or not watcher.is_ready:
                continue
            for folder in due:
                if not stop.is_set() and (report := folder.index(library, stop)):
                    on_report(folder.path, report)
            ended = time.monotonic()
            rest_until = ended + (ended - now)


def _folders(library: Library, folders: Sequence[str | Path] | None) -> list[Path]:
    """The folders to watch, absolute, without those inside others."""
    roots = [root.path for root in library.roots()]
    if folders is None:
        wanted = roots
    else:
        wanted = [Path(folder).expanduser().resolve() for folder in folders]
        for folder in wanted:
            # What the library knows may be on a drive that comes back.
            if not folder.is_dir() and not any(map(folder.is_relative_to, roots)):
                raise UsageError(f"{printable(folder)}: no such folder")
    if not wanted:
        raise UsageError("the library has no folders yet: index one, or name one to watch")
    outermost: list[Path] = []
    for folder in sorted(set(wanted), key=lambda path: len(path.parts)):
        if not any(map(folder.is_relative_to, outermost)):
            outermost.append(folder)
    return outermost


def _only(problem: str) -> IndexReport:
    from retriever.ingest import IndexReport

    return IndexReport(problems=(problem,))


@dataclass(slots=True, eq=False)
class _Watched:
    """A folder, what is known to have happened in it, and what was said about it."""

    path: Path
    identity: tuple[int, int] | None = None
    first_change: float | None = None  # since it was last indexed
    last_change: float = 0.0
    next_look: float = 0.0  # due then, if nothing happens
    is_failing: bool = False
    told: frozenset[Failure | str] = field(default_factory=frozenset)

    def is_due(self, now: float, settle_seconds: float) -> bool:
        if now >= self.next_look:
            return True
        if self.first_change is None:
            return False
        return now - self.last_change >= settle_seconds or now - self.first_change >= BUSY_SECONDS

    def changed(self) -> None:
        self.last_change = time.monotonic()
        if self.first_change is None:
            self.first_change = self.last_change

    def has_another_identity(self) -> bool:
        """Whether it came, went, or is another folder than before, as when a drive is mounted."""
        before, self.identity = self.identity, None
        with suppress(OSError):
            status = self.path.stat()
            self.identity = status.st_dev, status.st_ino
        return before != self.identity

    def index(self, library: Library, stop: threading.Event) -> IndexReport | None:
        """Brings the library up to date with it; the report if that is worth telling."""
        self.first_change, was_failing = None, self.is_failing
        try:
            report, wait = library.index(self.path, stop=stop.is_set), RESCAN_SECONDS
            self.is_failing = False
        except StoreLockedError:
            self.next_look = time.monotonic() + LOCKED_SECONDS
            return None
        except (RetrieverError, StoreError, OSError) as exc:
            report, wait = _only(str(exc)), RETRY_SECONDS
            self.is_failing = True
        self.next_look = time.monotonic() + wait
        told, self.told = self.told, frozenset((*report.failed, *report.problems))
        is_news = report.added or report.updated or report.moved or report.removed
        is_back = was_failing and not self.is_failing
        return report if is_news or is_back or self.told - told else None


class _Watcher:
    """The operating system's notices of what happens in some folders."""

    def __init__(self, tick: float, stop: threading.Event, *, polling: bool) -> None:
        try:
            import watchfiles
        except ImportError as exc:
            raise MissingExtraError("watching folders", "watch") from exc
        self._watch = watchfiles.watch
        self._tick = tick
        self._stop = stop
        self._polling = polling
        # Changes between a run and the start of the notices would be lost.
        self.is_ready = False
        self._notices: Generator[Changes, None, None] | None = None

    def close(self) -> None:
        """Stop the watching."""
        if self._notices is not None:
            self._notices.close()
            self._notices = None

    def wait(self, folders: Sequence[_Watched], library: Path) -> list[tuple[_Watched, str]]:
        """Waits a moment for changes and notes them on the folders; what else is to be said.

        Folders that came or went since the last time are due at once.
        """
        # Each folder is asked, as this also notes what it is now.
        if others := [folder for folder in folders if folder.has_another_identity()]:
            self.close()
        for folder in others:
            folder.next_look = 0.0
        there = [folder for folder in folders if folder.identity is not None]
        self.is_ready = True
        if not there:
            self._stop.wait(self._tick)
            return []
        is_new = self._notices is None
        if self._notices is None:
            self._notices = self._start(there)
        try:
            changes = next(self._notices, set())
        except (OSError, RuntimeError) as exc:
            # Something was missed: a name that is not valid text, a folder that went just now,
            # a queue that ran over.
            self.close()
            self.is_ready = is_new and self._polling  # nothing is left to try
            for folder in there:
                folder.next_look = 0.0
            self._stop.wait(self._tick)
            if not is_new or self._polling or isinstance(exc, FileNotFoundError):
                return []
            self._polling = True
            reason = f"the system gives no notice of changes ({exc}); looking every few seconds"
            return [(folder, f"{printable(folder.path)}: {reason}") for folder in there]
        _note(changes, there, library)
        return []

    def _start(self, folders: Iterable[_Watched]) -> Generator[Changes, None, None]:
        return self._watch(
            *(folder.path for folder in folders),
            watch_filter=None,
            stop_event=self._stop,
            rust_timeout=int(self._tick * 1000),
            yield_on_timeout=True,
            step=int(min(self._tick * 500, 200)),
            debounce=int(self._tick * 1000),
            force_polling=self._polling or None,  # None: where it knows no other way
            poll_delay_ms=int(POLL_SECONDS * 1000),
            ignore_permission_denied=True,
        )


def _note(changes: Iterable[tuple[int, str]], folders: Sequence[_Watched], library: Path) -> None:
    for change, name in changes:
        path = Path(name)
        for folder in folders:
            if path == folder.path:
                if change == _DELETED:  # one of the same name and number may be there already
                    folder.identity = _UNKNOWN
            elif (
                path.is_relative_to(folder.path)
                and not path.is_relative_to(library)
                and _matters(change, path, path.relative_to(folder.path).parts)
            ):
                folder.changed()


def _matters(change: int, path: Path, parts: Sequence[str]) -> bool:
    """Whether a change below a folder, at `parts` from there, can change what is indexed."""
    if any(map(is_skipped, parts)):
        return False
    if path.suffix.lower() in IMAGE_SUFFIXES or may_be_captions(path.name):
        return True
    # A folder comes and goes with all that is in it. Of what is gone nobody knows what it was.
    return change == _DELETED or (change == _ADDED and os.path.isdir(path))  # noqa: PTH112
