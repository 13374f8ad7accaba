"""Rows come out of every container and encoding, with the line each starts on."""

from __future__ import annotations

import gzip
import json
import random
from itertools import pairwise
from pathlib import Path

import pytest

from tuoling import environment
from tuoling.data.read import guess, read_rows
from tuoling.data.sources import Source
from tuoling.errors import DataError

ROWS = [{"instruction": f"问题{i}", "input": "", "output": f"第一行\n答案{i}"} for i in range(5)]


def read(path: Path, **how) -> list[tuple[int, str | None]]:
    """(line, answer or None) of every row."""
    return [
        (row.place.line, row.conversation.answer if row.conversation and not row.problems else None)
        for row in read_rows(Source(str(path), **how))
    ]


def answers(rows=ROWS) -> list[str]:
    return [row["output"] for row in rows]


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def lines(rows=ROWS, **how) -> str:
    return "".join(json.dumps(row, ensure_ascii=False, **how) + "\n" for row in rows)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "gb18030"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_json_lines_in_every_encoding(tmp_path, encoding, newline):
    path = write(tmp_path / "rows.txt", lines().replace("\n", newline), encoding)
    assert read(path) == list(zip(range(1, 6), answers(), strict=True))


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030", "utf-16"])
def test_an_array_over_lines_knows_where_rows_start(tmp_path, encoding):
    path = write(tmp_path / "rows.jsonl", json.dumps(ROWS, ensure_ascii=False, indent=2), encoding)
    assert read(path) == [(2 + 5 * i, answer) for i, answer in enumerate(answers())]


