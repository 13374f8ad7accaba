"""A judge behind any OpenAI-speaking endpoint: BELLE's rules, a score from 0 to 1 after 得分:."""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tuoling.errors import DataError
from tuoling.evaluate.answers import Answer, Log
from tuoling.evaluate.classes import WITHOUT_REFERENCE, normal_class
from tuoling.evaluate.interview import Interview, Question
from tuoling.evaluate.items import Item
from tuoling.evaluate.labels import Note
from tuoling.evaluate.outcome import Side
from tuoling.files import sha256_text
from tuoling.infer.client import Client

ASK_AGAIN = "请只输出一行分数，格式为“得分:0.5”，分数在0到1之间。"
REPEATED_SHARE = 0.05
REPEATED_RANGE = (20, 100)
CLOSE = 0.1
"""Two scores of the same answer that are at most this far apart agree."""

_NUMBER = r"(\d+(?:\.\d+)?|\.\d+)"
_OF = rf"{_NUMBER}\s*(?:(%)|分?\s*\(?(?:/|out of|满分)\s*{_NUMBER})?"
_MARKED = re.compile(
    rf"(?:得分|评分|分数|score)[*_`\"'”」\s]*(?:[:=]|为|是)[*_`\"'“「\s]*{_OF}", re.IGNORECASE
)
_ALONE = re.compile(rf"[*_`\"'\s]*{_OF}\s*分?[*_`\"'。.\s]*")


def parse_score(text: str) -> float | None:
    """The score in a judge's answer; None where there is none from 0 to 1.

    Full width, `得分：0.8`, `**得分:** 8/10`, `得分: 80%` and a bare number are understood. Of several the first one
    counts: BELLE's prompt asks for the score, then for the reason. A number over 1 without its maximum is no score.
    """
    plain = unicodedata.normalize("NFKC", text).replace("：", ":")
    for match in _MARKED.finditer(plain):
        score = _value(match)
        if score is not None:
            return score
    alone = _ALONE.fullmatch(plain)
    return _value(alone) if alone else None


def _value(match: re.Match[str]) -> float | None:
    number, percent, of = float(match[1]), match[2], match[3]
    score = number / 100 if percent else number / float(of) if of and float(of) else number
    return score if 0 <= score <= 1 else None


def read_prompts(path: Path | str) -> dict[str, str]:
    """Class → judge prompt, from BELLE's eval_prompt.json. Raises DataError with file:line."""
    from tuoling.data.read import read_rows
    from tuoling.data.sources import resolve_sources

    prompts = {}
    for source in resolve_sources([str(path)], format="eval_prompt"):
        for row in read_rows(source):
            if row.problems or not isinstance(row.record, Mapping):
                raise DataError(row.problems[0].message, where=str(row.place))
            prompts[normal_class(str(row.record["class"]))] = str(row.record["prompt"])
    return prompts


FORM = "请按照“得分:”这样的形式输出分数，满分为1分，最低分为0分。"
OWN_PROMPTS: Mapping[str, str] = {
    "math": "你是数学老师。对照标准答案判断模型回答的最终结果是否正确，步骤可以不同，但不能有错。",
    "code": "你是编程老师。判断模型回答里的代码能否解决问题，标准答案只作参考。",
    "classification": "对照标准答案给模型回答打分，分类结果越接近标准答案分数越高。",
    "extract": "给模型回答打分：抽取的内容应来自题目给出的材料，并且回答了问题。",
    "open qa": "对照标准答案给模型回答打分，内容越接近标准答案分数越高。",
    "closed qa": "对照标准答案给模型回答打分，回答应依据题目给出的材料，并与标准答案一致。",
    "generation": "给模型回答打分：语句通顺，符合题目要求，内容真实且没有恶意。",
    "brainstorming": "给模型回答打分：对问题有帮助，内容真实且没有恶意。",
    "rewrite": "给模型回答打分：是否按题目的要求完成了改写。",
    "translation": "对照标准答案给译文打分：意思保持不变，语句通顺。",
    "summarization": "对照标准答案给模型回答打分：是否概括了材料的重点。",
}
"""Used where BELLE's own file is not given."""

GENERAL_PROMPT = "给模型回答打分：是否正确、完整、通顺地回答了问题。有标准答案时以标准答案为准。"
"""For the user's own classes."""


def default_prompts() -> dict[str, str]:
    """A prompt for each of BELLE's classes in our own words."""
    return {name: prompt + FORM for name, prompt in OWN_PROMPTS.items()}


