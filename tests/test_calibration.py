"""Confidences: hand-worked curves and areas, what always holds, and a library from end to end."""

from pathlib import Path

import numpy as np
import pytest
from conftest import ToyEncoder, paint
from hypothesis import given
from hypothesis import strategies as st

from indexes.records import ModelSpec
from indexes.store import Store
from retriever.calibration import (
    CUT,
    LEAST_PAIRS,
    TAIL,
    Calibration,
    Curve,
    Sample,
    background,
    calibration_error,
    cross_fitted,
    fit,
    fit_curve,
    nearest_others,
    reliability,
    roc_auc,
    unrelated,
)

# ── the background ───────────────────────────────────────────────────────────────────────────────


def test_background_has_some_hundred_short_texts_each_once() -> None:
    texts = background()
    assert 300 <= len(texts) <= 500
    assert len(set(texts)) == len(texts)
    assert all(text == text.strip() and not text.startswith("#") for text in texts)
    assert max(len(text.split()) for text in texts) <= 14


def test_background_knows_other_scripts() -> None:
    assert any("\u4e00" <= letter <= "\u9fff" for text in background() for letter in text)


def _rows(*angles: float) -> np.ndarray:
    """(n, 2) unit rows at so many degrees."""
    turned = np.radians(angles)
    return np.column_stack([np.cos(turned), np.sin(turned)]).astype(np.float32)


def test_texts_nearer_to_captions_than_these_are_to_each_other_are_left_out() -> None:
    captions, owners = _rows(0, 40), np.array([0, 1])
    # The captions are 40° apart; the texts are 5°, 35°, 50° and 130° from the nearest one.
    kept = unrelated(_rows(-5, -35, 90, 170), captions, owners)
    assert kept.tolist() == [False, False, True, True]


def test_captions_of_one_picture_do_not_say_how_near_a_library_lies_together() -> None:
    captions, owners = _rows(0, 1, 40), np.array([0, 0, 1])
    assert unrelated(_rows(-20, 90, 170), captions, owners).tolist() == [False, True, True]


def test_half_of_the_background_always_stays() -> None:
    captions, owners = _rows(0, 90), np.array([0, 1])
    assert unrelated(_rows(0, 1, 2, 3, 4), captions, owners).sum() >= 3


def test_nothing_is_left_out_for_captions_of_one_picture() -> None:
    assert unrelated(_rows(0, 1), _rows(0, 1), np.array([7, 7])).all()
    assert unrelated(_rows(0, 1), np.empty((0, 2), np.float32), np.array([], np.int64)).all()


# ── curves ───────────────────────────────────────────────────────────────────────────────────────


def test_curve_through_two_normal_kinds_is_the_one_worked_out() -> None:
    """Means ±1 and deviation 1: log odds are 2 · score, 0 in the middle."""
    rng = np.random.default_rng(1)
    curve = fit_curve(rng.normal(1, 1, 40_000), rng.normal(-1, 1, 20_000))
    assert curve.slope == pytest.approx(2, rel=0.03)
    assert curve.middle == pytest.approx(0, abs=0.02)


def test_kinds_count_half_each_however_many_there_are() -> None:
    right, wrong = np.array([0.4, 0.6, 0.8]), np.array([0.2, 0.3, 0.5])
    once = fit_curve(np.tile(right, 100), np.tile(wrong, 100))
    often = fit_curve(np.tile(right, 100), np.tile(wrong, 1000))
    assert often.slope == pytest.approx(once.slope, rel=0.05)
    assert often.middle == pytest.approx(once.middle, rel=0.02)


def test_kinds_apart_give_a_finite_curve_between_them() -> None:
    curve = fit_curve(np.linspace(0.7, 0.9, 50), np.linspace(0.1, 0.3, 50))
    assert 0.3 < curve.middle < 0.7
    assert 0 < curve.slope < 1e3
    assert curve(np.array([0.9]))[0] > 0.97


