"""Conditions on pictures, and their translation into SQL.

A statement is put together from the fragments that stand here, and whatever a user wrote is bound
to it as a parameter. A condition is true or false of a picture, never unknown: one on a value that
is absent is false, and so `Not` of it is true. `not camera = "X"` holds of pictures without a
camera, and `camera != "X"` of those that have another one.

A captions file may give a picture several values of a column, as it has several captions. Then
`=`, `<` and the like hold if they hold of any one, and `!=` if it has some and none is equal.

Text is compared letter by letter, but for `Contains`, which takes capitals for small letters. A
path or folder may be written whole or from its root on.
"""

from __future__ import annotations

import math
import os
import sqlite3
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from indexes import words
from indexes.errors import InvalidConditionError

Type = Literal["text", "number", "time", "place"]
Op = Literal["=", "!=", "<", "<=", ">", ">="]
OPS: tuple[Op, ...] = ("=", "!=", "<", "<=", ">", ">=")

# What can be asked of every picture; `captions` is their number, `caption` the text of any one.
FIELDS: Mapping[str, Type] = {
    "path": "text",
    "folder": "text",
    "name": "text",
    "root": "text",
    "taken": "time",
    "modified": "time",
    "width": "number",
    "height": "number",
    "aspect": "number",
    "megapixels": "number",
    "size": "number",
    "captions": "number",
    "caption": "text",
    "camera": "text",
    "latitude": "number",
    "longitude": "number",
    "gps": "place",
}
EARTH_KM = 6371.0088  # mean radius
DEEPEST = 20  # conditions inside conditions: SQLite's parser takes a hundred signs on its stack
MOST_VALUES = 10_000  # of a condition, in all: SQLite takes 32,766 parameters


@dataclass(frozen=True, slots=True)
class Extra:
    """A further column of captions files, by its name."""

    key: str


@dataclass(frozen=True, slots=True)
class Period:
    """A day, a month, a year or an instant, from `start` up to but without `end`; local time.

    Compared: `=` within it, `<` before its start, `<=` before its end, `>` from its end on, `>=`
    from its start on.
    """

    start: datetime
    end: datetime


Field = str | Extra
Value = str | float | Period


@dataclass(frozen=True, slots=True)
class And:
    """All of these; of none, true."""

    parts: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class Or:
    """At least one of these."""

    parts: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class Not:
    """Whatever this is false of, values that are absent included."""

    part: Condition


@dataclass(frozen=True, slots=True)
class Compare:
    """A value beside another: texts with texts, numbers with numbers, times with periods."""

    field: Field
    op: Op
    value: Value


@dataclass(frozen=True, slots=True)
class Glob:
    """A text of this shape: `*` any letters, a slash as well, `?` one, `[a-z]` and `[!a-z]` one."""

    field: Field
    pattern: str


@dataclass(frozen=True, slots=True)
class Contains:
    """A text with this one somewhere in it, in capital or small letters."""

    field: Field
    text: str


@dataclass(frozen=True, slots=True)
class In:
    """Equal to one of these."""

    field: Field
    values: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Words:
    """All words of a text, in any order, or as a phrase; in any of the columns of `words`."""

    text: str
    columns: tuple[str, ...] | None = None
    phrase: bool = False


@dataclass(frozen=True, slots=True)
class Box:
    """Taken between these degrees; with `west` greater than `east` it crosses the 180th."""

    south: float
    west: float
    north: float
    east: float


@dataclass(frozen=True, slots=True)
class Near:
    """Taken within so many kilometres of a place, over the surface of a sphere."""

    latitude: float
    longitude: float
    km: float


@dataclass(frozen=True, slots=True)
class Has:
    """The picture has this: a camera, captions, a place, a column of a captions file, …"""

    field: Field


Condition = And | Or | Not | Compare | Glob | Contains | In | Words | Box | Near | Has


