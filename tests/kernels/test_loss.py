from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.devices import DEVICES, NEEDS_A_GPU

from tuoling.kernels import loss
from tuoling.kernels.loss import Extras, linear_cross_entropy, reference_cross_entropy, supervised


def draw(
    rows: int,
    width: int,
    words: int,
    dtype: torch.dtype = torch.float32,
    spread: float = 1.0,
    device: str = "cpu",
) -> tuple:
    generator = torch.Generator().manual_seed(rows * words)
    hidden = (torch.randn(rows, width, generator=generator) * spread).to(device, dtype).requires_grad_()
    weight = torch.randn(words, width, generator=generator).to(device, dtype).requires_grad_()
    bias = torch.randn(words, generator=generator).to(device, dtype).requires_grad_()
    return hidden, weight, bias, torch.randint(0, words, (rows,), generator=generator).to(device)


@pytest.mark.parametrize("rows, width, words", [(47, 31, 123), (1, 8, 2), (130, 16, 1001)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1, 5000, 2**28])
@pytest.mark.parametrize("scale", [1.0, 0.0625])
@pytest.mark.parametrize("device", DEVICES)
def test_equals_float64(
    rows: int, width: int, words: int, with_bias: bool, chunk_bytes: int, scale: float, device: str
) -> None:
    hidden, weight, bias, labels = draw(rows, width, words, device=device)
    given = bias if with_bias else None
    total, count = linear_cross_entropy(hidden, weight, labels, given, scale=scale, chunk_bytes=chunk_bytes)
    assert count == rows
    expected = reference_cross_entropy(hidden, weight, labels, given, scale=scale)
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=0)
    inputs = [hidden, weight] + ([bias] if with_bias else [])
    ours = torch.autograd.grad(total * 0.7, inputs)
    theirs = torch.autograd.grad(expected * 0.7, inputs)
    for mine, true in zip(ours, theirs, strict=True):
        assert (mine.double() - true.double()).norm() <= 2e-6 * true.double().norm()


@pytest.mark.parametrize("device", DEVICES)
def test_a_word_that_is_nearly_impossible_still_has_its_loss(device: str) -> None:
    hidden = torch.tensor([[200.0], [1.0]], device=device)
    weight = torch.tensor([[1.0], [0.0], [0.5]], device=device)
    labels = torch.tensor([1, 1], device=device)
    total, _ = linear_cross_entropy(hidden, weight, labels)
    expected = reference_cross_entropy(hidden, weight, labels)
    assert total.item() == pytest.approx(expected.item(), rel=1e-6) and total.item() > 200


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_learned_is_a_zero_that_reaches_both_inputs(device: str) -> None:
    hidden, weight, bias, _ = draw(3, 4, 5, device=device)
    labels = torch.full((3,), -100, device=device)
    where = supervised(labels)
    total, count = linear_cross_entropy(hidden[where], weight, labels[where], bias)
    total.backward()
    assert (total.item(), count) == (0.0, 0)
    assert not hidden.grad.any() and not weight.grad.any() and not bias.grad.any()


@pytest.mark.parametrize("device", DEVICES)
def test_a_frozen_head_costs_no_gradient(device: str) -> None:
    hidden, weight, _, labels = draw(6, 4, 50, device=device)
    weight = weight.detach()
    total, _ = linear_cross_entropy(hidden, weight, labels)
    total.backward()
    assert weight.grad is None and hidden.grad.any()


