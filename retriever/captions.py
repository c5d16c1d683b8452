"""Where captions are written beside pictures: tables, lists of records, token files, sidecars.

Nothing here knows which pictures exist: `retriever.data` matches the names found here to pictures.

These files are read as hostile. What is stored is one line of text: white space, line ends, NUL and
other control characters become single spaces, lone surrogates become U+FFFD, and what is empty
then is no caption; emoji, marks of direction and every other character stay as they are. Refused,
with a sentence that names the file and where it can the line, are: a caption of more than
`MAX_CAPTION_CHARS` characters, a name that no file can have, a value that is no text, a file that
is too large, is no regular file, is not UTF-8, or makes no sense. A line that is refused harms no
other line. How much of a long caption counts is up to the encoder: it reads the beginning, as much
as its window holds, while the whole text is stored and shown.

What a table or a record holds beside the picture, the captions and the split are its extras, as
(name, value) pairs: names in lower case, those inside another joined by dots, the values of a list
each by itself under one name. Numbers are floats, true and false are texts, null, NaN and empty
texts are absent; text is cleaned as captions are. Names, values and their number have limits too.
"""

import ast
import codecs
import csv
import errno
import io
import json
import math
import os
import re
import stat
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retriever.errors import CaptionError, printable

if TYPE_CHECKING:
    from indexes.records import Extras

FILE_COLUMNS = ("file", "image", "filename", "file_name", "image_name", "image_path", "path")
CAPTION_COLUMNS = ("caption", "captions", "text", "comment")
SIDECAR_SUFFIXES = (".txt", ".caption")

CAPTION_FILES = ("captions.jsonl", "captions.json", "captions.csv", "captions.tsv")
_PATTERNS = ("*.token.txt", "*.token", "captions_*.json", "annotations/captions_*.json")
_UNSURE = ("captions.txt", "results.csv")  # the first line must fit as well

# Some 15,000 words, far beyond any model's window: more is a document, not a caption.
MAX_CAPTION_CHARS = 100_000
# Far more than any list of captions for one picture; a log file beside a picture is no sidecar.
MAX_SIDECAR_BYTES = 1_000_000
# COCO's largest file has 150 MB. Reading one takes about seven times its size in memory.
MAX_FILE_BYTES = 500_000_000
# Characters of a picture's path: what Linux allows, and more than any other system does.
MAX_NAME_CHARS = 4096
# Of one picture: values, and characters of a value and of a name. More is a document of its own.
MAX_EXTRAS = 200
MAX_EXTRA_CHARS = 10_000
MAX_KEY_CHARS = 100
# Faulty lines of one file that are named one by one; the others are counted.
MAX_PROBLEMS = 1000
_SHOWN_CHARS = 80  # of a text from the file, in a sentence about it

_NUMBERING = frozenset({"comment_number", "caption_number"})  # of the captions of one picture
_MAX_WHOLE = 1 << 53  # a float has each whole number up to this one; larger ones are names
# As programs write numbers: 007 and twenty digits are names as well.
_NUMBER = re.compile(r"-?(?:0|[1-9]\d{0,14})(?:\.\d+)?(?:[eE][+-]?\d{1,3})?")
_LINE_END = re.compile(r"\r\n|\r|\n")
_BLANK = re.compile(r"[\s\x00-\x1f\x7f-\x9f]+")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_TOKEN_LINE = re.compile(r"(?P<name>.+)#\d+\t(?P<text>.*)")
_BOX_LINE = re.compile(r"\d+(\s+-?\d*\.\d+){4,}\s*")
_COCO_SPLIT = re.compile(r"captions_(train|val|test)\d{4}")
_PYTHON_TEXT = r"""'(?:[^'\\]|\\.)*+'|"(?:[^"\\]|\\.)*+\""""
_PYTHON_LIST = re.compile(rf"\[\s*(?:(?:{_PYTHON_TEXT})\s*(?:,\s*|(?=\])))*+\]")


@dataclass(frozen=True, slots=True)
class CaptionRecord:
    """What one place of a captions file says about one picture.

    `where` is "captions.csv:12". `name` stands as written. `whole`: the format gives all captions
    of a picture in one record, so that a second record of the same picture is a fault. `extras`
    are all that else stands there, in order, none twice.
    """

    where: str
    name: str
    texts: tuple[str, ...]
    split: str | None
    whole: bool
    extras: "Extras" = ()


