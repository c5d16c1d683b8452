import functools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import COLOURS, paint
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_models import WORDS, write_checkpoint

from retriever import encoders
from retriever.encoders import (
    CheckpointEncoder,
    Encoder,
    OnnxEncoder,
    checked_embeddings,
    load_encoder,
    to_pixels,
    token_ids,
)
from retriever.errors import EncoderError, PictureError, UsageError
from retriever.openclip import OpenClipEncoder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="module")
def exported(checkpoint: Path) -> Path:
    from retriever.export import export_onnx

    export_onnx(checkpoint, checkpoint.with_name("onnx"))
    return checkpoint.with_name("onnx")


@pytest.fixture
def onnx_folder(exported: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(exported, tmp_path / "onnx"))


@pytest.fixture(params=["onnx", "checkpoint"])
def encoder(request: pytest.FixtureRequest, exported: Path, checkpoint: Path) -> Encoder:
    if request.param == "onnx":
        return OnnxEncoder(exported, device="cpu", threads=1)
    return CheckpointEncoder(checkpoint, device="cpu", threads=1)


# ── the contract, for each kind of encoder ─────────────────────────────────────────────────────


def test_rows_are_unit_float32_in_the_order_given(encoder: Encoder) -> None:
    texts = ["a red square", "dog", "the cat on a large blue picture"]
    rows = encoder.encode_texts(texts)
    assert rows.shape == (3, encoder.dim)
    assert rows.dtype == np.float32
    assert rows.flags.c_contiguous
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(encoder.encode_texts(texts[::-1]), rows[::-1], atol=1e-6)


def test_path_array_and_picture_are_the_same_input(encoder: Encoder, tmp_path: Path) -> None:
    image = Image.effect_noise((50, 40), 90).convert("RGB")
    path = tmp_path / "noise.png"
    image.save(path)
    rows = encoder.encode_images([image, path, np.asarray(image)])
    np.testing.assert_allclose(rows, rows[[0, 0, 0]], atol=1e-6)
    assert rows.shape == (3, encoder.dim)


def test_nothing_gives_no_rows(encoder: Encoder) -> None:
    assert encoder.encode_images([]).shape == (0, encoder.dim)
    assert encoder.encode_texts([]).shape == (0, encoder.dim)


def test_more_than_a_batch_is_the_same_as_one_at_a_time(encoder: Encoder) -> None:
    texts = [" ".join(WORDS[: 1 + n % 9]) for n in range(encoders.TEXT_BATCH + 3)]
    rows = encoder.encode_texts(texts)
    for row in (0, 8, len(texts) - 1):
        np.testing.assert_allclose(rows[row], encoder.encode_texts([texts[row]])[0], atol=1e-6)
    images = [Image.new("RGB", (9, 9), (n, 2 * n, 0)) for n in range(encoders.IMAGE_BATCH + 1)]
    rows = encoder.encode_images(images)
    np.testing.assert_allclose(rows[-1], encoder.encode_images(images[-1:])[0], atol=1e-6)


def test_text_is_cut_at_the_models_limit(encoder: Encoder) -> None:
    words = [WORDS[n % len(WORDS)] for n in range(3 * encoder.max_text_tokens)]
    cut = words[: encoder.max_text_tokens]
    rows = encoder.encode_texts([" ".join(words), " ".join(cut), " ".join(cut[:-1])])
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-6)
    assert not np.allclose(rows[1], rows[2], atol=1e-3)


@pytest.mark.parametrize("text", ["", "  ", "\n", "日本語", "\0", "🐈" * 500])
def test_any_text_has_an_embedding(encoder: Encoder, text: str) -> None:
    assert encoder.encode_texts([text]).shape == (1, encoder.dim)