@pytest.mark.parametrize("trained", [False, True])
def test_logits_of_a_frozen_head_are_made_in_chunks_that_stay_in_the_cache(
    trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 positions where 200 would fit, and the same sum and gradient; a trained head keeps its large chunks."""
    monkeypatch.setattr(loss, "CACHED_BYTES", 4 * 64 * 50)
    monkeypatch.setattr(loss, "CACHED_ROWS", 16)
    hidden, weight, _, labels = draw(200, 8, 50)
    weight.requires_grad_(trained)
    rows: list[int] = []
    made = loss._Scratch.logits

    def logits(self: loss._Scratch, part: torch.Tensor, *others: torch.Tensor | None) -> torch.Tensor:
        rows.append(len(part))
        return made(self, part, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(loss._Scratch, "logits", logits)
    total, _ = linear_cross_entropy(hidden, weight, labels)
    assert rows == ([200] if trained else [64, 64, 64, 8])
    expected = reference_cross_entropy(hidden, weight, labels)
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    (mine,) = torch.autograd.grad(total, hidden)
    (true,) = torch.autograd.grad(expected, hidden)
    assert (mine - true).norm() <= 2e-6 * true.norm()


def test_many_words_keep_chunks_of_whole_tiles() -> None:
    """250,880 words in bf16: 256 positions, as many as the large budget holds."""
    assert (
        loss._rows_of_chunk(torch.empty(250_880, 1).bfloat16(), loss.cached_chunk_bytes(2 * 250_880)) == 256
    )
    assert loss._rows_of_chunk(torch.empty(50_432, 1).bfloat16(), loss.cached_chunk_bytes(2 * 50_432)) == 288


@pytest.mark.parametrize("chunk_bytes, allowed", [(2**28, 1.5), (120_000, 2.5)])
@pytest.mark.parametrize("device", DEVICES)
def test_bf16_sums_in_float32(chunk_bytes: int, allowed: float, device: str) -> None:
    """Logits and their gradient are rounded to bf16 as F.linear rounds them; the head's gradient once a chunk."""
    hidden, weight, _, labels = draw(64, 32, 3000, torch.bfloat16, spread=0.3, device=device)
    total, _ = linear_cross_entropy(hidden, weight, labels, chunk_bytes=chunk_bytes)
    expected = F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    total.backward()
    true = torch.autograd.grad(reference_cross_entropy(hidden, weight, labels), [hidden, weight])
    stock = torch.autograd.grad(expected, [hidden, weight])
    for mine, exact, theirs in zip((hidden.grad, weight.grad), true, stock, strict=True):
        error, stock_error = (
            (mine.double() - exact.double()).norm(),
            (theirs.double() - exact.double()).norm(),
        )
        assert error <= allowed * stock_error


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_casts_as_linear_would_and_keeps_float32_gradients(device: str) -> None:
    hidden, weight, bias, labels = draw(20, 16, 300, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        total, _ = linear_cross_entropy(hidden, weight, labels, bias)
        expected = F.cross_entropy(F.linear(hidden, weight, bias).float(), labels, reduction="sum")
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    total.backward()
    assert weight.grad.dtype == hidden.grad.dtype == torch.float32


@pytest.mark.parametrize("device", DEVICES)
def test_a_scaled_loss_in_fp16_does_not_overflow_on_its_way(device: str) -> None:
    """GradScaler begins at 65,536, above the largest number of fp16: one learned token, and a small gradient."""
    hidden, weight, _, labels = draw(1, 16, 40, torch.float16, spread=0.05, device=device)
    weight = (weight.detach() * 0.05).requires_grad_()
    total, _ = linear_cross_entropy(hidden, weight, labels)
    (total * 65536.0).backward()
    exact = torch.autograd.grad(reference_cross_entropy(hidden, weight, labels) * 65536.0, [hidden, weight])
    for mine, true in zip((hidden.grad, weight.grad), exact, strict=True):
        assert (mine.double() - true.double()).norm() <= 2e-3 * true.double().norm()


@NEEDS_A_GPU
def test_a_chunk_on_a_gpu_is_as_large_as_its_budget() -> None:
    """250,880 words of bf16, 300 positions: the peak above the inputs is one chunk of 256 and its two float32 copies."""
    hidden, weight, _, labels = draw(300, 8, 250_880, torch.bfloat16, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(hidden, weight.detach(), labels)
    above = torch.cuda.max_memory_allocated() - before
    chunk = 256 * 250_880 * 2
    assert 5 * chunk <= above <= 5.2 * chunk


@pytest.mark.parametrize("device", DEVICES)
def test_no_logits_are_kept(device: str) -> None:
    hidden, weight, _, labels = draw(40, 8, 5000, device=device)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        linear_cross_entropy(hidden, weight, labels, chunk_bytes=1000)
    assert sum(kept) < 5000


def test_backward_twice_is_refused() -> None:
    hidden, weight, _, labels = draw(4, 4, 9)
    total, _ = linear_cross_entropy(hidden, weight, labels)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()


@pytest.mark.parametrize("extras", [Extras(0.1), Extras(0.0, 1e-2), Extras(0.2, 1e-3)])
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("device", DEVICES)
def test_label_smoothing_and_z_loss_equal_their_formula(extras: Extras, scale: float, device: str) -> None:
    hidden, weight, bias, labels = draw(23, 12, 301, device=device)
    total, _ = linear_cross_entropy(
        hidden, weight, labels, bias, scale=scale, extras=extras, chunk_bytes=6000
    )
    scores = scale * F.linear(hidden.double(), weight.double(), bias.double())
    logs = scores - scores.exp().sum(1, keepdim=True).log()
    wanted = torch.full_like(scores, extras.label_smoothing / scores.shape[1])
    wanted[torch.arange(len(labels)), labels] += 1 - extras.label_smoothing
    expected = -(wanted * logs).sum() + extras.z_loss * scores.exp().sum(1).log().pow(2).sum()
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=0)
    ours = torch.autograd.grad(total, [hidden, weight, bias])
    theirs = torch.autograd.grad(expected, [hidden, weight, bias])
    for mine, true in zip(ours, theirs, strict=True):
        assert (mine.double() - true.double()).norm() <= 2e-6 * true.double().norm()
    plain = reference_cross_entropy(hidden, weight, labels, bias, scale=scale, extras=extras)
    torch.testing.assert_close(plain, expected, rtol=1e-12, atol=0)
