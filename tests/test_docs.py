"""The documents say what is there: every command in them parses, every key is a key, generated pages are fresh."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from tuoling import environment
from tuoling.cli import main
from tuoling.config import RunConfig, load_config, recipe_names
from tuoling.config_settle import settle
from tuoling.data.formats import formats
from tuoling.foreign_keys import ALIASES
from tuoling.text.templates import TEMPLATES

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
GUIDES = ("guide.zh.md", "guide.en.md")
READMES = ("README.md", "README.en.md")
CONFIG_EXAMPLES = ("config.yaml", "llama3_lora_sft.yaml", "Bloom_config.json", "lora_hyperparams_bloom.json")
"""Config files that documents speak of as the reader's own."""

make_config = runpy.run_path(str(DOCS / "make_config.py"))


def text_of(name: str) -> str:
    return (ROOT / name if name in READMES else DOCS / name).read_text(encoding="utf-8")


def commands() -> Iterator[tuple[str, str]]:
    """(place, line) of every `tuoling …` in the code blocks and between backticks of READMEs and guides."""
    for name in (*READMES, *GUIDES):
        text = text_of(name).replace("\\\n", " ")
        for block in re.findall(r"^ *```\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE):
            for line in block.splitlines():
                found = re.match(r"\s*(?:\.venv/bin/)?(tuoling .*)", line)
                if found:
                    yield name, found[1]
        for inline in re.findall(r"`(tuoling [^`]+)`", text):
            yield name, inline.replace("…", "WORD")


def parse(line: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The command's words and its parameters, as the command line itself reads them; nothing is run."""
    words = shlex.split(line, comments=True)[1:]
    if words[0] == "data" and len(words) > 1:
        words = [" ".join(words[:2]), *words[2:]]
    name = tuple(words[0].split(" "))
    assert name in main.command_modules(), f"no such command: {line}"
    if len(words) == 1:  # the command's name alone, in a sentence
        return name, {}
    context = main._command(name).make_context(words[0], words[1:])
    return name, context.params


COMMANDS = list(commands())


def test_commands_are_found() -> None:
    """The patterns above have not gone blind."""
    assert len(COMMANDS) > 80
    assert {place for place, _ in COMMANDS} == {*READMES, *GUIDES}


@pytest.mark.parametrize("place, line", COMMANDS)
def test_every_command_parses(place: str, line: str) -> None:
    name, params = parse(line)
    if name not in (("train",), ("plan",)) or not params:
        return
    pairs = [word for word in params["words"] or [] if "=" in word]
    for word in params["words"] or []:
        assert word in pairs or word in (*CONFIG_EXAMPLES, *recipe_names()), f"{place}: {word}"
    for pair in pairs:
        key = pair.partition("=")[0]
        assert key in RunConfig.model_fields or key in ALIASES, f"{place}: {key}"
    flags = {"model_name_or_path": params["model"], "recipe": params["recipe"]}
    load_config(overrides=pairs, flags=flags)  # the values are good, too


@pytest.mark.parametrize("name", GUIDES)
def test_keys_in_the_text_have_good_values(name: str) -> None:
    """`key=value` between backticks, outside of code blocks."""
    found = 0
    for inline in re.findall(r"`((?:[A-Za-z_]+=[^\s`]+ ?)+)`", text_of(name)):
        words = [word for word in inline.split() if not word.split("=")[0].isupper()]
        words = [word for word in words if "/set" not in inline and word != "key=value"]
        if words:
            load_config(overrides=words)
            found += 1
    assert found > 15


def test_a_command_that_is_not_there_is_noticed() -> None:
    with pytest.raises(AssertionError, match="no such command"):
        parse("tuoling teach runs/first")
    with pytest.raises(Exception, match="No such option"):
        parse("tuoling data check rows.json --fast")


def test_every_key_has_a_meaning_in_both_languages() -> None:
    described = [key for _, meanings in make_config["SECTIONS"] for key in meanings]
    assert sorted(described) == sorted(RunConfig.model_fields)
    for _, meanings in make_config["SECTIONS"]:
        for en, zh in meanings.values():
            assert en.isascii() or "÷" in en or "→" in en, en
            assert re.search(r"[\u4e00-\u9fff]", zh), zh


def test_other_spellings_become_the_key_they_stand_at() -> None:
    for ours, spellings in make_config["CONVERTED"].items():
        for key, value in spellings:
            done = settle({key: value}, {key: "here"})
            assert list(done.values) == [ours] and not done.issues, key


@pytest.mark.parametrize("language", ["zh", "en"])
def test_generated_pages_are_fresh(language: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "language", lambda: language)
    remedy = "run python docs/make_config.py"
    assert text_of(make_config["PAGES"][language]) == make_config["page"](), remedy
    guide = text_of(make_config["GUIDES"][language])
    assert guide == make_config["with_recipes"](guide, make_config["recipes"]()), remedy


@pytest.mark.parametrize("name", GUIDES)
def test_the_guide_names_everything(name: str) -> None:
    """Formats, templates and recipes by name; problem codes that the data commands can give."""
    text = text_of(name)
    wanted = {*formats(), *recipe_names(), *(id for id in TEMPLATES if not id.startswith("lf/"))}
    assert sorted(word for word in wanted if f"`{word}`" not in text) == []
    codes: set[str] = set()
    for path in (ROOT / "src/tuoling/data").rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        codes |= set(re.findall(r"(?:Problem|RowError)\(\s*[\w\"'.\[\]{}]+,\s*\"([a-z_]+)\"", source))
        codes |= set(re.findall(r"\(\s*\"([a-z_]+)\",\s*tr\(", source)) & {"placeholder", "escaped_twice"}
    assert {"mojibake", "overlong", "wrong_type", "placeholder"} <= codes
    assert sorted(code for code in codes if f"`{code}`" not in text) == []


@pytest.mark.parametrize("name", [*READMES, *GUIDES, "config.md", "config.en.md"])
def test_links_lead_somewhere(name: str) -> None:
    folder = ROOT if name in READMES else DOCS
    for target in re.findall(r"\]\(([^)#:]+)\)", text_of(name)):
        if "images/" not in target:  # pictures are made by the programs that the READMEs name
            assert (folder / target).exists(), f"{name}: {target}"


@pytest.mark.parametrize("name", READMES)
def test_the_speeds_told_are_the_ones_measured(name: str) -> None:
    shapes = json.loads((ROOT / "benchmarks" / "train.json").read_text(encoding="utf-8"))
    measured = {}
    for shape in shapes:
        figures = {
            engine: (median(kept["tokens_per_s"]), median(kept["peak_gib"]))
            for engine, kept in shape["engines"].items()
        }
        (speed, peak), rival = figures.pop("tuoling"), max(figures.values())
        cells = (f"{speed:.0f} · {peak:.2f}", f"{rival[0]:.0f} · {rival[1]:.2f}", f"{speed / rival[0]:.1f}")
        measured[shape["shape"]] = (*cells, f"1/{rival[1] / peak:.1f}")
    told = text_of(name).split("<!-- train -->")[1].split("<!-- /train -->")[0].strip().splitlines()[2:]
    rows = [tuple(cell.strip(" 倍×") for cell in line.split("|")[2:-1]) for line in told]
    order = ("bloom-6x512", "bloom-560m", "llama-8x512", "bloom-6x512-full", "llama-8x512-full")
    assert rows == [measured[shape] for shape in order]
