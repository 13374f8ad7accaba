"""kill -9 at any moment, then `tuoling resume`: the same losses, the same weights, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.faults.runs import Bench, Left, bench, left
from tests.faults.trials import KILLED, kills, straight_run, survive


@pytest.fixture(scope="module")
def killing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    made = bench(tmp_path_factory.mktemp("faults"))
    yield made
    made.server.close()


@pytest.fixture(scope="module")
def straight(killing: Bench) -> Left:
    found = straight_run(killing)
    assert len(found.steps) == 12 and found.status == "finished" and len(found.weights) == 1
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "save", "step": 6, "at": 9},
        {"kind": "evaluate", "at": 7},
        {"kind": "tokenise", "at": 1},
    ],
    ids=lambda fault: fault["kind"],
)
def test_a_kill_changes_nothing(
    killing: Bench, straight: Left, tmp_path: Path, fault: dict[str, Any]
) -> None:
    came, _, found = survive(killing, tmp_path / "run", fault)
    assert came and found == straight


@pytest.mark.long
def test_thirty_kills_change_nothing(killing: Bench, straight: Left, tmp_path: Path) -> None:
    assert len(kills()) == 30
    for number, fault in enumerate(kills()):
        came, _, found = survive(killing, tmp_path / f"run-{number}", fault)
        assert came and found == straight, fault


@pytest.mark.long
def test_a_run_may_be_killed_again_and_again(killing: Bench, straight: Left, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert killing.train(run, fault={"kind": "step", "at": 5}).status == KILLED
    for step in (2, 4):  # counted anew in each process: the resumed run dies later in the run each time
        assert killing.resume(run, fault={"kind": "step", "at": step}).status == KILLED
    done = killing.resume(run)
    assert done.status == 0, done.said
    assert left(run) == straight
    assert len(json.loads((run / "run.json").read_text())["resumed"]) == 3


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        pytest.param("evaluate", "term", marks=pytest.mark.slow),
        *(
            pytest.param(kind, what, marks=pytest.mark.long)
            for kind, what in (
                ("step", "term"),
                ("save", "term"),
                ("step", "int"),
                ("evaluate", "int"),
                ("save", "int"),
            )
        ),
    ],
)
def test_a_signal_saves_and_leaves_cleanly(
    killing: Bench, straight: Left, tmp_path: Path, what: str, kind: str
) -> None:
    run = tmp_path / "run"
    place = {"folder": str(run), "step": 6} if kind == "save" else {}
    done = killing.train(run, fault={"kind": kind, "at": 6, "what": what, **place})
    assert done.status == 0, done.said
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    newest = max(int(path.name.split("-")[1]) for path in run.glob("checkpoint-*"))
    assert newest == len((run / "metrics.jsonl").read_text().splitlines()) < 12
    done = killing.resume(run)
    assert done.status == 0, done.said
    assert left(run) == straight
