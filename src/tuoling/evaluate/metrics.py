"""Offline metrics of one answer against its reference, each from 0 to 1, and what needs no reference.

They compare characters and words. They do not know whether an answer is right: only a judge or a number does.
"""

from __future__ import annotations

import functools
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tuoling.errors import MissingPackage
from tuoling.language import tr

REPEAT_GRAM = 4
_ENDS = " \t\r\n。.！!？?；;，,、：:\"'“”‘’「」"


def normal_answer(text: str) -> str:
    """For comparing whole answers: NFKC, case folded, whitespace gone, no punctuation at the ends."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(_ENDS)


def exact_match(answer: str, target: str) -> float:
    """1 where both say the same but for width, case, whitespace and punctuation at the ends."""
    return float(normal_answer(answer) == normal_answer(target))


def f1(answer: str, target: str) -> float:
    """Harmonic mean of precision and recall over characters (words, for Latin script): SQuAD's F1 as CMRC uses it."""
    said, wanted = _units(answer), _units(target)
    shared = sum((Counter(said) & Counter(wanted)).values())
    return 2 * shared / (len(said) + len(wanted)) if shared else 0.0


def _units(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+|[^\W_]", unicodedata.normalize("NFKC", text).casefold())


def char_bleu(answer: str, target: str) -> float:
    """Sentence BLEU over characters with sacrebleu's effective order, so that short answers have a score."""
    score: float = _bleu().sentence_score(answer, [target]).score
    return score / 100


@functools.cache
def _bleu() -> Any:
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise MissingPackage("sacrebleu", extra="eval", purpose=tr("character BLEU", "字符 BLEU")) from error
    return BLEU(tokenize="char", effective_order=True)


def rouge_l(answer: str, target: str) -> float:
    """F of the longest common subsequence of jieba's words: rouge-chinese's own figure, to its last digit.

    Not through that package: its table is a dict with an entry for every pair of words, 600 MB and more for two texts
    of 2,000 words.
    """
    said, wanted = ([word for word in _words()(text) if word.strip()] for text in (answer, target))
    shared = _longest_common(said, wanted)
    if not shared:
        return 0.0
    precision, recall = shared / len(said), shared / len(wanted)
    return 2.0 * (precision * recall / (precision + recall + 1e-8))


def _longest_common(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence, a word of `one` a bit (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for index, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << index
    full = (1 << len(one)) - 1
    open_bits = full
    for word in other:
        met = open_bits & places.get(word, 0)
        open_bits = ((open_bits + met) | (open_bits - met)) & full
    return len(one) - open_bits.bit_count()


@functools.cache
def _words() -> Callable[[str], list[str]]:
    try:
        import jieba
    except ImportError as error:
        raise MissingPackage("jieba", extra="eval", purpose="ROUGE-L") from error
    jieba.setLogLevel(logging.WARNING)
    cut: Callable[[str], list[str]] = jieba.lcut
    return cut


REFERENCED: Mapping[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "f1": f1,
    "char_bleu": char_bleu,
    "rouge_l": rouge_l,
}
"""Metrics that need a reference answer."""


def repetition(text: str) -> float:
    """Share of a text's 4-character pieces that repeat an earlier one; 0 for a short text."""
    plain = "".join(text.split())
    grams = [plain[start : start + REPEAT_GRAM] for start in range(len(plain) - REPEAT_GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def rates(texts: Sequence[str], finish_reasons: Sequence[str]) -> dict[str, float]:
    """What answers look like, with no reference: mean length in characters, repetition, stopped by itself, empty."""
    count = len(texts)
    if not count:
        return {}
    return {
        "characters": sum(len(text.strip()) for text in texts) / count,
        "repetition": sum(map(repetition, texts)) / count,
        "stop_rate": sum(reason == "stop" for reason in finish_reasons) / count,
        "empty": sum(not text.strip() for text in texts) / count,
    }