def test_escaped_unicode_is_read_as_characters(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert [answer for _, answer in read(path)] == answers()


def test_objects_one_after_another(tmp_path):
    path = write(tmp_path / "rows.json", "\n".join(json.dumps(row, indent=1) for row in ROWS))
    assert [answer for _, answer in read(path)] == answers()
    assert [line for line, _ in read(path)] == [1, 6, 11, 16, 21]
    path = write(tmp_path / "one_line.json", "".join(json.dumps(row) for row in ROWS))
    assert read(path) == [(1, answer) for answer in answers()]


def test_one_object_over_lines_is_one_row(tmp_path):
    assert read(write(tmp_path / "row.json", json.dumps(ROWS[0], indent=2))) == [(1, ROWS[0]["output"])]


def test_compressed_files_are_read_by_content(tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(gzip.compress(lines().encode()))
    assert [answer for _, answer in read(path)] == answers()


@pytest.mark.slow
def test_a_cut_gzip_yields_what_is_there_and_says_where(tmp_path):
    noise = random.Random(1)
    many = [{"instruction": str(noise.random()), "output": str(noise.random())} for _ in range(20_000)]
    data = gzip.compress(lines(many).encode())
    path = tmp_path / "rows.gz"
    path.write_bytes(data[: len(data) * 3 // 4])
    rows = list(read_rows(Source(str(path))))
    good = [row for row in rows if not row.problems]
    assert 5_000 < len(good) < 20_000
    assert rows[-1].problems[0].code == "cut_file"
    assert rows[-1].place.line == rows[-2].place.line + 1


def test_a_trailing_comma_costs_no_row_and_is_named(tmp_path):
    path = write(tmp_path / "rows.json", json.dumps(ROWS, indent=2)[:-2] + ",\n]")
    rows = list(read_rows(Source(str(path))))
    assert [row.problems for row in rows] == [()] * 5
    assert [flag.code for flag in rows[-1].flags] == ["json_syntax"] and "line 27" in rows[-1].flags[
        0
    ].message


def test_a_missing_comma_between_rows_costs_no_row_and_is_named(tmp_path):
    text = json.dumps(ROWS, indent=2).replace("  },\n  {", "  }\n  {", 1)
    rows = list(read_rows(Source(str(write(tmp_path / "rows.json", text)))))
    assert len(rows) == 5 and not any(row.problems for row in rows)
    assert [flag.code for flag in rows[0].flags] == ["json_syntax"] and "line 7" in rows[0].flags[0].message


@pytest.mark.parametrize("indent", [2, None])
def test_a_broken_row_in_an_array_costs_itself_only(tmp_path, indent):
    pieces = [json.dumps(row, indent=indent) for row in ROWS]
    pieces[2] = pieces[2].replace('": "', '" "', 1)  # a colon is missing
    path = write(tmp_path / "rows.json", "[\n" + ",\n".join(pieces) + "\n]")
    read_back = read(path)
    assert [answer for _, answer in read_back] == [*answers()[:2], None, *answers()[3:]]


def test_a_broken_row_with_turns_in_it_is_one_bad_row(tmp_path):
    rows = [
        {"conversations": [{"from": "human", "value": f"q{i}"}, {"from": "gpt", "value": f"a{i}"}]}
        for i in range(4)
    ]
    text = json.dumps(rows, indent=2).replace('"q1"', '"q1', 1)
    assert [answer for _, answer in read(write(tmp_path / "rows.json", text))] == ["a0", None, "a2", "a3"]


@pytest.mark.parametrize("cut", [1, 2, 3, 20, 60])
def test_a_cut_array_yields_its_whole_rows_and_names_the_place(tmp_path, cut):
    text = json.dumps(ROWS, indent=2, ensure_ascii=False)
    path = write(tmp_path / "rows.json", text[:-cut])
    rows = list(read_rows(Source(str(path))))
    good = [row.conversation.answer for row in rows if not row.problems]
    assert good == answers()[: 5 if cut <= 2 else 4]
    assert len(rows) == len(good) + 1
    assert rows[-1].problems[0].code == "not_json" and rows[-1].place.line >= 22


def test_a_large_array_is_read_in_windows(tmp_path, monkeypatch):
    monkeypatch.setattr("tuoling.data.json_stream._CHUNK", 7)
    path = write(tmp_path / "rows.json", json.dumps(ROWS, indent=2, ensure_ascii=False))
    assert read(path) == [(2 + 5 * i, answer) for i, answer in enumerate(answers())]
    broken = path.read_text(encoding="utf-8").replace('"问题2"', '"问题2', 1)
    assert [a for _, a in read(write(path, broken))] == [*answers()[:2], None, *answers()[3:]]


def test_a_bad_line_in_json_lines_is_named_and_passed(tmp_path):
    text = lines().splitlines()
    text[1] = text[1][:-4]
    rows = list(read_rows(Source(str(write(tmp_path / "rows.jsonl", "\n\n".join(text))))))
    assert [row.place.line for row in rows] == [1, 3, 5, 7, 9]
    assert [bool(row.problems) for row in rows] == [False, True, False, False, False]
    assert rows[1].problems[0].code == "not_json" and str(rows[1].place).endswith("rows.jsonl:3")


def test_json_nested_too_deep_is_a_bad_row(tmp_path):
    path = write(tmp_path / "rows.jsonl", lines() + "[" * 100_000 + "\n")
    assert [answer for _, answer in read(path)] == [*answers(), None]


def test_csv_with_quotes_and_line_ends_in_cells(tmp_path):
    text = 'instruction,output\n"他说""好""","第一行\n第二行"\n问,答\n'
    for newline in ("\n", "\r\n"):
        path = write(tmp_path / "rows.data", text.replace("\n", newline), "gb18030")
        assert read(path) == [(2, "第一行\n第二行"), (4, "答")]


def test_csv_with_named_columns(tmp_path):
    path = write(tmp_path / "rows.csv", "科室甲,提法,说法\n内科,头疼,休息\n")
    assert read(path, columns={"instruction": "提法", "output": "说法"}) == [(2, "休息")]
    path = write(tmp_path / "bare.csv", "内科,头疼,休息\n外科,手疼,别动\n")
    assert read(path, columns={"instruction": "2", "output": "3"}) == [(1, "休息"), (2, "别动")]


def test_a_table_without_header(tmp_path):
    assert read(write(tmp_path / "rows", "一加一？\t2\n一加二？\t3\n")) == [(1, "2"), (2, "3")]


def test_rows_of_another_width_and_open_quotes_are_bad(tmp_path):
    path = write(tmp_path / "rows.csv", 'question,answer\n一,二,三\n四,五\n六,"七\n')
    rows = list(read_rows(Source(str(path))))
    assert [row.problems[0].code if row.problems else None for row in rows] == [
        "wrong_width",
        None,
        "not_csv",
    ]
    assert [row.place.line for row in rows] == [2, 3, 4]


def test_a_gb18030_file_cut_inside_a_character(tmp_path):
    data = "question,answer\n甲,乙\n丙,丁\n".encode("gb18030")
    path = tmp_path / "rows.csv"
    path.write_bytes(data[:-2])
    rows = list(read_rows(Source(str(path))))
    assert [bool(row.problems) for row in rows] == [False, True]
    assert rows[1].problems[0].code == "mojibake" and rows[1].place.line == 3


def test_plain_text_is_a_row_a_line_or_a_row_a_block(tmp_path):
    path = write(tmp_path / "poem.txt", "床前明月光，\n疑是地上霜。\n\n举头望明月，\n低头思故乡。\n")
    assert [row.conversation.turns[0].text for row in read_rows(Source(str(path)))] == [
        "床前明月光，",
        "疑是地上霜。",
        "举头望明月，",
        "低头思故乡。",
    ]
    blocks = list(read_rows(Source(str(path), format="text_blocks")))
    assert [(row.place.line, row.conversation.turns[0].text) for row in blocks] == [
        (1, "床前明月光，\n疑是地上霜。"),
        (4, "举头望明月，\n低头思故乡。"),
    ]


@pytest.mark.parametrize(
    "text", ["[1] 一条脚注\n正文第一行\n", "Well, yes, of course.\nNo, not at all.\n", "{不是 JSON\n"]
)
def test_prose_that_looks_like_something_else(tmp_path, text):
    rows = list(read_rows(Source(str(write(tmp_path / "prose.txt", text)))))
    if text.startswith("{"):
        assert rows[0].problems[0].code == "not_json"
    else:
        assert [row.format for row in rows] == ["text", "text"]


@pytest.mark.slow
def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    path = tmp_path / "rows.bin"
    parquet.write_table(arrow.Table.from_pylist(ROWS), path)
    assert read(path) == list(zip(range(1, 6), answers(), strict=True))
    turns = [{"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]}]
    parquet.write_table(arrow.Table.from_pylist(turns), path)
    assert read(path) == [(1, "答")]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b" \n\n", "empty"),
        (b"PK\x03\x04" + b"\x00" * 64, "zip"),
        (bytes(range(256)) * 8, "binary"),
    ],
)
def test_files_without_rows_are_refused_with_a_way_out(tmp_path, data, words):
    path = tmp_path / "x.json"
    path.write_bytes(data)
    with pytest.raises(DataError, match=words) as caught:
        list(read_rows(Source(str(path))))
    assert caught.value.where == str(path) and caught.value.remedy


def test_a_missing_file_names_its_neighbours(tmp_path):
    write(tmp_path / "train.jsonl", lines())
    with pytest.raises(DataError) as caught:
        list(read_rows(Source(str(tmp_path / "trian.jsonl"))))
    assert "train.jsonl" in caught.value.remedy


@pytest.mark.slow
def test_a_sample_is_seeded_in_order_and_of_the_asked_size(tmp_path):
    many = [{"instruction": f"q{i}", "output": f"a{i}"} for i in range(200)]
    path = write(tmp_path / "rows.jsonl", lines(many))
    first = read(path, sample=20)
    assert first == read(path, sample=20) and len(first) == 20
    assert first == sorted(first) and first != read(path, sample=20, seed=7)
    assert first != read(path)[:20]
    assert len(read(path, sample=500)) == 200
    assert sorted(read(path, sample=200)) == sorted(read(path))
    draws = [set(read(path, sample=size)) for size in range(1, 201)]
    assert all(smaller < larger for smaller, larger in pairwise(draws))


def test_the_guess_says_container_encoding_format_and_columns(tmp_path):
    path = write(tmp_path / "rows.csv", "department,title,ask,answer\n内科,标题,问,答\n", "gb18030")
    words = guess(Source(str(path))).words
    for part in ("CSV", "GB18030", "question_answer", "ask → answer"):
        assert part in words


def test_mixed_formats_in_one_file(tmp_path):
    rows = [ROWS[0], {"input": "问", "target": "答"}, {"text": "文"}]
    path = write(tmp_path / "rows.jsonl", lines(rows))
    assert [row.format for row in read_rows(Source(str(path)))] == ["alpaca", "old_belle", "text"]


SHARED = {
    "alpaca/alpaca_zh_demo.json": ("alpaca", 1000, 0),
    "alpaca/identity.json": ("alpaca", 91, 0),
    "alpaca/dpo_zh_demo.json": ("preference", 300, 6),
    "awkward/crlf.json": ("alpaca", 48, 0),
    "awkward/medical_gb18030.csv": ("question_answer", 1558, 1),
    "awkward/poems_bom.txt": ("text", 109, 0),
    "belle/eval_prompt.json": ("eval_prompt", 11, 0),
    "belle/eval_set.json": ("eval_set", 1000, 0),
    "belle/zh_seed_tasks.json": ("seed_task", 175, 0),
    "dialogue/sharegpt_zh_250.jsonl": ("conversations", 250, 1),
    "dialogue/smile_1500.jsonl": ("messages", 1500, 15),
    "domain/domain.train.json": ("alpaca", 1666, 0),
    "domain/domain.test.json": ("alpaca", 13, 0),
    "domain/predictions_bloomz_3b.json": ("predictions", 13, 0),
    "eval/mgsm_zh.tsv": ("question_answer", 250, 0),
    "self-instruct/generated_questions.jsonl": ("question", 500, 0),
    "self-instruct/question_answer_pairs.jsonl": ("question_answer", 499, 0),
    "self-instruct/seed_questions.jsonl": ("question", 20, 0),
    "self-instruct/self_cognition.jsonl": ("question_answer", 26, 0),
    "vicuna/chat/data_sample.jsonl": ("vicuna_chat", 3, 0),
    "vicuna/instruct/data_sample.jsonl": ("alpaca", 10, 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARED)
def test_real_files(shared_data, name):
    rows = list(read_rows(Source(str(shared_data / name))))
    format, count, bad = SHARED[name]
    assert {row.format for row in rows} == {format}
    assert (len(rows), sum(bool(row.problems) for row in rows)) == (count, bad)
    lines_of = [row.place.line for row in rows]
    assert lines_of == sorted(lines_of)


def test_lines_of_a_real_array_are_where_the_rows_start(shared_data):
    path = shared_data / "alpaca" / "alpaca_zh_demo.json"
    text = path.read_text(encoding="utf-8").splitlines()
    for row in read_rows(Source(str(path))):
        assert text[row.place.line - 1].strip() == "{"
        assert json.dumps(row.record["instruction"], ensure_ascii=False) in text[row.place.line]


def test_the_column_of_a_cut_row_is_counted_from_its_own_line(tmp_path):
    cut = '{"instruction":"未完","outp'
    path = write(tmp_path / "cut.json", "[\n" + lines(ROWS[:1]).rstrip() + ",\n" + cut)
    last = list(read_rows(Source(str(path))))[-1]
    assert last.place.line == 3
    assert f"(line 3, column {cut.index('outp')})" in last.problems[0].message
    one_line = json.dumps(ROWS[:3], ensure_ascii=False)[:-12]
    last = list(read_rows(Source(str(write(path, one_line)))))[-1]
    assert f"(line 1, column {one_line.rindex(': ') + 3})" in last.problems[0].message


@pytest.mark.parametrize(("delimiter", "name"), [(";", "CSV (;)"), ("|", "CSV (|)")])
def test_a_table_may_stand_between_semicolons_or_bars(tmp_path, delimiter, name):
    text = f'question{delimiter}answer\n你好吗{delimiter}"很好{delimiter}谢谢\n你呢"\n在吗{delimiter}在\n'
    path = write(tmp_path / "excel.csv", text)
    assert read(path) == [(2, f"很好{delimiter}谢谢\n你呢"), (4, "在")]
    assert guess(Source(str(path))).container.startswith(name)
    prose = write(tmp_path / "prose.txt", f"春天{delimiter}花开\n夏天{delimiter}雨落\n")
    assert guess(Source(str(prose))).format == "text"


def test_a_table_of_one_column_is_read_by_its_header(tmp_path):
    path = write(tmp_path / "one.csv", 'text\n"第一段\n第二行"\n第二段\n')
    rows = list(read_rows(Source(str(path))))
    assert [(row.place.line, row.record) for row in rows] == [
        (2, {"text": "第一段\n第二行"}),
        (4, {"text": "第二段"}),
    ]


def test_a_line_separator_inside_a_cell_does_not_end_the_row(tmp_path):
    path = write(tmp_path / "a.csv", "问一,答\u2028一\n问二,答二\n")
    assert read(path) == [(1, "答\u2028一"), (2, "答二")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "Git LFS pointer"),
        ("<!DOCTYPE html>\n<html><body>404</body></html>\n", "web page"),
    ],
)
def test_what_a_failed_download_leaves_is_named(tmp_path, text, said):
    path = write(tmp_path / "rows.jsonl", text)
    with pytest.raises(DataError, match=said):
        guess(Source(str(path)))


def test_a_web_page_may_be_read_as_text_when_asked_for(tmp_path):
    path = write(tmp_path / "page.html", "<html>\n</html>\n")
    assert len(list(read_rows(Source(str(path), format="text")))) == 2


def test_text_under_a_name_that_says_json_is_pointed_at(tmp_path):
    path = write(tmp_path / "rows.jsonl", "第一行\n第二行\n")
    flags = [[flag.code for flag in row.flags] for row in read_rows(Source(str(path)))]
    assert flags == [["not_json_inside"], []]


def test_a_first_line_that_is_no_json_does_not_turn_the_rows_into_text(tmp_path):
    path = write(tmp_path / "rows.jsonl", "# 说明\n" + lines())
    rows = list(read_rows(Source(str(path))))
    assert rows[0].problems[0].code == "not_json" and rows[0].place.line == 1
    assert [row.conversation.answer for row in rows[1:] if row.conversation] == answers()


def test_a_stray_nul_is_a_bad_row_and_not_a_binary_file(tmp_path):
    path = write(tmp_path / "rows.jsonl", lines(ROWS[:2]) + '{"instruction": "a\0b", "output": "c"}\n')
    rows = list(read_rows(Source(str(path))))
    assert [(row.place.line, [p.code for p in row.problems]) for row in rows] == [
        (1, []),
        (2, []),
        (3, ["not_json"]),
    ]


def test_keys_in_capitals_are_read_where_plain_ones_are_not_there(tmp_path):
    path = write(tmp_path / "rows.csv", "Question,Answer\n一,1\n二,\n")
    rows = list(read_rows(Source(str(path))))
    assert [row.format for row in rows] == ["question_answer"] * 2
    assert rows[0].conversation is not None and rows[0].conversation.answer == "1"
    assert rows[1].problems[0].field == "answer"


def test_what_the_decoder_says_is_said_in_chinese(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "language", lambda: "zh")
    deep = '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"
    path = write(tmp_path / "rows.jsonl", lines(ROWS[:1]) + '{"a" 1}\n' + deep + "\n")
    messages = [row.problems[0].message for row in read_rows(Source(str(path))) if row.problems]
    assert "这里应为冒号（第 6 列）" in messages[0] and "嵌套太深" in messages[1]


def test_rows_that_are_the_values_of_one_object_are_pointed_at(tmp_path):
    path = write(tmp_path / "rows.json", json.dumps({"1": ROWS[0], "2": ROWS[1]}))
    (row,) = read_rows(Source(str(path)))
    assert "2 values of one object" in row.problems[0].message
