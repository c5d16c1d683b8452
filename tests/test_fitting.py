"""What channels are worth: what is held out stays hidden, and planted truths are found."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import COLOURS, ToyEncoder

import retriever.fitting as fitting
from indexes.store import CaptionRow, ItemWrite, ModelSpec, Store
from retriever import calibration
from retriever.channels import FALLBACK, Fusion
from retriever.fitting import Sample, fit, is_due, weigh

DIM = 16
NOUNS = ("dog", "cat", "boat", "tree", "child", "horse", "car", "bird", "lamp", "bridge")
PLACES = ("beach", "street", "garden", "kitchen", "forest", "field", "harbour", "roof")


class WordEncoder:
    """A text is the sum of the directions of its words; a picture is told by its captions."""

    name, dim, fingerprint, max_text_tokens = "words", DIM, "words-1", 64

    def __init__(self) -> None:
        self.texts_seen = 0

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        self.texts_seen += len(texts)
        return np.stack([direction(*text.lower().split()) for text in texts])

    def encode_images(self, images: Sequence[Any]) -> np.ndarray:
        raise AssertionError("no picture is encoded")

    def is_cut(self, texts: Sequence[str]) -> list[bool]:
        return [False] * len(texts)


def direction(*words: str) -> np.ndarray:
    rows = [np.random.default_rng([*word.encode()]).standard_normal(DIM) for word in words]
    total = np.sum(rows, axis=0)
    return (total / np.linalg.norm(total)).astype(np.float32)


def picture(number: int, captions: Sequence[str], content: int | None = None) -> ItemWrite:
    rng = np.random.default_rng(number)
    seen = direction(*" ".join(captions).lower().split()) if captions else np.zeros(DIM)
    image = seen + 0.35 * rng.standard_normal(DIM)
    return ItemWrite(
        file=f"{number:04}.jpg",
        size=1,
        mtime_ns=1,
        content_hash=(number if content is None else content).to_bytes(8, "big"),
        width=1,
        height=1,
        captions=tuple(CaptionRow(text, "sidecar") for text in captions),
        image_embedding=(image / np.linalg.norm(image)).astype(np.float32),
        caption_embeddings=WordEncoder().encode_texts(captions) if captions else None,
    )


def described(count: int) -> list[ItemWrite]:
    """Pictures of something somewhere with something, told of three times."""
    rng = np.random.default_rng(7)
    items = []
    for number in range(count):
        one, other = rng.choice(NOUNS, 2, replace=False)
        place = rng.choice(PLACES)
        telling = [f"a {one} and a {other}", f"{one} near the {place}", f"{other} at a {place}"]
        items.append(picture(number, telling))
    return items


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.create(tmp_path / "a.lib", ModelSpec("words", DIM, "words-1")) as store:
        yield store


def write(store: Store, items: Sequence[ItemWrite]) -> list[int]:
    with store.writer() as writer:
        ids = writer.write(writer.add_root(Path("/photos")), items)
        writer.finish()
    return ids


# ── samples ──────────────────────────────────────────────────────────────────────────────────────


def test_what_is_held_out_is_known_to_no_channel(store: Store) -> None:
    write(store, [picture(1, ["a dog", "one cat"]), picture(2, ["a boat", "some tree"])])
    sample = Sample.of(store)
    assert sorted(sample.own) == [0, 1]
    assert len(sample.texts) == 2
    assert not set(sample.asked) & set(sample.texts)
    scores = sample.channels(sample.queries, sample.asked)
    own = scores["words"][np.arange(2), sample.own]
    assert own.tolist() == [0, 0]
    for row, place in enumerate(sample.own):
        kept = np.flatnonzero(sample.owners == place)
        right = (sample.queries[row] @ sample.captions[kept].T).max()
        assert scores["caption"][row, place] == pytest.approx(right, abs=1e-6)


def test_a_text_said_twice_of_a_picture_is_hidden_as_a_whole(store: Store) -> None:
    write(store, [picture(1, ["a dog", "a dog", "a cat"])])
    for seed in range(8):
        sample = Sample.of(store, seed=seed)
        assert not set(sample.asked) & set(sample.texts)
        assert {*sample.asked, *sample.texts} == {"a dog", "a cat"}


def test_a_caption_never_answers_to_itself_under_another_picture(store: Store) -> None:
    write(store, [picture(1, ["a dog", "a cat"]), picture(2, ["a dog", "a cat", "a boat"])])
    sample = Sample.of(store)
    scores = sample.channels(sample.queries, sample.asked)["caption"]
    for row, text in enumerate(sample.asked):
        for place in (0, 1):
            rest = [
                one
                for one, owner in zip(sample.texts, sample.owners, strict=True)
                if owner == place and one != text
            ]
            assert math.isnan(scores[row, place]) == (not rest)


def test_copies_are_there_once_and_single_captions_ask_nothing(store: Store) -> None:
    write(
        store,
        [
            picture(1, ["a dog", "a cat"]),
            picture(2, ["a dog", "a cat"], content=1),
            picture(3, ["a tree"]),
            picture(4, []),
        ],
    )
    sample = Sample.of(store)
    assert len(sample.pictures) == 3
    assert len(sample.asked) == 1
    assert sample.texts.count("a tree") == 1
    scores = sample.channels(sample.queries, sample.asked)
    assert np.isnan(scores["caption"]).sum() == 1


def test_a_shared_text_is_hidden_everywhere_and_all_that_have_it_are_right(store: Store) -> None:
    kinds = [(f"label {kind}", f"telling of {kind}") for kind in range(6)]
    write(store, [picture(number, kinds[number % 6]) for number in range(30)])
    sample = Sample.of(store)
    assert len(sample.asked) == 6  # one of the two of each kind, and no picture lost both
    assert not set(sample.asked) & set(sample.texts)
    assert len(sample.texts) == 30
    right = sample.also.copy()
    assert not right[np.arange(6), sample.own].any()
    right[np.arange(6), sample.own] = True
    assert right.sum(axis=0).tolist() == [1] * 30
    kept = dict(zip(sample.owners, sample.texts, strict=True))
    for row, text in enumerate(sample.asked):
        assert {kept[place][-1] for place in np.flatnonzero(right[row])} == {text[-1]}
    words = sample.words.scores(["label telling"])
    said = sum(any(word in text for word in ("label", "telling")) for text in sample.texts)
    assert (words > 0).sum() == said


def test_a_text_that_all_pictures_share_leaves_others_to_ask(store: Store) -> None:
    write(
        store,
        [picture(number, ["holidays", f"w{number} a", f"w{number} b"]) for number in range(9)],
    )
    for seed in range(5):
        sample = Sample.of(store, seed=seed)
        assert len(sample.asked) == 9
        assert "holidays" not in sample.asked
        assert not sample.also.any()


def test_a_sample_is_bounded_and_the_same_each_time(store: Store) -> None:
    write(store, [*described(60), *(picture(100 + number, []) for number in range(60))])
    sample = Sample.of(store, count=50, queries=20)
    assert len(sample.pictures) == 50
    assert len(sample.queries) == 20
    assert Sample.of(store, count=50, queries=20).asked == sample.asked
    assert np.allclose(np.linalg.norm(sample.pictures, axis=1), 1)


def test_words_are_scored_as_the_store_scores_them(store: Store) -> None:
    items = described(40)
    ids = write(store, [*items, picture(90, []), picture(91, ["one dog, one dog and a Dog"])])
    with store.snapshot() as rows:
        found = rows.items(ids)
        words = fitting._Words.of(
            [
                fitting.words.row(
                    place,
                    [caption.text for caption in found[item_id].captions],
                    found[item_id].file,
                    found[item_id].root.name,
                )
                for place, item_id in enumerate(ids)
            ]
        )
        for text in ("a dog near the beach", "dogs", "photos of 0003", "two dog dog"):
            expected = rows.word_scores(text, ids)
            assert words.scores([text])[0] == pytest.approx(expected, abs=1e-5)


# ── weights ──────────────────────────────────────────────────────────────────────────────────────


def planted(seed: int, queries: int, strengths: tuple[float, float, float]) -> dict[str, Any]:
    """Channels of noise, to which the right picture adds some deviations in each."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, strength in zip(("image", "caption", "words"), strengths, strict=True):
        scores = rng.normal(0.3, 0.1, (queries, queries))
        scores[np.arange(queries), np.arange(queries)] += 0.1 * strength
        found[name] = scores.astype(np.float32)
    return found


