"""A folder of pictures → embeddings and rows in a store; what has not changed costs one stat.

Path is identity, content saves work. A file whose size and time stamp are as the catalogue has
them is unchanged. Any other is hashed: equal content keeps its embeddings under a new time stamp
or a new name, a copy is an item of its own that shares the embedding, and only content that the
store has never seen is decoded and encoded.

Decoding runs in a few threads ahead of the encoder, with `WINDOW` batches of pictures in memory.
A batch is one transaction, so an interrupted run keeps what it has committed and the next one goes
on from there.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import xxhash
from numpy.typing import NDArray

from indexes.records import CaptionRow, ItemRow, ItemWrite, KnownFile
from retriever.captions import printable
from retriever.data import Caption, CaptionIndex, Decoded, Picture, list_pictures, read_image
from retriever.errors import PictureError, RetrieverError, UsageError

if TYPE_CHECKING:
    from indexes.store import Store, Writer
    from retriever.encoders import Encoder

Progress = Callable[[int, int], None]
Rows = NDArray[np.float32]

BATCH_SIZE = 32  # pictures in one transaction and one call of the encoder
WINDOW = 3  # batches decoded or being decoded at any time
HASH_CHUNK_BYTES = 1 << 20
EMBEDDED_SOURCES = frozenset({"exif", "iptc", "xmp"})  # captions inside the picture file itself
GIVEN = "given: "  # begins the source of captions from a file that the caller named


@dataclass(frozen=True, slots=True)
class Failure:
    """A picture that could not be read, and why."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True)
class IndexReport:
    """What one run found; every picture listed is counted once, those removed come besides.

    added: new files, copies of known content among them. updated: another content or other
    captions. moved: found again under a new name. removed: no longer on disk. unchanged: as before,
    or equal content under a new time stamp. failed: could not be read, those included that failed
    earlier and have not changed since. problems: folders and captions that could not be read, and
    how many captions of a given file match no picture, one sentence each.
    """

    added: int = 0
    updated: int = 0
    moved: int = 0
    removed: int = 0
    unchanged: int = 0
    failed: tuple[Failure, ...] = ()
    problems: tuple[str, ...] = ()


def index_folder(
    store: Store,
    encoder: Callable[[], Encoder],
    folder: Path,
    *,
    captions: Path | None = None,
    progress: Progress | None = None,
    batch_size: int = BATCH_SIZE,
) -> IndexReport:
    """Brings the store up to date with a folder and says what that took.

    Roots never overlap. A folder inside a root of the store is indexed as that part of the root; a
    folder around earlier roots takes their items over. Captions are those beside the pictures, in
    `captions` or else in the root's own captions files, and inside the pictures; those from a file
    named in an earlier run stay until another one is named.

    Args:
        store: locked for writing meanwhile.
        encoder: gives the encoder of this store; called only if something must be encoded.
        folder: searched recursively, as `retriever.data.list_pictures` does.
        captions: a captions file, read instead of those in the root.
        progress: called with (done, total) of the pictures that need work, at the start and after
            every batch; never if nothing has changed.
        batch_size: pictures in one transaction.

    Raises:
        UsageError: there is no such folder.
        RetrieverError: the folder is empty although the store knows pictures in it, as when its
            drive is not mounted; nothing is removed.
        CaptionError: the file `captions` cannot be read.
        StoreLockedError: another process is writing.
    """
    folder = folder.expanduser().resolve()
    if not folder.is_dir():
        fault = "is no folder" if folder.exists() else "does not exist; is its drive mounted?"
        raise UsageError(f"{folder} {fault}")
    with store.writer() as writer:
        run = _Run(store, writer, encoder, progress, batch_size)
        report = run.index(folder, captions)
        writer.finish()
    return report


Outcome = Literal["added", "updated", "moved", "unchanged"]


@dataclass(frozen=True, slots=True, eq=False)
class _Content:
    """What the bytes of a picture tell, which all its copies have in common."""

    embedding: Rows
    width: int
    height: int
    taken: datetime | None
    descriptions: tuple[CaptionRow, ...]


