"""Whole files or none: atomic writes, hashes, manifests, JSON with line numbers."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from tuoling.errors import DataError, OutputError
from tuoling.language import tr

MANIFEST = "manifest.json"


def disk_full(error: BaseException) -> bool:
    """Whether any library's error says that the disk is full; those of safetensors and tokenizers carry no errno."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)


def cannot_write(path: Path | str | None, error: BaseException) -> OutputError:
    """What the user is told when `path` cannot be written."""
    why = getattr(error, "strerror", None) or error
    if isinstance(error, OutputError):  # told already
        return error
    full = tr("the disk is full", "磁盘已满")
    return OutputError(
        full if disk_full(error) else tr(f"cannot write: {why}", f"无法写入：{why}"),
        where=None if path is None else str(path),
        remedy=tr("choose another place, or free the disk", "换一个位置，或清理磁盘"),
    )


@contextmanager
def told(path: Path | str) -> Iterator[None]:
    """An error of the file system inside is the OutputError of `path`."""
    try:
        yield
    except OSError as error:
        raise cannot_write(error.filename or path, error) from error


def _fsync_dir(path: Path) -> None:
    """Make a rename inside `path` survive a power cut (a no-op where folders cannot be opened)."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def atomic_write(path: Path | str, *, binary: bool = False) -> Iterator[IO[Any]]:
    """Write to a temporary file beside `path`, fsync it, then rename it into place.

    If the block raises, `path` is as it was before. Raises OutputError where the place cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    except OSError as error:
        raise cannot_write(path, error) from error
    temporary = Path(name)
    try:
        with os.fdopen(
            handle,
            "wb" if binary else "w",
            encoding=None if binary else "utf-8",
            newline=None if binary else "\n",
        ) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
        _fsync_dir(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield an empty folder beside `path`; when the block ends it is hashed, fsynced and renamed to `path`.

    `path` must not exist. Afterwards it holds `manifest.json` (sha256 and size of every file).
    """
    path = Path(path)
    if path.exists():
        raise OutputError(tr("already exists", "已经存在"), where=str(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        yield temporary
        move_into_place(temporary, path)
    except Exception as error:
        if isinstance(error, OSError) or disk_full(error):
            raise cannot_write(path, error) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def move_into_place(built: Path, path: Path, *, known_sha256: Mapping[str, str] | None = None) -> None:
    """Hash and fsync the files of the folder `built`, and rename it to `path`, which must not exist.

    known_sha256: hashes of files, by their names, that need not be read again.
    """
    try:
        write_manifest(built, known_sha256)
        for file in built.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        built.chmod(0o755)
        built.rename(path)
        _fsync_dir(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error


@contextmanager
def atomic_files(folder: Path | str, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder; when the block ends, the files in it are renamed into `folder`: all of them or none.

    `folder` may be there already. Raises OutputError where one of its files would be replaced, unless `replace`.
    """
    folder = Path(folder)
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    temporary = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder, prefix=".", suffix=".part"))
        yield temporary
        files = sorted(file for file in temporary.rglob("*") if file.is_file())
        places = [folder / file.relative_to(temporary) for file in files]
        if not replace:
            refuse_existing(places)
        for file in files:
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        for file, place in zip(files, places, strict=True):
            place.parent.mkdir(parents=True, exist_ok=True)
            file.replace(place)
            _fsync_dir(place.parent)
    except OSError as error:
        raise cannot_write(folder, error) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # it holds what was made
                parent.rmdir()


def refuse_existing(places: Iterable[Path]) -> None:
    """Raise OutputError if something lies at one of `places`."""
    for place in places:
        if os.path.lexists(place):
            raise OutputError(
                tr("already exists", "已经存在"),
                where=str(place),
                remedy=tr("choose another place, or --force", "换一个位置，或加 --force"),
            )


def require_writable(folder: Path) -> None:
    """Raise OutputError now, and not after an hour, if files cannot be made in `folder` (made if missing)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise cannot_write(folder, error) from error


def sha256_file(path: Path | str) -> str:
    """Hex SHA-256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sampled_sha256(path: Path | str, *, pieces: int = 64, piece_bytes: int = 1 << 16) -> str:
    """Hex SHA-256 of a file's size and of evenly spaced pieces of it, the first and the last among them.

    For files of gigabytes that are only asked whether they are still the same: 4 MiB are read, whatever the size.
    """
    path = Path(path)
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    step = max(piece_bytes, (size - piece_bytes) // max(1, pieces - 1))
    with path.open("rb") as file:
        for start in [*range(0, max(1, size - piece_bytes), step), max(0, size - piece_bytes)]:
            file.seek(start)
            digest.update(file.read(piece_bytes))
    return digest.hexdigest()


def sha256_text(text: str) -> str:
    """Hex SHA-256 of UTF-8 text."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def write_manifest(folder: Path, known_sha256: Mapping[str, str] | None = None) -> dict[str, dict[str, Any]]:
    """Hash every file below `folder`, but those whose hash is known, into its `manifest.json`."""
    known = known_sha256 or {}
    files = {
        (name := str(file.relative_to(folder))): {
            "sha256": known.get(name) or sha256_file(file),
            "size_bytes": file.stat().st_size,
        }
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }
    write_json(folder / MANIFEST, files)
    return files


def manifest_problems(folder: Path) -> list[str]:
    """What is missing or changed against the folder's manifest; a folder without one has one problem."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return [tr(f"no {MANIFEST}", f"缺少 {MANIFEST}")]
    problems = []
    try:
        for name, entry in read_json(manifest).items():
            file = folder / name
            if not file.is_file():
                problems.append(tr(f"{name} is missing", f"缺少 {name}"))
            elif file.stat().st_size != entry["size_bytes"] or sha256_file(file) != entry["sha256"]:
                problems.append(tr(f"{name} has changed", f"{name} 已被改动"))
    except (DataError, AttributeError, KeyError, TypeError):
        problems.append(tr(f"{MANIFEST} has changed", f"{MANIFEST} 已被改动"))
    return problems


def write_json(path: Path | str, value: Any, *, indent: int = 2) -> None:
    """Write JSON atomically: UTF-8 as it is, a newline at the end."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, default=str)
    with atomic_write(path) as file:
        file.write(text + "\n")


def read_json(path: Path | str) -> Any:
    """Read a JSON file (UTF-8, with or without BOM). Raises DataError with file:line on bad JSON."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(
            tr(f"not JSON: {error.msg}", f"不是合法的 JSON：{error.msg}"),
            where=f"{path}:{error.lineno}:{error.colno}",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(tr(f"cannot read: {error}", f"无法读取：{error}"), where=str(path)) from error


def read_jsonl(path: Path | str) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 1, value) of a JSONL file we wrote ourselves; a torn last line is left out."""
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            if line.strip():
                yield number, json.loads(line)


def cut_torn_line(path: Path) -> None:
    """Take a last line without its end away, so that what is appended starts on a line of its own."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        while size:
            start = max(0, size - 65536)
            file.seek(start)
            found = file.read(size - start).rfind(b"\n")
            size = start + found + 1 if found >= 0 else start
            if found >= 0:
                break
        file.truncate(size)


def lock_file(file: IO[Any]) -> bool:
    """Hold an open file for this process until it is closed; False where another process holds it.

    Where the system has no such locks (Windows, some network disks) it is taken as free.
    """
    try:
        import fcntl

        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        pass
    return True


def append_jsonl(file: IO[str], value: Any) -> None:
    """Append one row and flush it, so that a reader beside us sees whole rows."""
    file.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")
    file.flush()
