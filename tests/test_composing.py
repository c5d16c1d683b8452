"""Several parts become one row, and what must not be there is told by one product."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import ToyEncoder, paint
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from indexes.records import CaptionRow, ItemWrite
from indexes.store import Store
from retriever.asking import Query
from retriever.composing import Composed, compose
from retriever.errors import PictureError, UsageError

TOLERANCE = 1e-6  # float32 unit rows, added and made unit rows again

RED, GREEN, BLUE = np.eye(4, dtype=np.float32)[:3]


class Recording(ToyEncoder):
    """Remembers each call, and reads three words at most."""

    max_text_tokens = 3

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[list[str]] = []

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        self.calls.append(list(texts))
        return super().encode_texts(texts)


class Phrases(ToyEncoder):
    """Knows a few texts by heart, as a dual encoder knows sentences."""

    def __init__(self, known: dict[str, Sequence[float]]) -> None:
        super().__init__()
        self.known = known

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        rows = np.array([self.known[text] for text in texts], dtype=np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def texts(**weights: float) -> Query:
    return Query(texts=tuple(weights.items()))


def unit(*row: float) -> np.ndarray:
    return (np.array(row) / np.linalg.norm(row)).astype(np.float32)


# ── one row ──────────────────────────────────────────────────────────────────────────────────────


def test_one_part_is_its_own_embedding(toy_encoder: ToyEncoder, tmp_path: Path) -> None:
    means = np.full((2, 4), 0.3, dtype=np.float32)
    assert compose(texts(red=1.0), toy_encoder, means).row == pytest.approx(RED)
    assert compose(texts(red=7.5), toy_encoder, means).row == pytest.approx(RED)
    picture = Query(images=((paint(tmp_path / "a.png", "blue"), 2.0),))
    assert compose(picture, toy_encoder, means).row == pytest.approx(BLUE)


def test_texts_of_one_weight_are_read_together() -> None:
    encoder = Phrases({"dog, snow": (1, 2, 3, 4)})
    assert compose(texts(dog=2.0, snow=2.0), encoder).row == pytest.approx(unit(1, 2, 3, 4))


def test_a_heavier_text_is_added_with_what_it_weighs_more() -> None:
    known = {"a": (1, 0, 0, 0), "a, b": (0, 1, 0, 0), "a, b, c": (0, 0, 1, 0)}
    row = compose(Query(texts=(("b", 3.0), ("c", 1.0), ("a", 4.0))), Phrases(known)).row
    assert row == pytest.approx(unit(1, 2, 1, 0))


def test_a_text_said_twice_counts_twice() -> None:
    known = {"a": (1, 0, 0, 0), "a, b": (0, 1, 0, 0)}
    row = compose(Query(texts=(("a", 1.0), ("b", 1.0), ("a", 1.0))), Phrases(known)).row
    assert row == pytest.approx(unit(1, 1, 0, 0))


def test_quotation_marks_are_not_read() -> None:
    encoder = Recording()
    compose(Query(texts=(('a "red" one', 1.0),)), encoder)
    assert encoder.calls == [["a red one"]]


def test_full_stops_vanish_where_texts_are_joined() -> None:
    encoder = Recording()
    compose(Query(texts=(("red.", 1.0), ("blue", 1.0))), encoder)
    assert encoder.calls == [["red, blue"]]


@pytest.mark.parametrize("weight", [0.25, 1.0, 3.0])
def test_a_text_and_a_picture_are_added_with_their_weights(
    weight: float, toy_encoder: ToyEncoder, tmp_path: Path
) -> None:
    red = paint(tmp_path / "red.png", "red")
    query = Query(texts=(("blue", 1.0),), images=((red, weight),))
    assert compose(query, toy_encoder).row == pytest.approx(unit(weight, 0, 1, 0))


def test_a_negative_weight_pushes_away(toy_encoder: ToyEncoder) -> None:
    row = compose(texts(magenta=1.0, blue=-0.5), toy_encoder).row
    assert row == pytest.approx(unit(np.sqrt(0.5), 0, np.sqrt(0.5) - 0.5, 0))


def test_the_gap_between_the_modalities_is_no_part_of_a_sum(tmp_path: Path) -> None:
    # Pictures all lie near the third axis and texts near the fourth; what they say is in the rest.
    class Gap(ToyEncoder):
        def encode_images(self, images: Sequence[object]) -> np.ndarray:
            return np.stack([unit(1, 0, 3, 0)] * len(images))

        def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
            return np.stack([unit(0, 1, 0, 2)] * len(texts))

    means = np.stack([unit(0, 0, 3, 0) * 0.95, unit(0, 0, 0, 2) * 0.9])
    query = Query(texts=(("b", 1.0),), images=((paint(tmp_path / "a.png", "red"), 1.0),))
    composed = compose(query, Gap(), means).row
    # By half the one, by half the other, as far from the middle of both as they are from theirs.
    centred = (unit(1, 0, 3, 0) - means[0]) / 2 + (unit(0, 1, 0, 2) - means[1]) / 2
    usual = np.mean(
        [np.linalg.norm(unit(1, 0, 3, 0) - means[0]), np.linalg.norm(unit(0, 1, 0, 2) - means[1])]
    )
    expected = centred / np.linalg.norm(centred) * usual + means.mean(axis=0)
    assert composed == pytest.approx(unit(*expected), abs=TOLERANCE)


@given(
    rows=arrays.arrays(np.float64, (2, 4), elements=st.floats(0.1, 1)),
    mean=arrays.arrays(np.float64, 4, elements=st.floats(-0.2, 0.2)),
    weight=st.floats(0.1, 10),
)
def test_a_row_is_a_unit_row_and_scaling_all_weights_changes_nothing(
    rows: np.ndarray, mean: np.ndarray, weight: float
) -> None:
    encoder = Phrases({"a": rows[0], "b": rows[1], "a, b": rows[0], "b, a": rows[0]})
    means = np.stack([mean, mean]).astype(np.float32)
    one = compose(texts(a=1.0, b=2.0), encoder, means).row
    other = compose(texts(a=weight, b=2 * weight), encoder, means).row
    assert np.linalg.norm(one) == pytest.approx(1, abs=TOLERANCE)
    assert one == pytest.approx(other, abs=1e-5)


@pytest.mark.parametrize(
    ("query", "said"),
    [
        (Query(), "The query is empty: give a text"),
        (Query(without=("red",)), "besides what to leave out"),
        (Query(texts=(("red", 1.0),), without=("blue", " ")), "leave out is an empty text"),
        (texts(red=0.0), "cancel each other out"),
        (texts(red=1.0, blue=float("nan")), "finite number"),
        (texts(**{"\ud800": 1.0}), "not UTF-8"),
        (Query(texts=(("red", 1.0),), without=("\ud800",)), "not UTF-8"),
    ],
)
def test_what_asks_for_nothing_is_refused(query: Query, said: str, toy_encoder: ToyEncoder) -> None:
    with pytest.raises(UsageError, match=said):
        compose(query, toy_encoder)


def test_parts_that_cancel_each_other_out_are_refused(toy_encoder: ToyEncoder) -> None:
    with pytest.raises(UsageError, match="cancel each other out"):
        compose(Query(texts=(("red", 1.0), ("a red one", -1.0))), toy_encoder)


def test_a_picture_that_cannot_be_read_is_an_error(toy_encoder: ToyEncoder, tmp_path: Path) -> None:
    gone = tmp_path / "gone.png"
    with pytest.raises(PictureError):
        compose(Query(images=((gone, 1.0),)), toy_encoder)
    with pytest.raises(PictureError):
        compose(Query(texts=(("red", 1.0),), without=(gone,)), toy_encoder)


# ── long texts ───────────────────────────────────────────────────────────────────────────────────


def read(text: str) -> list[str]:
    """What is encoded of a text by an encoder that reads three words."""
    encoder = Recording()
    compose(Query(texts=((text, 1.0),)), encoder)
    (call,) = encoder.calls
    return call


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a red one", ["a red one"]),
        ("one red dog runs", ["one red", "dog runs"]),
        ("a b c d e f g", ["a b c", "d e", "f g"]),
        ("A red dog. A blue cat.", ["A red dog.", "A blue cat."]),
        ("Rot! Ein blauer Hund", ["Rot! Ein", "blauer Hund"]),
        ("a b c\nd e f", ["a b c", "d e f"]),
        ("白い犬。黒い猫。", ["白い犬。黒い猫。", "白い犬。", "黒い猫。"]),
        ("St. Bernard", ["St. Bernard"]),
        ("", [""]),
    ],
)
def test_a_text_is_read_by_sentences_and_what_is_too_long_in_pieces(
    text: str, pieces: list[str]
) -> None:
    assert read(text) == pieces


def test_sentences_count_as_much_as_the_whole() -> None:
    known = {"a b c. d e f.": (1, 0, 0, 0), "a b c.": (0, 1, 0, 0), "d e f.": (0, 0, 1, 0)}
    row = compose(Query(texts=(("a b c. d e f.", 1.0),)), Phrases(known)).row
    assert row == pytest.approx(unit(1, np.sqrt(0.5), np.sqrt(0.5), 0))


def test_texts_too_long_to_be_read_together_are_added() -> None:
    encoder = Recording()
    row = compose(Query(texts=(("so very red", 1.0), ("so very blue", 3.0))), encoder).row
    assert sorted(encoder.calls[0]) == ["so very blue", "so very red"]
    assert row == pytest.approx(unit(1, 0, 3, 0))


# ── exclusion ────────────────────────────────────────────────────────────────────────────────────


def test_what_fits_better_with_the_excluded_thing_shows_it() -> None:
    known = {"dog": (1, 0, 0, 0), "dog, water": (1, 1, 0, 0), "water": (0, 0, 0, 1)}
    composed = compose(Query(texts=(("a", 1.0),), without=()), Phrases({"a": (1, 0, 0, 0)}))
    assert not composed.shows(np.eye(4, dtype=np.float32), np.zeros((0, 4)), np.zeros(0, int)).any()
    composed = compose(Query(texts=(("dog", 1.0),), without=("water",)), Phrases(known))
    pictures = np.stack([unit(1, 0, 0, 0), unit(1, 1, 0, 0), unit(0, 1, 0, 0), unit(1, 0.2, 0, 0)])
    none = np.zeros((0, 4), dtype=np.float32)
    shown = composed.shows(pictures, none, np.zeros(0, dtype=np.int64))
    joint = pictures @ unit(1, 1, 0, 0)
    assert shown.tolist() == (joint > pictures @ unit(1, 0, 0, 0)).tolist()
    assert shown.tolist() == [False, True, True, False]
    assert composed.row == pytest.approx(RED)  # what is excluded moves nothing


def test_a_picture_and_each_of_its_captions_have_one_voice() -> None:
    composed = Composed(RED, GREEN[None])
    pictures = np.stack([0.1 * GREEN, 0.1 * GREEN, -0.1 * GREEN, 0 * GREEN])
    captions = np.stack([-0.3 * GREEN, 0.3 * GREEN, -0.3 * GREEN, 0.1 * GREEN, 0.05 * GREEN])
    owners = np.array([0, 2, 1, 1, 3])
    assert composed.shows(pictures, captions, owners).tolist() == [False, False, True, True]


def test_each_of_several_things_excludes() -> None:
    composed = Composed(RED, np.stack([GREEN, BLUE]))
    none = np.zeros((0, 4), dtype=np.float32)
    shown = composed.shows(np.eye(4, dtype=np.float32), none, np.zeros(0, dtype=np.int64))
    assert shown.tolist() == [False, True, True, False]


def test_a_picture_excludes_what_is_like_it(toy_encoder: ToyEncoder, tmp_path: Path) -> None:
    green = paint(tmp_path / "green.png", "green")
    composed = compose(Query(texts=(("red", 1.0),), without=(green,)), toy_encoder)
    none = np.zeros((0, 4), dtype=np.float32)
    pictures = np.stack([RED, GREEN, unit(1, 1, 0, 0), unit(5, 1, 0, 0)])
    shown = composed.shows(pictures, none, np.zeros(0, dtype=np.int64))
    # Nearer to red with half of green in it than to red.
    assert shown.tolist() == (pictures @ unit(1, 0.5, 0, 0) > pictures @ RED).tolist()
    assert shown.tolist() == [False, True, True, False]
    assert composed.things == ("",)


def test_beside_a_query_picture_a_text_excludes_as_well(
    toy_encoder: ToyEncoder, tmp_path: Path
) -> None:
    red = paint(tmp_path / "red.png", "red")
    composed = compose(Query(images=((red, 1.0),), without=("the green",)), toy_encoder)
    none = np.zeros((0, 4), dtype=np.float32)
    shown = composed.shows(np.stack([RED, unit(1, 1, 0, 0)]), none, np.zeros(0, dtype=np.int64))
    assert shown.tolist() == [False, True]
    assert composed.things == ("green",)


def test_all_texts_are_read_in_one_call() -> None:
    encoder = Recording()
    compose(Query(texts=(("red", 1.0), ("blue", 2.0)), without=("green",)), encoder)
    assert encoder.calls == [["blue", "blue, red", "green", "blue, red, green"]]


def test_a_thing_too_long_to_be_read_with_the_query_excludes_too() -> None:
    encoder = Recording()
    composed = compose(Query(texts=(("so very red", 1.0),), without=("green",)), encoder)
    assert encoder.calls == [["so very red", "green"]]
    none = np.zeros((0, 4), dtype=np.float32)
    shown = composed.shows(np.stack([RED, unit(1, 1, 0, 0)]), none, np.zeros(0, dtype=np.int64))
    assert shown.tolist() == [False, True]


# ── a library ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def captioned(fresh_store: Store, tmp_path: Path) -> Store:
    """Five pictures: of the third only a caption tells that it shows water."""
    rows = {
        "plain.jpg": (RED, ["a dog"], [RED]),
        "both.jpg": (unit(1, 1, 0, 0), ["a dog swims"], [unit(1, 1, 0, 0)]),
        "said.jpg": (RED, ["a dog", "a dog in deep waters"], [RED, RED]),
        "bare.jpg": (unit(1, 1, 0, 0), [], []),
        "voted.jpg": (unit(1, 1, 0, 0), ["a dog", "a dog"], [unit(1, -1, 0, 0)] * 2),
    }
    items = [
        ItemWrite(
            name,
            size=1,
            mtime_ns=1,
            content_hash=name.encode().ljust(16),
            width=8,
            height=8,
            captions=tuple(CaptionRow(text, "given") for text in captions),
            image_embedding=image,
            caption_embeddings=np.stack(embeddings) if embeddings else None,
        )
        for name, (image, captions, embeddings) in rows.items()
    ]
    with fresh_store.writer() as writer:
        writer.write(writer.add_root(tmp_path / "pictures"), items)
    return fresh_store


def shown_in(store: Store, composed: Composed) -> set[str]:
    ids = store.item_ids()
    with store.snapshot() as rows:
        shown = composed.shown(rows, ids)
    items = store.items([one for one, is_shown in zip(ids, shown, strict=True) if is_shown])
    return {item.path.name for item in items}


def test_a_library_is_asked_by_pictures_captions_and_words(captioned: Store) -> None:
    composed = Composed(RED, GREEN[None], ("water",))
    assert shown_in(captioned, composed) == {"both.jpg", "said.jpg", "bare.jpg"}
    assert shown_in(captioned, Composed(RED, GREEN[None], ("",))) == {"both.jpg", "bare.jpg"}
    assert shown_in(captioned, Composed(RED, GREEN[None], ("!",))) == {"both.jpg", "bare.jpg"}


def test_several_words_are_meant_as_they_stand(captioned: Store) -> None:
    none = np.zeros((1, 4), dtype=np.float32)
    assert shown_in(captioned, Composed(RED, none, ("deep water",))) == {"said.jpg"}
    assert shown_in(captioned, Composed(RED, none, ("water deep",))) == set()


def test_a_file_name_is_no_word_of_a_caption(captioned: Store) -> None:
    none = np.zeros((1, 4), dtype=np.float32)
    assert shown_in(captioned, Composed(RED, none, ("both",))) == set()


def test_nothing_is_shown_where_nothing_is_left_out(captioned: Store) -> None:
    none = np.zeros((0, 4), dtype=np.float32)
    assert shown_in(captioned, Composed(RED, none)) == set()
    with captioned.snapshot() as rows:
        assert Composed(RED, GREEN[None], ("water",)).shown(rows, []).shape == (0,)


def test_an_item_that_is_gone_shows_nothing(captioned: Store) -> None:
    (gone,) = [item for item in captioned.items(captioned.item_ids()) if "bare" in item.path.name]
    with captioned.writer() as writer:
        writer.remove([gone.item_id])
    with captioned.snapshot() as rows:
        assert not Composed(RED, GREEN[None], ("",)).shown(rows, [gone.item_id]).any()


def test_the_bundled_encoder_reads_a_thing_together_with_the_query() -> None:
    from retriever.encoders import load_encoder

    encoder = load_encoder("mini")
    composed = compose(Query(texts=(("a dog", 1.0),), without=("snow",)), encoder)
    captions = encoder.encode_texts(
        ["A dog runs through the deep snow .", "A dog lies on a sofa ."]
    )
    none = np.zeros((0, encoder.dim), dtype=np.float32)
    shown = composed.shows(captions, none, np.zeros(0, dtype=np.int64))
    assert shown.tolist() == [True, False]
