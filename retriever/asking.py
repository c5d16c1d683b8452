"""A query as it is typed → texts, pictures, and what the answers must not show.

    2:golden retriever + ./pool.jpg - fruit

Parts stand around `+` and `-` that have blanks on both sides. A number and a colon before a part is
its weight. A part that names a picture file is that picture. What follows a `-` is left out: not
pushed away from, but excluded. A part "in quotation marks" must stand among a picture's words as it
is. This is how rclip's queries are written (github.com/yurijmikhalevich/rclip).

A sentence may hold all of these signs and mean none, so each counts only where it can be nothing
else:

- A colon makes a weight only between a number up to 99 and something that is no digit and no blank:
  "2:dog", but not "10:30 train", "16:9" or "2001: a space odyssey".
- A `+` or `-` inside a word ("B-52", "black-and-white", "C++") and one inside quotation marks are
  letters like others.
- A `+` between parts always adds.
- A `-` without any `+`, weight or picture in the same query excludes only if what is before it and
  after it has a letter, and what follows is at most three words, as the name of a thing is. So
  "apple - fruit" excludes, and "a dog - a cat's best friend", "page 3 - 4" are texts. The query's
  notes say which way it was taken.
- A picture file is what is there as a file and is written as a path: "./pool.jpg", "/a/pool.jpg",
  "trip/pool.jpg". A bare "pool.jpg" may be a name to search for: it is a picture only as one of
  several parts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from retriever.errors import UsageError, printable

if TYPE_CHECKING:
    from PIL import Image

    from indexes.records import Source

MOST_HINTED = 1000  # characters of a text in which a negation is looked for
MOST_WORDS = 3  # of what a lone minus excludes; longer, it is a dash

_OPERATOR = re.compile(r"(?<!\s)\s+([+-])(?=\s)\s*")
_WEIGHT = re.compile(r"(\d{1,2}(?:\.\d+)?|\.\d+):(?=[^\s\d])")
_ROOTED = re.compile(r"\.{0,2}[/\\]|~[/\\]|[A-Za-z]:[/\\]")
_LETTER = re.compile(r"[^\W\d_]")
# An opening mark stands at the beginning of a word, a closing one at the end: 6" is a length.
_QUOTED = re.compile(
    r"""(?<![^\s:(])(?:"([^"]*)"|“([^“”]*)”|„([^„“”]*)[“”]|«([^«»]*)»)(?![\w"])|「([^「」]*)」"""
)


@dataclass(frozen=True, slots=True)
class Query:
    """What is asked.

    texts, images: each with its weight; a negative one pushes away. Quotation marks are kept.
    without: what the answers must not show, texts and picture files.
    notes: sentences for the user about how the query was read.
    """

    texts: tuple[tuple[str, float], ...] = ()
    images: tuple[tuple[Path | Image.Image, float], ...] = ()
    without: tuple[str | Path, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def source(self) -> Source | None:
        """Where its embedding comes from; None if from texts and pictures together."""
        if self.texts and self.images:
            return None
        return "text" if self.texts else "image"

    def beside(
        self,
        images: Sequence[tuple[Path | Image.Image, float]],
        without: Sequence[str | Path],
        *,
        text_weight: float = 1.0,
    ) -> Query:
        """The same, weighed by `text_weight`, with further pictures and exclusions."""
        return replace(
            self,
            texts=tuple((text, weight * text_weight) for text, weight in self.texts),
            images=(*((one, weight * text_weight) for one, weight in self.images), *images),
            without=(*self.without, *without),
        )


@dataclass(frozen=True, slots=True)
class _Part:
    """One part of a typed query: `what` is its text or picture, without the weight."""

    sign: str
    typed: str
    what: str | Path
    weight: float | None

    @property
    def is_empty(self) -> bool:
        """Whether the next sign stands where the part should."""
        return not self.typed or re.match(r"[+-](\s|$)", self.typed) is not None


def parse(text: str, *, files: bool = True) -> Query:
    """What a typed query asks for; see this module's docstring for the grammar.

    Args:
        text: as typed.
        files: whether parts may name picture files; not where others than the owner type.

    Raises:
        UsageError: a part is empty, has no weight above 0, or names a picture that is not there.
    """
    pieces = _split(text.strip())
    parts = [_part(sign, typed, files, len(pieces) > 1) for sign, typed in pieces]
    if not _is_composed(parts):
        parts = [_part("+", text.strip(), files, among_others=False)]
        return _query(parts, _dash_note(pieces))
    for number, part in enumerate(parts):
        if part.is_empty:
            before = parts[number - 1].typed if number else ""
            raise UsageError(
                f"Nothing stands after {before!r} {part.sign}: write a text or a picture there,"
                " or leave the sign out"
            )
        if part.weight == 0:
            raise UsageError(
                f"The weight of {part.typed!r} is 0: leave this part out, or give it a number"
                " above 0"
            )
    return _query(parts, _minus_note(parts))


def phrases(text: str) -> tuple[str, ...]:
    """What stands between quotation marks in a text, without those."""
    return tuple(inner for found in _QUOTED.finditer(text) if (inner := _inner(found)))


def unspoken(text: str) -> str:
    """What stands outside of the quotation marks in a text."""
    return _QUOTED.sub(" ", text)


def unquoted(text: str) -> str:
    """The text without the quotation marks around its phrases."""
    return _QUOTED.sub(_inner, text).strip()


def thing(text: str) -> str:
    """What a text names, without quotation marks and without the article before it."""
    return _ARTICLE.sub("", unquoted(text))


def picture(name: str, *, is_part: bool = True) -> Path | None:
    """The picture file that a part of a query names; None if it is a text.

    Args:
        name: as typed.
        is_part: whether there are other parts, or else a bare name may be one to search for.

    Raises:
        UsageError: it is written as a path to a picture, and there is none.
    """
    is_rooted = _ROOTED.match(name) is not None
    if not (is_rooted or is_part or "/" in name or "\\" in name):
        return None
    path = Path(name)
    try:
        path = path.expanduser()
        if path.is_file():
            return path if is_rooted or _is_picture_name(path) else None
    except (OSError, RuntimeError, ValueError):  # a long text, an unknown user, a zero byte
        return None
    if is_rooted and _is_picture_name(path):
        raise UsageError(f"{printable(name)} names a picture, and there is no such file")
    return None


def negation_hint(text: str) -> str | None:
    """Advice for a text that says what should not be there; None for others.

    Dual encoders hardly read a negation: "a beach without people" finds people on beaches, more of
    them than "a beach" does. Alhamoud et al. 2025 (NegBench), arXiv:2501.09425.
    """
    text = text[:MOST_HINTED]
    if not _may_negate(text):
        return None
    found = (
        _negation().search(text)
        or re.search(r"\w+n['’]t(?!\w)", text, re.IGNORECASE)
        or _GLUED_MINUS.search(text)
    )
    if not found:
        return None
    word = found[0].strip()
    wanted = re.sub(_LINKING, "", text[: found.start()], flags=re.IGNORECASE).strip(" ,.;:")
    unwanted = re.split(_CLAUSE_END, thing(text[found.end() :]), maxsplit=1)[0]
    unwanted = unwanted.strip(" ,.;:!?\"'")
    if word == "-":
        unwanted = unwanted.partition(" ")[0]
    # Where no blanks are, what is negated may stand on either side.
    if wanted and unwanted and _LETTER.search(wanted) and not _UNSPACED.search(word):
        return f'"{word}" is hardly understood. Ask "{wanted}" --without "{unwanted}"'
    if word in _NEEDS_BOTH:
        return None
    return f'"{word}" is hardly understood. --without THING leaves out what shows a thing'


# ── parts ────────────────────────────────────────────────────────────────────────────────────────


def _split(text: str) -> list[tuple[str, str]]:
    """The parts with the sign before each; signs inside quotation marks split nothing."""
    hidden = _QUOTED.sub(lambda found: "x" * len(found[0]), text)
    pieces, sign, begin = [], "+", 0
    for found in _OPERATOR.finditer(hidden):
        pieces.append((sign, text[begin : found.start()]))
        sign, begin = found[1], found.end()
    return [*pieces, (sign, text[begin:])]


def _part(sign: str, typed: str, files: bool, among_others: bool) -> _Part:
    weighted = _WEIGHT.match(typed)
    rest = typed[weighted.end() :] if weighted else typed
    weight = float(weighted[1]) if weighted else None
    is_part = among_others or weight is not None
    if files and (file := picture(unquoted(rest), is_part=is_part)):
        return _Part(sign, typed, file, weight)
    return _Part(sign, typed, rest, weight)


def _inner(quoted: re.Match[str]) -> str:
    """What stands inside the quotation marks."""
    return next(group for group in quoted.groups() if group is not None).strip()


def _is_picture_name(path: Path) -> bool:
    from retriever.data import IMAGE_SUFFIXES

    return path.suffix.lower() in IMAGE_SUFFIXES


def _is_composed(parts: list[_Part]) -> bool:
    """Whether the signs are meant as signs; see the module's docstring."""
    if any(part.weight is not None or isinstance(part.what, Path) for part in parts):
        return True
    others = parts[1:]
    if not others:
        return False
    if any(part.sign == "+" for part in others):
        return True
    return all(_LETTER.search(part.typed) and not part.is_empty for part in parts) and all(
        len(part.typed.split()) <= MOST_WORDS for part in others
    )


