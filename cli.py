"""The command `retriever`: each command parses, calls one function and prints.

Results go to stdout, progress and warnings to stderr. Exit status: 0 done, 1 failed, 2 wrong usage,
3 done but some files failed, 130 interrupted. What a command needs is imported inside it, so that
`--help` and a mistyped path are answered at once.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import click

from indexes.errors import StoreError, StoreNotFoundError
from retriever import __version__
from retriever.errors import MissingExtraError, RetrieverError, UsageError
from retriever.models import DEFAULT_MODEL
from retriever.settings import OBJECTIVES, TEXT_TOWERS, TrainConfig

if TYPE_CHECKING:
    from retriever.data import CaptionReport
    from retriever.ingest import IndexReport
    from retriever.library import Library
    from retriever.models import ModelInfo
    from retriever.training import EpochLog

DEVICES = ("auto", "cpu", "cuda", "mps")
SOME_FILES_FAILED = 3
INTERRUPTED = 130
SHOWN_AT_MOST = 20  # unmatched captions and the like; `--json` has them all
STRONGER = (
    "Indexed with the bundled model mini; where a download is possible, stronger answers come with"
    " --model MobileCLIP2-S0/dfndr2b in a new --library (see `retriever models`)."
)

Command = Callable[..., None]


# ── what all commands share ──────────────────────────────────────────────────────────────────────


class _WrongUsage(click.ClickException):
    """A sentence on stderr and exit status 2, as click's own usage errors have."""

    exit_code = 2


