"""Store: one folder with a SQLite catalogue, which is the truth, and FAISS files made from it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from indexes.records import (
    CaptionRow,
    ItemRow,
    ItemWrite,
    Kind,
    KnownFile,
    Match,
    ModelSpec,
    StoreInfo,
)

__all__ = [
    "CaptionRow",
    "ItemRow",
    "ItemWrite",
    "Kind",
    "KnownFile",
    "Match",
    "ModelSpec",
    "Store",
    "StoreInfo",
    "Writer",
]


class Store:
    """One folder of items, captions and embeddings, searched exactly."""

    path: Path
    model: ModelSpec
    generation: int

    @classmethod
    def create(cls, path: Path, model: ModelSpec) -> Store:
        """A new, empty store in the folder `path`; raises StoreExistsError."""
        raise NotImplementedError

    @classmethod
    def open(
        cls, path: Path, model: ModelSpec | None = None, *, read_only: bool | None = None
    ) -> Store:
        """The store at `path`; raises WrongModelError if `model` is given and is another one."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of files."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @contextmanager
    def writer(self) -> Iterator[Writer]:
        """The one writer; raises StoreLockedError."""
        raise NotImplementedError

    def roots(self) -> list[tuple[int, Path]]:
        """Ids and absolute paths of the roots."""
        raise NotImplementedError

    def known_files(self, root_id: int) -> dict[str, KnownFile]:
        """Everything known under a root, by file."""
        raise NotImplementedError

    def find_by_hash(self, hashes: Collection[bytes]) -> dict[bytes, int]:
        """An ok item for each content hash that the store has."""
        raise NotImplementedError

    def search(
        self,
        kind: Kind,
        queries: NDArray[np.float32],
        k: int,
        *,
        among: Collection[int] | None = None,
    ) -> list[Match]:
        """The k best of a kind for each query."""
        raise NotImplementedError

    def items(self, ids: Sequence[int]) -> list[ItemRow]:
        """Items in the order asked; removed ones are absent."""
        raise NotImplementedError

    def item_by_path(self, path: Path) -> ItemRow | None:
        """The item of this file."""
        raise NotImplementedError

    def captions(self, caption_ids: Sequence[int]) -> list[tuple[int, CaptionRow]]:
        """(item id, caption) in the order asked; removed ones are absent."""
        raise NotImplementedError

    def caption_ids(self, item_id: int) -> list[int]:
        """Ids of an item's captions, in their order."""
        raise NotImplementedError

    def embeddings(self, kind: Kind, ids: Sequence[int]) -> NDArray[np.float32]:
        """(n, d) float32 in the order asked; raises InvalidRowsError for an unknown id."""
        raise NotImplementedError

    def failures(self) -> list[ItemRow]:
        """Items that failed, with their reasons."""
        raise NotImplementedError

    def info(self) -> StoreInfo:
        """Counts, model, generation, sizes."""
        raise NotImplementedError

    def verify(self) -> list[str]:
        """Problems found by a full check; empty means clean."""
        raise NotImplementedError

    def rebuild(self) -> None:
        """Make the FAISS files anew from the catalogue."""
        raise NotImplementedError


class Writer:
    """Changes a store; every method is one transaction unless called inside `together`."""

    @contextmanager
    def together(self) -> Iterator[None]:
        """All calls inside are one transaction: `with writer.together(): ...`."""
        raise NotImplementedError

    def add_root(self, path: Path) -> int:
        """Id of the root, made if absent."""
        raise NotImplementedError

    def write(self, root_id: int, items: Sequence[ItemWrite]) -> list[int]:
        """Ids of the items written, all or none."""
        raise NotImplementedError

    def move(self, item_id: int, root_id: int, file: str, size: int, mtime_ns: int) -> None:
        """The item is now at another place; refused if another item is there."""
        raise NotImplementedError

    def set_captions(
        self,
        item_id: int,
        captions: Sequence[CaptionRow],
        embeddings: NDArray[np.float32] | None,
    ) -> None:
        """Replace an item's captions."""
        raise NotImplementedError

    def touch(self, item_id: int, size: int, mtime_ns: int) -> None:
        """Same content, other size or time stamp on disk."""
        raise NotImplementedError

    def remove(self, ids: Collection[int]) -> None:
        """Forget items; unknown ids are ignored."""
        raise NotImplementedError

    def finish(self) -> None:
        """Bring the FAISS files up to date."""
        raise NotImplementedError
