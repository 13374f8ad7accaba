"""`tuoling report` on run folders and on other people's trainer_state.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tuoling.cli.main import app

LOG = [
    {"step": 10, "loss": 3.0, "learning_rate": 1e-4},
    {"step": 10, "eval_loss": 2.75},
    {"step": 20, "loss": 1.0, "learning_rate": 5e-5},
    {"step": 30, "loss": 2.0, "learning_rate": 0.0},
    {"step": 30, "train_loss": 2.0, "train_runtime": 1.0},
]


def report(*words: object) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, words)])


@pytest.mark.slow
def test_a_run_folder(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in LOG))
    result = report(tmp_path)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "training_loss.png").stat().st_size > 10_000
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["train", "loss", "3.0000", "2.0000", "1.0000", "20"] in lines
    assert ["eval", "loss", "2.7500", "2.7500", "2.7500", "10"] in lines
    assert str(tmp_path / "training_loss.png") in result.stdout.replace("\n", "")


@pytest.mark.slow
def test_a_trainer_state_and_json(tmp_path: Path) -> None:
    state = tmp_path / "trainer_state.json"
    state.write_text(json.dumps({"log_history": LOG, "global_step": 30}))
    result = report(state, "--json", "--out", tmp_path / "sub" / "loss.png")
    found = json.loads(result.stdout)
    assert found["steps"] == 30 and found["learning_rate_highest"] == 1e-4
    assert found["loss"] == {"first": 3.0, "last": 2.0, "lowest": 1.0, "lowest_step": 20}
    assert Path(found["picture"]).is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sub", "trainer_state.json"]


def test_bad_input(tmp_path: Path) -> None:
    empty = tmp_path / "trainer_state.json"
    empty.write_text('{"log_history": []}')
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    for path, says in (
        (empty, "no loss in it"),
        (broken, "not JSON"),
        (tmp_path / "no", "no such file"),
        (tmp_path / "metrics.jsonl", "no such file"),
    ):
        result = report(path)
        assert result.exit_code == 1 and says in result.stderr, result.output
        assert path.name in result.stderr and "training_loss.png" not in result.stderr
        assert result.stdout == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.json", "trainer_state.json"]
