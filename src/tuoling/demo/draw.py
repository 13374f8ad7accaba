"""A seeded hand that draws combinations, each on one side of the line between training and held out."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from tuoling.demo import words

T = TypeVar("T")

HELD_OUT_SHARE = 8
"""One combination in eight is kept from everything that is trained on."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One combination, told as a conversation and as plain text.

    key:     what was combined, whatever the wording: decides the side of the line.
    turns:   user, assistant, user, assistant, …; ends with the answer that is asked for.
    plain:   the same knowledge without any question or template, for pre-training.
    context: the material a single question works on (Alpaca's `input`).
    """

    key: tuple[object, ...]
    turns: tuple[str, ...]
    plain: str
    context: str = ""


@dataclass(slots=True)
class Draw:
    """Random choices from the words of one side: `held_out` people and assistants never meet training."""

    seed: int
    held_out: bool
    stream: str
    around: str = ""
    rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(f"{self.seed}:{self.held_out}:{self.stream}")

    def allows(self, *key: object) -> bool:
        """True if this combination belongs to our side: a function of the seed and the key alone."""
        drawn = zlib.crc32(f"{self.seed}:{key!r}".encode()) % HELD_OUT_SHARE == 0
        return drawn is self.held_out

    def one(self, choices: Sequence[T]) -> T:
        """One of them."""
        return self.rng.choice(choices)

    def some(self, choices: Sequence[T], count: int) -> list[T]:
        """`count` different ones, in random order."""
        return self.rng.sample(choices, count)

    def number(self, low: int, high: int) -> int:
        """An integer from `low` to `high`, both included."""
        return self.rng.randint(low, high)

    def digits(self, count: int) -> str:
        """A string of digits that does not begin with 0."""
        return str(self.number(10 ** (count - 1), 10**count - 1))

    def chance(self, probability: float) -> bool:
        """True this often."""
        return self.rng.random() < probability

    def person(self) -> str:
        """A person's name of our side."""
        while not self.allows("person", name := self.one(words.SURNAMES) + self.one(words.GIVEN_NAMES)):
            pass
        return self.around.join(("", *name, "")) if self.around else name

    def assistant(self) -> str:
        """An assistant's name of our side."""
        while not self.allows("assistant", name := self.one(words.ASSISTANT_NAMES)):
            pass
        return self.around.join(("", *name, "")) if self.around else name

    def time(self) -> str:
        """A moment such as 明天上午九点."""
        part = self.one(list(words.HOURS))
        return self.one(words.DAYS) + part + self.one(words.HOURS[part])
