import csv
import io
import json
import math
import os
import socket
import sys
from pathlib import Path

import pytest
from conftest import ToyEncoder, paint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retriever import captions
from retriever.captions import (
    MAX_CAPTION_CHARS,
    MAX_EXTRA_CHARS,
    MAX_EXTRAS,
    MAX_KEY_CHARS,
    MAX_PROBLEMS,
    clean_caption,
    find_caption_files,
    read_caption_file,
    read_sidecar,
)
from retriever.errors import CaptionError, printable
from retriever.library import Library

one_file = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)

A_DOG = [("a.jpg", ("a dog",))]
TWO = [("a.jpg", ("a dog",)), ("a.jpg", ("ein Hund",))]
LISTED = [("a.jpg", ("a dog", "ein Hund"))]


LONG = "x" * (MAX_CAPTION_CHARS + 1)


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path: Path) -> tuple[list[tuple[str, tuple[str, ...]]], list[str]]:
    problems: list[str] = []
    _, records = read_caption_file(path, problems)
    return [(record.name, record.texts) for record in records], problems


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("c.jsonl", '{"file": "a.jpg", "caption": "a dog"}\n', A_DOG),
        ("c.jsonl", '{"image": "a.jpg", "captions": ["a dog", "ein Hund"]}\r\n\r\n', LISTED),
        ("c.jsonl", '{"filename": "a.jpg", "text": "a dog"}', A_DOG),
        ("c.jsonl", '{"file_name": "a.jpg", "Text": "a dog"}', A_DOG),
        ("c.jsonl", '{"file": "a.jpg", "captions": null}', [("a.jpg", ())]),
        ("c.json", '[{"file": "a.jpg", "captions": ["a dog", "ein Hund"]}]', LISTED),
        ("c.json", '{"a.jpg": "a dog"}', A_DOG),
        ("c.json", '{"a.jpg": ["a dog", "ein Hund"]}', LISTED),
        ("c.json", '{"a.jpg": "a dog", "a.jpg": "ein Hund"}', TWO),
        ("c.csv", "file,caption\na.jpg,a dog\na.jpg,ein Hund\n", TWO),
        ("c.csv", '\nid,Image,Caption\n1,a.jpg,"a dog"\n', A_DOG),
        (
            "c.csv",
            "image,caption\na.jpg,a dog, a cat, both\n",
            [("a.jpg", ("a dog, a cat, both",))],
        ),
        ("c.csv", "filename;text;split\na.jpg;a dog;test\n", A_DOG),
        ("c.csv", 'file,captions\na.jpg,"[""a dog"", ""ein Hund""]"\n', LISTED),
        ("c.csv", "file,captions\na.jpg,\"['a dog', 'ein Hund']\"\n", LISTED),
        ("c.csv", "file,captions\na.jpg,[sic] a dog\n", [("a.jpg", ("[sic] a dog",))]),
        ("c.tsv", "file\tcaption\na.jpg\ta dog\n", A_DOG),
        ("c.tsv", 'file\tcaption\na.jpg\t"a dog"\nb.jpg\t"Go" it says\n', None),
        ("captions.txt", "image,caption\na.jpg,a dog\na.jpg,ein Hund\n", TWO),
        (
            "results.csv",
            "image_name| comment_number| comment\na.jpg| 0| a dog\na.jpg| 1| ein Hund\n",
            TWO,
        ),
        ("Flickr8k.token.txt", "a.jpg#0\ta dog\na.jpg#1\tein Hund\n", TWO),
        ("results_20130124.token", "a.jpg#0\ta dog\r\n", A_DOG),
    ],
)
def test_every_format_gives_names_and_captions(
    tmp_path: Path, name: str, content: str, expected: list[tuple[str, tuple[str, ...]]] | None
) -> None:
    if expected is None:  # an unbalanced quotation mark in a tab-separated caption is its own
        expected = [("a.jpg", ("a dog",)), ("b.jpg", ('"Go" it says',))]
    for prefix in (b"", b"\xef\xbb\xbf"):
        path = write(tmp_path, name, prefix + content.encode())
        assert read(path) == (expected, [])


