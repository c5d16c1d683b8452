"""Real faults, through the command line: what the user is told, and that nothing else is harmed.

`SAYS` lists the sentences word for word. After each fault nothing committed is lost, no answer is
wrong, and the same command goes on once the fault is gone.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import paint
from PIL import Image

import cli
from retriever.models import MINI_FOLDER

pytestmark = pytest.mark.skipif(os.name == "nt", reason="faults of POSIX systems")

FIXTURES = Path(__file__).parent / "fixtures"
MEMORY = Path("/dev/shm")
ROOT = Path(__file__).parents[1]
NOBODY = 65534
WAY_OUT = (
    "`retriever repair` saves what can be read; or restore a backup, or remove the library and "
    "index again"
)
# Fault: what follows "Error: " on stderr, word for word.
SAYS = {
    # A full disk. A limit on the size of files stands for it in most tests: "File too large".
    "disk full: lock": "{library} cannot be written ({why}); searching it still works",
    "disk full: SQLite's log or file": (
        "{library}/catalogue.sqlite could not be read or written (disk I/O error): is the disk "
        "full, over a quota or failing? What was committed before is kept"
    ),
    "disk full: SQLite says so": (
        "{library}/catalogue.sqlite could not be written: the disk is full; what was there before "
        "is kept, and the same command goes on once there is room"
    ),
    "disk full: FAISS file": (
        "{library}/{file} could not be written ({why}); nothing is lost, searches go on without "
        "it, only slower"
    ),
    "disk full: copy before a migration": (
        "{library}/catalogue.schema-1.sqlite could not be written ({why}); nothing was changed"
    ),
    "disk full: backup": (
        "{target} could not be written (is the disk full?); the library itself is as it was"
    ),
    "disk full: export": "{target} cannot be written ({why}); nothing was left there",
    # Rights, and folders that go away.
    "read-only library": (
        "{library} may not be written, so it can be searched but not changed: check the"
        " permissions of the folder and its files, or work on a copy (`retriever backup`)"
    ),
    "read-only library, repair": (
        "{library} cannot be written (Permission denied); searching it still works"
    ),
    "library gone while open": (
        "{library} is gone: was it moved, removed or unmounted while it was open?"
    ),
    # The catalogue.
    "catalogue malformed": (
        "{library}/catalogue.sqlite cannot be read as a catalogue (database disk image is "
        f"malformed); {WAY_OUT}"
    ),
    "catalogue is no database": (
        "{library}/catalogue.sqlite cannot be read as a catalogue (file is not a database); "
        f"{WAY_OUT}"
    ),
    "catalogue empty or foreign": (
        f"{{library}}/catalogue.sqlite is not a catalogue of ours, or is empty; {WAY_OUT}"
    ),
    "catalogue missing": (
        "{library}/catalogue.sqlite is missing, and the other files are nothing without it: "
        "restore a backup, or remove the library and index again"
    ),
    "catalogue of a newer version": (
        "{library}/catalogue.sqlite has schema 99, this version knows up to 5: update the "
        "software, or use a library of its own for each version"
    ),
    "catalogue without its model": (
        "{library} no longer says which model made it: restore a backup, or remove the library "
        "and index again"
    ),
    "catalogue never completed": (
        "the library at {library} was never completed: make it with `retriever index FOLDER`"
    ),
    "nothing to save": (
        "{library}/catalogue.sqlite: nothing in it can be read; restore a backup, or remove the "
        "library and index again"
    ),
    # Two writers.
    "another writer": (
        "{library} is being written by process {pid} on {host} since {since}; try again when it "
        "is done"
    ),
    # Model files.
    "model file altered": (
        "{model}/{file} is not the file that config.json describes: export or install the model "
        "again"
    ),
    "model file missing": (
        "{model}/{file} cannot be read (No such file or directory): export or install the model "
        "again"
    ),
    "model config lacks a part": (
        "{model}/config.json lacks 'image': export or install the model again"
    ),
    "model config altered": (
        "{library} was made by another version of {model} ({then}, now {now}): use that version; "
        "or `retriever index --model {model}` embeds its pictures with this one as well, and "
        "`retriever models --use {model}` changes over"
    ),
}
# What `verify` prints of a FAISS file.
FAISS_SAYS = {
    "truncated": "{file} has {less} bytes, not {size}",
    "zeroed": "{file} has checksum {now}, not {then}",
    "one bit flipped": "{file} is damaged in the 64 KiB from byte 0",
    "of another library": "{file} has checksum {now}, not {then}",
    "missing": "{file} cannot be read (No such file or directory)",
    "a folder": "{file} is no file",
    "a pipe": "{file} is no file",
}


def run(*args: str | Path, library: Path) -> Result:
    """A command, which may fail, but only in words."""
    env = {"RETRIEVER_LIBRARY": str(library)}
    result = CliRunner().invoke(cli.main, [str(arg) for arg in args], env=env)
    if not isinstance(result.exception, SystemExit | None):
        raise result.exception
    return result


def said(*keys: str, **values: object) -> set[str]:
    return {f"Error: {SAYS[key].format(**values)}\n" for key in keys}


def refuse(result: Result, key: str, **values: object) -> None:
    assert (result.exit_code, result.stdout) == (1, "")
    assert {result.stderr} == said(key, **values)


def answers(library: Path, pictures: Path) -> list[dict[str, Any]]:
    """Pictures like the red one, with their scores and captions."""
    result = run("search", "--image", pictures / "red.png", "--json", library=library)
    assert result.exit_code == 0, result.output
    hits = [json.loads(line) for line in result.stdout.splitlines()]
    return [{name: hit[name] for name in ("score", "path", "caption")} for hit in hits]


def rows(library: Path) -> dict[str, tuple[object, ...]]:
    """What a library holds, by path, read with SQL of our own; no ids."""
    with closing(sqlite3.connect(library / "catalogue.sqlite")) as database:
        items = database.execute(
            "SELECT items.id, CAST(path || '/' || file AS TEXT), size, mtime_ns, hex(content_hash),"
            " status, hex(vector) FROM items JOIN roots ON roots.id = root_id"
            " LEFT JOIN image_embeddings ON owner_id = items.id"
        ).fetchall()
        texts = database.execute(
            "SELECT item_id, text, source, hex(vector) FROM captions"
            " LEFT JOIN caption_embeddings ON owner_id = captions.id ORDER BY position"
        ).fetchall()
    assert len({path for _, path, *_ in items}) == len(items)
    return {
        path: (*facts, *(text for owner, *text in texts if owner == item_id))
        for item_id, path, *facts in items
    }


def check_sound(library: Path) -> None:
    result = run("verify", "--sample", "0", library=library)
    assert (result.exit_code, result.stdout) == (0, f"No problems in {library}\n")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    for colour in ("red", "green", "blue", "white"):
        paint(folder / f"{colour}.png", colour, side=32)
        (folder / f"{colour}.txt").write_text(f"a {colour} square\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("second")
    for colour in ("cyan", "yellow"):
        paint(folder / f"{colour}.png", colour, side=40)
        (folder / f"{colour}.txt").write_text(f"a {colour} square\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def indexed(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library of `pictures` that nobody changes."""
    path = tmp_path_factory.mktemp("libraries") / "indexed.lib"
    assert run("index", pictures, library=path).exit_code == 0
    return path


