"""Library: a store with the encoder that made it; what users import.

    library = Library.create("photos.lib")
    library.index("~/Pictures")
    for hit in library.search("a dog jumping over a hurdle"):
        print(hit.score, hit.path, hit.caption)

A library is a folder of its own and never lies among the pictures unless it is put there. The
encoder is loaded when first needed: looking at a library, checking it and removing pictures from
it need none.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from indexes.errors import WrongModelError
from indexes.records import ModelSpec
from retriever.errors import UsageError
from retriever.models import DEFAULT_MODEL

if TYPE_CHECKING:
    from PIL import Image

    from indexes.records import StoreInfo
    from indexes.store import Store
    from retriever.encoders import Encoder
    from retriever.ingest import Failure, IndexReport, Progress
    from retriever.search import CaptionHit, Hit, Query, Searcher

DEFAULT_K = 10


class Library:
    """Pictures and captions that can be found by describing them or by showing a picture.

    Made by `Library.create` and `Library.open`; a context manager that closes it. One process
    writes at a time, any number reads.
    """

    def __init__(self, store: Store, encoder: Encoder | None, device: str) -> None:
        """Used by `create` and `open`."""
        self._store = store
        self._encoder = encoder
        self._device = device
        self._guard = threading.Lock()

    @classmethod
    def create(
        cls,
        path: str | Path,
        encoder: str | Encoder = DEFAULT_MODEL,
        *,
        device: str = "auto",
    ) -> Library:
        """A new, empty library in the folder `path`, made if absent.

        Args:
            path: a folder of its own.
            encoder: what `retriever.encoders.load_encoder` takes, or an encoder. The library
                belongs to it from then on: embeddings of two encoders cannot be compared.
            device: where a named encoder runs: "auto", "cpu", "cuda" or "mps".

        Raises:
            StoreExistsError: the folder is a library already, or holds other files.
            EncoderError: there is no such model, or it cannot be loaded.
        """
        from indexes.store import Store

        loaded, model = _load(encoder, device)
        return cls(Store.create(Path(path).expanduser(), model), loaded, device)

    @classmethod
    def open(
        cls,
        path: str | Path,
        encoder: str | Encoder | None = None,
        *,
        device: str = "auto",
    ) -> Library:
        """The library at `path`.

        Args:
            path: its folder.
            encoder: needed only if the library was made by an encoder that its name does not
                bring back, such as one of yours or a folder that was moved since.
            device: where a named encoder runs: "auto", "cpu", "cuda" or "mps".

        Raises:
            StoreNotFoundError, StoreDamagedError, StoreTooNewError: there is no library to open.
            WrongModelError: `encoder` is not the one that made the library. Without `encoder` the
                same is raised when it is first needed, if its files are others now.
        """
        from indexes.store import Store

        loaded, model = _load(encoder, device) if encoder is not None else (None, None)
        return cls(Store.open(Path(path).expanduser(), model), loaded, device)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the library's files."""
        self._store.close()

    @property
    def path(self) -> Path:
        """The library's folder, absolute."""
        return self._store.path

    @property
    def encoder(self) -> Encoder:
        """The encoder of this library, loaded when first asked for.

        Raises:
            EncoderError: it cannot be found or loaded.
            WrongModelError: the model of that name is not the one that made the library.
        """
        with self._guard:
            if self._encoder is None:
                made_by = self._store.model
                loaded, model = _load(made_by.name, self._device)
                if model.fingerprint != made_by.fingerprint:
                    raise WrongModelError(
                        f"{self.path} was made by another version of {made_by.name}"
                        f" ({made_by.fingerprint[:12]}, now {model.fingerprint[:12]}): open it with"
                        " that version, or make a new library and index the pictures again"
                    )
                self._encoder = loaded
            return self._encoder

    @property
    def searcher(self) -> Searcher:
        """Answers queries of any number of texts and pictures: `searcher.images(Query(…))`."""
        from retriever.search import Searcher

        return Searcher(self._store, lambda: self.encoder)

    def index(
        self,
        folder: str | Path,
        *,
        captions: str | Path | None = None,
        progress: Progress | None = None,
    ) -> IndexReport:
        """Brings the library up to date with a folder; see `retriever.ingest.index_folder`.

        Args:
            folder: searched recursively; a picture that cannot be read is named in the report
                and harms no other.
            captions: a captions file, read instead of those in the folder.
            progress: called with (done, total) of the pictures that need work.

        Raises:
            UsageError: there is no such folder.
            RetrieverError: the folder is empty although pictures in it are known; nothing is
                removed.
            StoreLockedError: another process is writing.
        """
        from retriever.ingest import index_folder

        return index_folder(
            self._store,
            lambda: self.encoder,
            Path(folder),
            captions=Path(captions).expanduser() if captions is not None else None,
            progress=progress,
        )

    def search(
        self,
        text: str | None = None,
        *,
        image: str | Path | Image.Image | None = None,
        text_weight: float = 1.0,
        image_weight: float = 1.0,
        k: int = DEFAULT_K,
    ) -> list[Hit]:
        """The k pictures nearest to a description, to a picture, or to both together.

        A query picture that is in the library comes first itself, with a score near 1.

        Args:
            text: what the pictures should show.
            image: a file, or a picture in memory.
            text_weight: how much the text counts if both are given; negative pushes away.
            image_weight: the same for the picture.
            k: answers wanted, at least 1; fewer come only if the library has fewer.

        Raises:
            UsageError: neither text nor picture, k < 1, or both cancel each other out.
            PictureError: `image` cannot be read.
        """
        return self.searcher.images(_query(text, image, text_weight, image_weight), k)

    def captions_for(self, image: str | Path | Image.Image, *, k: int = 5) -> list[CaptionHit]:
        """The k captions in the library that fit a picture best, each text once.

        Raises:
            UsageError: k < 1.
            PictureError: `image` cannot be read.
        """
        return self.searcher.captions(_query(None, image, 1.0, 1.0), k)

    def remove(self, paths: str | Path | Iterable[str | Path]) -> int:
        """Forgets pictures, or all in a folder, and says how many; the files stay as they are.

        Indexing their folder again takes them in again while the files are there.

        Raises:
            UsageError: the library knows nothing at one of the paths; nothing is removed.
            StoreLockedError: another process is writing.
        """
        wanted = [paths] if isinstance(paths, str | Path) else list(paths)
        ids: set[int] = set()
        with self._store.writer() as writer:
            item_at = {
                str(root / file): known.item_id
                for root_id, root in self._store.roots()
                for file, known in self._store.known_files(root_id).items()
            }
            for path in wanted:
                here = _ids_at(Path(path).expanduser(), item_at)
                if not here:
                    raise UsageError(
                        f"{path} is neither a picture in the library nor a folder of one"
                    )
                ids |= here
            writer.remove(ids)
            writer.finish()
        return len(ids)

    def info(self) -> StoreInfo:
        """Counts of items, captions and failures; the model; generation, index and size."""
        return self._store.info()

    def failures(self) -> list[Failure]:
        """Pictures that could not be read when they were last looked at, and why."""
        from retriever.ingest import Failure

        return [Failure(item.path, item.reason or "") for item in self._store.failures()]

    def verify(self) -> list[str]:
        """What a full check of the library's files finds wrong, one sentence each."""
        return self._store.verify()

    def rebuild(self) -> None:
        """Makes the FAISS files anew from the catalogue; no picture is read again."""
        self._store.rebuild()


