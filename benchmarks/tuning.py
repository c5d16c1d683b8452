"""What `retriever tune` brings on held-out pairs, what it costs, and what it leaves as it was.

    python benchmarks/tuning.py fashion-products grocery-store flickr8k --foreign flickr8k \\
        --foreign coco-mini --libraries libraries --out benchmarks/results/tuning.json

Of a data set with a validation split that is tuned to, of others everything. Recalls are of pairs
that neither trained a head nor stopped its training (see `retriever.tuning`), and so are those of
the second step, hubness correction. What both are worth in use is asked besides: of a library of
the validation split, where there is one, with the last caption of each picture, which it lacks.

What a library that is tuned to the first data set still finds elsewhere is asked of the test splits
of --foreign ones, with the head that is adopted and with one whose training nothing tied to texts
about something else. An architecture of open_clip with random weights must be refused. The largest
library is carried over to the first head's space and back, and its answers are compared.

Libraries are made where --libraries says, once. Data sets that are not there are left out.
"""

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from report import format_table, out_option, present, write_report

from indexes.heads import Head, fingerprint
from indexes.records import ModelSpec
from indexes.store import Store
from retriever import tuning
from retriever.channels import Mode
from retriever.data import list_pictures, read_pairs
from retriever.encoders import Encoder, load_encoder
from retriever.library import Library
from retriever.metrics import KS, bootstrap_interval
from retriever.tuning import RECALLS, General, Pairs, TuneConfig