def clean_caption(text: str) -> str:
    """The caption on one line: runs of white space and control characters become one space.

    Lone surrogates, which neither SQLite nor a tokenizer accepts, become U+FFFD. Byte order marks
    at either end, left there when files were joined, are dropped.
    """
    return _BLANK.sub(" ", _SURROGATE.sub("\ufffd", text)).strip(" \ufeff")


def may_be_captions(name: str) -> bool:
    """Whether a file of this name may be a captions file or a sidecar."""
    return name.lower().endswith(SIDECAR_SUFFIXES) or any(
        fnmatchcase(name, pattern.rpartition("/")[2])
        for pattern in (*CAPTION_FILES, *_PATTERNS, *_UNSURE)
    )


def find_caption_files(root: Path) -> list[Path]:
    """The captions files that `root` holds under their usual names, in a fixed order."""
    found = [root / name for name in CAPTION_FILES]
    for pattern in _PATTERNS:
        found += sorted(root.glob(pattern))
    # Kaggle's names for Flickr8k and Flickr30k say little.
    found += [
        path
        for path in (root / name for name in _UNSURE)
        if _is_file(path) and _begins_a_table(path)
    ]
    return [path for path in found if _is_file(path) and ".lemma." not in path.name]


def read_caption_file(path: Path, problems: list[str]) -> tuple[str, list[CaptionRecord]]:
    """The source ("coco", "flickr" or the file's name) and the records of a captions file.

    Read are JSON lines; a JSON list of records, a JSON object {file: caption or captions}, COCO
    captions, Karpathy's `dataset_*.json`; tables with a header (comma, semicolon, tab or `|`);
    Flickr8k/Flickr30k token files. A line that makes no sense is added to `problems`; after the
    first `MAX_PROBLEMS` they are counted.

    Raises:
        CaptionError: the file cannot be opened, is no regular file, is larger than 500 MB, is not
            UTF-8, or is none of these formats.
    """
    faults = _Problems()
    try:
        return _read_records(_read_utf8(path, MAX_FILE_BYTES, "a captions file"), path, faults)
    finally:
        problems += faults
        if faults.unnamed:
            problems.append(f"{printable(path.name)}: {faults.unnamed:,} more like these")


class _Problems(list[str]):
    """Sentences; those beyond `MAX_PROBLEMS` are only counted, in `unnamed`."""

    unnamed = 0

    def append(self, problem: str) -> None:
        if len(self) < MAX_PROBLEMS:
            super().append(problem)
        else:
            self.unnamed += 1


def _read_records(text: str, path: Path, problems: list[str]) -> tuple[str, list[CaptionRecord]]:
    name, suffix = printable(path.name), path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return name, list(_json_lines(text, name, problems))
    if suffix == ".json":
        return _json_file(text, path, problems)
    first_line = _first_line(text)
    if _TOKEN_LINE.fullmatch(first_line):
        return "flickr", list(_token_lines(text, name, problems))
    delimiter = _table_delimiter(first_line)
    if delimiter is None:
        raise _no_columns(path)
    source = "flickr" if "comment_number" in first_line.lower() else name
    return source, list(_table_rows(text, path, delimiter, problems))


def read_sidecar(path: Path) -> list[str]:
    """The captions of a text file beside a picture, one a line, without empty lines.

    Raises:
        CaptionError: the file cannot be opened, is no regular file, is not UTF-8, over 1 MB, or
            holds box labels or a caption of more than 100,000 characters.
    """
    text = _read_utf8(path, MAX_SIDECAR_BYTES, "the captions of a picture")
    lines = [clean_caption(line) for line in _LINE_END.split(text)]
    for number, line in enumerate(lines, 1):
        if len(line) > MAX_CAPTION_CHARS:
            raise CaptionError(f"{printable(path)}:{number}: {_too_long(line)}")
    lines = [line for line in lines if line]
    if lines and all(map(_BOX_LINE.fullmatch, lines)):
        raise CaptionError(f"{printable(path)}: box labels (YOLO), not captions")
    return lines


def _too_long(caption: str) -> str:
    return f"a caption of {len(caption):,} characters, over {MAX_CAPTION_CHARS:,}"


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # its folder may be listed, but not entered
        return False


