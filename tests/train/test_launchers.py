"""Processes that somebody else started: torchrun, what srun says, and a process group that is there already."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tests.tiny import settings_without_chance, sum_rows, tiny_model, write_rows

from tuoling.config import load_config
from tuoling.train.loop import train

pytestmark = [pytest.mark.slow, pytest.mark.long]

IN_A_GROUP = """
import sys
import torch.distributed as dist
dist.init_process_group("gloo")
import tuoling
tuoling.train(sys.argv[1])
dist.barrier()  # it is still the starter's own
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """A folder with a model and rows, and the losses of one process."""
    folder = tmp_path_factory.mktemp("launchers")
    tiny_model(folder / "model")
    write_rows(folder / "rows.jsonl", sum_rows(16))
    train(load_config([write_config(folder, "alone")]).config, say=lambda _: None)
    return folder, losses(folder, "alone")


def write_config(folder: Path, name: str) -> Path:
    keys = {"max_steps": 4, "batch_size": 4, "timeout_s": 300}
    settings = settings_without_chance(folder / name, folder / "model", folder / "rows.jsonl", keys)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(settings))
    return path


def losses(folder: Path, name: str) -> list[float]:
    lines = (folder / name / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def run_all(commands: list[tuple[list[str], dict[str, str]]]) -> None:
    """Side by side, to their end."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    started = [
        subprocess.Popen(
            [sys.executable, *words],
            env={**plain, "OMP_NUM_THREADS": "1", **variables},
            stderr=subprocess.PIPE,
        )
        for words, variables in commands
    ]
    for process in started:
        _, said = process.communicate()
        assert process.returncode == 0, said.decode()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_torchrun(alone: tuple[Path, list[float]]) -> None:
    folder, expected = alone
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tuoling", "train"]
    run_all([([*words, str(write_config(folder, "torchrun"))], {})])
    assert losses(folder, "torchrun") == pytest.approx(expected, rel=1e-5)


def test_what_srun_says(alone: tuple[Path, list[float]]) -> None:
    folder, expected = alone
    words = ["-m", "tuoling", "train", str(write_config(folder, "srun"))]
    said = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "localhost"}
    said["SLURM_JOB_ID"] = str(free_port() - 20_000)
    run_all([(words, {**said, "SLURM_PROCID": rank, "SLURM_LOCALID": rank}) for rank in ("0", "1")])
    assert losses(folder, "srun") == pytest.approx(expected, rel=1e-5)


def test_a_group_that_is_there_already(alone: tuple[Path, list[float]]) -> None:
    folder, expected = alone
    words = ["-c", IN_A_GROUP, str(write_config(folder, "group"))]
    where = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    run_all([(words, {**where, "RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")])
    assert losses(folder, "group") == pytest.approx(expected, rel=1e-5)
