"""A library's own captions → a head that fits its space to them, and what that brought.

The encoder stays as it is. Over the stored embeddings of pictures and captions two small residual
maps are trained (`indexes.heads`), which begin as the identity, so no picture is opened again.

What is reported was measured on pairs that neither trained a head nor stopped its training. The
pictures are dealt into folds; each fold in turn is asked, by a head that was trained on the others
but for one, and stopped where that one was answered best. So every captioned picture is asked once,
and the intervals are as narrow as the library allows. The head that is adopted was made in the same
way, of all folds but one.

Nothing leaks between folds: near-duplicates and pictures that share a caption are dealt together,
and a caption that so many share that this cannot be done is left out everywhere. A caption that
several pictures have is asked once, and each of them is a right answer, the best one counts; in the
other direction every text stands once among the candidates.

A head is adopted only if rSum on held-out pairs gains more than chance explains: the lower end of a
95 % interval of the difference, drawn by groups of pictures that were dealt together, is above 0.
The model must have known something of the pictures before, more than guessing does; and what the
library is not about must be left alone: see `General`.

A correction for hubs (`indexes.heads.Correction`) is a second step, in the space that the first led
to, be that the former one. Its weight is chosen on the pairs that stopped the training, what it
brings is measured on the same held-out ones, and it is kept, apart from the head, only if that is
more than chance explains. It reorders the pictures that a text finds; the texts that a picture
finds stay as they are but for ties in rounding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from indexes.filters import Compare
from indexes.heads import MAX_SIDE, Correction, Head, Residual
from indexes.records import KINDS, Kind, unit_rows
from retriever import calibration, metrics
from retriever.duplicates import collapse
from retriever.errors import MissingExtraError
from retriever.phrases import phrases

if TYPE_CHECKING:
    from indexes.records import ItemRow
    from indexes.store import Store
    from retriever.encoders import Encoder

Rows = NDArray[np.float32]
Places = NDArray[np.int64]
Mask = NDArray[np.bool_]
Progress = Callable[[int, int], None]

# With fewer captioned pictures nothing can be shown, whatever is gained.
FEWEST = 50
# No group of pictures that share captions may be a larger part of all: folds could not be dealt.
LARGEST_GROUP = 0.1
ITEM_CHUNK = 4096  # rows of the catalogue read at a time
BLOCK = 256  # queries scored at a time
INITIAL = 3.0  # standard deviation of a new head's first matrix, times the root of its dimension
ANCHORS = 128  # of what should stay where it is, in a step of training
UNIFORM_ROWS = 2000  # of which uniformity is measured: it compares each with each
WHENS = ("before", "after", "chance")
RECALLS = tuple(f"{direction}_r@{k}" for direction in ("t2i", "i2t") for k in metrics.KS)


@dataclass(frozen=True, slots=True)
class TuneConfig:
    """Every setting of a tuning."""

    pictures: int = 20_000  # captioned ones looked at, at most
    captions: int = 5  # of each, at most
    folds: int = 5
    watched: int = 1000  # pictures of a fold, at most, that say when training stops
    epochs: int = 40
    steps: int = 10  # of an epoch at least, for the few pictures of a small library again
    patience: int = 6  # epochs without a better validation before training ends
    batch_size: int = 256
    lr: float = 3e-3
    weight_decay: float = 0.1  # towards the identity
    hidden: int = 256  # units of a head; with none in between it gains a tenth less
    logit_scale: float = 20.0  # at first; it is learned
    squared: float = 0.5  # weight of the squared distance, beside the contrastive term
    faithful: float = (
        10.0  # weight of staying where it was with texts that are about something else
    )
    hub_texts: int = 4000  # that a correction for hubs compares pictures with, at most
    hub_weights: Sequence[float] = (0.25, 0.5, 0.75, 1.0)  # of it, one of which is chosen
    resamples: int = 1000
    seed: int = 0


DEFAULTS = TuneConfig()


# ── pairs ────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Captioned pictures of a library.

    pictures: (n, d) unit rows. texts: (m, d) unit rows, every text once. edges: (e, 2) a picture
    and a text of it, in the order of the pictures. groups: (n,) pictures of one number go together.
    left_out: texts that too many pictures share.
    """

    pictures: Rows
    texts: Rows
    edges: Places
    groups: Places
    left_out: int = 0

    @classmethod
    def of(
        cls, store: Store, config: TuneConfig = DEFAULTS, among: Collection[int] | None = None
    ) -> Pairs:
        """Those of a store, by the model that it was opened with; the same ones each time.

        `among` are ids of the only pictures that count; None: all.
        """
        rng = np.random.default_rng(config.seed)
        items: list[ItemRow] = []
        images: list[Any] = []
        place_of: dict[str, int] = {}  # of each text
        vectors: list[Any] = []
        edges: list[tuple[int, int]] = []
        with store.snapshot() as rows:
            captioned = rows.select(Compare("captions", ">=", 1))
            if among is not None:
                captioned = captioned[np.isin(captioned, [*among])]
            chosen = rng.permutation(captioned)
            chosen = np.sort(chosen[: config.pictures])
            for start in range(0, len(chosen), ITEM_CHUNK):
                some = chosen[start : start + ITEM_CHUNK].tolist()
                found, seen = rows.items(some), rows.embeddings("image", some)
                captions = rows.captions(rows.caption_ids(some))
                told = rows.embeddings("caption", captions)
                texts: dict[int, list[tuple[str, Any]]] = {}
                for caption_id, (item_id, caption) in captions.items():
                    if caption_id in told:
                        texts.setdefault(item_id, []).append((caption.text, told[caption_id]))
                for item_id in some:
                    if item_id not in seen or item_id not in texts:
                        continue
                    for text, vector in texts[item_id][: config.captions]:
                        if text not in place_of:
                            place_of[text] = len(vectors)
                            vectors.append(vector)
                        edges.append((len(items), place_of[text]))
                    items.append(found[item_id])
                    images.append(seen[item_id])
        dim = store.model.dim
        pictures = unit_rows(images, dim)
        copies = [group for group in collapse(items, pictures) if len(group) > 1]
        return _dealt(pictures, unit_rows(vectors, dim), _numbered(edges), copies)

    def __len__(self) -> int:
        return len(self.pictures)

    def part(self, wanted: Mask) -> Pairs:
        """The pictures (n,) that are wanted, with their texts."""
        edges = self.edges[wanted[self.edges[:, 0]]]
        pictures = np.cumsum(wanted) - 1
        kept, texts = np.unique(edges[:, 1], return_inverse=True)
        renumbered = np.stack([pictures[edges[:, 0]], texts.reshape(-1)], axis=1)
        return Pairs(self.pictures[wanted], self.texts[kept], renumbered, self.groups[wanted])

    def carried(self, head: Head) -> Pairs:
        """The same where a head takes them."""
        images, texts = head("image", self.pictures), head("caption", self.texts)
        return Pairs(images, texts, self.edges, self.groups)

    @property
    def text_groups(self) -> Places:
        """(m,) the group of the pictures that each text belongs to."""
        found = np.empty(len(self.texts), dtype=np.int64)
        found[self.edges[:, 1]] = self.groups[self.edges[:, 0]]
        return found


