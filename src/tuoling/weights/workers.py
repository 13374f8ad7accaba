"""Threads for work on bytes. Reading, writing, hashing, XOR and compression all let go of Python's lock."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event, Semaphore
from typing import Any, Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Stopped(Exception):
    """Another thread failed, or the user stopped the program."""


class Workers:
    """At most `count` threads at work: a file each, and those without a file hash beside the others."""

    def __init__(self, count: int) -> None:
        self.count = max(1, count)
        self._free = Semaphore(self.count)
        self._pool = ThreadPoolExecutor(self.count)
        self._stop = Event()

    def check(self) -> None:
        """Called in a long loop: raises Stopped when there is no more use in going on."""
        if self._stop.is_set():
            raise Stopped

    def spare(self, work: Callable[..., object], *arguments: Any) -> Future[Any] | None:
        """Start `work` if a thread has nothing to do; None where all are at work."""
        if not self._free.acquire(blocking=False):
            return None
        return self._pool.submit(self._run, work, *arguments)

    def each(self, work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """`work` of every item, side by side, the results in order. The first error stops all and is raised."""
        started: list[Future[Result]] = []
        for item in items:
            self._free.acquire()
            if self._stop.is_set():
                self._free.release()
                break
            started.append(self._pool.submit(self._run, self._or_stop, work, item))
        errors = [error for error in (one.exception() for one in started) if error is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):
            raise error
        return [one.result() for one in started]

    def close(self) -> None:
        """Stop what runs and wait for it."""
        self._stop.set()
        self._pool.shutdown(wait=True)

    def _run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return work(*arguments)
        finally:
            self._free.release()

    def _or_stop(self, work: Callable[[Item], Result], item: Item) -> Result:
        try:
            return work(item)
        except BaseException:
            self._stop.set()
            raise


@contextmanager
def workers(count: int) -> Iterator[Workers]:
    """Threads that are gone when the block ends, whatever ended it."""
    made = Workers(count)
    try:
        yield made
    finally:
        made.close()


class Hash(Protocol):
    """What hashlib makes."""

    def update(self, data: Any, /) -> None: ...
    def digest(self) -> bytes: ...
    def hexdigest(self) -> str: ...


class Digests:
    """Hashes of one stream. A block is hashed by a spare thread, while the next one is read, if there is one."""

    def __init__(self, threads: Workers, hashes: Sequence[Hash]) -> None:
        self._threads = threads
        self._hashes = hashes
        self._pending: Future[Any] | None = None

    def update(self, block: Any) -> None:
        """Hash a block, which must stay as it is until the next `update` or `finish`."""
        self.finish()
        if self._hashes:
            self._pending = self._threads.spare(self._update, block)
            if self._pending is None:
                self._update(block)

    def finish(self) -> None:
        """Wait for the last block."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _update(self, block: Any) -> None:
        for one in self._hashes:
            one.update(block)
