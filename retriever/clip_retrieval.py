"""What `clip-retrieval inference` wrote, as records for a library.

    img_emb/img_emb_N.npy            (n, d) float16, of unit length before it was rounded
    text_emb/text_emb_N.npy          the same of captions, if there were any
    metadata/metadata_N.parquet      a row for each of these: `image_path`, perhaps `caption`,
                                     perhaps columns of other programs, which are ignored

N is the number of a partition, padded with zeros. `image_path` begins with the folder that
clip-retrieval was given, so it is often relative to where that was done; of a WebDataset it is a
key, which is no path.

A picture's size, time, content hash, descriptions, camera and place come from the picture itself,
so that indexing its folder afterwards finds it unchanged.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import chain
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from indexes.errors import WrongModelError
from indexes.records import FACTS, CaptionRow, KnownFile
from retriever.captions import clean_caption, read_sidecar
from retriever.data import IMAGE_SUFFIXES, Facts
from retriever.errors import (
    CaptionError,
    MissingExtraError,
    PictureError,
    RetrieverError,
    UsageError,
    printable,
)
from retriever.ingest import FACTS_SIDE, GIVEN, Failure, content_hash
from retriever.machine import cores
from retriever.portable import BATCH_SIZE, Record, Rows, lengths_of, named, open_rows, unit_rows
from retriever.workers import DecodeWorkers

if TYPE_CHECKING:
    from indexes.store import Store
    from retriever.encoders import Encoder

CLIP_SOURCE = f"{GIVEN}clip-retrieval"
# Pictures encoded again to see that embeddings from elsewhere are of the library's model. The same
# weights in another precision, on another engine or after another decoder give cosines of 0.99 and
# more; a model with other weights near 0, a fine-tuned relative or another activation function
# below 0.95. The median, because a few pictures may have been edited since.
CHECKED = 32
SAME_MODEL_COSINE = 0.98


@dataclass(frozen=True, slots=True)
class _ClipRow:
    """A row of the metadata: where its picture is, or why there is none."""

    number: int
    path: Path
    caption: str | None
    fault: str | None


@dataclass(frozen=True, slots=True, eq=False)
class _Shard:
    """The files of one number."""

    images: Rows
    texts: Rows | None
    metadata: Path


@dataclass(frozen=True, slots=True, eq=False)
class _Sample:
    """A picture on disk with its embedding, and its caption with that, where there is one."""

    path: Path
    image: Rows
    caption: str | None
    text: Rows | None


class ClipLayout:
    """What `clip-retrieval inference` wrote to a folder."""

    def __init__(self, source: Path, dim: int, base: Path | None) -> None:
        self.source = source
        self._base = base
        numbers = _numbered(source, "img_emb", ".npy")
        if not numbers or numbers != _numbered(source, "metadata", ".parquet"):
            raise UsageError(
                f"{printable(source)} is no complete output of clip-retrieval: each "
                "img_emb/img_emb_N.npy needs a metadata/metadata_N.parquet, and the other way round"
            )
        has_texts = (source / "text_emb").is_dir()
        if has_texts and numbers != _numbered(source, "text_emb", ".npy"):
            raise UsageError(
                f"{printable(source)} is no complete output of clip-retrieval: text_emb has other "
                "numbers than img_emb; without text_emb the captions are encoded again"
            )
        self.shards: list[_Shard] = []
        for number in numbers:
            images = open_rows(source / "img_emb" / f"img_emb_{number}.npy", dim)
            texts = None
            if has_texts:
                texts = open_rows(source / "text_emb" / f"text_emb_{number}.npy", dim)
            metadata = source / "metadata" / f"metadata_{number}.parquet"
            with _parquet(metadata) as file:
                rows = file.metadata.num_rows
                if "image_path" not in file.schema_arrow.names:
                    raise RetrieverError(f"{printable(metadata)} has no column image_path")
            if rows != len(images) or (texts is not None and rows != len(texts)):
                raise RetrieverError(
                    f"{printable(metadata)} has {rows:,} rows, but the embeddings of number "
                    f"{number} are {len(images):,}"
                    + (f" and {len(texts):,}" if texts is not None else "")
                )
            self.shards.append(_Shard(images, texts, metadata))
        self.n_rows = sum(len(shard.images) for shard in self.shards)

    def batches(self, shard: _Shard) -> Iterator[list[_ClipRow]]:
        """The rows of a shard's metadata, each looked for on disk."""
        with _parquet(shard.metadata) as file:
            wanted = [one for one in ("image_path", "caption") if one in file.schema_arrow.names]
            start = 0
            for batch in file.iter_batches(BATCH_SIZE, columns=wanted):
                columns = [batch.column(name).to_pylist() for name in wanted]
                yield [
                    self._row(shard, start + number, *cells)
                    for number, cells in enumerate(zip(*columns, strict=True))
                ]
                start += len(batch)

    def _row(self, shard: _Shard, number: int, name: Any, caption: Any = None) -> _ClipRow:
        where = f"{printable(shard.metadata)}, row {number}"
        if not isinstance(name, str) or not name or "\0" in name:
            raise RetrieverError(f"{where}: image_path is not a path")
        if caption is not None and not isinstance(caption, str):
            raise RetrieverError(f"{where}: caption is not a text")
        if self._base is None and not PurePath(name).is_absolute():
            raise UsageError(
                f"{where}: {name!r} is a relative path: name the folder that it starts from "
                "(--pictures)"
            )
        # Not resolved: a picture is where its path says, also below a linked folder.
        path = Path(os.path.abspath((self._base or Path()) / name))  # noqa: PTH100
        fault = None
        if self._base is not None and not path.is_relative_to(self._base):
            fault = f"is not below {printable(self._base)}"
        elif path.suffix.lower() not in IMAGE_SUFFIXES:
            fault = "is not named like a picture"
        else:
            try:
                if not path.is_file():
                    fault = "is not on disk"
            except OSError as exc:
                fault = f"cannot be read: {exc.strerror}"
        if fault is None and not _has_direction(shard.images[number]):
            fault = "has an embedding without a direction"
        return _ClipRow(number, path, caption, fault)

    def survey(self, check: int) -> tuple[Path, list[_Sample]]:
        """The deepest folder that holds all pictures, and `check` rows drawn at random.

        Raises:
            UsageError: only the root of the file system holds all.
            RetrieverError: no picture is on disk.
        """
        drawn: list[tuple[_Shard, _ClipRow]] = []
        draw = random.Random(0)
        folder: str | None = None
        usable, example = 0, ""
        for shard in self.shards:
            for row in chain.from_iterable(self.batches(shard)):
                if row.fault is not None:
                    example = example or f"{printable(row.path)} {row.fault}"
                    continue
                parent = os.fspath(row.path.parent)
                folder = parent if folder is None else os.path.commonpath((folder, parent))
                usable += 1
                if len(drawn) < check:
                    drawn.append((shard, row))
                elif (place := draw.randrange(usable)) < check:
                    drawn[place] = (shard, row)
        if folder is None:
            raise RetrieverError(
                f"{printable(self.source)} names {self.n_rows:,} pictures, none of which can be "
                f"taken in: {example or 'it is empty'}"
            )
        if folder == PurePath(folder).anchor:
            raise UsageError(
                f"the pictures of {printable(self.source)} have only {folder} in common: import "
                "them once for each folder (--pictures)"
            )
        return Path(folder), [_sample(shard, row) for shard, row in drawn]


