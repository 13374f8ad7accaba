"""The supervisor: when it begins again, how long it waits, when it gives up. Runs are played by a list of exit codes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tuoling.cli.main import app
from tuoling.train import supervise as supervision
from tuoling.train.supervise import supervise


class Played:
    """A run that ends as told, each time: (exit code, last step logged, status)."""

    def __init__(self, run: Path, ends: Sequence[tuple[int, int, str | None]]) -> None:
        self.run, self.ends = run, list(ends)
        self.commands: list[list[str]] = []
        self.waits: list[float] = []
        self.said: list[str] = []

    def start(self, words: Sequence[str]) -> int:
        self.commands.append(list(words))
        code, step, status = self.ends.pop(0)
        if status is not None:
            self.run.mkdir(exist_ok=True)
            (self.run / "run.json").write_text(json.dumps({"status": status}))
            rows = [json.dumps({"step": number}) for number in range(1, step + 1)]
            (self.run / "metrics.jsonl").write_text("".join(row + "\n" for row in rows))
        return code

    def supervise(self, restarts: int = 5) -> int:
        return supervise(
            self.run,
            ["train", "x"],
            ["resume", "x"],
            restarts=restarts,
            say=self.said.append,
            start=self.start,
            wait=self.waits.append,
        )

    def transcript(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in (self.run / "supervisor.jsonl").read_text().splitlines()]


def test_two_crashes_are_gone_on_from(tmp_path: Path) -> None:
    played = Played(tmp_path / "run", [(-9, 3, "running"), (1, 8, "failed"), (0, 12, "finished")])
    assert played.supervise() == 0
    assert played.commands == [["train", "x"], ["resume", "x"], ["resume", "x"]]
    assert played.waits == [5.0, 5.0]  # steps were made in between: no longer wait
    events = [(row["event"], row.get("exit_code"), row.get("step")) for row in played.transcript()]
    assert events == [
        *(("start", None, None), ("end", -9, 3), ("wait", None, None)),
        *(("start", None, None), ("end", 1, 8), ("wait", None, None)),
        *(("start", None, None), ("end", 0, 12)),
    ]
    assert "ended with -9 at step 3; again in 5 s (5 restarts left)" in played.said[0]


def test_it_backs_off_at_the_same_step_and_gives_up(tmp_path: Path) -> None:
    played = Played(tmp_path / "run", [(1, 5, "failed")] * 9)
    assert played.supervise() == 1
    assert len(played.commands) == 3 and played.waits == [5.0, 10.0]
    assert played.transcript()[-1]["event"] == "give up" and "3 crashes in a row at step 5" in played.said[-1]


def test_the_budget_ends(tmp_path: Path) -> None:
    played = Played(tmp_path / "run", [(-11, step, "running") for step in range(1, 9)])
    assert played.supervise(restarts=2) == -11
    assert len(played.commands) == 3 and "2 restarts are used up" in played.said[-1]


@pytest.mark.parametrize(
    "end",
    [(0, 12, "finished"), (130, 4, "interrupted"), (-15, 4, "running"), (2, 0, None), (1, 0, None)],
    ids=["finished", "ctrl-c", "sigterm", "wrong call", "refused before it began"],
)
def test_a_run_that_was_stopped_or_refused_is_left_alone(
    tmp_path: Path, end: tuple[int, int, str | None]
) -> None:
    played = Played(tmp_path / "run", [end])
    assert played.supervise() == end[0]
    assert len(played.commands) == 1 and played.waits == []


def test_the_command_hands_its_words_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def start(words: Sequence[str]) -> int:
        seen.append(list(words))
        run = tmp_path / "run"
        run.mkdir(exist_ok=True)
        (run / "run.json").write_text('{"status": "running"}')
        return -9 if len(seen) == 1 else 0

    monkeypatch.setattr(supervision, "_in_a_process", start)
    monkeypatch.setattr(supervision, "FIRST_WAIT_S", 0.0)
    words = ["train", "--model", "M", "--data", "D", "--out", str(tmp_path / "run"), "max_steps=3"]
    done = CliRunner().invoke(app, [*words, "--supervise", "--nproc", "2"])
    assert done.exit_code == 0, done.output
    run = str(tmp_path / "run")
    assert seen[0] == ["train", "max_steps=3", "--model", "M", "--data", "D", "--out", run, "--nproc", "2"]
    assert seen[1] == ["resume", run, "--skip-damaged", "--nproc", "2"]
