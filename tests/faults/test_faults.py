"""Disks that are full or lie, numbers that are none, rows and clocks that change, a second process: nothing is lost."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.faults.runs import Bench, Left, bench, left
from tests.faults.trials import KILLED, broken_run, fill, spoil, starve, straight_run

from tuoling.files import manifest_problems
from tuoling.train.checkpoint import checkpoints
from tuoling.train.run_lock import LOCK, locked

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    made = bench(tmp_path_factory.mktemp("faults"))
    yield made
    made.server.close()


@pytest.fixture(scope="module")
def straight(failing: Bench) -> Left:
    return straight_run(failing)


def test_a_disk_that_fills_up_in_a_save_costs_nothing(failing: Bench, straight: Left, tmp_path: Path) -> None:
    came, said, names, found = starve(failing, tmp_path / "run", at=3)
    assert came and names == ["checkpoint-3"] and "checkpoint-3 is whole" in said
    assert found == straight


@pytest.mark.long
def test_a_disk_that_fills_up_at_any_write_costs_nothing(
    failing: Bench, straight: Left, tmp_path: Path
) -> None:
    at = 0
    came = True
    while came:
        at += 1
        came, _, _, found = starve(failing, tmp_path / f"run-{at}", at)
        assert found == straight, at
    assert at > 30  # two saves and the end of the run


@pytest.mark.long
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs needs root")
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_a_small_disk_is_told_and_nothing_lost(
    failing: Bench, straight: Left, tmp_path: Path, share: float
) -> None:
    whole = sum(path.stat().st_size for path in (failing.folder / "straight").rglob("*") if path.is_file())
    said, _, found = fill(failing, tmp_path / "disk", int(share * whole) // 4096 * 4096)
    assert said and found == straight


def test_a_flipped_bit_is_named_and_the_checkpoint_before_is_taken(
    failing: Bench, straight: Left, tmp_path: Path
) -> None:
    said, found = spoil(failing, tmp_path / "run", "optimizer.safetensors")
    assert "optimizer.safetensors has changed" in said
    assert found == straight


@pytest.mark.long
def test_a_flipped_bit_in_any_file_of_a_checkpoint_is_seen(
    failing: Bench, straight: Left, tmp_path: Path
) -> None:
    names = sorted(path.name for path in (broken_run(failing) / "checkpoint-9").iterdir())
    assert len(names) >= 7
    for name in names:
        said, found = spoil(failing, tmp_path / name, name)
        assert name in said or name == "manifest.json"
        assert found == straight


def test_a_gradient_that_is_no_number_stops_the_run_before_the_weights(
    failing: Bench, straight: Left, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = failing.train(run, fault={"kind": "gradient", "at": 8})
    assert done.status == 1 and "the gradient of step 8 is nan" in done.said and "Traceback" not in done.said
    rows = json.loads((run / "nonfinite_rows.json").read_text())
    assert rows["step"] == 8 and len(rows["rows"]) == 4 and all("rows.jsonl:" in row for row in rows["rows"])
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "failed" and "gradient of step 8" in record["error"]
    again = failing.resume(run)  # it was the memory's fault, not the rows'
    assert again.status == 0, again.said
    assert left(run) == straight


def test_rows_that_changed_since_are_refused_and_named(
    failing: Bench, straight: Left, tmp_path: Path
) -> None:
    data = tmp_path / "mine.jsonl"
    text = failing.data.read_text(encoding="utf-8")
    data.write_text(text, encoding="utf-8")
    mine, run = replace(failing, data=data), tmp_path / "run"
    assert mine.train(run, fault={"kind": "step", "at": 8}).status == KILLED
    data.write_text(text.replace("等于 15", "等于 16", 1), encoding="utf-8")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    refused = mine.resume(run)
    assert refused.status == 1 and "this is not the run that was begun" in refused.said
    assert "other examples:" in refused.said and "mine.jsonl" in refused.said
    assert "--accept-changes" in refused.said
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    data.write_text(text, encoding="utf-8")
    again = mine.resume(run)
    assert again.status == 0, again.said
    assert left(run) == straight


def test_a_clock_that_jumps_changes_nothing(failing: Bench, straight: Left, tmp_path: Path) -> None:
    done = failing.train(tmp_path / "run", fault={"kind": "clock"})
    assert done.status == 0, done.said
    assert left(tmp_path / "run") == straight


def test_a_second_process_is_refused(failing: Bench, tmp_path: Path) -> None:
    run = broken_run(failing)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != LOCK}
    with locked(run):
        for done in (failing.resume(run), failing.train(run)):
            assert done.status == 1, done.said
        assert "another process is training in this folder" in failing.resume(run).said
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_an_output_that_can_only_be_read_ends_the_run_in_words(
    failing: Bench, straight: Left, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    fault = {"kind": "save", "what": "readonly", "step": 6, "at": 1, "folder": str(run)}
    done = failing.train(run, fault=fault)
    assert done.status == 1 and "Read-only file system" in done.said and "Traceback" not in done.said
    assert [path.name for path in checkpoints(run)] == ["checkpoint-3"]
    assert not manifest_problems(run / "checkpoint-3")
    again = failing.resume(run)
    assert again.status == 0, again.said
    assert left(run) == straight
    never = failing.train(tmp_path / "no", fault={**fault, "kind": "file", "folder": str(tmp_path / "no")})
    assert never.status == 1 and "Read-only file system" in never.said
