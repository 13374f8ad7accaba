"""What a vocabulary is chosen by, and what proves it: rows rendered through the model's template, and base texts."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from tuoling.data.read import read_rows
from tuoling.data.sources import Source
from tuoling.errors import DataError, ModelError, TemplateError
from tuoling.language import tr
from tuoling.text.conversation import Conversation, Turn
from tuoling.text.templates import Segment, Template
from tuoling.text.tokenizer import TextTokenizer

BATCH_ROWS = 512

Base = Literal["ascii", "common", "gb2312"]
BASES: tuple[Base, ...] = ("ascii", "common", "gb2312")

PUNCTUATION = (
    "，。、；：？！…—·～“”‘’「」『』（）《》〈〉【】〔〕％￥℃°×÷±≤≥≠→←↑↓№§ー　－＋＝／＼＆＠＃＊＿｜"
)

ESTIMATE_SHARE = 20
"""Without held-out text, one row in twenty is kept from an estimate's choosing."""


@dataclass
class Rows:
    """Rows of some sources as segments, in batches; counts what cannot be rendered."""

    sources: Sequence[Source]
    template: Template
    progress: Callable[[int], None] | None = None
    read: int = 0
    skipped: int = 0
    """Rows that the data compiler would call bad."""
    formats: dict[str, int] = field(default_factory=dict)

    def __iter__(self) -> Iterator[list[list[Segment]]]:
        self.read = self.skipped = 0
        self.formats = {}
        batch: list[list[Segment]] = []
        for source in self.sources:
            for row in read_rows(source):
                self.read += 1
                segments = None if row.problems else self._render(row.conversation)
                if segments is None:
                    self.skipped += 1
                    continue
                self.formats[row.format] = self.formats.get(row.format, 0) + 1
                batch.append(segments)
                if len(batch) == BATCH_ROWS:
                    yield batch
                    batch = []
                    if self.progress is not None:
                        self.progress(self.read)
        if batch:
            yield batch

    def _render(self, conversation: Conversation | None) -> list[Segment] | None:
        if conversation is None:
            return None
        try:
            if conversation.answer is None and not conversation.is_plain_text:
                return self.template.prompt(conversation)
            return self.template.render(conversation)
        except TemplateError:
            return None


@dataclass(frozen=True)
class Counts:
    """How often each id stands in the rows: int64 [rows of the model]. chosen: without the rows of the estimate."""

    every: np.ndarray
    chosen: np.ndarray
    rows: int


def count_tokens(rows: Rows, tokenizer: TextTokenizer, full_rows: int) -> Counts:
    """Tokenise everything once and count. Raises DataError where no row can be rendered, ModelError for a bad id."""
    every = np.zeros(full_rows, dtype=np.int64)
    held = np.zeros(full_rows, dtype=np.int64)
    counted = 0
    for batch in rows:
        for ids, _ in tokenizer.encode_batch(batch):
            row = np.asarray(ids, dtype=np.int64)
            if len(row) and row.max() >= full_rows:
                raise ModelError(
                    tr(
                        f"the tokenizer gives id {row.max()}, the model has {full_rows} rows",
                        f"分词器给出编号 {row.max()}，而模型只有 {full_rows} 行",
                    ),
                    remedy=tr("take the tokenizer of this very model", "请使用该模型自己的分词器"),
                )
            np.add.at(every, row, 1)
            if is_held(row):
                np.add.at(held, row, 1)
            counted += 1
    if not counted:
        raise DataError(
            tr("no row can be read", "没有一条数据可以读取"),
            where=", ".join(source.path for source in rows.sources[:3]),
            remedy="tuoling data check",
        )
    return Counts(every, every - held, counted)


def is_held(row: np.ndarray) -> bool:
    """Whether a row belongs to the estimate's held-out part: by its content, so that equal rows stay together."""
    return zlib.crc32(row.astype(np.uint32).tobytes()) % ESTIMATE_SHARE == 0


