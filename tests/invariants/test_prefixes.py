"""A row learned inside the row that it begins: loss, count and every gradient as of the two rows, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.data.test_prefixes import store_of
from tests.invariants.test_packed import VOCAB, assert_equal, fast, gradients, make, with_lora

from tuoling.data.pack import Batch, collate
from tuoling.data.prefixes import share_prefixes
from tuoling.kernels.install import FastModel, install


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batches(folder: Path, learn: str, between: bool) -> tuple[Batch, Batch]:
    """Dialogues of 1 to 5 turns, a row for each, and equal rows: as they are, and with their prefixes shared."""
    draw = np.random.Generator(np.random.PCG64(7))
    rows = []
    for turns in (1, 3, 5, 2):
        ids: list[int] = [1]
        replies: list[tuple[int, int]] = []
        for _ in range(turns):
            ids = ids + draw.integers(4, VOCAB, draw.integers(2, 9)).tolist()
            begin = len(ids)
            ids = ids + draw.integers(4, VOCAB, draw.integers(1, 12)).tolist()
            replies = [*replies, (begin, len(ids) + 1)]
            rows.append(([*ids, 2], replies if learn == "all" else replies[-1:]))
            if between:
                ids = [*ids, 2]
            else:  # nothing ends the earlier replies
                replies[-1] = (begin, len(ids))
    rows += rows[:2] + rows[-1:]
    store = store_of(folder, rows)
    shared = share_prefixes(store, np.arange(len(rows)))
    assert len(shared.hosts) == 4 and len(rows) == 14
    alone = collate([store[row] for row in range(len(rows))])
    together = collate([shared.example(store, number) for number in range(4)])
    assert len(together.input_ids) < 0.5 * len(alone.input_ids)
    assert together.num_learned == alone.num_learned
    return alone, together


def loss_of(installed: FastModel, batch: Batch) -> torch.Tensor:
    return installed.loss_sum(
        batch.input_ids, batch.labels, batch.position_ids, batch.cu_seqlens, batch.extra_labels
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bloom", "llama", "qwen2"])
@pytest.mark.parametrize("learn", ["last", "all"])
@pytest.mark.parametrize("between", [True, False], ids=["every reply is ended", "only the last is ended"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_loss_and_every_gradient(tmp_path: Path, family: str, learn: str, between: bool, lora: bool) -> None:
    alone, together = batches(tmp_path, learn, between)
    model = (with_lora(make(family)) if lora else make(family)).train()
    installed = fast(model)
    expected = loss_of(installed, alone)
    theirs = gradients(model, expected)
    loss = loss_of(installed, together)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_equal(gradients(model, loss), theirs)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [True, False])
def test_without_the_fused_loss(tmp_path: Path, packed: bool) -> None:
    """A head with an adapter of its own: transformers' logits; rows one by one where packing was refused."""
    from peft import LoraConfig, get_peft_model

    alone, together = batches(tmp_path, "all", True)
    model = get_peft_model(make("llama"), LoraConfig(r=4, target_modules=["q_proj", "lm_head"])).train()
    installed = install(model, say=lambda message: None)
    assert not installed.fused_loss and together.extra_labels is not None
    expected = loss_of(installed, alone)
    if not packed:
        installed._refuse_packing("as a test")
    assert loss_of(installed, together).item() == pytest.approx(expected.item(), rel=1e-5)
