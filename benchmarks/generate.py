"""Generation against a server with every fault, killed twice; and what `tuoling licence` says of three mixtures.

    python benchmarks/generate.py [--rows 500] [--seeds zh_seed_tasks.json] [--write]

The server is scripted and local: 0.05 s an answer, 40 requests a second and 429 above, errors 500, half bodies, pages of
HTML, answers that mean nothing; of the tasks it writes one in six has to go. It counts what it answered by question. The
command is killed with SIGKILL when the server has given a third, and again when it has given two thirds of the answers.
`--write` writes the transcript beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.generate.scripted import faults, items
from tests.openai_server import Body, FakeOpenAI, last_user_text, serve

from tuoling.models.licence import by_name, write_lineage

HERE = Path(__file__).resolve().parent
SEEDS = HERE.parent.parent / "shared" / "data" / "belle" / "zh_seed_tasks.json"
PER_CALL = 4
MIXTURES = {
    "BLOOM + own rows": ("bigscience/bloomz-7b1-mt", "own.json", "own"),
    "LLaMA 1 + BELLE's rows": ("huggyllama/llama-7b", "train_1M_CN.json", None),
    "Apache model + CC-BY-NC rows": ("Qwen/Qwen2.5-0.5B", "rows.json", "cc-by-nc-4.0"),
    "a model and rows that nobody knows": ("somebody/model", "found.json", None),
}
"""Model, rows, and the user's word on the rows."""


class Transcript:
    """What is printed, kept."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str = "") -> None:
        print(text, flush=True)
        self.lines.append(text)


def tuoling(*words: object, folder: Path | None = None) -> subprocess.Popen[str]:
    """The command in a process of its own, in that folder."""
    environ = {**os.environ, "TUOLING_LANG": "en", "PYTHONPATH": str(HERE.parent / "src"), "COLUMNS": "160"}
    command = [sys.executable, "-m", "tuoling", *map(str, words)]
    return subprocess.Popen(
        command, cwd=folder, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def generate(transcript: Transcript, rows: int, seeds: Path, folder: Path) -> None:
    """Killed twice; then the counts."""
    running: list[subprocess.Popen[str]] = []

    def deadly(server: FakeOpenAI, after: int) -> Callable[[Body], str]:
        def answer(body: Body) -> str:
            if len(server.answered) >= after:
                running[-1].kill()
            return items(body)

        return answer

    needed = rows // PER_CALL
    begun = time.monotonic()
    with serve(items) as server:
        server.fault_of, server.delay_s = faults, 0.05
        server.per_window, server.window_s = 40, 1.0
        options = [
            "--seeds",
            seeds.name,
            "--rows",
            rows,
            "--per-call",
            PER_CALL,
            "--concurrency",
            8,
            "--max-retries",
            8,
        ]
        place = [
            "--out",
            folder,
            "--endpoint",
            server.url,
            "--model",
            "teacher",
            "--licence",
            "generator=apache-2.0",
        ]
        price = ["--price-in", 1, "--price-out", 4, "--budget-cost", 5]
        for after in (needed // 3, 2 * needed // 3, 10**9):
            server.answer = deadly(server, after)
            transcript.say("$ tuoling data generate self-instruct --seeds zh_seed_tasks.json … --out made")
            running.append(
                tuoling("data", "generate", "self-instruct", *options, *place, *price, folder=seeds.parent)
            )
            printed = running[-1].communicate()[0]
            for line in printed.replace(str(folder), "made").splitlines():
                transcript.say(f"  {line}")
            transcript.say(
                f"  → exit {running[-1].returncode}" + (" (killed)" if running[-1].returncode < 0 else "")
            )
        result: dict[str, Any] = json.loads((folder / "generation.json").read_text())["result"]
        paid = Counter(last_user_text(body) for body, _ in server.answered)
        made = [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
        figures = {
            "rows accepted": len(made),
            "different instructions": len({row["instruction"] for row in made}),
            "requests that reached the server": len(server.requests),
            "refused by its rate limit": server.refused,
            "answers it gave, all paid for": sum(paid.values()),
            "questions it answered": len(paid),
            "questions it answered twice": sum(count > 1 for count in paid.values()),
            "answers in the log": result["answered"],
            "lost in the two kills": result["lost"],
            "most requests at once": server.most_at_once,
            "seconds": round(time.monotonic() - begun),
        }
    for name, value in figures.items():
        transcript.say(f"  {name:36} {value}")
    transcript.say(f"  rejected {json.dumps(result['rejected'])}, unparsable {result['unparsable']}")
    transcript.say(f"  a row: {json.dumps(made[0], ensure_ascii=False)}")


def licences(transcript: Transcript, folder: Path) -> None:
    """Runs that record what went into them as training does, and what is said of them."""
    for title, (model, rows, word) in MIXTURES.items():
        place = folder / model.rpartition("/")[2]
        place.mkdir(parents=True)
        write_lineage(place, [by_name("model", model), by_name("data", rows)])
        said = ["--licence", f"{rows}={word}"] if word else []
        transcript.say(f"\n## {title}\n$ tuoling licence RUN {' '.join(said)}".rstrip())
        for line in tuoling("licence", place, *said).communicate()[0].splitlines():
            transcript.say(f"  {line.rstrip()}")


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--rows", type=int, default=500)
    asked.add_argument("--seeds", type=Path, default=SEEDS)
    asked.add_argument("--write", action="store_true")
    options = asked.parse_args()
    transcript = Transcript()
    with tempfile.TemporaryDirectory() as folder:
        generate(transcript, options.rows, options.seeds, Path(folder) / "made")
        licences(transcript, Path(folder) / "runs")
    if options.write:
        text = "# Generation against a server with every fault, and three mixtures of licences\n\n"
        text += (
            "Written by `python benchmarks/generate.py --write`.\n\n````\n"
            + "\n".join(transcript.lines)
            + "\n````\n"
        )
        (HERE / "generate.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
