"""The command line on a library of painted pictures, with the bundled encoder itself."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from conftest import paint
from tiny_models import write_checkpoint

import cli
from retriever import channels, finding, terminal

ROOT = Path(cli.__file__).parent
COMMANDS = sorted(cli.main.commands)
# What `--help` may not load: each of these costs more than click itself.
HEAVY = {"numpy", "PIL", "torch", "onnxruntime", "faiss", "sqlalchemy", "tokenizers", "open_clip"}


def run(*args: str | Path, library: Path | None = None) -> Result:
    env = {"RETRIEVER_LIBRARY": str(library)} if library else {}
    return CliRunner().invoke(cli.main, [str(arg) for arg in args], env=env)


def lines(result: Result) -> list[dict[str, object]]:
    """The JSON objects that a command printed."""
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for colour in ("red", "green", "blue"):
        paint(folder / f"{colour}.png", colour, side=32)
        (folder / f"{colour}.txt").write_text(f"a {colour} square\n", encoding="utf-8")
    paint(folder / "white.png", "white", side=32)
    return folder


@pytest.fixture(scope="module")
def library(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library of `pictures` that tests only read."""
    path = tmp_path_factory.mktemp("libraries") / "read.lib"
    result = run("index", pictures, "--library", path)
    assert result.exit_code == 0, result.output
    return path


# ── help, usage, errors ──────────────────────────────────────────────────────────────────────────


def test_help_of_any_command_loads_nothing_heavy() -> None:
    calls = [[], *([name] for name in COMMANDS), ["models", "prepare"], ["models", "average"]]
    code = (
        "import sys, json, cli\n"
        "for args in json.loads(sys.argv[1]):\n"
        "    try: cli.main([*args, '--help'])\n"
        "    except SystemExit as exit: assert exit.code == 0\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(calls)], capture_output=True, check=True, text=True
    )
    assert HEAVY.isdisjoint(json.loads(done.stdout.splitlines()[-1]))


def test_defaults_of_answers_wanted_are_those_of_the_library() -> None:
    import inspect

    from retriever.library import Library
    from retriever.models import DEFAULT_MODEL

    default = inspect.signature(Library.create).parameters["encoder"].default
    assert cli.DEFAULT_MODEL == DEFAULT_MODEL == default
    asking = ((finding.search, Library.search), (finding.caption, Library.captions_for))
    for command, method in asking:
        defaults = {option.name: option.default for option in command.params}
        signature = inspect.signature(method).parameters
        assert defaults["k"] == signature["k"].default
    defaults = {option.name: option.default for option in finding.search.params}
    assert finding.MODES == channels.MODES
    for name in ("text_weight", "image_weight"):
        assert defaults[name] == inspect.signature(Library.search).parameters[name].default


@pytest.mark.parametrize(
    "args",
    [
        ["index", "nowhere"],
        ["search"],
        ["search", " "],
        ["search", "cat", "--image", "nowhere.jpg"],
        ["search", "cat", "--paths", "--json"],
        ["search", "cat", "-k", "0"],
        ["caption", "nowhere.jpg"],
        ["caption"],
        ["remove"],
        ["evaluate", "nowhere"],
        ["train", "."],
        ["models", "prepare", "."],
        ["models", "average", "-o", "mean.ckpt"],
        ["models", "average", "a.ckpt", "-o", "mean.ckpt", "--weights", "one"],
        ["bogus"],
    ],
)
def test_wrong_usage_exits_with_2_and_says_why(args: list[str], library: Path) -> None:
    result = run(*args, library=library)
    assert result.exit_code == 2
    assert "Error: " in result.stderr
    assert result.stdout == ""


def test_wrong_usage_that_the_library_finds_exits_with_2(library: Path, pictures: Path) -> None:
    image = pictures / "red.png"
    zero = ["--text-weight", "0", "--image-weight", "0"]
    result = run("search", "red", "--image", image, *zero, library=library)
    assert result.exit_code == 2
    assert "weights" in result.stderr


