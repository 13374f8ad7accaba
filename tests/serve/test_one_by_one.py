"""A GGUF model behind the same server: llama.cpp answers one caller after the other."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from tests.gguf_files import write_gguf_of
from tests.serve.live import HTTP, Live, live
from tests.serve.scripted_engine import ScriptedEngine
from tests.tiny import tiny_model

from tuoling.errors import TuolingError
from tuoling.files import write_json
from tuoling.infer.engine import GenerationSettings
from tuoling.infer.open_engine import open_engine
from tuoling.serve.jobs import Busy, Closing, Failed, Finished, Impossible, Job, Order, TimedOut
from tuoling.serve.one_by_one import OneByOne
from tuoling.serve.server import backend_of
from tuoling.text.conversation import Conversation, Turn

pytest.importorskip("gguf", reason="needs the extra gguf")
pytest.importorskip("llama_cpp", reason="needs the extra gguf")

GREEDY = GenerationSettings(max_new_tokens=16)
ASKED = Conversation((Turn("user", "三加五"),))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    place = tmp_path_factory.mktemp("gguf")
    folder = tiny_model(place / "m", "llama")
    write_json(folder / "template.json", {"template": "domain_bloom", "stops": []})
    write_gguf_of(folder, place / "m.gguf")
    made = open_engine(str(place / "m.gguf"), dtype="fp32")
    yield made
    made.close()


@pytest.fixture(scope="module")
def server(engine: Any) -> Iterator[Live]:
    backend = backend_of(engine, rows=16, waiting=8)
    assert isinstance(backend, OneByOne)
    with live(backend, {"m": engine}) as running:
        yield running
    backend.close()


def chat(server: Live, **values: Any) -> Any:
    messages = [{"role": "user", "content": "三加五"}]
    values = {"model": "m", "max_tokens": 16, "temperature": 0, **values}
    return server.client().chat.completions.create(messages=messages, **values)


@pytest.mark.slow
def test_answers_are_the_engines(server: Live, engine: Any) -> None:
    reply = engine.generate([ASKED], GREEDY)[0]
    got = chat(server)
    assert got.choices[0].message.content == reply.text
    assert got.usage.completion_tokens == reply.completion_tokens
    chunks = list(chat(server, stream=True, stream_options={"include_usage": True}))
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == reply.text and sum(bool(text) for text in texts) > 3
    assert chunks[-1].usage == got.usage
    stop = reply.text[3:5]
    assert chat(server, stop=stop).choices[0].message.content == reply.text[: reply.text.index(stop)]
    plain = engine.generate([Conversation((Turn("text", "今天"),))], GREEDY)[0].text
    asked = {"model": "m", "prompt": "今天", "max_tokens": 16, "temperature": 0}
    assert server.post("/v1/completions", asked).json()["choices"][0]["text"] == plain
    question = {"question": "三加五", "max_new_tokens": 16, "do_sample": False}
    assert server.post("/generate", question).json() == {"answer": reply.text}


@pytest.mark.slow
def test_several_answers_have_their_seeds(server: Live, engine: Any) -> None:
    values: dict[str, Any] = {"n": 3, "seed": 3, "temperature": 1.0}
    texts = [choice.message.content for choice in chat(server, **values).choices]
    assert texts == [choice.message.content for choice in chat(server, **values).choices]
    assert len(set(texts)) == 3
    drawn = replace(GREEDY, do_sample=True, temperature=1.0, seed=3)
    assert texts[0] == engine.generate([ASKED], drawn)[0].text


@pytest.mark.slow
def test_what_it_cannot_do_is_refused(server: Live) -> None:
    for asked, path in (
        ({"messages": [{"role": "user", "content": "x"}], "logprobs": True}, "/v1/chat/completions"),
        ({"prompt": [1, 2, 3]}, "/v1/completions"),
    ):
        got = server.post(path, {"model": "m", "max_tokens": 4, **asked})
        assert got.status_code == 400 and got.json()["error"]["message"]
    assert HTTP.get(f"{server.url}/health").status_code == 200


def test_callers_at_once_take_turns(server: Live, engine: Any) -> None:
    texts: list[str] = []
    callers = [
        threading.Thread(target=lambda: texts.append(chat(server).choices[0].message.content))
        for _ in range(6)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert texts == [engine.generate([ASKED], GREEDY)[0].text] * 6


class Waiting:
    """Collects a job's events."""

    def __init__(self, engine: Any, **order: Any) -> None:
        self.events: list[Any] = []
        self.begun, self.over = threading.Event(), threading.Event()
        self.job = Job(Order(engine, (ASKED,), order.pop("settings", GREEDY), **order), self._put)

    def _put(self, event: Any) -> None:
        self.events.append(event)
        self.begun.set()
        if isinstance(event, Finished | Failed):
            self.over.set()

    def error(self) -> TuolingError:
        assert self.over.wait(60)
        assert isinstance(self.events[-1], Failed), self.events[-1]
        return self.events[-1].error


ENDLESS = GenerationSettings(max_new_tokens=1 << 20)


def test_leaving_overdue_full_and_closing() -> None:
    """The engine would talk for a quarter of an hour: whoever goes first has no influence."""
    engine = ScriptedEngine(lambda conversation: "好" * ENDLESS.max_new_tokens, pace_s=0.001)
    backend = OneByOne(waiting=1)
    running, next_one = Waiting(engine, settings=ENDLESS), Waiting(engine, timeout_s=0.0, settings=ENDLESS)
    backend.submit(running.job)
    assert running.begun.wait(60)
    backend.submit(next_one.job)
    with pytest.raises(Busy) as busy:
        backend.submit(Waiting(engine).job)
    assert busy.value.retry_after_s >= 1 and backend.load() == (1, 1)
    backend.cancel(running.job)
    assert isinstance(next_one.error(), TimedOut)
    assert not any(isinstance(event, Finished | Failed) for event in running.events)
    with pytest.raises(Impossible):
        backend.submit(Job(Order(engine, ((1, 2),), GREEDY), print))
    cut = Waiting(engine, settings=ENDLESS)
    backend.submit(cut.job)
    assert cut.begun.wait(60)
    backend.close(0.0)
    assert isinstance(cut.error(), Closing) and engine.at_once == 0
    with pytest.raises(Closing):
        backend.submit(Waiting(engine).job)


@pytest.mark.slow
def test_the_events_of_a_refusal_are_json(server: Live) -> None:
    got = server.post("/v1/chat/completions", {"model": "other", "messages": []})
    assert got.status_code == 404 and json.loads(got.text)["error"]["code"] == "model_not_found"