def test_coco_captions_are_joined_by_image_id_and_the_official_name_gives_the_split(
    tmp_path: Path,
) -> None:
    content = {
        "images": [{"id": 7, "file_name": "000007.jpg"}, {"id": 8, "file_name": "000008.jpg"}],
        "annotations": [
            {"image_id": 8, "id": 1, "caption": "a cat"},
            {"image_id": 7, "id": 2, "caption": "a dog \n"},
            {"image_id": 9, "id": 3, "caption": "nobody"},
            {"image_id": 7, "id": 4, "bbox": [0, 0, 1, 1]},
        ],
    }
    path = write(tmp_path, "captions_val2017.json", json.dumps(content))
    problems: list[str] = []
    source, records = read_caption_file(path, problems)
    assert source == "coco"
    assert [(r.name, r.texts, r.split) for r in records] == [
        ("000008.jpg", ("a cat",), "val"),
        ("000007.jpg", ("a dog",), "val"),
    ]
    assert problems == [
        "captions_val2017.json: annotation 3: image_id 9 is not among the images",
        "captions_val2017.json: annotation 4: no caption",
    ]


def test_karpathy_splits_are_read_and_restval_is_trained_on(tmp_path: Path) -> None:
    images = [
        {"filename": "a.jpg", "split": "test", "sentences": [{"raw": "a dog"}, {"raw": "a cat"}]},
        {"filename": "b.jpg", "split": "restval", "sentences": [{"raw": "a bird"}]},
        {"filename": "c.jpg", "split": "test"},
    ]
    problems: list[str] = []
    _, records = read_caption_file(
        write(tmp_path, "dataset_coco.json", json.dumps({"images": images})), problems
    )
    assert [(r.name, r.texts, r.split) for r in records] == [
        ("a.jpg", ("a dog", "a cat"), "test"),
        ("b.jpg", ("a bird",), "train"),
    ]
    assert problems == ["dataset_coco.json: image 3: no file name, split or raw sentences"]


