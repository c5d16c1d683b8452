import io
import os
import struct
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from retriever.data import read_image
from retriever.decoding import difference_hash
from retriever.errors import PictureError

ORIENTATION, EXIF_IFD, DATE_TIME_ORIGINAL = 0x0112, 0x8769, 0x9003

# Red at the upper left, then clockwise green, blue, grey: each of the eight orientations differs.
CORNERS = np.zeros((32, 48, 3), dtype=np.uint8)
CORNERS[:16, :24] = (255, 0, 0)
CORNERS[:16, 24:] = (0, 255, 0)
CORNERS[16:, 24:] = (0, 0, 255)
CORNERS[16:, :24] = (128, 128, 128)
PICTURE = Image.fromarray(CORNERS)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(path: Path) -> np.ndarray:
    return np.asarray(read_image(path).image).astype(int)


def saved(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def assert_close(path: Path, expected: np.ndarray, tolerance: float) -> None:
    """Mean difference in grey levels at most `tolerance`: what lossy formats need."""
    actual = pixels(path)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).mean() <= tolerance


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [
        ("JPEG", 6),
        ("PNG", 0),
        ("WEBP", 6),
        ("GIF", 0),
        ("BMP", 0),
        ("TIFF", 0),
        ("AVIF", 8),
        ("JPEG2000", 0),
    ],
)
def test_every_format_is_read_whatever_the_file_is_called(
    tmp_path: Path, kind: str, tolerance: float
) -> None:
    path = saved(tmp_path / "mislabelled.jpg", encoded(PICTURE, kind))
    decoded = read_image(path)
    assert (decoded.width, decoded.height, decoded.image.mode) == (48, 32, "RGB")
    assert type(decoded.image) is Image.Image
    assert decoded.image.info == {}
    assert_close(path, CORNERS, tolerance)


