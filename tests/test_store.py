"""The store against a brute-force oracle, and against what users, disks and signals do to it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from indexes import store as store_module
from indexes import vectors
from indexes.errors import (
    InvalidRowsError,
    StoreDamagedError,
    StoreExistsError,
    StoreLockedError,
    StoreNotFoundError,
    StoreReadOnlyError,
    WrongModelError,
)
from indexes.records import KindInfo
from indexes.store import CaptionRow, ItemWrite, ModelSpec, Store

DIM = 4
MODEL = ModelSpec("toy", DIM, "toy-fingerprint")
MEMORY = Path("/dev/shm")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder in memory where there is one: a commit waits for the disk, a test need not."""
    made = Path(tempfile.mkdtemp(dir=MEMORY if os.access(MEMORY, os.W_OK) else None))
    yield made
    shutil.rmtree(made)


@pytest.fixture
def store(folder: Path) -> Iterator[Store]:
    with Store.create(folder / "photos.lib", MODEL) as made:
        yield made


def sizes(info: KindInfo) -> list[int]:
    """Rows of a kind: all, in the file, beside it, struck out."""
    return [info["rows"], info["indexed"], info["tail"], info["removed"]]


def unit(*parts: float) -> np.ndarray:
    row = np.array(parts, dtype=np.float32)
    return row / np.float32(np.linalg.norm(row))


