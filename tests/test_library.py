"""The public class: the lines that a user writes, and what it promises about its encoder."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ToyEncoder, paint
from PIL import Image

import indexes.approximate as approximate
import indexes.optimizer as optimizer
from indexes.errors import (
    StoreExistsError,
    StoreNotFoundError,
    StoreReadOnlyError,
    WrongModelError,
)
from indexes.writer import Writer
from retriever.errors import EncoderError, UsageError
from retriever.library import Library


@pytest.fixture
def library(tmp_path: Path, tiny_pairs: Path, toy_encoder: ToyEncoder) -> Library:
    library = Library.create(tmp_path / "photos.lib", encoder=toy_encoder)
    library.index(tiny_pairs)
    return library


def test_the_lines_of_the_readme_run_as_written(
    tmp_path: Path, tiny_pairs: Path, toy_encoder: ToyEncoder
) -> None:
    Library.create(tmp_path / "photos.lib", encoder=toy_encoder).close()
    library = Library.open(tmp_path / "photos.lib", toy_encoder)
    report = library.index(str(tiny_pairs))
    assert (report.added, report.updated, report.moved, report.removed) == (5, 0, 0, 0)
    assert (report.unchanged, report.failed) == (0, ())
    for hit in library.search("a red square", k=1):
        assert (hit.path, hit.caption) == (tiny_pairs / "red.png", "a red square")
        assert hit.score == pytest.approx(1, abs=2e-3)
    assert library.search(image=str(tiny_pairs / "blue.png"))[0].path.name == "blue.png"
    hits = library.captions_for(tiny_pairs / "blue.png", k=5)
    assert len(hits) == 5
    assert {hit.caption for hit in hits[:2]} == {"a blue square", "the deep blue"}
    library.close()


def test_text_and_picture_are_weighted(library: Library) -> None:
    red = Image.new("RGB", (3, 3), (255, 0, 0))
    assert library.search("green", image=red, k=1)[0].path.stem == "yellow"
    assert library.search("green", image=red, text_weight=9, k=1)[0].path.stem == "green"
    assert library.search("green", image=red, image_weight=9, k=1)[0].path.stem == "red"


def test_a_search_without_anything_to_search_for_is_refused(library: Library) -> None:
    with pytest.raises(UsageError, match="empty"):
        library.search()


def test_another_encoder_is_refused_with_both_names(library: Library) -> None:
    library.close()
    with pytest.raises(WrongModelError, match="toy"):
        Library.open(library.path, ToyEncoder(fingerprint="toy-2"))


def test_a_changed_model_of_the_same_name_is_refused_when_first_needed(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.close()
    changed = ToyEncoder(fingerprint="toy-2")
    monkeypatch.setattr("retriever.encoders.load_encoder", lambda name, device, threads: changed)
    with Library.open(library.path) as reopened:
        assert reopened.info()["items"] == 5
        with pytest.raises(WrongModelError, match="another version of toy"):
            reopened.search("red")


def test_info_verify_remove_and_an_unchanged_folder_need_no_encoder(
    library: Library, tiny_pairs: Path
) -> None:
    library.close()
    with Library.open(library.path) as reopened:  # no model is called "toy", so none can be loaded
        assert reopened.info()["captions"] == 6
        assert reopened.verify() == []
        assert reopened.index(tiny_pairs).unchanged == 5
        assert reopened.remove(tiny_pairs / "red.png") == 1
        reopened.rebuild()
        assert reopened.verify() == []
        with pytest.raises(EncoderError, match="toy"):
            reopened.search("red")


def test_create_refuses_a_library_that_exists_and_open_one_that_does_not(
    library: Library, tmp_path: Path, toy_encoder: ToyEncoder
) -> None:
    with pytest.raises(StoreExistsError):
        Library.create(library.path, toy_encoder)
    with pytest.raises(StoreNotFoundError):
        Library.open(tmp_path / "absent.lib")


def test_a_removed_picture_is_never_returned_and_comes_back_when_indexed(
    library: Library, tiny_pairs: Path
) -> None:
    assert library.remove([tiny_pairs / "red.png"]) == 1
    assert "red" not in [hit.path.stem for hit in library.search("red", k=100)]
    assert "a red square" not in [
        hit.caption for hit in library.captions_for(tiny_pairs / "red.png")
    ]
    assert library.index(tiny_pairs).added == 1
    assert library.search("red", k=1)[0].path.stem == "red"


def test_removing_a_folder_forgets_all_in_it(library: Library, tiny_pairs: Path) -> None:
    (tiny_pairs / "more.png").write_bytes((tiny_pairs / "red.png").read_bytes())
    library.index(tiny_pairs)
    assert library.remove(tiny_pairs / "more") == 1
    assert library.remove(tiny_pairs) == 5
    assert library.info()["items"] == 0


def test_files_that_are_gone_can_be_removed_by_their_former_path(
    library: Library, tiny_pairs: Path
) -> None:
    (tiny_pairs / "more/yellow.png").unlink()
    assert library.remove(tiny_pairs / "more/yellow.png") == 1


def test_an_unknown_path_is_named_and_nothing_is_removed(
    library: Library, tiny_pairs: Path
) -> None:
    with pytest.raises(UsageError, match=r"nothing\.png"):
        library.remove([tiny_pairs / "red.png", tiny_pairs / "nothing.png"])
    assert library.info()["items"] == 5


def test_a_library_inside_the_picture_folder_is_not_indexed(
    tiny_pairs: Path, toy_encoder: ToyEncoder
) -> None:
    with Library.create(tiny_pairs / "here.lib", toy_encoder) as library:
        paint(tiny_pairs / "here.lib/cache/thumbnail.png", "red")
        assert library.index(tiny_pairs).added == 5
        assert library.index(tiny_pairs).unchanged == 5


def test_failures_are_listed_with_their_reason(library: Library, tiny_pairs: Path) -> None:
    (tiny_pairs / "broken.png").write_bytes(b"")
    library.index(tiny_pairs)
    (failure,) = library.failures()
    assert failure.path == tiny_pairs / "broken.png"
    assert failure.reason


def test_a_model_in_a_folder_is_found_from_any_directory(
    tmp_path: Path, toy_encoder: ToyEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def load(name: str, device: str, threads: int | None) -> ToyEncoder:
        asked.append(name)
        return toy_encoder

    monkeypatch.setattr("retriever.encoders.load_encoder", load)
    (tmp_path / "my.ckpt").mkdir()
    monkeypatch.chdir(tmp_path)
    Library.create(tmp_path / "photos.lib", "my.ckpt").close()
    monkeypatch.chdir("/")
    with Library.open(tmp_path / "photos.lib") as library:
        assert library.encoder is toy_encoder
    assert asked == ["my.ckpt", str(tmp_path / "my.ckpt")]


def test_importing_the_library_loads_no_engine() -> None:
    heavy = "{'torch', 'onnxruntime', 'faiss', 'sqlalchemy', 'tokenizers', 'open_clip', 'PIL'}"
    code = f"import retriever.library, sys; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_a_library_that_grew_large_is_optimised_by_index_itself(
    tmp_path: Path, toy_encoder: ToyEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(approximate, "EXACT_BYTES", 100)
    monkeypatch.setattr(approximate, "LEAST_ROWS", 40)
    monkeypatch.setattr(optimizer, "is_proved", lambda one, policy: one.overlap >= policy.overlap)
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for n in range(60):
        colour = tuple(rng.integers(0, 256, 3).tolist())
        Image.new("RGB", (8, 8), colour).save(tmp_path / "pictures" / f"{n}.png")
    told = []
    with Library.create(tmp_path / "a.lib", toy_encoder) as library:
        report = library.index(
            tmp_path / "pictures", optimizing=lambda done, total: told.append((done, total))
        )
        assert report.added == 60
        assert told[-1] == (60, 60)
        facts = library.info()["index"]["image"]
        assert facts["approximate"] is not None
        assert sorted(facts["approximate"]["directions"]) == ["image", "text"]  # by phrases
        best = library.search("red", k=5)
        assert [hit.item_id for hit in best] == [
            hit.item_id for hit in library.search("red", k=5, exact=True)
        ]
        assert library.index().unchanged == 60
        assert library.optimize() == ["image"]
        assert library.optimize(exact=True) == []
        assert library.info()["index"]["image"]["approximate"] is None
        with pytest.raises(UsageError, match="a share above 0"):
            library.optimize(overlap=0)


def test_an_index_that_finds_no_room_is_a_problem_not_a_failure(
    tmp_path: Path, toy_encoder: ToyEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    paint(tmp_path / "pictures" / "red.png", "red")

    def full(self: Writer, *_: object, **__: object) -> None:
        raise StoreReadOnlyError("the disk is full")

    monkeypatch.setattr(Writer, "optimize", full)
    with Library.create(tmp_path / "a.lib", toy_encoder) as library:
        report = library.index(tmp_path / "pictures")
        assert report.added == 1
        assert report.problems == ("the disk is full",)
