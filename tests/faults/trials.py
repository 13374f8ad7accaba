"""One fault each: what is done to a run, and what must be left of it. The tests and benchmarks/faults.py share them."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.faults.runs import Bench, Left, left

from tuoling.files import manifest_problems
from tuoling.train.checkpoint import checkpoints

KILLED = -9


def straight_run(bench: Bench) -> Left:
    """The run nothing happens to."""
    done = bench.train(bench.folder / "straight")
    assert done.status == 0, done.said
    return left(bench.folder / "straight")


def kills(seed: int = 20261122) -> list[dict[str, Any]]:
    """30 seeded moments: 8 steps, 12 inside a save or the end, 5 inside an evaluation, 5 while tokenising."""
    chance = random.Random(seed)
    steps = [{"kind": "step", "at": at} for at in chance.sample(range(1, 13), 8)]
    saves = [
        {"kind": "save", "step": chance.choice((3, 6, 9, 12) if at < 30 else (3, 6)), "at": at}
        for at in chance.sample(range(1, 60), 12)
    ]
    evaluations = [{"kind": "evaluate", "at": at} for at in chance.sample(range(1, 13), 5)]
    tokenising = [{"kind": "tokenise", "at": 1}, *({"kind": "file", "at": at} for at in (4, 8, 14, 20))]
    return steps + saves + evaluations + tokenising


def survive(bench: Bench, run: Path, fault: dict[str, Any]) -> tuple[bool, int, Left]:
    """Train with a kill in it and resume until it is done.

    Returns whether the kill came, after how many logged steps, and what is left.
    """
    place, env = run, {}
    if fault["kind"] in ("file", "tokenise"):  # a cache of its own: the rows are tokenised again
        place = run.parent / f"cache-{run.name}"
        env = {"TUOLING_CACHE": str(place)}
    done = bench.train(run, fault=_placed(fault, place), env=env)
    if done.status == 0:
        return False, 12, left(run)
    assert done.status == KILLED, done.said
    metrics = run / "metrics.jsonl"
    logged = len(metrics.read_text().splitlines()) if metrics.is_file() else 0
    again = bench.resume(run)
    if again.status != 0 and "is finished" in again.said:
        return True, logged, left(run)
    assert again.status == 0, again.said
    assert not list(run.glob(".*.part")) and not (run / ".final").exists()
    return True, logged, left(run)


def _placed(fault: dict[str, Any], place: Path) -> dict[str, Any]:
    return {**fault, "folder": str(place)} if fault["kind"] in ("save", "file") else fault


def starve(bench: Bench, run: Path, at: int, step: int = 6) -> tuple[bool, str, list[str], Left | None]:
    """The disk is full from the `at`-th write from step `step` on, until the run is resumed.

    Returns whether it came to that, what was said of it, the checkpoints that were left (all whole), and the end.
    """
    done = bench.train(
        run, fault={"kind": "save", "what": "full", "step": step, "at": at, "folder": str(run)}
    )
    if done.status == 0:
        return False, "", [], left(run)
    assert done.status == 1 and "the disk is full" in done.said, done.said
    assert "Traceback" not in done.said, done.said
    found = checkpoints(run)
    assert found and not any(manifest_problems(path) for path in found)
    names = [path.name for path in found]
    again = bench.resume(run)
    assert again.status == 0, again.said
    return True, _line(done.said, "the disk is full"), names, left(run)


def _line(said: str, words: str) -> str:
    """The line of an output that has these words in it, without its mark."""
    line = next(line for line in said.splitlines() if words in line)
    return line[line.index(words) :].strip()


def flip(path: Path) -> None:
    """One bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def broken_run(bench: Bench) -> Path:
    """A run killed in step 12, with checkpoint-6 and checkpoint-9, for `spoil` to copy."""
    run = bench.folder / "broken"
    if not run.exists():
        assert bench.train(run, fault={"kind": "step", "at": 12, "what": "kill_saved"}).status == KILLED
        assert [path.name for path in checkpoints(run)] == ["checkpoint-6", "checkpoint-9"]
    return run


def spoil(bench: Bench, run: Path, name: str) -> tuple[str, Left]:
    """Flip a bit in a file of checkpoint-9: it is named and refused; with --skip-damaged checkpoint-6 is gone on from.

    Returns what was said, and what is left at the end.
    """
    shutil.copytree(broken_run(bench), run)
    flip(run / "checkpoint-9" / name)
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
    refused = bench.resume(run)
    assert refused.status == 1 and "checkpoint-9 is damaged" in refused.said, refused.said
    assert "--skip-damaged" in refused.said and "Traceback" not in refused.said
    assert sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*")) == before
    again = bench.resume(run, "--skip-damaged")
    assert again.status == 0 and "from checkpoint-6" in again.said, again.said
    return _line(refused.said, "checkpoint-9 is damaged"), left(run)


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """A tmpfs of so many bytes at `folder`. Needs the right to mount."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(bench: Bench, folder: Path, size_bytes: int) -> tuple[str, list[str], Left]:
    """Train on a disk of so many bytes, give it more, and resume, or train where nothing was begun.

    Returns what was said of it ("" where it was enough), the checkpoints left then, and the end.
    """
    with small_disk(folder, size_bytes):
        run = folder / "run"
        done = bench.train(run)
        if done.status == 0:
            return "", [], left(run)
        assert done.status == 1 and "Traceback" not in done.said, done.said
        words = "are missing" if "are missing" in done.said else "the disk is full"
        said = next(line for line in done.said.splitlines() if words in line).strip()
        found = checkpoints(run)
        assert not any(manifest_problems(path) for path in found)
        subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
        began = (run / "run.json").is_file() and "config" in json.loads((run / "run.json").read_text())
        again = bench.resume(run) if began else bench.train(run)
        assert again.status == 0, again.said
        return said, [path.name for path in found], left(run)
