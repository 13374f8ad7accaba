"""What decides how rows become examples, and what became of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

_COUNTS = (
    *("rows", "good", "bad", "dropped_overlong", "cut", "split", "left_out"),
    *("examples", "tokens", "learned_tokens", "flagged"),
)


@dataclass(frozen=True)
class StoreSettings:
    """What decides how rows become examples. allow_bad: the share of bad rows that is let pass, 0 to 1.

    max_samples: the first so many rows of each source. Plain text (`stage: pt`) that is too long is split,
    unless `overlong` says drop.
    """

    stage: Literal["sft", "pt"] = "sft"
    max_seq_len: int = 1024
    overlong: Literal["error", "drop", "cut_prompt", "split"] = "error"
    learn: Literal["all", "last"] = "all"
    train_on_inputs: bool = False
    learn_cut_answers: bool = False
    allow_bad: float = 0.0
    max_samples: int | None = None

    @property
    def policy(self) -> str:
        """What is done with rows that are too long."""
        return "split" if self.stage == "pt" and self.overlong != "drop" else self.overlong

    def too_many_bad(self, report: StoreReport) -> bool:
        """Whether more of these rows are bad than is let pass."""
        return report.bad > self.allow_bad * report.rows

    def refuses(self, report: StoreReport) -> bool:
        """Whether these rows, the first of more, are refused already."""
        too_long = self.policy == "error" and report.dropped_overlong > 0
        return too_long or self.too_many_bad(report)


@dataclass
class StoreReport:
    """What became of the rows: rows = good + bad; dropped_overlong, cut and split count among the good."""

    rows: int = 0
    good: int = 0
    bad: int = 0
    dropped_overlong: int = 0
    cut: int = 0
    split: int = 0
    left_out: int = 0
    """Questions with answers of split dialogues that were too long even alone."""
    examples: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    max_len: int = 0
    flagged: int = 0
    formats: dict[str, int] = field(default_factory=dict)
    reused: bool = False
    changed: tuple[str, ...] = ()
    """Why an earlier store was not reused: which parts of its key differ."""
    ledger: Path | None = None
    seconds: float = 0.0
    resumed: int = 0
    """Rows that an interrupted build of the same store had compiled already."""

    def facts(self) -> dict[str, Any]:
        """The part that is the same for two builds of the same rows."""
        return {
            key: value
            for key, value in asdict(self).items()
            if key not in ("reused", "changed", "ledger", "seconds", "resumed")
        }

    def add(self, other: StoreReport) -> None:
        """Count what another part of the rows became."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.max_len = max(self.max_len, other.max_len)
        for name, count in other.formats.items():
            self.formats[name] = self.formats.get(name, 0) + count