def select(connection: sqlite3.Connection, condition: Condition) -> NDArray[np.int64]:
    """(n,) ids of the items that could be read and fulfil a condition, ascending.

    Raises InvalidConditionError for a field that there is not, a value of another type than the
    field's, and for conditions that are nested too deeply or have too many values.
    """
    where, values = _sql(condition, DEEPEST)
    if len(values) > MOST_VALUES:
        raise InvalidConditionError(
            f"a condition takes {MOST_VALUES:,} values, not {len(values):,}"
        )
    _define(connection)
    rows = connection.execute(
        "SELECT items.id FROM items JOIN roots ON roots.id = items.root_id"
        f" WHERE items.status = 'ok' AND {where} ORDER BY items.id",
        values,
    )
    return np.fromiter(chain.from_iterable(rows), dtype=np.int64)


def values(connection: sqlite3.Connection, field: str, most: int) -> list[tuple[str, int]]:
    """The commonest texts of a field and the number of pictures that have each, commonest first.

    Args:
        connection: to a catalogue.
        field: "camera", "folder" or "root"; any other name is that of a further column.
        most: so many at most.
    """
    if field in ("camera", "folder", "root"):
        text = _SPELLINGS[field][0]
        statement = (
            f"SELECT {text} AS value, count(*) FROM items JOIN roots ON roots.id = items.root_id"
            " WHERE items.status = 'ok' AND value IS NOT NULL"
        )
        parameters: list[Any] = [most]
    else:
        statement = (
            "SELECT coalesce(text, CAST(number AS TEXT)) AS value, count(DISTINCT item_id)"
            " FROM extras WHERE key = CAST(? AS TEXT)"
        )
        parameters = [_text(field), most]
    return connection.execute(
        f"{statement} GROUP BY value ORDER BY 2 DESC, 1 LIMIT ?", parameters
    ).fetchall()


# ── SQL ──────────────────────────────────────────────────────────────────────────────────────────

Sql = tuple[str, list[Any]]  # a condition in brackets or a call, and its parameters

_ROOT = (
    "CAST(roots.path AS TEXT)" if os.sep == "/" else "replace(CAST(roots.path AS TEXT), '\\', '/')"
)
_FILE = "CAST(items.file AS TEXT)"
_INSIDE = f"rtrim({_FILE}, replace({_FILE}, '/', ''))"  # a file's folder, with its last slash
_PATH = f"rtrim({_ROOT}, '/') || '/' || {_FILE}"
# The first is what is compared by size; any one may be equal.
_SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "path": (f"({_PATH})", _FILE),
    "folder": (
        f"rtrim({_INSIDE}, '/')",
        f"rtrim(rtrim({_ROOT}, '/') || '/' || {_INSIDE}, '/')",
    ),
    "name": (f"substr({_FILE}, length({_INSIDE}) + 1)",),
    "root": (_ROOT,),
    "taken": ("items.taken",),
    "modified": ("items.mtime_ns",),
    "width": ("items.width",),
    "height": ("items.height",),
    "aspect": ("(items.width * 1.0 / items.height)",),
    "megapixels": ("(items.width * items.height / 1e6)",),
    "size": ("items.size",),
    "captions": ("(SELECT count(*) FROM captions WHERE captions.item_id = items.id)",),
    "camera": ("items.camera",),
    "latitude": ("items.latitude",),
    "longitude": ("items.longitude",),
}
_FOLDERS = ("folder", "root")  # may be written with a slash at their end
_VALUES: Mapping[Type, tuple[type, ...]] = {
    "text": (str,),
    "number": (int, float),
    "time": (Period,),
    "place": (),
}
_CAPTIONS = "SELECT item_id FROM captions"
_EXTRAS = "SELECT item_id FROM extras WHERE key = CAST(? AS TEXT)"
_NEVER: Sql = ("0", [])


