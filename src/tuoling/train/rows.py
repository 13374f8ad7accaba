"""The rows of a run: compiled into a token store, some of them held out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tuoling import console, environment, files
from tuoling.data.duplicates import first_of_equal
from tuoling.data.growing_store import GrowingStore
from tuoling.data.mix import Mix, make_mix
from tuoling.data.prefixes import SharedPrefixes, share_prefixes
from tuoling.data.shard_compiler import Job
from tuoling.data.sources import resolve_sources
from tuoling.data.store import Example, StoreReport, StoreSettings, TokenStore, compile_store
from tuoling.errors import DataError
from tuoling.language import tr

if TYPE_CHECKING:
    from tuoling.config import RunConfig
    from tuoling.text.templates import Template
    from tuoling.text.tokenizer import TextTokenizer

Say = Callable[[str], None]


@dataclass(frozen=True)
class Rows:
    """Some rows of a token store, in the store's order. shared: what each of them learns for rows that begin it."""

    store: TokenStore
    index: np.ndarray  # int64 [rows]
    shared: SharedPrefixes | None = None

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, position: int) -> Example:
        if self.shared is not None:
            return self.shared.example(self.store, position)
        return self.store[int(self.index[position])]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, [rows]."""
        return np.asarray(self.store.lengths)[self.index]

    @property
    def learned(self) -> np.ndarray:
        """Learned tokens of each row, [rows]."""
        if self.shared is not None:
            return self.shared.learned(self.store)
        return np.asarray(self.store.learned)[self.index]

    def places(self, row: int) -> list[str]:
        """`file:line` of a store row that is trained, and of those learned inside it."""
        rows = [row]
        if self.shared is not None:
            rows += self.shared.members_of(int(np.searchsorted(self.index, row))).tolist()
        return [self.store.place(each) for each in rows]

    def sharing_prefixes(self) -> Rows:
        """The same rows, each that begins another of them learned inside it."""
        shared = share_prefixes(self.store, self.index)
        return Rows(self.store, shared.hosts, shared)


@dataclass(frozen=True)
class RowsSoFar(Rows):
    """The rows of a store that is still being made, in its order. One that is not there yet is waited for."""

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, position: int) -> Example:
        return self.store[position]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row so far."""
        return np.asarray(self.store.lengths)

    @property
    def learned(self) -> np.ndarray:
        """Learned tokens of each row so far."""
        return np.asarray(self.store.learned)


def _job(
    config: RunConfig,
    data: Sequence[str],
    names: Sequence[str],
    tokenizer: TextTokenizer,
    template: Template,
) -> Job:
    """What is compiled, and how the config wants it."""
    sources = resolve_sources(
        data,
        dataset_dir=config.dataset_dir,
        dataset_names=names,
        format=config.data_format,
        columns=config.columns,
        seed=config.seed,
    )
    settings = StoreSettings(
        stage=config.stage,
        max_seq_len=config.max_seq_len,
        overlong=config.overlong,
        learn=config.learn,
        train_on_inputs=config.train_on_inputs,
        learn_cut_answers=config.learn_cut_answers,
        allow_bad=config.allow_bad,
        max_samples=config.max_samples,
    )
    return Job(tuple(sources), tokenizer, template, settings)


def compile_rows(
    config: RunConfig,
    data: Sequence[str],
    names: Sequence[str],
    tokenizer: TextTokenizer,
    template: Template,
    say: Say,
) -> tuple[TokenStore, StoreReport]:
    """The token store of the rows that `data` (files, folders, hub ids) and `names` (of the registry) name.

    Says what became of them. Raises DataError for rows that cannot be trained on.
    """
    job = _job(config, data, names, tokenizer, template)
    cache = environment.cache_dir() / "tokens"
    files.require_writable(cache)
    with console.progress() as bar, _in_turn(cache):
        task = bar.add_task(tr("reading rows", "读取数据"), total=None, detail="")
        store, report = compile_store(
            job.sources,
            tokenizer=tokenizer,
            template=template,
            settings=job.settings,
            cache_dir=cache,
            progress=lambda rows: bar.update(task, completed=rows),
            workers=config.data_workers,
        )
    for line in store_notes(report):
        say(line)
    if len(store) == 0:
        raise DataError(
            tr("no row can be trained on", "没有一条数据可以训练"), where=", ".join([*data, *names])
        )
    return store, report


def mix_of(config: RunConfig, rows: Rows) -> Mix | None:
    """The sources of these rows of `data` and `dataset`, where the config gives them shares."""
    if config.mix is None:
        return None
    names = [([name], ()) for name in config.data] + [((), [name]) for name in config.dataset]
    weights = [(name, config.mix[name]) for name in (*config.data, *config.dataset)]
    counts = [
        len(resolve_sources(data, dataset_dir=config.dataset_dir, dataset_names=listed))
        for data, listed in names
    ]
    source_of_file = np.repeat(np.arange(len(counts)), counts)
    return make_mix(weights, source_of_file[rows.store.sources[rows.index]])


def _in_turn(cache: Path) -> AbstractContextManager[object]:
    """Of several processes of a launcher the first compiles the rows; the others wait and use what it made."""
    if environment.world_size() == 1:
        return nullcontext()
    from filelock import FileLock

    return FileLock(cache / "ranks.lock")


