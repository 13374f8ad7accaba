"""Reads YAML, and JSON as people write it (comments, trailing commas), and knows the line of every key."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from tuoling.errors import ConfigError
from tuoling.language import tr


@dataclass(frozen=True)
class ConfigFile:
    """The top-level keys of one file. Keys whose value is null are as good as not there and are left out."""

    path: Path
    values: dict[str, Any]
    lines: dict[str, int]

    def where(self, key: str) -> str:
        """`file:line` of a key."""
        return f"{self.path}:{self.lines[key]}" if key in self.lines else str(self.path)

    @property
    def places(self) -> dict[str, str]:
        """`file:line` of every key."""
        return {key: self.where(key) for key in self.values}

    def without(self, keys: Collection[str]) -> ConfigFile:
        """The same file with some keys taken away."""
        return replace(self, values={key: value for key, value in self.values.items() if key not in keys})


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, and 1e-4 is a number (PyYAML wants 1.0e-4)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_config_file(path: Path) -> ConfigFile:
    """Read one file. Raises ConfigError with file:line when it is missing, empty, not YAML/JSON or not a mapping."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        text = _read_gb18030(path)
    except OSError as error:
        raise ConfigError(
            tr(f"cannot read the config file: {error.strerror}", f"无法读取配置文件：{error.strerror}"),
            where=str(path),
        ) from error
    if "\0" in text:
        raise ConfigError(tr("a binary file, not a config", "这是二进制文件，不是配置"), where=str(path))
    is_json = path.suffix.lower() in (".json", ".jsonc") or text.lstrip().startswith("{")
    values, lines = _read_json(text, path) if is_json else _read_yaml(text, path)
    if not isinstance(values, dict) or not values:
        raise ConfigError(
            tr("no keys in the config file", "配置文件中没有任何键")
            if not values
            else tr("a config must be `key: value` lines", "配置必须由 key: value 组成"),
            where=str(path),
        )
    return ConfigFile(path, {str(key): value for key, value in values.items() if value is not None}, lines)


def parse_value(text: str, *, where: str) -> Any:
    """The value of a `key=value`, read as YAML. Raises ConfigError."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(
            tr(f"cannot read the value: {text}", f"无法理解这个值：{text}"), where=where
        ) from error


def strip_json_comments(text: str) -> str:
    """Blank out `//`, `#` and `/* */` comments and trailing commas; strings and line numbers stay as they are.

    `{"url": "http://x", # note` → `{"url": "http://x",       `
    """
    token = re.compile(r'"(?:\\.|[^"\\])*"|//[^\n]*|#[^\n]*|/\*.*?\*/', re.DOTALL)
    blank = token.sub(
        lambda found: found[0] if found[0].startswith('"') else re.sub(r"[^\n]", " ", found[0]), text
    )
    comma = re.compile(r'"(?:\\.|[^"\\])*"|,(?=\s*[}\]])', re.DOTALL)
    return comma.sub(lambda found: found[0] if found[0].startswith('"') else " ", blank)


def _read_gb18030(path: Path) -> str:
    try:
        return path.read_text(encoding="gb18030")
    except UnicodeDecodeError as error:
        raise ConfigError(
            tr("neither UTF-8 nor GB18030 text", "既不是 UTF-8 也不是 GB18030 文本"), where=str(path)
        ) from error


def _read_json(text: str, path: Path) -> tuple[Any, dict[str, int]]:
    plain = strip_json_comments(text)
    doubled: list[str] = []

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in found]
        doubled.extend(name for name in set(names) if names.count(name) > 1)
        return dict(found)

    try:
        values = json.loads(plain, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        raise ConfigError(
            tr(f"not JSON: {error.msg}", f"不是合法的 JSON：{error.msg}"),
            where=f"{path}:{error.lineno}:{error.colno}",
        ) from error
    lines: dict[str, int] = {}
    for found in re.finditer(r'"((?:\\.|[^"\\])*)"\s*:', plain):
        lines.setdefault(found[1], plain.count("\n", 0, found.start()) + 1)
    if doubled:
        raise _doubled(doubled[0], path, lines[doubled[0]])
    return values, lines


def _read_yaml(text: str, path: Path) -> tuple[Any, dict[str, int]]:
    try:
        node = yaml.compose(text, Loader=_Loader)
        values = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise ConfigError(
            tr(f"not YAML: {error.problem}", f"不是合法的 YAML：{error.problem}"), where=place
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(tr(f"not YAML: {error}", f"不是合法的 YAML：{error}"), where=str(path)) from error
    lines: dict[str, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.value in lines:
                raise _doubled(key.value, path, line)
            lines[str(key.value)] = line
    return values, lines


def _doubled(key: str, path: Path, line: int) -> ConfigError:
    return ConfigError(tr(f"{key} is given twice", f"{key} 写了两次"), where=f"{path}:{line}")
