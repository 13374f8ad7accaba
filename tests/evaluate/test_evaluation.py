"""A whole evaluation over a scripted engine and a scripted judge: what is counted, kept, resumed and told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.evaluate.fake_engine import FakeEngine
from tests.openai_server import FakeOpenAI, Fault, last_user_text, serve
from tests.tiny import write_rows

from tuoling.errors import DataError, EndpointError, UsageError
from tuoling.evaluate import evaluation, sides
from tuoling.evaluate.evaluation import Evaluation, evaluate
from tuoling.evaluate.outcome import item_rows
from tuoling.infer.endpoint import Endpoint

ROWS = [
    {
        "question": f"{n} 加 1 等于多少？",
        "class": "open QA" if n % 2 else "closed\u00a0qa",
        "std_answer": str(n + 1),
    }
    for n in range(20)
]


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeEngine]:
    """base is wrong, tuned is right."""
    found = {
        "base": FakeEngine("base", lambda question: "不知道"),
        "tuned": FakeEngine(
            "tuned", lambda question: str(int(question.split()[0]) + 1) if question[0].isdigit() else ""
        ),
    }
    monkeypatch.setattr(sides, "open_engine", lambda path, **options: found[path])
    monkeypatch.setattr(
        evaluation,
        "contenders",
        lambda path, **_: ([sides.Contender(name, name) for name in found], None),
    )
    return found


@pytest.fixture
def judge() -> Iterator[FakeOpenAI]:
    """1 where the answer is the reference, else 0.2."""

    def answer(body: dict[str, Any]) -> str:
        lines = dict(line.partition(":")[::2] for line in last_user_text(body).splitlines())
        return f"得分:{1 if lines['模型回答'] == lines['标准答案'] else 0.2}\n理由：……"

    with serve(answer) as server:
        yield server


def belle(tmp_path: Path, rows: list[dict[str, Any]] = ROWS, **options: Any) -> Evaluation:
    file = write_rows(tmp_path / "eval_set.json", rows)
    return Evaluation("tuned", suite="belle", file=str(file), out=tmp_path / "out", **options)


@pytest.mark.slow
def test_base_and_tuned_by_class(tmp_path: Path, engines: dict[str, FakeEngine]) -> None:
    result = evaluate(belle(tmp_path))
    (scores,) = result.scores()
    assert scores["headline"] == "exact_match"
    assert {name: entry["items"] for name, entry in scores["classes"].items()} == {
        "closed qa": 10,
        "open qa": 10,
    }
    found = scores["classes"]["open qa"]["metrics"]["exact_match"]
    assert (found["base"]["mean"], found["tuned"]["mean"]) == (0.0, 1.0)
    assert found["difference"]["verdict"] == "better"
    assert scores["sides"]["tuned"]["rates"]["stop_rate"] == 1.0
    rows = item_rows(tmp_path / "out")
    assert rows[3]["tuned"] == {
        "answer": "4",
        "finish_reason": "stop",
        "exact_match": 1.0,
        "f1": 1.0,
        "char_bleu": pytest.approx(1.0),
        "rouge_l": pytest.approx(1.0),
    }


@pytest.mark.slow
def test_the_judge_scores_with_belles_rules(
    tmp_path: Path, engines: dict[str, FakeEngine], judge: FakeOpenAI
) -> None:
    (scores,) = evaluate(belle(tmp_path, judge=Endpoint(judge.url, "test"))).scores()
    overall = scores["overall"]["judge"]
    assert (overall["base"]["mean"], overall["tuned"]["mean"]) == (pytest.approx(0.2), 1.0)
    assert scores["judge"]["agreement"]["within_0.1"] == 1.0
    asked = [last_user_text(body) for body in judge.requests]
    assert len(asked) == 80  # 20 answers of each side, and all of them twice: the sample is 20 at least
    assert all("标准答案:" in text and text.count("模型回答:") == 1 for text in asked)
    assert judge.requests[0]["temperature"] == 0.0 and judge.requests[0]["max_tokens"] == 3000
    evaluate(belle(tmp_path, judge=Endpoint(judge.url, "test")))
    assert len(judge.requests) == 80 and len(engines["tuned"].asked) == 20  # nothing is asked or paid again


@pytest.mark.slow
def test_no_reference_is_shown_for_free_classes(tmp_path: Path, engines: dict[str, FakeEngine]) -> None:
    rows = [
        {"question": f"写诗 {n}", "class": name, "std_answer": "某诗"}
        for n, name in enumerate(("rewrite", "generation"))
    ]
    engines["tuned"].answer = engines["base"].answer = lambda question: "床前明月光"
    with serve(lambda body: "得分:0.5") as server:
        evaluate(belle(tmp_path, rows, judge=Endpoint(server.url, "test")))
    assert server.requests and not any("标准答案:" in last_user_text(body) for body in server.requests)


@pytest.mark.slow
def test_prose_is_asked_again_then_left_out_and_told(tmp_path: Path, engines: dict[str, FakeEngine]) -> None:
    def answer(body: dict[str, Any]) -> str:
        if "0 加 1" in body["messages"][0]["content"]:
            return "这个回答写得很有意思。"
        return "得分:0.4" if len(body["messages"]) > 1 else "我觉得还行。"

    with serve(answer) as server:
        (scores,) = evaluate(belle(tmp_path, ROWS[:8], judge=Endpoint(server.url, "test"))).scores()
    assert scores["overall"]["judge"]["tuned"] == pytest.approx(
        {"mean": 0.4, "low": 0.4, "high": 0.4, "count": 7}
    )
    assert scores["judge"]["unreadable"] == 4  # one answer a side, asked in both rounds
    assert any("no score from 0 to 1 after 3 tries" in note["en"] for note in scores["notes"])


@pytest.mark.slow
def test_a_judge_that_goes_down_half_way(
    tmp_path: Path, engines: dict[str, FakeEngine], judge: FakeOpenAI
) -> None:
    judge.fault_of = lambda number, body: Fault("status", 401) if number >= 12 else None
    asked = belle(tmp_path, judge=Endpoint(judge.url, "test", concurrency=1))
    result = evaluate(asked)
    assert isinstance(result.failed, EndpointError)
    (scores,) = result.scores()
    assert scores["complete"] is False and scores["overall"]["judge"]["base"]["count"] == 12
    assert scores["overall"]["exact_match"]["tuned"]["mean"] == 1.0
    judge.fault_of = lambda number, body: None
    whole = evaluate(asked)
    assert whole.failed is None and whole.scores()[0]["complete"] is True
    assert len(judge.answered) == 80  # the 12 were not paid again


@pytest.mark.slow
def test_what_a_kill_leaves_is_used_again(tmp_path: Path, engines: dict[str, FakeEngine]) -> None:
    calls = []

    def dies(question: str) -> str:
        calls.append(question)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return "1"

    engines["tuned"].answer = dies
    with pytest.raises(KeyboardInterrupt):
        evaluate(belle(tmp_path, batch_size=2))
    log = tmp_path / "out" / "answers.jsonl"
    with log.open("a", encoding="utf-8") as file:
        file.write('{"key": "torn')
    engines["tuned"].answer = lambda question: calls.append(question) or "1"  # type: ignore[func-returns-value]
    evaluate(belle(tmp_path, batch_size=2))
    assert len(calls) == 11 + 10 and len(engines["base"].asked) == 20


@pytest.mark.slow
def test_unknown_classes_empty_answers_and_missing_references_are_told(
    tmp_path: Path, engines: dict[str, FakeEngine], judge: FakeOpenAI
) -> None:
    rows = [
        {"question": "写一首诗", "class": "poetrie", "std_answer": ""},
        {"question": "长" * 1001, "class": "math", "std_answer": "1"},
        {"question": "", "class": "math", "std_answer": "1"},
        *ROWS[:2],
    ]
    (scores,) = evaluate(belle(tmp_path, rows, judge=Endpoint(judge.url, "test"))).scores()
    notes = "\n".join(note["en"] for note in scores["notes"])
    for said in (
        "1 rows could not be asked",
        "1 of 4 rows have no reference answer",
        "class 'poetrie' is none of BELLE's",
        "tuned: 1 of 4 questions do not fit",
        "tuned: 1 of 4 answers are empty",
    ):
        assert said in notes
    assert scores["judge"]["without_prompt"] == 2 and scores["judge"]["empty_answers"] == 2


def test_no_answers_and_no_judge(tmp_path: Path, engines: dict[str, FakeEngine]) -> None:
    with pytest.raises(DataError, match="none of 20 rows has an answer") as caught:
        evaluate(belle(tmp_path, [{**row, "std_answer": ""} for row in ROWS]))
    assert "--judge" in (caught.value.remedy or "")


def test_calls_that_are_wrong(
    tmp_path: Path, engines: dict[str, FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TUOLING_API_KEY", raising=False)
    for asked, said in (
        (Evaluation("m", suite="bell"), "no suite is called bell"),
        (Evaluation("m", suite="belle"), "needs a file"),
        (belle(tmp_path, judge=Endpoint("https://judge.example/v1", "m")), "TUOLING_API_KEY"),
    ):
        with pytest.raises(UsageError, match=said):
            evaluate(asked)
    assert not engines["base"].asked


@pytest.mark.slow
def test_own_rows_keep_their_classes_and_forgetting_is_seen(
    tmp_path: Path, engines: dict[str, FakeEngine]
) -> None:
    rows = [{"kind": "加法_一", "instruction": f"{n} 加一", "output": str(n + 1)} for n in range(8)]
    file = write_rows(tmp_path / "mine.jsonl", rows)
    engines["tuned"].fingerprint = "tuned"
    result = evaluate(Evaluation("tuned", file=str(file), general=str(file), out=tmp_path / "out"))
    mine, general = result.scores()
    assert list(mine["classes"]) == ["加法_一"]
    found = general["overall"]["log_likelihood"]
    assert (found["base"]["mean"], found["tuned"]["mean"]) == (-2.0, -1.0)
    assert found["difference"]["verdict"] == "better"


def test_arithmetic_in_three_shapes(tmp_path: Path, engines: dict[str, FakeEngine]) -> None:
    shapes = {
        "mgsm.tsv": "".join(f"{n} 加 1？\t{n + 1}\n" for n in range(6)),
        "gsm.jsonl": "".join(
            json.dumps({"question": f"{n} 加 1？", "answer": f"{n}+1={n + 1}\n#### {n + 1}"}) + "\n"
            for n in range(6)
        ),
        "ape.json": "".join(
            json.dumps(
                {"id": str(n), "original_text": f"{n} 加 1？", "equation": f"x={n}+1", "ans": str(n + 1)}
            )
            + "\n"
            for n in range(6)
        ),
    }
    for name, text in shapes.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        asked = Evaluation(
            "tuned", suite="math", file=str(tmp_path / name), out=tmp_path / name.replace(".", "-")
        )
        (scores,) = evaluate(asked).scores()
        found = scores["overall"]["accuracy"]
        assert (found["tuned"]["count"], found["base"]["mean"], found["tuned"]["mean"]) == (6, 0.0, 1.0), name


def test_belles_own_file_counts_and_looks_up_every_class(shared_data: Path) -> None:
    from tuoling.evaluate.items import read_items
    from tuoling.evaluate.judge import read_prompts

    items = read_items(str(shared_data / "belle" / "eval_set.json"), class_column="class", belle=True)
    assert items.counts() == {
        "open qa": 285,
        "brainstorming": 179,
        "rewrite": 131,
        "generation": 98,
        "math": 75,
        "classification": 65,
        "closed qa": 52,
        "summarization": 40,
        "code": 38,
        "extract": 37,
    }
    prompts = read_prompts(shared_data / "belle" / "eval_prompt.json")
    assert len(prompts) == 11 and not {item.group for item in items.items} - set(prompts)


@pytest.mark.slow
def test_leaks_of_a_real_pair_of_files(shared_data: Path) -> None:
    """domain-bloom's 13 test rows: 6 of them are in its training file too."""
    from tuoling.evaluate.items import read_items
    from tuoling.evaluate.leaks import find_leaks

    folder = shared_data / "domain"
    items = read_items(str(folder / "domain.test.json")).items
    found = find_leaks(items, {"config": {"data": [str(folder / "domain.train.json"), "/nowhere.json"]}})
    assert len(found.exact) == 6 and found.missing == ("/nowhere.json",)
    assert found.trained == 1666
