"""VectorIndex against a full sort, and its file against everything that may happen to a file."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import faiss
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from indexes import vectors
from indexes.records import FileStamp, Match
from indexes.vectors import IndexFileError, VectorIndex, merge

DIM = 16


def unit_rows(count: int, seed: int, dim: int = DIM) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def make(rows: np.ndarray, ids: np.ndarray | None = None) -> VectorIndex:
    ids = np.arange(len(rows), dtype=np.int64) if ids is None else ids
    return VectorIndex.build(rows.shape[1], [(ids, rows.astype(np.float16))])


def full_sort(
    rows: np.ndarray, ids: np.ndarray, query: np.ndarray, k: int
) -> tuple[list[int], list[float]]:
    """The obvious way: every score, sorted by score and then by id."""
    stored = rows.astype(np.float16).astype(np.float64)
    scores = (stored * query.astype(np.float64)).sum(axis=1).astype(np.float32)
    order = sorted(range(len(ids)), key=lambda row: (-scores[row], ids[row]))[:k]
    return [int(ids[row]) for row in order], [float(scores[row]) for row in order]


def as_lists(match: Match) -> tuple[list[int], list[float]]:
    return match.ids.tolist(), match.scores.tolist()


def test_hand_worked_order_and_scores():
    rows = np.array([[1, 0], [0, 1], [-1, 0], [0.6, 0.8]], dtype=np.float32)
    index = make(rows, np.array([10, 20, 30, 40]))
    [match] = index.search(np.array([[0, 1]], dtype=np.float32), 3)
    assert match.ids.tolist() == [20, 40, 10]
    # 0.8 as float16 is 0.7998046875
    assert match.scores.tolist() == [1.0, 0.7998046875, 0.0]


@pytest.mark.parametrize("count", [0, 1, 5, 400])
def test_more_wanted_than_there_are_gives_all_and_no_placeholder(count):
    index = make(unit_rows(count, 1))
    for match in index.search(unit_rows(3, 2), 500):
        assert sorted(match.ids.tolist()) == list(range(count))


def test_batches_become_what_faiss_makes_of_their_numbers():
    rows, ids = unit_rows(50, 1).astype(np.float16), np.arange(50) * 7
    parts = [(ids[:0], rows[:0]), (ids[:20], rows[:20]), (ids[20:], rows[20:])]
    plain = faiss.IndexIDMap(
        faiss.IndexScalarQuantizer(DIM, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    )
    plain.add_with_ids(rows.astype(np.float32), ids)
    made = VectorIndex.build(DIM, parts)
    assert np.array_equal(faiss.serialize_index(made._keyed), faiss.serialize_index(plain))


def test_ids_that_do_not_ascend_are_our_mistake():
    with pytest.raises(AssertionError):
        make(unit_rows(2, 1), np.array([2, 1]))


# Each way to find candidates, in one thread and in several, in blocks that do not come out even.
SPLIT = {"THREADS": 3, "PART": 1}
WAYS = {
    "scanned": {"BATCH": 99},
    "scanned in parts": {"BATCH": 99, **SPLIT},
    "rounded": {"BATCH": 99, "ROUND_AFTER": 0},
    "rounded in parts": {"BATCH": 99, "ROUND_AFTER": 0, **SPLIT},
    "multiplied": {"BATCH": 1},
    "multiplied in parts": {"BATCH": 1, "ROWS": 7, "QUERIES": 2, **SPLIT},
}


@contextmanager
def found_by(way: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vectors, "SMALL", 20)
        for name, value in WAYS[way].items():
            patch.setattr(vectors, name, value)
        yield


@pytest.mark.parametrize("k", [1, 7, 250, 599, 601])
@pytest.mark.parametrize("way", WAYS)
def test_equal_vectors_are_ordered_by_id_even_when_more_than_faiss_fetched(k, way):
    rows = unit_rows(1500, 3)
    rows[200:800] = rows[200]
    ids = np.arange(1500) * 3 + 1
    queries = np.stack([rows[200], unit_rows(1, 4)[0]])
    with found_by(way):
        found = make(rows, ids).search(queries, k)
    for query, match in zip(queries, found, strict=True):
        assert as_lists(match) == full_sort(rows, ids, query, k)


@settings(max_examples=120, deadline=None)
@given(
    way=st.sampled_from(sorted(WAYS)),
    count=st.integers(0, 700),
    k=st.integers(1, 40),
    share=st.sampled_from([0.0, 0.01, 0.5, 0.99, 1.0]),
    levels=st.sampled_from([1, 2, 1000]),
    seed=st.integers(0, 10_000),
)
def test_search_agrees_with_a_full_sort(way, count, k, share, levels, seed):
    """`levels` of 1 or 2 make many exact ties; `share` of the rows may be returned."""
    generator = np.random.default_rng(seed)
    rows = np.round(generator.standard_normal((count, DIM)) * levels) + 0.5
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    ids = np.cumsum(generator.integers(1, 5, count)).astype(np.int64)
    allowed = generator.random(count) < share
    queries = unit_rows(3, seed + 1)
    index = make(rows, ids)
    with found_by(way):
        some, every = index.search(queries, k, allowed=allowed), index.search(queries, k)
    for query, match in zip(queries, some, strict=True):
        assert as_lists(match) == full_sort(rows[allowed], ids[allowed], query, k)
    for query, match in zip(queries, every, strict=True):
        assert as_lists(match) == full_sort(rows, ids, query, k)


def test_a_score_depends_on_neither_the_batch_nor_the_way_it_was_found(monkeypatch):
    index, queries = make(unit_rows(2000, 5)), unit_rows(40, 6)
    together = index.search(queries, 5)
    one_by_one = [index.search(query[None], 5)[0] for query in queries]
    for way in WAYS:
        with found_by(way):
            found = index.search(queries, 5)
        assert list(map(as_lists, together)) == list(map(as_lists, found))
    monkeypatch.setattr(vectors, "SMALL", 10_000)
    without_faiss = index.search(queries, 5)
    assert list(map(as_lists, together)) == list(map(as_lists, one_by_one))
    assert list(map(as_lists, together)) == list(map(as_lists, without_faiss))


def test_a_rounded_copy_settles_most_queries_and_is_made_for_who_asks_often():
    rows, queries = unit_rows(5000, 5, 64), unit_rows(100, 6, 64)
    index = make(rows)
    found = [index.search(query[None], 10)[0] for query in queries]
    expected = [full_sort(rows, index.ids, query, 10) for query in queries]
    assert list(map(as_lists, found)) == expected
    copy = index._rounded
    assert copy is not None
    assert copy.is_worth_it
    assert copy._asked == len(queries) - vectors.ROUND_AFTER + 1
    assert copy._settled > 0.9 * copy._asked


def test_vectors_that_rounding_makes_one_are_told_apart(monkeypatch):
    monkeypatch.setattr(vectors, "ROUND_AFTER", 0)
    rows = unit_rows(600, 5, 64)
    rows[:500] = rows[0] + np.random.default_rng(1).standard_normal((500, 64)) * 1e-3
    settled = 0
    for query in rows[:20]:
        index = make(rows)  # whose copy was not given up yet
        [found] = index.search(query[None], 1)
        assert as_lists(found) == full_sort(rows, index.ids, query, 1)
        assert index._rounded is not None
        settled += index._rounded._settled
    assert settled < 20


def test_what_rounding_takes_from_a_query_is_reckoned_with():
    rows = np.random.default_rng(1).choice([-1, 1], (3000, 64)).astype(np.float32) / 8
    index = make(rows)  # of which rounding takes nothing
    query = np.full(64, 0.49 / 127, dtype=np.float32)  # below half a step
    query[0] = 1.0
    query /= np.linalg.norm(query)
    for _ in range(vectors.ROUND_AFTER + 3):
        [found] = index.search(query[None], 5)
        assert as_lists(found) == full_sort(rows, index.ids, query, 5)
    assert index._rounded is not None


def test_a_rounded_copy_that_settles_nothing_is_given_up(monkeypatch):
    monkeypatch.setattr(vectors, "ROUND_AFTER", 5)
    rows, queries = unit_rows(2000, 5, 64), unit_rows(30, 6, 64)
    rows[:, 1:] *= 1e-2  # what is left of the steps tells nothing apart
    index = make(rows)
    for query in queries:
        [found] = index.search(query[None], 10)
        assert as_lists(found) == full_sort(rows, index.ids, query, 10)
    assert index._rounded is not None
    assert not index._rounded.is_worth_it
    assert index._rounded._asked == 5


def test_allowed_rows_that_all_lie_in_one_part_are_found():
    rows, queries = unit_rows(3000, 5), unit_rows(9, 6)
    for start in (0, 1400, 2900):
        allowed = np.zeros(3000, dtype=np.bool_)
        allowed[start : start + 60] = True
        expected = [
            full_sort(rows[allowed], np.flatnonzero(allowed), query, 7) for query in queries
        ]
        for way in WAYS:
            with found_by(way):
                found = make(rows).search(queries, 7, allowed=allowed)
            assert list(map(as_lists, found)) == expected


def test_many_queries_never_have_all_their_scores_in_memory_at_once():
    index, queries = make(unit_rows(20_000, 5)), unit_rows(3000, 6)
    index.search(queries[:100], 5)
    tracemalloc.start()
    try:
        index.search(queries, 5)
        assert tracemalloc.get_traced_memory()[1] < 50e6 < len(queries) * len(index)
    finally:
        tracemalloc.stop()


def test_every_finite_float16_is_decoded_exactly():
    codes = np.arange(65_536, dtype=np.uint16).view(np.float16)
    codes = codes[np.isfinite(codes)][None]
    rows = vectors._decode(codes, np.empty(codes.shape, dtype=np.float32))
    assert np.array_equal(rows.view(np.int32), codes.astype(np.float32).view(np.int32))


def test_vectors_that_are_no_numbers_are_given_as_such():
    rows = unit_rows(5, 1)
    rows[1, 2], rows[3, 4], rows[4, 0] = np.inf, np.nan, -np.inf
    index = make(rows)
    assert np.array_equal(index.vectors(np.arange(5)), rows.astype(np.float16), equal_nan=True)
    assert np.array_equal(index.vectors(np.array([2, 0])), rows[[2, 0]].astype(np.float16))


@pytest.mark.parametrize("way", WAYS)
def test_a_damaged_vector_that_is_no_number_is_passed_by(way):
    rows, queries = unit_rows(400, 1), unit_rows(9, 2)
    sound = np.ones(400, dtype=np.bool_)
    sound[[3, 200, 399]] = False
    rows[~sound, 5] = np.nan
    with found_by(way):
        found = make(rows).search(queries, 10)
    assert list(map(as_lists, found)) == [
        full_sort(rows[sound], np.flatnonzero(sound), query, 10) for query in queries
    ]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_of_a_process_that_searched_in_threads_searches_too():
    script = """
