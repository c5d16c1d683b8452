"""Many inputs run in lanes, in whichever engine is there, and come out as single ones do."""

import json
import os
import shutil
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from retriever import encoders, engines
from retriever.encoders import OnnxEncoder, load_encoder
from retriever.engines import VARIABLE, Lanes, files_beside, wanted_engine
from retriever.errors import EncoderError, UsageError
from retriever.machine import cores
from retriever.models import MINI_FOLDER

OPENVINO = pytest.mark.skipif(find_spec("openvino") is None, reason="needs the extra openvino")
TOWER = MINI_FOLDER / "image.onnx"


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """(40, 256, 256, 3): noise, smooth and coarse."""
    rng = np.random.default_rng(0)
    side_of_mini = load_encoder().image_size
    made = [
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).resize(
            (side_of_mini, side_of_mini)
        )
        for side in (2, 5, 14, 60, 256) * 8
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


def has_bfloat16() -> bool:
    """Whether OpenVINO multiplies bfloat16 on this processor."""
    import openvino  # type: ignore[import-not-found, import-untyped, unused-ignore]

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


# ── The same rows ────────────────────────────────────────────────────────────────────────────────

# Cosines in float32, and in bfloat16 as the tower of mini has them for noise.
LEAST = {"onnxruntime": 0.999999, "openvino": 0.999999, "openvino-bf16": 0.93, "auto": 0.999999}


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
    least = 0.9998 if engine == "openvino" and has_bfloat16() else 0.999999
    assert ((encoder.encode_texts(texts) * expected).sum(axis=1) >= least).all()


@OPENVINO
def test_texts_that_an_engine_computes_as_something_else_are_left_to_onnx_runtime(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engines, "least_cosine", lambda *_: 0.5)
    encoder = encoder_with(monkeypatch, "auto")
    texts = [f"{n} dogs" for n in range(200)]
    rows = encoder.encode_texts(texts)
    assert encoder.engine == "ONNX Runtime"
    assert rows[7] @ encoder.encode_texts([texts[7]])[0] >= 0.999999


@OPENVINO
def test_a_tower_that_loses_by_bfloat16_stays_in_float32(
    monkeypatch: pytest.MonkeyPatch, pixels: np.ndarray
) -> None:
    encoder = encoder_with(monkeypatch, "openvino")
    encoder.encode_images(list(pixels))
    assert encoder.engine == "OpenVINO (float32)"


@OPENVINO
def test_the_engines_of_both_towers_are_named_where_they_differ(
    monkeypatch: pytest.MonkeyPatch, pixels: np.ndarray
) -> None:
    encoder = encoder_with(monkeypatch, "openvino")
    assert encoder.engine == "ONNX Runtime"
    encoder.encode_images(list(pixels[:2]))
    assert encoder.engine == "OpenVINO (float32)"
    encoder.encode_texts(["a dog"])
    assert encoder.engine == "OpenVINO (float32) for pictures, ONNX Runtime for texts"
    encoder.encode_texts(["a dog", "a cat"])
    if has_bfloat16():
        assert encoder.engine == "OpenVINO (float32) for pictures, OpenVINO (bfloat16) for texts"
    else:
        assert encoder.engine == "OpenVINO (float32)"


@OPENVINO
def test_towers_that_stay_are_tried_as_well_where_openvino_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, pixels: np.ndarray
) -> None:
    monkeypatch.setattr(engines, "least_cosine", lambda *_: 0.5)
    encoder = encoder_with(monkeypatch, "openvino")
    encoder.stay()
    with pytest.raises(EncoderError, match="something else"):
        encoder.encode_texts(["a dog"])
    with pytest.raises(EncoderError, match="something else"):
        encoder.encode_images([pixels[0]])


@OPENVINO
def test_an_engine_that_computes_something_else_is_not_used(
    monkeypatch: pytest.MonkeyPatch, pixels: np.ndarray, expected: np.ndarray
) -> None:
    trial = {"pixels": pixels[:2]}, expected[1::-1]
    monkeypatch.setenv(VARIABLE, "auto")
    assert Lanes(TOWER, trial).engine == "ONNX Runtime"
    monkeypatch.setenv(VARIABLE, "openvino")
    with pytest.raises(RuntimeError, match=r"something else than .*image\.onnx says"):
        Lanes(TOWER, trial)


# ── Which engine, and when ───────────────────────────────────────────────────────────────────────


