"""What generation begins with: seed tasks, seed questions, rows, documents. A malformed file is refused with its line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tuoling.data.encoding import detect_encoding, open_text
from tuoling.data.read import read_rows
from tuoling.data.row import Row
from tuoling.data.sources import resolve_sources
from tuoling.errors import DataError
from tuoling.language import tr
from tuoling.text.conversation import Conversation

_ID_FIELDS = ("id", "index", "name")


@dataclass(frozen=True, slots=True)
class Seed:
    """One row that something is made from. id: its own, else file:row. answer: "" where it has none."""

    id: str
    conversation: Conversation

    @property
    def instruction(self) -> str:
        """What the first user turn asks."""
        return self.conversation.exchanges[0].text.strip()

    @property
    def context(self) -> str:
        return self.conversation.exchanges[0].context.strip()

    @property
    def answer(self) -> str:
        return (self.conversation.answer or "").strip()


@dataclass(frozen=True, slots=True)
class Seeds:
    """bad: `place: why` of the rows left out."""

    seeds: tuple[Seed, ...]
    bad: tuple[str, ...] = ()


def read_seeds(specs: Sequence[str], *, answered: bool, skip_bad: bool = False) -> Seeds:
    """Rows of any format. answered: each needs an answer.

    Raises DataError with file and line at the first row that cannot be used, unless `skip_bad`; and where none can.
    """
    seeds: list[Seed] = []
    bad: list[str] = []
    for source in resolve_sources(list(specs)):
        for row in read_rows(source):
            why = _why_not(row, answered)
            if why is None and row.conversation is not None:
                seeds.append(Seed(_id_of(row), row.conversation))
                continue
            if not skip_bad:
                raise DataError(
                    tr(f"not a usable seed: {why}", f"不能用作种子：{why}"),
                    where=str(row.place),
                    remedy=tr(
                        "mend the row; or --skip-bad leaves such rows out and counts them",
                        "请修改这一行；或加 --skip-bad 跳过并计数",
                    ),
                )
            bad.append(f"{row.place}: {why}")
    if not seeds:
        raise DataError(
            tr("no usable seed", "没有可用的种子"),
            where=", ".join(specs),
            remedy=bad[0] if bad else None,
        )
    return Seeds(tuple(seeds), tuple(bad))


def _why_not(row: Row, answered: bool) -> str | None:
    if row.conversation is None:
        return row.problems[0].message if row.problems else tr("not a row", "不是数据行")
    first = row.conversation.exchanges[:1]
    if not first or first[0].role != "user" or not first[0].text.strip():
        return tr("it asks nothing", "没有问题")
    if answered and not (row.conversation.answer or "").strip():
        return tr("it has no answer", "没有回答")
    wrong = (problem for problem in row.problems if answered or problem.code != "empty_answer")
    return next((problem.message for problem in wrong), None)


def _id_of(row: Row) -> str:
    if isinstance(row.record, dict):
        for name in _ID_FIELDS:
            value = row.record.get(name)
            if isinstance(value, str | int) and not isinstance(value, bool):
                return str(value)
    return f"{Path(row.place.path).name}:{row.place.row}"


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of a document: text = document[start:end], in characters after decoding, line ends as `\\n`."""

    file: str
    start: int
    end: int
    text: str


def read_passages(paths: Sequence[str], longest: int) -> list[Passage]:
    """Documents (.txt, .md, any encoding; folders are walked) in pieces of whole paragraphs, `longest` characters at most.

    A longer paragraph is cut at the end of a sentence. Raises DataError for what is missing, empty or no text.
    """
    found: list[Passage] = []
    for path in _documents(paths):
        encoding = detect_encoding(str(path))
        with open_text(str(path), encoding) as file:
            text = file.read()
        found += [Passage(str(path), start, end, text[start:end]) for start, end in spans(text, longest)]
    if not found:
        raise DataError(tr("no text in the documents", "文档里没有文字"), where=", ".join(paths))
    return found


def _documents(paths: Sequence[str]) -> list[Path]:
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for end in ("txt", "md", "markdown") for file in path.rglob(f"*.{end}"))
            if not inside:
                raise DataError(
                    tr("no .txt or .md file in this folder", "该目录下没有 .txt 或 .md 文件"), where=str(path)
                )
            files += inside
        else:
            files.append(path)
    return files


def spans(text: str, longest: int) -> list[tuple[int, int]]:
    """(start, end) of pieces that hold whole paragraphs, together all of the text but blank ends."""
    pieces: list[tuple[int, int]] = []
    start = 0
    while start < len(text):
        if text[start].isspace():
            start += 1
            continue
        end = min(start + longest, len(text))
        if end < len(text):
            end = start + _cut(text[start:end])
        stop = end
        while text[stop - 1].isspace():
            stop -= 1
        pieces.append((start, stop))
        start = end
    return pieces


def _cut(piece: str) -> int:
    """Where to end a piece: after the last paragraph in it, else line, else sentence, else where it is full."""
    for mark in ("\n\n", "\n", "。", "！", "？", ". ", "；", "，", " "):
        place = piece.rfind(mark, len(piece) // 3)
        if place >= 0:
            return place + len(mark)
    return len(piece)
