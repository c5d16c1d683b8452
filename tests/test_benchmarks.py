"""Each benchmark in small form: the command runs, its record can be repeated, its plots be seen.

No timing is asserted: what is checked is that numbers are there, make sense and name what they were
measured on.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import COLOURS, ToyEncoder, paint
from defusedxml import ElementTree
from PIL import Image

from retriever import calibration, metrics
from retriever.machine import cores
from retriever.preprocessing import Preprocessing

# Last, because both folders have a file kills.py.
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import report

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results"


@dataclass(frozen=True)
class Settings:
    """Of a benchmark that measures nothing."""

    seed: int = 0


SETTINGS = Settings()
ENVIRON = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


# ── for the test of each benchmark ───────────────────────────────────────────────────────────────


def run_script(name: str, *options: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """One run of `python benchmarks/NAME.py OPTIONS`."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{name}.py"), *map(str, options)],
        env=ENVIRON,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def run_benchmark(
    name: str, *options: object, folder: Path, plots: Iterable[str] = ()
) -> dict[str, Any]:
    """The record of a run, checked for all that makes it repeatable, and its plots by suffix.

    It runs here, because to import numpy, torch and matplotlib takes longer than most of them.
    """
    out = folder / f"{name}.json"
    command = importlib.import_module(name).main
    arguments = [*map(str, options), "--out", str(out)]
    with patch.dict(os.environ, ENVIRON), patch.object(sys, "argv", [name, *arguments]):
        done = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    record: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    check_record(record, name)
    # What the page shows is what was printed.
    assert "\n".join(record["printed"]) in done.stdout
    assert record["printed"]
    drawn = {path.stem for path in folder.glob(f"{name}*.svg")}
    assert drawn == {f"{name}-{suffix}" if suffix else name for suffix in plots}
    for stem in drawn:
        check_plot(folder / stem)
    return record


def check_record(record: Mapping[str, Any], name: str) -> None:
    assert record["benchmark"] == name
    assert record["command"].startswith("python ")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", record["written"])
    assert record["settings"]
    assert record["data"]["name"]
    assert record["numbers"]
    machine = record["environment"]
    assert machine["processor"]
    assert machine["cpus"] >= 1
    assert machine["threads"]["OMP_NUM_THREADS"] == "1"
    assert set(machine["load_average"]) == {"start", "end"}
    assert {"retriever", "python", "numpy"} <= set(machine["versions"])


def check_plot(stem: Path) -> None:
    """Both files of a plot show something, and letters large enough to be read."""
    with Image.open(f"{stem}.png") as image:
        image.load()
        assert min(image.size) >= 400
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 10, "nothing is drawn"
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255), "unreadable on dark pages"
    root = ElementTree.parse(f"{stem}.svg").getroot()
    assert root.tag.endswith("svg")
    assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 10


def check_percentiles(found: Mapping[str, float]) -> None:
    assert found["n"] >= 1
    assert 0 < found["p50_ms"] <= found["p95_ms"] <= found["p99_ms"]


# ── what they share ──────────────────────────────────────────────────────────────────────────────


def python(code: str) -> Sequence[str]:
    return [sys.executable, "-c", code]


def test_a_measured_process_uses_cpu_memory_and_time() -> None:
    used = report.run_process(python("x = bytearray(200_000_000); sum(range(10**6))"))
    assert used["exit"] == 0
    assert used["cpu_s"] > 0
    assert used["wall_s"] > 0
    assert used["peak_mb"] > 200


def test_the_memory_of_the_measuring_process_is_not_that_of_the_measured_one() -> None:
    ballast = bytearray(300_000_000)
    ballast[::4096] = bytes(len(ballast[::4096])).replace(b"\0", b"\1")
    assert report.run_process(python("pass"))["peak_mb"] < 100


def test_output_goes_to_a_file_if_one_is_given(tmp_path: Path) -> None:
    out = tmp_path / "said.txt"
    report.run_process(python("import os; print(os.getcwd())"), cwd=tmp_path, out=out)
    assert out.read_text(encoding="utf-8").strip() == str(tmp_path)


def test_environment_and_status_of_a_measured_process_are_as_asked() -> None:
    code = "import os, sys; sys.exit(int(os.environ['STATUS']))"
    assert report.run_process(python(code), env={"STATUS": "7"}, check=False)["exit"] == 7
    code = "import os; os.kill(os.getpid(), 9)"
    assert report.run_process(python(code), check=False)["exit"] == -9


def test_a_program_that_fails_is_told_with_its_last_words() -> None:
    with pytest.raises(RuntimeError, match=r"ended with status 1: .*out of ink"):
        report.run_process(python("raise SystemExit('out of ink')"))
    with pytest.raises(RuntimeError, match="no-such-program"):
        report.run_process(["no-such-program"], check=False)


