import json
import os
import sys
import unicodedata
from pathlib import Path

import pytest
from conftest import paint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from retriever.captions import clean_caption
from retriever.data import (
    Caption,
    CaptionIndex,
    CaptionReport,
    Pair,
    list_pictures,
    merge_captions,
    read_image,
    read_pairs,
)
from retriever.errors import CaptionError, UsageError

one_folder = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50
)


def touch(root: Path, *files: str) -> None:
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def picture(path: Path, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path, **options)
    return path


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode())
    return path


def listed(root: Path) -> list[str]:
    return [found.file for found in list_pictures(root)]


def read(root: Path, **options: object) -> tuple[dict[str, list[tuple[str, str]]], CaptionReport]:
    """{file: [(text, source)]} and the report; the pictures may be empty files."""
    pairs, report = read_pairs(root, **{"embedded": False, **options})
    return {pair.file: [(c.text, c.source) for c in pair.captions] for pair in pairs}, report


# ── Listing ──────────────────────────────────────────────────────────────────────────────────────


def test_pictures_are_listed_folder_by_folder_in_the_order_of_their_names(tmp_path: Path) -> None:
    touch(
        tmp_path, "b/z.jpg", "b/a/x.png", "c.gif", "A.JPEG", "a/y.webp", "notes.md", "jpg", "x.raw"
    )
    assert listed(tmp_path) == ["A.JPEG", "c.gif", "a/y.webp", "b/z.jpg", "b/a/x.png"]


