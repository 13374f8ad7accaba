"""The page's talk without a browser: what is kept, what the model sees, what is saved, who is next."""

from __future__ import annotations

import json
from threading import Event, Thread
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.serve.scripted_engine import WAIT, ScriptedEngine

from tuoling.data.formats import get_format
from tuoling.errors import UsageError
from tuoling.infer.engine import GenerationSettings
from tuoling.language import speaking
from tuoling.serve.engine_queue import EngineQueue
from tuoling.serve.web_answer import Frame, WebModels, Wish, answer, context_used, summary
from tuoling.serve.web_controls import KNOBS, defaults, idle_knobs, wish_of
from tuoling.serve.web_messages import CURSOR, as_markdown, from_markdown, messages
from tuoling.serve.web_talk import Answer, Exchange, Talk
from tuoling.text.conversation import Conversation

ANSWERS = st.builds(
    Answer,
    model=st.text(max_size=5),
    text=st.text(),
    finish=st.sampled_from(["stop", "length", "cancelled", "error", ""]),
    tokens=st.integers(0, 9999),
    context_tokens=st.integers(0, 9999),
    tokens_per_s=st.floats(0, 1e4),
    note=st.text(max_size=9),
    edited=st.booleans(),
)
TALKS = st.builds(
    lambda parts: Talk(tuple(Exchange(q, tuple(a)) for q, a in parts)),
    st.lists(st.tuples(st.text(), st.lists(ANSWERS, max_size=2)), max_size=4),
)


def echo(conversation: Conversation) -> str:
    return f"第{len(conversation.turns)}句：{conversation.turns[-1].text}"


def models(**engines: ScriptedEngine) -> WebModels:
    return WebModels(engines or {"tuned": ScriptedEngine(echo)})


def last_frame(chosen: WebModels, talk: Talk, question: str, **wish: Any) -> Frame:
    cancel = wish.pop("cancel", None) or Event()
    wish = {"models": (chosen.names[0],), "settings": GenerationSettings(), **wish}
    *_, last = answer(chosen, talk, question, Wish(**wish), cancel)
    assert last.done
    return last


@pytest.mark.slow
@given(TALKS)
def test_a_browser_gives_back_what_it_was_given(talk: Talk) -> None:
    assert Talk.from_json(json.loads(json.dumps(talk.to_json()))) == talk


@pytest.mark.parametrize(
    "nonsense",
    [
        None,
        "x",
        7,
        [1],
        [{"question": 1, "answers": []}],
        [{"question": "q", "answers": [{"text": "no model"}]}],
        [{"question": "q", "answers": [{"model": "m", "text": 5}]}],
        [{"question": "q", "answers": [{"model": "m"}] * 3}],
    ],
)
def test_nonsense_from_a_browser_is_an_empty_talk(nonsense: Any) -> None:
    assert Talk.from_json(nonsense) == Talk()


@pytest.mark.slow
@given(st.text(alphabet="<>&ltamp;`~b/! \n你", max_size=40))
def test_html_is_shown_and_comes_back(text: str) -> None:
    shown = as_markdown(text)
    assert from_markdown(shown) == text


def test_html_is_shown_outside_of_code_only() -> None:
    text = "a <b>x</b> `<i>` 1 < 2\n```\n<p>\n```\n<script>"
    assert as_markdown(text) == "a &lt;b>x&lt;/b> `<i>` 1 < 2\n```\n<p>\n```\n&lt;script>"


def test_the_model_sees_the_talk_and_the_system_text() -> None:
    chosen = models()
    first = last_frame(chosen, Talk(), "你好", system="你是助手").talk
    second = last_frame(chosen, first, "再见", system="你是助手").talk
    engine = chosen.first
    assert isinstance(engine, ScriptedEngine)
    assert [(turn.role, turn.text) for turn in engine.asked[-1][0].turns] == [
        ("system", "你是助手"),
        ("user", "你好"),
        ("assistant", "第2句：你好"),
        ("user", "再见"),
    ]
    assert second.history(0) == [("你好", "第2句：你好"), ("再见", "第4句：再见")]
    assert context_used(second) == len("你是助手\n你好\n第2句：你好\n再见") + len("第4句：再见")


def test_rows_are_rows_that_training_reads() -> None:
    chosen = models(tuned=ScriptedEngine(echo), base=ScriptedEngine(lambda c: "不知道"))
    talk = last_frame(chosen, Talk(), "你好", models=("tuned", "base"), system="你是助手").talk
    talk = talk.corrected(0, 1, "你好呀")
    first, second = (json.loads(line) for line in talk.jsonl("你是助手").splitlines())
    assert first["messages"] == [
        {"role": "system", "content": "你是助手"},
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "第2句：你好"},
    ]
    assert (first["model"], second["model"]) == ("tuned", "base")
    assert second["messages"][-1]["content"] == "你好呀"
    parsed = get_format("messages").parse(first)
    assert [turn.role for turn in parsed.turns] == ["system", "user", "assistant"]
    assert (
        Talk().jsonl(None) == "" and talk.asked("没有回答", [Answer("tuned")]).jsonl(None).count("没有") == 0
    )


def test_stopped_at_once_and_never_asked() -> None:
    chosen = models()
    cancel = Event()
    cancel.set()
    last = last_frame(chosen, Talk(), "你好", cancel=cancel)
    assert last.talk.exchanges[0].answers == (Answer("tuned", finish="cancelled"),)
    assert chosen.first.asked == []  # type: ignore[attr-defined]