def test_programs_are_run_in_turn(tmp_path: Path) -> None:
    log = tmp_path / "log"
    commands = {name: ["sh", "-c", f"echo {name} >> '{log}'"] for name in "abc"}
    found = report.interleaved(commands, 3)
    assert log.read_text(encoding="utf-8").split() == list("abcabcabc")
    assert list(found) == list("abc")
    for spread in found.values():
        assert set(spread) == {"cpu_s", "wall_s", "peak_mb"}
        for one in spread.values():
            assert one["min"] <= one["median"] <= one["max"]


def test_a_table_is_padded_markdown() -> None:
    assert report.format_table(["name", "n"], [["a", "1"], ["long one", "1,000"]]) == (
        "| name     |     n |\n"
        "| :------- | ----: |\n"
        "| a        |     1 |\n"
        "| long one | 1,000 |"
    )  # fmt: skip


def test_a_plot_is_two_files_and_the_same_plot_the_same_bytes(tmp_path: Path) -> None:
    import plots

    for name in ("one", "two"):
        figure, (left, right) = plots.new_figure("Title", "n", "ms", columns=2, log="xy")
        for axes in (left, right):
            plots.line(axes, 0, "a line", [1, 10, 100], [1, 10, 100])
            axes.legend()
        plots.save_plot(figure, tmp_path / name)
        check_plot(tmp_path / name)
    for suffix in ("png", "svg"):
        files = [(tmp_path / f"{name}.{suffix}").read_bytes() for name in ("one", "two")]
        assert files[0] == files[1]


def test_the_slope_of_a_power_is_its_exponent() -> None:
    assert report.log_log_slope([1, 10, 100], [5, 50, 500]) == pytest.approx(1)
    assert report.log_log_slope([1, 4, 16], [3, 6, 12]) == pytest.approx(0.5)
    assert report.log_log_slope([1, 2, 3], [7, 7, 7]) == pytest.approx(0, abs=1e-12)


def test_the_command_that_is_measured_is_the_one_of_this_tree(tmp_path: Path) -> None:
    out = tmp_path / "said.txt"
    report.run_process([*report.RETRIEVER, "--version"], cwd=tmp_path, out=out)
    assert out.read_text(encoding="utf-8").startswith("retriever, version ")


# ── the page ─────────────────────────────────────────────────────────────────────────────────────

FRAME = "# Page\n\n<!-- results: a -->\nold\n<!-- end of results -->\n\nwords\n"


def test_a_section_of_the_page_shows_what_was_printed_with_command_and_machine(
    tmp_path: Path,
) -> None:
    results = tmp_path / "results"
    table = "| n |\n| :- |\n| 1 |"
    record = report.write_report(
        results / "a.json",
        "a",
        settings=SETTINGS,
        data={"name": "none"},
        numbers=[1],
        seconds=1.23,
        printed=table,
    )
    (results / "a-more.svg").touch()
    page = report.fill_page(FRAME, results)
    assert "old" not in page
    assert page.endswith("<!-- end of results -->\n\nwords\n")
    for words in (table, "![a-more: plot](results/a-more.svg)", "(results/a.json)"):
        assert words in page
    assert record["environment"]["processor"] in page
    assert report.fill_page(page, results) == page


def test_without_a_record_the_page_says_so(tmp_path: Path) -> None:
    assert "Not run yet." in report.fill_page(FRAME, tmp_path)


def test_a_record_that_the_page_forgets_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="no section for the results of b"):
        report.fill_page(FRAME, tmp_path)


def test_the_page_is_what_its_command_makes_of_the_records() -> None:
    page = report.PAGE.read_text(encoding="utf-8")
    made = report.fill_page(page, RESULTS)
    assert page == made, "run: python benchmarks/report.py benchmarks/results"


