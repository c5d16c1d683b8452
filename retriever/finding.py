"""Commands that ask a library: `search` for pictures, `caption` for captions."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from retriever.errors import UsageError
from retriever.preview import KINDS
from retriever.replies import Format, Reply, Request, reply
from retriever.terminal import (
    FILE,
    Command,
    Progress,
    encoder_options,
    json_option,
    library_option,
    model_option,
    open_library,
    shown,
    warn,
)

if TYPE_CHECKING:
    from retriever.asking import Query
    from retriever.channels import Mode
    from retriever.library import Library
    from retriever.preview import Kind

PREVIEW_SIDE = 320  # pixels that a picture is made ready from
MODES = ("image", "caption", "words", "hybrid")  # as `retriever.channels`, which imports numpy


def add_to(main: click.Group) -> None:
    """Adds these commands to the program."""
    main.add_command(search)
    main.add_command(caption)


class Percent(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4
    """A share between 0 and 1 as people write it: "60", "60%" or "60 %"."""

    name = "percent"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The share; see `click.ParamType.convert`."""
        if isinstance(value, float):
            return value
        try:
            share = float(str(value).strip().removesuffix("%")) / 100
        except ValueError:
            share = -1.0
        if not 0 <= share <= 1:
            self.fail(f"{value!r} is no percentage from 0 to 100", param, ctx)
        return share


def _answer_options(command: Command) -> Command:
    """What both commands take: which pictures count, how they are looked for, and with what."""
    for option in (
        json_option,
        encoder_options,
        library_option,
        model_option(None, "One of the library's models.", show_default="its default one"),
        click.option("--no-server", is_flag=True, help="Do not ask a running `retriever serve`."),
        click.option("--exact", is_flag=True, help="Look at everything, approximate index or not."),
        click.option(
            "--where",
            metavar="FILTER",
            help='Of these pictures only, such as "taken >= 2024 and width > 2000".',
        ),
    ):
        command = option(command)
    return command


