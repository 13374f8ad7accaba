"""A talk as the messages a chat box shows, and back from a place in the box to a place in the talk."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tuoling.language import tr
from tuoling.serve.web_talk import Answer, Talk

CURSOR = "▌"
_CODE = re.compile(r"(```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|`[^`\n]+`)", re.DOTALL)
_TAG = re.compile(r"<(?=[A-Za-z/!?])")
_WRITTEN = re.compile(r"&((?:amp;)*lt;)")
_UNWRITTEN = {"&lt;": "<"}


@dataclass(frozen=True, slots=True)
class Place:
    """Which part of the talk a message shows."""

    exchange: int
    is_question: bool


def as_markdown(text: str) -> str:
    """Text whose HTML is seen and not obeyed. Code keeps its own characters."""
    parts = _CODE.split(text)
    for index in range(0, len(parts), 2):  # the odd ones are code
        parts[index] = _TAG.sub("&lt;", _WRITTEN.sub(r"&amp;\1", parts[index]))
    return "".join(parts)


def from_markdown(text: str) -> str:
    """Undo `as_markdown`, after somebody edited what it made."""
    parts = _CODE.split(text)
    for index in range(0, len(parts), 2):
        parts[index] = _WRITTEN.sub(lambda found: _UNWRITTEN.get(found[0], "&" + found[1][4:]), parts[index])
    return "".join(parts)


def messages(
    talk: Talk, column: int, *, answering: int | None = None, beams: bool = True
) -> tuple[list[dict[str, Any]], list[Place | None]]:
    """The messages of a column in gradio's shape, and what each of them shows (None: only a remark).

    answering: the column whose last answer is still growing.
    """
    shown: list[dict[str, Any]] = []
    places: list[Place | None] = []
    last = len(talk.exchanges) - 1
    for index, exchange in enumerate(talk.exchanges):
        shown.append({"role": "user", "content": as_markdown(exchange.question)})
        places.append(Place(index, True))
        answer = exchange.answer(column)
        if answer is None:
            continue
        growing = index == last and answering == column
        if answer.text or growing:
            text = as_markdown(answer.text) + (CURSOR if growing else "")
            shown.append({"role": "assistant", "content": text})
            places.append(Place(index, False))
        for remark in _remarks(answer, beams):
            shown.append({"role": "assistant", **remark})
            places.append(None)
    return shown, places


def _remarks(answer: Answer, beams: bool) -> Sequence[dict[str, Any]]:
    remarks: list[dict[str, Any]] = []
    if beams and answer.beams:
        listed = "\n\n".join(f"{number}. {as_markdown(text)}" for number, text in enumerate(answer.beams, 2))
        title = tr(f"Other beams ({len(answer.beams)})", f"其它束（{len(answer.beams)}）")
        remarks.append({"content": listed, "metadata": {"title": title}})
    if answer.note:
        title = tr("Failed", "出错") if answer.finish == "error" else tr("Note", "提示")
        remarks.append({"content": as_markdown(answer.note), "metadata": {"title": f"⚠ {title}"}})
    return remarks
