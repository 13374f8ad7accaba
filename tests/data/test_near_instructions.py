"""ROUGE-L against the textbook table, and near duplicates against all pairs compared one by one."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest

from tuoling.data.near_instructions import Search, near_duplicates
from tuoling.data.rouge_l import SimilarTexts, Tokens, common, rouge_l


def words(text: str) -> list[str]:
    """Characters and Latin words, small, without signs: what the library calls tokens, said another way."""
    return re.findall(r"[a-z0-9]+|[\u4e00-\u9fff]", text.casefold())


def table(one: list[str] | list[int], other: list[str] | list[int]) -> int:
    """Longest common subsequence by the table of all prefixes."""
    row = [0] * (len(other) + 1)
    for left in one:
        before = list(row)
        for place, right in enumerate(other):
            row[place + 1] = before[place] + 1 if left == right else max(before[place + 1], row[place])
    return row[-1]


def score(one: str, other: str) -> float:
    """ROUGE-L; `common` is held to the table below."""
    ids: dict[str, int] = {}
    a, b = ([ids.setdefault(word, len(ids)) for word in words(text)] for text in (one, other))
    return 2 * common(a, b) / (len(a) + len(b)) if a and b else 0.0


def made(count: int, seed: int) -> list[str]:
    """Instructions alike in every degree: some words of a few sentences changed."""
    chance = random.Random(seed)
    bases = [
        "".join(chance.choice("写一首关于春天的诗请把下面这句话翻译成英文解释什么是光合作用列出三个例子") for _ in range(chance.randrange(4, 90)))
        for _ in range(12)
    ]  # fmt: skip
    texts = []
    for _ in range(count):
        text = list(chance.choice(bases))
        for _ in range(chance.randrange(0, max(1, len(text) // 2))):
            text[chance.randrange(len(text))] = chance.choice("天地玄黄宇宙洪荒日月盈昃辰宿列张")
        texts.append("".join(text) + chance.choice(["", " Python", "。", " list 3"]))
    return texts


def test_tokens_are_characters_and_latin_words() -> None:
    tokens = Tokens()
    flat, starts = tokens.read(["用Python写HTML！", "用 python 写 ＨＴＭＬ", "", "。。"])
    first, second = flat[starts[0] : starts[1]], flat[starts[1] : starts[2]]
    assert first.tolist() == second.tolist() and len(set(first.tolist())) == 4
    assert starts.tolist() == [0, 4, 8, 8, 8]


def test_common_subsequence_is_the_tables() -> None:
    chance = random.Random(3)
    for _ in range(60):
        one = [chance.randrange(6) for _ in range(chance.randrange(0, 100))]
        other = [chance.randrange(6) for _ in range(chance.randrange(0, 100))]
        assert common(one, other) == table(one, other)
    assert rouge_l([1, 2, 3], [1, 9, 3]) == pytest.approx(2 / 3)
    assert rouge_l([], [1]) == 0.0


@pytest.mark.slow
def test_pairs_at_once_are_the_pairs_one_by_one() -> None:
    texts = [
        *made(60, 1),
        "",
        "！",
        "春" * 300,
        "春" * 290 + "夏" * 9,
    ]  # also beyond 64 tokens and 255 of one kind
    search = Search(texts)
    one, other = (places.astype(np.int64) for places in np.triu_indices(len(texts), 1))
    found = search.alike(one, other)
    want = [score(texts[a], texts[b]) > 0.7 for a, b in zip(one, other, strict=True)]
    assert found.tolist() == want
    assert 30 < sum(want) < len(want) / 2


@pytest.mark.slow
def test_what_goes_has_a_like_that_stays_and_what_stays_has_none() -> None:
    texts = [*made(200, 2), "", "", "写一首诗", "写一首诗！"]
    report = near_duplicates(texts)
    for place in np.flatnonzero(~report.kept):
        like = int(report.like[place])
        assert report.kept[like] and like < place
        assert score(texts[place], texts[like]) > 0.7
    kept = np.flatnonzero(report.kept).tolist()
    assert [texts[place] for place in kept[-3:]] == [
        "",
        "",
        "写一首诗",
    ]  # texts without a token are like no other
    both = [(a, b) for n, a in enumerate(kept) for b in kept[:n] if score(texts[a], texts[b]) > 0.7]
    alike = sum(score(a, b) > 0.7 for n, a in enumerate(texts) for b in texts[:n])
    assert len(both) <= 0.01 * alike  # of the pairs alike at most 1 in 100 stays whole
    assert report.exact + report.near == (~report.kept).sum() and report.exact >= 1
    assert near_duplicates(texts, threads=1).kept.tolist() == report.kept.tolist()


@pytest.mark.slow
def test_one_by_one_finds_the_most_alike() -> None:
    texts = made(80, 4)
    seen = SimilarTexts(0.7)
    for place, text in enumerate(texts):
        scores = [score(text, earlier) for earlier in texts[:place]]
        best = max(scores, default=0.0)
        found = seen.like(text)
        if best > 0.7:
            assert found is not None and found[1] == pytest.approx(best) and scores[found[0]] == best
        else:
            assert found is None
        seen.add(text)
    assert len(seen) == 80 and seen.like("！") is None


def test_no_texts() -> None:
    assert near_duplicates([]).kept.tolist() == []
    assert near_duplicates(["", "。"]).kept.tolist() == [True, True]
