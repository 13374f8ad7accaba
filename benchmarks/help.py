"""Times `--help` of every command in a fresh process: nobody should wait for a model library to read an option.

python benchmarks/help.py            prints a table
python benchmarks/help.py --write    and writes it to benchmarks/help.md
"""

from __future__ import annotations

import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tuoling import environment
from tuoling.cli import main

GOAL_S = 0.6
ROUNDS = 5


def seconds(command: list[str]) -> tuple[float, float]:
    """Median wall time and median processor time of one command, each round in a new process.

    The first round (cold files) is left out. Processor time is what a free machine would take.
    """
    walls, processor = [], []
    for _ in range(ROUNDS + 1):
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        walls.append(time.perf_counter() - start)
        processor.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(walls[1:]), statistics.median(processor[1:])


def table() -> str:
    """Markdown: the bare interpreter, `--version`, then every `--help`."""
    rows = [("python -c pass", *seconds(["-c", "pass"]))]
    rows.append(("tuoling --version", *seconds(["-m", "tuoling", "--version"])))
    for words in [(), *sorted(main.command_modules())]:
        rows.append((" ".join(("tuoling", *words, "--help")), *seconds(["-m", "tuoling", *words, "--help"])))
    slow = [name for name, median, _ in rows if median >= GOAL_S]
    verdict = f"slower than {GOAL_S} s: {', '.join(slow)}" if slow else f"every median is under {GOAL_S} s"
    load = os.getloadavg()[0]
    head = (
        f"{ROUNDS} fresh processes each, Python {platform.python_version()}, {environment.cpu_count()} cores, "
        f"{platform.system()} {platform.machine()}, load {load:.1f} at the end: {verdict}."
    )
    lines = [head, "", "| command | median, s | processor, s |", "|---|---|---|"]
    lines += [f"| `{name}` | {median:.2f} | {used:.2f} |" for name, median, used in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    text = table()
    print(text)
    if "--write" in sys.argv[1:]:
        (Path(__file__).parent / "help.md").write_text(f"# Time of `--help`\n\n{text}", encoding="utf-8")
