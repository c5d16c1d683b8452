"""Recall by model on one data set, by the protocol of `retriever evaluate`: a table and one JSON.

    python benchmarks/recall.py DATASET --split test --model mini --model my.ckpt --out recall.json

Without the folder there is nothing to measure: the script says so and ends well, so that a run over
all benchmarks goes on.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from report import format_table, write_report

from retriever import metrics
from retriever.encoders import load_encoder
from retriever.errors import RetrieverError
from retriever.evaluation import evaluate


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting of the benchmark; those of the protocol mean what `evaluate` says."""

    split: str | None = None
    captions: Path | None = None
    captions_per_picture: int | None = None
    folds: int = 1
    through_index: bool = True
    resamples: int = 1000
    seed: int = 0
    device: str = "auto"
    threads: int | None = None


DEFAULTS = Settings()
RECALLS = [f"{direction}_r@{k}" for direction in ("t2i", "i2t") for k in metrics.KS]


def row_of(record: Mapping[str, Any]) -> list[str]:
    """One line of the printed table: recalls with half the width of their intervals."""

    def cell(name: str) -> str:
        lower, upper = record["intervals"][name]
        return f"{record['metrics'][name]:.1f} ± {(upper - lower) / 2:.1f}"

    index = record["index"]
    overlap = f"{min(index['t2i_overlap'], index['i2t_overlap']):.4f}" if index else ""
    rows = record["dataset"]["pictures"] + record["dataset"]["captions"]
    rate = f"{rows / record['seconds']['encoding']:.0f}"
    name = f"{record['model']['name']} ({record['model']['dim']}-d)"
    return [name, *(cell(recall) for recall in RECALLS), cell("rsum"), overlap, rate]


@click.command()
@click.argument("dataset", type=click.Path(path_type=Path))
@click.option("--model", "models", multiple=True, default=["mini"], show_default=True)
@click.option("--split", default=DEFAULTS.split, help="The gallery; test where there are splits.")
@click.option("--captions", type=click.Path(path_type=Path, exists=True), help="A captions file.")
@click.option("--captions-per-picture", type=int, help="Use the first so many; all by default.")
@click.option("--folds", default=DEFAULTS.folds, show_default=True, help="5 for COCO 1K.")
@click.option("--seed", default=DEFAULTS.seed, show_default=True, help="Of the bootstrap.")
@click.option("--device", default=DEFAULTS.device, show_default=True)
@click.option("--threads", type=int, help="CPU threads for one operation; the engine's choice.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write the records as JSON.")
def main(dataset: Path, models: tuple[str, ...], out: Path | None, **options: Any) -> None:
    """Measure each --model on DATASET, a folder of captioned pictures."""
    if not dataset.is_dir():
        click.echo(f"skipped: {dataset} is not here", err=True)
        return
    settings = Settings(**options)
    protocol = {name: value for name, value in options.items() if name not in ("device", "threads")}
    started = time.perf_counter()
    records = []
    for name in models:
        try:
            encoder = load_encoder(name, device=settings.device, threads=settings.threads)
            records.append(
                evaluate(
                    dataset,
                    encoder=encoder,
                    through_index=settings.through_index,
                    resamples=settings.resamples,
                    **protocol,
                )
            )
        except RetrieverError as error:
            raise click.ClickException(f"{name}: {error}") from error
        click.echo(f"{name}: {records[-1]['seconds']['total']:.0f} s", err=True)
    data = records[0]["dataset"]
    click.echo(
        f"{data['name']}, split {data['split']}: "
        f"{data['pictures']:,} pictures, {data['captions']:,} captions\n"
    )
    header = ["model", *RECALLS, "rSum", "index overlap@10", "rows/s"]
    click.echo(format_table(header, map(row_of, records)))
    write_report(
        out,
        "recall",
        settings=settings,
        data=data,
        numbers=records,
        seconds=time.perf_counter() - started,
    )


if __name__ == "__main__":
    main()