def _sql(condition: Condition, depth: int) -> Sql:
    if not depth:
        raise InvalidConditionError(f"conditions stand inside each other more than {DEEPEST} deep")
    match condition:
        case And(parts):
            return _joined(" AND ", [_sql(part, depth - 1) for part in parts], "1")
        case Or(parts):
            return _joined(" OR ", [_sql(part, depth - 1) for part in parts], "0")
        case Not(part):
            where, values = _sql(part, depth - 1)
            return f"NOT {where}", values
        case Compare(field, op, value):
            return _compared(field, op, value)
        case In(field, several):
            return _one_of(field, several)
        case Glob(field, pattern):
            return _tested(field, "{} GLOB CAST(? AS TEXT)", pattern.replace("[!", "[^"))
        case Contains(field, text) if text.isascii():
            return _tested(field, "instr(lower({}), CAST(? AS TEXT)) > 0", text.lower())
        case Contains(field, text):
            return _tested(
                field, "instr(folded(CAST({} AS BLOB)), CAST(? AS TEXT)) > 0", _fold(text)
            )
        case Words(text, columns, phrase):
            asks = words.expression(text, phrase=phrase, columns=columns)
            if asks is None:
                return _NEVER
            return "items.id IN (SELECT rowid FROM words WHERE words MATCH ?)", [asks]
        case Box(south, west, north, east):
            return _in_box(south, west, north, east)
        case Near(latitude, longitude, km):
            return _near(latitude, longitude, km)
        case Has(field):
            return _present(field)


def _joined(word: str, parts: Sequence[Sql], of_none: str) -> Sql:
    """Parts as one; many of them in groups, because each sign between two is one level of depth."""
    if len(parts) > 100:
        groups = [_joined(word, parts[i : i + 100], of_none) for i in range(0, len(parts), 100)]
        return _joined(word, groups, of_none)
    where = word.join(part for part, _ in parts) or of_none
    return f"({where})", [value for _, values in parts for value in values]


def _type(field: str) -> Type:
    if field not in FIELDS:
        raise InvalidConditionError(f"pictures have no field {field!r}")
    return FIELDS[field]


def _text(value: str) -> bytes:
    """A text as the catalogue has it: names that are no valid text as the bytes that they are."""
    try:
        return os.fsencode(value)
    except UnicodeEncodeError:
        return value.encode("utf-8", "replace")


def _compared(field: Field, op: Op, value: Value) -> Sql:
    if op not in OPS:
        raise InvalidConditionError(f"there is no comparison {op!r}")
    _check_type(field, value)
    if isinstance(field, Extra) or field == "caption":
        if op == "!=":
            has, of = _present(field)
            equal, values = _compared(field, "=", value)
            return f"({has} AND NOT {equal})", [*of, *values]
        return _any_compared(field, op, value)
    if isinstance(value, Period):
        time = _nanoseconds if field == "modified" else _stamp
        return _within(_SPELLINGS[field][0], op, time(value.start), time(value.end))
    if not isinstance(value, str):
        return f"coalesce({_SPELLINGS[field][0]} {op} ?, 0)", [value]
    if field in _FOLDERS:
        value = value.rstrip("/") or value
    spellings = _SPELLINGS[field] if op in ("=", "!=") else _SPELLINGS[field][:1]
    word = " AND " if op == "!=" else " OR "
    parts = [f"coalesce({one} {op} CAST(? AS TEXT), 0)" for one in spellings]
    return f"({word.join(parts)})", [_text(value)] * len(parts)


