"""Old ggml files (spring 2023, before ggmf, ggjt and GGUF) as a Hugging Face LLaMA: f32, f16, q4_0 and q4_1.

They are only read. No program of today reads them: llama.cpp dropped them in 2023, they keep no scores of the words,
no epsilon and no context, and their 4-bit blocks are larger and less exact than GGUF's. Write GGUF instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tuoling.errors import ModelError
from tuoling.language import tr
from tuoling.models.adapters import some
from tuoling.weights.binary import BinaryReader
from tuoling.weights.meta_layout import Part, llama_shapes, pairs_apart, parts_of, rotary_heads
from tuoling.weights.meta_params import feed_forward_size, to_config
from tuoling.weights.tensors import TensorInfo

MAGIC = 0x67676D6C
LATER = {0x67676D66: "ggmf", 0x67676A74: "ggjt", 0x67676C61: "ggla", 0x46554747: "GGUF"}
F32, F16, Q4_0, Q4_1 = range(4)
BLOCK = 32
BLOCK_BYTES = {Q4_0: 4 + 16, Q4_1: 4 + 4 + 16}
PLAIN = {F32: torch.float32, F16: torch.float16}
CONTEXT = 2048
EPSILON = 1e-6
"""Of LLaMA 1, the only model that these files ever held; the engine of the time computed with 1e-5."""

ROWS = 1024
"""Rows of blocks that are decoded at once."""


@dataclass(frozen=True)
class Stored:
    """One tensor in one file. shape: in torch's order. start: of its bytes."""

    kind: int
    shape: tuple[int, ...]
    start: int
    size_bytes: int


