"""What `tuoling resume` refuses, and what it may be told: through the API, on a run left as a kill leaves it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.devices import DEVICES, forget_determinism
from tests.tiny import tiny_model
from tests.train.runs import column, edit_record, record, run
from typer.testing import CliRunner

import tuoling
from tuoling.cli.main import app
from tuoling.errors import ConfigError, OutputError, TrainingError
from tuoling.train.checkpoint import checkpoints


def keys_on(device: str) -> dict[str, Any]:
    """8 steps with dropout, a cosine, checkpoint-2 to checkpoint-6, and the end; the same sums each time."""
    keys = {"max_steps": 8, "save_steps": 2, "lora_dropout": 0.1, "lr_scheduler_type": "cosine"}
    return keys if device == "cpu" else {**keys, "device": device, "deterministic": True}


@pytest.fixture(scope="module", params=DEVICES)
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("run")
    yield run(folder, tiny_model(folder / "model"), **keys_on(request.param)).path
    forget_determinism()


@pytest.fixture
def stopped(done: Path, tmp_path: Path) -> Path:
    """The same run, killed after step 7: no weights at the top yet."""
    copy = tmp_path / "stopped"
    shutil.copytree(done, copy)
    for name in ("adapter_model.safetensors", "all_results.json"):
        (copy / name).unlink()
    edit_record(copy, status="running")
    return copy


def resume(folder: Path, **keys: Any) -> list[str]:
    said: list[str] = []
    tuoling.resume(folder, say=said.append, **keys)
    return said


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_it_ends_as_the_run_that_was_not_stopped(stopped: Path, done: Path) -> None:
    said = resume(stopped)
    assert any("the last batch gives the same loss again" in line for line in said)
    for name in ("loss", "grad_norm", "learning_rate", "tokens"):
        assert column(stopped, name) == column(done, name)
    for name, tensor in load_file(done / "adapter_model.safetensors").items():
        assert torch.equal(load_file(stopped / "adapter_model.safetensors")[name], tensor), name


@pytest.mark.slow
def test_an_earlier_checkpoint_may_be_named_and_later_ones_are_kept_aside(stopped: Path, done: Path) -> None:
    said = resume(stopped, from_checkpoint="checkpoint-2")
    assert "put aside: checkpoint-4 → old-1.checkpoint-4" in said
    assert [path.name for path in checkpoints(stopped)] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert column(stopped, "loss") == column(done, "loss")


@pytest.mark.slow
def test_a_finished_run_is_not_gone_on_with(done: Path) -> None:
    before = contents(done)
    with pytest.raises(TrainingError, match="the run is finished: 8 steps of 8") as told:
        tuoling.resume(done)
    assert told.value.remedy is not None and "tuoling continue" in told.value.remedy
    assert contents(done) == before


def test_a_foreign_folder_is_told_where_it_can_go(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    result = CliRunner().invoke(app, ["resume", str(tmp_path)])
    assert result.exit_code == 1
    words = " ".join(result.output.split())
    assert "this is not a run folder of tuoling's" in words and "tuoling continue FOLDER --data ROWS" in words
    (tmp_path / "run.json").write_text('{"something": "else"}')
    with pytest.raises(TrainingError, match="holds no config of a run"):
        tuoling.resume(tmp_path)


@pytest.mark.slow
def test_another_base_template_or_config_is_listed_and_can_be_accepted(stopped: Path) -> None:
    template = {**record(stopped)["template"], "id": "alpaca"}
    edit_record(
        stopped,
        base={**record(stopped)["base"], "weights_sampled_sha256": "0"},
        template=template,
        config={**record(stopped)["config"], "learning_rate": 5e-3},
    )
    before = contents(stopped)
    with pytest.raises(TrainingError, match="this is not the run that was begun") as told:
        resume(stopped)
    for words in (
        "base: ",
        "other weights",
        "template: alpaca → domain_bloom",
        "config: run.json has been edited",
    ):
        assert words in told.value.problem
    assert contents(stopped) == before
    said = resume(stopped, accept_changes=True)
    assert any("going on in spite of changes" in line for line in said)
    (resumed,) = record(stopped)["resumed"]
    assert resumed["accept_changes"] is True and any("other weights" in line for line in resumed["changed"])


@pytest.mark.slow
def test_weights_that_give_another_loss_are_refused(stopped: Path) -> None:
    checkpoint = stopped / "checkpoint-6"
    position = json.loads((checkpoint / "position.json").read_text())
    position["probe"]["loss"] += 1e-9
    (checkpoint / "position.json").write_text(json.dumps(position))
    from tuoling.files import write_manifest

    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint)
    with pytest.raises(TrainingError, match=r"the last batch gives .* and gave"):
        resume(stopped)
    assert record(stopped)["status"] == "failed"
    resume(stopped, accept_changes=True)
    assert record(stopped)["status"] == "finished"


@pytest.mark.slow
def test_only_keys_that_change_nothing_learned_may_be_given(stopped: Path) -> None:
    with pytest.raises(ConfigError, match="learning_rate cannot be changed"):
        resume(stopped, learning_rate=1.0)
    resume(stopped, save_total_limit=1, logging_steps=3)
    assert record(stopped)["resumed"][0]["config"] == {"save_total_limit": 1, "logging_steps": 3}


@pytest.mark.slow
def test_a_checkpoint_that_is_not_there_or_is_damaged(stopped: Path) -> None:
    with pytest.raises(TrainingError, match="no whole checkpoint-5"):
        resume(stopped, from_checkpoint="5")
    (stopped / "checkpoint-6" / "rng.safetensors").unlink()
    with pytest.raises(TrainingError, match=r"checkpoint-6 is damaged: rng\.safetensors is missing"):
        resume(stopped)
    assert any("from checkpoint-4" in line for line in resume(stopped, skip_damaged=True))


@pytest.mark.slow
def test_each_save_is_priced_and_what_is_missing_is_said(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"

    def free(_: Path) -> int:
        return 10_000 if (folder / "checkpoint-4").is_dir() else 2**40

    model = Path(record(done)["base"]["path"])
    keys = keys_on(record(done)["config"]["device"])
    with monkeypatch.context() as patched:
        patched.setattr("tuoling.environment.disk_free_bytes", free)
        with pytest.raises(OutputError, match="MiB are missing") as told:
            run(tmp_path, model, **keys, disk_reserve_mib=8)
    assert told.value.remedy is not None and f"tuoling resume {folder}" in told.value.remedy
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2", "checkpoint-4"]
    assert record(folder)["status"] == "failed" and "8 MiB are to stay free" in record(folder)["error"]
    resume(folder, disk_reserve_mib=0)
    assert column(folder, "loss") == column(done, "loss")
