"""The engine on tiny random models: batch = one by one, stream = batch, beam 1 = greedy, stops, cancel."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.devices import DEVICES
from tests.tiny import tiny_model

from tuoling.infer.engine import GenerationSettings, PromptTooLong, Reply
from tuoling.infer.sampling import reply_processors
from tuoling.infer.torch_engine import TorchEngine
from tuoling.models.load import find_model, load_model, load_tokenizer
from tuoling.text.conversation import Conversation, Turn
from tuoling.text.templates import get_template

GREEDY = GenerationSettings(max_new_tokens=24)
QUESTIONS = [
    "你好",
    "把下面的句子翻译成英文：今天天气很好。",
    "三加五",
    "Write a response that completes",
    "1 2 3 4",
    "好",
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
    source = find_model(tiny_model(tmp_path_factory.mktemp("engine") / "m", request.param))
    model = load_model(source, dtype="fp32", device=device)
    return TorchEngine(model, load_tokenizer(source), get_template("domain_bloom"))


@pytest.fixture
def restore(engine: TorchEngine) -> Any:
    """Put end tokens, stops and context back."""
    kept = (set(engine.end_ids), engine.stops, engine.context_tokens)
    yield
    engine.end_ids, engine.stops, engine.context_tokens = kept


@pytest.mark.slow
def test_the_head_gets_one_block_of_memory(engine: TorchEngine) -> None:
    """A slice of a batch would cost a copy of the head's weights a row."""
    seen: list[tuple[int, bool]] = []
    head = engine.model.get_output_embeddings()
    watch = head.register_forward_hook(
        lambda _, inputs, output: seen.append((len(inputs[0]), inputs[0].is_contiguous()))
    )
    engine.generate([ask(text) for text in QUESTIONS], GREEDY)
    watch.remove()
    assert seen and all(one == (len(QUESTIONS), True) for one in seen)


def by_hand(engine: TorchEngine, text: str, steps: int) -> list[int]:
    """Greedy decoding with nothing but whole forwards: the oracle."""
    ids = engine.prompt_ids(ask(text))
    start = len(ids)
    with torch.no_grad():
        for _ in range(steps):
            ids.append(
                int(
                    engine.model(torch.tensor([ids], device=engine.device), use_cache=False)
                    .logits[0, -1]
                    .argmax()
                )
            )
            if ids[-1] in engine.end_ids:
                return ids[start:-1]
    return ids[start:]


@pytest.mark.slow
def test_batch_is_one_by_one_is_by_hand(engine: TorchEngine) -> None:
    batch = engine.generate([ask(text) for text in QUESTIONS], GREEDY)
    for text, reply in zip(QUESTIONS, batch, strict=True):
        assert list(reply.token_ids) == by_hand(engine, text, 24), text
        assert reply == engine.generate([ask(text)], GREEDY)[0]
        assert reply.prompt_tokens == len(engine.prompt_ids(ask(text)))
        assert reply.completion_tokens == len(reply.token_ids)


@pytest.mark.slow
def test_rows_that_end_early_do_not_change_the_others(engine: TorchEngine, restore: None) -> None:
    free = engine.generate([ask(text) for text in QUESTIONS], GREEDY)
    engine.end_ids = {free[0].token_ids[3]}
    batch = engine.generate([ask(text) for text in QUESTIONS], GREEDY)
    for text, before, reply in zip(QUESTIONS, free, batch, strict=True):
        end = next(iter(engine.end_ids))
        ids = before.token_ids
        cut = ids.index(end) if end in ids else len(ids)
        assert reply.token_ids == ids[:cut], text
        assert reply.finish_reason == ("stop" if end in ids else "length")


def streamed(engine: TorchEngine, text: str, settings: GenerationSettings) -> tuple[str, Reply]:
    pieces = list(engine.stream(ask(text), settings))
    assert pieces[-1].reply is not None and all(piece.reply is None for piece in pieces[:-1])
    shown = ""
    for piece in pieces:
        shown = shown[: len(shown) - piece.back] + piece.text
    return shown, pieces[-1].reply


