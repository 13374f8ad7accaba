"""`tuoling prune-vocab` and `grow-vocab` as they are typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import sum_rows, tiny_model, write_rows
from typer.testing import CliRunner

from tuoling.cli.main import app


def tuoling(*words: str) -> Any:
    """Run the command line."""
    return CliRunner().invoke(app, list(words))


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("gate_here")
def test_prune_and_restore(tmp_path: Path) -> None:
    tiny_model(tmp_path / "full", "llama")
    for name, start in (("a.jsonl", 0), ("b.jsonl", 50)):
        write_rows(tmp_path / name, sum_rows(20, start))
    words = ["prune-vocab", "full", "small", "--keep", "a.jsonl", "b.jsonl", "--base", "ascii", "--json"]
    done = tuoling(*words)
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["corpus"]["rows"] == report["corpus"]["rows_same"] == 40, "both files are kept"
    assert report["parity"]["passed"] is True
    assert report["parity"]["max_logit_difference"] == 0.0
    assert "40 of 40 rows give the same tokens" in done.stderr
    done = tuoling("prune-vocab", "--restore", "small", "full", "back")
    assert done.exit_code == 0, done.stderr
    assert "words were never trained" in done.stderr
    assert "back: model for 320 words" in done.stdout


def test_wrong_calls_say_so_and_leave_nothing(tmp_path: Path) -> None:
    tiny_model(tmp_path / "full", "llama")
    write_rows(tmp_path / "a.jsonl", sum_rows(5))
    for words, code, said in (
        (["full", "small"], 2, "no rows to keep"),
        (["full", "small", "--keep", "a.jsonl", "--base", "all"], 2, "ascii | common | gb2312"),
        (["full", "small", "--keep", "b.jsonl"], 1, "a.jsonl"),
        (["full", "full", "--keep", "a.jsonl"], 1, "already exists"),
        (["--restore", "full", "full", "back"], 1, "vocabulary_map.json"),
        (["--restore", "full", "full"], 2, "three places"),
    ):
        done = tuoling("prune-vocab", *words)
        assert (done.exit_code, said in done.stderr) == (code, True), (words, done.stderr)
    left = {path.name for path in tmp_path.iterdir()} - {"tuoling-cache"}
    assert left == {"a.jsonl", "full"}
