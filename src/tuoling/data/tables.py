"""CSV, TSV and Parquet as records with the column names as keys."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from tuoling.data.json_stream import Raw
from tuoling.data.row import Problem
from tuoling.errors import DataError, MissingPackage
from tuoling.language import tr

_CELL_LIMIT = 1 << 24
DELIMITERS = {"\t": "TSV", ",": "CSV", ";": "CSV (;)", "|": "CSV (|)"}
"""What cells stand between, the most telling first, and what such a file is called."""

_KNOWN = {
    "instruction", "input", "output", "system", "history", "target", "question", "answer", "prompt", "response",
    "query", "completion", "ask", "text", "content", "title", "department", "id", "label", "context", "chosen",
    "rejected", "predict", "class", "category", "problem", "solution", "q", "a", "name", "type", "std_answer",
    "问题", "回答", "答案", "提问", "问", "答", "指令", "输入", "输出", "科室", "标题", "文本", "类别",
}  # fmt: skip
_WITHOUT_HEADER = {2: ("question", "answer"), 3: ("instruction", "input", "output")}


@dataclass(frozen=True, slots=True)
class Table:
    """How a table is written. columns: names; header: the first row holds them."""

    delimiter: str
    columns: tuple[str, ...]
    header: bool


def sniff_table(
    head: str, *, complete: bool, named: Sequence[str] = (), likely: bool = False
) -> Table | None:
    """How the text's beginning is a table, or None where it is none.

    named: columns the user speaks of; `likely`: the file's name says it is a table, which only breaks ties.
    A first row of known (or named) column names is a header. Without one, every row must have the same number of
    cells; tabs are believed from the first row on, commas (they stand in prose too) only with quotes around cells,
    names, or `likely`; semicolons and bars only below a header or with `likely`. One column needs a header and
    `likely`.
    """
    for delimiter in DELIMITERS:
        rows = _first_rows(head, delimiter, complete)
        if not rows:
            continue
        first = [cell.strip().lstrip("\ufeff") for cell in rows[0]]
        if len(first) < 2:
            if likely and delimiter == "," and _is_lone_header(first[0], rows):
                return Table(delimiter, tuple(first), True)
            continue
        header = _is_header(first, named)
        widths = {len(row) for row in rows}
        if header and (len(rows) == 1 or sum(len(row) == len(first) for row in rows) * 2 > len(rows)):
            return Table(delimiter, tuple(first), True)
        numbered = bool(named) and all(name.isdigit() for name in named)
        believed = (
            delimiter == "\t"
            or likely
            or numbered
            or (delimiter == "," and len(rows) > 1 and head.lstrip().startswith('"'))
        )
        if len(widths) == 1 and believed:
            names = _WITHOUT_HEADER.get(len(first), ()) if not numbered else ()
            return Table(delimiter, names or tuple(str(i + 1) for i in range(len(first))), False)
    return None


def _is_lone_header(name: str, rows: list[list[str]]) -> bool:
    return name.lower() in _KNOWN and all(len(row) == 1 for row in rows)


def _is_header(cells: list[str], named: Sequence[str]) -> bool:
    if len(set(cells)) != len(cells) or not all(0 < len(cell) <= 40 for cell in cells):
        return False
    if named and not all(name.isdigit() for name in named):
        return any(name in cells for name in named)
    known = sum(cell.lower() in _KNOWN for cell in cells)
    return known >= 2 or (
        known == 1 and len(cells) <= 3 and all(c.isascii() and c.isidentifier() for c in cells)
    )


def _first_rows(head: str, delimiter: str, complete: bool) -> list[list[str]]:
    """The first rows with cells in them; the last one is left out where the head may have cut it."""
    csv.field_size_limit(_CELL_LIMIT)
    rows = []
    try:
        for row in csv.reader(io.StringIO(head), delimiter=delimiter):
            if any(cell.strip() for cell in row):
                rows.append(row)
            if len(rows) > 200:
                return rows
    except csv.Error:
        return []
    return rows if complete else rows[:-1]


def read_table(file: TextIO, table: Table) -> Iterator[Raw]:
    """One record a row: quotes and line ends inside cells are read; a row of another width is a bad one."""
    csv.field_size_limit(_CELL_LIMIT)
    quotes, last = 0, ""
    opened = re.compile(rf'(?:^|{re.escape(table.delimiter)})"')

    def counted() -> Iterator[str]:
        nonlocal quotes, last
        for last in file:  # kept, to look at again when its row turns out to be odd
            quotes += last.count('"')
            yield last

    reader = csv.reader(counted(), delimiter=table.delimiter)
    header_pending = table.header
    while True:
        line, before = reader.line_num + 1, quotes
        try:
            cells = next(reader, None)
        except csv.Error as error:
            message = tr(f"not CSV: {error}", f"不是合法的 CSV：{error}")
            yield line, "", Problem("", "not_csv", message), None
            continue
        if cells is None:
            return
        if not any(cell.strip() for cell in cells):
            continue
        if header_pending:
            header_pending = False
            continue
        odd = (quotes - before) % 2 == 1
        yield (
            line,
            *_record(cells, table, open_quote=odd and (reader.line_num > line or bool(opened.search(last)))),
        )


def _record(
    cells: list[str], table: Table, *, open_quote: bool
) -> tuple[Any, Problem | None, Problem | None]:
    if open_quote:
        message = tr(
            "a quote is never closed: the file ends inside this row", "引号没有闭合：文件在这一行中间结束"
        )
        return cells, Problem("", "not_csv", message), None
    width = len(table.columns)
    if len(cells) > width and not any(cell.strip() for cell in cells[width:]):
        cells = cells[:width]
    if len(cells) != width:
        message = tr(f"{len(cells)} cells, want {width}", f"有 {len(cells)} 个单元格，应为 {width} 个")
        return cells, Problem("", "wrong_width", message), None
    return dict(zip(table.columns, cells, strict=True)), None, None


def read_parquet(path: str) -> Iterator[Raw]:
    """One record a row, batch by batch; the row number stands for the line. Needs the extra `hub`."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingPackage("pyarrow", extra="hub", purpose=tr("reading Parquet", "读取 Parquet")) from error
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record, None, None
    except (arrow.ArrowException, OSError) as error:
        raise DataError(
            tr(f"broken Parquet: {error}", f"Parquet 文件已损坏：{error}"),
            where=path,
            remedy=tr("download or write it again", "重新下载或重新生成"),
        ) from error
