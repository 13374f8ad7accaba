"""A bloom-560m-shaped model pruned to what some rows need, and how much faster it then trains.

    python benchmarks/prune.py MODEL ROWS...             prune, train both for some steps, write prune.json
    python benchmarks/prune.py --prune-only MODEL ROWS...  without training

MODEL is a folder: real weights, or the shape with random ones and any byte-level tokenizer padded to 250,880 rows.
The pruned model is made in a temporary folder beside MODEL and removed. Each training runs in a process of its own.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
STEPS = 8
KEYS = {
    "max_steps": STEPS,
    "finetuning_type": "lora",
    "lora_rank": 8,
    "dtype": "bf16",
    "device": "cpu",
    "max_seq_len": 512,
    "overlong": "drop",
    "allow_bad": 0.5,
    "max_tokens_per_batch": 2048,
    "plot_loss": False,
}


def prune(model: Path, rows: list[str], out: Path) -> dict[str, Any]:
    """Prune in a process of its own and return what prune.json says, with time and the most private memory."""
    words = [sys.executable, str(HERE / "prune.py"), "--one", str(model), str(out), *rows]
    started = time.perf_counter()
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    report = json.loads((out / "prune.json").read_text(encoding="utf-8"))
    return {**report, "seconds": round(seconds, 1), **json.loads(done.stdout.splitlines()[-1])}


def prune_one(model: str, out: str, rows: list[str]) -> None:
    """The child: prune, and print the most private memory above the level after imports."""
    import threading

    import tuoling.weights.prune as module
    from tuoling.environment import private_memory_bytes
    from tuoling.weights.prune_report import PruneOptions

    level = private_memory_bytes() or 0
    most = level
    over = threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(0.02):
            most = max(most, private_memory_bytes() or 0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        module.prune_vocab(model, Path(out), PruneOptions(rows))
    finally:
        over.set()
        watcher.join()
    print(json.dumps({"private_peak_mb": round((most - level) / 1e6, 1)}))


def train(model: Path, rows: list[str], folder: Path) -> dict[str, Any]:
    """Tokens a second and peak memory of some steps of LoRA."""
    words = [f"{key}={json.dumps(value)}" for key, value in KEYS.items()]
    data = [word for row in rows for word in ("--data", row)]
    command = [
        sys.executable,
        "-m",
        "tuoling",
        "train",
        "--model",
        str(model),
        "--out",
        str(folder),
        "--json",
    ]
    done = subprocess.run([*command, *data, *words], check=True, capture_output=True, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    return {name: result[name] for name in ("tokens_per_s", "peak_rss_gib", "steps")}


def main() -> None:
    """Measure and write prune.json."""
    only = "--prune-only" in sys.argv
    places = [word for word in sys.argv[1:] if word != "--prune-only"]
    if len(places) < 2:
        raise SystemExit(__doc__)
    if places[0] == "--one":
        prune_one(places[1], places[2], places[3:])
        return
    model, rows = Path(places[0]), places[1:]
    with tempfile.TemporaryDirectory(dir=model.parent) as folder:
        out = Path(folder) / "small"
        found: dict[str, Any] = {"model": model.name, "prune": prune(model, rows, out)}
        if not only:
            found["train_before"] = train(model, rows, Path(folder) / "full")
            shutil.rmtree(Path(folder) / "full")
            found["train_after"] = train(out, rows, Path(folder) / "run")
    found["prune"]["out"] = out.name
    found["prune"]["choice"]["keep"] = [Path(row).name for row in rows]
    (HERE / "prune.json").write_text(json.dumps(found, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    kept = found["prune"]
    print(f"words {kept['rows_before']:,} -> {kept['rows_after']:,}")
    print(f"bytes {kept['size_bytes_before'] / 1e6:,.1f} -> {kept['size_bytes_after'] / 1e6:,.1f} MB")
    print(f"private memory of pruning: {kept['private_peak_mb']:,.1f} MB, {kept['seconds']} s with its proof")
    if not only:
        before, after = found["train_before"], found["train_after"]
        print(f"tokens/s {before['tokens_per_s']:,.0f} -> {after['tokens_per_s']:,.0f}")
        print(f"peak {before['peak_rss_gib']:.2f} -> {after['peak_rss_gib']:.2f} GiB")


if __name__ == "__main__":
    main()
