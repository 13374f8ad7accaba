"""Lists as md5sum and sha256sum write them, and hashes of large files that are computed once."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tuoling import console, environment
from tuoling.errors import DataError, ModelError, UsageError
from tuoling.files import atomic_write, read_json, write_json
from tuoling.language import tr

META_CHECKLIST = "checklist.chk"
"""The md5 list that lies beside Meta's shards."""

_ALGORITHMS = {32: "md5", 64: "sha256"}
_LINE = re.compile(r"\\?([0-9a-fA-F]{32}|[0-9a-fA-F]{64}) [ *](.+)")
_BSD_LINE = re.compile(r"(?:MD5|SHA256) \((.+)\) = ([0-9a-fA-F]{32}|[0-9a-fA-F]{64})")


def algorithm_of(digest: str) -> str:
    """`md5` or `sha256`, by the length of a hex digest."""
    return _ALGORITHMS[len(digest)]


def parse_digest(text: str, option: str) -> str:
    """A hex MD5 or SHA-256 that the user typed, in lower case."""
    if len(text) not in _ALGORITHMS or not re.fullmatch(r"[0-9a-fA-F]+", text):
        raise UsageError(
            tr(f"{option} {text}: not an MD5 or SHA-256", f"{option} {text}：不是 MD5 或 SHA-256"),
            remedy=tr("32 or 64 hexadecimal digits", "应为 32 或 64 位十六进制数"),
        )
    return text.lower()


@dataclass(frozen=True, slots=True)
class Checksums:
    """What a list says: file name → hex digest, MD5 or SHA-256."""

    path: Path
    digests: Mapping[str, str]

    def expected(self, name: str) -> str | None:
        """The digest of a file by its path in the folder, else by its last part alone."""
        return self.digests.get(name) or self.digests.get(PurePosixPath(name).name)


def read_checksums(path: Path) -> Checksums:
    """Read `md5sum` or `sha256sum` output (GNU's or BSD's). Raises DataError where no line is one."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(tr(f"cannot read: {error}", f"无法读取：{error}"), where=str(path)) from error
    digests: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if match := _LINE.fullmatch(line.strip()):
            digest, name = match.groups()
        elif match := _BSD_LINE.fullmatch(line.strip()):
            name, digest = match.groups()
        else:
            continue
        name = str(PurePosixPath(name.strip()))
        if digests.setdefault(name, digest.lower()) != digest.lower():
            raise DataError(
                tr(f"{name} stands here twice, with two checksums", f"{name} 出现两次，校验和不同"),
                where=f"{path}:{number}",
            )
    if not digests:
        raise DataError(
            tr("no checksum in this file", "文件里没有校验和"),
            where=str(path),
            remedy=tr(
                "it should look like the output of md5sum: checksum, two spaces, name",
                "格式应与 md5sum 的输出相同：校验和、两个空格、文件名",
            ),
        )
    return Checksums(path, digests)


def write_checksums(path: Path, digests: Mapping[str, str]) -> None:
    """Write a list that `md5sum -c` (or `sha256sum -c`) reads in the folder of the files."""
    with atomic_write(path) as file:
        file.writelines(f"{digest}  ./{name}\n" for name, digest in digests.items())


def file_digest(path: Path, algorithm: str) -> str:
    """Hex digest of a file, remembered as long as its path, size and time of change stay the same."""
    path = path.resolve()
    stat = path.stat()
    name = hashlib.sha256(str(path).encode()).hexdigest()[:32]
    remembered = environment.cache_dir() / "digests" / f"{name}.json"
    stamp = {"path": str(path), "size_bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    known = read_json(remembered) if remembered.is_file() else {}
    if any(known.get(key) != value for key, value in stamp.items()):
        known = dict(stamp)
    if algorithm not in known:
        with path.open("rb") as file:
            known[algorithm] = hashlib.file_digest(file, algorithm).hexdigest()
        write_json(remembered, known)
    return str(known[algorithm])


def check_base(base: Path, asked: str | None, lists: Checksums | None) -> str | None:
    """Compare the base with what the user says of it, or a list, or Meta's checklist beside it; before any work.

    Returns what was compared with, None where nobody says anything. Raises ModelError on the wrong file.
    """
    expected, said_by = asked, "--base-hash"
    if expected is None and lists is not None:
        expected, said_by = lists.expected(base.name), str(lists.path)
    checklist = base.with_name(META_CHECKLIST)
    if expected is None and checklist.is_file():
        expected, said_by = read_checksums(checklist).expected(base.name), str(checklist)
    if expected is None:
        return None
    algorithm = algorithm_of(expected)
    console.note(tr(f"{base}: checking the {algorithm}", f"{base}：核对 {algorithm}"))
    got = file_digest(base, algorithm)
    if got != expected:
        raise ModelError(
            tr(
                f"this is not the base: its {algorithm} is {got}, {said_by} says {expected}",
                f"基础文件不对：其 {algorithm} 为 {got}，而 {said_by} 给出 {expected}",
            ),
            where=str(base),
            remedy=tr(
                "take the original file; --no-base-check goes on without this check (the result is checked anyway)",
                "请使用原始文件；加 --no-base-check 可跳过此检查（结果仍会校验）",
            ),
        )
    return f"{said_by}: {algorithm} {expected}"
