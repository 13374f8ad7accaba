"""Who is next: people at one engine take turns in the order they came."""

from __future__ import annotations

from threading import Condition


class EngineQueue:
    """Lets as many at the engine as it has places; the others wait in line and can see how long the line is."""

    def __init__(self, places: int = 1) -> None:
        self._places = places
        self._line: list[Ticket] = []
        self._moved = Condition()

    def join(self) -> Ticket:
        """A place at the end of the line. It must be left."""
        ticket = Ticket(self)
        with self._moved:
            self._line.append(ticket)
        return ticket

    def ahead(self, ticket: Ticket, wait_s: float) -> int:
        """How many must leave before it is this one's turn; waits a moment for that to change."""
        with self._moved:
            before = self._before(ticket)
            if before:
                self._moved.wait_for(lambda: self._before(ticket) < before, timeout=wait_s)
            return self._before(ticket)

    def leave(self, ticket: Ticket) -> None:
        """Make room. Leaving twice is leaving once."""
        with self._moved:
            if ticket in self._line:
                self._line.remove(ticket)
            self._moved.notify_all()

    def _before(self, ticket: Ticket) -> int:
        return max(0, self._line.index(ticket) + 1 - self._places)

    def __len__(self) -> int:
        """People at the engine and in line."""
        return len(self._line)


class Ticket:
    """A place in line; leaves it at the end of a `with`."""

    def __init__(self, queue: EngineQueue) -> None:
        self._queue = queue

    def ahead(self, wait_s: float) -> int:
        """How many must leave first; 0: go on."""
        return self._queue.ahead(self, wait_s)

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, *error: object) -> None:
        self._queue.leave(self)