def base_texts(base: Base, template: Template) -> list[list[Segment]]:
    """Texts that any pruned vocabulary writes as the full one does.

    ASCII characters and common punctuation, alone and after a space; the template's own words and stops; with
    `common` the 3,755 characters of GB 2312's first level, with `gb2312` its second level (3,008 rarer ones) too.
    """
    characters = [chr(code) for code in range(32, 127)] + ["\n", "\t", "\r", "\n\n", "  ", *PUNCTUATION]
    if base != "ascii":
        characters += gb2312_characters(16, 55)
    if base == "gb2312":
        characters += gb2312_characters(56, 87)
    found = []
    for text in [*characters, *(f" {text}" for text in characters[:95]), *template.stops]:
        found.append([Segment(text, False, row=True)])
        found.append([Segment("a", False, row=True), Segment(text, False, row=True, reply=True)])
    for turns in _EXAMPLES:
        try:
            found.append(template.render(Conversation(turns)))
            found.append(template.prompt(Conversation(turns[:-1])))
        except TemplateError:  # one that knows no system turn, or one question only
            continue
    return found


def gb2312_characters(first: int, last: int) -> list[str]:
    """Characters of GB 2312's rows `first` to `last` (16 to 55: level 1, 56 to 87: level 2)."""
    cells = (bytes((0xA0 + row, 0xA0 + cell)) for row in range(first, last + 1) for cell in range(1, 95))
    return [char for cell in cells if (char := cell.decode("gb2312", errors="ignore"))]


_ASK, _REPLY = Turn("user", "你好"), Turn("assistant", "你好")
_EXAMPLES = (
    (_ASK, _REPLY),
    (_ASK, _REPLY, _ASK, _REPLY),
    (Turn("user", "你好", "你好"), _REPLY),
    (Turn("system", "你好"), _ASK, _REPLY, _ASK, _REPLY),
)


@dataclass
class Agreement:
    """The full and the smaller tokenizer beside each other, on some rows.

    rows_same, tokens_same: rows with the very same tokens, and tokens of the full one that the smaller one has.
    tokens, tokens_after: how many the rows have. texts_same: rows that decode to the same text.
    """

    rows: int = 0
    rows_same: int = 0
    texts_same: int = 0
    tokens: int = 0
    tokens_same: int = 0
    tokens_after: int = 0

    def to_json(self) -> dict[str, Any]:
        """The counts, with the shares that people read."""
        return {
            **self.__dict__,
            "rows_same_share": self.rows_same / max(self.rows, 1),
            "tokens_same_share": self.tokens_same / max(self.tokens, 1),
            "longer": self.tokens_after / max(self.tokens, 1),
        }


def compare(
    rows: Iterable[list[list[Segment]]],
    full: TextTokenizer,
    smaller: TextTokenizer,
    new_ids: np.ndarray,
    *,
    only: Callable[[np.ndarray], bool] | None = None,
) -> Agreement:
    """Tokenise rows with both. only: which rows, by their ids in the full one.

    Raises ModelError where a row whose tokens are all kept does not come out the same: the smaller tokenizer would
    be wrong. A row that lost a token is counted.
    """
    found = Agreement()
    for batch in rows:
        before = [np.asarray(ids, dtype=np.int64) for ids, _ in full.encode_batch(batch)]
        taken = [place for place, row in enumerate(before) if only is None or only(row)]
        after = smaller.encode_batch([batch[place] for place in taken]) if taken else []
        for place, (ids, _) in zip(taken, after, strict=True):
            _compare_row(found, before[place], np.asarray(ids, dtype=np.int64), full, smaller, new_ids)
    return found


def _compare_row(
    found: Agreement,
    old: np.ndarray,
    new: np.ndarray,
    full: TextTokenizer,
    smaller: TextTokenizer,
    new_ids: np.ndarray,
) -> None:
    wanted = new_ids[old]
    kept = int((wanted >= 0).sum())
    same = np.array_equal(wanted, new)
    if kept == len(old) and not same:
        raise ModelError(
            tr(
                "the smaller tokenizer cuts a text of kept tokens in another way",
                "缩小后的分词器对全部由保留词元组成的文本给出了不同的切分",
            ),
            where=full.decode(old.tolist(), keep_special=True)[:200],
            remedy=tr("this is a defect: please report it", "这是程序缺陷，请报告"),
        )
    found.rows += 1
    found.rows_same += same
    found.tokens += len(old)
    found.tokens_same += kept
    found.tokens_after += len(new)
    found.texts_same += same or _text(full, old) == _text(smaller, new)


def _text(tokenizer: TextTokenizer, ids: np.ndarray) -> str:
    return tokenizer.decode(ids.tolist(), keep_special=True)
