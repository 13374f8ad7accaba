"""What is shown is what is trained, in colour, in HTML and as JSON."""

from __future__ import annotations

import io
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console
from tests.real_tokenizers import load
from tests.tiny import sum_rows, tiny_model, write_rows
from typer.testing import CliRunner

from tuoling.cli import main
from tuoling.data.preview import Preview, preview, summary, to_html, to_rich
from tuoling.data.read import read_rows
from tuoling.data.row import Row
from tuoling.data.sources import Source
from tuoling.text.templates import TEMPLATES


def rows_of(tmp_path: Path, *rows: dict[str, object]) -> list[Row]:
    return list(read_rows(Source(str(write_rows(tmp_path / "rows.jsonl", list(rows))))))


def shown(tmp_path: Path, request: pytest.FixtureRequest, name: str = "tiny", **options: object) -> Preview:
    row = rows_of(tmp_path, {"instruction": "1 加 1？", "output": "等于 2。😀"})[0]
    tokenizer = load(name, request) if name else None
    return preview(row, template=TEMPLATES["belle_v2"], tokenizer=tokenizer, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["tiny", "minimind", "openllama"])
def test_runs_are_the_ids_and_their_text(tmp_path: Path, name: str, request: pytest.FixtureRequest) -> None:
    one = shown(tmp_path, request, name)
    tokenizer = load(name, request)
    ids, spans = tokenizer.encode_segments(
        TEMPLATES["belle_v2"].render(
            rows_of(tmp_path, {"instruction": "1 加 1？", "output": "等于 2。😀"})[0].conversation
        )
    )
    assert [token for run in one.runs for token in run.ids] == ids
    assert "".join(run.text for run in one.runs) == tokenizer.decode(ids, keep_special=True)
    assert "".join(run.text for run in one.runs if run.learned) == "等于 2。😀" + tokenizer.hf.eos_token
    assert (one.tokens, one.learned, one.ends) == (len(ids), spans[0][1] - spans[0][0], (len(ids) - 1,))


def test_summary_names_the_end_token_and_the_excess(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    one = shown(tmp_path, request, max_seq_len=10)
    assert summary(one) == (
        f"{one.tokens} tokens, {one.learned} learned; end token at {one.tokens - 1}; "
        f"{one.tokens - 10} over max_seq_len"
    )


def test_without_a_tokenizer_characters_are_counted(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    one = shown(tmp_path, request, "")
    assert one.unit == "characters" and one.learned == len("等于 2。😀")
    assert "".join(run.text for run in one.runs) == "Human: \n1 加 1？\n\nAssistant: \n等于 2。😀‹eos›"
    assert "characters" in summary(one) and "end token" not in summary(one)


def test_terminal_colours_and_marks(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    one = shown(tmp_path, request)
    stream = io.StringIO()
    Console(file=stream, force_terminal=True, color_system="standard", soft_wrap=True).print(to_rich(one))
    coloured = stream.getvalue()
    assert "\x1b[32m等于 2。😀\x1b[0m" in coloured and "\x1b[2mHuman: " in coloured
    assert "⟦等于 2。😀</s>⟧" in to_rich(one, marks=True).plain
    assert str(list(one.runs[-1].ids)) in to_rich(one, ids=True).plain


class _Learned(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.classes: list[str] = []
        self.learned = ""
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not any(name in ("src", "href") for name, _ in attrs), "the page must open offline"
        if tag == "span":
            self.classes.append(dict(attrs).get("class") or "")

    def handle_endtag(self, tag: str) -> None:
        if tag == "span":
            self.classes.pop()

    def handle_data(self, data: str) -> None:
        if self.classes and "learned" in self.classes[-1]:
            self.learned += data


def test_html_page(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    attack = {"instruction": "<script>alert(1)</script>", "output": "<b>&答"}
    row = rows_of(tmp_path, attack)[0]
    one = preview(row, template=TEMPLATES["belle_v2"], tokenizer=load("tiny", request))
    page = to_html([one], template="belle_v2")
    parsed = _Learned()
    parsed.feed(page)
    assert parsed.learned == "<b>&答</s>"
    assert f"width:{one.learned / one.tokens:.1%}" in page
    assert "script" not in parsed.tags and "b" not in parsed.tags
    assert "prefers-color-scheme: dark" in page and "Noto Sans CJK SC" in page


def test_a_question_alone_shows_what_a_model_is_asked(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    (row,) = rows_of(tmp_path, {"question": "你是谁？"})
    one = preview(row, template=TEMPLATES["belle_v2"], tokenizer=load("tiny", request))
    assert "".join(run.text for run in one.runs).endswith("你是谁？\n\nAssistant: \n")
    assert one.learned == 0 and not one.problems


def test_bad_row_shows_why(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    row = rows_of(tmp_path, {"instruction": "问", "output": ["x"]})[0]
    one = preview(row, template=TEMPLATES["alpaca"], tokenizer=load("tiny", request))
    assert not one.runs and "output" in one.problems[0]
    assert "✗" in to_rich(one).plain and one.problems[0] in to_html([one], template="x").replace(
        "&#x27;", "'"
    )


def run(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main.app, ["data", "show", *map(str, words)])
    return result.exit_code, result.stdout, result.stderr


def test_door_shows_rows(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", sum_rows(5))
    model = tiny_model(tmp_path / "model")
    code, out, err = run(file, "--model", model, "--template", "domain_bloom", "--rows", 2)
    assert code == 0 and out.count("⟦等于") == 2 and "domain_bloom" in err
    code, out, _ = run(file, "--model", model, "--row", 4, "--json", "--max-seq-len", 5)
    result = json.loads(out)
    assert code == 0 and len(result["rows"]) == 1 and result["rows"][0]["place"].endswith(":4")
    assert result["rows"][0]["over"] == result["rows"][0]["tokens"] - 5
    page = tmp_path / "page.html"
    code, out, _ = run(file, "--html", page)
    assert code == 0 and out == "" and page.read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--row", "9"], 2, "no row 9"),
        (["--learn", "some"], 2, "neither all nor last"),
        (["--max-seq-len", "9"], 2, "needs a tokenizer"),
        (["--template", "alpca"], 1, "unknown template `alpca`"),
        (["--tokenizer", "no/such/folder"], 1, "no/such/folder"),
    ],
)
def test_door_says_what_is_wrong(tmp_path: Path, words: list[str], code: int, said: str) -> None:
    file = write_rows(tmp_path / "rows.jsonl", sum_rows(2))
    found, out, err = run(file, *words)
    assert found == code and said in err and out == ""
