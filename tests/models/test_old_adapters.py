"""Adapters of every layout since 2023 give the outputs they gave then; what is broken is refused with the reason."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import tiny_model
from torch import nn

from tuoling.errors import ModelError
from tuoling.models.adapter_files import adapter_weights_file, is_adapter_folder
from tuoling.models.adapter_reading import read_adapter
from tuoling.models.load import find_model, load_model
from tuoling.models.old_adapters import expand_grouped

IDS = torch.tensor([[5, 9, 200, 31, 77, 4]])
RANK, ALPHA = 4, 12
TARGETS = {
    "bloom": ["dense", "query_key_value"],
    "llama": ["down_proj", "q_proj", "v_proj"],
}


@pytest.fixture(scope="module", params=sorted(TARGETS))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("old") / request.param, request.param)


@pytest.fixture(scope="module")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("old") / "bloom", "bloom")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """As today's PEFT itself writes it."""
    from peft import LoraConfig, get_peft_model

    model: Any = load_model(find_model(base), dtype="fp32", device="cpu", for_training=True)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS[base.name], task_type="CAUSAL_LM")
    config.base_model_name_or_path = str(base)
    model = get_peft_model(model, config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    model.save_pretrained(tmp_path / "today")
    return tmp_path / "today"


def logits(folder: Path, **options: Any) -> torch.Tensor:
    model: Any = load_model(find_model(folder, **options), dtype="fp32", device="cpu")
    with torch.no_grad():
        return model(IDS).logits  # type: ignore[no-any-return]


def state_of(adapter: Path) -> dict[str, torch.Tensor]:
    return load_file(adapter / "adapter_model.safetensors")


def trainer_checkpoint(adapter: Path, folder: Path) -> Path:
    """Only LoRA tensors in pytorch_model.bin, no config, and a Trainer's other files (a pickle among them)."""
    folder.mkdir(parents=True)
    torch.save(state_of(adapter), folder / "pytorch_model.bin")
    for name in ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth"):
        torch.save({}, folder / name)
    (folder / "trainer_state.json").write_text("{}", encoding="utf-8")
    (folder / "training_args.bin").write_bytes(pickle.dumps(Path("args")))
    return folder


def save_empty_of_2023(path: Path) -> None:
    """`torch.save({}, path)` as torch 1.13 and 2.0 did it: the famous 443 bytes (today's torch writes 1,297)."""
    body = central = b""
    for name, data in ((f"{path.stem}/data.pkl", b"\x80\x02}q\x00."), (f"{path.stem}/version", b"3\n")):
        start, known = len(body), struct.pack("<III", zlib.crc32(data), len(data), len(data))
        padding = -(start + 30 + len(name) + 4) % 64  # data begin at multiples of 64 bytes
        extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
        flags = struct.pack("<HHHHH", 0, 0x808, 0, 0, 0)
        body += (
            b"PK\3\4" + flags + bytes(12) + struct.pack("<HH", len(name), len(extra)) + name.encode() + extra
        )
        body += data + b"PK\7\x08" + known
        central += b"PK\1\2\0\0" + flags + known + struct.pack("<HHHHHII", len(name), 0, 0, 0, 0, 0, start)
        central += name.encode()
    at, size = len(body), len(central)
    end_64 = b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 0x31E, 45, 0, 0, 2, 2, size, at)
    end_64 += b"PK\6\7" + struct.pack("<IQI", 0, at + size, 1)
    path.write_bytes(body + central + end_64 + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 2, 2, size, at, 0))
    assert path.stat().st_size == 443
    assert torch.load(path, weights_only=True) == {}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


# -- a Trainer's checkpoint ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_checkpoint_without_config_answers_as_the_adapter(
    adapter: Path, base: Path, tmp_path: Path
) -> None:
    old = trainer_checkpoint(adapter, tmp_path / "out" / "checkpoint-400")
    before = contents(old)
    got = logits(old, base=str(base), lora_alpha=ALPHA)
    assert torch.equal(got, logits(adapter))
    assert not torch.allclose(got, logits(base), atol=1e-2), "the adapter does something"
    assert not torch.allclose(got, logits(old, base=str(base), lora_alpha=2 * ALPHA), atol=1e-2)
    assert contents(old) == before, "the user's files are as they were"


@pytest.mark.slow
def test_rank_and_targets_come_from_the_tensors(adapter: Path, base: Path, tmp_path: Path) -> None:
    read = read_adapter(trainer_checkpoint(adapter, tmp_path / "c"), lora_alpha=16)
    assert (read.config["r"], read.config["lora_alpha"]) == (RANK, 16)
    assert read.config["target_modules"] == TARGETS[base.name]
    assert read.parameters == sum(tensor.numel() for tensor in state_of(adapter).values())


