"""How far a score can be believed: a confidence for each answer, and where no answer is a match.

A cosine of 0.5 may be a fine match to one model in one library and none at all in another. What
tells is how the scores of pairs that belong together compare with what unrelated queries reach in
the same library, so both are measured when a library is fitted, and only curves are kept.

Texts, where there are captions: right first answers are compared with false ones. The right ones
are held-out captions with their own pictures, where the search shows these among the first few;
the false ones are the best answers to texts that describe nothing in the library (`background`).
A logistic curve through both, each kind counting half, is the probability that an answer of this
score is right (Platt 1999). An isotonic one errs more on held-out pairs of Flickr8k, 0.043 against
0.025, and is made of steps. Scores differ by mode, so each mode of search has its own curve.

Texts, where there are no captions, and pictures: only one of both sides is known, so there is no
probability but a scale on which 50 % stands where one in twenty is expected to be wrong:

    texts     TAIL / (TAIL + share of unrelated texts that find as good an answer)
    pictures  share / (share + TAIL), the share of the library's own pictures whose nearest
              other picture is no nearer than this answer

An answer below CUT is more likely no match than one.

    facts = fit({"image": Sample(pairs, background)}, nearest_others(store))
    Calibration(facts).confidence(scores, "image", query.source)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from indexes.records import Source
    from indexes.store import Store

Scores = NDArray[np.float64]
Rows = NDArray[np.float32]

_BACKGROUND = Path(__file__).with_name("background.txt")
CUT = 0.5  # a best answer of less confidence is no good match
# Pairs count as right first answers if the picture is among so many. The fewer, the more queries
# are told that nothing matches: on Flickr8k by pictures alone 9.5 % of its own captions with 1,
# 5.6 % with 3 and 2.6 % with 10, and of captions of clothes in shops 66, 52 and 38 %.
SHOWN = 3
TAIL = 0.05  # what a scale without right answers takes for rare
LEAST_PAIRS = 30  # below, a curve would be drawn through chance
TYPICAL = 0.05  # see `unrelated`
QUANTILES = 101  # kept of each distribution
NEAREST = 500  # pictures whose nearest others are looked for
BINS = 10


def background() -> list[str]:
    """Some 400 texts that describe nothing in most libraries, always in the same order."""
    text = _BACKGROUND.read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def unrelated(texts: Rows, captions: Rows, owners: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which texts of the background are about something else than the library.

    Left out is a text nearer to a caption than all but one in twenty of the captions are to those
    of other pictures, so that a library of invoices is not told that invoices are unrelated. Half
    of the texts always stay.

    Args:
        texts: (m, d) unit rows of the background.
        captions: (n, d) unit rows of captions, a sample of some thousands at most.
        owners: (n,) the picture of each.

    Returns:
        (m,) bool; all true if fewer than two pictures have captions.
    """
    if len(np.unique(owners)) < 2:
        return np.ones(len(texts), dtype=bool)
    nearest = (texts @ captions.T).max(axis=1)
    others = np.empty(len(captions), dtype=np.float32)
    for start in range(0, len(captions), 1024):
        block = slice(start, start + 1024)
        cosines = captions[block] @ captions.T
        cosines[owners[block, None] == owners[None]] = -1
        others[block] = cosines.max(axis=1)
    limit = max(np.quantile(others, TYPICAL), np.median(nearest))
    kept: NDArray[np.bool_] = nearest <= limit
    return kept


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """What is known of answers in one mode of search, as a search of the whole library would score.

    pairs: (n,) of captions, none of which saw itself, with their own pictures where these are among
    the first SHOWN answers; may be empty. background: (m,) of the best answer to each unrelated
    text, at least one.
    """

    pairs: Scores
    background: Scores


def fit(texts: Mapping[str, Sample], nearest: ArrayLike | None = None) -> dict[str, Any]:
    """What `Calibration` needs to know of a library, as JSON can hold it.

    Args:
        texts: a sample for each mode of search by text.
        nearest: the scores of `nearest_others`; None or empty if there are too few pictures.

    Returns:
        `texts` by mode: `pairs` and `unrelated`, how many were compared; `background`, quantiles;
        and where there were pairs enough `slope` and `middle` of the curve, the `auc` of the two
        kinds, and `error`, the calibration error of curves fitted without the half of the sample
        that they are judged by. `pictures`: quantiles of `nearest`, or None.
    """
    known = np.asarray([] if nearest is None else nearest, dtype=np.float64)
    return {
        "texts": {mode: _fit_mode(sample) for mode, sample in texts.items()},
        "pictures": _quantiles(known) if known.size >= LEAST_PAIRS else None,
    }


