"""A whole run on a quantised base: what it leaves, and that everything after it loads the base the same way."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.devices import DEVICES
from tests.tiny import sum_rows, tiny_model, write_rows
from typer.testing import CliRunner

from tuoling.api import load
from tuoling.cli.main import app
from tuoling.config import load_config
from tuoling.errors import MissingPackage
from tuoling.models.load import find_model, load_model, load_tokenizer
from tuoling.models.quantization import PLAIN, Quantization
from tuoling.models.save import save_adapter
from tuoling.train.loop import RunResult, train

bnb = pytest.importorskip("bitsandbytes")
QUANTISED = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)


def run(folder: Path, model: Path, **keys: Any) -> RunResult:
    settings = {
        "model_name_or_path": str(model),
        "data": [str(write_rows(folder / "rows.jsonl", sum_rows(12)))],
        "output_dir": str(folder / "run"),
        "dtype": "fp32",
        "device": "cpu",
        "learning_rate": 1e-2,
        "template": "domain_bloom",
        "plot_loss": False,
        "val_size": 4,
        "eval_steps": 1,
        "num_train_epochs": 4,
        "save_steps": 3,
        **keys,
    }
    return train(load_config((), (), settings).config, say=lambda _: None)


@pytest.fixture(scope="module", params=["llama", "bloom"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp(request.param) / "m", request.param, hidden=64)


@pytest.fixture(scope="module")
def run4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA run on fp4 without double quantisation."""
    folder = tmp_path_factory.mktemp("run4")
    more = {"quantization_bit": 4, "quantization_type": "fp4", "double_quantization": False}
    return run(folder, tiny_model(folder / "m", "llama", hidden=64), **more).path


def quantised(model: Any) -> set[str]:
    return {type(module).__name__ for module in model.modules() if isinstance(module, QUANTISED)}


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "name"), [(4, "Linear4bit"), (8, "Linear8bitLt")])
@pytest.mark.parametrize("device", DEVICES)
def test_trained_evaluated_saved_and_loaded_again(
    tmp_path: Path, base: Path, bits: int, name: str, device: str
) -> None:
    result = run(tmp_path, base, quantization_bit=bits, device=device)
    done = result.results
    assert done["train_loss_last"] < 0.8 * done["train_loss_first"], (
        "evaluated after every step, and it still learns"
    )
    assert json.loads((result.path / "run.json").read_text())["config"]["quantization_bit"] == bits
    source = find_model(result.path)
    assert source.quantization == find_model(result.path / "checkpoint-3").quantization == Quantization(bits)
    tensors = load_file(result.path / "adapter_model.safetensors")
    assert tensors and all(
        "lora_" in key and tensor.dtype is torch.float32 for key, tensor in tensors.items()
    )
    assert all(tensor.any() for tensor in tensors.values()), "every tensor was trained: B is zero at birth"
    assert not list(result.path.glob("model*.safetensors"))
    assert quantised(load_model(source, dtype="fp32", device=device)) == {name}
    assert quantised(load_model(source, dtype="fp32", device=device, quantization=PLAIN)) == set()


