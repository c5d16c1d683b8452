"""A library as files that any program can read, written and read again.

    manifest.json            format, model, counts, and a SHA-256 of each file below
    items.ndjson             one picture a line, with its captions and the rows of its embeddings
    image_embeddings.npy     (n, d) float16
    caption_embeddings.npy   (m, d) float16

A line of `items.ndjson` (ASCII; a name that is no text has its bytes as lone surrogates, as
`os.fsdecode` gives them):

    {"root": "/home/me/Pictures", "file": "2024/a.jpg", "size": 81920, "mtime_ns": 1700000000000,
     "content_hash": "9f…", "width": 640, "height": 480, "taken": "2024-05-01T12:00:00",
     "status": "ok", "reason": null, "embedding": 0, "camera": "NIKON D90", "latitude": 45.4,
     "longitude": 12.3, "perceptual_hash": -81, "facts": 1, "extras": [["stars", 4.0]],
     "captions": [{"text": "a dog", "source": "sidecar", "embedding": 0}]}

`content_hash` is XXH3-128 of the file's bytes. `embedding` is a row, null where there is none. A
picture that could not be read has the status "failed", a reason and no embeddings. What stands
from "camera" to "extras" may be missing: older versions did not know it.

Whoever made such files, they are hostile until they were checked: nothing is unpickled, no length
is believed, and every row belongs to one line.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path, PurePath
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, BinaryIO, Self, TypeVar, cast, get_args

import numpy as np
import xxhash
from numpy.typing import NDArray

from indexes.errors import WrongModelError
from indexes.records import (
    FACTS,
    STORED_TOLERANCE,
    UNIT_TOLERANCE,
    CaptionRow,
    Extras,
    Kind,
    Status,
    in_order,
)
from retriever.errors import RetrieverError, UsageError, printable

if TYPE_CHECKING:
    from indexes.store import Snapshot, Store

Rows = NDArray[Any]  # (n, d) of any float type
Progress = Callable[[int, int], None]
T = TypeVar("T")

FORMAT, VERSION = "retriever-export", 1
MANIFEST, ITEMS = "manifest.json", "items.ndjson"
ROWS: dict[Kind, str] = {"image": "image_embeddings.npy", "caption": "caption_embeddings.npy"}
BATCH_SIZE = 256  # pictures read and written together
BLOCK = 4096  # rows looked at together: 8 MiB of 512 float32
MAX_MANIFEST_BYTES = 1 << 20
MAX_LINE_BYTES = 64 << 20
MAX_INTEGER, MAX_SIDE = (1 << 63) - 1, (1 << 31) - 1
_HASH = re.compile(r"(?:[0-9a-f]{2}){1,64}")


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """One picture on its way, with its embeddings; None where the model has none of it."""

    root: Path
    file: str
    size: int
    mtime_ns: int
    content_hash: bytes | None
    width: int
    height: int
    taken: datetime | None
    status: Status
    reason: str | None
    captions: tuple[CaptionRow, ...]
    image: Rows | None  # (d,)
    texts: tuple[Rows | None, ...]  # (d,) for each caption
    camera: str | None = None
    latitude: float | None = None
    longitude: float | None = None
    perceptual_hash: int | None = None
    extras: Extras = ()
    facts: int = 0  # who knows nothing of these leaves them to the next run

    @property
    def path(self) -> Path:
        """Where the picture lies, absolute."""
        return self.root / self.file

    @property
    def embedded(self) -> list[tuple[CaptionRow, Rows]]:
        """The captions that have an embedding, (d,), with it."""
        pairs = zip(self.captions, self.texts, strict=True)
        return [(one, row) for one, row in pairs if row is not None]


# ── Out of a store ───────────────────────────────────────────────────────────────────────────────


def records_of(rows: Snapshot, ids: Sequence[int]) -> list[Record]:
    """The items of these ids, ascending, with the embeddings of the store's model."""
    items = rows.items(ids)
    caption_ids = rows.caption_ids(items)
    images, texts = rows.embeddings("image", ids), rows.embeddings("caption", caption_ids)
    of_texts = iter(caption_ids)
    return [
        Record(
            item.root,
            item.file,
            item.size,
            item.mtime_ns,
            item.content_hash,
            item.width,
            item.height,
            item.taken,
            item.status,
            item.reason,
            item.captions,
            images.get(item_id),
            tuple(texts.get(caption_id) for caption_id in islice(of_texts, len(item.captions))),
            item.camera,
            item.latitude,
            item.longitude,
            item.perceptual_hash,
            item.extras,
            item.facts,
        )
        for item_id, item in sorted(items.items())
    ]