def test_equal_scores_tell_nothing() -> None:
    curve = fit_curve(np.full(40, 0.5), np.full(40, 0.5))
    assert curve(np.array([0.0, 0.5, 1.0])).tolist() == [0.5, 0.5, 0.5]


def test_extreme_scores_do_not_overflow() -> None:
    curve = Curve(1e6, 0.0)
    assert curve(np.array([-1.0, 1.0])) == pytest.approx([0, 1], abs=1e-12)


def test_cross_fitted_confidences_are_calibrated_where_the_curve_fits() -> None:
    rng = np.random.default_rng(2)
    found = cross_fitted(rng.normal(0.6, 0.1, 1000), rng.normal(0.4, 0.1, 400))
    confidences, are_right, weights = found
    assert are_right.sum() == 1000
    assert weights[are_right].sum() == pytest.approx(0.5)
    assert calibration_error(*found) < 0.05
    assert confidences[are_right].mean() > 0.75 > 0.25 > confidences[~are_right].mean()


# ── how good confidences are ─────────────────────────────────────────────────────────────────────


def test_reliability_worked_by_hand() -> None:
    confidences = np.array([0.1, 0.2, 0.7, 1.0])
    are_right = np.array([False, True, True, True])
    weights = np.full(4, 0.25)
    low, high = reliability(confidences, are_right, weights, bins=2)
    assert low == pytest.approx((0.15, 0.5, 0.5))
    assert high == pytest.approx((0.85, 1.0, 0.5))
    error = calibration_error(confidences, are_right, weights, bins=2)
    assert error == pytest.approx(0.5 * 0.35 + 0.5 * 0.15)


def test_equal_confidences_share_a_bin() -> None:
    halves = np.full(10, 0.5)
    are_right = np.arange(10) < 5
    assert reliability(halves, are_right, halves) == [pytest.approx((0.5, 0.5, 1.0))]
    assert calibration_error(halves, are_right, halves) == pytest.approx(0)


def test_area_worked_by_hand() -> None:
    assert roc_auc([0.9, 0.4], [0.1, 0.4, 0.5]) == pytest.approx((3 + 1.5) / 6)
    assert roc_auc([1.0], [0.0]) == 1
    assert roc_auc([0.3, 0.3], [0.3]) == 0.5


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=8),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=8),
)
def test_weights_of_an_area_are_repetitions(
    right: list[tuple[int, int]], wrong: list[tuple[int, int]]
) -> None:
    repeated = [[score for score, times in one for _ in range(times)] for one in (right, wrong)]
    if not all(repeated):
        return
    sides = [np.array(one, dtype=float).T for one in (right, wrong)]
    weighted = roc_auc(sides[0][0], sides[1][0], sides[0][1], sides[1][1])
    pairs = [
        (above > below) + (above == below) / 2 for above in repeated[0] for below in repeated[1]
    ]
    assert weighted == pytest.approx(np.mean(pairs))


# ── confidences ──────────────────────────────────────────────────────────────────────────────────


def _sample(pairs: int, *, apart: float = 0.2, seed: int = 0) -> Sample:
    rng = np.random.default_rng(seed)
    return Sample(rng.normal(0.4 + apart, 0.08, pairs), rng.normal(0.4, 0.08, 300))


@pytest.mark.parametrize("pairs", [0, 200])
def test_confidence_rises_with_the_score_and_crosses_the_cut(pairs: int) -> None:
    calibration = Calibration(fit({"image": _sample(pairs)}))
    scores = np.linspace(-1, 1, 201)
    confidences = calibration.confidence(scores, "image", "text")
    assert confidences is not None
    assert (np.diff(confidences) >= 0).all()
    assert (confidences >= 0).all()
    assert (confidences <= 1).all()
    assert confidences[0] < 0.06
    assert confidences[-1] > 0.94


def test_without_pairs_half_stands_where_one_unrelated_text_in_twenty_reaches() -> None:
    sample = _sample(LEAST_PAIRS - 1)
    facts = fit({"image": sample})
    assert "slope" not in facts["texts"]["image"]
    limit = np.quantile(sample.background, 1 - TAIL)
    found = Calibration(facts).confidence([limit], "image", "text")
    assert found is not None
    assert found[0] == pytest.approx(CUT, abs=0.01)


