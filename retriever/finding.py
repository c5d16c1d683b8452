"""Commands that ask a library: `search` for pictures, `caption` for captions."""

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from retriever.errors import UsageError, plain
from retriever.terminal import (
    FILE,
    Command,
    Progress,
    encoder_options,
    json_option,
    library_option,
    model_option,
    open_library,
    print_json,
    shown,
    warn,
)

if TYPE_CHECKING:
    from retriever.asking import Query
    from retriever.channels import Mode
    from retriever.explain import Explanation
    from retriever.library import Library
    from retriever.search import Answer, Hit

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
    paths: bool,
    null: bool,
    where: str | None,
    exact: bool,
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
    query = _query(words, image, text_weight, image_weight, without)
    reasons: Sequence[Explanation | None]
    with open_library(library_path, device, threads, model) as library:
        answer = library.search(
            query,
            where=where,
            mode=mode,
            k=k,
            exact=exact,
            all=all_,
            min_confidence=min_confidence,
        )
        reasons = _reasons(library, query, answer) if explain else [None] * len(answer)
        if heat_maps:
            _write_heat_maps(library, query, answer, heat_maps)
        _warn_of_gaps(library)
    for note in answer.notes:
        click.echo(note, err=True)
    if answer.is_match is False and answer:
        from retriever.search import NO_MATCH

        click.echo(NO_MATCH, err=True)
    for hit, reason in zip(answer, reasons, strict=True):
        if paths:
            # The very bytes, for the next program.
            click.echo(os.fsencode(hit.path) + (b"\0" if null else b"\n"), nl=False)
        elif as_json:
            print_json(_record(hit) | ({"explain": reason.as_json()} if reason else {}))
        else:
            _print_hit(hit, reason)
    if not answer and not answer.notes:
        if min_confidence:
            click.echo(f"No answer is as sure as {100 * min_confidence:.0f} %.", err=True)
        else:
            _say_if_empty(library_path, "pictures", bool(where or query.without))


def _query(
    words: str,
    images: Sequence[Path],
    text_weight: float,
    image_weight: float,
    without: Sequence[str],
) -> "Query":
    from retriever.asking import Query, parse, picture

    query = parse(words) if words else Query()
    return replace(
        query,
        texts=tuple((text, weight * text_weight) for text, weight in query.texts),
        images=(*query.images, *((path, image_weight) for path in images)),
        without=(*query.without, *(picture(one) or one for one in without)),
    )


def _record(hit: "Hit") -> dict[str, Any]:
    return {
        "rank": hit.rank,
        "score": round(hit.score, 6),
        "confidence": None if hit.confidence is None else round(hit.confidence, 4),
        "path": str(hit.path),
        "caption": hit.caption,
        "id": hit.item_id,
        "duplicates": hit.duplicates,
    }


def _print_hit(hit: "Hit", reason: "Explanation | None") -> None:
    sure = "" if hit.confidence is None else f"  {_percent(hit.confidence):>5}"
    more = f"  (and {hit.duplicates} like it)" if hit.duplicates else ""
    click.echo(f"{hit.rank:>3}{sure}  {hit.score:.3f}  {shown(hit.path)}{more}")
    indent = " " * (12 + len(sure))
    if hit.caption:
        click.echo(f"{indent}{plain(hit.caption)}")
    for line in reason.lines() if reason else ():
        click.echo(f"{indent}· {plain(line)}")


def _percent(share: float) -> str:
    """A confidence for people, who should not be told that anything is certain."""
    percent = round(100 * share)
    return "<1 %" if percent < 1 else ">99 %" if percent > 99 else f"{percent} %"


def _reasons(library: "Library", query: "Query", answer: "Answer") -> "list[Explanation]":
    from retriever.explain import explain

    searcher = library.searcher
    return explain(answer, query, answer.mode, searcher.channels, searcher.calibration())


def _write_heat_maps(library: "Library", query: "Query", answer: "Answer", folder: Path) -> None:
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
    with open_library(library_path, device, threads, model) as library:
        hits = library.captions_for(picture, where=where, k=k, exact=exact)
        _warn_of_gaps(library)
    for hit in hits:
        if as_json:
            print_json(
                {
                    "rank": hit.rank,
                    "score": round(hit.score, 6),
                    "caption": hit.caption,
                    "path": str(hit.path),
                    "id": hit.item_id,
                }
            )
        else:
            click.echo(f"{hit.rank:>3}  {hit.score:.3f}  {plain(hit.caption)}")
            click.echo(f"            {shown(hit.path)}")
    if not hits:
        _say_if_empty(library_path, "captions", where is not None)


def _warn_of_gaps(library: "Library") -> None:
    """Says what an answer leaves out."""
    name = library.model.name
    if count := library.pending:
        warn(f"{count:,} pictures are not embedded by {name} yet: retriever index --model {name}")


def _say_if_empty(library: Path, what: str, is_narrowed: bool) -> None:
    """Says why there is no answer, and the way out."""
    if is_narrowed:
        click.echo(f"No {what} in {shown(library)} fulfil all that was asked for.", err=True)
        return
    way_out = "`retriever index FOLDER` takes them in"
    if what == "captions":
        way_out = "`retriever index FOLDER --captions FILE` names them"
    click.echo(f"There are no {what} in the library: {way_out}.", err=True)
