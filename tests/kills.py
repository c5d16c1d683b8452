"""Kills an indexing process again and again, and checks what is left: the harness.

    python tests/kills.py FOLDER --kills 25 --seed 0        one JSON object a line

A child process lives the life of a small library: it indexes two folders, changes files, indexes
again, builds approximate indexes, forgets a folder, rebuilds and compacts. It is killed with
SIGKILL in one of two ways:

    clock   by its parent, after a time drawn uniformly from the length of an undisturbed life
    event   by itself, at an event drawn uniformly from those of one step of an undisturbed life:
            a call or a return of a function in `indexes` or `retriever.ingest`, a call made there
            to a function in C, or one to SQLite from anywhere. So every gap between two calls is
            reached (before and after a commit, a sync, a rename, inside the callback of FAISS's
            writer) and the program needs no hook for it.

Some are killed once more while they go on. After each kill a copy of the library must open, be
clean, hold all that the child had seen committed and nothing twice, and answer as brute force does;
what the killed process left is touched by the next run only. That one must come to the very rows,
vectors, answers and files of a life that nobody disturbed.

This process forks its children, which saves them the start, so it stays free of threads.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
from conftest import ToyEncoder
from PIL import Image

from indexes.care import repair
from indexes.errors import StoreNotFoundError
from indexes.filters import Words
from indexes.store import ModelSpec, Store

ROOT = Path(__file__).parents[1]
WATCHED = tuple(str(ROOT / path) for path in ("indexes", "retriever/ingest.py"))
BATCH_SIZE = 3  # pictures: many transactions in a short life
LEAST_ROWS = 20  # vectors of a kind that an approximate index is built of
HANG_SECONDS = 120.0
AGAIN = 0.4  # share of trials that are killed once more
QUERIES = ("red", "green and blue", "a white square", "nothing that has a colour")
MODEL = ModelSpec("toy", ToyEncoder.dim, "toy-1")
FIRST_DAY = 1_700_000_000  # the time stamp of the first file, seconds


# ------------------------------------------------------------------------------------ the pictures


def paint_stage(stage: Path) -> None:
    """The folders that a life begins with (`before`), and what it puts over them (`after`).

    No picture changes in two ways, so that each step of the changes takes one picture from its
    first state to its last, wherever the process dies.
    """
    rng = random.Random(0)

    def at(name: str, when: str) -> Path:
        path = stage / when / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def picture(name: str, when: str = "before", *, inside: str | None = None) -> Path:
        colour = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        made = Image.new("RGB", (rng.randrange(6, 14), rng.randrange(6, 14)), colour)
        exif = Image.Exif()
        if inside:
            exif[0x010E], exif[0x0132] = inside, "2024:05:06 07:08:09"  # description, date
        made.save(at(name, when), exif=exif)
        return at(name, when)

    def text(name: str, words: str, when: str = "before") -> None:
        at(name, when).write_text(words, encoding="utf-8")

    plain = [picture(f"plain/{n:02}.png") for n in range(16)]
    for n in range(0, 16, 3):
        text(f"plain/{n:02}.txt", f"plain red {n}\nplain blue {n}\n")
    for n in range(3):
        shutil.copy(plain[n], at(f"copies/{n}.png", "before"))
        picture(f"inside/{n}.jpg", inside=f"a green picture {n}")
        picture(f"listed/{n}.png")
        picture(f"renamed/{n}.png")
        picture(f"deleted/{n}.png")
        picture(f"edited/{n}.png")
        picture(f"edited/{n}.png", "after")
        shutil.copy(picture(f"touched/{n}.png"), at(f"touched/{n}.png", "after"))
        picture(f"new/{n}.png", "after")
        shutil.copy(plain[n + 4], at(f"new/copy {n}.png", "after"))
        picture(f"told/{n}.png")
        text(f"told/{n}.txt", f"told in yellow {n}\n", "after")
        picture(f"retold/{n}.png")
        text(f"retold/{n}.txt", f"cyan once {n}\nwhite twice {n}\n")
        text(f"retold/{n}.txt", f"magenta at last {n}\n", "after")
        shutil.copy(plain[n + 7], at(f"../attic/{n}.png", "before"))
        text(f"../attic/{n}.txt", "old red\n")
    for when, colour in (("before", "red"), ("after", "green")):
        lines = [f"listed/{n}.png,listed as {colour}\n" for n in range(3)]
        text("captions.csv", "file,caption\n" + "".join(lines), when)
    text("broken.png", "no picture at all")
    text("broken.txt", "a caption of a broken picture\n")
    text("mended.png", "no picture yet")
    picture("mended.png", "after")
    picture("spoilt.png")
    text("spoilt.png", "no picture any more", "after")
    for second, path in enumerate(sorted(stage.rglob("*.*"))):
        os.utime(path, ns=(0, (FIRST_DAY + second) * 10**9 + 123))


def change_files(stage: Path, trial: Path) -> None:
    """Brings the pictures to their last state, each in one step, however often it is called."""
    pictures = trial / "pictures"
    for source in sorted((stage / "after").rglob("*.*")):
        target = trial / source.relative_to(stage / "after")
        target.parent.mkdir(exist_ok=True)
        beside = target.with_name(f".{target.name}.part")  # hidden: no picture for anybody
        shutil.copy2(source, beside)
        beside.replace(target)
    for n in range(3):
        old, new = pictures / f"renamed/{n}.png", pictures / f"renamed/now {n}.png"
        if old.exists():
            old.replace(new)
        (pictures / f"deleted/{n}.png").unlink(missing_ok=True)


# ---------------------------------------------------------------------------- what a library holds


class Row(NamedTuple):
    """An item with all that the catalogue has of it but the ids, which depend on history."""

    size: int
    mtime_ns: int
    content_hash: bytes | None
    width: int
    height: int
    taken: str | None
    status: str
    reason: str | None
    captions: tuple[tuple[str, str], ...]  # text, source; in their order
    image_embeddings: tuple[tuple[str, bytes], ...]  # fingerprint of the model, bytes as stored
    caption_embeddings: tuple[tuple[tuple[str, bytes], ...], ...]  # as many as captions

    def digest(self) -> str:
        return hashlib.blake2b(repr(self).encode(), digest_size=8).hexdigest()


Rows = dict[str, Row]  # by path relative to the trial's folder


class TwiceError(Exception):
    """A file has two items."""


def read_rows(library: Path) -> Rows:
    """All items, read with SQL of our own, so that the store is not asked about itself.

    Raises TwiceError.
    """
    with closing(_connect(library)) as connection:
        try:
            connection.execute("BEGIN")
            roots = dict(connection.execute("SELECT id, path FROM roots"))
            items = connection.execute(
                "SELECT id, root_id, file, size, mtime_ns, content_hash, width, height, taken,"
                " status, reason FROM items ORDER BY id"
            ).fetchall()
            captions = connection.execute(
                "SELECT id, item_id, text, source FROM captions ORDER BY item_id, position"
            ).fetchall()
            vectors = {
                kind: _grouped(
                    connection.execute(
                        f"SELECT owner_id, fingerprint, vector FROM {kind}_embeddings"
                        " JOIN models ON models.id = model_id ORDER BY fingerprint"
                    )
                )
                for kind in ("image", "caption")
            }
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):
                return {}  # killed while it was being made
            raise
    told: dict[int, list[Any]] = {}
    for caption_id, item_id, text, source in captions:
        told.setdefault(item_id, []).append(((text, source), vectors["caption"][caption_id]))
    rows: Rows = {}
    for item_id, root_id, file, *values in items:
        path = Path(os.fsdecode(roots[root_id])) / os.fsdecode(file)
        name = path.relative_to(library.parent).as_posix()
        if name in rows:
            raise TwiceError(f"{name} has two items")
        texts = tuple(one for one, _ in told.get(item_id, ()))
        of_texts = tuple(one for _, one in told.get(item_id, ()))
        rows[name] = Row(*values, texts, vectors["image"][item_id], of_texts)
    return rows


def _connect(library: Path) -> sqlite3.Connection:
    return sqlite3.connect(library / "catalogue.sqlite", isolation_level=None)


class _Vectors(dict[int, tuple[tuple[str, bytes], ...]]):
    def __missing__(self, owner_id: int) -> tuple[()]:
        return ()


def _grouped(found: sqlite3.Cursor) -> _Vectors:
    grouped = _Vectors()
    for owner_id, fingerprint, vector in found:
        grouped[owner_id] = (*grouped[owner_id], (fingerprint, vector))
    return grouped


def answers(store: Store) -> list[Any]:
    """Roots, and every picture and caption with its score for some queries, equals by name."""
    home = store.path.parent
    found: list[Any] = [[path.relative_to(home).as_posix() for _, path in store.roots()]]
    for row in ToyEncoder().encode_texts(QUERIES):
        (match,) = store.search("image", row[None], 1000)
        files = [one.path.relative_to(home).as_posix() for one in store.items(match.ids.tolist())]
        found.append(sorted(zip((-match.scores).tolist(), files, strict=True)))
        (match,) = store.search("caption", row[None], 1000)
        texts = [text.text for _, text in store.captions(match.ids.tolist())]
        found.append(sorted(zip((-match.scores).tolist(), texts, strict=True)))
    return found


def file_names(library: Path) -> list[str]:
    """Names of the library's files, without the numbers of generations."""
    return sorted(re.sub(r"\d{8}", "N", path.name) for path in library.iterdir())


