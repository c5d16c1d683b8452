"""Readers beside a writer: every answer is one that the library could give while it was asked.

A picture's vector belongs to its file and its width, a caption's to its text, and all captions of a
picture say how many there are, so that a reader can tell a row that is half old and half new.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ToyEncoder

from indexes.store import CaptionRow, ItemWrite, Match, ModelSpec, Store
from retriever.search import Query, Searcher

MODEL = ModelSpec("toy", ToyEncoder.dim, "toy-1")
MEMORY = Path("/dev/shm")
ALWAYS = 80  # pictures that change and are never removed
K = 10
SECONDS = 3.0
THREADS, PROCESSES = 4, 6


def vector(words: str) -> np.ndarray:
    """(d,) float32: a direction of its own for each text."""
    row = np.random.default_rng(zlib.crc32(words.encode())).standard_normal(MODEL.dim)
    return (row / np.linalg.norm(row)).astype(np.float32)


def texts(file: str, edition: int) -> list[str]:
    count = 1 + edition % 3
    return [f"{file} edition {edition}: {n + 1} of {count}" for n in range(count)]


def picture(file: str, version: int) -> ItemWrite:
    captions = texts(file, version)
    return ItemWrite(
        file,
        10,
        20,
        None,
        width=version,
        height=1,
        captions=tuple(CaptionRow(text, "sidecar") for text in captions),
        image_embedding=vector(f"{file} {version}"),
        caption_embeddings=np.stack([vector(text) for text in captions]),
    )


@pytest.fixture
def path() -> Iterator[Path]:
    """A library with `ALWAYS` pictures, in memory where there is one."""
    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as made:
        with Store.create(Path(made) / "photos.lib", MODEL) as store, store.writer() as writer:
            root = writer.add_root(Path("/pictures"))
            writer.write(root, [picture(f"always {n}", 1) for n in range(ALWAYS)])
            writer.finish()
        yield Path(made) / "photos.lib"


# Ten readers


class Reader:
    """Searches until the library's folder holds the file `stop`, and counts what it did."""

    def __init__(self, path: Path, seed: int, *, reopens: bool) -> None:
        self.path = path
        self.seed = seed
        self.reopens = reopens
        self.searches = 0
        self.errors: list[str] = []

    def run(self) -> None:
        try:
            stop = self.path.parent / "stop"
            while not stop.exists():
                with Store.open(self.path, MODEL) as store:
                    while not stop.exists():
                        self.ask(store)
                        if self.reopens:
                            break
        except Exception:
            self.errors.append(traceback.format_exc())

    def ask(self, store: Store) -> None:
        self.searches += 1
        words = ("red", "green", "blue", "white")[(self.seed + self.searches) % 4]
        query = ToyEncoder().encode_texts([words])
        removed = removed_ids(self.path)
        (match,) = store.search("image", query, K)
        assert len(set(match.ids.tolist())) == K, f"{len(match.ids)} results"
        assert not removed & set(match.ids.tolist()), "a result that had been removed"
        self.check_pictures(store, query[0], match)
        (match,) = store.search("caption", query, K)
        assert len(set(match.ids.tolist())) == K, f"{len(match.ids)} captions"
        self.check_captions(store, query[0], match)
        hits = Searcher(store, ToyEncoder).images(Query(texts=((words, 1.0),)), K)
        assert [hit.rank for hit in hits] == list(range(1, K + 1))
        for hit in hits:
            assert hit.item_id not in removed
            assert hit.caption is None or hit.caption.startswith(f"{hit.path.name} edition ")

    def check_pictures(self, store: Store, query: np.ndarray, match: Match) -> None:
        scores = dict(zip(match.ids.tolist(), match.scores.tolist(), strict=True))
        for row in store.items(match.ids.tolist()):
            edition = int(row.captions[0].text.split(":")[0].split()[-1])
            assert [one.text for one in row.captions] == texts(row.file, edition)
            # It may have changed between the search and this look at it, but only forward.
            versions = range(row.width, 0, -1)
            scored = (score(f"{row.file} {version}", query) for version in versions)
            assert scores[row.item_id] in scored, f"a score that {row.file} never had"

    def check_captions(self, store: Store, query: np.ndarray, match: Match) -> None:
        found = store.captions(match.ids.tolist())
        if len(found) == len(match.ids):  # or some were removed since: the others tell not which
            for (_, caption), has in zip(found, match.scores.tolist(), strict=True):
                assert has == score(caption.text, query)
        files = {row.item_id: row.file for row in store.items([item_id for item_id, _ in found])}
        for item_id, caption in found:
            assert item_id not in files or caption.text.startswith(f"{files[item_id]} edition ")


