"""The command `retriever`: each command parses, calls one function and prints.

Results go to stdout, progress and warnings to stderr. Exit status: 0 done, 1 failed, 2 wrong usage,
3 done but some files failed, 130 interrupted. What a command needs is imported inside it, so that
`--help` and a mistyped path are answered at once.
"""

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import click

from retriever import __version__, finding, serving, upkeep
from retriever.errors import MissingExtraError, UsageError
from retriever.models import DEFAULT_MODEL
from retriever.settings import OBJECTIVES, TEXT_TOWERS, TrainConfig
from retriever.terminal import (
    DEVICES,
    FILE,
    FOLDER,
    FOLDER_OR_FILE,
    SOME_FILES_FAILED,
    Command,
    Commands,
    Progress,
    answer_lines,
    duration,
    encoder_options,
    if_interrupted,
    index_lines,
    json_option,
    library_option,
    model_option,
    open_library,
    open_or_create,
    print_index_report,
    print_json,
    shown,
    stopping,
    warn,
)

if TYPE_CHECKING:
    from retriever.data import CaptionReport
    from retriever.models import ModelInfo
    from retriever.training import EpochLog

SHOWN_AT_MOST = 20  # unmatched captions and the like; `--json` has them all
STRONGER = (
    "Indexed with the bundled model mini; where a download is possible, stronger answers come with"
    " --model MobileCLIP2-S0/dfndr2b (see `retriever models`)."
)


@click.group(
    cls=Commands,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "show_default": True,
        "max_content_width": 100,
    },
)
@click.version_option(__version__, prog_name="retriever")
def main() -> None:
    """Find pictures by describing them, and captions by showing a picture, on your own machine.

    \b
    Examples:
      retriever index ~/Pictures
      retriever search "two dogs on the beach"
    """


# ── a library ────────────────────────────────────────────────────────────────────────────────────