def test_weights_follow_what_channels_tell() -> None:
    """Of equally noisy channels each is worth what it adds for the right one (Fisher 1936)."""
    fusion, record = weigh(planted(0, 400, (1.0, 3.0, 2.0)), np.arange(400))
    assert sum(fusion.weights.values()) == pytest.approx(1)
    assert fusion.weights["image"] == pytest.approx(1 / 6, abs=0.05)
    assert fusion.weights["caption"] == pytest.approx(3 / 6, abs=0.05)
    assert fusion.weights["words"] == pytest.approx(2 / 6, abs=0.05)
    assert record["default"] == "hybrid"
    assert record["queries"] == 200
    assert record["measured"]["hybrid"]["r@1"] > record["measured"]["caption"]["r@1"]


def test_what_misleads_weighs_nothing() -> None:
    fusion, _ = weigh(planted(1, 300, (2.0, 3.0, -2.0)), np.arange(300))
    assert fusion.weights["words"] == 0
    assert min(fusion.weights.values()) >= 0


def test_the_image_channel_stays_the_default_where_nothing_else_helps() -> None:
    _, record = weigh(planted(2, 300, (3.0, 0.0, 0.0)), np.arange(300))
    assert record["default"] == "image"
    lower, upper = record["measured"]["image"]["r@1_interval"]
    assert lower < record["measured"]["image"]["r@1"] < upper


