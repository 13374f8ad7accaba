"""The report card and the model card of a real tiny run: what they say is what the run's files hold."""

from __future__ import annotations

import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.tiny import settings_without_chance, sum_rows, tiny_model, write_rows
from typer.testing import CliRunner

from tuoling.cli.main import app
from tuoling.config import RunConfig, load_config, sort_words
from tuoling.evaluate.answers import Answer
from tuoling.evaluate.items import Item
from tuoling.evaluate.labels import Note
from tuoling.evaluate.outcome import Outcome, Side
from tuoling.evaluate.report_card.charts import (
    MOST_POINTS,
    Bar,
    Line,
    bar_chart,
    colour_of,
    line_chart,
    nice_ticks,
    thinned,
)
from tuoling.evaluate.report_card.contents import choose_examples, command_of, read_report
from tuoling.evaluate.report_card.model_card import write_model_card
from tuoling.evaluate.report_card.page import page
from tuoling.text.conversation import Conversation, Turn
from tuoling.train.loop import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs over rows of which one stands twice, scored on eight questions of two classes."""
    folder = tmp_path_factory.mktemp("card")
    data = write_rows(folder / "rows.jsonl", [*sum_rows(7), sum_rows(1)[0]])
    keys = settings_without_chance(folder, tiny_model(folder / "base"), data, {"num_train_epochs": 2})
    train(RunConfig(**keys, per_device_train_batch_size=2, lora_rank=4, save_steps=0))
    outcome(8).write(folder / "run" / "evaluation" / "mine-test")
    return folder / "run"


def outcome(count: int) -> Outcome:
    """The base is right on the last question alone, the tuned one on all others."""
    items = [
        Item(
            f"t.jsonl:{n + 1}",
            "加法 <b>" if n % 2 else "翻译",
            Conversation((Turn("user", f"问{n}"),)),
            f"答{n}",
        )
        for n in range(count)
    ]
    right = [float(n != count - 1) for n in range(count)]
    wrong = [1.0 - value for value in right]
    sides = [
        Side(
            name,
            name,
            {},
            [Answer(f"{name}<i>{n}", "stop", 3) for n in range(count)],
            {"exact_match": list(values)},
        )
        for name, values in (("base", wrong), ("tuned", right))
    ]
    return Outcome("mine", "t.jsonl", items, sides, "exact_match", notes=[Note("two rows odd", "两行异常")])


class Tags(HTMLParser):
    """Open tags that were not closed, text by language, and addresses that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.language: list[str | None] = [None]
        self.words: dict[str | None, str] = {None: "", "zh": "", "en": ""}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.fetched += [value for name in ("src", "href") if (value := found.get(name))]
        if tag not in ("meta", "br"):
            self.open.append(tag)
            self.language.append(found["lang"] if tag != "html" and "lang" in found else self.language[-1])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None: ...

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.language.pop()

    def handle_data(self, data: str) -> None:
        self.words[self.language[-1]] += data + "\n"


@pytest.mark.slow
def test_the_page_says_what_the_files_hold(run: Path) -> None:
    report = read_report(run, price_per_hour=3.0)
    html = page(report)
    tags = Tags()
    tags.feed(html)
    assert not tags.open and not tags.fetched and "@import" not in html and "url(" not in html
    both, en, zh = tags.words[None], tags.words["en"], tags.words["zh"]
    results = json.loads((run / "all_results.json").read_text())
    assert f"{results['train_loss_first']:.3f} → {results['train_loss_last']:.3f}" in both
    for said in ("0.0 ", "87.5", "base<i>7", "问7", "rows.jsonl", "LoRA r=4", ["card", "run"][-1]):
        assert said in both, said
    assert "better" in en and "更好" in zh and "two rows odd" in en and "两行异常" in zh
    assert "What was trained on what" in en and "训练了什么" in zh
    assert "加法 <b>" in both or "加法 <b>" in zh  # escaped, and told as the file has it
    cost = 3.0 * results["seconds"] / 3600
    assert f"{cost:,.4g}" in both
    assert report.data is not None and report.data["duplicates"] == 1
    assert report.licences.commercial == "unknown"


@pytest.mark.slow
def test_time_foreseen_beside_the_fact_and_every_resumption(run: Path) -> None:
    report = read_report(run, price_per_hour=36.0, check_data=False)
    assert "forecast" not in report.record, "8 steps are too few to foresee anything"
    report.results = {**report.results, "seconds": 300.0, "tokens_per_s": 55.0}
    html = page(report)
    assert "<td>–</td><td>5 min 00 s</td>" in html and "Interrupted" not in html
    report.record = {
        **report.record,
        "forecast": {"at_step": 11, "timed_steps": 10, "seconds": 250.0, "tokens_per_s": 66.0},
        "resumed": [{"at": "2026-11-22T10:20:30+00:00", "step": 40, "changed": ["data: <other>"]}],
    }
    html = page(report)
    assert (
        "<td>4 min 10 s</td><td>5 min 00 s</td>" in html
        and "<td>66 tokens/s</td><td>55 tokens/s</td>" in html
    )
    assert "<td>2.5</td><td>3</td>" in html and "第 11 步" in html and "at step 11" in html
    assert "<td>2026-11-22 10:20</td><td>40</td><td>data: &lt;other&gt;</td>" in html


