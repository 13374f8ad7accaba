"""Two answers to the same question before a judge, in both orders: who wins by more than the place it stands in."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tuoling.errors import EndpointError, UsageError
from tuoling.evaluate.answers import Log
from tuoling.evaluate.classes import WITHOUT_REFERENCE, normal_class
from tuoling.evaluate.interview import Interview, Question
from tuoling.evaluate.items import Item
from tuoling.evaluate.labels import Note
from tuoling.evaluate.outcome import Outcome, Side
from tuoling.evaluate.statistics import paired
from tuoling.infer.client import Client
from tuoling.language import tr

Verdict = Literal["A", "B", "C"]
"""The answer shown first, the one shown second, neither."""

METRIC = "wins"
PROMPT = (
    "请比较下面两个回答，判断哪一个更好：是否正确、完整、通顺，是否按问题的要求作答。"
    "不要受回答的先后顺序和长短影响。先简短说明理由，最后单独一行输出结论："
    "[[A]] 表示回答A更好，[[B]] 表示回答B更好，[[C]] 表示不相上下。"
)
ASK_AGAIN = "请只输出结论：[[A]]、[[B]] 或 [[C]]。"
_MARKED = re.compile(r"\[\[?\s*([ABC])\s*\]?\]|【\s*([ABC])\s*】")
_ALONE = re.compile(r"[*_`\"'\s]*(?:结论[:]?\s*)?([ABC])[*_`\"'。.\s]*")


def parse_verdict(text: str) -> Verdict | None:
    """The conclusion of a judge: the last `[[A]]`, `[[B]]` or `[[C]]`, or the letter alone; None for prose."""
    plain = unicodedata.normalize("NFKC", text).replace("：", ":")
    marked = _MARKED.findall(plain)
    if marked:
        letter = marked[-1][0] or marked[-1][1]
    else:
        alone = _ALONE.fullmatch(plain)
        letter = alone[1] if alone else ""
    return letter if letter in ("A", "B", "C") else None


def question_text(item: Item, first: str, second: str) -> str:
    """What the judge reads; a reference answer only where BELLE's rules show one."""
    parts = [PROMPT, f"问题:{item.question}"]
    if item.target and normal_class(item.group) not in WITHOUT_REFERENCE:
        parts.append(f"标准答案:{item.target}")
    return "\n".join([*parts, f"回答A:{first}", f"回答B:{second}"])


@dataclass(slots=True)
class Bout:
    """Two sides over all items. values: 1 where the second side won, 0 where the first did, 0.5 a tie, None unknown.

    same: answers that are equal, a tie unasked. swayed: items whose verdict changed with the order, a tie; towards
    the answer shown first: first_preferred.
    """

    first: str
    second: str
    values: list[float | None]
    same: int = 0
    swayed: int = 0
    first_preferred: int = 0
    both_orders: int = 0

    def to_json(self) -> dict[str, Any]:
        """For scores.json, with the interval of second less first."""
        known = [value for value in self.values if value is not None]
        found: dict[str, Any] = {
            "first": self.first,
            "second": self.second,
            "losses": sum(value == 0 for value in known),
            "ties": sum(value == 0.5 for value in known),
            "wins": sum(value == 1 for value in known),
            "unknown": len(self.values) - len(known),
            "equal_answers": self.same,
            "asked_in_both_orders": self.both_orders,
            "changed_with_the_order": self.swayed,
            "for_the_one_shown_first": self.first_preferred,
        }
        if known:
            interval, said = paired([1 - value for value in known], known)
            found["difference"] = {**interval.to_json(), "verdict": said}
        return found