@pytest.mark.parametrize(
    "suffix",
    ["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "JPG", "Png"],
)
def test_every_named_format_is_listed(tmp_path: Path, suffix: str) -> None:
    touch(tmp_path, f"a.{suffix}")
    assert listed(tmp_path) == [f"a.{suffix}"]


def test_heic_is_listed_where_it_can_be_read(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif")
    touch(tmp_path, "a.heic", "b.HEIF")
    assert listed(tmp_path) == ["a.heic", "b.HEIF"]


def test_a_picture_knows_its_path_size_and_time(tmp_path: Path) -> None:
    path = text(tmp_path / "sub" / "a.jpg", "12345")
    os.utime(path, ns=(0, 1_234_567_890_000_000_000))
    (found,) = list_pictures(tmp_path)
    assert found.path == path
    assert (found.file, found.size, found.mtime_ns) == ("sub/a.jpg", 5, 1_234_567_890_000_000_000)


def test_hidden_files_previews_stores_and_recycle_bins_are_skipped(tmp_path: Path) -> None:
    touch(
        tmp_path,
        *(".git/a.jpg", "x/.cache/a.jpg", "._a.jpg", ".jpg", "@eaDir/a.jpg", "x/@eaDir/b/a.jpg"),
        *("photos.lib/a.jpg", "Photos.LIB/a.jpg", "#recycle/a.jpg", "__MACOSX/a.jpg"),
        *("lib/kept.jpg", "a.lib.d/kept.jpg"),
    )
    assert listed(tmp_path) == ["a.lib.d/kept.jpg", "lib/kept.jpg"]


def test_a_root_that_would_be_skipped_as_a_folder_is_read(tmp_path: Path) -> None:
    touch(tmp_path, ".hidden/a.jpg")
    assert listed(tmp_path / ".hidden") == ["a.jpg"]


def test_a_folder_called_like_a_picture_is_searched(tmp_path: Path) -> None:
    touch(tmp_path, "album.jpg/a.jpg")
    assert listed(tmp_path) == ["album.jpg/a.jpg"]


def test_links_are_followed_unless_they_lead_where_the_listing_goes_anyway(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    touch(root, "a/x.jpg", ".hidden/h.jpg")
    touch(elsewhere, "y.jpg", "deep/z.jpg")
    (root / "a" / "loop").symlink_to(root)
    (root / "a" / "up").symlink_to(tmp_path)
    (root / "copy").symlink_to(root / "a")
    (root / "far").symlink_to(elsewhere)
    (root / "far2").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(elsewhere)
    (root / "link.jpg").symlink_to(root / "a" / "x.jpg")
    (root / "shown").symlink_to(root / ".hidden")
    (root / "gone.jpg").symlink_to(tmp_path / "nothing")
    (root / "self.jpg").symlink_to(root / "self.jpg")
    problems: list[str] = []
    files = [found.file for found in list_pictures(root, problems=problems)]
    assert files == ["link.jpg", "a/x.jpg", "far/y.jpg", "far/deep/z.jpg", "shown/h.jpg"]
    named = {problem.partition(":")[0] for problem in problems}
    assert named == {"gone.jpg", "self.jpg", "a/loop", "a/up", "copy", "far/back/", "far2/"}


def test_an_unreadable_folder_is_named_and_the_rest_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "a/x.jpg", "b/y.jpg")
    scandir = os.scandir

    def refuse(folder: str) -> object:  # root may read everything: file modes prove nothing here
        if folder.endswith("a"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr("retriever.data.os.scandir", refuse)
    problems: list[str] = []
    assert [found.file for found in list_pictures(tmp_path, problems=problems)] == ["b/y.jpg"]
    assert problems == ["a/: cannot be read: Permission denied"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_name_that_is_no_utf8_round_trips(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    picture(tmp_path / "x.jpg").rename(tmp_path / name)
    (found,) = list_pictures(tmp_path)
    assert os.fsencode(found.file) == b"caf\xe9.jpg"
    assert read_image(found.path).width == 8
    text(tmp_path / os.fsdecode(b"caf\xe9.txt"), "a café")
    line = {"file": name, "caption": "with coffee"}
    text(tmp_path / "captions.jsonl", json.dumps(line))
    captions, report = read(tmp_path)
    assert captions == {name: [("a café", "sidecar"), ("with coffee", "captions.jsonl")]}
    (tmp_path / name).unlink()
    _, report = read(tmp_path)
    assert report.unmatched == (r"captions.jsonl:1: caf\xe9.jpg",)


@pytest.mark.parametrize("name", ["none", "file.jpg"])
def test_a_root_that_is_no_folder_is_an_error_at_once(tmp_path: Path, name: str) -> None:
    touch(tmp_path, "file.jpg")
    with pytest.raises(UsageError, match=f"{name}: no such folder"):
        list_pictures(tmp_path / name)


# ── Captions of pictures ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["a.txt", "a.jpg.txt", "a.caption", "a.jpg.caption", "a.TXT"])
def test_a_text_beside_a_picture_is_its_captions(tmp_path: Path, name: str) -> None:
    touch(tmp_path, "sub/a.jpg", "a.jpg")
    text(tmp_path / "sub" / name, "a dog\nein Hund\n")
    captions, report = read(tmp_path)
    assert captions == {"sub/a.jpg": [("a dog", "sidecar"), ("ein Hund", "sidecar")]}
    assert (report.pictures, report.with_captions, report.captions) == (2, 1, 2)
    assert report.by_source == {"sidecar": 2}


def test_a_text_belongs_to_every_picture_it_is_named_like(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "a.png")
    text(tmp_path / "a.txt", "both")
    text(tmp_path / "a.png.txt", "one")
    assert read(tmp_path)[0] == {
        "a.jpg": [("both", "sidecar")],
        "a.png": [("one", "sidecar"), ("both", "sidecar")],
    }


@pytest.mark.parametrize(
    ("name", "reported"),
    [
        ("b.caption", True),
        ("b.jpg.txt", True),
        ("b.txt", True),
        ("README.txt", False),
        ("license.txt", False),
        ("b.md", False),
    ],
)
def test_a_sidecar_beside_no_picture_is_reported_and_a_document_is_not(
    tmp_path: Path, name: str, reported: bool
) -> None:
    touch(tmp_path, "sub/a.jpg")
    text(tmp_path / "sub" / "a.txt", "a dog")
    text(tmp_path / "sub" / name, "text")
    expected = (f"no picture beside: sub/{name}",) if reported else ()
    assert read(tmp_path)[1].unmatched == expected


def test_a_text_in_a_folder_without_sidecars_is_no_sidecar(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    text(tmp_path / "diary.txt", "Monday")
    assert read(tmp_path)[1].unmatched == ()


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("images/a.jpg", "images/a.jpg"),
        ("./images/a.jpg", "images/a.jpg"),
        ("images\\a.jpg", "images/a.jpg"),
        ("images/../images/a.jpg", "images/a.jpg"),
        ("{root}/images/a.jpg", "images/a.jpg"),
        ("a.jpg", "images/a.jpg"),
        ("deep/b.jpg", "images/deep/b.jpg"),
        ("b.jpg", "images/deep/b.jpg"),
        ("twice.jpg", None),
        ("other/a.jpg", None),
        ("none.jpg", None),
        ("../outside.jpg", None),
        ("a\0b.jpg", None),
        ("a.JPG", None),
    ],
)
def test_a_caption_names_a_picture_by_path_or_by_a_name_that_is_unique(
    tmp_path: Path, name: str, file: str | None
) -> None:
    root = tmp_path / "root"
    touch(root, "images/a.jpg", "images/deep/b.jpg", "thumbs/a.jpg", "x/twice.jpg", "y/twice.jpg")
    touch(tmp_path, "outside.jpg")
    line = {"file": name.format(root=root), "caption": "a dog"}
    text(root / "captions.jsonl", json.dumps(line))
    captions, report = read(root)
    assert list(captions) == ([] if file is None else [file])
    assert len(report.unmatched) == (file is None)


def test_an_ambiguous_name_says_so_once(tmp_path: Path) -> None:
    touch(tmp_path, "x/a.jpg", "y/a.jpg")
    text(tmp_path / "captions.csv", "file,caption\na.jpg,a dog\na.jpg,a cat\nb.jpg,a bird\n")
    assert read(tmp_path)[1].unmatched == (
        "captions.csv:2: a.jpg (2 pictures have this name)",
        "captions.csv:4: b.jpg",
    )


def test_names_in_a_given_file_may_be_relative_to_that_file(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.jpg", "images/x/b.jpg", "images/y/b.jpg")
    path = text(tmp_path / "en.csv", "file,caption\nimages/a.jpg,a dog\nimages/x/b.jpg,a cat\n")
    captions, report = read(tmp_path / "images", captions=path)
    assert captions == {"a.jpg": [("a dog", "en.csv")], "x/b.jpg": [("a cat", "en.csv")]}
    assert report.unmatched == ()


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
def test_composed_and_decomposed_names_find_each_other(tmp_path: Path, on_disk: str) -> None:
    file = unicodedata.normalize(on_disk, "größe/café.jpg")
    touch(tmp_path, file)
    lines = [
        {"file": unicodedata.normalize(form, file), "caption": form} for form in ("NFC", "NFD")
    ]
    text(tmp_path / "captions.jsonl", "\n".join(map(json.dumps, lines)))
    captions, report = read(tmp_path)
    assert captions == {file: [("NFC", "captions.jsonl"), ("NFD", "captions.jsonl")]}
    assert report.unmatched == ()


def test_a_picture_named_twice_is_reported_and_keeps_every_caption_once(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.jpg", "b.jpg")
    lines = [
        {"file": "images/a.jpg", "captions": ["a dog", "a hound"]},
        {"file": "b.jpg", "caption": "row"},
        {"file": "b.jpg", "caption": "by row"},
        {"file": "a.jpg", "captions": ["a dog", "ein Hund"]},
    ]
    text(tmp_path / "captions.jsonl", "\n".join(map(json.dumps, lines)))
    captions, report = read(tmp_path)
    assert report.duplicates == ("captions.jsonl:4: images/a.jpg",)
    assert [caption for caption, _ in captions["images/a.jpg"]] == ["a dog", "a hound", "ein Hund"]
    assert [caption for caption, _ in captions["b.jpg"]] == ["row", "by row"]


def test_equal_captions_of_two_sources_are_one_and_of_two_annotators_two(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    text(tmp_path / "a.txt", "a dog\n")
    text(tmp_path / "captions.jsonl", '{"file": "a.jpg", "captions": ["a cat", "a cat", "a dog"]}')
    captions, report = read(tmp_path)
    assert captions["a.jpg"] == [
        ("a dog", "sidecar"),
        ("a cat", "captions.jsonl"),
        ("a cat", "captions.jsonl"),
    ]
    assert report.by_source == {"sidecar": 1, "captions.jsonl": 2}


def test_merging_keeps_the_order_and_the_first_source() -> None:
    one, two = Caption("a dog", "sidecar"), Caption("a cat", "exif")
    assert merge_captions([one], [two, Caption("a dog", "exif")], [Caption("a cat", "xmp")]) == (
        one,
        two,
    )
    assert merge_captions() == ()


def test_a_given_file_takes_the_place_of_those_in_the_root(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    text(tmp_path / "captions.csv", "file,caption\na.jpg,a dog\n")
    text(tmp_path / "Flickr8k.token.txt", "a.jpg#0\ta hound\n")
    zh = text(tmp_path / "captions_zh.jsonl", '{"file": "a.jpg", "caption": "狗"}')
    assert read(tmp_path)[0] == {"a.jpg": [("a dog", "captions.csv"), ("a hound", "flickr")]}
    assert read(tmp_path, captions=zh)[0] == {"a.jpg": [("狗", "captions_zh.jsonl")]}


def test_a_file_that_was_found_becomes_a_problem_and_one_that_was_given_an_error(
    tmp_path: Path,
) -> None:
    touch(tmp_path, "a.jpg")
    text(tmp_path / "a.txt", "a dog")
    path = tmp_path / "captions.csv"
    path.write_bytes("file,caption\na.jpg,café\n".encode("latin-1"))
    captions, report = read(tmp_path)
    assert captions == {"a.jpg": [("a dog", "sidecar")]}
    (problem,) = report.problems
    assert problem.startswith(f"{path}:2: not UTF-8")
    with pytest.raises(CaptionError, match="not UTF-8"):
        read(tmp_path, captions=path)


def test_what_several_records_say_of_a_picture_is_put_together(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg", "in/c.jpg")
    lines = [
        {"file": "a.jpg", "caption": "a dog", "tag": "pet", "year": 1999},
        {"file": "a.jpg", "caption": "ein Hund", "tag": ["animal", "pet"]},
        {"file": "b.jpg", "caption": "a cat"},
        {"file": "missing.jpg", "caption": "nobody", "tag": "lost"},
    ]
    text(tmp_path / "captions.jsonl", "\n".join(map(json.dumps, lines)))
    text(tmp_path / "captions.csv", "file,caption,licence\na.jpg,a pup,cc0\n")
    text(tmp_path / "in/captions.tsv", "file\tcaption\ttag\nc.jpg\ta bird\tfree\n")
    pictures = list(list_pictures(tmp_path))
    index = CaptionIndex.read(tmp_path, pictures=pictures)
    assert [index.extras_of(one) for one in pictures] == [
        (("licence", "cc0"), ("tag", "animal"), ("tag", "pet"), ("year", 1999.0)),
        (),
        (("tag", "free"),),
    ]
    assert index.problems == []


def test_records_of_one_picture_have_one_limit_of_extras(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    rows = [f"a.jpg,a dog {number},{number}" for number in range(5000)]
    text(tmp_path / "captions.csv", "\n".join(["file,caption,number", *rows]))
    pictures = list(list_pictures(tmp_path))
    index = CaptionIndex.read(tmp_path, pictures=pictures)
    assert index.extras_of(pictures[0]) == tuple(("number", float(one)) for one in range(200))
    assert index.problems == [
        "captions.csv:202: a.jpg: over 200 values beside the caption; the others are left out"
    ]


def test_splits_come_from_the_captions_file(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    lines = [
        {"file": "a.jpg", "captions": ["a dog"], "split": "test"},
        {"file": "b.jpg", "captions": ["a cat"], "split": "train"},
        {"file": "c.jpg", "captions": ["a bird"]},
        {"file": "a.jpg", "captions": [], "split": "train"},
    ]
    text(tmp_path / "captions.jsonl", "\n".join(map(json.dumps, lines)))
    pairs, report = read_pairs(tmp_path, split="test", embedded=False)
    assert pairs == [
        Pair(tmp_path / "a.jpg", "a.jpg", (Caption("a dog", "captions.jsonl"),), "test")
    ]
    assert (report.pictures, report.with_captions, report.captions) == (1, 1, 1)
    assert report.problems == (
        "captions.jsonl:4: a.jpg is in split 'test' already, not in 'train'",
    )
    assert [pair.split for pair in read_pairs(tmp_path, embedded=False)[0]] == [
        "test",
        "train",
        None,
    ]
    with pytest.raises(UsageError, match="no picture is in split 'val'; splits: test, train"):
        read_pairs(tmp_path, split="val")


def test_descriptions_inside_pictures_join_the_others(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "a dog"
    picture(tmp_path / "a.jpg", exif=exif)
    picture(tmp_path / "b.png", exif=exif)
    text(tmp_path / "b.txt", "a dog\na hound")
    text(tmp_path / "broken.txt", "a broken picture")
    text(tmp_path / "broken.jpg", "no picture")
    captions, report = read(tmp_path, embedded=True)
    assert captions == {
        "a.jpg": [("a dog", "exif")],
        "b.png": [("a dog", "sidecar"), ("a hound", "sidecar")],
        "broken.jpg": [("a broken picture", "sidecar")],
    }
    assert report.by_source == {"exif": 1, "sidecar": 3}
    assert report.problems == (f"{tmp_path / 'broken.jpg'}: not a picture in a known format",)


def test_the_index_alone_counts_what_files_say(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg")
    text(tmp_path / "a.txt", "a dog")
    text(tmp_path / "b.txt", "\n")
    pictures = list(list_pictures(tmp_path))
    index = CaptionIndex.read(tmp_path, pictures=pictures)
    assert [index.for_picture(found) for found in pictures] == [(Caption("a dog", "sidecar"),), ()]
    report = index.report([index.for_picture(found) for found in pictures])
    assert (report.pictures, report.with_captions, report.captions) == (2, 1, 1)


@one_folder
@given(st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=4))
def test_whatever_is_written_to_two_sources_is_read_once(tmp_path: Path, texts: list[str]) -> None:
    touch(tmp_path, "a.jpg")
    lines = list(dict.fromkeys(clean_caption(caption) for caption in texts))
    text(tmp_path / "a.txt", "\n".join(lines))
    text(tmp_path / "captions.jsonl", json.dumps({"file": "a.jpg", "captions": texts}))
    captions, report = read(tmp_path)
    expected = [(line, "sidecar") for line in lines if line]
    assert captions.get("a.jpg", []) == expected
    assert report.captions == len(expected)


def test_a_captions_file_further_down_is_about_its_own_folder(tmp_path: Path) -> None:
    paint(tmp_path / "a.png", "red")
    paint(tmp_path / "2019" / "a.png", "green")
    paint(tmp_path / "2019" / "images" / "b.png", "blue")
    paint(tmp_path / "2020" / "c.png", "white")
    records = [{"file": name, "captions": [f"caption of {name}"]} for name in ("a.png", "b.png")]
    records += [{"file": "c.png", "captions": ["of another folder"]}]
    (tmp_path / "2019" / "captions.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "captions.json").write_text('{"a.png": "hidden"}')
    pairs, report = read_pairs(tmp_path)
    assert {pair.file: [one.text for one in pair.captions] for pair in pairs} == {
        "2019/a.png": ["caption of a.png"],
        "2019/images/b.png": ["caption of b.png"],
    }
    assert len(report.unmatched) == 1
