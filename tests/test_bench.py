"""`retriever bench`: real small runs; what is measured is there and makes sense, no time judged."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from conftest import paint
from PIL import Image

from cli import main
from indexes.errors import StoreNotFoundError
from indexes.store import ModelSpec, Store
from retriever import Library, bench
from retriever.errors import RetrieverError, UsageError
from retriever.machine import environment
from retriever.preprocessing import Preprocessing

EIGHT = Preprocessing(8, "squash", "bicubic")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["bench", "--seconds", "1", *map(str, arguments)])


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dozen pictures, all but one with a caption."""
    folder = tmp_path_factory.mktemp("bench")
    for number in range(12):
        path = folder / "pictures" / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.linear_gradient("L").rotate(30 * number).convert("RGB").save(path)
        if number:
            path.with_suffix(".txt").write_text(f"shades number {number}", encoding="utf-8")
    with Library.create(folder / "some.lib") as made:
        assert made.index(folder / "pictures").added == 12
    return folder / "some.lib"


def contents(folder: Path) -> dict[str, bytes]:
    # SQLite's own two files beside a database come and go with whoever reads it.
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if not path.name.endswith(("-wal", "-shm"))
    }


def check(record: dict[str, Any]) -> None:
    assert record["record"] == "retriever-bench-1"
    for stage in ("decode", "images", "texts"):
        found = record["encoding"][stage]
        assert found["n"] >= 1
        assert found["per_second"] > 0
        assert found["ms"] == pytest.approx(1000 / found["per_second"], rel=0.2, abs=0.01)
    assert record["cold_start"]["runs"] >= bench.MIN_RUNS
    assert record["cold_start"]["wall_s"] > 0
    for found in (record["answer"], record["search"]["exact"]):
        assert 0 < found["p50_ms"] <= found["p95_ms"] <= found["p99_ms"]
    assert 0 < record["library"]["index_bytes"] < record["library"]["size_bytes"]
    assert record["environment"]["cpus"] >= 1
    assert record["limits"]
    assert all(sentence.endswith(".") for sentence in record["limits"])


