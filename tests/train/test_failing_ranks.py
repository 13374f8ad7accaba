"""A rank that fails, dies or hangs ends the run, and is named; what was saved before is whole."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tests.train import bad_rank
from tests.train.parallel_runs import curve_of, run, tiny

from tuoling.errors import TrainingError
from tuoling.train import launch
from tuoling.train.checkpoint import checkpoints
from tuoling.train.entry import resume

pytestmark = pytest.mark.slow
"""What the launcher makes of the errors it finds is tested in test_launch.py; here processes really fail."""

LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("what", "said"),
    [
        pytest.param("raises", "rank 1: ZeroDivisionError: broken on purpose", marks=LONG),
        pytest.param("dies", "rank 1 was killed", marks=LONG),
        ("hangs", "rank 1 did not answer the others for 15 s"),
    ],
)
def test_a_rank_that_fails_ends_the_run_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, said: str
) -> None:
    monkeypatch.setattr(launch, "RANK", (sys.executable, bad_rank.__file__, what))
    model = tiny(tmp_path, "bloom")
    with pytest.raises(TrainingError, match=said) as told:
        run(tmp_path / "two", model, 2, timeout_s=15)
    if what == "hangs":
        assert "bad_rank.py" in str(told.value.where)
    state = json.loads((tmp_path / "two" / "run" / "run.json").read_text())
    assert state["status"] == "failed" and "rank 1" in state["error"]


@pytest.mark.long
@pytest.mark.parametrize(("what", "rank", "saved"), [("dies", 1, 2), ("saves", 0, 2)])
def test_a_killed_rank_costs_no_more_than_the_steps_since_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, rank: int, saved: int
) -> None:
    """dies: in step 3. saves: rank 0, half-way through writing checkpoint-4."""
    model = tiny(tmp_path, "bloom")
    keys = {"save_steps": 2, "adam_epsilon": 1e-8, "learning_rate": 1e-3}
    straight = run(tmp_path / "straight", model, 2, **keys)
    with monkeypatch.context() as patch:
        patch.setattr(launch, "RANK", (sys.executable, bad_rank.__file__, what))
        with pytest.raises(TrainingError, match=f"rank {rank} was killed"):
            run(tmp_path / "killed", model, 2, **keys)
    folder = tmp_path / "killed" / "run"
    assert [path.name for path in checkpoints(folder)] == [f"checkpoint-{saved}"]
    assert resume(folder, say=lambda _: None).status == "finished"
    again = curve_of(folder)
    assert again.losses == straight.losses
    assert all(tensor.equal(again.weights[name]) for name, tensor in straight.weights.items())
