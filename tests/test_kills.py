"""A process killed at any instant loses nothing (see `kills`), and the harness would notice."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from kills import (
    Fault,
    Story,
    Undisturbed,
    check_finished,
    check_killed,
    paint_stage,
    run_hosts,
    watch_a_life,
)

MEMORY = Path("/dev/shm")

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    """A folder in memory where there is one: SIGKILL takes nothing from a disk's cache."""
    made = Path(tempfile.mkdtemp(dir=MEMORY if os.access(MEMORY, os.W_OK) else None))
    yield made
    shutil.rmtree(made)


# The kills


@pytest.mark.parametrize("kills", [25, pytest.param(200, marks=pytest.mark.slow)])
def test_nothing_is_lost_doubled_or_wrong_after_a_kill(memory: Path, kills: int) -> None:
    folder = memory / str(kills)
    folder.mkdir()
    trials = run_hosts(folder, kills, seed=kills)
    assert [fault for trial in trials for fault in trial.faults] == []
    assert sum(trial.repairs for trial in trials) == 0
    died = Counter(kill.kind for trial in trials for kill in trial.kills)
    assert died.total() >= kills
    assert min(died["clock"], died["event"]) >= kills // 5
    assert {kill.number for trial in trials for kill in trial.kills} == {1, 2}


# That the checks would notice


@pytest.fixture(scope="module")
def lived(memory: Path) -> tuple[Path, Undisturbed]:
    """The folder of a life that came to its end, and what it came to."""
    paint_stage(memory / "stage")
    return memory / "lived", watch_a_life(memory / "stage", memory / "lived")


def _sql(*statements: str) -> Callable[[Path], None]:
    def change(library: Path) -> None:
        with closing(sqlite3.connect(library / "catalogue.sqlite")) as connection, connection:
            for statement in statements:
                connection.execute(statement)

    return change


ONE, OTHER = (f"(SELECT id FROM items WHERE file = CAST('plain/0{n}.png' AS BLOB))" for n in "12")
ADD = (
    "INSERT INTO items (id, root_id, file, size, mtime_ns, content_hash, width, height, taken,"
    " status, reason) SELECT 999"
)
ADDED = "size, mtime_ns, NULL, width, height, taken, 'failed', 'no' FROM items WHERE id = " + ONE
LOSE_VECTOR = f"DELETE FROM image_embeddings WHERE owner_id = {ONE}"
SWAP_VECTOR = (
    "UPDATE image_embeddings SET vector = (SELECT vector FROM image_embeddings"
    f" WHERE owner_id = {OTHER}) WHERE owner_id = {ONE}"
)
CASCADE = "PRAGMA foreign_keys = ON"
NO_FILES = "DELETE FROM index_files"  # or repair takes the vectors from there
SABOTAGE: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a lost row": ("lost", _sql(CASCADE, f"DELETE FROM items WHERE id = {ONE}")),
    "a lost embedding": ("wrong", _sql(LOSE_VECTOR, NO_FILES)),
    "a lost caption": (
        "wrong",
        _sql(CASCADE, "DELETE FROM captions WHERE id = (SELECT max(id) FROM captions)"),
    ),
    "a lost library": ("lost", shutil.rmtree),
    "an emptied table": ("lost", _sql(CASCADE, "DELETE FROM items")),
    "a row too many": (
        "wrong",
        _sql(f"{ADD}, root_id, CAST('no.png' AS BLOB), {ADDED}"),
    ),
    "a file that has two items": (
        "twice",
        _sql(
            "INSERT INTO roots (id, path) SELECT 99, CAST(path || '/plain' AS BLOB) FROM roots",
            f"{ADD}, 99, CAST('01.png' AS BLOB), {ADDED}",
        ),
    ),
    "another picture's vector": ("wrong", _sql(SWAP_VECTOR, NO_FILES)),
    "captions in another order": (
        "wrong",
        _sql("UPDATE captions SET position = 7 - position WHERE position < 2"),
    ),
    "another time stamp": ("wrong", _sql(f"UPDATE items SET mtime_ns = 1 WHERE id = {ONE}")),
}


@pytest.fixture
def trial(lived: tuple[Path, Undisturbed], tmp_path: Path) -> Iterator[Path]:
    """The folder of the finished life, whose library is put back after the test."""
    folder, _ = lived
    shutil.copytree(folder / "photos.lib", tmp_path / "kept.lib")
    yield folder
    shutil.rmtree(folder / "photos.lib", ignore_errors=True)
    shutil.copytree(tmp_path / "kept.lib", folder / "photos.lib")


def test_a_life_that_nobody_disturbed_is_found_faultless(
    trial: Path, lived: tuple[Path, Undisturbed]
) -> None:
    faults: list[Fault] = []
    assert check_killed(trial, Story.read(trial / "journal"), lived[1], faults) == 0
    assert [*faults, *check_finished(trial, lived[1])] == []
    states = lived[1].states
    assert [len(states[step]) for step in ("index", "index again", "forget")] == [49, 52, 49]


@pytest.mark.parametrize("what", SABOTAGE)
def test_the_harness_notices(trial: Path, lived: tuple[Path, Undisturbed], what: str) -> None:
    word, spoil = SABOTAGE[what]
    spoil(trial / "photos.lib")
    after_kill: list[Fault] = []
    check_killed(trial, Story.read(trial / "journal"), lived[1], after_kill)
    assert word in {fault[0] for fault in after_kill}
    assert {fault[0] for fault in check_finished(trial, lived[1])}


@pytest.mark.parametrize(
    "statement",
    [
        LOSE_VECTOR,
        SWAP_VECTOR,
        "UPDATE store_info SET generation = 0",
        "DROP TABLE caption_embeddings",
        f"DELETE FROM words WHERE rowid = {ONE}",
        f"UPDATE words SET captions = 'another' WHERE rowid = {ONE}",
        "INSERT INTO words (rowid, name) VALUES (999, 'nobody')",
        "DROP TABLE words",
        "DROP TABLE words_terms",
        "DELETE FROM words_data WHERE id > 10",
        "DELETE FROM words_config",
    ],
)
def test_what_repair_brings_back_is_counted_and_is_no_fault(
    trial: Path, lived: tuple[Path, Undisturbed], statement: str
) -> None:
    _sql(statement)(trial / "photos.lib")
    faults: list[Fault] = []
    assert check_killed(trial, Story.read(trial / "journal"), lived[1], faults) == 1
    assert faults == []


def test_the_harness_notices_a_file_that_is_left_over(
    trial: Path, lived: tuple[Path, Undisturbed]
) -> None:
    (trial / "photos.lib" / "image-1-00000099.faiss.tmp").write_bytes(b"IxMp and then nothing")
    assert {word for word, _ in check_finished(trial, lived[1])} == {"stray"}
