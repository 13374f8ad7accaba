"""Draws that belong to one answer: by hand, by frequency, and the same alone, in a batch and as a stream."""

from __future__ import annotations

import pytest
import torch
from tests.devices import DEVICES
from tests.tiny import tiny_model

from tuoling.infer.engine import GenerationSettings
from tuoling.infer.sampling import Draws, draw, generator
from tuoling.infer.torch_engine import TorchEngine
from tuoling.models.load import find_model, load_model, load_tokenizer
from tuoling.text.conversation import Conversation, Turn
from tuoling.text.templates import get_template


def by_hand(probabilities: list[float], number: float) -> int:
    """Walk along the probabilities until their sum has passed the number."""
    total = 0.0
    for token, probability in enumerate(probabilities):
        total += probability
        if number < total:
            return token
    raise AssertionError("the number lies behind the sum")


@pytest.mark.parametrize("device", DEVICES)
def test_a_draw_is_a_walk_along_the_probabilities(device: str) -> None:
    torch.manual_seed(0)
    scores = torch.randn(6, 50) * 2
    scores[:, ::7] = -torch.inf
    for round_ in range(20):
        numbers = [
            float(torch.rand((), generator=generator(100 * round_ + row), dtype=torch.float64))
            for row in range(6)
        ]
        tokens = draw(scores.to(device), [generator(100 * round_ + row) for row in range(6)])
        walks = scores.double().softmax(-1).tolist()
        assert tokens.tolist() == [by_hand(walk, number) for walk, number in zip(walks, numbers, strict=True)]


def test_tokens_of_no_probability_are_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """At both ends of the interval, where rounding would step outside."""
    scores = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf, -torch.inf]])
    for number, token in ((0.0, 1), (1.0 - 2**-53, 2)):
        monkeypatch.setattr(
            torch, "rand", lambda *a, value=number, **k: torch.tensor(value, dtype=torch.float64)
        )
        assert draw(scores, [torch.Generator()]).tolist() == [token]


@pytest.mark.slow
def test_frequencies_are_the_probabilities() -> None:
    """20,000 draws of (0.5, 0.3, 0.15, 0.05): each share within four standard deviations."""
    scores = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(1, 4)
    one = generator(5)
    counts = torch.bincount(torch.cat([draw(scores, [one]) for _ in range(20_000)]), minlength=4)
    for count, probability in zip(counts.tolist(), (0.5, 0.3, 0.15, 0.05), strict=True):
        deviation = (20_000 * probability * (1 - probability)) ** 0.5
        assert abs(count - 20_000 * probability) < 4 * deviation


def test_warpers_are_applied_before_the_draw() -> None:
    """top_k 2 and a low temperature leave two tokens; the draw leaves one, for the greedy choice."""
    settings = GenerationSettings(do_sample=True, temperature=0.5, top_k=2, seed=0)
    scores = torch.tensor([[3.0, 1.0, 2.5, 0.0]])
    draws = Draws(settings, 1)
    ids = torch.zeros(1, 1, dtype=torch.long)
    drawn = [draws(ids, scores.clone()) for _ in range(200)]  # type: ignore[arg-type]
    assert all(int((row > -torch.inf).sum()) == 1 for row in drawn)
    tokens = [int(row.argmax()) for row in drawn]
    share = tokens.count(0) / 200  # softmax(6, 5) = 0.731
    assert set(tokens) == {0, 2} and abs(share - 0.731) < 0.12


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> TorchEngine:
    source = find_model(tiny_model(tmp_path_factory.mktemp("sampling") / "m", "llama"))
    model = load_model(source, dtype="fp32", device="cpu")
    return TorchEngine(model, load_tokenizer(source), get_template("domain_bloom"))


@pytest.mark.slow
def test_an_answer_does_not_depend_on_its_batch(engine: TorchEngine) -> None:
    questions = ["你好", "把下面的句子翻译成英文：今天天气很好。", "1 2 3 4", "好"]
    asked = [Conversation((Turn("user", text),)) for text in questions]
    settings = GenerationSettings(max_new_tokens=16, temperature=1.3, top_p=0.95, do_sample=True, seed=11)
    batch = engine.generate(asked, settings)
    assert len({reply.text for reply in batch}) == 4
    for conversation, reply in zip(asked, batch, strict=True):
        assert engine.generate([conversation], settings)[0] == reply
        assert list(engine.stream(conversation, settings))[-1].reply == reply
    assert engine.generate(asked[::-1], settings) == batch[::-1]
    one = GenerationSettings(max_new_tokens=16, top_k=1, do_sample=True)
    assert engine.generate(asked, one) == engine.generate(asked, GenerationSettings(max_new_tokens=16))


def test_without_a_seed_answers_differ(engine: TorchEngine) -> None:
    settings = GenerationSettings(max_new_tokens=16, temperature=2.0, do_sample=True)
    asked = [Conversation((Turn("user", "你好"),))] * 2
    torch.manual_seed(0)
    first = engine.generate(asked, settings)
    torch.manual_seed(0)
    assert len({reply.text for reply in (*first, *engine.generate(asked, settings))}) == 4
