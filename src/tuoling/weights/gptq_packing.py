"""GPTQ's integers in 32-bit words: packed, unpacked, and multiplied out. Widths 2, 3, 4 and 8.

Weights lie along K (inputs), zero points along N (outputs), as one little-endian bit stream: field i of b bits begins
at bit i*b. At 3 bits 32 fields fill three words, and fields 10 and 21 lie across two of them. Shapes: K inputs,
N outputs, G groups of inputs that share a scale and a zero point.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

BITS = (2, 3, 4, 8)
_WORD = 32
_MASK = (1 << _WORD) - 1

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Field i of an AWQ word holds column AWQ_ORDER[i] of the eight that share the word."""


def pack(fields: Tensor, bits: int) -> Tensor:
    """int32 words [ceil(K*b/32), N] of integers [K, N] from 0 to 2^b-1, along the first axis."""
    per_block, words_per_block = _block(bits)
    count, columns = fields.shape
    blocks = -(-count // per_block)
    padded = torch.zeros(blocks * per_block, columns, dtype=torch.int64, device=fields.device)
    padded[:count] = fields
    field_BFN = padded.view(blocks, per_block, columns)
    word_BWN = torch.zeros(blocks, words_per_block, columns, dtype=torch.int64, device=fields.device)
    for i in range(per_block):
        word, shift = divmod(i * bits, _WORD)
        word_BWN[:, word] |= (field_BFN[:, i] << shift) & _MASK
        if shift + bits > _WORD:
            word_BWN[:, word + 1] |= field_BFN[:, i] >> (_WORD - shift)
    words = word_BWN.view(-1, columns)[: -(-count * bits // _WORD)]
    return (words - ((words >> 31) << _WORD)).to(torch.int32)  # the upper half of 32 bits is negative


def unpack(words: Tensor, bits: int, count: int | None = None) -> Tensor:
    """The opposite: int64 [K, N], the first `count` fields (None: all whole ones)."""
    per_block, words_per_block = _block(bits)
    rows, columns = words.shape
    whole = rows * _WORD // bits if count is None else count
    blocks = -(-rows // words_per_block)
    padded = torch.zeros(blocks * words_per_block, columns, dtype=torch.int64, device=words.device)
    padded[:rows] = words.to(torch.int64) & _MASK
    word_BWN = padded.view(blocks, words_per_block, columns)
    field_BFN = torch.empty(blocks, per_block, columns, dtype=torch.int64, device=words.device)
    for i in range(per_block):
        word, shift = divmod(i * bits, _WORD)
        value = word_BWN[:, word] >> shift
        if shift + bits > _WORD:
            value |= word_BWN[:, word + 1] << (_WORD - shift)
        field_BFN[:, i] = value & ((1 << bits) - 1)
    return field_BFN.view(-1, columns)[:whole]


def _block(bits: int) -> tuple[int, int]:
    """Fields and words of the smallest whole block: 32 in 3 at 3 bits, 8 in 1 at 4."""
    if bits not in BITS:
        raise ValueError(f"{bits} bits")
    shared = gcd(bits, _WORD)
    return _WORD // shared, bits // shared


def pack_zeros(zero_GN: Tensor, bits: int, *, minus_one: bool) -> Tensor:
    """int32 words [G, ceil(N*b/32)] of zero points 0 to 2^b-1.

    minus_one: as files have it whose config says `gptq`; those that say `gptq_v2` hold them as they are. A zero point
    of 0 has no place in the first: 2023's packers let its -1 run over the rest of the word.
    """
    if minus_one and int(zero_GN.min()) < 1:
        raise ValueError("a zero point of 0 cannot be kept minus one")
    return pack((zero_GN - int(minus_one)).t(), bits).t().contiguous()


def unpack_zeros(words_GW: Tensor, bits: int, count: int, *, minus_one: bool) -> Tensor:
    """int64 zero points [G, N].

    minus_one: 1 is added as gptqmodel does it: at 2, 4 and 8 bits to whole words, so that what its own packer borrowed
    from the next field comes back; at 3 bits to each field by itself.
    """
    words = words_GW.t()
    if minus_one and bits != 3:
        ones = sum(1 << shift for shift in range(0, _WORD, bits))
        words = (words.to(torch.int64) + ones) & _MASK
    zero_NG = unpack(words, bits, count)
    if minus_one and bits == 3:
        zero_NG = (zero_NG + 1) & 7
    return zero_NG.t()


def wrapped_zeros(words_GW: Tensor, bits: int, count: int) -> tuple[Tensor, Tensor]:
    """Zero points that the packers of 2023 wrote wrong, bool [G, N] each: certainly 0; lost.

    They put zero-1 into the word without masking it: for a zero point of 0 every bit of the word from its field
    upwards is set. A field of all ones would otherwise mean a zero point of 2^b, which no quantiser makes. So the
    lowest field from which a word has nothing but ones was 0, and what the fields above it were is gone.
    """
    groups = len(words_GW)
    nought_GN = torch.zeros(groups, count, dtype=torch.bool)
    lost_GN = torch.zeros(groups, count, dtype=torch.bool)
    words = words_GW.to(torch.int64) & _MASK
    below = [0] * words.shape[1]  # the first field of each word
    for column in reversed(range(count)):
        word, shift = divmod(column * bits, _WORD)
        below[word] = column
        if shift + bits > _WORD:
            continue
        ones_G = words[:, word] >> shift == (1 << (_WORD - shift)) - 1
        nought_GN[ones_G, column] = True
    for word, first in enumerate(below):
        end = below[word + 1] if word + 1 < len(below) else count
        in_word = nought_GN[:, first:end]
        lost_GN[:, first:end] = in_word.cumsum(1) - in_word.to(torch.int64) > 0
    nought_GN &= ~lost_GN
    return nought_GN, lost_GN


@dataclass(frozen=True)
class PackedLinear:
    """One quantised linear layer: qweight int32 [ceil(K*b/32), N], qzeros int32 [G, ceil(N*b/32)], scales [G, N].

    g_idx: group of each input, int [K]. minus_one: how zero points are kept (`pack_zeros`).
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor
    bits: int
    minus_one: bool = True

    def dequantize(self) -> Tensor:
        """float32 [K, N]: scales[g] * (q - zero[g])."""
        inputs, outputs = len(self.g_idx), self.scales.shape[1]
        q_KN = unpack(self.qweight, self.bits, inputs)
        zero_GN = unpack_zeros(self.qzeros, self.bits, outputs, minus_one=self.minus_one)
        group_K = self.g_idx.to(torch.int64)
        return self.scales.float()[group_K] * (q_KN - zero_GN[group_K])


def groups_of(inputs: int, group_size: int) -> Tensor:
    """g_idx where inputs lie in their own order: int32 [K]; group size -1 is one group."""
    size = inputs if group_size == -1 else group_size
    return torch.arange(inputs, dtype=torch.int32) // size


def dequantize_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """float32 [K, N] of AWQ's 4-bit layout: qweight int32 [K, N/8], qzeros [G, N/8], both along N in `AWQ_ORDER`."""
    q_KN, zero_GN = (_unpack_awq(words) for words in (qweight, qzeros))
    group_K = torch.arange(len(q_KN)) // (len(q_KN) // len(zero_GN))
    return scales.float()[group_K] * (q_KN - zero_GN[group_K])


def _unpack_awq(words: Tensor) -> Tensor:
    fields = unpack(words.t(), 4).t().view(len(words), -1, len(AWQ_ORDER))
    ordered = torch.empty_like(fields)
    ordered[..., list(AWQ_ORDER)] = fields
    return ordered.reshape(len(words), -1)
