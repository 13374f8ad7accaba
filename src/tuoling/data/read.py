"""Rows: from any source to conversations with their places and problems, one at a time."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tuoling.data.containers import Container, read_container, sniff
from tuoling.data.formats import Detector, formats, get_format
from tuoling.data.json_stream import Raw
from tuoling.data.row import (
    UNKNOWN,
    Place,
    Problem,
    Record,
    Row,
    RowError,
    RowFormat,
    type_name,
)
from tuoling.data.sources import Source
from tuoling.data.verdicts import column_verdicts, judge
from tuoling.language import tr
from tuoling.text.conversation import Conversation

_MODAL_COLUMNS = frozenset(("images", "image", "videos", "video", "audios", "audio", "tools"))


@dataclass(frozen=True, slots=True)
class Guess:
    """What a source was taken for, to be printed. columns: those read as question and answer, where not plain."""

    path: str
    container: str
    format: str
    columns: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """One line for people."""
        names = " → ".join(self.columns)
        return tr(
            f"{self.path}: {self.container}; format {self.format}" + (f" ({names})" if names else ""),
            f"{self.path}：{self.container}；格式 {self.format}" + (f"（{names}）" if names else ""),
        )


def read_rows(source: Source) -> Iterator[Row]:
    """Every row of a source, in order, bad ones with their problems; memory does not grow with the file.

    `source.sample` keeps that many rows, drawn with `source.seed`, in file order (all, where there are fewer). A larger
    sample holds every row of a smaller one.
    Raises DataError for a source that is missing, empty or binary, MissingPackage for Parquet and hub sources.
    """
    reader = RowReader(source)
    for number, raw in numbered_rows(source):
        yield reader.row(number, raw)


def numbered_rows(source: Source) -> Iterator[tuple[int, Raw]]:
    """Number from 1 and content of every row that `read_rows` reads, before anything is made of it."""
    if source.sample is None:
        yield from enumerate(_raw_rows(source), 1)
        return
    count = sum(1 for _ in _raw_rows(source))
    drawn = random.Random(source.seed).sample(range(1, count + 1), count)
    chosen = set(drawn[: source.sample])
    for number, raw in enumerate(_raw_rows(source), 1):
        if number in chosen:
            yield number, raw


def is_trained(name: str, source: Source) -> bool:
    """True where rows of this format are learned from: others only when `source.format` asks for them by name."""
    if name == UNKNOWN:
        return False
    return formats()[name].trainable or source.format == name


def guess(source: Source) -> Guess:
    """What the source is taken for: its container, and the format of its first readable row."""
    reader = RowReader(source)
    words = tr("dataset of the hub", "hub 数据集") if source.hub else _container(source).words
    for number, raw in enumerate(_raw_rows(source), 1):
        row = reader.row(number, raw)
        if row.format != UNKNOWN or number >= 200:
            format = formats().get(row.format)
            record = reader.mapped(row.record)
            reads = format.reads(record) if format and format.reads and isinstance(record, Mapping) else ()
            return Guess(source.path, words, row.format, reads)
    return Guess(source.path, words, UNKNOWN)


def _container(source: Source) -> Container:
    return sniff(source.path, format=source.format, columns=source.columns)


def _raw_rows(source: Source) -> Iterator[Raw]:
    if source.hub is not None:
        from tuoling.data.hub import read_hub_rows

        return read_hub_rows(source)
    return read_container(source.path, _container(source))


class RowReader:
    """Raw records of one source → rows. Remembers what rows of each shape are."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._detect = Detector()
        self._fixed: RowFormat | None = None
        if source.format is not None:
            self._fixed = get_format("text" if source.format == "text_blocks" else source.format)
        self._columns = dict(source.columns or {})
        self._tags = dict(source.tags or {})

    def row(self, number: int, raw: Raw) -> Row:
        """The row of one raw record; never raises for what is in it."""
        line, value, problem, flag = raw
        place = Place(self._source.path, line, number)
        flags = (flag,) if flag is not None else ()
        if problem is not None:
            return Row(place, UNKNOWN, None, (problem,), value, flags)
        if not isinstance(value, Mapping):
            wrong = tr(
                f"the row is {type_name(value)}, want an object", f"这一行是{type_name(value)}，应为对象"
            )
            return Row(place, UNKNOWN, None, (Problem("", "wrong_type", wrong),), value, flags)
        try:
            record = self.mapped(value)
        except RowError as error:
            return Row(place, UNKNOWN, None, (error.problem,), value, flags)
        format = self._fixed or self._detect(record)
        if format is None and (folded := _folded(record)) is not None:
            record, format = folded, self._detect(folded)
        if format is None:
            return Row(place, UNKNOWN, None, (_no_format(record),), value, flags)
        try:
            conversation = format.parse(record)
        except RowError as error:
            return Row(place, format.name, None, (error.problem,), value, flags)
        return self._judged(place, format, conversation, record, value, flags)

    def _judged(
        self,
        place: Place,
        format: RowFormat,
        conversation: Conversation,
        record: Record,
        value: Any,
        flags: tuple[Problem, ...],
    ) -> Row:
        turns = conversation.turns
        if format.turns_field and format.answered and len(turns) > 2 and turns[-1].role == "user":
            conversation = Conversation(turns[:-1])  # what was answered before is worth learning
            field = f"{format.turns_field}[-1]"
            message = tr(
                f"`{field}` has no answer: this last turn is left out",
                f"`{field}` 没有回答：最后这一轮不参与训练",
            )
            flags += (Problem(field, "unanswered_end", message),)
        problems, more = judge(format, conversation, record)
        if more:
            flags += more
        if not _MODAL_COLUMNS.isdisjoint(record):
            beside = column_verdicts(record)
            problems, flags = problems + beside[0], flags + beside[1]
        return Row(place, format.name, conversation, problems, value, flags)

    def mapped(self, record: Any) -> Any:
        """The record under our names: `columns` renames, `tags` rewrites the keys and speakers of its messages.

        Raises RowError where a named column is not there.
        """
        if not isinstance(record, Mapping) or not (self._columns or self._tags):
            return record
        taken = set(self._columns.values())
        renamed = {
            key: value for key, value in record.items() if key not in taken and key not in self._columns
        }
        for ours, theirs in self._columns.items():
            if theirs in record:
                renamed[ours] = record[theirs]
            elif ours not in self._source.optional_columns:
                names = ", ".join(map(str, record))
                message = tr(f"no column `{theirs}`; there are: {names}", f"没有列 `{theirs}`；现有：{names}")
                raise RowError(theirs, "missing_field", message)
        if self._tags:
            for field in ("conversations", "messages"):
                if isinstance(renamed.get(field), list):
                    renamed[field] = [self._retagged(turn) for turn in renamed[field]]
        return renamed

    def _retagged(self, turn: Any) -> Any:
        """One message under our keys and speakers, by LLaMA-Factory's tags."""
        if not isinstance(turn, Mapping):
            return turn
        speakers = {
            self._tags.get(f"{role}_tag"): name
            for role, name in (("user", "user"), ("assistant", "assistant"), ("system", "system"))
        }
        role = turn.get(self._tags.get("role_tag", "from"))
        text = turn.get(self._tags.get("content_tag", "value"))
        return {"role": speakers.get(role, role), "content": text}


