"""`tuoling train --nproc N`: starts the processes of a run, waits, and says which one failed first."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING

from tuoling import environment, files
from tuoling.errors import TrainingError, TuolingError, UsageError
from tuoling.language import tr
from tuoling.train.ending import wait

if TYPE_CHECKING:
    from tuoling.config import RunConfig
    from tuoling.train.hosts import OtherMachines
    from tuoling.train.loop import RunResult
    from tuoling.train.prepare import Setup
    from tuoling.train.resume import Start

RANK = (sys.executable, "-m", "tuoling.train.rank")
PORT = 29500
SAYS_AFTER_S, UNREACHABLE_S, RETRY_S = 5.0, 60.0, 1.0
"""Of a machine that waits for the first one: when it says so, and when it gives up on an address that never answers."""


@dataclass(frozen=True, slots=True)
class Launch:
    """Processes to start here, and this machine's place among others.

    devices: cards to use, one a process. master: host[:port] of the first machine. others: machines started from here.
    """

    nproc: int = 1
    devices: tuple[int, ...] = ()
    nnodes: int = 1
    node_rank: int = 0
    master: str | None = None
    others: OtherMachines | None = field(default=None, compare=False)

    @property
    def meeting_point(self) -> tuple[str, int]:
        """Where the processes find each other; port 0: any free one of this machine."""
        host, _, port = (
            (self.master or "").rpartition(":") if ":" in (self.master or "") else (self.master or "", "", "")
        )
        return host or "127.0.0.1", int(port) if port.isdigit() else (PORT if self.nnodes > 1 else 0)

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
    if launch.node_rank > 0:
        await_machine_0(*launch.meeting_point, timeout_s=config.timeout_s, say=say)
    with tempfile.TemporaryDirectory(prefix="tuoling-") as name:
        job = Path(name)
        files.write_json(
            job / "job.json",
            {"config": config.model_dump(mode="json"), "notes": setup.notes, "start": start.to_json()},
        )
        processes = _start(launch, job)
        try:
            with _forwarding(processes) as asked:
                wait(processes, launch, job, config, asked)
        except BaseException as error:
            if launch.node_rank == 0:
                _note_failure(folder, error)
            raise
        finally:
            _end(processes)
        done = files.read_json(job / "result.json")
    return RunResult(Path(done["path"]), done["status"], done["results"])


def await_machine_0(host: str, port: int, *, timeout_s: float, say: Callable[[str], None]) -> None:
    """Return when machine 0 listens. It may still be reading its rows; an address nobody answers at is another thing.

    Raises TrainingError.
    """
    started, said, refused = time.monotonic(), False, False
    while True:
        try:
            socket.create_connection((host, port), timeout=RETRY_S).close()
            return
        except socket.gaierror as error:
            why = tr(f"nobody knows the address of {host}", f"无法解析主机名 {host}")
            raise _no_machine_0(why, host, port) from error
        except ConnectionRefusedError:
            refused, why = True, tr("it does not listen yet", "尚未开始监听")
        except OSError as error:
            why = error.strerror or tr("no answer", "没有回应")
        waited = time.monotonic() - started
        if waited > (timeout_s if refused else min(timeout_s, UNREACHABLE_S)):
            raise _no_machine_0(why, host, port)
        if not said and waited > SAYS_AFTER_S:
            say(tr(f"waiting for machine 0, {host}:{port}: {why}", f"等待 0 号机器 {host}:{port}：{why}"))
            said = True
        time.sleep(RETRY_S)


def _no_machine_0(why: str, host: str, port: int) -> TrainingError:
    return TrainingError(
        tr(f"machine 0 cannot be reached: {why}", f"连不上 0 号机器：{why}"),
        where=f"--master {host}:{port}",
        remedy=tr(
            "start the run there too, with --node-rank 0 and the same --master; the port must be open",
            "请在那台机器上也启动训练：--node-rank 0，--master 相同；端口须开放",
        ),
    )


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
    host, port = launch.meeting_point
    address = {
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port or _free_port()),
        "WORLD_SIZE": str(launch.world_size),
        "LOCAL_WORLD_SIZE": str(launch.nproc),
        # as many threads as there are cores, not as many for each process
        "OMP_NUM_THREADS": str(max(1, environment.cpu_count() // launch.nproc)),
    }
    if launch.nnodes > 1 and (interface := environment.interface_towards(host, port)):
        address["GLOO_SOCKET_IFNAME"] = interface
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
