"""Whether heat maps point at what a text is about: mosaics of four pictures and a caption of one.

    python benchmarks/heat_maps.py flickr8k --out benchmarks/results/heat_maps.json

Four pictures are put together in a square, and a heat map of that is made for a caption of one of
them. A map that shows what it claims has its peak, and most of its heat, in the quarter of that
picture; by chance it would be 25 %. This is the grid pointing game of Böhle, Fritz & Schiele 2021
(Convolutional Dynamic Alignment Networks for Interpretable Classifications), arXiv:2104.00032. A
second table covers parts of single pictures with their mean colour: the quarter of the pixels that
is hottest in the map, the coldest quarter, and one drawn by chance; the score must fall most
without the hottest. Intervals are drawn by mosaic.

Without the folder there is nothing to measure: the script says so and ends well.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from report import format_table, out_option, write_report

from retriever.data import Pair, read_image, read_pairs
from retriever.encoders import Encoder, load_encoder
from retriever.explain import heat_map
from retriever.metrics import bootstrap_interval

Map = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting of the benchmark."""

    split: str | None = "test"
    mosaics: int = 100
    quarter: int = 112  # side in pixels of each picture of a mosaic
    resamples: int = 1000
    seed: int = 0
    threads: int | None = None


DEFAULTS = Settings()


def square(path: Path, side: int) -> Image.Image:
    """The middle of a picture, (side, side)."""
    picture = read_image(path).image
    width, height = picture.size
    edge = min(picture.size)
    left, top = (width - edge) // 2, (height - edge) // 2
    middle = picture.crop((left, top, left + edge, top + edge))
    return middle.resize((side, side), Image.Resampling.LANCZOS)


