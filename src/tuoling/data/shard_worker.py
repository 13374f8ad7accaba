"""One of the processes that compile shards: `python -m tuoling.data.shard_worker`.

Reads pickles from standard input: (job, folder), then one shard after another. Writes pickles to standard output:
("rows", how many were read), ("done", Compiled) or ("error", what `packed_error` makes of it).
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import sys
import traceback
from typing import Any

from tuoling.data.shard_compiler import ShardCompiler
from tuoling.errors import TuolingError


def main() -> None:
    """Compile until standard input ends, as it does when the process that started this one is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C comes to all; who started this one decides
    asked = sys.stdin.buffer
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)  # what a library prints must not stand among the answers

        def say(kind: str, value: Any) -> None:
            pickle.dump((kind, value), answers)
            answers.flush()

        try:
            job, folder = pickle.load(asked)
            compiler = ShardCompiler(job, folder)
            # rows hold no cycles: collecting them costs 8 us a row of 220, a third of all that is not the tokenizer
            gc.freeze()
            gc.disable()
            while (shard := _next(asked)) is not None:
                say("done", compiler.compile(shard, lambda rows: say("rows", rows)))
                gc.collect()
        except BrokenPipeError:
            os._exit(1)
        except BaseException as error:
            say("error", packed_error(error))


def _next(asked: Any) -> Any:
    try:
        return pickle.load(asked)
    except EOFError:
        return None


def packed_error(error: BaseException) -> tuple[type[TuolingError] | None, dict[str, Any], str]:
    """(its class where it is one of ours, what it says, the traceback)."""
    trace = "".join(traceback.format_exception(error))
    if isinstance(error, TuolingError):
        said = {"problem": error.problem, "where": error.where, "remedy": error.remedy}
        return type(error), said, trace
    return None, {}, trace


def unpacked_error(packed: tuple[type[TuolingError] | None, dict[str, Any], str]) -> Exception:
    """The error again, in the process that is told of it."""
    kind, said, trace = packed
    if kind is None:
        return RuntimeError(trace)
    error = kind.__new__(kind)  # its __init__ may ask for other things than it says in the end
    TuolingError.__init__(error, **said)
    return error


if __name__ == "__main__":
    main()
