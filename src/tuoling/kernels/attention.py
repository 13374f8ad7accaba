"""Attention over a pack: many documents in one row of tokens, each seeing only its own past.

Shapes: T tokens of the pack, N query heads, K key heads, D head size, L tokens of one document.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuoling.kernels.flash_float32 import flash_in_float32
from tuoling.kernels.short_attention import LONGEST, short_attention

QUERY_ROWS = 512
"""Longer documents meet a bias in blocks of this many queries: 16 heads x 512 x 2,048 x 4 B = 67 MB instead
of 268 MB for the square, and half of the work (keys after a block are never touched)."""
FLOAT32_BELOW = 320
"""Shorter documents are attended to in float32 on a CPU: torch's bf16 backward there costs 15 ms where float32
costs 4 ms with its casts (48 documents of 20 tokens). Steps of LLaMA rows of 55 to 617 tokens took 4.5 s of CPU time
with 300, 4.6 with 192, 4.9 with 97 and with 512."""
ALIGNED_BYTES = 16
"""torch's memory-efficient kernel on a GPU reads so many bytes of a mask at once. It pads a mask whose rows are of
another length, and stops at an error where the first one does not begin at a multiple."""
MERGE_WORK = 2**21
"""Padding of (L_max^2 - L^2) x N x D up to this costs less than one more kernel launch (measured on a CPU)."""


class Unpackable(Exception):
    """This attention cannot be computed document by document; the message says why."""


@dataclass(frozen=True, slots=True)
class Group:
    """Documents computed together: `count` of them, each padded on the right to `length` tokens."""

    count: int
    length: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Documents put into groups. `slots` [T]: where each token lies among the padded ones; None: as they lie."""

    groups: tuple[Group, ...]
    slots: Tensor | None

    @property
    def padded(self) -> int:
        return sum(group.count * group.length for group in self.groups)


@dataclass(eq=False)
class Pack:
    """Lengths of the documents that lie one after the other in a row of T tokens.

    readable: False where tensors have shapes and no numbers (memory is being estimated), so that nothing can be
    read off a mask. head: above 0, the first document has so many tokens, and the others each go on after it, the
    longest of them first (so that one whole document lies in one piece, where a model's mask can be read off it).
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    readable: bool = True
    head: int = 0
    _layouts: dict[int, Layout] = field(default_factory=dict)

    @staticmethod
    def of(cu_seqlens: Tensor, head: int = 0) -> Pack:
        """From [B+1] offsets, the first 0 and the last T. Documents without tokens are left out."""
        ends = cu_seqlens.tolist()
        lengths = tuple(b - a for a, b in itertools.pairwise(ends) if b > a)
        return Pack(lengths, cu_seqlens, head=head)

    @functools.cached_property
    def parts(self) -> tuple[Pack, Pack]:
        """The head alone, and what follows it."""
        return (
            Pack(self.lengths[:1], self.cu_seqlens[:2], self.readable),
            Pack(self.lengths[1:], self.cu_seqlens[1:] - self.head, self.readable),
        )

    @property
    def device(self) -> torch.device:
        """Where the offsets lie."""
        return self.cu_seqlens.device

    @property
    def longest(self) -> int:
        """Tokens of the longest document, the head's among them."""
        return self.head + self.lengths[1] if self.head else max(self.lengths)

    def attend(
        self,
        layer: nn.Module,
        q_TND: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        *,
        scale: float,
        dropout: float = 0.0,
        bias: Bias | None = None,
        window: int | None = None,
    ) -> Tensor:
        """`attend` over this pack; every layer's alike. window: what the layer says of itself; the bias has it."""
        return attend(q_TND, k_TKD, v_TKD, self, scale=scale, dropout=dropout, bias=bias)

    def layout(self, width: int) -> Layout:
        """Groups for heads of `width` = N x D numbers: short documents share a launch, long ones go alone.

        Padding lies to the right of every real token, so a causal mask hides it.
        """
        if width not in self._layouts:
            self._layouts[width] = _make_layout(self.lengths, width, self.cu_seqlens.device)
        return self._layouts[width]


def _make_layout(lengths: tuple[int, ...], width: int, device: torch.device) -> Layout:
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    members: list[list[int]] = []
    for i in order:
        if members and (lengths[members[-1][0]] ** 2 - lengths[i] ** 2) * width <= MERGE_WORK:
            members[-1].append(i)
        else:
            members.append([i])
    if all(len(group) == 1 for group in members):
        return Layout(tuple(Group(1, length) for length in lengths), None)
    place, offset = [0] * len(lengths), 0
    for group in members:
        for i in group:
            place[i] = offset
            offset += lengths[group[0]]
    slots = torch.cat([torch.arange(start, start + n) for start, n in zip(place, lengths, strict=True)])
    return Layout(tuple(Group(len(g), lengths[g[0]]) for g in members), slots.to(device))


