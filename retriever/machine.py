"""What a number was measured on: machine, threads, versions, load; and percentiles of times."""

import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from retriever import __version__

# Versions that can change a number, named if the process has loaded them: module → package.
_PACKAGES = {
    "numpy": "numpy",
    "PIL": "pillow",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "tokenizers": "tokenizers",
    "torch": "torch",
    "open_clip": "open_clip_torch",
    "timm": "timm",
    "faiss": "faiss-cpu",
    "sqlalchemy": "sqlalchemy",
    "usearch": "usearch",
    "hnswlib": "hnswlib",
}
# Instructions that engines choose their kernels by, under Linux's names.
_FLAGS = (
    *("avx2", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve"),
)
# What limits the threads of the libraries used, if it is set.
_THREADS = (
    *("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"),
    *("RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM"),
)


def environment(packages: Iterable[str] = ()) -> dict[str, Any]:
    """Machine and versions, as far as they can change a number; no host or user name.

    Args:
        packages: named with their versions besides those that this process has loaded, because
            another process of the measurement used them.
    """
    about = _about_processor()
    return {
        "platform": platform.platform(),
        "processor": about.get("model name") or platform.processor() or platform.machine(),
        "flags": sorted(set(_FLAGS) & {*about.get("flags", about.get("Features", "")).split()}),
        "cpus": cores(),
        "memory_gb": _memory_gb(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "load_average": load_average(),
        "threads": {name: os.environ[name] for name in _THREADS if name in os.environ},
        "versions": _versions(packages),
    }


def cores() -> int:
    """Processor cores that this process may use: by its affinity, its container, OMP_NUM_THREADS.

    The variable is set where someone wants no more than that, as schedulers of clusters do.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    allowed = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota, _, period = (_read("/sys/fs/cgroup/cpu.max") or "").partition(" ")
    if quota.isdecimal() and period.isdecimal():  # a container's share, else "max"
        allowed = min(allowed, max(1, int(quota) // int(period)))
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return min(allowed, int(wanted)) if wanted.isdecimal() and int(wanted) else allowed


def load_average() -> float | None:
    """Processes that wanted a core, on average over the last minute; None where nobody counts."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def percentiles(seconds: Sequence[float]) -> dict[str, Any]:
    """Waiting times as their number `n` and `p50_ms`, `p95_ms`, `p99_ms`, linearly interpolated.

    Raises:
        ValueError: there are none.
    """
    if not len(seconds):
        raise ValueError("there are no times to take percentiles of")
    found = np.percentile(np.asarray(seconds, dtype=np.float64) * 1000, [50, 95, 99])
    named = zip(("p50_ms", "p95_ms", "p99_ms"), found.tolist(), strict=True)
    return {"n": len(seconds), **{name: round(value, 4) for name, value in named}}


def describe(environment: Mapping[str, Any]) -> str:
    """The record of `environment` as one line for people; what is not known is left out."""
    parts = [f"{environment['processor']}, {environment['cpus']} cores"]
    if environment.get("memory_gb"):
        parts[0] += f", {environment['memory_gb']:.0f} GB"
    if environment.get("flags"):
        parts.append(" ".join(environment["flags"]))
    threads = environment.get("threads") or {}
    parts += [f"{name}={value}" for name, value in threads.items()]
    load = environment.get("load_average")
    if isinstance(load, Mapping):
        parts.append(f"load {load['start']} to {load['end']}")
    elif load is not None:
        parts.append(f"load {load}")
    parts.append(", ".join(f"{name} {number}" for name, number in environment["versions"].items()))
    return "; ".join(parts)


def _versions(packages: Iterable[str]) -> dict[str, str]:
    versions = {"retriever": __version__, "python": platform.python_version()}
    loaded = {package: module for module, package in _PACKAGES.items() if module in sys.modules}
    for package in dict.fromkeys((*loaded, *packages)):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # faiss-gpu brings the module faiss as well
            module = sys.modules.get(loaded.get(package, package))
            versions[package] = getattr(module, "__version__", "unknown")
    return versions


def _about_processor() -> dict[str, str]:
    """What Linux tells of the first core, by its own names; empty elsewhere."""
    first = (_read("/proc/cpuinfo") or "").partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _memory_gb() -> float | None:
    """Physical memory in 10^9 bytes."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