def _query(parts: list[_Part], note: str | None) -> Query:
    added = [part for part in parts if part.sign == "+"]
    texts = [(part.what, part.weight) for part in added if isinstance(part.what, str)]
    hints = [hint for text, _ in texts if (hint := negation_hint(text))]
    return Query(
        texts=tuple((text, 1.0 if weight is None else weight) for text, weight in texts),
        images=tuple(
            (part.what, 1.0 if part.weight is None else part.weight)
            for part in added
            if isinstance(part.what, Path)
        ),
        without=tuple(
            part.what if isinstance(part.what, Path) else unquoted(part.what)
            for part in parts
            if part.sign == "-"
        ),
        notes=tuple([note] if note else hints),
    )


def _minus_note(parts: list[_Part]) -> str | None:
    minus = [part for part in parts if part.sign == "-"]
    if not minus:
        return None
    left_out = " and ".join(f'"{unquoted(printable(part.what))}"' for part in minus)
    weighted = ", whatever its weight" if any(part.weight is not None for part in minus) else ""
    if any(part.sign == "+" for part in parts[1:]) or weighted:
        return f"What shows {left_out} is left out{weighted}" if weighted else None
    return f"What shows {left_out} is left out; in a text, write the dash as – or without blanks"


def _dash_note(pieces: list[tuple[str, str]]) -> str | None:
    if all(sign == "+" for sign, _ in pieces):
        return None
    return "Read as one text, dash and all; --without leaves out what shows a thing"