@pytest.fixture(scope="module")
def both(indexed: Path, more: Path) -> Path:
    """A library of `pictures` and `more` that nobody changes."""
    path = indexed.with_name("both.lib")
    shutil.copytree(indexed, path)
    assert run("index", more, library=path).exit_code == 0
    return path


@pytest.fixture(scope="module")
def expected(indexed: Path, pictures: Path) -> list[dict[str, Any]]:
    return answers(indexed, pictures)


@pytest.fixture
def library(indexed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(indexed, tmp_path / "photos.lib"))


# ── a full disk ──────────────────────────────────────────────────────────────────────────────────


@contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    """No file grows beyond this size meanwhile; Python ignores the signal, so writing fails."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


TOO_LARGE = os.strerror(errno.EFBIG)
DISK_FULL = ("disk full: lock", "disk full: SQLite's log or file", "disk full: SQLite says so")


def test_a_library_that_could_not_be_made_on_a_full_disk_is_made_once_there_is_room(
    pictures: Path, indexed: Path, tmp_path: Path
) -> None:
    library = tmp_path / "new.lib"
    for size in (0, 1000, 5000, 50_000):
        with largest_file(size):
            result = run("index", pictures, library=library)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr in said(*DISK_FULL, library=library, why=TOO_LARGE)
        if (library / "catalogue.sqlite").exists():
            refuse(run("info", library=library), "catalogue never completed", library=library)
    with largest_file(130_000):  # the schema fits in, the pictures do not
        result = run("index", pictures, library=library)
    assert result.exit_code == 1
    assert run("index", pictures, library=library).stdout.startswith("4 added in ")
    assert rows(library) == rows(indexed)
    check_sound(library)


def test_pictures_that_found_no_room_are_added_once_there_is(
    library: Path, pictures: Path, more: Path, both: Path
) -> None:
    before = rows(library)
    for size in (0, 1000, 50_000, 90_000):
        with largest_file(size):
            result = run("index", more, library=library)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr in said(*DISK_FULL, library=library, why=TOO_LARGE)
        assert rows(library) in (before, rows(both))  # room may run out after the last commit
        check_sound(library)
    assert run("index", more, library=library).exit_code == 0
    assert rows(library) == rows(both)
    assert answers(library, pictures) == answers(both, pictures)


def test_a_library_on_a_full_disk_is_searched(
    library: Path, pictures: Path, expected: list[dict[str, Any]]
) -> None:
    spoil_faiss("truncated", library, library)
    with largest_file(0):
        assert answers(library, pictures) == expected
        assert run("search", "a red square", library=library).exit_code == 0
        assert run("info", library=library).exit_code == 0
        assert run("verify", "--sample", "0", library=library).exit_code == 1
    assert run("repair", library=library).exit_code == 0
    check_sound(library)


@pytest.mark.parametrize("command", ["compact", "repair", "remove", "forget", "merge", "import"])
def test_no_command_loses_anything_on_a_full_disk(
    library: Path, pictures: Path, both: Path, tmp_path: Path, command: str
) -> None:
    assert run("export", tmp_path / "both", library=both).exit_code == 0
    args: list[str | Path] = {
        "compact": ["compact"],
        "repair": ["repair"],
        "remove": ["remove", pictures / "white.png"],
        "forget": ["roots", "forget", pictures],
        "merge": ["merge", both],
        "import": ["import", tmp_path / "both"],
    }[command]
    if command == "repair":
        spoil_faiss("truncated", library, library)
    before, refused = rows(library), 0
    for size in (0, 1000, 30_000, 60_000, 90_000):
        with largest_file(size):
            result = run(*args, library=library)
        if result.exit_code == 0 or rows(library) != before:
            break
        refused += 1
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr in said(*DISK_FULL, library=library, why=TOO_LARGE)
    assert refused >= 3
    result = run(*args, library=library)
    # What was removed before room ran out is nothing that could be removed again.
    assert result.exit_code == 0 or command in ("remove", "forget")
    after = {"remove": 3, "forget": 0, "merge": 6, "import": 6}.get(command, 4)
    assert len(rows(library)) == after
    assert before.items() <= rows(library).items() or command in ("remove", "forget")
    assert run("repair", library=library).exit_code == 0
    check_sound(library)


@pytest.mark.parametrize(("command", "enough"), [("backup", 200_000), ("export", 50_000)])
def test_a_copy_that_finds_no_room_leaves_nothing_and_blames_the_right_disk(
    library: Path, tmp_path: Path, command: str, enough: int
) -> None:
    target = tmp_path / "usb" / "copy"
    before = rows(library)
    for size in (0, 1000, 3000):
        with largest_file(size):
            result = run(command, target, library=library)
        refuse(result, f"disk full: {command}", target=target, why=TOO_LARGE)
        assert list(target.parent.glob("*")) == []
        assert rows(library) == before
    with largest_file(enough):
        assert run(command, target, library=library).exit_code == 0
    if command == "backup":
        assert rows(target) == before
        check_sound(target)


def test_faiss_files_that_find_no_room_are_written_later(tmp_path: Path) -> None:
    """They are small beside the log: it takes many pictures and a change of few rows."""
    library, folder = tmp_path / "many.lib", tmp_path / "noise"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(60):
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).save(folder / f"{number}.png")
    assert run("index", folder, library=library).exit_code == 0
    for file in library.glob("*.faiss"):
        file.unlink()
    before = rows(library)
    with largest_file(40_000):
        result = run("repair", library=library)
    file = "image-1-00000002.faiss"
    refuse(result, "disk full: FAISS file", library=library, file=file, why=TOO_LARGE)
    assert list(library.glob("*.faiss*")) == []
    assert rows(library) == before
    assert run("repair", library=library).exit_code == 0
    check_sound(library)


def test_a_migration_that_finds_no_room_for_its_copy_changes_nothing(tmp_path: Path) -> None:
    with tarfile.open(FIXTURES / "schema-1.tar.gz") as archive:
        archive.extractall(tmp_path / "old.lib", filter="data")
    library = tmp_path / "old.lib"
    before = (library / "catalogue.sqlite").read_bytes()
    for size in (0, 1000, 50_000):
        with largest_file(size):
            result = run("info", library=library)
        assert result.exit_code == 1
        assert result.stderr in said(
            *(*DISK_FULL, "disk full: copy before a migration"), library=library, why=TOO_LARGE
        )
        assert (library / "catalogue.sqlite").read_bytes() == before
        assert list(library.glob("catalogue.schema*")) == []
    assert "Pictures  3" in run("info", library=library).stdout
    assert len(list(library.glob("catalogue.schema-1.sqlite"))) == 1
    check_sound(library)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    mount, unmount = shutil.which("mount"), shutil.which("umount")
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or mount is None or unmount is None:
        pytest.skip("only root can mount a file system")
    made = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=1m", "none", place], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.decode()}")
    yield place
    subprocess.run([unmount, "-l", place], check=True)


def test_a_disk_that_is_really_full(
    small_disk: Path,
    indexed: Path,
    both: Path,
    pictures: Path,
    more: Path,
    expected: list[dict[str, Any]],
) -> None:
    library, filler = small_disk / "photos.lib", small_disk / "filler"
    no_space = os.strerror(errno.ENOSPC)
    shutil.copytree(indexed, library)
    before = rows(library)
    for free in (0, 40_000, 90_000):
        room = shutil.disk_usage(small_disk).free
        filler.write_bytes(bytes(room - free // 4096 * 4096))
        result = run("index", more, library=library)
        assert result.exit_code == 1
        assert result.stderr in said(*DISK_FULL, library=library, why=no_space)
        assert answers(library, pictures) == expected
        target = small_disk / "copy"
        result = run("backup", target, library=library)
        assert result.stderr in {
            *said("disk full: backup", target=target),
            f"Error: {target} could not be written ({no_space}); the library itself is as it was\n",
        }
        if not free:
            result = run("export", target, library=library)
            refuse(result, "disk full: export", target=target, why=no_space)
        assert {path.name for path in small_disk.iterdir()} == {"photos.lib", "filler"}
        filler.unlink()
        assert rows(library) == before
    assert run("index", more, library=library).exit_code == 0
    assert rows(library) == rows(both)
    check_sound(library)


# ── rights, and folders that go away ─────────────────────────────────────────────────────────────


@contextmanager
def without_rights(*paths: Path) -> Iterator[None]:
    """These may only be read; root, who may write anything, is somebody else meanwhile."""
    below = [inside for path in paths for inside in path.rglob("*")]
    modes = {path: path.stat().st_mode for path in (*paths, *below)}
    for path in modes:
        path.chmod(0o555 if path.is_dir() else 0o444)
    as_root = os.geteuid() == 0
    if as_root:
        os.seteuid(NOBODY)
    try:
        if not os.access(MINI_FOLDER / "image.onnx", os.R_OK, effective_ids=True):
            pytest.skip("the program itself lies where only root may look")
        yield
    finally:
        if as_root:
            os.seteuid(0)
        for path, mode in modes.items():
            path.chmod(mode)


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that anybody may look into."""
    made = Path(tempfile.mkdtemp(dir=MEMORY if os.access(MEMORY, os.W_OK) else None))
    made.chmod(0o777)
    yield made
    shutil.rmtree(made)