def test_missing_library_is_one_sentence_with_the_way_out(tmp_path: Path) -> None:
    for args in (["search", "cat"], ["info"], ["verify"], ["repair"], ["remove", "x.jpg"]):
        result = run(*args, "--library", tmp_path / "none.lib")
        assert result.exit_code == 1
        assert result.stderr.count("\n") == 1
        assert "none.lib" in result.stderr
        assert "retriever index FOLDER" in result.stderr


def test_unknown_model_is_one_sentence_and_leaves_no_library(
    pictures: Path, tmp_path: Path
) -> None:
    path = tmp_path / "new.lib"
    result = run("index", pictures, "--library", path, "--model", "bogus")
    assert result.exit_code == 1
    assert "bogus" in result.stderr
    assert not path.exists()


def test_a_second_model_lives_beside_the_first_until_it_is_dropped(
    pictures: Path, tmp_path: Path
) -> None:
    library, other = tmp_path / "two.lib", tmp_path / "other"
    checkpoint = write_checkpoint(tmp_path / "tiny.ckpt")
    prepared = run("models", "prepare", checkpoint, "-o", other)
    assert f"to use it: --model {other}" in prepared.stdout
    run("index", pictures, library=library)
    refused = run("search", "red", "--model", other, library=library)
    assert refused.exit_code == 1
    assert "was made with mini" in refused.stderr
    assert "4 updated" in run("index", "--model", other, library=library).stdout
    mini = run("search", "red", "--json", library=library).stdout
    theirs = run("search", "red", "--model", other, "--json", library=library).stdout
    assert mini != theirs != ""
    assert f"Beside    {other}" in run("info", library=library).stdout
    refused = run("models", "--drop", "mini", library=library)
    assert refused.exit_code == 2
    assert "default model" in refused.stderr
    assert "is the default model" in run("models", "--use", other, library=library).stdout
    assert run("search", "red", "--json", library=library).stdout == theirs
    assert run("search", "red", "--model", "mini", "--json", library=library).stdout == mini
    assert "7 embeddings of mini" in run("models", "--drop", "mini", library=library).stdout
    assert run("search", "red", "--model", "mini", library=library).exit_code == 1
    assert run("verify", library=library).exit_code == 0


# ── index ────────────────────────────────────────────────────────────────────────────────────────


def test_index_says_what_it_did_and_then_that_nothing_is_to_do(
    pictures: Path, tmp_path: Path
) -> None:
    path = tmp_path / "new.lib"
    first = run("index", pictures, library=path)
    assert first.exit_code == 0
    assert first.stdout.startswith("4 added in ")
    assert first.stdout.endswith(f": {path} has 4 pictures and 3 captions\n")
    assert "MobileCLIP2-S0/dfndr2b" in first.stderr
    again = run("index", pictures, library=path)
    assert again.exit_code == 0
    assert again.stdout.startswith("4 unchanged, nothing to do in ")
    assert again.stderr == ""


def test_index_as_json(pictures: Path, tmp_path: Path) -> None:
    (record,) = lines(run("index", pictures, "--library", tmp_path / "new.lib", "--json"))
    assert record.pop("seconds") > 0  # type: ignore[operator]
    assert record == {
        "added": 4,
        "updated": 0,
        "moved": 0,
        "removed": 0,
        "unchanged": 0,
        "failed": [],
        "problems": [],
        "interrupted": False,
        "library": str(tmp_path / "new.lib"),
    }


