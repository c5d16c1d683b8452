"""Conditions against the same conditions in Python, over pictures with and without each value."""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from indexes import filters, vectors
from indexes.errors import InvalidConditionError, InvalidRowsError
from indexes.filters import (
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
    Or,
    Period,
    Words,
    km_between,
)
from indexes.records import CaptionRow, ItemRow, ItemWrite, Kind, in_order
from indexes.store import ModelSpec, Store

ROOTS = (Path("/photos/Italy"), Path("/other"))
MODEL = ModelSpec("toy", 4, "toy-fingerprint")
CAMERAS = (None, "NIKON D90", "Canon EOS 5D", "nikon d90", "100%_'\"; DROP TABLE items; --")
PLACES = ((None, None), (45.4, 12.3), (41.9, 12.5), (-17.8, 179.5), (-17.8, -179.5), (89.9, 10.0))
FILES = ("a.jpg", "2024/b.JPG", "2024/Été/c.png", "trash/[x].jpg", "trash/e*.jpg", "x/y/z.gif")
TEXTS = ("Two dogs run", "a dog", "STRASSE in Köln", "a red_car", "50% off")
EXTRAS: tuple[tuple[tuple[str, str | float], ...], ...] = (
    (),
    (("stars", 4.0), ("tag", "beach")),
    (("stars", "4"), ("tag", "beach"), ("tag", "dog")),
    (("stars", 2.5), ("date", "2024-05-01T10:00:00")),
    (("date", "2024-05-02"), ("tag", "Étoile"), ("a 'key\"", "x")),
)
DAY = Period(datetime(2024, 5, 1), datetime(2024, 5, 2))
TIMES = (
    None,
    datetime(2024, 4, 30, 23, 59, 59, 999999),
    datetime(2024, 5, 1),
    datetime(2024, 5, 1, 12, 30),
    datetime(2024, 5, 2),
    datetime(1969, 12, 31, 1),
)


def one_row() -> np.ndarray:
    return np.array([1, 0, 0, 0], dtype=np.float32)


def pictures() -> list[list[ItemWrite]]:
    """For each root, pictures in which the values above meet in many ways."""
    rng = np.random.default_rng(5)
    batches = []
    for root in range(len(ROOTS)):
        batch = []
        for number in range(60):
            latitude, longitude = PLACES[rng.integers(len(PLACES))]
            texts = [TEXTS[place] for place in rng.permutation(len(TEXTS))[: rng.integers(0, 4)]]
            file = FILES[rng.integers(len(FILES))]
            changed = datetime(2024, 5, 1) + timedelta(hours=int(rng.integers(-30, 60)))
            batch.append(
                ItemWrite(
                    file=f"{number:02d}{file}" if rng.random() < 0.5 else f"{number}/{file}",
                    size=int(rng.integers(1, 5)) * 1000,
                    mtime_ns=int(changed.timestamp()) * 10**9 + int(rng.integers(0, 2)),
                    content_hash=f"{root} {number}".encode(),
                    width=int(rng.choice([0, 640, 1000, 1920])),
                    height=int(rng.choice([0, 480, 1000, 1080])),
                    taken=TIMES[rng.integers(len(TIMES))],
                    captions=tuple(CaptionRow(text, "given") for text in texts),
                    image_embedding=one_row(),
                    caption_embeddings=np.tile(one_row(), (len(texts), 1)) if texts else None,
                    camera=CAMERAS[rng.integers(len(CAMERAS))],
                    latitude=latitude,
                    longitude=longitude,
                    extras=in_order(EXTRAS[rng.integers(len(EXTRAS))]),
                )
            )
        batches.append(batch)
    failed = ItemWrite("bad.jpg", 1, 1, None, 0, 0, failure="broken", camera="NIKON D90")
    strange = ItemWrite(
        os.fsdecode(b"caf\xe9/\xff1.jpg"), 1, 1, b"strange", 4, 4, image_embedding=one_row()
    )
    return [[*batches[0], failed], [*batches[1], strange]]