def score(words: str, query: np.ndarray) -> float:
    """What a search gives for a stored vector: the cosine after rounding to float16."""
    stored = vector(words).astype(np.float16).astype(np.float64)
    return float(np.float32((stored * query).sum()))


# Forked, because starting six interpreters takes longer than all they have to do.
PROGRAM = """
import os, sys
from pathlib import Path
import indexes.catalogue, indexes.vectors
from test_readers import Reader, Store
count = int(sys.argv[2])
for n in range(count):
    if os.fork() == 0:
        reader = Reader(Path(sys.argv[1]), n, reopens=n == 0)
        os.write(1, b"ready\\n")
        reader.run()
        os.write(1, f"{reader.searches}\\n".encode())
        os.write(2, "".join(reader.errors).encode())
        os._exit(0)
for n in range(count):
    os.wait()
"""


def removed_ids(path: Path) -> set[int]:
    told = (path.parent / "removed").read_text()
    return set(map(int, told[: told.rfind("\n") + 1].split()))


class Life:
    """What the writer does; tells the ids that it removed once they are."""

    def __init__(self, path: Path, store: Store) -> None:
        self._removed = path.parent / "removed"
        self._removed.touch()
        self._store = store
        self._rng = random.Random(0)
        self.actions = 0

    def act(self) -> None:
        """Each of them in turn, in another order every time."""
        actions = [self.rewrite, self.retell, self.replace, self.forget, self.finish, self.compact]
        for action in self._rng.sample(actions, len(actions)):
            action()
            self.actions += 1

    def rewrite(self) -> None:
        known = self._store.known_files(1)
        ids = [known[file].item_id for file in self._rng.sample(sorted(known), 5)]
        with self._store.writer() as writer:
            changed = [picture(row.file, row.width + 1) for row in self._store.items(ids)]
            writer.write(1, changed)

    def retell(self) -> None:
        item = self._rng.choice(list(self._store.known_files(1).values()))
        told = texts(item.file, self._rng.randrange(1000))
        captions = [CaptionRow(text, "sidecar") for text in told]
        with self._store.writer() as writer:
            writer.set_captions(item.item_id, captions, np.stack([vector(text) for text in told]))

    def replace(self) -> None:
        known = self._store.known_files(1)
        guests = [one.item_id for file, one in known.items() if file.startswith("guest")][:5]
        with self._store.writer() as writer:
            writer.remove(guests)
            self._tell(guests)
            names = [f"guest {self._rng.randrange(10**9)}" for _ in range(5)]
            writer.write(1, [picture(name, 1) for name in names])

    def forget(self) -> None:
        with self._store.writer() as writer:
            root = writer.add_root(Path("/elsewhere"))
            ids = writer.write(root, [picture(f"there {n}", 1) for n in range(3)])
            writer.forget_root(root)
            self._tell(ids)

    def finish(self) -> None:
        with self._store.writer() as writer:
            writer.finish()

    def compact(self) -> None:
        self._store.compact()

    def _tell(self, ids: list[int]) -> None:
        with self._removed.open("a") as file:
            file.write(" ".join(map(str, ids)) + "\n")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_ten_readers_beside_a_writer_get_whole_and_present_answers(path: Path) -> None:
    home = Path(__file__).parent
    with (
        Store.open(path, MODEL) as store,
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, path, str(PROCESSES)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": f"{home.parent}{os.pathsep}{home}"},
        ) as others,
    ):
        life = Life(path, store)
        readers = [Reader(path, n, reopens=n == 0) for n in range(THREADS)]
        threads = [threading.Thread(target=reader.run) for reader in readers]
        try:
            assert others.stdout is not None
            assert [others.stdout.readline() for _ in range(PROCESSES)] == ["ready\n"] * PROCESSES
            for thread in threads:
                thread.start()
            until = time.monotonic() + SECONDS
            while time.monotonic() < until:
                life.act()
        finally:
            (path.parent / "stop").touch()
        for thread in threads:
            thread.join()
        told, errors = others.communicate(timeout=60)
        assert errors + "".join(error for reader in readers for error in reader.errors) == ""
        searches = [reader.searches for reader in readers] + [int(line) for line in told.split()]
        assert len(searches) == THREADS + PROCESSES == 10
        assert min(searches) >= 2
        assert life.actions >= 6
        assert store.generation > 1
        assert store.verify() == []


