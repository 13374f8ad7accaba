"""Run by test_gptq.py in a process of its own, since importing gptqmodel changes the libraries of whoever does.

Leaves one JSON object: what gptqmodel makes of folders that we wrote, and whether interrupted work goes on exactly.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tests.tiny import sum_rows, tiny_model, write_rows

from tuoling import environment
from tuoling.files import write_json
from tuoling.models.load import load_model
from tuoling.models.source import find_model
from tuoling.weights import gptq, gptq_child, parity
from tuoling.weights.gptq import linear_names, quantize
from tuoling.weights.gptq_format import QuantizedWeights, quantized_format
from tuoling.weights.gptq_options import QuantizeOptions
from tuoling.weights.parity_child import Comparison
from tuoling.weights.tensors import open_weights

IDS = torch.tensor([[1, 40, 41, 42, 43, 44, 45, 46, 47, 48]])


def widths(place: Path) -> list[dict[str, Any]]:
    """Folders rounded to nearest by us, at every width: opened by transformers, multiplied out by gptqmodel."""
    found = []
    for family in ("llama", "bloom"):
        model = tiny_model(place / family, family, hidden=64)
        for bits in (2, 3, 4, 8):
            for symmetric in (True, False):
                out = place / f"{family}-{bits}-{symmetric}"
                options = QuantizeOptions(
                    bits=bits, group_size=32, symmetric=symmetric, method="rtn", verify=False
                )
                quantize(str(model), out, options)
                found.append({"family": family, "bits": bits, "symmetric": symmetric, **compare(model, out)})
    return found


def compare(model: Path, folder: Path) -> dict[str, float]:
    """Largest difference of weights and of logits between gptqmodel's layers and plain ones of our numbers."""
    form = quantized_format(folder)
    assert form is not None
    ours = QuantizedWeights(folder, form)
    loaded: Any = load_model(find_model(folder), device="cpu", dtype="fp32")
    plain: Any = load_model(find_model(model), device="cpu", dtype="fp32")
    largest = 0.0
    for name in ours.layers:
        layer = loaded.get_submodule(name)
        weight_NK = ours.read(f"{name}.weight")
        with torch.inference_mode():  # what each input alone gives is its row of the weight
            theirs_KN = layer(torch.eye(weight_NK.shape[1])).float() - (
                0 if layer.bias is None else layer.bias
            )
        largest = max(largest, float((theirs_KN.t() - weight_NK).abs().max() / weight_NK.abs().max()))
    read = {name: ours.read(name).float() for name in ours.infos}
    assert set(plain.load_state_dict(read, strict=False).missing_keys) <= {"lm_head.weight"}, "tied"
    with torch.inference_mode():
        logits, expected = loaded(IDS).logits.float(), plain(IDS).logits
    return {
        "weights": largest,
        "logits": float((logits - expected).abs().max() / expected.std()),
        "layers": len(ours.layers),
    }


def interrupted(place: Path) -> dict[str, bool]:
    """Whether work that ended after its second layer goes on to the tensors of a straight run."""
    equal = {}
    for family in ("llama", "qwen2", "bloom"):
        model = tiny_model(place / f"long-{family}", family, hidden=64, layers=3)
        rows = [{"input_ids": list(range(4 + n, 40 + n)), "spans": [[2, 36]]} for n in range(12)]
        write_json(place / "rows.json", rows)
        straight, resumed = place / f"{family}-straight", place / f"{family}-resumed"
        gptq_child.quantize(job(place, model, straight, resumable=False))
        ends = StopAfter(2)
        try:
            with ends:
                gptq_child.quantize(job(place, model, resumed, resumable=True))
            raise AssertionError("was not interrupted")
        except Interrupted:
            pass
        gptq_child.quantize(job(place, model, resumed, resumable=True))
        one, other = open_weights(straight), open_weights(resumed)
        same = one.infos.keys() == other.infos.keys() and len(linear_names(model)) > 0
        equal[family] = same and all(torch.equal(one.read(name), other.read(name)) for name in one.infos)
    return equal


def job(place: Path, model: Path, out: Path, *, resumable: bool) -> dict[str, Any]:
    return {
        "model": str(model),
        "rows": str(place / "rows.json"),
        "method": "gptq",
        "config": {
            "bits": 4,
            "group_size": 32,
            "offload_to_disk": True,
            "offload_to_disk_path": str(out.with_suffix(".offload")),
        },
        "device": "cpu",
        "dtype": "float32",
        "resumable": resumable,
        "checkpoints": str(out.with_suffix(".checkpoints")),
        "made": str(out),
        "allow_remote_code": False,
    }


