"""A token store that is read while it is made: its first shards as they come, the whole of it in the end.

A shard's place in the store does not depend on when it was finished, so that row 5,000 is the same row for a run that
waits for it as for one that finds the store whole.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from copy import deepcopy
from pathlib import Path

import numpy as np

from tuoling.data.shard_compiler import Compiled, Job, shard_in
from tuoling.data.store import building_folder, building_lock
from tuoling.data.store_builder import Builder, failure_in
from tuoling.data.store_key import key_parts
from tuoling.data.store_report import StoreReport
from tuoling.data.token_store import Example, TokenStore, columns_of, open_store, token_file
from tuoling.errors import TuolingError
from tuoling.files import sha256_text
from tuoling.language import tr

POLL_S, ASKS_AFTER_S = 0.05, 2.0
"""How often the folder is looked into; how often it is asked whether another process still builds."""


class GrowingStore(TokenStore):
    """The rows so far. Asking for one that is not there yet waits for it.

    Whoever finds nobody building begins to build; a process that follows another's build takes it over where that one
    is gone. report: what became of the rows so far. Raises DataError where rows are refused.
    """

    def __init__(self, job: Job, cache_dir: Path, workers: int | None) -> None:
        self._job, self._cache_dir, self._workers = job, cache_dir, workers
        parts = key_parts(job.sources, tokenizer=job.tokenizer, template=job.template, settings=job.settings)
        self.key = sha256_text(json.dumps(parts, sort_keys=True))
        self._paths = [source.path for source in job.sources]
        self._folder = cache_dir / self.key[:32]
        self._failed = cache_dir / f".{self.key[:32]}.failed.json"
        self.path = building_folder(self._folder)
        self.meta = {"key": self.key, "parts": parts, "paths": self._paths}
        self.report = StoreReport()
        self.whole = False
        self._builder: Builder | None = None
        self._asked_at: float | None = None
        self._shards = 0
        self._lines_before = Counter[int]()  # of each source
        self._parts = {}
        self._part_starts, self._offsets, self._span_offsets = (np.zeros(n, np.int64) for n in (0, 1, 1))
        self._spans = np.zeros((0, 2), np.int32)
        self._files, self._lines = np.zeros(0, np.uint32), np.zeros(0, np.uint32)
        self.lengths, self.learned = np.zeros(0, np.int32), np.zeros(0, np.int32)
        if not self._adopt() and not self._being_built():
            self._failed.unlink(missing_ok=True)  # of an earlier attempt

    def __getitem__(self, index: int) -> Example:
        self.wait(index + 1)
        return super().__getitem__(index)

    def ready(self, count: int) -> bool:
        """Whether the first `count` examples are there, or all there will be. Raises DataError where rows are refused."""
        while len(self) < count and not self.whole:
            if not self._grow():
                self._see_to_it()
                return False
        return True

    def wait(self, count: int) -> None:
        """Until they are."""
        while not self.ready(count):
            time.sleep(POLL_S)

    def _grow(self) -> bool:
        """Take in the next shard, or the whole store; whether there was one."""
        found = shard_in(self.path, self._shards)
        return (found is not None and self._take(found)) or self._adopt()

    def _take(self, shard: Compiled) -> bool:
        """A shard's examples behind those so far.

        False where the folder is just becoming the whole store, and of rows that the builder is just refusing.
        """
        number, tokens = shard.number, int(shard.report.tokens)
        with_it = deepcopy(self.report)
        with_it.add(shard.report)
        if self._job.settings.refuses(with_it):
            return False
        try:
            columns = columns_of(
                self.path, number, {file: self._lines_before[file] for file, _, _ in shard.pieces}
            )
            if tokens:  # mapped now: what is mapped stays when the folder gets its name
                self._parts[number] = np.memmap(self.path / token_file(number), dtype=np.uint32, mode="r")
        except OSError:
            return False
        self._part_starts = np.append(self._part_starts, self._offsets[-1])
        self._offsets = _followed(self._offsets, columns["lengths"])
        self._span_offsets = _followed(self._span_offsets, columns["span_counts"])
        self._spans = np.concatenate([self._spans, columns["spans"].reshape(-1, 2)])
        self._files = np.concatenate([self._files, columns["files"]])
        self._lines = np.concatenate([self._lines, columns["lines"]])
        self.lengths = np.concatenate([self.lengths, columns["lengths"]])
        self.learned = np.concatenate([self.learned, columns["learned"]])
        for file, lines, _ in shard.pieces:
            self._lines_before[file] += lines
        self.report.add(shard.report)
        self._shards += 1
        return True

    def _adopt(self) -> bool:
        """The store as it lies there whole, if it does."""
        store = open_store(self._folder, key=self.key, paths=self._paths)
        if store is None:
            return False
        vars(self).update(vars(store))
        vars(self.report).update(store.meta["report"])
        self.whole = True
        self._builder = None
        return True

    def _see_to_it(self) -> None:
        """Raise what ended the build; begin one where nobody builds."""
        code = self._builder.exit_code if self._builder is not None else None
        if failure := failure_in(self._failed):
            raise failure
        if code is not None and not self._adopt():
            raise TuolingError(
                tr(
                    f"the process that compiles the rest of the rows ended without a word (code {code})",
                    f"编译其余数据的进程没有说明就结束了（代码 {code}）",
                ),
                remedy=tr(
                    "most often the system does that when memory runs out: data_workers=1; what is finished is kept: "
                    "tuoling resume RUN",
                    "最常见的原因是内存不足时被系统终止：data_workers=1；已完成的部分会保留：tuoling resume 运行目录",
                ),
            )
        now = time.monotonic()
        if self._builder is None and (self._asked_at is None or now - self._asked_at > ASKS_AFTER_S):
            self._asked_at = now
            if not self._being_built() and not self._adopt():
                self._builder = Builder(self._job, self._cache_dir, self._workers, self._failed)

    def _being_built(self) -> bool:
        """Whether a process holds the lock of the build."""
        from filelock import FileLock, Timeout

        lock = FileLock(building_lock(self._folder))
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return True
        lock.release()
        return False


def _followed(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """int64: where each begins, and the last ends, with these behind them."""
    return np.concatenate([starts, starts[-1] + np.cumsum(counts, dtype=np.int64)])
