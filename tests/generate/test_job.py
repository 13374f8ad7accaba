"""Jobs against a scripted endpoint: what becomes of every answer, limits, resuming, and rows that can be trained."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.generate.scripted import faults, items, words
from tests.openai_server import Body, FakeOpenAI, Fault, last_user_text, serve
from typer.testing import CliRunner

from tuoling.cli.main import app
from tuoling.data.read import read_rows
from tuoling.data.rouge_l import SimilarTexts
from tuoling.data.source import Source
from tuoling.models.licence import read_lineage

SEEDS = [
    {
        "id": "s1",
        "instruction": "请以下面词语为主题写一首诗",
        "instances": [{"input": "夏天", "output": "夏日长。"}],
    },
    {
        "id": "s2",
        "instruction": "给出下面词语的同义词",
        "instances": [{"input": "惊人地", "output": "令人惊讶地"}],
    },
    {
        "id": "s3",
        "instruction": "用一句话解释光合作用",
        "instances": [{"input": "", "output": "植物用光制造养分。"}],
    },
    {"id": "s4", "instruction": "把句子翻译成英文", "instances": [{"input": "你好", "output": "Hello"}]},
]
SEEDS += [
    {"id": f"s{n}", "instruction": words(random.Random(n), 9), "instances": [{"input": "", "output": "好。"}]}
    for n in range(5, 60)
]  # draws of three seldom meet
PAIRS = [
    {"instruction": "孩子不爱吃饭怎么办？", "input": "", "output": "按时开饭，少给零食。"},
    {"instruction": "怎样让孩子早睡？", "input": "他六岁", "output": "固定作息。"},
]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def server() -> Iterator[FakeOpenAI]:
    with serve(items) as state:
        yield state


@pytest.fixture
def seeds(tmp_path: Path) -> Path:
    return jsonl(tmp_path / "seeds.json", SEEDS)


def call(
    kind: str, out: Path, server: FakeOpenAI | None, *options: object
) -> tuple[int, dict[str, Any], str]:
    """Exit code, what --json printed, and what was said."""
    place = ["--endpoint", server.url, "--model", "teacher"] if server else []
    result = CliRunner().invoke(
        app, ["data", "generate", kind, "--out", str(out), *place, *map(str, options), "--json"]
    )
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    printed = [line for line in result.stdout.splitlines() if line.startswith("{")]
    return result.exit_code, json.loads(printed[0]) if printed else {}, " ".join(result.stderr.split())


def prompts(server: FakeOpenAI) -> Counter[str]:
    """How often each question was answered, and so paid for."""
    return Counter(last_user_text(body) for body, _ in server.answered)


@pytest.mark.slow
def test_rows_are_new_sound_and_say_where_they_come_from(
    server: FakeOpenAI, seeds: Path, tmp_path: Path
) -> None:
    server.fault_of = lambda number, body: Fault("nonsense") if number == 1 else None
    options = [
        "--seeds",
        seeds,
        "--rows",
        60,
        "--licence",
        "generator=apache-2.0",
        "--price-in",
        1,
        "--price-out",
        2,
        "--concurrency",
        1,  # which question meets the fault, and how many are asked, does not depend on threads
    ]
    code, said, told = call("self-instruct", tmp_path / "out", server, *options)
    assert code == 0 and said["rows"] >= 60 and said["unparsable"] == 1
    rows = read(tmp_path / "out" / "rows.jsonl")
    assert len(rows) == said["rows"] and len({row["instruction"] for row in rows}) == len(rows)
    seen = SimilarTexts(0.7)
    seen.extend(seed["instruction"] for seed in SEEDS)  # type: ignore[misc]
    for row in rows:
        assert seen.like(row["instruction"]) is None and row["output"] and "GPT" not in row["instruction"]
        seen.add(row["instruction"])
    assert {"near_duplicate", "banned_word", "no_answer"} <= set(said["rejected"])
    rejected = read(tmp_path / "out" / "rejected.log")
    assert Counter(one["reason"] for one in rejected) == said["rejected"]
    like = next(one for one in rejected if one["reason"] == "near_duplicate")
    assert like["like"] == "请以下面词语为主题写一首诗" and like["rouge_l"] > 0.7
    assert read(tmp_path / "out" / "unparsable.log")[0]["text"] == "%$#@ 。。。"
    provenance = rows[0]["provenance"]
    assert provenance["licence"] == ["apache-2.0"] and provenance["model"] == "teacher"
    assert len(set(provenance["seeds"]) & {seed["id"] for seed in SEEDS}) == 3
    used = (
        sum(len(last_user_text(body)) for body, _ in server.answered),
        sum(len(text) for _, text in server.answered),
    )
    assert (said["prompt_tokens"], said["completion_tokens"]) == used
    assert said["cost"] == pytest.approx((used[0] + 2 * used[1]) / 1e6, abs=1e-6)
    parts = {part.kind: part.licences for part in read_lineage(tmp_path / "out" / "lineage.json")}
    assert parts == {"generator": ("apache-2.0",), "data": ()}  # the seeds' licence nobody said
    assert "licence not known" in told and "seeds.json" in told
    trained = list(read_rows(Source(str(tmp_path / "out" / "rows.jsonl"))))
    assert not any(row.problems for row in trained) and trained[0].format == "alpaca"


@pytest.mark.slow
def test_the_same_call_asks_nothing_again(server: FakeOpenAI, seeds: Path, tmp_path: Path) -> None:
    options = ["--seeds", seeds, "--per-call", 4]
    code, said, _ = call("self-instruct", tmp_path / "out", server, *options, "--rows", 8)
    before, asked = (tmp_path / "out" / "rows.jsonl").read_bytes(), len(server.requests)
    assert call("self-instruct", tmp_path / "out", server, *options, "--rows", 8)[:2] == (0, said)
    assert len(server.requests) == asked and (tmp_path / "out" / "rows.jsonl").read_bytes() == before
    code, more, _ = call("self-instruct", tmp_path / "out", server, *options, "--rows", 16)
    assert code == 0 and more["rows"] >= 16 and max(prompts(server).values()) == 1
    assert (tmp_path / "out" / "rows.jsonl").read_bytes().startswith(before)
    code, _, told = call("self-instruct", tmp_path / "out", server, "--seeds", seeds, "--seed", 1)
    assert code == 2 and "another job: per_call, seed differ" in told


@pytest.mark.slow
def test_the_budget_holds(server: FakeOpenAI, seeds: Path, tmp_path: Path) -> None:
    options = ["--seeds", seeds, "--rows", 1000, "--max-tokens", 600, "--concurrency", 1]
    code, said, told = call("self-instruct", tmp_path / "a", server, *options, "--budget-tokens", 5000)
    used = sum(len(last_user_text(body)) + len(text) for body, text in server.answered)
    assert code == 1 and said["rows"] and 2000 < used <= 5000 and "budget of 5,000 tokens" in told
    money = ["--budget-cost", 0.005, "--price-in", 1, "--price-out", 2]
    code, said, told = call("self-instruct", tmp_path / "b", server, *options, *money)
    assert code == 1 and 0.002 < said["cost"] <= 0.005 and "budget of 0.005" in said["stopped"]


@pytest.mark.slow
def test_an_endpoint_that_goes_down_leaves_what_came(server: FakeOpenAI, seeds: Path, tmp_path: Path) -> None:
    server.fault_of = lambda number, body: Fault("status", 401) if number >= 3 else None
    options = ["--seeds", seeds, "--rows", 60, "--concurrency", 1]
    code, said, told = call("self-instruct", tmp_path / "out", server, *options)
    assert code == 1 and "401" in told and "the same call goes on" in told
    assert said["answered"] == 3 and len(read(tmp_path / "out" / "rows.jsonl")) == said["rows"] > 10
    server.fault_of = lambda number, body: None
    code, said, told = call("self-instruct", tmp_path / "out", server, *options)
    assert code == 0 and said["rows"] >= 60 and max(prompts(server).values()) == 1


@pytest.mark.slow
def test_answers_that_give_nothing_end_it(server: FakeOpenAI, seeds: Path, tmp_path: Path) -> None:
    server.answer = lambda body: "我不太明白。"
    code, said, told = call("self-instruct", tmp_path / "out", server, "--seeds", seeds, "--give-up-after", 6)
    assert code == 1 and said["rows"] == 0 and 6 <= said["unparsable"] <= 10 and "gave no row" in told


def domain(body: Body) -> str:
    question = last_user_text(body)
    if "新问题" in question:
        return "续写4. 三岁小朋友怕黑如何安抚？\n续写5. 儿子总是撒谎，我该怎样引导？"
    return f"关于{question}：可以先耐心倾听。" if body["messages"][0]["content"] == "你是医生" else "？"


@pytest.mark.slow
def test_a_field_from_questions_to_answers(server: FakeOpenAI, tmp_path: Path) -> None:
    server.answer = domain
    seeds = jsonl(tmp_path / "q.jsonl", [{"id": n, "question": f"{text}怎么办？"} for n, text in enumerate(("孩子咳嗽", "宝宝发烧", "老人失眠"))])  # fmt: skip
    ready = jsonl(
        tmp_path / "ready.jsonl",
        [{"id": 7, "question": "几岁可以上学？"}, {"id": 8, "question": "脚扭了怎么处理？"}],
    )
    done = jsonl(tmp_path / "done.jsonl", [{"index": 0, "question": "几岁可以上学？", "answer": "六岁。"}])
    options = ["--seeds", seeds, "--questions", ready, "--answered", done, "--persona", "你是医生"]
    code, said, _ = call("domain", tmp_path / "out", server, *options)
    rows = read(tmp_path / "out" / "rows.jsonl")
    assert code == 0 and [row["instruction"] for row in rows] == [
        "脚扭了怎么处理？"
    ]  # nothing new is asked for
    code, said, _ = call("domain", tmp_path / "out2", server, *options, "--rows", 3, "--concurrency", 1)
    rows = read(tmp_path / "out2" / "rows.jsonl")
    asked = [row["instruction"] for row in rows]
    assert code == 0 and asked == [
        "脚扭了怎么处理？",
        "三岁小朋友怕黑如何安抚？",
        "儿子总是撒谎，我该怎样引导？",
    ]
    assert rows[1]["output"] == "关于三岁小朋友怕黑如何安抚？：可以先耐心倾听。" and said["steps"] == 2


@pytest.mark.slow
def test_other_words_and_further_turns(server: FakeOpenAI, tmp_path: Path) -> None:
    rows = jsonl(tmp_path / "rows.jsonl", PAIRS)
    server.answer = lambda body: (
        "1. 小朋友食欲不好该怎样调整？\n2. 孩子不爱吃饭怎么办？" if "吃饭" in last_user_text(body) else "？"
    )
    code, said, _ = call("augment", tmp_path / "a", server, "--seeds", rows)
    (made,) = read(tmp_path / "a" / "rows.jsonl")
    assert (made["instruction"], made["output"]) == ("小朋友食欲不好该怎样调整？", "按时开饭，少给零食。")
    assert code == 0 and said["rejected"] == {"same_text": 1} and said["unparsable"] == 1
    server.answer = lambda body: "用户：那挑食呢？\n助手：换花样做。\n再鼓励他。"
    code, said, _ = call("augment", tmp_path / "b", server, "--seeds", rows, "--how", "multi-turn")
    talks = [[turn["content"] for turn in made["messages"]] for made in read(tmp_path / "b" / "rows.jsonl")]
    # Rows are written as their answers come, and two requests are under way at once.
    assert ["怎样让孩子早睡？\n他六岁", "固定作息。", "那挑食呢？", "换花样做。\n再鼓励他。"] in talks
    assert len(talks) == 2
    assert next(read_rows(Source(str(tmp_path / "b" / "rows.jsonl")))).format == "messages"


def test_pairs_from_a_document_keep_their_words(server: FakeOpenAI, tmp_path: Path) -> None:
    text = "驼铃的来历\n\n驼铃挂在骆驼颈下，\n用来在风沙里辨认队伍。铜制的最常见。\n"
    (tmp_path / "手册.txt").write_text(text, encoding="gb18030")
    server.answer = lambda body: (
        "问题：驼铃挂在哪里？\n回答：骆驼颈下。\n原文：驼铃挂在骆驼颈下，用来在风沙里辨认队伍。\n###\n"
        "问题：驼铃多重？\n回答：三斤。\n原文：重三斤。"
    )
    code, said, _ = call("from-text", tmp_path / "out", server, "--seeds", tmp_path / "手册.txt")
    (row,) = read(tmp_path / "out" / "rows.jsonl")
    start, end = row["provenance"]["span"]
    assert text[start:end] == row["provenance"]["quote"] == "驼铃挂在骆驼颈下，\n用来在风沙里辨认队伍。"
    assert (
        code == 0
        and said["rejected"] == {"span_not_found": 1}
        and row["provenance"]["document"] == "手册.txt"
    )


def test_who_the_model_is(tmp_path: Path) -> None:
    options = ["--name", "小驼", "--maker", "驼铃社", "--year", "2023"]
    code, said, _ = call("self-cognition", tmp_path / "out", None, *options)
    rows = read(tmp_path / "out" / "rows.jsonl")
    assert code == 0 and said["rows"] == len(rows) >= 20
    assert rows[0]["output"].startswith("我是小驼，由驼铃社在2023年") and "代号" not in str(rows)
    own = jsonl(
        tmp_path / "own.jsonl",
        [{"question": "你是谁", "answer": "我是[名字代号]"}, {"question": "谁做的", "answer": "[公司代号]"}],
    )
    code, said, told = call("self-cognition", tmp_path / "b", None, "--seeds", own, "--name", "小驼")
    assert (said["rows"], said["rejected"]) == (1, {"placeholder": 1}) and "--maker" in told


@pytest.mark.slow
def test_bad_input(server: FakeOpenAI, seeds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text(
        seeds.read_text()
        + '{"id": "s5", "instruction": "只有一半\n'
        + json.dumps({"instruction": "无例"})
        + "\n"
    )
    code, _, told = call("self-instruct", tmp_path / "out", server, "--seeds", broken)
    assert code == 1 and "broken.json:60" in told and "--skip-bad" in told and not (tmp_path / "out").exists()
    code, said, told = call(
        "self-instruct", tmp_path / "out", server, "--seeds", broken, "--skip-bad", "--rows", 5
    )
    assert code == 0 and said["rows"] >= 5 and "2 bad seeds left out" in told
    asked = len(server.requests)
    monkeypatch.delenv("TUOLING_API_KEY", raising=False)
    far = ["--seeds", seeds, "--endpoint", "https://api.example.com/v1", "--model", "m"]
    code, _, told = call("self-instruct", tmp_path / "far", None, *far)
    assert code == 2 and "export TUOLING_API_KEY" in told and not (tmp_path / "far").exists()
    code, _, told = call("self-instruct", tmp_path / "who", None, "--seeds", seeds)
    assert code == 2 and "--endpoint" in told
    code, _, told = call("self-instruct", tmp_path / "c", server, "--seeds", seeds, "--budget-cost", 1)
    assert code == 2 and "--price-in" in told
    (tmp_path / "out" / "responses.log").write_text('{"answered": "x"}\n')
    code, _, told = call("self-instruct", tmp_path / "out", server, "--seeds", broken, "--skip-bad")
    assert code == 1 and "responses.log:1" in told and len(server.requests) == asked


@pytest.mark.slow
def test_one_of_our_own_engines_answers(tmp_path: Path) -> None:
    from tests.tiny import tiny_model

    model = tiny_model(tmp_path / "model", "llama")
    rows = jsonl(tmp_path / "rows.jsonl", PAIRS)
    options = ["--seeds", rows, "--engine", model, "--max-tokens", 16, "--give-up-after", 9]
    code, said, _ = call("augment", tmp_path / "out", None, *options)
    assert (
        said["answered"] == 2 and said["unparsable"] == 2 and code == 0
    )  # an untrained model says nothing of use
    assert call("augment", tmp_path / "out", None, *options)[1] == said


@pytest.mark.slow
def test_what_a_kill_loses_is_told_and_asked_again_only_when_that_is_asked_for(
    server: FakeOpenAI, seeds: Path, tmp_path: Path
) -> None:
    options = ["--seeds", seeds, "--per-call", 4, "--concurrency", 1, "--max-tokens", 900]
    code, said, told = call("self-instruct", tmp_path / "out", server, *options, "--rows", 8)
    assert code == 0 and said["lost"] == 0 and "under way" not in told
    log = tmp_path / "out" / "responses.log"
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    assert "answered" in json.loads(lines[-1])
    log.write_text("".join(lines[:-1]), encoding="utf-8")  # what a kill leaves
    code, said, told = call("self-instruct", tmp_path / "out", server, *options, "--rows", 12)
    assert code == 0 and max(prompts(server).values()) == 1
    assert said["lost"] == 1 and said["lost_tokens"] > 900
    assert "1 requests were under way when it was killed, perhaps paid for: not asked again" in told
    assert f"up to {said['lost_tokens']:,} tokens" in told
    code, more, _ = call("self-instruct", tmp_path / "out", server, *options, "--rows", 16, "--again-lost")
    assert code == 0 and sorted(prompts(server).values())[-2:] == [1, 2]
    assert (more["lost"], more["lost_tokens"]) == (1, said["lost_tokens"])
    code, again, _ = call("self-instruct", tmp_path / "out", server, *options, "--rows", 16)
    assert again == more, "the first time may have been paid for too"


@pytest.mark.slow
def test_killed_twice_nothing_is_paid_twice(seeds: Path, tmp_path: Path) -> None:
    """Through the real command, against a server with every fault; SIGKILL comes from the server's own count."""
    running: list[subprocess.Popen[bytes]] = []

    def deadly(number: int, after: int) -> Callable[[Body], str]:
        def answer(body: Body) -> str:
            # a handler that is late means the run it answers, not the one after
            if len(server.answered) >= after and len(running) > number:
                running[number].kill()
            return items(body)

        return answer

    options = ["data", "generate", "self-instruct", "--seeds", seeds, "--rows", "60", "--per-call", "4"]
    with serve(items) as server:
        server.fault_of = faults
        command = [*options, "--out", tmp_path / "out", "--endpoint", server.url, "--model", "teacher"]
        for number, after in enumerate((4, 9, 10**9)):
            server.answer = deadly(number, after)
            running.append(
                subprocess.Popen([sys.executable, "-m", "tuoling", *map(str, command)], env={**os.environ})
            )
            assert running[-1].wait(600) == (0 if after == 10**9 else -signal.SIGKILL)
            rows = tmp_path / "out" / "rows.jsonl"
            assert rows.is_file()
        assert max(prompts(server).values()) == 1
        rows_there = read(rows)
        assert len(rows_there) >= 60 and len({row["instruction"] for row in rows_there}) == len(rows_there)
        result = json.loads((tmp_path / "out" / "generation.json").read_text())["result"]
        paid = len(server.answered)
        assert result["answered"] <= paid <= result["answered"] + result["lost"] and result["lost"] <= 8