class Bias:
    """What is added to the scores of the last rows of a causal square: -slope x distance, -inf where hidden.

    Only distances matter, so one strip [N or 1, rows, keys], aligned at its lower right corner, serves every
    document and every block of queries that fits into it. Float32: slope x position in bf16 would be wrong by
    1.75 at offset 4,096. It grows when a longer document comes and never asks for a gradient (the CPU's flash
    kernel would fall back to plain matmuls).
    """

    def __init__(self, slopes_N: Tensor | None = None, window: int | None = None) -> None:
        self.slopes_N = slopes_N
        self.window = window
        self._strip: Tensor | None = None

    def strip(self, rows: int, keys: int, like: Tensor) -> Tensor:
        """[1, N or 1, rows, keys] for the last `rows` queries of `keys` tokens, on the device of `like`.

        On a GPU a part of the strip that begins between two of its kernels' words is copied to where one begins.
        """
        have = self._strip
        dtype = torch.float32 if like.device.type == "cpu" else like.dtype
        if (
            have is None
            or have.shape[2] < rows
            or have.shape[3] < keys
            or have.device != like.device
            or have.dtype != dtype
        ):
            have = self._strip = self._build(keys, like.device).to(dtype)
        part = have[:, :, have.shape[2] - rows :, have.shape[3] - keys :]
        misplaced = like.device.type != "cpu" and part.storage_offset() * part.element_size() % ALIGNED_BYTES
        return part.clone(memory_format=torch.contiguous_format) if misplaced else part

    def _build(self, keys: int, device: torch.device) -> Tensor:
        rows = min(QUERY_ROWS, keys)
        at = torch.arange(keys, device=device)
        distance = at[keys - rows :, None] - at[None, :]
        hidden = distance < 0
        if self.window is not None:
            hidden |= distance >= self.window
        slopes_N = (
            torch.zeros(1, device=device) if self.slopes_N is None else self.slopes_N.to(device).float()
        )
        return (-slopes_N[:, None, None] * distance).masked_fill_(hidden, float("-inf")).unsqueeze(0)


_CAUSAL = Bias()
"""Nothing but that later tokens are hidden, for documents that go on after a head."""


def attend(
    q_TND: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    pack: Pack,
    *,
    scale: float,
    dropout: float = 0.0,
    bias: Bias | None = None,
) -> Tensor:
    """Causal attention inside each document of the pack: [T, N, D of v]. `bias`: ALiBi and/or a sliding window."""
    device = q_TND.device.type
    if torch.is_autocast_enabled(device):
        # Autocast would round the float32 bias with the rest: cast what it would cast, and leave the bias alone.
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            q_TND, k_TKD, v_TKD = q_TND.to(dtype), k_TKD.to(dtype), v_TKD.to(dtype)
            return attend(q_TND, k_TKD, v_TKD, pack, scale=scale, dropout=dropout, bias=bias)
    if pack.head:
        alone, rest = pack.parts
        q_head, k_head, v_head = (x[: pack.head] for x in (q_TND, k_TKD, v_TKD))
        q, k, v = (x[pack.head :] for x in (q_TND, k_TKD, v_TKD))
        before = attend(q_head, k_head, v_head, alone, scale=scale, dropout=dropout, bias=bias)
        after = _attend_documents(
            q, k, v, rest, scale=scale, dropout=dropout, bias=bias, head=(k_head, v_head)
        )
        return torch.cat([before, after])
    if q_TND.is_cuda:
        from tuoling.kernels import cuda

        done = cuda.attend(q_TND, k_TKD, v_TKD, pack, scale=scale, dropout=dropout, bias=bias)
        if done is not None:
            return done
    return _attend_documents(q_TND, k_TKD, v_TKD, pack, scale=scale, dropout=dropout, bias=bias)


