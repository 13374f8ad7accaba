"""Runs compared by rows: what is read, what is refused, and a study from its recipe's shares to its picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import settings_without_chance, sum_rows, tiny_model, write_rows
from typer.testing import CliRunner

from tuoling.cli.main import app
from tuoling.config import load_config
from tuoling.data.read import read_rows
from tuoling.data.sources import resolve_sources
from tuoling.errors import DataError, UsageError
from tuoling.evaluate.answers import Answer
from tuoling.evaluate.compare import compare
from tuoling.evaluate.data_size_study import data_size_study
from tuoling.evaluate.evaluation import Evaluation
from tuoling.evaluate.items import Item
from tuoling.evaluate.outcome import Outcome, Side
from tuoling.files import write_json
from tuoling.text.conversation import Conversation, Turn
from tuoling.train.loop import train


def fake_run(
    folder: Path, rows: int, right: int, *, count: int = 10, metric: str = "exact_match", other: str = ""
) -> Path:
    """A run on `rows` rows whose tuned side has the first `right` of 2 x count questions; the base has none."""
    items = [
        Item(
            f"t:{n}",
            "数学" if n < count else "code",
            Conversation((Turn("user", f"问{n // 2}{other}"),)),
            "答",
        )
        for n in range(2 * count)
    ]
    values: dict[str, list[float]] = {
        "base": [0.0] * len(items),
        "tuned": [float(n < right) for n in range(len(items))],
    }
    sides = [
        Side(
            name,
            "BASE" if name == "base" else str(folder),
            {},
            [Answer("x", "stop", 1)] * len(items),
            {metric: list(found)},
        )
        for name, found in values.items()
    ]
    Outcome("mine", "t.jsonl", items, sides, metric).write(folder / "evaluation" / "mine-t")
    write_json(folder / "run.json", {"results": {"rows": rows}, "plan": {"rows": rows}})
    return folder


@pytest.mark.slow
def test_scores_against_rows(tmp_path: Path) -> None:
    few, many = fake_run(tmp_path / "few", 100, 5), fake_run(tmp_path / "many", 1000, 18)
    found = compare([many, few], out=tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert kept == json.loads(json.dumps(found.to_json()))
    assert [(run["rows"], run["classes"]) for run in kept["runs"]] == [
        (0, {"数学": 0.0, "code": 0.0}),
        (100, {"数学": 0.5, "code": 0.0}),
        (1000, {"数学": 1.0, "code": 0.8}),
    ]
    gains = kept["gains"]
    assert {name: (gain["mean"], gain["verdict"]) for name, gain in gains.items()} == {
        "": (0.65, "better"),
        "数学": (0.5, "better"),
        "code": (0.8, "better"),
    }
    assert found.picture is not None and found.picture.stat().st_size > 10_000


@pytest.mark.slow
def test_what_cannot_be_compared(tmp_path: Path) -> None:
    one = fake_run(tmp_path / "one", 100, 5)
    with pytest.raises(UsageError, match="two runs at least"):
        compare([one])
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="not evaluated yet"):
        compare([one, tmp_path / "none"])
    with pytest.raises(DataError, match="not comparable: items 20 and 22"):
        compare([one, fake_run(tmp_path / "more", 200, 5, count=11)])
    with pytest.raises(DataError, match="not comparable: headline exact_match and rouge_l"):
        compare([one, fake_run(tmp_path / "other", 200, 5, metric="rouge_l")])
    with pytest.raises(DataError, match="not comparable: other questions"):
        compare([one, fake_run(tmp_path / "asked", 200, 5, other="？")])
    assert not list(tmp_path.glob("**/comparison.json"))


@pytest.mark.slow
def test_the_command_needs_no_suite(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path / name, rows, rows // 10) for name, rows in (("a", 100), ("b", 150))]
    words = ["evaluate", "--compare", *map(str, runs), "--out", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert [run["name"] for run in json.loads(result.stdout)["runs"]] == ["base", "a", "b"]


@pytest.mark.long
def test_a_study_trains_each_share_once(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", sum_rows(16))
    held_out = write_rows(tmp_path / "test.jsonl", sum_rows(6, start=100))
    keys: dict[str, Any] = {"recipe": "data_size_study", "num_train_epochs": 1, "batch_size": 4}
    settings = settings_without_chance(tmp_path, tiny_model(tmp_path / "base"), data, keys)
    config = load_config((), (), settings).config
    assert config.data_shares == (0.25, 0.5, 1.0)
    trained: list[Any] = []

    def note_and_train(one: Any) -> Any:
        trained.append(one)
        return train(one, say=lambda _: None)

    asked = Evaluation("", file=str(held_out), settings={"max_new_tokens": 4})
    found = data_size_study(config, asked, note_and_train)
    assert [one.data for one in trained] == [(f"{data}#4",), (f"{data}#8",), (str(data),)]
    assert [entry.rows for entry in found.entries] == [0, 4, 8, 16]
    assert found.picture == tmp_path / "run" / "score_by_rows.png" and found.picture.is_file()
    shares = [
        {row.place.line for source in resolve_sources(one.data) for row in read_rows(source)}
        for one in trained
    ]
    assert shares[0] < shares[1] < shares[2]
    data_size_study(config, asked, note_and_train)
    assert len(trained) == 3  # finished runs are used as they are
