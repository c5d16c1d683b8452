"""The other end of `retriever.running`: answers the command line of the same user."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

from retriever.replies import Request, reply
from retriever.running import CONNECT_SECONDS, PROTOCOL, is_ours, socket_path
from retriever.web.service import Service

LOG = logging.getLogger("retriever.web")
MOST_BYTES = 1 << 20  # of a request


@asynccontextmanager
async def listening(service: Service) -> AsyncIterator[None]:
    """Answers at the socket of each library, for the length of an `async with` block.

    One that another server answers already is left to it; without sockets nothing is done.
    """
    async with AsyncExitStack() as stack:
        for shelf in service.shelves.values():
            path = socket_path(shelf.library.path)
            if path is not None and _may_listen(path):
                try:
                    await stack.enter_async_context(_listening(service, shelf.name, path))
                except OSError as error:
                    LOG.warning("no socket for the command line: %s", error)
        yield


def _may_listen(path: Path) -> bool:
    """Whether the folder is private, made if absent, and nobody answers at the socket."""
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not is_ours(path.parent):
        LOG.warning("%s is not only yours: the command line will not find this server", path.parent)
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(CONNECT_SECONDS)
        try:
            probe.connect(str(path))
        except OSError:  # nobody there, or left by one that was killed
            path.unlink(missing_ok=True)
            return True
    return False


@asynccontextmanager
async def _listening(service: Service, name: str, path: Path) -> AsyncIterator[None]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            line = await reader.readline()
            said = await _answered(service, name, line)
            writer.write(json.dumps(said | {"protocol": PROTOCOL}).encode() + b"\n")
            await writer.drain()
        except (ConnectionError, ValueError, asyncio.IncompleteReadError):
            pass  # whoever asked has gone, or is no command line of ours
        finally:
            writer.close()

    server = await asyncio.start_unix_server(answer, path, limit=MOST_BYTES)
    path.chmod(0o600)
    ours = path.stat().st_ino
    try:
        yield
    finally:
        server.close()
        with suppress(OSError):
            if path.stat().st_ino == ours:
                path.unlink()


async def _answered(service: Service, name: str, line: bytes) -> dict[str, object]:
    try:
        record = json.loads(line)
        if record.pop("protocol", None) != PROTOCOL:
            return {"error": "another version"}
        request = Request.from_json(record)
        found = await service.run(lambda: reply(service.shelf(name).library, request))
    except Exception as error:  # told in full by the command line, which then searches by itself
        return {"error": str(error)}
    return {"reply": found.reply.as_json(), "pid": os.getpid()}
