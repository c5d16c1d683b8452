"""The catalogue's schema, transactions and rows."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from indexes import catalogue as tables
from indexes.catalogue import Catalogue
from indexes.errors import (
    InvalidRowsError,
    StoreDamagedError,
    StoreNotFoundError,
    StoreTooNewError,
)
from indexes.migrations import MIGRATIONS
from indexes.records import CaptionRow, ItemWrite, ModelSpec

MODEL = ModelSpec("toy", 2, "toy-1")
RIGHT, UP = np.array([1, 0], dtype=np.float32), np.array([0, 1], dtype=np.float32)


@pytest.fixture
def catalogue(tmp_path: Path) -> Iterator[Catalogue]:
    made = Catalogue(tmp_path / "catalogue.sqlite")
    made.migrate()
    made.add_model(MODEL)
    yield made
    made.close()


def item(file: str, vector: np.ndarray = RIGHT, **changes: object) -> ItemWrite:
    given: dict[str, object] = {"image_embedding": vector, "content_hash": None}
    return ItemWrite(file, 1, 2, width=3, height=4, **(given | changes))  # type: ignore[arg-type]


def test_migrated_tables_have_the_columns_that_queries_use(catalogue):
    with sqlite3.connect(catalogue.path) as connection:
        for table in tables.metadata.sorted_tables:
            found = connection.execute(f"PRAGMA table_info({table.name})").fetchall()
            assert [row[1] for row in found] == [column.name for column in table.columns]
    connection.close()


def test_migrations_are_recorded_and_run_once(catalogue):
    catalogue.migrate()
    with catalogue.read() as rows:
        recorded = rows._each("SELECT name FROM schema_migrations ORDER BY number")
        assert [name for (name,) in recorded] == [migration.__name__ for migration in MIGRATIONS]


def test_foreign_keys_wal_and_full_sync_are_on(catalogue):
    with catalogue.read() as rows:
        pragmas = [
            rows._first(f"PRAGMA {name}")[0]
            for name in ("foreign_keys", "journal_mode", "synchronous")
        ]
    assert pragmas == [1, "wal", 2]


def test_a_newer_schema_is_refused(catalogue):
    with catalogue.write() as rows:
        rows._core.execute(
            tables.schema_migrations.insert().values(number=99, name="m099", applied_at="later")
        )
    with pytest.raises(StoreTooNewError, match=r"has schema 99, this version knows up to 5: "):
        catalogue.pending_migrations()


@pytest.mark.parametrize("content", [b"SQLite format 3\0 and then nothing", b"x" * 9000])
def test_a_file_that_is_no_catalogue_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "catalogue.sqlite"
    path.write_bytes(content)
    stranger = Catalogue(path)
    with pytest.raises(StoreDamagedError):
        stranger.pending_migrations()
    stranger.close()
    assert path.read_bytes() == content


def test_an_empty_file_is_a_library_whose_making_was_cut_off_unless_it_has_vectors(tmp_path):
    (tmp_path / "catalogue.sqlite").touch()
    blank = Catalogue(tmp_path / "catalogue.sqlite")
    with pytest.raises(StoreNotFoundError, match="never completed"):
        blank.pending_migrations()
    (tmp_path / "image-1-00000001.faiss").touch()
    with pytest.raises(StoreDamagedError, match="not a catalogue of ours, or is empty"):
        blank.pending_migrations()
    blank.close()


def test_somebody_elses_database_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "catalogue.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE theirs (x)")
    connection.close()
    stranger = Catalogue(path)
    with pytest.raises(StoreDamagedError, match="not a catalogue of ours"):
        stranger.pending_migrations()
    stranger.close()
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("theirs",)]
    connection.close()


def test_ids_of_removed_rows_are_never_given_out_again(catalogue):
    with catalogue.write() as rows:
        root = rows.add_root(Path("/pictures"))
        [first, second] = rows.write_items(root, [item("a"), item("b")])
    with catalogue.write() as rows:
        rows.remove([first, second])
    with catalogue.write() as rows:
        [third] = rows.write_items(root, [item("a")])
    assert third > second


def test_a_block_that_raises_leaves_nothing(catalogue):
    with pytest.raises(ZeroDivisionError), catalogue.write() as rows:  # noqa: PT012
        rows.write_items(rows.add_root(Path("/pictures")), [item("a")])
        raise ZeroDivisionError
    with catalogue.read() as rows:
        assert rows.roots() == []
        assert rows.version() == (0, 0)


def test_a_savepoint_undoes_only_its_own_part(catalogue):
    with catalogue.write() as rows:
        root = rows.add_root(Path("/pictures"))
        rows.write_items(root, [item("a")])
        with pytest.raises(ZeroDivisionError), rows.savepoint():  # noqa: PT012
            rows.write_items(root, [item("b")])
            raise ZeroDivisionError
    with catalogue.read() as rows:
        assert list(rows.known_files(root)) == ["a"]


def test_a_snapshot_does_not_see_what_is_committed_after_it_began(catalogue):
    with catalogue.read() as before:
        assert before.counts()["items"] == 0
        with catalogue.write() as rows:
            rows.write_items(rows.add_root(Path("/pictures")), [item("a")])
        assert before.counts()["items"] == 0
    with catalogue.read() as after:
        assert after.counts()["items"] == 1


def test_an_unknown_root_is_refused(catalogue):
    with pytest.raises(InvalidRowsError, match="FOREIGN KEY"), catalogue.write() as rows:
        rows.write_items(77, [item("a")])


def test_embeddings_after_a_change_are_those_written_since(catalogue):
    with catalogue.write() as rows:
        root = rows.add_root(Path("/pictures"))
        [a, _] = rows.write_items(root, [item("a"), item("b")])
        change = rows.change
    with catalogue.write() as rows:
        rows.write_items(root, [item("a", UP, item_id=a)])
        [c] = rows.write_items(root, [item("c")])
    with catalogue.read() as rows:
        [(ids, vectors)] = rows.vectors("image", after=change)
        assert ids.tolist() == [a, c]
        assert vectors.tolist() == [[0, 1], [1, 0]]
        assert rows.vector_count("image", after=change) == 2
        # Its vector in an older FAISS file is struck out; the new one stands beside the file.
        assert rows.removed("image").tolist() == [a]


def test_find_by_hash_gives_the_oldest_item_that_has_an_embedding(catalogue):
    with catalogue.write() as rows:
        root = rows.add_root(Path("/pictures"))
        failed = item("a", content_hash=b"H", image_embedding=None, failure="broken")
        [_, second, _] = rows.write_items(
            root, [failed, item("b", content_hash=b"H"), item("c", content_hash=b"H")]
        )
    with catalogue.read() as rows:
        assert rows.find_by_hash([b"H", b"other"]) == {b"H": second}
        assert rows.find_by_hash([]) == {}


def test_more_ids_than_fit_into_one_statement(catalogue):
    with catalogue.write() as rows:
        root = rows.add_root(Path("/pictures"))
        ids = rows.write_items(
            root,
            [
                item(
                    f"{n}",
                    captions=(CaptionRow(f"text {n}", "given"),),
                    caption_embeddings=UP[None],
                )
                for n in range(1300)
            ],
        )
    with catalogue.read() as rows:
        found = rows.items(ids)
        assert [found[item_id].captions[0].text for item_id in ids] == [
            f"text {n}" for n in range(1300)
        ]
        assert len(rows.embeddings("image", ids)) == 1300
    with catalogue.write() as rows:
        rows.remove(ids)
    with catalogue.read() as rows:
        assert rows.counts() == {"items": 0, "captions": 0, "failures": 0}
        assert sorted(rows.removed("image")) == ids


def test_time_taken_is_the_wall_clock_of_the_camera(catalogue):
    taken = datetime(2024, 2, 29, 23, 59, 59, 123456, tzinfo=UTC)
    with catalogue.write() as rows:
        [item_id] = rows.write_items(rows.add_root(Path("/p")), [item("a", taken=taken)])
    with catalogue.read() as rows:
        assert rows.items([item_id])[item_id].taken == datetime(2024, 2, 29, 23, 59, 59, 123456)


reused = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@reused
@given(st.lists(st.binary(min_size=1).filter(lambda n: b"\0" not in n), max_size=60, unique=True))
def test_any_file_name_round_trips(catalogue, names):
    files = [name.decode("utf-8", "surrogateescape") for name in names]
    with catalogue.write() as rows:
        root = rows.add_root(Path("/any"))
        rows.remove([known.item_id for known in rows.known_files(root).values()])
        ids = rows.write_items(root, [item(file, content_hash=None) for file in files])
    with catalogue.read() as rows:
        assert set(rows.known_files(root)) == set(files)
        assert [rows.item_at(root, file) for file in files] == ids


@reused
@given(st.lists(st.text(), max_size=60))
def test_any_text_round_trips(catalogue, texts):
    captions = tuple(CaptionRow(text, "given") for text in texts)
    vectors = np.tile(UP, (len(texts), 1))
    with catalogue.write() as rows:
        root = rows.add_root(Path("/any"))
        change = item("a", captions=captions, caption_embeddings=vectors)
        [item_id] = rows.write_items(root, [change])
    with catalogue.read() as rows:
        assert rows.items([item_id])[item_id].captions == captions
        assert rows.known_files(root)["a"].captions == captions
