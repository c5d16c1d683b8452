"""What every benchmark script shares: measured processes, a table, one JSON record and the page.

A number without its data, settings, seed, machine and versions is no result, so `write_report` asks
for the first three and adds the others itself. What a run printed is kept in its record, and

    python benchmarks/report.py benchmarks/results

puts it into `benchmarks/README.md`, between the markers of each benchmark, so that no figure there
is typed by hand.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from retriever.machine import describe, environment, load_average, percentiles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "environment",
    "fill_page",
    "folder_option",
    "format_table",
    "interleaved",
    "log_log_slope",
    "out_option",
    "percentiles",
    "run_process",
    "sizes_option",
    "write_report",
]

PAGE = Path(__file__).with_name("README.md")
# The command as it is installed, of this working tree, whatever the folder it is called in.
RETRIEVER = (
    *(sys.executable, "-c"),
    f"import sys; sys.path[0] = {str(PAGE.parents[1])!r}; from cli import main; main()",
)
_LOAD_AT_START = load_average()

# A process that is replaced by another program hands its peak memory on to it, so what is measured
# starts from an interpreter that has loaded next to nothing, whatever this one holds.
_LAUNCHER = """
import json, os, sys, time
out, argv = sys.argv[1], sys.argv[2:]
opened = [(os.POSIX_SPAWN_OPEN, 1, out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)]
began = time.perf_counter()
process = os.posix_spawnp(argv[0], argv, os.environ, file_actions=opened)
_, status, used = os.wait4(process, 0)
wall = time.perf_counter() - began
# Kilobytes, but bytes on macOS.
peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps({
    "cpu_s": round(used.ru_utime + used.ru_stime, 4),
    "wall_s": round(wall, 4),
    "peak_mb": round(peak / 1e6, 1),
    "exit": os.waitstatus_to_exitcode(status),
}))
"""


def run_process(
    argv: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    out: Path | None = None,
    check: bool = True,
) -> dict[str, Any]:
    """One run of a program: CPU time of it and of all it waited for, wall time, peak memory.

    Args:
        argv: the program and its arguments; the program is looked for in PATH.
        env: the whole environment; None is this process's.
        cwd: where it runs; None is here.
        out: a file that gets its standard output, which is thrown away otherwise.
        check: whether failing is an error here.

    Returns:
        `cpu_s` (user and system), `wall_s`, `peak_mb` (of the largest single process, 10^6
        bytes, at least the 10 of a bare interpreter) and `exit` (its status, or minus a signal).

    Raises:
        RuntimeError: it ended with another status than 0; the text has the end of its stderr.
    """
    with tempfile.TemporaryFile() as errors:
        target = str(out.absolute()) if out else os.devnull
        launched = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _LAUNCHER, target, *map(str, argv)],
            env=None if env is None else dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            check=False,
        )
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip()
    used: dict[str, Any] = json.loads(launched.stdout) if launched.returncode == 0 else {"exit": -1}
    if (check and used["exit"] != 0) or "cpu_s" not in used:
        line = shlex.join(map(str, argv))
        raise RuntimeError(f"{line} ended with status {used['exit']}: {said[-2000:]}")
    return used


def interleaved(
    commands: Mapping[str, Sequence[str | Path]],
    runs: int,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> dict[str, dict[str, dict[str, float]]]:
    """Several programs in turn, A B C A B C, so that a busy minute of the machine meets them all.

    Returns:
        For each name `cpu_s`, `wall_s` and `peak_mb` as their `min`, `median` and `max`.

    Raises:
        RuntimeError: one of them failed; see `run_process`.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for _ in range(runs):
        for name, argv in commands.items():
            found[name].append(run_process(argv, env=env, cwd=cwd))
    return {
        name: {
            key: _spread([one[key] for one in several]) for key in ("cpu_s", "wall_s", "peak_mb")
        }
        for name, several in found.items()
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": round(median(values), 4), "max": max(values)}


def log_log_slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent b of y ~ x^b by least squares on logarithms: 1 is linear, 0 is constant."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def write_report(
    path: Path | None,
    benchmark: str,
    *,
    settings: Any,
    data: Mapping[str, Any],
    numbers: Any,
    seconds: float,
    printed: str = "",
    packages: Iterable[str] = (),
    draw: Callable[[Mapping[str, Any]], Mapping[str, "Figure"]] | None = None,
) -> dict[str, Any]:
    """The record of one run, written to `path` as indented JSON unless that is None.

    Args:
        path: the file; its folder is made.
        benchmark: name of the script.
        settings: the frozen dataclass that holds every setting, the seed among them.
        data: what was measured on: name, counts, hashes.
        numbers: the results.
        seconds: wall clock of the whole run.
        printed: what the run showed, as Markdown: the page shows the same.
        packages: used by other processes of the run; their versions are recorded too.
        draw: plots of the record by the suffix of their file name, "" for none; written beside
            `path` as PNG and SVG if matplotlib is installed.
    """
    machine = environment(packages)
    machine["load_average"] = {"start": _LOAD_AT_START, "end": machine["load_average"]}
    record = {
        "benchmark": benchmark,
        "command": " ".join(["python", *sys.argv]),
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "settings": asdict(settings),
        "data": dict(data),
        "numbers": numbers,
        "printed": printed.splitlines(),
        "seconds": round(seconds, 1),
        "environment": machine,
    }
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record, indent=2, default=str) + "\n"
        path.write_text(text, encoding="utf-8")
        if draw:
            try:
                from plots import save_plots
            except ModuleNotFoundError as missing:
                click.echo(f"No plots: {missing.name} comes with the extra [bench].", err=True)
            else:
                save_plots(draw(json.loads(text)), path)
    return record


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, first column to the left and the others to the right, padded to align."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def joined(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        others = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join([first, *others])} |"

    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([joined(lines[0]), joined(rule), *(joined(line) for line in lines[1:])])


