"""Many inputs run in lanes, in whichever engine is there, and come out as single ones do."""

import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from retriever import encoders, engines
from retriever.encoders import OnnxEncoder, load_encoder
from retriever.engines import VARIABLE, Lanes, usable_cores, wanted_engine
from retriever.errors import EncoderError, UsageError
from retriever.models import MINI_FOLDER

OPENVINO = pytest.mark.skipif(find_spec("openvino") is None, reason="needs the extra openvino")
TOWER = MINI_FOLDER / "image.onnx"


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """(40, 224, 224, 3): noise, smooth and coarse."""
    rng = np.random.default_rng(0)
    made = [
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).resize((224, 224))
        for side in (2, 5, 14, 60, 224) * 8
    ]
    return np.stack([np.asarray(one) for one in made])


@pytest.fixture(scope="module")
def expected(pixels: np.ndarray) -> np.ndarray:
    """What single queries answer."""
    encoder = load_encoder(threads=1)
    return np.concatenate([encoder.encode_images([one]) for one in pixels])


def encoder_with(
    monkeypatch: pytest.MonkeyPatch, engine: str, *, threads: int | None = 2
) -> OnnxEncoder:
    monkeypatch.setenv(VARIABLE, engine)
    return OnnxEncoder(MINI_FOLDER, threads=threads)


# ── The same rows ────────────────────────────────────────────────────────────────────────────────

# Cosines in float32, and in bfloat16 as the tower of mini has them for noise.
LEAST = {"onnxruntime": 0.999999, "openvino": 0.999999, "openvino-bf16": 0.95, "auto": 0.999999}


@pytest.mark.parametrize(
    "engine",
    ["onnxruntime", *(pytest.param(one, marks=OPENVINO) for one in LEAST if one != "onnxruntime")],
)
def test_many_pictures_answer_in_their_order_what_single_ones_do(
    monkeypatch: pytest.MonkeyPatch, pixels: np.ndarray, expected: np.ndarray, engine: str
) -> None:
    encoder = encoder_with(monkeypatch, engine)
    cosines = encoder.encode_images(list(pixels)) @ expected.T
    assert (np.diag(cosines) >= LEAST[engine]).all()
    assert (cosines.argmax(axis=1) == np.arange(len(pixels))).all()


@pytest.mark.parametrize("engine", ["onnxruntime", pytest.param("openvino", marks=OPENVINO)])
def test_many_captions_answer_in_their_order_what_single_ones_do(
    monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    words = ["a dog", "two people on a beach at sunset", "red", "the old stone bridge " * 9]
    texts = [f"{words[n % 4]} {n}" for n in range(37)]
    expected = np.concatenate([load_encoder(threads=1).encode_texts([text]) for text in texts])
    encoder = encoder_with(monkeypatch, engine)
    assert ((encoder.encode_texts(texts) * expected).sum(axis=1) >= 0.999999).all()


@OPENVINO
def test_a_tower_that_loses_by_bfloat16_stays_in_float32(
    monkeypatch: pytest.MonkeyPatch, pixels: np.ndarray
) -> None:
    encoder = encoder_with(monkeypatch, "openvino")
    encoder.encode_images(list(pixels))
    assert encoder.engine == "OpenVINO (float32)"


# ── Which engine, and when ───────────────────────────────────────────────────────────────────────


def test_a_query_and_a_few_pictures_start_no_other_engine(
    monkeypatch: pytest.MonkeyPatch, pixels: np.ndarray
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("not for a few")

    encoder = encoder_with(monkeypatch, "auto")
    monkeypatch.setattr(engines, "Lanes", refuse)
    encoder.encode_images(list(pixels[:1]))
    encoder.encode_images(list(pixels[: encoders.PATIENCE["image"]]))
    assert encoder.engine == "ONNX Runtime"
    with pytest.raises(EncoderError, match="not for a few"):
        encoder.encode_images(list(pixels[:2]))


def test_the_weights_of_a_query_leave_the_memory_when_lanes_have_them(
    monkeypatch: pytest.MonkeyPatch, pixels: np.ndarray
) -> None:
    encoder = encoder_with(monkeypatch, "onnxruntime")
    encoder.encode_images(list(pixels[:1]))
    assert "_image_session" in vars(encoder)
    encoder.encode_images(list(pixels[:2]))
    assert "_image_session" not in vars(encoder)


def test_without_openvino_onnx_runtime_does_it(
    monkeypatch: pytest.MonkeyPatch, pixels: np.ndarray, expected: np.ndarray
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)  # importing it raises ImportError
    encoder = encoder_with(monkeypatch, "auto")
    rows = encoder.encode_images(list(pixels))
    assert encoder.engine == "ONNX Runtime"
    np.testing.assert_allclose(rows, expected, atol=1e-5)
    encoder = encoder_with(monkeypatch, "openvino")
    with pytest.raises(EncoderError, match="openvino"):
        encoder.encode_images(list(pixels[:2]))


def test_an_engine_that_does_not_exist_is_wrong_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "tensorflow")
    with pytest.raises(UsageError, match=r"tensorflow: choose one of auto, onnxruntime, openvino"):
        wanted_engine()
    monkeypatch.setenv(VARIABLE, "")
    assert wanted_engine() == "auto"


@pytest.mark.parametrize("engine", ["auto", "onnxruntime"])
def test_a_file_that_is_no_tower_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pixels: np.ndarray, engine: str
) -> None:
    monkeypatch.setenv(VARIABLE, engine)
    (tmp_path / "image.onnx").write_bytes(b"no tower")
    with pytest.raises(Exception, match=r"image\.onnx|protobuf|parse"):
        Lanes(tmp_path / "image.onnx", ({"pixels": pixels[:1]}, np.ones((1, 384), np.float32)))


# ── Lanes ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def lanes(pixels: np.ndarray, expected: np.ndarray) -> Lanes:
    return Lanes(TOWER, ({"pixels": pixels[:2]}, expected[:2]), 3)


def test_lanes_run_side_by_side_and_answer_in_order(lanes: Lanes) -> None:
    together = threading.Barrier(3, timeout=30)

    def wait(part: int) -> int:
        together.wait()
        return part * part

    assert lanes.map(wait, range(9)) == [n * n for n in range(9)]


def test_the_first_fault_in_a_lane_is_raised(lanes: Lanes) -> None:
    def fail(part: int) -> int:
        if part % 2:
            raise ValueError(str(part))
        return part

    with pytest.raises(ValueError, match="1"):
        lanes.map(fail, range(6))
    assert lanes.map(abs, [-1]) == [1]


def test_there_is_a_lane_for_each_core() -> None:
    assert Lanes(TOWER).count == usable_cores() >= 1
