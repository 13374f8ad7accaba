"""Weights into memory: what is wrong with a folder is said, and nothing is half random."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import tiny_model

from tuoling.errors import ConfigError, ModelError
from tuoling.models.adapters import lora_target_names
from tuoling.models.load import find_model, load_model, resolve_dtype


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("load") / "llama", "llama")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "m")
    return tmp_path / "m"


def load(folder: Path, **options: Any) -> Any:
    return load_model(find_model(folder), **{"dtype": "fp32", "device": "cpu", **options})


def rewrite(folder: Path, change: Any) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.slow
def test_weights_arrive_bit_for_bit_and_frozen(folder: Path) -> None:
    model = load(folder)
    stored = load_file(folder / "model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items()) and len(stored) > 10
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_for_training_asks_for_gradients_and_keeps_no_cache(folder: Path) -> None:
    model = load(folder, for_training=True)
    assert model.training and not model.config.use_cache and all(p.requires_grad for p in model.parameters())


def test_dtypes(folder: Path) -> None:
    assert load(folder, dtype="bf16").dtype is torch.bfloat16
    assert resolve_dtype(torch.float32, "cpu") is torch.float32
    with pytest.raises(ModelError, match="float16 on a CPU"):
        resolve_dtype("fp16", "cpu")
    with pytest.raises(ModelError, match="int3"):
        resolve_dtype("int3", "cpu")


def test_missing_unknown_and_misshaped_tensors_are_named(folder: Path) -> None:
    rewrite(folder, lambda state: state.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"1 tensors are missing.*model\.layers\.1\.mlp\.up_proj\.weight"):
        load(folder)


def test_unknown_tensors_are_named(folder: Path) -> None:
    rewrite(folder, lambda state: state.update({"model.layers.0.extra": torch.ones(2)}))
    with pytest.raises(ModelError, match=r"belong to no part.*model\.layers\.0\.extra"):
        load(folder)


def test_misshaped_tensors_are_an_error(folder: Path) -> None:
    rewrite(folder, lambda state: state.update({"model.norm.weight": torch.ones(5)}))
    with pytest.raises(ModelError, match=r"(?s)model\.norm\.weight|cannot be loaded"):
        load(folder)


def test_old_rotary_buffers_are_no_error(folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(folder, lambda state: state.update({name: torch.ones(4)}))
    load(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:keep] if keep >= 0 else data[:-1])
    with pytest.raises(ModelError, match="damaged or cut short") as caught:
        load(folder)
    assert caught.value.where == str(file)


def test_a_missing_shard(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.rename(folder / "model-00001-of-00002.safetensors")
    names = load_file(folder / "model-00001-of-00002.safetensors")
    index = {
        "weight_map": {
            **dict.fromkeys(names, "model-00001-of-00002.safetensors"),
            "x": "model-00002-of-00002.safetensors",
        }
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ModelError, match=r"missing: model-00002-of-00002\.safetensors"):
        load(folder)


def test_bin_weights_through_weights_only(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(stored, folder / "pytorch_model.bin")
    state = load(folder).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_a_pickle_that_runs_code_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"x": _Evil(tmp_path / "touched")}, file)
    with pytest.raises(ModelError):
        load(folder)
    assert not (tmp_path / "touched").exists()


def test_models_that_cannot_chat(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    for model_type, said in (
        ("bert", "do not predict the next token"),
        ("baichuan", "own Python code"),
        ("no-such-type", "no-such-type"),
    ):
        (folder / "config.json").write_text(
            json.dumps({**config, "model_type": model_type}), encoding="utf-8"
        )
        with pytest.raises(ModelError, match=said):
            load(folder)


# -- LoRA targets ----------------------------------------------------------------------------------------------


def test_all_means_every_linear_layer_of_the_blocks(folder: Path) -> None:
    model = load(folder)
    wanted = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert lora_target_names(model, ("all",)) == lora_target_names(model, "all-linear") == wanted


def test_gpt2_layers_are_found_though_they_are_no_linear() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16))
    assert lora_target_names(model) == ["c_attn", "c_fc", "c_proj"]


def test_a_name_that_also_means_a_layer_outside_is_written_in_full() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(
                [torch.nn.ModuleDict({"proj": torch.nn.Linear(2, 2), "up": torch.nn.Linear(2, 2)})]
            )
            self.proj = torch.nn.Linear(2, 2)

        def get_output_embeddings(self) -> None: ...

        def get_input_embeddings(self) -> None: ...

    assert lora_target_names(Odd()) == ["up", "layers.0.proj"]  # type: ignore[arg-type]


def test_an_unknown_target_names_the_nearest(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no linear layer is called query_proj") as caught:
        lora_target_names(load(folder), ["q_proj", "query_proj"])
    assert "q_proj" in str(caught.value.remedy)