def test_unreadable_picture_is_named(encoder: Encoder, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    with pytest.raises(PictureError, match=re.escape("broken.jpg")):
        encoder.encode_images([paint(tmp_path / "fine.png", "red"), broken])


# ── folders of ONNX files ──────────────────────────────────────────────────────────────────────


def test_text_query_needs_no_image_tower(onnx_folder: Path) -> None:
    (onnx_folder / "image.onnx").unlink()
    encoder = OnnxEncoder(onnx_folder)
    assert encoder.encode_texts(["a dog"]).shape == (1, 64)
    with pytest.raises(EncoderError, match=r"image\.onnx cannot be read"):
        encoder.encode_images([Image.new("RGB", (8, 8))])


def test_image_query_needs_no_text_tower(onnx_folder: Path) -> None:
    (onnx_folder / "text.onnx").unlink()
    (onnx_folder / "tokenizer.json").unlink()
    assert OnnxEncoder(onnx_folder).encode_images([Image.new("RGB", (8, 8))]).shape == (1, 64)


def test_onnx_folder_runs_without_torch_and_open_clip(onnx_folder: Path, tmp_path: Path) -> None:
    picture = paint(tmp_path / "red.png", "red")
    code = (
        "import sys; from pathlib import Path; from retriever.encoders import load_encoder\n"
        "encoder = load_encoder(sys.argv[1])\n"
        "encoder.encode_texts(['a dog']), encoder.encode_images([Path(sys.argv[2])])\n"
        "heavy = {'torch', 'open_clip', 'onnx', 'timm', 'transformers', 'faiss', 'sqlalchemy'}\n"
        "print(sorted(heavy & set(sys.modules)), encoder.fingerprint)"
    )
    command = [sys.executable, "-c", code, str(onnx_folder), str(picture)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    # The fingerprint of another process is the same, or a library could not be opened again.
    assert done.stdout == f"[] {OnnxEncoder(onnx_folder).fingerprint}\n"


@pytest.mark.parametrize("file", ["image.onnx", "text.onnx", "tokenizer.json"])
def test_swapped_file_is_refused_and_named(onnx_folder: Path, file: str) -> None:
    path = onnx_folder / file
    path.write_bytes(path.read_bytes() + b" ")
    encoder = OnnxEncoder(onnx_folder)
    (problem,) = encoder.verify()
    assert f"{file} is not the file that config.json describes" in problem

    def encode() -> None:
        encoder.encode_images([Image.new("RGB", (8, 8))])
        encoder.encode_texts(["a dog"])

    with pytest.raises(EncoderError, match=re.escape(problem)):
        encode()


def edited(folder: Path, **changes: Any) -> OnnxEncoder:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return OnnxEncoder(folder)


def test_fingerprint_changes_with_what_decides_an_embedding_only(onnx_folder: Path) -> None:
    config = OnnxEncoder(onnx_folder).config
    before = OnnxEncoder(onnx_folder).fingerprint
    assert re.fullmatch("[0-9a-f]{32}", before)
    assert edited(onnx_folder, name="other", recall={"flickr8k": {}}).fingerprint == before
    changes: list[dict[str, Any]] = [
        {"image": config["image"] | {"resize": "shortest"}},
        {"image": config["image"] | {"interpolation": "bilinear"}},
        {"text": {"max_tokens": 11}},
        {"files": config["files"] | {"text.onnx": "0" * 32}},
    ]
    found = {edited(onnx_folder, **(config | change)).fingerprint for change in changes}
    assert len(found | {before}) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": "64"}, "'dim' is no int"),
        ({"image": {"size": 32}}, "lacks 'resize'"),
        (
            {"image": {"size": 32, "resize": "stretch", "interpolation": "bicubic"}},
            "'resize' must be one of squash, shortest",
        ),
        *(
            (
                {
                    "image": {"size": 32, "resize": "longest", "interpolation": "bicubic"}
                    | {"fill": fill}
                },
                "'fill' must be a grey level from 0 to 255",
            )
            for fill in (-1, 256, 0.5, "black", True)
        ),
        ({"text": None}, "not the description of a model"),
        ({"files": {}}, r"lacks 'image\.onnx'"),
    ],
)
def test_faulty_config_is_told_in_a_sentence(
    onnx_folder: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(EncoderError, match=message):
        edited(onnx_folder, **changes)


def test_file_that_is_no_onnx_is_told_in_a_sentence(onnx_folder: Path) -> None:
    (onnx_folder / "text.onnx").write_bytes(b"nothing")
    files = {"files": OnnxEncoder(onnx_folder).config["files"]}
    files["files"]["text.onnx"] = encoders.digest(b"nothing")
    with pytest.raises(EncoderError, match=r"text\.onnx cannot be run"):
        edited(onnx_folder, **files).encode_texts(["a dog"])


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        (encoders.OnnxEncoder, ["_image_session", "_text_session"]),
        (encoders.CheckpointEncoder, ["_images", "loaded"]),
        (OpenClipEncoder, ["_images", "_texts"]),
    ],
)
def test_threads_that_come_at_once_share_one_tower(kind: type, parts: list[str]) -> None:
    assert all(isinstance(vars(kind)[part], encoders.built_once) for part in parts)