def _fit_mode(sample: Sample) -> dict[str, Any]:
    pairs, others = (np.asarray(one, np.float64) for one in (sample.pairs, sample.background))
    facts: dict[str, Any] = {
        "pairs": len(pairs),
        "unrelated": len(others),
        "background": _quantiles(others),
    }
    # A model that tells nothing has no curve, or one that falls.
    if len(pairs) < LEAST_PAIRS or (curve := fit_curve(pairs, others)).slope <= 0:
        return facts
    confidences, are_pairs, weights = cross_fitted(pairs, others)
    return facts | {
        "slope": curve.slope,
        "middle": curve.middle,
        "auc": round(roc_auc(pairs, others), 4),
        "error": round(calibration_error(confidences, are_pairs, weights), 4),
    }


def nearest_others(store: Store, *, seed: int = 0) -> Scores:
    """The score of the nearest other picture of each of some hundred pictures of a library.

    (n,) float64, n ≤ NEAREST; empty if there are no two pictures.
    """
    ids = np.asarray(store.item_ids(), dtype=np.int64)
    chosen = np.random.default_rng(seed).permutation(ids)[:NEAREST].tolist()
    ids = np.array(sorted(store.embedded("image", chosen)), dtype=np.int64)
    if not len(ids):
        return np.empty(0)
    rows = store.embeddings("image", ids.tolist())
    found = store.search("image", rows, 2, source="image")
    return np.array(
        [
            match.scores[match.ids != own][0]
            for own, match in zip(ids, found, strict=True)
            if (match.ids != own).any()
        ],
        dtype=np.float64,
    )


class Calibration:
    """Turns scores into confidences by what `fit` measured of a library.

    Confidences rise with the score and lie in [0, 1]; for texts in a library with captions they
    are probabilities, otherwise the scale at the top of this module. Those of one mode can be
    compared between queries.
    """

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self._texts: Mapping[str, Mapping[str, Any]] = facts.get("texts", {})
        self._pictures: list[float] | None = facts.get("pictures")

    def confidence(self, scores: ArrayLike, mode: str, source: Source | None) -> Scores | None:
        """The confidence of answers to one query, in the order given.

        Args:
            scores: (k,) as the search in this mode gives them.
            mode: of the search, one of those that were fitted.
            source: what the query was, as `Query.source`; None for texts and pictures together.

        Returns:
            (k,) float64; None where nothing was measured of such queries.
        """
        given = np.asarray(scores, dtype=np.float64)
        if source == "image":
            if mode != "image" or self._pictures is None:
                return None
            share = _share(self._pictures, given, or_equal=True)
            return share / (share + TAIL)
        facts = self._texts.get(mode) if source == "text" else None
        if facts is None:
            return None
        if "slope" in facts:
            return Curve(facts["slope"], facts["middle"])(given)
        return TAIL / (TAIL + 1 - _share(facts["background"], given))

    def percentile(self, scores: ArrayLike, mode: str) -> Scores | None:
        """Share of unrelated texts whose best answer has a lower score, (k,) in [0, 1].

        None where nothing was measured in this mode.
        """
        facts = self._texts.get(mode)
        if facts is None:
            return None
        return _share(facts["background"], np.asarray(scores, dtype=np.float64))


# ── curves ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Curve:
    """1 / (1 + exp(−slope · (score − middle)))."""

    slope: float
    middle: float

    def __call__(self, scores: Scores) -> Scores:
        """The confidence of each score."""
        # Beyond ±40 nothing changes but for an overflow.
        steps = np.clip(self.slope * (scores - self.middle), -40, 40)
        confidences: Scores = 1 / (1 + np.exp(-steps))
        return confidences

    @classmethod
    def flat(cls) -> Self:
        """What scores that tell nothing deserve."""
        return cls(0.0, 0.0)


def fit_curve(right: Scores, wrong: Scores) -> Curve:
    """The logistic curve of greatest likelihood if right and wrong are equally frequent.

    Targets stand a little off 1 and 0, which keeps the curve finite where the scores of both kinds
    do not overlap. Platt 1999; Newton's method as in Lin, Lin & Weng 2007.

    Args:
        right: (n,) scores of right answers, at least one.
        wrong: (m,) scores of wrong ones, at least one.
    """
    n, m = len(right), len(wrong)
    scores = np.concatenate([right, wrong])
    centre, spread = scores.mean(), scores.std()
    if spread < 1e-9:
        return Curve.flat()
    design = np.column_stack([(scores - centre) / spread, np.ones(n + m)])
    targets = np.concatenate([np.full(n, (n + 1) / (n + 2)), np.full(m, 1 / (m + 2))])
    weights = _halves(n, m)

    def loss(beta: Scores) -> float:
        steps = design @ beta
        return float(weights @ (np.logaddexp(0, steps) - targets * steps))

    beta = np.zeros(2)
    for _ in range(100):
        chances = 1 / (1 + np.exp(-design @ beta))
        gradient = design.T @ (weights * (chances - targets))
        curvature = (design * (weights * chances * (1 - chances))[:, None]).T @ design
        step = np.linalg.solve(curvature + 1e-12 * np.eye(2), gradient)
        length = 1.0
        while length > 1e-6 and loss(beta - length * step) > loss(beta):
            length /= 2
        beta = beta - length * step
        if np.abs(gradient).max() < 1e-10:
            break
    slope, offset = float(beta[0] / spread), float(beta[1])
    return Curve(slope, float(centre - offset / slope)) if slope else Curve.flat()


