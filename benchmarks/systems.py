"""Ways to align pictures and captions, side by side: the same data, metrics and, as far as can be,
towers.

    python benchmarks/systems.py flickr8k --out benchmarks/results/systems.json

Every row is trained here, on the training split; the validation split chooses epochs and weights,
the test split is measured once. From scratch: a CNN with a GRU, and ResNet-18 with an LSTM, with
squared distance alone, with the uniformity that keeps it from collapsing, and with the contrastive
objective. On features of towers that stay as they are (EfficientNet-Lite0 and MiniLM, downloaded if
they are not in WORK): projections, autoencoders, variational autoencoders, and classifiers that see
both sides at once and rank again what the dual encoder `--model` found. Bags of words and patches
stand for the time before. And that model itself, in int8 and pruned. `baselines/` has a module for
each.

What is done is kept in WORK: a run that was cut off goes on with the rows that are missing, and so
does one with other `--only`. Training ends early where the validation split gains nothing more.
About an hour on two CPU cores.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from recall import RECALLS, Ranks, engine
from report import format_table, write_report

from retriever import metrics
from retriever.data import Pair
from retriever.encoders import Encoder, OnnxEncoder, load_encoder
from retriever.errors import UsageError
from retriever.samples import Captions, Pictures
from retriever.settings import TrainConfig

if TYPE_CHECKING:
    from baselines.features import Features, Towers
    from baselines.fusion import Matcher
    from matplotlib.figure import Figure
    from tokenizers import Tokenizer
    from torch import nn

    from retriever.towers import DualEncoder

Rows = NDArray[np.float32]
Row = dict[str, Any]
Say = Callable[[str], None]
OBJECTIVES = {
    "squared": "squared distance",
    "squared+uniformity": "squared distance + uniformity",
    "clip": "contrastive",
}


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting of the benchmark."""

    model: str = "mini"
    checkpoint: Path | None = None  # the torch checkpoint that `model` was made of
    towers: Path | None = None  # a checkpoint whose towers give the features; else pretrained ones
    image_size: int = 64  # for towers from scratch
    scratch_epochs: int = 10
    epochs: int = 20  # of what is trained on features
    fusion_epochs: int = 8
    dim: int = 384
    top: int = 50  # candidates that are ranked again
    refit_pictures: int = 1000  # of the training split, after channels were taken out
    threads: int = 0
    resamples: int = 1000
    seed: int = 0


DEFAULTS = Settings()


@dataclass(eq=False)
class Bench:
    """The data, and what several rows need, made when it is first asked for."""

    dataset: Path
    work: Path
    settings: Settings
    say: Say

    @property
    def cache(self) -> Path:
        """Folder for pixels and features."""
        folder = self.work / "cache"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @cached_property
    def splits(self) -> dict[str, list[Pair]]:
        """The pairs by split."""
        from baselines.features import read_splits

        return read_splits(self.dataset)

    def captions(self, split: str) -> list[str]:
        """All texts, picture by picture."""
        return [one.text for pair in self.splits[split] for one in pair.captions]

    def owners(self, split: str) -> NDArray[np.int64]:
        """The picture of each caption."""
        pairs = self.splits[split]
        return np.repeat(np.arange(len(pairs)), [len(pair.captions) for pair in pairs])

    def pictures(self, split: str, size: int) -> Pictures:
        """Pixels of a split."""
        return Pictures(self.splits[split], size, self.cache, refuse)

    @cached_property
    def towers(self) -> "Towers":
        """Those that stay as they are."""
        from baselines.features import Towers

        return Towers.load(self.work, self.settings.towers)

    @cached_property
    def features(self) -> dict[str, "Features"]:
        """What they give, by split."""
        return self._features(self.towers)

    @cached_property
    def own_features(self) -> dict[str, "Features"]:
        """What the towers of the checkpoint give."""
        from baselines.features import Towers

        return self._features(Towers.load(self.work, self.settings.checkpoint))

    def _features(self, towers: "Towers") -> dict[str, "Features"]:
        self.say("features of pictures and captions")
        return towers.features(self.splits, refuse)

    @cached_property
    def encoder(self) -> Encoder:
        """The dual encoder that is shipped."""
        return load_encoder(self.settings.model, device="cpu")

    def embeddings(self, split: str) -> tuple[Rows, Rows]:
        """What it gives for pictures and captions."""
        pairs, texts = self.splits[split], self.captions(split)
        told = "\0".join([*(pair.file for pair in pairs), *texts])
        key = xxhash.xxh3_64_hexdigest(told.encode("utf-8", "surrogateescape"))
        path = self.cache / f"embeddings-{self.encoder.fingerprint}-{key}.npy"
        if not path.is_file():
            self.say(f"embeddings of {split} by {self.encoder.name}")
            images = self.encoder.encode_images([pair.path for pair in pairs])
            rows = np.concatenate([images, self.encoder.encode_texts(texts)])
            with path.with_suffix(".tmp").open("wb") as file:
                np.save(file, rows)
            path.with_suffix(".tmp").replace(path)
        rows = np.load(path)
        return rows[: len(pairs)], rows[len(pairs) :]

    @cached_property
    def plain(self) -> Ranks:
        """Ranks of the test split by the dual encoder that is shipped."""
        return ranks_of(*self.embeddings("test"), self.owners("test"))

    def measured(self, ranks: Ranks) -> Row:
        """Recalls with intervals, and differences to that dual encoder."""
        return ranks.describe(self.plain, self.settings)

    def embedded(self, images: Rows, texts: Rows) -> Row:
        """The same from embeddings, with what says how they lie in the space."""
        owners = self.owners("test")
        return self.measured(ranks_of(images, texts, owners)) | {
            "alignment": metrics.alignment(images[owners], texts),
            "uniformity": (metrics.uniformity(images) + metrics.uniformity(texts)) / 2,
            "modality_gap": metrics.modality_gap(images, texts),
        }