def test_every_record_names_its_machine_and_holds_what_it_printed() -> None:
    for path in RESULTS.glob("*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        # A benchmark may have several records, each under the name of its --out.
        assert (BENCHMARKS / f"{record['benchmark']}.py").is_file()
        assert record["command"].startswith(f"python benchmarks/{record['benchmark']}.py ")
        assert record["command"].endswith(f"benchmarks/results/{path.name}")
        assert record["printed"], path.name
        assert record["environment"]["processor"]


# ── each in small form ───────────────────────────────────────────────────────────────────────────


def test_scale(tmp_path: Path) -> None:
    options = ("--sizes", "50,500", "--files", 50, "--checks", 1, "--queries", 3, "--cold-runs", 1)
    record = run_benchmark(
        "scale", *options, "--folder", tmp_path, folder=tmp_path / "out", plots=[""]
    )
    numbers = record["numbers"]
    assert [one["pictures"] for one in numbers["files"]] == [50]
    assert [one["pictures"] for one in numbers["made_up"]] == [50, 500]
    for one in numbers["made_up"]:
        assert one["disk_mb"] > 2 * 2 * 384 * one["pictures"] / 1e6  # catalogue and index
        assert one["cold"]["peak_mb"]["median"] > 10
        for kind in ("exact", "automatic"):
            check_percentiles(one["query"][kind])
    assert 0 < numbers["slopes"]["library on disk"] < 2
    assert "index" not in numbers["slopes"]  # one size has none
    assert record["environment"]["versions"]["faiss-cpu"]
    assert not list(tmp_path.glob("scale-*")), "libraries are deleted"


def test_recall(tmp_path: Path, tiny_pairs: Path) -> None:
    record = run_benchmark(
        "recall",
        *(tiny_pairs, "--engine", "onnxruntime", "--resamples", 20, "--folder", tmp_path),
        folder=tmp_path / "out",
        plots=[""],
    )
    (plain,) = record["numbers"]["plain"]
    assert plain["model"]["name"] == "mini"
    assert record["data"]["pictures"] == 4  # those with captions
    ways = {one["way"]: one for one in record["numbers"]["fast"]}
    assert set(ways) == {"exact, rows of float16", "library, onnxruntime: ONNX Runtime"}
    # The pictures are smaller than what the model reads, so nothing is lost by decoding them.
    for way in ways.values():
        assert way["metrics"] == {name: plain["metrics"][name] for name in way["metrics"]}
        assert set(way["differences"].values()) == {0.0}
    library = ways["library, onnxruntime: ONNX Runtime"]
    assert set(library["difference_intervals"]) == set(library["metrics"])
    assert library["intervals"]["t2i_r@1"] == plain["intervals"]["t2i_r@1"]


def test_an_approximate_index_finds_what_exact_search_does(tmp_path: Path) -> None:
    import recall
    from synthetic import image_queries, image_vectors

    rows = np.concatenate(list(image_vectors(1200, 64, seed=0)))
    queries = image_queries(40, 64, seed=0)
    found = recall._approximate(rows, queries, seed=0)
    exact = np.argsort(-(queries @ rows.T), axis=1)[:, :10]
    assert metrics.overlap_at_k(list(exact), found, 10) > 0.95


def test_ranks_and_paired_differences_worked_by_hand() -> None:
    import recall

    found = [np.array([7, 5]), np.array([3, 9]), np.array([1, 2])]
    assert recall._ranks(found, [[5, 9], [8], [1, 2]]).tolist() == [1, recall.K, 0]
    # Two pictures, the first with two captions.
    owners, far = np.array([0, 0, 1]), recall.K
    plain = recall.Ranks(owners, np.array([0, 3, 0]), np.array([0, far]))
    fast = recall.Ranks(owners, np.array([0, 6, far]), np.array([0, far]))
    once = plain.recalls(np.ones(2, np.int64))
    assert once == {
        **{"t2i_r@1": pytest.approx(200 / 3), "t2i_r@5": 100.0, "t2i_r@10": 100.0},
        **{"i2t_r@1": 50.0, "i2t_r@5": 50.0, "i2t_r@10": 50.0},
    }
    # A picture that is drawn three times counts three times with all its captions.
    assert plain.recalls(np.array([3, 1]))["t2i_r@1"] == pytest.approx(400 / 7)
    described = fast.describe(plain, recall.Settings(resamples=50))
    assert described["differences"]["t2i_r@1"] == pytest.approx(-100 / 3)
    assert described["differences"]["i2t_r@10"] == 0
    low, high = described["difference_intervals"]["t2i_r@1"]
    assert low == pytest.approx(-100)  # the second picture twice
    assert high == 0  # the first picture twice


def test_recall_without_the_data_is_no_failure(tmp_path: Path) -> None:
    done = run_script("recall", tmp_path / "nowhere")
    assert "skipped" in done.stderr


@pytest.fixture
def coloured(tmp_path: Path) -> Path:
    """Pictures of one to three stripes, each with two captions that name their colours."""
    from itertools import combinations

    folder = tmp_path / "coloured"
    folder.mkdir()
    lines = []
    for count in (1, 2, 3):
        for names in combinations(sorted(COLOURS), count):
            file = f"{'-'.join(names)}.png"
            stripes = np.array([[COLOURS[name] for name in names]], np.uint8).repeat(8, axis=0)
            Image.fromarray(stripes.repeat(8, axis=1)).save(folder / file)
            captions = [f"stripes of {' and '.join(names)}", f"it is {', '.join(names)}"]
            lines.append(json.dumps({"file": file, "captions": captions}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_answers(
    tmp_path: Path, coloured: Path, monkeypatch: pytest.MonkeyPatch, toy_encoder: ToyEncoder
) -> None:
    import answers

    some = calibration.background()[::8]
    monkeypatch.setattr(calibration, "background", lambda: some)
    monkeypatch.setattr(answers, "load_encoder", lambda *_, **__: toy_encoder)
    foreign = tmp_path / "shop"
    paint(foreign / "bolt.png", "white")
    (foreign / "bolt.txt").write_text("a hexagonal bolt\nspare part 4471\n", encoding="utf-8")
    options = ("--foreign", foreign, "--queries", 20, "--pictures", 10, "--resamples", 20)
    options += ("--folder", tmp_path)
    record = run_benchmark(
        "answers", coloured, *options, folder=tmp_path / "out", plots=["channels", "cut-off"]
    )
    assert record["data"]["pictures"] == 63
    assert record["data"]["captions"] == 63  # each has one left
    assert record["data"]["queries"] == 63
    numbers = record["numbers"]
    for mode in ("image", "caption", "words", "hybrid"):
        recalls = [numbers["channels"][f"{mode} t2i_r@{k}"]["value"] for k in (1, 5, 10)]
        assert recalls == sorted(recalls)
        assert 0 < recalls[-1] <= 100
    # Several mixtures are one colour, but no two have the same names.
    ratio = numbers["channels"]["hybrid to image t2i_r@1"]
    assert ratio["value"] > 1
    for of_mode in numbers["cut_off"].values():
        # Neither a bolt nor nonsense is a colour.
        assert of_mode["auc"]["value"] == 1
        assert of_mode["auc shop"]["value"] == 1
        assert of_mode["no match nonsense"]["value"] > 90
        assert of_mode["no match own"]["value"] < 10
        for found in of_mode.values():
            assert found["interval"][0] <= found["value"] <= found["interval"][1]
    for one in numbers["calibration"].values():
        assert one["pairs"] >= 30
        assert one["error"]["value"] < 0.1
        assert sum(weight for _, _, weight in one["bins"]) == pytest.approx(1)
    assert set(numbers["pictures"]) == {"auc shop", "no match own", "no match shop"}
    assert not list(tmp_path.glob("answers-*")), "the library is deleted"


def test_what_was_asked_is_not_in_the_library(tmp_path: Path, coloured: Path) -> None:
    import answers

    from retriever.data import read_pairs

    pairs, _ = read_pairs(coloured, embedded=False)
    asked = answers._copy(pairs, tmp_path / "copy", seed=3)
    kept, _ = read_pairs(tmp_path / "copy", embedded=False)
    assert len(asked) == len(kept) == len(pairs)
    for query, left, pair in zip(asked, kept, pairs, strict=True):
        assert {query, *(one.text for one in left.captions)} == {one.text for one in pair.captions}
        assert query not in {one.text for one in left.captions}


def test_foreign_queries_are_the_same_for_the_same_seed() -> None:
    import answers

    assert answers.nonsense(30, 1) == answers.nonsense(30, 1) != answers.nonsense(30, 2)
    assert all(1 <= len(text.split()) <= 6 for text in answers.nonsense(30, 1))


def test_best_answers_with_and_without_the_own_picture() -> None:
    import answers

    from retriever.search import Answer, Hit

    def found(*hits: tuple[int, float]) -> Answer:
        return Answer(
            tuple(
                Hit(rank, score, Path(f"{place:06d}.jpg"), None, place)
                for rank, (place, score) in enumerate(hits, start=1)
            ),
            "image",
        )

    several = [found((0, 0.9), (1, 0.5)), found((0, 0.8), (1, 0.7)), found((2, 0.4)), found()]
    assert answers.best_of(several).tolist() == [0.9, 0.8, 0.4, answers.NONE]
    assert answers.without_own(several).tolist() == [0.5, 0.8, answers.NONE, answers.NONE]
    assert [answers._rank(answers.places_of(one), 1) for one in several] == [1, 1, 10, 10]


def test_answers_without_the_data_is_no_failure(tmp_path: Path) -> None:
    done = run_script("answers", tmp_path, "--foreign", tmp_path / "nowhere")
    assert "skipped" in done.stderr
    assert "nowhere" in done.stderr


def test_tuning(tmp_path: Path, coloured: Path) -> None:
    told = coloured / "captions.jsonl"
    lines = [json.loads(line) | {"split": "val"} for line in told.read_text("utf-8").splitlines()]
    told.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    few = ("--epochs", 1, "--queries", 5, "--resamples", 50)
    options = ("--foreign", coloured, "--libraries", tmp_path / "libraries", *few)
    # A model with random weights takes seconds to make.
    record = run_benchmark("tuning", coloured, *options, "--random-pictures", 0, folder=tmp_path)
    numbers = record["numbers"]
    [tuned] = numbers["tuned"].values()
    assert tuned["pictures"] == len(list(coloured.glob("*.png")))
    gained = tuned["after"]["rsum"] - tuned["before"]["rsum"]
    assert tuned["gain"]["rsum"] == pytest.approx(gained, abs=0.02)  # each was rounded
    asked = numbers["asked"]
    assert asked["pictures"] == tuned["pictures"]
    for mode in ("image", "hybrid"):
        before, after = (asked[mode][when] for when in ("before", "after"))
        assert 0 < before["r@1"] <= before["r@10"] <= 100
        gained = sum(after.values()) - sum(before.values())
        assert gained == pytest.approx(asked[mode]["gain"], abs=0.05)
    assert set(numbers["elsewhere"]["coloured"]) == {"untuned", "tuned", "tuned, tied to nothing"}
    moved = numbers["moved"]
    assert (moved["pictures"], moved["pictures_opened"]) == (tuned["pictures"], 0)
    assert moved["answers_equal_after_undo"]


def test_tuning_without_the_data_is_no_failure(tmp_path: Path) -> None:
    assert "skipped" in run_script("tuning", tmp_path / "nowhere").stderr


def test_rerank(tmp_path: Path, coloured: Path) -> None:
    few = ("--epochs", 2, "--tune-epochs", 1, "--resamples", 50)
    record = run_benchmark(
        "rerank", coloured, "--libraries", tmp_path / "libraries", *few, folder=tmp_path
    )
    [found] = record["numbers"].values()
    assert found["pictures"] == len(list(coloured.glob("*.png")))
    assert len(found["spaces"]) == 2
    for space in found["spaces"].values():
        assert 0 < space["before"] <= 100
        assert space["gain"] == pytest.approx(space["after"] - space["before"], abs=0.02)
        assert space["interval"][0] <= space["gain"] <= space["interval"][1]


def test_rerank_without_the_data_is_no_failure(tmp_path: Path) -> None:
    missing = run_script("rerank", tmp_path / "nowhere", "--libraries", tmp_path / "libraries")
    assert "skipped" in missing.stderr


def test_ranked_again_the_right_picture_is_first_only_alone() -> None:
    import rerank

    scores = np.array([[0.9, 0.8], [0.9, 0.8], [0.9, 0.8], [0.8, 0.8]], np.float32)
    is_right = np.array([[True, False], [False, True], [False, False], [True, False]])
    candidates = rerank.Candidates(np.tile([0, 1], (4, 1)), scores, is_right)
    assert candidates.is_first().tolist() == [True, False, False, False]
    logits = np.array([[0, 0], [-1, 1], [1, -1], [1, -1]], np.float32)
    assert candidates.is_first(logits).tolist() == [True, True, False, True]
    best, weight = rerank.weighed(candidates, logits)
    assert best == 0.75
    assert (scores[1] + weight * logits[1]).argmax() == 1
    assert rerank.weighed(candidates, np.zeros_like(logits)) == (0.25, 0.0)
    assert rerank.weighed(candidates, -logits) == (0.25, 0.0), "what does not help is not used"


def test_a_classifier_of_pairs_learns_what_cosines_do_not_tell() -> None:
    import rerank

    from retriever.tuning import Pairs

    rng = np.random.default_rng(0)

    def made(count: int) -> Pairs:
        # Each kind of picture lies where the texts of the next kind do.
        kinds = rng.integers(10, size=count)
        near = np.stack([np.eye(10)[kinds], np.eye(10)[(kinds + 1) % 10]])
        rows = np.concatenate([near, rng.normal(0, 0.3, (2, count, 6))], axis=2)
        rows /= np.linalg.norm(rows, axis=2, keepdims=True)
        pictures, texts = rows.astype(np.float32)
        places = np.arange(count)
        return Pairs(pictures, texts, np.stack([places, places], axis=1), places)

    learned, watched, asked = made(400), made(60), made(60)
    settings = rerank.Settings(epochs=15, width=64)
    [(before, after, weight)] = rerank.learn(
        learned, {"here": (watched, asked)}, (watched, asked), settings
    ).values()
    assert weight > 0
    assert after.mean() > before.mean() + 0.05


def test_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import train

    # The run that decodes the pictures counts as the one that is measured.
    monkeypatch.setattr(train, "measure_batch", cache(train.measure_batch))
    options = ("--pictures", 40, "--held-out", 8, "--batch-size", 8, "--epochs", 2, "--threads", 1)
    large = ("--batches", "20", "--micro-batch", 8, "--kept", 8, "--image-size", 16)
    record = run_benchmark("train", *options, *large, folder=tmp_path, plots=[""])
    frozen = record["numbers"]["frozen"]
    assert frozen["steps_per_epoch"] == 5
    check_percentiles(frozen["step"])
    check_percentiles(frozen["products"])
    (found,) = record["numbers"]["batches"]
    assert (found["batch"], found["cached"], found["pictures"]) == (20, True, 40)
    assert found["peak_mb"] > 100  # torch alone


def test_batches_are_trained_in_parts_and_up_to_a_size_as_a_whole_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train

    def measured(_home: Path, batch: int, micro_batch: int, _settings: object) -> dict[str, Any]:
        return {"batch": batch, "micro_batch": micro_batch, "peak_mb": 1.0}

    monkeypatch.setattr(train, "measure_batch", measured)
    settings = train.Settings(pictures=40, batches=(8, 20, 30, 64), micro_batch=8, kept=20)
    found = train.measure_batches(tmp_path, settings, lambda _: None)
    assert [(one["batch"], one["micro_batch"]) for one in found] == [
        *((8, 8), (20, 8), (20, 20), (30, 8)),
        (40, 8),  # there are no more pictures
    ]


def test_recheck(tmp_path: Path) -> None:
    record = run_benchmark("recheck", "--sizes", 20, 40, "--runs", 1, folder=tmp_path)
    assert [one["pictures"] for one in record["numbers"]["folders"]] == [20, 40, 40]


def test_ann(tmp_path: Path) -> None:
    record = run_benchmark(
        "ann",
        *("--rows", 1000, "--dim", 32, "--queries", 10, "--cache", tmp_path / "cache"),
        folder=tmp_path,
        plots=[""],
    )
    numbers = record["numbers"]
    assert numbers["bandwidth"]["one_thread_gb_s"] > 0
    check_percentiles(numbers["exact"])
    assert numbers["exact"]["gb_s"] > 0
    for name, index in numbers["indexes"].items():
        assert name in "\n".join(record["printed"])
        assert index["bytes_per_vector"] > 0
        assert set(index["build"]) == {"cpu_s", "wall_s"}
        for curve in index["curves"].values():
            assert curve
            for point in curve:
                check_percentiles(point)
                assert 0 < point["overlap"] <= 1
            for key in ("p50_ms", "overlap"):
                values = [point[key] for point in curve]
                assert values == sorted(set(values))
    ours, flat = numbers["indexes"]["retriever"], numbers["indexes"]["FAISS flat, float32"]
    assert ours["kind"].startswith("PCA")
    for side in ("text", "image"):
        assert flat["curves"][side][0]["overlap"] == 1
        assert ours["chosen"][side]["overlap"] > 0.9


def test_overlap_is_counted_by_ids_that_are_known_and_come_once() -> None:
    import ann

    from indexes.vectors import VectorIndex

    ids = np.arange(100, 104)
    exact = VectorIndex.build(4, [(ids, np.eye(4, dtype=np.float16))])
    query = np.array([[0.1, 0.2, 0.3, 0.9]], dtype=np.float32)

    def overlap(*found: int) -> float:
        return ann.overlap(exact, query, [np.array(found)], [np.array([103, 102])])

    assert overlap(103, 102) == overlap(102, 103) == 1
    assert overlap(103, 100) == overlap(102, 101) == 0.5
    assert overlap(101, 100) == 0
    assert overlap(100, 101, 102, 103) == 1  # the two best by the scores of their own vectors
    with pytest.raises(AssertionError, match="twice"):
        overlap(103, 103)
    with pytest.raises(AssertionError, match="unknown"):
        overlap(103, 3)


# ── beside the limit and beside peers ────────────────────────────────────────────────────────────


def photographs(folder: Path, count: int) -> Path:
    """So many JPEG files of 96 × 64, no two alike."""
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (96, 64), (20 * number, 100, 50)).save(folder / f"{number}.jpg")
    return folder


def test_encode(tmp_path: Path) -> None:
    pictures = photographs(tmp_path / "pictures", 9)
    options = ("--pictures", pictures, "--count", 8, "--small", 0, "--large", 0, "--runs", 1)
    ours = ("--models", "mini", "--engines", "onnxruntime", "--cache", tmp_path / "cache")
    record = run_benchmark("encode", *options, *ours, folder=tmp_path / "out", plots=[""])
    (found,) = record["numbers"]["sets"]
    assert (found["files"], found["files_in_part"], found["pixels"]) == (8, 2, [96, 64])
    (tool,) = found["tools"]
    assert (tool["tool"], tool["model"], tool["engine"]) == ("retriever", "mini", "ONNX Runtime")
    assert tool["pictures_per_s_with_start"] > 0
    assert tool["limit_per_s"] > 0
    (limit,) = tool["limits"]
    assert limit["pictures"] == 8
    assert min(value for name, value in limit.items() if name.endswith("_s")) > 0
    assert record["numbers"]["left_out"] == {}


def test_work_and_start_are_told_apart() -> None:
    import encode

    files = encode.Files("a set", Path(), Path(), 8, 2, (96, 64), 0.1, "")
    # Three more pictures take 1.5 s and 0.75 s of CPU time; the rest is there before the first.
    rounds = [{"part": {"wall_s": 2.0, "cpu_s": 3.0}, "whole": {"wall_s": 5.0, "cpu_s": 4.5}}]
    assert encode.rates_of(rounds, files) == {
        "work": [2.0],
        "whole": [1.6],
        "cpu_ms": [250.0],
        "start_s": [1.0],
    }


def test_of_two_ratios_to_a_peer_the_lesser_one_counts() -> None:
    import encode

    def tool(name: str, model: str, work: float, whole: float, cpu_ms: float) -> dict[str, Any]:
        rates = {"work": [work, work], "whole": [whole, whole]}
        return {"tool": name, "model": model, "rates": rates, "cpu_ms": cpu_ms}

    tools = [tool("retriever", "mini", 70.0, 50.0, 4.0), tool("rclip", "ViT-B-32-256", 10, 10, 80)]
    (bar,) = encode.bars_of([{"name": "as they are", "tools": tools}])
    assert bar["values"] == [7.0, 5.0]
    assert bar["by_cpu"] == 20.0
    assert not bar["met"]


def test_the_limit_has_decoding_to_the_pixels_of_the_model_as_workers_do_it(tmp_path: Path) -> None:
    import encode

    # 1 ms + 3 ms on so many cores; a GPU is fed by all of them, or waits for itself.
    found = {"decode_cpu_s": 0.001, "forward_cpu_s": 0.003, "forward_wall_s": 0.01}
    assert encode.limit_of(found, "cpu") == pytest.approx(cores() / 0.004)
    assert encode.limit_of(found, "cuda") == pytest.approx(100)
    (path,) = photographs(tmp_path / "one", 1).iterdir()
    plain, enlarged = (
        encode.decode_cpu([encode._Wish(path, *how)] * 8)
        for how in ((96, None), (None, Preprocessing(2000, "squash", "bicubic")))
    )
    assert enlarged > 5 * plain > 0  # 4 million pixels beside six thousand


def test_made_pictures_have_the_size_asked_for_and_are_kept(tmp_path: Path) -> None:
    import encode

    sources = sorted(photographs(tmp_path / "pictures", 2).iterdir())
    made = encode.made_pictures(sources, 3, (64, 48), 4.0, 0, tmp_path)
    assert len({path.read_bytes() for path in made}) == 3
    for path in made:
        with Image.open(path) as picture:
            assert (picture.size, picture.format) == ((64, 48), "JPEG")
    written = [path.stat().st_mtime_ns for path in made]
    again = encode.made_pictures(sources, 3, (64, 48), 4.0, 0, tmp_path)
    assert again == made
    assert [path.stat().st_mtime_ns for path in again] == written


@pytest.mark.skipif(sys.platform != "linux", reason="nothing tells it elsewhere")
def test_the_memory_of_children_and_their_children_counts_together() -> None:
    import encode

    hold = "import time; x = bytearray(b'x') * 100_000_000; time.sleep(1)"
    both = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {hold!r}]); {hold}"
    with encode.peak_of_children() as peak:
        report.run_process(python(both))
    assert 200 < (peak() or 0) < 400


