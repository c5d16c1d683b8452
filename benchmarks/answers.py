"""Answers beside the encoder's own: channels, the cut-off, and queries that compose.

    python benchmarks/answers.py flickr8k --foreign grocery-store --foreign fashion-products \
        --foreign flickr8k/captions_zh_translated_test.jsonl --out benchmarks/results/answers.json

A library is made of the data set's test pictures, each without one of its captions, drawn by the
seed. What is left out is the query, so that the library has seen none of them; a picture needs two
captions to count. Everything is asked through the library as users ask it.

Channels: how often the query's own picture is found, by each mode of search.

Cut-off: whether a query that is none of the library's business is told "no good match". Own queries
are the captions left out. Foreign ones are captions of other data sets (`--foreign`: a folder, or a
captions file, such as one in a language that the model does not know), and nonsense made by the
seed. The area under the ROC curve compares the best scores of both; "own taken out" is what is left
of own queries without their own picture, which others may fit as well. The calibration error is of
pairs: held-out captions with their own pictures where these are shown, and unrelated texts of the
background with the best picture that they find, both kinds counting half, judged by curves that saw
neither that caption's half nor that text's; beside it what the library itself says of the same
pairs, whose curve saw the unrelated texts. Pictures as queries are own pictures with the nearest
other one, and foreign pictures.

Composition, where the captions tell of things that come together and alone: see `composition.py`.

Intervals are 95 %, drawn by picture and, of foreign queries, by query; those of a calibration error
may lie above it, because a drawing is noisier than what it is drawn from. Without the data there is
nothing to measure: the script says so and ends well.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import composition
import numpy as np
from numpy.typing import NDArray
from report import folder_option, format_table, out_option, write_report

from retriever import calibration, metrics
from retriever.captions import find_caption_files, read_caption_file
from retriever.channels import MODES, Mode
from retriever.data import list_pictures, read_pairs
from retriever.encoders import Encoder, load_encoder
from retriever.errors import RetrieverError, UsageError
from retriever.library import Library
from retriever.search import Answer, Query

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from retriever.data import Pair


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting of the benchmark."""

    split: str = "test"
    foreign: tuple[str, ...] = ()
    queries: int = 300  # of each foreign world
    pictures: int = 100  # of each foreign world, and of the library's own
    resamples: int = 1000
    seed: int = 0
    device: str = "auto"
    threads: int | None = None


DEFAULTS = Settings()
Ids = NDArray[np.int64]
Scores = NDArray[np.float64]
Statistic = Callable[[Ids], Mapping[str, float]]
K = max(metrics.KS)
NONE = -1.0  # the score where nothing is found
CUT_OFF: tuple[Mode, ...] = ("hybrid", "image")
CONSONANTS, VOWELS = [*"bdfgjklmnprstvz"], [*"aeiou"]


