"""Channels: what a query says of each picture by its look, by its captions and by its words.

    image    the cosine between the query and the picture
    caption  the cosine between the query and that caption of the picture which is nearest
    words    how much of what the query's words could weigh the picture's words do, in [0, 1]

All three grow with relevance and none depends on what else was found, so their mean, weighted by
what each was worth on captions of this very library (see `retriever.fitting`), is a score as each
of them is: comparable between queries, which a sum of reciprocal ranks is not.

The best of the mean need not be among the best of any one channel. The search goes down all of
them together until nothing unseen can come between (Fagin, Lotem & Naor 2003, "Optimal aggregation
algorithms for middleware"), or until it is below the 400 best of each, where hardly anything does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from concurrent.futures import wait
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from indexes.records import KINDS
from indexes.threads import Threads
from indexes.words import SCORED

if TYPE_CHECKING:
    from indexes.records import Kind, Source, Term, WordMatch
    from indexes.store import Store

Channel = Literal["image", "caption", "words"]
CHANNELS: tuple[Channel, ...] = ("image", "caption", "words")
Mode = Literal["image", "caption", "words", "hybrid"]
MODES: tuple[Mode, ...] = (*CHANNELS, "hybrid")

Ids = NDArray[np.int64]
Rows = NDArray[np.float32]
Scores = NDArray[np.float32]

# How deep the channels are gone down at first, and when that does not settle it. At the first depth
# 299 of 300 answers to captions of Flickr8k are known to be those of looking everywhere; to go as
# deep costs little where everything is looked at. An approximate index is tuned for less.
DEPTH = 200
DEPTH_PER_RESULT = 10
TUNED = 100
DEEPEST = 400
ASIDE = Threads("aside")  # for one part of a query while another is looked for
# Captions looked at for each picture wanted, at first: several of one picture lie together.
CAPTIONS_PER_PICTURE = 3


@dataclass(frozen=True, slots=True)
class Fusion:
    """How the channels become one score.

    weights: of the channels, none negative, 1 in all.
    bare: (intercept, slope): what a picture without captions has instead, by its image score, so
        that it is put last for having none no more than first; its words count as for others.
    """

    weights: Mapping[Channel, float]
    bare: tuple[float, float]

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Fusion:
        """Of what `facts` wrote; raises KeyError, TypeError or ValueError for anything else."""
        at, slope = facts["bare"]
        weights = {name: float(facts["weights"][name]) for name in CHANNELS}
        return cls(weights, (float(at), float(slope)))

    def facts(self) -> dict[str, Any]:
        """The same as JSON can hold it."""
        return {
            "weights": {name: round(weight, 4) for name, weight in self.weights.items()},
            "bare": [round(one, 4) for one in self.bare],
        }

    def fuse(self, channels: Mapping[Channel, NDArray[np.floating]]) -> Scores:
        """The score, from arrays of one shape; without captions a caption score is NaN."""
        image, caption, words = (channels[name] for name in CHANNELS)
        at, slope = self.bare
        mean = self.weights["image"] * image + self.weights["caption"] * caption
        fused = np.where(np.isnan(caption), at + slope * image, mean)
        scores: Scores = (fused + self.weights["words"] * words).astype(np.float32)
        return scores

    def bound(self, last: Mapping[Channel, float]) -> float:
        """The most that a picture can have that has at most `last` in each channel."""
        at, slope = self.bare
        mean = self.weights["image"] * last["image"] + self.weights["caption"] * last["caption"]
        return max(mean, at + slope * last["image"]) + self.weights["words"] * last["words"]


# What was fitted on Flickr8k, for libraries that have too few captions to be fitted themselves.
FALLBACK = Fusion({"image": 0.2, "caption": 0.5, "words": 0.3}, (0.2, 0.6))
NOTHING: Mapping[Channel, float] = {"image": -1.0, "caption": -1.0, "words": 0.0}


@dataclass(frozen=True, slots=True, eq=False)
class Ranking:
    """Pictures, best first; equal scores are ordered by id.

    ids: (n,) int64. scores: (n,) float32, of the mode that was asked for. channels: those that the
    mode needs, (n,) float32 each; NaN where a picture has no captions. is_all: there are no others.
    terms: the words of the query, if they were looked for.
    """

    ids: Ids
    scores: Scores
    channels: Mapping[Channel, Scores]
    is_all: bool
    terms: tuple[Term, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Channels:
    """One query to a store, as all channels hear it.

    row: (d,) the query's embedding; None if only its words are looked at. text: whose words count.
    source: what `row` is an embedding of. among: ids of the only pictures that may be found,
    ascending; None: any. exact: look at everything, approximate index or not.
    """

    store: Store
    row: Rows | None
    text: str
    source: Source | None = None
    among: Ids | None = None
    exact: bool = False
    fusion: Fusion = field(default=FALLBACK)
    heard: WordMatch | None = None  # what `Store.words` gives, were it known already

    def best(self, mode: Mode, count: int) -> Ranking:
        """The `count` best pictures; fewer only if no others have anything in this mode.

        Without captions a picture has nothing in mode "caption", and without any of the query's
        words nothing in mode "words"; in mode "hybrid" every picture has a score.
        """
        if self.among is not None and not len(self.among):
            return _ranked(np.empty(0, np.int64), np.empty(0, np.float32), {}, is_all=True)
        if mode == "hybrid":
            return self._hybrid(count)
        if mode != "caption":
            return self._channel(mode, count)
        wanted = CAPTIONS_PER_PICTURE * count
        while True:
            found = self._channel("caption", wanted)
            if found.is_all or len(found.ids) >= count:
                return _first(found, count)
            wanted *= 4

    def _channel(self, name: Channel, count: int) -> Ranking:
        """Pictures by one channel: of captions those that the `count` nearest belong to."""
        if name == "words":
            with self.store.snapshot() as rows:
                words = rows.words(self.text, count, among=self.among)
            ids, scores, is_all = words.ids, words.scores, len(words.ids) < count
            return _ranked(ids, scores, {name: scores}, is_all=is_all, terms=words.terms)
        assert self.row is not None
        among: Collection[int] | None = self.among
        if name == "caption" and self.among is not None:
            with self.store.snapshot() as rows:
                among = rows.caption_ids(self.among)
        (match,) = self.store.search(
            name, self.row[None], count, among=among, source=self.source, exact=self.exact
        )
        ids, scores, is_all = match.ids, match.scores, len(match.ids) < count
        if name == "caption":
            owners = self.store.caption_owners(ids)
            order = np.argsort(owners, kind="stable")  # of each picture, the nearest comes first
            # Another process may have removed some since: those have -1.
            is_first = np.diff(owners[order], prepend=-1) > 0
            ids, scores = owners[order][is_first], scores[order][is_first]
        return _ranked(ids, scores, {name: scores}, is_all=is_all)

    def _hybrid(self, count: int) -> Ranking:
        words = self._words()
        depth = max(DEPTH, DEPTH_PER_RESULT * count)
        if count <= TUNED // 2 and not self._is_exact(TUNED):
            depth = TUNED
        while True:
            looked = ASIDE.submit(self._channel, "image", depth)
            try:
                told = self._channel("caption", depth)
            finally:
                wait([looked])
            parts: dict[Channel, Ranking] = {
                "image": looked.result(),
                "caption": told,
                "words": _first(words, depth),
            }
            # A channel that came to its end has nothing for what it has not shown.
            last: dict[Channel, float] = {
                name: NOTHING[name] if part.is_all or not len(part.ids) else float(part.scores[-1])
                for name, part in parts.items()
            }
            found = np.concatenate([part.ids for part in parts.values()])
            is_exact = self._is_exact(depth)
            ranking = self._fused(_distinct(found), parts, words, last, count, is_exact=is_exact)
            ranking = replace(ranking, is_all=ranking.is_all and parts["image"].is_all)
            is_sure = len(ranking.ids) >= count and ranking.scores[count - 1] >= self.fusion.bound(
                last
            )
            if ranking.is_all or is_sure or depth >= DEEPEST:
                return _first(ranking, count)
            depth *= 4

    def _words(self) -> Ranking:
        """All pictures that have any of the words."""
        match = self.heard
        is_cut = match is not None and len(match.ids) >= SCORED
        if match is None or (is_cut and self.among is not None):
            match = self.store.words(self.text, among=self.among)
        elif self.among is not None:
            is_asked = np.isin(match.ids, self.among, assume_unique=True)
            match = replace(match, ids=match.ids[is_asked], scores=match.scores[is_asked])
        return Ranking(match.ids, match.scores, {}, is_all=True, terms=match.terms)

    def _fused(
        self,
        ids: Ids,
        parts: Mapping[Channel, Ranking],
        words: Ranking,
        last: Mapping[Channel, float],
        count: int,
        *,
        is_exact: bool,
    ) -> Ranking:
        """The best of some pictures in mode "hybrid", at least `count` if there are as many.

        Most of a query's time would go into pictures that nothing can bring up to the best, so
        those are left out first.

        Args:
            ids: the pictures, ascending; those that are gone by now are left out.
            parts: what each channel has found.
            words: all pictures that have any of the words.
            last: the most that a picture can have in a channel that has not shown it.
            count: answers wanted.
            is_exact: whether all pictures and captions were looked at for `parts`.
        """
        heard = _at(ids, words.ids, words.scores, 0.0)
        if len(words.ids) >= SCORED:  # there may be others
            with self.store.snapshot() as rows:
                heard = rows.word_scores(self.text, ids)
        given: dict[Channel, Scores] = {
            name: _at(ids, parts[name].ids, parts[name].scores, np.nan)
            for name in ("image", "caption")
        }
        lacks = {name: np.isnan(one) for name, one in given.items()}
        keep = np.ones(len(ids), dtype=np.bool_)
        if not is_exact:
            # An approximate index misses some, so of what it does not show nothing is known, and
            # of a picture it may know a lesser caption.
            lacks["caption"] = keep
        else:
            most = {name: np.where(lacks[name], last[name], one) for name, one in given.items()}
            told = self.fusion.fuse(most | {"words": heard})
            # Without captions it may have more.
            bare = self.fusion.fuse(most | {"caption": given["caption"], "words": heard})
            bound = np.maximum(told, bare)
            is_known = ~(lacks["image"] | lacks["caption"])
            if np.count_nonzero(is_known) > count:
                keep = bound >= -np.partition(-bound[is_known], count - 1)[count - 1]
        there, image = self._given("image", ids[keep & lacks["image"]])
        given["image"][np.searchsorted(ids, there)] = image
        wanted = keep & lacks["caption"]
        given["caption"][wanted] = self._nearest(ids[wanted])
        is_there = keep & ~np.isnan(given["image"])
        kept: dict[Channel, Scores] = {
            name: one[is_there] for name, one in (given | {"words": heard}).items()
        }
        return _ranked(
            ids[is_there],
            self.fusion.fuse(kept),
            kept,
            is_all=bool(keep.all()),
            terms=words.terms,
        )

    def _is_exact(self, depth: int) -> bool:
        """Whether all pictures and captions are looked at."""
        return (
            self.exact
            or self.among is not None
            or all(self.store.is_exact(kind, depth, self.source) for kind in KINDS)
        )

    def scores(self, ids: Ids) -> tuple[Ids, dict[Channel, Scores]]:
        """What each channel gives to these pictures; those that are gone by now are left out."""
        known, image = self._given("image", ids)
        with self.store.snapshot() as rows:
            words = rows.word_scores(self.text, known)
        return known, {"image": image, "caption": self._nearest(known), "words": words}

    def _nearest(self, ids: Ids) -> Scores:
        """(n,) what that caption of each picture has which is nearest; NaN without captions."""
        nearest = np.full(len(ids), np.nan, dtype=np.float32)
        if len(ids):
            owners = self.store.captions_of(ids)
            told, scores = self._given("caption", owners.captions)
            np.fmax.at(nearest, np.searchsorted(ids, owners.of(told)), scores)
        return nearest

    def _given(self, kind: Kind, ids: Ids) -> tuple[Ids, Scores]:
        """Those of some pictures or captions that are embedded, ascending, and their scores."""
        if not len(ids):
            return ids, np.empty(0, np.float32)
        assert self.row is not None
        (match,) = self.store.search(kind, self.row[None], len(ids), among=ids, exact=True)
        order = np.argsort(match.ids)
        return match.ids[order], match.scores[order]


def _distinct(ids: Ids) -> Ids:
    """Each id once, ascending; np.unique would import numpy.ma: 20 ms."""
    ids = np.sort(ids)
    return ids[np.diff(ids, prepend=-1) > 0]


def _at(ids: Ids, known: Ids, scores: Scores, otherwise: float) -> Scores:
    """(n,) the scores of these ids, of which some are `known`, in any order."""
    found = np.full(len(ids), otherwise, dtype=np.float32)
    if len(known):
        order = np.argsort(known)
        places = order[np.minimum(np.searchsorted(known, ids, sorter=order), len(known) - 1)]
        is_known = known[places] == ids
        found[is_known] = scores[places[is_known]]
    return found


def _ranked(
    ids: Ids,
    scores: Scores,
    channels: Mapping[Channel, Scores],
    *,
    is_all: bool,
    terms: tuple[Term, ...] = (),
) -> Ranking:
    order = np.lexsort((ids, -scores))
    by_rank = {name: one[order] for name, one in channels.items()}
    return Ranking(ids[order], scores[order], by_rank, is_all, terms)


def _first(ranking: Ranking, count: int) -> Ranking:
    return replace(
        ranking,
        ids=ranking.ids[:count],
        scores=ranking.scores[:count],
        channels={name: one[:count] for name, one in ranking.channels.items()},
        is_all=ranking.is_all and len(ranking.ids) <= count,
    )
