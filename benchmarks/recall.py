"""Recall by model on one data set: the plain way, and each fast way beside it.

    python benchmarks/recall.py flickr8k --model mini --out benchmarks/results/recall.json

The plain way is the protocol of `retriever evaluate`: pictures decoded in full, one engine, exact
cosines of float32 rows. What a user gets is faster: JPEGs decoded no larger than needed, towers in
whichever engine is quickest (`--engine`, see `retriever.engines`), rows rounded to float16. So the
same pictures and captions are indexed into a library and asked there. No library builds an
approximate index for so few, so one is built here, from a thousand rows on. Each fast way is shown
with its difference to the plain one: 95 % intervals, drawn by picture, of the paired difference,
because both answer the same queries.

Without the folder there is nothing to measure: the script says so and ends well, so that a run over
all benchmarks goes on.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from numpy.typing import NDArray
from report import format_table, write_report

from indexes.approximate import LEAST_ROWS, ApproximateIndex, rerank, tune
from indexes.records import Kind, Source
from indexes.store import Store
from indexes.vectors import VectorIndex
from retriever import metrics
from retriever.encoders import Encoder, OnnxEncoder, load_encoder
from retriever.engines import VARIABLE as ENGINE
from retriever.errors import RetrieverError
from retriever.evaluation import evaluate
from retriever.library import Library

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting of the benchmark; those of the protocol mean what `evaluate` says."""

    split: str | None = None
    captions: Path | None = None
    captions_per_picture: int | None = None
    folds: int = 1
    engines: tuple[str, ...] = ("onnxruntime", "auto")
    resamples: int = 1000
    seed: int = 0
    device: str = "auto"
    threads: int | None = None


DEFAULTS = Settings()
Ids = NDArray[np.int64]
Rows = NDArray[np.float32]
TUNING_QUERIES = 500
RECALLS = [f"{direction}_r@{k}" for direction in ("t2i", "i2t") for k in metrics.KS]
K = max(metrics.KS)


@dataclass(frozen=True, slots=True, eq=False)
class Ranks:
    """Zero-based rank of the best positive of each query; beyond the first K any large number.

    owners: (m,) the picture that each caption belongs to. t2i: (m,). i2t: (n,).
    """

    owners: Ids
    t2i: Ids
    i2t: Ids

    def recalls(self, drawn: Ids) -> dict[str, float]:
        """The recalls in percent if each picture counts `drawn` (n,) times."""
        weights = {"t2i": (self.t2i, drawn[self.owners]), "i2t": (self.i2t, drawn)}
        return {
            f"{direction}_r@{k}": 100 * float(np.average(ranks < k, weights=weight))
            for direction, (ranks, weight) in weights.items()
            for k in metrics.KS
        }

    def describe(self, plain: "Ranks", settings: Settings) -> dict[str, Any]:
        """Recalls and their difference to the plain ones, each with its interval."""

        def statistic(drawn: Ids) -> dict[str, float]:
            here, there = self.recalls(drawn), plain.recalls(drawn)
            return here | {f"d_{name}": here[name] - there[name] for name in RECALLS}

        n = len(self.i2t)
        once = statistic(np.ones(n, np.int64))
        bounds = metrics.bootstrap_interval(
            statistic, [n], resamples=settings.resamples, seed=settings.seed
        )
        return {
            "metrics": {name: once[name] for name in RECALLS},
            "intervals": {name: list(bounds[name]) for name in RECALLS},
            "differences": {name: once[f"d_{name}"] for name in RECALLS},
            "difference_intervals": {name: list(bounds[f"d_{name}"]) for name in RECALLS},
        }


def ranks_of(per_query: Mapping[str, Any]) -> Ranks:
    """The ranks in a record of `evaluate`."""
    places = {one["file"]: place for place, one in enumerate(per_query["i2t"])}
    return Ranks(
        np.array([places[one["file"]] for one in per_query["t2i"]]),
        np.array([one["rank"] for one in per_query["t2i"]]),
        np.array([one["rank"] for one in per_query["i2t"]]),
    )


