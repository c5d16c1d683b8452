"""The care of a store: migrations, several models, compaction, backup, repair."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tarfile
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_store import (
    DIM,
    MODEL,
    answers,
    faiss_file,
    fill,
    folder,
    item,
    random_rows,
    sizes,
    store,
    unit,
)

from indexes import care
from indexes import catalogue as tables
from indexes.care import repair
from indexes.errors import (
    InvalidRowsError,
    StoreDamagedError,
    StoreExistsError,
    StoreNotFoundError,
    StoreReadOnlyError,
    WrongModelError,
)
from indexes.migrations import MIGRATIONS
from indexes.store import CaptionRow, ModelSpec, Store

__all__ = ["folder", "store"]  # fixtures

FIXTURES = Path(__file__).parent / "fixtures"
OTHER = ModelSpec("other", 2, "other-fingerprint")


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, and what is cleaned up on its way is known."""


def execute(store: Store, *statements: str) -> None:
    """Behind the store's back."""
    with closing(sqlite3.connect(store.path / "catalogue.sqlite")) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def contents(store: Store) -> dict[Path, tuple[object, ...]]:
    """By path: what is known of the file, its embedding, its captions with theirs; no ids."""
    found = {}
    for one in store.items(store.item_ids()):
        image = store.embeddings("image", [one.item_id]) if one.status == "ok" else None
        texts = store.embeddings("caption", store.caption_ids(one.item_id)).tolist()
        found[one.path] = (
            (one.size, one.mtime_ns, one.content_hash, one.width, one.height, one.status),
            image.tolist() if image is not None else None,
            list(zip(one.captions, texts, strict=True)),
        )
    return found


# Migrations


@pytest.fixture(params=range(1, len(MIGRATIONS)))
def old_store(request: pytest.FixtureRequest, folder: Path) -> Path:
    """A store as each older version wrote it."""
    with tarfile.open(FIXTURES / f"schema-{request.param}.tar.gz") as archive:
        archive.extractall(folder / "old.lib", filter="data")
    return folder / "old.lib"


def test_a_store_of_every_older_schema_opens_with_all_that_was_in_it(old_store):
    with Store.open(old_store) as store:
        red, green = unit(1, 0, 0, 0), unit(0, 1, 0, 0)
        assert store.model == ModelSpec("toy", 4, "toy-1")
        assert [one.file for one in store.items(store.item_ids())] == [
            *("red.png", "more/green.png", "broken.jpg"),
        ]
        first, second, broken = store.items(store.item_ids())
        assert first.path == Path("/home/ann/Pictures/red.png")
        assert str(first.taken) == "2024-05-01 12:30:00"
        assert second.captions == (CaptionRow("un carré vert", "exif"),)
        assert (broken.status, broken.reason) == ("failed", "truncated or damaged")
        assert store.search("image", red[None], 3)[0].ids.tolist() == [
            first.item_id,
            second.item_id,
        ]
        [match] = store.search("caption", green[None], 1)
        assert store.captions(match.ids.tolist()) == [(second.item_id, second.captions[0])]
        assert store.root_infos()[0].indexed_at is None
        assert store.verify() == []
        # What older versions did not know: words are made, files are to be looked at again.
        with store.snapshot() as rows:
            assert rows.words("carres green", 5).ids.tolist() == [second.item_id]
            assert {*rows.words("pictures", 5).ids} == {first.item_id, second.item_id}
            assert rows.fit() is None
        assert {one.facts for one in store.known_files(1).values()} == {0}
        assert (first.camera, first.perceptual_hash, first.extras) == (None, None, ())
        with store.writer() as writer:
            writer.mark_indexed(1)
            writer.finish()
        assert store.root_infos()[0].indexed_at is not None
        assert store.verify() == []


def test_the_catalogue_is_copied_before_its_schema_changes(old_store):
    before = (old_store / "catalogue.sqlite").read_bytes()
    with closing(sqlite3.connect(old_store / "catalogue.sqlite")) as connection:
        [(schema,)] = connection.execute("SELECT max(number) FROM schema_migrations")
        expected = list(connection.iterdump())
    Store.open(old_store).close()
    assert (old_store / "catalogue.sqlite").read_bytes() != before
    with closing(sqlite3.connect(old_store / f"catalogue.schema-{schema}.sqlite")) as connection:
        assert list(connection.iterdump()) == expected


