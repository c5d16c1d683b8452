"""Writer: every change of a store, each one a transaction; the FAISS files follow at the end.

Made by `Store.writer`, which holds the store's lock meanwhile.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from indexes.errors import InvalidRowsError, StoreReadOnlyError, callers_own
from indexes.files import absolute, check_there
from indexes.heads import Head, fingerprint
from indexes.records import (
    FACTS,
    KINDS,
    UNIT_TOLERANCE,
    ApproximateFile,
    CaptionRow,
    Extras,
    Fit,
    IndexFile,
    ItemWrite,
    Kind,
    ModelSpec,
    SearchPolicy,
    Source,
)

if TYPE_CHECKING:
    from indexes.catalogue import Catalogue, Transaction
    from indexes.snapshot import Snapshot

TOLERATED = 1 / 50  # of the rows of a FAISS file may have changed since it was written
_FAISS_NAME = re.compile(r"(image|caption)-\d+-\d+(-approximate)?\.faiss(\.tmp)?")
# Of the rows of an approximate index that are no longer as they were, or of others beside it.
OUTGROWN = 1 / 5


class _StoppedError(Exception):
    """Undoes a transaction because whoever asked for it does not want it any more."""


class Writer:
    """Changes a store; every method is one transaction unless called inside `together`.

    Reads of the Store show what was committed, not what an open `together` has done so far.
    """

    def __init__(self, path: Path, catalogue: Catalogue, dim: int) -> None:
        """Used by `Store.writer`."""
        self._path = path
        self._catalogue = catalogue
        self._dim = dim
        self._joined: Transaction | None = None

    @contextmanager
    def together(self) -> Iterator[None]:
        """All calls inside are one transaction, for many small ones: a commit costs an fsync."""
        with callers_own(self._catalogue.write()) as transaction:
            self._joined = transaction
            try:
                yield
            finally:
                self._joined = None

    @contextmanager
    def _transaction(self) -> Iterator[Transaction]:
        if self._joined is None:
            with self._catalogue.write() as transaction:
                yield transaction
        else:
            with self._joined.savepoint():
                yield self._joined

    def add_root(self, path: Path) -> int:
        """Id of the root, made if absent."""
        with self._transaction() as rows:
            return rows.add_root(absolute(path))

    def forget_root(self, root_id: int) -> int:
        """Forget a root with all its items, and say how many these were."""
        with self._transaction() as rows:
            return rows.remove_root(root_id)

    def absorb_root(self, root_id: int, inner_id: int, prefix: str) -> None:
        """A root takes over all items of one that lies inside it at `prefix`, which is forgotten.

        Raises InvalidRowsError if it has an item at the place of one of them.
        """
        with self._transaction() as rows:
            for file, known in rows.known_files(inner_id).items():
                here = f"{prefix}/{file}"
                if rows.item_at(root_id, here) is not None:
                    raise InvalidRowsError(f"another item is at {here!r} already")
                rows.update_place(known.item_id, root_id=root_id, file=here)
            rows.remove_root(inner_id)

    def relocate_root(self, root_id: int, path: Path) -> None:
        """The same pictures are at another path now, as after a disk changed its mount point."""
        with self._transaction() as rows:
            rows.update_root(root_id, path=absolute(path))

    def mark_indexed(self, root_id: int) -> None:
        """All of a root was looked at just now."""
        with self._transaction() as rows:
            rows.update_root(root_id, indexed_at=datetime.now(UTC).replace(tzinfo=None))

    def set_default_model(self, fingerprint: str) -> None:
        """Open the store with this model from now on; the others keep their embeddings.

        Raises InvalidRowsError.
        """
        with self._transaction() as rows:
            rows.set_default_model(_model_id(rows, fingerprint))

    def drop_model(self, fingerprint: str) -> None:
        """Forget all that a model embedded; raises InvalidRowsError for the default one."""
        with self._transaction() as rows:
            model_id = _model_id(rows, fingerprint)
            if model_id == _model_id(rows, None):
                raise InvalidRowsError("the default model cannot be dropped: make another default")
            if rows.of_model(model_id).derived_ids():
                raise InvalidRowsError("another model is tuned from this one: drop that first")
            rows.drop_model(model_id)
        self._sweep()

    def adopt(
        self,
        model: ModelSpec,
        head: bytes,
        facts: Mapping[str, Any],
        *,
        progress: Callable[[int, int], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> bool:
        """Has the store open with a model derived from this one, in the place of any such before.

        Its embeddings are made of the stored ones, in one transaction: until that ends everyone
        sees what was there before. `finish` then makes its FAISS files.

        Args:
            model: its name, dimension and fingerprint (`indexes.heads.fingerprint`).
            head: the bytes of a `Head`.
            facts: see `Derivation`.
            progress: called with (done, total) embeddings.
            stop: asked between batches; once it says yes, nothing is changed.

        Returns whether it was done. Raises InvalidRowsError.
        """
        report = progress or (lambda done, total: None)
        try:
            with self._transaction() as rows:
                self._check_head(rows, model, head)
                total = sum(rows.vector_count(kind) for kind in KINDS)
                done = 0
                before = rows.derived_ids()
                rows.set_default_model(rows.model_id)
                for model_id in before:
                    rows.drop_model(model_id)
                model_id = rows.add_derived(model, head, facts)
                report(done, total)
                for kind in KINDS:
                    for count in rows.derive(kind):
                        done += count
                        report(done, total)
                        if stop is not None and stop():
                            raise _StoppedError
                rows.set_default_model(model_id)
        except _StoppedError:
            return False
        self._sweep()
        return True

    def _check_head(self, rows: Transaction, model: ModelSpec, head: bytes) -> None:
        base = rows.models()[rows.model_id]
        if rows.derivation() is not None:
            raise InvalidRowsError("a model is derived from one that an encoder made")
        try:
            made = Head.unpack(head)
        except ValueError as error:
            raise InvalidRowsError(str(error)) from error
        if (made.dim, made.made) != (base.dim, model.dim):
            raise InvalidRowsError(f"a head of {made.dim} dimensions does not fit {base.name}")
        if model.fingerprint != fingerprint(base.fingerprint, head):
            raise InvalidRowsError(f"{model.name} has not the fingerprint of its head")

    def abandon(self) -> int:
        """Forgets every model derived from this one, which is the default if one of them was.

        Returns how many these were. No embedding of this model is touched.
        """
        with self._transaction() as rows:
            derived = rows.derived_ids()
            if _model_id(rows, None) in derived:
                rows.set_default_model(rows.model_id)
            for model_id in derived:
                rows.drop_model(model_id)
        self._sweep()
        return len(derived)

    def write(self, root_id: int, items: Sequence[ItemWrite]) -> list[int]:
        """Ids of the items written, in order; all or none.

        Raises InvalidRowsError naming the file if an embedding is not float32, finite and of unit
        length within 1e-3, or a row contradicts itself; nothing is written then.
        """
        places = set()
        for item in items:
            self._check_item(item)
            if item.file in places:
                raise InvalidRowsError(f"{item.file!r} is in the batch twice")
            places.add(item.file)
        with self._transaction() as rows:
            return rows.write_items(root_id, items)

    def move(self, item_id: int, root_id: int, file: str, size: int, mtime_ns: int) -> None:
        """The item is now at another place, with all that is known of it.

        Raises InvalidRowsError if there is no such item or another one is at that place: a file
        with new content at a known place is a change, to be written.
        """
        _check_file(file)
        with self._transaction() as rows:
            if rows.item_at(root_id, file) not in (None, item_id):
                raise InvalidRowsError(f"another item is at {file!r} already")
            rows.update_place(item_id, root_id=root_id, file=file, size=size, mtime_ns=mtime_ns)

    def set_captions(
        self,
        item_id: int,
        captions: Sequence[CaptionRow],
        embeddings: NDArray[np.float32] | None,
    ) -> None:
        """Replace an item's captions; `embeddings` (n_captions, d), None if there are none.

        Raises InvalidRowsError, also for captions of a failed item: those come with `write`.
        """
        self._check_captions(f"captions of item {item_id}", captions, embeddings)
        with self._transaction() as rows:
            item = rows.items([item_id]).get(item_id)
            if item is None or item.status != "ok":
                raise InvalidRowsError(f"there is no item {item_id} that can have captions")
            rows.set_captions(item_id, captions, embeddings)

    def embed(
        self,
        item_id: int,
        image_embedding: NDArray[np.float32] | None,
        caption_embeddings: NDArray[np.float32] | None,
    ) -> None:
        """Give a known item what this store's model has not embedded yet; None leaves it.

        Args:
            item_id: an item that could be read.
            image_embedding: (d,) of the picture.
            caption_embeddings: (n_captions, d) of all its captions, in their order.

        Raises InvalidRowsError.
        """
        what = f"item {item_id}"
        with self._transaction() as rows:
            item = rows.items([item_id]).get(item_id)
            if item is None or item.status != "ok":
                raise InvalidRowsError(f"there is no item {item_id} that can be embedded")
            if image_embedding is not None:
                check_embeddings(what, image_embedding[None], self._dim)
                rows.embed("image", [(item_id, image_embedding.astype("<f2"))])
            if caption_embeddings is not None:
                self._check_captions(what, item.captions, caption_embeddings)
                ids = rows.caption_ids([item_id])
                rows.embed("caption", list(zip(ids, caption_embeddings.astype("<f2"), strict=True)))

    def touch(self, item_id: int, size: int, mtime_ns: int) -> None:
        """Same content, other size or time stamp on disk."""
        with self._transaction() as rows:
            rows.update_place(item_id, size=size, mtime_ns=mtime_ns)

    def set_facts(
        self,
        item_id: int,
        *,
        camera: str | None,
        latitude: float | None,
        longitude: float | None,
        perceptual_hash: int | None,
    ) -> None:
        """What its file tells of an item that stays as it is; raises InvalidRowsError."""
        _check_facts(f"item {item_id}", camera, latitude, longitude, perceptual_hash)
        with self._transaction() as rows:
            rows.set_facts(
                item_id,
                camera=camera,
                latitude=latitude,
                longitude=longitude,
                perceptual_hash=perceptual_hash,
                facts=FACTS,
            )

    def set_extras(self, item_id: int, extras: Extras) -> None:
        """Replace an item's further columns; raises InvalidRowsError."""
        _check_extras(f"item {item_id}", extras)
        with self._transaction() as rows:
            if item_id not in rows.items([item_id]):
                raise InvalidRowsError(f"there is no item {item_id}")
            rows.set_extras(item_id, extras)

    def record_fit(self, fit: Fit) -> None:
        """What was measured of this store for its model, from now on; raises InvalidRowsError."""
        if fit.means.shape != (2, self._dim):
            raise InvalidRowsError(f"means are {fit.means.shape}, not (2, {self._dim})")
        try:
            json.dumps(fit.facts, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InvalidRowsError(f"facts that JSON cannot hold: {error}") from error
        with self._transaction() as rows:
            rows.record_fit(fit)

    def remove(self, ids: Collection[int]) -> None:
        """Forget items with their captions and embeddings; unknown ids are ignored."""
        with self._transaction() as rows:
            rows.remove([int(item_id) for item_id in ids])  # SQLite takes NumPy's for blobs

    def finish(
        self,
        *,
        anew: Collection[Kind] = (),
        all_models: bool = False,
        tolerated: float = TOLERATED,
    ) -> None:
        """Bring the FAISS files up to date, as a new generation; nothing to do is done in no time.

        A file is made anew when more than one row in fifty has changed since: until then searching
        the changes beside it costs less than writing all the others again.

        A file is written whole beside its final name, synced, renamed, then recorded; killed
        anywhere in between, the one before stays in use. Kinds in `anew` are written in any case.
        The models are this store's and those derived from it, or all of them.
        Raises StoreReadOnlyError (disk full, permissions); searches are right without the files.
        """
        assert self._joined is None, "finish is a transaction of its own"
        with self._catalogue.read() as rows:
            wanted = {rows.model_id, *rows.derived_ids()}
            models = {
                model_id: model
                for model_id, model in rows.models().items()
                if all_models or model_id in wanted
            }
        written: list[tuple[int, Kind, IndexFile | None]] = []
        for model_id, model in models.items():
            for kind in KINDS:
                with self._catalogue.read() as state:
                    rows = state.of_model(model_id)
                    if kind in anew or not self._is_current(rows, kind, tolerated):
                        written.append((model_id, kind, self._write_index(rows, model, kind)))
        if written:
            with self._catalogue.write() as state:
                state.next_generation()
                for model_id, kind, file in written:
                    state.record_index(model_id, kind, file)
        self._sweep()

    def _write_index(self, rows: Snapshot, model: ModelSpec, kind: Kind) -> IndexFile | None:
        from indexes.vectors import VectorIndex

        generation, change = rows.version()
        index = VectorIndex.build(model.dim, rows.vectors(kind))
        if not len(index):
            return None
        name = f"{kind}-{rows.model_id}-{generation + 1:08d}.faiss"
        try:
            stamp = index.save(self._path / name)
        except OSError as error:
            check_there(self._path)
            raise StoreReadOnlyError(
                f"{self._path / name} could not be written ({error.strerror}); nothing "
                "is lost, searches go on without it, only slower"
            ) from error
        return IndexFile(name, generation + 1, change, len(index), stamp)

    def optimize(
        self,
        texts: Callable[[], NDArray[np.float32]] | None = None,
        *,
        policy: SearchPolicy | None = None,
        anew: bool = False,
        progress: Callable[[int, int], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> list[Kind]:
        """Have an approximate index of each kind of this model's vectors, where that pays.

        One that is there is built anew when a fifth of its rows changed, its file is damaged, or
        the policy is another. It is built of the FAISS file, so `finish` comes first.

        Args:
            texts: gives some hundred text queries, (q, d) unit rows, for a library without
                captions; None: it is tuned by its pictures alone.
            policy: how the store may search from now on; None: as before.
            anew: build those that are there as well.
            progress: called with (done, total) rows of each that is built.
            stop: asked between steps of seconds at most, but for millions of rows; once it says
                yes, the policy and what was not built anew stay as they were.

        Returns:
            The kinds of which an approximate index was built.

        Raises StoreReadOnlyError (disk full, permissions): searches go on as before.
        """
        assert self._joined is None, "optimize is a transaction of its own"
        from indexes.approximate import UnsuitableError
        from indexes.vectors import IndexFileError

        with self._catalogue.read() as rows:
            before = rows.policy()
        policy = policy or before
        done: list[Kind] = []
        for kind in KINDS:
            with self._catalogue.read() as rows:
                flat, known = rows.index_file(kind), rows.approximate_file(kind)
                is_current = (
                    not anew and known is not None and self._still_fits(rows, kind, known, policy)
                )
            if flat is None or not self._pays(flat.rows, policy):
                self._give_up_approximate(kind, known)
            elif not is_current:
                build = partial(self._approximate, kind, policy, texts, progress, stop)
                try:
                    try:
                        built = build()
                    except IndexFileError:  # the vectors it is made of are damaged: they come anew
                        self.finish(anew=KINDS)
                        built = build()
                except UnsuitableError:
                    self._give_up_approximate(kind, known)
                    continue
                if built is None:
                    self._sweep()
                    return done
                self._record_approximate(kind, built)
                done.append(kind)
        if policy != before:
            with self._catalogue.write() as state:
                state.next_generation()
                state.set_policy(policy)
        self._sweep()
        return done

    def _approximate(
        self,
        kind: Kind,
        policy: SearchPolicy,
        texts: Callable[[], NDArray[np.float32]] | None,
        progress: Callable[[int, int], None] | None,
        stop: Callable[[], bool] | None,
    ) -> ApproximateFile | None:
        """An approximate index written beside the others, or None if it was stopped."""
        from indexes.optimizer import build, sample
        from indexes.vectors import VectorIndex

        with self._catalogue.read() as rows:
            generation = rows.version()[0]
            files = {one: rows.index_file(one) for one in KINDS}
        loaded: dict[Kind, VectorIndex] = {
            one: VectorIndex.load(
                self._path / file.name, dim=self._dim, rows=file.rows, stamp=file.stamp
            )
            for one, file in files.items()
            if file is not None
        }
        queries: dict[Source, NDArray[np.float32]] = {}
        if "caption" in loaded:
            queries["text"] = sample(loaded["caption"])
        elif texts is not None:
            queries["text"] = texts()
        if "image" in loaded:
            queries["image"] = sample(loaded["image"])
        flat = files[kind]
        assert flat is not None
        name = f"{kind}-{self._catalogue.model_id}-{generation + 1:08d}-approximate.faiss"
        try:
            return build(
                self._path / name,
                loaded[kind],
                flat,
                queries,
                policy,
                progress=progress,
                stop=stop,
            )
        except OSError as error:
            check_there(self._path)
            raise StoreReadOnlyError(
                f"{self._path / name} could not be written ({error.strerror}); nothing is lost, "
                "searches go on as before"
            ) from error

    def _give_up_approximate(self, kind: Kind, known: ApproximateFile | None) -> None:
        if known is not None:
            self._record_approximate(kind, None)

    def _record_approximate(self, kind: Kind, built: ApproximateFile | None) -> None:
        with self._catalogue.write() as state:
            state.next_generation()  # those who have the store open look again
            state.record_approximate(self._catalogue.model_id, kind, built)

    def _pays(self, rows: int, policy: SearchPolicy) -> bool:
        from indexes.approximate import choose

        return not policy.exact and not choose(rows, self._dim, policy.memory_bytes).is_exact

    def _still_fits(
        self, rows: Snapshot, kind: Kind, known: ApproximateFile, policy: SearchPolicy
    ) -> bool:
        beside = rows.vector_count(kind, after=known.file.change)
        gone = known.file.rows + beside - rows.vector_count(kind)
        is_outgrown = beside + gone > OUTGROWN * known.file.rows
        if known.policy != policy or is_outgrown:
            return False
        from indexes.approximate import ApproximateIndex
        from indexes.vectors import IndexFileError

        try:
            ApproximateIndex.load(
                self._path / known.file.name,
                dim=self._dim,
                rows=known.file.rows,
                stamp=known.file.stamp,
            )
        except IndexFileError:
            return False
        return True

    def compact(self) -> None:
        """Strike what was removed out of every file and give its space back to the disk.

        Raises as `Catalogue.vacuum` does.
        """
        self.finish(all_models=True, tolerated=0)
        with self._catalogue.write() as state:
            state.optimize_words()
        self._catalogue.vacuum()

    def _is_current(self, rows: Snapshot, kind: Kind, tolerated: float) -> bool:
        file = rows.index_file(kind)
        if file is None:
            return not rows.vector_count(kind)
        changed = rows.removed(kind).size + rows.vector_count(kind, after=file.change)
        if changed > tolerated * file.rows:
            return False
        return self._is_there(file)

    def _is_there(self, file: IndexFile) -> bool:
        try:
            return (self._path / file.name).stat().st_size == file.stamp.size_bytes
        except OSError:
            return False

    def _sweep(self) -> None:
        """Remove FAISS files that are no longer, or were never, recorded."""
        with self._catalogue.read() as rows:
            used = rows.index_file_names()
        for file in self._path.iterdir():
            if _FAISS_NAME.fullmatch(file.name) and file.name not in used:
                # Windows keeps a file that a reader has mapped; a later sweep takes it.
                with suppress(OSError):
                    file.unlink()

    def _check_item(self, item: ItemWrite) -> None:
        _check_file(item.file)
        what = f"{item.file!r}"
        _check_facts(what, item.camera, item.latitude, item.longitude, item.perceptual_hash)
        _check_extras(what, item.extras)
        if item.failure is not None:
            if item.image_embedding is not None or item.caption_embeddings is not None:
                raise InvalidRowsError(f"{what} failed and yet has embeddings")
            self._check_texts(what, item.captions)
            return
        if item.image_embedding is not None:
            check_embeddings(what, item.image_embedding[None], self._dim)
        elif item.content_hash is None:
            raise InvalidRowsError(f"{what} has neither an embedding nor a content hash")
        self._check_captions(what, item.captions, item.caption_embeddings)

    def _check_captions(
        self, what: str, captions: Sequence[CaptionRow], embeddings: NDArray[np.float32] | None
    ) -> None:
        self._check_texts(what, captions)
        count = len(embeddings) if embeddings is not None else 0
        if count != len(captions):
            raise InvalidRowsError(f"{what}: {len(captions)} captions, {count} embeddings")
        if embeddings is not None:
            check_embeddings(f"{what}, captions", embeddings, self._dim)

    def _check_texts(self, what: str, captions: Sequence[CaptionRow]) -> None:
        for caption in captions:
            for text in (caption.text, caption.source):
                _check_text(f"{what}: a caption", text)


def _model_id(rows: Snapshot, fingerprint: str | None) -> int:
    found = rows.model(fingerprint)
    if found is None:
        raise InvalidRowsError(f"the library has no model with the fingerprint {fingerprint}")
    return found[0]


def _check_text(what: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRowsError(f"{what} is not valid text") from error


def _check_facts(
    what: str,
    camera: str | None,
    latitude: float | None,
    longitude: float | None,
    perceptual_hash: int | None,
) -> None:
    _check_text(f"{what}: the camera", camera or "")
    if (latitude is None) != (longitude is None):
        raise InvalidRowsError(f"{what} has half a place")
    if not abs(latitude or 0.0) <= 90 or not abs(longitude or 0.0) <= 180:  # True for NaN
        raise InvalidRowsError(f"{what} was taken at {latitude}, {longitude}: no place on Earth")
    if not -(1 << 63) <= (perceptual_hash or 0) < 1 << 63:
        raise InvalidRowsError(f"{what}: a perceptual hash has 64 bits")


def _check_extras(what: str, extras: Extras) -> None:
    for key, value in extras:
        _check_text(f"{what}: the name of a column", key)
        if isinstance(value, str):
            _check_text(f"{what}: {key!r}", value)
        elif not math.isfinite(value):
            raise InvalidRowsError(f"{what}: {key!r} is {value}, which is no number")


def _check_file(file: str) -> None:
    if not file or file.startswith("/") or "\0" in file:
        raise InvalidRowsError(f"{file!r} is not a path relative to a root")


def check_embeddings(what: str, embeddings: NDArray[np.float32], dim: int) -> None:
    """Raise InvalidRowsError, naming `what`, unless these are (n, dim) float32 unit rows."""
    if embeddings.dtype != np.float32 or embeddings.ndim != 2 or embeddings.shape[1] != dim:
        raise InvalidRowsError(
            f"{what}: embeddings are {embeddings.dtype} {embeddings.shape}, not float32 (n, {dim})"
        )
    lengths = np.linalg.norm(embeddings, axis=1)
    if not (np.abs(lengths - 1) <= UNIT_TOLERANCE).all():  # False for NaN and infinity
        row = int(np.flatnonzero(~(np.abs(lengths - 1) <= UNIT_TOLERANCE))[0])
        raise InvalidRowsError(f"{what}: embedding {row} has length {lengths[row]:.4g}, not 1")
