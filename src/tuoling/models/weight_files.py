"""Weight files before they are read: every shard there, and the head of a safetensors file against its length."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuoling.errors import DataError, ModelError
from tuoling.files import read_json
from tuoling.language import tr
from tuoling.models.adapters import some

_NUMBERED = re.compile(r"(.*)-\d{5}-of-(\d{5})$")


@dataclass(frozen=True)
class SafetensorsHeader:
    """entries: name → {"dtype", "shape", "data_offsets"} as written, in the order of the bytes.

    data_start: where offset 0 of `data_offsets` lies in the file.
    """

    entries: dict[str, dict[str, Any]]
    metadata: dict[str, str]
    data_start: int


def read_header(file: Path) -> SafetensorsHeader:
    """Read the head of a file. Raises ModelError where it is no safetensors file, or cut short."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        try:
            header = json.loads(opened.read(length)) if length <= size else None
        except (json.JSONDecodeError, UnicodeDecodeError):
            header = None
    if not isinstance(header, dict):
        raise damaged(file, tr("its header cannot be read", "无法读取文件头"))
    metadata = header.pop("__metadata__", None) or {}
    try:
        entries = dict(sorted(header.items(), key=lambda item: tuple(item[1]["data_offsets"])))
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (TypeError, KeyError, IndexError) as error:
        raise damaged(file, tr("its header cannot be read", "无法读取文件头")) from error
    if size != 8 + length + end:
        raise damaged(
            file,
            tr(f"{size} bytes, should be {8 + length + end}", f"有 {size} 字节，应为 {8 + length + end}"),
        )
    return SafetensorsHeader(entries, metadata, 8 + length)


def require_shards(folder: Path, files: Sequence[Path]) -> None:
    """Raise ModelError where a file is missing that the index beside `files`, or their own numbering, names."""
    suffix = files[0].suffix
    wanted = set()
    for index in sorted(folder.glob(f"*{suffix}.index.json")):
        wanted |= set(read_shard_index(index).values())
    for file in files:
        numbered = _NUMBERED.match(file.stem)
        if numbered:
            stem, count = numbered[1], numbered[2]
            wanted |= {f"{stem}-{n:05d}-of-{count}{suffix}" for n in range(1, int(count) + 1)}
    missing = sorted(name for name in wanted if not (folder / name).is_file())
    if missing:
        raise ModelError(
            tr(f"weight files are missing: {some(missing)}", f"缺少权重文件：{some(missing)}"),
            where=str(folder),
            remedy=tr(
                "download again; what is whole is not fetched twice", "请重新下载；完整的文件不会重复下载"
            ),
        )


def read_shard_index(index: Path) -> dict[str, str]:
    """Tensor name → file name, of a `*.index.json`. Raises ModelError where it is not one."""
    try:
        weight_map = read_json(index)["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (DataError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(tr("not an index of weight files", "不是权重索引文件"), where=str(index)) from error


def damaged(file: Path, detail: str) -> ModelError:
    """What the user is told of a weight file that is not whole."""
    return ModelError(
        tr(f"the file is damaged or cut short: {detail}", f"文件损坏或不完整：{detail}"),
        where=str(file),
        remedy=tr("copy or download it again", "请重新复制或下载"),
    )
