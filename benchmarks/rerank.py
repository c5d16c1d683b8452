"""Would a search gain from ranking its first fifty again? A classifier on a library's own captions.

    python benchmarks/rerank.py fashion-products grocery-store flickr8k coco-mini \\
        --libraries libraries --out benchmarks/results/rerank.json

`systems.py` measures classifiers that look at features of both towers, which no library keeps. Here
they see what one does keep, its embeddings, and are trained on its captions as `retriever tune`
trains its maps: fold by fold, asked by texts of pictures that neither trained nor chose anything.
They come after the maps, where these are better, and are measured once more after the correction
for hubs. The first `--top` pictures of a text are ordered by cosine plus a part of the logit, which
part, and after which epoch, is chosen by R@1 of the pictures that stop the training; none is one of
the choices.

Of a data set with a validation split that is asked, of others everything. Libraries are made where
--libraries says, once. Data sets that are not there are left out.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from numpy.typing import NDArray
from report import format_table, out_option, present, write_report
from tuning import ids_of, library_of

from indexes.store import Store
from retriever import tuning
from retriever.encoders import load_encoder
from retriever.metrics import bootstrap_interval, top_k
from retriever.tuning import General, Pairs, TuneConfig

if TYPE_CHECKING:
    from baselines.fusion import PooledMatcher

Scores = NDArray[np.float32]
Places = NDArray[np.int64]

# How much a logit counts beside a cosine, in units in which both spread alike among candidates.
SHARES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5)
FAR = -1e4  # the logit of what is no wrong answer


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting of the benchmark; those of `TuneConfig` are its own."""

    model: str = "mini"
    fusion: str = "product"  # of the two embeddings, one of `baselines.fusion.POOLED`
    width: int = 256
    top: int = 50
    epochs: int = 30
    batch_size: int = 64
    logit_scale: float = 20.0  # of the cosine, which the classifier corrects
    tune_epochs: int = tuning.DEFAULTS.epochs
    resamples: int = tuning.DEFAULTS.resamples
    seed: int = 0


DEFAULTS = Settings()


