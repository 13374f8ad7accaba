"""Rows a second of `tuoling predict` beside a loop that asks one row at a time.

    python benchmarks/predict.py MODEL ROWS [--limit 64] [--max-new-tokens 64] [--batch-sizes 8,16,32]
        [--dtype fp32] [--device auto] [--rounds 3] [--write]

The loop is what a script without a tool does: render, tokenise, `model.generate`, decode, next row; transformers
alone, the same prompts, greedy, the same end tokens. Both have the weights once, loaded before the clock runs. Loop and
batches take turns, `--rounds` times; the median of each is told. Answers are compared: in float32 they are the same.
A model that never ends its answers gives each `max_new_tokens` of them, which is the best case of a batch; a tuned
one shows what is lost while short answers wait for long ones. `--write` leaves predict.json and predict.md here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tuoling import environment
from tuoling.api import load
from tuoling.data.read import read_rows
from tuoling.data.sources import resolve_sources
from tuoling.files import write_json
from tuoling.infer.predict import PredictReport, Question, predict, questions_of

HERE = Path(__file__).parent


def one_by_one(engine: Any, questions: list[Question], max_new_tokens: int) -> list[str]:
    """The loop. `engine` gives prompts and end tokens; what generates is transformers' own method."""
    model, tokenizer, answers = engine.model, engine.tokenizer.hf, []
    for question in questions:
        prompt = engine.prompt_ids(question.conversation)
        ids = torch.tensor([prompt], device=engine.device)
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=max_new_tokens,
                eos_token_id=sorted(engine.end_ids),
                pad_token_id=tokenizer.pad_token_id,
            )
        answers.append(tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True))
    return answers


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """Rates of the loop and of each batch size, and how many answers are the same."""
    rows = (row for source in resolve_sources([asked.rows]) for row in read_rows(source))
    questions = questions_of(itertools.islice(rows, asked.limit))[0]
    sizes = [int(size) for size in asked.batch_sizes.split(",")]
    seconds: dict[int, list[float]] = {size: [] for size in (0, *sizes)}
    same: dict[int, int] = {}
    with load(asked.model, dtype=asked.dtype, device=asked.device) as model:
        settings = model.settings_of_prediction(max_new_tokens=asked.max_new_tokens)
        one_by_one(model.engine, questions[:1], 4)
        predict(model.engine, questions[:2], model.settings_of_prediction(max_new_tokens=4))
        for _ in range(asked.rounds):
            start = time.perf_counter()
            alone = one_by_one(model.engine, questions, asked.max_new_tokens)
            seconds[0].append(time.perf_counter() - start)
            for size in sizes:
                report = PredictReport()
                start = time.perf_counter()
                found = predict(model.engine, questions, settings, batch_size=size, report=report)
                seconds[size].append(time.perf_counter() - start)
                pairs = zip(found, alone, strict=True)
                same[size] = sum(ours["predict"].strip() == theirs.strip() for ours, theirs in pairs)
    rate = {size: len(questions) / median(taken) for size, taken in seconds.items()}
    return {
        "model": Path(asked.model).name,
        "rows": len(questions),
        "max_new_tokens": asked.max_new_tokens,
        "answer_tokens": report.tokens,
        "dtype": asked.dtype,
        "loop_rows_per_s": rate[0],
        "batches": [
            {
                "batch_size": size,
                "rows_per_s": rate[size],
                "times_the_loop": rate[size] / rate[0],
                "same_answers": same[size],
            }
            for size in sizes
        ],
        "torch_threads": torch.get_num_threads(),
        "machine": environment.machine(),
    }


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"{found['model']}, {found['rows']} rows, {found['answer_tokens']} answer tokens in all, {found['dtype']}, "
        f"{found['torch_threads']} threads",
        "",
        "| | rows/s | times the loop | same answers |",
        "|---|---|---|---|",
        f"| one by one | {found['loop_rows_per_s']:.2f} | 1 | |",
    ]
    for one in found["batches"]:
        lines.append(
            f"| batches of {one['batch_size']} | {one['rows_per_s']:.2f} | {one['times_the_loop']:.2f} "
            f"| {one['same_answers']} of {found['rows']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--batch-sizes", default="8,16,32")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    found = measure(asked)
    print(table(found))
    print(json.dumps(found, ensure_ascii=False))
    if asked.write:
        write_json(HERE / "predict.json", found, indent=2)
        text = f"# Predictions, rows a second\n\n`python benchmarks/predict.py {found['model']} ROWS`\n\n{table(found)}\n"
        (HERE / "predict.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
