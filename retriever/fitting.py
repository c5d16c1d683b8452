"""What each channel is worth in a library, measured by its own captions.

A caption is a query whose right answer is known. So of each picture in a sample one caption is held
out: it is asked for, and neither the caption channel nor the words know it. Half of the queries fit
the weights, the other half measures what came of them.

A caption that several pictures share, as a label is, is held out of all of them and asked once, and
each of them is a right answer: the best one counts. A picture loses only one caption that way, so
that something is left to find it by.

The weights are those of a softmax regression: the chance that a picture is the one asked for is
taken to grow with exp(b · channels), and b is what makes the right answers likeliest among all of
the sample. That is convex, done in a few Newton steps, and finds on Flickr8k what trying a grid of
weights by R@1 does, without the grid's noise. A weak prior, the same in standard deviations of each
channel, stands in for queries where there are few. Only the weights' proportions count for the
order, so they are made to sum to 1, and the fused score is a mean of the channels.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from indexes import words
from indexes.filters import Compare
from indexes.records import Fit, unit_rows
from retriever import calibration
from retriever.channels import CHANNELS, FALLBACK, MODES, Channel, Fusion, Mode
from retriever.metrics import bootstrap_interval

if TYPE_CHECKING:
    from indexes.store import Snapshot, Store
    from retriever.encoders import Encoder

Rows = NDArray[np.float32]
Places = NDArray[np.int64]
Scores = NDArray[np.float32]
Mask = NDArray[np.bool_]

# A library is fitted anew when so much of it is others than it was.
OUTGROWN = 0.2
# Fewer pictures are looked through at a glance: nothing is measured of them, and nobody waits.
FEWEST_PICTURES = 10
# Pictures and queries of a sample: a second's work. Half of the queries tell a recall to 4 points;
# the weights of Flickr8k's 8,000 pictures are those of 2,000 to two digits.
GALLERY, QUERIES = 2_000, 1_000
CAPTIONS = 4_000  # with which texts are compared that should be about something else
SEED = 0
# With fewer queries nothing is measured, and a library goes on searching by its pictures alone.
FEWEST = 30
KS = (1, 10)
# Queries scored at a time: against 10,000 captions, 10 MiB.
BLOCK = 256
# The prior, in standard deviations of the channels over all pairs: the weights that the bundled
# model's channels have on Flickr8k, give or take 1; the line of pictures without captions, give or
# take 3 at its foot. Queries outweigh it from some tens on.
PRIOR = (1.0, 2.6, 0.4)
BARE_PRIOR = (5.0, 3.0)
STEPS = 25


@dataclass(frozen=True, slots=True, eq=False)
class _Words:
    """The words of some pictures, and what each is worth to a query that has it.

    The same score as `indexes.words` has of a table, for thousands of queries at once.
    """

    idf: Mapping[str, float]
    found: Mapping[str, tuple[Places, Scores]]
    unknown: float  # the idf of a word that none has
    count: int

    @classmethod
    def of(cls, rows: Sequence[words.Row]) -> _Words:
        """Of rows as the table takes them, numbered from 0."""
        gathered: dict[str, list[tuple[int, int]]] = {}
        lengths = np.zeros(len(rows))
        for term, place, times in _terms(rows):
            gathered.setdefault(term, []).append((place, times))
            lengths[place] += times
        damping = words.damping(lengths)
        idf: dict[str, float] = {}
        found: dict[str, tuple[Places, Scores]] = {}
        for term, pairs in gathered.items():
            idf[term] = words.idf(len(rows), len(pairs))
            places, often = np.array(pairs, dtype=np.int64).T
            # Of what the word could weigh, idf (k1 + 1), the share that it does.
            worth = idf[term] * often / (often + damping[places])
            found[term] = places, worth.astype(np.float32)
        return cls(idf, found, words.idf(len(rows), 0), len(rows))

    def scores(self, texts: Sequence[str]) -> Scores:
        """(q, n) float32 in [0, 1]."""
        scores = np.zeros((len(texts), self.count), dtype=np.float32)
        most = np.zeros(len(texts))
        queries = [(at, " ".join(words.asked(text)), "", "") for at, text in enumerate(texts)]
        for term, at, _ in _terms(queries):
            most[at] += self.idf.get(term, self.unknown)
            if term in self.found:
                places, worth = self.found[term]
                scores[at, places] += worth
        scores /= np.maximum(most, words.LEAST_IDF)[:, None].astype(np.float32)
        return scores


def _terms(rows: Sequence[words.Row]) -> list[tuple[str, int, int]]:
    """Each word as SQLite stems it, with each row that has it and how often."""
    with closing(sqlite3.connect(":memory:")) as database:
        words.create(database)
        words.put(database, rows)
        return database.execute(
            "SELECT term, doc, count(*) FROM words_places GROUP BY term, doc"
        ).fetchall()


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Pictures of a library, and captions of some of them that are held out as queries.

    pictures: (n, d) unit rows. captions: (m, d) unit rows, those not held out. owners: (m,) the
    place in `pictures` of each, ascending. texts: of `captions`. queries: (q, d) unit rows of what
    is held out. asked: their texts, all different. own: (q,) the place of a picture that each is
    of. also: (q, n) which other pictures it is of. words: of the pictures, without what is held
    out.
    """

    pictures: Rows
    captions: Rows
    owners: Places
    texts: tuple[str, ...]
    queries: Rows
    asked: tuple[str, ...]
    own: Places
    also: Mask
    words: _Words

    @classmethod
    def of(
        cls, store: Store, *, count: int = GALLERY, queries: int = QUERIES, seed: int = SEED
    ) -> Sample:
        """At most `count` pictures and `queries` captions of a store, the same ones each time.

        Pictures with captions come first as far as they are asked for; a copy of one that is there
        is left out, because its captions give the answer away. What is asked of a picture with two
        different captions or more is one of them, of those that fewest pictures share; nothing is
        asked that a picture has which lost a caption already. Another picture is there with what it
        has.
        """
        rng = np.random.default_rng(seed)
        with store.snapshot() as rows:
            everything = np.array(rows.item_ids(), dtype=np.int64)
            captioned = rows.select(Compare("captions", ">=", 2))
            first = rng.permutation(captioned)[: min(queries, count)]
            others = rng.permutation(np.setdiff1d(everything, first))[: count - len(first)]
            found = _read(rows, [*first.tolist(), *others.tolist()])
        holders: dict[str, set[int]] = {}
        for place, picture in enumerate(found):
            for text in picture.texts.values():
                holders.setdefault(text, set()).add(place)
        held: dict[str, tuple[int, int]] = {}  # of each text, a picture and the caption there
        lost: set[int] = set()
        for place, picture in enumerate(found):
            if len(set(picture.texts.values())) < 2 or len(held) == queries:
                continue
            free = [one for one, text in picture.texts.items() if lost.isdisjoint(holders[text])]
            # One that all pictures share would leave nothing else to ask.
            least = min((len(holders[picture.texts[one]]) for one in free), default=0)
            free = [one for one in free if len(holders[picture.texts[one]]) == least]
            if free:
                one = free[rng.integers(len(free))]
                held[picture.texts[one]] = place, one
                lost |= holders[picture.texts[one]]
        kept = [
            (place, one)
            for place, picture in enumerate(found)
            for one, text in picture.texts.items()
            if text not in held
        ]
        own = np.array([place for place, _ in held.values()], dtype=np.int64)
        also = np.zeros((len(held), len(found)), dtype=bool)
        for row, text in enumerate(held):
            also[row, [*holders[text]]] = True
        also[np.arange(len(held)), own] = False
        dim = store.model.dim
        return cls(
            pictures=unit_rows([picture.vector for picture in found], dim),
            captions=unit_rows([found[place].vectors[one] for place, one in kept], dim),
            owners=np.array([place for place, _ in kept], dtype=np.int64),
            texts=tuple(found[place].texts[one] for place, one in kept),
            queries=unit_rows([found[place].vectors[one] for place, one in held.values()], dim),
            asked=tuple(held),
            own=own,
            also=also,
            words=_Words.of(
                [
                    words.row(
                        place,
                        [text for text in picture.texts.values() if text not in held],
                        picture.file,
                        picture.root,
                    )
                    for place, picture in enumerate(found)
                ]
            ),
        )

    def channels(self, rows: Rows, texts: Sequence[str]) -> dict[Channel, Scores]:
        """What each channel gives to each picture of the sample: (q, n) float32 by name.

        Args:
            rows: (q, d) unit rows of the texts.
            texts: what was asked; a caption that says just that is not looked at.
        """
        image = rows @ self.pictures.T
        caption = np.full_like(image, np.nan)
        if len(self.owners):
            same: dict[str, list[int]] = {}
            for place, text in enumerate(self.texts):
                same.setdefault(text, []).append(place)
            firsts = np.flatnonzero(np.diff(self.owners, prepend=-1))
            for start in range(0, len(rows), BLOCK):
                cosines = rows[start : start + BLOCK] @ self.captions.T
                for at, text in enumerate(texts[start : start + BLOCK]):
                    cosines[at, same.get(text, [])] = np.nan
                nearest = np.fmax.reduceat(cosines, firsts, axis=1)
                caption[start : start + BLOCK, self.owners[firsts]] = nearest
        return {"image": image, "caption": caption, "words": self.words.scores(texts)}


