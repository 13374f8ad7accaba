"""Predictions: order, batching, resuming, and rows that cannot be asked; with an engine that answers by rule."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from tuoling.data.read import read_rows
from tuoling.data.sources import resolve_sources
from tuoling.errors import DataError, UsageError
from tuoling.infer.engine import GenerationSettings, OneModel, Piece, PromptTooLong, Reply, Score
from tuoling.infer.predict import PredictReport, predict_file, question_of_record
from tuoling.text.conversation import Conversation, Turn
from tuoling.text.templates import get_template

SETTINGS = GenerationSettings(max_new_tokens=8)


class EchoEngine(OneModel):
    """Answers a question with itself, backwards. Counts characters as tokens, and its calls."""

    name = "echo"
    system = None
    context_tokens = None
    fingerprint = "echo-1"

    def __init__(self, *, limit: int = 10_000, die_after: int = -1) -> None:
        self.template = get_template("domain_bloom")
        self.defaults = SETTINGS
        self.batches: list[list[str]] = []
        self._limit = limit
        self._die_after = die_after

    def prompt_text(self, conversation: Conversation) -> str:
        return "".join(segment.text for segment in self.template.prompt(conversation))

    def count_tokens(self, conversation: Conversation) -> int:
        return len(self.prompt_text(conversation))

    def generate(
        self,
        conversations: Sequence[Conversation],
        settings: GenerationSettings,
        *,
        cancel: Event | None = None,
    ) -> list[Reply]:
        if len(self.batches) == self._die_after:
            raise KeyboardInterrupt
        for conversation in conversations:
            if self.count_tokens(conversation) > self._limit:
                raise PromptTooLong(self.count_tokens(conversation), self._limit)
        texts = [conversation.turns[-1].full_text for conversation in conversations]
        self.batches.append(texts)
        return [Reply(text[::-1], tuple(range(len(text))), "stop", 1, len(text)) for text in texts]

    def stream(
        self, conversation: Conversation, settings: GenerationSettings, *, cancel: Event | None = None
    ) -> Iterator[Piece]:
        raise NotImplementedError

    def score(self, conversations: Sequence[Conversation]) -> list[Score]:
        raise NotImplementedError

    def close(self) -> None: ...


def rows_file(tmp_path: Path, count: int = 7) -> Path:
    path = tmp_path / "test.json"
    rows = [
        {"instruction": "问" * (1 + number * 3 % 7), "input": "", "output": f"答{number}"}
        for number in range(count)
    ]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


def run(engine: EchoEngine, data: Path, out: Path, settings: GenerationSettings = SETTINGS) -> PredictReport:
    rows = (row for source in resolve_sources([str(data)]) for row in read_rows(source))
    return predict_file(engine, rows, out, settings, batch_size=3)


def test_shape_and_order_of_the_file(tmp_path: Path) -> None:
    engine = EchoEngine()
    report = run(engine, rows_file(tmp_path), tmp_path / "p.json")
    text = (tmp_path / "p.json").read_text(encoding="utf-8")
    written = json.loads(text)
    assert written == [
        {"input": f"用户:{q}\n\n助手:", "predict": q, "target": f"答{number}"}
        for number, q in enumerate("问" * (1 + number * 3 % 7) for number in range(7))
    ]
    assert text == json.dumps(written, ensure_ascii=False, indent=4) + "\n"
    assert (report.rows, report.predicted, report.reused, report.too_long, report.unusable) == (
        7,
        7,
        0,
        [],
        [],
    )
    lengths = [[len(text) for text in batch] for batch in engine.batches]
    assert lengths == [[7, 6, 5], [4, 3, 2], [1]], "batches hold prompts of like length"
    assert list(tmp_path.glob(".*")) == [], "the partial file is gone"


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    data, out = rows_file(tmp_path), tmp_path / "p.json"
    with pytest.raises(KeyboardInterrupt):
        run(EchoEngine(die_after=2), data, out)
    assert not out.exists()
    partial = tmp_path / ".p.json.partial.jsonl"
    partial.write_bytes(partial.read_bytes()[:-9])  # and its last line was torn
    engine = EchoEngine()
    report = run(engine, data, out)
    assert (report.reused, report.predicted) == (5, 2)
    assert sum(map(len, engine.batches)) == 2
    run(EchoEngine(), data, tmp_path / "straight.json")
    assert out.read_bytes() == (tmp_path / "straight.json").read_bytes()


def test_other_settings_or_another_model_reuse_nothing(tmp_path: Path) -> None:
    data, out = rows_file(tmp_path), tmp_path / "p.json"
    with pytest.raises(KeyboardInterrupt):
        run(EchoEngine(die_after=2), data, out)
    other = EchoEngine()
    other.fingerprint = "echo-2"
    with pytest.raises(KeyboardInterrupt):
        run(EchoEngine(die_after=0), data, out, GenerationSettings(max_new_tokens=9))
    assert run(other, data, out).reused == 0


def test_rows_too_long_or_unusable_are_named_and_the_rest_is_done(tmp_path: Path) -> None:
    data = rows_file(tmp_path)
    with data.open("a", encoding="utf-8") as file:
        file.write('\n{"instruction": "", "output": "x"}\nnot json\n{"instruction": 5, "output": "x"}\n')
    report = run(EchoEngine(limit=13), data, tmp_path / "p.json")
    written = json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))
    assert len(written) == 7 and [row["predict"] == "" for row in written].count(True) == 2
    assert len(report.too_long) == 2 and all(f"{data}:" in place for place in report.too_long)
    assert "there is room for 13" in report.too_long[0]
    assert report.rows == 10
    assert [place.split(": ")[0] for place in report.unusable] == [f"{data}:{line}" for line in (8, 9, 10)]


def test_rows_without_an_answer_have_the_target_nothing(tmp_path: Path) -> None:
    data = tmp_path / "ask.jsonl"
    messages = [{"role": r, "content": c} for r, c in (("user", "一"), ("assistant", "二"), ("user", "三四"))]
    rows = [
        {"instruction": "甲乙"},
        {"instruction": "丙丁", "output": ""},
        {"messages": messages},
        {"messages": messages[2:]},
    ]
    data.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    run(EchoEngine(), data, tmp_path / "p.json")
    written = json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))
    assert [(row["predict"], row["target"]) for row in written] == [
        ("乙甲", ""),
        ("丁丙", ""),
        ("四三", ""),
        ("四三", ""),
    ]
    assert "一" in written[2]["input"] and written[2]["input"].endswith("用户:三四\n\n助手:")


def test_no_row_asks_anything(tmp_path: Path) -> None:
    data = tmp_path / "ask.jsonl"
    data.write_text('{"instruction": "", "output": "x"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="no row asks anything"):
        run(EchoEngine(), data, tmp_path / "p.json")
    assert list(tmp_path.iterdir()) == [data]


def test_rows_from_python() -> None:
    assert question_of_record("你好").conversation == Conversation((Turn("user", "你好"),))
    row = question_of_record({"instruction": "译", "input": "天", "output": "sky"})
    assert row.conversation.turns[-1] == Turn("user", "译", "天") and row.target == "sky"
    talk = Conversation((Turn("user", "a"), Turn("assistant", "b")))
    assert question_of_record(talk).target == "b"
    with pytest.raises(DataError, match="no known row format"):
        question_of_record({"x": 1})
    with pytest.raises(DataError):
        question_of_record({"instruction": 3, "output": "x"})


def test_several_answers_a_row_are_drawn_one_by_one_and_kept(tmp_path: Path) -> None:
    data, out = rows_file(tmp_path, 4), tmp_path / "p.json"
    drawn = GenerationSettings(max_new_tokens=8, do_sample=True, temperature=0.8, seed=7)

    class Drawing(EchoEngine):
        def generate(self, conversations: Any, settings: Any, **options: Any) -> list[Reply]:
            replies = super().generate(conversations, settings, **options)
            return [Reply(f"{reply.text}{settings.seed}", (), "stop", 1, 1) for reply in replies]

    def go(engine: EchoEngine, settings: GenerationSettings, n: int = 3) -> PredictReport:
        rows = (row for source in resolve_sources([str(data)]) for row in read_rows(source))
        return predict_file(engine, rows, out, settings, batch_size=3, n=n)

    with pytest.raises(KeyboardInterrupt):
        go(Drawing(die_after=3), drawn)
    report = go(Drawing(), drawn)
    assert (report.rows, report.reused, report.predicted) == (4, 7, 5), "batches of 3 and 1 for each draw"
    rows = json.loads(out.read_text(encoding="utf-8"))
    texts = ["问" * (1 + number * 3 % 7) for number in range(4)]
    assert [row["answers"] for row in rows] == [[f"{text}{seed}" for seed in (7, 8, 9)] for text in texts]
    assert [row["predict"] for row in rows] == [f"{text}7" for text in texts]

    unseeded = replace(drawn, seed=None)
    with pytest.raises(KeyboardInterrupt):
        go(Drawing(die_after=3), unseeded)
    assert go(Drawing(), unseeded).reused == 7, "draws without a seed are told apart too"
    with pytest.raises(UsageError, match="without sampling all 2 answers are the same"):
        go(Drawing(), SETTINGS, n=2)
    with pytest.raises(UsageError, match="4 beams give fewer than 5 answers"):
        go(Drawing(), replace(SETTINGS, num_beams=4), n=5)
    assert not list(tmp_path.glob(".*"))


def test_several_beams_a_row_come_of_one_search(tmp_path: Path) -> None:
    data, out = rows_file(tmp_path, 2), tmp_path / "p.json"

    class Searching(EchoEngine):
        def generate(self, conversations: Any, settings: Any, **options: Any) -> list[Reply]:
            replies = super().generate(conversations, settings, **options)
            beams = [tuple(f"{reply.text}{beam}" for beam in range(settings.num_beams)) for reply in replies]
            return [Reply(texts[0], (), "stop", 1, 5, beams=texts) for texts in beams]

    rows = [row for source in resolve_sources([str(data)]) for row in read_rows(source)]
    searched = replace(SETTINGS, num_beams=4)
    engine = Searching()
    report = predict_file(engine, rows, out, searched, n=3)
    assert len(engine.batches) == 1 and report.predicted == 2
    written = json.loads(out.read_text(encoding="utf-8"))
    assert written[0]["answers"] == ["问0", "问1", "问2"] and written[0]["predict"] == "问0"
    predict_file(Searching(), rows, out, searched)
    assert "answers" not in json.loads(out.read_text(encoding="utf-8"))[0]


def test_prompts_too_long_leave_their_batch_and_the_others_stay_together(tmp_path: Path) -> None:
    engine = EchoEngine(limit=13)
    report = run(engine, rows_file(tmp_path), tmp_path / "p.json")
    assert len(report.too_long) == 2
    assert [len(batch) for batch in engine.batches] == [1, 3, 1], "of the first three only one fits"
