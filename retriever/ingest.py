"""A folder of pictures → embeddings and rows in a store; what has not changed costs one stat.

Path is identity, content saves work. A file whose size and time stamp are as the catalogue has
them is unchanged. Any other is hashed: equal content keeps its embeddings under a new time stamp,
a new name or a new root, a copy is an item of its own that shares the embedding, and only content
that the store's model has never seen is decoded and encoded.

Nothing waits for anything else: while a batch is committed, the next one is encoded, and pictures
of those after it are hashed and decoded, in as many processes as there are cores. A batch is one
transaction, in the order of the files, so an interrupted run keeps what it has committed and the
next one goes on from there.

Memory is bounded, whatever the pictures' size. `WINDOW` batches of finished pictures wait at most,
size × size × 3 bytes each: 19 MB for 128 of 224 × 224; where a GPU takes batches of 1024, which is
the most, 620 MB, and of 384 × 384 1.8 GB, unless a smaller `batch_size` is given. (An encoder that
does not tell how pictures are finished gets them with up to four times its side, 300 MB.) Each
decoding process takes 30 MB and what its picture needs: of a JPEG of 12 megapixels a few MB more,
because it is decoded smaller, of other formats up to 8 bytes a pixel (a PNG of 100 megapixels took
790 MB).

A file that is no longer listed was removed only if nothing says that it may be out of sight: an
empty root, a link to nothing, a folder that cannot be read, an empty folder that held a thousand.

What is known of a root is held in memory while its files are looked at, one after the other: at
most 50 MB for each 100,000 files, 80 MB if each has a caption (`benchmarks/recheck.py`).
"""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cached_property
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import xxhash
from numpy.typing import NDArray

from indexes.records import FACTS, CaptionRow, Extras, ItemRow, ItemWrite, KnownFile
from retriever.data import Caption, CaptionIndex, Decoded, Facts, Picture, list_pictures
from retriever.errors import FolderGoneError, PictureError, UsageError, printable
from retriever.machine import cores
from retriever.preprocessing import Preprocessing
from retriever.workers import DecodeWorkers

if TYPE_CHECKING:
    from indexes.store import Store
    from indexes.writer import Writer
    from retriever.encoders import Encoder

Progress = Callable[[int, int], None]
Rows = NDArray[np.float32]

BATCH_SIZE = 32  # pictures in one transaction and one call of the encoder
WINDOW = 4  # batches being decoded, decoded or being encoded at any time
HASHERS = 2  # threads: one that reads from the disk while the other computes
HASH_CHUNK_BYTES = 1 << 20
FACTS_SIDE = 64  # pixels: to be hashed perceptually a picture need not be decoded any larger
MANY = 1000  # pictures that are gone from a folder at once, and left it empty: a drive, it seems
EMBEDDED_SOURCES = frozenset({"exif", "iptc", "xmp"})  # captions inside the picture file itself
VANISHED = "went away or changed while the folder was being read"
GIVEN = "given: "  # begins the source of captions from a file that the caller named


@dataclass(frozen=True, slots=True)
class Failure:
    """A picture that could not be read, and why."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True)
class IndexReport:
    """What one run found; every picture listed is counted once, those removed come besides.

    added: new files, copies of known content among them. updated: another content, other captions
    or columns beside them, embedded by a model that had not seen it, or read for what an older
    version did not look for. moved: found again under a new name. removed: no longer on disk.
    unchanged: as before, or equal content under a new time stamp. failed: could not be read, those
    included that failed earlier and have not changed since. problems: folders and captions that
    could not be read, known pictures that are out of sight and were left alone, how many captions
    of a given file match no picture and how many are too long for the model, one sentence each.
    interrupted: the run was stopped; what it did is committed, and the rest is counted nowhere.
    """

    added: int = 0
    updated: int = 0
    moved: int = 0
    removed: int = 0
    unchanged: int = 0
    failed: tuple[Failure, ...] = ()
    problems: tuple[str, ...] = ()
    interrupted: bool = False


def index_folder(
    store: Store,
    encoder: Callable[[], Encoder],
    folder: Path,
    *,
    captions: Path | None = None,
    progress: Progress | None = None,
    batch_size: int | None = None,
    prune: bool = False,
    stop: Callable[[], bool] | None = None,
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
        batch_size: pictures in one transaction; None is what the encoder would have, or
            `BATCH_SIZE`.
        prune: remove pictures that are out of sight as well: those of a folder that is gone or
            empty, and those behind a link to nothing.
        stop: asked between pictures and batches. Once it says yes, the batch that is encoded is
            committed and nothing else is begun.

    Raises:
        UsageError: there is no such folder.
        FolderGoneError: the folder is gone or empty although the store knows pictures in it, as
            when its drive is not mounted; nothing is removed unless `prune` is given.
        CaptionError: the file `captions` cannot be read.
        StoreLockedError: another process is writing.
    """
    return index_folders(
        store,
        encoder,
        [folder],
        captions=captions,
        progress=progress,
        batch_size=batch_size,
        prune=prune,
        stop=stop,
    )


