"""A talk in the terminal, with an engine that says what it was asked."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from threading import Event

import pytest

from tuoling.infer.engine import GenerationSettings, OneModel, Piece, Reply, Score, unknown_adapter
from tuoling.infer.session import ChatSession
from tuoling.infer.terminal import Terminal, pipe_reader
from tuoling.infer.typewriter import Typewriter
from tuoling.text.conversation import Conversation
from tuoling.text.templates import get_template


class ParrotEngine(OneModel):
    """Streams "<number of turns>:<question>" letter by letter. A turn is ten tokens. An answer goes on "，还有"."""

    name = "parrot"
    fingerprint = ""

    def __init__(self, *, context_tokens: int | None = None) -> None:
        self.template = get_template("domain_bloom")
        self.defaults = GenerationSettings(max_new_tokens=10)
        self.system: str | None = None
        self.context_tokens = context_tokens
        self.asked: list[Conversation] = []
        self.cancelled = False

    def prompt_text(self, conversation: Conversation) -> str:
        return ""

    def count_tokens(self, conversation: Conversation) -> int:
        return 10 * len(conversation.turns)

    def using(self, adapter: str) -> ParrotEngine:
        if adapter not in self.adapters:
            raise unknown_adapter(adapter, self.adapters)
        twin = copy.copy(self)
        twin.adapter = adapter
        return twin

    def stream(
        self, conversation: Conversation, settings: GenerationSettings, *, cancel: Event | None = None
    ) -> Generator[Piece]:
        self.asked.append(conversation)
        text = f"{len(conversation.turns)}:{conversation.turns[-1].text}"
        if conversation.answer is not None:
            text = "，还有"
        if settings.num_beams > 1:
            yield from self._beams(text)
            return
        try:
            for letter in text:
                yield Piece(letter)
        finally:
            self.cancelled = cancel is not None and cancel.is_set()
        reason = "length" if settings.max_new_tokens == 1 else "stop"
        yield Piece("", Reply(text, (), reason, 1, len(text)))  # type: ignore[arg-type]

    def _beams(self, text: str) -> Generator[Piece]:
        """Shows the text backwards first, and takes all but its first letter back."""
        wrong = text[0] + text[:0:-1]
        yield Piece(wrong, settled=1, beams=(wrong, text))
        back = len(wrong) - 1
        yield Piece(text[1:], back=back, settled=len(text), beams=(text, wrong))
        yield Piece("", Reply(text, (), "stop", 1, len(text), (text, wrong)))

    def generate(
        self,
        conversations: Sequence[Conversation],
        settings: GenerationSettings,
        *,
        cancel: Event | None = None,
    ) -> list[Reply]:
        raise NotImplementedError

    def score(self, conversations: Sequence[Conversation]) -> list[Score]:
        raise NotImplementedError

    def close(self) -> None: ...


class Screen(io.StringIO):
    """Someone presses Ctrl-C when the letter `at` has been shown."""

    def __init__(self, at: str = "") -> None:
        super().__init__()
        self._at = at

    def write(self, text: str) -> int:
        super().write(text)
        if text and text == self._at:
            raise KeyboardInterrupt
        return len(text)


def talk(
    engine: ParrotEngine, lines: str, *, interactive: bool = False, ctrl_c_at: str = ""
) -> tuple[str, int, ChatSession]:
    out = Screen(ctrl_c_at)
    notes: list[str] = []
    session = ChatSession(engine, engine.defaults, say=notes.append)
    session.notes = notes  # type: ignore[attr-defined]
    code = Terminal(
        session, read_line=pipe_reader(io.StringIO(lines)), out=out, interactive=interactive
    ).run()
    return out.getvalue(), code, session


def test_turns_add_up_and_answers_stand_on_lines_of_their_own() -> None:
    out, code, session = talk(ParrotEngine(), "你好\n\n再见\r\n")
    assert (out, code, session.turns) == ("1:你好\n3:再见\n", 0, 2)


def test_an_answer_cannot_steer_the_terminal() -> None:
    """Window titles, colours and cursor moves are made of control characters; a pipe gets the text as it is."""
    asked = "\x1b]0;mine\x07红\x9b31m\t好"
    shown, _, _ = talk(ParrotEngine(), asked, interactive=True)
    assert shown == "1:␛]0;mine␇红\ufffd31m\t好\n"
    assert talk(ParrotEngine(), asked)[0] == f"1:{asked}\n"


def test_retry_without_sampling_says_why_nothing_changes(capsys: pytest.CaptureFixture[str]) -> None:
    talk(ParrotEngine(), "甲\n/retry\n")
    assert "/set temperature=0.8" in capsys.readouterr().err
    talk(ParrotEngine(), "/set temperature=0.8\n甲\n/retry\n")
    assert "stays the same" not in capsys.readouterr().err


def test_new_undo_retry_system_and_exit() -> None:
    engine = ParrotEngine()
    out, code, _ = talk(
        engine, "甲\n乙\n/undo\n丙\n/retry\n/new\n丁\n/system 你是驼铃\n戊\n/system\n己\n/exit\n庚\n"
    )
    assert out.splitlines() == ["1:甲", "3:乙", "3:丙", "3:丙", "1:丁", "4:戊", "5:己"]
    assert code == 0 and engine.asked[5].system == "你是驼铃" and engine.asked[6].system is None


def test_settings() -> None:
    _, code, session = talk(ParrotEngine(), "/set temperature=0.5\n/set max_new_tokens = 7\n/set\n")
    assert (session.settings.temperature, session.settings.max_new_tokens, code) == (0.5, 7, 0)
    assert session.settings.samples


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/set top_p=7", "top_p=7.0 is out of range"),
        ("/set warmth=1", "no setting is called warmth"),
        ("/set hot", "is not key=value"),
        ("/retry", "nothing to answer again"),
        ("/undo", "nothing to take back"),
        ("/save", "name a file"),
        ("/save /proc/no/such.jsonl", "nothing to save yet"),
        ("/dance", "no such command: /dance"),
    ],
)
def test_mistakes_are_said_and_the_talk_goes_on(
    line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out, code, _ = talk(ParrotEngine(), f"{line}\n好\n")
    assert said in capsys.readouterr().err
    assert (out, code) == ("1:好\n", 1)
    assert talk(ParrotEngine(), f"{line}\n好\n", interactive=True)[1] == 0


def test_save_appends_rows_that_can_be_trained_on(tmp_path: Path) -> None:
    from tuoling.data.read import read_rows
    from tuoling.data.sources import resolve_sources

    file = tmp_path / "deep" / "chat.jsonl"
    talk(ParrotEngine(), f"/system 短\n甲\n/save {file}\n乙\n/save {file}\n")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert rows[0]["messages"] == [
        {"role": "system", "content": "短"},
        {"role": "user", "content": "甲"},
        {"role": "assistant", "content": "2:甲"},
    ]
    good = [row for source in resolve_sources([str(file)]) for row in read_rows(source)]
    assert [len(row.conversation.turns) for row in good if row.conversation and not row.problems] == [3, 5]


def test_ctrl_c_stops_the_answer_not_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    engine = ParrotEngine()
    out, code, session = talk(engine, "你好吗\n", ctrl_c_at="你")
    assert out == "1:你\n" and code == 0
    assert engine.cancelled and "(stopped)" in capsys.readouterr().err
    assert session.conversation().turns[1].text == "1:你", "what was said stays in the talk"


def test_ctrl_c_at_the_prompt_and_ctrl_d() -> None:
    lines: Iterator[object] = iter([KeyboardInterrupt(), "好", None])

    def read() -> str | None:
        line = next(lines)
        if isinstance(line, BaseException):
            raise line
        return line  # type: ignore[return-value]

    out = io.StringIO()
    engine = ParrotEngine()
    terminal = Terminal(ChatSession(engine, engine.defaults), read_line=read, out=out, interactive=True)
    assert terminal.run() == 0 and out.getvalue() == "1:好\n"


def test_a_full_context_drops_the_oldest_exchanges_and_says_so_once_each() -> None:
    engine = ParrotEngine(context_tokens=45)  # ten of them for the answer: three turns fit
    out, _, session = talk(engine, "一\n二\n三\n四\n")
    assert out.splitlines() == ["1:一", "3:二", "3:三", "3:四"]
    assert [turn.text for turn in engine.asked[3].turns] == ["三", "3:三", "四"]
    assert session.turns == 4, "the talk itself is whole"
    notes = session.notes  # type: ignore[attr-defined]
    assert ["oldest 1 " in notes[0], "oldest 2 " in notes[1], len(notes)] == [True, True, 2]


def test_a_question_too_long_is_an_error_and_leaves_no_trace(capsys: pytest.CaptureFixture[str]) -> None:
    out, code, session = talk(ParrotEngine(context_tokens=12), "好\n")
    assert (out, code, session.turns) == ("", 1, 0)
    assert "room for 6" in capsys.readouterr().err


def test_an_answer_that_was_cut_says_where(capsys: pytest.CaptureFixture[str]) -> None:
    talk(ParrotEngine(), "/set max_new_tokens=1\n好\n")
    assert "cut after 3 tokens" in capsys.readouterr().err


# -- beams, going on, summaries, statistics, history -----------------------------------------------------------


def test_beams_on_a_pipe_are_written_when_they_stay_and_on_a_screen_taken_back() -> None:
    lines = "/beams 3\n你好\n/beams\n"
    out, code, session = talk(ParrotEngine(), lines)
    assert (out, code) == ("1:你好\n1. 1:你好\n2. 1好你:\n", 0) and session.settings.num_beams == 3
    assert session.conversation().turns[1].text == "1:你好"
    shown, _, _ = talk(ParrotEngine(), "/beams 3\n你好\n", interactive=True)
    assert shown == "1" + "好你:" + "\x1b[5D\x1b[K" + ":你好" + "\n", (
        "five cells: two wide letters and a colon"
    )


def test_a_screen_shows_loose_text_only_up_to_its_edge(monkeypatch: pytest.MonkeyPatch) -> None:
    """What may be taken back must not wrap: the cursor cannot go back over a line that scrolled away."""
    monkeypatch.setenv("COLUMNS", "10")
    out = io.StringIO()
    typewriter = Typewriter(out, interactive=True)
    typewriter.show(Piece("甲乙丙丁戊己庚", settled=1))
    assert out.getvalue() == "甲" + "乙丙丁 ", "seven cells are left beside the cursor's own"
    typewriter.show(Piece("", Reply("", (), "stop", 1, 1)))
    typewriter.end()
    assert out.getvalue() == "甲乙丙丁 \x1b[7D\x1b[K乙丙丁戊己庚\n"


def test_leaving_beams_midway_keeps_what_was_shown() -> None:
    out = io.StringIO()
    typewriter = Typewriter(out, interactive=True)
    typewriter.show(Piece("好吗", settled=1))
    typewriter.end()
    assert out.getvalue() == "好吗\x1b[2D\x1b[K吗\n"


def test_an_answer_is_gone_on_with() -> None:
    engine = ParrotEngine()
    out, code, session = talk(engine, "甲\n/continue\n/continue\n乙\n")
    assert out.splitlines() == ["1:甲", "，还有", "，还有", "3:乙"] and code == 0
    assert engine.asked[1].turns[-1].text == "1:甲" and engine.asked[2].answer == "1:甲，还有"
    assert [turn.text for turn in session.conversation().turns[:2]] == ["甲", "1:甲，还有，还有"]


def test_a_summary_takes_the_talks_place(tmp_path: Path) -> None:
    engine = ParrotEngine()
    engine.system = "短"
    file = tmp_path / "rows.jsonl"
    session = ChatSession(engine, engine.defaults, history=file)
    for question in ("甲", "乙"):
        list(session.ask(question))
    list(session.summarise())
    turns = session.conversation().turns
    assert [turn.role for turn in turns] == ["system", "user", "assistant"]
    assert "三句话" in turns[1].text and turns[2].text == f"6:{turns[1].text}"
    assert len(json.loads(file.read_text(encoding="utf-8"))["messages"]) == 5, "the whole talk was kept first"
    english = ChatSession(ParrotEngine(), engine.defaults)
    list(english.ask("How are you?"))
    list(english.summarise())
    assert english.conversation().turns[0].text.startswith("Summarise our conversation")


def test_a_summary_that_was_stopped_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    engine = ParrotEngine()
    notes: list[str] = []
    session = ChatSession(engine, engine.defaults, say=notes.append)
    list(session.ask("甲"))
    pieces = session.summarise()
    next(pieces)
    pieces.close()
    assert session.conversation().turns[0].text == "甲" and session.turns == 1


def test_stats_count_the_context(capsys: pytest.CaptureFixture[str]) -> None:
    _, code, session = talk(ParrotEngine(context_tokens=45), "一\n二\n三\n/stats\n")
    err = capsys.readouterr().err
    assert code == 0 and "context: 33 of 45 tokens (73%), 3 exchanges, 1 of them not seen any more" in err
    stats = session.stats
    assert stats is not None and stats.completion_tokens == 3 and 0 <= stats.first_s <= stats.seconds
    assert stats.tokens_per_s == pytest.approx(3 / stats.seconds)


def test_stats_of_an_answer_that_was_stopped_are_not_those_of_the_one_before() -> None:
    session = ChatSession(ParrotEngine(), ParrotEngine().defaults)
    list(session.ask("甲"))
    assert session.stats is not None
    stopped = session.ask("乙乙乙")
    next(stopped)
    stopped.close()
    assert session.stats is None and session.reply is None and session.turns == 2


def test_another_adapter_goes_on_with_the_talk(capsys: pytest.CaptureFixture[str]) -> None:
    engine = ParrotEngine()
    engine.adapters, engine.adapter = ("law", "base"), "law"
    out, code, session = talk(engine, "甲\n/adapter base\n乙\n/adapter\n/adapter tax\n")
    assert out == "1:甲\n3:乙\n" and code == 1 and session.engine.adapter == "base"
    err = capsys.readouterr().err
    assert "  law\n* base\n" in err and "no adapter is called tax" in err


@pytest.mark.parametrize("line", ["/continue", "/summarise", "/stats", "/beams", "/beams many", "/adapter x"])
def test_commands_without_anything_to_work_on(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    out, code, _ = talk(ParrotEngine(), f"{line}\n好\n")
    assert (out, code) == ("1:好\n", 1) and "Error" in capsys.readouterr().err


def test_history_gets_every_talk_once_as_a_row(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "talks.jsonl"
    engine = ParrotEngine()
    session = ChatSession(engine, engine.defaults, history=file)
    session.finish()
    assert not file.exists(), "nothing was said"
    list(session.ask("甲"))
    session.new()
    list(session.ask("乙"))
    list(session.ask("丙"))
    session.finish()
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [[turn["content"] for turn in row["messages"]] for row in rows] == [
        ["甲", "1:甲"],
        ["乙", "1:乙", "丙", "3:丙"],
    ]
