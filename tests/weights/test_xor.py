"""XOR diffs against a byte-by-byte reference that is written from the format's description alone."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tuoling.errors import DataError, ModelError, OutputError, TuolingError, UsageError
from tuoling.weights import xor, xor_folder
from tuoling.weights.checksums import check_base, read_checksums, write_checksums
from tuoling.weights.diff_options import DiffOptions
from tuoling.weights.xor_folder import apply_xor_diff, make_xor_diff

BLOCK = 40


def slow_xor(data: bytes, key: bytes, block: int = BLOCK) -> bytes:
    """Block i of the data meets block i (from the start again at the end) of the key; a short one is repeated."""
    blocks = [key[start : start + block] for start in range(0, len(key), block)]
    out = bytearray()
    for position, byte in enumerate(data):
        part = blocks[position // block % len(blocks)]
        out.append(byte ^ part[position % block % len(part)])
    return bytes(out)


def slow_encrypt(data: bytes, key: bytes, block: int = BLOCK) -> bytes:
    return hashlib.sha256(data).digest() + slow_xor(data, key, block)


def encrypted_name(name: str, data: bytes) -> str:
    return f"{name}.{hashlib.sha256(data).hexdigest()}.enc"


def noise(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def diff(base: Path, target: Path, out: Path, **options: object) -> object:
    return make_xor_diff(base, target, out, DiffOptions(**options), block_bytes=BLOCK)  # type: ignore[arg-type]


def patch(base: Path, made: Path, out: Path, **options: object) -> object:
    return apply_xor_diff(base, made, out, DiffOptions(**options), block_bytes=BLOCK)  # type: ignore[arg-type]


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "consolidated.00.pth"
    path.write_bytes(noise(BLOCK * 3 + 7, 1))
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with files of all sizes, one of them in a folder below."""
    folder = tmp_path / "model"
    for number, (name, size) in enumerate(
        {
            "config.json": 61,
            "pytorch_model-00001-of-00002.bin": 1000,
            "pytorch_model-00002-of-00002.bin": 777,
            "empty": 0,
            "one": 1,
            "below/tokenizer.model": 300,
        }.items()
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(noise(size, 10 + number))
    return folder


@pytest.mark.slow
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.one_of(st.integers(0, 3), st.integers(0, 400)),
    key_size=st.one_of(st.sampled_from([1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK]), st.integers(1, 400)),
    block=st.sampled_from([1, 7, BLOCK, 100]),
    chunk=st.sampled_from([1, 3, 16, 64, 1 << 20]),
    workers=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_any_pair_equals_the_reference(
    tmp_path_factory: pytest.TempPathFactory,
    size: int,
    key_size: int,
    block: int,
    chunk: int,
    workers: int,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("pair")
    data, key = noise(size, seed), noise(key_size, seed + 1)
    (folder / "key").write_bytes(key)
    (folder / "model.bin").write_bytes(data)
    options = DiffOptions(workers=workers)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(xor, "CHUNK_BYTES", chunk)
        make_xor_diff(folder / "key", folder / "model.bin", folder / "enc", options, block_bytes=block)
        assert contents(folder / "enc") == {encrypted_name("model.bin", data): slow_encrypt(data, key, block)}
        apply_xor_diff(folder / "key", folder / "enc", folder / "out", options, block_bytes=block)
    assert contents(folder / "out") == {"model.bin": data}


@pytest.mark.slow
@pytest.mark.parametrize(
    "key_size", [(10 << 20) + 12_345, *(pytest.param(size << 20, marks=pytest.mark.long) for size in (3, 25))]
)
def test_the_real_block_size(tmp_path: Path, key_size: int) -> None:
    """10 MiB blocks; the reference repeats whole blocks, since a byte at a time would take minutes."""
    size = (31 << 20) + 5
    data, key = noise(size, 3), noise(key_size, 4)
    (tmp_path / "key").write_bytes(key)
    (tmp_path / "model.bin").write_bytes(data)
    block = 10 * 1024 * 1024
    stream = b""
    while len(stream) < size:
        for start in range(0, len(key), block):
            part = key[start : start + block]
            stream += (part * (block // len(part) + 1))[:block]
    mixed = int.from_bytes(data, "little") ^ int.from_bytes(stream[:size], "little")
    expected = hashlib.sha256(data).digest() + mixed.to_bytes(size, "little")
    made = make_xor_diff(tmp_path / "key", tmp_path / "model.bin", tmp_path / "enc", DiffOptions())
    place = tmp_path / "enc" / encrypted_name("model.bin", data)
    assert [one.name for one in made.files] == [place.name]
    assert place.read_bytes() == expected
    apply_xor_diff(tmp_path / "key", place, tmp_path / "again.bin", DiffOptions())
    assert (tmp_path / "again.bin").read_bytes() == data


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_folder_there_and_back(tmp_path: Path, key: Path, model: Path, workers: int) -> None:
    (model / ".cache").mkdir()
    (model / ".cache" / "state").write_bytes(b"not ours")
    made = diff(key, model, tmp_path / "enc", workers=workers)
    plain = {name: data for name, data in contents(model).items() if not name.startswith(".")}
    assert contents(tmp_path / "enc") == {
        encrypted_name(name, data): slow_encrypt(data, key.read_bytes()) for name, data in plain.items()
    }
    assert made.left_out == [".cache/state"]  # type: ignore[attr-defined]
    (tmp_path / "enc" / "README.md").write_text("how to")
    report = patch(key, tmp_path / "enc", tmp_path / "out", workers=workers)
    assert contents(tmp_path / "out") == plain
    assert report.left_out == ["README.md"]  # type: ignore[attr-defined]


@pytest.mark.slow
def test_the_first_shard_of_a_folder_is_the_base(tmp_path: Path, key: Path, model: Path) -> None:
    diff(key.parent, model, tmp_path / "enc")
    patch(key, tmp_path / "enc", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(model)
    with pytest.raises(ModelError, match="made against one file"):
        patch(model, tmp_path / "enc", tmp_path / "out2")


def test_where_one_file_goes(tmp_path: Path, key: Path, model: Path) -> None:
    data = (model / "config.json").read_bytes()
    (tmp_path / "there").mkdir()
    diff(key, model / "config.json", tmp_path / "named.enc")
    diff(key, model / "config.json", tmp_path / "folder")
    assert (tmp_path / "named.enc").read_bytes() == slow_encrypt(data, key.read_bytes())
    encrypted = tmp_path / "folder" / encrypted_name("config.json", data)
    patch(key, encrypted, tmp_path / "there")
    patch(key, tmp_path / "named.enc", tmp_path / "there" / "other.json")
    assert contents(tmp_path / "there") == {"config.json": data, "other.json": data}


def refused(tmp_path: Path, error: type[TuolingError], said: str, *call: Path, **options: object) -> None:
    """The call is refused, and everything below tmp_path is as it was."""
    before, folders = contents(tmp_path), {path for path in tmp_path.rglob("*") if path.is_dir()}
    with pytest.raises(error, match=said):
        patch(*call, **options)  # type: ignore[arg-type]
    after = {name: data for name, data in contents(tmp_path).items() if not name.startswith("tuoling-cache")}
    assert after == {name: data for name, data in before.items() if not name.startswith("tuoling-cache")}
    now = {path for path in tmp_path.rglob("*") if path.is_dir() and "tuoling-cache" not in path.parts}
    assert now == {path for path in folders if "tuoling-cache" not in path.parts}


@pytest.fixture
def encrypted(tmp_path: Path, key: Path, model: Path) -> Path:
    diff(key, model, tmp_path / "enc")
    return tmp_path / "enc"


@pytest.mark.slow
def test_a_wrong_base_leaves_nothing(tmp_path: Path, key: Path, encrypted: Path) -> None:
    other = tmp_path / "other.pth"
    other.write_bytes(noise(BLOCK * 3 + 7, 2))
    refused(tmp_path, ModelError, "the result is wrong", other, encrypted, tmp_path / "a" / "b" / "out")
    other.write_bytes(key.read_bytes()[:-1])  # cut by one byte: right up to the last block
    refused(tmp_path, ModelError, "the result is wrong", other, encrypted, tmp_path / "out")
    other.write_bytes(b"")
    refused(tmp_path, ModelError, "the base is empty", other, encrypted, tmp_path / "out")


@pytest.mark.slow
def test_a_cut_or_changed_file_leaves_nothing(tmp_path: Path, key: Path, encrypted: Path) -> None:
    victim = next(encrypted.glob("pytorch_model-00001*"))
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-1])
    refused(tmp_path, ModelError, "the result is wrong", key, encrypted, tmp_path / "out")
    victim.write_bytes(whole[:20])
    refused(tmp_path, ModelError, "32 bytes of hash; this file has 20", key, encrypted, tmp_path / "out")
    victim.write_bytes(whole[:500] + bytes([whole[500] ^ 1]) + whole[501:])
    refused(tmp_path, ModelError, "the result is wrong", key, encrypted, tmp_path / "out")
    victim.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    refused(tmp_path, ModelError, "its name says another", key, encrypted, tmp_path / "out")
    victim.write_bytes(whole)
    (encrypted / f"pytorch_model-00001-of-00002.bin.{'0' * 64}.enc").write_bytes(whole)
    refused(tmp_path, ModelError, "two diffs of pytorch_model", key, encrypted, tmp_path / "out")


@pytest.mark.slow
def test_what_is_there_is_kept(tmp_path: Path, key: Path, model: Path, encrypted: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("mine")
    (out / "notes.txt").write_text("mine too")
    refused(tmp_path, OutputError, "already exists", key, encrypted, out)
    patch(key, encrypted, out, replace=True)
    assert contents(out) == {**contents(model), "notes.txt": b"mine too"}
    with pytest.raises(OutputError, match="already exists"):
        diff(key, model, encrypted)


@pytest.mark.slow
def test_force_takes_the_old_diffs_away(tmp_path: Path, key: Path, model: Path, encrypted: Path) -> None:
    """They have the old hash in their names; two diffs of one file could not be applied."""
    (model / "config.json").write_bytes(b"changed")
    diff(key, model, encrypted, replace=True)
    assert len(contents(encrypted)) == len(contents(model))
    patch(key, encrypted, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(model)


@pytest.mark.slow
def test_a_wrong_base_shows_on_the_smallest_file(
    tmp_path: Path, key: Path, encrypted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    decrypt = xor_folder.decrypt_file

    def told(item: xor.XorFile, mixer: xor.Mixer, *, staging: Path) -> object:
        read.append(item.plain_name)
        return decrypt(item, mixer, staging=staging)

    monkeypatch.setattr(xor_folder, "decrypt_file", told)
    next(encrypted.glob("empty.*")).unlink()
    patch(key, encrypted, tmp_path / "out")
    assert read[0] == "one" and read[1] == "pytorch_model-00001-of-00002.bin"
    read.clear()
    other = tmp_path / "other.pth"
    other.write_bytes(bytes(byte ^ 1 for byte in key.read_bytes()))
    refused(tmp_path, ModelError, "the result is wrong", other, encrypted, tmp_path / "out2", workers=3)
    assert read == ["one"]


@pytest.mark.slow
def test_places_that_cannot_be_written(tmp_path: Path, key: Path, encrypted: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    refused(tmp_path, OutputError, "cannot write", key, encrypted, tmp_path / "file" / "out")
    refused(tmp_path, OutputError, "cannot write", key, encrypted, Path("/proc/none"))


@pytest.mark.slow
def test_a_full_disk_is_told_before(
    tmp_path: Path, key: Path, encrypted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xor_folder.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100})())
    refused(tmp_path, OutputError, "the result needs", key, encrypted, tmp_path / "out")


def test_calls_without_input(tmp_path: Path, key: Path, model: Path) -> None:
    refused(tmp_path, UsageError, "no such file", key, tmp_path / "none", tmp_path / "out")
    refused(tmp_path, UsageError, "no such file", tmp_path / "none", model / "one", tmp_path / "out")
    refused(tmp_path, ModelError, "no .enc files", key, model, tmp_path / "out")


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


@pytest.mark.slow
def test_the_list_that_diff_writes_is_the_one_that_patch_checks(
    tmp_path: Path, key: Path, model: Path
) -> None:
    listed = tmp_path / "md5.txt"
    diff(key, model, tmp_path / "enc", checksums_out=listed)
    digests = read_checksums(listed).digests
    stages = {key.name: key.read_bytes(), **contents(model), **contents(tmp_path / "enc")}
    assert digests == {name: md5(data) for name, data in stages.items()}
    report = patch(key, tmp_path / "enc", tmp_path / "out", lists=read_checksums(listed))
    assert contents(tmp_path / "out") == contents(model)
    assert digests[key.name] in str(report.base_checked_by)  # type: ignore[attr-defined]


def test_a_result_with_the_name_of_the_base(tmp_path: Path, key: Path) -> None:
    """A fine-tuned consolidated.00.pth: the list speaks of the result, not of the base."""
    (tmp_path / "tuned").mkdir()
    tuned = tmp_path / "tuned" / key.name
    tuned.write_bytes(noise(500, 9))
    diff(key, tuned, tmp_path / "enc", checksums_out=tmp_path / "md5.txt")
    lists = read_checksums(tmp_path / "md5.txt")
    patch(key, tmp_path / "enc", tmp_path / "out", lists=lists)
    assert (tmp_path / "out" / key.name).read_bytes() == tuned.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "said"), [("consolidated.00.pth", "not the base"), ("one", "the result"), ("one.*", "the diff")]
)
def test_each_stage_is_compared_with_the_list(
    tmp_path: Path, key: Path, model: Path, encrypted: Path, stage: str, said: str
) -> None:
    name = stage if "*" not in stage else next(encrypted.glob(stage)).name
    write_checksums(tmp_path / "md5.txt", {name: "0" * 32})
    lists = read_checksums(tmp_path / "md5.txt")
    refused(tmp_path, ModelError, said, key, encrypted, tmp_path / "out", lists=lists)


@pytest.mark.slow
def test_a_missing_shard_of_the_list(tmp_path: Path, key: Path, encrypted: Path) -> None:
    write_checksums(tmp_path / "md5.txt", {f"third.bin.{'1' * 64}.enc": "0" * 32})
    lists = read_checksums(tmp_path / "md5.txt")
    refused(
        tmp_path, ModelError, "are not here; the first: third", key, encrypted, tmp_path / "o", lists=lists
    )


def test_lists_of_every_shape(tmp_path: Path) -> None:
    listed = tmp_path / "list"
    listed.write_text(
        f"# md5 of the files\n{'A' * 32}  ./config.json\n{'b' * 32} *model.bin\nMD5 (x y) = {'c' * 32}\n"
        f"{'d' * 64}  below/z\n",
        encoding="utf-8",
    )
    lists = read_checksums(listed)
    assert lists.digests == {
        "config.json": "a" * 32,
        "model.bin": "b" * 32,
        "x y": "c" * 32,
        "below/z": "d" * 64,
    }
    assert lists.expected("some/config.json") == "a" * 32 and lists.expected("z") is None
    listed.write_text("nothing", encoding="utf-8")
    with pytest.raises(DataError, match="no checksum"):
        read_checksums(listed)
    listed.write_text(f"{'a' * 32}  x\n{'b' * 32}  ./x\n", encoding="utf-8")
    with pytest.raises(DataError, match="twice"):
        read_checksums(listed)


@pytest.mark.slow
def test_the_base_is_compared_before_anything_is_read(tmp_path: Path, key: Path, encrypted: Path) -> None:
    right = md5(key.read_bytes())
    assert patch(key, encrypted, tmp_path / "a", base_hash=right).base_checked_by  # type: ignore[attr-defined]
    sha = hashlib.sha256(key.read_bytes()).hexdigest()
    assert patch(key, encrypted, tmp_path / "b", base_hash=sha).base_checked_by  # type: ignore[attr-defined]
    refused(tmp_path, ModelError, "not the base", key, encrypted, tmp_path / "c", base_hash="0" * 32)
    write_checksums(key.with_name("checklist.chk"), {key.name: "0" * 32, "params.json": "1" * 32})
    refused(tmp_path, ModelError, "checklist.chk says", key, encrypted, tmp_path / "c")
    patch(key, encrypted, tmp_path / "c", check_base=False)
    write_checksums(key.with_name("checklist.chk"), {key.name: right})
    report = patch(key, encrypted, tmp_path / "d")
    assert "checklist.chk" in str(report.base_checked_by)  # type: ignore[attr-defined]


def test_the_hash_of_the_base_is_computed_once(
    tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuoling.weights import checksums

    calls = []
    digest = hashlib.file_digest
    monkeypatch.setattr(
        checksums.hashlib, "file_digest", lambda *words: calls.append(words) or digest(*words)
    )
    right = md5(key.read_bytes())
    check_base(key, right, None)
    check_base(key, right, None)
    assert len(calls) == 1
    key.write_bytes(key.read_bytes() + b"x")
    with pytest.raises(ModelError, match="not the base"):
        check_base(key, right, None)
    assert len(calls) == 2


@pytest.mark.slow
def test_an_error_in_one_file_stops_the_others(
    tmp_path: Path, key: Path, encrypted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader of one file fails in the middle of it; nothing is left of those that were done."""
    fill = xor.fill

    def failing(file: object, out: object, path: Path) -> None:
        if path.name.startswith("pytorch_model-00002"):
            raise OSError(5, "Input/output error")
        fill(file, out, path)  # type: ignore[arg-type]

    monkeypatch.setattr(xor, "fill", failing)
    refused(tmp_path, OutputError, "Input/output error", key, encrypted, tmp_path / "out", workers=2)