def measure_plainly(
    dataset: Path, model: str, settings: Settings
) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """The record of `evaluate`, and the rank of each query."""
    with engine("onnxruntime"):
        record = evaluate(
            dataset,
            encoder=load_encoder(model, device=settings.device, threads=settings.threads),
            split=settings.split,
            captions=settings.captions,
            captions_per_picture=settings.captions_per_picture,
            folds=settings.folds,
            through_index=True,
            per_query=True,
            resamples=settings.resamples,
            seed=settings.seed,
        )
    return record, record.pop("per_query")


def measure_library(
    dataset: Path,
    model: str,
    engine_name: str,
    per_query: Mapping[str, Any],
    settings: Settings,
    folder: Path | None,
    *,
    with_approximate: bool,
) -> list[dict[str, Any]]:
    """What a library of the same pictures answers to the same queries."""
    plain = ranks_of(per_query)
    with tempfile.TemporaryDirectory(prefix="recall-", dir=folder) as home, engine(engine_name):
        pictures = Path(home) / "pictures"
        _copy(dataset, per_query, pictures)
        encoder = load_encoder(model, device=settings.device, threads=settings.threads)
        began = time.perf_counter()
        with Library.create(Path(home) / "recall.lib", encoder) as library:
            report = library.index(pictures)
            seconds = time.perf_counter() - began
            assert report.added == len(plain.i2t), report
        texts = encoder.encode_texts([one["caption"] for one in per_query["t2i"]])
        ran_in = f"{engine_name}: {engine_of(encoder)}"
        with Store.open(Path(home) / "recall.lib") as store:
            items = sorted(store.items(store.item_ids()), key=lambda item: item.file)
            ids = [item.item_id for item in items]
            own = [store.caption_ids(item_id) for item_id in ids]
            pictures = store.embeddings("image", ids)
            found = Ranks(
                plain.owners,
                _ranks(
                    _search(store, "image", "text", texts), [[ids[one]] for one in plain.owners]
                ),
                _ranks(_search(store, "caption", "image", pictures), own),
            )
        ways = {f"library, {ran_in}": found}
        if with_approximate and len(ids) >= LEAST_ROWS:
            captions = [np.flatnonzero(plain.owners == place) for place in range(len(ids))]
            ways["approximate index"] = Ranks(
                plain.owners,
                _ranks(_approximate(pictures, texts, settings.seed), plain.owners[:, None]),
                _ranks(_approximate(texts, pictures, settings.seed), captions),
            )
    return [
        {"model": encoder.name, "way": name, "index_s": round(seconds, 1)}
        | ranks.describe(plain, settings)
        for name, ranks in ways.items()
    ]


def _search(store: Store, kind: Kind, source: Source, queries: Rows) -> list[Ids]:
    return [match.ids for match in store.search(kind, queries, K, source=source)]


def _approximate(candidates: Rows, queries: Rows, seed: int) -> list[Ids]:
    """Rows found by an approximate index, tuned as libraries tune theirs, and ranked exactly."""
    numbered = (np.arange(len(candidates), dtype=np.int64), candidates.astype(np.float16))
    exact = VectorIndex.build(candidates.shape[1], [numbered])
    index = ApproximateIndex.build(exact, seed=seed)
    assert index is not None
    best = tune(index, exact, queries[:TUNING_QUERIES], k=K)
    found = index.candidates(queries, best.candidates, best.probes)
    return [rerank(exact, query, ids, K).ids for query, ids in zip(queries, found, strict=True)]


def _ranks(found: Sequence[Ids], positives: Sequence[Any]) -> Ids:
    """The place of the first positive of each query, K if it was not found."""
    ranks = []
    for ids, wanted in zip(found, positives, strict=True):
        places = np.flatnonzero(np.isin(ids, wanted))
        ranks.append(int(places[0]) if places.size else K)
    return np.array(ranks)