def clear_partial(part: Path) -> None:
    """Removes what an export that was cut off has left, and nothing else."""
    if not os.path.lexists(part):
        return
    ours = {MANIFEST, ITEMS, *ROWS.values()}
    if part.is_symlink() or not part.is_dir() or {one.name for one in part.iterdir()} - ours:
        raise UsageError(f"{printable(part)} is in the way, and no export of ours made it")
    shutil.rmtree(part)


class _Sink:
    """A file that knows its checksum when it is closed, and then is on the disk."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("xb")
        self._digest = hashlib.sha256()
        self.described: dict[str, int | str] = {}

    def write(self, data: bytes) -> None:
        self._digest.update(data)
        self._file.write(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._file:
            if error is None:
                self._file.flush()
                os.fsync(self._file.fileno())
            size = self._file.tell()
        self.described = {"size_bytes": size, "sha256": self._digest.hexdigest()}


def write_files(
    store: Store, rows: Snapshot, folder: Path, progress: Progress | None
) -> dict[str, int]:
    """Writes the files of an export, and returns the fields of its report."""
    report = progress or (lambda done, total: None)
    ids = rows.item_ids()
    expected = {kind: rows.vector_count(kind) for kind in ROWS}
    counts = {"items": len(ids), "captions": 0}
    written: dict[Kind, int] = dict.fromkeys(ROWS, 0)
    report(0, len(ids))
    with ExitStack() as files:
        items = files.enter_context(_Sink(folder / ITEMS))
        sinks = {kind: files.enter_context(_Sink(folder / name)) for kind, name in ROWS.items()}
        for kind, sink in sinks.items():
            header = {
                "descr": "<f2",
                "fortran_order": False,
                "shape": (expected[kind], store.model.dim),
            }
            np.lib.format.write_array_header_1_0(cast(IO[bytes], sink), header)

        def put(kind: Kind, row: Rows | None) -> int | None:
            if row is None:
                return None
            sinks[kind].write(row.tobytes())
            written[kind] += 1
            return written[kind] - 1

        done = 0
        for some in batched(ids, BATCH_SIZE):
            for record in records_of(rows, some):
                items.write(_line(record, put))
                counts["captions"] += len(record.captions)
            done += len(some)
            report(done, len(ids))
    if written != expected:
        raise RetrieverError(
            f"{printable(store.path)} holds embeddings of nothing: `retriever verify` says which"
        )
    described = {ITEMS: items.described} | {ROWS[kind]: sinks[kind].described for kind in ROWS}
    counts |= {f"{kind}_embeddings": count for kind, count in written.items()}
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "model": asdict(store.model),
        "dtype": "float16",
        "counts": counts,
        "files": described,
    }
    with _Sink(folder / MANIFEST) as sink:
        sink.write(json.dumps(manifest, indent=1).encode() + b"\n")
    sizes = [sink.described, *described.values()]
    return counts | {"size_bytes": sum(int(one["size_bytes"]) for one in sizes)}


def _line(record: Record, put: Callable[[Kind, Rows | None], int | None]) -> bytes:
    """A line of `items.ndjson`; `put` writes an embedding and returns its row."""
    digest, taken = record.content_hash, record.taken
    fields = {
        "root": os.fspath(record.root),
        "file": record.file,
        "size": record.size,
        "mtime_ns": record.mtime_ns,
        "content_hash": digest.hex() if digest is not None else None,
        "width": record.width,
        "height": record.height,
        "taken": taken.isoformat() if taken is not None else None,
        "status": record.status,
        "reason": record.reason,
        "embedding": put("image", record.image),
        "camera": record.camera,
        "latitude": record.latitude,
        "longitude": record.longitude,
        "perceptual_hash": record.perceptual_hash,
        "facts": record.facts,
        "extras": record.extras,
        "captions": [
            {"text": one.text, "source": one.source, "embedding": put("caption", row)}
            for one, row in zip(record.captions, record.texts, strict=True)
        ],
    }
    return json.dumps(fields).encode("ascii") + b"\n"


# ── An export, read ──────────────────────────────────────────────────────────────────────────────


def read_manifest(folder: Path) -> _Fields:
    """The manifest of an export that this version can read.

    Raises UsageError if there is none, RetrieverError if it is damaged or newer than this version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UsageError(f"{printable(folder)} holds no export: there is no {MANIFEST} in it")
    with named(path), path.open("rb") as file:
        data = file.read(MAX_MANIFEST_BYTES + 1)
    if len(data) > MAX_MANIFEST_BYTES:
        raise RetrieverError(f"{printable(path)}: too large to be the manifest of an export")
    manifest = _Fields.parse(printable(path), data)
    if manifest.text("format") != FORMAT:
        raise UsageError(f"{printable(path)} is not the manifest of an export")
    if manifest.number("version", low=1) > VERSION:
        raise RetrieverError(
            f"{printable(folder)} was written by a newer version of this software: update it"
        )
    return manifest