import os, signal, numpy as np
from indexes import vectors
vectors.THREADS, vectors.PART, vectors.SMALL = 2, 1, 0
rows = np.eye(64, dtype=np.float16)
index = vectors.VectorIndex.build(64, [(np.arange(64), rows)])
query = rows[40:41].astype(np.float32)
assert index.search(query, 1)[0].ids.tolist() == [40]
child = os.fork()
if not child:
    signal.alarm(30)
    os._exit(index.search(query, 1)[0].ids.tolist() != [40])
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    argv = [sys.executable, "-W", "ignore", "-c", script]
    subprocess.run(argv, check=True, cwd=Path(__file__).parents[1], timeout=60)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1, 10, 300])
def test_candidates_from_a_gpu_give_the_same_answers(k, monkeypatch):
    rows, queries = unit_rows(20_000, 5, 64), unit_rows(40, 6, 64)
    rows[5000:5100] = rows[5000]
    queries[0] = rows[5000]
    expected = make(rows).search(queries, k)
    monkeypatch.setattr(vectors, "GPU_AFTER", 0)
    index = make(rows)
    found = index.search(queries, k)
    assert index._copies, "no GPU, or a FAISS without them"
    assert list(map(as_lists, found)) == list(map(as_lists, expected))
    allowed = np.arange(20_000) % 3 == 0
    found = index.search(queries, k, allowed=allowed)
    expected = make(rows).search(queries, k, allowed=allowed)
    assert list(map(as_lists, found)) == list(map(as_lists, expected))


