"""`streaming_start`: a run begins on the first shards of its rows, and is the same run whenever the others came."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests.tiny import settings_without_chance, sum_rows, tiny_model, write_rows
from tests.train.runs import column, edit_record, record

import tuoling
from tuoling.config import load_config
from tuoling.data import growing_store, shards, store_builder
from tuoling.data.sampler import SampleOrder
from tuoling.data.shard_compiler import ShardCompiler
from tuoling.errors import ConfigError, DataError, TrainingError
from tuoling.train import loop
from tuoling.train.loop import RunResult, train
from tuoling.train.replay import replay

ROWS, STEPS, AT_ONCE = 60, 20, 4


class Gate:
    """Shards from the second on are compiled when `open` is set; what was trained until then is in `before`."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.before: list[int] = []


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """The builder is a thread of this process, its shards hold some 20 rows, and it waits at the gate."""
    gate, compile_shard = Gate(), ShardCompiler.compile

    def held_back(self: ShardCompiler, shard: Any, *rest: Any) -> Any:
        if shard.number:
            assert gate.open.wait(300), "nothing is trained before all shards are there"
        return compile_shard(self, shard, *rest)

    class Builder:
        def __init__(self, *job: Any) -> None:
            self._thread = threading.Thread(target=store_builder.build, args=job, daemon=True)
            self._thread.start()

        @property
        def exit_code(self) -> int | None:
            return None if self._thread.is_alive() else 0

    monkeypatch.setattr(ShardCompiler, "compile", held_back)
    monkeypatch.setattr(growing_store, "Builder", Builder)
    monkeypatch.setattr(shards, "SHARD_BYTES", 2000)
    yield gate
    gate.open.set()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


def settings(folder: Path, model: Path, data: Path, **keys: Any) -> dict[str, Any]:
    steps = {"max_steps": STEPS, "batch_size": AT_ONCE, "save_steps": 6, "disk_reserve_mib": 0}
    return settings_without_chance(folder, model, data, {"streaming_start": True, **steps, **keys})


def run(*place: Path, said: list[str] | None = None, **keys: Any) -> RunResult:
    found = [] if said is None else said
    return train(load_config((), (), settings(*place, **keys)).config, say=found.append)


def rows_file(folder: Path) -> Path:
    return write_rows(folder / "rows.jsonl", sum_rows(ROWS))


def watch_rows(monkeypatch: pytest.MonkeyPatch, gate: Gate | None = None, opens_after: int = 0) -> list[int]:
    """The rows of all steps, in their order, as they come; the gate opens after so many steps."""
    seen: list[int] = []
    real = loop.batches_of_step

    def watched(*args: Any, **keys: Any) -> Any:
        batches = real(*args, **keys)
        seen.extend(row for batch in batches for row in batch.rows)
        if gate is not None and len(seen) == opens_after * AT_ONCE:
            gate.before = list(seen)
            gate.open.set()
        return batches

    monkeypatch.setattr(loop, "batches_of_step", watched)
    return seen


