"""docs/scaling.md: its formulas against a ring that is really gone round, its models against transformers' own."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
scaling = runpy.run_path(str(ROOT / "benchmarks" / "scaling.py"))
Run, sent_bytes = scaling["Run"], scaling["sent_bytes"]


def ring(processes: int, size: int, *, back: bool) -> list[int]:
    """Numbers that each process sends where `size` of them are summed around a ring, and with `back` collected again."""
    part = size // processes
    held = [[{(rank, piece)} for piece in range(processes)] for rank in range(processes)]
    sent = [0] * processes
    for collecting in (False, True) if back else (False,):
        for turn in range(processes - 1):
            moves = [
                (rank, (rank + 1) % processes, (rank - turn + collecting) % processes)
                for rank in range(processes)
            ]
            for rank, to, piece in moves:
                held[to][piece] = held[to][piece] | held[rank][piece]
                sent[rank] += part
    whole = [{(rank, piece) for rank in range(processes)} for piece in range(processes)]
    for rank in range(processes):
        found = [piece for piece in range(processes) if held[rank][piece] == whole[piece]]
        assert found == (list(range(processes)) if back else [(rank + 1) % processes])
    return sent


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_a_ring_costs_what_the_formulas_say(processes: int) -> None:
    size = 10 * processes
    assert ring(processes, size, back=True) == [scaling["all_reduce_bytes"](size, processes)] * processes
    assert ring(processes, size, back=False) == [scaling["all_gather_bytes"](size, processes)] * processes


def test_engines_by_hand() -> None:
    full = {"parameters": 100, "trained": 100, "processes": 2}
    assert sent_bytes("ddp", Run(**full)) == 400  # once round and back, half of it each time
    assert sent_bytes("ddp", Run(**full, micro_batches=7)) == 400
    assert sent_bytes("fsdp", Run(**full)) == 0.5 * (400 + 400 + 400)
    assert sent_bytes("fsdp", Run(**full, outside=10)) == 0.5 * (400 + 360 + 400)
    assert sent_bytes("zero2", Run(**full)) == 0.5 * (200 + 200)
    assert sent_bytes("zero2", Run(**full, micro_batches=3, half=False)) == 0.5 * (3 * 400 + 400)
    assert sent_bytes("zero3", Run(**full, micro_batches=2)) == 2 * 0.5 * (200 + 200 + 200)
    lora = Run(parameters=110, trained=10, processes=2, outside=20)
    assert sent_bytes("fsdp", lora) == 0.5 * ((200 + 40) * 2 - 40 + 40)
    with pytest.raises(ValueError, match="zero9"):
        sent_bytes("zero9", lora)


@pytest.mark.parametrize("name", ["bloomz-560m", "Llama-2-13b"])
def test_the_shapes_are_those_of_the_models(name: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig

    from tuoling.models.adapters import lora_target_names
    from tuoling.models.shape import lora_parameters

    config: Any = BloomConfig(vocab_size=250_880, hidden_size=1024, n_layer=24, n_head=16)
    if name.startswith("Llama"):
        config = LlamaConfig(
            hidden_size=5120, intermediate_size=13_824, num_hidden_layers=40, num_attention_heads=40
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters, lora, outside = scaling["shapes"]()[name]
    blocks = model.transformer.h if name.startswith("bloom") else model.model.layers
    in_blocks = sum(parameter.numel() for parameter in blocks.parameters())
    assert (parameters, outside) == (model.num_parameters(), model.num_parameters() - in_blocks)
    assert lora == lora_parameters(model, lora_target_names(model, ("all",)), 8)


@pytest.mark.parametrize("language", ["zh", "en"])
def test_the_pages_hold_these_figures(language: str) -> None:
    text = (ROOT / "docs" / scaling["PAGES"][language]).read_text(encoding="utf-8")
    assert scaling["page_with_figures"](text, language) == text, "python benchmarks/scaling.py --write"