@pytest.mark.parametrize(
    ("name", "content", "source"),
    [
        ("c.csv", "file,caption\n", "c.csv"),
        ("x.token", "a.jpg#0\ta dog\n", "flickr"),
        ("results.csv", "image_name| comment_number| comment\n", "flickr"),
        ("c.json", '{"images": [], "annotations": []}', "coco"),
    ],
)
def test_the_source_tells_the_kind_of_file(
    tmp_path: Path, name: str, content: str, source: str
) -> None:
    assert read_caption_file(write(tmp_path, name, content), [])[0] == source


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("c.jsonl", "{nonsense\n", "c.jsonl:1: not JSON: "),
        ("c.jsonl", '\n["a.jpg", "a dog"]\n', "c.jsonl:2: not an object"),
        ("c.jsonl", '{"caption": "a dog"}\n', "c.jsonl:1: no file name"),
        ("c.jsonl", '{"file": 3, "caption": "a dog"}\n', "c.jsonl:1: no file name"),
        ("c.jsonl", '{"file": "a.jpg"}\n', "c.jsonl:1: no caption"),
        ("c.jsonl", '{"file": "a.jpg", "caption": 3}\n', "c.jsonl:1: the caption is neither"),
        ("c.jsonl", "[" * 100_000 + "\n", "c.jsonl:1: not JSON: "),
        ("c.json", '[{"file": "a.jpg"}]', "c.json: record 1: no caption"),
        ("c.json", '{"a.jpg": 3}', "c.json: a.jpg: neither"),
        ("c.csv", "file,caption\nonly\n", "c.csv:2: 1 cells"),
        ("c.csv", "file,caption\n,a dog\n", "c.csv:2: 2 cells"),
        ("c.csv", f"file,caption\na.jpg,{'x' * 200_000}\n", "c.csv:2: field larger"),
        ("c.csv", f"file,caption\na.jpg,{LONG}\n", "c.csv:2: a caption of 100,001 characters"),
        ("c.tsv", f"file\tcaption\na.jpg\t{LONG}\n", "c.tsv:2: a caption of 100,001"),
        ("c.token", f"a.jpg#0\ta dog\nb.jpg#0\t{LONG}\n", "c.token:2: a caption of 100,001"),
        ("c.jsonl", json.dumps({"file": "a.jpg", "text": LONG}), "c.jsonl:1: a caption of 100,001"),
        ("c.json", json.dumps({"a.jpg": ["a dog", LONG]}), "c.json: a caption of 100,001"),
        ("c.jsonl", json.dumps({"file": "a" * 5000, "text": "a dog"}), "c.jsonl:1: no file has"),
        ("c.jsonl", '{"file": "a.jpg", "caption": NaN}', "c.jsonl:1: the caption is neither"),
        ("c.jsonl", '{"file": "a.jpg", "caption": 0}', "c.jsonl:1: the caption is neither"),
        ("c.jsonl", '{"file": "a.jpg", "caption": [[]]}', "c.jsonl:1: the caption is neither"),
        ("c.json", '{"\\ud800\\n\\u001b[2J": 3}', "c.json: \ufffd [2J: neither"),
        ("c.json", json.dumps({"a" * 500: 3}), f"c.json: {'a' * 79}…: neither"),
        (
            "c.json",
            '{"images": [{"filename": "a", "sentences": [], "split": %s}]}'
            % ("[" * 900 + "]" * 900),
            "c.json: image 1: no file name, split",
        ),
        (
            "c.json",
            '{"images": [], "annotations": [{"caption": "a dog", "image_id": %s}]}'
            % ("[" * 900 + "]" * 900),
            "c.json: annotation 1: no image_id",
        ),
        ("c.token", "a.jpg#0\ta dog\nnonsense\n", "c.token:2: not of the form"),
    ],
)
def test_a_faulty_line_is_named_and_the_rest_is_read(
    tmp_path: Path, name: str, content: str, problem: str
) -> None:
    _, problems = read(write(tmp_path, name, content))
    assert len(problems) == 1
    assert problems[0].startswith(problem)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "c.csv",
            "file,caption\na.jpg,caf\xe9\n".encode("latin-1"),
            "c.csv:2: not UTF-8 (byte 0xE9)",
        ),
        ("c.jsonl", '{"file": "a.jpg"}'.encode("utf-16"), "c.jsonl:1: UTF-16"),
        ("c.json", b"{nonsense", "c.json: not JSON: "),
        ("c.json", b'"text"', "c.json: neither a list of records nor an object"),
        ("c.csv", b"name,age\n", "c.csv: the first line names no picture column"),
        ("c.csv", b"", "c.csv: the first line names no picture column"),
        ("c.csv", b'"file,caption"\n', "c.csv: the first line names no picture column"),
        ("c.csv", b" " * 1_000_000, "c.csv: the first line names no picture column"),
        ("c.json", b"[" * 1_000_000, "c.json: not JSON: nested too deeply"),
        ("c.json", b'{"a.jpg": ' + b"1" * 5000 + b"}", "c.json: not JSON: "),
        ("c.jsonl", '{"file": "a.jpg"}'.encode("utf-16-le"), "c.jsonl:1: UTF-16"),
        ("c.jsonl", '{"file": "a.jpg"}'.encode("utf-32-be"), "c.jsonl:1: UTF-16"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error_naming_it(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    with pytest.raises(CaptionError) as caught:
        read(write(tmp_path, name, content))
    assert message in str(caught.value)


def test_a_row_that_is_refused_harms_no_other(tmp_path: Path) -> None:
    rows = ["file,caption", "a.jpg,a dog", f"b.jpg,{'x' * 200_000}", "c.jpg,a cat"]
    content, problems = read(write(tmp_path, "c.csv", "\n".join(rows)))
    assert content == [("a.jpg", ("a dog",)), ("c.jpg", ("a cat",))]
    assert [problem.partition(" (")[0] for problem in problems] == [
        "c.csv:3: field larger than field limit"
    ]


def test_a_quotation_mark_that_is_never_closed_makes_no_caption_of_the_rest(tmp_path: Path) -> None:
    table = 'file,caption\na.jpg,a dog\nb.jpg,"a cat\nc.jpg,a bird\n'
    content, problems = read(write(tmp_path, "c.csv", table))
    assert content == A_DOG
    assert problems == ["c.csv:3: a quotation mark is never closed; skipped up to line 4"]
    # One that is closed may span lines, at the end of the file too.
    table = 'file,caption\na.jpg,"a\ndog"\n'
    assert read(write(tmp_path, "c.csv", table)) == (A_DOG, [])


def test_a_quotation_mark_swallows_no_more_than_the_longest_cell(tmp_path: Path) -> None:
    rows = [f"{number}.jpg,a dog and a cat" for number in range(10_000)]
    rows[10] = '10.jpg,"a dog'
    content, problems = read(write(tmp_path, "c.csv", "\n".join(["file,caption", *rows])))
    assert content[:10] == [(f"{number}.jpg", ("a dog and a cat",)) for number in range(10)]
    assert content[-1] == ("9999.jpg", ("a dog and a cat",))
    assert 0 < len(content) - 10 < 10_000
    assert len(problems) == 1
    assert problems[0].startswith("c.csv:12: field larger than field limit")
    assert "; skipped up to line " in problems[0]


def extras_of(path: Path) -> tuple[list[tuple[tuple[str, str | float], ...]], list[str]]:
    problems: list[str] = []
    _, records = read_caption_file(path, problems)
    return [record.extras for record in records], problems


@pytest.mark.parametrize(
    ("fields", "extras"),
    [
        ({}, ()),
        ({"License": "cc0", " year ": 1999}, (("license", "cc0"), ("year", 1999.0))),
        ({"tags": ["sea", "dog", "sea"]}, (("tags", "dog"), ("tags", "sea"))),
        ({"tags": ["x", 2, 1.5, None, ""]}, (("tags", 1.5), ("tags", 2.0), ("tags", "x"))),
        ({"public": True, "edited": False}, (("edited", "false"), ("public", "true"))),
        ({"nothing": None, "empty": " ", "list": [], "object": {}}, ()),
        ({"nan": float("nan"), "endless": float("inf")}, ()),
        (
            {"by": {"Name": "Ann", "at": [{"city": "Ulm"}, {"city": "Bonn"}]}},
            (("by.at.city", "Bonn"), ("by.at.city", "Ulm"), ("by.name", "Ann")),
        ),
        ({"id": 12345678901234567890}, (("id", "12345678901234567890"),)),
        ({"id": 2**53, "neg": -3}, (("id", 2.0**53), ("neg", -3.0))),
        ({"note": "two\nlines\ud800"}, (("note", "two lines\ufffd"),)),
        ({"image": "other.jpg", "comment": "mine"}, (("comment", "mine"), ("image", "other.jpg"))),
        ({"split": "test", "comment_number": 3}, ()),
        ({"": "nameless"}, ()),
        ({"Größe": "9"}, (("größe", "9"),)),
    ],
)
def test_what_else_a_record_holds_are_its_extras(
    tmp_path: Path, fields: dict[str, object], extras: tuple[tuple[str, str | float], ...]
) -> None:
    line = json.dumps({"file": "a.jpg", "caption": "a dog", **fields})
    assert extras_of(write(tmp_path, "c.jsonl", line)) == ([extras], [])
    assert extras_of(write(tmp_path, "c.json", f"[{line}]")) == ([extras], [])


def test_a_key_given_twice_has_both_values(tmp_path: Path) -> None:
    line = '{"file": "a.jpg", "tag": "dog", "caption": null, "tag": "sea"}'
    assert extras_of(write(tmp_path, "c.jsonl", line)) == ([(("tag", "dog"), ("tag", "sea"))], [])


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        ("5", 5.0),
        ("-0.25", -0.25),
        ("1e-05", 1e-05),
        ("cc0", "cc0"),
        ("  cc0 ", "cc0"),
        ("007", "007"),  # a name
        ("1234567890123456", "1234567890123456"),
        ("1e999", None),
        ("nan", "nan"),
        ("1.2.3", "1.2.3"),
        ("2024-05-06", "2024-05-06"),
        ("True", "true"),
        ("", None),
        ("  ", None),
    ],
)
@pytest.mark.parametrize("delimiter", [",", "\t", "|", ";"])
def test_the_further_cells_of_a_row_are_its_extras(
    tmp_path: Path, delimiter: str, cell: str, value: str | float | None
) -> None:
    rows = [["", "File", "Kind", "caption", "split"], ["0", "a.jpg", cell, "a dog", "test"]]
    table = "\n".join(map(delimiter.join, rows))
    extras = () if value is None else (("kind", value),)
    assert extras_of(write(tmp_path, "c.csv", table)) == ([extras], [])


