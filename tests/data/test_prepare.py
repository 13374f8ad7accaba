"""BelleGroup's sets from local copies, as zero_nlp's notebook left them."""

from __future__ import annotations

import json

import pytest

from tuoling.data.prepare import BELLE, prepare_belle
from tuoling.data.read import read_rows
from tuoling.data.sources import Source
from tuoling.errors import DataError, UsageError


def copies(folder, count=5):
    for name in BELLE:
        rows = [{"instruction": f"{name} 第{i}问", "input": "", "output": "答"} for i in range(count)]
        (folder / f"{name}.json").write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )


def test_the_first_rows_of_each_set_one_array_each(tmp_path):
    (tmp_path / "hub").mkdir()
    copies(tmp_path / "hub")
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("stays")
    files = prepare_belle(out, rows=3, local=tmp_path / "hub")
    assert [file.path.name for file in files] == [f"data_{i}_BelleGroup.json" for i in range(6)]
    assert (out / "mine.txt").read_text() == "stays"
    for name, file in zip(BELLE, files, strict=True):
        text = file.path.read_text(encoding="utf-8")
        assert [row["instruction"] for row in json.loads(text)] == [f"{name} 第{i}问" for i in range(3)]
        rows = list(read_rows(Source(str(file.path))))
        assert [row.place.line for row in rows] == [2, 3, 4] and not any(row.problems for row in rows)


def test_files_that_are_there_are_kept(tmp_path):
    copies(tmp_path)
    prepare_belle(tmp_path / "out", rows=1, local=tmp_path)
    with pytest.raises(UsageError, match="already there"):
        prepare_belle(tmp_path / "out", rows=2, local=tmp_path)
    assert prepare_belle(tmp_path / "out", rows=2, local=tmp_path, force=True)[0].rows == 2


def test_sets_that_are_not_there_are_said(tmp_path):
    copies(tmp_path)
    (tmp_path / "train_2M_CN.json").unlink()
    heard: list[str] = []
    files = prepare_belle(tmp_path / "out", rows=9, local=tmp_path, say=heard.append)
    assert len(files) == 5 and files[0].rows == 5
    assert any("train_2M_CN" in message for message in heard)


def test_a_folder_without_copies_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no copy"):
        prepare_belle(tmp_path / "out", local=tmp_path)
    assert not (tmp_path / "out").exists()
