"""How far training is from the matrix products alone, and its memory by the size of a batch.

    python benchmarks/train.py --out benchmarks/results/train.json

First the projections are trained on cached features of the sizes that Flickr8k and `mini` have,
and after every step the bare matrix products of such a step are computed, so that both meet the
same busy minutes. Then both towers (a small CNN, a GRU) are trained from scratch with larger and
larger batches, by gradient caching and, for comparison, with all activations kept, each in a
process of its own whose peak memory is measured. Pictures and captions are made up: only their
number and their length matter. Some ten minutes on two CPU cores.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from PIL import Image
from report import (
    RETRIEVER,
    format_table,
    percentiles,
    run_process,
    sizes_option,
    write_report,
)

from retriever.settings import TrainConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from retriever.towers import DualEncoder

BATCHES = (256, 1024, 4096)
WORDS = [f"word{i}" for i in range(4000)]


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting of the benchmark."""

    pictures: int = 6000
    held_out: int = 1000
    captions: int = 5  # of each picture
    words: int = 11  # of each caption
    image_features: int = 1280  # of EfficientNet-Lite0
    text_features: int = 384  # of MiniLM
    dim: int = 384
    batch_size: int = 256
    captions_per_picture: int = 2
    epochs: int = 4
    batches: tuple[int, ...] = BATCHES
    micro_batch: int = 256
    kept: int = 1024  # largest batch that is also trained with all activations kept
    image_size: int = 64  # of the pictures that both towers are trained on
    threads: int = 0
    seed: int = 0


DEFAULTS = Settings()
Say = Callable[[str], None]