def index_folders(
    store: Store,
    encoder: Callable[[], Encoder],
    folders: Sequence[Path],
    *,
    captions: Path | None = None,
    progress: Progress | None = None,
    batch_size: int | None = None,
    prune: bool = False,
    stop: Callable[[], bool] | None = None,
) -> IndexReport:
    """As `index_folder`, one folder after the other, with one report for all.

    A picture that moved from one of them to another is found whichever of both comes first. If one
    of several is a root that is gone or cannot be read, that is one of the report's `problems`.
    Progress is told of each folder by itself.
    """
    # `Path.resolve` fails on a loop of links.
    named = {Path(os.path.realpath(folder.expanduser())): None for folder in folders}
    # What lies inside another one is looked at with it.
    places = [
        one for one in named if not any(one != two and one.is_relative_to(two) for two in named)
    ]
    with store.writer() as writer:
        run = _Run(store, writer, encoder, progress, batch_size, prune, stop or (lambda: False))
        roots = [path for _, path in store.roots()]
        for place in places:
            if place not in roots:
                run.check(place)
        for place in places:
            try:
                run.index(place, captions)
            except (FolderGoneError, UsageError) as exc:
                if len(places) == 1:
                    raise
                run.problems.append(str(exc))
            if run.interrupted:
                break
        else:
            run.remove_gone()
            writer.finish()
        return run.report()


Outcome = Literal["added", "updated", "moved", "unchanged"]
# The embedding of each text, and whether the model reads it only in part.
_Captions = dict[str, tuple[Rows, bool]]


@dataclass(frozen=True, slots=True, eq=False)
class _Content:
    """What the bytes of a picture tell, which all its copies have in common."""

    embedding: Rows
    width: int
    height: int
    taken: datetime | None
    descriptions: tuple[CaptionRow, ...]
    facts: Facts | None  # None: not looked for yet


