"""`tuoling train --supervise`: the run in a process of its own, begun again from its last checkpoint when it crashes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tuoling import environment, files
from tuoling.errors import TuolingError
from tuoling.language import tr
from tuoling.train.run_folder import now

TRANSCRIPT = "supervisor.jsonl"
TUOLING = (sys.executable, "-m", "tuoling")
FIRST_WAIT_S, LONGEST_WAIT_S = 5.0, 600.0
SAME_STEP_LIMIT = 3
"""So many crashes in a row without a step between them are no accident."""
STOPPED = (130, 143, -signal.SIGINT, -signal.SIGTERM)

Run = Callable[[Sequence[str]], int]


def supervise(
    run: Path,
    begin: Sequence[str],
    again: Sequence[str],
    *,
    restarts: int,
    say: Callable[[str], None],
    start: Run | None = None,
    wait: Callable[[float], None] = time.sleep,
) -> int:
    """Run `tuoling BEGIN`, and after each crash `tuoling AGAIN`. Returns the exit code of the last one.

    A run that was stopped (Ctrl-C, SIGTERM), refused (a wrong call, bad rows) or finished is left alone. After a crash
    at the same step as the last one the wait doubles, from FIRST_WAIT_S on; after SAME_STEP_LIMIT of them, or
    `restarts` crashes in all, it gives up. Everything is in RUN/supervisor.jsonl.
    """
    start = start or _in_a_process
    note = _Transcript(run).note
    words, same_step, last_step = list(begin), 0, -1
    for count in range(restarts + 1):
        note({"event": "start", "number": count, "command": ["tuoling", *words]})
        code = start(words)
        step = reached(run)
        status = _status(run)
        note({"event": "end", "number": count, "exit_code": code, "step": step, "status": status})
        if code == 0 or code in STOPPED or code == 2 or status is None:
            return code
        same_step = same_step + 1 if step == last_step else 1
        last_step = step
        if count == restarts or same_step == SAME_STEP_LIMIT:
            why = (
                tr(f"{same_step} crashes in a row at step {step}", f"连续 {same_step} 次在第 {step} 步失败")
                if same_step == SAME_STEP_LIMIT
                else tr(f"{restarts} restarts are used up", f"{restarts} 次重启已用完")
            )
            note({"event": "give up", "why": why})
            say(
                tr(
                    f"supervisor: gives up, {why}; {run / TRANSCRIPT}",
                    f"监督：放弃，{why}；{run / TRANSCRIPT}",
                )
            )
            return code or 1
        pause = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (same_step - 1))
        note({"event": "wait", "seconds": pause})
        say(
            tr(
                f"supervisor: the run ended with {code} at step {step}; again in {pause:g} s "
                f"({restarts - count} restarts left)",
                f"监督：训练在第 {step} 步以 {code} 结束；{pause:g} 秒后重新开始（还可重启 {restarts - count} 次）",
            )
        )
        wait(pause)
        words = list(again)
    return 1


def reached(run: Path) -> int:
    """The last step that was logged."""
    with suppress(OSError, ValueError):
        rows = [row for _, row in files.read_jsonl(run / "metrics.jsonl")]
        return int(rows[-1]["step"]) if rows else 0
    return 0


def _status(run: Path) -> str | None:
    """What run.json says; None where no run was begun."""
    with suppress(TuolingError, AttributeError):
        return str(files.read_json(run / "run.json").get("status"))
    return None


class _Transcript:
    """Rows of RUN/supervisor.jsonl. Before the run has made its folder they are kept back."""

    def __init__(self, run: Path) -> None:
        self._run, self._rows = run, ""

    def note(self, row: dict[str, Any]) -> None:
        self._rows += json.dumps({"at": now(), **row}, ensure_ascii=False) + "\n"
        if not (self._run / "run.json").is_file():
            return
        with suppress(OSError), (self._run / TRANSCRIPT).open("a", encoding="utf-8") as file:
            file.write(self._rows)
            self._rows = ""


def _in_a_process(words: Sequence[str]) -> int:
    process = subprocess.Popen([*TUOLING, *words], env=environment.variables(), start_new_session=True)
    with _forwarding(process):
        return process.wait()


@contextmanager
def _forwarding(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Ctrl-C and SIGTERM go to the run, which saves; the supervisor waits for it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def forward(number: int, frame: object) -> None:
        with suppress(ProcessLookupError):
            process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