def test_with_few_queries_the_prior_decides_and_nothing_is_measured() -> None:
    fusion, record = weigh(planted(3, 12, (0.0, 0.0, 0.0)), np.arange(12))
    assert record["measured"] == {}
    assert record["default"] == "image"
    assert fusion.weights["caption"] > fusion.weights["image"] > fusion.weights["words"]
    none = {name: scores[:0] for name, scores in planted(3, 12, (1.0, 1.0, 1.0)).items()}
    assert weigh(none, np.arange(0))[0] == FALLBACK


def test_the_best_of_several_right_pictures_is_measured() -> None:
    held = planted(7, 200, (0.0, 0.0, 0.0))
    also = np.zeros((200, 200), dtype=bool)
    also[np.arange(200), (np.arange(200) + 1) % 200] = True
    for scores in held.values():
        scores[also] += 2.0
    assert weigh(held, np.arange(200))[1]["measured"]["image"]["r@1"] < 5
    measured = weigh(held, np.arange(200), also)[1]["measured"]
    assert {found["r@1"] for found in measured.values()} == {100.0}


def test_other_right_pictures_are_not_there_for_the_weights() -> None:
    own = np.arange(300)
    held = planted(8, 300, (1.0, 3.0, 2.0))
    rng = np.random.default_rng(9)
    more = {
        name: np.hstack([scores, rng.normal(0.3, 0.1, (300, 60)).astype(np.float32)])
        for name, scores in held.items()
    }
    more["caption"][:, 300:] += 0.1  # taken for wrong, they would tell against captions
    also = np.zeros((300, 360), dtype=bool)
    also[:, 300:] = True
    without, masked, wrong = (
        weigh(*one)[0] for one in ((held, own), (more, own, also), (more, own))
    )
    for name, weight in without.weights.items():
        assert masked.weights[name] == pytest.approx(weight, abs=0.01)
    assert masked.bare == pytest.approx(without.bare, abs=0.1)
    assert wrong.weights["caption"] < masked.weights["caption"] - 0.03


def test_the_factors_are_the_top_of_the_posterior() -> None:
    rng = np.random.default_rng(4)
    features = rng.normal(0, 1, (2, 50, 30)).astype(np.float32)
    own = rng.integers(30, size=50)
    features[0, np.arange(50), own] += 1.0
    features[1, np.arange(50), own] += 0.5
    prior, deviation = np.array([0.5, 0.5]), np.array([1.0, 1.0])

    def height(factors: np.ndarray) -> float:
        logits = np.tensordot(factors, features.astype(np.float64), 1)
        chosen = logits[np.arange(50), own] - np.log(np.exp(logits).sum(axis=1))
        return float(chosen.sum() - 0.5 * (((factors - prior) / deviation) ** 2).sum())

    found = fitting._likeliest(
        features, own, prior, deviation, np.zeros(2), np.zeros((50, 30), np.float32)
    )
    for step in np.eye(2) * 0.02:
        assert height(found) > max(height(found + step), height(found - step))


