"""What the first answer costs in a new shell, at a thousand to a million pictures.

    python benchmarks/cold_start.py --out benchmarks/results/cold_start.json

Whole processes, from the shell's call to their end: `retriever search` with a text and with a
picture in libraries of made-up pictures of `mini`'s dimensions (`synthetic.py`), and rclip with as
many in its database (`peers.py`), told not to look for changed files first. Beside them what no
such program can be cheaper than: importing the libraries that search. Their files are in the
system's cache, as in a shell that is used.

At each size all programs run in turn, and a ratio is one of medians of the same turns. CPU time
counts: wall time says how busy the machine was. Half an hour and 6 GB of disk and of memory, nearly
all of it rclip's at a million; `--no-peers` leaves out rclip, and torch as well.
"""

import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from peers import Call, PeerError, Rclip, default_cache, ready
from PIL import Image
from report import (
    RETRIEVER,
    folder_option,
    format_table,
    out_option,
    run_process,
    sizes_option,
    write_report,
)
from synthetic import fill_store

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZES = (1_000, 100_000, 1_000_000)
TEXT = "two dogs run on the beach"
BASE, HELP_BASE = "import numpy, faiss, onnxruntime, click", "import click"
IMPORTS = (HELP_BASE, "import numpy", BASE)
TEXT_QUERY, IMAGE_QUERY, HELP = "retriever, text", "retriever, picture", "retriever --help"
RCLIP_TEXT, RCLIP_IMAGE = "rclip, text", "rclip, picture"
QUERIES = (TEXT_QUERY, IMAGE_QUERY, RCLIP_TEXT, RCLIP_IMAGE)
ANSWERS = 10  # of each query, by default of both

# What costs at most how much of what, by CPU time.
BARS = (
    (TEXT_QUERY, BASE, 1.7),
    (TEXT_QUERY, RCLIP_TEXT, 0.5),
    (IMAGE_QUERY, RCLIP_IMAGE, 0.5),
    (HELP, HELP_BASE, 2.0),
)


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting of the benchmark."""

    sizes: tuple[int, ...] = SIZES
    runs: int = 9
    peers: bool = True
    seed: int = 0


DEFAULTS = Settings()


def make_picture(path: Path, seed: int) -> Path:
    """A JPEG file of 640 × 480 to ask with: soft patches of colour, and some noise."""
    draw = np.random.default_rng(seed)
    patches = Image.fromarray(draw.integers(0, 256, (6, 8, 3), np.uint8))
    pixels = np.asarray(patches.resize((640, 480), Image.Resampling.BICUBIC))
    noisy = np.clip(pixels + draw.normal(0, 4, pixels.shape), 0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(path, quality=90)
    return path


def optimise(library: Path) -> dict[str, Any] | None:
    """What it cost to give a library the index of its size, if there is a command for that."""
    from cli import main as program

    if "optimize" not in program.commands:
        return None
    return run_process([*RETRIEVER, "optimize", "--library", library])


def commands_at(library: Path, picture: Path, rclip: tuple[Rclip, Path] | None) -> dict[str, Call]:
    """All that is run in turn, by name; `rclip` comes with the place of its database."""
    search = [*RETRIEVER, "search", "--library", str(library)]
    imports = [*IMPORTS, "import torch"] if rclip and find_spec("torch") else IMPORTS
    commands = {code: Call([sys.executable, "-c", code]) for code in imports}
    commands[HELP] = Call([*RETRIEVER, "--help"])
    commands[TEXT_QUERY] = Call([*search, TEXT])
    commands[IMAGE_QUERY] = Call([*search, "--image", str(picture)])
    if rclip:
        peer, place = rclip
        commands[RCLIP_TEXT] = peer.search(picture.parent, place, TEXT)
        commands[RCLIP_IMAGE] = peer.search(picture.parent, place, str(picture))
    return commands


def in_turn(commands: Mapping[str, Call], runs: int) -> dict[str, dict[str, dict[str, float]]]:
    """As `report.interleaved`, for programs that each need something around them."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for _ in range(runs):
        for name, call in commands.items():
            found[name].append(run_process(call.argv, env=os.environ | call.env, cwd=call.cwd))
    return {
        name: {
            key: {
                "min": min(one[key] for one in several),
                "median": round(median(one[key] for one in several), 4),
                "max": max(one[key] for one in several),
            }
            for key in ("cpu_s", "wall_s", "peak_mb")
        }
        for name, several in found.items()
    }


def check_answers(commands: Mapping[str, Call], answers: int, out: Path) -> None:
    """Runs each once, so that compiled modules and files are at hand, and counts what they find.

    Raises:
        RuntimeError: a query has another number of answers; it would be fast for a wrong reason.
    """
    for name, call in commands.items():
        run_process(call.argv, env=os.environ | call.env, cwd=call.cwd, out=out)
        found = len(out.read_text(encoding="utf-8").splitlines())
        if name in QUERIES and found != answers:
            raise RuntimeError(f"{name}: {found} answers where {answers} were expected")


