"""The loop behind `tuoling chat`: lines in, streamed answers out, `/commands` in between."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing, suppress
from dataclasses import asdict
from pathlib import Path
from threading import Event
from typing import TextIO

from tuoling import console
from tuoling.errors import TuolingError, UsageError
from tuoling.infer.engine import GenerationSettings, Piece
from tuoling.infer.session import ChatSession
from tuoling.infer.typewriter import Typewriter, visible
from tuoling.language import tr

ReadLine = Callable[[], str | None]
"""The next line without its end; None at the end of input."""


def help_text() -> str:
    """What can be typed."""
    rows = (
        ("/new", tr("start over", "重新开始")),
        ("/system TEXT", tr("set the system prompt (empty: none)", "设置系统提示（留空则取消）")),
        ("/set key=value", tr("change a setting; alone: show all", "修改设置；不带参数则显示全部")),
        ("/retry", tr("answer the last question again", "重新回答上一个问题")),
        ("/continue", tr("go on with an answer that was cut", "把被截断的回答接着写完")),
        (
            "/beams N",
            tr("search with N beams; alone: show the other beams", "用 N 束搜索；不带参数则显示其他束"),
        ),
        ("/summarise", tr("put a summary in the talk's place", "用概括代替之前的对话")),
        (
            "/adapter NAME",
            tr("answer with another adapter; alone: list them", "改用别的适配器；不带参数则列出"),
        ),
        ("/stats", tr("speed, and how much of the context is used", "速度，以及上下文用了多少")),
        ("/undo", tr("take back the last exchange", "撤回上一轮")),
        ("/save FILE", tr("append this talk to FILE as a training row", "把对话作为一条训练数据追加到文件")),
        ("/exit", tr("leave (Ctrl-D too)", "退出（或按 Ctrl-D）")),
    )
    keys = tr("Ctrl-C stops an answer.", "按 Ctrl-C 可中断回答。")
    return "\n".join([*(f"  {name:<16} {what}" for name, what in rows), f"  {keys}"])


class Terminal:
    """Runs a session over lines of text. `run` returns the exit code."""

    def __init__(self, session: ChatSession, *, read_line: ReadLine, out: TextIO, interactive: bool) -> None:
        self._session = session
        self._read_line = read_line
        self._out = out
        self._interactive = interactive
        self._failed = False

    def run(self) -> int:
        """Until /exit or the end of input. From a pipe, any error makes the exit code 1."""
        while True:
            try:
                line = self._read_line()
            except KeyboardInterrupt:
                console.err.print()
                console.note(tr("/exit or Ctrl-D leaves", "输入 /exit 或按 Ctrl-D 退出"))
                continue
            if line is None:
                break
            text = line.strip()
            if not text:
                continue
            try:
                if not self._handle(text):
                    break
            except TuolingError as error:
                self._failed = True
                console.show_error(error)
        return int(self._failed and not self._interactive)

    def _handle(self, text: str) -> bool:
        """Do what a line says; False to leave."""
        if not text.startswith("/"):
            self._answer(text)
            return True
        command, _, rest = text.partition(" ")
        rest = rest.strip()
        if command in ("/exit", "/quit"):
            return False
        actions: dict[str, Callable[[str], None]] = {
            "/new": self._new,
            "/system": self._system,
            "/set": self._set,
            "/retry": self._retry,
            "/continue": lambda _: self._show(self._session.go_on),
            "/beams": self._beams,
            "/summarise": lambda _: self._show(self._session.summarise),
            "/adapter": self._adapter,
            "/stats": self._stats,
            "/undo": self._undo,
            "/save": self._save,
            "/help": lambda _: console.note(help_text()),
        }
        if command not in actions:
            raise UsageError(
                tr(f"no such command: {command}", f"没有这个命令：{command}"),
                remedy=" ".join([*actions, "/exit"]),
            )
        actions[command](rest)
        return True

    def _answer(self, question: str) -> None:
        self._show(lambda *, cancel: self._session.ask(question, cancel=cancel))

    def _show(self, ask: Callable[..., Generator[Piece]]) -> None:
        """Write an answer as it comes; Ctrl-C stops it."""
        cancel = Event()
        cut_at = 0
        typewriter = Typewriter(self._out, interactive=self._interactive)
        with closing(ask(cancel=cancel)) as pieces:
            try:
                for piece in pieces:
                    typewriter.show(piece)
                    if piece.reply is not None and piece.reply.finish_reason == "length":
                        cut_at = piece.reply.completion_tokens
            except KeyboardInterrupt:
                cancel.set()  # closing the stream waits for the token that is being made
                console.note(tr(" (stopped)", "（已停止）"))
        typewriter.end()
        if cut_at:
            console.note(
                tr(
                    f"(cut after {cut_at} tokens; /continue goes on, /set max_new_tokens=N makes answers longer)",
                    f"（已在 {cut_at} 个 token 处截断；/continue 接着写，/set max_new_tokens=N 加长回答）",
                )
            )

    def _new(self, rest: str) -> None:
        self._session.new()
        console.note(tr("a new conversation", "已开始新的对话"))

    def _system(self, rest: str) -> None:
        self._session.system = rest or None
        console.note(
            tr("system prompt set", "系统提示已设置") if rest else tr("no system prompt", "已取消系统提示")
        )

    def _set(self, rest: str) -> None:
        if rest:
            self._session.set(rest)
            warn_idle(self._session.settings)
        else:
            for name, value in asdict(self._session.settings).items():
                console.note(f"  {name} = {value}")

    def _retry(self, rest: str) -> None:
        question = self._session.retry()
        if question is None:
            raise UsageError(tr("nothing to answer again", "没有可以重新回答的问题"))
        if not self._session.settings.samples:
            console.note(
                tr(
                    "(without sampling the answer stays the same; /set temperature=0.8 samples)",
                    "（未开启采样，回答不会变；/set temperature=0.8 开启采样）",
                )
            )
        self._answer(question)

    def _beams(self, rest: str) -> None:
        if rest:
            self._session.set(f"num_beams={rest}")
            warn_idle(self._session.settings)
            return
        beams = self._session.reply.beams if self._session.reply is not None else ()
        if not beams:
            raise UsageError(
                tr("the last answer was found without beams", "上一个回答没有使用束搜索"), remedy="/beams 4"
            )
        for number, text in enumerate(beams, 1):
            self._out.write(f"{number}. {visible(text) if self._interactive else text}\n")

    def _adapter(self, rest: str) -> None:
        if rest:
            self._session.use(rest)
        there, now = self._session.engine.adapters, self._session.engine.adapter
        for name in there:
            console.note(f"{'*' if name == now else ' '} {name}")
        if not there:
            console.note(tr("the model has no adapters", "该模型没有适配器"))

    def _stats(self, rest: str) -> None:
        stats = self._session.stats
        if stats is None:
            raise UsageError(tr("there is no whole answer to count", "还没有完整的回答可供统计"))
        share = stats.context_tokens / stats.limit_tokens
        console.note(
            tr(
                f"{stats.completion_tokens} tokens in {stats.seconds:.2f} s ({stats.tokens_per_s:.1f} tokens/s), "
                f"the first text after {stats.first_s:.2f} s\n"
                f"context: {stats.context_tokens} of {stats.limit_tokens} tokens ({share:.0%}), "
                f"{self._session.turns} exchanges, {stats.dropped} of them not seen any more",
                f"{stats.completion_tokens} 个 token，用时 {stats.seconds:.2f} 秒"
                f"（{stats.tokens_per_s:.1f} token/秒），首段文字用时 {stats.first_s:.2f} 秒\n"
                f"上下文：{stats.context_tokens} / {stats.limit_tokens} 个 token（{share:.0%}），"
                f"共 {self._session.turns} 轮，其中 {stats.dropped} 轮模型已看不到",
            )
        )

    def _undo(self, rest: str) -> None:
        if not self._session.undo():
            raise UsageError(tr("nothing to take back", "没有可以撤回的内容"))
        console.note(tr(f"{self._session.turns} exchanges left", f"还剩 {self._session.turns} 轮"))

    def _save(self, rest: str) -> None:
        if not rest:
            raise UsageError(tr("name a file", "请给出文件名"), remedy="/save chat.jsonl")
        path = Path(rest).expanduser()
        self._session.save(path)
        console.note(tr(f"appended to {path}", f"已追加到 {path}"))


def warn_idle(settings: GenerationSettings) -> None:
    """Say which knobs are set and change nothing."""
    idle = settings.idle_knobs()
    if idle:
        names = ", ".join(idle)
        console.warn(
            tr(f"without sampling these change nothing: {names}", f"未开启采样，以下设置不起作用：{names}")
        )


def terminal_reader(prompt: str) -> ReadLine:
    """Lines typed at a terminal, with editing that knows wide characters (readline)."""
    with suppress(ImportError):  # Windows edits lines by itself
        import readline  # noqa: F401 (input() uses it once it is imported)

    def read() -> str | None:
        try:
            return input(prompt)
        except EOFError:
            console.err.print()  # what comes after the program starts on a line of its own
            return None

    return read


def pipe_reader(stream: TextIO) -> ReadLine:
    """Lines of a file or pipe."""

    def read() -> str | None:
        line = stream.readline()
        return line.rstrip("\r\n") if line else None

    return read
