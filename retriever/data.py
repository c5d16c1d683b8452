"""Pictures on disk and their captions as records: `list_pictures`, `read_pairs`, `read_image`.

The formats of captions files are in `retriever.captions`, what pictures carry inside in
`retriever.descriptions`, how one is decoded in `retriever.decoding`.
"""

import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from PIL import Image, ImageFile

from retriever.captions import (
    CAPTION_FILES,
    MAX_EXTRAS,
    SIDECAR_SUFFIXES,
    CaptionRecord,
    find_caption_files,
    in_order,
    read_caption_file,
    read_sidecar,
    too_many_extras,
)
from retriever.decoding import (
    HAS_HEIF,
    MAX_PIXELS,
    date_taken,
    difference_hash,
    opened,
    upright_rgb,
)
from retriever.descriptions import camera_of, embedded_descriptions, position_of
from retriever.errors import CaptionError, PictureError, UsageError, printable

if TYPE_CHECKING:
    from indexes.records import Extras

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
    | {".avif", ".jp2", ".j2k"}
    | ({".heic", ".heif"} if HAS_HEIF else set())
)

# Besides hidden folders and `*.lib` stores: a NAS's previews, recycle bins, debris of archives.
_SKIPPED_FOLDERS = frozenset({"@eaDir", "#recycle", "$RECYCLE.BIN", "__MACOSX"})
_DOCUMENT = re.compile(
    r"read.?me|licen[cs]e|copying|credits|notes?|changelog|index|attribution|captions?|classes"
    r"|labels?|results|requirements|.*\.token",
    re.IGNORECASE,
)
_SOURCE_THREADS = 8


