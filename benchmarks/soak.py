"""A server under callers who behave badly: what it must never do is counted, and the script fails where it is done.

    python benchmarks/soak.py [--requests 2400] [--callers 16] [--write]

`tuoling serve` runs in a process of its own with a tiny model that repeats the end of its prompt (echo_model.py). Each
request ends with words nobody else has, so that an answer shows whose keys and values it was made from. A third of the
requests are streams that are left in the middle; one in eight is wrong in one of ten ways; lengths are random. After
them comes a crowd that the queue cannot hold, and at last the server is told to end while answers are still growing.

Asserted: every answer is its own caller's, to the byte; every wrong request gets its status; nothing hangs; nothing is
left growing; resident memory behind the first quarter stays within 5 %; the end cuts nobody off. --write writes
soak.md and soak.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from callers import HUNG_S, KEY, NAME, TEMPLATE, Caller, Counts, Question, client
from echo_model import write_echo_model
from servers import Running, all_at_once, serving

PLACES, WAITING = 16, 32
FLAT = 0.05
"""Resident memory may grow by this share."""


@dataclass(eq=False)
class Watch:
    """Resident memory of the server while the requests run, by the share of them that is done."""

    server: Running
    counts: Counts
    requests: int
    seen: list[tuple[float, float]] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)

    def look(self) -> None:
        """Four times a second."""
        while not self.done.wait(0.25):
            share = sum(self.counts.happened.values()) / self.requests
            self.seen.append((share, self.server.resident_mb()))

    def between(self, low: float, high: float) -> list[float]:
        """MB."""
        return [size for share, size in self.seen if low <= share <= high]


def metric(url: str, name: str) -> float:
    """One number of /metrics."""
    with client(url) as http:
        lines = http.get("/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(name + " "))


def crowd(url: str, counts: Counts) -> Counter[int]:
    """More at once than there are places: an answer or 429 with Retry-After."""
    body = {"model": NAME, "prompt": "0" * 40, "max_tokens": 200, "temperature": 0}
    with client(url) as http:
        call = partial(http.post, "/v1/completions", json=body)
        answers = all_at_once([call] * (2 * (PLACES + WAITING)))
    for answer in answers:
        if answer.status_code == 429 and not int(answer.headers.get("Retry-After", 0)) >= 1:
            counts.fault("429 without Retry-After")
    statuses = Counter(answer.status_code for answer in answers)
    if set(statuses) != {200, 429}:
        counts.fault(f"a crowd got {dict(statuses)}")
    return statuses


def end_gracefully(server: Running, counts: Counts) -> int:
    """SIGTERM while answers grow: those are finished. Returns how many grew."""
    callers = [Caller(server.url, counts, 10_000 + at) for at in range(8)]
    growing = threading.Barrier(len(callers) + 1)

    def stream(caller: Caller) -> None:
        question = Question("end" + "0123456789abcdef" * 2, 300)
        body = {"model": NAME, "prompt": question.text, "max_tokens": 300, "temperature": 0, "stream": True}
        said, lines = "", 0
        with caller.http.stream("POST", "/v1/completions", json=body) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    said += json.loads(line[6:])["choices"][0]["text"]
                    lines += 1
                    if lines == 2:
                        growing.wait(HUNG_S)
        caller.same(said, question.echo(""))

    def tell() -> None:
        growing.wait(HUNG_S)
        server.process.send_signal(signal.SIGTERM)

    all_at_once([*(partial(stream, caller) for caller in callers), tell])
    if server.process.wait(60):
        counts.fault(f"the server ended with {server.process.returncode}")
    return len(callers)


def soak(folder: Path, requests: int, callers: int) -> dict[str, Any]:
    """Everything; what was seen."""
    words = [
        sys.executable,
        "-m",
        "tuoling",
        "serve",
        str(write_echo_model(folder / NAME)),
        "--port",
        "{port}",
    ]
    words += ["--model-name", NAME, "--template", TEMPLATE, "--dtype", "fp32", "--device", "cpu"]
    words += ["--max-running", str(PLACES), "--max-waiting", str(WAITING), "--request-timeout", "60"]
    counts = Counts()
    variables = {"TUOLING_API_KEY": KEY, "TUOLING_LANG": "en"}
    with serving(words, folder / "log", ready="/health", variables=variables) as server:
        watch = Watch(server, counts, requests)
        watching = threading.Thread(target=watch.look, daemon=True)
        watching.start()
        begun = time.monotonic()
        shares = [requests // callers + (at < requests % callers) for at in range(callers)]
        all_at_once([partial(Caller(server.url, counts, at).work, share) for at, share in enumerate(shares)])
        took = time.monotonic() - begun
        watch.done.set()
        watching.join()
        left = _left(server.url)
        if left:
            counts.fault(f"{left:g} answers are still growing")
        statuses = crowd(server.url, counts)
        process = psutil.Process(server.process.pid)
        open_files, threads = process.num_fds(), process.num_threads()
        finished = end_gracefully(server, counts)
        said = (folder / "log").read_text("utf-8", "replace")
    if any(word in said for word in ("Traceback", "0123456789abcdef", KEY)):
        counts.fault("the log has a traceback, a question or the key in it")
    warm, after = watch.between(0.2, 0.3), watch.between(0.3, 1.0)
    level = statistics.median(warm or [size for _, size in watch.seen])
    growth = (max(after or [level]) - level) / level
    if growth > FLAT:
        counts.fault(f"resident memory grew by {growth:.1%}")
    return {
        "requests": sum(counts.happened.values()),
        "callers": callers,
        "seconds": round(took, 1),
        "happened": dict(sorted(counts.happened.items())),
        "wrong": counts.wrong,
        "answer_median_s": round(statistics.median(counts.seconds), 3),
        "answer_slowest_s": round(max(counts.seconds), 3),
        "resident_mb": [round(size, 1) for _, size in watch.seen[:: max(1, len(watch.seen) // 20)]],
        "resident_warm_mb": round(level, 1),
        "resident_growth": round(growth, 4),
        "open_files": open_files,
        "threads": threads,
        "crowd": {str(status): count for status, count in sorted(statuses.items())},
        "finished_at_the_end": finished,
    }


def _left(url: str) -> float:
    """Answers that grow or wait, a while after the last caller has gone."""
    limit = time.monotonic() + 10
    while True:
        left = metric(url, "tuoling_running") + metric(url, "tuoling_waiting")
        if not left or time.monotonic() > limit:
            return left
        time.sleep(0.2)


def table(seen: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"{seen['requests']:,} requests of {seen['callers']} callers at once in {seen['seconds']:.0f} s; answers took "
        f"{seen['answer_median_s']:.2f} s (median), the slowest {seen['answer_slowest_s']:.2f} s.",
        "",
        "| what | count |",
        "|---|---|",
        *(f"| {what} | {count:,} |" for what, count in seen["happened"].items()),
        *(f"| a crowd: status {status} | {count} |" for status, count in seen["crowd"].items()),
        f"| streams finished after SIGTERM | {seen['finished_at_the_end']} |",
        f"| another's words, hung, wrong status, left growing | {len(seen['wrong'])} |",
        "",
        f"Resident memory: {seen['resident_warm_mb']:,.0f} MB after the first quarter, at most "
        f"{seen['resident_growth']:+.1%} from there on. At the end {seen['threads']} threads and {seen['open_files']} open files.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run, print, write where asked, and fail where something was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=2400)
    parser.add_argument("--callers", type=int, default=16)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seen = soak(Path(folder), args.requests, args.callers)
    text = table(seen)
    print(text)
    if args.write:
        here = Path(__file__)
        here.with_suffix(".json").write_text(json.dumps(seen, ensure_ascii=False, indent=1) + "\n", "utf-8")
        here.with_suffix(".md").write_text(f"# A server under callers who behave badly\n\n{text}", "utf-8")
    for fault in seen["wrong"][:20]:
        print(fault, file=sys.stderr)
    sys.exit(1 if seen["wrong"] else 0)


if __name__ == "__main__":
    main()
