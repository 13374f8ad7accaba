"""How the processes of a run end: waiting for them, and which of their errors is the one that counts."""

from __future__ import annotations

import math
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuoling import files
from tuoling.errors import TrainingError, TuolingError
from tuoling.language import tr

if TYPE_CHECKING:
    from tuoling.config import RunConfig
    from tuoling.train.launch import Launch

POLL_S = 0.1
STACK_S = 10.0
"""What a rank that hangs gets to write down where: it is a signal's handler, but the machine may be busy."""
GRACE_S = 10.0
"""What the other ranks get after one has failed: they run into it themselves, each with its own words."""


def wait(
    processes: Sequence[subprocess.Popen[bytes]],
    launch: Launch,
    job: Path,
    config: RunConfig,
    asked: Sequence[int],
) -> None:
    """Return when all are done. Raises what the first failing rank says, KeyboardInterrupt where they were `asked` to."""
    first, others = launch.node_rank * launch.nproc, launch.others
    end = math.inf
    while any(process.poll() is None for process in processes) and time.monotonic() < end:
        if any(process.poll() for process in processes) or (others and others.failed_at() is not None):
            break
        if end == math.inf and any(process.poll() == 0 for process in processes):
            end = time.monotonic() + GRACE_S  # they end together: nothing is left to do for one that lingers
        time.sleep(POLL_S)
    killed = [first + n for n, process in enumerate(processes) if (process.poll() or 0) < 0]
    elsewhere = others.failed_at() if others else None
    if not any(process.poll() for process in processes) and elsewhere is None:
        return
    end = time.monotonic() + GRACE_S
    while time.monotonic() < end and any(process.poll() is None for process in processes):
        time.sleep(POLL_S)
    hung = [first + n for n, process in enumerate(processes) if process.poll() is None]
    stacks = {rank: _stack(processes[rank - first], job, rank) for rank in hung}
    errors = sorted(
        (files.read_json(path) for path in job.glob("error-*.json")), key=lambda error: error["at"]
    )
    if asked and (killed or any(error["kind"] == "KeyboardInterrupt" for error in errors)):
        raise KeyboardInterrupt
    own = [error["at"] for error in errors if _is_own(error)]
    if (
        others and not killed and not own and elsewhere is None
    ):  # a lost connection is seen sooner than its reason
        end = time.monotonic() + GRACE_S
        while time.monotonic() < end and (elsewhere := others.failed_at()) is None:
            time.sleep(POLL_S)
    if others and elsewhere is not None and not killed and (not own or elsewhere < min(own)):
        raise others.error()
    raise first_error(errors, killed, stacks, config, machines=launch.nnodes)


def first_error(
    errors: Sequence[dict[str, Any]],
    killed: Sequence[int],
    hung: dict[int, str],
    config: RunConfig,
    *,
    machines: int = 1,
) -> TuolingError:
    """What ended the run, from what each rank left behind (errors in the order of time).

    killed: ranks a signal ended. hung: ranks that neither failed nor ended, and where they are.
    A rank that only lost the others, or waited for them in vain, is not the one.
    """
    own = [error for error in errors if _is_own(error)]
    if own and not killed:
        return _as_error(own[0], config)
    if killed:
        names = ", ".join(map(str, killed))
        return TrainingError(
            tr(f"rank {names} was killed from outside", f"进程 {names} 被外部终止"),
            remedy=tr(
                "most often the system does that when memory runs out: fewer processes, or smaller batches",
                "最常见的原因是内存不足时被系统终止：减少进程数，或减小批大小",
            ),
        )
    if hung and any(error["waited"] for error in errors):
        names = ", ".join(map(str, hung))
        return TrainingError(
            tr(
                f"rank {names} did not answer the others for {config.timeout_s} s",
                f"进程 {names} 有 {config.timeout_s} 秒没有响应其他进程",
            ),
            where=next((stack for stack in hung.values() if stack), None),
            remedy=tr(
                "if it only was slow, give it longer: timeout_s=SECONDS",
                "如果只是太慢，可放宽时限：timeout_s=秒数",
            ),
        )
    if errors and machines > 1 and all(error["lost"] for error in errors):
        return _lost_machine(errors[0], config)
    if errors:
        return _as_error(errors[0], config)
    return TrainingError(tr("a process ended without a word", "有进程没有留下任何说明就结束了"))


def _is_own(error: dict[str, Any]) -> bool:
    """Whether a rank failed by itself, and not because it lost the others."""
    return not error["lost"] and error["kind"] != "Elsewhere"


def _lost_machine(error: dict[str, Any], config: RunConfig) -> TuolingError:
    """All ranks of this machine lost those of another one."""
    problem = re.sub(r"^\[[^\]]*\] ", "", error["problem"]).partition(". ")[
        0
    ]  # gloo's own source file, and its advice
    return TrainingError(
        tr(
            f"rank {error['rank']} lost the other machines: {problem}",
            f"进程 {error['rank']} 与其他机器失去联系：{problem}",
        ),
        where=config.output_dir,
        remedy=tr(
            "what stopped first says why, on its own machine\nwhen all are there again, on each: tuoling resume RUN "
            "--nnodes N --node-rank I --master HOST",
            "最先停下的机器上有原因\n各机器恢复后，在每台上运行：tuoling resume 运行目录 --nnodes N --node-rank I --master 主机",
        ),
    )


def _as_error(error: dict[str, Any], config: RunConfig) -> TuolingError:
    rank, problem = error["rank"], error["problem"]
    said = problem if error["known"] else f"{error['kind']}: {problem}"
    where = error["where"]
    if not error["known"] and config.output_dir:
        path = Path(config.output_dir) / f"rank-{rank}.txt"
        with suppress(OSError):
            path.write_text(error["traceback"], encoding="utf-8")
            where = str(path)
    return TrainingError(
        tr(f"rank {rank}: {said}", f"进程 {rank}：{said}"), where=where, remedy=error["remedy"]
    )


def _stack(process: subprocess.Popen[bytes], job: Path, rank: int) -> str:
    """Where a rank is right now: the innermost lines of its stack; empty if it does not even answer that."""
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGUSR1)
    path, end = job / f"stack-{rank}.txt", time.monotonic() + STACK_S
    while time.monotonic() < end:
        if path.is_file() and (text := path.read_text(encoding="utf-8", errors="replace").strip()):
            return "\n".join(line.strip() for line in text.splitlines()[1:4])
        time.sleep(POLL_S)
    return ""
