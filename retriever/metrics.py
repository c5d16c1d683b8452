"""Retrieval metrics and diagnostics of an embedding space: numpy only, no model, no files.

A query's positives are the candidates that carry its label. With the number of the picture as
label, one definition serves both directions: a caption has one positive picture, a picture has
several positive captions.

Ranks are zero-based. The tie rule: among equal scores the candidate with the lower position in the
gallery ranks first. `Ranks` keeps beside that the best and the worst case, so that a reader sees
how much a number owes to the rule.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

KS = (1, 5, 10)
TIE_RULE = "among equal scores the lower candidate position ranks first"

# Scores held at a time: 64 MiB of float64, whatever the size of the gallery.
_SCORES_AT_A_TIME = 1 << 23


@dataclass(frozen=True, slots=True)
class Ranks:
    """Zero-based rank of the best positive of each query, three (q,) int64 arrays.

    Attributes:
        ranks: by the tie rule.
        optimistic: as if the positive came first among the candidates of its score.
        pessimistic: as if it came after every negative of its score.
    """

    ranks: NDArray[np.int64]
    optimistic: NDArray[np.int64]
    pessimistic: NDArray[np.int64]

    @property
    def tied(self) -> int:
        """How many queries have a negative with exactly the score of their best positive."""
        return int(np.count_nonzero(self.optimistic != self.pessimistic))


def ranks_of_positives(
    queries: NDArray[np.floating],
    gallery: NDArray[np.floating],
    query_labels: NDArray[np.integer],
    gallery_labels: NDArray[np.integer],
    *,
    chunk: int | None = None,
) -> Ranks:
    """Place of the best positive of each query in the gallery ordered by score, zero-based.

    The score is the dot product, rounded to float32.

    Args:
        queries: (q, d) float.
        gallery: (g, d) float.
        query_labels: (q,) int.
        gallery_labels: (g,) int; a candidate with the query's label is a positive.
        chunk: queries scored at a time, by default what fits in 64 MiB; no effect on the result.

    Raises:
        ValueError: shapes that do not fit, a value that is not finite, a query without a positive.
    """
    _check_rows(queries, gallery)
    if len(queries) != len(query_labels) or len(gallery) != len(gallery_labels):
        raise ValueError("one label for each query and each candidate is needed")
    if not np.isin(query_labels, gallery_labels).all():
        raise ValueError("a query has no positive in the gallery")
    chunk = chunk or max(1, _SCORES_AT_A_TIME // len(gallery))
    candidates = gallery.astype(np.float64).T
    places = np.arange(len(gallery))
    result = np.empty((3, len(queries)), np.int64)
    for start in range(0, len(queries), chunk):
        block = slice(start, start + chunk)
        scores = _scores(queries[block], candidates)
        positive = query_labels[block, None] == gallery_labels[None, :]
        best = np.where(positive, scores, -np.inf).max(axis=1, keepdims=True)
        higher = np.count_nonzero(scores > best, axis=1)
        equal = scores == best
        first = (equal & positive).argmax(axis=1)
        result[0, block] = higher + np.count_nonzero(equal & (places < first[:, None]), axis=1)
        result[1, block] = higher
        result[2, block] = higher + np.count_nonzero(equal & ~positive, axis=1)
    return Ranks(*result)


def top_k(
    queries: NDArray[np.floating],
    gallery: NDArray[np.floating],
    k: int,
    *,
    chunk: int | None = None,
) -> NDArray[np.int64]:
    """(q, min(k, g)) positions of the best candidates of each query, exactly, best first.

    Scores and tie rule are those of `ranks_of_positives`.

    Args:
        queries: (q, d) float.
        gallery: (g, d) float.
        k: candidates wanted, at least 1.
        chunk: queries scored at a time, by default what fits in 64 MiB; no effect on the result.

    Raises:
        ValueError: shapes that do not fit, a value that is not finite, or k < 1.
    """
    _check_rows(queries, gallery)
    _check_k(k)
    k = min(k, len(gallery))
    chunk = chunk or max(1, _SCORES_AT_A_TIME // len(gallery))
    candidates = gallery.astype(np.float64).T
    best = np.empty((len(queries), k), np.int64)
    for start in range(0, len(queries), chunk):
        scores = _scores(queries[start : start + chunk], candidates)
        thresholds = np.partition(scores, len(gallery) - k, axis=1)[:, len(gallery) - k]
        for place, (row, threshold) in enumerate(zip(scores, thresholds, strict=True), start):
            positions = np.flatnonzero(row >= threshold)
            best[place] = positions[np.argsort(-row[positions], kind="stable")[:k]]
    return best


def recall_at_k(ranks: NDArray[np.int64], k: int) -> float:
    """Share of queries whose best positive is among the first k candidates.

    This is R@k as cross-modal papers report it: a hit rate, 0 or 1 for each query, not the share of
    all positives found. Faghri et al. 2018 (VSE++), arXiv:1707.05612.

    Args:
        ranks: (q,) int64, zero-based rank of the best positive.
        k: candidates looked at, at least 1.

    Returns:
        A share in [0, 1]; tables show it times 100.

    Raises:
        ValueError: `ranks` is empty or k < 1.
    """
    _check_ranks(ranks)
    _check_k(k)
    return float(np.mean(ranks < k))


def median_rank(ranks: NDArray[np.int64]) -> float:
    """MedR: the median of the zero-based ranks, rounded down, plus one; 1 is best.

    Raises:
        ValueError: `ranks` is empty.
    """
    _check_ranks(ranks)
    return float(np.floor(np.median(ranks)) + 1)


def mean_rank(ranks: NDArray[np.int64]) -> float:
    """MeanR: the mean of the zero-based ranks plus one; 1 is best.

    Raises:
        ValueError: `ranks` is empty.
    """
    _check_ranks(ranks)
    return float(np.mean(ranks) + 1)


def rsum(metrics: Mapping[str, float]) -> float:
    """Sum of R@1, R@5 and R@10 of both directions, in the unit of `metrics`: percent, up to 600.

    Args:
        metrics: with the keys `t2i_r@1`, `t2i_r@5`, `t2i_r@10` and the same of `i2t`.
    """
    return sum(metrics[f"{direction}_r@{k}"] for direction in ("t2i", "i2t") for k in KS)


def summarise_ranks(
    t2i: NDArray[np.int64], i2t: NDArray[np.int64], ks: Sequence[int] = KS
) -> dict[str, float]:
    """The table of both directions from the ranks of their queries: recalls and rSum in percent.

    Args:
        t2i: (m,) zero-based rank of each caption's picture.
        i2t: (n,) zero-based rank of each picture's best caption.
        ks: the k of the recalls; rSum is there when they hold 1, 5 and 10.

    Returns:
        `t2i_r@1`, …, `t2i_medr`, `t2i_meanr`, the same of `i2t`, and `rsum`.
    """
    metrics: dict[str, float] = {}
    for direction, ranks in (("t2i", t2i), ("i2t", i2t)):
        metrics |= {f"{direction}_r@{k}": 100 * recall_at_k(ranks, k) for k in ks}
        metrics[f"{direction}_medr"] = median_rank(ranks)
        metrics[f"{direction}_meanr"] = mean_rank(ranks)
    if set(KS) <= set(ks):
        metrics["rsum"] = rsum(metrics)
    return metrics


def retrieval_metrics(
    images: NDArray[np.floating], texts: NDArray[np.floating], text_image: NDArray[np.integer]
) -> dict[str, float]:
    """Both directions of cross-modal retrieval over one gallery, without intervals.

    Args:
        images: (n, d) float, unit rows, one for each picture.
        texts: (m, d) float, unit rows, one for each caption.
        text_image: (m,) int, the row in `images` that each caption describes; each row has one.

    Returns:
        The keys of `summarise_ranks`: recalls and `rsum` in percent, ranks one-based.

    Raises:
        ValueError: as `ranks_of_positives`.
    """
    pictures = np.arange(len(images))
    t2i = ranks_of_positives(texts, images, text_image, pictures)
    i2t = ranks_of_positives(images, texts, pictures, text_image)
    return summarise_ranks(t2i.ranks, i2t.ranks)


def overlap_at_k(exact: Sequence[ArrayLike], found: Sequence[ArrayLike], k: int) -> float:
    """Share of the exact first k that another search also returned among its first k.

    Elsewhere called the recall of an approximate index; a search that returns fewer than k loses
    for it, and where fewer than k candidates exist the share is of those that do.

    Args:
        exact: for each query the ids that exact search returns, best first.
        found: the same of the search that is judged.
        k: candidates looked at, at least 1.

    Raises:
        ValueError: no queries, a different number of them, no candidates, or k < 1.
    """
    if k < 1 or not len(exact) or len(exact) != len(found):
        raise ValueError("overlap needs k ≥ 1 and the same queries, at least one, on both sides")
    wanted = [np.asarray(ids)[:k] for ids in exact]
    hits = sum(
        np.isin(ids, np.asarray(other)[:k]).sum() for ids, other in zip(wanted, found, strict=True)
    )
    total = sum(len(ids) for ids in wanted)
    if not total:
        raise ValueError("exact search returned no candidates")
    return float(hits / total)


def bootstrap_interval(
    statistic: Callable[[NDArray[np.int64]], Mapping[str, float]],
    sizes: Sequence[int],
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap intervals of several statistics at once, drawing pictures.

    Captions of one picture succeed and fail together, so pictures are drawn, not captions: a
    picture drawn twice counts twice with all its captions. Efron & Tibshirani 1993, chapter 13.

    Args:
        statistic: of how often each picture was drawn, (n,) int64, the numbers by name.
        sizes: pictures in each stratum, n in all; each is drawn from separately, so that folds stay
            folds. One number when there are none.
        resamples: drawings.
        confidence: the share of drawings within the interval.
        seed: of the drawings.

    Returns:
        (lower, upper) by name.

    Raises:
        ValueError: no resamples, an empty stratum or a confidence outside (0, 1).
    """
    if resamples < 1 or not 0 < confidence < 1 or not sizes or min(sizes) < 1:
        raise ValueError("a bootstrap needs resamples, pictures and a confidence between 0 and 1")
    rng = np.random.default_rng(seed)
    drawn = [
        statistic(
            np.concatenate([np.bincount(rng.integers(n, size=n), minlength=n) for n in sizes])
        )
        for _ in range(resamples)
    ]
    tail = (1 - confidence) / 2
    intervals = {}
    for name in drawn[0]:
        lower, upper = np.quantile([each[name] for each in drawn], [tail, 1 - tail])
        intervals[name] = (float(lower), float(upper))
    return intervals


