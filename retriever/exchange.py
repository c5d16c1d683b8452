"""Ways out of a library and into another: export, import, merge, clip-retrieval's embeddings.

What comes in never takes anything away. A picture that the library lacks is added. Of one that it
has with the same content, captions and further columns that it lacks are added, what its file tells
where nobody has looked yet, and embeddings that its model lacks.
One that it has with other content stays as it is: the library looked at the file itself. So the
same import done again changes nothing, and one that was cut off goes on where it stopped.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from indexes.files import absolute, sync
from indexes.records import ItemWrite, KnownFile, Status, in_order
from retriever.clip_retrieval import CHECKED, ClipLayout, ClipReader, check_sample
from retriever.errors import RetrieverError, UsageError, printable
from retriever.ingest import Failure
from retriever.portable import (
    BATCH_SIZE,
    MANIFEST,
    Export,
    Record,
    batched,
    check_model,
    clear_partial,
    read_manifest,
    records_of,
    unit_rows,
    write_files,
)

if TYPE_CHECKING:
    from indexes.store import Store, Writer
    from retriever.encoders import Encoder
    from retriever.ingest import Progress


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export wrote; `items` counts pictures that could not be read as well."""

    folder: Path
    items: int
    captions: int
    image_embeddings: int
    caption_embeddings: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What an import did; every picture that came is counted once.

    added: new to the library. updated: known with the same content, and given captions, facts or
    embeddings that it lacked. unchanged: known, with all that came or with other content. skipped:
    not taken in, or not with all captions, each with the reason.
    """

    added: int = 0
    updated: int = 0
    unchanged: int = 0
    skipped: tuple[Failure, ...] = ()


def export_store(store: Store, dest: Path, *, progress: Progress | None = None) -> ExportReport:
    """Writes all that the store knows to the new folder `dest`, with its model's embeddings.

    The export is of one moment, whoever writes meanwhile, and takes little memory. It is made as
    `dest` + ".partial" and renamed, so that `dest` is complete or absent.

    Raises:
        UsageError: `dest` exists, or a `.partial` that holds other files.
        RetrieverError: `dest` cannot be written.
    """
    dest = absolute(dest.expanduser())
    if os.path.lexists(dest):
        raise UsageError(f"{printable(dest)} exists: an export makes a new folder")
    part = dest.with_name(dest.name + ".partial")
    try:
        clear_partial(part)
        part.mkdir(parents=True)
        try:
            with store.snapshot() as rows:
                report = write_files(store, rows, part, progress)
            sync(part)
            part.rename(dest)
            sync(dest.parent)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    except OSError as exc:
        raise RetrieverError(
            f"{printable(dest)} cannot be written ({exc.strerror}); nothing was left there"
        ) from exc
    return ExportReport(dest, **report)


def exported_model(source: Path) -> str | None:
    """The name of the model of an export; None if `source` is none, as with clip-retrieval's.

    Raises:
        RetrieverError: the manifest is damaged, or newer than this version.
    """
    source = source.expanduser()
    if not (source / MANIFEST).is_file():
        return None
    return read_manifest(source).object("model").text("name")


def import_folder(store: Store, source: Path, *, progress: Progress | None = None) -> ImportReport:
    """Takes in what `export_store` wrote; all of it is checked before anything is written.

    Paths come as they were exported, wherever the pictures lie now: `Writer.relocate_root` is for
    folders that have moved.

    Args:
        store: locked for writing meanwhile.
        source: the exported folder.
        progress: called with (done, total) of the pictures.

    Raises:
        UsageError: `source` is no export.
        WrongModelError: the embeddings are of another model.
        RetrieverError: a file is damaged or contradicts another; the text names it and the line.
        StoreLockedError: another process is writing.
    """
    export = Export.open(source.expanduser(), store)
    roots = export.check()
    return _take_in(store, roots, export.batches(), export.counts["items"], progress)


def merge_store(store: Store, other: Store, *, progress: Progress | None = None) -> ImportReport:
    """Takes in what another library holds, with the embeddings of the model both were opened with.

    Args:
        store: locked for writing meanwhile.
        other: only read, as it was when the merge began.
        progress: called with (done, total) of the pictures.

    Raises:
        UsageError: both are the same library.
        WrongModelError: the models differ.
        StoreLockedError: another process is writing.
    """
    if store.path.samefile(other.path):
        raise UsageError(f"{printable(other.path)} is the library itself")
    check_model(store, other.model.name, other.model.dim, other.model.fingerprint, other.path)
    with other.snapshot() as rows:
        ids = rows.item_ids()
        batches = (records_of(rows, some) for some in batched(ids, BATCH_SIZE))
        roots = [info.path for info in rows.root_infos() if info.items]
        return _take_in(store, roots, batches, len(ids), progress)


def import_clip_retrieval(
    store: Store,
    source: Path,
    *,
    encoder: Encoder,
    root: Path | None = None,
    check: int = CHECKED,
    progress: Progress | None = None,
) -> ImportReport:
    """Takes in what `clip-retrieval inference` wrote of pictures that are on this computer.

    Its layout is `img_emb/img_emb_N.npy`, perhaps `text_emb/text_emb_N.npy`, and
    `metadata/metadata_N.parquet` with the columns `image_path` and, beside text, `caption`; row by
    row the same picture. Sizes, times, hashes and descriptions come from the pictures themselves,
    so that indexing their folder afterwards finds them unchanged. Captions without an embedding
    are encoded; rows whose picture is not on disk or cannot be read are skipped.

    Args:
        store: locked for writing while pictures are taken in.
        source: the folder with `img_emb` and `metadata`.
        encoder: of the store's model.
        root: what relative image paths start from; pictures elsewhere are skipped then.
        check: so many pictures, and captions, are encoded again to see that the embeddings are of
            this model; 0 believes it.
        progress: called with (done, total) of the rows.

    Raises:
        MissingExtraError: pyarrow is not installed.
        UsageError: `source` has another layout, or paths are relative and `root` is not given.
        WrongModelError: the embeddings are of another model.
        RetrieverError: a file is damaged or contradicts another, or no picture is on disk.
        StoreLockedError: another process is writing.
    """
    source = source.expanduser()
    base = absolute(root.expanduser()) if root is not None else None
    layout = ClipLayout(source, store.model.dim, base)
    folder, sample = layout.survey(check)
    check_sample(store, encoder, source, sample)
    with ClipReader(store, encoder, layout, folder) as reader:
        roots, total = [reader.root], layout.n_rows
        report = _take_in(store, roots, reader.batches(), total, progress)
    return replace(report, skipped=(*reader.skipped, *report.skipped))


# ── Into a store ─────────────────────────────────────────────────────────────────────────────────


def _take_in(
    store: Store,
    roots: Iterable[Path],
    batches: Iterable[Sequence[Record]],
    total: int,
    progress: Progress | None,
) -> ImportReport:
    """Writes records in batches, each one a transaction; `roots` are all that they name."""
    report = progress or (lambda done, total: None)
    with store.writer() as writer:
        intake = _Intake(store, writer, roots)
        report(0, total)
        done = 0
        for batch in batches:
            intake.take(batch)
            # A picture may have been several rows, or none that could be used.
            done = min(done + BATCH_SIZE, total)
            report(done, total)
        writer.finish()
    return intake.report()


class _Intake:
    """What comes into a store, with its lock held."""

    def __init__(self, store: Store, writer: Writer, roots: Iterable[Path]) -> None:
        self.store = store
        self.writer = writer
        self.counts = dict.fromkeys(("added", "updated", "unchanged"), 0)
        self.skipped: list[Failure] = []
        # The shortest first: what lies inside another one finds it there.
        by_length = sorted(set(roots), key=lambda path: len(path.parts))
        self.places = {root: self._settle(root) for root in by_length}
        ids = {root_id for root_id, _ in self.places.values()}
        self.known = {root_id: store.known_files(root_id) for root_id in ids}

    def report(self) -> ImportReport:
        return ImportReport(**self.counts, skipped=tuple(self.skipped))

    def _settle(self, root: Path) -> tuple[int, str]:
        """The store's root for a root that comes in, and the prefix of its files there.

        Roots never overlap: one inside a root of the store is that part of it, one around others
        takes their items over.
        """
        roots = self.store.roots()
        around = [(id_, path) for id_, path in roots if root.is_relative_to(path)]
        if around:
            root_id, path = min(around, key=lambda one: len(one[1].parts))
            return root_id, "" if path == root else f"{root.relative_to(path).as_posix()}/"
        with self.writer.together():
            root_id = self.writer.add_root(root)
            for inner_id, path in roots:
                if path.is_relative_to(root):
                    self.writer.absorb_root(root_id, inner_id, path.relative_to(root).as_posix())
        return root_id, ""

    def take(self, batch: Sequence[Record]) -> None:
        """Writes a batch, in which no picture is twice."""
        fresh: dict[int, list[ItemWrite]] = {}
        with self.writer.together():
            for record in batch:
                root_id, prefix = self.places[record.root]
                file = prefix + record.file
                known = self.known[root_id].get(file)
                if known is None and record.status == "ok" and record.image is None:
                    reason = f"has no embedding of {self.store.model.name}"
                    self.skipped.append(Failure(record.path, reason))
                elif known is None or _is_mended_by(known, record):
                    fresh.setdefault(root_id, []).append(self._write_of(record, file))
                    self.counts["added" if known is None else "updated"] += 1
                else:
                    after = self._completed(known, record)
                    self.known[root_id][file] = after
                    self.counts["unchanged" if after == known else "updated"] += 1
            for root_id, writes in fresh.items():
                ids = self.writer.write(root_id, writes)
                # Another batch may bring further captions of the same picture.
                for item_id, one in zip(ids, writes, strict=True):
                    self.known[root_id][one.file] = _known(item_id, one)

    def _write_of(self, record: Record, file: str) -> ItemWrite:
        captions, rows, image = record.captions, None, None
        if record.status == "ok":
            assert record.image is not None
            image = unit_rows(record.image[None])[0]
            captions = tuple(one for one, _ in record.embedded)
            if captions:
                rows = unit_rows(np.stack([row for _, row in record.embedded]))
            # A store takes no captions without embeddings.
            if missing := len(record.captions) - len(captions):
                reason = f"captions without an embedding of {self.store.model.name}: {missing}"
                self.skipped.append(Failure(record.path, reason))
        return ItemWrite(
            file,
            record.size,
            record.mtime_ns,
            record.content_hash,
            record.width,
            record.height,
            record.taken,
            captions,
            image,
            rows,
            record.reason,
            camera=record.camera,
            latitude=record.latitude,
            longitude=record.longitude,
            perceptual_hash=record.perceptual_hash,
            extras=record.extras,
            facts=record.facts,
        )

    def _completed(self, known: KnownFile, record: Record) -> KnownFile:
        """The item, once it was given what it lacks of a record with the same content."""
        if not known.status == record.status == "ok" or not _is_equal(known, record):
            return known
        after = self._described(known, record)
        if not known.picture_embedded and record.image is not None:
            self.writer.embed(known.item_id, unit_rows(record.image[None])[0], None)
            after = replace(after, picture_embedded=True)
        theirs = {one.text: (one, row) for one, row in record.embedded}
        ours = {one.text for one in known.captions}
        new = [pair for text, pair in theirs.items() if text not in ours]
        if not new and known.captions_embedded:
            return after
        if known.captions_embedded:
            ids = self.store.caption_ids(known.item_id)
            rows = list(self.store.embeddings("caption", ids))
        elif ours <= theirs.keys():
            rows = [theirs[one.text][1] for one in known.captions]
        else:  # nobody has embedded them all: indexing will, and these may come again then
            return after
        matrix = unit_rows(np.stack([*rows, *(row for _, row in new)]))
        captions = (*known.captions, *(one for one, _ in new))
        if new:
            self.writer.set_captions(known.item_id, captions, matrix)
        else:
            self.writer.embed(known.item_id, None, matrix)
        return replace(after, captions=captions, captions_embedded=True)

    def _described(self, known: KnownFile, record: Record) -> KnownFile:
        """The item, once it has facts that nobody looked for here, and columns that it lacks."""
        after = known
        if known.facts < record.facts:
            self.writer.set_facts(
                known.item_id,
                camera=record.camera,
                latitude=record.latitude,
                longitude=record.longitude,
                perceptual_hash=record.perceptual_hash,
            )
            after = replace(after, facts=record.facts)
        ours = {key for key, _ in known.extras}
        if new := [pair for pair in record.extras if pair[0] not in ours]:
            after = replace(after, extras=in_order([*known.extras, *new]))
            self.writer.set_extras(known.item_id, after.extras)
        return after


def _known(item_id: int, one: ItemWrite) -> KnownFile:
    status: Status = "ok" if one.failure is None else "failed"
    return KnownFile(
        *(item_id, one.file, one.size, one.mtime_ns, one.content_hash, status, one.captions),
        extras=in_order(one.extras),
        facts=one.facts,
    )


def _is_equal(known: KnownFile, record: Record) -> bool:
    return known.content_hash is not None and known.content_hash == record.content_hash


def _is_mended_by(known: KnownFile, record: Record) -> bool:
    """Whether a picture failed here and was read there, with all captions that it has here."""
    return (
        (known.status, record.status) == ("failed", "ok")
        and record.image is not None
        and known.content_hash in (None, record.content_hash)
        and {one.text for one in known.captions} <= {one.text for one, _ in record.embedded}
    )
