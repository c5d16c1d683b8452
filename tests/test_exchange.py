"""What goes out of a library comes in again, row for row, and hostile files come in not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ToyEncoder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from indexes.errors import WrongModelError
from indexes.store import CaptionRow, ItemWrite, ModelSpec, Store
from retriever import exchange, portable
from retriever.errors import RetrieverError, UsageError
from retriever.exchange import (
    ImportReport,
    export_store,
    exported_model,
    import_folder,
    merge_store,
)
from retriever.ingest import index_folder

DIM = 4
MODEL = ModelSpec("toy", DIM, "toy-fingerprint")
OTHER = ModelSpec("other", DIM, "other-fingerprint")
MEMORY = Path("/dev/shm")
HOME = Path("/home/me/pictures")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder in memory where there is one: a commit waits for the disk, a test need not."""
    with scratch() as made:
        yield made


def scratch() -> Any:
    return FolderInMemory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None)


class FolderInMemory(tempfile.TemporaryDirectory):  # type: ignore[type-arg]
    def __enter__(self) -> Path:
        return Path(super().__enter__())


def unit(*parts: float) -> np.ndarray:
    row = np.array(parts, dtype=np.float32)
    return row / np.float32(np.linalg.norm(row))


EAST, NORTH, SOUTH = unit(1, 0, 0, 0), unit(0, 1, 0, 0), unit(0, -1, 0, 0)


def item(file: str, vector: np.ndarray, *captions: tuple[str, np.ndarray], **changes: Any) -> Any:
    values: dict[str, Any] = {
        "content_hash": hashlib.md5(os.fsencode(file)).digest(),
        "captions": tuple(CaptionRow(text, "given: by hand") for text, _ in captions),
        "image_embedding": vector,
        "caption_embeddings": np.stack([row for _, row in captions]) if captions else None,
    }
    return ItemWrite(file, 10, 20, width=30, height=40, **(values | changes))


def failed(file: str, **changes: Any) -> Any:
    values: dict[str, Any] = {"content_hash": b"\1" * 16, "failure": "is empty"}
    return ItemWrite(file, 0, 20, width=0, height=0, **(values | changes))


def store_with(path: Path, roots: dict[Path, list[Any]], model: ModelSpec = MODEL) -> Store:
    store = Store.create(path, model)
    with store.writer() as writer:
        for root, several in roots.items():
            writer.write(writer.add_root(root), several)
        writer.finish()
    return store


def contents(store: Store) -> dict[Path, Any]:
    """All that a store knows, without the numbers that it gave."""
    found: dict[Path, Any] = {}
    for one in store.items(store.item_ids()):
        vectors = b""
        if one.status == "ok":
            ids = store.caption_ids(one.item_id)
            vectors = store.embeddings("image", [one.item_id]).tobytes()
            vectors += store.embeddings("caption", ids).tobytes()
        found[one.path] = (
            *(one.size, one.mtime_ns, one.content_hash, one.width, one.height, one.taken),
            *(one.status, one.reason, one.captions, vectors),
            *(one.camera, one.latitude, one.longitude, one.perceptual_hash),
            *(one.extras, one.facts),
        )
    return found


def sample(path: Path) -> Store:
    """Three pictures, one of them failed, two captions."""
    told = {
        "taken": datetime(2024, 5, 1, 12),
        "camera": "NIKON D90",
        "latitude": 45.5,
        "longitude": -12.25,
        "perceptual_hash": -81,
        "extras": (("stars", 4.0), ("tag", "sky"), ("tag", "sea")),
    }
    several = [
        item("a.jpg", EAST, ("a", NORTH), ("again", SOUTH), **told),
        item("b/c.jpg", NORTH),
        failed("d.jpg"),
    ]
    return store_with(path, {HOME: several})


@pytest.fixture
def store(folder: Path) -> Iterator[Store]:
    with sample(folder / "photos.lib") as made:
        yield made


@pytest.fixture
def fresh(folder: Path) -> Iterator[Store]:
    with Store.create(folder / "fresh.lib", MODEL) as made:
        yield made


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "BATCH_SIZE", 2)
    monkeypatch.setattr(portable, "BATCH_SIZE", 2)


# Out


