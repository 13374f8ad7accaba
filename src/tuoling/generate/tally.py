"""What a job has cost and given so far, and how far it may go."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tuoling.generate.request import Answer


@dataclass(frozen=True, slots=True)
class Limits:
    """rows: wanted; None: as many as there are. tokens, cost: never exceeded, by the longest answers asked for.

    price_in, price_out: for a million tokens, in the user's own currency.
    give_up_after: answers in a row that gave no row; the same number of requests in a row that failed.
    """

    rows: int | None = None
    tokens: int | None = None
    cost: float | None = None
    price_in: float = 0.0
    price_out: float = 0.0
    give_up_after: int = 50

    def price(self, tokens_in: int, tokens_out: int) -> float:
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6


@dataclass(slots=True)
class Tally:
    """rows: accepted. steps: accepted candidates that become no row themselves. failed: requests without an answer so far.
    lost: asked when a run was killed.

    lost_in, lost_out: tokens they may have cost, by estimate.
    """

    limits: Limits
    asked: int = 0
    answered: int = 0
    rows: int = 0
    steps: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    unparsable: int = 0
    failed: int = 0
    lost: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    lost_in: int = 0
    lost_out: int = 0
    stopped: str = ""
    """Why a job that is not done ended."""

    def pay(self, answer: Answer) -> None:
        self.answered += 1
        self.tokens_in += answer.prompt_tokens
        self.tokens_out += answer.completion_tokens

    @property
    def tokens(self) -> int:
        """With what lost requests may have cost."""
        return self.tokens_in + self.tokens_out + self.lost_in + self.lost_out

    @property
    def cost(self) -> float:
        """As `tokens`, in money."""
        return self.limits.price(self.tokens_in + self.lost_in, self.tokens_out + self.lost_out)

    @property
    def done(self) -> bool:
        """As many rows as were wanted are there."""
        return self.limits.rows is not None and self.rows >= self.limits.rows

    @property
    def whole(self) -> bool:
        """Done; or, where no number was wanted, everything was answered."""
        return self.done or (self.limits.rows is None and not self.stopped and not self.failed)

    def to_json(self) -> dict[str, Any]:
        """For `--json` and generation.json."""
        return {
            "rows": self.rows,
            "wanted": self.limits.rows,
            "steps": self.steps,
            "rejected": dict(self.rejected.most_common()),
            "unparsable": self.unparsable,
            "requests": self.asked,
            "answered": self.answered,
            "failed": self.failed,
            "lost": self.lost,
            "prompt_tokens": self.tokens_in,
            "completion_tokens": self.tokens_out,
            "lost_tokens": self.lost_in + self.lost_out,
            "cost": round(self.cost, 6),
            "stopped": self.stopped,
        }
