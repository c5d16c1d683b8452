import struct
from pathlib import Path

import pytest
from PIL import Image

from retriever.data import read_image

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