def _one_of(field: Field, values: Sequence[Value]) -> Sql:
    """Equal to one of several, which are looked up together: to compare each would take long."""
    simple = [value for value in values if not isinstance(value, Period)]
    parts = [_compared(field, "=", value) for value in values if isinstance(value, Period)]
    for value in simple:
        _check_type(field, value)
    texts = [_text(value) for value in simple if isinstance(value, str)]
    numbers: list[Any] = [value for value in simple if not isinstance(value, str)]
    if isinstance(field, Extra):
        numbers += [number for text in simple if (number := _number(text)) is not None]
    in_texts = f"IN ({', '.join(['CAST(? AS TEXT)'] * len(texts))})"
    in_numbers = f"IN ({', '.join('?' * len(numbers))})"
    if isinstance(field, Extra):
        where = f"(text {in_texts} OR number {in_numbers})"
        parts.append((f"items.id IN ({_EXTRAS} AND {where})", [_text(field.key), *texts, *numbers]))
    elif field == "caption":
        parts.append((f"items.id IN ({_CAPTIONS} WHERE text {in_texts})", texts))
    elif texts:
        if field in _FOLDERS:
            texts = [text.rstrip(b"/") or text for text in texts]
        parts += [(f"coalesce({one} {in_texts}, 0)", texts) for one in _SPELLINGS[field]]
    elif numbers:
        parts.append((f"coalesce({_SPELLINGS[field][0]} {in_numbers}, 0)", numbers))
    return _joined(" OR ", parts, "0")


def _check_type(field: Field, value: Value) -> None:
    if isinstance(field, str) and not isinstance(value, _VALUES[_type(field)]):
        raise InvalidConditionError(f"{field} is a {FIELDS[field]}, and {value!r} is none")


def _any_compared(field: Field, op: Op, value: Value) -> Sql:
    """A caption, or a value of a further column, that compares so."""
    if isinstance(field, str):
        assert isinstance(value, str)
        where = f"{_CAPTIONS} WHERE text {op} CAST(? AS TEXT)"
        return f"items.id IN ({where})", [_text(value)]
    key = _text(field.key)
    if isinstance(value, Period):  # as text: 2024-05-01, alone or with a time of day behind it
        at = "replace(text, 'T', ' ')"
        where, values = _within(at, op, _short(value.start), _short(value.end))
        return f"items.id IN ({_EXTRAS} AND {where})", [key, *values]
    if not isinstance(value, str):
        return f"items.id IN ({_EXTRAS} AND number {op} ?)", [key, value]
    if op == "=" and (number := _number(value)) is not None:  # 4 and "4" are the same there
        where = "(text = CAST(? AS TEXT) OR number = ?)"
        return f"items.id IN ({_EXTRAS} AND {where})", [key, _text(value), number]
    return f"items.id IN ({_EXTRAS} AND text {op} CAST(? AS TEXT))", [key, _text(value)]


def _within(at: str, op: Op, start: Any, end: Any) -> Sql:
    """A time beside the period from `start` up to `end`."""
    match op:
        case "=":
            return f"coalesce({at} >= ? AND {at} < ?, 0)", [start, end]
        case "!=":
            return f"coalesce({at} < ? OR {at} >= ?, 0)", [start, end]
        case "<" | ">=":
            return f"coalesce({at} {op} ?, 0)", [start]
        case "<=":
            return f"coalesce({at} < ?, 0)", [end]
        case ">":
            return f"coalesce({at} >= ?, 0)", [end]


def _tested(field: Field, test: str, value: str) -> Sql:
    """A text, or any one of several, that a test of one parameter holds of."""
    if isinstance(field, Extra):
        return f"items.id IN ({_EXTRAS} AND {test.format('text')})", [
            _text(field.key),
            _text(value),
        ]
    if field == "caption":
        return f"items.id IN ({_CAPTIONS} WHERE {test.format('text')})", [_text(value)]
    if _type(field) != "text":
        raise InvalidConditionError(f"{field} is a {FIELDS[field]}, not a text")
    parts = [f"coalesce({test.format(one)}, 0)" for one in _SPELLINGS[field]]
    return f"({' OR '.join(parts)})", [_text(value)] * len(parts)