def engine_of(encoder: Encoder) -> str:
    """What ran its towers."""
    return str(getattr(encoder, "engine", "torch"))


@contextmanager
def engine(name: str) -> Iterator[None]:
    """Has ONNX towers that are loaded inside run in that engine."""
    before = os.environ.get(ENGINE)
    os.environ[ENGINE] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[ENGINE]
        else:
            os.environ[ENGINE] = before


def _copy(dataset: Path, per_query: Mapping[str, Any], folder: Path) -> None:
    """The pictures that were evaluated, named by their place, and nothing else."""
    folder.mkdir()
    captions: dict[str, list[str]] = {}
    for one in per_query["t2i"]:
        captions.setdefault(one["file"], []).append(one["caption"])
    lines = []
    for place, one in enumerate(per_query["i2t"]):
        name = f"{place:06d}{Path(one['file']).suffix}"
        shutil.copyfile(dataset / one["file"], folder / name)
        lines.append(json.dumps({"file": name, "captions": captions[one["file"]]}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


# ── tables and plot ──────────────────────────────────────────────────────────────────────────────


def plain_row(record: Mapping[str, Any]) -> list[str]:
    """One line of the first table: recalls with half the width of their intervals."""

    def cell(name: str) -> str:
        lower, upper = record["intervals"][name]
        return f"{record['metrics'][name]:.1f} ± {(upper - lower) / 2:.1f}"

    name = f"{record['model']['name']} ({record['model']['dim']}-d)"
    return [name, *(cell(recall) for recall in RECALLS), cell("rsum")]


def index_way(record: Mapping[str, Any]) -> dict[str, Any]:
    """The same rows through the FAISS index alone: rounded to float16, nothing else."""
    found = record["index"]
    return {
        "model": record["model"]["name"],
        "way": "exact, rows of float16",
        "metrics": {name: found["metrics"][name] for name in RECALLS},
        "differences": {name: found["metrics"][name] - record["metrics"][name] for name in RECALLS},
    }


def fast_row(way: Mapping[str, Any]) -> list[str]:
    """One line of the second table: differences with their intervals, and the largest loss."""

    def cell(name: str) -> str:
        text = f"{way['differences'][name] + 0.0:+.2f}"
        if "difference_intervals" in way:
            text += " [{:+.2f}, {:+.2f}]".format(*way["difference_intervals"][name])
        return text

    loss = max(0.0, -min(way["differences"].values()))
    return [f"{way['model']}: {way['way']}", *(cell(recall) for recall in RECALLS), f"{loss:.2f}"]


def tables_of(numbers: Mapping[str, Any]) -> str:
    """Recalls of the plain way, then what each fast way adds or takes, in points."""
    names = [name.replace("_r@", " R@") for name in RECALLS]
    plain = format_table(["model, plain", *names, "rSum"], map(plain_row, numbers["plain"]))
    fast = format_table(["fast way", *names, "largest loss"], map(fast_row, numbers["fast"]))
    return (
        f"{plain}\n\nPercent, with half the width of the 95 % interval."
        f" Differences of the fast ways, in points:\n\n{fast}"
    )


def draw(record: Mapping[str, Any]) -> dict[str, "Figure"]:
    """Recalls of every way with their intervals, text to image on the left."""
    from plots import COLOURS, MARKERS, legend, new_figure

    numbers = record["numbers"]
    ways = [
        {"model": one["model"]["name"], "way": "plain"}
        | {key: one[key] for key in ("metrics", "intervals")}
        for one in numbers["plain"]
    ]
    ways += numbers["fast"]
    ways.sort(key=lambda way: way["model"])
    labels = [f"{way['model']}: {way['way']}" for way in ways]
    figure, panels = new_figure(
        f"Recall on {record['data']['name']}, 95 % intervals", "recall, %", "", columns=2
    )
    figure.set_size_inches(15, 2 + 0.5 * len(ways))
    for axes, direction, words in zip(
        panels, ("t2i", "i2t"), ("text to image", "image to text"), strict=True
    ):
        for number, k in enumerate(metrics.KS):
            name = f"{direction}_r@{k}"
            for place, way in enumerate(ways):
                value = way["metrics"][name]
                low, high = way.get("intervals", {}).get(name, (value, value))
                axes.errorbar(
                    value,
                    -place,
                    xerr=[[value - low], [high - value]],
                    color=COLOURS[number],
                    marker=MARKERS[number],
                    capsize=3,
                    label=f"R@{k}" if place == 0 else None,
                )
        axes.set_xlabel(f"{words}, recall in %")
        axes.set_yticks([-place for place in range(len(ways))], labels if axes is panels[0] else [])
        axes.set_xlim(right=101)
    legend(panels[1], ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    return {"": figure}


@click.command()
@click.argument("dataset", type=click.Path(path_type=Path))
@click.option("--model", "models", multiple=True, default=["mini"], show_default=True)
@click.option("--split", default=DEFAULTS.split, help="The gallery; test where there are splits.")
@click.option("--captions", type=click.Path(path_type=Path, exists=True), help="A captions file.")
@click.option("--captions-per-picture", type=int, help="Use the first so many; all by default.")
@click.option("--folds", default=DEFAULTS.folds, show_default=True, help="5 for COCO 1K.")
@click.option(
    "--engine",
    "engines",
    multiple=True,
    default=DEFAULTS.engines,
    show_default=True,
    help="For ONNX towers: what fast ways are run in.",
)
@click.option("--resamples", default=DEFAULTS.resamples, show_default=True, help="Of a bootstrap.")
@click.option("--seed", default=DEFAULTS.seed, show_default=True, help="Of the bootstrap.")
@click.option("--device", default=DEFAULTS.device, show_default=True)
@click.option("--threads", type=int, help="CPU threads for one operation; the engine's choice.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Where libraries are made; the system's folder for temporary files if not given.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Also write JSON and plot.")
def main(
    dataset: Path, models: tuple[str, ...], folder: Path | None, out: Path | None, **options: Any
) -> None:
    """Measure each --model on DATASET, a folder of captioned pictures."""
    if not dataset.is_dir():
        click.echo(f"skipped: {dataset} is not here", err=True)
        return
    settings = Settings(**options)
    started = time.perf_counter()
    numbers: dict[str, list[dict[str, Any]]] = {"plain": [], "fast": []}
    for name in models:
        try:
            record, per_query = measure_plainly(dataset, name, settings)
            numbers["plain"].append(record)
            click.echo(f"{name}: {record['seconds']['total']:.0f} s", err=True)
            numbers["fast"].append(index_way(record))
            # Folds are galleries of their own; a library is one.
            runs_in_onnx = isinstance(load_encoder(name, device=settings.device), OnnxEncoder)
            engines = settings.engines if runs_in_onnx else settings.engines[:1]
            for number, engine_name in enumerate(engines if settings.folds == 1 else ()):
                ways = measure_library(
                    dataset,
                    name,
                    engine_name,
                    per_query,
                    settings,
                    folder,
                    with_approximate=number == 0,
                )
                numbers["fast"] += ways
                click.echo(f"{name}: {ways[0]['way']}, {ways[0]['index_s']:.0f} s", err=True)
        except RetrieverError as error:
            raise click.ClickException(f"{name}: {error}") from error
    data = numbers["plain"][0]["dataset"]
    printed = (
        f"{data['name']}{', split ' + data['split'] if data['split'] else ''}: "
        f"{data['pictures']:,} pictures, {data['captions']:,} captions\n\n{tables_of(numbers)}"
    )
    click.echo(printed)
    write_report(
        out,
        "recall",
        settings=settings,
        data=data,
        numbers=numbers,
        seconds=time.perf_counter() - started,
        printed=printed,
        draw=draw,
    )


if __name__ == "__main__":
    main()
