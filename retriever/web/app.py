"""What is asked of the server over HTTP, and what it answers."""

import asyncio
import io
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from enum import IntEnum
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, File, Query, Request, UploadFile
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from indexes.errors import InvalidConditionError, StoreError
from retriever import __version__, asking
from retriever.errors import PictureError, RetrieverError, UsageError, printable
from retriever.explain import Explanation, heat_map, overlay
from retriever.search import Hit
from retriever.web import schemas
from retriever.web.guard import Guard, problem
from retriever.web.local import listening
from retriever.web.measured import Measured
from retriever.web.schemas import MOST_PARTS, MOST_RESULTS, Id, LibraryName, Text
from retriever.web.service import BusyError, NotFoundError, Service, Shelf, content_key
from retriever.web.thumbnails import SIZES

STATIC = Path(__file__).parent / "static"
LOG = logging.getLogger("retriever.web")
PROBLEM = "application/problem+json"
TICK = 1.0  # seconds between two looks at whether a library has changed
STREAM_SECONDS = 600.0  # browsers ask again by themselves

_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": HTTPStatus(status).phrase,
        "content": {PROBLEM: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
    for status in (400, 401, 403, 404, 413, 414, 421, 422, 429, 500, 503)
}


class Size(IntEnum):
    """Pixels of a thumbnail's longer side."""

    SMALL, MEDIUM, LARGE, LARGEST = SIZES


InAddress = Annotated[LibraryName, Query()]
ItemId = Annotated[Id, InPath(description="The id of a picture.")]
Pictures = Annotated[
    list[UploadFile], File(max_length=MOST_PARTS, description="Pictures to ask with.")
]


def create_app(
    service: Service,
    *,
    hosts: Collection[str] = (),
    token: str | None = None,
    origins: Collection[str] = (),
) -> ASGIApp:
    """The application, guarded; see `retriever.web.guard.Guard` for the arguments.

    It closes the service when it ends.
    """

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with listening(service):
            yield
        service.close()

    app = FastAPI(
        title="Retriever",
        version=__version__,
        summary="Find pictures by describing them, and captions by showing a picture.",
        docs_url=None,  # those pages are made by scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        responses=_REFUSALS,
    )
    measured = Measured(app, service)
    _add_errors(app)
    _add_search(app, service)
    _add_items(app, service)
    _add_state(app, service, measured)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html", headers={"cache-control": "no-cache"})

    openapi = app.openapi

    def described() -> dict[str, Any]:
        schema = openapi()
        schema["components"]["schemas"].setdefault("Problem", schemas.Problem.model_json_schema())
        for methods in schema["paths"].values():
            for operation in methods.values():
                operation["responses"]["422"] = _REFUSALS[422]
        return schema

    app.openapi = described  # type: ignore[method-assign]  # FastAPI's own way to extend it
    return Guard(measured, hosts=hosts, token=token, origins=origins)


# ── search ───────────────────────────────────────────────────────────────────────────────────────


def _add_search(app: FastAPI, service: Service) -> None:
    @app.get("/api/search", tags=["search"])
    async def search(wanted: Annotated[schemas.Wanted, Query()]) -> schemas.Answer:
        """Find pictures by a text, by pictures of the library, or by both."""
        return await service.run(_search, service, wanted, [])

    @app.post("/api/search", tags=["search"])
    async def search_by_upload(
        wanted: Annotated[schemas.Wanted, Query()], picture: Pictures
    ) -> schemas.Answer:
        """Find pictures by pictures that are sent, and by all that can be asked without."""
        data = [await one.read() for one in picture]
        return await service.run(_search, service, wanted, data)

    @app.get("/api/captions", tags=["search"])
    async def captions(
        id: Annotated[Id, Query(description="The id of a picture.")],
        library: InAddress = None,
        where: Annotated[Text, Query(description="Captions of such pictures only.")] = "",
        k: Annotated[int, Query(ge=1, le=100)] = 5,
    ) -> schemas.Captions:
        """Find the captions that fit a picture of the library best."""
        return await service.run(_captions, service, library, id, None, where, k)

    @app.post("/api/captions", tags=["search"])
    async def captions_by_upload(
        picture: Annotated[UploadFile, File(description="A picture.")],
        library: InAddress = None,
        where: Annotated[Text, Query(description="Captions of such pictures only.")] = "",
        k: Annotated[int, Query(ge=1, le=100)] = 5,
    ) -> schemas.Captions:
        """Find the captions that fit a picture that is sent best."""
        data = await picture.read()
        return await service.run(_captions, service, library, None, data, where, k)

    @app.get("/api/items/{id}/why", tags=["search"])
    async def why(id: ItemId, asked: Annotated[schemas.Asked, Query()]) -> dict[str, Any]:
        """Why a picture answers a query: by which channels, words and caption."""
        return await service.run(_why, service, id, asked)

    @app.get(
        "/api/items/{id}/heat",
        tags=["search"],
        response_class=Response,
        responses={200: {"content": {"image/png": {}}}},
    )
    async def heat(id: ItemId, asked: Annotated[schemas.Asked, Query()]) -> Response:
        """A picture in grey, with colour where it shows what a query asks for, as PNG."""
        data = await service.run(_heat, service, id, asked)
        return Response(data, media_type="image/png", headers={"cache-control": "private"})


