"""Checksum lists beside weights: Meta's checklist.chk, and what md5sum and sha256sum write."""

from __future__ import annotations

from pathlib import Path

from tuoling.errors import ModelError
from tuoling.language import tr
from tuoling.models.adapters import some
from tuoling.weights.checksums import algorithm_of, file_digest, read_checksums

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


def verify_checksums(folder: Path, names: set[str]) -> list[str]:
    """Check the files `names` of a folder against every list in it; returns those that a list names.

    Raises ModelError where a sum differs, or where a list names a weight file (`consolidated.*`) that is not there.
    """
    checked, wrong, missing = [], [], []
    for path in checksum_lists(folder):
        for name, expected in read_checksums(path).digests.items():
            file = folder / name
            if not file.is_file():
                missing += [name] if name.startswith("consolidated.") else []
            elif name in names:
                checked.append(name)
                if file_digest(file, algorithm_of(expected)) != expected:
                    wrong.append(f"{name} ({path.name})")
    for bad, en, zh in (
        (missing, "files of the checksum list are missing", "校验列表中的文件不存在"),
        (wrong, "the checksum is wrong", "校验和不符"),
    ):
        if bad:
            raise ModelError(
                tr(f"{en}: {some(bad)}", f"{zh}：{some(bad)}"),
                where=str(folder),
                remedy=tr(
                    "copy the file again; if it was changed on purpose: --unchecked",
                    "请重新复制该文件；若是有意修改：--unchecked",
                ),
            )
    return checked
