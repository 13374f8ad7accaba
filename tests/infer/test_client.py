"""The client against a scripted server: what it asks, when it asks again, what it tells when nothing helps."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from tests.openai_server import FakeOpenAI, Fault, last_user_text, serve

from tuoling.errors import EndpointError, UsageError
from tuoling.infer.client import Client
from tuoling.infer.endpoint import Endpoint
from tuoling.infer.openai_answers import StreamBroken
from tuoling.infer.rate_limit import RateLimit

QUESTION = [{"role": "user", "content": "你好吗"}]


@pytest.fixture
def server() -> Iterator[FakeOpenAI]:
    with serve() as state:
        yield state


class Sleeps:
    """Waits nobody sits through."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, seconds: float) -> bool:
        self.seconds.append(seconds)
        return False


def client(server: FakeOpenAI, sleeps: Sleeps | None = None, **options: object) -> Client:
    return Client(Endpoint(server.url, "test", **options), sleep=sleeps or Sleeps(), seed=7)  # type: ignore[arg-type]


def test_an_answer_with_counts_and_what_was_sent(server: FakeOpenAI) -> None:
    with client(server, extra={"enable_thinking": False}) as one:
        done = one.chat(QUESTION, temperature=0.0, max_tokens=9, stop=None)
    assert (done.text, done.finish_reason, done.prompt_tokens, done.completion_tokens) == (
        "你好吗",
        "stop",
        3,
        3,
    )
    assert server.requests == [
        {"model": "test", "messages": QUESTION, "enable_thinking": False, "temperature": 0.0, "max_tokens": 9}
    ]
    assert "Authorization" not in server.headers[0]


def test_plain_completion(server: FakeOpenAI) -> None:
    with client(server) as one:
        assert one.complete("从前有座山").text == "从前有座山"
        assert one.models() == ["test"]


def test_the_key_comes_from_the_environment_and_is_in_no_message(
    server: FakeOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUOLING_API_KEY", "sk-secret")
    server.key = "sk-secret"
    with client(server) as one:
        one.chat(QUESTION)
    server.key = "sk-other"
    with client(server) as one, pytest.raises(EndpointError, match="Incorrect API key") as caught:
        one.chat(QUESTION)
    assert caught.value.lasting and "TUOLING_API_KEY" in (caught.value.remedy or "")
    assert "sk-secret" not in str(caught.value)
    assert len(server.requests) == 2  # a refused key is not tried again


@pytest.mark.parametrize(
    ("url", "variable", "named"),
    [
        ("https://judge.example/v1", None, "TUOLING_API_KEY"),
        ("https://api.openai.com/v1", None, "OPENAI_API_KEY"),
        ("http://127.0.0.1:1/v1", "MY_KEY", "MY_KEY"),
    ],
)
def test_no_key(monkeypatch: pytest.MonkeyPatch, url: str, variable: str | None, named: str) -> None:
    for name in ("TUOLING_API_KEY", "OPENAI_API_KEY", "MY_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match=named):
        Client(Endpoint(url, "m", key_variable=variable))


def test_openais_key_goes_to_openai_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TUOLING_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai")
    assert Endpoint("https://api.openai.com/v1", "m").key() == "sk-openai"
    with pytest.raises(UsageError):
        Endpoint("https://api.openai.com.evil.example/v1", "m").key()


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("http://h:1", "http://h:1/v1"),
        ("http://h:1/v1/", "http://h:1/v1"),
        ("http://h:1/v1/chat/completions", "http://h:1/v1"),
        ("https://h/api/paas/v4", "https://h/api/paas/v4"),
        ("https://h/o?api-version=2&k=s", "https://h/o"),
    ],
)
def test_addresses(written: str, meant: str) -> None:
    assert Endpoint(written, "m").base_url == meant


@pytest.mark.parametrize("url", ["h:1/v1", "ftp://h/v1", "http://me:pw@h/v1", ""])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(UsageError):
        Endpoint(url, "m")


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", 500),
        Fault("status", 529),
        Fault("status", 200, error={"message": "overloaded"}),
        Fault("page"),
        Fault("empty"),
        Fault("cut"),
    ],
)
def test_a_passing_fault_is_tried_again(server: FakeOpenAI, fault: Fault) -> None:
    server.faults = {0: fault, 1: fault}
    sleeps = Sleeps()
    with client(server, sleeps) as one:
        done = one.chat(QUESTION)
    assert (done.text, done.tries) == ("你好吗", 3)
    assert 0.25 <= sleeps.seconds[0] <= 0.5 <= sleeps.seconds[1] <= 1.0
    assert len(server.answered) == 1


