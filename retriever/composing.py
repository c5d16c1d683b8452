"""A query of several parts → one unit row; and which pictures show what was asked to be left out.

**Texts** of equal weight are read as one text, "a dog, snow": dual encoders were trained on
sentences, and this finds pictures with both things more often than the sum of two rows does. Of
unequal ones the heavier is added with what it weighs more, so that the row changes steadily with
the weights. A text of several sentences is read whole and sentence by sentence, and one that is
longer than the encoder reads in pieces; the rows are added.

**Pictures** and negative weights have rows only, which are added. Pictures and texts lie in two
separate cones of the shared space (Liang et al. 2022, "Mind the gap", arXiv:2203.02053), so that a
sum says first of all which modality it came from. So the mean of each modality, measured in the
library, is taken away before, and put back afterwards at the length that the parts had: the row
lies where those of plain queries lie, and its scores are cosines like theirs.

**Exclusion** is by set: a picture is left out or it is not, and the others keep their scores and
their order. What the query asks for is read once more together with what must not be there; a
picture that fits "a dog, water" better than "a dog" shows water. That is the sign of one product
with the difference of two rows. There is no threshold in it, which would be another for each
encoder and each word. The captions of a picture are heard as it is, all counting alike; a caption
that has the words in so many words decides alone. Subtracting a row, or projecting it away, instead
moves all pictures: `benchmarks/composition.py` compares them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from retriever.asking import Query, thing, unquoted
from retriever.errors import UsageError

if TYPE_CHECKING:
    from indexes.store import Snapshot
    from retriever.encoders import Encoder

Rows = NDArray[np.float32]

# Parts that cancel each other out leave rounding noise of this order, which points nowhere.
MIN_QUERY_LENGTH = 1e-4
# How much of an excluded row is added where nothing can be read together: a picture is excluded, or
# asked with. Half of it measured best of 0.3, 0.5 and 1.
EXCLUDED_WEIGHT = 0.5
LEAST_WORDS = 3  # of a sentence that is read by itself: "St. Bernard" has none
_CANCELLED = "The parts of the query cancel each other out: change the weights"

_SENTENCE_END = re.compile(r"(?<=[.!?;])\s+|\s*\n\s*|(?<=[。！？；])")
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")  # counted as words each


@dataclass(frozen=True, slots=True, eq=False)
class Composed:
    """A query as the shared space has it.

    row: (d,) float32 unit row, whose products with pictures and captions are cosines.
    away: (e, d) float32, one row for each thing to be left out: what has a product above 0 with it
    shows the thing. things: what these are called, for captions that say so; "" for pictures.
    """

    row: Rows
    away: Rows
    things: tuple[str, ...] = ()
    _said: list[NDArray[np.int64]] = field(default_factory=list, init=False, repr=False)

    def shows(self, images: Rows, captions: Rows, owners: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which pictures show something that is to be left out: (n,) bool.

        Args:
            images: (n, d) embeddings of pictures; zeros for one that has none.
            captions: (m, d) of their captions.
            owners: (m,) the row in `images` that each caption belongs to.
        """
        evidence = images @ self.away.T
        np.add.at(evidence, owners, captions @ self.away.T)
        shown: NDArray[np.bool_] = np.any(evidence > 0, axis=1)
        return shown

    def shown(self, rows: Snapshot, ids: Sequence[int]) -> NDArray[np.bool_]:
        """The same for items of a library, by their captions' words as well: (n,) bool."""
        if not len(self.away) or not ids:
            return np.zeros(len(ids), dtype=np.bool_)
        place = {item_id: at for at, item_id in enumerate(ids)}
        images = np.zeros((len(ids), self.away.shape[1]), dtype=np.float32)
        for item_id, vector in rows.embeddings("image", ids).items():
            images[place[item_id]] = vector
        captions = rows.captions(rows.caption_ids(ids))
        vectors = rows.embeddings("caption", list(captions))
        owners = [place[captions[caption_id][0]] for caption_id in vectors]
        stacked = np.zeros((len(vectors), images.shape[1]), dtype=np.float32)
        for row, vector in zip(stacked, vectors.values(), strict=True):
            row[:] = vector
        shown = self.shows(images, stacked, np.array(owners, dtype=np.int64))
        for said in self._saying(rows):
            shown |= np.isin(ids, said)
        return shown

    def _saying(self, rows: Snapshot) -> list[NDArray[np.int64]]:
        """For each thing, the items a caption of which has its words as they stand."""
        from indexes.filters import Words
        from indexes.words import asked

        if not self._said:
            self._said.extend(
                rows.select(Words(thing, columns=("captions",), phrase=True))
                for thing in self.things
                if asked(thing)
            )
        return self._said