@dataclass(slots=True)
class Arena:
    """Holds the bouts of an outcome's sides and fills their METRIC; `failed` where the endpoint gave up half-way."""

    client: Client
    log: Log
    step: Callable[[int, int], None] = lambda done, total: None
    bouts: list[Bout] = field(default_factory=list)
    failed: EndpointError | None = None
    interview: Interview[Verdict] = field(init=False)

    def __post_init__(self) -> None:
        self.interview = Interview(self.client, parse_verdict, ASK_AGAIN)

    def hold(self, outcome: Outcome) -> None:
        """Every pair of sides over every item; what is known by then is counted when the endpoint fails."""
        pairs = list(itertools.combinations(outcome.sides, 2))
        for first, second in pairs:
            bout = Bout(first.name, second.name, [None] * len(outcome.items))
            self.bouts.append(bout)
            if self.failed is None:
                try:
                    self._bout(bout, outcome.items, first, second, len(pairs))
                except EndpointError as error:
                    self.failed = error
        for side in outcome.sides:
            side.values[METRIC] = _shares(side.name, self.bouts, len(outcome.items))
        outcome.headline = METRIC
        outcome.complete = self.failed is None
        outcome.facts |= {
            "judge": self.interview.facts(),
            "bouts": [bout.to_json() for bout in self.bouts],
        }
        outcome.notes += self._notes()

    def _bout(self, bout: Bout, items: Sequence[Item], first: Side, second: Side, pairs: int) -> None:
        """Questions 2i (first side as A) and 2i + 1 (second side as A) for item i."""
        questions = []
        for place, item in enumerate(items):
            one, other = first.answers[place].text.strip(), second.answers[place].text.strip()
            if one == other:
                bout.values[place] = 0.5
                bout.same += 1
                continue
            for turned, (a, b) in enumerate(((one, other), (other, one))):
                text = question_text(item, a, b)
                questions.append(
                    Question(2 * place + turned, item.place, [{"role": "user", "content": text}])
                )
        total = 2 * len(items) * pairs
        self.step(2 * bout.same, total)
        said: dict[int, Verdict | None] = {}
        try:
            for index, verdict in self.interview.answers(questions, self.log):
                said[index] = verdict
                self.step(1, total)
        finally:
            for place in range(len(items)):
                straight, turned_round = said.get(2 * place), said.get(2 * place + 1)
                if straight is not None and turned_round is not None:
                    bout.values[place] = self._settle(bout, straight, turned_round)

    @staticmethod
    def _settle(bout: Bout, straight: Verdict, turned: Verdict) -> float:
        """1 where the second side wins in both orders, 0 where the first does, else a tie."""
        bout.both_orders += 1
        winner = {"A": 0.0, "B": 1.0, "C": 0.5}
        one, other = winner[straight], 1.0 - winner[turned]
        if one == other:
            return one
        bout.swayed += 1
        bout.first_preferred += straight == turned == "A"
        return 0.5

    def _notes(self) -> list[Note]:
        said = self.interview.notes(Note("[[A]], [[B]] or [[C]]", " [[A]]、[[B]] 或 [[C]]"))
        for bout in self.bouts:
            if bout.swayed:
                names = f"{bout.first} / {bout.second}"
                said.append(
                    Note(
                        f"{names}: for {bout.swayed} of {bout.both_orders} questions the verdict changed with the order "
                        f"({bout.first_preferred} for whichever came first): they count as ties",
                        f"{names}：{bout.both_orders} 题中有 {bout.swayed} 题交换顺序后结论不同"
                        f"（其中 {bout.first_preferred} 题偏向先出现者），按平局计",
                    )
                )
        if self.failed is not None:
            said.append(
                Note(f"the judge failed: {self.failed.problem}", f"裁判接口出错：{self.failed.problem}")
            )
        return said


def _shares(name: str, bouts: Sequence[Bout], count: int) -> list[float | None]:
    """A side's share of wins (a tie is half of one) on each item, over all who stood against it."""
    found: list[float | None] = []
    for place in range(count):
        won = []
        for bout in bouts:
            value = bout.values[place]
            if value is not None and name in (bout.first, bout.second):
                won.append(value if name == bout.second else 1 - value)
        found.append(sum(won) / len(won) if won else None)
    return found


def require_two(sides: Sequence[Any], model: str) -> None:
    """Raise UsageError where there is nobody to compare with, or two have one name."""
    names = [side.name for side in sides]
    if len(sides) < 2:
        raise UsageError(
            tr("an arena needs two models", "两两比较需要至少两个模型"),
            remedy=f"tuoling evaluate {model} FILE --arena --against OTHER --judge URL MODEL",
        )
    if len(set(names)) < len(names):
        raise UsageError(
            tr(
                f"two models have one name: {', '.join(names)}",
                f"有重名的模型：{'、'.join(names)}",
            )
        )