def test_a_read_only_library_is_searched_and_copied_and_refuses_to_be_written(
    indexed: Path, pictures: Path, public: Path, expected: list[dict[str, Any]]
) -> None:
    library = Path(shutil.copytree(indexed, public / "photos.lib"))
    query = Path(shutil.copy(pictures / "red.png", public))
    (public / "out").mkdir()
    (public / "out").chmod(0o777)
    before = {path.name: path.read_bytes() for path in library.iterdir()}
    with without_rights(library):
        result = run("search", "--image", query, "--json", library=library)
        assert [json.loads(line)["score"] for line in result.stdout.splitlines()] == [
            hit["score"] for hit in expected
        ]
        assert run("info", library=library).exit_code == 0
        check_sound(library)
        for command in ("backup", "export"):
            assert run(command, public / "out" / command, library=library).exit_code == 0
        for args in (["compact"], ["remove", "x.png"], ["roots", "forget", "x"]):
            refuse(run(*args, library=library), "read-only library", library=library)
        refuse(run("index", query.parent, library=library), "read-only library", library=library)
        refuse(run("repair", library=library), "read-only library, repair", library=library)
    assert {path.name: path.read_bytes() for path in library.iterdir()} == before
    assert rows(public / "out" / "backup") == rows(library)


@pytest.mark.usefixtures("indexed")  # loads what nobody else may load
def test_pictures_that_may_only_be_read_are_indexed_and_nothing_is_written_there(
    pictures: Path, public: Path
) -> None:
    folder = Path(shutil.copytree(pictures, public / "pictures"))
    before = {path.name: path.stat().st_mtime_ns for path in (folder, *folder.iterdir())}
    with without_rights(folder):
        result = run("index", folder, library=public / "new.lib")
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith("4 added in ")
    assert {path.name: path.stat().st_mtime_ns for path in (folder, *folder.iterdir())} == before