def _read_utf8(path: Path, limit: int, what: str) -> str:
    """The text of a file of at most `limit` bytes, which is said to be too large for `what`."""
    try:
        # Opening a pipe would wait for whoever writes to it, if it were not told otherwise.
        handle = os.open(
            path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        )
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise CaptionError(f"{printable(path)}: not a regular file")
            if status.st_size > limit:
                raise CaptionError(
                    f"{printable(path)}: over {limit // 1_000_000} MB, too large for {what}"
                )
            data = os.read(handle, status.st_size + 1)
            if len(data) < status.st_size:  # one call gives 2 GB at most, over some networks less
                with open(handle, "rb", closefd=False) as file:
                    data += file.read(limit)
        finally:
            os.close(handle)
    except OSError as exc:
        is_socket = exc.errno == errno.ENXIO
        reason = "not a regular file" if is_socket else exc.strerror
        raise CaptionError(f"{printable(path)}: {reason}") from exc
    # Without its mark, UTF-16 of Latin text is valid UTF-8 with a NUL beside every letter.
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or 0 in data[:2]:
        raise CaptionError(f"{printable(path)}:1: UTF-16 text; save the file as UTF-8")
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as exc:
        line = data.count(b"\n", 0, exc.start) + 1
        raise CaptionError(
            f"{printable(path)}:{line}: not UTF-8 (byte 0x{data[exc.start]:02X});"
            " save the file as UTF-8"
        ) from exc


def _first_line(text: str) -> str:
    """The first line that is not blank."""
    found = re.search(r"\S", text)
    if found is None:
        return ""
    start = max(text.rfind(end, 0, found.start()) for end in "\r\n") + 1
    end = _LINE_END.search(text, found.start())
    return text[start : end.start() if end else None]


def _texts(value: Any) -> list[str] | None:
    """The captions of a JSON value: a text, a list of texts or null; None for anything else."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    return values if all(isinstance(item, str) for item in values) else None


def _captioned(
    where: str,
    name: str,
    texts: Iterable[str],
    split: str | None,
    problems: list[str],
    *,
    whole: bool,
    extras: "Extras" = (),
) -> Iterator[CaptionRecord]:
    """The record with its captions cleaned, without those that are too long; none if the name is.

    These are added to `problems`.
    """
    if len(name) > MAX_NAME_CHARS:
        problems.append(f"{where}: no file has a name of {len(name):,} characters")
        return
    kept = []
    for text in map(clean_caption, texts):
        if len(text) > MAX_CAPTION_CHARS:
            problems.append(f"{where}: {_too_long(text)}")
        elif text:
            kept.append(text)
    split = clean_caption(split or "") or None
    yield CaptionRecord(where, name, tuple(kept), split, whole, extras)


def in_order(extras: Iterable[tuple[str, str | float]]) -> "Extras":
    """Extras by name, of one name numbers first, then by value; each once."""
    return tuple(sorted(set(extras), key=lambda one: (one[0], isinstance(one[1], str), one[1])))


def _extras(values: Iterable[tuple[str, Any]], where: str, problems: list[str]) -> "Extras":
    """The extras of one record; those that are too long or too many are added to `problems`."""
    found: dict[tuple[str, str | float], None] = {}
    for key, value in _flat(values):
        name, one = clean_caption(key).lower(), _scalar(value)
        if not name or one is None:
            continue
        if len(name) > MAX_KEY_CHARS:
            problems.append(f"{where}: {_shown(name)}: a name of over {MAX_KEY_CHARS} characters")
        elif isinstance(one, str) and len(one) > MAX_EXTRA_CHARS:
            size = f"{len(one):,} characters, over {MAX_EXTRA_CHARS:,}"
            problems.append(f"{where}: {_shown(name)}: a value of {size}")
        else:
            found[sys.intern(name), one] = None
            if len(found) > MAX_EXTRAS:
                problems.append(f"{where}: {too_many_extras()}")
                found.popitem()
                break
    return in_order(found)


def too_many_extras() -> str:
    """What is said of a picture with more extras than are kept."""
    return f"over {MAX_EXTRAS} values beside the caption; the others are left out"


def _flat(values: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The values inside of lists, and of objects, whose names are joined by dots."""
    waiting = [iter(values)]  # no recursion: JSON may be nested as deeply as the stack allows
    while waiting:
        for key, value in waiting[-1]:
            if isinstance(value, dict):
                # Of a name that is too long already no more is needed.
                base = key[: 2 * MAX_KEY_CHARS]
                waiting.append(iter([(f"{base}.{inner}", one) for inner, one in value.items()]))
                break
            if isinstance(value, list):
                waiting.append(iter([(key, one) for one in value]))
                break
            yield key, value
        else:
            waiting.pop()