@dataclass(slots=True, eq=False)
class _Job:
    """A file that is new or may have changed, on its way through a run."""

    picture: Picture
    before: KnownFile | None
    beside: tuple[CaptionRow, ...]  # captions found in files beside the picture
    keeps_given: bool  # whether captions given in an earlier run stay
    digest: bytes | None = None
    kept: KnownFile | None = None  # the item whose embedding stays this file's
    decoding: Future[Decoded] | None = None
    content: _Content | None = None
    failure: str | None = None

    @property
    def captions(self) -> tuple[CaptionRow, ...]:
        """All captions of the picture, those inside the file last."""
        former = self.kept or self.before
        given = _from(former, lambda source: source.startswith(GIVEN)) if self.keeps_given else ()
        if self.kept:
            inside = _from(self.kept, EMBEDDED_SOURCES.__contains__)
        else:
            inside = self.content.descriptions if self.content else ()
        return self.beside + given + inside

    @property
    def has_new_captions(self) -> bool:
        return self.failure is None and self.captions != (self.kept.captions if self.kept else ())

    @property
    def outcome(self) -> Outcome:
        if self.before is None:
            return "moved" if self.kept else "added"
        return "updated" if self.kept is None or self.has_new_captions else "unchanged"


class _Run:
    """One run over one folder, with the store's lock held."""

    def __init__(
        self,
        store: Store,
        writer: Writer,
        encoder: Callable[[], Encoder],
        progress: Progress | None,
        batch_size: int,
    ) -> None:
        self.store = store
        self.writer = writer
        self.encoder = encoder
        self.progress = progress
        self.batch_size = batch_size
        self.root_id = 0
        self.counts: dict[Outcome, int] = dict.fromkeys(get_args(Outcome), 0)
        self.failed: list[Failure] = []
        self.gone: dict[bytes, list[KnownFile]] = {}  # by content, to be found under a new name
        self.moved: set[int] = set()
        self.in_flight: set[bytes] = set()  # contents being decoded

    def index(self, folder: Path, captions: Path | None) -> IndexReport:
        roots = self.store.roots()
        around = [path for _, path in roots if folder.is_relative_to(path)]
        root = min(around, key=lambda path: len(path.parts), default=folder)
        problems: list[str] = []
        # Names in captions files are matched against all pictures of the root.
        listed = list(list_pictures(root, problems=problems))
        pictures = [one for one in listed if one.path.is_relative_to(folder)]
        if not pictures:
            self._refuse_empty_folder(folder, roots)
            return IndexReport(problems=tuple(problems))
        sources = CaptionIndex.read(root, captions=captions, pictures=listed)

        self.root_id = self.writer.add_root(root)
        self._take_over_roots_inside(root, roots)
        known = self.store.known_files(self.root_id)
        gone = _gone(listed, known, root, all_listed=not problems)
        for _, former in gone:
            if former.status == "ok" and former.content_hash is not None:
                self.gone.setdefault(former.content_hash, []).append(former)
        self._work_off(self._jobs(pictures, known, sources, captions))
        removed = [
            former.item_id
            for path, former in gone
            if path.is_relative_to(folder) and former.item_id not in self.moved
        ]
        self.writer.remove(removed)
        return IndexReport(
            **self.counts,
            removed=len(removed),
            failed=tuple(self.failed),
            problems=(*problems, *sources.report.problems, *_unmatched(sources, captions)),
        )

    def _refuse_empty_folder(self, folder: Path, roots: Sequence[tuple[int, Path]]) -> None:
        paths = (path / file for id_, path in roots for file in self.store.known_files(id_))
        if known := sum(path.is_relative_to(folder) for path in paths):
            raise RetrieverError(
                f"{folder} holds no pictures now, but the library knows {known} there; nothing was"
                " removed. Mount its drive, or remove the folder from the library."
            )

    def _take_over_roots_inside(self, root: Path, roots: Sequence[tuple[int, Path]]) -> None:
        with self.writer.together():
            for root_id, path in roots:
                if path != root and path.is_relative_to(root):
                    for file, known in self.store.known_files(root_id).items():
                        here = (path.relative_to(root) / file).as_posix()
                        self.writer.move(
                            known.item_id, self.root_id, here, known.size, known.mtime_ns
                        )

    def _jobs(
        self,
        pictures: Sequence[Picture],
        known: Mapping[str, KnownFile],
        sources: CaptionIndex,
        captions: Path | None,
    ) -> deque[_Job]:
        """The pictures that need work; the others are counted here."""
        reasons = {item.item_id: item.reason for item in self.store.failures()}
        jobs: deque[_Job] = deque()
        for picture in pictures:
            before = known.get(picture.file)
            beside = tuple(
                CaptionRow(one.text, _source(one, captions)) for one in sources.for_picture(picture)
            )
            job = _Job(picture, before, beside, keeps_given=captions is None)
            if before is None or not _is_same_file(picture, before):
                jobs.append(job)
            elif before.status == "failed":
                # Without a hash not even its bytes could be read: that may pass (a drive, rights).
                if before.content_hash is None or before.captions != job.captions:
                    jobs.append(job)
                else:
                    reason = reasons[before.item_id] or ""
                    self.failed.append(Failure(picture.path, reason))
            else:
                job.digest, job.kept = before.content_hash, before
                if job.has_new_captions:
                    jobs.append(job)
                else:
                    self.counts["unchanged"] += 1
        return jobs

    def _work_off(self, jobs: deque[_Job]) -> None:
        total, done = len(jobs), 0
        if not total:
            return
        report = self.progress or (lambda done, total: None)
        report(done, total)
        pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "decode")
        try:
            started: deque[list[_Job]] = deque()
            hashed = self._hashed(pool, jobs)
            while True:
                if batch := list(islice(hashed, self.batch_size)):
                    self._start_decoding(pool, batch)
                    started.append(batch)
                if not started:
                    break
                if len(started) == WINDOW or not batch:
                    settled = started.popleft()
                    self._settle(settled)
                    done += len(settled)
                    report(done, total)
        finally:
            pool.shutdown(cancel_futures=True)

    def _hashed(self, pool: ThreadPoolExecutor, jobs: deque[_Job]) -> Iterator[_Job]:
        """The jobs in their order, taken from the queue, each with its digest or its failure."""
        ahead: deque[tuple[_Job, Future[bytes] | None]] = deque()
        while jobs or ahead:
            while jobs and len(ahead) < self.batch_size:
                job = jobs.popleft()
                path = job.picture.path
                ahead.append((job, None if job.digest else pool.submit(content_hash, path)))
            job, hashing = ahead.popleft()
            try:
                job.digest = hashing.result() if hashing else job.digest
            except FileNotFoundError:
                job.failure = "vanished while the folder was being read"
            except OSError as exc:
                job.failure = f"cannot be read: {exc.strerror}"
            yield job

    def _start_decoding(self, pool: ThreadPoolExecutor, batch: Sequence[_Job]) -> None:
        """Decodes, in the background, what neither the store nor this run has seen."""
        stored = self.store.find_by_hash(_digests(batch))
        for job in batch:
            if job.digest is None:
                continue
            job.kept = job.kept or self._kept(job)
            if not (job.kept or job.digest in stored or job.digest in self.in_flight):
                self.in_flight.add(job.digest)
                job.decoding = pool.submit(self._read, job.picture.path)

    def _kept(self, job: _Job) -> KnownFile | None:
        """The item that this file still is: by its path, or by the path that it had before."""
        before = job.before
        if before is not None:
            is_equal = before.status == "ok" and before.content_hash == job.digest
            return before if is_equal else None
        formers = self.gone.get(job.digest or b"")
        if not formers:
            return None
        self.moved.add(formers[0].item_id)
        return formers.pop(0)

    def _read(self, path: Path) -> Decoded:
        return read_image(path, target=self.encoder().image_size)

    def _settle(self, batch: Sequence[_Job]) -> None:
        """Encodes what a batch needs, then writes all of it in one transaction."""
        self._find_contents([job for job in batch if job.digest and not job.kept])
        embed = self._caption_embeddings(batch)
        with self.writer.together():
            for job in batch:
                if job.kept:
                    self._keep(job, job.kept, embed)
            writes = [_item_write(job, embed) for job in batch if not job.kept]
            self.writer.write(self.root_id, writes)
        self.in_flight -= _digests(batch)
        for job in batch:
            if job.failure is None:
                self.counts[job.outcome] += 1
            else:
                self.failed.append(Failure(job.picture.path, job.failure))

    def _find_contents(self, jobs: Sequence[_Job]) -> None:
        """Fills in the content of each job, once for all copies, or why there is none."""
        contents = self._stored_contents(_digests(jobs))
        decoded: dict[bytes, Decoded] = {}
        for job in jobs:
            assert job.digest is not None
            if job.digest in contents or job.digest in decoded:
                continue
            try:
                # A copy whose twin failed after all has not been decoded yet.
                decoded[job.digest] = (
                    job.decoding.result() if job.decoding else self._read(job.picture.path)
                )
            except PictureError as exc:
                # The report names the file already.
                job.failure = str(exc).removeprefix(f"{printable(job.picture.path)}: ")
        if decoded:
            rows = self.encoder().encode_images([one.image for one in decoded.values()])
            for (digest, one), row in zip(decoded.items(), rows, strict=True):
                inside = tuple(CaptionRow(two.text, two.source) for two in one.descriptions)
                contents[digest] = _Content(row, one.width, one.height, one.taken, inside)
        for job in jobs:
            if job.failure is None and job.digest is not None:
                job.content = contents[job.digest]

    def _stored_contents(self, digests: Collection[bytes]) -> dict[bytes, _Content]:
        twins = self.store.find_by_hash(digests)
        items = self.store.items(list(twins.values()))
        rows = self.store.embeddings("image", [item.item_id for item in items])
        return {
            item.content_hash: _Content(
                row,
                item.width,
                item.height,
                item.taken,
                _from(item, EMBEDDED_SOURCES.__contains__),
            )
            for item, row in zip(items, rows, strict=True)
            if item.content_hash is not None
        }

    def _caption_embeddings(self, batch: Sequence[_Job]) -> Callable[[_Job], Rows | None]:
        """A function from a job to its captions' (n, d) embeddings, each text encoded once."""
        texts = {one.text for job in batch if job.has_new_captions for one in job.captions}
        row_of = {text: row for row, text in enumerate(sorted(texts))}
        rows = self.encoder().encode_texts(list(row_of)) if texts else None

        def embed(job: _Job) -> Rows | None:
            if rows is None or not job.captions:
                return None
            return np.ascontiguousarray(rows[[row_of[one.text] for one in job.captions]])

        return embed

    def _keep(self, job: _Job, kept: KnownFile, embed: Callable[[_Job], Rows | None]) -> None:
        one = job.picture
        if job.before is None:
            self.writer.move(kept.item_id, self.root_id, one.file, one.size, one.mtime_ns)
        elif not _is_same_file(one, kept):
            self.writer.touch(kept.item_id, one.size, one.mtime_ns)
        if job.has_new_captions:
            self.writer.set_captions(kept.item_id, job.captions, embed(job))


