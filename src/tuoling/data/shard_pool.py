"""Shards compiled in worker processes, their results in order; few are under way at a time."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue

from tuoling import environment
from tuoling.data.shard_compiler import Compiled, Job, ShardCompiler, finished
from tuoling.data.shard_worker import unpacked_error
from tuoling.data.shards import Shard
from tuoling.errors import TuolingError
from tuoling.language import tr

WORKER = (sys.executable, "-m", "tuoling.data.shard_worker")
ALONE_BELOW_BYTES = 16 << 20
"""Of rows: 20,000, which take two seconds. A worker needs a quarter of one to be there."""
WORKER_BYTES = 64 << 20
BYTES_PER_TOKENIZER_BYTE = 30
"""A worker's own memory: 41 MiB and the tokenizer, of which gpt-neox's 2.4 MB of JSON become 40 MiB (twice, where
texts that go on after others are encoded in another way)."""
MEMORY_SHARE = 0.25

Progress = Callable[[int], None]


def worker_count(job: Job, size_bytes: int, asked: int | None) -> int:
    """Processes to compile in: one a core, if there is enough to do and memory for them; 1: this one."""
    if not job.tokenizer.portable:
        return 1
    if asked is not None:
        return asked
    if size_bytes < ALONE_BELOW_BYTES:
        return 1
    each = WORKER_BYTES + BYTES_PER_TOKENIZER_BYTE * job.tokenizer.size_bytes
    fitting = int(MEMORY_SHARE * environment.memory_available_bytes() / each)
    return max(1, min(environment.compute_threads(), fitting))


def compile_shards(
    job: Job, shards: Iterable[Shard], folder: Path, *, workers: int, progress: Progress | None
) -> Iterator[tuple[Compiled, bool]]:
    """Each shard compiled into `folder`, in order, and whether it lay there already. progress: rows so far.

    Raises what compiling raises, TuolingError where a worker was killed. What is finished stays.
    """
    count = _Count(progress)
    if workers == 1:
        with ThreadPoolExecutor(max_workers=1) as beside:
            compiler = ShardCompiler(job, folder, beside)
            for shard in shards:
                yield _made(shard, folder, count, compiler.compile)
        return
    with _Workers(job, folder, workers) as pool:
        under_way: deque[Future[tuple[Compiled, bool]]] = deque()
        for shard in shards:
            under_way.append(pool.threads.submit(_made, shard, folder, count, pool.compile))
            if len(under_way) > 2 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


def _made(
    shard: Shard, folder: Path, count: _Count, compile: Callable[[Shard, Progress], Compiled]
) -> tuple[Compiled, bool]:
    found = finished(folder, shard)
    if found is None:
        return compile(shard, count), False
    count(found.report.rows)
    return found, True


class _Count:
    """Adds up the rows of all workers."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress, self._rows, self._lock = progress, 0, threading.Lock()

    def __call__(self, rows: int) -> None:
        if self._progress is None:
            return
        with self._lock:
            self._rows += rows
            total = self._rows
        self._progress(total)


class _Workers:
    """Worker processes, each asked by one thread at a time."""

    def __init__(self, job: Job, folder: Path, number: int) -> None:
        self._start = pickle.dumps((job, folder))
        self._all: list[subprocess.Popen[bytes]] = []
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        self._number = number
        self.threads = ThreadPoolExecutor(max_workers=number)

    def __enter__(self) -> _Workers:
        variables = environment.variables(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1")
        for _ in range(self._number):
            process = subprocess.Popen(WORKER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=variables)
            self._all.append(process)
            self._idle.put(process)
        for process in self._all:
            assert process.stdin is not None
            process.stdin.write(self._start)
            process.stdin.flush()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for process in self._all:
            assert process.stdin is not None and process.stdout is not None
            if kind is not None:
                process.kill()
            with suppress(BrokenPipeError):
                process.stdin.close()
        self.threads.shutdown(cancel_futures=True)
        for process in self._all:
            process.wait()
            if process.stdout is not None:
                process.stdout.close()

    def compile(self, shard: Shard, progress: Progress) -> Compiled:
        """One shard in the next idle worker."""
        process = self._idle.get()
        try:
            assert process.stdin is not None and process.stdout is not None
            pickle.dump(shard, process.stdin)
            process.stdin.flush()
            while True:
                kind, value = pickle.load(process.stdout)
                if kind == "rows":
                    progress(value)
                elif kind == "error":
                    raise unpacked_error(value)
                else:
                    compiled: Compiled = value
                    return compiled
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            raise _killed(process) from error
        finally:
            self._idle.put(process)


def _killed(process: subprocess.Popen[bytes]) -> TuolingError:
    code = process.wait()
    return TuolingError(
        tr(
            f"a process that compiles rows ended without a word (code {code})",
            f"有编译数据的进程没有说明就结束了（代码 {code}）",
        ),
        remedy=tr(
            "most often the system does that when memory runs out: data_workers=1; what is finished is kept, and the "
            "next run goes on from there",
            "最常见的原因是内存不足时被系统终止：data_workers=1；已完成的部分会保留，下次从那里继续",
        ),
    )