def _numbered(edges: Iterable[tuple[int, int]]) -> Places:
    """(e, 2) each of them once, in the order of the first."""
    return np.array([*dict.fromkeys(edges)], dtype=np.int64).reshape(-1, 2)


def _dealt(pictures: Rows, texts: Rows, edges: Places, copies: Iterable[Sequence[int]]) -> Pairs:
    """Pairs in groups: what looks the same, and what has a caption in common, goes together."""
    sets = _Sets(len(pictures))
    for group in copies:
        for one in group[1:]:
            sets.join(group[0], one)
    order = np.argsort(edges[:, 1], kind="stable")
    starts = np.flatnonzero(np.diff(edges[order, 1], prepend=-1))
    carriers = np.split(edges[order, 0], starts[1:]) if len(edges) else []
    most = max(2, int(LARGEST_GROUP * len(pictures)))
    for some in sorted(carriers, key=len):  # the rarest texts say most of which belong together
        sets.join_all(some.tolist(), most)
    roots = np.array([sets.root(one) for one in range(len(pictures))], dtype=np.int64)
    is_kept = np.zeros(len(texts), dtype=np.bool_)
    for at, some in zip(edges[order[starts], 1].tolist(), carriers, strict=True):
        is_kept[at] = bool((roots[some] == roots[some[0]]).all())
    edges = edges[is_kept[edges[:, 1]]]
    everything = Pairs(pictures, texts, edges, roots)
    is_told = np.zeros(len(pictures), dtype=np.bool_)
    is_told[edges[:, 0]] = True
    kept = everything.part(is_told)
    groups = np.unique(kept.groups, return_inverse=True)[1].reshape(-1)
    return Pairs(kept.pictures, kept.texts, kept.edges, groups, int((~is_kept).sum()))


