"""A real pretrained model through every part: tokenizer, loading, generation, streaming, one LoRA step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.stories260k import build_stories260k

from tuoling.api import Model, load
from tuoling.models.adapters import lora_target_names
from tuoling.text.conversation import Conversation, Turn


@pytest.fixture(scope="module")
def folder(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_stories260k(shared_data, tmp_path_factory.mktemp("stories") / "stories260K")


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load(folder, dtype="fp32", device="cpu")


@pytest.fixture(scope="module")
def expected(shared_data: Path) -> str:
    return (shared_data / "weights/stories260K/expected_greedy_200.txt").read_text(encoding="utf-8")


def test_200_greedy_tokens_from_the_begin_token(model: Model, expected: str) -> None:
    reply = model.engine.generate(
        [Conversation((Turn("text", ""),))], model.settings(max_new_tokens=200, do_sample=False)
    )[0]
    assert (reply.prompt_tokens, reply.completion_tokens, reply.finish_reason) == (1, 200, "length")
    assert reply.text == expected


def test_stream_gives_the_same_text_in_many_pieces(model: Model, expected: str) -> None:
    pieces = list(
        model.engine.stream(
            Conversation((Turn("text", ""),)), model.settings(max_new_tokens=200, do_sample=False)
        )
    )
    assert "".join(piece.text for piece in pieces) == expected
    assert len(pieces) > 100
    assert pieces[-1].reply is not None and pieces[-1].reply.text == expected


def test_answer_stops_at_the_context(model: Model) -> None:
    reply = model.engine.generate(
        [Conversation((Turn("text", "Once upon a time"),))], model.settings(max_new_tokens=4000)
    )[0]
    assert reply.prompt_tokens + reply.completion_tokens <= 512
    assert reply.finish_reason in ("length", "stop")


def _loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids).logits
    return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])


def test_one_lora_step_lowers_the_loss_on_held_text(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    from tuoling.models.load import find_model, load_model, load_tokenizer

    source = find_model(folder)
    tokenizer = load_tokenizer(source)
    torch.manual_seed(0)
    base: Any = load_model(source, dtype="fp32", device="cpu", for_training=True)
    model = get_peft_model(
        base, LoraConfig(r=8, lora_alpha=16, target_modules=lora_target_names(base), task_type="CAUSAL_LM")
    )
    story = "The robot Zog lived on the moon. Zog liked to eat rocks. One day Zog met a robot named Pim. "
    learned = torch.tensor([tokenizer.hf.encode(story * 2)])
    held = torch.tensor([tokenizer.hf.encode("Zog and Pim lived on the moon. Pim liked to eat rocks too.")])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    with torch.no_grad():
        before = _loss(model, held).item()
    _loss(model, learned).backward()
    optimizer.step()
    with torch.no_grad():
        after = _loss(model, held).item()
    assert after < before - 0.01
