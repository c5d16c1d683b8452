"""Near-duplicates: what is put together, what is not, and the quick way beside the plain one."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from conftest import paint
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from test_benchmarks import run_benchmark, run_script
from test_cli import lines, run

from indexes.records import ItemRow, ItemWrite, ModelSpec
from indexes.store import Store
from retriever import duplicates
from retriever.duplicates import BITS, MAX_BITS, MIN_COSINE, collapse, differing, find

EAST, NORTH = np.eye(2, dtype=np.float32)
NEAR_EAST = np.array([0.999, np.sqrt(1 - 0.999**2)], np.float32)

hashes = arrays(np.uint64, st.integers(0, 40), elements=st.integers(0, 2**64 - 1))


def item(
    number: int, content: bytes | None = None, hash_: int | None = None, side: int = 10
) -> ItemRow:
    root = Path("/p")
    return ItemRow(
        item_id=number,
        path=root / f"{number}.png",
        root=root,
        file=f"{number}.png",
        size=100,
        mtime_ns=0,
        content_hash=content,
        width=side,
        height=side,
        taken=None,
        status="ok",
        reason=None,
        captions=(),
        perceptual_hash=hash_,
    )


def plain_groups(bits: np.ndarray, rows: np.ndarray) -> list[list[int]]:
    """Each picture beside each leader, one after the other."""
    kept: list[list[int]] = []
    for at in range(len(bits)):
        for group in kept:
            first = group[0]
            is_near = int(bits[at] ^ bits[first]).bit_count() <= MAX_BITS
            if is_near and rows[at] @ rows[first] >= MIN_COSINE:
                group.append(at)
                break
        else:
            kept.append([at])
    return kept


# ── which pictures are near-duplicates ───────────────────────────────────────────────────────────


def test_pictures_alike_in_hash_and_embedding_collapse_into_the_first() -> None:
    items = [item(7, b"a", 0b1111), item(8, b"b", -1), item(9, b"c", 0b1110)]
    assert collapse(items, np.stack([EAST, EAST, NEAR_EAST])) == [[0, 2], [1]]


@pytest.mark.parametrize(
    ("other_hash", "other_row"),
    [
        pytest.param(-1, EAST, id="another hash"),
        pytest.param(0, NORTH, id="another embedding"),
        pytest.param(None, EAST, id="no hash"),
    ],
)
def test_one_likeness_alone_is_not_enough(other_hash: int | None, other_row: np.ndarray) -> None:
    items = [item(1, b"a", 0), item(2, b"b", other_hash)]
    assert collapse(items, np.stack([EAST, other_row])) == [[0], [1]]


def test_files_with_the_same_contents_are_duplicates_whatever_else_is_known() -> None:
    items = [item(1, b"a"), item(2, b"b", 0), item(3, b"a", 0)]
    assert collapse(items, np.stack([EAST, NORTH, EAST])) == [[0, 2], [1]]


def test_pictures_of_unknown_content_are_no_copies_of_each_other() -> None:
    assert collapse([item(1), item(2)], np.stack([EAST, EAST])) == [[0], [1]]


def test_as_many_bits_as_allowed_may_differ_and_not_one_more() -> None:
    some, more = (1 << MAX_BITS) - 1, (1 << MAX_BITS + 1) - 1
    items = [item(1, b"a", 0), item(2, b"b", some), item(3, b"c", more)]
    rows = np.stack([EAST] * 3)
    assert collapse(items[:2], rows[:2]) == [[0, 1]]
    assert collapse(items[::2], rows[:2]) == [[0], [1]]


def test_the_sign_of_a_hash_is_its_highest_bit() -> None:
    items = [item(1, b"a", 1), item(2, b"b", 1 - (1 << BITS - 1))]
    assert collapse(items, np.stack([EAST, EAST])) == [[0, 1]]


def test_no_chain_leads_from_a_picture_to_one_unlike_it() -> None:
    step = MAX_BITS - 2
    chain = [item(n, bytes([n]), (1 << n * step) - 1) for n in range(5)]
    rows = np.stack([EAST] * 5)
    assert collapse(chain, rows) == [[0, 1], [2, 3], [4]]


def test_nothing_collapses_to_nothing() -> None:
    assert collapse([], np.empty((0, 2), np.float32)) == []


# ── the quick way ────────────────────────────────────────────────────────────────────────────────


@given(hashes, hashes)
def test_differing_bits_are_counted_as_python_counts_them(
    ones: np.ndarray, others: np.ndarray
) -> None:
    n = min(len(ones), len(others))
    counted = differing(ones[:n], others[:n]).tolist()
    pairs = zip(ones[:n].tolist(), others[:n].tolist(), strict=True)
    assert counted == [(one ^ other).bit_count() for one, other in pairs]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 60), st.sampled_from([1, 7, 512]))
def test_buckets_find_the_groups_that_comparing_each_with_each_finds(
    seed: int, n: int, block: int
) -> None:
    rng = np.random.default_rng(seed)
    centres = rng.integers(0, 2**64, size=4, dtype=np.uint64)
    flips = rng.random((n, BITS)) < rng.choice([0.02, 0.08, 0.15], size=(n, 1))
    noise = np.packbits(flips, axis=1).view(np.uint64).ravel()
    bits = centres[rng.integers(0, 4, n)] ^ noise
    rows = rng.normal([3, 0], 0.7, size=(n, 2)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    items = [item(at, bytes([at]), int(bits[at].view(np.int64))) for at in range(n)]
    expected = plain_groups(bits, rows)
    with pytest.MonkeyPatch.context() as patch:
        assert collapse(items, rows) == expected  # few: each with each
        patch.setattr(duplicates, "FEW", 0)
        patch.setattr(duplicates, "BLOCK", block)
        assert collapse(items, rows) == expected
        patch.setattr(duplicates, "MAX_PAIRS", 1)
        assert collapse(items, rows) == expected


def test_many_pictures_with_one_hash_are_told_apart_by_their_embeddings() -> None:
    n = 1200
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(n, 32)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows[1::2] = rows[::2]
    items = [item(at, at.to_bytes(2), 0) for at in range(n)]
    assert collapse(items, rows) == [[at, at + 1] for at in range(0, n, 2)]


# ── of a library ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.create(tmp_path / "photos.lib", ModelSpec("toy", 2, "toy-1")) as made:
        yield made


def write(
    file: str, row: np.ndarray, content: bytes, hash_: int | None, side: int = 10
) -> ItemWrite:
    return ItemWrite(
        file, 10 * side, 1, content, side, side, image_embedding=row, perceptual_hash=hash_
    )


def fill(store: Store, *writes: ItemWrite) -> None:
    with store.writer() as writer:
        writer.write(writer.add_root(Path("/photos").absolute()), list(writes))
        writer.finish()


def files(store: Store, **options: bool) -> list[list[str]]:
    return [[one.item.file for one in group] for group in find(store, **options).groups]


def test_the_largest_of_a_group_comes_first_then_what_resembles_it_most(store: Store) -> None:
    fill(
        store,
        write("other.png", NORTH, b"o", 0),
        write("small.png", NEAR_EAST, b"s", 0),
        write("large.png", EAST, b"l", 1, side=40),
        write("tiny.png", EAST, b"t", 3, side=5),
        write("tiny again.png", EAST, b"t", 3, side=5),
    )
    found = find(store)
    assert files(store) == [["large.png", "tiny.png", "tiny again.png", "small.png"]]
    (group,) = found.groups
    assert [one.similarity for one in group] == pytest.approx([1, 1, 1, 0.999], abs=1e-3)
    assert not any(one.is_copy for one in group[1:])
    assert (found.spare, found.spare_bytes, found.unhashed) == (3, 200, 0)


def test_copies_are_called_so_and_can_be_asked_for_alone(store: Store) -> None:
    fill(
        store,
        write("b.png", EAST, b"same", None),
        write("a.png", EAST, b"same", None),
        write("c.png", EAST, b"other", None),
    )
    found = find(store)
    assert files(store) == files(store, copies=True) == [["b.png", "a.png"]]
    assert [one.is_copy for one in found.groups[0]] == [True, True]
    assert found.unhashed == 3
    assert find(store, copies=True).unhashed == 0


def test_pictures_that_failed_or_were_not_embedded_by_this_model_are_no_near_duplicates(
    store: Store,
) -> None:
    fill(
        store,
        write("a.png", EAST, b"a", 0),
        replace(write("bad.png", EAST, b"b", 0), image_embedding=None, failure="it is cut off"),
    )
    other = ModelSpec("other", 2, "other-1")
    with Store.open(store.path, other, add_model=True) as same:
        fill(same, write("c.png", EAST, b"c", 0))
        assert files(same) == []
    assert files(store) == []


def test_progress_tells_how_many_pictures_were_compared(store: Store) -> None:
    fill(store, write("a.png", EAST, b"a", 0), write("b.png", NORTH, b"b", -1))
    told: list[tuple[int, int]] = []
    find(store, progress=lambda *at: told.append(at))
    assert told == [(2, 2)]


# ── the command ──────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library of one photograph in three sizes and formats, a copy, and another photograph."""
    folder = tmp_path_factory.mktemp("photos")
    package = find_spec("skimage")
    if package is None or package.origin is None:
        pytest.skip("the photographs are scikit-image's")
    for name in ("chelsea", "coffee"):
        with Image.open(Path(package.origin).parent / "data" / f"{name}.png") as image:
            picture = image.convert("RGB").resize((384, 256))
        picture.save(folder / f"{name}.png")
        if name == "chelsea":
            picture.save(folder / "chelsea.jpg", quality=80)
            picture.resize((192, 128)).save(folder / "chelsea small.jpg")
            shutil.copy(folder / "chelsea.png", folder / "chelsea copy.png")
    path = folder.with_suffix(".lib")
    assert run("index", folder, library=path).exit_code == 0
    return path


