"""Tokens a second and peak memory of a training step, beside what a user would pick instead.

    python benchmarks/train.py ROWS.json TOKENIZER.json [--shapes bloom-6x512,llama-8x512] [--rounds 3]
        [--peers PEERS.py --peers-python PYTHON --engines trainer,trainer-group,trl,llamafactory] [--write]

Builds each shape with random weights, then runs `tuoling train` and the peers on the same rows, in turn, round after
round, each in a process of its own, bf16, LoRA r8 alpha 16 dropout 0.05 on all linear layers (or full fine-tuning).
PEERS.py is a script with the command line `run ENGINE --model DIR --data ROWS --rows N --batch B --finetuning lora|full`
that prints one JSON line with tokens_per_s and peak_gib. Medians over rounds; the share of the machine's own matmul
rate counts the floating-point operations that are needed: no gradients of frozen weights, the head on learned tokens.
`--write` leaves train.md and train.json beside this script, `--more` adds the rounds to those that lie there.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{question}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Shape:
    """A model with random weights and how it is trained. hidden, intermediate: widths; rows: of one run."""

    family: str
    layers: int
    hidden: int
    heads: int
    vocabulary: int
    batch: int
    rows: int
    finetuning: str = "lora"
    max_length: int = 1024

    @property
    def intermediate(self) -> int:
        return 4 * self.hidden if self.family == "bloom" else self.hidden * 8 // 3 // 64 * 64

    @property
    def block_parameters(self) -> int:
        """Weights of the linear layers inside the blocks."""
        matrices = 2 if self.family == "bloom" else 3
        return self.layers * self.hidden * (4 * self.hidden + matrices * self.intermediate)

    def needed_flops(self, tokens: float, learned: float) -> float:
        """Matmul operations of a step. LoRA: forward and input gradients; full: weight gradients too."""
        passes = 4 if self.finetuning == "lora" else 6
        return passes * (self.block_parameters * tokens + self.vocabulary * self.hidden * learned)


SHAPES = {
    "bloom-6x512": Shape("bloom", 6, 512, 8, 250_880, batch=8, rows=24),
    "bloom-560m": Shape("bloom", 24, 1024, 16, 250_880, batch=4, rows=12),
    "llama-8x512": Shape("llama", 8, 512, 8, 50_432, batch=8, rows=64),
    "bloom-6x512-full": Shape("bloom", 6, 512, 8, 250_880, batch=8, rows=16, finetuning="full"),
    "llama-8x512-full": Shape("llama", 8, 512, 8, 50_432, batch=8, rows=24, finetuning="full"),
}


@dataclass
class Measured:
    """What one engine did on one shape, a number a round."""

    tokens_per_s: list[float] = field(default_factory=list)
    peak_gib: list[float] = field(default_factory=list)
    loss_first: float = 0.0
    loss_last: float = 0.0


def build(shape: Shape, tokenizer_file: str, folder: Path) -> Path:
    """Random weights in bf16 and the tokenizer, as transformers saves them."""
    from transformers import (
        BloomConfig,
        BloomForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    if (folder / "config.json").exists():
        return folder
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=tokenizer_file, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model: Any
    if shape.family == "bloom":
        config: Any = BloomConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            n_layer=shape.layers,
            n_head=shape.heads,
            use_cache=False,
            **ids,
        )
        model = BloomForCausalLM(config)
    else:
        config = LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            intermediate_size=shape.intermediate,
            tie_word_embeddings=False,
            **ids,
        )
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def same_rows(path: str, count: int, folder: Path) -> Path:
    """The rows the peers' script draws (answered ones, shuffled by seed 0), prompt and all, for template `empty`."""
    rows = [row for row in json.loads(Path(path).read_text(encoding="utf-8")) if row.get("output")]
    random.Random(0).shuffle(rows)
    file = folder / f"rows-{count}.json"
    made = []
    for row in rows[:count]:
        question = row["instruction"] + ("\n" + row["input"] if row.get("input") else "")
        made.append({"instruction": PROMPT.format(question=question), "output": row["output"]})
    file.write_text(json.dumps(made, ensure_ascii=False), encoding="utf-8")
    return file


def run_tuoling(shape: Shape, model: Path, rows: Path, folder: Path) -> dict[str, Any]:
    """One run of the command a user types; returns its all_results.json."""
    out = folder / "run"
    keys = [
        f"output_dir={out}",
        "overwrite_output_dir=true",
        "template=empty",
        "overlong=split",
        "dtype=bf16",
        f"max_seq_len={shape.max_length}",
        f"per_device_train_batch_size={shape.batch}",
        "num_train_epochs=1",
        "learning_rate=1e-4",
        f"finetuning_type={shape.finetuning}",
        "save_steps=0",
        "plot_loss=false",
    ]
    command = [sys.executable, "-m", "tuoling", "train", f"model={model}", f"data={rows}", *keys]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"tuoling failed:\n{done.stderr[-3000:]}")
    results: dict[str, Any] = json.loads((out / "all_results.json").read_text(encoding="utf-8"))
    plan = json.loads((out / "run.json").read_text(encoding="utf-8"))["plan"]
    return {**results, "planned_gib": plan["memory_bytes"] / 2**30}


