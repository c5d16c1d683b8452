"""Thousands of inputs through an ONNX tower: several runs side by side, on one core each.

A query is one input. All cores answer it together, in a session of ONNX Runtime that starts in no
time. Thousands of inputs are done sooner if each core works by itself: nothing waits for the
slowest part of an operation, and a core that a decoder has taken holds up one run, not all of them.
So `Lanes` gives every core runs of a few inputs, small enough for the processor's cache.

With the extra `openvino` installed they run in OpenVINO. Where the processor multiplies bfloat16
(avx512_bf16, AMX) that takes half the time of float32, and costs some towers more than others:
ViTs and text towers keep a cosine of 0.9999 to what they answer in float32, mini's EfficientNet
only one of 0.995, with which R@1 of captions on Flickr8k's test split fell from 36.0 to 35.6. So
each tower shows on its first inputs whether it may run in bfloat16, and else stays in float32; and
one that OpenVINO runs wrongly is left to ONNX Runtime.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from retriever.errors import UsageError

Array = NDArray[Any]
Feed = Mapping[str, Array]
T = TypeVar("T")
R = TypeVar("R")

# "onnxruntime" makes rows as machines without OpenVINO do, "openvino" tells why it cannot run, and
# "openvino-bf16" takes the speed of bfloat16 for what it costs in recall.
VARIABLE = "RETRIEVER_ENGINE"
ENGINES = ("auto", "onnxruntime", "openvino", "openvino-bf16")
# The least cosine between a row in bfloat16 and the same in float32.
NEAR = 0.9998
# And between one of OpenVINO and one of ONNX Runtime, both in float32.
SAME = 0.9999


def wanted_engine() -> str:
    """One of `ENGINES`, as the environment says; raises UsageError if it says something else."""
    wanted = os.environ.get(VARIABLE) or "auto"
    if wanted not in ENGINES:
        raise UsageError(f"{VARIABLE}={wanted}: choose one of {', '.join(ENGINES)}")
    return wanted


def tries_openvino(*, same: bool) -> bool:
    """Whether lanes run in OpenVINO if it can run the tower; see `Lanes` for `same`."""
    wanted = wanted_engine()
    if wanted == "auto":
        return not same and find_spec("openvino") is not None
    return wanted != "onnxruntime"


# Else ONNX Runtime multiplies int8 weights with activations that it rounds to int8 as well, which
# moves rows of `mini` by up to 3e-4 in cosine; widened weights give what torch gives.
KEEP_FLOAT32 = ("session.disable_quant_qdq", "1")


# Parts of an ONNX file that lead to tensors, by the numbers that onnx.proto gives them.
_PARTS: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "external"},
}


def files_beside(contents: bytes) -> set[str]:
    """The files that an ONNX file has its weights in, as it names them; without the package onnx.

    Raises:
        ValueError: it is no ONNX file.
    """
    found: set[str] = set()
    waiting = [("model", 0, len(contents))]
    while waiting:
        kind, start, end = waiting.pop()
        if kind == "external":  # a key and its value; of several the last counts, so all are given
            fields = list(_fields(contents, start, end))
            if any(number == 1 and contents[a:b] == b"location" for number, a, b in fields):
                values = [contents[a:b] for number, a, b in fields if number == 2] or [b""]
                found |= {value.decode("utf-8", "backslashreplace") for value in values}
            continue
        parts = _PARTS[kind]
        waiting += [
            (parts[number], a, b)
            for number, a, b in _fields(contents, start, end)
            # Most parts name no file, and need not be taken apart: 1.3 ms with `mini`, not 6.
            if number in parts and contents.find(b"location", a, b) >= 0
        ]
    return found


def _fields(contents: bytes, place: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, beginning and end of each field with a length in a message of protobuf."""

    def number() -> int:
        nonlocal place
        value = 0
        for shift in range(0, 70, 7):
            byte = contents[place]
            place += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("no ONNX file")

    try:
        while place < end:
            key = number()
            if key & 7 == 2:
                length = number()
                yield key >> 3, place, place + length
                place += length
            elif key & 7 == 0:
                number()
            elif key & 7 in (1, 5):
                place += 8 if key & 7 == 1 else 4
            else:
                raise ValueError("no ONNX file")
    except IndexError:
        place = end + 1
    if place != end:
        raise ValueError("no ONNX file: it is cut off")


