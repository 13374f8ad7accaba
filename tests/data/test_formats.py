"""Every row format is recognised by its content and read into the right turns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tuoling.data.formats import formats
from tuoling.data.read import is_trained, read_rows
from tuoling.data.row import Row
from tuoling.data.sources import Source

U, A, S = "user", "assistant", "system"

CASES: list[tuple[str, dict[str, Any], list[tuple[str, str]]]] = [
    ("alpaca", {"instruction": "问", "input": "", "output": "答"}, [(U, "问"), (A, "答")]),
    ("alpaca", {"instruction": "问", "output": "答"}, [(U, "问"), (A, "答")]),
    ("alpaca", {"instruction": "", "input": "只有输入", "output": "答"}, [(U, "只有输入"), (A, "答")]),
    (
        "alpaca",
        {"instruction": "三", "input": None, "output": "3", "system": "你是算盘", "history": [["一", "1"], ["二", "2"]]},
        [(S, "你是算盘"), (U, "一"), (A, "1"), (U, "二"), (A, "2"), (U, "三"), (A, "3")],
    ),
    ("old_belle", {"input": "问", "target": "答"}, [(U, "问"), (A, "答")]),
    (
        "conversations",
        {"id": "x", "conversations": [{"from": "Human", "value": "问"}, {"from": "ASSISTANT", "value": "答"}]},
        [(U, "问"), (A, "答")],
    ),
    (
        "conversations",
        {"system": "设定", "conversations": [{"from": "user", "value": "问"}, {"from": "gpt", "value": "答"}]},
        [(S, "设定"), (U, "问"), (A, "答")],
    ),
    (
        "messages",
        {"messages": [{"role": "system", "content": "设定"}, {"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]},
        [(S, "设定"), (U, "问"), (A, "答")],
    ),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "问"}]}, {"role": "assistant", "content": "答"}]},
        [(U, "问"), (A, "答")],
    ),
    ("vicuna_chat", {"input": ["一", "二"], "output": ["1", "2"]}, [(U, "一"), (A, "1"), (U, "二"), (A, "2")]),
    (
        "chitchat",
        {"history": [{"input": "一", "output": "1"}], "input": "二", "output": "2"},
        [(U, "一"), (A, "1"), (U, "二"), (A, "2")],
    ),
    (
        "belle_multiturn",
        {"instruction": "Human:你好\nAssistant:您好！\n\nHuman:再见\nAssistant:", "input": "", "output": "再会"},
        [(U, "你好"), (A, "您好！"), (U, "再见"), (A, "再会")],
    ),
    ("alpaca", {"instruction": "解释 Human: 与 Assistant: 两个词", "output": "答"}, [(U, "解释 Human: 与 Assistant: 两个词"), (A, "答")]),
    ("question_answer", {"index": 0, "question": "问", "answer": "答"}, [(U, "问"), (A, "答")]),
    ("question_answer", {"prompt": "问", "response": "答"}, [(U, "问"), (A, "答")]),
    ("question_answer", {"问题": "问", "回答": "答"}, [(U, "问"), (A, "答")]),
    ("question_answer", {"instruction": "问", "context": "", "response": "答"}, [(U, "问"), (A, "答")]),
    ("text", {"text": "一段文字"}, [("text", "一段文字")]),
    ("preference", {"prompt": "问", "chosen": "好", "rejected": "坏"}, [(U, "问"), (A, "好")]),
    ("preference", {"prompt": "问", "chosen": "好", "reject": "坏"}, [(U, "问"), (A, "好")]),
    (
        "preference",
        {"conversations": [{"from": "human", "value": "问"}], "chosen": {"from": "gpt", "value": "好"}, "rejected": {"from": "gpt", "value": "坏"}},
        [(U, "问"), (A, "好")],
    ),
    ("preference", {"chosen": "Human: 问\n\nAssistant: 好", "rejected": "Human: 问\n\nAssistant: 坏"}, [(U, "问"), (A, "好")]),
    ("predictions", {"input": "问", "predict": "猜", "target": "答"}, [(U, "问"), (A, "答")]),
    ("question", {"id": 1, "question": "问"}, [(U, "问")]),
    ("eval_set", {"question": "问", "class": "code", "std_answer": ""}, [(U, "问")]),
    ("eval_set", {"question": "问", "class": "code", "std_answer": "答"}, [(U, "问"), (A, "答")]),
    ("eval_prompt", {"class": "math", "prompt": "请打分"}, [(U, "请打分")]),
    (
        "seed_task",
        {"id": "s", "name": "n", "instruction": "问", "instances": [{"input": "料", "output": "答"}], "is_classification": False},
        [(U, "问"), (A, "答")],
    ),
]  # fmt: skip


def rows_of(path: Path, records: list[Any], **how: Any) -> list[Row]:
    path.write_text(
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8"
    )
    return list(read_rows(Source(str(path), **how)))


def only(tmp_path: Path, record: Any, **how: Any) -> Row:
    (row,) = rows_of(tmp_path / "rows.jsonl", [record], **how)
    return row


@pytest.mark.parametrize(
    ("name", "record", "turns"), CASES, ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)]
)
def test_a_row_is_recognised_and_read(tmp_path, name, record, turns):
    row = only(tmp_path, record)
    assert row.problems == ()
    assert row.format == name
    assert [(turn.role, turn.text) for turn in row.conversation.turns] == turns
    assert row.record == record


def test_every_format_has_a_case():
    assert {case[0] for case in CASES} == set(formats())
    files = {
        path.stem
        for path in Path(__import__("tuoling.data.formats", fromlist=["x"]).__file__).parent.glob("*.py")
    }
    assert files - {"__init__"} == set(formats())


def test_the_input_of_an_instruction_stays_its_context(tmp_path):
    row = only(tmp_path, {"instruction": "翻译", "input": "hello", "output": "你好"})
    assert row.conversation.turns[0].context == "hello"


BAD: list[tuple[Any, str, str]] = [
    ({"instruction": "问", "output": ["答"]}, "output", "wrong_type"),
    ({"instruction": "问", "output": 3}, "output", "wrong_type"),
    ({"instruction": "问", "output": ""}, "output", "empty_answer"),
    ({"instruction": "问", "output": None}, "output", "empty_answer"),
    ({"instruction": "问", "input": ""}, "output", "empty_answer"),
    ({"instruction": "", "output": "答"}, "instruction", "empty_question"),
    ({"instruction": "问", "output": " \n\u3000"}, "output", "only_whitespace"),
    ({"instruction": "问", "output": "这是��"}, "output", "mojibake"),
    ({"instruction": "锟斤拷锟斤拷", "output": "答"}, "instruction", "mojibake"),
    ({"instruction": "问", "output": "half \ud83d"}, "output", "mojibake"),
    ({"conversations": [{"from": "tool", "value": "问"}]}, "conversations[0].from", "unknown_role"),
    ({"conversations": [{"from": "human"}]}, "conversations[0]", "missing_field"),
    ({"conversations": "text"}, "conversations", "wrong_type"),
    ({"conversations": []}, "conversations", "empty_question"),
    ({"messages": [{"role": "user", "content": "问"}]}, "messages", "roles_out_of_order"),
    ({"messages": [{"role": "assistant", "content": "答"}, {"role": "user", "content": "问"}]}, "messages[0]", "roles_out_of_order"),
    ({"messages": [{"role": "user", "content": "一"}, {"role": "user", "content": "二"}, {"role": "assistant", "content": "答"}]}, "messages[1]", "roles_out_of_order"),
    ({"input": ["一", "二"], "output": ["1"]}, "output", "roles_out_of_order"),
    ({"prompt": "问", "chosen": "好", "rejected": " "}, "rejected", "empty_answer"),
    ({"instruction": "看图", "output": "答", "images": ["a.png"]}, "images", "not_text"),
    ({"colour": "红", "shape": "圆"}, "", "unknown_format"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "field", "code"), BAD)
def test_a_bad_row_names_field_and_reason(tmp_path, record, field, code):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(record) + "\n")
    (row,) = read_rows(Source(str(path)))
    assert [(problem.field, problem.code) for problem in row.problems] == [(field, code)]


def test_a_row_that_is_no_object_is_bad(tmp_path):
    rows = rows_of(tmp_path / "rows.jsonl", [{"text": "文"}, ["问", "答"], 3])
    assert [[p.code for p in row.problems] for row in rows] == [[], ["wrong_type"], ["wrong_type"]]


def test_an_unknown_shape_names_its_keys_and_the_way_out(tmp_path):
    (problem,) = only(tmp_path, {"colour": "红"}).problems
    assert "`colour`" in problem.message and "--columns" in problem.message and "--format" in problem.message


@pytest.mark.parametrize(
    "text",
    [
        "我爱你，世界。".encode().decode("latin-1"),
        "今天天气很好，我们去公园".encode("gbk").decode("latin-1"),
        "今天天气很好，我们去公园玩吧。".encode().decode("gbk", "replace"),
        "æˆ‘çˆ±",
    ],
)
def test_debris_of_a_wrong_encoding_is_garbled(tmp_path, text):
    assert [p.code for p in only(tmp_path, {"instruction": "问", "output": text}).problems] == ["mojibake"]


@pytest.mark.parametrize(
    "text",
    [
        "Café crème, naïve façade à l’été : très élégant !",
        "àáâãäåæçèéêëìíîïðñòóôõö÷øùúûüýþÿ",
        "“锟斤拷”是一种常见的乱码",
        "锛（bēn）是木工工具；联通",
        "größer, Ångström, señor, ça va, œuvre",
    ],
)
def test_foreign_and_rare_letters_are_not_garbled(tmp_path, text):
    assert only(tmp_path, {"instruction": "问", "output": text}).problems == ()


@pytest.mark.parametrize(
    ("text", "code"),
    [("我是[名字代号]", "placeholder"), ("I am {{name}}", "placeholder"), ("我是<NAME>", "placeholder"), ('名字是\\"骆驼\\"', "escaped_twice")],
)  # fmt: skip
def test_a_flagged_row_stays_good(tmp_path, text, code):
    row = only(tmp_path, {"instruction": "问", "output": text})
    assert row.problems == () and [flag.code for flag in row.flags] == [code]


def test_a_last_turn_without_answer_is_left_out_and_flagged(tmp_path):
    turns = [
        {"role": "user", "content": "一"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "二"},
    ]
    row = only(tmp_path, {"messages": turns})
    assert row.problems == () and [flag.code for flag in row.flags] == ["unanswered_end"]
    assert row.conversation.answer == "1"


def test_only_formats_meant_for_it_are_trained_unless_named(tmp_path):
    source = Source("x")
    untrained = {name for name in formats() if not is_trained(name, source)}
    assert untrained == {"preference", "predictions", "question", "eval_set", "eval_prompt"}
    assert is_trained("preference", Source("x", format="preference"))


def test_a_named_format_is_obeyed(tmp_path):
    row = only(tmp_path, {"input": "问", "predict": "猜", "target": "答"}, format="old_belle")
    assert row.format == "old_belle" and row.conversation.answer == "答"


def test_columns_are_renamed_and_the_record_stays(tmp_path):
    record = {"ask": "问", "reply": "答", "note": "x"}
    row = only(tmp_path, record, columns={"instruction": "ask", "output": "reply"})
    assert row.format == "alpaca" and row.conversation.answer == "答" and row.record == record


def test_a_column_that_is_not_there_is_named(tmp_path):
    (problem,) = only(tmp_path, {"ask": "问"}, columns={"instruction": "ask", "output": "reply"}).problems
    assert problem.code == "missing_field" and problem.field == "reply" and "ask" in problem.message


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"input": ["", "二"], "output": ["1", "2"]}, "input[0]"),
        ({"input": ["一", "二"], "output": ["1", ""]}, "output[1]"),
        ({"history": [["一", "1"], ["二", ""]], "input": "三", "output": "3"}, "history[1]"),
        ({"instruction": "三", "output": "3", "history": [["", "1"]]}, "history[0]"),
        ({"instruction": "Human:一\nAssistant:\nHuman:二\nAssistant:", "output": "2"}, "instruction[1]"),
    ],
)
def test_an_empty_turn_is_named_by_where_it_stands(tmp_path, record, field):
    row = only(tmp_path, record)
    assert [problem.field for problem in row.problems] == [field]


def test_two_equal_answers_prefer_nothing(tmp_path):
    row = only(tmp_path, {"prompt": "问", "chosen": "同", "rejected": "同"})
    assert [(problem.field, problem.code) for problem in row.problems] == [("rejected", "same_answers")]


def test_a_control_character_is_flagged_and_stays_good(tmp_path):
    row = only(tmp_path, {"question": "问", "answer": "答\u0000\t\n"})
    assert not row.problems and [(flag.field, flag.code) for flag in row.flags] == [
        ("answer", "control_character")
    ]
