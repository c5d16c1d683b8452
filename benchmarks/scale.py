"""How cost grows with the number of pictures, from a thousand to a million.

    python benchmarks/scale.py --out benchmarks/results/scale.json

Up to `--files` pictures are real: tiny files, indexed and checked again in processes of their own
by an encoder that costs next to nothing, as `recheck.py` does it, so what is left is the program's
own cost. At every size a library of `mini`'s dimensions is filled with made-up vectors, one caption
for each picture (`synthetic.py`), for what does not depend on files: disk, the time of a query with
everything loaded, exact and as the library chooses by itself, and a whole `retriever search` from a
cold start. The library is deleted before the next is made. A quarter of an hour and 3 GB of disk,
most of both for the million.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import recheck
from report import (
    RETRIEVER,
    folder_option,
    format_table,
    interleaved,
    log_log_slope,
    out_option,
    percentiles,
    sizes_option,
    write_report,
)
from synthetic import fill_store, text_queries

from indexes.store import Store

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZES = (1_000, 10_000, 100_000, 1_000_000)


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting of the benchmark."""

    sizes: tuple[int, ...] = SIZES
    files: int = 100_000  # pictures with real files, at most
    captioned_every: int = 10  # of the real files, one in so many
    captions: int = 1  # of each made-up picture
    checks: int = 3  # of a folder that has not changed
    queries: int = 100  # at most, asked one by one
    query_seconds: float = 20.0  # for them, at most
    cold_runs: int = 5
    k: int = 10
    seed: int = 0


DEFAULTS = Settings()
Say = Callable[[str], None]


def measure_files(home: Path, pictures: int, settings: Settings, say: Say) -> dict[str, Any]:
    """The first run over so many real files and the checks after it."""
    found = recheck.measure(
        home, pictures, settings.captioned_every, recheck.Settings(runs=settings.checks), say
    )
    return {
        "pictures": pictures,
        "index_s": found["first_run"]["seconds"],
        "index_cpu_s": found["first_run"]["cpu_seconds"],
        "index_peak_mb": found["first_run"]["peak_mb"],
        "check_s": round(pictures / found["check"]["pictures_per_second"], 4),
        "check_peak_mb": found["check"]["peak_mb"],
    }


def measure_made_up(home: Path, pictures: int, settings: Settings) -> dict[str, Any]:
    """Disk, queries and cold starts of a library of so many made-up pictures."""
    library = home / "made-up.lib"
    began = time.perf_counter()
    fill_store(library, pictures, captions=settings.captions, seed=settings.seed)
    filled = time.perf_counter() - began
    with Store.open(library) as store:
        began = time.perf_counter()
        with store.writer() as writer:
            writer.optimize()
        optimised = time.perf_counter() - began
        info = store.info()["index"]["image"]
        queries = text_queries(settings.queries, store.model.dim, settings.seed)
        table = {
            "exact": lambda row: store.search("image", row, settings.k, exact=True),
            "automatic": lambda row: store.search("image", row, settings.k, source="text"),
        }
        waiting = {name: _ask(ask, queries, settings) for name, ask in table.items()}
    command = [*RETRIEVER, "search", "a dog runs on the beach", "--library", library, "--json"]
    cold = interleaved({"search": command}, settings.cold_runs)["search"]
    return {
        "pictures": pictures,
        "fill_s": round(filled, 2),
        "optimize_s": round(optimised, 2),
        "approximate": info["approximate"],
        "reason": info["reason"],
        "disk_mb": round(sum(one.stat().st_size for one in library.iterdir()) / 1e6, 2),
        "query": waiting,
        "cold": cold,
    }


def _ask(ask: Callable[[Any], Any], queries: Any, settings: Settings) -> dict[str, Any]:
    """Percentiles of the queries that fit into the time, after one that reads the files."""
    ask(queries[:1])
    seconds: list[float] = []
    ends = time.perf_counter() + settings.query_seconds
    for row in queries:
        began = time.perf_counter()
        if seconds and began > ends:
            break
        ask(row[None])
        seconds.append(time.perf_counter() - began)
    return percentiles(seconds)


# What is fitted and drawn: colour, unit, where it stands in a record and how it is read there.
Read = Callable[[Mapping[str, Any]], float]
CURVES: Mapping[str, tuple[int, str, str, Read]] = {
    "index": (0, "s", "files", lambda one: one["index_s"]),
    "check of unchanged files": (1, "s", "files", lambda one: one["check_s"]),
    "query, exact": (2, "s", "made_up", lambda one: one["query"]["exact"]["p50_ms"] / 1000),
    "query, automatic": (3, "s", "made_up", lambda one: one["query"]["automatic"]["p50_ms"] / 1000),
    "cold search, CPU": (4, "s", "made_up", lambda one: one["cold"]["cpu_s"]["median"]),
    "peak of index": (0, "MB", "files", lambda one: one["index_peak_mb"]),
    "peak of a check": (1, "MB", "files", lambda one: one["check_peak_mb"]),
    "peak of a cold search": (4, "MB", "made_up", lambda one: one["cold"]["peak_mb"]["median"]),
    "library on disk": (6, "MB", "made_up", lambda one: one["disk_mb"]),
}


def curve_of(numbers: Mapping[str, Any], label: str) -> tuple[list[int], list[float]]:
    """Sizes and costs of one of CURVES."""
    _, _, where, read = CURVES[label]
    return [one["pictures"] for one in numbers[where]], [read(one) for one in numbers[where]]


