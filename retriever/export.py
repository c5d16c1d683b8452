"""From a checkpoint of ours to two ONNX files that run without torch.

Weights are stored small and computed with in float32: the files decide how large an installation
is, while integer arithmetic would cost accuracy. Measured with MiniLM-L6 on 640 captions: size,
smallest and mean cosine to torch, CPU time of a ten-token query and of 64 captions.

    float32                                   92.6 MB   1.00000  1.00000    5 ms   231 ms
    onnxruntime's dynamic int8 (per channel)  23.6 MB   0.98801  0.99331    2 ms    93 ms
    int8 weights, one scale a channel         23.4 MB   0.99936  0.99963    5 ms   223 ms
    int8 weights, one scale for 64            23.7 MB   0.99966  0.99978    5 ms   230 ms

Ours has a scale for every 32 weights, of matrices and of token vectors: with MiniLM-L6 fine-tuned,
the largest 1 - cosine on 400 captions was 1.7e-4 (64), 1.5e-4 (32) and 1.1e-4 (16: 2.3 MB more).

Dynamic int8 also has one scale for the activations of a whole batch, so that a text's embedding
depends on the texts beside it (by up to 0.027); ours does not.
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from retriever.encoders import CheckpointEncoder, Encoder, OnnxEncoder, digest, first_line
from retriever.errors import EncoderError

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

# Largest 1 - cosine between a row of torch and of ONNX Runtime that an export may show.
MAX_COSINE_ERROR = 1e-3
OPSET = 17
INT8_OPSET = 21  # the first in which one node widens weights that share a scale in groups
_FILES = ("image.onnx", "text.onnx", "text.weights", "tokenizer.json")
# Weights that share a scale, at most; smaller groups cost more scales.
GROUP = 32
# From so many weights on a convolution is stored as int8. In EfficientNet-Lite2 these hold five
# sixths of the weights; the others, in its lower layers, would make its error ten times as large.
LARGE_KERNEL = 80_000
# Below this many values a tensor's size does not matter: biases, norms, constants.
SMALL = 1024
_STORED = (3, 10)  # ONNX's numbers for the types that weights are stored in: int8 and float16


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export wrote, and how far it is from torch (the largest 1 - cosine of any row)."""

    folder: Path
    image_bytes: int
    text_bytes: int
    tokenizer_bytes: int
    image_cosine_error: float
    text_cosine_error: float

    @property
    def size_bytes(self) -> int:
        """Of the two towers and the tokenizer together."""
        return self.image_bytes + self.text_bytes + self.tokenizer_bytes


def export_onnx(
    checkpoint: Path,
    folder: Path,
    *,
    int8: bool = True,
    check: Callable[[Encoder, Encoder], None] | None = None,
) -> ExportReport:
    """Write `image.onnx`, `text.onnx`, `tokenizer.json` and `config.json` for `OnnxEncoder`.

    The weights of the text tower are in `text.weights`: see `lay_apart`.

    Args:
        checkpoint: folder that training wrote.
        folder: made if absent; an older model in it is replaced once the new one is checked, and
            other files stay.
        int8: store matrices and token vectors as int8; else as float16, twice as large.
        check: called with the checkpoint and what was exported; what it raises stops all.

    Returns:
        Sizes, and the error against torch on random pictures and texts.

    Raises:
        EncoderError: the checkpoint cannot be loaded or exported, or the error is above 1e-3;
            nothing is left behind then.
    """
    reference = CheckpointEncoder(checkpoint, device="cpu")
    if reference.config["text"]["tower"] == "gru":
        # torch exports packed sequences only for one fixed batch, and not those sorted on the way.
        raise EncoderError(
            f"{checkpoint} cannot be exported: a GRU runs in torch only; train a transformer or "
            "static text tower"
        )
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        _write(reference, temporary, folder.name, int8=int8)
        report = _checked(reference, temporary, folder)
        if check is not None:
            check(reference, OnnxEncoder(temporary, device="cpu"))
        folder.mkdir(exist_ok=True)
        # The description comes last: cut off before, what lies there does not match its digests
        # and is refused rather than mixed.
        for file in (*_FILES, "config.json"):
            (temporary / file).replace(folder / file)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return report