def test_heif_is_read_where_its_library_is_installed(tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    pillow_heif.from_pillow(PICTURE.resize((96, 64))).save(buffer)
    assert read_image(saved(tmp_path / "a.heic", buffer.getvalue())).width == 96


def test_heif_without_its_library_names_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retriever.decoding.HAS_HEIF", False)
    path = saved(tmp_path / "a.heic", b"\0\0\0\x18ftypheic\0\0\0\0")
    with pytest.raises(PictureError, match=r"a\.heic: HEIC needs .*pip install .*\[heif\]"):
        read_image(path)


# What each EXIF orientation does to the stored picture, after the EXIF 2.32 table.
TURNED = {
    1: CORNERS,
    2: CORNERS[:, ::-1],
    3: CORNERS[::-1, ::-1],
    4: CORNERS[::-1],
    5: CORNERS.transpose(1, 0, 2),
    6: CORNERS[::-1].transpose(1, 0, 2),
    7: CORNERS[::-1, ::-1].transpose(1, 0, 2),
    8: CORNERS.transpose(1, 0, 2)[::-1],
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "AVIF"])
def test_a_turned_picture_is_upright_and_stays_so(
    tmp_path: Path, kind: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = saved(tmp_path / "a", encoded(PICTURE, kind, exif=exif))
    expected = TURNED[orientation]
    decoded = read_image(path)
    assert (decoded.height, decoded.width) == expected.shape[:2]
    assert decoded.image.getexif().get(ORIENTATION) is None
    assert_close(path, expected, tolerance=8)


@pytest.mark.parametrize("orientation", [0, 9, 99])
def test_an_orientation_that_does_not_exist_is_ignored(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    assert_close(saved(tmp_path / "a", encoded(PICTURE, "PNG", exif=exif)), CORNERS, 0)


def paletted_with_transparency() -> Image.Image:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((0, 0), 0)
    return image


@pytest.mark.parametrize(
    ("image", "kind", "options", "corner", "rest"),
    [
        (Image.new("L", (4, 4), 90), "PNG", {}, 90, 90),
        (Image.new("1", (4, 4), 1), "PNG", {}, 255, 255),
        (Image.new("1", (4, 4), 0), "TIFF", {}, 0, 0),
        (Image.new("LA", (4, 4), (0, 0)), "PNG", {}, 255, 255),
        (Image.new("LA", (4, 4), (0, 51)), "PNG", {}, 204, 204),
        (Image.new("RGBA", (4, 4), (0, 0, 255, 0)), "PNG", {}, 255, 255),
        (
            Image.new("RGBA", (4, 4), (255, 0, 0, 51)),
            "WEBP",
            {"lossless": True},
            None,
            [255, 204, 204],
        ),
        (Image.new("RGBA", (4, 4), (255, 0, 0, 51)), "TIFF", {}, None, [255, 204, 204]),
        (paletted_with_transparency(), "PNG", {"transparency": 0}, 255, [0, 255, 0]),
        (paletted_with_transparency(), "GIF", {"transparency": 0}, 255, [0, 255, 0]),
        (paletted_with_transparency(), "PNG", {"transparency": b"\0\x33"}, 255, [204, 255, 204]),
        (paletted_with_transparency(), "BMP", {}, [255, 0, 0], [0, 255, 0]),
        (Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", {"transparency": (1, 2, 3)}, 255, 255),
        (Image.new("YCbCr", (4, 4), (255, 128, 128)), "TIFF", {}, 255, 255),
    ],
)
def test_every_colour_mode_becomes_rgb_with_transparency_white(
    tmp_path: Path,
    image: Image.Image,
    kind: str,
    options: dict[str, object],
    corner: int | list[int] | None,
    rest: int | list[int],
) -> None:
    actual = pixels(saved(tmp_path / "a", encoded(image, kind, **options)))
    assert np.array_equal(actual[0, 0], np.broadcast_to(rest if corner is None else corner, 3))
    assert np.array_equal(actual[3, 3], np.broadcast_to(rest, 3))


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])  # JPEG stores it inverted, as Adobe does
def test_cmyk_has_the_right_polarity(tmp_path: Path, kind: str) -> None:
    path = saved(tmp_path / "a", encoded(PICTURE.convert("CMYK"), kind))
    assert_close(path, CORNERS, tolerance=6)


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("PNG", np.array([[0, 256, 32896, 65535]], dtype=np.uint16), [0, 1, 128, 255]),
        ("TIFF", np.array([[0, 256, 32896, 65535]], dtype=np.uint16), [0, 1, 128, 255]),
        ("TIFF", np.array([[0, 32767, 65535]], dtype=np.int32), [0, 127, 255]),
        ("TIFF", np.array([[0, 7, 255]], dtype=np.int32), [0, 7, 255]),
        ("TIFF", np.array([[-100, 0, 100]], dtype=np.int32), [0, 128, 255]),
        ("TIFF", np.array([[0, 0.5, 1]], dtype=np.float32), [0, 128, 255]),
        ("TIFF", np.array([[0, 100, 255]], dtype=np.float32), [0, 100, 255]),
        ("TIFF", np.array([[0, 5e5, 2e6]], dtype=np.float32), [0, 64, 255]),
        ("TIFF", np.array([[np.nan, np.inf, 1]], dtype=np.float32), [0, 0, 255]),
        ("TIFF", np.zeros((1, 3), dtype=np.float32), [0, 0, 0]),
        ("TIFF", np.full((1, 3), -5, dtype=np.float32), [0, 0, 0]),
    ],
)
def test_deep_greyscale_is_scaled_not_clipped(
    tmp_path: Path, kind: str, values: np.ndarray, expected: list[int]
) -> None:
    actual = pixels(saved(tmp_path / "a", encoded(Image.fromarray(values), kind)))
    assert actual[0, :, 0].tolist() == expected


def test_big_endian_16_bit_tiff_is_read(tmp_path: Path) -> None:
    image = Image.frombytes("I;16B", (3, 1), b"\x00\x00\x80\x80\xff\xff")
    assert pixels(saved(tmp_path / "a", encoded(image, "TIFF")))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_read(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert pixels(saved(tmp_path / "a", content))[4, 4].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("size", "target", "decoded"),
    [
        ((1600, 1200), 224, (800, 600)),
        ((1600, 1200), 64, (200, 150)),
        ((1600, 1200), 600, (1600, 1200)),
        ((1600, 300), 100, (1600, 300)),
        ((1600, 1200), None, (1600, 1200)),
        ((30, 20), 224, (30, 20)),
    ],
)
def test_a_jpeg_is_decoded_smaller_but_never_below_twice_the_target(
    tmp_path: Path, size: tuple[int, int], target: int | None, decoded: tuple[int, int]
) -> None:
    path = saved(tmp_path / "a.jpg", encoded(Image.new("RGB", size), "JPEG"))
    result = read_image(path, target=target)
    assert result.image.size == decoded
    assert (result.width, result.height) == size


