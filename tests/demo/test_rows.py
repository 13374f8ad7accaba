"""The demo's rows: seeded, on one side of the line each, and never one fixed answer."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest

from tuoling.demo.rows import KINDS, corpus, held_out_rows, training_rows
from tuoling.demo.skills import chinese_number


def question(row: dict[str, Any]) -> str:
    if "messages" in row:
        return "\n".join(message["content"] for message in row["messages"][:-1])
    return f"{row['instruction']}\n{row['input']}"


@pytest.mark.slow
def test_no_held_out_question_is_trained_on() -> None:
    trained = {question(row) for row in training_rows(4000, seed=1)}
    held_out = [question(row) for row in held_out_rows(30, seed=1)]
    assert len(set(held_out)) == len(held_out) == 30 * len(KINDS)
    assert not trained & set(held_out)
    told = {text.split("答案：")[0].removeprefix("题目：") for text in corpus(4000, seed=1)}
    assert not told & {text.replace("\n", "") for text in held_out}


def test_no_kind_has_one_fixed_answer() -> None:
    answers: dict[str, set[str]] = defaultdict(set)
    for row in held_out_rows(30, seed=1):
        answers[row["kind"]].add(row["messages"][-1]["content"] if "messages" in row else row["output"])
    assert len(answers) >= 8
    assert min(len(found) for found in answers.values()) >= 3


def test_the_seed_decides() -> None:
    assert training_rows(200, seed=3) == training_rows(200, seed=3)
    assert training_rows(200, seed=3) != training_rows(200, seed=4)


def test_numbers_in_chinese() -> None:
    said = {
        0: "零",
        10: "十",
        12: "十二",
        40: "四十",
        99: "九十九",
        100: "一百",
        108: "一百零八",
        115: "一百一十五",
    }
    assert {value: chinese_number(value) for value in said} == said


def test_arithmetic_is_right() -> None:
    for row in training_rows(3000, seed=2):
        if row["kind"] != "arithmetic" or "=" not in row["instruction"]:
            continue
        left, answer = row["instruction"].split("=")[0], int(row["output"])
        left = left.replace("加", "+").replace("减", "-")
        sign = "+" if "+" in left else "-"
        a, b = (int(part) for part in left.split(sign))
        assert answer == (a + b if sign == "+" else a - b)