def content_hash(path: Path) -> bytes:
    """XXH3-128 of a file's bytes, 16 bytes; raises OSError."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.digest()


def _gone(
    listed: Iterable[Picture], known: Mapping[str, KnownFile], root: Path, *, all_listed: bool
) -> list[tuple[Path, KnownFile]]:
    """Known files that are no longer there.

    If a folder could not be listed, a file counts as gone only if looking for it says so.
    """
    here = {picture.file for picture in listed}
    missing = [(root / file, former) for file, former in known.items() if file not in here]
    return [one for one in missing if all_listed or not _may_exist(one[0])]


def _unmatched(sources: CaptionIndex, given: Path | None) -> Iterator[str]:
    # Said of a file that was named on purpose. What a folder keeps of deleted pictures is no news.
    if given and (count := len(sources.report.unmatched)):
        yield f"captions that match no picture: {count:,} (`retriever index --dry-run` lists them)"


def _may_exist(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def _is_same_file(picture: Picture, known: KnownFile) -> bool:
    return (picture.size, picture.mtime_ns) == (known.size, known.mtime_ns)


def _source(caption: Caption, given: Path | None) -> str:
    if given is None or caption.source == "sidecar":
        return caption.source
    return f"{GIVEN}{printable(given.name)}"


def _from(
    item: KnownFile | ItemRow | None, is_wanted: Callable[[str], bool]
) -> tuple[CaptionRow, ...]:
    """Those of an item's captions that are from a wanted source."""
    return tuple(one for one in (item.captions if item else ()) if is_wanted(one.source))


def _digests(jobs: Iterable[_Job]) -> set[bytes]:
    return {job.digest for job in jobs if job.digest is not None}


def _item_write(job: _Job, embed: Callable[[_Job], Rows | None]) -> ItemWrite:
    one, content = job.picture, job.content
    if content is None:
        return ItemWrite(
            one.file,
            one.size,
            one.mtime_ns,
            job.digest,
            width=0,
            height=0,
            captions=job.captions,
            failure=job.failure,
        )
    return ItemWrite(
        one.file,
        one.size,
        one.mtime_ns,
        job.digest,
        content.width,
        content.height,
        content.taken,
        job.captions,
        content.embedding,
        embed(job),
    )
