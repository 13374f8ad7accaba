"""Where the keys and values of answers lie: only what was written takes memory, and nothing is lost when slots grow."""

from __future__ import annotations

import psutil
import torch

from tuoling.kernels.decode import START, SlotCache


def resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def test_pages_nobody_wrote_to_take_no_memory_and_are_zero() -> None:
    new = torch.randn(5, 16, 64)
    slots, before = 64, resident_bytes()
    cache = SlotCache(slots)
    cache.reserve(5, 1)
    for _ in range(2):  # memory that comes back from a rest is not written either
        keys, values = cache.layer(0, new, new)
        assert keys.shape == (slots, 16, START, 64) and keys.dtype == torch.float32
        keys[0, :, :5] = new.transpose(0, 1)
        assert resident_bytes() - before < keys.nbytes / 8
        assert not bool(keys[0, :, 5:].any()) and not bool(values[0].any())
        cache.free()
        del keys, values


def test_slots_that_grow_keep_what_is_in_them() -> None:
    cache, new = SlotCache(4), torch.randn(1, 2, 8)
    cache.reserve(1, 1)
    keys, _ = cache.layer(0, new, new)
    keys[0, :, 0] = new[0]
    cache.copy(0, 2, 1)
    cache.reserve(START + 1, 1)
    grown, _ = cache.layer(0, new, new)
    assert grown.shape[2] > START
    assert torch.equal(grown[0, :, 0], new[0]) and torch.equal(grown[2, :, 0], new[0])
    assert not bool(grown[1].any()) and not bool(grown[0, :, 1:].any())
