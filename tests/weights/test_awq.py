"""AWQ folders read, and written through gptqmodel."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import sum_rows, tiny_model, write_rows
from tests.weights.test_gptq import needs_gptqmodel, require_close, session
from transformers import AutoModelForCausalLM

from tuoling.errors import ModelError, UsageError
from tuoling.weights.convert import ConvertOptions, convert
from tuoling.weights.gptq import linear_names, quantize
from tuoling.weights.gptq_folder import write_quantised
from tuoling.weights.gptq_options import QuantizeOptions
from tuoling.weights.tensors import open_weights

NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama", layers=1, hidden=64)


def write_awq(base: Path, folder: Path, size: int = 32) -> dict[str, np.ndarray]:
    """An AWQ folder in plain numpy; returns the weights [N, K] that it stands for. Eight columns share a word, in the
    order 0 2 4 6 1 3 5 7 from its lowest nibble."""

    def packed(values: np.ndarray) -> torch.Tensor:
        words = np.zeros((len(values), values.shape[1] // 8), dtype=np.uint32)
        for nibble, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            words |= values[:, column::8].astype(np.uint32) << np.uint32(4 * nibble)
        return torch.from_numpy(words.view(np.int32))

    model: Any = AutoModelForCausalLM.from_pretrained(base)
    rng = np.random.default_rng(5)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    dense = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            outputs, inputs = state.pop(f"{name}.weight").shape
            q_KN = rng.integers(0, 16, (inputs, outputs))
            zero_GN = rng.integers(0, 16, (inputs // size, outputs))
            scale_GN = (rng.random(zero_GN.shape) * 0.05 + 0.01).astype(np.float16)
            state[f"{name}.qweight"], state[f"{name}.qzeros"] = packed(q_KN), packed(zero_GN)
            state[f"{name}.scales"] = torch.from_numpy(scale_GN)
            dense[name] = np.empty((outputs, inputs), dtype=np.float32)
            for k in range(inputs):
                zero, scale = zero_GN[k // size], scale_GN[k // size].astype(np.float32)
                dense[name][:, k] = scale * (q_KN[k] - zero)
    shutil.copytree(base, folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    awq = {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True, "version": "gemm"}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": awq}))
    return dense


@pytest.mark.slow
@pytest.mark.usefixtures("gate_here")
def test_an_awq_folder_is_multiplied_out(llama: Path, tmp_path: Path) -> None:
    dense = write_awq(llama, tmp_path / "awq")
    report = convert(tmp_path / "awq", tmp_path / "plain", options=ConvertOptions(outtype="f32"))
    assert (report.kind, report.to) == ("gptq", "hf")
    plain = open_weights(tmp_path / "plain")
    assert len(dense) == 7
    for name, weight in dense.items():
        np.testing.assert_array_equal(plain.read(f"{name}.weight").numpy(), weight)
    assert report.parity is not None and report.parity.max_logit_difference == 0.0


def test_norms_that_awq_divided_are_the_ones_written(llama: Path, tmp_path: Path) -> None:
    """The blocks' norms come from the quantiser, all other plain tensors from the model, in its own type."""
    plain, made, out = llama, tmp_path / "made", tmp_path / "out"
    write_awq(plain, made)
    stored = {
        name: tensor.bfloat16() if tensor.is_floating_point() else tensor
        for name, tensor in load_file(made / "model.safetensors").items()
    }
    stored[NORM] = stored[NORM] / 2
    save_file(stored, made / "model.safetensors", metadata={"format": "pt"})
    out.mkdir()
    options = QuantizeOptions(method="awq", group_size=32)
    write_quantised(plain, out, options, layers=list(linear_names(plain)), made=made)
    before, after = open_weights(plain), open_weights(out)
    assert torch.equal(after.read(NORM), stored[NORM])
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(after.read(name), before.read(name))
    assert after.infos.keys() == stored.keys()


@pytest.mark.slow
def test_what_gptqmodel_cannot_do_is_refused_before_it_works(tmp_path: Path) -> None:
    needs_gptqmodel()
    rows = [str(write_rows(tmp_path / "rows.jsonl", sum_rows(20)))]
    options = QuantizeOptions(method="awq", group_size=32, rows=8, device="cpu", verify=False)
    bloom = tiny_model(tmp_path / "bloom", "bloom", layers=1)
    with pytest.raises(UsageError, match="cannot make AWQ of a bloom"):
        quantize(str(bloom), tmp_path / "out", options, data=rows)
    narrow = tiny_model(tmp_path / "narrow", "llama", layers=1, hidden=64)  # 32 keys
    with pytest.raises(ModelError, match="k_proj has 64 inputs, 32 outputs"):
        quantize(str(narrow), tmp_path / "out", options, data=rows)
    assert not (tmp_path / "out").exists()


@pytest.mark.long
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_awq_writes_norms_that_fit_its_layers(family: str, tmp_path: Path) -> None:
    """AWQ multiplies a layer's large inputs up and divides the norm before it."""
    found = session(tmp_path, "awq", family)
    assert found["layers"] == 14
    assert found["error"] < 0.5 and found["error_with_the_models_norms"] > 1.5 * found["error"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "awq" and config["version"] == "gemm" and config["zero_point"]
    assert json.loads((tmp_path / "out" / "parity.json").read_text())["passed"]
    require_close({**found, "bits": 4})
