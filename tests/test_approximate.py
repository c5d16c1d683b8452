"""ApproximateIndex: what it finds, in which memory, and what becomes of damaged files.

Vectors here are topics with something of their own, as pictures are; texts lie beside them, on the
other side of a gap. Nothing is timed.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from indexes.approximate import (
    LEAST_ROWS,
    ApproximateIndex,
    choose,
    rerank,
    tune,
)
from indexes.records import Direction, FileStamp
from indexes.vectors import IndexFileError, VectorIndex

ROWS, DIM = 6_000, 48
Vectors = NDArray[np.float32]


def unit(rows: Vectors) -> Vectors:
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float32)


def made_up(n: int, dim: int, seed: int, *, texts: bool = False) -> Vectors:
    world = np.random.default_rng(7)
    spread = 0.95 ** np.arange(dim)
    topics = world.standard_normal((50, dim)) * spread
    gap = world.standard_normal(dim) / np.sqrt(dim)
    rng = np.random.default_rng(seed)
    own = rng.standard_normal((n, dim)) * spread
    return unit(unit(topics[rng.integers(0, 50, n)] + own) + (gap if texts else -gap))


def ids_of(n: int) -> NDArray[np.int64]:
    return np.arange(n, dtype=np.int64) * 3 + 1_000_000


def flat(vectors: Vectors) -> VectorIndex:
    batches = [(ids_of(len(vectors)), vectors.astype(np.float16))]
    return VectorIndex.build(vectors.shape[1], batches)


def built(exact: VectorIndex, seed: int = 0) -> ApproximateIndex:
    index = ApproximateIndex.build(exact, seed=seed)
    assert index is not None
    return index


@cache
def exact() -> VectorIndex:
    return flat(made_up(ROWS, DIM, 0))


@cache
def index() -> ApproximateIndex:
    return built(exact())


TEXTS = made_up(100, DIM, 1, texts=True)
PICTURES = made_up(100, DIM, 2)


@pytest.mark.parametrize("queries", [TEXTS, PICTURES], ids=["texts", "pictures"])
@pytest.mark.parametrize("k", [1, 10, 40])
def test_a_tuned_index_finds_what_was_asked_of_it(queries: Vectors, k: int) -> None:
    setting = tune(index(), exact(), queries, k=k, target=0.97)
    assert setting.overlap >= 0.97
    assert (setting.k, setting.queries) == (k, 100)
    found = index().candidates(queries, setting.candidates, setting.probes)
    shares = [
        len(np.intersect1d(rerank(exact(), query, ids, k).ids, right.ids)) / k
        for query, ids, right in zip(queries, found, exact().search(queries, k), strict=True)
    ]
    assert np.mean(shares) == pytest.approx(setting.overlap)


def test_a_target_that_no_setting_reaches_gives_the_best_one_and_says_so() -> None:
    # Nothing tells where neighbours are, and of 128 axes 16 are kept.
    noise = unit(np.random.default_rng(0).standard_normal((5_100, 128), dtype=np.float32))
    gallery = flat(noise[:5_000])
    poor = ApproximateIndex.build(gallery, memory_bytes=150_000)
    assert poor is not None
    assert poor.kind.startswith("PCA16,")
    setting = tune(poor, gallery, noise[5_000:], target=0.99)
    assert 0.2 < setting.overlap < 0.99
    assert setting.probes * setting.candidates > 50_000


def test_a_higher_target_never_looks_at_less() -> None:
    def effort(setting: Direction) -> int:
        return setting.probes * setting.candidates

    low, high = (tune(index(), exact(), TEXTS, target=target) for target in (0.5, 0.99))
    assert effort(low) < effort(high)


def test_tuning_without_queries_is_refused() -> None:
    with pytest.raises(ValueError, match="there are none"):
        tune(index(), exact(), TEXTS[:0])


def test_candidates_are_our_ids_each_once_and_the_best_first() -> None:
    (ids,) = index().candidates(PICTURES[:1], 200, 30)
    assert len(ids) == len(set(ids.tolist())) == 200
    assert set(ids.tolist()) <= set(ids_of(ROWS).tolist())
    places, present = exact().find(ids)
    assert present.all()
    scores = exact().vectors(places) @ PICTURES[0]
    assert scores[:20].mean() > scores[-20:].mean() + 0.01


def test_candidates_are_never_padded() -> None:
    few = index().candidates(PICTURES, ROWS, 1)
    assert all(0 < len(ids) < ROWS and (ids >= 0).all() for ids in few)
    every = index().candidates(PICTURES[:3], 10 * ROWS, 10 * index().lists)
    assert all(np.array_equal(np.sort(ids), ids_of(ROWS)) for ids in every)


def test_a_batch_finds_what_single_queries_find() -> None:
    together = index().candidates(TEXTS, 50, 8)
    for row, ids in enumerate(together):
        (alone,) = index().candidates(TEXTS[row : row + 1], 50, 8)
        assert np.array_equal(alone, ids)


def test_all_candidates_reranked_are_the_exact_answer() -> None:
    for query, right in zip(TEXTS, exact().search(TEXTS, 10), strict=True):
        match = rerank(exact(), query, np.random.default_rng(0).permutation(ids_of(ROWS)), 10)
        assert np.array_equal(match.ids, right.ids)
        assert np.array_equal(match.scores, right.scores)


def test_reranking_leaves_out_what_is_unknown_or_not_allowed() -> None:
    ids = np.array([ids_of(5)[4], 17, ids_of(5)[2]])
    allowed = np.ones(ROWS, dtype=np.bool_)
    assert set(rerank(exact(), TEXTS[0], ids, 3).ids) == {ids_of(5)[4], ids_of(5)[2]}
    allowed[4] = False
    assert rerank(exact(), TEXTS[0], ids, 3, allowed=allowed).ids.tolist() == [ids_of(5)[2]]
    assert not len(rerank(exact(), TEXTS[0], ids[1:2], 3).ids)


def test_equal_seeds_build_equal_files(tmp_path: Path) -> None:
    stamps = [built(exact(), seed).save(tmp_path / "a.faiss") for seed in (0, 0, 1)]
    assert stamps[0] == stamps[1] != stamps[2]


@pytest.mark.parametrize("dim", [1, 7, 16, 33])
def test_any_dimension_will_do(dim: int) -> None:
    vectors = made_up(2000, dim, 4)
    several = flat(vectors)
    found = built(several).candidates(vectors[:20], 2000, 2000)
    assert [len(ids) for ids in found] == [2000] * 20


def test_vectors_that_are_all_equal_are_refused() -> None:
    with pytest.raises(ValueError, match="hardly differ"):
        built(flat(np.repeat(PICTURES[:1], 1500, axis=0)))


def test_a_picture_that_is_there_many_times_is_found() -> None:
    others = made_up(2000, DIM, 5)
    several = flat(np.concatenate([others, np.repeat(PICTURES[:1], 500, axis=0)]))
    (ids,) = built(several).candidates(PICTURES[:1], 100, 20)
    assert (ids >= ids_of(2001)[-1]).all()


def saved(tmp_path: Path) -> tuple[Path, FileStamp]:
    path = tmp_path / "image.faiss"
    return path, index().save(path)


def test_a_loaded_index_answers_as_the_saved_one(tmp_path: Path) -> None:
    path, stamp = saved(tmp_path)
    assert path.stat().st_size == stamp.size_bytes
    loaded = ApproximateIndex.load(path, dim=DIM, rows=ROWS, stamp=stamp)
    assert (len(loaded), loaded.dim, loaded.kind) == (ROWS, DIM, index().kind)
    assert loaded.memory_bytes == index().memory_bytes
    for one, other in zip(
        loaded.candidates(TEXTS, 100, 8), index().candidates(TEXTS, 100, 8), strict=True
    ):
        assert np.array_equal(one, other)


def test_the_file_takes_the_memory_that_was_said(tmp_path: Path) -> None:
    _, stamp = saved(tmp_path)
    assert stamp.size_bytes == pytest.approx(index().memory_bytes, rel=0.2)


@pytest.mark.parametrize("place", [0.0, 0.3, 0.6, 0.9, 0.9999])
def test_a_file_with_one_wrong_bit_is_refused(tmp_path: Path, place: float) -> None:
    path, stamp = saved(tmp_path)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(IndexFileError):
        ApproximateIndex.load(path, dim=DIM, rows=ROWS, stamp=stamp)


def test_a_file_of_another_kind_or_size_is_refused(tmp_path: Path) -> None:
    path, stamp = saved(tmp_path)
    with pytest.raises(IndexFileError, match="other vectors"):
        ApproximateIndex.load(path, dim=DIM, rows=ROWS + 1, stamp=stamp)
    with pytest.raises(IndexFileError, match="other vectors"):
        ApproximateIndex.load(path, dim=DIM + 1, rows=ROWS, stamp=stamp)
    with pytest.raises(IndexFileError, match="cannot be read"):
        ApproximateIndex.load(tmp_path / "none", dim=DIM, rows=ROWS, stamp=stamp)
    stamp = exact().save(path)
    with pytest.raises(IndexFileError, match="not an index of ours"):
        ApproximateIndex.load(path, dim=DIM, rows=ROWS, stamp=stamp)


def test_an_index_keeps_to_its_memory() -> None:
    whole = index().memory_bytes
    limit = whole * 4 // 5
    small = ApproximateIndex.build(exact(), memory_bytes=limit)
    assert small is not None
    assert small.memory_bytes <= limit
    assert tune(small, exact(), PICTURES, target=0.9).overlap >= 0.9


def test_too_little_memory_is_refused_with_numbers() -> None:
    with pytest.raises(ValueError, match=r"takes 0\.\d MB, more than the 0\.0 MB allowed"):
        ApproximateIndex.build(exact(), memory_bytes=1000)


def test_too_few_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match="999 vectors are too few"):
        ApproximateIndex.build(flat(made_up(LEAST_ROWS - 1, DIM, 0)))


def test_progress_ends_with_all_rows() -> None:
    seen: list[tuple[int, int]] = []
    ApproximateIndex.build(exact(), progress=lambda done, total: seen.append((done, total)))
    assert seen[0] == (0, ROWS)
    assert seen[-1] == (ROWS, ROWS)
    assert seen == sorted(seen)


def test_a_build_can_be_stopped_at_each_of_its_steps() -> None:
    def after(count: int) -> Callable[[], bool]:
        left = iter([False] * count)
        return lambda: next(left, True)

    steps = 0
    while ApproximateIndex.build(exact(), stop=after(steps)) is None:
        steps += 1
    assert steps == 10  # one chunk of a sample, eight rounds, one chunk of rows


@pytest.mark.parametrize(
    ("rows", "dim", "memory", "is_exact", "why"),
    [
        (5_000, 512, None, True, "exact search takes milliseconds"),
        (100_000, 512, None, True, "is to read 102.4 MB"),
        (1_000_000, 512, None, False, "is to read 1,024.0 MB: an inverted file of 4,096 lists"),
        (1_000_000, 512, 2_000_000_000, False, "4,096 lists looks at few"),
        (1_000_000, 512, 40_000_000, False, "4,096 lists of at most 48 axes"),
        (1_000_000, 512, 10_000_000, True, "takes 16.8 MB, more than the 10.0 MB allowed"),
        (10_000_000, 512, None, False, "16,384 lists"),
        (0, 512, None, True, "exact"),
    ],
)
def test_the_size_and_the_memory_decide(
    rows: int, dim: int, memory: int | None, is_exact: bool, why: str
) -> None:
    choice = choose(rows, dim, memory)
    assert choice.is_exact == is_exact
    assert why in choice.why