def _load(encoder: str | Encoder, device: str) -> tuple[Encoder, ModelSpec]:
    """An encoder, and the name under which a library finds it again."""
    if not isinstance(encoder, str):
        return encoder, ModelSpec(encoder.name, encoder.dim, encoder.fingerprint)
    from retriever.encoders import load_encoder

    loaded = load_encoder(encoder, device=device)
    folder = Path(encoder).expanduser()
    # A model in a folder must be found from whichever directory the library is opened in.
    is_local = encoder != DEFAULT_MODEL and folder.exists()
    name = str(folder.resolve()) if is_local else encoder
    return loaded, ModelSpec(name, loaded.dim, loaded.fingerprint)


def _query(
    text: str | None,
    image: str | Path | Image.Image | None,
    text_weight: float,
    image_weight: float,
) -> Query:
    from retriever.search import Query

    if isinstance(image, str):
        image = Path(image)
    if isinstance(image, Path):
        image = image.expanduser()
    return Query(
        texts=((text, text_weight),) if text is not None else (),
        images=((image, image_weight),) if image is not None else (),
    )


def _ids_at(path: Path, item_at: Mapping[str, int]) -> set[int]:
    """Items at a path or in the folder of that name, by path with and without links followed."""
    absolute = Path(os.path.abspath(path))  # noqa: PTH100 (`resolve` would follow links)
    for place in (absolute, absolute.parent.resolve() / absolute.name, absolute.resolve()):
        if str(place) in item_at:
            return {item_at[str(place)]}
        prefix = os.path.join(place, "")  # noqa: PTH118 (a Path drops the separator at its end)
        if inside := {id_ for file, id_ in item_at.items() if file.startswith(prefix)}:
            return inside
    return set()
