"""Filters as they are typed: `parse` makes a condition of `indexes.filters` of a line of text.

    taken >= 2024-01-01 and (camera = "NIKON D90" or has gps) and not path like "*/trash/*"

A filter is one test, or several joined by `and`, `or`, `not` and parentheses; `and` binds tighter
than `or`. Keywords and names are read in any case. The tests:

    FIELD = VALUE                     also != < <= > >= (and == and <>)
    FIELD in (VALUE, VALUE)           one of these
    FIELD like PATTERN                * is any characters, ? any one, [abc] one of these
    FIELD contains TEXT               in either case
    FIELD words TEXT, words TEXT      all of these words, in a caption, name, folder or path; in any
    has FIELD                         there is one: has captions, has gps, has taken, has camera
    gps in box(SOUTH, WEST, NORTH, EAST), gps near (LATITUDE, LONGITUDE, 5 km)
    portrait, landscape, square

`not` may also stand before `in`, `like`, `contains`, `words` and `near`. A test is false of a
picture that lacks what it asks of, `!=` and `not in` included; `not camera = "X"` is the opposite
of a test, and true of pictures without a camera.

Fields are those of `indexes.filters.FIELDS`, and the further columns of the library's captions
files by their names, or, where a name is taken or has other characters than letters, digits, `_`,
`-` and `.`, as `extra.name` or in backquotes. A text needs quotes, of either kind, only if it has
spaces, commas, parentheses or signs of comparison, or is `and`, `or` or `not`; a quotation mark
inside is doubled. Numbers:
1920, 0.5; sizes 500kB, 2MB, 1GiB; an aspect also as 16:9; dates 2024, 2024-05, 2024-05-06,
2024-05-06T12:30, each the whole of that time, so that `taken = 2024` is any day of that year.

What is typed becomes values of frozen dataclasses; no part of it is ever run.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime, timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

from indexes.filters import (
    DEEPEST,
    FIELDS,
    OPS,
    And,
    Box,
    Compare,
    Condition,
    Contains,
    Extra,
    Glob,
    Has,
    In,
    Near,
    Not,
    Op,
    Or,
    Period,
    Words,
)
from retriever.errors import UsageError

if TYPE_CHECKING:
    from lark import Lark, Token, UnexpectedInput

MAX_CHARS = 6_000  # no list of values that is too long for one statement fits into these
MAX_NESTING = DEEPEST - 4  # tests inside tests; one alone may become four conditions

# Numbers, dates and units are words here: what a word means is up to the field that it is beside,
# so that a fault in it can be told in the terms of that field.
_GRAMMAR = r"""
start: any
?any: all | all (_OR all)+ -> either
?all: one | one (_AND one)+ -> both
?one: test | NOT+ test -> negated
?test: "(" any ")"
     | field -> alone
     | HAS field -> present
     | WORDS value -> worded
     | field OPERATOR value -> compared
     | field [NOT] (LIKE | CONTAINS | WORDS) value -> matched
     | field [NOT] IN "(" value ("," value)* ")" -> listed
     | field [NOT] IN BOX "(" value "," value "," value "," value ")" -> boxed
     | field [NOT] NEAR "(" value "," value "," value value? ")" -> nearby
?field: WORD | BACKQUOTED
?value: WORD | QUOTED

