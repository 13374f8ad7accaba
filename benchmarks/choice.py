"""`--suite choice` beside lm-eval's own number: the same model, rows and examples.

    python benchmarks/choice.py MODEL ... [--write]

Sums in C-Eval's shape, 3 subjects of 40 questions, 0 and 3 examples, float32 on the CPU. lm-eval 0.4 loads the model
itself and runs a task of its own over the same CSV files, worded as its C-Eval tasks are. Adapters are merged first
(tuoling merge). --write also writes choice.json beside this file.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.evaluate.lm_eval_oracle import lm_eval_numbers, our_numbers, write_ceval, write_tasks

SUBJECTS = ["college_physics", "law", "physician"]
QUESTIONS = 40


def compare(model: Path, folder: Path) -> list[dict[str, Any]]:
    """A row for each number of examples."""
    ceval = write_ceval(folder / "ceval", SUBJECTS, QUESTIONS)
    tasks = write_tasks(folder / "tasks", ceval, SUBJECTS)
    rows = []
    for shots in (0, 3):
        theirs = lm_eval_numbers(model, tasks, SUBJECTS, shots)
        ours, likely = our_numbers(model, ceval, shots, folder / f"{model.name}-{shots}")
        wanted = [letters for subject in SUBJECTS for letters in theirs[subject][1]]
        apart = max(
            abs(one - other)
            for letters, others in zip(likely, wanted, strict=True)
            for one, other in zip(letters, others, strict=True)
        )
        rows.append(
            {
                "model": model.name,
                "shots": shots,
                "ours": {subject: round(ours[subject], 6) for subject in SUBJECTS},
                "lm_eval": {subject: round(theirs[subject][0], 6) for subject in SUBJECTS},
                "equal": all(ours[subject] == theirs[subject][0] for subject in SUBJECTS),
                "log_likelihoods": 4 * len(wanted),
                "most_nats_apart": round(apart, 7),
            }
        )
    return rows


def main() -> int:
    models = [Path(word).resolve() for word in sys.argv[1:] if word != "--write"]
    if not models:
        print(__doc__)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = str(Path(folder) / "datasets")
        rows = [row for model in models for row in compare(model, Path(folder))]
    for row in rows:
        print(json.dumps(row, ensure_ascii=False))
    if "--write" in sys.argv:
        found = {"lm_eval": version("lm-eval"), "questions": QUESTIONS, "subjects": SUBJECTS, "rows": rows}
        path = Path(__file__).with_suffix(".json")
        path.write_text(json.dumps(found, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        print(path)
    return 0 if all(row["equal"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
