"""The table of conversions: what a path is called, where it can go, and Hugging Face folders written anew."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from tests.tiny import tiny_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from tuoling.cli.main import app
from tuoling.errors import ModelError, TuolingError, UsageError
from tuoling.weights.convert import CONVERSIONS, KINDS, ConvertOptions, convert, recognise, target_of
from tuoling.weights.tensors import open_weights

NOT_PROVEN = ConvertOptions(verify=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("convert") / "llama", "llama")


@pytest.mark.parametrize("entry", sorted(set(CONVERSIONS.values())))
def test_every_entry_names_a_function(entry: str) -> None:
    module, _, function = entry.partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_every_entry_starts_from_a_known_kind() -> None:
    names = [kind.name for kind in KINDS]
    assert len(names) == len(set(names))
    assert {source for source, _ in CONVERSIONS} <= set(names)


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({"config.json": "{}", "model.safetensors": ""}, "hf"),
        ({"config.json": '{"quantization_config": {"quant_method": "gptq"}}'}, "gptq"),
        ({"config.json": '{"quantization_config": {"quant_method": "awq"}}'}, "gptq"),
        ({"config.json": "{}", "quantize_config.json": "{}"}, "gptq"),
        ({"params.json": "{}", "consolidated.00.pth": ""}, "meta"),
        ({"adapter_config.json": "{}", "adapter_model.safetensors": ""}, "adapter"),
        ({"adapter_model.bin": ""}, "adapter"),
        ({"pytorch_model.bin": "", "trainer_state.json": "{}"}, "adapter"),
    ],
)
def test_folders_are_recognised_by_their_files(tmp_path: Path, files: dict[str, str], kind: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert recognise(tmp_path).name == kind


@pytest.mark.parametrize(
    ("magic", "kind"), [(b"GGUF\1\0\0\0", "gguf"), (b"lmgg", "ggml"), (b"fmgg", "ggml"), (b"tjgg", "ggml")]
)
def test_files_are_recognised_by_their_magic(tmp_path: Path, magic: bytes, kind: str) -> None:
    (tmp_path / "model.bin").write_bytes(magic)
    assert recognise(tmp_path / "model.bin").name == kind


def test_unknown_and_absent_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nothing is there"):
        recognise(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="known layout"):
        recognise(tmp_path)


def test_target_by_name_by_kind_or_asked() -> None:
    kinds = {kind.name: kind for kind in KINDS}
    assert target_of(kinds["hf"], Path("out"), "hf") == "hf"
    with pytest.raises(UsageError, match="into what"):
        target_of(kinds["hf"], Path("out"), None)
    with pytest.raises(UsageError) as refused:
        target_of(kinds["hf"], Path("out"), "adapter")
    assert "--to hf" in str(refused.value)


def test_pickles_become_safetensors_with_equal_tensors(model: Path, tmp_path: Path) -> None:
    source = tmp_path / "old"
    source.mkdir()
    weights = open_weights(model)
    tensors = {name: weights.read(name) for name in weights.infos}
    torch.save(tensors, source / "pytorch_model.bin")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (source / name).write_bytes((model / name).read_bytes())
    report = convert(source, tmp_path / "new", to="hf", options=NOT_PROVEN)
    assert (report.kind, report.to, report.tensors) == ("hf", "hf", len(tensors))
    assert (tmp_path / "new/model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert (tmp_path / "new/tokenizer.json").is_file()


def test_another_number_type_and_shards(model: Path, tmp_path: Path) -> None:
    options = ConvertOptions(outtype="bf16", shards=3, verify=False)
    convert(model, tmp_path / "out", to="hf", options=options)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) == 3
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    assert ours.dtype == torch.bfloat16
    for (name, left), (_, right) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(left, right), name


def test_numbers_too_large_for_half_precision_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    torch.save({"a": torch.tensor([1.0, 1e6])}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="too large for float16"):
        convert(tmp_path, tmp_path / "out", to="hf", options=ConvertOptions(outtype="f16", verify=False))
    assert not (tmp_path / "out").exists()


def test_nan_is_refused_unless_allowed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    torch.save(
        {"good": torch.ones(2), "bad": torch.tensor([1.0, float("nan")])}, tmp_path / "pytorch_model.bin"
    )
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ModelError) as refused:
        convert(tmp_path, tmp_path / "out", to="hf", options=NOT_PROVEN)
    assert "bad holds NaN" in str(refused.value) and "--allow-nan" in str(refused.value)
    assert sorted(tmp_path.iterdir()) == before
    convert(tmp_path, tmp_path / "out", to="hf", options=ConvertOptions(allow_nan=True, verify=False))
    assert open_weights(tmp_path / "out").read("bad").isnan().tolist() == [False, True]


def test_an_output_that_is_there_is_not_touched(model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(TuolingError, match="already exists"):
        convert(model, tmp_path, to="hf", options=NOT_PROVEN)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_command_says_what_it_did(model: Path, tmp_path: Path) -> None:
    words = ["convert", str(model), str(tmp_path / "out"), "--to", "hf", "--no-verify", "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert (said["kind"], said["to"]) == ("hf", "hf") and said["tensors"] > 10
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1 and "already exists" in result.stderr