# ------------------------------------------------------------------------------------------ a life

STEPS = ("index", "change", "index again", "optimize", "forget", "rebuild", "compact")


class Journal:
    """What the child tells of its life, in a file that outlives it."""

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.step = ""

    def tell(self, **values: Any) -> None:
        self.step = values.get("step", self.step)
        os.write(self._handle, json.dumps(values).encode() + b"\n")


def live(stage: Path, trial: Path, journal: Journal) -> None:
    """One whole life, or what an earlier one that was killed has left of it."""
    from retriever.ingest import index_folder

    library = trial / "photos.lib"

    def committed(done: int = 0, total: int = 0) -> None:
        journal.tell(rows={name: row.digest() for name, row in read_rows(library).items()})

    def index(name: str) -> None:
        encoder = ToyEncoder()
        index_folder(
            store, lambda: encoder, trial / name, progress=committed, batch_size=BATCH_SIZE
        )

    journal.tell(step="index")
    try:
        store = Store.open(library, MODEL)
    except StoreNotFoundError:
        store = Store.create(library, MODEL)
    with store:
        committed()
        index("pictures")
        index("attic")
        committed()
        journal.tell(step="change")
        change_files(stage, trial)
        journal.tell(step="index again")
        index("pictures")
        committed()
        journal.tell(step="optimize")
        # As if the library were large enough; the files are what those of a large one are.
        as_large = patch.multiple("indexes.approximate", EXACT_BYTES=0, LEAST_ROWS=LEAST_ROWS)
        with as_large, store.writer() as writer:
            writer.optimize()
        committed()
        journal.tell(step="forget")
        [attic] = [root_id for root_id, path in store.roots() if path == trial / "attic"]
        with store.writer() as writer:
            writer.forget_root(attic)
            writer.finish()
        committed()
        journal.tell(step="rebuild")
        store.rebuild()
        committed()
        journal.tell(step="compact")
        store.compact()
        committed()
    journal.tell(step="end")