# ── negations ────────────────────────────────────────────────────────────────────────────────────

_WORDS = (
    "without no not never nobody none nothing except excluding minus"
    " ohne kein keine keinen keinem keiner keines nicht"
    " sans aucun aucune sin ningún ninguna senza nessun nessuna sem nenhum nenhuma"
    " zonder geen utan uden uten bez без"
)
_NEGATIONS = frozenset(_WORDS.split())
_UNSPACED_NEGATIONS = ("没有", "沒有", "无人", "無人", "なし", "のない", "のいない", "없는", "없이")
# Of these words, not all uses negate.
_PHRASES = {"none": "none of", "nothing": "nothing but", "except": "except(?: for)?"}


@cache
def _negation() -> re.Pattern[str]:
    words = "|".join(sorted(_PHRASES.get(word, word) for word in _NEGATIONS))
    apart = "|".join(_UNSPACED_NEGATIONS)
    return re.compile(rf"(?<!\w)(?:{words})(?!\w)|{apart}", re.IGNORECASE)


def _may_negate(text: str) -> bool:
    """Whether to look closer: to compile the patterns takes longer than to import this module."""
    lowered = text.lower()
    return (
        not _NEGATIONS.isdisjoint(_NO_WORD.split(lowered))
        or any(one in lowered for one in (*_UNSPACED_NEGATIONS, "n't", "n’t"))
        or _GLUED_MINUS.search(text) is not None
    )


_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
_GLUED_MINUS = re.compile(r"(?<=\s)-(?=[^\W\d_])")
_NO_WORD = re.compile(r"\W+")
# Words of another language as well: taken for negations only between two things.
_NEEDS_BOTH = {"sin", "sans", "sem", "bez", "-"}
_ARTICLE = re.compile(
    r"^(?:any|a|an|the|some|ein|eine|einen|einem|un|une|uno|una|de)\s+", re.IGNORECASE
)
_CLAUSE_END = r"[,.;:!?]|\s(?:and|but|und|aber|et|mais|y|pero|in|on|at|im|am)\s"
_LINKING = (
    r"(?:\s+(?:with|and|but|that|which|who|is|are|has|have|having|there|mit|und|aber|avec|con))+"
    r"\s*$"
)
