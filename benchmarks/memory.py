"""Estimated against measured peak memory, and the guide's table of models.

    python benchmarks/memory.py                         tiny models, made on the spot
    python benchmarks/memory.py MODEL DATA [KEY=VALUE]  one run's estimate against what two steps took
    python benchmarks/memory.py --run MODEL DATA ...    and against the peak of a run of three epochs
    python benchmarks/memory.py --table                 the guide's table, from shapes alone

Each measurement runs in a process of its own (`tuoling plan --probe` does the same). A run meets the longest batch
that estimate and probe are about only where DATA is one batch. The rows are added to
memory.json and memory.md is written from it; a run of the same name takes the place of the old one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
TINY = (
    ("llama", "lora", "bf16"),
    ("llama", "full", "fp32"),
    ("bloom", "lora", "bf16"),
    ("bloom", "full", "fp32"),
)
GUIDE: dict[str, tuple[str, dict[str, Any]]] = {
    "bloomz-560m": ("bloom", {"vocab_size": 250880, "hidden_size": 1024, "n_layer": 24, "n_head": 16}),
    "bloomz-1b1": ("bloom", {"vocab_size": 250880, "hidden_size": 1536, "n_layer": 24, "n_head": 16}),
    "bloomz-1b7": ("bloom", {"vocab_size": 250880, "hidden_size": 2048, "n_layer": 24, "n_head": 16}),
    "bloomz-3b": ("bloom", {"vocab_size": 250880, "hidden_size": 2560, "n_layer": 30, "n_head": 32}),
    "bloomz-7b1": ("bloom", {"vocab_size": 250880, "hidden_size": 4096, "n_layer": 30, "n_head": 32}),
    "Qwen2.5-0.5B": ("qwen2", {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
                               "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
                               "tie_word_embeddings": True}),
    "Qwen2.5-1.5B": ("qwen2", {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
                               "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936,
                               "tie_word_embeddings": True}),
    "Qwen2.5-7B": ("qwen2", {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                             "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
                             "tie_word_embeddings": False}),
}  # fmt: skip
COLUMNS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("LoRA, bf16", {"dtype": "bf16"}),
    (
        "LoRA, bf16, saving",
        {"dtype": "bf16", "per_device_train_batch_size": 1, "gradient_checkpointing": True},
    ),
    ("LoRA, fp32", {"dtype": "fp32"}),
    ("all weights", {"dtype": "fp32", "finetuning_type": "full"}),
)


def measure(name: str, keys: dict[str, Any]) -> dict[str, Any]:
    """Estimate and measured peak of two steps of the longest batch."""
    from tuoling.config import RunConfig
    from tuoling.train.memory_probe import probe_memory
    from tuoling.train.prepare import prepare

    config = RunConfig(device="cpu", **keys)
    plan = prepare(config, say=lambda _: None).plan
    probe = probe_memory(config)
    row: dict[str, Any] = {"run": name, "estimate_gib": round(plan.memory.total / 2**30, 3)}
    row["parts"] = plan.memory.parts()
    if probe.peak_bytes is not None:
        row["peak_gib"] = round(probe.peak_bytes / 2**30, 3)
        row["ratio"] = round(plan.memory.total / probe.peak_bytes, 3)
    print(row, flush=True)
    return row


def run_peak(model: str, data: str, settings: list[str]) -> float:
    """GiB that `tuoling train` says it took at most."""
    with tempfile.TemporaryDirectory() as folder:
        keys = ["template=alpaca", *settings, "num_train_epochs=3", "save_steps=0", "plot_loss=false"]
        words = [f"model={model}", f"data={data}", f"output_dir={folder}/run", *keys]
        subprocess.run([sys.executable, "-m", "tuoling", "train", *words], check=True, capture_output=True)
        results = json.loads((Path(folder) / "run" / "all_results.json").read_text(encoding="utf-8"))
    return round(float(results["peak_rss_gib"]), 3)


def tiny() -> list[dict[str, Any]]:
    """A llama and a bloom of 2 layers, trained in both ways."""
    sys.path.insert(0, str(HERE.parent))
    from tests.tiny import sum_rows, tiny_model, write_rows

    found = []
    with tempfile.TemporaryDirectory() as folder:
        rows = write_rows(Path(folder) / "rows.jsonl", sum_rows(20))
        for family, kind, dtype in TINY:
            model = tiny_model(Path(folder) / family, family, hidden=128)
            keys = {
                "model_name_or_path": str(model),
                "data": (str(rows),),
                "template": "alpaca",
                "finetuning_type": kind,
                "dtype": dtype,
                "per_device_train_batch_size": 8,
            }
            found.append(measure(f"tiny {family} 2 x 128, {kind}, {dtype}", keys))
    return found


def write(rows: list[dict[str, Any]]) -> None:
    """Merge into memory.json and write memory.md from it."""
    path = HERE / "memory.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    merged = {row["run"]: row for row in [*known, *rows]}
    path.write_text(json.dumps(list(merged.values()), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    lines = [
        "# Memory: estimate against measured peak",
        "",
        "Printed by `python benchmarks/memory.py`. Estimate: from shapes alone. Peak: resident memory of a",
        "process over two steps of the longest batch (what `plan --probe` shows). Run: what three epochs took.",
        "",
        "| run | estimate, GiB | peak, GiB | estimate / peak | run, GiB | parts, GiB |",
        "|---|---|---|---|---|---|",
    ]
    for row in merged.values():
        cells = (
            row["run"],
            row["estimate_gib"],
            row.get("peak_gib", "-"),
            row.get("ratio", "-"),
            row.get("run_gib", "-"),
            row["parts"],
        )
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    (HERE / "memory.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def table() -> None:
    """GiB for rows of 512 tokens, 4 at a time, LoRA of rank 8 on all linears."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tuoling.config import RunConfig
    from tuoling.train.memory import estimate_memory
    from tuoling.train.prepare import shape_size

    print("| model | parameters | " + " | ".join(name for name, _ in COLUMNS) + " |")
    for name, (family, shape) in GUIDE.items():
        config = AutoConfig.for_model(family, **shape)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        cells = []
        for _, keys in COLUMNS:
            run = RunConfig(**keys)
            memory = estimate_memory(
                run,
                model_config=config,
                lengths=np.full(8, 512),
                size=shape_size(model, run),
                dtype=keys["dtype"],
            )
            gib = memory.total / 2**30
            cells.append(f"{gib:.1f}" if gib < 10 else f"{gib:.0f}")
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"| {name} | {parameters / 1e9:.2f} B | " + " | ".join(cells) + " |", flush=True)


def main(words: list[str]) -> None:
    from tuoling import environment

    environment.quiet_libraries()
    if words == ["--table"]:
        table()
    elif words:
        really = words[0] == "--run"
        words = words[really:]
        model, data, *settings = words
        from tuoling.config import load_config

        loaded = load_config(
            [], settings, {"model_name_or_path": model, "data": [data], "template": "alpaca"}
        )
        keys = loaded.config.model_dump(exclude={"device"})
        row = measure(" ".join([Path(model).name, Path(data).stem, *settings]), keys)
        if really:
            row["run_gib"] = run_peak(model, data, settings)
            print(f"run: {row['run_gib']} GiB")
        write([row])
    else:
        write(tiny())


if __name__ == "__main__":
    main(sys.argv[1:])
