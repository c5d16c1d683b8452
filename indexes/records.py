"""Rows as they travel in and out of a store: plain frozen dataclasses, no database types."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

Kind = Literal["image", "caption"]
KINDS: tuple[Kind, ...] = ("image", "caption")
Status = Literal["ok", "failed"]
Source = Literal["text", "image"]  # of a query
SOURCES: tuple[Source, ...] = ("text", "image")

DEFAULT_OVERLAP = 0.99  # see SearchPolicy
UNIT_TOLERANCE = 1e-3  # of the length of embeddings and queries handed to a store
STORED_TOLERANCE = 2e-3  # the same, after rounding to float16

FACTS = 1  # what is read of a picture's file beside its embedding; see `ItemWrite.facts`
Extras = tuple[tuple[str, str | float], ...]  # as `in_order` has them; a key twice is a list


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The encoder that made a store's embeddings; equal fingerprints mean comparable embeddings."""

    name: str
    dim: int
    fingerprint: str


@dataclass(frozen=True, slots=True, eq=False)
class Derivation:
    """How the embeddings of one model follow from those of another, `base`.

    head: the bytes of an `indexes.heads.Head`. facts: what was measured of it, as JSON can hold it.
    """

    base: ModelSpec
    head: bytes
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model whose embeddings a store holds, and what it has not embedded yet.

    `pending` counts the pictures that can be read and that this model lacks, in whole or in a
    caption: a search by it does not see all of them. `derived` is set if its embeddings follow
    from those of another model.
    """

    model_id: int  # ascends in the order in which they were added
    spec: ModelSpec
    is_default: bool
    pictures: int
    captions: int
    pending: int
    derived: Derivation | None = None


@dataclass(frozen=True, slots=True)
class RootInfo:
    """A folder that was indexed: absolute path, pictures, failed ones, end of the last full run."""

    root_id: int
    path: Path
    items: int
    failures: int
    indexed_at: datetime | None


@dataclass(frozen=True, slots=True)
class CaptionRow:
    """A caption and where it came from, such as "sidecar" or "exif"."""

    text: str
    source: str


def in_order(extras: Iterable[tuple[str, str | float]]) -> Extras:
    """Further columns as every row has them: by key, of one key the numbers first."""
    return tuple(sorted(extras, key=lambda pair: (pair[0], isinstance(pair[1], str), pair[1])))


@dataclass(frozen=True, slots=True)
class KnownFile:
    """What the catalogue remembers of a file, enough to see whether it changed.

    `picture_embedded` and `captions_embedded` say whether the store's model has embedded the
    picture and all of its captions; another model of the same library may have been ahead.
    `facts` below FACTS means that an older version wrote it: its file knows more than the store.
    """

    item_id: int
    file: str
    size: int
    mtime_ns: int
    content_hash: bytes | None
    status: Status
    captions: tuple[CaptionRow, ...]
    picture_embedded: bool = True
    captions_embedded: bool = True
    extras: Extras = ()
    facts: int = FACTS


@dataclass(frozen=True, slots=True, eq=False)
class ItemWrite:
    """One new or changed item, to be written whole.

    `file` is a posix path relative to its root (surrogateescape for undecodable names). `taken`
    is the camera's wall clock; a time zone is dropped. With `failure` the item is kept as failed
    with that reason, its captions without embeddings. Otherwise `image_embedding` is (d,) float32
    of unit length, or None for content that the store has already: the embedding of an item with
    the same `content_hash` is copied. `caption_embeddings` is (n_captions, d), None if there are
    no captions. `item_id` None means the item at this root and file, made if absent.

    `camera`, `latitude` (-90 to 90), `longitude` (-180 to 180) and `perceptual_hash` (64 bits as a
    signed number) are facts of the file, as `width` and `taken` are; `facts` is FACTS if whoever
    writes looked for them all. `extras` are further columns of a captions file.
    """

    file: str
    size: int
    mtime_ns: int
    content_hash: bytes | None
    width: int
    height: int
    taken: datetime | None = None
    captions: tuple[CaptionRow, ...] = ()
    image_embedding: NDArray[np.float32] | None = None
    caption_embeddings: NDArray[np.float32] | None = None
    failure: str | None = None
    item_id: int | None = None
    camera: str | None = None
    latitude: float | None = None
    longitude: float | None = None
    perceptual_hash: int | None = None
    extras: Extras = ()
    facts: int = FACTS


@dataclass(frozen=True, slots=True)
class ItemRow:
    """An item as the catalogue has it; `path` is absolute, `reason` is set when it failed."""

    item_id: int
    path: Path
    root: Path
    file: str
    size: int
    mtime_ns: int
    content_hash: bytes | None
    width: int
    height: int
    taken: datetime | None
    status: Status
    reason: str | None
    captions: tuple[CaptionRow, ...]
    camera: str | None = None
    latitude: float | None = None
    longitude: float | None = None
    perceptual_hash: int | None = None
    extras: Extras = ()
    facts: int = FACTS

    @property
    def columns(self) -> dict[str, list[str | float]]:
        """The extras by name, of which some have several values."""
        columns: dict[str, list[str | float]] = {}
        for name, value in self.extras:
            columns.setdefault(name, []).append(value)
        return columns


@dataclass(frozen=True, slots=True, eq=False)
class Owners:
    """Whose captions are whose: ids of captions (n,) int64, ascending, and of their items (n,)."""

    captions: NDArray[np.int64]
    items: NDArray[np.int64]

    def of(self, captions: NDArray[np.int64]) -> NDArray[np.int64]:
        """(m,) the item of each of some captions; -1 for one that is not here."""
        found = np.full(len(captions), -1, dtype=np.int64)
        if len(self.captions):
            places = np.minimum(np.searchsorted(self.captions, captions), len(self.captions) - 1)
            is_here = self.captions[places] == captions
            found[is_here] = self.items[places[is_here]]
        return found

    def among(self, items: NDArray[np.int64]) -> Owners:
        """The captions of these items."""
        is_asked = np.isin(self.items, items)
        return Owners(self.captions[is_asked], self.items[is_asked])


@dataclass(frozen=True, slots=True, eq=False)
class Match:
    """The best candidates of one query, best first; equal scores are ordered by id.

    ids: (k',) int64, k' = min(k, candidates); never a placeholder. scores: (k',) float32,
    cosines, up to the float16 rounding of stored vectors: equal ones may score 1.0003.
    """

    ids: NDArray[np.int64]
    scores: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Term:
    """A word of a query as the words of a library have it.

    `count` items have it. `corrected_from` is what was typed, where no item had that. `left_out`:
    it stands in so many items that the rarer words of the query were taken alone.
    """

    text: str
    count: int
    corrected_from: str | None = None
    left_out: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class WordMatch:
    """The items whose words answer a query, best first; equal scores are ordered by id.

    ids: (k',) int64. scores: (k',) float32 in [0, 1], see `indexes.words`.
    """

    ids: NDArray[np.int64]
    scores: NDArray[np.float32]
    terms: tuple[Term, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """What was measured of a library for one model, as it was after change number `change`.

    rows: pictures that were embedded then. facts: whatever JSON can hold, by who measured it.
    means: (2, d) float32, of the embeddings of pictures and of captions, not of unit length; zeros
    where there are none.
    """

    change: int
    rows: int
    facts: dict[str, Any]
    means: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class FileStamp:
    """What tells that a file on disk is the one that was written; `checksum` is XXH3-128, hex."""

    size_bytes: int
    checksum: str


@dataclass(frozen=True, slots=True)
class IndexFile:
    """A FAISS file as the catalogue records it.

    It holds `rows` vectors, all of its kind as they were after change number `change`; later
    changes are searched beside it.
    """

    name: str
    generation: int
    change: int
    rows: int
    stamp: FileStamp


@dataclass(frozen=True, slots=True)
class SearchPolicy:
    """How a store may search: always exactly, or approximately where that pays and proves itself.

    memory_bytes: what the approximate indexes of one kind may take; None: what suits their size.
    overlap: least share of the exact 10 best that must be found, on average over real queries.
    """

    exact: bool = False
    memory_bytes: int | None = None
    overlap: float = DEFAULT_OVERLAP


@dataclass(frozen=True, slots=True)
class Direction:
    """How an approximate index is searched from one side, and what was measured of that.

    k: results for which it was measured. probes, candidates: see `ApproximateIndex.candidates`.
    overlap: share of the exact k best found, mean over `queries`. p50_ms, exact_p50_ms: median time
    of one query, one after the other, on the machine that built the index.
    """

    k: int
    probes: int
    candidates: int
    overlap: float
    p50_ms: float
    exact_p50_ms: float
    queries: int


@dataclass(frozen=True, slots=True)
class ApproximateFile:
    """The file of an approximate index as the catalogue records it, with its measurements.

    `directions` has "text" and "image", by where the query comes from, each with ascending k.
    `policy` is the one that it was built under.
    """

    file: IndexFile
    policy: SearchPolicy
    kind: str  # such as "PCA112,IVF4096,PQ112x4fs"
    memory_bytes: int
    build_seconds: float
    directions: dict[Source, list[Direction]]


class ApproximateInfo(TypedDict):
    """An approximate index in `KindInfo`; `beside` counts rows that are searched exactly."""

    kind: str
    rows: int
    beside: int
    memory_bytes: int
    build_seconds: float
    directions: dict[str, list[dict[str, int | float]]]


class KindInfo(TypedDict):
    """How one kind of embedding is searched: rows in the FAISS file, beside it, and struck out.

    `reason` says in a sentence why it is searched exactly or by `approximate`.
    """

    rows: int
    indexed: int
    tail: int
    removed: int
    approximate: ApproximateInfo | None
    reason: str


class StoreInfo(TypedDict):
    """What `Store.info` tells; `index` has the kinds "image" and "caption".

    `model` is the one that the store was opened with, `models` names all, the default first; each
    with the name of the one that it is derived from as `base` (see `Derivation`), and `facts`.
    """

    items: int
    captions: int
    failures: int
    model: dict[str, str | int]
    models: list[dict[str, Any]]
    generation: int
    index: dict[str, KindInfo]
    size_bytes: int


def unit_rows(vectors: Sequence[NDArray[Any]], dim: int) -> NDArray[np.float32]:
    """(n, d) float32 unit rows of stored vectors, which are rounded to float16; n may be 0."""
    rows = np.zeros((len(vectors), dim), dtype=np.float32)
    if len(vectors):
        rows[:] = np.stack(vectors)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows
