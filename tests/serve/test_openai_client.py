"""The real `openai` client against a live server: what it gets is what the engine says."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.infer.test_adapters import save_adapter_on
from tests.serve.live import HTTP, Live, live
from tests.tiny import tiny_model

from tuoling.api import load
from tuoling.infer.engine import GenerationSettings
from tuoling.infer.torch_engine import TorchEngine
from tuoling.serve.batching import Batcher
from tuoling.serve.server import names_of
from tuoling.text.conversation import Conversation, Turn

openai = pytest.importorskip("openai", reason="needs the openai client of the extra dev")

GREEDY = GenerationSettings(max_new_tokens=24)
LONG = 24


def ask(*texts: str) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(tuple(Turn(roles[at % 2], text) for at, text in enumerate(texts)))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchEngine]:
    """A run's adapter, another one on the same base, and the base."""
    root = tmp_path_factory.mktemp("served")
    base = tiny_model(root / "llama", "llama")
    query = ["q_proj", "v_proj"]
    law = save_adapter_on(base, root / "law", seed=1, template="domain_bloom", targets=query)
    med = save_adapter_on(base, root / "med", seed=2, template="alpaca", targets=["up_proj", "q_proj"])
    with load(law, adapters={"med": str(med)}, device="cpu", dtype="fp32") as model:
        assert isinstance(model.engine, TorchEngine)
        yield model.engine


@pytest.fixture(scope="module")
def server(engine: TorchEngine) -> Iterator[Live]:
    backend = Batcher(engine, rows=4)
    with live(backend, dict(names_of(engine, "law").engines)) as running:
        yield running
    backend.close()


@pytest.fixture(scope="module")
def client(server: Live) -> Any:
    return server.client()


def chat(client: Any, text: str = "你好", **values: Any) -> Any:
    values = {"model": "law", "max_tokens": LONG, "temperature": 0, **values}
    return client.chat.completions.create(messages=[{"role": "user", "content": text}], **values)


@pytest.mark.slow
def test_a_chat_is_the_engines_answer(client: Any, engine: TorchEngine) -> None:
    for text in ("你好", "三加五"):
        reply = engine.generate([ask(text)], GREEDY)[0]
        got = chat(client, text)
        choice = got.choices[0]
        assert (choice.message.content, choice.message.role) == (reply.text, "assistant")
        assert choice.finish_reason == reply.finish_reason
        assert got.usage.prompt_tokens == reply.prompt_tokens
        assert got.usage.completion_tokens == reply.completion_tokens
        assert got.usage.total_tokens == reply.prompt_tokens + reply.completion_tokens
        assert got.model == "law" and got.object == "chat.completion" and got.id.startswith("chatcmpl-")


@pytest.mark.slow
def test_several_turns_and_a_system_text(client: Any, engine: TorchEngine) -> None:
    got = client.chat.completions.create(
        model="law",
        messages=[
            {"role": "system", "content": "说中文"},
            {"role": "user", "content": [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]},
            {"role": "assistant", "content": "你好"},
            {"role": "user", "content": "三加五"},
        ],
        max_completion_tokens=LONG,
        temperature=0,
    )
    turns = (Turn("system", "说中文"), *ask("你好", "你好", "三加五").turns)
    assert got.choices[0].message.content == engine.generate([Conversation(turns)], GREEDY)[0].text