def _folded(record: Record) -> Record | None:
    """The record with `Instruction` and ` Answer ` as `instruction` and `answer`; None where that changes nothing."""
    folded = {str(key).strip().casefold(): value for key, value in record.items()}
    return folded if len(folded) == len(record) and list(folded) != list(record) else None


def _no_format(record: Record) -> Problem:
    wrapped = next(
        (
            key
            for key, value in record.items()
            if isinstance(value, list) and value[:1] != [] and isinstance(value[0], Mapping)
        ),
        None,
    )
    if wrapped is not None and len(record) <= 4:
        rows = len(record[wrapped])
        message = tr(
            f"the rows seem to stand in its `{wrapped}` ({rows} of them): save that list as the file",
            f"数据似乎在 `{wrapped}` 里（{rows} 条）：请把这个列表单独存成文件",
        )
        return Problem(wrapped, "unknown_format", message)
    if len(record) > 1 and all(isinstance(value, Mapping) for value in record.values()):
        message = tr(
            f"the rows seem to be the {len(record)} values of one object: save them as a list",
            f"数据似乎是同一个对象里的 {len(record)} 个值：请把它们存成列表",
        )
        return Problem("", "unknown_format", message)
    keys = ", ".join(f"`{key}`" for key in list(record)[:12]) or tr("none", "无")
    return Problem(
        "",
        "unknown_format",
        tr(
            f"no row format has these keys: {keys}; name them with --columns instruction=...,output=... "
            "or choose a --format",
            f"没有哪种数据格式有这些键：{keys}；请用 --columns instruction=…,output=… 说明，或用 --format 指定",
        ),
    )