@dataclass(slots=True, eq=False)
class _Job:
    """A file that is new or may have changed, on its way through a run."""

    picture: Picture
    before: KnownFile | None
    keeps_given: bool  # whether captions given in an earlier run stay
    beside: tuple[CaptionRow, ...] | None = None  # captions in files beside the picture, once read
    columns: Extras = ()  # what captions files say besides, once `beside` is read
    digest: bytes | None = None
    kept: KnownFile | None = None  # the item whose embedding stays this file's
    decoding: Future[Decoded] | None = None
    looking: Future[Decoded] | None = None  # for the facts alone
    facts: Facts | None = None  # those that the kept item lacks, once they are read
    content: _Content | None = None
    failure: str | None = None

    @property
    def captions(self) -> tuple[CaptionRow, ...]:
        """All captions of the picture, those inside the file last."""
        assert self.beside is not None
        former = self.kept or self.before
        given = _from(former, lambda source: source.startswith(GIVEN)) if self.keeps_given else ()
        if self.is_renamed_in_vain:
            assert self.kept is not None
            tabled = _from(self.kept, _is_tabled)
            given += tuple(CaptionRow(one.text, f"{GIVEN}{one.source}") for one in tabled)
        texts = {one.text for one in self.beside}
        given = tuple(one for one in given if one.text not in texts)
        if self.kept:
            inside = _from(self.kept, EMBEDDED_SOURCES.__contains__)
        else:
            inside = self.content.descriptions if self.content else ()
        return self.beside + given + inside

    @property
    def extras(self) -> Extras:
        """The further columns of the picture."""
        former = self.kept or self.before
        if self.columns or former is None or not former.extras:
            return self.columns
        # They stay where the captions do that came with them.
        is_given = self.keeps_given and any(one.source.startswith(GIVEN) for one in former.captions)
        return former.extras if is_given or self.is_renamed_in_vain else ()

    @property
    def is_renamed_in_vain(self) -> bool:
        """Whether a captions file still has captions of this picture under its former name."""
        if not (self.keeps_given and self.before is None and self.kept):
            return False
        return not any(_is_tabled(one.source) for one in self.beside or ()) and any(
            _is_tabled(one.source) for one in self.kept.captions
        )

    @property
    def needs_picture(self) -> bool:
        """Whether the picture must be embedded, by this model at least."""
        return self.digest is not None and not (self.kept and self.kept.picture_embedded)

    @property
    def needs_facts(self) -> bool:
        """Whether the file must be read for what an older version did not look for."""
        return self.kept is not None and self.kept.facts < FACTS

    @property
    def has_new_extras(self) -> bool:
        return self.kept is not None and self.extras != self.kept.extras

    @property
    def has_new_captions(self) -> bool:
        if self.kept:
            return self.captions != self.kept.captions
        return self.failure is None

    @property
    def needs_captions(self) -> bool:
        """Whether the captions must be embedded, by this model at least."""
        return self.has_new_captions or bool(self.kept and not self.kept.captions_embedded)

    @property
    def outcome(self) -> Outcome:
        if self.before is None:
            return "moved" if self.kept else "added"
        needs_work = self.needs_picture or self.needs_captions or self.needs_facts
        return "updated" if needs_work or self.has_new_extras else "unchanged"


