"""GPTQ files of 2023 → folders of today, against the weights that numpy multiplies out of the same integers."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import tiny_model
from tests.weights.old_gptq import Kind, write_old_gptq
from transformers import AutoModelForCausalLM

from tuoling.errors import ModelError, TuolingError, UsageError
from tuoling.weights.convert import ConvertOptions, convert, recognise
from tuoling.weights.gptq_format import QuantizedWeights, quantized_format
from tuoling.weights.parity import ParityError
from tuoling.weights.safetensors_writer import SafetensorsWriter
from tuoling.weights.tensors import open_weights

not_proven = functools.partial(ConvertOptions, verify=False)
HALF = 2**-11
"""Scales in float32 become float16: half a unit in the last of 11 bits. Integers stay."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    return {family: tiny_model(place / family, family, layers=1, hidden=64) for family in ("llama", "bloom")}


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def reading(folder: Path) -> QuantizedWeights:
    form = quantized_format(folder)
    assert form is not None
    return QuantizedWeights(folder, form)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("kind", "family", "size"),
    [("belle", "bloom", 32), ("vicuna", "llama", 32), ("vicuna", "llama", -1), ("groupless", "llama", -1)],
)
def test_old_files_keep_their_integers(
    models: dict[str, Path], tmp_path: Path, kind: Kind, family: str, size: int, bits: int
) -> None:
    base = models[family]
    old = tmp_path / "old.pt"
    dense = write_old_gptq(load(base), old, kind, bits, 10**9 if size == -1 else size)
    report = convert(old, tmp_path / "new", options=not_proven(base=str(base), unchecked=True))
    assert (report.kind, report.to) == ("old-gptq", "hf")
    form = quantized_format(tmp_path / "new")
    assert form is not None
    assert (form.bits, form.group_size, form.sym) == (bits, size, kind == "vicuna")
    new = reading(tmp_path / "new")
    assert set(new.layers) == set(dense)
    for name, weight in dense.items():
        found = new.read(f"{name}.weight").numpy()
        np.testing.assert_allclose(found, weight, rtol=1e-6 if kind == "vicuna" else HALF, atol=1e-7)
    model = load(base).state_dict()
    for name in new.infos.keys() - {f"{layer}.weight" for layer in dense}:
        assert torch.equal(new.read(name), model[name]), name
    assert (tmp_path / "new" / "tokenizer.json").is_file()


@pytest.mark.slow
def test_the_folder_says_what_todays_readers_ask_for(models: dict[str, Path], tmp_path: Path) -> None:
    write_old_gptq(load(models["llama"]), tmp_path / "old.pt", "vicuna", 4, 32)
    convert(tmp_path / "old.pt", tmp_path / "new", options=not_proven(base=str(models["llama"])))
    config = json.loads((tmp_path / "new" / "config.json").read_text())["quantization_config"]
    assert config == json.loads((tmp_path / "new" / "quantize_config.json").read_text())
    assert config["quant_method"] == "gptq" and config["checkpoint_format"] == "gptq"
    assert (config["bits"], config["group_size"], config["sym"], config["desc_act"]) == (4, 32, True, False)
    stored = open_weights(tmp_path / "new").infos
    assert stored["model.layers.0.self_attn.q_proj.qweight"].dtype == torch.int32
    assert stored["model.layers.0.self_attn.q_proj.scales"].dtype == torch.float16
    assert "model.layers.0.self_attn.q_proj.g_idx" in stored
    assert recognise(tmp_path / "new").name == "gptq"


