"""A file of test rows → predictions.json: batched by length or spread over servers, resumable, in the order of the rows."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from tuoling.data.formats import Detector, get_format
from tuoling.data.row import Row, RowError
from tuoling.errors import DataError, TemplateError, TuolingError, UsageError
from tuoling.files import append_jsonl, cut_torn_line, read_jsonl, require_writable, sha256_text, write_json
from tuoling.infer.engine import Engine, GenerationSettings, PromptTooLong, Reply
from tuoling.infer.fleet import Fleet, spread
from tuoling.language import tr
from tuoling.text.conversation import Conversation, Turn

BATCH_ROWS = 16
"""Rows at once, where nobody says how many."""


@dataclass(frozen=True, slots=True)
class Question:
    """What a row asks, and the answer it would like ("" where it has none)."""

    place: str
    conversation: Conversation
    target: str


@dataclass(slots=True)
class PredictReport:
    """rows: asked and unaskable. predicted: answers found now. reused: kept from a run that was cut off.

    too_long, unusable, failed: `place: why` of rows without a prediction; failed ones are those that servers refused.
    """

    rows: int = 0
    predicted: int = 0
    reused: int = 0
    too_long: list[str] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens a second, without loading."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            **asdict(self),
            "seconds": round(self.seconds, 3),
            "tokens_per_s": round(self.tokens_per_s, 1),
        }


def questions_of(rows: Iterable[Row]) -> tuple[list[Question], list[str]]:
    """Questions in order, and `place: why` of every row that asks nothing."""
    asked: list[Question] = []
    unusable: list[str] = []
    for row in rows:
        conversation = row.conversation
        if any(flag.code == "unanswered_end" for flag in row.flags):  # left out for training, asked here
            with suppress(RowError):
                conversation = get_format(row.format).parse(row.record)
        if conversation is None or not _asks(conversation):
            why = row.problems[0].message if row.problems else tr("no question", "没有问题")
            unusable.append(f"{row.place}: {why}")
            continue
        asked.append(Question(str(row.place), conversation.question, conversation.answer or ""))
    return asked, unusable


def question_of_record(record: Any) -> Question:
    """A question from Python: a text, a Conversation, or a row in any row format. Raises DataError."""
    if isinstance(record, str):
        return Question("", Conversation((Turn("user", record),)), "")
    if isinstance(record, Conversation):
        return Question("", record.question, record.answer or "")
    found = Detector()(record) if isinstance(record, dict) else None
    if found is None:
        raise DataError(tr(f"no known row format: {record!r:.80}", f"不认识的数据格式：{record!r:.80}"))
    try:
        conversation = found.parse(record)
    except RowError as error:
        raise DataError(error.problem.message, where=error.problem.field) from error
    return Question("", conversation.question, conversation.answer or "")


def _asks(conversation: Conversation) -> bool:
    turns = conversation.question.turns
    return bool(turns) and turns[-1].role in ("user", "text") and bool(turns[-1].full_text.strip())


class Partial:
    """Answers that are already there, beside the file they are for; appended one by one, kept over a kill."""

    def __init__(self, out: Path) -> None:
        self.path = out.with_name(f".{out.name}.partial.jsonl")
        self.answers: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            cut_torn_line(self.path)
            self.answers = {row["key"]: row for _, row in read_jsonl(self.path)}
        require_writable(out.parent)
        self._file = self.path.open("a", encoding="utf-8")

    def add(self, key: str, texts: Sequence[str], tokens: int) -> None:
        """Keep what came of one call: one answer, or several beams."""
        row = {"key": key, "texts": list(texts), "tokens": tokens}
        self.answers[key] = row
        append_jsonl(self._file, row)

    def done(self) -> None:
        """The whole file is written: the answers are not needed any more."""
        self._file.close()
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Keep what is there for the next try."""
        self._file.close()


@dataclass(frozen=True, slots=True)
class _Task:
    """One call for an answer: of which row, the how manyth of its answers, with which settings.

    key: the same only where the answer may be taken from a run that was cut off.
    """

    row: int
    number: int
    settings: GenerationSettings
    key: str


def settings_of_answers(settings: GenerationSettings, n: int) -> list[GenerationSettings]:
    """How a row is asked for n answers, call by call: n draws with seeds of their own, or n beams in one call.

    Raises UsageError where the n answers would all be the same, or where there are fewer beams.
    """
    if settings.samples:
        seeds = [None if settings.seed is None else (settings.seed + i) % (1 << 63) for i in range(n)]
        return [replace(settings, seed=seed) for seed in seeds]
    if n == 1 or n <= settings.num_beams:
        return [settings]
    if settings.num_beams > 1:
        problem = tr(
            f"{settings.num_beams} beams give fewer than {n} answers",
            f"{settings.num_beams} 束给不出 {n} 个回答",
        )
    else:
        problem = tr(f"without sampling all {n} answers are the same", f"不采样时 {n} 个回答都相同")
    raise UsageError(problem, where=f"n={n}", remedy=f"--temperature 0.8 | --num-beams {n}")