class _Run:
    """One run over one folder, with the store's lock held."""

    def __init__(
        self,
        store: Store,
        writer: Writer,
        encoder: Callable[[], Encoder],
        progress: Progress | None,
        batch_size: int | None,
        prune: bool,
        stop: Callable[[], bool],
    ) -> None:
        self.store = store
        self.writer = writer
        self.load_encoder = encoder
        self.progress = progress
        self.batch_size = batch_size or BATCH_SIZE
        self.encoder_decides = batch_size is None
        self.guard = Lock()  # of both
        self.prune = prune
        self.stop = stop
        self.root = Path()
        self.root_id = 0
        self.captions: Path | None = None  # the file that the caller named
        self.counts: dict[Outcome, int] = dict.fromkeys(get_args(Outcome), 0)
        self.failed: list[Failure] = []
        self.problems: list[str] = []
        self.gone: dict[bytes, list[KnownFile]] = {}  # by content, to be found under a new name
        self.moved: set[int] = set()
        self.removable: set[int] = set()  # unless they are found under a new name after all
        self.whole_roots: list[int] = []  # that were looked at from end to end
        self.removed = 0
        self.interrupted = False
        self.in_flight: set[bytes] = set()  # contents being decoded
        self.n_renamed_in_vain = 0  # pictures whose captions stand under former names
        self.n_cut = 0  # captions that the model does not read to their end

    def encoder(self) -> Encoder:
        """The encoder, loaded when something must be encoded."""
        encoder = self.load_encoder()
        with self.guard:  # to find it out may take a whole tower, and all decoders come at once
            if self.encoder_decides:
                self.batch_size = getattr(encoder, "batch_size", BATCH_SIZE)
                self.encoder_decides = False
        return encoder

    def check(self, folder: Path) -> None:
        """Raises UsageError if there is nothing that could be indexed or pruned."""
        if not _is_there(folder) and not self._count_known(folder):
            raise UsageError(f"{printable(folder)} does not exist; is its drive mounted?")

    def index(self, folder: Path, captions: Path | None) -> None:
        """Brings everything up to date but what is to be removed.

        Raises UsageError, FolderGoneError or CaptionError before anything is done.
        """
        self.check(folder)
        self.__dict__.pop("_reasons", None)  # a folder before may have met new failures
        roots = self.store.roots()
        around = [path for _, path in roots if folder.is_relative_to(path)]
        self.root = min(around, key=lambda path: len(path.parts), default=folder)
        self.captions = captions
        part = "" if folder == self.root else f"{folder.relative_to(self.root).as_posix()}/"
        problems: list[str] = []
        strays: list[str] = []
        # Names in captions files are matched against all pictures of the root.
        sources = CaptionIndex.read(self.root, captions=captions, pictures=self._listed([], []))
        known = self._known(roots)
        jobs: deque[_Job] = deque()
        n_listed = 0
        for picture in self._listed(problems, strays):
            if self.stop():
                self.interrupted = True
                return
            before = known.pop(picture.file, None)
            if picture.file.startswith(part):
                n_listed += 1
                if job := self._job(picture, before, sources):
                    jobs.append(job)
        self.problems += problems
        if n_listed:
            self.root_id = self.writer.add_root(self.root)
            self._take_over_roots_inside(roots)
        elif not self.prune:
            if n_known := self._count_known(folder):
                what = "holds no pictures now" if _is_there(folder) else "is not there"
                raise FolderGoneError(
                    f"{printable(folder)} {what}, but the library knows {n_known:,} pictures there;"
                    " nothing was removed. Mount its drive, or have them removed with --prune."
                )
            return
        gone = self._without_those_out_of_sight(known, all_listed=not problems)
        for former in gone.values():
            if former.status == "ok" and former.content_hash is not None:
                self.gone.setdefault(former.content_hash, []).append(former)
        self._work_off(jobs, sources)
        if self.interrupted:
            return
        removable = {
            former.item_id
            for file, former in self._without_emptied_drives(gone).items()
            if file.startswith(part)
        }
        if removable and not self.prune and not _has_entries(folder):
            self.problems.append(
                f"{printable(folder)} went away while it was read; {_left_alone(len(removable))}"
            )
            self.gone.clear()  # none of these is to be found under a new name
            return
        self.removable |= removable
        if n_listed and not part:
            self.whole_roots.append(self.root_id)
        self.problems += sources.problems
        # Said of a file that was named on purpose. What a folder keeps of deleted pictures is no
        # news.
        if captions and (count := len(strays) + len(sources.unmatched)):
            self.problems.append(
                f"captions that match no picture: {count:,}"
                " (`retriever index --dry-run` lists them)"
            )

    def remove_gone(self) -> None:
        """The end of a run that was not interrupted: nothing more can be found elsewhere."""
        ids = self.removable - self.moved
        with self.writer.together():
            self.writer.remove(ids)
            for root_id in self.whole_roots:
                self.writer.mark_indexed(root_id)
        self.removed = len(ids)

    def report(self) -> IndexReport:
        """What was done."""
        problems = list(self.problems)
        if self.n_renamed_in_vain:
            problems.append(
                f"{self.n_renamed_in_vain:,} moved pictures keep captions that a captions file has"
                " under their former names; correct the names there"
            )
        if self.n_cut:
            encoder = self.encoder()
            are, their = ("caption is", "its") if self.n_cut == 1 else ("captions are", "their")
            problems.append(
                f"{self.n_cut:,} {are} longer than the {encoder.max_text_tokens} tokens that"
                f" {encoder.name} reads; only {their} beginning is searched"
            )
        return IndexReport(
            **self.counts,
            removed=self.removed,
            failed=tuple(self.failed),
            problems=tuple(problems),
            interrupted=self.interrupted,
        )

    def _listed(self, problems: list[str], strays: list[str]) -> Iterable[Picture]:
        if not self.root.is_dir():
            return ()
        return list_pictures(self.root, problems=problems, strays=strays)

    def _count_known(self, folder: Path) -> int:
        return sum(
            (path / file).is_relative_to(folder)
            for root_id, path in self.store.roots()
            if path.is_relative_to(folder) or folder.is_relative_to(path)
            for file in self.store.known_files(root_id)
        )

    def _known(self, roots: Iterable[tuple[int, Path]]) -> dict[str, KnownFile]:
        """Everything known by its path below the root, roots inside it included."""
        ids = {path: root_id for root_id, path in roots if path.is_relative_to(self.root)}
        root_id = ids.pop(self.root, None)
        known = {} if root_id is None else self.store.known_files(root_id)
        for path, inner_id in ids.items():
            inside = self.store.known_files(inner_id)
            if inside and not self.prune and not _has_entries(path):
                self.problems.append(
                    f"{printable(path)} is empty or not there; {_left_alone(len(inside))}"
                )
                continue
            prefix = path.relative_to(self.root).as_posix()
            known |= {f"{prefix}/{file}": one for file, one in inside.items()}
        return known

    def _take_over_roots_inside(self, roots: Iterable[tuple[int, Path]]) -> None:
        inside = [
            (root_id, path)
            for root_id, path in roots
            if path != self.root and path.is_relative_to(self.root)
            if self.prune or _has_entries(path)
        ]
        if not inside:
            return
        with self.writer.together():
            for root_id, path in inside:
                prefix = path.relative_to(self.root).as_posix()
                self.writer.absorb_root(self.root_id, root_id, prefix)

    def _job(
        self, picture: Picture, before: KnownFile | None, sources: CaptionIndex
    ) -> _Job | None:
        """The work that a picture needs; if it needs none it is counted here."""
        job = _Job(picture, before, keeps_given=self.captions is None)
        if before is None or not _is_same_file(picture, before):
            return job
        self._look_beside(job, sources)
        if before.status == "failed":
            # Without a hash not even its bytes could be read: that may pass (a drive, rights).
            is_as_before = before.captions == job.captions and before.extras == job.extras
            if before.content_hash is None or not is_as_before:
                return job
            self.failed.append(Failure(picture.path, self._reasons[before.item_id] or ""))
            return None
        job.digest, job.kept = before.content_hash, before
        if job.outcome == "updated":
            return job
        self.counts["unchanged"] += 1
        return None

    def _look_beside(self, job: _Job, sources: CaptionIndex) -> None:
        """Fills in what files beside the picture say."""
        found = sources.for_picture(job.picture)
        job.beside = tuple(CaptionRow(one.text, _source(one, self.captions)) for one in found)
        job.columns = sources.extras_of(job.picture)

    @cached_property
    def _reasons(self) -> dict[int, str | None]:
        return {item.item_id: item.reason for item in self.store.failures()}

    def _without_those_out_of_sight(
        self, missing: Mapping[str, KnownFile], *, all_listed: bool
    ) -> dict[str, KnownFile]:
        """Known files that were not listed because they are gone.

        Others are behind a link whose target is not there, as when its drive is not mounted, or in
        a folder that cannot be read: a file counts as gone only if looking for it says so.
        """
        gone: dict[str, KnownFile] = {}
        dangling = _DanglingLinks(self.root)
        behind: dict[str, int] = {}
        for file, former in missing.items():
            link = None if self.prune else dangling.on_the_way_to(file)
            if link is not None:
                behind[link] = behind.get(link, 0) + 1
            elif all_listed or not _may_exist(self.root / file):
                gone[file] = former
        self.problems += [
            f"{printable(link)}: a link to nothing; {_left_alone(count)}"
            for link, count in behind.items()
        ]
        return gone

    def _without_emptied_drives(self, gone: Mapping[str, KnownFile]) -> dict[str, KnownFile]:
        """The files that are gone, but for those of a folder that looks like a bare mount point.

        It is there, holds nothing at all, and many pictures are known in it that are nowhere else.
        """
        if self.prune:
            return dict(gone)
        nearest: dict[str, str] = {}  # of each folder that held one: the nearest that is there
        inside: dict[str, list[str]] = {}
        for file, former in gone.items():
            folder = file.rpartition("/")[0]
            if folder not in nearest:
                place = self.root / folder
                while not place.is_dir():
                    place = place.parent
                nearest[folder] = str(place)
            if former.item_id not in self.moved:
                inside.setdefault(nearest[folder], []).append(file)
        left = dict(gone)
        for folder, files in inside.items():
            if len(files) >= MANY and Path(folder) != self.root and not _has_entries(Path(folder)):
                self.problems.append(f"{printable(folder)} is empty; {_left_alone(len(files))}")
                for file in files:
                    del left[file]
        return left

    def _work_off(self, jobs: deque[_Job], sources: CaptionIndex) -> None:
        total, done = len(jobs), 0
        if not total:
            return
        report = self.progress or (lambda done, total: None)
        report(done, total)
        crew = _Crew()
        started: deque[list[_Job]] = deque()
        hashed = self._hashed(crew, jobs, sources)

        def fill_window() -> None:
            while len(started) < WINDOW and (batch := list(islice(hashed, self.batch_size))):
                self._start_decoding(crew, batch)
                started.append(batch)

        def start_encoding() -> Future[_Captions] | None:
            if not started or self.stop():
                return None
            return crew.encoding.submit(self._encode, crew, started[0])

        try:
            fill_window()
            encoding = start_encoding()
            while encoding:
                captions = encoding.result()
                batch = started.popleft()
                encoding = start_encoding()
                self._settle(crew, batch, captions)
                done += len(batch)
                report(done, total)
                if encoding:
                    fill_window()
        finally:
            crew.close()
        self.interrupted = done < total

    def _hashed(self, crew: _Crew, jobs: deque[_Job], sources: CaptionIndex) -> Iterator[_Job]:
        """The jobs in their order, taken from the queue, each with its digest or its failure."""
        ahead: deque[tuple[_Job, Future[bytes] | None]] = deque()
        while jobs or ahead:
            while jobs and len(ahead) < self.batch_size:
                job = jobs.popleft()
                path = job.picture.path
                hashing = None if job.digest else crew.hashing.submit(content_hash, path)
                ahead.append((job, hashing))
            job, hashing = ahead.popleft()
            if job.beside is None:
                self._look_beside(job, sources)
            try:
                job.digest = hashing.result() if hashing else job.digest
            except FileNotFoundError:
                job.failure = VANISHED
            except OSError as exc:
                job.failure = f"cannot be read: {exc.strerror}"
            yield job

    def _start_decoding(self, crew: _Crew, batch: Sequence[_Job]) -> None:
        """Decodes, in the background, what neither the store nor this run has seen."""
        stored = self.store.find_by_hash(_digests(batch))
        for job in batch:
            if job.digest is None:
                continue
            job.kept = job.kept or self._kept(job, stored.get(job.digest))
            if job.needs_picture and not (job.digest in stored or job.digest in self.in_flight):
                self.in_flight.add(job.digest)
                job.decoding = crew.decoding.submit(self._read, crew, job.picture.path)
            elif job.needs_facts and not job.needs_picture:
                path = job.picture.path
                job.looking = crew.decoding.submit(crew.workers.read, path, target=FACTS_SIDE)

    def _kept(self, job: _Job, twin_id: int | None) -> KnownFile | None:
        """The item that this file still is: by its path, or by the path that it had before."""
        before = job.before
        if before is not None:
            is_equal = before.status == "ok" and before.content_hash == job.digest
            return before if is_equal else None
        formers = self.gone.get(job.digest or b"", [])
        if not formers and twin_id is not None and twin_id not in self.moved:
            twins = self.store.items([twin_id])
            formers = [_known_file(twin) for twin in twins if self._left_another_root(twin)]
        if not formers:
            return None
        self.moved.add(formers[0].item_id)
        return formers.pop(0)

    def _left_another_root(self, item: ItemRow) -> bool:
        """Whether an item's file is gone from another root, which is there itself."""
        return (
            item.root != self.root
            and _has_entries(item.root)
            and not _may_exist(item.path)
            and _DanglingLinks(item.root).on_the_way_to(item.file) is None
        )

    def _read(self, crew: _Crew, path: Path) -> Decoded:
        encoder = self.encoder()
        preprocessing = getattr(encoder, "preprocessing", None)
        if not isinstance(preprocessing, Preprocessing):
            preprocessing = None
        return crew.workers.read(path, target=encoder.image_size, preprocessing=preprocessing)

    def _encode(self, crew: _Crew, batch: Sequence[_Job]) -> _Captions:
        """Fills in the contents that are being decoded; gives the captions that are known then."""
        self._encode_pictures(crew, [job for job in batch if job.decoding])
        for job in batch:
            _find_facts(job)
        return self._encode_captions(_texts(batch))

    def _encode_pictures(self, crew: _Crew, jobs: Sequence[_Job]) -> None:
        """Fills in the content of each job, or why there is none."""
        decoded: dict[bytes, Decoded] = {}
        for job in jobs:
            assert job.digest is not None
            if job.digest in decoded:
                continue
            try:
                path = job.picture.path
                read = job.decoding.result() if job.decoding else self._read(crew, path)
                decoded[job.digest] = read
            except PictureError as exc:
                # The report names the file already.
                job.failure = str(exc).removeprefix(f"{printable(job.picture.path)}: ")
                if not _is_as_listed(job.picture):
                    # It went away or changed meanwhile: that says nothing about its content.
                    job.failure, job.digest = VANISHED, None
            job.decoding = None  # lets go of the pixels
        if not decoded:
            return
        contents = {}
        rows = self.encoder().encode_images([one.image for one in decoded.values()])
        for (digest, one), row in zip(decoded.items(), rows, strict=True):
            inside = tuple(CaptionRow(two.text, two.source) for two in one.descriptions)
            contents[digest] = _Content(row, one.width, one.height, one.taken, inside, one.facts)
        for job in jobs:
            if job.failure is None and job.digest is not None:
                job.content = contents[job.digest]

    def _encode_captions(self, texts: Collection[str]) -> _Captions:
        """Embeddings of texts."""
        if not texts:
            return {}
        ordered, encoder = sorted(texts), self.encoder()
        rows, is_cut = encoder.encode_texts(ordered), encoder.is_cut(ordered)
        return dict(zip(ordered, zip(rows, is_cut, strict=True), strict=True))

    def _settle(self, crew: _Crew, batch: Sequence[_Job], captions: _Captions) -> None:
        """Writes a batch in one transaction."""
        self._find_contents(crew, batch)
        if unknown := set(_texts(batch)) - captions.keys():  # those inside a copy's twin
            captions |= crew.encoding.submit(self._encode_captions, unknown).result()
        self.n_cut += sum(captions[text][1] for text in _texts(batch))

        def embed(job: _Job) -> Rows | None:
            if not job.needs_captions or not job.captions:
                return None
            return np.stack([captions[one.text][0] for one in job.captions])

        with self.writer.together():
            for job in batch:
                if job.kept:
                    self._keep(job, job.kept, embed)
            writes = [_item_write(job, embed) for job in batch if not job.kept]
            self.writer.write(self.root_id, writes)
        self.in_flight -= _digests(batch)
        self.n_renamed_in_vain += sum(job.is_renamed_in_vain for job in batch)
        for job in batch:
            if job.failure is None:
                self.counts[job.outcome] += 1
            else:
                self.failed.append(Failure(job.picture.path, job.failure))

    def _find_contents(self, crew: _Crew, batch: Sequence[_Job]) -> None:
        """Fills in the content of copies, which their twins have or had before them."""
        copies = [
            job
            for job in batch
            if job.needs_picture and job.content is None and job.failure is None
        ]
        if not copies:
            return
        contents = self._stored_contents(_digests(copies))
        contents |= {job.digest: job.content for job in batch if job.digest and job.content}
        for job in copies:
            job.content = contents.get(job.digest or b"")
        # A copy whose twin failed after all has not been decoded yet.
        if left := [job for job in copies if job.content is None]:
            crew.encoding.submit(self._encode_pictures, crew, left).result()

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
                _facts(item),
            )
            for item, row in zip(items, rows, strict=True)
            if item.content_hash is not None
        }

    def _keep(self, job: _Job, kept: KnownFile, embed: Callable[[_Job], Rows | None]) -> None:
        one = job.picture
        if job.before is None:
            self.writer.move(kept.item_id, self.root_id, one.file, one.size, one.mtime_ns)
        elif not _is_same_file(one, kept):
            self.writer.touch(kept.item_id, one.size, one.mtime_ns)
        if job.has_new_captions:
            self.writer.set_captions(kept.item_id, job.captions, embed(job))
        if job.has_new_extras:
            self.writer.set_extras(kept.item_id, job.extras)
        facts = job.facts or (job.content.facts if job.content else None)
        if facts and job.needs_facts:
            self.writer.set_facts(kept.item_id, **asdict(facts))
        image = job.content.embedding if job.content else None
        texts = embed(job) if job.needs_captions and not job.has_new_captions else None
        if image is not None or texts is not None:
            self.writer.embed(kept.item_id, image, texts)


