"""What Prometheus is told of a server: how many requests, how long they took, how many pictures."""

import time
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from retriever.library import Library
from retriever.web.service import Service


def _pictures(library: Library) -> float:
    return library.counts()["items"]


class Measured:
    """ASGI middleware that counts requests by route and status, and how long they took."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._registry = CollectorRegistry()
        labels = ("route", "status")
        self._count = Counter(
            "retriever_requests", "Requests answered", labels, registry=self._registry
        )
        self._seconds = Histogram(
            "retriever_request_seconds",
            "Seconds until an answer began",
            ("route",),
            buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10),
            registry=self._registry,
        )
        waiting = Gauge(
            "retriever_calls_in_flight", "Calls that run or wait", registry=self._registry
        )
        waiting.set_function(lambda: service.in_flight)
        pictures = Gauge(
            "retriever_pictures", "Pictures in a library", ("library",), registry=self._registry
        )
        for shelf in service.shelves.values():
            pictures.labels(shelf.name).set_function(partial(_pictures, shelf.library))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin = time.perf_counter()

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                # As it is declared: of paths that anyone makes up there is no end.
                route = getattr(scope.get("route"), "path", "other")
                self._count.labels(route, message["status"]).inc()
                self._seconds.labels(route).observe(time.perf_counter() - begin)
            await send(message)

        await self._app(scope, receive, counting)

    def text(self) -> bytes:
        """All of it in Prometheus' format."""
        return generate_latest(self._registry)