class Lanes:
    """One tower in several lanes, a core each; thread-safe.

    After a fork the child has lanes of its own in ONNX Runtime. OpenVINO does not survive a fork:
    a child that uses what its parent has run there waits for ever.

    Args:
        path: the ONNX file.
        trial: some inputs and what they give in float32, (b, d), by which to judge bfloat16; None
            if it is not to be used.
        count: lanes; None is one for each core.
        same: rows as those of a single run, by the same engine, unless another one was asked for.

    Raises:
        UsageError: as `wanted_engine`.
        Exception: the file is no tower, or the engine that was asked for cannot run it; engines
            share no base for what they raise.
    """

    def __init__(
        self,
        path: Path,
        trial: tuple[Feed, Array] | None = None,
        count: int | None = None,
        *,
        same: bool = False,
    ) -> None:
        from retriever.machine import cores

        self.count = count or cores()
        self._run: Callable[[Feed], Array] | None = None
        if tries_openvino(same=same):
            try:
                self._run, self.engine = _openvino(path, trial, self.count)
            except Exception:
                # Built for another machine, without an operation of this tower, or not installed.
                if wanted_engine() != "auto":
                    raise
        if self._run is None:
            # Whoever answers one question at a time is done sooner with two cores: what takes long
            # is to read the weights, and `mini` answers a text in 3.4 ms so instead of 4.7.
            threads = min(2, self.count) if same else 1
            self._run, self.engine = _onnxruntime(path, threads), "ONNX Runtime"
        self._start()
        _lanes.add(self)

    def _start(self) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self._threads = ThreadPoolExecutor(self.count, "lane")

    def run(self, feed: Feed) -> Array:
        """The rows of some inputs, (b, d) float32, the caller's own."""
        assert self._run
        return self._run(feed)

    def map(self, function: Callable[[T], R], parts: Iterable[T]) -> list[R]:
        """`function` of each part in order, in the lanes' threads; raises what it raises first.

        A part that is alone is done in the caller's thread.
        """
        several = list(parts)
        if len(several) < 2:  # nothing to do beside it
            return [function(one) for one in several]
        return list(self._threads.map(function, several))


_lanes: WeakSet[Lanes] = WeakSet()


def _start_again() -> None:
    for lanes in _lanes:
        lanes._start()


if hasattr(os, "register_at_fork"):  # a child has none of its parent's threads
    os.register_at_fork(after_in_child=_start_again)


def _onnxruntime(path: Path, threads: int) -> Callable[[Feed], Array]:
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads  # with 1, a run stays on the thread that called it
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry(*KEEP_FLOAT32)
    session = onnxruntime.InferenceSession(
        os.fspath(path), options, providers=["CPUExecutionProvider"]
    )

    def run(feed: Feed) -> Array:
        rows: Array = session.run(None, feed)[0]
        return rows

    return run


def _openvino(
    path: Path, trial: tuple[Feed, Array] | None, count: int
) -> tuple[Callable[[Feed], Array], str]:
    import openvino  # type: ignore[import-not-found, import-untyped, unused-ignore]

    core = openvino.Core()
    is_forced = wanted_engine() == "openvino-bf16"
    if (trial or is_forced) and "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        run = _requests(core, path, count, "bf16")
        if is_forced or (trial and least_cosine(run, trial) >= NEAR):
            return run, "OpenVINO (bfloat16)"
    run = _requests(core, path, count, "f32")
    if trial and least_cosine(run, trial) < SAME:
        raise RuntimeError(f"OpenVINO computes something else than {path} says")
    return run, "OpenVINO (float32)"


def least_cosine(run: Callable[[Feed], Array], trial: tuple[Feed, Array]) -> float:
    """Between the rows of a trial and what is expected of it."""
    feed, expected = trial
    return float((run(feed) * expected).sum(axis=1).min())


def _requests(core: Any, path: Path, count: int, precision: str) -> Callable[[Feed], Array]:
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "NUM_STREAMS": str(count),
        "INFERENCE_NUM_THREADS": str(count),
        # Else activations beside int8 weights are rounded to int8 as well.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        "ENABLE_CPU_PINNING": "NO",  # decoders need the cores as well
    }
    model = core.compile_model(path, "CPU", settings)
    idle: SimpleQueue[Any] = SimpleQueue()
    for _ in range(count):
        idle.put(model.create_infer_request())

    def run(feed: Feed) -> Array:
        request = idle.get()
        try:
            request.infer(dict(feed), share_inputs=True)
            return np.array(request.get_output_tensor(0).data)
        finally:
            idle.put(request)

    return run