def test_what_is_built_once_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def unlocked(self: Any, instance: Any, owner: Any = None) -> Any:  # as from Python 3.12 on
        if self.attrname not in vars(instance):
            vars(instance)[self.attrname] = self.func(instance)
        return vars(instance)[self.attrname]

    monkeypatch.setattr(functools.cached_property, "__get__", unlocked)
    built = []

    class Large:
        @encoders.built_once
        def tower(self) -> object:
            built.append(threading.current_thread())
            time.sleep(0.05)
            return object()

    large = Large()
    with ThreadPoolExecutor(8) as threads:
        found = set(threads.map(lambda _: large.tower, range(8)))
    assert len(found) == len(built) == 1


# ── checkpoints ────────────────────────────────────────────────────────────────────────────────


def test_other_weights_have_another_fingerprint(checkpoint: Path, tmp_path: Path) -> None:
    same = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    other = write_checkpoint(tmp_path / "other", seed=1)
    before = CheckpointEncoder(checkpoint).fingerprint
    assert CheckpointEncoder(same).fingerprint == before
    assert CheckpointEncoder(other).fingerprint != before


def test_truncated_weights_are_told_in_a_sentence(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(EncoderError, match=re.escape(str(folder))):
        CheckpointEncoder(folder, device="cpu").encode_texts(["a dog"])


# ── finding the encoder for a name ─────────────────────────────────────────────────────────────


def test_folder_is_told_by_what_it_holds(exported: Path, checkpoint: Path, tmp_path: Path) -> None:
    assert isinstance(load_encoder(str(exported)), OnnxEncoder)
    assert isinstance(load_encoder(str(checkpoint)), CheckpointEncoder)
    with pytest.raises(EncoderError, match="holds no model"):
        load_encoder(str(tmp_path))


@pytest.mark.parametrize("name", ["minni", "ViT-B-32"])
def test_unknown_name_points_to_the_list(name: str) -> None:
    with pytest.raises(EncoderError, match="`retriever models` lists"):
        load_encoder(name)


def test_unknown_device_is_wrong_usage(exported: Path) -> None:
    with pytest.raises(UsageError, match="auto, cpu, cuda, mps"):
        load_encoder(str(exported), device="gpu")


def test_absent_device_is_told_in_a_sentence(exported: Path, checkpoint: Path) -> None:
    # No machine has both, and ONNX Runtime has no MPS at all.
    with pytest.raises(EncoderError, match="cannot run on mps here"):
        load_encoder(str(exported), device="mps").encode_texts(["a dog"])
    import torch

    absent = "mps" if torch.cuda.is_available() else "cuda"
    with pytest.raises(EncoderError, match=f"torch cannot use {absent} here"):
        load_encoder(str(checkpoint), device=absent).encode_texts(["a dog"])


# ── the parts ──────────────────────────────────────────────────────────────────────────────────


def test_squash_ignores_proportions_and_shortest_keeps_the_middle() -> None:
    # Three bands of 8 × 8: red, green, blue.
    bands = np.repeat(np.eye(3, dtype=np.uint8)[None] * 255, 8, axis=0).repeat(8, axis=1)
    squashed = to_pixels(bands, 3, "squash", "bilinear")
    assert squashed.shape == (3, 3, 3)
    assert squashed[1].argmax(axis=1).tolist() == [0, 1, 2]
    middle = to_pixels(bands, 8, "shortest", "bilinear")
    assert (middle == (0, 255, 0)).all()


def test_grey_picture_becomes_rgb() -> None:
    assert (
        to_pixels(Image.new("L", (5, 5), 7), 4, "squash", "bicubic").tolist()
        == [[[7, 7, 7]] * 4] * 4
    )


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.uint8),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_array_of_another_type_or_shape_is_refused(array: np.ndarray) -> None:
    with pytest.raises(PictureError, match=re.escape(f"not {array.dtype} of shape {array.shape}")):
        to_pixels(array, 4, "squash", "bicubic")


