"""The `.pth` writer: what torch.load reads, mapped and by weights_only, and what a zip program finds whole."""

from __future__ import annotations

import io
import pickletools
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from tuoling.errors import OutputError
from tuoling.weights import torch_zip
from tuoling.weights.tensors import PickledFile, TensorInfo
from tuoling.weights.torch_zip import TorchZipWriter


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "tok_embeddings.weight": torch.randn(7, 5).half(),
        "norm.weight": torch.randn(5),
        "brain": torch.randn(3, 3, 2).bfloat16(),
        "long": torch.arange(5),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "flags": torch.tensor([True, False, True]),
    }


def write(path: Path, values: dict[str, torch.Tensor]) -> Path:
    infos = {name: TensorInfo.of(tensor) for name, tensor in values.items()}
    with TorchZipWriter(path, infos) as writer:
        for name in reversed(list(values)):
            writer.write(name, values[name])
    return path


def check(path: Path, values: dict[str, torch.Tensor]) -> None:
    for mmap in (False, True):
        loaded = torch.load(path, weights_only=True, mmap=mmap)
        assert list(loaded) == list(values)
        for name, tensor in values.items():
            assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name
            assert loaded[name].stride() == tensor.contiguous().stride()
    with zipfile.ZipFile(path) as opened:
        assert opened.testzip() is None, "every checksum is right"


def test_torch_reads_what_was_written_in_any_order(tmp_path: Path) -> None:
    path = write(tmp_path / "consolidated.00.pth", tensors())
    check(path, tensors())
    assert list(PickledFile(path).infos) == list(tensors())


def test_the_pickle_is_what_torch_itself_writes(tmp_path: Path) -> None:
    def opcodes(path: Path) -> list[tuple[str, object]]:
        with zipfile.ZipFile(path) as opened:
            name = next(name for name in opened.namelist() if name.endswith("data.pkl"))
            found = [(code.name, value) for code, value, _ in pickletools.genops(opened.read(name))]
        return [entry for entry in found if entry[0] not in ("BINPUT", "LONG_BINPUT")]

    torch.save(tensors(), tmp_path / "theirs.pth")
    assert opcodes(write(tmp_path / "ours.pth", tensors())) == opcodes(tmp_path / "theirs.pth")


def test_storages_are_aligned(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pth", tensors())
    reader = torch._C.PyTorchFileReader(str(path))
    places = [reader.get_record_offset(f"data/{number}") for number in range(len(tensors()))]
    assert all(place % 64 == 0 for place in places)


def test_sizes_and_places_beyond_32_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A storage over 4 GiB and one after it, as a 13 GB shard has them; here a hole on the disk."""
    monkeypatch.setattr(torch_zip, "reserve", lambda file, size: file.truncate(size))
    infos = {"large": TensorInfo(torch.uint8, (5 << 30,)), "after": TensorInfo(torch.float32, (4,))}
    path = tmp_path / "consolidated.00.pth"
    with TorchZipWriter(path, infos) as writer:
        writer._written.add("large")
        writer.write("after", torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert path.stat().st_blocks * 512 < 1 << 20
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert loaded["after"].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert loaded["large"].shape == (5 << 30,) and int(loaded["large"][-1]) == 0
    with zipfile.ZipFile(path) as opened:
        assert opened.getinfo("consolidated.00/data/0").file_size == 5 << 30
        assert opened.getinfo("consolidated.00/data/1").header_offset > 5 << 30
        assert opened.read("consolidated.00/data/1") == struct.pack("<4f", 1, 2, 3, 4)


def test_each_tensor_once_and_as_announced(tmp_path: Path) -> None:
    infos = {"a": TensorInfo(torch.float32, (2,))}
    for number, writes in enumerate(([], [torch.zeros(3)], [torch.zeros(2)] * 2)):
        with pytest.raises(OutputError), TorchZipWriter(tmp_path / f"{number}.pth", infos) as writer:
            for tensor in writes:
                writer.write("a", tensor)


def test_same_tensors_same_bytes(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    files = [write(folder / "consolidated.00.pth", tensors()).read_bytes() for folder in folders]
    assert files[0] == files[1]
    buffer = io.BytesIO(files[0])
    assert list(torch.load(buffer, weights_only=True)) == list(tensors())