def refuse(fault: str) -> None:
    """Rows of all systems must be of the same pictures."""
    raise UsageError(fault)


def ranks_of(images: Rows, texts: Rows, owners: NDArray[np.int64]) -> Ranks:
    """The rank of each query's best positive."""
    everyone = np.arange(len(images))
    t2i = metrics.ranks_of_positives(texts, images, owners, everyone)
    i2t = metrics.ranks_of_positives(images, texts, everyone, owners)
    return Ranks(owners, t2i.ranks, i2t.ranks)


# ── from scratch ─────────────────────────────────────────────────────────────────────────────────


def by_retriever(bench: Bench, name: str, title: str, config: TrainConfig, frozen: int = 0) -> Row:
    """What `retriever train` can train is trained by it.

    Args:
        bench: the data.
        name: of the row.
        title: as the table shows it.
        config: of the run.
        frozen: parameters that stay as they are.
    """
    from retriever.checkpoints import load_checkpoint
    from retriever.training import EpochLog, train

    out = bench.work / f"{name}.ckpt"
    for left in (out, out.with_name(f"{out.name}.partial")):
        shutil.rmtree(left, ignore_errors=True)
    began: list[float] = []

    def progress(done: int, total: int) -> None:
        if not began:  # features are there now: the first step was done
            began.append(time.process_time())

    def on_epoch(entry: EpochLog) -> None:
        rsum = entry.metrics["rsum"]
        bench.say(f"{name}: epoch {entry.epoch}: loss {entry.loss:.3f}, rSum {rsum:.1f}")

    log = train(
        [bench.dataset], out, config, cache=bench.cache, on_epoch=on_epoch, progress=progress
    )
    cpu_s = time.process_time() - began[0]
    parameters = sum(one.numel() for one in load_checkpoint(out)[0].parameters())
    encoder = load_encoder(str(out), device="cpu")
    images = encoder.encode_images([pair.path for pair in bench.splits["test"]])
    texts = encoder.encode_texts(bench.captions("test"))
    shutil.rmtree(out)
    return {
        "system": title,
        "pixels": config.image_size,
        "parameters": parameters,
        "trained": parameters - frozen,
        "seconds": sum(entry["seconds"] for entry in log),
        "cpu_s": cpu_s,
        "log": log,
        **bench.embedded(images, texts),
    }