def slopes_of(numbers: Mapping[str, Any]) -> dict[str, float]:
    """How fast each cost grows over the upper two decades of sizes: 1 is in step with the pictures.

    The smaller sizes show what everything costs at least, not how it grows.
    """
    slopes = {}
    for label in CURVES:
        sizes, costs = curve_of(numbers, label)
        if len(sizes) > 1:
            first = next(at for at, size in enumerate(sizes) if size >= sizes[-1] / 100)
            first = min(first, len(sizes) - 2)
            slopes[label] = round(log_log_slope(sizes[first:], costs[first:]), 2)
    return slopes


def draw(record: Mapping[str, Any]) -> dict[str, "Figure"]:
    """Time on the left, memory and disk on the right, both against the number of pictures."""
    from plots import legend, line, new_figure

    numbers = record["numbers"]
    figure, panels = new_figure(
        "Cost by the number of pictures", "pictures", "seconds", columns=2, log="xy"
    )
    panels[1].set_ylabel("MB")
    for label, (number, unit, _, _) in CURVES.items():
        axes = panels[0] if unit == "s" else panels[1]
        slope = numbers["slopes"].get(label)
        named = label if slope is None else f"{label} (slope {slope:.2f})"
        line(axes, number, named, *curve_of(numbers, label))
    for axes in panels:
        legend(axes, loc="upper left")
        # Room for the legend: a decade or two above the highest point.
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** 0.6)
    return {"": figure}


def tables_of(numbers: Mapping[str, Any]) -> str:
    """Both tables and the slopes, as Markdown."""
    files = [
        [
            f"{one['pictures']:,}",
            f"{1000 * one['index_s'] / one['pictures']:.2f}",
            f"{1000 * one['index_cpu_s'] / one['pictures']:.2f}",
            f"{one['index_peak_mb']:.0f}",
            f"{1e6 * one['check_s'] / one['pictures']:.0f}",
            f"{one['check_peak_mb']:.0f}",
        ]
        for one in numbers["files"]
    ]
    made_up = [
        [
            f"{one['pictures']:,}",
            f"{1000 * one['disk_mb'] / one['pictures']:.2f}",
            *(_times(one["query"][kind]) for kind in ("exact", "automatic")),
            f"{one['cold']['cpu_s']['median']:.2f}",
            f"{one['cold']['peak_mb']['median']:.0f}",
        ]
        for one in numbers["made_up"]
    ]
    header = ["real files", "index ms each", "CPU ms each", "peak MB", "check µs each", "peak MB"]
    parts = [format_table(header, files)] if files else []
    query = "query ms, p50 / p95 / p99"
    header = ["made-up pictures", "kB each", f"exact {query}", f"automatic {query}"]
    parts.append(format_table([*header, "cold search CPU s", "peak MB"], made_up))
    last = numbers["made_up"][-1]
    parts.append(f"How {last['pictures']:,} pictures are searched: {last['reason']}.")
    if numbers["slopes"]:
        slopes = ", ".join(f"{label} {slope:.2f}" for label, slope in numbers["slopes"].items())
        parts.append(
            "Slopes on logarithmic axes, over the upper two decades"
            f" (1: in step with the pictures, 0: constant): {slopes}."
        )
    return "\n\n".join(parts)


def _times(found: Mapping[str, float]) -> str:
    return " / ".join(f"{found[name]:.2f}" for name in ("p50_ms", "p95_ms", "p99_ms"))


@click.command()
@sizes_option("--sizes", SIZES, "Numbers of pictures.")
@click.option(
    "--files",
    default=DEFAULTS.files,
    show_default=True,
    help="Up to this size pictures are files too; 0 leaves them out.",
)
@click.option("--checks", default=DEFAULTS.checks, show_default=True, help="Of unchanged files.")
@click.option("--queries", default=DEFAULTS.queries, show_default=True, help="Of each kind.")
@click.option(
    "--query-seconds",
    default=DEFAULTS.query_seconds,
    show_default=True,
    help="For the queries of a kind, at most.",
)
@click.option("--cold-runs", default=DEFAULTS.cold_runs, show_default=True)
@click.option("--seed", default=DEFAULTS.seed, show_default=True, help="Of the made-up vectors.")
@folder_option
@out_option
def main(sizes: Sequence[int], folder: Path | None, out: Path | None, **options: Any) -> None:
    """Measure libraries of several sizes and show how cost grows."""
    settings = Settings(sizes=tuple(sizes), **options)
    started = time.perf_counter()

    def say(sentence: str) -> None:
        click.echo(f"{sentence}, {time.perf_counter() - started:.0f} s", err=True)

    numbers: dict[str, Any] = {"files": [], "made_up": []}
    for size in settings.sizes:
        if size <= settings.files:
            with tempfile.TemporaryDirectory(prefix="scale-", dir=folder) as home:
                numbers["files"].append(measure_files(Path(home), size, settings, say))
        with tempfile.TemporaryDirectory(prefix="scale-", dir=folder) as home:
            numbers["made_up"].append(measure_made_up(Path(home), size, settings))
        say(f"{size:,} made-up pictures")
    numbers["slopes"] = slopes_of(numbers)
    printed = tables_of(numbers)
    click.echo(printed)
    write_report(
        out,
        "scale",
        settings=settings,
        data={
            "name": "tiny PNG files, and made-up vectors of mini's dimensions",
            "files_up_to": settings.files,
            "captions": {"files": "one in ten", "made_up": settings.captions},
        },
        numbers=numbers,
        seconds=time.perf_counter() - started,
        printed=printed,
        packages=("faiss-cpu", "onnxruntime", "tokenizers", "sqlalchemy", "pillow"),
        draw=draw,
    )


if __name__ == "__main__":
    main()
