"""Queries, hits and captions, through a real store and an encoder that knows colours only."""

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import COLOURS, ToyEncoder, paint
from PIL import Image

from indexes.filters import Compare, Glob
from indexes.records import Fit
from indexes.store import Store
from retriever.asking import Query
from retriever.errors import PictureError, UsageError
from retriever.ingest import index_folder
from retriever.search import Asked, Searcher, _is_near

TOLERANCE = 2e-3  # the store keeps embeddings in half precision


@pytest.fixture
def searcher(fresh_store: Store, toy_encoder: ToyEncoder, tiny_pairs: Path) -> Searcher:
    index_folder(fresh_store, lambda: toy_encoder, tiny_pairs)
    return Searcher(fresh_store, lambda: toy_encoder)


def text(*words: str) -> Query:
    return Query(texts=tuple((word, 1.0) for word in words))


def flat(colour: str) -> Image.Image:
    return Image.new("RGB", (5, 5), COLOURS[colour])


def names(hits: list) -> list[str]:
    return [hit.path.stem for hit in hits]


def test_text_finds_the_picture_of_that_colour_and_scores_are_cosines(searcher: Searcher) -> None:
    hits = searcher.images(text("something red"), 3)
    assert names(hits) == ["red", "yellow", "white"]
    assert [hit.rank for hit in hits] == [1, 2, 3]
    expected = [1, 1 / math.sqrt(2), 1 / math.sqrt(3)]
    assert [hit.score for hit in hits] == pytest.approx(expected, abs=TOLERANCE)


def test_a_picture_in_the_library_finds_itself_first(searcher: Searcher, tiny_pairs: Path) -> None:
    path = tiny_pairs / "more/yellow.png"
    best = searcher.images(Query(images=((path, 1.0),)), 1)[0]
    assert best.path == path
    assert best.score == pytest.approx(1, abs=TOLERANCE)


def test_a_hit_shows_the_caption_of_its_own_nearest_to_the_query(
    fresh_store: Store, toy_encoder: ToyEncoder, tmp_path: Path
) -> None:
    picture = paint(tmp_path / "p/yellow.png", "yellow")
    picture.with_suffix(".txt").write_text("rather green\nrather red\nblue shadows\n")
    index_folder(fresh_store, lambda: toy_encoder, tmp_path / "p")
    searcher = Searcher(fresh_store, lambda: toy_encoder)
    assert searcher.images(text("red"))[0].caption == "rather red"
    assert searcher.images(text("green"))[0].caption == "rather green"
    assert searcher.images(Query(images=((flat("blue"), 1.0),)))[0].caption == "blue shadows"


def test_a_picture_without_captions_has_none_to_show(searcher: Searcher) -> None:
    assert searcher.images(text("white"))[0].caption is None


def test_texts_and_pictures_add_up(searcher: Searcher) -> None:
    both = Query(texts=(("green", 1.0),), images=((flat("red"), 1.0),))
    best = searcher.images(both, 1)[0]
    assert best.path.stem == "yellow"
    assert best.score == pytest.approx(1, abs=TOLERANCE)


def test_weights_decide_between_the_parts(searcher: Searcher) -> None:
    query = Query(texts=(("green", 1.0),), images=((flat("red"), 9.0),))
    assert names(searcher.images(query, 2)) == ["red", "yellow"]


def test_a_negative_weight_pushes_away(searcher: Searcher) -> None:
    query = Query(texts=(("yellow", 1.0), ("green", -0.7)))
    assert names(searcher.images(query, 1)) == ["red"]


def test_parts_that_cancel_each_other_out_are_refused(searcher: Searcher) -> None:
    with pytest.raises(UsageError, match="cancel"):
        searcher.images(Query(texts=(("red", 1.0), ("a red one", -1.0))))


def test_an_empty_query_and_a_k_below_one_are_refused(searcher: Searcher) -> None:
    with pytest.raises(UsageError, match="empty"):
        searcher.images(Query())
    with pytest.raises(UsageError, match="at least 1"):
        searcher.captions(text("red"), 0)


