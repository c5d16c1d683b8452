"""What a picture file tells inside: descriptions in EXIF, IPTC and XMP, the camera, the place."""

import codecs
import re
from collections.abc import Callable, Iterator
from typing import Any

from defusedxml import ElementTree  # type: ignore[import-untyped]
from PIL import ImageFile, IptcImagePlugin

from retriever.captions import MAX_CAPTION_CHARS, clean_caption

_MAKE, _MODEL, _GPS_IFD = 0x010F, 0x0110, 0x8825
_LATITUDE, _LONGITUDE = 2, 4  # degrees, minutes, seconds; the tag before has the hemisphere
_IMAGE_DESCRIPTION, _XP_COMMENT, _EXIF_IFD, _USER_COMMENT = 0x010E, 0x9C9C, 0x8769, 0x9286
_IPTC_CAPTION = (2, 120)
_DC_DESCRIPTION = "{http://purl.org/dc/elements/1.1/}description"
_RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"

MAX_CAMERA_CHARS = 200
_COMPANY = re.compile(
    r"[\s,]+((imaging|optical|photo|film|corporation|corp|company|co|ltd|inc|ag|gmbh)\b[\s.,]*)+$",
    re.IGNORECASE,
)

# What cameras, phones and programs write where a description belongs.
_BOILERPLATE = re.compile(
    r"(?i:default|untitled|screenshot|applemark|camera ?360|created with (the )?gimp"
    r"|processed with .*|exif[_ ]jpeg.*|(sony |samsung )?dsc|samsung camera pictures"
    r"|kodak digital still camera|imagej=.*)"
    r"|([A-Z0-9]+ )*DIGITAL (STILL )?CAMERA"
    r"|(oz)?nor(WO)?|r?hdr(pl)?|sdr|cof|dav|mde|ptr|edf|bty|rbt|fbt|dig|vivid"  # phones' modes
    r"|[!-~]*[0-9_\\/=][!-~]*"  # one word with a digit or a slash: IMG_0001, DCIM\100GOPRO\…
    r"|[{<\[].*[}>\]]"  # settings as JSON, XML or a list
)


def embedded_descriptions(image: ImageFile.ImageFile) -> list[tuple[str, str]]:
    """(source, caption) of each description in the file, once: "exif", then "iptc", then "xmp".

    EXIF ImageDescription, UserComment and XPComment; IPTC 2:120; XMP dc:description in each
    language. What a camera fills in by itself ("OLYMPUS DIGITAL CAMERA") is not a caption.
    Broken metadata gives nothing. Of a PNG the pixels have to be loaded first, because its
    metadata may follow them.
    """
    readers: tuple[tuple[str, Callable[[ImageFile.ImageFile], Iterator[str]]], ...] = (
        ("exif", _exif_texts),
        ("iptc", _iptc_texts),
        ("xmp", _xmp_texts),
    )
    found: dict[str, str] = {}  # caption -> source; programs write the same text to all three
    for source, read in readers:
        # Metadata are read from unchecked bytes by parsers that raise whatever they run into, and
        # no damage to them is a reason to lose the picture or its other descriptions.
        try:
            for text in read(image):
                caption = clean_caption(text)
                if 0 < len(caption) <= MAX_CAPTION_CHARS and not _BOILERPLATE.fullmatch(caption):
                    found.setdefault(caption, source)
        except Exception:
            continue
    return [(source, caption) for caption, source in found.items()]


def camera_of(image: ImageFile.ImageFile) -> str | None:
    """EXIF Make and Model, without what both say: "NIKON D90", "Apple iPhone 12"."""
    try:
        exif = image.getexif()
        make, model = (clean_caption(_decoded(_raw(exif.get(tag)))) for tag in (_MAKE, _MODEL))
    except Exception:  # as in embedded_descriptions
        return None
    if max(len(make), len(model)) > MAX_CAMERA_CHARS:  # else _COMPANY may take hours
        return None
    make = _COMPANY.sub("", make)
    is_named = any(
        model.casefold().startswith(word) for word in make.casefold().split() if len(word) > 1
    )
    camera = model if is_named else f"{make} {model}".strip()
    return camera if 0 < len(camera) <= MAX_CAMERA_CHARS else None


