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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypedDict

from indexes.errors import (
    StoreDamagedError,
    StoreLockedError,
    StoreReadOnlyError,
    WrongModelError,
)
from indexes.files import absolute
from indexes.records import DEFAULT_OVERLAP, ModelSpec, SearchPolicy, StoreInfo
from retriever.errors import EncoderError, MissingExtraError, UsageError
from retriever.models import DEFAULT_MODEL

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    from indexes.filters import Condition
    from indexes.records import Fit, ItemRow, Kind, RootInfo, StoredModel
    from indexes.store import Store
    from retriever.asking import Query
    from retriever.channels import Mode
    from retriever.duplicates import Duplicates
    from retriever.encoders import Encoder
    from retriever.exchange import ExportReport, ImportReport
    from retriever.explain import Explanation
    from retriever.ingest import Failure, IndexReport, Progress
    from retriever.search import Answer, CaptionHit, Hit, Searcher
    from retriever.tuning import TuneConfig, TuneReport

DEFAULT_K = 10
SHORTEST_FINGERPRINT = 6  # digits that may stand for a model


class AnswersInfo(TypedDict):
    """How good a library's answers to texts are, by captions of its own that were held out.

    mode: what a text is searched by if nothing else is said. weights: of the channels in mode
    "hybrid". queries: captions that `measured`, recalls by mode in percent with 95 % intervals,
    comes from; 0 if there are too few. cut_off: for each mode how well right answers and those to
    unrelated texts are told apart: `auc`, and `error` of the confidences.
    """

    mode: str
    weights: dict[str, float]
    queries: int
    measured: dict[str, dict[str, Any]]
    cut_off: dict[str, dict[str, float]]


class LibraryInfo(StoreInfo):
    """What `Library.info` tells."""

    answers: AnswersInfo | None