class Interrupted(Exception):
    """Ends a quantisation as a crash would, right after a layer was kept."""


class StopAfter:
    """Within, gptqmodel is interrupted once it has kept so many layers."""

    def __init__(self, layers: int) -> None:
        from gptqmodel.looper.checkpoint import CheckpointExtension

        self._class: Any = CheckpointExtension
        self._usual = CheckpointExtension.on_boundary
        self._layers = layers

    def __enter__(self) -> None:
        usual, layers = self._usual, self._layers

        def on_boundary(extension: Any, boundary: Any) -> None:
            usual(extension, boundary)
            if extension.next_step >= layers:
                raise Interrupted

        self._class.on_boundary = on_boundary

    def __exit__(self, *_: Any) -> None:
        self._class.on_boundary = self._usual


def large_channels(folder: Path, family: str) -> Path:
    """A model whose blocks get two inputs that are many times the others, which is what AWQ is for."""
    from safetensors.torch import load_file, save_file

    file = tiny_model(folder, family, hidden=128) / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor[[3, 17]] = 8.0
        elif "_proj.weight" in name:
            tensor *= 0.3
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def awq(place: Path, family: str) -> dict[str, Any]:
    """AWQ from rows to the proof; and its error in the logits, with its norms and with the model's own."""
    model = large_channels(place / "model", family)
    found = from_rows(place, model, QuantizeOptions(method="awq", group_size=32))
    form = quantized_format(place / "out")
    assert form is not None
    ours = QuantizedWeights(place / "out", form)
    read = {name: ours.read(name).float() for name in ours.infos}
    own = open_weights(model)
    norms = {name: own.read(name) for name in own.infos if "layernorm" in name}
    logits = []
    for tensors in ({}, read, read | norms):
        plain: Any = load_model(find_model(model), device="cpu", dtype="fp32")
        plain.load_state_dict(tensors, strict=False)
        with torch.inference_mode():
            logits.append(plain(IDS).logits)
    error, misfit = (float((other - logits[0]).std() / logits[0].std()) for other in logits[1:])
    return found | {"error": error, "error_with_the_models_norms": misfit}


def gptq_of(place: Path, family: str, bits: str) -> dict[str, Any]:
    """GPTQ from rows to the proof."""
    model = tiny_model(place / "model", family, hidden=64)
    return from_rows(place, model, QuantizeOptions(bits=int(bits), group_size=32))


def from_rows(place: Path, model: Path, options: QuantizeOptions) -> dict[str, Any]:
    """`quantize` from rows to the proof, with every child's work done here."""
    gptq.run_job = run_here
    parity._measure = lambda request: Comparison(request).measure()  # type: ignore[attr-defined]
    rows = write_rows(place / "rows.jsonl", sum_rows(40))
    out, options = place / "out", replace(options, rows=24, device="cpu", dtype="fp32")
    seen: list[tuple[int, int]] = []
    report = quantize(str(model), out, options, data=[str(rows)], step=lambda *counts: seen.append(counts))
    files = sorted(path.name for path in out.iterdir())
    ours, close = parity.Weights(out, multiply_out=True), parity.Bound(perplexity=1.02, top1=0.8)
    parity.gate(ours, out, lossless=False, bound=close, record=place / "own_reader.json", say=lambda _: None)
    return report.to_json() | compare(model, out) | {"last_step": seen[-1], "files": files}


def run_here(
    job: dict[str, Any], folder: Path, *, watch: Callable[[], None] = lambda: None, remedy: str | None = None
) -> dict[str, Any]:
    """`run_job` without its process: gptqmodel is imported once."""
    answer = {"quantize": gptq_child.quantize, "measure": gptq_child.measure}[job["task"]](job)
    watch()
    return answer


if __name__ == "__main__":
    environment.quiet_libraries()
    environment.prepare_gptqmodel()
    folder = Path(sys.argv[1])
    tasks: dict[str, Callable[..., Any]] = {
        "widths": widths,
        "interrupted": interrupted,
        "gptq": gptq_of,
        "awq": awq,
    }
    answer = tasks[sys.argv[2]](folder, *sys.argv[3:])
    (folder / "answer.json").write_text(json.dumps(answer, default=str))