def random_rows(count: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def item(file: str, vector: np.ndarray | None, *texts: np.ndarray, **changes: object) -> ItemWrite:
    values: dict[str, object] = {
        "content_hash": f"content of {file}".encode("utf-8", "surrogateescape"),
        "captions": tuple(
            CaptionRow(f"{ascii(file)[1:-1]} {n}", "given") for n in range(len(texts))
        ),
        "image_embedding": vector,
        "caption_embeddings": np.stack(texts) if texts else None,
    }
    return ItemWrite(file, 10, 20, width=30, height=40, **(values | changes))  # type: ignore[arg-type]


def fill(store: Store, count: int = 40, *, finish: bool = True) -> list[int]:
    """Items with two captions each."""
    images, texts = random_rows(count, 1), random_rows(2 * count, 2)
    with store.writer() as writer:
        root = writer.add_root(Path("/pictures"))
        ids = writer.write(
            root,
            [
                item(f"{n}.jpg", images[n], texts[2 * n], texts[2 * n + 1], item_id=None)
                for n in range(count)
            ],
        )
        if finish:
            writer.finish()
    return ids


def faiss_file(store: Store, kind: str = "image") -> Path:
    [file] = store.path.glob(f"{kind}-*.faiss")
    return file


def answers(store: Store, k: int = 7) -> list[tuple[list[int], list[float]]]:
    queries = random_rows(5, 3)
    return [
        (match.ids.tolist(), match.scores.tolist())
        for kind in ("image", "caption")
        for match in store.search(kind, queries, k)  # type: ignore[arg-type]
    ]


# The life of a store, step by step


def test_hand_worked_search(store):
    with store.writer() as writer:
        root = writer.add_root(Path("/pictures"))
        east, north = unit(1, 0, 0, 0), unit(0, 1, 0, 0)
        a, b, c = writer.write(
            root, [item("a", east, north), item("b", north), item("c", unit(1, 1, 0, 0), east)]
        )
    [match] = store.search("image", east[None], 2)
    assert match.ids.tolist() == [a, c]
    assert match.scores.tolist() == [1.0, float(np.float16(0.5**0.5))]
    [match] = store.search("caption", east[None], 1)
    assert store.captions(match.ids.tolist()) == [(c, CaptionRow("c 0", "given"))]
    [match] = store.search("image", east[None], 5, among=[b, c, 999])
    assert match.ids.tolist() == [c, b]
    [match] = store.search("image", east[None], 5, among=[])
    assert match.ids.tolist() == []


def test_an_empty_store_answers_with_nothing(store):
    [match] = store.search("image", unit(1, 0, 0, 0)[None], 3)
    assert (match.ids.tolist(), match.scores.tolist()) == ([], [])
    assert (match.ids.dtype, match.scores.dtype) == (np.int64, np.float32)
    assert store.search("image", np.empty((0, DIM), dtype=np.float32), 3) == []
    assert store.verify() == []


def test_rows_come_back_as_they_were_written(store):
    name = os.fsdecode(b"caf\xe9/\xff.jpg")
    change = item(name, unit(1, 2, 3, 4), unit(1, 0, 0, 0))
    with store.writer() as writer:
        root = writer.add_root(Path("/pictures"))
        [item_id] = writer.write(root, [change])
    [row] = store.items([item_id])
    assert row.path == Path("/pictures") / name
    assert (row.file, row.size, row.mtime_ns, row.width, row.height) == (name, 10, 20, 30, 40)
    assert row.captions == change.captions
    assert store.item_by_path(row.path) == row
    assert store.roots() == [(root, Path("/pictures"))]
    known = store.known_files(root)[name]
    assert (known.item_id, known.size, known.mtime_ns, known.status) == (item_id, 10, 20, "ok")
    assert store.find_by_hash([change.content_hash, b"unknown"]) == {change.content_hash: item_id}
    stored = store.embeddings("image", [item_id, item_id])
    assert stored.tolist() == [change.image_embedding.astype(np.float16).tolist()] * 2
    assert len(store.caption_ids(item_id)) == 1
    with pytest.raises(InvalidRowsError, match="no image embedding of 99"):
        store.embeddings("image", [99])


def test_items_and_captions_keep_the_order_asked_and_leave_out_the_removed(store):
    ids = fill(store)
    with store.writer() as writer:
        writer.remove([ids[1], 12345])
    asked = [ids[3], ids[1], ids[0], ids[3]]
    assert [row.item_id for row in store.items(asked)] == [ids[3], ids[0], ids[3]]
    texts = [store.caption_ids(ids[2])[1], 99999, store.caption_ids(ids[0])[0]]
    assert [item_id for item_id, _ in store.captions(texts)] == [ids[2], ids[0]]


def test_an_item_is_found_by_path_under_the_root_that_knows_it(store):
    with store.writer() as writer:
        outer, inner = writer.add_root(Path("/p")), writer.add_root(Path("/p/q"))
        assert writer.add_root(Path("/p/../p")) == outer
        [a] = writer.write(outer, [item("q/a.jpg", unit(1, 0, 0, 0))])
        [b] = writer.write(inner, [item("b.jpg", unit(1, 0, 0, 0))])
    found = [store.item_by_path(Path(path)) for path in ("/p/q/a.jpg", "/p/q/b.jpg", "/p/c.jpg")]
    assert [row and row.item_id for row in found] == [a, b, None]


def test_writing_a_known_place_again_changes_the_item(store):
    [first, *_] = fill(store, 3)
    with store.writer() as writer:
        [again] = writer.write(1, [item("0.jpg", unit(0, 0, 0, 1), unit(0, 0, 1, 0))])
    assert again == first
    assert len(store.caption_ids(first)) == 1
    [match] = store.search("image", unit(0, 0, 0, 1)[None], 10)
    assert match.ids.tolist()[0] == first
    assert sorted(match.ids.tolist()) == [1, 2, 3]
    assert store.verify() == []


def test_the_same_content_needs_no_second_embedding(store):
    shared = {"content_hash": b"same"}
    with store.writer() as writer:
        root = writer.add_root(Path("/pictures"))
        original = item("a", unit(1, 2, 3, 4), **shared)
        a, b = writer.write(root, [item("copy", None, **shared), original])
        [c] = writer.write(root, [item("copy of copy", None, **shared)])
        # The item itself, touched: the bytes are the same, only the captions are new.
        writer.write(root, [item("a", None, unit(1, 0, 0, 0), **shared)])
        with pytest.raises(InvalidRowsError, match="'new' came without an embedding"):
            writer.write(root, [item("new", None)])
    rows = store.embeddings("image", [a, b, c])
    assert (rows == rows[0]).all()
    [match] = store.search("image", unit(1, 2, 3, 4)[None], 5)
    assert match.ids.tolist() == [a, b, c]


def test_a_changed_picture_is_not_its_own_source(store):
    """Its row takes the new hash; the old embedding must not pass for the new content's."""
    with store.writer() as writer:
        root = writer.add_root(Path("/pictures"))
        writer.write(root, [item("a", unit(1, 0, 0, 0), content_hash=b"old")])
        with pytest.raises(InvalidRowsError):
            writer.write(root, [item("a", None, content_hash=b"new")])
    assert store.items([1])[0].content_hash == b"old"


def test_a_failed_item_is_kept_with_its_reason_and_never_found(store):
    ids = fill(store, 3)
    reason = f"{os.fsdecode(bytes([0xFF]))}.jpg is truncated"
    broken = item("1.jpg", None, failure=reason, captions=(CaptionRow("text", "given"),))
    with store.writer() as writer:
        writer.write(1, [broken])
        for finish in (False, True):
            if finish:
                writer.finish()
            assert ids[1] not in store.search("image", random_rows(1, 4), 10)[0].ids
            owners = store.captions(store.search("caption", random_rows(1, 4), 10)[0].ids.tolist())
            assert {owner for owner, _ in owners} == {ids[0], ids[2]}
    [failed] = store.failures()
    assert (failed.item_id, failed.status, failed.captions) == (ids[1], "failed", broken.captions)
    assert failed.reason == "\\udcff.jpg is truncated"
    assert store.find_by_hash([broken.content_hash]) == {}
    assert store.info()["failures"] == 1
    with store.writer() as writer:
        with pytest.raises(InvalidRowsError, match="no item 2 that can have captions"):
            writer.set_captions(ids[1], [], None)
        writer.write(1, [item("1.jpg", unit(1, 1, 1, 1))])
        writer.write(1, [broken])
        writer.write(1, [item("1.jpg", unit(1, 1, 1, 1))])
    assert store.failures() == []
    assert store.search("image", unit(1, 1, 1, 1)[None], 1)[0].ids.tolist() == [ids[1]]
    assert store.verify() == []


def test_a_moved_item_keeps_its_id_captions_and_embeddings(store):
    ids = fill(store, 3)
    before = answers(store)
    with store.writer() as writer:
        other = writer.add_root(Path("/elsewhere"))
        writer.move(ids[0], other, "new name.jpg", 11, 21)
        with pytest.raises(InvalidRowsError, match=r"another item is at '2\.jpg'"):
            writer.move(ids[1], 1, "2.jpg", 1, 1)
        with pytest.raises(InvalidRowsError, match="there is no item 99"):
            writer.move(99, 1, "x", 1, 1)
        writer.touch(ids[2], 12, 22)
    [moved, touched] = store.items([ids[0], ids[2]])
    assert (moved.path, moved.size) == (Path("/elsewhere/new name.jpg"), 11)
    assert (touched.size, touched.mtime_ns) == (12, 22)
    assert answers(store) == before


def test_captions_change_without_the_picture(store):
    ids = fill(store, 2)
    with store.writer() as writer:
        writer.set_captions(ids[0], [CaptionRow("new", "exif")], unit(0, 0, 1, 0)[None])
        writer.set_captions(ids[1], [], None)
    [match] = store.search("caption", unit(0, 0, 1, 0)[None], 9)
    assert store.captions(match.ids.tolist()) == [(ids[0], CaptionRow("new", "exif"))]
    assert store.items(ids)[1].captions == ()


def test_calls_joined_together_are_one_transaction(store):
    ids = fill(store, 3)
    with store.writer() as writer:
        with pytest.raises(ZeroDivisionError), writer.together():  # noqa: PT012
            writer.remove([ids[0]])
            writer.touch(ids[1], 99, 99)
            raise ZeroDivisionError
        assert len(store.items(ids)) == 3
        with writer.together():
            writer.remove([ids[0]])
            with pytest.raises(InvalidRowsError):
                writer.move(ids[1], 1, "2.jpg", 1, 1)
            writer.touch(ids[1], 99, 99)
            assert len(store.items(ids)) == 3
    assert [row.size for row in store.items(ids)] == [99, 10]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"image_embedding": unit(1, 0, 0, 0) * 1.01}, "embedding 0 has length 1.01, not 1"),
        ({"image_embedding": np.full(DIM, np.nan, dtype=np.float32)}, "length nan"),
        ({"image_embedding": np.zeros(DIM, dtype=np.float32)}, "length 0"),
        ({"image_embedding": unit(1, 0, 0)}, r"float32 \(1, 3\), not float32 \(n, 4\)"),
        ({"image_embedding": np.array([1.0, 0, 0, 0])}, "float64"),
        ({"image_embedding": None, "content_hash": None}, "neither an embedding nor"),
        ({"captions": (CaptionRow("a", "given"),)}, "1 captions, 0 embeddings"),
        ({"caption_embeddings": unit(1, 0, 0, 0)[None]}, "0 captions, 1 embeddings"),
        ({"failure": "broken"}, "failed and yet has embeddings"),
        (
            {
                "captions": (CaptionRow("\udc80", "given"),),
                "caption_embeddings": unit(1, 0, 0, 0)[None],
            },
            "not valid text",
        ),
        ({"item_id": 99}, "there is no item 99"),
        ({"file": "/absolute"}, "not a path relative to a root"),
        ({"file": "0"}, "'0' is in the batch twice"),
    ],
)
def test_one_wrong_row_in_a_batch_leaves_nothing_of_it(store, wrong, words):
    good = [item(f"{n}", unit(1, 0, 0, n), unit(0, 1, 0, n)) for n in range(4)]
    bad = replace(item("bad", unit(1, 0, 0, 0)), **wrong)
    with store.writer() as writer:
        root = writer.add_root(Path("/pictures"))
        with pytest.raises(InvalidRowsError, match=words):
            writer.write(root, [*good[:2], bad, *good[2:]])
    assert store.known_files(root) == {}
    assert store.search("image", unit(1, 0, 0, 0)[None], 5)[0].ids.size == 0
    assert store.verify() == []


