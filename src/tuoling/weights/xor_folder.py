"""XOR diffs of one file or a whole folder: what is made from what, in which order, and all of it or nothing."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from tuoling import console
from tuoling.errors import ModelError, OutputError, UsageError
from tuoling.files import atomic_files, refuse_existing
from tuoling.language import tr
from tuoling.weights.checksums import Checksums, check_base, file_digest, write_checksums
from tuoling.weights.diff_options import DiffOptions, DiffReport, MadeFile
from tuoling.weights.workers import workers
from tuoling.weights.xor import (
    BLOCK_BYTES,
    ENCRYPTED_NAME,
    HEADER_BYTES,
    Mixer,
    XorFile,
    decrypt_file,
    encrypt_file,
)

META_FIRST_SHARD = "consolidated.00.pth"


def make_xor_diff(
    base: Path, target: Path, out: Path, options: DiffOptions, *, block_bytes: int = BLOCK_BYTES
) -> DiffReport:
    """Write the `.enc` file of `target`, or of each file in it, into the folder `out`.

    out:         for one file it may also be a name that ends in `.enc`.
    block_bytes: of the keystream; any other than the format's is for tests.
    """
    base = find_key(base)
    left_out: list[str] = []
    if target.is_dir():
        items, left_out = visible_files(target)
        folder = out
    else:
        require_file(target)
        named = out.suffix == ".enc" and not out.is_dir()
        folder = out.parent if named else out
        items = [XorFile(target, target.name, target.stat().st_size, out.name if named else None)]
    if not options.replace:
        _refuse_made(folder, items, options.checksums_out)
    report = DiffReport("xor", out, base, left_out=left_out)
    if options.check_base:
        report.base_checked_by = check_base(base, options.base_hash, None)
    digests: dict[str, str] = {}
    with atomic_files(folder, replace=options.replace) as staging:
        require_space(staging, items)
        report.files = run(partial(encrypt_file, staging=staging), items, base, options, block_bytes)
        if options.checksums_out is not None:
            digests = stage_digests(base, items, report.files, staging, options.workers)
    if options.checksums_out is not None:
        write_checksums(options.checksums_out, digests)
    return report


def _refuse_made(folder: Path, items: Sequence[XorFile], checksums_out: Path | None) -> None:
    """Raise OutputError where there are diffs of the same files already, whatever the hash in their names."""
    planned = [checksums_out] if checksums_out else []
    for item in items:
        if item.output_name:
            planned.append(folder / item.output_name)
        else:
            place = folder / item.plain_name
            planned += [there for there in place.parent.glob("*.enc") if plain_name(there.name) == place.name]
    refuse_existing(planned)


def apply_xor_diff(
    base: Path, diff: Path, out: Path, options: DiffOptions, *, block_bytes: int = BLOCK_BYTES
) -> DiffReport:
    """Write the plain file of `diff`, or of every `.enc` file in it, into the folder `out`.

    out: for one file it may also be the name of the result. Raises ModelError, and leaves nothing, where one result is
    not what the diff was made from.
    """
    base = find_key(base)
    left_out: list[str] = []
    if diff.is_dir():
        items, left_out = encrypted_files(diff)
        folder = out
        require_listed(items, diff, options.lists)
    else:
        require_file(diff)
        folder = out if out.is_dir() else out.parent
        size = max(0, diff.stat().st_size - HEADER_BYTES)
        items = [XorFile(diff, plain_name(diff.name), size, None if out.is_dir() else out.name)]
    if not options.replace:
        refuse_existing(folder / (item.output_name or item.plain_name) for item in items)
    report = DiffReport("xor", out, base, left_out=left_out)
    if options.check_base:
        report.base_checked_by = check_base(base, options.base_hash, options.lists)
    with atomic_files(folder, replace=options.replace) as staging:
        require_space(staging, items)
        report.files = run(partial(decrypt_file, staging=staging), items, base, options, block_bytes)
    report.proof = tr("SHA-256 of every file", "每个文件的 SHA-256")
    return report


def run(
    work: Callable[[XorFile, Mixer], MadeFile],
    items: Sequence[XorFile],
    base: Path,
    options: DiffOptions,
    block_bytes: int,
) -> list[MadeFile]:
    """All files: the smallest first, since a wrong base shows there in no time, then the largest, for even threads."""
    by_size = sorted(items, key=lambda item: (item.size_bytes, item.plain_name))
    first, rest = by_size[:1], by_size[:0:-1]
    total = sum(item.size_bytes for item in items) >> 20
    with workers(options.workers) as threads, console.progress() as bar:
        task = bar.add_task("MiB", total=total, detail="")
        mixer = Mixer(
            base,
            threads,
            options.lists,
            came=lambda count: bar.update(task, advance=count / 2**20),
            block_bytes=block_bytes,
        )
        made = threads.each(lambda item: work(item, mixer), first)
        made += threads.each(lambda item: work(item, mixer), rest)
    return sorted(made, key=lambda one: one.name)


def find_key(base: Path) -> Path:
    """The file that an XOR diff is made against: itself, or the first shard in a folder of Meta's."""
    if not base.is_dir():
        require_file(base)
        return base
    if (base / META_FIRST_SHARD).is_file():
        return base / META_FIRST_SHARD
    raise ModelError(
        tr(
            f"no {META_FIRST_SHARD} in this folder: an XOR diff is made against one file",
            f"目录里没有 {META_FIRST_SHARD}：XOR 差分是针对一个文件制作的",
        ),
        where=str(base),
        remedy=tr("name the file", "请直接给出该文件"),
    )


