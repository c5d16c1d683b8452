"""What a training batch is made of: decoded pictures, augmented, and tokenised captions."""

import io
import json
import math
import os
import time
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from tokenizers import Tokenizer
from torch import Tensor

from indexes.errors import StoreLockedError
from indexes.locks import WriterLock
from retriever.data import Pair, read_image, read_pairs
from retriever.errors import PictureError, UsageError
from retriever.machine import cores

# Pictures decoded between two notes of how far it is: what a kill costs, 19 MB at 224 pixels.
_PIECE = 128
_THREADS = 16
_DIGEST_CHARACTERS = 32  # at the beginning of each line of a record


def split_pairs(datasets: Sequence[Path], seed: int) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs. Test splits are never touched.

    The held-out pairs are the `val` splits; where no data set has one, a tenth drawn at random.
    A picture that several captions files name is one pair, with the captions of all.

    Args:
        datasets: folders, or captions files for the pictures of the folder that they lie in.
        seed: of what is drawn at random.
    """
    found: dict[Path, Pair] = {}
    for dataset in datasets:
        folder, captions = (dataset.parent, dataset) if dataset.is_file() else (dataset, None)
        for pair in read_pairs(folder, captions=captions)[0]:
            known = found.get(pair.path)
            found[pair.path] = known.with_more(pair) if known else pair
    train = [pair for pair in found.values() if pair.split in (None, "train")]
    held_out = [pair for pair in found.values() if pair.split == "val"]
    if not held_out:
        order = np.random.default_rng(seed).permutation(len(train))
        size = min(max(len(train) // 10, 2), 1000)
        held_out = [train[i] for i in sorted(order[:size])]
        train = [train[i] for i in sorted(order[size:])]
    if min(len(train), len(held_out)) < 2:
        names = ", ".join(str(d) for d in datasets)
        raise UsageError(
            f"{names}: too few pictures with captions: {len(train)} to train on and "
            f"{len(held_out)} to measure with, at least two of each are needed"
        )
    return train, held_out


def augment(
    pixels: NDArray[np.uint8], rng: np.random.Generator, size: int | None = None
) -> NDArray[np.uint8]:
    """A random crop of at least half the area, mirrored half the time, colours slightly changed.

    Args:
        pixels: (s, s, 3) RGB.
        rng: the source of all chance.
        size: of the sides of what is made; None is s.
    """
    side = pixels.shape[0]
    size = size or side
    area = rng.uniform(0.5, 1.0)
    ratio = math.exp(rng.uniform(-0.25, 0.25))
    width = min(math.sqrt(area * ratio), 1.0) * side
    height = min(math.sqrt(area / ratio), 1.0) * side
    left, top = rng.uniform(0, side - width), rng.uniform(0, side - height)
    image = Image.fromarray(pixels).resize(
        (size, size), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height)
    )
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        if rng.random() < 0.5:
            image = enhance(image).enhance(rng.uniform(0.7, 1.3))
    return np.asarray(image)


def fill_array(
    path: Path,
    shape: tuple[int, ...],
    dtype: type[np.generic],
    make: Callable[[NDArray[np.int64]], tuple[NDArray[Any], Any]],
    *,
    piece: int,
    settle: Callable[[list[Any]], None] = lambda _: None,
    settled: Callable[[], bool] = lambda: True,
) -> None:
    """Write the .npy file `path`, unless it is there, so that a killed run can be gone on with.

    Until it is whole it grows as PATH.part, and PATH.record has a line for each piece: a hash
    and what was noted. Pieces are taken over as far as the hashes agree; what follows is
    made again. Of several processes one writes, and the others wait for what it makes.

    Args:
        path: the file.
        shape: of the whole array, rows first.
        dtype: of the array.
        make: (m,) row numbers → their rows, and something to note, as JSON can hold it.
        piece: rows at a time.
        settle: called with the notes of all pieces before the file gets its name.
        settled: whether what `settle` made is there; without it the file counts as absent.
    """
    part, record = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.record")
    starts = range(0, shape[0], piece)
    header = io.BytesIO()
    described = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, described)
    row_bytes = math.prod(shape[1:]) * np.dtype(dtype).itemsize
    with _alone(path.with_name(f"{path.name}.lock")):
        if path.is_file() and settled():
            return
        path.unlink(missing_ok=True)
        lines = record.read_bytes().splitlines(keepends=True) if record.is_file() else []
        kept: list[bytes] = []
        with part.open("r+b" if part.is_file() else "w+b") as file:
            file.write(header.getvalue())
            for start, line in zip(starts, lines, strict=False):
                data = file.read(min(piece, shape[0] - start) * row_bytes)
                if line != _record_of(data, line[_DIGEST_CHARACTERS + 1 : -1]):
                    break
                kept.append(line)
            file.seek(len(header.getvalue()) + min(len(kept) * piece, shape[0]) * row_bytes)
            file.truncate()
            record.write_bytes(b"".join(kept))
            with record.open("ab") as log:
                for start in starts[len(kept) :]:
                    rows, note = make(np.arange(start, min(start + piece, shape[0])))
                    data = np.ascontiguousarray(rows, dtype).tobytes()
                    assert len(data) == len(rows) * row_bytes
                    file.write(data)
                    file.flush()
                    log.write(_record_of(data, json.dumps(note).encode()))
                    log.flush()
            os.fsync(file.fileno())
        lines = record.read_bytes().splitlines()
        settle([json.loads(line[_DIGEST_CHARACTERS:]) for line in lines])
        part.replace(path)
        record.unlink()


def _record_of(data: bytes, note: bytes) -> bytes:
    digest = xxhash.xxh3_128(data)
    digest.update(note)
    return digest.hexdigest().encode() + b" " + note + b"\n"


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Waits for the lock `path`; its file is removed when the block ends well."""
    while True:
        try:
            lock = WriterLock(path)
            break
        except StoreLockedError:
            time.sleep(0.2)
    try:
        yield
        path.unlink(missing_ok=True)
    finally:
        lock.release()


