"""A replayed run: equal, or where it parts and why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.tiny import tiny_model
from tests.train.runs import edit_record, record, run
from typer.testing import CliRunner

from tuoling.cli.main import app
from tuoling.errors import TrainingError
from tuoling.train.replay import replay


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """6 steps with dropout, kernels that are deterministic asked for, checkpoint-4."""
    folder = tmp_path_factory.mktemp("replayed")
    model = tiny_model(folder / "model")
    yield run(folder, model, max_steps=6, lora_dropout=0.1, deterministic=True, val_size=4, eval_steps=2).path
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def spoiled(done: Path, tmp_path: Path) -> Path:
    """A copy to be spoiled."""
    shutil.copytree(done, tmp_path / "run")
    return tmp_path / "run"


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_deterministic_run_replays_equal_and_nothing_is_written(done: Path) -> None:
    before = files_of(done)
    from_begin = replay(done, steps=4, say=lambda _: None)
    assert from_begin.equal and from_begin.weights is True and from_begin.why == ()
    assert (from_begin.first, from_begin.steps) == (1, 4)
    from_checkpoint = replay(done, steps=9, named="checkpoint-4", say=lambda _: None)
    assert from_checkpoint.equal and (from_checkpoint.first, from_checkpoint.steps) == (5, 2)
    assert torch.are_deterministic_algorithms_enabled()
    assert files_of(done) == before


@pytest.mark.slow
def test_the_first_step_that_parts_is_named_and_the_likely_cause(spoiled: Path) -> None:
    rows = [json.loads(line) for line in (spoiled / "metrics.jsonl").read_text().splitlines()]
    was = rows[2]["loss"]
    rows[2]["loss"] += 1e-6
    (spoiled / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    edit_record(spoiled, versions={**record(spoiled)["versions"], "torch": "2.0.1"}, dtype="bf16")
    found = replay(spoiled, steps=4, say=lambda _: None)
    assert not found.equal and found.parted == (3, "loss", was + 1e-6, was)
    assert "versions: torch 2.0.1 → " + torch.__version__ in found.why and "dtype: bf16 → fp32" in found.why
    done = CliRunner().invoke(app, ["replay", str(spoiled), "--steps", "4"])
    assert done.exit_code == 1 and "parts at step 3: loss" in done.output and "torch 2.0.1" in done.output


@pytest.mark.slow
def test_other_weights_at_the_end_are_seen(spoiled: Path) -> None:
    path = spoiled / "checkpoint-4" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["adapter_model.safetensors"]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    found = replay(spoiled, steps=4, say=lambda _: None)
    assert found.parted is None and found.weights is False and not found.equal


@pytest.mark.slow
def test_other_rows_are_the_cause_that_is_named(spoiled: Path) -> None:
    data = Path(record(spoiled)["config"]["data"][0])
    text = data.read_text(encoding="utf-8")
    copy = spoiled / "rows.jsonl"
    copy.write_text(text.replace("等于 9", "等于 八"), encoding="utf-8")
    edit_record(spoiled, config={**record(spoiled)["config"], "data": [str(copy)]})
    found = replay(spoiled, steps=6, say=lambda _: None)
    assert not found.equal and any(why.startswith("data: other examples") for why in found.why)


@pytest.mark.slow
def test_what_is_no_run_cannot_be_replayed(spoiled: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"no run\.json"):
        replay(tmp_path / "nothing", steps=1)
    with pytest.raises(TrainingError, match="the run has no whole checkpoint-9"):
        replay(spoiled, steps=1, named="9")
    (spoiled / "metrics.jsonl").write_text("")
    with pytest.raises(TrainingError, match="no step after 0 is logged"):
        replay(spoiled, steps=1)
