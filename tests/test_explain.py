"""Explanations against answers worked out by hand, with an encoder that knows colours only."""

from pathlib import Path

import numpy as np
import pytest
from conftest import ToyEncoder, paint
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from retriever.data import read_image
from retriever.explain import (
    LEAST_PEAK,
    OVERLAY_SIDE,
    Channel,
    Explanation,
    Word,
    heat_map,
    overlay,
    palette,
    shares,
    without_each_word,
    write_heat_maps,
)
from retriever.search import Hit

WEIGHTS = {"image": 0.2, "caption": 0.5, "words": 0.3}


def halves(left: str, right: str, size: tuple[int, int] = (64, 48)) -> Image.Image:
    picture = Image.new("RGB", size, left)
    picture.paste(right, (size[0] // 2, 0, *size))
    return picture


# ── channels and words ───────────────────────────────────────────────────────────────────────────


def test_shares_are_of_the_weighted_scores() -> None:
    found = shares({"image": 0.5, "caption": 0.6, "words": 0.0}, WEIGHTS)
    assert [one.name for one in found] == ["image", "caption", "words"]
    assert [one.share for one in found] == pytest.approx([0.25, 0.75, 0])
    assert [one.weight for one in found] == [0.2, 0.5, 0.3]


def test_a_channel_that_speaks_against_a_picture_has_no_share() -> None:
    image, caption = shares({"image": -0.4, "caption": 0.1}, WEIGHTS)
    assert (image.share, caption.share) == (0, 1)
    assert [one.share for one in shares({"image": -0.4}, WEIGHTS)] == [0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a dog", [("a", "dog"), ("dog", "a")]),
        ("dogs, two!", [("dogs", ", two!"), ("two", "dogs, !")]),
        ("the the", [("the", "the"), ("the", "the")]),
        ("bird's-eye", [("bird's-eye", "")]),
        ("白犬 IMG_2041", [("白", "犬 IMG_2041"), ("犬", "白 IMG_2041"), ("IMG_2041", "白犬")]),
        ("?!", []),
        ("", []),
    ],
)
def test_each_word_is_left_out_once(text: str, expected: list[tuple[str, str]]) -> None:
    assert without_each_word(text) == expected


@given(st.text(max_size=300))
def test_leaving_out_a_word_takes_its_letters_and_nothing_else(text: str) -> None:
    letters = "".join(text.split())
    for word, rest in without_each_word(text):
        assert len("".join(rest.split())) == len(letters) - len(word)


# ── what people and programs read ────────────────────────────────────────────────────────────────

FULL = Explanation(
    channels=(
        Channel("image", 0.5, 0.2, 0.25),
        Channel("caption", 0.6, 0.5, 0.75),
        Channel("words", 0.0, 0.3, 0.0),
    ),
    caption="two dogs run",
    caption_score=0.6,
    words=(Word("two", -0.031), Word("the", -0.001), Word("dogs", 0.2)),
    percentile=0.998,
)


def test_an_explanation_reads_in_a_few_lines() -> None:
    assert FULL.lines() == [
        "from caption 75% (0.50 x 0.60), image 25% (0.20 x 0.50), words 0% (0.30 x 0.00)",
        "nearest caption 0.600: two dogs run",
        "words two −0.03, the 0.00, dogs +0.20",
        "above 99 % of what unrelated texts find here",
    ]


def test_what_is_not_known_takes_no_line() -> None:
    assert Explanation((Channel("image", 0.5, 1.0, 1.0),)).lines() == []


def test_an_explanation_as_json_has_all_keys_whatever_is_known() -> None:
    record = FULL.as_json()
    assert record["channels"]["caption"] == {"score": 0.6, "weight": 0.5, "share": 0.75}
    assert record["words"][0] == {"word": "two", "change": -0.031}
    assert (record["caption"], record["caption_score"]) == ("two dogs run", 0.6)
    assert record["percentile"] == 0.998
    assert Explanation(()).as_json().keys() == record.keys()


# ── heat maps ────────────────────────────────────────────────────────────────────────────────────


def test_heat_lies_where_the_picture_supports_the_text(toy_encoder: ToyEncoder) -> None:
    heat = heat_map(toy_encoder, halves("red", "blue"), "something red")
    left, right = heat[:, : heat.shape[1] // 2], heat[:, heat.shape[1] // 2 :]
    assert heat.dtype == np.float32
    assert left.mean() > 0.01
    assert right.mean() < -0.01
    other = heat_map(toy_encoder, halves("blue", "red"), "something red")
    assert other[:, ::-1] == pytest.approx(heat, abs=1e-5)


def test_a_map_has_the_proportions_of_its_picture(toy_encoder: ToyEncoder) -> None:
    shorter = toy_encoder.image_size
    assert heat_map(toy_encoder, halves("red", "blue", (300, 200)), "red").shape == (8, 12)
    assert heat_map(toy_encoder, halves("red", "blue", (200, 600)), "red").shape == (24, shorter)


def test_a_strip_is_squeezed_before_a_hundred_copies_of_it_fill_the_memory(
    toy_encoder: ToyEncoder,
) -> None:
    strip = halves("red", "blue", (5000, 10))
    assert heat_map(toy_encoder, strip, "red").shape == (8, 4 * toy_encoder.image_size)


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (1000, 1)])
def test_the_narrowest_picture_has_a_map(toy_encoder: ToyEncoder, size: tuple[int, int]) -> None:
    heat = heat_map(toy_encoder, Image.new("RGB", size, "red"), "red")
    assert heat == pytest.approx(0, abs=1e-6)