def make_folder(folder: Path, settings: Settings) -> None:
    """Tiny pictures of noise, each with captions of random words."""
    rng = np.random.default_rng(settings.seed)
    folder.mkdir()
    lines = []
    for i in range(settings.pictures + settings.held_out):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        captions = rng.choice(WORDS, (settings.captions, settings.words)).tolist()
        split = "train" if i < settings.pictures else "val"
        record = {"file": f"{i}.png", "captions": [*map(" ".join, captions)], "split": split}
        lines.append(json.dumps(record))
    (folder / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")


# ── frozen towers ────────────────────────────────────────────────────────────────────────────────


def make_checkpoint(folder: Path, settings: Settings) -> None:
    """Untrained towers with features of the right sizes, and next to no work to get them."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    from retriever.checkpoints import save_checkpoint
    from retriever.towers import DualEncoder

    vocabulary = {word: i for i, word in enumerate(["[PAD]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    image = {"tower": "cnn", "width": settings.image_features // 8, "size": 8, "resize": "squash"}
    image |= {"interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3}
    text = {"tower": "static", "vocabulary": len(vocabulary), "max_tokens": 64}
    text |= {"width": settings.text_features}
    config = {"dim": settings.dim, "dropout": 0.1, "image": image, "text": text}
    save_checkpoint(folder, DualEncoder(config), tokenizer, {})


def matrix_products(model: "DualEncoder", settings: Settings) -> Callable[[], None]:
    """What multiplies the matrices of one step, forward and backward, and does nothing else."""
    import torch

    b = settings.batch_size
    rows = b * settings.captions_per_picture
    products = []
    for projection, m in ((model.image_projection, b), (model.text_projection, rows)):
        for layer in (projection.linear, projection.up, projection.down):
            weight = layer.weight.detach().clone()
            products.append((torch.rand(m, weight.shape[1]), weight.T))
    products.append((torch.rand(rows, settings.dim), torch.rand(rows, settings.dim).T))

    def multiply() -> None:
        for left, right in products:
            product = left @ right
            product @ right.T  # the gradient of the left side
            left.T @ product  # and of the right one

    return multiply


def measure_frozen(home: Path, settings: Settings) -> dict[str, Any]:
    """Steps of training the projections, in turn with the bare matrix products of a step."""
    from retriever.checkpoints import load_checkpoint
    from retriever.training import train

    make_checkpoint(home / "towers.ckpt", settings)
    multiply = matrix_products(load_checkpoint(home / "towers.ckpt")[0], settings)
    config = TrainConfig(
        init=str(home / "towers.ckpt"),
        batch_size=settings.batch_size,
        captions_per_picture=settings.captions_per_picture,
        epochs=settings.epochs,
        patience=settings.epochs,
        threads=settings.threads,
        seed=settings.seed,
    )
    steps: list[tuple[float, float]] = []
    products: list[tuple[float, float]] = []
    rest: list[tuple[float, float]] = []
    before: tuple[float, float] | None = None

    def since(start: tuple[float, float]) -> tuple[float, float]:
        return time.perf_counter() - start[0], time.process_time() - start[1]

    def progress(done: int, total: int) -> None:
        nonlocal before
        if before:
            # The first step of an epoch also has the end of the one before: all that is no step.
            (steps if done > 1 else rest).append(since(before))
        began = time.perf_counter(), time.process_time()
        multiply()
        products.append(since(began))
        before = time.perf_counter(), time.process_time()

    train([home / "data"], home / "frozen.ckpt", config, cache=home / "cache", progress=progress)
    step, product = (median(cpu for _, cpu in found) for found in (steps, products))
    return {
        "step": percentiles([wall for wall, _ in steps]),
        "products": percentiles([wall for wall, _ in products]),
        "step_cpu_ms": round(1000 * step, 3),
        "products_cpu_ms": round(1000 * product, 3),
        "share_of_products": round(product / step, 3),
        "steps_per_epoch": len(products) // settings.epochs,
        "between_epochs_cpu_ms": round(1000 * (median(cpu for _, cpu in rest) - step), 1),
    }


# ── large batches ────────────────────────────────────────────────────────────────────────────────


def measure_batch(home: Path, batch: int, micro_batch: int, settings: Settings) -> dict[str, Any]:
    """Peak memory and CPU time of one epoch of both towers, by `retriever train`."""
    out = home / f"{batch}-{micro_batch}.ckpt"
    options = {
        "--cache": home / "cache",
        "--batch-size": batch,
        "--micro-batch": micro_batch,
        "--captions-per-picture": settings.captions_per_picture,
        "--image-size": settings.image_size,
        "--dim": settings.dim,
        "--epochs": 1,
        "--threads": settings.threads,
        "--seed": settings.seed,
    }
    flat = [str(part) for option in options.items() for part in option]
    used = run_process([*RETRIEVER, "train", home / "data", "-o", out, *flat])
    pictures = max(settings.pictures // batch, 1) * min(batch, settings.pictures)
    return {
        "batch": batch,
        "cached": batch > micro_batch,
        "peak_mb": used["peak_mb"],
        "cpu_s": used["cpu_s"],
        "pictures": pictures,
    }


def measure_batches(home: Path, settings: Settings, say: Say) -> list[dict[str, Any]]:
    """Every batch size in parts of `micro_batch`, and the smaller ones as a whole too."""
    sizes = [min(batch, settings.pictures) for batch in settings.batches]
    # The first decodes the pictures for all others, and its memory is not looked at.
    measure_batch(home, min(sizes), settings.micro_batch, settings)
    found = []
    for batch in sizes:
        found.append(measure_batch(home, batch, settings.micro_batch, settings))
        if settings.micro_batch < batch <= settings.kept:
            found.append(measure_batch(home, batch, batch, settings))
        say(f"batches of {batch:,}: {found[-1]['peak_mb']:.0f} MB")
    return found


def tables_of(numbers: Mapping[str, Any]) -> str:
    """Both tables as Markdown."""
    frozen = numbers["frozen"]
    rows = [
        [name, f"{frozen[key]['p50_ms']:.1f}", f"{frozen[f'{key}_cpu_ms']:.1f}"]
        for name, key in (("step", "step"), ("its matrix products alone", "products"))
    ]
    shown = format_table(["projections on cached features", "p50 ms", "CPU ms"], rows)
    share = (
        f"{100 * frozen['share_of_products']:.0f} % of a step's CPU time is its matrix products. "
        f"Besides its {frozen['steps_per_epoch']} steps, an epoch takes "
        f"{frozen['between_epochs_cpu_ms'] / 1000:.2f} s of CPU to measure and to save."
    )
    rows = [
        [
            f"{one['batch']:,}",
            "in parts" if one["cached"] else "kept",
            f"{one['peak_mb']:.0f}",
            f"{1000 * one['cpu_s'] / one['pictures']:.2f}",
        ]
        for one in numbers["batches"]
    ]
    header = ["pictures in a batch", "activations", "peak MB", "CPU ms a picture"]
    return "\n\n".join([shown, share, format_table(header, rows)])


def draw(record: Mapping[str, Any]) -> dict[str, "Figure"]:
    """Peak memory against the size of a batch, in parts and as a whole."""
    from plots import line, new_figure

    figure, [axes] = new_figure(
        "Memory of training both towers", "pictures in a batch", "peak MB", log="x"
    )
    numbers = record["numbers"]["batches"]
    micro_batch = record["settings"]["micro_batch"]
    for number, (label, wanted) in enumerate(
        (
            ("gradient caching", lambda one: one["cached"] or one["batch"] <= micro_batch),
            ("all activations kept", lambda one: not one["cached"]),
        )
    ):
        shown = [one for one in numbers if wanted(one)]
        line(
            axes, number, label, [one["batch"] for one in shown], [one["peak_mb"] for one in shown]
        )
    axes.set_ylim(bottom=0)
    axes.legend()
    return {"": figure}


@click.command()
@click.option("--pictures", default=DEFAULTS.pictures, show_default=True, help="To train on.")
@click.option("--held-out", default=DEFAULTS.held_out, show_default=True, help="To measure with.")
@click.option("--batch-size", default=DEFAULTS.batch_size, show_default=True, help="Projections.")
@click.option("--epochs", default=DEFAULTS.epochs, show_default=True, help="Of the projections.")
@sizes_option("--batches", BATCHES, "Sizes of batches that both towers are trained with.", least=2)
@click.option(
    "--micro-batch", default=DEFAULTS.micro_batch, show_default=True, help="Parts of these."
)
@click.option(
    "--kept",
    default=DEFAULTS.kept,
    show_default=True,
    help="Largest batch that is also trained as a whole, in much memory.",
)
@click.option("--image-size", default=DEFAULTS.image_size, show_default=True)
@click.option("--threads", default=DEFAULTS.threads, show_default=True, help="0: torch's choice.")
@click.option("--seed", default=DEFAULTS.seed, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Also write the record as JSON.")
def main(out: Path | None, **options: Any) -> None:
    """Measure a step of training against its matrix products, and memory by batch size."""
    settings = Settings(**options)
    started = time.perf_counter()

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    with tempfile.TemporaryDirectory(prefix="train-") as folder:
        home = Path(folder)
        make_folder(home / "data", settings)
        numbers = {
            "frozen": measure_frozen(home, settings),
            "batches": measure_batches(home, settings, say),
        }
    printed = tables_of(numbers)
    click.echo(printed)
    write_report(
        out,
        "train",
        settings=settings,
        data={
            "name": "made up",
            "pictures": settings.pictures,
            "captions": settings.pictures * settings.captions,
        },
        numbers=numbers,
        seconds=time.perf_counter() - started,
        printed=printed,
        packages=("torch",),
        draw=draw,
    )


if __name__ == "__main__":
    main()
