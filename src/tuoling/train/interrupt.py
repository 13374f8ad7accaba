"""Ctrl-C and SIGTERM as a question the loop answers between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from tuoling import console
from tuoling.language import tr


class Interrupt:
    """Within the block the first SIGINT or SIGTERM sets `asked`; a second one interrupts at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        # Only the main thread may set handlers; elsewhere the caller's own rules stay.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        console.note(
            tr(
                "finishing this step, then saving (once more to stop at once)",
                "完成这一步后保存（再按一次立即停止）",
            )
        )
