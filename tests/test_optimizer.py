"""Stores that decide how they search: what is built, proved, kept, given up, and never wrong."""

import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import indexes.approximate as approximate
import indexes.optimizer as optimizer
from indexes.care import repair
from indexes.errors import StoreReadOnlyError
from indexes.gallery import Approximate
from indexes.records import CaptionRow, Direction, ItemWrite, ModelSpec, SearchPolicy
from indexes.store import Store

DIM, ROWS = 32, 4_000
IS_PROVED = optimizer.is_proved  # tests of searches leave the clock out
Vectors = NDArray[np.float32]


def make_small(patch: pytest.MonkeyPatch) -> None:
    """Thousands of rows pay here, and no clock decides: what is found does."""
    patch.setattr(approximate, "EXACT_BYTES", 2 * DIM * ROWS // 2)
    patch.setattr(optimizer, "SAMPLE", 60)
    patch.setattr(optimizer, "is_proved", lambda one, policy: one.overlap >= policy.overlap)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)


def unit(rows: Vectors) -> Vectors:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def pictures(n: int, seed: int = 0) -> Vectors:
    topics = np.random.default_rng(7).standard_normal((40, DIM))
    rng = np.random.default_rng(seed)
    return unit(topics[rng.integers(0, 40, n)] + 0.5 * rng.standard_normal((n, DIM)))


def write(store: Store, vectors: Vectors, start: int = 0, captions: bool = False) -> list[int]:
    texts = unit(vectors + 0.2 * np.random.default_rng(1).standard_normal(vectors.shape))
    items = [
        ItemWrite(
            f"{start + n}.jpg",
            1,
            1,
            (start + n).to_bytes(16),
            8,
            8,
            image_embedding=row,
            captions=(CaptionRow(f"caption {start + n}", "test"),) if captions else (),
            caption_embeddings=text[None] if captions else None,
        )
        for n, (row, text) in enumerate(zip(vectors, texts, strict=True))
    ]
    with store.writer() as writer:
        root = writer.add_root(Path("/pictures"))
        ids = writer.write(root, items)
        writer.finish()
    return ids


def optimize(store: Store, **options: object) -> list[str]:
    with store.writer() as writer:
        return list(writer.optimize(**options))  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.create(tmp_path / "a.lib", ModelSpec("toy", DIM, "toy-1")) as made:
        yield made


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("optimizer") / "a.lib"
    with (
        pytest.MonkeyPatch.context() as patch,
        Store.create(path, ModelSpec("toy", DIM, "toy-1")) as made,
    ):
        make_small(patch)
        write(made, pictures(ROWS), captions=True)
        assert optimize(made) == ["image", "caption"]
    return path


@pytest.fixture
def large(template: Path, tmp_path: Path) -> Iterator[Store]:
    """With captions, and both kinds approximate."""
    shutil.copytree(template, tmp_path / "large.lib")
    with Store.open(tmp_path / "large.lib") as copy:
        yield copy


def overlap(store: Store, queries: Vectors, **how: object) -> float:
    ours = store.search("image", queries, 10, **how)  # type: ignore[arg-type]
    exact = store.search("image", queries, 10, exact=True)
    shares = [
        len(np.intersect1d(a.ids, b.ids)) / len(b.ids) for a, b in zip(ours, exact, strict=True)
    ]
    return float(np.mean(shares))


