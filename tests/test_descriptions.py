import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.TiffImagePlugin import IFDRational

from retriever.data import Facts, read_image
from retriever.errors import PictureError

IMAGE_DESCRIPTION, XP_COMMENT, EXIF_IFD, USER_COMMENT = 0x010E, 0x9C9C, 0x8769, 0x9286

XMP = """<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF
  xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"
  xmlns:dc="http://purl.org/dc/elements/1.1/">{body}</rdf:RDF></x:xmpmeta>
<?xpacket end="w"?>"""
ALTERNATIVES = """<rdf:Description><dc:description><rdf:Alt>
  <rdf:li xml:lang="x-default">a dog</rdf:li><rdf:li xml:lang="de">ein Hund</rdf:li>
</rdf:Alt></dc:description></rdf:Description>"""


def picture() -> Image.Image:
    return Image.new("RGB", (8, 8), "red")


def descriptions(path: Path) -> list[tuple[str, str]]:
    return [(caption.source, caption.text) for caption in read_image(path).descriptions]


def with_exif(path: Path, **values: str | bytes) -> Path:
    exif = Image.Exif()
    if "description" in values:
        exif[IMAGE_DESCRIPTION] = values["description"]
    if "xp_comment" in values:
        exif[XP_COMMENT] = values["xp_comment"]
    if "user_comment" in values:
        exif.get_ifd(EXIF_IFD)[USER_COMMENT] = values["user_comment"]
    picture().save(path, exif=exif)
    return path


def with_segment(path: Path, marker: int, content: bytes) -> Path:
    """A JPEG with one more segment behind its start mark."""
    picture().save(path)
    data = path.read_bytes()
    segment = struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content
    path.write_bytes(data[:2] + segment + data[2:])
    return path


def with_iptc(path: Path, *datasets: tuple[int, int, bytes]) -> Path:
    fields = b"".join(
        struct.pack(">BBBH", 0x1C, record, number, len(value)) + value
        for record, number, value in datasets
    )
    block = (
        b"8BIM\x04\x04\0\0" + struct.pack(">I", len(fields)) + fields + b"\0" * (len(fields) % 2)
    )
    return with_segment(path, 0xED, b"Photoshop 3.0\0" + block)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff", "avif"])
def test_exif_image_description_is_a_caption_in_every_format(tmp_path: Path, suffix: str) -> None:
    path = with_exif(tmp_path / f"a.{suffix}", description="a dog")
    assert descriptions(path) == [("exif", "a dog")]


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("description", "größer: 犬".encode(), "größer: 犬"),
        ("description", "gr\xf6\xdfer".encode("cp1252"), "größer"),
        ("description", "a dog\0\0padding", "a dog"),
        ("xp_comment", "ein Hund 犬\0".encode("utf-16-le"), "ein Hund 犬"),
        ("user_comment", b"ASCII\0\0\0a dog", "a dog"),
        ("user_comment", b"\0\0\0\0\0\0\0\0" + "größer".encode(), "größer"),
        ("user_comment", b"UNICODE\0" + "ein Hund".encode("utf-16-le"), "ein Hund"),
        ("user_comment", b"UNICODE\0" + "ein Hund".encode("utf-16-be"), "ein Hund"),
        ("user_comment", b"UNICODE\0" + "ein Hund".encode("utf-16"), "ein Hund"),
        ("user_comment", b"UNICODE\0" + "一只狗在跑".encode("utf-16-be"), "一只狗在跑"),
        ("user_comment", b"JIS\0\0\0\0\0" + "犬".encode("iso2022_jp"), "犬"),
        ("user_comment", b"a dog without a code", "a dog without a code"),
    ],
)
def test_exif_text_is_read_in_the_encodings_that_occur(
    tmp_path: Path, field: str, value: str | bytes, text: str
) -> None:
    path = with_exif(tmp_path / "a.jpg", **{field: value})
    assert descriptions(path) == [("exif", text)]


@pytest.mark.parametrize(
    "text",
    [
        "OLYMPUS DIGITAL CAMERA",
        "OLYMPUS DIGITAL CAMERA         ",
        "KONICA MINOLTA DIGITAL CAMERA",
        "SONY DSC",
        "Exif_JPEG_PICTURE",
        "SAMSUNG CAMERA PICTURES",
        "DCIM\\100GOPRO\\GOPR0001.JPG",
        "IMG_0001",
        "cof",
        "Screenshot",
        '{"shape": [512, 512]}',
        "ImageJ=1.53t unit=micron",
        "   ",
    ],
)
def test_what_a_camera_fills_in_is_no_caption(tmp_path: Path, text: str) -> None:
    assert descriptions(with_exif(tmp_path / "a.jpg", description=text)) == []


@pytest.mark.parametrize("text", ["A digital camera on a table", "Sony", "Hund", "1984: a film"])
def test_words_of_a_camera_in_a_sentence_stay_a_caption(tmp_path: Path, text: str) -> None:
    path = with_exif(tmp_path / "a.jpg", description=text)
    assert descriptions(path) == [("exif", text)]