def alignment(images: NDArray[np.floating], texts: NDArray[np.floating]) -> float:
    """Mean squared distance of positive pairs, in [0, 4]; 0 when partners coincide.

    Wang & Isola 2020 with α = 2, arXiv:2005.10242.

    Args:
        images: (n, d) float, unit rows.
        texts: (n, d) float, unit rows; row i is a caption of row i of `images`.
    """
    _check_rows(images, texts)
    if len(images) != len(texts):
        raise ValueError("alignment compares row with row: both sides need as many")
    difference = images.astype(np.float64) - texts.astype(np.float64)
    return float(np.square(difference).sum(axis=1).mean())


def uniformity(rows: NDArray[np.floating], t: float = 2.0) -> float:
    """Log of the mean Gaussian potential over all pairs of different rows, at most 0.

    0 when all rows are one point (collapse), about −2t when they spread over the sphere. Wang &
    Isola 2020, arXiv:2005.10242.

    Args:
        rows: (n, d) float, unit rows, n ≥ 2.
        t: steepness of the potential.
    """
    _check_rows(rows, rows)
    n = len(rows)
    if n < 2:
        raise ValueError("uniformity is about pairs: at least two rows are needed")
    wide = rows.astype(np.float64)
    squares = np.square(wide).sum(axis=1)
    total = 0.0
    chunk = max(1, _SCORES_AT_A_TIME // n)
    for start in range(0, n, chunk):
        block = slice(start, start + chunk)
        # Pairs are the same in both orders, so what is right of this block counts for below, too.
        distances = squares[block, None] + squares[start:] - 2 * wide[block] @ wide[start:].T
        potentials = np.exp(-t * distances.clip(min=0))
        total += float(potentials[:, :chunk].sum() + 2 * potentials[:, chunk:].sum())
    # Each row meets itself once, with potential 1.
    return float(np.log((total - n) / (n * (n - 1))))


def modality_gap(images: NDArray[np.floating], texts: NDArray[np.floating]) -> float:
    """Distance between the mean picture and the mean caption, in [0, 2].

    Liang et al. 2022, arXiv:2203.02053.

    Args:
        images: (n, d) float, unit rows.
        texts: (m, d) float, unit rows.
    """
    _check_rows(images, texts)
    gap = images.mean(axis=0, dtype=np.float64) - texts.mean(axis=0, dtype=np.float64)
    return float(np.linalg.norm(gap))


def _scores(queries: NDArray[np.floating], candidates: NDArray[np.float64]) -> NDArray[np.float32]:
    """(c, g) scores of (c, d) queries and (d, g) candidates.

    Added up in float64, then rounded: the order in which a matrix product adds up depends on its
    shape, and in float32 its last bits would decide between equal rows.
    """
    return (queries.astype(np.float64) @ candidates).astype(np.float32)


def _check_rows(left: NDArray[np.floating], right: NDArray[np.floating]) -> None:
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[1]:
        raise ValueError(f"(q, d) and (g, d) are needed, got {left.shape} and {right.shape}")
    if not len(left) or not len(right):
        raise ValueError("no rows")
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        raise ValueError("an embedding is not finite")


def _check_ranks(ranks: NDArray[np.int64]) -> None:
    if not len(ranks):
        raise ValueError("no ranks: there were no queries")


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k is {k}, but must be at least 1")
