"""What lies in a folder: the files that hold rows, and LLaMA-Factory's table of them (dataset_info.json)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from tuoling.console import note, warn
from tuoling.data.containers import sniff
from tuoling.data.encoding import missing_file
from tuoling.data.source import REGISTRY, SAMPLE, Source
from tuoling.errors import DataError
from tuoling.language import tr

DATA_NAME = re.compile(r"\.(json|jsonl|ndjson|csv|tsv|txt|text|parquet|gz)$", re.IGNORECASE)
_NO_DATA_NAMES = frozenset(
    (REGISTRY, "adapter_config.json", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
     "special_tokens_map.json", "added_tokens.json", "trainer_state.json", "manifest.json", "vocab.json", "template.json",
     "all_results.json", "run.json", "lineage.json",
     "generation.json", "requirements.txt", "license.txt", "readme.txt", "merges.txt")
)  # fmt: skip


def walk(folder: Path) -> list[Source]:
    """Every data file below a folder; hidden ones are passed over, others that are no data are counted and said."""
    sources, skipped = [], []
    registry = folder / REGISTRY
    by_file = (
        {source.path: source for source in whole_registry(registry, quiet=True)} if registry.is_file() else {}
    )
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if any(part.startswith(".") for part in inside.parts) or not path.is_file():
            continue
        if _is_data(path):
            sources.append(by_file.get(str(path), Source(str(path))))
        else:
            skipped.append(str(inside))
    if not sources:
        raise DataError(
            tr(
                f"no data files below this folder ({len(skipped)} others)",
                f"文件夹里没有数据文件（其他文件 {len(skipped)} 个）",
            ),
            where=str(folder),
            remedy=tr(
                "give JSON, JSONL, CSV, TSV, text or Parquet files",
                "请给 JSON、JSONL、CSV、TSV、文本或 Parquet 文件",
            ),
        )
    for name in skipped:
        if DATA_NAME.search(name) and (why := _unreadable(folder / name)):
            warn(tr(f"{folder / name}: {why}", f"{folder / name}：{why}"))
    if skipped:
        shown = ", ".join(skipped[:5]) + (" …" if len(skipped) > 5 else "")
        note(
            tr(
                f"{folder}: {len(sources)} data files; {len(skipped)} others left out ({shown})",
                f"{folder}：{len(sources)} 个数据文件；另有 {len(skipped)} 个不是数据，已跳过（{shown}）",
            )
        )
    return [replace(sources[0], skipped=tuple(skipped)), *sources[1:]]


def _unreadable(path: Path) -> str | None:
    """Why no row can be read from the file: it is empty, binary, a pointer; None for one that is only no data."""
    try:
        sniff(str(path))
    except DataError as error:
        return error.problem
    return None


def _is_data(path: Path) -> bool:
    """True for a file whose content holds rows, or text under a name that says so."""
    if path.name.lower() in _NO_DATA_NAMES:
        return False
    try:
        container = sniff(str(path))
    except DataError:
        return False
    if container.kind in ("text", "table"):
        return bool(DATA_NAME.search(path.name))
    if container.kind == "json_values":
        return _holds_rows(path)
    return True


def _holds_rows(path: Path) -> bool:
    """False for a JSON file of one object that is no row of any format: a config, not data."""
    from tuoling.data.read import read_rows
    from tuoling.data.row import UNKNOWN

    rows = read_rows(Source(str(path)))
    first = next(rows, None)
    if first is None:
        return False
    return first.format != UNKNOWN or first.problems[0].code == "not_json" or next(rows, None) is not None


def registry_path(dataset_dir: str | Path | None) -> Path:
    path = Path(dataset_dir or "data") / REGISTRY
    if not path.is_file():
        raise DataError(
            tr(
                f"no {REGISTRY} here, and datasets are asked for by name",
                f"这里没有 {REGISTRY}，而数据集是按名字指定的",
            ),
            where=str(path),
            remedy=tr("set dataset_dir to the folder that holds it", "请把 dataset_dir 设为它所在的文件夹"),
        )
    return path


def read_registry(path: Path) -> dict[str, dict[str, object]]:
    from tuoling.files import read_json

    entries = read_json(path)
    if not isinstance(entries, dict):
        raise DataError(tr("not a registry of datasets", "不是数据集登记文件"), where=str(path))
    return {str(name): entry for name, entry in entries.items() if isinstance(entry, dict)}


def whole_registry(path: Path, *, quiet: bool = False) -> list[Source]:
    """Every entry whose file is here; the others are counted and said."""
    sources, missing, hub = [], [], 0
    for name, entry in read_registry(path).items():
        file_name = entry.get("file_name")
        if not isinstance(file_name, str):
            hub += 1
        elif (path.parent / file_name).is_file():
            sources.append(registered(path, name, 42))
        else:
            missing.append(name)
    if quiet:
        return sources
    note(
        tr(
            f"{path}: {len(sources)} datasets are here, {len(missing)} name files that are not, {hub} are on the hub",
            f"{path}：{len(sources)} 个数据集在本地，{len(missing)} 个的文件不在，{hub} 个在 hub 上",
        )
    )
    if not sources:
        raise DataError(tr("none of its datasets is here", "登记的数据集都不在本地"), where=str(path))
    return sources


def registered(path: Path, name: str, seed: int) -> Source:
    """One entry of a LLaMA-Factory dataset_info.json, under our names. `name#500` samples it."""
    sample = None
    entries = read_registry(path)
    if name not in entries and (match := SAMPLE.fullmatch(name)):
        name, sample = match[1], int(match[2])
    if name not in entries:
        import difflib

        near = difflib.get_close_matches(name, entries, n=3) or sorted(entries)[:8]
        raise DataError(
            tr(f"no dataset is called {name!r}", f"没有名为 {name!r} 的数据集"),
            where=str(path),
            remedy=tr("there are: ", "现有：") + ", ".join(near),
        )
    entry = entries[name]
    columns, optional = _registry_columns(entry)
    tags = entry.get("tags")
    number = entry.get("num_samples")
    source = Source(
        "",
        columns=columns or None,
        optional_columns=optional,
        tags={str(k): str(v) for k, v in tags.items()} if isinstance(tags, dict) else None,
        sample=sample if sample is not None else (number if isinstance(number, int) else None),
        seed=seed,
        split=str(entry.get("split") or "train"),
        subset=str(entry["subset"]) if entry.get("subset") else None,
    )
    return _placed(source, entry, path, name)


def _placed(source: Source, entry: Mapping[str, object], path: Path, name: str) -> Source:
    """The source with its file or hub id. Raises DataError where the entry has neither that we can read."""
    file_name = entry.get("file_name")
    if isinstance(file_name, str):
        file = path.parent / file_name
        if file.is_dir():
            files = walk(file)
            if len(files) != 1:
                raise DataError(
                    tr(
                        f"dataset {name!r} is a folder of {len(files)} files",
                        f"数据集 {name!r} 是含 {len(files)} 个文件的文件夹",
                    ),
                    where=str(file),
                    remedy=tr("name the folder itself as data", "请直接把这个文件夹作为数据"),
                )
            file = Path(files[0].path)
        if not file.exists():
            raise missing_file(str(file))
        sniff(str(file))
        return replace(source, path=str(file))
    hub = entry.get("hf_hub_url")
    if isinstance(hub, str):
        return replace(source, path=hub, hub=hub)
    raise DataError(
        tr(
            f"dataset {name!r} names no file and no Hugging Face id",
            f"数据集 {name!r} 既没有文件也没有 Hugging Face id",
        ),
        where=str(path),
        remedy=tr("download it and give its `file_name`", "请下载后填写 `file_name`"),
    )


def _registry_columns(entry: Mapping[str, object]) -> tuple[dict[str, str], frozenset[str]]:
    """LLaMA-Factory's `columns` under our names, and those that may be missing from a row (as there)."""
    given = entry.get("columns")
    if not isinstance(given, dict):
        return {}, frozenset()
    sharegpt = entry.get("formatting") in ("sharegpt", "openai")
    names = (
        {"messages": "conversations"}
        if sharegpt
        else {"prompt": "instruction", "query": "input", "response": "output"}
    )
    columns = {names.get(str(key), str(key)): str(value) for key, value in given.items() if value}
    if not sharegpt and "output" not in columns and len(columns) == 1 and "instruction" in columns:
        return {"text": columns["instruction"]}, frozenset()
    return columns, frozenset(columns) - {"instruction", "output", "conversations"}
