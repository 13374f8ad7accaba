"""Tensors from weight files one by one: files are memory-mapped, never held.

Reading costs clean mapped pages, which the system takes back when it needs them; private memory is what the caller
makes of a tensor. safetensors_writer.py writes them.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from tuoling.errors import ModelError
from tuoling.language import tr
from tuoling.models.adapters import some
from tuoling.models.source import weight_files
from tuoling.models.weight_files import damaged, read_header, read_shard_index, require_shards

DTYPE_NAMES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
"""Names in safetensors headers, in the order of the format's own library: it writes the last ones first."""


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many numbers it holds."""
        return int(torch.Size(self.shape).numel())

    @property
    def size_bytes(self) -> int:
        return self.count * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorInfo:
        return cls(tensor.dtype, tuple(tensor.shape))


class TensorSource(Protocol):
    """Named tensors that lie somewhere. `infos` is in the order of the files."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str) -> torch.Tensor:
        """The tensor, contiguous, on the CPU; memory-mapped where the file allows. Do not write into it."""
        ...


class SafetensorsFile:
    """One safetensors file, mapped when its first tensor is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        head = read_header(path)
        self.metadata = head.metadata
        self._starts: dict[str, int] = {}
        self.infos: dict[str, TensorInfo] = {}
        self._bytes: torch.Tensor | None = None
        for name, entry in head.entries.items():
            dtype = DTYPE_NAMES.get(entry["dtype"])
            if dtype is None:
                kind = entry["dtype"]
                raise ModelError(
                    tr(f"{name}: unknown dtype {kind}", f"{name}：未知的数据类型 {kind}"), where=str(path)
                )
            start, end = entry["data_offsets"]
            info = TensorInfo(dtype, tuple(entry["shape"]))
            if end - start != info.size_bytes:
                raise damaged(path, tr(f"{name} has {end - start} bytes", f"{name} 有 {end - start} 字节"))
            self.infos[name] = info
            self._starts[name] = head.data_start + start

    def read(self, name: str) -> torch.Tensor:
        info = self.infos[name]
        if not info.count:
            return torch.empty(info.shape, dtype=info.dtype)
        if self._bytes is None:
            size = self.path.stat().st_size
            storage: Any = torch.UntypedStorage.from_file(str(self.path), False, size)
            self._bytes = torch.empty(0, dtype=torch.uint8).set_(storage)
        start = self._starts[name]
        raw = self._bytes[start : start + info.size_bytes]
        if (
            start % info.dtype.itemsize
        ):  # mixed dtypes may leave a tensor where its numbers cannot be read in place
            raw = raw.clone()
        return raw.view(info.dtype).view(info.shape)


class PickledFile:
    """A `.bin`, `.pt` or `.pth` file that torch.save wrote (torch 1.6 or newer): plain tensors only, mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors = _tensors_of(_unpickle(path), path)
        self.infos = {name: TensorInfo.of(tensor) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name].contiguous()


