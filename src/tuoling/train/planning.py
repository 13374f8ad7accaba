"""From rows, model and config to the plan: how many steps, and the disk they take."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from tuoling.data.batches import largest_micro_batch_tokens
from tuoling.errors import TrainingError
from tuoling.language import tr
from tuoling.train.plan import MixPart, Plan
from tuoling.train.steps import FROM_THE_BEGINNING, Offset, look_at, make_steps

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tuoling.config import RunConfig
    from tuoling.data.mix import Mix
    from tuoling.data.token_store import TokenStore
    from tuoling.models.licence import Part
    from tuoling.train.memory import MemoryEstimate, ModelSize


def make_plan(
    config: RunConfig,
    *,
    lengths: np.ndarray,
    learned: np.ndarray,
    eval_rows: int,
    size: ModelSize,
    memory: MemoryEstimate,
    device: str,
    shared_rows: int = 0,
    shared_tokens: int = 0,
    fitting: Sequence[str] = (),
    lineage: Sequence[Part] = (),
    world_size: int = 1,
    laid_for: int | None = None,
    offset: Offset = FROM_THE_BEGINNING,
    mix: Mix | None = None,
    store: TokenStore | None = None,
) -> Plan:
    """Count steps and the disk they take.

    lengths, learned: [rows], tokens and learned tokens of each training row. store: where these are the first rows of
    it, and the others may still be made.
    Every row is seen exactly `num_train_epochs` times; only the very last step may hold fewer rows. shared_rows and
    shared_tokens are those of rows computed inside others, and not counted elsewhere.
    """
    rows = _rows_of_an_epoch(lengths, mix, world_size)
    laid = make_steps(config, lengths, world_size, laid_for, offset, mix, store)
    figures, budget, steps = look_at(laid, lengths, store), laid.max_tokens, laid.total
    schedule = offset.total_steps or steps
    largest = largest_micro_batch_tokens(lengths, rows_at_once=laid.rows_at_once, max_tokens=budget)
    warmup = math.ceil(config.warmup_ratio * schedule) if config.warmup_steps is None else config.warmup_steps
    known = store is None or store.whole
    save_steps = _interval(config.save_steps, laid.per_epoch, steps)
    disk, checkpoint = _disk_bytes(config, size, steps, save_steps)
    return Plan(
        rows=rows,
        eval_rows=eval_rows,
        tokens=_in_epoch(lengths, mix),
        learned_tokens=_in_epoch(learned, mix),
        longest_row=int(lengths.max()),
        rows_per_step=laid.rows_per_step,
        max_tokens_per_batch=budget,
        rows_over_budget=int((lengths > budget).sum()) if budget else 0,
        tokens_per_step=round(figures.tokens, 1),
        micro_batches_per_step=round(figures.micro_batches, 3),
        most_micro_batches=figures.most_micro_batches,
        largest_micro_batch=largest,
        fill=round(figures.fill, 4) if figures.fill is not None else None,
        total_rows=laid.total_rows,
        total_steps=steps,
        epochs=round(laid.total_rows / rows, 4) if known else None,
        rows_known=known,
        warmup_steps=warmup,
        save_steps=save_steps,
        eval_steps=_interval(config.eval_steps, laid.per_epoch, steps),
        parameters=size.parameters,
        trainable=size.trainable,
        device=device,
        memory=memory,
        disk_bytes=disk,
        checkpoint_bytes=checkpoint,
        first_step=laid.first,
        schedule_steps=schedule,
        fitting=tuple(fitting),
        lineage=tuple(lineage),
        world_size=world_size,
        shared_rows=shared_rows,
        shared_tokens=shared_tokens,
        mix=_parts(mix, laid.total_rows / rows),
    )


def _rows_of_an_epoch(lengths: np.ndarray, mix: Mix | None, world_size: int) -> int:
    """Raise TrainingError where there is none, or fewer than processes."""
    if len(lengths) == 0:
        raise TrainingError(
            tr("no row is left to train on", "没有可训练的数据"),
            remedy=tr("lower val_size, or raise max_samples", "调小 val_size，或调大 max_samples"),
        )
    rows = len(lengths) if mix is None else sum(mix.taken())
    if rows < world_size:
        raise TrainingError(
            tr(f"{world_size} processes and {rows} rows", f"有 {world_size} 个进程，却只有 {rows} 条数据"),
            remedy=tr(f"at most {rows} processes: --nproc {rows}", f"最多 {rows} 个进程：--nproc {rows}"),
        )
    return rows


def _disk_bytes(config: RunConfig, size: ModelSize, steps: int, save_steps: int) -> tuple[int, int]:
    """Bytes at most of everything the run writes, and of one checkpoint."""
    kept = (config.save_total_limit or steps) + 1  # the newest stands beside the kept ones until it is whole
    copies = max(1, min(kept, (steps - 1) // save_steps))  # one even of a short run: where it is interrupted
    if config.save_keep_every:
        copies += steps // config.save_keep_every
    saved = size.trainable * 4 if config.finetuning_type == "lora" else size.parameters * 4
    checkpoint = saved + size.trainable * 8
    return copies * checkpoint + saved, checkpoint


def _in_epoch(counts: np.ndarray, mix: Mix | None) -> int:
    """The sum over the rows of an epoch; with a mix what it is in the mean of all epochs."""
    if mix is None:
        return int(counts.sum())
    sums = np.bincount(mix.group, weights=counts, minlength=len(mix.names))
    shares = np.array(mix.taken()) / np.array(mix.rows)
    return round(float((sums * shares).sum()))


def _parts(mix: Mix | None, epochs: float) -> tuple[MixPart, ...]:
    if mix is None:
        return ()
    parts = zip(mix.names, mix.shares, mix.rows, mix.taken(), strict=True)
    return tuple(
        MixPart(name, share, rows, taken, round(epochs * taken / rows, 4))
        for name, share, rows, taken in parts
    )


def _interval(asked: int | None, per_epoch: int, steps: int) -> int:
    """Steps between two saves or evaluations: as asked; once an epoch (None); only at the end (0)."""
    return per_epoch if asked is None else asked or steps