@dataclass(frozen=True, slots=True, eq=False)
class _Picture:
    """A picture with the captions that are embedded, texts and vectors by id."""

    file: str
    root: str
    vector: Any
    texts: dict[int, str]
    vectors: dict[int, Any]


def _read(rows: Snapshot, ids: Sequence[int]) -> list[_Picture]:
    """Those pictures that are embedded, in the order asked, each content once."""
    items, pictures = rows.items(ids), rows.embeddings("image", ids)
    captions = rows.captions(rows.caption_ids(ids))
    vectors = rows.embeddings("caption", captions)
    found: dict[bytes | int, _Picture] = {}
    by_id: dict[int, _Picture] = {}
    for item_id in ids:
        if item_id in pictures and (content := items[item_id].content_hash or item_id) not in found:
            item = items[item_id]
            by_id[item_id] = _Picture(item.file, item.root.name, pictures[item_id], {}, {})
            found[content] = by_id[item_id]
    for caption_id, vector in vectors.items():
        item_id, caption = captions[caption_id]
        if item_id in by_id:
            by_id[item_id].texts[caption_id] = caption.text
            by_id[item_id].vectors[caption_id] = vector
    return [*found.values()]


def fit(
    store: Store,
    encoder: Callable[[], Encoder] | None = None,
    *,
    stop: Callable[[], bool] | None = None,
) -> Fit | None:
    """What channels and scores are worth in a store, to be recorded; None if stopped.

    Args:
        store: what is measured; it is only read.
        encoder: gives the encoder of the store's embeddings, which texts that describe nothing in
            the store are read with; without it, text queries get no confidence.
        stop: asked between steps of a second or so.

    Raises EncoderError, MissingExtraError: the encoder cannot be had.
    """
    with store.snapshot() as rows:
        change = rows.version()[1]
        pictures, captions = rows.vector_count("image"), rows.vector_count("caption")
    sample = Sample.of(store)
    if stop is not None and stop():
        return None
    held = sample.channels(sample.queries, sample.asked)
    fusion, record = weigh(held, sample.own, sample.also)
    if stop is not None and stop():
        return None
    by_mode: dict[str, calibration.Sample] = {}
    if encoder is not None and len(sample.pictures):
        texts = calibration.background()
        rows_of = encoder().encode_texts(texts)
        if stop is not None and stop():
            return None
        by_mode = compare(sample, held, fusion, texts, rows_of, pictures)
    facts: dict[str, Any] = {
        "captions": captions,
        "channels": record,
        "calibration": calibration.fit(by_mode, calibration.nearest_others(store)),
    }
    means = np.zeros((2, store.model.dim), dtype=np.float32)
    told = np.concatenate([sample.captions, sample.queries])
    for place, several in enumerate((sample.pictures, told)):
        if len(several):
            means[place] = several.mean(axis=0, dtype=np.float64)
    return Fit(change, pictures, facts, means)