@pytest.mark.slow
def test_retry_after_is_obeyed_in_all_its_spellings(server: FakeOpenAI) -> None:
    server.faults = {
        0: Fault("status", 503, {"Retry-After": "7"}),
        1: Fault("status", 503, {"retry-after-ms": "1500"}),
        2: Fault("status", 503, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}),
        3: Fault("status", 503, {"Retry-After": "soon"}),
    }
    sleeps = Sleeps()
    with client(server, sleeps) as one:
        one.chat(QUESTION)
    assert sleeps.seconds[:3] == [7.0, 1.5, 0.0]
    assert 2.0 <= sleeps.seconds[3] <= 4.0  # our own backoff, fourth try


@pytest.mark.slow
def test_what_lasts_is_not_tried_again(server: FakeOpenAI) -> None:
    quota = {"message": "You exceeded your current quota", "type": "insufficient_quota"}
    server.faults = {0: Fault("status", 429, error=quota), 1: Fault("status", 404), 2: Fault("status", 400)}
    with client(server) as one:
        for lasting in (True, True, False):
            with pytest.raises(EndpointError) as caught:
                one.chat(QUESTION)
            assert caught.value.lasting is lasting
    assert len(server.requests) == 3


@pytest.mark.slow
def test_tries_end(server: FakeOpenAI) -> None:
    server.fault_of = lambda number, body: Fault("status", 500)
    with client(server, max_retries=2) as one, pytest.raises(EndpointError, match="500: something broke"):
        one.chat(QUESTION)
    assert len(server.requests) == 3


def test_nobody_there(server: FakeOpenAI) -> None:
    with serve() as gone:
        url = gone.url
    with (
        Client(Endpoint(url, "m", max_retries=1), sleep=Sleeps()) as one,
        pytest.raises(EndpointError) as caught,
    ):
        one.chat(QUESTION)
    assert caught.value.lasting and "cannot be reached" in caught.value.problem and caught.value.where == url


def test_a_server_that_says_nothing(server: FakeOpenAI) -> None:
    server.faults = {0: Fault("stall")}
    with (
        client(server, timeout_s=0.05, max_retries=0) as one,
        pytest.raises(EndpointError, match=r"within 0\.05 s"),
    ):
        one.chat(QUESTION)


@pytest.mark.slow
def test_the_newer_name_of_max_tokens(server: FakeOpenAI) -> None:
    said = {"message": "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."}
    server.faults = {0: Fault("status", 400, error=said)}
    with client(server) as one:
        one.chat(QUESTION, max_tokens=5)
        one.chat(QUESTION, max_tokens=6)
    assert [sorted(set(body) & {"max_tokens", "max_completion_tokens"}) for body in server.requests] == [
        ["max_tokens"],
        ["max_completion_tokens"],
        ["max_completion_tokens"],
    ]


def test_null_content_is_an_empty_answer(server: FakeOpenAI) -> None:
    server.faults = {0: Fault("null")}
    with client(server) as one:
        assert one.chat(QUESTION).text == ""


def test_a_stream_is_the_answer_in_pieces(server: FakeOpenAI) -> None:
    server.answer = lambda body: "山中有老虎，\n老虎讲故事"
    server.faults = {0: Fault("status", 500)}
    with client(server) as one:
        deltas = list(one.stream(QUESTION))
    assert [delta.text for delta in deltas] == ["山中有", "老虎，", "\n老虎", "讲故事", ""]
    whole = deltas[-1].completion
    assert whole is not None and whole.text == "山中有老虎，\n老虎讲故事"
    assert (whole.completion_tokens, whole.finish_reason, whole.tries) == (12, "stop", 2)


def test_a_stream_that_breaks_keeps_what_came_and_is_not_asked_again(server: FakeOpenAI) -> None:
    server.answer = lambda body: "一二三四五六七八九"
    server.faults = {0: Fault("cut", 2)}
    with client(server) as one, pytest.raises(StreamBroken) as caught:
        list(one.stream(QUESTION))
    assert caught.value.text == "一二三四五六"
    assert len(server.requests) == 1


