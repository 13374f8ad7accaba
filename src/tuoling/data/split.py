"""Train and test parts that share no question: rows are drawn by group of duplicates, never one by one."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tuoling.data.duplicates import NearDuplicates, first_of_equal, groups_of, key_of, spoken
from tuoling.data.json_stream import json_line
from tuoling.data.read import read_rows
from tuoling.data.sources import Source
from tuoling.errors import DataError, UsageError
from tuoling.files import atomic_write
from tuoling.language import tr


@dataclass(frozen=True, slots=True)
class SplitReport:
    """Rows in each part. groups: of duplicates, over all rows; bad: rows left out because they cannot be read."""

    train: Path
    test: Path
    rows: int
    train_rows: int
    test_rows: int
    groups: int
    grouped_rows: int
    bad: int
    seed: int


def parse_test_size(text: str) -> float | int:
    """`10%` and `0.1` are a share, `200` a number of rows. Raises UsageError."""
    try:
        if text.endswith("%"):
            size: float | int = float(text[:-1]) / 100
        else:
            size = int(text) if text.isdigit() else float(text)
    except ValueError:
        size = -1
    if size <= 0 or (isinstance(size, float) and size >= 1):
        raise UsageError(
            tr(
                f"--test {text}: a share (10%) or a number of rows is wanted",
                f"--test {text}：应为比例（10%）或行数",
            ),
            remedy="--test 10%",
        )
    return size


def split(
    sources: Sequence[Source], *, test: float | int, out: Path, seed: int = 42, force: bool = False
) -> SplitReport:
    """Write out/train.jsonl and out/test.jsonl, records as they are. Equal inputs and seed give equal files.

    test: a share of the rows or their number. Rows that say the same, nearly the same, or ask the same stay on one
    side. Bad rows go to neither. Raises DataError where fewer rows can be had than are asked for, UsageError where
    the files are there already and `force` is not given.
    """
    train_path, test_path = out / "train.jsonl", out / "test.jsonl"
    if not force and (train_path.exists() or test_path.exists()):
        raise UsageError(
            tr("there are train and test files here already", "这里已有切分好的文件"),
            where=str(out),
            remedy=tr(
                "choose another --out, or --force to replace the two files",
                "换一个 --out，或用 --force 覆盖这两个文件",
            ),
        )
    groups, bad = _groups(sources)
    wanted = test if isinstance(test, int) else max(1, round(test * len(groups)))
    if wanted >= len(groups):
        raise DataError(
            tr(
                f"{wanted} test rows are asked for, there are {len(groups)} good rows",
                f"要 {wanted} 行测试数据，而合格的只有 {len(groups)} 行",
            ),
            where=", ".join(source.path for source in sources),
            remedy=tr("ask for fewer, for example --test 10%", "请减少，例如 --test 10%"),
        )
    in_test = _draw(groups, wanted, seed)
    with ExitStack() as stack:
        files = [stack.enter_context(atomic_write(path)) for path in (train_path, test_path)]
        index = 0
        for source in sources:
            for row in read_rows(source):
                if row.conversation is not None and not row.problems:
                    files[int(in_test[index])].write(json_line(row.record))
                    index += 1
    sizes = np.bincount(groups, minlength=len(groups))
    return SplitReport(
        train_path,
        test_path,
        len(groups) + bad,
        int((~in_test).sum()),
        int(in_test.sum()),
        int((sizes > 1).sum()),
        int(sizes[sizes > 1].sum()),
        bad,
        seed,
    )


def _groups(sources: Sequence[Source]) -> tuple[np.ndarray, int]:
    """For each good row the first row of its group [N], and the number of bad rows."""
    rows, questions = array("Q"), array("Q")
    near = NearDuplicates()
    bad = 0
    for source in sources:
        for row in read_rows(source):
            if row.conversation is None or row.problems:
                bad += 1
                continue
            said, asked = spoken(row.conversation)
            rows.append(key_of(said))
            questions.append(key_of(asked))
            near.add(said)
    same = first_of_equal(np.frombuffer(rows, np.uint64))
    same_question = first_of_equal(np.frombuffer(questions, np.uint64))
    try:
        return groups_of(len(rows), [same, same_question], near.pairs(same)), bad
    finally:
        near.close()


def _draw(groups: np.ndarray, wanted: int, seed: int) -> np.ndarray:
    """Which rows are test rows: whole groups in seeded order, those that would overshoot passed over. [N] bool

    Raises DataError where groups are too large to come near.
    """
    roots, sizes = np.unique(groups, return_counts=True)
    order = list(range(len(roots)))
    random.Random(seed).shuffle(order)
    chosen, count = set(), 0
    for position in order:
        if count + sizes[position] <= wanted:
            chosen.add(int(roots[position]))
            count += int(sizes[position])
        if count == wanted:
            break
    if not count:
        raise DataError(
            tr(f"every group of duplicates is larger than {wanted} rows", f"每组重复数据都多于 {wanted} 行"),
            remedy=tr("ask for more test rows, or remove duplicates first", "请增加测试行数，或先去重"),
        )
    return np.isin(groups, list(chosen))