def _unpickle(path: Path) -> Any:
    """torch.load that executes nothing and maps the file."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"PK\x03\x04":
        raise ModelError(
            tr(
                "not a zip that torch.save wrote: cut, or older than torch 1.6, and then it cannot be mapped",
                "不是 torch.save 写出的 zip 文件：可能不完整，或由 torch 1.6 之前的版本保存，无法内存映射",
            ),
            where=str(path),
            remedy=tr(
                "copy it again; or load and save it once with torch.load(weights_only=True) and torch.save",
                "请重新复制；或用 torch.load(weights_only=True) 和 torch.save 重新保存一次",
            ),
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            tr(
                "the file asks for code to be run, and only plain tensors are read from it",
                "该文件要求执行代码，这里只读取纯张量",
            ),
            where=str(path),
            remedy=tr("get the weights as safetensors", "请改用 safetensors 格式的权重"),
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise damaged(path, str(error).splitlines()[0] if str(error) else type(error).__name__) from error


def _tensors_of(loaded: Any, path: Path) -> dict[str, torch.Tensor]:
    """The state dict inside: at the top, or below the one usual key of a training checkpoint."""
    for key in ("state_dict", "model", "module"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        kind = type(loaded).__name__
        raise ModelError(
            tr(f"holds a {kind}, not named tensors", f"内容是 {kind}，不是带名字的张量"), where=str(path)
        )
    other = [str(name) for name, value in loaded.items() if not isinstance(value, torch.Tensor)]
    if other:
        raise ModelError(
            tr(f"holds more than tensors: {some(other)}", f"除张量外还有别的内容：{some(other)}"),
            where=str(path),
        )
    return {str(name): tensor.detach() for name, tensor in loaded.items()}


class WeightFiles:
    """Several weight files as one source."""

    def __init__(self, files: Sequence[SafetensorsFile | PickledFile]) -> None:
        self._files: dict[str, SafetensorsFile | PickledFile] = {}
        self.infos: dict[str, TensorInfo] = {}
        for file in files:
            twice = sorted(file.infos.keys() & self.infos.keys())
            if twice:
                raise ModelError(
                    tr(
                        f"tensors lie in two files: {some(twice)}",
                        f"有张量同时存在于两个文件：{some(twice)}",
                    ),
                    where=str(file.path),
                    remedy=tr("the folder mixes two models", "目录里混有两个模型"),
                )
            self.infos.update(file.infos)
            self._files.update(dict.fromkeys(file.infos, file))

    def read(self, name: str) -> torch.Tensor:
        return self._files[name].read(name)


def open_weights(folder_or_file: Path) -> TensorSource:
    """The tensors of a model folder (safetensors first, whole or in shards, else pickles) or of one file.

    A folder of Meta's shards reads as one model with Hugging Face's names. Raises ModelError where a shard is
    missing, a file is cut or damaged, or a pickle holds more than tensors.
    """
    if folder_or_file.is_file():
        return _open_file(folder_or_file)
    files = weight_files(folder_or_file)
    if not files and any(folder_or_file.glob("consolidated.*.pth")):
        from tuoling.weights.meta_layout import MetaCheckpoint

        return MetaCheckpoint(folder_or_file)
    if not files:
        raise ModelError(tr("the folder has no weights", "目录中没有权重文件"), where=str(folder_or_file))
    whole = folder_or_file / "model.safetensors"
    if whole in files:
        return _open_file(whole)
    require_shards(folder_or_file, files)
    source = WeightFiles([_open_file(file) for file in files])
    for index in sorted(folder_or_file.glob(f"*{files[0].suffix}.index.json")):
        missing = sorted(read_shard_index(index).keys() - source.infos.keys())
        if missing:
            raise ModelError(
                tr(
                    f"the files lack tensors of the index: {some(missing)}",
                    f"文件中缺少索引所列张量：{some(missing)}",
                ),
                where=str(index),
            )
    return source


def _open_file(path: Path) -> SafetensorsFile | PickledFile:
    return SafetensorsFile(path) if path.suffix == ".safetensors" else PickledFile(path)


def non_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds NaN or infinity: by its extremes, which NaN spreads to, at 14 GB/s and without memory.

    `torch.isfinite(tensor).all()` reads 0.3 GB/s of float16 and makes two tensors of half the size.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return False
    if tensor.dtype.itemsize == 1:  # float8: torch finds no extremes in it
        return any(not torch.isfinite(part.float()).all() for part in tensor.flatten().split(1 << 20))
    low, high = torch.aminmax(tensor)
    return not bool(torch.isfinite(low) & torch.isfinite(high))


def require_finite(name: str, tensor: torch.Tensor, *, allow_nan: bool, where: Path) -> None:
    """Raise ModelError where a tensor holds NaN or infinity and the user has not said that it may."""
    if not allow_nan and non_finite(tensor):
        raise ModelError(
            tr(f"{name} holds NaN or infinity", f"{name} 含有 NaN 或无穷大"),
            where=str(where),
            remedy=tr(
                "the weights are broken; to convert them all the same: --allow-nan",
                "权重已损坏；若仍要转换：--allow-nan",
            ),
        )