class Library:
    """Pictures and captions that can be found by describing them or by showing a picture.

    Made by `Library.create` and `Library.open`; a context manager that closes it. One process
    writes at a time, any number reads.
    """

    def __init__(
        self, store: Store, encoder: Encoder | None, device: str, threads: int | None
    ) -> None:
        """Used by `create` and `open`; `encoder` is of the model that reads pictures and texts."""
        self._store = store
        self._base = encoder
        self._tuned: Encoder | None = None
        self._device = device
        self._threads = threads
        self._guard = threading.Lock()

    @classmethod
    def create(
        cls,
        path: str | Path,
        encoder: str | Encoder = DEFAULT_MODEL,
        *,
        device: str = "auto",
        threads: int | None = None,
    ) -> Library:
        """A new, empty library in the folder `path`, made if absent.

        Args:
            path: a folder of its own.
            encoder: what `retriever.encoders.load_encoder` takes, or an encoder. It becomes the
                library's default model; others may be added by `open`.
            device: where a named encoder runs: "auto", "cpu", "cuda" or "mps".
            threads: CPU threads of a named encoder; None leaves it to the engine.

        Raises:
            StoreExistsError: the folder is a library already, or holds other files.
            EncoderError: there is no such model, or it cannot be loaded.
        """
        from indexes.store import Store

        loaded, model = _load(encoder, device, threads)
        return cls(Store.create(Path(path).expanduser(), model), loaded, device, threads)

    @classmethod
    def open(
        cls,
        path: str | Path,
        encoder: str | Encoder | None = None,
        *,
        add_model: bool = False,
        device: str = "auto",
        threads: int | None = None,
    ) -> Library:
        """The library at `path`, seen by one of its models.

        Args:
            path: its folder.
            encoder: the model; None is the library's default one. An encoder, not a name, is
                needed only if the name would not bring it back, such as one of yours; it is taken
                for the default model if that is tuned from it.
            add_model: take up a model that the library does not have, beside its others; `index`
                then embeds the pictures with it.
            device: where a named encoder runs: "auto", "cpu", "cuda" or "mps".
            threads: CPU threads of a named encoder; None leaves it to the engine.

        Raises:
            StoreNotFoundError, StoreDamagedError, StoreTooNewError: there is no library to open.
            WrongModelError: the library does not have this model. For a model given by its name
                the same is raised when it is first needed, if its files are others now.
        """
        from indexes.store import Store

        path = Path(path).expanduser()
        if isinstance(encoder, str):
            with Store.open(path) as store:
                named = [one for one in store.models() if one.spec.name == _stored(encoder)]
            latest = max(named, key=lambda one: one.model_id, default=None)
            # Its encoder is loaded when it is needed; one that may be added must be the very same.
            if latest is not None and (latest.derived or not add_model):
                return cls(Store.open(path, latest.spec), None, device, threads)
        loaded, model = _load(encoder, device, threads) if encoder is not None else (None, None)
        if loaded is not None and not isinstance(encoder, str):
            with Store.open(path) as store:
                derivation = store.derivation
                if derivation is not None and derivation.base.fingerprint == loaded.fingerprint:
                    model = store.model
        return cls(Store.open(path, model, add_model=add_model), loaded, device, threads)

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
    def model(self) -> ModelSpec:
        """Name, dimension and fingerprint of the model that this library was opened with."""
        return self._store.model

    @property
    def encoder(self) -> Encoder:
        """The encoder of this library, loaded when first asked for.

        Raises:
            EncoderError: it cannot be found or loaded.
            WrongModelError: the model of that name is not the one that made the library.
            StoreDamagedError: what tuned the library is damaged.
        """
        derivation = self._store.derivation
        if derivation is None:
            return self._reader(self._store.model)
        base = self._reader(derivation.base)
        with self._guard:
            if self._tuned is None:
                from indexes.heads import Head
                from retriever.tuned import TunedEncoder

                try:
                    head = Head.unpack(derivation.head)
                except ValueError as error:
                    raise StoreDamagedError(
                        f"{self.path}: what tuned it is damaged ({error}): `retriever tune --undo`"
                        " goes back to what was there before"
                    ) from error
                self._tuned = TunedEncoder(base, head, self._store.model)
            return self._tuned

    def _reader(self, made_by: ModelSpec) -> Encoder:
        """The encoder that reads pictures and texts: the library's, or what that is tuned from."""
        with self._guard:
            if self._base is None:
                loaded, model = _load(made_by.name, self._device, self._threads)
                if model.fingerprint != made_by.fingerprint:
                    raise WrongModelError(
                        f"{self.path} was made by another version of {made_by.name}"
                        f" ({made_by.fingerprint[:12]}, now {model.fingerprint[:12]}): use that"
                        f" version; or `retriever index --model {made_by.name}` embeds its"
                        f" pictures with this one as well, and `retriever models --use"
                        f" {made_by.name}` changes over"
                    )
                self._base = loaded
            return self._base

    def share(self) -> None:
        """Loads the encoder; texts that several threads ask at once then go through it together.

        For a server: a single thread gains nothing. Raises as `encoder` does.
        """
        from retriever.batching import BatchingEncoder

        base = self._reader(self.base_model)
        with self._guard:
            if not isinstance(base, BatchingEncoder):
                if stay := getattr(base, "stay", None):
                    stay()
                self._base, self._tuned = BatchingEncoder(base), None

    @property
    def is_default(self) -> bool:
        """Whether the model that this library was opened with is still its default one."""
        with self._store.snapshot() as rows:
            found = rows.model()
        return found is not None and found[1] == self.model

    def reopened(self) -> Library:
        """The same library by its default model of now; an encoder that still serves is kept.

        Raises as `open` and `share`.
        """
        fresh = Library.open(self.path, device=self._device, threads=self._threads)
        if self._base is not None and self._base.fingerprint == fresh.base_model.fingerprint:
            fresh._base = self._base
        fresh.share()
        return fresh

    @property
    def base_model(self) -> ModelSpec:
        """The model that reads pictures and texts: `model`, or what that is tuned from."""
        derivation = self._store.derivation
        return derivation.base if derivation else self.model

    @contextmanager
    def _untuned(self) -> Iterator[Store]:
        """The store as the model sees it that reads pictures and texts.

        Embeddings come and go by it; those of a tuned model are made of them at once.
        """
        derivation = self._store.derivation
        if derivation is None:
            yield self._store
            return
        from indexes.store import Store

        with Store.open(self.path, derivation.base) as store:
            yield store

    @property
    def searcher(self) -> Searcher:
        """Answers queries of any number of texts and pictures: `searcher.images(Query(…))`."""
        from retriever.search import Searcher

        return Searcher(self._store, lambda: self.encoder)

    def index(
        self,
        *folders: str | Path,
        captions: str | Path | None = None,
        prune: bool = False,
        progress: Progress | None = None,
        optimizing: Progress | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> IndexReport:
        """Brings the library up to date with its folders; see `retriever.ingest.index_folders`.

        A library that has grown large then gets an approximate index, or another one; see
        `optimize`. One of which a fifth changed is measured anew by its captions: see
        `retriever.fitting`.

        Args:
            folders: searched recursively; a picture that cannot be read is named in the report
                and harms no other. None given: all that were indexed before. One of several that
                is away, as when its drive is not mounted, is named in the report's `problems`.
            captions: a captions file, read instead of those in the folders.
            prune: forget the pictures of a folder that is away or empty.
            progress: called with (done, total) of the pictures of a folder that need work.
            optimizing: called with (done, total) vectors while an approximate index is built.
            stop: asked before each batch; once it is true the rest is left for another run.

        Raises:
            UsageError: there is no such folder, or no folder was indexed before.
            FolderGoneError: the one folder named is away or empty although pictures in it are
                known; nothing is removed.
            StoreLockedError: another process is writing.
        """
        from retriever.ingest import index_folders

        places = [Path(folder) for folder in folders] or [path for _, path in self._store.roots()]
        if not places:
            raise UsageError(f"{self.path} has no folders yet: name one to index")
        with self._untuned() as store:
            report = index_folders(
                store,
                lambda: self._reader(store.model),
                places,
                captions=Path(captions).expanduser() if captions is not None else None,
                progress=progress,
                prune=prune,
                stop=stop,
            )
        if report.interrupted:
            return report
        try:
            with self._store.writer() as writer:
                writer.optimize(self._phrases, progress=optimizing, stop=stop)
            self._fit(stop)
        except (StoreLockedError, StoreReadOnlyError, EncoderError, MissingExtraError) as error:
            # What was indexed is: searches go on as before, only slower.
            return replace(report, problems=(*report.problems, str(error)))
        return report

    def optimize(
        self,
        *,
        exact: bool = False,
        memory_bytes: int | None = None,
        overlap: float = DEFAULT_OVERLAP,
        progress: Progress | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> list[Kind]:
        """Says how the library may be searched, and builds anew the approximate index it takes.

        That index is of the model that the library was opened with; what is said holds for all.

        By itself a library is searched exactly while that takes milliseconds. A larger one gets an
        approximate index, which is tuned with the library's own captions and pictures and is used
        only for what it was measured to answer well and sooner; `info` shows the measurements.

        It is measured anew, too, what captions, words and pictures are worth to a text query, and
        what scores are worth (see `retriever.fitting`).

        Args:
            exact: search exactly at any size.
            memory_bytes: what the index of pictures, and that of captions, may take.
            overlap: least share, on average, of the exact 10 best that must be found.
            progress: called with (done, total) vectors.
            stop: asked every few seconds; once it says yes, the terms stay as they were.

        Returns:
            The kinds of which an index was built, "image" and "caption".

        Raises:
            StoreLockedError: another process is writing.
            StoreReadOnlyError: the index cannot be written; searches go on as before.
            EncoderError, MissingExtraError: a library without captions is tuned with texts, for
                which its model cannot be had.
        """
        if not 0 < overlap <= 1:
            raise UsageError(f"an overlap is a share above 0 and up to 1, not {overlap}")
        policy = SearchPolicy(exact, memory_bytes, overlap)
        with self._store.writer() as writer:
            writer.finish()
            built = writer.optimize(
                self._phrases, policy=policy, anew=True, progress=progress, stop=stop
            )
        self._fit(stop, anew=True)
        return built

    def _fit(self, stop: Callable[[], bool] | None, *, anew: bool = False) -> None:
        """Measure what channels and scores are worth, if that is due or asked for."""
        from retriever import fitting

        if not (anew or fitting.is_due(self._store)) or (stop is not None and stop()):
            return
        found = fitting.fit(self._store, lambda: self.encoder, stop=stop)
        if found is not None:
            with self._store.writer() as writer:
                writer.record_fit(found)

    def tune(
        self,
        config: TuneConfig | None = None,
        *,
        dry_run: bool = False,
        progress: Progress | None = None,
        adopting: Progress | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> TuneReport | None:
        """Fits the space to the library's own captions, if that is measured to help.

        Two small maps are trained over the stored embeddings, and measured with captions held out
        (see `retriever.tuning`); then a correction for hubs is. If either finds more than before,
        beyond what chance explains, the library is searched in the new space from now on, which has
        more dimensions if it is corrected; otherwise nothing is changed. No picture is opened.
        What was tuned before is started anew.

        Args:
            config: the settings; None: as they are.
            dry_run: only measure.
            progress: called with (done, total) epochs of training.
            adopting: called with (done, total) embeddings that are carried over.
            stop: asked between steps; once it says yes, all stays as it was, and None comes back.

        Raises:
            MissingExtraError: torch is not installed.
            EncoderError: the model cannot be had.
            StoreLockedError, StoreReadOnlyError: the library cannot be written.
        """
        from indexes.heads import fingerprint
        from retriever.tuning import DEFAULTS, TuneReport, tune

        with self._untuned() as store:
            base = store.model
            found = tune(
                store,
                lambda: self._reader(base),
                config or DEFAULTS,
                progress=progress,
                stop=stop,
            )
            if found is None:
                return None
            if found.head is None or not found.is_better or dry_run:
                return TuneReport(False, found.is_better, found.reason, base.name, found.record)
            packed = found.head.pack()
            derived = fingerprint(base.fingerprint, packed)
            model = ModelSpec(f"{base.name}+tuned", found.head.made, derived)
            with store.writer() as writer:
                facts = {"reason": found.reason} | found.record
                if not writer.adopt(model, packed, facts, progress=adopting, stop=stop):
                    return None
                writer.finish()
        self._reopen()
        self._settle(stop)
        return TuneReport(True, True, found.reason, base.name, found.record)

    def untune(self) -> ModelSpec:
        """Goes back to the space that the library was tuned from, and forgets the other.

        Answers are those of before. Raises UsageError if the library is not tuned.
        """
        with self._untuned() as store:
            with store.writer() as writer:
                if not writer.abandon():
                    raise UsageError(f"{self.path} is not tuned: there is nothing to go back from")
                writer.finish()
            base = store.model
        self._reopen()
        return base

    def _reopen(self) -> None:
        """See the library by what is its default model now."""
        from indexes.store import Store

        with self._guard:
            self._store.close()
            self._store, self._tuned = Store.open(self.path), None

    def _settle(self, stop: Callable[[], bool] | None) -> None:
        """Have an approximate index where that pays, and measure what scores are worth."""
        try:
            with self._store.writer() as writer:
                writer.optimize(self._phrases, stop=stop)
            self._fit(stop, anew=True)
        except (StoreLockedError, EncoderError, MissingExtraError):
            pass  # the next run of `index` does it

    def _phrases(self) -> NDArray[np.float32]:
        from retriever.phrases import phrases

        return self.encoder.encode_texts(phrases())

    def search(
        self,
        text: str | Query | None = None,
        *,
        image: str | Path | Image.Image | None = None,
        text_weight: float = 1.0,
        image_weight: float = 1.0,
        without: str | Path | Sequence[str | Path] = (),
        where: str | Condition | None = None,
        mode: Mode | None = None,
        k: int = DEFAULT_K,
        exact: bool = False,
        all: bool = False,
        min_confidence: float | None = None,
    ) -> Answer:
        """The k pictures nearest to a description, to a picture, or to both together.

        A query picture that is in the library comes first itself, with a score near 1.

        Args:
            text: what the pictures should show; it may have parts, as `retriever.asking` reads
                them, or be such a query. What stands in quotation marks must be among a picture's
                words; those that have a name in it, like IMG_2041, come first.
            image: a file, or a picture in memory.
            text_weight: how much the text counts if both are given; negative pushes away.
            image_weight: the same for the picture.
            without: what the pictures must not show: texts, and picture files as paths.
            where: which pictures may be answers, as `retriever.where` reads it.
            mode: found by "image", "caption", "words" or all of them, "hybrid"; None is what was
                measured to be best for texts in this library. See `retriever.channels`.
            k: answers wanted, at least 1; fewer come only if there are fewer.
            exact: look at every picture, though the library has an approximate index.
            all: show near-duplicates of other answers too.
            min_confidence: leave out what is less surely an answer, from 0 to 1; nothing is where
                the library was not measured (see `optimize`).

        Returns:
            The hits, in a sequence that tells the mode as well, and whether the best is a match.

        Raises:
            UsageError: neither text nor picture, k < 1, both cancel each other out, or `where`
                makes no sense.
            PictureError: `image` cannot be read.
        """
        return self.searcher.images(
            _query(text, image, text_weight, image_weight, without),
            k,
            mode=mode,
            where=self._condition(where),
            exact=exact,
            all=all,
            min_confidence=min_confidence,
        )

    def explain(self, hits: Sequence[Hit], query: Query, mode: Mode) -> list[Explanation]:
        """Why each of these hits answers a query, in their order; see `retriever.explain`.

        Args:
            hits: what `search` found, or some of it.
            query: as it was searched for.
            mode: what they were found by, as the answer tells.

        Raises as `search` does for the query.
        """
        from retriever.explain import explain

        searcher = self.searcher
        return explain(hits, query, mode, searcher.channels, searcher.calibration())

    def captions_for(
        self,
        image: str | Path | Image.Image,
        *,
        where: str | Condition | None = None,
        k: int = 5,
        exact: bool = False,
    ) -> list[CaptionHit]:
        """The k captions in the library that fit a picture best, each text once.

        With `where` they are those of pictures that fulfil it. With `exact` every caption is looked
        at, though the library has an approximate index.

        Raises:
            UsageError: k < 1, or `where` makes no sense.
            PictureError: `image` cannot be read.
        """
        return self.searcher.captions(
            _query(image=image), k, where=self._condition(where), exact=exact
        )

    def _condition(self, where: str | Condition | None) -> Condition | None:
        if not isinstance(where, str):
            return where
        from retriever.where import parse

        with self._store.snapshot() as rows:
            return parse(where, rows.extra_keys())

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

    def info(self) -> LibraryInfo:
        """Counts of items, captions and failures; the model; generation, index and size; answers.

        `answers` is what was measured of these (see `retriever.fitting`); None: nothing was yet.
        """
        with self._store.snapshot() as rows:
            fit = rows.fit()
        return {**self._store.info(), "answers": _measured(fit) if fit else None}

    def item(self, item_id: int) -> ItemRow | None:
        """What is known of a picture that could be read; None if there is no such one."""
        found = self._store.items([item_id])
        return found[0] if found and found[0].status == "ok" else None

    def counts(self) -> dict[str, int]:
        """Numbers of items (failed ones included), captions and failures."""
        with self._store.snapshot() as rows:
            return rows.counts()

    def nearest_caption(self, query: Query, item_id: int) -> str | None:
        """The caption of a picture that is nearest to a query; None if it has none.

        Raises as `search` does for the query.
        """
        row = self.searcher.channels(query).row
        assert row is not None, "every query has an embedding"
        found = self._store.nearest_captions([item_id], row)
        return found[item_id].text if item_id in found else None

    def values(self, field: str, *, most: int = 20) -> list[tuple[str, int]]:
        """The commonest texts of a field and the number of pictures that have each.

        For programs that help to write a filter.

        Args:
            field: "camera", "folder", "root" or a further column of the captions files.
            most: so many at most.
        """
        with self._store.snapshot() as rows:
            return rows.values(field, most)

    def browse(
        self, where: str | Condition | None = None, *, k: int = DEFAULT_K, offset: int = 0
    ) -> tuple[int, list[ItemRow]]:
        """How many pictures fulfil a filter, and k of them from `offset` on, the newest here first.

        Raises UsageError if `where` makes no sense.
        """
        from indexes.filters import And

        condition = self._condition(where)
        with self._store.snapshot() as rows:
            ids = rows.select(condition if condition is not None else And(()))[::-1]
            wanted = ids[offset : offset + k].tolist()
            found = rows.items(wanted)
        return len(ids), [found[one] for one in wanted]

    def image_embeddings(self, most: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Ids (n,), ascending, and unit rows (n, d) of pictures; of more than `most` an even share.

        They are of the model that the library was opened with, rounded to float16.
        """
        import numpy as np

        from indexes.records import unit_rows

        with self._store.snapshot() as rows:
            there = rows.ids_after("image", -1)
            if len(there) > most:
                there = there[np.linspace(0, len(there) - 1, most).round().astype(np.int64)]
            vectors = rows.embeddings("image", there.tolist())
        return there, unit_rows([vectors[one] for one in there.tolist()], self.model.dim)

    def fields(self) -> dict[str, str]:
        """What a filter may ask for: each field's name and type; see `retriever.where`."""
        from indexes.filters import FIELDS

        with self._store.snapshot() as rows:
            extras = rows.extra_keys()
        return {**FIELDS, **{key: "extra" for key in extras if key not in FIELDS}}

    @property
    def version(self) -> tuple[int, int]:
        """Stands for the state that is answered from: another one after every write."""
        with self._store.snapshot() as rows:
            return rows.version()

    def failures(self) -> list[Failure]:
        """Pictures that could not be read when they were last looked at, and why."""
        from retriever.ingest import Failure

        return [Failure(item.path, item.reason or "") for item in self._store.failures()]

    def duplicates(self, *, copies: bool = False, progress: Progress | None = None) -> Duplicates:
        """Pictures that are there several times, in groups; see `retriever.duplicates.find`.

        Nothing is deleted. With `copies` only files with the same contents are found.
        """
        from retriever.duplicates import find

        return find(self._store, copies=copies, progress=progress)

    def roots(self) -> list[RootInfo]:
        """The folders that were indexed, or that are to be."""
        return self._store.root_infos()

    def add_root(self, folder: str | Path) -> None:
        """Has `index()` without a folder look at this one too.

        Raises UsageError if it is none, or lies inside or around a folder of the library.
        """
        place = Path(folder).expanduser().resolve()
        if not place.is_dir():
            raise UsageError(f"{place} is no folder")
        with self._store.writer() as writer:
            self._refuse_overlap(place, [path for _, path in self._store.roots()])
            writer.add_root(place)

    def forget_root(self, folder: str | Path) -> int:
        """Forgets a folder with all its pictures and says how many; no file is deleted.

        Raises UsageError if it is not one of `roots`.
        """
        with self._store.writer() as writer:
            removed = writer.forget_root(self._root_ids(folder)[0])
            writer.finish()
        return removed

    def relocate(self, old: str | Path, new: str | Path) -> int:
        """Has the pictures of one or more folders looked for elsewhere; none is encoded again.

        Args:
            old: a folder of the library, or one around several of them, such as a mount point.
            new: where that is now.

        Returns:
            Pictures that are known under `new` from now on.

        Raises:
            UsageError: `old` is no such folder, `new` overlaps with another folder of the library,
                or none of the known pictures is there.
        """
        after = Path(new).expanduser().resolve()
        before = _plain(old)
        if not any(path.is_relative_to(before) for _, path in self._store.roots()):
            before = before.resolve()
        with self._store.writer() as writer, writer.together():
            roots = self._store.roots()
            moving = {
                root_id: after / path.relative_to(before)
                for root_id, path in roots
                if path.is_relative_to(before)
            }
            if not moving:
                raise UsageError(
                    f"no folder of the library is {before} or in it: `retriever roots` lists them"
                )
            others = [path for root_id, path in roots if root_id not in moving]
            count = 0
            is_there = False
            for root_id, path in moving.items():
                self._refuse_overlap(path, others)
                files = self._store.known_files(root_id)
                is_there |= not files or any((path / file).exists() for file in files)
                count += len(files)
                writer.relocate_root(root_id, path)
            if not is_there:
                raise UsageError(f"none of the {count:,} known pictures is in {after}")
        return count

    def _root_ids(self, folder: str | Path) -> list[int]:
        places = {_plain(folder), Path(folder).expanduser().resolve()}
        found = [root_id for root_id, path in self._store.roots() if path in places]
        if not found:
            raise UsageError(f"{folder} is no folder of the library: `retriever roots` lists them")
        return found

    def _refuse_overlap(self, place: Path, roots: Iterable[Path]) -> None:
        for root in roots:
            if place.is_relative_to(root) or root.is_relative_to(place):
                raise UsageError(f"{place} overlaps with {root}, which is in the library")

    def models(self) -> list[StoredModel]:
        """The models whose embeddings the library holds, the default first."""
        return self._store.models()

    @property
    def pending(self) -> int:
        """Pictures that another model has embedded and this one not, or not all captions of."""
        with self._store.snapshot() as rows:
            return len(rows.pending()) if len(rows.models()) > 1 else 0

    def use_model(self, name: str) -> StoredModel:
        """Makes a model of the library its default; the others keep their embeddings.

        Args:
            name: the model's name, or the first digits of its fingerprint.

        Raises UsageError if the library does not have it.
        """
        with self._store.writer() as writer:
            chosen = max(self._models_named(name), key=lambda one: one.model_id)
            writer.set_default_model(chosen.spec.fingerprint)
        return chosen

    def drop_model(self, name: str) -> list[StoredModel]:
        """Forgets all that a model embedded, of each version of it except the default one.

        Pictures that only this model had seen are read again by the next `index`.

        Args:
            name: the model's name, or the first digits of its fingerprint.

        Raises UsageError if the library does not have it, or it is the default.
        """
        with self._store.writer() as writer:
            dropped = [one for one in self._models_named(name) if not one.is_default]
            if not dropped:
                raise UsageError(
                    f"{name} is the default model of {self.path}: make another one the default"
                    " first (`retriever models --use NAME`)"
                )
            specs = {one.spec for one in dropped}
            for other in self._store.models():
                if other.derived and other.derived.base in specs and other not in dropped:
                    first = (
                        "tune --undo" if other.is_default else f"models --drop {other.spec.name}"
                    )
                    raise UsageError(
                        f"{other.spec.name} is tuned from {name}: forget that first"
                        f" (`retriever {first}`)"
                    )
            for one in dropped:
                writer.drop_model(one.spec.fingerprint)
            writer.finish()
        return dropped

    def _models_named(self, name: str) -> list[StoredModel]:
        models = self._store.models()
        found = [one for one in models if one.spec.name in (name, _stored(name))]
        if not found and len(name) >= SHORTEST_FINGERPRINT:
            found = [one for one in models if one.spec.fingerprint.startswith(name)]
        if not found:
            known = ", ".join(one.spec.name for one in models)
            raise UsageError(f"{self.path} has no embeddings of {name}; it has those of {known}")
        return found

    def verify(self, *, sample: int = 16, notes: list[str] | None = None) -> list[str]:
        """What a full check finds wrong, one sentence each.

        Checks the library's files (see `indexes.care.verify`), that the pictures are still there,
        and that some of them, and of the captions, are still embedded as they were.

        Args:
            sample: pictures and captions to encode again; 0 needs no model.
            notes: what could not be checked is added to it.
        """
        from retriever.checks import changed_embeddings, missing_pictures

        notes = [] if notes is None else notes
        problems = self._store.verify()
        if problems:  # what it holds cannot be relied on for the rest
            return problems
        problems = missing_pictures(self._store, notes)
        for model in self._store.models():
            if model.pending:
                notes.append(
                    f"{model.pending:,} pictures are not embedded by {model.spec.name}, or not all "
                    f"of their captions: retriever index --model {model.spec.name}"
                )
        if sample:
            problems += changed_embeddings(self._store, lambda: self.encoder, sample, notes)
        return problems

    @staticmethod
    def repair(path: str | Path) -> list[str]:
        """Mends the library at `path` as far as can be, and says what was done; empty: nothing.

        See `indexes.care.repair`, which a library that cannot be opened needs too.
        """
        from indexes.care import repair

        return repair(Path(path).expanduser())

    def compact(self) -> tuple[int, int]:
        """Gives the space of what was removed back to the disk; bytes before and after."""
        return self._store.compact()

    def backup(self, destination: str | Path) -> None:
        """Copies the library, as it is at one moment, while others read and write it.

        Raises StoreExistsError if something is at `destination`.
        """
        self._store.backup(Path(destination).expanduser())

    def export(self, destination: str | Path, *, progress: Progress | None = None) -> ExportReport:
        """Writes the library to a new folder, for any program; see `retriever.exchange`.

        Of a tuned library the embeddings of the model it is tuned from: those fit any library of
        that model, and `tune` fits them to their new one. A `backup` has all.
        """
        from retriever.exchange import export_store

        with self._untuned() as store:
            return export_store(store, Path(destination).expanduser(), progress=progress)

    def import_(
        self,
        source: str | Path,
        *,
        pictures: str | Path | None = None,
        progress: Progress | None = None,
    ) -> ImportReport:
        """Takes in an export, or embeddings in clip-retrieval's layout.

        Args:
            source: the folder.
            pictures: for clip-retrieval, where its relative paths begin.
            progress: called with (done, total) of the pictures.

        Raises as `retriever.exchange.import_folder` and `import_clip_retrieval` do.
        """
        from retriever.exchange import import_clip_retrieval, import_folder

        folder = Path(source).expanduser()
        with self._untuned() as store:
            if (folder / "manifest.json").is_file():
                return import_folder(store, folder, progress=progress)
            return import_clip_retrieval(
                store,
                folder,
                encoder=self._reader(store.model),
                root=Path(pictures).expanduser() if pictures is not None else None,
                progress=progress,
            )

    def merge(self, other: str | Path, *, progress: Progress | None = None) -> ImportReport:
        """Takes in what another library holds, by the model that this one was opened with.

        A tuned library takes the embeddings of the model it is tuned from, and fits them to itself.

        Raises as `retriever.exchange.merge_store` does, and WrongModelError.
        """
        from indexes.store import Store
        from retriever.exchange import merge_store

        place = Path(other).expanduser()
        with (
            self._untuned() as store,
            Store.open(place, store.model, read_only=True) as theirs,
        ):
            return merge_store(store, theirs, progress=progress)

    def rebuild(self) -> None:
        """Makes the FAISS files anew from the catalogue; no picture is read again."""
        self._store.rebuild()


def _measured(fit: Fit) -> AnswersInfo | None:
    try:
        channels = fit.facts["channels"]
        texts = fit.facts["calibration"]["texts"]
        return {
            "mode": channels["default"],
            "weights": channels["weights"],
            "queries": channels["queries"],
            "measured": channels["measured"],
            "cut_off": {
                mode: {"auc": facts["auc"], "error": facts["error"]}
                for mode, facts in texts.items()
                if "slope" in facts
            },
        }
    except (KeyError, TypeError, AttributeError):  # measured by another version
        return None


def _load(encoder: str | Encoder, device: str, threads: int | None) -> tuple[Encoder, ModelSpec]:
    """An encoder, and the name under which a library finds it again."""
    if not isinstance(encoder, str):
        return encoder, ModelSpec(encoder.name, encoder.dim, encoder.fingerprint)
    from retriever.encoders import load_encoder

    loaded = load_encoder(encoder, device=device, threads=threads)
    return loaded, ModelSpec(_stored(encoder), loaded.dim, loaded.fingerprint)


def _stored(name: str) -> str:
    """A model's name as the library keeps it."""
    folder = Path(name).expanduser()
    # A model in a folder must be found from whichever directory the library is opened in.
    is_local = name != DEFAULT_MODEL and folder.exists()
    return str(folder.resolve()) if is_local else name


def _plain(path: str | Path) -> Path:
    return absolute(Path(path).expanduser())


def _query(
    text: str | Query | None = None,
    image: str | Path | Image.Image | None = None,
    text_weight: float = 1.0,
    image_weight: float = 1.0,
    without: str | Path | Sequence[str | Path] = (),
) -> Query:
    from retriever.asking import Query, parse

    if isinstance(image, str):
        image = Path(image)
    if isinstance(image, Path):
        image = image.expanduser()
    typed = parse(text) if isinstance(text, str) else text or Query()
    shunned = [without] if isinstance(without, str | Path) else without
    return typed.beside(
        [] if image is None else [(image, image_weight)], shunned, text_weight=text_weight
    )


def _ids_at(path: Path, item_at: Mapping[str, int]) -> set[int]:
    """Items at a path or in the folder of that name, by path with and without links followed."""
    absolute = _plain(path)
    for place in (absolute, absolute.parent.resolve() / absolute.name, absolute.resolve()):
        if str(place) in item_at:
            return {item_at[str(place)]}
        prefix = os.path.join(place, "")  # noqa: PTH118 (a Path drops the separator at its end)
        if inside := {id_ for file, id_ in item_at.items() if file.startswith(prefix)}:
            return inside
    return set()
