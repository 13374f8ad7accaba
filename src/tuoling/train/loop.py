"""The run: one visible loop from rows to a saved model.

Read `train` for the order of things and `train_step` for the step itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tuoling import console, environment, files
from tuoling.data.batches import lay
from tuoling.data.pack import Batch, collate, nothing_learned
from tuoling.kernels.install import FastModel
from tuoling.kernels.loss import Extras
from tuoling.language import tr
from tuoling.models.load import load_model
from tuoling.train.checkpoint import prune_checkpoints, random_state, save_checkpoint
from tuoling.train.finish import finish
from tuoling.train.interrupt import Interrupt
from tuoling.train.memory import quantization_of
from tuoling.train.optim import make_optimizer, set_learning_rate
from tuoling.train.parallel import Engine, StepResult, make_engine
from tuoling.train.prepare import Setup, prepare
from tuoling.train.progress import (
    Progress,
    improved,
    log_step,
    not_finite,
    note_step,
    trainer_state,
)
from tuoling.train.ranks import Ranks, join
from tuoling.train.rows import Rows
from tuoling.train.run_folder import RunFolder, claim, default_run_folder, manifest
from tuoling.train.steps import Steps, make_steps
from tuoling.train.weights import WeightSaver, make_trainable

if TYPE_CHECKING:
    from tuoling.config import RunConfig


@dataclass(frozen=True, slots=True)
class RunResult:
    """Where a run lies and what all_results.json says of it."""

    path: Path
    status: str
    results: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Parts:
    """What computes: the engine, the model with its fast step, the optimizer, and how weights are saved."""

    engine: Engine
    model: Any
    fast: FastModel
    optimizer: Any
    saver: WeightSaver
    share_head: bool = False


def train(
    config: RunConfig,
    *,
    notes: Sequence[str] = (),
    say: Callable[[str], None] = console.note,
    show_plan: Callable[[Setup], None] | None = None,
) -> RunResult:
    """Train as `config` says and leave a run folder. Everything checkable is checked before the first step.

    Raises TuolingError; a run folder that was begun then says `"status": "failed"` and why.
    """
    with console.silent(environment.place().rank != 0):
        setup = prepare(config, say=say, notes=notes)  # rows are tokenised before the processes meet
        if not config.ignore_memory_plan:
            setup.plan.require_memory()
        return train_prepared(setup, say=say, show_plan=show_plan)


def train_prepared(
    setup: Setup, *, say: Callable[[str], None], show_plan: Callable[[Setup], None] | None = None
) -> RunResult:
    """Train what `prepare` found, with the other processes where a launcher started several."""
    with join(setup.device, setup.config.timeout_s) as ranks:
        if not ranks.first:
            say, show_plan = _say_nothing, None
        ranks.require_same(setup.fingerprint(), tr("config or rows", "配置或数据"))
        folder = ranks.decide(lambda: begin(setup, say))
        if show_plan:
            show_plan(setup)
        record = manifest(setup, environment.versions(), environment.machine())
        run = RunFolder(folder, record, writes=ranks.first)
        try:
            parts = assemble(setup, run, record, say, ranks)
            with Interrupt() as interrupt:
                done = fit(setup, run, parts, interrupt)
                parts.fast.uninstall()
                status = "interrupted" if done.step < setup.plan.total_steps else "finished"
                results = _finish(run, setup, parts, done, status, say)
                parts.engine.finish()
        except BaseException as error:
            run.fail(error)
            raise
    return RunResult(folder, status, results)


def begin(setup: Setup, say: Callable[[str], None]) -> Path:
    """Make the run folder; say what became of an old one."""
    config = setup.config
    folder = Path(config.output_dir) if config.output_dir else default_run_folder(setup.source.name)
    setup.plan.require_disk(folder)
    moved = claim(folder, overwrite=config.overwrite_output_dir)
    if moved:
        say(moved)
    return folder


def assemble(
    setup: Setup,
    run: RunFolder,
    record: dict[str, Any],
    say: Callable[[str], None],
    ranks: Ranks | None = None,
) -> Parts:
    """Load the model, make its trained weights trainable, put the fast step on it, make the optimizer."""
    config = setup.config
    engine = make_engine(
        config,
        ranks or Ranks(),
        device=setup.device,
        dtype=setup.dtype,
        hidden=setup.hidden,
        folder=run.path,
        manifest=record,
    )
    torch.manual_seed(config.seed)
    with engine.loading():
        model = load_model(
            setup.source,
            dtype="fp32" if config.finetuning_type == "full" else setup.dtype,
            device=engine.loads_on or setup.device,
            for_training=True,
            allow_remote_code=config.allow_remote_code,
            quantization=quantization_of(config),
        )
        model = make_trainable(model, setup)
    fast, optimizer = engine.build(model, lambda: make_optimizer(model, config), say)
    fast.extras = Extras(config.label_smoothing_factor, config.z_loss)
    if not engine.ranks.first:  # so that ranks drop different activations
        torch.manual_seed(config.seed + engine.ranks.rank)
    share_head = config.share_head and can_share_head(fast, setup.device, say)
    return Parts(engine, model, fast, optimizer, WeightSaver(model, setup), share_head)


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


def fit(setup: Setup, run: RunFolder, parts: Parts, interrupt: Interrupt) -> Progress:
    """Step until the plan is done or the user interrupts; evaluate, log and save on the way.

    Raises KeyboardInterrupt where nothing has been trained yet that could be saved.
    """
    config, plan, done = setup.config, setup.plan, Progress()
    ranks = parts.engine.ranks
    steps = make_steps(config, setup.train.lengths, ranks.world_size)
    parts.model.train()
    with run.metrics() as metrics, console.progress() as bar:
        task = bar.add_task(tr("training", "训练中"), total=plan.total_steps, detail="")
        while done.step < plan.total_steps and not ranks.any(interrupt.asked):
            began = time.perf_counter()
            rate = plan.learning_rate(done.step, config)
            set_learning_rate(parts.optimizer, rate)
            batches = batches_of_step(setup.train, steps, done.step, ranks.rank, share_head=parts.share_head)
            step = train_step(parts.fast, parts.optimizer, parts.engine, batches, config.max_grad_norm)
            row = note_step(done, setup, step, rate, time.perf_counter() - began)
            if not step_is_finite(parts.engine, step.loss, step.grad_norm):
                rows = ranks.gather([row for batch in batches for row in batch.rows])
                raise not_finite(run, setup, [each for share in rows for each in share], row)
            bar.update(
                task,
                completed=done.step,
                detail=f"loss {step.loss:.4f} · {row['tokens_per_s']:,.0f} tokens/s",
            )
            last = done.step == plan.total_steps or ranks.any(interrupt.asked)
            if setup.held_out and (last or done.step % plan.eval_steps == 0):
                row["eval_loss"] = done.eval_loss = evaluate_loss(parts, setup, setup.held_out)
            files.append_jsonl(metrics, row)
            log_step(run, parts.engine.accelerator, row, config.logging_steps, last)
            if improved(done, config, row) or (done.step % plan.save_steps == 0 and not last):
                _save(setup, run, parts, done)
    if done.step == 0:
        raise KeyboardInterrupt
    return done


def _save(setup: Setup, run: RunFolder, parts: Parts, done: Progress) -> None:
    engine = parts.engine
    weights = engine.whole_weights(parts.model)
    optimizer = engine.optimizer_tensors(parts.model, parts.optimizer)
    random = engine.ranks.gather(random_state())
    if not engine.ranks.first:
        return
    save_checkpoint(
        run.path / f"checkpoint-{done.step}",
        save_weights=lambda folder: parts.saver.save(folder, weights),
        optimizer=optimizer,
        random=random,
        trainer_state=trainer_state(run, setup, done),
        position={"step": done.step, "rows_seen": done.rows_seen, "seed": setup.config.seed},
    )
    best = done.best["checkpoint"] if done.best else None
    prune_checkpoints(run.path, keep=setup.config.save_total_limit, best=best)


def _finish(
    run: RunFolder, setup: Setup, parts: Parts, done: Progress, status: str, say: Callable[[str], None]
) -> dict[str, Any]:
    """The end of the run, written by the first rank. Returns its results in every rank."""
    ranks = parts.engine.ranks
    weights = parts.engine.whole_weights(parts.model)
    done.peaks_gib = ranks.gather(round(environment.peak_rss_gib(), 3))
    return ranks.decide(
        lambda: finish(
            run,
            setup,
            done,
            status=status,
            save_weights=lambda folder: parts.saver.save(folder, weights),
            say=say,
        )
    )


def batches_of_step(
    train: Rows, steps: Steps, step: int, rank: int = 0, *, share_head: bool = False
) -> list[Batch]:
    """The micro-batches of an optimizer step in one rank: a function of the seed and the step alone."""
    laid = steps.micro_batches(step, rank)
    return [collate([train[row] for row in rows], share_head=share_head) for rows in laid]


def train_step(
    fast: FastModel,
    optimizer: torch.optim.Optimizer,
    engine: Engine,
    batches: Sequence[Batch],
    max_grad_norm: float,
) -> StepResult:
    """One optimizer step.

    Every micro-batch gives a sum; the sums are divided once, by the learned tokens of all of them in all ranks, so
    that 8 x 1 and 1 x 8 rows give the same gradient. A loss or a gradient that is not finite changes no weight.
    """
    batches, counts = engine.share(batches)
    total = 0.0
    for number, batch in enumerate(batches, 1):
        last = number == len(batches)
        with engine.accumulating(last):
            with engine.autocast():
                loss_sum = batch_loss(fast, batch, engine.device)
            engine.backward(loss_sum / counts.learned, last)
        total += loss_sum.item()
    mean = engine.ranks.total(total) / counts.learned
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = engine.clip(parameters, max_grad_norm) if math.isfinite(mean) else math.nan
    if step_is_finite(engine, mean, norm):
        engine.step(optimizer)
    optimizer.zero_grad()
    return StepResult(mean, norm, counts)


def step_is_finite(engine: Engine, loss: float, grad_norm: float) -> bool:
    """Whether a step may change the weights. A gradient that overflows under loss scaling is the scaler's to skip."""
    return math.isfinite(loss) and (engine.scales_loss or math.isfinite(grad_norm))