_AND: "and"i
_OR: "or"i
NOT: "not"i
HAS: "has"i
IN: "in"i
LIKE: "like"i
CONTAINS: "contains"i
WORDS: "words"i
BOX: "box"i
NEAR: "near"i
OPERATOR: /<>|[=!<>]=?/
QUOTED: /"(?:[^"]|"")*"|'(?:[^']|'')*'|“[^”]*”/
BACKQUOTED: /`[^`]+`/
WORD: /(?!(and|or|not)(?![^\s()'"“”`,=<>!]))[^\s()'"“”`,=<>!]+/i
%ignore /\s+/
"""
# What may come next, by the terminals that the parser would take.
_EXPECTED: Sequence[tuple[str, str]] = (
    ("HAS", "a test, such as `width > 1000` or `has gps`"),
    ("BACKQUOTED", "a field"),
    ("LIKE", "a comparison: = != < <= > >= in like contains words"),
    ("QUOTED", "a value"),
    ("LPAR", "an opening parenthesis"),
    ("COMMA", "a comma"),
    ("_AND", "`and` or `or`"),
    ("RPAR", "a closing parenthesis"),
)
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d{1,3})?", re.IGNORECASE)
_SIZE = re.compile(r"(?P<number>\d+\.?\d*|\.\d+)(?P<unit>[kmgt]?i?)b", re.IGNORECASE)
_UNITS = {
    f"{prefix}{i}": float(base) ** power
    for power, prefix in enumerate(("", "k", "m", "g", "t"))
    for i, base in (("", 1000), ("i", 1024))
    if prefix or not i
}
_RATIO = re.compile(r"(\d{1,6})[:/](\d{1,6})")
_DATE = re.compile(r"(\d{4})(?:-(\d\d?)(?:-(\d\d?)(?:[T ](\d\d?):(\d\d)(?::(\d\d))?)?)?)?")
_KM = {"km": 1.0, "m": 0.001}
_SHAPES: Mapping[str, Op] = {"portrait": "<", "landscape": ">", "square": "="}  # width to height
_PLACE = "gps"
_EXTRA = "extra."
# Where words are looked up, by the field that names it.
_WORD_COLUMNS = {
    "caption": ("captions",),
    "captions": ("captions",),
    "name": ("name",),
    "folder": ("folders",),
    "path": ("name", "folders"),
}
_OPERATORS: Mapping[str, Op] = {**{op: op for op in OPS}, "==": "=", "<>": "!="}
_TYPES = {"number": "a number", "time": "a date"}
_SHOWN_CHARS = 60  # of the filter on either side of a fault


class WhereError(UsageError):
    """A filter cannot be understood; the text shows it with a mark under the place.

    `column` is the place of the fault, the first character being 1.
    """

    def __init__(self, text: str, at: int, fault: str, *hints: str) -> None:
        self.column = at + 1
        lines = [f"the filter at column {self.column}: {fault}", *_pointed_at(text, at), *hints]
        super().__init__("\n".join(lines))


def _pointed_at(text: str, at: int) -> tuple[str, str]:
    """The filter on one line, or the part of it around a place, and a mark for the line below."""
    shown = _printable(text)
    start = max(0, at - _SHOWN_CHARS) if len(shown) > 2 * _SHOWN_CHARS else 0
    end = max(at, start) + _SHOWN_CHARS if len(shown) > 2 * _SHOWN_CHARS else len(shown)
    before = ("…" if start else "") + shown[start:at]
    after = shown[at:end] + ("…" if end < len(shown) else "")
    # Chinese and Japanese are two columns wide on a terminal, accents by themselves none.
    width = sum(
        0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "WF")
        for char in before
    )
    return f"  {before}{after}", f"  {' ' * width}^"


def parse(text: str, extra_keys: Collection[str] = ()) -> Condition:
    """The condition that a filter states; what may be written is in the description above.

    Args:
        text: at most 10,000 characters.
        extra_keys: the further columns that the library's captions files have.

    Raises:
        WhereError: it makes no sense, or names a field that there is not.
    """
    if len(text) > MAX_CHARS:
        fault = f"{len(text):,} characters, more than a filter may have ({MAX_CHARS:,})"
        raise WhereError(text, MAX_CHARS, fault)
    from lark import UnexpectedInput

    try:
        tree = _parser().parse(text)
    except UnexpectedInput as exc:
        raise _not_understood(text, exc) from None
    return _Reading(text, extra_keys).condition(tree.children[0], MAX_NESTING)


@cache
def _parser() -> Lark:
    from lark import Lark

    return Lark(_GRAMMAR, parser="lalr")


def _not_understood(text: str, exc: UnexpectedInput) -> WhereError:
    """What to tell of a text that the grammar does not have."""
    from lark import UnexpectedToken

    if not text.strip():
        return WhereError("", 0, "it is empty; an example: taken >= 2024-01-01 and has gps")
    if not isinstance(exc, UnexpectedToken):
        at = exc.pos_in_stream or 0
        return WhereError(text, at, f"this {text[at]} has no other one that closes it")
    token = exc.token
    at, found = token.start_pos or 0, f"there is {_shown(token)}"
    if token.type == "$END":
        at, found = len(text), "the filter ends"
    accepted: set[str] = exc.interactive_parser.accepts()  # type: ignore[no-untyped-call]
    if token.type == "RPAR" and accepted == {"$END"}:
        return WhereError(text, at, "this parenthesis closes none")
    name, expected = next((one for one in _EXPECTED if one[0] in accepted), ("", "the end"))
    hints = []
    if name == "_AND" and token.type == "WORD":
        hints = ["a text of several words needs quotes; a unit stands right behind its number"]
    return WhereError(text, at, f"{expected} is expected, and {found}", *hints)


def _printable(text: str) -> str:
    """The text, place for place, without what moves a cursor or cannot be encoded."""
    return "".join(char if char.isprintable() else " " for char in text)


def _shown(value: str) -> str:
    value = _printable(value if len(value) <= _SHOWN_CHARS else f"{value[:_SHOWN_CHARS]}…")
    return value if value[:1] in "\"'`“" else f"“{value}”"


def _number(text: str) -> float | None:
    """The number that a word spells, if it does and a computer has it."""
    number = float(text) if _NUMBER.fullmatch(text) else math.nan
    return number if math.isfinite(number) else None


def _bytes(text: str) -> float | None:
    found = _SIZE.fullmatch(text)
    return float(found["number"]) * _UNITS[found["unit"].lower()] if found else _number(text)


def _ratio(text: str) -> float | None:
    found = _RATIO.fullmatch(text)
    if found is None or not int(found[2]):
        return _number(text)
    return int(found[1]) / int(found[2])


# Fields whose numbers may be written in other ways too, and an example.
_NUMBERS: Mapping[str, tuple[Callable[[str], float | None], str]] = {
    "size": (_bytes, "2MB or 1500"),
    "aspect": (_ratio, "1.5 or 16:9"),
}


def _period(text: str) -> Period | None:
    """The year, month, day, minute or second that a word spells; ValueError if there is none."""
    found = _DATE.fullmatch(text)
    if found is None:
        return None
    parts = [int(part) for part in found.groups() if part is not None]
    start = datetime(*(parts + [1, 1][len(parts) - 1 :]))  # type: ignore[arg-type]
    try:
        match len(parts):
            case 1:
                end = start.replace(year=start.year + 1)
            case 2:
                end = (start + timedelta(days=31)).replace(day=1)
            case 3:
                end = start + timedelta(days=1)
            case _:
                end = start + timedelta(seconds=1 if len(parts) == 6 else 60)
    except (ValueError, OverflowError):
        end = datetime.max
    return Period(start, end)


class _Reading:
    """What the words of one filter mean in one library."""

    def __init__(self, text: str, extra_keys: Collection[str]) -> None:
        self.text = text
        self.keys = {key.casefold(): key for key in extra_keys} | {key: key for key in extra_keys}

    def condition(self, tree: Any, depth: int) -> Condition:
        """The condition of a part of the filter, which may be so deep."""
        parts: list[Any] = tree.children
        if not depth:
            first = next(tree.scan_values(lambda _: True))
            raise self.fault(first, f"tests inside each other, more than {MAX_NESTING} deep")
        match tree.data:
            case "either":
                return Or(tuple(self.condition(part, depth - 1) for part in parts))
            case "both":
                return And(tuple(self.condition(part, depth - 1) for part in parts))
            case "negated":
                inner = self.condition(parts[-1], depth - 1)
                return inner if len(parts) % 2 else Not(inner)
            case "alone":
                return self.alone(*parts)
            case "present":
                return self.present(*parts)
            case "worded":
                return self.words(None, *parts)
            case "compared":
                return self.compared(*parts)
            case "matched":
                return self.matched(*parts)
            case "listed":
                return self.listed(parts[0], parts[1], parts[2], parts[3:])
            case "boxed":
                return self.boxed(parts[0], parts[1], parts[4:])
            case _:
                return self.nearby(parts[0], parts[1], parts[3:])

    def fault(self, at: Token, fault: str, *hints: str) -> WhereError:
        """The error that points at a word."""
        return WhereError(self.text, at.start_pos or 0, fault, *hints)

    # ── Names ────────────────────────────────────────────────────────────────────────────────────

    def field(self, token: Token) -> str | Extra:
        """The field, the column, or `gps`."""
        if token.type == "BACKQUOTED":
            return Extra(self.key(token[1:-1].strip()) or self.refuse(token))
        name = token.lower()
        if name in FIELDS:
            return name
        if key := self.key(token):
            return Extra(key)
        if name.startswith(_EXTRA) and (key := self.key(token[len(_EXTRA) :])):
            return Extra(key)
        return self.refuse(token)

    def key(self, name: str) -> str | None:
        """The column of this name, as it is written or else in whichever case."""
        return self.keys.get(name) or self.keys.get(name.casefold())

    def refuse(self, token: Token) -> NoReturn:
        """Raises what is to be told of an unknown name."""
        from difflib import get_close_matches

        name = token.strip("`").strip().casefold()
        columns = sorted(set(self.keys.values()))
        known = {one.casefold(): one for one in [*columns, *FIELDS, *_SHAPES]}
        near = get_close_matches(name.removeprefix(_EXTRA), known, n=1, cutoff=0.55)
        fault = f"there is no field {_shown(token)}"
        if name in _SHAPES:
            fault += f"; {name} stands by itself, as in “{name} and width > 2000”"
        elif near:
            fault += f"; did you mean {_spelt(known[near[0]])}?"
        raise self.fault(
            token,
            fault,
            f"fields: {', '.join(FIELDS)}",
            f"columns of captions files: {', '.join(map(_spelt, columns)) or 'none here'}",
        )

    def plain(self, token: Token) -> str | Extra:
        """The field or column, which is not a place."""
        field = self.field(token)
        if field == _PLACE:
            raise self.fault(
                token,
                "a place is asked for by `has gps`, `gps in box(south, west, north, east)` or"
                " `gps near (latitude, longitude, 5 km)`",
            )
        return field

    # ── Values ───────────────────────────────────────────────────────────────────────────────────

    def value(self, field: str, token: Token) -> str | float | Period:
        """The value of a field that a word stands for."""
        text = _unquoted(token)
        kind = FIELDS[field]
        if kind == "time":
            return self.period(field, token)
        if kind != "number":
            return text
        read, example = _NUMBERS.get(field, (_number, "1920 or 0.5"))
        number = read(text)
        if number is None:
            raise self.fault(
                token, f"{field} is a number, such as {example}, and not {_shown(token)}"
            )
        return number

    def period(self, field: str, token: Token) -> Period:
        """The time that a word stands for."""
        try:
            found = _period(_unquoted(token))
        except ValueError as exc:
            raise self.fault(token, f"{_shown(token)} is no date: {exc}") from None
        if found is None:
            raise self.fault(
                token,
                f"{field} is a date, such as 2024, 2024-05, 2024-05-06 or 2024-05-06T12:30, and not"
                f" {_shown(token)}",
            )
        return found

    def number(self, token: Token, what: str, low: float, high: float) -> float:
        """A number between two others."""
        number = _number(_unquoted(token))
        if number is None or not low <= number <= high:
            raise self.fault(
                token, f"{what} is a number from {low:g} to {high:g}, and not {_shown(token)}"
            )
        return number

    # ── Tests ────────────────────────────────────────────────────────────────────────────────────

    def alone(self, token: Token) -> Condition:
        """`portrait` and its like; a field by itself says nothing."""
        name = token.lower()
        if name in _SHAPES and self.key(token) is None:
            return Compare("aspect", _SHAPES[name], 1.0)
        self.field(token)
        raise self.fault(
            token, f"{token} needs a comparison, such as `{token} = …`, or `has {token}`"
        )

    def present(self, _: Token, token: Token) -> Condition:
        """`has FIELD`."""
        return Has(self.field(token))

    def words(self, columns: tuple[str, ...] | None, _: Token, value: Token) -> Condition:
        """`words TEXT`."""
        text = _unquoted(value)
        if not any(map(str.isalnum, text)):
            raise self.fault(value, "there is no word in it")
        return Words(text, columns)

    def compared(self, name: Token, operator: Token, value: Token) -> Condition:
        """`FIELD = VALUE` and its like."""
        field = self.plain(name)
        op = _OPERATORS.get(operator)
        if op is None:
            raise self.fault(operator, f"{_shown(operator)} is no comparison; unequal is !=")
        if isinstance(field, Extra):
            return _compared_column(field, op, value)
        return Compare(field, op, self.value(field, value))

    def matched(self, name: Token, no: Token | None, operator: Token, value: Token) -> Condition:
        """`FIELD like PATTERN`, `FIELD contains TEXT`, `FIELD words TEXT`."""
        if operator.type == "WORDS":
            columns = _WORD_COLUMNS.get(name.lower()) if name.type == "WORD" else None
            if columns is None:
                self.field(name)
                raise self.fault(name, "words are looked up in caption, name, folder or path")
            words = self.words(columns, operator, value)
            return Not(words) if no else words  # everything has a name
        field = self.plain(name)
        if isinstance(field, str) and (kind := _TYPES.get(FIELDS[field])):
            raise self.fault(operator, f"{operator} is for texts, and {field} is {kind}")
        text = _unquoted(value)
        test = Glob(field, text) if operator.type == "LIKE" else Contains(field, text)
        return _unless(no, field, test)

    def listed(self, name: Token, no: Token | None, _: Token, values: Sequence[Token]) -> Condition:
        """`FIELD in (VALUE, …)`."""
        field = self.plain(name)
        test: Condition
        if isinstance(field, Extra):
            test = Or(tuple(_compared_column(field, "=", value) for value in values))
        else:
            test = In(field, tuple(self.value(field, value) for value in values))
        return _unless(no, field, test)

    def boxed(self, name: Token, no: Token | None, sides: Sequence[Token]) -> Condition:
        """`gps in box(…)`."""
        self.place(name)
        south, north = (self.number(sides[at], "a latitude", -90, 90) for at in (0, 2))
        west, east = (self.number(sides[at], "a longitude", -180, 180) for at in (1, 3))
        if south > north:
            raise self.fault(
                sides[2], "the north is below the south; a box is box(south, west, north, east)"
            )
        return _unless(no, _PLACE, Box(south, west, north, east))

    def nearby(self, name: Token, no: Token | None, values: Sequence[Token]) -> Condition:
        """`gps near (…)`."""
        self.place(name)
        latitude = self.number(values[0], "a latitude", -90, 90)
        longitude = self.number(values[1], "a longitude", -180, 180)
        text = "".join(map(_unquoted, values[2:])).lower()
        unit = next((unit for unit in _KM if text.endswith(unit)), None)
        distance = _number(text.removesuffix(unit).strip()) if unit else None
        if unit is None or distance is None or distance <= 0:
            raise self.fault(values[2], "a distance is a number with its unit, such as 5 km, 300 m")
        return _unless(no, _PLACE, Near(latitude, longitude, distance * _KM[unit]))

    def place(self, name: Token) -> None:
        """Raises WhereError if it is not the place that is asked about."""
        if self.field(name) != _PLACE:
            raise self.fault(name, f"only gps lies somewhere, and {name} does not")


def _compared_column(field: Extra, op: Op, value: Token) -> Condition:
    """A comparison with a column whose values may be texts or numbers.

    One that equals a text equals the number that it spells. A date stands for those that begin with
    it, as ISO 8601 writes them, so that they sort as texts do.
    """
    text, is_bare = _unquoted(value), value.type == "WORD"
    if not is_bare or (op in ("=", "!=") and not _is_date(text)):
        return Compare(field, op, text)
    if not _is_date(text):
        number = _number(text)
        return Compare(field, op, text if number is None else number)
    if "T" in text.upper():
        return Compare(field, op, _period(text) or text)
    begins = Glob(field, f"{text}*")
    match op:
        case "=" | "!=":
            return _unless(op == "!=", field, begins)
        case "<=" | ">":
            return _unless(op == ">", field, Or((Compare(field, "<", text), begins)))
        case _:
            return Compare(field, op, text)


def _is_date(text: str) -> bool:
    """Whether a word is a month, a day or a time of day; four digits are a number."""
    try:
        return "-" in text and _period(text) is not None
    except ValueError:
        return False


def _unless(no: object, field: str | Extra, test: Condition) -> Condition:
    """The test, or with `no` that a field is there and does not meet it."""
    return And((Has(field), Not(test))) if no else test


def _unquoted(token: Token) -> str:
    """The text that a word or a quoted text stands for."""
    if token.type != "QUOTED":
        return str(token)
    return token[1:-1].replace(2 * token[0], token[0])


def _spelt(name: str) -> str:
    """The name of a field or column as it is to be typed."""
    if re.fullmatch(r"[^\W\d][\w.-]*", name):
        return name
    return f"`{name}`"