@dataclass(frozen=True, slots=True)
class Caption:
    """A caption on one line, and where it was found.

    `source` is "sidecar", the name of a captions file, "coco", "flickr", "exif", "iptc", "xmp", or
    "given" for one that the caller brought.
    """

    text: str
    source: str


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture file as listed, unopened.

    `file` is its path below `root`, with `/`; a name that is no UTF-8 keeps its bytes as lone
    surrogates (`os.fsencode` gives them back). `sidecars` are the names of the texts beside it that
    belong to it.
    """

    root: Path
    file: str
    size: int
    mtime_ns: int
    sidecars: tuple[str, ...]

    @property
    def path(self) -> Path:
        """Where the file is."""
        return self.root / self.file


@dataclass(frozen=True, slots=True)
class Pair:
    """A picture with at least one caption, and its split where the captions file names one."""

    path: Path
    file: str
    captions: tuple[Caption, ...]
    split: str | None

    def with_more(self, other: "Pair") -> "Pair":
        """The same picture with the captions of both, and the split that either names."""
        captions = merge_captions(self.captions, other.captions)
        return replace(self, captions=captions, split=self.split or other.split)


@dataclass(frozen=True, slots=True)
class CaptionReport:
    """How captions and pictures met.

    `by_source` counts captions and sums to `captions`. `unmatched` holds "where: name" of captions
    whose picture is missing or ambiguous, `duplicates` the same of pictures named twice where one
    record should hold all, `problems` a sentence on every file or line that could not be read.
    """

    pictures: int
    with_captions: int
    captions: int
    by_source: Mapping[str, int]
    unmatched: tuple[str, ...]
    duplicates: tuple[str, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Facts:
    """What is asked of a picture beside what it shows; None where the file does not tell.

    `camera`: maker and model. `latitude`, `longitude`: where it was taken, in degrees, north and
    east positive. `perceptual_hash`: see `retriever.decoding.difference_hash`.
    """

    camera: str | None = None
    latitude: float | None = None
    longitude: float | None = None
    perceptual_hash: int | None = None


@dataclass(frozen=True, slots=True)
class Decoded:
    """A decoded picture: upright RGB without metadata, perhaps smaller than the file's.

    `width` and `height` are the file's own, upright, in pixels. `taken` is the camera's local time.
    """

    image: Image.Image
    width: int
    height: int
    taken: datetime | None
    descriptions: tuple[Caption, ...]
    facts: Facts


def merge_captions(*groups: Iterable[Caption]) -> tuple[Caption, ...]:
    """All captions in order, without those whose text an earlier group holds.

    A text repeated within one group stays: the field's counts (Flickr8k's 5,000 test captions,
    COCO's 25,010) include the few captions that two annotators wrote alike.
    """
    merged: list[Caption] = []
    known: set[str] = set()
    for group in groups:
        fresh = [caption for caption in group if caption.text not in known]
        merged += fresh
        known.update(caption.text for caption in fresh)
    return tuple(merged)


# ── Listing ──────────────────────────────────────────────────────────────────────────────────────


def list_pictures(
    root: Path, *, problems: list[str] | None = None, strays: list[str] | None = None
) -> Iterator[Picture]:
    """Every picture below `root`: of each folder its files by name, then its folders by name.

    Hidden files and folders, `@eaDir`, recycle bins, `*.lib` stores and links to folders that are
    read anyway are skipped. Such links, unreadable folders and broken links to pictures are named
    in `problems`, texts that were meant for a picture which is not there in `strays`.

    Raises:
        UsageError: `root` is no folder.
    """
    if not root.is_dir():
        raise UsageError(f"{printable(root)}: no such folder")
    return _pictures_below(
        root, [] if problems is None else problems, [] if strays is None else strays
    )


def _pictures_below(root: Path, problems: list[str], strays: list[str]) -> Iterator[Picture]:
    for prefix, entries in _folders_below(root, problems):
        pictures, texts = [], []
        for entry in entries:
            suffix = _suffix(entry.name)
            if suffix in IMAGE_SUFFIXES:
                pictures.append(entry)
            elif suffix in SIDECAR_SUFFIXES:
                texts.append(entry.name)
        sidecars: Mapping[str, list[str]] = {}
        if texts:
            sidecars, without_picture = _match_sidecars([one.name for one in pictures], texts)
            strays += [printable(prefix + name) for name in without_picture]
        for entry in pictures:
            try:
                status = entry.stat()
            except OSError as exc:
                problems.append(f"{printable(prefix + entry.name)}: {exc.strerror}")
                continue
            if not stat.S_ISREG(status.st_mode):  # a pipe, a socket, a device
                problems.append(f"{printable(prefix + entry.name)}: not a regular file")
                continue
            beside = tuple(sidecars.get(entry.name, ()))
            yield Picture(root, prefix + entry.name, status.st_size, status.st_mtime_ns, beside)


def _match_sidecars(
    pictures: Sequence[str], texts: Sequence[str]
) -> tuple[dict[str, list[str]], list[str]]:
    """Names of the texts that belong to each picture of one folder, and of the strays.

    A text named like several pictures (`a.txt` beside `a.jpg` and `a.png`) belongs to each.
    """
    # macOS writes "é" as two characters, most programs as one: both are found.
    stem_of = {text: unicodedata.normalize("NFC", text[: -len(_suffix(text))]) for text in texts}
    wanted = set(stem_of.values())
    by_name: dict[str, list[str]] = {}
    by_stem: dict[str, list[str]] = {}
    for picture in pictures:
        name = unicodedata.normalize("NFC", picture)
        if name in wanted:
            by_name.setdefault(name, []).append(picture)
        stem = name[: -len(_suffix(name))]
        if stem in wanted:
            by_stem.setdefault(stem, []).append(picture)
    found: dict[str, list[str]] = {}
    without_picture = []
    any_text_matched = False
    for text, stem in stem_of.items():
        owners = by_name.get(stem) or by_stem.get(stem, [])
        for owner in owners:
            found.setdefault(owner, []).append(text)
        if not owners:
            without_picture.append(text)
        any_text_matched |= bool(owners) and _suffix(text) == ".txt"
    return found, [name for name in without_picture if _is_stray(name, any_text_matched)]


def _is_stray(name: str, any_text_matched: bool) -> bool:
    """Whether a text beside no picture was meant as a caption.

    A `.caption` was, and `photo.jpg.txt`; a `.txt` among texts that do describe pictures, unless
    it is called README or the like.
    """
    stem, suffix = name[: -len(_suffix(name))], _suffix(name)
    if suffix == ".caption" or _suffix(stem) in IMAGE_SUFFIXES:
        return True
    return any_text_matched and not _DOCUMENT.fullmatch(stem)


def _folders_below(root: Path, problems: list[str]) -> Iterator[tuple[str, list[os.DirEntry[str]]]]:
    """Each folder's prefix ("", "2024/", …) and its visible files, by name."""
    real_root = Path(os.path.realpath(root))
    seen: set[tuple[int, int]] = set()
    waiting = [(os.fspath(root), "")]
    while waiting:
        folder, prefix = waiting.pop()
        try:
            status = os.stat(folder)  # noqa: PTH116 - a Path for each folder costs more
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as exc:
            problems.append(f"{printable(prefix or folder)}: cannot be read: {exc.strerror}")
            continue
        if (status.st_dev, status.st_ino) in seen:
            problems.append(f"{printable(prefix)}: a link to a folder already read")
            continue
        seen.add((status.st_dev, status.st_ino))
        files, folders = [], []
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not _is_folder(entry):
                files.append(entry)
            elif not is_skipped(entry.name):
                if entry.is_symlink() and _is_reached(entry.path, real_root):
                    problems.append(
                        f"{printable(prefix + entry.name)}: a link, not followed: what it leads to"
                        " is read anyway, or holds this folder"
                    )
                else:
                    folders.append((entry.path, f"{prefix}{entry.name}/"))
        yield prefix, files
        waiting += reversed(folders)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself; list_pictures names it if it is called like a picture
        return False