def _write(encoder: CheckpointEncoder, folder: Path, name: str, *, int8: bool) -> None:
    """The four files, unchecked."""
    import torch
    from tokenizers import Tokenizer

    model, _, _ = encoder.loaded
    size = encoder.image_size
    pixels = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    length = min(5, encoder.max_text_tokens)
    ids = torch.ones(2, length, dtype=torch.int64)

    class Images(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.model.encode_images(pixels)

    class Texts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.model.encode_texts(input_ids, attention_mask)

    towers: tuple[tuple[str, torch.nn.Module, dict[str, torch.Tensor], dict[int, str]], ...] = (
        ("image.onnx", Images(), {"pixels": pixels}, {0: "batch"}),
        (
            "text.onnx",
            Texts(),
            {"input_ids": ids, "attention_mask": ids},
            {0: "batch", 1: "tokens"},
        ),
    )
    for file, tower, inputs, axes in towers:
        export_tower(tower.eval(), inputs, axes, folder / file)
        compact(folder / file, int8=int8)
    # One text is asked from a shell far more often than one picture.
    lay_apart(folder / "text.onnx")
    tokenizer = Tokenizer.from_file(str(encoder.folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    image, text = encoder.config["image"], encoder.config["text"]
    config = {
        "name": name,
        "dim": encoder.dim,
        "image": {
            "size": size,
            "resize": image["resize"],
            "interpolation": image["interpolation"],
        },
        "text": {"max_tokens": text["max_tokens"]},
        "files": {file: digest((folder / file).read_bytes()) for file in _FILES},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def export_tower(tower: Any, inputs: Mapping[str, Any], axes: dict[int, str], path: Path) -> None:
    """Write a torch module as ONNX, with one output, `embeddings`.

    Args:
        tower: in eval mode.
        inputs: an example of each, by name.
        axes: names of the axes of every input that may have another length than in the example.
        path: of the file.

    Raises:
        EncoderError: the exporter does not know how.
    """
    import torch

    names = list(inputs)
    with _quiet():
        try:
            # The exporter that torch prefers now takes five times as long and fixes the batch of a
            # text tower at that of the example, whatever it is told about dynamic shapes.
            torch.onnx.export(
                tower,
                tuple(inputs.values()),
                str(path),
                dynamo=False,
                opset_version=OPSET,
                input_names=names,
                output_names=["embeddings"],
                dynamic_axes=dict.fromkeys(names, axes) | {"embeddings": {0: "batch"}},
            )
        except Exception as exc:  # torch's own error types differ by operator
            raise EncoderError(f"{path.name} cannot be exported: {first_line(exc)}") from exc


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings: that it is the old one, and what becomes a constant."""
    from torch.jit import TracerWarning  # type: ignore[attr-defined]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", TracerWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield


# ── smaller weights ────────────────────────────────────────────────────────────────────────────


def compact(path: Path, *, int8: bool) -> None:
    """Store the large float32 tensors of an ONNX file smaller, and widen them in the graph.

    Where ONNX Runtime folds the widening as it loads the file, a run costs what it did before; only
    token vectors stay int8 in memory and are widened when they are looked up.
    """
    import onnx
    from onnx import numpy_helper, version_converter

    model = onnx.load(path)
    if int8:
        model = version_converter.convert_version(model, INT8_OPSET)
        del model.graph.value_info[:]  # shapes that it worked out, and that nobody needs
    graph = model.graph
    users: dict[str, list[tuple[NodeProto, int]]] = {}
    for node in graph.node:
        for place, name in enumerate(node.input):
            users.setdefault(name, []).append((node, place))
    for tensor in list(graph.initializer):
        values = numpy_helper.to_array(tensor)
        if values.dtype != np.float32 or values.size < SMALL:
            continue
        (node, place), *others = users[tensor.name]
        kind = (node.op_type, place, values.ndim) if int8 and not others else None
        if kind == ("Gather", 0, 2):
            tensors, nodes = _quantised_rows(values, node)
            graph.node.remove(node)
        elif kind in (("MatMul", 1, 2), ("Gemm", 1, 2)):
            # Each output is a sum over the inputs, which must be the last axis to be grouped.
            is_outputs_first = any(a.name == "transB" and a.i for a in node.attribute)
            tensors, nodes = _quantised_matrix(tensor.name, values, is_outputs_first)
        elif kind == ("Conv", 1, 4) and values.shape[2:] == (1, 1) and values.size >= LARGE_KERNEL:
            # A convolution of one point is a matrix product.
            tensors, nodes = _quantised_matrix(tensor.name, values, True)
        elif np.abs(values).max() < np.finfo(np.float16).max:
            tensors, nodes = _halved(tensor.name, values)
        else:
            continue
        graph.initializer.remove(tensor)
        graph.initializer.extend(tensors)
        _insert_before_use(graph, nodes)
    onnx.checker.check_model(model)
    onnx.save(model, path)


Parts = tuple[list["TensorProto"], list["NodeProto"]]


def _halved(name: str, values: NDArray[np.float32]) -> Parts:
    from onnx import TensorProto, helper, numpy_helper

    stored = numpy_helper.from_array(values.astype(np.float16), f"{name}.half")
    return [stored], [helper.make_node("Cast", [stored.name], [name], to=TensorProto.FLOAT)]


def _quantised_matrix(name: str, values: NDArray[np.float32], is_outputs_first: bool) -> Parts:
    """int8 weights with one float16 scale for each `GROUP` inputs of an output.

    Args:
        name: of the matrix, or of the kernel of a convolution of one point.
        values: of two axes that are longer than 1.
        is_outputs_first: whether the second of these is the one that is summed over.
    """
    from onnx import TensorProto, helper, numpy_helper

    flat = values.reshape(len(values), -1)
    matrix = flat if is_outputs_first else flat.T
    outputs, inputs = matrix.shape
    group = _group(inputs)
    whole, scales = _to_int8(matrix.reshape(outputs, inputs // group, group))
    if not is_outputs_first:  # stored as they are multiplied: nothing is transposed at each run
        whole = np.ascontiguousarray(whole.transpose(1, 2, 0))
        scales = np.ascontiguousarray(scales.transpose(1, 2, 0))
    scales = scales.squeeze(1 + is_outputs_first)
    tensors = [
        numpy_helper.from_array(whole.reshape(values.shape[:2]), f"{name}.int8"),
        numpy_helper.from_array(scales, f"{name}.scales"),
    ]
    # The scales are widened first: to multiply in float16 would round once more.
    scale = f"{name}.scale"
    # OpenVINO 2026.4 widens what has more than two dimensions to something else, without a word.
    wide = f"{name}.matrix" if values.ndim > 2 else name
    nodes = [
        helper.make_node("Cast", [tensors[1].name], [scale], to=TensorProto.FLOAT),
        helper.make_node(
            "DequantizeLinear",
            [tensors[0].name, scale],
            [wide],
            axis=int(is_outputs_first),
            block_size=group,
        ),
    ]
    if values.ndim > 2:
        tensors.append(numpy_helper.from_array(np.array(values.shape), f"{name}.shape"))
        nodes.append(helper.make_node("Reshape", [wide, tensors[-1].name], [name]))
    return tensors, nodes


def _group(count: int) -> int:
    """How many of a row of weights share a scale: the most, up to GROUP, that leave none over."""
    return next(size for size in range(min(GROUP, count), 0, -1) if count % size == 0)


def _quantised_rows(values: NDArray[np.float32], gather: "NodeProto") -> Parts:
    """int8 rows of a table, a scale for each `GROUP` values, and the look-up that widens them."""
    from onnx import TensorProto, helper, numpy_helper

    table, indices = gather.input
    (out,) = gather.output
    count, width = values.shape
    group = _group(width)
    whole, scales = _to_int8(values.reshape(count, width // group, group))
    tensors = [
        numpy_helper.from_array(whole, f"{table}.int8"),
        numpy_helper.from_array(scales, f"{table}.scales"),
        numpy_helper.from_array(np.array([width]), f"{table}.width"),
    ]
    parts = ("int8", "wide", "scales", "scale", "scaled", "places", "shape")
    rows, wide, row_scales, scale, scaled, places, shape = (f"{out}.{part}" for part in parts)
    return tensors, [
        helper.make_node("Gather", [tensors[0].name, indices], [rows]),
        helper.make_node("Cast", [rows], [wide], to=TensorProto.FLOAT),
        helper.make_node("Gather", [tensors[1].name, indices], [row_scales]),
        helper.make_node("Cast", [row_scales], [scale], to=TensorProto.FLOAT),
        helper.make_node("Mul", [wide, scale], [scaled]),
        helper.make_node("Shape", [indices], [places]),
        helper.make_node("Concat", [places, tensors[2].name], [shape], axis=0),
        helper.make_node("Reshape", [scaled, shape], [out]),
    ]


def _to_int8(values: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Whole numbers in [-127, 127] and the scale, along the last axis, that gives `values` back."""
    scales = (np.abs(values).max(axis=-1, keepdims=True) / 127).astype(np.float16)
    # A row of zeros, or one too small for float16, must not divide by zero.
    scales = np.maximum(scales, np.finfo(np.float16).smallest_subnormal)
    whole = np.rint(values / scales.astype(np.float32)).clip(-127, 127).astype(np.int8)
    return whole, scales


def lay_apart(path: Path) -> Path:
    """Put the weights of an ONNX file into one beside it, `text.weights`, which can be mapped.

    Weights inside a graph are read, copied and widened by every process that asks one question:
    0.3 s of CPU time with `mini`, for a run of 6 ms. Mapped, of a graph in which nothing else is
    left to fold, loading takes 0.03 s, and the run, which then widens them, 0.02 s.
    """
    import onnx
    import onnxruntime  # type: ignore[import-untyped]
    from onnx import helper

    model = onnx.load(path)
    graph = model.graph
    weights = [one for one in graph.initializer if one.data_type in _STORED]
    others = [one for one in graph.initializer if one.data_type not in _STORED]
    inputs = list(graph.input)
    # What is an input is no constant, and is not folded.
    _replace(graph.initializer, others)
    _replace(
        graph.input,
        [
            *inputs,
            *(helper.make_tensor_value_info(one.name, one.data_type, one.dims) for one in weights),
        ],
    )
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3  # it warns that the result is no longer the file it was
    options.optimized_model_filepath = str(path)
    onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    model = onnx.load(path)
    _replace(model.graph.input, inputs)
    model.graph.initializer.extend(weights)
    _replace(model.opset_import, [one for one in model.opset_import if not one.domain])
    beside = save_apart(model, path, least_bytes=SMALL)
    onnx.checker.check_model(path)
    return beside


def save_apart(model: "ModelProto", path: Path, *, least_bytes: int) -> Path:
    """Save a model with its larger tensors in a file beside it, `text.weights`, which is given."""
    import onnx
    from onnx.external_data_helper import set_external_data

    beside = path.with_suffix(".weights")
    beside.unlink(missing_ok=True)  # would be added to
    # Not by the option of `save`: that fails where the working folder has a file of this name.
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) >= least_bytes:
            set_external_data(tensor, beside.name)
    onnx.save(model, path)
    shutil.copymode(path, beside)  # onnx lets nobody else read it
    return beside


def _replace(several: Any, others: list[Any]) -> None:
    del several[:]
    several.extend(others)


def _insert_before_use(graph: "GraphProto", nodes: list["NodeProto"]) -> None:
    """Put nodes where ONNX wants them: after those that they read, before those that read them."""
    made = {name for node in nodes for name in node.output}
    place = next(i for i, node in enumerate(graph.node) if made & set(node.input))
    for offset, node in enumerate(nodes):
        graph.node.insert(place + offset, node)


# ── the check against torch ────────────────────────────────────────────────────────────────────


def _checked(reference: CheckpointEncoder, written: Path, folder: Path) -> ExportReport:
    """The report on the files in `written`, which will be `folder`."""
    exported = OnnxEncoder(written, device="cpu")
    images, texts = _sample(reference)
    errors = {
        "image": cosine_error(reference.encode_images(images), exported.encode_images(images)),
        "text": cosine_error(reference.encode_texts(texts), exported.encode_texts(texts)),
    }
    for tower, error in errors.items():
        if not error <= MAX_COSINE_ERROR:
            raise EncoderError(
                f"the exported {tower} tower differs from torch by {error:.1e} in cosine, more "
                f"than {MAX_COSINE_ERROR:.0e}"
            )
    size = {file: (written / file).stat().st_size for file in _FILES}
    return ExportReport(
        folder=folder,
        image_bytes=size["image.onnx"],
        text_bytes=size["text.onnx"] + size["text.weights"],
        tokenizer_bytes=size["tokenizer.json"],
        image_cosine_error=errors["image"],
        text_cosine_error=errors["text"],
    )


def _sample(encoder: CheckpointEncoder) -> tuple[list[Image.Image], list[str]]:
    """Pictures of random coloured patches, and texts of 1 to 40 random words of the vocabulary."""
    rng = np.random.default_rng(0)
    words = np.array(sorted(encoder.loaded[1].get_vocab()))
    return patches(), [" ".join(rng.choice(words, count)) for count in range(1, 41)]


def patches() -> list[Image.Image]:
    """Twelve pictures of random coloured patches, the same at each call."""
    rng = np.random.default_rng(0)
    images = []
    for cells in np.tile([2, 3, 5, 8], 3):
        made = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        images.append(made.resize((160, 120), Image.Resampling.BICUBIC))
    return images


def cosine_error(ours: NDArray[Any], theirs: NDArray[Any]) -> float:
    """The largest 1 - cosine between a row of one and the same row of the other."""
    return float(1 - (ours * theirs).sum(axis=1).min())
