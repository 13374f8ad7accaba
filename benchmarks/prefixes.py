"""Tokens that `share_prefixes` saves on dialogues in the shape of BELLE's multiturn_chat_0.8M.

    python benchmarks/prefixes.py TOKENIZER_FOLDER DIALOGUES.jsonl ... [--write]

Up to DIALOGUES dialogues of each file, cut after their first 2, 3 or after all of their answers, are unfolded into one
row an answer, with the dialogue so far as `instruction` (`Human:..\\nAssistant:..`) and the answer as `output`. The rows
go through the ordinary compiler; those that are too long are left out, for two limits. --write also writes prefixes.md
and prefixes.json beside this file.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tuoling.data.prefixes import share_prefixes
from tuoling.data.read import read_rows
from tuoling.data.sources import Source
from tuoling.data.store import StoreSettings, compile_store
from tuoling.models.tokenizers import load_tokenizer
from tuoling.text.conversation import Turn
from tuoling.text.templates import get_template
from tuoling.text.tokenizer import TextTokenizer

DIALOGUES = 400
CASES: tuple[dict[str, Any], ...] = (
    *({"answers": answers, "max_seq_len": limit} for limit in (1024, 2048) for answers in (2, 3, None)),
    {"max_seq_len": 2048, "learn": "all"},
    {"max_seq_len": 2048, "template": "domain_bloom"},
    {"max_seq_len": 2048, "template": "alpaca"},
)


def unfold(turns: tuple[Turn, ...], answers: int | None) -> list[dict[str, str]]:
    """A dialogue's rows, one for each of its first `answers` answers."""
    rows: list[dict[str, str]] = []
    so_far = ""
    for question, answer in zip(turns[::2], turns[1::2], strict=False):
        if len(rows) == answers:
            break
        so_far += f"Human:{question.text.strip()}\nAssistant:"
        rows.append({"instruction": so_far, "input": "", "output": answer.text.strip()})
        so_far += answer.text.strip() + "\n"
    return rows


def measure(
    dialogues: Path,
    tokenizer: TextTokenizer,
    *,
    max_seq_len: int,
    answers: int | None = None,
    template: str = "belle_multiturn_rows",
    learn: Any = "last",
) -> dict[str, Any]:
    """Rows and tokens of one file without and with shared prefixes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        with file.open("w", encoding="utf-8") as out:
            for row in read_rows(Source(str(dialogues), sample=DIALOGUES)):
                for made in unfold(row.conversation.exchanges, answers) if row.conversation else ():
                    out.write(json.dumps(made, ensure_ascii=False) + "\n")
        store, report = compile_store(
            [Source(str(file), format="belle_multiturn")],
            tokenizer=tokenizer,
            template=get_template(template),
            settings=StoreSettings(max_seq_len=max_seq_len, overlong="drop", learn=learn, allow_bad=0.9),
            cache_dir=Path(folder) / "cache",
        )
        shared = share_prefixes(store, np.arange(len(store)))
        tokens, left = int(store.lengths.sum()), int(store.lengths[shared.hosts].sum())
        if int(shared.learned(store).sum()) != int(store.learned.sum()):
            raise AssertionError("a learned token was lost")
    return {
        "dialogues": dialogues.name,
        "max_seq_len": max_seq_len,
        "answers_at_most": answers,
        "template": template,
        "learn": learn,
        "rows": len(store),
        "dropped_overlong": report.dropped_overlong,
        "bad": report.bad,
        "rows_trained": len(shared.hosts),
        "tokens": tokens,
        "tokens_trained": left,
        "saved": round(1 - left / tokens, 4),
    }


def table(measured: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        f"At most {DIALOGUES} dialogues of each file; rows over the limit are left out.",
        "",
        "| dialogues | limit | answers | template | learn | rows | trained | tokens | trained | saved |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one['dialogues']} | {one['max_seq_len']} | {one['answers_at_most'] or 'all'} | {one['template']} | {one['learn']} "
        f"| {one['rows']:,} | {one['rows_trained']:,} | {one['tokens']:,} | {one['tokens_trained']:,} "
        f"| {one['saved']:.1%} |"
        for one in measured
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure every file, print, and write where asked."""
    words = [word for word in sys.argv[1:] if word != "--write"]
    tokenizer = load_tokenizer(words[0], for_training=False)
    measured = [measure(Path(file), tokenizer, **case) for file in words[1:] for case in CASES]
    text = table(measured)
    print(text)
    if "--write" in sys.argv:
        here = Path(__file__)
        here.with_suffix(".json").write_text(
            json.dumps(measured, ensure_ascii=False, indent=1) + "\n", "utf-8"
        )
        here.with_suffix(".md").write_text(f"# Tokens saved by `share_prefixes`\n\n{text}", "utf-8")


if __name__ == "__main__":
    main()
