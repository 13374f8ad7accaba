"""What cannot be packed is refused; a batch moves as a whole. (What is packed: invariants/test_learned_tokens.)"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tuoling.data.pack import collate
from tuoling.data.token_store import Example
from tuoling.errors import DataError


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