Rows = NDArray[np.float32]
Places = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting of the benchmark; those of `TuneConfig` are its own."""

    model: str = "mini"
    random: str = "ViT-S-32"  # of open_clip, with weights that know nothing
    random_pictures: int = 150
    queries: int = 100  # whose answers are compared before and after
    epochs: int = tuning.DEFAULTS.epochs
    resamples: int = tuning.DEFAULTS.resamples
    seed: int = 0


DEFAULTS = Settings()


def config_of(settings: Settings) -> TuneConfig:
    """How heads are trained."""
    return TuneConfig(epochs=settings.epochs, resamples=settings.resamples, seed=settings.seed)


# ── libraries ────────────────────────────────────────────────────────────────────────────────────


def library_of(dataset: Path, folder: Path, encoder: Encoder) -> Path:
    """The library of a data set, made if absent."""
    path = folder / f"{dataset.resolve().name}.lib"
    if not path.exists():
        with Library.create(path, encoder) as library:
            library.index(dataset)
    return path


def ids_of(store: Store, dataset: Path, split: str) -> list[int] | None:
    """The items of a split; None if the data set has none of that name."""
    if split not in _splits(dataset):
        return None
    pairs, _ = read_pairs(dataset, split=split, embedded=False)
    wanted = {one.file for one in pairs}
    return [one.item_id for one in store.items(store.item_ids()) if one.file in wanted]


def _splits(dataset: Path) -> set[str]:
    lines = (dataset / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    return {json.loads(line).get("split", "") for line in lines}


def random_library(
    dataset: Path, folder: Path, settings: Settings
) -> tuple[Library, dict[str, Any]]:
    """A library of some pictures by an open_clip model whose weights are random."""
    import open_clip  # type: ignore[import-untyped]
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(settings.seed)
    made = open_clip.create_model(settings.random)
    place = folder / settings.random
    place.mkdir()
    described = {
        "model_cfg": open_clip.get_model_config(settings.random),
        "preprocess_cfg": made.visual.preprocess_cfg,
    }
    (place / "open_clip_config.json").write_text(json.dumps(described), encoding="utf-8")
    weights = {name: one.clone() for name, one in made.state_dict().items()}
    save_file(weights, place / "open_clip_model.safetensors")
    pictures = folder / "some"
    pictures.mkdir()
    for picture in list(list_pictures(dataset))[: settings.random_pictures]:
        (pictures / picture.file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(picture.path, pictures / picture.file)
    shutil.copyfile(dataset / "captions.jsonl", pictures / "captions.jsonl")
    encoder = load_encoder(str(place))
    library = Library.create(folder / "random.lib", encoder)
    library.index(pictures)
    return library, {"architecture": settings.random, "weights": "random"}


# ── what is measured ─────────────────────────────────────────────────────────────────────────────


def measure(
    store: Store, encoder: Encoder, settings: Settings, among: Collection[int] | None = None
) -> tuple[tuning.Tuning, dict[str, Any]]:
    """What tuning finds, and its record."""
    began = time.process_time()
    found = tuning.tune(store, lambda: encoder, config_of(settings), among=among)
    assert found is not None
    record = {"is_better": found.is_better, "reason": found.reason} | found.record
    record["cpu_s"] = round(time.process_time() - began, 1)
    return found, record


def ask(dataset: Path, folder: Path, encoder: Encoder, settings: Settings) -> dict[str, Any]:
    """What tuning brings to those who ask a whole library by captions that it has not got."""
    pairs, _ = read_pairs(dataset, split="val", embedded=False)
    asked = [one for one in pairs if len(one.captions) > 1]
    pictures = folder / "held-back"
    lines = []
    for one in asked:
        (pictures / one.file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(one.path, pictures / one.file)
        texts = [caption.text for caption in one.captions[:-1]]
        lines.append(json.dumps({"file": one.file, "captions": texts}))
    (pictures / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def ranks(library: Library, mode: Mode) -> Places:
        found = np.full(len(asked), max(KS))
        for place, one in enumerate(asked):
            hits = library.search(one.captions[-1].text, mode=mode, k=max(KS), all=True)
            names = [hit.path.relative_to(pictures).as_posix() for hit in hits]
            if one.file in names:
                found[place] = names.index(one.file)
        return found

    modes: tuple[Mode, ...] = ("image", "hybrid")
    with Library.create(folder / "held-back.lib", encoder) as library:
        library.index(pictures)
        before, cut_off = [ranks(library, mode) for mode in modes], _cut_off(library)
        report = library.tune(config_of(settings))
        assert report is not None
        after = [ranks(library, mode) for mode in modes]
        told: dict[str, Any] = {
            "dataset": dataset.resolve().name,
            "pictures": len(asked),
            "adopted": report.adopted,
            "reason": report.reason,
            "cut_off": {"before": cut_off, "after": _cut_off(library)},
        }
    for mode, *both in zip(modes, before, after, strict=True):
        hits = np.array([[some < k for k in KS] for some in both])  # (2, 3, n)

        def gain(drawn: Places, hits: NDArray[np.bool_] = hits) -> dict[str, float]:
            without, with_it = 100 * (hits @ drawn).sum(axis=1) / drawn.sum()
            return {"gain": with_it - without}

        told[mode] = {
            when: {
                f"r@{k}": round(100 * float(row.mean()), 2) for k, row in zip(KS, rows, strict=True)
            }
            for when, rows in zip(("before", "after"), hits, strict=True)
        }
        interval = bootstrap_interval(
            gain, [len(asked)], resamples=settings.resamples, seed=settings.seed
        )["gain"]
        told[mode]["gain"] = round(gain(np.ones(len(asked), np.int64))["gain"], 2)
        told[mode]["interval"] = [round(end, 2) for end in interval]
    return told


def _cut_off(library: Library) -> dict[str, float] | None:
    """By mode, how often it errs in telling answers from what only comes nearest, in percent."""
    if (answers := library.info()["answers"]) is None:
        return None
    return {mode: round(100 * one["error"], 2) for mode, one in answers["cut_off"].items()}


def untied(store: Store, encoder: Encoder, settings: Settings) -> Head:
    """The head of a training that nothing tied to texts about something else."""
    config = replace(config_of(settings), faithful=0.0)
    pairs = Pairs.of(store, config)
    folds = tuning.dealt_into_folds(pairs.groups, config.folds, config.seed)
    general = General.of(encoder.encode_texts(tuning.other_texts()), pairs)
    trained = tuning.train_head(
        pairs.part(folds != 0), pairs.part(folds == 0), general.half(0), config
    )
    assert trained is not None
    return trained[0]


def recalls(pairs: Pairs) -> dict[str, float]:
    """Of both directions, in percent, with rSum."""
    found = {
        f"{direction}_r@{k}": 100 * float((some < k).mean())
        for direction, some in zip(("t2i", "i2t"), tuning.both_ranks(pairs), strict=True)
        for k in (1, 5, 10)
    }
    return found | {"rsum": sum(found.values())}


def move(path: Path, head: Head, encoder: Encoder, settings: Settings) -> dict[str, Any]:
    """Carries a library over to a head's space and back: seconds, files opened, equal answers."""
    opened: list[str] = []
    is_watching = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if is_watching and event == "open" and str(arguments[0]).startswith(folders):
            opened.append(str(arguments[0]))

    with Library.open(path, encoder) as library, Store.open(path) as store:
        base = store.model
        folders = tuple(str(root) for _, root in store.roots())
        sys.addaudithook(hook)
        with store.snapshot() as rows:
            ids = rows.caption_ids(rows.item_ids()[: settings.queries])
        texts = [caption.text for _, caption in store.captions(ids[: settings.queries])]
        before = _answers(library, texts)
        packed = head.pack()
        derived = fingerprint(base.fingerprint, packed)
        model = ModelSpec(f"{base.name}+tuned", head.made, derived)
        is_watching, cpu = True, time.process_time()
        times = [time.perf_counter()]
        with store.writer() as writer:
            writer.adopt(model, packed, {})
            times.append(time.perf_counter())
            writer.finish()
        times.append(time.perf_counter())
        is_watching, cpu = False, time.process_time() - cpu
    with Library.open(path, encoder) as library:
        during = _answers(library, texts)
        assert library.model == model
        times.append(time.perf_counter())
        library.untune()
        times.append(time.perf_counter())
        after = _answers(library, texts)
        info = library.info()
    return {
        "pictures": info["items"],
        "captions": info["captions"],
        "carried_s": round(times[1] - times[0], 2),
        "files_s": round(times[2] - times[1], 2),
        "cpu_s": round(cpu, 2),  # of both
        "undo_s": round(times[4] - times[3], 2),
        "pictures_opened": len(opened),
        "answers": len(before),
        "answers_changed": sum(one != other for one, other in zip(before, during, strict=True)),
        "answers_equal_after_undo": before == after,
    }


