"""Commands that answer others: `serve` for people and programs, `mcp` for assistants."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from retriever.errors import MissingExtraError
from retriever.terminal import (
    ByteSize,
    default_library,
    encoder_options,
    library_option,
    open_library,
    shown,
)

if TYPE_CHECKING:
    from retriever.library import Library

PORT = 8765
# Packages of the extra [web].
_NEEDED = {"fastapi", "uvicorn", "starlette", "pydantic", "prometheus_client", "multipart"}


def add_to(main: click.Group) -> None:
    """Adds these commands to the program."""
    main.add_command(serve)
    main.add_command(mcp)


@click.command()
@click.option(
    "--library",
    "library_paths",
    metavar="PATH",
    type=click.Path(path_type=Path),
    multiple=True,
    show_envvar=True,
    envvar="RETRIEVER_LIBRARY",
    show_default="default.lib in the user's data folder",
    help="A library's folder; may be repeated, the first is shown first.",
)
@click.option("--host", default="127.0.0.1", help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=PORT, help="0: any that is free.")
@click.option("--open", "open_", is_flag=True, help="Show the page in a browser.")
@click.option(
    "--token",
    metavar="TEXT",
    envvar="RETRIEVER_TOKEN",
    help="What who asks must show; beyond this machine one is needed, and made up if not given.",
)
@click.option(
    "--allow-host",
    multiple=True,
    metavar="NAME",
    help="A name to be asked for by; may be repeated.",
)
@click.option(
    "--allow-origin",
    multiple=True,
    metavar="ORIGIN",
    help="Another page that may read answers (CORS), such as http://localhost:3000.",
)
@click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    show_default="serve in the user's cache folder",
    help="For thumbnails and maps; may be deleted at any time.",
)
@click.option(
    "--cache-size", type=ByteSize(), default="500MB", help="What thumbnails may take there."
)
@encoder_options
def serve(
    library_paths: tuple[Path, ...],
    host: str,
    port: int,
    open_: bool,
    token: str | None,
    allow_host: tuple[str, ...],
    allow_origin: tuple[str, ...],
    cache: Path | None,
    cache_size: int,
    device: str,
    threads: int | None,
) -> None:
    """Show a library in the browser, and answer programs as JSON.

    Only this machine can reach it, unless --host says otherwise. Nothing is ever written to a
    library. While it runs, `retriever search` asks it and answers in milliseconds.

    \b
    Examples:
      retriever serve --open
      retriever serve --library photos.lib --library work.lib --port 9000
      retriever serve --host 0.0.0.0 --token "$(openssl rand -hex 16)"
    """
    try:
        from retriever.web.run import run
    except ModuleNotFoundError as exc:
        if exc.name and exc.name.partition(".")[0] in _NEEDED:
            raise MissingExtraError("The server", "web") from exc
        raise

    paths = library_paths or (Path(default_library()),)
    libraries: dict[str, Library] = {}
    for path in paths:
        libraries[_name(path, libraries)] = open_library(path, device, threads)
    run(
        libraries,
        host=host,
        port=port,
        token=token,
        hosts=allow_host,
        origins=allow_origin,
        cache=cache or _default_cache(),
        thumbnail_bytes=cache_size,
        open_browser=open_,
        say=lambda sentence: click.echo(sentence, err=True),
    )


@click.command()
@library_option
@encoder_options
def mcp(library_path: Path, device: str, threads: int | None) -> None:
    """Answer an assistant over the Model Context Protocol, on stdin and stdout.

    It can search by text and by picture, ask for captions, look at pictures, and ask what the
    library holds; it can change nothing.

    \b
    Examples:
      retriever mcp
      retriever mcp --library photos.lib
      claude mcp add photos -- retriever mcp --library ~/photos.lib
    """
    try:
        from retriever.assistants import server
    except ModuleNotFoundError as exc:
        if exc.name and exc.name.partition(".")[0] in ("mcp", "mcp_types", "pydantic"):
            raise MissingExtraError("Answering assistants", "mcp") from exc
        raise
    with open_library(library_path, device, threads) as library:
        server(library).run()


def _name(path: Path, taken: "dict[str, Library]") -> str:
    """What a library is called, by its folder."""
    stem = shown(path.expanduser().resolve().stem)[:100] or "library"
    name, number = stem, 2
    while name in taken:
        name, number = f"{stem}-{number}", number + 1
    return name


def _default_cache() -> Path:
    import platformdirs

    return platformdirs.user_cache_path("retriever", appauthor=False) / "serve"
