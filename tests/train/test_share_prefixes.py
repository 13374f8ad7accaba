"""`share_prefixes` in a run: the same steps for fewer tokens, said in the plan, and held-out rows kept apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from tests.data.test_prefixes import unfolded
from tests.tiny import settings_without_chance, tiny_model, write_rows

from tuoling.config import load_config
from tuoling.train.loop import train
from tuoling.train.prepare import Setup, prepare


@pytest.fixture(scope="module")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("bloom"))


def dialogues(count: int, turns: int = 4) -> list[dict[str, str]]:
    """Rows in the shape of BELLE's multiturn_chat_0.8M, `turns` of each dialogue."""
    return [
        row
        for d in range(count)
        for row in unfolded([f"第{d}组{t // 2}问" if t % 2 == 0 else f"答{d * t}" for t in range(2 * turns)])
    ]


def config(tmp_path: Path, model: Path, rows: list[dict[str, str]], **keys: Any) -> Any:
    data = write_rows(tmp_path / "rows.jsonl", rows)
    settings = settings_without_chance(tmp_path, model, data, keys)
    return load_config((), (), settings).config


@pytest.mark.slow
@pytest.mark.parametrize("learn", ["last", "all"])
def test_a_run_over_whole_epochs_learns_the_same(tmp_path: Path, bloom: Path, learn: str) -> None:
    """A step of the whole data, three times: equal losses and weights, the same number of learned tokens."""
    found = {}
    for share in (False, True):
        keys = {"share_prefixes": share, "learn": learn, "adam_epsilon": 1e-3}
        asked = config(
            tmp_path / str(share),
            bloom,
            dialogues(4),
            per_device_train_batch_size=16,
            num_train_epochs=3,
            **keys,
        )
        run = train(asked, say=lambda _: None).path
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found[share] = (metrics, load_file(run / "adapter_model.safetensors"), run)
    alone, shared = found[False], found[True]
    assert len(shared[0]) == 3
    for row, other in zip(alone[0], shared[0], strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-5)
        assert other["learned_tokens"] == row["learned_tokens"] and other["tokens"] < 0.6 * row["tokens"]
    for name, tensor in alone[1].items():
        assert (shared[1][name] - tensor).norm() <= 1e-4 * tensor.norm() + 1e-7, name
    record = json.loads((shared[2] / "run.json").read_text())
    plan = record["plan"]
    assert (plan["rows"], plan["shared_rows"]) == (4, 12) and record["config"]["share_prefixes"] is True
    assert plan["tokens"] + plan["shared_tokens"] == alone[0][0]["tokens"]
    assert (
        plan["tokens"] == shared[0][0]["tokens"] and plan["learned_tokens"] == alone[0][0]["learned_tokens"]
    )
    assert any("12 of 16 rows" in note and "4.00 times" in note for note in record["notes"])


def prepared(asked: Any) -> tuple[Setup, list[str]]:
    said: list[str] = []
    return prepare(asked, say=said.append), said


@pytest.mark.slow
def test_held_out_rows_are_learned_nowhere(tmp_path: Path, bloom: Path) -> None:
    rows = dialogues(10)
    plain, said = prepared(config(tmp_path, bloom, rows, val_size=9))
    assert not any("share_prefixes" in line for line in said) and plain.plan.shared_rows == 0
    shared, _ = prepared(config(tmp_path, bloom, rows, val_size=9, share_prefixes=True))
    assert plain.held_out is not None and shared.held_out is not None
    assert shared.held_out.index.tolist() == plain.held_out.index.tolist()
    assert shared.held_out.shared is None
    assert shared.train.shared is not None
    trained = np.concatenate([shared.train.index, shared.train.shared.members])
    assert sorted(trained.tolist()) == plain.train.index.tolist()
    places = [place for row in shared.train.index.tolist() for place in shared.train.places(row)]
    assert sorted(places) == sorted(plain.train.store.place(row) for row in plain.train.index.tolist())
    assert shared.plan.rows + shared.plan.shared_rows == 31 and shared.plan.shared_rows >= 15


@pytest.mark.slow
def test_the_plan_says_it(tmp_path: Path, bloom: Path) -> None:
    setup, said = prepared(config(tmp_path, bloom, dialogues(5), share_prefixes=True))
    shown = dict(setup.plan.lines())["shared prefixes"]
    saved = setup.plan.shared_tokens / (setup.plan.shared_tokens + setup.plan.tokens)
    assert shown.startswith("15 of 20 rows") and f"{saved:.1%} of tokens saved" in shown and saved > 0.5
    assert any("fewer steps" in line for line in said)


@pytest.mark.slow
def test_nothing_to_share_is_said(tmp_path: Path, bloom: Path) -> None:
    setup, said = prepared(config(tmp_path, bloom, dialogues(5, turns=1), share_prefixes=True))
    assert "share_prefixes: no row begins another one" in said
    assert "shared prefixes" not in dict(setup.plan.lines()) and setup.plan.rows == 5
