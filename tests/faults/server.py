"""A process that has imported everything and is forked for each command, so that fifty kills cost no fifty imports.

Reads one JSON object a line: {"argv": words of the command line, "out": file for its output, "fault": see `install`};
answers {"status": exit code, negative for a signal}.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from tuoling import environment

    environment.quiet_libraries()
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401
    from transformers import (  # noqa: F401
        AutoModelForCausalLM,
        AutoTokenizer,
        BloomForCausalLM,
        PreTrainedTokenizerFast,
    )

    import tuoling.cli.main
    import tuoling.train.loop  # noqa: F401

    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(work(asked))
        _, status = os.waitpid(child, 0)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), flush=True)


def work(asked: dict[str, Any]) -> int:
    """One command, in the forked process."""
    out = os.open(asked["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(asked.get("env", {}))
    from tuoling.cli import main as cli

    signal.signal(signal.SIGTERM, cli._terminate)
    if asked.get("fault"):
        install(**asked["fault"])
    code = cli.app(asked["argv"], standalone_mode=False)
    sys.stdout.flush()
    sys.stderr.flush()
    return int(code or 0)


def install(kind: str, at: int = 0, what: str = "kill", folder: str = "", step: int = 0) -> None:
    """Arm one fault: at the `at`-th moment of `kind` (from 1) do `what` (full, readonly: from then on).

    kind: step, evaluate, tokenise: a call of the function that does it. save: a file operation below `folder` from
    step `step` on, in whatever thread. file: the same from the beginning. gradient: of a micro-batch. clock: throughout.
    """
    number, act = count(1), acts()[what]
    lasting = what in ("full", "readonly")

    def moment() -> None:
        here = next(number)
        if here == at or (lasting and here > at):
            act()

    if kind in ("step", "evaluate", "tokenise"):
        watch(kind, moment)
    elif kind in ("save", "file"):
        armed, taken = [kind == "file"], count(1)

        def arm() -> None:
            if next(taken) == step:
                saved()
                armed[0] = True

        if kind == "save":
            watch("step", arm)
        watch_files(folder, lambda: moment() if armed[0] else None, removing=not lasting)
    elif kind == "gradient":
        watch_gradient(at)
    elif kind == "clock":
        real, calls = time.time, count()
        time.time = lambda: real() + (-7.2e6 if next(calls) % 2 else 3.6e6)  # type: ignore[assignment]
    else:
        raise ValueError(kind)


def acts() -> dict[str, Callable[[], None]]:
    def fails(number: int) -> None:
        raise OSError(number, os.strerror(number))

    def kill_saved() -> None:
        saved()
        os.kill(os.getpid(), signal.SIGKILL)

    return {
        "kill_saved": kill_saved,
        "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
        "int": lambda: os.kill(os.getpid(), signal.SIGINT),
        "full": lambda: fails(errno.ENOSPC),
        "readonly": lambda: fails(errno.EROFS),
    }


def saved() -> None:
    """Wait for the checkpoint that is being written."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()


def watch(kind: str, moment: Callable[[], None]) -> None:
    """Call `moment` before each step, batch of an evaluation, or batch of rows that is tokenised."""
    from tuoling.data.shard_compiler import ShardCompiler
    from tuoling.train import forward, loop

    place: Any
    place, name = {
        "step": (loop, "train_step"),
        "evaluate": (forward, "batch_loss"),
        "tokenise": (ShardCompiler, "_take"),
    }[kind]
    real = getattr(place, name)

    def watched(*args: Any, **keys: Any) -> Any:
        moment()
        return real(*args, **keys)

    setattr(place, name, watched)


def watch_files(folder: str, moment: Callable[[], None], *, removing: bool) -> None:
    """Call `moment` before each file below `folder` is opened for writing, synced, renamed and, if asked, removed."""
    import safetensors.torch

    changing = {"os.mkdir", "tempfile.mkstemp", "tempfile.mkdtemp"}
    if removing:  # a full disk lets files be removed, and renamed over one another
        changing |= {"os.rename", "os.remove", "os.rmdir"}

    def heard(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[1], str) and args[1][:1] in "wax"
        if (writes or event in changing) and str(args[0]).startswith(folder):
            moment()

    sys.addaudithook(heard)
    sync, save = os.fsync, safetensors.torch.save_file

    def synced(handle: int) -> None:
        if str(Path(f"/proc/self/fd/{handle}").readlink()).startswith(folder):
            moment()
        sync(handle)

    def tensors_saved(tensors: Any, filename: Any, *args: Any, **keys: Any) -> None:
        moment()
        save(tensors, filename, *args, **keys)

    os.fsync = synced
    safetensors.torch.save_file = tensors_saved
    from tuoling.train import checkpoint

    checkpoint.save_file = tensors_saved


def watch_gradient(at: int) -> None:
    """The gradient of the `at`-th micro-batch is no number."""
    import math

    from tuoling.train import loop

    real, calls = loop.batch_loss, count(1)

    def steep(*args: Any) -> Any:
        loss = real(*args)
        if next(calls) == at:
            loss.register_hook(lambda gradient: gradient * math.nan)
        return loss

    loop.batch_loss = steep


if __name__ == "__main__":
    main()
