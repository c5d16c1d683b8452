"""Decoding of picture files by Pillow, safe against any bytes and in any thread."""

import errno
import functools
import importlib.util
import logging
import re
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from retriever.errors import MissingExtraError, PictureError, printable

# Only these decoders see a file, whatever it is called: Pillow has many more, for formats that no
# folder of photographs needs and that run other programs or have a history of faults.
_PLUGINS = (
    JpegImagePlugin,
    PngImagePlugin,
    WebPImagePlugin,
    GifImagePlugin,
    BmpImagePlugin,
    TiffImagePlugin,
    AvifImagePlugin,
    Jpeg2KImagePlugin,
)
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "HEIF")
_HEIF_BRANDS = re.compile(rb"....ftyp(hei[cmsx]|hev[cmsx]|mif1|msf1)", re.DOTALL)
HAS_HEIF = importlib.util.find_spec("pillow_heif") is not None

MAX_PIXELS = 200_000_000

_EXIF_IFD, _ORIENTATION, _DATE_TIME_ORIGINAL = 0x8769, 0x0112, 0x9003
_DATE = re.compile(r"(\d{4})[:-](\d\d)[:-](\d\d)[ T](\d\d):(\d\d):(\d\d)")
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow logs some damage as an error; without any handler that would reach the terminal.
logging.getLogger("PIL").addHandler(logging.NullHandler())


@contextmanager
def opened(path: Path, max_pixels: int = MAX_PIXELS) -> Iterator[ImageFile.ImageFile]:
    """The picture with its size checked and its metadata at hand, its pixels not yet decoded.

    Except those of a PNG, because its metadata may follow them. Any fault in the block, too,
    becomes a PictureError.
    """
    name = printable(path)
    with _PILLOW_QUIET:
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise PictureError(f"{name}: not a file")
            if status.st_size == 0:
                raise PictureError(f"{name}: the file is empty")
            with path.open("rb") as file:
                image = _identified(file, path)
                width, height = image.size
                if width * height > max_pixels:
                    raise PictureError(
                        f"{name}: {width} × {height} pixels, more than the limit of {max_pixels:,}"
                    )
                if image.format == "PNG":
                    image.load()
                yield image
        except PictureError:
            raise
        except MemoryError as exc:
            raise PictureError(f"{name}: too large for the memory at hand") from exc
        except Exception as exc:
            # Decoders meet damaged bytes with exceptions of a dozen types, and no list of them is
            # complete: whatever it was, this picture cannot be read, and only this one.
            # An "invalid argument" is no fault of the disk: no file has the place that was sought.
            if isinstance(exc, OSError) and exc.errno not in (None, errno.EINVAL):
                raise PictureError(f"{name}: {exc.strerror}") from exc
            reason = getattr(exc, "strerror", None) or str(exc) or type(exc).__name__
            raise PictureError(f"{name}: truncated or damaged ({reason})") from exc


def _identified(file: IO[bytes], path: Path) -> ImageFile.ImageFile:
    """The picture with its header read, by the decoder that knows its first bytes.

    `Image.open` does likewise, but judges the size by a limit that the whole process shares, and
    warns about what it cannot read.
    """
    prefix = file.read(16)
    if _HEIF_BRANDS.match(prefix):
        _register_heif(path)
    fault: Exception | None = None
    for name in _FORMATS:
        factory, accepts = Image.OPEN.get(name, (None, None))
        if factory and accepts and accepts(prefix) is True:
            file.seek(0)
            try:
                return factory(file, "")
            except SyntaxError as exc:  # AVIF and HEIC share first bytes
                fault = exc
    if fault is not None:
        raise fault
    raise PictureError(f"{printable(path)}: not a picture in a known format")


@functools.cache
def _heif_opener() -> None:
    import pillow_heif

    pillow_heif.register_heif_opener()


def _register_heif(path: Path) -> None:
    if HAS_HEIF:
        _heif_opener()
    elif path.suffix.lower() in (".heic", ".heif"):
        raise PictureError(f"{printable(path)}: {MissingExtraError('HEIC', 'heif')}")


