"""The files of a job beside its log: rows.jsonl, rejected.log, unparsable.log. All three follow from the log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Any

from tuoling.files import append_jsonl, cannot_write

ROWS, REJECTED, UNPARSABLE = "rows.jsonl", "rejected.log", "unparsable.log"


class Book:
    """Written anew while the log is replayed, then appended to. Until `keep` the files of before stay as they were."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, IO[str]] = {}
        self._kept = False
        try:
            for name in (ROWS, REJECTED, UNPARSABLE):
                self._files[name] = self._part(name).open("w", encoding="utf-8", newline="\n")
        except OSError as error:
            raise cannot_write(folder, error) from error

    def _part(self, name: str) -> Path:
        return self._folder / f".{name}.part"

    def keep(self) -> None:
        """The replay is over: the files take their places."""
        try:
            for name, file in self._files.items():
                file.close()
                self._part(name).replace(self._folder / name)
                self._files[name] = (self._folder / name).open("a", encoding="utf-8", newline="\n")
        except OSError as error:
            raise cannot_write(self._folder, error) from error
        self._kept = True

    def write(self, name: str, value: dict[str, Any]) -> None:
        if self._kept:
            append_jsonl(self._files[name], value)
        else:
            self._files[name].write(json.dumps(value, ensure_ascii=False) + "\n")

    def close(self) -> None:
        for name, file in self._files.items():
            file.close()
            self._part(name).unlink(missing_ok=True)