def predict(
    engine: Engine,
    questions: Sequence[Question],
    settings: GenerationSettings,
    *,
    batch_size: int = BATCH_ROWS,
    n: int = 1,
    partial: Partial | None = None,
    report: PredictReport | None = None,
    step: Callable[[int, PredictReport], None] = lambda done, report: None,
) -> list[dict[str, Any]]:
    """input, predict and target of every question, in order; with n > 1 all n `answers` too, the first is `predict`.

    Batches hold prompts of like length; servers get a row each as they come free. A question whose prompt is too
    long, or that the servers refuse, gets the prediction "" and is named in the report.
    """
    engine = spread(engine)
    report = report if report is not None else PredictReport()
    report.rows += len(questions)
    rows = [_blank(engine, question) for question in questions]
    calls = settings_of_answers(settings, n)
    kept = partial.answers if partial is not None else {}
    found: list[list[list[str]]] = [[[] for _ in calls] for _ in rows]
    waiting = []
    for number, one in enumerate(calls):
        for index, row in enumerate(rows):
            task = _Task(index, number, one, _key(engine, row["input"], one, number))
            if task.key in kept:
                found[index][number] = kept[task.key]["texts"]
                report.reused += 1
            else:
                waiting.append(task)
    step(report.reused, report)
    started = time.perf_counter()
    for task, reply in _replies(engine, questions, waiting, batch_size):
        if isinstance(reply, TuolingError):
            _no_prediction(report, task, questions[task.row], reply)
        else:
            texts = list(reply.beams[:n] if n > 1 and not task.settings.samples else (reply.text,))
            found[task.row][task.number] = texts
            report.tokens += reply.completion_tokens
            report.predicted += 1
            if partial is not None:
                partial.add(task.key, texts, reply.completion_tokens)
        report.seconds = time.perf_counter() - started
        step(1, report)
    return [
        _filled(row, [text for texts in of_row for text in texts], n)
        for row, of_row in zip(rows, found, strict=True)
    ]


def _filled(row: dict[str, str], answers: list[str], n: int) -> dict[str, Any]:
    filled: dict[str, Any] = {**row, "predict": answers[0] if answers else ""}
    return filled if n == 1 else {**filled, "answers": answers}


def _blank(engine: Engine, question: Question) -> dict[str, str]:
    try:
        text = engine.prompt_text(question.conversation)
    except TemplateError as error:
        raise DataError(error.problem, where=question.place) from error
    return {"input": text, "predict": "", "target": question.target}


def _key(engine: Engine, prompt: str, settings: GenerationSettings, number: int) -> str:
    number_without_seed = [number] if number and settings.seed is None else []
    facts = [prompt, asdict(settings), engine.fingerprint, *number_without_seed]
    return sha256_text(json.dumps(facts, ensure_ascii=False))


def _replies(
    engine: Engine, questions: Sequence[Question], tasks: Sequence[_Task], batch_size: int
) -> Iterator[tuple[_Task, Reply | TuolingError]]:
    """The reply to each task, or why it has none, as they come."""
    if isinstance(engine, Fleet):
        asked = [(questions[task.row].conversation, task.settings) for task in tasks]
        for place, reply in engine.answers(asked):
            yield tasks[place], reply
        return
    tokens = {row: engine.count_tokens(questions[row].conversation) for row in {task.row for task in tasks}}
    # the longest first: what does not fit in the context, or in the memory, is known at once
    ordered = sorted(tasks, key=lambda task: (task.number, -tokens[task.row], task.row))
    for _, of_number in groupby(ordered, key=lambda task: task.number):
        alike = list(of_number)
        for begin in range(0, len(alike), batch_size):
            yield from _of_batch(engine, questions, alike[begin : begin + batch_size])


def _of_batch(
    engine: Engine, questions: Sequence[Question], batch: Sequence[_Task]
) -> Iterator[tuple[_Task, Reply | TuolingError]]:
    """Answer a batch, without the prompts in front that are too long."""
    try:
        conversations = [questions[task.row].conversation for task in batch]
        yield from zip(batch, engine.generate(conversations, batch[0].settings), strict=True)
    except PromptTooLong as error:
        if len(batch) == 1:
            yield batch[0], error
            return
        yield from _of_batch(engine, questions, batch[:1])
        yield from _of_batch(engine, questions, batch[1:])


def _no_prediction(report: PredictReport, task: _Task, question: Question, error: TuolingError) -> None:
    named = report.too_long if isinstance(error, PromptTooLong) else report.failed
    said = f"{question.place}: {error.problem}"
    if task.number == 0 or said not in named:
        named.append(said)


def predict_file(
    engine: Engine,
    rows: Iterable[Row],
    out: Path,
    settings: GenerationSettings,
    *,
    batch_size: int = BATCH_ROWS,
    n: int = 1,
    step: Callable[[int, PredictReport], None] = lambda done, report: None,
    start: Callable[[int], None] = lambda total: None,
) -> PredictReport:
    """Predict all rows into `out` (a JSON array of input/predict/target) and report.

    After a kill the same call goes on where it was; where servers refused rows, it asks those again. Raises DataError
    where no row asks anything, UsageError where n answers would be the same.
    """
    report = PredictReport()
    questions, report.unusable = questions_of(rows)
    report.rows = len(report.unusable)
    if not questions:
        raise DataError(
            tr("no row asks anything", "没有可以提问的数据"),
            where=report.unusable[0] if report.unusable else None,
        )
    start(len(questions) * len(settings_of_answers(settings, n)))
    partial = Partial(out)
    try:
        predictions = predict(
            engine, questions, settings, batch_size=batch_size, n=n, partial=partial, report=report, step=step
        )
    except BaseException:
        partial.close()
        raise
    write_json(out, predictions, indent=4)
    partial.close() if report.failed else partial.done()
    return report
