"""Weight files: what our writer writes is what safetensors' own library writes; bad files are refused with the reason."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tuoling.errors import ModelError, OutputError, TuolingError, UsageError
from tuoling.weights.companions import copy_companions
from tuoling.weights.safetensors_writer import SafetensorsWriter, split_evenly, split_shards
from tuoling.weights.tensors import TensorInfo, non_finite, open_weights


def mixed_tensors() -> dict[str, torch.Tensor]:
    """Every width, an odd count of bytes, a scalar, an empty one, more than nine layers."""
    torch.manual_seed(0)
    tensors = {f"layers.{n}.weight": torch.randn(3, 5) for n in range(11)}
    tensors |= {
        "half": torch.randn(7).half(),
        "brain": torch.randn(3, 3).bfloat16(),
        "long": torch.arange(5),
        "bytes": torch.arange(3, dtype=torch.uint8),
        "flags": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "eight": torch.randn(5).to(torch.float8_e4m3fn),
        "double": torch.randn(2, dtype=torch.float64),
    }
    return tensors


def write(folder: Path, tensors: dict[str, torch.Tensor], **options: int) -> None:
    infos = {name: TensorInfo.of(tensor) for name, tensor in tensors.items()}
    with SafetensorsWriter(folder, infos, **options) as writer:
        for name in reversed(list(tensors)):
            writer.write(name, tensors[name])


def equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Bit for bit, NaN included."""
    same = left.dtype == right.dtype and left.shape == right.shape
    return same and bytes(left.contiguous().view(-1).view(torch.uint8).numpy()) == bytes(
        right.contiguous().view(-1).view(torch.uint8).numpy()
    )


def test_bytes_are_those_of_the_formats_own_library(tmp_path: Path) -> None:
    tensors = mixed_tensors()
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    write(tmp_path / "ours", tensors)
    ours = (tmp_path / "ours/model.safetensors").read_bytes()
    assert ours == (tmp_path / "theirs.safetensors").read_bytes()


def test_reads_back_what_the_library_wrote(tmp_path: Path) -> None:
    tensors = mixed_tensors()
    save_file(tensors, tmp_path / "model.safetensors")
    source = open_weights(tmp_path)
    assert set(source.infos) == set(tensors)
    for name, tensor in tensors.items():
        assert source.infos[name] == TensorInfo.of(tensor)
        assert equal(source.read(name), tensor), name


def test_shards_and_index_are_read_by_transformers_rules(tmp_path: Path) -> None:
    tensors = {f"t{n}": torch.full((4,), float(n)) for n in range(5)}
    write(tmp_path, tensors, shard_size_bytes=40)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_parameters": 20, "total_size": 80}
    for name, file in index["weight_map"].items():
        assert equal(load_file(tmp_path / file)[name], tensors[name])
    assert {n: float(open_weights(tmp_path).read(n)[0]) for n in tensors} == {
        f"t{n}": float(n) for n in range(5)
    }


def test_a_tensor_larger_than_a_shard_has_one_of_its_own() -> None:
    infos = {
        name: TensorInfo(torch.uint8, (size,)) for name, size in (("a", 3), ("b", 100), ("c", 3), ("d", 3))
    }
    assert split_shards(infos, 10) == [["a"], ["b"], ["c", "d"]]


@pytest.mark.parametrize(
    "sizes", [[1, 1, 1, 1], [1, 100, 1, 1], [100, 1, 1, 1], [1, 1, 1, 100], [5, 4, 3, 2, 1, 9]]
)
def test_just_so_many_shards(sizes: list[int]) -> None:
    infos = {f"t{n}": TensorInfo(torch.uint8, (size,)) for n, size in enumerate(sizes)}
    for count in range(1, len(sizes) + 1):
        shards = split_evenly(infos, count)
        assert len(shards) == count and all(shards)
        assert [name for shard in shards for name in shard] == list(infos)
    with pytest.raises(UsageError, match="tensors"):
        split_evenly(infos, len(sizes) + 1)
    assert split_evenly({f"t{n}": TensorInfo(torch.uint8, (1,)) for n in range(9)}, 3)[1] == [
        "t3",
        "t4",
        "t5",
    ]


def test_unaligned_tensors_are_read(tmp_path: Path) -> None:
    header = {
        "odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "float": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
    }
    text = json.dumps(header).encode()
    data = bytes([1, 2, 3]) + struct.pack("<2f", 1.5, -2.0)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    assert open_weights(tmp_path).read("float").tolist() == [1.5, -2.0]


