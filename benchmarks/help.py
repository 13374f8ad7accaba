"""Times `--help` of every command in a fresh process: nobody should wait for a model library to read an option.

python benchmarks/help.py            prints a table
python benchmarks/help.py --write    and writes it to benchmarks/help.md
"""

from __future__ import annotations

import os
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


def seconds(words: list[str]) -> float:
    """Median wall time of one command line, each round in a new process, the first (cold files) left out."""
    times = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "tuoling", *words], stdout=subprocess.DEVNULL, check=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def table() -> str:
    """Markdown: the bare interpreter, `--version`, then every `--help`."""
    rows = [("python -c pass", _bare())]
    rows.append(("tuoling --version", seconds(["--version"])))
    for words in [(), *sorted(main.command_modules())]:
        rows.append((" ".join(("tuoling", *words, "--help")), seconds([*words, "--help"])))
    slow = [name for name, taken in rows if taken >= GOAL_S]
    verdict = f"slower than {GOAL_S} s: {', '.join(slow)}" if slow else f"all under {GOAL_S} s"
    head = (
        f"Median of {ROUNDS} fresh processes, Python {platform.python_version()}, "
        f"{environment.cpu_count()} cores, {platform.system()} {platform.machine()}: {verdict}."
    )
    lines = [
        head,
        "",
        "| command | seconds |",
        "|---|---|",
        *(f"| `{name}` | {taken:.2f} |" for name, taken in rows),
    ]
    return "\n".join(lines) + "\n"


def _bare() -> float:
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "pass"], check=True, env=dict(os.environ))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    text = table()
    print(text)
    if "--write" in sys.argv[1:]:
        (Path(__file__).parent / "help.md").write_text(f"# Time of `--help`\n\n{text}", encoding="utf-8")
