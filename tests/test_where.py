"""Filters as they are typed: what they mean, and where the fault is in those that mean nothing."""

import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
from conftest import ToyEncoder, paint
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from indexes.filters import (
    FIELDS,
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
)
from indexes.store import ModelSpec, Store
from retriever.errors import UsageError
from retriever.ingest import index_folder
from retriever.where import MAX_CHARS, MAX_NESTING, WhereError, parse

TOY = ModelSpec(ToyEncoder.name, ToyEncoder.dim, "toy-1")
COLUMNS = ["license", "tag", "date", "width", "File Type", "box", "portrait"]
DAY = Period(datetime(2024, 5, 6), datetime(2024, 5, 7))
LICENSE, DATE = Extra("license"), Extra("date")


@pytest.mark.parametrize(
    ("text", "condition"),
    [
        ("width >= 1920", Compare("width", ">=", 1920.0)),
        ("WIDTH>=1920", Compare("width", ">=", 1920.0)),
        ("width == .5e3", Compare("width", "=", 500.0)),
        ("latitude <> -10", Compare("latitude", "!=", -10.0)),
        ("size > 2MB", Compare("size", ">", 2e6)),
        ("size > 1.5KiB", Compare("size", ">", 1536.0)),
        ("size < 300", Compare("size", "<", 300.0)),
        ("aspect = 16:9", Compare("aspect", "=", 1920 / 1080)),
        ("aspect != 4/3", Compare("aspect", "!=", 640 / 480)),
        ("landscape", Compare("aspect", ">", 1.0)),
        ("Square", Compare("aspect", "=", 1.0)),
        ("taken = 2024", Compare("taken", "=", Period(datetime(2024, 1, 1), datetime(2025, 1, 1)))),
        (
            "taken < 2024-12",
            Compare("taken", "<", Period(datetime(2024, 12, 1), datetime(2025, 1, 1))),
        ),
        ("taken >= 2024-05-06", Compare("taken", ">=", DAY)),
        ("taken != 2024-5-6", Compare("taken", "!=", DAY)),
        (
            "modified > 2024-02-29T23:59",
            Compare(
                "modified",
                ">",
                Period(datetime(2024, 2, 29, 23, 59), datetime(2024, 3, 1)),
            ),
        ),
        (
            'taken <= "2024-02-29 12:00:59"',
            Compare(
                "taken",
                "<=",
                Period(datetime(2024, 2, 29, 12, 0, 59), datetime(2024, 2, 29, 12, 1)),
            ),
        ),
        ("taken < 9999", Compare("taken", "<", Period(datetime(9999, 1, 1), datetime.max))),
        ('camera = "NIKON D90"', Compare("camera", "=", "NIKON D90")),
        ("camera = 'it''s \"X\"'", Compare("camera", "=", 'it\'s "X"')),
        ('camera = "a ""b"""', Compare("camera", "=", 'a "b"')),
        ("camera = “NIKON D90”", Compare("camera", "=", "NIKON D90")),
        ("name = 2041", Compare("name", "=", "2041")),
        ("camera = in", Compare("camera", "=", "in")),
        ('camera = ""', Compare("camera", "=", "")),
        ('path like "*/trash/*"', Glob("path", "*/trash/*")),
        ("name not like IMG_*", And((Has("name"), Not(Glob("name", "IMG_*"))))),
        ("caption contains dog", Contains("caption", "dog")),
        ("camera in (a, 'b c')", In("camera", ("a", "b c"))),
        ("camera not in (a)", And((Has("camera"), Not(In("camera", ("a",)))))),
        ("width in (640, 800)", In("width", (640.0, 800.0))),
        ("taken in (2024-05-06)", In("taken", (DAY,))),
        ("has gps", Has("gps")),
        ("has captions", Has("captions")),
        ("has License", Has(LICENSE)),
        ('words "two dogs"', Words("two dogs")),
        ("caption words beach", Words("beach", ("captions",))),
        ("path not words beach", Not(Words("beach", ("name", "folders")))),
        ("gps in box(47, 5.5, 55, 15)", Box(47.0, 5.5, 55.0, 15.0)),
        ("gps in box (-10, 170, 10, -170)", Box(-10.0, 170.0, 10.0, -170.0)),
        ("gps not in box(1,2,3,4)", And((Has("gps"), Not(Box(1.0, 2.0, 3.0, 4.0))))),
        ("gps near (52.52, 13.4, 5 km)", Near(52.52, 13.4, 5.0)),
        ("gps near(52.52,13.4,500m)", Near(52.52, 13.4, 0.5)),
        ("gps not near (0, 0, 1km)", And((Has("gps"), Not(Near(0.0, 0.0, 1.0))))),
        ("license = cc0", Compare(LICENSE, "=", "cc0")),
        ("license != 4", Compare(LICENSE, "!=", "4")),
        ("license < 4", Compare(LICENSE, "<", 4.0)),
        ("license < '4'", Compare(LICENSE, "<", "4")),
        ("license in (cc0, 4)", Or((Compare(LICENSE, "=", "cc0"), Compare(LICENSE, "=", "4")))),
        ("width = 5", Compare("width", "=", 5.0)),
        ("extra.width = 5", Compare(Extra("width"), "=", "5")),
        ("`Width` = 5", Compare(Extra("width"), "=", "5")),
        ("`file type` like raw*", Glob(Extra("File Type"), "raw*")),
        ("box = 5", Compare(Extra("box"), "=", "5")),
        ("portrait = true", Compare(Extra("portrait"), "=", "true")),
        ("date = 2024-05", Glob(DATE, "2024-05*")),
        ("date >= 2024-05", Compare(DATE, ">=", "2024-05")),
        ("date <= 2024-05", Or((Compare(DATE, "<", "2024-05"), Glob(DATE, "2024-05*")))),
        (
            "date = 2024-05-06T12:30",
            Compare(DATE, "=", Period(datetime(2024, 5, 6, 12, 30), datetime(2024, 5, 6, 12, 31))),
        ),
        ("date = 2024-99", Compare(DATE, "=", "2024-99")),
        ("not has gps", Not(Has("gps"))),
        ("not not has gps", Has("gps")),
        ("(((has gps)))", Has("gps")),
        ("has\n\tgps", Has("gps")),
        (
            "has gps or has camera and not square",
            Or((Has("gps"), And((Has("camera"), Not(Compare("aspect", "=", 1.0)))))),
        ),
        (
            "(has gps OR has camera) And square",
            And((Or((Has("gps"), Has("camera"))), Compare("aspect", "=", 1.0))),
        ),
        (
            "not (square and square and landscape)",
            Not(
                And(
                    (
                        *[Compare("aspect", "=", 1.0)] * 2,
                        Compare("aspect", ">", 1.0),
                    )
                )
            ),
        ),
    ],
)
def test_a_filter_means_what_it_says(text: str, condition: Condition) -> None:
    assert parse(text, COLUMNS) == condition


