"""Rows in, token store out: checked, templated, masked, hashed, and made only once.

A store's key is a hash of everything that decides its bytes: the files, how they are read, the template's bytes,
the tokenizer, the settings and the code of this compiler. Rows stream through: memory does not grow with their
text, only by some forty bytes a row.
"""

from __future__ import annotations

import json
import shutil
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tuoling.data.overlong import Encoded, Fitter, learnable, overlong_error, split_text
from tuoling.data.read import is_trained, read_rows
from tuoling.data.row import UNKNOWN, Problem, Row
from tuoling.data.sources import Source
from tuoling.data.store_key import key_parts, what_changed
from tuoling.data.token_store import Example, StoreWriter, TokenStore, open_store
from tuoling.errors import DataError, OutputError, TemplateError
from tuoling.files import atomic_folder, atomic_write, sha256_text
from tuoling.language import tr
from tuoling.text.conversation import Conversation
from tuoling.text.render import Segment
from tuoling.text.templates import Template
from tuoling.text.tokenizer import TextTokenizer

__all__ = ["Example", "StoreReport", "StoreSettings", "TokenStore", "compile_store"]

BATCH_ROWS = 512
_SHOWN = 5


@dataclass(frozen=True)
class StoreSettings:
    """What decides how rows become examples. allow_bad: the share of bad rows that is let pass, 0 to 1.

    max_samples: the first so many rows of each source. Plain text (`stage: pt`) that is too long is split,
    unless `overlong` says drop.
    """

    stage: Literal["sft", "pt"] = "sft"
    max_seq_len: int = 1024
    overlong: Literal["error", "drop", "cut_prompt", "split"] = "error"
    learn: Literal["all", "last"] = "all"
    train_on_inputs: bool = False
    learn_cut_answers: bool = False
    allow_bad: float = 0.0
    max_samples: int | None = None


@dataclass
class StoreReport:
    """What became of the rows: rows = good + bad; dropped_overlong, cut and split count among the good."""

    rows: int = 0
    good: int = 0
    bad: int = 0
    dropped_overlong: int = 0
    cut: int = 0
    split: int = 0
    left_out: int = 0
    """Questions with answers of split dialogues that were too long even alone."""
    examples: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    max_len: int = 0
    flagged: int = 0
    formats: dict[str, int] = field(default_factory=dict)
    reused: bool = False
    changed: tuple[str, ...] = ()
    """Why an earlier store was not reused: which parts of its key differ."""
    ledger: Path | None = None
    seconds: float = 0.0

    def facts(self) -> dict[str, Any]:
        """The part that is the same for two builds of the same rows."""
        return {
            key: value
            for key, value in asdict(self).items()
            if key not in ("reused", "changed", "ledger", "seconds")
        }


def compile_store(
    sources: Sequence[Source],
    *,
    tokenizer: TextTokenizer,
    template: Template,
    settings: StoreSettings,
    cache_dir: Path,
    progress: Callable[[int], None] | None = None,
) -> tuple[TokenStore, StoreReport]:
    """The token store of these rows: the one made earlier if nothing changed, else a new one.

    progress: called with the number of rows read so far. Raises DataError: bad rows beyond `allow_bad` (all of them
    stand in the ledger), over-long rows under `overlong: error`, nothing left to learn, rows of a format that is
    not trained.
    """
    started = time.monotonic()
    if not sources:
        raise DataError(tr("no data was named", "没有给出数据"))
    parts = key_parts(sources, tokenizer=tokenizer, template=template, settings=settings)
    key = sha256_text(json.dumps(parts, sort_keys=True))
    folder = cache_dir / key[:32]
    ledger = cache_dir / f"{key[:32]}.rejected.jsonl"
    paths = [source.path for source in sources]
    same_bytes = all(source.hub is None for source in sources)  # a hub dataset may change under its name
    store = open_store(folder, key=key, paths=paths) if same_bytes else None
    if store is not None:
        report = StoreReport(**store.meta["report"])
        report.reused = True
        report.ledger = ledger if report.bad and ledger.exists() else None
    else:
        changed = what_changed(cache_dir, parts)
        if folder.exists():
            shutil.rmtree(folder)
        compiler = _Compiler(sources, tokenizer, template, settings, ledger)
        try:
            with atomic_folder(folder) as building:
                compiler.run(building, {"key": key, "parts": parts, "paths": paths}, progress)
        except OutputError:
            if open_store(folder, key=key, paths=paths) is None:  # else another process was faster
                raise
        report = compiler.report
        report.changed = changed
        store = TokenStore(folder, paths)
    report.seconds = time.monotonic() - started
    return store, report


