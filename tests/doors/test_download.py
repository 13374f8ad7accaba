"""`tuoling download` from the outside, and after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from tests.fake_hubs import MODEL_ID, FakeHub, serve
from tests.tiny import tiny_model
from typer.testing import CliRunner

from tuoling.cli.main import app


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    tiny_model(tmp_path / "remote", "bloom")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf-cache"))
    with serve(tmp_path / "remote") as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", running.url)
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("source", ["hf", "modelscope"])
def test_download_then_chat_by_id(hub: FakeHub, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(app, ["download", MODEL_ID, "--source", source])
    assert result.exit_code == 0, result.output
    folder = Path(result.stdout.strip())
    assert (folder / "model.safetensors").read_bytes() == (hub.folder / "model.safetensors").read_bytes()
    assert "every checksum is right" in result.stderr and hub.url in result.stderr
    if source == "modelscope":
        monkeypatch.setenv("TUOLING_HUB", "modelscope")
    hub.requests.clear()
    words = ["chat", MODEL_ID, "--max-new-tokens", "2", "--device", "cpu"]
    assert CliRunner().invoke(app, words, input="你好\n").exit_code == 0
    assert hub.requests == []


@pytest.mark.slow
def test_download_into_a_folder(hub: FakeHub, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["download", MODEL_ID, "--to", str(tmp_path / "to")])
    assert result.exit_code == 0 and result.stdout.strip() == str(tmp_path / "to")
    assert (tmp_path / "to" / "config.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said", "code"),
    [
        (("./folder",), "not a hub id", 2),
        ((MODEL_ID, "--source", "gitee"), "hf or modelscope", 2),
        (("tuoling/none",), "no such model", 1),
        ((MODEL_ID, "--to", "/proc/none"), "cannot write", 1),
    ],
)
def test_bad_calls(hub: FakeHub, words: tuple[str, ...], said: str, code: int) -> None:
    result = CliRunner().invoke(app, ["download", *words])
    assert said in result.stderr and result.exit_code == code and result.stdout == ""


@pytest.mark.slow
def test_killed_midway_goes_on(hub: FakeHub, tmp_path: Path) -> None:
    """The first process is killed while the server holds back the rest of the file."""
    big = hub.folder / "model.safetensors"
    big.write_bytes(os.urandom(3 << 20))
    hub.stall[big.name] = 2 << 20
    env = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    words = [sys.executable, "-m", "tuoling", "download", MODEL_ID, "--to", str(tmp_path / "to")]
    started = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    parts: list[Path] = []
    while time.monotonic() < deadline and not any(part.stat().st_size >= 1 << 20 for part in parts):
        time.sleep(0.02)
        parts = list((tmp_path / "to").rglob("*.part"))
    started.send_signal(signal.SIGKILL)
    started.wait()
    hub.release.set()
    assert not (tmp_path / "to" / big.name).exists()
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "to" / big.name).read_bytes() == big.read_bytes()
    ranges = [asked for name, asked in hub.fetched if name == big.name]
    assert ranges[0] is None and ranges[-1] is not None, "the second process asked only for the rest"