def test_keywords_may_be_columns_where_nothing_else_can_be_meant() -> None:
    assert parse("like like like", ["like"]) == Glob(Extra("like"), "like")
    assert parse("near = 1 and android = 1", ["near", "android"]) == And(
        (Compare(Extra("near"), "=", "1"), Compare(Extra("android"), "=", "1"))
    )


# Each with the column that the error points at.
WRONG = [
    ("", 1),
    ("  \n ", 1),
    ('camra = "X"', 1),
    ("width > 5 and camra = 3", 15),
    ("(width > 5) or not(camra = 3)", 20),
    ("has nothing", 5),
    ("width > 5 or portrait = true", 14),
    ("extra.nothing = 3", 1),
    ("`my column` = 3", 1),
    ("width", 1),
    ("width >", 8),
    ("width > and height > 3", 9),
    ("width > wide", 9),
    ("width > 2MB", 9),
    ("width > 1e999", 9),
    ("width > nan", 9),
    ("width like 19*", 7),
    ("width = = 5", 9),
    ("width => 5", 8),
    ("width ! 5", 7),
    ("width is 5", 7),
    ("width > 5 height > 6", 11),
    ("width > 5 && height > 6", 11),
    ("width > 5 and", 14),
    ("and width > 5", 1),
    ("width > 5 or or height > 5", 14),
    ("width > 5)", 10),
    ("(width > 5", 11),
    ("()", 2),
    ("not", 4),
    ("! has gps", 1),
    ("size > 2XB", 8),
    ("size > 2 MB", 10),
    ("aspect = 16:0", 10),
    ("taken > yesterday", 9),
    ("taken = 2024-13", 9),
    ("taken = 2024-02-30", 9),
    ("taken = 2024-05-06T25:00", 9),
    ("taken in (2023, tomorrow)", 17),
    ("taken contains 2024", 7),
    ('camera = "NIKON', 10),
    ("camera = 'X' and path like '*", 28),
    ("`my column = 3", 1),
    ("camera = NIKON D90", 16),
    ("camera in ()", 12),
    ('camera in ("a", )', 17),
    ('camera in "a"', 11),
    ('camera = "X"; drop table items', 13),
    ("has", 4),
    ("words", 6),
    ('words "!!"', 7),
    ('width words "x"', 1),
    ("gps", 1),
    ("gps = 5", 1),
    ("gps in (1, 2)", 1),
    ("gps in box(1, 2, 3)", 19),
    ("gps in box(1, 2, 3, 4, 5)", 22),
    ("gps in box(91, 2, 3, 4)", 12),
    ("gps in box(50, 2, 3, 4)", 19),
    ("gps in box(1, 200, 3, 4)", 15),
    ("gps near (1, 2)", 15),
    ("gps near (1, 2, 5)", 17),
    ("gps near (1, 2, -5 km)", 17),
    ("gps near (1, 2, 5 miles)", 17),
    ("camera in box(1, 2, 3, 4)", 1),
    ("has gps\nand\ncamra = 4", 13),
    ("x" * (MAX_CHARS + 1), MAX_CHARS + 1),
]