def test_one_bad_picture_is_named_and_exits_with_3(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    paint(folder / "red.png", "red")
    (folder / "broken.jpg").write_bytes(b"no picture at all")
    path = tmp_path / "new.lib"
    result = run("index", folder, library=path)
    assert result.exit_code == cli.SOME_FILES_FAILED == 3
    assert result.stdout.startswith("1 added, 1 failed in ")
    assert str(folder / "broken.jpg") in result.stderr
    result = run("index", folder, "--json", library=path)
    assert result.exit_code == 3
    (failure,) = json.loads(result.stdout)["failed"]
    assert failure["path"] == str(folder / "broken.jpg")
    assert "2, 1 of them could not be read" in run("info", library=path).stdout
    shown = run("info", "--failures", library=path).stdout
    assert shown == f"{failure['path']}: {failure['reason']}\n"
    assert lines(run("info", "--failures", "--json", library=path)) == [failure]


def test_dry_run_reports_captions_and_makes_no_library(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    for colour in ("red", "green", "blue"):
        paint(folder / f"{colour}.png", colour)
    (folder / "red.txt").write_text("a red square\nall red\n", encoding="utf-8")
    rows = [
        {"file": "green.png", "caption": "green"},
        {"file": "pink.png", "caption": "pink"},
    ]
    text = "\n".join(json.dumps(row) for row in rows)
    (folder / "captions.jsonl").write_text(text, encoding="utf-8")
    path = tmp_path / "none.lib"
    shown = run("index", folder, "--dry-run", library=path)
    assert shown.exit_code == 0
    head, total, *sources = shown.stdout.splitlines()[:4]
    assert head == "3 pictures, 2 of them with captions"
    assert total == "3 captions"
    assert set(sources) == {"  2 from sidecar", "  1 from captions.jsonl"}
    assert "pink.png" in shown.stdout
    (record,) = lines(run("index", folder, "--dry-run", "--json", library=path))
    assert record["with_captions"] == 2
    assert record["by_source"] == {"sidecar": 2, "captions.jsonl": 1}
    assert len(record["unmatched"]) == 1  # type: ignore[arg-type]
    assert not path.exists()


def test_captions_from_elsewhere_are_taken(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    paint(folder / "red.png", "red")
    table = tmp_path / "elsewhere.csv"
    table.write_text("file,caption\nred.png,as red as can be\n", encoding="utf-8")
    path = tmp_path / "new.lib"
    assert run("index", folder, "--captions", table, library=path).exit_code == 0
    assert "as red as can be" in run("search", "red", library=path).stdout


# ── search, caption ──────────────────────────────────────────────────────────────────────────────


def test_search_by_text_shows_score_path_and_caption(library: Path, pictures: Path) -> None:
    result = run("search", "a red square", "-k", "2", library=library)
    assert result.exit_code == 0
    rank, score, path = result.stdout.splitlines()[0].split(maxsplit=2)
    assert rank == "1"
    assert 0 < float(score) <= 1
    assert Path(path) == pictures / "red.png"
    assert result.stdout.splitlines()[1].strip() == "a red square"


def test_words_need_no_quotes(library: Path) -> None:
    quoted = run("search", "a red square", library=library)
    assert run("search", "a", "red", "square", library=library).stdout == quoted.stdout


def test_search_as_json_has_the_documented_fields(library: Path, pictures: Path) -> None:
    hits = lines(run("search", "--image", pictures / "blue.png", "--json", library=library))
    assert [hit["rank"] for hit in hits] == [1, 2, 3, 4]
    keys = {"rank", "score", "confidence", "path", "caption", "id", "duplicates"}
    assert all(set(hit) == keys for hit in hits)
    assert hits[0]["path"] == str(pictures / "blue.png")
    assert hits[0]["score"] == pytest.approx(1, abs=2e-3)  # float16 in the store
    assert {hit["path"]: hit["caption"] for hit in hits}[str(pictures / "white.png")] is None
    assert hits == sorted(hits, key=lambda hit: -float(hit["score"]))  # type: ignore[arg-type]


def test_search_by_text_and_picture_follows_the_weights(library: Path, pictures: Path) -> None:
    def first(*weights: str) -> object:
        asked = ["search", "a red square", "--image", pictures / "blue.png", "--json", "-k", "1"]
        return lines(run(*asked, *weights, library=library))[0]["path"]

    assert first("--text-weight", "0.01") == str(pictures / "blue.png")
    assert first("--image-weight", "0.01") == str(pictures / "red.png")


def test_a_picture_named_in_the_text_has_the_weight_of_the_text(
    library: Path, pictures: Path
) -> None:
    def first(*weights: str) -> object:
        asked = [f"{pictures / 'red.png'} + a red square", "--image", pictures / "blue.png"]
        result = run("search", *asked, "--json", "-k", "1", *weights, library=library)
        return lines(result)[0]["path"]

    assert first("--text-weight", "0.01") == str(pictures / "blue.png")
    assert first("--image-weight", "0.01") == str(pictures / "red.png")


def test_paths_are_printed_alone(library: Path, pictures: Path) -> None:
    result = run("search", "blue", "--paths", "-k", "4", library=library)
    assert sorted(result.stdout.splitlines()) == sorted(map(str, pictures.glob("*.png")))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_name_cannot_steer_the_terminal_nor_break_a_list_of_paths(tmp_path: Path) -> None:
    folder, path = tmp_path / "pictures", tmp_path / "new.lib"
    name = "red\x1b[31m\nline\u202e.png"
    paint(folder / name, "red").with_suffix(".txt").write_text("red \u202etac a", encoding="utf-8")
    assert run("index", folder, library=path).exit_code == 0
    shown = run("search", "red", library=path).stdout
    assert r"red\x1b[31m\nline\u202e.png" in shown
    assert not set(shown) & {"\x1b", "\u202e"}
    told = run("search", "red", "--paths", "--null", library=path).stdout_bytes
    assert told == os.fsencode(folder / name) + b"\0"
    assert run("search", "red", "--null", library=path).exit_code == 2


def test_weights_are_numbers(library: Path) -> None:
    result = run("search", "red", "--text-weight", "nan", library=library)
    assert result.exit_code == 2
    assert "finite number" in result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_name_that_is_no_text_round_trips(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    name = os.fsencode(folder) + b"/caf\xe9.png"
    Path(os.fsdecode(name)).write_bytes(paint(tmp_path / "red.png", "red").read_bytes())
    path = tmp_path / "new.lib"
    assert run("index", folder, library=path).exit_code == 0
    assert run("search", "red", "--paths", library=path).stdout_bytes == name + b"\n"
    (hit,) = lines(run("search", "red", "--json", library=path))
    assert os.fsencode(str(hit["path"])) == name
    assert "caf\\xe9.png" in run("search", "red", library=path).stdout


def test_caption_finds_the_words_for_a_picture(library: Path, pictures: Path) -> None:
    hits = lines(run("caption", pictures / "red.png", "--json", library=library))
    assert all(set(hit) == {"rank", "score", "caption", "path", "id"} for hit in hits)
    assert hits[0]["caption"] == "a red square"
    assert hits[0]["path"] == str(pictures / "red.png")
    shown = run("caption", pictures / "red.png", "-k", "1", library=library).stdout
    assert shown.splitlines()[0].split(maxsplit=2)[2] == "a red square"


def test_unreadable_query_picture_is_one_sentence(library: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8 not more")
    for args in (["search", "--image", broken], ["caption", broken]):
        result = run(*args, library=library)
        assert result.exit_code == 1
        assert "broken.jpg" in result.stderr


def test_empty_library_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    path = tmp_path / "new.lib"
    assert run("index", folder, library=path).exit_code == 0
    result = run("search", "cat", library=path)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "no pictures" in result.stderr


def test_threads_and_device_give_the_same_answers(library: Path) -> None:
    plain = run("search", "green", "--json", library=library)
    told = run("search", "green", "--json", "--threads", "1", "--device", "cpu", library=library)
    for one, two in zip(lines(plain), lines(told), strict=True):
        assert one["path"] == two["path"]
        assert one["score"] == pytest.approx(two["score"], abs=1e-4)


def test_index_and_queries_with_mini_import_neither_torch_nor_open_clip(
    pictures: Path, tmp_path: Path
) -> None:
    image = str(pictures / "red.png")
    calls = [
        ["index", str(pictures)],
        ["search", "red"],
        ["search", "--image", image],
        ["caption", image],
        ["evaluate", str(pictures)],
        ["info"],
        ["verify"],
        ["models"],
    ]
    code = (
        "import sys, json, cli\n"
        "for args in json.loads(sys.argv[1]):\n"
        "    try: cli.main(args)\n"
        "    except SystemExit as exit: assert not exit.code, args\n"
        "assert not {'torch', 'open_clip', 'timm', 'transformers'} & set(sys.modules)"
    )
    env = os.environ | {"RETRIEVER_LIBRARY": str(tmp_path / "new.lib")}
    command = [sys.executable, "-c", code, json.dumps(calls)]
    done = subprocess.run(command, capture_output=True, check=False, text=True, env=env)
    assert done.returncode == 0, done.stderr


# ── looking after a library ──────────────────────────────────────────────────────────────────────


def test_info_as_json_has_the_documented_fields(library: Path) -> None:
    (facts,) = lines(run("info", "--json", library=library))
    assert set(facts) == {
        *("items", "captions", "failures", "model", "models"),
        *("generation", "index", "size_bytes", "answers"),
    }
    assert (facts["items"], facts["captions"], facts["failures"]) == (4, 3, 0)
    assert facts["model"]["name"] == "mini"  # type: ignore[index]
    shown = run("info", library=library).stdout
    assert str(library) in shown
    assert "Captions  3" in shown
    assert "4 image vectors, exact\n" in shown
    assert "to scan 4 vectors of 384 is to read 0.0 MB" in shown


def test_optimize_sets_how_a_library_is_searched(pictures: Path, tmp_path: Path) -> None:
    path = tmp_path / "new.lib"
    run("index", pictures, library=path)
    (facts,) = lines(run("optimize", "--json", library=path))
    assert facts["built"] == []
    assert set(facts["index"]) == {"image", "caption"}  # type: ignore[call-overload]
    shown = run("optimize", "--exact", library=path).stdout
    assert "exact search was asked for; `retriever optimize` lets the library decide" in shown
    assert "asked for" in run("info", library=path).stdout
    assert "asked for" not in run("optimize", "--memory", "1.5 GiB", library=path).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "much"], "'much' is no size such as 500MB or 2GB"),
        (["--memory", "5 parsecs"], "is no size"),
        (["--memory", "9" * 18 + "GB"], "no machine has that much"),
        (["--memory", "9" * 400 + "GB"], "no machine has that much"),
        (["--overlap", "0"], "0"),
        (["--overlap", "1.5"], "1.5"),
    ],
)
def test_optimize_names_the_option_that_is_wrong(
    library: Path, arguments: list[str], message: str
) -> None:
    result = run("optimize", *arguments, library=library)
    assert result.exit_code == 2
    assert message in result.stderr


def test_verify_finds_a_torn_index_and_repair_mends_it(pictures: Path, tmp_path: Path) -> None:
    path = tmp_path / "new.lib"
    assert run("index", pictures, library=path).exit_code == 0
    assert run("verify", library=path).exit_code == 0
    assert lines(run("verify", "--json", library=path)) == [
        {"clean": True, "problems": [], "notes": []}
    ]
    for file in path.glob("*.faiss"):
        file.write_bytes(file.read_bytes()[:-7])
    result = run("verify", library=path)
    assert result.exit_code == 1
    assert result.stdout
    assert "retriever repair" in result.stderr
    assert "made anew" in run("repair", library=path).stdout
    assert run("verify", library=path).exit_code == 0


def test_removed_picture_is_never_found(pictures: Path, tmp_path: Path) -> None:
    path = tmp_path / "new.lib"
    assert run("index", pictures, library=path).exit_code == 0
    assert lines(run("remove", pictures / "red.png", "--json", library=path)) == [{"removed": 1}]
    assert "red.png" not in run("search", "a red square", library=path).stdout
    assert (pictures / "red.png").is_file()
    result = run("remove", pictures / "red.png", library=path)
    assert result.exit_code == 2
    assert run("remove", pictures, library=path).stdout.startswith("3 removed")


# ── models, training, measuring ──────────────────────────────────────────────────────────────────


def test_models_lists_the_default_and_its_stronger_sisters() -> None:
    records = lines(run("models", "--json"))
    assert [record["name"] for record in records if record["default"]] == ["mini"]
    table = run("models").stdout
    for record in records:
        assert str(record["name"]) in table
    assert table.splitlines()[1].split()[:3] == ["*", "mini", "bundled"]


def test_checkpoints_are_averaged(tmp_path: Path) -> None:
    folders = [write_checkpoint(tmp_path / f"{seed}.ckpt", seed=seed) for seed in range(2)]
    mean = tmp_path / "mean.ckpt"
    told = run("models", "average", *folders, "-o", mean)
    assert "the mean of 2 checkpoints is in" in told.stdout
    (record,) = lines(run("models", "average", *folders, "-o", mean, "--weights", "3,1", "--json"))
    assert record == {"folder": str(mean), "checkpoints": [*map(str, folders)]}
    refused = run("models", "average", folders[0], tmp_path / "nowhere", "-o", mean)
    assert refused.exit_code == 1
    assert "nowhere" in refused.stderr


def test_checkpoint_is_listed_prepared_and_used(pictures: Path, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "models" / "tiny.ckpt")
    prepared = tmp_path / "models" / "tiny"
    (report,) = lines(run("models", "prepare", checkpoint, "-o", prepared, "--json"))
    assert report["folder"] == str(prepared)
    assert report["image_bytes"] == (prepared / "image.onnx").stat().st_size
    assert float(report["text_cosine_error"]) < 1e-3  # type: ignore[arg-type]
    found = lines(run("models", "--folder", tmp_path / "models", "--json"))
    kinds = {record["name"]: record["kind"] for record in found}
    assert kinds[str(prepared)] == "onnx"
    assert kinds[str(checkpoint)] == "checkpoint"
    path = tmp_path / "new.lib"
    result = run("index", pictures, "--model", prepared, library=path)
    assert result.exit_code == 0, result.output
    assert "MobileCLIP2" not in result.stderr
    assert len(lines(run("search", "red", "--json", library=path))) == 4


def test_not_a_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = run("models", "prepare", tmp_path / "empty", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "empty" in result.stderr
    assert not (tmp_path / "out").exists()


def _training_folder(folder: Path) -> Path:
    for number in range(12):
        colour = ("red", "green", "blue")[number % 3]
        paint(folder / f"{number}.png", colour, side=8 + number)
        (folder / f"{number}.txt").write_text(f"a {colour} square\n", encoding="utf-8")
    return folder


TINY: Sequence[str] = (
    *("--image-size", "32", "--dim", "16", "--epochs", "2", "--batch-size", "4"),
    *("--captions-per-picture", "1", "--device", "cpu"),
)


def test_train_prints_an_epoch_a_line_and_its_checkpoint_works(tmp_path: Path) -> None:
    folder = _training_folder(tmp_path / "pairs")
    out, cache = tmp_path / "my.ckpt", tmp_path / "cache"
    result = run("train", folder, "-o", out, "--cache", cache, *TINY)
    assert result.exit_code == 0, result.output
    header, first, second, last = result.stdout.splitlines()
    assert "t2i R@1/5/10" in header
    assert [line.split()[0] for line in (first, second)] == ["1", "2"]
    assert len(first) == len(header)
    assert last.startswith(f"{out}: epoch ")
    measured = lines(run("evaluate", folder, "--model", out, "--json"))
    assert measured[0]["model"]["dim"] == 16  # type: ignore[index]


def test_train_as_json_is_one_record_an_epoch(tmp_path: Path) -> None:
    folder = _training_folder(tmp_path / "pairs")
    out, cache = tmp_path / "my.ckpt", tmp_path / "cache"
    records = lines(run("train", folder, "-o", out, "--cache", cache, *TINY, "--json"))
    assert [record["epoch"] for record in records] == [0, 1]
    assert "t2i_r@1" in records[0]["metrics"]  # type: ignore[operator]
    assert records == json.loads((out / "log.json").read_text("utf-8"))


def test_every_training_setting_is_an_option() -> None:
    from dataclasses import asdict

    from retriever.settings import TrainConfig

    options = {option.name: option.default for option in cli.train.params}
    for name, default in asdict(TrainConfig()).items():
        assert options[name] == default


def test_settings_that_contradict_each_other_exit_with_2(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "my.ckpt"
    result = run("train", pictures, "-o", out, "--text-tower", "gru", "--text-weights", tmp_path)
    assert result.exit_code == 2
    assert "text_tower" in result.stderr


def test_evaluate_prints_a_table_one_record_and_every_rank(pictures: Path, tmp_path: Path) -> None:
    ranks = tmp_path / "ranks.jsonl"
    shown = run("evaluate", pictures, "--per-query", ranks)
    assert shown.exit_code == 0
    assert "R@10" in shown.stdout
    queries = [json.loads(line) for line in ranks.read_text("utf-8").splitlines()]
    assert [one["query"] for one in queries] == ["t2i"] * 3 + ["i2t"] * 3
    (record,) = lines(run("evaluate", pictures, "--json", "--through-index"))
    names = [f"{way}_{m}" for way in ("t2i", "i2t") for m in ("r@1", "r@5", "r@10", "medr")]
    assert {*names, "rsum"} <= set(record["metrics"])  # type: ignore[arg-type]
    assert record["dataset"]["captions"] == 3  # type: ignore[index]
    assert record["index"]["metrics"]["t2i_r@5"] == 100  # type: ignore[index]
    best = sum(one["rank"] == 0 for one in queries if one["query"] == "t2i")
    assert record["metrics"]["t2i_r@1"] == pytest.approx(100 * best / 3)  # type: ignore[index]


def test_evaluate_leaves_out_what_it_cannot_read_and_exits_with_3(tmp_path: Path) -> None:
    folder = _training_folder(tmp_path / "pairs")
    (folder / "3.png").write_bytes(b"")
    result = run("evaluate", folder)
    assert result.exit_code == 3
    assert "3.png" in result.stdout


# ── progress ─────────────────────────────────────────────────────────────────────────────────────


def test_nothing_is_drawn_unless_stderr_is_a_terminal(pictures: Path, tmp_path: Path) -> None:
    result = run("index", pictures, "--library", tmp_path / "new.lib")
    assert "\r" not in result.stderr
    assert "\x1b" not in result.stderr


def test_bar_shows_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    bar = terminal.Progress("Indexing", "pictures")
    bar(0, 400)
    assert bar.line(0) == "Indexing [--------------------] 0 of 400 pictures"
    bar(100, 400)
    expected = "Indexing [#####---------------] 100 of 400 pictures, 50/s, 6 s left"
    assert bar.line(2) == expected
    monkeypatch.setenv("COLUMNS", "40")
    assert bar.line(2) == expected[:39]


def test_bar_starts_anew_with_every_epoch() -> None:
    bar = terminal.Progress("Training", "steps")
    bar(7, 7)
    bar(1, 7)
    bar(3, 7)
    assert bar.line(1).endswith("3 of 7 steps, 2/s, 2 s left")


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.2, "0 s"), (59.4, "59 s"), (61, "1 min 1 s"), (3600, "1 h 0 min"), (7325, "2 h 2 min")],
)
def test_durations_read_well(seconds: float, shown: str) -> None:
    assert terminal.duration(seconds) == shown