@pytest.mark.slow
def test_stream_is_batch(engine: TorchEngine) -> None:
    for text, reply in zip(QUESTIONS, engine.generate([ask(t) for t in QUESTIONS], GREEDY), strict=True):
        assert streamed(engine, text, GREEDY) == (reply.text, reply)
        assert len(list(engine.stream(ask(text), GREEDY))) > 2


@pytest.mark.slow
def test_one_beam_is_greedy_and_beams_find_better(engine: TorchEngine) -> None:
    settings = GenerationSettings(max_new_tokens=8, num_beams=4)
    conversations = [ask(text) for text in QUESTIONS]
    greedy = engine.generate(conversations, GenerationSettings(max_new_tokens=8))
    assert all(not reply.beams for reply in greedy)
    assert greedy == engine.generate(conversations, GenerationSettings(max_new_tokens=8, num_beams=1))
    beams = engine.generate(conversations, settings)
    for text, many in zip(QUESTIONS, beams, strict=True):
        assert many == engine.generate([ask(text)], settings)[0], "beams do not depend on the batch either"
    pairs = [
        (_nats(engine, text, one), _nats(engine, text, many))
        for text, one, many in zip(QUESTIONS, greedy, beams, strict=True)
        if one.completion_tokens == many.completion_tokens == 8
    ]
    assert len(pairs) >= 3 and sum(many for _, many in pairs) < sum(one for one, _ in pairs) - 0.1


