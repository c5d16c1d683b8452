"""A running server, asked by the command line over a socket that only this user can reach.

One line of JSON goes there, one comes back: what was asked as `retriever.finding` reads it from the
command line, and what it then prints. So a search takes milliseconds instead of loading a model.

The socket's name follows from the library's folder. It lies in a folder of the user's own that
nobody else may enter, which is what makes it safe to name files over it.
"""

from __future__ import annotations

import json
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

PROTOCOL = 1
MOST_BYTES = 64 << 20  # of an answer
CONNECT_SECONDS = 0.5
ANSWER_SECONDS = 60.0
LONGEST_NAME = 100  # bytes: systems take 104 or 108


class NotRunningError(Exception):
    """No server of this library can be asked."""


def socket_path(library: Path) -> Path | None:
    """Where the server of a library listens; None where there are no such sockets."""
    if os.name != "posix":
        return None
    name = xxhash.xxh3_64_hexdigest(os.fsencode(os.path.realpath(library.expanduser())))
    base = os.environ.get("XDG_RUNTIME_DIR") or ""
    folder = Path(base) / "retriever"
    if not base or len(os.fsencode(folder)) + len(name) + 6 > LONGEST_NAME:
        folder = Path("/tmp") / f"retriever-{os.getuid()}"
    return folder / f"{name}.sock"


def is_ours(folder: Path) -> bool:
    """Whether a folder is this user's and nobody else may enter it."""
    with suppress(OSError):
        status = folder.lstat()
        is_private = not status.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
        return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and is_private
    return False


def ask(library: Path, request: dict[str, Any]) -> dict[str, Any]:
    """What the server of a library answers to a request.

    Raises NotRunningError if there is none, or none that understands it.
    """
    path = socket_path(library)
    # Unlike Path.exists this raises nothing where a folder on the way may not be entered.
    if path is None or not (os.access(path, os.W_OK) and is_ours(path.parent)):
        raise NotRunningError
    import socket  # who asks no server needs none

    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(CONNECT_SECONDS)
            connection.connect(str(path))
            connection.settimeout(ANSWER_SECONDS)
            connection.sendall(json.dumps(request | {"protocol": PROTOCOL}).encode() + b"\n")
            received = bytearray()
            while not received.endswith(b"\n"):
                part = connection.recv(1 << 16)
                if not part or len(received) > MOST_BYTES:
                    raise NotRunningError
                received += part
        answer = json.loads(received)
    except (OSError, ValueError) as error:
        raise NotRunningError from error
    if not isinstance(answer, dict) or answer.get("protocol") != PROTOCOL:
        raise NotRunningError
    return answer