def _answers(library: Library, texts: Sequence[str]) -> list[list[tuple[int, float]]]:
    return [
        [(hit.item_id, hit.score) for hit in library.search(text, mode="image")] for text in texts
    ]


# ── tables ───────────────────────────────────────────────────────────────────────────────────────


def recall_rows(name: str, record: Mapping[str, Any]) -> list[list[str]]:
    """Four lines: guessing, before, after, and the gain with its interval."""
    guessing = [f"{record['chance'][recall]:.1f}" for recall in (*RECALLS, "rsum")]
    rows = [[f"{name}, guessing", *guessing, "", "", "", ""]]
    for when in ("before", "after"):
        one = record[when]
        spaces = ("alignment", "uniformity_pictures", "uniformity_texts", "modality_gap")
        rows.append(
            [
                f"{name}, {when}",
                *(_half(one, recall) for recall in (*RECALLS, "rsum")),
                *(f"{one[space]:.3f}" for space in spaces),
            ]
        )
    gain = record["gain"]
    spans = [
        "{:+.1f} [{:+.1f}, {:+.1f}]".format(gain[recall], *gain["intervals"][recall])
        for recall in (*RECALLS, "rsum")
    ]
    is_better, _ = tuning.is_head_better(record)
    told = "adopted" if is_better else "refused"
    return [*rows, [f"{name}, gain: {told}", *spans, "", "", "", ""]]