def test_a_tool_that_skips_pictures_is_an_error(tmp_path: Path) -> None:
    import encode
    from peers import Call

    whole, part = (photographs(tmp_path / name, 2) for name in ("whole", "part"))
    files = encode.Files("a set", whole, part, 2, 2, (96, 64), 0.1, "")
    tool = encode.Tool("lazy", "none", "none", lambda *_: Call(python("pass")), lambda _: 1)
    with pytest.raises(RuntimeError, match="wrote 1 embeddings of 2 pictures"):
        encode.measure(tool, files, tmp_path)


def test_rclip_shares_its_models_and_starts_without_a_database(tmp_path: Path) -> None:
    from peers import RCLIP_FOLDER, Rclip

    towers = tmp_path / "cache" / "rclip-models" / RCLIP_FOLDER
    towers.mkdir(parents=True)
    (towers / "visual.onnx").write_bytes(b"a tower")
    place = tmp_path / "place"
    call = Rclip(tmp_path / "cache").index(tmp_path, place)
    assert call.env["RCLIP_DATADIR"] == str(place)
    assert call.cwd == tmp_path
    assert (place / RCLIP_FOLDER / "visual.onnx").read_bytes() == b"a tower"
    assert not (place / "db.sqlite3").exists()


def test_a_peer_that_cannot_be_installed_is_told_in_a_sentence(tmp_path: Path) -> None:
    import peers

    (tmp_path / "nobody").write_text("a file where its folder would be")
    with pytest.raises(peers.PeerError, match=r"nobody: .*Not a directory"):
        peers.install("nobody", [["no-such-thing"]], [], tmp_path, lambda _: None)