@main.command()
@click.argument("folders", nargs=-1, metavar="[FOLDER]...", type=click.Path(path_type=Path))
@click.option("--captions", type=FILE, help="A captions file, read instead of those in FOLDER.")
@click.option("--dry-run", is_flag=True, help="Only report which pictures have captions.")
@click.option(
    "--prune", is_flag=True, help="Forget the pictures of a folder that is away or empty."
)
@model_option(
    None,
    "A model of `retriever models`; one that the library does not have is added beside its others.",
    show_default=f"the library's, or {DEFAULT_MODEL}",
)
@library_option
@encoder_options
@json_option
def index(
    folders: tuple[Path, ...],
    captions: Path | None,
    dry_run: bool,
    prune: bool,
    model: str | None,
    library_path: Path,
    device: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Bring a library up to date with the pictures in each FOLDER, or in all that it knows.

    Ctrl-C finishes the batch in hand; the same command goes on from there.

    \b
    Examples:
      retriever index ~/Pictures
      retriever index
      retriever index photos --captions photos/captions.csv --dry-run
    """
    missing = [folder for folder in folders if not folder.is_dir()]
    if missing and (dry_run or not library_path.is_dir()):
        raise UsageError(f"{shown(missing[0])} is no folder")
    if dry_run and not folders:
        raise click.UsageError("Say which FOLDER to look at.")
    if dry_run:
        for folder in folders:
            _report_captions(folder, captions, as_json)
        return
    if folders and not missing:
        library = open_or_create(library_path, device, threads, model)
    else:  # a folder that is away may be known; a mistyped one must not add a model
        library = open_library(library_path, device, threads, model, add_model=not missing)
    is_first = not library.info()["generation"]
    started = time.monotonic()
    with library, stopping() as stop:
        kept = (
            f"What was indexed so far is kept in {shown(library.path)};"
            " the same command goes on from there."
        )
        if_interrupted(kept)
        with (
            Progress("Indexing", "pictures") as progress,
            Progress("Optimising", "vectors") as more,
        ):
            report = library.index(
                *folders,
                captions=captions,
                prune=prune,
                progress=progress,
                optimizing=more,
                stop=lambda: bool(stop()),
            )
        made_by = library.model.name
        print_index_report(report, library, time.monotonic() - started, as_json)
    if made_by == DEFAULT_MODEL and report.added and is_first:
        click.echo(STRONGER, err=True)
    if report.interrupted:
        click.echo(f"Interrupted. {kept}", err=True)
        click.get_current_context().exit(128 + stop())
    if stop():  # while it was optimised, when all was indexed
        click.echo("Interrupted: all is indexed, but searches are no faster yet.", err=True)
        click.get_current_context().exit(128 + stop())
    if report.failed:
        click.get_current_context().exit(SOME_FILES_FAILED)


def _report_captions(folder: Path, captions: Path | None, as_json: bool) -> None:
    from retriever.data import read_pairs

    _, report = read_pairs(folder, captions=captions)
    if as_json:
        record = {one.name: getattr(report, one.name) for one in fields(report)}
        print_json(record | {"by_source": dict(report.by_source)})
        return
    click.echo(_caption_summary(report))
    for problem in report.problems:
        warn(problem)


def _caption_summary(report: "CaptionReport") -> str:
    lines = [
        f"{report.pictures:,} pictures, {report.with_captions:,} of them with captions",
        f"{report.captions:,} captions",
        *(f"  {count:,} from {source}" for source, count in report.by_source.items()),
        *_some("captions match no picture", report.unmatched),
        *_some("pictures are named twice", report.duplicates),
    ]
    return "\n".join(lines)


def _some(what: str, names: tuple[str, ...]) -> Iterable[str]:
    if names:
        yield f"{len(names):,} {what}:"
        yield from (f"  {name}" for name in names[:SHOWN_AT_MOST])
        if len(names) > SHOWN_AT_MOST:
            yield f"  and {len(names) - SHOWN_AT_MOST:,} more (--json has all)"


@main.command()
@click.option("--failures", is_flag=True, help="List the pictures that could not be read, and why.")
@library_option
@json_option
def info(failures: bool, library_path: Path, as_json: bool) -> None:
    """Show what a library holds and which pictures failed.

    \b
    Examples:
      retriever info
      retriever info --failures --json
    """
    with open_library(library_path) as library:
        facts = library.info()
        failed = library.failures() if failures else []
    if failures:
        for one in failed:
            if as_json:
                print_json({"path": str(one.path), "reason": one.reason})
            else:
                click.echo(f"{shown(one.path)}: {one.reason}")
        return
    if as_json:
        print_json(facts)
        return
    unread = facts["failures"]
    note = f", {unread:,} of them could not be read (--failures lists them)" if unread else ""
    model = facts["model"]
    index, answers = (
        "\n          ".join(lines)
        for lines in (index_lines(facts["index"]), answer_lines(facts["answers"]))
    )
    click.echo(
        f"Library   {shown(library.path)}\n"
        f"Model     {_model_line(model)}\n{_tuned_line(facts['models'], model)}"
        f"Pictures  {facts['items']:,}{note}\n"
        f"Captions  {facts['captions']:,}\n"
        f"Index     {index}\n"
        f"Answers   {answers}\n"
        f"Size      {facts['size_bytes'] / 1e6:,.1f} MB on disk"
    )
    for other in facts["models"]:
        if other["fingerprint"] != model["fingerprint"]:
            pending = f", {other['pending']:,} pictures pending" if other["pending"] else ""
            click.echo(f"Beside    {_model_line(other)}{pending}")


def _model_line(model: Mapping[str, Any]) -> str:
    return (
        f"{model['name']}, {model['dim']} dimensions, fingerprint {str(model['fingerprint'])[:12]}"
    )


def _tuned_line(models: Iterable[Mapping[str, Any]], model: Mapping[str, Any]) -> str:
    """What the model is tuned from, and what that brought; empty if it is not tuned."""
    for one in models:
        if one["base"] and one["fingerprint"] == model["fingerprint"]:
            return (
                f"Tuned     from {one['base']} with {one['facts'].get('pictures', 0):,} captioned"
                f" pictures: {one['facts'].get('reason', 'not measured')}\n"
                "          (`retriever tune --undo` goes back)\n"
            )
    return ""


@main.command()
@click.option(
    "--seconds",
    type=click.FloatRange(min=1),
    default=60.0,
    help="About how long it may take.",
)
@library_option
@encoder_options
@json_option
@click.pass_context
def bench(
    ctx: click.Context,
    seconds: float,
    library_path: Path,
    device: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure how fast this machine is with a library, and say what limits it.

    Nothing is written to the library. If there is none yet, one is made up for the time being.

    \b
    Examples:
      retriever bench
      retriever bench --library photos.lib --seconds 20 --json
    """
    from retriever.bench import measure, render

    is_named = ctx.get_parameter_source("library_path") is not click.core.ParameterSource.DEFAULT
    there_is_one = is_named or library_path.is_dir()
    with Progress("Measuring", "stages") as progress:
        record = measure(
            library_path if there_is_one else None,
            seconds=seconds,
            device=device,
            threads=threads,
            progress=progress,
        )
    if as_json:
        print_json(record)
    else:
        click.echo(render(record))


finding.add_to(main)
serving.add_to(main)
upkeep.add_to(main)


# ── models ───────────────────────────────────────────────────────────────────────────────────────


def _train_options(command: Command) -> Command:
    """An option for each setting of a training run, with its default and its explanation."""
    hints = get_type_hints(TrainConfig)
    choices = {"objective": OBJECTIVES, "text_tower": TEXT_TOWERS, "device": DEVICES}
    for setting in reversed(fields(TrainConfig)):
        kinds = [kind for kind in get_args(hints[setting.name]) if kind is not type(None)]
        kind = kinds[0] if kinds else hints[setting.name]
        command = click.option(
            f"--{setting.name.replace('_', '-')}",
            type=click.Choice(choices[setting.name]) if setting.name in choices else kind,
            is_flag=kind is bool,
            default=setting.default,
            help=setting.metadata["help"],
        )(command)
    return command


def _default_cache() -> str:
    import platformdirs

    return str(platformdirs.user_cache_path("retriever", appauthor=False) / "training")


@main.command()
@click.argument("datasets", nargs=-1, required=True, metavar="DATASET...", type=FOLDER_OR_FILE)
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="The checkpoint's folder.",
)
@click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    default=_default_cache,
    show_default="training in the user's cache folder",
    help="For decoded pictures and features; may be deleted at any time.",
)
@_train_options
@json_option
def train(
    datasets: tuple[Path, ...], output: Path, cache: Path, as_json: bool, **settings: Any
) -> None:
    """Train a dual encoder on captioned pictures.

    A DATASET is a folder of pictures with captions, or a captions file beside its pictures, for
    captions besides those that the folder is read with.

    \b
    Examples:
      retriever train pairs -o my.ckpt
      retriever train flickr8k more-pairs -o my.ckpt --objective siglip --epochs 30
    """
    config = TrainConfig(**settings)
    try:
        from retriever.training import train as run_training
    except ModuleNotFoundError as exc:
        raise MissingExtraError("Training", "models") from exc

    if_interrupted(
        f"Finished epochs are kept in {shown(output)}.partial; the same command goes on from there."
    )
    with Progress("Training", "steps") as progress:
        epochs: list[int] = []

        def on_epoch(epoch: "EpochLog") -> None:
            progress.clear()
            if as_json:
                print_json(asdict(epoch))
                return
            if not epochs:
                click.echo(_EPOCH_HEADER)
            epochs.append(epoch.epoch)
            click.echo(_epoch_row(epoch))

        log = run_training(
            datasets,
            output,
            config,
            cache=cache,
            on_epoch=on_epoch,
            progress=progress,
            warn=warn,
        )
    best = max(log, key=lambda entry: entry["metrics"]["rsum"])
    if not as_json:
        click.echo(
            f"{shown(output)}: epoch {best['epoch'] + 1}, held-out rSum"
            f" {best['metrics']['rsum']:.1f}; to use it: --model {shown(output)}"
        )