@pytest.mark.parametrize("how", ["moved away", "removed"])
def test_a_library_that_vanishes_while_it_is_written_is_named(
    library: Path,
    more: Path,
    both: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    elsewhere = tmp_path / "elsewhere"

    def vanish(_: object, done: int, total: int) -> None:
        if done == total:  # the FAISS files are still to be written
            shutil.rmtree(library) if how == "removed" else library.rename(elsewhere)

    monkeypatch.setattr("retriever.terminal.Progress.__call__", vanish)
    result = run("index", more, library=library)
    refuse(result, "library gone while open", library=library)
    if how == "moved away":
        assert rows(elsewhere) == rows(both)
        check_sound(elsewhere)


# ── FAISS files ──────────────────────────────────────────────────────────────────────────────────


def spoil_faiss(fault: str, library: Path, other: Path) -> Path:
    """Brings a fault to the file with the vectors of pictures, its time stamp as it was."""
    [file] = library.glob("image-*.faiss")
    content, status = file.read_bytes(), file.stat()
    if fault == "of another library":
        [theirs] = other.glob("image-*.faiss")
        file.write_bytes(theirs.read_bytes())
    elif fault == "truncated":
        file.write_bytes(content[:-7])
    elif fault == "zeroed":
        file.write_bytes(bytes(len(content)))
    elif fault == "one bit flipped":
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        file.unlink()
        if fault == "a folder":
            (file / "inside").mkdir(parents=True)
        if fault == "a pipe":
            os.mkfifo(file)
    if file.is_file():
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    return file


@pytest.fixture(scope="module")
def stranger(indexed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library of as many other pictures."""
    folder, path = tmp_path_factory.mktemp("strange"), indexed.with_name("stranger.lib")
    for number, colour in enumerate(("cyan", "magenta", "yellow", "white")):
        paint(folder / f"{colour}.png", colour, side=50 + number)
    assert run("index", folder, library=path).exit_code == 0
    return path


@pytest.mark.parametrize("fault", FAISS_SAYS)
def test_a_spoilt_faiss_file_is_named_and_mended_and_changes_no_answer(
    library: Path,
    pictures: Path,
    stranger: Path,
    expected: list[dict[str, Any]],
    tmp_path: Path,
    fault: str,
) -> None:
    import xxhash

    [file] = library.glob("image-*.faiss")
    # So few vectors are one block, whose checksum is the file's last eight bytes.
    then, size = xxhash.xxh3_128_hexdigest(file.read_bytes()[-8:]), file.stat().st_size
    spoil_faiss(fault, library, stranger)
    now = xxhash.xxh3_128_hexdigest(file.read_bytes()[-8:]) if file.is_file() else None
    sentence = FAISS_SAYS[fault].format(
        file=file.name, size=size, less=size - 7, now=now, then=then
    )
    result = run("verify", "--sample", "0", library=library)
    assert (result.exit_code, result.stderr) == (1, "`retriever repair` mends a library's files.\n")
    assert result.stdout == f"{sentence}; `retriever repair` makes it again\n"
    copy = tmp_path / "copy.lib"
    assert run("backup", copy, library=library).exit_code == 0
    check_sound(copy)
    mended = run("repair", library=library)
    assert mended.exit_code == 0
    assert mended.stdout == (
        f"the FAISS files were made anew: {sentence}; `retriever repair` makes it again\n"
    )
    check_sound(library)
    assert answers(library, pictures) == expected
    if fault != "a folder":  # nobody takes that away, in case somebody else put something in
        spoil_faiss(fault, library, stranger)
        assert answers(library, pictures) == expected
        check_sound(library)  # a search mends them too


# ── the catalogue ────────────────────────────────────────────────────────────────────────────────


def _cut(share: float) -> Callable[[Path], None]:
    def spoil(file: Path) -> None:
        os.truncate(file, int(share * file.stat().st_size))

    return spoil


def _zero(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def _sql(*statements: str) -> Callable[[Path], None]:
    def spoil(file: Path) -> None:
        with closing(sqlite3.connect(file)) as database, database:
            for statement in statements:
                database.execute(statement)

    return spoil


def _bookmarks(file: Path) -> None:
    file.unlink()
    _sql("CREATE TABLE bookmarks (url)", "INSERT INTO bookmarks VALUES ('file:///')")(file)


NEWER = _sql("INSERT INTO schema_migrations VALUES (99, 'm099_of_the_future', '2030-01-01')")
NO_MODEL = _sql("PRAGMA foreign_keys = OFF", "DELETE FROM models")
# Fault: what brings it, what every command says, and what `repair` does.
SPOILT: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "cut to nothing": (_cut(0), "catalogue empty or foreign", "nothing to save"),
    "cut in its header": (_cut(0.0005), "catalogue malformed", "nothing to save"),
    "cut in the middle": (_cut(0.5), "catalogue malformed", "nothing to save"),
    "without its last page": (
        lambda file: os.truncate(file, file.stat().st_size - 4096),
        "catalogue malformed",
        "",
    ),
    "zeroed": (_zero, "catalogue is no database", "nothing to save"),
    "another program's": (_bookmarks, "catalogue empty or foreign", "nothing to save"),
    "a text": (
        lambda file: file.write_text("Dear diary,\n" * 1000) and None,
        "catalogue is no database",
        "nothing to save",
    ),
    "missing": (Path.unlink, "catalogue missing", "catalogue missing"),
    "newer": (NEWER, "catalogue of a newer version", "catalogue of a newer version"),
    "without its model": (NO_MODEL, "catalogue without its model", "catalogue without its model"),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_a_spoilt_catalogue_is_one_sentence_and_repair_saves_what_can_be(
    library: Path, pictures: Path, expected: list[dict[str, Any]], fault: str
) -> None:
    spoil, sentence, repaired = SPOILT[fault]
    file = library / "catalogue.sqlite"
    spoil(file)
    spoilt = file.read_bytes() if file.exists() else b""
    for args in (["info"], ["search", "red"], ["verify"], ["index", str(pictures)], ["compact"]):
        refuse(run(*args, library=library), sentence, library=library)
    if spoilt:  # SQLite writes a header into an empty file
        assert file.read_bytes() == spoilt
    result = run("repair", library=library)
    if repaired:
        refuse(result, repaired, library=library)
        return
    assert result.exit_code == 0
    assert "the catalogue was damaged: what could be read is the new one" in result.stdout
    [kept] = library.glob("catalogue.damaged-*.sqlite")
    assert kept.read_bytes() == spoilt
    check_sound(library)
    assert run("index", pictures, library=library).exit_code == 0
    assert answers(library, pictures) == expected


def test_a_flipped_bit_is_harmless_or_told_and_changes_no_score(
    indexed: Path, pictures: Path, tmp_path: Path, expected: list[dict[str, Any]]
) -> None:
    content = (indexed / "catalogue.sqlite").read_bytes()
    used = [place for place, byte in enumerate(content) if byte]
    rng = random.Random(7)
    places = [*rng.sample(used, 14), *rng.sample(range(100), 4)]
    scores = {hit["score"] for hit in expected}
    for number, place in enumerate(places):
        library = Path(shutil.copytree(indexed, tmp_path / f"{number}.lib"))
        flipped = bytearray(content)
        flipped[place] ^= 1 << rng.randrange(8)
        (library / "catalogue.sqlite").write_bytes(flipped)
        found = run("search", "--image", pictures / "red.png", "--json", library=library)
        if found.exit_code == 0:
            hits = [json.loads(line) for line in found.stdout.splitlines()]
            assert {hit["score"] for hit in hits} <= scores, place
        else:
            assert found.stderr.startswith("Error: ")
            assert found.stderr.count("\n") == 1
            assert run("verify", "--sample", "0", library=library).exit_code == 1
        if run("repair", library=library).exit_code == 0:
            if "no longer in" in run("verify", "--sample", "0", library=library).stdout:
                # The bit was in a name, which is as good as another until its folder is looked at.
                assert run("index", pictures, library=library).exit_code == 0
            check_sound(library)


# What was committed last is in the log until SQLite takes it over into the database; a process
# that is killed leaves both.
LOG_SPOILT: dict[str, tuple[str, Callable[[Path], None]]] = {
    "log missing": ("-wal", Path.unlink),
    "log empty": ("-wal", _cut(0)),
    "log cut off": ("-wal", _cut(0.4)),
    "log zeroed": ("-wal", _zero),
    "log with a flipped bit": ("-wal", lambda file: _flip(file, 5000)),
    "log of noise": ("-wal", lambda file: file.write_bytes(random.Random(0).randbytes(90_000))),
    "map missing": ("-shm", Path.unlink),
    "map empty": ("-shm", _cut(0)),
    "map zeroed": ("-shm", _zero),
    "map of noise": ("-shm", lambda file: file.write_bytes(random.Random(0).randbytes(32_768))),
}


def _flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place % len(content)] ^= 1
    file.write_bytes(content)


@pytest.fixture(scope="module")
def killed(indexed: Path, more: Path) -> Path:
    """A library that was copied in the middle of things, as a kill leaves it; nobody opens it."""
    from retriever import Library

    path, working = indexed.with_name("killed.lib"), indexed.with_name("working.lib")
    shutil.copytree(indexed, working)
    with Library.open(working) as library:
        library.index(more)
        shutil.copytree(working, path)
    return path


@pytest.mark.parametrize("fault", LOG_SPOILT)
def test_a_spoilt_log_costs_at_most_what_was_only_there(
    killed: Path, indexed: Path, both: Path, more: Path, tmp_path: Path, fault: str
) -> None:
    suffix, spoil = LOG_SPOILT[fault]
    library = Path(shutil.copytree(killed, tmp_path / "photos.lib"))
    spoil(library / f"catalogue.sqlite{suffix}")
    whole = rows(both)
    is_kept = fault.startswith("map")
    problems = run("verify", "--sample", "0", library=library)
    assert problems.exit_code == (0 if is_kept else 1)
    assert ("cannot be read" in problems.stdout) is not is_kept  # the FAISS files are newer
    assert rows(library) == (whole if is_kept else rows(indexed))
    assert run("index", more, library=library).exit_code == 0
    assert rows(library) == whole
    check_sound(library)


def test_a_log_of_another_library_gives_no_mixture(
    killed: Path, indexed: Path, more: Path, stranger: Path, tmp_path: Path
) -> None:
    library = Path(shutil.copytree(stranger, tmp_path / "photos.lib"))
    theirs = rows(library)
    shutil.copy(killed / "catalogue.sqlite-wal", library)
    result = run("info", library=library)
    assert result.exit_code in (0, 1)
    problems = run("verify", "--sample", "0", library=library)
    assert problems.exit_code == 1
    repaired = run("repair", library=library)
    if repaired.exit_code == 0:
        check_sound(library)
        found = rows(library)
        assert any(found.items() <= known.items() for known in (theirs, rows(killed)))


# ── two writers ──────────────────────────────────────────────────────────────────────────────────


def test_a_second_writer_is_told_who_writes_and_takes_over_when_that_one_was_killed(
    library: Path, pictures: Path, tmp_path: Path, expected: list[dict[str, Any]]
) -> None:
    folder = tmp_path / "noise"
    folder.mkdir()
    rng = np.random.default_rng(1)
    for number in range(64):
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).save(folder / f"{number}.png")
    before = rows(library)
    lock = library / "writer.lock"
    command = [sys.executable, "-m", "cli", "index", str(folder), "--library", str(library)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as first:
        deadline = time.monotonic() + 60
        while not lock.read_bytes() and time.monotonic() < deadline:
            time.sleep(0.005)
        first.send_signal(signal.SIGSTOP)
        note = json.loads(lock.read_text())
        assert (note["pid"], note["host"]) == (first.pid, socket.gethostname())
        for args in (["index", str(folder)], ["compact"], ["repair"], ["remove", "x.png"]):
            refuse(run(*args, library=library), "another writer", library=library, **note)
        hits = answers(library, pictures)
        assert [hit for hit in hits if Path(hit["path"]).parent == pictures] == expected
        assert run("backup", tmp_path / "copy.lib", library=library).exit_code == 0
        check_sound(tmp_path / "copy.lib")
        assert before.items() <= rows(tmp_path / "copy.lib").items()
        first.kill()
    assert json.loads(lock.read_text()) == note  # nobody could take it back
    assert run("index", folder, library=library).exit_code == 0
    assert lock.read_bytes() == b""
    assert len(rows(library)) == len(before) + 64
    check_sound(library)


# ── model files ──────────────────────────────────────────────────────────────────────────────────


class _Bomb:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return Path.touch, (Path(BOMBED),)  # type: ignore[return-value]


MODEL_FILES = ("image.onnx", "text.onnx", "text.weights", "tokenizer.json")
BOMBED = str(Path(tempfile.gettempdir()) / f"unpickled-{os.getpid()}")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The bundled model in a folder of its own, whose files can be replaced one by one."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in (*MODEL_FILES, "config.json"):
        shutil.copy(MINI_FOLDER / name, folder / name)
    return folder


def _replace(file: Path, content: bytes) -> None:
    file.unlink()
    file.write_bytes(content)


@pytest.mark.parametrize("file", MODEL_FILES)
def test_a_model_file_that_is_not_the_one_that_was_exported_is_not_used(
    model: Path, pictures: Path, tmp_path: Path, file: str
) -> None:
    library = tmp_path / "new.lib"
    assert run("index", pictures, "--model", model, library=library).exit_code == 0
    before = rows(library)
    content = (model / file).read_bytes()
    image = pictures / "red.png"
    query = ["search", "--image", str(image)] if file == "image.onnx" else ["search", "red"]
    flipped = content[:1000] + bytes([content[1000] ^ 4]) + content[1001:]
    for altered in (flipped, content[:-1], b"", pickle.dumps(_Bomb())):
        _replace(model / file, altered)
        refuse(run(*query, library=library), "model file altered", model=model, file=file)
    (model / file).unlink()
    refuse(run(*query, library=library), "model file missing", model=model, file=file)
    result = run("verify", library=library)
    assert (result.exit_code, result.stdout) == (0, f"No problems in {library}\n")
    assert result.stderr.startswith("Warning: no embedding was checked: ")
    other = run("index", pictures, "--model", model, library=tmp_path / "other.lib")
    refuse(other, "model file missing", model=model, file=file)
    shutil.copy(MINI_FOLDER / file, model / file)
    assert run(*query, library=library).exit_code == 0
    assert rows(library) == before
    assert not Path(BOMBED).exists()


def test_a_config_that_says_something_else_than_before_is_another_model(
    model: Path, pictures: Path, tmp_path: Path
) -> None:
    library = tmp_path / "new.lib"
    assert run("index", pictures, "--model", model, library=library).exit_code == 0
    config = json.loads((model / "config.json").read_text())
    then = json.loads(run("info", "--json", library=library).stdout)["model"]["fingerprint"][:12]
    for part, key, value in (
        (config, "dim", 512),
        (config["image"], "size", 224),
        (config["text"], "max_tokens", 32),
    ):
        kept, part[key] = part[key], value
        _replace(model / "config.json", json.dumps(config).encode())
        result = run("search", "red", library=library)
        part[key] = kept
        now = result.stderr.partition(", now ")[2][:12]
        refuse(result, "model config altered", library=library, model=model, then=then, now=now)
    for content in (pickle.dumps(_Bomb()), b"", b"[]", b"{" * 10, b"\xff\xfe"):
        _replace(model / "config.json", content)
        result = run("search", "red", library=library)
        assert result.exit_code == 1
        start = f"Error: {model}/config.json is not the description of a model: "
        assert result.stderr.startswith(start)
    _replace(model / "config.json", json.dumps({"name": "x", "dim": 384}).encode())
    refuse(run("search", "red", library=library), "model config lacks a part", model=model)
    assert not Path(BOMBED).exists()


def _is_refused(pictures: Path, model: Path, library: Path) -> str:
    """What is said of a model that no library has been made with yet."""
    result = run("index", pictures, "--model", model, library=library)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("Error: ").strip()


def test_a_config_that_lies_is_found_out_before_anything_is_made(
    model: Path, pictures: Path, tmp_path: Path
) -> None:
    text = (model / "config.json").read_text()
    way_out = "export or install the model again"
    for place, (part, key, value, most) in enumerate(
        (
            ("", "dim", 10**12, "65,536"),
            ("", "dim", -1, "65,536"),
            ("image", "size", 10**9, "4,096"),
            ("image", "size", 0, "4,096"),
            ("text", "max_tokens", -1, "65,536"),
        )
    ):
        config = json.loads(text)
        (config[part] if part else config)[key] = value
        _replace(model / "config.json", json.dumps(config).encode())
        library = tmp_path / f"{place}.lib"
        expected = f"{model}/config.json: {key!r} must be from 1 to {most}: {way_out}"
        assert _is_refused(pictures, model, library) == expected
        assert not library.exists()
    _replace(model / "config.json", b"[" * 100_000)
    start = f"{model}/config.json is not the description of a model: "
    assert _is_refused(pictures, model, tmp_path / "deep.lib").startswith(start)


def test_a_config_that_does_not_fit_its_towers_is_found_out_when_they_run(
    model: Path, pictures: Path, tmp_path: Path
) -> None:
    text = (model / "config.json").read_text()
    for part, key, value, said in (
        ("", "dim", 512, f"{model}/image.onnx answers (4, 384), not (4, 512)"),
        ("image", "size", 100, f"{model}/image.onnx cannot be run: "),
    ):
        config = json.loads(text)
        (config[part] if part else config)[key] = value
        _replace(model / "config.json", json.dumps(config).encode())
        assert _is_refused(pictures, model, tmp_path / f"{key}.lib").startswith(said)


@pytest.mark.parametrize("file", ["image.onnx", "text.onnx", "tokenizer.json"])
def test_a_model_file_that_is_none_is_refused_although_its_digest_fits(
    model: Path, pictures: Path, tmp_path: Path, file: str
) -> None:
    from retriever.encoders import digest

    config = json.loads((model / "config.json").read_text())
    content = (model / file).read_bytes()
    what = "is no tokenizer: " if file == "tokenizer.json" else "cannot be run: "
    for place, other in enumerate((content[: len(content) // 2], b"", pickle.dumps(_Bomb()))):
        _replace(model / file, other)
        config["files"][file] = digest(other)
        _replace(model / "config.json", json.dumps(config).encode())
        said = _is_refused(pictures, model, tmp_path / f"{place}.lib")
        assert said.startswith(f"{model}/{file} {what}")
    assert not Path(BOMBED).exists()