def _query(
    service: Service, shelf: Shelf, asked: schemas.Asked, uploads: Sequence[bytes]
) -> asking.Query:
    text = asked.q.strip()
    query = asking.parse(text, files=False) if text else asking.Query()
    pictures: list[Path | Image.Image] = [
        *(service.item(shelf, one).path for one in asked.image),
        *(service.uploaded(data) for data in uploads),
    ]
    shunned = [service.item(shelf, one).path for one in asked.without_image]
    query = query.beside(
        [(one, asked.image_weight) for one in pictures],
        [*(one.strip() for one in asked.without if one.strip()), *shunned],
        text_weight=asked.text_weight,
    )
    if not (query.texts or query.images):
        raise UsageError("say what to look for: a text, a picture, or both")
    return query


def _search(service: Service, wanted: schemas.Wanted, uploads: Sequence[bytes]) -> schemas.Answer:
    begin = time.perf_counter()
    shelf = service.shelf(wanted.library)
    query = _query(service, shelf, wanted, uploads)
    last = min(wanted.offset + wanted.k, MOST_RESULTS)
    answer = shelf.library.search(
        query,
        where=wanted.filter,
        mode=wanted.mode,
        k=last + 1,  # one more tells whether there are more
        exact=wanted.exact,
        all=wanted.all,
        min_confidence=wanted.min_confidence,
    )
    hits = answer.hits[wanted.offset : last]
    reasons: Sequence[Explanation | None] = [None] * len(hits)
    if wanted.explain:
        reasons = shelf.library.explain(hits, query, answer.mode)
    return schemas.Answer(
        library=shelf.name,
        mode=answer.mode,
        is_match=answer.is_match,
        message=answer.message,
        notes=list(answer.notes),
        offset=wanted.offset,
        more=len(answer) > last and last < MOST_RESULTS,
        seconds=round(time.perf_counter() - begin, 4),
        hits=[_found(hit, reason) for hit, reason in zip(hits, reasons, strict=True)],
    )


def _found(hit: Hit, reason: Explanation | None) -> schemas.Found:
    return schemas.Found(
        rank=hit.rank,
        score=round(hit.score, 6),
        confidence=None if hit.confidence is None else round(hit.confidence, 4),
        id=hit.item_id,
        name=printable(hit.path.name),
        path=printable(hit.path),
        caption=hit.caption,
        duplicates=hit.duplicates,
        explain=reason.as_json() if reason else None,
    )


def _why(service: Service, item_id: int, asked: schemas.Asked) -> dict[str, Any]:
    shelf = service.shelf(asked.library)
    item = service.item(shelf, item_id)
    query = _query(service, shelf, asked, [])
    mode = asked.mode or shelf.library.searcher.usual_mode(query)
    caption = shelf.library.nearest_caption(query, item_id)
    hit = Hit(1, 0.0, item.path, caption, item_id)
    [reason] = shelf.library.explain([hit], query, mode)
    return reason.as_json()


def _heat(service: Service, item_id: int, asked: schemas.Asked) -> bytes:
    shelf = service.shelf(asked.library)
    item = service.item(shelf, item_id)
    row = shelf.library.searcher.channels(_query(service, shelf, asked, [])).row
    assert row is not None, "a query that is compared with pictures has one"
    picture = service.decoded(item, 640)
    buffer = io.BytesIO()
    overlay(picture, heat_map(shelf.library.encoder, picture, row)).save(buffer, "PNG")
    return buffer.getvalue()


def _captions(
    service: Service,
    library: str | None,
    item_id: int | None,
    data: bytes | None,
    where: str,
    k: int,
) -> schemas.Captions:
    begin = time.perf_counter()
    shelf = service.shelf(library)
    picture: Any
    if data is not None:
        picture = service.uploaded(data)
    else:
        assert item_id is not None
        picture = service.item(shelf, item_id).path
    hits = shelf.library.captions_for(picture, where=where.strip() or None, k=k)
    return schemas.Captions(
        library=shelf.name,
        seconds=round(time.perf_counter() - begin, 4),
        hits=[
            schemas.FoundCaption(
                rank=hit.rank,
                score=round(hit.score, 6),
                caption=hit.caption,
                id=hit.item_id,
                path=printable(hit.path),
            )
            for hit in hits
        ],
    )


