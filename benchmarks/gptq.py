"""Seconds a block and peak memory of GPTQ at a model's real shape, with random weights.

python benchmarks/gptq.py [--write]                         bloom-560m's shape: 24 blocks of 1024, 250,880 words
python benchmarks/gptq.py --shape llama --layers 4 --hidden 2048 --rows 64 --bits 4

Random weights take as long as trained ones. Rows are random ids too, `--tokens` of them a row. `--write` leaves
gptq.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig

from tuoling import environment
from tuoling.files import write_json
from tuoling.weights.gptq import linear_names
from tuoling.weights.gptq_job import run_job
from tuoling.weights.tensors import open_weights


def build(folder: Path, shape: str, layers: int, hidden: int, words: int) -> None:
    """A random model in bf16 with a tokenizer of whole words, which gptqmodel asks for and nobody uses."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    if shape == "bloom":
        config = BloomConfig(
            hidden_size=hidden,
            n_layer=layers,
            n_head=max(1, hidden // 64),
            vocab_size=words,
            dtype="bfloat16",
        )
    else:
        config = LlamaConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=max(1, hidden // 128),
            intermediate_size=-(-hidden * 8 // 3 // 256) * 256,
            vocab_size=words,
            dtype="bfloat16",
        )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=("bloom", "llama"), default="bloom")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--words", type=int, default=250_880)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--folder", type=Path, help="where the model and the work go, else a temporary folder"
    )
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as place:
        folder = Path(place)
        build(folder / "model", asked.shape, asked.layers, asked.hidden, asked.words)
        rng = random.Random(0)
        rows = [
            {"input_ids": [rng.randrange(3, asked.words) for _ in range(asked.tokens)], "spans": []}
            for _ in range(asked.rows)
        ]
        write_json(folder / "rows.json", rows)
        layers = linear_names(folder / "model")
        stored = open_weights(folder / "model").infos
        began = time.perf_counter()
        answer = run_job(
            {
                "task": "quantize",
                "model": str(folder / "model"),
                "rows": str(folder / "rows.json"),
                "method": "gptq",
                "config": {
                    "bits": asked.bits,
                    "group_size": asked.group_size,
                    "offload_to_disk": True,
                    "offload_to_disk_path": str(folder / "offload"),
                },
                "device": asked.device,
                "dtype": "bfloat16" if asked.device != "cpu" or environment.cpu_has_bf16() else "float32",
                "resumable": False,
                "checkpoints": str(folder / "checkpoints"),
                "made": str(folder / "made"),
                "allow_remote_code": False,
            },
            folder,
        )
        size = sum(info.size_bytes for info in open_weights(folder / "made").infos.values())
        found = {
            "shape": f"{asked.shape} {asked.layers} x {asked.hidden}, {asked.words:,} words",
            "bits": asked.bits,
            "calibration_tokens": asked.rows * asked.tokens,
            "linear_layers": len(layers),
            "seconds_per_block": round(answer["seconds"] / asked.layers, 2),
            "seconds": round(time.perf_counter() - began, 1),
            "peak_rss_gib": round(answer["peak_rss_gib"], 2),
            "weights_gib": round(sum(info.size_bytes for info in stored.values()) / 2**30, 2),
            "quantised_gib": round(size / 2**30, 2),
            "machine": environment.machine(),
            "versions": environment.versions(),
        }
    print(json.dumps(found, indent=2))
    if asked.write:
        write_json(Path(__file__).with_suffix(".json"), found, indent=2)


if __name__ == "__main__":
    main()
