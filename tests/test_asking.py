"""What a typed query means, and what only looks like grammar in it."""

import time
from pathlib import Path

import pytest
from conftest import paint
from hypothesis import given
from hypothesis import strategies as st

from retriever.asking import Query, negation_hint, parse, phrases, picture, thing, unquoted
from retriever.errors import UsageError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with pictures in it."""
    monkeypatch.chdir(tmp_path)
    paint(tmp_path / "pool.jpg", "blue")
    paint(tmp_path / "new york city.jpg", "white")
    paint(tmp_path / "trip" / "car.png", "red")
    return tmp_path


# ── grammar ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("typed", "texts", "images", "without"),
    [
        # rclip's own examples
        ("horse + stripes", {"horse": 1, "stripes": 1}, {}, ()),
        ("apple - fruit", {"apple": 1}, {}, ("fruit",)),
        ("./new york city.jpg + night", {"night": 1}, {"./new york city.jpg": 1}, ()),
        ("2:golden retriever + ./pool.jpg", {"golden retriever": 2}, {"./pool.jpg": 1}, ()),
        (
            "2:golden retriever + ./pool.jpg - fruit",
            {"golden retriever": 2},
            {"./pool.jpg": 1},
            ("fruit",),
        ),
        ("./pool.jpg - 2:sports car + 2:snow", {"snow": 2}, {"./pool.jpg": 1}, ("sports car",)),
        ("./pool.jpg", {}, {"./pool.jpg": 1}, ()),
        ("0.5:./pool.jpg + .5:cat", {"cat": 0.5}, {"./pool.jpg": 0.5}, ()),
        # pictures without a dot before them
        ("trip/car.png", {}, {"trip/car.png": 1}, ()),
        ("dog + pool.jpg", {"dog": 1}, {"pool.jpg": 1}, ()),
        ("a dog - ./pool.jpg", {"a dog": 1}, {}, (Path("pool.jpg"),)),
        ('2:"./pool.jpg" + night', {"night": 1}, {"./pool.jpg": 2}, ()),
        # a sign of grammar elsewhere makes a long part one too
        (
            "2:a dog - a man in a red shirt",
            {"a dog": 2},
            {},
            ("a man in a red shirt",),
        ),
        ("a dog - a ball - a toy", {"a dog": 1}, {}, ("a ball", "a toy")),
        ("  a dog   -  water ", {"a dog": 1}, {}, ("water",)),
        ('2:"20 dogs" + grass', {'"20 dogs"': 2, "grass": 1}, {}, ()),
        ('dog - "fire truck"', {"dog": 1}, {}, ("fire truck",)),
    ],
)
@pytest.mark.usefixtures("here")
def test_parts_have_signs_weights_and_pictures(
    typed: str, texts: dict[str, float], images: dict[str, float], without: tuple[str | Path, ...]
) -> None:
    query = parse(typed)
    assert dict(query.texts) == texts
    assert dict(query.images) == {Path(name): weight for name, weight in images.items()}
    assert query.without == without


@pytest.mark.parametrize(
    "typed",
    [
        "two dogs on the beach",
        "a dog - a cat's best friend",  # a dash
        "a dog – water",
        "B-52",
        "black-and-white",
        "C++ book",
        "10:30 train",
        "16:9",
        "2:30 on a clock",
        "2001: a space odyssey",
        "ratio:2",
        "page 3 - 4",
        "10 - 12 boats",
        "Paris - 2019",
        "9:30 - 10:30",
        "a - - b",
        "- fruit",
        "apple -",
        "+ fruit",
        'a sign that says "stop - go"',
        '"a dog + a cat"',
        "pool.jpg",  # alone, it may be a name to look for
        "missing/pool.jpg",
        "and/or",
        "trip",
        "",
    ],
)
@pytest.mark.usefixtures("here")
def test_what_may_be_a_sentence_stays_a_text(typed: str) -> None:
    query = parse(typed)
    assert query.texts == ((typed, 1.0),)
    assert not query.images
    assert not query.without


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        ("cat + + dog", "'cat' \\+"),
        ("2:cat + - dog", "'2:cat' \\+"),
        ("0:dog + cat", "'0:dog'"),
        ("cat + 0.0:dog", "'0.0:dog'"),
        ("./gone.jpg + cat", "./gone.jpg names a picture"),
        ("./gone.jpg", "./gone.jpg names a picture"),
        ("cat - ../gone.PNG", "../gone.PNG names a picture"),
    ],
)
@pytest.mark.usefixtures("here")
def test_a_part_that_makes_no_sense_is_named(typed: str, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        parse(typed)


@pytest.mark.usefixtures("here")
def test_no_file_is_looked_for_where_others_type() -> None:
    query = parse("./pool.jpg + trip/car.png", files=False)
    assert query.texts == (("./pool.jpg", 1.0), ("trip/car.png", 1.0))
    assert not query.images
    assert parse("./gone.jpg", files=False).texts == (("./gone.jpg", 1.0),)


@pytest.mark.usefixtures("here")
def test_a_folder_and_a_file_of_another_kind_are_no_pictures(here: Path) -> None:
    (here / "notes").write_text("cat", encoding="utf-8")
    (here / "notes.txt").write_text("cat", encoding="utf-8")
    assert not parse("dog + notes + notes.txt + trip").images
    # What is plainly a path is taken at its word, and the decoder says what is wrong with it.
    assert parse("./notes").images == ((Path("notes"), 1.0),)


def test_what_is_left_out_is_a_picture_by_the_same_rule(here: Path) -> None:
    (here / "water").write_text("", encoding="utf-8")
    assert picture("pool.jpg") == Path("pool.jpg")
    assert picture("water") is None
    assert picture("a" * 5000) is None
    with pytest.raises(UsageError, match="names a picture"):
        picture("./gone.jpg")


def test_a_name_that_no_system_can_look_up_is_a_text() -> None:
    for typed in ("./" + "a" * 5000 + ".txt", "./a\0b", "~nobody-of-that-name/x"):
        assert parse(typed).texts == ((typed, 1.0),)


def test_how_a_dash_was_read_is_told() -> None:
    (left_out,) = parse("apple - fruit").notes
    assert 'What shows "fruit" is left out' in left_out
    (kept,) = parse("a dog - a cat's best friend").notes
    assert "Read as one text" in kept
    (weighted,) = parse("dog + cat - 2:snow").notes
    assert 'What shows "snow" is left out, whatever its weight' in weighted
    assert parse("dog + cat - snow").notes == ()
    assert parse("a dog").notes == ()


def test_a_source_is_what_all_parts_are_of() -> None:
    picture = Path("a.jpg")
    assert Query(texts=(("a", 1.0),), without=("b", picture)).source == "text"
    assert Query(images=((picture, 1.0),), without=("b",)).source == "image"
    assert Query(texts=(("a", 1.0),), images=((picture, 1.0),)).source is None


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused_in_a_sentence(typed: str) -> None:
    try:
        query = parse(typed, files=False)
    except UsageError:
        return
    assert query.texts
    assert all(weight > 0 for _, weight in query.texts)


@given(st.lists(st.sampled_from(["a dog", "2:snow", '"red - car"', "trees"]), min_size=2))
def test_added_parts_come_back_in_their_order(parts: list[str]) -> None:
    plain = [(part.removeprefix("2:"), 2.0 if part.startswith("2:") else 1.0) for part in parts]
    assert parse(" + ".join(parts)).texts == tuple(plain)


# ── quotation marks ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "inside", "plain"),
    [
        ('a shop in "Main Street"', ("Main Street",), "a shop in Main Street"),
        ("“Main Street” and „Hauptstraße“", ("Main Street", "Hauptstraße"), None),
        ("« rue » 「東京」の夜", ("rue", "東京"), "rue 東京の夜"),
        ('("stop"), he said', ("stop",), "(stop), he said"),
        ('a 6" pizza and 8" cake', (), None),
        ('12" vinyl', (), None),
        ("it's the dogs' bowl", (), None),
        ('an "open end', (), None),
        ('""', (), ""),
    ],
)
def test_phrases_stand_between_marks_at_the_ends_of_words(
    text: str, inside: tuple[str, ...], plain: str | None
) -> None:
    assert phrases(text) == inside
    if plain is not None:
        assert unquoted(text) == plain
    elif not inside:
        assert unquoted(text) == text


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a dog", "dog"),
        ("The Main Street", "Main Street"),
        ("any people", "people"),
        ("ein Hund", "Hund"),
        ("anchor", "anchor"),
        ('"a dog"', "dog"),
        ("a", "a"),
    ],
)
def test_a_thing_is_named_without_its_article(text: str, name: str) -> None:
    assert thing(text) == name


# ── negations ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "wanted", "unwanted"),
    [
        ("a beach without people", "a beach", "people"),
        ("A beach WITHOUT any people", "A beach", "people"),
        ("a street with no cars at night", "a street", "cars"),
        ("a boy who isn't smiling", "a boy", "smiling"),
        ("a boy who isn’t smiling, outside", "a boy", "smiling"),
        ("everything except a dog", "everything", "dog"),
        ("a dog -water", "a dog", "water"),
        ("ein Strand ohne Menschen", "ein Strand", "Menschen"),
        ("ein Hund, aber kein Ball", "ein Hund", "Ball"),
        ("une plage sans personne", "une plage", "personne"),
        ("una playa sin gente", "una playa", "gente"),
        ("пляж без людей", "пляж", "людей"),
    ],
)
def test_a_negation_in_a_text_gets_a_hint(text: str, wanted: str, unwanted: str) -> None:
    hint = negation_hint(text)
    assert hint is not None
    assert f'Ask "{wanted}" --without "{unwanted}"' in hint
    assert parse(text).notes == (hint,)


@pytest.mark.parametrize("text", ["no people on the beach", "没有人的海滩", "人のいない海岸"])
def test_where_the_thing_cannot_be_told_the_hint_is_general(text: str) -> None:
    assert "--without THING" in (negation_hint(text) or "")


@pytest.mark.parametrize(
    "text",
    [
        "two dogs on the beach",
        "sin city",
        "the city of sin",
        "sans serif letters",
        "a notebook",
        "a knot",
        "a well-known man",
        "snow",
        "northern lights",
        "a bezel",
        "one -a , two",
    ],
)
def test_words_that_only_look_like_negations_get_none(text: str) -> None:
    assert negation_hint(text) is None


@pytest.mark.parametrize("text", ["a" + " " * 50_000 + "b", " „" * 50_000, " “" * 50_000])
def test_a_long_text_is_read_at_once(text: str) -> None:
    begin = time.process_time()
    assert parse(text).texts == ((text.strip(), 1.0),)
    assert time.process_time() - begin < 5  # seconds; minutes if it were read from each letter on
