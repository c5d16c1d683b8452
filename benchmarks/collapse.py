"""Why squared distance needs a companion: five objectives, the same towers, the same pictures.

    python benchmarks/collapse.py --out collapse.json

Draws pictures of two coloured shapes with captions such as "a red circle above a blue square",
trains the small CNN and the GRU from scratch with each objective in turn, and prints held-out
recall beside alignment, uniformity and modality gap. Squared distance alone puts everything on one
point: alignment is nearly perfect, uniformity is 0 and recall is that of guessing. Two minutes on
one core; nothing is downloaded.
"""

import itertools
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image, ImageDraw
from report import format_table, write_report
from torch import Tensor

from retriever import metrics, objectives
from retriever.towers import DualEncoder

COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 80, 200),
    "yellow": (240, 210, 40),
    "purple": (140, 60, 180),
    "white": (245, 245, 245),
}
BACKGROUNDS = {"black": (10, 10, 10), "grey": (120, 120, 120), "brown": (110, 70, 40)}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
OPPOSITE = {"above": "below", "left of": "right of"}

Loss = Callable[[DualEncoder, Tensor, Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    "squared": lambda _, x, y, groups: objectives.squared_distance_loss(x, y),
    "squared+uniformity": lambda _, x, y, groups: objectives.squared_uniformity_loss(x, y),
    "clip": lambda model, x, y, groups: objectives.clip_loss(x, y, model.logit_scale, groups),
    "siglip": lambda model, x, y, groups: objectives.siglip_loss(
        x, y, model.logit_scale, model.logit_bias, groups
    ),
    "triplet": lambda _, x, y, groups: objectives.triplet_loss(x, y, groups=groups),
}


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting of the benchmark."""

    train_pictures: int = 1500
    test_pictures: int = 300
    side: int = 32  # pixels
    width: int = 16  # channels of the CNN's first layer
    text_width: int = 32  # token vectors and GRU states
    dim: int = 32  # of the shared space
    # Each with both of its captions. Small, because the hardest of many negatives drives towers
    # that know nothing yet to one point as well (Faghri et al. 2018 begin from trained ones).
    batch_pictures: int = 16
    epochs: int = 18
    lr: float = 5e-4
    # Strong, and the same for all: what an objective does not hold on to fades within the run.
    weight_decay: float = 2.0
    dropout: float = 0.0
    threads: int = 1  # the towers are too small to gain from more
    seed: int = 0


DEFAULTS = Settings()


@dataclass(frozen=True, slots=True)
class Scene:
    """Two coloured shapes, how the first lies to the second, and what lies behind them."""

    first: tuple[str, str]  # colour, shape
    second: tuple[str, str]
    relation: str  # a key of OPPOSITE
    background: str

    def captions(self) -> tuple[str, str]:
        """The scene told from either shape."""
        first, second = (f"{colour} {shape}" for colour, shape in (self.first, self.second))
        return (
            f"a {first} {self.relation} a {second} on {self.background}",
            f"on {self.background} ground the {second} is {OPPOSITE[self.relation]} the {first}",
        )

    def picture(self, side: int, rng: random.Random) -> Image.Image:
        """(side, side) RGB with shapes of varying size and place, drawn large and reduced."""
        big = 4 * side
        image = Image.new("RGB", (big, big), BACKGROUNDS[self.background])
        draw = ImageDraw.Draw(image)
        for (colour, shape), centre in zip((self.first, self.second), (0.27, 0.73), strict=True):
            along = (centre + rng.uniform(-0.05, 0.05)) * big
            across = rng.uniform(0.3, 0.7) * big
            x, y = (across, along) if self.relation == "above" else (along, across)
            _draw_shape(draw, shape, x, y, rng.uniform(0.14, 0.2) * big, COLOURS[colour])
        return image.resize((side, side), Image.Resampling.LANCZOS)


def _draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, fill: tuple[int, int, int]
) -> None:
    box = (x - r, y - r, x + r, y + r)
    if shape == "circle":
        draw.ellipse(box, fill)
    elif shape == "square":
        draw.rectangle(box, fill)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill)
    elif shape == "cross":
        draw.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill)
        draw.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill)
    else:
        draw.ellipse(box, outline=fill, width=round(r / 2.5))


@dataclass(frozen=True, slots=True)
class Examples:
    """Pictures and their captions, two each: captions 2i and 2i + 1 belong to picture i."""

    pixels: Tensor  # (n, side, side, 3) uint8
    input_ids: Tensor  # (2n, t) int64
    attention_mask: Tensor  # (2n, t) int64


def draw_examples(settings: Settings) -> tuple[Examples, Examples, int]:
    """Training and test examples of different scenes, and the size of the vocabulary."""
    rng = random.Random(settings.seed)
    things = list(itertools.product(COLOURS, SHAPES))
    scenes = [
        Scene(first, second, relation, background)
        for first, second in itertools.permutations(things, 2)
        for relation in OPPOSITE
        for background in BACKGROUNDS
    ]
    scenes = rng.sample(scenes, settings.train_pictures + settings.test_pictures)
    sentences = [caption.split() for scene in scenes for caption in scene.captions()]
    words = {word: i for i, word in enumerate(sorted({w for s in sentences for w in s}), 1)}
    longest = max(len(sentence) for sentence in sentences)
    ids = [[words[w] for w in s] + [0] * (longest - len(s)) for s in sentences]
    input_ids = torch.tensor(ids)
    drawn = [np.asarray(scene.picture(settings.side, rng)) for scene in scenes]
    pixels = torch.from_numpy(np.stack(drawn))
    n = settings.train_pictures
    train = Examples(pixels[:n], input_ids[: 2 * n], (input_ids[: 2 * n] > 0).long())
    test = Examples(pixels[n:], input_ids[2 * n :], (input_ids[2 * n :] > 0).long())
    return train, test, len(words) + 1


def train_towers(loss: Loss, train: Examples, vocabulary: int, settings: Settings) -> DualEncoder:
    """The two towers, from the same random weights and batches whatever the objective."""
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    half = [0.5, 0.5, 0.5]
    image = {"tower": "cnn", "width": settings.width, "size": settings.side}
    text = {"tower": "gru", "vocabulary": vocabulary, "width": settings.text_width}
    model = DualEncoder(
        {
            "dim": settings.dim,
            "dropout": settings.dropout,
            "image": {**image, "mean": half, "std": half},
            "text": {**text, "max_tokens": train.input_ids.shape[1]},
        }
    )
    matrices = [weights for weights in model.parameters() if weights.ndim > 1]
    others = [weights for weights in model.parameters() if weights.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": matrices}, {"params": others, "weight_decay": 0.0}],
        lr=settings.lr,
        weight_decay=settings.weight_decay,
    )
    for _ in range(settings.epochs):
        order = torch.from_numpy(rng.permutation(len(train.pixels)))
        for pictures in order.split(settings.batch_pictures):
            if len(pictures) < settings.batch_pictures:
                continue
            captions = torch.stack([2 * pictures, 2 * pictures + 1], dim=1).flatten()
            texts = model.encode_texts(train.input_ids[captions], train.attention_mask[captions])
            images = model.encode_images(train.pixels[pictures]).repeat_interleave(2, dim=0)
            optimiser.zero_grad()
            loss(model, images, texts, captions // 2).backward()
            optimiser.step()
    return model.eval()


def measure(model: DualEncoder, test: Examples) -> dict[str, float]:
    """Recalls in percent and the diagnostics on the test examples."""
    with torch.inference_mode():
        images = model.encode_images(test.pixels).numpy()
        texts = model.encode_texts(test.input_ids, test.attention_mask).numpy()
    owners = np.repeat(np.arange(len(images)), 2)
    return {
        "alignment": metrics.alignment(images[owners], texts),
        "uniformity_images": metrics.uniformity(images),
        "uniformity_texts": metrics.uniformity(texts),
        "modality_gap": metrics.modality_gap(images, texts),
        **metrics.retrieval_metrics(images, texts, owners),
    }


def chance(pictures: int, captions_each: int) -> dict[str, float]:
    """The recalls in percent that guessing gives."""
    captions = pictures * captions_each
    table = {}
    for k in metrics.KS:
        table[f"t2i_r@{k}"] = 100 * k / pictures
        missed = math.comb(captions - captions_each, k) / math.comb(captions, k)
        table[f"i2t_r@{k}"] = 100 * (1 - missed)
    return table


RECALLS = [f"{direction}_r@{k}" for direction in ("t2i", "i2t") for k in metrics.KS]


def row_of(name: str, table: dict[str, float]) -> Sequence[str]:
    """One line of the printed table; guessing has no embeddings, hence no diagnostics."""
    diagnostics = ["alignment", "uniformity_images", "modality_gap"]
    # + 0.0 turns −0 into 0.
    shown = [f"{round(table[key], 3) + 0.0:.3f}" if key in table else "" for key in diagnostics]
    return [name, *shown, *(f"{table[key]:.1f}" for key in RECALLS)]


@click.command()
@click.option("--epochs", default=DEFAULTS.epochs, show_default=True, help="Passes over the data.")
@click.option("--seed", default=DEFAULTS.seed, show_default=True, help="Of data and weights.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write the numbers as JSON.")
def main(epochs: int, seed: int, out: Path | None) -> None:
    """Train two small towers with each objective and show which of them collapse."""
    settings = Settings(epochs=epochs, seed=seed)
    torch.set_num_threads(settings.threads)
    started = time.perf_counter()
    train, test, vocabulary = draw_examples(settings)
    numbers = {}
    for name, loss in LOSSES.items():
        begun = time.perf_counter()
        numbers[name] = measure(train_towers(loss, train, vocabulary, settings), test)
        click.echo(f"{name}: {time.perf_counter() - begun:.0f} s", err=True)
    numbers["chance"] = chance(len(test.pixels), 2)
    header = ["objective", "alignment", "uniformity", "gap", *RECALLS]
    printed = format_table(header, [row_of(*item) for item in numbers.items()])
    click.echo(printed)
    data = {
        "name": "rendered pairs of coloured shapes",
        "train_pictures": len(train.pixels),
        "test_pictures": len(test.pixels),
        "captions_per_picture": 2,
        "vocabulary": vocabulary,
    }
    write_report(
        out,
        "collapse",
        settings=settings,
        data=data,
        numbers=numbers,
        printed=printed,
        seconds=time.perf_counter() - started,
    )


if __name__ == "__main__":
    main()