@pytest.mark.parametrize(
    "queries", [unit(1, 0, 0)[None], unit(1, 0, 0, 0), unit(1, 0, 0, 0)[None] * 2]
)
def test_queries_are_checked_at_the_door(store, queries):
    with pytest.raises(InvalidRowsError, match="queries"):
        store.search("image", queries, 1)


# Against the oracle


class Life(RuleBasedStateMachine):
    """Whatever is done to a store, every search agrees with brute force over a plain dict."""

    # Few directions, so that equal scores are common.
    directions = st.sampled_from([unit(1, 0, 0, 0), unit(0, 1, 0, 0), unit(1, 1, 0, 0)])
    some_vectors = st.lists(directions, max_size=3)
    numbers = st.integers(0, 11)

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=MEMORY if os.access(MEMORY, os.W_OK) else None))
        self.store = Store.create(self.folder / "photos.lib", MODEL)
        self.images: dict[int, np.ndarray] = {}
        self.texts: dict[int, list[np.ndarray]] = {}
        self.ids: dict[str, int] = {}
        self.dirty = False

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)

    @initialize()
    def add_root(self) -> None:
        with self.store.writer() as writer:
            self.root = writer.add_root(Path("/pictures"))

    @rule(batch=st.dictionaries(numbers, st.tuples(directions, some_vectors), max_size=6))
    def write(self, batch: dict[int, tuple[np.ndarray, list[np.ndarray]]]) -> None:
        changes = [item(f"{n}", image, *texts) for n, (image, texts) in batch.items()]
        with self.store.writer() as writer:
            ids = writer.write(self.root, changes)
        for change, item_id, (image, texts) in zip(changes, ids, batch.values(), strict=True):
            assert self.ids.setdefault(change.file, item_id) == item_id
            self.images[item_id], self.texts[item_id] = image, texts

    @rule(number=numbers)
    def fail(self, number: int) -> None:
        with self.store.writer() as writer:
            [item_id] = writer.write(self.root, [item(f"{number}", None, failure="broken")])
        self.ids[f"{number}"] = item_id
        self.images.pop(item_id, None)
        self.texts.pop(item_id, None)

    @rule(numbers=st.sets(numbers))
    def remove(self, numbers: set[int]) -> None:
        gone = [self.ids.pop(f"{n}") for n in numbers if f"{n}" in self.ids]
        with self.store.writer() as writer:
            writer.remove(gone)
        for item_id in gone:
            self.images.pop(item_id, None)
            self.texts.pop(item_id, None)

    @precondition(lambda self: self.images)
    @rule(data=st.data(), texts=some_vectors)
    def set_captions(self, data: st.DataObject, texts: list[np.ndarray]) -> None:
        item_id = data.draw(st.sampled_from(sorted(self.images)))
        rows = [CaptionRow("new", "given")] * len(texts)
        with self.store.writer() as writer:
            writer.set_captions(item_id, rows, np.stack(texts) if texts else None)
        self.texts[item_id] = texts

    @rule()
    def finish(self) -> None:
        with self.store.writer() as writer:
            writer.finish()
        assert self.store.info()["index"]["image"]["tail"] == 0
        assert self.store.info()["index"]["caption"]["removed"] == 0

    @rule()
    def rebuild(self) -> None:
        self.store.rebuild()

    @rule(read_only=st.booleans())
    def reopen(self, read_only: bool) -> None:
        self.store.close()
        if read_only:
            with Store.open(self.folder / "photos.lib", read_only=True) as self.store:
                self.agrees_with_brute_force()
        self.store = Store.open(self.folder / "photos.lib", MODEL)

    @rule(kind=st.sampled_from(["image", "caption"]), cut=st.sampled_from([None, 0, 50, 130]))
    def damage(self, kind: str, cut: int | None) -> None:
        for file in self.store.path.glob(f"{kind}-*.faiss"):
            if cut is None:
                file.unlink()
            else:
                os.truncate(file, cut)
        self.store.close()
        self.store = Store.open(self.folder / "photos.lib", MODEL)
        self.agrees_with_brute_force()

    @invariant()
    def agrees_with_brute_force(self) -> None:
        texts = {
            caption_id: vector
            for item_id, rows in self.texts.items()
            for caption_id, vector in zip(self.store.caption_ids(item_id), rows, strict=True)
        }
        query = unit(3, 2, 1, 0)
        for kind, expected in (("image", self.images), ("caption", texts)):
            for among in (None, set(list(expected)[::2]) | {10**9}):
                allowed = [key for key in expected if among is None or key in among]
                scores = {
                    key: np.float32(expected[key].astype(np.float16).astype(np.float64) @ query)
                    for key in allowed
                }
                order = sorted(allowed, key=lambda key: (-scores[key], key))
                for k in (1, 3, 100):
                    [match] = self.store.search(kind, query[None], k, among=among)  # type: ignore[arg-type]
                    assert match.ids.tolist() == order[:k]
                    assert match.scores.tolist() == [scores[key] for key in order[:k]]

    @invariant()
    def is_clean(self) -> None:
        assert self.store.verify() == []


