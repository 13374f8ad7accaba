"""What a suite asks: items with a class and, where there is one, a reference answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tuoling.errors import DataError, UsageError
from tuoling.evaluate.classes import ALL, normal_class
from tuoling.language import tr
from tuoling.text.conversation import Conversation

CLASS_COLUMNS = (
    "class",
    "category",
    "kind",
    "task_type",
    "subject",
    "task",
    "type",
    "domain",
    "类别",
    "类型",
    "分类",
)


@dataclass(frozen=True, slots=True)
class Item:
    """One question. place: file:line. group: its class. target: the reference answer, "" where there is none."""

    place: str
    group: str
    conversation: Conversation
    target: str = ""

    @property
    def question(self) -> str:
        """The last question as text."""
        return self.conversation.turns[-1].full_text


@dataclass(slots=True)
class Items:
    """Items of a file, what could not be asked (`place: why`), and which column the classes came from."""

    items: list[Item]
    left_out: list[str] = field(default_factory=list)
    class_column: str | None = None

    def counts(self) -> dict[str, int]:
        """Items a class, the largest first."""
        return dict(Counter(item.group for item in self.items).most_common())


def read_items(
    path: str,
    *,
    class_column: str | None = None,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    belle: bool = False,
) -> Items:
    """Rows of any row format as items; the class stands in `class_column`, by default the first of CLASS_COLUMNS.

    belle: classes in BELLE's one spelling, else as the file has them. limit: that many rows of each class, the first. Raises DataError where no row asks anything, UsageError where
    no row has the named column.
    """
    from tuoling.data.read import read_rows
    from tuoling.data.sources import resolve_sources
    from tuoling.infer.predict import questions_of

    rows = [
        row for source in resolve_sources([path], format=format, columns=columns) for row in read_rows(source)
    ]
    records = [row.record for row in rows]
    column = class_column or _class_column(records)
    if class_column and not any(_value(record, class_column) for record in records):
        raise UsageError(
            tr(f"no row has a column `{class_column}`", f"没有一行含有列 `{class_column}`"),
            where=path,
            remedy=tr("it has: ", "现有列：") + ", ".join(_columns(records)),
        )
    groups = {str(row.place): _group(row.record, column, belle=belle) for row in rows}
    asked, left_out = questions_of(rows)
    if not asked:
        raise DataError(
            tr("no row asks anything", "没有可以提问的数据"), where=left_out[0] if left_out else path
        )
    items = [Item(one.place, groups[one.place], one.conversation, one.target.strip()) for one in asked]
    return Items(first_of_each(items, limit), left_out, column)


def first_of_each(items: Sequence[Item], limit: int | None) -> list[Item]:
    """The first `limit` items of every class, in the file's order."""
    if limit is None:
        return list(items)
    seen: Counter[str] = Counter()
    kept = []
    for item in items:
        seen[item.group] += 1
        if seen[item.group] <= limit:
            kept.append(item)
    return kept


def _class_column(records: Iterable[Any]) -> str | None:
    names = set(_columns(records))
    return next((name for name in CLASS_COLUMNS if name in names), None)


def _columns(records: Iterable[Any]) -> list[str]:
    found: dict[str, None] = {}
    for record in records:
        if isinstance(record, Mapping):
            found.update(dict.fromkeys(map(str, record)))
    return list(found)


def _value(record: Any, column: str) -> str:
    value = record.get(column) if isinstance(record, Mapping) else None
    return str(value).strip() if value is not None else ""


def _group(record: Any, column: str | None, *, belle: bool) -> str:
    name = _value(record, column) if column else ""
    return (normal_class(name) if belle else name) or ALL
