"""Near-duplicate removal among a million instructions: time, memory, and what brute force finds beside it.

    python benchmarks/duplicates.py [--rows 1000000] [--sample 20000] [--write]

The instructions are made from real ones (of ../shared/data, or of the demo where that is absent): halves of two, put
together and edited in up to a third of their characters, so that they are alike in every degree. Brute force compares
all pairs of a sample of them. "missed" are pairs above the limit of which both stay; "brought together" is the share of
pairs that some band would compare, whatever else is in the bucket.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import time
from pathlib import Path

import numpy as np

from tuoling.data.near_instructions import ABOVE, BANDS, ROWS, Search
from tuoling.demo.rows import training_rows
from tuoling.environment import cpu_count

HERE = Path(__file__).parent
SHARED = HERE.parent.parent / "shared" / "data"
PLACES = {
    "belle/eval_set.json": "question",
    "belle/zh_seed_tasks.json": "instruction",
    "alpaca/alpaca_zh_demo.json": "instruction",
    "domain/domain.train.json": "instruction",
    "self-instruct/generated_questions.jsonl": "question",
}


def real(shared: Path) -> list[str]:
    """Instructions that people and models wrote."""
    texts: list[str] = []
    for name, field in PLACES.items():
        if not (shared / name).is_file():
            continue
        text = (shared / name).read_text(encoding="utf-8-sig")
        rows = json.loads(text) if text.lstrip().startswith("[") else map(json.loads, text.splitlines())
        texts += [row[field] for row in rows]
    if not texts:
        texts = [str(row["instruction"]) for row in training_rows(2000, seed=0)]
    return texts


def instructions(count: int, texts: list[str], seed: int = 0) -> list[str]:
    """`count` instructions, alike in every degree."""
    chance = random.Random(seed)
    signs = "".join(texts)
    made = []
    while len(made) < count:
        one, other = chance.choice(texts), chance.choice(texts)
        cut = chance.random()
        text = list(one[: int(len(one) * cut)] + other[int(len(other) * cut) :])[:120]
        for _ in range(int(len(text) * chance.random() / 3)):
            place = chance.randrange(len(text))
            kind = chance.randrange(3)
            if kind == 0:
                text[place] = chance.choice(signs)
            elif kind == 1:
                text.insert(place, chance.choice(signs))
            elif len(text) > 4:
                del text[place]
        if text:
            made.append("".join(text))
    return made


def brute_force(texts: list[str]) -> tuple[Search, np.ndarray, np.ndarray]:
    """All pairs above the limit, (earlier, later)."""
    search = Search(texts)
    earlier, later = [], []
    for place in range(1, len(texts)):
        before = np.arange(place)
        alike = search.alike(np.full(place, place), before)
        earlier.append(before[alike])
        later.append(np.full(int(alike.sum()), place))
    return search, np.concatenate(earlier), np.concatenate(later)


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--rows", type=int, default=1_000_000)
    asked.add_argument("--sample", type=int, default=20_000)
    asked.add_argument("--threads", type=int, default=cpu_count())
    asked.add_argument("--data", type=Path, default=SHARED)
    asked.add_argument("--write", action="store_true")
    options = asked.parse_args()
    texts = instructions(options.rows, real(options.data))
    before = peak_gib()
    wall, cpu = time.perf_counter(), time.process_time()
    report = Search(texts).greedy(options.threads, lambda done, total: None)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = peak_gib()
    chosen = np.sort(
        np.random.default_rng(1).choice(len(texts), min(options.sample, len(texts)), replace=False)
    )
    search, earlier, later = brute_force([texts[place] for place in chosen])
    kept = report.kept[chosen]
    missed = int((kept[earlier] & kept[later]).sum())
    together = np.zeros(len(earlier), bool)
    for band in range(BANDS):
        keys = search.keys(band)
        together |= keys[earlier] == keys[later]
    figures = {
        "rows": len(texts),
        "mean_characters": round(sum(map(len, texts)) / len(texts), 1),
        "threads": options.threads,
        "bands_x_rows": f"{BANDS} x {ROWS}",
        "seconds": round(wall, 1),
        "cpu_seconds": round(cpu, 1),
        "peak_gib": round(peak, 2),
        "of_it_the_texts_gib": round(before, 2),
        "kept": int(report.kept.sum()),
        "exact": report.exact,
        "near": report.near,
        "pairs_compared_exactly": report.compared,
        "passes": report.passes,
        "sample": len(chosen),
        "limit": ABOVE,
        "pairs_brute_force": len(earlier),
        "pairs_missed": missed,
        "found": round(1 - missed / max(1, len(earlier)), 4),
        "brought_together": round(float(together.mean()) if len(together) else 1.0, 4),
    }
    text = json.dumps(figures, indent=2)
    print(text)
    if options.write:
        (HERE / "duplicates.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
