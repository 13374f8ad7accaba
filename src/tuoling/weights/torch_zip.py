"""A file as torch.save writes it, laid out first and filled after: tensors are never held together.

The format is a zip of uncompressed records below one folder: `data.pkl` (the pickled mapping; each tensor points
to a storage by its number), `data/0`, `data/1`, ... (the storages' bytes), `byteorder` and `version`. All but the
checksums is known from names, dtypes and shapes alone, so that every record's place is fixed before any tensor is
read. `torch.load(weights_only=True, mmap=True)` reads it, and so does any zip program.
"""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import torch

from tuoling.errors import OutputError
from tuoling.language import tr
from tuoling.weights.safetensors_writer import require_written, reserve, tensor_bytes, write_at
from tuoling.weights.tensors import TensorInfo

ALIGNMENT = 64
"""torch.save puts every storage at a multiple of this."""

_LIMIT = 0xFFFFFFFF
"""Sizes and places from here on need zip's 64-bit fields: a shard of LLaMA 7B has 13.5 GB."""

_STORAGE_TYPES = {
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.float64: torch.DoubleStorage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}


@dataclass(frozen=True)
class _Storage:
    """Stands for a tensor's bytes while the mapping is pickled."""

    number: int
    info: TensorInfo


@dataclass(frozen=True)
class _Tensor:
    """Pickles as torch pickles a contiguous tensor."""

    storage: _Storage

    def __reduce__(self) -> tuple[Callable[..., torch.Tensor], tuple[Any, ...]]:
        shape = self.storage.info.shape
        stride = torch.empty(shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, shape, stride, False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> tuple[Any, ...] | None:
        if isinstance(obj, _Storage):
            kind = _STORAGE_TYPES[obj.info.dtype]
            return ("storage", kind, str(obj.number), "cpu", obj.info.count)
        return None


def _pickled(infos: Mapping[str, TensorInfo]) -> bytes:
    tensors = {name: _Tensor(_Storage(number, info)) for number, (name, info) in enumerate(infos.items())}
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(tensors)
    return buffer.getvalue()


@dataclass
class _Record:
    """One file inside the zip. start: of its local header. data: of its bytes."""

    name: bytes
    size: int
    start: int
    crc: int = 0

    @property
    def wide(self) -> bool:
        return self.size >= _LIMIT

    @property
    def sizes(self) -> bytes:
        """The 64-bit field of the local header, where the sizes need one."""
        return struct.pack("<HHQQ", 1, 16, self.size, self.size) if self.wide else b""

    @property
    def data(self) -> int:
        plain = self.start + 30 + len(self.name) + len(self.sizes) + 4
        return plain + -plain % ALIGNMENT

    @property
    def end(self) -> int:
        return self.data + self.size

    def local_header(self) -> bytes:
        """Padded by an extra field, as torch does, so that the data is aligned."""
        size = _LIMIT if self.wide else self.size
        padding = self.data - self.start - 30 - len(self.name) - len(self.sizes) - 4
        extra = self.sizes + struct.pack("<HH", 0x4246, padding) + b"Z" * padding
        version = 45 if self.wide else 20
        head = struct.pack(
            "<IHHHHHIIIHH",
            0x04034B50,
            version,
            1 << 11,  # the name is UTF-8
            0,
            0,
            0x21,  # 1 January 1980: the same tensors give the same bytes
            self.crc,
            size,
            size,
            len(self.name),
            len(extra),
        )
        return head + self.name + extra

    def central_header(self) -> bytes:
        wide = ([self.size] * 2 if self.wide else []) + ([self.start] if self.start >= _LIMIT else [])
        extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        size = _LIMIT if self.wide else self.size
        version = 45 if wide else 20
        head = struct.pack(
            "<IHHHHHHIIIHHHHHII",
            0x02014B50,
            version,
            version,
            1 << 11,
            0,
            0,
            0x21,
            self.crc,
            size,
            size,
            len(self.name),
            len(extra),
            0,
            0,
            0,
            0,
            min(self.start, _LIMIT),
        )
        return head + self.name + extra


class TorchZipWriter:
    """One `.pth` file of plain contiguous tensors. A context manager, with `write` as `SafetensorsWriter` has it."""

    def __init__(self, path: Path, infos: Mapping[str, TensorInfo]) -> None:
        self.path = path
        self.infos = dict(infos)
        for name, info in infos.items():
            if info.dtype not in _STORAGE_TYPES:
                kind = str(info.dtype).removeprefix("torch.")
                raise OutputError(
                    tr(
                        f"{name} is {kind}, which has no place in a .pth file",
                        f"{name} 是 {kind}，无法写入 .pth 文件",
                    ),
                    where=str(path),
                    remedy="--outtype bf16",
                )
        folder = path.stem
        self._fixed: dict[str, bytes] = {
            "data.pkl": _pickled(self.infos),
            "byteorder": b"little",
            "version": b"3\n",
        }
        sizes = {"data.pkl": len(self._fixed["data.pkl"]), "byteorder": 6}
        sizes |= {f"data/{number}": info.size_bytes for number, info in enumerate(self.infos.values())}
        sizes["version"] = 2
        self._records: dict[str, _Record] = {}
        end = 0
        for name, size in sizes.items():
            record = _Record(f"{folder}/{name}".encode(), size, end)
            self._records[name] = record
            end = record.end
        self._directory_start = end
        self._numbers = {name: number for number, name in enumerate(self.infos)}
        self._written: set[str] = set()
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        self._file = self.path.open("xb", buffering=0)
        try:
            reserve(self._file, self._directory_start)
            for record in self._records.values():
                write_at(self._file, record.local_header(), record.start)
            for name, data in self._fixed.items():
                self._put(self._records[name], data)
        except BaseException:
            self._file.close()
            raise
        return self

    def _put(self, record: _Record, data: bytes | memoryview) -> None:
        assert self._file is not None
        record.crc = zlib.crc32(data)
        write_at(self._file, record.local_header(), record.start)
        write_at(self._file, data, record.data)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor in its place. Raises OutputError where it is unknown, different, or there already."""
        if self.infos.get(name) != TensorInfo.of(tensor) or name in self._written:
            raise OutputError(
                tr(f"{name} cannot be written here", f"此处不能写入 {name}"), where=str(self.path)
            )
        self._put(self._records[f"data/{self._numbers[name]}"], tensor_bytes(tensor))
        self._written.add(name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        with self._file:
            if kind is not None:
                return
            require_written(self.infos, self._written, self.path)
            write_at(self._file, self._directory(), self._directory_start)

    def _directory(self) -> bytes:
        """The list of records at the end of the file, in its 64-bit form too, which readers take where both differ."""
        entries = b"".join(record.central_header() for record in self._records.values())
        start, size, count = self._directory_start, len(entries), len(self._records)
        wide = struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, count, count, size, start)
        locator = struct.pack("<IIQI", 0x07064B50, 0, start + size, 1)
        end = struct.pack(
            "<IHHHHIIH",
            0x06054B50,
            0,
            0,
            min(count, 0xFFFF),
            min(count, 0xFFFF),
            min(size, _LIMIT),
            min(start, _LIMIT),
            0,
        )
        return entries + wide + locator + end