def correction_row(name: str, record: Mapping[str, Any]) -> list[str]:
    """One line: before and after, and the gain with its interval."""
    gain = record["gain"]["rsum"]
    low, high = record["gain"]["intervals"]["rsum"]
    helps, _ = tuning.is_correction_better(record)
    return [
        f"{name}, {'tuned' if record['space'] == 'after' else 'untuned'}",
        f"{record['weights'][-1]:g}",
        *(f"{record['before'][one]:.1f} → {record['after'][one]:.1f}" for one in RECALLS[:3]),
        f"{gain:+.1f} [{low:+.1f}, {high:+.1f}]",
        "kept" if helps else "left out",
    ]


def _half(record: Mapping[str, Any], name: str) -> str:
    low, high = record["intervals"][name]
    return f"{record[name]:.1f} ± {(high - low) / 2:.1f}"


def tables_of(numbers: Mapping[str, Any]) -> str:
    """All that was measured."""
    names = [name.replace("_r@", " R@") for name in RECALLS]
    header = ["held-out pairs", *names, "rSum", "alignment", "uniform, pictures"]
    header += ["uniform, texts", "gap"]
    told = {name: one for name, one in numbers["tuned"].items() if "before" in one}
    parts = [
        format_table(header, [row for name, one in told.items() for row in recall_rows(name, one)]),
        "Percent; 95 % intervals of groups of pictures that share captions or look the same. "
        + "; ".join(
            f"{name}: {one['pictures']:,} pictures in {one['groups']:,} groups,"
            f" {one['cpu_s']:.0f} s of CPU"
            for name, one in numbers["tuned"].items()
        )
        + ".",
    ]
    if numbers["elsewhere"]:
        rows = [
            [f"{name}, {how}", *(f"{one[recall]:.1f}" for recall in (*RECALLS, "rsum"))]
            for name, several in numbers["elsewhere"].items()
            for how, one in several.items()
        ]
        parts.append(f"What the head of {next(iter(told))} does to pictures of another kind:")
        parts.append(format_table(["test split", *names, "rSum"], rows))
    rows = [
        correction_row(name, record["correction"])
        for name, record in told.items()
        if "correction" in record
    ]
    parts.append("And then corrected for hubs, of which texts find pictures in another order:")
    header = ["held-out pairs", "weight", *names[:3], "gain of the three together", ""]
    parts.append(format_table(header, rows))
    if asked := numbers.get("asked"):
        rows = [
            [
                mode,
                *(f"{asked[mode]['before'][f'r@{k}']:.1f}" for k in KS),
                *(f"{asked[mode]['after'][f'r@{k}']:.1f}" for k in KS),
                "{:+.1f} [{:+.1f}, {:+.1f}]".format(asked[mode]["gain"], *asked[mode]["interval"]),
            ]
            for mode in ("image", "hybrid")
        ]
        parts.append(
            f"A library of {asked['pictures']:,} pictures of {asked['dataset']}'s validation split"
            " without the last caption of each, with which it is asked: "
            f"{'tuned' if asked['adopted'] else 'not tuned'}; {asked['reason']}."
        )
        header = ["found by", *(f"before, R@{k}" for k in KS), *(f"after, R@{k}" for k in KS)]
        parts.append(format_table([*header, "gain of the three together"], rows))
        if all(asked["cut_off"].values()):
            errors = "; ".join(
                f"by {mode} {before:.1f} % before, {asked['cut_off']['after'][mode]:.1f} % after"
                for mode, before in asked["cut_off"]["before"].items()
                if mode in ("image", "hybrid")
            )
            parts.append(f'"No good match" errs on held-out queries: {errors}.')
    if moved := numbers.get("moved"):
        parts.append(
            f"{moved['pictures']:,} pictures and {moved['captions']:,} captions were carried over"
            f" in {moved['carried_s']:.1f} s, their FAISS files written in {moved['files_s']:.1f}"
            f" s ({moved['cpu_s']:.1f} s of CPU); pictures opened: {moved['pictures_opened']}."
            f" Undone in {moved['undo_s']:.1f} s;"
            f" of {moved['answers']} answers {moved['answers_changed']} had changed, and after that"
            f" {'all are' if moved['answers_equal_after_undo'] else 'NOT all are'} as before."
        )
    return "\n\n".join(parts)


