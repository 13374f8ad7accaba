"""A file of test rows → predictions.json: batched by length, resumable, written in the order of the rows."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tuoling.data.formats import Detector, get_format
from tuoling.data.row import Row, RowError
from tuoling.errors import DataError, TemplateError
from tuoling.files import append_jsonl, cut_torn_line, read_jsonl, require_writable, sha256_text, write_json
from tuoling.infer.engine import Engine, GenerationSettings, PromptTooLong
from tuoling.language import tr
from tuoling.text.conversation import Conversation, Turn


@dataclass(frozen=True, slots=True)
class Question:
    """What a row asks, and the answer it would like ("" where it has none)."""

    place: str
    conversation: Conversation
    target: str


@dataclass(slots=True)
class PredictReport:
    """rows: asked and unaskable. predicted: now. reused: kept from a run that was cut off."""

    rows: int = 0
    predicted: int = 0
    reused: int = 0
    too_long: list[str] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)
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

    def add(self, key: str, predict: str, tokens: int) -> None:
        """Keep one answer."""
        row = {"key": key, "predict": predict, "tokens": tokens}
        self.answers[key] = row
        append_jsonl(self._file, row)

    def done(self) -> None:
        """The whole file is written: the answers are not needed any more."""
        self._file.close()
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Keep what is there for the next try."""
        self._file.close()


def predict(
    engine: Engine,
    questions: Sequence[Question],
    settings: GenerationSettings,
    *,
    batch_size: int = 8,
    partial: Partial | None = None,
    report: PredictReport | None = None,
    step: Callable[[int, PredictReport], None] = lambda done, report: None,
) -> list[dict[str, str]]:
    """input, predict and target of every question, in order. Batches hold prompts of like length.

    A question whose prompt is too long gets the prediction "" and is named in the report.
    """
    report = report if report is not None else PredictReport()
    report.rows += len(questions)
    rows = [_blank(engine, question) for question in questions]
    answers = partial.answers if partial is not None else {}
    keys = [_key(engine, row["input"], settings) for row in rows]
    waiting = []
    for index, key in enumerate(keys):
        if key in answers:
            rows[index]["predict"] = answers[key]["predict"]
            report.reused += 1
        else:
            waiting.append((engine.count_tokens(questions[index].conversation), index))
    step(report.reused, report)
    waiting.sort(reverse=True)  # the longest first: what does not fit is known at once
    started = time.perf_counter()
    for begin in range(0, len(waiting), batch_size):
        batch = [index for _, index in waiting[begin : begin + batch_size]]
        for index, reply in _answer(engine, questions, batch, settings, report):
            rows[index]["predict"] = reply.text
            report.tokens += reply.completion_tokens
            report.predicted += 1
            if partial is not None:
                partial.add(keys[index], reply.text, reply.completion_tokens)
        report.seconds = time.perf_counter() - started
        step(len(batch), report)
    return rows


def _blank(engine: Engine, question: Question) -> dict[str, str]:
    try:
        text = engine.prompt_text(question.conversation)
    except TemplateError as error:
        raise DataError(error.problem, where=question.place) from error
    return {"input": text, "predict": "", "target": question.target}


def _key(engine: Engine, prompt: str, settings: GenerationSettings) -> str:
    return sha256_text(json.dumps([prompt, asdict(settings), engine.fingerprint], ensure_ascii=False))


def _answer(
    engine: Engine,
    questions: Sequence[Question],
    batch: list[int],
    settings: GenerationSettings,
    report: PredictReport,
) -> list[tuple[int, Any]]:
    """Answer a batch; where one prompt is too long, answer the others and report it."""
    try:
        replies = engine.generate([questions[index].conversation for index in batch], settings)
        return list(zip(batch, replies, strict=True))
    except PromptTooLong as error:
        if len(batch) > 1:
            return [pair for index in batch for pair in _answer(engine, questions, [index], settings, report)]
        report.too_long.append(f"{questions[batch[0]].place}: {error.problem}")
        return []


def predict_file(
    engine: Engine,
    rows: Iterable[Row],
    out: Path,
    settings: GenerationSettings,
    *,
    batch_size: int = 8,
    step: Callable[[int, PredictReport], None] = lambda done, report: None,
    start: Callable[[int], None] = lambda total: None,
) -> PredictReport:
    """Predict all rows into `out` (a JSON array of input/predict/target) and report.

    After a kill the same call goes on where it was. Raises DataError where no row asks anything.
    """
    report = PredictReport()
    questions, report.unusable = questions_of(rows)
    report.rows = len(report.unusable)
    if not questions:
        raise DataError(
            tr("no row asks anything", "没有可以提问的数据"),
            where=report.unusable[0] if report.unusable else None,
        )
    start(len(questions))
    partial = Partial(out)
    try:
        predictions = predict(
            engine, questions, settings, batch_size=batch_size, partial=partial, report=report, step=step
        )
    except BaseException:
        partial.close()
        raise
    write_json(out, predictions, indent=4)
    partial.done()
    return report