def test_an_export_is_read_with_json_and_numpy_alone(store, folder):
    report = export_store(store, folder / "out")
    manifest = json.loads((folder / "out/manifest.json").read_bytes())
    lines = list(map(json.loads, (folder / "out/items.ndjson").read_bytes().splitlines()))
    images, captions = (
        np.load(folder / f"out/{kind}_embeddings.npy") for kind in ("image", "caption")
    )
    assert manifest["model"] == {"name": "toy", "dim": DIM, "fingerprint": "toy-fingerprint"}
    assert (report.items, report.captions, report.image_embeddings) == (3, 2, 2)
    assert report.size_bytes == sum(path.stat().st_size for path in (folder / "out").iterdir())
    assert images.dtype == captions.dtype == np.float16
    assert [line["file"] for line in lines] == ["a.jpg", "b/c.jpg", "d.jpg"]
    assert lines[0] == {
        "root": str(HOME),
        "file": "a.jpg",
        "size": 10,
        "mtime_ns": 20,
        "content_hash": hashlib.md5(b"a.jpg").hexdigest(),
        "width": 30,
        "height": 40,
        "taken": "2024-05-01T12:00:00",
        "status": "ok",
        "reason": None,
        "embedding": 0,
        "camera": "NIKON D90",
        "latitude": 45.5,
        "longitude": -12.25,
        "perceptual_hash": -81,
        "facts": 1,
        "extras": [["stars", 4.0], ["tag", "sea"], ["tag", "sky"]],
        "captions": [
            {"text": "a", "source": "given: by hand", "embedding": 0},
            {"text": "again", "source": "given: by hand", "embedding": 1},
        ],
    }
    assert (lines[2]["status"], lines[2]["reason"], lines[2]["embedding"]) == (
        "failed",
        "is empty",
        None,
    )
    np.testing.assert_array_equal(images, [EAST, NORTH])
    np.testing.assert_array_equal(captions, [NORTH, SOUTH])


def test_an_export_makes_a_new_folder_only(store, folder):
    (folder / "out").mkdir()
    with pytest.raises(UsageError, match="out exists"):
        export_store(store, folder / "out")


def test_what_a_killed_export_left_is_replaced_and_nothing_else(store, folder):
    left = folder / "out.partial"
    left.mkdir()
    (left / "items.ndjson").write_bytes(b"half a li")
    export_store(store, folder / "out")
    assert not left.exists()
    left.mkdir()
    (left / "my thesis.doc").write_bytes(b"years of work")
    (folder / "out").rename(folder / "elsewhere")
    with pytest.raises(UsageError, match=r"out\.partial is in the way"):
        export_store(store, folder / "out")
    assert (left / "my thesis.doc").read_bytes() == b"years of work"


def test_a_full_disk_leaves_no_half_export(store, folder, monkeypatch):
    def fail(_handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RetrieverError, match="No space left on device"):
        export_store(store, folder / "out")
    assert not list(folder.glob("out*"))


def test_an_export_is_of_one_moment(store, folder, small_batches):
    before = contents(store)

    def disturb(done: int, total: int) -> None:
        if done == 2:
            with Store.open(store.path) as other, other.writer() as writer:
                writer.remove(other.item_ids()[:1] + other.item_ids()[-1:])
                root = writer.add_root(HOME)
                writer.write(root, [item("new.jpg", SOUTH, ("new", EAST))])

    export_store(store, folder / "out", progress=disturb)
    assert len(contents(store)) == 2
    with Store.create(folder / "copy.lib", MODEL) as copy:
        import_folder(copy, folder / "out")
        assert contents(copy) == before


# Out and in again

names = st.lists(
    st.binary(min_size=1, max_size=6)
    .filter(lambda name: not {b"/"[0], 0} & set(name) and name not in (b".", b".."))
    .map(os.fsdecode),
    min_size=1,
    max_size=3,
).map("/".join)
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
vectors = (
    st.lists(st.integers(-9, 9), min_size=DIM, max_size=DIM).filter(any).map(lambda v: unit(*v))
)
moments = st.none() | st.datetimes(datetime(1900, 1, 1), datetime(2100, 1, 1))

