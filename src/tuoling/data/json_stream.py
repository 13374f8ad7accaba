"""JSON rows read as a stream: lines, arrays of any size, objects one after another; broken ones are survived.

Every reader yields `Raw` tuples: (line where the row starts, value, problem, flag). A row with a problem has the
broken text as its value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

from tuoling.data.row import Problem
from tuoling.language import tr

Raw = tuple[int, Any, Problem | None, Problem | None]

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r\ufeff]*")
_FIRST_KEY = re.compile(r'\{\s*("(?:[^"\\]|\\.){1,80}")\s*:')
_CHUNK = 1 << 20
_WINDOW_LIMIT = 64 << 20  # characters of one row before it is called broken
_EXCERPT = 200


def json_line(value: Any) -> str:
    """The value on one line, UTF-8 as it is; half a character (a lone surrogate) stays an escape."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, default=str)
    return text + "\n"


_IN_CHINESE = {
    "Expecting value": "这里应为一个值",
    "Expecting ',' delimiter": "这里应为逗号",
    "Expecting ':' delimiter": "这里应为冒号",
    "Expecting property name enclosed in double quotes": "这里应为双引号括起的键",
    "Illegal trailing comma before end of object": "对象结尾前多了逗号",
    "Illegal trailing comma before end of array": "数组结尾前多了逗号",
    "Unterminated string starting at": "字符串没有结束，它始于这里",
    "Invalid control character at": "字符串里有未转义的控制字符",
    "Invalid \\escape": "反斜杠转义不合法",
    "Invalid \\uXXXX escape": "\\uXXXX 转义不合法",
    "Extra data": "一个值之后还有多余的内容",
}


def said(error: Exception) -> str:
    """What the decoder says, in the user's language."""
    if isinstance(error, RecursionError):
        return tr("nested too deeply", "嵌套太深")
    message = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    return tr(message, _IN_CHINESE.get(message.rstrip(": "), message))


def not_json(message: str, *, line: int | None = None, column: int | None = None) -> Problem:
    """The problem of a row that does not parse. line: where it is not the row's own."""
    where = ""
    if column is not None:
        where = tr(f" (column {column})", f"（第 {column} 列）")
    if line is not None:
        where = tr(f" (line {line}, column {column})", f"（第 {line} 行第 {column} 列）")
    return Problem("", "not_json", tr(f"not JSON: {message}{where}", f"不是合法的 JSON：{message}{where}"))


def read_json_lines(file: TextIO) -> Iterator[Raw]:
    """One value a line; blank lines are no rows."""
    loads = json.loads
    for number, line in enumerate(file, 1):
        try:
            value = loads(line)
        except (ValueError, RecursionError) as error:
            if line.strip("\ufeff \t\r\n"):
                yield from _odd_line(number, line, error)
            continue
        yield number, value, None, None


def _odd_line(number: int, line: str, error: Exception) -> Iterator[Raw]:
    """A line that is not one JSON value: several values, a comma after it, or broken."""
    values: list[Any] = []
    position, comma = 0, False
    text = line.rstrip("\n")
    try:
        while position < len(text):
            position = _SPACE.match(text, position).end()  # type: ignore[union-attr]
            if values and text[position : position + 1] == ",":
                comma, position = True, position + 1
                continue
            if position == len(text):
                break
            value, position = _DECODER.raw_decode(text, position)
            values.append(value)
    except (ValueError, RecursionError):
        values = []
    if not values or not all(isinstance(value, dict) for value in values):
        column = error.colno if isinstance(error, json.JSONDecodeError) else 1
        yield number, text[:_EXCERPT], not_json(said(error), column=column), None
        return
    flag = Problem("", "json_syntax", tr("a comma after the row", "行尾多了逗号")) if comma else None
    for value in values:
        yield number, value, None, flag


