"""The frame of the command line: finds the commands, shows help in two languages, turns errors into exit codes.

Every sibling file is a command. `cli/train.py` is `tuoling train`, `cli/data_check.py` is `tuoling data check`
(the prefixes in `GROUPS`), `cli/prune_vocab.py` is `tuoling prune-vocab`. A command file defines `HELP`, a text,
and `command`, a function whose annotations are the options. It is imported only when its help or its work is asked
for, and must not import anything heavy at the top.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pkgutil
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from types import ModuleType
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import tuoling.cli
from tuoling import console, environment, files
from tuoling.errors import TuolingError, UsageError
from tuoling.language import tr

GROUPS = ("data",)
"""File name prefixes that are a word of their own on the command line."""

FIRST = (
    "quickstart",
    "data",
    "check",
    "show",
    "plan",
    "train",
    "resume",
    "continue",
    "replay",
    "report",
    "predict",
    "evaluate",
    "chat",
)
"""The order of help: the way a user goes. Commands not named here follow by the alphabet."""


def group_help(group: str) -> str:
    """One line about a group of commands."""
    texts = {"data": tr("Check, show, split and convert rows.", "检查、查看、切分、转换数据。")}
    return texts[group]


@cache
def command_modules() -> Mapping[tuple[str, ...], str]:
    """Words on the command line → module name, for every file beside this one."""
    found = {}
    for module in pkgutil.iter_modules(tuoling.cli.__path__):
        if module.name == "main":
            continue
        prefix, _, rest = module.name.partition("_")
        words = (prefix, rest) if prefix in GROUPS and rest else (module.name,)
        found[tuple(word.replace("_", "-") for word in words)] = f"tuoling.cli.{module.name}"
    return found


def load_command_module(words: tuple[str, ...]) -> ModuleType:
    """Import the file behind a command."""
    return importlib.import_module(command_modules()[words])


class _Bilingual:
    """What typer prints around our own help texts, in the user's language."""

    def get_usage(self, ctx: Any) -> str:
        usage: str = super().get_usage(ctx)  # type: ignore[misc]
        return usage.replace("Usage:", tr("Usage:", "用法："), 1)

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)  # type: ignore[misc]
        if option is not None:
            option.help = tr("Show this message and exit.", "显示本说明并退出。")
        return option

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from typer import rich_utils

        rich_utils.OPTIONS_PANEL_TITLE = tr("Options", "选项")
        rich_utils.ARGUMENTS_PANEL_TITLE = tr("Arguments", "参数")
        rich_utils.COMMANDS_PANEL_TITLE = tr("Commands", "命令")
        rich_utils.DEFAULT_STRING = tr("[default: {}]", "[默认：{}]")
        rich_utils.REQUIRED_LONG_STRING = tr("[required]", "[必填]")
        super().format_help(ctx, formatter)  # type: ignore[misc]


class Command(_Bilingual, TyperCommand):
    """One command, made from its file."""


