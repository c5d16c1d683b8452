"""Commands that look after a library, on painted pictures with the bundled encoder itself."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import paint
from PIL import Image
from test_cli import library, lines, pictures, run

__all__ = ["library", "pictures"]  # fixtures


@pytest.fixture
def mine(pictures: Path, library: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A library that a test may change, and its folder."""
    folder = Path(shutil.copytree(pictures, tmp_path / "pictures"))
    path = tmp_path / "mine.lib"
    assert run("index", folder, library=path).exit_code == 0
    return path, folder


def names(text: str, path: Path, *options: str) -> list[str]:
    hits = lines(run("search", text, "--json", *options, library=path))
    return [Path(str(hit["path"])).name for hit in hits]


# ── folders ──────────────────────────────────────────────────────────────────────────────────────


def test_index_without_a_folder_looks_at_all_that_the_library_knows(
    mine: tuple[Path, Path], tmp_path: Path
) -> None:
    path, folder = mine
    other = tmp_path / "other"
    paint(other / "yellow.png", "yellow", side=32)
    assert run("roots", "add", other, library=path).exit_code == 0
    paint(folder / "cyan.png", "cyan", side=32)
    (record,) = lines(run("index", "--json", library=path))
    assert (record["added"], record["unchanged"]) == (2, 4)
    found = lines(run("roots", "--json", library=path))
    assert [(root["path"], root["pictures"], root["is_there"]) for root in found] == [
        (str(folder), 5, True),
        (str(other), 1, True),
    ]
    assert all(root["indexed_at"] for root in found)


def test_several_folders_are_indexed_in_one_call(tmp_path: Path) -> None:
    for name in ("a", "b"):
        paint(tmp_path / name / "red.png", "red", side=32 if name == "a" else 33)
    (record,) = lines(
        run("index", tmp_path / "a", tmp_path / "b", "--json", "--library", tmp_path / "new.lib")
    )
    assert record["added"] == 2


def test_without_any_folder_index_says_what_to_do(tmp_path: Path) -> None:
    result = run("index", "--library", tmp_path / "none.lib")
    assert result.exit_code == 1
    assert "retriever index FOLDER" in result.stderr
    assert not (tmp_path / "none.lib").exists()


def test_a_mistyped_folder_makes_no_library(tmp_path: Path) -> None:
    result = run("index", tmp_path / "nowhere", "--library", tmp_path / "none.lib")
    assert result.exit_code == 2
    assert "nowhere" in result.stderr
    assert not (tmp_path / "none.lib").exists()


def test_a_folder_that_is_away_is_left_alone_until_prune_says_otherwise(
    mine: tuple[Path, Path], tmp_path: Path
) -> None:
    path, folder = mine
    other = tmp_path / "other"
    paint(other / "yellow.png", "yellow", side=32)
    run("index", other, library=path)
    folder.rename(tmp_path / "unplugged")
    result = run("index", library=path)
    assert "1 unchanged" in result.stdout
    assert f"{folder} is not there" in result.stderr
    assert "red.png" in names("a red square", path)
    refused = run("index", folder, library=path)
    assert refused.exit_code == 1
    assert "nothing was removed" in refused.stderr
    assert "--prune" in refused.stderr
    away = run("roots", library=path)
    assert f"{folder} (indexed" in away.stdout
    assert "not there now" in away.stdout
    assert "4 removed" in run("index", folder, "--prune", library=path).stdout
    assert names("a red square", path) == ["yellow.png"]


def test_a_relocated_folder_is_found_without_encoding_anything(
    mine: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, folder = mine
    folder.rename(tmp_path / "moved")
    from retriever.encoders import OnnxEncoder

    def refuse(*_: object) -> None:
        raise AssertionError("something was encoded")

    with monkeypatch.context() as patched:
        patched.setattr(OnnxEncoder, "encode_images", refuse)
        result = run("roots", "relocate", folder, tmp_path / "moved", library=path)
        assert "4 pictures are known in" in result.stdout
        (record,) = lines(run("index", "--json", library=path))
        assert (record["unchanged"], record["added"]) == (4, 0)
    hits = lines(run("search", "a red square", "--json", library=path))
    assert hits[0]["path"] == str(tmp_path / "moved" / "red.png")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("nowhere", "moved", "no folder of the library is"),
        ("pictures", "empty", "none of the 4 known pictures is in"),
        ("pictures", "other/inner", "overlaps with"),
    ],
)
def test_a_relocation_that_cannot_be_right_changes_nothing(
    mine: tuple[Path, Path], tmp_path: Path, old: str, new: str, words: str
) -> None:
    path, _ = mine
    paint(tmp_path / "other" / "yellow.png", "yellow", side=32)
    run("index", tmp_path / "other", library=path)
    (tmp_path / "empty").mkdir()
    before = run("roots", "--json", library=path).stdout
    result = run("roots", "relocate", tmp_path / old, tmp_path / new, library=path)
    assert result.exit_code == 2
    assert words in result.stderr
    assert run("roots", "--json", library=path).stdout == before