class Remembering:
    """An encoder that reads each text once, though every mode of search asks it again."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._rows: dict[str, NDArray[np.float32]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """As the encoder does."""
        if unread := [text for text in dict.fromkeys(texts) if text not in self._rows]:
            self._rows |= zip(unread, self._encoder.encode_texts(unread), strict=True)
        return np.stack([self._rows[text] for text in texts])


@dataclass(frozen=True, slots=True, eq=False)
class Gallery:
    """A library of pictures, and the caption of each that it does not have."""

    library: Library
    encoder: Encoder
    asked: tuple[str, ...]

    def ask(self, texts: Sequence[str], mode: Mode, k: int = K) -> list[Answer]:
        """The answers to texts, near-duplicates each for itself."""
        self.encoder.encode_texts(texts)  # together, which is faster
        searcher = self.library.searcher
        return [
            searcher.images(Query(texts=((text, 1.0),)), k, mode=mode, all=True) for text in texts
        ]


def open_gallery(
    home: Path, dataset: Path, encoder: Encoder, settings: Settings
) -> tuple[Gallery, dict[str, Any]]:
    """The library in `home`, indexed and fitted, and what it was made of."""
    split = _split(dataset, settings.split)
    pairs, _ = read_pairs(dataset, split=split, embedded=False)
    pairs = [pair for pair in pairs if len({caption.text for caption in pair.captions}) > 1]
    asked = _copy(pairs, home / "pictures", settings.seed)
    library = Library.create(home / "answers.lib", encoder)
    report = library.index(home / "pictures")
    assert report.added == len(pairs), report
    described = {
        "name": dataset.name,
        "split": split,
        "pictures": len(pairs),
        "captions": sum(len(pair.captions) for pair in pairs) - len(pairs),
        "queries": len(asked),
    }
    return Gallery(library, encoder, asked), described


def _split(dataset: Path, wanted: str) -> str | None:
    """The split to read; None for a data set without splits."""
    for file in find_caption_files(dataset):
        if any(record.split for record in read_caption_file(file, [])[1]):
            return wanted
    return None


def _copy(pairs: Sequence["Pair"], folder: Path, seed: int) -> tuple[str, ...]:
    """Writes pictures, named by their place, with all captions but one each, which are given."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    asked, lines = [], []
    for place, pair in enumerate(pairs):
        texts = list(dict.fromkeys(caption.text for caption in pair.captions))
        asked.append(texts.pop(int(rng.integers(len(texts)))))
        name = f"{place:06d}{pair.path.suffix}"
        shutil.copyfile(pair.path, folder / name)
        lines.append(json.dumps({"file": name, "captions": texts}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tuple(asked)


def places_of(answer: Answer) -> list[int]:
    """The places of the pictures found, best first."""
    return [int(hit.path.stem) for hit in answer]


def with_intervals(
    statistic: Statistic, sizes: Sequence[int], settings: Settings
) -> dict[str, dict[str, Any]]:
    """Each number of a statistic as `value` and `interval`; see `metrics.bootstrap_interval`."""
    once = statistic(np.ones(sum(sizes), np.int64))
    bounds = metrics.bootstrap_interval(
        statistic, sizes, resamples=settings.resamples, seed=settings.seed
    )
    return {name: {"value": once[name], "interval": list(bounds[name])} for name in once}


# ── channels ─────────────────────────────────────────────────────────────────────────────────────


def measure_channels(
    answers: Mapping[Mode, Sequence[Answer]], settings: Settings
) -> dict[str, dict[str, Any]]:
    """Recall by mode in percent, and how many times that of pictures alone hybrid finds first."""
    ranks = {
        mode: np.array([_rank(places_of(answer), own) for own, answer in enumerate(several)])
        for mode, several in answers.items()
    }

    def statistic(drawn: Ids) -> dict[str, float]:
        recalls = {
            f"{mode} t2i_r@{k}": 100 * float(np.average(found < k, weights=drawn))
            for mode, found in ranks.items()
            for k in metrics.KS
        }
        image = max(recalls["image t2i_r@1"], 1e-9)
        return recalls | {"hybrid to image t2i_r@1": recalls["hybrid t2i_r@1"] / image}

    return with_intervals(statistic, [len(answers["image"])], settings)


def _rank(found: Sequence[int], own: int) -> int:
    return found.index(own) if own in found else K


# ── cut-off ──────────────────────────────────────────────────────────────────────────────────────


def nonsense(count: int, seed: int) -> list[str]:
    """Texts of one to six words that no language has."""
    rng = np.random.default_rng(seed)

    def word() -> str:
        syllables = (
            "".join(rng.choice(letters) for letters in (CONSONANTS, VOWELS, CONSONANTS))
            for _ in range(rng.integers(1, 4))
        )
        return "".join(syllables)

    return [" ".join(word() for _ in range(rng.integers(1, 7))) for _ in range(count)]


def read_world(place: Path, count: int, seed: int) -> list[str]:
    """Captions of a folder or of a captions file, each text once, `count` drawn by the seed.

    Raises UsageError if there are none.
    """
    if place.is_dir():
        found = {one.text for pair in read_pairs(place, embedded=False)[0] for one in pair.captions}
    else:
        found = {text for record in read_caption_file(place, [])[1] for text in record.texts}
    if not found:
        raise UsageError(f"{place} has no captions")
    texts = sorted(found)
    drawn = np.random.default_rng(seed).permutation(len(texts))[:count]
    return [texts[one] for one in sorted(drawn)]


def best_of(answers: Sequence[Answer]) -> Scores:
    """(q,) the score of each best answer."""
    return np.array([answer[0].score if answer else NONE for answer in answers])


def without_own(answers: Sequence[Answer]) -> Scores:
    """(q,) the score of the best answer that is not the query's own picture."""
    return np.array(
        [
            next((hit.score for hit, place in zip(answer, places_of(answer), strict=True)
                  if place != own), NONE)
            for own, answer in enumerate(answers)
        ]
    )  # fmt: skip


def measure_cut_off(
    own: Sequence[Answer], foreign: Mapping[str, Sequence[Answer]], settings: Settings
) -> dict[str, dict[str, Any]]:
    """How well best scores tell own from foreign queries, and who is told "no good match".

    `auc` is of own queries against all foreign ones, `auc NAME` against one world or, as "own taken
    out", against the same queries without their own picture; `no match NAME` is a share in percent.
    """
    best = {name: best_of(answers) for name, answers in foreign.items()}
    ours, taken_out = best_of(own), without_own(own)
    everyone = np.concatenate(list(best.values()))
    ends = np.cumsum([len(ours), *map(len, best.values())])
    told = {
        name: np.array([answer.is_match is False for answer in answers])
        for name, answers in {"own": own, **foreign}.items()
    }

    def statistic(drawn: Ids) -> dict[str, float]:
        own_drawn, *parts = np.split(drawn, ends[:-1])
        weights = dict(zip(["own", *best], [own_drawn, *parts], strict=True))
        found = {"auc": calibration.roc_auc(ours, everyone, own_drawn, drawn[len(ours) :])}
        for name, scores in best.items():
            found[f"auc {name}"] = calibration.roc_auc(ours, scores, own_drawn, weights[name])
        found["auc own taken out"] = calibration.roc_auc(ours, taken_out, own_drawn, own_drawn)
        for name, flags in told.items():
            found[f"no match {name}"] = 100 * float(np.average(flags, weights=weights[name]))
        return found

    return with_intervals(statistic, [len(ours), *map(len, best.values())], settings)


def measure_calibration(
    own: Sequence[Answer], background: Sequence[Answer], settings: Settings
) -> dict[str, Any]:
    """The expected calibration error of held-out pairs, and the reliability diagram.

    `error` by curves that were fitted without what they are judged by, `library error` by the
    library's own; `bins` of the first have mean confidence, share that is right and weight. Just
    the counts where there are too few pairs for a curve.
    """
    shown = [
        (place, hit)
        for place, answer in enumerate(own)
        for hit, found in zip(answer[: calibration.SHOWN], places_of(answer), strict=False)
        if found == place
    ]
    first = [answer[0] for answer in background if answer]
    right = np.array([hit.score for _, hit in shown])
    wrong = np.array([hit.score for hit in first])
    found: dict[str, Any] = {"pairs": len(right), "unrelated": len(wrong)}
    if min(len(right), len(wrong)) < calibration.LEAST_PAIRS:
        return found
    confidences, are_right, weights = calibration.cross_fitted(right, wrong, seed=settings.seed)
    said = np.array([hit.confidence for hit in (*(hit for _, hit in shown), *first)], np.float64)
    owners = np.array([place for place, _ in shown])

    def statistic(drawn: Ids) -> dict[str, float]:
        times = np.concatenate([drawn[: len(own)][owners], drawn[len(own) :]])
        return {
            name: calibration.calibration_error(judged, are_right, _even(times, are_right))
            for name, judged in (("error", confidences), ("library error", said))
        }

    return (
        found
        | with_intervals(statistic, [len(own), len(first)], settings)
        | {"bins": calibration.reliability(confidences, are_right, weights)}
        | {"library bins": calibration.reliability(said, are_right, weights)}
    )


def _even(times: Ids, are_right: NDArray[np.bool_]) -> Scores:
    """Weights in proportion to `times` that give both kinds half."""
    weights = times.astype(np.float64)
    for kind in (are_right, ~are_right):
        weights[kind] /= 2 * max(weights[kind].sum(), 1)
    return weights


def measure_pictures(
    gallery: Gallery, worlds: Mapping[str, Sequence[Path]], settings: Settings
) -> dict[str, dict[str, Any]]:
    """The same of pictures: own ones, whose nearest other is the best answer, and foreign ones."""
    searcher = gallery.library.searcher

    def ask(pictures: Sequence[Path]) -> list[Answer]:
        return [searcher.images(Query(images=((one, 1.0),)), 2, all=True) for one in pictures]

    folder = gallery.library.roots()[0].path
    drawn = _draw(sorted(folder.glob("[0-9]*")), settings.pictures, settings.seed)
    own = [
        [hit for hit in answer if hit.path.name != picture.name][:1]
        for picture, answer in zip(drawn, ask(drawn), strict=True)
    ]
    best = {"own": own} | {name: [a[:1] for a in ask(some)] for name, some in worlds.items()}
    scores = {
        name: np.array([hits[0].score if hits else NONE for hits in several])
        for name, several in best.items()
    }
    told = {
        name: np.array(
            [bool(hits) and (hits[0].confidence or 0) < calibration.CUT for hits in all_]
        )
        for name, all_ in best.items()
    }
    ends = np.cumsum([len(one) for one in scores.values()])

    def statistic(drawn: Ids) -> dict[str, float]:
        weights = dict(zip(scores, np.split(drawn, ends[:-1]), strict=True))
        areas = {
            f"auc {name}": calibration.roc_auc(
                scores["own"], scores[name], weights["own"], weights[name]
            )
            for name in worlds
        }
        return areas | {
            f"no match {name}": 100 * float(np.average(flags, weights=weights[name]))
            for name, flags in told.items()
        }

    return with_intervals(statistic, [len(one) for one in scores.values()], settings)


def _draw(paths: Sequence[Path], count: int, seed: int) -> list[Path]:
    drawn = np.random.default_rng(seed).permutation(len(paths))[:count]
    return [paths[one] for one in sorted(drawn)]


# ── tables and plots ─────────────────────────────────────────────────────────────────────────────


def cell(found: Mapping[str, Any], digits: int = 1) -> str:
    """A number with its interval."""
    low, high = found["interval"]
    return f"{found['value']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def tables_of(numbers: Mapping[str, Any]) -> str:
    """All that was measured, as Markdown."""
    channels, cut_off = numbers["channels"], numbers["cut_off"]
    recalls = format_table(
        ["found by", *(f"t2i R@{k}" for k in metrics.KS)],
        [
            [mode, *(cell(channels[f"{mode} t2i_r@{k}"]) for k in metrics.KS)]
            for mode in MODES
        ],
    )  # fmt: skip
    usual = numbers["default"]
    worlds = [name.removeprefix("auc ") for name in cut_off[usual] if name.startswith("auc ")]
    areas = format_table(
        ["own queries against", *(f"AUC, {mode}" for mode in cut_off)]
        + [f"told no match, {mode}" for mode in cut_off],
        [
            [name or "all foreign ones"]
            + [cell(of_mode[f"auc {name}".strip()], 3) for of_mode in cut_off.values()]
            + [
                cell(of_mode[f"no match {name}"]) if f"no match {name}" in of_mode else ""
                for of_mode in cut_off.values()
            ]
            for name in ["", *worlds]
        ]
        + [["own queries", *[""] * len(cut_off)]
           + [cell(of_mode["no match own"]) for of_mode in cut_off.values()]],
    )  # fmt: skip
    errors = format_table(
        ["calibration, text queries", "pairs", "unrelated", "error, held out", "the library's own"],
        [
            [mode, str(one["pairs"]), str(one["unrelated"])]
            + [cell(one[name], 3) if name in one else "" for name in ("error", "library error")]
            for mode, one in numbers["calibration"].items()
        ],
    )
    pictures = numbers["pictures"]
    shown = format_table(
        ["pictures as queries", "AUC, own against", "told no match"],
        [
            [name.removeprefix("no match "), _area(pictures, name), cell(pictures[name])]
            for name in pictures
            if name.startswith("no match ")
        ],
    )
    parts = [
        f"{recalls}\n\nPercent. Hybrid finds {cell(channels['hybrid to image t2i_r@1'], 2)} times"
        f" as often at once as pictures alone; by default this library is searched by {usual}.",
        f"{areas}\n\nTold no match: percent.",
        errors,
        shown,
    ]
    return "\n\n".join(
        [*parts, *([numbers["composition"]["table"]] if "composition" in numbers else [])]
    )


def _area(pictures: Mapping[str, Any], name: str) -> str:
    area = pictures.get(name.replace("no match", "auc"))
    return cell(area, 3) if area else ""


def draw(record: Mapping[str, Any]) -> dict[str, "Figure"]:
    """Recall by mode; confidence beside what came of it, and best scores of own and foreign."""
    from plots import COLOURS, MARKERS, legend, line, new_figure

    numbers = record["numbers"]
    channels, (axes,) = new_figure(
        f"Own picture found, {record['data']['name']}", "", "text to image recall, %"
    )
    for number, k in enumerate(metrics.KS):
        found = [numbers["channels"][f"{mode} t2i_r@{k}"] for mode in MODES]
        values = np.array([one["value"] for one in found])
        bounds = np.array([one["interval"] for one in found])
        axes.errorbar(
            np.arange(len(MODES)) + 0.1 * (number - 1),
            values,
            yerr=[np.maximum(values - bounds[:, 0], 0), np.maximum(bounds[:, 1] - values, 0)],
            color=COLOURS[number],
            marker=MARKERS[number],
            linestyle="none",
            capsize=3,
            label=f"R@{k}",
        )
    axes.set_xticks(range(len(MODES)), MODES)
    axes.set_ylim(0, 102)
    legend(axes, loc="lower right")

    cut_off, (left, right) = new_figure(
        "Confidence against outcome", "confidence", "share that is right", columns=2
    )
    left.plot([0, 1], [0, 1], color="#808080", linewidth=1)
    for number, (mode, one) in enumerate(numbers["calibration"].items()):
        if "bins" not in one:
            continue
        x, y, _ = zip(*one["bins"], strict=True)
        line(left, number, f"{mode}, error {one['error']['value']:.3f}", x, y)
    legend(left, loc="upper left")
    usual = numbers["default"]
    for number, (name, scores) in enumerate(numbers["scores"][usual].items()):
        share = np.arange(1, len(scores) + 1) / len(scores)
        found = np.sort(scores) > NONE
        x, y = np.sort(scores)[found], share[found]
        line(right, number, name, x, y, markevery=max(1, len(x) // 8))
    right.set_title(f"Best scores, {usual}")
    right.set_xlabel("score of the best answer")
    right.set_ylabel("share of queries below")
    legend(right, loc="upper left", bbox_to_anchor=(1, 1))
    return {"channels": channels, "cut-off": cut_off}


# ── all together ─────────────────────────────────────────────────────────────────────────────────


def measure(
    gallery: Gallery, foreign: Sequence[Path], settings: Settings, say: Callable[[str], None]
) -> dict[str, Any]:
    """Each section in turn."""
    count, seed = settings.queries, settings.seed
    worlds = {place.stem: read_world(place, count, seed) for place in foreign}
    worlds["nonsense"] = nonsense(count, seed)
    unrelated = _unrelated(gallery)
    numbers: dict[str, Any] = {"default": gallery.library.search(gallery.asked[0], k=1).mode}
    own = {mode: gallery.ask(gallery.asked, mode) for mode in MODES}
    numbers["channels"] = measure_channels(own, settings)
    say("channels")
    numbers |= {"cut_off": {}, "calibration": {}, "scores": {}}
    for mode in CUT_OFF:
        others = {name: gallery.ask(texts, mode, 1) for name, texts in worlds.items()}
        numbers["cut_off"][mode] = measure_cut_off(own[mode], others, settings)
        background = gallery.ask(unrelated, mode, 1)
        numbers["calibration"][mode] = measure_calibration(own[mode], background, settings)
        best = {name: best_of(answers) for name, answers in others.items()}
        numbers["scores"][mode] = {
            name: [round(float(one), 4) for one in scores]
            for name, scores in {
                "own": best_of(own[mode]), "own taken out": without_own(own[mode]), **best
            }.items()
        }  # fmt: skip
        say(f"cut-off, {mode}")
    with_pictures = {
        place.name: _draw(
            [picture.path for picture in list_pictures(place)], settings.pictures, seed
        )
        for place in foreign
        if place.is_dir()
    }
    numbers["pictures"] = measure_pictures(gallery, with_pictures, settings)
    say("pictures")
    place = gallery.library.path
    if any(composition.read_world(place, gallery.encoder).pairs()):
        numbers["composition"] = composition.measure(
            place, gallery.encoder, gallery.asked, resamples=settings.resamples, seed=seed
        )
        say("composition")
    return numbers


def _unrelated(gallery: Gallery) -> list[str]:
    """The background, without what is near the queries as the library leaves out what it has."""
    texts = calibration.background()
    kept = calibration.unrelated(
        gallery.encoder.encode_texts(texts),
        gallery.encoder.encode_texts(gallery.asked),
        np.arange(len(gallery.asked)),
    )
    return [text for text, is_kept in zip(texts, kept, strict=True) if is_kept]


@click.command()
@click.argument("dataset", type=click.Path(path_type=Path))
@click.option("--model", default="mini", show_default=True)
@click.option("--split", default=DEFAULTS.split, show_default=True, help="If there are splits.")
@click.option(
    "--foreign",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Another data set, or a captions file; several times for several.",
)
@click.option("--queries", default=DEFAULTS.queries, show_default=True, help="Of each foreign one.")
@click.option("--pictures", default=DEFAULTS.pictures, show_default=True, help="Asked of each.")
@click.option("--resamples", default=DEFAULTS.resamples, show_default=True, help="Of a bootstrap.")
@click.option("--seed", default=DEFAULTS.seed, show_default=True)
@click.option("--device", default=DEFAULTS.device, show_default=True)
@click.option("--threads", type=int, help="CPU threads for one operation; the engine's choice.")
@folder_option
@out_option
def main(
    dataset: Path,
    model: str,
    foreign: tuple[Path, ...],
    folder: Path | None,
    out: Path | None,
    **options: Any,
) -> None:
    """Measure the answers of a library of DATASET, a folder of captioned pictures."""
    if missing := [place for place in (dataset, *foreign) if not place.exists()]:
        click.echo(f"skipped: {missing[0]} is not here", err=True)
        return
    settings = Settings(foreign=tuple(place.stem for place in foreign), **options)
    started = time.perf_counter()

    def say(section: str) -> None:
        click.echo(f"{section}: {time.perf_counter() - started:.0f} s", err=True)

    with tempfile.TemporaryDirectory(prefix="answers-", dir=folder) as home:
        try:
            encoder: Any = Remembering(
                load_encoder(model, device=settings.device, threads=settings.threads)
            )
            gallery, data = open_gallery(Path(home), dataset, encoder, settings)
            say("index")
            with gallery.library:
                numbers = measure(gallery, foreign, settings, say)
        except RetrieverError as error:
            raise click.ClickException(str(error)) from error
    printed = (
        f"{data['name']}{', split ' + data['split'] if data['split'] else ''}, {model}:"
        f" {data['pictures']:,} pictures, {data['captions']:,} captions in the library,"
        f" {data['queries']:,} left out as queries\n\n{tables_of(numbers)}"
    )
    click.echo(printed)
    write_report(
        out,
        "answers",
        settings=settings,
        data=data | {"model": encoder.name, "fingerprint": encoder.fingerprint},
        numbers=numbers,
        seconds=time.perf_counter() - started,
        printed=printed,
        draw=draw,
    )


if __name__ == "__main__":
    main()
