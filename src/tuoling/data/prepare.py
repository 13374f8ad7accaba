"""Published data sets brought to local files: the first rows of the six BelleGroup sets, one file each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tuoling.data.json_stream import json_line
from tuoling.data.read import read_rows
from tuoling.data.sources import resolve_sources
from tuoling.errors import DataError, UsageError
from tuoling.files import atomic_write
from tuoling.language import tr

BELLE = (
    "generated_chat_0.4M",
    "school_math_0.25M",
    "train_2M_CN",
    "train_1M_CN",
    "train_0.5M_CN",
    "multiturn_chat_0.8M",
)
"""BelleGroup's sets in the order of zero_nlp's notebook; file i is data_{i}_BelleGroup.json."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """One written file. rows: written; asked: how many were wanted (a set may hold fewer)."""

    name: str
    path: Path
    rows: int
    asked: int


def prepare_belle(
    out: Path,
    *,
    rows: int = 20_000,
    local: Path | None = None,
    force: bool = False,
    say: Callable[[str], None] = lambda message: None,
) -> list[Prepared]:
    """Write the first `rows` rows of each set to out/data_{i}_BelleGroup.json: a JSON array with one row a line.

    local: a folder with copies (files or folders whose names hold a set's name); sets that are not there are left
    out and said. Without it they come from the hub (extra `hub`). Other files in `out` are never touched.
    Raises UsageError where one of the files is there already and `force` is not given.
    """
    targets = {name: out / f"data_{index}_BelleGroup.json" for index, name in enumerate(BELLE)}
    there = [path.name for path in targets.values() if path.exists()]
    if there and not force:
        raise UsageError(
            tr(f"already there: {', '.join(there)}", f"已经存在：{'、'.join(there)}"),
            where=str(out),
            remedy=tr("choose another --out, or --force to replace them", "换一个 --out，或用 --force 覆盖"),
        )
    written = []
    for name, records in _sets(local, rows, say):
        count = _write_array(targets[name], records)
        written.append(Prepared(name, targets[name], count, rows))
    return written


def _sets(local: Path | None, rows: int, say: Callable[[str], None]) -> Iterator[tuple[str, Iterable[Any]]]:
    """(set, its first records) for every set that can be had."""
    if local is None:
        from tuoling.data.hub import load_hub_dataset

        for name in BELLE:
            say(f"BelleGroup/{name}")
            dataset = load_hub_dataset(f"BelleGroup/{name}", split=f"train[:{rows}]")
            yield name, iter(dataset)
        return
    copies = {name: _local_copy(local, name) for name in BELLE}
    missing = [name for name, path in copies.items() if path is None]
    if len(missing) == len(BELLE):
        raise DataError(
            tr("no copy of a BelleGroup set here", "这里没有 BelleGroup 数据集的副本"),
            where=str(local),
            remedy=tr("files or folders are looked for by these names: ", "按这些名字查找文件或文件夹：")
            + ", ".join(BELLE),
        )
    if missing:
        say(tr(f"not there, left out: {', '.join(missing)}", f"没有找到，已跳过：{'、'.join(missing)}"))
    for name, path in copies.items():
        if path is not None:
            say(str(path))
            yield name, _records(path, rows)


def _local_copy(folder: Path, name: str) -> Path | None:
    """The file (or folder) below `folder` whose name holds the set's name, the shortest path first."""
    if not folder.is_dir():
        raise DataError(tr("no such folder", "没有这个文件夹"), where=str(folder))
    wanted = name.casefold()
    found = [
        path
        for path in folder.rglob("*")
        if wanted in path.name.casefold()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    return min(found, key=lambda path: (len(path.parts), str(path)), default=None)


def _records(path: Path, rows: int) -> Iterator[Any]:
    read = (row for source in resolve_sources([str(path)]) for row in read_rows(source))
    for row in islice(read, rows):
        if not isinstance(row.record, dict):
            raise DataError(
                tr(f"not a row: {row.problems[0].message}", f"不是数据行：{row.problems[0].message}"),
                where=str(row.place),
            )
        yield row.record


def _write_array(path: Path, records: Iterable[Any]) -> int:
    """A JSON array with one record a line: JSON for other tools, lines for people. Returns the number of records."""
    count = 0
    with atomic_write(path) as file:
        file.write("[")
        for record in records:
            file.write((",\n" if count else "\n") + json_line(record).rstrip("\n"))
            count += 1
        file.write("\n]\n")
    return count
