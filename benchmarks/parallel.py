"""Twenty steps in one process and in two, under every engine: the same losses and weights? and memory per rank.

    python benchmarks/parallel.py [--hidden 256] [--layers 4] [--engines ddp,fsdp,...] [--write]

Random BLOOM and LLaMA models of that size are trained in full and with LoRA, in float32 on the CPU, on rows of very
different lengths, by one process and by two under DDP, FSDP2, ZeRO-2 and ZeRO-3 (the last two where DeepSpeed is
installed). Shown are the largest relative difference of a step's loss from the single process, the relative distance
of what was trained (of the change, not of the weights), the peak of resident memory in each rank, and what the fast
step said it had to leave out. --write also writes parallel.md and parallel.json beside this file; engines that are
not run this time keep the rows they had.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.train.parallel_runs import apart, run, tiny

HERE = Path(__file__).parent
ENGINES = ("ddp", "fsdp", "zero2", "zero3", "zero2_offload", "zero3_offload")


def measure(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each family, kind of training and engine."""
    rows = []
    for family in ("bloom", "llama"):
        model = tiny(folder, family, hidden=args.hidden, layers=args.layers)
        for kind in ("full", "lora"):
            keys = {"finetuning_type": kind}
            one = run(folder / f"{family}-{kind}", model, 1, **keys)
            rows.append(row_of(family, kind, "one process", one, one, model))
            for engine in args.engines:
                two = run(folder / f"{family}-{kind}-{engine}", model, 2, parallel=engine, **keys)
                rows.append(row_of(family, kind, engine, one, two, model))
                print(json.dumps(rows[-1]), flush=True)
    return rows


def row_of(family: str, kind: str, engine: str, one: Any, two: Any, model: Path) -> dict[str, Any]:
    loss, change = apart(one, two, model)
    return {
        "family": family,
        "kind": kind,
        "engine": engine,
        "first_loss": two.losses[0],
        "last_loss": two.losses[-1],
        "loss_apart": loss,
        "change_apart": change,
        "peak_rss_gib": two.results.get("peak_rss_gib_of_ranks") or [two.results["peak_rss_gib"]],
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | trained | engine | loss of step 1 → 20 | losses apart | change apart | peak GiB of each rank |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        peaks = " / ".join(f"{peak:.2f}" for peak in row["peak_rss_gib"])
        lines.append(
            f"| {row['family']} | {row['kind']} | {row['engine']} | {row['first_loss']:.6f} → {row['last_loss']:.6f} "
            f"| {row['loss_apart']:.1e} | {row['change_apart']:.1e} | {peaks} |"
        )
    return "\n".join(lines)


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The new rows in place of the old ones of the same name, in the order of the table."""
    named = {(row["family"], row["kind"], row["engine"]): row for row in (*old, *new)}
    order = ("one process", *ENGINES)
    return sorted(named.values(), key=lambda row: (row["family"], row["kind"], order.index(row["engine"])))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    wanted = [name for name in args.engines.split(",") if name]
    installed = importlib.util.find_spec("deepspeed") is not None
    args.engines = [name for name in wanted if installed or not name.startswith("zero")]
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), args)
    shape = f"{args.layers} layers of {args.hidden}, float32, CPU, 20 steps of 4 rows"
    data = HERE / "parallel.json"
    if args.write:
        old = json.loads(data.read_text(encoding="utf-8")) if data.is_file() else {"shape": shape, "rows": []}
        rows = merged(old["rows"] if old["shape"] == shape else [], rows)
        data.write_text(json.dumps({"shape": shape, "rows": rows}, indent=1) + "\n", encoding="utf-8")
        (HERE / "parallel.md").write_text(f"{shape}\n\n{table(rows)}\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