# One reader that stays


def test_a_reader_that_stays_open_sees_every_generation_and_keeps_no_old_file(path: Path) -> None:
    query = ToyEncoder().encode_texts(["red"])
    with Store.open(path, MODEL) as reader, Store.open(path, MODEL) as store:
        for version in range(2, 32):
            with store.writer() as writer:
                changed = [picture(f"always {n}", version) for n in range(0, ALWAYS, 2)]
                writer.write(1, changed)
                writer.finish()
            for one in ("image", "caption"):
                [match] = reader.search(one, query, ALWAYS)
                [fresh] = store.search(one, query, ALWAYS)
                assert match.ids.tolist() == fresh.ids.tolist()
                assert match.scores.tolist() == fresh.scores.tolist()
        assert store.generation == reader.generation == 31
        if sys.platform == "linux":
            maps = Path("/proc/self/maps").read_text()
            mapped = [line for line in maps.splitlines() if str(path) in line and ".faiss" in line]
            assert len(mapped) <= 2 * 2  # of each reader the files of its last generation


# Between a search and the look at what it found


RED = Query(texts=(("red", 1.0),))


def after_first(
    monkeypatch: pytest.MonkeyPatch, store: Store, name: str, act: Callable[[Any], object]
) -> None:
    """After the first call of a method, and before its result is looked at, `act` happens."""
    method = getattr(store, name)

    def call_then_act(*args: Any, **more: Any) -> Any:
        found = method(*args, **more)
        monkeypatch.undo()
        act(found)
        return found

    monkeypatch.setattr(store, name, call_then_act)


@pytest.mark.parametrize("k", [1, K, ALWAYS - 1])
def test_a_picture_removed_while_a_query_is_answered_leaves_k_answers(
    path: Path, monkeypatch: pytest.MonkeyPatch, k: int
) -> None:
    with Store.open(path, MODEL) as store, store.writer() as writer:
        [match] = store.search("image", ToyEncoder().encode_texts(["red"]), 1)
        [best] = match.ids.tolist()
        after_first(monkeypatch, store, "search", lambda _: writer.remove([best]))
        hits = Searcher(store, ToyEncoder).images(RED, k)
        assert [hit.rank for hit in hits] == list(range(1, k + 1))
        assert best not in {hit.item_id for hit in hits}


@pytest.mark.parametrize("k", [1, K, ALWAYS - 1])
@pytest.mark.parametrize("method", ["search", "captions"])
def test_a_picture_removed_while_captions_are_looked_for_leaves_k_answers(
    path: Path, monkeypatch: pytest.MonkeyPatch, k: int, method: str
) -> None:
    with Store.open(path, MODEL) as store, store.writer() as writer:
        [match] = store.search("caption", ToyEncoder().encode_texts(["red"]), 1)
        [(best, _)] = store.captions(match.ids.tolist())
        after_first(monkeypatch, store, method, lambda _: writer.remove([best]))
        hits = Searcher(store, ToyEncoder).captions(RED, k)
        assert [hit.rank for hit in hits] == list(range(1, k + 1))
        assert best not in {hit.item_id for hit in hits}


@pytest.mark.parametrize(
    "method",
    [
        "search",
        "caption_ids",
    ],
)
def test_a_picture_told_anew_while_a_query_is_answered_is_shown_with_a_caption(
    path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    told = CaptionRow("told anew", "sidecar")
    with Store.open(path, MODEL) as store, store.writer() as writer:

        def tell_anew(_: object) -> None:
            with writer.together():
                for item_id in store.item_ids():
                    writer.set_captions(item_id, [told], vector(told.text)[None])

        after_first(monkeypatch, store, method, tell_anew)
        hits = Searcher(store, ToyEncoder).images(RED, 3)
        assert len(hits) == 3
        assert all(hit.caption for hit in hits)