@pytest.mark.parametrize("place", ["before the copy", "after the copy", "inside"])
def test_a_migration_that_is_cut_off_leaves_the_old_schema_to_the_next(
    old_store, monkeypatch, place
):
    with closing(sqlite3.connect(old_store / "catalogue.sqlite")) as connection:
        expected = list(connection.iterdump())
    copy = tables.Catalogue.copy

    def cut_off(self, destination):
        if place == "after the copy":
            copy(self, destination)
        raise Killed

    def half(words):
        yield from MIGRATIONS[-1](words)
        raise Killed

    with monkeypatch.context() as patched:
        if place == "inside":
            patched.setattr(tables, "MIGRATIONS", (*MIGRATIONS[:-1], half))
        else:
            patched.setattr(tables.Catalogue, "copy", cut_off)
        with pytest.raises(Killed):
            Store.open(old_store)
    with closing(sqlite3.connect(old_store / "catalogue.sqlite")) as connection:
        assert list(connection.iterdump()) == expected
    with Store.open(old_store) as store:
        assert len(store.item_ids()) == 3
        assert store.verify() == []


def test_an_older_store_that_may_not_be_written_says_so(old_store):
    with pytest.raises(StoreReadOnlyError, match="made by an older version and must be brought up"):
        Store.open(old_store, read_only=True)
    assert [file.name for file in old_store.glob("catalogue.schema*")] == []


def test_a_store_of_this_schema_has_a_fixture_as_soon_as_a_later_one_exists():
    found = {file.name for file in FIXTURES.glob("schema-*.tar.gz")}
    assert found >= {f"schema-{number}.tar.gz" for number in range(1, len(MIGRATIONS))}


# Several models


@pytest.fixture
def two(store: Store) -> Iterator[Store]:
    """The filled store as a second model sees it, which has embedded the first five items."""
    ids = fill(store, 8)
    with Store.open(store.path, OTHER, add_model=True) as seen:
        with seen.writer() as writer:
            for place, item_id in enumerate(ids[:5]):
                vector = np.array([1, 0] if place % 2 else [0, 1], dtype=np.float32)
                writer.embed(item_id, vector, np.stack([vector, vector]))
            writer.finish()
        yield seen


def test_models_live_side_by_side_each_with_its_own_vectors(store, two):
    before = answers(store)
    [match] = two.search("image", np.array([[1, 0]], dtype=np.float32), 10)
    assert sorted(match.ids.tolist()) == [1, 2, 3, 4, 5]
    assert match.ids.tolist()[:2] == [2, 4]
    assert match.scores[:2].tolist() == [1, 1]
    assert answers(store) == before
    assert [(one.spec, one.is_default, one.pictures, one.captions) for one in two.models()] == [
        (MODEL, True, 8, 16),
        (OTHER, False, 5, 10),
    ]
    assert [one.pending for one in two.models()] == [0, 3]
    assert two.verify() == []


def test_what_a_model_has_not_embedded_is_told_file_by_file(store, two):
    known = two.known_files(1)
    assert [known[f"{n}.jpg"].picture_embedded for n in range(8)] == [True] * 5 + [False] * 3
    assert [known[f"{n}.jpg"].captions_embedded for n in range(8)] == [True] * 5 + [False] * 3
    assert all(one.picture_embedded for one in store.known_files(1).values())
    with store.writer() as writer:  # the default model; the other one has not seen the new text
        writer.set_captions(1, [CaptionRow("new", "given")], unit(1, 1, 0, 0)[None])
    assert two.known_files(1)["0.jpg"].picture_embedded
    assert not two.known_files(1)["0.jpg"].captions_embedded


def test_a_changed_picture_is_forgotten_by_every_model(store, two):
    with store.writer() as writer:
        writer.write(1, [item("1.jpg", unit(1, 2, 3, 4), content_hash=b"new")])
        writer.finish()
    [match] = two.search("image", np.array([[1, 0]], dtype=np.float32), 10)
    assert 2 not in match.ids.tolist()
    assert two.verify() == store.verify() == []


def test_a_model_that_the_store_does_not_have_is_refused_unless_it_is_added(store):
    with pytest.raises(WrongModelError, match="or index the pictures with this one"):
        Store.open(store.path, OTHER)
    Store.open(store.path, OTHER, add_model=True).close()
    with Store.open(store.path, OTHER) as seen:
        assert seen.model == OTHER
    with Store.open(store.path) as seen:
        assert seen.model == MODEL