def scratch_config(bench: Bench, objective: str) -> TrainConfig:
    """Of a small CNN and a GRU."""
    settings = bench.settings
    return TrainConfig(
        image_size=settings.image_size,
        dim=settings.dim,
        objective=objective,
        epochs=settings.scratch_epochs,
        batch_size=128,
        threads=settings.threads,
        seed=settings.seed,
    )


def cnn_gru(bench: Bench, name: str, objective: str) -> list[Row]:
    """The documents' main system."""
    title = f"CNN + GRU from scratch, {OBJECTIVES[objective]}"
    return [by_retriever(bench, name, title, scratch_config(bench, objective))]


def small_towers(bench: Bench, objective: str) -> "tuple[DualEncoder, Tokenizer]":
    """The CNN and the GRU before training: larger towers have their tokenizer and sizes."""
    from retriever.training import build

    captions = [[one.text for one in pair.captions] for pair in bench.splits["train"]]
    return build(scratch_config(bench, objective), captions)


def resnet_lstm(bench: Bench, name: str, objective: str) -> list[Row]:
    """The same with larger towers."""
    from baselines.fit import PixelSource
    from baselines.resnet_lstm import ResNetLSTM

    like, tokenizer = small_towers(bench, objective)
    settings = bench.settings
    torch.manual_seed(settings.seed)
    model = ResNetLSTM(like.config, objective)
    sources = {
        split: PixelSource(
            bench.pictures(split, settings.image_size),
            Captions(bench.splits[split], tokenizer, like.config["text"]["max_tokens"]),
        )
        for split in bench.splits
    }
    title = f"ResNet-18 + LSTM from scratch, {OBJECTIVES[objective]}"
    row = fitted(bench, name, title, model, sources, settings.scratch_epochs, batch_size=128)
    return [row | {"pixels": settings.image_size}]


def fitted(
    bench: Bench,
    name: str,
    title: str,
    system: "nn.Module",
    sources: Mapping[str, Any],
    epochs: int,
    *,
    batch_size: int = 256,
    frozen: int = 0,
) -> Row:
    """A row of anything that `baselines.fit` trains."""
    from baselines.fit import FitConfig, embed, fit_embeddings, parameters_of

    config = FitConfig(epochs=epochs, batch_size=batch_size, seed=bench.settings.seed)
    began, cpu = time.perf_counter(), time.process_time()
    log = fit_embeddings(
        system, sources["train"], sources["val"], config, lambda line: bench.say(f"{name}: {line}")
    )
    spent = {"seconds": time.perf_counter() - began, "cpu_s": time.process_time() - cpu}
    trained = parameters_of(system)
    return {
        "system": title,
        "pixels": None,
        "parameters": trained + frozen,
        "trained": trained,
        **spent,
        "log": log,
        "config": asdict(config),
        **bench.embedded(*embed(system, sources["test"])),
    }


# ── on features ──────────────────────────────────────────────────────────────────────────────────


def frozen_towers(bench: Bench, name: str) -> list[Row]:
    """A projection on each tower."""
    from baselines.features import pretrained

    settings = bench.settings
    weights = pretrained(bench.work) if settings.towers is None else None
    given: dict[str, Any] = {"init": str(settings.towers)}
    if weights:
        names = ("image_tower", "image_weights", "text_tower", "text_weights")
        given = {key: getattr(weights, key) for key in names}
    config = TrainConfig(
        **given,
        dim=settings.dim,
        epochs=settings.epochs,
        threads=settings.threads,
        seed=settings.seed,
    )
    title = "Frozen towers + projections, contrastive"
    row = by_retriever(bench, name, title, config, bench.towers.parameters)
    return [row | {"pixels": bench.towers.model.config["image"]["size"]}]


def on_features(bench: Bench, name: str, title: str, system: "nn.Module") -> list[Row]:
    """A system that is trained on pooled features."""
    from baselines.fit import PooledSource

    sources = {split: PooledSource.of(one) for split, one in bench.features.items()}
    frozen = bench.towers.parameters
    row = fitted(bench, name, title, system, sources, bench.settings.epochs, frozen=frozen)
    return [row | {"pixels": bench.towers.model.config["image"]["size"]}]


def widths_of(features: "Features") -> tuple[int, int]:
    """Of pooled image and text features."""
    return features.images.shape[1], features.texts.shape[1]


