"""Queries, hits and captions, through a real store and an encoder that knows colours only."""

import math
from pathlib import Path

import numpy as np
import pytest
from conftest import COLOURS, ToyEncoder, paint
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from indexes.store import Store
from retriever.asking import Query
from retriever.errors import PictureError, UsageError
from retriever.ingest import index_folder
from retriever.search import Searcher

TOLERANCE = 2e-3  # the store keeps embeddings in half precision

colours = st.sampled_from(sorted(COLOURS))
weights = st.floats(0.1, 10)


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


@given(st.lists(st.tuples(colours, weights), min_size=1, max_size=4))
def test_the_query_row_has_unit_length_and_points_to_the_weighted_sum(
    parts: list[tuple[str, float]],
) -> None:
    encoder = ToyEncoder()
    searcher = Searcher(None, lambda: encoder)  # type: ignore[arg-type]  # embedding needs no store
    row = searcher.embed(Query(texts=tuple(parts)))
    assert row.dtype == np.float32
    assert np.linalg.norm(row) == pytest.approx(1, abs=1e-6)
    total = sum(weight * encoder.encode_texts([word])[0] for word, weight in parts)
    assert float(row @ total) == pytest.approx(float(np.linalg.norm(total)), rel=1e-5)


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