def _numbered(source: Path, kind: str, suffix: str) -> list[str]:
    """The numbers, as written, of the files of a kind."""
    pattern = re.compile(rf"{kind}_(\d+){re.escape(suffix)}", re.ASCII)
    folder = source / kind
    with named(folder):
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    found = [match[1] for name in names if (match := pattern.fullmatch(name))]
    return sorted(found, key=lambda number: (int(number), number))


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    """The open file; whatever is wrong with it is a RetrieverError that names it."""
    try:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError as exc:
        raise MissingExtraError("clip-retrieval's metadata", "parquet") from exc
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError, ValueError) as exc:
        reason = str(exc).partition("\n")[0]
        raise RetrieverError(f"{printable(path)} is not a readable Parquet file: {reason}") from exc


def _has_direction(row: Rows) -> bool:
    length = float(lengths_of(row))
    return bool(np.isfinite(length)) and length > 0


def _text_row(shard: _Shard, row: _ClipRow) -> Rows | None:
    """The embedding of a row's caption, if it has one that can be used."""
    if shard.texts is None or not row.caption or not row.caption.strip():
        return None
    text: Rows = np.array(shard.texts[row.number])
    return text if _has_direction(text) else None


def _sample(shard: _Shard, row: _ClipRow) -> _Sample:
    return _Sample(row.path, np.array(shard.images[row.number]), row.caption, _text_row(shard, row))


def check_sample(store: Store, encoder: Encoder, source: Path, sample: Sequence[_Sample]) -> None:
    """Raises WrongModelError if encoding a sample again gives something else."""
    pictures, images = [], []
    with DecodeWorkers(1) as workers:
        for one in sample:
            try:
                pictures.append(workers.read(one.path, target=encoder.image_size).image)
            except PictureError:
                continue  # it is named when its turn comes
            images.append(one.image)
    captions = [(one.caption, one.text) for one in sample if one.caption and one.text is not None]
    model = store.model.name
    if pictures and _cosine(encoder.encode_images(pictures), images) < SAME_MODEL_COSINE:
        raise WrongModelError(
            f"{printable(source)} has embeddings of another model than {model}: of {len(pictures)} "
            "pictures encoded again most came out otherwise; take a library of the model that made "
            "them"
        )
    if not captions:
        return
    ours = encoder.encode_texts([text for text, _ in captions])
    if _cosine(ours, [row for _, row in captions]) < SAME_MODEL_COSINE:
        raise WrongModelError(
            f"{printable(source)} has embeddings of captions by another model than {model}; "
            "without its folder text_emb the captions are encoded here, and the pictures taken in"
        )


