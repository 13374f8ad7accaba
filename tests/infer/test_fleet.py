"""Predictions over several servers: rows spread, given to others when a server dies, kept when all of them do."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.openai_server import Body, FakeOpenAI, Fault, last_user_text, serve
from tests.tiny import sum_rows, write_rows
from typer.testing import CliRunner

from tuoling.api import Model, load
from tuoling.cli.main import app
from tuoling.errors import EndpointError
from tuoling.infer.fleet import Fleet

ROWS = sum_rows(24)
ANSWERS = [row["instruction"][::-1] for row in ROWS]


def backwards(body: Body) -> str:
    return last_user_text(body)[::-1]


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeOpenAI]]:
    monkeypatch.setattr("tuoling.infer.client.FIRST_BACKOFF_S", 0.0001)
    with ExitStack() as stack:
        yield [stack.enter_context(serve(backwards)) for _ in range(3)]


def hold(server: FakeOpenAI, until: Callable[[], bool]) -> None:
    """It answers nothing before something has happened that must: who is quick would leave nothing to the others."""

    def answer(body: Body) -> str:
        tick = threading.Event()
        while not until():
            tick.wait(0.002)
        return backwards(body)

    server.answer = answer


def together(servers: list[FakeOpenAI]) -> None:
    """None answers before all have been asked."""
    for server in servers:
        hold(server, lambda: all(one.requests for one in servers))


def opened(servers: list[FakeOpenAI], **options: Any) -> Model:
    return load("test", endpoint=",".join(one.url for one in servers), concurrency=2, **options)


def predicted(model: Model, data: Path, out: Path, **values: Any) -> Any:
    with model:
        return model.predict_file([str(data)], out, **values)


def written(out: Path) -> list[str]:
    return [row["predict"] for row in json.loads(out.read_text(encoding="utf-8"))]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "test.json", ROWS)


@pytest.mark.slow
def test_rows_are_spread_and_come_back_in_order(
    servers: list[FakeOpenAI], data: Path, tmp_path: Path
) -> None:
    together(servers)
    report = predicted(opened(servers), data, tmp_path / "p.json")
    assert written(tmp_path / "p.json") == ANSWERS and (report.predicted, report.rows) == (24, 24)
    shares = [len(server.answered) for server in servers]
    assert sum(shares) == 24 and min(shares) > 0, "each row once, and nobody sat idle"
    assert report.tokens == sum(map(len, ANSWERS))


@pytest.mark.slow
def test_a_server_that_dies_gives_its_rows_to_the_others(
    servers: list[FakeOpenAI], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    servers[0].down_after = 3
    down = lambda: len(servers[0].requests) > 3  # noqa: E731
    for server in servers[1:]:
        hold(server, down)
    report = predicted(opened(servers), data, tmp_path / "p.json")
    assert written(tmp_path / "p.json") == ANSWERS and report.failed == []
    assert len(servers[0].answered) == 3
    assert sum(len(server.answered) for server in servers) == 24, "no row was paid for twice"
    err = capsys.readouterr().err
    assert servers[0].url in err and "its questions go to the other servers" in err
    assert err.count("go to the other servers") == 1


@pytest.mark.slow
def test_when_all_die_what_came_is_kept_and_another_server_does_the_rest(
    servers: list[FakeOpenAI], data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "p.json"
    servers[0].down_after, servers[1].down_after = 5, 4
    with pytest.raises(EndpointError):
        predicted(opened(servers[:2]), data, out)
    assert not out.exists()
    report = predicted(opened(servers[2:]), data, out)
    assert (report.reused, report.predicted) == (9, 15), (
        "all nine answers that came, though it stands elsewhere"
    )
    assert written(out) == ANSWERS and not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_a_row_that_is_refused_is_named_and_asked_again_next_time(
    servers: list[FakeOpenAI], data: Path, tmp_path: Path
) -> None:
    out, bad = tmp_path / "p.json", ROWS[7]["instruction"]
    refusal = Fault("status", 400, error={"message": "no such thing"})
    for server in servers:
        server.fault_of = lambda number, body: refusal if last_user_text(body) == bad else None
    report = predicted(opened(servers), data, out)
    assert [f"{data}:8" in place and "no such thing" in place for place in report.failed] == [True]
    assert written(out) == [*ANSWERS[:7], "", *ANSWERS[8:]]
    assert sum(len(server.requests) for server in servers) == 24, "and nobody tried it twice"
    servers[1].fault_of = lambda number, body: None
    report = predicted(opened(servers[1:2]), data, out)
    assert (report.reused, report.predicted) == (23, 1) and written(out) == ANSWERS


@pytest.mark.slow
def test_a_row_on_which_servers_fail_is_the_rows_fault(
    servers: list[FakeOpenAI], data: Path, tmp_path: Path
) -> None:
    bad = ROWS[3]["instruction"]
    for server in servers:
        server.fault_of = lambda number, body: Fault("status", 500) if last_user_text(body) == bad else None
    report = predicted(opened(servers), data, tmp_path / "p.json")
    assert len(report.failed) == 1 and written(tmp_path / "p.json") == [*ANSWERS[:3], "", *ANSWERS[4:]]
    tries = sum(last_user_text(body) == bad for server in servers for body in server.requests)
    assert tries == 3 * 3, "three servers' turns, each with the client's two retries"


@pytest.mark.slow
def test_servers_that_are_not_there(
    servers: list[FakeOpenAI], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nobody = "http://127.0.0.1:9/v1"
    with load("test", endpoint=f"{nobody}, {servers[0].url}") as model:
        assert isinstance(model.engine, Fleet) and model.chat("你好") == "好你"
        assert "".join(model.stream("一二三四")) == "四三二一"
    assert f"left out: {nobody}" in capsys.readouterr().err
    with pytest.raises(EndpointError, match="cannot be reached"):
        load("test", endpoint=f"{nobody},http://127.0.0.1:10/v1")


@pytest.mark.slow
def test_a_stream_begins_at_the_next_server_where_the_first_is_dead(servers: list[FakeOpenAI]) -> None:
    with opened(servers) as model:
        servers[0].down_after = 0
        assert "".join(model.stream("一二三四")) == "四三二一"
        assert len(servers[0].requests) == 3 and len(servers[1].requests) == 1


@pytest.mark.slow
def test_leaving_asks_nothing_more(servers: list[FakeOpenAI], data: Path, tmp_path: Path) -> None:
    def stop(done: int, report: Any) -> None:
        if report.predicted == 4:
            raise KeyboardInterrupt

    from tuoling.infer.predict import predict, question_of_record

    server, over = servers[0], threading.Event()
    hold(server, lambda: len(server.answered) < 4 or over.is_set())
    with opened(servers[:1]) as model:
        with pytest.raises(KeyboardInterrupt):
            predict(model.engine, [question_of_record(row) for row in ROWS], model.settings(), step=stop)
        over.set()
        for thread in threading.enumerate():
            if thread.name == "tuoling-ask":
                thread.join()
    assert len(server.requests) <= 4 + 2, "those under way, and no further ones"


@pytest.mark.slow
def test_draws_of_one_row_have_seeds_of_their_own(servers: list[FakeOpenAI]) -> None:
    servers[0].answer = lambda body: f"{last_user_text(body)}{body['seed']}"
    with opened(servers[:1]) as model:
        rows = model.predict(["甲", "乙"], n=3, temperature=0.8, seed=5)
    assert [row["answers"] for row in rows] == [["甲5", "甲6", "甲7"], ["乙5", "乙6", "乙7"]]
    assert rows[1]["predict"] == "乙5"


@pytest.mark.slow
def test_from_the_command_line(servers: list[FakeOpenAI], data: Path, tmp_path: Path) -> None:
    servers[2].down_after = 2
    urls = ",".join(server.url for server in servers)
    words = ["predict", "test", "-d", str(data), "-o", str(tmp_path / "p.json"), "--endpoint", urls, "--json"]
    result = CliRunner().invoke(app, [*words, "--merge", "--template", "alpaca", "--batch-size", "3"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["predicted"] == 24 and written(tmp_path / "p.json") == ANSWERS
    assert "--merge, --template without effect" in result.stderr.replace("\n", " ")
    assert max(server.most_at_once for server in servers) <= 3