facts = st.fixed_dictionaries(
    {
        "facts": st.integers(0, 1),
        "extras": st.lists(
            st.tuples(texts, texts | st.floats(allow_nan=False, allow_infinity=False)), max_size=3
        ).map(tuple),
    },
    optional={
        "camera": texts,
        "perceptual_hash": st.integers(-(1 << 63), (1 << 63) - 1),
    },
) | st.builds(
    lambda latitude, longitude: {"latitude": latitude, "longitude": longitude},
    st.floats(-90, 90),
    st.floats(-180, 180),
)


@st.composite
def libraries(draw: st.DrawFn) -> dict[Path, list[Any]]:
    roots: dict[Path, list[Any]] = {}
    for root in draw(st.lists(st.sampled_from(["/a", "/b/c", "/d é"]), unique=True)):
        several = []
        for file in draw(st.lists(names, max_size=4, unique=True)):
            captions = draw(st.lists(st.tuples(texts, vectors), max_size=3))
            stamp = {"content_hash": draw(st.binary(min_size=16, max_size=16))}
            if draw(st.booleans()):
                stamp |= draw(facts)
                rows = tuple(CaptionRow(text, "sidecar") for text, _ in captions)
                several.append(failed(file, captions=rows, failure=draw(texts), **stamp))
            else:
                taken = draw(moments)
                stamp |= draw(facts)
                several.append(item(file, draw(vectors), *captions, taken=taken, **stamp))
        roots[Path(root)] = several
    return roots


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(libraries())
def test_a_library_exported_and_imported_is_equal_row_for_row_and_vector_for_vector(library):
    with scratch() as folder, store_with(folder / "from.lib", library) as store:
        report = export_store(store, folder / "out")
        with (
            Store.create(folder / "to.lib", MODEL) as copy,
            Store.create(folder / "merged.lib", MODEL) as merged,
        ):
            done = import_folder(copy, folder / "out")
            assert done == merge_store(merged, store) == ImportReport(added=report.items)
            assert contents(copy) == contents(merged) == contents(store)
            assert copy.verify() == merged.verify() == []
            again = import_folder(copy, folder / "out")
            assert again == merge_store(merged, store) == ImportReport(unchanged=report.items)
            assert contents(copy) == contents(merged) == contents(store)
            export_store(copy, folder / "out2")
            for name in ("image", "caption"):
                path = f"{name}_embeddings.npy"
                assert (folder / "out" / path).stat().st_size == (
                    folder / "out2" / path
                ).stat().st_size


def test_an_indexed_folder_is_searched_alike_in_the_copy(tiny_pairs, fresh_store, folder):
    encoder = ToyEncoder()
    index_folder(fresh_store, lambda: encoder, tiny_pairs)
    export_store(fresh_store, folder / "out")
    with Store.create(folder / "copy.lib", fresh_store.model) as copy:
        import_folder(copy, folder / "out")
        queries = encoder.encode_texts(["red", "blue and green", "nothing"])
        for kind in ("image", "caption"):
            for one, two in zip(
                fresh_store.search(kind, queries, 5), copy.search(kind, queries, 5), strict=True
            ):
                assert one.ids.tolist() == two.ids.tolist()
                assert one.scores.tolist() == two.scores.tolist()
        # The files are those that were indexed: looking at them again is no work.
        seen = encoder.images_seen
        assert index_folder(copy, lambda: encoder, tiny_pairs).unchanged == 5
        assert encoder.images_seen == seen


def test_progress_counts_every_picture(store, fresh, folder, small_batches):
    told: list[tuple[int, int]] = []
    export_store(store, folder / "out", progress=lambda *now: told.append(now))
    assert told == [(0, 3), (2, 3), (3, 3)]
    told.clear()
    import_folder(fresh, folder / "out", progress=lambda *now: told.append(now))
    assert told == [(0, 3), (2, 3), (3, 3)]