def test_several_folders_move_with_the_drive_that_they_are_on(tmp_path: Path) -> None:
    path = tmp_path / "new.lib"
    for name in ("a", "b"):
        paint(tmp_path / "usb0" / name / f"{name}.png", "red", side=32 if name == "a" else 33)
        run("index", tmp_path / "usb0" / name, library=path)
    (tmp_path / "usb0").rename(tmp_path / "usb1")
    result = run("roots", "relocate", tmp_path / "usb0", tmp_path / "usb1", library=path)
    assert "2 pictures" in result.stdout
    found = [root["path"] for root in lines(run("roots", "--json", library=path))]
    assert found == [str(tmp_path / "usb1" / name) for name in ("a", "b")]


def test_a_forgotten_folder_is_out_of_every_answer_and_its_files_stay(
    mine: tuple[Path, Path],
) -> None:
    path, folder = mine
    assert "4 pictures" in run("roots", "forget", folder, library=path).stdout
    assert run("search", "a red square", library=path).stdout == ""
    assert (folder / "red.png").is_file()
    refused = run("roots", "forget", folder, library=path)
    assert refused.exit_code == 2
    assert "retriever roots" in refused.stderr


# ── checks and copies ────────────────────────────────────────────────────────────────────────────


def test_verify_notices_pictures_that_are_gone(mine: tuple[Path, Path]) -> None:
    path, folder = mine
    (folder / "red.png").unlink()
    result = run("verify", library=path)
    assert result.exit_code == 1
    assert f"1 known pictures are no longer in {folder}, such as red.png" in result.stdout
    run("index", library=path)
    assert run("verify", library=path).exit_code == 0


def test_verify_does_not_hold_an_unplugged_drive_against_the_library(
    mine: tuple[Path, Path], tmp_path: Path
) -> None:
    path, folder = mine
    folder.rename(tmp_path / "unplugged")
    (record,) = lines(run("verify", "--json", library=path))
    assert record["clean"]
    assert "is away or empty" in record["notes"][0]  # type: ignore[index]


