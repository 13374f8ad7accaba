"""Rows into tokens: our compiler, the bare tokenizer on all cores, and LLaMA-Factory's preprocessing, in turn.

    python benchmarks/prep.py --rows 60000 [--rounds 3] [--peers PEERS.py --peer-python PYTHON --peer-workers 1,2] [--write]
    python benchmarks/prep.py --rows 2000000 --rounds 1 --kill 0.4 --peers PEERS.py --peer-python PYTHON --write

The second is the record: ten to fifteen minutes on two cores. There the bare tokenizer is timed on the first 400,000
rows (--bare-rows) and the peer on 60,000 of them (--peer-rows): their rates do not depend on how many there are, and at
a peer's rate two million would take an hour.

The rows are those of `--data`, over and over, told apart by a number in front of each answer, so that no cache of
words helps; they are written as JSON lines first. `ours` reads, checks, renders, tokenises, masks, stores and hashes
them into an empty cache. `bare` is nothing but `encode_batch_fast` on the finished texts, 1,000 at a time. The peer is
`peers.py prep llamafactory`, with each number of workers, of which the best counts. Rates are rows a second, the ratios
those of one round; the machine should be idle. Private memory is what no file backs (RssAnon and RssShmem), summed over
all processes, four times a second.

--kill 0.4: our build is killed with SIGKILL once it has that share of the rows, and started again: what was finished is
used, and the store has the same hash as one that was never interrupted. --write: prep.md and prep.json beside this file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
SHARED = HERE.parent.parent / "shared"
TEMPLATE = "alpaca"
SAMPLE_S = 0.25


def rows_of(path: Path) -> list[dict[str, str]]:
    text = path.read_text(encoding="utf-8")
    rows = json.loads(text) if text.lstrip().startswith("[") else map(json.loads, text.splitlines())
    return [row for row in rows if row.get("output")]


def write_rows(out: Path, data: Path, count: int) -> None:
    rows = rows_of(data)
    with out.open("w", encoding="utf-8") as file:
        for number in range(count):
            row = rows[number % len(rows)]
            made = {
                "instruction": row["instruction"],
                "input": row.get("input", ""),
                "output": f"{number} {row['output']}",
            }
            file.write(json.dumps(made, ensure_ascii=False) + "\n")


def load_tokenizer(file: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    from tuoling.text.tokenizer import TextTokenizer

    end = "<|endoftext|>"
    return TextTokenizer(PreTrainedTokenizerFast(tokenizer_file=file, bos_token=end, eos_token=end))


def ours(args: argparse.Namespace) -> None:
    """In a process of its own: one build, one JSON line."""
    from tuoling.data.sources import Source
    from tuoling.data.store import StoreSettings, compile_store
    from tuoling.files import MANIFEST
    from tuoling.text.templates import get_template

    tokenizer = load_tokenizer(args.tokenizer)
    started = time.perf_counter()
    store, report = compile_store(
        [Source(args.child_rows)],
        tokenizer=tokenizer,
        template=get_template(TEMPLATE),
        settings=StoreSettings(max_seq_len=1024, overlong="drop"),
        cache_dir=Path(args.child_cache),
        workers=args.workers,
        progress=lambda rows: print(json.dumps({"rows_so_far": rows}) + "\n", end="", file=sys.stderr),
    )
    seconds = time.perf_counter() - started
    digest = hashlib.sha256((store.path / MANIFEST).read_bytes()).hexdigest()
    said = {"seconds": seconds, "rows": report.rows, "tokens": report.tokens, "sha256": digest}
    print(json.dumps({**said, "resumed": report.resumed}))


def bare(args: argparse.Namespace) -> None:
    """In a process of its own: only the tokenizer is timed."""
    from tuoling.data.read import read_rows
    from tuoling.data.sources import Source
    from tuoling.text.templates import get_template

    backend, template = load_tokenizer(args.tokenizer).hf.backend_tokenizer, get_template(TEMPLATE)

    def texts() -> Iterator[str]:
        for row in read_rows(Source(args.child_rows)):
            assert row.conversation is not None
            yield "".join(segment.text for segment in template.render(row.conversation))

    seconds, count, coming = 0.0, 0, texts()
    while count < args.child_limit and (chunk := list(islice(coming, 1000))):
        started = time.perf_counter()
        backend.encode_batch_fast(chunk)
        seconds, count = seconds + time.perf_counter() - started, count + len(chunk)
    print(json.dumps({"seconds": seconds, "rows": count}))


def private_bytes(pid: int) -> int:
    """Of a process and of all that it started."""
    total, waiting = 0, [pid]
    while waiting:
        each = waiting.pop()
        try:
            status = Path(f"/proc/{each}/status").read_text(encoding="ascii")
            for task in Path(f"/proc/{each}/task").iterdir():
                waiting += map(int, (task / "children").read_text(encoding="ascii").split())
        except OSError:
            continue
        for line in status.splitlines():
            name, _, value = line.partition(":")
            total += int(value.split()[0]) * 1024 if name in ("RssAnon", "RssShmem") else 0
    return total


def child(
    args: argparse.Namespace, kind: str, rows: Path, cache: Path, kill_at: int | None = None
) -> dict[str, Any]:
    """Run `ours` or `bare`; its line, with the private memory over time. kill_at: SIGKILL at so many rows."""
    command = [
        sys.executable,
        __file__,
        "--child",
        kind,
        "--child-rows",
        str(rows),
        "--child-cache",
        str(cache),
    ]
    limit = str(min(args.rows, args.bare_rows))
    command += [
        "--child-limit",
        limit,
        "--tokenizer",
        args.tokenizer,
        *(["--workers", str(args.workers)] if args.workers else []),
    ]
    # nothing but the tokenizer's own threads: torch is imported by transformers and computes nothing
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "true"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    memory: list[tuple[float, int]] = []
    ended = threading.Event()

    def watch() -> None:
        started = time.perf_counter()
        while not ended.wait(SAMPLE_S):
            memory.append((round(time.perf_counter() - started, 2), private_bytes(process.pid)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    trouble: list[str] = []
    assert process.stderr is not None and process.stdout is not None
    for line in process.stderr:
        if not line.startswith('{"rows_so_far"'):
            trouble.append(line)
        elif kill_at is not None and json.loads(line)["rows_so_far"] >= kill_at:
            process.send_signal(signal.SIGKILL)
            break
    printed = process.stdout.read()
    code = process.wait()
    ended.set()
    watcher.join()
    if kill_at is not None and code == -signal.SIGKILL:
        return {"killed": True}
    if code:
        raise SystemExit("".join(trouble))
    peak = max((size for _, size in memory), default=0)
    return {**json.loads(printed.splitlines()[-1]), "peak_private_mib": peak / 2**20, "memory": memory}


def peer(args: argparse.Namespace, folder: Path, data: Path, workers: int) -> dict[str, Any]:
    """LLaMA-Factory's preprocessing, as peers.py measures it."""
    model = folder / "model"
    if not model.exists():
        shape = ["--hidden", "64", "--layers", "1", "--heads", "2", "--vocab", "50432"]
        make = [sys.executable, args.peers, "make-model", str(model), *shape, "--tokenizer", args.tokenizer]
        subprocess.run(make, check=True, capture_output=True)
    command = [
        args.peer_python,
        args.peers,
        "prep",
        "llamafactory",
        "--model",
        str(model),
        "--data",
        str(data),
    ]
    command += ["--rows", str(min(args.peer_rows, args.rows)), "--workers", str(workers)]
    variables = {**os.environ, "DISABLE_VERSION_CHECK": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    found = [line for line in done.stdout.splitlines() if line.startswith('{"engine"')]
    if not found:
        raise SystemExit(done.stderr[-2000:])
    result: dict[str, Any] = json.loads(found[-1])
    return result


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    rows = folder / "rows.jsonl"
    write_rows(rows, Path(args.data), args.rows)
    found: dict[str, Any] = {
        "rows": args.rows,
        "bytes": rows.stat().st_size,
        "bare_rows": min(args.bare_rows, args.rows),
        "peer_rows": min(args.peer_rows, args.rows),
        "cores": len(os.sched_getaffinity(0)),
        "bare_rows_per_s": [],
        "ours_rows_per_s": [],
        "peer_rows_per_s": {},
    }
    for number in range(args.rounds):
        plain = child(args, "bare", rows, folder)
        found["bare_rows_per_s"].append(plain["rows"] / plain["seconds"])
        made = child(args, "ours", rows, folder / f"cache-{number}")
        found["ours_rows_per_s"].append(made["rows"] / made["seconds"])
        found |= {name: made[name] for name in ("tokens", "sha256", "peak_private_mib", "memory")}
        if args.peers and args.peer_python:
            for workers in map(int, args.peer_workers.split(",")):
                rate = peer(args, folder, Path(args.data), workers)["rows_per_s"]
                found["peer_rows_per_s"].setdefault(str(workers), []).append(rate)
        print(json.dumps({key: value for key, value in found.items() if key != "memory"}), flush=True)
    if args.kill:
        cache = folder / "killed"
        found["killed_at_rows"] = int(args.kill * args.rows)
        child(args, "ours", rows, cache, kill_at=found["killed_at_rows"])
        again = child(args, "ours", rows, cache)
        found["resumed_rows"], found["same_hash"] = again["resumed"], again["sha256"] == found["sha256"]
    ratios = [o / b for o, b in zip(found["ours_rows_per_s"], found["bare_rows_per_s"], strict=True)]
    found["ours_to_bare"] = median(ratios)
    if found["peer_rows_per_s"]:
        best = max(median(rates) for rates in found["peer_rows_per_s"].values())
        found["ours_to_peer"] = median(found["ours_rows_per_s"]) / best
    return found


def text(found: dict[str, Any]) -> str:
    lines = [
        f"{found['rows']:,} distinct rows, {found['bytes'] / 1e9:.2f} GB of JSON lines, {found['cores']} cores",
        "",
        "| | rows/s, each round |",
        "|---|---|",
    ]
    rated = {f"bare encode_batch_fast ({found['bare_rows']:,} rows)": found["bare_rows_per_s"]}
    rated |= {"ours": found["ours_rows_per_s"]}
    peer_rows = f"({found['peer_rows']:,} rows)"
    rated |= {
        f"LLaMA-Factory, {n} workers {peer_rows}": rates for n, rates in found["peer_rows_per_s"].items()
    }
    lines += [f"| {name} | {', '.join(f'{rate:,.0f}' for rate in rates)} |" for name, rates in rated.items()]
    lines += ["", f"ours to bare {found['ours_to_bare']:.2f}"]
    if "ours_to_peer" in found:
        lines.append(f"ours to LLaMA-Factory's best {found['ours_to_peer']:.2f}")
    steps = found["memory"][:: max(1, len(found["memory"]) // 10)]
    over_time = ", ".join(f"{at:.0f} s: {size / 2**20:.0f}" for at, size in steps)
    lines.append(
        f"private memory of all processes, MiB: {over_time}; at most {found['peak_private_mib']:.0f}"
    )
    if "same_hash" in found:
        lines.append(
            f"killed at {found['killed_at_rows']:,} rows and started again: {found['resumed_rows']:,} rows were used, "
            f"{'the same hash' if found['same_hash'] else 'ANOTHER HASH'}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--data", default=str(SHARED / "data/domain/domain.train.json"))
    parser.add_argument(
        "--tokenizer", default=str(SHARED / "data/tokenizers/gpt-neox-20b/20B_tokenizer.json")
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--kill", type=float, default=0.0)
    parser.add_argument("--peers", default=None)
    parser.add_argument("--peer-python", default=None)
    parser.add_argument("--peer-workers", default="1,2")
    parser.add_argument("--peer-rows", type=int, default=60_000)
    parser.add_argument("--bare-rows", type=int, default=400_000)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--child", choices=["ours", "bare"], help=argparse.SUPPRESS)
    parser.add_argument("--child-rows", help=argparse.SUPPRESS)
    parser.add_argument("--child-cache", help=argparse.SUPPRESS)
    parser.add_argument("--child-limit", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        {"ours": ours, "bare": bare}[args.child](args)
        return
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args, Path(folder))
    print(text(found))
    print(f"{time.monotonic() - began:.0f} s in all")
    if args.write:
        data = HERE / "prep.json"
        kept = json.loads(data.read_text(encoding="utf-8")) if data.is_file() else {}
        kept[str(args.rows)] = found
        data.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        tables = "\n\n".join(text(each) for _, each in sorted(kept.items(), key=lambda item: int(item[0])))
        (HERE / "prep.md").write_text(tables + "\n", encoding="utf-8")
    if not found.get("same_hash", True) or found["peak_private_mib"] >= 1024:
        raise SystemExit("the store is another one after a kill, or takes a GiB of private memory or more")


if __name__ == "__main__":
    main()
