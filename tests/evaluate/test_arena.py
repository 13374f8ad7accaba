"""Pairwise comparison: both orders are asked, and a judge that looks at the place alone decides nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from tests.evaluate.fake_engine import FakeEngine
from tests.openai_server import FakeOpenAI, Fault, last_user_text, serve
from tests.tiny import tiny_model, write_rows
from tests.train.runs import run

from tuoling.errors import EndpointError, UsageError
from tuoling.evaluate import evaluation, sides
from tuoling.evaluate.arena import parse_verdict
from tuoling.evaluate.evaluation import Evaluation, evaluate
from tuoling.evaluate.outcome import item_rows
from tuoling.infer.endpoint import Endpoint

ROWS = [{"instruction": f"{n} 加 1？", "output": str(n + 1), "class": "math"} for n in range(10)]


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeEngine]:
    """base knows nothing, tuned is right on all but the last, other is always right."""

    def right(question: str) -> str:
        return str(int(question.split()[0]) + 1)

    found = {
        "base": FakeEngine("base", lambda question: "不知道"),
        "tuned": FakeEngine(
            "tuned", lambda question: "不知道" if question.startswith("9") else right(question)
        ),
        "other": FakeEngine("other", right),
    }
    monkeypatch.setattr(sides, "open_engine", lambda path, **options: found[path])
    two = [sides.Contender("base", "base"), sides.Contender("tuned", "tuned")]
    monkeypatch.setattr(evaluation, "contenders", lambda path, **_: (list(two), None))
    return found


def fair(body: dict[str, Any]) -> str:
    """The answer that is the reference wins, wherever it stands."""
    text = last_user_text(body)
    lines = dict(line.partition(":")[::2] for line in text.splitlines())
    a, b = (lines[name] == lines["标准答案"] for name in ("回答A", "回答B"))
    return f"理由：……\n[[{'C' if a == b else 'A' if a else 'B'}]]"


def arena(tmp_path: Path, server: FakeOpenAI, **options: Any) -> Evaluation:
    file = write_rows(tmp_path / "rows.jsonl", ROWS)
    judge = Endpoint(server.url, "test", concurrency=1)
    return Evaluation("tuned", file=str(file), judge=judge, arena=True, out=tmp_path / "out", **options)


@pytest.mark.slow
def test_the_better_side_wins_in_both_orders(tmp_path: Path, engines: dict[str, FakeEngine]) -> None:
    with serve(fair) as server:
        (scores,) = evaluate(arena(tmp_path, server)).scores()
    assert len(server.requests) == 18  # nine questions in two orders; the tenth's answers are equal
    (bout,) = scores["bouts"]
    assert (bout["wins"], bout["ties"], bout["losses"], bout["equal_answers"]) == (9, 1, 0, 1)
    assert bout["changed_with_the_order"] == 0 and bout["difference"]["verdict"] == "better"
    found = scores["overall"]["wins"]
    assert (found["base"]["mean"], found["tuned"]["mean"]) == (pytest.approx(0.05), pytest.approx(0.95))
    assert found["difference"]["mean"] == pytest.approx(0.9) and scores["headline"] == "wins"
    places = [re.findall(r"回答([AB]):不知道", last_user_text(body)) for body in server.requests]
    assert sorted(map(tuple, places)) == [("A",)] * 9 + [("B",)] * 9
    with serve(fair) as server:
        again = arena(tmp_path, server)
        evaluate(again)
        assert len(server.requests) == 18  # another address is another judge
        evaluate(again)
        assert len(server.requests) == 18  # the same one is not paid again


@pytest.mark.slow
@pytest.mark.parametrize(("letter", "first"), [("A", 9), ("B", 0)])
def test_a_judge_that_looks_at_the_place_decides_nothing(
    tmp_path: Path, engines: dict[str, FakeEngine], letter: str, first: int
) -> None:
    with serve(lambda body: f"[[{letter}]]") as server:
        (scores,) = evaluate(arena(tmp_path, server)).scores()
    (bout,) = scores["bouts"]
    assert (bout["wins"], bout["ties"], bout["losses"]) == (0, 10, 0)
    assert (bout["changed_with_the_order"], bout["for_the_one_shown_first"]) == (9, first)
    assert scores["overall"]["wins"]["difference"]["verdict"] == "cannot tell"
    assert any("changed with the order" in note["en"] for note in scores["notes"])


@pytest.mark.slow
def test_three_models_meet_in_pairs(tmp_path: Path, engines: dict[str, FakeEngine]) -> None:
    with serve(fair) as server:
        (scores,) = evaluate(arena(tmp_path, server, against=("other",))).scores()
    means = {name: value["mean"] for name, value in scores["overall"]["wins"].items()}
    # base loses 10 to other, 9 to tuned and ties once; tuned and other differ on the last question alone
    assert means == pytest.approx({"base": 0.025, "tuned": (9.5 + 4.5) / 20, "other": (10 + 5.5) / 20})
    assert [(bout["first"], bout["second"]) for bout in scores["bouts"]] == [
        ("base", "tuned"),
        ("base", "other"),
        ("tuned", "other"),
    ]


@pytest.mark.slow
def test_prose_and_an_endpoint_that_goes_down(tmp_path: Path, engines: dict[str, FakeEngine]) -> None:
    def prose(body: dict[str, Any]) -> str:
        return "各有千秋。" if "3 加 1" in body["messages"][0]["content"] else fair(body)

    with serve(prose) as server:
        server.fault_of = lambda number, body: Fault("status", 401) if number >= 10 else None
        result = evaluate(arena(tmp_path, server))
        assert isinstance(result.failed, EndpointError)
        (scores,) = result.scores()
        # 10 verdicts are five questions; of the fourth both orders are prose; the tenth is a tie unasked
        assert scores["complete"] is False and scores["bouts"][0]["unknown"] == 5
        assert scores["overall"]["wins"]["tuned"]["count"] == 5
        server.fault_of = lambda number, body: None
        whole = evaluate(arena(tmp_path, server))
    (scores,) = whole.scores()
    assert whole.failed is None and scores["complete"] and scores["bouts"][0]["unknown"] == 1
    assert scores["judge"]["unreadable"] == 2
    assert len(server.answered) == 18 + 4  # two prose verdicts, asked three times each


@pytest.mark.slow
def test_two_real_models_and_a_third(tmp_path: Path) -> None:
    """What the judge compares are the models' own words, each pair in both orders."""
    run(tmp_path / "tuned", tiny_model(tmp_path / "base"), max_steps=3, save_steps=0)
    third = tiny_model(tmp_path / "third", "llama", seed=1)
    file = write_rows(tmp_path / "rows.jsonl", ROWS[:4])
    with serve(lambda body: "[[A]]" if "回答A:\n" in last_user_text(body) else "[[B]]") as server:
        asked = Evaluation(
            str(tmp_path / "tuned" / "run"),
            file=str(file),
            judge=Endpoint(server.url, "test"),
            arena=True,
            against=(str(third),),
            load={"device": "cpu", "dtype": "fp32"},
            settings={"max_new_tokens": 6},
        )
        (scores,) = evaluate(asked).scores()
        compared = {
            re.split("\n回答[AB]:", text.partition("\n回答A:")[2])[0]: text
            for text in map(last_user_text, server.requests)
        }
    assert list(scores["sides"]) == ["base", "tuned", "third"] and scores["complete"]
    rows = item_rows(asked.folder)
    pairs = list(combinations(("base", "tuned", "third"), 2))
    texts = [{side: row[side]["answer"].strip() for side in ("base", "tuned", "third")} for row in rows]
    other = sum(row[one] != row[two] for row in texts for one, two in pairs)
    assert len(server.requests) == 2 * other > 0
    assert set(compared) <= {text for row in texts for text in row.values()}
    for bout, (one, two) in zip(scores["bouts"], pairs, strict=True):
        assert (bout["first"], bout["second"], bout["unknown"]) == (one, two, 0)
        assert bout["equal_answers"] == sum(row[one] == row[two] for row in texts)
        assert bout["asked_in_both_orders"] == len(rows) - bout["equal_answers"]
    assert sum(share["mean"] for share in scores["overall"]["wins"].values()) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("[[A]]", "A"),
        ("回答A不错，但[[A]]不如B\n结论：[[B]]", "B"),
        ("【C】", "C"),
        ("b", None),
        ("**B**", "B"),
        ("结论：Ａ", "A"),
        ("A 更好一些", None),
        ("", None),
        ("[[D]]", None),
    ],
)
def test_verdicts(said: str, meant: str | None) -> None:
    assert parse_verdict(said) == meant


def test_calls_that_are_wrong(
    tmp_path: Path, engines: dict[str, FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(write_rows(tmp_path / "rows.jsonl", ROWS))
    judge = Endpoint("http://127.0.0.1:9/v1", "test")
    cases: list[tuple[Callable[[], Evaluation], str]] = [
        (lambda: Evaluation("tuned", file=file, arena=True), "an arena needs a judge"),
        (lambda: Evaluation("tuned", file=file, against=("x",)), "--against is for --arena"),
        (
            lambda: Evaluation("tuned", file=file, arena=True, judge=judge, against=("a/base",)),
            "two models have one name: base, tuned, base",
        ),
    ]
    for asked, said in cases:
        with pytest.raises(UsageError, match=said):
            evaluate(asked())
    monkeypatch.setattr(
        evaluation, "contenders", lambda path, **_: ([sides.Contender("model", "tuned")], None)
    )
    with pytest.raises(UsageError, match="needs two models"):
        evaluate(Evaluation("tuned", file=file, arena=True, judge=judge))
