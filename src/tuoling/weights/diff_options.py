"""How a diff is made or applied, and what came of it: the same for every kind of diff."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tuoling.weights.checksums import Checksums


@dataclass(frozen=True, slots=True)
class DiffOptions:
    """What the user asks for.

    workers:       threads at most.
    replace:       files that are there already may be replaced.
    lists:         checksums to compare base, diff and result with (patch).
    checksums_out: a list to be written: the MD5 of base, result and diff files (diff).
    base_hash:     MD5 or SHA-256 of the base file.
    check_base:    False goes on without comparing the base with anything.
    allow_nan:     False refuses a model with NaN or infinity in it, where the kind of diff goes by numbers.
    expected_sum:  what all weights of the result should add up to (an additive diff without a record).
    """

    workers: int = 2
    replace: bool = False
    lists: Checksums | None = None
    checksums_out: Path | None = None
    base_hash: str | None = None
    check_base: bool = True
    allow_nan: bool = False
    expected_sum: float | None = None


@dataclass(frozen=True, slots=True)
class MadeFile:
    """A file that was made. sha256 is that of the model's file, in either direction ("" where it is not known)."""

    name: str
    plain_name: str
    size_bytes: int
    sha256: str


@dataclass(slots=True)
class DiffReport:
    """What was made of what, what the base was compared with, and what the user should know."""

    kind: str
    out: Path
    base: Path
    base_checked_by: str | None = None
    files: list[MadeFile] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    proof: str = ""
    notes: list[str] = field(default_factory=list)
