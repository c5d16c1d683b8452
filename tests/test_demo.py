"""The demo as a person runs it: real photographs, the bundled encoder, a page to look at."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

import cli
from retriever import demo, sheets
from retriever.data import read_pairs
from retriever.errors import MissingExtraError, RetrieverError, UsageError
from retriever.library import Library


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def shown(folder: Path) -> str:
    """What `retriever demo` prints."""
    result = CliRunner().invoke(cli.main, ["demo", "--folder", str(folder)])
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


class Page(HTMLParser):
    """The attributes of every tag, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def page(shown: str, folder: Path) -> Page:
    return Page((folder / "contact-sheet.html").read_text(encoding="utf-8"))


def first_answer(shown: str, question: str) -> str:
    lines = shown.splitlines()
    return lines[lines.index(question) + 1]


def test_cat_is_found(shown: str) -> None:
    assert "chelsea.png" in first_answer(shown, "“a cat”")


def test_picture_and_captions_of_the_motorcycle_are_found(shown: str) -> None:
    like_this = first_answer(shown, f"Pictures like this one: {demo.QUERY_PICTURE}")
    assert "motorcycle_left.png" in like_this
    words = first_answer(shown, f"Captions that fit this picture: {demo.QUERY_PICTURE}")
    assert words.split(maxsplit=2)[2] in demo.PHOTOGRAPHS["motorcycle_left.png"]


def test_picture_asked_with_is_not_in_the_library(shown: str, folder: Path) -> None:
    assert (folder / demo.QUERY_PICTURE).is_file()
    with Library.open(folder / "demo.lib") as library:
        hits = library.search(image=folder / demo.QUERY_PICTURE, k=100)
        assert {hit.path.name for hit in hits} == set(demo.PHOTOGRAPHS)
        assert library.verify() == []


def test_question_that_nothing_matches_is_told_so(shown: str, page: Page) -> None:
    lines = shown.splitlines()
    for text, is_there in (("a cat", True), ("two dogs on a beach", False)):
        told = lines[lines.index(f"“{text}”") + 1].strip()
        assert (told == demo.NO_MATCH) is not is_there
    assert demo.NO_MATCH in page.text


def test_heat_map_lies_beside_the_page(shown: str, folder: Path) -> None:
    (drawn,) = (folder / "why").iterdir()
    assert drawn.name == "01-camera.png"
    with Image.open(drawn) as image, Image.open(folder / "pictures" / "camera.png") as whole:
        assert image.width / image.height == pytest.approx(whole.width / whole.height, rel=0.01)


def test_page_is_named_at_the_end(shown: str, folder: Path) -> None:
    assert shown.splitlines()[-1] == f"To look at: {(folder / 'contact-sheet.html').resolve()}"


def test_second_demo_in_the_same_folder_answers_the_same(shown: str, folder: Path) -> None:
    again = CliRunner().invoke(cli.main, ["demo", "--folder", str(folder)])
    assert again.stdout == shown


def test_photographs_are_a_data_set_like_any_other(shown: str, folder: Path) -> None:
    pairs, report = read_pairs(folder / "pictures")
    assert {pair.file: tuple(c.text for c in pair.captions) for pair in pairs} == demo.PHOTOGRAPHS
    assert report.unmatched == report.duplicates == report.problems == ()
    record = json.loads(
        CliRunner().invoke(cli.main, ["evaluate", str(folder / "pictures"), "--json"]).stdout
    )
    # A guess would be right in 7 of 100 cases.
    assert record["metrics"]["t2i_r@1"] > 30


def test_page_needs_nothing_from_outside(page: Page) -> None:
    assert not page.all("script")
    assert not page.all("link")
    for attributes in (attributes for _, attributes in page.tags):
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")  # type: ignore[union-attr]
    assert not re.search(r"url\(|@import", page.text)


def test_each_thumbnail_is_a_picture_with_a_text_for_those_who_cannot_see_it(page: Page) -> None:
    images = page.all("img")
    answers = (len(demo.TEXT_QUERIES) + 1) * demo.K
    assert len(images) == answers + 3 + len(demo.PHOTOGRAPHS)  # two asked with, one heat map
    for attributes in images:
        assert attributes["alt"]
        kind, data = str(attributes["src"]).split(",", 1)
        assert kind == "data:image/jpeg;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert max(image.size) <= sheets.SIDE


def test_page_shows_every_question_with_its_scores(page: Page, shown: str) -> None:
    for text in demo.TEXT_QUERIES:
        assert f"“{text}”" in page.text
    scores = re.findall(r"^  \d  (-?\d\.\d{3})  ", shown, re.MULTILINE)
    assert len(scores) == (len(demo.TEXT_QUERIES) + 2) * demo.K
    assert all(score in page.text for score in scores)


def test_page_shows_every_caption_of_the_library(page: Page) -> None:
    for captions in demo.PHOTOGRAPHS.values():
        assert all(caption in page.text for caption in captions)


def test_captions_cannot_break_the_page(tmp_path: Path) -> None:
    photograph = tmp_path / "a<b>&'\".png"
    Image.new("RGB", (8, 8)).save(photograph)
    figure = sheets.figure(photograph, "<script>alert('x')</script>\"", score=0.5)
    assert Page(figure).all("script") == []
    (image,) = Page(figure).all("img")
    assert image["alt"] == "<script>alert('x')</script>\""


def test_folder_with_pictures_of_its_own_is_left_as_it_is(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "captions.jsonl").write_text("written by hand", encoding="utf-8")
    (pictures / "holiday.png").write_bytes(b"")
    with pytest.raises(UsageError, match=r"holiday\.png"):
        demo.build(tmp_path)
    assert (pictures / "captions.jsonl").read_text(encoding="utf-8") == "written by hand"
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "captions.jsonl",
        "holiday.png",
        "pictures",
    ]


def test_a_file_of_ones_own_is_not_written_over(tmp_path: Path) -> None:
    own = tmp_path / demo.QUERY_PICTURE
    own.write_text("precious", encoding="utf-8")
    with pytest.raises(UsageError, match=demo.QUERY_PICTURE):
        demo.build(tmp_path)
    assert own.read_text(encoding="utf-8") == "precious"


def test_hidden_files_of_the_system_are_no_pictures_of_ones_own(tmp_path: Path) -> None:
    built = demo.build(tmp_path)
    (built.pictures / ".DS_Store").write_bytes(b"")
    assert demo.build(tmp_path) == built


def test_without_scikit_image_the_demo_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"picture-retriever\[demo\]"):
        demo.build()
    result = CliRunner().invoke(cli.main, ["demo"])
    assert result.exit_code == 1
    assert "picture-retriever[demo]" in result.stderr
    assert result.stderr.count("\n") == 1


def test_sample_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(demo.PHOTOGRAPHS, "unicorn.png", ("A unicorn.",))
    with pytest.raises(RetrieverError, match=r"unicorn\.png"):
        demo.build(tmp_path)
