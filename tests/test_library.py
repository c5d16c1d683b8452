"""The public class: the lines that a user writes, and what it promises about its encoder."""

import subprocess
import sys
from dataclasses import replace
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


# ── what is measured of a library, and what can be asked of it ───────────────────────────────────


@pytest.fixture
def many(tmp_path: Path, toy_encoder: ToyEncoder) -> Library:
    """A dozen pictures, the even ones with two captions each, in a library that was measured."""
    for number, colour in enumerate(["red", "green", "blue", "yellow", "cyan", "white"] * 2):
        path = paint(tmp_path / f"many/{colour}{number:02}.png", colour, side=8 + number)
        if number % 2 == 0:
            path.with_suffix(".txt").write_text(f"a {colour} square\nall {colour} here\n")
    library = Library.create(tmp_path / "many.lib", encoder=toy_encoder)
    library.index(tmp_path / "many")
    return library


def fitted(library: Library) -> int | None:
    """The change up to which a library was measured."""
    with library._store.snapshot() as rows:
        fit = rows.fit()
    return fit.change if fit else None


def test_what_another_version_measured_is_not_told(many: Library) -> None:
    assert many.info()["answers"] is not None
    with many._store.snapshot() as rows:
        fit = rows.fit()
    assert fit is not None
    for facts in ({}, {"channels": 3}, {"channels": fit.facts["channels"]}):
        with many._store.writer() as writer:
            writer.record_fit(replace(fit, facts=facts))
        assert many.info()["answers"] is None
        assert many.search("red").mode in ("image", "hybrid")


def test_index_measures_a_library_and_again_when_it_changed(
    many: Library, toy_encoder: ToyEncoder, tmp_path: Path
) -> None:
    first = fitted(many)
    assert first is not None
    assert all(hit.confidence is not None for hit in many.search("red"))
    seen = toy_encoder.texts_seen
    assert many.index(tmp_path / "many").unchanged == 12
    assert (fitted(many), toy_encoder.texts_seen) == (first, seen)
    paint(tmp_path / "many/new.png", "red", side=50)
    many.index()
    assert fitted(many) == first
    for number in range(3):
        paint(tmp_path / f"many/newer{number}.png", "blue", side=60 + number)
    many.index()
    assert fitted(many) > first


def test_few_pictures_are_answers_without_a_confidence(library: Library) -> None:
    assert fitted(library) is None
    answer = library.search("so red")
    assert (answer.mode, answer.is_match, answer[0].confidence) == ("image", None, None)
    library.optimize()
    assert fitted(library) is not None
    assert library.search("so red")[0].confidence is not None


def test_an_encoder_that_is_gone_is_a_problem_of_index_not_a_failure(
    many: Library, tmp_path: Path
) -> None:
    many.close()
    for picture in sorted((tmp_path / "many").glob("*.png"))[:6]:
        picture.unlink()
    with Library.open(many.path) as reopened:
        report = reopened.index()
        assert report.removed == 6
        assert len(report.problems) == 1
        assert "toy" in report.problems[0]


def test_measuring_stops_when_index_is_stopped(
    many: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fitted(many)
    for number in range(6):
        paint(tmp_path / f"many/more{number}.png", "red", side=70 + number)
    asked = []
    monkeypatch.setattr("retriever.fitting.fit", lambda *_, stop: asked.append(stop))
    many.index(stop=lambda: False)
    assert len(asked) == 1
    assert fitted(many) == before


def test_filters_are_typed_as_text(many: Library) -> None:
    hits = many.search("red", where="name like red* and width > 8")
    assert [hit.path.name for hit in hits] == ["red06.png"]
    captions = many.captions_for(hits[0].path, where="name like blue*")
    assert {hit.caption for hit in captions} == {"a blue square", "all blue here"}
    with pytest.raises(UsageError, match="colour"):
        many.search("red", where="colour = 3")


def test_a_text_has_parts_and_things_to_leave_out(many: Library) -> None:
    both = many.search("red + green", k=1)
    assert both[0].path.stem.startswith("yellow")
    shown = {hit.path.stem[:-2] for hit in many.search("green", without="red", k=20)}
    assert "green" in shown
    assert not {"red", "yellow", "white"} & shown
    assert many.search("green", text_weight=2, k=3).hits == many.search("green", k=3).hits


def test_copies_collapse_unless_all_are_asked_for(
    library: Library, tiny_pairs: Path, tmp_path: Path
) -> None:
    (tiny_pairs / "again.png").write_bytes((tiny_pairs / "red.png").read_bytes())
    library.index(tiny_pairs)
    first = library.search("red", k=2)
    assert [hit.duplicates for hit in first] == [1, 0]
    assert len(library.search("red", k=99, all=True)) == len(library.search("red", k=99)) + 1


def test_a_mode_is_chosen_for_one_search(many: Library) -> None:
    for mode in ("image", "caption", "words", "hybrid"):
        answer = many.search("all red", mode=mode, k=2)
        assert answer.mode == mode
        assert "red" in answer[0].path.stem