def test_binary_in_a_comment_is_no_caption(tmp_path: Path) -> None:
    path = with_exif(tmp_path / "a.jpg", user_comment=b"ASCII\0\0\0\x01\x02\xfe\xffjunk")
    assert descriptions(path) == []


@pytest.mark.parametrize(
    ("datasets", "texts"),
    [
        ([(2, 120, b"a dog")], ["a dog"]),
        ([(1, 90, b"\x1b%G"), (2, 120, "größer".encode())], ["größer"]),
        ([(2, 120, "gr\xf6\xdfer".encode("latin-1"))], ["größer"]),
        ([(2, 5, b"title"), (2, 120, b"a dog"), (2, 120, b"a cat")], ["a dog", "a cat"]),
        ([(2, 5, b"title")], []),
    ],
)
def test_iptc_captions_are_read(
    tmp_path: Path, datasets: list[tuple[int, int, bytes]], texts: list[str]
) -> None:
    path = with_iptc(tmp_path / "a.jpg", *datasets)
    assert descriptions(path) == [("iptc", text) for text in texts]


@pytest.mark.parametrize(
    ("body", "texts"),
    [
        (ALTERNATIVES, ["a dog", "ein Hund"]),
        ('<rdf:Description dc:description="a dog"/>', ["a dog"]),
        ("<rdf:Description><dc:description>a dog</dc:description></rdf:Description>", ["a dog"]),
        ("<rdf:Description><dc:description>unclosed", []),
        ("<rdf:Description/>", []),
    ],
)
def test_xmp_descriptions_are_read_in_every_language(
    tmp_path: Path, body: str, texts: list[str]
) -> None:
    packet = XMP.format(body=body).encode()
    path = with_segment(tmp_path / "a.jpg", 0xE1, b"http://ns.adobe.com/xap/1.0/\0" + packet)
    assert descriptions(path) == [("xmp", text) for text in texts]


def test_xmp_that_expands_entities_is_not_parsed(tmp_path: Path) -> None:
    bomb = (
        b'<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>'
        + XMP.format(body='<rdf:Description dc:description="&b;"/>').partition("?>")[2].encode()
    )
    path = with_segment(tmp_path / "a.jpg", 0xE1, b"http://ns.adobe.com/xap/1.0/\0" + bomb)
    assert descriptions(path) == []


def test_png_metadata_behind_the_pixels_is_read(tmp_path: Path) -> None:
    path = with_exif(tmp_path / "a.png", description="a dog")
    data = path.read_bytes()
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4])
    chunk, rest = data[start:end], data[:start] + data[end:]
    path.write_bytes(rest[:-12] + chunk + rest[-12:])
    assert descriptions(path) == [("exif", "a dog")]


def test_the_same_text_in_exif_and_iptc_is_one_caption(tmp_path: Path) -> None:
    path = with_iptc(tmp_path / "a.jpg", (2, 120, b"a dog"))
    iptc = path.read_bytes()
    exif = Image.Exif()
    exif[IMAGE_DESCRIPTION] = "a dog"
    content = exif.tobytes()
    segment = struct.pack(">BBH", 0xFF, 0xE1, len(content) + 2) + content
    path.write_bytes(iptc[:2] + segment + iptc[2:])
    assert descriptions(path) == [("exif", "a dog")]


def test_damaged_exif_costs_neither_the_picture_nor_its_other_descriptions(tmp_path: Path) -> None:
    path = with_iptc(tmp_path / "a.jpg", (2, 120, b"a dog"))
    data = path.read_bytes()
    content = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x9c" * 40
    segment = struct.pack(">BBH", 0xFF, 0xE1, len(content) + 2) + content
    path.write_bytes(data[:2] + segment + data[2:])
    assert descriptions(path) == [("iptc", "a dog")]


# ── The camera and the place ─────────────────────────────────────────────────────────────────────

MAKE, MODEL, GPS_IFD = 0x010F, 0x0110, 0x8825


def facts_of(path: Path, exif: Image.Exif) -> Facts:
    picture().save(path, exif=exif)
    return read_image(path).facts