def mosaic(pictures: Sequence[Image.Image]) -> Image.Image:
    """Four squares of one size as one, the second to the right of the first."""
    side = pictures[0].width
    whole = Image.new("RGB", (2 * side, 2 * side))
    for place, picture in enumerate(pictures):
        whole.paste(picture, (side * (place % 2), side * (place // 2)))
    return whole


def pointed(heat: Map, place: int) -> dict[str, float]:
    """Whether the peak lies in a quarter of the map, and the share of positive heat there."""
    height, width = (side // 2 for side in heat.shape)
    rows, columns = np.divmod(np.arange(heat.size).reshape(heat.shape), heat.shape[1])
    inside = (rows >= height) * 2 + (columns >= width) == place
    warm = heat.clip(0)
    return {
        "peak": float(inside.flat[int(heat.argmax())]),
        "heat": float(warm[inside].sum() / max(float(warm.sum()), 1e-9)),
    }


def falls(
    encoder: Encoder, picture: Image.Image, text: str, rng: np.random.Generator
) -> dict[str, float]:
    """How much the score falls without the hottest, a random and the coldest quarter."""
    heat = heat_map(encoder, picture, text)
    pixels = np.asarray(picture.resize(heat.shape[::-1], Image.Resampling.BICUBIC))
    order = np.argsort(heat, axis=None, kind="stable")
    quarter = heat.size // 4
    # By chance, but as coarse as the map: single pixels would blur the picture, not cover it.
    noise = Image.fromarray(rng.random((8, 8), dtype=np.float32))
    random = np.argsort(np.asarray(noise.resize(heat.shape[::-1], Image.Resampling.BICUBIC)), None)
    covered = [pixels]
    for chosen in (order[-quarter:], random[-quarter:], order[:quarter]):
        one = pixels.reshape(-1, 3).copy()
        one[chosen] = pixels.reshape(-1, 3).mean(axis=0).round()
        covered.append(one.reshape(pixels.shape))
    scores = encoder.encode_images(covered) @ encoder.encode_texts([text])[0]
    hottest, chance, coldest = (scores[0] - scores[1:]).tolist()
    return {"hottest": hottest, "random": chance, "coldest": coldest}


def with_intervals(
    found: Sequence[Mapping[str, float]], settings: Settings
) -> dict[str, dict[str, Any]]:
    """Each number's mean over the mosaics, with its interval."""
    names = list(found[0])
    table = np.array([[one[name] for name in names] for one in found])

    def means(drawn: NDArray[np.int64]) -> dict[str, float]:
        return dict(zip(names, np.average(table, axis=0, weights=drawn).tolist(), strict=True))

    once = means(np.ones(len(found), np.int64))
    bounds = bootstrap_interval(
        means, [len(found)], resamples=settings.resamples, seed=settings.seed
    )
    return {name: {"mean": once[name], "interval": list(bounds[name])} for name in names}


def measure(encoder: Encoder, pairs: Sequence[Pair], settings: Settings) -> dict[str, Any]:
    """Mosaics of the pictures, and as many of them alone, each asked for by its first caption."""
    rng = np.random.default_rng(settings.seed)
    games, alone = [], []
    cpu_s = 0.0
    for _ in range(settings.mosaics):
        four = [pairs[place] for place in rng.choice(len(pairs), 4, replace=False)]
        place = int(rng.integers(4))
        whole = mosaic([square(one.path, settings.quarter) for one in four])
        text = four[place].captions[0].text
        began = time.process_time()
        heat = heat_map(encoder, whole, text)
        cpu_s += time.process_time() - began
        games.append(pointed(heat, place))
        picture = read_image(four[place].path).image
        alone.append(falls(encoder, picture, text, rng))
    return {
        "mosaics": with_intervals(games, settings),
        "falls": with_intervals(alone, settings),
        "cpu_ms_per_map": round(1000 * cpu_s / settings.mosaics, 1),
    }


def tables_of(numbers: Mapping[str, Any]) -> str:
    """The numbers as Markdown."""

    def cell(one: Mapping[str, Any], scale: float, digits: int) -> str:
        low, high = (f"{scale * bound:.{digits}f}" for bound in one["interval"])
        return f"{scale * one['mean']:.{digits}f} ({low} to {high})"

    games, alone = numbers["mosaics"], numbers["falls"]
    return "\n\n".join(
        [
            format_table(
                ["in the right quarter, % (chance: 25)", "peak", "positive heat"],
                [["", cell(games["peak"], 100, 1), cell(games["heat"], 100, 1)]],
            ),
            format_table(
                ["fall of the cosine without a quarter of the picture", *alone],
                [["", *(cell(one, 1, 3) for one in alone.values())]],
            ),
            f"{numbers['cpu_ms_per_map']:,.0f} ms of CPU time for a map.",
        ]
    )


@click.command()
@click.argument("dataset", type=click.Path(path_type=Path))
@click.option("--model", default="mini", show_default=True)
@click.option("--split", default=DEFAULTS.split, show_default=True, help="Empty: all pictures.")
@click.option("--mosaics", default=DEFAULTS.mosaics, show_default=True)
@click.option("--resamples", default=DEFAULTS.resamples, show_default=True, help="Of a bootstrap.")
@click.option("--seed", default=DEFAULTS.seed, show_default=True)
@click.option("--threads", type=int, help="CPU threads of the encoder.")
@out_option
def main(dataset: Path, model: str, out: Path | None, **options: Any) -> None:
    """Measure maps of DATASET, a folder of captioned pictures."""
    if not dataset.is_dir():
        click.echo(f"skipped: {dataset} is not here", err=True)
        return
    settings = Settings(**options)
    started = time.perf_counter()
    pairs, _ = read_pairs(dataset, split=settings.split or None, embedded=False)
    pairs = [one for one in pairs if one.captions]
    numbers = measure(load_encoder(model, threads=settings.threads), pairs, settings)
    printed = (
        f"{dataset.name}: {settings.mosaics} mosaics of {len(pairs):,} pictures; {model}\n\n"
        f"{tables_of(numbers)}"
    )
    click.echo(printed)
    write_report(
        out,
        "heat_maps",
        settings=settings,
        data={"name": dataset.name, "pictures": len(pairs), "model": model},
        numbers=numbers,
        seconds=time.perf_counter() - started,
        printed=printed,
    )


if __name__ == "__main__":
    main()
