"""The cable between two machines is pulled in the middle of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.faults.machines import (
    Transcript,
    can_be_made,
    losses,
    machines,
    plug_cable,
    pull_cable,
    together,
    wait_for_steps,
)
from tests.tiny import settings_without_chance, sum_rows, tiny_model, write_rows

pytestmark = [pytest.mark.slow, pytest.mark.long]

KEYS: dict[str, Any] = {"max_steps": 30, "batch_size": 8, "save_steps": 5, "timeout_s": 20}


def test_both_machines_say_so_and_the_run_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    if not can_be_made():
        pytest.skip("network namespaces need root and iproute2")
    model = tiny_model(tmp_path / "model", hidden=64)
    data = write_rows(tmp_path / "rows.jsonl", sum_rows(64))
    say = Transcript(shown=False)
    for name in ("straight", "cut"):
        settings = settings_without_chance(tmp_path / name, model, data, {**KEYS, "logging_steps": 10})
        (tmp_path / f"{name}.json").write_text(json.dumps(settings), encoding="utf-8")
    run = tmp_path / "cut" / "run"
    with machines():
        assert [machine.wait() for machine in together(tmp_path, say, "train", "straight.json")] == [0, 0], (
            say.lines
        )
        both = together(tmp_path, say, "train", "cut.json")
        wait_for_steps(run, 12)
        pull_cable()
        assert [machine.wait() for machine in both] == [1, 1], say.lines
        said = "\n".join(say.lines)
        assert "Traceback" not in said and "tuoling resume RUN --nnodes N" in said
        assert json.loads((run / "run.json").read_text(encoding="utf-8"))["status"] == "failed"
        plug_cable()
        assert [machine.wait() for machine in together(tmp_path, say, "resume", str(run))] == [0, 0], (
            say.lines
        )
    straight = losses(tmp_path / "straight" / "run")
    assert len(straight) == KEYS["max_steps"] and losses(run) == straight
    weights = [
        (folder / "adapter_model.safetensors").read_bytes() for folder in (tmp_path / "straight" / "run", run)
    ]
    assert weights[0] == weights[1]
