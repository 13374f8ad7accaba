"""`--hostfile`: the machines of a run, started from the first of them.

    gpu01 slots=4
    gpu02 slots=4

A line a machine, as DeepSpeed and Open MPI write it; slots: processes there. The first one is the machine the command
is given on. The others run the same command in the same folder, each through a remote shell, and must find config,
rows and model under the same paths.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from tuoling import environment
from tuoling.errors import TrainingError, UsageError
from tuoling.language import tr

if TYPE_CHECKING:
    from tuoling.train.launch import Launch

REMOTE_SHELL = "ssh -tt -o BatchMode=yes -o ConnectTimeout=10"
"""-tt: what runs there ends when the connection does."""
ANSWER_S = 30.0
LAST_LINES = 12
ENDS_S, ENDS_AFTER_ERROR_S = 30.0, 3.0
"""What the other machines get to end by themselves after the first one is done, or has failed."""


@dataclass(frozen=True, slots=True)
class Host:
    """A machine. where: file:line it is named in."""

    name: str
    slots: int
    where: str


def read_hosts(path: Path) -> list[Host]:
    """The machines of a hostfile. Raises UsageError for lines that are none, and for machines of different slots."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            tr(f"the hostfile cannot be read: {error}", f"无法读取主机列表：{error}"), where=str(path)
        ) from error
    hosts = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"(\S+)(?:\s+slots=(\d+))?", text)
        if match is None or match[2] == "0" or match[1].startswith("-"):
            raise UsageError(
                tr(f"not a machine: {text}", f"不是主机：{text}"),
                where=f"{path}:{number}",
                remedy="gpu01 slots=4",
            )
        hosts.append(Host(match[1], int(match[2] or 1), f"{path}:{number}"))
    _require_alike(hosts, path)
    return hosts


def _require_alike(hosts: Sequence[Host], path: Path) -> None:
    if not hosts:
        raise UsageError(tr("no machine is named", "没有写任何主机"), where=str(path), remedy="gpu01 slots=4")
    seen: dict[str, Host] = {}
    for host in hosts:
        if host.name in seen:
            raise UsageError(
                tr(f"{host.name} is named twice", f"{host.name} 写了两次"),
                where=host.where,
                remedy=tr("more processes there: slots=N", "要在那里多开进程：slots=数量"),
            )
        if host.slots != hosts[0].slots:
            raise UsageError(
                tr(
                    f"{host.name} has {host.slots} slots and {hosts[0].name} has {hosts[0].slots}",
                    f"{host.name} 有 {host.slots} 个进程位，而 {hosts[0].name} 有 {hosts[0].slots} 个",
                ),
                where=host.where,
                remedy=tr("as many on every machine", "每台机器的数量应相同"),
            )
        seen[host.name] = host


def remote_command(
    shell: str, host: str, words: Sequence[str], *, folder: Path, variables: dict[str, str]
) -> list[str]:
    """What is started here to run `python -m tuoling WORDS` in `folder` of another machine.

    Plain words throughout: ssh hands them to a shell there, which takes the quotes off again.
    """
    set_variables = [f"{name}={value}" for name, value in sorted(variables.items())]
    there = ["env", "-C", str(folder), *set_variables, sys.executable, "-m", "tuoling", *words]
    return [*shlex.split(shell), host, *map(shlex.quote, there)]


_FROM_HERE = ("--hostfile", "--remote-shell", "--master")
"""Options, each with a value, that stand for what `words_for` says."""


def words_for(launch: Launch, given: Sequence[str]) -> list[str]:
    """The command line of another machine: what was given here, with that machine's place in place of the hostfile."""
    kept, skip = [], False
    for word in given:
        if not skip and word.partition("=")[0] not in _FROM_HERE:
            kept.append(word)
        skip = not skip and word in _FROM_HERE
    host, port = launch.meeting_point
    place = ("--nproc", "--nnodes", "--node-rank", "--master")
    values = (launch.nproc, launch.nnodes, launch.node_rank, f"{host}:{port}")
    return [*kept, *(str(word) for pair in zip(place, values, strict=True) for word in pair)]