def test_duplicates_lists_groups_and_leaves_every_file_where_it_is(library: Path) -> None:
    result = run("duplicates", library=library)
    assert result.exit_code == 0, result.output
    first, *rest = result.stdout.splitlines()
    assert first == "Group 1"
    assert [line.split("/")[-1] for line in rest[:-1]] == [
        "chelsea copy.png",
        "chelsea.png",
        "chelsea.jpg",
        "chelsea small.jpg",
    ]
    assert "384 x 256" in rest[0]
    assert "   copy  " in rest[1]
    assert rest[-1].startswith("Groups: 1. Besides the first of each: 3 pictures, ")
    assert rest[-1].endswith("Nothing was deleted.")
    assert len(list(library.with_suffix("").iterdir())) == 5


def test_duplicates_as_json_has_a_line_for_each_group(library: Path) -> None:
    (record,) = lines(run("duplicates", "--json", library=library))
    assert record["group"] == 1
    first, copy, *near = record["pictures"]
    assert set(first) == {
        *("path", "id", "width", "height", "size_bytes", "similarity", "is_copy"),
    }
    assert (first["width"], first["height"]) == (384, 256)
    assert (copy["is_copy"], copy["similarity"]) == (True, 1.0)
    assert [one["is_copy"] for one in near] == [False, False]
    assert all(MIN_COSINE <= one["similarity"] <= 1 for one in near)
    (copies,) = lines(run("duplicates", "--copies", "--json", library=library))
    assert len(copies["pictures"]) == 2