def test_merge_keeps_the_order_over_parts():
    first = Match(np.array([5, 9]), np.array([0.5, 0.25], dtype=np.float32))
    second = Match(np.array([2, 7]), np.array([0.5, 0.375], dtype=np.float32))
    assert merge([first, second], 3).ids.tolist() == [2, 5, 7]


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, FileStamp]:
    path = tmp_path / os.fsdecode(b"na\xffme.faiss")
    return path, make(unit_rows(1000, 7), np.arange(1000) * 2).save(path)


def load(saved: tuple[Path, FileStamp]) -> VectorIndex:
    return VectorIndex.load(saved[0], dim=DIM, rows=1000, stamp=saved[1])


def as_recorded(content: bytes) -> tuple[bytes, FileStamp]:
    """A file with that content and its checksums, worked out by hand, and its stamp."""
    blocks = [content[start : start + 65_536] for start in range(0, len(content), 65_536)]
    sums = b"".join(xxhash.xxh3_64_intdigest(block).to_bytes(8, "little") for block in blocks)
    return content + sums, FileStamp(len(content + sums), xxhash.xxh3_128_hexdigest(sums))


@pytest.mark.parametrize("count", [0, 1, 1635, 1636, 3273, 5000])
def test_a_file_is_what_faiss_wrote_and_a_checksum_of_each_block(tmp_path, count):
    """1635 rows of 16-d and ids, with what FAISS says of them, fill one block and 1636 do not."""
    rows = unit_rows(count, 1)
    content = faiss.serialize_index(make(rows)._keyed).tobytes()
    stamp = make(rows).save(tmp_path / "index")
    assert ((tmp_path / "index").read_bytes(), stamp) == as_recorded(content)
    index = VectorIndex.load(tmp_path / "index", dim=DIM, rows=count, stamp=stamp)
    index.check()
    assert np.array_equal(index.vectors(np.arange(count)), rows.astype(np.float16))


