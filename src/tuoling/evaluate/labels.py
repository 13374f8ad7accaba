"""Names that users see of metrics, sides, suites and verdicts: (Chinese, English)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from tuoling.evaluate.classes import ALL, BELLE_CLASSES
from tuoling.language import tr


class Note(NamedTuple):
    """What a reader of scores must know, in both languages: a report card is read in either."""

    en: str
    zh: str

    def __str__(self) -> str:
        return tr(self.en, self.zh)


METRICS: Mapping[str, tuple[str, str]] = {
    "judge": ("裁判评分", "judge's score"),
    "exact_match": ("完全一致", "exact match"),
    "accuracy": ("正确率", "accuracy"),
    "accuracy_by_length": ("正确率（按选项长度）", "accuracy by length"),
    "f1": ("字符 F1", "character F1"),
    "char_bleu": ("字符 BLEU（sacrebleu）", "character BLEU (sacrebleu)"),
    "rouge_l": ("ROUGE-L（jieba 分词）", "ROUGE-L over words (jieba)"),
    "log_likelihood": (
        "每 token 对数似然（nat，越高越好）",
        "log-likelihood a token (nats, higher is better)",
    ),
    "wins": ("胜率（平局算半）", "share of wins (a tie is half)"),
    "acc": ("正确率", "accuracy"),
    "acc_norm": ("正确率（按选项长度）", "accuracy by length"),
}
SIDES: Mapping[str, tuple[str, str]] = {
    "base": ("基座", "base"),
    "tuned": ("微调后", "tuned"),
    "model": ("模型", "model"),
}
SUITES: Mapping[str, tuple[str, str]] = {
    "mine": ("自己的数据", "own rows"),
    "belle": ("BELLE 评测集", "BELLE's evaluation set"),
    "math": ("数学", "arithmetic"),
    "choice": ("选择题", "multiple choice"),
    "lm-eval": ("lm-eval", "lm-eval"),
    "general": ("遗忘检查：通用数据", "forgetting: general rows"),
    "arena": ("两两比较", "arena"),
}
VERDICTS: Mapping[str, tuple[str, str]] = {
    "better": ("更好", "better"),
    "worse": ("更差", "worse"),
    "cannot tell": ("无法判断", "cannot tell"),
}


def figure(metric: str, value: float) -> str:
    """Per cent, but for nats and other numbers that are no shares."""
    return f"{value:.3f}" if metric == "log_likelihood" else f"{100 * value:.1f}"


def class_names(name: str, suite: str) -> tuple[str, str]:
    """A class as a report shows it. BELLE's have a Chinese name; the user's own stay as the file has them."""
    if name == ALL:
        return "全部", "all"
    return (BELLE_CLASSES.get(name, name) if suite == "belle" else name), name
