"""The llama.cpp engine on tiny models: the answers of the transformers engine, streams, stops, seeds, many turns."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.gguf_files import write_gguf_of
from tests.tiny import tiny_model

from tuoling.errors import MissingPackage, ModelError, UsageError
from tuoling.files import write_json
from tuoling.infer.engine import GenerationSettings, PromptTooLong, Reply
from tuoling.infer.open_engine import open_engine
from tuoling.infer.session import ChatSession
from tuoling.text.conversation import Conversation, Turn

pytest.importorskip("gguf", reason="needs the extra gguf")
pytest.importorskip("llama_cpp", reason="needs the extra gguf")

GREEDY = GenerationSettings(max_new_tokens=24)
QUESTIONS = ["你好", "把下面的句子翻译成英文：今天天气很好。", "三加五", "Write a response", "1 2 3 4", "好"]


def ask(text: str) -> Conversation:
    return Conversation((Turn("user", text),))


def tuned(folder: Path, family: str, **record: Any) -> Path:
    """A random model that says it was tuned with a template."""
    tiny_model(folder, family)
    write_json(folder / "template.json", {"template": "domain_bloom", "stops": [], **record})
    return folder


@pytest.fixture(scope="module", params=["bloom", "llama", "qwen2"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The engine over llama.cpp and the one over transformers, on the same weights."""
    place = tmp_path_factory.mktemp("llamacpp")
    folder = tuned(place / "m", request.param)
    write_gguf_of(folder, place / "m.gguf")
    engines = (
        open_engine(str(place / "m.gguf"), dtype="fp32"),
        open_engine(str(folder), dtype="fp32", device="cpu"),
    )
    yield engines
    for engine in engines:
        engine.close()


@pytest.fixture
def engine(pair: Any) -> Any:
    """llama.cpp's, its end tokens and stops put back."""
    engine = pair[0]
    kept = (set(engine.end_ids), engine.stops, engine.context_tokens)
    yield engine
    engine.end_ids, engine.stops, engine.context_tokens = kept
    engine.model.forget()


def streamed(engine: Any, text: str, settings: GenerationSettings) -> tuple[str, Reply, int]:
    pieces = list(engine.stream(ask(text), settings))
    assert pieces[-1].reply is not None and all(piece.reply is None for piece in pieces[:-1])
    return "".join(piece.text for piece in pieces), pieces[-1].reply, len(pieces)


@pytest.mark.slow
def test_it_answers_as_transformers_does(pair: Any) -> None:
    ours, theirs = pair
    assert ours.template.id == theirs.template.id == "domain_bloom"
    assert ours.stops == theirs.stops and ours.end_ids == theirs.end_ids
    conversations = [ask(text) for text in QUESTIONS]
    for conversation in conversations:
        assert ours.prompt_ids(conversation) == theirs.prompt_ids(conversation)
        assert ours.prompt_text(conversation) == theirs.prompt_text(conversation)
    assert ours.generate(conversations, GREEDY) == theirs.generate(conversations, GREEDY)