class _Crew:
    """The threads and processes that work for a run."""

    def __init__(self) -> None:
        count = cores()
        self.workers = DecodeWorkers(count)
        self.hashing = ThreadPoolExecutor(HASHERS, "hash")
        self.decoding = ThreadPoolExecutor(count, "decode")
        self.encoding = ThreadPoolExecutor(1, "encode")  # the encoder has threads of its own

    def close(self) -> None:
        """Ends all of them: what is being done now is wanted no more."""
        self.workers.close()
        for pool in (self.hashing, self.decoding, self.encoding):
            pool.shutdown(cancel_futures=True)


def content_hash(path: Path) -> bytes:
    """XXH3-128 of a file's bytes, 16 bytes; raises OSError."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.digest()


class _DanglingLinks:
    """Finds links to nothing, as a linked folder is while its drive is not mounted."""

    def __init__(self, root: Path) -> None:
        self._root = os.fspath(root)
        self._in_folder: dict[str, str | None] = {"": None}

    def on_the_way_to(self, file: str) -> str | None:
        """The link at a path below the root, or at a folder above that, which leads nowhere."""
        folder = file.rpartition("/")[0]
        if folder not in self._in_folder:
            self._in_folder[folder] = self.on_the_way_to(folder)
        path = f"{self._root}/{file}"
        is_dangling = os.path.islink(path) and not os.path.exists(path)  # noqa: PTH110, PTH114
        return self._in_folder[folder] or (file if is_dangling else None)


def _is_there(folder: Path) -> bool:
    """Whether a folder exists; raises UsageError if it is none, or nobody may look."""
    try:
        mode = folder.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as exc:
        raise UsageError(f"{printable(folder)} cannot be read: {exc.strerror}") from exc
    if not stat.S_ISDIR(mode):
        raise UsageError(f"{printable(folder)} is no folder")
    return True


def _left_alone(count: int) -> str:
    return f"known pictures left alone there: {count:,} (--prune removes them)"


def _has_entries(folder: Path) -> bool:
    """Whether there is anything in a folder; the mount point of a missing drive is empty."""
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is not None
    except OSError:
        return False


def _known_file(item: ItemRow) -> KnownFile:
    """What is known of an item that has its picture embedded; of its captions that is open."""
    return KnownFile(
        item.item_id,
        item.file,
        item.size,
        item.mtime_ns,
        item.content_hash,
        item.status,
        item.captions,
        captions_embedded=not item.captions,
        extras=item.extras,
        facts=item.facts,
    )


def _find_facts(job: _Job) -> None:
    """Fills in the facts that were looked for alone."""
    if job.looking is None:
        return
    try:
        job.facts = job.looking.result().facts
    except PictureError:
        # This content could be decoded once. Whatever it is now, no run tries it again.
        job.facts = Facts() if _is_as_listed(job.picture) else None
    job.looking = None


def _facts(item: ItemRow) -> Facts | None:
    """What the store knows of a file beside its content, if that was looked for."""
    if item.facts < FACTS:
        return None
    return Facts(item.camera, item.latitude, item.longitude, item.perceptual_hash)


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


def _is_as_listed(picture: Picture) -> bool:
    try:
        status = picture.path.stat()
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (picture.size, picture.mtime_ns)


def _is_tabled(source: str) -> bool:
    """Whether a caption is from a captions file that was found in the folder."""
    return source != "sidecar" and source not in EMBEDDED_SOURCES and not source.startswith(GIVEN)


def _source(caption: Caption, given: Path | None) -> str:
    if given is None or caption.source == "sidecar":
        return caption.source
    return f"{GIVEN}{printable(given.name)}"


def _from(
    item: KnownFile | ItemRow | None, is_wanted: Callable[[str], bool]
) -> tuple[CaptionRow, ...]:
    """Those of an item's captions that are from a wanted source."""
    if item is None or not item.captions:
        return ()
    return tuple(one for one in item.captions if is_wanted(one.source))


def _texts(jobs: Iterable[_Job]) -> list[str]:
    return [one.text for job in jobs if job.needs_captions for one in job.captions]


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
            extras=job.extras,
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
        extras=job.extras,
        facts=FACTS if content.facts else 0,
        **asdict(content.facts or Facts()),
    )
