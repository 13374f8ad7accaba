"""The engine over a server: what is sent, what comes back, what breaks; with a scripted server on localhost."""

from __future__ import annotations

import stat
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from tests.openai_server import FakeOpenAI, Fault, serve
from tests.tiny import tiny_model

from tuoling.api import load
from tuoling.errors import EndpointError, MissingPackage, ModelError, UsageError
from tuoling.files import write_json
from tuoling.infer.engine import GenerationSettings, PromptTooLong
from tuoling.infer.open_engine import open_engine
from tuoling.text.conversation import Conversation, Turn

PLAIN = GenerationSettings(max_new_tokens=32)


def ask(text: str, system: str = "") -> Conversation:
    turns = [Turn("system", system)] if system else []
    return Conversation((*turns, Turn("user", text)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_model(tmp_path_factory.mktemp("vllm") / "m", "qwen2")
    write_json(folder / "template.json", {"template": "domain_bloom", "stops": ["\n用户:"], "system": "短"})
    return folder


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("tuoling.infer.client.FIRST_BACKOFF_S", 0.001)
    with serve(lambda body: "好的，再见") as state:
        yield state


@pytest.mark.slow
def test_a_model_that_is_here_is_asked_in_token_ids(model: Path, server: FakeOpenAI) -> None:
    with load(model, endpoint=server.url) as loaded, load(model, device="cpu", dtype="fp32") as here:
        engine: Any = loaded.engine
        conversation = ask("你好", "短")
        reply = engine.generate([conversation], PLAIN)[0]
        assert (reply.text, reply.finish_reason, reply.completion_tokens) == ("好的，再见", "stop", 5)
        sent = server.requests[-1]
        ids = here.engine.prompt_ids(conversation)  # type: ignore[attr-defined]
        assert sent["prompt"] == ids and sent["model"] == "test", "the very ids that torch would read"
        assert sent["stop"] == ["\n用户:"] and sent["stop_token_ids"] == [2]
        assert (sent["max_tokens"], sent["temperature"]) == (32, 0.0)
        assert not {"seed", "top_k", "top_p", "repetition_penalty", "min_tokens"} & sent.keys()
        assert engine.count_tokens(conversation) == len(ids) and engine.system == "短"
        assert engine.prompt_text(conversation) == here.engine.prompt_text(conversation)


@pytest.mark.slow
def test_knobs_go_out_under_their_names(model: Path, server: FakeOpenAI, capsys: Any) -> None:
    with load(model, endpoint=server.url) as loaded:
        settings = loaded.settings(
            temperature=0.7, top_p=0.9, top_k=20, seed=5, min_new_tokens=3, repetition_penalty=1.2, stop="完"
        )
        loaded.engine.generate([ask("你好")], settings)
        sent = server.requests[-1]
        names = ("temperature", "top_p", "top_k", "seed", "min_tokens", "repetition_penalty")
        assert [sent[name] for name in names] == [0.7, 0.9, 20, 5, 3, 1.2]
        assert sent["stop"] == ["\n用户:", "完"]
        loaded.engine.generate([ask("你好")], settings)
        assert capsys.readouterr().err.count("repetition penalty counts the question's words too") == 1
        for bad in ({"num_beams": 4}, {"no_repeat_ngram_size": 3}):
            with pytest.raises(UsageError, match=next(iter(bad))):
                loaded.engine.generate([ask("你好")], loaded.settings(**bad))
        with pytest.raises(UsageError, match="how likely"):
            loaded.engine.score([ask("你好").answered("好")])


def test_a_stream_is_the_answer_in_pieces_and_leaving_it_ends_it(model: Path, server: FakeOpenAI) -> None:
    with load(model, endpoint=server.url) as loaded:
        pieces = list(loaded.engine.stream(ask("你好"), PLAIN))
        assert [piece.text for piece in pieces] == ["好的，", "再见", ""]
        assert pieces[-1].reply == loaded.engine.generate([ask("你好")], PLAIN)[0]
        cancel = threading.Event()
        cancel.set()
        stopped = list(loaded.engine.stream(ask("你好"), PLAIN, cancel=cancel))
        assert stopped[-1].reply is not None and stopped[-1].reply.finish_reason == "cancelled"
        assert "".join(piece.text for piece in stopped) == stopped[-1].reply.text == "好的，"


def test_an_answer_is_gone_on_with_where_it_was_cut(model: Path, server: FakeOpenAI) -> None:
    with load(model, endpoint=server.url) as loaded:
        engine: Any = loaded.engine
        engine.generate([ask("你好").answered("好的")], PLAIN)
        text = engine.tokenizer.decode(server.requests[-1]["prompt"])
        assert text == "用户:你好\n\n助手:好的"


@pytest.mark.slow
def test_a_name_at_a_server_is_asked_with_messages(server: FakeOpenAI, capsys: Any) -> None:
    with load("test", endpoint=server.url, template="alpaca") as loaded:
        assert "--template without effect" in capsys.readouterr().err
        assert loaded.chat("你好", system="短") == "好的，再见"
        assert server.requests[-1]["messages"] == [
            {"role": "system", "content": "短"},
            {"role": "user", "content": "你好"},
        ]
        assert "".join(loaded.stream("你好")) == "好的，再见"
        assert loaded.generate("从前") == "好的，再见" and server.requests[-1]["prompt"] == "从前"
        loaded.engine.generate([ask("你好").answered("好的")], PLAIN)
        assert server.requests[-1]["continue_final_message"] is True
        assert loaded.engine.count_tokens(ask("你好")) >= 2
    with load("anything", endpoint=f"{server.url}#test") as loaded:
        assert loaded.chat("你好") == "好的，再见"


@pytest.mark.slow
def test_several_at_once_keep_their_order(server: FakeOpenAI) -> None:
    server.answer = lambda body: body["messages"][-1]["content"][::-1]
    server.delay_s = 0.02
    with load("test", endpoint=server.url, concurrency=3) as loaded:
        texts = [f"{number}号" for number in range(9)]
        replies = loaded.engine.generate([ask(text) for text in texts], PLAIN)
        assert [reply.text for reply in replies] == [text[::-1] for text in texts]
        assert 2 <= server.most_at_once <= 3


def test_a_context_that_the_server_names(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt and answer must fit together: vLLM refuses otherwise. The prompt is measured before it is sent."""
    monkeypatch.setattr("tuoling.infer.client.Client.contexts", lambda self: {"test": 24})
    with serve() as server, load(model, endpoint=server.url) as loaded:
        engine: Any = loaded.engine
        server.answer = lambda body: "好"
        tokens = engine.count_tokens(ask("你好"))
        engine.generate([ask("你好")], PLAIN)
        assert server.requests[-1]["max_tokens"] == 24 - tokens
        sent = len(server.requests)
        with pytest.raises(PromptTooLong, match="there is room for 23"):
            engine.generate([ask("你好"), ask("很长" * 30)], PLAIN)
        assert len(server.requests) == sent, "nothing was paid for"


@pytest.mark.slow
def test_an_overflow_that_only_the_server_knew(server: FakeOpenAI) -> None:
    said = "This model's maximum context length is 40 tokens. However, your request has 88 input tokens."
    server.fault_of = lambda number, body: Fault("status", 400, error={"message": said})
    with load("test", endpoint=server.url) as loaded:
        for call in (
            lambda: loaded.engine.generate([ask("长" * 80)], PLAIN),
            lambda: list(loaded.engine.stream(ask("长" * 80), PLAIN)),
        ):
            with pytest.raises(PromptTooLong, match="there is room for 39"):
                call()


@pytest.mark.slow
def test_a_server_that_errs_for_a_moment_is_asked_again(server: FakeOpenAI) -> None:
    server.faults[0] = Fault("status", 503)
    with load("test", endpoint=server.url) as loaded:
        assert loaded.chat("你好") == "好的，再见"
        server.fault_of = lambda number, body: Fault("status", 500)
        with pytest.raises(EndpointError, match="500"):
            loaded.chat("你好")


@pytest.mark.parametrize(
    ("path", "options", "said"),
    [
        ("nobody", {}, r"The server has: test"),
        ("{model}", {"endpoint": "{url}#other"}, "The server has: test"),
        ("test", {"engine": "torch"}, "engine torch asks no server"),
        ("test", {"engine": "mlx", "endpoint": None}, "no engine is called mlx"),
        ("{model}", {"engine": "llama.cpp", "endpoint": None}, "llama.cpp runs GGUF files"),
    ],
)
def test_wrong_calls(model: Path, server: FakeOpenAI, path: str, options: dict[str, Any], said: str) -> None:
    filled = {"endpoint": "{url}", **options}
    for name, value in filled.items():
        filled[name] = value.format(url=server.url) if value else value
    with pytest.raises((UsageError, ModelError), match=said):
        open_engine(path.format(model=model), **filled)  # type: ignore[arg-type]


def test_an_engine_for_gguf_and_one_for_folders(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF\x03\0\0\0")
    with pytest.raises(ModelError, match="a GGUF file runs in") as refused:
        open_engine(str(tmp_path / "m.gguf"), engine="torch")
    assert "--to hf" in str(refused.value.remedy)
    with pytest.raises(TypeError, match="no option warmth"):
        open_engine("x", warmth=1)  # type: ignore[call-arg]


def test_nobody_answers(server: FakeOpenAI) -> None:
    with pytest.raises(EndpointError, match="cannot be reached"):
        open_engine("test", endpoint="http://127.0.0.1:9/v1")


# -- a server of our own -----------------------------------------------------------------------------------------

PROGRAM = """#!{python}
import sys
sys.path[:0] = {path!r}
words = sys.argv[1:]
print("called with", *words, flush=True)
if "fp-bad" in words[1]:
    sys.exit("no kernel image for this card")
from tests.openai_server import serve
with serve(lambda body: " ".join(words), port=int(words[words.index("--port") + 1])) as state:
    import time
    time.sleep(60)
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `vllm` on the PATH that starts the scripted server, which answers with the words it was called with."""
    place = tmp_path / "bin" / "vllm"
    place.parent.mkdir()
    root = Path(__file__).resolve().parents[2]
    place.write_text(PROGRAM.format(python=sys.executable, path=[str(root), str(root / "src")]))
    place.chmod(place.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(place.parent), prepend=":")
    return place


@pytest.mark.slow
def test_vllm_is_started_for_a_path_and_ended_with_its_engine(model: Path, program: Path) -> None:
    engine: Any = open_engine(str(model), engine="vllm", dtype="bf16")
    try:
        said = engine.generate([ask("你好")], PLAIN)[0].text.split()
        assert said[:4] == ["serve", str(model), "--dtype", "bfloat16"] and "127.0.0.1" in said
        child = engine._process._child
        assert child.poll() is None
    finally:
        engine.close()
    assert child.poll() is not None


@pytest.mark.slow
def test_a_vllm_that_does_not_start_says_why(model: Path, program: Path, tmp_path: Path) -> None:
    import shutil

    bad = tmp_path / "fp-bad"
    shutil.copytree(model, bad)
    with pytest.raises(ModelError, match="vllm ended with code 1") as failed:
        open_engine(str(bad), engine="vllm")
    assert "no kernel image" in str(failed.value.remedy)


def test_vllm_that_is_not_installed_is_refused_with_both_ways_on(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(MissingPackage, match="vllm") as missing:
        open_engine(str(model), engine="vllm")
    assert "pip install vllm" in str(missing.value.remedy) and "--endpoint" in str(missing.value.remedy)


def test_an_adapter_is_named_to_vllm_with_its_rank() -> None:
    from tuoling.infer.vllm_process import lora_words

    words = lora_words("law", Path("/runs/law"), 12)
    assert words == ["--enable-lora", "--max-lora-rank", "16", "--lora-modules", "law=/runs/law"]
