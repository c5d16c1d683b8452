"""Decoding in child processes: the same pictures, and what becomes of those that break one."""

import io
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import COLOURS, paint
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import retriever.workers
from retriever.data import Decoded, Facts, read_image
from retriever.encoders import open_picture
from retriever.errors import PictureError, RetrieverError
from retriever.preprocessing import INTERPOLATIONS, RESIZE_MODES, Preprocessing
from retriever.workers import DecodeWorkers, _received, _Worker

ROOT = Path(__file__).parents[1]
POSIX = pytest.mark.skipif(os.name != "posix", reason="signals are those of POSIX")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc, bounds memory")


@pytest.fixture
def workers() -> Iterator[DecodeWorkers]:
    with DecodeWorkers(2) as made:
        yield made


def endless_jpeg(path: Path, *, scans: int = 20_000) -> Path:
    """A valid progressive JPEG of 300 kB that decodes for minutes: the last scan, over and over.

    A scan that changes nothing takes 15 bytes or so, and visits each of the picture's blocks.
    """
    buffer = io.BytesIO()
    Image.new("RGB", (3000, 3000), "red").save(buffer, "JPEG", progressive=True)
    content = buffer.getvalue()
    scan = content[content.rindex(b"\xff\xda") : -2]
    path.write_bytes(content[:-2] + scan * scans + content[-2:])
    return path


def pids(workers: DecodeWorkers) -> list[int]:
    return [one._process.pid for one in workers._workers if one._process]


def is_decoding(workers: DecodeWorkers) -> bool:
    """Whether a process has begun with a picture for which it has more time than for its start."""
    return any(500 < one._deadline - time.monotonic() < 1000 for one in workers._workers)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until(holds: Callable[[], object], *, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "never came true"
        time.sleep(0.01)


def told(read: Callable[[], object]) -> str:
    with pytest.raises(PictureError) as caught:
        read()
    return str(caught.value)


# ── The same as here ─────────────────────────────────────────────────────────────────────────────


def assert_same(one: Decoded, other: Decoded) -> None:
    assert one.image.mode == other.image.mode == "RGB"
    assert np.array_equal(np.asarray(one.image), np.asarray(other.image))
    assert other.image.info == {}
    for field in ("width", "height", "taken", "descriptions", "facts"):
        assert getattr(one, field) == getattr(other, field)


@pytest.mark.parametrize("target", [None, 8, 100])
def test_a_picture_is_the_same_pixel_for_pixel_with_date_and_descriptions(
    workers: DecodeWorkers, tmp_path: Path, target: int | None
) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x0110] = 6, "Camera 1"
    exif.get_ifd(0x8825).update({1: "N", 2: (1.0, 30.0, 0.0), 3: "W", 4: (2.0, 15.0, 0.0)})
    exif[0x9C9C] = "a café by the sea 🙂".encode("utf-16-le")
    exif.get_ifd(0x8769)[0x9003] = "2024:02:29 23:59:58"
    noise = np.random.default_rng(0).integers(0, 256, (300, 410, 3), dtype=np.uint8)
    for kind in ("jpg", "png", "webp", "gif", "tiff", "bmp", "avif", "jp2"):
        path = tmp_path / f"a.{kind}"
        Image.fromarray(noise).save(path, exif=exif)
        assert_same(read_image(path, target=target), workers.read(path, target=target))
    read = workers.read(tmp_path / "a.jpg", target=target)
    assert (read.width, read.height, str(read.taken)) == (300, 410, "2024-02-29 23:59:58")
    assert [one.text for one in read.descriptions] == ["a café by the sea 🙂"]
    assert (read.facts.camera, read.facts.latitude, read.facts.longitude) == (
        "Camera 1",
        1.5,
        -2.25,
    )


