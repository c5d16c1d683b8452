"""Channels: hand-worked scores, and the best of all of them against looking at everything."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import retriever.channels as channels_module
from indexes.store import CaptionRow, ItemWrite, Match, ModelSpec, Store
from retriever.channels import CHANNELS, FALLBACK, Channels, Fusion

DIM = 8
WORDS = ("dog", "beach", "snow", "child", "red", "car", "tree", "night")
HALF = Fusion({"image": 0.5, "caption": 0.25, "words": 0.25}, (0.1, 0.8))

unit = st.floats(-1, 1, width=32)
share = st.floats(0, 1, width=32)


def unit_rows(rng: np.random.Generator, count: int) -> np.ndarray:
    rows = rng.standard_normal((count, DIM)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """200 pictures with 0 to 3 captions each, whose embeddings and words mean nothing."""
    rng = np.random.default_rng(0)
    with Store.create(
        tmp_path_factory.mktemp("channels") / "a.lib", ModelSpec("toy", DIM, "toy-1")
    ) as store:
        items = []
        for number in range(200):
            count = int(rng.integers(4))
            captions = tuple(
                CaptionRow(" ".join(rng.choice(WORDS, 3, replace=False)), "sidecar")
                for _ in range(count)
            )
            items.append(
                ItemWrite(
                    file=f"{rng.choice(WORDS)}_{number}.jpg",
                    size=1,
                    mtime_ns=1,
                    content_hash=number.to_bytes(8, "big"),
                    width=1,
                    height=1,
                    captions=captions,
                    image_embedding=unit_rows(rng, 1)[0],
                    caption_embeddings=unit_rows(rng, count) if count else None,
                )
            )
        with store.writer() as writer:
            writer.write(writer.add_root(Path("/pictures")), items)
            writer.finish()
        yield store


def asked(store: Store, seed: int, **settings: Any) -> Channels:
    rng = np.random.default_rng(seed)
    text = " ".join(rng.choice(WORDS, 2, replace=False))
    return Channels(store, unit_rows(rng, 1)[0], text, fusion=HALF, **settings)


# ── fusion ───────────────────────────────────────────────────────────────────────────────────────


def test_the_score_is_the_weighted_mean_and_without_captions_a_line_over_the_image() -> None:
    scores = {
        "image": np.array([0.4, 0.4], dtype=np.float32),
        "caption": np.array([0.8, np.nan], dtype=np.float32),
        "words": np.array([0.2, 0.2], dtype=np.float32),
    }
    fused = HALF.fuse(scores)
    assert fused == pytest.approx([0.5 * 0.4 + 0.25 * 0.8 + 0.25 * 0.2, 0.1 + 0.8 * 0.4 + 0.05])
    assert fused.dtype == np.float32


@given(unit, st.none() | unit, share, st.tuples(share, share, share))
def test_no_picture_can_have_more_than_the_bound(
    image: float, caption: float | None, words: float, more: tuple[float, float, float]
) -> None:
    scores = {
        "image": np.array([image]),
        "caption": np.array([np.nan if caption is None else caption]),
        "words": np.array([words]),
    }
    last = {
        "image": image + more[0],
        "caption": (-1.0 if caption is None else caption) + more[1],
        "words": words + more[2],
    }
    for fusion in (HALF, FALLBACK):
        assert fusion.fuse(scores)[0] <= fusion.bound(last) + 1e-6


def test_a_fusion_survives_being_written_down() -> None:
    assert Fusion.from_facts(json.loads(json.dumps(HALF.facts()))) == HALF


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"weights": {"image": 1}, "bare": [0, 1]},
        {"weights": dict.fromkeys(CHANNELS, 0.3)},
        {"weights": dict.fromkeys(CHANNELS, "x"), "bare": [0, 1]},
        {"weights": None, "bare": [0, 1]},
        {"weights": dict.fromkeys(CHANNELS, 0.3), "bare": [1]},
    ],
)
def test_facts_that_are_none_are_refused(facts: dict[str, Any]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        Fusion.from_facts(facts)


# ── channels ─────────────────────────────────────────────────────────────────────────────────────


def everything(query: Channels, among: np.ndarray | None) -> tuple[list[int], np.ndarray]:
    """Ids and fused scores of all pictures that may be found, the best first."""
    ids = np.array(query.store.item_ids(), dtype=np.int64) if among is None else among
    known, scores = query.scores(ids)
    fused = query.fusion.fuse(scores)
    order = np.lexsort((known, -fused))
    return known[order].tolist(), fused[order]


@pytest.mark.parametrize("depth", [1, 5, 100])
@pytest.mark.parametrize("share", [1.0, 0.3, 0.02])
def test_the_best_of_all_channels_are_those_of_looking_at_everything(
    store: Store, monkeypatch: pytest.MonkeyPatch, depth: int, share: float
) -> None:
    monkeypatch.setattr(channels_module, "DEPTH", depth)
    monkeypatch.setattr(channels_module, "DEPTH_PER_RESULT", 1)
    rng = np.random.default_rng(1)
    for seed in range(10):
        among = None
        if share < 1:
            among = np.sort(rng.choice(store.item_ids(), int(200 * share), replace=False))
        query = asked(store, seed, among=among, exact=True)
        ids, scores = everything(query, among)
        for k in (1, 3, 20):
            found = query.best("hybrid", k)
            assert found.ids[:k].tolist() == ids[:k]
            assert found.scores[:k] == pytest.approx(scores[:k], abs=1e-6)
            assert len(found.ids) >= min(k, len(ids))


def test_a_caption_that_an_approximate_index_misses_costs_no_answer(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = store.search

    def lossy(kind: Any, queries: Any, k: int, **wanted: Any) -> Any:
        if kind != "caption" or wanted.get("among") is not None or wanted.get("exact"):
            return search(kind, queries, k, **wanted)
        (found,) = search(kind, queries, k + 3)
        return [Match(found.ids[3:], found.scores[3:])]  # without the nearest

    monkeypatch.setattr(store, "search", lossy)
    monkeypatch.setattr(store, "is_exact", lambda *_: False)
    for seed in range(10):
        query = asked(store, seed)
        ids, _ = everything(query, None)
        assert query.best("hybrid", 5).ids.tolist() == ids[:5]


def test_more_pictures_with_a_word_than_are_scored_at_once_are_ranked_all_the_same(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("SCORED", 40), ("DEPTH", 10), ("DEPTH_PER_RESULT", 1), ("DEEPEST", 10)):
        monkeypatch.setattr(channels_module, name, value)
    monkeypatch.setattr("indexes.words.SCORED", 40)
    for seed in range(10):
        query = asked(store, seed)
        found = query.best("hybrid", 5)
        assert found.scores.tolist() == query.fusion.fuse(found.channels).tolist()
        known, channels = query.scores(np.sort(found.ids))
        by_id = dict(zip(known.tolist(), channels["words"].tolist(), strict=True))
        assert [by_id[one] for one in found.ids.tolist()] == found.channels["words"].tolist()


@pytest.mark.parametrize("mode", ["image", "caption", "words", "hybrid"])
def test_every_mode_gives_as_many_as_there_are_and_says_when_that_is_all(
    store: Store, mode: Any
) -> None:
    for seed in range(5):
        query = asked(store, seed)
        few, most = query.best(mode, 7), query.best(mode, 1000)
        assert not few.is_all or len(few.ids) < 7 or mode == "hybrid"
        assert most.is_all
        assert few.ids[:7].tolist() == most.ids[:7].tolist()
        assert len(set(most.ids.tolist())) == len(most.ids)
        assert np.all(np.diff(most.scores) <= 0)
        if mode in ("image", "hybrid"):
            assert len(most.ids) == 200


def test_captions_rank_pictures_by_the_nearest_of_each(store: Store) -> None:
    for seed in range(5):
        query = asked(store, seed)
        found = query.best("caption", 1000)
        known, scores = query.scores(np.array(store.item_ids(), dtype=np.int64))
        captioned = ~np.isnan(scores["caption"])
        by_id = dict(zip(known[captioned], scores["caption"][captioned], strict=True))
        assert set(by_id) == set(found.ids.tolist())
        assert found.scores == pytest.approx([by_id[one] for one in found.ids], abs=2e-3)


def test_words_are_scored_alike_alone_and_beside_others(store: Store) -> None:
    query = asked(store, 3)
    words = query.best("words", 1000)
    assert words.ids.size
    assert query.scores(np.sort(words.ids))[1]["words"] == pytest.approx(
        words.scores[np.argsort(words.ids)]
    )
    assert {term.text for term in words.terms} == set(query.text.split())


@pytest.mark.parametrize("mode", ["image", "caption", "words", "hybrid"])
def test_nothing_is_found_among_nothing(store: Store, mode: Any) -> None:
    found = asked(store, 0, among=np.empty(0, np.int64)).best(mode, 10)
    assert found.ids.tolist() == []
    assert found.is_all


def test_pictures_that_are_gone_are_left_out_of_scores(store: Store) -> None:
    known, scores = asked(store, 0).scores(np.array([1, 2, 10**6], dtype=np.int64))
    assert known.tolist() == [1, 2]
    assert {len(one) for one in scores.values()} == {2}
