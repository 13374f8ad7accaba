"""Adapters and runs as GGUF files: merged into their base, or beside it; and the one command of the guide."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.gguf_files import adapter_of, llama_logits, transformers_logits
from tests.tiny import tiny_model

from tuoling.errors import ModelError, OutputError, UsageError
from tuoling.files import read_json
from tuoling.weights.convert import ConvertOptions, convert

pytest.importorskip("gguf", reason="needs the extra gguf")

pytestmark = pytest.mark.usefixtures("gate_here")

IDS = [5, 9, 60, 120, 33, 260, 77, 301, 14, 15]
TARGETS = {
    "bloom": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen2": ["q_proj", "k_proj", "down_proj"],
}


def llama_logits_with_adapter(file: Path, lora: Path) -> np.ndarray:
    """[T, V] of the base's file with the adapter's on top, by llama.cpp's own loader of adapters."""
    import llama_cpp

    from tuoling.infer.llamacpp import LlamaModel

    model = LlamaModel(file, exact=True)
    model.require_context(64)
    handle = llama_cpp.llama_adapter_lora_init(model._model, str(lora).encode())
    assert handle, "llama.cpp reads the adapter"
    adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(handle)
    scales = (ctypes.c_float * 1)(1.0)
    assert llama_cpp.llama_set_adapters_lora(model.context, adapters, 1, scales) == 0
    found = np.stack(model.logits_of(IDS, range(len(IDS))))
    model.close()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bloom", "llama", "qwen2"])
def test_an_adapter_is_merged_or_stands_beside(family: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="needs the extra gguf")
    base = tiny_model(tmp_path / "base", family)
    adapter = adapter_of(base, tmp_path / "adapter", TARGETS[family])
    options = ConvertOptions(outtype="f32", verify=False)
    report = convert(adapter, tmp_path / "merged.gguf", to=None, options=options)
    assert (report.kind, report.to) == ("adapter", "gguf")
    convert(base, tmp_path / "base.gguf", to=None, options=options)
    convert(adapter, tmp_path / "lora.gguf", to="gguf-lora", options=options)
    theirs = transformers_logits(adapter, IDS)
    tolerance = 1e-2 if family == "bloom" else 1e-4
    assert np.abs(theirs - transformers_logits(base, IDS)).max() > 20 * tolerance, "it changes something"
    assert np.abs(llama_logits(tmp_path / "merged.gguf", IDS) - theirs).max() < tolerance
    beside = llama_logits_with_adapter(tmp_path / "base.gguf", tmp_path / "lora.gguf")
    assert np.abs(beside - theirs).max() < tolerance


@pytest.mark.slow
def test_scales_that_one_alpha_cannot_say_go_into_the_weights(tmp_path: Path) -> None:
    """rsLoRA divides by the root of the rank; patterns give modules their own rank and alpha."""
    pytest.importorskip("llama_cpp", reason="needs the extra gguf")
    base = tiny_model(tmp_path / "base", "llama")
    adapter = adapter_of(
        base,
        tmp_path / "adapter",
        ["q_proj", "v_proj", "down_proj"],
        use_rslora=True,
        rank_pattern={"v_proj": 2},
        alpha_pattern={"down_proj": 3},
    )
    options = ConvertOptions(outtype="f32", verify=False)
    convert(base, tmp_path / "base.gguf", to=None, options=options)
    convert(adapter, tmp_path / "lora.gguf", to="gguf-lora", options=options)
    beside = llama_logits_with_adapter(tmp_path / "base.gguf", tmp_path / "lora.gguf")
    assert np.abs(beside - transformers_logits(adapter, IDS)).max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "lora_only"}]
)
def test_adapters_that_llama_cpp_cannot_add_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", "llama")
    adapter = adapter_of(base, tmp_path / "adapter", ["q_proj"], **settings)
    with pytest.raises(ModelError, match=next(iter(settings))) as error:
        convert(adapter, tmp_path / "lora.gguf", to="gguf-lora", options=ConvertOptions())
    assert "--to gguf" in (error.value.remedy or "") and not (tmp_path / "lora.gguf").exists()


@pytest.mark.slow
def test_what_is_written_is_proven(tmp_path: Path) -> None:
    """The gate compares llama.cpp's answers with the weights before, and a wrong file does not stay."""
    pytest.importorskip("llama_cpp", reason="needs the extra gguf")
    base = tiny_model(tmp_path / "base", "llama")
    adapter = adapter_of(base, tmp_path / "adapter", ["q_proj", "v_proj"])
    report = convert(adapter, tmp_path / "m.gguf", to=None, options=ConvertOptions(outtype="f32"))
    assert report.parity.passed and report.parity.max_logit_difference < 1e-3
    record = read_json(tmp_path / "m.gguf.parity.json")
    assert record["verified"] and record["top1_agreement"] == 1.0


@pytest.mark.slow
def test_a_file_that_computes_something_else_does_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llama_cpp", reason="needs the extra gguf")
    from tuoling.weights import gguf_families

    base = tiny_model(tmp_path / "base", "llama")
    monkeypatch.setattr(gguf_families, "paired_rows", lambda rows, heads: torch.arange(rows))
    with pytest.raises(ModelError, match="does not compute the same"):
        convert(base, tmp_path / "m.gguf", to=None, options=ConvertOptions(outtype="f32"))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["base"]


def test_calls_that_cannot_be_meant(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", "llama")
    with pytest.raises(UsageError, match=r"ends in \.gguf"):
        convert(base, tmp_path / "m", to="gguf", options=ConvertOptions())
    with pytest.raises(UsageError, match="one file"):
        convert(base, tmp_path / "m.gguf", to=None, options=ConvertOptions(shards=2))
    (tmp_path / "m.gguf").write_bytes(b"x")
    with pytest.raises(OutputError, match="already exists"):
        convert(base, tmp_path / "m.gguf", to=None, options=ConvertOptions())