@pytest.mark.parametrize("size", [0, 1, 60, 100, 4096, 40_000])
def test_a_truncated_file_is_refused(saved, size):
    os.truncate(saved[0], size)
    with pytest.raises(IndexFileError, match="bytes"):
        load(saved)


def test_a_missing_file_is_refused(saved):
    saved[0].unlink()
    with pytest.raises(IndexFileError, match="cannot be read"):
        load(saved)


def spoil(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        *((place, "damaged in the 64 KiB from byte 0") for place in (0, 5, 100, 20_000, -9)),
        *((place, "has checksum") for place in (-8, -1)),
    ],
)
def test_a_changed_byte_is_noticed(saved, place, words):
    spoil(saved[0], place)
    with pytest.raises(IndexFileError, match=words):
        load(saved)


def test_an_older_file_is_used_if_all_its_bytes_have_the_recorded_checksum(saved):
    made = make(unit_rows(1000, 7), np.arange(1000) * 2)
    content = faiss.serialize_index(made._keyed).tobytes()
    older = FileStamp(len(content), xxhash.xxh3_128_hexdigest(content))
    saved[0].write_bytes(content)
    index, queries = load((saved[0], older)), unit_rows(4, 8)
    index.check()
    assert list(map(as_lists, index.search(queries, 5))) == list(
        map(as_lists, made.search(queries, 5))
    )
    assert np.array_equal(index.vectors(np.arange(1000)), made.vectors(np.arange(1000)))
    for place in (0, 20_000, -1):
        spoil(saved[0], place)
        with pytest.raises(IndexFileError, match="checksum"):
            load((saved[0], older))
        saved[0].write_bytes(content)


WIDE = 512  # dimensions: 4000 rows are 63 blocks, of which the ids take the last


@pytest.fixture
def many(tmp_path: Path) -> tuple[Path, FileStamp]:
    return tmp_path / "many", make(unit_rows(4000, 7, WIDE)).save(tmp_path / "many")


def load_many(many: tuple[Path, FileStamp]) -> VectorIndex:
    return VectorIndex.load(many[0], dim=WIDE, rows=4000, stamp=many[1])


