"""`tuoling data check|split|convert|prepare` through the real command line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tuoling.cli.main import app


def run(*words: object):
    return CliRunner().invoke(app, ["data", *map(str, words)])


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "rows.json"
    made = [{"instruction": f"第{i}问", "input": "", "output": f"这是第{i}个回答"} for i in range(40)]
    made[7]["output"] = ["不是", "文本"]  # type: ignore[assignment]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made), encoding="utf-8")
    return path


def test_check_prints_one_object_and_the_rest_on_stderr(rows):
    result = run("check", rows, "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert (report["rows"], report["good"], report["bad"]) == (40, 39, 1)
    assert report["formats"] == {"alpaca": 40} and "files" not in report
    assert {"duplicates", "near_duplicates", "overlap", "lengths", "kept", "ledger"} <= set(report)
    assert "format alpaca" in result.stderr
    ledger = [json.loads(line) for line in Path(report["ledger"]).read_text(encoding="utf-8").splitlines()]
    assert [(e["line"], e["field"], e["code"]) for e in ledger if e["verdict"] == "bad"] == [
        (8, "output", "wrong_type")
    ]
    assert os.environ["TUOLING_CACHE"] in report["ledger"]


def test_check_names_the_bad_row_for_people(rows):
    result = run("check", rows)
    assert result.exit_code == 1
    assert f"{rows}:8:output: `output` is a list, want text" in result.stdout
    assert "not accepted" in result.stdout


def test_allow_bad_is_the_way_past(rows):
    result = run("check", rows, "--allow-bad", "3%", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["allow_bad"] == 0.03


def test_check_over_several_files_and_against_a_test_file(rows, tmp_path):
    test = tmp_path / "test.jsonl"
    test.write_text(
        '{"question": "第3问", "answer": "x"}\n{"question": "别的", "answer": "y"}\n', encoding="utf-8"
    )
    result = run("check", rows, test, "--against", test, "--json", "--no-near")
    report = json.loads(result.stdout)
    assert set(report["files"]) == {str(rows), str(test)}
    assert report["files"][str(rows)]["overlap"] == 1
    assert report["against"] == {"rows": 2, "found": 2}
    assert sum(entry["rows"] for entry in report["files"].values()) == report["rows"] == 42


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["missing.json"], 1, "no such file"),
        (["{rows}", "--format", "alpacca"], 1, "alpacca"),
        (["{rows}", "--allow-bad", "many"], 2, "many"),
        (["{rows}", "--max-seq-len", "100"], 2, "--tokenizer"),
        (["{rows}", "--columns", "x"], 2, "name=column"),
        ([], 2, "FILES"),
    ],
)
def test_wrong_calls_are_told_apart_from_bad_input(rows, words, code, said):
    result = run("check", *(word.format(rows=rows) for word in words))
    assert result.exit_code == code and said in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.slow
def test_tokens_of_a_real_tokenizer(shared_data):
    tokenizer = shared_data / "tokenizers" / "gpt-neox-20b" / "20B_tokenizer.json"
    train = shared_data / "domain" / "domain.train.json"
    result = run(
        "check", train, "--tokenizer", tokenizer, "--template", "domain_bloom", "--max-seq-len", 512, "--json", "--no-near"
    )  # fmt: skip
    report = json.loads(result.stdout)
    assert result.exit_code == 1
    assert report["lengths"]["unit"] == "tokens" and report["template"] == "domain_bloom"
    assert report["problems"] == {"overlong": report["bad"]} and 250 < report["bad"] < 400
    assert report["kept"]["512"] == round(report["good"] / report["rows"], 4)
    assert report["kept"]["1024"] == 1.0


def test_split_convert_and_check_again(rows, tmp_path):
    result = run("split", rows, "--test", "10%", "--out", tmp_path / "parts", "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert (report["train_rows"], report["test_rows"], report["bad"]) == (35, 4, 1)
    result = run(
        "convert", tmp_path / "parts", "--to", "conversations", "--out", tmp_path / "all.json", "--json"
    )
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert (report["rows"], report["written"], report["formats"]) == (39, 39, {"alpaca": 39})
    assert len(json.loads((tmp_path / "all.json").read_text(encoding="utf-8"))) == 39
    assert run("check", tmp_path / "all.json").exit_code == 0


def test_converted_questions_without_answers_are_counted_and_said(tmp_path):
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"question": "问"}\n{"question": "问", "answer": "答"}\n', encoding="utf-8")
    result = run("convert", asked, "--to", "messages", "--out", tmp_path / "out.jsonl")
    assert result.exit_code == 0 and "1 of them are questions without an answer" in result.stderr


def test_test_rows_larger_than_the_data(rows, tmp_path):
    result = run("split", rows, "--test", "41", "--out", tmp_path / "parts")
    assert result.exit_code == 1 and "41 test rows are asked for" in result.stderr
    assert not (tmp_path / "parts").exists()


def test_prepare_belle_from_copies(tmp_path):
    (tmp_path / "school_math_0.25M.json").write_text(
        '{"instruction": "一加一", "output": "二"}\n', encoding="utf-8"
    )
    result = run("prepare", "belle", "--from", tmp_path, "--out", tmp_path / "out")
    assert result.exit_code == 0 and "data_1_BelleGroup.json: 1" in result.stdout
    assert run("prepare", "bella", "--out", tmp_path / "out").exit_code == 2


@pytest.mark.slow
def test_every_real_file_is_checked_without_a_defect(shared_data):
    result = run("check", shared_data, "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 1 and "unexpected" not in result.stderr
    assert report["rows"] == report["good"] + report["bad"] > 9000
    assert report["problems"].keys() == {"mojibake", "empty_question", "roles_out_of_order"}
    assert len(report["files"]) == 22
