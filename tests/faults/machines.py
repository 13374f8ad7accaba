"""Two machines that share nothing but a cable and the disk: network namespaces. Needs root and iproute2."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAMES = (f"tuoling{os.getpid()}a", f"tuoling{os.getpid()}b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
LAST_LINES = 14
NOISE = ("real_accelerator", "socket.cpp", "torchao", "_pytree")
"""What libraries say of this machine."""
PLAN = re.compile(
    r"(\[.*\] )?(model|template|rows|tokens|each step|steps|parameters|memory|disk|licences)(:|  )"
)


class Transcript:
    """What is done and said, printed as it comes."""

    def __init__(self, *, shown: bool = True) -> None:
        self.lines: list[str] = []
        self._shown = shown

    def __call__(self, text: str = "") -> None:
        for line in text.splitlines() or [""]:
            if self._shown:
                print(line, flush=True)
            self.lines.append(line)


def can_be_made() -> bool:
    """Whether this process may make network namespaces."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"{NAMES[0]}try"
    made = subprocess.run(["ip", "netns", "add", name], check=False, capture_output=True).returncode == 0
    subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
    return made


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextmanager
def machines() -> Iterator[None]:
    """Two network namespaces with a cable between them."""
    try:
        for name in NAMES:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip(
            "link",
            "add",
            "cable0",
            "netns",
            NAMES[0],
            "type",
            "veth",
            "peer",
            "name",
            "cable1",
            "netns",
            NAMES[1],
        )
        for number, (name, address) in enumerate(zip(NAMES, ADDRESSES, strict=True)):
            ip("-n", name, "address", "add", f"{address}/24", "dev", f"cable{number}")
            ip("-n", name, "link", "set", f"cable{number}", "up")
        yield
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


class Machine:
    """A command of tuoling under way on a machine; `wait` says what came of it."""

    def __init__(self, number: int, folder: Path, *words: str, say: Transcript) -> None:
        self.number, self._say = number, say
        self._log = folder / f"said-{number}-{time.monotonic_ns()}.txt"
        say(f"machine {number}$ tuoling {' '.join(words)}")
        variables = {**os.environ, "TUOLING_LANG": "en", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        variables |= {"TUOLING_CACHE": str(folder / "cache"), "COLUMNS": "100"}
        variables["PYTHONPATH"] = str(ROOT / "src")
        with self._log.open("wb") as out:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", NAMES[number], sys.executable, "-m", "tuoling", *words],
                cwd=folder,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def kill(self) -> None:
        """As a power cut would: the command and all it started, at once."""
        for pid in [self.process.pid, *children_of(self.process.pid)]:
            os.kill(pid, signal.SIGKILL)

    def wait(self) -> int:
        code = self.process.wait(timeout=3600)
        said = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        said = [line.rstrip() for line in said if line.strip() and not any(word in line for word in NOISE)]
        said = [line for line in said if not PLAN.match(line)]
        if len(said) > LAST_LINES:
            self._say(f"  machine {self.number}: … ({len(said) - LAST_LINES} lines)")
        for line in said[-LAST_LINES:]:
            self._say(f"  machine {self.number}: {line}")
        self._say(f"  machine {self.number}: exit code {code}")
        return code


def children_of(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text(encoding="ascii").split()):
            found += [child, *children_of(child)]
    return found


def together(folder: Path, say: Transcript, *words: str) -> list[Machine]:
    """The same command on both machines."""
    place = ("--nnodes", "2", "--master", ADDRESSES[0])
    return [Machine(n, folder, *words, *place, "--node-rank", str(n), say=say) for n in (0, 1)]


def losses(run: Path) -> list[float]:
    path = run / "metrics.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line)["loss"] for line in path.read_text().splitlines() if line.endswith("}")]


def wait_for_steps(run: Path, steps: int) -> None:
    end = time.monotonic() + 3600
    while len(losses(run)) < steps:
        if time.monotonic() > end:
            raise SystemExit(f"{run} does not come to step {steps}")
        time.sleep(0.05)


def pull_cable() -> None:
    ip("-n", NAMES[0], "link", "set", "cable0", "down")


def plug_cable() -> None:
    ip("-n", NAMES[0], "link", "set", "cable0", "up")
