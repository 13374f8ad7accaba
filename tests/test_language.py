"""Every message in both languages: each `tr` has an English and a Chinese text, and the Chinese one is Chinese."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tuoling import environment
from tuoling.language import tr

SOURCE = Path(__file__).resolve().parents[1] / "src" / "tuoling"
HAN = re.compile("[一-鿿]")
# text that means the same in both languages: what a user types, single words of the trade, punctuation
NEUTRAL = re.compile(r"^[\W\d_]*$|^(tuoling|pip) .*$|^\S+$", re.DOTALL)


@cache
def calls() -> list[tuple[str, ast.Call]]:
    found = []
    for file in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "tr":
                found.append((f"{file.relative_to(SOURCE)}:{node.lineno}", node))
    return found


def literal(node: ast.expr) -> str | None:
    """The fixed text of a string or f-string; None for anything computed."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value for part in node.values if isinstance(part, ast.Constant))
    return None


def names(node: ast.expr) -> set[str]:
    """Variables that an f-string shows."""
    if not isinstance(node, ast.JoinedStr):
        return set()
    return {
        child.id
        for part in node.values
        if isinstance(part, ast.FormattedValue)
        for child in ast.walk(part)
        if isinstance(child, ast.Name)
    }


def test_there_are_many() -> None:
    assert len(calls()) > 150


def test_each_has_both_languages() -> None:
    wrong = []
    for place, call in calls():
        if len(call.args) != 2 or call.keywords:
            wrong.append(f"{place}: tr takes the English and the Chinese text")
            continue
        english, chinese = map(literal, call.args)
        if english is None or chinese is None:
            continue
        if not (names(call.args[0]) or english.strip()) or not (names(call.args[1]) or chinese.strip()):
            wrong.append(f"{place}: empty")
        elif HAN.search(re.sub(r"驼铃|用户:|助手:", "", english)):
            wrong.append(f"{place}: Chinese in the English text: {english!r}")
        elif not HAN.search(chinese) and english != chinese and not NEUTRAL.match(chinese):
            wrong.append(f"{place}: no Chinese in {chinese!r}")
        elif not HAN.search(chinese) and re.search(r"[a-z]{3,} [a-z]{2,} [a-z]{2,}", chinese):
            wrong.append(f"{place}: English twice: {chinese!r}")
    assert not wrong, "\n".join(wrong)


def test_both_languages_show_the_same_values() -> None:
    wrong = []
    for place, call in calls():
        if len(call.args) == 2 and all(isinstance(argument, ast.JoinedStr) for argument in call.args):
            english, chinese = map(names, call.args)
            differ = (english ^ chinese) - {"s", "plural", "ending", "en", "zh"}  # endings are English only
            if differ:
                wrong.append(f"{place}: {sorted(differ)} is shown in one language only")
    assert not wrong, "\n".join(wrong)


def test_the_language_is_chosen_by_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    for wanted, locale, expected in (
        ("zh", "en_US.UTF-8", "二"),
        ("en", "zh_CN.UTF-8", "two"),
        ("", "zh_CN.UTF-8", "二"),
        ("", "de_DE.UTF-8", "two"),
    ):
        monkeypatch.setenv("TUOLING_LANG", wanted)
        monkeypatch.setenv("LC_ALL", locale)
        environment.language.cache_clear()
        assert tr("two", "二") == expected
    monkeypatch.undo()
    environment.language.cache_clear()
