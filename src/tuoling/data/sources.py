"""From what the user names to sources: files, folders, `path#500`, dataset_info.json entries, hub ids."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tuoling.console import note, warn
from tuoling.data.containers import sniff
from tuoling.data.encoding import missing_file
from tuoling.errors import DataError, UsageError
from tuoling.files import sha256_file
from tuoling.language import tr

REGISTRY = "dataset_info.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_SAMPLE = re.compile(r"(.+)#(\d+)$")
_DATA_NAME = re.compile(r"\.(json|jsonl|ndjson|csv|tsv|txt|text|parquet|gz)$", re.IGNORECASE)
_NO_DATA_NAMES = frozenset(
    (REGISTRY, "adapter_config.json", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
     "special_tokens_map.json", "added_tokens.json", "trainer_state.json", "manifest.json", "vocab.json", "template.json",
     "all_results.json", "run.json", "requirements.txt", "license.txt", "readme.txt", "merges.txt")
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """One file (or hub dataset) of rows and how to read it.

    format: a row format's name, None for by content; `text_blocks`: plain text by blank lines.
    columns: our field → the file's column; `optional_columns` of them may be missing.
    tags: LLaMA-Factory's names of keys and speakers inside messages.
    sample: keep so many rows, drawn with `seed`. hub, subset, split: a dataset of the hub instead of a file.
    """

    path: str
    format: str | None = None
    columns: Mapping[str, str] | None = None
    sample: int | None = None
    seed: int = 42
    tags: Mapping[str, str] | None = None
    optional_columns: frozenset[str] = frozenset()
    hub: str | None = None
    subset: str | None = None
    split: str = "train"
    skipped: tuple[str, ...] = field(default=(), compare=False)

    def content_key(self) -> str:
        """Hex SHA-256 over the source's bytes and how they are read: equal keys give equal rows."""
        how = {
            "format": self.format,
            "columns": dict(self.columns or {}),
            "sample": self.sample,
            "seed": self.seed if self.sample is not None else None,
            "tags": dict(self.tags or {}),
            "subset": self.subset,
            "split": self.split if self.hub else None,
        }
        if self.hub is not None:
            from tuoling.data.hub import hub_fingerprint

            content = hub_fingerprint(self)
        else:
            content = sha256_file(self.path)
        return hashlib.sha256(f"{content}\n{json.dumps(how, sort_keys=True)}".encode()).hexdigest()


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
        found.append(_registered(_registry_path(dataset_dir), str(name), seed))
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
    if not Path(spec).exists() and (match := _SAMPLE.fullmatch(spec)):
        path, sample = match[1], int(match[2])
        if sample == 0:
            raise UsageError(
                tr("a sample of 0 rows is asked for", "抽样行数是 0"), where=spec, remedy=f"{path}#500"
            )
    place = Path(path).expanduser()
    if place.is_dir():
        sources = _walk(place)
        return _sampled_folder(sources, sample, seed)
    if place.name == REGISTRY and place.is_file():
        return [
            replace(source, sample=sample or source.sample, seed=seed) for source in _whole_registry(place)
        ]
    if place.exists():
        sniff(
            str(place), format=format
        )  # a missing, empty or binary file is said now, before anything is done
        return [Source(str(place), sample=sample, seed=seed)]
    if dataset_dir is not None and (dataset_dir / REGISTRY).is_file():
        entries = _read_registry(dataset_dir / REGISTRY)
        if path in entries:
            return [replace(_registered(dataset_dir / REGISTRY, path, seed), sample=sample, seed=seed)]
        if (dataset_dir / path).exists():
            return _resolve(
                str(dataset_dir / path) + (f"#{sample}" if sample is not None else ""), None, seed, format
            )
    if _HUB_ID.fullmatch(path) and not _DATA_NAME.search(path) and not Path(path).parent.is_dir():
        return [Source(path, hub=path, sample=sample, seed=seed)]
    raise missing_file(path)


def _sampled_folder(sources: list[Source], sample: int | None, seed: int) -> list[Source]:
    """`folder#500`: five hundred rows of the whole folder, shared among its files by their row counts."""
    if sample is None:
        return sources
    from tuoling.data.read import read_rows

    counts = [sum(1 for _ in read_rows(source)) for source in sources]
    total = sum(counts)
    shares, before = [], 0
    for count in counts:  # differences of a rounded running sum: they add up exactly
        after = before + count
        shares.append(sample * after // total - sample * before // total if total else 0)
        before = after
    return [
        replace(source, sample=min(share, count), seed=seed)
        for source, share, count in zip(sources, shares, counts, strict=True)
        if share
    ]


def _walk(folder: Path) -> list[Source]:
    """Every data file below a folder; hidden ones are passed over, others that are no data are counted and said."""
    sources, skipped = [], []
    registry = folder / REGISTRY
    by_file = (
        {source.path: source for source in _whole_registry(registry, quiet=True)}
        if registry.is_file()
        else {}
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
        if _DATA_NAME.search(name) and (why := _unreadable(folder / name)):
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
        return bool(_DATA_NAME.search(path.name))
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


def _registry_path(dataset_dir: str | Path | None) -> Path:
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


def _read_registry(path: Path) -> dict[str, dict[str, object]]:
    from tuoling.files import read_json

    entries = read_json(path)
    if not isinstance(entries, dict):
        raise DataError(tr("not a registry of datasets", "不是数据集登记文件"), where=str(path))
    return {str(name): entry for name, entry in entries.items() if isinstance(entry, dict)}


def _whole_registry(path: Path, *, quiet: bool = False) -> list[Source]:
    """Every entry whose file is here; the others are counted and said."""
    sources, missing, hub = [], [], 0
    for name, entry in _read_registry(path).items():
        file_name = entry.get("file_name")
        if not isinstance(file_name, str):
            hub += 1
        elif (path.parent / file_name).is_file():
            sources.append(_registered(path, name, 42))
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


def _registered(path: Path, name: str, seed: int) -> Source:
    """One entry of a LLaMA-Factory dataset_info.json, under our names. `name#500` samples it."""
    sample = None
    entries = _read_registry(path)
    if name not in entries and (match := _SAMPLE.fullmatch(name)):
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
            files = _walk(file)
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
