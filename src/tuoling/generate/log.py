"""responses.log: every question and every answer, appended and fsynced before anything else is done with it."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tuoling.errors import DataError, OutputError
from tuoling.files import cannot_write, cut_torn_line, lock_file, read_jsonl, require_writable
from tuoling.generate.request import Answer, Request
from tuoling.language import tr

LOG = "responses.log"
"""JSON lines; not called .jsonl, so that nobody trains on a folder of them."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that ended in an error. again: another run may ask it again."""

    problem: str
    again: bool


class ResponseLog:
    """Lines `{"asked": Request}`, `{"answered": key, ...Answer}` and `{"failed": key, ...Failure}` in the order of events.

    Many threads write; a line is on the disk when the call returns.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOG
        self._lock = threading.Lock()
        self._new: list[tuple[str, Answer | Failure]] = []
        require_writable(folder)
        try:
            self._file = self.path.open("a", encoding="utf-8", newline="\n")
        except OSError as error:
            raise cannot_write(self.path, error) from error
        if not lock_file(self._file):
            self._file.close()
            raise OutputError(
                tr("another process works on this job", "另一个进程正在运行这个任务"),
                where=str(folder),
                remedy=tr("wait for it, or choose another --out", "等它结束，或换一个 --out"),
            )
        cut_torn_line(self.path)

    def close(self) -> None:
        self._file.close()

    def asked(self, request: Request) -> None:
        """Before it is sent: after a kill it is known that it may have been paid for."""
        self._write({"asked": request.to_json()})

    def answered(self, key: str, answer: Answer) -> None:
        self._write({"answered": key, **asdict(answer)}, (key, answer))

    def failed(self, key: str, failure: Failure) -> None:
        self._write({"failed": key, **asdict(failure)}, (key, failure))

    def take_new(self) -> list[tuple[str, Answer | Failure]]:
        """What came since the last call, in the order of the file."""
        with self._lock:
            new, self._new = self._new, []
        return new

    def _write(self, value: dict[str, Any], event: tuple[str, Answer | Failure] | None = None) -> None:
        line = json.dumps(value, ensure_ascii=False) + "\n"
        with self._lock:
            try:
                self._file.write(line)
                self._file.flush()
                os.fsync(self._file.fileno())
            except OSError as error:
                raise cannot_write(self.path, error) from error
            if event is not None:
                self._new.append(event)


def replay(folder: Path) -> Iterator[Request | tuple[str, Answer | Failure]]:
    """The log's events in order. Raises DataError with the line where one cannot be read."""
    path = folder / LOG
    if not path.is_file():
        return
    number = 0
    try:
        for line, value in read_jsonl(path):
            number = line
            yield _event(value)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            tr(f"the log cannot be read: {error!r}", f"记录文件无法读取：{error!r}"),
            where=f"{path}:{number + isinstance(error, json.JSONDecodeError)}",
            remedy=tr("begin anew in another --out", "换一个 --out 重新开始"),
        ) from error


def _event(value: dict[str, Any]) -> Request | tuple[str, Answer | Failure]:
    if "asked" in value:
        return Request.from_json(value["asked"])
    if "answered" in value:
        return value["answered"], Answer(**{name: value[name] for name in Answer.__dataclass_fields__})
    return value["failed"], Failure(value["problem"], value["again"])
