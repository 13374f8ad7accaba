"""Reading a request's JSON: every field is either understood, known to change nothing, or refused by name."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping
from typing import Any

from tuoling.language import tr
from tuoling.serve.refusals import Refusal, bad


def read_json_body(body: bytes) -> dict[str, Any]:
    """The object in a request's body. Refusal (400) for anything else."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise bad(
            tr(
                f"the body is not UTF-8 (byte {error.start})",
                f"请求体不是合法的 UTF-8（第 {error.start} 字节）",
            )
        ) from error
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise bad(
            tr(
                f"the body is not JSON: {error.msg} (line {error.lineno}, column {error.colno})",
                f"请求体不是合法的 JSON：{error.msg}（第 {error.lineno} 行第 {error.colno} 列）",
            )
        ) from error
    except (RecursionError, ValueError) as error:
        raise bad(tr("the body is not JSON that can be used", "请求体中的 JSON 无法使用")) from error
    if not isinstance(value, dict):
        raise bad(tr("the body is not a JSON object", "请求体不是 JSON 对象"))
    return value


def _no_constant(name: str) -> float:
    raise ValueError(name)


class Fields:
    """A JSON object whose fields are taken one by one; null is as good as absent."""

    def __init__(self, body: Mapping[str, Any], where: str = "") -> None:
        self._left = {name: value for name, value in body.items() if value is not None}
        self._where = where

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str) -> Any:
        """The value, of any type; None where it is absent."""
        return self._left.pop(name, None)

    def text(self, name: str) -> str | None:
        """A string without half characters."""
        value = self.take(name)
        return None if value is None else whole_text(value, self._where + name)

    def number(self, name: str) -> float | None:
        """A number; booleans and texts are none."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name, tr("a number", "数字"))
        return value

    def integer(self, name: str, low: int, high: int) -> int | None:
        """A whole number within bounds."""
        value = self.number(name)
        if value is None:
            return None
        if value != int(value):
            raise self._wrong(name, tr("a whole number", "整数"))
        if not low <= value <= high:
            raise bad(
                tr(
                    f"{name}={value} is out of range: {low} to {high}",
                    f"{name}={value} 超出范围：{low} 到 {high}",
                ),
                self._where + name,
            )
        return int(value)

    def flag(self, name: str) -> bool:
        """true or false; false where it is absent."""
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(name, tr("true or false", "true 或 false"))
        return bool(value)

    def object(self, name: str) -> Fields:
        """An object inside this one; empty where it is absent."""
        value = self.take(name)
        if value is not None and not isinstance(value, dict):
            raise self._wrong(name, tr("an object", "对象"))
        return Fields(value or {}, f"{self._where}{name}.")

    def end(
        self, idle: Collection[str], neutral: Mapping[str, tuple[Any, ...]], known: Collection[str]
    ) -> None:
        """Refuse what is left, except fields that change nothing here.

        idle: fields with no effect on an answer. neutral: fields that are not offered, and the values that ask
        for nothing. known: what could have been meant.
        """
        for name, value in self._left.items():
            if name in idle or (name in neutral and value in neutral[name]):
                continue
            where = self._where + name
            if name in neutral:
                raise bad(
                    tr(f"{where} is not offered by this server", f"本服务器不支持 {where}"),
                    where,
                    "unsupported",
                )
            near = difflib.get_close_matches(name, [*known, *neutral], n=1, cutoff=0.6)
            hint = tr(f", did you mean {near[0]}?", f"，是不是 {near[0]}？") if near else ""
            raise bad(
                tr(f"unknown field {where}{hint}", f"未知字段 {where}{hint}"), where, "unknown_parameter"
            )

    def _wrong(self, name: str, wanted: str) -> Refusal:
        where = self._where + name
        return bad(tr(f"{where} must be {wanted}", f"{where} 必须是{wanted}"), where, "invalid_type")


def whole_text(value: Any, where: str) -> str:
    """A string that can be written as UTF-8: JSON may hold halves of characters."""
    if not isinstance(value, str):
        raise bad(tr(f"{where} must be a text", f"{where} 必须是字符串"), where, "invalid_type")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise bad(
            tr(f"{where} holds half a character", f"{where} 中有不完整的字符（孤立代理项）"), where
        ) from error
    return value