# ── pictures ─────────────────────────────────────────────────────────────────────────────────────


def _add_items(app: FastAPI, service: Service) -> None:
    @app.get("/api/items", tags=["pictures"])
    async def items(
        library: InAddress = None,
        where: Annotated[Text, Query(description="A filter, as on the command line.")] = "",
        k: Annotated[int, Query(ge=1, le=200)] = 30,
        offset: Annotated[int, Query(ge=0, lt=1 << 40)] = 0,
    ) -> schemas.Items:
        """The pictures that a filter lets through, those that came last first."""
        return await service.run(_items, service, library, where, k, offset)

    @app.get("/api/items/{id}", tags=["pictures"])
    async def item(id: ItemId, library: InAddress = None) -> schemas.Item:
        """All that is known of a picture."""
        return await service.run(_item, service, library, id)

    @app.get(
        "/api/items/{id}/thumbnail",
        tags=["pictures"],
        response_class=Response,
        responses={200: {"content": {"image/jpeg": {}}}},
    )
    async def thumbnail(
        request: Request,
        id: ItemId,
        library: InAddress = None,
        size: Annotated[Size, Query(description="Pixels of the longer side.")] = Size.MEDIUM,
    ) -> Response:
        """A picture as a small JPEG."""
        found = await service.run(lambda: service.item(service.shelf(library), id))
        return await _sent(
            request, f"{content_key(found)}-{size}", lambda: (service.thumbnail(found, size), JPEG)
        )

    @app.get(
        "/api/items/{id}/picture",
        tags=["pictures"],
        response_class=Response,
        responses={200: {"content": {"image/*": {}}}},
    )
    async def picture(request: Request, id: ItemId, library: InAddress = None) -> Response:
        """A picture as it is in its file, or as JPEG if browsers do not show its format."""
        found = await service.run(lambda: service.item(service.shelf(library), id))
        return await _sent(request, content_key(found), lambda: service.picture(found))

    async def _sent(request: Request, tag: str, make: Callable[[], tuple[bytes, str]]) -> Response:
        """A picture, or that whoever asks has it already."""
        headers = {"etag": f'"{tag}"', "cache-control": "private, no-cache"}
        if request.headers.get("if-none-match") == headers["etag"]:
            return Response(status_code=304, headers=headers)
        data, kind = await service.run(make)
        # Should a browser ever take it for a page, it may do nothing.
        headers["content-security-policy"] = "default-src 'none'; sandbox"
        return Response(data, media_type=kind, headers=headers)

    @app.get("/api/map", tags=["pictures"])
    async def map(library: InAddress = None) -> schemas.MapRecord:
        """Every picture as a point: those that show alike lie together."""
        return await service.run(lambda: _map(service.shelf(library)))


JPEG = "image/jpeg"


def _item(service: Service, library: str | None, item_id: int) -> schemas.Item:
    item = service.item(service.shelf(library), item_id)
    return schemas.Item(
        id=item.item_id,
        name=printable(item.path.name),
        path=printable(item.path),
        folder=printable(item.path.parent),
        width=item.width,
        height=item.height,
        size=item.size,
        taken=item.taken.isoformat() if item.taken else None,
        camera=item.camera,
        latitude=item.latitude,
        longitude=item.longitude,
        captions=[schemas.Caption(text=one.text, source=one.source) for one in item.captions],
        extras=item.columns,
    )


def _items(service: Service, library: str | None, where: str, k: int, offset: int) -> schemas.Items:
    shelf = service.shelf(library)
    total, found = shelf.library.browse(where.strip() or None, k=k, offset=offset)
    hits = [
        schemas.Listed(
            id=item.item_id,
            name=printable(item.path.name),
            path=printable(item.path),
            caption=item.captions[0].text if item.captions else None,
        )
        for item in found
    ]
    more = offset + len(hits) < total and bool(hits)
    return schemas.Items(library=shelf.name, total=total, offset=offset, more=more, hits=hits)


def _map(shelf: Shelf) -> schemas.MapRecord:
    found = shelf.map.current()
    if found is None:
        fault = shelf.map.error
        return schemas.MapRecord(
            ready=False, drawing=fault is None, message=fault, ids=[], x=[], y=[]
        )
    ids, points, is_drawing = found
    x, y = points.round(4).T.tolist() if len(ids) else ([], [])
    return schemas.MapRecord(
        ready=True, drawing=is_drawing, message=None, ids=ids.tolist(), x=x, y=y
    )


