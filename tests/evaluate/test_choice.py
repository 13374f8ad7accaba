"""Multiple choice: the files of three collections, the prompt byte for byte, and lm-eval's own numbers."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from tests.evaluate.lm_eval_oracle import lm_eval_numbers, our_numbers, write_ceval, write_tasks
from tests.tiny import tiny_model

from tuoling.errors import DataError, ModelError, UsageError
from tuoling.evaluate.choices import read_choices, require_examples
from tuoling.evaluate.evaluation import Evaluation, evaluate
from tuoling.evaluate.likelihood import log_likelihoods, split_ids
from tuoling.evaluate.outcome import item_rows
from tuoling.evaluate.subjects import SUBJECTS, group_of
from tuoling.evaluate.suites.choice import context_of


def test_ceval_with_examples(tmp_path: Path) -> None:
    folder = write_ceval(tmp_path / "ceval", ["law", "physician"], 4)
    found = read_choices(folder)
    assert [one.subject for one in found.questions] == ["law"] * 4 + ["physician"] * 4
    with (folder / "val" / "law_val.csv").open(encoding="utf-8") as file:
        row = next(csv.DictReader(file))
    with (folder / "dev" / "law_dev.csv").open(encoding="utf-8") as file:
        example = next(csv.DictReader(file))

    def text(one: dict[str, str]) -> str:
        return (
            f"{one['question'].strip()}\nA. {one['A']}\nB. {one['B']}\nC. {one['C']}\nD. {one['D']}\n答案："
        )

    assert context_of(found.questions[0], found.examples["law"][:1]) == (
        "以下是中国关于法学的单项选择题，请选出其中的正确答案。\n\n"
        f"{text(example)} {example['answer']}\n\n{text(row)}"
    )
    assert found.questions[0].gold == {"ABCD".index(row["answer"])}
    assert read_choices(folder / "val").examples.keys() == {"law", "physician"}
    one_file = read_choices(folder / "val" / "law_val.csv", limit=2)
    assert len(one_file.questions) == 2 and len(one_file.examples["law"]) == 5
    with pytest.raises(UsageError, match="6 examples are asked for, law has 5"):
        require_examples(found, 6)


def test_cmmlu_agieval_and_ones_own(tmp_path: Path) -> None:
    (tmp_path / "cmmlu" / "test").mkdir(parents=True)
    (tmp_path / "cmmlu" / "test" / "agronomy.csv").write_text(
        ",Question,A,B,C,D,Answer\n0,哪种是粮食？,水稻,茶,棉,麻,A\n", encoding="utf-8"
    )
    (one,) = read_choices(tmp_path / "cmmlu").questions
    assert (one.subject, one.collection, one.gold, one.continuations[3]) == ("agronomy", "cmmlu", {0}, " D")
    assert one.text == "哪种是粮食？\nA. 水稻\nB. 茶\nC. 棉\nD. 麻\n答案："
    rows = [
        {"passage": None, "question": "一加一？", "options": ["(A)1", "(B)2"], "label": "B", "answer": None},
        {"query": "问题：", "choices": ["(A)甲", "(B)乙丙"], "gold": [0, 1]},
        {"question": "哪个是动物？", "options": ["猫", "桌子", "山"], "answer": "桌子", "subject": "常识"},
        {"question": "没有答案？", "options": ["猫", "桌子"], "answer": ""},
    ]
    file = tmp_path / "gaokao-biology.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    found = read_choices(file)
    first, second, third = found.questions
    assert first.text == "问题：一加一？ 选项：(A)1 (B)2\n答案：从A到B, 我们应选择" and first.gold == {1}
    assert second.continuations == (" (A)甲", " (B)乙丙") and second.gold == {0, 1}
    assert (third.subject, third.gold, third.continuations) == ("常识", {1}, (" A", " B", " C"))
    assert found.left_out == [f"{file}:4: no answer"]


def test_a_file_without_answers(tmp_path: Path) -> None:
    (tmp_path / "law_test.csv").write_text("id,question,A,B,C,D\n0,甲？,1,2,3,4\n", encoding="utf-8")
    with pytest.raises(DataError, match="no multiple choice question with an answer") as caught:
        read_choices(tmp_path / "law_test.csv")
    assert caught.value.where == f"{tmp_path / 'law_test.csv'}:2: no answer"


def test_the_tables_are_whole() -> None:
    assert {name: len(table) for name, table in SUBJECTS.items()} == {"ceval": 52, "cmmlu": 67}
    assert group_of("ceval", "law") == "humanities" and group_of("cmmlu", "agronomy") == "other"
    assert group_of("agieval", "gaokao-biology") == "gaokao" and group_of("own", "law") is None


def test_spaces_go_to_the_continuation() -> None:
    assert split_ids(lambda text: list(map(ord, text)), "甲 ", "乙") == ([ord("甲")], [ord(" "), ord("乙")])


@pytest.mark.slow
def test_likelihoods_are_those_of_one_text_alone(tmp_path: Path) -> None:
    """Batches, shared contexts and cut contexts against the plain sum over one sequence in float64."""
    import torch

    from tuoling.infer.open_engine import open_engine

    engine = open_engine(str(tiny_model(tmp_path / "model", "llama")), dtype="fp32", device="cpu")
    engine.context_tokens = 40
    asked = [
        ("三加五等于", [" A", " B"]),
        ("今天天气", ["很好。", "不好，下雨了", "。"]),
        ("长" * 60, [" A", " B"]),
    ]
    found = log_likelihoods(engine, asked, batch_size=3)
    hf, model = engine.tokenizer.hf, engine.model.double()  # type: ignore[attr-defined]
    for (context, continuations), scores in zip(asked, found, strict=True):
        for continuation, score in zip(continuations, scores, strict=True):
            tail = len(hf.encode(context + continuation)) - len(hf.encode(context))
            ids = hf.encode(context + continuation)[-41:]
            with torch.inference_mode():
                logs = torch.log_softmax(model(input_ids=torch.tensor([ids[:-1]])).logits[0], -1)
            wanted = sum(float(logs[place - 1, ids[place]]) for place in range(len(ids) - tail, len(ids)))
            assert score == pytest.approx(wanted, abs=2e-4)


def test_an_engine_without_logits() -> None:
    from tests.evaluate.fake_engine import FakeEngine

    with pytest.raises(ModelError, match="gives no likelihoods"):
        log_likelihoods(FakeEngine("f", str), [("甲", [" A"])])


@pytest.mark.long
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_lm_evals_own_number(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal accuracy by subject, equal letters in order, and every letter's log-likelihood, with 0 and 3 examples."""
    pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    subjects = ["college_physics", "law", "physician"]
    ceval = write_ceval(tmp_path / "ceval", subjects, 40)
    # smaller random BLOOMs answer every question with one letter
    model = tiny_model(tmp_path / "model", family, layers=6, hidden=64, seed=3)
    tasks = write_tasks(tmp_path / "tasks", ceval, subjects)
    for shots in (0, 3):
        theirs = lm_eval_numbers(model, tasks, subjects, shots)
        ours, likely = our_numbers(model, ceval, shots, tmp_path / f"out-{shots}")
        assert ours == {subject: accuracy for subject, (accuracy, _) in theirs.items()}
        wanted = [letters for subject in subjects for letters in theirs[subject][1]]
        assert np.abs(np.array(likely) - np.array(wanted)).max() < 1e-3
        picked = [row["model"]["answer"] for row in item_rows(tmp_path / f"out-{shots}")]
        assert picked == ["ABCD"[max(range(4), key=letters.__getitem__)] for letters in wanted]
        assert len(set(picked)) > 1


@pytest.mark.long
def test_a_task_of_lm_eval_through_our_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    ceval = write_ceval(tmp_path / "ceval", ["law"], 30)
    tasks = write_tasks(tmp_path / "tasks", ceval, ["law"])
    model = tiny_model(tmp_path / "model", "llama")
    theirs = lm_eval_numbers(model, tasks, ["law"], 0)
    asked = Evaluation(
        str(model), suite="lm-eval:own_law", file=str(tasks), out=tmp_path / "out", load={"dtype": "fp32"}
    )
    (scores,) = evaluate(asked).scores()
    assert scores["classes"]["own_law"]["metrics"]["acc"]["model"]["mean"] == theirs["law"][0]
    with pytest.raises(UsageError, match="lm-eval has no task nowhere"):
        evaluate(Evaluation(str(model), suite="lm-eval:nowhere", out=tmp_path / "out"))
