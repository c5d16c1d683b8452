"""Near-duplicates: what is put together, what is not, and the quick way beside the plain one."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from indexes.records import ItemRow
from retriever import duplicates
from retriever.duplicates import BITS, MAX_BITS, MIN_COSINE, collapse, differing

EAST, NORTH = np.eye(2, dtype=np.float32)
NEAR_EAST = np.array([0.999, np.sqrt(1 - 0.999**2)], np.float32)

hashes = arrays(np.uint64, st.integers(0, 40), elements=st.integers(0, 2**64 - 1))


def item(
    number: int, content: bytes | None = None, hash_: int | None = None, side: int = 10
) -> ItemRow:
    root = Path("/p")
    return ItemRow(
        item_id=number,
        path=root / f"{number}.png",
        root=root,
        file=f"{number}.png",
        size=100,
        mtime_ns=0,
        content_hash=content,
        width=side,
        height=side,
        taken=None,
        status="ok",
        reason=None,
        captions=(),
        perceptual_hash=hash_,
    )


def plain_groups(bits: np.ndarray, rows: np.ndarray) -> list[list[int]]:
    """Each picture beside each leader, one after the other."""
    kept: list[list[int]] = []
    for at in range(len(bits)):
        for group in kept:
            first = group[0]
            is_near = int(bits[at] ^ bits[first]).bit_count() <= MAX_BITS
            if is_near and rows[at] @ rows[first] >= MIN_COSINE:
                group.append(at)
                break
        else:
            kept.append([at])
    return kept


# ── which pictures are near-duplicates ───────────────────────────────────────────────────────────


def test_pictures_alike_in_hash_and_embedding_collapse_into_the_first() -> None:
    items = [item(7, b"a", 0b1111), item(8, b"b", -1), item(9, b"c", 0b1110)]
    assert collapse(items, np.stack([EAST, EAST, NEAR_EAST])) == [[0, 2], [1]]


@pytest.mark.parametrize(
    ("other_hash", "other_row"),
    [
        pytest.param(-1, EAST, id="another hash"),
        pytest.param(0, NORTH, id="another embedding"),
        pytest.param(None, EAST, id="no hash"),
    ],
)
def test_one_likeness_alone_is_not_enough(other_hash: int | None, other_row: np.ndarray) -> None:
    items = [item(1, b"a", 0), item(2, b"b", other_hash)]
    assert collapse(items, np.stack([EAST, other_row])) == [[0], [1]]


def test_files_with_the_same_contents_are_duplicates_whatever_else_is_known() -> None:
    items = [item(1, b"a"), item(2, b"b", 0), item(3, b"a", 0)]
    assert collapse(items, np.stack([EAST, NORTH, EAST])) == [[0, 2], [1]]


def test_pictures_of_unknown_content_are_no_copies_of_each_other() -> None:
    assert collapse([item(1), item(2)], np.stack([EAST, EAST])) == [[0], [1]]


def test_as_many_bits_as_allowed_may_differ_and_not_one_more() -> None:
    some, more = (1 << MAX_BITS) - 1, (1 << MAX_BITS + 1) - 1
    items = [item(1, b"a", 0), item(2, b"b", some), item(3, b"c", more)]
    rows = np.stack([EAST] * 3)
    assert collapse(items[:2], rows[:2]) == [[0, 1]]
    assert collapse(items[::2], rows[:2]) == [[0], [1]]


def test_the_sign_of_a_hash_is_its_highest_bit() -> None:
    items = [item(1, b"a", 1), item(2, b"b", 1 - (1 << BITS - 1))]
    assert collapse(items, np.stack([EAST, EAST])) == [[0, 1]]


def test_no_chain_leads_from_a_picture_to_one_unlike_it() -> None:
    step = MAX_BITS - 2
    chain = [item(n, bytes([n]), (1 << n * step) - 1) for n in range(5)]
    rows = np.stack([EAST] * 5)
    assert collapse(chain, rows) == [[0, 1], [2, 3], [4]]


def test_nothing_collapses_to_nothing() -> None:
    assert collapse([], np.empty((0, 2), np.float32)) == []


# ── the quick way ────────────────────────────────────────────────────────────────────────────────


@given(hashes, hashes)
def test_differing_bits_are_counted_as_python_counts_them(
    ones: np.ndarray, others: np.ndarray
) -> None:
    n = min(len(ones), len(others))
    counted = differing(ones[:n], others[:n]).tolist()
    pairs = zip(ones[:n].tolist(), others[:n].tolist(), strict=True)
    assert counted == [(one ^ other).bit_count() for one, other in pairs]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 60), st.sampled_from([1, 7, 512]))
def test_buckets_find_the_groups_that_comparing_each_with_each_finds(
    seed: int, n: int, block: int
) -> None:
    rng = np.random.default_rng(seed)
    centres = rng.integers(0, 2**64, size=4, dtype=np.uint64)
    flips = rng.random((n, BITS)) < rng.choice([0.02, 0.08, 0.15], size=(n, 1))
    noise = np.packbits(flips, axis=1).view(np.uint64).ravel()
    bits = centres[rng.integers(0, 4, n)] ^ noise
    rows = rng.normal([3, 0], 0.7, size=(n, 2)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    items = [item(at, bytes([at]), int(bits[at].view(np.int64))) for at in range(n)]
    expected = plain_groups(bits, rows)
    with pytest.MonkeyPatch.context() as patch:
        assert collapse(items, rows) == expected  # few: each with each
        patch.setattr(duplicates, "FEW", 0)
        patch.setattr(duplicates, "BLOCK", block)
        assert collapse(items, rows) == expected
        patch.setattr(duplicates, "MAX_PAIRS", 1)
        patch.setattr(duplicates, "MAX_ROWS", 3)
        assert collapse(items, rows) == expected


def test_thousands_of_pictures_with_one_hash_are_told_apart_by_their_embeddings() -> None:
    n = 3000
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(n, 32)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows[1::2] = rows[::2]
    items = [item(at, at.to_bytes(2), 0) for at in range(n)]
    assert collapse(items, rows) == [[at, at + 1] for at in range(0, n, 2)]