def test_cold_start(tmp_path: Path) -> None:
    options = ("--sizes", "20", "--runs", 1, "--no-peers", "--folder", tmp_path)
    record = run_benchmark("cold_start", *options, folder=tmp_path / "out", plots=[""])
    (found,) = record["numbers"]["sizes"]
    assert found["pictures"] == 20
    assert {"import click", "retriever --help", "retriever, text"} < set(found["commands"])
    for spread in found["commands"].values():
        assert spread["cpu_s"]["median"] > 0
        assert spread["peak_mb"]["median"] > 10
    assert {bar["beside"] for bar in record["numbers"]["bars"]} == {
        "import click",
        "import numpy, faiss, onnxruntime, click",
    }
    assert not list(tmp_path.glob("cold-*")), "libraries are deleted"


def test_a_query_without_answers_is_an_error(tmp_path: Path) -> None:
    import cold_start
    from peers import Call

    commands = {cold_start.TEXT_QUERY: Call(python("print('one')"))}
    cold_start.check_answers(commands, 1, tmp_path / "said.txt")
    with pytest.raises(RuntimeError, match="1 answers where 10 were expected"):
        cold_start.check_answers(commands, 10, tmp_path / "said.txt")


def test_sizes_are_numbers_with_commas_between_them() -> None:
    @click.command()
    @report.sizes_option("--sizes", (10, 200), "Some.", least=2)
    def command(sizes: tuple[int, ...]) -> None:
        click.echo(sizes)

    def said(*arguments: str) -> str:
        return CliRunner().invoke(command, arguments).output

    assert said() == "(10, 200)\n"
    assert said("--sizes", "30,5,30") == "(5, 30)\n"
    assert "at least 2" in said("--sizes", "1,2")
    assert "commas between them, as 10,200" in said("--sizes", "many")


