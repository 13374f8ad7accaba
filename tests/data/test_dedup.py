"""`tuoling data dedup`: what stays is what was there, what goes names what it repeats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from tuoling.cli.main import app

ROWS = [
    {"instruction": "请写一首关于春天的诗", "input": "", "output": "春眠不觉晓", "id": 7},
    {"instruction": "把下面的句子翻译成英文", "input": "今天天气很好", "output": "It is fine."},
    {"instruction": "请写一首关于春天的诗歌！", "input": "", "output": "另一首"},
    {"instruction": "把下面的句子翻译成英文", "input": "骆驼在沙漠里走了三天三夜", "output": "The camels …"},
    {
        "messages": [
            {"role": "user", "content": "鲸鱼是不是鱼类动物？"},
            {"role": "assistant", "content": "不是。"},
        ]
    },
    {"instruction": "", "input": "", "output": "没有问题"},
]


def call(*words: object) -> Any:
    return CliRunner().invoke(app, ["data", "dedup", *map(str, words)])


def test_what_goes_and_what_stays(tmp_path: Path) -> None:
    source, test, out, gone = (
        tmp_path / name for name in ("rows.jsonl", "test.jsonl", "out.jsonl", "gone.log")
    )
    source.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    test.write_text('{"question": "鲸鱼是不是鱼类"}\n', encoding="utf-8")
    result = call(source, "--out", out, "--against", test, "--removed", gone, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert (said["rows"], said["written"], said["removed"], said["against"], said["bad"]) == (6, 3, 2, 1, 1)
    kept = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert kept == [ROWS[0], ROWS[1], ROWS[3]]  # the same order of another text is another question
    lines = [json.loads(line) for line in gone.read_text(encoding="utf-8").splitlines()]
    assert [(line["place"], line["repeats"]) for line in lines] == [
        (f"{source}:3", f"{source}:1"),
        (f"{source}:5", f"{test}:1"),
    ]
    assert lines[0]["row"] == ROWS[2]
    assert call(source, "--out", out).exit_code == 2  # there already
    assert call(source, "--out", tmp_path / "a.json", "--above", 0.99).exit_code == 0
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == ROWS[:5]
    nothing = call(test, "--out", tmp_path / "b.jsonl", "--against", test)
    assert nothing.exit_code == 1 and not (tmp_path / "b.jsonl").exists()
