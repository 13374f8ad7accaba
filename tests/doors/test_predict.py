"""`tuoling predict` from the outside, and after a kill."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.devices import DEVICES
from tests.tiny import sum_rows, tiny_model, write_rows
from typer.testing import CliRunner

from tuoling.api import load
from tuoling.cli.main import app


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("predict") / "m", "bloom")


OPTIONS = ("--dtype", "fp32", "--template", "domain_bloom", "--max-new-tokens", "8")


def predict(*words: object, device: str = "cpu") -> Any:
    return CliRunner().invoke(app, ["predict", *map(str, words), "--device", device, *OPTIONS])


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_predictions_equal_the_python_interface(model: Path, tmp_path: Path, device: str) -> None:
    rows = sum_rows(5)
    data = write_rows(tmp_path / "test.json", rows)
    words = (model, "--data", data, "--out", tmp_path / "p.json", "--batch-size", 2, "--json")
    result = predict(*words, device=device)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["rows"], report["predicted"], report["too_long"]) == (5, 5, [])
    assert report["predictions"] == str(tmp_path / "p.json") and report["tokens"] > 0
    written = json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))
    with load(model, template="domain_bloom", device=device, dtype="fp32") as loaded:
        assert written == loaded.predict(rows, max_new_tokens=8, batch_size=1)
        assert written[3]["predict"] == loaded.chat(rows[3]["instruction"], max_new_tokens=8)
    assert written[0]["input"] == f"用户:{rows[0]['instruction']}\n\n助手:"
    assert [row["target"] for row in written] == [row["output"] for row in rows]


@pytest.mark.slow
def test_a_run_gets_its_file_inside(model: Path, tmp_path: Path) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(model, run)
    (run / "run.json").write_text("{}", encoding="utf-8")
    data = write_rows(tmp_path / "test.json", sum_rows(1))
    assert predict(run, "--data", data).exit_code == 0
    assert len(json.loads((run / "predictions.json").read_text(encoding="utf-8"))) == 1


@pytest.mark.slow
def test_rows_that_cannot_be_asked_make_the_exit_code_1(model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "test.json", [*sum_rows(2), {"instruction": "", "output": "x"}])
    result = predict(model, "--data", data, "--out", tmp_path / "p.json")
    assert result.exit_code == 1 and f"left out: {data}:3" in result.stderr
    assert "1 of 3 rows have no prediction" in result.stderr
    assert len(json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))) == 2


@pytest.mark.parametrize("content", [None, b"", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"])
def test_test_files_that_are_none(model: Path, tmp_path: Path, content: bytes | None) -> None:
    data = tmp_path / "test.json"
    if content is not None:
        data.write_bytes(content)
    result = predict(model, "--data", data, "--out", tmp_path / "p.json")
    assert result.exit_code == 1 and str(data) in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "p.json").exists()


def test_a_place_that_cannot_be_written(model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "test.json", sum_rows(1))
    result = predict(model, "--data", data, "--out", "/proc/none/p.json")
    assert result.exit_code == 1 and "cannot write" in result.stderr


def test_no_data_is_a_wrong_call(model: Path) -> None:
    assert predict(model).exit_code == 2


KILLED = """
import os, signal, sys
from tuoling.cli.main import main
from tuoling.infer.torch_engine import TorchEngine

generate, answered = TorchEngine.generate, []

def until_the_fourth(*asked, **options):
    if len(answered) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    answered.append(1)
    return generate(*asked, **options)

TorchEngine.generate = until_the_fourth
sys.argv = ["tuoling", *sys.argv[1:]]
main()
"""


@pytest.mark.slow
def test_killed_midway_and_started_again(model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "test.json", sum_rows(10))
    words = ["predict", str(model), "--data", str(data), "--batch-size", "1"]
    words += ["--out", str(tmp_path / "p.json"), *OPTIONS, "--json"]
    partial = tmp_path / ".p.json.partial.jsonl"
    killed = subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert partial.read_bytes().count(b"\n") == 3 and not (tmp_path / "p.json").exists()
    done = subprocess.run([sys.executable, "-m", "tuoling", *words], capture_output=True, check=True)
    report = json.loads(done.stdout)
    assert (report["reused"], report["predicted"]) == (3, 7)
    with load(model, template="domain_bloom", device="cpu", dtype="fp32") as loaded:
        straight = loaded.predict(sum_rows(10), max_new_tokens=8)
    assert json.loads((tmp_path / "p.json").read_text(encoding="utf-8")) == straight
    assert not partial.exists()
