"""Examples side by side in one batch, without padding: the last thing before the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tuoling.data.token_store import Example
from tuoling.errors import DataError
from tuoling.language import tr
from tuoling.text.conversation import IGNORE_INDEX


@dataclass
class Batch:
    """B examples of T tokens together.

    input_ids [T] int64. labels [T] int64: labels[t] is input_ids[t + 1] where that token is learned and belongs to
    the same example, else IGNORE_INDEX. position_ids [T] int64: from 0 in each example. cu_seqlens [B + 1] int32:
    where examples begin and end. rows: their indices in the store. num_learned: labels that count.
    extra_labels [E, 2] int64, or None: (t, id) for each further label of a position whose place in `labels` is taken.
    head: above 0, all examples begin with the same `head` tokens, which lie here once, as the first of
    cu_seqlens' documents; the others are what follows them, the longest first, their position_ids from `head` on.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    rows: list[int]
    num_learned: int
    extra_labels: torch.Tensor | None = None
    head: int = 0

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        return Batch(
            self.input_ids.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.position_ids.to(device, non_blocking=True),
            self.cu_seqlens.to(device, non_blocking=True),
            self.rows,
            self.num_learned,
            None if self.extra_labels is None else self.extra_labels.to(device, non_blocking=True),
            self.head,
        )


def collate(examples: Sequence[Example], *, share_head: bool = False) -> Batch:
    """Lay examples side by side. Raises DataError for no examples, or an empty one.

    share_head: the tokens that all of them begin with, and that none learns anything at, lie there once.
    """
    head = _common_head(examples) if share_head else 0
    if head:
        examples = sorted(examples, key=lambda example: -len(example.input_ids))
    lengths = np.array([len(example.input_ids) for example in examples], dtype=np.int64)
    if not len(lengths) or not lengths.all():
        raise DataError(tr("an empty example cannot be packed", "不能打包空样本"))
    ends = np.cumsum(lengths)
    starts = ends - lengths
    input_ids = np.concatenate([example.input_ids for example in examples]).astype(np.int64)
    labels = np.full(len(input_ids), IGNORE_INDEX, dtype=np.int64)
    for start, example in zip(starts.tolist(), examples, strict=True):
        for begin, end in example.spans.tolist():
            begin = max(begin, 1)  # nothing stands before the first token to predict it from
            labels[start + begin - 1 : start + end - 1] = input_ids[start + begin : start + end]
    extra = _add_extra_labels(labels, examples, starts)
    positions = np.arange(len(input_ids), dtype=np.int64) - np.repeat(starts, lengths)
    offsets = np.concatenate([[0], ends])
    if head:
        kept = (positions >= head) | (np.arange(len(input_ids)) < head)  # the first example's head stays
        extra[:, 0] = np.cumsum(kept)[extra[:, 0]] - 1
        input_ids, labels, positions = input_ids[kept], labels[kept], positions[kept]
        offsets = np.concatenate([[0, head], head + np.cumsum(lengths - head)])
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(offsets.astype(np.int32)),
        rows=[example.row for example in examples],
        num_learned=int((labels != IGNORE_INDEX).sum()) + len(extra),
        extra_labels=torch.from_numpy(extra) if len(extra) else None,
        head=head,
    )


def _common_head(examples: Sequence[Example]) -> int:
    """Tokens that all examples begin with, up to the first position of any that is learned at; 0 for one example.

    Every example keeps a token of its own: the last position of the head may predict nothing.
    """
    if len(examples) < 2:
        return 0
    length = min(len(example.input_ids) for example in examples) - 1
    for example in examples:
        learned = [max(int(begin), 1) - 1 for begin, end in example.spans.tolist() if end > max(begin, 1)]
        if example.extra_labels is not None and len(example.extra_labels):
            learned.append(int(example.extra_labels[:, 0].min()) - 1)
        length = min([length, *learned])
    first = examples[0].input_ids[:length]
    for example in examples[1:]:
        differing = np.flatnonzero(example.input_ids[: len(first)] != first)
        if len(differing):
            first = first[: int(differing[0])]
    return len(first)


def _add_extra_labels(labels: np.ndarray, examples: Sequence[Example], starts: np.ndarray) -> np.ndarray:
    """Put the examples' extra labels where `labels` [T] is free; [E, 2], (t, id) of those whose place is taken."""
    extra = [
        np.add(example.extra_labels, [start - 1, 0])
        for start, example in zip(starts.tolist(), examples, strict=True)
        if example.extra_labels is not None
    ]
    if not extra:
        return np.empty((0, 2), dtype=np.int64)
    pairs = np.concatenate(extra)
    _, first = np.unique(pairs[:, 0], return_index=True)
    free = np.zeros(len(pairs), dtype=bool)
    free[first] = labels[pairs[first, 0]] == IGNORE_INDEX
    labels[pairs[free, 0]] = pairs[free, 1]
    return pairs[~free]
