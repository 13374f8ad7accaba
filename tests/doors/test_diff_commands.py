"""`tuoling diff` and `tuoling patch` from the outside."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tuoling.cli.main import app


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def meta(tmp_path: Path) -> Path:
    folder = tmp_path / "7B"
    folder.mkdir()
    (folder / "consolidated.00.pth").write_bytes(bytes(range(256)) * 9)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    (folder / "pytorch_model.bin").write_bytes(bytes(range(255, 0, -1)) * 11)
    return folder


def test_a_folder_of_enc_files_there_and_back(tmp_path: Path, meta: Path, model: Path) -> None:
    md5 = tmp_path / "md5.txt"
    made = run("diff", meta, model, tmp_path / "enc", "--format", "xor", "--checksums", md5, "--workers", "2")
    assert made.exit_code == 0, made.output
    assert made.stdout.strip() == str(tmp_path / "enc") and "2 files" in made.stderr
    digest = hashlib.sha256((model / "config.json").read_bytes()).hexdigest()
    assert (tmp_path / "enc" / f"config.json.{digest}.enc").is_file()
    done = run("patch", meta, tmp_path / "enc", tmp_path / "out", "--checksums", md5, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["kind"] == "xor" and [one["name"] for one in report["files"]] == [
        "config.json",
        "pytorch_model.bin",
    ]
    for file in model.iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_a_wrong_base(tmp_path: Path, meta: Path, model: Path) -> None:
    assert run("diff", meta, model, tmp_path / "enc", "--format", "xor").exit_code == 0
    (meta / "consolidated.00.pth").write_bytes(b"another")
    result = run("patch", meta, tmp_path / "enc", tmp_path / "out")
    assert result.exit_code == 1 and "the result is wrong" in result.stderr and result.stdout == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said", "code"),
    [
        (("diff", "7B", "none", "out"), "no such file", 2),
        (("diff", "7B", "model", "out", "--format", "bsdiff"), "no such kind of diff", 2),
        (("diff", "7B", "model", "out", "--format", "xor", "--base-hash", "12"), "not an MD5 or SHA-256", 2),
        (("diff", "7B", "model", "out", "--format", "xor", "--base-hash", "0" * 32), "not the base", 1),
        (("patch", "7B", "model", "out"), "no diff that is known", 1),
    ],
)
def test_bad_calls(
    tmp_path: Path,
    meta: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    said: str,
    code: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*words)
    assert said in result.stderr and result.exit_code == code and result.stdout == "", result.output
    assert not (tmp_path / "out").exists()
