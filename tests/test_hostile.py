"""Hostile and broken pictures: each is indexed or named with its reason, and harms no other."""

import io
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import COLOURS, ToyEncoder, paint
from mutations import class_of, mutants
from PIL import Image
from test_ingest import embedding_of, items_of, no_encoder, touch
from test_workers import endless_jpeg

from indexes.store import ModelSpec, Store
from retriever import ingest
from retriever.encoders import load_encoder
from retriever.errors import FolderGoneError
from retriever.ingest import IndexReport, index_folder
from retriever.workers import DecodeWorkers

Index = Callable[..., IndexReport]

RED = (1.0, 0.0, 0.0, 0.0)
HALF = 1e-3  # of a coordinate: stored in 16 bits
LOSSY = 0.02  # of a coordinate: what JPEG and CMYK do to pure red


@pytest.fixture
def index(fresh_store: Store, toy_encoder: ToyEncoder) -> Index:
    return partial(index_folder, fresh_store, lambda: toy_encoder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "hostile"
    made.mkdir()
    return made


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def flat(colour: str = "red", mode: str = "RGB") -> Image.Image:
    return Image.new("RGB", (16, 16), COLOURS[colour]).convert(mode)


def assert_named(store: Store, folder: Path, report: IndexReport) -> None:
    """Every failure of a run is kept with its reason, told again, and its file not read again."""
    assert all(failure.reason for failure in report.failed)
    kept = {str(item.path): item.reason for item in store.failures()}
    assert kept == {str(failure.path): failure.reason for failure in report.failed}
    again = index_folder(store, no_encoder, folder)
    assert set(again.failed) == set(report.failed)
    assert again.unchanged == report.added + report.updated + report.unchanged
    assert store.verify() == []


# ── Damage ───────────────────────────────────────────────────────────────────────────────────────


def test_a_picture_cut_off_anywhere_is_named_and_the_whole_ones_are_found(
    index: Index, fresh_store: Store, folder: Path, toy_encoder: ToyEncoder
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    whole = {
        kind: encoded(Image.fromarray(noise), kind)
        for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF")
    }
    for kind, content in whole.items():
        for percent in range(0, 101, 5):
            path = folder / f"{percent}.{kind.lower()}"
            path.write_bytes(content[: len(content) * percent // 100])
    report = index(folder)
    assert report.added == 5
    assert {failure.path.name for failure in report.failed} == {
        f"{percent}.{kind.lower()}" for kind in whole for percent in range(0, 100, 5)
    }
    assert {class_of(one.reason) for one in report.failed} == {"empty", "damaged"}
    assert_named(fresh_store, folder, report)
    match = fresh_store.search("image", toy_encoder.encode_texts(["white"]), 200)[0]
    assert len(match.ids) == 5

    (folder / "50.png").write_bytes(whole["PNG"])
    touch(folder / "55.png")
    report = index(folder)
    assert (report.updated, len(report.failed)) == (1, 99)
    assert_named(fresh_store, folder, report)


def check_mutants(index: Index, store: Store, folder: Path, count: int, seed: int) -> None:
    for number, mutant in enumerate(mutants(count, seed)):
        (folder / f"{number}-{mutant.original}").write_bytes(mutant.content)
    paint(folder / "good.png", "red")
    report = index(folder)
    assert report.added + len(report.failed) == count + 1
    assert count / 10 < len(report.failed) < count  # the damage is neither too light nor too heavy
    assert [one for one in report.failed if class_of(one.reason) in (None, "late", "crashed")] == []
    assert embedding_of(store, folder / "good.png") == pytest.approx(RED)
    assert_named(store, folder, report)
    for failure in report.failed:
        failure.path.write_bytes((folder / "good.png").read_bytes())
    assert index(folder).updated == len(report.failed)
    assert store.failures() == []


def test_of_randomly_damaged_pictures_each_is_indexed_or_named(
    index: Index, fresh_store: Store, folder: Path
) -> None:
    check_mutants(index, fresh_store, folder, 300, seed=1)


@pytest.mark.slow
def test_of_10_000_randomly_damaged_pictures_each_is_indexed_or_named(
    index: Index, fresh_store: Store, folder: Path
) -> None:
    check_mutants(index, fresh_store, folder, 10_000, seed=2)


def test_a_picture_that_would_decode_for_minutes_is_named_and_the_others_are_indexed(
    index: Index,
    fresh_store: Store,
    tiny_pairs: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ingest, "DecodeWorkers", partial(DecodeWorkers, seconds=1.5))
    endless_jpeg(tiny_pairs / "endless.jpg")
    report = index(tiny_pairs)
    assert report.added == 5
    assert [one.reason for one in report.failed] == ["took longer than 1.5 s to decode"]
    assert_named(fresh_store, tiny_pairs, report)


# ── Bombs ────────────────────────────────────────────────────────────────────────────────────────


def png(width: int, height: int, *chunks: tuple[bytes, bytes], bits: int = 1) -> bytes:
    """A valid black PNG of any size, at 1/1000 of what its pixels take."""
    compressor = zlib.compressobj(9)
    row = bytes(1 + (width * bits + 7) // 8)
    body = b"".join([*(compressor.compress(row) for _ in range(height)), compressor.flush()])
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )


def test_bombs_are_refused_by_what_their_headers_say(
    index: Index, fresh_store: Store, folder: Path
) -> None:
    (folder / "bomb.png").write_bytes(png(30_000, 30_000))
    assert (folder / "bomb.png").stat().st_size < 1_000_000
    gif = bytearray(encoded(flat(), "GIF"))
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    (folder / "bomb.gif").write_bytes(gif)
    bmp = bytearray(encoded(flat(), "BMP"))
    bmp[18:26] = struct.pack("<ii", 2**31 - 1, 2**31 - 1)
    (folder / "bomb.bmp").write_bytes(bmp)
    tiff = encoded(flat(), "TIFF").replace(
        struct.pack("<HHII", 256, 4, 1, 16), struct.pack("<HHII", 256, 4, 1, 2**31 - 1)
    )
    (folder / "bomb.tif").write_bytes(tiff)
    (folder / "captioned.png").write_bytes(
        png(8, 8, (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(80_000_000), 9)))
    )
    paint(folder / "good.png", "red")
    report = index(folder)
    reasons = {failure.path.name: failure.reason for failure in report.failed}
    limit = "more than the limit of 200,000,000"
    assert reasons["bomb.png"] == f"30000 × 30000 pixels, {limit}"
    assert reasons["bomb.gif"] == f"65535 × 65535 pixels, {limit}"
    assert reasons["bomb.bmp"].endswith(limit)
    assert reasons["bomb.tif"].endswith(limit)
    assert class_of(reasons["captioned.png"]) == "damaged"  # by Pillow's limit for such texts
    assert embedding_of(fresh_store, folder / "good.png") == pytest.approx(RED)
    assert_named(fresh_store, folder, report)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is bounded on Linux only")
def test_a_bomb_within_the_limit_of_pixels_meets_that_of_memory(
    index: Index, fresh_store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "DecodeWorkers", partial(DecodeWorkers, memory_bytes=150 << 20))
    (folder / "bomb.png").write_bytes(png(14_000, 14_000))
    paint(folder / "good.png", "red")
    report = index(folder)
    assert report.added == 1
    assert [one.reason for one in report.failed] == ["needs more memory than 150 MB to decode"]
    assert_named(fresh_store, folder, report)


# ── Unusual but whole ────────────────────────────────────────────────────────────────────────────


def test_whatever_the_mode_the_format_and_the_name_say_red_is_red(
    index: Index, fresh_store: Store, folder: Path
) -> None:
    clear = flat(mode="RGBA")
    clear.putpixel((0, 0), (255, 0, 0, 250))
    frames = {"save_all": True, "append_images": [flat("blue")]}
    paletted = Image.new("P", (16, 16), 1)
    paletted.putpalette([0, 0, 255, 255, 0, 0])
    contents = {
        "cmyk.jpg": encoded(flat(mode="CMYK"), "JPEG"),
        "cmyk.tif": encoded(flat(mode="CMYK"), "TIFF"),
        "clear.png": encoded(clear, "PNG"),
        "paletted.png": encoded(paletted, "PNG", transparency=0),
        "paletted.gif": encoded(paletted, "GIF", transparency=0),
        "animated.gif": encoded(flat(), "GIF", **frames),
        "animated.webp": encoded(flat(), "WEBP", lossless=True, **frames),
        "animated.png": encoded(flat(), "PNG", **frames),
        "pages.tif": encoded(flat(), "TIFF", **frames),
        "a-png.jpg": encoded(flat(), "PNG"),
        "a-jpeg.gif": encoded(flat(), "JPEG"),
        "a-webp.tiff": encoded(flat(), "WEBP", lossless=True),
        "a-bitmap.avif": encoded(flat(), "BMP"),
        "A-GIF.JP2": encoded(flat(), "GIF"),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    deep = np.full((16, 16), 65535, dtype=np.uint16)
    (folder / "deep.png").write_bytes(encoded(Image.fromarray(deep), "PNG"))
    assert index(folder) == IndexReport(added=len(contents) + 1)
    for name in contents:
        assert embedding_of(fresh_store, folder / name) == pytest.approx(RED, abs=LOSSY), name
    white = np.array([1, 1, 1, 0]) / np.sqrt(3)
    assert embedding_of(fresh_store, folder / "deep.png") == pytest.approx(white, abs=HALF)


TO_STORED = {  # what a camera held in each way does to an upright picture: undone by the reader
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("name", ["toy", "mini"])
def test_a_turned_picture_has_the_embedding_of_the_upright_one(
    tmp_path: Path, folder: Path, toy_encoder: ToyEncoder, name: str
) -> None:
    skimage = pytest.importorskip("skimage.data")
    # Of this size, so that making it smaller for the toy leaves no rest at any edge.
    cat = Image.fromarray(skimage.chelsea()[:288, :396])
    for orientation, turn in TO_STORED.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = cat if turn is None else cat.transpose(turn)
        stored.save(folder / f"{orientation}.png", exif=exif)
        stored.save(folder / f"{orientation}.jpg", exif=exif, quality=97)
    encoder = toy_encoder if name == "toy" else load_encoder("mini")
    model = ModelSpec(name, encoder.dim, encoder.fingerprint)
    with Store.create(tmp_path / "a.lib", model) as store:
        assert index_folder(store, lambda: encoder, folder) == IndexReport(added=16)
        for item in items_of(store).values():
            assert (item.width, item.height) == cat.size
        upright = embedding_of(store, folder / "1.png")
        assert upright == pytest.approx(encoder.encode_images([cat])[0], abs=HALF)
        for orientation in TO_STORED:
            exact = embedding_of(store, folder / f"{orientation}.png")
            assert exact == pytest.approx(upright, abs=1e-6), orientation
            assert embedding_of(store, folder / f"{orientation}.jpg") @ upright > 0.995, orientation
    if name == "mini":  # which would tell
        assert encoder.encode_images([cat.transpose(Image.Transpose.ROTATE_90)])[0] @ upright < 0.98


def tiff_header(*entries: tuple[int, int, int, int], next_ifd: int = 0) -> bytes:
    """An EXIF block of one directory: (tag, type, count, value) each."""
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + struct.pack("<I", next_ifd)


BROKEN_EXIF = {
    "noise": np.random.default_rng(0).bytes(200),
    "empty": b"",
    "cut": tiff_header((0x0112, 3, 1, 6))[:14],
    "count": tiff_header((0x0112, 3, 2**32 - 1, 6)),
    "type": tiff_header((0x0112, 99, 1, 6)),
    "text": tiff_header((0x0112, 2, 4, 0x41414141)),
    "far": tiff_header((0x010E, 2, 2**31, 2**32 - 1)),
    "loop": tiff_header((0x0112, 3, 1, 1), next_ifd=8),
    "itself": tiff_header((0x8769, 4, 1, 8)),
    "many": b"II*\0\x08\0\0\0\xff\xff" + bytes(100),
    "order": b"XX*\0\x08\0\0\0" + bytes(20),
    "date": tiff_header((0x8769, 4, 1, 2**32 - 1)),
}


def test_broken_exif_costs_no_picture(index: Index, fresh_store: Store, folder: Path) -> None:
    for name, block in BROKEN_EXIF.items():
        for kind in ("JPEG", "PNG", "WEBP"):
            path = folder / f"{name}.{kind.lower()}"
            path.write_bytes(encoded(flat(), kind, exif=b"Exif\0\0" + block))
    assert index(folder) == IndexReport(added=3 * len(BROKEN_EXIF))
    for path in folder.iterdir():
        assert embedding_of(fresh_store, path) == pytest.approx(RED, abs=LOSSY), path.name


# ── Names ────────────────────────────────────────────────────────────────────────────────────────

NAMES = [
    b"new\nline.png",
    b"tab\tand\rreturn.png",
    b"'single' \"double\" `back`.png",
    b"'; DROP TABLE items; --.png",
    b"--prune.png",
    b" .png",
    b"100% {of} $HOME *?.png",
    b"back\\slash.png",
    "🦊🏳️‍🌈.png".encode(),
    "שלום-\u202egnp.png".encode(),
    b"caf\xe9-\xff\xfe.png",
    b"\xed\xa0\x80.png",  # a surrogate as UTF-8 would write it, and must not
    b"\x01\x1b[31mred.png",
    b"n" * 251 + b".png",
    "é".encode() * 125 + b".png",
]


def test_any_name_is_indexed_found_and_removed(
    index: Index, fresh_store: Store, folder: Path, toy_encoder: ToyEncoder
) -> None:
    made = 0
    for name in NAMES:
        try:
            Image.new("RGB", (20 + made, 9), "red").save(folder / "made.png")
            (folder / "made.png").rename(folder / os.fsdecode(name))
        except OSError:
            (folder / "made.png").unlink()
            continue
        made += 1
        if len(name) < 200:
            (folder / os.fsdecode(name[:-4] + b".txt")).write_text("a red picture")
    assert made >= 5
    paths = {str(path) for path in folder.glob("*.png")}
    assert index(folder) == IndexReport(added=made)
    found = fresh_store.search("image", toy_encoder.encode_texts(["red"]), 100)[0]
    assert {str(item.path) for item in fresh_store.items(found.ids.tolist())} == paths
    for item in items_of(fresh_store).values():
        assert [one.text for one in item.captions] in ([], ["a red picture"])
        assert bool(item.captions) == (len(os.fsencode(item.path.name)) < 200)
    assert index_folder(fresh_store, no_encoder, folder) == IndexReport(unchanged=made)
    for path in paths:
        Path(path).write_bytes(b"broken now")
    report = index(folder)
    assert {str(failure.path) for failure in report.failed} == paths
    assert_named(fresh_store, folder, report)
    for path in sorted(paths)[1:]:
        Path(path).unlink()
    assert index(folder).removed == made - 1


# ── What is no file, or none that can be read ────────────────────────────────────────────────────


@pytest.mark.skipif(os.name != "posix", reason="such files are those of POSIX")
def test_pipes_sockets_devices_and_loops_of_links_are_not_opened(
    index: Index, fresh_store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paint(folder / "deep" / "red.png", "red")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "zero.jpg").symlink_to("/dev/zero")
    (folder / "terminal.jpg").symlink_to("/dev/tty")
    (folder / "self.jpg").symlink_to("self.jpg")
    (folder / "there.jpg").symlink_to("back.jpg")
    (folder / "back.jpg").symlink_to("there.jpg")
    (folder / "deep" / "up").symlink_to(folder)
    (folder / "deep" / "round").symlink_to(folder / "deep" / "round")
    (folder / "folder.png").mkdir()
    monkeypatch.chdir(folder)  # the address of a socket is short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.jpg")
        report = index(folder)
    assert (report.added, report.failed) == (1, ())
    named = {problem.partition(":")[0] for problem in report.problems}
    assert named == {
        *("self.jpg", "there.jpg", "back.jpg", "deep/up"),
        *("pipe.jpg", "socket.jpg", "zero.jpg", "terminal.jpg"),
    }
    assert list(items_of(fresh_store)) == [str(folder / "deep" / "red.png")]


INDEX = """
import json, sys
from pathlib import Path
from conftest import ToyEncoder
from indexes.store import ModelSpec, Store
from retriever.ingest import index_folder
folder, library = Path(sys.argv[1]), Path(sys.argv[2])
model = ModelSpec("toy", ToyEncoder.dim, "toy-1")
with Store.open(library) if library.exists() else Store.create(library, model) as store:
    report = index_folder(store, ToyEncoder, folder)
failed = [(one.path.name, one.reason) for one in report.failed]
print(json.dumps([report.added, report.updated, report.unchanged, failed, report.problems]))
"""


def run_without_privileges(*arguments: Path) -> Any:
    """What `INDEX` prints where the modes of files count, which they do not for root."""
    command: Sequence[str | Path] = [sys.executable, "-c", INDEX, *arguments]
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("root may read everything, and there is no setpriv to change that")
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *map(str, command)]
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(os.name != "posix", reason="modes of files are those of POSIX")
def test_what_may_not_be_read_is_named_and_read_once_it_may(
    tiny_pairs: Path, tmp_path: Path
) -> None:
    secret, closed = tiny_pairs / "red.png", tiny_pairs / "more"
    run = partial(run_without_privileges, tiny_pairs, tmp_path / "a.lib")
    secret.chmod(0)
    closed.chmod(0)
    try:
        first, second = run(), run()
    finally:
        closed.chmod(0o755)
    failed = [["red.png", "cannot be read: Permission denied"]]
    problems = ["more/: cannot be read: Permission denied"]
    assert first == [3, 0, 0, failed, problems]
    assert second == [0, 0, 3, failed, problems]
    secret.chmod(0o644)
    assert run() == [1, 1, 3, [], []]


class Saboteur(ToyEncoder):
    """Removes a folder when it is first asked for embeddings, in the middle of a run."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def encode_images(self, images: Sequence[Image.Image | Path | np.ndarray]) -> np.ndarray:
        shutil.rmtree(self.folder, ignore_errors=True)
        return super().encode_images(images)


def test_a_folder_that_vanishes_meanwhile_costs_only_its_own_pictures(
    fresh_store: Store, folder: Path
) -> None:
    for number in range(12):
        paint(folder / "a" / f"{number}.png", "red", side=10 + number)
        paint(folder / "b" / f"{number}.png", "blue", side=10 + number)
        paint(folder / "c" / f"{number}.png", "green", side=10 + number)
    saboteur = Saboteur(folder / "b")
    report = index_folder(fresh_store, lambda: saboteur, folder, batch_size=4)
    assert report.added + len(report.failed) == 36
    assert report.failed
    assert {one.path.parent.name for one in report.failed} == {"b"}
    assert {one.reason for one in report.failed} == {
        "went away or changed while the folder was being read"
    }
    again = index_folder(fresh_store, no_encoder, folder)
    assert again == IndexReport(removed=12, unchanged=24)
    assert fresh_store.verify() == []


def test_a_whole_drive_that_vanishes_meanwhile_is_no_mass_deletion(
    fresh_store: Store, folder: Path
) -> None:
    for number in range(12):
        paint(folder / f"{number}.png", "red", side=10 + number)
    saboteur = Saboteur(folder)
    report = index_folder(fresh_store, lambda: saboteur, folder, batch_size=2)
    assert report.added >= 2
    assert report.added + len(report.failed) == 12
    with pytest.raises(FolderGoneError):
        index_folder(fresh_store, no_encoder, folder)
    kept = [item.status for item in items_of(fresh_store).values()]
    assert kept.count("ok") == report.added