def test_where_nothing_can_be_covered_there_is_no_heat(toy_encoder: ToyEncoder) -> None:
    flat = heat_map(toy_encoder, Image.new("RGB", (32, 32), "red"), "red")
    assert flat == pytest.approx(0, abs=1e-6)


def test_a_map_is_of_a_text_or_of_a_row(toy_encoder: ToyEncoder) -> None:
    picture = halves("red", "blue")
    (row,) = toy_encoder.encode_texts(["red"])
    assert np.array_equal(
        heat_map(toy_encoder, picture, row), heat_map(toy_encoder, picture, "red")
    )


def test_an_overlay_is_grey_where_there_is_no_heat_and_yellow_at_the_peak() -> None:
    heat = np.zeros((4, 8), np.float32)
    heat[:, 4:] = 1
    shown = np.asarray(overlay(Image.new("RGB", (80, 40), "white"), heat)).astype(int)
    assert shown.shape == (40, 80, 3)
    red, green, blue = shown[20, 10]
    assert red == green == blue
    red, green, blue = shown[20, 70]
    assert red > 200
    assert green > 160
    assert blue < red - 50


def test_a_map_without_a_peak_is_not_stretched_over_all_colours() -> None:
    picture = Image.new("RGB", (16, 16), "grey")
    faint = np.full((4, 4), LEAST_PEAK / 100, np.float32)
    shown = np.asarray(overlay(picture, faint)).astype(int)
    assert abs(shown - np.asarray(picture).astype(int)).max() < 25
    assert np.array_equal(np.asarray(overlay(picture, -faint)), np.asarray(picture))


def test_an_overlay_of_a_large_picture_is_made_smaller() -> None:
    shown = overlay(Image.new("RGB", (3000, 1000)), np.zeros((8, 24), np.float32))
    assert shown.size == (OVERLAY_SIDE, round(OVERLAY_SIDE / 3))


def test_steps_of_the_palette_are_within_the_colours_of_a_screen_and_look_alike() -> None:
    colours = palette()
    assert colours.min() >= 0
    assert colours.max() <= 255
    # Their lightness as CIE L* has it, another formula than the one they were made by.
    curved = colours / 255
    light = np.where(curved <= 0.04045, curved / 12.92, ((curved + 0.055) / 1.055) ** 2.4)
    lightness = 116 * np.cbrt(light @ [0.2126, 0.7152, 0.0722]) - 16
    steps = np.diff(lightness)
    assert steps.min() > 0
    assert steps.max() < 2 * steps.min()


def test_maps_are_written_by_rank_and_name_and_a_lost_picture_is_noted(
    toy_encoder: ToyEncoder, tmp_path: Path
) -> None:
    halves("red", "blue").save(tmp_path / "a b!.png")
    paths = [tmp_path / "a b!.png", tmp_path / "gone.png", paint(tmp_path / "ß.png", "red")]
    hits = [Hit(rank, 0.5, path, None, rank) for rank, path in enumerate(paths, start=1)]
    notes: list[str] = []
    told: list[tuple[int, int]] = []
    (row,) = toy_encoder.encode_texts(["red"])
    written = write_heat_maps(
        toy_encoder,
        row,
        hits,
        tmp_path / "new" / "maps",
        notes=notes,
        progress=lambda *at: told.append(at),
    )
    assert [path.name for path in written] == ["01-a_b_.png", "03-ß.png"]
    assert [read_image(path).image.size for path in written] == [(64, 48), (8, 8)]
    assert len(notes) == 1
    assert "gone.png" in notes[0]
    assert told == [(1, 3), (2, 3), (3, 3)]
