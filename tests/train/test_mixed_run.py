"""A run on sources by share: what it sees, what the watched rows say, and an early stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import settings_without_chance, sum_rows, tiny_model, write_rows

from tuoling.config import load_config
from tuoling.train import loop
from tuoling.train.loop import RunResult, train
from tuoling.train.replay import replay


@pytest.fixture(scope="module")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("bloom"))


def general_rows(count: int) -> list[dict[str, str]]:
    return [
        {"instruction": f"第 {n} 个字母？", "input": "", "output": chr(97 + n % 26)} for n in range(count)
    ]


def run(folder: Path, model: Path, data: list[Path], **keys: Any) -> RunResult:
    settings = settings_without_chance(folder, model, data[0], {"save_steps": 0, **keys})
    settings["data"] = [str(path) for path in data]
    return train(load_config((), (), settings).config, say=lambda _: None)


def losses(result: RunResult, key: str = "loss") -> list[float]:
    rows = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if key in row]


@pytest.mark.slow
def test_a_run_sees_its_sources_by_share(
    tmp_path: Path, bloom: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    domain = write_rows(tmp_path / "domain.jsonl", sum_rows(12))
    general = write_rows(tmp_path / "general" / "rows.jsonl", general_rows(40))
    seen: list[str] = []
    step = loop.batches_of_step

    def counted(train: Any, *rest: Any, **more: Any) -> Any:
        batches = step(train, *rest, **more)
        seen.extend(train.store.place(row) for batch in batches for row in batch.rows)
        return batches

    monkeypatch.setattr(loop, "batches_of_step", counted)
    mix = {str(domain): 0.75, str(general.parent): 0.25}
    result = run(
        tmp_path, bloom, [domain, general.parent], mix=mix, num_train_epochs=3, watch_data=[str(general)]
    )
    assert len(seen) == 48 and result.results["epochs"] == 3
    assert sorted(seen.count(f"{domain}:{line}") for line in range(1, 13)) == [3] * 12
    of_general = [place for place in seen if str(general) in place]
    assert len(of_general) == len(set(of_general)) == 12, "other general rows in each epoch"
    plan = json.loads((result.path / "run.json").read_text())["plan"]
    assert [(part["share"], part["rows"], part["taken"], part["passes"]) for part in plan["mix"]] == [
        (0.75, 12, 12, 3.0),
        (0.25, 40, 4, 0.3),
    ]
    assert plan["rows"] == 16
    again = replay(result.path, steps=6, say=lambda _: None)
    assert again.equal and again.steps == 6
    done = result.results
    assert done["watch_loss_after"] < done["watch_loss_before"]
    assert done["watch_loss_change"] == done["watch_loss_after"] / done["watch_loss_before"] - 1


@pytest.mark.slow
def test_domain_rows_alone_forget_what_general_rows_keep(tmp_path: Path, bloom: Path) -> None:
    domain = write_rows(tmp_path / "domain.jsonl", sum_rows(24))
    general = write_rows(tmp_path / "general.jsonl", general_rows(24))
    keys = {"watch_data": [str(general)], "max_steps": 12, "finetuning_type": "full", "learning_rate": 3e-3}
    first = run(tmp_path / "first", bloom, [general], **{**keys, "max_steps": 30}).path
    alone = run(tmp_path / "alone", first, [domain], **keys).results
    forecast = json.loads((tmp_path / "alone" / "run" / "run.json").read_text())["forecast"]
    assert (forecast["at_step"], forecast["timed_steps"]) == (2, 1) and forecast["seconds"] > 0
    mix = {str(domain): 0.5, str(general): 0.5}
    mixed = run(tmp_path / "mixed", first, [domain, general], mix=mix, **keys).results
    assert alone["watch_loss_before"] == mixed["watch_loss_before"]
    assert alone["watch_loss_change"] > 0.2 and mixed["watch_loss_change"] < 0.5 * alone["watch_loss_change"]


@pytest.mark.slow
def test_an_early_stop_by_the_held_out_loss(tmp_path: Path, bloom: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", sum_rows(16))
    held_out = write_rows(tmp_path / "eval.jsonl", general_rows(4))
    keys = {"eval_data": [str(held_out)], "eval_steps": 1, "learning_rate": 0.3, "finetuning_type": "full"}
    result = run(tmp_path, bloom, [data], early_stopping_patience=3, max_steps=60, **keys)
    found = losses(result, "eval_loss")
    lowest = found.index(min(found))
    assert result.status == "finished" and result.results["stopped_early"]
    assert result.results["steps"] == len(found) == lowest + 4 < 60
    assert json.loads((result.path / "run.json").read_text())["status"] == "finished"