def autoencoder(bench: Bench, name: str, objective: str) -> list[Row]:
    """One code for both sides."""
    from baselines.autoencoder import Autoencoder

    torch.manual_seed(bench.settings.seed)
    system = Autoencoder(widths_of(bench.features["train"]), bench.settings.dim, objective)
    title = f"Autoencoders with a shared code, {OBJECTIVES[objective]}"
    return on_features(bench, name, title, system)


def variational(bench: Bench, name: str) -> list[Row]:
    """The same with Gaussian codes."""
    from baselines.variational import VariationalAutoencoder

    torch.manual_seed(bench.settings.seed)
    system = VariationalAutoencoder(widths_of(bench.features["train"]), bench.settings.dim)
    title = "Variational autoencoders, product of experts"
    return on_features(bench, name, title, system)


def bags(bench: Bench, name: str, kind: str) -> list[Row]:
    """Words and patches, counted."""
    from baselines.bags import BagOfPatches, BagOfWords
    from baselines.fit import PooledSource
    from baselines.heads import Heads
    from baselines.variational import VariationalAutoencoder

    settings = bench.settings
    size = settings.image_size
    words = BagOfWords(bench.captions("train"))
    patches = BagOfPatches.fit(bench.pictures("train", size), seed=settings.seed)
    sources = {
        split: PooledSource(
            patches(bench.pictures(split, size)), words(bench.captions(split)), bench.owners(split)
        )
        for split in bench.splits
    }
    first = np.zeros(1, np.int64)
    widths = sources["train"].images(first, None).shape[1], sources["train"].texts(first).shape[1]
    torch.manual_seed(settings.seed)
    system: nn.Module
    if kind == "variational":
        system = VariationalAutoencoder(widths, settings.dim)
        title = "Bags of words and patches, variational autoencoders"
    else:
        system = Heads(widths, settings.dim, kind)
        title = f"Bags of words and patches + projections, {OBJECTIVES[kind]}"
    row = fitted(bench, name, title, system, sources, settings.epochs)
    return [row | {"pixels": size}]


# ── ranking again ────────────────────────────────────────────────────────────────────────────────


def neighbours_of(images: Rows, texts: Rows, owners: NDArray[np.int64], depth: int) -> Any:
    """(n, depth) the other pictures that the captions of each are nearest to."""
    means = np.zeros_like(images)
    np.add.at(means, owners, texts)
    near = metrics.top_k(means, images, min(depth, len(images) - 1) + 1)
    others = near != np.arange(len(images))[:, None]
    # A picture that is not among its own neighbours loses the last of them.
    return np.stack(
        [row[keep][: near.shape[1] - 1] for row, keep in zip(near, others, strict=True)]
    )


def fusion(bench: Bench, name: str, kind: str) -> list[Row]:
    """A classifier that ranks again what the dual encoder found."""
    from baselines.fit import FitConfig, PooledSource, fit_embeddings, parameters_of
    from baselines.fusion import CosineMatcher, FusionConfig, fit_matcher
    from baselines.reranking import Shortlist, rerank

    settings = bench.settings
    is_own = kind.endswith("-own")
    features = bench.own_features if is_own else bench.features
    torch.manual_seed(settings.seed)
    matcher = matcher_of(kind.removesuffix("-own"), features["train"])
    config: FusionConfig | FitConfig
    fusion_config = FusionConfig(epochs=settings.fusion_epochs, seed=settings.seed)
    near = neighbours_of(*bench.embeddings("train"), bench.owners("train"), fusion_config.depth)
    val = bench.embeddings("val")
    few = Shortlist.of(
        *val, bench.owners("val"), top=settings.top, captions=1, pictures=len(val[0]) // 3
    )

    def say(line: str) -> None:
        bench.say(f"{name}: {line}")

    began, cpu = time.perf_counter(), time.process_time()
    log = []
    if heads := matcher if isinstance(matcher, CosineMatcher) else getattr(matcher, "heads", None):
        config = FitConfig(epochs=settings.epochs, seed=settings.seed)
        sources = (PooledSource.of(features[split]) for split in ("train", "val"))
        log += fit_embeddings(heads, *sources, config, say)
    if not isinstance(matcher, CosineMatcher):
        config = fusion_config
        log += fit_matcher(matcher, features["train"], near, (features["val"], few), config, say)
    spent = {"seconds": time.perf_counter() - began, "cpu_s": time.process_time() - cpu}
    whole = Shortlist.of(*val, bench.owners("val"), top=settings.top)
    weight = rerank(whole, matcher, features["val"]).best().weight
    test = Shortlist.of(*bench.embeddings("test"), bench.owners("test"), top=settings.top)
    found = rerank(test, matcher, features["test"])
    trained = parameters_of(matcher)
    common = {
        "pixels": bench.towers.model.config["image"]["size"],
        "parameters": trained + bench.towers.parameters,
        "trained": trained,
        **spent,
        "log": log,
        "config": asdict(config),
        "query_ms": 1000 * found.seconds_per_query,
        "picture_ms": milliseconds_a_picture(bench),
        "stored_bytes": found.stored_bytes,
    }
    what = FUSIONS.get(kind, kind)
    title = f"{bench.encoder.name}, top {settings.top} ranked again by {what}"
    return [
        {"system": title, "weight": weight} | common | bench.measured(found.at(weight).ranks()),
        {"system": f"{title}, alone", "weight": None, "is_alone": True}
        | {key: value for key, value in common.items() if key != "log"}
        | bench.measured(found.at(np.inf).ranks()),
    ]