def test_the_original_size_is_upright_even_when_decoded_smaller(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    path = saved(tmp_path / "a.jpg", encoded(Image.new("RGB", (1600, 1200)), "JPEG", exif=exif))
    result = read_image(path, target=224)
    assert (result.width, result.height, result.image.size) == (1200, 1600, (600, 800))


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ("2024:02:29 23:59:58", datetime(2024, 2, 29, 23, 59, 58)),
        ("2024-02-29T23:59:58", datetime(2024, 2, 29, 23, 59, 58)),
        ("2023:02:29 10:00:00", None),
        ("0000:00:00 00:00:00", None),
        ("    :  :     :  :  ", None),
        ("yesterday", None),
    ],
)
def test_the_date_is_exif_date_time_original(
    tmp_path: Path, text: str, taken: datetime | None
) -> None:
    exif = Image.Exif()
    exif.get_ifd(EXIF_IFD)[DATE_TIME_ORIGINAL] = text
    path = saved(tmp_path / "a.jpg", encoded(PICTURE, "JPEG", exif=exif))
    assert read_image(path).taken == taken


def test_a_picture_without_a_date_has_none(tmp_path: Path) -> None:
    assert read_image(saved(tmp_path / "a.png", encoded(PICTURE, "PNG"))).taken is None


# ── Faults ───────────────────────────────────────────────────────────────────────────────────────