@pytest.mark.parametrize(
    "rows",
    [
        [[1.0, 0.0], [np.nan, 0.0]],
        [[1.0, 0.0], [0.0, 0.0]],
        [[1.0, 0.0], [0.0, 1.01]],
        [[1.0, 0.0], [np.inf, 0.0]],
    ],
)
def test_row_that_is_no_unit_row_is_refused(rows: list[list[float]]) -> None:
    with pytest.raises(EncoderError, match="a row of length"):
        checked_embeddings(np.array(rows, np.float32), 2, 2, "model")


def test_wrong_number_of_rows_is_refused() -> None:
    with pytest.raises(EncoderError, match=r"\(1, 2\) where \(2, 2\)"):
        checked_embeddings(np.array([[1.0, 0.0]], np.float32), 2, 2, "model")


@settings(deadline=None)  # shared machines pause now and then
@given(st.lists(st.integers(1, 30), max_size=200))
def test_texts_of_like_length_run_together_and_come_back_in_order(lengths: list[int]) -> None:
    seen = []

    def run(input_ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        seen.append(mask.sum(axis=1))
        assert input_ids.shape[1] == mask.sum(axis=1).max()
        assert (input_ids[mask == 0] == 0).all()
        return input_ids.sum(axis=1, keepdims=True)

    ids: Sequence[list[int]] = [[place + 1] * n for place, n in enumerate(lengths)]
    rows = encoders._encode_by_length(ids, 1, run)
    assert rows[:, 0].tolist() == [sum(one) for one in ids]
    assert [n for batch in seen for n in batch] == sorted(lengths)
    assert all(len(batch) <= encoders.TEXT_BATCH for batch in seen)


def test_text_without_tokens_reads_as_padding() -> None:
    from tiny_models import word_tokenizer

    assert token_ids(word_tokenizer(), ["", "a the"]) == [[0], [2, 3]]


def test_every_colour_differs(encoder: Encoder) -> None:
    rows = encoder.encode_images([Image.new("RGB", (8, 8), colour) for colour in COLOURS.values()])
    cosines = rows @ rows.T
    assert (cosines[~np.eye(len(rows), dtype=bool)] < 1 - 1e-5).all()


def test_a_text_is_cut_exactly_when_what_follows_its_window_changes_nothing(
    encoder: Encoder,
) -> None:
    words = ["dog"] * 200
    fits = [not cut for cut in encoder.is_cut([" ".join(words[:n]) for n in range(1, 60)])]
    longest = fits.index(False)  # words; every longer text is cut too
    assert 0 < longest < 59
    assert not any(fits[longest:])
    texts = [" ".join([*words[: longest - 1], last]) for last in ("red", "blue")]
    beyond = [" ".join([*words[:longest], *["dog"] * 3, last]) for last in ("red", "blue")]
    assert encoder.is_cut(texts) == [False, False]
    assert encoder.is_cut(beyond) == [True, True]
    inside, after = encoder.encode_texts(texts), encoder.encode_texts(beyond)
    assert not np.allclose(inside[0], inside[1])
    assert np.allclose(after[0], after[1])


def test_onnx_runtime_reports_to_nobody(tmp_path: Path) -> None:
    """What it has to send lies in the user's cache first, unless it runs in CI."""
    code = "from retriever.encoders import load_encoder; load_encoder().encode_texts(['a dog'])"
    kept = {key: value for key, value in os.environ.items() if key in ("PATH", "VIRTUAL_ENV")}
    places = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], env=kept | places, cwd=root, check=True)
    assert not list(tmp_path.rglob("*onnxruntime*"))
