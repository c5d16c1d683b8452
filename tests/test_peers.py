"""What other tools lose or answer wrongly, by their names; here it does not happen.

Each test is a failure that was read in the source of a peer, seen in a run of it, or told by its
users, replayed on a library.
"""

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from conftest import COLOURS, ToyEncoder, paint
from PIL import Image

from indexes.store import Store
from retriever import Library
from retriever.ingest import IndexReport


@pytest.fixture
def library(tmp_path: Path, toy_encoder: ToyEncoder) -> Iterator[Library]:
    with Library.create(tmp_path / "photos.lib", toy_encoder) as library:
        yield library


def reopen(library: Library, encoder: ToyEncoder) -> Library:
    library.close()
    return Library.open(library.path, encoder)


def names(library: Library, text: str, k: int = 10) -> list[str]:
    return [hit.path.name for hit in library.search(text, k=k)]


def rows_in_index(library: Library) -> int:
    info = library.info()["index"]["image"]
    return info["indexed"] + info["tail"] - info["removed"]


def series(folder: Path, count: int, colour: str = "red") -> Path:
    for number in range(count):
        paint(folder / f"{number:03d}.png", colour, side=number + 1)
    return folder


# ── rclip ────────────────────────────────────────────────────────────────────────────────────────


def test_rclip_keeps_nothing_of_an_interrupted_first_run(
    library: Library, toy_encoder: ToyEncoder, tmp_path: Path
) -> None:
    folder = series(tmp_path / "pictures", 40)

    def interrupt(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        library.index(folder, progress=interrupt)
    with reopen(library, toy_encoder) as library:
        kept = len(library.search("red", k=40, all=True))
        assert kept == library.info()["items"] > 0
        toy_encoder.images_seen = 0
        assert library.index(folder) == IndexReport(added=40 - kept, unchanged=kept)
        assert toy_encoder.images_seen == 40 - kept


def test_rclip_takes_files_of_one_size_that_differ_in_the_middle_for_one_picture(
    library: Library, tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    # Uncompressed: as large, and the first and last third of the bytes are the same.
    red = Image.new("RGB", (300, 300), COLOURS["red"])
    red.save(folder / "red.bmp")
    assert library.index(folder) == IndexReport(added=1)
    red.paste(COLOURS["blue"], (0, 100, 300, 200))
    red.save(folder / "striped.bmp")
    assert (folder / "red.bmp").stat().st_size == (folder / "striped.bmp").stat().st_size
    (folder / "red.bmp").unlink()
    assert library.index(folder) == IndexReport(added=1, removed=1)  # not moved
    (hit,) = library.search("blue")
    assert hit.score == pytest.approx(1 / np.sqrt(5), abs=0.05)  # (2, 0, 1), reduced in size


def test_rclip_deletes_every_vector_when_the_model_changes(
    library: Library, toy_encoder: ToyEncoder, tiny_pairs: Path
) -> None:
    library.index(tiny_pairs)
    before = [(hit.path, hit.score) for hit in library.search("red")]
    other = ToyEncoder("toy-2")
    other.name = "toy two"
    with Library.open(library.path, other, add_model=True) as second:
        assert second.index(tiny_pairs) == IndexReport(updated=5)
    with reopen(library, toy_encoder) as library:
        toy_encoder.images_seen = 0
        assert [(hit.path, hit.score) for hit in library.search("red")] == before
        assert library.index(tiny_pairs) == IndexReport(unchanged=5)
        assert toy_encoder.images_seen == 0


def test_rclip_long_encoded_renamed_pictures_anew(
    library: Library, toy_encoder: ToyEncoder, tiny_pairs: Path
) -> None:
    library.index(tiny_pairs)
    before = {hit.path.name: hit.item_id for hit in library.search("red")}
    (tiny_pairs / "red.png").rename(tiny_pairs / "more/crimson.png")
    toy_encoder.images_seen = 0
    assert library.index(tiny_pairs) == IndexReport(moved=1, unchanged=4)
    assert toy_encoder.images_seen == 0
    best = library.search("red")[0]
    assert (best.path.name, best.item_id) == ("crimson.png", before["red.png"])


def test_rclip_reads_the_whole_table_for_each_query(library: Library, tiny_pairs: Path) -> None:
    library.index(tiny_pairs)
    before = library.search("red")
    blank_embeddings(library)  # whoever reads the table now answers something else
    assert library.search("red") == before


def test_rclip_shows_scores_beyond_those_of_a_cosine(library: Library, tiny_pairs: Path) -> None:
    library.index(tiny_pairs)
    hits = library.search("red", image=tiny_pairs / "red.png")
    assert hits[0].path.name == "red.png"
    assert hits[0].score == pytest.approx(1, abs=1e-3)  # the sum of both would give 2
    mixed = {
        hit.path.name: hit.score for hit in library.search("red", image=tiny_pairs / "blue.png")
    }
    assert mixed["red.png"] == pytest.approx(1 / np.sqrt(2), abs=1e-3)


# ── DeepImageSearch ──────────────────────────────────────────────────────────────────────────────


def test_deepimagesearch_appends_every_vector_again_when_index_runs_twice(
    library: Library, tiny_pairs: Path
) -> None:
    for _ in range(3):
        library.index(tiny_pairs)
        assert (library.info()["items"], rows_in_index(library)) == (5, 5)
        assert sorted(names(library, "red")) == [
            *("blue.png", "green.png", "red.png", "white.png", "yellow.png")
        ]


def test_deepimagesearch_could_not_add_pictures_without_indexing_all_again(
    library: Library, toy_encoder: ToyEncoder, tiny_pairs: Path
) -> None:
    library.index(tiny_pairs)
    paint(tiny_pairs / "cyan.png", "cyan")
    toy_encoder.images_seen = 0
    assert library.index(tiny_pairs) == IndexReport(added=1, unchanged=5)
    assert toy_encoder.images_seen == 1
    assert names(library, "a cyan one", k=1) == ["cyan.png"]


def test_deepimagesearch_could_not_remove_pictures(
    library: Library, toy_encoder: ToyEncoder, tiny_pairs: Path
) -> None:
    library.index(tiny_pairs)
    assert library.remove(tiny_pairs / "red.png") == 1
    assert "red.png" not in names(library, "red")
    (tiny_pairs / "green.png").unlink()
    library.remove(tiny_pairs / "green.png")
    with reopen(library, toy_encoder) as library:
        assert set(names(library, "red")) == {"blue.png", "white.png", "yellow.png"}


def test_deepimagesearch_does_not_find_an_exact_duplicate(
    library: Library, tiny_pairs: Path, tmp_path: Path
) -> None:
    shutil.copyfile(tiny_pairs / "red.png", tiny_pairs / "more/again.png")
    library.index(tiny_pairs)
    query = shutil.copyfile(tiny_pairs / "red.png", tmp_path / "query.png")
    assert library.search(image=query, k=1)[0].duplicates == 1
    first, second, third = library.search(image=query, k=3, all=True)
    assert {first.path.name, second.path.name} == {"red.png", "again.png"}
    assert (first.score, second.score) == pytest.approx((1, 1), abs=1e-3)
    assert third.score < 0.9


def test_deepimagesearch_returns_too_few_when_a_filter_leaves_few_candidates(
    library: Library, toy_encoder: ToyEncoder, tmp_path: Path
) -> None:
    # Searched five times as deep as asked, a filter after the search would see red ones only.
    series(tmp_path / "pictures", 60)
    series(tmp_path / "pictures/rare", 6, "blue")
    library.index(tmp_path / "pictures")
    rare = [hit.item_id for hit in library.search("blue", k=6, all=True)]
    filtered = library.search("red", k=5, all=True, where='path like "*/rare/*"')
    assert {hit.item_id for hit in filtered} < set(rare)
    assert len(filtered) == 5
    query = toy_encoder.encode_texts(["red"])
    with Store.open(library.path) as store:
        (match,) = store.search("image", query, 5, among=rare)
    assert len(match.ids) == 5
    assert set(match.ids.tolist()) <= set(rare)


def test_deepimagesearch_deletes_by_making_all_other_vectors_again(
    library: Library, tiny_pairs: Path
) -> None:
    library.index(tiny_pairs)
    before = {hit.path.name: (hit.item_id, hit.score) for hit in library.search("yellow and blue")}
    library.remove(tiny_pairs / "red.png")
    library.rebuild()
    after = {hit.path.name: (hit.item_id, hit.score) for hit in library.search("yellow and blue")}
    del before["red.png"]
    assert after == before  # the same numbers, not merely near ones


@pytest.mark.parametrize("fault", ["gone", "torn", "older"])
def test_deepimagesearch_saves_its_index_and_its_records_apart(
    library: Library, toy_encoder: ToyEncoder, tiny_pairs: Path, tmp_path: Path, fault: str
) -> None:
    library.index(tiny_pairs)
    (older,) = library.path.glob("image-*.faiss")
    shutil.copyfile(older, tmp_path / "older.faiss")
    (tiny_pairs / "red.png").unlink()
    paint(tiny_pairs / "cyan.png", "cyan")
    library.index(tiny_pairs)
    before = library.search("red")
    library.close()
    (current,) = library.path.glob("image-*.faiss")
    if fault == "gone":
        current.unlink()
    elif fault == "torn":
        current.write_bytes(current.read_bytes()[:-20])
    else:
        shutil.copyfile(tmp_path / "older.faiss", current)
    with reopen(library, toy_encoder) as library:
        assert library.search("red") == before
        assert library.verify() == []


# ── LibrePhotos ──────────────────────────────────────────────────────────────────────────────────


def test_librephotos_builds_its_index_anew_at_each_start(
    library: Library, toy_encoder: ToyEncoder, tiny_pairs: Path
) -> None:
    library.index(tiny_pairs)
    before = library.search("red")
    blank_embeddings(library)  # whoever builds from the table now answers something else
    library.close()
    files = {path: path.stat() for path in library.path.glob("*.faiss")}
    assert files
    with Library.open(library.path, toy_encoder) as library:
        assert library.search("red") == before
        now = {path: path.stat() for path in library.path.glob("*.faiss")}
        assert {path: (s.st_ino, s.st_mtime_ns) for path, s in now.items()} == {
            path: (s.st_ino, s.st_mtime_ns) for path, s in files.items()
        }


def blank_embeddings(library: Library) -> None:
    """Zeroes every embedding in the catalogue, behind the back of the library."""
    with closing(sqlite3.connect(library.path / "catalogue.sqlite")) as rows:
        changed = rows.execute("UPDATE image_embeddings SET vector = zeroblob(length(vector))")
        assert changed.rowcount
        rows.commit()
