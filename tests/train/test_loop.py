"""The whole run, small: what it leaves, and the invariants that only the loop can keep or break."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.devices import DEVICES
from tests.tiny import settings_without_chance, sum_rows, tiny_model, write_rows

from tuoling.config import load_config
from tuoling.errors import ConfigError, DataError, OutputError, TrainingError
from tuoling.train import loop
from tuoling.train.checkpoint import checkpoints
from tuoling.train.loop import RunResult, train
from tuoling.train.prepare import Setup, prepare
from tuoling.train.run_folder import RunFolder
from tuoling.train.steps import make_steps


def run(tmp_path: Path, model: Path, rows: list[dict[str, Any]] | None = None, **keys: Any) -> RunResult:
    """Train on `rows` in float32 on the CPU with everything random switched off."""
    data = write_rows(tmp_path / "rows.jsonl", rows if rows is not None else sum_rows(16))
    settings = settings_without_chance(tmp_path, model, data, keys)
    return train(load_config((), (), settings).config, say=lambda _: None)


@pytest.fixture(scope="module")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("bloom"))


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_a_run_learns_and_leaves_what_it_promises(tmp_path: Path, bloom: Path, device: str) -> None:
    keys = {"num_train_epochs": 6, "val_size": 4, "save_steps": 5, "save_total_limit": 1}
    result = run(tmp_path, bloom, **keys, device=device)
    assert result.status == "finished"
    done = json.loads((result.path / "all_results.json").read_text())
    for key in ("train_loss_first", "train_loss_last", "eval_loss", "rows", "tokens", "learned_tokens"):
        assert done[key] is not None, key
    for key in ("steps", "seconds", "tokens_per_s", "peak_rss_gib", "peak_cuda_gib"):
        assert done[key] is not None, key
    assert device == "cpu" or done["peak_cuda_gib"] > 0
    assert done["rows"] == 12 and done["steps"] == 18
    assert done["train_loss_last"] < 0.6 * done["train_loss_first"]
    metrics = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == list(range(1, 19))
    assert metrics[0]["loss"] == done["train_loss_first"] and metrics[-1]["loss"] == done["train_loss_last"]
    assert sum(row["tokens"] for row in metrics) == done["tokens"]
    manifest = json.loads((result.path / "run.json").read_text())
    assert manifest["status"] == "finished" and manifest["template"]["id"] == "domain_bloom"
    assert [path.name for path in checkpoints(result.path)] == ["checkpoint-15"]
    for name in (
        "adapter_model.safetensors",
        "adapter_config.json",
        "template.json",
        "tokenizer.json",
        "README.md",
    ):
        assert (result.path / name).is_file(), name
    state = json.loads((result.path / "trainer_state.json").read_text())
    assert state["global_step"] == 18
    assert {row["step"] for row in state["log_history"] if "eval_loss" in row} == {3, 6, 9, 12, 15, 18}


@pytest.mark.slow
def test_every_row_is_seen_once_an_epoch(
    tmp_path: Path, bloom: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    step = loop.train_step

    def watch(fast: Any, optimizer: Any, accelerator: Any, batches: Any, norm: float) -> Any:
        seen.extend(row for batch in batches for row in batch.rows)
        return step(fast, optimizer, accelerator, batches, norm)

    monkeypatch.setattr(loop, "train_step", watch)
    run(tmp_path, bloom, sum_rows(7), num_train_epochs=3, per_device_train_batch_size=2)
    assert len(seen) == 21
    for epoch in range(3):
        assert sorted(seen[epoch * 7 : epoch * 7 + 7]) == list(range(7))


@pytest.mark.slow
@pytest.mark.parametrize("finetuning_type", ["lora", "full"])
@pytest.mark.parametrize("device", DEVICES)
def test_eight_by_one_is_one_by_eight(tmp_path: Path, bloom: Path, finetuning_type: str, device: str) -> None:
    losses, weights = [], []
    for name, micro, accumulate in (("a", 8, 1), ("b", 1, 8), ("c", 3, 1)):
        more = {"batch_size": 8} if name == "a" else {"gradient_accumulation_steps": accumulate}
        if name == "c":
            continue
        result = run(
            tmp_path / name,
            bloom,
            device=device,
            finetuning_type=finetuning_type,
            per_device_train_batch_size=micro,
            num_train_epochs=2,
            adam_epsilon=1e-3,  # Adam divides by the gradient's size: rounding noise must not be blown up
            **more,
        )
        rows = (result.path / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(row)["loss"] for row in rows])
        file = "adapter_model.safetensors" if finetuning_type == "lora" else "model.safetensors"
        weights.append(load_file(result.path / file))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for key, tensor in weights[0].items():
        assert torch.allclose(tensor, weights[1][key], rtol=1e-4, atol=1e-6), key


class KeepsGradients(torch.optim.SGD):
    """Takes no step: keeps the gradients it was to take one with."""

    gradient: torch.Tensor

    def step(self, closure: Any = None) -> None:
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self.gradient = torch.cat([parameter.grad.flatten() for parameter in parameters])


@pytest.mark.slow
@pytest.mark.parametrize("finetuning_type", ["lora", "full"])
def test_the_gradient_is_the_same_in_any_number_of_micro_batches(
    tmp_path: Path, bloom: Path, finetuning_type: str
) -> None:
    rows = [{"instruction": "说", "output": "好" * (1 + 5 * n)} for n in range(8)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    keys = {"model_name_or_path": str(bloom), "data": [str(data)], "dtype": "fp32", "device": "cpu"}
    keys |= {"lora_dropout": 0.0, "batch_size": 8, "finetuning_type": finetuning_type}
    setup = prepare(load_config((), (), keys).config, say=lambda _: None)
    run = RunFolder(tmp_path, {})
    parts = loop.assemble(setup, run, {}, lambda _: None)
    for name, parameter in parts.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)  # at 0, where it begins, half of the gradients are 0
    trained = [parameter for parameter in parts.model.parameters() if parameter.requires_grad]
    lengths, gradients, losses = setup.train.lengths, {}, []
    for budget in (int(lengths.sum()), int(lengths.sum()) - 1, 1, None):
        config = setup.config.model_copy(update={"max_tokens_per_batch": budget})
        batches = loop.batches_of_step(setup.train, make_steps(config, lengths), 0)
        assert sorted(row for batch in batches for row in batch.rows) == list(range(8))
        optimizer = KeepsGradients(trained, lr=0.0)
        losses.append(loop.train_step(parts.fast, optimizer, parts.engine, batches, 0.0)[0])
        gradients[len(batches)] = optimizer.gradient
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)
    assert sorted(gradients) == [1, 2, 8]
    for gradient in gradients.values():
        assert (gradient - gradients[1]).norm() <= 1e-6 * gradients[1].norm()


@pytest.mark.slow
def test_a_run_in_steps_of_tokens(tmp_path: Path, bloom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    step = loop.train_step

    def watch(fast: Any, optimizer: Any, accelerator: Any, batches: Any, norm: float) -> Any:
        assert all(batch.input_ids.numel() <= 128 for batch in batches)
        seen.append([row for batch in batches for row in batch.rows])
        return step(fast, optimizer, accelerator, batches, norm)

    monkeypatch.setattr(loop, "train_step", watch)
    result = run(tmp_path, bloom, sum_rows(30), num_train_epochs=2, max_tokens_per_batch=128)
    assert sorted(row for rows in seen for row in rows) == sorted([*range(30), *range(30)])
    manifest = json.loads((result.path / "run.json").read_text())
    assert manifest["plan"]["total_steps"] == len(seen) == result.results["steps"]
    assert manifest["plan"]["fill"] > 0.8 and manifest["plan"]["rows_per_step"] is None
    assert manifest["config"]["per_device_train_batch_size"] is None
    assert result.results["epochs"] == 2
    assert "token" in (result.path / "README.md").read_text().split("每步 each step |")[1].splitlines()[0]


@pytest.mark.slow
def test_a_budget_bounds_validation_and_does_not_change_it(tmp_path: Path, bloom: Path) -> None:
    losses = []
    for name, more in (("a", {}), ("b", {"max_tokens_per_batch": 64})):
        keys = {"val_size": 6, "max_steps": 1, "per_device_train_batch_size": 4, "adam_epsilon": 1e-3}
        result = run(tmp_path / name, bloom, **keys, **more)
        losses.append(result.results["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_two_runs_are_equal_bit_for_bit(tmp_path: Path, bloom: Path) -> None:
    first = run(tmp_path / "a", bloom, lora_dropout=0.1)
    second = run(tmp_path / "b", bloom, lora_dropout=0.1)
    one = load_file(first.path / "adapter_model.safetensors")
    two = load_file(second.path / "adapter_model.safetensors")
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.slow
def test_the_best_weights_are_kept(tmp_path: Path, bloom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, 1.0, 2.0, 2.5])
    monkeypatch.setattr(loop, "evaluate_loss", lambda *_: next(losses))
    result = run(tmp_path, bloom, val_size=4, num_train_epochs=4, eval_steps=3, load_best_model_at_end=True)
    best = load_file(result.path / "checkpoint-6" / "adapter_model.safetensors")
    top = load_file(result.path / "adapter_model.safetensors")
    assert all(torch.equal(best[key], top[key]) for key in top)
    assert (
        json.loads((result.path / "trainer_state.json").read_text())["best_model_checkpoint"]
        == "checkpoint-6"
    )


@pytest.mark.slow
def test_ctrl_c_saves(tmp_path: Path, bloom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, count = loop.train_step, iter(range(100))

    def interrupted(*args: Any) -> Any:
        if next(count) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(loop, "train_step", interrupted)
    result = run(tmp_path, bloom, num_train_epochs=10)
    assert result.status == "interrupted" and result.results["steps"] == 3
    assert (result.path / "adapter_model.safetensors").is_file()
    assert json.loads((result.path / "run.json").read_text())["status"] == "interrupted"


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_the_run(
    tmp_path: Path, bloom: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = loop.batch_loss
    calls = iter(range(100))
    monkeypatch.setattr(loop, "batch_loss", lambda *a: good(*a) * (math.nan if next(calls) == 2 else 1.0))
    with pytest.raises(TrainingError, match=r"step 3 is nan"):
        run(tmp_path, bloom)
    saved = json.loads((tmp_path / "run" / "nonfinite_rows.json").read_text())
    assert saved["step"] == 3 and len(saved["rows"]) == 4
    assert all(place.startswith(str(tmp_path / "rows.jsonl")) for place in saved["rows"])
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


@pytest.mark.slow
def test_a_gradient_that_is_no_number_spoils_nothing(
    tmp_path: Path, bloom: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, calls = loop.batch_loss, iter(range(100))

    def steep(*args: Any) -> torch.Tensor:
        loss = good(*args)
        if next(calls) == 2:
            loss.register_hook(lambda gradient: gradient * math.nan)
        return loss

    monkeypatch.setattr(loop, "batch_loss", steep)
    with pytest.raises(TrainingError, match="gradient of step 3 is nan"):
        run(tmp_path, bloom, save_steps=3)
    assert checkpoints(tmp_path / "run") == []


def state_of(folder: Path) -> tuple[str, str | None]:
    said = json.loads((folder / "run.json").read_text())
    return said["status"], said.get("error")


@pytest.mark.slow
def test_ctrl_c_while_the_end_is_saved_lets_it_be_saved(
    tmp_path: Path, bloom: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = loop.finish

    def pressed(*args: Any, **keys: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return save(*args, **keys)

    monkeypatch.setattr(loop, "finish", pressed)
    result = run(tmp_path, bloom, max_steps=1)
    assert state_of(result.path) == ("finished", None) and (result.path / "README.md").is_file()


@pytest.mark.slow
def test_a_stop_before_the_first_step_is_told_and_leaves_no_weights(
    tmp_path: Path, bloom: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Setup.steps

    def pressed(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return begin(*args)

    monkeypatch.setattr(Setup, "steps", pressed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, bloom)
    assert state_of(tmp_path / "run") == ("failed", "stopped before it was saved")
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("best", [False, True])
def test_weights_are_the_last_file_to_be_put_at_the_top(
    tmp_path: Path, bloom: Path, monkeypatch: pytest.MonkeyPatch, best: bool
) -> None:
    """A run that is killed while its end is moved has all it needs beside the weights, or no weights."""
    moved: list[str] = []
    replace = Path.replace

    def watch(file: Path, target: Path) -> Path:
        if file.parent.name == ".final":
            moved.append(file.name)
        return replace(file, target)

    monkeypatch.setattr(Path, "replace", watch)
    run(tmp_path, bloom, max_steps=1, val_size=4, load_best_model_at_end=best)
    assert moved[-1] == "adapter_model.safetensors" and "template.json" in moved
    assert not (tmp_path / "run" / ".final").exists()


@pytest.mark.slow
def test_run_json_says_how_many_rows_were_too_long_and_their_share(tmp_path: Path, bloom: Path) -> None:
    rows = [
        *sum_rows(6),
        {"instruction": "长" * 500, "output": "好"},
        {"instruction": "短", "output": "长" * 500},
    ]
    result = run(tmp_path, bloom, rows, overlong="drop", max_seq_len=200, max_steps=1)
    notes = json.loads((result.path / "run.json").read_text())["notes"]
    assert any("2 over-long rows dropped, 25.0% of all" in note for note in notes)


@pytest.mark.slow
def test_a_full_folder_is_refused_and_can_be_moved_aside(tmp_path: Path, bloom: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("precious")
    with pytest.raises(OutputError, match="not empty"):
        run(tmp_path, bloom)
    run(tmp_path, bloom, overwrite_output_dir=True, max_steps=1)
    assert (tmp_path / "run.old-1" / "mine.txt").read_text() == "precious"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "error", "words"),
    [
        ({"data": ["nothing.json"]}, DataError, "nothing.json"),
        ({"val_size": 100}, ConfigError, "val_size"),
        ({"dtype": "fp16"}, ConfigError, "fp16"),
        ({"max_seq_len": 4}, DataError, "max_seq_len"),
        ({"template": "alpacca"}, Exception, "alpaca"),
        ({"lora_target": ["q_proj"]}, ConfigError, "query_key_value"),
    ],
)
def test_bad_settings_stop_before_anything_is_written(
    tmp_path: Path, bloom: Path, keys: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error) as raised:
        run(tmp_path, bloom, **keys)
    assert words in str(raised.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_plain_text_is_trained_whole(tmp_path: Path, bloom: Path) -> None:
    rows = [{"text": "春眠不觉晓，处处闻啼鸟。"}, {"text": "床前明月光，疑是地上霜。"}]
    result = run(tmp_path, bloom, rows, stage="pt", finetuning_type="full", num_train_epochs=20)
    assert result.results["train_loss_last"] < 0.5 * result.results["train_loss_first"]
    assert (result.path / "model.safetensors").is_file()


@pytest.mark.slow
def test_other_tools_render_the_same_prompt(tmp_path: Path, bloom: Path) -> None:
    from transformers import AutoTokenizer

    result = run(tmp_path, bloom, max_steps=1)
    theirs = AutoTokenizer.from_pretrained(result.path)
    messages = [{"role": "user", "content": "1 加 2 等于多少？"}]
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<s>用户:1 加 2 等于多少？\n\n助手:"


@pytest.mark.slow
def test_training_goes_on_from_an_adapter(tmp_path: Path, bloom: Path) -> None:
    first = run(tmp_path / "a", bloom, num_train_epochs=4, lora_rank=4, warmup_steps=0)
    again = run(tmp_path / "b", bloom, adapter_name_or_path=str(first.path), warmup_steps=0, max_steps=1)
    assert again.results["train_loss_first"] < 0.8 * first.results["train_loss_first"]
    assert json.loads((again.path / "adapter_config.json").read_text())["r"] == 4
    base = json.loads((again.path / "template.json").read_text())["base"]["path"]
    assert Path(base) == bloom.resolve()


@pytest.mark.slow
def test_fp16_of_a_config_for_a_gpu_gives_way_on_a_cpu(tmp_path: Path, bloom: Path) -> None:
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("there is a GPU: fp16 is what it trains in")
    result = run(tmp_path, bloom, dtype="fp16", device="auto", max_steps=1)
    manifest = json.loads((result.path / "run.json").read_text())
    assert manifest["dtype"] in ("bf16", "fp32")
    assert any("fp16" in note for note in manifest["notes"])


@pytest.mark.slow
def test_a_disk_too_small_leaves_the_old_folder_where_it_is(
    tmp_path: Path, bloom: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("precious")
    monkeypatch.setattr("tuoling.environment.disk_free_bytes", lambda _: 10_000)
    with pytest.raises(OutputError):
        run(tmp_path, bloom, overwrite_output_dir=True)
    assert (tmp_path / "run" / "mine.txt").read_text() == "precious"
