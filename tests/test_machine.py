"""The record of the machine that every measurement carries, and percentiles of waiting times."""

import os
import platform

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retriever.machine import cores, describe, environment, percentiles


def test_environment_names_the_machine_but_not_its_host() -> None:
    described = environment()
    assert described["processor"]
    assert described["cpus"] == cores() >= 1
    assert described["versions"]["numpy"] == np.__version__
    assert platform.node() not in str(described) or not platform.node()
    assert set(described) == {
        *("platform", "processor", "flags", "cpus", "memory_gb", "governor", "load_average"),
        *("threads", "versions"),
    }


def test_packages_of_other_processes_are_named_and_unknown_ones_are_no_error() -> None:
    versions = environment(["click", "no-such-package"])["versions"]
    assert versions["click"][0].isdecimal()
    assert versions["no-such-package"] == "unknown"


def test_thread_settings_are_recorded_only_if_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    threads = environment()["threads"]
    assert threads["OMP_NUM_THREADS"] == "3"
    assert "MKL_NUM_THREADS" not in threads


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores are pinned on Linux only")
def test_cores_that_may_not_be_used_are_not_counted() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert cores() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_no_more_cores_are_used_than_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    most = cores()
    for wanted, expected in (("1", 1), ("1,4", 1), (" 9999", most), ("0", most), ("many", most)):
        monkeypatch.setenv("OMP_NUM_THREADS", wanted)
        assert cores() == expected, wanted


def test_percentiles_worked_by_hand() -> None:
    # 0 to 100 ms in steps of 1 ms: the p-th percentile is p ms.
    found = percentiles([n / 1000 for n in range(101)])
    assert found == {"n": 101, "p50_ms": 50.0, "p95_ms": 95.0, "p99_ms": 99.0}


def test_percentiles_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="no times"):
        percentiles([])


@given(st.lists(st.floats(1e-6, 1e3), min_size=1))
def test_percentiles_ascend_within_the_range(seconds: list[float]) -> None:
    found = percentiles(seconds)
    slack = 1e-4  # they are rounded
    assert 1000 * min(seconds) - slack <= found["p50_ms"]
    assert found["p50_ms"] <= found["p95_ms"] <= found["p99_ms"] <= 1000 * max(seconds) + slack


def test_the_machine_in_one_line_reads_records_with_more_or_less_in_them() -> None:
    old = {"processor": "Abacus", "cpus": 2, "versions": {"numpy": "1.0"}}
    assert describe(old) == "Abacus, 2 cores; numpy 1.0"
    new = old | {
        "memory_gb": 8.3,
        "flags": ["avx2", "f16c"],
        "threads": {"OMP_NUM_THREADS": "1"},
        "load_average": {"start": 0.1, "end": 1.9},
    }
    assert describe(new) == (
        "Abacus, 2 cores, 8 GB; avx2 f16c; OMP_NUM_THREADS=1; load 0.1 to 1.9; numpy 1.0"
    )
