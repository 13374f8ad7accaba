"""Small pieces of HTML: a text in both languages, tables, numbers as people write them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from tuoling.evaluate.labels import VERDICTS


def both(zh: str, en: str) -> str:
    """A text in both languages; the style sheet shows one."""
    return f'<span class="zh" lang="zh">{escape(zh)}</span><span class="en" lang="en">{escape(en)}</span>'


def in_both(words: Mapping[str, tuple[str, str]], name: str) -> str:
    """A known name in both languages, another one as it is."""
    return both(*words[name]) if name in words else escape(name)


def verdict_cell(verdict: str) -> str:
    """A verdict in its colour."""
    style = verdict.partition(" ")[0]
    return f'<span class="{style}">{both(*VERDICTS[verdict])}</span>'


def section(identity: str, zh: str, en: str, body: str) -> str:
    """A titled section."""
    return f'<section id="{identity}"><h2>{both(zh, en)}</h2>{body}</section>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, style: str = "") -> str:
    """Cells are HTML already; the first column is the row's name."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    header = f"<thead><tr>{top}</tr></thead>" if head else ""
    return f'<div class="scroll"><table class="{style}">{header}<tbody>{body}</tbody></table></div>'


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """Name and value, two columns."""
    return table((), rows, style="facts")


def bytes_words(size: float | None) -> str:
    """1.5 GiB."""
    if size is None:
        return "–"
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:,.0f} {unit}"
        size /= 1024
    return f"{size:,.2f} GiB"


def number(value: object) -> str:
    """12,345; 0.117; – for none."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return escape(str(value))