class OldGgmlFile:
    """One part: sizes, the words as bytes, and tensors under Meta's names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        reader = BinaryReader(path)
        magic = reader.number("I", tr("the magic number", "文件标识"))
        if magic in LATER:
            raise reader.refuse(
                tr(
                    f"a {LATER[magic]} file, not one of the first ggml files",
                    f"这是 {LATER[magic]} 文件，不是最早的 ggml 文件",
                ),
                tr(
                    "look for the same model as GGUF, or as .pth or safetensors",
                    "请查找同一模型的 GGUF、.pth 或 safetensors 版本",
                ),
            )
        if magic != MAGIC:
            raise reader.refuse(tr("not a ggml file", "不是 ggml 文件"))
        self.sizes = reader.numbers("7i", tr("the sizes", "尺寸"))
        words, dim, multiple_of, heads, layers, rotary, kind = self.sizes
        sensible = min(words, dim, multiple_of, heads, layers, rotary) > 0 and 0 <= kind <= Q4_1
        if not sensible or dim % heads or rotary != dim // heads:
            raise reader.refuse(
                tr(f"its sizes make no model: {self.sizes}", f"其尺寸无法构成模型：{self.sizes}")
            )
        reader.require_count(words, 4, tr("words", "词"))
        self.strings = [
            reader.take(reader.number("i", tr("a word", "词")), tr("a word", "词")) for _ in range(words)
        ]
        self._data = reader.data
        self.stored = self._table(reader)

    def _table(self, reader: BinaryReader) -> dict[str, Stored]:
        found: dict[str, Stored] = {}
        while reader.left:
            dimensions, length, kind = reader.numbers("3i", tr("a tensor's head", "张量头"))
            if dimensions not in (1, 2) or not 0 < length < 256 or kind not in (F32, F16, Q4_0, Q4_1):
                raise reader.refuse(
                    tr(
                        f"no tensor begins at byte {reader.position - 12} ({dimensions} dimensions, type {kind}): damaged",
                        f"字节 {reader.position - 12} 处不是张量（{dimensions} 维，类型 {kind}）：文件已损坏",
                    )
                )
            shape = reader.numbers("i" * dimensions, tr("a shape", "形状"))[::-1]
            name = reader.take(length, tr("a name", "张量名")).decode("utf-8", "replace")
            if min(shape) < 1 or (kind in BLOCK_BYTES and shape[-1] % BLOCK) or name in found:
                raise reader.refuse(
                    tr(
                        f"{name} with the shape {list(shape)}: damaged",
                        f"{name} 的形状为 {list(shape)}：文件已损坏",
                    )
                )
            size = (
                math.prod(shape) * PLAIN[kind].itemsize
                if kind in PLAIN
                else math.prod(shape) // BLOCK * BLOCK_BYTES[kind]
            )
            found[name] = Stored(kind, shape, reader.position, size)
            reader.view(size, name)
        return found

    def read(self, name: str, blocks_as: torch.dtype) -> torch.Tensor:
        stored = self.stored[name]
        raw = self._data[stored.start : stored.start + stored.size_bytes]
        if stored.kind in PLAIN:
            kind = PLAIN[stored.kind]  # data is not aligned: a word of three bytes moves all that follows
            raw = raw.copy() if stored.start % kind.itemsize else raw
            return torch.from_numpy(raw).view(kind).view(stored.shape)
        rows, columns = stored.shape
        raw_RB = raw.reshape(rows, -1)
        made_RK = torch.empty(rows, columns, dtype=blocks_as)
        decode = decode_q4_0 if stored.kind == Q4_0 else decode_q4_1
        for begin in range(0, rows, ROWS):
            made_RK[begin : begin + ROWS] = torch.from_numpy(decode(raw_RB[begin : begin + ROWS]))
        return made_RK


def decode_q4_0(raw_RB: np.ndarray) -> np.ndarray:
    """Blocks of a float32 scale and 16 bytes: number 2k in the low half of byte k, 2k + 1 in the high, 8 being zero."""
    blocks_RGB = np.ascontiguousarray(raw_RB).reshape(len(raw_RB), -1, BLOCK_BYTES[Q4_0])
    scales_RG1 = np.ascontiguousarray(blocks_RGB[..., :4]).view("<f4")
    made: np.ndarray = (_halves(blocks_RGB[..., 4:]).astype(np.float32) - 8) * scales_RG1
    return made.reshape(len(raw_RB), -1)


def decode_q4_1(raw_RB: np.ndarray) -> np.ndarray:
    """Of each row first the least numbers of all its blocks, then all scales (float32), then all halves of bytes."""
    rows, size = raw_RB.shape
    groups = size // BLOCK_BYTES[Q4_1]
    least_RG = np.ascontiguousarray(raw_RB[:, : 4 * groups]).view("<f4")
    scales_RG = np.ascontiguousarray(raw_RB[:, 4 * groups : 8 * groups]).view("<f4")
    halves_RGB = _halves(raw_RB[:, 8 * groups :].reshape(rows, groups, 16)).astype(np.float32)
    made: np.ndarray = halves_RGB * scales_RG[..., None] + least_RG[..., None]
    return made.reshape(rows, -1)


def _halves(bytes_RGB: np.ndarray) -> np.ndarray:
    return np.stack([bytes_RGB & 15, bytes_RGB >> 4], axis=-1).reshape(*bytes_RGB.shape[:-1], BLOCK)


class OldGgmlModel:
    """`model.bin`, and `model.bin.1`, `.2` … beside it, as one source with Hugging Face's names.

    strings: the words as bytes. config: config.json. blocks_as: the type that 4-bit blocks become.
    """

    def __init__(self, path: Path, *, blocks_as: torch.dtype = torch.float32) -> None:
        self._blocks_as = blocks_as
        self._files = [OldGgmlFile(part) for part in parts_beside(path)]
        first = self._files[0]
        self.strings = first.strings
        words, dim, multiple_of, heads, layers, _, _ = first.sizes
        self._parts = {part.hf: part for part in parts_of(layers)}
        self._require_all(path, layers)
        params = {
            "dim": dim,
            "n_heads": heads,
            "n_layers": layers,
            "multiple_of": multiple_of,
            "norm_eps": EPSILON,
            "max_seq_len": CONTEXT,
        }
        wide = feed_forward_size(dim, multiple_of)
        self.config = to_config(params, path.parent, words=words, feed_forward=wide)
        shapes = llama_shapes(self.config)
        self.infos = {name: self._info(part, shapes[name]) for name, part in self._parts.items()}

    def _require_all(self, path: Path, layers: int) -> None:
        names = {part.meta for part in self._parts.values()}
        for file in self._files:
            if file.sizes != self._files[0].sizes or file.strings != self.strings:
                raise ModelError(
                    tr("the parts belong to different models", "各分片属于不同的模型"), where=str(file.path)
                )
            missing, more = sorted(names - file.stored.keys()), sorted(file.stored.keys() - names)
            if missing or more:
                raise ModelError(
                    "; ".join(
                        text
                        for text, names in (
                            (tr(f"tensors missing: {some(missing)}", f"缺少张量：{some(missing)}"), missing),
                            (tr(f"unknown tensors: {some(more)}", f"未知张量：{some(more)}"), more),
                        )
                        if names
                    ),
                    where=str(file.path),
                    remedy=tr(
                        "cut short, or not a LLaMA: copy it again", "文件不完整，或不是 LLaMA：请重新复制"
                    ),
                )

    def _info(self, part: Part, shape: tuple[int, ...]) -> TensorInfo:
        pieces = [file.stored[part.meta] for file in self._files]
        joined = list(pieces[0].shape)
        if part.axis is not None:
            joined[part.axis] = sum(piece.shape[part.axis] for piece in pieces)
        if tuple(joined) != shape:
            few = tr("; are all parts (.1, .2 …) beside it?", "；各分片（.1、.2 …）是否都在旁边？")
            raise ModelError(
                tr(
                    f"{part.meta} has the shape {joined}, the sizes say {list(shape)}{few}",
                    f"{part.meta} 的形状是 {joined}，按尺寸应为 {list(shape)}{few}",
                ),
                where=str(self._files[0].path),
            )
        return TensorInfo(PLAIN.get(pieces[0].kind, self._blocks_as), shape)

    def read(self, name: str) -> torch.Tensor:
        part = self._parts[name]
        pieces = [file.read(part.meta, self._blocks_as) for file in self._files]
        whole = pieces[0] if len(pieces) == 1 or part.axis is None else torch.cat(pieces, dim=part.axis)
        heads = rotary_heads(name, self.config)
        return whole if heads is None else pairs_apart(whole, heads)

    @property
    def from_blocks(self) -> bool:
        """Whether most of it is 4-bit."""
        return self._files[0].sizes[-1] in BLOCK_BYTES


def parts_beside(path: Path) -> Sequence[Path]:
    """The file and its later parts, `name.1`, `name.2` …, none left out."""
    found = [path]
    while (following := path.with_name(f"{path.name}.{len(found)}")).is_file():
        found.append(following)
    return found


def sentencepiece_beside(path: Path) -> Path | None:
    """tokenizer.model in the folder or the one above, where these files were made."""
    places: list[Any] = [path.parent / "tokenizer.model", path.parent.parent / "tokenizer.model"]
    return next((place for place in places if place.is_file()), None)