@pytest.mark.parametrize("place", [0, 70_000, 2_000_000, 4_095_999, 4_096_117])
def test_damage_among_vectors_is_noticed_by_whatever_reads_them_all(many, place):
    spoil(many[0], place)
    words = f"many is damaged in the 64 KiB from byte {place // 65_536 * 65_536:,}"
    if place < 65_536 or place > 62 * 65_536:
        with pytest.raises(IndexFileError, match=words):
            load_many(many)
        return
    with pytest.raises(IndexFileError, match=words):
        load_many(many).check()
    index = load_many(many)
    for way in WAYS:  # what was found damaged is not believed the next time
        with found_by(way), pytest.raises(IndexFileError, match=words):
            index.search(unit_rows(1, 8, WIDE), 3)


def test_only_the_vectors_in_a_damaged_block_cannot_be_had(many):
    """The codes begin at byte 118, so row 63 begins in one block of 64 KiB and ends in the next."""
    spoil(many[0], 70_000)
    index, expected = load_many(many), unit_rows(4000, 7, WIDE).astype(np.float16)
    damaged = {row for row in range(4000) if 65_536 < 118 + 1024 * (row + 1) - 1 < 131_072 + 1024}
    assert damaged == set(range(63, 128))
    for row in range(0, 200):
        positions = np.array([3999, row, 5, row])
        if row in damaged:
            with pytest.raises(IndexFileError, match="from byte 65,536"):
                index.vectors(positions)
        else:
            assert np.array_equal(index.vectors(positions), expected[positions])
    assert index.vectors(np.arange(0)).shape == (0, WIDE)


def test_few_vectors_are_had_without_reading_the_others(many):
    index = load_many(many)
    index.vectors(np.array([0, 2000]))
    index.search(unit_rows(1, 8, WIDE), 3, allowed=np.arange(4000) == 1000)
    assert np.flatnonzero(index._file._checked).tolist() == [0, 15, 31, 62]


def test_a_change_behind_the_file_system_is_noticed(saved):
    content, status = bytearray(saved[0].read_bytes()), saved[0].stat()
    content[20_000] ^= 1
    saved[0].write_bytes(content)
    os.utime(saved[0], ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(IndexFileError, match="damaged"):
        load(saved)


def test_a_file_of_another_library_is_refused(saved, tmp_path):
    make(unit_rows(1000, 9), np.arange(1000) * 2).save(tmp_path / "other")
    (tmp_path / "other").replace(saved[0])
    with pytest.raises(IndexFileError, match="checksum"):
        load(saved)


@pytest.mark.parametrize("content", [b"\0" * 40_126, b"IxMp" * 10_000, b"junk", b""])
def test_what_faiss_cannot_read_is_refused_even_if_it_is_what_was_recorded(saved, content):
    written, stamp = as_recorded(content)
    saved[0].write_bytes(written)
    with pytest.raises(IndexFileError):
        load((saved[0], stamp))


@pytest.mark.parametrize(("dim", "rows"), [(DIM, 999), (DIM, 0), (DIM - 1, 1000), (36, 500)])
def test_an_index_of_another_size_than_recorded_is_refused(saved, dim, rows):
    with pytest.raises(IndexFileError, match="other vectors than the catalogue says"):
        VectorIndex.load(saved[0], dim=dim, rows=rows, stamp=saved[1])


def test_another_kind_of_faiss_index_is_refused(saved):
    flat = faiss.IndexFlatIP(DIM)
    flat.add(unit_rows(1000, 7))
    content = faiss.serialize_index(flat).tobytes()
    written, stamp = as_recorded(content)
    saved[0].write_bytes(written)
    with pytest.raises(IndexFileError):
        load((saved[0], stamp))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux' always full device")
def test_a_full_disk_is_told_as_such_and_leaves_the_old_file(saved):
    before = saved[0].read_bytes()
    beside = saved[0].with_name(saved[0].name + ".tmp")
    beside.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        make(unit_rows(1000, 9)).save(saved[0])
    assert saved[0].read_bytes() == before
    assert not beside.is_symlink()