@pytest.mark.slow
def test_a_stream_with_usage_says_the_same(client: Any) -> None:
    whole = chat(client, "三加五")
    chunks = list(chat(client, "三加五", stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == whole.choices[0].message.content
    assert sum(bool(text) for text in texts) > 3  # it came in pieces
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == whole.choices[0].finish_reason and not any(reasons[:-1])
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1
    plain = list(chat(client, "三加五", stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in plain)


@pytest.mark.slow
def test_a_stop_ends_the_answer_and_is_not_in_it(client: Any) -> None:
    whole = chat(client, "三加五").choices[0].message.content
    assert len(whole) > 6
    stop = whole[4:6]
    got = chat(client, "三加五", stop=[stop, "never said"])
    assert got.choices[0].message.content == whole[: whole.index(stop)]
    assert got.choices[0].finish_reason == "stop"
    streamed = chat(client, "三加五", stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == whole[: whole.index(stop)]


@pytest.mark.slow
def test_n_answers_have_seeds_of_their_own(client: Any, engine: TorchEngine) -> None:
    """The first of them is what the engine draws with that seed; all of them come again with it."""
    values: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "seed": 7, "n": 3}
    first, again = chat(client, **values), chat(client, **values)
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2] and len(set(texts)) == 3
    own = GREEDY.with_values({"temperature": 0.9, "top_p": 0.95, "seed": 7})
    assert texts[0] == engine.generate([ask("你好")], own)[0].text
    assert [choice.message.content for choice in chat(client, **{**values, "seed": 8}).choices] != texts
    assert first.usage.prompt_tokens == chat(client).usage.prompt_tokens  # counted once
    streamed: dict[int, str] = {}
    for chunk in chat(client, **values, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + (choice.delta.content or "")
    assert [streamed[at] for at in range(3)] == texts


@pytest.mark.slow
@torch.no_grad()
def test_logprobs_are_the_models(client: Any, engine: TorchEngine) -> None:
    got = chat(client, logprobs=True, top_logprobs=3)
    reply = engine.generate([ask("你好")], GREEDY)[0]
    prompt = engine.prompt_ids(ask("你好"))
    with engine.selected():
        ids = torch.tensor([[*prompt, *reply.token_ids]])
        logs = engine.model(input_ids=ids).logits[0].double().log_softmax(-1)[len(prompt) - 1 :]
    said = got.choices[0].logprobs.content
    assert len(said) == len(reply.token_ids)
    for at, (one, token) in enumerate(zip(said, reply.token_ids, strict=True)):
        assert one.logprob == pytest.approx(float(logs[at, token]), abs=1e-4)
        best = [other.logprob for other in one.top_logprobs]
        assert best == pytest.approx(logs[at].topk(3).values.tolist(), abs=1e-4)
        assert one.token == engine.tokenizer.raw_decode([token], keep_special=True)
    streamed: list[Any] = []
    for chunk in chat(client, logprobs=True, top_logprobs=3, stream=True):
        if chunk.choices and chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content
    assert [one.logprob for one in streamed] == pytest.approx([one.logprob for one in said], abs=1e-5)


@pytest.mark.slow
def test_completions_go_on_with_the_text(client: Any, engine: TorchEngine) -> None:
    plain = Conversation((Turn("text", "今天天气"),))
    reply = engine.generate([plain], GREEDY)[0]
    got = client.completions.create(
        model="law", prompt="今天天气", max_tokens=LONG, temperature=0, logprobs=2
    )
    assert got.choices[0].text == reply.text
    logs = got.choices[0].logprobs
    assert len(logs.tokens) == len(logs.token_logprobs) == len(logs.top_logprobs) == len(reply.token_ids)
    ids = engine.prompt_ids(plain)
    several = client.completions.create(
        model="law", prompt=[ids, engine.prompt_ids(ask("三加五"))], max_tokens=LONG, temperature=0
    )
    assert several.choices[0].text == reply.text
    assert several.choices[1].text == engine.generate([ask("三加五")], GREEDY)[0].text
    pieces = client.completions.create(
        model="law", prompt="今天天气", max_tokens=LONG, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in pieces) == reply.text


@pytest.mark.slow
def test_the_models_name_chooses_the_adapter(client: Any, engine: TorchEngine) -> None:
    """Each with its own template; those of one moment share their steps."""
    from concurrent.futures import ThreadPoolExecutor

    names = [model.id for model in client.models.list()]
    assert names == ["law", "base", "med"]
    assert client.models.retrieve("med").id == "med"
    wanted = {"law": engine, "med": engine.using("med"), "base": engine.using("base")}
    texts = {name: one.generate([ask("你好")], GREEDY)[0].text for name, one in wanted.items()}
    assert len(set(texts.values())) == 3
    with ThreadPoolExecutor(6) as pool:
        order = names * 2
        got = list(pool.map(lambda name: chat(client, model=name).choices[0].message.content, order))
    assert got == [texts[name] for name in order]


@pytest.mark.slow
def test_embeddings_are_refused_politely(client: Any) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.with_options(max_retries=2).embeddings.create(model="law", input="你好")
    assert caught.value.status_code == 501
    assert "embedding" in caught.value.message and caught.value.code == "unsupported"


@pytest.mark.slow
def test_questions_in_the_plain_form(server: Live, engine: TorchEngine) -> None:
    """{"question"} → {"answer"}, and the stream that writes a line a piece."""
    text = engine.generate([ask("三加五")], GREEDY)[0].text
    asked = {"question": "三加五", "max_new_tokens": LONG, "do_sample": False}
    for path in ("/", "/generate"):
        got = server.post(path, asked)
        assert got.status_code == 200 and got.json() == {"answer": text}
    for path in ("/stream", "/generate/stream"):
        got = server.post(path, asked)
        assert got.headers["content-type"].startswith("text/plain")
        lines = got.text.split("\n")
        assert lines[-1] == "" and len(lines) > 4
        assert "".join(lines[:-1]).replace("<FN>", "\n") == text
    assert (
        server.post("/generate", {"question": "三加五", "model": "med", "max_tokens": 4}).status_code == 200
    )


@pytest.mark.slow
def test_health_and_counts(server: Live, client: Any) -> None:
    assert HTTP.get(f"{server.url}/health").json() == {"status": "ok"}
    before = server.metric("tuoling_completion_tokens_total")
    got = chat(client)
    assert server.metric("tuoling_completion_tokens_total") - before == got.usage.completion_tokens
    assert server.metric("tuoling_resident_bytes") > 1e7
    assert server.metric("tuoling_running") == 0


@pytest.mark.slow
def test_the_recipe_shows_every_call(
    server: Live, client: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the guide tells users to run; the answers in it are those of the client."""
    script = Path(__file__).parents[2] / "recipes" / "openai_client.py"
    monkeypatch.setattr(sys, "argv", [str(script), f"{server.url}/v1", "三加五"])
    for name in ("ALL_PROXY", "HTTP_PROXY", "all_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    runpy.run_path(str(script), run_name="__main__")
    said = capsys.readouterr().out
    whole = chat(client, "三加五", max_tokens=64)
    assert f"chat: {whole.choices[0].message.content}\n" in said
    assert said.count(str(whole.usage.to_dict())) == 2, "the whole answer's and the stream's"
    assert "the same with the same seed: True" in said and said.count("logprobs: ") == 3
    assert "NotFoundError 404" in said and "model_not_found" in said
    assert "BadRequestError 400" in said and "'param': 'temperature'" in said
    assert "temperature=-1.0 is out of range; from 0 to 10" in said
