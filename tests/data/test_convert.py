"""Converted rows say what the rows said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tuoling.data.convert import TARGETS, convert
from tuoling.data.read import read_rows
from tuoling.data.sources import Source
from tuoling.errors import DataError, UsageError

MULTI = {
    "messages": [
        {"role": "system", "content": "设定"},
        {"role": "user", "content": "一"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "二"},
        {"role": "assistant", "content": "2"},
    ]
}
ROWS = [
    MULTI,
    {"instruction": "翻译", "input": "hello", "output": "你好"},
    {"input": ["甲"], "output": ["乙"]},
]


def write(path: Path, rows) -> Source:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return Source(str(path))


def said(path: Path) -> list[list[tuple[str, str]]]:
    rows = list(read_rows(Source(str(path))))
    assert not any(row.problems for row in rows)
    return [[(turn.role, turn.full_text) for turn in row.conversation.turns] for row in rows]


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("name", ["out.json", "out.jsonl"])
def test_nothing_said_is_lost(tmp_path, to, name):
    source = write(tmp_path / "rows.jsonl", ROWS)
    report = convert([source], to=to, out=tmp_path / name)
    assert (report.rows, report.written, report.bad, report.unsaid) == (3, 3, 0, 0)
    assert said(tmp_path / name) == said(tmp_path / "rows.jsonl")
    text = (tmp_path / name).read_text(encoding="utf-8")
    assert "翻译" in text and "\\u" not in text
    whole = json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]
    assert len(whole) == 3


def test_alpaca_keeps_the_input_apart_and_earlier_turns_as_history(tmp_path):
    convert([write(tmp_path / "rows.jsonl", ROWS)], to="alpaca", out=tmp_path / "out.json")
    multi, single, _ = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert multi == {
        "instruction": "二",
        "input": "",
        "output": "2",
        "system": "设定",
        "history": [["一", "1"]],
    }
    assert single == ROWS[1]


def test_what_cannot_be_written_is_counted(tmp_path):
    source = write(tmp_path / "rows.jsonl", [*ROWS, {"text": "文"}, {"instruction": "问", "output": ""}])
    report = convert([source], to="messages", out=tmp_path / "out.jsonl")
    assert (report.rows, report.written, report.bad, report.unsaid) == (5, 3, 1, 1)
    assert report.first_bad and report.first_bad.startswith(f"{source.path}:5")


def test_nothing_to_write_is_an_error_without_a_file(tmp_path):
    source = write(tmp_path / "rows.jsonl", [{"text": "文"}])
    with pytest.raises(DataError):
        convert([source], to="alpaca", out=tmp_path / "out.json")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_calls_that_are_wrong(tmp_path):
    source = write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(UsageError, match="sharegpt"):
        convert([source], to="sharegpt", out=tmp_path / "out.json")
    with pytest.raises(UsageError, match="already"):
        convert([source], to="alpaca", out=tmp_path / "rows.jsonl")