@pytest.mark.slow
def test_without_an_alpha_it_is_refused(adapter: Path, base: Path, tmp_path: Path) -> None:
    old = trainer_checkpoint(adapter, tmp_path / "c")
    with pytest.raises(ModelError, match=f"r={RANK} and the targets follow") as caught:
        logits(old, base=str(base))
    assert "--lora-alpha 16" in str(caught.value.remedy)
    with pytest.raises(ModelError, match="does not say which base") as caught:
        find_model(old, lora_alpha=ALPHA)
    assert "--base" in str(caught.value.remedy)


@pytest.mark.slow
def test_the_config_of_the_run_counts_for_its_checkpoints(adapter: Path, tmp_path: Path) -> None:
    """Base and alpha stand in the folder above: nothing is asked for. The weights there are the empty file."""
    run = tmp_path / "out"
    old = trainer_checkpoint(adapter, run / "checkpoint-400")
    shutil.copy(adapter / "adapter_config.json", run)
    save_empty_of_2023(run / "adapter_model.bin")
    assert torch.equal(logits(old), logits(adapter))
    with pytest.raises(ModelError, match="adapter file is empty") as caught:
        logits(run)
    assert str(old) in str(caught.value.remedy), "the weights that are whole are named"


@pytest.mark.slow
def test_an_empty_file_gives_way_to_the_checkpoint_beside_it(adapter: Path, tmp_path: Path) -> None:
    """As BELLE told its users: pytorch_model.bin copied from a checkpoint into the final folder."""
    final = tmp_path / "final"
    trainer_checkpoint(adapter, final)
    shutil.copy(adapter / "adapter_config.json", final)
    save_empty_of_2023(final / "adapter_model.bin")
    assert adapter_weights_file(final) == final / "pytorch_model.bin"
    assert torch.equal(logits(final), logits(adapter))


@pytest.mark.slow
def test_layers_that_have_no_adapter_are_named_one_by_one(adapter: Path, base: Path, tmp_path: Path) -> None:
    first = {name: tensor for name, tensor in state_of(adapter).items() if ".1." not in name}
    assert 0 < len(first) < len(state_of(adapter))
    for folder, kept in (("a", ".0."), ("b", ".1.")):
        (tmp_path / folder).mkdir()
        part = {name: tensor for name, tensor in state_of(adapter).items() if kept in name}
        torch.save(part, tmp_path / folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"does not fit this base: \d+ missing"):
        logits(tmp_path / "a", base=str(base), lora_alpha=ALPHA)  # layer 0 alone: a model of one layer
    targets = read_adapter(tmp_path / "b", lora_alpha=ALPHA).config["target_modules"]
    assert len(targets) == len(TARGETS[base.name]) and all(".1." in target for target in targets)
    logits(tmp_path / "b", base=str(base), lora_alpha=ALPHA)


@pytest.mark.slow
def test_ranks_that_differ(adapter: Path, base: Path, tmp_path: Path) -> None:
    state = state_of(adapter)
    name = next(name for name in sorted(state) if name.endswith("lora_A.weight"))
    partner = name.replace("lora_A", "lora_B")
    state[name] = torch.cat([state[name], torch.ones_like(state[name])])
    state[partner] = torch.cat([state[partner], torch.ones_like(state[partner])], dim=1)
    (tmp_path / "c").mkdir()
    torch.save(state, tmp_path / "c" / "pytorch_model.bin")
    model: Any = load_model(find_model(tmp_path / "c", base=str(base), lora_alpha=ALPHA), dtype="fp32")
    module = model.get_submodule(name.removesuffix(".lora_A.weight"))
    assert (module.r["default"], module.scaling["default"]) == (2 * RANK, ALPHA / (2 * RANK))


@pytest.mark.slow
@pytest.mark.parametrize("change", ["module.", "default", "legacy"])
def test_names_of_other_wrappers_and_files_of_old_torch(
    adapter: Path, base: Path, tmp_path: Path, change: str
) -> None:
    state = state_of(adapter)
    if change == "module.":
        state = {f"module.{name}": tensor for name, tensor in state.items()}
    if change == "default":
        state = {name.replace(".weight", ".default.weight"): tensor for name, tensor in state.items()}
    (tmp_path / "c").mkdir()
    torch.save(state, tmp_path / "c" / "pytorch_model.bin", _use_new_zipfile_serialization=change != "legacy")
    assert torch.equal(logits(tmp_path / "c", base=str(base), lora_alpha=ALPHA), logits(adapter))