_EPOCH_HEADER = (
    f"{'epoch':>5} {'loss':>7}  {'t2i R@1/5/10':^16}  {'i2t R@1/5/10':^16} {'rSum':>6}"
    f" {'align':>6} {'uniform':>7} {'gap':>5} {'time':>11}"
)


def _epoch_row(epoch: "EpochLog") -> str:
    recalls = [
        "/".join(f"{epoch.metrics[f'{direction}_r@{k}']:.1f}" for k in (1, 5, 10))
        for direction in ("t2i", "i2t")
    ]
    return (
        f"{epoch.epoch + 1:>5} {epoch.loss:>7.4f}  {recalls[0]:^16}  {recalls[1]:^16}"
        f" {epoch.metrics['rsum']:>6.1f} {epoch.alignment:>6.3f} {epoch.uniformity:>7.3f}"
        f" {epoch.modality_gap:>5.2f} {duration(epoch.seconds):>11}"
    )


@main.command()
@click.argument("dataset", type=FOLDER)
@click.option("--split", show_default="test where there are splits", help="The gallery; or: all.")
@model_option(DEFAULT_MODEL, "The model to measure; see `retriever models`.")
@click.option("--captions", type=FILE, help="A captions file, read instead of those in DATASET.")
@click.option(
    "--captions-per-picture",
    type=click.IntRange(min=1),
    show_default="all",
    help="Use the first so many of each picture.",
)
@click.option("--folds", type=click.IntRange(min=1), default=1, help="Mean of so many galleries.")
@click.option("--through-index", is_flag=True, help="Measure the FAISS index as well.")
@click.option(
    "--per-query",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the rank of every query to this file, one JSON object a line.",
)
@click.option("--seed", default=0, help="Of the bootstrap.")
@encoder_options
@json_option
def evaluate(
    dataset: Path,
    split: str | None,
    model: str,
    captions: Path | None,
    captions_per_picture: int | None,
    folds: int,
    through_index: bool,
    per_query: Path | None,
    seed: int,
    device: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure recall@k of a model on captioned pictures.

    \b
    Examples:
      retriever evaluate flickr8k --split test
      retriever evaluate photos --model my.ckpt --through-index --json
    """
    from retriever.encoders import load_encoder
    from retriever.evaluation import evaluate as measure
    from retriever.evaluation import render

    with Progress("Encoding", "pictures and captions") as progress:
        record = measure(
            dataset,
            encoder=load_encoder(model, device=device, threads=threads),
            split=split,
            captions=captions,
            captions_per_picture=captions_per_picture,
            folds=folds,
            through_index=through_index,
            per_query=per_query is not None,
            seed=seed,
            progress=progress,
        )
    ranks = record.pop("per_query", {})
    if per_query:
        with per_query.open("w", encoding="utf-8") as file:
            for direction, queries in ranks.items():
                file.writelines(json.dumps({"query": direction} | one) + "\n" for one in queries)
    if as_json:
        print_json(record)
    else:
        click.echo(render(record))
    for problem in record["dataset"]["problems"]:
        warn(problem)
    if record["dataset"]["excluded"]:
        click.get_current_context().exit(SOME_FILES_FAILED)


@main.group(invoke_without_command=True)
@click.option("--folder", type=FOLDER, help="Look here for checkpoints and prepared models too.")
@click.option("--use", metavar="NAME", help="Make a model of the library its default.")
@click.option("--drop", metavar="NAME", help="Forget what a model has embedded in the library.")
@library_option
@json_option
@click.pass_context
def models(
    ctx: click.Context,
    folder: Path | None,
    use: str | None,
    drop: str | None,
    library_path: Path,
    as_json: bool,
) -> None:
    """List the models that can be used, prepare one, or choose among those of a library.

    \b
    Examples:
      retriever models
      retriever models --folder checkpoints --json
      retriever models --library photos.lib --use ViT-B-32/openai --drop mini
    """
    if ctx.invoked_subcommand is not None:
        return
    if use or drop:
        _choose_models(library_path, use, drop)
        return
    from retriever.models import list_models

    found = list_models(folder=folder)
    if as_json:
        for model in found:
            print_json(asdict(model) | {"recall": {k: dict(v) for k, v in model.recall.items()}})
    else:
        click.echo(_models_table(found))


def _choose_models(path: Path, use: str | None, drop: str | None) -> None:
    with open_library(path) as library:
        if use:
            chosen = library.use_model(use)
            click.echo(f"{chosen.spec.name} is the default model of {shown(library.path)}")
            if chosen.pending:
                warn(
                    f"{chosen.pending:,} pictures are not embedded by it yet:"
                    f" retriever index --model {use}"
                )
        if drop:
            for one in library.drop_model(drop):
                count = one.pictures + one.captions
                click.echo(f"{count:,} embeddings of {one.spec.name} are forgotten")


def _models_table(models: list["ModelInfo"]) -> str:
    sets = list(dict.fromkeys(data for model in models for data in model.recall))
    width = max(len(model.name) for model in models) + 1
    head = f"  {'':<{width}}{'kind':<11}{'dim':>5}{'MB':>8}  {'on disk':<8}"
    lines = [head + "".join(f"{data:>14}" for data in sets).rstrip()]
    for model in models:
        on_disk = "prepared" if model.prepared else "yes" if model.on_disk else "no"
        row = f"{'*' if model.default else ' '} {model.name:<{width}}{model.kind:<11}"
        row += f"{model.dim:>5}{model.size_mb:>8,.0f}  {on_disk:<8}"
        for data in sets:
            recall = model.recall.get(data, {})
            both = [recall.get(name) for name in ("t2i_r@1", "i2t_r@1")]
            shown = "/".join("-" if value is None else f"{value:.1f}" for value in both)
            row += f"{shown if recall else '':>14}"
        lines.append(row.rstrip())
    lines += [
        "",
        "* is the default. Recall is R@1 in percent, text to image / image to text, on the test",
        "splits of these sets; --json names who measured it. Models of open_clip are downloaded",
        "when first used and need the extra [models]; other names that open_clip knows work too.",
        "Prepared ones (`retriever models prepare NAME`) start at once and need no torch.",
    ]
    return "\n".join(lines)


@models.command()
@click.argument(
    "checkpoints", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="CHECKPOINT..."
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="The folder for the new checkpoint.",
)
@click.option(
    "--image-size",
    type=click.IntRange(32, 1024),
    help="Pixels that pictures are read at from now on.",
    show_default="as in training",
)
@click.option("--weights", metavar="NUMBERS", help="How much each counts: 1,1,0.5.")
@json_option
def average(
    checkpoints: tuple[Path, ...],
    output: Path,
    image_size: int | None,
    weights: str | None,
    as_json: bool,
) -> None:
    """Make one checkpoint whose weights are the mean of several.

    Trained from the same beginning with different seeds, several are better together than the best
    of them, and no slower.

    \b
    Examples:
      retriever models average seed0.ckpt seed1.ckpt seed2.ckpt -o mean.ckpt
      retriever models average seed*.ckpt -o mean.ckpt --image-size 256
      retriever models average tuned.ckpt before.ckpt -o mean.ckpt --weights 1,0.2
    """
    from retriever.checkpoints import average_checkpoints, refuse_other_files, save_checkpoint

    refuse_other_files(output)
    try:
        shares = [float(one) for one in weights.split(",")] if weights else None
    except ValueError as error:
        raise UsageError(f"--weights {weights}: numbers with commas between them") from error
    model, tokenizer = average_checkpoints(checkpoints, weights=shares, image_size=image_size)
    save_checkpoint(output, model, tokenizer, {})
    if as_json:
        print_json({"folder": str(output), "checkpoints": [*map(str, checkpoints)]})
    else:
        click.echo(f"the mean of {len(checkpoints)} checkpoints is in {shown(output)}")


@models.command()
@click.argument("name")
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="The folder for the ONNX files; a checkpoint needs one.",
    show_default="for a model of open_clip, where its name finds it",
)
@click.option(
    "--float16",
    is_flag=True,
    help="Weights of 16 bits: twice the size of a checkpoint's 8, half that of open_clip's 32.",
)
@click.option(
    "--check", type=FOLDER, help="Compare recall on these captioned pictures with torch's as well."
)
@json_option
def prepare(
    name: str, output: Path | None, float16: bool, check: Path | None, as_json: bool
) -> None:
    """Export a model to ONNX files that run without torch, checked against it.

    NAME is a model of open_clip (ARCH/TAG, ARCH/FILE or a folder), which is then used by the same
    name, or a checkpoint of ours.

    \b
    Examples:
      retriever models prepare ViT-B-32/laion2b_s34b_b79k
      retriever models prepare ViT-B-32/weights.safetensors --check photos/captioned
      retriever models prepare my.ckpt -o my-model
    """
    from retriever import prepare as preparing

    checking = preparing.recall_check(check) if check else None
    if preparing.is_checkpoint(name):
        from retriever.export import export_onnx

        if output is None:
            raise click.UsageError("Say where to with -o: a checkpoint is not found by its name.")
        report = export_onnx(Path(name).expanduser(), output, int8=not float16, check=checking)
        used = shown(output)
    else:
        report = preparing.prepare(name, output, float16=float16, check=checking)
        used = name if output is None else shown(output)
    if as_json:
        print_json(asdict(report) | {"folder": str(report.folder)})
        return
    error = max(report.image_cosine_error, report.text_cosine_error)
    click.echo(
        f"{shown(report.folder)}: {report.size_bytes / 1e6:.1f} MB (pictures"
        f" {report.image_bytes / 1e6:.1f}, texts {report.text_bytes / 1e6:.1f}, tokenizer"
        f" {report.tokenizer_bytes / 1e6:.1f}), cosine to torch at least {1 - error:.4f};"
        f" to use it: --model {used}"
    )


@main.command()
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    show_default="a new one for temporary files",
    help="Where photographs, library and contact sheet go.",
)
@encoder_options
def demo(folder: Path | None, device: str, threads: int | None) -> None:
    """Try everything on a small library of real photographs.

    \b
    Examples:
      retriever demo
      retriever demo --folder demo
    """
    from retriever import demo as tour

    place = tour.build(folder)
    if_interrupted(f"The same command with --folder {shown(place.folder)} goes on from there.")
    with open_or_create(place.library, device, threads, None) as library:
        with Progress("Indexing", "pictures") as progress:
            library.index(place.pictures, progress=progress)
        count = library.info()["items"]
        click.echo(f"{count} photographs of scikit-image are indexed in {shown(library.path)}\n")
        answers = tour.tour(library, place.query, place.folder / "why")
    click.echo(tour.render(answers))
    sheet = place.folder / "contact-sheet.html"
    sheet.write_text(tour.contact_sheet(answers, place.pictures), encoding="utf-8")
    click.echo('\nWith pictures of your own: retriever index ~/Pictures; retriever search "a cat"')
    click.echo(f"To look at: {shown(sheet.resolve())}")


if __name__ == "__main__":
    main()
