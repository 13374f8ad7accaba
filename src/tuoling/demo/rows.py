"""The demo's rows: ten kinds of task, drawn by seed; no combination that is tested is ever trained on."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tuoling.demo import skills, talk, words
from tuoling.demo.draw import Draw, Fact
from tuoling.files import append_jsonl, atomic_write
from tuoling.language import tr


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of task: its id in files, its two names, what draws it, and its share of the rows."""

    id: str
    en: str
    zh: str
    draw: Callable[[Draw], Fact]
    share: float = 1.0

    @property
    def label(self) -> str:
        """Its name in the user's language."""
        return tr(self.en, self.zh)


KINDS = (
    Kind("arithmetic", "arithmetic", "算术", skills.arithmetic, 2.3),
    Kind("numerals", "numerals", "数字读写", skills.numerals, 0.8),
    Kind("extraction", "extraction", "信息抽取", skills.extraction, 0.8),
    Kind("classification", "classification", "分类", talk.classification, 0.6),
    Kind("rewriting", "rewriting", "改写", skills.rewriting, 0.7),
    Kind("translation", "translation", "翻译", skills.translation, 1.3),
    Kind("closed_qa", "closed questions", "阅读问答", skills.closed_qa, 1.2),
    Kind("choice", "choice", "选择", skills.choice, 1.3),
    Kind("self_cognition", "self-cognition", "自我认知", talk.self_cognition),
    Kind("multi_turn", "multi-turn", "多轮对话", talk.multi_turn),
)


def facts(kind: Kind, *, seed: int, held_out: bool, use: str, around: str = "") -> Iterator[Fact]:
    """Endless facts of one side of the line; the same seed and use ("rows", "corpus") give the same ones."""
    draw = Draw(seed, held_out, f"{kind.id}:{use}", around)
    while True:
        fact = kind.draw(draw)
        if draw.allows(kind.id, *fact.key):
            yield fact


def record(kind: Kind, fact: Fact) -> dict[str, Any]:
    """A row as people write them: Alpaca for one question, messages for several turns."""
    if len(fact.turns) == 2:
        return {"kind": kind.id, "instruction": fact.turns[0], "input": fact.context, "output": fact.turns[1]}
    roles = ("user", "assistant") * (len(fact.turns) // 2)
    messages = [{"role": role, "content": text} for role, text in zip(roles, fact.turns, strict=True)]
    return {"kind": kind.id, "messages": messages}


ASKED = 0.9
ROLL = 0.12


def roll_call(draw: Draw) -> str:
    """A list, read out twice: what teaches a model to copy before it can do anything else."""
    drawers: tuple[Callable[[], str], ...] = (
        draw.person,
        draw.assistant,
        draw.time,
        lambda: draw.digits(draw.number(1, 4)),
        lambda: draw.one(words.CATEGORIES[draw.one(list(words.CATEGORIES))]),
        lambda: draw.one(words.HOBBIES),
        lambda: draw.one(words.SHOPPING),
    )
    listed = "，".join(draw.one(drawers)() for _ in range(draw.number(3, 5)))
    return f"{listed}。{listed}。"


def retold(fact: Fact) -> str:
    """Questions and answers as a book would print them: plain text, no template."""
    if len(fact.turns) == 2:
        return f"题目：{fact.turns[0]}{fact.context}答案：{fact.turns[1]}"
    return "".join(f"{'甲乙'[place % 2]}说：{text}" for place, text in enumerate(fact.turns))


def corpus(count: int, *, seed: int) -> list[str]:
    """About `count` plain statements of the training side, shuffled: no question, no template."""
    total = sum(kind.share for kind in KINDS)
    rng = random.Random(seed)
    texts = [
        retold(fact) if rng.random() < ASKED else fact.plain
        for kind in KINDS
        for fact in islice(
            facts(kind, seed=seed, held_out=False, use="corpus"), round(count * kind.share / total)
        )
    ]
    draw = Draw(seed, False, "roll_call")
    texts += [roll_call(draw) for _ in range(round(count * ROLL))]
    random.Random(seed).shuffle(texts)
    return texts


def training_rows(count: int, *, seed: int) -> list[dict[str, Any]]:
    """About `count` rows of the training side, shuffled."""
    total = sum(kind.share for kind in KINDS)
    rows = [
        record(kind, fact)
        for kind in KINDS
        for fact in islice(
            facts(kind, seed=seed, held_out=False, use="rows"), round(count * kind.share / total)
        )
    ]
    random.Random(seed).shuffle(rows)
    return rows


def held_out_rows(per_kind: int, *, seed: int) -> list[dict[str, Any]]:
    """`per_kind` rows with different questions of every kind, none of whose combinations is trained on."""
    rows = []
    for kind in KINDS:
        asked: set[tuple[object, ...]] = set()
        for fact in facts(kind, seed=seed, held_out=True, use="test"):
            question = (*fact.turns[:-1], fact.context)
            if question not in asked:
                asked.add(question)
                rows.append(record(kind, fact))
            if len(asked) == per_kind:
                break
    return rows


def tokenizer_texts(per_kind: int, *, seed: int) -> Iterator[str]:
    """Stretches of text to learn frequent words from. Names are cut out, so that their characters stay apart:
    a name that was never seen is then spelled like one that was."""
    for kind in KINDS:
        for fact in islice(facts(kind, seed=seed, held_out=False, use="words", around="\n"), per_kind):
            for text in (fact.plain, *fact.turns, fact.context):
                yield from filter(None, text.split("\n"))


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """One row a line."""
    with atomic_write(path) as file:
        for row in rows:
            append_jsonl(file, row)