@pytest.mark.slow
def test_an_alpha_that_the_config_contradicts(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert torch.equal(logits(adapter, lora_alpha=99), logits(adapter))
    assert f"says lora_alpha={ALPHA}: that is used, not 99" in capsys.readouterr().err


@pytest.mark.slow
def test_a_config_of_another_training(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 8}), encoding="utf-8")
    with pytest.raises(ModelError, match=r"says r=8, and .* has rank 4"):
        logits(adapter)


@pytest.mark.slow
def test_another_base_is_refused_by_its_shapes(adapter: Path, base: Path, tmp_path: Path) -> None:
    old = trainer_checkpoint(adapter, tmp_path / "c")
    wider = tiny_model(tmp_path / "wider", base.name, hidden=64)
    deeper = tiny_model(tmp_path / "deeper", base.name, layers=3)
    for other in (wider, deeper):
        with pytest.raises(ModelError, match="does not fit this base"):
            logits(old, base=str(other), lora_alpha=ALPHA)


# -- the grouped layout of PEFT 0.2 ----------------------------------------------------------------------------


class MergedLinear(nn.Linear):
    """PEFT 0.2's layer, from its description: one lora_A for all enabled parts, a grouped convolution as lora_B, its
    output spread over the enabled parts of the fused output."""

    def __init__(self, linear: nn.Linear, r: int, alpha: float, enable_lora: list[bool]) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.weight, self.bias = linear.weight, linear.bias
        parts = sum(enable_lora)
        self.enable_lora, self.scaling = enable_lora, alpha / r
        self.lora_A = nn.Linear(self.in_features, r * parts, bias=False)
        width = self.out_features // len(enable_lora) * parts
        self.lora_B = nn.Conv1d(r * parts, width, kernel_size=1, groups=2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.linear(x, self.weight, self.bias)
        after = self.lora_B(self.lora_A(x).transpose(-2, -1)).transpose(-2, -1)
        part = self.out_features // len(self.enable_lora)
        taken = 0
        for number, enabled in enumerate(self.enable_lora):
            if enabled:
                y[..., number * part : (number + 1) * part] += (
                    self.scaling * after[..., taken * part : (taken + 1) * part]
                )
                taken += 1
        return y


OLD_CONFIG = {
    "base_model_name_or_path": None,
    "bias": "none",
    "enable_lora": [True, False, True],
    "fan_in_fan_out": True,
    "inference_mode": True,
    "lora_alpha": ALPHA,
    "lora_dropout": 0.05,
    "merge_weights": False,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": RANK,
    "target_modules": ["query_key_value"],
    "task_type": "CAUSAL_LM",
}


def grouped(bloom: Path, folder: Path, weights: str) -> tuple[Path, torch.Tensor]:
    """An adapter of BELLE's BLOOM recipe of April 2023, and the logits of the model it was trained in."""
    model: Any = load_model(find_model(bloom), dtype="fp32", device="cpu")
    torch.manual_seed(3)
    state = {}
    for number, block in enumerate(model.transformer.h):
        layer = MergedLinear(block.self_attention.query_key_value, RANK, ALPHA, [True, False, True])
        block.self_attention.query_key_value = layer
        for part in ("lora_A", "lora_B"):
            weight = getattr(layer, part).weight
            weight.data.normal_(std=0.3)
            name = f"base_model.model.transformer.h.{number}.self_attention.query_key_value.{part}.weight"
            state[name] = weight.data.clone()
    out = 3 * model.config.hidden_size
    assert state[name].shape == (2 * out // 3, RANK, 1), "the shape of the report"
    folder.mkdir(parents=True)
    torch.save(state, folder / weights)
    with torch.no_grad():
        return folder, model(IDS).logits


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["adapter_model.bin", "pytorch_model.bin"])
def test_grouped_lora_gives_the_outputs_of_the_old_layer(bloom: Path, tmp_path: Path, weights: str) -> None:
    folder, expected = grouped(bloom, tmp_path / "old", weights)
    options: dict[str, Any] = {"base": str(bloom)}
    if weights == "adapter_model.bin":
        config = OLD_CONFIG | {"base_model_name_or_path": str(bloom)}
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        options = {}
    else:
        options["lora_alpha"] = ALPHA
    got = logits(folder, **options)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)
    assert not torch.allclose(got, logits(bloom), atol=1e-2)