def _cosine(ours: Rows, theirs: Sequence[Rows]) -> float:
    """The median cosine of rows that should be equal."""
    return float(np.median(np.sum(ours * unit_rows(np.stack(theirs)), axis=1)))


@dataclass(frozen=True, slots=True)
class _Look:
    """What a picture on disk tells."""

    size: int
    mtime_ns: int
    content_hash: bytes
    width: int = 0
    height: int = 0
    taken: datetime | None = None
    descriptions: tuple[CaptionRow, ...] = ()
    facts: Facts | None = None


class ClipReader:
    """Records of a layout's rows, with what their pictures on disk tell."""

    def __init__(self, store: Store, encoder: Encoder, layout: ClipLayout, folder: Path) -> None:
        self.root = folder.resolve()
        self.skipped: list[Failure] = []
        self._store = store
        self._encoder = encoder
        self._layout = layout
        self._folder = folder
        threads = min(4, cores())
        self._workers = DecodeWorkers(threads)
        self._pool = ThreadPoolExecutor(threads, "look")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._workers.close()
        self._pool.shutdown(cancel_futures=True)

    def batches(self) -> Iterator[list[Record]]:
        """In which no picture is twice; read once the store is locked."""
        known = {
            root / file: one
            for root_id, root in self._store.roots()
            for file, one in self._store.known_files(root_id).items()
        }
        for shard in self._layout.shards:
            for rows in self._layout.batches(shard):
                yield self._batch(shard, rows, known)

    def _batch(
        self, shard: _Shard, rows: Sequence[_ClipRow], known: Mapping[Path, KnownFile]
    ) -> list[Record]:
        by_file: dict[str, list[_ClipRow]] = {}
        for row in rows:
            if row.fault is not None:
                self.skipped.append(Failure(row.path, row.fault))
            else:
                by_file.setdefault(row.path.relative_to(self._folder).as_posix(), []).append(row)
        looking = {
            file: self._pool.submit(self._look, self.root / file, known.get(self.root / file))
            for file in by_file
        }
        found: list[tuple[str, _Look, list[tuple[CaptionRow, Rows | None]]]] = []
        for file, future in looking.items():
            look = future.result()
            if isinstance(look, Failure):
                self.skipped.append(look)
                continue
            captions = self._captions(shard, self.root / file, by_file[file])
            found.append((file, look, [*captions, *((one, None) for one in look.descriptions)]))
        encoded = self._encoded(
            {one.text for _, _, several in found for one, row in several if row is None}
        )
        return [
            Record(
                self.root,
                file,
                look.size,
                look.mtime_ns,
                look.content_hash,
                look.width,
                look.height,
                look.taken,
                "ok",
                None,
                tuple(one for one, _ in several),
                np.array(shard.images[by_file[file][0].number]),
                tuple(encoded[one.text] if row is None else row for one, row in several),
                facts=FACTS if look.facts else 0,
                **asdict(look.facts or Facts()),
            )
            for file, look, several in found
        ]

    def _look(self, path: Path, known: KnownFile | None) -> _Look | Failure:
        try:
            status = path.stat()
            stamp = (status.st_size, status.st_mtime_ns)
            if (
                known is not None
                and known.content_hash is not None
                and (known.status, known.size, known.mtime_ns) == ("ok", *stamp)
            ):
                return _Look(*stamp, known.content_hash)
            digest = content_hash(path)
            # As small as can be: what stands beside the pixels is wanted, and their hash.
            decoded = self._workers.read(path, target=FACTS_SIDE)
        except OSError as exc:
            return Failure(path, f"cannot be read: {exc.strerror}")
        except PictureError as exc:
            return Failure(path, str(exc).removeprefix(f"{printable(path)}: "))
        inside = tuple(CaptionRow(one.text, one.source) for one in decoded.descriptions)
        size = (decoded.width, decoded.height)
        return _Look(*stamp, digest, *size, decoded.taken, inside, decoded.facts)

    def _captions(
        self, shard: _Shard, path: Path, rows: Iterable[_ClipRow]
    ) -> Iterator[tuple[CaptionRow, Rows | None]]:
        """The captions of a picture as indexing would find them, each text once.

        clip-retrieval takes the whole of a text file for one caption. Indexing reads one a line,
        and takes what no file has for given by hand, which stays.
        """
        seen: set[str] = set()
        for row in rows:
            text = clean_caption(row.caption or "")
            if not text or text in seen:
                continue
            seen.add(text)
            lines = _sidecar_lines(path)
            if text != " ".join(lines):
                yield CaptionRow(text, CLIP_SOURCE), _text_row(shard, row)
            elif len(lines) == 1:
                yield CaptionRow(text, "sidecar"), _text_row(shard, row)
            else:
                yield from ((CaptionRow(line, "sidecar"), None) for line in lines)

    def _encoded(self, texts: Collection[str]) -> Mapping[str, Rows]:
        several = sorted(texts)
        rows = self._encoder.encode_texts(several) if several else ()
        return dict(zip(several, rows, strict=True))


def _sidecar_lines(path: Path) -> list[str]:
    try:
        return read_sidecar(path.with_suffix(".txt"))
    except CaptionError:
        return []
