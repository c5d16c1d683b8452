"""The benchmark of queries that compose, on a world whose right answers can be worked out."""

import importlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from indexes.store import Store
from retriever.library import Library

# Last, because both folders have a file kills.py.
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

VOCABULARY = ("dog", "snow", "ball", "man", "beach", "red", "runs", "is", "here")


@pytest.fixture(scope="module")
def composition() -> ModuleType:
    return importlib.import_module("composition")


class WordsEncoder:
    """Embeds a text as its words, each a direction of its own, and a picture as its name's."""

    name = "words"
    fingerprint = "words-1"
    dim = len(VOCABULARY) + 1
    max_text_tokens = 12
    image_size = 8

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        rows = np.zeros((len(texts), self.dim), dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in re.findall("[a-z]+", text.lower()):
                if word in VOCABULARY:
                    row[VOCABULARY.index(word)] = 1
            row[-1] = not row.any()
            row /= np.linalg.norm(row)
        return rows

    def encode_images(self, images: Sequence[Image.Image | Path | np.ndarray]) -> np.ndarray:
        """A grey picture shows the words whose bits its level has."""
        levels = [int(np.asarray(_opened(image).convert("L")).mean()) for image in images]
        return self.encode_texts(
            [
                " ".join(w for n, w in enumerate(VOCABULARY[:7]) if level >> n & 1)
                for level in levels
            ]
        )

    def is_cut(self, texts: Sequence[str]) -> list[bool]:
        return [len(text.split()) > self.max_text_tokens for text in texts]


def _opened(image: Image.Image | Path | np.ndarray) -> Image.Image:
    if isinstance(image, Path):
        return Image.open(image)
    return image if isinstance(image, Image.Image) else Image.fromarray(image)


def world_of(composition: ModuleType, captions: Sequence[Sequence[str]]) -> object:
    """Pictures that show just what their captions say."""
    encoder = WordsEncoder()
    flat = tuple(text for several in captions for text in several)
    return composition.World(
        encoder.encode_texts([" ".join(several) for several in captions]),
        encoder.encode_texts(flat),
        flat,
        np.array([at for at, several in enumerate(captions) for _ in several], np.int64),
        np.array([at for several in captions for at, _ in enumerate(several)], np.int64),
    )


# ── what pictures show ───────────────────────────────────────────────────────────────────────────


def test_more_than_half_of_the_captions_say_what_is_there(composition: ModuleType) -> None:
    world = world_of(
        composition,
        [
            ["A dog runs", "dogs", "a cat"],
            ["A dog runs", "a cat", "a cat", "the puppy"],
            ["an animal", "snow", "a sled"],
            ["a hotdog", "a car", "a car"],
        ],
    )
    assert world.shows["a dog"].tolist() == [True, False, False, False]
    assert world.lacks["a dog"].tolist() == [False, False, False, True]
    assert world.lacks["snow"].tolist() == [True, True, False, True]


def test_no_pair_has_a_thing_and_a_kind_of_it(composition: ModuleType) -> None:
    captions = [["a dog and a boy"], ["a boy"]] * 20
    captions += [["a dog"], ["people in the snow"], ["a man"]] * 20
    pairs = set(world_of(composition, captions).pairs())
    assert ("a dog", "a boy") in pairs
    assert ("a dog", "a child") in pairs
    for one, other in pairs:
        assert {one, other} not in ({"a child", "a boy"}, {"people", "a man"}, {"a man", "people"})


def test_shares_are_of_what_was_there_before(composition: ModuleType) -> None:
    judged = composition.Judged(*np.array([[4, 0], [1, 0], [3, 2], [3, 3], [1, 0]]))
    assert judged.shares(np.ones(2, np.int64)) == {"removed": 75, "lost": 20, "wanted": 120}
    only_second = judged.shares(np.array([0, 1]))
    assert only_second == {"removed": 100, "lost": 0, "wanted": 150}


def test_what_is_out_of_the_question_is_never_among_the_first(composition: ModuleType) -> None:
    scores = np.array([0.1, -np.inf, 0.3, 0.3])
    assert composition._first(scores).tolist() == [2, 3, 0]


# ── all together ─────────────────────────────────────────────────────────────────────────────────


CAPTIONS = [
    *([["a dog runs", "the dog runs", "dog runs"]] * 15),
    *([["a dog in the snow", "a dog, snow", "snow and a dog"]] * 8),
    *([["a man runs", "man runs", "the man runs"]] * 15),
    *([["a man in the snow", "the man, snow", "snow, a man"]] * 8),
]


def test_leaving_out_removes_what_shows_a_thing_and_nothing_else(composition: ModuleType) -> None:
    world = world_of(composition, CAPTIONS)
    # Nearer to both things than pictures of one are, so that unwanted ones come first.
    world.images[15:23] = WordsEncoder().encode_texts(["dog snow"] * 8)
    world.images[:15] = WordsEncoder().encode_texts(["dog runs is here"] * 15)
    found = composition.measure_exclusion(world, WordsEncoder(), resamples=5, seed=0)
    assert set(found) == {"pictures", "captions"}
    for numbers in found.values():
        assert numbers["queries"] > 0
        left_out = numbers[composition.WITHOUT]
        assert left_out["removed"]["value"] == 100
        assert left_out["lost"]["value"] == 0
        assert left_out["removed"]["interval"] == [100, 100]
        # A sentence asks for both.
        assert numbers[composition.WAYS[0]]["removed"]["value"] <= 0
    assert "words only" not in found["pictures"]
    assert found["captions"]["words only"]["lost"]["value"] == 0


def test_a_library_is_measured(composition: ModuleType, tmp_path: Path) -> None:
    encoder = WordsEncoder()
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines, asked = [], []
    for place, (last, *texts) in enumerate(reversed(CAPTIONS)):
        name = f"{place:03d}.png"
        words = " ".join([last, *texts])
        level = sum(1 << n for n, word in enumerate(VOCABULARY[:7]) if word in words)
        Image.new("L", (8, 8 + place), level).save(folder / name)
        lines.append(json.dumps({"file": name, "captions": [*dict.fromkeys(texts)]}))
        asked.append(last)
    (folder / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with Library.create(tmp_path / "c.lib", encoder) as library:
        assert library.index(folder).added == len(CAPTIONS)
    numbers = composition.measure(tmp_path / "c.lib", encoder, asked, resamples=5, seed=0)
    assert numbers["table"].count("\n| ") > 10
    rows = ("asked of the library itself", "two texts", "5 sentences: by sentences")
    for way in (*composition.WAYS, *rows):
        assert f"| {way} " in numbers["table"]
    assert numbers["library"]["queries"] > 0
    assert numbers["library"]["removed"]["value"] == 100
    assert numbers["library"]["lost"]["value"] == 0
    assert numbers["sums"]["the same with a gap"]["gap"] > 0.5
    with pytest.raises(ValueError, match="1 captions for 46 pictures"):
        composition.read_world(tmp_path / "c.lib", encoder, ["one"])
    # What the benchmark works out by itself is what a library tells.
    world = composition.read_world(tmp_path / "c.lib", encoder)
    composed = composition._without(encoder, "a dog", "snow")
    with Store.open(tmp_path / "c.lib") as store, store.snapshot() as rows:
        shown = composed.shown(rows, store.item_ids())
    said = composition._said_words(world, ["snow"])["snow"]
    expected = composed.shows(world.images, world.captions, world.owners)
    expected |= composition._any(said, world.owners, world)
    assert shown.tolist() == expected.tolist()
    assert shown[23:31].all()
