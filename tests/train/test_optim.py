from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tests.devices import DEVICES
from torch import nn
from transformers import BloomConfig, BloomForCausalLM

from tuoling.errors import MissingPackage
from tuoling.train.checkpoint import load_optimizer, optimizer_tensors, random_state, save_checkpoint
from tuoling.train.optim import make_optimizer, require_optimizer, set_learning_rate


class Settings:
    learning_rate = 1e-3
    weight_decay = 0.1
    adam_beta1 = 0.9
    adam_beta2 = 0.999
    adam_epsilon = 1e-8
    optim = "adamw"


class MuonSettings(Settings):
    optim = "muon"


class EightBitSettings(Settings):
    optim = "adamw_8bit"


def test_only_matrices_are_decayed() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    model[0].bias.requires_grad_(False)
    groups = make_optimizer(model, Settings()).param_groups  # type: ignore[arg-type]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert groups[0]["params"] == [model[0].weight]
    assert {id(p) for p in groups[1]["params"]} == {id(model[1].weight), id(model[1].bias)}


def bloom(hidden_size: int = 8, device: str = "cpu") -> BloomForCausalLM:
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=20, hidden_size=hidden_size, n_layer=1, n_head=2)
    return BloomForCausalLM(config).to(device)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    ids = torch.arange(6, device=next(model.parameters()).device).unsqueeze(0)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def orthogonalised(gradient: torch.Tensor) -> torch.Tensor:
    """U V^T of the singular value decomposition: what Muon's five iterations approach."""
    u, _, v = torch.linalg.svd(gradient.double(), full_matrices=False)
    return u @ v


@pytest.mark.slow
def test_muon_turns_the_matrices_of_the_blocks_and_adamw_moves_the_rest() -> None:
    model = bloom()
    optimizer = make_optimizer(model, MuonSettings())  # type: ignore[arg-type]
    groups = [{id(p) for p in group["params"]} for group in optimizer.param_groups]
    inside = {id(p) for name, p in model.named_parameters() if p.ndim == 2 and "embeddings" not in name}
    assert groups[0] == inside and len(inside) == 4
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]
    set_learning_rate(optimizer, 0.01)
    weight = model.transformer.h[0].mlp.dense_h_to_4h.weight  # [32, 8]
    before = weight.detach().clone()
    ids = torch.randint(20, (4, 30))  # enough tokens for a gradient of full rank
    model(input_ids=ids, labels=ids).loss.backward()
    assert weight.grad is not None
    wanted = orthogonalised(weight.grad)
    optimizer.step()
    moved = (before * (1 - 0.01 * 0.1) - weight.detach()).double()
    # lr x 0.2 sqrt(max side): the size of an AdamW step; the iterations leave singular values of 0.7 to 1.2.
    assert float(moved.norm() / (0.01 * 0.2 * 32**0.5 * 8**0.5)) == pytest.approx(0.95, abs=0.25)
    cosine = float((moved * wanted).sum() / (moved.norm() * wanted.norm()))
    assert cosine > 0.85


@pytest.mark.slow
@pytest.mark.parametrize("settings", [MuonSettings(), EightBitSettings()], ids=["muon", "adamw_8bit"])
@pytest.mark.parametrize("device", DEVICES)
def test_its_state_goes_through_a_checkpoint(settings: Settings, tmp_path: Path, device: str) -> None:
    if settings.optim == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    model = bloom(hidden_size=64, device=device)  # 8 bits begin at 4,096 numbers
    optimizer = make_optimizer(model, settings)  # type: ignore[arg-type]
    for _ in range(2):
        step(model, optimizer)
    save_checkpoint(
        tmp_path / "c",
        save_weights=lambda folder: torch.save(model.state_dict(), folder / "w.pt"),
        optimizer=optimizer_tensors(model, optimizer),
        random=[random_state()],
        trainer_state="{}",
        position={},
    )
    step(model, optimizer)
    again = bloom(hidden_size=64, device=device)
    again.load_state_dict(torch.load(tmp_path / "c" / "w.pt", weights_only=True))
    fresh = make_optimizer(again, settings)  # type: ignore[arg-type]
    load_optimizer(tmp_path / "c", model=again, optimizer=fresh)
    step(again, fresh)
    for (name, one), (_, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        if device == "cpu":
            assert torch.equal(one, other), name
        else:  # the embedding's gradient is added up in any order there
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=name)


def test_several_optimizers_seen_as_one_load_a_state_dict() -> None:
    model = bloom()
    optimizer = make_optimizer(model, MuonSettings())  # type: ignore[arg-type]
    step(model, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    again = bloom()
    again.load_state_dict(model.state_dict())
    fresh = make_optimizer(again, MuonSettings())  # type: ignore[arg-type]
    fresh.load_state_dict(state)
    set_learning_rate(fresh, 0.5)
    set_learning_rate(optimizer, 0.5)
    step(model, optimizer)
    step(again, fresh)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("device", DEVICES)
def test_eight_bits_keep_small_states_and_step_like_adamw(device: str) -> None:
    pytest.importorskip("bitsandbytes")
    one, other = (bloom(hidden_size=64, device=device) for _ in range(2))
    start = [parameter.detach().clone() for parameter in one.parameters()]
    whole = make_optimizer(one, Settings())  # type: ignore[arg-type]
    eight = make_optimizer(other, EightBitSettings())  # type: ignore[arg-type]
    for _ in range(5):
        step(one, whole)
        step(other, eight)
    large = other.transformer.h[0].mlp.dense_h_to_4h.weight
    assert (
        eight.state[large]["state1"].dtype == torch.uint8
        and eight.state[large]["state2"].dtype == torch.uint8
    )
    way = torch.cat([(p.detach() - s).flatten() for p, s in zip(one.parameters(), start, strict=True)])
    way8 = torch.cat([(p.detach() - s).flatten() for p, s in zip(other.parameters(), start, strict=True)])
    assert float((way - way8).norm() / way.norm()) < 0.1


def test_eight_bits_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    require_optimizer("adamw")
    with pytest.raises(MissingPackage, match="bitsandbytes"):
        require_optimizer("adamw_8bit")
