"""Who may ask the server, how much at once, and what browsers are told to keep apart.

A page on the internet can have a browser send requests to 127.0.0.1. It cannot read what comes
back, unless it makes its own name point here (DNS rebinding): so only names that are meant are
answered, and nothing is shared with other origins. Beyond loopback a token is needed besides.
"""

from __future__ import annotations

import hmac
import json
from collections import Counter
from collections.abc import Collection
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "retriever_token"
MOST_BYTES = 32 << 20  # of a request
MOST_OF_ONE = 64  # requests of one address at once
MOST_OF_ALL = 256
MOST_TARGET = 16 << 10  # bytes of path and query

CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:;"
    " connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'self';"
    " frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": CONTENT_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
_TOO_LARGE = f"a request has at most {MOST_BYTES >> 20} MiB"
_LOCAL = ("localhost", "127.0.0.1", "[::1]")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address that the server listens on."""
    import ipaddress

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """ASGI middleware around the whole application.

    Args:
        app: what is guarded.
        hosts: names under which the server may be asked for, besides those of this machine; "*"
            any, which a token makes safe.
        token: what must be shown, in the header `Authorization: Bearer`, a cookie, or once in the
            address, `?token=`, which sets the cookie; None: nothing.
        origins: other origins whose pages may read answers (CORS); none by default.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: Collection[str] = (),
        token: str | None = None,
        origins: Collection[str] = (),
    ) -> None:
        self._app = app
        self._hosts = {host.lower() for host in (*_LOCAL, *hosts)}
        self._token = token
        self._origins = frozenset(origins)
        self._busy: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or says why not."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        is_shared = origin in self._origins

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    own.setdefault(name, value)
                if is_shared and origin:
                    own["access-control-allow-origin"] = origin
                    own["cross-origin-resource-policy"] = "cross-origin"
                    own.add_vary_header("Origin")
            await send(message)

        refused = self._refusal(scope, headers)
        if refused:
            await refuse(send_guarded, *refused)
            return
        if is_shared and scope["method"] == "OPTIONS":  # which never carries a token
            await _allow_preflight(send_guarded)
            return
        if self._token and not self._is_known(headers):
            await self._ask_for_token(scope, send_guarded)
            return
        client = (scope.get("client") or ("",))[0]
        if self._busy.total() >= MOST_OF_ALL:
            await refuse(send_guarded, 503, "too many questions at once: ask again in a second")
            return
        if self._busy[client] >= MOST_OF_ONE:
            await refuse(
                send_guarded, 429, f"more than {MOST_OF_ONE} questions at once: wait for answers"
            )
            return
        self._busy[client] += 1
        try:
            await self._bounded(scope, receive, send_guarded)
        finally:
            self._busy[client] -= 1
            if not self._busy[client]:
                del self._busy[client]

    async def _bounded(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ends a request that has more than MOST_BYTES, whatever it said before."""
        count = 0
        is_refused = False

        async def bounded() -> Message:
            nonlocal count
            message = await receive()
            count += len(message.get("body", b""))
            return message if count <= MOST_BYTES else {"type": "http.disconnect"}

        async def send_unless(message: Message) -> None:
            nonlocal is_refused
            if count <= MOST_BYTES:
                await send(message)
            elif not is_refused:  # whatever the application makes of half a request
                is_refused = True
                await refuse(send, 413, _TOO_LARGE)

        try:
            await self._app(scope, bounded, send_unless)
        except Exception:
            if count <= MOST_BYTES:
                raise
        if count > MOST_BYTES and not is_refused:
            await refuse(send, 413, _TOO_LARGE)

    def _refusal(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        named = headers.getlist("host")
        name = _without_port(named[0].lower()) if len(named) == 1 else ""
        if name not in self._hosts and not ("*" in self._hosts and name):
            return 421, "this server is not asked for by that name: see `retriever serve --host`"
        if len(scope["path"]) + len(scope["query_string"]) > MOST_TARGET:
            return 414, f"an address has at most {MOST_TARGET:,} bytes here"
        origin = headers.get("origin")
        is_own = origin is None or origin.partition("://")[2].lower() == named[0].lower()
        from_elsewhere = headers.get("sec-fetch-site") == "cross-site"
        if origin not in self._origins and not is_own:
            return 403, "pages of other origins may not ask: see `retriever serve --allow-origin`"
        if from_elsewhere and origin is None and headers.get("sec-fetch-mode") != "navigate":
            return 403, "pages of other origins may not show what is served here"
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()):
            return 400, "the length of the request is no number"
        if int(length) > MOST_BYTES:
            return 413, _TOO_LARGE
        return None

    def _is_known(self, headers: Headers) -> bool:
        assert self._token is not None
        kind, _, shown = headers.get("authorization", "").partition(" ")
        given = [shown.strip()] if kind.lower() == "bearer" else []
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            cookie = None
        given += [cookie.value] if cookie else []
        return any(hmac.compare_digest(one.encode(), self._token.encode()) for one in given)

    async def _ask_for_token(self, scope: Scope, send: Send) -> None:
        """Takes the token from the address into a cookie, or says that it is needed."""
        assert self._token is not None
        asked = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        shown = dict(asked).get("token", "")
        if scope["method"] != "GET" or not hmac.compare_digest(
            shown.encode("utf-8", "replace"), self._token.encode()
        ):
            await refuse(
                send, 401, "a token is needed: the address that `retriever serve` printed has it"
            )
            return
        rest = urlencode([(name, value) for name, value in asked if name != "token"])
        # One slash at the beginning: two would lead to another server.
        place = "/" + scope["path"].lstrip("/\\") + (f"?{rest}" if rest else "")
        cookie = f"{COOKIE}={self._token}; HttpOnly; SameSite=Strict; Path=/"
        await send(
            {
                "type": "http.response.start",
                "status": 303,
                "headers": [
                    (b"location", place.encode("ascii", "replace")),
                    (b"set-cookie", cookie.encode()),
                    (b"cache-control", b"no-store"),
                    (b"content-length", b"0"),
                ],
            }
        )
        await send({"type": "http.response.body", "body": b""})


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host


async def _allow_preflight(send: Send) -> None:
    headers = [
        (b"access-control-allow-methods", b"GET, POST"),
        (b"access-control-allow-headers", b"authorization, content-type"),
        (b"access-control-max-age", b"600"),
        (b"content-length", b"0"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


def problem(status: int, detail: str) -> dict[str, str | int]:
    """What went wrong, as RFC 9457 has it."""
    title = HTTPStatus(status).phrase
    return {"type": "about:blank", "title": title, "status": status, "detail": detail}


async def refuse(send: Send, status: int, detail: str) -> None:
    """Sends a problem as the whole answer."""
    body = json.dumps(problem(status, detail)).encode()
    headers = [
        (b"content-type", b"application/problem+json"),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
    ]
    if status in (429, 503):
        headers.append((b"retry-after", b"1"))
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
