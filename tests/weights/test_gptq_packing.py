"""GPTQ's packing against a reference that writes bits one by one in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tuoling.weights.gptq_packing import (
    AWQ_ORDER,
    BITS,
    PackedLinear,
    dequantize_awq,
    groups_of,
    pack,
    pack_zeros,
    unpack,
    unpack_zeros,
    wrapped_zeros,
)

SIZES = (32, 64, 96, 172, 40, 7, 1)


def packed_bit_by_bit(fields: np.ndarray, bits: int) -> np.ndarray:
    """uint32 [ceil(K*b/32), N]: bit j of field i is bit i*b+j of a stream that is cut into words."""
    count, columns = fields.shape
    stream = np.zeros((-(-count * bits // 32) * 32, columns), dtype=np.uint8)
    for i in range(count):
        for j in range(bits):
            stream[i * bits + j] = (fields[i] >> j) & 1
    packed_bytes = np.packbits(stream, axis=0, bitorder="little")
    return np.ascontiguousarray(packed_bytes.T).view("<u4").T


def as_words(words: torch.Tensor) -> np.ndarray:
    return (
        words.numpy().view(np.uint32) if words.is_contiguous() else words.contiguous().numpy().view(np.uint32)
    )


def random_fields(count: int, columns: int, bits: int, seed: int = 0) -> torch.Tensor:
    made = np.random.default_rng(seed).integers(0, 1 << bits, (count, columns))
    return torch.from_numpy(made)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", SIZES)
def test_words_are_the_bit_stream(bits: int, count: int) -> None:
    fields = random_fields(count, 5, bits)
    words = pack(fields, bits)
    assert words.dtype == torch.int32
    np.testing.assert_array_equal(as_words(words), packed_bit_by_bit(fields.numpy(), bits))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", SIZES)
def test_unpacking_undoes_packing(bits: int, count: int) -> None:
    fields = random_fields(count, 5, bits)
    assert torch.equal(unpack(pack(fields, bits), bits, count), fields)


@pytest.mark.parametrize("bits", BITS)
def test_packing_undoes_unpacking(bits: int) -> None:
    words = torch.from_numpy(
        np.random.default_rng(1).integers(-(2**31), 2**31, (3 * 4, 6), dtype=np.int64).astype(np.int32)
    )
    assert torch.equal(pack(unpack(words, bits), bits), words)


def test_three_bit_fields_lie_across_words() -> None:
    """Field 10 has two bits in the first word and one in the second; field 21 one and two."""
    fields = torch.zeros(32, 1, dtype=torch.int64)
    fields[10], fields[21] = 0b101, 0b110
    words = as_words(pack(fields, 3))[:, 0]
    assert [int(word) for word in words] == [0b01 << 30, (0b1) | (0b0 << 31), 0b11]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("minus_one", [True, False])
def test_zeros_lie_along_the_outputs(bits: int, minus_one: bool) -> None:
    zero_GN = random_fields(3, 64, bits).clamp(min=1 if minus_one else 0)
    words = pack_zeros(zero_GN, bits, minus_one=minus_one)
    expected = packed_bit_by_bit((zero_GN - int(minus_one)).T.numpy(), bits).T
    np.testing.assert_array_equal(as_words(words), expected)
    assert torch.equal(unpack_zeros(words, bits, 64, minus_one=minus_one), zero_GN)


def test_a_zero_point_of_nought_is_not_kept_minus_one() -> None:
    zero_GN = torch.tensor([[8, 0, 7, 5, 3, 2, 1, 4]])
    with pytest.raises(ValueError, match="zero point of 0"):
        pack_zeros(zero_GN, 4, minus_one=True)
    assert torch.equal(unpack_zeros(pack_zeros(zero_GN, 4, minus_one=False), 4, 8, minus_one=False), zero_GN)


def wrapped_as_in_2023(zero_GN: np.ndarray, bits: int) -> np.ndarray:
    """What the old packers wrote: uint32(zero - 1) shifted and OR-ed into the word without a mask."""
    stored = (zero_GN.astype(np.int64) - 1).astype(np.uint32)
    words = np.zeros((len(zero_GN), zero_GN.shape[1] * bits // 32), dtype=np.uint32)
    for column in range(zero_GN.shape[1]):
        word, shift = divmod(column * bits, 32)
        words[:, word] |= stored[:, column] << np.uint32(shift)
        if shift + bits > 32:  # only the field's own upper bits go into the next word
            upper = (stored[:, column] >> np.uint32(32 - shift)) & np.uint32((1 << (shift + bits - 32)) - 1)
            words[:, word + 1] |= upper
    return words


def test_the_wrap_of_2023_is_found() -> None:
    zeros = np.array([[8, 0, 7, 5, 3, 2, 1, 4], [1, 2, 3, 4, 5, 6, 7, 0], [1, 2, 3, 4, 5, 6, 7, 8]])
    words = torch.from_numpy(wrapped_as_in_2023(zeros, 4).view(np.int32))
    fields = unpack(words.t(), 4).t()
    assert fields[0].tolist() == [7] + [15] * 7  # which readers of that time took for 8, 16, 16, ...
    nought, lost = wrapped_zeros(words, 4, 8)
    assert nought.nonzero().tolist() == [[0, 1], [1, 7]]  # the last of the second row hides nothing
    assert lost.nonzero().tolist() == [[0, n] for n in range(2, 8)]
    assert unpack_zeros(words, 4, 8, minus_one=True)[1].tolist() == zeros[1].tolist()


@pytest.mark.parametrize("bits", BITS)
def test_every_wrap_is_found_and_nothing_else(bits: int) -> None:
    """One zero point of 0 at each place; at 3 bits a field that lies across two words hides nothing and is read."""
    good = np.random.default_rng(2).integers(1, 1 << bits, (16, 32))
    good_words = torch.from_numpy(wrapped_as_in_2023(good, bits).view(np.int32))
    assert not any(mask.any() for mask in wrapped_zeros(good_words, bits, 32))
    for column in range(32):
        zeros = good.copy()
        zeros[:, column] = 0
        words = torch.from_numpy(wrapped_as_in_2023(zeros, bits).view(np.int32))
        word, shift = divmod(column * bits, 32)
        above = [i for i in range(column + 1, 32) if i * bits // 32 == word]
        across = shift + bits > 32
        nought, lost = wrapped_zeros(words, bits, 32)
        assert nought.all(0).nonzero().flatten().tolist() == ([] if across else [column])
        assert lost.all(0).nonzero().flatten().tolist() == ([] if across else above)
        assert int(nought.sum() + lost.sum()) == (0 if across else 16 * (1 + len(above)))
        if across or not above:
            assert torch.equal(unpack_zeros(words, bits, 32, minus_one=True), torch.from_numpy(zeros))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("ordered", [True, False])
def test_dequantised_weights(bits: int, ordered: bool) -> None:
    inputs, outputs, size = 96, 64, 32
    rng = np.random.default_rng(3)
    q_KN = rng.integers(0, 1 << bits, (inputs, outputs))
    zero_GN = rng.integers(1, 1 << bits, (3, outputs))
    scale_GN = rng.random((3, outputs)).astype(np.float32)
    g_idx = np.arange(inputs) // size if ordered else rng.permutation(np.arange(inputs) // size)
    layer = PackedLinear(
        pack(torch.from_numpy(q_KN), bits),
        pack_zeros(torch.from_numpy(zero_GN), bits, minus_one=True),
        torch.from_numpy(scale_GN),
        torch.from_numpy(g_idx),
        bits,
    )
    expected = np.empty((inputs, outputs))
    for k in range(inputs):
        for n in range(outputs):
            expected[k, n] = float(scale_GN[g_idx[k], n]) * (q_KN[k, n] - zero_GN[g_idx[k], n])
    np.testing.assert_allclose(layer.dequantize().numpy(), expected, rtol=1e-6)


def test_one_group_is_all_inputs() -> None:
    assert groups_of(5, -1).tolist() == [0] * 5
    assert groups_of(5, 2).tolist() == [0, 0, 1, 1, 2]


def test_awq_fields_are_interleaved() -> None:
    """Packed as AWQ does it: nibble i of a word is column AWQ_ORDER[i]."""
    rng = np.random.default_rng(4)
    q_KN, zero_GN = rng.integers(0, 16, (8, 16)), rng.integers(0, 16, (2, 16))
    scale_GN = rng.random((2, 16)).astype(np.float32)

    def packed(values: np.ndarray) -> torch.Tensor:
        words = np.zeros((len(values), values.shape[1] // 8), dtype=np.uint32)
        for word in range(words.shape[1]):
            for nibble, column in enumerate(AWQ_ORDER):
                words[:, word] |= values[:, word * 8 + column].astype(np.uint32) << np.uint32(4 * nibble)
        return torch.from_numpy(words.view(np.int32))

    found = dequantize_awq(packed(q_KN), packed(zero_GN), torch.from_numpy(scale_GN))
    groups = np.arange(8) // 4
    np.testing.assert_allclose(found.numpy(), scale_GN[groups] * (q_KN - zero_GN[groups]), rtol=1e-6)