def test_the_number_of_a_caption_is_nothing_that_is_asked_for(tmp_path: Path) -> None:
    table = "image_name| comment_number| comment\na.jpg| 0| a dog\n"
    assert extras_of(write(tmp_path, "results.csv", table)) == ([()], [])


def test_extras_have_limits_and_what_is_left_out_is_named(tmp_path: Path) -> None:
    fields = {
        "file": "a.jpg",
        "caption": "a dog",
        "k" * (MAX_KEY_CHARS + 1): 1,
        "long": "x" * (MAX_EXTRA_CHARS + 1),
        "whole": "x" * MAX_EXTRA_CHARS,
        "list": list(range(MAX_EXTRAS + 5)),
    }
    [extras], problems = extras_of(write(tmp_path, "c.jsonl", json.dumps(fields)))
    assert len(extras) == MAX_EXTRAS
    assert extras[-1] == ("whole", "x" * MAX_EXTRA_CHARS)
    assert problems == [
        f"c.jsonl:1: {'k' * 79}…: a name of over 100 characters",
        "c.jsonl:1: long: a value of 10,001 characters, over 10,000",
        "c.jsonl:1: over 200 values beside the caption; the others are left out",
    ]


def test_extras_as_deep_as_json_allows_harm_nothing(tmp_path: Path) -> None:
    deep = '{"a": ' * 400 + "1" + "}" * 400
    wide = "[" * 400 + '"x"' + "]" * 400
    line = f'{{"file": "a.jpg", "caption": "a dog", "deep": {deep}, "wide": {wide}}}'
    extras, problems = extras_of(write(tmp_path, "c.jsonl", line))
    assert extras == [(("wide", "x"),)]
    assert problems == [f"c.jsonl:1: deep{'.a' * 37}.…: a name of over 100 characters"]


