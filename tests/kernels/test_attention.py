from __future__ import annotations

import itertools

import pytest
import torch
from tests.devices import DEVICES

from tuoling.kernels import attention, interface
from tuoling.kernels.attention import Bias, Pack, Unpackable, attend, reference_attention

SLOPES = torch.tensor([0.5, 0.25, 0.0625, 2**-8])


def pack_of(lengths: tuple[int, ...], device: str = "cpu") -> Pack:
    return Pack.of(torch.tensor([0, *lengths], device=device).cumsum(0).int())


def draw(
    tokens: int, heads: int, keys: int, size: int = 8, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((tokens, heads, size), (tokens, keys, size), (tokens, keys, size))
    return [torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(1,), (9,), (3, 1, 1, 7), (2,) * 40, (30, 5, 29, 1, 61)])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("slopes", [None, SLOPES])
@pytest.mark.parametrize("keys", [4, 2, 1])
@pytest.mark.parametrize("merge", [0, 2**21])
@pytest.mark.parametrize("query_rows", [8, 512])
@pytest.mark.parametrize("device", DEVICES)
def test_equals_one_dense_masked_softmax(
    lengths: tuple[int, ...],
    window: int | None,
    slopes: torch.Tensor | None,
    keys: int,
    merge: int,
    query_rows: int,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Documents alone and in groups, grouped heads, blocks of queries, ALiBi, a window: all the same sums."""
    monkeypatch.setattr(attention, "MERGE_WORK", merge)
    monkeypatch.setattr(attention, "QUERY_ROWS", query_rows)
    q, k, v = draw(sum(lengths), 4, keys)
    bias = None if window is None and slopes is None else Bias(slopes, window)
    there = (x.to(device) for x in (q, k, v))
    ours = attend(*there, pack_of(lengths, device), scale=0.3, bias=bias).cpu()
    expected = reference_attention(q, k, v, lengths, scale=0.3, window=window, slopes_N=slopes)
    torch.testing.assert_close(ours.double(), expected, rtol=2e-5, atol=2e-6)
    weights = torch.linspace(-1, 1, ours.numel()).view_as(ours)
    mine = torch.autograd.grad((ours * weights).sum(), [q, k, v])
    true = torch.autograd.grad((expected * weights).sum(), [q, k, v])
    for a, b in zip(mine, true, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-6


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("slopes", [None, SLOPES])
@pytest.mark.parametrize("keys", [4, 2])
@pytest.mark.parametrize("query_rows", [64, 512])
def test_bf16_is_computed_in_float32_and_kept_in_bf16(
    window: int | None,
    slopes: torch.Tensor | None,
    keys: int,
    query_rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "QUERY_ROWS", query_rows)
    lengths = (130, 100, 130)
    q, k, v = draw(sum(lengths), 4, keys, 16, torch.bfloat16)
    bias = None if window is None and slopes is None else Bias(slopes, window)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        ours = attend(q, k, v, pack_of(lengths), scale=0.3, bias=bias)
    assert {x.dtype for x in kept if x.is_floating_point() and x.shape[-1] == 16} == {torch.bfloat16}
    expected = reference_attention(q, k, v, lengths, scale=0.3, window=window, slopes_N=slopes)
    assert (ours.double() - expected).norm() <= 2.5e-3 * expected.norm()  # one rounding to bf16
    weights = torch.linspace(-1, 1, ours.numel()).view_as(ours)
    mine = torch.autograd.grad((ours * weights.bfloat16()).sum(), [q, k, v])
    true = torch.autograd.grad((expected * weights).sum(), [q, k, v])
    for a, b in zip(mine, true, strict=True):
        assert (a.double() - b.double()).norm() <= 6e-3 * b.double().norm()


def test_short_documents_share_a_launch_and_long_ones_do_not() -> None:
    layout = pack_of((400, 12, 30, 7)).layout(512)
    assert [(group.count, group.length) for group in layout.groups] == [(1, 400), (3, 30)]
    assert layout.slots is not None and len(set(layout.slots.tolist())) == 449
    assert pack_of((400, 200)).layout(512).slots is None


def test_documents_without_tokens_are_left_out() -> None:
    assert Pack.of(torch.tensor([0, 3, 3, 5])).lengths == (3, 2)


@pytest.mark.slow
def test_alibi_is_right_in_bf16_far_into_a_row() -> None:
    """slope x absolute position in bf16 is wrong by 0.75 at 512: the last document must not feel its offset."""
    lengths = (700, 700, 40)
    q, k, v = draw(sum(lengths), 4, 4, 16, torch.bfloat16)
    ours = attend(q, k, v, pack_of(lengths), scale=0.25, bias=Bias(SLOPES))[-40:]
    alone = attend(q[-40:], k[-40:], v[-40:], pack_of((40,)), scale=0.25, bias=Bias(SLOPES))
    assert torch.equal(ours, alone)
    exact = reference_attention(q, k, v, lengths, scale=0.25, slopes_N=SLOPES)
    whole = attend(q, k, v, pack_of(lengths), scale=0.25, bias=Bias(SLOPES))
    assert (whole.double() - exact).norm() <= 4e-3 * exact.norm()  # bf16's own rounding, 2**-8


def test_the_bias_stays_float32_under_autocast() -> None:
    q, k, v = draw(300, 4, 4, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = attend(q, k, v, pack_of((300,)), scale=0.25, bias=Bias(SLOPES))
    by_hand = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), pack_of((300,)), scale=0.25, bias=Bias(SLOPES))
    assert ours.dtype == torch.bfloat16 and torch.equal(ours, by_hand)


def test_a_bias_is_a_strip_and_grows() -> None:
    bias, like = Bias(SLOPES), torch.zeros(1)
    small = bias.strip(3, 5, like)
    assert small.shape == (1, 4, 3, 5)
    assert small[0, 0].tolist()[0] == [-1.0, -0.5, 0.0, float("-inf"), float("-inf")]
    assert bias.strip(attention.QUERY_ROWS, 2048, like).shape == (1, 4, 512, 2048)
    assert torch.equal(bias.strip(3, 5, like), small)
    far = bias.strip(1, 2048, like.bfloat16())
    assert far.dtype == torch.float32 and far[0, :, 0, 0].tolist() == (-SLOPES * 2047).tolist()


def test_a_part_of_the_strip_begins_where_a_gpu_can_read_it() -> None:
    """The memory-efficient kernel stops at a pointer between two of its words; `meta` stands for any other device."""
    bias, like = Bias(SLOPES), torch.zeros(1, dtype=torch.bfloat16, device="meta")
    bias.strip(64, 512, like)
    for rows, keys in itertools.product(range(1, 64, 7), range(64, 512, 3)):
        part = bias.strip(rows, keys, like)
        assert part.shape == (1, 4, rows, keys)
        assert part.storage_offset() * part.element_size() % 16 == 0
    whole = bias.strip(64, 512, like)
    assert whole.untyped_storage()._cdata == bias.strip(64, 504, like).untyped_storage()._cdata


@pytest.mark.parametrize(
    "rule, window",
    [
        (lambda q, k: k <= q, None),
        (lambda q, k: (k <= q) & (k > q - 4), 4),
        (lambda q, k: (k <= q) & (k > q - 400), None),
    ],
)
@pytest.mark.parametrize("device", DEVICES)
def test_the_window_is_read_off_transformers_mask(rule: object, window: int | None, device: str) -> None:
    pack = pack_of((5, 11, 3), device)
    found = interface._window_of(lambda b, h, q, k: rule(q, k), pack, torch.device(device))
    assert found == window


@pytest.mark.parametrize(
    "rule",
    [
        lambda q, k: k >= 0,  # both directions
        lambda q, k: (k <= q) & (k // 4 == q // 4),  # chunks
        lambda q, k: (k <= q) & (k % 2 == 0),  # holes
    ],
)
def test_any_other_mask_is_refused(rule: object) -> None:
    with pytest.raises(Unpackable):
        interface._window_of(lambda b, h, q, k: rule(q, k), pack_of((5, 11, 3)), torch.device("cpu"))