def png_of(width: int, height: int) -> bytes:
    """The header of a PNG of any size, and no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + header
        + struct.pack(">I", zlib.crc32(header))
        + struct.pack(">I", 0)
        + b"IDAT"
        + struct.pack(">I", zlib.crc32(b"IDAT"))
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\xff", "not a picture"),
        (b"just some words in a file\n", "not a picture in a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "not a picture in a known format"),
        (b"8BPS\0\x01" + bytes(40), "not a picture in a known format"),
        (b"BM but no bitmap at all", "truncated or damaged"),
        (encoded(PICTURE, "JPEG")[:200], "truncated or damaged"),
        (encoded(PICTURE, "JPEG")[:-200], "truncated or damaged"),
        (encoded(PICTURE, "PNG")[:60], "truncated or damaged"),
        (png_of(40_000, 40_000), "40000 × 40000 pixels, more than the limit of 200,000,000"),
        (png_of(14_000, 14_000), "truncated or damaged"),  # 196 megapixels are within the limit
    ],
)
def test_a_file_that_is_no_whole_picture_is_a_named_failure(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = saved(tmp_path / "holiday.jpg", content)
    with pytest.raises(PictureError) as caught:
        read_image(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000"])
def test_half_a_file_fails_in_every_format(tmp_path: Path, kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(noise), kind)
    with pytest.raises(PictureError, match=r"a\.jpg"):
        read_image(saved(tmp_path / "a.jpg", content[: len(content) // 2]))


def test_a_place_that_no_file_has_is_damage_and_no_fault_of_the_disk(tmp_path: Path) -> None:
    content = encoded(PICTURE, "JPEG2000")[:12] + struct.pack(">I4sQ", 1, b"free", 2**62)
    # Some file systems let a program go there, and have nothing to read.
    with pytest.raises(PictureError, match=r"a\.jp2: truncated or damaged"):
        read_image(saved(tmp_path / "a.jp2", content))


def test_the_pixel_limit_is_the_callers(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", encoded(PICTURE, "PNG"))
    assert read_image(path, max_pixels=48 * 32).width == 48
    with pytest.raises(PictureError, match="more than the limit"):
        read_image(path, max_pixels=48 * 32 - 1)


def test_the_limit_that_the_process_shares_is_neither_used_nor_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert read_image(saved(tmp_path / "a.png", encoded(PICTURE, "PNG"))).width == 48
    assert Image.MAX_IMAGE_PIXELS == 10


def test_what_is_no_file_is_a_named_failure(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match=r"none\.jpg: No such file"):
        read_image(tmp_path / "none.jpg")
    (tmp_path / "folder.jpg").mkdir()
    with pytest.raises(PictureError, match=r"folder\.jpg: not a file"):
        read_image(tmp_path / "folder.jpg")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.jpg")  # opening it would wait for a writer for ever
        with pytest.raises(PictureError, match=r"pipe\.jpg: not a file"):
            read_image(tmp_path / "pipe.jpg")
    with pytest.raises(PictureError, match="null"):
        read_image(Path("a\0b.jpg"))


SAMPLES = [
    encoded(
        PICTURE, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"
    ),
    encoded(PICTURE, "PNG"),
    encoded(PICTURE, "GIF"),
    encoded(PICTURE, "WEBP"),
    encoded(PICTURE, "BMP"),
    encoded(PICTURE, "TIFF"),
    encoded(PICTURE.convert("CMYK"), "JPEG"),
]


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    sample=st.sampled_from(SAMPLES),
    changes=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), max_size=4),
    end=st.integers(1, 2000),
)
def test_damaged_bytes_never_raise_anything_but_picture_error(
    tmp_path: Path, sample: bytes, changes: list[tuple[int, int]], end: int
) -> None:
    content = bytearray(sample[:end])
    for place, value in changes:
        content[place % len(content)] = value
    path = saved(tmp_path / "a.jpg", bytes(content))
    with suppress(PictureError):  # anything else fails the test
        assert read_image(path, target=8).image.mode == "RGB"


def test_threads_decode_side_by_side_without_warnings_and_leave_no_filter(tmp_path: Path) -> None:
    # An EXIF tag longer than its file makes Pillow warn, and here every warning is an error.
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 270, 2, 1_000_000, 8) + bytes(4)
    path = saved(tmp_path / "a.jpg", encoded(PICTURE, "JPEG", exif=exif))
    with pytest.warns(UserWarning, match="larger than file"), Image.open(path) as image:
        image.getexif()

    before = list(warnings.filters)
    together = threading.Barrier(4)

    def read(_: int) -> list[int]:
        together.wait()
        return [read_image(path).width for _ in range(20)]

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(read, range(4))) == [[48] * 20] * 4
    assert list(warnings.filters) == before


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_large_picture_is_made_smaller_but_never_below_twice_the_target(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", (900, 600), "red").save(path)
    decoded = read_image(path, target=50)
    assert (decoded.width, decoded.height) == (900, 600)
    assert 100 <= min(decoded.image.size) < 200
    assert decoded.image.width / decoded.image.height == pytest.approx(1.5, abs=0.02)


# ── Perceptual hash ──────────────────────────────────────────────────────────────────────────────


def steps(*, side: int = 90, flip: bool = False) -> Image.Image:
    """Eight rows of nine fields, each lighter than the one before in every second row."""
    levels = [[25 * (column if row % 2 else 8 - column) for column in range(9)] for row in range(8)]
    small = Image.new("L", (9, 8))
    small.putdata([level for row in levels for level in (row[::-1] if flip else row)])
    return small.resize((side, side), Image.Resampling.NEAREST).convert("RGB")


def distance(a: int, b: int) -> int:
    return ((a ^ b) & (1 << 64) - 1).bit_count()


def test_a_bit_of_the_hash_tells_whether_it_is_lighter_to_the_right() -> None:
    assert difference_hash(steps(side=72)) == 0x00FF00FF00FF00FF
    assert difference_hash(steps(side=72, flip=True)) == 0xFF00FF00FF00FF00 - (1 << 64)
    assert difference_hash(Image.new("RGB", (50, 40), "red")) == 0
    assert difference_hash(Image.new("RGB", (1, 1))) == 0


@pytest.fixture(scope="module")
def scene() -> Image.Image:
    """Something with edges and shades, none of them regular."""
    noise = np.random.default_rng(5).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((1600, 1200), Image.Resampling.BICUBIC)


def test_a_picture_saved_anew_keeps_most_of_its_hash(tmp_path: Path, scene: Image.Image) -> None:
    path = tmp_path / "scene.png"
    scene.save(path)
    original = read_image(path).facts.perceptual_hash
    assert original is not None
    assert -(1 << 63) <= original < 1 << 63
    for name, image, options in [
        ("poor.jpg", scene, {"quality": 20}),
        ("small.jpg", scene.resize((320, 240)), {"quality": 80}),
        ("wide.webp", scene.resize((700, 400)), {"quality": 50}),
        ("grey.png", scene.convert("L"), {}),
        ("turned.jpg", scene.rotate(-90, expand=True), {"exif": turned(8)}),
    ]:
        image.save(tmp_path / name, **options)
        for target in (None, 64, 224):
            found = read_image(tmp_path / name, target=target).facts.perceptual_hash
            assert found is not None
            assert distance(original, found) <= 3, (name, target)
    other = difference_hash(scene.transpose(Image.Transpose.ROTATE_180))
    assert distance(original, other) > 16


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif
