from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.devices import DEVICES
from tests.tiny import sum_rows, tiny_model, write_rows
from transformers import BloomConfig, LlamaConfig

from tuoling.config import RunConfig
from tuoling.errors import TrainingError
from tuoling.train.activations import saved_bytes
from tuoling.train.memory import (
    MemoryEstimate,
    ModelSize,
    estimate_memory,
    gradient_bytes,
    largest_micro_batch_lengths,
    loss_bytes,
    require_memory,
    weight_bytes,
    what_fits,
)
from tuoling.train.memory_probe import is_out_of_memory, probe_memory

LENGTHS = np.array([5, 300, 7, 200])
SIZE = ModelSize(
    parameters=1100, trainable=100, layers=2, hidden=64, vocab=50, head=500, matrices=60, tied=True
)


def llama(layers: int = 2) -> Any:
    return LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )


def saved(lengths: list[int], layers: int = 2, dtype: str = "fp32", **keys: Any) -> int:
    return saved_bytes(llama(layers), RunConfig(lora_dropout=0.0, **keys), lengths, dtype)


def test_weights_are_frozen_ones_in_the_dtype_and_trained_ones_in_float32() -> None:
    assert weight_bytes(RunConfig(), SIZE, "bf16") == 1000 * 2 + 100 * 4
    assert weight_bytes(RunConfig(), SIZE, "fp32") == 1100 * 4


def test_a_tied_head_that_is_trained_has_its_gradient_twice() -> None:
    assert gradient_bytes(RunConfig(), SIZE) == 400
    assert gradient_bytes(RunConfig(finetuning_type="full"), SIZE) == 400 + 2000


def test_a_small_loss_is_its_logits_two_blocks_and_the_hidden_states() -> None:
    assert loss_bytes(RunConfig(), SIZE, 10, "bf16") == 10 * 50 * 2 + 2 * 10 * 50 * 4 + 2 * 10 * 64 * 2


def test_a_gpu_works_on_a_whole_chunk_of_logits_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """250,880 words in bf16: 128 MiB of logits, and scores and shares of 256 MiB each."""
    monkeypatch.setattr("tuoling.environment.pick_device", lambda asked: "cuda")
    bloom = ModelSize(parameters=1, trainable=1, layers=1, hidden=64, vocab=250_880, head=1, matrices=1)
    found = loss_bytes(RunConfig(), bloom, 4096, "bf16")
    assert found == 5 * 2**27 + 2 * 4096 * 64 * 2


def test_the_largest_micro_batch_is_the_longest_rows() -> None:
    assert largest_micro_batch_lengths(RunConfig(per_device_train_batch_size=2), LENGTHS) == [300, 200]


@pytest.mark.slow
@pytest.mark.parametrize(("optim", "bytes_"), [("adamw", 800), ("muon", 800 - 240)])
def test_muon_keeps_one_state_for_its_matrices(optim: str, bytes_: int) -> None:
    memory = estimate_memory(
        RunConfig(optim=optim, finetuning_type="full"),
        model_config=llama(),
        lengths=LENGTHS,
        size=SIZE,
        dtype="fp32",
    )
    assert memory.optimizer == bytes_


@pytest.mark.slow
def test_saved_bytes_of_a_llama_block_against_a_sum_by_hand() -> None:
    """float32, LoRA r1 on all linears, one document: per token and block, in elements.

    Twice: norm's input (also the residual), normed before its weight, linears' input, rsqrt (1).
    q after rotary H, k and v after rotary H/2 each, out H, log-sum 4; the rotary's inputs are not kept, its
    cos and sin are shared. SiLU's input, its output and up's output I each, and their product I.
    LoRA's [T, 1] for each of seven linears.
    """
    hidden, inner = 64, 160
    block = saved([256], layers=3, lora_rank=1) - saved([256], layers=2, lora_rank=1)
    norms = 2 * (hidden + hidden + 1)
    attention = hidden + hidden // 2 + hidden // 2 + hidden + 4
    mlp = 4 * inner
    linears_in = 2 * hidden  # the two norms' outputs; out (attention) and the product (mlp) are counted there
    by_hand = 4 * 256 * (norms + attention + mlp + linears_in + 7)
    weights_of_adapters = 4 * (7 * hidden + 3 * inner + 5 * hidden)
    assert block == pytest.approx(by_hand + weights_of_adapters, rel=0.1)