# ── candidates ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """The first pictures of each text, best first.

    pictures: (m, k) rows. scores: (m, k) cosines. is_right: (m, k).
    """

    pictures: Places
    scores: Scores
    is_right: NDArray[np.bool_]

    @classmethod
    def of(cls, pairs: Pairs, top: int) -> "Candidates":
        """All texts of some pairs, the first `top` pictures of each."""
        pictures = top_k(pairs.texts, pairs.pictures, min(top, len(pairs)))
        scores = np.einsum("qd,qkd->qk", pairs.texts, pairs.pictures[pictures])
        right = np.zeros((len(pairs.texts), len(pairs)), dtype=np.bool_)
        right[pairs.edges[:, 1], pairs.edges[:, 0]] = True
        is_right = np.take_along_axis(right, pictures, axis=1)
        return cls(pictures, scores.astype(np.float32), is_right)

    def is_first(self, added: Scores | float = 0.0) -> NDArray[np.bool_]:
        """(m,) whether a right picture is first; among equal scores the right one comes last."""
        scores = self.scores + added
        right = np.where(self.is_right, scores, -np.inf).max(axis=1, keepdims=True)
        is_before = (scores >= right) & ~self.is_right
        return self.is_right.any(axis=1) & ~is_before.any(axis=1)


# ── the classifier ───────────────────────────────────────────────────────────────────────────────


def logits_of(matcher: "PooledMatcher", pairs: Pairs, candidates: Candidates) -> Scores:
    """(m, k) of each text with each of its candidates."""
    import torch

    matcher.eval()
    with torch.inference_mode():
        (images,) = matcher.encode_images(torch.from_numpy(pairs.pictures))
        (texts,) = matcher.encode_texts(torch.from_numpy(pairs.texts))
        found = [
            matcher.compare((images[torch.from_numpy(row)],), (text[None],))[:, 0].numpy()
            for row, text in zip(candidates.pictures, texts, strict=True)
        ]
    return np.stack(found)


def weighed(candidates: Candidates, logits: Scores) -> tuple[float, float]:
    """The best R@1 and the weight of the logits that gives it; of equals the smallest."""
    from baselines.reranking import spread

    unit = spread(candidates.scores) / spread(logits)
    tried = [(float(candidates.is_first().mean()), 0.0)]
    for share in SHARES:
        weight = share * unit
        tried.append((float(candidates.is_first(weight * logits).mean()), weight))
    return max(tried, key=lambda one: one[0])


def learn(
    train: Pairs,
    spaces: Mapping[str, tuple[Pairs, Pairs]],
    pairs: tuple[Pairs, Pairs],
    settings: Settings,
) -> dict[str, tuple[NDArray[np.bool_], NDArray[np.bool_], float]]:
    """Trains one classifier, and gives what it brings to each space.

    Args:
        train: pairs that it learns.
        spaces: by name, where the validation and the held-out pairs get their cosines.
        pairs: the validation and the held-out ones where `train` is, which the classifier sees.
        settings: of the classifier.

    Returns:
        By space, of the held-out texts (m,) whether the right picture is first before and after,
        and the weight that was chosen.
    """
    import torch
    from baselines.fit import descend, lr_factor, optimiser_of
    from baselines.fusion import FusionConfig, PooledMatcher, confusing_batches, match_loss
    from torch import nn

    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    dim = train.pictures.shape[1]
    matcher = PooledMatcher((dim, dim), settings.fusion, settings.width)
    # It begins as if it were not there.
    nn.init.zeros_(matcher.judge[-1].weight)
    nn.init.zeros_(matcher.judge[-1].bias)
    config = FusionConfig(settings.epochs, settings.batch_size, seed=settings.seed)
    optimiser = optimiser_of(matcher, config.lr, config.weight_decay)
    near = top_k(train.pictures, train.pictures, min(config.depth + 1, len(train)))[:, 1:]
    table = tuning.text_table(train)
    counts = (table >= 0).sum(axis=1)
    images, texts = torch.from_numpy(train.pictures), torch.from_numpy(train.texts)
    told = {
        name: [Candidates.of(one, settings.top) for one in both] for name, both in spaces.items()
    }
    best = {name: (float(one.is_first().mean()), 0.0) for name, (one, _) in told.items()}
    added: dict[str, Scores | float] = dict.fromkeys(told, 0.0)
    total, done = settings.epochs * max(len(train) // settings.batch_size, 1), 0
    for _ in range(settings.epochs):
        matcher.train()
        for rows in confusing_batches(near, config, rng):
            drawn = table[rows, rng.integers(counts[rows])]
            also = torch.from_numpy(tuning.also_told(table[rows], drawn))
            fused = matcher.compare(
                matcher.encode_images(images[rows]), matcher.encode_texts(texts[drawn])
            )
            logits = fused + settings.logit_scale * images[rows] @ texts[drawn].T
            loss = match_loss(logits.masked_fill(also, FAR), config.listwise)
            descend(matcher, optimiser, loss, config.lr * lr_factor(done, total, config.warmup))
            done += 1
        for name, (watched, asked) in told.items():
            found = weighed(watched, logits_of(matcher, pairs[0], watched))
            if found[0] > best[name][0]:
                best[name] = found
                added[name] = found[1] * logits_of(matcher, pairs[1], asked)
    return {
        name: (asked.is_first(), asked.is_first(added[name]), best[name][1])
        for name, (_, asked) in told.items()
    }


# ── what is measured ─────────────────────────────────────────────────────────────────────────────


def measure(pairs: Pairs, general: General, settings: Settings) -> dict[str, Any]:
    """R@1 of held-out texts before and after, with the interval of what is gained, by space."""
    began = time.process_time()
    config = TuneConfig(
        epochs=settings.tune_epochs, resamples=settings.resamples, seed=settings.seed
    )
    fitted = tuning.cross_fitted(pairs, general, config)
    assert fitted is not None
    heads, record = fitted
    is_better, _ = tuning.is_head_better(record)
    space = "tuned" if is_better else "untuned"
    nothing = tuning.identity(pairs.pictures.shape[1])
    hits: dict[str, list[NDArray[np.float64]]] = {}
    weights: dict[str, list[float]] = {}
    counts: list[Places] = []
    for head, (learned, watched, asked) in zip(heads, tuning.splits(pairs, config), strict=True):
        if asked is None:
            break
        parts = [one.carried(head) if is_better else one for one in (learned, watched, asked)]
        correction = tuning.chosen_correction(parts[0], parts[1], config)
        corrected = [one.carried(replace(nothing, correction=correction)) for one in parts[1:]]
        spaces = {
            space: (parts[1], parts[2]),
            f"{space}, corrected for hubs": (corrected[0], corrected[1]),
        }
        numbers, groups = np.unique(asked.text_groups, return_inverse=True)
        counts.append(np.bincount(groups))
        for name, (before, after, weight) in learn(
            parts[0], spaces, (parts[1], parts[2]), settings
        ).items():
            both = [np.bincount(groups, one, len(numbers)) for one in (before, after)]
            hits.setdefault(name, []).append(np.stack(both))
            weights.setdefault(name, []).append(round(weight, 4))
    asked_of = np.concatenate(counts)
    told: dict[str, Any] = {}
    for name, several in hits.items():
        both = np.concatenate(several, axis=1)

        def recalls(drawn: Places, both: NDArray[np.float64] = both) -> dict[str, float]:
            before, after = 100 * (both @ drawn) / float(asked_of @ drawn)
            return {"before": before, "after": after, "gain": after - before}

        found = recalls(np.ones(len(asked_of), dtype=np.int64))
        intervals = bootstrap_interval(
            recalls,
            [len(one) for one in counts],
            resamples=settings.resamples,
            seed=settings.seed,
        )
        told[name] = {one: round(float(value), 2) for one, value in found.items()} | {
            "interval": [round(end, 2) for end in intervals["gain"]],
            "weights": weights[name],
        }
    return {
        "pictures": len(pairs),
        "texts": int(asked_of.sum()),
        "spaces": told,
        "cpu_s": round(time.process_time() - began, 1),
    }


def tables_of(numbers: Mapping[str, Any], settings: Settings) -> str:
    """All that was measured."""
    rows = [
        [
            f"{name}, {space}",
            f"{one['before']:.1f}",
            f"{one['after']:.1f}",
            "{:+.1f} [{:+.1f}, {:+.1f}]".format(one["gain"], *one["interval"]),
        ]
        for name, record in numbers.items()
        for space, one in record["spaces"].items()
    ]
    header = ["t2i R@1 of held-out texts", "as found", "ranked again", "gain"]
    sizes = "; ".join(
        f"{name}: {one['texts']:,} texts of {one['pictures']:,} pictures, {one['cpu_s']:.0f} s CPU"
        for name, one in numbers.items()
    )
    return (
        f"{format_table(header, rows)}\n\nPercent, the first {settings.top} ranked again by fusion"
        f" ({settings.fusion}); 95 % intervals of groups that were dealt together. {sizes}."
    )


Folder = click.Path(path_type=Path)


@click.command()
@click.argument("datasets", nargs=-1, required=True, type=Folder)
@click.option("--libraries", required=True, type=Folder, help="Where libraries are, or are made.")
@click.option("--model", default=DEFAULTS.model, show_default=True)
@click.option(
    "--fusion",
    type=click.Choice(["concatenation", "sum", "product"]),
    default=DEFAULTS.fusion,
    show_default=True,
)
@click.option("--top", default=DEFAULTS.top, show_default=True, help="Ranked again.")
@click.option("--epochs", default=DEFAULTS.epochs, show_default=True, help="Of a classifier.")
@click.option("--tune-epochs", default=DEFAULTS.tune_epochs, show_default=True, help="At most.")
@click.option("--resamples", default=DEFAULTS.resamples, show_default=True, help="Of a bootstrap.")
@click.option("--seed", default=DEFAULTS.seed, show_default=True)
@out_option
def main(datasets: tuple[Path, ...], libraries: Path, out: Path | None, **options: Any) -> None:
    """Rank what libraries of DATASETS find again, folders of captioned pictures, and measure it."""
    settings = Settings(**options)
    there = present(datasets)
    if not there:
        return
    started = time.perf_counter()
    encoder = load_encoder(settings.model)
    background = encoder.encode_texts(tuning.other_texts())
    libraries.mkdir(parents=True, exist_ok=True)
    numbers: dict[str, Any] = {}
    for dataset in there:
        with Store.open(library_of(dataset, libraries, encoder)) as store:
            among = ids_of(store, dataset, "val")
            pairs = Pairs.of(store, TuneConfig(seed=settings.seed), among)
        name = dataset.resolve().name + (" val" if among is not None else "")
        numbers[name] = measure(pairs, General.of(background, pairs), settings)
        click.echo(f"{name}: {numbers[name]['spaces']}", err=True)
    printed = tables_of(numbers, settings)
    click.echo(printed)
    write_report(
        out,
        "rerank",
        settings=settings,
        data={"name": ", ".join(dataset.resolve().name for dataset in there)},
        numbers=numbers,
        printed=printed,
        seconds=time.perf_counter() - started,
        packages=("torch",),
    )


if __name__ == "__main__":
    main()
