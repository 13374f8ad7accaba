"""One shard of rows to tokens: checked, templated, masked; what is left of it in files of its own.

    tokens-00007.bin      ids, part of the finished store
    rows-00007.npz        a number or two for each example
    rejected-00007.jsonl  bad rows
    shard-00007.json      counts; written last, and the proof that the rest is whole

Lines and rows are counted from the beginning of each piece: where a piece begins in its file is known only when the
shards before it have been read.
"""

from __future__ import annotations

import io
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tuoling.data.json_stream import read_json_lines
from tuoling.data.overlong import Encoded, Fitter, learnable, split_text
from tuoling.data.read import RowReader, is_trained
from tuoling.data.row import UNKNOWN, Problem, Row
from tuoling.data.shards import Piece, Shard
from tuoling.data.sources import Source
from tuoling.data.store_report import StoreReport, StoreSettings
from tuoling.data.token_store import ShardWriter, token_file
from tuoling.errors import DataError, TemplateError
from tuoling.files import atomic_write, cannot_write, read_json, sha256_file, write_json
from tuoling.language import tr
from tuoling.text.conversation import Conversation
from tuoling.text.render import Segment
from tuoling.text.templates import Template
from tuoling.text.tokenizer import TextTokenizer

BATCH_ROWS = 512


@dataclass(frozen=True)
class Job:
    """What decides the bytes of every shard."""

    sources: tuple[Source, ...]
    tokenizer: TextTokenizer
    template: Template
    settings: StoreSettings


@dataclass(frozen=True)
class Compiled:
    """A finished shard. pieces: (source, lines, rows) of each piece. untrained: (format, source, line) of the first
    row of a format that is not trained: there the shard ends."""

    number: int
    report: StoreReport
    pieces: tuple[tuple[int, int, int], ...]
    tokens_sha256: str
    untrained: tuple[str, int, int] | None = None


@dataclass(slots=True)
class _Waiting:
    """A rendered row whose ids are being made."""

    file: int
    row: Row
    conversation: Conversation


class _Untrained(Exception):
    """A row of a format that is not trained unless it is asked for."""


def finished(folder: Path, shard: Shard) -> Compiled | None:
    """The shard as an interrupted build left it in `folder`; None if it did not get so far, or not whole."""
    return shard_in(folder, shard.number, shard.identity())


def shard_in(folder: Path, number: int, identity: list[list[Any]] | None = None) -> Compiled | None:
    """The shard of that number if it lies whole in `folder`, and is of those rows where `identity` says them."""
    proof = folder / f"shard-{number:05d}.json"
    if not proof.is_file():
        return None
    try:
        said = read_json(proof)
        whole = identity in (None, said["identity"]) and all(
            (folder / name).stat().st_size == size for name, size in said["sizes"].items()
        )
        if not whole or sha256_file(folder / token_file(number)) != said["tokens_sha256"]:
            return None
    except (DataError, OSError, KeyError, TypeError):
        return None
    return Compiled(
        number,
        StoreReport(**said["report"]),
        tuple((file, lines, rows) for file, lines, rows in said["pieces"]),
        said["tokens_sha256"],
    )