@one_file
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=20,
    )
)
def test_whatever_a_record_holds_its_extras_can_be_stored(tmp_path: Path, value: object) -> None:
    line = json.dumps({"file": "a.jpg", "caption": "a dog", "more": value})
    [extras], _ = extras_of(write(tmp_path, "c.jsonl", line))
    assert list(extras) == sorted(set(extras), key=lambda one: (one[0], str(type(one[1])), one[1]))
    for key, one in extras:
        assert key == clean_caption(key).lower() != ""
        assert one and one == clean_caption(one) if isinstance(one, str) else math.isfinite(one)


def test_faults_beyond_a_thousand_are_counted(tmp_path: Path) -> None:
    _, problems = read(write(tmp_path, "c.jsonl", "x\n" * (MAX_PROBLEMS + 234)))
    assert problems[MAX_PROBLEMS - 1].startswith(f"c.jsonl:{MAX_PROBLEMS}: not JSON")
    assert problems[MAX_PROBLEMS:] == ["c.jsonl: 234 more like these"]


def test_a_list_as_python_writes_it_is_read_without_evaluating_anything_nested(
    tmp_path: Path,
) -> None:
    cells = {
        "['a dog', \"a cat's\",]": ("a dog", "a cat's"),
        r"['\x61 dog', '\d']": ("a dog", r"\d"),
        "['a dog', 3]": ("['a dog', 3]",),
        "['a' 'dog']": ("['a' 'dog']",),
        r"['\N{nothing}']": (r"['\N{nothing}']",),
        "[" * 9_000: ("[" * 9_000,),
        "[" + "-" * 9_000 + "1]": ("[" + "-" * 9_000 + "1]",),
    }
    table = "".join(f"a.jpg\t{cell}\n" for cell in cells)
    content, problems = read(write(tmp_path, "c.tsv", "file\tcaptions\n" + table))
    assert [texts for _, texts in content] == list(cells.values())
    assert problems == []


