"""Near-duplicates: one photograph as several files, found and put together, never deleted.

Two files are near-duplicates if their contents are the same, or if they look the same in two ways:
their perceptual hashes differ in few bits, and their embeddings are nearly one. The hash knows
coarse light and dark but no things, the embedding knows things but no places; either alone takes
pictures for duplicates that are none.

A group has one picture that is kept, and each other one is a near-duplicate of that very picture.
So no chain of small steps, as in a burst or a film, ends in a group whose ends differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from indexes.records import ItemRow
    from indexes.store import Store

Positions = NDArray[np.int64]
Rows = NDArray[np.float32]

MAX_BITS = 11  # of 64 in which the hashes of near-duplicates differ
# Of their embeddings. 0.85 would find 96 % of small pictures at half their size instead of 63, and
# put together most of a shop's products that are photographed alike.
MIN_COSINE = 0.93
BITS = 64
# Two hashes with at most MAX_BITS differences have a quarter in which at most this many differ.
BANDS = 4
BAND_BITS = BITS // BANDS
BAND_ERRORS = MAX_BITS // BANDS
FEW = 512  # pictures that are compared each with each: sooner done than sorted into buckets
BLOCK = 512  # pictures whose neighbours are looked up at once
MAX_PAIRS = 1 << 20  # compared at once
ITEM_CHUNK = 4096  # rows of the catalogue read at a time


@dataclass(frozen=True, slots=True)
class Member:
    """A picture of a group.

    similarity: cosine between its embedding and that of the group's first. is_copy: its file has
    the same bytes as the first's.
    """

    item: ItemRow
    similarity: float
    is_copy: bool


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Groups of two and more, the largest picture of each first; groups in the order of their ids.

    unhashed: pictures without a perceptual hash, of which only copies were found.
    """

    groups: tuple[tuple[Member, ...], ...]
    unhashed: int

    @property
    def spare(self) -> int:
        """Pictures that are there besides the first of each group."""
        return sum(len(group) - 1 for group in self.groups)

    @property
    def spare_bytes(self) -> int:
        """What their files take."""
        return sum(member.item.size for group in self.groups for member in group[1:])