def _attend_documents(
    q_TND: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    pack: Pack,
    *,
    scale: float,
    dropout: float,
    bias: Bias | None,
    head: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Group by group. head: keys and values [H, K, D] that every document has before its own."""
    layout = pack.layout(q_TND.shape[1] * q_TND.shape[2])
    if layout.slots is not None:
        q_TND, k_TKD, v_TKD = (_Spread.apply(x, layout.slots, layout.padded) for x in (q_TND, k_TKD, v_TKD))
    sizes = [group.count * group.length for group in layout.groups]
    outputs = []
    for group, q, k, v in zip(
        layout.groups, q_TND.split(sizes), k_TKD.split(sizes), v_TKD.split(sizes), strict=True
    ):
        q, k, v = (x.unflatten(0, (group.count, group.length)).transpose(1, 2) for x in (q, k, v))
        if head is not None:
            k, v = (
                torch.cat([x.transpose(0, 1).expand(group.count, -1, -1, -1), own], dim=2)
                for x, own in zip(head, (k, v), strict=True)
            )
        out = attend_last(q, k, v, scale=scale, dropout=dropout, bias=bias)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    out_TND = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if layout.slots is None:
        return out_TND
    gathered: Tensor = _Collect.apply(out_TND, layout.slots)
    return gathered


def attend_last(
    q_BNLD: Tensor,
    k_BKLD: Tensor,
    v_BKLD: Tensor,
    *,
    scale: float,
    dropout: float = 0.0,
    bias: Bias | None = None,
) -> Tensor:
    """Causal attention of B documents of one length; a bias longer than QUERY_ROWS is met in blocks.

    The queries are the last ones: with more keys than queries the first keys lie before all of them.
    """
    length, keys = q_BNLD.shape[2], k_BKLD.shape[2]
    options: dict[str, Any] = {
        "scale": scale,
        "dropout_p": dropout,
        "enable_gqa": q_BNLD.shape[1] != k_BKLD.shape[1],
    }
    window = None if bias is None else bias.window
    on_cpu = q_BNLD.device.type == "cpu"
    in_float32 = on_cpu and length < FLOAT32_BELOW and q_BNLD.dtype == torch.bfloat16
    short = on_cpu and keys <= min(LONGEST, QUERY_ROWS) and dropout == 0.0
    if in_float32 and (short or dropout > 0.0 or q_BNLD.shape[-1] != v_BKLD.shape[-1]):
        q, k, v = q_BNLD.float(), k_BKLD.float(), v_BKLD.float()
        return attend_last(q, k, v, scale=scale, dropout=dropout, bias=bias).to(q_BNLD.dtype)
    if bias is None and keys > length:
        bias = _CAUSAL
    plain = keys == length and (
        bias is None or (bias.slopes_N is None and (window is None or length <= window))
    )
    if short:
        repeat = q_BNLD.shape[1] // k_BKLD.shape[1]
        if repeat > 1:
            k_BKLD, v_BKLD = (x.repeat_interleave(repeat, dim=1) for x in (k_BKLD, v_BKLD))
        if bias is None:
            square = torch.full((1, 1, length, length), float("-inf"), dtype=q_BNLD.dtype).triu_(1)
        else:
            square = bias.strip(length, keys, q_BNLD).to(q_BNLD.dtype)
        return short_attention(q_BNLD, k_BKLD, v_BKLD, square, scale)

    def whole(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if in_float32:
            return flash_in_float32(q, k, v, bias=mask, scale=scale)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, **options)

    if plain:
        return whole(q_BNLD, k_BKLD, v_BKLD, None)
    assert bias is not None
    bias.strip(min(length, QUERY_ROWS), keys, q_BNLD)  # grow once, for the longest
    blocks = []
    starts = range(keys - length, keys, QUERY_ROWS)
    for start, q in zip(starts, q_BNLD.split(QUERY_ROWS, dim=2), strict=True):
        end = start + q.shape[2]
        first = 0 if window is None else max(0, start - window + 1)
        mask = bias.strip(q.shape[2], end - first, q)
        k, v = k_BKLD[:, :, first:end], v_BKLD[:, :, first:end]
        blocks.append(whole(q, k, v, mask))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)


class _Spread(torch.autograd.Function):
    """Tokens to their padded places, zeros elsewhere. (index_select's own backward adds up one by one.)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor, padded: int) -> Tensor:
        ctx.save_for_backward(slots)
        return x.new_zeros(padded, *x.shape[1:]).index_copy_(0, slots, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slots,) = ctx.saved_tensors
        return grad.index_select(0, slots), None, None


class _Collect(torch.autograd.Function):
    """Tokens back from their padded places: the opposite of _Spread."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.padded = x.shape[0]
        return x.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (slots,) = ctx.saved_tensors
        return grad.new_zeros(ctx.padded, *grad.shape[1:]).index_copy_(0, slots, grad), None


def reference_attention(
    q_TND: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    lengths: tuple[int, ...],
    *,
    scale: float,
    window: int | None = None,
    slopes_N: Tensor | None = None,
) -> Tensor:
    """The same, plainly: one dense masked softmax over all T tokens in float64."""
    repeat = q_TND.shape[1] // k_TKD.shape[1]
    q, k, v = (
        q_TND.double(),
        k_TKD.double().repeat_interleave(repeat, 1),
        v_TKD.double().repeat_interleave(repeat, 1),
    )
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    at = torch.arange(len(document))
    distance = at[:, None] - at[None, :]
    seen = (document[:, None] == document[None, :]) & (distance >= 0)
    if window is not None:
        seen &= distance < window
    scores = torch.einsum("tnd,snd->nts", q, k) * scale
    if slopes_N is not None:
        scores = scores - slopes_N.double()[:, None, None] * distance
    probabilities = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("nts,snd->tnd", probabilities, v)