def as_program(*args: str | Path, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """The command in a process of its own, which ends without taking its libraries apart."""
    program = [sys.executable, "-c", "import cli; cli.main()", *map(str, args)]
    return subprocess.run(program, cwd=ROOT, check=False, stderr=subprocess.PIPE, **options)


def test_a_program_prints_everything_before_it_ends(library: Path) -> None:
    arguments = ("search", "red", "-k", "4", "--json", "--library", library)
    result = as_program(*arguments, stdout=subprocess.PIPE)
    assert result.returncode == 0
    assert result.stdout.decode() == run(*arguments).stdout


@pytest.mark.parametrize(("arguments", "status"), [(["--version"], 0), (["serch"], 2)])
def test_a_program_ends_with_the_status_of_its_command(arguments: list[str], status: int) -> None:
    assert as_program(*arguments, stdout=subprocess.DEVNULL).returncode == status


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["search", "red"], ["models"], ["--version"], ["--help"]])
def test_results_that_cannot_be_written_are_a_failure(
    library: Path, arguments: list[str], unbuffered: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    monkeypatch.setenv("RETRIEVER_LIBRARY", str(library))
    with Path("/dev/full").open("wb") as full:
        result = as_program(*arguments, stdout=full)
    assert result.returncode == 1
    said = result.stderr.decode()
    assert said.count("\n") == said.count("No space left on device") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="no such shell")
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_program_whose_streams_are_closed_does_its_work(library: Path, closed: str) -> None:
    for arguments in ("--version", f"info --json --library '{library}'"):
        program = f"'{sys.executable}' -c 'import cli; cli.main()' {arguments} {closed}"
        result = subprocess.run(program, shell=True, cwd=ROOT, check=False, capture_output=True)
        assert result.returncode == 0, result.stderr
        assert result.stderr == b""
        assert bool(result.stdout) == (closed == "2>&-")
