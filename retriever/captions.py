"""Where captions are written beside pictures: tables, lists of records, token files, sidecars.

Nothing here knows which pictures exist: `retriever.data` matches the names found here to pictures.
"""

import ast
import codecs
import csv
import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retriever.errors import CaptionError

FILE_COLUMNS = ("file", "image", "filename", "file_name", "image_name", "image_path", "path")
CAPTION_COLUMNS = ("caption", "captions", "text", "comment")

# Far more than any list of captions for one picture; a log file beside a picture is no sidecar.
MAX_SIDECAR_BYTES = 1_000_000

_LINE_END = re.compile(r"\r\n|\r|\n")
_BLANK = re.compile(r"[\s\x00-\x1f\x7f-\x9f]+")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_TOKEN_LINE = re.compile(r"(?P<name>.+)#\d+\t(?P<text>.*)")
_BOX_LINE = re.compile(r"\d+(\s+-?\d*\.\d+){4,}\s*")
_COCO_SPLIT = re.compile(r"captions_(train|val|test)\d{4}")


@dataclass(frozen=True, slots=True)
class CaptionRecord:
    """What one place of a captions file says about one picture.

    `where` is "captions.csv:12". `name` stands as written. `whole`: the format gives all captions
    of a picture in one record, so that a second record of the same picture is a fault.
    """

    where: str
    name: str
    texts: tuple[str, ...]
    split: str | None
    whole: bool


