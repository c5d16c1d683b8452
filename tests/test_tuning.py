"""Tuning: what is dealt together and measured, when a head is adopted, and what that changes."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cli import main
from indexes.errors import InvalidRowsError
from indexes.heads import Head
from indexes.records import CaptionRow, ItemWrite
from indexes.store import ModelSpec, Store
from retriever import tuning
from retriever.errors import MissingExtraError, UsageError
from retriever.library import Library
from retriever.tuning import Pairs, TuneConfig

pytest.importorskip("torch")

SIDE = 4  # squares along a picture
INSIDE = 3 * SIDE * SIDE  # columns that say what a picture shows
OUTSIDE = 8  # columns of what no picture shows
DIM = INSIDE + OUTSIDE
# Most of a caption's embedding is that of its picture turned by this.
TURN = np.linalg.qr(np.random.default_rng(7).normal(size=(INSIDE, INSIDE)))[0].astype(np.float32)
QUICK = TuneConfig(epochs=12, folds=3, patience=3, resamples=200)


def unit(rows: np.ndarray) -> np.ndarray:
    rows = np.asarray(rows, dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def widened(rows: np.ndarray, columns: int = OUTSIDE) -> np.ndarray:
    """The same rows with columns of zeros behind them."""
    return np.pad(np.asarray(rows, dtype=np.float32), ((0, 0), (0, columns)))


def squares(number: int) -> np.ndarray:
    """(4, 4, 3) uint8: a picture of coloured squares, another one for each number."""
    return np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


class TurnedEncoder:
    """Embeds a picture as the colours of its squares, and a text as those of the number in it.

    Texts are turned away, so that a head that turns them back finds more. A text without a
    number is about something else.
    """

    name = "turned"
    dim = DIM
    max_text_tokens = 16
    image_size = 8

    def __init__(self, fingerprint: str = "turned-1") -> None:
        self.fingerprint = fingerprint
        self.images_seen = 0

    def encode_images(self, images: Sequence[Image.Image | Path | np.ndarray]) -> np.ndarray:
        self.images_seen += len(images)
        return np.concatenate([self._image(image) for image in images])

    def _image(self, image: Image.Image | Path | np.ndarray) -> np.ndarray:
        if isinstance(image, Path):
            with Image.open(image) as opened:
                image = opened.convert("RGB")
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        small = np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX))
        return widened(unit(small.reshape(1, -1).astype(np.float32) - 127.5))

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        rows = np.zeros((len(texts), DIM), dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            numbers = [word for word in text.split() if word.isdigit()]
            if numbers:
                seen = unit(squares(int(numbers[0])).reshape(-1) - 127.5)
                row[:INSIDE] = unit(3 * seen @ TURN + seen)
            else:
                row[INSIDE:] = unit(np.random.default_rng(len(text)).normal(size=OUTSIDE))
        return rows

    def is_cut(self, texts: Sequence[str]) -> list[bool]:
        return [False] * len(texts)


class LeaningEncoder(TurnedEncoder):
    """Embeds some pictures nearer to all texts, whatever these say: hubs."""

    name = "leaning"

    def encode_images(self, images: Sequence[Image.Image | Path | np.ndarray]) -> np.ndarray:
        rows = super().encode_images(images)
        rows[:, -1] = 4 * np.abs(rows[:, 0])
        return unit(rows)

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        rows = np.zeros((len(texts), DIM), dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            numbers = [word for word in text.split() if word.isdigit()]
            rng = np.random.default_rng(int(numbers[0]) if numbers else len(text))
            row[:INSIDE] = 2 * unit(rng.normal(size=INSIDE))
            if numbers:
                row[:INSIDE] += unit(squares(int(numbers[0])).reshape(-1) - 127.5)
            row[-1] = 1.5
        return unit(rows)


def paint(folder: Path, numbers: Sequence[int], caption: str = "squares {}") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        picture = Image.fromarray(squares(number)).resize((8, 8), Image.Resampling.NEAREST)
        picture.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption.format(number), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library of 120 pictures, each with a caption that an untuned search seldom finds it by."""
    home = tmp_path_factory.mktemp("made")
    folder = paint(home / "pictures", range(120))
    with Library.create(home / "photos.lib", TurnedEncoder()) as library:
        library.index(folder)
    return home / "photos.lib"


