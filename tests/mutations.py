"""Pictures of every format, damaged at random, and the words in which they may be refused.

Shared by `test_hostile` and by `benchmarks/mutated.py`. A picture follows from the seed and its
number alone, so that any one of thousands can be made again.
"""

import io
import random
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

# Every reason that `read_image` and the decoding processes give for a file that is there.
REASONS = {
    name: re.compile(pattern)
    for name, pattern in {
        "unknown": "not a picture in a known format",
        "damaged": r"truncated or damaged \(.+\)",
        "empty": "the file is empty",
        "pixels": r"\d+ × \d+ pixels, more than the limit of 200,000,000",
        "memory": "needs more memory than [0-9,]+ MB to decode|too large for the memory at hand",
        "late": r"took longer than [0-9.]+ s to decode",
        "crashed": r"its decoder (crashed \(.+\)|was killed, perhaps because memory ran out)",
    }.items()
}


def class_of(reason: str) -> str | None:
    """The key of REASONS that a reason belongs to, None for one that nobody foresaw."""
    return next((name for name, one in REASONS.items() if one.fullmatch(reason)), None)


@dataclass(frozen=True, slots=True)
class Mutant:
    """A damaged picture: the original's name, what was done to it, and the bytes that gave."""

    original: str
    changes: tuple[str, ...]
    content: bytes