def is_skipped(name: str) -> bool:
    """Whether a file or folder of this name is passed over, with all that is in it."""
    return name.startswith(".") or name in _SKIPPED_FOLDERS or _suffix(name) == ".lib"


def _is_reached(link: str, real_root: Path) -> bool:
    """Whether a link leads to a folder that the listing reaches by its real path."""
    target = Path(os.path.realpath(link))
    if real_root.is_relative_to(target):
        return True
    return target.is_relative_to(real_root) and not any(
        map(is_skipped, target.relative_to(real_root).parts)
    )


def _suffix(name: str) -> str:
    dot = name.rfind(".")
    return name[dot:].lower() if dot > 0 else ""


# ── Captions of the listed pictures ──────────────────────────────────────────────────────────────


class CaptionIndex:
    """The captions that files beside the pictures give.

    Sidecars come first (`photo.txt`, `photo.jpg.txt`, `photo.caption`; one caption a line), read
    when a picture is asked for; then the captions files of the root, or the one given instead of
    those, read at once. `problems` has a sentence on every file or line that could not be read.
    """

    def __init__(self, root: Path) -> None:
        self.problems: list[str] = []
        self._root = root
        self._captions: dict[str, tuple[Caption, ...]] = {}
        self._splits: dict[str, str] = {}
        self._extras: dict[str, Extras] = {}
        self._unmatched: dict[str, str] = {}  # name -> where
        self._duplicates: list[str] = []
        self._by_path: dict[str, str] = {}
        self._by_name: dict[str, list[str]] = {}

    @classmethod
    def read(
        cls, root: Path, *, captions: Path | None = None, pictures: Iterable[Picture]
    ) -> "CaptionIndex":
        """The index of `pictures`, as `list_pictures(root)` lists them.

        They are only gone through if there is a captions file. One in the root names a picture by
        its path from the root, from the captions file, or below `images/`; or by its bare name, if
        only one picture has it. One in a folder further down, such as `2019/captions.csv`, is
        about that folder.

        Raises:
            CaptionError: `captions` cannot be read. A file that was found on its own cannot stop
                anything: it becomes one of the `problems`.
        """
        index = cls(root)
        paths = [captions] if captions else [*find_caption_files(root), *_inner_files(root)]
        if paths:
            index._know_names(picture.file for picture in pictures)
        for path in paths:
            try:
                source, records = read_caption_file(path, index.problems)
            except CaptionError as exc:
                if captions is not None:
                    raise
                index.problems.append(str(exc))
            else:
                index._add_records(records, source, path, is_found=captions is None)
        return index

    @property
    def unmatched(self) -> tuple[str, ...]:
        """Captions of no picture in captions files, each with where it stands."""
        return tuple(f"{where}: {name}" for name, where in self._unmatched.items())

    def for_picture(self, picture: Picture) -> tuple[Caption, ...]:
        """Its captions without those inside the picture (`Decoded.descriptions` has these)."""
        in_files = self._captions.get(picture.file, ())
        if not picture.sidecars:
            return in_files
        prefix = picture.file[: picture.file.rfind("/") + 1]
        groups = []
        for name in picture.sidecars:
            try:
                texts = read_sidecar(picture.root / (prefix + name))
            except CaptionError as exc:
                self.problems.append(str(exc))
            else:
                groups.append(tuple(Caption(text, "sidecar") for text in texts))
        if len(groups) == 1 and not in_files:
            return groups[0]
        return merge_captions(*groups, in_files)

    def split_of(self, picture: Picture) -> str | None:
        """The split that the captions file puts it in, as written there."""
        return self._splits.get(picture.file)

    def extras_of(self, picture: Picture) -> "Extras":
        """What else captions files say of it, in order."""
        return self._extras.get(picture.file, ())[:MAX_EXTRAS]

    def report(
        self,
        groups: Sequence[Sequence[Caption]],
        *,
        strays: Iterable[str] = (),
        problems: Iterable[str] = (),
    ) -> CaptionReport:
        """How captions and pictures met.

        Args:
            groups: the captions of each picture, which `for_picture` gives at least.
            strays: as `list_pictures` names them.
            problems: those met elsewhere.
        """
        filled = [group for group in groups if group]
        counts = Counter(caption.source for group in filled for caption in group)
        return CaptionReport(
            pictures=len(groups),
            with_captions=len(filled),
            captions=counts.total(),
            by_source=MappingProxyType(dict(counts)),
            unmatched=(*(f"no picture beside: {name}" for name in strays), *self.unmatched),
            duplicates=tuple(self._duplicates),
            problems=(*self.problems, *problems),
        )

    def _know_names(self, files: Iterable[str]) -> None:
        composed_paths: dict[str, str] = {}
        for file in files:
            self._by_path[file] = file
            composed = unicodedata.normalize("NFC", file)
            composed_paths.setdefault(composed, file)
            self._by_name.setdefault(composed.rpartition("/")[2], []).append(file)
        self._by_path = composed_paths | self._by_path  # a name as it is written comes first

    def _add(self, file: str, groups: Iterable[Iterable[str]], source: str) -> None:
        new = ([Caption(text, source) for text in texts] for texts in groups)
        self._captions[file] = merge_captions(self._captions.get(file, ()), *new)

    def _add_records(
        self, records: Iterable[CaptionRecord], source: str, path: Path, *, is_found: bool
    ) -> None:
        found: dict[str, list[str]] = {}
        whole: dict[str, bool] = {}  # pictures named so far, and whether by a complete record
        wholes: dict[str, list[tuple[str, ...]]] = {}
        rows: dict[str, list[str]] = {}
        for record in records:
            if record.name not in found:
                is_inner = is_found and path.parent != self._root and path.name in CAPTION_FILES
                find = self._find_inside if is_inner else self._find
                found[record.name] = find(record.name, path.parent)
            files = found[record.name]
            if len(files) != 1:
                shown = printable(record.name)
                if files:
                    shown += f" ({len(files)} pictures have this name)"
                self._unmatched.setdefault(shown, record.where)
                continue
            file = files[0]
            if file in whole and (whole[file] or record.whole):
                self._duplicates.append(f"{record.where}: {printable(file)}")
            whole[file] = record.whole
            # Joined at the end: a file may hold a hundred thousand records of one picture.
            if record.whole:
                wholes.setdefault(file, []).append(record.texts)
            else:
                rows.setdefault(file, []).extend(record.texts)
            if record.extras:
                self._add_extras(file, record)
            if record.split and self._splits.setdefault(file, record.split) != record.split:
                self.problems.append(
                    f"{record.where}: {printable(file)} is in split {self._splits[file]!r} already,"
                    f" not in {record.split!r}"
                )
        for file in wholes.keys() | rows.keys():
            self._add(file, [*wholes.get(file, ()), rows.get(file, [])], source)

    def _add_extras(self, file: str, record: CaptionRecord) -> None:
        known = self._extras.setdefault(file, record.extras)
        if known is record.extras or len(known) > MAX_EXTRAS:
            return
        both = in_order(known + record.extras)
        if len(both) > MAX_EXTRAS:
            self.problems.append(f"{record.where}: {printable(file)}: {too_many_extras()}")
        self._extras[file] = both

    def _find(self, name: str, folder: Path) -> list[str]:
        """The pictures that a captions file in `folder` may mean by `name`; one if it is clear."""
        if name in self._by_path:
            return [self._by_path[name]]
        name = unicodedata.normalize("NFC", name.replace("\\", "/"))
        root = os.path.realpath(self._root)
        for base in (root, os.path.realpath(folder), os.path.join(root, "images")):  # noqa: PTH118
            try:
                full = Path(os.path.normpath(os.path.join(base, name)))  # noqa: PTH118
                file = full.relative_to(root).as_posix()
            except ValueError:  # elsewhere than below the root
                continue
            if file in self._by_path:
                return [self._by_path[file]]
        return self._by_name.get(name, [])

    def _find_inside(self, name: str, folder: Path) -> list[str]:
        """The same of a captions file that is about its own folder."""
        name = unicodedata.normalize("NFC", name.replace("\\", "/"))
        prefix = folder.relative_to(self._root).as_posix()
        for place in (prefix, f"{prefix}/images"):
            file = os.path.normpath(f"{place}/{name}")
            if file in self._by_path and file.startswith(f"{prefix}/"):
                return [self._by_path[file]]
        return [file for file in self._by_name.get(name, []) if file.startswith(f"{prefix}/")]