# ── what is there, and how it is doing ───────────────────────────────────────────────────────────


def _add_state(app: FastAPI, service: Service, measured: Measured) -> None:
    @app.get("/api/libraries", tags=["library"])
    async def libraries() -> schemas.Libraries:
        """The libraries that are served; the first is the default."""
        records = await service.run(
            lambda: [_library(service.shelf(name)) for name in service.shelves]
        )
        return schemas.Libraries(libraries=records)

    @app.get("/api/fields", tags=["library"])
    async def fields(library: InAddress = None) -> schemas.Fields:
        """What a filter may ask for, with the commonest values."""
        return await service.run(lambda: _fields(service.shelf(library)))

    @app.get(
        "/api/progress",
        tags=["library"],
        response_class=StreamingResponse,
        responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
    )
    async def progress(request: Request, library: InAddress = None) -> StreamingResponse:
        """What a library holds, now and whenever that changes, as server-sent events."""
        return StreamingResponse(
            _changes(request, service, (await service.run(service.shelf, library)).name),
            media_type="text/event-stream",
            headers={"cache-control": "no-store"},
        )

    @app.get("/api/health", tags=["server"])
    async def health() -> schemas.Health:
        """That the server is there."""
        return schemas.Health(status="ok", version=__version__)

    @app.get(
        "/metrics",
        tags=["server"],
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        """Numbers and durations of what was asked, as Prometheus reads them."""
        return Response(measured.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _library(shelf: Shelf) -> schemas.LibraryRecord:
    library = shelf.library
    info = library.info()
    answers = info["answers"]
    return schemas.LibraryRecord(
        name=shelf.name,
        path=printable(library.path),
        items=info["items"] - info["failures"],
        captions=info["captions"],
        failures=info["failures"],
        model=library.model.name,
        generation=info["generation"],
        mode="hybrid" if answers and answers["mode"] == "hybrid" else "image",
        confidences=library.searcher.calibration() is not None,
    )


def _fields(shelf: Shelf) -> schemas.Fields:
    library = shelf.library
    found = []
    for name, kind in library.fields().items():
        has_values = kind == "extra" or name in ("camera", "folder", "root")
        values = [printable(value) for value, _ in library.values(name)] if has_values else []
        found.append(
            schemas.FilterField.model_validate({"name": name, "type": kind, "values": values})
        )
    return schemas.Fields(fields=found)


async def _changes(request: Request, service: Service, name: str) -> AsyncIterator[str]:
    seen = None
    end = time.monotonic() + STREAM_SECONDS
    while time.monotonic() < end and not await request.is_disconnected():
        try:
            if found := await service.run(_newer, service, name, seen):
                seen, counts = found
                data = json.dumps(counts | {"generation": seen[0], "change": seen[1]})
                yield f"event: library\ndata: {data}\n\n"
        except (BusyError, StoreError):
            pass  # told to those who search; here it is tried again
        await asyncio.sleep(TICK)


def _newer(
    service: Service, name: str, seen: tuple[int, int] | None
) -> tuple[tuple[int, int], dict[str, int]] | None:
    """A library's state and what it holds, if that is not the state that was seen."""
    library = service.shelf(name).library
    version = library.version
    return None if version == seen else (version, library.counts())


# ── errors ───────────────────────────────────────────────────────────────────────────────────────

_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (NotFoundError, 404),
    (BusyError, 503),
    (UsageError, 400),
    (InvalidConditionError, 400),
    (PictureError, 422),
    (RetrieverError, 503),  # a model that is gone, an extra that is missing
    (StoreError, 503),
)


def _add_errors(app: FastAPI) -> None:
    async def told(_request: Request, error: Exception) -> JSONResponse:
        status = next(code for kind, code in _STATUS if isinstance(error, kind))
        detail = str(error) or HTTPStatus(status).phrase
        return _problem(status, detail)

    for kind, _ in _STATUS:
        app.add_exception_handler(kind, told)

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        faults = [
            f"{'.'.join(str(part) for part in one['loc'][1:])}: {one['msg']}"
            for one in error.errors()
        ]
        return _problem(422, "; ".join(faults))

    @app.exception_handler(HTTPException)
    async def http(_request: Request, error: HTTPException) -> JSONResponse:
        return _problem(error.status_code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        LOG.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return _problem(500, "something failed that should not have; the server's log tells what")


def _problem(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    headers = {"cache-control": "no-store"} | (headers or {})
    if status == 503:
        headers["retry-after"] = "1"
    return JSONResponse(problem(status, detail), status, headers, media_type=PROBLEM)