def approximates(store: Store, kind: str = "image") -> bool:
    """Whether a search of that kind asks the approximate index."""
    asked = []
    find = approximate.ApproximateIndex.candidates

    def note(self, *arguments):
        asked.append(1)
        return find(self, *arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(approximate.ApproximateIndex, "candidates", note)
        store.search(kind, pictures(1, 5), 10, source="image")  # type: ignore[arg-type]
    return bool(asked)


def files(store: Store) -> list[Path]:
    return sorted(store.path.glob("*-approximate.faiss*"))


def test_a_small_store_stays_exact_and_says_why(store: Store) -> None:
    write(store, pictures(500))
    assert optimize(store) == []
    facts = store.info()["index"]["image"]
    assert facts["approximate"] is None
    assert "500 vectors of 32" in facts["reason"]
    assert files(store) == []


def test_a_large_store_gets_an_index_that_was_measured_from_both_sides(large: Store) -> None:
    facts = large.info()["index"]["image"]
    built = facts["approximate"]
    assert built is not None
    assert (built["rows"], built["beside"]) == (ROWS, 0)
    for source in ("text", "image"):
        assert [one["k"] for one in built["directions"][source]] == [10, 100]
        assert all(0.99 <= one["overlap"] <= 1 for one in built["directions"][source])
    assert "% of the 10 best" in facts["reason"]
    assert large.verify() == []


def test_approximate_answers_are_nearly_the_exact_ones_with_exact_scores(large: Store) -> None:
    queries = pictures(50, seed=3)
    assert approximates(large)
    assert overlap(large, queries, source="image") >= 0.97
    ours = large.search("image", queries, 10, source="image")
    exact = large.search("image", queries, 10, exact=True)
    for few, all_ in zip(ours, exact, strict=True):
        scores = dict(zip(all_.ids.tolist(), all_.scores.tolist(), strict=True))
        shared = [one for one in few.ids.tolist() if one in scores]
        assert [scores[one] for one in shared] == [
            score
            for one, score in zip(few.ids.tolist(), few.scores.tolist(), strict=True)
            if one in scores
        ]
        assert (np.diff(few.scores) <= 0).all()
        assert len(set(few.ids.tolist())) == 10


def test_what_was_not_proved_is_answered_exactly(large: Store) -> None:
    query = pictures(1, seed=3)
    [deep] = large.search("image", query, 200, source="text")
    [exact] = large.search("image", query, 200, exact=True)
    assert deep.ids.tolist() == exact.ids.tolist()


def test_filters_are_answered_exactly(large: Store) -> None:
    among = large.item_ids()[::7]
    [ours] = large.search("image", pictures(1, seed=3), 10, among=among, source="text")
    [exact] = large.search("image", pictures(1, seed=3), len(large.item_ids()), exact=True)
    expected = [one for one in exact.ids.tolist() if one in set(among)][:10]
    assert ours.ids.tolist() == expected


def test_new_changed_and_removed_rows_are_right_without_a_new_index(large: Store) -> None:
    fresh = pictures(300, seed=9)
    ids = write(large, fresh, start=ROWS)
    before = files(large)
    old = large.item_ids()[:3]
    with large.writer() as writer:
        writer.remove(old[:1])
        replaced = unit(-pictures(1, seed=11))
        writer.write(1, [ItemWrite("1.jpg", 2, 2, b"n" * 16, 8, 8, image_embedding=replaced[0])])
    assert optimize(large) == []
    assert files(large) == before
    for store in (large, Store.open(large.path)):
        found = store.search("image", fresh, 1, source="image")
        assert [match.ids[0] for match in found] == ids
        [nearest] = store.search("image", replaced, 1, source="image")
        assert nearest.ids.tolist() == [old[1]]
        [gone] = store.search("image", pictures(ROWS)[:1], 100, source="image")
        assert old[0] not in gone.ids
        assert approximates(store)
        assert overlap(store, pictures(50, seed=3), source="image") >= 0.97
        # What the index still has of the changed picture is not found under its old vector.
        [was] = store.search("image", pictures(ROWS)[1:2], 100, source="image")
        assert old[1] not in was.ids
    store.close()
    assert large.verify() == []


def test_an_index_that_was_outgrown_is_built_anew_and_the_old_one_goes(large: Store) -> None:
    before = files(large)
    write(large, pictures(ROWS // 4, seed=9), start=ROWS)
    assert optimize(large) == ["image"]
    assert large.info()["index"]["image"]["approximate"]["beside"] == 0
    assert len(files(large)) == 2
    assert files(large) != before
    assert optimize(large) == []


def test_removing_most_pictures_makes_search_exact_again(large: Store) -> None:
    with large.writer() as writer:
        writer.remove(large.item_ids()[100:])
        writer.finish()
        assert writer.optimize() == []
    assert files(large) == []
    assert large.info()["index"]["image"]["approximate"] is None


def test_the_policy_decides(large: Store) -> None:
    def under(policy: SearchPolicy) -> list[str]:
        with large.writer() as writer:
            return list(writer.optimize(policy=policy))

    assert under(SearchPolicy(exact=True)) == []
    assert files(large) == []
    assert "asked for" in large.info()["index"]["image"]["reason"]
    assert not approximates(large)
    assert under(SearchPolicy(memory_bytes=1_000)) == []
    assert "more than the 0.0 MB allowed" in large.info()["index"]["image"]["reason"]
    assert under(SearchPolicy(overlap=0.9)) == ["image", "caption"]
    assert under(SearchPolicy(overlap=0.9)) == []
    assert large.policy() == SearchPolicy(overlap=0.9)
    assert approximates(large)


def test_a_setting_that_finds_too_little_is_not_used(large: Store, monkeypatch) -> None:
    def poor(index, exact, queries, *, k, target, stop):
        return Direction(k, 1, k, 0.5, 0.1, 1.0, len(queries))

    monkeypatch.setattr(optimizer, "tune", poor)
    with large.writer() as writer:
        assert writer.optimize(policy=SearchPolicy(overlap=0.95)) == ["image", "caption"]
    assert not approximates(large)
    assert "50.0 % of the 10 best, so exact after all" in large.info()["index"]["image"]["reason"]


def test_without_captions_texts_are_given_or_searched_exactly(store: Store) -> None:
    write(store, pictures(ROWS))
    assert optimize(store) == ["image"]
    assert list(store.info()["index"]["image"]["approximate"]["directions"]) == ["image"]
    [ours] = store.search("image", pictures(1, 3), 10, source="text")
    [exact] = store.search("image", pictures(1, 3), 10, exact=True)
    assert ours.ids.tolist() == exact.ids.tolist()
    with store.writer() as writer:
        writer.optimize(lambda: pictures(100, seed=4), policy=SearchPolicy(overlap=0.98))
    assert sorted(store.info()["index"]["image"]["approximate"]["directions"]) == ["image", "text"]


def test_a_search_for_both_kinds_takes_the_setting_that_serves_both(large: Store) -> None:
    assert overlap(large, pictures(50, seed=3)) >= 0.97


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_index_costs_time_only(large: Store, damage: str) -> None:
    path = files(large)[-1]
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with closing(Store.open(large.path)) as store:
        assert not approximates(store)
        [found] = store.search("image", pictures(1, 3), 10, source="image")
        [exact] = large.search("image", pictures(1, 3), 10, exact=True)
        assert found.ids.tolist() == exact.ids.tolist()
        [problem] = store.verify()
        assert path.name in problem
        assert "retriever optimize" in problem
    assert any(path.name in line for line in repair(large.path))
    with closing(Store.open(large.path)) as store:
        assert store.verify() == []
        assert optimize(store) == ["image"]
        assert approximates(store)


def test_stopped_or_killed_midway_leaves_nothing_behind(store: Store, monkeypatch) -> None:
    def cut_off(kind, built):
        raise KeyboardInterrupt

    write(store, pictures(ROWS))
    assert optimize(store, stop=lambda: True) == []
    assert files(store) == []
    with store.writer() as writer:
        monkeypatch.setattr(writer, "_record_approximate", cut_off)
        with pytest.raises(KeyboardInterrupt):
            writer.optimize()
    assert len(files(store)) == 1
    assert not approximates(store)
    assert store.verify() == []
    assert optimize(store) == ["image"]
    assert len(files(store)) == 1


def test_a_reader_follows_what_another_process_optimises(large: Store) -> None:
    with closing(Store.open(large.path, read_only=True)) as reader:
        assert approximates(reader)
        with large.writer() as writer:
            writer.optimize(policy=SearchPolicy(exact=True))
        assert not approximates(reader)
        with large.writer() as writer:
            writer.optimize(policy=SearchPolicy())
        assert approximates(reader)


def test_a_copy_and_a_compacted_store_keep_their_index(large: Store, tmp_path: Path) -> None:
    large.backup(tmp_path / "copy.lib")
    large.compact()
    for path in (large.path, tmp_path / "copy.lib"):
        with closing(Store.open(path)) as store:
            assert approximates(store)
            assert store.verify() == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_says_so(store: Store) -> None:
    write(store, pictures(ROWS))
    store.path.chmod(0o500)
    try:
        with pytest.raises(StoreReadOnlyError):
            optimize(store)
    finally:
        store.path.chmod(0o700)


def test_an_index_that_cannot_be_written_is_told_and_search_stays_exact(
    store: Store, monkeypatch
) -> None:
    write(store, pictures(ROWS))

    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(approximate.ApproximateIndex, "save", full)
    with pytest.raises(
        StoreReadOnlyError, match=r"No space left on device.*searches go on as before"
    ):
        optimize(store)
    assert not approximates(store)
    assert store.verify() == []


def test_vectors_that_are_all_alike_stay_exact(store: Store) -> None:
    same = np.tile(pictures(1), (ROWS, 1))
    write(store, same)
    assert optimize(store) == []
    assert store.info()["index"]["image"]["approximate"] is None
    assert len(store.search("image", same[:1], 5, source="image")[0].ids) == 5


def test_a_damaged_faiss_file_is_made_anew_before_it_is_built_on(store: Store) -> None:
    write(store, pictures(ROWS))
    [flat] = store.path.glob("image-*.faiss")
    content = bytearray(flat.read_bytes())
    content[len(content) // 2] ^= 1
    flat.unlink()
    flat.write_bytes(content)
    with closing(Store.open(store.path)) as again:
        assert optimize(again) == ["image"]
        assert again.verify() == []
        assert overlap(again, pictures(50, seed=3), source="image") >= 0.97


def test_optimise_mends_an_index_that_is_damaged(large: Store) -> None:
    path = files(large)[-1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    path.write_bytes(content)
    with closing(Store.open(large.path)) as store:
        assert len(store.verify()) == 1
        assert optimize(store) == ["image"]
        assert store.verify() == []


def test_an_index_of_a_later_state_than_the_catalogue_is_found_and_dropped(large: Store) -> None:
    path = large.path / "catalogue.sqlite"
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE approximate_files SET change = change + 1000")
    assert any("of a later generation than the catalogue" in one for one in large.verify())
    large.close()
    assert any("no longer used" in one for one in repair(large.path))
    with closing(Store.open(large.path)) as store:
        ids = write(store, pictures(20, seed=9), start=ROWS)
        found = store.search("image", pictures(20, seed=9), 1, source="image")
        assert [match.ids[0] for match in found] == ids


def test_exact_search_holds_for_every_model(large: Store) -> None:
    with (
        closing(Store.open(large.path, ModelSpec("other", DIM, "other"), add_model=True)) as other,
        other.writer() as writer,
    ):
        writer.optimize(policy=SearchPolicy(exact=True))
    with closing(Store.open(large.path)) as store:
        assert not approximates(store)
        assert store.info()["index"]["image"]["approximate"] is None


def test_a_stopped_run_leaves_the_policy_as_it_was(large: Store) -> None:
    with large.writer() as writer:
        writer.optimize(policy=SearchPolicy(overlap=0.5), stop=lambda: True)
    assert large.policy() == SearchPolicy()
    assert approximates(large)


def test_a_copy_without_the_file_of_its_index_has_no_record_of_it(
    large: Store, tmp_path: Path
) -> None:
    files(large)[-1].unlink()  # as if a writer had replaced it while the copy was made
    large.backup(tmp_path / "copy.lib")
    with closing(Store.open(tmp_path / "copy.lib")) as copy:
        assert copy.verify() == []
        assert copy.info()["index"]["image"]["approximate"] is None


def test_queries_of_an_unknown_source_take_what_serves_every_source() -> None:
    few = Direction(10, 8, 400, 1, 1, 2, 9)
    many = Direction(10, 16, 50, 1, 1, 2, 9)
    both = Approximate(None, None, {"text": [few], "image": [many]}, None, None)  # type: ignore[arg-type]
    assert both.direction("text", 10) == few
    assert both.direction("image", 3) == many
    assert both.direction("image", 11) is None
    mixed = both.direction(None, 10)
    assert mixed is not None
    assert (mixed.probes, mixed.candidates) == (16, 400)
    pictures_only = Approximate(None, None, {"image": [many]}, None, None)  # type: ignore[arg-type]
    assert pictures_only.direction(None, 10) is None
    assert pictures_only.direction("text", 10) is None


@pytest.mark.parametrize(
    ("overlap", "p50", "is_used"), [(0.99, 1.0, True), (0.98, 1.0, False), (0.99, 3.0, False)]
)
def test_what_finds_too_little_or_takes_longer_is_not_proved(
    overlap: float, p50: float, is_used: bool
) -> None:
    assert IS_PROVED(Direction(10, 1, 10, overlap, p50, 2.0, 9), SearchPolicy()) == is_used