def test_a_shape_with_a_comparison_is_told_to_stand_by_itself() -> None:
    with pytest.raises(WhereError, match="portrait stands by itself") as caught:
        parse("portrait = true")
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(("text", "column"), WRONG)
def test_a_wrong_filter_is_shown_with_a_mark_under_the_fault(text: str, column: int) -> None:
    with pytest.raises(WhereError) as caught:
        parse(text, ["license", "File Type"])
    assert isinstance(caught.value, UsageError)
    assert caught.value.column == column
    said, shown, mark, *_ = str(caught.value).splitlines()
    assert said.startswith(f"the filter at column {column}: ")
    if text.strip():
        at = mark.index("^")
        assert (shown[at:] + " ")[0] == (text[column - 1 :] + " ")[0].replace("\n", " ")
        assert len(shown) < 130


def test_an_unknown_name_comes_with_those_that_there_are() -> None:
    def told(text: str) -> str:
        with pytest.raises(WhereError) as caught:
            parse(text, ["license", "File Type"])
        return str(caught.value)

    assert told('has gps and camra = "X"').splitlines() == [
        "the filter at column 13: there is no field “camra”; did you mean camera?",
        '  has gps and camra = "X"',
        "              ^",
        f"fields: {', '.join(FIELDS)}",
        "columns of captions files: `File Type`, license",
    ]
    assert "did you mean license?" in told("lisence = cc0")
    assert "did you mean `File Type`?" in told("has filetype")
    assert "did you mean landscape?" in told("landscap")
    assert "did you mean" not in told("xyzzy = 1")
    with pytest.raises(WhereError, match="columns of captions files: none here"):
        parse("licence = cc0")


def test_the_mark_stands_under_wide_letters_and_in_a_long_filter() -> None:
    with pytest.raises(WhereError) as caught:
        parse("camera = '狗狗é' and camra = 5")
    _, shown, mark, *_ = str(caught.value).splitlines()
    assert mark.index("^") == shown.index("camra") + 2  # two letters are two columns wide
    long = " or ".join(["width > 100"] * 100)
    with pytest.raises(WhereError) as caught:
        parse(f"{long} or camra = 5 or {long}")
    _, shown, mark, *_ = str(caught.value).splitlines()
    assert shown[mark.index("^") :].startswith("camra = 5 or")
    assert shown.strip().startswith("…")
    assert shown.endswith("…")


def test_what_no_terminal_should_see_is_not_in_the_error() -> None:
    for text in ("\x1b[2J\udcff = 5", "width > \x1b[2J\ud800", "`\x1b` = 5"):
        with pytest.raises(WhereError) as caught:
            parse(text)
        said = str(caught.value)
        assert "\x1b" not in said
        assert said.encode()


