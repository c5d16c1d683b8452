"""Descriptions that a picture file carries inside: EXIF, IPTC and XMP."""

import codecs
import re
from collections.abc import Callable, Iterator
from typing import Any

from defusedxml import ElementTree  # type: ignore[import-untyped]
from PIL import ImageFile, IptcImagePlugin

from retriever.captions import MAX_CAPTION_CHARS, clean_caption

_IMAGE_DESCRIPTION, _XP_COMMENT, _EXIF_IFD, _USER_COMMENT = 0x010E, 0x9C9C, 0x8769, 0x9286
_IPTC_CAPTION = (2, 120)
_DC_DESCRIPTION = "{http://purl.org/dc/elements/1.1/}description"
_RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"

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