@pytest.mark.slow
def test_every_text_is_there_in_both_languages(run: Path) -> None:
    """Each Chinese piece has an English neighbour; none of the English ones holds Chinese but what the rows say."""
    html = page(read_report(run))
    pairs = re.findall(
        r'<span class="zh" lang="zh">([^<]*)</span><span class="en" lang="en">([^<]*)</span>', html
    )
    assert len(pairs) > 60 and html.count('class="zh" lang') == len(pairs)
    chinese = re.compile("[一-鿿]")
    assert {en for _, en in pairs if chinese.search(en)} <= {"翻译", "加法 &lt;b&gt;"}


def test_examples_are_those_that_gained_most_lost_most_and_some_by_chance() -> None:
    rows = [outcome(8)._row(place) for place in range(8)]
    found = choose_examples(rows, outcome(8).to_json())
    by_why: dict[str, list[Any]] = {}
    for one in found:
        by_why.setdefault(one.why, []).append(one)
    assert {one.row["class"] for one in by_why["best"]} == {"翻译", "加法 <b>"} and len(by_why["best"]) == 4
    assert [one.row["question"] for one in by_why["worst"]] == ["问7"]
    assert by_why["worst"][0].values == {"base": 1.0, "tuned": 0.0}
    shown = [one.row["question"] for one in found]
    assert len(shown) == len(set(shown)) == 8 and len(by_why["random"]) == 3


def test_the_command_trains_the_same_again(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    words = shlex.split(command_of(record))
    assert words[:2] == ["tuoling", "train"]
    named = dict(zip(words[2:8:2], words[3:8:2], strict=True))
    paths, keys = sort_words(words[8:])
    again = load_config(
        paths,
        keys,
        {
            "model_name_or_path": named["--model"],
            "data": [named["--data"]],
            "output_dir": named["--out"],
        },
    ).config
    before, after = RunConfig(**record["config"]).model_dump(), again.model_dump()
    assert {name for name in before if before[name] != after[name]} == {"output_dir"}


def test_a_run_that_was_not_evaluated_says_how(run: Path, tmp_path: Path) -> None:
    for name in ("run.json", "metrics.jsonl", "all_results.json"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    html = page(read_report(tmp_path, check_data=False))
    assert f"tuoling evaluate {tmp_path} rows.json" in html


@pytest.mark.slow
def test_report_writes_the_card_beside_the_picture(run: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(run), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert Path(found["report"]) == run / "report.html"
    assert (run / "report.html").read_text().startswith("<!doctype html>")


def test_the_model_card_holds_the_same_facts_and_keeps_what_a_user_wrote(run: Path) -> None:
    card = run / "README.md"
    card.write_text(card.read_text(encoding="utf-8") + "\n## 我的说明\n", encoding="utf-8")
    report = read_report(run, price_per_hour=2.0)
    assert write_model_card(report)
    once = card.read_text(encoding="utf-8")
    write_model_card(report)
    text = card.read_text(encoding="utf-8")
    assert (
        text == once and "## 我的说明" in text and "## 局限 Limits" in text and "## 用途 Intended use" in text
    )
    assert "| 翻译 | 4 | 0.0 | 100.0 | +100.0 [100.0, 100.0] | 无法判断 cannot tell |" in text
    assert "| **全部 all** | 8 | 12.5 | 87.5 |" in text and "- 两行异常 two rows odd" in text
    assert "重复 duplicates 1" in text and command_of(report.record) in text
    front = yaml.safe_load(text.split("---")[1])
    (model,) = front["model-index"]
    (result,) = model["results"]
    assert result["metrics"][0]["value"] == 0.875 and result["dataset"]["name"] == "t.jsonl"
    assert (front["pipeline_tag"], front["base_model_relation"]) == ("text-generation", "adapter")


def test_charts_keep_the_ends_of_their_lines() -> None:
    points = [(float(x), float(x % 7)) for x in range(10_000)]
    few = thinned(points)
    assert len(few) <= MOST_POINTS + 1 and few[-1] == points[-1]
    assert sum(y for _, y in few) / len(few) == pytest.approx(3.0, abs=0.05)
    assert nice_ticks(0.0, 1.0) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    svg = line_chart([Line([(0, 1.0), (10, 3.0)], "loss"), Line([(5, 0.5)], "rate", right=True)])
    line = re.search(r'class="loss" points="([^"]*)"', svg)
    assert line is not None
    (x1, y1), (x2, y2) = (map(float, pair.split(",")) for pair in line[1].split())
    assert (x1, x2) == (52.0, 708.0) and y1 > y2  # more loss is higher up


def test_each_side_of_an_arena_has_a_colour_of_its_own() -> None:
    assert colour_of(0, 1) == "after", "one model is drawn as the tuned one is"
    assert [colour_of(number, 4) for number in range(4)] == ["before", "after", "third", "fourth"]
    bars = bar_chart([Bar("甲", [(0.1, 0.0, 0.2), (0.5, 0.4, 0.6), (0.9, 0.8, 1.0)])])
    assert re.findall(r'<rect class="(\w+)"', bars) == ["before", "after", "third"]