def position_of(image: ImageFile.ImageFile) -> tuple[float, float] | None:
    """Where EXIF says it was taken: latitude and longitude in degrees, north and east positive.

    None if it does not say both in whole, if they are no place, or exactly 0° 0°, which is what
    devices write that do not know.
    """
    try:
        gps = image.getexif().get_ifd(_GPS_IFD)
        latitude = _degrees(gps, _LATITUDE, "N", "S")
        longitude = _degrees(gps, _LONGITUDE, "E", "W")
    except Exception:  # as in embedded_descriptions
        return None
    is_place = abs(latitude) <= 90 and abs(longitude) <= 180 and (latitude or longitude)
    return (latitude, longitude) if is_place else None


def _degrees(gps: dict[int, Any], tag: int, positive: str, negative: str) -> float:
    """Decimal degrees, to a centimetre; ValueError if they make no sense."""
    letter = _raw(gps[tag - 1]).strip(b"\0 ").decode("ascii").upper()
    degrees, minutes, seconds = map(float, gps[tag])
    if letter not in (positive, negative) or not (
        degrees >= 0 and 0 <= minutes <= 60 and 0 <= seconds <= 60
    ):
        raise ValueError("no place")
    size = degrees + minutes / 60 + seconds / 3600
    return round(size if letter == positive else -size, 7)


def _exif_texts(image: ImageFile.ImageFile) -> Iterator[str]:
    exif = image.getexif()
    yield _decoded(_raw(exif.get(_IMAGE_DESCRIPTION)))
    yield _raw(exif.get(_XP_COMMENT)).decode("utf-16-le", "replace").partition("\0")[0]
    comment = _raw(exif.get_ifd(_EXIF_IFD).get(_USER_COMMENT))
    code, body = comment[:8], comment[8:]
    if code.startswith(b"UNICODE"):
        yield _decoded_utf16(body, little=exif.endian == "<")
    elif code.startswith(b"JIS"):
        yield body.decode("iso2022_jp")
    elif code in (b"ASCII\0\0\0", bytes(8)):
        yield _decoded(body)
    else:  # the code is often forgotten
        yield _decoded(comment)


def _iptc_texts(image: ImageFile.ImageFile) -> Iterator[str]:
    fields = IptcImagePlugin.getiptcinfo(image) or {}
    values = fields.get(_IPTC_CAPTION, [])
    for value in values if isinstance(values, list) else [values]:
        yield _decoded(value)


def _xmp_texts(image: ImageFile.ImageFile) -> Iterator[str]:
    packet = image.info.get("xmp")
    if not packet:
        return
    tree = ElementTree.fromstring(packet.strip(b"\0 \r\n\t"))
    for element in tree.iter(_RDF + "Description"):
        yield element.get(_DC_DESCRIPTION) or ""
    for element in tree.iter(_DC_DESCRIPTION):
        for item in element.iter(_RDF + "li"):
            yield item.text or ""
        yield element.text or ""


def _raw(value: Any) -> bytes:
    """The bytes of an EXIF value, whichever type its writer gave it."""
    if isinstance(value, str):
        return value.encode("latin-1", "replace")  # Pillow decodes ASCII values as Latin-1
    return bytes(value or b"")


def _decoded(data: bytes) -> str:
    """Text that states no encoding: UTF-8 if it can be, Windows' Latin otherwise; "" for binary."""
    data = data.partition(b"\0")[0]
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("cp1252", "replace")
    return "" if re.search(r"[\x01-\x08\x0e-\x1f]", text) else text


def _decoded_utf16(data: bytes, *, little: bool) -> str:
    """UTF-16 in the file's byte order, or in the other one where only that gives Latin text."""
    data = data[: len(data) // 2 * 2]
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", "replace").partition("\0")[0]
    stated, other = ("utf-16-le", "utf-16-be") if little else ("utf-16-be", "utf-16-le")
    swapped = data.decode(other, "replace").partition("\0")[0]
    latin = sum(" " <= char < "\u0250" for char in swapped)
    if 2 * latin > len(data) // 2:
        return swapped
    return data.decode(stated, "replace").partition("\0")[0]