def test_the_default_changes_and_the_old_one_stays_until_it_is_dropped(store, two):
    with two.writer() as writer:
        with pytest.raises(InvalidRowsError, match="default model cannot be dropped"):
            writer.drop_model(MODEL.fingerprint)
        writer.set_default_model(OTHER.fingerprint)
    with Store.open(store.path) as seen:
        assert seen.model == OTHER
    with Store.open(store.path, MODEL) as seen:
        assert len(seen.search("image", random_rows(1, 3), 10)[0].ids) == 8
    with two.writer() as writer:
        writer.drop_model(MODEL.fingerprint)
    assert [one.spec for one in two.models()] == [OTHER]
    assert [file.name for file in sorted(two.path.glob("*-1-*.faiss"))] == []
    # What only the dropped model had seen is read again by the next run.
    assert [one.file for one in two.failures()] == ["5.jpg", "6.jpg", "7.jpg"]
    assert all("a model that was dropped" in str(one.reason) for one in two.failures())
    assert two.verify() == []


def test_captions_changed_under_another_model_cost_no_picture_when_that_is_dropped(store, two):
    with two.writer() as writer:
        same = [CaptionRow("0.jpg 0", "given"), CaptionRow("0.jpg 1", "given")]
        more = np.array([[1, 0], [1, 0], [0, 1]], dtype=np.float32)
        writer.set_captions(1, [*same, CaptionRow("new", "given")], more)
        writer.drop_model(OTHER.fingerprint)
    assert len(store.search("image", random_rows(1, 3), 10)[0].ids) == 8
    assert store.failures() == []
    known = store.known_files(1)["0.jpg"]
    assert (known.picture_embedded, known.captions_embedded) == (True, False)
    with store.writer() as writer:
        vectors = np.stack([unit(1, 0, 0, 0), unit(0, 1, 0, 0), unit(0, 0, 1, 0)])
        writer.embed(1, None, vectors)
    assert store.verify() == []


def test_captions_that_stay_keep_their_embeddings_of_every_model(store, two):
    before = two.embeddings("caption", two.caption_ids(1)).tolist()
    with store.writer() as writer:
        texts = [CaptionRow(f"0.jpg {n}", "given") for n in range(2)]
        rows = np.concatenate(
            [store.embeddings("caption", store.caption_ids(1)), random_rows(1, 9)]
        )
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        writer.set_captions(1, [*texts, CaptionRow("new", "given")], rows)
    ids = two.caption_ids(1)
    assert two.embeddings("caption", ids[:2]).tolist() == before
    assert two.embedded("caption", ids) == set(ids[:2])
    assert store.embedded("caption", ids) == set(ids)


def test_who_has_a_dropped_model_open_is_told(store, two):
    assert len(two.search("image", np.array([[1, 0]], dtype=np.float32), 10)[0].ids) == 5
    with store.writer() as writer:
        writer.drop_model(OTHER.fingerprint)
    with pytest.raises(WrongModelError, match="no longer has the model"):
        two.search("image", np.array([[1, 0]], dtype=np.float32), 10)
    with pytest.raises(WrongModelError, match="no longer has the model"), two.writer():
        pass


def test_what_one_model_lost_of_an_item_it_is_given_again(store, two):
    execute(store, "DELETE FROM caption_embeddings WHERE model_id = 2 AND owner_id = 1")
    assert not two.known_files(1)["0.jpg"].captions_embedded
    with two.writer() as writer:
        writer.embed(1, None, np.array([[1, 0], [1, 0]], dtype=np.float32))
    assert two.known_files(1)["0.jpg"].captions_embedded


# Roots


def test_a_root_moves_with_its_items_and_is_forgotten_with_them(store):
    ids = fill(store, 3)
    with store.writer() as writer:
        writer.relocate_root(1, Path("/mnt/elsewhere"))
    assert [one.path for one in store.items(ids[:1])] == [Path("/mnt/elsewhere/0.jpg")]
    [root] = store.root_infos()
    assert (root.path, root.items, root.failures) == (Path("/mnt/elsewhere"), 3, 0)
    with store.writer() as writer:
        assert writer.forget_root(1) == 3
    assert store.roots() == store.root_infos() == []
    assert store.search("image", random_rows(1, 3), 10)[0].ids.tolist() == []
    assert store.verify() == []


