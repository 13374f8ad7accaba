"""A new run from old weights: which weights, which settings, which rows, and along which schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import sum_rows, tiny_model, write_rows
from tests.train.runs import QUIET, column, record, run, steps_of
from typer.testing import CliRunner

from tuoling.cli.main import app
from tuoling.errors import ModelError, TrainingError, UsageError
from tuoling.train.entry import continue_from

WORDS = [f"{key}={value}" for key, value in QUIET.items() if value is not None] + [
    *("dtype=fp32", "device=cpu", "plot_loss=false"),
]


@pytest.fixture(scope="module")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("bloom"))


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory, bloom: Path) -> Path:
    """16 rows, 4 a step, 8 steps = 2 epochs, a cosine with 2 steps of warm-up; checkpoint-4 and the end."""
    keys = {"max_steps": 8, "lr_scheduler_type": "cosine", "warmup_steps": 2, "lora_rank": 4}
    return run(tmp_path_factory.mktemp("old"), bloom, **keys).path


def go_on(
    source: Path, data: Path, out: Path, *words: str, agreed: bool = True, **keys: Any
) -> tuple[Path, list[str]]:
    said: list[str] = []
    result = continue_from(
        source,
        [*WORDS, *words],
        {"data": [str(data)], "output_dir": str(out)},
        agreed=lambda _: agreed,
        say=said.append,
        **keys,
    )
    assert result.path == out
    return out, said


def new_rows(tmp_path: Path, count: int = 8) -> Path:
    return write_rows(tmp_path / "new.jsonl", sum_rows(count, start=50))


@pytest.mark.slow
def test_a_run_of_ours_lends_its_weights_and_settings_but_not_its_rows(
    tmp_path: Path, old: Path, bloom: Path
) -> None:
    out, _ = go_on(old, new_rows(tmp_path), tmp_path / "next", "num_train_epochs=2")
    config = record(out)["config"]
    assert config["lora_rank"] == 4 and config["template"] == "domain_bloom"
    assert config["lr_scheduler_type"] == "cosine" and config["learning_rate"] == 1e-2
    assert config["max_steps"] == -1 and len(config["data"]) == 1 and config["data"][0].endswith("new.jsonl")
    assert (
        len(steps_of(out)) == 4 and column(out, "learning_rate")[0] == 0.0
    )  # a schedule of its own, from its warm-up
    from_base = run(tmp_path / "base", bloom, sum_rows(8, start=50), max_steps=1).path
    assert column(out, "loss")[0] < 0.9 * column(from_base, "loss")[0]  # it knows how answers go already
    assert record(out)["continues"]["from"] == str(old.resolve())
    assert record(out)["continues"]["keep_schedule"] is False
    before = load_file(old / "adapter_model.safetensors")
    assert load_file(out / "adapter_model.safetensors").keys() == before.keys()


@pytest.mark.slow
def test_keeping_the_schedule_on_the_same_rows_is_the_run_that_was_not_stopped(
    tmp_path: Path, old: Path
) -> None:
    rows, words = old.parent / "rows.jsonl", ("num_train_epochs=2",)
    out, said = go_on(old / "checkpoint-4", rows, tmp_path / "next", *words, keep_schedule=True)
    straight = steps_of(old)[4:]
    for name in ("step", "loss", "grad_norm", "learning_rate", "tokens"):
        assert column(out, name) == [row[name] for row in straight], name
    weights = load_file(out / "adapter_model.safetensors")
    for name, tensor in load_file(old / "adapter_model.safetensors").items():
        assert torch.equal(weights[name], tensor), name
    assert any("steps 5 to 8 of 8: 1.0 passes over 16 rows, passing over 16 rows" in line for line in said)


@pytest.mark.slow
def test_new_rows_are_as_if_appended_and_begin_at_the_first(tmp_path: Path, old: Path) -> None:
    out, said = go_on(old / "checkpoint-4", new_rows(tmp_path), tmp_path / "next", keep_schedule=True)
    assert column(out, "step") == [5, 6, 7, 8]
    assert column(out, "learning_rate") == [row["learning_rate"] for row in steps_of(old)[4:]]
    assert [round(value, 4) for value in column(out, "epoch")] == [0.5, 1.0, 1.5, 2.0]  # of the new rows
    assert any("2.0 passes over 8 rows, from the first row" in line for line in said)


@pytest.mark.slow
def test_more_passes_than_epochs_are_asked_for(tmp_path: Path, old: Path) -> None:
    data = new_rows(tmp_path, 4)  # one step an epoch: four are left
    words = ("num_train_epochs=3",)
    with pytest.raises(UsageError, match=r"4\.0 passes over the new rows are more than num_train_epochs=3"):
        go_on(old / "checkpoint-4", data, tmp_path / "no", *words, keep_schedule=True, agreed=False)
    assert not (tmp_path / "no").exists()
    out, _ = go_on(
        old / "checkpoint-4", data, tmp_path / "two", *words, keep_schedule=True, agreed=False, epochs=2
    )
    assert column(out, "step") == [5, 6]
    assert column(out, "learning_rate") == [row["learning_rate"] for row in steps_of(old)[4:6]]


@pytest.mark.slow
def test_from_data_beginning_is_a_real_boolean(
    tmp_path: Path, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUOLING_CACHE", str(tmp_path / "cache"))
    rows = old.parent / "rows.jsonl"
    tokens = {}
    for flag in ("--from-data-beginning", "--no-from-data-beginning"):
        out = tmp_path / flag
        words = ["continue", str(old / "checkpoint-4"), *WORDS, "--data", str(rows), "--out", str(out)]
        done = CliRunner().invoke(app, [*words, "num_train_epochs=2", "--keep-schedule", flag])
        assert done.exit_code == 0, done.output
        tokens[flag] = column(out, "tokens")
    first = [row["tokens"] for row in steps_of(old)]
    assert tokens == {"--from-data-beginning": first[:4], "--no-from-data-beginning": first[4:]}
    assert first[:4] != first[4:]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (
            ["--data", "rows.jsonl", "--no-from-data-beginning"],
            "--from-data-beginning is for --keep-schedule",
        ),
        (["--data", "rows.jsonl", "--epochs", "2"], "--epochs is for --keep-schedule"),
        ([], "--data is missing"),
    ],
)
def test_a_wrong_call_is_told(tmp_path: Path, words: list[str], problem: str) -> None:
    done = CliRunner().invoke(app, ["continue", str(tmp_path), *words])
    assert done.exit_code == 2 and problem in " ".join(done.output.split())


@pytest.mark.slow
def test_a_schedule_that_is_not_there_or_is_over_cannot_be_kept(tmp_path: Path, old: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (bare / name).write_bytes((old / name).read_bytes())
    data = new_rows(tmp_path)
    with pytest.raises(TrainingError, match="no checkpoint with an optimizer's state"):
        go_on(bare, data, tmp_path / "no", keep_schedule=True)
    with pytest.raises(TrainingError, match="no step is left: the schedule ends at 4, and 4 are done"):
        schedule = old / "checkpoint-4" / "position.json"
        assert '"total_steps": 8' in schedule.read_text()
        copied = tmp_path / "over" / "checkpoint-4"
        copied.mkdir(parents=True)
        for file in (old / "checkpoint-4").iterdir():
            (copied / file.name).write_bytes(file.read_bytes())
        (copied / "position.json").write_text(
            schedule.read_text().replace('"total_steps": 8', '"total_steps": 4')
        )
        (copied / "manifest.json").unlink()
        from tuoling.files import write_manifest

        write_manifest(copied)
        go_on(copied, data, tmp_path / "no", "max_steps=4", keep_schedule=True)
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_anybodys_adapter_is_gone_on_from(tmp_path: Path, bloom: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(bloom)
    config = LoraConfig(
        r=2, lora_alpha=8, target_modules=["dense"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    get_peft_model(base, config).save_pretrained(tmp_path / "theirs")
    data = write_rows(tmp_path / "one.jsonl", sum_rows(1))
    out, _ = go_on(
        tmp_path / "theirs", data, tmp_path / "next", "max_steps=1", "template=domain_bloom", base=str(bloom)
    )
    weights = load_file(out / "adapter_model.safetensors")
    assert all("dense" in name for name in weights) and {min(t.shape) for t in weights.values()} == {2}

    from tuoling.config import load_config
    from tuoling.train.prepare import prepare

    asked = {
        "model_name_or_path": str(bloom),
        "data": [str(data)],
        "template": "domain_bloom",
        "device": "cpu",
    }
    example = prepare(load_config((), (), asked).config, say=lambda _: None).train[0]
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bloom), tmp_path / "theirs")
    ids = torch.as_tensor(example.input_ids.astype("int64"))[None]
    learned = torch.zeros_like(ids, dtype=torch.bool)
    for start, stop in example.spans:
        learned[0, start:stop] = True
    with torch.no_grad():
        logits = theirs(ids).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits[learned[0, 1:]], ids[0, 1:][learned[0, 1:]])
    assert column(out, "loss")[0] == pytest.approx(loss.item(), abs=2e-5)


@pytest.mark.slow
def test_a_whole_model_is_gone_on_from_in_full_or_by_lora(tmp_path: Path, bloom: Path) -> None:
    data = new_rows(tmp_path)
    full = run(tmp_path / "full", bloom, max_steps=1, finetuning_type="full").path
    out, _ = go_on(full, data, tmp_path / "next", "max_steps=1")
    assert record(out)["config"]["finetuning_type"] == "full" and (out / "model.safetensors").is_file()
    out, _ = go_on(full, data, tmp_path / "lora", "max_steps=1", "finetuning_type=lora")
    assert (out / "adapter_model.safetensors").is_file()
    with pytest.raises(ModelError, match="no such model folder"):
        go_on(tmp_path / "nowhere" / "at" / "all", data, tmp_path / "no")


@pytest.mark.slow
def test_an_adapter_that_is_damaged_leaves_no_run(tmp_path: Path, old: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "adapter_config.json").write_bytes((old / "adapter_config.json").read_bytes())
    tensors = load_file(old / "adapter_model.safetensors")
    name = next(iter(tensors))
    tensors[name] = tensors[name][:, :3].contiguous()
    save_file(tensors, bad / "adapter_model.safetensors")
    with pytest.raises(ModelError):
        go_on(bad, new_rows(tmp_path), tmp_path / "no", base=record(old)["base"]["path"])


def test_the_command_starts_the_same_processes_as_train(
    tmp_path: Path, bloom: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuoling.train import launch

    started: list[launch.Launch] = []

    def train_on(launch: launch.Launch, *_: Any, **keys: Any) -> None:
        started.append(launch)
        raise TrainingError("enough")

    monkeypatch.setattr(launch, "train_on", train_on)
    words = ["continue", str(bloom), "--data", str(new_rows(tmp_path)), "--out", str(tmp_path / "out")]
    places = [
        ["--devices", "0,1,3"],
        ["--nproc", "2", "--nnodes", "4", "--node-rank", "3", "--master", "10.0.0.1:29501"],
    ]
    for place in places:
        result = CliRunner().invoke(app, [*words, *WORDS, *place])
        assert result.exit_code == 1
    assert started == [launch.Launch(3, (0, 1, 3)), launch.Launch(2, (), 4, 3, "10.0.0.1:29501")]


@pytest.mark.slow
def test_the_passes_are_counted_for_the_processes_that_will_train(
    tmp_path: Path, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuoling.train import launch

    starts: list[Any] = []

    def train_on(*_: Any, start: Any, **keys: Any) -> Any:
        starts.append(start)
        raise TrainingError("enough")

    monkeypatch.setattr(launch, "train_on", train_on)
    for processes, steps in ((2, 20), (4, 10)):  # 80 rows a pass, 4 rows a process and step, 2 passes
        with pytest.raises(TrainingError, match="enough"):
            go_on(
                *(old / "checkpoint-4", new_rows(tmp_path, 80), tmp_path / "no", "num_train_epochs=2"),
                keep_schedule=True,
                epochs=1,
                launch=launch.Launch(nproc=processes),
            )
        assert starts[-1].offset.total_steps == steps
        assert starts[-1].offset.stop == 4 + steps // 2