class Export:
    """An exported folder, of which nothing is believed before it was checked."""

    def __init__(self, folder: Path, manifest: _Fields, dim: int) -> None:
        """Used by `open`."""
        counts = manifest.object("counts")
        self.counts = {name: counts.number(name) for name in ("items", "captions")}
        self.items = folder / ITEMS
        files = manifest.object("files")
        for name in (ITEMS, *ROWS.values()):
            _check_file(folder / name, files.object(name))
        self.rows = {kind: open_rows(folder / name, dim) for kind, name in ROWS.items()}

    @classmethod
    def open(cls, folder: Path, store: Store) -> Export:
        """Reads the manifest, and compares model and checksums."""
        manifest = read_manifest(folder)
        model = manifest.object("model")
        name, fingerprint = model.text("name"), model.text("fingerprint")
        check_model(store, name, model.number("dim", low=1), fingerprint, folder)
        return cls(folder, manifest, store.model.dim)

    def check(self) -> list[Path]:
        """The roots of all pictures, once every line and every row was found to be right."""
        for kind, rows in self.rows.items():
            _check_unit(self.items.with_name(ROWS[kind]), rows)
        seen: set[bytes] = set()  # digests, because a library may hold millions of paths
        used = {kind: np.zeros(len(rows), dtype=np.bool_) for kind, rows in self.rows.items()}
        counts = {"items": 0, "captions": 0}
        roots: dict[Path, None] = {}
        for line in self._lines():
            record = line.record
            digest = xxhash.xxh3_128_digest(os.fsencode(record.path))
            if digest in seen:
                raise line.fault(f"{printable(record.path)} is in an earlier line already")
            seen.add(digest)
            for kind, numbers in line.numbers.items():
                for number in numbers:
                    if used[kind][number]:
                        raise line.fault(f"row {number} of {ROWS[kind]} is used already")
                    used[kind][number] = True
            counts["items"] += 1
            counts["captions"] += len(record.captions)
            roots.setdefault(record.root)
        for name, count in counts.items():
            if count != self.counts[name]:
                raise RetrieverError(
                    f"{printable(self.items)} has {count:,} {name}, but {MANIFEST} says "
                    f"{self.counts[name]:,}"
                )
        for kind, flags in used.items():
            if not flags.all():
                path = self.items.with_name(ROWS[kind])
                raise RetrieverError(
                    f"{printable(path)}: row {int(np.argmin(flags))} belongs to no line of {ITEMS}"
                )
        return list(roots)

    def batches(self) -> Iterator[list[Record]]:
        """The pictures in the order of their lines."""
        return batched((line.record for line in self._lines()), BATCH_SIZE)

    def _lines(self) -> Iterator[_Line]:
        with named(self.items), self.items.open("rb") as file:
            number = 0
            while data := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                where = f"{printable(self.items)}, line {number}"
                if len(data) > MAX_LINE_BYTES:
                    raise RetrieverError(f"{where}: longer than {MAX_LINE_BYTES >> 20} MiB")
                yield _Line(_Fields.parse(where, data), self.rows)