# Compaction and backup


def test_compaction_strikes_out_what_was_removed_and_gives_space_back(store):
    ids = fill(store, 400)
    with store.writer() as writer:
        writer.remove(ids[20:])
    expected = answers(store)
    before, after = store.compact()
    assert after < before / 2
    assert answers(store) == expected
    assert sizes(store.info()["index"]["image"]) == [20, 20, 0, 0]
    assert store.verify() == []


def test_ids_are_not_given_out_again_after_a_compaction(store):
    ids = fill(store, 5)
    with store.writer() as writer:
        writer.remove(ids)
    store.compact()
    assert min(fill(store, 5)) > max(ids)


def test_a_backup_is_a_store_of_its_own_with_the_same_contents(folder, store):
    fill(store, 30)
    with store.writer() as writer:
        writer.remove([3])
    store.backup(folder / "copy" / "photos.lib")
    with Store.open(folder / "copy" / "photos.lib", MODEL) as copy:
        assert contents(copy) == contents(store)
        assert answers(copy) == answers(store)
        assert copy.verify() == []
        with copy.writer() as writer:
            writer.remove([1])
    assert store.items([1])
    with pytest.raises(StoreExistsError, match="exists already: name a new folder"):
        store.backup(folder / "copy" / "photos.lib")


def test_a_backup_is_made_while_another_writes_and_has_whole_transactions_only(folder, store):
    fill(store, 10)
    with store.writer() as writer, writer.together():
        writer.remove([1, 2])
        store.backup(folder / "copy.lib")
    with Store.open(folder / "copy.lib") as copy:
        assert len(copy.item_ids()) == 10
        assert copy.verify() == []


def test_what_a_cut_off_backup_left_is_replaced(folder, store):
    fill(store, 3)
    (folder / "copy.lib.partial").mkdir()
    (folder / "copy.lib.partial" / "catalogue.sqlite").write_bytes(b"half")
    store.backup(folder / "copy.lib")
    with Store.open(folder / "copy.lib") as copy:
        assert contents(copy) == contents(store)
    assert not (folder / "copy.lib.partial").exists()


def test_a_backup_takes_nothing_away_that_is_not_its_own(folder, store):
    fill(store, 3)
    (folder / "copy.lib.partial").mkdir()
    (folder / "copy.lib.partial" / "diary.txt").write_text("mine")
    with pytest.raises(StoreExistsError, match="is in the way"):
        store.backup(folder / "copy.lib")
    assert (folder / "copy.lib.partial" / "diary.txt").read_text() == "mine"


def test_a_store_is_copied_to_a_folder_whose_name_is_no_text(folder, store):
    fill(store, 3)
    place = folder / os.fsdecode(b"n\xff.lib")
    store.backup(place)
    with Store.open(place) as copy:
        assert contents(copy) == contents(store)


def test_a_few_changes_are_searched_beside_the_file_and_compaction_takes_them_in(store):
    fill(store, 200)
    with store.writer() as writer:
        [late] = writer.write(1, [item("late.jpg", unit(1, 2, 3, 4))])
        writer.remove([5])
        writer.finish()
    assert store.generation == 1
    assert store.search("image", unit(1, 2, 3, 4)[None], 1)[0].ids.tolist() == [late]
    assert 5 not in store.search("image", random_rows(1, 3), 300)[0].ids
    expected = answers(store)
    store.compact()
    assert sizes(store.info()["index"]["image"]) == [200, 200, 0, 0]
    assert answers(store) == expected


# Repair


def test_there_is_nothing_to_mend_in_a_sound_store(folder, store):
    fill(store)
    expected, generation = contents(store), store.generation
    assert repair(store.path) == []
    assert contents(store) == expected
    assert store.generation == generation
    with pytest.raises(StoreNotFoundError):
        repair(folder / "nowhere")