@pytest.mark.parametrize("small", [0, vectors.SMALL])
def test_any_sequence_agrees_with_brute_force(monkeypatch, small):
    monkeypatch.setattr(vectors, "SMALL", small)
    monkeypatch.setattr(vectors, "SLACK", 1)  # so that ties reach beyond what FAISS fetched
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=8,
            stateful_step_count=12,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


# Opening


def test_a_store_is_made_once_and_in_a_folder_of_its_own(folder, store):
    with pytest.raises(StoreExistsError, match="is a library already"):
        Store.create(store.path, MODEL)
    (folder / "photos").mkdir()
    (folder / "photos" / "cat.jpg").touch()
    with pytest.raises(StoreExistsError, match=r"holds other files \('cat.jpg'\)"):
        Store.create(folder / "photos", MODEL)
    with pytest.raises(StoreNotFoundError, match="there is no library at"):
        Store.open(folder / "nowhere")


def test_a_store_whose_making_was_cut_off_is_completed(folder, store):
    store.close()
    with sqlite3.connect(store.path / "catalogue.sqlite") as connection:
        connection.execute("DELETE FROM store_info")
        connection.execute("DELETE FROM models")
    connection.close()
    with pytest.raises(StoreNotFoundError, match="never completed"):
        Store.open(store.path)
    with Store.create(store.path, MODEL) as again:
        assert again.model == MODEL