def judge_message(item: Item, answer: str, prompt: str) -> str:
    """Prompt, question, reference (not for classes whose answers are free), answer, and the request."""
    parts = [prompt, f"问题:{item.question}"]
    if item.target and normal_class(item.group) not in WITHOUT_REFERENCE:
        parts.append(f"标准答案:{item.target}")
    parts += [f"模型回答:{answer}", "请针对模型回答给出得分，并说明理由。"]
    return "\n".join(parts)


class Judge:
    """Scores answers. prompts: by class; general: for classes without one, None leaves them out."""

    def __init__(
        self,
        client: Client,
        prompts: Mapping[str, str] | None = None,
        *,
        general: str | None = None,
        seed: int = 42,
    ) -> None:
        self.prompts = prompts or default_prompts()
        self.general = general
        self.seed = seed
        self.interview = Interview(client, parse_score, ASK_AGAIN)
        self.empty = self.without_prompt = 0
        self.repeats: list[tuple[float, float]] = []

    def score_side(
        self, items: Sequence[Item], side: Side, log: Log, *, step: Callable[[int], None] = lambda done: None
    ) -> None:
        """Fill side.values["judge"], a value an item; None where the judge gave none. Then ask a sample again.

        Every answer of the judge is in the log before the next is asked for. Raises EndpointError when the endpoint
        fails for good; what was judged by then stays in `side`.
        """
        values: list[float | None] = [None] * len(items)
        side.values["judge"] = values
        asked: list[int] = []
        for place, (item, answer) in enumerate(zip(items, side.answers, strict=True)):
            if self._prompt(item) is None:
                self.without_prompt += 1
            elif not answer.text.strip():
                values[place] = 0.0  # nothing to judge
                self.empty += 1
            else:
                asked.append(place)
        step(len(items) - len(asked))
        for place, score in self._scores(items, side.answers, asked, log, 0):
            values[place] = score
            step(1)
        for place, score in self._scores(items, side.answers, self._sample(asked), log, 1):
            first = values[place]
            if first is not None and score is not None:
                self.repeats.append((first, score))

    def _prompt(self, item: Item) -> str | None:
        return self.prompts.get(normal_class(item.group), self.general)

    def _sample(self, places: Sequence[int]) -> list[int]:
        """Places asked about a second time: a twentieth, 20 to 100 of them."""
        low, high = REPEATED_RANGE
        count = min(len(places), max(low, min(high, round(len(places) * REPEATED_SHARE))))
        return sorted(random.Random(self.seed).sample(list(places), count))

    def _scores(
        self, items: Sequence[Item], answers: Sequence[Answer], places: Iterable[int], log: Log, repeat: int
    ) -> Iterator[tuple[int, float | None]]:
        """(place, score) as they come."""
        questions = []
        for place in places:
            text = judge_message(items[place], answers[place].text, self._prompt(items[place]) or "")
            questions.append(Question(place, items[place].place, [{"role": "user", "content": text}], repeat))
        return self.interview.answers(questions, log)

    def agreement(self) -> dict[str, float] | None:
        """How far two scores of the same answer lie apart; None where none were asked for twice."""
        if not self.repeats:
            return None
        apart = [abs(first - second) for first, second in self.repeats]
        return {
            "pairs": len(apart),
            "within_0.1": sum(gap <= CLOSE + 1e-9 for gap in apart) / len(apart),
            "mean_difference": sum(apart) / len(apart),
        }

    def facts(self) -> dict[str, Any]:
        """For scores.json."""
        return {
            **self.interview.facts(),
            "empty_answers": self.empty,
            "without_prompt": self.without_prompt,
            "agreement": self.agreement(),
            "prompts_sha256": sha256_text(json.dumps(dict(self.prompts), ensure_ascii=False, sort_keys=True)),
        }

    def notes(self) -> list[Note]:
        """What a reader of the scores must know."""
        said = self.interview.notes(Note("score from 0 to 1", "0 到 1 的得分"))
        if self.empty:
            said.append(
                Note(
                    f"{self.empty} empty answers count 0, unasked",
                    f"{self.empty} 个空回答直接记 0 分，不问裁判",
                )
            )
        agreed = self.agreement()
        if agreed is not None:
            share = f"{100 * agreed['within_0.1']:.0f} %"
            said.append(
                Note(
                    f"asked twice about {agreed['pairs']:.0f} answers the judge agrees with itself within 0.1 on {share}",
                    f"对 {agreed['pairs']:.0f} 个回答重复评分，{share} 相差不超过 0.1",
                )
            )
        return said