class CommandGroup(_Bilingual, TyperGroup):
    """Commands below `prefix`, imported when they are asked for."""

    prefix: tuple[str, ...] = ()

    def list_commands(self, ctx: Any) -> list[str]:
        depth = len(self.prefix)
        names = {words[depth] for words in command_modules() if words[:depth] == self.prefix}
        return sorted(names, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        words = (*self.prefix, cmd_name)
        if words in command_modules():
            return _command(words)
        return _group(cmd_name) if not self.prefix and cmd_name in GROUPS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            raise UsageError(
                tr(f"no such command: {args[0]}", f"没有这个命令：{args[0]}"),
                remedy=_nearest(args[0], self.list_commands(ctx))
                or tr(f"{ctx.command_path} --help lists them", f"{ctx.command_path} --help 列出全部命令"),
            )
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # typer would leave without a word
            console.err.print()
            console.note(tr("stopped by Ctrl-C", "已由 Ctrl-C 中断"))
            return 130
        except BrokenPipeError:  # the reader of a pipe has gone (`| head`)
            _silence_stdout()
            return 0

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run, and exit with 0 (done), 1 (the input or the result is bad), 2 (the call is wrong) or 130 (Ctrl-C)."""
        words = list(sys.argv[1:] if args is None else args)
        words, debug = _take_debug(words)
        code = 0
        try:
            result = super().main(words, "tuoling", complete_var, False, windows_expand_args, **extra)
            code = result if isinstance(result, int) else 0
            sys.stdout.flush()
        except Exception as error:
            code = _report(error, words, debug)
        if not standalone_mode:
            return code
        sys.exit(code)


class DataGroup(CommandGroup):
    """`tuoling data …`"""

    prefix = ("data",)


_GROUP_CLASSES: dict[str, type[CommandGroup]] = {"data": DataGroup}


@cache
def _command(words: tuple[str, ...]) -> Any:
    module = load_command_module(words)
    one = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    one.command(words[-1], cls=Command, help=module.HELP)(module.command)
    return typer.main.get_command(one)


@cache
def _group(name: str) -> Any:
    group = typer.Typer(cls=_GROUP_CLASSES[name], no_args_is_help=True, add_completion=False)
    group.callback(help=group_help(name))(lambda: None)
    made = typer.main.get_command(group)
    made.name = name
    return made


def _nearest(word: str, names: Sequence[str]) -> str | None:
    from difflib import get_close_matches

    near = get_close_matches(word, names, n=3, cutoff=0.5)
    return tr(f"did you mean {', '.join(near)}?", f"是不是想用 {'、'.join(near)}？") if near else None


def _take_debug(words: list[str]) -> tuple[list[str], bool]:
    """`--debug` may stand anywhere before a bare `--`."""
    end = words.index("--") if "--" in words else len(words)
    kept = [word for word in words[:end] if word != "--debug"]
    return kept + words[end:], len(kept) < end


def _report(error: Exception, words: list[str], debug: bool) -> int:
    """Tell the user about an error and return the exit code."""
    if isinstance(error, BrokenPipeError):
        _silence_stdout()
        return 0
    if isinstance(error, typer.Exit):
        return error.exit_code
    if isinstance(error, typer.Abort):
        return _report_abort()
    if debug:
        console.err.print(traceback.format_exc(), markup=False)
    if isinstance(error, TuolingError):
        console.show_error(error)
        return error.exit_code
    if files.disk_full(error):
        full = files.cannot_write(getattr(error, "filename", None), error)
        console.show_error(full)
        return full.exit_code
    if _is_call_error(error):
        return _report_call_error(error)
    return _report_defect(error, words, debug)


def _report_abort() -> int:
    console.err.print()
    console.note(tr("stopped", "已中断"))
    return 130


def _silence_stdout() -> None:
    """Keep Python from complaining when it flushes a closed pipe at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_call_error(error: Exception) -> bool:
    from typer._click.exceptions import ClickException

    return isinstance(error, ClickException)


def _report_call_error(error: Any) -> int:
    """Typer's own complaints about a call, in both languages."""
    from typer._click import exceptions as call

    if isinstance(error, call.NoArgsIsHelpError):  # the help has been printed already by asking for it
        return 2
    ctx = getattr(error, "ctx", None)
    remedy = tr(f"{ctx.command_path} --help", f"{ctx.command_path} --help 查看用法") if ctx else None
    hint = error.param.get_error_hint().strip("'") if getattr(error, "param", None) else ""
    if isinstance(error, call.NoSuchOption):
        near = sorted(error.possibilities or ())
        problem = tr(f"no such option: {error.option_name}", f"没有这个选项：{error.option_name}")
        if near:
            remedy = tr(f"did you mean {', '.join(near)}?", f"是不是想用 {'、'.join(near)}？")
    elif isinstance(error, call.MissingParameter):
        problem = tr(f"missing: {hint}", f"缺少：{hint}")
    elif isinstance(error, call.BadParameter):
        problem = tr(f"{hint}: {error.message}", f"{hint} 的值不对：{error.message}")
    else:
        problem = tr(error.format_message(), f"调用不对：{error.format_message()}")
    console.show_error(UsageError(problem, remedy=remedy))
    return int(error.exit_code)


def _report_defect(error: Exception, words: list[str], debug: bool) -> int:
    """Anything we did not foresee: one short message, the traceback in a file."""
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    path = environment.cache_dir() / "crashes" / name
    text = f"tuoling {' '.join(words)}\n{environment.versions()}\n\n{traceback.format_exc()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        where: str | None = str(path)
    except OSError:
        where = None
    kind = type(error).__name__
    console.show_error(
        TuolingError(
            tr(
                f"unexpected {kind}: {error}. This is a defect of the program, not of your input",
                f"意外错误 {kind}：{error}。这是程序的缺陷，不是您的输入有误",
            ),
            where=where,
            remedy=None
            if debug
            else tr(
                "the traceback is in that file; --debug shows it here",
                "详细信息在上面的文件里；加 --debug 可直接显示",
            ),
        )
    )
    return 1


def _show_version(asked: bool) -> None:
    if asked:
        from importlib import metadata

        console.out.print(f"tuoling {metadata.version('tuoling')}")
        raise typer.Exit


app = typer.Typer(
    cls=CommandGroup, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)


@app.callback(
    help=tr(
        "Tuoling 驼铃: make a Chinese-capable language model your own. Start with: tuoling quickstart",
        "驼铃 Tuoling：让一个懂中文的语言模型成为你自己的。从 tuoling quickstart 开始。",
    )
)
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help=tr("Print the version.", "显示版本。")
        ),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option(
            "--debug",
            help=tr("Show Python's traceback when something fails.", "出错时显示 Python 的调用栈。"),
        ),
    ] = False,
) -> None:
    """Options of the program itself; `--debug` is taken out of the words before they come here."""


def _terminate(number: int, frame: object) -> None:
    """SIGTERM leaves as an exception does, so that half-made files are put away and a run says how it ended."""
    console.note(tr("stopped by SIGTERM", "已由 SIGTERM 终止"))
    raise SystemExit(128 + number)


def main() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # Windows terminals start in a code page
            stream.reconfigure(encoding="utf-8", errors="replace")
    environment.quiet_libraries()
    signal.signal(signal.SIGTERM, _terminate)
    app()


if __name__ == "__main__":
    main()