class _Line:
    """A line of `items.ndjson`: the record, and the rows that it names."""

    def __init__(self, fields: _Fields, rows: Mapping[Kind, Rows]) -> None:
        self.fault = fields.fault
        self.numbers: dict[Kind, list[int]] = {kind: [] for kind in rows}
        status = fields.choice("status", get_args(Status))
        captions = fields.objects("captions")
        if status == "failed" and any(
            one.value("embedding") is not None for one in (fields, *captions)
        ):
            raise fields.fault("it failed and yet has embeddings")
        self.record = Record(
            _root(fields),
            _file(fields),
            fields.number("size"),
            fields.number("mtime_ns", low=-MAX_INTEGER),
            _content_hash(fields),
            fields.number("width", high=MAX_SIDE),
            fields.number("height", high=MAX_SIDE),
            _taken(fields),
            status,
            fields.text("reason") if status == "failed" else None,
            tuple(CaptionRow(one.text("text"), one.text("source")) for one in captions),
            self._row("image", fields, rows),
            tuple(self._row("caption", one, rows) for one in captions),
            *_facts(fields),
        )

    def _row(self, kind: Kind, fields: _Fields, rows: Mapping[Kind, Rows]) -> Rows | None:
        if fields.value("embedding") is None:
            return None
        number = fields.number("embedding")
        if number >= len(rows[kind]):
            raise fields.fault(f"{ROWS[kind]} has no row {number}")
        self.numbers[kind].append(number)
        row: Rows = np.array(rows[kind][number])
        return row


class _Fields:
    """A JSON object, whose fields are what they should be or a RetrieverError that says where."""

    def __init__(self, where: str, value: Any) -> None:
        self.where = where
        if not isinstance(value, dict):
            raise self.fault("not a JSON object")
        self._fields = value

    @classmethod
    def parse(cls, where: str, data: bytes) -> _Fields:
        try:
            return cls(where, json.loads(data))
        except (ValueError, RecursionError) as exc:
            raise RetrieverError(f"{where}: not valid JSON") from exc

    def fault(self, words: str) -> RetrieverError:
        return RetrieverError(f"{self.where}: {words}")

    def value(self, name: str) -> Any:
        if name not in self._fields:
            raise self.fault(f"{name!r} is missing")
        return self._fields[name]

    def text(self, name: str) -> str:
        value = self.value(name)
        if not isinstance(value, str) or not _is_encodable(value, "strict"):
            raise self.fault(f"{name!r} is not a text")
        return value

    def path(self, name: str) -> str:
        value = self.value(name)
        if not isinstance(value, str) or "\0" in value or not _is_encodable(value):
            raise self.fault(f"{name!r} is not a path")
        return value

    def number(self, name: str, *, low: int = 0, high: int = MAX_INTEGER) -> int:
        value = self.value(name)
        if type(value) is not int or not low <= value <= high:  # True is an int as well
            raise self.fault(f"{name!r} is not a whole number from {low} to {high}")
        return value

    def decimal(self, name: str, *, most: float = sys.float_info.max) -> float:
        value = self.value(name)
        if type(value) not in (int, float) or not abs(value) <= most:  # True for NaN
            raise self.fault(f"{name!r} is not a number from {-most:g} to {most:g}")
        return float(value)

    def is_absent(self, name: str) -> bool:
        """Whether there is nothing, as in files of a version that did not know the field."""
        return self._fields.get(name) is None

    def choice(self, name: str, choices: Sequence[T]) -> T:
        value = self.value(name)
        for one in choices:
            if one == value:
                return one
        raise self.fault(f"{name!r} is none of {', '.join(map(str, choices))}")

    def object(self, name: str) -> _Fields:
        return _Fields(f"{self.where}, {name}", self.value(name))

    def objects(self, name: str) -> list[_Fields]:
        value = self.value(name)
        if not isinstance(value, list):
            raise self.fault(f"{name!r} is not a list")
        return [_Fields(f"{self.where}, {name}", one) for one in value]


