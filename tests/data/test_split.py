"""A split leaks nothing: what repeats or asks the same is on one side."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tuoling.data.check import check
from tuoling.data.sources import Source
from tuoling.data.split import parse_test_size, split
from tuoling.errors import DataError, UsageError


def write(path: Path, rows) -> Source:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return Source(str(path))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows_with_copies() -> list[dict]:
    noise = random.Random(0)
    rows = []
    for i in range(60):
        answer = "".join(noise.choices("天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏", k=100))
        rows.append({"instruction": f"第{i}问", "output": answer, "id": i, "group": i})
        if i % 3 == 0:  # the same, nearly the same, or another answer to the same question
            rows.append({"instruction": f"第{i}问", "output": answer, "id": 100 + i, "group": i})
            rows.append({"instruction": f"再说第{i}问", "output": answer, "id": 200 + i, "group": i})
            rows.append({"instruction": f"第{i}问", "output": f"不知道{i}", "id": 300 + i, "group": i})
    noise.shuffle(rows)
    return rows


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_groups_stay_together_and_no_row_is_lost(tmp_path, seed):
    rows = rows_with_copies()
    source = write(tmp_path / "rows.jsonl", rows)
    report = split([source], test=30, out=tmp_path / "out", seed=seed)
    train, test = read(tmp_path / "out" / "train.jsonl"), read(tmp_path / "out" / "test.jsonl")
    assert not {row["group"] for row in train} & {row["group"] for row in test}
    assert sorted(row["id"] for row in train + test) == sorted(row["id"] for row in rows)
    assert all(row in rows for row in test)
    assert (report.train_rows, report.test_rows) == (len(train), len(test)) and 27 <= len(test) <= 30
    assert (report.groups, report.grouped_rows) == (20, 80)


def test_equal_seeds_give_equal_files_and_others_do_not(tmp_path):
    source = write(tmp_path / "rows.jsonl", rows_with_copies())
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        split([source], test=0.1, out=tmp_path / name, seed=seed)
    files = [(tmp_path / name / "test.jsonl").read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]


def test_bad_rows_are_in_neither_part(tmp_path):
    source = write(tmp_path / "rows.jsonl", [{"instruction": "空", "output": ""}, *rows_with_copies()])
    report = split([source], test=10, out=tmp_path / "out")
    assert report.bad == 1 and report.train_rows + report.test_rows == report.rows - 1


def test_more_test_rows_than_data_is_an_error_and_writes_nothing(tmp_path):
    source = write(tmp_path / "rows.jsonl", [{"instruction": str(i), "output": "答"} for i in range(5)])
    with pytest.raises(DataError, match="5 test rows are asked for, there are 5"):
        split([source], test=5, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_that_are_there_are_kept(tmp_path):
    source = write(tmp_path / "rows.jsonl", [{"instruction": str(i), "output": "答"} for i in range(5)])
    split([source], test=1, out=tmp_path)
    before = (tmp_path / "test.jsonl").read_bytes()
    with pytest.raises(UsageError, match="already"):
        split([source], test=2, out=tmp_path)
    assert (tmp_path / "test.jsonl").read_bytes() == before
    assert split([source], test=2, out=tmp_path, force=True).test_rows == 2


@pytest.mark.slow
def test_a_real_file_splits_without_overlap(shared_data, tmp_path):
    source = Source(str(shared_data / "domain" / "domain.train.json"))
    split([source], test=0.1, out=tmp_path)
    train, test = Source(str(tmp_path / "train.jsonl")), Source(str(tmp_path / "test.jsonl"))
    report = check([train], against=[test], near=False)
    assert report.total.overlap == 0 and report.against["rows"] in range(160, 168)
    both = check([train, test])
    assert both.files[test.path].duplicates == both.files[test.path].near_duplicates == 0


def test_sizes_are_parsed():
    assert parse_test_size("10%") == 0.1 and parse_test_size("0.2") == 0.2 and parse_test_size("200") == 200
    for wrong in ("0", "100%", "ten", "1.5", "-3"):
        with pytest.raises(UsageError):
            parse_test_size(wrong)
