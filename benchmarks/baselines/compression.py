"""A model for limited computing: int8 arithmetic and pruning of the encoder that is shipped.

Its ONNX files are changed as they are, without training. Int8: weights and activations of the image
tower, by ONNX Runtime, with ranges from training pictures. Magnitude pruning sets the smallest
weights of each matrix to zero (Han et al. 2015, arXiv:1506.02626), which makes files smaller when
they are packed and arithmetic no faster. Structured pruning takes whole channels out: those of each
inverted bottleneck whose weights are smallest (Li et al. 2017, arXiv:1608.08710). What embeddings
lose in direction by it a linear map gets back in part, fitted by least squares to what the whole
tower gives for training pictures.
"""

import json
import shutil
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxruntime import quantization

from retriever.encoders import OnnxEncoder, digest

Array = NDArray[Any]
SMALL = 4096  # tensors with fewer numbers stay as they are
_BATCH = 8


def unfolded(path: Path, to: Path) -> Path:
    """The same ONNX file with plain float32 weights, as ONNX Runtime runs it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    whole = to.with_name(f"whole-{to.name}")
    onnx.save(onnx.load(path), whole)  # weights in files beside it are in it now
    options.optimized_model_filepath = str(to)
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    onnxruntime.InferenceSession(str(whole), options, providers=["CPUExecutionProvider"])
    whole.unlink()
    return to


def run(path: Path, pixels: Callable[[slice], Array], count: int) -> tuple[Array, float]:
    """(count, d) unit rows, and CPU milliseconds a picture; on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    rows, spent = [], 0.0
    for start in range(0, count, _BATCH):
        batch = pixels(slice(start, start + _BATCH))
        began = time.process_time()
        rows.append(session.run(None, {name: batch})[0])
        spent += time.process_time() - began
    return np.concatenate(rows), 1000 * spent / count


def packed_mb(path: Path) -> float:
    """Packed size of its weights as 16-bit numbers, or int8 where they are, in 10^6 bytes."""
    total = 0
    for tensor in onnx.load(path).graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32:
            values = values.astype(np.float16)
        total += len(zlib.compress(values.tobytes(), 6))
    return total / 1e6


def prune_weights(path: Path, to: Path, share: float) -> Path:
    """The smallest `share` of the weights of each matrix and convolution set to zero.

    Depthwise convolutions, which have few weights and need them all, stay as they are.
    """
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        is_depthwise = values.ndim == 4 and values.shape[1] == 1
        if values.dtype != np.float32 or values.size < SMALL or values.ndim < 2 or is_depthwise:
            continue
        limit = np.quantile(np.abs(values), share)
        pruned = np.where(np.abs(values) < limit, np.float32(0), values)
        tensor.CopyFrom(numpy_helper.from_array(pruned, tensor.name))
    onnx.save(model, to)
    return to


def prune_channels(path: Path, to: Path, share: float, *, multiple: int = 16) -> Path:
    """Without that share of the channels of each inverted bottleneck.

    One is a 1 × 1 convolution, a depthwise one, and another 1 × 1 convolution; a channel is worth
    the product of what the three give it. What it would give without any input, from biases alone,
    is added to the last bias.

    Raises:
        ValueError: the network has no inverted bottlenecks.
    """
    model = onnx.load(path)
    tensors = {one.name: one for one in model.graph.initializer}
    made_by = {name: node for node in model.graph.node for name in node.output}
    used_by: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            used_by.setdefault(name, []).append(node)

    def before(name: str) -> onnx.NodeProto | None:
        """The convolution that a value comes from, through what acts on each number by itself."""
        node = made_by.get(name)
        while node is not None and node.op_type in ("Clip", "Relu", "Pad"):
            node = made_by.get(node.input[0])
        return node

    def after(name: str) -> onnx.NodeProto | None:
        while len(users := used_by.get(name, [])) == 1:
            if users[0].op_type not in ("Clip", "Relu"):
                return users[0]
            name = users[0].output[0]
        return None

    found = 0
    for middle in model.graph.node:
        groups = next((a.i for a in middle.attribute if a.name == "group"), 1)
        if middle.op_type != "Conv" or groups == 1:
            continue
        first, last = before(middle.input[0]), after(middle.output[0])
        if first is None or last is None or {first.op_type, last.op_type} != {"Conv"}:
            continue
        nodes = first, middle, last
        weights = [numpy_helper.to_array(tensors[node.input[1]]) for node in nodes]
        if len(weights[0]) != groups or weights[2].shape[1] != groups or weights[0].shape[2] != 1:
            continue
        norms = [np.linalg.norm(w.reshape(groups, -1), axis=1) for w in weights[:2]]
        norms.append(np.linalg.norm(weights[2].transpose(1, 0, 2, 3).reshape(groups, -1), axis=1))
        # Kernels work on so many channels at a time, and are slower if some are left over.
        count = max(round(groups * (1 - share) / multiple), 1) * multiple
        worth = np.prod(norms, axis=0)
        kept = np.sort(np.argsort(-worth)[:count])
        out = np.setdiff1d(np.arange(groups), kept)
        if all(len(node.input) > 2 for node in nodes):
            biases = [numpy_helper.to_array(tensors[node.input[2]]) for node in nodes]
            constant = biases[0][out].clip(0, 6)
            constant = (constant * weights[1][out].sum(axis=(1, 2, 3)) + biases[1][out]).clip(0, 6)
            shift = weights[2][:, out, 0, 0] @ constant
            _replace(tensors[last.input[2]], (biases[2] + shift).astype(np.float32))
        _replace(tensors[first.input[1]], weights[0][kept])
        _replace(tensors[middle.input[1]], weights[1][kept])
        _replace(tensors[last.input[1]], weights[2][:, kept])
        for node in (first, middle):
            if len(node.input) > 2:
                _replace(
                    tensors[node.input[2]], numpy_helper.to_array(tensors[node.input[2]])[kept]
                )
        for attribute in middle.attribute:
            if attribute.name == "group":
                attribute.i = len(kept)
        found += 1
    if not found:
        raise ValueError(f"{path.name} has no inverted bottlenecks")
    del model.graph.value_info[:]
    onnx.save(model, to)
    return to