def compare(
    sample: Sample,
    held: Mapping[Channel, Scores],
    fusion: Fusion,
    texts: Sequence[str],
    rows: Rows,
    count: int,
) -> dict[str, calibration.Sample]:
    """Scores of captions with their own pictures, and of unrelated texts with the best of all.

    Both are those of a library of `count` pictures, which need not be looked through. A right
    picture stands as many times further down in it as it is larger than the sample. The best of
    all grows with the logarithm of their number, as that of any sample whose tail falls
    exponentially; by how much is seen in a quarter of the sample.
    """
    # What several pictures share is looked at once, as of the first of them: it should not be
    # taken for two captions that say the same of different pictures.
    firsts = {text: place for place, text in reversed([*enumerate(sample.texts)])}
    once = np.array(sorted(firsts.values()), dtype=np.int64)
    told = np.concatenate([sample.captions[once], sample.queries])
    owners = np.concatenate([sample.owners[once], sample.own])
    some = slice(None, None, 1 + len(told) // CAPTIONS)
    is_unrelated = calibration.unrelated(rows, told[some], owners[some])
    texts = [text for text, kept in zip(texts, is_unrelated, strict=True) if kept]
    others = sample.channels(rows[is_unrelated], texts)
    larger = max(1.0, count / max(1, len(sample.pictures)))
    quarter = np.random.default_rng(SEED).random(len(sample.pictures)) < 1 / 4
    found: dict[str, calibration.Sample] = {}
    for mode in MODES if len(sample.owners) else MODES[:1]:
        right, wrong = (_of_mode(mode, one, fusion) for one in (held, others))
        best = wrong.max(axis=1)
        if larger > 1 and quarter.any():  # of copies of one picture or two, there is none
            growth = (best - wrong[:, quarter].max(axis=1)).mean() / -math.log(quarter.mean())
            best = best + growth * math.log(larger)
        ranks = _ranks(np.where(sample.also, -np.inf, right), sample.own)
        is_shown = ranks * larger < calibration.SHOWN
        pairs = right[np.flatnonzero(is_shown), sample.own[is_shown]]
        found[mode] = calibration.Sample(pairs.astype(np.float64), best.astype(np.float64))
    return found


def _of_mode(mode: Mode, channels: Mapping[Channel, Scores], fusion: Fusion) -> Scores:
    """The scores of a mode, (q, n); a picture without captions has -1 by captions."""
    scores = fusion.fuse(channels) if mode == "hybrid" else channels[mode]
    return np.where(np.isnan(scores), np.float32(-1), scores)


def weigh(
    held: Mapping[Channel, Scores], own: Places, also: Mask | None = None, *, seed: int = SEED
) -> tuple[Fusion, dict[str, Any]]:
    """The fusion that puts the right pictures first, and what it was measured to be worth.

    Args:
        held: (q, n) of each channel, of queries whose caption is held out.
        own: (q,) the place of the right picture of each.
        also: (q, n) which others are right, too: the first of all that are right is measured, and
            the weights are fitted as if these others were not there. None: no others.
        seed: of which queries fit and which measure, and of the intervals.

    Returns:
        The fusion, and the record of it that a store keeps: its `facts`; "queries" that measured
        it; "measured": by mode "r@1" and "r@10" in percent, each with "…_interval"; "default": the
        mode of a library's text queries, hybrid if it finds more at once than pictures alone do.
    """
    order = np.random.default_rng(seed).permutation(len(own))
    fits, measures = np.sort(order[: len(own) // 2]), np.sort(order[len(own) // 2 :])
    stacked = np.stack([held[name] for name in CHANNELS])
    also = np.zeros(stacked.shape[1:], dtype=bool) if also is None else also
    fusion = _fitted(stacked[:, fits], own[fits], also[fits], seed)
    record: dict[str, Any] = {**fusion.facts(), "queries": 0, "measured": {}, "default": "image"}
    if len(own) >= FEWEST:
        part = {name: scores[measures] for name, scores in held.items()}
        right = also[measures]
        right[np.arange(len(measures)), own[measures]] = True
        ranks: dict[Mode, Places] = {}
        for mode in MODES:
            scores = _of_mode(mode, part, fusion)
            ranks[mode] = _ranks(scores, np.where(right, scores, -np.inf).argmax(axis=1))
        record |= _measured(ranks, seed)
    return fusion, record


def _fitted(channels: Scores, own: Places, also: Mask, seed: int) -> Fusion:
    """The fusion that makes `own` of (3, q, n) channel scores likeliest of all but `also`."""
    image, caption, _ = channels
    has_none = np.isnan(caption)
    if not channels[:, ~has_none].size:
        return FALLBACK
    spread = np.array([one[~has_none].std() for one in channels], dtype=np.float64)
    spread = np.where(spread > 0, spread, 1.0)
    prior = np.array(PRIOR) / spread
    known = np.where(has_none | also, -np.inf, 0.0).astype(np.float32)
    filled = np.nan_to_num(channels, nan=0.0)
    weights = _likeliest(filled, own, prior, 1 / spread, np.zeros(3), known)
    total = weights.sum()
    if not total > 0:
        return FALLBACK
    # Of pictures without captions: the line that makes the right ones likeliest when the captions
    # of half of all pictures are taken away.
    bare = (np.random.default_rng(seed).random(image.shape[1]) < 0.5) | has_none
    scored = np.tensordot(weights.astype(np.float32), filled, 1)
    scored[bare] = 0.0
    scored[has_none] = np.float32(weights[2]) * channels[2][has_none]
    scored[also] = -np.inf
    ones = bare.astype(np.float32)
    foot, slope = _likeliest(
        np.stack([ones, ones * image]),
        own,
        np.array([BARE_PRIOR[0], BARE_PRIOR[1] / spread[0]]),
        np.array([3.0, 1 / spread[0]]),
        np.array([-np.inf, 0.0]),
        scored,
    )
    fitted = {name: float(weight / total) for name, weight in zip(CHANNELS, weights, strict=True)}
    return Fusion(fitted, (float(foot / total), float(slope / total)))


def _likeliest(
    features: Scores, own: Places, prior: Any, deviation: Any, least: Any, offset: Scores
) -> NDArray[np.float64]:
    """Factors (c,), at least `least`, of features (c, q, n) that make softmax choose `own` (q,).

    The maximum of the posterior under independent normal priors, by Newton's method, each step cut
    off at the bounds and halved until it climbs; a factor at its bound moves only away from it.
    Bertsekas 1982, "Projected Newton methods". `offset` (q, n) is added to the sum.
    """
    queries = np.arange(len(own))

    def climb(factors: NDArray[np.float64]) -> tuple[float, Scores]:
        logits = np.tensordot(factors.astype(np.float32), features, 1) + offset
        logits -= logits.max(axis=1, keepdims=True)
        chosen = logits[queries, own]
        chances = np.exp(logits)
        totals = chances.sum(axis=1, keepdims=True)
        chances /= totals
        likelihood = float(chosen.sum(dtype=np.float64) - np.log(totals).sum(dtype=np.float64))
        return likelihood - 0.5 * float((((factors - prior) / deviation) ** 2).sum()), chances

    factors = np.array(prior, dtype=np.float64)
    height, chances = climb(factors)
    for _ in range(STEPS):
        means = np.stack([(chances * one).sum(axis=1) for one in features])
        slope = (features[:, queries, own] - means).sum(axis=1) - (factors - prior) / deviation**2
        curve = np.diag(1 / deviation**2)
        for row, one in enumerate(features):
            weighted = chances * one
            for column in range(row, len(features)):
                curve[row, column] += float(np.vdot(weighted, features[column]))
                curve[row, column] -= float(np.vdot(means[row], means[column]))
                curve[column, row] = curve[row, column]
        free = (factors > least) | (slope > 0)
        step = np.zeros(len(factors))
        step[free] = np.linalg.solve(curve[np.ix_(free, free)], slope[free])
        length, gained = 1.0, 0.0
        while gained <= 0 and length > 1e-3:
            tried = np.maximum(factors + length * step, least)
            reached, there = climb(tried)
            gained = reached - height
            length /= 2
        if gained <= 0:
            break
        factors, height, chances = tried, reached, there
        if gained < 1e-3:
            break
    return factors


def _ranks(scores: Scores, own: Places) -> Places:
    """(q,) zero-based places of the right pictures; of equals the first of the gallery is first."""
    right = scores[np.arange(len(own)), own][:, None]
    is_before = np.arange(scores.shape[1]) < own[:, None]
    ranks: Places = ((scores > right) | ((scores == right) & is_before)).sum(axis=1)
    return ranks


def _measured(ranks: Mapping[Mode, Places], seed: int) -> dict[str, Any]:
    """Recalls of each mode with intervals, and which mode should be the default."""
    hits = {f"{mode}_r@{k}": 100.0 * (found < k) for mode, found in ranks.items() for k in KS}
    hits["gain"] = hits["hybrid_r@1"] - hits["image_r@1"]
    table = np.stack([*hits.values()])
    count = table.shape[1]

    def recalls(drawn: Places) -> dict[str, float]:
        return dict(zip(hits, (table @ drawn / count).tolist(), strict=True))

    intervals = bootstrap_interval(recalls, [count], seed=seed)
    found = recalls(np.ones(count, dtype=np.int64))
    return {
        "queries": count,
        "measured": {
            mode: {f"r@{k}": round(found[f"{mode}_r@{k}"], 2) for k in KS}
            | {f"r@{k}_interval": [round(one, 2) for one in intervals[f"{mode}_r@{k}"]] for k in KS}
            for mode in ranks
        },
        "default": "hybrid" if intervals["gain"][0] > 0 else "image",
    }


def is_due(store: Store) -> bool:
    """Whether the library has changed by so much since it was fitted that it should be again."""
    with store.snapshot() as rows:
        pictures, captions = rows.vector_count("image"), rows.vector_count("caption")
        before = rows.fit()
        if before is None:
            return pictures >= FEWEST_PICTURES
        fresh = rows.vector_count("image", after=before.change)
        told = rows.vector_count("caption", after=before.change)
    described = int(before.facts.get("captions", 0))
    changed = fresh + max(0, before.rows + fresh - pictures)
    retold = told + max(0, described + told - captions)
    return changed > OUTGROWN * before.rows or retold > OUTGROWN * described