@pytest.mark.parametrize(
    "fault",
    [
        "UPDATE image_embeddings SET vector = zeroblob(8) WHERE owner_id = 3",
        "UPDATE image_embeddings SET vector = x'007c007c007c007c'",
        "UPDATE image_embeddings SET vector = x'003c000000000000' WHERE owner_id IN (3, 4)",
        "UPDATE caption_embeddings SET vector = x'003c' WHERE owner_id = 3",
        "DELETE FROM image_embeddings WHERE owner_id = 3",
        "DELETE FROM caption_embeddings WHERE owner_id = 3",
        "UPDATE index_files SET checksum = 'x'",
        "UPDATE store_info SET generation = 0",
    ],
)
def test_what_the_other_file_still_has_is_mended_without_loss(store, fault):
    fill(store)
    expected = contents(store), answers(store)
    execute(store, fault)
    assert store.verify() != []
    assert repair(store.path) != []
    with Store.open(store.path) as again:
        assert again.verify() == []
        assert (contents(again), answers(again)) == expected
        assert repair(store.path) == []


def test_a_vector_that_nothing_else_has_is_taken_out_and_its_picture_read_again(store):
    fill(store, 5)
    with store.writer() as writer:
        [late] = writer.write(1, [item("late.jpg", unit(1, 2, 3, 4), unit(1, 0, 0, 0))])
    execute(store, f"UPDATE image_embeddings SET vector = zeroblob(8) WHERE owner_id = {late}")
    done = repair(store.path)
    assert "1 image vectors of toy were damaged and were removed" in done
    assert any("1 pictures have lost an embedding" in one for one in done)
    with Store.open(store.path) as again:
        assert again.verify() == []
        [failed] = again.failures()
        assert (failed.file, failed.content_hash) == ("late.jpg", None)
        assert failed.captions == (CaptionRow("late.jpg 0", "given"),)


def test_an_older_vector_is_not_taken_for_one_that_changed_since(store):
    fill(store, 5)
    with store.writer() as writer:
        writer.write(1, [item("1.jpg", unit(1, 2, 3, 4), content_hash=b"new")])
    execute(store, "DELETE FROM image_embeddings WHERE owner_id = 2")
    repair(store.path)
    with Store.open(store.path) as again:
        assert again.verify() == []
        assert [one.item_id for one in again.failures()] == [2]


def test_rows_that_belong_to_nothing_are_removed(store):
    fill(store, 5)
    execute(store, "DELETE FROM items WHERE id = 3", "DELETE FROM captions WHERE id = 1")
    assert any("belong to nothing" in done for done in repair(store.path))
    with Store.open(store.path) as again:
        assert again.verify() == []
        assert again.item_ids() == [1, 2, 4, 5]


def page_of(store: Store, table: str) -> list[int]:
    """Numbers of the pages of a table, from 0, without its topmost."""
    with closing(sqlite3.connect(store.path / "catalogue.sqlite")) as connection:
        rows = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", [table])
        [(root,)] = rows.fetchall()
    return [root - 1]


def spoil(store: Store, *pages: int) -> None:
    store.close()
    with (store.path / "catalogue.sqlite").open("r+b") as file:
        for page in pages:
            file.seek(4096 * page)
            file.write(b"\xa5" * 4096)


def test_a_lost_page_of_vectors_is_healed_from_the_faiss_file(store):
    fill(store, 300)
    expected = contents(store), answers(store)
    spoil(store, *page_of(store, "image_embeddings"))
    with Store.open(store.path) as spoilt:
        assert "`retriever repair` saves what can be read" in spoilt.verify()[-1]
    done = repair(store.path)
    assert "300 image vectors of toy were taken from image-1-00000001.faiss" in done
    [kept] = store.path.glob("catalogue.damaged-*.sqlite")
    assert any(kept.name in one for one in done)
    with Store.open(store.path) as again:
        assert again.verify() == []
        assert (contents(again), answers(again)) == expected


@pytest.mark.parametrize("share", [0.4, 0.6, 0.7])
def test_of_a_truncated_catalogue_what_is_saved_is_right_and_the_rest_is_read_again(store, share):
    fill(store, 700)
    expected = contents(store)
    store.close()
    file = store.path / "catalogue.sqlite"
    with file.open("r+b") as opened:
        opened.truncate(int(file.stat().st_size * share))
    done = repair(store.path)
    assert any("others could not be read" in one for one in done)
    with Store.open(store.path) as again:
        assert again.verify() == []
        found = contents(again)
        for path, (facts, image, texts) in found.items():
            if facts[-1] == "ok":
                assert image == expected[path][1]
                assert all(text in expected[path][2] for text in texts)
                is_whole = texts == expected[path][2]
                assert is_whole or facts[1:3] == (-1, None)  # so that the next run reads it
        assert 0 < len(found) <= 700


