"""From the model's thread to the caller's connection, and the caller's leaving back to the model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

from tuoling.serve.jobs import Backend, Delta, Event, Failed, Finished, Job, Order

Receive = Callable[[], Awaitable[Any]]

QUIET_S = 15.0
"""After so long without text a stream says that it is still there, so that proxies do not cut it."""


class CallerGone(Exception):
    """The caller has closed the connection."""


class Listener:
    """One job's events, in the event loop of its connection."""

    def __init__(self, backend: Backend, order: Order) -> None:
        self._backend = backend
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._watch: asyncio.Task[None] | None = None
        self.job = Job(order, self._put)

    def _put(self, event: Event | None) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server has ended
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def submit(self) -> None:
        """Give the job to the backend. Raises what `Backend.submit` raises."""
        await asyncio.to_thread(self._backend.submit, self.job)

    async def events(self, receive: Receive) -> AsyncIterator[Delta | Finished | None]:
        """Until every choice is finished; None after each quiet while. Leaving it cancels what is left.

        Raises the job's error, or CallerGone.
        """
        self._watch = asyncio.create_task(self._leave_with(receive))
        unfinished = len(self.job.order.prompts) * self.job.order.choices
        try:
            while unfinished:
                try:
                    event = await asyncio.wait_for(self._events.get(), QUIET_S)
                except TimeoutError:
                    yield None
                    continue
                if event is None:
                    raise CallerGone
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Finished):
                    unfinished -= 1
                yield event
        finally:
            self._watch.cancel()
            if unfinished:
                self._backend.cancel(self.job)

    async def _leave_with(self, receive: Receive) -> None:
        """Wait for the end of the connection."""
        while (await receive())["type"] != "http.disconnect":
            continue
        self._put(None)
