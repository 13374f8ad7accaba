"""What a user names becomes sources: files, folders, samples, registry entries, hub ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tuoling.data.read import read_rows
from tuoling.data.sources import Source, parse_columns, resolve_sources
from tuoling.errors import DataError, UsageError

ROW = {"instruction": "问", "output": "答"}


def jsonl(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_folder_is_walked_and_what_is_no_data_is_said(tmp_path, capsys):
    jsonl(tmp_path / "b" / "deep" / "rows.json", [ROW])
    jsonl(tmp_path / "a.jsonl", [{"text": "文"}])
    jsonl(tmp_path / ".hidden" / "rows.json", [ROW])
    (tmp_path / "README.md").write_text("# words\n")
    (tmp_path / "b" / "config.json").write_text('{"model_type": "bloom"}')
    (tmp_path / "b" / "settings.json").write_text('{\n "learning_rate": 1\n}')
    (tmp_path / "weights.bin").write_bytes(bytes(1000))
    sources = resolve_sources([str(tmp_path)])
    assert [Path(source.path).name for source in sources] == ["a.jsonl", "rows.json"]
    said = capsys.readouterr().err
    assert "2 data files; 4 others" in said and "README.md" in said and "hidden" not in said


def test_a_folder_without_data_is_an_error(tmp_path):
    (tmp_path / "README.md").write_text("words")
    with pytest.raises(DataError, match="1 others"):
        resolve_sources([str(tmp_path)])


def test_a_sample_of_a_file_and_of_a_folder(tmp_path):
    jsonl(tmp_path / "big.jsonl", [{"text": str(i)} for i in range(90)])
    jsonl(tmp_path / "small.jsonl", [{"text": str(i)} for i in range(10)])
    (source,) = resolve_sources([f"{tmp_path / 'big.jsonl'}#7"])
    assert source.sample == 7 and len(list(read_rows(source))) == 7
    sources = resolve_sources([f"{tmp_path}#50"])
    assert [len(list(read_rows(source))) for source in sources] == [45, 5]


def test_a_larger_sample_of_a_folder_holds_the_smaller_one(tmp_path):
    for name, count in (("a", 23), ("b", 7), ("c", 1)):
        jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name}{i}"} for i in range(count)])
    before = set()
    for size in range(1, 32):
        sources = resolve_sources([f"{tmp_path}#{size}"])
        rows = {row.record["text"] for source in sources for row in read_rows(source)}
        assert len(rows) == size and before < rows
        before = rows


def test_a_file_whose_name_holds_a_hash_is_itself(tmp_path):
    path = jsonl(tmp_path / "rows#12", [ROW])
    (source,) = resolve_sources([str(path)])
    assert source == Source(str(path))


def registry(folder: Path, entries) -> Path:
    path = folder / "dataset_info.json"
    path.write_text(json.dumps(entries))
    return path


def test_registry_entries_of_llama_factory_are_read_unchanged(tmp_path):
    jsonl(tmp_path / "plain.json", [{"ask": "问", "more": "料", "say": "答"}] * 3)
    turns = [{"who": "customer", "what": "问"}, {"who": "clerk", "what": "答"}]
    jsonl(tmp_path / "share.json", [{"talk": turns, "set": "设定"}])
    jsonl(tmp_path / "pt.json", [{"content": "文"}])
    jsonl(tmp_path / "pairs.json", [{"p": "问", "c": "好", "r": "坏"}])
    registry(
        tmp_path,
        {
            "plain": {
                "file_name": "plain.json",
                "columns": {"prompt": "ask", "query": "more", "response": "say", "history": "past"},
                "num_samples": 2,
            },
            "share": {
                "file_name": "share.json",
                "formatting": "sharegpt",
                "columns": {"messages": "talk", "system": "set"},
                "tags": {
                    "role_tag": "who",
                    "content_tag": "what",
                    "user_tag": "customer",
                    "assistant_tag": "clerk",
                },
            },
            "pt": {"file_name": "pt.json", "columns": {"prompt": "content"}},
            "pairs": {
                "file_name": "pairs.json",
                "ranking": True,
                "columns": {"prompt": "p", "chosen": "c", "rejected": "r"},
            },
            "far": {"hf_hub_url": "owner/name", "split": "test", "subset": "zh"},
            "gone": {"file_name": "gone.json"},
        },
    )
    names = ["plain", "share", "pt", "pairs", "far"]
    plain, share, pt, pairs, far = resolve_sources([], dataset_dir=tmp_path, dataset_names=names)
    rows = list(read_rows(plain))
    assert len(rows) == 2 and rows[0].problems == () and rows[0].conversation.turns[0].context == "料"
    (row,) = read_rows(share)
    assert [(t.role, t.text) for t in row.conversation.turns] == [
        ("system", "设定"),
        ("user", "问"),
        ("assistant", "答"),
    ]
    (row,) = read_rows(pt)
    assert row.format == "text" and row.conversation.turns[0].text == "文"
    (row,) = read_rows(pairs)
    assert row.format == "preference" and row.conversation.answer == "好"
    assert (far.hub, far.split, far.subset) == ("owner/name", "test", "zh")
    with pytest.raises(DataError, match="no such file"):
        resolve_sources([], dataset_dir=tmp_path, dataset_names=["gone"])
    with pytest.raises(DataError) as caught:
        resolve_sources([], dataset_dir=tmp_path, dataset_names=["plane"])
    assert "plain" in caught.value.remedy


def test_the_registry_itself_stands_for_the_datasets_that_are_here(shared_data, capsys):
    sources = resolve_sources([str(shared_data / "alpaca" / "dataset_info.json")])
    assert sorted(Path(source.path).name for source in sources) == [
        "alpaca_zh_demo.json",
        "dpo_zh_demo.json",
        "identity.json",
    ]
    assert "3 datasets are here" in capsys.readouterr().err


def test_what_looks_like_a_path_is_never_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for spec in ("./a/b", "data/rows.json", "/no/such", "rows", "a/b/c"):
        with pytest.raises(DataError, match="no such file"):
            resolve_sources([spec])
    (source,) = resolve_sources(["BelleGroup/train_1M_CN#100"])
    assert (source.hub, source.sample) == ("BelleGroup/train_1M_CN", 100)


@pytest.mark.slow
def test_a_hub_dataset_through_a_local_folder(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    jsonl(tmp_path / "owner" / "name" / "train.jsonl", [ROW] * 3)
    source = Source("owner/name", hub=str(tmp_path / "owner" / "name"))
    rows = list(read_rows(source))
    assert [row.conversation.answer for row in rows] == ["答"] * 3
    assert [row.place.line for row in rows] == [1, 2, 3]


def test_content_keys_follow_content_and_reading_not_names(tmp_path):
    one, two = jsonl(tmp_path / "one", [ROW]), jsonl(tmp_path / "two", [ROW])
    assert Source(str(one)).content_key() == Source(str(two)).content_key()
    assert Source(str(one)).content_key() != Source(str(one), columns={"a": "b"}).content_key()
    jsonl(two, [ROW, ROW])
    assert Source(str(one)).content_key() != Source(str(two)).content_key()


def test_columns_are_parsed():
    assert parse_columns("instruction=ask, output=answer") == {"instruction": "ask", "output": "answer"}
    assert parse_columns(None) is None
    with pytest.raises(UsageError, match="name=column"):
        parse_columns("instruction")


def test_an_unknown_format_lists_the_known(tmp_path):
    path = jsonl(tmp_path / "rows", [ROW])
    with pytest.raises(DataError) as caught:
        resolve_sources([str(path)], format="alpacca")
    assert "alpaca" in caught.value.remedy


def test_a_file_of_a_folder_that_should_hold_rows_and_cannot_be_read_is_named(tmp_path, capsys):
    jsonl(tmp_path / "rows.jsonl", [ROW])
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "settings.json").write_text('{\n "learning_rate": 1\n}')
    resolve_sources([str(tmp_path)])
    said = capsys.readouterr().err
    assert f"{tmp_path / 'empty.json'}: the file is empty" in said and "settings.json:" not in said


def test_a_path_in_a_folder_that_is_here_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "data" / "train.jsonl", [ROW])
    with pytest.raises(DataError, match="no such file"):
        resolve_sources(["data/train"])
    assert resolve_sources(["elsewhere/train"])[0].hub == "elsewhere/train"


def test_a_sample_of_no_rows_is_a_wrong_call(tmp_path):
    with pytest.raises(UsageError, match="0 rows"):
        resolve_sources([f"{jsonl(tmp_path / 'rows.jsonl', [ROW])}#0"])


def test_a_web_page_is_taken_as_text_only_when_that_is_asked_for(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<html>\n</html>\n")
    with pytest.raises(DataError, match="web page"):
        resolve_sources([str(page)])
    (source,) = resolve_sources([str(page)], format="text")
    assert len(list(read_rows(source))) == 2
