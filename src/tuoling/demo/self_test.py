"""`tuoling doctor`'s self-test: every path this machine has, tried for some seconds on a model made for it.

Each path runs in a process of its own, so that a library that takes its process with it is a finding and not the end.
The training paths take three steps and are held against float32 on the CPU.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuoling import environment, files
from tuoling.language import tr

CHILD = (sys.executable, "-m", "tuoling.demo.self_test")
TIMEOUT_S = 120
"""A path takes about ten seconds, most of them for importing libraries; a machine that is busy gets longer."""
STEPS = 3
TOLERANCE = {"fp32": 1e-3, "bf16": 0.05, "fp16": 0.05, "int8": 0.05, "4-bit": 0.15}
"""Relative, of the first step's loss. bf16 keeps 8 bits, 4 bits 16 values."""


@dataclass(frozen=True, slots=True)
class Way:
    """A way to compute. keys: of the run, for training; kind: train, chat or gguf."""

    name: str
    kind: str
    keys: dict[str, Any]
    nproc: int = 1
    precision: str = "fp32"


@dataclass(frozen=True, slots=True)
class Finding:
    """problem: None where the path works. said: what it did."""

    name: str
    seconds: float
    said: str
    problem: str | None


def paths(device: str, dtype: str) -> list[Way]:
    """Those of this machine, the plain one first: the others are held against it. device, dtype: as a run picks them."""
    cpu = {"device": "cpu", "dtype": "fp32"}
    found = [Way(tr("training, CPU, fp32", "训练，CPU，fp32"), "train", cpu)]
    if environment.cpu_has_bf16():
        keys = {"device": "cpu", "dtype": "bf16"}
        found.append(Way(tr("training, CPU, bf16", "训练，CPU，bf16"), "train", keys, precision="bf16"))
    if device != "cpu":
        keys = {"device": device, "dtype": dtype}
        name = tr(f"training, {device}, {dtype}", f"训练，{device}，{dtype}")
        found.append(Way(name, "train", keys, precision=dtype))
    if _there("bitsandbytes"):
        for bits, precision in ((8, "int8"), (4, "4-bit")):
            name = tr(f"training on a base in {bits} bits", f"训练，{bits} 位基座")
            low = {"device": device, "dtype": "fp32" if device == "cpu" else dtype, "quantization_bit": bits}
            found.append(Way(name, "train", low, precision=precision))
    engines = ["ddp", "fsdp", *(["zero2"] if _there("deepspeed") else [])]
    for engine in engines:
        name = tr(f"two processes, {engine}", f"两个进程，{engine}")
        found.append(Way(name, "train", {**cpu, "parallel": engine}, nproc=2))
    found.append(Way(tr("chat, transformers", "对话，transformers"), "chat", {"device": device}))
    if _there("gguf") and _there("llama_cpp"):
        found.append(Way(tr("chat, GGUF in llama.cpp", "对话，llama.cpp 中的 GGUF"), "gguf", {}))
    return found


def _there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def self_test(folder: Path, device: str, dtype: str) -> Iterator[Finding]:
    """Try each path, one after another. folder: an empty one for what they write."""
    write_files(folder)
    for number, path in enumerate(paths(device, dtype)):
        yield try_path(folder, number, path)


def write_files(folder: Path) -> None:
    """A model from nothing and 16 rows."""
    from tuoling.demo import base, rows

    texts = list(rows.tokenizer_texts(20, seed=1))
    tokenizer = base.as_sentencepiece(base.train_tokenizer(texts, "".join(texts), vocabulary=768))
    size = base.Size(hidden=64, layers=2, heads=4, vocabulary=768)
    base.write_blank_model(folder / "model", tokenizer, family="bloom", size=size, seed=1)
    rows.write_jsonl(folder / "rows.jsonl", rows.training_rows(16, seed=1))


def try_path(folder: Path, number: int, path: Way) -> Finding:
    """One path, in a process of its own."""
    started = time.perf_counter()
    job = {"number": number, "kind": path.kind, "keys": path.keys, "nproc": path.nproc}
    try:
        done = subprocess.run(
            [*CHILD, str(folder), json.dumps(job)],
            capture_output=True,
            timeout=TIMEOUT_S,
            check=False,
            env=environment.variables(TUOLING_CACHE=str(folder / "cache"), HF_HUB_OFFLINE="1"),
        )
    except subprocess.TimeoutExpired:
        problem = tr(f"not done after {TIMEOUT_S} s", f"{TIMEOUT_S} 秒还没有完成")
        return Finding(path.name, float(TIMEOUT_S), "", problem)
    seconds = round(time.perf_counter() - started, 1)
    lines = done.stdout.decode(errors="replace").strip().splitlines()
    if done.returncode or not lines:
        return Finding(path.name, seconds, "", _why(done))
    result = json.loads(lines[-1])
    return Finding(path.name, seconds, result["said"], _judge(folder, path, result))


def _why(done: subprocess.CompletedProcess[bytes]) -> str:
    """Of a process that failed."""
    said = [line.strip() for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
    if done.returncode < 0:
        return tr(f"ended by signal {-done.returncode}", f"被信号 {-done.returncode} 终止")
    return said[-1] if said else tr(f"exit code {done.returncode}", f"退出码 {done.returncode}")


def _judge(folder: Path, path: Way, result: dict[str, Any]) -> str | None:
    """What is wrong with the first loss, held against that of the first path."""
    loss, reference = result.get("loss"), folder / "reference.json"
    if loss is None:
        return None
    if not reference.is_file():
        files.write_json(reference, loss)
    expected = files.read_json(reference)
    if abs(loss - expected) <= TOLERANCE[path.precision] * expected:
        return None
    return tr(
        f"the first loss is {loss:.4f}, on the CPU in fp32 {expected:.4f}",
        f"第一步损失是 {loss:.4f}，而 CPU fp32 是 {expected:.4f}",
    )


def _train(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    from tuoling import api

    run = api.train(
        model_name_or_path=str(folder / "model"),
        data=str(folder / "rows.jsonl"),
        output_dir=str(folder / f"run-{job['number']}"),
        template="domain_bloom",
        max_steps=STEPS,
        batch_size=8,
        lora_dropout=0.0,
        save_steps=0,
        plot_loss=False,
        say=lambda _: None,
        nproc=job["nproc"],
        **job["keys"],
    )
    first, last = run.results["train_loss_first"], run.results["train_loss_last"]
    return {"loss": first, "said": tr(f"loss {first:.4f} → {last:.4f}", f"损失 {first:.4f} → {last:.4f}")}


def _chat(model: Path, **options: Any) -> dict[str, Any]:
    from tuoling import api

    with api.load(model, **options) as loaded:
        reply = loaded.reply("你叫什么名字？", max_new_tokens=8)
    return {"said": tr(f"{reply.completion_tokens} tokens", f"{reply.completion_tokens} 个 token")}


def _gguf(folder: Path) -> dict[str, Any]:
    from tuoling.weights.convert import ConvertOptions, convert

    out = folder / "model.gguf"
    convert(folder / "model", out, options=ConvertOptions(outtype="f16"))
    return _chat(out, template="domain_bloom")


def main() -> None:
    """The child: `FOLDER JOB`. Prints one JSON line."""
    folder, job = Path(sys.argv[1]), json.loads(sys.argv[2])
    environment.quiet_libraries()
    if job["kind"] == "train":
        result = _train(folder, job)
    elif job["kind"] == "chat":
        result = _chat(folder / "model", template="domain_bloom", **job["keys"])
    else:
        result = _gguf(folder)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