def test_slopes_are_those_of_the_upper_sizes() -> None:
    import scale

    # Constant up to a thousand, then in step.
    costs = {10: 5.0, 1_000: 5.0, 10_000: 50.0, 100_000: 500.0}
    made_up = [{"pictures": size, "disk_mb": cost} for size, cost in costs.items()]
    everything = {
        "query": {kind: {"p50_ms": 1.0} for kind in ("exact", "automatic")},
        "cold": {key: {"median": 1.0} for key in ("cpu_s", "peak_mb")},
    }
    numbers = {"files": [], "made_up": [one | everything for one in made_up]}
    slopes = scale.slopes_of(numbers)
    assert slopes["library on disk"] == 1.0
    assert slopes["query, exact"] == 0.0
    assert "index" not in slopes
    numbers["made_up"] = [{"pictures": n, "disk_mb": n**0.5, **everything} for n in (1, 10_000)]
    assert scale.slopes_of(numbers)["library on disk"] == 0.5


def test_serve(tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="needs the extra [web]")
    colours = [*COLOURS, *COLOURS]
    for number, colour in enumerate(colours):
        picture = paint(tmp_path / "set" / f"{number}.png", colour, side=8 + number)
        picture.with_suffix(".txt").write_text(f"{colour} number {number}", encoding="utf-8")
    options = ["--questions", 5, "--clients", 3, "--seconds", 1, "--new-pictures", 3, "--runs", 1]
    record = run_benchmark("serve", tmp_path / "set", *options, folder=tmp_path)
    numbers = record["numbers"]
    assert numbers["pictures"] == len(colours)
    assert numbers["one_client"]["answers"] == 5
    assert numbers["clients"]["answers"] > 3
    assert numbers["clients"]["errors"] == numbers["while_indexing"]["errors"] == 0
    assert numbers["shell"]["same"]
    assert {one["what"] for one in numbers["bars"]} >= {"p50 of one client, ms"}


def test_serve_without_the_data_is_no_failure(tmp_path: Path) -> None:
    assert "skipped" in run_script("serve", tmp_path / "nowhere").stderr
