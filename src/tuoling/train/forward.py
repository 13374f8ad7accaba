"""The loss of a batch, and the mean loss of rows that nothing is learned from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from tuoling.data.batches import lay
from tuoling.data.pack import Batch, collate, nothing_learned
from tuoling.kernels.install import FastModel
from tuoling.language import tr

if TYPE_CHECKING:
    from tuoling.train.loop import Parts
    from tuoling.train.prepare import Setup
    from tuoling.train.rows import Rows
    from tuoling.train.steps import Steps


def batch_loss(fast: FastModel, batch: Batch, device: torch.device) -> torch.Tensor:
    """Summed cross entropy of a packed batch, in nats, on `device`."""
    here = batch.to(device)
    return fast.loss_sum(
        here.input_ids, here.labels, here.position_ids, here.cu_seqlens, here.extra_labels, here.head
    )


def evaluate_loss(
    parts: Parts, setup: Setup, rows: Rows, stop: Callable[[], bool] | None = None
) -> float | None:
    """Mean nats per learned token over held-out rows, dropout off. None where `stop` said so on the way."""
    config = setup.config
    laid = lay(
        rows.lengths, rows_at_once=config.per_device_eval_batch_size, max_tokens=config.max_tokens_per_batch
    )
    ranks = parts.engine.ranks
    return mean_loss(parts, rows, laid[ranks.rank :: ranks.world_size], stop)


@torch.no_grad()
def mean_loss(
    parts: Parts, rows: Rows, mine: Sequence[list[int]], stop: Callable[[], bool] | None = None
) -> float | None:
    """Mean nats per learned token over the batches of all ranks, dropout off. mine: this rank's, as places in `rows`."""
    engine, was_training = parts.engine, parts.model.training
    parts.model.eval()
    total, learned, stopped = 0.0, 0, False
    asked = int(max(row[0] for row in engine.ranks.table([len(mine)])))  # all ranks must ask equally often
    for number in range(asked):
        stopped = stop is not None and stop()
        if stopped:
            break
        batch = nothing_learned()
        if number < len(mine):
            batch = collate([rows[position] for position in mine[number]], share_head=parts.share_head)
        elif not engine.equal_forwards:
            continue
        with engine.autocast():
            total += batch_loss(parts.fast, batch, engine.device).item()
        learned += batch.num_learned
    parts.model.train(was_training)
    return None if stopped else engine.ranks.total(total) / engine.ranks.total(learned)


def probe(parts: Parts, setup: Setup, rows: list[int]) -> dict[str, Any]:
    """The loss of one batch with the weights as they are: a run that goes on from them must find it again."""
    mine = [rows] if parts.engine.ranks.first else []
    return {"rows": rows, "loss": mean_loss(parts, setup.train, mine)}


def last_rows(steps: Steps, step: int) -> list[int]:
    """The first micro-batch of the step before this one, as places among the training rows."""
    return next(iter(steps.micro_batches(step - 1)), [0])


def can_share_head(fast: FastModel, device: str, say: Callable[[str], None]) -> bool:
    """Whether rows may go on after one common head here; says so where they may not."""
    if fast.packed and device == "cpu":
        return True
    say(
        tr(
            "share_head: not used; rows that run one by one, or on a GPU, keep their own",
            "share_head：未使用；逐条计算或在 GPU 上时，每条数据各算各的开头",
        )
    )
    return False
