"""The definitions of retriever.metrics: worked cases, a slow reference, and clip_benchmark."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retriever.metrics import (
    Ranks,
    alignment,
    bootstrap_interval,
    mean_rank,
    median_rank,
    modality_gap,
    overlap_at_k,
    ranks_of_positives,
    recall_at_k,
    retrieval_metrics,
    rsum,
    summarise_ranks,
    top_k,
    uniformity,
)


def unit(rows):
    rows = np.asarray(rows, np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def slow_ranks(scores, positive):
    """(q, g) scores and (q, g) bool → the three ranks of each query, by sorting in plain Python."""
    result = []
    for row, hits in zip(scores.tolist(), positive.tolist(), strict=True):
        places = range(len(row))
        orders = [
            sorted(places, key=lambda p: (-row[p], p)),
            sorted(places, key=lambda p: (-row[p], not hits[p])),
            sorted(places, key=lambda p: (-row[p], hits[p])),
        ]
        result.append([next(i for i, p in enumerate(order) if hits[p]) for order in orders])
    return np.array(result).T


def three(ranks: Ranks):
    return np.stack([ranks.ranks, ranks.optimistic, ranks.pessimistic])


# ---------------------------------------------------------------------------- ranks


def test_rank_counts_the_candidates_with_a_higher_score():
    queries = np.array([[1.0], [-1.0]], np.float32)
    gallery = np.array([[0.1], [0.9], [0.5]], np.float32)
    ranks = ranks_of_positives(queries, gallery, np.array([2, 2]), np.arange(3))
    # Descending for the first query: 1, 2, 0. For the second: 0, 2, 1.
    assert ranks.ranks.tolist() == [1, 1]
    assert ranks.tied == 0


def test_best_of_several_positives_counts():
    gallery = np.array([[0.9], [0.8], [0.7], [0.6]], np.float32)
    ranks = ranks_of_positives(
        np.array([[1.0]], np.float32), gallery, np.array([7]), np.array([1, 7, 2, 7])
    )
    assert ranks.ranks.tolist() == [1]


@pytest.mark.parametrize(
    ("place", "expected", "optimistic", "pessimistic"), [(0, 0, 0, 3), (2, 2, 0, 3), (3, 3, 0, 3)]
)
def test_among_equal_scores_the_lower_position_ranks_first(
    place, expected, optimistic, pessimistic
):
    gallery = np.ones((4, 2), np.float32)
    ranks = ranks_of_positives(gallery[:1], gallery, np.array([place]), np.arange(4))
    assert three(ranks)[:, 0].tolist() == [expected, optimistic, pessimistic]
    assert ranks.tied == 1


def test_equal_positives_are_no_tie():
    gallery = np.ones((3, 2), np.float32)
    ranks = ranks_of_positives(gallery[:1], gallery, np.array([5]), np.array([5, 5, 5]))
    assert three(ranks)[:, 0].tolist() == [0, 0, 0]
    assert ranks.tied == 0


# Few values in few dimensions: ties are frequent, and products of them are exact.
small = st.integers(-2, 2)


@st.composite
def problems(draw):
    pictures = draw(st.integers(1, 6))
    owners = draw(st.lists(st.integers(0, pictures - 1), max_size=10)) + list(range(pictures))
    owners = np.array(draw(st.permutations(owners)))
    rows = st.lists(small, min_size=2, max_size=2)
    images = draw(st.lists(rows, min_size=pictures, max_size=pictures))
    texts = draw(st.lists(rows, min_size=len(owners), max_size=len(owners)))
    return np.array(images, np.float32), np.array(texts, np.float32), owners


@given(problems(), st.integers(1, 8))
def test_both_directions_equal_full_sorting_with_ties_in_any_chunk(problem, chunk):
    images, texts, owners = problem
    pictures = np.arange(len(images))
    positive = owners[:, None] == pictures[None, :]
    t2i = ranks_of_positives(texts, images, owners, pictures, chunk=chunk)
    i2t = ranks_of_positives(images, texts, pictures, owners, chunk=chunk)
    np.testing.assert_array_equal(three(t2i), slow_ranks(texts @ images.T, positive))
    np.testing.assert_array_equal(three(i2t), slow_ranks(images @ texts.T, positive.T))


@given(problems())
def test_ranks_lie_between_optimistic_and_pessimistic(problem):
    images, texts, owners = problem
    ranks = ranks_of_positives(texts, images, owners, np.arange(len(images)))
    assert (ranks.optimistic <= ranks.ranks).all()
    assert (ranks.ranks <= ranks.pessimistic).all()


@given(problems(), st.randoms(use_true_random=False))
def test_order_of_the_gallery_changes_nothing_but_ties(problem, random):
    images, texts, owners = problem
    order = list(range(len(images)))
    random.shuffle(order)
    before = ranks_of_positives(texts, images, owners, np.arange(len(images)))
    after = ranks_of_positives(texts, images[order], owners, np.array(order))
    np.testing.assert_array_equal(before.optimistic, after.optimistic)
    np.testing.assert_array_equal(before.pessimistic, after.pessimistic)


@pytest.mark.parametrize("chunk", [1, 3, 7, 64, None])
def test_duplicate_rows_tie_exactly_whatever_the_chunk(chunk):
    # In float32 alone a matrix product gives equal rows different last bits at other positions.
    rng = np.random.default_rng(0)
    queries = unit(rng.normal(size=(37, 173)))
    picture = unit(rng.normal(size=(1, 173)))
    gallery = np.repeat(picture, 51, axis=0)
    ranks = ranks_of_positives(queries, gallery, np.full(37, 20), np.arange(51), chunk=chunk)
    assert (ranks.ranks == 20).all()
    assert (ranks.optimistic == 0).all()
    assert (ranks.pessimistic == 50).all()


def test_half_precision_rows_are_ranked_as_the_numbers_they_hold():
    rng = np.random.default_rng(1)
    rows = unit(rng.normal(size=(20, 16))).astype(np.float16)
    half = ranks_of_positives(rows, rows, np.arange(20), np.arange(20))
    full = ranks_of_positives(
        rows.astype(np.float32), rows.astype(np.float32), np.arange(20), np.arange(20)
    )
    np.testing.assert_array_equal(three(half), three(full))


@given(problems(), st.integers(1, 8), st.integers(1, 4))
def test_top_k_is_the_head_of_full_sorting_with_ties_in_any_chunk(problem, k, chunk):
    images, texts, _ = problem
    expected = [
        sorted(range(len(images)), key=lambda p: (-row[p], p))[:k] for row in texts @ images.T
    ]
    assert top_k(texts, images, k, chunk=chunk).tolist() == expected


def test_unusable_input_is_refused():
    rows = np.ones((2, 3), np.float32)
    labels = np.arange(2)
    with pytest.raises(ValueError, match="no positive"):
        ranks_of_positives(rows, rows, np.array([0, 9]), labels)
    with pytest.raises(ValueError, match="not finite"):
        ranks_of_positives(rows * np.nan, rows, labels, labels)
    with pytest.raises(ValueError, match="one label"):
        ranks_of_positives(rows, rows, np.arange(3), labels)
    with pytest.raises(ValueError, match=r"\(q, d\)"):
        ranks_of_positives(rows, np.ones((2, 4), np.float32), labels, labels)
    with pytest.raises(ValueError, match="no rows"):
        ranks_of_positives(rows[:0], rows, labels[:0], labels)


# ---------------------------------------------------------------------------- numbers from ranks


def test_hand_worked_table():
    # Two pictures on the axes; captions of picture 0 point at 0, at 0, and nearer to 1.
    images = np.eye(2, dtype=np.float32)
    texts = unit([[1, 0], [3, 1], [1, 3], [0, 1]])
    metrics = retrieval_metrics(images, texts, np.array([0, 0, 0, 1]))
    assert metrics["t2i_r@1"] == 75.0  # captions 0, 1 and 3
    assert metrics["t2i_r@5"] == metrics["t2i_r@10"] == 100.0
    assert metrics["t2i_medr"] == 1.0  # ranks 0 0 1 0
    assert metrics["t2i_meanr"] == 1.25
    assert metrics["i2t_r@1"] == 100.0
    assert metrics["i2t_medr"] == metrics["i2t_meanr"] == 1.0
    assert metrics["rsum"] == 575.0


@pytest.mark.parametrize(
    ("ranks", "median"), [([0], 1), ([0, 1], 1), ([0, 3], 2), ([4, 0, 9], 5), ([1, 2, 3, 8], 3)]
)
def test_median_rank_rounds_the_zero_based_median_down(ranks, median):
    assert median_rank(np.array(ranks)) == median


def test_mean_rank_is_one_based():
    assert mean_rank(np.array([0, 1, 5])) == 3.0


def test_recall_is_the_share_of_ranks_below_k():
    ranks = np.array([0, 1, 4, 5, 99])
    assert [recall_at_k(ranks, k) for k in (1, 2, 5, 6, 100)] == [0.2, 0.4, 0.6, 0.8, 1.0]


@pytest.mark.parametrize("function", [median_rank, mean_rank, lambda ranks: recall_at_k(ranks, 1)])
def test_no_ranks_have_no_number(function):
    with pytest.raises(ValueError, match="no queries"):
        function(np.array([], np.int64))


def test_k_starts_at_one():
    with pytest.raises(ValueError, match="at least 1"):
        recall_at_k(np.array([0]), 0)
    with pytest.raises(ValueError, match="at least 1"):
        top_k(np.ones((1, 2)), np.ones((1, 2)), 0)


@given(st.lists(st.integers(0, 50), min_size=1), st.integers(1, 60))
def test_recall_never_falls_as_k_grows(ranks, k):
    assert recall_at_k(np.array(ranks), k) <= recall_at_k(np.array(ranks), k + 1)


def test_rsum_adds_the_six_recalls_and_needs_them_all():
    names = [f"{direction}_r@{k}" for direction in ("t2i", "i2t") for k in (1, 5, 10)]
    assert rsum(dict(zip(names, [1, 2, 4, 8, 16, 32], strict=True))) == 63
    assert "rsum" not in summarise_ranks(np.array([0]), np.array([0]), ks=(1, 3))


@pytest.mark.parametrize(
    ("exact", "found", "k", "expected"),
    [
        ([[1, 2, 3]], [[3, 2, 1]], 3, 1.0),
        ([[1, 2, 3]], [[3, 2, 1]], 1, 0.0),
        ([[1, 2, 3, 4]], [[1, 9, 3]], 4, 0.5),
        ([[1, 2], [3, 4]], [[1, 2], []], 2, 0.5),
        ([[5]], [[5]], 10, 1.0),
    ],
)
def test_overlap_is_the_share_of_the_exact_answer_that_was_found(exact, found, k, expected):
    assert overlap_at_k(exact, found, k) == expected


@pytest.mark.parametrize(("exact", "found", "k"), [([], [], 1), ([[1]], [], 1), ([[1]], [[1]], 0)])
def test_overlap_of_nothing_is_refused(exact, found, k):
    with pytest.raises(ValueError, match="overlap"):
        overlap_at_k(exact, found, k)


def test_recalls_equal_those_of_clip_benchmark():
    torch = pytest.importorskip("torch")
    reference = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    rng = np.random.default_rng(7)
    n, d = 60, 16
    counts = rng.integers(1, 6, size=n)
    owners = np.repeat(np.arange(n), counts)
    images = unit(rng.normal(size=(n, d)))
    texts = unit(images[owners] + 1.2 * rng.normal(size=(len(owners), d)))

    class GivenEmbeddings:
        """Stands where a model would: its inputs are embeddings already."""

        encode_image = staticmethod(lambda rows: rows)
        encode_text = staticmethod(lambda rows: rows)

    ends = np.cumsum(counts)
    loader = [
        (
            torch.from_numpy(images[start : start + 16]),
            [list(texts[ends[i] - counts[i] : ends[i]]) for i in range(start, min(start + 16, n))],
        )
        for start in range(0, n, 16)
    ]
    theirs = reference.evaluate(
        GivenEmbeddings(),
        loader,
        lambda rows: torch.from_numpy(np.stack(rows)),
        "cpu",
        amp=False,
        recall_k_list=[1, 5, 10],
    )
    ours = retrieval_metrics(images, texts, owners)
    for k in (1, 5, 10):
        # Theirs is a float32 mean.
        assert ours[f"t2i_r@{k}"] == pytest.approx(
            100 * theirs[f"image_retrieval_recall@{k}"], abs=1e-4
        )
        assert ours[f"i2t_r@{k}"] == pytest.approx(
            100 * theirs[f"text_retrieval_recall@{k}"], abs=1e-4
        )
    assert 5 < ours["t2i_r@1"] < 95


# ---------------------------------------------------------------------------- intervals


def test_interval_of_a_share_is_that_of_the_binomial():
    hits = np.arange(400) < 240

    def share(drawn):
        return {"share": float(np.repeat(hits, drawn).mean())}

    lower, upper = bootstrap_interval(share, [400], resamples=2000)["share"]
    deviation = 1.96 * np.sqrt(0.6 * 0.4 / 400)
    # 2,000 drawings fix a 95 % bound to about a tenth of a standard deviation.
    assert lower == pytest.approx(0.6 - deviation, abs=0.004)
    assert upper == pytest.approx(0.6 + deviation, abs=0.004)


def test_captions_of_one_picture_are_drawn_together():
    # Ten identical captions a picture hold no more knowledge than one.
    hits = np.arange(100) < 50

    def share(drawn):
        return {
            "one": float(np.repeat(hits, drawn).mean()),
            "ten": float(np.repeat(np.repeat(hits, 10), np.repeat(drawn, 10)).mean()),
        }

    intervals = bootstrap_interval(share, [100], resamples=200)
    assert intervals["one"] == intervals["ten"]


def test_strata_are_drawn_separately_and_in_full():
    seen = []

    def record(drawn):
        seen.append((drawn[:3].sum(), drawn[3:].sum()))
        return {"value": 1.0}

    assert bootstrap_interval(record, [3, 5], resamples=20) == {"value": (1.0, 1.0)}
    assert set(seen) == {(3, 5)}


def test_same_seed_same_interval():
    def mean(drawn):
        return {"mean": float((drawn * np.arange(50)).sum() / 50)}

    runs = [bootstrap_interval(mean, [50], resamples=50, seed=seed) for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(
    ("sizes", "options"), [([], {}), ([0], {}), ([5], {"resamples": 0}), ([5], {"confidence": 1})]
)
def test_bootstrap_of_nothing_is_refused(sizes, options):
    with pytest.raises(ValueError, match="bootstrap"):
        bootstrap_interval(lambda drawn: {"x": 0.0}, sizes, **options)


# ---------------------------------------------------------------------------- diagnostics


def test_alignment_of_known_pairs():
    images = np.array([[1, 0], [1, 0]], np.float32)
    assert alignment(images, images) == 0
    assert alignment(images, -images) == 4
    # One pair coincides, the other stands at a right angle: (0 + 2) / 2.
    assert alignment(images, np.eye(2, dtype=np.float32)) == 1


def test_uniformity_of_known_rows():
    assert uniformity(np.ones((5, 1), np.float32)) == pytest.approx(0, abs=1e-12)
    opposite = np.array([[1, 0], [-1, 0]], np.float32)
    assert uniformity(opposite) == pytest.approx(-8)
    assert uniformity(opposite, t=1) == pytest.approx(-4)


# Of 2 rows, of 7 of which the last has 5, and one.
@pytest.mark.parametrize("scores_at_a_time", [100, 300, 1 << 23])
def test_uniformity_equals_the_loop_over_pairs(scores_at_a_time, monkeypatch):
    monkeypatch.setattr("retriever.metrics._SCORES_AT_A_TIME", scores_at_a_time)
    rows = unit(np.random.default_rng(2).normal(size=(40, 6))).astype(np.float64)
    potentials = [
        np.exp(-2 * ((rows[i] - rows[j]) ** 2).sum()) for i in range(40) for j in range(i)
    ]
    # Tolerance: a² + b² − 2ab loses more digits than (a − b)².
    assert uniformity(rows) == pytest.approx(np.log(np.mean(potentials)), abs=1e-9)


def test_uniformity_of_rows_spread_over_a_large_sphere_is_minus_two_t():
    rows = unit(np.random.default_rng(3).normal(size=(500, 400)))
    assert uniformity(rows) == pytest.approx(-4, abs=0.05)


def test_modality_gap_is_the_distance_of_the_means():
    images = np.array([[1, 0], [0, 1]], np.float32)
    texts = np.array([[-1, 0], [0, -1], [-1, 0], [0, -1]], np.float32)
    assert modality_gap(images, images) == 0
    assert modality_gap(images, texts) == pytest.approx(np.sqrt(2))


def test_diagnostics_refuse_rows_that_do_not_fit():
    rows = np.ones((3, 2), np.float32)
    with pytest.raises(ValueError, match="row with row"):
        alignment(rows, rows[:2])
    with pytest.raises(ValueError, match="two rows"):
        uniformity(rows[:1])
    with pytest.raises(ValueError, match=r"\(q, d\)"):
        modality_gap(rows, np.ones((3, 3), np.float32))
