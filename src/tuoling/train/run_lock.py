"""One process writes into a run folder at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from tuoling.errors import OutputError
from tuoling.files import cannot_write
from tuoling.language import tr

LOCK = ".lock"


@contextmanager
def locked(folder: Path, *, wanted: bool = True) -> Iterator[None]:
    """The folder's lock inside, which ends with the process however that ends. wanted: False for all ranks but one.

    Raises OutputError where another process has it.
    """
    if not wanted:
        yield
        return
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OutputError(
            tr("another process is training in this folder", "另一个进程正在这个目录中训练"),
            where=str(folder),
            remedy=tr("wait for it, stop it, or choose another folder", "等它结束、停掉它，或换一个目录"),
        ) from error
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()
