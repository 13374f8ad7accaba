"""A rank that does not get past its third step, or its second save: `python bad_rank.py raises|dies|hangs|saves FOLDER`."""

from __future__ import annotations

import os
import signal
import sys
import threading
from itertools import count
from typing import Any

from tuoling.train import checkpoint, loop, rank

STEP, SAVE_FILE, NUMBER = loop.train_step, checkpoint.save_file, count(1)
FILES_OF_A_SAVE = 3
"""optimizer, and the random state of two ranks."""


def fail(what: str) -> None:
    if what == "raises":
        raise ZeroDivisionError("broken on purpose")
    if what == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait()


def step_or(what: str) -> Any:
    def step(fast: Any, optimizer: Any, engine: Any, batches: Any, norm: float) -> Any:
        if engine.ranks.rank == 1 and next(NUMBER) == 3:
            fail(what)
        return STEP(fast, optimizer, engine, batches, norm)

    return step


def dies_saving(*args: Any) -> None:
    """Rank 0, which writes, is gone when two of the three files beside the weights are there."""
    SAVE_FILE(*args)
    if next(NUMBER) == 2 * FILES_OF_A_SAVE - 1:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    wanted = sys.argv.pop(1)
    if wanted == "saves":
        checkpoint.save_file = dies_saving
    else:
        loop.train_step = step_or(wanted)
    rank.main()
