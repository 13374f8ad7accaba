"""What is decided before the processes of a run exist, and which of their errors is the one that counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import settings_without_chance, sum_rows, tiny_model, write_rows

from tuoling import environment
from tuoling.config import RunConfig, load_config
from tuoling.environment import Place, first_host, place
from tuoling.errors import ConfigError, MissingPackage, TrainingError, UsageError
from tuoling.train import zero
from tuoling.train.ending import first_error
from tuoling.train.launch import Launch
from tuoling.train.prepare import prepare
from tuoling.train.rank import leave_error

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Place()),
        (TORCHRUN, Place(3, 4, 1, 2)),
        (SRUN, Place(5, 8, 1, 4)),
        ({**SRUN, **TORCHRUN}, Place(3, 4, 1, 2)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, Place()),  # inside sbatch, outside of srun
        ({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}, Place()),
    ],
)
def test_which_process_this_is(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: Place
) -> None:
    for name in (*TORCHRUN, *SRUN, "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert place() == expected


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("gpu[07-09,12],big1", "gpu07"), ("gpu1,gpu2", "gpu1"), ("n12", "n12"), ("rack1-[3,5]", "rack1-3")],
)
def test_the_first_machine_of_a_slurm_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_as_many_processes_as_devices() -> None:
    launch = Launch(devices=(0, 1, 3)).checked()
    assert launch.nproc == launch.world_size == 3
    assert Launch(nproc=8, nnodes=2, node_rank=1, master="a:1").checked().world_size == 16
    assert Launch().alone and not Launch(nproc=2).alone and not Launch(devices=(2,)).alone


@pytest.mark.parametrize(
    ("launch", "words"),
    [
        (Launch(nproc=2, devices=(0, 1, 3)), "--nproc 2 and 3 devices"),
        (Launch(nnodes=2, node_rank=2, master="a"), "--node-rank 2 of --nnodes 2"),
        (Launch(nnodes=2), "address of the first machine"),
    ],
)
def test_calls_that_cannot_be(launch: Launch, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        launch.checked()


def errors_of(folder: Path, *raised: tuple[int, BaseException]) -> list[dict[str, Any]]:
    for rank, error in raised:
        leave_error(folder, rank, error)
    return [json.loads((folder / f"error-{rank}.json").read_text()) for rank, _ in raised]


LOST = RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234")
WAITED = RuntimeError(
    "[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 2000ms for recv operation"
)


def test_the_rank_that_failed_itself_counts_and_not_those_that_lost_it(tmp_path: Path) -> None:
    own = TrainingError("the loss of step 3 is nan", where="rows.json", remedy="look at them")
    found = first_error(errors_of(tmp_path, (0, LOST), (2, own), (1, WAITED)), [], {}, RunConfig())
    assert found.problem == "rank 2: the loss of step 3 is nan"
    assert (found.where, found.remedy) == ("rows.json", "look at them")


def test_an_error_nobody_foresaw_leaves_its_traceback_in_the_run(tmp_path: Path) -> None:
    config = RunConfig(output_dir=str(tmp_path))
    found = first_error(errors_of(tmp_path, (1, ZeroDivisionError("division by zero"))), [], {}, config)
    assert found.problem == "rank 1: ZeroDivisionError: division by zero"
    assert found.where == str(tmp_path / "rank-1.txt")
    assert "ZeroDivisionError" in (tmp_path / "rank-1.txt").read_text()


def test_a_killed_rank_is_named_before_those_that_lost_it(tmp_path: Path) -> None:
    found = first_error(errors_of(tmp_path, (0, LOST)), [1], {}, RunConfig())
    assert "rank 1 was killed" in found.problem and "memory" in str(found.remedy)


def test_a_rank_that_does_not_answer_is_named(tmp_path: Path) -> None:
    errors = errors_of(tmp_path, (0, WAITED), (2, WAITED))
    found = first_error(errors, [], {1: 'File "rows.py", line 7 in read'}, RunConfig(timeout_s=2))
    assert found.problem == "rank 1 did not answer the others for 2 s"
    assert found.where == 'File "rows.py", line 7 in read' and "timeout_s" in str(found.remedy)


@pytest.fixture(scope="module")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("bloom"))


def prepared(tmp_path: Path, bloom: Path, world_size: int, **keys: Any) -> tuple[Any, list[str]]:
    data = write_rows(tmp_path / "rows.jsonl", sum_rows(6))
    said: list[str] = []
    config = load_config((), (), settings_without_chance(tmp_path, bloom, data, keys)).config
    return prepare(config, say=said.append, world_size=world_size), said


@pytest.mark.slow
def test_more_processes_than_rows(tmp_path: Path, bloom: Path) -> None:
    with pytest.raises(TrainingError, match="7 processes and 6 rows"):
        prepared(tmp_path, bloom, 7)


@pytest.mark.slow
def test_the_plan_counts_the_rows_of_all_processes(tmp_path: Path, bloom: Path) -> None:
    setup, _ = prepared(tmp_path, bloom, 2, per_device_train_batch_size=1, num_train_epochs=1)
    assert (setup.plan.rows_per_step, setup.plan.total_steps, setup.plan.micro_batches_per_step) == (2, 3, 1)
    assert setup.plan.tokens_per_step == pytest.approx(setup.plan.tokens / 3, abs=0.1)
    assert any("over 2 processes" in value for _, value in setup.plan.lines())


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{"parallel": "zero3"}, {"parallel": "fsdp"}, {"deepspeed": "none.json"}])
def test_one_process_does_not_need_them_and_says_so(
    tmp_path: Path, bloom: Path, keys: dict[str, str]
) -> None:
    _, said = prepared(tmp_path, bloom, 1, **keys)
    assert sum("one process" in line for line in said) == 1


def test_zero_without_deepspeed(tmp_path: Path, bloom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match="deepspeed") as told:
        prepared(tmp_path, bloom, 2, parallel="zero2")
    assert 'pip install "tuoling[dist]"' in str(told.value) and "parallel=fsdp" in str(told.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["parallel=zero3", "quantization_bit=8"], "quantised weights cannot be cut"),
        (["parallel=fsdp", "quantization_bit=4"], "quantised weights cannot be cut"),
        (["deepspeed=ds.json", "quantization_bit=8"], "quantised weights cannot be cut"),
        (["parallel=zero2", "optim=muon"], "whole matrices"),
        (["parallel=zero2", "deepspeed=ds.json"], "both given"),
        (["parallel=zero4"], "must be one of ddp, fsdp, zero2"),
    ],
)
def test_what_does_not_go_together(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config((), overrides)


def test_short_names_may_stand_at_deepspeed() -> None:
    assert load_config((), ["deepspeed=zero3_offload"]).config.parallel == "zero3_offload"
    assert load_config((), ["fsdp=full_shard auto_wrap"]).config.parallel == "fsdp"
    assert load_config((), ["deepspeed=null"]).config.parallel is None


def test_a_deepspeed_file_is_filled_in_and_our_own_keys_stay_ours(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    theirs = {
        "train_batch_size": "auto",
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
        "gradient_clipping": 0.3,
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": "auto",
            "overlap_comm": True,
            "stage3_max_live_parameters": 7,
        },
    }
    path.write_text(json.dumps(theirs))
    found = zero.zero_config(RunConfig(deepspeed=str(path)))
    assert zero.set_aside(found) == ["optimizer", "gradient_clipping"]
    made = zero.filled(found, dtype="fp32", device="cpu", world_size=2, max_grad_norm=1.0, hidden=64)
    assert "optimizer" not in made and "bf16" not in made
    assert (made["train_batch_size"], made["gradient_clipping"]) == (2, 1.0)
    assert made["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": 4096,
        "overlap_comm": False,
        "stage3_max_live_parameters": 7,
    }
    assert "auto" not in json.dumps(made)


@pytest.mark.parametrize("kind", ["zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_short_names(kind: str) -> None:
    config = RunConfig(parallel=kind)  # type: ignore[arg-type]
    made = zero.filled(
        zero.zero_config(config), dtype="bf16", device="cuda:0", world_size=8, max_grad_norm=1.0, hidden=64
    )
    zone = made["zero_optimization"]
    assert zone["stage"] == int(kind[4]) and ("offload_optimizer" in zone) == kind.endswith("offload")
    assert ("offload_param" in zone) == (kind == "zero3_offload")
    assert made["bf16"] == {"enabled": True} and "auto" not in json.dumps(made)
    named = RunConfig(deepspeed=f"examples/deepspeed/ds_{kind.replace('zero', 'z')}_config.json")
    assert zero.zero_config(named) == zero.preset(kind)


def test_a_deepspeed_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such DeepSpeed config"):
        zero.zero_config(RunConfig(deepspeed="none.json"))
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"zero_optimization\.stage"):
        zero.zero_config(RunConfig(deepspeed=str(tmp_path / "a.json")))


def test_two_processes_on_a_machine_have_a_card_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "place", lambda: Place(3, 4, 1, 2))
    monkeypatch.setattr(environment, "_has_cuda", lambda: True)
    monkeypatch.setattr(environment, "_require_device", lambda asked: None)
    assert environment.pick_device("auto") == environment.pick_device("cuda") == "cuda:1"
    assert environment.pick_device("cpu") == "cpu"