@dataclass(slots=True)
class _Waiting:
    """A rendered row whose ids are being made."""

    file: int
    row: Row
    conversation: Conversation


class _Compiler:
    """One pass over the rows. Batches are tokenised in one thread while the next ones are read and rendered."""

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: TextTokenizer,
        template: Template,
        settings: StoreSettings,
        ledger: Path,
    ) -> None:
        self._sources = sources
        self._tokenizer = tokenizer
        self._template = template
        self._settings = settings
        self._ledger = ledger
        self.report = StoreReport()
        self._lengths = array("i")
        self._first_bad: list[str] = []
        self._policy = settings.overlong
        if settings.stage == "pt" and settings.overlong != "drop":
            self._policy = "split"
        self._fitter = Fitter(
            limit=settings.max_seq_len,
            render=self._render,
            encode=tokenizer.encode_segments,
            learn_last=settings.learn == "last",
            learn_cut_answers=settings.learn_cut_answers,
        )

    def run(self, folder: Path, meta: dict[str, Any], progress: Callable[[int], None] | None) -> None:
        """Compile everything into `folder`. Raises DataError; the ledger of bad rows is written either way."""
        writer = StoreWriter(folder)
        report = self.report
        with ExitStack() as stack:
            stack.callback(writer.close)
            pool = stack.enter_context(ThreadPoolExecutor(max_workers=1))
            waiting: tuple[list[_Waiting], Future[list[Encoded]]] | None = None
            with atomic_write(self._ledger) as self._rejected:
                for batch, segments in self._batches():
                    coming = pool.submit(self._tokenizer.encode_batch, segments)
                    if waiting is not None:
                        self._take(*waiting, writer)
                    waiting = (batch, coming)
                    if progress is not None:
                        progress(report.rows)
                if waiting is not None:
                    self._take(*waiting, writer)
            if report.bad:
                report.ledger = self._ledger
            else:
                self._ledger.unlink(missing_ok=True)
            report.good = report.rows - report.bad
            report.examples, report.tokens = len(writer), writer.tokens
            report.learned_tokens, report.max_len = writer.learned, writer.max_len
            self._judge()
            writer.finish({**meta, "examples": len(writer), "report": report.facts()})

    def _batches(self) -> Iterator[tuple[list[_Waiting], list[list[Segment]]]]:
        """Good rows, rendered, some hundred at a time. Counts all rows; bad ones go to the ledger."""
        batch: list[_Waiting] = []
        segments: list[list[Segment]] = []
        for file, source in enumerate(self._sources):
            for row in islice(read_rows(source), self._settings.max_samples):
                self._count(row, source)
                conversation = row.conversation
                problems = row.problems or self._stage_problem(conversation)
                if problems or conversation is None:
                    self._reject(row, problems)
                    continue
                try:
                    segments.append(self._render(conversation))
                except TemplateError as error:
                    self._reject(row, (Problem("", "template", error.problem),))
                    continue
                batch.append(_Waiting(file, row, conversation))
                if len(batch) == BATCH_ROWS:
                    yield batch, segments
                    batch, segments = [], []
        if batch:
            yield batch, segments

    def _render(self, conversation: Conversation) -> list[Segment]:
        settings = self._settings
        return self._template.render(
            conversation, learn=settings.learn, train_on_inputs=settings.train_on_inputs
        )

    def _count(self, row: Row, source: Source) -> None:
        report = self.report
        report.rows += 1
        report.flagged += bool(row.flags)
        report.formats[row.format] = report.formats.get(row.format, 0) + 1
        if row.format != UNKNOWN and not is_trained(row.format, source):
            raise DataError(
                tr(f"rows of format `{row.format}` are not trained", f"`{row.format}` 格式的数据不用于训练"),
                where=str(row.place),
                remedy=tr(
                    f"take the file out of the data, or, if you mean it, say data_format={row.format}",
                    f"请把该文件移出训练数据；如果确实要用，请写 data_format={row.format}",
                ),
            )

    def _stage_problem(self, conversation: Conversation | None) -> tuple[Problem, ...]:
        if conversation is None or conversation.is_plain_text == (self._settings.stage == "pt"):
            return ()
        if self._settings.stage == "pt":
            message = tr(
                "a question with an answer; stage pt learns plain text", "这是问答；pt 阶段学习纯文本"
            )
        else:
            message = tr("plain text; only stage=pt learns it", "这是纯文本；只有 stage=pt 才学习纯文本")
        return (Problem("", "wrong_stage", message),)

    def _reject(self, row: Row, problems: Sequence[Problem]) -> None:
        self.report.bad += 1
        for problem in problems or (
            Problem("", "no_conversation", tr("nothing to learn", "没有可学的内容")),
        ):
            entry = {
                "path": row.place.path,
                "line": row.place.line,
                "row": row.place.row,
                "format": row.format,
                "field": problem.field,
                "code": problem.code,
                "message": problem.message,
            }
            self._rejected.write(json.dumps(entry, ensure_ascii=False) + "\n")
            if len(self._first_bad) < _SHOWN:
                where = f"{row.place}:{problem.field}" if problem.field else str(row.place)
                self._first_bad.append(f"{where}: {problem.message}")

    def _take(self, batch: list[_Waiting], coming: Future[list[Encoded]], writer: StoreWriter) -> None:
        """Write the examples of one tokenised batch."""
        limit = self._settings.max_seq_len
        for item, (ids, spans) in zip(batch, coming.result(), strict=True):
            self._lengths.append(len(ids))
            if len(ids) > limit:
                for fitted in self._fit(item.conversation, ids):
                    writer.add(*fitted, item.file, item.row.place.line)
                continue
            if not spans or spans[0][0] == 0:
                spans = learnable(spans)
            if not spans:
                self._lengths.pop()
                self._reject(
                    item.row, (Problem("", "nothing_to_learn", tr("nothing to learn", "没有可学的内容")),)
                )
                continue
            writer.add(ids, spans, item.file, item.row.place.line)

    def _fit(self, conversation: Conversation, ids: list[int]) -> list[Encoded]:
        """What the policy makes of a row that is too long; counts it."""
        report, policy = self.report, self._policy
        fitted: list[Encoded] = []
        if policy == "cut_prompt":
            cut = self._fitter.cut_prompt(conversation)
            fitted = [cut] if cut else []
            report.cut += bool(fitted)
        elif policy == "split":
            if conversation.is_plain_text:
                fitted = list(split_text(ids, self._settings.max_seq_len))
            else:
                fitted = self._fitter.split(conversation)
            report.split += bool(fitted)
        fitted = [encoded for encoded in fitted if encoded[1]]
        report.left_out = self._fitter.left_out
        report.dropped_overlong += not fitted
        return fitted

    def _judge(self) -> None:
        """Raise DataError if what was read must not be trained on."""
        report, settings = self.report, self._settings
        lengths = np.frombuffer(self._lengths, dtype=np.int32) if self._lengths else np.empty(0, np.int32)
        if not report.rows:
            raise DataError(
                tr("there are no rows", "没有任何样本"), where=", ".join(s.path for s in self._sources[:3])
            )
        if report.bad > settings.allow_bad * report.rows:
            listed = "\n".join(f"  {line}" for line in self._first_bad)
            problem = tr(
                f"{report.bad} of {report.rows} rows are bad:",
                f"{report.rows} 条样本中有 {report.bad} 条不合格：",
            )
            share = -(-1000 * report.bad // report.rows) / 10
            remedy = tr("all of them stand in that file; repair them", "全部列在上述文件中；请修正")
            if share < 100:
                remedy += tr(
                    f", or leave them out: allow_bad={share:g}%", f"，或用 allow_bad={share:g}% 略过它们"
                )
            raise DataError(f"{problem}\n{listed}", where=str(self._ledger), remedy=remedy)
        over = int((lengths > settings.max_seq_len).sum())
        if over and (self._policy == "error" or not report.examples):
            raise overlong_error(lengths, settings.max_seq_len)
        if not report.examples:
            problem = tr("no row is left to learn from", "没有剩下可学的样本")
            listed = "\n".join(f"  {line}" for line in self._first_bad)
            raise DataError(f"{problem}\n{listed}".rstrip(), where=str(self._sources[0].path))