def _scalar(value: Any) -> str | float | None:
    """A value as it is kept, None if it is absent."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int) and abs(value) <= _MAX_WHOLE:
        return float(value)
    return None if value is None else clean_caption(str(value)) or None


def _cell_value(cell: str) -> str | float | None:
    """The value that a cell of a table spells."""
    text = clean_caption(cell)
    if text.lower() in ("true", "false"):
        return text.lower()
    return _scalar(float(text) if _NUMBER.fullmatch(text) else text)


def _shown(text: object) -> str:
    """A number or text from the file, on one line and not too long, as part of a sentence."""
    line = clean_caption(str(text))
    return line if len(line) <= _SHOWN_CHARS else line[: _SHOWN_CHARS - 1] + "…"


# ── JSON ─────────────────────────────────────────────────────────────────────────────────────────


class _Repeated(list[Any]):
    """The values of a key that one JSON object gives several times; `json` would keep the last."""


def _json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        values: dict[str, _Repeated] = {}
        for key, value in pairs:
            values.setdefault(key, _Repeated()).append(value)
        result |= {key: several for key, several in values.items() if len(several) > 1}
    return result


def _parse_json(text: str) -> Any:
    """The value of a JSON text; ValueError says what is wrong with it."""
    try:
        return json.loads(text, object_pairs_hook=_json_object)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _json_lines(text: str, where: str, problems: list[str]) -> Iterator[CaptionRecord]:
    # Only \n ends a line here: JSON allows U+2028 and its like inside a string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                fields = _parse_json(line)
            except ValueError as exc:
                problems.append(f"{where}:{number}: not JSON: {exc}")
            else:
                yield from _record(fields, f"{where}:{number}", problems)


def _json_file(text: str, path: Path, problems: list[str]) -> tuple[str, list[CaptionRecord]]:
    try:
        content = _parse_json(text)
    except ValueError as exc:
        raise CaptionError(f"{printable(path)}: not JSON: {exc}") from exc
    name = printable(path.name)
    if isinstance(content, list):
        records: Iterator[CaptionRecord] = (
            record
            for number, fields in enumerate(content, 1)
            for record in _record(fields, f"{name}: record {number}", problems)
        )
        return name, list(records)
    if isinstance(content, dict):
        images, annotations = content.get("images"), content.get("annotations")
        if isinstance(images, list) and isinstance(annotations, list):
            return "coco", list(_coco_records(images, annotations, name, problems))
        if isinstance(images, list):
            return name, list(_karpathy_records(images, name, problems))
        return name, list(_mapping_records(content, name, problems))
    raise CaptionError(f"{printable(path)}: neither a list of records nor an object")


def _record(fields: Any, where: str, problems: list[str]) -> Iterator[CaptionRecord]:
    """The record of one JSON object with a file and a caption field; none if it makes no sense."""
    if not isinstance(fields, dict):
        problems.append(f"{where}: not an object with a file and a caption")
        return
    fields = {key.strip().lower(): value for key, value in fields.items()}
    name_key = next((key for key in FILE_COLUMNS if key in fields), None)
    name = fields[name_key] if name_key else None
    if not isinstance(name, str) or not name:
        problems.append(f"{where}: no file name ({', '.join(FILE_COLUMNS)})")
        return
    if not any(key in fields for key in CAPTION_COLUMNS):
        problems.append(f"{where}: no caption ({', '.join(CAPTION_COLUMNS)})")
        return
    # 0 and false are no captions, but wrong; nothing is just nothing.
    filled = (key for key in CAPTION_COLUMNS if fields.get(key) not in (None, "", []))
    value_key = next(filled, None)
    value, split = fields[value_key] if value_key else None, fields.get("split")
    texts = _texts(value)
    if texts is None:
        problems.append(f"{where}: the caption is neither a text nor a list of texts")
        return
    split = split if isinstance(split, str) else None
    used = {name_key, value_key, "split", *_NUMBERING}
    others = ((key, one) for key, one in fields.items() if key not in used)
    extras = _extras(others, where, problems)
    whole = isinstance(value, list)
    yield from _captioned(where, name, texts, split, problems, whole=whole, extras=extras)


def _mapping_records(
    content: dict[str, Any], where: str, problems: list[str]
) -> Iterator[CaptionRecord]:
    for name, value in content.items():
        for one in value if isinstance(value, _Repeated) else [value]:
            texts = _texts(one)
            if texts is None:
                problems.append(f"{where}: {_shown(name)}: neither a text nor a list of texts")
            else:
                yield from _captioned(where, name, texts, None, problems, whole=True)


def _coco_records(
    images: list[Any], annotations: list[Any], where: str, problems: list[str]
) -> Iterator[CaptionRecord]:
    """Microsoft COCO's `captions_*.json`: images with an id, annotations that name the id."""
    names = {
        image["id"]: image["file_name"]
        for image in images
        if isinstance(image, dict)
        and isinstance(image.get("id"), (int, str))
        and isinstance(image.get("file_name"), str)
    }
    official = _COCO_SPLIT.match(where)
    split = official.group(1) if official else None
    for number, annotation in enumerate(annotations, 1):
        here = f"{where}: annotation {number}"
        if not isinstance(annotation, dict) or not isinstance(annotation.get("caption"), str):
            problems.append(f"{here}: no caption")
        elif not isinstance(image_id := annotation.get("image_id"), (int, str)):
            problems.append(f"{here}: no image_id")
        elif image_id not in names:
            problems.append(f"{here}: image_id {_shown(image_id)} is not among the images")
        else:
            texts = [annotation["caption"]]
            yield from _captioned(here, names[image_id], texts, split, problems, whole=False)


