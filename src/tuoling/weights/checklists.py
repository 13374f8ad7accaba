"""Checksum lists beside weights: Meta's checklist.chk, and what md5sum and sha256sum write."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tuoling.errors import DataError, ModelError
from tuoling.language import tr
from tuoling.models.adapters import some
from tuoling.weights.checksums import algorithm_of, file_digest, read_checksums
from tuoling.weights.convert import ConvertOptions

WEIGHT_SUFFIXES = (".pth", ".bin", ".safetensors")

_LISTS = (
    "checklist.chk",
    "tokenizer_checklist.chk",
    "*.md5",
    "*.md5.txt",
    "md5*.txt",
    "MD5SUMS",
    "SHA256SUMS",
)


def checksum_lists(folder: Path) -> list[Path]:
    """The lists that lie in a folder."""
    return sorted({path for pattern in _LISTS for path in folder.glob(pattern) if path.is_file()})


def verify_checksums(folder: Path, names: set[str], options: ConvertOptions) -> list[str]:
    """Check the files `names` of a folder against every list in it; returns sentences about what was checked.

    Raises ModelError where a sum differs, where a list names a weight file that is not there, or where a list
    holds no sum.
    """
    lists = checksum_lists(folder)
    if options.unchecked and lists:
        shown = some([path.name for path in lists])
        return [tr(f"not looked at (--unchecked): {shown}", f"未核对（--unchecked）：{shown}")]
    checked, wrong, missing = set(), [], []
    for path in lists:
        for name, expected in _digests(path).items():
            file = folder / name
            if not file.is_file():
                missing += [name] if file.suffix in WEIGHT_SUFFIXES else []
            elif name in names:
                checked.add(name)
                if file_digest(file, algorithm_of(expected)) != expected:
                    wrong.append(f"{name} ({path.name})")
    for bad, en, zh in (
        (missing, "files of the checksum list are missing", "校验列表中的文件不存在"),
        (wrong, "the checksum is wrong", "校验和不符"),
    ):
        if bad:
            raise ModelError(
                tr(f"{en}: {some(bad)}", f"{zh}：{some(bad)}"), where=str(folder), remedy=_way_past()
            )
    shown = some(sorted(checked), 9)
    return [tr(f"checksums are right: {shown}", f"校验和正确：{shown}")] if checked else []


def _digests(path: Path) -> Mapping[str, str]:
    try:
        return read_checksums(path).digests
    except DataError as error:
        raise ModelError(error.problem, where=error.where, remedy=_way_past()) from error


def _way_past() -> str:
    return tr(
        "copy the file again; if it was changed on purpose: --unchecked",
        "请重新复制该文件；若是有意修改：--unchecked",
    )
