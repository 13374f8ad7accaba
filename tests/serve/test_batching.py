"""Continuous batching on tiny random models: every answer is the one that the engine gives alone."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.devices import DEVICES
from tests.tiny import tiny_model

from tuoling.infer.engine import GenerationSettings, Reply
from tuoling.infer.sampling import warpers
from tuoling.infer.torch_engine import TorchEngine
from tuoling.kernels import probe
from tuoling.models.load import find_model, load_model, load_tokenizer
from tuoling.serve import sampling
from tuoling.serve.batching import Batcher
from tuoling.serve.jobs import Delta, Event, Failed, Finished, Job, Order
from tuoling.serve.stepper import Stepper
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


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=["bloom", "llama", "qwen2"])
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, device: str
) -> TorchEngine:
    source = find_model(tiny_model(tmp_path_factory.mktemp("serve") / "m", request.param))
    model = load_model(source, dtype="fp32", device=device)
    return TorchEngine(model, load_tokenizer(source), get_template("domain_bloom"))


@pytest.fixture
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


@pytest.mark.slow
def test_batch_mates_change_nothing(engine: TorchEngine, batcher: Batcher) -> None:
    """More callers than rows, a prompt longer than a step's share: each gets the engine's own greedy answer."""
    texts = QUESTIONS * 2
    answers = run(batcher, [Caller(engine, text) for text in texts])
    for text, (streamed, reply) in zip(texts, answers, strict=True):
        assert reply == engine.generate([ask(text)], GREEDY)[0], text
        assert streamed == reply.text
    assert batcher.load() == (0, 0)


@pytest.mark.slow
def test_draws_are_the_engines_own(engine: TorchEngine, batcher: Batcher) -> None:
    """A seed gives the engine's answer, whole distribution or cut, repetition knobs or not, whoever shares the step."""
    knobs: list[dict[str, Any]] = [
        {"temperature": 1.0, "seed": 1},
        {"temperature": 0.7, "top_p": 0.8, "seed": 2},
        {"temperature": 1.3, "top_k": 5, "seed": 3},
        {"temperature": 1.0, "top_k": 40, "top_p": 0.5, "repetition_penalty": 1.4, "seed": 4},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 20, "temperature": 2.0, "seed": 5},
    ]
    settings = [GREEDY.with_values(one) for one in knobs]
    answers = run(batcher, [Caller(engine, "三加五", one) for one in settings])
    for one, (streamed, reply) in zip(settings, answers, strict=True):
        assert reply == engine.generate([ask("三加五")], one)[0], one
        assert streamed == reply.text


@pytest.mark.slow
def test_a_cut_distribution_is_transformers(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Drawn many times, from few candidates or by sorting all: the shares are those of transformers' warpers."""
    torch.manual_seed(0)
    logits_V = torch.randn(700) * 2
    for values in ({"top_p": 0.7}, {"top_k": 9}, {"top_k": 30, "top_p": 0.6}, {}):
        settings = GenerationSettings(do_sample=True, temperature=0.8, **values)
        wanted_V = warpers(settings)(torch.zeros(1, 1, dtype=torch.long), logits_V[None]).softmax(-1)[0]  # type: ignore[arg-type]
        for candidates, draws in ((256, 1500), (4, 300)):
            monkeypatch.setattr(sampling, "CANDIDATES", candidates)
            choosers = [sampling.Chooser(settings, (), seed) for seed in range(draws)]
            drawn = torch.bincount(
                torch.tensor(sampling.choose(logits_V.to(device).expand(draws, -1), choosers)), minlength=700
            )
            assert not bool(drawn[wanted_V == 0].any())
            apart = (drawn / draws - wanted_V).abs() / (wanted_V * (1 - wanted_V) / draws).sqrt().clamp_min(
                1e-4
            )
            assert float(apart[wanted_V > 0.02].max()) < 5


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["llama"], indirect=True)
def test_callers_take_turns(engine: TorchEngine) -> None:
    """One answer at a time; ten questions of one caller do not hold up another's one."""
    made = Batcher(engine, rows=1)
    over: list[str] = []
    many = [Caller(engine, "1 2 3 4", caller="many") for _ in range(10)]
    one = Caller(engine, "1 2 3 4", caller="one")
    for asked, name in [*((each, "many") for each in many), (one, "one")]:
        put = asked.job.on_event

        def note(event: Event, put: Any = put, name: str = name) -> None:
            if isinstance(event, Finished):
                over.append(name)
            put(event)

        asked.job.on_event = note
    with made._wake:  # all of them wait before the first is taken
        for asked in [*many, one]:
            made.submit(asked.job)
    for asked in [*many, one]:
        asked.wait()
    made.close()
    assert over.index("one") == 1


@pytest.mark.parametrize("engine", ["llama"], indirect=True)
def test_the_model_is_left_as_it_was_found(engine: TorchEngine) -> None:
    made = Batcher(engine, rows=2)
    made.close()
    made.close()
    assert not any("forward" in module.__dict__ for module in engine.model.modules())
    assert engine.model.config._attn_implementation in ("sdpa", "eager")


@pytest.mark.slow
def test_linear_layers_are_packed_only_where_nothing_else_reads_them(tmp_path: Path) -> None:
    """bf16: the numbers of the plain layers; a model that reads a weight itself keeps it."""
    source = find_model(tiny_model(tmp_path / "m", "llama"))
    model: Any = load_model(source, dtype="bf16", device="cpu")
    ids = torch.arange(4, 30)[None]
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        stepper = Stepper(model, slots=2)
        assert stepper.linears is not None
        if not len(stepper.linears):
            pytest.skip("this CPU has no packed bf16 layers")
        assert probe.apart(model(input_ids=ids).logits, wanted) < 5e-3
        stepper.close()
        assert torch.equal(model(input_ids=ids).logits, wanted)
        layer = model.model.layers[0].self_attn.o_proj
        model.lm_head.register_forward_pre_hook(
            lambda module, inputs: (inputs[0] + layer.weight.sum() * 0 + layer.weight[0, 0] * 0,)
        )
        wanted = model(input_ids=ids).logits
        stepper = Stepper(model, slots=2)
        assert stepper.linears is not None and not len(stepper.linears)
        assert torch.equal(model(input_ids=ids).logits, wanted)
        stepper.close()
