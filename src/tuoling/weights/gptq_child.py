"""The process that quantises or measures: `python -m tuoling.weights.gptq_child JOB.json`, the answer in its `answer`.

A process of its own, because gptqmodel prints at every step, changes other libraries as it is imported and sizes
its threads by the environment; and because the memory it needs can then be told.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tuoling import environment
from tuoling.errors import TuolingError
from tuoling.files import read_json, write_json
from tuoling.models.load import load_model
from tuoling.models.source import find_model
from tuoling.weights.gptq_rows import Sample, rows_from_json
from tuoling.weights.rtn import quantise

GENERATED_TOKENS = 32


def quantize(job: dict[str, Any]) -> dict[str, Any]:
    """Run gptqmodel on a plain folder; what it writes lies in job["made"]."""
    from gptqmodel import BACKEND, AWQConfig, CheckpointConfig, GPTQConfig, GPTQModel

    rows = rows_from_json(read_json(job["rows"]))
    items = [{"input_ids": list(row.input_ids), "attention_mask": [1] * len(row.input_ids)} for row in rows]
    began = time.perf_counter()
    config = (AWQConfig if job["method"] == "awq" else GPTQConfig)(**job["config"])
    model = GPTQModel.load(
        job["model"],
        config,
        device=job["device"],
        dtype=job["dtype"],
        trust_remote_code=job["allow_remote_code"],
    )
    checkpoint = None
    if job["resumable"]:
        _allow_checkpoints()
        checkpoint = CheckpointConfig(path=job["checkpoints"])
    log = model.quantize(
        items,
        batch_size=1,
        calibration_data_min_length=1,
        checkpoint=checkpoint,
        # its own choice for AWQ packs the same layout, but only where there is CUDA
        backend=BACKEND.AWQ_TORCH if job["method"] == "awq" else BACKEND.AUTO,
    )
    quantised = time.perf_counter()
    model.save(job["made"])
    losses = [
        {"layer": row.get("layer"), "module": row.get("module"), "loss": row.get("loss")}
        for steps in log.values()
        for row in steps
    ]
    return {"seconds": quantised - began, "losses": losses, "peak_rss_gib": environment.peak_rss_gib()}


def _allow_checkpoints() -> None:
    """gptqmodel keeps a whole state after every layer, and lets two families use it by name.

    What it keeps is not theirs alone: hidden states, packed layers, keyword arguments of the blocks. Our tests stop
    and resume each family of `gptq.RESUMABLE` and find the bytes of a straight run.
    """
    from gptqmodel.looper import gptq_checkpoint

    gptq_checkpoint.validate_checkpoint_support = lambda *_, **__: None


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Perplexity of answers, tokens a second and memory of a folder; job["rtn"]: rounded to nearest as well."""
    samples = rows_from_json(read_json(job["rows"]))
    source = find_model(job["model"])
    before = environment.peak_rss_gib()
    model = load_model(
        source, dtype=job["dtype"], device=job["device"], allow_remote_code=job["allow_remote_code"]
    )
    found: dict[str, Any] = {"perplexity": perplexity(model, samples)}
    found["tokens_per_s"] = decoding_rate(model, samples[0])
    found["memory_gib"] = environment.peak_rss_gib() - before
    if job["rtn"]:
        round_layers(model, **job["rtn"])
        found["rtn_perplexity"] = perplexity(model, samples)
    return found


def perplexity(model: Any, samples: list[Sample]) -> float:
    """exp of the mean cross entropy of the answers' tokens, in nats."""
    nats, count = 0.0, 0
    device = model.get_input_embeddings().weight.device
    for sample in samples:
        ids_T = torch.tensor(sample.input_ids, device=device)
        with torch.inference_mode():
            logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0].float()
        for begin, end in sample.spans:
            predicted = logits_TV[max(begin, 1) - 1 : end - 1]
            nats += float(
                torch.nn.functional.cross_entropy(predicted, ids_T[max(begin, 1) : end], reduction="sum")
            )
            count += end - max(begin, 1)
    return math.exp(nats / count)


def decoding_rate(model: Any, sample: Sample) -> float:
    """Tokens a second of greedy decoding with a cache, behind the question of one row, without the first two."""
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([sample.input_ids[: max(sample.spans[0][0], 1)]], device=device)
    cache, began = None, 0.0
    with torch.inference_mode():
        for step in range(GENERATED_TOKENS + 2):
            if step == 2:
                began = time.perf_counter()
            out = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
    return GENERATED_TOKENS / (time.perf_counter() - began)


def round_layers(
    model: torch.nn.Module, *, layers: list[str], bits: int, group_size: int, symmetric: bool
) -> None:
    """Put every weight of `layers` on its nearest step, in place."""
    for name in layers:
        module: Any = model.get_submodule(name)
        packed = quantise(
            module.weight.data.cpu(), bits, group_size, symmetric=symmetric, minus_one=symmetric
        )
        module.weight.data.copy_(packed.dequantize().t())


def main(place: Path) -> int:
    """Do the job; the answer, or what went wrong, is written beside it."""
    environment.quiet_libraries()
    job = read_json(place)
    try:
        answer = {"quantize": quantize, "measure": measure}[job["task"]](job)
    except TuolingError as error:
        answer = {"error": {"problem": error.problem, "where": error.where, "remedy": error.remedy}}
    write_json(job["answer"], answer)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