def test_pictures_without_captions_keep_their_place_beside_those_with() -> None:
    """Half of them are told of: neither half may be found at the other's expense alone."""
    held = planted(5, 400, (2.0, 3.0, 2.0))
    fusion, _ = weigh(held, np.arange(400))
    bare = np.arange(400) % 2 == 0
    mixed = {**held, "caption": np.where(bare, np.nan, held["caption"])}
    mixed["words"] = np.where(bare, 0, held["words"]).astype(np.float32)
    own = np.arange(400)

    def recall(scores: np.ndarray, of: np.ndarray) -> float:
        return float((fitting._ranks(scores, own)[of] < 10).mean())

    fused = fusion.fuse(mixed)
    assert recall(fused, bare) > 0.7 * recall(held["image"], bare)
    assert recall(fused, ~bare) > 1.3 * recall(held["image"], ~bare)


def test_equal_scores_are_ranked_by_place() -> None:
    scores = np.array([[0.5, 0.5, 0.1], [0.5, 0.5, 0.1], [0.2, 0.3, 0.1]], dtype=np.float32)
    assert fitting._ranks(scores, np.array([0, 1, 2])).tolist() == [0, 1, 2]


# ── libraries ────────────────────────────────────────────────────────────────────────────────────


def test_a_library_is_measured_and_the_record_can_be_kept(store: Store) -> None:
    write(store, described(120))
    encoder = WordEncoder()
    found = fit(store, lambda: encoder)
    assert found is not None
    assert encoder.texts_seen == len(calibration.background())
    record = found.facts["channels"]
    assert set(record["measured"]) == {"image", "caption", "words", "hybrid"}
    assert Fusion.from_facts(record).facts() == {key: record[key] for key in ("weights", "bare")}
    assert set(found.facts["calibration"]["texts"]) == {"image", "caption", "words", "hybrid"}
    with store.writer() as writer:
        writer.record_fit(found)
    with store.snapshot() as rows:
        kept = rows.fit()
        assert kept is not None
        assert kept.facts == json.loads(json.dumps(found.facts))
        images = np.stack([*rows.embeddings("image", rows.item_ids()).values()])
    assert kept.means[0] == pytest.approx(images.astype(np.float32).mean(axis=0), abs=1e-3)
    assert np.linalg.norm(kept.means[1]) > 0.1


def test_without_an_encoder_only_texts_have_no_confidence(store: Store) -> None:
    write(store, described(40))
    found = fit(store)
    assert found is not None
    assert found.facts["calibration"]["texts"] == {}
    assert found.facts["calibration"]["pictures"]


def test_a_library_without_captions_is_measured_by_its_pictures(store: Store) -> None:
    write(store, [picture(number, []) for number in range(20)])
    found = fit(store, WordEncoder)
    assert found is not None
    assert set(found.facts["calibration"]["texts"]) == {"image"}
    assert found.facts["channels"]["default"] == "image"
    assert not found.means[1].any()


def test_pictures_that_share_labels_are_measured_by_all_that_have_them(
    fresh_store: Store, toy_encoder: ToyEncoder
) -> None:
    """A colour is shared by six kinds, so pictures alone tell little; their labels name them."""
    items = []
    for number in range(42 * 4):
        kind = number % 42
        colour = [*COLOURS][kind % len(COLOURS)]
        labels = (f"{colour} brand{kind}", f"brand{kind} is a {colour} thing, as all know")
        flat = np.full((1, 1, 3), COLOURS[colour])
        items.append(
            ItemWrite(
                file=f"{number}.png",
                size=1,
                mtime_ns=1,
                content_hash=number.to_bytes(8, "big"),
                width=1,
                height=1,
                captions=tuple(CaptionRow(text, "sidecar") for text in labels),
                image_embedding=toy_encoder.encode_images([flat])[0],
                caption_embeddings=toy_encoder.encode_texts(labels),
            )
        )
    write(fresh_store, items)
    found = fit(fresh_store, lambda: toy_encoder)
    assert found is not None
    record = found.facts["channels"]
    assert record["queries"] == 21
    assert record["measured"]["image"]["r@1"] < 40
    assert record["measured"]["hybrid"]["r@1"] > 90
    assert record["default"] == "hybrid"
    # No right picture stands behind another right one.
    facts = found.facts["calibration"]["texts"]["hybrid"]
    assert facts["pairs"] == 42
    assert facts["auc"] > 0.95