class _Sets:
    """Numbers in disjoint sets. Tarjan 1975."""

    def __init__(self, count: int) -> None:
        self._above = list(range(count))
        self._size = [1] * count

    def root(self, one: int) -> int:
        """The number that stands for the set of another."""
        while self._above[one] != one:
            self._above[one] = self._above[self._above[one]]
            one = self._above[one]
        return one

    def join(self, one: int, other: int) -> None:
        """Makes two sets one."""
        large, small = self.root(one), self.root(other)
        if large != small:
            if self._size[large] < self._size[small]:
                large, small = small, large
            self._above[small] = large
            self._size[large] += self._size[small]

    def join_all(self, several: Sequence[int], most: int) -> None:
        """Makes one set of those of several, unless it would have more than `most`."""
        roots = {self.root(one) for one in several}
        if len(roots) > 1 and sum(self._size[one] for one in roots) <= most:
            for one in several[1:]:
                self.join(several[0], one)


def dealt_into_folds(groups: Places, count: int, seed: int) -> Places:
    """(n,) the fold of each picture: groups stay whole, folds are as even as that allows."""
    sizes = np.bincount(groups)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]
    fold_of = np.empty(len(sizes), dtype=np.int64)
    filled = np.zeros(count, dtype=np.int64)
    for group in order.tolist():
        fold_of[group] = int(filled.argmin())
        filled[fold_of[group]] += sizes[group]
    folds: Places = fold_of[groups]
    return folds


# ── measuring ────────────────────────────────────────────────────────────────────────────────────


def ranks(queries: Rows, gallery: Rows, edges: Places) -> Places:
    """(q,) zero-based rank of the best right answer to each query.

    Among equal scores the right one comes last, so that a space which tells nothing apart finds
    nothing. Other right answers are not counted as before it.

    Args:
        queries: (q, d).
        gallery: (g, d).
        edges: (e, 2) a query and a right answer to it; every query has one.
    """
    order = np.argsort(edges[:, 0], kind="stable")
    asked, right = edges[order].T
    found = np.empty(len(queries), dtype=np.int64)
    for start in range(0, len(queries), BLOCK):
        scores = queries[start : start + BLOCK] @ gallery.T
        first, last = np.searchsorted(asked, [start, start + len(scores)])
        rows, columns = asked[first:last] - start, right[first:last]
        best = np.full(len(scores), -np.inf, dtype=np.float32)
        np.maximum.at(best, rows, scores[rows, columns])
        scores[rows, columns] = -np.inf
        found[start : start + len(scores)] = (scores >= best[:, None]).sum(axis=1)
    return found


def both_ranks(pairs: Pairs) -> tuple[Places, Places]:
    """(m,) ranks of each text's picture, and (n,) of each picture's text."""
    return (
        ranks(pairs.texts, pairs.pictures, pairs.edges[:, ::-1]),
        ranks(pairs.pictures, pairs.texts, pairs.edges),
    )


def rsum(pairs: Pairs) -> float:
    """R@1 + R@5 + R@10 of both directions, in percent."""
    return 100 * sum(float((some < k).mean()) for some in both_ranks(pairs) for k in metrics.KS)


