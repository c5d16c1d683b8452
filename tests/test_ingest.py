"""Indexing a folder: what is read, what is saved, what is reported, and what survives."""

import os
import shutil
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import COLOURS, ToyEncoder, paint
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from PIL import Image

from indexes.errors import StoreLockedError
from indexes.records import FACTS, ItemWrite
from indexes.store import CaptionRow, ItemRow, ModelSpec, Store
from indexes.writer import Writer
from retriever import ingest
from retriever.data import Decoded
from retriever.errors import CaptionError, FolderGoneError, UsageError
from retriever.ingest import Failure, IndexReport, content_hash, index_folder, index_folders
from retriever.preprocessing import Preprocessing
from retriever.workers import DecodeWorkers

Index = Callable[..., IndexReport]


@pytest.fixture
def index(fresh_store: Store, toy_encoder: ToyEncoder) -> Index:
    def run(folder: Path, **options: Any) -> IndexReport:
        return index_folder(fresh_store, lambda: toy_encoder, folder, **options)

    return run


def items_of(store: Store) -> dict[str, ItemRow]:
    known = (one for root_id, _ in store.roots() for one in store.known_files(root_id).values())
    return {str(item.path): item for item in store.items([one.item_id for one in known])}


def embedding_of(store: Store, path: Path) -> np.ndarray:
    return store.embeddings("image", [items_of(store)[str(path)].item_id])[0]


def texts_of(store: Store, path: Path) -> list[str]:
    return [caption.text for caption in items_of(store)[str(path)].captions]


def touch(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))


def no_encoder() -> ToyEncoder:
    raise AssertionError("nothing had to be encoded")


# ── What a run does to a library ─────────────────────────────────────────────────────────────────


def test_new_pictures_are_added_with_captions_size_and_embeddings(
    index: Index, fresh_store: Store, tiny_pairs: Path
) -> None:
    assert index(tiny_pairs) == IndexReport(added=5)
    item = items_of(fresh_store)[str(tiny_pairs / "red.png")]
    assert (item.width, item.height, item.status) == (8, 8, "ok")
    assert item.captions == (
        CaptionRow("a red square", "sidecar"),
        CaptionRow("all red, nothing else", "sidecar"),
    )
    assert embedding_of(fresh_store, tiny_pairs / "red.png") == pytest.approx([1, 0, 0, 0])
    ids = fresh_store.caption_ids(item.item_id)
    assert fresh_store.embeddings("caption", ids) == pytest.approx(np.array([[1, 0, 0, 0]] * 2))
    assert fresh_store.verify() == []


def test_a_second_run_reads_no_picture_and_needs_no_encoder(
    index: Index, fresh_store: Store, tiny_pairs: Path
) -> None:
    index(tiny_pairs)
    for picture in tiny_pairs.rglob("*.png"):  # whoever reads it now will know
        status = picture.stat()
        picture.write_bytes(b"?" * status.st_size)
        os.utime(picture, ns=(status.st_atime_ns, status.st_mtime_ns))
    calls: list[tuple[int, int]] = []
    report = index_folder(
        fresh_store, no_encoder, tiny_pairs, progress=lambda *call: calls.append(call)
    )
    assert report == IndexReport(unchanged=5)
    assert calls == []


def test_a_new_time_stamp_on_equal_content_keeps_the_embeddings(
    index: Index, fresh_store: Store, tiny_pairs: Path
) -> None:
    index(tiny_pairs)
    touch(tiny_pairs / "red.png")
    assert index_folder(fresh_store, no_encoder, tiny_pairs) == IndexReport(unchanged=5)
    stored = items_of(fresh_store)[str(tiny_pairs / "red.png")].mtime_ns
    assert stored == (tiny_pairs / "red.png").stat().st_mtime_ns


def test_other_content_is_encoded_again(
    index: Index, fresh_store: Store, tiny_pairs: Path, toy_encoder: ToyEncoder
) -> None:
    index(tiny_pairs)
    paint(tiny_pairs / "red.png", "cyan", side=9)
    toy_encoder.images_seen = 0
    assert index(tiny_pairs) == IndexReport(updated=1, unchanged=4)
    assert toy_encoder.images_seen == 1
    expected = np.array([0, 1, 1, 0]) / np.sqrt(2)
    assert embedding_of(fresh_store, tiny_pairs / "red.png") == pytest.approx(expected, abs=1e-3)