def begin_rows(
    config: RunConfig, tokenizer: TextTokenizer, template: Template, say: Say
) -> tuple[Rows, StoreReport]:
    """The training rows as soon as the first of them are there; a process of its own compiles the rest.

    All of them where that cannot be: rows of a hub, a tokenizer that stays in its process.
    """
    job = _job(config, config.data, config.dataset, tokenizer, template)
    if not tokenizer.portable or any(source.hub is not None for source in job.sources):
        say(
            tr(
                "streaming_start: these rows are all compiled first (a hub's rows, or a tokenizer without a fast form)",
                "streaming_start：这些数据要先全部编译（来自模型库，或分词器没有快速版本）",
            )
        )
        store, report = compile_rows(config, config.data, config.dataset, tokenizer, template, say)
        return Rows(store, np.arange(len(store))), report
    cache = environment.cache_dir() / "tokens"
    files.require_writable(cache)
    with _in_turn(cache):
        growing = GrowingStore(job, cache, config.data_workers)
        growing.wait(1)
    if growing.whole:
        for line in store_notes(growing.report):
            say(line)
    else:
        say(
            tr(
                f"streaming_start: the first {len(growing):,} rows are there; the others are compiled while training",
                f"streaming_start：前 {len(growing):,} 条已就绪，其余的边训练边编译",
            )
        )
    return RowsSoFar(growing, np.empty(0, np.int64)), growing.report


def store_notes(report: StoreReport) -> list[str]:
    """What became of the rows: formats, what was dropped or cut, whether the store was there already."""
    formats = ", ".join(f"{name} {count:,}" for name, count in report.formats.items())
    lines = [tr(f"rows: {report.rows:,} ({formats})", f"数据：{report.rows:,} 条（{formats}）")]
    if report.bad:
        lines.append(
            tr(
                f"{report.bad:,} bad rows left out: {report.ledger}",
                f"去掉 {report.bad:,} 条坏数据：{report.ledger}",
            )
        )
    if report.dropped_overlong:
        share = report.dropped_overlong / report.rows
        lines.append(
            tr(
                f"{report.dropped_overlong:,} over-long rows dropped, {share:.1%} of all; a larger max_seq_len keeps more",
                f"去掉 {report.dropped_overlong:,} 条超长数据，占 {share:.1%}；调大 max_seq_len 可以保留更多",
            )
        )
    if report.cut:
        lines.append(tr(f"{report.cut:,} prompts cut to fit", f"{report.cut:,} 条的提示被截短"))
    if report.split:
        lines.append(tr(f"{report.split:,} over-long rows split", f"{report.split:,} 条超长数据被切分"))
    if report.flagged:
        lines.append(
            tr(
                f"{report.flagged:,} rows are flagged (unfilled placeholders and the like): tuoling data check shows them",
                f"{report.flagged:,} 条有可疑之处（如未填的占位符）：用 tuoling data check 查看",
            )
        )
    if report.left_out:
        lines.append(
            tr(
                f"{report.left_out:,} examples left out: their answer does not fit",
                f"去掉 {report.left_out:,} 个样本：回答放不下",
            )
        )
    if report.resumed:
        lines.append(
            tr(
                f"tokens: {report.resumed:,} rows had been compiled before the last run was interrupted",
                f"token：其中 {report.resumed:,} 条在上次中断前已经编译好",
            )
        )
    if report.reused:
        lines.append(tr("tokens: the store made earlier is used again", "token：沿用以前编译好的结果"))
    return lines


def hold_out(store: TokenStore, count: int, seed: int) -> tuple[Rows, Rows | None]:
    """Keep about `count` seeded rows for validation, never more; rows with equal tokens stay on one side."""
    rows = len(store)
    if count == 0:
        return Rows(store, np.arange(rows)), None
    keys = np.fromiter((_key(store.input_ids(row)) for row in range(rows)), np.uint64, rows)
    firsts, group_of = np.unique(first_of_equal(keys), return_inverse=True)
    ends = np.cumsum(np.bincount(group_of, minlength=len(firsts)))
    members = np.argsort(group_of, kind="stable")  # the rows of a group stand together, ascending
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(firsts))
    chosen: list[int] = []
    for group in order:
        if len(chosen) >= count:
            break
        rows_of = members[ends[group - 1] if group else 0 : ends[group]]
        if len(chosen) + len(rows_of) <= count:
            chosen.extend(rows_of.tolist())
    out = np.zeros(rows, dtype=bool)
    out[chosen] = True
    return Rows(store, np.flatnonzero(~out)), Rows(store, np.flatnonzero(out)) if chosen else None


def _key(input_ids: np.ndarray) -> int:
    """64 bits of some ids: a dict of the ids themselves would hold all rows in memory."""
    return int.from_bytes(hashlib.blake2b(input_ids.tobytes(), digest_size=8).digest(), "little")


def sharing_note(alone: Rows, shared: Rows) -> str:
    """What sharing prefixes changes in a run, in a sentence."""
    gone = len(alone) - len(shared)
    if not gone:
        return tr("share_prefixes: no row begins another one", "share_prefixes：没有哪条数据是另一条的开头")
    more = len(alone) / len(shared)
    return tr(
        f"share_prefixes: {gone:,} of {len(alone):,} rows are computed inside the row they begin; with the same "
        f"batch size a step holds {more:.2f} times as many rows of the data, and an epoch has that many times fewer steps",
        f"share_prefixes：{len(alone):,} 条中有 {gone:,} 条在以它开头的那一条里计算；批大小不变时，"
        f"每步包含的数据是原来的 {more:.2f} 倍，每轮步数相应减少",
    )
