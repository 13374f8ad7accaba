"""An answer on a screen while it comes, with text that is taken back again; on a pipe only what stays."""

from __future__ import annotations

import shutil
from typing import TextIO

from rich.cells import cell_len, set_cell_size

from tuoling.infer.engine import Piece

_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)  # C1: some terminals obey these too


def visible(text: str) -> str:
    """Control characters as their pictures (␛ for ESC): what a model says must not steer the user's terminal."""
    return text.translate(_PICTURES)


class Typewriter:
    """Writes pieces. Settled text stands; what may be taken back is shown behind it as far as its line goes, since no
    terminal can take back a line that has scrolled away."""

    def __init__(self, out: TextIO, *, interactive: bool) -> None:
        self._out = out
        self._interactive = interactive
        self._shown = ""
        self._settled = 0
        self._column = 0
        self._loose = 0
        """Cells of the text that can still be taken back."""

    def show(self, piece: Piece) -> None:
        """Bring the screen to where this piece leads."""
        self._shown = self._shown[: len(self._shown) - piece.back] + piece.text
        settled = len(self._shown) if piece.settled is None else piece.settled
        text, self._settled = self._shown[self._settled : settled], max(settled, self._settled)
        if not self._interactive:
            self._write(text)
            return
        columns = shutil.get_terminal_size().columns
        text = self._take_back() + self._stay(visible(text), columns)
        self._write(text + self._behind(columns))

    def end(self) -> None:
        """The answer is over, or was left: nothing is taken back any more."""
        loose = visible(self._shown[self._settled :]) if self._interactive else ""
        self._write(self._take_back() + loose + "\n")

    def _take_back(self) -> str:
        cells, self._loose = self._loose, 0
        return f"\x1b[{cells}D\x1b[K" if cells else ""

    def _stay(self, text: str, columns: int) -> str:
        lines = text.split("\n")
        start = self._column if len(lines) == 1 else 0
        self._column = (start + cell_len(lines[-1].expandtabs())) % max(columns, 1)
        return text

    def _behind(self, columns: int) -> str:
        line = visible(self._shown[self._settled :]).split("\n")[0].expandtabs()
        room = columns - self._column - 1
        if room < 2 or not line:
            return ""
        line = line if cell_len(line) <= room else set_cell_size(line, room)
        self._loose = cell_len(line)
        return line

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()