class JsonValues:
    """The elements of a JSON array, or objects one after another, out of a growing window of text."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._window = ""
        self._at = 0
        self._ended = False
        self._line = 1
        self._counted = 0
        self._before = 0  # characters of the window's first line that were forgotten
        self._indent: str | None = None
        self._first_key = ""

    def __iter__(self) -> Iterator[Raw]:
        in_array = lost_tail = False
        while True:
            char = self._peek()
            if not char:
                if in_array and not lost_tail:
                    message = tr(
                        "the array has no end: the file is cut here", "数组没有结束：文件在这里被截断"
                    )
                    yield self._line_here(), "", not_json(message), None
                return
            if char == "[" and not in_array:
                in_array = True
                self._at += 1
            elif char == "]":
                in_array = False
                self._at += 1
            elif char == ",":
                self._at += 1
            else:
                self._learn_layout()
                line = self._line_here()
                value, reason = self._element()
                if reason is None:
                    yield line, value, None, self._after(in_array)
                    continue
                yield line, self._window[self._at : self._at + _EXCERPT], reason, None
                if not self._next_start():
                    lost_tail = True

    def _more(self) -> bool:
        """Forget what was read, append another chunk; False at the end of the file."""
        if self._ended:
            return False
        self._line_here()
        self._before = self._column_of(self._at) - 1
        rest = self._window[self._at :]
        chunk = self._file.read(max(_CHUNK, len(rest)))
        self._ended = not chunk
        self._window, self._at, self._counted = rest + chunk, 0, 0
        return bool(chunk)

    def _line_here(self) -> int:
        self._line += self._window.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._line

    def _column_of(self, at: int) -> int:
        """The 1-based column of a place in the window."""
        newline = self._window.rfind("\n", 0, at)
        return at - newline if newline >= 0 else self._before + at + 1

    def _peek(self) -> str:
        """The next character that is no space, or "" at the end."""
        while True:
            self._at = _SPACE.match(self._window, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._window):
                return self._window[self._at]
            if not self._more():
                return ""

    def _element(self) -> tuple[Any, Problem | None]:
        """One value from here on, or why there is none (the place is then left where it was)."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._window, self._at)
            except json.JSONDecodeError as error:
                # "Unterminated string" names the string's start, so it may only be the window that ends
                at_edge = error.msg.startswith("Unterminated") or error.pos >= len(self._window) - 16
                if at_edge and not self._ended and len(self._window) - self._at < _WINDOW_LIMIT:
                    self._more()  # also at the file's end: the window moves, and the error's place with it
                    continue
                return None, self._broken(error, at_edge)
            except (ValueError, RecursionError) as error:
                return None, not_json(said(error), line=self._line_here(), column=self._column_of(self._at))
            self._at = end
            return value, None

    def _broken(self, error: json.JSONDecodeError, at_edge: bool) -> Problem:
        line = self._line_here() + self._window.count("\n", self._at, error.pos)
        column = self._column_of(error.pos)
        if at_edge and self._ended and "\n" not in self._window[error.pos :].strip():
            reason = said(error)
            cut = tr(f"{reason}; the file ends inside this row", f"{reason}；文件在这一条数据中间结束")
            return not_json(cut, line=line, column=column)
        return not_json(said(error), line=line, column=column)

    def _after(self, in_array: bool) -> Problem | None:
        """Read over the comma; a flag where it is missing, or where nothing but the end follows it."""
        char = self._peek()
        if char == ",":
            self._at += 1
            if in_array and self._peek() == "]":
                line = self._line_here()
                message = tr(
                    f"a comma before the array's end (line {line}): strict readers refuse the file",
                    f"数组结尾前多了逗号（第 {line} 行）：严格的工具会拒绝这个文件",
                )
                return Problem("", "json_syntax", message)
        elif in_array and char and char != "]":
            line = self._line_here()
            message = tr(
                f"no comma before the next row (line {line}): strict readers refuse the file",
                f"与下一行数据之间缺少逗号（第 {line} 行）：严格的工具会拒绝这个文件",
            )
            return Problem("", "json_syntax", message)
        return None

    def _learn_layout(self) -> None:
        """Remember how this file's rows begin, to find the next one after a broken one."""
        if self._indent is None:
            before = self._window[self._window.rfind("\n", 0, self._at) + 1 : self._at]
            self._indent = before if not before.strip() and "\n" in self._window[: self._at] else ""
            if not before.strip() and not self._indent and "\n" in self._window[: self._at]:
                self._indent = "^"
        if not self._first_key:
            match = _FIRST_KEY.match(self._window, self._at)
            self._first_key = match[1] if match else ""

    def _next_start(self) -> bool:
        """Move to where the row after a broken one seems to begin; False where there is none."""
        if self._indent:
            pattern = re.compile(r"\n" + re.escape(self._indent.strip("^")) + r"(?=\{)")
        elif self._first_key:
            pattern = re.compile(r"(?=\{\s*" + re.escape(self._first_key) + r"\s*:)")
        else:
            pattern = re.compile(r'[,\s](?=\{\s*")')
        self._at += 1
        while True:
            match = pattern.search(self._window, self._at)
            if match:
                self._at = match.end()
                return True
            self._at = max(self._at, len(self._window) - 512)
            if not self._more():
                self._at = len(self._window)
                return False


def read_json_values(file: TextIO) -> Iterator[Raw]:
    """Elements of arrays and objects one after another, in order, with the line each starts on."""
    return iter(JsonValues(file))
