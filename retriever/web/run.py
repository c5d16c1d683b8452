"""Runs the server until it is told to end."""

from __future__ import annotations

import errno
import logging
import os
import secrets
import socket
import threading
import webbrowser
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path

import uvicorn

from retriever.errors import UsageError, printable
from retriever.library import Library
from retriever.web.app import create_app
from retriever.web.guard import is_loopback
from retriever.web.service import Service

GOODBYE_SECONDS = 3  # that answers under way have when the server ends
KEEP_ALIVE_SECONDS = 20
MOST_CONNECTIONS = 512
BACKLOG = 256


def run(
    libraries: Mapping[str, Library],
    *,
    host: str,
    port: int,
    token: str | None,
    hosts: Collection[str],
    origins: Collection[str],
    cache: Path,
    thumbnail_bytes: int,
    open_browser: bool,
    say: Callable[[str], None],
) -> None:
    """Serves libraries until SIGINT or SIGTERM; closes them.

    Args:
        libraries: by name; the first is the default.
        host: an address or a name of this machine.
        port: 0: any that is free.
        token: what must be shown; None: nothing on loopback, and elsewhere one is made up.
        hosts: names to be asked for by, besides that.
        origins: whose pages may read answers.
        cache: a folder for what may be deleted.
        thumbnail_bytes: what thumbnails may take in it.
        open_browser: show the page.
        say: told where the server is, and with which token.

    Raises:
        UsageError: the address cannot be listened on.
        EncoderError: a model cannot be loaded.
    """
    for library in libraries.values():
        library.share()
    listener = _bound(host, port)
    port = listener.getsockname()[1]
    is_local = is_loopback(host)
    if not is_local and token is None:
        token = secrets.token_urlsafe(16)
    # Whoever listens on all addresses is asked for by any of them; the token then is what counts.
    is_any = host in ("0.0.0.0", "::", "")
    names = {*hosts, "*" if is_any else f"[{host}]" if ":" in host else host}
    service = Service(libraries, cache, thumbnail_bytes=thumbnail_bytes)
    app = create_app(service, hosts=names, token=token, origins=origins)
    shown = "127.0.0.1" if is_any else f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{port}/" + (f"?token={token}" if token else "")
    pictures = sum(library.counts()["items"] for library in libraries.values())
    say(f"{pictures:,} pictures at {address} (Ctrl-C ends it)")
    if is_any:
        say(f"From elsewhere: {address.replace(shown, socket.gethostname(), 1)}")
    if not is_local:
        say("Anyone who can reach this machine and has the token sees all pictures.")
    if fault := _fault_of(cache):
        say(f"Nothing can be kept in {printable(cache)} ({fault}): thumbnails are made each time.")
    if open_browser:
        threading.Timer(0.5, webbrowser.open, [address]).start()
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=GOODBYE_SECONDS,
        h11_max_incomplete_event_size=64 << 10,
    )
    with suppress(KeyboardInterrupt):  # the signal, raised again when all is closed
        uvicorn.Server(config).run(sockets=[listener])
    say("Stopped.")


def _fault_of(cache: Path) -> str | None:
    """Why nothing can be kept in a folder, which is made if absent."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return error.strerror
    return None if os.access(cache, os.W_OK | os.X_OK) else "it is not writable"


def _bound(host: str, port: int) -> socket.socket:
    listener = None
    try:
        [(family, kind, protocol, _, address), *_] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        # Of an unnamed protocol asyncio does not know that it must not wait for full packets.
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)  # whoever comes before the server is ready waits for it
    except OSError as error:
        if listener is not None:
            listener.close()
        way_out = f": is another server running? --port {port + 1} takes the next"
        if not port or error.errno != errno.EADDRINUSE:
            way_out = ""
        raise UsageError(
            f"{host}:{port} cannot be listened on ({error.strerror}){way_out}"
        ) from error
    return listener
