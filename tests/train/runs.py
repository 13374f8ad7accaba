"""Small runs in this process, for the tests of what goes on from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tiny import settings_without_chance, sum_rows, write_rows

from tuoling.config import load_config
from tuoling.train.loop import RunResult, train

QUIET = {"per_device_train_batch_size": 4, "save_steps": 4, "disk_reserve_mib": 0, "save_total_limit": None}


def run(folder: Path, model: Path, rows: list[dict[str, Any]] | None = None, **keys: Any) -> RunResult:
    """Train `folder`/run in float32 on the CPU, nothing random but what `keys` ask for; a checkpoint every 4 steps."""
    data = write_rows(folder / "rows.jsonl", rows if rows is not None else sum_rows(16))
    settings = settings_without_chance(folder, model, data, {**QUIET, **keys})
    return train(load_config((), (), settings).config, say=lambda _: None)


def steps_of(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def column(run: Path, name: str) -> list[Any]:
    return [row[name] for row in steps_of(run)]


def record(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text())
    return found


def edit_record(run: Path, **keys: Any) -> None:
    """Write keys of run.json anew, as a hand or a kill would leave them."""
    (run / "run.json").write_text(json.dumps({**record(run), **keys}))