def measure(
    size: int, settings: Settings, rclip: Rclip | None, folder: Path | None
) -> dict[str, Any]:
    """The programs of `commands_at` with libraries of so many pictures, which are deleted then."""
    with tempfile.TemporaryDirectory(prefix="cold-", dir=folder) as made:
        home = Path(made)
        library, place, pictures = home / "made-up.lib", home / "rclip", home / "pictures"
        pictures.mkdir()
        picture = make_picture(pictures / "query.jpg", settings.seed)
        fill_store(library, size, seed=settings.seed)
        optimised = optimise(library)
        if rclip:
            rclip.fill(pictures, place, size)
        commands = commands_at(library, picture, (rclip, place) if rclip else None)
        check_answers(commands, min(size, ANSWERS), home / "answers.txt")
        found = in_turn(commands, settings.runs)
    return {"pictures": size, "optimise": optimised, "commands": found}


def bars_of(sizes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """At each size the ratios that are to be small, as far as both were measured."""
    bars = []
    for one in sizes:
        cpu = {name: spread["cpu_s"]["median"] for name, spread in one["commands"].items()}
        for what, beside, bar in BARS:
            if what in cpu and beside in cpu:
                ratio = round(cpu[what] / cpu[beside], 3)
                found = {"pictures": one["pictures"], "what": what, "beside": beside}
                bars.append(found | {"ratio": ratio, "bar": bar, "met": ratio <= bar})
    return bars


def tables_of(numbers: Mapping[str, Any]) -> str:
    """CPU, wall time and memory of each program at each size, and the bars, as Markdown."""
    sizes = numbers["sizes"]
    names = dict.fromkeys(name for one in sizes for name in one["commands"])
    header = ["CPU s / wall s / peak MB", *(f"{one['pictures']:,} pictures" for one in sizes)]
    rows = [[name, *(_cell(one["commands"].get(name)) for one in sizes)] for name in names]
    parts = [format_table(header, rows)]
    ratios = [
        [
            f"{one['pictures']:,}",
            one["what"],
            one["beside"],
            f"{one['ratio']:.2f}",
            f"≤ {one['bar']:g}",
            "yes" if one["met"] else "no",
        ]
        for one in numbers["bars"]
    ]
    header = ["pictures", "CPU time of", "in times of", "measured", "wanted", "met"]
    parts.append(format_table(header, ratios))
    if numbers["left_out"]:
        parts.append(f"Left out: {numbers['left_out']}")
    return "\n\n".join(parts)


def _cell(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    cpu, wall, peak = (found[key]["median"] for key in ("cpu_s", "wall_s", "peak_mb"))
    return f"{cpu:.2f} / {wall:.2f} / {peak:,.0f}"


def draw(record: Mapping[str, Any]) -> dict[str, "Figure"]:
    """CPU time of the queries against the number of pictures; what knows none, as dashed lines."""
    from plots import INK, line, new_figure

    sizes = record["numbers"]["sizes"]
    figure, (axes,) = new_figure("A cold start", "pictures", "CPU seconds", log="xy")
    cpu: dict[str, list[tuple[int, float]]] = {}
    for one in sizes:
        for name, spread in one["commands"].items():
            cpu.setdefault(name, []).append((one["pictures"], spread["cpu_s"]["median"]))
    for name, points in cpu.items():
        if name in QUERIES:
            line(axes, QUERIES.index(name), name, *zip(*points, strict=True))
            continue
        seconds = median(value for _, value in points)
        axes.axhline(seconds, color=INK, linestyle="--", linewidth=1)
        # Ours inside the panel, for it costs about what importing numpy does.
        inside = name == HELP
        axes.annotate(
            name,
            (1, seconds),
            (-4, 2) if inside else (4, 0),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            ha="right" if inside else "left",
            va="bottom" if inside else "center",
            fontsize=9,
        )
    axes.legend(fontsize=11, loc="upper left")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.3)  # room for the legend
    return {"": figure}


@click.command()
@sizes_option("--sizes", SIZES, "Numbers of pictures.")
@click.option("--runs", default=DEFAULTS.runs, show_default=True, help="Of each program.")
@click.option("--peers/--no-peers", default=True, show_default=True, help="Measure rclip as well.")
@click.option("--seed", default=DEFAULTS.seed, show_default=True, help="Of what is made up.")
@folder_option
@click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    default=default_cache,
    show_default="benchmarks in the user's cache folder",
    help="Where rclip is installed.",
)
@out_option
def main(folder: Path | None, cache: Path, out: Path | None, **options: Any) -> None:
    """Measure the first query of a new shell, beside bare imports and rclip."""
    settings = Settings(**options)
    started = time.perf_counter()

    def say(sentence: str) -> None:
        click.echo(f"{sentence}, {time.perf_counter() - started:.0f} s", err=True)

    rclip: Rclip | None = None
    versions: dict[str, str] = {}
    left_out = ""
    if settings.peers:
        try:
            rclip, versions = ready(Rclip(cache.resolve()), say)
        except PeerError as exc:
            left_out = str(exc)
            say(f"left out: {exc}")
    sizes = []
    for size in settings.sizes:
        sizes.append(measure(size, settings, rclip, folder))
        say(f"{size:,} pictures")
    numbers = {"sizes": sizes, "bars": bars_of(sizes), "rclip": versions, "left_out": left_out}
    printed = tables_of(numbers)
    click.echo(printed)
    write_report(
        out,
        "cold_start",
        settings=settings,
        data={"name": "made-up pictures of mini's dimensions", "text": TEXT},
        numbers=numbers,
        seconds=time.perf_counter() - started,
        printed=printed,
        packages=("numpy", "faiss-cpu", "onnxruntime", "click", "tokenizers"),
        draw=draw,
    )


if __name__ == "__main__":
    main()
