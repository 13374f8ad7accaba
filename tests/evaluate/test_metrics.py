"""Metrics against independent oracles: rouge-chinese, a table of subsequences, numbers worked out by hand."""

from __future__ import annotations

import random

import pytest

from tuoling.evaluate.classes import BELLE_CLASSES, nearest_class, normal_class
from tuoling.evaluate.judge import parse_score
from tuoling.evaluate.metrics import (
    _longest_common,
    char_bleu,
    exact_match,
    f1,
    rates,
    repetition,
    rouge_l,
)
from tuoling.evaluate.statistics import mean_interval, paired
from tuoling.evaluate.suites.arithmetic import number_of, same_number


def table_lcs(one: str, other: str) -> int:
    """The textbook's table."""
    row = [0] * (len(other) + 1)
    for left in one:
        new = [0]
        for column, right in enumerate(other):
            new.append(row[column] + 1 if left == right else max(row[column + 1], new[-1]))
        row = new
    return row[-1]


@pytest.mark.slow
def test_longest_common_subsequence() -> None:
    draw = random.Random(3)
    for _ in range(300):
        one, other = ("".join(draw.choices("abc", k=draw.randrange(0, 90))) for _ in range(2))
        assert _longest_common(one, other) == table_lcs(one, other)


@pytest.mark.slow
def test_rouge_l_is_rouge_chineses_own_figure() -> None:
    jieba = pytest.importorskip("jieba", reason="needs the extra eval")
    rouge = pytest.importorskip("rouge_chinese", reason="the oracle, in the extra dev")
    pairs = [
        ("今天天气很好，我们去公园散步。", "今天天气不错，大家去公园里散步吧。"),
        ("34个省级行政区", "中国目前有34个省级行政区。"),
        ("完全无关", "别的东西"),
        ("the cat sat。换行\n再来", "the cat 换行 sat"),
    ]
    for said, wanted in pairs:
        words = [" ".join(word for word in jieba.lcut(text) if word.strip()) for text in (said, wanted)]
        assert rouge_l(said, wanted) == pytest.approx(
            rouge.Rouge().get_scores(*words)[0]["rouge-l"]["f"], abs=1e-12
        )
    assert rouge_l("", "有") == 0.0 == rouge_l("有", "")


def test_character_bleu() -> None:
    pytest.importorskip("sacrebleu", reason="needs the extra eval")
    assert char_bleu("今天天气很好", "今天天气很好") == pytest.approx(1.0)
    # 6 characters, 5 right; pairs 4 of 5, threes 3 of 4, fours 2 of 3; as long as the reference
    assert char_bleu("今天天气很差", "今天天气很好") == pytest.approx((5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)
    assert char_bleu("", "今天") == 0.0


def test_exact_match_and_f1() -> None:
    assert exact_match("答案 是：３４。", "答案是:34") == 1.0
    assert exact_match("35", "34") == 0.0
    assert exact_match("-5", "5") == 0.0
    assert f1("北京市", "北京") == pytest.approx(2 * 2 / 5)
    assert f1("The cat", "the dog") == pytest.approx(0.5)
    assert f1("", "北京") == 0.0


def test_repetition_and_rates() -> None:
    assert repetition("好好好好好好") == pytest.approx(2 / 3)  # 3 pieces, 1 distinct
    assert repetition("一二三四五六七八") == 0.0 == repetition("好")
    assert rates(["一二三", "", "四"], ["stop", "refused", "length"]) == {
        "characters": pytest.approx(4 / 3),
        "repetition": 0.0,
        "stop_rate": pytest.approx(1 / 3),
        "empty": pytest.approx(1 / 3),
    }
    assert rates([], []) == {}


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("得分: 0.8\n理由：……", 0.8),
        ("得分：0.8分", 0.8),
        ("得分:１", 1.0),
        ("**得分:** 0.75", 0.75),
        ("得分：8/10", 0.8),
        ("得分：85分（满分100）", 0.85),
        ("评分为 90%", 0.9),
        ('"得分:" 0.5', 0.5),
        ("0.6", 0.6),
        ("**0.6**。", 0.6),
        ("Score: .5", 0.5),
        ("请按照“得分:”输出。回答很好，得分:0.9，理由：步骤正确", 0.9),
        ("得分:0.7，若补全步骤则得分:1", 0.7),
        ("得分: 85", None),
        ("得分: -0.5", None),
        ("回答得不错，第 1 步正确。", None),
        ("", None),
    ],
)
def test_a_judges_score_is_found(text: str, score: float | None) -> None:
    assert parse_score(text) == score


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("他一共有 80,000 美元。", 80000),
        ("先算 3+4=7，再乘 2。答案：14 个，其中 3 个坏了", 14),
        ("... so 5 * 3 = 15\n#### 1,015", 1015),
        ("\\boxed{42}", 42),
        ("剩下１２个", 12),
        ("共3/4", "3/4"),
        ("-5", -5),
        ("10-5", 5),
        ("25%", "1/4"),
        ("第3天卖了2.50元", "5/2"),
        ("没有数", None),
        ("1/0", None),
    ],
)
def test_the_number_of_an_answer(text: str, number: object) -> None:
    from fractions import Fraction

    assert number_of(text) == (None if number is None else Fraction(str(number)))


def test_same_number() -> None:
    assert same_number("是 0.333333", "1/3") == 1.0
    assert same_number("25", "25%") == 1.0
    assert same_number("18.0 美元", "18") == 1.0
    assert same_number("180", "18") == 0.0 == same_number("不知道", "18")


def test_classes_in_one_spelling() -> None:
    for written, meant in (
        ("closed\u00a0qa", "closed qa"),
        ("open QA", "open qa"),
        ("Closed_QA", "closed qa"),
        (" Rewrite ", "rewrite"),
        ("翻译", "translation"),
        ("诗歌", "诗歌"),
    ):
        assert normal_class(written) == meant
    assert all(normal_class(name) == name for name in BELLE_CLASSES)
    assert nearest_class("sumarization") == "summarization" and nearest_class("诗歌") is None


@pytest.mark.slow
def test_an_interval_holds_the_mean_as_often_as_it_says() -> None:
    """Of 200 samples of 50 coins, the interval holds the true share in about 95 %; a percentile bootstrap of so few
    is a little narrow (93.9 % in theory), and the draws are fixed."""
    draw = random.Random(5)
    held = 0
    for seed in range(200):
        interval = mean_interval([float(draw.random() < 0.4) for _ in range(50)], seed=seed)
        held += interval.low <= 0.4 <= interval.high
    assert 180 <= held <= 198


def test_verdicts() -> None:
    assert paired([0] * 20, [1] * 20)[1] == "better"
    assert paired([1] * 20, [0] * 20)[1] == "worse"
    assert paired([0, 1] * 10, [1, 0] * 10)[1] == "cannot tell"
    assert paired([0] * 5, [1] * 5)[1] == "cannot tell"  # too few, however clear
    interval, _ = paired([0.2, 0.4, 0.3, 0.1, 0.2, 0.9], [0.3, 0.5, 0.4, 0.2, 0.3, 1.0])
    assert (interval.mean, interval.low, interval.high) == pytest.approx((0.1, 0.1, 0.1))