@pytest.mark.parametrize(
    "enable_lora", [[True, False, True], [True, True, False], [True, True], [True, True, True, True]]
)
def test_the_expansion_is_the_grouped_layer_to_the_last_digit(enable_lora: list[bool]) -> None:
    torch.manual_seed(5)
    layer = MergedLinear(nn.Linear(10, 24), 4, 6, enable_lora).double()
    tensors = {f"x.{part}.weight": getattr(layer, part).weight.data for part in ("lora_A", "lora_B")}
    plain, config = expand_grouped(tensors, {"r": 4, "lora_alpha": 6, "enable_lora": enable_lora}, "here")
    a, b = plain["x.lora_A.weight"], plain["x.lora_B.weight"]
    assert config == {
        "r": 4 * sum(enable_lora),
        "lora_alpha": 6 * sum(enable_lora),
        "fan_in_fan_out": False,
    }
    x = torch.randn(2, 3, 10, dtype=torch.float64)
    scale = config["lora_alpha"] / config["r"]
    ours = nn.functional.linear(x, layer.weight, layer.bias) + scale * (x @ a.T @ b.T)
    torch.testing.assert_close(ours, layer(x), rtol=0, atol=1e-14)
    part = 24 // len(enable_lora)
    for number, enabled in enumerate(enable_lora):
        assert bool(b[number * part : (number + 1) * part].any()) is enabled


def test_grouped_tensors_that_fit_nothing(bloom: Path, tmp_path: Path) -> None:
    folder, _ = grouped(bloom, tmp_path / "old", "adapter_model.bin")
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(OLD_CONFIG | {"enable_lora": [True, True, True]}), encoding="utf-8")
    with pytest.raises(ModelError, match="no grouped LoRA of"):
        read_adapter(folder)
    config.write_text(json.dumps(OLD_CONFIG | {"r": 8}), encoding="utf-8")
    with pytest.raises(ModelError, match="says r=8 for 2 groups, and lora_A has 8 rows"):
        read_adapter(folder)


def test_enable_lora_without_groups(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["enable_lora"] = [True, False, True]
    (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match="lora_B is not grouped"):
        logits(adapter)


# -- what must not be believed ---------------------------------------------------------------------------------


class Evil:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.proof),)


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_nothing_is_run(
    adapter: Path, base: Path, tmp_path: Path, name: str, zipped: bool
) -> None:
    proof = tmp_path / "it-ran"
    folder = tmp_path / "evil"
    folder.mkdir()
    state = {**state_of(adapter), "lora_evil": Evil(proof)}
    torch.save(state, folder / name, _use_new_zipfile_serialization=zipped)
    shutil.copy(adapter / "adapter_config.json", folder)
    with pytest.raises(ModelError, match=r"not a file of plain tensors: .*mkdir"):
        logits(folder, base=str(base))
    assert not proof.exists()
    torch.load(folder / name, weights_only=False)
    assert proof.exists(), "the pickle would have run"


@pytest.mark.slow
def test_files_that_are_cut_hold_nan_or_no_tensors(adapter: Path, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    path = folder / "adapter_model.bin"
    shutil.copy(adapter / "adapter_config.json", folder)
    state = state_of(adapter)
    torch.save(state, path)
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(ModelError, match="damaged or cut short"):
        logits(folder)
    torch.save(state | {"step": 7}, path)
    with pytest.raises(ModelError, match="it holds a int"):
        logits(folder)
    torch.save([1, 2], path)
    with pytest.raises(ModelError, match="it holds a list"):
        logits(folder)
    path.write_bytes(pickle.dumps(Evil(tmp_path / "it-ran")))  # not by torch.save
    with warnings.catch_warnings(), pytest.raises(ModelError, match="plain tensors: Unsupported op") as told:
        warnings.simplefilter("error")
        logits(folder)
    assert "executed" in told.value.problem and not (tmp_path / "it-ran").exists()
    name = sorted(state)[0]
    state[name][0, 0] = float("nan")
    torch.save(state, path)
    with pytest.raises(ModelError, match=f"{name} holds NaN".replace(".", r"\.")):
        logits(folder)


def test_folders_that_are_no_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    assert not is_adapter_folder(base)
    assert not is_adapter_folder(tmp_path)
    (tmp_path / "c").mkdir()
    torch.save(load_file(base / "model.safetensors"), tmp_path / "c" / "pytorch_model.bin")
    assert not is_adapter_folder(tmp_path / "c"), "a model's own weights"
    save_file(state_of(adapter), tmp_path / "c" / "model.safetensors")
    assert is_adapter_folder(tmp_path / "c"), "what a Trainer of 2024 writes"
