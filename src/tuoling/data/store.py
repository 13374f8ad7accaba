"""Rows in, token store out: checked, templated, masked, hashed, and made only once.

A store's key is a hash of everything that decides its bytes: the files, how they are read, the template's bytes,
the tokenizer, the settings and the code of this compiler. Rows stream through in shards: memory does not grow with
their text, only by some forty bytes a row. A build that is interrupted leaves its finished shards to the next one.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tuoling.data.overlong import overlong_error
from tuoling.data.shard_compiler import Compiled, Job
from tuoling.data.shard_pool import Progress, compile_shards, worker_count
from tuoling.data.shards import cut_into_shards, size_bytes
from tuoling.data.sources import Source
from tuoling.data.store_key import key_parts, what_changed
from tuoling.data.store_report import StoreReport, StoreSettings
from tuoling.data.token_store import (
    Example,
    TokenStore,
    join_columns,
    leftovers,
    open_store,
    token_file,
    write_meta,
)
from tuoling.errors import DataError, ModelError, OutputError, TemplateError
from tuoling.files import atomic_write, cannot_write, move_into_place, sha256_text
from tuoling.language import tr
from tuoling.text.templates import Template
from tuoling.text.tokenizer import TextTokenizer

__all__ = ["Example", "StoreReport", "StoreSettings", "TokenStore", "compile_store"]

_SHOWN = 5


def compile_store(
    sources: Sequence[Source],
    *,
    tokenizer: TextTokenizer,
    template: Template,
    settings: StoreSettings,
    cache_dir: Path,
    progress: Progress | None = None,
    workers: int | None = None,
    refuse_at_once: bool = False,
) -> tuple[TokenStore, StoreReport]:
    """The token store of these rows: the one made earlier if nothing changed, else a new one.

    progress: called with the number of rows read so far. workers: processes to compile in (None: as many as there is
    work, cores and memory for); the store's bytes do not depend on it. refuse_at_once: judge the rows read so far
    after each shard, not all of them in the end. Raises DataError: bad rows beyond `allow_bad` (all that were read
    stand in the ledger), over-long rows under `overlong: error`, nothing left to learn, rows of a format that is not
    trained.
    """
    started = time.monotonic()
    if not sources:
        raise DataError(tr("no data was named", "没有给出数据"))
    job = Job(tuple(sources), tokenizer, template, settings)
    parts = key_parts(sources, tokenizer=tokenizer, template=template, settings=settings)
    key = sha256_text(json.dumps(parts, sort_keys=True))
    folder = cache_dir / key[:32]
    ledger = cache_dir / f"{key[:32]}.rejected.jsonl"
    paths = [source.path for source in sources]
    same_bytes = all(source.hub is None for source in sources)  # a hub dataset may change under its name
    store = open_store(folder, key=key, paths=paths) if same_bytes else None
    if store is not None:
        report = StoreReport(**store.meta["report"])
        report.reused = True
        report.ledger = ledger if report.bad and ledger.exists() else None
    else:
        changed = what_changed(cache_dir, parts)
        if folder.exists():
            shutil.rmtree(folder)
        build = _Build(job, ledger, refuse_at_once=refuse_at_once)
        try:
            with _building(folder, keep=same_bytes) as place:
                hashes = build.run(
                    place,
                    {"key": key, "parts": parts, "paths": paths},
                    workers=worker_count(job, size_bytes(sources), workers),
                    progress=progress,
                )
                move_into_place(place, folder, known_sha256=hashes)
        except OutputError:
            if open_store(folder, key=key, paths=paths) is None:  # else another process was faster
                raise
        report = build.report
        report.changed = changed
        store = TokenStore(folder, paths)
    report.seconds = time.monotonic() - started
    return store, report


def building_folder(folder: Path) -> Path:
    """Where the shards of the store at `folder` are put while it is made."""
    return folder.with_name(f".{folder.name}.building")


def building_lock(folder: Path) -> Path:
    """Held by the process that makes the store at `folder`."""
    return folder.with_name(f".{folder.name}.lock")


@contextmanager
def _building(folder: Path, *, keep: bool) -> Iterator[Path]:
    """A folder to build in: with what an interrupted build left, unless another process is building there now.

    keep: whether to leave it where the build is interrupted. It goes when the rows themselves are refused.
    """
    from filelock import FileLock, Timeout

    building, lock_file = building_folder(folder), building_lock(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from error
    lock = FileLock(lock_file)
    try:
        lock.acquire(blocking=False)
    except Timeout:  # as fast as the other one, and then one of them is thrown away
        with tempfile.TemporaryDirectory(
            dir=folder.parent, prefix=f".{folder.name}.", ignore_cleanup_errors=True
        ) as own:
            yield Path(own)
        return
    try:
        building.mkdir(exist_ok=True)
        yield building
    except (DataError, ModelError, TemplateError):
        shutil.rmtree(building, ignore_errors=True)
        raise
    finally:
        if not keep or folder.exists():  # another process was faster
            shutil.rmtree(building, ignore_errors=True)
        lock_file.unlink(missing_ok=True)
        lock.release()


class _Build:
    """All shards of a store, one after another, and what becomes of them together."""

    def __init__(self, job: Job, ledger: Path, *, refuse_at_once: bool) -> None:
        self._job, self._ledger, self._refuse_at_once = job, ledger, refuse_at_once
        self.report = StoreReport()
        self._first_bad: list[str] = []
        self._before = Counter[int](), Counter[int]()  # lines and rows of each source in the shards so far

    def run(
        self, folder: Path, meta: Mapping[str, Any], *, workers: int, progress: Progress | None
    ) -> dict[str, str]:
        """Compile everything into `folder`. Raises DataError; the ledger of bad rows is written either way.

        Returns the SHA-256 of the files that hold tokens.
        """
        report, settings = self.report, self._job.settings
        hashes: dict[str, str] = {}
        first_lines: list[dict[int, int]] = []
        shards = cut_into_shards(self._job.sources, settings.max_samples)
        with atomic_write(self._ledger) as rejected:
            for compiled, found in compile_shards(
                self._job, shards, folder, workers=workers, progress=progress
            ):
                self._refuse_untrained(compiled)
                self._copy_rejected(folder, compiled, rejected)
                first_lines.append({file: self._before[0][file] for file, _, _ in compiled.pieces})
                for file, lines, rows in compiled.pieces:
                    self._before[0][file] += lines
                    self._before[1][file] += rows
                report.add(compiled.report)
                report.resumed += compiled.report.rows if found else 0
                hashes[token_file(compiled.number)] = compiled.tokens_sha256
                if self._refuse_at_once and settings.refuses(report):
                    break
        if report.bad:
            report.ledger = self._ledger
        else:
            self._ledger.unlink(missing_ok=True)
        try:
            row_lengths = join_columns(folder, first_lines) if hashes else np.empty(0, np.int32)
            self._judge(row_lengths)
            for path in leftovers(folder):
                path.unlink()
        except OSError as error:
            raise cannot_write(folder, error) from error
        write_meta(folder, {**meta, "examples": report.examples, "report": report.facts()})
        return hashes

    def _refuse_untrained(self, compiled: Compiled) -> None:
        if compiled.untrained is None:
            return
        format, file, line = compiled.untrained
        raise DataError(
            tr(f"rows of format `{format}` are not trained", f"`{format}` 格式的数据不用于训练"),
            where=f"{self._job.sources[file].path}:{self._before[0][file] + line}",
            remedy=tr(
                f"take the file out of the data, or, if you mean it, say data_format={format}",
                f"请把该文件移出训练数据；如果确实要用，请写 data_format={format}",
            ),
        )

    def _copy_rejected(self, folder: Path, compiled: Compiled, ledger: Any) -> None:
        """The shard's bad rows into the ledger, with the lines and rows they have in their files."""
        if not compiled.report.bad:
            return
        lines_before, rows_before = self._before
        with (folder / f"rejected-{compiled.number:05d}.jsonl").open(encoding="utf-8") as file:
            for text in file:
                found = json.loads(text)
                source = found.pop("file")
                path = self._job.sources[source].path
                line, row = found["line"] + lines_before[source], found["row"] + rows_before[source]
                entry = {"path": path, **found, "line": line, "row": row}
                ledger.write(json.dumps(entry, ensure_ascii=False) + "\n")
                if len(self._first_bad) < _SHOWN:
                    where = f"{path}:{line}:{found['field']}" if found["field"] else f"{path}:{line}"
                    self._first_bad.append(f"{where}: {found['message']}")

    def _judge(self, lengths: np.ndarray) -> None:
        """Raise DataError if what was read must not be trained on. lengths: of each row, in tokens."""
        report, settings, sources = self.report, self._job.settings, self._job.sources
        if not report.rows:
            raise DataError(
                tr("there are no rows", "没有任何样本"), where=", ".join(s.path for s in sources[:3])
            )
        if settings.too_many_bad(report):
            listed = "\n".join(f"  {line}" for line in self._first_bad)
            problem = tr(
                f"{report.bad} of {report.rows} rows are bad:",
                f"{report.rows} 条样本中有 {report.bad} 条不合格：",
            )
            share = -(-1000 * report.bad // report.rows) / 10
            remedy = tr("all of them stand in that file; repair them", "全部列在上述文件中；请修正")
            if share < 100:
                remedy += tr(
                    f", or leave them out: allow_bad={share:g}%", f"，或用 allow_bad={share:g}% 略过它们"
                )
            raise DataError(f"{problem}\n{listed}", where=str(self._ledger), remedy=remedy)
        over = int((lengths > settings.max_seq_len).sum())
        if over and (settings.policy == "error" or not report.examples):
            raise overlong_error(lengths, settings.max_seq_len)
        if not report.examples:
            problem = tr("no row is left to learn from", "没有剩下可学的样本")
            listed = "\n".join(f"  {line}" for line in self._first_bad)
            raise DataError(f"{problem}\n{listed}".rstrip(), where=str(sources[0].path))
