"""`check` counts and names: good and bad, duplicates, overlap, lengths."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest

from tuoling.data.check import check, parse_share
from tuoling.data.duplicates import NearDuplicates, first_of_equal, grams, similarity
from tuoling.data.lengths import kept_shares, length_report
from tuoling.data.sources import Source
from tuoling.errors import DataError, UsageError

PARTS = "春眠不觉晓处闻啼鸟夜来风雨声花落知多少白日依山尽黄河入海流欲穷千里目更上一层楼"


def sentence(seed: int, length: int = 80) -> str:
    return "".join(random.Random(seed).choices(PARTS, k=length))


def file_of(path: Path, pairs) -> Source:
    rows = [{"instruction": question, "output": answer} for question, answer in pairs]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return Source(str(path))


def ledger_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_are_good_or_bad_and_the_ledger_says_why(tmp_path):
    source = file_of(tmp_path / "rows.jsonl", [("问", "答"), ("问", ""), ("我是", "[名字代号]")])
    report = check([source], ledger=tmp_path / "ledger.jsonl")
    assert (report.total.rows, report.total.good, report.total.bad) == (3, 2, 1)
    assert not report.passed
    bad, flag = ledger_of(tmp_path / "ledger.jsonl")
    assert (bad["file"], bad["line"], bad["row"], bad["format"]) == (source.path, 2, 2, "alpaca")
    assert (bad["verdict"], bad["field"], bad["code"]) == ("bad", "output", "empty_answer")
    assert (flag["verdict"], flag["code"], flag["line"]) == ("flag", "placeholder", 3)


def test_a_share_of_bad_rows_may_be_allowed(tmp_path):
    source = file_of(tmp_path / "rows.jsonl", [("问", ""), *((f"问{i}", f"答{i}") for i in range(9))])
    assert not check([source], allow_bad=0.09).passed
    report = check([source], allow_bad=0.1)
    assert report.passed and report.to_json()["allow_bad"] == 0.1


@pytest.mark.parametrize("text", ["[]", "instruction,output\n"])
def test_a_file_without_rows_is_an_error(tmp_path, text):
    (tmp_path / "rows").write_text(text)
    with pytest.raises(DataError, match="no rows"):
        check([Source(str(tmp_path / "rows"))], ledger=tmp_path / "ledger.jsonl")
    assert not (tmp_path / "ledger.jsonl").exists()


def test_duplicates_repeat_an_earlier_row_and_stay_good(tmp_path):
    text = sentence(1)
    near = text[:40] + "变" + text[41:]
    first = file_of(tmp_path / "a.jsonl", [("问", text), ("问", f"  {text}\n")])
    second = file_of(tmp_path / "b.jsonl", [("问", near), ("问", text), ("问", sentence(2))])
    report = check([first, second], ledger=tmp_path / "ledger.jsonl")
    assert (report.total.good, report.total.duplicates, report.total.near_duplicates) == (5, 2, 1)
    assert report.passed
    files = report.to_json()["files"]
    assert [files[s.path]["duplicates"] for s in (first, second)] == [1, 1]
    assert [files[s.path]["near_duplicates"] for s in (first, second)] == [0, 1]
    verdicts = {(entry["verdict"], entry["line"]) for entry in ledger_of(tmp_path / "ledger.jsonl")}
    assert verdicts == {("duplicate", 2), ("near_duplicate", 1)}
    assert check([first, second], near=False).to_json()["near_duplicates"] is None


def test_overlap_is_asking_the_same(tmp_path):
    train = file_of(tmp_path / "train.jsonl", [("问一", "甲"), ("问 一", "乙"), ("问二", "丙")])
    test = file_of(tmp_path / "test.jsonl", [("问一", "甲"), ("问三", "丁")])
    report = check([train], against=[test])
    # "问 一" has a space inside, which is another question; leading and trailing ones are not looked at
    assert report.total.overlap == 1
    assert report.against == {"rows": 2, "found": 1}


@pytest.mark.slow
def test_the_six_test_rows_that_are_also_in_train(shared_data):
    train, test = (Source(str(shared_data / "domain" / f"domain.{part}.json")) for part in ("train", "test"))
    report = check([train], against=[test])
    assert (report.total.rows, report.total.bad, report.total.overlap) == (1666, 0, 6)
    assert report.against == {"rows": 13, "found": 6}


class Letters:
    """A tokenizer of one id a character."""

    def encode_batch(self, batch):
        return [([ord(c) for text in texts for c in text], []) for texts in batch]


class Bare:
    """A template that joins what is said."""

    id = "bare"

    def render(self, conversation, **_):
        return [turn.text for turn in conversation.turns]

    prompt = render


def test_tokens_decide_what_is_over_long(tmp_path):
    source = file_of(tmp_path / "rows.jsonl", [("一二", "三"), ("一二", "三四五六"), ("空", "")])
    report = check([source], tokenizer=Letters(), template=Bare(), max_seq_len=5, ledger=tmp_path / "l")
    assert (report.total.good, report.total.problems) == (1, {"overlong": 1, "empty_answer": 1})
    assert report.to_json()["lengths"]["unit"] == "tokens"
    assert report.to_json()["kept"] == {"512": 1.0, "1024": 1.0, "2048": 1.0}
    over = [entry for entry in ledger_of(tmp_path / "l") if entry["code"] == "overlong"]
    assert "6 tokens, the limit is 5" in over[0]["message"]


def test_lengths_against_a_sorted_list():
    lengths = [random.Random(3).randrange(1, 3000) for _ in range(1000)]
    report = length_report(lengths, "tokens")
    ranked = sorted(lengths)
    assert (report["min"], report["max"], report["median"]) == (ranked[0], ranked[-1], ranked[499])
    assert (report["p95"], report["p99"]) == (ranked[949], ranked[989])
    assert sum(entry["rows"] for entry in report["histogram"]) == 1000
    for entry in report["histogram"]:
        end = entry["to"] or float("inf")
        assert entry["rows"] == sum(entry["from"] <= length < end for length in lengths)
    assert kept_shares(lengths)["1024"] == round(sum(length <= 1024 for length in lengths) / 1000, 4)
    assert length_report([], "tokens")["rows"] == 0


def jaccard(one: str, other: str) -> float:
    """The definition, over Python sets."""
    a, b = ({text[i : i + 4] for i in range(len(text) - 3)} for text in (one, other))
    return len(a & b) / len(a | b)


def test_similarity_is_the_jaccard_of_character_four_grams():
    for seed in range(20):
        one = sentence(seed)
        other = one[: seed * 4] + sentence(seed + 100, 8) + one[seed * 4 + 8 :]
        assert similarity(grams(one), grams(other)) == pytest.approx(jaccard(one, other), abs=1e-12)
    assert similarity(grams("你好，世界！AB"), grams("你好 世界ab")) == 1.0


@pytest.mark.slow
def test_every_near_pair_is_found_and_none_other():
    texts = []
    for seed in range(60):
        base = sentence(seed, 120)
        cuts = seed % 6  # changed characters: similarity falls with them
        changed = list(base)
        for position in range(cuts):
            changed[5 + position * 20] = "改"
        texts += [base, "".join(changed) + "终"]
    near = NearDuplicates()
    for text in texts:
        near.add(text)
    keys = first_of_equal(np.array([hash(text) & (2**63 - 1) for text in texts], np.uint64))
    found = {(later, earlier) for later, earlier, _ in near.pairs(keys)}
    expected = {
        (j, i) for i, j in itertools.combinations(range(len(texts)), 2) if jaccard(texts[i], texts[j]) >= 0.8
    }
    assert found == expected and 20 < len(expected) < 60


def test_first_of_equal():
    keys = np.array([5, 3, 5, 3, 9, 5], np.uint64)
    assert first_of_equal(keys).tolist() == [0, 1, 0, 1, 4, 0]
    assert first_of_equal(np.zeros(0, np.uint64)).tolist() == []


def test_shares_are_parsed():
    assert parse_share("1%") == 0.01 and parse_share("0.2") == 0.2 and parse_share(0.5) == 0.5
    for wrong in ("two", "101%", "-1"):
        with pytest.raises(UsageError):
            parse_share(wrong)
