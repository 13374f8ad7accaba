"""The process that compiles the rest of the rows while a run trains on the first: `python -m tuoling.data.store_builder`.

Reads one pickle from standard input, (job, cache folder, workers, file to leave an error in), and ends when standard
input does: with the process that started it. What it has finished then stays for the next one.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from pathlib import Path

from tuoling import environment
from tuoling.data.shard_compiler import Job
from tuoling.data.store import compile_store
from tuoling.errors import DataError, TuolingError
from tuoling.files import read_json, write_json

BUILDER = (sys.executable, "-m", "tuoling.data.store_builder")
NICENESS = 5
"""Training goes first where the two share cores."""


class Builder:
    """The process as the one that started it holds it: it ends when nobody does any more."""

    def __init__(self, job: Job, cache_dir: Path, workers: int | None, failed: Path) -> None:
        self._process = subprocess.Popen(
            BUILDER, stdin=subprocess.PIPE, stdout=sys.__stderr__, env=environment.variables()
        )
        weakref.finalize(self, _end, self._process)
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(pickle.dumps((job, cache_dir, workers, failed)))
            self._process.stdin.flush()

    @property
    def exit_code(self) -> int | None:
        """None while it works."""
        return self._process.poll()


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.close()
    process.wait()


def failure_in(failed: Path) -> DataError | None:
    """The error a builder has left there."""
    if not failed.is_file():
        return None
    said = read_json(failed)
    return DataError(said["problem"], where=said["where"], remedy=said["remedy"])


def build(job: Job, cache_dir: Path, workers: int | None, failed: Path) -> None:
    """Compile the store. What it is refused for goes to the file `failed`, and is judged after each shard."""
    try:
        compile_store(
            job.sources,
            tokenizer=job.tokenizer,
            template=job.template,
            settings=job.settings,
            cache_dir=cache_dir,
            workers=workers,
            refuse_at_once=True,
        )
    except TuolingError as error:
        write_json(failed, {"problem": error.problem, "where": error.where, "remedy": error.remedy})


def main() -> None:
    """Compile what standard input names, for as long as standard input is open."""
    for number in (signal.SIGINT, signal.SIGTERM):  # who started this one decides, and saves first
        signal.signal(number, signal.SIG_IGN)
    asked = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.nice(NICENESS)
    build(*asked)


def _end_with_parent() -> None:
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    main()