def cross_fitted(
    right: Scores, wrong: Scores, *, seed: int = 0
) -> tuple[Scores, NDArray[np.bool_], Scores]:
    """What curves say of the half of a sample that they were fitted without, for both halves.

    Returns:
        Confidences, which are of right answers, and weights that make both kinds count alike:
        (n + m,) each, in the order of `right` and then `wrong`.
    """
    rng = np.random.default_rng(seed)
    halves = [rng.permutation(len(one)) % 2 == 0 for one in (right, wrong)]
    confidences = np.empty(len(right) + len(wrong))
    for side in (False, True):
        one, other = (half == side for half in halves)
        curve = fit_curve(right[~one], wrong[~other])
        confidences[np.concatenate([one, other])] = curve(
            np.concatenate([right[one], wrong[other]])
        )
    are_right = np.arange(len(confidences)) < len(right)
    return confidences, are_right, _halves(len(right), len(wrong))


def _halves(n: int, m: int) -> Scores:
    return np.concatenate([np.full(n, 0.5 / n), np.full(m, 0.5 / m)])


# ── how good confidences are ─────────────────────────────────────────────────────────────────────


def reliability(
    confidences: Scores, are_right: NDArray[np.bool_], weights: Scores, *, bins: int = BINS
) -> list[tuple[float, float, float]]:
    """Mean confidence, share that is right and share of all weight, by bins of equal weight.

    Equal confidences share a bin, so that no order among them decides; bins that get nothing are
    left out. All arguments are (n,), n ≥ 1; the weights add up to more than 0.
    """
    levels, level = np.unique(confidences, return_inverse=True)
    by_level = np.bincount(level, weights, len(levels))
    total = by_level.sum()
    centres = (np.cumsum(by_level) - by_level / 2) / total
    bin_of = np.minimum((centres * bins).astype(np.int64), bins - 1)[level]
    weight, confidence, right = (
        np.bincount(bin_of, weights * one, bins) for one in (1.0, confidences, are_right)
    )
    return [
        (float(confidence[one] / weight[one]), float(right[one] / weight[one]), float(share))
        for one, share in enumerate(weight / total)
        if share > 0
    ]


def calibration_error(
    confidences: Scores, are_right: NDArray[np.bool_], weights: Scores, *, bins: int = BINS
) -> float:
    """Expected calibration error: how far confidence and share of right answers are apart.

    The mean over bins of equal weight, in [0, 1]. Naeini, Cooper & Hauskrecht 2015; equal weight
    instead of equal width as Nguyen & O'Connor 2015.
    """
    parts = reliability(confidences, are_right, weights, bins=bins)
    return sum(share * abs(confidence - right) for confidence, right, share in parts)


def roc_auc(
    right: ArrayLike,
    wrong: ArrayLike,
    right_weights: ArrayLike | None = None,
    wrong_weights: ArrayLike | None = None,
) -> float:
    """Chance that a right one has a higher score than a wrong one, equal ones counting half.

    The area under the receiver operating characteristic. Hanley & McNeil 1982. Weights count each
    so many times.
    """
    above, below = np.asarray(right, np.float64), np.asarray(wrong, np.float64)
    weight = np.ones(len(above)) if right_weights is None else np.asarray(right_weights, np.float64)
    other = np.ones(len(below)) if wrong_weights is None else np.asarray(wrong_weights, np.float64)
    order = np.argsort(below, kind="stable")
    below, passed = below[order], np.concatenate([[0.0], np.cumsum(other[order])])
    lower = passed[np.searchsorted(below, above, "left")]
    up_to = passed[np.searchsorted(below, above, "right")]
    return float(weight @ (lower + up_to) / 2 / weight.sum() / passed[-1])


# ── distributions ────────────────────────────────────────────────────────────────────────────────


def _quantiles(scores: Scores) -> list[float]:
    return [round(float(one), 4) for one in np.quantile(scores, np.linspace(0, 1, QUANTILES))]


def _share(quantiles: list[float], scores: Scores, *, or_equal: bool = False) -> Scores:
    """Share of a distribution below each score, or not above it; 0 and 1 beyond its ends."""
    known = np.asarray(quantiles)
    first, after = (np.searchsorted(known, scores, side) for side in ("left", "right"))
    met = after > first
    low, high = known[np.maximum(first - 1, 0)], known[np.minimum(first, len(known) - 1)]
    way = np.divide(scores - low, high - low, out=np.zeros_like(scores), where=high > low)
    places = np.where(met, after - 1 if or_equal else first, first - 1 + way)
    shares: Scores = np.clip(places / (len(known) - 1), 0, 1)
    return shares