def _is_encodable(text: str, errors: str = "surrogateescape") -> bool:
    try:
        text.encode("utf-8", errors)
    except UnicodeEncodeError:
        return False
    return True


def _root(fields: _Fields) -> Path:
    root = fields.path("root")
    is_plain = PurePath(root).is_absolute() and os.path.normpath(root) == root
    if not is_plain or root == PurePath(root).anchor:
        raise fields.fault("'root' is not an absolute path on this computer")
    return Path(root)


def _file(fields: _Fields) -> str:
    file = fields.path("file")
    # On Windows a backslash or a drive would lead out of the root as well.
    if {"", ".", ".."} & set(file.split("/")) or PurePath(file).as_posix() != file:
        raise fields.fault("'file' is not a path below the root")
    if PurePath(file).drive:
        raise fields.fault("'file' is not a path below the root")
    return file


def _content_hash(fields: _Fields) -> bytes | None:
    if fields.value("content_hash") is None:
        return None
    digits = fields.text("content_hash")
    if not _HASH.fullmatch(digits):
        raise fields.fault("'content_hash' is not a hexadecimal number")
    return bytes.fromhex(digits)


def _taken(fields: _Fields) -> datetime | None:
    if fields.value("taken") is None:
        return None
    try:
        return datetime.fromisoformat(fields.text("taken"))
    except ValueError as exc:
        raise fields.fault("'taken' is not a date and time") from exc


def _facts(
    fields: _Fields,
) -> tuple[str | None, float | None, float | None, int | None, Extras, int]:
    """Camera, latitude, longitude, perceptual hash, further columns, and `facts`, as in Record."""
    camera, latitude, longitude, perceptual_hash = None, None, None, None
    if not fields.is_absent("camera"):
        camera = fields.text("camera")
    if not fields.is_absent("perceptual_hash"):
        perceptual_hash = fields.number("perceptual_hash", low=-MAX_INTEGER - 1)
    if not (fields.is_absent("latitude") and fields.is_absent("longitude")):
        latitude = fields.decimal("latitude", most=90)
        longitude = fields.decimal("longitude", most=180)
    extras = () if fields.is_absent("extras") else _extras(fields)
    facts = 0 if fields.is_absent("facts") else min(FACTS, fields.number("facts"))
    return camera, latitude, longitude, perceptual_hash, extras, facts


def _extras(fields: _Fields) -> Extras:
    pairs = fields.value("extras")
    if not isinstance(pairs, list):
        raise fields.fault("'extras' is not a list")
    found: list[tuple[str, str | float]] = []
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2:
            raise fields.fault("'extras' has something other than a name with its value")
        one = _Fields(f"{fields.where}, extras", {"name": pair[0], "value": pair[1]})
        is_text = isinstance(pair[1], str)
        found.append((one.text("name"), one.text("value") if is_text else one.decimal("value")))
    return in_order(found)