def test_a_query_and_a_few_pictures_start_no_other_engine(
    monkeypatch: pytest.MonkeyPatch, pixels: np.ndarray
) -> None:
    def refuse(*_: object, **__: object) -> None:
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
    assert Lanes(TOWER).count == cores() >= 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_lanes_go_on_in_a_child() -> None:
    code = (
        "import os, sys, signal; from retriever.engines import Lanes\n"
        "lanes = Lanes(__import__('pathlib').Path(sys.argv[1]), None, 1)\n"
        "assert lanes.map(abs, [-1, -2]) == [1, 2]\n"
        "if child := os.fork():\n"
        "    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "signal.alarm(30)\n"
        "os._exit(lanes.map(abs, [-3, -4]) != [3, 4])\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(MINI_FOLDER / "text.onnx")]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1])


# ── Weights beside a tower ───────────────────────────────────────────────────────────────────────


def message(*fields: tuple[int, bytes]) -> bytes:
    """Fields with a length, below 128, as protobuf writes them."""
    return b"".join(bytes([number << 3 | 2, len(one)]) + one for number, one in fields)


def model_with(*external: tuple[int, bytes]) -> bytes:
    tensor = message((8, b"w"), (13, message(*external)))
    return message((7, message((5, tensor))))


def test_files_of_weights_are_named_as_the_tower_names_them() -> None:
    assert files_beside((MINI_FOLDER / "text.onnx").read_bytes()) == {"text.weights"}
    assert files_beside(TOWER.read_bytes()) == set()
    assert files_beside(model_with((1, b"location"), (2, b"a.bin"))) == {"a.bin"}
    assert files_beside(model_with((1, b"offset"), (2, b"0"))) == set()


@pytest.mark.parametrize(
    "fields",
    [
        [(2, b"b.bin"), (1, b"location")],
        [(1, b"location"), (2, b"text.weights"), (2, b"b.bin")],
        [(1, b"offset"), (1, b"location"), (2, b"b.bin")],
    ],
)
def test_no_order_of_fields_hides_a_file(fields: list[tuple[int, bytes]]) -> None:
    assert "b.bin" in files_beside(model_with(*fields))


def test_tensors_inside_nodes_are_looked_at() -> None:
    tensor = message((13, message((1, b"location"), (2, b"c.bin"))))
    branch = message((1, message((5, message((5, tensor))))))
    assert files_beside(message((7, message((1, message((5, message((6, branch))))))))) == {"c.bin"}


@pytest.mark.parametrize("contents", [b"no tower", b"\x3a\x7f", b"\xff" * 20, b"\x3b"])
def test_what_is_no_tower_names_no_files(contents: bytes) -> None:
    with pytest.raises(ValueError, match="no ONNX file"):
        files_beside(contents)


ALL_ENGINES = ["onnxruntime", pytest.param("openvino", marks=OPENVINO)]


@pytest.mark.parametrize("engine", ALL_ENGINES)
def test_weights_that_are_not_described_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: str
) -> None:
    monkeypatch.setenv(VARIABLE, engine)
    folder = Path(shutil.copytree(MINI_FOLDER, tmp_path / "model"))
    tower = (folder / "text.onnx").read_bytes().replace(b"text.weights", b"data.weights")
    (folder / "text.onnx").write_bytes(tower)
    (folder / "text.weights").rename(folder / "data.weights")
    config = json.loads((folder / "config.json").read_text())
    config["files"]["text.onnx"] = encoders.digest(tower)
    for extra in ({}, {"data.weights": encoders.digest(b"")}):
        config["files"] |= extra
        (folder / "config.json").write_text(json.dumps(config))
        for texts in (["a dog"], ["a dog", "two dogs"]):
            with pytest.raises(EncoderError, match=r"has weights in data\.weights"):
                OnnxEncoder(folder).encode_texts(texts)


@pytest.mark.parametrize("engine", ALL_ENGINES)
def test_a_model_of_links_to_its_files_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: str
) -> None:
    monkeypatch.setenv(VARIABLE, engine)
    for path in MINI_FOLDER.iterdir():
        if path.is_file():
            (tmp_path / path.name).symlink_to(path)
    encoder = OnnxEncoder(tmp_path)
    rows = encoder.encode_texts(["a dog"]), encoder.encode_texts(["a dog", "a cat"])[:1]
    if engine == "openvino" and has_bfloat16():
        assert (rows[0] * rows[1]).sum() >= engines.NEAR
    else:
        np.testing.assert_allclose(*rows, atol=1e-5)


def test_an_encoder_that_stays_gives_the_same_rows() -> None:
    once, staying = OnnxEncoder(MINI_FOLDER), OnnxEncoder(MINI_FOLDER)
    staying.stay()
    for text in ("a red square", "two dogs run on the beach"):
        assert staying.encode_texts([text]) == pytest.approx(once.encode_texts([text]), abs=1e-6)
    assert staying._lanes.keys() == {"text"}
    assert not once._lanes
