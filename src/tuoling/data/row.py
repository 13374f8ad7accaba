"""What a row is: where it stands, what was read from it, what is wrong with it.

A row format is one file in `formats/` that defines `FORMAT`, a `RowFormat`; nothing else lists it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tuoling.language import tr
from tuoling.text.conversation import Conversation

Record = Mapping[str, Any]
UNKNOWN = "unknown"
"""Format of a row that could not be read as any."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row starts: 1-based line (the row number where there are no lines), 1-based row number."""

    path: str
    line: int
    row: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a row is bad, or (as a flag) what to look at in a good one. `code` is stable, `message` is for people."""

    field: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Row:
    """One raw record and what was made of it.

    conversation: as far as it could be read, even with problems; None where there is none.
    problems: empty for a good row. flags: what was noticed in a row that stays good.
    record: the record as it stands in the file, untouched.
    """

    place: Place
    format: str
    conversation: Conversation | None
    problems: tuple[Problem, ...]
    record: Any
    flags: tuple[Problem, ...] = ()


class RowError(Exception):
    """A record that cannot be read as its format; becomes the row's problem."""

    def __init__(self, field: str, code: str, message: str) -> None:
        super().__init__(message)
        self.problem = Problem(field, code, message)


@dataclass(frozen=True, slots=True)
class RowFormat:
    """How one row format is recognised and read.

    matches:   True where the record is of this format; with `by_shape` it may look only at the keys and the types
               of the values (its verdict is remembered for rows of the same shape), else also at their content.
    parse:     record → conversation; raises RowError.
    trainable: False for formats that are read and checked but only trained when asked for by name.
    answered:  True where a row without an answer is a bad one.
    rank:      lower is asked first; formats whose keys are a superset of another's stand before it.
    question_field, answer_field, turns_field: what problems name.
    reads:     columns taken for question and answer, for the printed guess.
    """

    name: str
    matches: Callable[[Record], bool]
    parse: Callable[[Record], Conversation]
    question_field: str
    answer_field: str
    turns_field: str = ""
    trainable: bool = True
    answered: bool = True
    by_shape: bool = True
    rank: int = 50
    reads: Callable[[Record], tuple[str, ...]] | None = None


def type_name(value: Any) -> str:
    """A JSON type in words, for messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return tr("a boolean", "布尔值")
    if isinstance(value, int | float):
        return tr("a number", "数字")
    if isinstance(value, str):
        return tr("text", "文本")
    if isinstance(value, list | tuple):
        return tr("a list", "列表")
    if isinstance(value, Mapping):
        return tr("an object", "对象")
    return type(value).__name__


def wrong_type(field: str, value: Any, want: str = "") -> RowError:
    """The error for a value of another type than text (or `want`)."""
    wanted = want or tr("text", "文本")
    return RowError(
        field,
        "wrong_type",
        tr(
            f"`{field}` is {type_name(value)}, want {wanted}", f"`{field}` 是{type_name(value)}，应为{wanted}"
        ),
    )


def text_of(record: Record, field: str) -> str:
    """The text of a field that must be there; null reads as empty. Raises RowError."""
    try:
        value = record[field]
    except KeyError:
        raise RowError(field, "missing_field", tr(f"`{field}` is not there", f"缺少字段 `{field}`")) from None
    if type(value) is str:
        return value
    if value is None:
        return ""
    raise wrong_type(field, value)


def optional_text(record: Record, field: str) -> str:
    """The text of a field that may be missing, null or empty. Raises RowError for another type."""
    value = record.get(field)
    if value is None:
        return ""
    if type(value) is str:
        return value
    raise wrong_type(field, value)