# ── In a library ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with Store.create(tmp_path_factory.mktemp("empty") / "a.lib", TOY) as store:
        yield store


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """Three pictures with a camera, a place and columns of a captions file, where they have any."""
    home = tmp_path_factory.mktemp("photographs")
    folder = home / "p"
    berlin = paint(folder / "2024/berlin.jpg", "red", side=30)
    exif = Image.Exif()
    exif[0x010F], exif[0x0110] = "NIKON CORPORATION", "NIKON D90"
    exif.get_ifd(0x8769)[0x9003] = "2024:05:06 12:30:15"
    gps = exif.get_ifd(0x8825)
    gps.update({1: "N", 2: (52.0, 31.0, 12.0), 3: "E", 4: (13.0, 24.0, 18.0)})
    Image.new("RGB", (60, 30), "red").save(berlin, exif=exif)
    paint(folder / "old/IMG_2041.png", "green")
    paint(folder / "trash/blue.png", "blue")
    lines = [
        {"file": "2024/berlin.jpg", "caption": "two dogs run", "tags": ["dog", "city"], "year": 24},
        {"file": "old/IMG_2041.png", "caption": "a cat", "year": "1999", "by": {"name": "Ann"}},
    ]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with Store.create(home / "a.lib", TOY) as store:
        index_folder(store, ToyEncoder, folder)
        yield store


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("taken >= 2024-01-01 and (camera = 'NIKON D90' or has gps)", "berlin"),
        ("not path like */trash/*", "berlin IMG_2041"),
        ("taken = 2024-05-06T12:30", "berlin"),
        ("taken > 2024-05", ""),
        ("landscape and aspect = 2:1 and width = 60", "berlin"),
        ("gps near (52.52, 13.4, 1 km)", "berlin"),
        ("gps near (48.1, 11.6, 100 km)", ""),
        ("gps in box(47, 5, 55, 15)", "berlin"),
        ("not has captions", "blue"),
        ("captions = 1 and not has by.name", "berlin"),
        ("by.name = Ann or tags = city", "berlin IMG_2041"),
        ("tags != dog", ""),
        ("tags in (sea, dog)", "berlin"),
        ("year = 1999 or year < 30", "berlin IMG_2041"),
        ("words 'dog run'", "berlin"),
        ("name words 2041", "IMG_2041"),
        ("caption contains CAT", "IMG_2041"),
        ("modified > 2000 and size < 1MB", "berlin IMG_2041 blue"),
        ("folder = trash", "blue"),
        ("not camera = 'NIKON D90'", "IMG_2041 blue"),
        ("camera != 'NIKON D90'", ""),
        ("camera = \"x' OR '1'='1\"", ""),
    ],
)
def test_pictures_are_found_by_what_their_files_tell(
    photographs: Store, text: str, names: str
) -> None:
    with photographs.snapshot() as rows:
        ids = rows.select(parse(text, rows.extra_keys()))
    assert {item.path.stem for item in photographs.items(ids.tolist())} == set(names.split())


@pytest.mark.parametrize(
    "text",
    [
        f"x in ({','.join(['1'] * ((MAX_CHARS - 10) // 2))})",
        f"path in ({','.join(['a'] * ((MAX_CHARS - 10) // 2))})",
        " or ".join(["x=1"] * (MAX_CHARS // 7)),
        "not " * 1000 + "x != 2024-05",
        "(" * 2000 + "x > 2024-05" + ")" * 2000,
        "not (x = 1 and (x = 2 or " * (MAX_NESTING // 3)
        + "x > 2024-05"
        + "))" * (MAX_NESTING // 3),
    ],
)
def test_whatever_fits_into_a_filter_can_be_asked(empty_store: Store, text: str) -> None:
    assert len(text) <= MAX_CHARS
    assert empty_store.select(parse(text, ["x"])).tolist() == []


def test_tests_inside_each_other_have_a_limit() -> None:
    deep = "not (x = 1 and (x = 2 or " * MAX_NESTING + "x = 3" + "))" * MAX_NESTING
    with pytest.raises(WhereError, match=f"more than {MAX_NESTING} deep"):
        parse(deep, ["x"])


WORDS = [
    *("and", "or", "not", "has", "in", "like", "contains", "words", "box", "near", "(", ")", ","),
    *("=", "!=", "<", ">=", "width", "taken", "camera", "gps", "tag", "extra.tag", "`tag`", "5"),
    *("2024-05", "'a b'", '"', "5 km", "portrait", "[", "*", "\0", "\ud800", "狗", "1e400", "“”"),
]


@settings(deadline=None)
@given(st.text(max_size=40) | st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join))
def test_any_text_is_a_filter_that_can_be_asked_or_a_fault_with_a_place(
    empty_store: Store, text: str
) -> None:
    column, condition = 0, None
    try:
        condition = parse(text, ["tag"])
    except WhereError as exc:
        column = exc.column
    assert (condition is None) == (1 <= column <= len(text) + 1)
    if condition is not None:
        assert empty_store.select(condition).tolist() == []


def test_the_parser_is_loaded_for_filters_alone() -> None:
    code = (
        "import sys, retriever.where as where; assert 'lark' not in sys.modules;"
        " where.parse('has gps'); assert 'lark' in sys.modules and 'sqlalchemy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