def _karpathy_records(
    images: list[Any], where: str, problems: list[str]
) -> Iterator[CaptionRecord]:
    """Karpathy's `dataset_coco.json` and its like, which fix the splits that papers report on."""
    for number, image in enumerate(images, 1):
        try:
            name, split = image["filename"], image["split"]
            texts = _texts([sentence["raw"] for sentence in image["sentences"]])
        except (LookupError, TypeError):
            texts = None
        here = f"{where}: image {number}"
        if texts is None or not isinstance(name, str) or not isinstance(split, str):
            problems.append(f"{here}: no file name, split or raw sentences")
        else:
            # What Karpathy calls restval is trained on by everybody: 113,287 = train + restval.
            split = "train" if split == "restval" else split
            yield from _captioned(here, name, texts, split, problems, whole=True)


# ── Tables and token files ───────────────────────────────────────────────────────────────────────


def _token_lines(text: str, where: str, problems: list[str]) -> Iterator[CaptionRecord]:
    """Flickr8k's and Flickr30k's `name.jpg#0<TAB>caption`."""
    for number, line in enumerate(_LINE_END.split(text), 1):
        if found := _TOKEN_LINE.fullmatch(line):
            here = f"{where}:{number}"
            yield from _captioned(here, found["name"], [found["text"]], None, problems, whole=False)
        elif line.strip():
            problems.append(f"{where}:{number}: not of the form name.jpg#0<TAB>caption")


def _column_names(cells: list[str]) -> list[str]:
    return [cell.strip().strip('"').strip().lower() for cell in cells]


def _table_delimiter(first_line: str) -> str | None:
    """The character that parts the first line into a picture and a caption column, if any does."""
    for delimiter in ",\t|;":
        columns = set(_column_names(first_line.split(delimiter)))
        if columns & set(FILE_COLUMNS) and columns & set(CAPTION_COLUMNS):
            return delimiter
    return None