@pytest.mark.slow
def test_act_order_is_found_in_g_idx(models: dict[str, Path], tmp_path: Path) -> None:
    dense = write_old_gptq(load(models["llama"]), tmp_path / "old.pt", "vicuna", 4, 32, permuted=True)
    convert(tmp_path / "old.pt", tmp_path / "new", options=not_proven(base=str(models["llama"])))
    new = reading(tmp_path / "new")
    assert new.format.desc_act and new.format.group_size == 32
    for name, weight in dense.items():
        np.testing.assert_allclose(new.read(f"{name}.weight").numpy(), weight, rtol=HALF, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_that_the_old_packer_destroyed(
    models: dict[str, Path], tmp_path: Path, bits: int
) -> None:
    """Rows 1 and 2 have a zero point of 0: row 1's is repaired, row 2's and what shares the word is lost and said."""
    base = models["llama"]
    write_old_gptq(load(base), tmp_path / "old.pt", "belle", bits, 32, positive=True)
    with pytest.raises(ModelError, match="destroyed") as caught:
        convert(tmp_path / "old.pt", tmp_path / "new", options=not_proven(base=str(base)))
    assert "--unchecked" in (caught.value.remedy or "")
    assert not (tmp_path / "new").exists()
    report = convert(
        tmp_path / "old.pt", tmp_path / "new", options=not_proven(base=str(base), unchecked=True)
    )
    assert any("guesses" in note for note in report.notes)
    new = reading(tmp_path / "new")
    assert not new.format.minus_one and not new.format.sym
    dense = write_old_gptq(load(base), tmp_path / "again.pt", "belle", bits, 32, positive=True)
    after = {2: 16, 3: 11, 4: 8, 8: 4}[bits]  # the first row whose zero point begins in the next word
    for name, weight in dense.items():
        found = new.read(f"{name}.weight").numpy()
        known = [0, 1, *range(after, len(weight))]
        np.testing.assert_allclose(found[known], weight[known], rtol=HALF, atol=1e-7)
        assert (np.abs(found[2] - weight[2]) > 1e-3).any()


@pytest.mark.slow
def test_a_groupless_zero_point_of_nought_is_kept(models: dict[str, Path], tmp_path: Path) -> None:
    base = models["llama"]
    dense = write_old_gptq(load(base), tmp_path / "old.pt", "groupless", 4, -1, positive=True)
    convert(tmp_path / "old.pt", tmp_path / "new", options=not_proven(base=str(base)))
    new = reading(tmp_path / "new")
    assert not new.format.minus_one
    for name, weight in dense.items():
        np.testing.assert_allclose(new.read(f"{name}.weight").numpy(), weight, rtol=HALF, atol=1e-7)


@pytest.mark.slow
@pytest.mark.usefixtures("gate_here")
@pytest.mark.parametrize(("kind", "family"), [("vicuna", "llama"), ("belle", "bloom")])
def test_old_file_to_folder_to_plain_weights_each_proven(
    models: dict[str, Path], tmp_path: Path, kind: Kind, family: str
) -> None:
    """Both sides are multiplied out layer by layer, without gptqmodel."""
    base = models[family]
    dense = write_old_gptq(load(base), tmp_path / "old.pt", kind, 4, 32)
    options = ConvertOptions(base=str(base), outtype="f32")
    for before, after in (("old.pt", "gptq"), ("gptq", "plain")):
        report = convert(tmp_path / before, tmp_path / after, options=options)
        assert report.parity is not None and report.parity.passed
        assert report.parity.max_logit_difference == 0.0
        assert set(report.parity.streamed.values()) == {"streamed"}
        record = json.loads((tmp_path / after / "parity.json").read_text())
        assert record["verified"] and record["greedy_equal"]
    model = load(tmp_path / "plain")
    for name, module in model.named_modules():
        if name in dense:
            expected = dense[name]
            np.testing.assert_allclose(module.weight.detach().numpy(), expected, rtol=HALF, atol=1e-7)
    assert recognise(tmp_path / "plain").name == "hf"


@pytest.mark.slow
@pytest.mark.usefixtures("gate_here")
@pytest.mark.parametrize("to", ["gptq", "plain"])
def test_a_folder_that_computes_something_else_does_not_stay(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    base = models["llama"]
    write_old_gptq(load(base), tmp_path / "old.pt", "vicuna", 4, 32)
    if to == "plain":
        convert(tmp_path / "old.pt", tmp_path / "gptq", options=not_proven(base=str(base)))
    usual = SafetensorsWriter.write

    def wrong(writer: SafetensorsWriter, name: str, tensor: torch.Tensor) -> None:
        usual(writer, name, tensor * 1.25 if name.endswith("norm.weight") else tensor)

    monkeypatch.setattr(SafetensorsWriter, "write", wrong)
    source = tmp_path / ("old.pt" if to == "gptq" else "gptq")
    with pytest.raises(ParityError, match="logits differ"):
        convert(source, tmp_path / "out", options=ConvertOptions(base=str(base), outtype="f32"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_bad_files_are_refused_and_leave_nothing(models: dict[str, Path], tmp_path: Path) -> None:
    base, old, out = models["llama"], tmp_path / "old.pt", tmp_path / "new"
    options = not_proven(base=str(base))
    write_old_gptq(load(base), old, "vicuna", 4, 32)
    state = torch.load(old, weights_only=True)
    name = "model.layers.0.mlp.down_proj"

    def refused(change: dict[str, Any], why: str, **asked: Any) -> None:
        torch.save({key: value for key, value in {**state, **change}.items() if value is not None}, old)
        with pytest.raises(TuolingError, match=why):
            convert(old, out, options=not_proven(**{"base": str(base), **asked}))
        assert not out.exists()

    refused({}, "does not say which model", base=None)
    refused({}, "quantised layers that the model", base=str(models["bloom"]))
    refused({f"{name}.qzeros": None}, "no GPTQ layer")
    refused({f"{name}.qweight": state[f"{name}.qweight"][1:]}, "no GPTQ layer")
    refused({"model.norm.weight": None}, "missing: model.norm.weight")
    refused({"extra.weight": torch.ones(2)}, "does not have: extra.weight")
    refused({f"{name}.scales": state[f"{name}.scales"] * torch.nan}, "no numbers")
    refused({f"{name}.bias": torch.ones(64)}, "does not have")
    refused({"model.norm.weight": torch.full((64,), torch.inf)}, "NaN or infinity")
    whole = (torch.save(state, old), old.read_bytes())[1]
    old.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TuolingError):
        convert(old, out, options=options)
    with pytest.raises(UsageError):
        torch.save(state, old)
        convert(old, out, to="meta", options=options)


class Malicious:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (Path.touch, (self.path,))


def test_code_in_a_pickle_is_not_run(models: dict[str, Path], tmp_path: Path) -> None:
    old, mark = tmp_path / "old.pt", tmp_path / "mark"
    write_old_gptq(load(models["llama"]), old, "vicuna", 4, 32)
    state = torch.load(old, weights_only=True)
    torch.save({**state, "x": Malicious(mark)}, old)
    assert recognise(old).name == "old-gptq"
    with pytest.raises(ModelError, match="code to be run"):
        convert(old, tmp_path / "new", options=not_proven(base=str(models["llama"])))
    assert not mark.exists() and not (tmp_path / "new").exists()
