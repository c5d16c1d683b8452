"""A query → ranked pictures, each with the caption that fits best, or ranked captions.

The query becomes one unit row (see `retriever.composing`), which is compared with pictures and
captions, and its words are looked for (see `retriever.channels`). What cannot be an answer is never
looked at, so that k answers come as long as there are k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np
from numpy.typing import NDArray

from indexes import words
from indexes.errors import StoreDamagedError
from retriever.asking import Query, phrases, unquoted, unspoken
from retriever.calibration import CUT, Calibration
from retriever.channels import (
    ASIDE,
    FALLBACK,
    MODES,
    TUNED,
    Channel,
    Channels,
    Fusion,
    Ids,
    Mode,
    Ranking,
    Rows,
    Scores,
)
from retriever.errors import UsageError

if TYPE_CHECKING:
    from indexes.filters import Condition
    from indexes.records import CaptionRow, Fit, ItemRow, Source, Term, WordMatch
    from indexes.store import Snapshot, Store
    from retriever.composing import Composed
    from retriever.encoders import Encoder

__all__ = ["Answer", "CaptionHit", "Hit", "Query", "Searcher"]

SHORTEST_NAME = 3  # letters and digits of a word that names something by a digit
# Answers more than wanted, among which copies of those that are shown are counted; not beyond what
# an approximate index is tuned for.
SPARE = 10
NEAR = 0.9  # of the words of two captions that say the same, such as 10 of 11
# What people are told before answers of which none is a match.
NO_MATCH = "No good match. The nearest are:"
_MARKS = ".,;:!?()[]{}'’\"“”„«»「」"


@dataclass(frozen=True, slots=True)
class Hit:
    """A picture found; rank 1 is the best.

    score: the cosine between query and picture, or what another mode has instead: see `channels`.
    caption: the caption of this picture that is nearest to the query; None if it has none.
    confidence: how surely it is what was asked for, in [0, 1] (see `retriever.calibration`); None
    where the library was not measured. channels: what each channel gave that was looked at.
    duplicates: near-duplicates among the answers that it stands for.
    """

    rank: int
    score: float
    path: Path
    caption: str | None
    item_id: int
    confidence: float | None = None
    channels: Mapping[Channel, float] = field(default_factory=dict)
    duplicates: int = 0


@dataclass(frozen=True, slots=True)
class Answer(Sequence[Hit]):
    """The pictures that answer a query, best first; a sequence of its hits.

    mode: what they were found by. is_match: whether the best is one that was asked for, rather than
    merely the nearest that there is; None if nobody knows. notes: what whoever asked should know,
    in sentences.
    """

    hits: tuple[Hit, ...]
    mode: Mode
    is_match: bool | None = None
    notes: tuple[str, ...] = ()

    @overload
    def __getitem__(self, place: int) -> Hit: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Hit, ...]: ...
    def __getitem__(self, place: int | slice) -> Hit | tuple[Hit, ...]:
        return self.hits[place]

    def __len__(self) -> int:
        return len(self.hits)

    @property
    def message(self) -> str | None:
        """What people are told before the hits if none of them is a match."""
        return NO_MATCH if self.is_match is False and self.hits else None

    def _repr_html_(self) -> str:
        """What a notebook shows: thumbnails with captions and scores."""
        from retriever.sheets import grid

        return grid(self.hits, self.message)


@dataclass(frozen=True, slots=True)
class CaptionHit:
    """A caption found; rank 1 is the best, the score is the cosine between query and caption.

    path, item_id: the first picture in the library that has this caption.
    """

    rank: int
    score: float
    caption: str
    path: Path
    item_id: int


class Searcher:
    """Answers queries from a store with the encoder that made it.

    The encoder is asked for at the first query, and a text query uses its text tower only.
    """

    def __init__(self, store: Store, encoder: Callable[[], Encoder]) -> None:
        self._store = store
        self._encoder = encoder

    def channels(self, query: Query, *, exact: bool = False) -> Channels:
        """The query as each channel hears it.

        Raises:
            UsageError: nothing is asked, or the parts cancel each other out.
            PictureError: a query picture cannot be read.
        """
        with self._store.snapshot() as rows:
            fit = rows.fit()
        return self._channels(query, fit, self._composed(query, fit).row, exact=exact)

    def usual_mode(self, query: Query) -> Mode:
        """What pictures are found by if nobody says."""
        with self._store.snapshot() as rows:
            return _usual_mode(rows.fit(), query)

    def calibration(self) -> Calibration | None:
        """What turns scores into confidences in this library; None: it was not measured."""
        with self._store.snapshot() as rows:
            return _calibration(rows.fit())

    def _composed(self, query: Query, fit: Fit | None) -> Composed:
        from retriever.composing import compose

        return compose(query, self._encoder(), fit.means if fit else None)

    def _channels(
        self, query: Query, fit: Fit | None, row: Rows | None, *, exact: bool
    ) -> Channels:
        fusion, _ = _fused(fit)
        return Channels(
            self._store, row, _text(query), source=query.source, exact=exact, fusion=fusion
        )

    def images(
        self,
        query: Query,
        k: int = 10,
        *,
        mode: Mode | None = None,
        where: Condition | None = None,
        among: Collection[int] | None = None,
        exact: bool = False,
        all: bool = False,
        min_confidence: float | None = None,
    ) -> Answer:
        """The k best pictures, fewer only if there are fewer.

        A query picture that is in the library is an answer like any other: it comes first, with a
        score near 1, and so do its copies.

        What stands in a text between quotation marks must stand in the words of a picture. Words
        like IMG_2041 name something: pictures whose words have them come before all others.

        So do pictures whose name and folders have every word of a text.

        Args:
            query: what is asked.
            k: answers wanted, at least 1.
            mode: what pictures are found by: "image", "caption", "words", or "hybrid", all of
                them. None is what was measured to be best in this library for texts, and "image"
                for others and where nothing was measured. See `retriever.channels`.
            where: which pictures may be answers (see `indexes.filters`); None: all.
            among: ids of the pictures that may be answers; None: all.
            exact: look at every picture, though the library has an approximate index.
            all: near-duplicates are answers of their own.
            min_confidence: leave out answers of which the library says less; see `Hit`.

        Raises:
            UsageError: k < 1, no such mode, a mode that needs a text, or as `embed`.
            PictureError: a query picture cannot be read.
        """
        if k < 1:
            raise UsageError(f"k must be at least 1, not {k}")
        asked = Asked.of([text for text, weight in query.texts if weight > 0])
        with self._store.snapshot() as rows:
            fit = rows.fit()
        literal = _literal(query, mode)
        mode = mode or _usual_mode(fit, query)
        _check_mode(mode, query)

        def listen() -> tuple[Ids | None, list[tuple[int, Ids | None]], WordMatch | None]:
            with self._store.snapshot() as rows:
                chosen = _chosen(rows, where, among, asked.phrases)
                having = _having(rows, asked.names) if asked.names else []
            titled = np.empty(0, np.int64) if literal is None else self._store.titled(literal)
            named = _named(having, titled, chosen)
            heard = self._store.words(_text(query), among=chosen) if mode == "hybrid" else None
            return chosen, [*named, (0, chosen)], heard

        listening = ASIDE.submit(listen)  # SQLite meanwhile
        try:
            # What words alone find needs no encoder.
            composed = self._composed(query, fit) if mode != "words" or query.without else None
        finally:
            wait([listening])  # nothing of a query goes on when it has failed
        row = composed.row if composed and mode != "words" else None
        chosen, groups, heard = listening.result()
        channels = replace(self._channels(query, fit, row, exact=exact), heard=heard)
        found = _Found(
            self._store, k, _judge(fit, mode, query.source), composed, all, min_confidence
        )
        terms: tuple[Term, ...] = ()
        for names, group in groups:
            ranked = replace(channels, among=group)
            is_certain = names > len(asked.names) or (
                asked.is_literal and names == len(asked.names)
            )
            count = k if all else max(k, min(k + SPARE, TUNED))
            while not found.is_enough:
                ranking = ranked.best(mode, count)
                terms = ranking.terms or terms
                if found.take(ranking, names, is_certain=is_certain):
                    if ranking.is_all or found.is_exhausted:
                        break
                    count *= 4
        notes = list(query.notes)
        if where is not None and chosen is not None and not (len(chosen) or asked.phrases):
            notes.append("no picture passes the filter")
        notes += _notes(asked, terms, found)
        is_match = False if asked.phrases and not found else found.is_match
        return Answer(tuple(found.hits(channels)), mode, is_match, tuple(notes))

    def captions(
        self, query: Query, k: int = 10, *, where: Condition | None = None, exact: bool = False
    ) -> list[CaptionHit]:
        """The k best captions, each text once, fewer only if the library has fewer texts.

        Texts that differ in case and punctuation only, or in one of many words, are the same. The
        captions of a query picture that is in the library are answers like any others.

        Args:
            query: what is asked, most often a picture.
            k: answers wanted, at least 1.
            where: which pictures' captions may be answers (see `indexes.filters`); None: all.
            exact: look at every caption, though the library has an approximate index.

        Raises:
            UsageError: k < 1, or as `embed`.
            PictureError: a query picture cannot be read.
        """
        if k < 1:
            raise UsageError(f"k must be at least 1, not {k}")
        among: list[int] | None = None
        with self._store.snapshot() as rows:
            fit = rows.fit()
            if where is not None:
                among = rows.caption_ids(rows.select(where))
        row = self._composed(query, fit).row[None]
        absent: set[int] = set()
        wanted = k
        while True:
            (match,) = self._store.search(
                "caption", row, wanted, among=among, source=query.source, exact=exact
            )
            found = self._store.captions(match.ids.tolist())
            if len(found) < len(match.ids):
                # Another process removed some since the search: ask again.
                gone = {one for one in match.ids.tolist() if not self._store.captions([one])}
                absent = _not_again(absent, gone)
                continue
            best = _distinct(
                (
                    (item_id, caption.text, score)
                    for (item_id, caption), score in zip(found, match.scores.tolist(), strict=True)
                ),
                k,
            )
            if len(best) < k and len(found) == wanted:
                wanted *= 4  # the same text stands under many pictures
                continue
            items = self._store.items([item_id for item_id, _, _ in best])
            paths = {item.item_id: item.path for item in items}
            if all(item_id in paths for item_id, _, _ in best):
                break
            absent = _not_again(absent, {item_id for item_id, _, _ in best} - paths.keys())
        return [
            CaptionHit(rank, score, text, paths[item_id], item_id)
            for rank, (item_id, text, score) in enumerate(best, start=1)
        ]


def _distinct(captions: Iterable[tuple[int, str, float]], k: int) -> list[tuple[int, str, float]]:
    """The first k of (item id, text, score) whose texts say something new."""
    kept: list[tuple[int, str, float]] = []
    said: set[tuple[str, ...]] = set()
    for item_id, text, score in captions:
        these = _said(text)
        if these in said or any(_is_near(these, others) for others in said):
            continue
        said.add(these)
        kept.append((item_id, text, score))
        if len(kept) == k:
            break
    return kept


def _said(text: str) -> tuple[str, ...]:
    """The words of a text, of which case and punctuation are no part; without any, itself."""
    return tuple(word.casefold() for word in words.asked(text)) or (text,)


def _is_near(ones: tuple[str, ...], others: tuple[str, ...]) -> bool:
    """Whether two texts have nearly all of their words in common, in the same order."""
    one, other = set(ones), set(others)
    if len(one & other) < NEAR * len(one | other):
        return False
    return words.likeness(ones, others) >= NEAR


class _Found:
    """Answers to one query as they are gathered, those with most of its names first."""

    def __init__(
        self,
        store: Store,
        k: int,
        judge: Callable[[Scores], NDArray[np.float64] | None],
        composed: Composed | None,
        keeps_all: bool,
        least: float | None,
    ) -> None:
        self._store = store
        self._k = k
        self._judge = judge
        self._composed = composed
        self._keeps_all = keeps_all
        self._least = least
        self._seen: set[int] = set()
        self._absent: set[int] = set()
        self._candidates: list[_Candidate] = []
        self._groups: list[list[int]] = []
        self.is_match: bool | None = None
        self.is_exhausted = False  # all that may follow is believed even less than asked for

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def is_enough(self) -> bool:
        """Whether there are k answers."""
        return len(self._groups) >= self._k

    def take(self, ranking: Ranking, names: int, *, is_certain: bool) -> bool:
        """Whether all of a ranking is still there; if so, it is among the answers now."""
        self.is_exhausted = False
        fresh = [at for at, one in enumerate(ranking.ids.tolist()) if one not in self._seen]
        ids = ranking.ids[fresh].tolist()
        with self._store.snapshot() as rows:
            items = rows.items(ids)
            vectors = {} if self._keeps_all else rows.of_base().embeddings("image", ids)
            unwanted = np.zeros(len(ids), dtype=np.bool_)
            if self._composed is not None and len(self._composed.away):
                unwanted = self._composed.shown(rows, ids)
        if gone := set(ids) - items.keys():
            # Another process removed some since the search: ask again.
            self._absent = _not_again(self._absent, gone)
            return False
        self._seen.update(ids)
        judged = np.ones(len(fresh)) if is_certain else self._judge(ranking.scores[fresh])
        for place, (at, item_id) in enumerate(zip(fresh, ids, strict=True)):
            if unwanted[place]:
                continue
            confidence = None if judged is None else float(judged[place])
            if confidence is not None:
                self.is_match = bool(self.is_match) or confidence >= CUT
                if self._least is not None and confidence < self._least:
                    self.is_exhausted = True
                    continue
            given = {name: float(one[at]) for name, one in ranking.channels.items()}
            self._candidates.append(
                _Candidate(
                    items[item_id],
                    float(ranking.scores[at]),
                    names,
                    confidence,
                    {name: one for name, one in given.items() if not math.isnan(one)},
                    vectors.get(item_id),
                )
            )
        self._candidates.sort(key=lambda one: (-one.names, -one.score, one.item.item_id))
        self._groups = self._collapsed()
        return True

    def _collapsed(self) -> list[list[int]]:
        """Places of those that are shown, each with those that it stands for."""
        if self._keeps_all or len(self._candidates) < 2:
            return [[place] for place in range(len(self._candidates))]
        from retriever.duplicates import collapse

        # Words may have found some before their embeddings were made.
        dim = max(0 if one.vector is None else len(one.vector) for one in self._candidates)
        rows = np.zeros((len(self._candidates), dim), dtype=np.float32)
        for row, one in zip(rows, self._candidates, strict=True):
            if one.vector is not None:
                row[:] = one.vector
        return collapse([one.item for one in self._candidates], rows)

    def hits(self, channels: Channels) -> Iterator[Hit]:
        """The k first answers."""
        shown = [(self._candidates[group[0]], len(group) - 1) for group in self._groups[: self._k]]
        ids = [one.item.item_id for one, _ in shown]
        nearest: Mapping[int, CaptionRow] = {}
        if channels.row is not None:
            nearest = self._store.nearest_captions(ids, channels.row)
        for rank, (one, duplicates) in enumerate(shown, start=1):
            # Captions that another process replaces meanwhile were compared with no query.
            caption = nearest.get(one.item.item_id) or _most_said(one.item, channels.text)
            yield Hit(
                rank,
                one.score,
                one.item.path,
                caption.text if caption else None,
                one.item.item_id,
                one.confidence,
                one.channels,
                duplicates,
            )


@dataclass(frozen=True, slots=True, eq=False)
class _Candidate:
    item: ItemRow
    score: float
    names: int  # of the query that its words have
    confidence: float | None
    channels: Mapping[Channel, float]
    vector: NDArray[np.float16] | None


@dataclass(frozen=True, slots=True)
class Asked:
    """What texts ask for in so many words.

    phrases: what stands between quotation marks. names: words that name something, such as
    IMG_2041. is_literal: there is nothing else in the texts.
    """

    phrases: tuple[str, ...]
    names: tuple[str, ...]
    is_literal: bool

    @classmethod
    def of(cls, texts: Sequence[str]) -> Asked:
        """What is asked by texts as they were typed."""
        spoken: list[str] = []
        others: list[str] = []
        for text in texts:
            spoken += phrases(text)
            others += [word for one in unspoken(text).split() if (word := one.strip(_MARKS))]
        names = tuple(dict.fromkeys(word for word in others if _is_name(word)))
        is_literal = bool(spoken or names) and all(map(_is_name, others))
        return cls(tuple(spoken), names, is_literal)


def _is_name(word: str) -> bool:
    is_numbered = len(word) >= SHORTEST_NAME and any(letter.isdigit() for letter in word)
    return is_numbered or ("_" in word and len(word) > 1)


def _chosen(
    rows: Snapshot,
    where: Condition | None,
    among: Collection[int] | None,
    phrases: Sequence[str],
) -> Ids | None:
    """Ascending ids of the pictures that may be answers; None: all."""
    chosen = None
    if where is not None or phrases:
        from indexes.filters import And, Words

        parts: list[Condition] = [Words(phrase, phrase=True) for phrase in phrases]
        chosen = rows.select(And((*parts, *([where] if where is not None else []))))
    if among is not None:
        given = np.sort(np.fromiter(among, dtype=np.int64, count=len(among)))
        chosen = given if chosen is None else _both(chosen, given)
    return chosen


def _having(rows: Snapshot, names: Sequence[str]) -> list[Ids]:
    """The pictures whose words have each of some names."""
    from indexes.filters import Words

    return [rows.select(Words(name, phrase=True)) for name in names]


def _literal(query: Query, mode: Mode | None) -> str | None:
    """A text that may be the name of a file or folder; None if what is asked is more or else."""
    if mode not in (None, "hybrid") or query.images or len(query.texts) != 1:
        return None
    [(text, weight)] = query.texts
    return unquoted(text) if weight > 0 else None


def _named(having: Sequence[Ids], titled: Ids, chosen: Ids | None) -> list[tuple[int, Ids]]:
    """(how many of the names, pictures whose words have so many), the most first.

    having: the pictures that have each of the names. titled: those whose name or folders have all
    that is asked; they have all names and one more.
    """
    counts = np.bincount(np.concatenate([*having, *[titled] * (len(having) + 1)]))
    counts = np.minimum(counts, len(having) + 1)
    groups = []
    for count in range(len(having) + 1, 0, -1):
        those = np.flatnonzero(counts == count)
        if chosen is not None:
            those = _both(those, chosen)
        if len(those):
            groups.append((count, those))
    return groups


def _both(ones: Ids, others: Ids) -> Ids:
    """What is in two ascending arrays; np.intersect1d would import numpy.ma: 20 ms."""
    places = np.searchsorted(others, ones)
    places[places == len(others)] = 0
    return ones[others[places] == ones] if len(others) else others


def _fused(fit: Fit | None) -> tuple[Fusion, Mode]:
    """How channels are fused in this library, and the usual mode of its text queries."""
    try:
        facts = fit.facts["channels"] if fit else {}
        return Fusion.from_facts(facts), "hybrid" if facts["default"] == "hybrid" else "image"
    except (KeyError, TypeError, ValueError):  # not measured, or by another version
        return FALLBACK, "image"


def _usual_mode(fit: Fit | None, query: Query) -> Mode:
    return _fused(fit)[1] if query.source == "text" and _has_words(query) else "image"


def _calibration(fit: Fit | None) -> Calibration | None:
    facts = fit.facts.get("calibration") if fit else None
    return Calibration(facts) if facts else None


def _judge(
    fit: Fit | None, mode: Mode, source: Source | None
) -> Callable[[Scores], NDArray[np.float64] | None]:
    """What gives each score of a mode its confidence."""
    calibration = _calibration(fit)
    if calibration is None:
        return lambda scores: None
    return lambda scores: calibration.confidence(scores, mode, source)


def _text(query: Query) -> str:
    """All that is asked for in words."""
    return " ".join(unquoted(text) for text, weight in query.texts if weight > 0)


def _has_words(query: Query) -> bool:
    return any(weight > 0 for _, weight in query.texts)


def _check_mode(mode: str, query: Query) -> None:
    if mode not in MODES:
        raise UsageError(f"there is no mode {mode!r}: choose one of {', '.join(MODES)}")
    if mode in ("words", "hybrid") and not _has_words(query):
        raise UsageError(f"mode {mode} looks for words: give a text")


def _most_said(item: ItemRow, text: str) -> CaptionRow | None:
    """The caption that has most of a text's words; of equals the first."""
    wanted = set(_said(text))
    return max(
        item.captions, key=lambda caption: len(wanted & set(_said(caption.text))), default=None
    )


def _notes(asked: Asked, terms: Sequence[Term], found: _Found) -> list[str]:
    notes = [
        f"no picture has the word “{term.corrected_from}”: “{term.text}” was looked for"
        for term in terms
        if term.corrected_from is not None
    ]
    if asked.phrases and not len(found):
        said = " and ".join(f"“{phrase}”" for phrase in asked.phrases)
        notes.append(f"no picture has the words {said} in a caption or name")
    return notes


def _not_again(absent: set[int], gone: set[int]) -> set[int]:
    """Ids found that are of nothing; raises StoreDamagedError for one that was so before."""
    if absent & gone:
        raise StoreDamagedError(
            "vectors of removed pictures are found: `retriever repair` mends it"
        )
    return absent | gone