@pytest.mark.slow
def test_training_begins_on_the_first_shard_and_is_the_run_that_waited(
    tmp_path: Path, model: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, said = rows_file(tmp_path), list[str]()
    seen = watch_rows(monkeypatch, gate, opens_after=3)
    first = run(tmp_path / "first", model, data, said=said)
    starts = growing_store.TokenStore(
        next((tmp_path / "tuoling-cache" / "tokens").glob("*/meta.json")).parent
    )
    ends = [*starts.shard_starts[1:].tolist(), ROWS]
    assert len(ends) == 3 and max(gate.before) < ends[0]  # three steps before the second shard was there
    begin = 0
    for end in ends:  # the first epoch: shard by shard, each row of it once, not in the order of the file
        assert sorted(seen[begin:end]) == list(range(begin, end))
        begin = end
    assert seen[: ends[0]] != sorted(seen[: ends[0]])
    assert seen[ROWS:] == SampleOrder(ROWS, seed=42).rows(
        ROWS, STEPS * AT_ONCE
    )  # the second: as in every run
    assert any("the first" in line and "compiled while training" in line for line in said)
    assert f"rows: {ROWS} (alpaca {ROWS})" in said  # the counts come in the end
    wrote = record(first.path)
    assert wrote["plan"]["rows_known"] is False and wrote["plan"]["epochs"] is None
    assert wrote["data"]["whole"] is True and wrote["data"]["rows"] == ROWS
    epochs = column(first.path, "epoch")
    assert epochs[0] is None and epochs[-1] == round(STEPS * AT_ONCE / ROWS, 4)

    again, said = list(seen), list[str]()
    seen.clear()
    second = run(tmp_path / "second", model, data, said=said)  # all rows are there now
    assert seen == again and not any("compiled while training" in line for line in said)
    assert record(second.path)["plan"]["rows_known"] is True
    for name in ("loss", "grad_norm", "learning_rate", "tokens"):
        assert column(second.path, name) == column(first.path, name)
    assert weights(first.path) == weights(second.path)
    assert replay(first.path, steps=3, named="checkpoint-6", say=lambda _: None).equal


def weights(run: Path) -> bytes:
    return (run / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_killed_run_goes_on_with_its_rows_compiled_anew(tmp_path: Path, model: Path, gate: Gate) -> None:
    data = rows_file(tmp_path)
    gate.open.set()
    straight = run(tmp_path / "straight", model, data, lora_dropout=0.1).path
    stopped = tmp_path / "stopped"  # as a kill in step 8 leaves it
    shutil.copytree(straight, stopped)
    for name in ("adapter_model.safetensors", "all_results.json", "checkpoint-12", "checkpoint-18"):
        path = stopped / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    then = {**record(straight)["data"], "whole": False, "examples_sha256": None}
    edit_record(stopped, status="running", data=then)
    shutil.rmtree(tmp_path / "tuoling-cache")
    tuoling.resume(stopped, say=lambda _: None)
    assert column(stopped, "loss") == column(straight, "loss")
    assert weights(stopped) == weights(straight)
    data.write_text(data.read_text(encoding="utf-8").replace("等于 41", "等于 42"), encoding="utf-8")
    edit_record(stopped, status="running", data=then)
    with pytest.raises(TrainingError, match="this is not the run that was begun"):
        tuoling.resume(stopped, say=lambda _: None)


@pytest.mark.slow
def test_a_bad_row_ends_the_run_when_it_is_met(
    tmp_path: Path, model: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = sum_rows(ROWS)
    rows[50]["output"] = ""
    data = write_rows(tmp_path / "rows.jsonl", rows)
    seen = watch_rows(monkeypatch, gate, opens_after=2)
    with pytest.raises(DataError, match="rows are bad") as told:
        run(tmp_path / "run", model, data)
    assert 2 * AT_ONCE <= len(seen) <= 46  # none of the rows of the shard it is in
    ledger = [json.loads(line) for line in Path(str(told.value.where)).read_text().splitlines()]
    assert [row["line"] for row in ledger] == [51]
    state = record(tmp_path / "run" / "run")
    assert state["status"] == "failed" and "rows are bad" in state["error"]
    assert run(tmp_path / "let", model, data, allow_bad=0.05).status == "finished"


def padded_rows(path: Path) -> Path:
    """Three shards of the size that every run has, of 24 rows each: between them stand 4 MiB of blanks."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in sum_rows(72)]
    blank = " " * (shards.SHARD_BYTES + 1) + "\n"
    path.write_text("".join([*lines[:24], blank, *lines[24:48], blank, *lines[48:]]), encoding="utf-8")
    return path


@pytest.mark.slow
def test_another_process_compiles_and_ends_with_the_run(tmp_path: Path, model: Path) -> None:
    data = padded_rows(tmp_path / "rows.jsonl")
    result = run(tmp_path / "run", model, data, max_steps=18)
    assert result.status == "finished"
    assert record(result.path)["data"]["examples"] == 72
    again = run(tmp_path / "again", model, data, max_steps=18)
    assert column(again.path, "loss") == column(result.path, "loss")


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_train_on_the_first_shards_what_one_does(tmp_path: Path, model: Path) -> None:
    data = padded_rows(tmp_path / "rows.jsonl")
    one = run(tmp_path / "one", model, data, per_device_train_batch_size=2)
    shutil.rmtree(tmp_path / "tuoling-cache")
    keys = settings(tmp_path / "two", model, data, per_device_train_batch_size=2)
    two = tuoling.train(nproc=2, say=lambda _: None, **keys)
    assert column(two.path, "tokens") == column(one.path, "tokens")
    assert column(two.path, "loss") == pytest.approx(column(one.path, "loss"), rel=1e-5)
    theirs = load_file(two.path / "adapter_model.safetensors")
    for name, tensor in load_file(one.path / "adapter_model.safetensors").items():
        assert (tensor - theirs[name]).abs().max() < 1e-5, name


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["max_steps=-1"], "streaming_start needs max_steps"),
        (["val_size=0.1"], "held-out rows are drawn from all rows"),
        (["save_strategy=epoch"], "a save at the end of each epoch"),
        (["share_prefixes=true"], "share_prefixes goes by all rows"),
        (["max_tokens_per_batch=64"], "packs are laid over a whole epoch"),
    ],
)
def test_what_needs_all_rows_is_refused(words: list[str], said: str) -> None:
    given = ["max_steps=20", *words]
    with pytest.raises(ConfigError, match=said):
        load_config((), ["streaming_start=true", *given])
    load_config((), given)
