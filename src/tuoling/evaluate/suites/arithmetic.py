"""Exact numbers: MGSM's TSV, GSM8K's and Ape210K's JSONL, or any rows whose answer holds a number."""

from __future__ import annotations

import csv
import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from tuoling.data.read import read_rows
from tuoling.data.sources import resolve_sources
from tuoling.errors import DataError
from tuoling.evaluate.items import ALL, Item, Items, first_of_each, read_items
from tuoling.language import tr
from tuoling.text.conversation import Conversation, Turn

_NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s*/\s*\d+)?\s*%?"
_FOUND = re.compile(rf"(?<![\w.])(?:{_NUMBER})|(?<=[^\x00-\x7f])(?:{_NUMBER})")
_MARKS = re.compile(r"####|\\boxed\s*\{|(?:最终)?答案(?:是|为|:)?|(?:the )?answer(?: is|:)", re.IGNORECASE)


def number_of(text: str) -> Fraction | None:
    """The number that an answer ends with: after the last mark of a result (####, \\boxed{, 答案, answer) that a number
    follows, else the last number in the text. Thousands' commas, fractions, per cent and full width are read."""
    plain = unicodedata.normalize("NFKC", text).replace("：", ":").replace("−", "-").replace("\\%", "%")
    for mark in reversed(list(_MARKS.finditer(plain))):
        found = _FOUND.search(plain, mark.end())
        if found:
            return _value(found.group())
    every = _FOUND.findall(plain)
    return _value(every[-1]) if every else None


def _value(text: str) -> Fraction | None:
    plain = text.replace(",", "").replace(" ", "")
    percent = plain.endswith("%")
    over, _, under = plain.rstrip("%").partition("/")
    if under and not int(under):
        return None
    value = Fraction(over) / (Fraction(under) if under else 1)
    return value / 100 if percent else value


def same_number(answer: str, target: str) -> float:
    """1 where both end with the same number (to six digits: 0.333333 is 1/3; 25 stands for 25%)."""
    said, wanted = number_of(answer), number_of(target)
    if said is None or wanted is None:
        return 0.0
    if "%" in target and "%" not in answer and said == wanted * 100:
        return 1.0
    return float(abs(said - wanted) <= Fraction(1, 10**6) * max(Fraction(1), abs(wanted)))


def read_arithmetic(path: str, *, limit: int | None = None, class_column: str | None = None) -> Items:
    """Questions whose reference ends with a number. Rows whose reference has none are left out and named.

    Raises DataError where no row has a question and a number.
    """
    if Path(path).suffix.lower() == ".tsv" and (rows := _headless(Path(path))) is not None:
        found = Items([_item(path, line, question, answer) for line, question, answer in rows])
    elif (ape := _ape_rows(path)) is not None:
        found = Items(ape)
    else:
        found = read_items(path, class_column=class_column)
    kept = [item for item in found.items if number_of(item.target) is not None]
    without = [item for item in found.items if number_of(item.target) is None]
    found.left_out += [
        f"{item.place}: " + tr("no number in its answer", "参考答案里没有数字") for item in without
    ]
    if not kept:
        raise DataError(
            tr("no row has an answer with a number", "没有一行的参考答案里有数字"),
            where=path,
            remedy=tr("question<TAB>18, or {question, answer}", "question<TAB>18，或 {question, answer}"),
        )
    found.items = first_of_each(kept, limit)
    return found


def _headless(path: Path) -> list[tuple[int, str, str]] | None:
    """(line, question, answer) of a TSV of two columns without a header, as MGSM's files; None for another shape."""
    from tuoling.data.encoding import missing_file

    if not path.is_file():
        raise missing_file(str(path))
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = [
            (number, row)
            for number, row in enumerate(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE), 1)
            if row
        ]
    if not rows or any(len(row) != 2 for _, row in rows) or number_of(rows[0][1][1]) is None:
        return None
    return [(number, row[0], row[1]) for number, row in rows]


def _item(path: str, line: int, question: str, answer: str) -> Item:
    return Item(f"{path}:{line}", ALL, Conversation((Turn("user", question.strip()),)), answer.strip())


def _ape_rows(path: str) -> list[Item] | None:
    """Ape210K: {"original_text", "ans"}; None where the first row has another shape."""
    rows = _records(path)
    items = []
    for place, record in rows:
        if not {"original_text", "ans"} <= set(record):
            return None
        line = int(place.rsplit(":", 1)[1])
        items.append(_item(path, line, str(record["original_text"]), str(record["ans"])))
    return items or None


def _records(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for source in resolve_sources([path]):
        for row in read_rows(source):
            if isinstance(row.record, dict):
                yield str(row.place), row.record
