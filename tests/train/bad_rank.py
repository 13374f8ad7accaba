"""A rank that does not get past its third step: `python bad_rank.py raises|dies|hangs FOLDER`."""

from __future__ import annotations

import os
import signal
import sys
import threading
from itertools import count
from typing import Any

from tuoling.train import loop, rank

STEP, NUMBER = loop.train_step, count(1)


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


if __name__ == "__main__":
    loop.train_step = step_or(sys.argv.pop(1))
    rank.main()