def _inner_files(root: Path) -> Iterator[Path]:
    """Captions files in the folders below `root`."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not is_skipped(name))
        if folder != os.fspath(root):
            for name in sorted(set(files).intersection(CAPTION_FILES)):
                yield Path(folder, name)


def read_pairs(
    root: Path, *, captions: Path | None = None, split: str | None = None, embedded: bool = True
) -> tuple[list[Pair], CaptionReport]:
    """The pictures below `root` that have captions, in the order of `list_pictures`, and a report.

    Args:
        root: the folder.
        captions: a captions file to read instead of those that `root` holds.
        split: only the pictures that the captions file puts in this split; the report's numbers
            are of these.
        embedded: also open every picture for the descriptions inside; one that cannot be opened
            is named in the report's `problems` and keeps its other captions.

    Raises:
        UsageError: `root` is no folder, or no picture is in `split`.
        CaptionError: `captions` cannot be read.
    """
    problems: list[str] = []
    strays: list[str] = []
    pictures = list(list_pictures(root, problems=problems, strays=strays))
    index = CaptionIndex.read(root, captions=captions, pictures=pictures)
    if split is not None:
        splits = {index.split_of(picture) for picture in pictures} - {None}
        pictures = [picture for picture in pictures if index.split_of(picture) == split]
        if not pictures:
            known = ", ".join(sorted(map(str, splits))) or "none"
            raise UsageError(
                f"{printable(root)}: no picture is in split {split!r}; splits: {known}"
            )
    inside: list[tuple[Caption, ...]] = [()] * len(pictures)
    if embedded:
        from retriever.machine import cores

        with ThreadPoolExecutor(min(_SOURCE_THREADS, cores())) as threads:
            found = list(threads.map(_read_descriptions, pictures))
        inside = [descriptions for descriptions, _ in found]
        problems += [problem for _, problem in found if problem]
    groups = [
        merge_captions(index.for_picture(picture), descriptions)
        for picture, descriptions in zip(pictures, inside, strict=True)
    ]
    pairs = [
        Pair(picture.path, picture.file, group, index.split_of(picture))
        for picture, group in zip(pictures, groups, strict=True)
        if group
    ]
    return pairs, index.report(groups, strays=strays, problems=problems)


def read_image(path: Path, *, target: int | None = None, max_pixels: int = MAX_PIXELS) -> Decoded:
    """The picture at `path`, upright, as RGB; of an animation the first frame. Thread-safe.

    Transparency shows white; more than 8 bits a channel are scaled to 8.

    Args:
        path: the content decides what it is, not the name: a PNG called .jpg is read.
        target: the side in pixels that the caller will resize to. The picture is then made
            smaller by a whole factor, but with neither side below twice the target.
        max_pixels: a picture whose header states more is refused before it is decoded.

    Raises:
        PictureError: the file is missing, empty, not a picture, truncated, damaged or too large.
    """
    with opened(path, max_pixels) as image:
        taken, descriptions = date_taken(image), _descriptions(image)
        camera, (latitude, longitude) = camera_of(image), position_of(image) or (None, None)
        rgb, width, height = upright_rgb(image, target)
        facts = Facts(camera, latitude, longitude, difference_hash(rgb))
    return Decoded(rgb, width, height, taken, descriptions, facts)


def _read_descriptions(picture: Picture) -> tuple[tuple[Caption, ...], str | None]:
    """The descriptions inside a picture, and why it cannot be opened, if so."""
    try:
        with opened(picture.path) as image:
            return _descriptions(image), None
    except PictureError as exc:
        return (), str(exc)


def _descriptions(image: ImageFile.ImageFile) -> tuple[Caption, ...]:
    return tuple(Caption(text, source) for source, text in embedded_descriptions(image))