class ShardCompiler:
    """Compiles shards into `folder`, one after another. beside: tokenises a batch while the next one is read."""

    def __init__(self, job: Job, folder: Path, beside: Executor | None = None) -> None:
        self._sources, self._tokenizer, self._template = job.sources, job.tokenizer, job.template
        self._settings = job.settings
        self._folder = folder
        self._beside = beside
        self._readers: dict[int, RowReader] = {}
        self._fitter = Fitter(
            limit=job.settings.max_seq_len,
            render=self._render,
            encode=job.tokenizer.encode_segments,
            learn_last=job.settings.learn == "last",
            learn_cut_answers=job.settings.learn_cut_answers,
        )

    def compile(self, shard: Shard, progress: Callable[[int], None] | None = None) -> Compiled:
        """Write the shard's files. progress: called with the rows of each batch. Raises ModelError, OutputError."""
        try:
            return self._compile(shard, progress)
        except OSError as error:
            raise cannot_write(self._folder, error) from error

    def _compile(self, shard: Shard, progress: Callable[[int], None] | None) -> Compiled:
        self.report = StoreReport()
        self._pieces: list[tuple[int, int, int]] = []
        self._row_lengths = array("i")
        self._fitter.left_out = 0
        rejected = self._folder / f"rejected-{shard.name}.jsonl"
        untrained = None
        with ExitStack() as stack:
            writer = stack.enter_context(ShardWriter(self._folder, shard.number))
            self._rejected: IO[str] = stack.enter_context(atomic_write(rejected))
            try:
                self._run(shard, writer, progress)
            except _Untrained as found:
                untrained = found.args[0]
            digest = writer.finish(self._row_lengths)
        report = self.report
        report.good = report.rows - report.bad
        report.examples, report.tokens = len(writer), writer.tokens
        report.learned_tokens, report.max_len = writer.learned, writer.max_len
        compiled = Compiled(shard.number, report, tuple(self._pieces), digest, untrained)
        if untrained is None:
            names = (token_file(shard.number), f"rows-{shard.name}.npz", rejected.name)
            write_json(
                self._folder / f"shard-{shard.name}.json",
                {
                    "identity": shard.identity(),
                    "sizes": {name: (self._folder / name).stat().st_size for name in names},
                    "report": report.facts(),
                    "pieces": self._pieces,
                    "tokens_sha256": digest,
                },
            )
        return compiled

    def _run(self, shard: Shard, writer: ShardWriter, progress: Callable[[int], None] | None) -> None:
        waiting: tuple[list[_Waiting], Callable[[], list[Encoded]]] | None = None
        before = 0
        for batch, segments in self._batches(shard):
            coming = self._encode(segments)
            if waiting is not None:
                self._take(*waiting, writer)
            waiting = (batch, coming)
            if progress is not None:
                progress(self.report.rows - before)
                before = self.report.rows
        if waiting is not None:
            self._take(*waiting, writer)
        if progress is not None and self.report.rows > before:
            progress(self.report.rows - before)

    def _encode(self, segments: list[list[Segment]]) -> Callable[[], list[Encoded]]:
        if self._beside is None:
            encoded = self._tokenizer.encode_batch(segments)
            return lambda: encoded
        coming: Future[list[Encoded]] = self._beside.submit(self._tokenizer.encode_batch, segments)
        return coming.result

    def _batches(self, shard: Shard) -> Iterator[tuple[list[_Waiting], list[list[Segment]]]]:
        """Good rows, rendered, some hundred at a time. Counts all rows; bad ones are written down."""
        batch: list[_Waiting] = []
        segments: list[list[Segment]] = []
        for file, row in self._rows(shard):
            self._count(file, row)
            conversation = row.conversation
            problems = row.problems or self._stage_problem(conversation)
            if problems or conversation is None:
                self._reject(file, row, problems)
                continue
            try:
                segments.append(self._render(conversation))
            except TemplateError as error:
                self._reject(file, row, (Problem("", "template", error.problem),))
                continue
            batch.append(_Waiting(file, row, conversation))
            if len(batch) == BATCH_ROWS:
                yield batch, segments
                batch, segments = [], []
        if batch:
            yield batch, segments

    def _rows(self, shard: Shard) -> Iterator[tuple[int, Row]]:
        for piece in shard.pieces:
            reader, number = self._reader(piece.file), 0
            data = _bytes_of(self._sources[piece.file], piece)
            codec = "utf-8" if piece.begin and piece.encoding == "utf-8-sig" else piece.encoding
            with io.TextIOWrapper(io.BytesIO(data), encoding=codec, errors="replace") as text:
                for number, raw in enumerate(read_json_lines(text), 1):
                    yield piece.file, reader.row(number, raw)
            lines = data.count(b"\n") + data.count(b"\r") - data.count(b"\r\n")
            self._pieces.append((piece.file, lines, number))
        for file, number, raw in shard.records:
            yield file, self._reader(file).row(number, raw)

    def _reader(self, file: int) -> RowReader:
        if file not in self._readers:
            self._readers[file] = RowReader(self._sources[file])
        return self._readers[file]

    def _render(self, conversation: Conversation) -> list[Segment]:
        settings = self._settings
        return self._template.render(
            conversation, learn=settings.learn, train_on_inputs=settings.train_on_inputs
        )

    def _count(self, file: int, row: Row) -> None:
        report = self.report
        report.rows += 1
        report.flagged += bool(row.flags)
        report.formats[row.format] = report.formats.get(row.format, 0) + 1
        if row.format != UNKNOWN and not is_trained(row.format, self._sources[file]):
            raise _Untrained((row.format, file, row.place.line))

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

    def _reject(self, file: int, row: Row, problems: Sequence[Problem]) -> None:
        self.report.bad += 1
        for problem in problems or (
            Problem("", "no_conversation", tr("nothing to learn", "没有可学的内容")),
        ):
            entry = {
                "file": file,
                "line": row.place.line,
                "row": row.place.row,
                "format": row.format,
                "field": problem.field,
                "code": problem.code,
                "message": problem.message,
            }
            self._rejected.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def _take(self, batch: list[_Waiting], coming: Callable[[], list[Encoded]], writer: ShardWriter) -> None:
        """Write the examples of one tokenised batch."""
        limit = self._settings.max_seq_len
        for item, (ids, spans) in zip(batch, coming(), strict=True):
            if len(ids) > limit:
                self._row_lengths.append(len(ids))
                for fitted in self._fit(item.conversation, ids):
                    writer.add(*fitted, item.file, item.row.place.line)
                continue
            if not spans or spans[0][0] == 0:
                spans = learnable(spans)
            if not spans:
                nothing = Problem("", "nothing_to_learn", tr("nothing to learn", "没有可学的内容"))
                self._reject(item.file, item.row, (nothing,))
                continue
            self._row_lengths.append(len(ids))
            writer.add(ids, spans, item.file, item.row.place.line)

    def _fit(self, conversation: Conversation, ids: list[int]) -> list[Encoded]:
        """What the policy makes of a row that is too long; counts it."""
        report, policy = self.report, self._settings.policy
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


def _bytes_of(source: Source, piece: Piece) -> bytes:
    with Path(source.path).open("rb") as file:
        file.seek(piece.begin)
        return file.read(piece.end - piece.begin)
