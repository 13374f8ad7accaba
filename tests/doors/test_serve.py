"""`tuoling serve` from the outside."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
from tests.tiny import tiny_model
from typer.testing import CliRunner

from tuoling.cli.main import app


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("serve") / "base", "llama")


def refused(*words: object) -> str:
    result = CliRunner().invoke(app, ["serve", *map(str, words)])
    assert result.exit_code in (1, 2), result.output
    assert "Traceback" not in result.output
    return result.output


def test_what_cannot_be_served_is_said(model: Path, tmp_path: Path) -> None:
    assert "MODEL" in refused().upper()
    assert "nowhere" in refused(tmp_path / "nowhere", "--port", "0")
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(tmp_path / "empty", "--port", "0")
    assert "vllm serve" in refused(model, "--engine", "vllm")
    assert "llama.cpp runs GGUF files" in refused(model, "--engine", "llama.cpp", "--port", "0")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        output = refused(model, "--port", port)
    assert "cannot listen" in output and f"127.0.0.1:{port}" in output
    assert "cannot listen" in refused(model, "--host", "192.0.2.1", "--port", "0")


@pytest.mark.slow
def test_it_answers_and_ends_when_told(model: Path, tmp_path: Path) -> None:
    """Its own words go to stderr without what was asked; SIGTERM lets a stream finish; the exit code is 0."""
    words = [sys.executable, "-m", "tuoling", "serve", str(model), "--port", "0", "--device", "cpu"]
    words += ["--dtype", "fp32", "--template", "domain_bloom", "--key-file", str(tmp_path / "keys.json")]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said: list[str] = []
    url = ""
    client = httpx.Client(trust_env=False, verify=False, timeout=60)
    for line in process.stderr:
        said.append(line)
        if "/v1" in line:
            url = next(word for word in line.split() if word.startswith("http")).removesuffix("/v1")
            break
    try:
        asked = {
            "model": "base",
            "messages": [{"role": "user", "content": "谁也不该看到"}],
            "max_tokens": 200,
            "min_tokens": 200,
            "stream": True,
        }
        asking = client.stream("POST", f"{url}/v1/chat/completions", json=asked)
        with client, asking as answer:
            lines = answer.iter_lines()
            assert json.loads(next(lines)[6:])["model"] == "base"
            rest = threading.Thread(target=lambda: said.extend(process.stderr or ()))
            rest.start()
            process.send_signal(signal.SIGTERM)
            last = [line for line in lines if line][-1]
        assert last == "data: [DONE]"
        assert process.wait(60) == 0
        rest.join(10)
    finally:
        process.kill()
    log = "".join(said)
    assert "POST /v1/chat/completions 200" in log and "谁也不该看到" not in log
    assert not (tmp_path / "keys.json").exists()