class _PillowQuiet:
    """While a thread is inside, warnings from Pillow are ignored: a PictureError tells of damage.

    `warnings.catch_warnings` swaps the filters of the whole process, so two threads would undo
    each other. Here the first one in adds one filter and the last one out takes it away.
    """

    _FILTER = ("ignore", None, Warning, re.compile(r"(PIL|pillow_heif)(\.|$)"), 0)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_inside = 0

    def __enter__(self) -> None:
        filters: Any = warnings.filters
        with self._lock:
            self._n_inside += 1
            if self._FILTER not in filters:  # someone may have put back an older list
                filters.insert(0, self._FILTER)

    def __exit__(self, *exc_info: object) -> None:
        filters: Any = warnings.filters
        with self._lock:
            self._n_inside -= 1
            if self._n_inside == 0:
                with suppress(ValueError):
                    filters.remove(self._FILTER)


_PILLOW_QUIET = _PillowQuiet()


def date_taken(image: ImageFile.ImageFile) -> datetime | None:
    """EXIF DateTimeOriginal, in the camera's local time; None if absent or no date."""
    try:
        value = image.getexif().get_ifd(_EXIF_IFD).get(_DATE_TIME_ORIGINAL)
        found = _DATE.match(str(value))
        return datetime(*map(int, found.groups())) if found else None  # type: ignore[arg-type]
    except Exception:  # broken metadata, or the thirteenth month: no reason to lose the picture
        return None


def difference_hash(image: Image.Image) -> int:
    """64 bits, as a signed number, that change little when a picture is scaled or saved anew.

    Eight rows of nine mean grey levels: a bit tells whether the level to the right is higher. The
    number of bits that differ is the distance of two pictures. Krawetz 2013, "Kind of Like That".

    Args:
        image: upright RGB of any size; a flat one gives 0.
    """
    levels = image.resize((9, 8), Image.Resampling.BOX).convert("L").tobytes()
    bits = "".join("01"[levels[at] < levels[at + 1]] for at in range(71) if at % 9 < 8)
    return int.from_bytes(int(bits, 2).to_bytes(8), signed=True)


def upright_rgb(image: ImageFile.ImageFile, target: int | None) -> tuple[Image.Image, int, int]:
    """The decoded picture, upright, without metadata; width and height of the file's, upright.

    With a `target` in pixels the picture is made smaller, a JPEG as it is decoded, with no side
    below twice the target: that bounds the memory of whoever holds many.
    """
    width, height = image.size
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # as in date_taken
        orientation = 1
    if target is not None:
        image.draft(None, (2 * target, 2 * target))
    image.load()
    rgb = _rgb(image)
    if target is not None and (factor := min(rgb.size) // (2 * target)) > 1:
        rgb = rgb.reduce(factor)
    # Pillow turns a TIFF by itself, and states its upright size from the start.
    if orientation in _UPRIGHT and image.format != "TIFF":
        rgb = rgb.transpose(_UPRIGHT[orientation])
        if orientation >= 5:
            width, height = height, width
    rgb.info = {}  # an orientation left in it would make the next reader turn the picture again
    return rgb, width, height


def _rgb(image: Image.Image) -> Image.Image:
    """A new RGB picture of any mode, transparency over white."""
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bit(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return white.convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    """Greyscale of 8 bits from one of 16 or 32.

    16 bits span black to white. 32-bit values come without a range: 0 to 1, 255 or 65535 is told
    by the largest one, and with others the smallest shows black, the largest white. NaN is black.
    """
    import numpy as np  # rarely needed here, and half of what starting a decoding process takes

    values = np.asarray(image)
    if values.dtype.itemsize == 2:
        return Image.fromarray((values >> 8).astype(np.uint8))
    # All in one array: of the largest picture that is read, each more would take 800 MB.
    values = np.array(values, dtype=np.float32)
    np.nan_to_num(values, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 65535:
        values -= low
        top = high - low
    else:
        top = next(top for top in (1.0, 255.0, 65535.0) if high <= top)
    values *= 255 / max(top, 1e-30)
    values += 0.5
    return Image.fromarray(values.astype(np.uint8))