def _decode(
    pairs: Sequence[Pair], size: int, rows: Iterable[int]
) -> tuple[NDArray[np.uint8], dict[str, str]]:
    """(m, size, size, 3) pixels of some pairs; what is wrong with a picture, by its number."""
    numbers = list(rows)

    def pixels(row: int) -> NDArray[np.uint8] | str:
        try:
            image = read_image(pairs[row].path, target=size).image
        except PictureError as exc:
            return str(exc)
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))

    with ThreadPoolExecutor(min(_THREADS, cores())) as threads:
        found = dict(zip(numbers, threads.map(pixels, numbers), strict=True))
    blank = np.zeros((size, size, 3), np.uint8)
    decoded = np.stack([blank if isinstance(one, str) else one for one in found.values()])
    return decoded, {str(row): one for row, one in found.items() if isinstance(one, str)}


def _look_again(pairs: Sequence[Pair], size: int, path: Path, done: Path) -> dict[str, str]:
    """The faults that `done` tells of and that have not passed (as a drive's, or of rights)."""
    known: dict[str, str] = json.loads(done.read_text("utf-8"))
    if not known:
        return known
    rows = [int(row) for row in known]
    decoded, faults = _decode(pairs, size, rows)
    pixels = np.lib.format.open_memmap(path, "r+")
    pixels[rows] = decoded  # nobody else reads these as long as `done` names them
    pixels.flush()
    if faults != known:
        _replace(done, faults)
    return faults


def _replace(path: Path, value: Any) -> None:
    # Under a name of this process: another may do the same.
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    beside.write_text(json.dumps(value), "utf-8")
    beside.replace(path)


