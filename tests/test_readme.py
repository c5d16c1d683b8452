"""What the README and the help say is true: commands parse, files exist, its Python runs."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from conftest import COLOURS, paint

from cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCES = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def walk(command: click.Command, name: str = "retriever") -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        for child, inner in command.commands.items():
            yield from walk(inner, f"{name} {child}")


COMMANDS = dict(walk(main))


def command_lines(text: str) -> list[str]:
    """The lines that call `retriever`, without a prompt, a pipe, or the folder it lies in."""
    lines = text.replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in line.removeprefix("$ ").split("&&")]
    found = [re.fullmatch(r"\s*(?:\S+/bin/)?(retriever\b(?! +\|).*)", part) for part in parts]
    return [match[1].strip() for match in found if match]


def parse(line: str) -> None:
    """Has click parse a command line, all options and arguments, without running it."""
    words = shlex.split(line, comments=True)
    for operator in {"|", ">"} & set(words):
        words = words[: words.index(operator)]
    command: click.Command = main
    context: click.Context | None = None
    name, *rest = words
    while True:
        is_group = isinstance(command, click.Group)
        context = command.make_context(name, list(rest), parent=context)
        if not is_group:
            return
        rest = [*context._protected_args, *context.args]
        if not rest:
            return
        name, inner, rest = command.resolve_command(context, rest)
        assert inner is not None
        command = inner


@pytest.fixture
def any_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths need not exist for a line to be well formed."""
    monkeypatch.setattr(click.Path, "convert", lambda self, value, param, ctx: Path(value))


SHOWN = [
    line for kind, text in FENCES if kind in ("", "sh", "console") for line in command_lines(text)
]
HELPED = [(name, line) for name, one in COMMANDS.items() for line in command_lines(one.help or "")]


@pytest.mark.parametrize("line", SHOWN)
@pytest.mark.usefixtures("any_path")
def test_each_command_line_of_the_readme_is_well_formed(line: str) -> None:
    parse(line)


@pytest.mark.parametrize(("name", "line"), HELPED)
@pytest.mark.usefixtures("any_path")
def test_each_example_of_the_help_is_well_formed(name: str, line: str) -> None:
    parse(line)


@pytest.mark.usefixtures("any_path")
@pytest.mark.parametrize("line", ["retriever searhc x", "retriever search x --no-such-option"])
def test_a_line_that_is_not_well_formed_would_be_found(line: str) -> None:
    with pytest.raises(click.UsageError):
        parse(line)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_a_sentence_of_help_and_two_examples(name: str) -> None:
    text = COMMANDS[name].help or ""
    assert re.match(r"[A-Z][^\n]*(\n[^\n]+)*[.]\n", text), "begins with a sentence"
    lines = command_lines(text)
    assert len(lines) >= 2
    assert any(line.startswith(name) for line in lines)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_option_has_help(name: str) -> None:
    options = [one for one in COMMANDS[name].params if isinstance(one, click.Option)]
    assert [one.name for one in options if not one.help] == []


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "retriever"])
def test_each_command_stands_in_the_readme(name: str) -> None:
    assert any(line.startswith(name) for line in SHOWN)


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for colour in COLOURS:
        picture = paint(tmp_path / "Pictures" / f"{colour}.png", colour, side=32)
        picture.with_suffix(".txt").write_text(f"a {colour} square", encoding="utf-8")
    paint(tmp_path / "query.jpg", "red", side=32)
    names: dict[str, object] = {}
    blocks = [text for kind, text in FENCES if kind == "python"]
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)


PACKAGES = ("retriever", "retriever/web", "indexes")


def test_the_file_tree_names_each_module_and_only_what_exists() -> None:
    (tree,) = (text for kind, text in FENCES if kind == "text" and "retriever/" in text)
    named: set[str] = set()
    folders: list[str] = []
    for line in tree.splitlines():
        indent, name = re.fullmatch(r"( *)(\S+).*", line).groups()  # type: ignore[union-attr]
        del folders[len(indent) // 2 :]
        named.add("".join(folders) + name)
        folders.append(name)
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    for pattern in (
        "*.py",
        "retriever/*.py",
        "retriever/web/*.py",
        "indexes/*.py",
        "benchmarks/*.*",
    ):
        there = {path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern)}
        assert there - named == set(), pattern


def test_links_to_files_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?!http|#)([^)#]+)", README)
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_there_is_one_line_that_runs_the_tests() -> None:
    # `.ci/run` executes this very line.
    lines = [line for _, text in FENCES for line in text.splitlines() if "-m pytest" in line]
    assert len(lines) == 1
    assert lines[0].startswith("python3 -m venv ")
