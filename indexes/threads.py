"""Threads beside the caller's, for what leaves Python alone while it takes long: FAISS, SQLite."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class Threads:
    """A pool that starts when it is first needed, anew in a forked child.

    Args:
        name: what its threads are called.
        count: most threads; None leaves it to Python.
        start: called in each thread when it begins.
    """

    def __init__(
        self, name: str, count: int | None = None, start: Callable[[], object] | None = None
    ) -> None:
        self._name = name
        self._count = count
        self._start = start
        self._pool: ThreadPoolExecutor | None = None
        if hasattr(os, "register_at_fork"):  # a child has none of its parent's threads
            os.register_at_fork(after_in_child=self._forget)

    def submit(self, work: Callable[..., T], *args: Any) -> Future[T]:
        """What `work` gives, in a thread; at once where the interpreter is ending already."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._count, self._name, initializer=self._start)
        try:
            return self._pool.submit(work, *args)
        except RuntimeError:  # no thread can be had: the caller's outlives the main one
            done: Future[T] = Future()
            try:
                done.set_result(work(*args))
            except BaseException as error:  # told as the pool would
                done.set_exception(error)
            return done

    def _forget(self) -> None:
        self._pool = None
