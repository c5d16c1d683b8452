"""What is fuzzed, and what must hold for any input whatever; `fuzz.py` makes the inputs.

A target is a class: `seeds()` gives inputs that reach its parts, `check(data)` runs one input and
raises if something does not hold. Nothing here needs atheris, so that the tests run them as well.
"""

import shutil
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from indexes import care
from indexes.errors import StoreError
from indexes.records import KINDS, CaptionRow, FileStamp, ItemWrite, ModelSpec
from indexes.store import Store
from indexes.vectors import IndexFileError, VectorIndex
from retriever.captions import (
    MAX_CAPTION_CHARS,
    clean_caption,
    find_caption_files,
    read_caption_file,
    read_sidecar,
)
from retriever.errors import CaptionError

CATALOGUE = "catalogue.sqlite"
DIM = 8


class Captions:
    """Every reader of captions: the first byte chooses the file's name, the rest is its content.

    A reader raises CaptionError or gives texts that can be stored and sentences that can be shown.
    """

    names = (
        "captions.jsonl",
        "captions.json",
        "captions.csv",
        "captions.tsv",
        "captions_val2017.json",
        "captions.txt",
        "results.csv",
        "x.token",
        "photo.txt",
    )
    contents = (
        '{"file": "a.jpg", "captions": ["a dog", "ein Hund \\ud83d"], "split": "test"}\n{"x": NaN}',
        '[{"image": "a.jpg", "text": "a dog"}, {"file": 3, "caption": [[]]}]',
        '{"a.jpg": "a dog", "a.jpg": ["ein Hund"], "b.jpg": {"c": null}}',
        '{"images": [{"id": 7, "file_name": "a.jpg"}],'
        ' "annotations": [{"image_id": 7, "caption": "a dog"}, {"image_id": 1e9, "caption": ""}]}',
        '{"images": [{"filename": "a.jpg", "split": "restval", "sentences": [{"raw": "a dog"}]}]}',
        'file,captions,split\r\na.jpg,"[""a dog"", ""a""]",test\r\nb.jpg,"[\'a\', ""b""]",\n',
        'filename;text\na.jpg;"never closed\nb.jpg;a dog\n',
        'file\tcaption\na.jpg\t"a ""dog"""\nb.jpg\t"Go" it says\n',
        "image_name| comment_number| comment\na.jpg| 0| a dog\n",
        "a.jpg#0\ta dog\na.jpg#1\tein Hund\n",
        "0 0.5 0.5 0.25 0.25\n16 0.1 0.2 0.3 0.4\n",
        "\ufeffa dog\r\n\n \x00\x1b[31m \u202e\n\U0001f415\r犬",
    )

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def seeds(self) -> Iterator[bytes]:
        """Every kind of content under every name."""
        for name in range(len(self.names)):
            for content in self.contents:
                yield bytes([name]) + content.encode()
            yield bytes([name]) + b"\xff\xfea\0"
            yield bytes([name]) + b"file,caption\na.jpg,caf\xe9\n"

    def check(self, data: bytes) -> None:
        """One file, read as what its name says."""
        path = self.folder / self.names[data[0] % len(self.names) if data else 0]
        path.write_bytes(data[1:])
        try:
            find_caption_files(self.folder)
            problems: list[str] = []
            if path.name == "photo.txt":
                with suppress(CaptionError):
                    check_captions(tuple(read_sidecar(path)))
                return
            with suppress(CaptionError):
                source, records = read_caption_file(path, problems)
                assert source in ("coco", "flickr", path.name)
                for record in records:
                    assert record.where.startswith(path.name), record
                    assert record.split is None or record.split == clean_caption(record.split)
                    check_captions(record.texts)
            for problem in problems:
                assert problem.startswith(path.name), problem
                assert problem.encode(), problem
                assert clean_caption(problem) == problem, problem
                assert len(problem) < 500, problem
        finally:
            path.unlink()


def check_captions(texts: tuple[str, ...]) -> None:
    """They are what a store takes."""
    for text in texts:
        assert text == clean_caption(text) != ""
        assert len(text) <= MAX_CAPTION_CHARS
        assert text.encode()


# ── Stores ───────────────────────────────────────────────────────────────────────────────────────

