"""lm-eval's own accuracy for the CSV files of a folder in C-Eval's shape, through tasks written for them; and ours."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tuoling.evaluate.choices import read_choices
from tuoling.evaluate.evaluation import Evaluation, evaluate
from tuoling.evaluate.likelihood import log_likelihoods
from tuoling.evaluate.subjects import opening
from tuoling.evaluate.suites.choice import context_of
from tuoling.infer.open_engine import open_engine

TEXT = "{{question.strip()}}\nA. {{A}}\nB. {{B}}\nC. {{C}}\nD. {{D}}\n答案："


def write_ceval(folder: Path, subjects: list[str], questions: int, *, seed: int = 0) -> Path:
    """A folder in C-Eval's shape with made-up sums: dev/ with 5 examples a subject, val/ with the questions."""
    draw = random.Random(seed)
    for split, count in (("dev", 5), ("val", questions)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        for subject in subjects:
            with (folder / split / f"{subject}_{split}.csv").open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["id", "question", "A", "B", "C", "D", "answer"])
                for number in range(count):
                    one, other = draw.randrange(2, 60), draw.randrange(2, 40)
                    options = [one + other, one + other + 1, one + other - 2, one + other + 10]
                    draw.shuffle(options)
                    letter = "ABCD"[options.index(one + other)]
                    writer.writerow([number, f" {one}加{other}等于多少？____ ", *options, letter])
    return folder


def write_tasks(folder: Path, ceval: Path, subjects: list[str]) -> Path:
    """lm-eval tasks `own_SUBJECT` over the folder's files, worded as its C-Eval tasks are."""
    folder.mkdir(parents=True, exist_ok=True)
    for subject in subjects:
        files = {split: str(ceval / split / f"{subject}_{split}.csv") for split in ("dev", "val")}
        task = {
            "task": f"own_{subject}",
            "dataset_path": "csv",
            "dataset_kwargs": {"data_files": files},
            "validation_split": "val",
            "fewshot_split": "dev",
            "fewshot_config": {"sampler": "first_n"},
            "output_type": "multiple_choice",
            "description": opening("ceval", subject),
            "doc_to_text": TEXT,
            "doc_to_choice": ["A", "B", "C", "D"],
            "doc_to_target": "{{['A', 'B', 'C', 'D'].index(answer)}}",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        (folder / f"own_{subject}.yaml").write_text(json.dumps(task, ensure_ascii=False), encoding="utf-8")
    return folder


def lm_eval_numbers(
    model: Path, tasks: Path, subjects: list[str], shots: int
) -> dict[str, tuple[float, list[Any]]]:
    """Subject → (accuracy, log-likelihoods of the four letters, question by question), loaded by lm-eval itself."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": "float32"},
        tasks=[f"own_{subject}" for subject in subjects],
        num_fewshot=shots,
        task_manager=TaskManager(include_path=str(tasks)),
        bootstrap_iters=0,
        batch_size=8,
        device="cpu",
    )
    assert found is not None
    numbers = {}
    for subject in subjects:
        samples = sorted(found["samples"][f"own_{subject}"], key=lambda sample: sample["doc_id"])
        likely = [[float(pair[0][0]) for pair in sample["resps"]] for sample in samples]
        numbers[subject] = (float(found["results"][f"own_{subject}"]["acc,none"]), likely)
    return numbers


def our_numbers(
    model: Path, ceval: Path, shots: int, out: Path
) -> tuple[dict[str, float], list[Sequence[float]]]:
    """Subject → accuracy by `--suite choice`, and the log-likelihoods of the four letters of every question."""
    load = {"dtype": "fp32", "device": "cpu"}
    asked = Evaluation(
        str(model), suite="choice", file=str(ceval), shots=shots, out=out, alone=True, load=load
    )
    (scores,) = evaluate(asked).scores()
    accuracy = {
        subject: found["metrics"]["accuracy"]["model"]["mean"] for subject, found in scores["classes"].items()
    }
    found = read_choices(str(ceval))
    pairs = [
        (context_of(one, found.examples[one.subject][:shots]), one.continuations) for one in found.questions
    ]
    engine = open_engine(str(model), **load)
    try:
        return accuracy, list(log_likelihoods(engine, pairs))
    finally:
        engine.close()
