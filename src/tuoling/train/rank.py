"""One of the processes that `tuoling train --nproc N` starts: `python -m tuoling.train.rank FOLDER`.

The folder holds job.json, and takes what this process leaves: result.json, or error-<rank>.json.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from tuoling import console, environment, files
from tuoling.errors import TuolingError

_WAITED = ("timed out", "timeout")
_LOST = (
    *_WAITED,
    "connection closed",
    "connection reset",
    "broken pipe",
    "connection refused",
    "socket closed",
)


def main() -> None:
    """Train as job.json says. Exit code 1 after an error, 130 after a second Ctrl-C."""
    folder = Path(sys.argv[1])
    place = environment.place()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    stacks = (folder / f"stack-{place.rank}.txt").open("w", encoding="utf-8")
    faulthandler.register(signal.SIGUSR1, stacks, all_threads=False)
    try:
        result = _train(files.read_json(folder / "job.json"), first=place.rank == 0)
    except BaseException as error:
        leave_error(folder, place.rank, error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # threads of the process group may wait for others that are gone
    if place.local_rank == 0:
        files.write_json(folder / "result.json", result)


def _train(job: dict[str, Any], *, first: bool) -> dict[str, Any]:
    environment.quiet_libraries()
    from tuoling.config import RunConfig
    from tuoling.train.loop import train_prepared
    from tuoling.train.prepare import prepare
    from tuoling.train.resume import Start

    config = RunConfig.model_validate(job["config"])
    start = Start.from_json(job["start"])
    with console.silent():  # the process that started this one has said all of it
        setup = prepare(
            config, say=lambda _: None, notes=job["notes"], laid_for=start.laid_for, offset=start.offset
        )
    with console.silent(not first):
        result = train_prepared(setup, say=console.note, start=start)
    return {"path": str(result.path), "status": result.status, "results": result.results}


def leave_error(folder: Path, rank: int, error: BaseException) -> None:
    """Write down why this rank stops, and when."""
    text = str(error)
    known = isinstance(error, TuolingError)
    lost = not known and any(words in text.lower() for words in _LOST)
    files.write_json(
        folder / f"error-{rank}.json",
        {
            "rank": rank,
            "at": time.monotonic(),
            "kind": type(error).__name__,
            "problem": error.problem if isinstance(error, TuolingError) else _brief(text),
            "where": error.where if isinstance(error, TuolingError) else None,
            "remedy": error.remedy if isinstance(error, TuolingError) else None,
            "known": known,
            "lost": lost,
            "waited": lost and any(words in text.lower() for words in _WAITED),
            "traceback": "".join(traceback.format_exception(error)),
        },
    )


def _brief(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _end_with_parent() -> None:
    """Standard input is a pipe nobody writes to: it ends when the process that started this one does."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    main()
