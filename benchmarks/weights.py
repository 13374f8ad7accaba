"""Time and memory of converting, merging, pruning, diffs and writing GGUF, at any shape, up to a LLaMA 7B of 13.5 GB.

    python benchmarks/weights.py                                   small, in a minute: is everything in its place
    python benchmarks/weights.py --shape llama-7b --work DIR       13.5 GB a copy; needs three copies of disk
    python benchmarks/weights.py --shape llama-7b --work DIR --steps build,meta,huggingface
    python benchmarks/weights.py --shape llama-1b --work DIR --steps build,prune,diff,patch,diff-xor,patch-xor
    python benchmarks/weights.py ... --write                       add the rows to weights.json and weights.md

The checkpoint is random, and made tensor by tensor. Each step is the real command in a process of its own, which
first imports everything and says so; its memory is then read 200 times a second from outside. Private memory is
RssAnon + RssShmem above the level after the imports: clean pages of mapped files, which the system drops when it
needs memory, are not counted. A copy is deleted as soon as no later step reads it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.random_llama import SHAPES, Shape, adapter, build  # noqa: E402

MB = 1_000_000
DIFFS = ("diff", "diff-xor", "diff-additive")
STEPS = (
    *("build", "meta", "huggingface", "reshard", "merge", "gguf", "gguf-q8_0", "prune"),
    *(name for diff in DIFFS for name in (diff, diff.replace("diff", "patch"))),
)


def command(step: str, work: Path, shards: int) -> tuple[list[str], Path]:
    """The words of `tuoling` for a step, and what it writes."""
    hf, meta = work / "hf", work / "meta"
    table: dict[str, tuple[list[str], Path]] = {
        "meta": (["convert", str(hf), str(meta), "--to", "meta", "--shards", str(shards)], meta),
        "huggingface": (["convert", str(meta), str(work / "back")], work / "back"),
        "reshard": (
            ["convert", str(meta), str(work / "resharded"), "--to", "meta", "--shards", str(2 * shards)],
            work / "resharded",
        ),
        "merge": (["merge", str(work / "adapter"), str(work / "merged")], work / "merged"),
        "gguf": (["convert", str(hf), str(work / "f16.gguf"), "--outtype", "f16"], work / "f16.gguf"),
        "gguf-q8_0": (["convert", str(hf), str(work / "q8.gguf"), "--outtype", "q8_0"], work / "q8.gguf"),
        "prune": (
            [
                "prune-vocab",
                str(hf),
                str(work / "pruned"),
                "--keep",
                str(work / "rows.jsonl"),
                "--base",
                "ascii",
            ],
            work / "pruned",
        ),
    }
    for diff in DIFFS:
        kind = diff.removeprefix("diff").removeprefix("-") or "tuoling"
        made, again = work / kind, work / f"{kind}-again"
        # one file is XOR's key; the others compare folders
        base = str(next(iter(sorted(hf.glob("*.safetensors"))), hf)) if kind == "xor" else str(hf)
        table[diff] = (["diff", base, str(work / "target"), str(made), "--format", kind], made)
        table[diff.replace("diff", "patch")] = (["patch", base, str(made), str(again)], again)
    return table[step]


def prepare(step: str, work: Path, shape: Shape) -> None:
    """What a step reads besides the model."""
    if step == "merge" and not (work / "adapter").exists():
        adapter(work / "adapter", work / "hf", shape)
    if step in DIFFS and not (work / "target").exists():
        build(work / "target", shape, seed=1, base=work / "hf")
    if step == "prune":
        rows = [{"instruction": f"What is {n}?", "input": "", "output": f"It is {n}."} for n in range(1000)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (work / "rows.jsonl").write_text(lines, encoding="utf-8")


def private_bytes(pid: int) -> int:
    """RssAnon + RssShmem of a process; 0 once it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return 0
    fields = dict(line.split(":", 1) for line in text.splitlines() if line.startswith("Rss"))
    return sum(int(fields.get(name, "0 kB").split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


def watched(words: list[str]) -> dict[str, Any]:
    """Run `tuoling WORDS` in a process of its own and say what it took."""
    child = subprocess.Popen(
        [sys.executable, __file__, "--child", json.dumps(words)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdin and child.stdout and child.stderr
    ready = child.stdout.readline()
    level, peak = private_bytes(child.pid), 0
    child.stdin.write("go\n")
    child.stdin.flush()
    began = time.perf_counter()
    while child.poll() is None:
        peak = max(peak, private_bytes(child.pid))
        time.sleep(0.005)
    seconds = time.perf_counter() - began
    said, notes = child.stdout.read(), child.stderr.read()
    if child.returncode or ready.strip() != "ready":
        raise SystemExit(f"{' '.join(words)}\n{said}{notes}")
    return {
        "private_mb": round((peak - level) / MB, 1),
        "level_mb": round(level / MB, 1),
        "seconds": round(seconds, 2),
        "cpu_seconds": json.loads(said.strip().splitlines()[-1])["cpu_seconds"],
    }


def child(words: list[str]) -> None:
    """Import what the commands import, say so, wait, and run."""
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    import tuoling.weights
    from tuoling.cli.main import app

    for module in pkgutil.iter_modules(tuoling.weights.__path__):
        importlib.import_module(f"tuoling.weights.{module.name}")
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.process_time()
    code = app(words, standalone_mode=False)
    print(json.dumps({"cpu_seconds": round(time.process_time() - began, 2)}), flush=True)
    sys.exit(code if isinstance(code, int) else 0)


def size_mb(path: Path) -> float:
    files = path.rglob("*") if path.is_dir() else [path]
    return round(sum(file.stat().st_size for file in files if file.is_file()) / MB, 1)


def measure(
    name: str, work: Path, steps: list[str], *, shards: int, verify: bool, keep: bool
) -> list[dict[str, Any]]:
    """Run the steps in order; a row of figures for each."""
    shape = SHAPES[name]
    work.mkdir(parents=True, exist_ok=True)
    rows = []
    if "build" in steps or not (work / "hf").exists():
        began = time.perf_counter()
        build(work / "hf", shape)
        seconds = round(time.perf_counter() - began, 1)
        print(f"built {size_mb(work / 'hf'):,} MB in {seconds} s", flush=True)
    largest = max(shape.words, shape.wide) * shape.dim * 2 / MB
    later = [step for step in steps if step != "build"]
    for number, step in enumerate(later):
        prepare(step, work, shape)
        words, out = command(step, work, shards)
        row = {"shape": name, "step": step, **asdict(shape), "largest_mb": round(largest, 1)}
        has_gate = words[0] not in ("diff", "patch")  # these compare hashes, always
        row |= watched(words if verify or not has_gate else [*words, "--no-verify"])
        row["written_mb"] = size_mb(out)
        row["floor_mb"] = round(3 * largest + 300, 1)
        rows.append(row)
        print(json.dumps(row), flush=True)
        readers = {"huggingface", "reshard"} if step == "meta" else {step.replace("diff", "patch")} - {step}
        read_later = readers & set(later[number + 1 :])
        if not keep and not read_later:
            _delete(out)
        if not keep and step == "reshard" and "huggingface" not in later[number + 1 :]:
            _delete(work / "meta")
        if not keep and step.startswith("patch"):
            _delete(command(step.replace("patch", "diff"), work, shards)[1])
    return rows


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write(rows: list[dict[str, Any]]) -> None:
    """Merge into weights.json and write weights.md from it."""
    path = HERE / "weights.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    merged = {(row["shape"], row["step"]): row for row in [*known, *rows]}
    path.write_text(json.dumps(list(merged.values()), indent=1) + "\n", encoding="utf-8")
    lines = [
        "# Converting, merging, GGUF, pruning, diffs: time and private memory",
        "",
        "Printed by `python benchmarks/weights.py`. Private memory: RssAnon + RssShmem above the level after the",
        "imports. Floor: 3 x the largest tensor + 300 MB.",
        "",
        "| shape | step | written, MB | largest tensor, MB | private, MB | floor, MB | seconds | CPU seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in merged.values():
        names = (
            "shape",
            "step",
            "written_mb",
            "largest_mb",
            "private_mb",
            "floor_mb",
            "seconds",
            "cpu_seconds",
        )
        lines.append("| " + " | ".join(str(row[name]) for name in names) + " |")
    (HERE / "weights.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--work", type=Path, default=Path("benchmark-weights"))
    parser.add_argument("--steps", default="build,meta,huggingface,reshard")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument(
        "--verify", action="store_true", help="with the parity gate, which has a process of its own"
    )
    parser.add_argument("--keep", action="store_true", help="delete nothing")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--child")
    asked = parser.parse_args()
    if asked.child:
        child(json.loads(asked.child))
        return
    steps = asked.steps.split(",")
    if unknown := set(steps) - set(STEPS):
        parser.error(f"no such step: {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    rows = measure(asked.shape, asked.work, steps, shards=asked.shards, verify=asked.verify, keep=asked.keep)
    if not asked.keep:
        _delete(asked.work)
    if asked.write:
        write(rows)


if __name__ == "__main__":
    main()