FUSIONS = {
    "cosine": "a second dual encoder, on frozen towers",
    "cross-attention-own": "cross-attention over its own regions and tokens",
}


def matcher_of(kind: str, features: "Features") -> "Matcher":
    """An untrained classifier."""
    from baselines.fusion import CosineMatcher, CrossAttentionMatcher, PooledMatcher

    image, text = widths_of(features)
    if kind == "cosine":
        return CosineMatcher((image, text), DEFAULTS.dim, "clip")
    if kind == "cross-attention":
        heads = CosineMatcher((image, text), DEFAULTS.dim, "clip")
        return CrossAttentionMatcher((features.regions.shape[2], text), heads)
    return PooledMatcher((image, text), kind)


def milliseconds_a_picture(bench: Bench, count: int = 20) -> float:
    """CPU time to open a picture and take it through the image tower once more."""
    from retriever.data import read_image

    model = bench.towers.model
    size = model.config["image"]["size"]
    began = time.process_time()
    with torch.inference_mode():
        for pair in bench.splits["test"][:count]:
            image = read_image(pair.path, target=size).image.resize((size, size))
            model.image_features(torch.from_numpy(np.asarray(image).copy())[None])
    return 1000 * (time.process_time() - began) / min(count, len(bench.splits["test"]))


# ── the model that is shipped ────────────────────────────────────────────────────────────────────


def shipped(bench: Bench, name: str) -> list[Row]:
    """As it is."""
    row = bench.embedded(*bench.embeddings("test"))
    size = bench.encoder.image_size
    title = f"{bench.encoder.name}, as shipped"
    return [{"system": title, "pixels": size, "parameters": None, "trained": None} | row]


def compressed(bench: Bench, name: str) -> list[Row]:
    """In int8, and pruned."""
    from baselines.compression import image_variants, packed_mb, unfolded, with_text_tower

    encoder = bench.encoder
    if not isinstance(encoder, OnnxEncoder):
        raise UsageError(f"{encoder.name} has no ONNX files that could be made smaller")
    folder = bench.work / "compressed"
    texts = bench.embeddings("test")[1]
    pixels = {
        split: bench.pictures(split, encoder.image_size).pixels for split in ("train", "test")
    }
    counts = min(bench.settings.refit_pictures, len(pixels["train"])), len(pixels["test"])
    train, test = (partial_of(pixels[split]) for split in ("train", "test"))
    rows = []
    for one in image_variants(encoder, train, test, counts, folder, bench.say):
        row = {"system": f"{encoder.name}, image tower: {one.name}", "part": "image tower"}
        row |= {"pixels": encoder.image_size, "parameters": None, "trained": None}
        rows.append(row | {"ms": one.ms, "mb": one.mb} | bench.embedded(one.rows, texts))
    images = bench.embeddings("test")[0]
    whole = unfolded(encoder.folder / "text.onnx", folder / "text.onnx")
    captions = bench.captions("test")
    for share in (0.0, 0.2, 0.3, 0.5):
        pruned = with_text_tower(encoder, folder / "pruned", share) if share else encoder
        began = time.process_time()
        found = pruned.encode_texts(captions)
        ms = 1000 * (time.process_time() - began) / len(captions)
        told = f"{100 * share:.0f} % of weights zero" if share else "as shipped"
        row = {"system": f"{encoder.name}, text tower: {told}", "part": "text tower"}
        row |= {"pixels": encoder.image_size, "parameters": None, "trained": None, "ms": ms}
        mb = packed_mb(pruned.folder / "text.onnx" if share else whole)
        rows.append(row | {"mb": mb} | bench.embedded(images, found))
    shutil.rmtree(folder)
    return rows


