"""`tuoling train --nproc N`: starts the processes of a run, waits, and says which one failed first."""

from __future__ import annotations

import math
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tuoling import environment, files
from tuoling.errors import TrainingError, TuolingError, UsageError
from tuoling.language import tr

if TYPE_CHECKING:
    from tuoling.config import RunConfig
    from tuoling.train.loop import RunResult
    from tuoling.train.prepare import Setup
    from tuoling.train.resume import Start

RANK = (sys.executable, "-m", "tuoling.train.rank")
PORT = 29500
POLL_S = 0.1
GRACE_S = 10.0
"""What the other ranks get after one has failed: they run into it themselves, each with its own words."""


@dataclass(frozen=True, slots=True)
class Launch:
    """Processes to start here, and this machine's place among others.

    devices: cards to use, one a process. master: host[:port] of the first machine.
    """

    nproc: int = 1
    devices: tuple[int, ...] = ()
    nnodes: int = 1
    node_rank: int = 0
    master: str | None = None

    @property
    def world_size(self) -> int:
        return self.nproc * self.nnodes

    @property
    def alone(self) -> bool:
        """Whether nothing is to be started: this process trains, with the others if a launcher started it."""
        return self == Launch()

    def checked(self) -> Launch:
        """Raise UsageError for numbers that do not go together; as many processes as devices."""
        nproc = len(self.devices) if self.devices and self.nproc == 1 else self.nproc
        if self.devices and nproc != len(self.devices):
            raise UsageError(
                tr(
                    f"--nproc {nproc} and {len(self.devices)} devices: one process a device",
                    f"--nproc {nproc}，但列出了 {len(self.devices)} 个设备：每个设备一个进程",
                ),
                where=f"--devices {','.join(map(str, self.devices))}",
                remedy=f"--nproc {len(self.devices)}",
            )
        if not 0 <= self.node_rank < self.nnodes:
            raise UsageError(
                tr(
                    f"--node-rank {self.node_rank} of --nnodes {self.nnodes}: machines are counted from 0",
                    f"--node-rank {self.node_rank}，而 --nnodes {self.nnodes}：机器编号从 0 开始",
                ),
                remedy=f"--node-rank 0 … --node-rank {self.nnodes - 1}",
            )
        if self.nnodes > 1 and not self.master:
            raise UsageError(
                tr(
                    "--nnodes needs the address of the first machine",
                    "使用 --nnodes 时要给出第一台机器的地址",
                ),
                remedy=f"--master HOST:{PORT}",
            )
        return replace(self, nproc=nproc)


def train_on(
    launch: Launch,
    config: RunConfig,
    *,
    notes: Sequence[str],
    say: Callable[[str], None],
    show_plan: Callable[[Setup], None] | None,
    start: Start | None = None,
) -> RunResult:
    """Train in processes of their own. Rows are tokenised here, before any of them exists.

    start: where a run goes on. Raises the error of the rank that failed first.
    """
    from tuoling.train.loop import RunResult, begin
    from tuoling.train.prepare import prepare
    from tuoling.train.resume import Start
    from tuoling.train.run_folder import reserved

    launch, start = launch.checked(), start or Start()
    with reserved(config, notes, wanted=launch.node_rank == 0 and start.run is None) as config:
        setup = prepare(
            config,
            say=say,
            notes=notes,
            world_size=launch.world_size,
            laid_for=start.laid_for,
            offset=start.offset,
        )
        start.verify(setup, say)
        _require_devices(launch, setup.device)
        if not config.ignore_memory_plan:
            setup.plan.require_memory(1 if setup.device.startswith("cuda") else launch.nproc)
    if launch.node_rank == 0:
        folder = start.run or begin(setup, say)
        config = config.model_copy(update={"output_dir": str(folder), "overwrite_output_dir": False})
    if show_plan:
        show_plan(setup)
    with tempfile.TemporaryDirectory(prefix="tuoling-") as name:
        job = Path(name)
        files.write_json(
            job / "job.json",
            {"config": config.model_dump(mode="json"), "notes": setup.notes, "start": start.to_json()},
        )
        processes = _start(launch, job)
        try:
            with _forwarding(processes) as asked:
                _wait(processes, launch, job, config, asked)
        except BaseException as error:
            if launch.node_rank == 0:
                _note_failure(folder, error)
            raise
        finally:
            _end(processes)
        done = files.read_json(job / "result.json")
    return RunResult(Path(done["path"]), done["status"], done["results"])


