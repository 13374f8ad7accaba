"""Runs that are killed, starved and spoiled, through the command line, and what is left of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.tiny import sum_rows, tiny_model, write_rows

ROOT = Path(__file__).resolve().parents[2]
SERVER = Path(__file__).with_name("server.py")


@dataclass(frozen=True)
class Done:
    """How a command ended: its exit code (negative: by a signal) and all it said."""

    status: int
    said: str


class Server:
    """The forking process (server.py). Close it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._count = folder, 0
        path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
        variables = {"TUOLING_LANG": "en", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
        self._process = subprocess.Popen(
            [sys.executable, str(SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **variables, "TUOLING_CACHE": str(folder / "cache")},
            text=True,
        )

    def run(
        self, *words: str, fault: dict[str, Any] | None = None, env: dict[str, str] | None = None
    ) -> Done:
        """One command of tuoling, with a fault in it or none."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._count += 1
        out = self._folder / f"said-{self._count}.txt"
        asked = {"argv": list(words), "out": str(out), "fault": fault, "env": env or {}}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return Done(answer["status"], out.read_text(encoding="utf-8", errors="replace"))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@dataclass(frozen=True)
class Bench:
    """A tiny model, rows and a server: what the fault tests train with."""

    server: Server
    model: Path
    data: Path
    folder: Path

    def words(self, run: Path, *more: str) -> list[str]:
        """`tuoling train` into `run`: 12 steps, a checkpoint every 3, an evaluation every 4, dropout on."""
        keys = (
            "dtype=fp32 device=cpu lora_dropout=0.1 learning_rate=1e-2 template=domain_bloom plot_loss=false val_size=4 "
            "per_device_train_batch_size=4 per_device_eval_batch_size=1 max_steps=12 save_steps=3 eval_steps=4 "
            "save_total_limit=2 disk_reserve_mib=0 logging_steps=1"
        )
        return [
            *("train", "--model", str(self.model), "--data", str(self.data), "--out", str(run)),
            *keys.split(),
            *more,
        ]

    def train(self, run: Path, *more: str, fault: dict[str, Any] | None = None, **keys: Any) -> Done:
        return self.server.run(*self.words(run, *more), fault=fault, **keys)

    def resume(self, run: Path, *more: str, fault: dict[str, Any] | None = None) -> Done:
        return self.server.run("resume", str(run), *more, fault=fault)


def bench(folder: Path) -> Bench:
    model = tiny_model(folder / "model")
    data = write_rows(folder / "rows.jsonl", sum_rows(20))
    return Bench(Server(folder / "server"), model, data, folder)


@dataclass(frozen=True)
class Left:
    """What a finished run learned and how: files of weights as bytes, losses and gradients of the steps, their order."""

    weights: dict[str, bytes]
    steps: list[tuple[Any, ...]]
    status: str


def left(run: Path) -> Left:
    """Everything that must be the same after a kill as without one."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "grad_norm", "learning_rate", "tokens", "learned_tokens", "eval_loss")
    return Left(
        {path.name: path.read_bytes() for path in sorted(run.glob("*.safetensors"))},
        [tuple(row.get(key) for key in kept) for row in rows],
        json.loads((run / "run.json").read_text())["status"],
    )
