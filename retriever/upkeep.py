"""Commands that look after a library: folders, checks, copies, ways in and out."""

import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from retriever.errors import UsageError
from retriever.terminal import (
    FOLDER,
    SOME_FILES_FAILED,
    ByteSize,
    Commands,
    Progress,
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
    from retriever.duplicates import Member
    from retriever.exchange import ImportReport
    from retriever.ingest import IndexReport
    from retriever.library import Library
    from retriever.tuning import TuneReport

ANY_PATH = click.Path(path_type=Path)
ALL_OR_NOTHING = "Either all of it is forgotten or nothing: `retriever roots` counts the pictures."


def add_to(main: click.Group) -> None:
    """Adds these commands to the program."""
    for command in (
        *(remove, roots, watch, verify, repair, compact, optimize, tune, backup),
        *(duplicates, export, import_, merge),
    ):
        main.add_command(command)


@click.command()
@click.argument("paths", nargs=-1, required=True, type=ANY_PATH)
@library_option
@json_option
def remove(paths: tuple[Path, ...], library_path: Path, as_json: bool) -> None:
    """Forget pictures, or all in a folder; no file is deleted.

    The next `retriever index` of their folder takes them in again, as long as the files are there.

    \b
    Examples:
      retriever remove ~/Pictures/blurred.jpg
      retriever remove ~/Pictures/2019 ~/Pictures/2020
    """
    with open_library(library_path) as library:
        if_interrupted(ALL_OR_NOTHING)
        removed = library.remove(paths)
    if as_json:
        print_json({"removed": removed})
    else:
        click.echo(f"{removed:,} removed from {shown(library.path)}")


# ── folders ──────────────────────────────────────────────────────────────────────────────────────


@click.group(cls=Commands, invoke_without_command=True)
@library_option
@json_option
@click.pass_context
def roots(ctx: click.Context, library_path: Path, as_json: bool) -> None:
    """List the folders of a library, or add, forget or relocate one.

    \b
    Examples:
      retriever roots
      retriever roots --library photos.lib --json
    """
    ctx.obj = library_path
    if ctx.invoked_subcommand is not None:
        return
    with open_library(library_path) as library:
        found = library.roots()
    for root in found:
        when = root.indexed_at
        is_there = root.path.is_dir()
        if as_json:
            print_json(
                {
                    "path": str(root.path),
                    "pictures": root.items,
                    "failures": root.failures,
                    "indexed_at": when.isoformat() if when else None,
                    "is_there": is_there,
                }
            )
            continue
        note = f"indexed {when.astimezone():%Y-%m-%d %H:%M}" if when else "never indexed as a whole"
        away = "" if is_there else ", not there now"
        click.echo(f"{root.items:>9,} pictures  {shown(root.path)} ({note}{away})")
    if not found:
        click.echo("There are no folders in the library: `retriever index FOLDER`.", err=True)


@roots.command("add")
@click.argument("folder", type=FOLDER)
@click.pass_obj
def add_root(library_path: Path, folder: Path) -> None:
    """Have `retriever index`, without a folder, look at FOLDER too.

    \b
    Examples:
      retriever roots add ~/Pictures
      retriever roots --library photos.lib add /mnt/nas/photos
    """
    with open_or_create(library_path, "auto", None, None) as library:
        library.add_root(folder)
    click.echo(f"{shown(folder)} is added; `retriever index` takes its pictures in")


@roots.command("forget")
@click.argument("folder", type=ANY_PATH)
@click.pass_obj
def forget_root(library_path: Path, folder: Path) -> None:
    """Forget FOLDER with all its pictures; no file is deleted.

    \b
    Examples:
      retriever roots forget ~/Pictures
      retriever roots forget /mnt/lost-drive
    """
    with open_library(library_path) as library:
        if_interrupted(ALL_OR_NOTHING)
        removed = library.forget_root(folder)
        click.echo(f"{removed:,} pictures of {shown(folder)} are forgotten")


@roots.command()
@click.argument("old", type=ANY_PATH)
@click.argument("new", type=ANY_PATH)
@click.pass_obj
def relocate(library_path: Path, old: Path, new: Path) -> None:
    """Look for the pictures of OLD in NEW; nothing is encoded again.

    \b
    Examples:
      retriever roots relocate /media/usb0/photos /mnt/photos
      retriever roots relocate /home/ann /Users/ann
    """
    with open_library(library_path) as library:
        count = library.relocate(old, new)
    click.echo(f"{count:,} pictures are known in {shown(new)} now")


@click.command()
@click.argument("folders", nargs=-1, metavar="[FOLDER]...", type=FOLDER)
@click.option("--polling", is_flag=True, help="Look again and again: for network drives.")
@model_option(None, "One of the library's models.", show_default="its default one")
@library_option
@encoder_options
@json_option
def watch(
    folders: tuple[Path, ...],
    polling: bool,
    model: str | None,
    library_path: Path,
    device: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Keep a library up to date as files in its folders change, until Ctrl-C.

    \b
    Examples:
      retriever watch
      retriever watch ~/Pictures --polling
    """
    from retriever.watch import watch as keep_up

    if folders:
        library = open_or_create(library_path, device, threads, model)
    else:
        library = open_library(library_path, device, threads, model)
    stop = threading.Event()

    def on_report(folder: Path, report: "IndexReport") -> None:
        if not as_json:
            click.echo(f"{time.strftime('%H:%M:%S')}  {shown(folder)}: ", nl=False)
        print_index_report(report, library, 0.0, as_json)

    with library, stopping(stop.set) as caught:
        if not as_json:
            click.echo(f"Watching for {shown(library.path)}; Ctrl-C ends it.", err=True)
        keep_up(library, folders or None, on_report=on_report, stop=stop, polling=polling)
    click.get_current_context().exit(128 + caught() if caught() else 0)


# ── checks and copies ────────────────────────────────────────────────────────────────────────────


@click.command()
@click.option(
    "--sample",
    type=click.IntRange(min=0),
    default=16,
    help="Pictures and captions to encode again; 0 needs no model.",
)
@library_option
@encoder_options
@json_option
def verify(
    sample: int, library_path: Path, device: str, threads: int | None, as_json: bool
) -> None:
    """Check everything about a library; exit 1 if something is wrong.

    \b
    Examples:
      retriever verify
      retriever verify --library photos.lib --json
    """
    notes: list[str] = []
    with open_library(library_path, device, threads) as library:
        problems = library.verify(sample=sample, notes=notes)
    if as_json:
        print_json({"clean": not problems, "problems": problems, "notes": notes})
    else:
        click.echo("\n".join(problems) if problems else f"No problems in {shown(library.path)}")
        for note in notes:
            warn(note)
    if problems:
        if not as_json:
            click.echo("`retriever repair` mends a library's files.", err=True)
        click.get_current_context().exit(1)


@click.command()
@library_option
@json_option
def repair(library_path: Path, as_json: bool) -> None:
    """Mend a library, even one that cannot be opened, and say what was done.

    What is lost is marked, and the next `retriever index` reads those pictures again. A damaged
    catalogue is kept beside the new one.

    \b
    Examples:
      retriever repair
      retriever repair --library photos.lib --json
    """
    from retriever.library import Library

    if_interrupted("The library is as it was or mended; the same command goes on from there.")
    done = Library.repair(library_path)
    if as_json:
        print_json({"done": done})
    else:
        click.echo("\n".join(done) if done else f"Nothing to mend in {shown(library_path)}")


@click.command()
@library_option
@json_option
def compact(library_path: Path, as_json: bool) -> None:
    """Give the space of what was removed back to the disk.

    \b
    Examples:
      retriever compact
      retriever compact --library photos.lib --json
    """
    with open_library(library_path) as library:
        if_interrupted("Nothing is lost; the same command starts anew.")
        before, after = library.compact()
    if as_json:
        print_json({"bytes_before": before, "bytes_after": after})
    else:
        click.echo(f"{before / 1e6:,.1f} MB before, {after / 1e6:,.1f} MB now")


@click.command()
@click.option("--memory", type=ByteSize(), help="What an index may take, such as 2GB.")
@click.option(
    "--overlap",
    type=click.FloatRange(0, 1, min_open=True),
    show_default="0.99",
    help="Least share of the exact 10 best that must be found, on average.",
)
@click.option("--exact", is_flag=True, help="Search exactly, whatever the size.")
@model_option(None, "One of the library's models.", show_default="its default one")
@library_option
@encoder_options
@json_option
def optimize(
    memory: int | None,
    overlap: float | None,
    exact: bool,
    model: str | None,
    library_path: Path,
    device: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Decide how a library is searched, and measure it.

    While an exact search takes milliseconds nothing is built. A larger library gets an approximate
    index, as it does at the end of `index`: tuned with its own captions and pictures, used only
    where it finds what --overlap asks for, and sooner. It is of one model's vectors. What is said
    here holds for all of them from now on; without options the library decides.

    \b
    Examples:
      retriever optimize
      retriever optimize --memory 2GB --overlap 0.995
      retriever optimize --exact
    """
    with open_library(library_path, device, threads, model) as library, stopping() as stop:
        if_interrupted("Searches go on as before; the same command starts anew.")
        with Progress("Optimising", "vectors") as progress:
            built = library.optimize(
                exact=exact,
                memory_bytes=memory,
                progress=progress,
                **({} if overlap is None else {"overlap": overlap}),
                stop=lambda: bool(stop()),
            )
        index = library.info()["index"]
    if as_json:
        print_json({"built": built, "index": index})
    else:
        click.echo("\n".join(index_lines(index)))
    if stop():
        click.echo("Interrupted. Searches go on as before.", err=True)
        click.get_current_context().exit(128 + stop())


@click.command()
@click.option("--dry-run", is_flag=True, help="Only measure what it would bring.")
@click.option("--undo", is_flag=True, help="Go back to the space that the library was tuned from.")
@library_option
@encoder_options
@json_option
def tune(
    dry_run: bool,
    undo: bool,
    library_path: Path,
    device: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Fit the space in which a library is searched to its own captioned pictures.

    Two small maps are trained over the stored embeddings and measured with captions that were held
    out; then a correction for hubs, pictures that come up for everything. The library takes up
    either only if held-out captions find more, beyond what chance explains; otherwise nothing is
    changed. No picture is opened again, and the former embeddings stay. It takes minutes at most.

    \b
    Examples:
      retriever tune --dry-run
      retriever tune
      retriever tune --undo
    """
    with open_library(library_path, device, threads) as library, stopping() as stop:
        if undo:
            _undo_tuning(library, as_json)
            return
        if_interrupted("Nothing was changed.")
        with Progress("Tuning", "epochs") as progress, Progress("Adopting", "embeddings") as more:
            report = library.tune(
                dry_run=dry_run, progress=progress, adopting=more, stop=lambda: bool(stop())
            )
        if report is not None:
            _print_tuning(report, library, dry_run, as_json)
    if report is None:
        click.echo("Interrupted. Nothing was changed.", err=True)
        click.get_current_context().exit(128 + stop())


def _undo_tuning(library: "Library", as_json: bool) -> None:
    model = library.untune()
    if as_json:
        print_json({"undone": True, "model": asdict(model), "library": str(library.path)})
    else:
        click.echo(f"{shown(library.path)} is searched by {model.name} again, as it was before")


def _print_tuning(report: "TuneReport", library: "Library", is_dry: bool, as_json: bool) -> None:
    if as_json:
        record = asdict(report)
        measured = record.pop("measured")
        print_json(record | {"dry_run": is_dry, "library": str(library.path)} | measured)
        return
    from retriever.tuning import render

    if table := render(report.measured):
        click.echo(f"{table}\n")
    if report.adopted:
        outcome = f"{shown(library.path)} is searched by {library.model.name} from now on"
        outcome += " (`retriever tune --undo` goes back)"
    elif report.is_better:
        outcome = "it would be adopted; nothing was changed"
    else:
        outcome = "nothing was changed"
    click.echo(f"{report.reason[0].upper()}{report.reason[1:]}: {outcome}.")


@click.command()
@click.argument("destination", type=ANY_PATH)
@library_option
def backup(destination: Path, library_path: Path) -> None:
    """Copy a library to the new folder DESTINATION while others read and write it.

    \b
    Examples:
      retriever backup /mnt/usb/photos.lib
      retriever backup photos-2026-11.lib --library photos.lib
    """
    with open_library(library_path) as library:
        if_interrupted(f"{shown(destination)} was not made.")
        library.backup(destination)
    click.echo(f"{shown(library.path)} is copied to {shown(destination)}")


@click.command()
@click.option("--copies", is_flag=True, help="Only files with the same contents.")
@model_option(None, "One of the library's models.", show_default="its default one")
@library_option
@json_option
def duplicates(copies: bool, model: str | None, library_path: Path, as_json: bool) -> None:
    """List pictures that are there several times; nothing is deleted.

    Besides copies these are pictures saved anew, in another size or format, or slightly cropped.
    The largest of each group comes first, then the others with how much they resemble it: the
    cosine of their embeddings.

    \b
    Examples:
      retriever duplicates
      retriever duplicates --copies --json
    """
    with (
        open_library(library_path, model=model) as library,
        Progress("Comparing", "pictures") as progress,
    ):
        found = library.duplicates(copies=copies, progress=progress)
    for number, group in enumerate(found.groups, start=1):
        if as_json:
            print_json({"group": number, "pictures": [_member(one) for one in group]})
            continue
        click.echo(f"Group {number}")
        for place, one in enumerate(group):
            how = "copy" if one.is_copy else f"{one.similarity:.3f}"
            size = f"{one.item.width} x {one.item.height}"
            told = f"{how if place else '':>7}  {size:>13}  {one.item.size / 1e6:>8,.2f} MB"
            click.echo(f"{told}  {shown(one.item.path)}")
    if not as_json:
        click.echo(
            f"Groups: {len(found.groups):,}. Besides the first of each: {found.spare:,} pictures,"
            f" {found.spare_bytes / 1e6:,.1f} MB. Nothing was deleted."
            if found.groups
            else f"No duplicates in {shown(library.path)}"
        )
    if found.unhashed:
        warn(
            f"{found.unhashed:,} pictures were indexed by an older version, and only their copies"
            " were found: `retriever index` reads what is missing"
        )


def _member(one: "Member") -> dict[str, object]:
    return {
        "path": str(one.item.path),
        "id": one.item.item_id,
        "width": one.item.width,
        "height": one.item.height,
        "size_bytes": one.item.size,
        "similarity": round(one.similarity, 6),
        "is_copy": one.is_copy,
    }


# ── ways in and out ──────────────────────────────────────────────────────────────────────────────


@click.command()
@click.argument("destination", type=ANY_PATH)
@model_option(None, "One of the library's models.", show_default="its default one")
@library_option
@json_option
def export(destination: Path, model: str | None, library_path: Path, as_json: bool) -> None:
    """Write a library to the new folder DESTINATION as NDJSON and npy, for any program.

    \b
    Examples:
      retriever export everything
      retriever export everything --library photos.lib --json
    """
    with open_library(library_path, model=model) as library:
        if_interrupted(f"{shown(destination)} was not made.")
        with Progress("Exporting", "pictures") as progress:
            report = library.export(destination, progress=progress)
    if as_json:
        print_json(asdict(report) | {"folder": str(report.folder)})
    else:
        click.echo(
            f"{report.items:,} pictures and {report.captions:,} captions,"
            f" {report.size_bytes / 1e6:,.1f} MB: {shown(report.folder)}"
        )


@click.command("import")
@click.argument("source", type=FOLDER)
@click.option(
    "--pictures",
    type=FOLDER,
    help="Where the pictures of clip-retrieval's embeddings lie, if their paths are relative.",
)
@model_option(None, "The model that made the embeddings.", show_default="the export's, or mini")
@library_option
@encoder_options
@json_option
def import_(
    source: Path,
    pictures: Path | None,
    model: str | None,
    library_path: Path,
    device: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Take in what `retriever export` wrote, or embeddings that clip-retrieval made.

    \b
    Examples:
      retriever import everything
      retriever import embeddings --model ViT-B-32/openai --pictures ~/Pictures
    """
    from retriever.exchange import exported_model

    if (source / "catalogue.sqlite").is_file():
        raise UsageError(f"{shown(source)} is a library: `retriever merge` takes it in")
    if not library_path.is_dir():
        model = model or exported_model(source)
    with open_or_create(library_path, device, threads, model) as library:
        if_interrupted("What was taken in is kept; the same command goes on from there.")
        with Progress("Importing", "pictures") as progress:
            report = library.import_(source, pictures=pictures, progress=progress)
        _print_intake(report, library.path, as_json)


@click.command()
@click.argument("others", nargs=-1, required=True, metavar="OTHER...", type=FOLDER)
@library_option
@json_option
def merge(others: Sequence[Path], library_path: Path, as_json: bool) -> None:
    """Take in what OTHER libraries of the same model hold; they are only read.

    \b
    Examples:
      retriever merge laptop.lib
      retriever merge 2019.lib 2020.lib --library all.lib
    """
    for other in others:
        if (other / "manifest.json").is_file():
            raise UsageError(f"{shown(other)} is an export: `retriever import` takes it in")
    with open_library(others[0]) as first:
        model = first.base_model.name
    is_new = not library_path.is_dir()
    library = (
        open_or_create(library_path, "auto", None, model) if is_new else open_library(library_path)
    )
    with library:
        if_interrupted("What was taken in is kept; the same command goes on from there.")
        for other in others:
            with Progress("Merging", "pictures") as progress:
                report = library.merge(other, progress=progress)
            _print_intake(report, library.path, as_json)


def _print_intake(report: "ImportReport", library: Path, as_json: bool) -> None:
    if as_json:
        skipped = [{"path": str(one.path), "reason": one.reason} for one in report.skipped]
        print_json(asdict(report) | {"skipped": skipped, "library": str(library)})
    else:
        counts = {
            "added": report.added,
            "updated": report.updated,
            "unchanged": report.unchanged,
            "skipped": len(report.skipped),
        }
        told = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
        click.echo(f"{told or 'Nothing there'}: {shown(library)}")
    for one in report.skipped:
        click.echo(f"Skipped: {shown(one.path)}: {one.reason}", err=True)
    if report.skipped:
        click.get_current_context().exit(SOME_FILES_FAILED)