@dataclass(slots=True, eq=False)
class Tally:
    """Right answers to held-out queries, group by group, before, after and by guessing.

    hits: by name of the recall, (3, g) of each fold. counts: by direction, (g,) queries.
    """

    hits: dict[str, list[NDArray[np.float64]]] = field(
        default_factory=lambda: {name: [] for name in RECALLS}
    )
    counts: dict[str, list[NDArray[np.float64]]] = field(
        default_factory=lambda: {"t2i": [], "i2t": []}
    )
    spaces: list[tuple[int, dict[str, NDArray[np.float64]]]] = field(default_factory=list)

    def add(self, before: Pairs, after: Pairs) -> None:
        """Counts one fold."""
        numbers = np.unique(before.groups)
        groups = {
            "t2i": np.searchsorted(numbers, before.text_groups),
            "i2t": np.searchsorted(numbers, before.groups),
        }
        found = {
            direction: both
            for direction, *both in zip(groups, both_ranks(before), both_ranks(after), strict=True)
        }
        for direction, several in groups.items():
            self.counts[direction].append(
                np.bincount(several, minlength=len(numbers)).astype(float)
            )
            for k in metrics.KS:
                self.hits[f"{direction}_r@{k}"].append(
                    np.stack(
                        [
                            *(
                                np.bincount(several, some < k, len(numbers))
                                for some in found[direction]
                            ),
                            np.bincount(several, guessed(before, direction, k), len(numbers)),
                        ]
                    )
                )
        both = [_space(before), _space(after)]
        self.spaces.append(
            (len(before), {name: np.array([one[name] for one in both]) for name in both[0]})
        )

    def record(self, resamples: int, seed: int) -> dict[str, Any]:
        """Recalls in percent with 95 % intervals, before and after, what was gained, and more."""
        hits = {name: np.concatenate(several, axis=1) for name, several in self.hits.items()}
        counts = {name: np.concatenate(several) for name, several in self.counts.items()}
        sizes = [len(several) for several in self.counts["t2i"]]

        def recalls(drawn: Places) -> dict[str, float]:
            found: dict[str, float] = {}
            for name, several in hits.items():
                shares = 100 * (several @ drawn) / max(1.0, float(counts[name[:3]] @ drawn))
                found |= {f"{when} {name}": one for when, one in zip(WHENS, shares, strict=True)}
            for when in WHENS:
                found[f"{when} rsum"] = sum(found[f"{when} {name}"] for name in RECALLS)
            for name in (*RECALLS, "rsum"):
                found[f"gain {name}"] = found[f"after {name}"] - found[f"before {name}"]
            found["known rsum"] = found["before rsum"] - found["chance rsum"]
            return found

        found = recalls(np.ones(sum(sizes), dtype=np.int64))
        intervals = metrics.bootstrap_interval(recalls, sizes, resamples=resamples, seed=seed)
        record: dict[str, Any] = {}
        for when in ("before", "after", "gain"):
            record[when] = {name: round(found[f"{when} {name}"], 2) for name in (*RECALLS, "rsum")}
            record[when]["intervals"] = {
                name: [round(one, 2) for one in intervals[f"{when} {name}"]]
                for name in (*RECALLS, "rsum")
            }
        record["chance"] = {
            name: round(found[f"chance {name}"], 2) for name in (*RECALLS, "rsum")
        } | {"below_rsum_by": [round(one, 2) for one in intervals["known rsum"]]}
        total = sum(size for size, _ in self.spaces)
        for name in self.spaces[0][1]:
            means = sum(size * values[name] for size, values in self.spaces) / total
            record["before"][name], record["after"][name] = np.round(means, 4).tolist()
        return record


def guessed(pairs: Pairs, direction: str, k: int) -> NDArray[np.float64]:
    """(q,) the chance that one of k answers drawn blindly to each query is right."""
    asked, total = (1, len(pairs)) if direction == "t2i" else (0, len(pairs.texts))
    right = np.bincount(pairs.edges[:, asked])
    missed = np.ones(len(right))
    for drawn in range(min(k, total)):
        missed *= np.maximum(total - right - drawn, 0) / (total - drawn)
    return 1 - missed


def _space(pairs: Pairs) -> dict[str, float]:
    """Alignment, uniformity and modality gap; see `retriever.metrics`."""
    images, texts = pairs.edges.T
    spread = [
        metrics.uniformity(rows[:UNIFORM_ROWS]) if len(rows) > 1 else 0.0
        for rows in (pairs.pictures, pairs.texts)
    ]
    return {
        "alignment": metrics.alignment(pairs.pictures[images], pairs.texts[texts]),
        "uniformity_pictures": spread[0],
        "uniformity_texts": spread[1],
        "modality_gap": metrics.modality_gap(pairs.pictures, pairs.texts),
    }


# ── what the library is not about ────────────────────────────────────────────────────────────────


def other_texts() -> list[str]:
    """Texts about all kinds of things; `General` keeps those that are about something else."""
    return [*calibration.background(), *phrases()]


