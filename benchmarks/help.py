"""Times `--help` of every command in a fresh process: nobody should wait for a model library to read an option.

python benchmarks/help.py            prints a table
python benchmarks/help.py --write    and writes it to benchmarks/help.md
"""

from __future__ import annotations

import platform
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
    """Median and least wall time of one command, each round in a new process; the first (cold files) is left out."""
    times = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, check=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]), min(times[1:])


def table() -> str:
    """Markdown: the bare interpreter, `--version`, then every `--help`."""
    rows = [("python -c pass", *seconds(["-c", "pass"]))]
    rows.append(("tuoling --version", *seconds(["-m", "tuoling", "--version"])))
    for words in [(), *sorted(main.command_modules())]:
        rows.append((" ".join(("tuoling", *words, "--help")), *seconds(["-m", "tuoling", *words, "--help"])))
    slow = [name for name, median, _ in rows if median >= GOAL_S]
    verdict = f"slower than {GOAL_S} s: {', '.join(slow)}" if slow else f"every median is under {GOAL_S} s"
    head = (
        f"{ROUNDS} fresh processes each, Python {platform.python_version()}, {environment.cpu_count()} cores, "
        f"{platform.system()} {platform.machine()}: {verdict}."
    )
    lines = [head, "", "| command | median, s | least, s |", "|---|---|---|"]
    lines += [f"| `{name}` | {median:.2f} | {least:.2f} |" for name, median, least in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    text = table()
    print(text)
    if "--write" in sys.argv[1:]:
        (Path(__file__).parent / "help.md").write_text(f"# Time of `--help`\n\n{text}", encoding="utf-8")
