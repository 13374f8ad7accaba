"""The components of the web page by name, and how gradio's events reach functions that know who sent them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tuoling.serve.web_controls import Controls

Changes = dict[Any, Any]
"""Component → its new value or gr.update."""


@dataclass(frozen=True)
class Parts:
    """The components that events change."""

    chats: list[Any]
    box: Any
    send: Any
    stop: Any
    retry: Any
    undo: Any
    clear: Any
    save: Any
    saved_rows: Any
    status: Any
    meter: Any
    speak: Any
    brand: Any
    controls: Controls
    talk: Any
    settings: Any
    language: Any

    @property
    def of_an_answer(self) -> list[Any]:
        """What an answer changes while it grows."""
        buttons = [self.send, self.stop, *self.others.values()]
        return [*self.chats, self.box, *buttons, self.status, self.meter, self.talk]

    @property
    def others(self) -> dict[str, Any]:
        """Buttons that rest while an answer grows."""
        return {"retry": self.retry, "undo": self.undo, "clear": self.clear}

    @property
    def inputs(self) -> list[Any]:
        """What events are given: the talk, the language, the panel's values."""
        return [self.talk, self.language, *self.controls.inputs]


def known(handle: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """The event with gradio's name of the page that sent it. (gradio looks for its own types in annotations.)"""
    import gradio as gr

    def event(request, *values):  # type: ignore[no-untyped-def]
        yield from handle(request.session_hash or "", *values)

    event.__annotations__ = {"request": gr.Request}
    return event


def known_edit(handle: Callable[..., Iterator[Any]], column: int) -> Callable[..., Iterator[Any]]:
    """As `known`, with what was edited."""
    import gradio as gr

    def event(request, data, *values):  # type: ignore[no-untyped-def]
        number = data.index if isinstance(data.index, int) else data.index[0]
        yield from handle(request.session_hash or "", (column, number, str(data.value)), *values)

    event.__annotations__ = {"request": gr.Request, "data": gr.EditData}
    return event


def known_now(handle: Callable[..., Changes | None]) -> Callable[..., Any]:
    """As `known`, for what is done at once."""
    import gradio as gr

    def event(request, *values):  # type: ignore[no-untyped-def]
        return handle(request.session_hash or "", *values)

    event.__annotations__ = {"request": gr.Request}
    return event
