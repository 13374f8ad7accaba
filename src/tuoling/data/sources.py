"""From what the user names to sources: files, folders, `path#500`, dataset_info.json entries, hub ids."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tuoling.data.containers import sniff
from tuoling.data.encoding import missing_file
from tuoling.data.folders import DATA_NAME, read_registry, registered, registry_path, walk, whole_registry
from tuoling.data.source import REGISTRY, SAMPLE, Source
from tuoling.errors import DataError, UsageError
from tuoling.language import tr

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")


def parse_columns(text: str | None) -> dict[str, str] | None:
    """`instruction=ask,output=answer` → {"instruction": "ask", "output": "answer"}. Raises UsageError."""
    if not text:
        return None
    columns = {}
    for part in text.split(","):
        ours, equals, theirs = (piece.strip() for piece in part.partition("="))
        if not (ours and equals and theirs):
            raise UsageError(
                tr(
                    f"--columns {text!r}: {part!r} is not name=column",
                    f"--columns {text!r}：{part!r} 不是 名字=列名",
                ),
                remedy="--columns instruction=ask,output=answer",
            )
        columns[ours] = theirs
    return columns


def resolve_sources(
    specs: Sequence[str],
    *,
    dataset_dir: str | Path | None = None,
    dataset_names: Sequence[str] = (),
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    seed: int = 42,
) -> list[Source]:
    """Sources in the order they are named; folders sorted by path.

    A spec is a file, a folder (walked; what is no data is counted and said), either with `#500` behind it for a
    seeded sample, a dataset_info.json (all its datasets that are here), or a hub id (only where no such path exists
    and it does not look like one). `dataset_names` are entries of dataset_dir/dataset_info.json.
    Raises DataError for what is missing, empty or binary.
    """
    found: list[Source] = []
    for spec in specs:
        found += _resolve(str(spec), Path(dataset_dir) if dataset_dir else None, seed, format)
    for name in dataset_names:
        found.append(registered(registry_path(dataset_dir), str(name), seed))
    if not found:
        raise DataError(
            tr("no data is named", "没有给出数据"),
            remedy=tr("name files, folders or hub ids", "请给出文件、文件夹或 hub 数据集"),
        )
    if format is not None:
        from tuoling.data.formats import get_format

        get_format("text" if format == "text_blocks" else format)
    if format is not None or columns is not None:
        found = [
            replace(source, format=format or source.format, columns=columns or source.columns)
            for source in found
        ]
    return found


def _resolve(spec: str, dataset_dir: Path | None, seed: int, format: str | None) -> list[Source]:
    path, sample = spec, None
    if not Path(spec).exists() and (match := SAMPLE.fullmatch(spec)):
        path, sample = match[1], int(match[2])
        if sample == 0:
            raise UsageError(
                tr("a sample of 0 rows is asked for", "抽样行数是 0"), where=spec, remedy=f"{path}#500"
            )
    place = Path(path).expanduser()
    if place.is_dir():
        sources = walk(place)
        return _sampled_folder(sources, sample, seed)
    if place.name == REGISTRY and place.is_file():
        return [
            replace(source, sample=sample or source.sample, seed=seed) for source in whole_registry(place)
        ]
    if place.exists():
        sniff(
            str(place), format=format
        )  # a missing, empty or binary file is said now, before anything is done
        return [Source(str(place), sample=sample, seed=seed)]
    if dataset_dir is not None and (dataset_dir / REGISTRY).is_file():
        entries = read_registry(dataset_dir / REGISTRY)
        if path in entries:
            return [replace(registered(dataset_dir / REGISTRY, path, seed), sample=sample, seed=seed)]
        if (dataset_dir / path).exists():
            return _resolve(
                str(dataset_dir / path) + (f"#{sample}" if sample is not None else ""), None, seed, format
            )
    if _HUB_ID.fullmatch(path) and not DATA_NAME.search(path) and not Path(path).parent.is_dir():
        return [Source(path, hub=path, sample=sample, seed=seed)]
    raise missing_file(path)


def _sampled_folder(sources: list[Source], sample: int | None, seed: int) -> list[Source]:
    """`folder#500`: five hundred rows of the whole folder, shared among its files by their row counts.

    Row r of a file of n stands at (r + 1/2) / n, and the first 500 of all are counted (Webster's method): a larger
    sample takes no fewer rows of any file than a smaller one.
    """
    if sample is None:
        return sources
    import numpy as np

    from tuoling.data.read import read_rows

    counts = [sum(1 for _ in read_rows(source)) for source in sources]
    places = np.concatenate([(np.arange(count) + 0.5) / count for count in counts] or [np.zeros(0)])
    first = np.argsort(places, kind="stable")[:sample]
    shares = np.bincount(np.repeat(np.arange(len(counts)), counts)[first], minlength=len(counts))
    return [
        replace(source, sample=int(share), seed=seed)
        for source, share in zip(sources, shares, strict=True)
        if share
    ]