# ── Files from elsewhere ─────────────────────────────────────────────────────────────────────────


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Errors of the file system as ours, with the name of the file."""
    try:
        yield
    except OSError as exc:
        raise RetrieverError(f"{printable(path)} cannot be read: {exc.strerror}") from exc


def check_model(store: Store, name: str, dim: int, fingerprint: str, where: Path) -> None:
    """Raises WrongModelError if what lies at `where` is of another model than the store's."""
    ours = store.model
    if (dim, fingerprint) != (ours.dim, ours.fingerprint):
        raise WrongModelError(
            f"{printable(where)} has embeddings of {name} ({fingerprint[:12]}, {dim} dimensions), "
            f"{printable(store.path)} of {ours.name} ({ours.fingerprint[:12]}, {ours.dim} "
            "dimensions), and these cannot be compared: take a library of the same model"
        )


def _check_file(path: Path, described: _Fields) -> None:
    size, checksum = described.number("size_bytes"), described.text("sha256")
    with named(path), path.open("rb") as file:
        found = os.fstat(file.fileno()).st_size
        if found != size:
            raise RetrieverError(
                f"{printable(path)} has {found:,} bytes instead of the {size:,} in {MANIFEST}: "
                "copy it again"
            )
        if hashlib.file_digest(file, "sha256").hexdigest() != checksum:
            raise RetrieverError(
                f"{printable(path)} is not the file that {MANIFEST} describes (another checksum): "
                "copy it again"
            )


def open_rows(path: Path, dim: int) -> Rows:
    """The (n, d) array in an npy file, memory-mapped once its header fits the file's length."""
    with named(path), path.open("rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, is_fortran, dtype = read(file)
        except OSError:
            raise
        except Exception as exc:  # whatever a parser of Python literals runs into
            raise RetrieverError(f"{printable(path)} is not a NumPy file of embeddings") from exc
        offset, size = file.tell(), os.fstat(file.fileno()).st_size
    if dtype.kind != "f" or dtype.itemsize > 8 or len(shape) != 2 or min(shape) < 0:
        raise RetrieverError(f"{printable(path)} holds {dtype} {shape}, not embeddings (n, {dim})")
    if shape[1] != dim:
        raise WrongModelError(
            f"{printable(path)} has embeddings of {shape[1]} dimensions, and the library of {dim}: "
            "they are of another model"
        )
    if size != offset + shape[0] * dim * dtype.itemsize:
        raise RetrieverError(
            f"{printable(path)} has {size:,} bytes, too few or too many for its {shape[0]:,} rows"
        )
    if not shape[0]:
        return np.empty(shape, dtype=dtype)
    flat: Rows = np.memmap(path, dtype=dtype, mode="r", offset=offset)
    return flat.reshape(shape, order="F" if is_fortran else "C")


def _check_unit(path: Path, rows: Rows) -> None:
    for start in range(0, len(rows), BLOCK):
        lengths = lengths_of(rows[start : start + BLOCK])
        wrong = ~(np.abs(lengths - 1) <= STORED_TOLERANCE)  # catches NaN too
        if wrong.any():
            row = int(np.argmax(wrong))
            raise RetrieverError(
                f"{printable(path)}: row {start + row} has length {lengths[row]:.4g}, not 1"
            )


def lengths_of(rows: Rows) -> NDArray[np.float64]:
    """Length of each row; NaN or infinite where a value is, or where it is too large."""
    with np.errstate(all="ignore"):
        lengths: NDArray[np.float64] = np.linalg.norm(rows.astype(np.float64), axis=-1)
    return lengths


def batched(things: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of so many, the last one perhaps shorter; itertools has it from Python 3.12 on."""
    several = iter(things)
    while batch := list(islice(several, size)):
        yield batch


def unit_rows(rows: Rows) -> NDArray[np.float32]:
    """The rows as a store takes them; those that it would take anyway keep every bit."""
    whole = np.ascontiguousarray(rows, dtype=np.float32)
    lengths = np.linalg.norm(whole, axis=1, keepdims=True)
    return np.where(np.abs(lengths - 1) <= UNIT_TOLERANCE, whole, whole / lengths)
