"""Decoding in child processes: a picture that crashes its decoder, hangs it or fills the memory
costs that one picture, and nothing else.

A decoder is C code that reads bytes which nobody has checked. In the process of the user, its crash
would end the run, its endless loop could not be stopped, and its memory would be that of everyone.
So each thread that decodes has a child process of its own, which does what `read_image` does and
sends back the pixels; if it is told how a model wants them, only those that the model reads.

The children are plain interpreters at the other end of two pipes, not of `multiprocessing`: that
would run the user's script again in each of them unless it has a `__main__` guard. Nothing is
pickled. A request is the target and the path; an answer is a JSON header, whose length and sizes
are checked before they are believed, and raw RGB bytes.
"""

from __future__ import annotations

import json
import math
import os
import queue
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import IO, Any, BinaryIO

from PIL import Image

from retriever.data import Caption, Decoded, Facts, read_image
from retriever.decoding import MAX_PIXELS
from retriever.errors import PictureError, RetrieverError, printable
from retriever.preprocessing import INTERPOLATIONS, RESIZE_MODES, Preprocessing

SECONDS = 60.0
MEMORY_BYTES = 4 << 30

_START_SECONDS = 60.0  # for an interpreter on a cold, slow disk
_GRACE_SECONDS = 2.0
_WATCH_SECONDS = 0.25
_PIPE_BYTES = 1 << 20  # most pictures pass in one go; what systems allow anyone
_MAX_HEADER_BYTES = 64 << 20  # descriptions inside the picture, mostly none
# Target in pixels or 0; resize mode and interpolation, as their numbers from 1, or 0; fill; length
# of the path that follows, in bytes.
_REQUEST = struct.Struct("<IBBBI")
_LENGTH = struct.Struct("<I")

_ENVIRONMENT = {
    # Or address space is set aside for each core, however little of it is used.
    "MALLOC_ARENA_MAX": "2",
    "OPENBLAS_NUM_THREADS": "1",
    # Memory of one picture serves the next: to have it zeroed anew takes as long as small ones do.
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
}

# In a group of its own a child is not even reached by the Ctrl-C that comes while it starts.
_APART: dict[str, Any] = {"process_group": 0}
if sys.platform == "win32":
    _APART = {"creationflags": subprocess.CREATE_NO_WINDOW | subprocess.CREATE_NEW_PROCESS_GROUP}

# Not `-m`: the working folder is often the folder of pictures, and nothing is imported from there.
_COMMAND = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
    " from retriever.workers import serve; serve(float(sys.argv[2]), int(sys.argv[3]))"
)


