"""Explanations against answers worked out by hand, with an encoder that knows colours only."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import COLOURS, ToyEncoder, paint
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_benchmarks import run_benchmark, run_script

from indexes.store import Store
from retriever.asking import Query
from retriever.calibration import Calibration, Sample, fit
from retriever.channels import MODES, Mode
from retriever.data import read_image
from retriever.explain import (
    LEAST_PEAK,
    OVERLAY_SIDE,
    Channel,
    Explanation,
    Word,
    explain,
    heat_map,
    overlay,
    palette,
    shares,
    without_each_word,
    write_heat_maps,
)
from retriever.ingest import index_folder
from retriever.search import Hit, Searcher

TOLERANCE = 2e-3  # the store keeps embeddings in half precision
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


# ── of a library ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def searcher(fresh_store: Store, toy_encoder: ToyEncoder, tiny_pairs: Path) -> Searcher:
    index_folder(fresh_store, lambda: toy_encoder, tiny_pairs)
    return Searcher(fresh_store, lambda: toy_encoder)


def explained(searcher: Searcher, text: str, mode: Mode, **calibrated: Any) -> dict[str, Any]:
    """Explanations by the names of the pictures found."""
    query = Query(texts=((text, 1.0),))
    answer = searcher.images(query, mode=mode)
    found = explain(answer, query, mode, searcher.channels, **calibrated)
    assert len(found) == len(answer)
    return {hit.path.stem: one for hit, one in zip(answer, found, strict=True)}


def test_a_word_gave_what_the_score_falls_without_it(searcher: Searcher) -> None:
    # "red green" is the direction of yellow; without "red" it is that of green, at 45° to it.
    found = explained(searcher, "red green", "image")["yellow"]
    assert [word.text for word in found.words] == ["red", "green"]
    expected = pytest.approx(1 - 1 / math.sqrt(2), abs=TOLERANCE)
    assert [word.change for word in found.words] == [expected, expected]
    # Red is nearer to "red" than to "red green".
    red, green = explained(searcher, "red green", "image")["red"].words
    assert red.change == pytest.approx(1 / math.sqrt(2), abs=TOLERANCE)
    assert green.change == pytest.approx(1 / math.sqrt(2) - 1, abs=TOLERANCE)


def test_one_mode_alone_has_the_whole_share(searcher: Searcher) -> None:
    found = explained(searcher, "red", "image")
    assert [(one.name, one.share) for one in found["red"].channels] == [("image", 1)]
    assert found["blue"].channels[0].share == 0
    assert found["red"].words == ()  # all of the score is one word's


def test_the_channels_of_a_hybrid_hit_add_up_to_its_score(searcher: Searcher) -> None:
    query = Query(texts=(("a red square", 1.0),))
    answer = searcher.images(query, mode="hybrid")
    for hit, one in zip(answer, explain(answer, query, "hybrid", searcher.channels), strict=True):
        if hit.caption is None:  # a picture without captions has another weight and an offset
            assert [channel.name for channel in one.channels] == ["image", "words"]
            assert one.caption_score is None
        else:
            parts = {channel.name: channel.score * channel.weight for channel in one.channels}
            assert sum(parts.values()) == pytest.approx(hit.score, abs=1e-4)
            assert one.caption_score == pytest.approx(hit.channels["caption"], abs=1e-4)
        assert one.caption == hit.caption
        assert sum(channel.share for channel in one.channels) == pytest.approx(1)


def test_words_are_explained_in_every_mode(searcher: Searcher) -> None:
    for mode in MODES:
        words = explained(searcher, "a red square", mode)["red"].words
        gave = {word.text: word.change for word in words}
        assert max(gave, key=lambda word: gave[word]) == "red", mode


def test_the_percentile_is_what_the_calibration_says(searcher: Searcher) -> None:
    unrelated = Sample(pairs=np.empty(0), background=np.array([0.2, 0.6, 0.65]))
    known = Calibration(fit({"image": unrelated}))
    found = explained(searcher, "red", "image", calibration=known)
    assert found["red"].percentile == 1
    assert found["blue"].percentile == 0
    assert 0 < found["white"].percentile < 1
    assert explained(searcher, "red", "caption", calibration=known)["red"].percentile is None


def test_a_query_picture_has_no_words_and_a_text_beside_it_has(searcher: Searcher) -> None:
    flat = Image.new("RGB", (5, 5), "red")
    for texts, expected in (((), []), ((("blue square", 1.0),), ["blue", "square"])):
        query = Query(texts=texts, images=((flat, 1.0),))
        (first, *_) = explain(searcher.images(query), query, "image", searcher.channels)
        assert [word.text for word in first.words] == expected
        assert first.percentile is None


def test_a_hit_that_is_gone_meanwhile_has_an_empty_explanation(
    searcher: Searcher, fresh_store: Store
) -> None:
    query = Query(texts=(("red square", 1.0),))
    answer = searcher.images(query, mode="image")
    with fresh_store.writer() as writer:
        writer.remove([answer[0].item_id])
        writer.finish()
    gone, *others = explain(answer, query, "image", searcher.channels)
    assert gone == Explanation(())
    assert all(one.channels for one in others)


def test_nothing_found_is_nothing_to_explain(searcher: Searcher) -> None:
    assert explain([], Query(texts=(("red", 1.0),)), "image", searcher.channels) == []


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


def test_only_a_hit_above_all_is_told_so() -> None:
    told = [Explanation((), percentile=share).lines() for share in (0.0, 0.9999, 1.0)]
    assert [line.removesuffix(" unrelated texts find here") for (line,) in told] == [
        "above 0 % of what",
        "above 99 % of what",
        "above all that",
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


def test_a_strip_is_squeezed_before_many_copies_of_it_fill_the_memory(
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


# ── the benchmark ────────────────────────────────────────────────────────────────────────────────


def test_the_benchmark_in_small_form(tmp_path: Path) -> None:
    for colour in COLOURS:
        picture = paint(tmp_path / "p" / f"{colour}.png", colour, side=32)
        picture.with_suffix(".txt").write_text(f"all is {colour}", encoding="utf-8")
    options = ("--split", "", "--mosaics", 1, "--resamples", 9)
    numbers = run_benchmark("heat_maps", tmp_path / "p", *options, folder=tmp_path)["numbers"]
    for one in (*numbers["mosaics"].values(), *numbers["falls"].values()):
        low, high = one["interval"]
        assert low <= one["mean"] <= high
    assert 0 <= numbers["mosaics"]["heat"]["mean"] <= 1
    assert numbers["cpu_ms_per_map"] > 0


def test_a_peak_in_its_quarter_counts_and_so_does_the_heat_there() -> None:
    from heat_maps import pointed

    heat = np.array([[3, -5], [0, 1]], dtype=np.float32).repeat(4, axis=0).repeat(4, axis=1)
    assert pointed(heat, 0) == {"peak": 1, "heat": 0.75}
    assert pointed(heat, 3) == {"peak": 0, "heat": 0.25}
    assert pointed(heat, 1) == {"peak": 0, "heat": 0}


def test_the_benchmark_without_the_data_is_no_failure(tmp_path: Path) -> None:
    done = run_script("heat_maps", tmp_path / "nowhere")
    assert "nowhere is not here" in done.stderr