def test_a_library_is_measured_with_its_own_pictures_and_not_written(library: Path) -> None:
    before = contents(library)
    result = run("--library", library, "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    check(record)
    assert contents(library) == before
    assert not record["made_up"]
    assert record["queries"] == "captions of the library"
    assert record["library"]["path"] == str(library)
    assert (record["library"]["pictures"], record["library"]["captions"]) == (12, 11)
    assert record["model"]["name"] == "mini"
    assert record["search"]["rows"] == 12
    assert record["search"]["read_bytes"] == 2 * 12 * record["model"]["dim"]
    assert record["search"]["approximate"] is None


def test_the_table_has_the_numbers_and_what_limits_them(library: Path) -> None:
    result = run("--library", library)
    assert result.exit_code == 0, result.output
    for words in ("12 pictures", "per second", "p99", "exact search of 12 rows", "What limits"):
        assert words in result.stdout
    assert max(map(len, result.stdout.split("What limits")[0].splitlines())) < 140


def test_without_a_library_pictures_are_made_up_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.delenv("RETRIEVER_LIBRARY", raising=False)
    monkeypatch.setattr(bench, "MADE_UP_ROWS", 2000)
    result = run("--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    check(record)
    assert record["made_up"]
    assert record["library"]["path"] is None
    assert record["library"]["pictures"] == 2000 + bench.MADE_UP_PICTURES
    assert not (tmp_path / "data").exists()
    assert "made up for this run" in bench.render(record)


def test_a_library_that_is_named_must_be_there(tmp_path: Path) -> None:
    result = run("--library", tmp_path / "no.lib")
    assert result.exit_code == 1
    assert "retriever index FOLDER" in result.stderr
    with pytest.raises(StoreNotFoundError):
        bench.measure(tmp_path / "no.lib")


def test_a_library_without_pictures_is_told(tmp_path: Path) -> None:
    model = ModelSpec("mini", 4, "not ours")
    Store.create(tmp_path / "empty.lib", model).close()
    with pytest.raises(UsageError, match="no pictures whose files are there"):
        bench.measure(tmp_path / "empty.lib")


def test_pictures_that_went_bad_are_left_out(tmp_path: Path, library: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"nothing")
    good = paint(tmp_path / "good.png", "red")
    found, ready = bench._decode([bad, good, bad], EIGHT, lambda: True)
    assert found["n"] == len(ready) == 1
    assert ready[0].size == (8, 8)
    with pytest.raises(UsageError, match="none of 1 pictures"):
        bench._decode([bad], EIGHT, lambda: True)


def test_the_timed_command_imports_nothing_from_the_current_folder(
    tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('a file of the folder was run')")
    monkeypatch.chdir(tmp_path)
    assert bench._cold_starts(library, "shades", lambda: False)["runs"] == bench.MIN_RUNS


def test_a_timed_command_that_fails_is_told_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(RetrieverError, match=r"ended with status 1: Error: there is no library"):
        bench._cold_starts(tmp_path / "none.lib", "shades", lambda: False)


# ── in words ─────────────────────────────────────────────────────────────────────────────────────


def record_of(**changes: Any) -> dict[str, Any]:
    """A record of round numbers."""
    waits = {"n": 1, "p50_ms": 10.0, "p95_ms": 20.0, "p99_ms": 30.0}
    rate = {"n": 1, "per_second": 100.0, "ms": 10.0, "cpu_ms": 15.0}
    record = {
        "made_up": False,
        "library": {"path": "a.lib", "pictures": 1, "captions": 2, "size_bytes": 3},
        "model": {"name": "mini", "dim": 384},
        "encoding": {
            "gpu": False,
            "engine": "OpenVINO",
            "decode": rate | {"cpu_ms": 5.0},
            "images": rate,
            "texts": rate,
        },
        "cold_start": {"runs": 3, "wall_s": 0.75, "cpu_s": 0.7},
        "answer": waits,
        "search": {
            **{"rows": 1000, "read_bytes": 100_000_000, "memory_gb_per_s": 20.0},
            **{"exact": waits, "approximate": None, "reason": "it is small"},
        },
        "environment": environment() | {"cpus": 2, "load_average": 0.1},
    }
    return record | changes


def test_limits_worked_by_hand() -> None:
    # 5 ms of decoding and 15 ms of the model, on two cores: 2,000 ms / 20 ms = 100 a second.
    # 100 MB in 10 ms are 10 GB/s, half of 20.
    assert bench.limits_of(record_of()) == [
        "Indexing: at most about 100 pictures a second; the model limits: of the 20.0 ms of CPU"
        " that each takes, 25 % is decoding and 75 % the model.",
        "A search from the shell takes 0.75 s, of which 10 ms are the answer: the rest starts"
        " Python and loads the model.",
        "Exact search reads 100 MB at 10.0 GB/s, 50 % of what memory gives here (20.0 GB/s): its"
        " time grows with the library.",
        "How the library chose to search: it is small.",
    ]


def test_a_busy_machine_is_told_first() -> None:
    busy = environment() | {"cpus": 2, "load_average": 3.0}
    (first, *_) = bench.limits_of(record_of(environment=busy))
    assert first.startswith("Other programs were at work (load 3.0 on 2 cores)")


def test_a_gpu_and_the_processor_that_feeds_it_have_a_rate_each() -> None:
    encoding = record_of()["encoding"] | {"gpu": True}
    # 2 cores / 5 ms = 400 decoded a second, 100 encoded.
    (first, *_) = bench.limits_of(record_of(encoding=encoding))
    assert first == "Indexing: at most about 100 pictures a second; the model on the GPU limits."
    encoding["decode"] = encoding["decode"] | {"cpu_ms": 50.0}
    (first, *_) = bench.limits_of(record_of(encoding=encoding))
    assert first == "Indexing: at most about 40 pictures a second; decoding on the CPU limits."


def test_an_approximate_index_is_compared_with_exact_search() -> None:
    search = record_of()["search"]
    search["approximate"] = {"n": 1, "p50_ms": 0.5, "p95_ms": 1.0, "p99_ms": 2.0, "overlap@10": 0.9}
    assert bench.limits_of(record_of(search=search))[-2] == (
        "The approximate index answers 20.0 times as fast and finds 90.0 % of the 10 best."
    )
    record = record_of(search=search, limits=["All is well."])
    record["library"]["index_bytes"] = 1
    record["encoding"]["decode"] = record["encoding"]["decode"] | {"megapixels": 12.0}
    assert "approximate, overlap@10 0.900" in bench.render(record)


@pytest.mark.parametrize(
    ("rate", "words"), [(5.4, "5"), (14.4, "14"), (123.0, "120"), (98_765.0, "99,000")]
)
def test_rates_are_told_in_two_digits(rate: float, words: str) -> None:
    assert bench._round(rate) == words