def require_file(path: Path) -> None:
    """Raise UsageError where there is no such file."""
    if not path.is_file():
        raise UsageError(tr(f"no such file or folder: {path}", f"没有这个文件或目录：{path}"))


def plain_name(name: str) -> str:
    """`config.json` of `config.json.<hash>.enc`."""
    named = ENCRYPTED_NAME.fullmatch(name)
    return named["plain"] if named else name.removesuffix(".enc")


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def visible_files(folder: Path) -> tuple[list[XorFile], list[str]]:
    """The files of a folder and below it, and what is left out because its name begins with a dot (.git, .cache)."""
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    items = [
        XorFile(folder / name, name.as_posix(), (folder / name).stat().st_size)
        for name in names
        if not _is_hidden(name)
    ]
    if not items:
        raise ModelError(tr("no files in this folder", "目录里没有文件"), where=str(folder))
    return items, [name.as_posix() for name in names if _is_hidden(name)]


def encrypted_files(folder: Path) -> tuple[list[XorFile], list[str]]:
    """The `.enc` files of a folder and below it, and the other files."""
    found: dict[str, XorFile] = {}
    other = []
    for item in visible_files(folder)[0]:
        if not item.source.name.endswith(".enc"):
            other.append(item.plain_name)
            continue
        plain = Path(item.plain_name).with_name(plain_name(item.source.name)).as_posix()
        if plain in found:
            raise ModelError(
                tr(f"two diffs of {plain}", f"{plain} 有两个差分文件"),
                where=f"{found[plain].source}\n{item.source}",
                remedy=tr("take one of them away", "请移走其中一个"),
            )
        found[plain] = XorFile(item.source, plain, max(0, item.size_bytes - HEADER_BYTES))
    if not found:
        raise ModelError(tr("no .enc files in this folder", "目录里没有 .enc 文件"), where=str(folder))
    return list(found.values()), other


def require_listed(items: Sequence[XorFile], diff: Path, lists: Checksums | None) -> None:
    """Raise ModelError where a `.enc` file of the list is not in the folder."""
    if lists is None:
        return
    there = {item.source.name for item in items}
    missing = [name for name in lists.digests if name.endswith(".enc") and Path(name).name not in there]
    if missing:
        raise ModelError(
            tr(
                f"{len(missing)} files of {lists.path} are not here; the first: {missing[0]}",
                f"{lists.path} 中有 {len(missing)} 个文件不在这里；第一个：{missing[0]}",
            ),
            where=str(diff),
            remedy=tr("fetch what is missing", "请下载缺少的文件"),
        )


def require_space(folder: Path, items: Sequence[XorFile]) -> None:
    """Raise OutputError now, and not after the half, where the disk has no room for the result."""
    need, free = sum(item.size_bytes for item in items), shutil.disk_usage(folder).free
    if need > free:
        raise OutputError(
            tr(
                f"the result needs {need / 2**30:.1f} GiB, the disk has {free / 2**30:.1f} GiB",
                f"结果需要 {need / 2**30:.1f} GiB，磁盘只剩 {free / 2**30:.1f} GiB",
            ),
            where=str(folder.parent),
            remedy=tr("choose another place, or free the disk", "换一个位置，或清理磁盘"),
        )


def stage_digests(
    base: Path, items: Sequence[XorFile], made: Sequence[MadeFile], staging: Path, count: int
) -> dict[str, str]:
    """Name → MD5 of base, plain files and `.enc` files."""
    files = {item.plain_name: item.source for item in items} | {one.name: staging / one.name for one in made}
    with workers(count) as threads:
        digests = threads.each(md5_file, files.values())
    return {base.name: file_digest(base, "md5"), **dict(zip(files, digests, strict=True))}


def md5_file(path: Path) -> str:
    """Hex MD5 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
