"""What cannot be packed is refused; a batch moves as a whole. (What is packed: invariants/test_learned_tokens.)"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tuoling.data.pack import collate
from tuoling.data.token_store import Example
from tuoling.errors import DataError
from tuoling.text.conversation import IGNORE_INDEX


def example(*ids: int) -> Example:
    return Example(np.array(ids, np.uint32), np.array([[0, len(ids)]], np.int64), 0)


@pytest.mark.parametrize("examples", [[], [example()], [example(1), example()]])
def test_empty_examples_are_refused(examples: list[Example]) -> None:
    with pytest.raises(DataError, match="empty"):
        collate(examples)


def test_types_and_device() -> None:
    batch = collate([example(3, 4), example(2**31 + 5)]).to("cpu")
    assert batch.input_ids.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.input_ids.tolist() == [3, 4, 2**31 + 5]
    assert batch.labels.tolist() == [4, -100, -100]
    assert batch.num_learned == 1


def test_a_common_head_lies_there_once() -> None:
    rows = [
        Example(np.array([5, 6, 7, 8, 9]), np.array([[4, 5]]), 0),
        Example(np.array([5, 6, 7, 1, 2, 3, 4]), np.array([[5, 7]]), 1),
        Example(np.array([5, 6, 7, 8, 2]), np.array([[4, 5]]), 2, np.array([[3, 30], [4, 40]])),
    ]
    batch = collate(rows, share_head=True)
    assert (batch.head, batch.rows) == (
        2,
        [1, 0, 2],
    )  # row 2 learns 30 at position 2: the head ends before it
    assert batch.input_ids.tolist() == [5, 6, 7, 1, 2, 3, 4, 7, 8, 9, 7, 8, 2]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 2, 3, 4, 2, 3, 4]
    assert batch.cu_seqlens.tolist() == [0, 2, 7, 10, 13]
    learned = [(at, int(label)) for at, label in enumerate(batch.labels.tolist()) if label != IGNORE_INDEX]
    assert learned == [(4, 3), (5, 4), (8, 9), (10, 30), (11, 2)]
    assert batch.extra_labels is not None and batch.extra_labels.tolist() == [[11, 40]]
    assert batch.num_learned == 6


@pytest.mark.parametrize(
    "ids, spans",
    [
        ([[5, 6, 7]], [[2, 3]]),
        ([[5, 6, 7], [6, 6, 7]], [[2, 3]]),
        ([[5, 6, 7], [5, 6, 8]], [[0, 3]]),
        ([[5, 6, 7], [5]], [[2, 3]]),
    ],
    ids=["one row", "nothing alike", "learned from the first token", "a row of one token"],
)
def test_no_common_head(ids: list[list[int]], spans: list[list[int]]) -> None:
    rows = [Example(np.array(row), np.array(spans).clip(max=len(row)), at) for at, row in enumerate(ids)]
    batch = collate(rows, share_head=True)
    assert batch.head == 0 and batch.input_ids.tolist() == [token for row in ids for token in row]