def compose(query: Query, encoder: Encoder, means: Rows | None = None) -> Composed:
    """One row for all parts of a query, and a direction for each thing that it leaves out.

    Args:
        query: at least one text or picture with a weight other than 0.
        encoder: reads texts and pictures; its text tower is asked once, if at all.
        means: (2, d) mean embedding of the library's pictures and of its captions; None: unknown.

    Raises:
        UsageError: nothing is asked, what to leave out is empty, a weight is no number, a text
            cannot be encoded as UTF-8, or the parts cancel each other out.
        PictureError: a query picture cannot be read.
    """
    _check(query)
    texts = [(unquoted(text), weight) for text, weight in query.texts]
    added = _merged((text, weight) for text, weight in texts if weight > 0)
    without = [unquoted(one) for one in query.without if isinstance(one, str)]
    plan = _Plan(encoder)
    wanted = list(_layers(added, plan))
    wanted += [(text, weight) for text, weight in texts if weight < 0]
    base = _together(text for text, _ in added)
    # Only texts can be read together, and only as long as the encoder reads.
    joint = {one: _together([base, one]) for one in without if base and not query.images}
    joint = {one: text for one, text in joint.items() if not plan.is_cut(text)}
    plan.read([text for text, _ in wanted], [*without, *([base] if joint else []), *joint.values()])

    origins = np.zeros((2, encoder.dim), dtype=np.float32) if means is None else means
    of_images, of_texts = origins
    pictures = [picture for picture, _ in query.images]
    shunned = [one for one in query.without if isinstance(one, Path)]
    seen = np.zeros((0, encoder.dim), dtype=np.float32)
    if pictures or shunned:
        seen = encoder.encode_images([*pictures, *shunned])
    parts = [(plan.row(text), of_texts, weight) for text, weight in wanted]
    parts += [
        (row, of_images, weight) for row, (_, weight) in zip(seen, query.images, strict=False)
    ]
    parts = [part for part in parts if part[2]]
    if not parts:
        raise UsageError(_CANCELLED)
    home = _home(parts)
    row = _sum(parts, home)

    away = np.zeros((len(query.without), encoder.dim), dtype=np.float32)
    shunned_rows = iter(seen[len(pictures) :])
    for direction, one in zip(away, query.without, strict=True):
        if isinstance(one, Path):
            excluded = (next(shunned_rows), of_images, EXCLUDED_WEIGHT)
        elif (text := unquoted(one)) in joint:
            direction[:] = plan.whole(joint[text]) - plan.whole(base)
            continue
        else:
            excluded = (plan.whole(text), of_texts, EXCLUDED_WEIGHT)
        # At the row's own home, or else the way between the modalities would speak for or against
        # every picture alike.
        direction[:] = _sum([(row, home, 1.0), excluded], home) - row
    names = tuple(thing(one) if isinstance(one, str) else "" for one in query.without)
    return Composed(row, away, names)


def _check(query: Query) -> None:
    if not query.texts and not query.images:
        what = "besides what to leave out" if query.without else "a text, a picture or both"
        raise UsageError(f"The query is empty: give {what}")
    if any(isinstance(one, str) and not unquoted(one) for one in query.without):
        raise UsageError("What to leave out is an empty text: give a thing or a picture")
    if not all(math.isfinite(weight) for _, weight in (*query.texts, *query.images)):
        raise UsageError("A weight must be a finite number")
    for text in (*(text for text, _ in query.texts), *query.without):
        try:
            str(text).encode("utf-8", "surrogateescape" if isinstance(text, Path) else "strict")
        except UnicodeEncodeError as exc:
            raise UsageError("The text is not UTF-8") from exc


# ── texts ────────────────────────────────────────────────────────────────────────────────────────


def _merged(texts: Iterable[tuple[str, float]]) -> list[tuple[str, float]]:
    """Each text once, with all that it weighs, heaviest first."""
    weights: dict[str, float] = {}
    for text, weight in texts:
        weights[text] = weights.get(text, 0.0) + weight
    return sorted(weights.items(), key=lambda one: -one[1])


def _together(texts: Iterable[str]) -> str:
    """Several things in one text; a comma joins in any language."""
    return ", ".join(text.rstrip(" .,;。，；") for text in texts)


def _layers(texts: Sequence[tuple[str, float]], plan: _Plan) -> Iterator[tuple[str, float]]:
    """What is read in the place of weighted texts, heaviest first, and with what weight.

    The n heaviest are read together, with what the last of them weighs more than the next: (a, 3),
    (b, 1) becomes (a, 2), ("a, b", 1). Texts too long to be read together are read one by one.
    """
    if len(texts) > 1 and plan.is_cut(_together(text for text, _ in texts)):
        yield from texts
        return
    for count, (_, weight) in enumerate(texts, start=1):
        more = weight - (texts[count][1] if count < len(texts) else 0.0)
        if count == 1 and more:
            yield texts[0][0], more
        elif more:
            yield _together(text for text, _ in texts[:count]), more