def require_reachable(hosts: Sequence[Host], shell: str, *, folder: Path) -> None:
    """Raise TrainingError unless each of these machines answers and has this version of tuoling."""
    with ThreadPoolExecutor(max_workers=max(1, len(hosts))) as pool:
        found = list(pool.map(lambda host: _trouble(host, shell, folder), hosts))
    troubles = [f"{host.where}: {host.name}: {what}" for host, what in zip(hosts, found, strict=True) if what]
    if not troubles:
        return
    listed = "\n".join(f"  {line}" for line in troubles)
    first = next(host.name for host, what in zip(hosts, found, strict=True) if what)
    raise TrainingError(
        tr(
            f"{len(troubles)} of {len(hosts)} other machines cannot take part; nothing was started:\n{listed}",
            f"其他 {len(hosts)} 台机器中有 {len(troubles)} 台不能参加；什么都没有启动：\n{listed}",
        ),
        remedy=tr(
            f"this must work without a password: {shell} {first} true\nor take the machine out of the hostfile",
            f"这条命令须不用密码就能执行：{shell} {first} true\n或把该机器从主机列表中去掉",
        ),
    )


def _trouble(host: Host, shell: str, folder: Path) -> str | None:
    """Why a machine cannot take part."""
    variables = environment.for_other_machines()
    command = remote_command(shell, host.name, ["--version"], folder=folder, variables=variables)
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=ANSWER_S, check=False
        )
    except subprocess.TimeoutExpired:
        return tr(f"no answer for {ANSWER_S:.0f} s", f"{ANSWER_S:.0f} 秒没有回应")
    except OSError as error:
        return str(error)
    said = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
    if done.returncode:
        return (said or [tr(f"exit code {done.returncode}", f"退出码 {done.returncode}")])[-1].strip()
    here, there = f"tuoling {metadata.version('tuoling')}", done.stdout.decode(errors="replace").strip()
    if here not in there:
        return tr(f"{there} there, {here} here", f"那里是 {there}，这里是 {here}")
    return None


class OtherMachines:
    """The machines of a run but the first: started, listened to, ended."""

    def __init__(
        self, hosts: Sequence[Host], shell: str, *, folder: Path, say: Callable[[str], None]
    ) -> None:
        self._hosts, self._shell, self._folder, self._say = list(hosts), shell, folder, say
        self._started: list[tuple[Host, subprocess.Popen[bytes]]] = []
        self._last: dict[str, deque[str]] = {}
        self._listening: list[threading.Thread] = []
        self._failed: tuple[float, Host, int] | None = None

    def start(self, words_of: Callable[[int], Sequence[str]]) -> None:
        """Run `tuoling WORDS` on each. words_of: by the machine's number, which counts from 1."""
        variables = environment.for_other_machines()
        for number, host in enumerate(self._hosts, 1):
            command = remote_command(
                self._shell, host.name, words_of(number), folder=self._folder, variables=variables
            )
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C comes here, and the run's processes agree to stop
            )
            self._started.append((host, process))
            self._last[host.name] = deque(maxlen=LAST_LINES)
            listener = threading.Thread(target=self._listen, args=(host, process), daemon=True)
            listener.start()
            self._listening.append(listener)

    def _listen(self, host: Host, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            text = line.decode(errors="replace").rstrip()
            if text:
                self._last[host.name].append(text)
                self._say(f"[{host.name}] {text}")

    def failed_at(self) -> float | None:
        """When the first of them ended with an error (time.monotonic); None while none has."""
        if self._failed is None:
            for host, process in self._started:
                if process.poll():
                    self._failed = (time.monotonic(), host, process.returncode)
                    break
        return None if self._failed is None else self._failed[0]

    def error(self) -> TrainingError:
        """What the first machine that failed said last."""
        assert self._failed is not None
        _, host, code = self._failed
        for listener in self._listening:
            listener.join(timeout=1.0)
        said = "\n".join(f"  {line}" for line in self._last[host.name])
        return TrainingError(
            tr(
                f"{host.name} ended with exit code {code}:\n{said}",
                f"{host.name} 以退出码 {code} 结束：\n{said}",
            ),
            where=host.where,
        )

    def end(self, *, failed: bool) -> None:
        """Wait a little for those that still run, then leave nothing running."""
        end = time.monotonic() + (ENDS_AFTER_ERROR_S if failed else ENDS_S)
        for _, process in self._started:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0.0, end - time.monotonic()))
            if process.poll() is None:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=5.0)
            if process.poll() is None:
                process.kill()
                process.wait()
        for listener in self._listening:
            listener.join(timeout=1.0)