Folder = click.Path(path_type=Path)


@click.command()
@click.argument("datasets", nargs=-1, required=True, type=Folder)
@click.option(
    "--foreign", "foreigns", multiple=True, type=Folder, help="Asked with the first head."
)
@click.option("--libraries", type=Folder, help="Where libraries are made, or were.")
@click.option("--model", default=DEFAULTS.model, show_default=True)
@click.option("--random-pictures", default=DEFAULTS.random_pictures, show_default=True)
@click.option("--queries", default=DEFAULTS.queries, show_default=True, help="Compared.")
@click.option("--resamples", default=DEFAULTS.resamples, show_default=True, help="Of a bootstrap.")
@click.option("--epochs", default=DEFAULTS.epochs, show_default=True, help="At most.")
@click.option("--seed", default=DEFAULTS.seed, show_default=True)
@out_option
def main(
    datasets: tuple[Path, ...],
    foreigns: tuple[Path, ...],
    libraries: Path | None,
    out: Path | None,
    **options: Any,
) -> None:
    """Tune libraries of DATASETS, folders of captioned pictures, and measure what that brings."""
    settings = Settings(**options)
    here = present(dict.fromkeys((*datasets, *foreigns)))
    there = [one for one in datasets if one in here]
    if not there:
        return
    started = time.perf_counter()
    numbers: dict[str, Any] = {"tuned": {}, "elsewhere": {}}
    encoder = load_encoder(settings.model)
    with tempfile.TemporaryDirectory(prefix="tuning-") as home:
        folder = libraries or Path(home)
        folder.mkdir(parents=True, exist_ok=True)
        of_nothing: dict[str, Any] = {}
        if settings.random_pictures:
            library, told = random_library(there[0], Path(home), settings)
            with library, Store.open(library.path) as store:
                _, record = measure(store, library.encoder, settings)
            of_nothing[f"{settings.random}, random weights"] = record | told
            click.echo(f"random weights: {record['reason']}", err=True)
        paths = [library_of(dataset, folder, encoder) for dataset in there]
        heads: list[Head | None] = []
        for dataset, path in zip(there, paths, strict=True):
            with Store.open(path) as store:
                among = ids_of(store, dataset, "val")
                name = dataset.resolve().name + (" val" if among is not None else "")
                found, record = measure(store, encoder, settings, among)
                numbers["tuned"][name] = record
                heads.append(found.head)
            click.echo(f"{name}: {found.reason}", err=True)
        numbers["tuned"] |= of_nothing
        if heads[0] is not None:
            with Store.open(paths[0]) as store:
                hows = {
                    "tuned": heads[0],
                    "tuned, tied to nothing": untied(store, encoder, settings),
                }
            for foreign in [one for one in foreigns if one in here]:
                with Store.open(library_of(foreign, folder, encoder)) as store:
                    pairs = Pairs.of(store, config_of(settings), ids_of(store, foreign, "test"))
                numbers["elsewhere"][foreign.resolve().name] = {"untuned": recalls(pairs)} | {
                    how: recalls(pairs.carried(head)) for how, head in hows.items()
                }
            largest = max(paths, key=lambda path: path.joinpath("catalogue.sqlite").stat().st_size)
            numbers["moved"] = move(largest, heads[0], encoder, settings)
        if with_val := [dataset for dataset in there if "val" in _splits(dataset)]:
            numbers["asked"] = ask(with_val[0], Path(home), encoder, settings)
            click.echo(f"asked of {with_val[0]}: {numbers['asked']['reason']}", err=True)
    printed = tables_of(numbers)
    click.echo(printed)
    write_report(
        out,
        "tuning",
        settings=settings,
        data={"name": ", ".join(dataset.resolve().name for dataset in there)},
        numbers=numbers,
        printed=printed,
        seconds=time.perf_counter() - started,
        packages=("torch",),
    )


if __name__ == "__main__":
    main()