def test_of_a_catalogue_that_lost_its_last_pages_the_words_are_made_again(store):
    fill(store, 700)
    expected = contents(store)
    with store.snapshot() as rows:
        found = [rows.words(text, 5).scores.tolist() for text in ("0 jpg", "p12")]
    store.close()
    file = store.path / "catalogue.sqlite"
    with file.open("r+b") as opened:
        opened.truncate(int(file.stat().st_size * 0.9))
    assert any(one.startswith("the words were made anew") for one in repair(store.path))
    with Store.open(store.path) as again:
        assert (again.verify(), contents(again)) == ([], expected)
        with again.snapshot() as rows:
            assert [rows.words(text, 5).scores.tolist() for text in ("0 jpg", "p12")] == found


def test_a_catalogue_of_which_nothing_is_left_says_so_and_is_kept(store):
    fill(store, 5)
    store.close()
    file = store.path / "catalogue.sqlite"
    size = file.stat().st_size
    file.write_bytes(bytes(size))
    with pytest.raises(StoreDamagedError, match=r"restore a backup, or remove the library"):
        repair(store.path)
    assert file.read_bytes() == bytes(size)
    assert sorted(one.name for one in store.path.iterdir() if "saved" in one.name) == []


@pytest.mark.parametrize("step", range(12))
def test_a_repair_that_is_cut_off_anywhere_is_finished_by_the_next(store, monkeypatch, step):
    fill(store, 50)
    with store.writer() as writer:
        writer.remove([7])
    expected = contents(store)
    spoil(store, *page_of(store, "image_embeddings"))
    calls = 0

    def counted(original):
        def call(*args, **options):
            nonlocal calls
            calls += 1
            if calls > step:
                raise Killed
            return original(*args, **options)

        return call

    with monkeypatch.context() as patched:
        for name in ("replace", "unlink"):
            patched.setattr(Path, name, counted(getattr(Path, name)))
        patched.setattr(care, "sync", counted(care.sync))
        patched.setattr(care, "_mend_rows", counted(care._mend_rows))
        patched.setattr(care, "_mend_files", counted(care._mend_files))
        with suppress(Killed):
            repair(store.path)
    repair(store.path)
    with Store.open(store.path) as again:
        assert contents(again) == expected
        assert again.verify() == []
        assert 7 not in again.search("image", random_rows(1, 3), 60)[0].ids


def test_a_store_whose_repair_was_cut_off_at_the_exchange_is_not_used_before_it_is_finished(store):
    fill(store, 5)
    store.close()
    (store.path / "catalogue.sqlite").replace(store.path / "catalogue.replacement.sqlite")
    with pytest.raises(
        StoreDamagedError, match="a repair was cut off; `retriever repair` finishes"
    ):
        Store.open(store.path)
    repair(store.path)
    with Store.open(store.path) as again:
        assert len(again.item_ids()) == 5


def test_what_an_old_repair_left_does_not_replace_a_sound_catalogue(store):
    fill(store, 5)
    store.backup(store.path.parent / "old.lib")
    left = store.path / "catalogue.saved.sqlite"
    shutil.copyfile(store.path.parent / "old.lib" / "catalogue.sqlite", left)
    with store.writer() as writer:
        writer.write(1, [item("new.jpg", unit(1, 2, 3, 4))])
    assert repair(store.path) == []
    assert len(store.item_ids()) == 6
    assert not left.exists()


def test_who_had_the_store_open_during_a_repair_goes_on_with_the_new_catalogue(store):
    fill(store, 50)
    assert len(store.item_ids()) == 50
    page = page_of(store, "image_embeddings")[0]
    with sqlite3.connect(store.path / "catalogue.sqlite") as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    with (store.path / "catalogue.sqlite").open("r+b") as file:
        file.seek(4096 * page)
        file.write(b"\xa5" * 4096)
    repair(store.path)
    with store.writer() as writer:
        writer.write(1, [item("new.jpg", unit(1, 2, 3, 4))])
    assert len(store.item_ids()) == 51
    with Store.open(store.path) as fresh:
        assert len(fresh.item_ids()) == 51