@dataclass(frozen=True, slots=True, eq=False)
class General:
    """Texts about something else than a library, and what stands for pictures of them.

    There are no pictures in the wheel. So a text is moved as far as the library's pictures lie from
    its captions, on average: that is where pictures of it are to be looked for.
    """

    texts: Rows
    pictures: Rows

    @classmethod
    def of(cls, texts: Rows, pairs: Pairs) -> General:
        """Of the embeddings (g, d) of texts; those near the library's captions are left out."""
        owners = np.empty(len(pairs.texts), dtype=np.int64)
        owners[pairs.edges[:, 1]] = pairs.edges[:, 0]
        sample = np.arange(0, len(owners), max(1, len(owners) // ITEM_CHUNK))
        apart = texts[calibration.unrelated(texts, pairs.texts[sample], owners[sample])]
        moved = apart + pairs.pictures.mean(axis=0) - pairs.texts.mean(axis=0)
        return cls(apart, moved / np.linalg.norm(moved, axis=1, keepdims=True))

    def half(self, which: int) -> General:
        """Every other text: one half is trained with, the other is looked at afterwards."""
        return General(self.texts[which::2], self.pictures[which::2])

    def kept(self, head: Head) -> dict[str, float]:
        """How much of the neighbourhoods of these texts a head leaves, 1 being all.

        `texts`: the correlation of the cosines between all texts, before and after. `pictures`: of
        those between texts and pictures. `cosine`: the mean of a text's with itself, carried.
        """
        texts, pictures = head("caption", self.texts), head("image", self.pictures)
        above = np.triu_indices(len(texts), 1)
        return {
            "texts": _correlation((self.texts @ self.texts.T)[above], (texts @ texts.T)[above]),
            "pictures": _correlation(self.texts @ self.pictures.T, texts @ pictures.T),
            "cosine": round(float((self.texts * texts).sum(axis=1).mean()), 4),
        }


def _correlation(ones: Rows, others: Rows) -> float:
    """Pearson's, of all values."""
    return round(float(np.corrcoef(ones.ravel(), others.ravel())[0, 1]), 4)


# ── training ─────────────────────────────────────────────────────────────────────────────────────


def train_head(
    train: Pairs,
    validation: Pairs,
    general: General,
    config: TuneConfig = DEFAULTS,
    *,
    progress: Callable[[int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> tuple[Head, int] | None:
    """The head of the epoch with the best rSum of `validation`, and that epoch; 0: the identity.

    Minimised is the cross-entropy of choosing a picture's text among those of a batch and a text's
    picture (`retriever.objectives.clip_loss`, arXiv:2103.00020), plus the mean squared distance of
    the pairs, plus that of `general` from where it was. A text that another picture of the batch
    has as well is no wrong answer to that one.

    Args:
        train: pairs that the head learns.
        validation: pairs that say when to stop.
        general: what should stay where it is.
        config: the settings.
        progress: called with each epoch that ended.
        stop: asked after each epoch; None comes back once it says yes.
    """
    import torch
    from torch.nn import functional as F

    from retriever.objectives import squared_distance_loss

    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    rows = {"image": torch.from_numpy(train.pictures), "caption": torch.from_numpy(train.texts)}
    fixed = {
        "image": torch.from_numpy(general.pictures),
        "caption": torch.from_numpy(general.texts),
    }
    dim = train.pictures.shape[1]
    shapes = ((dim, config.hidden), (config.hidden,), (config.hidden, dim), (dim,))
    residuals = {kind: [torch.zeros(one) for one in shapes] for kind in KINDS}
    for parts in residuals.values():
        # Only what leads back begins at zero: that is enough for the identity, and can be left.
        torch.nn.init.normal_(parts[0], std=INITIAL / dim**0.5)
        for one in parts:
            one.requires_grad_()
    scale = torch.tensor(float(np.log(config.logit_scale)), requires_grad=True)
    trained: list[dict[str, Any]] = [
        {"params": [*residuals["image"], *residuals["caption"]]},
        {"params": [scale], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay)

    def carried(kind: Kind, given: torch.Tensor) -> torch.Tensor:
        down, inner, up, bias = residuals[kind]
        added = F.gelu(given @ down + inner, approximate="tanh") @ up + bias
        return F.normalize(given + added, dim=1)

    def loss(pictures: Places, texts: Places) -> torch.Tensor:
        images = carried("image", rows["image"][pictures])
        captions = carried("caption", rows["caption"][texts])
        also = torch.from_numpy(also_told(table[pictures], texts))
        logits = scale.exp() * images @ captions.T
        logits = logits.masked_fill(also, -1e4)
        partners = torch.arange(len(pictures))
        contrast = F.cross_entropy(logits, partners) + F.cross_entropy(logits.T, partners)
        some = rng.integers(len(general.texts), size=(2, ANCHORS))
        moved: torch.Tensor | float = 0.0
        for kind in KINDS:
            # What lies between two of them stays as well, which there are many more of.
            anchors = F.normalize(fixed[kind][some[0]] + between * fixed[kind][some[1]], dim=1)
            moved = moved + squared_distance_loss(carried(kind, anchors), anchors)
        near = squared_distance_loss(images, captions)
        total: torch.Tensor = contrast / 2 + config.squared * near + config.faithful * moved
        return total

    between = torch.linspace(0, 1, ANCHORS)[:, None]
    table = text_table(train)
    counts = (table >= 0).sum(axis=1)
    best, best_epoch, best_rsum = identity(dim), 0, rsum(validation)
    for epoch in range(1, config.epochs + 1):
        for pictures in _batches(len(train), config, rng):
            texts = table[pictures, rng.integers(counts[pictures])]
            optimiser.zero_grad()
            loss(pictures, texts).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            with torch.no_grad():
                scale.clamp_(max=float(np.log(100)))
        head = Head(
            {
                kind: Residual(*(one.detach().numpy().copy() for one in parts))
                for kind, parts in residuals.items()
            }
        )
        found = rsum(validation.carried(head))
        if found > best_rsum:
            best, best_epoch, best_rsum = head, epoch, found
        if progress is not None:
            progress(epoch)
        if stop is not None and stop():
            return None
        if epoch - best_epoch >= config.patience:
            break
    return best, best_epoch


def _batches(count: int, config: TuneConfig, rng: np.random.Generator) -> Iterator[Places]:
    """The pictures in random order, each once, or again and again until there are steps enough."""
    size = max(1, round(count / config.batch_size))
    for _ in range(-(-config.steps // size)):
        yield from np.array_split(rng.permutation(count), size)


def identity(dim: int) -> Head:
    """A head that changes nothing."""
    shapes = ((dim, 1), (1,), (1, dim), (dim,))
    nothing = Residual(*(np.zeros(one, np.float32) for one in shapes))
    return Head(dict.fromkeys(KINDS, nothing))


def text_table(pairs: Pairs) -> Places:
    """(n, c) the texts of each picture, filled up with -1."""
    counts = np.bincount(pairs.edges[:, 0], minlength=len(pairs))
    order = np.argsort(pairs.edges[:, 0], kind="stable")
    within = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    table = np.full((len(pairs), counts.max()), -1, dtype=np.int64)
    table[pairs.edges[order, 0], within] = pairs.edges[order, 1]
    return table


def also_told(told: Places, texts: Places) -> Mask:
    """(b, b) which texts of a batch another of its pictures has as well.

    Args:
        told: (b, c) the texts that each picture has, as in `text_table`.
        texts: (b,) the one that was drawn of each.
    """
    also: Mask = (told[:, None, :] == texts[None, :, None]).any(axis=2)
    np.fill_diagonal(also, False)
    return also


# ── tuning ───────────────────────────────────────────────────────────────────────────────────────

# Of the neighbourhoods of texts about something else, what must be left: see `General.kept`.
# Where 0.92 was left, Flickr8k's test split lost 8 % of its rSum; where 0.85, 22 %; 0.3, 93 %.
LEAST_KEPT = 0.8


@dataclass(frozen=True, slots=True, eq=False)
class Tuning:
    """What was found: a head, whether it should be adopted, why, and all that was measured."""

    head: Head | None
    is_better: bool
    reason: str
    record: dict[str, Any]


@dataclass(frozen=True, slots=True)
class TuneReport:
    """What came of tuning a library.

    adopted: whether it is searched in the new space now. is_better: whether that should be so.
    reason: a sentence. base: the model that it was tuned from. measured: see `Tuning`.
    """

    adopted: bool
    is_better: bool
    reason: str
    base: str
    measured: dict[str, Any]


def tune(
    store: Store,
    encoder: Callable[[], Encoder],
    config: TuneConfig = DEFAULTS,
    *,
    among: Collection[int] | None = None,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
) -> Tuning | None:
    """A head for a store's embeddings, trained on its own captions, and what it brings.

    The store is only read. 20,000 captioned pictures are looked at at most; that takes minutes and
    some hundred MB. See the top of this module for how it is measured.

    Args:
        store: as the model sees it that read pictures and texts.
        encoder: gives the encoder of that model, for texts that are about something else.
        config: the settings.
        among: ids of the only pictures that are learned from; None: all.
        progress: called with (done, total) epochs; training may end before the last.
        stop: asked after each epoch and then before each fold; None comes back once it says yes.

    Raises:
        MissingExtraError: torch is not installed.
        EncoderError: the encoder cannot be had.
    """
    try:
        import torch  # noqa: F401 (what follows takes a while, and would be for nothing)
    except ModuleNotFoundError as exc:
        raise MissingExtraError("Tuning", "models") from exc
    started = time.monotonic()
    pairs = Pairs.of(store, config, among)
    record: dict[str, Any] = {
        "pictures": len(pairs),
        "texts": len(pairs.texts),
        "groups": int(pairs.groups.max(initial=-1)) + 1,
        "left_out_texts": pairs.left_out,
        "settings": asdict(config) | {"hub_weights": [*config.hub_weights]},
    }
    if len(pairs) < FEWEST or record["groups"] < 2 * config.folds:
        few = f"{len(pairs):,} captioned pictures in {record['groups']:,} groups"
        reason = f"too few captions to tell whether tuning helps: {few}, of at least {FEWEST} in"
        return Tuning(None, False, f"{reason} {2 * config.folds} that share no caption", record)
    texts = encoder().encode_texts(other_texts())
    general = General.of(texts, pairs)
    found = cross_fitted(pairs, general, config, progress=progress, stop=stop)
    if found is None:
        return None
    heads, measured = found
    record |= measured
    is_better, reason = is_head_better(record)
    head = heads[-1]
    if _knows(record):
        spaces = heads if is_better else [identity(store.model.dim)] * len(heads)
        step = corrected(pairs, spaces, config, stop=stop)
        if step is None:
            return None
        correction, measured = step
        record["correction"] = measured | {"space": "after" if is_better else "before"}
        helps, told = is_correction_better(record["correction"])
        reason = f"{reason}; {told}"
        if helps:
            head, is_better = replace(spaces[-1], correction=correction), True
    record["seconds"] = round(time.monotonic() - started, 1)
    return Tuning(head, is_better, reason, record)


def cross_fitted(
    pairs: Pairs,
    general: General,
    config: TuneConfig = DEFAULTS,
    *,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
) -> tuple[list[Head], dict[str, Any]] | None:
    """Heads for some pairs, and what they bring to pairs that they did not see.

    Returns the head of each fold and, last, that of all folds but one, and a record: `before`,
    `after` and `gain` as `Tally` has them, the `epochs` of each head, and how much the last one
    keeps of `general`. None if it was stopped. The arguments are those of `tune`.
    """
    total = config.epochs * (config.folds + 1)
    report = progress or (lambda done, total: None)
    report(0, total)
    tally, epochs = Tally(), []
    heads: list[Head] = []
    for train, validation, asked in splits(pairs, config):
        done = len(heads) * config.epochs
        trained = train_head(
            train,
            validation,
            general.half(0),
            config,
            progress=lambda epoch, done=done: report(done + epoch, total),  # type: ignore[misc]
            stop=stop,
        )
        if trained is None:
            return None
        heads.append(trained[0])
        epochs.append(trained[1])
        report(done + config.epochs, total)
        if asked is not None:
            tally.add(asked, asked.carried(heads[-1]))
    record = tally.record(config.resamples, config.seed)
    return heads, record | {"epochs": epochs, "general": general.half(1).kept(heads[-1])}


def splits(pairs: Pairs, config: TuneConfig) -> Iterator[tuple[Pairs, Pairs, Pairs | None]]:
    """What is learned, what stops the training and what is asked: fold by fold.

    The last one is for the head that is adopted: nothing is held out of it.
    """
    folds = dealt_into_folds(pairs.groups, config.folds, config.seed)
    rng = np.random.default_rng(config.seed)
    for fold in range(config.folds + 1):
        watching = fold % config.folds
        asked = (watching + 1) % config.folds if fold < config.folds else -1
        train = pairs.part((folds != watching) & (folds != asked))
        some = rng.permutation(np.flatnonzero(folds == watching))[: config.watched]
        validation = pairs.part(np.isin(np.arange(len(pairs)), some))
        yield train, validation, pairs.part(folds == asked) if asked >= 0 else None


def corrected(
    pairs: Pairs,
    heads: Sequence[Head],
    config: TuneConfig = DEFAULTS,
    *,
    stop: Callable[[], bool] | None = None,
) -> tuple[Correction, dict[str, Any]] | None:
    """A correction for hubs, to come after the last head, and what such ones bring.

    Args:
        pairs: those that the heads are for.
        heads: of each fold and of what is adopted, as `cross_fitted` gives them.
        config: the settings.
        stop: asked before each fold; None comes back once it says yes.

    Returns:
        The correction and a record: `before`, without one, `after` and `gain` as `Tally` has them,
        and the `weights` chosen in each fold, the last one being the correction's; with 0 it
        changes nothing.
    """
    tally, weights = Tally(), []
    for head, (train, validation, asked) in zip(heads, splits(pairs, config), strict=True):
        if stop is not None and stop():
            return None
        correction = chosen_correction(train.carried(head), validation.carried(head), config)
        weights.append(correction.weight)
        if asked is not None:
            tally.add(asked.carried(head), asked.carried(replace(head, correction=correction)))
    return correction, tally.record(config.resamples, config.seed) | {"weights": weights}


def chosen_correction(train: Pairs, validation: Pairs, config: TuneConfig) -> Correction:
    """By texts of `train`, with the weight that lets texts of `validation` find most."""
    # In turns, one text of every picture: a picture's own must not speak against it, and of as many
    # as one may meet of these the nearest are passed by.
    rng = np.random.default_rng(config.seed)
    turns = text_table(train)[rng.permutation(len(train))].T.ravel()
    some = list(dict.fromkeys(turns[turns >= 0].tolist()))[: min(config.hub_texts, MAX_SIDE)]
    texts = train.texts[some]
    passed = math.ceil(np.isin(train.edges[:, 1], some).sum() / len(train))
    whole = Correction.of(texts, train.pictures, passed)
    best, most = whole, -1.0
    for weight in (0.0, *config.hub_weights):
        one = whole.weighted(weight)
        found = ranks(
            one("caption", validation.texts),
            one("image", validation.pictures),
            validation.edges[:, ::-1],
        )
        hits = sum(float((found < k).mean()) for k in metrics.KS)
        if hits > most:
            best, most = one, hits
    return best


def is_head_better(record: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether a head should be adopted, and why."""
    gain = record["gain"]["rsum"]
    low, high = record["gain"]["intervals"]["rsum"]
    told = f"held-out rSum changes by {gain:+.1f}, 95 % interval {low:+.1f} to {high:+.1f}"
    if low <= 0 or not record["epochs"][-1]:
        return False, f"{told}: no more than chance explains"
    if not _knows(record):
        return False, (
            f"{told}, but the model itself finds no more than guessing would: what it was trained"
            " for is not this, and a head cannot stand in for it"
        )
    kept = record["general"]
    if min(kept["texts"], kept["pictures"]) < LEAST_KEPT:
        return False, (
            f"{told}, but what the library is not about would be found worse: of the neighbourhoods"
            f" of other texts {100 * min(kept['texts'], kept['pictures']):.0f} % would be left"
        )
    return True, told


def _knows(record: Mapping[str, Any]) -> bool:
    """Whether the model finds more than guessing would."""
    return bool(record["chance"]["below_rsum_by"][0] > 0)


def is_correction_better(record: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether a correction for hubs should be kept, and why."""
    if not record["weights"][-1]:
        return False, "correcting for hubs would change nothing"
    gain = record["gain"]["rsum"]
    low, high = record["gain"]["intervals"]["rsum"]
    told = f"{gain:+.1f}, 95 % interval {low:+.1f} to {high:+.1f}"
    if low <= 0:
        return False, f"correcting for hubs, {told}, is left out"
    alone = " alone" if record["space"] == "before" else ""
    return True, f"correcting for hubs{alone} brings {told}"


def render(record: Mapping[str, Any]) -> str:
    """What was measured as a table for people."""
    if "before" not in record:
        return ""
    shared = ""
    if record["groups"] < record["pictures"]:
        shared = f", in {record['groups']:,} groups that share captions or look the same"
    lines = [
        f"{record['pictures']:,} captioned pictures{shared}; held out, each in its turn:",
        "",
        f"{'':<10}{'before':>7}  {'':<13}{'after':>7}  {'':<13}{'gain':>7}",
    ]
    for name in (*RECALLS, "rsum"):
        row = f"{name.replace('_r@', ' R@').replace('rsum', 'rSum'):<10}"
        for when in ("before", "after", "gain"):
            low, high = record[when]["intervals"][name]
            sign = "+" if when == "gain" else ""
            span = f"{low:{sign}.1f} to {high:{sign}.1f}"
            row += f"{record[when][name]:>{sign}7.1f}  {span:<15}"
        lines.append(row.rstrip())
    for name in ("alignment", "uniformity_pictures", "uniformity_texts", "modality_gap"):
        before, after = record["before"][name], record["after"][name]
        lines.append(f"{name.replace('_', ' '):<21}{before:>7.3f} → {after:.3f}")
    if "correction" in record:
        one = record["correction"]
        found = ", ".join(
            f"R@{k} {one['before'][f't2i_r@{k}']:.1f} → {one['after'][f't2i_r@{k}']:.1f}"
            for k in metrics.KS
        )
        low, high = one["gain"]["intervals"]["rsum"]
        base = "with the maps" if one["space"] == "after" else "without the maps"
        lines.append(f"{base}, corrected for hubs: t2i {found}; rSum {low:+.1f} to {high:+.1f}")
    kept = 100 * min(record["general"]["texts"], record["general"]["pictures"])
    lines.append(f"of what it is not about, the maps leave {kept:.0f} % of the neighbourhoods")
    lines.append(f"measured in {record['seconds']:.0f} s; intervals are of 95 %")
    return "\n".join(lines)