def _begins_a_table(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8-sig") as file:
            return _table_delimiter(file.readline(1000)) is not None
    except (OSError, UnicodeDecodeError):
        return False


def _no_columns(path: Path) -> CaptionError:
    return CaptionError(
        f"{printable(path)}: the first line names no picture column ({', '.join(FILE_COLUMNS)})"
        f" beside a caption column ({', '.join(CAPTION_COLUMNS)})"
    )


def _table_cells(
    text: str, where: str, delimiter: str, problems: list[str]
) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of each row that is not empty."""
    if delimiter in ",;":
        yield from _quoted_rows(text, where, delimiter, problems)
        return
    # With tabs and bars quotation marks are mostly part of the caption, and one that is never
    # closed must not swallow the rest of the file: a cell is unwrapped only if quoted as a whole.
    for number, line in enumerate(_LINE_END.split(text), 1):
        if line.strip():
            yield number, [_unquoted(cell.strip()) for cell in line.split(delimiter)]


def _quoted_rows(
    text: str, where: str, delimiter: str, problems: list[str]
) -> Iterator[tuple[int, list[str]]]:
    """The rows of a table whose quoted cells may hold delimiters and line ends."""
    lines = list(io.StringIO(text, newline=""))
    rows = csv.reader(lines, delimiter=delimiter)
    done = 0  # lines
    while True:
        first, fault = done + 1, None
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as exc:  # a cell beyond the limit of `csv`; it goes on at the next line
            fault, cells = str(exc), []
        done = rows.line_num
        # A quotation mark that is never closed makes one cell of all that follows.
        if done == len(lines) > first and _is_unclosed(lines[first - 1 :], delimiter):
            fault = "a quotation mark is never closed"
        if fault:
            upto = f"; skipped up to line {done:,}" if done > first else ""
            problems.append(f"{where}:{first}: {fault}{upto}")
        elif any(map(str.strip, cells)):
            yield done, cells


def _is_unclosed(lines: list[str], delimiter: str) -> bool:
    try:
        for _ in csv.reader(lines, delimiter=delimiter, strict=True):
            pass
    except csv.Error as exc:
        return "unexpected end" in str(exc)
    return False


def _unquoted(cell: str) -> str:
    if len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in cell[1:-1].replace('""', ""):
        return cell[1:-1].replace('""', '"')
    return cell


def _table_rows(
    text: str, path: Path, delimiter: str, problems: list[str]
) -> Iterator[CaptionRecord]:
    name = printable(path.name)
    rows = _table_cells(text, name, delimiter, problems)
    header = _column_names(next(rows, (0, []))[1])
    # A line that is quoted as a whole looked like a header, and is one cell.
    if not set(header) & set(FILE_COLUMNS) or not set(header) & set(CAPTION_COLUMNS):
        raise _no_columns(path)
    name_at = next(header.index(key) for key in FILE_COLUMNS if key in header)
    text_at = next(header.index(key) for key in CAPTION_COLUMNS if key in header)
    split_at = header.index("split") if "split" in header else None
    used = {name_at, text_at, split_at}
    others = [at for at in range(len(header)) if at not in used and header[at] not in _NUMBERING]
    for number, cells in rows:
        where = f"{name}:{number}"
        if len(cells) > len(header) and text_at == len(header) - 1:
            cells[text_at:] = [delimiter.join(cells[text_at:])]  # a caption with bare commas
        if len(cells) != len(header) or not cells[name_at].strip():
            problems.append(f"{where}: {len(cells)} cells, not a row of {len(header)} with a name")
            continue
        listed = _listed(cells[text_at]) if header[text_at] == "captions" else None
        yield from _captioned(
            where,
            cells[name_at].strip(),
            [cells[text_at]] if listed is None else listed,
            cells[split_at] if split_at is not None else None,
            problems,
            whole=listed is not None,
            extras=_extras(
                ((header[at], _cell_value(cells[at])) for at in others), where, problems
            ),
        )


def _listed(cell: str) -> list[str] | None:
    """The list that a cell of a `captions` column spells in JSON or, as pandas does, in Python."""
    cell = cell.strip()
    if cell.startswith("["):
        with suppress(ValueError, RecursionError):
            value = json.loads(cell)
            if isinstance(value, list):
                return _texts(value)
        if _PYTHON_LIST.fullmatch(cell):
            # Only texts are evaluated, one by one: the parser's stack and memory are not ours to
            # bound for anything nested.
            with suppress(ValueError, SyntaxError), warnings.catch_warnings(action="ignore"):
                return [ast.literal_eval(text) for text in re.findall(_PYTHON_TEXT, cell)]
    return None