@pytest.mark.slow
@pytest.mark.parametrize(
    "values", [{"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 12}]
)
def test_the_knobs_are_transformers(pair: Any, engine: Any, values: dict[str, Any]) -> None:
    ours, theirs = pair
    first = theirs.generate([ask("三加五")], GREEDY)[0].token_ids[0]
    kept = set(theirs.end_ids)
    try:
        if "min_new_tokens" in values:
            ours.end_ids = theirs.end_ids = kept | {first}
        settings = GREEDY.with_values(values)
        conversations = [ask(text) for text in QUESTIONS[:3]]
        assert ours.generate(conversations, settings) == theirs.generate(conversations, settings)
    finally:
        theirs.end_ids = kept


@pytest.mark.slow
def test_score_is_that_of_transformers(pair: Any) -> None:
    ours, theirs = pair
    talk = [ask("三加五").answered("等于八"), ask("好").answered("The weather is nice today." * 3)]
    for mine, other in zip(ours.score(talk), theirs.score(talk), strict=True):
        assert mine.tokens == other.tokens > 2
        assert mine.nats == pytest.approx(
            other.nats, rel=1e-3 if ours.model.trained_context == 2048 else 1e-5
        )


@pytest.mark.slow
def test_stream_is_batch_and_whole_characters(engine: Any) -> None:
    for text, reply in zip(QUESTIONS, engine.generate([ask(t) for t in QUESTIONS], GREEDY), strict=True):
        engine.model.forget()
        shown, last, count = streamed(engine, text, GREEDY)
        assert (shown, last) == (reply.text, reply) and count > 2


@pytest.mark.slow
def test_nothing_of_a_stop_string_is_shown(engine: Any) -> None:
    checked = 0
    for text in [*QUESTIONS, *(f"{number} 加 {number} 等于多少？" for number in range(12))]:
        whole = engine.generate([ask(text)], GREEDY)[0].text
        places = (n for n in range(len(whole) // 3, len(whole) - 2) if "\ufffd" not in whole[n : n + 2])
        place = next(places, None)
        if place is None or checked == 3:
            continue
        checked += 1
        stop = whole[place : place + 2]
        settings = replace(GREEDY, stop=(stop,))
        reply = engine.generate([ask(text)], settings)[0]
        assert reply.text == whole[: whole.index(stop)] and reply.finish_reason == "stop"
        assert stop not in engine.tokenizer.decode(reply.token_ids[:-1]), (
            "it stopped there and did not run on"
        )
        engine.model.forget()
        assert streamed(engine, text, settings)[:2] == (reply.text, reply)
    assert checked == 3


def test_a_seed_repeats_and_another_differs(engine: Any) -> None:
    settings = GenerationSettings(
        max_new_tokens=16, do_sample=True, temperature=1.5, top_k=40, top_p=0.95, seed=7
    )
    first = engine.generate([ask("你好")], settings)[0]
    assert engine.generate([ask("你好")], settings)[0] == first
    texts = {engine.generate([ask("你好")], replace(settings, seed=seed))[0].text for seed in range(4)}
    assert len(texts) > 1
    free = replace(settings, seed=None)
    assert len({engine.generate([ask("你好")], free)[0].text for _ in range(4)}) > 1


def test_draws_follow_temperature_top_k_and_top_p(engine: Any) -> None:
    """2000 first tokens: all among those that transformers' order of knobs leaves, and about as often."""
    ids = engine.prompt_ids(ask("你好"))
    logits_V = engine.model.logits_of(ids, [len(ids) - 1])[0].astype(np.float64) / 0.7
    top = np.argsort(-logits_V)[:8]
    share = np.exp(logits_V[top] - logits_V[top].max())
    share /= share.sum()
    kept = int(np.searchsorted(np.cumsum(share), 0.9)) + 1
    left = dict(zip(top[:kept].tolist(), (share[:kept] / share[:kept].sum()).tolist(), strict=True))
    settings = GenerationSettings(do_sample=True, temperature=0.7, top_k=8, top_p=0.9, seed=1)
    engine.model.forget()
    engine.model.append(ids)
    sampler = engine._sampler(settings)
    drawn = [sampler.draw(engine.model) for _ in range(2000)]
    sampler.close()
    assert set(drawn) == set(left) and kept > 1
    for token, expected in left.items():
        assert drawn.count(token) / 2000 == pytest.approx(expected, abs=0.05)


def test_cancel_stops_within_a_token(engine: Any) -> None:
    engine.end_ids = set()
    cancel, pieces = threading.Event(), []
    for piece in engine.stream(ask("你好"), GenerationSettings(max_new_tokens=900), cancel=cancel):
        pieces.append(piece)
        if len(pieces) == 5:
            cancel.set()
            shown = len(engine.model.cached)
    reply = pieces[-1].reply
    assert reply is not None and reply.finish_reason == "cancelled"
    assert len(engine.model.cached) <= shown + 1
    assert reply.text == "".join(piece.text for piece in pieces)


def test_cancel_reaches_into_the_computation_of_a_prompt(engine: Any) -> None:
    cancel = threading.Event()
    model = engine.model
    model.require_context(600)
    looked = []

    def cancelled() -> bool:
        looked.append(len(model.cached))
        return len(looked) > 3

    assert not model.append([5] * 500, cancelled)
    assert model.cached == [] and len(looked) > 3, "asked inside the one batch, and nothing of it is kept"
    cancel.set()
    reply = engine.generate([ask("你好")], GREEDY, cancel=cancel)[0]
    assert reply.finish_reason == "cancelled" and reply.completion_tokens == 0


def test_later_turns_compute_only_what_is_new(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    append = engine.model.append
    monkeypatch.setattr(engine.model, "append", lambda ids, *a: computed.append(len(ids)) or append(ids, *a))
    session = ChatSession(engine, GREEDY)
    for question in QUESTIONS[:3]:
        computed.clear()
        "".join(piece.text for piece in session.ask(question))
        prompts = computed[0]
    talk = session.conversation()
    prompt = engine.prompt_ids(Conversation(talk.turns[:-1]))
    assert prompts < len(prompt) / 2
    alone = engine.generate([Conversation(talk.turns[:-1])], GREEDY)[0]
    assert alone.text == talk.turns[-1].text, "the same answer as from an empty context"


def test_the_same_question_again_gets_the_same_draw(engine: Any) -> None:
    settings = GenerationSettings(max_new_tokens=20, do_sample=True, temperature=1.2, seed=3)
    session = ChatSession(engine, settings)
    list(session.ask("你好"))
    first = "".join(piece.text for piece in session.ask("三加五"))
    session.retry()
    assert "".join(piece.text for piece in session.ask("三加五")) == first


def test_two_streams_may_take_turns(engine: Any) -> None:
    wanted = [engine.generate([ask(text)], GREEDY)[0].text for text in QUESTIONS[:2]]
    streams = [engine.stream(ask(text), GREEDY) for text in QUESTIONS[:2]]
    shown = ["", ""]
    open_streams = {0, 1}
    while open_streams:
        for number in sorted(open_streams):
            piece = next(streams[number], None)
            if piece is None:
                open_streams.discard(number)
            else:
                shown[number] += piece.text
    assert shown == wanted


@pytest.mark.slow
def test_the_context_grows_and_ends(engine: Any) -> None:
    engine.end_ids = set()
    small = engine.model._context_tokens
    long = GenerationSettings(max_new_tokens=1500)
    assert engine.generate([ask("你好")], long)[0].completion_tokens == 1500
    assert engine.model._context_tokens == 2048 > small
    tokens = engine.count_tokens(ask("你好"))
    engine.context_tokens = tokens + 3
    assert engine.generate([ask("你好")], GREEDY)[0].completion_tokens == 3
    engine.context_tokens = tokens
    for call in (
        lambda: engine.generate([ask("你好")], GREEDY),
        lambda: list(engine.stream(ask("你好"), GREEDY)),
    ):
        with pytest.raises(PromptTooLong, match=f"the prompt has {tokens} tokens"):
            call()


def test_beams_are_refused_with_a_way_past(engine: Any) -> None:
    with pytest.raises(UsageError, match="no beam search") as error:
        engine.generate([ask("你好")], replace(GREEDY, num_beams=2))
    assert "num_beams=1" in (error.value.remedy or "")


# -- opening -----------------------------------------------------------------------------------------------------


def test_template_stops_system_and_settings_come_from_the_file(tmp_path: Path) -> None:
    folder = tuned(tmp_path / "m", "llama", stops=["。结束"], system="你是驼铃。")
    write_json(
        folder / "generation_config.json", {"do_sample": True, "temperature": 0.3, "eos_token_id": [2, 3]}
    )
    (tmp_path / "place").mkdir()
    write_gguf_of(folder, tmp_path / "place" / "m.gguf", "f16")
    engine: Any = open_engine(str(tmp_path / "place"))
    assert engine.template.id == "domain_bloom" and engine.system == "你是驼铃。"
    assert "。结束" in engine.stops and {2, 3} <= engine.end_ids
    assert engine.defaults == GenerationSettings(do_sample=True, temperature=0.3)
    assert engine.model.metadata["tokenizer.chat_template"]
    before = engine.fingerprint
    engine.close()
    engine = open_engine(str(tmp_path / "place" / "m.gguf"), template="chatml")
    assert engine.template.id == "chatml" and "。结束" not in engine.stops and engine.fingerprint != before
    engine.close()


def test_a_model_of_its_own_chat_template_keeps_it(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", "llama")
    jinja = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    (folder / "chat_template.jinja").write_text(jinja, encoding="utf-8")
    write_gguf_of(folder, tmp_path / "m.gguf")
    ours: Any = open_engine(str(tmp_path / "m.gguf"), dtype="fp32")
    theirs: Any = open_engine(str(folder), dtype="fp32", device="cpu")
    assert ours.template.id == theirs.template.id == "tokenizer"
    talk = Conversation((Turn("user", "你好"), Turn("assistant", "好"), Turn("user", "再见")))
    assert ours.prompt_ids(talk) == theirs.prompt_ids(talk)
    ours.close()


@pytest.mark.slow
def test_files_that_llama_cpp_cannot_use(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", "llama")
    write_gguf_of(folder, tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    for name, data, message in (
        ("magic.gguf", b"GGML" + whole[4:], "not a GGUF file"),
        ("old.gguf", whole[:4] + b"\x01" + whole[5:], "GGUF version 1 is too old"),
        ("cut.gguf", whole[: len(whole) // 2], "llama.cpp cannot use the file: .+"),
        ("empty.gguf", b"", "not a GGUF file"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ModelError, match=message):
            open_engine(str(tmp_path / name))
    with pytest.raises(ModelError, match="several GGUF files"):
        open_engine(str(tmp_path))


@pytest.mark.slow
def test_without_the_package_the_way_to_install_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuoling.infer.llamacpp import llama_library

    folder = tiny_model(tmp_path / "m", "llama")
    write_gguf_of(folder, tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    llama_library.cache_clear()
    try:
        with pytest.raises(MissingPackage, match="llama-cpp-python") as error:
            open_engine(str(tmp_path / "m.gguf"))
        assert 'pip install "tuoling[gguf]"' in (error.value.remedy or "")
    finally:
        llama_library.cache_clear()


@pytest.mark.slow
def test_torch_is_not_needed(tmp_path: Path) -> None:
    """A chat from a GGUF file starts without importing torch or transformers."""
    import subprocess

    folder = tuned(tmp_path / "m", "llama")
    write_gguf_of(folder, tmp_path / "m.gguf")
    code = (
        "import sys; from tuoling.infer.open_engine import open_engine; "
        f"engine = open_engine({str(tmp_path / 'm.gguf')!r}); "
        "print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    assert torch is not None