def test_a_captions_file_that_is_too_large_is_an_error_naming_it(
    tmp_path: Path,
) -> None:
    with (tmp_path / "c.csv").open("wb") as file:
        file.truncate(captions.MAX_FILE_BYTES + 1)  # takes no space on the disk
    with pytest.raises(CaptionError, match=r"c\.csv: over 500 MB, too large for a captions file"):
        read(tmp_path / "c.csv")


@pytest.mark.parametrize("name", ["c.csv", "a.txt"])
def test_what_is_no_regular_file_is_refused_and_nothing_waits_for_it(
    tmp_path: Path, name: str
) -> None:
    def refuse(path: Path, message: str) -> None:
        with pytest.raises(CaptionError, match=message):
            read_sidecar(path) if name == "a.txt" else read(path)

    path = tmp_path / name
    path.symlink_to("nowhere")
    refuse(path, "No such file")
    path.unlink()
    path.symlink_to(name)
    refuse(path, "symbolic links")
    path.unlink()
    path.mkdir()
    refuse(path, "not a regular file")
    path.rmdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(path)
        refuse(path, "not a regular file")
        path.unlink()
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(path))  # longer addresses are not allowed
            refuse(path, "not a regular file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name")
def test_a_pipe_called_like_a_captions_file_is_passed_over(tmp_path: Path) -> None:
    for name in ("captions.txt", "captions.csv", "x.token"):
        os.mkfifo(tmp_path / name)
    assert find_caption_files(tmp_path) == []


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names there are valid text")
def test_a_captions_file_may_have_any_name(tmp_path: Path) -> None:
    path = write(tmp_path, os.fsdecode(b"\xff.csv"), "file,caption\na.jpg,a dog\nb.jpg\n")
    problems: list[str] = []
    source, records = read_caption_file(path, problems)
    assert (source, records[0].where) == (r"\xff.csv", r"\xff.csv:2")
    assert problems == [r"\xff.csv:3: 1 cells, not a row of 2 with a name"]


def test_a_missing_captions_file_is_an_error_naming_it(tmp_path: Path) -> None:
    with pytest.raises(CaptionError, match=r"none\.csv: No such file"):
        read(tmp_path / "none.csv")


def test_only_files_with_usual_names_are_found(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    table = "image,caption\n"
    for name, content in {
        "captions.csv": table,
        "captions.txt": table,
        "Flickr8k.token.txt": "",
        "Flickr8k.lemma.token.txt": "",
        "annotations/captions_train2017.json": "{}",
        "annotations/instances_train2017.json": "{}",
        "captions_zh.jsonl": "",
        "results.csv": "run,accuracy\n",
        "metadata.csv": table,
    }.items():
        write(tmp_path, name, content)
    found = [path.relative_to(tmp_path).as_posix() for path in find_caption_files(tmp_path)]
    assert found == [
        "captions.csv",
        "Flickr8k.token.txt",
        "annotations/captions_train2017.json",
        "captions.txt",
    ]


def test_a_sidecar_has_one_caption_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "\ufeffa dog\r\n\n  ein   Hund \r犬\n")
    assert read_sidecar(path) == ["a dog", "ein Hund", "犬"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a dog\ncaf\xe9", "a.txt:2: not UTF-8"),
        (b"x" * 1_000_001, "over 1 MB"),
        (b"a dog\n" + b"x" * 999_990, "a.txt:2: a caption of 999,990 characters, over 100,000"),
        ("a dog".encode("utf-16-le"), "a.txt:1: UTF-16"),
        (b"0 0.5 0.5 0.25 0.25\n16 0.1 0.2 0.3 0.4\n", "box labels"),
    ],
)
def test_a_text_that_is_no_sidecar_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(CaptionError, match=message):
        read_sidecar(write(tmp_path, "a.txt", content))


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("  a\tdog\r\nruns ", "a dog runs"),
        ("a\x00dog\x1b[31m", "a dog [31m"),
        ("a\u2028dog\xa0runs", "a dog runs"),
        ("half \ud83d a pair", "half \ufffd a pair"),
        ("\ufeffa dog \ufeff", "a dog"),
        ("🐕🦮", "🐕🦮"),
        ("\u202eכלב\u202c", "\u202eכלב\u202c"),
        (" \n", ""),
        ("\x00\x07\ufeff", ""),
    ],
)
def test_a_caption_is_one_printable_line(text: str, clean: str) -> None:
    assert clean_caption(text) == clean


