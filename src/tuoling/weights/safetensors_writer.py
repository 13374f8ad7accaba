"""Tensors into safetensors files that are laid out first and filled after, in any order; how many files there are."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import torch

from tuoling.errors import OutputError, UsageError
from tuoling.files import write_json
from tuoling.language import tr
from tuoling.models.adapters import some
from tuoling.weights.tensors import DTYPE_NAMES, TensorInfo

SHARD_SIZE_BYTES = 5 * 10**9
"""transformers' `max_shard_size="5GB"`."""

_RANKS = {dtype: (number, name) for number, (name, dtype) in enumerate(DTYPE_NAMES.items())}


class SafetensorsWriter:
    """`model.safetensors`, or shards with an index, laid out at once and filled tensor by tensor.

    Use it as a context manager inside `files.atomic_folder`. The bytes are those that safetensors' own library
    writes for the same tensors. Raises OutputError where a tensor is unknown, of another shape or dtype, written
    twice, or, at the end, not written.
    """

    def __init__(
        self,
        folder: Path,
        infos: Mapping[str, TensorInfo],
        shard_size_bytes: int = SHARD_SIZE_BYTES,
        metadata: Mapping[str, str] | None = None,
        stem: str = "model",
        shards: int | None = None,
    ) -> None:
        """stem: the files' name before `.safetensors` or `-00001-of-00002.safetensors`.

        shards: just so many files, about equally large, whatever `shard_size_bytes` says.
        """
        self.folder = folder
        self.infos = dict(infos)
        self.metadata = {"format": "pt"} if metadata is None else dict(metadata)
        parts = (
            split_shards(self.infos, shard_size_bytes) if shards is None else split_evenly(self.infos, shards)
        )
        count = len(parts)
        self._stem = stem
        self._shards = {
            f"{stem}.safetensors" if count == 1 else f"{stem}-{n:05d}-of-{count:05d}.safetensors": names
            for n, names in enumerate(parts, 1)
        }
        self._places: dict[str, tuple[IO[bytes], int]] = {}
        self._opened: list[IO[bytes]] = []
        self._written: set[str] = set()

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            for file, names in self._shards.items():
                self._lay_out(self.folder / file, names)
        except BaseException:
            self._close()
            raise
        return self

    def _lay_out(self, path: Path, names: Sequence[str]) -> None:
        ordered = sorted(names, key=lambda name: (-_RANKS[self.infos[name].dtype][0], name))
        header: dict[str, Any] = {"__metadata__": self.metadata} if self.metadata else {}
        end = 0
        starts = {}
        for name in ordered:
            info = self.infos[name]
            starts[name], start, end = end, end, end + info.size_bytes
            kind = _RANKS[info.dtype][1]
            header[name] = {"dtype": kind, "shape": list(info.shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        file = path.open("xb", buffering=0)
        self._opened.append(file)
        write_at(file, len(text).to_bytes(8, "little") + text, 0)
        reserve(file, 8 + len(text) + end)
        self._places.update({name: (file, 8 + len(text) + start) for name, start in starts.items()})

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor in its place."""
        info = self.infos.get(name)
        if info != TensorInfo.of(tensor) or name in self._written:
            raise OutputError(
                tr(
                    f"{name}: {TensorInfo.of(tensor)} cannot be written where {info} is due",
                    f"{name}：此处应为 {info}，不能写入 {TensorInfo.of(tensor)}",
                ),
                where=str(self.folder),
            )
        file, start = self._places[name]
        write_at(file, tensor_bytes(tensor), start)
        self._written.add(name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        if kind is not None:
            return
        require_written(self.infos, self._written, self.folder)
        if len(self._shards) > 1:
            weight_map = {name: file for file, names in self._shards.items() for name in names}
            total = {
                "total_parameters": sum(info.count for info in self.infos.values()),
                "total_size": sum(info.size_bytes for info in self.infos.values()),
            }
            index = {"metadata": total, "weight_map": dict(sorted(weight_map.items()))}
            write_json(self.folder / f"{self._stem}.safetensors.index.json", index)

    def _close(self) -> None:
        for file in self._opened:
            file.close()
        self._opened.clear()


def split_shards(infos: Mapping[str, TensorInfo], shard_size_bytes: int) -> list[list[str]]:
    """Names in order, a new shard where the next tensor would pass the size; at least one shard."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, info in infos.items():
        if shards[-1] and filled + info.size_bytes > shard_size_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += info.size_bytes
    return shards


def split_evenly(infos: Mapping[str, TensorInfo], count: int) -> list[list[str]]:
    """Names in order, in `count` shards of about the same size. Raises UsageError where there are fewer tensors."""
    if not 0 < count <= len(infos):
        raise UsageError(
            tr(
                f"{len(infos)} tensors cannot fill {count} files",
                f"{len(infos)} 个张量无法分成 {count} 个文件",
            ),
            where="--shards",
        )
    total = sum(info.size_bytes for info in infos.values())
    shards: list[list[str]] = [[]]
    filled = 0
    for number, (name, info) in enumerate(infos.items()):
        to_open, left = count - len(shards), len(infos) - number
        full = filled * count >= total * len(shards)
        if shards[-1] and to_open and (full or left <= to_open):
            shards.append([])
        shards[-1].append(name)
        filled += info.size_bytes
    return shards


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    numbers: Any = flat.view(torch.uint8).numpy()
    return memoryview(numbers)


def require_written(infos: Mapping[str, TensorInfo], written: Set[str], where: Path) -> None:
    """Raise OutputError where a tensor that was announced never came."""
    missing = sorted(infos.keys() - written)
    if missing:
        raise OutputError(
            tr(f"tensors were not written: {some(missing)}", f"有张量没有写入：{some(missing)}"),
            where=str(where),
        )


def write_at(file: IO[bytes], data: bytes | memoryview, start: int) -> None:
    """Write all of `data` at a place of a file opened without a buffer."""
    view = memoryview(data)
    file.seek(start)
    while view:
        view = view[file.write(view[: 1 << 30]) :]  # Linux writes at most 2 GiB at once


def reserve(file: IO[bytes], size_bytes: int) -> None:
    """Give a file its full size, so that a full disk is found before the work and not after an hour."""
    if size_bytes and hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size_bytes)
    else:
        file.truncate(size_bytes)