def partial_of(pixels: NDArray[np.uint8]) -> Callable[[slice], NDArray[np.uint8]]:
    """Pictures by place, in memory only then."""
    return lambda places: np.ascontiguousarray(pixels[places])


# ── the rows ─────────────────────────────────────────────────────────────────────────────────────

System = Callable[[Bench, str], list[Row]]
SYSTEMS: dict[str, System] = {
    "cnn-squared": lambda bench, name: cnn_gru(bench, name, "squared"),
    "cnn-uniformity": lambda bench, name: cnn_gru(bench, name, "squared+uniformity"),
    "cnn-contrastive": lambda bench, name: cnn_gru(bench, name, "clip"),
    "resnet-squared": lambda bench, name: resnet_lstm(bench, name, "squared"),
    "resnet-uniformity": lambda bench, name: resnet_lstm(bench, name, "squared+uniformity"),
    "resnet-contrastive": lambda bench, name: resnet_lstm(bench, name, "clip"),
    "bags": lambda bench, name: bags(bench, name, "clip"),
    "bags-variational": lambda bench, name: bags(bench, name, "variational"),
    "autoencoder": lambda bench, name: autoencoder(bench, name, "squared"),
    "autoencoder-contrastive": lambda bench, name: autoencoder(bench, name, "clip"),
    "variational": variational,
    "frozen": frozen_towers,
    "mini": shipped,
    "fusion-cosine": lambda bench, name: fusion(bench, name, "cosine"),
    "fusion-concatenation": lambda bench, name: fusion(bench, name, "concatenation"),
    "fusion-sum": lambda bench, name: fusion(bench, name, "sum"),
    "fusion-product": lambda bench, name: fusion(bench, name, "product"),
    "fusion-attention": lambda bench, name: fusion(bench, name, "cross-attention"),
    "fusion-attention-own": lambda bench, name: fusion(bench, name, "cross-attention-own"),
    "compressed": compressed,
}