@pytest.mark.parametrize(
    ("make", "model", "camera"),
    [
        ("NIKON CORPORATION", "NIKON D90", "NIKON D90"),
        ("NIKON CORPORATION", "COOLPIX P900", "NIKON COOLPIX P900"),
        ("Canon", "Canon EOS 5D Mark II", "Canon EOS 5D Mark II"),
        ("Apple", "iPhone 12", "Apple iPhone 12"),
        ("SONY", "ILCE-7M3", "SONY ILCE-7M3"),
        ("LG Electronics", "LG-H815", "LG-H815"),
        ("EASTMAN KODAK COMPANY", "KODAK Z612 ZOOM", "KODAK Z612 ZOOM"),
        ("OLYMPUS IMAGING CORP.  ", "E-M5", "OLYMPUS E-M5"),
        ("RICOH IMAGING COMPANY, LTD.", "PENTAX K-1", "RICOH PENTAX K-1"),
        ("Leica Camera AG", "M10\0\0\0", "Leica Camera M10"),
        ("", "HUAWEI P9", "HUAWEI P9"),
        ("FUJIFILM", "", "FUJIFILM"),
        ("富士".encode(), "X-T5", "富士 X-T5"),
        (" \0", "\0", None),
        ("", "x" * 201, None),
        ("Maker" + " Co" * 100, "M1", None),  # what is too long is not looked through
        (b"\x01\x02", "", None),
    ],
)
def test_the_camera_is_maker_and_model_and_nothing_twice(
    tmp_path: Path, make: str | bytes, model: str, camera: str | None
) -> None:
    exif = Image.Exif()
    exif[MAKE], exif[MODEL] = make, model
    assert facts_of(tmp_path / "a.jpg", exif).camera == camera


def with_place(*values: object) -> Image.Exif:
    """EXIF of a place: hemisphere and angle of the latitude, then of the longitude."""
    exif = Image.Exif()
    exif[MAKE] = "Maker"  # Pillow writes none that has an inner part alone
    gps = exif.get_ifd(GPS_IFD)
    gps.update({tag: value for tag, value in enumerate(values, 1) if value is not None})
    exif[GPS_IFD] = gps
    return exif


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff", "avif"])
@pytest.mark.parametrize(
    ("values", "place"),
    [
        (("N", (52.0, 31.0, 12.0), "E", (13.0, 24.0, 18.0)), (52.52, 13.405)),
        (("S", (33.0, 51.5, 0.0), "E", (151.0, 12.75, 0.0)), (-33.8583333, 151.2125)),
        (("N", (40.0, 0.0, 0.0), "W", (74.5, 0.0, 0.0)), (40.0, -74.5)),
        (("s", (0.0, 0.0, 36.0), "W", (0.0, 0.0, 0.0)), (-0.01, 0.0)),
        (("N", (90.0, 0.0, 0.0), "E", (180.0, 0.0, 0.0)), (90.0, 180.0)),
    ],
)
def test_a_place_is_in_degrees_of_both_hemispheres(
    tmp_path: Path, suffix: str, values: tuple[object, ...], place: tuple[float, float]
) -> None:
    facts = facts_of(tmp_path / f"a.{suffix}", with_place(*values))
    assert (facts.latitude, facts.longitude) == pytest.approx(place, abs=1e-6)


ANGLE = (10.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "values",
    [
        (None, ANGLE, "E", ANGLE),  # which side of the equator?
        ("N", ANGLE, "E", None),
        ("N", None, None, None),
        ("X", ANGLE, "E", ANGLE),
        ("E", ANGLE, "N", ANGLE),
        ("N", (91.0, 0.0, 0.0), "E", ANGLE),
        ("N", (89.0, 59.0, 61.0), "E", ANGLE),
        ("N", ANGLE, "E", (180.0, 0.0, 1.0)),
        ("N", (IFDRational(0, 0),) * 3, "E", ANGLE),
        ("N", (10.0, 0.0), "E", ANGLE),
        ("N", (10.0, 0.0, 0.0, 0.0), "E", ANGLE),
        ("N", (0.0, 0.0, 0.0), "E", (0.0, 0.0, 0.0)),
    ],
)
def test_a_place_that_is_damaged_or_unknown_is_none(
    tmp_path: Path, values: tuple[object, ...]
) -> None:
    facts = facts_of(tmp_path / "a.jpg", with_place(*values))
    assert (facts.latitude, facts.longitude) == (None, None)


def test_a_picture_without_metadata_has_neither_camera_nor_place(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    facts = read_image(tmp_path / "a.png").facts
    assert (facts.camera, facts.latitude, facts.longitude) == (None, None, None)


@given(at=st.integers(0, 400), flip=st.integers(1, 255))
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60
)
def test_no_damage_to_metadata_makes_a_place_that_there_is_not(
    tmp_path: Path, at: int, flip: int
) -> None:
    exif = with_place("N", (52.0, 31.0, 12.0), "E", (13.0, 24.0, 18.0))
    exif[MAKE], exif[MODEL] = "NIKON CORPORATION", "NIKON D90"
    path = tmp_path / "a.jpg"
    picture().save(path, exif=exif)
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= flip
    path.write_bytes(data)
    try:
        facts = read_image(path).facts
    except PictureError:
        return
    assert facts.camera is None or 0 < len(facts.camera) <= 200
    assert (facts.latitude is None) == (facts.longitude is None)
    if facts.latitude is not None and facts.longitude is not None:
        assert abs(facts.latitude) <= 90
        assert abs(facts.longitude) <= 180