def originals(side: int = 64) -> dict[str, bytes]:
    """Small pictures with metadata, in all formats and the variants that decoders tell apart."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (side, side + 9, 3), dtype=np.uint8))
    ImageDraw.Draw(picture).ellipse((5, 5, side - 9, side - 5), "red", "blue", 3)
    grey = picture.convert("L")
    clear = picture.convert("RGBA")
    clear.putalpha(grey)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    paletted = picture.quantize(50)
    frames = {"save_all": True, "append_images": [picture.rotate(90), picture.rotate(180)]}
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x9C9C] = 6, "a red disc", "on noise".encode("utf-16-le")
    exif.get_ifd(0x8769)[0x9003] = "2024:02:29 23:59:58"
    made: dict[str, tuple[Image.Image, str, dict[str, object]]] = {
        "baseline.jpg": (picture, "JPEG", {"exif": exif}),
        "progressive.jpg": (picture, "JPEG", {"progressive": True, "exif": exif}),
        "grey.jpg": (grey, "JPEG", {"restart_marker_blocks": 4}),
        "cmyk.jpg": (picture.convert("CMYK"), "JPEG", {"exif": exif}),
        "colour.png": (picture, "PNG", {"exif": exif}),
        "clear.png": (clear, "PNG", {}),
        "deep.png": (deep, "PNG", {}),
        "paletted.png": (paletted, "PNG", {"transparency": 3}),
        "animated.png": (picture, "PNG", frames),
        "lossy.webp": (picture, "WEBP", {"exif": exif}),
        "lossless.webp": (clear, "WEBP", {"lossless": True}),
        "animated.webp": (picture, "WEBP", frames),
        "still.gif": (paletted, "GIF", {"transparency": 3}),
        "animated.gif": (paletted, "GIF", {"save_all": True, "append_images": [grey]}),
        "raw.tif": (picture, "TIFF", {"exif": exif}),
        "lzw.tif": (clear, "TIFF", {"compression": "tiff_lzw"}),
        "deflate.tif": (deep, "TIFF", {"compression": "tiff_deflate"}),
        "jpeg.tif": (picture, "TIFF", {"compression": "jpeg"}),
        "fax.tif": (grey.convert("1"), "TIFF", {"compression": "group4"}),
        "float.tif": (grey.convert("F"), "TIFF", {}),
        "colour.bmp": (picture, "BMP", {}),
        "paletted.bmp": (paletted, "BMP", {}),
        "colour.avif": (picture, "AVIF", {"exif": exif, "speed": 10}),
        "clear.avif": (clear, "AVIF", {"speed": 10}),
        "colour.jp2": (picture, "JPEG2000", {}),
        "lossy.jp2": (clear, "JPEG2000", {"quality_layers": [20], "irreversible": True}),
    }
    contents = {}
    for name, (image, kind, options) in made.items():
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        contents[name] = buffer.getvalue()
    return contents


def mutants(count: int, seed: int) -> Iterator[Mutant]:
    """`count` damaged pictures, each original and each change equally often in the long run."""
    contents = originals()
    names = sorted(contents)
    for number in range(count):
        rng = random.Random(f"{seed}:{number}")
        name = rng.choice(names)
        content = bytearray(contents[name])
        changes = rng.choices(list(CHANGES), k=rng.choice((1, 1, 1, 2, 3)))
        for change in changes:
            CHANGES[change](content, rng, contents[rng.choice(names)])
        yield Mutant(name, tuple(changes), bytes(content))


def _flip_bits(content: bytearray, rng: random.Random, _: bytes) -> None:
    for _ in range(rng.randint(1, 16) if content else 0):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def _set_field(content: bytearray, place: int, rng: random.Random) -> None:
    """A number of one, two or four bytes at `place` becomes an extreme or a random one."""
    bits = rng.choice((8, 16, 32))
    value = rng.choice(
        (0, 1, 2**bits - 1, 2 ** (bits - 1), 2 ** (bits - 1) - 1, rng.getrandbits(bits))
    )
    content[place : place + bits // 8] = value.to_bytes(bits // 8, rng.choice(("little", "big")))


def _edit_header(content: bytearray, rng: random.Random, _: bytes) -> None:
    for _ in range(rng.randint(1, 3)):
        _set_field(content, rng.randrange(min(len(content), 128) + 1), rng)


def _edit_metadata(content: bytearray, rng: random.Random, _: bytes) -> None:
    """Changes in or after a TIFF header: that of a TIFF, or that of EXIF in any format."""
    found = [one.start() for one in re.finditer(rb"II\*\0|MM\0\*", content)]
    start = rng.choice(found or [0])
    for _ in range(rng.randint(1, 6)):
        _set_field(content, min(start + rng.randrange(200), len(content)), rng)


def _turn(content: bytearray, rng: random.Random, _: bytes) -> None:
    """Another orientation, count or type in the EXIF entry of the orientation."""
    tags = {b"\x01\x12\x00\x03": ">HHIH", b"\x12\x01\x03\x00": "<HHIH"}
    for tag, layout in tags.items():
        place = content.find(tag)
        if place >= 0:
            entry = (0x0112, rng.randrange(15), rng.choice((0, 1, 2, 2**31)), rng.randrange(12))
            content[place : place + 10] = struct.pack(layout, *entry)


def _block(content: bytearray, rng: random.Random) -> slice:
    start = rng.randrange(len(content) + 1)
    return slice(start, start + rng.randint(1, max(1, len(content) // 4)))


def _swap_blocks(content: bytearray, rng: random.Random, _: bytes) -> None:
    one, other = sorted((_block(content, rng), _block(content, rng)), key=lambda block: block.start)
    end = min(one.stop, other.start)
    content[:] = (
        content[: one.start]
        + content[other]
        + content[end : other.start]
        + content[one.start : end]
        + content[other.stop :]
    )


def _repeat_block(content: bytearray, rng: random.Random, _: bytes) -> None:
    block = _block(content, rng)
    content[block.start : block.start] = content[block] * rng.choice((1, 2, 50))


def _delete_block(content: bytearray, rng: random.Random, _: bytes) -> None:
    del content[_block(content, rng)]


def _insert_noise(content: bytearray, rng: random.Random, _: bytes) -> None:
    place = rng.randrange(len(content) + 1)
    content[place:place] = rng.randbytes(rng.randint(1, 300))


def _truncate(content: bytearray, rng: random.Random, _: bytes) -> None:
    del content[rng.randrange(len(content) + 1) :]


def _graft(content: bytearray, rng: random.Random, other: bytes) -> None:
    """The beginning of one picture with the end of another."""
    content[rng.randrange(len(content) + 1) :] = other[rng.randrange(len(other)) :]


Change = Callable[[bytearray, random.Random, bytes], None]
CHANGES: dict[str, Change] = {
    "bits": _flip_bits,
    "header": _edit_header,
    "metadata": _edit_metadata,
    "orientation": _turn,
    "swap": _swap_blocks,
    "repeat": _repeat_block,
    "delete": _delete_block,
    "insert": _insert_noise,
    "truncate": _truncate,
    "graft": _graft,
}