class FaultPoint:
    """Counts the events of each step in all threads, and kills the process at one of them.

    Leaving it tells the journal how many there were.
    """

    def __init__(self, at: tuple[str, int], journal: Journal) -> None:
        self._at = at
        self._journal = journal
        self._numbers = {step: itertools.count(1) for step in ("", *STEPS, "end")}
        self._watched: dict[CodeType, bool] = {}

    def __enter__(self) -> None:
        threading.setprofile(self)
        sys.setprofile(self)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
        self._journal.tell(events={step: next(self._numbers[step]) - 1 for step in STEPS})

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        code = frame.f_code
        watched = self._watched.get(code)
        if watched is None:
            watched = self._watched[code] = code.co_filename.startswith(WATCHED)
        if watched or (
            event.startswith("c_")
            and type(getattr(arg, "__self__", None)).__module__ == "sqlite3"
            and code.co_filename != __file__
        ):
            step = self._journal.step
            if (step, next(self._numbers[step])) == self._at:
                callee = f" {arg.__qualname__}" if event.startswith("c_") else ""
                place = f"{Path(code.co_filename).stem}.{code.co_qualname}"
                self._journal.tell(place=f"{place}: {event}{callee}")
                os.kill(os.getpid(), signal.SIGKILL)


# --------------------------------------------------------------------------------------- the kills


WORDS = ("lost", "twice", "wrong", "unclean", "stray")
Fault = tuple[str, str]  # one of the words, and what it is about


@dataclass(frozen=True, slots=True)
class Kill:
    """One SIGKILL: `step` and the batches committed in it say when, `place` where (events only)."""

    kind: str  # "clock" or "event"
    step: str
    batches: int
    place: str | None
    number: int  # 1 is the first of a trial, 2 that of a process that went on after a kill


