"""GGUF files of versions 1, 2 and 3, read without llama.cpp: metadata, and tensors one by one.

Version 1 (August 2023) counts in 32 bits where later ones count in 64; today's readers refuse it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tuoling.language import tr
from tuoling.weights.binary import BinaryReader
from tuoling.weights.tensors import TensorInfo

MAGIC = b"GGUF"

STRING, ARRAY = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF's value types as formats of `struct`."""

PLAIN = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
"""Tensor types that hold one number after the other; all others hold blocks with scales."""

CHUNK_BYTES = 8 << 20
"""Float32 bytes that are made of blocks at once, before they are rounded to the type asked for."""

LARGEST_DIMENSION = 1 << 31


@dataclass(frozen=True)
class Stored:
    """A tensor as the file has it. shape: in torch's order. start: of its bytes in the file."""

    kind: int
    shape: tuple[int, ...]
    start: int
    size_bytes: int


class GgufFile:
    """metadata: key → number, text or list. stored, read(): tensors by GGUF's names.

    blocks_as: type that blocks (Q8_0, Q4_K, ...) become. float32 holds what they say exactly.
    Raises ModelError for a file that is cut, damaged, or has blocks that cannot be read.
    """

    def __init__(self, path: Path, *, blocks_as: torch.dtype = torch.float32) -> None:
        self.path = path
        self._blocks_as = blocks_as
        reader = BinaryReader(path)
        if reader.take(4, tr("the magic number", "文件标识")) != MAGIC:
            raise reader.refuse(tr("not a GGUF file", "不是 GGUF 文件"))
        self.version = self._version(reader)
        self._long = "I" if self.version == 1 else "Q"
        tensors = reader.number(self._long, tr("the number of tensors", "张量数"))
        pairs = reader.number(self._long, tr("the number of keys", "键数"))
        reader.require_count(pairs, 9, tr("keys", "键"))
        self.metadata = self._metadata(reader, pairs)
        reader.require_count(tensors, 20, tr("tensors", "张量"))
        self._data = reader.data
        self.stored = self._table(reader, tensors)

    @property
    def infos(self) -> dict[str, TensorInfo]:
        return {
            name: TensorInfo(PLAIN.get(stored.kind, self._blocks_as), stored.shape)
            for name, stored in self.stored.items()
        }

    def read(self, name: str) -> torch.Tensor:
        stored = self.stored[name]
        raw = self._data[stored.start : stored.start + stored.size_bytes]
        if stored.kind in PLAIN:
            if stored.start % PLAIN[stored.kind].itemsize:
                raw = raw.copy()
            return torch.from_numpy(raw).view(PLAIN[stored.kind]).view(stored.shape)
        return self._from_blocks(raw, stored)

    def _from_blocks(self, raw: np.ndarray, stored: Stored) -> torch.Tensor:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        rows = math.prod(stored.shape[:-1])
        raw_RB = raw.reshape(rows, -1)
        made_RK = torch.empty(rows, stored.shape[-1], dtype=self._blocks_as)
        count = max(1, CHUNK_BYTES // (4 * stored.shape[-1]))
        for begin in range(0, rows, count):
            part_RB = np.ascontiguousarray(raw_RB[begin : begin + count])
            numbers_RK = dequantize(part_RB, GGMLQuantizationType(stored.kind))
            made_RK[begin : begin + count] = torch.from_numpy(numbers_RK)
        return made_RK.view(stored.shape)

    def _version(self, reader: BinaryReader) -> int:
        version = reader.number("I", tr("the version", "版本"))
        if version in (1, 2, 3):
            return version
        big = int.from_bytes(version.to_bytes(4, "little"), "big")
        if big in (2, 3):
            raise reader.refuse(
                tr("a big-endian GGUF file", "大端序的 GGUF 文件"),
                tr("get the little-endian one", "请改用小端序的文件"),
            )
        raise reader.refuse(
            tr(
                f"GGUF version {version} is not known (1, 2, 3)",
                f"未知的 GGUF 版本 {version}（支持 1、2、3）",
            )
        )

    def _text(self, reader: BinaryReader, what: str) -> bytes:
        return reader.take(reader.number(self._long, what), what)

    def _metadata(self, reader: BinaryReader, pairs: int) -> dict[str, Any]:
        found = {}
        for _ in range(pairs):
            key = self._text(reader, tr("a key", "键")).decode("utf-8", "replace")
            found[key] = self._value(reader, reader.number("I", key), key)
        return found

    def _value(self, reader: BinaryReader, kind: int, key: str) -> Any:
        if kind in _NUMBERS:
            return reader.number(_NUMBERS[kind], key)
        if kind == STRING:
            return _decoded(self._text(reader, key))
        if kind == ARRAY:
            inner = reader.number("I", key)
            count = reader.number(self._long, key)
            if inner in _NUMBERS:
                form = _NUMBERS[inner]
                size = np.dtype(form).itemsize
                reader.require_count(count, size, tr(f"values of {key}", f"“{key}”的值"))
                values: list[Any] = np.frombuffer(reader.take(count * size, key), dtype=f"<{form}").tolist()
                return values
            if inner == STRING:
                least = 4 if self.version == 1 else 8
                reader.require_count(count, least, tr(f"values of {key}", f"“{key}”的值"))
                return [_decoded(self._text(reader, key)) for _ in range(count)]
            kind = inner
        raise reader.refuse(
            tr(f"{key} has the unknown type {kind}: damaged", f"{key} 的类型 {kind} 未知：文件已损坏")
        )

    def _table(self, reader: BinaryReader, tensors: int) -> dict[str, Stored]:
        rows = []
        for _ in range(tensors):
            name = self._text(reader, tr("a tensor's name", "张量名")).decode("utf-8", "replace")
            dimensions = reader.number("I", name)
            if not 1 <= dimensions <= 4:
                raise reader.refuse(
                    tr(
                        f"{name} has {dimensions} dimensions: damaged",
                        f"{name} 有 {dimensions} 维：文件已损坏",
                    )
                )
            shape = reader.numbers(self._long * dimensions, name)[::-1]
            kind, offset = reader.numbers("IQ", name)
            if not all(0 < size < LARGEST_DIMENSION for size in shape):
                raise reader.refuse(
                    tr(
                        f"{name} has the shape {list(shape)}: damaged",
                        f"{name} 的形状是 {list(shape)}：文件已损坏",
                    )
                )
            rows.append((name, kind, shape, offset))
        alignment = int(self.metadata.get("general.alignment") or 32)
        if alignment < 1:
            raise reader.refuse(tr(f"alignment {alignment}: damaged", f"对齐为 {alignment}：文件已损坏"))
        data_start = reader.position + -reader.position % alignment
        found: dict[str, Stored] = {}
        for name, kind, shape, offset in rows:
            start, size = data_start + offset, self._size(reader, name, kind, shape)
            if start + size > len(reader.data):
                over = start + size - len(reader.data)
                raise reader.refuse(
                    tr(
                        f"{name} ends {over} bytes behind the file: cut short",
                        f"{name} 超出文件末尾 {over} 字节：文件不完整",
                    )
                )
            if name in found:
                raise reader.refuse(tr(f"{name} is there twice: damaged", f"{name} 出现两次：文件已损坏"))
            found[name] = Stored(kind, shape, start, size)
        return found

    def _size(self, reader: BinaryReader, name: str, kind: int, shape: tuple[int, ...]) -> int:
        if kind in PLAIN:
            return math.prod(shape) * PLAIN[kind].itemsize
        from tuoling.weights.gguf_file import require_gguf

        sizes, types = require_gguf().GGML_QUANT_SIZES, require_gguf().GGMLQuantizationType
        try:
            block, block_bytes = sizes[types(kind)]
        except (ValueError, KeyError):
            raise reader.refuse(
                tr(f"{name} has the type {kind}, which is not known", f"{name} 的类型 {kind} 未知"),
                tr("a newer `gguf` package may know it", "更新 gguf 包或许可以读取"),
            ) from None
        if shape[-1] % block:
            raise reader.refuse(
                tr(
                    f"{name} has rows of {shape[-1]}, no multiple of its block of {block}: damaged",
                    f"{name} 每行 {shape[-1]} 个数，不是块长 {block} 的倍数：文件已损坏",
                )
            )
        return math.prod(shape) // block * int(block_bytes)


def _decoded(text: bytes) -> str:
    """Text; a token may be a piece of a character, and is then kept by its bytes."""
    return text.decode("utf-8", "surrogateescape")
