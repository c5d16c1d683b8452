"""Plots of the benchmarks: one look for all, as PNG and SVG.

    python benchmarks/plots.py benchmarks/results

draws all plots again from the JSON records, without measuring anything: a benchmark script that
has plots offers `draw(record) -> {suffix: Figure}`, hands it to `write_report`, and is asked for it
here. Light background in the file itself, so that dark pages show the same as print; colours of
Okabe and Ito, which people with any colour vision tell apart, each with a marker of its own.
"""

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, GRID = "#1a1a1a", "#d9d9d9"
LOOK: Mapping[str, Any] = {
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "font.size": 13,
    "axes.titlesize": 15,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 13,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 2,
    "lines.markersize": 7,
    "legend.frameon": False,
    "svg.hashsalt": "retriever",  # the same plot is the same file
}
matplotlib.rcParams.update(LOOK)


def new_figure(
    title: str, x: str, y: str, *, columns: int = 1, log: str = ""
) -> tuple[Figure, list[Axes]]:
    """A figure of one or more panels side by side, and its axes, ready for `line` or bars.

    Args:
        title: what is shown, above the first panel.
        x: label of the x axes, with its unit.
        y: label of the first y axis, with its unit.
        columns: panels.
        log: "x", "y", "xy" or "": axes with a logarithmic scale.
    """
    figure = Figure(figsize=(8 if columns == 1 else 6 * columns, 5), layout="constrained")
    panels = [figure.add_subplot(1, columns, column + 1) for column in range(columns)]
    for axes in panels:
        axes.set_xlabel(x)
        for letter, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
            if letter in log:
                axes.set(**{f"{letter}scale": "log"})
                axis.set_minor_formatter(NullFormatter())
    panels[0].set_ylabel(y)
    panels[0].set_title(title)
    return figure, panels


def line(
    axes: Axes, number: int, label: str, x: Sequence[float], y: Sequence[float], **more: Any
) -> None:
    """Draws a series; `number` gives it the colour and the marker that it keeps in all panels."""
    axes.plot(
        x,
        y,
        color=COLOURS[number % len(COLOURS)],
        marker=MARKERS[number % len(MARKERS)],
        label=label,
        **more,
    )


def legend(axes: Axes, **more: Any) -> None:
    """A key without a frame; where it stands is up to `more`."""
    axes.legend(**{"fontsize": 11, **more})


def save_plot(figure: Figure, path: Path) -> None:
    """Writes PATH.png and PATH.svg; the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_name(path.name + ".png"), dpi=150, metadata={"Software": None})
    figure.savefig(path.with_name(path.name + ".svg"), metadata={"Date": None})


def save_plots(figures: Mapping[str, Figure], record: Path) -> None:
    """Writes figures by suffix beside their record: NAME.json gives NAME.png, NAME-SUFFIX.png."""
    for suffix, figure in figures.items():
        save_plot(figure, record.with_name(f"{record.stem}-{suffix}" if suffix else record.stem))


@click.command()
@click.argument("results", type=click.Path(path_type=Path, exists=True, file_okay=False))
def main(results: Path) -> None:
    """Draw the plots of all JSON records in RESULTS again."""
    for path in sorted(results.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        draw = getattr(importlib.import_module(record["benchmark"]), "draw", None)
        if draw:
            save_plots(draw(record), path)


if __name__ == "__main__":
    main()
