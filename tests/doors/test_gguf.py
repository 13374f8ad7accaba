"""From a fine-tuned run to a 4-bit file that chats, through the commands of the guide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.gguf_files import adapter_of
from tests.tiny import tiny_model, write_rows
from typer.testing import CliRunner

from tuoling.cli.main import app
from tuoling.files import read_json, write_json

pytest.importorskip("gguf", reason="needs the extra gguf")


def call(*words: object, lines: str = "") -> Any:
    return CliRunner().invoke(app, [str(word) for word in words], input=lines)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a LoRA adapter on a model whose rows are multiples of 32."""
    place = tmp_path_factory.mktemp("gguf")
    base = tiny_model(place / "base", "llama", hidden=64)
    folder = adapter_of(base, place / "run", ["q_proj", "v_proj", "down_proj"])
    write_json(
        folder / "run.json", {"config": {}, "seed": 7, "base": {"named": "base", "config_sha256": "ab"}}
    )
    return folder


@pytest.mark.slow
def test_one_command_to_four_bits_and_one_to_chat(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="needs the extra gguf")
    file = tmp_path / "first.gguf"
    # random weights answer at random in four bits: the gate is for trained ones
    result = call("convert", run, file, "--outtype", "q4_0", "--no-verify", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["tensors"] == 21 and report["size_bytes"] == file.stat().st_size
    result = call("chat", file, "--max-new-tokens", 8, lines="你好\n再见\n")
    assert result.exit_code == 0, result.output
    assert "template domain_bloom, saved with the model" in result.stderr
    rows = write_rows(tmp_path / "rows.jsonl", [{"instruction": "你好", "input": "", "output": "好"}])
    result = call("predict", file, "--data", rows, "--out", tmp_path / "p.json", "--max-new-tokens", 8)
    assert result.exit_code == 0, result.output
    assert read_json(tmp_path / "p.json")[0]["input"] == "用户:你好\n\n助手:"
    provenance = read_gguf_field(file, "tuoling.provenance")
    assert provenance["seed"] == 7 and provenance["base"]["config_sha256"] == "ab"


def read_gguf_field(file: Path, key: str) -> Any:
    import gguf

    return json.loads(gguf.GGUFReader(str(file)).fields[key].contents())


def test_without_proof_that_is_written_down(run: Path, tmp_path: Path) -> None:
    result = call("convert", run, tmp_path / "m.gguf", "--outtype", "q8_0", "--no-verify")
    assert result.exit_code == 0, result.output
    assert read_json(tmp_path / "m.gguf.parity.json") == {"verified": False, "why": "--no-verify"}


def test_bad_calls_and_bad_files_leave_nothing(run: Path, tmp_path: Path) -> None:
    result = call("convert", run, tmp_path / "m.gguf", "--outtype", "q9")
    assert result.exit_code == 2 and "q4_k_m" in result.stderr
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\x03\x00\x00\x00" + b"\x00" * 40)
    result = call("chat", tmp_path / "bad.gguf", lines="你好\n")
    assert result.exit_code == 1 and "llama" in result.stderr.lower()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["bad.gguf"]
