"""From nothing to a model that answers: rows, tokenizer, small base, LoRA, predictions before and after."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuoling import api, files
from tuoling.demo import base, rows
from tuoling.language import tr
from tuoling.train.run_folder import add_results, claim

TEMPLATE = "domain_bloom"
TEMPLATE_TEXTS = ("用户:", "\n\n助手:", "\n\n用户:")


@dataclass(frozen=True, slots=True)
class Course:
    """How much is read and how. The figures are those that fit 2 cores and two minutes.

    sentencepiece: the tokenizer in the form that llama.cpp has, so that the model can become a GGUF file.
    """

    corpus: int = 20000
    rows: int = 6000
    held_out_per_kind: int = 30
    pretrain: Mapping[str, Any] = field(
        default_factory=lambda: {
            "per_device_train_batch_size": 96,
            "num_train_epochs": 1.5,
            "optim": "muon",
            "learning_rate": 1e-2,
            "lr_scheduler_type": "cosine",
            "warmup_ratio": 0.05,
            "weight_decay": 0.1,
            "adam_beta2": 0.98,
        }
    )
    tune: Mapping[str, Any] = field(
        default_factory=lambda: {
            "per_device_train_batch_size": 32,
            "num_train_epochs": 1.8,
            "learning_rate": 5e-3,
            "lr_scheduler_type": "cosine",
            "warmup_ratio": 0.05,
            "adam_beta2": 0.98,
            "lora_rank": 32,
            "lora_alpha": 32,
            "lora_dropout": 0.0,
        }
    )
    size: base.Size = field(default_factory=base.Size)
    sentencepiece: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """Where the run lies, accuracy (0 to 1) by kind of task before and after tuning, and some answers."""

    run: Path
    before: dict[str, float]
    after: dict[str, float]
    answers: list[dict[str, str]]
    seconds: float


def quickstart(
    out: Path,
    *,
    family: base.FamilyName = "bloom",
    seed: int = 42,
    overwrite: bool = False,
    course: Course | None = None,
    started: float | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Rows → tokenizer and blank model → pre-training → predictions → LoRA → predictions, plots and scores.

    out: folder to make, with `rows`, `blank`, `base` and the run in `run`. Refused with OutputError if it holds
    anything; `overwrite` moves it aside. started: `time.perf_counter()` of when the user began to wait.
    """
    began = time.perf_counter() if started is None else started
    course = course or Course()
    moved = claim(out, overwrite=overwrite, switch="--overwrite")
    if moved:
        say(moved)
    say(tr("1/5 writing rows, a tokenizer and a blank model", "1/5 写出数据，建分词器和空白模型"))
    held_out = write_files(out, family=family, seed=seed, course=course)
    test = out / "rows" / "test.jsonl"

    say(tr("2/5 pre-training on plain text", "2/5 在纯文本上预训练"))
    keys = {"seed": seed, "save_steps": 0, "max_seq_len": 256, "logging_steps": 100, "template": TEMPLATE}
    plain = {**keys, **course.pretrain, "stage": "pt", "finetuning_type": "full"}
    train(out / "blank", out / "rows" / "corpus.jsonl", out / "base", **plain)

    say(tr("3/5 asking the base the held-out questions", "3/5 让基座回答没见过的题目"))
    before = score(held_out, predict(out / "base", test, out / "base" / "predictions.json"))

    say(tr("4/5 teaching it instructions with LoRA", "4/5 用 LoRA 学习指令"))
    train(out / "base", out / "rows" / "train.jsonl", out / "run", **keys, **course.tune)

    say(tr("5/5 asking again", "5/5 再问一遍"))
    predictions = predict(out / "run", test, out / "run" / "predictions.json")
    after = score(held_out, predictions)
    seconds = time.perf_counter() - began
    _leave(out / "run", before, after, seconds)
    return Outcome(out / "run", before, after, predictions, seconds)


def write_files(out: Path, *, family: base.FamilyName, seed: int, course: Course) -> list[dict[str, Any]]:
    """Write the rows, the tokenizer and the model with random weights; returns the held-out rows."""
    corpus = rows.corpus(course.corpus, seed=seed)
    held_out = rows.held_out_rows(course.held_out_per_kind, seed=seed)
    rows.write_jsonl(out / "rows" / "corpus.jsonl", [{"text": text} for text in corpus])
    rows.write_jsonl(out / "rows" / "train.jsonl", rows.training_rows(course.rows, seed=seed))
    rows.write_jsonl(out / "rows" / "test.jsonl", held_out)
    words = [*rows.tokenizer_texts(400, seed=seed), *TEMPLATE_TEXTS * 1000]
    alphabet = "".join(corpus) + "".join(words)
    tokenizer = base.train_tokenizer(words, alphabet, vocabulary=course.size.vocabulary)
    if course.sentencepiece:
        tokenizer = base.as_sentencepiece(tokenizer)
    base.write_blank_model(out / "blank", tokenizer, family=family, size=course.size, seed=seed)
    return held_out


def train(model: Path, data: Path, out: Path, **keys: Any) -> None:
    """One run of the product's own training; its plan and notes stay in the run folder."""
    api.train(model_name_or_path=str(model), data=str(data), output_dir=str(out), say=lambda _: None, **keys)


def predict(model: Path, test: Path, out: Path) -> list[dict[str, str]]:
    """Answers to the held-out questions, asked in the template of the tuning."""
    with api.load(model, template=TEMPLATE) as loaded:
        loaded.predict_file([str(test)], out, batch_size=100, max_new_tokens=32)
    answers: list[dict[str, str]] = files.read_json(out)
    return answers


def score(held_out: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """Share of exactly right answers by kind of task; white space at the ends does not count."""
    right: dict[str, list[bool]] = defaultdict(list)
    for row, answer in zip(held_out, answers, strict=True):
        right[row["kind"]].append(answer["predict"].strip() == answer["target"].strip())
    return {kind: sum(found) / len(found) for kind, found in right.items()}


def mean(scores: Mapping[str, float]) -> float:
    """Average over kinds, each counted once."""
    return sum(scores.values()) / len(scores)


def _leave(run: Path, before: dict[str, float], after: dict[str, float], seconds: float) -> None:
    """Scores into all_results.json, and a picture of them."""
    from tuoling.plots import accuracy_plot

    scores = {
        "accuracy_before": mean(before),
        "accuracy_after": mean(after),
        "accuracy_by_kind": {kind: {"before": before[kind], "after": after[kind]} for kind in after},
        "quickstart_seconds": round(seconds, 1),
    }
    add_results(run, scores)
    names = {kind.id: kind.label for kind in rows.KINDS}
    accuracy_plot(
        {names[kind]: share for kind, share in before.items()},
        {names[kind]: share for kind, share in after.items()},
        run / "accuracy_by_kind.png",
    )
