"""What pruning is asked for, and what it found: for the user and for `prune.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tuoling.language import tr
from tuoling.weights.prune_choice import Choice
from tuoling.weights.prune_corpus import Agreement, Base
from tuoling.weights.prune_score import TextScore

REPORT_FILE = "prune.json"


@dataclass(frozen=True)
class PruneOptions:
    """keep: files and folders of rows (or hub ids) whose tokens are kept. held_out: rows that choose nothing.

    base:      what is kept besides (`prune_corpus.base_texts`).
    min_count: tokens that stand less often in the rows are left out; those rows then come out otherwise.
    size:      so many tokens, the most frequent first.
    verify:    compare the logits of both models; off is recorded.
    allow_remote_code: the model's own Python code may be run.
    """

    keep: Sequence[str]
    held_out: Sequence[str] = ()
    base: Base = "common"
    min_count: int = 1
    size: int | None = None
    template: str | None = None
    data_format: str | None = None
    columns: Mapping[str, str] | None = None
    verify: bool = True
    allow_nan: bool = False
    allow_remote_code: bool = False


@dataclass(frozen=True)
class PruneReport:
    """What was kept and what was proven; `prune.json` beside the model holds the same.

    corpus: all rows of `keep`. held_out: other rows, or, with `estimated`, the twentieth part of `keep` under a
    vocabulary chosen without it. before, after: both models on a few short rows of held_out, else of keep.
    """

    out: Path
    rows_before: int
    rows_after: int
    size_bytes_before: int
    size_bytes_after: int
    choice: dict[str, Any]
    corpus: Agreement
    held_out: Agreement
    estimated: bool
    parity: Any
    before: TextScore | None
    after: TextScore | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "out": str(self.out),
            "rows_before": self.rows_before,
            "rows_after": self.rows_after,
            "size_bytes_before": self.size_bytes_before,
            "size_bytes_after": self.size_bytes_after,
            "choice": self.choice,
            "corpus": self.corpus.to_json(),
            "held_out": {**self.held_out.to_json(), "estimated": self.estimated},
            "parity": None if self.parity is None else asdict(self.parity),
            "before": None if self.before is None else self.before.to_json(),
            "after": None if self.after is None else self.after.to_json(),
        }


def corpus_line(corpus: Agreement, choice: Choice, rows_before: int) -> str:
    """What was kept, and how many rows come out the same."""
    share = corpus.rows_same / corpus.rows
    line = tr(
        f"kept {len(choice.old_ids):,} of {rows_before:,} words ({choice.base:,} of them for any text); "
        f"{corpus.rows_same:,} of {corpus.rows:,} rows give the same tokens ({share:.2%})",
        f"保留 {len(choice.old_ids):,} / {rows_before:,} 个词（其中 {choice.base:,} 个为通用部分）；"
        f"{corpus.rows:,} 条数据中有 {corpus.rows_same:,} 条切分完全相同（{share:.2%}）",
    )
    if choice.dropped:
        line += tr(
            f"; {choice.dropped:,} words of the rows were dropped by --min-count or --size",
            f"；数据中有 {choice.dropped:,} 个词因 --min-count 或 --size 被去掉",
        )
    return line


def held_out_line(held_out: Agreement, estimated: bool) -> str:
    """What new text meets."""
    if not held_out.rows:
        return tr("held-out text: no row to measure on", "留出文本：没有可供测量的数据")
    what = tr("held-out rows", "留出数据")
    if estimated:
        what = tr(
            "held-out rows (an estimate: one row in twenty of the same rows, with a vocabulary chosen without them)",
            "留出数据（估计值：取同一批数据的二十分之一，用不含它们选出的词表来测）",
        )
    figures = held_out.to_json()
    same, tokens, longer = figures["rows_same_share"], figures["tokens_same_share"], figures["longer"]
    lost = held_out.rows - held_out.texts_same
    line = tr(
        f"{what}: {same:.2%} of {held_out.rows:,} give the same tokens, {tokens:.3%} of tokens are kept, "
        f"texts are {longer:.4f} times as long",
        f"{what}：{held_out.rows:,} 条中 {same:.2%} 切分相同，{tokens:.3%} 的词元仍在，文本长度为原来的 {longer:.4f} 倍",
    )
    if lost:
        line += tr(f"; {lost:,} rows lose characters", f"；{lost:,} 条会丢失字符")
    return line


def score_line(before: TextScore, after: TextScore) -> str:
    """Both models on the same text."""
    return tr(
        f"on short rows: {before.bits_per_character:.4f} → {after.bits_per_character:.4f} bits a character; the full "
        f"model gives {before.outside:.3%} of its probability to the words left out",
        f"在短数据上：每字 {before.bits_per_character:.4f} → {after.bits_per_character:.4f} 比特；完整模型有 "
        f"{before.outside:.3%} 的概率落在被去掉的词上",
    )
