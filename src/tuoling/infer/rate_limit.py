"""A limit of requests and tokens in any 60 seconds, shared by threads."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

WINDOW_S = 60.0


class Ticket:
    """Room taken in the window; what was really used is told afterwards."""

    __slots__ = ("at", "tokens")

    def __init__(self, at: float, tokens: int) -> None:
        self.at = at
        self.tokens = tokens


class RateLimit:
    """Waits until a request fits. A window that slides, not a bucket: a bucket lets through twice its size in the
    first minute, and servers count by the minute."""

    def __init__(
        self,
        requests_per_minute: int | None,
        tokens_per_minute: int | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        stop: threading.Event | None = None,
    ) -> None:
        self.requests_per_minute = requests_per_minute
        self.tokens_per_minute = tokens_per_minute
        self._clock = clock
        self._stop = stop or threading.Event()
        self._lock = threading.Lock()
        self._taken: deque[Ticket] = deque()
        self._not_before = 0.0

    def pause(self, seconds: float) -> None:
        """Nothing is let through for this long: the server said so to one, all hold."""
        with self._lock:
            self._not_before = max(self._not_before, self._clock() + seconds)

    def take(self, tokens: int) -> Ticket:
        """Wait for room for one request of about `tokens`, and take it. More than a minute's tokens go alone."""
        while True:
            with self._lock:
                wait_s = self.wait_s(tokens)
                if wait_s <= 0:
                    ticket = Ticket(self._clock(), tokens)
                    self._taken.append(ticket)
                    return ticket
            if self._stop.wait(wait_s):
                raise InterruptedError

    def settle(self, ticket: Ticket, tokens: int) -> None:
        """The request used `tokens`, as the server counted."""
        with self._lock:
            ticket.tokens = tokens

    def wait_s(self, tokens: int) -> float:
        """Seconds until `tokens` fit, by what is known now; 0 or less: now."""
        now = self._clock()
        while self._taken and self._taken[0].at <= now - WINDOW_S:
            self._taken.popleft()
        wait_s = self._not_before - now
        if self.requests_per_minute is not None and len(self._taken) >= self.requests_per_minute:
            leaves = self._taken[len(self._taken) - self.requests_per_minute]
            wait_s = max(wait_s, leaves.at + WINDOW_S - now)
        if self.tokens_per_minute is not None and self._taken:
            used = sum(ticket.tokens for ticket in self._taken)
            for ticket in self._taken:
                if used + tokens <= self.tokens_per_minute:
                    break
                used -= ticket.tokens
                wait_s = max(wait_s, ticket.at + WINDOW_S - now)
        return wait_s