def test_pickles_are_read_whole_and_in_shards(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(6).view(2, 3)}
    torch.save({"model": {**tensors, "turned": tensors["a"].t()}}, tmp_path / "one.pt")
    source = open_weights(tmp_path / "one.pt")
    assert equal(source.read("a"), tensors["a"]) and equal(
        source.read("turned"), tensors["a"].t().contiguous()
    )
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, name in enumerate(tensors, 1):
        torch.save({name: tensors[name]}, folder / f"pytorch_model-0000{number}-of-00002.bin")
    assert all(equal(open_weights(folder).read(name), tensor) for name, tensor in tensors.items())


def cut(folder: Path) -> None:
    write(folder, {"a": torch.randn(100)})
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def wrong_header(folder: Path) -> None:
    write(folder, {"a": torch.randn(10)})
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"shape":[10]', b'"shape":[11]'))


def not_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)


def missing_shard(folder: Path) -> None:
    write(folder, {"a": torch.randn(10), "b": torch.randn(10)}, shard_size_bytes=40)
    (folder / "model-00002-of-00002.safetensors").unlink()


def missing_shard_without_index(folder: Path) -> None:
    torch.save({"a": torch.randn(3)}, folder / "pytorch_model-00001-of-00002.bin")


def two_models(folder: Path) -> None:
    for number in (1, 2):
        torch.save({"a": torch.randn(3)}, folder / f"pytorch_model-0000{number}-of-00002.bin")


def cut_pickle(folder: Path) -> None:
    torch.save({"a": torch.randn(3000)}, folder / "pytorch_model.bin")
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-2000])


def old_pickle(folder: Path) -> None:
    torch.save({"a": torch.randn(3)}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def more_than_tensors(folder: Path) -> None:
    torch.save({"a": torch.randn(3), "epoch": 3}, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (cut, ["model.safetensors", "cut short"]),
        (wrong_header, ["model.safetensors", "40 bytes"]),
        (not_safetensors, ["header"]),
        (missing_shard, ["model-00002-of-00002.safetensors"]),
        (missing_shard_without_index, ["pytorch_model-00002-of-00002.bin"]),
        (two_models, ["two files", "a"]),
        (cut_pickle, ["pytorch_model.bin", "cut short"]),
        (old_pickle, ["torch 1.6"]),
        (more_than_tensors, ["epoch"]),
        (lambda folder: None, ["no weights"]),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, make: Callable[[Path], None], words: list[str]) -> None:
    make(tmp_path)
    with pytest.raises(ModelError) as refused:
        open_weights(tmp_path)
    for word in words:
        assert word in str(refused.value)


class _Trap:
    """What a malicious file holds: unpickling it would make a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.write_text, (self.proof, "executed")


def test_a_pickle_with_code_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    torch.save({"a": torch.randn(3), "trap": _Trap(proof)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="code"):
        open_weights(tmp_path)
    assert not proof.exists()
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert proof.read_text() == "executed", "the trap would have worked"
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(_Trap(proof)))
    proof.unlink()
    with pytest.raises(ModelError):
        open_weights(tmp_path / "raw.pth")
    assert not proof.exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_number_is_found(dtype: torch.dtype, bad: float) -> None:
    values = torch.randn(300).clamp(-3, 3).to(dtype)
    assert not non_finite(values)
    for place in range(0, 300, 7 if dtype.itemsize > 1 else 59):
        spoilt = values.clone()
        spoilt[place] = bad
        assert non_finite(spoilt), place


def test_the_writer_wants_each_tensor_once_and_as_announced(tmp_path: Path) -> None:
    infos = {"a": TensorInfo(torch.float32, (2,)), "b": TensorInfo(torch.float32, (2,))}

    def attempt(name: str, *writes: tuple[str, torch.Tensor]) -> str:
        with pytest.raises(TuolingError) as refused, SafetensorsWriter(tmp_path / name, infos) as writer:
            for key, tensor in writes:
                writer.write(key, tensor)
        assert isinstance(refused.value, OutputError)
        return str(refused.value)

    two = torch.zeros(2)
    assert "b" in attempt("missing", ("a", two))
    assert "a" in attempt("twice", ("a", two), ("a", two))
    assert "(3,)" in attempt("shape", ("a", torch.zeros(3)))
    assert "float16" in attempt("dtype", ("a", two.half()))
    assert "c" in attempt("unknown", ("c", two))


def test_companions_are_copied_and_nothing_is_replaced(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir(), out.mkdir()
    for name in (
        "tokenizer.json",
        "generation_config.json",
        "LICENSE.txt",
        "config.json",
        "model.safetensors",
    ):
        (source / name).write_text(name)
    (out / "generation_config.json").write_text("ours")
    assert copy_companions(source, out) == ["tokenizer.json", "LICENSE.txt"]
    assert sorted(path.name for path in out.iterdir()) == [
        "LICENSE.txt",
        "generation_config.json",
        "lineage.json",
        "tokenizer.json",
    ]
    assert (out / "generation_config.json").read_text() == "ours"
