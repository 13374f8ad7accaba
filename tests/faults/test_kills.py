"""kill -9 at any moment, then `tuoling resume`: the same losses, the same weights, bit for bit."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.faults.runs import Bench, Left, bench, left

KILLED = -9


@pytest.fixture(scope="module")
def killing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    made = bench(tmp_path_factory.mktemp("faults"))
    yield made
    made.server.close()


@pytest.fixture(scope="module")
def straight(killing: Bench) -> Left:
    """The run nothing happens to."""
    done = killing.train(killing.folder / "straight")
    assert done.status == 0, done.said
    found = left(killing.folder / "straight")
    assert len(found.steps) == 12 and found.status == "finished" and len(found.weights) == 1
    return found


def kills(seed: int = 20261122) -> list[dict[str, Any]]:
    """30 seeded moments: 8 steps, 12 inside a save or the end, 5 inside an evaluation, 5 while tokenising."""
    chance = random.Random(seed)
    steps = [{"kind": "step", "at": at} for at in chance.sample(range(1, 13), 8)]
    saves = [
        {"kind": "save", "step": chance.choice((3, 6, 9, 11)), "at": at}
        for at in chance.sample(range(1, 60), 12)
    ]
    evaluations = [{"kind": "evaluate", "at": at} for at in chance.sample(range(1, 13), 5)]
    tokenising = [{"kind": "tokenise", "at": 1}, *({"kind": "file", "at": at} for at in (4, 8, 14, 20))]
    return steps + saves + evaluations + tokenising


def survive(killing: Bench, run: Path, fault: dict[str, Any]) -> tuple[bool, Left]:
    """Train with a kill in it and resume until it is done. Returns whether the kill came, and what is left."""
    place = killing.folder / "server" / "cache" if fault["kind"] == "file" else run
    cache = (
        {"TUOLING_CACHE": str(run.parent / f"cache-{run.name}")}
        if fault["kind"] in ("file", "tokenise")
        else {}
    )
    if cache:
        place = Path(cache["TUOLING_CACHE"])
    fault = {**fault, "folder": str(place)} if fault["kind"] in ("save", "file") else fault
    done = killing.train(run, fault=fault, env=cache)
    if done.status == 0:
        return False, left(run)
    assert done.status == KILLED, done.said
    again = killing.resume(run)
    if again.status != 0 and "is finished" in again.said:
        return True, left(run)
    assert again.status == 0, again.said
    assert not list(run.glob(".*.part")) and not (run / ".final").exists()
    return True, left(run)


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "step", "at": 8},
        {"kind": "save", "step": 6, "at": 9},
        {"kind": "save", "step": 11, "at": 30},
        {"kind": "evaluate", "at": 7},
        {"kind": "tokenise", "at": 1},
    ],
    ids=lambda fault: f"{fault['kind']}-{fault['at']}",
)
def test_a_kill_changes_nothing(
    killing: Bench, straight: Left, tmp_path: Path, fault: dict[str, Any]
) -> None:
    came, found = survive(killing, tmp_path / "run", fault)
    assert came and found == straight


@pytest.mark.long
def test_thirty_kills_change_nothing(killing: Bench, straight: Left, tmp_path: Path) -> None:
    assert len(kills()) == 30
    for number, fault in enumerate(kills()):
        came, found = survive(killing, tmp_path / f"run-{number}", fault)
        assert came and found == straight, fault


def test_a_run_may_be_killed_again_and_again(killing: Bench, straight: Left, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert killing.train(run, fault={"kind": "step", "at": 5}).status == KILLED
    for step in (2, 4):  # counted anew in each process: the resumed run dies later in the run each time
        assert killing.resume(run, fault={"kind": "step", "at": step}).status == KILLED
    done = killing.resume(run)
    assert done.status == 0, done.said
    assert left(run) == straight
    assert len(json.loads((run / "run.json").read_text())["resumed"]) == 3


@pytest.mark.parametrize("what", ["term", "int"])
@pytest.mark.parametrize("kind", ["step", "evaluate", "save"])
def test_a_signal_saves_and_leaves_cleanly(
    killing: Bench, straight: Left, tmp_path: Path, what: str, kind: str
) -> None:
    run = tmp_path / "run"
    fault = {
        "kind": kind,
        "at": 6,
        "what": what,
        **({"folder": str(run), "step": 6} if kind == "save" else {}),
    }
    done = killing.train(run, fault=fault)
    assert done.status == 0, done.said
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    newest = max(int(path.name.split("-")[1]) for path in run.glob("checkpoint-*"))
    assert newest == len((run / "metrics.jsonl").read_text().splitlines()) < 12
    done = killing.resume(run)
    assert done.status == 0, done.said
    assert left(run) == straight
