"""A library for assistants: tools over the Model Context Protocol, on stdin and stdout.

Tools only read. They give what the command line prints as JSON, and thumbnails as pictures, so that
an assistant can look at what it found. modelcontextprotocol.io
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, ParamSpec, TypeVar

from mcp.server.mcpserver import Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import ToolAnnotations
from pydantic import Field

from indexes.errors import StoreError
from retriever import __version__
from retriever.errors import PictureError, RetrieverError, UsageError, printable
from retriever.sheets import small_jpeg

if TYPE_CHECKING:
    from indexes.records import ItemRow
    from retriever.library import Library
    from retriever.search import Hit

P = ParamSpec("P")
T = TypeVar("T")

SIDE = 384  # pixels of a thumbnail: enough to recognise things, some 400 tokens
MOST = 20  # answers
READ_ONLY = ToolAnnotations(
    read_only_hint=True, destructive_hint=False, idempotent_hint=True, open_world_hint=False
)
INSTRUCTIONS = (
    "Finds pictures in a library on the user's own machine by describing what they show, finds"
    " captions for a picture, and tells what the library holds. Ask in plain, concrete words, such"
    " as a caption of the picture might have. `confidence` is how surely a picture is what was"
    " asked for; where `is_match` is false, none is."
)
Count = Annotated[int, Field(ge=1, le=MOST, description="Answers wanted.")]
Where = Annotated[
    str, Field(description='A filter, such as: taken >= 2024 and width > height. "" is none.')
]
Pictured = Annotated[bool, Field(description="Give thumbnails as well.")]


def server(library: Library) -> MCPServer[Any]:
    """The tools over one library; `server(library).run()` answers until stdin ends."""
    mcp: MCPServer[Any] = MCPServer(
        "retriever",
        title="Retriever",
        instructions=INSTRUCTIONS,
        version=__version__,
        log_level="WARNING",
    )

    def tool(title: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
        """A function as a tool that changes nothing and tells its faults in a sentence."""

        def decorated(function: Callable[P, T]) -> Callable[P, T]:
            @wraps(function)
            def telling(*args: P.args, **named: P.kwargs) -> T:
                try:
                    return function(*args, **named)
                except (RetrieverError, StoreError) as error:
                    raise ToolError(str(error)) from error

            return mcp.tool(title=title, annotations=READ_ONLY, structured_output=False)(telling)

        return decorated

    @tool("Search pictures by text")
    def search_pictures(
        text: Annotated[str, Field(max_length=2000, description="What the pictures show.")],
        k: Count = 6,
        where: Where = "",
        without: Annotated[str, Field(description="What they must not show.")] = "",
        mode: Annotated[
            Literal["", "image", "caption", "words", "hybrid"],
            Field(description="By what they are found; empty: what is best in this library."),
        ] = "",
        thumbnails: Pictured = True,
    ) -> list[Any]:
        """Find pictures by describing them."""
        return _told(
            library.search(
                text,
                k=k,
                where=where or None,
                without=[without] if without else [],
                mode=mode or None,
            ),
            thumbnails,
        )

    @tool("Search pictures by picture")
    def similar_pictures(
        picture: Annotated[str, Field(description="A file's path, or the id of a picture found.")],
        text: Annotated[str, Field(description="What should be different, if anything.")] = "",
        k: Count = 6,
        where: Where = "",
        thumbnails: Pictured = True,
    ) -> list[Any]:
        """Find pictures that look like one."""
        found = library.search(
            text or None, image=_file(library, picture), k=k, where=where or None
        )
        return _told(found, thumbnails)

    @tool("Captions for a picture")
    def captions_for(
        picture: Annotated[str, Field(description="A file's path, or the id of a picture found.")],
        k: Count = 5,
        where: Where = "",
    ) -> str:
        """Find the captions in the library that fit a picture best."""
        hits = library.captions_for(_file(library, picture), k=k, where=where or None)
        return _json(
            [
                {
                    "rank": hit.rank,
                    "score": round(hit.score, 4),
                    "caption": hit.caption,
                    "id": hit.item_id,
                }
                for hit in hits
            ]
        )

    @tool("One picture")
    def show_picture(
        id: Annotated[int, Field(ge=1, description="The id of a picture found.")],
        side: Annotated[int, Field(ge=64, le=1536, description="Pixels of the longer side.")] = 768,
    ) -> list[Any]:
        """Look at a picture, with all that is known of it."""
        item = _item(library, id)
        record = {
            "path": printable(item.path),
            "captions": [one.text for one in item.captions],
            "width": item.width,
            "height": item.height,
            "taken": item.taken.isoformat() if item.taken else None,
            "camera": item.camera,
            "gps": None if item.latitude is None else [item.latitude, item.longitude],
            "extras": item.columns,
        }
        return [_json(record), *_seen(item.path, side)]

    @tool("About the library")
    def library_info() -> str:
        """Tell what the library holds, and what a filter may ask for."""
        info = library.info()
        return _json(
            {
                "path": printable(library.path),
                "pictures": info["items"] - info["failures"],
                "captions": info["captions"],
                "model": library.model.name,
                "folders": [printable(one.path) for one in library.roots()],
                "fields": library.fields(),
            }
        )

    return mcp


def _file(library: Library, named: str) -> Path:
    """The picture that is meant: one of the library by its id, or a file."""
    if named.isascii() and named.isdigit() and len(named) < 19:
        return _item(library, int(named)).path
    return Path(named).expanduser()


def _item(library: Library, item_id: int) -> ItemRow:
    found = library.item(item_id)
    if found is None:
        raise UsageError(f"there is no picture {item_id} in the library")
    return found


def _told(answer: Any, with_thumbnails: bool) -> list[Any]:
    """An answer as JSON, then its pictures in the same order."""
    hits: Sequence[Hit] = answer
    record = {
        "is_match": answer.is_match,
        "mode": answer.mode,
        "notes": list(answer.notes),
        "hits": [
            {
                "rank": hit.rank,
                "id": hit.item_id,
                "score": round(hit.score, 4),
                "confidence": None if hit.confidence is None else round(hit.confidence, 3),
                "path": printable(hit.path),
                "caption": hit.caption,
                "near_duplicates": hit.duplicates,
            }
            for hit in hits
        ],
    }
    pictures = [one for hit in hits for one in _seen(hit.path, SIDE)] if with_thumbnails else []
    return [_json(record), *pictures]


def _seen(path: Path, side: int) -> list[Any]:
    """A picture as an assistant sees it, or a sentence why not."""
    try:
        return [Image(data=small_jpeg(path, side), format="jpeg")]
    except PictureError as error:
        return [str(error)]


def _json(record: object) -> str:
    return json.dumps(record, ensure_ascii=False)