class Pictures:
    """Pixels of a list of pairs, decoded once into a memory-mapped file of the cache folder.

    Attributes:
        pixels: (n, s, s, 3) uint8.
        pairs: the n pairs whose picture could be read.
        key: a hash of the files' names, sizes and times, of the side, and of which could be read.
    """

    def __init__(
        self, pairs: Sequence[Pair], size: int, cache: Path, warn: Callable[[str], None]
    ) -> None:
        digest = xxhash.xxh3_128(f"2 {size}".encode())
        for pair in pairs:
            stat = pair.path.stat()
            digest.update(
                f"{pair.path}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode(
                    "utf-8", "surrogateescape"
                )
            )
        self.key = digest.hexdigest()
        cache.mkdir(parents=True, exist_ok=True)
        path, done = cache / f"pixels-{self.key}.npy", cache / f"pixels-{self.key}.json"
        if path.is_file() and done.is_file():
            faults = _look_again(pairs, size, path, done)
        else:
            fill_array(
                path,
                (len(pairs), size, size, 3),
                np.uint8,
                partial(_decode, pairs, size),
                piece=_PIECE,
                settle=lambda notes: _replace(done, dict(ChainMap(*notes))),
                settled=done.is_file,
            )
            faults = json.loads(done.read_text("utf-8"))
        for fault in faults.values():
            warn(fault)
        self.rows = np.array([i for i in range(len(pairs)) if str(i) not in faults], np.int64)
        self.key += "-" + xxhash.xxh3_64_hexdigest(self.rows.tobytes())
        self.pixels = np.load(path, mmap_mode="r")
        self.pairs = [pairs[row] for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def content(self) -> str:
        """A hash of the pixels: the same for copies of the files, wherever and whenever made."""
        digest = xxhash.xxh3_128()
        for start in range(0, len(self.pixels), _PIECE):  # Ctrl-C is heard between two pieces
            digest.update(self.pixels[start : start + _PIECE].data)
        return digest.hexdigest()

    def batch(
        self, indices: NDArray[np.int64], seed: Sequence[int] | None, size: int | None = None
    ) -> Tensor:
        """(b, s, s, 3) uint8; with a seed, each picture augmented in its own reproducible way.

        Augmented pictures have sides of `size`, if that is given.
        """
        pixels = self.pixels[self.rows[indices]]
        if seed is not None:
            rngs = [np.random.default_rng((*seed, int(i))) for i in indices]
            views = [augment(one, rng, size) for one, rng in zip(pixels, rngs, strict=True)]
            pixels = np.stack(views)
        return torch.from_numpy(pixels)


class Captions:
    """Token ids of all captions of a list of pairs, padded only when a batch is made.

    Attributes:
        picture: (m,) int64, the pair that each of the m captions belongs to, rising.
        first: (n + 1,) int64, where the captions of each of the n pairs begin.
        lengths: (m,) int64, tokens of each caption, at least 1.
        key: a hash of the tokens.
    """

    def __init__(self, pairs: Sequence[Pair], tokenizer: Tokenizer, max_tokens: int) -> None:
        texts = [caption.text for pair in pairs for caption in pair.captions]
        tokenizer.enable_truncation(max_tokens)
        tokenizer.no_padding()
        ids = [
            np.array(encoding.ids or [0], np.int32)
            for start in range(0, len(texts), 4096)  # as what it gives is far larger than the ids
            for encoding in tokenizer.encode_batch(texts[start : start + 4096])
        ]
        self.lengths = np.array([len(one) for one in ids], np.int64)
        self._tokens = np.concatenate(ids)
        self._starts = np.cumsum(self.lengths) - self.lengths
        digest = xxhash.xxh3_128(self._tokens.tobytes())
        digest.update(self.lengths.tobytes())
        self.key = digest.hexdigest()
        counts = [len(pair.captions) for pair in pairs]
        self.picture = np.repeat(np.arange(len(pairs)), counts)
        self.first = np.concatenate([[0], np.cumsum(counts)])

    def __len__(self) -> int:
        return len(self.lengths)

    def draw(self, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """(n, count) captions of every picture, different ones as long as it has enough."""
        shuffled = np.lexsort((rng.random(len(self)), self.picture))
        sizes = np.diff(self.first)
        return shuffled[self.first[:-1, None] + np.arange(count) % sizes[:, None]]

    def batch(self, indices: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """(b, t) ids and mask, t the longest caption among them."""
        place = np.arange(self.lengths[indices].max())
        mask = place < self.lengths[indices, None]
        # What lies beyond the last caption is masked, but must be there to be looked at.
        at = np.minimum(self._starts[indices, None] + place, len(self._tokens) - 1)
        ids = np.where(mask, self._tokens[at], 0)
        return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(mask.astype(np.int64))
