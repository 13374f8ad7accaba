"""A child process with one job: started, watched, and its failure told in one sentence."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tuoling import environment
from tuoling.errors import ModelError
from tuoling.files import read_json, write_json
from tuoling.language import tr

Say = Callable[[str], None]

CHILD = (sys.executable, "-m", "tuoling.weights.gptq_child")
_POLL_SECONDS = 0.5


def run_job(
    job: dict[str, Any],
    folder: Path,
    *,
    watch: Callable[[], None] = lambda: None,
    remedy: str | None = None,
) -> dict[str, Any]:
    """The child's answer. All it prints goes to `log.txt` in `folder`; paths in the job are absolute.

    watch: called while it works.

    Raises ModelError where it fails, with the last line it printed.
    """
    folder = folder.absolute()
    answer = folder / "answer.json"
    answer.unlink(missing_ok=True)
    write_json(folder / "job.json", job | {"answer": str(answer)})
    log = folder / "log.txt"
    with log.open("w", encoding="utf-8") as printed:
        child = subprocess.Popen(
            (*CHILD, str(folder / "job.json")),
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            env=environment.for_gptqmodel(sys.path),
            cwd=folder,  # gptqmodel leaves a folder `logs` where it is started
        )
        try:
            code = _wait(child, watch)
        finally:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)
                child.wait()
    watch()
    found = read_json(answer) if answer.is_file() else {}
    if "error" in found:
        said = found["error"]
        raise ModelError(said["problem"], where=said["where"], remedy=said["remedy"] or remedy)
    if code or not found:
        raise ModelError(_why(code, log), where=str(log), remedy=remedy)
    return dict(found)


def _wait(child: subprocess.Popen[bytes], watch: Callable[[], None]) -> int:
    while True:
        try:
            return child.wait(_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            watch()


def _why(code: int, log: Path) -> str:
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return tr("the system ended it, most likely for its memory", "被系统终止，多半是内存不足")
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    last = next((line for line in reversed(lines) if line), str(code))
    return tr(f"gptqmodel failed: {last}", f"gptqmodel 失败：{last}")