class World:
    """A store, and its items that could be read."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.rows = [row for row in store.items(store.item_ids()) if row.status == "ok"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with Store.create(tmp_path_factory.mktemp("filters") / "f.lib", MODEL) as store:
        with store.writer() as writer:
            for root, batch in zip(ROOTS, pictures(), strict=True):
                writer.write(writer.add_root(root), batch)
        yield World(store)


# ── The same in Python ───────────────────────────────────────────────────────────────────────────


def values_of(row: ItemRow, field: filters.Field) -> list[Any]:
    """What a picture has of a field; the first is what is compared by size."""
    if isinstance(field, Extra):
        return [value for key, value in row.extras if key == field.key]
    posix = row.path.as_posix()
    place = None if row.latitude is None else (row.latitude, row.longitude)
    folder, _, name = row.file.rpartition("/")
    values: dict[str, list[Any]] = {
        "path": [posix, row.file],
        "folder": [folder, posix.rpartition("/")[0]],
        "name": [name],
        "root": [row.root.as_posix()],
        "taken": [row.taken],
        "modified": [row.mtime_ns],
        "width": [row.width],
        "height": [row.height],
        "aspect": [row.width / row.height if row.height else None],
        "megapixels": [row.width * row.height / 1e6],
        "size": [row.size],
        "captions": [len(row.captions)],
        "caption": [caption.text for caption in row.captions],
        "camera": [row.camera],
        "latitude": [row.latitude],
        "longitude": [row.longitude],
        "gps": [place],
    }
    return [value for value in values[field] if value is not None]


def as_bytes(text: str) -> bytes:
    return text.encode("utf-8", "replace" if "\ud800" in text else "surrogateescape")


def compared(value: Any, op: str, wanted: Any, field: filters.Field) -> bool:
    if isinstance(wanted, Period):
        start: Any = wanted.start
        end: Any = wanted.end
        if field == "modified":
            start, end = (int(time.timestamp()) * 10**9 for time in (start, end))
        elif isinstance(field, Extra):
            if not isinstance(value, str):
                return False
            try:
                value = datetime.fromisoformat(value)
            except ValueError:
                return False
        answers = {
            "=": start <= value < end,
            "!=": not start <= value < end,
            "<": value < start,
            "<=": value < end,
            ">": value >= end,
            ">=": value >= start,
        }
        return answers[op]
    if isinstance(field, Extra) and op in ("=", "!=") and isinstance(wanted, str):
        try:
            return value in (wanted, float(wanted)) if op == "=" else value != wanted
        except ValueError:
            pass
    if isinstance(value, str) != isinstance(wanted, str):
        return False
    if isinstance(value, str):  # as bytes, the order that SQLite has
        value, wanted = as_bytes(value), as_bytes(wanted)
    answers = {
        "=": value == wanted,
        "!=": value != wanted,
        "<": value < wanted,
        "<=": value <= wanted,
        ">": value > wanted,
        ">=": value >= wanted,
    }
    return answers[op]


def shaped(text: str, pattern: str) -> bool:
    signs = {"*": ".*", "?": "."}
    whole = ""
    for part in re.findall(r"\[[!^]?\]?[^]]*\]|.", pattern, re.DOTALL):
        if len(part) > 1:
            whole += "[" + part[1:].replace("!", "^", 1).replace("[", r"\[")
        else:
            whole += signs.get(part) or re.escape(part)
    return re.fullmatch(whole, text, re.DOTALL) is not None


def words_of(text: str) -> list[str]:
    plain = unicodedata.normalize("NFKD", text)
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    return [word.lower().removesuffix("s") for word in re.findall(r"[^\W_]+", plain)]


def holds(row: ItemRow, condition: Condition) -> bool:
    match condition:
        case And(parts):
            return all(holds(row, part) for part in parts)
        case Or(parts):
            return any(holds(row, part) for part in parts)
        case Not(part):
            return not holds(row, part)
        case Compare(field, "!=", value):
            return bool(values_of(row, field)) and not holds(row, Compare(field, "=", value))
        case Compare(field, op, value):
            values = values_of(row, field)
            is_one = field in ("path", "folder") and op != "="
            return any(
                compared(one, op, value, field) for one in (values[:1] if is_one else values)
            )
        case In(field, several):
            return any(holds(row, Compare(field, "=", value)) for value in several)
        case Glob(field, pattern):
            return any(isinstance(v, str) and shaped(v, pattern) for v in values_of(row, field))
        case Contains(field, text):
            return any(
                isinstance(v, str) and text.casefold() in v.casefold()
                for v in values_of(row, field)
            )
        case Words(text, columns, phrase):
            assert columns == ("captions",)
            wanted = words_of(text)
            said = [words_of(caption.text) for caption in row.captions]
            if phrase:
                length = len(wanted)
                return bool(wanted) and any(
                    some[at : at + length] == wanted for some in said for at in range(len(some))
                )
            return bool(wanted) and set(wanted) <= {word for some in said for word in some}
        case Box(south, west, north, east):
            if row.latitude is None or row.longitude is None:
                return False
            is_inside = (
                west <= row.longitude <= east if west <= east else not east < row.longitude < west
            )
            return south <= row.latitude <= north and is_inside
        case Near(latitude, longitude, km):
            distance = km_between(row.latitude, row.longitude, latitude, longitude)
            return distance is not None and distance <= km
        case Has(field):
            values = values_of(row, field)[:1]
            return any(one not in ("", 0) or field in ("latitude", "longitude") for one in values)


TEXT_FIELDS = st.sampled_from(["path", "folder", "name", "root", "caption", "camera"])
NUMBER_FIELDS = st.sampled_from(
    ["width", "height", "aspect", "megapixels", "size", "captions", "latitude", "longitude"]
)
EXTRA_FIELDS = st.sampled_from([Extra(key) for key in ("stars", "tag", "date", "a 'key\"", "no")])
OPS = st.sampled_from(filters.OPS)
KNOWN_TEXTS = [
    *(camera for camera in CAMERAS if camera),
    *TEXTS,
    *FILES,
    *("2024", "trash", "", "/photos/Italy", "/other/2024", "/other", "z.gif", "beach", "4", "2.5"),
    *("2024-05-01", "Étoile", "étOILE", "dog", "ÖLN", "%", "_", "'", "\ud800", "\0"),
]
SOME_TEXT = st.sampled_from(KNOWN_TEXTS) | st.text("aeÉé/.2'\"%_*?", max_size=4)
SOME_NUMBER = st.sampled_from([0, 1, 4, 2.5, 480, 1000, 1.0, 16 / 9, 3000, 0.64, 45.4, -17.8, 180])
INSTANTS = st.sampled_from([time for time in TIMES if time])
PERIODS = st.just(DAY) | st.builds(
    lambda start, days: Period(start, start + timedelta(days=days)), INSTANTS, st.integers(0, 400)
)
PATTERNS = st.sampled_from(
    [
        *("*", "*.jpg", "*.JPG", "*/trash/*", "trash/*", "*/[[]x].jpg", "*[*].jpg", "?*", "[0-9]*"),
        *("[!0-9]*", "/photos/*/?.*", "NIKON*", "*é*", "*É*", "", "*'*"),
    ]
)
COORDINATES = st.tuples(
    st.sampled_from([-90.0, -17.8, 41.9, 45.4, 89.9, 90.0]) | st.floats(-90, 90),
    st.sampled_from([-180.0, -179.5, 12.3, 179.5, 180.0]) | st.floats(-180, 180),
)
LEAVES = st.one_of(
    st.builds(Compare, TEXT_FIELDS | EXTRA_FIELDS, OPS, SOME_TEXT),
    st.builds(Compare, NUMBER_FIELDS | EXTRA_FIELDS, OPS, SOME_NUMBER),
    st.builds(Compare, st.sampled_from(["taken", "modified", Extra("date")]), OPS, PERIODS),
    st.builds(In, TEXT_FIELDS | EXTRA_FIELDS, st.lists(SOME_TEXT, max_size=3).map(tuple)),
    st.builds(In, NUMBER_FIELDS | EXTRA_FIELDS, st.lists(SOME_NUMBER, max_size=3).map(tuple)),
    st.builds(Glob, TEXT_FIELDS | EXTRA_FIELDS, PATTERNS),
    st.builds(Contains, TEXT_FIELDS | EXTRA_FIELDS, SOME_TEXT),
    st.builds(
        Words,
        st.sampled_from(
            [*TEXTS, "dog run", "dogs", "run two", "in koln", "car red", "", "?", "off a"]
        ),
        st.just(("captions",)),
        st.booleans(),
    ),
    st.builds(lambda a, b: Box(a[0], a[1], b[0], b[1]), COORDINATES, COORDINATES),
    st.builds(
        lambda at, km: Near(*at, km), COORDINATES, st.sampled_from([0.0, 1, 70, 400, 25_000])
    ),
    st.builds(Has, TEXT_FIELDS | NUMBER_FIELDS | EXTRA_FIELDS | st.sampled_from(["gps", "taken"])),
)
CONDITIONS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(Not, inner),
        st.builds(And, st.lists(inner, max_size=3).map(tuple)),
        st.builds(Or, st.lists(inner, max_size=3).map(tuple)),
    ),
    max_leaves=5,
)


def expected(world: World, condition: Condition) -> list[int]:
    return [row.item_id for row in world.rows if holds(row, condition)]


@settings(max_examples=400, deadline=None)
@given(condition=CONDITIONS)
def test_a_condition_selects_what_it_holds_of(world: World, condition: Condition) -> None:
    assert world.store.select(condition).tolist() == expected(world, condition)


# ── Worked by hand ───────────────────────────────────────────────────────────────────────────────


def test_what_is_absent_fulfils_not_but_no_comparison(world: World) -> None:
    nikon = Compare("camera", "=", "NIKON D90")
    bare = [row.item_id for row in world.rows if row.camera is None]
    assert set(bare) <= set(world.store.select(Not(nikon)))
    assert not set(bare) & set(world.store.select(Compare("camera", "!=", "NIKON D90")))


def test_pictures_that_failed_are_never_selected(world: World) -> None:
    [failed] = [row.item_id for row in world.store.failures()]
    assert failed not in world.store.select(Compare("camera", "=", "NIKON D90"))
    assert failed not in world.store.select(Not(Has("gps")))
    assert world.store.select(And(())).tolist() == [row.item_id for row in world.rows]


def test_a_list_has_each_of_its_values(world: World) -> None:
    listed = [row.item_id for row in world.rows if ("tag", "dog") in row.extras]
    assert listed
    assert world.store.select(Compare(Extra("tag"), "=", "dog")).tolist() == listed
    others = world.store.select(Compare(Extra("tag"), "!=", "dog"))
    assert not set(others) & set(listed)
    assert set(listed) <= set(world.store.select(Compare(Extra("tag"), "=", "beach")))


def test_a_name_that_is_no_text_is_found_by_its_bytes(world: World) -> None:
    name = os.fsdecode(b"\xff1.jpg")
    [found] = world.store.select(Compare("name", "=", name))
    assert world.store.select(Glob("path", os.fsdecode(b"caf\xe9/*"))).tolist() == [found]
    assert world.store.select(In("folder", ("x", os.fsdecode(b"caf\xe9")))).tolist() == [found]


def test_nothing_that_is_typed_becomes_sql(world: World) -> None:
    evil = "'; DROP TABLE items; --"
    for condition in (
        Compare("path", "=", evil),
        Compare(Extra(evil), "=", evil),
        Glob("name", evil),
        Contains("caption", f'{evil}" OR "'),
        Words(f'{evil} " AND NEAR(x y) OR captions : * ^z', None),
        Words("dog* OR NOT AND", None, phrase=True),
    ):
        where, values = filters._sql(condition, filters.DEEPEST)
        assert evil not in where
        assert len(values) == where.count("?")
        assert not world.store.select(condition).size
    assert world.store.select(And(())).size == len(world.rows)


def test_a_sheet_of_many_values_is_one_condition(world: World) -> None:
    names = tuple(f"{number:02d}a.jpg" for number in range(9_000))
    named = [row.item_id for row in world.rows if row.path.name in names]
    assert len(named) > 1
    assert world.store.select(In("name", names)).tolist() == named
    with pytest.raises(InvalidConditionError, match="10,000 values"):
        world.store.select(In("name", tuple(map(str, range(10_001)))))


def test_the_deepest_condition_is_answered_and_a_deeper_one_refused(world: World) -> None:
    some = Compare(Extra("tag"), "!=", "4")
    wraps = (
        Not,
        lambda inner: And((Has("camera"), inner)),
        lambda inner: Or((Compare("path", "=", "x"), Near(1, 2, 3), And((Has("gps"), inner)))),
    )
    for levels, wrap in zip((1, 1, 2), wraps, strict=True):
        deep: Condition = some
        for _ in range((filters.DEEPEST - 1) // levels):
            deep = wrap(deep)
        assert world.store.select(deep).tolist() == expected(world, deep)
        with pytest.raises(InvalidConditionError, match="more than 20 deep"):
            world.store.select(wrap(wrap(deep)))


@pytest.mark.parametrize(
    "condition",
    [
        Compare("colour", "=", "red"),
        Compare("width", "=", "640"),
        Compare("camera", "<", 3.0),
        Compare("taken", "=", "2024"),
        Compare("width", "=", DAY),
        Compare("gps", "=", "x"),
        Compare("caption", "=", 3.0),
        Compare("width", "LIKE", 3.0),  # type: ignore[arg-type]
        Glob("width", "6*"),
        Contains("taken", "2024"),
        Has("colour"),
        Words("dog", ("colour",)),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(world: World, condition: Condition) -> None:
    with pytest.raises(InvalidConditionError, match=r"field|is a|comparison|column"):
        world.store.select(condition)


def test_a_circle_may_hold_a_pole_or_the_180th_degree(world: World) -> None:
    def places(condition: Condition) -> set[tuple[float | None, float | None]]:
        rows = world.store.items(world.store.select(condition).tolist())
        return {(row.latitude, row.longitude) for row in rows}

    fiji = {(-17.8, 179.5), (-17.8, -179.5)}
    assert places(Near(-17.8, 180.0, 60)) == fiji
    assert places(Box(-20, 179, -10, -179)) == fiji
    assert places(Near(89.9, -170.0, 30)) == {(89.9, 10.0)}
    assert places(Near(45.4, 12.3, 0)) == {(45.4, 12.3)}
    # Venice and Rome are 390 km apart.
    assert places(Near(45.4, 12.3, 395)) == {(45.4, 12.3), (41.9, 12.5)}
    assert math.isclose(km_between(45.4, 12.3, 41.9, 12.5) or 0, 389.5, abs_tol=0.5)


def test_a_running_query_does_not_keep_conditions_from_being_asked(world: World) -> None:
    with world.store.snapshot() as rows:
        running = rows.vectors("image")
        next(running)
        assert rows.select(Contains("name", "É")).tolist() == expected(world, Contains("name", "É"))
        assert rows.select(Near(0, 0, 10)).size == 0


# ── The k best of what a condition selects ───────────────────────────────────────────────────────

DIM = 16
SHARES = (0.0, 0.0001, 0.001, 0.01, 0.03, 0.1, 0.5, 0.999, 1.0)
N = 10_000


def unit_rows(count: int, seed: int) -> np.ndarray:
    """(count, DIM) float32 of which many are equal after rounding."""
    rows = np.random.default_rng(seed).integers(-2, 3, (count, DIM)).astype(np.float32)
    rows[:, 0] += 5
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """10,000 pictures whose sizes are 0, 1, …; some removed, some newer than the FAISS files."""
    images, texts = unit_rows(N, 0), unit_rows(N, 1)
    sizes = np.random.default_rng(2).permutation(N)
    path = tmp_path_factory.mktemp("large") / "large.lib"
    with Store.create(path, ModelSpec("toy", DIM, "toy-fingerprint")) as store:
        with store.writer() as writer:
            root = writer.add_root(path.parent)
            for start, stop in ((0, 9_000), (9_000, N)):
                writer.write(
                    root,
                    [
                        ItemWrite(
                            file=f"{n}.jpg",
                            size=int(sizes[n]),
                            mtime_ns=1,
                            content_hash=n.to_bytes(4, "big"),
                            width=8,
                            height=8,
                            captions=(CaptionRow(f"number {n}", "given"),) * (n % 2),
                            image_embedding=images[n],
                            caption_embeddings=texts[n, None] if n % 2 else None,
                        )
                        for n in range(start, stop)
                    ],
                )
                if start == 0:
                    writer.finish()
            writer.remove(range(1, 200, 20))
        yield store


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("kind", ["image", "caption"])
def test_there_are_k_results_at_every_selectivity_and_they_are_the_best(
    large: Store, kind: Kind, share: float
) -> None:
    selected = large.select(Compare("size", "<", round(share * N)))
    assert len(selected) >= share * N - 10
    with large.snapshot() as rows:
        ids = selected if kind == "image" else np.array(rows.caption_ids(selected), dtype=np.int64)
        stored = rows.embeddings(kind, ids.tolist())
    for queries, k in ((unit_rows(1, 3), 10), (unit_rows(9, 4), 3), (unit_rows(1, 5), 400)):
        matches = large.search(kind, queries, k, among=np.random.default_rng(6).permutation(ids))
        for query, match in zip(queries, matches, strict=True):
            scores = {
                owner: np.float32((vector.astype(np.float64) * query).sum())
                for owner, vector in stored.items()
            }
            best = sorted(scores, key=lambda owner: (-scores[owner], owner))[:k]
            assert match.ids.tolist() == best
            assert match.scores.tolist() == [scores[owner] for owner in best]


def test_few_rows_among_many_are_answered_alike_however_they_are_read(
    large: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    selected = large.select(Compare("size", "<", 900.0))
    queries = unit_rows(3, 7)
    answers = []
    for narrow in (1, 1 << 30):
        monkeypatch.setattr(vectors, "NARROW", narrow)
        found = large.search("image", queries, 20, among=selected)
        answers.append([(match.ids.tolist(), match.scores.tolist()) for match in found])
    assert answers[0] == answers[1]


def test_captions_of_many_pictures_are_those_of_each(large: Store) -> None:
    with large.snapshot() as rows:
        ids = np.array(rows.item_ids())[::-1]
        several = rows.caption_ids(ids)
        one_by_one = [one for item_id in sorted(ids) for one in rows.caption_ids([int(item_id)])]
        assert len(several) > 4_000
        assert several == one_by_one
        assert rows.caption_ids(ids[:100]) == rows.caption_ids(sorted(ids[:100].tolist()))


def test_further_columns_are_counted_by_picture(world: World) -> None:
    with world.store.snapshot() as rows:
        counts = rows.extra_keys()
    keys = {key for row in world.rows for key, _ in row.extras}
    assert counts == {
        key: sum(any(own == key for own, _ in row.extras) for row in world.rows)
        for key in sorted(keys)
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"latitude": 1.0},
        {"latitude": 91.0, "longitude": 0.0},
        {"latitude": math.nan, "longitude": 0.0},
        {"perceptual_hash": 1 << 63},
        {"camera": "\ud800"},
        {"extras": (("stars", math.inf),)},
        {"extras": (("\ud800", "x"),)},
        {"extras": (("tag", "\ud800"),)},
    ],
    ids=str,
)
def test_facts_that_cannot_be_kept_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with Store.create(tmp_path / "x.lib", MODEL) as store, store.writer() as writer:
        root = writer.add_root(tmp_path)
        with pytest.raises(InvalidRowsError):
            writer.write(
                root, [ItemWrite("a", 1, 1, b"a", 1, 1, image_embedding=one_row(), **changes)]
            )
        assert not store.item_ids()