def run_peer(engine: str, arguments: argparse.Namespace, shape: Shape, model: Path) -> dict[str, Any]:
    """One line of the peers' script; says why where an engine cannot run."""
    command = [
        *(arguments.peers_python, arguments.peers, "run", engine, "--model", str(model)),
        *("--data", arguments.rows, "--rows", str(shape.rows), "--batch", str(shape.batch)),
        *("--finetuning", shape.finetuning, "--max-len", str(shape.max_length)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise SystemExit(f"{engine} failed:\n{(done.stderr or done.stdout)[-3000:]}")
    line: dict[str, Any] = json.loads(lines[-1])
    return line


def matmul_rate(hidden: int) -> float:
    """Usual bf16 rate of this machine at [2048, hidden] x [hidden, 4 hidden], operations a second: the median of 30,
    as a run is timed by what the machine usually gives it and not by its best moment."""
    x, weight = (
        torch.randn(2048, hidden, dtype=torch.bfloat16),
        torch.randn(4 * hidden, hidden, dtype=torch.bfloat16),
    )
    seconds = []
    for _ in range(30):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        seconds.append(time.perf_counter() - start)
    return 2 * 2048 * hidden * 4 * hidden / median(seconds)


def measure(name: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All engines on one shape, in turn."""
    shape = SHAPES[name]
    model = build(shape, arguments.tokenizer, folder / name.removesuffix("-full"))
    rows = same_rows(arguments.rows, shape.rows, folder)
    engines = [engine for engine in arguments.engines.split(",") if engine] if arguments.peers else []
    found = {engine: Measured() for engine in ("tuoling", *engines)}
    ours: dict[str, Any] = {}
    rates = []
    for _ in range(arguments.rounds):
        for engine, kept in found.items():
            rates.append(matmul_rate(shape.hidden))
            if engine == "tuoling":
                line = ours = run_tuoling(shape, model, rows, folder)
                peak, first, last = line["peak_rss_gib"], line["train_loss_first"], line["train_loss_last"]
            else:
                line = run_peer(engine, arguments, shape, model)
                peak, first, last = line["peak_gib"], line["loss_first"], line["loss_last"]
            kept.tokens_per_s.append(line["tokens_per_s"])
            kept.peak_gib.append(peak)
            kept.loss_first, kept.loss_last = first, last
            print(f"{name} {engine}: {line['tokens_per_s']:,.0f} tokens/s, {peak:.2f} GiB", file=sys.stderr)
    learned_share = ours["learned_tokens"] / ours["tokens"]
    ops_per_token = shape.needed_flops(1.0, learned_share)
    return {
        "shape": name,
        **asdict(shape),
        "tokens": ours["tokens"],
        "learned_share": round(learned_share, 4),
        "planned_gib": round(ours["planned_gib"], 3),
        "needed_gflop_per_token": round(ops_per_token / 1e9, 4),
        "matmul_gflops": [round(rate / 1e9, 1) for rate in rates],
        "engines": {engine: asdict(kept) for engine, kept in found.items()},
    }


def with_rounds_of(result: dict[str, Any], kept: list[dict[str, Any]]) -> dict[str, Any]:
    """`result` after the rounds of the same shape that are kept, engine by engine."""
    for old in kept:
        if any(old[key] != result[key] for key in ("shape", "tokens", *Shape.__dataclass_fields__)):
            continue
        result["matmul_gflops"] = old["matmul_gflops"] + result["matmul_gflops"]
        for engine, before in old["engines"].items():
            after = result["engines"].setdefault(engine, {**before, "tokens_per_s": [], "peak_gib": []})
            for key in ("tokens_per_s", "peak_gib"):
                after[key] = before[key] + after[key]
    return result


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a line an engine and shape."""
    lines = [
        "| shape | engine | tokens/s | learned tokens/s | peak GiB | tokens/s of Tuoling ÷ its | its peak ÷ Tuoling's |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        ours = result["engines"]["tuoling"]
        for engine, kept in result["engines"].items():
            speed, peak = median(kept["tokens_per_s"]), median(kept["peak_gib"])
            cells = [
                f"{result['shape']}, batch {result['batch']}",
                engine,
                f"{speed:,.0f}",
                f"{speed * result['learned_share']:,.0f}",
                f"{peak:.2f}",
                f"{median(ours['tokens_per_s']) / speed:.2f}",
                f"{peak / median(ours['peak_gib']):.2f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
        rate = median(result["matmul_gflops"])
        share = median(ours["tokens_per_s"]) * result["needed_gflop_per_token"] / rate
        planned = f"{result['planned_gib']:.2f} planned" if result.get("planned_gib") else ""
        lines.append(
            f"| rounds: {len(ours['tokens_per_s'])} | needed matmuls run at {share:.0%} of this machine's {rate:,.0f} GF/s "
            f"| | | {planned} | | |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", help="Alpaca rows, a JSON array")
    parser.add_argument("tokenizer", help="a tokenizer.json with <s>, </s>, <pad>, <unk> or words to spare")
    parser.add_argument("--shapes", default="bloom-6x512,llama-8x512")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers")
    parser.add_argument("--peers-python", default=sys.executable)
    parser.add_argument("--engines", default="trainer,trainer-group,trl,llamafactory")
    parser.add_argument("--models", help="folder where the shapes are kept between runs")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--more", action="store_true", help="add the rounds to those written before")
    arguments = parser.parse_args()
    folder = Path(arguments.models or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    results = [measure(name, arguments, folder) for name in arguments.shapes.split(",")]
    text = table(results)
    print(text)
    if arguments.write:
        kept_file = HERE / "train.json"
        kept = json.loads(kept_file.read_text(encoding="utf-8")) if kept_file.exists() else []
        names = {result["shape"] for result in results}
        if arguments.more:
            results = [with_rounds_of(result, kept) for result in results]
        kept = [old for old in kept if old["shape"] not in names] + results
        kept_file.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        (HERE / "train.md").write_text(table(kept) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