@given(st.text(st.characters(), max_size=20))
def test_any_name_can_be_shown(name: str) -> None:
    assert isinstance(printable(name).encode(), bytes)


# Any text at all, lone surrogates included: JSON can spell them.
any_text = st.text(st.characters(), max_size=40)
utf8_text = st.text(max_size=40)


def expected(text: str) -> tuple[str, ...]:
    return (clean_caption(text),) if clean_caption(text) else ()


@one_file
@given(any_text, st.booleans())
def test_any_caption_survives_jsonl(tmp_path: Path, text: str, ascii_only: bool) -> None:
    if not ascii_only:
        text = text.encode("utf-8", "replace").decode()
    line = json.dumps({"file": "a.jpg", "caption": text}, ensure_ascii=ascii_only)
    assert read(write(tmp_path, "c.jsonl", line)) == ([("a.jpg", expected(text))], [])


@one_file
@given(utf8_text, st.sampled_from([",", ";"]))
def test_any_caption_survives_csv(tmp_path: Path, text: str, delimiter: str) -> None:
    table = io.StringIO(newline="")
    csv.writer(table, delimiter=delimiter).writerows([["file", "caption"], ["a.jpg", text]])
    path = write(tmp_path, "c.csv", table.getvalue())
    assert read(path) == ([("a.jpg", expected(text))], [])


@one_file
@given(st.lists(utf8_text, max_size=4))
def test_any_captions_survive_a_sidecar(tmp_path: Path, texts: list[str]) -> None:
    lines = [clean_caption(text) for text in texts]
    path = write(tmp_path, "a.txt", "\n".join(lines))
    assert read_sidecar(path) == [line for line in lines if line]


def test_no_caption_file_can_harm_the_pictures_beside_it(
    tmp_path: Path, toy_encoder: ToyEncoder
) -> None:
    folder = tmp_path / "pictures"
    sidecars = {
        "empty": b"",
        "control": b"\a\x1b[2J\0",
        "emoji": "🐕🦮".encode(),
        "hebrew": "\u202eכלב אדום".encode(),
        "nul": b"red\0square",
        "utf16": "a dog".encode("utf-16"),
        "latin": b"caf\xe9",
        "mega": b"red " * 240_000,
    }
    for side, (name, content) in enumerate(sidecars.items(), 8):
        paint(folder / f"{name}.png", "red", side=side)
        write(folder, f"{name}.txt", content)
    paint(folder / "many.png", "blue")
    write(folder, "captions.json", json.dumps({"many.png": [f"blue {n}" for n in range(2000)]}))
    names = [
        {"file": name, "caption": "red"} for name in ("\ud800", "\udcff\0\n", "a" * 9000, "..")
    ]
    write(folder, "captions.jsonl", "\n".join(map(json.dumps, names)))
    write(folder, "captions.csv", b'"file,caption"\n')

    with Library.create(tmp_path / "photos.lib", toy_encoder) as library:
        report = library.index(folder)
        assert (report.added, report.failed) == (9, ())
        found = {hit.path.stem: hit.caption for hit in library.search("red", k=20, all=True)}
        assert found == {
            "empty": None,
            "control": "[2J",
            "emoji": "🐕🦮",
            "hebrew": "\u202eכלב אדום",
            "nul": "red square",
            "utf16": None,
            "latin": None,
            "mega": None,
            "many": "blue 0",
        }
        assert library.info()["captions"] == 4 + 2000
        assert library.verify() == []
    refused = "\n".join(report.problems)
    for words in (
        "utf16.txt:1: UTF-16",
        "latin.txt:1: not UTF-8",
        "mega.txt:1: a caption of 959,999 characters",
        "captions.jsonl:3: no file has a name of 9,000 characters",
        "captions.csv: the first line names no picture column",
    ):
        assert words in refused
    assert refused.encode()
