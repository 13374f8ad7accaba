"""Where a run is to compute, as the command line says it: processes, cards, machines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tuoling.errors import UsageError
from tuoling.language import tr

if TYPE_CHECKING:
    from tuoling.train.launch import Launch


@dataclass(frozen=True, slots=True)
class Asked:
    """The options that say where a run computes."""

    nproc: int | None = None
    devices: str | None = None
    nnodes: int = 1
    node_rank: int = 0
    master: str | None = None
    hostfile: Path | None = None
    remote_shell: str | None = None

    def words(self) -> list[str]:
        """The same options for another process's command line."""
        given = {
            "--nproc": self.nproc,
            "--devices": self.devices,
            "--nnodes": self.nnodes if self.nnodes > 1 else None,
            "--node-rank": self.node_rank if self.nnodes > 1 else None,
            "--master": self.master,
            "--hostfile": self.hostfile,
            "--remote-shell": self.remote_shell,
        }
        return [word for name, value in given.items() if value is not None for word in (name, str(value))]


@contextmanager
def launching(asked: Asked, *, say: Callable[[str], None]) -> Iterator[Launch]:
    """What is to be started; the other machines of a hostfile run the same command inside."""
    from tuoling.train.launch import Launch

    devices = device_numbers(asked.devices)
    if asked.hostfile is None:
        if asked.remote_shell is not None:
            raise UsageError(
                tr("--remote-shell goes with --hostfile", "--remote-shell 要与 --hostfile 一起用"),
                remedy="--hostfile hosts.txt",
            )
        yield Launch(asked.nproc or 1, devices, asked.nnodes, asked.node_rank, asked.master)
        return
    if asked.nproc or devices or asked.nnodes > 1:
        raise UsageError(
            tr(
                "--hostfile says how many machines and processes there are; --nproc, --devices and --nnodes do too",
                "--hostfile 已写明机器数和进程数，不能再给 --nproc、--devices、--nnodes",
            ),
            where=str(asked.hostfile),
            remedy="gpu01 slots=4",
        )
    from tuoling.train.hosts import REMOTE_SHELL, OtherMachines, read_hosts, require_reachable, words_for

    hosts, shell = read_hosts(asked.hostfile), asked.remote_shell or REMOTE_SHELL
    here = Launch(hosts[0].slots, (), len(hosts), 0, asked.master or hosts[0].name)
    require_reachable(hosts[1:], shell, folder=Path.cwd())
    others = OtherMachines(hosts[1:], shell, folder=Path.cwd(), say=say)
    try:
        others.start(lambda number: words_for(replace(here, node_rank=number), sys.argv[1:]))
        yield replace(here, others=others)
    except BaseException as error:
        others.end(failed=not isinstance(error, KeyboardInterrupt))
        raise
    others.end(failed=False)


def device_numbers(devices: str | None) -> tuple[int, ...]:
    """`0,1,3` → (0, 1, 3)."""
    parts = [part.strip() for part in (devices or "").split(",") if part.strip()]
    if not all(part.isdigit() for part in parts) or len(set(parts)) != len(parts):
        raise UsageError(
            tr(
                f"--devices {devices}: numbers of cards with commas, each once",
                f"--devices {devices}：应为逗号分隔的显卡编号，不重复",
            ),
            remedy="--devices 0,1",
        )
    return tuple(int(part) for part in parts)
