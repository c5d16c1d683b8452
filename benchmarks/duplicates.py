"""What `retriever duplicates` finds: pictures that were altered, and pictures that merely resemble.

    python benchmarks/duplicates.py flickr8k --out benchmarks/results/duplicates.json

Pictures of a folder are saved anew, scaled, cropped, brightened and so on, each by itself; the
first table says how many of the altered ones are told to be near-duplicates of their originals by
both likenesses together, and by each alone. The second has the reverse: the pairs of *different*
files in the whole folder that each of them would put together. Some are the same photograph (two of
Flickr8k are known to be), most of those that one likeness alone finds are not.

Without the folder there is nothing to measure: the script says so and ends well.
"""

import io
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from report import format_table, out_option, write_report

from retriever.data import list_pictures, read_image
from retriever.decoding import difference_hash
from retriever.duplicates import MAX_BITS, MIN_COSINE, differing
from retriever.encoders import Encoder, load_encoder

Bits = NDArray[np.uint64]
Rows = NDArray[np.float32]
BATCH = 64


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting of the benchmark."""

    altered: int = 300  # pictures, evenly spread over the folder
    max_bits: int = MAX_BITS
    min_cosine: float = MIN_COSINE
    threads: int | None = None


DEFAULTS = Settings()


def saved_as_jpeg(picture: Image.Image, quality: int) -> Image.Image:
    """What a picture becomes as a JPEG."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def scaled(picture: Image.Image, ratio: float) -> Image.Image:
    """A picture made smaller."""
    width, height = (max(1, round(side * ratio)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def cropped(picture: Image.Image, share: float) -> Image.Image:
    """Without `share` of each side, taken from the left and the top."""
    width, height = picture.size
    return picture.crop((round(width * share), round(height * share), width, height))


def signed(picture: Image.Image) -> Image.Image:
    """With a line of text near the bottom."""
    shown = picture.copy()
    width, height = shown.size
    place = (width * 0.55, height * 0.9)
    ImageDraw.Draw(shown).text(place, "(c) somebody, 2024", "white", font_size=height / 16)
    return shown


ALTERATIONS: Mapping[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG, quality 30": lambda one: saved_as_jpeg(one, 30),
    "half the size": lambda one: scaled(one, 0.5),
    "a quarter of the size": lambda one: scaled(one, 0.25),
    "brighter by a fifth": lambda one: ImageEnhance.Brightness(one).enhance(1.2),
    "more contrast by a third": lambda one: ImageEnhance.Contrast(one).enhance(1.33),
    "grey": lambda one: one.convert("L").convert("RGB"),
    "a line of text in it": signed,
    "a white border of 3 %": lambda one: ImageOps.expand(one, round(0.03 * min(one.size)), "white"),
    "cropped by 2 %": lambda one: cropped(one, 0.02),
    "cropped by 5 %": lambda one: cropped(one, 0.05),
    "cropped by 10 %": lambda one: cropped(one, 0.1),
    "turned by 1 degree": lambda one: one.rotate(1, Image.Resampling.BICUBIC),
    "mirrored": ImageOps.mirror,
}


def looks(encoder: Encoder, pictures: list[Image.Image]) -> tuple[Bits, Rows]:
    """Perceptual hashes (n,) and embeddings (n, d)."""
    hashes = np.array([difference_hash(one) for one in pictures], dtype=np.int64)
    return hashes.view(np.uint64), encoder.encode_images(pictures)


def measure_altered(
    encoder: Encoder, pictures: list[Image.Image], settings: Settings
) -> list[dict[str, Any]]:
    """Of the pictures altered in each way, the share that is told to be near its original."""
    hashes, rows = looks(encoder, pictures)
    found = []
    for name, alter in ALTERATIONS.items():
        other_hashes, other_rows = looks(encoder, [alter(one) for one in pictures])
        bits = differing(hashes, other_hashes)
        cosines = np.einsum("nd,nd->n", rows, other_rows)
        by_hash, by_embedding = bits <= settings.max_bits, cosines >= settings.min_cosine
        found.append(
            {
                "alteration": name,
                "both": float(np.mean(by_hash & by_embedding)),
                "hash": float(np.mean(by_hash)),
                "embedding": float(np.mean(by_embedding)),
                "bits_p95": float(np.percentile(bits, 95)),
                "cosine_p5": float(np.percentile(cosines, 5)),
            }
        )
    return found


def measure_pairs(hashes: Bits, rows: Rows, settings: Settings) -> dict[str, int]:
    """Pairs of a folder that each likeness would put together, each pair compared."""
    counts = dict.fromkeys(("both", "hash", "embedding"), 0)
    for start in range(0, len(rows), BATCH):
        block = slice(start, start + BATCH)
        later = np.arange(len(rows))[None] > np.arange(len(rows))[block, None]
        by_hash = differing(hashes[block, None], hashes[None]) <= settings.max_bits
        by_embedding = rows[block] @ rows.T >= settings.min_cosine
        counts["hash"] += int((by_hash & later).sum())
        counts["embedding"] += int((by_embedding & later).sum())
        counts["both"] += int((by_hash & by_embedding & later).sum())
    return counts


def tables_of(numbers: Mapping[str, Any]) -> str:
    """The numbers as Markdown."""
    altered = [
        [one["alteration"]]
        + [f"{100 * one[name]:.1f}" for name in ("both", "hash", "embedding")]
        + [f"{one['bits_p95']:.0f}", f"{one['cosine_p5']:.3f}"]
        for one in numbers["altered"]
    ]
    header = ["altered pictures found, %", "both", "hash alone", "embedding alone"]
    pairs = numbers["pairs"]
    return "\n\n".join(
        [
            format_table([*header, "bits, p95", "cosine, p5"], altered),
            format_table(
                ["pairs of files put together", *header[1:]],
                [["", *(f"{pairs[name]:,}" for name in ("both", "hash", "embedding"))]],
            ),
        ]
    )


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--model", default="mini", show_default=True)
@click.option("--altered", default=DEFAULTS.altered, show_default=True, help="Pictures altered.")
@click.option("--max-bits", default=DEFAULTS.max_bits, show_default=True)
@click.option("--min-cosine", default=DEFAULTS.min_cosine, show_default=True)
@click.option("--threads", type=int, help="CPU threads of the encoder.")
@out_option
def main(folder: Path, model: str, out: Path | None, **options: Any) -> None:
    """Measure what is found in FOLDER, a folder of pictures."""
    if not folder.is_dir():
        click.echo(f"skipped: {folder} is not here", err=True)
        return
    settings = Settings(**options)
    started = time.perf_counter()
    encoder = load_encoder(model, threads=settings.threads)
    paths = [one.path for one in list_pictures(folder)]
    chosen = paths[:: max(1, len(paths) // settings.altered)][: settings.altered]
    altered = measure_altered(encoder, [read_image(path).image for path in chosen], settings)
    parts = [
        looks(encoder, [read_image(path).image for path in paths[start : start + BATCH]])
        for start in range(0, len(paths), BATCH)
    ]
    hashes, rows = (np.concatenate(side) for side in zip(*parts, strict=True))
    numbers = {"altered": altered, "pairs": measure_pairs(hashes, rows, settings)}
    printed = (
        f"{folder.name}: {len(paths):,} pictures, {len(chosen)} of them altered; {model};"
        f" at most {settings.max_bits} bits, a cosine of at least {settings.min_cosine}\n\n"
        f"{tables_of(numbers)}"
    )
    click.echo(printed)
    write_report(
        out,
        "duplicates",
        settings=settings,
        data={"name": folder.name, "pictures": len(paths), "model": model},
        numbers=numbers,
        seconds=time.perf_counter() - started,
        printed=printed,
    )


if __name__ == "__main__":
    main()
