"""Linear layers laid out for oneDNN once: the same numbers, fewer bytes, and back again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.tiny import tiny_model
from torch import nn

from tuoling.kernels.packed_linear import PackedLinears
from tuoling.models.load import find_model, load_model

needs_bf16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no bf16 for oneDNN"
)


@needs_bf16
@pytest.mark.parametrize(("width", "out"), [(64, 96), (70, 33), (1024, 320)])
def test_numbers_are_those_of_the_plain_layer_and_weights_come_back(width: int, out: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, out), nn.Linear(out, 48, bias=False)).bfloat16()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    shapes = [(1, 1), (1, 2), (2, 1), (1, 3), (2,), (1, 16), (16, 1), (1, 300)]
    inputs = [torch.randn(*shape, width).bfloat16() for shape in shapes]
    exact = [
        F.linear(F.linear(x.double(), before[0].double(), before[1].double()), before[2].double())
        for x in inputs
    ]
    with torch.no_grad():
        plain = [model(x) for x in inputs]
        packed = PackedLinears(model)
        assert len(packed) == 2
        assert all(layer.weight.numel() == 0 for layer in model)
        answers = [model(x) for x in inputs]
    for ours, theirs, wanted in zip(answers, plain, exact, strict=True):
        assert ours.shape == theirs.shape
        mine, stock = ((one.double() - wanted).norm() / wanted.norm() for one in (ours, theirs))
        assert mine <= 1.02 * stock  # what bf16 rounds, and no more
    packed.undo()
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
    with torch.no_grad():
        assert all(torch.equal(model(x), theirs) for x, theirs in zip(inputs, plain, strict=True))


@needs_bf16
def test_a_gradient_goes_through_packed_layers() -> None:
    layer = nn.Linear(64, 32).bfloat16()
    x = torch.randn(1, 5, 64).bfloat16().requires_grad_()
    (wanted,) = torch.autograd.grad(layer(x).sum(), x)
    packed = PackedLinears(layer)
    (ours,) = torch.autograd.grad(layer(x).sum(), x)
    packed.undo()
    assert torch.equal(ours, wanted)


@pytest.mark.slow
@needs_bf16
@pytest.mark.parametrize("family", ["bloom", "llama"])
def test_logits_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    """A tied head stays readable as the embedding; float32 models are left alone."""
    source = find_model(tiny_model(tmp_path / "m", family, hidden=64))
    model = load_model(source, dtype="bf16", device="cpu")
    ids = torch.arange(4, 40).unsqueeze(0)
    with torch.no_grad():
        theirs = model(input_ids=ids).logits
        packed = PackedLinears(model)
        ours = model(input_ids=ids).logits
        one = model(input_ids=ids[:, :1]).logits
    assert len(packed) >= 9
    assert model.get_input_embeddings().weight.numel() > 0
    assert (ours.float() - theirs.float()).norm() <= 5e-3 * theirs.float().norm()
    assert one.shape == (1, 1, theirs.shape[-1])
    packed.undo()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, theirs)
    assert len(PackedLinears(load_model(source, dtype="fp32", device="cpu"))) == 0