def test_another_model_is_refused(store):
    fill(store, 2)
    for other in (replace(MODEL, fingerprint="other"), replace(MODEL, dim=8)):
        with pytest.raises(WrongModelError, match="was made with toy"):
            Store.open(store.path, other)
    with Store.open(store.path, replace(MODEL, name="renamed")) as again:
        assert again.model == MODEL


def test_a_damaged_catalogue_is_named_with_the_way_out(store):
    fill(store, 200)
    store.close()
    file = store.path / "catalogue.sqlite"
    content = bytearray(file.read_bytes())
    file.write_bytes(content[: len(content) // 2])
    with (
        pytest.raises(StoreDamagedError, match="`retriever repair` saves what can be read"),
        Store.open(store.path) as cut,
    ):
        raise StoreDamagedError(cut.verify()[0])
    file.write_bytes(b"\0" * len(content))
    with pytest.raises(StoreDamagedError, match="`retriever repair` saves what can be read"):
        Store.open(store.path)


@pytest.mark.parametrize("read_only", [False, True])
def test_damage_that_only_a_search_comes_upon_changes_no_answer(store, monkeypatch, read_only):
    monkeypatch.setattr(vectors, "BLOCK", 64)
    fill(store)
    expected = answers(store)
    file = faiss_file(store)
    content = bytearray(file.read_bytes())
    content[200] ^= 1  # in the tenth vector: neither a header nor an id
    file.write_bytes(content)
    with Store.open(store.path, read_only=read_only) as again:
        assert answers(again) == expected
        assert again.generation == (1 if read_only else 2)
        assert answers(again) == expected
        assert bool(again.verify()) == read_only


def test_a_file_of_an_older_version_is_used_in_silence(store, capfd):
    fill(store)
    expected = answers(store)
    store.close()
    for kind in ("image", "caption"):
        file = faiss_file(store, kind)
        content = file.read_bytes()[:-8]
        file.write_bytes(content)
        with closing(sqlite3.connect(store.path / "catalogue.sqlite")) as database, database:
            database.execute(
                "UPDATE index_files SET size_bytes = ?, checksum = ? WHERE name = ?",
                (len(content), xxhash.xxh3_128_hexdigest(content), file.name),
            )
    with Store.open(store.path) as again:
        assert again.verify() == []
        assert answers(again) == expected
        assert again.generation == 1
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("damage", ["missing", "torn", "empty", "zeroed", "flipped", "foreign"])
@pytest.mark.parametrize("read_only", [False, True])
def test_a_spoilt_faiss_file_changes_no_answer_and_is_mended(folder, store, damage, read_only):
    fill(store)
    expected = answers(store)
    store.close()
    file = faiss_file(store)
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage in ("torn", "empty"):
        os.truncate(file, 100 if damage == "torn" else 0)
    elif damage == "zeroed":
        file.write_bytes(bytes(len(content)))
    elif damage == "flipped":
        file.write_bytes(content[:200] + bytes([content[200] ^ 1]) + content[201:])
    else:
        with Store.create(folder / "other.lib", MODEL) as other:
            with other.writer() as writer:
                rows = random_rows(40, 99)
                root = writer.add_root(Path("/p"))
                writer.write(root, [item(f"{n}", row) for n, row in enumerate(rows)])
                writer.finish()
            assert faiss_file(other).stat().st_size == len(content)
            faiss_file(other).replace(file)
    left = sorted(store.path.glob("*.faiss*"))
    with Store.open(store.path, read_only=read_only) as again:
        assert any("`retriever repair` makes it again" in problem for problem in again.verify())
        assert answers(again) == expected
        assert answers(again) == expected
        if read_only:
            assert again.generation == 1
            assert sorted(store.path.glob("*.faiss*")) == left
        else:
            assert again.verify() == []
            assert again.generation == 2
            assert again.info()["index"]["image"]["tail"] == 0


def test_a_copied_library_works_and_its_files_are_believed_by_their_checksum(folder, store):
    fill(store)
    expected = answers(store)
    store.close()
    shutil.copytree(store.path, folder / "copy.lib", copy_function=shutil.copyfile)
    with Store.open(folder / "copy.lib") as copy:
        assert answers(copy) == expected
        assert (copy.generation, copy.verify()) == (1, [])


def test_a_read_only_store_refuses_to_be_written(store):
    fill(store, 2)
    with Store.open(store.path, read_only=True) as reader:
        with pytest.raises(StoreReadOnlyError, match="opened for reading only"), reader.writer():
            pass
        with pytest.raises(StoreReadOnlyError):
            reader.rebuild()


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs POSIX users")
@pytest.mark.parametrize("is_open_elsewhere", [False, True])
def test_a_store_that_we_may_not_write_is_searched(folder, store, is_open_elsewhere):
    fill(store)
    expected = answers(store)
    if not is_open_elsewhere:
        store.close()
    for path in (folder, store.path, *store.path.iterdir()):
        path.chmod(0o555 if path.is_dir() else 0o444)
    as_root = os.geteuid() == 0
    if as_root:
        os.seteuid(65534)  # root may write anything
    try:
        with Store.open(store.path) as reader:
            assert answers(reader) == expected
            with pytest.raises(StoreReadOnlyError), reader.writer():
                pass
    finally:
        if as_root:
            os.seteuid(0)
        for path in (folder, store.path):
            path.chmod(0o755)


def test_many_rows_left_beside_the_file_are_written_into_it_when_opened(store, monkeypatch):
    fill(store, 30, finish=False)
    expected = answers(store)
    monkeypatch.setattr(store_module, "LONG_TAIL", 30)
    with Store.open(store.path) as again:
        assert sizes(again.info()["index"]["image"]) == [30, 0, 30, 0]
        assert answers(again) == expected
        assert sizes(again.info()["index"]["image"]) == [30, 30, 0, 0]


def test_finish_without_changes_writes_nothing(store):
    ids = fill(store)
    with store.writer() as writer:
        writer.touch(ids[0], 1, 1)
        writer.finish()
    assert store.generation == 1
    with store.writer() as writer:
        writer.remove(ids)
        writer.finish()
    assert store.generation == 2
    assert list(store.path.glob("*.faiss")) == []
    assert store.search("image", random_rows(1, 1), 3)[0].ids.size == 0


# Several at once


def test_readers_see_what_was_removed_before_their_search_began(store):
    ids = fill(store)
    with Store.open(store.path) as reader, store.writer() as writer:
        best = int(reader.search("image", unit(1, 0, 0, 0)[None], 1)[0].ids[0])
        writer.remove([best])
        assert best not in reader.search("image", unit(1, 0, 0, 0)[None], len(ids))[0].ids
        [added] = writer.write(1, [item("new", unit(1, 0, 0, 0))])
        assert reader.search("image", unit(1, 0, 0, 0)[None], 1)[0].ids.tolist() == [added]
        writer.finish()  # the file that the reader has open is gone now
        assert reader.search("image", unit(1, 0, 0, 0)[None], 1)[0].ids.tolist() == [added]
        assert answers(reader) == answers(store)


def test_readers_in_threads_beside_a_writer(store):
    ids = fill(store)
    stop, wrong = threading.Event(), []

    def search() -> None:
        with Store.open(store.path) as reader:
            while not stop.is_set():
                [match] = reader.search("image", unit(1, 0, 0, 0)[None], 100)
                # 40 items, and one more that comes and goes
                if len(match.ids) not in (40, 41) or not set(ids) <= set(match.ids.tolist()):
                    wrong.append(match)

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    with store.writer() as writer:
        for _ in range(15):
            [extra] = writer.write(1, [item("extra", unit(1, 0, 0, 0))])
            writer.finish()
            writer.remove([extra])
            writer.finish()
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_second_writer_is_told_who_writes(store):
    with (
        store.writer(),
        pytest.raises(
            StoreLockedError, match=rf"is being written by process {os.getpid()} on .+ since 2"
        ),
        Store.open(store.path) as other,
        other.writer(),
    ):
        pass
    with store.writer():
        pass


WRITE_FOREVER = """
import os, sys, time
import numpy as np
from pathlib import Path
from indexes.store import CaptionRow, ItemWrite, Store
store = Store.open(Path(sys.argv[1]))
vector = np.array([1, 0, 0, 0], dtype=np.float32)
with store.writer() as writer:
    if os.fork() == 0:  # a worker process that outlives its parent
        time.sleep(60)
        os._exit(0)
    root = writer.add_root(Path("/pictures"))
    for batch in range(10**6):
        writer.write(root, [
            ItemWrite(f"{batch}/{n}", 1, 1, None, 1, 1, None, (CaptionRow("text", "given"),),
                      vector, vector[None]) for n in range(5)])
        print(batch, flush=True)
        if batch % 3 == 2:
            writer.finish()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_killed_writer_loses_nothing_committed_and_leaves_no_lock(store):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE_FOREVER, str(store.path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            last = int(line)
            if last >= 7:
                break
        with pytest.raises(StoreLockedError, match=f"process {process.pid} "), store.writer():
            pass
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        known = store.known_files(1)
        assert len(known) % 5 == 0
        assert len(known) >= 5 * (last + 1)
        assert store.verify() == []
        [match] = store.search("image", unit(1, 0, 0, 0)[None], 10**6)
        assert sorted(match.ids.tolist()) == sorted(row.item_id for row in known.values())
        with store.writer() as writer:
            writer.finish()
        assert store.verify() == []
    finally:
        process.stdout.close()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_files_left_by_a_killed_writer_are_not_used_and_are_swept(store):
    fill(store)
    expected = answers(store)
    left = [store.path / f"image-1-0000000{n}.faiss" for n in (2, 3)]
    left.append(store.path / "caption-1-00000002.faiss.tmp")
    for file in left:
        shutil.copy(faiss_file(store, "caption"), file) if file.suffix == ".tmp" else (
            file.write_bytes(b"IxMp and then nothing")
        )
    with Store.open(store.path) as again:
        assert answers(again) == expected
        assert again.verify() == []
        with again.writer() as writer:
            writer.finish()
        assert not any(file.exists() for file in left)
        assert answers(again) == expected


# verify and info


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        (
            "UPDATE image_embeddings SET vector = zeroblob(8) WHERE owner_id = 3",
            "of 3 is not a unit",
        ),
        ("UPDATE image_embeddings SET vector = x'007c007c007c007c'", "of 1 is not a unit vector"),
        (
            "UPDATE image_embeddings SET vector = x'003c000000000000' WHERE owner_id = 3",
            "the FAISS file has another image vector for 3",
        ),
        ("UPDATE caption_embeddings SET vector = x'003c' WHERE owner_id = 3", "differ in length"),
        ("DELETE FROM image_embeddings WHERE owner_id = 3", "item 3 .* without an embedding"),
        ("DELETE FROM image_embeddings WHERE owner_id = 3", "lacks 0 rows and has 1 more"),
        ("DELETE FROM caption_embeddings WHERE owner_id = 3", "lacks 0 rows and has 1 more"),
        ("DELETE FROM items WHERE id = 3", "points to a missing row of items"),
        ("UPDATE items SET status = 'failed' WHERE id = 3", "item 3 .* failed, yet with an emb"),
        ("UPDATE items SET status = 'failed' WHERE id = 3", "failed, yet with an embedded caption"),
        ("UPDATE store_info SET generation = 0", "of a later generation than the catalogue"),
        ("UPDATE index_files SET checksum = 'x'", "has checksum .*, not x; `retriever repair`"),
    ],
)
def test_verify_names_the_problem(store, statement, words):
    fill(store)
    assert store.verify() == []
    connection = sqlite3.connect(store.path / "catalogue.sqlite")
    with connection:
        connection.execute(statement)
    connection.close()
    problems = "\n".join(store.verify())
    assert re.search(words, problems), problems


def test_info_counts_what_is_there(store):
    ids = fill(store, 5)
    with store.writer() as writer:
        writer.remove(ids[:2])
        writer.write(1, [item("new", unit(1, 0, 0, 0))])
    info = store.info()
    assert (info["items"], info["captions"], info["failures"]) == (4, 6, 0)
    assert info["model"] == {"name": "toy", "dim": DIM, "fingerprint": "toy-fingerprint"}
    assert info["generation"] == store.generation == 1
    assert sizes(info["index"]["image"]) == [4, 5, 1, 2]
    assert sizes(info["index"]["caption"]) == [6, 10, 0, 4]
    assert info["size_bytes"] > 10_000


def test_naming_rows_loads_neither_the_database_nor_faiss():
    program = (
        "import sys, indexes.store; "
        "sys.exit(bool({'sqlalchemy', 'faiss', 'torch', 'retriever'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parent.parent)