def _replace(tensor: onnx.TensorProto, values: Array) -> None:
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))


def quantise(path: Path, to: Path, batches: Sequence[Array]) -> Path:
    """Weights and activations as int8, with the ranges that some pictures show."""
    name = onnx.load(path).graph.input[0].name

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> dict[str, Array] | None:
            batch = next(self.left, None)
            return None if batch is None else {name: batch}

    quantization.quantize_static(
        path,
        to,
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        # Unsigned activations: what is clipped to [0, 6] keeps all of its 256 steps.
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        op_types_to_quantize=["Conv"],
    )
    return to


def linear_map(rows: Array, wanted: Array, ridge: float = 1e-3) -> Array:
    """(d, d) by which `rows` come nearest to `wanted`, both (n, d), drawn towards the identity."""
    gram = rows.T @ rows
    slack = ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
    return np.linalg.solve(gram + slack, rows.T @ wanted + slack)


def with_text_tower(encoder: OnnxEncoder, to: Path, share: float) -> OnnxEncoder:
    """The same encoder with the smallest weights of its text tower set to zero."""
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    plain = unfolded(encoder.folder / "text.onnx", to / "plain.onnx")
    prune_weights(plain, to / "text.onnx", share)
    plain.unlink()
    config = json.loads((encoder.folder / "config.json").read_text(encoding="utf-8"))
    for file in encoder.folder.iterdir():
        if file.name in config["files"] and file.name not in ("text.onnx", "text.weights"):
            shutil.copyfile(file, to / file.name)
    files = (file for file in config["files"] if file != "text.weights")
    config["files"] = {file: digest((to / file).read_bytes()) for file in files}
    config.pop("stands_for", None)
    (to / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return OnnxEncoder(to, device="cpu")


@dataclass(frozen=True, slots=True, eq=False)
class Variant:
    """A changed image tower, as it was measured.

    rows: (n, d) of test pictures. ms: CPU time a picture, one thread. mb: packed weights.
    """

    name: str
    rows: Array
    ms: float
    mb: float


def image_variants(
    encoder: OnnxEncoder,
    train: Callable[[slice], Array],
    test: Callable[[slice], Array],
    counts: tuple[int, int],
    folder: Path,
    say: Callable[[str], None],
    *,
    shares: Sequence[float] = (0.2, 0.3, 0.5),
    channels: Sequence[float] = (0.05, 0.1, 0.2),
) -> list[Variant]:
    """The image tower as it is, in int8, and pruned in several degrees.

    Args:
        encoder: the one that is shipped.
        train: (b, s, s, 3) uint8 pixels of training pictures, by place.
        test: the same of test pictures.
        counts: pictures to fit with, and to measure with.
        folder: for ONNX files.
        say: gets a line each.
        shares: of weights set to zero.
        channels: shares of channels taken out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plain = unfolded(encoder.folder / "image.onnx", folder / "plain.onnx")
    wanted, _ = run(plain, train, counts[0])
    variants: list[Variant] = []

    def add(name: str, path: Path, correction: Array | None = None, extra_mb: float = 0.0) -> None:
        rows, ms = run(path, test, counts[1])
        if correction is not None:
            rows = rows @ correction
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        variants.append(Variant(name, rows.astype(np.float32), ms, packed_mb(path) + extra_mb))
        say(f"{name}: {ms:.1f} ms a picture, {variants[-1].mb:.1f} MB")

    add("as shipped", plain)
    batches = [
        train(slice(start, start + _BATCH)) for start in range(0, min(counts[0], 96), _BATCH)
    ]
    add("int8 convolutions", quantise(plain, folder / "int8.onnx", batches))
    for share in shares:
        path = prune_weights(plain, folder / "weights.onnx", share)
        add(f"{100 * share:.0f} % of weights zero", path)
    for share in channels:
        path = prune_channels(plain, folder / "channels.onnx", share)
        name = f"{100 * share:.0f} % of channels out"
        add(name, path)
        fitted = linear_map(run(path, train, counts[0])[0], wanted)
        add(f"{name}, refitted", path, fitted, 2 * fitted.size / 1e6)
    return variants
