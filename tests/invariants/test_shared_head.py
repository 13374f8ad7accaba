"""Rows that go on after one common head have the loss and the gradients they have with a head each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.invariants.test_packed import FAMILIES, VOCAB, assert_equal, fast, gradients, make, with_lora

from tuoling.data.pack import Batch, collate
from tuoling.data.token_store import Example
from tuoling.kernels import attention
from tuoling.kernels.install import FastModel, install


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rows(*lengths: int, head: int = 9) -> list[Example]:
    """Examples of head + length tokens that begin alike, the last third learned."""
    draw = np.random.Generator(np.random.PCG64(3))
    begin = draw.integers(4, VOCAB, head)
    made = []
    for number, length in enumerate(lengths):
        ids = np.concatenate([begin, [4 + number], draw.integers(4, VOCAB, length - 1)])
        made.append(Example(ids, np.array([[head + max(1, length * 2 // 3), head + length]]), number))
    return made


def loss_of(installed: FastModel, batch: Batch) -> torch.Tensor:
    return installed.loss_sum(
        batch.input_ids, batch.labels, batch.position_ids, batch.cu_seqlens, batch.extra_labels, batch.head
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "lengths", [(5, 30, 2, 17, 17, 4), (120, 40, 121)], ids=["short documents", "long documents"]
)
@pytest.mark.parametrize("query_rows", [512, 50], ids=["whole", "blocks of queries"])
def test_loss_and_every_gradient(
    family: str, lengths: tuple[int, ...], query_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "QUERY_ROWS", query_rows)
    model = with_lora(make(family)).train()
    installed = fast(model)
    alone, together = collate(rows(*lengths)), collate(rows(*lengths), share_head=True)
    assert together.head == 9 and len(together.input_ids) == len(alone.input_ids) - 9 * (len(lengths) - 1)
    expected = loss_of(installed, alone)
    theirs = gradients(model, expected)
    loss = loss_of(installed, together)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_equal(gradients(model, loss), theirs)


@pytest.mark.parametrize("window", [4, 20, 33, 200])
def test_a_sliding_window_reaches_over_the_head(window: int) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=VOCAB,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            sliding_window=window,
        )
    ).train()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0.0, 0.2)
    installed = fast(model)
    lengths = (5, 30, 17)
    expected = loss_of(installed, collate(rows(*lengths)))
    theirs = gradients(model, expected)
    loss = loss_of(installed, collate(rows(*lengths), share_head=True))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_equal(gradients(model, loss), theirs)


def test_where_packing_is_off_every_row_gets_its_head_back() -> None:
    model = with_lora(make("llama")).train()
    installed = install(model, say=lambda _: None)
    expected = loss_of(installed, collate(rows(5, 30, 17)))
    installed._refuse_packing("as a test")
    loss = loss_of(installed, collate(rows(5, 30, 17), share_head=True))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