def test_verify_notices_that_pictures_are_encoded_otherwise_than_they_were(
    mine: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = mine
    from retriever.encoders import OnnxEncoder

    encode = OnnxEncoder.encode_images

    def mirrored(self: OnnxEncoder, images: list[Image.Image]) -> object:
        return encode(self, [Image.eval(image, lambda value: 255 - value) for image in images])

    monkeypatch.setattr(OnnxEncoder, "encode_images", mirrored)
    result = run("verify", library=path)
    assert result.exit_code == 1
    assert "pictures encode to something else than is stored" in result.stdout
    assert "captions" not in result.stdout
    assert run("verify", "--sample", "0", library=path).exit_code == 0


def test_repair_says_what_it_did_and_that_there_is_nothing_left_to_do(
    mine: tuple[Path, Path],
) -> None:
    path, _ = mine
    expected = names("a red square", path)
    for file in path.glob("*.faiss"):
        file.write_bytes(b"junk")
    (record,) = lines(run("repair", "--json", library=path))
    assert "were made anew" in record["done"][0]  # type: ignore[index]
    assert "Nothing to mend" in run("repair", library=path).stdout
    assert names("a red square", path) == expected


def test_backup_and_compact_are_told_in_a_line(mine: tuple[Path, Path], tmp_path: Path) -> None:
    path, folder = mine
    expected = names("a red square", path)
    assert "is copied to" in run("backup", tmp_path / "copy.lib", library=path).stdout
    assert names("a red square", tmp_path / "copy.lib") == expected
    again = run("backup", tmp_path / "copy.lib", library=path)
    assert again.exit_code == 1
    assert "name a new folder" in again.stderr
    run("remove", folder / "red.png", library=path)
    (record,) = lines(run("compact", "--json", library=path))
    assert record["bytes_after"] <= record["bytes_before"]  # type: ignore[operator]
    assert run("verify", "--sample", "0", library=path).exit_code == 0


# ── ways in and out ──────────────────────────────────────────────────────────────────────────────


def test_an_export_comes_back_as_it_was(mine: tuple[Path, Path], tmp_path: Path) -> None:
    path, _ = mine
    out, new = tmp_path / "out", tmp_path / "new.lib"
    (report,) = lines(run("export", out, "--json", library=path))
    assert (report["items"], report["captions"]) == (4, 3)
    (taken,) = lines(run("import", out, "--json", library=new))
    assert (taken["added"], taken["skipped"]) == (4, [])
    answer = run("search", "a red square", library=path).stdout
    assert run("search", "a red square", library=new).stdout == answer
    (again,) = lines(run("import", out, "--json", library=new))
    assert (again["added"], again["unchanged"]) == (0, 4)
    (unchanged,) = lines(run("index", "--json", library=new))
    assert unchanged["unchanged"] == 4


def test_libraries_are_merged(mine: tuple[Path, Path], tmp_path: Path) -> None:
    path, _ = mine
    paint(tmp_path / "other" / "yellow.png", "yellow", side=32)
    run("index", tmp_path / "other", "--library", tmp_path / "other.lib")
    assert "1 added" in run("merge", tmp_path / "other.lib", library=path).stdout
    assert "yellow.png" in names("a yellow square", path)
    assert run("verify", library=path).exit_code == 0


def test_a_folder_that_is_no_export_is_refused(mine: tuple[Path, Path], tmp_path: Path) -> None:
    path, folder = mine
    result = run("import", folder, library=path)
    assert result.exit_code == 2
    assert str(folder) in result.stderr


# ── several models ───────────────────────────────────────────────────────────────────────────────


def test_a_text_beyond_the_window_is_read_to_its_end(library: Path) -> None:
    def score_of_red(end: str) -> float:
        text = "a square " * 40 + end * 20  # more than 64 tokens before the end begins
        hits = lines(run("search", text, "--json", library=library))
        return next(float(str(hit["score"])) for hit in hits if "red.png" in str(hit["path"]))

    assert score_of_red("red ") > score_of_red("blue ") + 0.05


def test_a_folder_named_twice_or_inside_another_is_looked_at_once(
    mine: tuple[Path, Path],
) -> None:
    path, folder = mine
    (folder / "broken.png").write_bytes(b"not a picture")
    paint(folder / "inner" / "cyan.png", "cyan", side=32)
    run("index", folder, library=path)
    result = run("index", folder, folder / "inner", folder, "--json", library=path)
    assert result.exit_code == 3
    record = json.loads(result.stdout)
    assert record["unchanged"] == 5
    assert [Path(one["path"]).name for one in record["failed"]] == ["broken.png"]


def test_a_dry_run_without_a_folder_and_a_mistyped_one_change_nothing(
    mine: tuple[Path, Path], tmp_path: Path
) -> None:
    path, _ = mine
    assert run("index", "--dry-run", library=path).exit_code == 2
    before = run("info", "--json", library=path).stdout
    result = run("index", tmp_path / "typo", "--model", "no/such", library=path)
    assert result.exit_code != 0
    assert run("info", "--json", library=path).stdout == before


def test_a_model_that_was_renewed_is_the_one_meant_by_its_name(tmp_path: Path) -> None:
    from conftest import ToyEncoder

    from retriever.library import Library

    paint(tmp_path / "pictures" / "red.png", "red")
    Library.create(tmp_path / "toy.lib", ToyEncoder("toy-1")).close()
    with Library.open(tmp_path / "toy.lib", ToyEncoder("toy-2"), add_model=True) as library:
        library.index(tmp_path / "pictures")
        for _ in range(2):
            assert library.use_model("toy").spec.fingerprint == "toy-2"
            with Library.open(tmp_path / "toy.lib", "toy") as named:
                assert named.model.fingerprint == "toy-2"


def test_merge_makes_the_library_and_tells_an_export_from_a_library(
    mine: tuple[Path, Path], tmp_path: Path
) -> None:
    path, folder = mine
    new = tmp_path / "all.lib"
    assert "4 added" in run("merge", path, library=new).stdout
    assert names("a red square", new) == names("a red square", path)
    run("export", tmp_path / "out", library=path)
    for args, words in (
        (("merge", tmp_path / "out"), "is an export: `retriever import`"),
        (("import", path), "is a library: `retriever merge`"),
    ):
        result = run(*args, library=new)
        assert result.exit_code == 2
        assert words in result.stderr
    inside = run("backup", path / "copy.lib", library=path)
    assert inside.exit_code == 1
    assert "inside the library itself" in inside.stderr
    assert folder.is_dir()


def test_a_folder_without_pictures_says_so(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = run("index", tmp_path / "empty", "--library", tmp_path / "new.lib")
    assert result.stdout == "No pictures were found\n"