def test_a_query_picture_that_cannot_be_read_is_named(searcher: Searcher, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    with pytest.raises(PictureError, match=r"broken\.png"):
        searcher.images(Query(images=((broken, 1.0),)))


def test_k_beyond_the_library_gives_every_picture_once(searcher: Searcher) -> None:
    hits = searcher.images(text("red"), 100)
    assert sorted(names(hits)) == ["blue", "green", "red", "white", "yellow"]


def test_an_empty_library_answers_nothing(fresh_store: Store, toy_encoder: ToyEncoder) -> None:
    searcher = Searcher(fresh_store, lambda: toy_encoder)
    assert not searcher.images(text("red"))
    assert searcher.captions(text("red")) == []


def test_a_picture_finds_the_captions_that_fit(searcher: Searcher) -> None:
    hits = searcher.captions(Query(images=((flat("blue"), 1.0),)), 2)
    assert {hit.caption for hit in hits} == {"a blue square", "the deep blue"}
    assert {hit.path.name for hit in hits} == {"blue.png"}
    assert [hit.score for hit in hits] == pytest.approx([1, 1], abs=TOLERANCE)


def test_a_caption_under_many_pictures_is_given_once_and_k_is_kept(
    fresh_store: Store, toy_encoder: ToyEncoder, tmp_path: Path
) -> None:
    for number in range(30):
        picture = paint(tmp_path / f"p/{number:02d}.png", "red", side=number + 1)
        picture.with_suffix(".txt").write_text("red\n")
    for number, caption in enumerate(["red and green", "green"]):
        picture = paint(tmp_path / f"p/x{number}.png", "green", side=number + 1)
        picture.with_suffix(".txt").write_text(caption)
    index_folder(fresh_store, lambda: toy_encoder, tmp_path / "p")
    hits = Searcher(fresh_store, lambda: toy_encoder).captions(text("red"), 3)
    assert [hit.caption for hit in hits] == ["red", "red and green", "green"]
    assert [hit.rank for hit in hits] == [1, 2, 3]
    assert hits[0].path.name == "00.png"


@pytest.mark.parametrize(
    ("query", "words"),
    [
        (Query(texts=(("caf\udce9", 1.0),)), "not UTF-8"),
        (Query(texts=(("red", float("nan")),)), "finite"),
        (Query(texts=(("red", float("inf")),)), "finite"),
    ],
)
def test_a_query_that_means_nothing_is_refused(fresh_store, toy_encoder, query, words):
    with pytest.raises(UsageError, match=words):
        Searcher(fresh_store, lambda: toy_encoder).images(query)


# ── modes, filters, phrases and names ────────────────────────────────────────────────────────────


@pytest.fixture
def described(fresh_store: Store, toy_encoder: ToyEncoder, tmp_path: Path) -> Searcher:
    """Pictures whose captions tell of other colours than they show; one has none."""
    told = {
        "red/IMG_2041": ("red", ["a green door on Main Street", "painted"]),
        "blue/IMG_2042": ("blue", ["a red door", "the street, mainly"]),
        "green/x7": ("green", ["blue water"]),
        "green/bare": ("cyan", []),
    }
    for number, (name, (colour, lines)) in enumerate(told.items()):
        path = paint(tmp_path / f"told/{name}.png", colour, side=8 + number)
        if lines:
            path.with_suffix(".txt").write_text("\n".join(lines), encoding="utf-8")
    index_folder(fresh_store, lambda: toy_encoder, tmp_path / "told")
    return Searcher(fresh_store, lambda: toy_encoder)


def measured(store: Store, facts: dict[str, Any]) -> None:
    with store.snapshot() as rows, store.writer() as writer:
        writer.record_fit(Fit(rows.version()[1], 4, facts, np.zeros((2, 4), np.float32)))


def channels(default: str, image: float = 0.25, caption: float = 0.5) -> dict[str, Any]:
    weights = {"image": image, "caption": caption, "words": 1 - image - caption}
    return {"channels": {"weights": weights, "bare": [0.1, 0.5], "default": default}}


def test_a_picture_that_is_called_so_comes_first(described: Searcher) -> None:
    assert names(described.images(text("blue"), 1)) == ["IMG_2042"]
    in_folder = described.images(text("RED"), 2)
    assert in_folder[0].path.parent.name == "red"
    assert described.images(text("red"), 9, mode="image")[0].score >= in_folder[0].score


def test_each_mode_finds_by_its_own_channel(described: Searcher) -> None:
    assert names(described.images(text("green"), 2, mode="image")) == ["x7", "bare"]
    assert names(described.images(text("green"), 1, mode="caption")) == ["IMG_2041"]
    assert names(described.images(text("red door"), 2, mode="words")) == ["IMG_2042", "IMG_2041"]
    heard = {hit.path.stem: set(hit.channels) for hit in described.images(text("a"), mode="hybrid")}
    assert heard["x7"] == {"image", "caption", "words"}


def test_what_has_no_captions_is_no_answer_by_captions_but_one_in_hybrid_mode(
    described: Searcher,
) -> None:
    assert "bare" not in names(described.images(text("green"), mode="caption"))
    hits = {hit.path.stem: hit for hit in described.images(text("green"), mode="hybrid")}
    assert len(hits) == 4
    assert "caption" not in hits["bare"].channels


def test_a_fused_score_is_the_weighted_mean_of_its_channels(described: Searcher) -> None:
    measured(described._store, channels("hybrid"))
    answer = described.images(text("a green door"))
    assert answer.mode == "hybrid"
    for hit in answer:
        given = hit.channels
        if "caption" in given:
            expected = 0.25 * given["image"] + 0.5 * given["caption"] + 0.25 * given["words"]
        else:
            expected = 0.1 + 0.5 * given["image"] + 0.25 * given["words"]
        assert hit.score == pytest.approx(expected, abs=1e-6)


def test_texts_are_searched_as_was_measured_and_pictures_by_pictures(described: Searcher) -> None:
    assert described.images(text("red")).mode == "image"
    measured(described._store, channels("hybrid"))
    assert described.images(text("red")).mode == "hybrid"
    assert described.images(Query(images=((flat("red"), 1.0),))).mode == "image"
    pushed = Query(texts=(("red", -1.0),))  # has no words to look for
    assert described.images(pushed).mode == "image"
    measured(described._store, channels("image"))
    assert described.images(text("red")).mode == "image"


@pytest.mark.parametrize(
    "facts", [{}, {"channels": {}}, {"channels": 3}, {"channels": {"bare": 1}}]
)
def test_facts_of_another_version_count_as_none(described: Searcher, facts: dict) -> None:
    measured(described._store, facts)
    answer = described.images(text("so red"))
    assert (answer.mode, answer.is_match) == ("image", None)
    assert len(described.images(text("so red"), mode="hybrid")) == 4


def test_words_alone_need_no_encoder(described: Searcher) -> None:
    def refuse() -> ToyEncoder:
        raise AssertionError("the encoder was asked for")

    searcher = Searcher(described._store, refuse)
    hits = searcher.images(text("main street"), mode="words")
    assert hits[0].path.stem == "IMG_2041"
    assert hits[0].caption == "a green door on Main Street"


@pytest.mark.parametrize(
    ("mode", "query", "words"),
    [
        ("sound", text("red"), "no mode 'sound': choose one of image, caption, words, hybrid"),
        ("words", Query(images=((flat("red"), 1.0),)), "give a text"),
        ("hybrid", Query(images=((flat("red"), 1.0),)), "give a text"),
    ],
)
def test_a_mode_that_cannot_be_is_refused(described: Searcher, mode: Any, query, words) -> None:
    with pytest.raises(UsageError, match=words):
        described.images(query, mode=mode)


@pytest.mark.parametrize("mode", ["image", "caption", "words", "hybrid"])
def test_a_filter_decides_what_may_be_found(described: Searcher, mode: Any) -> None:
    (red,) = described.images(text("green red door"), mode=mode, where=Glob("folder", "*/red"))
    assert red.path.stem == "IMG_2041"
    nothing = described.images(text("green"), mode=mode, where=Compare("width", ">", 99))
    assert not nothing
    assert nothing.notes == ("no picture passes the filter",)
    among = [hit.item_id for hit in described.images(text("green red"), mode="image")[:2]]
    hits = described.images(text("green red blue water"), mode=mode, among=among)
    assert {hit.item_id for hit in hits} <= set(among)


def test_filter_and_ids_both_count(described: Searcher) -> None:
    every = {hit.path.stem: hit.item_id for hit in described.images(text("red"))}
    hits = described.images(
        text("red"), among=[every["x7"], every["IMG_2041"]], where=Glob("name", "IMG*")
    )
    assert names(hits) == ["IMG_2041"]


def test_a_phrase_must_stand_in_the_words_of_a_picture(described: Searcher) -> None:
    assert names(described.images(text('"main street" in blue'))) == ["IMG_2041"]
    answer = described.images(text("“street main”"))
    assert not answer
    assert answer.is_match is False
    assert answer.notes == ("no picture has the words “street main” in a caption or name",)


def test_pictures_with_a_name_in_the_query_come_before_all_others(described: Searcher) -> None:
    hits = described.images(text("blue IMG_2041"))
    assert names(hits)[:2] == ["IMG_2041", "IMG_2042"]
    assert len(hits) == 4
    assert hits[0].score < hits[1].score
    assert names(described.images(text("red 2042"), 1)) == ["IMG_2042"]


def test_a_phrase_is_taken_out_where_it_stands(described: Searcher) -> None:
    asked = Asked.of(['IMG_2041 "IMG" or "41"'])
    assert asked == Asked(("IMG", "41"), ("IMG_2041",), is_literal=False)
    assert names(described.images(text('IMG_2042 "2042"'))) == ["IMG_2042"]


def test_what_is_found_by_name_alone_is_certain(described: Searcher) -> None:
    curves = {"slope": 50.0, "middle": 0.99, "background": [0.0, 1.0]}
    facts = {"calibration": {"texts": {"image": curves}, "pictures": None}}
    measured(described._store, facts)
    answer = described.images(text("IMG_2041"))
    assert answer.is_match
    assert answer[0].confidence == 1
    assert answer[1].confidence < 0.5
    assert not described.images(text("a yellow IMG_2041")).is_match


def test_a_misspelt_word_finds_and_the_answer_says_so(described: Searcher) -> None:
    answer = described.images(text("streat"), mode="words")
    assert {"IMG_2041", "IMG_2042"} == set(names(answer))
    assert answer.notes == ("no picture has the word “streat”: “street” was looked for",)


def test_what_shows_an_excluded_thing_is_left_out_and_k_is_kept(described: Searcher) -> None:
    plain = described.images(text("green"), 3)
    assert "IMG_2041" in names(described.images(text("green")))
    hits = described.images(Query(texts=(("green", 1.0),), without=("red",)), 3)
    assert names(plain)[0] == names(hits)[0] == "x7"
    assert not {"IMG_2041", "IMG_2042"} & set(names(hits))


# ── how surely ───────────────────────────────────────────────────────────────────────────────────


def curve(middle: float) -> dict[str, Any]:
    image = {"slope": 10.0, "middle": middle, "background": [0.0, 1.0]}
    return {"calibration": {"texts": {"image": image}, "pictures": None}}


def test_confidence_rises_with_the_score_and_tells_a_match(searcher: Searcher) -> None:
    assert [hit.confidence for hit in searcher.images(text("so red"))] == [None] * 5
    measured(searcher._store, curve(0.9))
    answer = searcher.images(text("so red"))
    assert answer.is_match
    sure = [hit.confidence for hit in answer]
    assert sure == sorted(sure, reverse=True)
    assert sure[0] == pytest.approx(1 / (1 + math.exp(-1)), abs=0.01)
    measured(searcher._store, curve(1.1))
    assert searcher.images(text("so red")).is_match is False


def test_answers_of_less_confidence_can_be_left_out(searcher: Searcher) -> None:
    measured(searcher._store, curve(0.65))
    answer = searcher.images(text("red"), min_confidence=0.5)
    assert names(answer) == ["red", "yellow"]
    assert answer.is_match
    nothing = searcher.images(text("nothing of these"), min_confidence=0.5)
    assert not nothing
    assert nothing.is_match is False


def test_facts_are_what_a_library_can_keep(searcher: Searcher) -> None:
    facts = json.loads(json.dumps(channels("hybrid") | curve(0.9)))
    measured(searcher._store, facts)
    assert searcher.calibration() is not None
    assert searcher.channels(text("red")).fusion.weights["caption"] == 0.5


# ── near-duplicates ──────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def copied(fresh_store: Store, toy_encoder: ToyEncoder, tmp_path: Path) -> Searcher:
    """Nine copies of a red picture, one yellow and one white one."""
    for number in range(9):
        paint(tmp_path / f"p/red{number}.png", "red")
    for colour in ("yellow", "white"):
        paint(tmp_path / f"p/{colour}.png", colour)
    index_folder(fresh_store, lambda: toy_encoder, tmp_path / "p")
    return Searcher(fresh_store, lambda: toy_encoder)


def test_copies_are_one_answer_and_k_is_kept(copied: Searcher) -> None:
    hits = copied.images(text("red"), 3)
    assert names(hits) == ["red0", "yellow", "white"]
    assert [hit.duplicates for hit in hits] == [8, 0, 0]
    assert [hit.rank for hit in hits] == [1, 2, 3]


def test_copies_are_shown_when_asked_for(copied: Searcher) -> None:
    hits = copied.images(text("red"), 3, all=True)
    assert names(hits) == ["red0", "red1", "red2"]
    assert [hit.duplicates for hit in hits] == [0, 0, 0]


# ── captions ─────────────────────────────────────────────────────────────────────────────────────


def test_captions_that_say_the_same_are_given_once(
    fresh_store: Store, toy_encoder: ToyEncoder, tmp_path: Path
) -> None:
    long = "one two three four five six seven eight nine ten red"
    lines = ["A red door.", "a RED door", "a red door !", long, f"{long} eleven", "red: 1 of 2"]
    lines.append("red: 2 of 1")
    paint(tmp_path / "p/x.png", "red").with_suffix(".txt").write_text("\n".join(lines))
    index_folder(fresh_store, lambda: toy_encoder, tmp_path / "p")
    hits = Searcher(fresh_store, lambda: toy_encoder).captions(text("red"))
    assert [hit.caption for hit in hits] == ["A red door.", long, *lines[-2:]]


def test_captions_of_many_words_are_compared_at_once() -> None:
    rng = np.random.default_rng(0)
    one, other = (tuple(rng.choice([*"abcdefghij"], 20_000).tolist()) for _ in range(2))
    begin = time.process_time()
    assert not _is_near(one, other)
    assert _is_near(one, (*one[:-9], *"abc"))
    assert time.process_time() - begin < 5  # seconds; difflib took half a minute


def test_captions_can_be_those_of_chosen_pictures(described: Searcher) -> None:
    hits = described.captions(text("red"), where=Glob("folder", "*/red"))
    assert {hit.path.stem for hit in hits} == {"IMG_2041"}
    assert len(hits) == 2


def test_an_answer_is_a_sequence_of_its_hits(searcher: Searcher) -> None:
    answer = searcher.images(text("red"), 3)
    assert [*answer] == [*answer.hits]
    assert answer[-1] == answer.hits[2]
    assert len(answer[:2]) == 2