KILLED = """
import os, signal, sys
from pathlib import Path
from indexes.store import Store
from retriever import exchange, portable

exchange.BATCH_SIZE = portable.BATCH_SIZE = 2
def die(done, total):
    if done == 2:
        os.kill(os.getpid(), signal.SIGKILL)
with Store.open(Path(sys.argv[1])) as store:
    exchange.import_folder(store, Path(sys.argv[2]), progress=die)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_an_import_that_was_killed_is_completed_by_the_next(store, fresh, folder):
    export_store(store, folder / "out")
    environment = os.environ | {"PYTHONPATH": str(Path(exchange.__file__).parents[1])}
    command = [sys.executable, "-c", KILLED, str(fresh.path), str(folder / "out")]
    ended = subprocess.run(command, env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert len(contents(fresh)) == 2  # whole batches, nothing half
    assert import_folder(fresh, folder / "out") == ImportReport(added=1, unchanged=2)
    assert contents(fresh) == contents(store)
    assert fresh.verify() == []


# What is there already


def test_captions_that_are_missing_here_are_added_to_the_same_content(store, folder):
    theirs = item("a.jpg", EAST, ("again", SOUTH), ("new", EAST), ("new", EAST))
    with store_with(folder / "other.lib", {HOME: [theirs]}) as other:
        assert merge_store(store, other) == ImportReport(updated=1)
        row = store.item_by_path(HOME / "a.jpg")
        assert [one.text for one in row.captions] == ["a", "again", "new"]
        ids = store.caption_ids(row.item_id)
        np.testing.assert_array_equal(store.embeddings("caption", ids), [NORTH, SOUTH, EAST])
        assert merge_store(store, other) == ImportReport(unchanged=1)


def test_facts_and_columns_that_are_missing_here_are_added_to_the_same_content(store, folder):
    theirs = item("a.jpg", EAST, camera="Other", extras=(("stars", 1.0), ("place", "Rome")))
    with (
        store_with(folder / "other.lib", {HOME: [theirs]}) as other,
        store_with(folder / "old.lib", {HOME: [item("a.jpg", EAST, facts=0)]}) as old,
    ):
        assert merge_store(store, other) == ImportReport(updated=1)
        row = store.item_by_path(HOME / "a.jpg")
        assert row.camera == "NIKON D90"
        assert row.extras == (("place", "Rome"), ("stars", 4.0), ("tag", "sea"), ("tag", "sky"))
        assert merge_store(store, other) == ImportReport(unchanged=1)
        assert merge_store(old, other) == ImportReport(updated=1)
        row = old.item_by_path(HOME / "a.jpg")
        assert (row.camera, row.facts, row.extras) == ("Other", 1, theirs.extras[::-1])
        assert merge_store(store, old) == ImportReport(unchanged=1)


def test_an_export_of_an_older_version_leaves_facts_to_the_next_run(store, fresh, folder):
    export_store(store, folder / "out")
    names = ("camera", "latitude", "longitude", "perceptual_hash", "facts", "extras")
    for line in range(3):

        def drop(fields: dict[str, Any]) -> None:
            for name in names:
                del fields[name]

        edited(ITEMS, drop, line)(folder / "out")
    resign(folder / "out")
    assert import_folder(fresh, folder / "out").added == 3
    row = fresh.item_by_path(HOME / "a.jpg")
    assert (row.camera, row.latitude, row.extras, row.facts) == (None, None, (), 0)


def test_another_content_under_the_same_name_leaves_the_library_as_it_is(store, folder):
    before = contents(store)
    theirs = item("a.jpg", NORTH, ("new", EAST), content_hash=b"edited".ljust(16))
    with store_with(folder / "other.lib", {HOME: [theirs]}) as other:
        assert merge_store(store, other) == ImportReport(unchanged=1)
    assert contents(store) == before


def test_a_failure_there_harms_no_picture_here(store, folder):
    before = contents(store)
    with store_with(folder / "other.lib", {HOME: [failed("a.jpg")]}) as other:
        assert merge_store(store, other) == ImportReport(unchanged=1)
    assert contents(store) == before


def test_a_picture_that_failed_here_comes_from_where_it_could_be_read(store, folder):
    mended = item("d.jpg", SOUTH, ("found", EAST), content_hash=b"\1" * 16)
    with store_with(folder / "other.lib", {HOME: [mended]}) as other:
        assert merge_store(store, other) == ImportReport(updated=1)
        assert contents(store)[HOME / "d.jpg"] == contents(other)[HOME / "d.jpg"]
    assert store.failures() == []
    assert store.verify() == []


def test_what_is_only_here_stays(store, folder):
    with store_with(folder / "other.lib", {Path("/x"): [item("y.jpg", EAST)]}) as other:
        both = contents(store) | contents(other)
        assert merge_store(store, other) == ImportReport(added=1)
    assert contents(store) == both


# Merge


@pytest.mark.parametrize(
    ("here", "there"),
    [("/a", "/a/b"), ("/a/b", "/a"), ("/a", "/a"), ("/a/b", "/a/c"), ("/a/b/c", "/a")],
)
def test_roots_never_overlap_after_a_merge(folder, here, there):
    ours, theirs = item("ours.jpg", EAST, ("o", NORTH)), item("theirs.jpg", NORTH, ("t", EAST))
    with (
        store_with(folder / "one.lib", {Path(here): [ours]}) as store,
        store_with(folder / "two.lib", {Path(there): [theirs]}) as other,
    ):
        both = contents(store) | contents(other)
        assert merge_store(store, other) == ImportReport(added=1)
        assert contents(store) == both
        roots = [root for _, root in store.roots()]
        assert not [
            (one, two) for one in roots for two in roots if one != two and one.is_relative_to(two)
        ]
        assert merge_store(store, other) == ImportReport(unchanged=1)
        assert store.verify() == []


def test_a_root_around_two_takes_both_over_and_knows_their_pictures(folder):
    same = item("x.jpg", EAST)
    inner = {Path("/a/b"): [same], Path("/a/c"): [item("y.jpg", NORTH)]}
    outer = [item("b/x.jpg", EAST, ("found", SOUTH), content_hash=same.content_hash)]
    with (
        store_with(folder / "one.lib", inner) as store,
        store_with(folder / "two.lib", {Path("/a"): outer}) as other,
    ):
        assert merge_store(store, other) == ImportReport(updated=1)
        assert [root for _, root in store.roots()] == [Path("/a")]
        assert sorted(contents(store)) == [Path("/a/b/x.jpg"), Path("/a/c/y.jpg")]
        assert [one.text for one in store.item_by_path(Path("/a/b/x.jpg")).captions] == ["found"]


def test_the_other_library_is_only_read(store, fresh):
    store.close()  # which writes what SQLite still keeps beside
    before = (store.path / "catalogue.sqlite").read_bytes()
    with Store.open(store.path, read_only=True) as other:
        merge_store(fresh, other)
    assert (store.path / "catalogue.sqlite").read_bytes() == before


def test_a_library_is_not_merged_with_itself(store):
    with pytest.raises(UsageError, match="is the library itself"):
        merge_store(store, store)


def test_embeddings_of_another_model_are_refused(store, folder):
    export_store(store, folder / "out")
    with Store.create(folder / "other.lib", OTHER) as other:
        with pytest.raises(WrongModelError, match="cannot be compared"):
            merge_store(other, store)
        with pytest.raises(WrongModelError, match="cannot be compared"):
            import_folder(other, folder / "out")
        assert contents(other) == {}


def test_a_second_model_completes_what_the_first_has_brought(store, folder):
    theirs = item("a.jpg", NORTH, ("again", EAST), ("a", SOUTH), ("third", NORTH))
    with (
        store_with(folder / "two.lib", {HOME: [theirs]}, OTHER) as other,
        Store.open(store.path, OTHER, add_model=True) as seen,
    ):
        assert merge_store(seen, other) == ImportReport(updated=1)
        row = seen.item_by_path(HOME / "a.jpg")
        assert [one.text for one in row.captions] == ["a", "again", "third"]
        ids = seen.caption_ids(row.item_id)
        np.testing.assert_array_equal(seen.embeddings("image", [row.item_id]), [NORTH])
        np.testing.assert_array_equal(seen.embeddings("caption", ids), [SOUTH, EAST, NORTH])
        assert merge_store(seen, other) == ImportReport(unchanged=1)


def test_what_a_model_has_not_embedded_is_named_and_left_out(store, fresh, folder):
    with Store.open(store.path, OTHER, add_model=True) as seen:
        export_store(seen, folder / "out")
    with Store.create(folder / "two.lib", OTHER) as other:
        report = import_folder(other, folder / "out")
        assert report.added == 1  # the one that failed
        assert [(one.path.name, one.reason) for one in report.skipped] == [
            ("a.jpg", "has no embedding of other"),
            ("c.jpg", "has no embedding of other"),
        ]


# Hostile files


def resign(out: Path) -> None:
    """Has the manifest describe the files as they are now, as whoever tampers with them would."""
    manifest = json.loads((out / "manifest.json").read_bytes())
    for name, described in manifest["files"].items():
        data = (out / name).read_bytes()
        described.update(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    (out / "manifest.json").write_text(json.dumps(manifest))


def edited(name: str, change: Callable[[Any], None], line: int = 0) -> Callable[[Path], None]:
    """A change of the JSON in a line of a file."""

    def apply(out: Path) -> None:
        lines = (out / name).read_bytes().splitlines() if name == "items.ndjson" else [b""]
        if name != "items.ndjson":
            lines = [(out / name).read_bytes()]
        fields = json.loads(lines[line])
        change(fields)
        lines[line] = json.dumps(fields).encode()
        (out / name).write_bytes(b"\n".join(lines) + b"\n")

    return apply


def field(name: str, value: Any, line: int = 0) -> Callable[[Path], None]:
    return edited("items.ndjson", lambda fields: fields.update({name: value}), line)


def rows(array: Any, **options: Any) -> Callable[[Path], None]:
    return lambda out: np.save(out / "image_embeddings.npy", array, **options)


def raw(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda out: (out / name).write_bytes(change((out / name).read_bytes())) and None


def header(text: str) -> Callable[[Path], None]:
    """An npy file with this header, and too little behind it."""
    data = b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text.encode("latin-1")
    return raw("image_embeddings.npy", lambda _: data + b"\0" * 16)


IMAGES, ITEMS = "image_embeddings.npy", "items.ndjson"
NAN = np.array([[np.nan, 0, 0, 0], NORTH], dtype=np.float16)
TAMPERED: list[tuple[str, Callable[[Path], None], str]] = [
    ("line cut", raw(ITEMS, lambda data: data[:-20]), "line 3: not valid JSON"),
    ("line missing", raw(ITEMS, lambda data: data[: data.rindex(b"\n", 0, -1) + 1]), "2 items"),
    (
        "line twice",
        raw(ITEMS, lambda data: data + data[: data.index(b"\n") + 1]),
        "line 4: .*earli",
    ),
    ("no object", raw(ITEMS, lambda data: b"[1]\n" + data), "line 1: not a JSON object"),
    ("deep", raw(ITEMS, lambda data: b"[" * 200_000 + b"\n" + data), "line 1: not valid JSON"),
    ("no text", raw(ITEMS, lambda data: b"\xff\xfe\n" + data), "line 1: not valid JSON"),
    ("dots", field("file", "../../etc/shadow"), "line 1: 'file' is not a path below the root"),
    ("dot", field("file", "./a.jpg"), "line 1: 'file' is not a path below"),
    ("absolute", field("file", "/etc/shadow"), "line 1: 'file' is not a path below"),
    ("empty name", field("file", ""), "line 1: 'file' is not a path below"),
    ("NUL", field("file", "a\0.jpg"), "line 1: 'file' is not a path"),
    ("no name", field("file", "\ud800"), "line 1: 'file' is not a path"),
    ("number as name", field("file", 3), "line 1: 'file' is not a path"),
    ("relative root", field("root", "pictures"), "line 1: 'root' is not an absolute path"),
    ("root with dots", field("root", "/a/../b"), "line 1: 'root' is not an absolute path"),
    ("root of all", field("root", "/"), "line 1: 'root' is not an absolute path"),
    ("negative size", field("size", -1), "line 1: 'size' is not a whole number"),
    ("huge size", field("size", 1 << 63), "line 1: 'size' is not a whole number"),
    ("size as text", field("size", "10"), "line 1: 'size' is not a whole number"),
    ("true as size", field("size", True), "line 1: 'size' is not a whole number"),
    ("huge width", field("width", 1 << 31), "line 1: 'width' is not a whole number"),
    ("no hash", field("content_hash", "xyz"), "line 1: 'content_hash' is not a hex"),
    ("no date", field("taken", "yesterday"), "line 1: 'taken' is not a date"),
    ("camera", field("camera", 90), "line 1: 'camera' is not a text"),
    ("north of the pole", field("latitude", 90.5), "line 1: 'latitude' is not a number from -90"),
    ("half a place", field("longitude", None), "line 1: 'longitude' is not a number"),
    ("true north", field("latitude", True), "line 1: 'latitude' is not a number"),
    ("long hash", field("perceptual_hash", 1 << 63), "line 1: 'perceptual_hash' is not a whole"),
    ("fact", field("facts", "all"), "line 1: 'facts' is not a whole number"),
    ("columns", field("extras", {"stars": 4}), "line 1: 'extras' is not a list"),
    ("column", field("extras", [["stars"]]), "line 1: 'extras' has something other"),
    ("column of none", field("extras", [["stars", None]]), "line 1, extras: 'value' is not a num"),
    ("column of much", field("extras", [["stars", 10**400]]), "line 1, extras: 'value' is not"),
    ("column of NaN", field("extras", [["stars", math.nan]]), "line 1, extras: 'value' is not"),
    ("column of a number", field("extras", [[4, "x"]]), "line 1, extras: 'name' is not a text"),
    ("status", field("status", "fine"), "line 1: 'status' is none of ok, failed"),
    ("status list", field("status", []), "line 1: 'status' is none of ok, failed"),
    ("failed with row", field("status", "failed"), "line 1: it failed and yet has embeddings"),
    ("no reason", field("reason", None, line=2), "line 3: 'reason' is not a text"),
    ("captions", field("captions", "a dog"), "line 1: 'captions' is not a list"),
    ("caption", field("captions", ["a dog"]), "line 1, captions: not a JSON object"),
    (
        "caption without text",
        field("captions", [{"text": None, "source": "x", "embedding": 0}]),
        "line 1, captions: 'text' is not a text",
    ),
    (
        "caption of surrogates",
        field("captions", [{"text": "\udcff", "source": "x", "embedding": 0}]),
        "line 1, captions: 'text' is not a text",
    ),
    ("key missing", edited(ITEMS, lambda one: one.pop("width")), "line 1: 'width' is missing"),
    ("row beyond", field("embedding", 2), "line 1: image_embeddings.npy has no row 2"),
    ("row below", field("embedding", -1), "line 1: 'embedding' is not a whole number"),
    ("row twice", field("embedding", 1), "line 2: row 1 of image_embeddings.npy is used already"),
    ("row unused", field("embedding", None), "row 0 belongs to no line of items.ndjson"),
    ("NaN", rows(NAN), "image_embeddings.npy: row 0 has length nan, not 1"),
    ("half", rows(np.array([EAST, NORTH / 2], "<f2")), "row 1 has length 0.5, not 1"),
    ("infinite", rows(np.full((2, DIM), 1e300)), "row 0 has length inf, not 1"),
    ("three columns", rows(np.eye(2, 3)), "embeddings of 3 dimensions, and the library of 4"),
    ("flat", rows(np.ones(8)), r"holds float64 \(8,\), not embeddings"),
    ("integers", rows(np.eye(2, DIM, dtype=np.int8)), "holds int8"),
    ("text", rows(np.array([["a"] * DIM])), "holds <U1"),
    ("pickle", rows(np.array([[{}] * DIM] * 2, object), allow_pickle=True), "holds object"),
    ("zip", raw(IMAGES, lambda data: b"PK\3\4" + data), "not a NumPy file"),
    ("empty file", raw(IMAGES, lambda _: b""), "not a NumPy file"),
    ("cut", raw(IMAGES, lambda data: data[:-1]), "too few or too many for its 2 rows"),
    ("longer", raw(IMAGES, lambda data: data + b"\0"), "too few or too many for its 2 rows"),
    (
        "huge claim",
        header(str({"descr": "<f2", "fortran_order": False, "shape": (1 << 60, DIM)})),
        "too few or too many",
    ),
    (
        "negative claim",
        header(str({"descr": "<f2", "fortran_order": False, "shape": (-1, DIM)})),
        "not embeddings",
    ),
    ("code", header("__import__('os').abort()"), "not a NumPy file"),
    ("deep header", header("(" * 9000), "not a NumPy file"),
    ("no text header", header("\xff\xfe\0'"), "not a NumPy file"),
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    with sample(folder / "photos.lib") as store:
        export_store(store, folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def untouched() -> Iterator[Store]:
    """A library that nothing has ever been written to."""
    with scratch() as folder, Store.create(folder / "fresh.lib", MODEL) as store:
        yield store


@pytest.mark.filterwarnings("ignore:Reading `.npy`:UserWarning")
@pytest.mark.parametrize(
    ("tamper", "words"), [one[1:] for one in TAMPERED], ids=[one[0] for one in TAMPERED]
)
def test_a_tampered_export_is_refused_in_a_sentence_and_nothing_is_written(
    exported, untouched, folder, tamper, words
):
    shutil.copytree(exported, folder / "out")
    tamper(folder / "out")
    resign(folder / "out")
    with pytest.raises((RetrieverError, WrongModelError), match=words):
        import_folder(untouched, folder / "out")
    assert contents(untouched) == {}
    assert untouched.roots() == []


def manifest(**changes: Any) -> Callable[[Path], None]:
    return edited("manifest.json", lambda fields: fields.update(changes))


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (lambda out: (out / "manifest.json").unlink(), UsageError, "holds no export"),
        (raw("manifest.json", lambda data: data[:-9]), RetrieverError, "manifest.json: not valid"),
        (raw("manifest.json", lambda data: data + b" " * (1 << 20)), RetrieverError, "too large"),
        (manifest(format="something"), UsageError, "not the manifest of an export"),
        (manifest(version=2), RetrieverError, "newer version"),
        (manifest(version="1"), RetrieverError, "'version' is not a whole number"),
        (manifest(model=None), RetrieverError, "manifest.json, model: not a JSON object"),
        (manifest(counts={"items": 3}), RetrieverError, "counts: 'captions' is missing"),
        (
            manifest(counts={"items": 9**9, "captions": 2}),
            RetrieverError,
            "3 items, .* 387,420,489",
        ),
        (manifest(files={}), RetrieverError, "files: 'items.ndjson' is missing"),
        (
            lambda out: (out / IMAGES).unlink(),
            RetrieverError,
            "image_embeddings.npy cannot be read",
        ),
        (raw(ITEMS, lambda data: data + b"\n"), RetrieverError, "copy it again"),
        (raw(ITEMS, lambda data: data.replace(b"a.jpg", b"b.jpg")), RetrieverError, "checksum"),
        (raw(IMAGES, lambda data: data[:-1] + b"\1"), RetrieverError, "another checksum"),
    ],
)
def test_a_damaged_export_is_refused_in_a_sentence(
    exported, untouched, folder, damage, error, words
):
    shutil.copytree(exported, folder / "out")
    damage(folder / "out")
    with pytest.raises(error, match=words):
        import_folder(untouched, folder / "out")
    assert contents(untouched) == {}


def test_the_model_of_an_export_is_known_before_it_is_imported(exported, tmp_path):
    assert exported_model(exported) == "toy"
    assert exported_model(tmp_path) is None


@pytest.fixture(scope="module")
def target() -> Iterator[Store]:
    with scratch() as folder, Store.create(folder / "to.lib", MODEL) as store:
        yield store


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_no_change_of_bytes_ends_in_anything_but_a_sentence(exported, target, data):
    name = data.draw(st.sampled_from([ITEMS, IMAGES, "manifest.json"]))
    with scratch() as folder:
        out = shutil.copytree(exported, folder / "out")
        content = bytearray((out / name).read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        (out / name).write_bytes(content)
        before = contents(target)
        try:
            if name != "manifest.json":
                resign(out)
            import_folder(target, out)
        except (RetrieverError, WrongModelError):
            assert contents(target) == before
        assert target.verify() == []


def test_rows_of_another_width_and_order_that_numpy_may_save_are_read(store, fresh, folder):
    export_store(store, folder / "out")
    np.save(folder / "out" / IMAGES, np.asfortranarray([EAST, NORTH]).astype(">f4"))
    resign(folder / "out")
    import_folder(fresh, folder / "out")
    assert contents(fresh) == contents(store)