def _nats(engine: TorchEngine, text: str, reply: Reply) -> float:
    prompt = engine.prompt_ids(ask(text))
    ids = torch.tensor([[*prompt, *reply.token_ids]], device=engine.device)
    with torch.no_grad():
        logits = engine.model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return float(torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum"))


# -- stops -----------------------------------------------------------------------------------------------------


def stops_inside(engine: TorchEngine) -> list[tuple[str, str, str]]:
    """(question, greedy answer, two characters from its middle), where the answer has whole characters there."""
    found = []
    for text in [*QUESTIONS, *(f"{number} 加 {number} 等于多少？" for number in range(12))]:
        whole = engine.generate([ask(text)], GREEDY)[0].text
        for middle in range(len(whole) // 3, len(whole) - 2):
            stop = whole[middle : middle + 2]
            if "\ufffd" not in stop:
                found.append((text, whole, stop))
                break
    assert len(found) >= 3
    return found


@pytest.mark.slow
@pytest.mark.parametrize("num_beams", [1, 2])
def test_nothing_of_a_stop_string_is_shown(engine: TorchEngine, num_beams: int) -> None:
    for text, whole, stop in stops_inside(engine)[:3]:
        settings = GenerationSettings(max_new_tokens=24, stop=(stop,), num_beams=num_beams)
        reply = engine.generate([ask(text)], settings)[0]
        assert stop not in reply.text
        if num_beams == 1:
            assert reply.text == whole[: whole.index(stop)] and reply.finish_reason == "stop"
            assert reply.completion_tokens < 24, "it stopped there and did not run on"
            assert stop in engine.tokenizer.decode(reply.token_ids)
            assert stop not in engine.tokenizer.decode(reply.token_ids[:-1]), "and not a token later"
        assert streamed(engine, text, settings) == (reply.text, reply)


@pytest.mark.slow
def test_generation_itself_ends_at_a_stop_string(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only the text is cut: nothing more is computed."""
    text, _, stop = stops_inside(engine)[0]
    lengths = []
    run = engine._run
    monkeypatch.setattr(engine, "_run", lambda *a, **k: [lengths.append(len(r)) or r for r in run(*a, **k)])
    reply = engine.generate([ask(text)], GenerationSettings(max_new_tokens=24, stop=(stop,)))[0]
    assert lengths == [reply.completion_tokens]


@pytest.mark.slow
def test_stops_of_one_row_leave_the_others_alone(engine: TorchEngine) -> None:
    settings = GenerationSettings(max_new_tokens=24, stop=(stops_inside(engine)[0][2],))
    batch = engine.generate([ask(text) for text in QUESTIONS], settings)
    for text, reply in zip(QUESTIONS, batch, strict=True):
        assert reply == engine.generate([ask(text)], settings)[0], text


def test_a_stop_in_the_prompt_does_not_count(engine: TorchEngine) -> None:
    settings = GenerationSettings(max_new_tokens=6, stop=("助手:", "你好"))
    assert engine.generate([ask("你好")], settings)[0].completion_tokens > 0


def test_special_tokens_that_are_stops_end_by_id(engine: TorchEngine) -> None:
    other = TorchEngine(engine.model, engine.tokenizer, get_template("domain_bloom"), stops=("<pad>",))
    assert other.end_ids == {2, 3}


# -- knobs -----------------------------------------------------------------------------------------------------


def test_repetition_knobs_see_the_answer_only() -> None:
    """Prompt 5 6 7 (behind padding 3 3), answer 8 9 8: only 8 and 9 are penalised, only 9 is banned after 8."""
    ids = torch.tensor([[3, 3, 5, 6, 7, 8, 9, 8]])
    scores = torch.ones(1, 12)
    penalised = reply_processors(GenerationSettings(repetition_penalty=2.0), 5)(ids, scores.clone())
    assert penalised[0].tolist() == [0.5 if token in (8, 9) else 1.0 for token in range(12)]
    banned = reply_processors(GenerationSettings(no_repeat_ngram_size=2), 5)(ids, scores.clone())
    assert [token for token in range(12) if banned[0, token] == -float("inf")] == [9]
    free = reply_processors(GenerationSettings(no_repeat_ngram_size=1), 5)(ids[:, :5], scores.clone())
    assert torch.equal(free, scores), "the first token of an answer is free"
    assert len(reply_processors(GenerationSettings(), 5)) == 0


def test_no_repeat_holds_in_a_batch(engine: TorchEngine) -> None:
    settings = GenerationSettings(max_new_tokens=12, no_repeat_ngram_size=1)
    for reply in engine.generate([ask(text) for text in QUESTIONS], settings):
        assert len(set(reply.token_ids)) == len(reply.token_ids) > 1


@pytest.mark.slow
def test_min_and_max_new_tokens(engine: TorchEngine, restore: None) -> None:
    first = engine.generate([ask("你好")], GREEDY)[0].token_ids[0]
    engine.end_ids = {first}
    assert engine.generate([ask("你好")], GREEDY)[0].completion_tokens == 0
    reply = engine.generate([ask("你好")], GenerationSettings(max_new_tokens=9, min_new_tokens=5))[0]
    assert 5 <= reply.completion_tokens <= 9


@pytest.mark.slow
def test_a_seed_repeats_and_leaves_the_process_random_state(engine: TorchEngine) -> None:
    settings = GenerationSettings(max_new_tokens=16, do_sample=True, temperature=1.5, seed=7)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = engine.generate([ask("你好")], settings)[0]
    assert torch.equal(torch.get_rng_state(), state)
    assert engine.generate([ask("你好")], settings)[0] == first
    assert streamed(engine, "你好", settings)[1] == first
    texts = {
        engine.generate([ask("你好")], settings.with_values({"seed": seed}))[0].text for seed in range(4)
    }
    assert len(texts) > 1


@pytest.mark.slow
def test_settings_of_the_folder_do_not_leak_in(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", "llama")
    (folder / "generation_config.json").write_text('{"do_sample": true, "temperature": 5.0, "max_length": 7}')
    source = find_model(folder)
    engine = TorchEngine(
        load_model(source, dtype="fp32", device="cpu"), load_tokenizer(source), get_template("domain_bloom")
    )
    reply = engine.generate([ask("你好")], GREEDY)[0]
    assert list(reply.token_ids) == by_hand(engine, "你好", 24)


# -- limits, cancel, likelihood --------------------------------------------------------------------------------


def test_context_limits(engine: TorchEngine, restore: None) -> None:
    tokens = engine.count_tokens(ask("你好"))
    engine.context_tokens = tokens + 3
    assert engine.generate([ask("你好")], GREEDY)[0].completion_tokens <= 3
    engine.context_tokens = tokens
    for call in (
        lambda: engine.generate([ask("你好")], GREEDY),
        lambda: list(engine.stream(ask("你好"), GREEDY)),
    ):
        with pytest.raises(
            PromptTooLong, match=f"the prompt has {tokens} tokens, there is room for {tokens - 1}"
        ):
            call()


@pytest.mark.slow
def test_a_long_prompt_does_not_cut_the_answers_beside_it(engine: TorchEngine, restore: None) -> None:
    free = engine.generate([ask(text) for text in QUESTIONS], GREEDY)
    lengths = [len(engine.prompt_ids(ask(text))) for text in QUESTIONS]
    engine.context_tokens = max(lengths) + 4
    for length, before, reply in zip(
        lengths, free, engine.generate([ask(text) for text in QUESTIONS], GREEDY), strict=True
    ):
        assert reply.token_ids == before.token_ids[: engine.context_tokens - length]


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [True, False])
def test_cancel_stops_within_a_token_and_frees_the_memory(
    engine: TorchEngine, restore: None, streamed: bool
) -> None:
    engine.end_ids, engine.context_tokens = set(), None
    cancel, forwards = threading.Event(), []
    settings = GenerationSettings(max_new_tokens=5000)
    engine.generate([ask("你好")], GREEDY)  # what the first answer leaves behind for good
    before = tensors_alive()

    def count(*call: Any) -> None:
        forwards.append(1)
        if len(forwards) == 5:
            cancel.set()

    hook = engine.model.register_forward_hook(count)
    try:
        if streamed:
            pieces = list(engine.stream(ask("你好"), settings, cancel=cancel))
            reply = pieces[-1].reply
            assert reply is not None and reply.text == "".join(piece.text for piece in pieces)
        else:
            reply = engine.generate([ask("你好")], settings, cancel=cancel)[0]
    finally:
        hook.remove()
    assert (len(forwards), reply.completion_tokens, reply.finish_reason) == (5, 5, "cancelled")
    assert tensors_alive() == before, "keys, values and sequences are gone"


def tensors_alive() -> int:
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


def test_leaving_a_stream_ends_its_thread(engine: TorchEngine, restore: None) -> None:
    """Its thread waits in the fortieth forward until it is told to stop, and makes no other."""
    engine.end_ids = set()
    engine.context_tokens = None
    cancel, forwards = threading.Event(), []

    def count(*call: Any) -> None:
        forwards.append(1)
        if len(forwards) == 40:
            cancel.wait()

    hook = engine.model.register_forward_hook(count)
    try:
        stream = engine.stream(ask("你好"), GenerationSettings(max_new_tokens=5000), cancel=cancel)
        next(stream)
        stream.close()  # type: ignore[attr-defined]
    finally:
        hook.remove()
    assert len(forwards) <= 40
    assert not any(thread.name == "tuoling-generate" for thread in threading.enumerate())


def test_an_error_inside_generation_comes_out_of_the_stream(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(**kwargs: Any) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(engine.model, "generate", broken)
    with pytest.raises(RuntimeError, match="boom"):
        list(engine.stream(ask("你好"), GREEDY))


def test_score_is_the_cross_entropy_of_the_answer_and_its_end(engine: TorchEngine) -> None:
    conversation = ask("三加五").answered("等于八")
    ids, spans = engine.tokenizer.encode_segments(engine.template.render(conversation))
    asked = torch.tensor([ids], device=engine.device)
    with torch.no_grad():
        log_probs = engine.model(asked, use_cache=False).logits[0].double().log_softmax(-1)
    learned = [position for begin, end in spans for position in range(begin, end)]
    expected = -sum(float(log_probs[position - 1, ids[position]]) for position in learned)
    score = engine.score([conversation])[0]
    assert score.tokens == len(learned) > 1 and ids[learned[-1]] == 2
    assert score.nats == pytest.approx(expected, rel=1e-5)


def test_no_conversations_no_replies(engine: TorchEngine) -> None:
    assert engine.generate([], GREEDY) == []