def _require_devices(launch: Launch, device: str) -> None:
    if not device.startswith("cuda"):
        if launch.devices:
            raise UsageError(
                tr(
                    f"--devices names cards, and this run is on {device}",
                    f"--devices 指定的是显卡，而本次训练在 {device} 上",
                ),
                remedy=f"--nproc {len(launch.devices)}",
            )
        return
    there = environment.cuda_count()
    missing = [str(number) for number in launch.devices if number >= there]
    if missing or launch.nproc > there:
        wanted = ", ".join(missing) or str(launch.nproc)
        raise UsageError(
            tr(
                f"this machine has {there} cards, asked for: {wanted}",
                f"这台机器有 {there} 张显卡，要求的是：{wanted}",
            ),
            remedy=tr(f"--nproc {there}, or device=cpu", f"--nproc {there}，或 device=cpu"),
        )


def _start(launch: Launch, job: Path) -> list[subprocess.Popen[bytes]]:
    """One process a rank. The first one's words go to the terminal, the others' to a file."""
    host, _, port = (launch.master or "").partition(":")
    address = {
        "MASTER_ADDR": host or "127.0.0.1",
        "MASTER_PORT": port or (str(PORT) if launch.nnodes > 1 else str(_free_port())),
        "WORLD_SIZE": str(launch.world_size),
        "LOCAL_WORLD_SIZE": str(launch.nproc),
        # as many threads as there are cores, not as many for each process
        "OMP_NUM_THREADS": str(max(1, environment.cpu_count() // launch.nproc)),
    }
    if launch.devices:
        address["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, launch.devices))
    processes = []
    for local in range(launch.nproc):
        rank = launch.node_rank * launch.nproc + local
        variables = environment.variables(**address, RANK=str(rank), LOCAL_RANK=str(local))
        with _log(job, local).open("wb") as log:
            # results are read from a file: what the libraries print must not stand on standard output
            to: IO[bytes] | int = sys.stderr.fileno() if local == 0 and _has_fileno() else log.fileno()
            processes.append(
                subprocess.Popen(
                    [*RANK, str(job)],
                    stdin=subprocess.PIPE,
                    stdout=to,
                    stderr=to,
                    env=variables,
                    start_new_session=True,  # Ctrl-C comes to us, and we pass it on once
                )
            )
    return processes


def _has_fileno() -> bool:
    try:
        sys.stderr.fileno()
    except (OSError, ValueError):
        return False
    return True


def _log(job: Path, local: int) -> Path:
    return job / f"log-{local}.txt"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def _forwarding(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM go to the ranks, which finish their step and save; once more and they stop at once.

    Yields the signals that came.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def forward(number: int, frame: object) -> None:
        asked.append(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(
    processes: Sequence[subprocess.Popen[bytes]],
    launch: Launch,
    job: Path,
    config: RunConfig,
    asked: Sequence[int],
) -> None:
    """Return when all are done. Raises what the first failing rank says, KeyboardInterrupt where they were `asked` to."""
    first = launch.node_rank * launch.nproc
    end = math.inf
    while any(process.poll() is None for process in processes) and time.monotonic() < end:
        if any(process.poll() for process in processes):
            break
        if end == math.inf and any(process.poll() == 0 for process in processes):
            end = time.monotonic() + GRACE_S  # they end together: nothing is left to do for one that lingers
        time.sleep(POLL_S)
    killed = [first + n for n, process in enumerate(processes) if (process.poll() or 0) < 0]
    if not any(process.poll() for process in processes):
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
    raise first_error(errors, killed, stacks, config)


def first_error(
    errors: Sequence[dict[str, Any]], killed: Sequence[int], hung: dict[int, str], config: RunConfig
) -> TuolingError:
    """What ended the run, from what each rank left behind (errors in the order of time).

    killed: ranks a signal ended. hung: ranks that neither failed nor ended, and where they are.
    A rank that only lost the others, or waited for them in vain, is not the one.
    """
    own = [error for error in errors if not error["lost"] and error["kind"] != "Elsewhere"]
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
    if errors:
        return _as_error(errors[0], config)
    return TrainingError(tr("a process ended without a word", "有进程没有留下任何说明就结束了"))


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
    path, end = job / f"stack-{rank}.txt", time.monotonic() + 2.0
    while time.monotonic() < end:
        if path.is_file() and (text := path.read_text(encoding="utf-8", errors="replace").strip()):
            return "\n".join(line.strip() for line in text.splitlines()[1:4])
        time.sleep(POLL_S)
    return ""


def _note_failure(folder: Path, error: BaseException) -> None:
    """run.json of a run whose first rank could not say itself that it failed."""
    path = folder / "run.json"
    with suppress(OSError, ValueError, TuolingError):
        record = files.read_json(path)
        if record.get("status") == "running" or isinstance(error, TuolingError):
            files.write_json(
                path, {**record, "status": "failed", "error": str(error) or type(error).__name__}
            )


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Leave nothing running."""
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdin is not None:
            process.stdin.close()