def test_both_kinds_and_all_models_are_healed_at_once(store, two):
    expected, theirs = contents(store), two.embeddings("image", [1]).tolist()
    execute(
        store,
        "DELETE FROM image_embeddings WHERE owner_id = 1",
        "DELETE FROM caption_embeddings WHERE owner_id = 3",
    )
    repair(store.path)
    with Store.open(store.path, MODEL) as again, Store.open(store.path, OTHER) as other:
        assert contents(again) == expected
        assert other.embeddings("image", [1]).tolist() == theirs
        assert again.verify() == []


def test_a_lost_default_model_is_chosen_again(store):
    fill(store, 5)
    execute(store, "DELETE FROM store_info")
    with pytest.raises(StoreDamagedError, match="no longer says which model"):
        Store.open(store.path)
    assert any("which model is its default" in one for one in repair(store.path))
    with Store.open(store.path) as again:
        assert again.model == MODEL
        assert again.verify() == []


def test_repair_brings_an_older_store_up_to_date_and_calls_it_sound(old_store):
    assert not any("damaged" in one for one in repair(old_store))
    with Store.open(old_store) as store:
        assert len(store.item_ids()) == 3
        assert store.verify() == []


def test_a_disk_that_flips_any_bit_never_brings_another_error_than_ours(store):
    """What SQLite cannot see (a letter of a caption) may change."""
    fill(store, 60)
    store.close()
    file = store.path / "catalogue.sqlite"
    intact = file.read_bytes()
    rng = np.random.default_rng(5)
    for place in rng.integers(0, len(intact), 60).tolist():
        content = bytearray(intact)
        content[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(content)
        try:
            with Store.open(store.path) as spoilt:
                for ids, _ in answers(spoilt):
                    assert set(ids) <= set(range(1, 121))
                spoilt.items(spoilt.item_ids())
                spoilt.verify()
        except (StoreDamagedError, StoreNotFoundError, StoreReadOnlyError):
            pass
        for old in store.path.glob("catalogue.sqlite-*"):
            old.unlink()


def test_a_faiss_file_alone_is_mended_by_repair(store):
    fill(store)
    expected = answers(store)
    faiss_file(store).write_bytes(b"junk")
    assert any("were made anew" in done for done in repair(store.path))
    with Store.open(store.path, read_only=True) as again:
        assert again.verify() == []
        assert answers(again) == expected


def test_the_model_keeps_its_dimension(store):
    with pytest.raises(WrongModelError):
        Store.open(store.path, replace(MODEL, dim=DIM + 1), add_model=True)


@pytest.mark.parametrize(
    "fault",
    [
        "UPDATE roots SET path = 7",
        "UPDATE roots SET indexed_at = 7",
        "UPDATE items SET taken = 7 WHERE id = 3",
        "UPDATE items SET file = 'text' WHERE id = 3",
        "UPDATE items SET size = 'many' WHERE id = 3",
        "UPDATE captions SET text = x'00' WHERE id = 3",
        "UPDATE image_embeddings SET vector = 'text' WHERE owner_id = 3",
    ],
)
def test_a_value_of_a_wrong_type_is_found_and_its_row_taken_out(store, fault):
    fill(store, 5)
    execute(store, fault)
    assert any("of a wrong type" in problem for problem in store.verify())
    store.close()
    repair(store.path)
    with Store.open(store.path) as again:
        assert again.verify() == []
        assert len(again.items(again.item_ids())) in (0, 4, 5)
        again.root_infos()


def test_a_fault_of_the_callers_is_not_taken_for_one_of_the_database(store):
    with pytest.raises(ValueError, match="mine"), store.writer() as writer, writer.together():
        raise ValueError("mine")


def test_damage_that_a_block_of_the_callers_meets_is_told(store):
    fill(store, 3)
    execute(store, "DROP TABLE words_terms")
    with pytest.raises(StoreDamagedError, match="repair"), store.snapshot() as rows:
        rows.words("dog", 1)


@pytest.mark.parametrize("where", ["", " WHERE owner_id = 1"])
def test_vectors_of_a_wrong_length_are_told_as_damage(store, where):
    fill(store, 3, finish=False)
    execute(store, "UPDATE image_embeddings SET vector = x'003c0000'" + where)
    assert any("image" in problem for problem in store.verify())
    with pytest.raises(StoreDamagedError, match="`retriever repair`"):
        store.embeddings("image", [1])
    with pytest.raises(StoreDamagedError, match="`retriever repair`"):
        store.search("image", random_rows(1, 3), 2)
    repair(store.path)
    with Store.open(store.path) as again:
        assert again.verify() == []