def test_duplicates_of_a_library_without_any_says_so(tmp_path: Path) -> None:
    paint(tmp_path / "p/red.png", "red")
    path = tmp_path / "one.lib"
    assert run("index", tmp_path / "p", library=path).exit_code == 0
    result = run("duplicates", library=path)
    assert result.stdout.startswith("No duplicates in ")
    assert lines(run("duplicates", "--json", library=path)) == []


# ── the benchmark ────────────────────────────────────────────────────────────────────────────────


def test_the_benchmark_in_small_form(library: Path, tmp_path: Path) -> None:
    record = run_benchmark("duplicates", library.with_suffix(""), "--altered", 2, folder=tmp_path)
    altered = {one["alteration"]: one for one in record["numbers"]["altered"]}
    assert altered["JPEG, quality 30"]["hash"] == 1
    assert altered["mirrored"]["hash"] == 0
    for one in altered.values():
        assert 0 <= one["both"] <= min(one["hash"], one["embedding"])
    pairs = record["numbers"]["pairs"]
    # The cat in four files has six pairs.
    assert pairs["both"] == pairs["hash"] == 6
    assert record["data"]["pictures"] == 5


def test_the_benchmark_without_the_data_is_no_failure(tmp_path: Path) -> None:
    done = run_script("duplicates", tmp_path / "nowhere")
    assert "nowhere is not here" in done.stderr