@dataclass(frozen=True, slots=True)
class Trial:
    """A life with its kills, what they spoilt, and how often the library had to be repaired."""

    kills: tuple[Kill, ...]
    faults: tuple[Fault, ...]
    repairs: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Undisturbed:
    """What a life comes to when nobody disturbs it."""

    states: dict[str, Rows]  # the rows after each step
    answers: list[Any]
    files: list[str]
    seconds: float = 0
    events: dict[str, int] = field(default_factory=dict)  # of each step

    @property
    def rows(self) -> Rows:
        return self.states[STEPS[-1]]


@dataclass(slots=True)
class Story:
    """What the journal tells, one process after another."""

    step: str = ""
    begun: set[str] = field(default_factory=set)  # every step that ever was
    batches: int = 0  # committed in the last step
    committed: dict[str, str] = field(default_factory=dict)  # digests, by file
    since: list[str] = field(default_factory=list)  # the steps that may have written since
    is_made: bool = False  # whether the library was seen complete
    place: str | None = None
    events: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Story:
        story = cls()
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break  # killed in the middle of it
            entry = json.loads(line)
            if "step" in entry:
                story.step, story.batches, story.place = entry["step"], 0, None
                story.begun.add(story.step)
                story.since.append(story.step)
            elif "rows" in entry:
                story.batches += 1
                story.committed = entry["rows"]
                story.since = [story.step]
                story.is_made = True
            else:
                story.place = entry.get("place")
                story.events = entry.get("events", {})
        return story

    def ahead(self) -> list[str]:
        """The steps whose rows may be in the library although nobody has seen them committed."""
        steps = [step for step in self.since if step in STEPS]
        # A life that goes on after a kill begins to index what may have been changed by then.
        if "index" in steps and "change" in self.begun:
            steps.append("index again")
        if "index" in steps and "index again" in self.begun:
            steps.remove("index")
        return steps


def watch_a_life(stage: Path, trial: Path) -> Undisturbed:
    """What a life in this process comes to, without its length; leaves its folder in `trial`."""
    shutil.copytree(stage / "before", trial)
    library = trial / "photos.lib"
    states: dict[str, Rows] = {}

    class Witness(Journal):
        def tell(self, **values: Any) -> None:
            super().tell(**values)
            if library.exists():
                states[self.step] = read_rows(library)

    live(stage, trial, Witness(trial / "journal"))
    names = file_names(library)
    with Store.open(library, MODEL) as store:
        return Undisturbed(states, answers(store), names)