# One edit of a file: which of them, what is done, where, and how many bytes of the input follow.
_EDIT = struct.Struct("<BBIB")
_PAGE = 4096


def _edited(content: bytes, edit: int, at: int, payload: bytes) -> bytes | None:
    """A file's content after one edit; None removes the file."""
    at %= len(content) + 1
    match edit % 8:
        case 0 | 1:
            return content[:at] + payload + content[at + len(payload) :]
        case 2:
            flipped = bytes([content[at] ^ (1 << len(payload) % 8)]) if at < len(content) else b""
            return content[:at] + flipped + content[at + 1 :]
        case 3:
            return content[:at]
        case 4:
            return content[:at] + payload + content[at:]
        case 5:  # a block of zeros, as disks leave them
            block = at // 512 * 512
            return content[:block] + bytes(min(512, len(content) - block)) + content[block + 512 :]
        case 6:  # a page in the place of another
            pages = max(len(content) // _PAGE, 1)
            here, there = at % pages * _PAGE, len(payload) % pages * _PAGE
            page = content[there : there + _PAGE]
            return content[:here] + page + content[here + _PAGE :]
        case _:
            return None if payload == b"remove" else content + payload


def _unit(rows: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((rows, DIM)).astype(np.float32)
    return np.ascontiguousarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


QUERIES = _unit(3, seed=7)

Found = dict[str, list[list[tuple[int, float]]]]


class Stores:
    """A store whose files were edited: the catalogue, and the FAISS files beside it.

    Nothing but StoreError is raised. Edits of FAISS files alone are noticed by `verify` and change
    no answer. If `verify` finds nothing wrong, every answer is one that the catalogue's own vectors
    give, and names an item that is there. SQLite does not check its pages' content, so a bit that
    was flipped inside a caption or a number cannot be noticed, and is not asked for.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.intact = folder / "intact"
        _make_store(self.intact)
        self.files = [CATALOGUE, *sorted(path.name for path in self.intact.glob("*.faiss"))]
        self.content = {name: (self.intact / name).read_bytes() for name in self.files}
        with Store.open(self.intact) as store:
            assert store.verify() == []
            self.found = _answers(store)

    def seeds(self) -> Iterator[bytes]:
        """Each edit at two places of each file; there are few, as all are run at every start."""
        yield b""
        for which, name in enumerate(self.files):
            for edit in range(8):
                for at in (20, len(self.content[name]) // 2):
                    yield _EDIT.pack(which, edit, at, 3) + b"\xff\0\x80"
            yield _EDIT.pack(which, 7, 0, 6) + b"remove"

    def check(self, data: bytes) -> None:
        """One store, opened and searched."""
        path, changed = self._edit(data)
        try:
            with Store.open(path) as store:
                problems = store.verify()
                found = _answers(store)
                _look_around(store)
                if not problems:
                    _check_against_catalogue(store, found)
        except StoreError:
            assert CATALOGUE in changed
            return
        if CATALOGUE not in changed:
            assert bool(problems) == bool(changed), problems
            assert found == self.found

    def _edit(self, data: bytes) -> tuple[Path, set[str]]:
        """A copy of the store with the edits that `data` asks for, and the files that changed."""
        edited: dict[str, bytes | None] = dict(self.content)
        at = 0
        while at + _EDIT.size <= len(data):
            which, edit, place, count = _EDIT.unpack_from(data, at)
            at += _EDIT.size
            name = self.files[which % len(self.files)]
            content = edited[name]
            if content is not None:
                edited[name] = _edited(content, edit, place, data[at : at + count])
            at += count
        path = self.folder / "edited"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        for name, content in edited.items():
            if content is not None:
                (path / name).write_bytes(content)
        return path, {name for name in self.files if edited[name] != self.content[name]}


class Repairs(Stores):
    """The same stores, mended: what `repair` leaves is clean, or it says that it cannot be mended.

    No picture comes of it that was not there before.
    """

    def check(self, data: bytes) -> None:
        """One store, repaired, opened and searched."""
        path, changed = self._edit(data)
        try:
            care.repair(path)
        except StoreError:
            assert CATALOGUE in changed
            return
        with Store.open(path) as store:
            problems = store.verify()
            assert problems == [], problems
            found = _answers(store)
            _look_around(store)
            _check_against_catalogue(store, found)
        if CATALOGUE not in changed:
            assert found == self.found


def _make_store(path: Path) -> None:
    """Seven pictures, one failed; one is removed and two are newer than the FAISS files."""
    with Store.create(path, ModelSpec("toy", DIM, "toy-1")) as store, store.writer() as writer:
        root = writer.add_root(path.parent / "pictures")
        ids = writer.write(root, [_item(number) for number in range(5)])
        writer.finish()
        writer.write(root, [_item(number) for number in (5, 6)])
        writer.write(
            root,
            [ItemWrite("broken.jpg", 1, 1, bytes(16), 0, 0, failure="truncated")],
        )
        writer.remove(ids[:1])
        writer.mark_indexed(root)


def _item(number: int) -> ItemWrite:
    captions = tuple(CaptionRow(f"caption {n} of {number}", "sidecar") for n in range(number % 3))
    return ItemWrite(
        f"{number}.jpg",
        100 + number,
        1_700_000_000_000_000_000 + number,
        bytes([number] * 16),
        640,
        480,
        captions=captions,
        image_embedding=_unit(1, seed=number)[0],
        caption_embeddings=_unit(len(captions), seed=100 + number) if captions else None,
    )


def _answers(store: Store) -> Found:
    """Ids and scores of each query, after what must hold for them in any store."""
    dim = store.model.dim
    queries = np.zeros((len(QUERIES), dim), dtype=np.float32)
    queries[:, : min(dim, DIM)] = QUERIES[:, :dim]
    queries[:, 0] += (queries == 0).all(axis=1)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    found: Found = {}
    for kind in KINDS:
        matches = store.search(kind, queries, 4)
        found[kind] = [
            list(zip(match.ids.tolist(), match.scores.tolist(), strict=True)) for match in matches
        ]
        for match in matches:
            assert len(match.ids) <= 4
            assert len(set(match.ids.tolist())) == len(match.ids)
            assert (np.diff(match.scores) <= 0).all()
    return found


def _look_around(store: Store) -> None:
    """Reads all that a store gives."""
    ids = store.item_ids()
    items = store.items(ids)
    for item in items:
        store.item_by_path(item.path)
        store.captions(store.caption_ids(item.item_id))
    store.find_by_hash({item.content_hash for item in items if item.content_hash is not None})
    for root_id, _ in store.roots():
        store.known_files(root_id)
    store.failures()
    store.root_infos()
    store.models()
    store.info()


def _check_against_catalogue(store: Store, found: Found) -> None:
    for kind in KINDS:
        for query, best in zip(QUERIES, found[kind], strict=True):
            ids = [owner_id for owner_id, _ in best]
            known = store.items(ids) if kind == "image" else store.captions(ids)
            assert len(known) == len(ids), "an answer that is not there"
            exact = store.embeddings(kind, ids).astype(np.float64) @ query
            assert np.allclose(exact, [score for _, score in best], atol=1e-6)


class Vectors:
    """A FAISS file's bytes, of the recorded size or another: only the right ones are believed."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "image-1-00000001.faiss"
        ids = np.arange(1, 6, dtype=np.int64)
        index = VectorIndex.build(DIM, [(ids, _unit(5, seed=1).astype(np.float16))])
        self.stamp: FileStamp = index.save(self.path)
        self.content = self.path.read_bytes()

    def seeds(self) -> Iterator[bytes]:
        """The bytes as they are, and parts of them."""
        for length in (len(self.content), len(self.content) // 2, 8, 0):
            yield self.content[:length]
        yield self.content[:-1] + b"\xff"

    def check(self, data: bytes) -> None:
        """One file, as it is and cut or filled to the right size."""
        for content in (data, (data + self.content)[: len(self.content)]):
            self.path.write_bytes(content)
            try:
                index = VectorIndex.load(self.path, dim=DIM, rows=5, stamp=self.stamp)
            except IndexFileError:
                assert content != self.content
            else:
                assert content == self.content
                assert len(index.search(QUERIES, 3)) == len(QUERIES)


TARGETS = {"captions": Captions, "store": Stores, "repair": Repairs, "vectors": Vectors}