class DecodeWorkers:
    """`read_image` in child processes, with a bound on the time and memory of each picture.

    Thread-safe. A process starts when a thread first needs one, serves one picture at a time, and
    is replaced when it ends. Where no process can be started at all (a frozen program, an embedded
    interpreter, a system that forbids it) pictures are decoded here, without bounds. Memory is
    bounded where the platform can do that, which macOS and Windows cannot.

    Args:
        count: processes at most; more threads than that wait for each other.
        seconds: a picture that takes longer is given up.
        memory_bytes: address space of a process, itself included (about 60 MB).
    """

    def __init__(
        self, count: int, *, seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES
    ) -> None:
        self._seconds = seconds
        self._memory_bytes = memory_bytes
        self._workers = [_Worker(seconds, memory_bytes) for _ in range(count)]
        # Last in, first out: a process that is not needed is not started.
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._any_started = False
        self._closed = threading.Event()
        self._watch: threading.Thread | None = None

    def __enter__(self) -> DecodeWorkers:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def read(
        self,
        path: Path,
        *,
        target: int | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> Decoded:
        """As `retriever.data.read_image`, pixel for pixel.

        Args:
            path: as there.
            target: as there.
            preprocessing: have the picture read for its size and made ready by it.

        Raises:
            PictureError: as there, or the picture took too long, needs too much memory or crashed
                its decoder, twice, because the first time may have been the fault of another.
            RetrieverError: no further process can be started.
            RuntimeError: closed, perhaps while the picture was being read.
        """
        worker = self._idle.get()
        try:
            return self._read(worker, _Wish(path, target, preprocessing))
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Ends the processes, those included that are reading."""
        with self._idle.mutex:  # or the watch might be about to start
            self._closed.set()
        for worker in self._workers:
            worker.end()
        if self._watch:
            self._watch.join()

    def _read(self, worker: _Worker, wish: _Wish) -> Decoded:
        fault = ""
        for _ in range(2):
            if not self._is_ready(worker):
                return wish.fulfilled()
            try:
                return worker.read(wish)
            except _EndedError as exc:
                if self._closed.is_set():
                    raise RuntimeError("closed while a picture was being read") from None
                fault = str(exc)
                if exc.is_final:
                    break
        raise PictureError(f"{printable(wish.path)}: {fault}")

    def _is_ready(self, worker: _Worker) -> bool:
        """Whether there is a process to decode in; raises RetrieverError if only once there was."""
        self._start_watching()
        fault: Exception | None = None
        for _ in range(2):  # what ended the first may have been meant for another
            if worker.is_running or self._closed.is_set():
                break
            try:
                worker.start()
            except (OSError, _EndedError) as exc:
                fault = exc
        if self._closed.is_set():
            worker.end()
            raise RuntimeError("these workers are closed")
        if not worker.is_running and self._any_started:
            raise RetrieverError(f"no process can be started to decode in: {fault}") from fault
        self._any_started |= worker.is_running
        return worker.is_running

    def _start_watching(self) -> None:
        with self._idle.mutex:
            if self._watch is None and not self._closed.is_set():
                self._watch = threading.Thread(target=self._keep_time, daemon=True)
                self._watch.start()

    def _keep_time(self) -> None:
        # One thread looks at all of them: to start a timer for each picture would cost as much as
        # to pass on its pixels.
        while not self._closed.wait(min(_WATCH_SECONDS, self._seconds / 4)):
            for worker in self._workers:
                worker.kill_if_late()


@dataclass(frozen=True, slots=True)
class _Wish:
    """A picture that is asked for."""

    path: Path
    target: int | None
    preprocessing: Preprocessing | None

    def fulfilled(self) -> Decoded:
        """The picture, decoded here; raises PictureError or MemoryError."""
        if self.preprocessing is None:
            return read_image(self.path, target=self.target)
        decoded = read_image(self.path, target=self.preprocessing.size)
        return replace(decoded, image=self.preprocessing.prepared(decoded.image))

    def packed(self) -> bytes:
        """The request for it; the path is made absolute, for the process may be elsewhere."""
        name = os.fsencode(self.path.absolute())
        fields = (self.target or 0, 0, 0, 0)
        if one := self.preprocessing:
            resize = RESIZE_MODES.index(one.resize) + 1
            fields = (one.size, resize, INTERPOLATIONS.index(one.interpolation) + 1, one.fill)
        return _REQUEST.pack(*fields, len(name)) + name

    @classmethod
    def received(cls, requests: BinaryIO) -> _Wish | None:
        """What `packed` has sent, or None at the end of all requests."""
        request = requests.read(_REQUEST.size)
        if not request:
            return None
        target, resize, interpolation, fill, length = _REQUEST.unpack(request)
        path = Path(os.fsdecode(requests.read(length)))
        if not resize:
            return cls(path, target or None, None)
        modes = RESIZE_MODES[resize - 1], INTERPOLATIONS[interpolation - 1]
        return cls(path, None, Preprocessing(target, *modes, fill))


class _EndedError(Exception):
    """A process gave no answer; `is_final`: it would not give one the next time either."""

    def __init__(self, reason: str, *, is_final: bool = False) -> None:
        super().__init__(reason)
        self.is_final = is_final


class _Worker:
    """One child process at a time and the pipes to it, used by one thread at a time."""

    def __init__(self, seconds: float, memory_bytes: int) -> None:
        self._seconds = seconds
        self._memory_bytes = memory_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._deadline = math.inf
        self._is_late = False
        self._lock = threading.Lock()  # of the last two, or it might be the next picture's end

    @property
    def is_running(self) -> bool:
        return self._process is not None

    def start(self) -> None:
        """Raises OSError or _EndedError if that cannot be done."""
        if not sys.executable or getattr(sys, "frozen", False):
            raise OSError("there is no interpreter of its own")
        folders = [*filter(None, sys.path), str(Path(__file__).parents[1])]
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-P", "-c", _COMMAND),
                json.dumps([os.path.abspath(folder) for folder in folders]),  # noqa: PTH100
                *(str(self._seconds), str(self._memory_bytes)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # libtiff and others print what they think of a file
            env={**os.environ, **_ENVIRONMENT},
            **_APART,
        )
        with self._exchange(_START_SECONDS) as (_, answers):
            with suppress(ImportError, AttributeError, OSError):
                import fcntl

                fcntl.fcntl(answers, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            _header(answers)

    def read(self, wish: _Wish) -> Decoded:
        """Raises PictureError as `read_image` does, or _EndedError."""
        with self._exchange(self._seconds) as (requests, answers):
            requests.write(wish.packed())
            requests.flush()
            found = _received(answers)
        if isinstance(found, Decoded):
            return found
        reason = found or f"needs more memory than {self._memory_bytes >> 20:,} MB to decode"
        raise PictureError(f"{printable(wish.path)}: {reason}")

    def kill_if_late(self) -> None:
        with self._lock:
            process = self._process  # once: the thread that it serves may end it meanwhile
            if time.monotonic() > self._deadline and process:
                self._is_late = True
                process.kill()

    def end(self) -> None:
        process, self._process = self._process, None
        if process:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):  # a request that was never taken
                    _open(pipe).close()

    @contextmanager
    def _exchange(self, seconds: float) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
        """The pipes to and from the process, which ends if anything goes wrong in the block."""
        process = self._process
        if process is None:
            raise _EndedError("its decoder was closed")
        self._set_deadline(time.monotonic() + seconds)
        try:
            yield _open(process.stdin), _open(process.stdout)
        except BaseException as exc:
            is_late = self._is_late
            reason = f"took longer than {seconds:g} s to decode" if is_late else _fate(process)
            self.end()  # half an answer may still be on its way
            if not isinstance(exc, Exception):
                raise
            # An answer that is cut off, or that makes no sense: parsing it raises whatever it does.
            raise _EndedError(reason, is_final=is_late) from exc
        finally:
            self._set_deadline(math.inf)

    def _set_deadline(self, deadline: float) -> None:
        with self._lock:
            self._deadline, self._is_late = deadline, False


def _open(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


def _fate(process: subprocess.Popen[bytes]) -> str:
    """Why a process that does not answer has ended."""
    try:
        code = process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        return "its decoder answered nonsense"
    if code == -9:
        return "its decoder was killed, perhaps because memory ran out"
    how = signal.strsignal(-code) if code < 0 else f"exit status {code}"
    return f"its decoder crashed ({how})"


# ── Between the processes ────────────────────────────────────────────────────────────────────────


def _received(answers: IO[bytes]) -> Decoded | str | None:
    """A picture, why it cannot be read, or None if memory was short."""
    header = _header(answers)
    if "reason" in header:
        reason = header["reason"]
        return None if reason is None else str(reason)
    columns, rows = map(int, header["size"])
    if min(columns, rows) < 1 or columns * rows > MAX_PIXELS:
        raise ValueError(f"{columns} × {rows} pixels")
    pixels = _exactly(answers, 3 * columns * rows)
    return Decoded(
        Image.frombytes("RGB", (columns, rows), pixels),
        int(header["width"]),
        int(header["height"]),
        datetime.fromisoformat(header["taken"]) if header["taken"] else None,
        tuple(Caption(str(text), str(source)) for text, source in header["descriptions"]),
        _facts(*header["facts"]),
    )


def _facts(
    camera: object, latitude: float | None, longitude: float | None, perceptual_hash: int
) -> Facts:
    """Raises ValueError, TypeError or OverflowError for what is no fact of any picture."""
    if latitude is not None or longitude is not None:
        latitude, longitude = float(latitude or 0), float(longitude or 0)
        if not abs(latitude) <= 90 or not abs(longitude) <= 180:  # True for NaN
            raise ValueError(f"{latitude}, {longitude} is no place")
    perceptual_hash.to_bytes(8, signed=True)
    return Facts(None if camera is None else str(camera), latitude, longitude, perceptual_hash)


def _header(answers: IO[bytes]) -> dict[str, Any]:
    (length,) = _LENGTH.unpack(_exactly(answers, _LENGTH.size))
    if length > _MAX_HEADER_BYTES:
        raise ValueError(f"a header of {length:,} bytes")
    header = json.loads(_exactly(answers, length))
    if not isinstance(header, dict):
        raise TypeError("no header")
    return header


def _exactly(pipe: IO[bytes], length: int) -> bytes:
    data = pipe.read(length)
    if len(data) < length:
        raise EOFError
    return data


def serve(seconds: float, memory_bytes: int) -> None:
    """The child's side: answers requests from standard input until that is closed."""
    # Ctrl-C and the end of a session go to all processes; it is for the parent to say what is lost.
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
        if number := getattr(signal, name, None):
            signal.signal(number, signal.SIG_IGN)
    requests = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nothing that is printed mixes with the answers
    with suppress(OSError):  # if memory runs out all the same, Linux ends this process first
        Path("/proc/self/oom_score_adj").write_text("500")
    _bound_memory(memory_bytes)
    _send(answers, {})
    while wish := _Wish.received(requests):
        # The parent kills a process that is late. If the parent is gone, the alarm does.
        _alarm(seconds + _GRACE_SECONDS)
        header, pixels = _answer(wish)
        _send(answers, header, pixels)
        _alarm(0)


def _alarm(seconds: float) -> None:
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _bound_memory(memory_bytes: int) -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY:
        memory_bytes = min(memory_bytes, most)
    with suppress(ValueError, OSError):  # macOS knows the limit, but takes none
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, most))


def _answer(wish: _Wish) -> tuple[dict[str, Any], bytes]:
    try:
        decoded = wish.fulfilled()
        pixels = decoded.image.tobytes()
    except PictureError as exc:
        if isinstance(exc.__cause__, MemoryError):
            return {"reason": None}, b""
        return {"reason": str(exc).removeprefix(f"{printable(wish.path)}: ")}, b""
    except MemoryError:
        return {"reason": None}, b""
    header = {
        "size": decoded.image.size,
        "width": decoded.width,
        "height": decoded.height,
        "taken": decoded.taken.isoformat() if decoded.taken else None,
        "descriptions": [(one.text, one.source) for one in decoded.descriptions],
        "facts": astuple(decoded.facts),
    }
    return header, pixels


def _send(answers: BinaryIO, header: dict[str, Any], pixels: bytes = b"") -> None:
    data = json.dumps(header).encode()
    answers.write(_LENGTH.pack(len(data)) + data)
    answers.write(pixels)
    answers.flush()