def present(folders: Iterable[Path]) -> list[Path]:
    """Those of some folders that are there; of the others people are told."""
    found = []
    for folder in folders:
        if folder.is_dir():
            found.append(folder)
        else:
            click.echo(f"skipped: {folder} is not here", err=True)
    return found


# ── options ──────────────────────────────────────────────────────────────────────────────────────

Option = Callable[[Callable[..., None]], Callable[..., None]]


def sizes_option(name: str, default: Sequence[int], help: str, *, least: int = 1) -> Option:
    """An option that takes numbers with commas between them, each at least `least`, sorted."""

    def parse(_context: object, _option: object, value: str) -> tuple[int, ...]:
        try:
            sizes = tuple(sorted({int(size) for size in value.split(",")}))
        except ValueError as exc:
            example = ",".join(map(str, default[:2]))
            raise click.BadParameter(f"numbers with commas between them, as {example}") from exc
        if sizes[0] < least:
            raise click.BadParameter(f"at least {least}")
        return sizes

    shown = ",".join(map(str, default))
    return click.option(name, default=shown, show_default=True, callback=parse, help=help)


folder_option = click.option(
    "--folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Where libraries are made; the system's folder for temporary files if not given.",
)
out_option = click.option(
    "--out", type=click.Path(path_type=Path), help="Also write JSON and plot."
)


# ── the page ─────────────────────────────────────────────────────────────────────────────────────

_SECTION = re.compile(r"(<!-- results: ([\w-]+) -->\n)(.*?)(<!-- end of results -->)", re.DOTALL)


def fill_page(page: str, results: Path) -> str:
    """The page with each `<!-- results: NAME -->` section made anew from NAME.json in `results`.

    Raises:
        ValueError: the page has no section for a record that is there.
    """
    shown = {name for _, name, _, _ in _SECTION.findall(page)}
    if forgotten := sorted({path.stem for path in results.glob("*.json")} - shown):
        raise ValueError(f"the page has no section for the results of {', '.join(forgotten)}")
    return _SECTION.sub(lambda found: found[1] + _section(results, found[2]) + found[4], page)


def _section(results: Path, name: str) -> str:
    path = results / f"{name}.json"
    if not path.exists():
        return "\nNot run yet.\n\n"
    record = json.loads(path.read_text(encoding="utf-8"))
    plots = sorted(results.glob(f"{name}.svg")) + sorted(results.glob(f"{name}-*.svg"))
    parts = [
        *(["\n".join(record["printed"])] if record.get("printed") else []),
        *(f"![{plot.stem}: plot]({results.name}/{plot.name})" for plot in plots),
        f"`{record['command']}`, {record['written'][:10]}, {record['seconds']:,.0f} s"
        f" ([record]({results.name}/{path.name})). {describe(record['environment'])}.",
    ]
    return "\n" + "\n\n".join(parts) + "\n\n"


@click.command()
@click.argument("results", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--page",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    default=PAGE,
    show_default="README.md beside this script",
    help="What is filled.",
)
def main(results: Path, page: Path) -> None:
    """Fill the page's sections from the JSON records in RESULTS."""
    page.write_text(fill_page(page.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()