def test_an_empty_library_is_nothing_to_measure(store: Store) -> None:
    assert not is_due(store)
    found = fit(store, WordEncoder)
    assert found is not None
    assert found.facts["channels"]["default"] == "image"


@pytest.mark.parametrize("contents", [1, 2, 3])
def test_a_library_of_copies_is_measured(store: Store, contents: int) -> None:
    copies = [picture(number, ["a dog", "w1 w2"], number % contents) for number in range(12)]
    write(store, copies)
    found = fit(store, WordEncoder)
    assert found is not None
    background = found.facts["calibration"]["texts"]["image"]["background"]
    assert all(map(math.isfinite, background))


@pytest.mark.parametrize("patience", [0, 1, 2])
def test_measuring_can_be_stopped(store: Store, patience: int) -> None:
    write(store, described(20))
    answers = iter([False] * patience + [True] * 9)
    assert fit(store, WordEncoder, stop=lambda: next(answers)) is None


def test_a_library_is_due_when_a_fifth_of_it_changed(store: Store) -> None:
    ids = write(store, described(50))
    assert is_due(store)

    def measure() -> None:
        found = fit(store)
        assert found is not None
        with store.writer() as writer:
            writer.record_fit(found)

    measure()
    assert not is_due(store)
    with store.writer() as writer:
        writer.remove(ids[:10])
    assert not is_due(store)
    with store.writer() as writer:
        writer.remove(ids[10:11])
    assert is_due(store)
    measure()
    write(store, [picture(200 + number, []) for number in range(7)])
    assert not is_due(store)
    write(store, [picture(300 + number, []) for number in range(2)])
    assert is_due(store)
    measure()
    with store.writer() as writer:  # only what is said of pictures changes
        for item_id in ids[20:30]:
            lines = [f"new {item_id} {number}" for number in range(3)]
            captions = tuple(CaptionRow(line, "sidecar") for line in lines)
            writer.set_captions(item_id, captions, WordEncoder().encode_texts(lines))
    assert is_due(store)


def test_few_pictures_are_not_worth_measuring(store: Store) -> None:
    write(store, described(fitting.FEWEST_PICTURES - 1))
    assert not is_due(store)
    write(store, [picture(99, [])])
    assert is_due(store)


def test_a_pair_is_not_hidden_behind_others_that_are_right_too(store: Store) -> None:
    write(
        store, [picture(number, [f"kind {number % 5}", f"a {number % 5}"]) for number in range(40)]
    )
    sample = Sample.of(store)
    scores = np.full((5, 40), 0.1, dtype=np.float32)
    scores[np.arange(5), sample.own] = 0.5
    scores[sample.also] = 0.9
    held = {"image": scores, "caption": scores, "words": scores}
    rows = WordEncoder().encode_texts(["nothing like it"])
    found = fitting.compare(sample, held, FALLBACK, ["nothing like it"], rows, 40)
    assert found["image"].pairs == pytest.approx([0.5] * 5)


def test_the_best_of_a_larger_library_is_foretold_by_a_sample() -> None:
    """Of scores with an exponential tail, the best of n grows with log n."""
    rng = np.random.default_rng(6)
    small, large, texts = 500, 8000, 300
    scores = rng.exponential(0.05, (texts, large)).astype(np.float32)
    dim = 4
    sample = Sample(
        pictures=np.zeros((small, dim), np.float32),
        captions=np.zeros((0, dim), np.float32),
        owners=np.zeros(0, np.int64),
        texts=(),
        queries=np.zeros((0, dim), np.float32),
        asked=(),
        own=np.zeros(0, np.int64),
        also=np.zeros((0, small), bool),
        words=fitting._Words({}, {}, 0.0, small),
    )

    class Given(Sample):
        def channels(self, rows: Any, texts: Any) -> Any:
            return {"image": scores[:, :small]}

    given = Given(*(getattr(sample, name) for name in Sample.__slots__))
    none = {"image": np.zeros((0, small), np.float32)}
    found = fitting.compare(
        given, none, FALLBACK, ["x"] * texts, np.ones((texts, dim), np.float32), large
    )
    assert found["image"].background.mean() == pytest.approx(scores.max(axis=1).mean(), rel=0.05)