def find(
    store: Store,
    *,
    copies: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Duplicates:
    """The near-duplicates in a store, by the embeddings of the model that it was opened with.

    A tuned space draws pictures together that its captions say the same of; so there it is the
    model that looks at the pictures whose embeddings count.

    In each group the picture with the most pixels comes first (of equals the larger file, then the
    one that was indexed earlier), then those that resemble it most. Pictures are compared as the
    store knows them: no file is looked at.

    Args:
        store: it is only read.
        copies: only files with the same contents.
        progress: called with (done, total) pictures.
    """
    with store.snapshot() as state:
        rows = state.of_base()
        known: list[tuple[int, int, int, bytes | None, int | None]] = []
        ids = rows.item_ids()
        for start in range(0, len(ids), ITEM_CHUNK):
            for item in rows.items(ids[start : start + ITEM_CHUNK]).values():
                if item.status == "ok":
                    pixels = item.width * item.height
                    hash_ = item.perceptual_hash
                    known.append((-pixels, -item.size, item.item_id, item.content_hash, hash_))
        known.sort(key=lambda one: one[:3])

        derivation = state.derivation()
        dim = (derivation.base if derivation else store.model).dim
        vectors = np.zeros((len(known), dim), np.float16)  # filled as they are needed
        is_read = np.zeros(len(known), dtype=bool)

        def embeddings(positions: Positions) -> Rows:
            fresh = positions[~is_read[positions]].tolist()
            found = rows.embeddings("image", [known[at][2] for at in fresh])
            for at in fresh:
                if known[at][2] in found:  # else this model has not seen it yet
                    vectors[at] = found[known[at][2]]
            is_read[positions] = True
            return vectors[positions].astype(np.float32)

        contents, hashes = [one[3] for one in known], [one[4] for one in known]
        if copies:
            hashes = [None] * len(known)
        leaders = _leaders(contents, hashes, embeddings, progress)
        groups = [
            _members(positions, [known[at][2] for at in positions.tolist()], embeddings, rows.items)
            for positions in _groups(leaders)
            if len(positions) > 1
        ]
    unhashed = 0 if copies else sum(one[4] is None for one in known)
    return Duplicates(tuple(sorted(groups, key=lambda group: group[0].item.item_id)), unhashed)


def collapse(items: Sequence[ItemRow], embeddings: Rows) -> list[list[int]]:
    """Results without near-duplicates: positions of those kept, each with those that it stands for.

    The first of several near-duplicates is kept. `[[0, 3], [1], [2]]` says that result 3 is a
    near-duplicate of result 0.

    Args:
        items: the results, best first.
        embeddings: (n, d) float32 unit rows of the same pictures.
    """
    contents = [item.content_hash for item in items]
    hashes = [item.perceptual_hash for item in items]
    leaders = _leaders(contents, hashes, lambda positions: embeddings[positions])
    return [positions.tolist() for positions in _groups(leaders)]


def _members(
    positions: Positions,
    ids: Sequence[int],
    embeddings: Callable[[Positions], Rows],
    items: Callable[[Sequence[int]], dict[int, ItemRow]],
) -> tuple[Member, ...]:
    found, vectors = items(ids), embeddings(positions)
    first = found[ids[0]]
    cosines = vectors @ vectors[0]
    members = []
    for item_id, cosine in zip(ids, cosines.tolist(), strict=True):
        item = found[item_id]
        is_copy = item.content_hash is not None and item.content_hash == first.content_hash
        members.append(Member(item, 1.0 if is_copy else min(cosine, 1.0), is_copy))
    return members[0], *sorted(members[1:], key=lambda one: -one.similarity)


def _leaders(
    contents: Sequence[bytes | None],
    hashes: Sequence[int | None],
    embeddings: Callable[[Positions], Rows],
    progress: Callable[[int, int], None] | None = None,
) -> Positions:
    """For each picture the position of the one that stands for it: itself, or an earlier one.

    Whoever comes first and has no leader leads all its later near-duplicates that have none.
    """
    first_of: dict[bytes, int] = {}
    originals = np.array(
        [
            at if content is None else first_of.setdefault(content, at)
            for at, content in enumerate(contents)
        ],
        dtype=np.int64,
    )
    leaders = np.arange(len(contents))
    comparable = np.array(
        [at for at, one in enumerate(hashes) if one is not None and originals[at] == at], np.int64
    )
    bits = np.array([hashes[at] for at in comparable.tolist()], dtype=np.int64).view(np.uint64)
    lookup = _Lookup(bits)
    for start in range(0, len(comparable), BLOCK):
        places = np.arange(start, min(start + BLOCK, len(comparable)))
        places = places[leaders[comparable[places]] == comparable[places]]
        for ones, others in lookup.near(places):
            for one, near in _runs(ones, others):
                leader, free = comparable[one], comparable[near]
                free = free[leaders[free] == free]
                if leaders[leader] == leader and len(free):
                    rows = embeddings(np.append(leader, free))
                    leaders[free[rows[1:] @ rows[0] >= MIN_COSINE]] = leader
        if progress:
            progress(min(start + BLOCK, len(comparable)), len(comparable))
    return leaders[originals]


def _groups(leaders: Positions) -> list[Positions]:
    """The positions that share a leader, which comes first, in the order of the leaders."""
    order = np.argsort(leaders, kind="stable")
    return [group for _, group in _runs(leaders[order], order)]


def _runs(keys: Positions, values: Positions) -> Iterator[tuple[int, Positions]]:
    """Each of the keys, which are ascending, with its values."""
    starts = np.flatnonzero(np.diff(keys, prepend=-1)).tolist()
    for start, end in pairwise([*starts, len(keys)]):
        yield int(keys[start]), values[start:end]


class _Lookup:
    """Which hashes differ in few bits, without comparing each with each.

    A hash is cut into bands. If two differ in at most MAX_BITS bits, they differ in at most
    BAND_ERRORS in one band at least (the pigeonhole principle), so all that are near lie in the
    buckets of a band's own value and of the values that differ so little from it. Norouzi et al.
    2012 (Fast Search in Hamming Space with Multi-Index Hashing).
    """

    def __init__(self, hashes: NDArray[np.uint64]) -> None:
        self._hashes = hashes
        self._buckets: list[tuple[Positions, Positions, Positions]] = []
        if len(hashes) <= FEW:
            return
        for band in range(BANDS):
            shifted = hashes >> np.uint64(band * BAND_BITS)
            keys = (shifted & np.uint64((1 << BAND_BITS) - 1)).astype(np.int64)
            sizes = np.bincount(keys, minlength=1 << BAND_BITS)
            order = np.argsort(keys, kind="stable")
            self._buckets.append((keys, order, np.concatenate([[0], np.cumsum(sizes)])))

    def near(self, places: Positions) -> Iterator[tuple[Positions, Positions]]:
        """(ones, others): pairs of one of the places and a later one that are near.

        They come in the order of `ones`, in as many parts as memory needs; none is left out, and
        none comes twice.
        """
        if not len(places):
            return
        if not self._buckets:
            later = np.arange(len(self._hashes))
            yield self._checked(np.repeat(places, len(later)), np.tile(later, len(places)))
            return
        counts = [
            (starts[at + 1] - starts[at]).sum()
            for keys, _, starts in self._buckets
            for at in (keys[places, None] ^ _MASKS,)
        ]
        if sum(counts) > MAX_PAIRS and len(places) > 1:
            half = len(places) // 2
            yield from self.near(places[:half])
            yield from self.near(places[half:])
            return
        parts = [self._in_band(places, *bucket) for bucket in self._buckets]
        ones, others = (np.concatenate(side) for side in zip(*parts, strict=True))
        ones, others = self._checked(ones, others)
        pairs = np.sort(ones * len(self._hashes) + others)
        pairs = pairs[np.diff(pairs, prepend=-1) > 0]  # found in several bands
        yield pairs // len(self._hashes), pairs % len(self._hashes)

    def _in_band(
        self, places: Positions, keys: Positions, order: Positions, starts: Positions
    ) -> tuple[Positions, Positions]:
        """All pairs with those in the buckets of one band, most of them not near at all."""
        wanted = keys[places, None] ^ _MASKS
        begins = starts[wanted].ravel()
        sizes = starts[wanted + 1].ravel() - begins
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        ones = np.repeat(np.repeat(places, len(_MASKS)), sizes)
        return ones, order[np.repeat(begins, sizes) + within]

    def _checked(self, ones: Positions, others: Positions) -> tuple[Positions, Positions]:
        near = (others > ones) & (differing(self._hashes[ones], self._hashes[others]) <= MAX_BITS)
        return ones[near], others[near]


_MASKS = np.array(
    [
        sum(1 << bit for bit in bits)
        for errors in range(BAND_ERRORS + 1)
        for bits in combinations(range(BAND_BITS), errors)
    ],
    dtype=np.int64,
)


def differing(ones: NDArray[np.uint64], others: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """In how many bits each pair of numbers differs."""
    # NumPy counts bits itself from 2.0 on. Here sums of neighbours, of 1, 2, 4 and 8 bits at once.
    bits = ones ^ others
    bits = bits - (bits >> np.uint64(1) & np.uint64(0x5555555555555555))
    twos = np.uint64(0x3333333333333333)
    bits = (bits & twos) + (bits >> np.uint64(2) & twos)
    bits = (bits + (bits >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (bits * np.uint64(0x0101010101010101)) >> np.uint64(56)
