"""Thousands of inputs through an ONNX tower: several runs side by side, on one core each.

A query is one input. All cores answer it together, in a session of ONNX Runtime that starts in no
time. Thousands of inputs are done sooner if each core works by itself: nothing waits for the
slowest part of an operation, and a core that a decoder has taken holds up one run, not all of them.
So `Lanes` gives every core runs of a few inputs, small enough for the processor's cache.

With the extra `openvino` installed they run in OpenVINO, in bfloat16 where the processor multiplies
that (avx512_bf16, AMX): half the time of float32, rows that differ by a cosine of 0.001 at most,
and the same recall. Elsewhere it stays float32. Benchmarks are in benchmarks/README.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from retriever.errors import UsageError

Array = NDArray[Any]
T = TypeVar("T")
R = TypeVar("R")

# "onnxruntime" has rows made as on machines without OpenVINO; "openvino" shows why it cannot run.
VARIABLE = "RETRIEVER_ENGINE"
ENGINES = ("auto", "onnxruntime", "openvino")

ONNXRUNTIME = "ONNX Runtime"


def usable_cores() -> int:
    """Cores that this process may run on, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def wanted_engine() -> str:
    """One of `ENGINES`, as the environment says; raises UsageError if it says something else."""
    wanted = os.environ.get(VARIABLE) or "auto"
    if wanted not in ENGINES:
        raise UsageError(f"{VARIABLE}={wanted}: choose one of {', '.join(ENGINES)}")
    return wanted


class Lanes:
    """One tower in several lanes, a core each; thread-safe.

    Args:
        path: the ONNX file.
        count: lanes; None is one for each core.

    Raises:
        UsageError: as `wanted_engine`.
        Exception: the file is no tower, or the engine that was asked for cannot run it; engines
            share no base for what they raise.
    """

    def __init__(self, path: Path, count: int | None = None) -> None:
        from concurrent.futures import ThreadPoolExecutor

        wanted = wanted_engine()
        self.count = count or usable_cores()
        self._run: Callable[[Mapping[str, Array]], Array]
        try:
            if wanted == "onnxruntime":
                raise ImportError
            self._run, self.engine = _openvino(path, self.count)
        except Exception:
            # Not installed, built for another machine, or without an operation of this tower.
            if wanted == "openvino":
                raise
            self._run, self.engine = _onnxruntime(path), ONNXRUNTIME
        self._threads = ThreadPoolExecutor(self.count, "lane")

    def run(self, feed: Mapping[str, Array]) -> Array:
        """The first output for some inputs: (b, d) rows, the caller's own."""
        return self._run(feed)

    def map(self, function: Callable[[T], R], parts: Iterable[T]) -> list[R]:
        """`function` of each part in order, in the lanes' threads; raises what it raises first."""
        return list(self._threads.map(function, parts))


def _onnxruntime(path: Path) -> Callable[[Mapping[str, Array]], Array]:
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # a run stays on the thread that called it
    session = onnxruntime.InferenceSession(
        os.fspath(path), options, providers=["CPUExecutionProvider"]
    )

    def run(feed: Mapping[str, Array]) -> Array:
        rows: Array = session.run(None, feed)[0]
        return rows

    return run


def _openvino(path: Path, count: int) -> tuple[Callable[[Mapping[str, Array]], Array], str]:
    import openvino  # type: ignore[import-not-found, import-untyped, unused-ignore]

    core = openvino.Core()
    is_bfloat = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if is_bfloat else "f32",
        "NUM_STREAMS": str(count),
        "INFERENCE_NUM_THREADS": str(count),
        "ENABLE_CPU_PINNING": "NO",  # decoders need the cores as well
    }
    model = core.compile_model(core.read_model(path), "CPU", settings)
    idle: SimpleQueue[Any] = SimpleQueue()
    for _ in range(count):
        idle.put(model.create_infer_request())

    def run(feed: Mapping[str, Array]) -> Array:
        request = idle.get()
        try:
            request.infer(dict(feed), share_inputs=True)
            return np.array(request.get_output_tensor(0).data)
        finally:
            idle.put(request)

    return run, f"OpenVINO ({'bfloat16' if is_bfloat else 'float32'})"
