"""Small pictures, made when they are first asked for and kept on disk within a bound."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from retriever.sheets import small_jpeg

if TYPE_CHECKING:
    from PIL import Image

SIZES = (160, 320, 640, 1280)  # pixels of the longer side
_SWEEP = 0.8  # of the bound is left after a sweep, so that the next is not due at once


class Thumbnails:
    """JPEG files in a folder of their own; those used longest ago go first.

    Several servers may share the folder: files appear whole, and one that another has removed is
    made again.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self._folder = folder
        self._most_bytes = most_bytes
        self._guard = threading.Lock()
        self._bytes: int | None = None

    def get(self, key: str, size: int, make: Callable[[], Image.Image]) -> bytes:
        """The JPEG of a picture, at most `size` pixels on its longer side.

        Args:
            key: stands for the picture's content; letters and digits.
            size: one of SIZES.
            make: gives the picture, at least as large if it is; asked only where there is no file.

        Raises what `make` raises. A disk that is full or read-only costs time, not the answer.
        """
        assert size in SIZES
        file = self._folder / key[:2] / f"{key}-{size}.jpg"
        with suppress(OSError):
            found = file.read_bytes()
            os.utime(file)  # many systems do not keep the time of the last reading
            return found
        data = small_jpeg(make(), size, progressive=size > SIZES[1])
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            # Never seen half-written; of a cache nothing needs to outlive a power cut.
            beside = file.with_suffix(f".{os.getpid()}-{threading.get_ident()}.tmp")
            beside.write_bytes(data)
            beside.replace(file)
            self._grown_by(len(data))
        return data

    def _grown_by(self, count: int) -> None:
        with self._guard:
            if self._bytes is None:
                self._bytes = sum(size for _, size, _ in self._files())
            else:
                self._bytes += count
            if self._bytes <= self._most_bytes:
                return
            files = sorted(self._files())
            self._bytes = sum(size for _, size, _ in files)
            for _, size, file in files:
                if self._bytes <= _SWEEP * self._most_bytes:
                    break
                with suppress(OSError):
                    file.unlink()
                    self._bytes -= size

    def _files(self) -> list[tuple[int, int, Path]]:
        """(last use in ns, bytes, file) of all there are."""
        found = []
        for file in self._folder.glob("??/*.jpg"):
            with suppress(OSError):
                status = file.stat()
                found.append((status.st_mtime_ns, status.st_size, file))
        return found
