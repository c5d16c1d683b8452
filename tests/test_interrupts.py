"""Signals to real processes: what is said, what is kept, and that no process is left over."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import paint
from PIL import Image

import cli

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="looks for processes in /proc"
)

ROOT = Path(__file__).parents[1]
COUNT = 128  # pictures: four batches
BATCH = 32
SECONDS = 60
STOPPING = "Stopping after the batch in hand; once more stops at once.\n"
KEPT = (
    "Interrupted. What was indexed so far is kept in {library}; the same command goes on from"
    " there.\n"
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        noise = rng.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{number:03}.png")
    return folder


@pytest.fixture(scope="module")
def undisturbed(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library of `pictures` that nobody changes."""
    path = tmp_path_factory.mktemp("libraries") / "undisturbed.lib"
    assert run("index", pictures, library=path)[0] == 0
    return path


@pytest.fixture
def library(undisturbed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(undisturbed, tmp_path / "photos.lib"))


def run(*args: str | Path, library: Path) -> tuple[int, str]:
    """Exit status and output of a command in this process."""
    env = {"RETRIEVER_LIBRARY": str(library)}
    result = CliRunner().invoke(cli.main, [str(arg) for arg in args], env=env)
    assert isinstance(result.exception, SystemExit | None), result.exception
    return result.exit_code, result.output


