import json
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import COLOURS
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from tiny_models import write_checkpoint

from retriever.encoders import CheckpointEncoder, OnnxEncoder
from retriever.errors import EncoderError
from retriever.export import GROUP, LARGE_KERNEL, OPSET, _to_int8, compact, export_onnx

TEXTS = ["a red square", "two dog on the cat", "", "blue", "unheard words in a picture"]


def pictures() -> list[Image.Image]:
    return [Image.new("RGB", (40, 30), colour) for colour in COLOURS.values()]


def test_gru_is_refused_in_a_sentence(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "gru")
    with pytest.raises(EncoderError, match="a GRU runs in torch only"):
        export_onnx(checkpoint, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_static_tower_exports_and_answers_like_torch(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "static")

    report = export_onnx(checkpoint, tmp_path / "onnx")

    torch_rows = CheckpointEncoder(checkpoint, device="cpu").encode_texts(TEXTS)
    rows = OnnxEncoder(tmp_path / "onnx").encode_texts(TEXTS)
    assert (torch_rows * rows).sum(axis=1).min() > 1 - 1e-3
    assert report.text_cosine_error < 1e-3


def test_images_and_texts_agree_with_torch_in_any_batch(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    report = export_onnx(checkpoint, tmp_path / "onnx")
    reference, exported = CheckpointEncoder(checkpoint), OnnxEncoder(tmp_path / "onnx")

    rows = exported.encode_images(pictures())
    assert (rows * reference.encode_images(pictures())).sum(axis=1).min() > 1 - 1e-3
    one_by_one = np.concatenate([exported.encode_images([one]) for one in pictures()])
    np.testing.assert_allclose(rows, one_by_one, atol=1e-6)  # float32 sums in another order
    one_by_one = np.concatenate([exported.encode_texts([one]) for one in TEXTS])
    np.testing.assert_allclose(exported.encode_texts(TEXTS), one_by_one, atol=1e-6)
    assert report.image_cosine_error < 1e-3


def test_files_are_whole_and_config_describes_them(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    report = export_onnx(write_checkpoint(tmp_path / "checkpoint"), folder)

    names = {"image.onnx", "text.onnx", "text.weights", "tokenizer.json", "config.json"}
    assert {path.name for path in folder.iterdir()} == names
    config = json.loads((folder / "config.json").read_text())
    assert config["image"] == {"size": 32, "resize": "squash", "interpolation": "bicubic"}
    assert (config["name"], config["dim"], config["text"]) == ("small", 64, {"max_tokens": 12})
    assert report.size_bytes == sum((folder / n).stat().st_size for n in names - {"config.json"})
    assert OnnxEncoder(folder).verify() == []


def test_int8_halves_what_float16_takes(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    small = export_onnx(checkpoint, tmp_path / "int8")
    large = export_onnx(checkpoint, tmp_path / "half", int8=False)

    weights = 2 * 64 * (3 * 64 + 64 + 2 * 128) + 64 * (64 + 128) + 128 * 64
    scales = 2 * weights // GROUP
    saved = large.text_bytes - small.text_bytes
    assert saved == pytest.approx(weights - scales, rel=0.15)  # the nodes that widen take some
    assert large.text_cosine_error < small.text_cosine_error


def test_export_replaces_an_older_model_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "model"
    export_onnx(write_checkpoint(tmp_path / "one", seed=1), folder)
    before = OnnxEncoder(folder).fingerprint
    (folder / "MODEL_CARD.md").write_text("by hand")
    export_onnx(write_checkpoint(tmp_path / "two", seed=2), folder)

    assert OnnxEncoder(folder).fingerprint != before
    assert OnnxEncoder(folder).verify() == []
    assert (folder / "MODEL_CARD.md").read_text() == "by hand"
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_export_that_differs_from_torch_raises_and_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, folder = write_checkpoint(tmp_path / "checkpoint"), tmp_path / "out" / "model"
    export_onnx(checkpoint, folder)
    before = OnnxEncoder(folder).fingerprint
    monkeypatch.setattr("retriever.export.MAX_COSINE_ERROR", 1e-9)

    with pytest.raises(EncoderError, match=r"tower differs from torch by .* in cosine"):
        export_onnx(checkpoint, folder)

    assert OnnxEncoder(folder).fingerprint == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_folder_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match=re.escape(str(tmp_path))):
        export_onnx(tmp_path, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_int8_of_hand_worked_rows() -> None:
    values = np.array([[127.0, -63.5, 0.0], [0.0, 0.0, 0.0]], np.float32)
    whole, scales = _to_int8(values)
    np.testing.assert_array_equal(whole, [[127, -64, 0], [0, 0, 0]])
    assert scales[0, 0] == 1.0
    assert scales[1, 0] > 0


def test_int8_is_within_half_a_step_of_the_weights() -> None:
    values = np.random.default_rng(0).normal(size=(50, 64)).astype(np.float32)
    whole, scales = _to_int8(values)
    # Rounding moves a weight by half a step at most; the scale itself is rounded to 11 bits.
    allowed = scales.astype(np.float32) * (0.5 + 127 * 2**-11)
    assert (np.abs(whole * scales.astype(np.float32) - values) <= allowed).all()


def test_a_convolution_of_one_point_is_stored_as_int8_and_others_as_float16(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    kernels = {
        "point": rng.normal(size=(LARGE_KERNEL // 160, 160, 1, 1)).astype(np.float32),
        "square": rng.normal(size=(32, LARGE_KERNEL // 160, 3, 3)).astype(np.float32),
        "depthwise": rng.normal(size=(512, 1, 3, 3)).astype(np.float32),
    }
    pixels = rng.normal(size=(1, 160, 6, 5)).astype(np.float32)
    wide = helper.make_node("Concat", ["squared"] * 16, ["wide"], axis=1)
    nodes = [
        helper.make_node("Conv", ["pixels", "point"], ["points"]),
        helper.make_node("Conv", ["points", "square"], ["squared"]),
        wide,
        helper.make_node("Conv", ["wide", "depthwise"], ["embeddings"], group=512),
    ]
    graph = helper.make_graph(
        nodes,
        "tower",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, pixels.shape)],
        [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, (1, 512, 2, 1))],
        [numpy_helper.from_array(kernel, name) for name, kernel in kernels.items()],
    )
    path = tmp_path / "tower.onnx"
    opset = helper.make_opsetid("", OPSET)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=9), path)

    def run() -> np.ndarray:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return session.run(None, {"pixels": pixels})[0]

    before, size = run(), path.stat().st_size
    compact(path, int8=True)
    stored = {one.name: one.data_type for one in onnx.load(path).graph.initializer}
    assert stored["point.int8"] == TensorProto.INT8
    assert stored["square.half"] == stored["depthwise.half"] == TensorProto.FLOAT16
    after = run()
    assert np.abs(after - before).max() < 0.02 * np.abs(before).max()
    assert path.stat().st_size < 0.5 * size
    openvino = pytest.importorskip("openvino")
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    other = openvino.Core().compile_model(path, "CPU", settings)({"pixels": pixels})[0]
    np.testing.assert_allclose(other, after, atol=1e-4 * np.abs(after).max())