@click.command()
@click.argument("text", nargs=-1)
@click.option("--image", type=FILE, multiple=True, help="A picture to ask with; may be repeated.")
@click.option("-k", type=click.IntRange(min=1), default=10, help="Answers wanted.")
@click.option("--text-weight", type=float, default=1.0, help="Of TEXT, beside --image.")
@click.option("--image-weight", type=float, default=1.0, help="Of each --image, beside TEXT.")
@click.option(
    "--without",
    multiple=True,
    metavar="THING",
    help="Leave out what shows this: a text or a picture file; may be repeated.",
)
@click.option(
    "--mode",
    type=click.Choice(MODES),
    show_default="what measured best in this library, see `retriever info`",
    help="By what pictures are found.",
)
@click.option(
    "--min-confidence",
    type=Percent(),
    metavar="PERCENT",
    help="Leave out answers that are less surely right.",
)
@click.option("--all", "all_", is_flag=True, help="Show near-duplicates of answers as well.")
@click.option("--explain", is_flag=True, help="Say of each answer why it was found.")
@click.option(
    "--heat-maps",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Write there, as PNG, what in each answer fits the query.",
)
@click.option("--preview", is_flag=True, help="Show the pictures, in a terminal that can.")
@click.option(
    "--preview-as",
    type=click.Choice(KINDS),
    show_default="what the terminal understands",
    help="How --preview shows them, whatever it is shown in.",
)
@click.option(
    "--sheet",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write the answers there as a page with thumbnails (HTML).",
)
@click.option("--paths", is_flag=True, help="Print nothing but paths, one a line.")
@click.option("-0", "--null", is_flag=True, help="End each of --paths with a zero byte instead.")
@_answer_options
def search(
    text: tuple[str, ...],
    image: tuple[Path, ...],
    k: int,
    text_weight: float,
    image_weight: float,
    without: tuple[str, ...],
    mode: "Mode | None",
    min_confidence: float | None,
    all_: bool,
    explain: bool,
    heat_maps: Path | None,
    preview: bool,
    preview_as: "Kind | None",
    sheet: Path | None,
    paths: bool,
    null: bool,
    where: str | None,
    exact: bool,
    no_server: bool,
    model: str | None,
    library_path: Path,
    device: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Find pictures by a text, by pictures, or by both.

    TEXT may have parts, each with a weight or the name of a picture file; "words in quotation
    marks" must stand in a picture's captions or name.

    \b
    Examples:
      retriever search "two dogs on the beach"
      retriever search "a dog" --without water --where "taken >= 2024 and width > height"
      retriever search "2:golden retriever + ./pool.jpg - fruit"
      retriever search --image query.jpg -k 3 --paths
    """
    words = " ".join(text).strip()
    if not words and not image:
        raise click.UsageError("Say what to look for: TEXT, --image FILE or both.")
    if null and not paths:
        raise click.UsageError("--null goes with --paths.")
    if not all(map(math.isfinite, (text_weight, image_weight))):
        raise click.UsageError("A weight must be a finite number.")
    if paths and (as_json or explain):
        raise click.UsageError("--paths goes with neither --json nor --explain.")
    is_previewed = preview_as is not None or (preview and sys.stdout.isatty())
    if (preview or preview_as) and (paths or as_json):
        raise click.UsageError("--preview goes with neither --paths nor --json.")
    query = _query(words, image, text_weight, image_weight, without)
    form: Format = "json" if as_json else "null" if null else "paths" if paths else "lines"
    request = Request.of(
        query,
        library_path,
        where=where,
        mode=mode,
        k=k,
        exact=exact,
        all=all_,
        min_confidence=min_confidence,
        explain=explain,
        format=form,
    )
    is_plain = (device, threads, model) == ("auto", None, None)
    is_here = no_server or heat_maps or is_previewed or sheet  # looks at pictures itself
    if is_plain and not is_here and _asked_a_server(request, library_path):
        return
    with open_library(library_path, device, threads, model) as library:
        found = reply(library, request)
        if heat_maps:
            _write_heat_maps(library, query, found.hits, heat_maps)
    if sheet:
        _write_sheet(words or "Pictures like it", found.hits, sheet)
    previews = [_previewed(hit.path, preview_as) for hit in found.hits if is_previewed]
    _say(found.reply, previews)


def _asked_a_server(request: Request, library: Path) -> bool:
    """Whether a running server answered, and its reply was printed.

    What it says of a fault is left alone: here, the same fault is told in the terms of this shell.
    """
    from retriever.running import NotRunningError, ask

    try:
        answer = ask(library, request.as_json())
        said = Reply.from_json(answer["reply"])
    except (NotRunningError, KeyError, TypeError, ValueError):
        return False
    _say(said)
    return True


def _say(said: Reply, previews: Sequence[bytes] = ()) -> None:
    for line in said.told:
        click.echo(line, err=True)
    if said.raw:
        click.echo(said.raw, nl=False)
    for number, lines in enumerate(said.groups):
        for line in lines:
            click.echo(line)
        if previews:
            click.echo(previews[number] + b"\n")
    if said.empty:
        click.echo(said.empty, err=True)


def _query(
    words: str,
    images: Sequence[Path],
    text_weight: float,
    image_weight: float,
    without: Sequence[str],
) -> "Query":
    from retriever.asking import Query, parse, picture

    query = parse(words) if words else Query()
    return query.beside(
        [(path, image_weight) for path in images],
        [picture(one) or one for one in without],
        text_weight=text_weight,
    )


def _previewed(path: Path, kind: "Kind | None") -> bytes:
    from retriever.data import read_image
    from retriever.errors import PictureError
    from retriever.preview import render

    try:
        return render(read_image(path, target=PREVIEW_SIDE).image, kind)
    except PictureError as exc:
        return str(exc).encode(errors="backslashreplace")


def _write_sheet(question: str, answer: "Any", sheet: Path) -> None:
    from retriever.sheets import answer_sheet

    try:
        sheet.write_text(answer_sheet(question, answer), encoding="utf-8")
    except OSError as exc:
        raise UsageError(f"{shown(sheet)} cannot be written: {exc.strerror or exc}") from exc
    click.echo(f"The contact sheet is {shown(sheet)}", err=True)


def _write_heat_maps(
    library: "Library", query: "Query", answer: "Sequence[Any]", folder: Path
) -> None:
    from retriever.explain import write_heat_maps

    row = library.searcher.channels(query).row
    assert row is not None, "a query that is compared with pictures has one"
    notes: list[str] = []
    try:
        with Progress("Explaining", "pictures") as progress:
            written = write_heat_maps(
                library.encoder, row, answer, folder, notes=notes, progress=progress
            )
    except OSError as exc:
        raise UsageError(f"{shown(folder)} cannot be written: {exc.strerror or exc}") from exc
    for note in notes:
        warn(note)
    click.echo(f"{len(written)} heat maps are in {shown(folder)}", err=True)


@click.command()
@click.argument("picture", type=FILE)
@click.option("-k", type=click.IntRange(min=1), default=5, help="Answers wanted.")
@_answer_options
def caption(
    picture: Path,
    k: int,
    where: str | None,
    exact: bool,
    no_server: bool,
    model: str | None,
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
    query = _query("", (picture,), 1.0, 1.0, ())
    form: Format = "json" if as_json else "lines"
    request = Request.of(
        query, library_path, captions=True, where=where, k=k, exact=exact, format=form
    )
    is_plain = (device, threads, model) == ("auto", None, None)
    if is_plain and not no_server and _asked_a_server(request, library_path):
        return
    with open_library(library_path, device, threads, model) as library:
        found = reply(library, request)
    _say(found.reply)
