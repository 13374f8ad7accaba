"""A verdict for every row of some sources: what is bad and why, what is there twice, how long rows are."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tuoling.data.duplicates import NearDuplicates, first_of_equal, key_of, spoken
from tuoling.data.formats import formats
from tuoling.data.json_stream import json_line
from tuoling.data.lengths import kept_shares, length_report
from tuoling.data.read import Guess, guess, read_rows
from tuoling.data.row import UNKNOWN, Place, Problem, Row
from tuoling.data.sources import Source
from tuoling.errors import DataError, UsageError
from tuoling.files import atomic_write
from tuoling.language import tr

if TYPE_CHECKING:
    from tuoling.text.templates import Template
    from tuoling.text.tokenizer import TextTokenizer

_BATCH = 512  # rows encoded in one tokenizer call
_SHOWN = 20


@dataclass
class Tally:
    """What is counted of a file, and of all of them."""

    rows: int = 0
    good: int = 0
    bad: int = 0
    duplicates: int = 0
    near_duplicates: int = 0
    overlap: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)
    flags: Counter[str] = field(default_factory=Counter)
    lengths: array[int] = field(default_factory=lambda: array("q"))

    def to_json(self, unit: str) -> dict[str, Any]:
        """The counts under the names of `data check --json`; `kept` only where lengths are tokens."""
        return {
            "rows": self.rows,
            "good": self.good,
            "bad": self.bad,
            "duplicates": self.duplicates,
            "near_duplicates": self.near_duplicates,
            "overlap": self.overlap,
            "formats": dict(self.formats),
            "problems": dict(self.problems),
            "flags": dict(self.flags),
            "lengths": length_report(self.lengths, unit),
            "kept": kept_shares(self.lengths) if unit == "tokens" else None,
        }


@dataclass
class CheckReport:
    """`data check`'s result. examples: the first bad rows. against: rows of the test files, and those also here.
    untrained: format → rows that are read and checked, but only trained when the format is asked for by name."""

    total: Tally
    files: dict[str, Tally]
    guesses: list[Guess]
    unit: str
    ledger: Path | None
    allow_bad: float
    examples: list[tuple[Place, Problem]]
    against: dict[str, int] | None
    near: bool
    untrained: dict[str, int]

    @property
    def passed(self) -> bool:
        """False where more rows are bad than is allowed."""
        return self.total.bad <= self.allow_bad * self.total.rows

    def to_json(self) -> dict[str, Any]:
        """The one object of `--json`; `files` only over several."""
        report = self.total.to_json(self.unit)
        report["ledger"] = str(self.ledger) if self.ledger else None
        report["allow_bad"] = self.allow_bad
        report["passed"] = self.passed
        report["untrained"] = self.untrained
        if self.against is not None:
            report["against"] = self.against
        if not self.near:
            report["near_duplicates"] = None
        if len(self.files) > 1:
            report["files"] = {path: tally.to_json(self.unit) for path, tally in self.files.items()}
        return report


def parse_share(text: str | float) -> float:
    """`1%` or `0.01` → 0.01. Raises UsageError outside 0 to 1."""
    try:
        share = float(text[:-1]) / 100 if isinstance(text, str) and text.endswith("%") else float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise UsageError(
            tr(f"a share of rows is wanted, not {text!r}", f"需要一个比例，而不是 {text!r}"),
            remedy=tr("for example 1% or 0.01", "例如 1% 或 0.01"),
        )
    return share


def check(
    sources: Sequence[Source],
    *,
    against: Sequence[Source] = (),
    tokenizer: TextTokenizer | None = None,
    template: Template | None = None,
    max_seq_len: int | None = None,
    allow_bad: float = 0.0,
    ledger: Path | None = None,
    near: bool = True,
    progress: Callable[[int], None] | None = None,
) -> CheckReport:
    """Read every row of the sources once and judge it.

    With a tokenizer and a template, lengths are tokens and rows over `max_seq_len` are bad. `against`: test files;
    a row overlaps where it asks what a row there asks (a known question with another answer is a leak all the same;
    plain text: the same text). `near=False` leaves out the search for near duplicates. `progress` is told of rows.
    """
    guesses = [guess(source) for source in sources]
    with ExitStack() as stack:
        file = stack.enter_context(atomic_write(ledger)) if ledger else None
        desk = _Desk(file, near=near)
        stack.callback(desk.close)
        measured = tokenizer is not None and template is not None
        for number, source in enumerate(sources):
            rows = read_rows(source)
            if tokenizer is not None and template is not None:
                lengths = _token_lengths(rows, tokenizer, template)
            else:
                lengths = ((row, _characters(row)) for row in rows)
            desk.open_file(number, source.path)
            before = desk.total.rows
            for row, length in lengths:
                desk.take(row, length, max_seq_len if measured else None)
                if progress and desk.total.rows % 1000 == 0:
                    progress(1000)
            if desk.total.rows == before:
                raise DataError(
                    tr("there are no rows in it", "里面没有任何数据行"),
                    where=source.path,
                    remedy=tr("check that it was written whole", "请确认它已完整写出"),
                )
        desk.find_duplicates()
        found = desk.find_overlap(against) if against else None
    return CheckReport(
        desk.total,
        desk.files,
        guesses,
        "tokens" if measured else "characters",
        ledger,
        allow_bad,
        desk.examples,
        found,
        near,
        _untrained(sources, desk.total),
    )


def _untrained(sources: Sequence[Source], total: Tally) -> dict[str, int]:
    asked = {source.format for source in sources}
    known = formats()
    return {
        name: count
        for name, count in total.formats.items()
        if name in known and not known[name].trainable and name not in asked
    }


def _characters(row: Row) -> int:
    if row.conversation is None:
        return 0
    return sum(len(turn.text) + len(turn.context) for turn in row.conversation.turns)


def _token_lengths(
    rows: Iterator[Row], tokenizer: TextTokenizer, template: Template
) -> Iterator[tuple[Row, int]]:
    """Each row with its length in tokens under the template; 0 for rows that are bad already."""
    while batch := list(islice(rows, _BATCH)):
        segments = []
        for row in batch:
            if row.conversation is not None and not row.problems:
                answered = row.conversation.answer is not None or row.conversation.is_plain_text
                render = template.render if answered else template.prompt
                segments.append(render(row.conversation))
        encoded = iter(tokenizer.encode_batch(segments))
        for row in batch:
            good = row.conversation is not None and not row.problems
            yield row, len(next(encoded)[0]) if good else 0


class _Desk:
    """Takes rows one by one, counts them, writes the ledger, and keeps what the later questions need."""

    def __init__(self, ledger: IO[str] | None, *, near: bool) -> None:
        self.total = Tally()
        self.files: dict[str, Tally] = {}
        self.examples: list[tuple[Place, Problem]] = []
        self._ledger = ledger
        self._near = NearDuplicates() if near else None
        self._tallies: list[Tally] = []
        self._paths: list[str] = []
        self._keys = array("Q")
        self._questions = array("Q")
        self._file_of = array("H")
        self._line_of = array("q")
        self._row_of = array("q")
        self._format_of = array("H")
        self._formats: list[str] = []

    def close(self) -> None:
        if self._near is not None:
            self._near.close()

    def open_file(self, number: int, path: str) -> None:
        """Rows taken from now on are of this file."""
        name = path if path not in self.files else f"{path} ({number + 1})"
        self.files[name] = Tally()
        self._tallies.append(self.files[name])
        self._paths.append(path)

    def take(self, row: Row, length: int, limit: int | None) -> None:
        """Count one row."""
        problems = row.problems
        if limit is not None and length > limit:
            message = tr(f"{length} tokens, the limit is {limit}", f"有 {length} 个 token，上限是 {limit}")
            problems = (*problems, Problem("", "overlong", message))
        for tally in (self.total, self._tallies[-1]):
            tally.rows += 1
            tally.formats[row.format] += 1
            for code in {problem.code for problem in problems}:
                tally.problems[code] += 1
            for code in {flag.code for flag in row.flags}:
                tally.flags[code] += 1
            if length:
                tally.lengths.append(length)
            if problems:
                tally.bad += 1
            else:
                tally.good += 1
        for problem in problems:
            self._write(row.place, row.format, "bad", problem)
        for flag in row.flags:
            self._write(row.place, row.format, "flag", flag)
        if problems and len(self.examples) < _SHOWN:
            self.examples.append((row.place, problems[0]))
        if not problems and row.conversation is not None:
            self._remember(row)

    def _remember(self, row: Row) -> None:
        assert row.conversation is not None
        if row.format not in self._formats:
            self._formats.append(row.format)
        said, asked = spoken(row.conversation)
        self._keys.append(key_of(said))
        self._questions.append(key_of(asked))
        self._file_of.append(len(self._tallies) - 1)
        self._line_of.append(row.place.line)
        self._row_of.append(row.place.row)
        self._format_of.append(self._formats.index(row.format))
        if self._near is not None:
            self._near.add(said)

    def _place(self, index: int) -> Place:
        return Place(self._paths[self._file_of[index]], self._line_of[index], self._row_of[index])

    def _note(self, index: int, verdict: str, problem: Problem) -> None:
        self._write(self._place(index), self._formats[self._format_of[index]], verdict, problem)

    def _count(self, index: int, name: str) -> None:
        for tally in (self.total, self._tallies[self._file_of[index]]):
            setattr(tally, name, getattr(tally, name) + 1)

    def _write(self, place: Place, format: str, verdict: str, problem: Problem) -> None:
        if self._ledger is None:
            return
        entry = {
            "file": place.path,
            "line": place.line,
            "row": place.row,
            "format": format if format != UNKNOWN else None,
            "verdict": verdict,
            "field": problem.field,
            "code": problem.code,
            "message": problem.message,
        }
        self._ledger.write(json_line(entry))

    def find_duplicates(self) -> None:
        """Count good rows that repeat an earlier good one: word for word, or nearly."""
        firsts = first_of_equal(np.frombuffer(self._keys, np.uint64))
        for index in np.flatnonzero(firsts != np.arange(len(firsts))):
            self._count(int(index), "duplicates")
            message = tr(
                f"says the same as {self._place(int(firsts[index]))}",
                f"与 {self._place(int(firsts[index]))} 相同",
            )
            self._note(int(index), "duplicate", Problem("", "duplicate", message))
        if self._near is None:
            return
        seen: set[int] = set()
        for later, earlier, score in self._near.pairs(firsts):
            if later in seen:
                continue
            seen.add(later)
            self._count(later, "near_duplicates")
            place = self._place(earlier)
            message = tr(
                f"says nearly the same as {place} ({score:.2f})", f"与 {place} 几乎相同（{score:.2f}）"
            )
            self._note(later, "near_duplicate", Problem("", "near_duplicate", message))

    def find_overlap(self, against: Sequence[Source]) -> dict[str, int]:
        """Count good rows whose question stands in the test files; {"rows", "found"} of the test files' rows."""
        places: dict[int, Place] = {}
        keys = array("Q")
        for source in against:
            for row in read_rows(source):
                if row.conversation is not None:
                    key = key_of(spoken(row.conversation)[1])
                    keys.append(key)
                    places.setdefault(key, row.place)
        ours: NDArray[np.uint64] = np.frombuffer(self._questions, np.uint64)
        theirs: NDArray[np.uint64] = np.frombuffer(keys, np.uint64)
        for index in np.flatnonzero(np.isin(ours, theirs)):
            self._count(int(index), "overlap")
            place = places[int(ours[index])]
            message = tr(f"asks the same as {place}", f"与 {place} 的问题相同")
            self._note(int(index), "overlap", Problem("", "overlap", message))
        return {"rows": len(theirs), "found": int(np.isin(theirs, ours).sum())}