def test_leaving_midway_frees_the_engine() -> None:
    chosen = models(tuned=ScriptedEngine(lambda conversation: "好" + WAIT))
    engine = chosen.first
    assert isinstance(engine, ScriptedEngine)
    frames = answer(chosen, Talk(), "你好", Wish(("tuned",), GenerationSettings()), Event())
    next(frame for frame in frames if frame.talk.exchanges[-1].answers[0].text == "好")
    assert len(chosen.queue) == 1 and engine.at_once == 1
    frames.close()
    assert len(chosen.queue) == 0 and engine.at_once == 0


def test_an_error_is_part_of_the_answer_and_the_page_goes_on() -> None:
    def fail(conversation: Conversation) -> str:
        raise RuntimeError("CUDA out of memory")

    chosen = models(tuned=ScriptedEngine(fail), base=ScriptedEngine(echo))
    talk = last_frame(chosen, Talk(), "你好", models=("tuned", "base")).talk
    failed, good = talk.exchanges[0].answers
    assert (failed.finish, failed.note) == ("error", "RuntimeError: CUDA out of memory")
    assert good.finish == "stop" and len(chosen.queue) == 0
    assert talk.history(0) == [] and talk.history(1) == [("你好", "第1句：你好")]


def test_a_question_longer_than_the_context_says_the_number() -> None:
    chosen = models(tuned=ScriptedEngine(echo, context_tokens=30))
    with speaking("en"):
        note = last_frame(chosen, Talk(), "长" * 50).talk.exchanges[0].answers[0].note
    assert "50 tokens" in note and "shorten the question" in note


def test_old_turns_are_left_out_and_it_is_said() -> None:
    chosen = models(tuned=ScriptedEngine(echo, context_tokens=60))
    talk = last_frame(chosen, Talk(), "一" * 20).talk
    with speaking("zh"):
        later = last_frame(chosen, talk, "二" * 20).talk
    assert "最早的 1 轮" in later.exchanges[-1].answers[0].note
    assert [turn.text for turn in chosen.first.asked[-1][0].turns] == ["二" * 20]  # type: ignore[attr-defined]


def test_messages_know_what_they_show() -> None:
    talk = Talk(
        (
            Exchange("q1", (Answer("a", "x", note="careful"), Answer("b", "y"))),
            Exchange("q2", (Answer("a", "gro", beams=("gri", "gra")),)),
        )
    )
    shown, places = messages(talk, 0, answering=0)
    assert [message["content"] for message in shown] == [
        "q1",
        "x",
        "careful",
        "q2",
        "gro" + CURSOR,
        "2. gri\n\n3. gra",
    ]
    kinds = [(place.exchange, place.is_question) if place else None for place in places]
    assert kinds == [(0, True), (0, False), None, (1, True), (1, False), None]
    assert [message["content"] for message in messages(talk, 1)[0]][:2] == ["q1", "y"]


def test_people_are_let_in_in_the_order_they_came() -> None:
    queue = EngineQueue()
    with queue.join() as first:
        second, third = queue.join(), queue.join()
        assert (first.ahead(0), second.ahead(0), third.ahead(0)) == (0, 1, 2)
        seen: list[int] = []
        waiting = Thread(target=lambda: seen.append(third.ahead(wait_s=30)))
        waiting.start()
        with second:  # the one before gives up
            pass
        waiting.join()
        assert seen == [1]
    assert third.ahead(0) == 0 and len(queue) == 1


def test_two_places_let_two_in() -> None:
    queue = EngineQueue(places=2)
    tickets = [queue.join() for _ in range(4)]
    assert [ticket.ahead(0) for ticket in tickets] == [0, 0, 1, 2]


def values(**changes: Any) -> list[Any]:
    given = defaults(models()) | changes
    return [given[name] for name in KNOBS]


def test_the_panel_begins_with_the_models_own_settings() -> None:
    chosen = models()
    wish = wish_of(values(), chosen)
    assert wish == Wish(("tuned",), chosen.first.defaults, "", 1000)


def test_sampling_knobs_count_only_while_sampling() -> None:
    chosen = models()
    assert wish_of(values(temperature=0.3, seed=5), chosen).settings == chosen.first.defaults
    sampled = wish_of(values(do_sample=True, temperature=0.3, seed=5), chosen).settings
    assert (sampled.temperature, sampled.seed, sampled.samples) == (0.3, 5, True)
    with pytest.raises(UsageError):
        wish_of(values(do_sample=True, temperature=-1), chosen)


@pytest.mark.parametrize(
    ("changes", "idle"),
    [
        ({}, {"temperature", "top_p", "top_k", "seed", "show_beams"}),
        ({"do_sample": True, "num_beams": 4}, set()),
        ({"do_sample": True, "temperature": 0}, {"top_p", "top_k", "seed", "show_beams"}),
        ({"num_beams": 4}, {"temperature", "top_p", "top_k", "seed"}),
    ],
)
def test_knobs_without_effect_are_known(changes: dict[str, Any], idle: set[str]) -> None:
    assert idle_knobs(dict(zip(KNOBS, values(**changes), strict=True))) == idle


def test_a_summary_in_the_readers_language() -> None:
    talk = Talk((Exchange("q", (Answer("a", "x", "length", 12, 20, 3.25), Answer("b", "", "cancelled"))),))
    with speaking("en"):
        assert summary(talk) == "12 tokens · 3.2 tokens/s · cut at the longest length  |  stopped"
    with speaking("zh"):
        assert summary(talk) == "12 tokens · 3.2 tokens/s · 已到长度上限  |  已停止"
