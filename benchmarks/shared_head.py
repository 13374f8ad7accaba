"""Rows a second with and without `share_head`, the same rows and steps, in turn.

    python benchmarks/shared_head.py MODEL ROWS [--template alpaca] [--batch 8] [--steps 8] [--rounds 3] [--write]

Prints the tokens that are computed either way, the seconds of the steps (without the first) and their ratio, each
round's and the median. `--write` leaves shared_head.json beside this script.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent


def run(asked: argparse.Namespace, share: bool, out: Path) -> dict[str, Any]:
    """One run of the command a user types; its all_results.json."""
    keys = {
        "model": asked.model,
        "data": asked.rows,
        "output_dir": out,
        "overwrite_output_dir": "true",
        "template": asked.template,
        "overlong": "drop",
        "max_seq_len": 1024,
        "per_device_train_batch_size": asked.batch,
        "max_steps": asked.steps,
        "lora_dropout": 0.0,
        "save_steps": 0,
        "plot_loss": "false",
        "share_head": str(share).lower(),
    }
    words = [f"{key}={value}" for key, value in keys.items()]
    done = subprocess.run(
        [sys.executable, "-m", "tuoling", "train", *words], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    results: dict[str, Any] = json.loads((out / "all_results.json").read_text(encoding="utf-8"))
    return results


def main() -> None:
    """Run in turn and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("--template", default="alpaca")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    found: dict[str, Any] = {"template": asked.template, "batch": asked.batch, "steps": asked.steps}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(asked.rounds):
            for share in (False, True):
                results = run(asked, share, Path(folder) / "run")
                kept = found.setdefault(
                    "shared" if share else "alone", {"tokens": [], "seconds": [], "loss": []}
                )
                kept["tokens"].append(results["tokens"])
                kept["seconds"].append(results["seconds"])
                kept["loss"].append(results["train_loss_last"])
                print(
                    f"share_head={share}: {results['tokens']:,} tokens, {results['seconds']:.2f} s",
                    flush=True,
                )
    alone, shared = found["alone"], found["shared"]
    ratios = [a / b for a, b in zip(alone["seconds"], shared["seconds"], strict=True)]
    found["times_faster"] = [round(ratio, 3) for ratio in ratios]
    saved = 1 - shared["tokens"][0] / alone["tokens"][0]
    print(
        f"{saved:.1%} of the tokens saved, {median(ratios):.2f} times the rows a second (median of {len(ratios)}); "
        f"last loss {alone['loss'][0]:.6f} / {shared['loss'][0]:.6f}"
    )
    if asked.write:
        (HERE / "shared_head.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
