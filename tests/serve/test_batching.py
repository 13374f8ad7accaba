"""Continuous batching on tiny random models: every answer is the one that the engine gives alone."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

import pytest
from tests.tiny import tiny_model

from tuoling.infer.engine import GenerationSettings, Reply
from tuoling.infer.torch_engine import TorchEngine
from tuoling.models.load import find_model, load_model, load_tokenizer
from tuoling.serve.batching import Batcher
from tuoling.serve.jobs import Delta, Event, Failed, Finished, Job, Order
from tuoling.text.conversation import Conversation, Turn
from tuoling.text.templates import get_template

GREEDY = GenerationSettings(max_new_tokens=24)
QUESTIONS = [
    "你好",
    "把下面的句子翻译成英文：今天天气很好。",
    "三加五",
    "Write a response that completes",
    "1 2 3 4",
    "好" * 90,
]


def ask(text: str) -> Conversation:
    return Conversation((Turn("user", text),))


@pytest.fixture(scope="module", params=["bloom", "llama", "qwen2"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TorchEngine:
    source = find_model(tiny_model(tmp_path_factory.mktemp("serve") / "m", request.param))
    model = load_model(source, dtype="fp32", device="cpu")
    return TorchEngine(model, load_tokenizer(source), get_template("domain_bloom"))


@pytest.fixture(scope="module")
def batcher(engine: TorchEngine) -> Iterator[Batcher]:
    made = Batcher(engine, rows=4, waiting=64, prompt_tokens=48)
    yield made
    made.close()


class Caller:
    """Collects what one job says."""

    def __init__(
        self, engine: TorchEngine, text: str, settings: GenerationSettings = GREEDY, **order: Any
    ) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.job = Job(Order(engine, (ask(text),), settings, **order), self.events.put)

    def wait(self) -> list[tuple[str, Reply]]:
        """Streamed text and reply of each choice."""
        texts: dict[int, str] = {}
        replies: dict[int, Reply] = {}
        while len(replies) < self.job.order.choices:
            event = self.events.get(timeout=60)
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Delta):
                texts[event.choice] = texts.get(event.choice, "") + event.text
            else:
                assert isinstance(event, Finished)
                replies[event.choice] = event.reply
        return [(texts.get(choice, ""), replies[choice]) for choice in sorted(replies)]


def run(batcher: Batcher, callers: list[Caller]) -> list[tuple[str, Reply]]:
    for caller in callers:
        batcher.submit(caller.job)
    return [caller.wait()[0] for caller in callers]


def test_batch_mates_change_nothing(engine: TorchEngine, batcher: Batcher) -> None:
    """More callers than rows, a prompt longer than a step's share: each gets the engine's own greedy answer."""
    texts = QUESTIONS * 2
    answers = run(batcher, [Caller(engine, text) for text in texts])
    for text, (streamed, reply) in zip(texts, answers, strict=True):
        assert reply == engine.generate([ask(text)], GREEDY)[0], text
        assert streamed == reply.text
    assert batcher.load() == (0, 0)
