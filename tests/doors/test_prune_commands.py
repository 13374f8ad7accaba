"""`tuoling prune-vocab` and `grow-vocab` as they are typed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.tiny import sum_rows, tiny_model, write_rows


def tuoling(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command line in English."""
    return subprocess.run(
        [sys.executable, "-m", "tuoling", *words],
        cwd=cwd,
        env={**os.environ, "TUOLING_LANG": "en"},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_prune_and_restore(tmp_path: Path) -> None:
    tiny_model(tmp_path / "full", "llama")
    for name, start in (("a.jsonl", 0), ("b.jsonl", 50)):
        write_rows(tmp_path / name, sum_rows(20, start))
    words = ["prune-vocab", "full", "small", "--keep", "a.jsonl", "b.jsonl", "--base", "ascii", "--json"]
    done = tuoling(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["corpus"]["rows"] == report["corpus"]["rows_same"] == 40, "both files are kept"
    assert report["parity"]["passed"] is True
    assert report["parity"]["max_logit_difference"] == 0.0
    assert "40 of 40 rows give the same tokens" in done.stderr
    done = tuoling("prune-vocab", "--restore", "small", "full", "back", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "words were never trained" in done.stderr
    assert "back: model for 320 words" in done.stdout


@pytest.mark.slow
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
        done = tuoling("prune-vocab", *words, cwd=tmp_path)
        assert (done.returncode, said in done.stderr) == (code, True), (words, done.stderr)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "full"]
