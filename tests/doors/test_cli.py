"""The frame of the command line: commands found by their files, help in two languages, errors as exit codes."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from tuoling import environment
from tuoling.cli import main
from tuoling.errors import DataError, UsageError

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = sorted(main.command_modules())


def invoke(*words: str) -> Any:
    return CliRunner().invoke(main.app, words)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put one more command beside the real ones; it does what the test says."""

    def put(work: Any) -> None:
        module = ModuleType("tuoling.cli.fake")
        module.HELP = "A command of this test."  # type: ignore[attr-defined]

        def command(word: str = "") -> Any:
            return work()

        module.command = command  # type: ignore[attr-defined]
        modules = {**main.command_modules(), ("fake",): "tuoling.cli.fake"}
        monkeypatch.setattr(main, "command_modules", lambda: modules)
        monkeypatch.setitem(sys.modules, "tuoling.cli.fake", module)
        main._command.cache_clear()

    yield put
    main._command.cache_clear()


def test_every_file_is_a_command() -> None:
    files = {path.stem for path in (ROOT / "src/tuoling/cli").glob("*.py")} - {"__init__", "main"}
    assert {name.rpartition(".")[2] for name in main.command_modules().values()} == files
    assert {("train",), ("report",), ("doctor",)} <= set(COMMANDS)
    assert all(("data", words[0]) not in COMMANDS or len(words) == 1 for words in COMMANDS)


@pytest.mark.slow
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_help(words: tuple[str, ...]) -> None:
    module = main.load_command_module(words)
    assert isinstance(module.HELP, str) and module.HELP.strip()
    result = invoke(*words, "--help")
    assert result.exit_code == 0, result.output
    assert "Usage: tuoling " + " ".join(words) in result.stdout
    assert module.HELP.split()[0] in result.stdout


@pytest.mark.slow
def test_help_of_the_program_lists_everything() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    assert all(words[0] in result.stdout for words in COMMANDS)
    grouped = [words[1] for words in COMMANDS if words[0] == "data"]
    assert all(word in invoke("data", "--help").stdout for word in grouped)


def test_no_words_is_help_and_a_wrong_call() -> None:
    assert invoke().exit_code == 2
    assert "Usage: tuoling" in invoke().output


def test_version() -> None:
    result = invoke("--version")
    assert result.exit_code == 0 and result.stdout == "tuoling 0.1.0\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["reprot"], "did you mean report"),
        (["qqqqqq"], "no such command: qqqqqq"),
        (["report"], "missing: RUN"),
        (["report", "x", "--jsno"], "did you mean --json?"),
        (["data", "chekc"], "no such command: chekc"),
    ],
)
def test_a_wrong_call_is_2_with_the_nearest_name(words: list[str], says: str) -> None:
    result = invoke(*words)
    assert result.exit_code == 2 and says in result.stderr and result.stdout == ""


@pytest.mark.parametrize(("error", "code"), [(DataError, 1), (UsageError, 2)])
def test_our_errors_have_problem_place_and_remedy(fake: Any, error: Any, code: int) -> None:
    def work() -> None:
        raise error("the [answer] is empty", where="rows.json:3", remedy="first line\nsecond line")

    fake(work)
    result = invoke("fake")
    assert result.exit_code == code
    lines = [line.strip() for line in result.stderr.splitlines()]
    assert lines == ["Error the [answer] is empty", "where  rows.json:3", "try  first line", "second line"]


def test_a_defect_leaves_its_traceback_in_a_file(fake: Any) -> None:
    fake(lambda: 1 // 0)
    result = invoke("fake", "--word", "x")
    assert result.exit_code == 1
    assert "unexpected ZeroDivisionError" in result.stderr and "Traceback" not in result.stderr
    (crash,) = (environment.cache_dir() / "crashes").iterdir()
    assert str(crash) in result.stderr.replace("\n", "")
    text = crash.read_text(encoding="utf-8")
    assert text.startswith("tuoling fake --word x\n") and "ZeroDivisionError" in text and "'torch'" in text


def test_a_full_disk_is_no_defect(fake: Any) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    fake(full)
    result = invoke("fake")
    assert result.exit_code == 1 and "the disk is full" in result.stderr and "metrics.jsonl" in result.stderr
    assert "defect" not in result.stderr


def test_debug_shows_the_traceback_wherever_it_stands(fake: Any) -> None:
    fake(lambda: 1 // 0)
    for words in (["--debug", "fake"], ["fake", "--debug"]):
        assert "Traceback" in invoke(*words).stderr


def test_ctrl_c_is_130_and_a_closed_pipe_is_quiet(fake: Any) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    def close() -> None:
        raise BrokenPipeError(errno.EPIPE, "gone")

    fake(interrupt)
    result = invoke("fake")
    assert result.exit_code == 130 and "stopped by Ctrl-C" in result.stderr
    fake(close)
    result = invoke("fake")
    assert (result.exit_code, result.output) == (0, "")


def test_sigterm_unwinds_as_an_exception_does(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    put_away = []

    def terminated() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            put_away.append(True)

    fake(terminated)
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["tuoling", "fake"])
    try:
        with pytest.raises(SystemExit) as left:
            main.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert left.value.code == 143 and put_away == [True]


def run_fresh(code: str, language: str) -> str:
    """Run Python in a process of its own: the language is read once, and imports must start from nothing."""
    environ = {**os.environ, "TUOLING_LANG": language, "COLUMNS": "100", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=environ, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode("utf-8")


@pytest.mark.slow
def test_help_in_chinese_imports_nothing_heavy() -> None:
    code = """
import json, sys
from typer.testing import CliRunner
from tuoling.cli import main
shown = {}
for words in main.command_modules():
    result = CliRunner().invoke(main.app, [*words, "--help"])
    assert result.exit_code == 0, result.output
    shown[" ".join(words)] = result.stdout
shown[""] = CliRunner().invoke(main.app, ["--help"]).stdout
heavy = {"torch", "transformers", "peft", "accelerate", "datasets", "pyarrow", "pandas", "matplotlib", "numpy"}
print(json.dumps({"heavy": sorted(heavy & set(sys.modules)), "shown": shown}))
"""
    found = json.loads(run_fresh(code, "zh"))
    assert found["heavy"] == []
    for words, text in found["shown"].items():
        assert "用法：" in text and "显示本说明并退出" in text, words
        assert "Usage:" not in text and "Options" not in text, words


@pytest.mark.slow
def test_the_generated_pages_are_fresh() -> None:
    """`python docs/make_help.py` writes them; this says when that was forgotten."""
    code = f"import runpy; print(runpy.run_path({str(ROOT / 'docs/make_help.py')!r})['page']())"
    for language, name in (("zh", "cli.md"), ("en", "cli.en.md")):
        page = ROOT / "docs" / name
        assert page.read_text(encoding="utf-8").strip() == run_fresh(code, language).strip(), (
            f"{page} is stale: run python docs/make_help.py"
        )