@pytest.fixture(scope="module")
def made_tuned(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, tuned."""
    path = Path(shutil.copytree(made, tmp_path_factory.mktemp("tuned") / "photos.lib"))
    with Library.open(path, TurnedEncoder()) as library:
        report = library.tune(QUICK)
        assert report is not None
        assert report.adopted, report.reason
    return path


@pytest.fixture
def library(made: Path, tmp_path: Path) -> Iterator[Library]:
    path = Path(shutil.copytree(made, tmp_path / "photos.lib"))
    with Library.open(path, TurnedEncoder()) as library:
        yield library


@pytest.fixture
def tuned(made_tuned: Path, tmp_path: Path) -> Iterator[Library]:
    path = Path(shutil.copytree(made_tuned, tmp_path / "tuned.lib"))
    with Library.open(path, TurnedEncoder()) as library:
        assert library.model.name == "turned+tuned"
        yield library


def pairs_of(
    groups: Sequence[int], texts: Sequence[Sequence[int]], *, seed: int = 0, dim: int = 8
) -> Pairs:
    """Random pictures and texts: of each picture its group and the numbers of its texts."""
    rng = np.random.default_rng(seed)
    edges = [(picture, text) for picture, several in enumerate(texts) for text in several]
    count = 1 + max(text for _, text in edges)
    return Pairs(
        unit(rng.normal(size=(len(groups), dim))),
        unit(rng.normal(size=(count, dim))),
        np.array(edges),
        np.array(groups),
    )


def numbered(n: int, *, noise: float, seed: int = 0, dim: int = 16) -> Pairs:
    """Pictures with a text each, (n, 24), which is near to its picture once it is turned back."""
    rng = np.random.default_rng(seed)
    pictures = unit(rng.normal(size=(n, dim)))
    turn = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    texts = unit(unit(3 * pictures @ turn + pictures) + noise * unit(rng.normal(size=(n, dim))))
    places = np.arange(n)
    edges = np.stack([places, places], axis=1)
    return Pairs(widened(pictures), widened(texts), edges, places)


def leaning(n: int) -> Pairs:
    """Pictures with a text each, (n, 24), some of which are nearer than others to all texts."""
    rng = np.random.default_rng(0)
    pictures, noise = unit(rng.normal(size=(2, n, 24)))
    texts = unit(pictures + noise)
    texts[:, 0] += 0.8
    pictures[:, 0] += rng.random(n)
    places = np.arange(n)
    return Pairs(unit(pictures), unit(texts), np.stack([places, places], axis=1), places)


def round_about(n: int) -> Pairs:
    """Pictures with a text each, (n, 24), on a circle: none is nearer than others to all texts."""
    angles = 2 * np.pi * np.arange(n) / n
    about = angles + np.random.default_rng(0).normal(size=n) / 20
    pictures, texts = (np.stack([np.cos(one), np.sin(one)], axis=1) for one in (angles, about))
    places = np.arange(n)
    edges = np.stack([places, places], axis=1)
    return Pairs(widened(pictures, 22), widened(texts, 22), edges, places)


def filled(path: Path, pairs: Pairs) -> Store:
    """A store of these pairs; its texts are called by their numbers."""
    store = Store.create(path, ModelSpec("made", pairs.pictures.shape[1], "made-1"))
    items = []
    for picture, row in enumerate(pairs.pictures):
        texts = pairs.edges[pairs.edges[:, 0] == picture, 1]
        items.append(
            ItemWrite(
                *(f"{picture}.jpg", 1, 1, f"{picture}".encode(), 8, 8, None),
                tuple(CaptionRow(f"text {text}", "given") for text in texts),
                row,
                pairs.texts[texts],
            )
        )
    with store.writer() as writer:
        writer.write(writer.add_root(path / "pictures"), items)
        writer.finish()
    return store


class Elsewhere:
    """Reads every text as something that has nothing to do with what `numbered` shows."""

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        rows = np.zeros((len(texts), 24), dtype=np.float32)
        rows[:, 16:] = unit(np.random.default_rng(99).normal(size=(len(texts), OUTSIDE)))
        return rows


# What goes together


def test_pictures_that_share_a_caption_or_look_the_same_are_dealt_together():
    texts = [[0, 1], [1, 2], [3], [4], [5], [6], [7], [8], *([n] for n in range(9, 41))]
    rows = pairs_of([0] * len(texts), texts)
    dealt = tuning._dealt(rows.pictures, rows.texts, rows.edges, [[2, 3], [3, 4]])
    assert dealt.groups[0] == dealt.groups[1]
    assert len({*dealt.groups[2:5].tolist()}) == 1
    assert len({*dealt.groups.tolist()}) == len(texts) - 3
    assert dealt.left_out == 0
    assert np.array_equal(dealt.edges, rows.edges)


def test_a_caption_that_too_many_share_is_left_out_with_pictures_that_have_no_other():
    texts = [[0, n] for n in range(1, 31)] + [[0]]
    rows = pairs_of([0] * len(texts), texts)
    dealt = tuning._dealt(rows.pictures, rows.texts, rows.edges, [])
    assert dealt.left_out == 1
    assert len(dealt) == 30
    assert np.array_equal(dealt.texts, rows.texts[1:])
    assert len({*dealt.groups.tolist()}) == 30


@given(
    texts=st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=3), min_size=10, max_size=60),
    copies=st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=4), max_size=3),
    seed=st.integers(0, 99),
)
def test_no_text_and_no_group_is_ever_in_two_folds(texts, copies, seed):
    named = sorted({text for several in texts for text in several})
    texts = [[named.index(text) for text in dict.fromkeys(several)] for several in texts]
    rows = pairs_of([0] * len(texts), texts)
    dealt = tuning._dealt(rows.pictures, rows.texts, rows.edges, copies)
    if not len(dealt):
        return
    folds = tuning.dealt_into_folds(dealt.groups, 3, seed)
    of_text: dict[int, set[int]] = {}
    for picture, text in dealt.edges.tolist():
        of_text.setdefault(text, set()).add(int(folds[picture]))
    assert all(len(several) == 1 for several in of_text.values())
    assert sorted(of_text) == list(range(len(dealt.texts)))
    for group in {*dealt.groups.tolist()}:
        assert len({*folds[dealt.groups == group].tolist()}) == 1
    parts = [dealt.part(folds == fold) for fold in range(3)]
    assert sum(len(part) for part in parts) == len(dealt)
    assert sum(len(part.edges) for part in parts) == len(dealt.edges)


def test_folds_are_even_where_groups_are_single():
    assert np.bincount(tuning.dealt_into_folds(np.arange(53), 5, 0)).tolist() == [
        11,
        11,
        11,
        10,
        10,
    ]


def test_a_library_gives_each_text_once_and_only_what_is_embedded(tmp_path):
    made = pairs_of([0] * 4, [[0, 1], [1, 2], [3], [4, 5, 6, 7, 8, 9]])
    with filled(tmp_path / "made.lib", made) as store:
        found = Pairs.of(store)
        assert len(found.texts) == 9  # of the fourth picture five captions are read
        assert found.groups[0] == found.groups[1] != found.groups[2]
        few = Pairs.of(store, TuneConfig(pictures=2))
        assert len(few) == 2
    assert np.allclose(found.pictures, made.pictures, atol=1e-3)


# What is measured


@given(
    texts=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3), min_size=2, max_size=12),
    levels=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_ranks_are_those_of_looking_at_every_score(texts, levels, seed):
    named = sorted({text for several in texts for text in several})
    edges = np.array(
        [
            (named.index(text), picture)
            for picture, several in enumerate(texts)
            for text in dict.fromkeys(several)
        ]
    )
    rng = np.random.default_rng(seed)
    queries = rng.integers(0, levels, (len(named), 2)).astype(np.float32)
    gallery = rng.integers(0, levels, (len(texts), 2)).astype(np.float32)
    expected = []
    for query in range(len(named)):
        right = {picture for text, picture in edges.tolist() if text == query}
        scores = gallery @ queries[query]
        best = max(scores[picture] for picture in right)
        wrong = [picture for picture in range(len(texts)) if picture not in right]
        expected.append(sum(scores[picture] >= best for picture in wrong))
    assert tuning.ranks(queries, gallery, edges).tolist() == expected


def test_a_space_that_tells_nothing_apart_finds_nothing():
    one = np.tile(unit(np.ones((1, 4))), (20, 1))
    places = np.arange(20)
    pairs = Pairs(one, one, np.stack([places, places], axis=1), places)
    assert tuning.rsum(pairs) == 0
    assert tuning.rsum(numbered(20, noise=0)) > 0


def test_recalls_count_a_shared_caption_once_and_any_of_its_pictures():
    # Two pictures share text 0, which is nearest to the second; text 1 is nearest to the wrong one.
    pictures = unit(np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]]))
    texts = unit(np.array([[0, 1, 0.1], [0, 1, 0.5]]))
    pairs = Pairs(pictures, texts, np.array([(0, 0), (1, 0), (2, 1)]), np.array([0, 0, 1]))
    by_text, by_picture = tuning.both_ranks(pairs)
    assert by_text.tolist() == [0, 1]
    assert by_picture.tolist() == [1, 0, 0]  # the first is as far from both texts: the worst counts
    tally = tuning.Tally()
    tally.add(pairs, pairs)
    record = tally.record(50, 0)
    assert record["before"]["t2i_r@1"] == 50
    assert record["before"]["i2t_r@1"] == pytest.approx(66.67)
    assert record["gain"]["rsum"] == 0
    assert record["gain"]["intervals"]["rsum"] == [0, 0]


def test_guessing_is_worked_out_by_hand():
    pairs = pairs_of(range(4), [[0, 1], [2], [2], [3, 4, 5]])
    # One picture of four is right for each text but the third, for which two are.
    expected = [0.25, 0.25, 0.5, 0.25, 0.25, 0.25]
    assert tuning.guessed(pairs, "t2i", 1) == pytest.approx(np.array(expected))
    assert tuning.guessed(pairs, "t2i", 2)[2] == pytest.approx(1 - 1 / 6)
    assert tuning.guessed(pairs, "i2t", 1) == pytest.approx(np.array([2, 1, 1, 3]) / 6)
    assert tuning.guessed(pairs, "i2t", 10).tolist() == [1, 1, 1, 1]


# When a head is adopted


def test_a_turn_is_learned_and_shown_on_pairs_that_were_held_out(tmp_path):
    with filled(tmp_path / "made.lib", numbered(200, noise=0.3)) as store:
        found = tuning.tune(store, Elsewhere, QUICK)
        assert found.is_better, found.reason
        record = found.record
        assert record["after"]["t2i_r@10"] > 1.5 * record["before"]["t2i_r@10"]
        low, high = record["gain"]["intervals"]["rsum"]
        assert 0 < low < record["gain"]["rsum"] < high
        assert (record["pictures"], record["texts"], record["groups"]) == (200, 200, 200)
        # The head that is adopted was trained without the first fold.
        pairs = Pairs.of(store)
        asked = pairs.part(tuning.dealt_into_folds(pairs.groups, QUICK.folds, 0) == 0)
        assert tuning.rsum(asked.carried(found.head)) > tuning.rsum(asked)
        assert json.loads(json.dumps(record)) == record


def test_captions_that_have_nothing_to_do_with_their_pictures_are_not_learned(tmp_path):
    made = numbered(150, noise=0)
    shuffled = np.random.default_rng(3).permutation(150)
    noise = Pairs(made.pictures, made.texts[shuffled], made.edges, made.groups)
    with filled(tmp_path / "made.lib", noise) as store:
        found = tuning.tune(store, Elsewhere, QUICK)
    assert not found.is_better
    assert "no more than chance explains" in found.reason


def test_copies_with_the_same_caption_give_nothing_away(tmp_path):
    # Each picture is there three times, with random captions that its copies share: whoever deals
    # copies apart learns them by heart and shows a gain that is none.
    made = numbered(60, noise=0)
    texts = widened(unit(np.random.default_rng(4).normal(size=(60, 16))))
    places = np.arange(180)
    noise = Pairs(
        made.pictures[places % 60], texts, np.stack([places, places % 60], axis=1), places
    )
    with filled(tmp_path / "made.lib", noise) as store:
        found = tuning.tune(store, Elsewhere, QUICK)
    assert found.record["groups"] == 60
    assert not found.is_better


def test_too_few_captions_are_told(tmp_path):
    with filled(tmp_path / "made.lib", numbered(49, noise=0)) as store:
        found = tuning.tune(store, Elsewhere, QUICK)
    assert (found.head, found.is_better) == (None, False)
    assert "too few captions to tell" in found.reason


def test_a_library_without_captions_is_told_so_too(tmp_path):
    with Library.create(tmp_path / "bare.lib", TurnedEncoder()) as library:
        assert "too few captions" in library.tune(QUICK).reason
        library.index(paint(tmp_path / "bare", range(3), ""))
        assert "0 captioned pictures" in library.tune(QUICK).reason


def test_the_same_library_gives_the_same_head(tmp_path):
    with filled(tmp_path / "made.lib", numbered(80, noise=0.3)) as store:
        one, other = (tuning.tune(store, Elsewhere, QUICK) for _ in range(2))
    assert one.record | {"seconds": 0} == other.record | {"seconds": 0}
    assert one.head.pack() == other.head.pack()


def test_a_head_that_spoils_what_the_library_is_not_about_is_refused():
    record = {
        "gain": {"rsum": 50.0, "intervals": {"rsum": [40.0, 60.0]}},
        "epochs": [5] * 6,
        "chance": {"below_rsum_by": [3.0, 9.0]},
        "general": {"texts": 0.99, "pictures": 0.5, "cosine": 0.9},
    }
    is_better, reason = tuning.is_head_better(record)
    assert not is_better
    assert "found worse" in reason
    spared = record | {"general": {"texts": 0.99, "pictures": 0.98}}
    assert tuning.is_head_better(spared)[0]
    is_better, reason = tuning.is_head_better(spared | {"chance": {"below_rsum_by": [-2.0, 9.0]}})
    assert not is_better
    assert "no more than guessing" in reason


# A correction for hubs


@pytest.mark.parametrize("is_of_use", [True, False])
def test_hubs_are_corrected_where_there_are_any(is_of_use):
    pairs = leaning(400) if is_of_use else round_about(400)
    heads = [tuning.identity(24)] * (QUICK.folds + 1)
    assert tuning.corrected(pairs, heads, QUICK, stop=lambda: True) is None
    correction, record = tuning.corrected(pairs, heads, QUICK)
    helps, told = tuning.is_correction_better(record | {"space": "before"})
    assert helps == is_of_use, told
    assert len(record["weights"]) == QUICK.folds + 1
    assert record["weights"][-1] == correction.weight
    gain, (low, high) = record["gain"]["rsum"], record["gain"]["intervals"]["rsum"]
    if is_of_use:
        assert f"alone brings {gain:+.1f}, 95 % interval {low:+.1f} to {high:+.1f}" in told
        held_out = pairs.part(tuning.dealt_into_folds(pairs.groups, QUICK.folds, 0) == 0)
        told_apart = held_out.carried(replace(heads[0], correction=correction))
        assert tuning.rsum(told_apart) > tuning.rsum(held_out)
    for k in (1, 5, 10):  # a text's pictures are put in another order, a picture's texts are not
        assert record["gain"][f"i2t_r@{k}"] == pytest.approx(0, abs=0.5)  # but for ties


def test_texts_that_a_picture_has_of_its_own_are_passed_by():
    pairs = leaning(300)
    one = tuning.chosen_correction(pairs, pairs, QUICK)
    assert one.passed == 1
    few = tuning.chosen_correction(pairs, pairs, replace(QUICK, hub_texts=100))
    assert (len(few.texts), few.passed) == (100, 1)
    twice = Pairs(
        pairs.pictures,
        np.concatenate([pairs.texts, -pairs.texts]),
        np.concatenate([pairs.edges, pairs.edges + np.array([0, 300])]),
        pairs.groups,
    )
    some = tuning.chosen_correction(twice, twice, replace(QUICK, hub_texts=300))
    of_pairs = {row.tobytes() for row in np.concatenate([pairs.texts, -pairs.texts])}
    assert {row.tobytes() for row in some.texts} <= of_pairs
    assert len({np.abs(row).tobytes() for row in some.texts}) == 300  # one of every picture
    assert some.passed == 1


@pytest.mark.parametrize(
    ("weights", "low", "is_kept", "words"),
    [
        ([0.5, 0.5, 0.25], 1.0, True, "brings"),
        ([0.5, 0.5, 0.25], 0.0, False, "left out"),
        ([0.5, 0.5, 0.0], 1.0, False, "would change nothing"),
    ],
)
def test_a_correction_is_kept_by_what_it_brings_to_held_out_pairs(weights, low, is_kept, words):
    gain = {"rsum": 2.0, "intervals": {"rsum": [low, 3.0]}}
    record = {"weights": weights, "gain": gain, "space": "after"}
    found = tuning.is_correction_better(record)
    assert found[0] is is_kept
    assert words in found[1]


def test_a_model_that_knows_nothing_is_not_corrected(tmp_path):
    made = leaning(150)
    shuffled = np.random.default_rng(3).permutation(150)
    noise = Pairs(made.pictures, made.texts[shuffled], made.edges, made.groups)
    with filled(tmp_path / "made.lib", noise) as store:
        found = tuning.tune(store, Elsewhere, QUICK)
    assert not found.is_better
    assert "correction" not in found.record


def test_a_library_is_searched_by_the_correction_alone_where_a_head_brings_nothing(tmp_path):
    folder = paint(tmp_path / "pictures", range(120))
    with Library.create(tmp_path / "photos.lib", LeaningEncoder()) as library:
        library.index(folder)
        before, found = answers(library), first_by_text(library, range(120))
        were_left_out = left_out(library, folder)
        # Without an epoch a head stays the identity.
        report = library.tune(replace(QUICK, epochs=0))
        assert report.adopted, report.reason
        assert "no more than chance explains; correcting for hubs alone brings" in report.reason
        assert library.model.dim == 64  # the next multiple of 16 that has room for two more
        assert first_by_text(library, range(120)) > found
        assert left_out(library, folder) == pytest.approx(were_left_out, abs=0.1)
        # All that looks at embeddings bears the further dimensions.
        assert len(library.search("squares 7 -squares 8", image=folder / "7.png", k=5)) == 5
        assert library.search(image=folder / "7.png", k=3)[0].path.stem == "7"
        assert library.captions_for(folder / "7.png", k=5)[0].caption.startswith("squares")
        assert not library.duplicates().groups
        assert library.index(paint(tmp_path / "more", range(200, 205))).added == 5
        assert library.verify(sample=4) == []
        library.forget_root(tmp_path / "more")
        library.untune()
        assert answers(library) == before


def test_neighbourhoods_are_kept_by_the_identity_and_lost_where_all_texts_become_alike():
    texts = unit(np.random.default_rng(1).normal(size=(30, 24)))
    general = tuning.General(texts, texts)
    kept = general.kept(tuning.identity(24))
    assert kept == {"texts": 1.0, "pictures": 1.0, "cosine": 1.0}
    still = tuning.identity(24).residuals["image"]
    down, up = np.zeros((24, 1), np.float32), np.zeros((1, 24), np.float32)
    down[0], up[0, 1] = 50, 1  # whatever has anything of the first column goes to the second
    spoilt = general.kept(Head({"image": still, "caption": still._replace(down=down, up=up)}))
    assert spoilt["texts"] < tuning.LEAST_KEPT


# A library


def answers(library: Library) -> list[tuple[int, float]]:
    return [
        (hit.item_id, hit.score)
        for number in (3, 50, 111)
        for hit in library.search(f"squares {number}", mode="image", k=20)
    ]


def first_by_text(library: Library, numbers: Sequence[int]) -> int:
    """How many of these pictures their caption finds first, by the look alone."""
    return sum(
        library.search(f"squares {number}", mode="image", k=1)[0].path.stem == str(number)
        for number in numbers
    )


def left_out(library: Library, folder: Path) -> float:
    """The share of pictures that are not like some of them and without a text, on average."""
    asked = [(folder / f"{one}.png", f"squares {one + 50}") for one in range(20)]
    found = [
        library.search(image=picture, without=[text], k=1000, all=True) for picture, text in asked
    ]
    return 1 - sum(map(len, found)) / len(asked) / library.info()["items"]


def test_a_tuned_library_finds_more_and_undoing_gives_back_the_former_answers(library, tuned):
    assert (tuned.model.name, tuned.base_model.name) == ("turned+tuned", "turned")
    assert first_by_text(tuned, range(40)) > first_by_text(library, range(40))
    assert answers(tuned) != answers(library)
    assert tuned.encoder.images_seen == 0  # no picture was opened
    assert tuned.verify(sample=4) == []
    assert tuned.info()["model"]["name"] == "turned+tuned"
    assert tuned.info()["answers"] is not None  # measured anew, for the new space
    assert tuned.untune().name == "turned"
    assert tuned.model.name == "turned"
    assert answers(tuned) == answers(library)
    assert tuned.verify(sample=4) == []
    with pytest.raises(UsageError, match="is not tuned"):
        tuned.untune()


def test_a_dry_run_changes_nothing(library):
    before = answers(library)
    report = library.tune(QUICK, dry_run=True)
    assert (report.adopted, report.is_better) == (False, True)
    assert library.model.name == "turned"
    assert answers(library) == before
    assert len(library.models()) == 1


def test_one_that_is_stopped_changes_nothing(library):
    before = answers(library)
    assert library.tune(QUICK, stop=lambda: True) is None
    adopted: list[int] = []
    report = library.tune(
        QUICK, adopting=lambda done, total: adopted.append(done), stop=lambda: bool(adopted)
    )
    assert report is None
    assert adopted
    assert library.model.name == "turned"
    assert len(library.models()) == 1
    assert answers(library) == before


def test_pictures_indexed_later_go_through_the_head_and_are_encoded_once(tuned, tmp_path):
    seen = tuned.encoder.images_seen
    report = tuned.index(paint(tmp_path / "more", range(200, 220)))
    assert (report.added, report.failed) == (20, ())
    assert tuned.encoder.images_seen == seen + 20
    assert first_by_text(tuned, range(200, 220)) >= 10
    assert tuned.pending == 0
    assert [one.pictures for one in tuned.models()] == [140, 140]
    assert tuned.verify(sample=4) == []
    tuned.untune()
    assert tuned.search("squares 205", mode="image", k=140)
    assert tuned.verify(sample=4) == []


def test_a_tuned_library_opens_by_default_by_either_name_and_with_its_encoder(tuned, monkeypatch):
    expected = answers(tuned)
    tuned.close()
    monkeypatch.setattr(
        "retriever.encoders.load_encoder", lambda name, device, threads: TurnedEncoder()
    )
    for encoder in (None, "turned+tuned", TurnedEncoder()):
        with Library.open(tuned.path, encoder) as again:
            assert again.model.name == "turned+tuned"
            assert answers(again) == expected
    with Library.open(tuned.path, "turned") as before:
        assert before.model.name == "turned"
        assert answers(before) != expected
        assert before.use_model("turned").spec.name == "turned"
    with Library.open(tuned.path) as again:
        assert again.model.name == "turned"
        again.use_model("turned+tuned")
    with Library.open(tuned.path, add_model=True, encoder="turned+tuned") as again:
        assert again.index().unchanged == 120


def test_the_model_that_a_library_is_tuned_from_cannot_be_dropped(tuned):
    with pytest.raises(UsageError, match=r"tuned is tuned from turned.*tune --undo"):
        tuned.drop_model("turned")
    tuned.use_model("turned")
    assert [one.spec.name for one in tuned.drop_model("turned+tuned")] == ["turned+tuned"]
    assert tuned.models()[0].spec.name == "turned"


def test_another_tuning_starts_from_the_model_itself(tuned):
    first = tuned.model.fingerprint
    report = tuned.tune(replace(QUICK, seed=1))
    assert report.adopted
    assert report.base == "turned"
    assert tuned.model.fingerprint != first
    assert [one.spec.name for one in tuned.models()] == ["turned+tuned", "turned"]
    assert tuned.verify(sample=0) == []


def test_an_export_of_a_tuned_library_is_of_its_model_and_fits_any_library_of_that(tuned, tmp_path):
    tuned.export(tmp_path / "export")
    manifest = json.loads((tmp_path / "export" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["model"]["name"] == "turned"
    with Library.create(tmp_path / "other.lib", TurnedEncoder()) as other:
        assert other.import_(tmp_path / "export").added == 120
    extra = paint(tmp_path / "extra", range(300, 303))
    with Library.create(tmp_path / "third.lib", TurnedEncoder()) as third:
        third.index(extra)
        third.export(tmp_path / "more")
    assert tuned.import_(tmp_path / "more").added == 3
    assert [one.pictures for one in tuned.models()] == [123, 123]
    assert tuned.merge(tmp_path / "other.lib").unchanged == 120
    assert tuned.verify(sample=4) == []


def test_near_duplicates_are_those_of_the_model_that_looks_at_pictures(library, tuned):
    groups = [[m.item.path for m in group] for group in library.duplicates().groups]
    assert [[m.item.path for m in group] for group in tuned.duplicates().groups] == groups


def test_only_the_base_takes_embeddings(tuned):
    row = unit(np.ones((1, DIM)))[0]
    with pytest.raises(InvalidRowsError, match="follow from"), tuned._store.writer() as writer:
        writer.write(1, [ItemWrite("x.jpg", 1, 1, b"x", 8, 8, image_embedding=row)])


# The command


def run(*arguments: object) -> str:
    done = CliRunner().invoke(main, [str(one) for one in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "DEFAULTS", QUICK)
    monkeypatch.setattr(
        "retriever.encoders.load_encoder", lambda name, device, threads: TurnedEncoder()
    )


def test_the_command_says_what_it_found_and_did(library, by_name):
    library.close()
    said = run("tune", "--library", library.path)
    assert "t2i R@10" in said
    assert "is searched by turned+tuned from now on" in said
    told = run("info", "--library", library.path)
    assert "Tuned     from turned with 120 captioned pictures: held-out rSum" in told
    said = run("tune", "--library", library.path, "--undo")
    assert "is searched by turned again" in said
    assert "Tuned" not in run("info", "--library", library.path)


def test_the_record_of_the_command_has_all_that_was_measured(library, by_name):
    library.close()
    record = json.loads(run("tune", "--library", library.path, "--dry-run", "--json"))
    assert (record["adopted"], record["is_better"], record["dry_run"]) == (False, True, True)
    assert record["before"]["intervals"].keys() >= {"t2i_r@1", "i2t_r@10", "rsum"}
    assert {"alignment", "uniformity_texts", "modality_gap"} <= record["after"].keys()
    assert {"texts", "pictures"} <= record["general"].keys()
    assert record["seconds"] > 0


def test_too_few_captions_are_no_failure(tmp_path, by_name):
    with Library.create(tmp_path / "few.lib", TurnedEncoder()) as few:
        few.index(paint(tmp_path / "few", range(12)))
    said = run("tune", "--library", tmp_path / "few.lib")
    assert "Too few captions" in said
    assert "nothing was changed" in said
    record = json.loads(run("tune", "--library", tmp_path / "few.lib", "--json"))
    assert record["adopted"] is False


def test_a_tuned_library_is_searched_and_indexed_without_torch(tmp_path):
    code = """
import sys
from pathlib import Path
import numpy as np
from indexes.heads import Head, Residual, fingerprint
from indexes.records import ModelSpec
from retriever import Library
home = Path(sys.argv[1])
with Library.create(home / "new.lib") as library:
    library.index(home / "pictures")
    base, rng = library.model, np.random.default_rng(0)
    shapes = ((base.dim, 8), (8,), (8, base.dim), (base.dim,))
    part = Residual(*(rng.normal(size=one).astype(np.float32) / 9 for one in shapes))
    head = Head({"image": part, "caption": part}).pack()
    tuned = ModelSpec("mini+tuned", base.dim, fingerprint(base.fingerprint, head))
    with library._store.writer() as writer:
        assert writer.adopt(tuned, head, {})
with Library.open(home / "new.lib") as library:
    assert library.model == tuned
    assert library.index(home / "more").added == 2
    assert len(library.search("a red picture", all=True)) == 5
    assert library.verify(sample=2) == []
print("loaded:", sorted({"torch", "safetensors", "open_clip"} & set(sys.modules)))
"""
    paint(tmp_path / "pictures", range(3))
    paint(tmp_path / "more", range(3, 5))
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded: []"


def test_without_torch_the_command_says_what_is_missing(library, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"Tuning needs an optional part.*\[models\]"):
        library.tune(QUICK)