class Host:
    """Makes trials in a folder, one after another."""

    def __init__(self, folder: Path) -> None:
        self._stage = folder / "stage"
        self._trial = folder / "trial"
        paint_stage(self._stage)
        expected = watch_a_life(self._stage, self._trial)
        for at in (None, ("", 0)):
            trial = self._new_trial()
            started = time.perf_counter()
            if self._fork(trial, at=at):
                raise RuntimeError(_last_error(trial))
            if at is None:
                expected = replace(expected, seconds=time.perf_counter() - started)
            if faults := list(check_finished(trial, expected)):
                raise RuntimeError(f"two undisturbed lives differ: {faults}")
        self.expected = replace(expected, events=Story.read(trial / "journal").events)

    def _new_trial(self) -> Path:
        shutil.rmtree(self._trial)
        shutil.copytree(self._stage / "before", self._trial)
        (self._trial / "journal").touch()
        return self._trial

    def _fork(
        self, trial: Path, *, at: tuple[str, int] | None = None, after: float | None = None
    ) -> int:
        """The status of a child that lives the life, killed at an event or after some seconds."""
        process = os.fork()
        if process == 0:
            status = 1
            try:
                os.dup2(os.open(trial / "errors", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
                # As with one core only: each process that decodes takes 0.2 s to start.
                os.environ["OMP_NUM_THREADS"] = "1"
                journal = Journal(trial / "journal")
                if at is None:
                    live(self._stage, trial, journal)
                else:
                    with FaultPoint(at, journal):
                        live(self._stage, trial, journal)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        if after is not None:
            time.sleep(after)
            os.kill(process, signal.SIGKILL)
        until = time.monotonic() + HANG_SECONDS
        while not (ended := os.waitpid(process, os.WNOHANG))[0]:
            if time.monotonic() > until:
                os.kill(process, signal.SIGABRT)  # counts as an error, not as a kill of ours
            time.sleep(0.005)
        return ended[1]

    def try_once(self, rng: random.Random) -> Trial:
        """One trial; draws again while the process ends before it was to be killed."""
        while True:
            started = time.perf_counter()
            trial = self._new_trial()
            kills: list[Kill] = []
            faults: list[Fault] = []
            repairs = 0
            for number in (1, 2) if rng.random() < AGAIN else (1,):
                kind = rng.choice(["clock", "event"])
                if kind == "clock":
                    ended = self._fork(trial, after=rng.uniform(0, self.expected.seconds))
                else:
                    step = rng.choice(
                        [step for step, events in self.expected.events.items() if events]
                    )
                    ended = self._fork(trial, at=(step, rng.randint(1, self.expected.events[step])))
                if ended != signal.SIGKILL:
                    break
                story = Story.read(trial / "journal")
                kills.append(Kill(kind, story.step, story.batches, story.place, number))
                repairs += check_killed(trial, story, self.expected, faults)
            if ended in (0, signal.SIGKILL) and kills:
                ended = self._fork(trial)
            if ended:
                faults.append(("wrong", f"the run did not come to its end: {_last_error(trial)}"))
            elif kills:
                faults += check_finished(trial, self.expected)
            else:
                continue
            seconds = round(time.perf_counter() - started, 3)
            return Trial(tuple(kills), tuple(faults), repairs, seconds)


def _last_error(trial: Path) -> str:
    return (trial / "errors").read_text(encoding="utf-8").strip()[-2000:]


# -------------------------------------------------------------------------------------- the checks


def check_killed(trial: Path, story: Story, expected: Undisturbed, faults: list[Fault]) -> int:
    """Adds to `faults` what a kill has spoilt; whether the library had to be repaired, 0 or 1.

    All is done to a copy: what the killed process left is for the next one to cope with.
    """
    library = trial / "photos.lib"
    looked_at = trial / "copy.lib"
    if not library.exists():
        if story.is_made:
            faults.append(("lost", "the library"))
        return 0
    shutil.copytree(library, looked_at)
    repaired = 0
    try:
        try:
            store = Store.open(looked_at, MODEL)
        except StoreNotFoundError:
            if story.is_made:
                raise
            return 0  # killed while it was being made; the next run completes it
        with store:
            is_clean = not store.verify()
        if not is_clean:
            repair(looked_at)
            repaired = 1
        with Store.open(looked_at, MODEL) as store:
            faults += [("unclean", f"after repair: {problem}") for problem in store.verify()]
            faults += _check_answers(store)
        faults += check_rows(trial, read_rows(looked_at), story, expected)
    except TwiceError as error:
        faults.append(("twice", str(error)))
    except Exception as error:
        faults.append(("wrong", f"{type(error).__name__}: {error}"))
    finally:
        shutil.rmtree(looked_at)
    return repaired


def check_rows(trial: Path, found: Rows, story: Story, expected: Undisturbed) -> Iterator[Fault]:
    """Whether each file is as it was last seen committed, or as the steps since would make it."""
    targets = [expected.states[step] for step in story.ahead()]
    for name in sorted(found.keys() | story.committed.keys()):
        row = found.get(name)
        if row is None:
            is_forgotten = name.startswith("attic/") and "forget" in story.since
            if not is_forgotten and (trial / name).exists():
                yield "lost", name
        elif row.digest() not in {
            story.committed.get(name),
            *(target[name].digest() for target in targets if name in target),
        }:
            wanted = next((target[name] for target in targets if name in target), None)
            yield "wrong", f"{name}: {_differences(row, wanted)}"
    # What has only got another name is under the old one or the new one.
    known = {row.digest(): row for state in expected.states.values() for row in state.values()}
    contents = {known[digest].content_hash for digest in story.committed.values()}
    for target in targets:
        contents &= {row.content_hash for row in target.values()}
    for content in contents - {row.content_hash for row in found.values()}:
        yield "lost", f"content {content.hex() if content else None}"


def check_finished(trial: Path, expected: Undisturbed) -> Iterator[Fault]:
    """How a library that completed its life differs from one that was never disturbed."""
    library = trial / "photos.lib"
    try:
        if (names := file_names(library)) != expected.files:
            yield "stray", f"files {names}, not {expected.files}"
        found = read_rows(library)
        for name in sorted(found.keys() | expected.rows.keys()):
            row, wanted = found.get(name), expected.rows.get(name)
            if row != wanted:
                yield ("wrong" if row else "lost"), f"{name}: {_differences(row, wanted)}"
        with Store.open(library, MODEL) as store:
            for problem in store.verify():
                yield "unclean", problem
            yield from _check_answers(store)
            if answers(store) != expected.answers:
                yield "wrong", "searches are answered in another way"
    except TwiceError as error:
        yield "twice", str(error)
    except Exception as error:
        yield "wrong", f"{type(error).__name__}: {error}"


def _check_answers(store: Store) -> Iterator[Fault]:
    """Whether searches find each embedding once, with the score of brute force."""
    queries = ToyEncoder().encode_texts(QUERIES)
    with closing(_connect(store.path)) as connection:
        for kind in ("image", "caption"):
            stored = {
                owner_id: np.frombuffer(vector, dtype="<f2").astype(np.float64)
                for owner_id, vector in connection.execute(
                    f"SELECT owner_id, vector FROM {kind}_embeddings"
                )
            }
            for query, match in zip(queries, store.search(kind, queries, 1000), strict=True):
                for owner_id, times in Counter(match.ids.tolist()).items():
                    if times > 1:
                        yield "twice", f"{kind} {owner_id} is found {times} times"
                scores = dict(zip(match.ids.tolist(), match.scores.tolist(), strict=True))
                brute = {owner: float(np.float32(row @ query)) for owner, row in stored.items()}
                if scores != brute:
                    yield "wrong", f"{kind}s are not found as brute force finds them"
        captions = connection.execute("SELECT item_id, text FROM captions").fetchall()
    for word in QUERIES[0], "square":
        having = {item_id for item_id, text in captions if word in text.lower().split()}
        if {*store.select(Words(word, ("captions",)))} != having:
            yield "wrong", f"pictures are not found by the word {word!r}"


def _differences(row: Row | None, wanted: Row | None) -> str:
    if row is None or wanted is None:
        return "is not there" if row is None else "should not be there"
    return ", ".join(
        f"{name} {has!r}, not {should!r}"
        for name, has, should in zip(Row._fields, row, wanted, strict=True)
        if has != should
    )


# ---------------------------------------------------------------------------------------- the hosts


def run_hosts(
    folder: Path,
    kills: int,
    seed: int,
    *,
    hosts: int = 2,
    report: Callable[[Trial], object] = lambda trial: None,
) -> list[Trial]:
    """Trials with so many kills in all, in several host processes at a time.

    Raises RuntimeError with a host's own words if it fails.
    """
    shares = [kills // hosts + (n < kills % hosts) for n in range(hosts)]

    def follow(number: int) -> list[Trial]:
        home = folder / f"host-{number}"
        home.mkdir()
        program = [sys.executable, __file__, home, "--kills", shares[number], "--seed", seed]
        trials = []
        with (home / "errors").open("w+", encoding="utf-8") as errors:
            with subprocess.Popen(
                [*map(str, program), "--host", str(number)],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                # One thread each: a host with threads cannot fork safely.
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "OPENBLAS_NUM_THREADS": "1",
                    "PYTHONPATH": str(ROOT),
                },
            ) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    values = json.loads(line)
                    values["kills"] = tuple(Kill(**kill) for kill in values["kills"])
                    values["faults"] = tuple(map(tuple, values["faults"]))
                    trials.append(Trial(**values))
                    report(trials[-1])
            if process.returncode:
                errors.seek(0)
                raise RuntimeError(f"host {number} ended with {errors.read()[-3000:]}")
        return trials

    with ThreadPoolExecutor(hosts) as pool:
        return [trial for trials in pool.map(follow, range(hosts)) for trial in trials]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Kill indexing processes and check what is left.")
    parser.add_argument("folder", type=Path, help="an empty folder to work in")
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--host", type=int, default=0, help="which of several with the same seed")
    options = parser.parse_args(arguments)
    host = Host(options.folder.absolute())
    rng = random.Random(f"{options.seed} {options.host}")
    kills = 0
    while kills < options.kills:
        trial = host.try_once(rng)
        kills += len(trial.kills) or 1  # a life that failed with no kill counts, or we never end
        print(json.dumps(asdict(trial)), flush=True)


if __name__ == "__main__":
    main()
