"""Questions of a test file that were trained on: the same words, or nearly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tuoling.data.duplicates import NEAR, NearDuplicates, first_of_equal, groups_of, key_of, spoken
from tuoling.evaluate.items import Item
from tuoling.evaluate.labels import Note


@dataclass(frozen=True, slots=True)
class Leaks:
    """exact, near: item index → where the row of the training data lies that asks the same. trained: rows compared.

    missing: data files of the run that are not here any more.
    """

    trained: int
    exact: Mapping[int, str]
    near: Mapping[int, str]
    missing: Sequence[str] = field(default_factory=tuple)

    def to_json(self, items: Sequence[Item]) -> dict[str, Any]:
        """For scores.json."""
        return {
            "trained_rows": self.trained,
            "exact": len(self.exact),
            "near": len(self.near),
            "similarity": NEAR,
            "missing_files": list(self.missing),
            "first": [
                {"item": items[index].place, "row": place}
                for index, place in sorted({**self.near, **self.exact}.items())[:20]
            ],
        }

    def words(self, total: int) -> Note:
        """One line for people."""
        leaked = len(self.exact) + len(self.near)
        if self.missing and not self.trained:
            names = ", ".join(self.missing)
            return Note(
                f"leaks unknown: the training rows are not here ({names})",
                f"无法检查泄漏：训练数据不在（{names}）",
            )
        if not leaked:
            return Note(
                f"no question of {total} is among {self.trained} training rows",
                f"{total} 题都不在 {self.trained} 行训练数据中",
            )
        return Note(
            f"{leaked} of {total} questions were trained on ({len(self.exact)} word for word, {len(self.near)} nearly): "
            "their scores prove nothing",
            f"{total} 题中有 {leaked} 题训练过（{len(self.exact)} 题原样，{len(self.near)} 题近似）：这些题的分数不作数",
        )


def training_rows(run: Mapping[str, Any]) -> tuple[list[Any], list[str]]:
    """(sources that are here, names of those that are not) of a run.json."""
    from tuoling.data.sources import resolve_sources
    from tuoling.errors import TuolingError

    config = run.get("config") or {}
    sources: list[Any] = []
    missing: list[str] = []
    format, columns = config.get("data_format"), config.get("columns")
    for spec in config.get("data") or []:
        try:
            sources += resolve_sources([str(spec)], format=format, columns=columns)
        except TuolingError:
            missing.append(str(spec))
    for name in config.get("dataset") or []:
        try:
            sources += resolve_sources([], dataset_dir=config.get("dataset_dir"), dataset_names=[str(name)])
        except TuolingError:
            missing.append(str(name))
    return sources, missing


def find_leaks(items: Sequence[Item], run: Mapping[str, Any]) -> Leaks:
    """Compare every question with every row the run was trained on.

    Only what is asked counts: a test row with another answer to the same question is one that was seen.
    """
    from tuoling.data.read import read_rows

    sources, missing = training_rows(run)
    rows = (row for source in sources for row in read_rows(source))
    trained = ((str(row.place), spoken(row.conversation)[1]) for row in rows if row.conversation is not None)
    exact, near, count = compare([spoken(item.conversation)[1] for item in items], trained)
    return Leaks(count, exact, near, tuple(missing))


def compare(
    asked: Sequence[str], trained: Iterable[tuple[str, str]]
) -> tuple[dict[int, str], dict[int, str], int]:
    """(index → place of an equal text, index → place of a near one, number of texts) of `trained`, (place, text)."""
    keys = [key_of(text) for text in asked]
    near = NearDuplicates()
    for text in asked:
        near.add(text)
    places: list[str] = []
    for place, text in trained:
        places.append(place)
        keys.append(key_of(text))
        near.add(text)
    firsts = first_of_equal(np.array(keys, np.uint64))
    groups = groups_of(len(keys), [firsts], near.pairs(firsts))
    near.close()
    by_key: dict[int, str] = {}
    by_group: dict[int, str] = {}
    for offset, place in enumerate(places, len(asked)):
        by_key.setdefault(keys[offset], place)
        by_group.setdefault(int(groups[offset]), place)
    exact = {index: by_key[keys[index]] for index in range(len(asked)) if keys[index] in by_key}
    close = {
        index: by_group[int(groups[index])]
        for index in range(len(asked))
        if index not in exact and int(groups[index]) in by_group
    }
    return exact, close, len(places)


def run_record(path: str) -> Mapping[str, Any] | None:
    """run.json of a run, or of the run that a checkpoint belongs to; None for what is no run."""
    from tuoling.files import read_json

    folder = Path(path).expanduser()
    for place in (folder, folder.parent):
        if (place / "run.json").is_file():
            found: Mapping[str, Any] = read_json(place / "run.json")
            return found
    return None