def test_a_model_that_puts_pairs_last_gets_no_curve() -> None:
    facts = fit({"image": _sample(200, apart=-0.2)})
    assert "slope" not in facts["texts"]["image"]
    assert facts["texts"]["image"]["pairs"] == 200


def test_facts_say_how_well_pairs_are_told_apart() -> None:
    facts = fit({"image": _sample(400)})["texts"]["image"]
    assert facts["pairs"] == 400
    assert facts["unrelated"] == 300
    assert facts["auc"] > 0.9
    assert 0 <= facts["error"] < 0.06


def test_pictures_are_compared_with_how_near_the_librarys_own_lie() -> None:
    nearest = np.linspace(0.5, 0.9, 401)
    calibration = Calibration(fit({}, nearest))
    found = calibration.confidence([0.4, 0.52, 0.7, 1.0], "image", "image")
    assert found is not None
    assert found == pytest.approx([0, CUT, 0.5 / 0.55, 1 / 1.05], abs=1e-3)


def test_what_was_not_measured_has_no_confidence() -> None:
    calibration = Calibration(fit({"image": _sample(100)}))
    assert calibration.confidence([0.5], "hybrid", "text") is None
    assert calibration.confidence([0.5], "image", "image") is None
    assert calibration.confidence([0.5], "image", None) is None
    assert calibration.percentile([0.5], "words") is None


def test_percentile_is_the_share_of_unrelated_texts_that_find_less() -> None:
    scores = np.linspace(0.2, 0.6, 401)
    calibration = Calibration(fit({"image": Sample(np.empty(0), scores)}))
    found = calibration.percentile([0.1, 0.4, 0.7], "image")
    assert found == pytest.approx([0, 0.5, 1], abs=1e-3)


def test_what_most_unrelated_texts_score_is_passed_in_one_step() -> None:
    """Of the words channel, which gives nothing to most of them."""
    scores = np.array([0.0] * 80 + [0.5] * 20)
    calibration = Calibration(fit({"words": Sample(np.empty(0), scores)}))
    found = calibration.percentile([0.0, 1e-6, 0.25, 0.5, 0.5001], "words")
    assert found == pytest.approx([0, 0.79, 0.795, 0.8, 1], abs=0.015)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30), st.floats(-1.5, 1.5))
def test_shares_of_any_distribution_lie_between_those_strictly_below_and_all(
    scores: list[float], score: float
) -> None:
    known = np.array(scores)
    share = Calibration(fit({"words": Sample(np.empty(0), known)})).percentile([score], "words")
    assert share is not None
    # Quantiles are kept to four digits and in hundredths, with lines between them.
    slack = 0.01 + 1 / max(1, len(scores) - 1)
    assert (
        (known < score - 1e-4).mean() - slack <= share[0] <= (known <= score + 1e-4).mean() + slack
    )


# ── a library ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def colours(tmp_path: Path) -> Store:
    from retriever.ingest import index_folders

    encoder = ToyEncoder()
    for name in ("red", "green", "blue", "yellow", "white"):
        paint(tmp_path / "pictures" / f"{name}.png", name)
    store = Store.create(tmp_path / "toy.lib", ModelSpec("toy", encoder.dim, "toy-1"))
    index_folders(store, lambda: encoder, [tmp_path / "pictures"])
    return store


def test_nearest_others_are_not_the_pictures_themselves(colours: Store) -> None:
    # red, green and yellow lie at 1/√2 from a neighbour, white at √2/√3 from yellow, blue at 1/√3.
    found = np.sort(nearest_others(colours))
    expected = [3**-0.5, 2**-0.5, 2**-0.5, (2 / 3) ** 0.5, (2 / 3) ** 0.5]
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_one_picture_has_no_nearest_other(fresh_store: Store) -> None:
    assert not len(nearest_others(fresh_store))
