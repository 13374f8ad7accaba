"""Quantising through gptqmodel, and gptqmodel reading what we write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import sum_rows, tiny_model, write_rows

from tuoling.errors import MissingPackage, ModelError, OutputError, UsageError
from tuoling.models import gptq_packages
from tuoling.models.load import load_model
from tuoling.models.source import find_model
from tuoling.weights import gptq_job
from tuoling.weights.gptq import linear_names, quantize
from tuoling.weights.gptq_child import perplexity, round_layers
from tuoling.weights.gptq_format import QuantizedWeights, quantized_format
from tuoling.weights.gptq_options import QuantizeOptions
from tuoling.weights.gptq_rows import Sample, choose_rows
from tuoling.weights.rtn import grid, quantise
from tuoling.weights.tensors import open_weights

ROOT = Path(__file__).resolve().parents[2]
RTN = QuantizeOptions(bits=4, group_size=32, method="rtn", verify=False)


def needs_gptqmodel() -> None:
    try:
        gptq_packages.require_gptqmodel("the test")
    except MissingPackage as missing:
        pytest.skip(missing.problem)


def session(place: Path, task: str, *words: str) -> Any:
    """The answer of gptq_session.py."""
    needs_gptqmodel()
    done = subprocess.run(
        [sys.executable, "-m", "tests.weights.gptq_session", str(place), task, *words],
        cwd=place,  # gptqmodel leaves a folder `logs` where it is started
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((place / "answer.json").read_text())


# -- rounding to nearest, and what is written ------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_number_is_on_the_nearest_step(bits: int, symmetric: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(32, 64)
    weight[3] = weight[3].abs()  # a group without negative numbers: zero point 0 where there are zero points
    packed = quantise(weight, bits, 32, symmetric=symmetric, minus_one=symmetric)
    found = packed.dequantize().t()
    scale_GN, zero_GN = grid(weight.t(), bits, 32, symmetric=symmetric)
    for output in range(32):
        for group in range(2):
            steps = torch.arange(2**bits) - zero_GN[group, output]
            steps = steps * scale_GN[group, output].float()
            part = slice(32 * group, 32 * group + 32)
            nearest = (weight[output, part, None] - steps).abs().min(-1).values
            assert torch.allclose((weight[output, part] - found[output, part]).abs(), nearest, atol=1e-6)
    assert bool((zero_GN[:, 3] == 0).all()) != symmetric


def test_a_layer_of_zeros_stays_zero() -> None:
    packed = quantise(torch.zeros(32, 32), 4, -1, symmetric=True, minus_one=True)
    assert not packed.dequantize().any()


@pytest.mark.slow
def test_only_the_blocks_change(tmp_path: Path) -> None:
    """Everything but the linear layers of the blocks is the source's, bit for bit, in its own type."""
    model = tiny_model(tmp_path / "model", "bloom", hidden=64)
    report = quantize(str(model), tmp_path / "out", RTN)
    before, after = open_weights(model), open_weights(tmp_path / "out")
    names = linear_names(model)
    assert report.layers == len(names) == 8 and not any("lm_head" in name for name in names)
    kept = before.infos.keys() - {f"{name}.weight" for name in names}
    assert kept <= after.infos.keys()
    assert all(torch.equal(before.read(name), after.read(name)) for name in kept)
    assert {name.rpartition(".")[2] for name in after.infos.keys() - kept} == {
        "qweight",
        "qzeros",
        "scales",
        "g_idx",
    }
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_published_bloom_folders_lack_the_prefix(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = tiny_model(tmp_path / "model", "bloom", hidden=64)
    file = model / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor.clone() for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    quantize(str(model), tmp_path / "out", RTN)
    after = open_weights(tmp_path / "out").infos
    assert (
        "transformer.h.0.mlp.dense_h_to_4h.qweight" in after and "transformer.word_embeddings.weight" in after
    )


@pytest.mark.slow
def test_pickled_weights_are_written_anew_first(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = tiny_model(tmp_path / "model", "llama", hidden=64)
    quantize(str(model), tmp_path / "one", RTN)
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(tensors, model / "pytorch_model.bin")
    quantize(str(model), tmp_path / "other", RTN)
    one, other = open_weights(tmp_path / "one"), open_weights(tmp_path / "other")
    assert all(torch.equal(one.read(name), other.read(name)) for name in one.infos)


# -- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_rows_that_judge_do_not_calibrate(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "llama")
    data = write_rows(tmp_path / "rows.jsonl", sum_rows(60))
    rows = choose_rows(find_model(model), [str(data)], count=256)
    texts = [{sample.input_ids for sample in part} for part in (rows.calibration, rows.held_out)]
    assert len(texts[0]) == 48 and len(texts[1]) == 12 and not texts[0] & texts[1]
    assert rows.facts["tokens"] == sum(len(sample.input_ids) for sample in rows.calibration)
    again = choose_rows(find_model(model), [str(data)], count=256)
    assert again.calibration == rows.calibration
    assert choose_rows(find_model(model), [str(data)], count=10).facts["rows"] == 10


def test_a_plain_model_without_rows_is_refused_with_the_way_out(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "llama")
    with pytest.raises(UsageError, match="which rows") as caught:
        choose_rows(find_model(model), [], count=256)
    assert "--data" in str(caught.value.remedy) and "--method rtn" in str(caught.value.remedy)


@pytest.mark.slow
def test_plain_text_calibrates_too(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "llama")
    data = write_rows(tmp_path / "rows.jsonl", [{"text": f"第{n}天，天气很好。"} for n in range(20)])
    rows = choose_rows(find_model(model), [str(data)], count=256)
    assert len(rows.calibration) == 16 and len(rows.held_out) == 4


# -- figures ---------------------------------------------------------------------------------------------------------


def test_perplexity_is_that_of_the_answers(tmp_path: Path) -> None:
    model = load_model(find_model(tiny_model(tmp_path / "model", "llama")), device="cpu", dtype="fp32")
    samples = [Sample(tuple(range(4, 20)), ((5, 9), (12, 16))), Sample(tuple(range(30, 40)), ((3, 10),))]
    total, count = 0.0, 0
    for sample in samples:
        with torch.no_grad():
            logits = model(torch.tensor([sample.input_ids])).logits[0].double().log_softmax(-1)
        for begin, end in sample.spans:
            for place in range(begin, end):
                total -= float(logits[place - 1, sample.input_ids[place]])
                count += 1
    assert count == 15
    assert perplexity(model, samples) == pytest.approx(torch.tensor(total / count).exp().item(), rel=1e-6)


@pytest.mark.slow
def test_rounding_in_place_gives_what_is_written(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", "llama", hidden=64)
    quantize(str(folder), tmp_path / "out", RTN)
    form = quantized_format(tmp_path / "out")
    assert form is not None
    written = QuantizedWeights(tmp_path / "out", form)
    model = load_model(find_model(folder), device="cpu", dtype="fp32")
    layers = list(linear_names(folder))
    round_layers(model, layers=layers, bits=4, group_size=32, symmetric=True)
    for name in layers:
        assert torch.equal(model.get_submodule(name).weight, written.read(f"{name}.weight"))


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_cannot_be_quantised_is_refused(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "llama", hidden=64)
    for options, why in (
        (QuantizeOptions(bits=5), "--bits 5"),
        (QuantizeOptions(group_size=48), "--group-size 48"),
        (QuantizeOptions(bits=8, method="awq"), "--bits 8"),
        (QuantizeOptions(act_order=True, method="rtn"), "--act-order"),
    ):
        with pytest.raises(UsageError, match=why):
            quantize(str(model), tmp_path / "out", options)
    quantize(str(model), tmp_path / "out", RTN)
    with pytest.raises(OutputError, match="already exists"):
        quantize(str(model), tmp_path / "out", RTN)
    with pytest.raises(ModelError, match="quantised already"):
        quantize(str(tmp_path / "out"), tmp_path / "again", RTN)


@pytest.mark.slow
def test_three_bits_of_a_width_that_gptqmodel_cannot_pack(tmp_path: Path) -> None:
    needs_gptqmodel()
    model = tiny_model(tmp_path / "model", "llama", hidden=48)
    rows = write_rows(tmp_path / "rows.jsonl", sum_rows(20))
    options = QuantizeOptions(bits=3, group_size=16, rows=8, device="cpu", verify=False)
    with pytest.raises(ModelError, match="has 48 inputs"):
        quantize(str(model), tmp_path / "out", options, data=[str(rows)])
    quantize(str(model), tmp_path / "out", replace(options, method="rtn"))
    assert quantized_format(tmp_path / "out") is not None


@pytest.mark.slow
def test_missing_gptqmodel_is_said_with_the_lines_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(tmp_path / "model", "llama", hidden=64)
    quantize(str(model), tmp_path / "out", RTN)  # rounding needs no package
    monkeypatch.setattr(gptq_packages, "_NEEDED", ("no_such_package_at_all",))
    with pytest.raises(MissingPackage, match="no_such_package_at_all") as caught:
        load_model(find_model(tmp_path / "out"), device="cpu")
    assert "--no-build-isolation" in (caught.value.remedy or "")
    with pytest.raises(MissingPackage):
        quantize(str(model), tmp_path / "other", QuantizeOptions())


@pytest.mark.slow
def test_quantised_weights_are_not_trained_on(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "llama", hidden=64)
    quantize(str(model), tmp_path / "out", RTN)
    with pytest.raises(ModelError, match="not trained on"):
        load_model(find_model(tmp_path / "out"), device="cpu", for_training=True)


class Refused:
    """A finder that says who asks for gptqmodel."""

    def find_spec(self, name: str, *_: Any) -> None:
        assert name.partition(".")[0] != "gptqmodel", "imported"


def test_peft_does_not_import_gptqmodel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take 4 s and print a banner on stdout for every adapter."""
    needs_gptqmodel()
    from peft import LoraConfig, get_peft_model

    for name in [name for name in sys.modules if name.partition(".")[0] == "gptqmodel"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Refused(), *sys.meta_path])
    model = load_model(find_model(tiny_model(tmp_path / "model", "llama")), device="cpu")
    with gptq_packages.hidden_from_peft():
        get_peft_model(model, LoraConfig(target_modules=["q_proj"]))  # type: ignore[arg-type]
    assert "gptqmodel" not in sys.modules


# -- the process that the work is done in ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("child", "said"),
    [
        ("print('loading'); raise OSError('no such kernel')", "no such kernel"),
        ("import os; os.kill(os.getpid(), 9)", "memory"),
        (
            "import json, sys; job = json.load(open(sys.argv[1])); error = dict(problem='odd', where=None, remedy=None)\n"
            "json.dump(dict(error=error), open(job['answer'], 'w'))",
            "odd",
        ),
    ],
)
def test_a_child_that_fails_is_told(
    child: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptq_job, "CHILD", (sys.executable, "-S", "-c", child))
    with pytest.raises(ModelError, match=said) as caught:
        gptq_job.run_job({"task": "measure"}, tmp_path, remedy="go on")
    assert caught.value.remedy == "go on"


# -- through gptqmodel -----------------------------------------------------------------------------------------------


def require_close(found: dict[str, Any]) -> None:
    """gptqmodel multiplies in bf16, scale and product rounded; one step of the grid is 2^-7 of the largest weight in
    8 bits, and 2^-3 and more in fewer. Its CPU kernel for 4 bits rounds activations too; a wrong layer moves logits
    by 1."""
    assert found["weights"] < (2**-8 if found["bits"] == 8 else 2**-7), found
    assert found["logits"] < 0.25, found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "bits", "layers"), [("bloom", 4, 8), pytest.param("llama", 8, 14, marks=pytest.mark.long)]
)
def test_a_model_is_quantised_and_judged(family: str, bits: int, layers: int, tmp_path: Path) -> None:
    found = session(tmp_path, "gptq", family, str(bits))
    assert found["layers"] == layers and found["last_step"] == [layers, layers]
    assert found["before"] > 1
    assert found["after"] == pytest.approx(found["before"], rel=0.2 if bits == 4 else 0.02)
    assert found["rtn"] == pytest.approx(found["before"], rel=0.3 if bits == 4 else 0.02)
    assert found["size_bytes"] < found["size_before_bytes"]
    assert found["tokens_per_s"] > 0 and found["seconds"] > 0
    named = {"config.json", "quantize_config.json", "quantization.json", "parity.json", "tokenizer.json"}
    assert named <= set(found["files"])
    record = json.loads((tmp_path / "out" / "quantization.json").read_text())
    assert record["calibration"]["rows"] == 24 and record["verified"]
    proof = json.loads((tmp_path / "out" / "parity.json").read_text())
    own = json.loads((tmp_path / "own_reader.json").read_text())
    assert proof["verified"] and proof["passed"]
    assert proof["perplexity_after"] == pytest.approx(own["perplexity_after"], rel=1e-6)
    assert own["streamed"]["before"] == "streamed" != own["streamed"]["after"], "our reader, and gptqmodel"
    assert own["perplexity_before"] == pytest.approx(own["perplexity_after"], rel=0.02)
    assert own["max_logit_difference"] < 0.25 and proof["max_logit_difference"] > 0
    assert not list(tmp_path.glob(".*"))
    require_close({**found, "bits": bits})


@pytest.mark.long
def test_every_width_is_multiplied_out_alike(tmp_path: Path) -> None:
    found = session(tmp_path, "widths")
    assert len(found) == 16
    for one in found:
        assert one["layers"] == (14 if one["family"] == "llama" else 8)
        require_close(one)


@pytest.mark.long
def test_interrupted_work_goes_on_exactly(tmp_path: Path) -> None:
    from tuoling.weights.gptq import RESUMABLE

    equal = session(tmp_path, "interrupted")
    assert equal == dict.fromkeys(RESUMABLE, True)
