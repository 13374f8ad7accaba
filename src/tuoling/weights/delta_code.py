"""What turns one run of numbers into another, in few bytes: bit patterns subtracted, byte planes deflated.

Two weights that differ a little have bit patterns that differ by a small integer, whatever the number type: the next
larger float is the next larger integer. So the difference (modulo 2^bits: exact for every pattern, NaN too), with its
sign moved to the lowest bit, has upper bytes that are nearly always zero. The bytes of one rank make a plane, and each
plane is deflated alone; only runs and byte frequencies are used (Z_RLE), since numbers do not repeat as text does.

Measured on weights of spread 0.02 that noise of 2e-4 was added to: 29 % of the size in bf16, 50 % in fp16, 65 % in
fp32. XOR in place of the difference: 34, 54 and 67 %; deflate's level 6: 33, 50 and 67 %, at a fifth of the speed.
"""

from __future__ import annotations

import zlib

import numpy as np

CHUNK_BYTES = 4 << 20
"""Coded at once. A multiple of every item's size, so that a number never lies in two chunks."""

_LENGTH_BYTES = 4


class DamagedCode(Exception):
    """The bytes are not what `encode` wrote."""


def encode(target: np.ndarray, base: np.ndarray | None, item_bytes: int) -> bytes:
    """Code `target` (uint8) against as many bytes of base, or alone.

    A plane is its length in 4 bytes and a raw deflate stream; the length 0 stands for a plane of zeros.
    """
    numbers = _numbers(target, item_bytes)
    if base is not None:
        numbers = _sign_last(numbers - _numbers(base, item_bytes), item_bytes)
    rows = numbers.view(np.uint8).reshape(-1, item_bytes)
    out = []
    for rank in range(item_bytes):
        plane = np.ascontiguousarray(rows[:, rank])
        code = b""
        if plane.any():
            deflate = zlib.compressobj(1, zlib.DEFLATED, -15, 9, zlib.Z_RLE)
            code = deflate.compress(plane.data) + deflate.flush()
        out += [len(code).to_bytes(_LENGTH_BYTES, "little"), code]
    return b"".join(out)


def decode(code: memoryview, base: np.ndarray | None, size_bytes: int, item_bytes: int) -> np.ndarray:
    """The `size_bytes` (uint8) that were coded. Raises DamagedCode."""
    rows = np.zeros((size_bytes // item_bytes, item_bytes), np.uint8)
    place = 0
    for rank in range(item_bytes):
        end = place + _LENGTH_BYTES
        place = end + int.from_bytes(code[end - _LENGTH_BYTES : end], "little")
        if place > len(code):
            raise DamagedCode
        if place > end:
            rows[:, rank] = _inflate(code[end:place], len(rows))
    numbers = _numbers(rows.reshape(-1), item_bytes)
    if base is not None:
        numbers = _numbers(base, item_bytes) + _sign_first(numbers, item_bytes)
    return numbers.view(np.uint8)


def split_codes(code: memoryview, count: int, item_bytes: int) -> list[memoryview]:
    """The codes of `count` chunks that lie one after another. Raises DamagedCode."""
    codes = []
    place = 0
    for _ in range(count):
        start = place
        for _ in range(item_bytes):
            place += _LENGTH_BYTES + int.from_bytes(code[place : place + _LENGTH_BYTES], "little")
        codes.append(code[start:place])
    if place != len(code):
        raise DamagedCode
    return codes


def _inflate(code: memoryview, size_bytes: int) -> np.ndarray:
    """One plane; never more than its size, whatever the stream says."""
    inflate = zlib.decompressobj(-15)
    try:
        plane = inflate.decompress(code, size_bytes)
    except zlib.error as error:
        raise DamagedCode from error
    if len(plane) != size_bytes:
        raise DamagedCode
    return np.frombuffer(plane, np.uint8)


def _numbers(data: np.ndarray, item_bytes: int) -> np.ndarray:
    """Bytes as unsigned integers of one item each. Bytes that do not begin at a multiple of it are copied."""
    if data.ctypes.data % item_bytes:
        data = data.copy()
    return data.view(f"<u{item_bytes}")


def _sign_last(difference: np.ndarray, item_bytes: int) -> np.ndarray:
    """0, -1, 1, -2, ... as 0, 1, 2, 3, ..."""
    signed = difference.view(f"<i{item_bytes}")
    coded: np.ndarray = (signed << 1) ^ (signed >> (8 * item_bytes - 1))
    return coded.view(f"<u{item_bytes}")


def _sign_first(coded: np.ndarray, item_bytes: int) -> np.ndarray:
    """`_sign_last` undone."""
    low = (coded & np.array(1, coded.dtype)).view(f"<i{item_bytes}")
    return (coded >> np.array(1, coded.dtype)) ^ (-low).view(f"<u{item_bytes}")