def start(command: Sequence[str | Path], library: Path) -> subprocess.Popen[str]:
    """A program of Python's in a process group and a session of its own, as in a new terminal."""
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=os.environ | {"RETRIEVER_LIBRARY": str(library)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A process started in the background may have been told to ignore SIGINT, and hands that
        # on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def count(library: Path) -> int:
    """Pictures in the catalogue; 0 while there is no table yet."""
    return len(rows(library))


def rows(library: Path) -> dict[bytes, tuple[object, ...]]:
    """What is known of each picture, and its embedding, as another process sees them."""
    uri = f"file:{library / 'catalogue.sqlite'}?mode=ro"
    try:
        with closing(sqlite3.connect(uri, uri=True)) as database:
            found = database.execute(
                "SELECT file, size, mtime_ns, content_hash, status, vector FROM items"
                " LEFT JOIN image_embeddings ON owner_id = items.id"
            ).fetchall()
    except sqlite3.OperationalError:
        return {}
    assert len({file for file, *_ in found}) == len(found)
    return {file: tuple(facts) for file, *facts in found}


def members(session: int) -> list[int]:
    """Processes of a session that are alive."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, number, *_ = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(number) == session and state not in "ZX":
            found.append(int(status.parent.name))
    return found


def ends(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit status and outputs of a process, after which nothing of its session is left."""
    stdout, stderr = process.communicate(timeout=SECONDS)
    wait_for(lambda: not members(process.pid))
    assert "Traceback" not in stderr
    return process.returncode, stdout, stderr


def check_goes_on(pictures: Path, library: Path, undisturbed: Path) -> None:
    """What is there is right, and the same command adds what is not."""
    kept, whole = rows(library), rows(undisturbed)
    assert kept.items() <= whole.items()
    code, said = run("index", pictures, "--json", library=library)
    assert code == 0
    report = json.loads(said.splitlines()[0])
    assert (report["added"], report["unchanged"]) == (COUNT - len(kept), len(kept))
    assert report["failed"] == []
    assert rows(library) == whole
    assert run("verify", "--sample", "0", library=library)[0] == 0


@pytest.fixture
def running(pictures: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """An indexing process with its first batch committed; its library is `new.lib`."""
    library = tmp_path / "new.lib"
    with start(["-m", "cli", "index", pictures], library) as process:
        try:
            wait_for(lambda: count(library) >= BATCH or process.poll() is not None)
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_finishes_the_batch_in_hand(
    running: subprocess.Popen[str],
    pictures: Path,
    tmp_path: Path,
    undisturbed: Path,
    number: signal.Signals,
) -> None:
    library = tmp_path / "new.lib"
    os.killpg(running.pid, number)  # as a terminal does: every process of the group gets it
    code, stdout, stderr = ends(running)
    kept = count(library)
    assert code == 128 + number
    assert kept % BATCH == 0
    assert BATCH <= kept < COUNT
    assert stdout.startswith(f"{kept} added in ")
    assert "failed" not in stdout
    first, *_, last = stderr.strip().splitlines(keepends=True)
    assert (first, f"{last}\n") == (STOPPING, KEPT.format(library=library))
    assert list(library.glob("*.tmp")) == []
    check_goes_on(pictures, library, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_stops_at_once_and_loses_nothing_committed(
    running: subprocess.Popen[str],
    pictures: Path,
    tmp_path: Path,
    undisturbed: Path,
    number: signal.Signals,
) -> None:
    library = tmp_path / "new.lib"
    assert running.stderr is not None
    os.killpg(running.pid, number)
    assert running.stderr.readline() == "\n"
    assert running.stderr.readline() == STOPPING
    kept = count(library)
    os.killpg(running.pid, number)
    code, stdout, stderr = ends(running)
    assert code == 128 + number
    assert stdout == ""
    assert stderr == f"\n{KEPT.format(library=library)}"
    assert count(library) >= kept
    check_goes_on(pictures, library, undisturbed)


def test_a_run_that_is_killed_leaves_no_process_behind_and_loses_nothing_committed(
    running: subprocess.Popen[str], pictures: Path, tmp_path: Path, undisturbed: Path
) -> None:
    assert len(members(running.pid)) > 1  # those that decode
    running.kill()
    assert ends(running)[0] == -signal.SIGKILL
    check_goes_on(pictures, tmp_path / "new.lib", undisturbed)


def test_a_job_in_the_background_ignores_the_interrupt_that_is_for_another(
    library: Path, tmp_path: Path
) -> None:
    ignoring = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    program = ignoring + _pausing("indexes.snapshot", "Reader.copy", seconds=0.3)
    with start(["-c", program, "backup", tmp_path / "copy.lib"], library) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "paused\n"
        process.send_signal(signal.SIGINT)
        assert ends(process)[0] == 0
    assert rows(tmp_path / "copy.lib") == rows(library)


# ── other commands ───────────────────────────────────────────────────────────────────────────────


def _pausing(module: str, name: str, *, seconds: float = SECONDS) -> str:
    """A program that runs a command and waits there, as it comes to a function, to be stopped."""
    return (
        "import functools, importlib, sys, time\n"
        "import cli\n"
        f"*path, name = {name!r}.split('.')\n"
        f"owner = functools.reduce(getattr, path, importlib.import_module({module!r}))\n"
        "function = getattr(owner, name)\n"
        "@functools.wraps(function)\n"
        "def pausing(*args, **more):\n"
        "    print('paused', flush=True)\n"
        f"    time.sleep({seconds})\n"
        "    return function(*args, **more)\n"
        "setattr(owner, name, pausing)\n"
        "cli.main(prog_name='retriever')\n"
    )


NOT_MADE = "{target} was not made."
TAKEN_IN = "What was taken in is kept; the same command goes on from there."
# Command: where it is interrupted, and what it says then.
PLACES = {
    "verify": ("indexes.care", "_verify_kind", "Nothing was changed."),
    "repair": (
        "indexes.care",
        "_mend_files",
        "The library is as it was or mended; the same command goes on from there.",
    ),
    "compact": (
        "indexes.catalogue",
        "Catalogue.vacuum",
        "Nothing is lost; the same command starts anew.",
    ),
    "backup": ("indexes.care", "_drop_spoilt_files", NOT_MADE),
    "export": ("retriever.exchange", "sync", NOT_MADE),
    "import": ("retriever.exchange", "_Intake.report", TAKEN_IN),
    "merge": ("retriever.exchange", "_Intake.take", TAKEN_IN),
    "remove": (
        "indexes.writer",
        "Writer.remove",
        "Either all of it is forgotten or nothing: `retriever roots` counts the pictures.",
    ),
}


@pytest.mark.parametrize(
    ("command", "number"),
    [*((command, signal.SIGINT) for command in PLACES), ("backup", signal.SIGTERM)],
)
def test_an_interrupted_command_says_one_sentence_and_leaves_nothing_half_made(
    library: Path, undisturbed: Path, tmp_path: Path, command: str, number: signal.Signals
) -> None:
    module, name, sentence = PLACES[command]
    target = tmp_path / "out" / "copy"
    another, source = tmp_path / "another.lib", tmp_path / "exported"
    if command in ("import", "merge"):
        paint(tmp_path / "few" / "red.png", "red")
        assert run("index", tmp_path / "few", library=another)[0] == 0
        assert run("export", source, library=another)[0] == 0
    args: list[str | Path] = {
        "verify": ["--sample", "0"],
        "backup": [target],
        "export": [target],
        "import": [source],
        "merge": [another],
        "remove": [json.loads(run("roots", "--json", library=library)[1])["path"]],
    }.get(command, [])
    with start(["-c", _pausing(module, name), command, *args], library) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "paused\n"
        os.killpg(process.pid, number)
        code, stdout, stderr = ends(process)
    assert (code, stdout) == (128 + number, "")
    assert stderr == f"\nInterrupted. {sentence.format(target=target)}\n"
    assert list((tmp_path / "out").glob("*")) == []
    assert rows(undisturbed).items() <= rows(library).items()
    assert run("verify", "--sample", "0", library=library)[0] == 0
    assert run(command, *args, library=library)[0] == 0
    expected = {"import": COUNT + 1, "merge": COUNT + 1, "remove": 0}.get(command, COUNT)
    assert count(library) == expected


def test_an_interrupted_tuning_changes_nothing(
    pictures: Path, library: Path, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    said = tmp_path / "captions.jsonl"
    names = [path.name for path in sorted(pictures.iterdir())]
    lines = [json.dumps({"file": name, "captions": [f"noise {n}"]}) for n, name in enumerate(names)]
    said.write_text("\n".join(lines), encoding="utf-8")
    assert run("index", pictures, "--captions", said, library=library)[0] == 0
    before = rows(library)
    program = _pausing("retriever.tuning", "cross_fitted", seconds=1)
    with start(["-c", program, "tune"], library) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "paused\n"
        os.killpg(process.pid, signal.SIGINT)
        code, stdout, stderr = ends(process)
    assert (code, stdout) == (128 + signal.SIGINT, "")
    assert stderr.endswith("Interrupted. Nothing was changed.\n")
    assert rows(library) == before
    assert run("verify", "--sample", "0", library=library)[0] == 0
    assert "Tuned" not in run("info", library=library)[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_watch_is_ended_by_one_signal(library: Path, number: signal.Signals) -> None:
    pytest.importorskip("watchfiles")
    with start(["-m", "cli", "watch"], library) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == f"Watching for {library}; Ctrl-C ends it.\n"
        time.sleep(0.3)
        os.killpg(process.pid, number)
        code, stdout, stderr = ends(process)
    assert (code, stdout) == (128 + number, "")
    assert stderr == f"\n{STOPPING}"
    assert run("verify", "--sample", "0", library=library)[0] == 0


def test_an_error_that_a_module_in_c_makes_of_an_interrupt_is_told_as_the_interrupt(
    library: Path,
) -> None:
    """The loading of a shared library, which takes a while, turns Ctrl-C into an ImportError."""
    program = (
        "import os, signal\n"
        "import cli, indexes.care\n"
        "def loading(*_):\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    except KeyboardInterrupt:\n"
        "        raise ImportError('initialization failed')\n"
        "indexes.care.verify = loading\n"
        "cli.main(prog_name='retriever')\n"
    )
    with start(["-c", program, "verify", "--sample", "0"], library) as process:
        assert ends(process) == (130, "", "\nInterrupted. Nothing was changed.\n")