@pytest.mark.parametrize("resize", RESIZE_MODES)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_a_finished_picture_is_what_an_encoder_would_make_of_the_file(
    workers: DecodeWorkers, tmp_path: Path, resize: str, interpolation: str
) -> None:
    preprocessing = Preprocessing(32, resize, interpolation, fill=9)
    rng = np.random.default_rng(0)
    for number, shape in enumerate([(300, 410), (31, 900), (7, 5), (32, 32), (65, 64), (1, 1)]):
        for kind in ("jpg", "png"):
            path = tmp_path / f"{number}.{kind}"
            Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8)).save(path)
            plain = np.asarray(preprocessing.prepared(open_picture(path, target=32)))
            read = workers.read(path, preprocessing=preprocessing)
            assert np.array_equal(np.asarray(read.image), plain)
            assert (read.height, read.width) == shape
            # The encoder that is given it changes nothing.
            assert np.array_equal(np.asarray(preprocessing.prepared(read.image)), plain)


def test_a_picture_is_finished_here_as_well_where_no_process_starts(
    workers: DecodeWorkers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = paint(tmp_path / "a.png", "red", side=90)
    preprocessing = Preprocessing(16, "shortest", "bicubic")
    expected = workers.read(path, preprocessing=preprocessing)
    monkeypatch.setattr(sys, "executable", "")
    with DecodeWorkers(1) as none:
        assert_same(expected, none.read(path, preprocessing=preprocessing))
        assert pids(none) == []


def test_only_finished_pixels_cross_the_pipe(
    workers: DecodeWorkers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[int] = []
    exactly = retriever.workers._exactly

    def counting(pipe: Any, length: int) -> bytes:
        passed.append(length)
        return exactly(pipe, length)

    monkeypatch.setattr(retriever.workers, "_exactly", counting)
    path = paint(tmp_path / "a.jpg", "red", side=2000)
    workers.read(path, preprocessing=Preprocessing(224, "squash", "bicubic"))
    assert sum(passed) < 224 * 224 * 3 + 1000


def test_a_single_pixel_and_a_large_picture_pass(workers: DecodeWorkers, tmp_path: Path) -> None:
    for number, side in enumerate((1, 2500)):
        path = paint(tmp_path / f"{number}.png", "cyan", side=side)
        assert_same(read_image(path), workers.read(path))


@pytest.mark.parametrize(
    "content", [b"", b"words\n", b"\x89PNG\r\n\x1a\n and then nothing", b"BM but no bitmap", None]
)
def test_a_picture_that_cannot_be_read_is_refused_in_the_same_words(
    workers: DecodeWorkers, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "a: b.jpg"
    if content is not None:
        path.write_bytes(content)
    assert told(lambda: workers.read(path)) == told(lambda: read_image(path))
    assert told(lambda: workers.read(tmp_path)) == f"{tmp_path}: not a file"
    assert pids(workers) == pids(workers)


@pytest.mark.parametrize("name", ["a\nb.png", "'\";$(x).png", "🦊.png", "\udce9.png", "e" * 251])
def test_any_name_reaches_the_process(workers: DecodeWorkers, tmp_path: Path, name: str) -> None:
    made = paint(tmp_path / "made.png", "red")
    try:
        path = made.rename(tmp_path / name)
    except (OSError, UnicodeError):
        pytest.skip("this file system does not take such names")
    assert_same(read_image(path), workers.read(path))


def test_a_path_is_relative_to_where_the_caller_is_now(
    workers: DecodeWorkers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers.read(paint(tmp_path / "a.png", "red"))
    paint(tmp_path / "deeper" / "b.png", "blue", side=5)
    monkeypatch.chdir(tmp_path / "deeper")
    assert workers.read(Path("b.png")).width == 5
    assert told(lambda: workers.read(Path("c.png"))) == "c.png: No such file or directory"


def test_threads_get_the_picture_they_asked_for(workers: DecodeWorkers, tmp_path: Path) -> None:
    colours = list(COLOURS)
    paths = [paint(tmp_path / f"{i}.png", colours[i % 7], side=50 + i) for i in range(40)]
    with ThreadPoolExecutor(6) as threads:
        for _ in range(3):
            for i, read in enumerate(threads.map(workers.read, paths)):
                assert (read.width, read.image.getpixel((9, 9))) == (
                    50 + i,
                    COLOURS[colours[i % 7]],
                )
    assert len(pids(workers)) == 2


def test_processes_start_when_they_are_needed_and_end_with_the_pool(tmp_path: Path) -> None:
    path = paint(tmp_path / "a.png", "red")
    with DecodeWorkers(4) as workers:
        assert pids(workers) == []
        for _ in range(5):
            workers.read(path)
        (pid,) = pids(workers)
    assert pids(workers) == []
    assert not is_alive(pid)
    assert not [one for one in threading.enumerate() if one is workers._watch]
    workers.close()
    with pytest.raises(RuntimeError, match="closed"):
        workers.read(path)


# ── Pictures that break a decoder ────────────────────────────────────────────────────────────────


def test_a_picture_that_takes_too_long_is_given_up_and_the_next_is_read(tmp_path: Path) -> None:
    slow, good = endless_jpeg(tmp_path / "slow.jpg"), paint(tmp_path / "good.png", "red")
    with DecodeWorkers(1, seconds=0.5) as workers:
        workers.read(good)
        begun = time.monotonic()
        assert told(lambda: workers.read(slow)) == f"{slow}: took longer than 0.5 s to decode"
        assert time.monotonic() - begun < 10  # once, not twice, and stopped at its time
        assert_same(read_image(good), workers.read(good))


def test_other_threads_go_on_meanwhile(tmp_path: Path) -> None:
    slow, good = endless_jpeg(tmp_path / "slow.jpg"), paint(tmp_path / "good.png", "red")
    with DecodeWorkers(2, seconds=2) as workers, ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(workers.read, slow)
        for _ in range(20):
            assert workers.read(good).width == 8
        assert not waiting.done()
        assert "took longer than 2 s" in told(waiting.result)


@LINUX
@pytest.mark.parametrize("target", [None, 8])
def test_a_picture_that_needs_too_much_memory_is_refused_and_the_next_is_read(
    tmp_path: Path, target: int | None
) -> None:
    large, good = paint(tmp_path / "a.png", "red", side=4000), paint(tmp_path / "b.png", "red")
    with DecodeWorkers(1, memory_bytes=100 << 20) as workers:
        message = f"{large}: needs more memory than 100 MB to decode"
        assert told(lambda: workers.read(large, target=target)) == message
        pid = pids(workers)
        assert_same(read_image(good), workers.read(good))
        assert pids(workers) == pid


@POSIX
@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (signal.SIGKILL, "its decoder was killed, perhaps because memory ran out"),
        (signal.SIGSEGV, "its decoder crashed (Segmentation fault)"),
        (signal.SIGABRT, "its decoder crashed (Aborted)"),
    ],
)
def test_a_picture_whose_decoder_crashes_twice_is_refused_and_the_next_is_read(
    tmp_path: Path, number: signal.Signals, reason: str
) -> None:
    slow, good = endless_jpeg(tmp_path / "slow.jpg"), paint(tmp_path / "good.png", "red")
    with DecodeWorkers(1, seconds=600) as workers, ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(workers.read, slow)
        for _ in range(2):
            wait_until(lambda: is_decoding(workers))
            (pid,) = pids(workers)
            os.kill(pid, number)
            wait_until(lambda pid=pid: pid not in pids(workers))
        assert told(waiting.result) == f"{slow}: {reason}"
        assert_same(read_image(good), workers.read(good))


@POSIX
def test_a_picture_whose_process_is_killed_is_read_by_the_next_one(tmp_path: Path) -> None:
    path = endless_jpeg(tmp_path / "slow.jpg", scans=40)
    with DecodeWorkers(1, seconds=600) as workers, ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(workers.read, path)
        wait_until(lambda: pids(workers))
        os.kill(pids(workers)[0], signal.SIGKILL)  # as it starts
        wait_until(lambda: is_decoding(workers))
        os.kill(pids(workers)[0], signal.SIGKILL)
        assert_same(read_image(path), waiting.result())
        os.kill(pids(workers)[0], signal.SIGKILL)  # between two pictures
        assert workers.read(paint(tmp_path / "good.png", "red")).width == 8


@POSIX
def test_what_interrupts_the_user_program_leaves_the_processes_to_it(
    workers: DecodeWorkers, tmp_path: Path
) -> None:
    path = paint(tmp_path / "a.png", "red")
    workers.read(path)
    (pid,) = pids(workers)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(pid, number)
        assert workers.read(path).width == 8
    assert pids(workers) == [pid]
    assert os.getpgid(pid) != os.getpgid(0)


def test_closing_stops_a_read_that_is_under_way(tmp_path: Path) -> None:
    slow = endless_jpeg(tmp_path / "slow.jpg")
    with ThreadPoolExecutor(1) as threads:
        with DecodeWorkers(1) as workers:
            waiting = threads.submit(workers.read, slow)
            wait_until(lambda: pids(workers))
        with pytest.raises(RuntimeError, match="closed"):
            waiting.result(timeout=20)
    assert pids(workers) == []


# ── Processes ────────────────────────────────────────────────────────────────────────────────────

# As a user writes it: no guard, so that a process which ran the script again would never end.
SCRIPT = """
import os, sys, time
from pathlib import Path
from retriever.workers import DecodeWorkers
workers = DecodeWorkers(2, seconds=1)
print(workers.read(Path(sys.argv[1])).width, flush=True)
print(*[one._process.pid for one in workers._workers if one._process], flush=True)
if len(sys.argv) > 2:
    workers.read(Path(sys.argv[2]))
time.sleep(60)
"""


def start_script(tmp_path: Path, *arguments: Path) -> subprocess.Popen[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, script, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


@LINUX
@pytest.mark.parametrize("is_decoding", [False, True])
def test_a_process_ends_soon_after_its_parent_was_killed(tmp_path: Path, is_decoding: bool) -> None:
    paths = [paint(tmp_path / "a.png", "red")]
    paths += [endless_jpeg(tmp_path / "slow.jpg")] if is_decoding else []
    with start_script(tmp_path, *paths) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "8\n"
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.kill()
    wait_until(lambda: not is_alive(pid), seconds=10)


@LINUX
def test_a_process_that_ends_while_it_is_found_late_is_no_fault() -> None:
    class Ending(_Worker):
        """Has its process taken away by the thread that it serves, as soon as it is looked at."""

        def __getattribute__(self, name: str) -> Any:
            found = super().__getattribute__(name)
            if name == "_process" and found:
                self._process = None
            return found

    worker = Ending(1.0, 1 << 30)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        worker._deadline, worker._process = 0, process
        worker.kill_if_late()
    assert process.returncode


@pytest.mark.parametrize("fill", [-1, 256, 0.5, "black"])
def test_a_grey_level_that_is_none_is_refused(fill: Any) -> None:
    with pytest.raises(ValueError, match="no picture can be prepared"):
        Preprocessing(32, "longest", "bicubic", fill)


def test_a_process_holds_no_file_of_its_parent(workers: DecodeWorkers, tmp_path: Path) -> None:
    path = paint(tmp_path / "a.png", "red")
    with (tmp_path / "lock").open("w") as lock:
        os.set_inheritable(lock.fileno(), True)
        workers.read(path)
        (pid,) = pids(workers)
        held = [str(one.readlink()) for one in Path(f"/proc/{pid}/fd").iterdir()]
    assert sorted(one.partition(":")[0] for one in held) == ["/dev/null"] * 3 + ["pipe"] * 2


def test_nothing_is_imported_from_the_working_folder(
    workers: DecodeWorkers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("json", "PIL", "retriever"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('this came with the pictures')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])  # as in an interactive session
    assert workers.read(paint(tmp_path / "a.png", "red")).width == 8
    assert len(pids(workers)) == 1


def test_what_a_decoder_prints_does_not_reach_the_terminal(
    workers: DecodeWorkers, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.tiff"
    Image.new("RGB", (64, 64), "red").save(path, compression="tiff_lzw")
    path.write_bytes(path.read_bytes().replace(b"\x80", b"\x7f"))
    here = told(lambda: read_image(path))
    assert "tif" in capfd.readouterr().err.lower()  # here libtiff's own line is seen
    assert told(lambda: workers.read(path)) == here
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("executable", ["", "/no/such/python", sys.executable + "/", None])
def test_without_an_interpreter_pictures_are_decoded_here(
    workers: DecodeWorkers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executable: str | None
) -> None:
    if executable is None:
        monkeypatch.setattr(sys, "frozen", True, raising=False)
    else:
        monkeypatch.setattr(sys, "executable", executable)
    path = paint(tmp_path / "a.png", "red")
    assert_same(read_image(path), workers.read(path))
    assert pids(workers) == []


@POSIX
def test_a_program_that_is_no_interpreter_is_found_out(
    workers: DecodeWorkers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "host"
    program.write_text("#!/bin/sh\necho I am the program that embeds Python\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    assert workers.read(paint(tmp_path / "a.png", "red")).width == 8
    assert pids(workers) == []


@POSIX
def test_where_there_was_a_process_once_nothing_is_decoded_here(
    workers: DecodeWorkers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = paint(tmp_path / "a.png", "red")
    workers.read(path)
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    os.kill(pids(workers)[0], signal.SIGKILL)
    with pytest.raises(RetrieverError, match="no process can be started to decode in"):
        workers.read(path)


# ── Answers are not believed ─────────────────────────────────────────────────────────────────────


def answer(header: object, pixels: bytes = b"") -> bytes:
    data = json.dumps(header).encode()
    return struct.pack("<I", len(data)) + data + pixels


WHOLE = {
    **{"size": [1, 2], "width": 3, "height": 4, "taken": None, "descriptions": [["a", "exif"]]},
    "facts": ["NIKON D90", -12.5, 13, 5],
}


def test_an_answer_as_it_should_be_is_a_picture() -> None:
    read = _received(io.BytesIO(answer(WHOLE, b"abcdef")))
    assert isinstance(read, Decoded)
    assert read.image.tobytes() == b"abcdef"
    assert (read.width, read.height, read.descriptions[0].text) == (3, 4, "a")
    assert read.facts == Facts("NIKON D90", -12.5, 13.0, 5)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0",
        struct.pack("<I", 2**32 - 1) + b"{}",  # 4 GiB, of which there are two bytes
        answer([]),
        answer({}),
        answer(WHOLE, b"abcde"),
        answer({**WHOLE, "size": [2**31, 2**31]}),
        answer({**WHOLE, "size": [-1, -2]}),
        answer({**WHOLE, "size": [1e999, 1]}),
        answer({**WHOLE, "size": "12"}, b"abc"),
        answer({**WHOLE, "taken": "yesterday"}, b"abcdef"),
        answer({**WHOLE, "descriptions": [["a"]]}, b"abcdef"),
        answer({**WHOLE, "facts": [None, None, None]}, b"abcdef"),
        answer({**WHOLE, "facts": [None, 91, 0, 0]}, b"abcdef"),
        answer({**WHOLE, "facts": [None, None, None, 2**63]}, b"abcdef"),
        answer({**WHOLE, "facts": [None, None, None, "x"]}, b"abcdef"),
        struct.pack("<I", 200_000) + b"[" * 200_000,
    ],
)
@POSIX
def test_an_answer_that_makes_no_sense_is_the_end_of_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    (tmp_path / "answer").write_bytes(data)
    program = tmp_path / "liar"
    program.write_text(
        f"#!/bin/sh\nprintf '\\002\\000\\000\\000{{}}'\ncat '{tmp_path}/answer'\nexec sleep 60\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr("retriever.workers._GRACE_SECONDS", 0.05)
    path = tmp_path / "a.png"
    with DecodeWorkers(1, seconds=0.2) as workers:
        assert told(lambda: workers.read(path)).startswith(f"{path}: ")
        assert pids(workers) == []


@given(st.binary(max_size=100), st.booleans())
def test_whatever_bytes_come_back_nothing_but_an_ordinary_exception_is_raised(
    data: bytes, has_length: bool
) -> None:
    with suppress(Exception):
        _received(io.BytesIO(struct.pack("<I", len(data)) + data if has_length else data))