class _Plan:
    """Texts that are to be read, gathered so that the text tower runs once."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._cut: dict[str, bool] = {}
        self._pieces: dict[str, list[str]] = {}
        self._rows: dict[str, Rows] = {}

    def is_cut(self, text: str) -> bool:
        """Whether only the beginning of a text would be read."""
        if text not in self._cut:
            self._cut[text] = self._encoder.is_cut([text])[0]
        return self._cut[text]

    def read(self, texts: Iterable[str], whole: Iterable[str]) -> None:
        """Encodes texts, some in pieces and some as they are."""
        self._pieces = {text: self._in_pieces(text) for text in texts}
        every = dict.fromkeys([*(one for some in self._pieces.values() for one in some), *whole])
        if every:
            self._rows = dict(zip(every, self._encoder.encode_texts(list(every)), strict=True))

    def whole(self, text: str) -> Rows:
        """The row of a text as it is."""
        return self._rows[text]

    def row(self, text: str) -> Rows:
        """The unit row of a text, all its pieces together."""
        pieces = self._pieces[text]
        if len(pieces) == 1:
            return self._rows[pieces[0]]
        sentences = np.mean([self._rows[piece] for piece in pieces if piece != text], axis=0)
        total = _unit(sentences)
        return _unit(total + self._rows[text]) if text in pieces else total

    def _in_pieces(self, text: str) -> list[str]:
        """Its sentences, and itself if it can be read; what is too long is halved between words."""
        sentences = _sentences(text)
        if len(sentences) == 1 and not self.is_cut(text):
            return [text]
        pieces = [piece for sentence in sentences for piece in self._halved(sentence)]
        if len(pieces) == 1:
            return pieces
        return pieces if self.is_cut(text) else [text, *pieces]

    def _halved(self, text: str) -> Iterator[str]:
        words = text.split()
        if not self.is_cut(text) or len(words) < 2:  # a text without blanks is read from the front
            yield text
            return
        middle = len(words) // 2
        yield from self._halved(" ".join(words[:middle]))
        yield from self._halved(" ".join(words[middle:]))


def _sentences(text: str) -> list[str]:
    """The sentences of a text; what is too short to be one stays with what follows, or precedes."""
    sentences: list[str] = []
    for piece in filter(None, _SENTENCE_END.split(text)):
        if sentences and _length(sentences[-1]) < LEAST_WORDS:
            sentences[-1] += f" {piece}"
        else:
            sentences.append(piece)
    if len(sentences) > 1 and _length(sentences[-1]) < LEAST_WORDS:
        last = sentences.pop()
        sentences[-1] += f" {last}"
    return sentences or [text]


def _length(text: str) -> int:
    """Words in a text; a letter of a language without blanks counts as one."""
    return len(_UNSPACED.sub(" x ", text).split())


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────


def _shares(parts: Sequence[tuple[Rows, Rows, float]]) -> NDArray[np.float64]:
    """(p,) how much each of (row, mean of its modality, weight) counts for, of 1."""
    sizes = np.abs([weight for _, _, weight in parts])
    shares: NDArray[np.float64] = sizes / sizes.sum()
    return shares


def _home(parts: Sequence[tuple[Rows, Rows, float]]) -> Rows:
    """Where plain queries of the modalities of some parts lie."""
    home: Rows = (_shares(parts) @ [mean for _, mean, _ in parts]).astype(np.float32)
    return home


def _sum(parts: Sequence[tuple[Rows, Rows, float]], home: Rows) -> Rows:
    """The unit row of (row, mean of its modality, weight) at a home; one part alone is itself.

    Raises UsageError if they cancel each other out.
    """
    if len(parts) == 1 and parts[0][2] > 0:
        return parts[0][0]
    shares = _shares(parts)
    centred = [(row - mean).astype(np.float64) for row, mean, _ in parts]
    signs = np.sign([weight for _, _, weight in parts])
    total = (signs * shares) @ centred
    length = float(np.linalg.norm(total))
    if length < MIN_QUERY_LENGTH:
        raise UsageError(_CANCELLED)
    usual = float(shares @ [np.linalg.norm(row) for row in centred])
    return _unit(total * (usual / length) + home)


def _unit(row: NDArray[np.floating]) -> Rows:
    unit: Rows = (row / np.linalg.norm(row)).astype(np.float32)
    return unit