def _present(field: Field) -> Sql:
    if isinstance(field, Extra):
        return f"items.id IN ({_EXTRAS})", [_text(field.key)]
    if field in ("caption", "captions"):
        return f"items.id IN ({_CAPTIONS})", []
    kind = _type(field)
    if kind == "place" or field in ("latitude", "longitude"):
        return "(items.latitude IS NOT NULL AND items.longitude IS NOT NULL)", []
    absent = {"text": "''", "number": "0", "time": "''"}[kind]
    return f"coalesce({_SPELLINGS[field][0]} != {absent}, 0)", []


def _in_box(south: float, west: float, north: float, east: float) -> Sql:
    across = " AND " if west <= east else " OR "
    return (
        "coalesce(items.latitude BETWEEN ? AND ?"
        f" AND (items.longitude >= ?{across}items.longitude <= ?), 0)",
        [south, north, west, east],
    )


def _near(latitude: float, longitude: float, km: float) -> Sql:
    """A circle: its box first, which is quick, then the distance."""
    angle = km / EARTH_KM + 1e-9  # never less than was meant
    high = math.degrees(angle)
    south, north = latitude - high, latitude + high
    west, east = -180.0, 180.0
    if south > -90 and north < 90:  # else a pole is inside
        wide = math.degrees(math.asin(math.sin(angle) / math.cos(math.radians(latitude)))) + 1e-9
        if wide < 180:
            west, east = ((side + 180) % 360 - 180 for side in (longitude - wide, longitude + wide))
    box, values = _in_box(south, west, north, east)
    distance = "coalesce(km_between(items.latitude, items.longitude, ?, ?) <= ?, 0)"
    return f"({box} AND {distance})", [*values, latitude, longitude, km]


# ── Values ───────────────────────────────────────────────────────────────────────────────────────


def _stamp(time: datetime) -> str:
    """A time as the column `taken` has it."""
    return time.replace(tzinfo=None).isoformat(sep=" ", timespec="microseconds")


def _short(time: datetime) -> str:
    """A time that sorts before all that begin with it: a midnight is the day alone."""
    text = time.replace(tzinfo=None).isoformat(sep=" ")
    return text.removesuffix(":00").removesuffix(" 00:00")


def _nanoseconds(time: datetime) -> int:
    try:
        return math.floor(time.replace(microsecond=0).timestamp()) * 10**9 + time.microsecond * 1000
    except (OverflowError, OSError, ValueError):  # before or after all that a clock can show
        return -(1 << 63) if time.year < 1970 else (1 << 63) - 1


def _number(text: Value) -> float | None:
    """The number that a text is as well."""
    try:
        number = float(text) if isinstance(text, str) else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _fold(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold()


def _folded(text: bytes | None) -> str | None:
    """A stored text without the difference of capital letters, however its accents are written."""
    return None if text is None else _fold(text.decode("utf-8", "replace"))


def km_between(
    latitude: float | None, longitude: float | None, other_latitude: float, other_longitude: float
) -> float | None:
    """Kilometres between two places in degrees, along a great circle (haversine)."""
    if latitude is None or longitude is None:
        return None
    north, east, other_north, other_east = map(
        math.radians, (latitude, longitude, other_latitude, other_longitude)
    )
    half = (
        math.sin((north - other_north) / 2) ** 2
        + math.cos(north) * math.cos(other_north) * math.sin((east - other_east) / 2) ** 2
    )
    return 2 * EARTH_KM * math.asin(min(1.0, math.sqrt(half)))


_FUNCTIONS: tuple[tuple[str, int, Callable[..., Any]], ...] = (
    ("folded", 1, _folded),
    ("km_between", 4, km_between),
)


def _define(connection: sqlite3.Connection) -> None:
    """Have our functions on a connection; none is defined again, which a running query forbids."""
    for name, arguments, function in _FUNCTIONS:
        known = connection.execute("SELECT 1 FROM pragma_function_list WHERE name = ?", (name,))
        if known.fetchone() is None:
            connection.create_function(name, arguments, function, deterministic=True)
