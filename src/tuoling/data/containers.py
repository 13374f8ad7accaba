"""What kind of file rows stand in (JSON lines, JSON values, a table, text, Parquet), by content; and its rows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TextIO

from tuoling.data.encoding import HEAD_BYTES, READ_ERRORS, Encoding, detect_encoding, open_text, read_head
from tuoling.data.json_stream import Raw, read_json_lines, read_json_values
from tuoling.data.row import Problem
from tuoling.data.tables import DELIMITERS, Table, read_parquet, read_table, sniff_table
from tuoling.errors import DataError
from tuoling.language import tr

Kind = Literal["json_lines", "json_values", "table", "text", "text_blocks", "parquet"]

_ARRAY_START = re.compile(r'\[\s*(?:[{\]\["]|$|-?\d)')
_WEB_PAGE = re.compile(r"<(?:!doctype\s+html|html)\b", re.IGNORECASE)
_JSON_NAME = re.compile(r"\.(json|jsonl|ndjson)(\.gz)?$", re.IGNORECASE)
_TABLE_NAME = re.compile(r"\.(csv|tsv)(\.gz)?$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Container:
    """A file's kind and encoding, and how its table is written where it is one."""

    kind: Kind
    encoding: Encoding
    table: Table | None = None

    @property
    def words(self) -> str:
        """For the printed guess."""
        kind = {
            "json_lines": tr("JSON lines", "JSON 行"),
            "json_values": tr("JSON array or objects", "JSON 数组或对象"),
            "text": tr("plain text, one row a line", "纯文本，每行一条"),
            "text_blocks": tr("plain text, one row a block", "纯文本，每段一条"),
            "parquet": "Parquet",
        }.get(self.kind, "")
        if self.table is None:
            return kind if self.kind == "parquet" else f"{kind}{tr(', ', '，')}{self.encoding.words}"
        name = DELIMITERS[self.table.delimiter]
        header = tr("with a header", "有表头") if self.table.header else tr("without a header", "无表头")
        columns = ", ".join(self.table.columns)
        return tr(
            f"{name} {header} ({columns}), {self.encoding.words}",
            f"{name} {header}（{columns}），{self.encoding.words}",
        )


def sniff(path: str, *, format: str | None = None, columns: Mapping[str, str] | None = None) -> Container:
    """Look into the file. format, columns: what the user said of it. Raises DataError (missing, empty, binary)."""
    encoding = detect_encoding(path)
    if encoding.name == "parquet":
        return Container("parquet", encoding)
    head = read_head(path, encoding)
    complete = len(head) < HEAD_BYTES
    start = head.lstrip("\ufeff \t\r\n")
    _refuse_stand_ins(path, start, format)
    if start.startswith("{"):
        return Container("json_lines" if _is_json_lines(start, complete) else "json_values", encoding)
    if _ARRAY_START.match(start) and not _is_bracketed_text(start):
        return Container("json_values", encoding)
    if "\n{" in start and format not in ("text", "text_blocks") and _is_json_lines(start, complete):
        return Container("json_lines", encoding)  # below a first line that is no row
    if format == "text_blocks":
        return Container("text_blocks", encoding)
    named = tuple((columns or {}).values())
    likely = bool(_TABLE_NAME.search(path))
    if format != "text" or columns:
        table = sniff_table(head, complete=complete, named=named, likely=likely)
        if table is not None:
            return Container("table", encoding, table)
    return Container("text", encoding)


def _refuse_stand_ins(path: str, start: str, format: str | None) -> None:
    """Raise DataError for what a failed download leaves in the place of the data."""
    if start.startswith("version https://git-lfs"):
        raise DataError(
            tr("a Git LFS pointer, not the data itself", "这是 Git LFS 指针，不是数据本身"),
            where=path,
            remedy=tr("run `git lfs pull` where it was cloned", "在克隆的仓库里运行 git lfs pull"),
        )
    if format not in ("text", "text_blocks") and _WEB_PAGE.match(start):
        raise DataError(
            tr("a web page, not rows", "这是网页，不是数据行"),
            where=path,
            remedy=tr(
                "download the file itself, or read it as text with --format text",
                "请下载文件本身；若就是要当纯文本读，加 --format text",
            ),
        )


def _is_json_lines(start: str, complete: bool) -> bool:
    """True where the first line is a whole object, or most lines look like one and some are."""
    lines = [line for line in start.split("\n")[:200] if line.strip()]
    if not complete and len(lines) > 1 and len(lines) < 200:
        lines.pop()
    if len(lines) == 1 and not complete:  # one line longer than the head: the decoder will tell
        return "\n" in start
    whole = sum(_is_object(line) for line in lines[:50])
    if lines and _is_object(lines[0]):
        return True
    looks = sum(line.startswith("{") and len(line.strip()) > 1 for line in lines)
    return whole > 0 and looks * 2 > len(lines)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _is_bracketed_text(start: str) -> bool:
    """True for prose that begins with a bracket (`[1] A note`) rather than an array of rows."""
    if re.match(r"\[\s*[{\[]", start):
        return False
    try:
        _, end = json.JSONDecoder().raw_decode(start)
    except (ValueError, RecursionError):
        return not re.match(r'\[\s*("|$)', start)
    return not re.match(r"\s*($|[\[{,])", start[end:])


def read_container(path: str, container: Container) -> Iterator[Raw]:
    """The file's rows in order, one at a time: memory does not grow with the file."""
    if container.kind == "parquet":
        yield from read_parquet(path)
        return
    flag = _not_what_it_is_named(path) if container.kind == "text" else None
    with open_text(path, container.encoding) as file:
        line = 0
        try:
            for raw in _rows(file, container):
                line = raw[0]
                yield raw if flag is None else (*raw[:3], flag)
                flag = None
        except READ_ERRORS as error:
            message = tr(f"the gzip is cut near here: {error}", f"gzip 在这附近被截断：{error}")
            yield line + 1, "", Problem("", "cut_file", message), None


def _not_what_it_is_named(path: str) -> Problem | None:
    """The flag of a file that says JSON by its name and holds none; its first row carries it."""
    if not _JSON_NAME.search(path):
        return None
    message = tr(
        "named JSON, but there is none in it: every line is read as plain text",
        "文件名说是 JSON，内容却不是：每一行都按纯文本读取",
    )
    return Problem("", "not_json_inside", message)


def _rows(file: TextIO, container: Container) -> Iterator[Raw]:
    if container.kind == "json_lines":
        return read_json_lines(file)
    if container.kind == "json_values":
        return read_json_values(file)
    if container.table is not None:
        return read_table(file, container.table)
    return _text_lines(file) if container.kind == "text" else _text_blocks(file)


def _text_lines(file: TextIO) -> Iterator[Raw]:
    """One row a line that is not blank."""
    for number, line in enumerate(file, 1):
        if line.strip():
            yield number, {"text": line.rstrip("\n")}, None, None


def _text_blocks(file: TextIO) -> Iterator[Raw]:
    """One row a block of lines between blank lines."""
    start, lines = 0, []
    for number, line in enumerate(file, 1):
        if line.strip():
            start = start or number
            lines.append(line)
        elif lines:
            yield start, {"text": "".join(lines).rstrip("\n")}, None, None
            start, lines = 0, []
    if lines:
        yield start, {"text": "".join(lines).rstrip("\n")}, None, None