class _Commands(click.Group):
    """A group that turns our errors into sentences, and Ctrl-C into what was kept."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UsageError as exc:
            raise _WrongUsage(str(exc)) from exc
        except StoreNotFoundError as exc:
            raise click.ClickException(f"{exc}: make it with `retriever index FOLDER`") from exc
        except (RetrieverError, StoreError) as exc:
            raise click.ClickException(str(exc)) from exc
        except BrokenPipeError:
            raise  # the reader, such as `head`, has had enough; click ends quietly
        except OSError as exc:
            if exc.filename is None:
                raise
            raise click.ClickException(f"{exc.filename}: {exc.strerror}") from exc
        except KeyboardInterrupt:
            # Every writer commits as it goes, so there is nothing to clean up here.
            click.echo(f"\nInterrupted. {ctx.meta.get('kept', 'Nothing was changed.')}", err=True)
            ctx.exit(INTERRUPTED)


def _if_interrupted(kept: str) -> None:
    """Sets what Ctrl-C says from here on."""
    click.get_current_context().meta["kept"] = kept


class _Progress:
    """A bar with rate and time left on stderr, if that is a terminal; called with (done, total)."""

    def __init__(self, doing: str, unit: str) -> None:
        self.doing = doing
        self.unit = unit
        self.stream = sys.stderr
        self.is_shown = self.stream.isatty()
        self.started = self.drawn = 0.0
        self.first = self.last = self.total = -1

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if total != self.total or done < self.last:  # an epoch may follow another
            self.started, self.first, self.total = now, done, total
        self.last = done
        if not self.is_shown or (done < total and now - self.drawn < 0.1):
            return
        self.drawn = now
        self.stream.write(f"\r\x1b[K{self.line(now - self.started)}")
        self.stream.flush()

    def line(self, seconds: float) -> str:
        """The bar as text that fits the terminal."""
        filled = 20 * self.last // max(self.total, 1)
        bar = "#" * filled + "-" * (20 - filled)
        text = f"{self.doing} [{bar}] {self.last:,} of {self.total:,} {self.unit}"
        if self.last > self.first and seconds > 0:
            rate = (self.last - self.first) / seconds
            left = _duration((self.total - self.last) / rate)
            text += f", {rate:.3g}/s, {left} left"
        return text[: shutil.get_terminal_size().columns - 1]

    def clear(self) -> None:
        """Takes the bar away before something else is printed."""
        if self.is_shown:
            self.stream.write("\r\x1b[K")
            self.stream.flush()

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def _print_json(record: Mapping[str, Any]) -> None:
    # ASCII only, so that names that are no UTF-8 pass any pipe and come back as they were.
    click.echo(json.dumps(record))


def _warn(sentence: str) -> None:
    click.echo(f"Warning: {sentence}", err=True)


def _shown(path: str | Path) -> str:
    """A path for people: bytes that are no text become question marks."""
    from retriever.captions import printable

    return printable(path)


def _default_library() -> str:
    import platformdirs

    return str(platformdirs.user_data_path("retriever", appauthor=False) / "default.lib")


def _library_option(command: Command) -> Command:
    return click.option(
        "--library",
        "library_path",
        metavar="PATH",
        type=click.Path(path_type=Path),
        envvar="RETRIEVER_LIBRARY",
        show_envvar=True,
        default=_default_library,
        show_default="default.lib in the user's data folder",
        help="The library's folder.",
    )(command)


def _encoder_options(command: Command) -> Command:
    device = click.option(
        "--device", type=click.Choice(DEVICES), default="auto", help="Where the encoder runs."
    )
    threads = click.option(
        "--threads",
        type=click.IntRange(min=1),
        show_default="as many as the engine likes",
        help="CPU threads of the encoder.",
    )
    return device(threads(command))


def _model_option(default: str | None, help: str, **more: Any) -> Callable[[Command], Command]:
    return click.option("--model", metavar="NAME", default=default, help=help, **more)


_json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON, one object a line."
)
_folder = click.Path(exists=True, file_okay=False, path_type=Path)
_file = click.Path(exists=True, dir_okay=False, path_type=Path)


def _open(path: Path, device: str, threads: int | None, model: str | None = None) -> "Library":
    """The library at `path`; `model`, if given, must be the one that made it."""
    from retriever.library import Library

    if threads is None:
        return Library.open(path, model, device=device)
    from retriever.encoders import load_encoder

    if model is None:
        with Library.open(path) as library:
            model = str(library.info()["model"]["name"])
    return Library.open(path, load_encoder(model, device=device, threads=threads))


def _open_or_create(path: Path, device: str, threads: int | None, model: str | None) -> "Library":
    from retriever.library import Library

    try:
        return _open(path, device, threads, model)
    except StoreNotFoundError:
        library = Library.create(path, model or DEFAULT_MODEL, device=device)
        if threads is None:
            return library
        library.close()
        return _open(path, device, threads, model)


@click.group(
    cls=_Commands,
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
@click.argument("folder", type=_folder)
@click.option("--captions", type=_file, help="A captions file, read instead of those in FOLDER.")
@click.option("--dry-run", is_flag=True, help="Only report which pictures have captions.")
@_model_option(
    None,
    "The model of a new library; see `retriever models`.",
    show_default=DEFAULT_MODEL,
)
@_library_option
@_encoder_options
@_json_option
def index(
    folder: Path,
    captions: Path | None,
    dry_run: bool,
    model: str | None,
    library_path: Path,
    device: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Bring a library up to date with the pictures in FOLDER.

    \b
    Examples:
      retriever index ~/Pictures
      retriever index photos --captions photos/captions.csv --dry-run
    """
    if dry_run:
        _report_captions(folder, captions, as_json)
        return
    started = time.monotonic()
    with _open_or_create(library_path, device, threads, model) as library:
        _if_interrupted(
            f"What was indexed so far is kept in {_shown(library.path)};"
            " the same command goes on from there."
        )
        with _Progress("Indexing", "pictures") as progress:
            report = library.index(folder, captions=captions, progress=progress)
        seconds = time.monotonic() - started
        made_by = library.info()["model"]["name"]
        if as_json:
            record = asdict(report) | {"library": str(library.path), "seconds": round(seconds, 2)}
            record["failed"] = [{"path": str(f.path), "reason": f.reason} for f in report.failed]
            _print_json(record)
        else:
            click.echo(_index_summary(report, library.path, seconds))
    for failure in report.failed:
        click.echo(f"Failed: {_shown(failure.path)}: {failure.reason}", err=True)
    for problem in report.problems:
        _warn(problem)
    if made_by == DEFAULT_MODEL and report.added:
        click.echo(STRONGER, err=True)
    if report.failed:
        click.get_current_context().exit(SOME_FILES_FAILED)


