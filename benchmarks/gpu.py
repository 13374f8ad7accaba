"""Tokens a second, share of the matmul rate and peak memory on a GPU, beside transformers' Trainer with PEFT.

    python benchmarks/gpu.py TOKENIZER.json [--shapes bloom-560m,bloom-7b1,llama-7b,qwen2-0.5b] [--modes lora,full,qlora]
        [--lengths 512,2048] [--batch 8] [--models FOLDER] [--peers PEERS.py --peers-python PYTHON] [--write]

Builds each shape with random weights, writes rows of exactly so many tokens, and runs `tuoling train` on them in a
process of its own. Share: the floating-point operations that are needed (no gradients of frozen weights, the head on
learned tokens only, attention left out) a second, over the card's own bf16 rate at [8192, 4096] x [4096, 11008].
Full fine-tuning is left out for shapes of 7 billion: weights and AdamW in float32 take 110 GB. Modes that do not fit
say so and the others go on. `--write` leaves gpu.json and gpu.md beside this script. `--device cpu` with the shape
`tiny` only shows that the script runs.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.train import HERE, Shape, build, run_peer

SHAPES = {
    "bloom-560m": Shape("bloom", 24, 1024, 16, 250_880, batch=8, rows=64),
    "bloom-7b1": Shape("bloom", 30, 4096, 32, 250_880, batch=8, rows=64),
    "llama-7b": Shape("llama", 32, 4096, 32, 32_000, batch=8, rows=64),
    "qwen2-0.5b": Shape("llama", 24, 896, 14, 151_936, batch=8, rows=64),
    "tiny": Shape("llama", 2, 64, 4, 50_432, batch=2, rows=6),
}
"""qwen2-0.5b: Qwen2's widths with LLaMA's modules; its biases and grouped keys are a hundredth of the work."""
MODES: dict[str, dict[str, Any]] = {
    "lora": {"finetuning_type": "lora"},
    "full": {"finetuning_type": "full"},
    "qlora": {"finetuning_type": "lora", "quantization_bit": 4, "double_quantization": True},
    "int8": {"finetuning_type": "lora", "quantization_bit": 8},
}


def rows_of(length: int, count: int, tokenizer_file: str, folder: Path) -> Path:
    """Rows of `length` tokens each, a quarter of it the question: random words of one token."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(tokenizer_file)
    words = [tokenizer.decode([i]) for i in range(1000, 4000)]
    words = [
        w for w in words if w.startswith(" ") and w.strip().isalpha() and len(tokenizer.encode(w).ids) == 1
    ]
    draw = random.Random(0)
    file = folder / f"rows-{length}.jsonl"
    with file.open("w", encoding="utf-8") as out:
        for _ in range(count):
            question, answer = length // 4, length - length // 4 - 1  # and the end token
            row = {
                "instruction": "".join(draw.choices(words, k=question)).strip(),
                "output": "".join(draw.choices(words, k=answer)),
            }
            out.write(json.dumps(row) + "\n")
    return file


def matmul_rate(device: str) -> float:
    """The device's usual bf16 rate, operations a second: the median of 30."""
    rows, inner, columns = (8192, 4096, 11008) if device != "cpu" else (512, 512, 512)
    x = torch.randn(rows, inner, dtype=torch.bfloat16, device=device)
    weight = torch.randn(columns, inner, dtype=torch.bfloat16, device=device)
    seconds = []
    for _ in range(30):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * rows * inner * columns / median(seconds)


def run(
    model: Path, rows: Path, shape: Shape, mode: str, length: int, device: str, out: Path
) -> dict[str, Any]:
    """One run of the command a user types; its all_results.json, or what stopped it."""
    keys = {
        "model": model,
        "data": rows,
        "output_dir": out,
        "overwrite_output_dir": "true",
        "template": "empty",
        "overlong": "cut_prompt",
        "dtype": "bf16",
        "device": device,
        "max_seq_len": length + 8,
        "per_device_train_batch_size": shape.batch,
        "num_train_epochs": 1,
        "save_steps": 0,
        "plot_loss": "false",
        "ignore_memory_plan": "true",
        **MODES[mode],
    }
    words = [
        f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in keys.items()
    ]
    command = [sys.executable, "-m", "tuoling", "train", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["?"])[-1][:300]}
    results: dict[str, Any] = json.loads((out / "all_results.json").read_text(encoding="utf-8"))
    return results


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: a line a run."""
    lines = [
        "| shape | mode | tokens a row | tokens/s | share of matmul | peak GiB | Trainer + PEFT tokens/s |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for one in found:
        if "failed" in one:
            figures = ["failed", one["failed"], "", ""]
        else:
            peer = one.get("trainer_tokens_per_s")
            figures = [
                f"{one['tokens_per_s']:,.0f}",
                f"{one['share_of_matmul']:.0%}",
                f"{one['peak_gib']:.2f}",
                f"{peer:,.0f} ({one['tokens_per_s'] / peer:.1f}x)" if peer else "",
            ]
        lines.append("| " + " | ".join([one["shape"], one["mode"], str(one["length"]), *figures]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tokenizer")
    parser.add_argument("--shapes", default="bloom-560m,bloom-7b1,llama-7b,qwen2-0.5b")
    parser.add_argument("--modes", default="lora,full,qlora")
    parser.add_argument("--lengths", default="512,2048")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", help="folder where the shapes are kept between runs")
    parser.add_argument("--peers")
    parser.add_argument("--peers-python", default=sys.executable)
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    if asked.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("no GPU here")
    folder = Path(asked.models or tempfile.mkdtemp())
    rate = matmul_rate(asked.device)
    name = torch.cuda.get_device_name() if asked.device != "cpu" else "CPU"
    print(f"{name}: bf16 matmul {rate / 1e12:,.1f} T/s", file=sys.stderr)
    found: list[dict[str, Any]] = []
    for shape_name in asked.shapes.split(","):
        shape = SHAPES[shape_name]
        shape = replace(shape, batch=asked.batch or shape.batch)
        model = build(shape, asked.tokenizer, folder / shape_name)
        for mode in asked.modes.split(","):
            if mode == "full" and shape.hidden >= 4096:
                continue
            for length in (int(text) for text in asked.lengths.split(",")):
                rows = rows_of(length, shape.rows, asked.tokenizer, folder)
                results = run(model, rows, shape, mode, length, asked.device, folder / "run")
                one: dict[str, Any] = {"shape": shape_name, "mode": mode, "length": length}
                if "failed" in results:
                    one["failed"] = results["failed"]
                else:
                    trained = replace(shape, finetuning="full" if mode == "full" else "lora")
                    needed = trained.needed_flops(1.0, results["learned_tokens"] / results["tokens"])
                    one["tokens_per_s"] = results["tokens_per_s"]
                    one["share_of_matmul"] = results["tokens_per_s"] * needed / rate
                    one["peak_gib"] = results["peak_cuda_gib"] or results["peak_rss_gib"]
                    if asked.peers and mode in ("lora", "full"):
                        asked.rows = str(rows)
                        line = run_peer("trainer", asked, trained, model)
                        one["trainer_tokens_per_s"] = line["tokens_per_s"]
                print(one, file=sys.stderr, flush=True)
                found.append(one)
    print(table(found))
    if asked.write:
        kept = {"device": name, "matmul_tflops": round(rate / 1e12, 1), "runs": found}
        (HERE / "gpu.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        (HERE / "gpu.md").write_text(f"{name}\n\n{table(found)}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