def batch_loss(fast: FastModel, batch: Batch, device: torch.device) -> torch.Tensor:
    """Summed cross entropy of a packed batch, in nats, on `device`."""
    here = batch.to(device)
    return fast.loss_sum(
        here.input_ids, here.labels, here.position_ids, here.cu_seqlens, here.extra_labels, here.head
    )


@torch.no_grad()
def evaluate_loss(parts: Parts, setup: Setup, rows: Rows) -> float:
    """Mean nats per learned token over held-out rows, dropout off."""
    config = setup.config
    laid = lay(
        rows.lengths, rows_at_once=config.per_device_eval_batch_size, max_tokens=config.max_tokens_per_batch
    )
    engine, was_training = parts.engine, parts.model.training
    mine = laid[engine.ranks.rank :: engine.ranks.world_size]
    parts.model.eval()
    total, learned = 0.0, 0
    for number in range(engine.forwards(len(mine))):
        batch = nothing_learned()
        if number < len(mine):
            batch = collate([rows[position] for position in mine[number]], share_head=parts.share_head)
        with engine.autocast():
            total += batch_loss(parts.fast, batch, engine.device).item()
        learned += batch.num_learned
    parts.model.train(was_training)
    return engine.ranks.total(total) / engine.ranks.total(learned)


def _say_nothing(message: str) -> None:
    """What the ranks that do not print say."""