def printable(path: str | os.PathLike[str]) -> str:
    r"""The path as text that can be encoded; bytes that are no UTF-8 show as `\xff`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def clean_caption(text: str) -> str:
    """The caption on one line: runs of white space and control characters become one space.

    Lone surrogates, which neither SQLite nor a tokenizer accepts, become U+FFFD.
    """
    return _BLANK.sub(" ", _SURROGATE.sub("\ufffd", text)).strip()


def find_caption_files(root: Path) -> list[Path]:
    """The captions files that `root` holds under their usual names, in a fixed order."""
    names = ["captions.jsonl", "captions.json", "captions.csv", "captions.tsv"]
    found = [root / name for name in names]
    for pattern in ("*.token.txt", "*.token", "captions_*.json", "annotations/captions_*.json"):
        found += sorted(root.glob(pattern))
    # Kaggle's names for Flickr8k and Flickr30k say little: the first line must fit as well.
    found += [p for p in (root / "captions.txt", root / "results.csv") if _begins_a_table(p)]
    return [path for path in found if path.is_file() and ".lemma." not in path.name]


def read_caption_file(path: Path, problems: list[str]) -> tuple[str, list[CaptionRecord]]:
    """The source ("coco", "flickr" or the file's name) and the records of a captions file.

    Read are JSON lines; a JSON list of records, a JSON object {file: caption or captions}, COCO
    captions, Karpathy's `dataset_*.json`; tables with a header (comma, semicolon, tab or `|`);
    Flickr8k/Flickr30k token files. A line that makes no sense is added to `problems`.

    Raises:
        CaptionError: the file cannot be opened, is not UTF-8, or is none of these formats.
    """
    text = _read_utf8(path)
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return path.name, list(_json_lines(text, path.name, problems))
    if suffix == ".json":
        return _json_file(text, path, problems)
    first_line = _first_line(text)
    if _TOKEN_LINE.fullmatch(first_line):
        return "flickr", list(_token_lines(text, path.name, problems))
    delimiter = _table_delimiter(first_line)
    if delimiter is None:
        raise CaptionError(
            f"{printable(path)}: the first line names no picture column ({', '.join(FILE_COLUMNS)})"
            f" beside a caption column ({', '.join(CAPTION_COLUMNS)})"
        )
    source = "flickr" if "comment_number" in first_line.lower() else path.name
    return source, list(_table_rows(text, path, delimiter, problems))


def read_sidecar(path: Path) -> list[str]:
    """The captions of a text file beside a picture, one a line, without empty lines.

    Raises:
        CaptionError: the file cannot be opened, is not UTF-8, over 1 MB, or holds box labels.
    """
    try:
        size = path.stat().st_size
    except OSError as exc:
        raise CaptionError(f"{printable(path)}: {exc.strerror}") from exc
    if size > MAX_SIDECAR_BYTES:
        raise CaptionError(f"{printable(path)}: over 1 MB, too large for the captions of a picture")
    lines = [line for line in map(clean_caption, _LINE_END.split(_read_utf8(path))) if line]
    if lines and all(map(_BOX_LINE.fullmatch, lines)):
        raise CaptionError(f"{printable(path)}: box labels (YOLO), not captions")
    return lines


def _read_utf8(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise CaptionError(f"{printable(path)}: {exc.strerror}") from exc
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
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
    found = re.search(r"[^\r\n]*\S[^\r\n]*", text)
    return found.group() if found else ""


def _texts(value: Any) -> tuple[str, ...] | None:
    """The captions of a JSON value: a text, a list of texts or null; None for anything else."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(item, str) for item in values):
        return None
    return tuple(text for text in map(clean_caption, values) if text)


# ── JSON ─────────────────────────────────────────────────────────────────────────────────────────


class _Repeated(list[Any]):
    """The values of a key that one JSON object gives several times; `json` would keep the last."""


def _json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        for key in result:
            values = [value for name, value in pairs if name == key]
            if len(values) > 1:
                result[key] = _Repeated(values)
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
    if isinstance(content, list):
        records: Iterator[CaptionRecord] = (
            record
            for number, fields in enumerate(content, 1)
            for record in _record(fields, f"{path.name}: record {number}", problems)
        )
        return path.name, list(records)
    if isinstance(content, dict):
        images, annotations = content.get("images"), content.get("annotations")
        if isinstance(images, list) and isinstance(annotations, list):
            return "coco", list(_coco_records(images, annotations, path.name, problems))
        if isinstance(images, list):
            return path.name, list(_karpathy_records(images, path.name, problems))
        return path.name, list(_mapping_records(content, path.name, problems))
    raise CaptionError(f"{printable(path)}: neither a list of records nor an object")


def _record(fields: Any, where: str, problems: list[str]) -> Iterator[CaptionRecord]:
    """The record of one JSON object with a file and a caption field; none if it makes no sense."""
    if not isinstance(fields, dict):
        problems.append(f"{where}: not an object with a file and a caption")
        return
    fields = {key.strip().lower(): value for key, value in fields.items()}
    name = next((fields[key] for key in FILE_COLUMNS if key in fields), None)
    if not isinstance(name, str) or not name:
        problems.append(f"{where}: no file name ({', '.join(FILE_COLUMNS)})")
        return
    if not any(key in fields for key in CAPTION_COLUMNS):
        problems.append(f"{where}: no caption ({', '.join(CAPTION_COLUMNS)})")
        return
    value = next(filter(None, (fields.get(key) for key in CAPTION_COLUMNS)), None)
    split = fields.get("split")
    texts = _texts(value)
    if texts is None:
        problems.append(f"{where}: the caption is neither a text nor a list of texts")
        return
    whole = isinstance(value, list)
    yield CaptionRecord(where, name, texts, split if isinstance(split, str) else None, whole)


def _mapping_records(
    content: dict[str, Any], where: str, problems: list[str]
) -> Iterator[CaptionRecord]:
    for name, value in content.items():
        for one in value if isinstance(value, _Repeated) else [value]:
            texts = _texts(one)
            if texts is None:
                problems.append(f"{where}: {name}: neither a text nor a list of texts")
            else:
                yield CaptionRecord(where, name, texts, None, whole=True)


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
        elif not isinstance(annotation.get("image_id"), (int, str)) or (
            annotation["image_id"] not in names
        ):
            problems.append(
                f"{here}: image_id {annotation.get('image_id')} is not among the images"
            )
        else:
            texts = _texts(annotation["caption"]) or ()
            yield CaptionRecord(here, names[annotation["image_id"]], texts, split, whole=False)


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
        if texts is None or not isinstance(name, str):
            problems.append(f"{where}: image {number}: no file name, split or raw sentences")
        else:
            # What Karpathy calls restval is trained on by everybody: 113,287 = train + restval.
            split = "train" if split == "restval" else str(split)
            yield CaptionRecord(f"{where}: image {number}", name, texts, split, whole=True)


# ── Tables and token files ───────────────────────────────────────────────────────────────────────


def _token_lines(text: str, where: str, problems: list[str]) -> Iterator[CaptionRecord]:
    """Flickr8k's and Flickr30k's `name.jpg#0<TAB>caption`."""
    for number, line in enumerate(_LINE_END.split(text), 1):
        if found := _TOKEN_LINE.fullmatch(line):
            texts = _texts(found["text"]) or ()
            yield CaptionRecord(f"{where}:{number}", found["name"], texts, None, whole=False)
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


def _table_cells(text: str, path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of each row that is not empty."""
    if delimiter in ",;":
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        try:
            for cells in rows:
                if any(map(str.strip, cells)):
                    yield rows.line_num, cells
        except csv.Error as exc:
            raise CaptionError(f"{printable(path)}:{rows.line_num}: {exc}") from exc
        return
    # With tabs and bars quotation marks are mostly part of the caption, and one that is never
    # closed must not swallow the rest of the file: a cell is unwrapped only if quoted as a whole.
    for number, line in enumerate(_LINE_END.split(text), 1):
        if line.strip():
            yield number, [_unquoted(cell.strip()) for cell in line.split(delimiter)]


def _unquoted(cell: str) -> str:
    if len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in cell[1:-1].replace('""', ""):
        return cell[1:-1].replace('""', '"')
    return cell


def _table_rows(
    text: str, path: Path, delimiter: str, problems: list[str]
) -> Iterator[CaptionRecord]:
    rows = _table_cells(text, path, delimiter)
    header = _column_names(next(rows)[1])
    name_at = next(header.index(key) for key in FILE_COLUMNS if key in header)
    text_at = next(header.index(key) for key in CAPTION_COLUMNS if key in header)
    split_at = header.index("split") if "split" in header else None
    for number, cells in rows:
        where = f"{path.name}:{number}"
        if len(cells) > len(header) and text_at == len(header) - 1:
            cells[text_at:] = [delimiter.join(cells[text_at:])]  # a caption with bare commas
        if len(cells) != len(header) or not cells[name_at].strip():
            problems.append(f"{where}: {len(cells)} cells, not a row of {len(header)} with a name")
            continue
        listed = _listed(cells[text_at]) if header[text_at] == "captions" else None
        split = cells[split_at].strip() if split_at is not None else ""
        yield CaptionRecord(
            where,
            cells[name_at].strip(),
            _texts(cells[text_at] if listed is None else listed) or (),
            split or None,
            whole=listed is not None,
        )


def _listed(cell: str) -> list[Any] | None:
    """The list that a cell of a `captions` column spells in JSON or, as pandas does, in Python."""
    if cell.lstrip().startswith("["):
        for parse in (json.loads, ast.literal_eval):
            try:
                value = parse(cell.strip())
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            if isinstance(value, list) and _texts(value) is not None:
                return value
    return None
