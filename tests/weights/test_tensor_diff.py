"""Our own diff: files come back bit for bit, whatever the numbers; base, diff and result are each checked."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tuoling.errors import ModelError, OutputError, TuolingError, UsageError
from tuoling.weights import delta_code, tensor_diff, tensor_diff_files
from tuoling.weights.checksums import read_checksums, write_checksums
from tuoling.weights.diff import apply_diff, make_diff
from tuoling.weights.diff_options import DiffOptions
from tuoling.weights.tensor_diff_files import apply_tensor_diff, make_tensor_diff

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and "tuoling-cache" not in p.parts
    }


def trained(tensor: torch.Tensor, step: float) -> torch.Tensor:
    return (tensor.float() + torch.randn(tensor.shape) * step).to(tensor.dtype)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A base in two shards and what was trained from it, in one, with three rows more and a config."""
    torch.manual_seed(0)
    base = {
        "model.embed.weight": torch.randn(50, 16).to(torch.bfloat16),
        "model.layer.weight": torch.randn(32, 16).to(torch.bfloat16),
        "model.norm.weight": torch.ones(16),
        "gone.weight": torch.randn(4, 4),
    }
    for folder in ("base", "tuned"):
        (tmp_path / folder).mkdir()
    names = list(base)
    for number, part in enumerate((names[:2], names[2:]), 1):
        save_file(
            {name: base[name] for name in part},
            tmp_path / "base" / f"model-0000{number}-of-00002.safetensors",
        )
    index = {name: f"model-0000{1 + number // 2}-of-00002.safetensors" for number, name in enumerate(names)}
    (tmp_path / "base" / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    grown = torch.cat([trained(base["model.embed.weight"], 1e-3), torch.randn(3, 16).to(torch.bfloat16)])
    tuned = {
        "model.embed.weight": grown,
        "model.layer.weight": trained(base["model.layer.weight"], 1e-3),
        "model.norm.weight": base["model.norm.weight"].to(torch.float16),
        "new.weight": torch.tensor([[float("nan"), -0.0], [float("inf"), 1e-40]]),
        "step": torch.tensor(7),
        "nothing": torch.empty(0, 4),
    }
    save_file(tuned, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "tuned" / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    (tmp_path / "tuned" / "empty.txt").write_text("")
    (tmp_path / "tuned" / "pytorch_model.bin").write_bytes(b"the same, as a pickle")
    return tmp_path / "base", tmp_path / "tuned"


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    item_bytes=st.sampled_from([1, 2, 4, 8]),
    count=st.integers(0, 300),
    change=st.sampled_from(["none", "little", "all"]),
    seed=st.integers(0, 1000),
)
def test_any_bytes_come_back(item_bytes: int, count: int, change: str, seed: int) -> None:
    generator = np.random.default_rng(seed)
    base = generator.integers(0, 256, count * item_bytes, dtype=np.uint8)
    target = base.copy()
    if change == "all":
        target = generator.integers(0, 256, count * item_bytes, dtype=np.uint8)
    elif change == "little":
        target[generator.random(len(target)) < 0.05] += 1
    for against in (base, None):
        code = memoryview(delta_code.encode(target, against, item_bytes))
        assert delta_code.split_codes(code, 1, item_bytes) == [code]
        made = delta_code.decode(code, against, len(target), item_bytes)
        assert made.tobytes() == target.tobytes()
        if change == "none" and against is base:
            assert len(code) == 4 * item_bytes, "what is the same takes nothing but its lengths"


def test_numbers_next_to_each_other_differ_by_one() -> None:
    """The code of a difference d is 2d, or -2d - 1 below zero: the reason why upper planes are zeros."""
    base = np.array([0x3F7F, 0x3F80, 0x0000], "<u2")
    target = np.array([0x3F80, 0x3F7F, 0xFFFF], "<u2")  # across an exponent, back, and around
    code = memoryview(delta_code.encode(target.view(np.uint8), base.view(np.uint8), 2))
    length = int.from_bytes(code[:4], "little")
    import zlib

    assert zlib.decompress(code[4 : 4 + length], -15) == bytes([2, 1, 1]) and bytes(
        code[4 + length :]
    ) == bytes(4)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_folder_there_and_back(
    tmp_path: Path, pair: tuple[Path, Path], workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_diff_files, "CHUNK_BYTES", 64)
    base, tuned = pair
    options = DiffOptions(workers=workers)
    report = make_tensor_diff(base, tuned, tmp_path / "a.safetensors", options)
    assert report.left_out == ["pytorch_model.bin"]
    assert "2 tensors have no like in the base" in " ".join(report.notes)  # new.weight and step
    done = apply_tensor_diff(base, tmp_path / "a.safetensors", tmp_path / "out", options)
    want = contents(tuned)
    del want["pytorch_model.bin"]
    assert contents(tmp_path / "out") == want
    assert {one.name: one.sha256 for one in done.files} == {
        name: hashlib.sha256(data).hexdigest() for name, data in want.items()
    }


def test_the_diff_is_a_safetensors_file_with_a_record(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, tuned = pair
    make_tensor_diff(base, tuned, tmp_path, DiffOptions())
    place = tmp_path / "tuned.diff.safetensors"
    with safe_open(place, "pt") as opened:
        assert "model.safetensors/model.layer.weight" in opened.keys()  # noqa: SIM118
        record = json.loads(opened.metadata()["record"])
        code = opened.get_tensor("model.safetensors/model.layer.weight").numpy().tobytes()
    files = {one["name"]: one for one in record["files"]}
    whole = (tuned / "model.safetensors").read_bytes()
    assert files["model.safetensors"]["sha256"] == hashlib.sha256(whole).hexdigest()
    part = next(one for one in files["model.safetensors"]["parts"] if one["base"] == "model.layer.weight")
    raw = load_file(base / "model-00001-of-00002.safetensors")["model.layer.weight"]
    assert part["base_sha256"] == hashlib.sha256(raw.view(torch.uint8).numpy().tobytes()).hexdigest()
    assert part["sha256"] == hashlib.sha256(code).hexdigest()


def test_a_fine_tune_takes_little(tmp_path: Path) -> None:
    """bf16, steps of a thousandth of the weights' spread: under a sixth of the size, where deflate alone needs 4/5."""
    torch.manual_seed(0)
    base = {"w": (torch.randn(512, 512) * 0.02).to(torch.bfloat16)}
    save_file(base, tmp_path / "base.safetensors")
    save_file({"w": trained(base["w"], 2e-5)}, tmp_path / "tuned.safetensors")
    for folder in ("base.safetensors", "tuned.safetensors"):
        assert (tmp_path / folder).stat().st_size > 500_000
    make_tensor_diff(
        tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "d", DiffOptions()
    )
    assert (tmp_path / "d").stat().st_size < (512 * 512 * 2) / 6
    apply_tensor_diff(
        tmp_path / "base.safetensors", tmp_path / "d", tmp_path / "back.safetensors", DiffOptions()
    )
    assert (tmp_path / "back.safetensors").read_bytes() == (tmp_path / "tuned.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_type(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    base = {"w": (torch.randn(7, 5) * 50).to(dtype), "x": torch.zeros(3, dtype=torch.uint8)}
    tuned = {"w": (torch.randn(9, 5) * 50).to(dtype), "x": torch.ones(3, dtype=torch.uint8)}
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    made = make_diff(
        tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "d", DiffOptions(), None
    )
    assert made.kind == "tuoling"
    apply_diff(tmp_path / "base.safetensors", tmp_path / "d", tmp_path / "back", DiffOptions())
    assert (tmp_path / "back").read_bytes() == (tmp_path / "tuned.safetensors").read_bytes()


def test_the_base_may_lie_in_a_pickle_and_lack_the_prefix(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, tuned = pair
    make_tensor_diff(base, tuned, tmp_path / "d", DiffOptions())
    whole = {
        name: tensor
        for file in sorted(base.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text("{}")
    torch.save(whole, tmp_path / "pickled" / "pytorch_model.bin")
    apply_tensor_diff(tmp_path / "pickled", tmp_path / "d", tmp_path / "out", DiffOptions())
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tuned / "model.safetensors").read_bytes()
    bare = {name.removeprefix("model."): tensor for name, tensor in whole.items()}
    save_file(bare, tmp_path / "bare.safetensors")
    report = make_tensor_diff(tmp_path / "bare.safetensors", tuned, tmp_path / "d2", DiffOptions())
    assert "2 tensors have no like" in " ".join(report.notes)
    assert abs((tmp_path / "d2").stat().st_size - (tmp_path / "d").stat().st_size) < 200


def refused(tmp_path: Path, error: type[TuolingError], said: str, *call: Path, **options: object) -> None:
    before = contents(tmp_path)
    folders = {path for path in tmp_path.rglob("*") if path.is_dir()}
    with pytest.raises(error, match=said):
        apply_diff(*call, DiffOptions(**options))  # type: ignore[arg-type]
    assert contents(tmp_path) == before
    assert {path for path in tmp_path.rglob("*") if path.is_dir()} == folders


def test_a_wrong_base_leaves_nothing(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, tuned = pair
    make_tensor_diff(base, tuned, tmp_path / "d", DiffOptions())
    other = {
        name: tensor.clone() for name, tensor in load_file(base / "model-00001-of-00002.safetensors").items()
    }
    other["model.layer.weight"].view(torch.int16)[3, 3] += 1
    save_file(other, base / "model-00001-of-00002.safetensors")
    refused(
        tmp_path,
        ModelError,
        "not the base of the diff: model.layer.weight",
        base,
        tmp_path / "d",
        tmp_path / "o",
    )
    refused(
        tmp_path,
        ModelError,
        "the base has no tensor",
        _without(tmp_path, base),
        tmp_path / "d",
        tmp_path / "o",
    )


def _without(tmp_path: Path, base: Path) -> Path:
    return base / "model-00002-of-00002.safetensors"


def test_a_damaged_diff_leaves_nothing(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, tuned = pair
    place = tmp_path / "d.safetensors"
    make_tensor_diff(base, tuned, place, DiffOptions())
    whole = place.read_bytes()
    place.write_bytes(whole[:-1])
    refused(tmp_path, TuolingError, "no diff that is known|bytes, should be", base, place, tmp_path / "out")
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    place.write_bytes(bytes(flipped))
    refused(tmp_path, ModelError, "has another hash", base, place, tmp_path / "out")


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../evil", "a\\..\\evil", "..", "", "twice"])
def test_a_record_may_not_lead_out_of_the_folder(tmp_path: Path, pair: tuple[Path, Path], name: str) -> None:
    files = [
        {"name": one, "size_bytes": 1, "parts": [{"name": "x", "size_bytes": 1}], "sha256": "0" * 64}
        for one in ("twice", name)
    ]
    record = {"version": 1, "base_name": "base", "one_file": False, "files": files}
    place = tmp_path / "d.safetensors"
    metadata = {"format": "tuoling-diff", "record": json.dumps(record)}
    save_file({"x": torch.zeros(1, dtype=torch.uint8)}, place, metadata=metadata)
    refused(tmp_path, ModelError, "it would write to", pair[0], place, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "newer than this program"),
        ({"files": None}, "its record cannot be read"),
        ({"files": [{"name": "a", "size_bytes": 2, "parts": [], "sha256": ""}]}, "are not its size"),
        (
            {
                "files": [
                    {"name": "a", "size_bytes": 3, "parts": [{"name": "x", "size_bytes": 3, "item_bytes": 2}]}
                    | {"sha256": ""}
                ]
            },
            "impossible size",
        ),
        (
            {
                "files": [
                    {"name": "a", "size_bytes": 1, "parts": [{"name": "y", "size_bytes": 1}], "sha256": ""}
                ]
            },
            "y is missing",
        ),
    ],
)
def test_records_that_cannot_be(
    tmp_path: Path, pair: tuple[Path, Path], change: dict[str, object], said: str
) -> None:
    record = {"version": 1, "base_name": "base", "one_file": False, "files": [], **change}
    place = tmp_path / "d.safetensors"
    metadata = {"format": "tuoling-diff", "record": json.dumps(record)}
    save_file({"x": torch.zeros(1, dtype=torch.uint8)}, place, metadata=metadata)
    refused(tmp_path, ModelError, said, pair[0], place, tmp_path / "out")


def test_codes_that_lie(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """A stream that is longer or shorter than its plane, or none at all, whatever its hash says."""
    import zlib

    def stream(data: bytes) -> memoryview:
        deflate = zlib.compressobj(1, zlib.DEFLATED, -15)
        code = deflate.compress(data) + deflate.flush()
        return memoryview(len(code).to_bytes(4, "little") + code)

    assert delta_code.decode(stream(b"abcd"), None, 4, 1).tobytes() == b"abcd"
    for code in (
        stream(b"abc"),
        memoryview(b"\x04\0\0\0nope"),
        memoryview(b"\xff\0\0\0"),
        memoryview(b"\x01"),
    ):
        with pytest.raises(delta_code.DamagedCode):
            delta_code.decode(code, None, 4, 1)
    bomb = delta_code.decode(stream(bytes(10_000_000) + b"x"), None, 4, 1)
    assert bomb.tobytes() == bytes(4), "no more is inflated than there is room for"
    with pytest.raises(delta_code.DamagedCode):
        delta_code.split_codes(stream(b"abcd"), 2, 1)


def test_other_files_are_not_read_to_their_end(tmp_path: Path) -> None:
    """A file whose first bytes would be a head of gigabytes."""
    place = tmp_path / "big.bin"
    with place.open("wb") as file:
        file.write((3 << 30).to_bytes(8, "little") + b"{")
        file.truncate(4 << 30)
    assert not tensor_diff.is_tensor_diff(place)


def test_what_cannot_be_made(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, tuned = pair
    save_file({"other": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    for words, error, said in (
        ((tmp_path / "other.safetensors", tuned), ModelError, "no tensor in common"),
        ((base, tmp_path / "pickles"), ModelError, "no safetensors files"),
        ((base, tmp_path / "none"), UsageError, "no such file"),
    ):
        (tmp_path / "pickles").mkdir(exist_ok=True)
        (tmp_path / "pickles" / "pytorch_model.bin").write_bytes(b"x")
        with pytest.raises(error, match=said):
            make_diff(*words, tmp_path / "d", DiffOptions(allow_nan=True), "tuoling")
        assert not (tmp_path / "d").exists()
    with pytest.raises(ModelError, match=r"new\.weight holds NaN") as caught:
        make_diff(base, tuned, tmp_path / "d", DiffOptions(), None)
    assert "--allow-nan" in str(caught.value.remedy) and not (tmp_path / "d").exists()
    make_diff(base, tuned, tmp_path / "d", DiffOptions(allow_nan=True), None)
    with pytest.raises(OutputError, match="already exists"):
        make_tensor_diff(base, tuned, tmp_path / "d", DiffOptions())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("mine")
    refused(tmp_path, OutputError, "already exists", base, tmp_path / "d", tmp_path / "out")
    refused(
        tmp_path, UsageError, "BASE is a folder", base, tmp_path / "d", tmp_path / "o", base_hash="0" * 32
    )


def test_lists(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, tuned = pair
    make_tensor_diff(base, tuned, tmp_path / "d", DiffOptions(checksums_out=tmp_path / "md5.txt"))
    lists = read_checksums(tmp_path / "md5.txt")
    made = hashlib.md5((tmp_path / "d").read_bytes(), usedforsecurity=False).hexdigest()
    assert lists.digests["d"] == made and "config.json" in lists.digests
    apply_tensor_diff(base, tmp_path / "d", tmp_path / "out", DiffOptions(lists=lists))
    for name, said in (("d", "the diff"), ("config.json", "the result")):
        write_checksums(tmp_path / "bad.txt", {name: "0" * 32})
        bad = read_checksums(tmp_path / "bad.txt")
        refused(tmp_path, ModelError, said, base, tmp_path / "d", tmp_path / "o", lists=bad)


@pytest.mark.parametrize("kind", ["tuoling", "xor", "additive"])
def test_a_model_without_one_of_its_shards_is_not_published(
    tmp_path: Path, pair: tuple[Path, Path], kind: str
) -> None:
    """The other way round: the pair's base, in two shards, is the model."""
    whole, sharded = pair[1], pair[0]
    (sharded / "model-00002-of-00002.safetensors").unlink()
    key = whole / "model.safetensors" if kind == "xor" else whole
    with pytest.raises(ModelError, match="missing: model-00002-of-00002"):
        make_diff(key, sharded, tmp_path / "d", DiffOptions(), kind)
    assert not (tmp_path / "d").exists()


def test_the_head_has_room_for_the_record() -> None:
    """Hashes, and sizes of up to fifteen digits, in place of those that were planned."""
    part = tensor_diff.Part('模型.safetensors/w"x', 10**12, 2, "w", None)
    planned = tensor_diff.Record(
        "base", False, (tensor_diff.FileRecord("模型.safetensors", 10**12, (part,)),)
    )
    import dataclasses
    import io

    file = io.BytesIO()
    writer = tensor_diff.DiffWriter(file, planned)
    writer.write(part.name, [b"abc"])
    full = dataclasses.replace(part, base_sha256="f" * 64, sha256="e" * 64)
    writer.finish(
        dataclasses.replace(
            planned, files=(dataclasses.replace(planned.files[0], parts=(full,), sha256="a" * 64),)
        )
    )
    data = file.getvalue()
    length = int.from_bytes(data[:8], "little")
    assert data[8 + length :] == b"abc" and length % 8 == 0
    assert json.loads(data[8 : 8 + length])[part.name]["data_offsets"] == [0, 3]
