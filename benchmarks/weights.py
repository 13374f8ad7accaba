"""Time and memory of converting, merging and writing GGUF, at any shape, up to a LLaMA 7B of 13.5 GB.

    python benchmarks/weights.py                                   small, in a minute: is everything in its place
    python benchmarks/weights.py --shape llama-7b --work DIR       13.5 GB a copy; needs three copies of disk
    python benchmarks/weights.py --shape llama-7b --work DIR --steps build,meta,huggingface
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MB = 1_000_000


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaMA."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    wide: int
    words: int

    def config(self, dtype: str) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": self.dim,
            "intermediate_size": self.wide,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.words,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dtype": dtype,
        }


SHAPES = {
    "llama-7b": Shape(4096, 32, 32, 32, 11008, 32000),
    "llama-1b": Shape(2048, 16, 32, 8, 8192, 32000),
    "llama-300mb": Shape(1024, 11, 16, 16, 2816, 8000),
    "small": Shape(256, 4, 8, 4, 704, 2000),
}

STEPS = ("build", "meta", "huggingface", "reshard", "merge", "gguf", "gguf-q8_0")


def build(folder: Path, shape: Shape, dtype: str = "float16", seed: int = 0) -> Path:
    """A random Hugging Face folder, every tensor drawn, written and dropped before the next."""
    import torch

    from tuoling.weights.meta_layout import llama_shapes
    from tuoling.weights.safetensors_writer import SafetensorsWriter
    from tuoling.weights.tensors import TensorInfo

    kind = getattr(torch, dtype)
    config = shape.config(dtype)
    infos = {name: TensorInfo(kind, size) for name, size in llama_shapes(config).items()}
    chance = torch.Generator().manual_seed(seed)
    with SafetensorsWriter(folder, infos) as writer:
        for name, info in infos.items():
            if len(info.shape) == 1:
                tensor = torch.ones(info.shape, dtype=kind)
            else:
                tensor = torch.empty(info.shape, dtype=kind).normal_(0, 0.02, generator=chance)
            writer.write(name, tensor)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _tokenizer(folder, shape.words)
    return folder


def _tokenizer(folder: Path, words: int) -> None:
    """A byte-level BPE of `words` words: bytes, then pairs of them, so that GGUF has something to write."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(left, right) for left in letters for right in letters][: words - len(special) - len(letters)]
    vocab = {token: index for index, token in enumerate([*special, *letters, *map("".join, pairs)])}
    inner = Tokenizer(BPE(vocab=vocab, merges=pairs))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)


def adapter(folder: Path, base: Path, shape: Shape, rank: int = 8) -> Path:
    """A random LoRA on every linear layer, as PEFT writes it."""
    import torch
    from safetensors.torch import save_file

    from tuoling.weights.meta_layout import llama_shapes

    torch.manual_seed(1)
    tensors = {}
    for name, size in llama_shapes(shape.config("float16")).items():
        if "_proj" in name:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, size[1]) * 0.01
            tensors[f"{stem}.lora_B.weight"] = torch.randn(size[0], rank) * 0.01
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({name.split(".")[-3] for name in tensors})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": 16,
        "target_modules": targets,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


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
    }
    return table[step]


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
        if step == "merge" and not (work / "adapter").exists():
            adapter(work / "adapter", work / "hf", shape)
        words, out = command(step, work, shards)
        row = {"shape": name, "step": step, **asdict(shape), "largest_mb": round(largest, 1)}
        row |= watched(words if verify else [*words, "--no-verify"])
        row["written_mb"] = size_mb(out)
        row["floor_mb"] = round(3 * largest + 300, 1)
        rows.append(row)
        print(json.dumps(row), flush=True)
        read_later = step == "meta" and {"huggingface", "reshard"} & set(later[number + 1 :])
        if not keep and not read_later:
            _delete(out)
        if not keep and step == "reshard" and "huggingface" not in later[number + 1 :]:
            _delete(work / "meta")
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
        "# Converting, merging, GGUF: time and private memory",
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
