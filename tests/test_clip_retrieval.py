"""Users of clip-retrieval move over: pictures on disk are found as if they had been indexed."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ToyEncoder, paint
from PIL import Image

from indexes.errors import WrongModelError
from indexes.store import Store
from retriever import clip_retrieval, exchange, portable
from retriever.errors import MissingExtraError, RetrieverError, UsageError
from retriever.exchange import ImportReport, import_clip_retrieval
from retriever.ingest import index_folder

pyarrow = pytest.importorskip("pyarrow")
import pyarrow.parquet as parquet  # noqa: E402

FILES = ["blue.png", "green.png", "more/yellow.png", "red.png"]
CAPTIONS = ["a blue square\nthe deep blue\n", "a green square\n", None, "all red"]


def write_shard(
    out: Path,
    number: str,
    names: list[str],
    images: Any,
    captions: list[str | None] | None = None,
    texts: Any = None,
) -> None:
    """One partition, as clip-retrieval writes it: float16 rows, a column of its own each."""
    columns: dict[str, Any] = {"image_path": names}
    for kind, rows in (("img_emb", images), ("text_emb", texts)):
        if rows is not None:
            (out / kind).mkdir(parents=True, exist_ok=True)
            np.save(out / kind / f"{kind}_{number}.npy", np.asarray(rows, np.float16))
    if captions is not None:
        columns["caption"] = captions
    columns["width"] = [640] * len(names)  # img2dataset's columns come along
    (out / "metadata").mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), out / "metadata" / f"metadata_{number}.parquet")


def embedded(folder: Path, files: list[str] = FILES) -> np.ndarray:
    return ToyEncoder().encode_images([folder / file for file in files])


def described(captions: list[str | None]) -> np.ndarray:
    return ToyEncoder().encode_texts([text or "" for text in captions])


@pytest.fixture
def layout(tiny_pairs: Path, tmp_path: Path) -> Path:
    """Two partitions of the pictures of `tiny_pairs`, by absolute path, with captions."""
    out, paths = tmp_path / "embeddings", [str(tiny_pairs / file) for file in FILES]
    images, texts = embedded(tiny_pairs), described(CAPTIONS)
    for number, part in (("00", slice(0, 1)), ("01", slice(1, 4))):
        write_shard(out, number, paths[part], images[part], CAPTIONS[part], texts[part])
    return out


def take(store: Store, layout: Path, **options: Any) -> ImportReport:
    return import_clip_retrieval(store, layout, encoder=ToyEncoder(), **options)


def captions(store: Store, path: Path) -> list[tuple[str, str]]:
    row = store.item_by_path(path)
    assert row is not None
    return [(one.text, one.source) for one in row.captions]


def test_indexing_afterwards_finds_the_pictures_and_encodes_none(fresh_store, layout, tiny_pairs):
    assert take(fresh_store, layout) == ImportReport(added=4)
    assert fresh_store.roots() == [(1, tiny_pairs)]
    row = fresh_store.item_by_path(tiny_pairs / "red.png")
    assert (row.width, row.height) == (8, 8)
    np.testing.assert_array_equal(fresh_store.embeddings("image", [row.item_id]), [[1, 0, 0, 0]])
    assert captions(fresh_store, tiny_pairs / "green.png") == [("a green square", "sidecar")]
    # clip-retrieval had taken the two lines for one caption.
    assert captions(fresh_store, tiny_pairs / "blue.png") == [
        ("a blue square", "sidecar"),
        ("the deep blue", "sidecar"),
    ]
    assert fresh_store.verify() == []
    encoder = ToyEncoder()
    report = index_folder(fresh_store, lambda: encoder, tiny_pairs)
    # The fifth picture is new; yellow's text file was not given to clip-retrieval, and red's has
    # other captions than the one that came.
    assert (report.added, report.updated, report.unchanged) == (1, 2, 2)
    assert encoder.images_seen == 1
    assert captions(fresh_store, tiny_pairs / "red.png") == [
        ("a red square", "sidecar"),
        ("all red, nothing else", "sidecar"),
        ("all red", "given: clip-retrieval"),
    ]


def test_a_second_import_changes_nothing_and_reads_no_picture(fresh_store, layout, monkeypatch):
    take(fresh_store, layout)
    monkeypatch.setattr(clip_retrieval, "content_hash", lambda path: pytest.fail(f"read {path}"))
    assert take(fresh_store, layout) == ImportReport(unchanged=4)


def test_pictures_without_captions(fresh_store, tiny_pairs, tmp_path):
    paths = [str(tiny_pairs / file) for file in FILES]
    write_shard(tmp_path / "out", "0", paths, embedded(tiny_pairs))
    assert take(fresh_store, tmp_path / "out") == ImportReport(added=4)
    assert fresh_store.info()["captions"] == 0


def test_captions_without_embeddings_are_encoded_here(fresh_store, layout, tiny_pairs):
    for file in (layout / "text_emb").iterdir():
        file.unlink()
    (layout / "text_emb").rmdir()
    assert take(fresh_store, layout) == ImportReport(added=4)
    [(caption_id, _)] = [
        (one, row.text)
        for one, (_, row) in zip(range(1, 9), fresh_store.captions(range(1, 9)), strict=False)
        if row.text == "all red"
    ]
    np.testing.assert_array_equal(fresh_store.embeddings("caption", [caption_id]), [[1, 0, 0, 0]])


def test_relative_paths_need_a_folder_to_start_from(fresh_store, tiny_pairs, tmp_path):
    write_shard(tmp_path / "out", "0", ["pictures/red.png"], embedded(tiny_pairs, ["red.png"]))
    with pytest.raises(UsageError, match=r"relative path: name the folder .*--pictures"):
        take(fresh_store, tmp_path / "out")
    assert take(fresh_store, tmp_path / "out", root=tmp_path) == ImportReport(added=1)
    # The library's root is the pictures' own folder, not all that lies around it.
    assert fresh_store.roots() == [(1, tiny_pairs)]


def test_rows_without_a_usable_picture_are_named_and_skipped(fresh_store, tiny_pairs, tmp_path):
    (tiny_pairs / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tiny_pairs / "notes.txt").write_bytes(b"notes")
    paint(tmp_path / "elsewhere.png", "cyan")
    names = ["red.png", "gone.png", "broken.png", "notes.txt", "../elsewhere.png", "green.png"]
    rows = embedded(tiny_pairs, ["red.png"]).repeat(6, axis=0)
    rows[5] = np.nan
    write_shard(tmp_path / "out", "0", names, rows)
    report = take(fresh_store, tmp_path / "out", root=tiny_pairs)
    assert report.added == 1
    reasons = {one.path.name: one.reason for one in report.skipped}
    assert reasons.pop("broken.png")
    assert reasons == {
        "gone.png": "is not on disk",
        "notes.txt": "is not named like a picture",
        "elsewhere.png": f"is not below {tiny_pairs}",
        "green.png": "has an embedding without a direction",
    }


def test_keys_of_a_webdataset_are_no_pictures(fresh_store, tmp_path):
    write_shard(tmp_path / "out", "0", ["000000012"], np.eye(1, 4))
    with pytest.raises(RetrieverError, match=r"names 1 pictures, none of which .*000000012"):
        take(fresh_store, tmp_path / "out", root=tmp_path)


def test_several_rows_of_a_picture_give_it_several_captions(
    fresh_store, tiny_pairs, tmp_path, monkeypatch
):
    for module in (clip_retrieval, exchange, portable):
        monkeypatch.setattr(module, "BATCH_SIZE", 2)
    path, texts = str(tiny_pairs / "white.png"), ["one", "two", "two", "three red", "one"]
    rows = embedded(tiny_pairs, ["white.png"]).repeat(5, axis=0)
    write_shard(tmp_path / "out", "0", [path] * 5, rows, texts, described(texts))
    report = take(fresh_store, tmp_path / "out")
    assert (report.added, report.skipped) == (1, ())
    texts = [text for text, _ in captions(fresh_store, tiny_pairs / "white.png")]
    assert texts == ["one", "two", "three red"]
    assert fresh_store.verify() == []


def test_descriptions_inside_a_picture_are_taken_as_indexing_would(
    fresh_store, tiny_pairs, tmp_path
):
    exif = Image.Exif()
    exif[0x010E] = "green hills"
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tiny_pairs / "hills.jpg", exif=exif)
    write_shard(
        tmp_path / "out", "0", [str(tiny_pairs / "hills.jpg")], embedded(tiny_pairs, ["hills.jpg"])
    )
    take(fresh_store, tmp_path / "out")
    assert captions(fresh_store, tiny_pairs / "hills.jpg") == [("green hills", "exif")]
    encoder = ToyEncoder()
    assert index_folder(fresh_store, lambda: encoder, tiny_pairs).unchanged == 1


def test_embeddings_of_another_model_are_refused(fresh_store, layout):
    for file in (layout / "img_emb").iterdir():
        np.save(file, np.load(file)[:, ::-1])
    with pytest.raises(WrongModelError, match="of another model than toy: of 4 pictures"):
        take(fresh_store, layout)
    assert fresh_store.item_ids() == []
    assert take(fresh_store, layout, check=0).added == 4


def test_captions_of_another_model_are_refused(fresh_store, layout):
    for file in (layout / "text_emb").iterdir():
        np.save(file, np.load(file)[:, ::-1])
    with pytest.raises(WrongModelError, match="captions by another model than toy"):
        take(fresh_store, layout)
    assert fresh_store.item_ids() == []


def test_a_few_edited_pictures_are_no_other_model(fresh_store, layout, tiny_pairs):
    paint(tiny_pairs / "red.png", "cyan")
    assert take(fresh_store, layout).added == 4


def test_rows_that_are_nearly_unit_become_unit(fresh_store, tiny_pairs, tmp_path):
    rows = embedded(tiny_pairs) * 1.01
    write_shard(tmp_path / "out", "0", [str(tiny_pairs / file) for file in FILES], rows)
    take(fresh_store, tmp_path / "out")
    assert fresh_store.verify() == []


def test_pictures_of_known_content_keep_what_the_library_has(fresh_store, layout, tiny_pairs):
    encoder = ToyEncoder()
    index_folder(fresh_store, lambda: encoder, tiny_pairs)
    before = captions(fresh_store, tiny_pairs / "red.png")
    assert take(fresh_store, layout) == ImportReport(updated=1, unchanged=3)
    assert captions(fresh_store, tiny_pairs / "red.png") == [
        *before,
        ("all red", "given: clip-retrieval"),
    ]


def test_pictures_with_nothing_in_common_need_a_folder(fresh_store, layout, monkeypatch):
    monkeypatch.setattr("os.path.commonpath", lambda paths: "/")
    with pytest.raises(UsageError, match="have only / in common"):
        take(fresh_store, layout)


def test_without_pyarrow_the_extra_is_named(fresh_store, layout, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=re.escape("picture-retriever[parquet]")):
        take(fresh_store, layout)


def drop(name: str) -> Any:
    return lambda out: (out / name).unlink()


def table(**columns: Any) -> Any:
    path = "metadata/metadata_00.parquet"
    return lambda out: parquet.write_table(pyarrow.table(columns), out / path)


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (drop("metadata/metadata_01.parquet"), UsageError, "needs a metadata/metadata_N.parquet"),
        (drop("img_emb/img_emb_00.npy"), UsageError, "needs a metadata/metadata_N.parquet"),
        (drop("text_emb/text_emb_00.npy"), UsageError, "text_emb has other numbers"),
        (table(image_path=["a", "b"]), RetrieverError, "has 2 rows, but .* are 1 and 1"),
        (table(key=["a"]), RetrieverError, "has no column image_path"),
        (table(image_path=[3]), RetrieverError, "row 0: image_path is not a path"),
        (table(image_path=[None]), RetrieverError, "row 0: image_path is not a path"),
        (table(image_path=["/a\0b"]), RetrieverError, "row 0: image_path is not a path"),
        (table(image_path=["/a"], caption=[1]), RetrieverError, "row 0: caption is not a text"),
        (
            lambda out: (out / "metadata/metadata_00.parquet").write_bytes(b"PAR1"),
            RetrieverError,
            "metadata_00.parquet is not a readable Parquet file",
        ),
        (
            lambda out: np.save(out / "img_emb/img_emb_00.npy", np.eye(1, 7)),
            WrongModelError,
            "embeddings of 7 dimensions, and the library of 4",
        ),
        (
            lambda out: np.save(
                out / "img_emb/img_emb_00.npy", np.array([[{}]], object), allow_pickle=True
            ),
            RetrieverError,
            "holds object",
        ),
    ],
)
def test_a_damaged_layout_is_refused_in_a_sentence(fresh_store, layout, damage, error, words):
    damage(layout)
    with pytest.raises(error, match=words) as caught:
        take(fresh_store, layout)
    assert "\n" not in str(caught.value)
    assert fresh_store.item_ids() == []


def test_a_folder_of_something_else_is_refused(fresh_store, tmp_path):
    with pytest.raises(UsageError, match="no complete output of clip-retrieval"):
        take(fresh_store, tmp_path)