@pytest.mark.slow
def test_the_loss_is_that_of_the_run_when_loaded_again(run4: Path) -> None:
    """What chat opens is what was trained: its loss on the held-out rows, and not that of the plain base."""
    from tuoling.kernels.install import install
    from tuoling.train.loop import batch_loss
    from tuoling.train.prepare import prepare

    results = json.loads((run4 / "all_results.json").read_text())
    config = load_config((), (), json.loads((run4 / "run.json").read_text())["config"]).config
    setup = prepare(config, say=lambda _: None)
    assert setup.held_out is not None
    from tuoling.data.pack import collate

    rows = collate([setup.held_out.store[int(row)] for row in setup.held_out.index])
    losses = []
    for quantization in (None, PLAIN):
        model = load_model(find_model(run4), dtype="fp32", device="cpu", quantization=quantization)
        fast = install(model, say=pytest.fail)
        with torch.no_grad():
            losses.append(batch_loss(fast, rows, torch.device("cpu")).item() / rows.num_learned)
    assert losses[0] == pytest.approx(results["eval_loss"], rel=1e-5)
    assert losses[1] != pytest.approx(results["eval_loss"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("device", DEVICES)
def test_saving_leaves_the_base_quantised(tmp_path: Path, base: Path, bits: int, device: str) -> None:
    from peft import LoraConfig, get_peft_model

    source = find_model(base)
    plain: Any = load_model(
        source, dtype="fp32", device=device, for_training=True, quantization=Quantization(bits)
    )
    model: Any = get_peft_model(plain, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    model(input_ids=torch.arange(4, 9, device=device)[None])
    layers = [module for module in model.modules() if isinstance(module, QUANTISED)]
    before = [(layer.weight.data_ptr(), layer.weight.dtype, layer.weight.numel()) for layer in layers]
    size = save_adapter(model, tmp_path / "out", tokenizer=load_tokenizer(source))
    assert [(layer.weight.data_ptr(), layer.weight.dtype, layer.weight.numel()) for layer in layers] == before
    assert {dtype for _, dtype, _ in before} == {torch.uint8 if bits == 4 else torch.int8}
    lora = sum(parameter.nbytes for name, parameter in model.named_parameters() if "lora_" in name)
    assert lora <= size <= lora + 20_000 and len(layers) >= 8


@pytest.mark.slow
def test_a_run_from_its_adapter_keeps_the_base_as_it_was(tmp_path: Path, run4: Path) -> None:
    from tuoling.train.prepare import prepare

    base = json.loads((run4 / "template.json").read_text())["base"]["path"]
    rows = write_rows(tmp_path / "rows.jsonl", sum_rows(4))
    said: list[str] = []

    def prepared(**keys: Any) -> Any:
        flags = {"model_name_or_path": base, "adapter_name_or_path": str(run4), "data": [str(rows)], **keys}
        return prepare(load_config((), (), {"device": "cpu", **flags}).config, say=said.append).config

    config = prepared()
    assert (config.quantization_bit, config.quantization_type, config.double_quantization) == (
        4,
        "fp4",
        False,
    )
    assert any("base in fp4" in line and "quantization_bit=0" in line for line in said)
    assert prepared(quantization_bit=0).quantization_bit == 0


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_chat_and_predict_open_it_quantised(tmp_path: Path, run4: Path, device: str) -> None:
    def call(*words: object) -> Any:
        common = ("--device", device, "--dtype", "fp32", "--max-new-tokens", "4")
        return CliRunner().invoke(app, [str(word) for word in (*words, *common)], input="你好\n")

    chat = call("chat", run4)
    assert chat.exit_code == 0 and "base weights in fp4" in chat.stderr, chat.output
    plain = call("chat", run4, "--quantization-bit", 0)
    assert plain.exit_code == 0 and "base weights in" not in plain.stderr
    assert "base weights in int8" in call("chat", run4, "--quantization-bit", 8).stderr
    wrong = call("chat", run4, "--quantization-bit", 3)
    assert wrong.exit_code == 2 and "must be 0, 4 or 8" in wrong.stderr
    data, out = write_rows(tmp_path / "test.jsonl", sum_rows(3, start=20)), tmp_path / "predictions.json"
    predicted = call("predict", run4, "--data", data, "--out", out)
    assert predicted.exit_code == 0 and "base weights in fp4" in predicted.stderr, predicted.output
    with load(run4, device=device, dtype="fp32") as model:
        expected = [model.chat(row["instruction"], max_new_tokens=4) for row in sum_rows(3, start=20)]
    assert [row["predict"] for row in json.loads(out.read_text())] == expected


def test_asked_for_without_the_package_before_anything_is_made(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == "bitsandbytes" else found(name, *more),
    )
    with pytest.raises(MissingPackage, match="bitsandbytes"):
        run(tmp_path, base, quantization_bit=4)
    assert not (tmp_path / "run").exists()