def test_edited_captions_are_picked_up_without_encoding_the_picture(
    index: Index,
    fresh_store: Store,
    tiny_pairs: Path,
    toy_encoder: ToyEncoder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    index(tiny_pairs)
    (tiny_pairs / "red.txt").write_text("a cyan surprise\n")
    (tiny_pairs / "green.txt").unlink()
    toy_encoder.images_seen = 0
    monkeypatch.setattr("subprocess.Popen", no_encoder)  # nor is anything started to decode it
    assert index(tiny_pairs) == IndexReport(updated=2, unchanged=3)
    assert toy_encoder.images_seen == 0
    assert texts_of(fresh_store, tiny_pairs / "red.png") == ["a cyan surprise"]
    assert texts_of(fresh_store, tiny_pairs / "green.png") == []
    assert fresh_store.verify() == []


def test_descriptions_inside_a_picture_come_after_those_beside_it_and_stay(
    index: Index, fresh_store: Store, tmp_path: Path
) -> None:
    path = tmp_path / "p/described.jpg"
    path.parent.mkdir()
    exif = Image.Exif()
    exif[0x010E] = "blue in the file"
    Image.new("RGB", (8, 8), "blue").save(path, exif=exif)
    sidecar = path.with_suffix(".txt")
    sidecar.write_text("blue beside the file\n")
    index(path.parent)
    assert texts_of(fresh_store, path) == ["blue beside the file", "blue in the file"]
    sidecar.write_text("another\n")
    assert index(path.parent).updated == 1
    assert texts_of(fresh_store, path) == ["another", "blue in the file"]
    shutil.copyfile(path, path.with_name("copy.jpg"))
    assert index(path.parent).added == 1
    assert texts_of(fresh_store, path.with_name("copy.jpg")) == ["blue in the file"]


def test_a_renamed_picture_keeps_its_id_and_its_embedding(
    index: Index, fresh_store: Store, tiny_pairs: Path, toy_encoder: ToyEncoder
) -> None:
    index(tiny_pairs)
    before = items_of(fresh_store)[str(tiny_pairs / "red.png")].item_id
    (tiny_pairs / "red.png").rename(tiny_pairs / "more/crimson.png")
    toy_encoder.images_seen = 0
    assert index(tiny_pairs) == IndexReport(moved=1, unchanged=4)
    assert toy_encoder.images_seen == 0
    item = items_of(fresh_store)[str(tiny_pairs / "more/crimson.png")]
    assert item.item_id == before
    assert item.captions == ()  # its captions lie beside the old name
    assert str(tiny_pairs / "red.png") not in items_of(fresh_store)


def test_pictures_that_swap_names_swap_embeddings(
    index: Index, fresh_store: Store, tiny_pairs: Path
) -> None:
    index(tiny_pairs)
    red, green, aside = (tiny_pairs / name for name in ("red.png", "green.png", "aside"))
    red.rename(aside)
    green.rename(red)
    aside.rename(green)
    # Both files have one size, and perhaps one time stamp: equal stats would mean "unchanged".
    touch(red)
    touch(green)
    touch(green)
    assert index_folder(fresh_store, ToyEncoder, tiny_pairs) == IndexReport(updated=2, unchanged=3)
    assert embedding_of(fresh_store, red) == pytest.approx([0, 1, 0, 0])
    assert embedding_of(fresh_store, green) == pytest.approx([1, 0, 0, 0])


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_copies_are_items_of_their_own_and_are_encoded_once(
    fresh_store: Store, toy_encoder: ToyEncoder, tmp_path: Path, batch_size: int
) -> None:
    original = paint(tmp_path / "p/a.png", "red")
    for name in "bcdef":
        shutil.copyfile(original, tmp_path / f"p/{name}.png")
    report = index_folder(fresh_store, lambda: toy_encoder, tmp_path / "p", batch_size=batch_size)
    assert report == IndexReport(added=6)
    assert toy_encoder.images_seen == 1
    match = fresh_store.search("image", toy_encoder.encode_texts(["red"]), 10)[0]
    assert len(match.ids) == 6


def test_a_copy_outlives_its_original(index: Index, fresh_store: Store, tmp_path: Path) -> None:
    original = paint(tmp_path / "p/a.png", "red")
    shutil.copyfile(original, tmp_path / "p/b.png")
    index(tmp_path / "p")
    original.unlink()
    assert index(tmp_path / "p") == IndexReport(removed=1, unchanged=1)
    assert embedding_of(fresh_store, tmp_path / "p/b.png") == pytest.approx([1, 0, 0, 0])


def test_deleted_pictures_are_removed(index: Index, fresh_store: Store, tiny_pairs: Path) -> None:
    index(tiny_pairs)
    (tiny_pairs / "red.png").unlink()
    shutil.rmtree(tiny_pairs / "more")
    assert index(tiny_pairs) == IndexReport(removed=2, unchanged=3)
    assert len(items_of(fresh_store)) == 3


# ── Folders: missing, empty, unreadable, overlapping ─────────────────────────────────────────────


def test_a_folder_that_is_missing_or_a_file_is_refused(index: Index, tiny_pairs: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        index(tiny_pairs / "nowhere")
    with pytest.raises(UsageError, match="no folder"):
        index(tiny_pairs / "red.png")


def test_a_folder_without_pictures_leaves_no_trace(
    index: Index, fresh_store: Store, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    assert index(tmp_path / "empty") == IndexReport()
    assert fresh_store.roots() == []


@pytest.mark.parametrize("part", [".", "more"])
def test_an_emptied_folder_is_reported_and_nothing_is_removed(
    index: Index, fresh_store: Store, tiny_pairs: Path, part: str
) -> None:
    index(tiny_pairs)
    shutil.rmtree(tiny_pairs / part)
    (tiny_pairs / part).mkdir()
    with pytest.raises(FolderGoneError, match=r"nothing was removed.*--prune"):
        index(tiny_pairs / part)
    assert len(items_of(fresh_store)) == 5


@pytest.mark.parametrize("part", [".", "more"])
def test_a_folder_that_is_gone_is_reported_and_nothing_is_removed(
    index: Index, fresh_store: Store, tiny_pairs: Path, part: str
) -> None:
    index(tiny_pairs)
    shutil.rmtree(tiny_pairs / part)
    with pytest.raises(FolderGoneError, match=r"is not there.*nothing was removed.*--prune"):
        index(tiny_pairs / part)
    assert len(items_of(fresh_store)) == 5


@pytest.mark.parametrize("is_empty", [True, False])
@pytest.mark.parametrize(("part", "left"), [(".", 0), ("more", 4)])
def test_what_was_in_a_folder_that_is_gone_or_empty_is_removed_when_asked(
    index: Index, fresh_store: Store, tiny_pairs: Path, part: str, left: int, is_empty: bool
) -> None:
    index(tiny_pairs)
    shutil.rmtree(tiny_pairs / part)
    if is_empty:
        (tiny_pairs / part).mkdir()
    assert index(tiny_pairs / part, prune=True) == IndexReport(removed=5 - left)
    assert len(items_of(fresh_store)) == left
    assert fresh_store.verify() == []


def test_pruning_removes_nothing_that_is_there(index: Index, tiny_pairs: Path) -> None:
    assert index(tiny_pairs, prune=True) == IndexReport(added=5)
    assert index(tiny_pairs, prune=True) == IndexReport(unchanged=5)


def test_pruning_a_folder_that_nobody_knows_is_wrong_usage(index: Index, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        index(tmp_path / "nowhere", prune=True)
    (tmp_path / "empty").mkdir()
    assert index(tmp_path / "empty", prune=True) == IndexReport()


def test_a_loop_of_links_is_wrong_usage(index: Index, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UsageError, match="loop"):
        index(tmp_path / "loop")


def test_pictures_behind_a_link_to_nothing_are_left_alone(
    index: Index, fresh_store: Store, tiny_pairs: Path, tmp_path: Path
) -> None:
    drive = tmp_path / "drive"
    paint(drive / "deep/cyan.png", "cyan")
    paint(drive / "magenta.png", "magenta")
    paint(tmp_path / "one.png", "cyan", side=3)
    (tiny_pairs / "more/drive").symlink_to(drive)
    (tiny_pairs / "linked.png").symlink_to(tmp_path / "one.png")
    assert index(tiny_pairs) == IndexReport(added=8)
    drive.rename(tmp_path / "unmounted")
    (tmp_path / "one.png").unlink()
    (tiny_pairs / "red.png").unlink()
    report = index(tiny_pairs)
    assert (report.removed, report.unchanged) == (1, 4)
    (problem,) = (one for one in report.problems if one.startswith("more/drive: "))
    assert problem == (
        "more/drive: a link to nothing; known pictures left alone there: 2 (--prune removes them)"
    )
    assert len(items_of(fresh_store)) == 7
    (tmp_path / "unmounted").rename(drive)
    report = index(tiny_pairs)
    assert (report.removed, report.unchanged) == (0, 6)
    shutil.rmtree(drive)
    assert index(tiny_pairs, prune=True).removed == 3
    assert len(items_of(fresh_store)) == 4


def test_pictures_behind_a_link_that_was_taken_away_are_removed(
    index: Index, tiny_pairs: Path, tmp_path: Path
) -> None:
    paint(tmp_path / "drive/cyan.png", "cyan")
    (tiny_pairs / "drive").symlink_to(tmp_path / "drive")
    assert index(tiny_pairs).added == 6
    (tiny_pairs / "drive").unlink()
    assert index(tiny_pairs) == IndexReport(removed=1, unchanged=5)


def test_a_root_inside_that_is_not_mounted_is_left_alone(
    index: Index, fresh_store: Store, tiny_pairs: Path
) -> None:
    index(tiny_pairs / "more")
    (tiny_pairs / "more").rename(tiny_pairs.parent / "aside")
    (tiny_pairs / "more").mkdir()
    report = index(tiny_pairs)
    assert (report.added, report.removed) == (4, 0)
    assert report.problems == (
        f"{tiny_pairs / 'more'} is empty or not there; known pictures left alone there: 1"
        " (--prune removes them)",
    )
    assert str(tiny_pairs / "more/yellow.png") in items_of(fresh_store)
    (tiny_pairs / "more").rmdir()
    (tiny_pairs.parent / "aside").rename(tiny_pairs / "more")
    assert index(tiny_pairs) == IndexReport(unchanged=5)
    assert [path for _, path in fresh_store.roots()] == [tiny_pairs]


def test_a_folder_that_goes_away_while_it_is_read_loses_nothing(
    index: Index, fresh_store: Store, tiny_pairs: Path
) -> None:
    index(tiny_pairs)
    (tiny_pairs / "red.png").unlink()
    paint(tiny_pairs / "zebra.png", "cyan")
    report = index(tiny_pairs, progress=lambda done, total: shutil.rmtree(tiny_pairs, True))
    assert (report.removed, report.unchanged, len(report.failed)) == (0, 4, 1)
    assert report.problems == (
        f"{tiny_pairs} went away while it was read; known pictures left alone there: 1"
        " (--prune removes them)",
    )
    assert str(tiny_pairs / "red.png") in items_of(fresh_store)


def test_a_root_remembers_when_all_of_it_was_looked_at(
    index: Index, fresh_store: Store, tiny_pairs: Path
) -> None:
    def indexed_at() -> Any:
        (info,) = fresh_store.root_infos()
        return info.indexed_at

    index(tiny_pairs, stop=lambda: bool(fresh_store.roots()))
    assert indexed_at() is None
    index(tiny_pairs / "more")
    assert indexed_at() is None
    index(tiny_pairs)
    first = indexed_at()
    assert first is not None
    index(tiny_pairs / "more")
    assert indexed_at() == first


def test_pictures_in_a_folder_that_cannot_be_listed_are_kept(
    index: Index, fresh_store: Store, tiny_pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index(tiny_pairs)
    (tiny_pairs / "red.png").unlink()
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if Path(path) == tiny_pairs / "more":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    report = index(tiny_pairs)
    assert (report.removed, report.unchanged) == (1, 3)
    assert any("more" in problem for problem in report.problems)
    assert str(tiny_pairs / "more/yellow.png") in items_of(fresh_store)


def test_a_folder_inside_a_root_is_indexed_as_that_part_of_it(
    index: Index, fresh_store: Store, tiny_pairs: Path
) -> None:
    index(tiny_pairs)
    (tiny_pairs / "red.png").unlink()
    paint(tiny_pairs / "more/cyan.png", "cyan")
    paint(tiny_pairs / "elsewhere.png", "magenta")
    assert index(tiny_pairs / "more") == IndexReport(added=1, unchanged=1)
    assert [path for _, path in fresh_store.roots()] == [tiny_pairs]
    assert str(tiny_pairs / "red.png") in items_of(fresh_store)  # that part was not asked for
    assert index(tiny_pairs) == IndexReport(added=1, removed=1, unchanged=5)


def test_a_folder_around_earlier_roots_takes_their_items_over(
    index: Index, fresh_store: Store, tiny_pairs: Path
) -> None:
    index(tiny_pairs / "more")
    before = items_of(fresh_store)[str(tiny_pairs / "more/yellow.png")].item_id
    assert index(tiny_pairs) == IndexReport(added=4, unchanged=1)
    items = items_of(fresh_store)
    assert len(items) == 5
    assert items[str(tiny_pairs / "more/yellow.png")].item_id == before
    assert items[str(tiny_pairs / "more/yellow.png")].root == tiny_pairs
    assert index(tiny_pairs / "more") == IndexReport(unchanged=1)


def test_two_roots_live_side_by_side_and_share_content(
    index: Index, fresh_store: Store, tiny_pairs: Path, tmp_path: Path, toy_encoder: ToyEncoder
) -> None:
    index(tiny_pairs)
    shutil.copytree(tiny_pairs, tmp_path / "backup")
    toy_encoder.images_seen = 0
    assert index(tmp_path / "backup") == IndexReport(added=5)
    assert toy_encoder.images_seen == 0
    assert len(items_of(fresh_store)) == 10


def test_a_picture_moved_to_another_root_keeps_its_id_embedding_and_given_captions(
    index: Index, fresh_store: Store, tiny_pairs: Path, tmp_path: Path, toy_encoder: ToyEncoder
) -> None:
    given = tmp_path / "captions.jsonl"
    given.write_text('{"file": "red.png", "caption": "red, by hand"}\n')
    index(tiny_pairs, captions=given)
    before = items_of(fresh_store)[str(tiny_pairs / "red.png")].item_id
    other = tmp_path / "other"
    paint(other / "cyan.png", "cyan")
    (tiny_pairs / "red.png").rename(other / "crimson.png")
    toy_encoder.images_seen = 0
    assert index(other) == IndexReport(added=1, moved=1)
    assert toy_encoder.images_seen == 1
    item = items_of(fresh_store)[str(other / "crimson.png")]
    assert (item.item_id, item.root) == (before, other)
    assert [caption.text for caption in item.captions] == ["red, by hand"]
    assert fresh_store.verify() == []
    assert index(tiny_pairs) == IndexReport(unchanged=4)
    assert index(other) == IndexReport(unchanged=2)


@pytest.mark.parametrize("is_first", [True, False])
def test_a_picture_that_moved_between_two_folders_is_found_whichever_is_looked_at_first(
    fresh_store: Store,
    toy_encoder: ToyEncoder,
    tiny_pairs: Path,
    tmp_path: Path,
    is_first: bool,
) -> None:
    paint(tmp_path / "other/cyan.png", "cyan")
    folders = [tiny_pairs, tmp_path / "other"]
    if not is_first:
        folders.reverse()
    report = index_folders(fresh_store, lambda: toy_encoder, folders)
    assert report == IndexReport(added=6)
    before = items_of(fresh_store)[str(tiny_pairs / "red.png")].item_id
    (tiny_pairs / "red.png").rename(tmp_path / "other/crimson.png")
    (tiny_pairs / "green.png").unlink()
    report = index_folders(fresh_store, no_encoder, folders)
    assert report == IndexReport(moved=1, removed=1, unchanged=4)
    assert items_of(fresh_store)[str(tmp_path / "other/crimson.png")].item_id == before


def test_one_of_several_folders_that_is_gone_is_named_and_the_others_are_indexed(
    fresh_store: Store, toy_encoder: ToyEncoder, tiny_pairs: Path, tmp_path: Path
) -> None:
    paint(tmp_path / "other/cyan.png", "cyan")
    folders = [tmp_path / "other", tiny_pairs]
    index_folders(fresh_store, lambda: toy_encoder, folders)
    shutil.rmtree(tmp_path / "other")
    (tiny_pairs / "red.png").unlink()
    report = index_folders(fresh_store, no_encoder, folders)
    assert (report.removed, report.unchanged) == (1, 4)
    (problem,) = report.problems
    assert problem.startswith(f"{tmp_path / 'other'} is not there, but the library knows 1 ")
    assert index_folders(fresh_store, no_encoder, folders, prune=True).removed == 1
    (problem,) = index_folders(fresh_store, no_encoder, folders).problems  # a root without pictures
    assert problem.startswith(f"{tmp_path / 'other'} does not exist")
    (tiny_pairs / "blue.png").unlink()
    with pytest.raises(UsageError, match="nowhere does not exist"):
        index_folders(fresh_store, no_encoder, [tiny_pairs, tmp_path / "nowhere"])
    assert len(items_of(fresh_store)) == 4  # nothing was begun


@pytest.mark.parametrize("is_empty", [True, False])
def test_a_picture_whose_former_root_is_not_mounted_is_a_copy(
    index: Index, fresh_store: Store, tiny_pairs: Path, tmp_path: Path, is_empty: bool
) -> None:
    index(tiny_pairs)
    shutil.copytree(tiny_pairs, tmp_path / "other")
    tiny_pairs.rename(tmp_path / "unmounted")
    if is_empty:
        tiny_pairs.mkdir()
    assert index(tmp_path / "other") == IndexReport(added=5)
    assert len(items_of(fresh_store)) == 10


def test_a_picture_behind_a_link_to_nothing_in_another_root_is_a_copy(
    index: Index, fresh_store: Store, tiny_pairs: Path, tmp_path: Path
) -> None:
    paint(tmp_path / "drive/cyan.png", "cyan")
    (tiny_pairs / "drive").symlink_to(tmp_path / "drive")
    index(tiny_pairs)
    (tmp_path / "drive").rename(tmp_path / "other")
    assert index(tmp_path / "other") == IndexReport(added=1)
    assert len(items_of(fresh_store)) == 7


def test_of_two_copies_in_another_root_one_is_the_picture_that_moved(
    index: Index, tiny_pairs: Path, tmp_path: Path
) -> None:
    index(tiny_pairs)
    (tmp_path / "other").mkdir()
    for name in ("a.png", "b.png"):
        shutil.copyfile(tiny_pairs / "red.png", tmp_path / "other" / name)
    (tiny_pairs / "red.png").unlink()
    assert index(tmp_path / "other", batch_size=1) == IndexReport(added=1, moved=1)


def test_a_picture_moved_between_parts_of_a_root_is_found_when_only_one_is_indexed(
    index: Index, fresh_store: Store, tiny_pairs: Path
) -> None:
    index(tiny_pairs)
    before = items_of(fresh_store)[str(tiny_pairs / "red.png")].item_id
    (tiny_pairs / "red.png").rename(tiny_pairs / "more/crimson.png")
    assert index(tiny_pairs / "more") == IndexReport(moved=1, unchanged=1)
    assert items_of(fresh_store)[str(tiny_pairs / "more/crimson.png")].item_id == before


def test_a_link_to_a_root_is_that_root(index: Index, tiny_pairs: Path, tmp_path: Path) -> None:
    index(tiny_pairs)
    (tmp_path / "link").symlink_to(tiny_pairs)
    assert index(tmp_path / "link") == IndexReport(unchanged=5)


# ── Captions files ───────────────────────────────────────────────────────────────────────────────


def test_captions_given_once_stay_until_another_file_is_given(
    index: Index, fresh_store: Store, tmp_path: Path
) -> None:
    picture = paint(tmp_path / "p/a.png", "red")
    given = tmp_path / "captions.jsonl"
    given.write_text('{"file": "a.png", "caption": "red, by hand"}\n')
    index(tmp_path / "p", captions=given)
    (caption,) = items_of(fresh_store)[str(picture)].captions
    assert caption == CaptionRow("red, by hand", "given: captions.jsonl")
    assert index(tmp_path / "p") == IndexReport(unchanged=1)
    picture.rename(picture.with_name("b.png"))
    assert index(tmp_path / "p") == IndexReport(moved=1)
    assert texts_of(fresh_store, picture.with_name("b.png")) == ["red, by hand"]
    given.write_text('{"file": "b.png", "caption": "red, by eye"}\n')
    assert index(tmp_path / "p", captions=given) == IndexReport(updated=1)
    assert texts_of(fresh_store, picture.with_name("b.png")) == ["red, by eye"]


def test_a_captions_file_that_cannot_be_read_stops_before_anything_is_done(
    index: Index, fresh_store: Store, tiny_pairs: Path, tmp_path: Path
) -> None:
    with pytest.raises(CaptionError, match=r"absent\.json"):
        index(tiny_pairs, captions=tmp_path / "absent.json")
    assert items_of(fresh_store) == {}


@pytest.mark.parametrize(
    ("count", "words"), [(1, "1 caption is longer"), (2, "2 captions are longer")]
)
def test_captions_that_the_model_does_not_read_to_their_end_are_counted(
    index: Index, tmp_path: Path, count: int, words: str
) -> None:
    for name in ["a", "b"][:count]:
        paint(tmp_path / f"p/{name}.png", "red")
        (tmp_path / f"p/{name}.txt").write_text("red " * 17 + "\n" + "red " * 16)
    (problem,) = index(tmp_path / "p").problems
    assert problem.startswith(f"{words} than the 16 tokens that toy reads; only ")
    assert index(tmp_path / "p").problems == ()  # said once, when they are read


# ── Several models ───────────────────────────────────────────────────────────────────────────────


class TurnedEncoder(ToyEncoder):
    """Another model: its rows are the toy's with the columns turned by one."""

    name = "turned"

    def encode_images(self, images: Sequence[Any]) -> np.ndarray:
        return np.ascontiguousarray(np.roll(super().encode_images(images), 1, axis=1))

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        return np.ascontiguousarray(np.roll(super().encode_texts(texts), 1, axis=1))


@pytest.fixture
def other_encoder() -> TurnedEncoder:
    return TurnedEncoder("turned-1")


@pytest.fixture
def other_store(fresh_store: Store) -> Iterator[Store]:
    """The store of `fresh_store`, worked with by a second model."""
    model = ModelSpec("turned", TurnedEncoder.dim, "turned-1")
    with Store.open(fresh_store.path, model, add_model=True) as store:
        yield store


def test_a_second_model_embeds_what_is_known_and_is_then_up_to_date(
    index: Index,
    fresh_store: Store,
    tiny_pairs: Path,
    toy_encoder: ToyEncoder,
    other_store: Store,
    other_encoder: TurnedEncoder,
) -> None:
    shutil.copyfile(tiny_pairs / "red.png", tiny_pairs / "copy.png")
    index(tiny_pairs)
    ids = {path: item.item_id for path, item in items_of(fresh_store).items()}
    toy_encoder.images_seen = 0
    report = index_folder(other_store, lambda: other_encoder, tiny_pairs)
    assert report == IndexReport(updated=6)
    assert other_encoder.images_seen == 5  # the copy shares
    assert {path: item.item_id for path, item in items_of(other_store).items()} == ids
    red = str(tiny_pairs / "red.png")
    assert other_store.embeddings("image", [ids[red]])[0] == pytest.approx([0, 1, 0, 0])
    captions = other_store.caption_ids(ids[red])
    assert other_store.embeddings("caption", captions) == pytest.approx(
        np.array([[0, 1, 0, 0]] * 2)
    )
    assert fresh_store.embeddings("image", [ids[red]])[0] == pytest.approx([1, 0, 0, 0])
    assert index_folder(other_store, no_encoder, tiny_pairs) == IndexReport(unchanged=6)
    assert index_folder(fresh_store, no_encoder, tiny_pairs) == IndexReport(unchanged=6)
    assert fresh_store.verify() == []
    assert other_store.verify() == []


def test_captions_that_another_model_embedded_need_no_picture(
    index: Index,
    fresh_store: Store,
    tiny_pairs: Path,
    other_store: Store,
    other_encoder: TurnedEncoder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    index(tiny_pairs)
    index_folder(other_store, lambda: other_encoder, tiny_pairs)
    (tiny_pairs / "red.txt").write_text("red, and something blue\n")
    assert index(tiny_pairs) == IndexReport(updated=1, unchanged=4)
    other_encoder.images_seen = other_encoder.texts_seen = 0
    monkeypatch.setattr("subprocess.Popen", no_encoder)
    monkeypatch.setattr(ingest, "content_hash", no_encoder)
    report = index_folder(other_store, lambda: other_encoder, tiny_pairs)
    assert report == IndexReport(updated=1, unchanged=4)
    assert (other_encoder.images_seen, other_encoder.texts_seen) == (0, 1)
    (known,) = (
        one
        for root_id, _ in other_store.roots()
        for file, one in other_store.known_files(root_id).items()
        if file == "red.png"
    )
    (caption_id,) = other_store.caption_ids(known.item_id)
    expected = np.array([[0, 1, 0, 1]]) / np.sqrt(2)
    assert other_store.embeddings("caption", [caption_id]) == pytest.approx(expected, abs=1e-3)


def test_a_picture_that_moved_is_embedded_by_a_second_model_under_its_new_name(
    index: Index,
    fresh_store: Store,
    tiny_pairs: Path,
    other_store: Store,
    other_encoder: TurnedEncoder,
) -> None:
    index(tiny_pairs)
    before = items_of(fresh_store)[str(tiny_pairs / "red.png")].item_id
    (tiny_pairs / "red.png").rename(tiny_pairs / "crimson.png")
    touch(tiny_pairs / "blue.png")
    report = index_folder(other_store, lambda: other_encoder, tiny_pairs)
    assert report == IndexReport(updated=4, moved=1)
    assert other_store.embeddings("image", [before])[0] == pytest.approx([0, 1, 0, 0])
    assert index_folder(fresh_store, no_encoder, tiny_pairs) == IndexReport(unchanged=5)


def test_a_picture_that_a_second_model_cannot_have_read_is_named_and_stays_as_it_is(
    index: Index,
    fresh_store: Store,
    tiny_pairs: Path,
    other_store: Store,
    other_encoder: TurnedEncoder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tiny_pairs / "broken.png").write_bytes(b"broken")
    first = index(tiny_pairs)
    red = tiny_pairs / "red.png"
    before = items_of(fresh_store)[str(red)]
    status = red.stat()
    red.write_bytes(b"?" * status.st_size)  # rotten, and its time stamp does not tell
    os.utime(red, ns=(status.st_atime_ns, status.st_mtime_ns))
    report = index_folder(other_store, lambda: other_encoder, tiny_pairs)
    assert report.updated == 4
    assert {one.path for one in report.failed} == {red, tiny_pairs / "broken.png"}
    assert {one for one in report.failed if one.path != red} == set(first.failed)
    assert items_of(fresh_store)[str(red)] == before
    assert embedding_of(fresh_store, red) == pytest.approx([1, 0, 0, 0])
    assert index_folder(fresh_store, no_encoder, tiny_pairs).unchanged == 5


# ── What files tell beside what they show ────────────────────────────────────────────────────────


def forget_facts(store: Store) -> None:
    """Leaves the pictures of a store as a version that looked for less has left them."""
    with closing(sqlite3.connect(store.path / "catalogue.sqlite")) as database, database:
        database.execute(
            "UPDATE items SET facts = 0, camera = NULL, latitude = NULL, longitude = NULL,"
            " perceptual_hash = NULL WHERE status = 'ok'"
        )


def photograph(path: Path, *, colour: str = "red") -> Path:
    """A picture with a camera, a place and an edge down its middle."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0110] = "NIKON CORPORATION", "NIKON D90"
    exif.get_ifd(0x8825).update({1: "S", 2: (33.0, 30.0, 0.0), 3: "E", 4: (151.0, 12.0, 0.0)})
    image = Image.new("RGB", (90, 80), "black")
    image.paste(colour, (45, 0, 90, 80))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=95, exif=exif)
    return path


def facts_of(store: Store, path: Path) -> tuple[Any, ...]:
    item = items_of(store)[str(path)]
    return (item.camera, item.latitude, item.longitude, item.perceptual_hash, item.facts)


# The edge is in the middle of nine columns: it gets lighter to it, and once more from it.
FACTS_OF_PHOTOGRAPH = ("NIKON D90", -33.5, 151.2, 0x1818181818181818, FACTS)


def test_camera_place_and_hash_of_a_picture_and_its_copies_are_kept(
    index: Index, fresh_store: Store, tmp_path: Path
) -> None:
    path = photograph(tmp_path / "p/a.jpg")
    index(tmp_path / "p")
    assert facts_of(fresh_store, path) == FACTS_OF_PHOTOGRAPH
    copy, moved = tmp_path / "p/copy.jpg", tmp_path / "p/moved.jpg"
    shutil.copyfile(path, copy)
    path.rename(moved)
    paint(tmp_path / "p/plain.png", "red")
    assert index(tmp_path / "p") == IndexReport(added=2, moved=1)
    assert facts_of(fresh_store, copy) == facts_of(fresh_store, moved) == FACTS_OF_PHOTOGRAPH
    plain = facts_of(fresh_store, tmp_path / "p/plain.png")
    assert plain == (None, None, None, 0, FACTS)


def test_what_an_older_version_did_not_look_for_is_read_without_encoding_anything(
    index: Index, fresh_store: Store, tiny_pairs: Path
) -> None:
    path = photograph(tiny_pairs / "photo.jpg")
    shutil.copyfile(path, tiny_pairs / "copy.jpg")
    (tiny_pairs / "spoilt.jpg").write_bytes(b"spoilt")
    index(tiny_pairs)
    before = {path: item.item_id for path, item in items_of(fresh_store).items()}
    forget_facts(fresh_store)
    path.rename(tiny_pairs / "renamed.jpg")
    report = index_folder(fresh_store, no_encoder, tiny_pairs)
    assert (report.updated, report.moved, len(report.failed)) == (6, 1, 1)
    for name in ("renamed.jpg", "copy.jpg"):
        assert facts_of(fresh_store, tiny_pairs / name) == FACTS_OF_PHOTOGRAPH
    after = {path: item.item_id for path, item in items_of(fresh_store).items()}
    assert sorted(after.values()) == sorted(before.values())
    assert fresh_store.verify() == []
    report = index_folder(fresh_store, no_encoder, tiny_pairs)
    assert (report.unchanged, len(report.failed)) == (7, 1)


def test_a_new_copy_of_what_an_older_version_knew_is_looked_at_in_the_next_run(
    index: Index, fresh_store: Store, tmp_path: Path
) -> None:
    path = photograph(tmp_path / "p/a.jpg")
    index(tmp_path / "p")
    forget_facts(fresh_store)
    copy = tmp_path / "p/copy.jpg"
    shutil.copyfile(path, copy)
    for report in (IndexReport(added=1, updated=1), IndexReport(unchanged=1, updated=1)):
        assert index_folder(fresh_store, no_encoder, tmp_path / "p") == report
    assert facts_of(fresh_store, copy) == facts_of(fresh_store, path) == FACTS_OF_PHOTOGRAPH


def test_what_cannot_be_read_any_more_is_looked_at_once(
    index: Index, fresh_store: Store, tmp_path: Path
) -> None:
    path = photograph(tmp_path / "p/a.jpg")
    index(tmp_path / "p")
    forget_facts(fresh_store)
    status = path.stat()
    path.write_bytes(b"?" * status.st_size)  # of equal size and time, as on a failing disk
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert index_folder(fresh_store, no_encoder, tmp_path / "p") == IndexReport(updated=1)
    assert facts_of(fresh_store, path) == (None, None, None, None, FACTS)
    assert index_folder(fresh_store, no_encoder, tmp_path / "p") == IndexReport(unchanged=1)


def test_a_second_model_reads_what_an_older_version_did_not_look_for(
    index: Index,
    fresh_store: Store,
    tmp_path: Path,
    other_store: Store,
    other_encoder: TurnedEncoder,
) -> None:
    path = photograph(tmp_path / "p/a.jpg")
    index(tmp_path / "p")
    forget_facts(fresh_store)
    assert index_folder(other_store, lambda: other_encoder, tmp_path / "p").updated == 1
    assert facts_of(other_store, path) == FACTS_OF_PHOTOGRAPH
    assert index_folder(fresh_store, no_encoder, tmp_path / "p") == IndexReport(unchanged=1)


def extras_of(store: Store, path: Path) -> tuple[tuple[str, str | float], ...]:
    return items_of(store)[str(path)].extras


def test_a_change_of_columns_alone_updates_a_picture_and_encodes_nothing(
    index: Index, fresh_store: Store, tmp_path: Path
) -> None:
    red, blue = (paint(tmp_path / f"p/{name}.png", name) for name in ("red", "blue"))
    table = tmp_path / "p/captions.csv"
    table.write_text("file,caption,tag,year\nred.png,all red,warm,1999\nblue.png,all blue,,\n")
    index(tmp_path / "p")
    assert extras_of(fresh_store, red) == (("tag", "warm"), ("year", 1999.0))
    assert extras_of(fresh_store, blue) == ()
    ids = fresh_store.caption_ids(items_of(fresh_store)[str(red)].item_id)
    table.write_text("file,caption,tag\nred.png,all red,hot\nblue.png,all blue,cold\n")
    assert index_folder(fresh_store, no_encoder, tmp_path / "p") == IndexReport(updated=2)
    assert extras_of(fresh_store, red) == (("tag", "hot"),)
    assert extras_of(fresh_store, blue) == (("tag", "cold"),)
    assert fresh_store.caption_ids(items_of(fresh_store)[str(red)].item_id) == ids
    assert index_folder(fresh_store, no_encoder, tmp_path / "p") == IndexReport(unchanged=2)
    paint(red, "cyan", side=9)
    assert index(tmp_path / "p") == IndexReport(updated=1, unchanged=1)
    assert extras_of(fresh_store, red) == (("tag", "hot"),)
    table.unlink()
    assert index_folder(fresh_store, no_encoder, tmp_path / "p") == IndexReport(updated=2)
    assert extras_of(fresh_store, red) == ()
    assert fresh_store.verify() == []


def test_columns_of_a_failed_picture_are_kept_and_follow_their_file(
    index: Index, fresh_store: Store, tmp_path: Path
) -> None:
    spoilt = tmp_path / "p/spoilt.jpg"
    spoilt.parent.mkdir()
    spoilt.write_bytes(b"spoilt")
    table = tmp_path / "p/captions.csv"
    for tag in ("one", "two"):
        table.write_text(f"file,caption,tag\nspoilt.jpg,a dog,{tag}\n")
        assert len(index(tmp_path / "p").failed) == 1
        assert extras_of(fresh_store, spoilt) == (("tag", tag),)


def test_columns_stay_where_the_captions_do_that_came_with_them(
    index: Index, fresh_store: Store, tmp_path: Path
) -> None:
    red, blue = (paint(tmp_path / f"p/{name}.png", name) for name in ("red", "blue"))
    given = tmp_path / "mine.csv"
    given.write_text("file,caption,tag\nred.png,red by hand,warm\n")
    found = tmp_path / "p/captions.csv"
    found.write_text("file,caption,tag\nblue.png,blue as found,cold\n")
    index(tmp_path / "p", captions=given)
    assert (extras_of(fresh_store, red), extras_of(fresh_store, blue)) == ((("tag", "warm"),), ())
    assert index(tmp_path / "p") == IndexReport(updated=1, unchanged=1)
    assert extras_of(fresh_store, red) == (("tag", "warm"),)
    assert extras_of(fresh_store, blue) == (("tag", "cold"),)
    moved = tmp_path / "p/moved.png"
    blue.rename(moved)  # its captions stand under its former name, and stay
    report = index(tmp_path / "p")
    assert (report.moved, report.unchanged, len(report.problems)) == (1, 1, 1)
    assert extras_of(fresh_store, moved) == (("tag", "cold"),)
    assert index_folder(fresh_store, no_encoder, tmp_path / "p") == IndexReport(unchanged=2)
    given.write_text("file,caption\nred.png,red by hand\n")
    index(tmp_path / "p", captions=given)
    assert (extras_of(fresh_store, red), extras_of(fresh_store, moved)) == ((), ())


# ── Failures ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("batch_size", [1, 64])
def test_a_broken_picture_is_named_and_harms_no_other(
    index: Index, fresh_store: Store, tiny_pairs: Path, batch_size: int
) -> None:
    for name in ("broken.png", "copy.png", "more/again.png"):
        (tiny_pairs / name).write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    report = index(tiny_pairs, batch_size=batch_size)
    assert report.added == 5
    assert [failure.path.name for failure in report.failed] == [
        "broken.png",
        "copy.png",
        "again.png",
    ]
    assert all(one.reason and str(tiny_pairs) not in one.reason for one in report.failed)
    assert {item.path.name for item in fresh_store.failures()} == {
        failure.path.name for failure in report.failed
    }
    assert embedding_of(fresh_store, tiny_pairs / "red.png") == pytest.approx([1, 0, 0, 0])
    assert fresh_store.verify() == []


def test_a_failure_is_told_again_but_read_again_only_when_the_file_changes(
    index: Index, fresh_store: Store, tiny_pairs: Path
) -> None:
    broken = tiny_pairs / "red.png"
    broken.write_bytes(b"broken")
    first = index(tiny_pairs)
    second = index_folder(fresh_store, no_encoder, tiny_pairs)
    assert second == IndexReport(unchanged=4, failed=first.failed)
    paint(broken, "red")
    assert index(tiny_pairs) == IndexReport(updated=1, unchanged=4)
    assert fresh_store.failures() == []
    assert texts_of(fresh_store, broken) == ["a red square", "all red, nothing else"]


def test_a_picture_that_breaks_is_no_longer_found(
    index: Index, fresh_store: Store, tiny_pairs: Path, toy_encoder: ToyEncoder
) -> None:
    index(tiny_pairs)
    (tiny_pairs / "red.png").write_bytes(b"overwritten")
    report = index(tiny_pairs)
    assert (report.unchanged, len(report.failed)) == (4, 1)
    match = fresh_store.search("image", toy_encoder.encode_texts(["red"]), 10)[0]
    assert len(match.ids) == 4


@pytest.mark.parametrize("moment", [(ingest, "content_hash"), (DecodeWorkers, "read")])
def test_a_picture_that_vanishes_after_the_listing_is_a_named_failure(
    index: Index, tiny_pairs: Path, monkeypatch: pytest.MonkeyPatch, moment: tuple[Any, str]
) -> None:
    real = getattr(*moment)

    def vanish(*args: Any, **options: Any) -> Any:
        if args[-1].name == "green.png":
            args[-1].unlink(missing_ok=True)
        return real(*args, **options)

    monkeypatch.setattr(*moment, vanish)
    report = index(tiny_pairs)
    assert report.added == 4
    assert [failure.path for failure in report.failed] == [tiny_pairs / "green.png"]
    assert report.failed[0].reason
    monkeypatch.undo()
    assert index(tiny_pairs) == IndexReport(removed=1, unchanged=4)


def test_bytes_that_could_not_be_read_at_all_are_tried_again(
    index: Index, tiny_pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(ingest, "content_hash", refuse)
    report = index(tiny_pairs)
    assert Failure(tiny_pairs / "red.png", "cannot be read: Permission denied") in report.failed
    monkeypatch.undo()
    assert index(tiny_pairs) == IndexReport(updated=5)


def test_a_file_name_that_is_no_text_round_trips(
    index: Index, fresh_store: Store, tmp_path: Path
) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path / "p") + b"/caf\xe9.png"))
    try:
        paint(path, "red")
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    assert index(path.parent) == IndexReport(added=1)
    assert list(items_of(fresh_store)) == [str(path)]
    assert index(path.parent) == IndexReport(unchanged=1)


# ── Interruption, progress, memory ───────────────────────────────────────────────────────────────


def many(folder: Path, count: int) -> Path:
    for number in range(count):
        paint(folder / f"{number:03d}.png", "red", side=number + 1)
    return folder


def test_progress_counts_what_needs_work_and_ends_with_all_of_it(
    index: Index, tmp_path: Path
) -> None:
    calls: list[tuple[int, int]] = []
    index(many(tmp_path / "p", 7), batch_size=3, progress=lambda *call: calls.append(call))
    assert calls == [(0, 7), (3, 7), (6, 7), (7, 7)]


def test_an_interrupted_run_keeps_its_batches_and_the_next_goes_on(
    index: Index, fresh_store: Store, tmp_path: Path, toy_encoder: ToyEncoder
) -> None:
    folder = many(tmp_path / "p", 10)
    before = set(threading.enumerate())

    def interrupt(done: int, total: int) -> None:
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index(folder, batch_size=2, progress=interrupt)
    assert len(items_of(fresh_store)) == 4
    assert fresh_store.verify() == []
    assert set(threading.enumerate()) <= before  # nobody decodes on
    with fresh_store.writer():
        pass  # the lock was released
    toy_encoder.images_seen = 0
    assert index(folder) == IndexReport(added=6, unchanged=4)
    assert toy_encoder.images_seen == 6


def test_a_run_that_is_stopped_commits_the_batch_in_hand_and_begins_nothing_else(
    index: Index, fresh_store: Store, tmp_path: Path, toy_encoder: ToyEncoder
) -> None:
    folder = many(tmp_path / "p", 20)
    before = set(threading.enumerate())
    index(folder)
    (folder / "000.png").unlink()
    (folder / "001.png").rename(folder / "z.png")
    many_more = [paint(folder / f"more/{n}.png", "blue", side=n + 1) for n in range(10)]
    toy_encoder.images_seen = 0
    report = index(folder, batch_size=2, stop=lambda: toy_encoder.images_seen >= 3)
    assert report == IndexReport(added=3, moved=1, unchanged=18, interrupted=True)
    items = items_of(fresh_store)
    assert str(folder / "000.png") in items  # what is gone is known when all was looked at
    assert [str(path) in items for path in many_more] == [True] * 3 + [False] * 7
    assert fresh_store.verify() == []
    assert set(threading.enumerate()) <= before
    assert index(folder) == IndexReport(added=7, removed=1, unchanged=22)


@pytest.mark.parametrize("asked", [0, 3])
def test_a_run_that_is_stopped_while_it_lists_has_done_nothing(
    index: Index, fresh_store: Store, tiny_pairs: Path, asked: int
) -> None:
    answers = iter([False] * asked)
    report = index(tiny_pairs, stop=lambda: next(answers, True))
    assert report == IndexReport(interrupted=True)
    assert fresh_store.roots() == []


def test_a_run_that_is_stopped_when_all_is_done_is_complete(index: Index, tmp_path: Path) -> None:
    folder = many(tmp_path / "p", 4)
    done: list[int] = []
    report = index(
        folder,
        batch_size=2,
        progress=lambda now, total: done.append(now),
        stop=lambda: done[-1:] == [4],
    )
    assert report == IndexReport(added=4)


def test_an_encoder_that_fails_leaves_whole_batches_only(
    fresh_store: Store, tmp_path: Path
) -> None:
    class Failing(ToyEncoder):
        def encode_images(self, images: Sequence[Any]) -> np.ndarray:
            if self.images_seen >= 4:
                raise RuntimeError("out of memory")
            return super().encode_images(images)

    failing = Failing()
    with pytest.raises(RuntimeError, match="out of memory"):
        index_folder(fresh_store, lambda: failing, many(tmp_path / "p", 10), batch_size=2)
    assert len(items_of(fresh_store)) == 4
    assert fresh_store.verify() == []


def test_one_run_at_a_time(index: Index, fresh_store: Store, tiny_pairs: Path) -> None:
    with fresh_store.writer(), pytest.raises(StoreLockedError):
        index(tiny_pairs)


def test_no_more_than_a_window_of_pictures_is_decoded_ahead(
    fresh_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_size, decoded, ahead = 2, [0], []
    read = DecodeWorkers.read

    def counting(workers: DecodeWorkers, path: Path, **options: Any) -> Decoded:
        decoded[0] += 1
        return read(workers, path, **options)

    class Watching(ToyEncoder):
        def encode_images(self, images: Sequence[Any]) -> np.ndarray:
            ahead.append(decoded[0] - self.images_seen)
            return super().encode_images(images)

    monkeypatch.setattr(DecodeWorkers, "read", counting)
    watching = Watching()
    index_folder(fresh_store, lambda: watching, many(tmp_path / "p", 40), batch_size=batch_size)
    assert max(ahead) <= ingest.WINDOW * batch_size


class Finished(ToyEncoder):
    """Says how its pictures are finished, and keeps what it was given."""

    preprocessing = Preprocessing(ToyEncoder.image_size, "squash", "bicubic")

    def __init__(self) -> None:
        super().__init__()
        self.sides: list[tuple[int, int]] = []

    def encode_images(self, images: Sequence[Any]) -> np.ndarray:
        self.sides += [image.size for image in images]
        return super().encode_images(images)


def test_an_encoder_that_says_how_gets_finished_pictures(
    fresh_store: Store, tmp_path: Path
) -> None:
    for number, colour in enumerate(COLOURS):
        paint(tmp_path / f"p/{colour}.png", colour, side=5 + 300 * number)
    finished = Finished()
    index_folder(fresh_store, lambda: finished, tmp_path / "p")
    assert set(finished.sides) == {(finished.image_size,) * 2}
    for path, item in items_of(fresh_store).items():
        expected = finished.encode_texts([Path(path).stem])[0]
        assert embedding_of(fresh_store, Path(path)) @ expected > 0.999
        assert item.width >= 5


def test_an_encoder_that_asks_for_larger_batches_gets_them_unless_the_caller_says(
    fresh_store: Store, tmp_path: Path
) -> None:
    sizes: list[int] = []

    class Large(ToyEncoder):
        batch_size = 50

        def encode_images(self, images: Sequence[Any]) -> np.ndarray:
            sizes.append(len(images))
            return super().encode_images(images)

    folder = many(tmp_path / "p", 100)
    large = Large()
    index_folder(fresh_store, lambda: large, folder)
    assert sum(sizes) == 100
    assert sizes[0] == ingest.BATCH_SIZE  # nobody knows the encoder before it is needed
    sizes.clear()
    for side in range(1, 8):
        paint(tmp_path / f"q/{side}.png", "blue", side=side)
    index_folder(fresh_store, lambda: large, tmp_path / "q", batch_size=3)
    assert sizes == [3, 3, 1]


def test_an_encoder_is_asked_for_its_batches_once_however_many_threads_decode(
    fresh_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Slow(ToyEncoder):
        @property
        def batch_size(self) -> int:  # takes a whole tower to find out
            asked.append(threading.current_thread())
            time.sleep(0.2)
            return 8

    slow = Slow()
    monkeypatch.setattr(ingest, "cores", lambda: 4)
    index_folder(fresh_store, lambda: slow, many(tmp_path / "p", 12))
    assert len(asked) == 1


def test_the_next_batch_is_encoded_while_one_is_committed(
    fresh_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second_begun = threading.Event()
    seen: list[str] = []

    class Watching(ToyEncoder):
        def encode_images(self, images: Sequence[Any]) -> np.ndarray:
            if self.images_seen:
                second_begun.set()
            return super().encode_images(images)

    write = Writer.write

    def waiting(writer: Writer, root_id: int, items: Sequence[ItemWrite]) -> list[int]:
        assert second_begun.wait(30)
        seen.extend(item.file for item in items)
        return write(writer, root_id, items)

    monkeypatch.setattr(Writer, "write", waiting)
    watching = Watching()
    index_folder(fresh_store, lambda: watching, many(tmp_path / "p", 12), batch_size=2)
    assert seen == [f"{number:03d}.png" for number in range(12)]


def test_large_pictures_reach_the_encoder_small(fresh_store: Store, tmp_path: Path) -> None:
    sizes: list[tuple[int, int]] = []

    class Watching(ToyEncoder):
        def encode_images(self, images: Sequence[Any]) -> np.ndarray:
            sizes.extend(image.size for image in images)
            return super().encode_images(images)

    paint(tmp_path / "p/large.png", "red", side=600)
    watching = Watching()
    index_folder(fresh_store, lambda: watching, tmp_path / "p")
    ((side, _),) = sizes
    assert 2 * watching.image_size <= side < 4 * watching.image_size
    (item,) = items_of(fresh_store).values()
    assert (item.width, item.height) == (600, 600)


# ── Whatever happened to the folder, the library equals a fresh index of it ──────────────────────

FILES = ["a.png", "b.png", "sub/c.png", "sub/d.png", "other/e.png"]
TEXTS = ["red", "a blue one\nand green", "nothing in particular", ""]

files = st.sampled_from(FILES)


class FolderMachine(RuleBasedStateMachine):
    """Edits a folder at random; after every run the store is compared with a new one."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = 1_000_000_000_000_000_000
        self.home = Path(tempfile.mkdtemp(prefix="retriever-test-"))
        self.folder = self.home / "pictures"
        self.folder.mkdir()
        self.count = 0
        self.store = self.new_store()

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.home)

    def new_store(self) -> Store:
        self.count += 1
        model = ModelSpec("toy", ToyEncoder.dim, "toy-1")
        return Store.create(self.home / f"{self.count}.lib", model)

    def stamp(self, path: Path) -> None:
        # A file changed twice within the clock's resolution would look unchanged.
        self.clock += 1_000_000_000
        os.utime(path, ns=(self.clock, self.clock))

    @rule(file=files, colour=st.sampled_from(sorted(COLOURS)), side=st.integers(1, 2))
    def paint(self, file: str, colour: str, side: int) -> None:
        self.stamp(paint(self.folder / file, colour, side=side))

    @rule(file=files)
    def spoil(self, file: str) -> None:
        path = self.folder / file
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"spoilt")
        self.stamp(path)

    @rule(file=files, text=st.sampled_from(TEXTS))
    def describe(self, file: str, text: str) -> None:
        path = (self.folder / file).with_suffix(".txt")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)

    @rule(source=files, place=files, copy=st.booleans())
    def rename_or_copy(self, source: str, place: str, copy: bool) -> None:
        path = self.folder / source
        if source == place or not path.exists():
            return
        (self.folder / place).parent.mkdir(exist_ok=True)
        if copy:
            shutil.copyfile(path, self.folder / place)
            self.stamp(self.folder / place)
        else:
            path.rename(self.folder / place)

    @rule(rows=st.lists(st.tuples(files, st.sampled_from(["sea", "dog", "5"])), max_size=4))
    def tabulate(self, rows: list[tuple[str, str]]) -> None:
        # Without captions: those of a picture that has moved stay, and a new library has none.
        lines = ["file,caption,tag", *(f"{file},,{tag}" for file, tag in rows)]
        (self.folder / "captions.csv").write_text("\n".join(lines))

    @rule()
    def come_from_an_older_version(self) -> None:
        forget_facts(self.store)

    @rule(file=files)
    def touch(self, file: str) -> None:
        if (self.folder / file).exists():
            self.stamp(self.folder / file)

    @rule(file=files)
    def delete(self, file: str) -> None:
        (self.folder / file).unlink(missing_ok=True)

    def has_pictures(self, part: str = "") -> bool:
        return any(file.startswith(part) and (self.folder / file).exists() for file in FILES)

    @precondition(lambda self: self.has_pictures("sub/"))
    @rule()
    def index_a_part(self) -> None:
        index_folder(self.store, ToyEncoder, self.folder / "sub", batch_size=2)

    @precondition(lambda self: self.has_pictures())
    @rule(asked=st.integers(1, 12))
    def index_until_stopped(self, asked: int) -> None:
        answers = iter([False] * asked)
        index_folder(
            self.store, ToyEncoder, self.folder, batch_size=1, stop=lambda: next(answers, True)
        )
        assert self.store.verify() == []

    @precondition(lambda self: self.has_pictures())
    @rule(batch_size=st.sampled_from([1, 2, 64]))
    def index(self, batch_size: int) -> None:
        report = index_folder(self.store, ToyEncoder, self.folder, batch_size=batch_size)
        with self.new_store() as fresh:
            expected = index_folder(fresh, ToyEncoder, self.folder)
            assert contents(self.store) == contents(fresh)
        listed = report.added + report.updated + report.moved + report.unchanged
        assert listed == expected.added
        assert set(report.failed) == set(expected.failed)
        assert self.store.verify() == []


def contents(store: Store) -> dict[str, Any]:
    """All that a store knows but its ids, by path."""

    def rows(item: ItemRow) -> Iterator[Any]:
        yield item.size, item.mtime_ns, item.content_hash, item.width, item.height
        yield item.status, item.reason, item.captions, item.extras
        yield item.camera, item.latitude, item.longitude, item.perceptual_hash, item.facts
        if item.status == "ok":
            yield store.embeddings("image", [item.item_id]).tolist()
            yield store.embeddings("caption", store.caption_ids(item.item_id)).tolist()

    return {path: list(rows(item)) for path, item in items_of(store).items()}


TestFolder = FolderMachine.TestCase
TestFolder.settings = settings(
    max_examples=15,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def test_a_given_captions_file_that_matches_no_picture_is_told(fresh_store, toy_encoder, tmp_path):
    folder = tmp_path / "pictures"
    paint(folder / "red.png", "red")
    given = tmp_path / "mine.csv"
    lines = ["file,caption", "red.png,a red square", "gone.png,lost", "gone2.png,lost too"]
    given.write_text("\n".join(lines), encoding="utf-8")
    report = index_folder(fresh_store, lambda: toy_encoder, folder, captions=given)
    (problem,) = report.problems
    assert problem.startswith("captions that match no picture: 2 ")


def test_a_folder_that_lost_a_great_many_and_is_empty_is_left_alone(
    index: Index, fresh_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retriever.ingest.MANY", 3)
    folder = tmp_path / "pictures"
    paint(folder / "here.png", "red")
    for number in range(4):
        paint(folder / "drive" / "2019" / f"{number}.png", "blue", side=number + 1)
    for number in range(2):
        paint(folder / "few" / f"{number}.png", "green", side=number + 1)
    assert index(folder).added == 7
    shutil.rmtree(folder / "drive" / "2019")
    for file in (folder / "few").iterdir():
        file.unlink()
    report = index(folder)
    assert (report.removed, report.unchanged) == (2, 1)
    [problem] = report.problems
    assert "drive is empty" in problem
    assert "left alone there: 4 (--prune removes them)" in problem
    assert len(fresh_store.item_ids()) == 5
    (folder / "drive").rename(folder / "drive.old")  # the folder itself is gone: it was deleted
    assert index(folder).removed == 4


def test_a_picture_that_went_away_while_it_was_read_is_read_when_it_is_back(
    fresh_store: Store, toy_encoder: ToyEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pictures"
    for number in range(3):
        paint(folder / f"{number}.png", "red", side=number + 1)
    away = tmp_path / "away"
    hashed = content_hash

    def leave(path: Path) -> bytes:
        digest = hashed(path)
        if path.name == "2.png":  # all were hashed, none is decoded yet
            folder.rename(away)
        return digest

    with monkeypatch.context() as patched:
        patched.setattr("retriever.ingest.content_hash", leave)
        report = index_folder(fresh_store, lambda: toy_encoder, folder)
    assert {failure.reason for failure in report.failed} == {
        "went away or changed while the folder was being read"
    }
    away.rename(folder)
    report = index_folder(fresh_store, lambda: toy_encoder, folder)
    assert (report.updated, report.failed) == (3, ())


def test_a_renamed_picture_keeps_what_a_captions_file_has_under_its_old_name(
    index: Index, fresh_store: Store, tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    paint(folder / "old" / "red.png", "red")
    table = folder / "captions.jsonl"
    table.write_text('{"file": "old/red.png", "captions": ["a red square"]}\n')
    index(folder)
    (folder / "old").rename(folder / "new")
    report = index(folder)
    assert report.moved == 1
    assert (
        "1 moved pictures keep captions that a captions file has under their former names"
        in (report.problems[0])
    )
    for _ in range(2):
        [item] = items_of(fresh_store).values()
        assert [one.text for one in item.captions] == ["a red square"]
        assert index(folder).unchanged == 1
    table.write_text('{"file": "new/red.png", "captions": ["a red square", "all red"]}\n')
    index(folder)
    [item] = items_of(fresh_store).values()
    assert [one.text for one in item.captions] == ["a red square", "all red"]
