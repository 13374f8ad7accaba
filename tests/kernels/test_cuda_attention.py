"""The varlen kernels of a GPU: each against the float64 reference, and what is asked of them, as far as a CPU can tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.devices import DEVICES, NEEDS_A_GPU
from tests.kernels.test_attention import SLOPES, draw, pack_of
from torch import Tensor

from tuoling.kernels import cuda
from tuoling.kernels.attention import Bias, attend, reference_attention

LENGTHS = (130, 5, 29, 1, 61)


def near(ours: Tensor, exact: Tensor, allowed: float) -> bool:
    """Relative distance; 8e-3 is two roundings to bf16."""
    return bool((ours.cpu().double() - exact.double()).norm() <= allowed * exact.double().norm())


def without_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_flash_attn", lambda: None)


def old_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A T4: SDPA document by document, with the strip as its mask."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))


@NEEDS_A_GPU
@pytest.mark.parametrize("kernel", [None, without_flash, old_card])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [64, 20, 8])
@pytest.mark.parametrize("keys", [4, 2])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("slopes", [None, SLOPES])
def test_gpu_kernels_equal_the_reference(
    kernel: Callable[[pytest.MonkeyPatch], None] | None,
    dtype: torch.dtype,
    size: int,
    keys: int,
    window: int | None,
    slopes: Tensor | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever takes it: flash-attn, torch's varlen kernel, flex_attention, or SDPA where none of them does."""
    if kernel is not None:
        kernel(monkeypatch)
    cpu = draw(sum(LENGTHS), 4, keys, size, dtype)
    q, k, v = (x.detach().to("cuda").requires_grad_() for x in cpu)
    bias = None if window is None and slopes is None else Bias(slopes, window)
    ours = attend(q, k, v, pack_of(LENGTHS, "cuda"), scale=0.125, bias=bias)
    exact = reference_attention(*cpu, LENGTHS, scale=0.125, window=window, slopes_N=slopes)
    assert near(ours, exact, 8e-3)
    mine = torch.autograd.grad(ours.float().square().sum(), [q, k, v])
    true = torch.autograd.grad(exact.square().sum(), cpu)
    assert all(near(a, b, 3e-2) for a, b in zip(mine, true, strict=True))


@NEEDS_A_GPU
def test_dropout_on_a_gpu_keeps_the_mean() -> None:
    """No kernel but flash-attn's drops inside a varlen launch; the mean of many draws is the undropped answer."""
    q, k, v = (x.detach().to("cuda") for x in draw(sum(LENGTHS), 4, 4, 64, torch.bfloat16))
    pack = pack_of(LENGTHS, "cuda")
    torch.manual_seed(0)
    drawn = [attend(q, k, v, pack, scale=0.125, dropout=0.2).double().cpu() for _ in range(200)]
    assert not torch.equal(drawn[0], drawn[1])
    exact = reference_attention(q.cpu(), k.cpu(), v.cpu(), LENGTHS, scale=0.125)
    assert near(torch.stack(drawn).mean(0), exact, 6e-2)  # 0.5 of a value's size over the root of 200


@NEEDS_A_GPU
def test_backward_is_the_same_twice_where_that_is_asked() -> None:
    grads = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            q, k, v = (x.detach().to("cuda").requires_grad_() for x in draw(2000, 4, 4, 64, torch.bfloat16))
            out = attend(q, k, v, pack_of((1200, 800), "cuda"), scale=0.125)
            grads.append(torch.autograd.grad(out.float().square().sum(), [q, k, v]))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def plain_flex(
    q: Tensor, k: Tensor, v: Tensor, *, score_mod: Any, block_mask: Any, scale: float, enable_gqa: bool
) -> Tensor:
    """What flex_attention's documentation says it computes, in float64 and with every score at once."""
    assert enable_gqa == (q.shape[1] != k.shape[1]), "it refuses grouped heads that it is not told of"
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1).double() for x in (k, v))
    zero, heads = torch.zeros((), dtype=torch.long), torch.arange(q.shape[1])[:, None, None]
    rows, columns = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None, :]
    scores = score_mod(q.double() @ k.mT * scale, zero, heads, rows, columns)
    seen = block_mask.mask_mod(zero, zero, rows, columns)
    return (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v).to(q.dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("keys", [4, 2])
def test_flex_adds_alibi_inside_each_document(
    device: str, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written out on a CPU, compiled on a GPU; grouped heads too, and one mask for every layer of a pack."""
    from torch.nn.attention import flex_attention

    if device == "cpu":
        monkeypatch.setattr(cuda, "_compiled_flex", lambda: plain_flex)
    made: list[int] = []
    create = flex_attention.create_block_mask

    def counted(*args: Any, **options: Any) -> Any:
        made.append(1)
        return create(*args, **options)

    monkeypatch.setattr(flex_attention, "create_block_mask", counted)
    lengths = (9, 1, 22)
    q, k, v = (x.detach() for x in draw(sum(lengths), 4, keys, 16))
    pack = pack_of(lengths, device)
    for _ in range(2):
        ours = cuda._flex(*(x.to(device) for x in (q, k, v)), pack, 0.3, SLOPES.to(device))
    exact = reference_attention(q, k, v, lengths, scale=0.3, slopes_N=SLOPES)
    assert near(ours, exact, 1e-6 if device == "cpu" else 2e-3)  # its products may be TF32
    assert made == [1] and pack in cuda._MASKS


@pytest.fixture
def new_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


@pytest.mark.usefixtures("new_card")
@pytest.mark.parametrize("deterministic", [False, True])
def test_what_flash_attn_is_asked(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its window counts tokens behind the query, its offsets are int32, and it has its own word for determinism."""
    asked: dict[str, Any] = {}

    def flash(q: Tensor, k: Tensor, v: Tensor, *places: Any, **options: Any) -> Tensor:
        asked.update(options, places=places)
        return q

    monkeypatch.setattr(cuda, "_flash_attn", lambda: flash)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    q, k, v = draw(12, 4, 4, 16, torch.bfloat16)
    pack = pack_of((7, 5))
    pack.cu_seqlens = pack.cu_seqlens.long()
    cuda.attend(q, k, v, pack, scale=0.5, dropout=0.1, bias=Bias(SLOPES.bfloat16(), 3))
    places = asked["places"]
    assert places[0].dtype == places[1].dtype == torch.int32 and places[0].tolist() == [0, 7, 12]
    assert places[2:] == (7, 7)
    assert asked["window_size"] == (2, 0) and asked["causal"] is True
    assert (asked["dropout_p"], asked["softmax_scale"]) == (0.1, 0.5)
    assert asked["alibi_slopes"].dtype == torch.float32 and asked["deterministic"] is deterministic


@pytest.mark.usefixtures("new_card")
@pytest.mark.parametrize(
    ("size", "dtype", "slopes", "dropout"),
    [
        (264, torch.bfloat16, None, 0.0),  # flash kernels end at 256
        (20, torch.bfloat16, None, 0.0),  # torch's varlen kernel wants whole eights
        (8, torch.bfloat16, SLOPES, 0.0),  # flex_attention begins at 16
        (64, torch.bfloat16, None, 0.1),
        (64, torch.float32, None, 0.0),
    ],
)
def test_what_no_kernel_takes_is_left_to_sdpa(
    size: int, dtype: torch.dtype, slopes: Tensor | None, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_flash(monkeypatch)
    q, k, v = draw(12, 4, 4, size, dtype)
    bias = None if slopes is None else Bias(slopes)
    assert cuda.attend(q, k, v, pack_of((7, 5)), scale=0.5, dropout=dropout, bias=bias) is None