@pytest.mark.slow
def test_saved_bytes_grow_with_rows_length_and_layers() -> None:
    base = saved([200])
    assert saved([200, 200]) > base < saved([300])
    assert saved([200], layers=4) > 1.8 * base
    assert saved([200], gradient_checkpointing=True, layers=4) < saved([200], layers=4) / 2


@pytest.mark.slow
def test_short_documents_are_attended_to_in_float32() -> None:
    assert saved([100, 100], dtype="bf16") > saved([200], dtype="bf16")


@pytest.mark.slow
def test_bloom_and_dropout_are_counted() -> None:
    config = BloomConfig(vocab_size=100, hidden_size=64, n_layer=2, n_head=4)
    without = saved_bytes(config, RunConfig(lora_dropout=0.0), [256], "bf16")
    dropped = saved_bytes(config, RunConfig(lora_dropout=0.5), [256], "bf16")
    inputs = 2 * (64 + 64 + 64 + 256)
    assert dropped - without == 256 * inputs * 8 // 2


@pytest.mark.slow
def test_what_fits_is_what_the_estimate_says_and_the_cheapest_comes_first() -> None:
    config = RunConfig(per_device_train_batch_size=8)
    lengths = np.full(50, 900)
    options: dict[str, Any] = {"model_config": llama(), "lengths": lengths, "size": SIZE}
    whole = estimate_memory(config, dtype="fp32", **options)
    free = whole.total - whole.activations // 2
    found = what_fits(config, free, lora_size=SIZE, dtype="fp32", **options)
    assert found[0] == "per_device_train_batch_size=4 batch_size=8"
    half = estimate_memory(
        config.model_copy(update={"per_device_train_batch_size": 4}), dtype="fp32", **options
    )
    assert half.total <= free < whole.total


def test_a_run_far_too_large_is_refused_with_the_way_past() -> None:
    require_memory(140, 100, [])
    with pytest.raises(TrainingError) as caught:
        require_memory(151, 100, ["per_device_train_batch_size=1"])
    assert "per_device_train_batch_size=1" in str(caught.value)
    assert "ignore_memory_plan=true" in str(caught.value)


def test_the_parts_are_the_total() -> None:
    assert MemoryEstimate(1, 2, 3, 4, 5, 6).total == 21


def test_a_killed_child_does_not_fit() -> None:
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert probe_memory(RunConfig(), command=(sys.executable, "-c", kill)).peak_bytes is None
    greedy = "raise MemoryError"
    assert probe_memory(RunConfig(), command=(sys.executable, "-c", greedy)).peak_bytes is None
    with pytest.raises(TrainingError, match="other"):
        probe_memory(RunConfig(), command=(sys.executable, "-c", "raise ValueError('other')"))


def test_words_of_the_libraries_that_mean_no_memory() -> None:
    assert is_out_of_memory(
        "RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"
    )
    assert is_out_of_memory("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB")
    assert not is_out_of_memory("RuntimeError: shape '[3]' is invalid")


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_the_probe_measures_a_tiny_model(tmp_path: Path, device: str) -> None:
    model = tiny_model(tmp_path / "model", "llama")
    rows = write_rows(tmp_path / "rows.jsonl", sum_rows(6))
    found = probe_memory(
        RunConfig(
            model_name_or_path=str(model), data=(str(rows),), template="alpaca", device=device, dtype="fp32"
        )
    )
    least = 2**27 if device == "cpu" else 2**20  # of a GPU torch's blocks alone count, of a CPU the process
    assert found.peak_bytes is not None and least < found.peak_bytes < 2**31
    assert found.tokens_per_s is not None and found.tokens_per_s > 0


def test_the_longest_micro_batch_keeps_to_the_budget_of_tokens() -> None:
    lengths = np.array([3, 9, 5, 7, 2])

    def longest(**keys: Any) -> list[int]:
        return largest_micro_batch_lengths(RunConfig(**keys), lengths)

    assert longest(per_device_train_batch_size=2) == [9, 7]
    assert longest(per_device_train_batch_size=4, max_tokens_per_batch=15) == [9, 5]
    assert longest(per_device_train_batch_size=4, max_tokens_per_batch=4) == [9]  # alone
    assert sum(longest(max_tokens_per_batch=100)) == 26
