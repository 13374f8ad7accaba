"""A bloom-560m-shaped model pruned to what some rows need: words, bytes, memory, tokens a second of training.

    python benchmarks/prune.py MODEL ROWS...               prune, then train both for some steps
    python benchmarks/prune.py --prune-only MODEL ROWS...  without training
    python benchmarks/prune.py --write MODEL ROWS...       also write benchmarks/prune.json

MODEL is a folder: real weights, or the shape with random ones and any byte-level tokenizer padded to 250,880 rows.
The pruned model is made in a temporary folder beside MODEL and removed. Each training runs in a process of its own.
"""

from __future__ import annotations

import argparse
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
    words = [sys.executable, str(HERE / "prune.py"), str(model), *rows, "--into", str(out)]
    started = time.perf_counter()
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    report = json.loads((out / "prune.json").read_text(encoding="utf-8"))
    return {**report, "seconds": round(seconds, 1), **json.loads(done.stdout.splitlines()[-1])}


def prune_one(model: str, out: Path, rows: list[str]) -> None:
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
        module.prune_vocab(model, out, PruneOptions(rows))
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
    """Measure, print, and write where that is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("rows", nargs="+", metavar="ROWS")
    parser.add_argument("--prune-only", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)  # the child prunes there
    asked = parser.parse_args()
    if asked.into:
        prune_one(str(asked.model), asked.into, asked.rows)
        return
    found = measure(asked.model, asked.rows, train_too=not asked.prune_only)
    show(found)
    if asked.write:
        text = json.dumps(found, ensure_ascii=False, indent=2)
        (HERE / "prune.json").write_text(text + "\n", encoding="utf-8")


def measure(model: Path, rows: list[str], *, train_too: bool) -> dict[str, Any]:
    """What pruning gives, and training before and after."""
    with tempfile.TemporaryDirectory(dir=model.parent) as folder:
        out = Path(folder) / "small"
        found: dict[str, Any] = {"model": model.name, "prune": prune(model, rows, out)}
        if train_too:
            found["train_before"] = train(model, rows, Path(folder) / "full")
            shutil.rmtree(Path(folder) / "full")
            found["train_after"] = train(out, rows, Path(folder) / "run")
    found["prune"]["out"] = out.name
    found["prune"]["choice"]["keep"] = [Path(row).name for row in rows]
    return found


def show(found: dict[str, Any]) -> None:
    """Print the figures, before -> after."""
    kept = found["prune"]
    print(f"words {kept['rows_before']:,} -> {kept['rows_after']:,}")
    print(f"size {kept['size_bytes_before'] / 1e6:,.1f} -> {kept['size_bytes_after'] / 1e6:,.1f} MB")
    print(f"private memory of pruning: {kept['private_peak_mb']:,.1f} MB, {kept['seconds']} s with its proof")
    if "train_after" in found:
        before, after = found["train_before"], found["train_after"]
        print(f"training: {before['tokens_per_s']:,.0f} -> {after['tokens_per_s']:,.0f} tokens/s")
        print(f"peak of training: {before['peak_rss_gib']:.2f} -> {after['peak_rss_gib']:.2f} GiB")


if __name__ == "__main__":
    main()
