"""What the server holds: libraries with their models, threads that search, pictures on their way.

Everything that takes longer than a moment runs in a few threads, off the event loop. How much may
wait for them is bounded: beyond that the answer is `BusyError`, at once.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import tempfile
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from indexes.records import ItemRow
from retriever.errors import PictureError, RetrieverError, UsageError
from retriever.library import Library
from retriever.sheets import small_jpeg
from retriever.web.projection import Map
from retriever.web.thumbnails import SIZES, Thumbnails
from retriever.workers import DecodeWorkers

T = TypeVar("T")

MOST_WAITING = 128  # calls that run or wait for a thread
DECODE_SECONDS = 20.0
DECODE_BYTES = 2 << 30
# What browsers show as it is, by the format that Pillow finds in the file. Not SVG, which may hold
# scripts; Pillow does not read it either.
SHOWN_AS_IS = {
    "JPEG": "image/jpeg",
    "PNG": "image/png",
    "GIF": "image/gif",
    "WEBP": "image/webp",
    "AVIF": "image/avif",
}
MOST_BYTES_AS_IS = 64 << 20
_QUERY_SIDE = 768  # pixels; more than any encoder reads


class NotFoundError(RetrieverError):
    """There is no such library, or no such picture in it."""


class BusyError(RetrieverError):
    """Too many wait already."""


@dataclass(frozen=True, slots=True)
class Shelf:
    """A library that is served, and what is kept for it."""

    name: str
    library: Library
    map: Map


class Service:
    """The libraries behind one server.

    Args:
        libraries: by the names that they are asked for by; the first is the default.
        cache: a folder for thumbnails and maps; it may be deleted at any time.
        thumbnail_bytes: what thumbnails may take there.
        threads: that search and look at pictures.
    """

    def __init__(
        self,
        libraries: Mapping[str, Library],
        cache: Path,
        *,
        thumbnail_bytes: int,
        threads: int | None = None,
    ) -> None:
        count = threads or max(2, min(8, os.cpu_count() or 2))
        self._maps = cache / "maps"
        self.shelves = {name: self._shelf(name, library) for name, library in libraries.items()}
        self._opening = threading.Lock()
        self._thumbnails = Thumbnails(cache / "thumbnails", thumbnail_bytes)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="retriever")
        self._workers = DecodeWorkers(2, seconds=DECODE_SECONDS, memory_bytes=DECODE_BYTES)
        self._guard = threading.Lock()
        self.in_flight = 0

    def close(self) -> None:
        """Ends threads and child processes, and closes the libraries."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._workers.close()
        for shelf in self.shelves.values():
            shelf.library.close()

    def submit(self, function: Callable[..., T], *args: Any) -> Future[T]:
        """Runs a function in a thread; raises BusyError if too many wait.

        What nobody waits for any more still counts until it is done, so that whoever asks and hangs
        up again gains nothing.
        """
        with self._guard:
            if self.in_flight >= MOST_WAITING:
                raise BusyError("too many questions at once: ask again in a second")
            self.in_flight += 1
        try:
            future = self._threads.submit(function, *args)
        except RuntimeError as error:
            self._done()
            raise BusyError("the server is ending") from error
        future.add_done_callback(self._done)
        return future

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """What a function gives, run in a thread; raises BusyError if too many wait."""
        return await asyncio.wrap_future(self.submit(function, *args))

    def _done(self, _future: object = None) -> None:
        with self._guard:
            self.in_flight -= 1

    def shelf(self, name: str | None) -> Shelf:
        """A library by its name, None: the first, seen by its default model; not on the event loop.

        Raises NotFoundError.
        """
        if name is None:
            name = next(iter(self.shelves))
        if name not in self.shelves:
            raise NotFoundError(f"there is no library {name!r} here")
        # What is open goes on to answer after it was deleted.
        if not os.path.isdir(self.shelves[name].library.path):  # noqa: PTH112 (Path's may raise)
            raise NotFoundError(f"the library {name!r} is no longer where it was")
        if not self.shelves[name].library.is_default:  # tuned meanwhile, or another one was chosen
            with self._opening:
                library = self.shelves[name].library
                if not library.is_default:
                    # Others may still be searching the former one, so it is not closed.
                    self.shelves[name] = self._shelf(name, library.reopened())
        return self.shelves[name]

    def _shelf(self, name: str, library: Library) -> Shelf:
        return Shelf(name, library, Map(library, self._maps / f"{_place(library)}.npz"))

    def item(self, shelf: Shelf, item_id: int) -> ItemRow:
        """A picture of a library; raises NotFoundError if it is not, or no longer, in it."""
        found = shelf.library.item(item_id) if item_id < 1 << 63 else None
        if found is None:
            raise NotFoundError(f"there is no picture {item_id} in the library")
        return found

    def uploaded(self, data: bytes) -> Image.Image:
        """The picture in these bytes, decoded in a child process within bounds.

        Raises PictureError.
        """
        if not data:
            raise PictureError("the picture is empty")
        handle, name = tempfile.mkstemp(prefix="retriever-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            try:
                return self._workers.read(Path(name), target=_QUERY_SIDE).image
            except PictureError as error:
                # The name says nothing to whoever sent it.
                raise PictureError(str(error).replace(name, "the picture")) from error
        finally:
            with suppress(OSError):
                Path(name).unlink()

    def thumbnail(self, item: ItemRow, size: int) -> bytes:
        """A picture as a small JPEG; raises UsageError, NotFoundError, PictureError."""
        if size not in SIZES:
            raise UsageError(f"a thumbnail is of {', '.join(map(str, SIZES))} pixels, not {size}")
        return self._thumbnails.get(content_key(item), size, lambda: self.decoded(item, size))

    def decoded(self, item: ItemRow, side: int) -> Image.Image:
        """A picture, smaller if it can be but not below twice `side`.

        Raises NotFoundError, PictureError.
        """
        if not os.path.lexists(item.path):
            raise NotFoundError(f"the file of picture {item.item_id} is gone")
        return self._workers.read(item.path, target=side).image

    def picture(self, item: ItemRow) -> tuple[bytes, str]:
        """A picture for a browser, and its media type: the file itself if that can be shown.

        Raises NotFoundError, PictureError.
        """
        try:
            if item.path.stat().st_size <= MOST_BYTES_AS_IS:
                data = item.path.read_bytes()
                with Image.open(io.BytesIO(data)) as opened:  # reads the header only
                    kind = SHOWN_AS_IS.get(opened.format or "")
                if kind:
                    return data, kind
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            pass  # missing, or of a kind that takes more to read: below, it is told which
        large = self.decoded(item, SIZES[-1])
        return small_jpeg(large, 2 * SIZES[-1], progressive=True), "image/jpeg"


def content_key(item: ItemRow) -> str:
    """Stands for what a picture's file contains, in letters and digits."""
    if item.content_hash:
        return item.content_hash.hex()
    seen = f"{item.path}\0{item.size}\0{item.mtime_ns}"
    return hashlib.blake2b(os.fsencode(seen), digest_size=16).hexdigest()


def _place(library: Library) -> str:
    """Stands for the library's folder, in letters and digits."""
    return hashlib.blake2b(os.fsencode(library.path.resolve()), digest_size=12).hexdigest()