def _index_summary(report: "IndexReport", library: Path, seconds: float) -> str:
    counts = {
        "added": report.added,
        "updated": report.updated,
        "moved": report.moved,
        "removed": report.removed,
        "failed": len(report.failed),
    }
    changes = [f"{count:,} {what}" for what, count in counts.items() if count]
    if report.unchanged or not changes:
        changes.append(f"{report.unchanged:,} unchanged")
    if not (report.added or report.updated or report.moved or report.removed):
        changes.append("nothing to do")
    return f"{', '.join(changes)} in {_duration(seconds)}: {_shown(library)}"


def _report_captions(folder: Path, captions: Path | None, as_json: bool) -> None:
    from retriever.data import read_pairs

    _, report = read_pairs(folder, captions=captions)
    if as_json:
        record = {one.name: getattr(report, one.name) for one in fields(report)}
        _print_json(record | {"by_source": dict(report.by_source)})
        return
    click.echo(_caption_summary(report))
    for problem in report.problems:
        _warn(problem)


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
@click.argument("text", nargs=-1)
@click.option("--image", type=_file, help="A picture to ask with, alone or besides TEXT.")
@click.option("-k", type=click.IntRange(min=1), default=10, help="Answers wanted.")
@click.option("--text-weight", type=float, default=1.0, help="Of TEXT, beside --image.")
@click.option("--image-weight", type=float, default=1.0, help="Of --image, beside TEXT.")
@click.option("--paths", is_flag=True, help="Print nothing but paths, one a line.")
@_library_option
@_encoder_options
@_json_option
def search(
    text: tuple[str, ...],
    image: Path | None,
    k: int,
    text_weight: float,
    image_weight: float,
    paths: bool,
    library_path: Path,
    device: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Find pictures by a text, by a picture, or by both.

    \b
    Examples:
      retriever search "two dogs on the beach"
      retriever search --image query.jpg -k 3 --paths
    """
    words = " ".join(text).strip() or None
    if words is None and image is None:
        raise click.UsageError("Say what to look for: TEXT, --image FILE or both.")
    if paths and as_json:
        raise click.UsageError("--paths and --json exclude each other.")
    with _open(library_path, device, threads) as library:
        hits = library.search(
            words,
            image=image,
            text_weight=text_weight,
            image_weight=image_weight,
            k=k,
        )
    for hit in hits:
        if paths:
            click.echo(os.fsencode(hit.path))  # the very bytes, for the next program
        elif as_json:
            _print_json(
                {
                    "rank": hit.rank,
                    "score": round(hit.score, 6),
                    "path": str(hit.path),
                    "caption": hit.caption,
                    "id": hit.item_id,
                }
            )
        else:
            click.echo(f"{hit.rank:>3}  {hit.score:.3f}  {_shown(hit.path)}")
            if hit.caption:
                click.echo(f"            {hit.caption}")
    _say_if_empty(hits, "pictures", "`retriever index FOLDER` takes them in")


@main.command()
@click.argument("picture", type=_file)
@click.option("-k", type=click.IntRange(min=1), default=5, help="Answers wanted.")
@_library_option
@_encoder_options
@_json_option
def caption(
    picture: Path,
    k: int,
    library_path: Path,
    device: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Find the captions of a library that fit PICTURE best.

    \b
    Examples:
      retriever caption query.jpg
      retriever caption query.jpg -k 1 --json
    """
    with _open(library_path, device, threads) as library:
        hits = library.captions_for(picture, k=k)
    for hit in hits:
        if as_json:
            _print_json(
                {
                    "rank": hit.rank,
                    "score": round(hit.score, 6),
                    "caption": hit.caption,
                    "path": str(hit.path),
                    "id": hit.item_id,
                }
            )
        else:
            click.echo(f"{hit.rank:>3}  {hit.score:.3f}  {hit.caption}")
    _say_if_empty(hits, "captions", "`retriever index FOLDER --captions FILE` names them")


def _say_if_empty(hits: list[Any], what: str, way_out: str) -> None:
    if not hits:
        click.echo(f"There are no {what} in the library: {way_out}.", err=True)


@main.command()
@click.option("--failures", is_flag=True, help="List the pictures that could not be read, and why.")
@_library_option
@_json_option
def info(failures: bool, library_path: Path, as_json: bool) -> None:
    """Show what a library holds and which pictures failed.

    \b
    Examples:
      retriever info
      retriever info --failures --json
    """
    with _open(library_path, "auto", None) as library:
        facts = library.info()
        failed = library.failures() if failures else []
    if failures:
        for one in failed:
            if as_json:
                _print_json({"path": str(one.path), "reason": one.reason})
            else:
                click.echo(f"{_shown(one.path)}: {one.reason}")
        return
    if as_json:
        _print_json(facts)
        return
    unread = facts["failures"]
    note = f", {unread:,} of them could not be read (--failures lists them)" if unread else ""
    model, rows = facts["model"], facts["index"]
    fingerprint = str(model["fingerprint"])[:12]
    click.echo(
        f"Library   {_shown(library.path)}\n"
        f"Model     {model['name']}, {model['dim']} dimensions, fingerprint {fingerprint}\n"
        f"Pictures  {facts['items']:,}{note}\n"
        f"Captions  {facts['captions']:,}\n"
        f"Index     exact, generation {facts['generation']}: "
        f"{rows['image']['rows']:,} picture and {rows['caption']['rows']:,} caption vectors\n"
        f"Size      {facts['size_bytes'] / 1e6:,.1f} MB on disk"
    )


@main.command()
@_library_option
@_json_option
def verify(library_path: Path, as_json: bool) -> None:
    """Check every file of a library; exit 1 if one is wrong.

    \b
    Examples:
      retriever verify
      retriever verify --library photos.lib --json
    """
    with _open(library_path, "auto", None) as library:
        problems = library.verify()
    if as_json:
        _print_json({"clean": not problems, "problems": problems})
    else:
        click.echo("\n".join(problems) if problems else f"No problems in {_shown(library.path)}")
    if problems:
        if not as_json:
            click.echo("`retriever rebuild` makes the index files anew.", err=True)
        click.get_current_context().exit(1)


@main.command()
@_library_option
def rebuild(library_path: Path) -> None:
    """Make a library's index files anew from its catalogue.

    \b
    Examples:
      retriever rebuild
      retriever rebuild --library photos.lib
    """
    with _open(library_path, "auto", None) as library:
        _if_interrupted("The catalogue holds everything; the same command starts anew.")
        library.rebuild()
        click.echo(f"The index files of {_shown(library.path)} were made anew")


@main.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@_library_option
@_json_option
def remove(paths: tuple[Path, ...], library_path: Path, as_json: bool) -> None:
    """Forget pictures, or all in a folder; no file is deleted.

    \b
    Examples:
      retriever remove ~/Pictures/blurred.jpg
      retriever remove ~/Pictures/2019 ~/Pictures/2020
    """
    with _open(library_path, "auto", None) as library:
        removed = library.remove(paths)
    if as_json:
        _print_json({"removed": removed})
    else:
        click.echo(f"{removed:,} removed from {_shown(library.path)}")


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
@click.argument("datasets", nargs=-1, required=True, metavar="DATASET...", type=_folder)
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
@_json_option
def train(
    datasets: tuple[Path, ...], output: Path, cache: Path, as_json: bool, **settings: Any
) -> None:
    """Train a dual encoder on captioned pictures.

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

    _if_interrupted(
        f"Finished epochs are kept in {_shown(output)}.partial;"
        " the same command goes on from there."
    )
    with _Progress("Training", "steps") as progress:
        shown: list[int] = []

        def on_epoch(epoch: "EpochLog") -> None:
            progress.clear()
            if as_json:
                _print_json(asdict(epoch))
                return
            if not shown:
                click.echo(_EPOCH_HEADER)
            shown.append(epoch.epoch)
            click.echo(_epoch_row(epoch))

        log = run_training(
            datasets,
            output,
            config,
            cache=cache,
            on_epoch=on_epoch,
            progress=progress,
            warn=_warn,
        )
    best = max(log, key=lambda entry: entry["metrics"]["rsum"])
    if not as_json:
        click.echo(
            f"{_shown(output)}: epoch {best['epoch'] + 1}, held-out rSum"
            f" {best['metrics']['rsum']:.1f}; to use it: --model {_shown(output)}"
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
        f" {epoch.modality_gap:>5.2f} {_duration(epoch.seconds):>11}"
    )


@main.command()
@click.argument("dataset", type=_folder)
@click.option("--split", show_default="test where there are splits", help="The gallery; or: all.")
@_model_option(DEFAULT_MODEL, "The model to measure; see `retriever models`.")
@click.option("--captions", type=_file, help="A captions file, read instead of those in DATASET.")
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
@_encoder_options
@_json_option
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

    with _Progress("Encoding", "pictures and captions") as progress:
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
        _print_json(record)
    else:
        click.echo(render(record))
    for problem in record["dataset"]["problems"]:
        _warn(problem)
    if record["dataset"]["excluded"]:
        click.get_current_context().exit(SOME_FILES_FAILED)


@main.group(invoke_without_command=True)
@click.option("--folder", type=_folder, help="Look here for checkpoints and prepared models too.")
@_json_option
@click.pass_context
def models(ctx: click.Context, folder: Path | None, as_json: bool) -> None:
    """List the models that can be used, or prepare one.

    \b
    Examples:
      retriever models
      retriever models --folder checkpoints --json
    """
    if ctx.invoked_subcommand is not None:
        return
    from retriever.models import list_models

    found = list_models(folder=folder)
    if as_json:
        for model in found:
            _print_json(asdict(model) | {"recall": {k: dict(v) for k, v in model.recall.items()}})
    else:
        click.echo(_models_table(found))


def _models_table(models: list["ModelInfo"]) -> str:
    sets = list(dict.fromkeys(data for model in models for data in model.recall))
    width = max(len(model.name) for model in models) + 1
    head = f"  {'':<{width}}{'kind':<11}{'dim':>5}{'MB':>8}  {'on disk':<8}"
    lines = [head + "".join(f"{data:>14}" for data in sets).rstrip()]
    for model in models:
        row = f"{'*' if model.default else ' '} {model.name:<{width}}{model.kind:<11}"
        row += f"{model.dim:>5}{model.size_mb:>8,.0f}  {'yes' if model.on_disk else 'no':<8}"
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
    ]
    return "\n".join(lines)


@models.command()
@click.argument("checkpoint", type=_folder)
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="The folder for the two ONNX files; replaced if it is there.",
)
@click.option("--float16", is_flag=True, help="Weights of 16 bits: twice as large as of 8.")
@_json_option
def prepare(checkpoint: Path, output: Path, float16: bool, as_json: bool) -> None:
    """Export CHECKPOINT to two ONNX files, checked against it, that run without torch.

    \b
    Examples:
      retriever models prepare my.ckpt -o my-model
      retriever models prepare my.ckpt -o my-model --float16
    """
    from retriever.export import export_onnx

    report = export_onnx(checkpoint, output, int8=not float16)
    if as_json:
        _print_json(asdict(report) | {"folder": str(output)})
        return
    error = max(report.image_cosine_error, report.text_cosine_error)
    click.echo(
        f"{_shown(output)}: {report.size_bytes / 1e6:.1f} MB (pictures"
        f" {report.image_bytes / 1e6:.1f}, texts {report.text_bytes / 1e6:.1f}, tokenizer"
        f" {report.tokenizer_bytes / 1e6:.1f}), cosine to the checkpoint at least {1 - error:.4f};"
        f" to use it: --model {_shown(output)}"
    )


@main.command()
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    show_default="a new one for temporary files",
    help="Where photographs, library and contact sheet go.",
)
@_encoder_options
def demo(folder: Path | None, device: str, threads: int | None) -> None:
    """Try everything on a small library of real photographs.

    \b
    Examples:
      retriever demo
      retriever demo --folder demo
    """
    from retriever import demo as tour

    place = tour.build(folder)
    _if_interrupted(f"The same command with --folder {_shown(place.folder)} goes on from there.")
    with _open_or_create(place.library, device, threads, None) as library:
        with _Progress("Indexing", "pictures") as progress:
            library.index(place.pictures, progress=progress)
        count = library.info()["items"]
        click.echo(f"{count} photographs of scikit-image are indexed in {_shown(library.path)}\n")
        answers = tour.tour(library, place.query)
    click.echo(tour.render(answers))
    sheet = place.folder / "contact-sheet.html"
    sheet.write_text(tour.contact_sheet(answers, place.pictures), encoding="utf-8")
    click.echo('\nWith pictures of your own: retriever index ~/Pictures; retriever search "a cat"')
    click.echo(f"To look at: {_shown(sheet.resolve())}")


if __name__ == "__main__":
    main()
