"""A real pretrained model through every part: tokenizer, loading, generation, streaming, one LoRA step."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.stories260k import build_stories260k

from tuoling.api import Model, load
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


@pytest.mark.slow
def test_200_greedy_tokens_from_the_begin_token(model: Model, expected: str) -> None:
    reply = model.engine.generate(
        [Conversation((Turn("text", ""),))], model.settings(max_new_tokens=200, do_sample=False)
    )[0]
    assert (reply.prompt_tokens, reply.completion_tokens, reply.finish_reason) == (1, 200, "length")
    assert reply.text == expected


@pytest.mark.slow
def test_stream_gives_the_same_text_in_many_pieces(model: Model, expected: str) -> None:
    pieces = list(
        model.engine.stream(
            Conversation((Turn("text", ""),)), model.settings(max_new_tokens=200, do_sample=False)
        )
    )
    assert "".join(piece.text for piece in pieces) == expected
    assert len(pieces) > 100
    assert pieces[-1].reply is not None and pieces[-1].reply.text == expected


@pytest.mark.slow
def test_answer_stops_at_the_context(model: Model) -> None:
    reply = model.engine.generate(
        [Conversation((Turn("text", "Once upon a time"),))], model.settings(max_new_tokens=4000)
    )[0]
    assert reply.prompt_tokens + reply.completion_tokens <= 512
    assert reply.finish_reason in ("length", "stop")