@pytest.mark.slow
def test_many_at_once_and_each_once(server: FakeOpenAI) -> None:
    broken = {f"第{n}题" for n in range(1, 40, 5)}

    def once(number: int, body: dict[str, Any]) -> Fault | None:
        """By question: by arrival, one question may meet every fault there is."""
        if (text := last_user_text(body)) in broken:
            broken.remove(text)
            return Fault("status", 500)
        return None

    server.fault_of = once
    asked = [([{"role": "user", "content": f"第{n}题"}], {"temperature": 0.0}) for n in range(40)]
    together = threading.Barrier(2)

    def answer(body: dict[str, Any]) -> str:
        text = last_user_text(body)
        if text in ("第0题", "第2题"):  # neither goes on without the other
            together.wait(300)
        return text

    server.answer = answer
    with client(server, concurrency=8) as one:
        done = dict(one.map(asked))
    assert {index: found.text for index, found in done.items() if not isinstance(found, EndpointError)} == {
        n: f"第{n}题" for n in range(40)
    }
    assert len(server.answered) == 40 and len(server.requests) == 48
    assert 1 < server.most_at_once <= 8


@pytest.mark.slow
def test_one_bad_request_among_many_is_told_in_its_place(server: FakeOpenAI) -> None:
    server.fault_of = lambda number, body: Fault("status", 400) if "坏" in str(body) else None
    asked = [([{"role": "user", "content": text}], {}) for text in ("好", "坏", "好")]
    with client(server, concurrency=1) as one:
        done = dict(one.map(asked))
    assert [isinstance(done[n], EndpointError) for n in range(3)] == [False, True, False]


@pytest.mark.slow
def test_an_endpoint_that_goes_down_ends_the_batch_and_keeps_what_came(server: FakeOpenAI) -> None:
    server.fault_of = lambda number, body: Fault("status", 401) if number >= 5 else None
    asked = [([{"role": "user", "content": str(n)}], {}) for n in range(100)]
    done = []
    with client(server, concurrency=2) as one, pytest.raises(EndpointError, match="401"):
        for index, _ in one.map(asked):
            done.append(index)
    assert len(done) == 5 == len(server.answered)
    assert len(server.requests) <= 7  # nothing new was sent after the refusal


@pytest.mark.slow
def test_five_failures_in_a_row_are_an_endpoint_that_is_down(server: FakeOpenAI) -> None:
    server.fault_of = lambda number, body: Fault("status", 500) if number >= 10 else None
    asked = [([{"role": "user", "content": str(n)}], {}) for n in range(100)]
    found = []
    with client(server, concurrency=1, max_retries=1) as one, pytest.raises(EndpointError, match="500"):
        found += [answer for _, answer in one.map(asked)]
    assert len(server.requests) == 10 + 5 * 2
    assert len(server.answered) == 10


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_limit_holds_in_every_minute() -> None:
    clock = Clock()
    limit = RateLimit(10, 1000, clock=clock)
    taken: list[tuple[float, int]] = []
    for number in range(200):
        tokens = 20 + 37 * number % 180
        clock.now += max(0.0, limit.wait_s(tokens)) + 0.001
        limit.take(tokens)
        taken.append((clock.now, tokens))
    for start, _ in taken:
        inside = [tokens for at, tokens in taken if start <= at < start + 60]
        assert len(inside) <= 10 and sum(inside) <= 1000
    assert (
        taken[-1][0] - 1000 < 200 / 10 * 60 * 1.7
    )  # and it is used: 200 requests of 108 tokens need 1,300 s


def test_a_pause_holds_everybody_and_counts_are_corrected() -> None:
    clock = Clock()
    limit = RateLimit(None, 100, clock=clock)
    ticket = limit.take(90)
    assert limit.wait_s(20) == pytest.approx(60.0)
    limit.settle(ticket, 10)
    assert limit.wait_s(20) <= 0
    limit.pause(5.0)
    assert limit.wait_s(1) == pytest.approx(5.0)
    assert RateLimit(None, 100, clock=clock).wait_s(5000) <= 0  # alone, rather than never