def run_missing(bench: Bench, names: Sequence[str]) -> dict[str, list[Row]]:
    """Rows by system: those that are there already, and the others as they are made."""
    settings = {key: str(value) for key, value in asdict(bench.settings).items()}
    found = {}
    for name in names:
        path = bench.work / "rows" / f"{name}.json"
        if path.is_file():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["settings"] == settings and kept["encoder"] == bench.encoder.fingerprint:
                found[name] = kept["rows"]
                continue
        rows = SYSTEMS[name](bench, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {"settings": settings, "encoder": bench.encoder.fingerprint, "rows": rows}
        path.with_suffix(".tmp").write_text(json.dumps(record), encoding="utf-8")
        path.with_suffix(".tmp").replace(path)
        found[name] = rows
        bench.say(f"{name}: done")
    return found


# ── tables and plot ──────────────────────────────────────────────────────────────────────────────


def recall_cell(row: Row, name: str) -> str:
    """A recall with half the width of its interval."""
    lower, upper = row["intervals"][name]
    return f"{row['metrics'][name]:.1f} ± {(upper - lower) / 2:.1f}"


def difference_cell(row: Row, name: str) -> str:
    """A difference with its interval."""
    lower, upper = row["difference_intervals"][name]
    return f"{row['differences'][name] + 0.0:+.1f} [{lower:+.1f}, {upper:+.1f}]"


def millions(count: int | None) -> str:
    """A number of parameters."""
    return "" if count is None else f"{count / 1e6:.1f}"


def system_row(row: Row) -> list[str]:
    """One line of the first table."""
    spent = f"{row['seconds']:,.0f} ({row['cpu_s']:,.0f})" if "seconds" in row else ""
    lie = [f"{row[key] + 0.0:.2f}" if key in row else "" for key in ("alignment", "uniformity")]
    return [
        row["system"],
        str(row["pixels"]),
        f"{millions(row['trained'])} of {millions(row['parameters'])}" if row["trained"] else "",
        spent,
        *(recall_cell(row, name) for name in RECALLS),
        *lie,
    ]


def reranked_row(row: Row) -> list[str]:
    """One line of the second table."""
    return [
        row["system"],
        difference_cell(row, "t2i_r@1"),
        difference_cell(row, "i2t_r@1"),
        f"{row['query_ms']:.1f}",
        f"{row['stored_bytes'] / 1000:.1f}",
        f"{row['picture_ms']:.0f}",
    ]


def compressed_row(row: Row) -> list[str]:
    """One line of the third table."""
    return [
        row["system"],
        *(difference_cell(row, name) for name in ("t2i_r@1", "t2i_r@10", "i2t_r@1", "i2t_r@10")),
        f"{row['mb']:.1f}",
        f"{row['ms']:.1f}",
    ]


def tables_of(numbers: Mapping[str, list[Row]]) -> str:
    """All systems; then what ranking again gains and costs; then what smaller models lose."""
    rows = [row for several in numbers.values() for row in several]
    names = [name.replace("_r@", " R@") for name in RECALLS]
    parts = []
    if listed := [row for row in rows if "part" not in row and "is_alone" not in row]:
        header = ["system", "pixels", "parameters learned, M", "training s (CPU)", *names]
        parts.append(format_table([*header, "alignment", "uniformity"], map(system_row, listed)))
        parts.append("Percent, with half the width of the 95 % interval.")
    if listed := [row for row in rows if "query_ms" in row]:
        header = ["ranked again, difference to the dual encoder", "t2i R@1", "i2t R@1"]
        header += ["CPU ms a query", "KB stored a picture", "or CPU ms to open one"]
        parts.append(format_table(header, map(reranked_row, listed)))
    if listed := [row for row in rows if "part" in row]:
        header = ["smaller, difference to the model as shipped", "t2i R@1", "t2i R@10", "i2t R@1"]
        header += ["i2t R@10", "MB packed", "CPU ms each"]
        parts.append(format_table(header, map(compressed_row, listed)))
    return "\n\n".join(parts)


def draw(record: Mapping[str, Any]) -> dict[str, "Figure"]:
    """R@1 and R@10 of every system with intervals; and how training on squared distance ends."""
    from plots import COLOURS, MARKERS, legend, line, new_figure

    rows = [row for several in record["numbers"].values() for row in several]
    listed = [row for row in rows if "part" not in row and "is_alone" not in row]
    figure, panels = new_figure(
        f"Recall on {record['data']['name']}, 95 % intervals", "recall, %", "", columns=2
    )
    figure.set_size_inches(16, 2 + 0.45 * len(listed))
    for axes, direction, words in zip(
        panels, ("t2i", "i2t"), ("text to image", "image to text"), strict=True
    ):
        for number, k in enumerate(metrics.KS):
            name = f"{direction}_r@{k}"
            for place, row in enumerate(listed):
                value, (low, high) = row["metrics"][name], row["intervals"][name]
                axes.errorbar(
                    value,
                    -place,
                    xerr=[[max(value - low, 0)], [max(high - value, 0)]],
                    color=COLOURS[number],
                    marker=MARKERS[number],
                    capsize=3,
                    label=f"R@{k}" if place == 0 else None,
                )
        axes.set_xlabel(f"{words}, recall in %")
        labels = [row["system"] for row in listed] if axes is panels[0] else []
        axes.set_yticks([-place for place in range(len(listed))], labels)
        axes.set_xlim(0, 101)
    legend(panels[1], ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    logged = [row for row in rows if row.get("log") and "uniformity" in row["log"][0]]
    second, [left, right] = new_figure(
        "Every epoch, on the validation split", "epoch", "rSum", columns=2
    )
    second.set_size_inches(16, 7)
    for number, row in enumerate(logged):
        # What a classifier logs after its dual encoder is of candidates alone.
        log = [entry for entry in row["log"] if "uniformity" in entry]
        epochs = [entry["epoch"] + 1 for entry in log]
        recalls = [entry["metrics"]["rsum"] for entry in log]
        line(left, number, row["system"], epochs, recalls, markersize=4)
        spreads = [entry["uniformity"] for entry in log]
        line(right, number, row["system"], epochs, spreads, markersize=4)
    right.set_ylabel("uniformity (0: all on one point)")
    legend(right, loc="upper left", bbox_to_anchor=(1, 1))
    return {"": figure, "epochs": second}


# ── the command ──────────────────────────────────────────────────────────────────────────────────


def parse_only(_context: object, _option: object, value: str | None) -> tuple[str, ...]:
    """The names of systems that begin with one of those given; all if none are."""
    if value is None:
        return tuple(SYSTEMS)
    beginnings = tuple(value.split(","))
    for one in beginnings:
        if not any(name.startswith(one) for name in SYSTEMS):
            raise click.BadParameter(f"no system is called {one!r}: {', '.join(SYSTEMS)}")
    return tuple(name for name in SYSTEMS if name.startswith(beginnings))


FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)


@click.command()
@click.argument("dataset", type=FOLDER)
@click.option("--only", callback=parse_only, metavar="NAME,…", help="Systems that begin so.")
@click.option("--model", default=DEFAULTS.model, show_default=True, help="What is ranked again.")
@click.option("--checkpoint", type=FOLDER, help="What the model was made of, for its own regions.")
@click.option("--towers", type=FOLDER, help="A checkpoint whose towers give features.")
@click.option("--image-size", default=DEFAULTS.image_size, show_default=True, help="From scratch.")
@click.option(
    "--scratch-epochs", default=DEFAULTS.scratch_epochs, show_default=True, help="From scratch."
)
@click.option("--epochs", default=DEFAULTS.epochs, show_default=True, help="On features.")
@click.option(
    "--fusion-epochs", default=DEFAULTS.fusion_epochs, show_default=True, help="Of classifiers."
)
@click.option("--dim", default=DEFAULTS.dim, show_default=True, help="Of shared spaces.")
@click.option("--top", default=DEFAULTS.top, show_default=True, help="Ranked again.")
@click.option("--refit-pictures", default=DEFAULTS.refit_pictures, show_default=True)
@click.option("--threads", default=DEFAULTS.threads, show_default=True, help="0: torch's choice.")
@click.option("--resamples", default=DEFAULTS.resamples, show_default=True, help="Of a bootstrap.")
@click.option("--seed", default=DEFAULTS.seed, show_default=True, help="Of all chance.")
@click.option(
    "--work",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("systems-work"),
    show_default=True,
    help="Folder for weights, features and finished rows.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Also write JSON and plots.")
def main(
    dataset: Path, only: tuple[str, ...], work: Path, out: Path | None, **options: Any
) -> None:
    """Train and measure the systems on DATASET, a folder with train, val and test splits."""
    settings = Settings(**options)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    started = time.perf_counter()
    work.mkdir(parents=True, exist_ok=True)
    bench = Bench(dataset, work, settings, lambda line: print(line, file=sys.stderr, flush=True))
    if settings.checkpoint is None:
        only = tuple(name for name in only if not name.endswith("-own"))
    with engine("onnxruntime"):
        numbers = run_missing(bench, only)
    printed = tables_of(numbers)
    click.echo(printed)
    test = bench.splits["test"]
    write_report(
        out,
        "systems",
        settings=settings,
        data={
            "name": dataset.resolve().name,
            "pictures": {name: len(pairs) for name, pairs in bench.splits.items()},
            "test_captions": sum(len(pair.captions) for pair in test),
            "model": bench.encoder.fingerprint,
        },
        numbers=numbers,
        seconds=time.perf_counter() - started,
        printed=printed,
        packages=("torch", "timm", "onnxruntime"),
        draw=draw,
    )


if __name__ == "__main__":
    main()
