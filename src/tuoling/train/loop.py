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
from tuoling.data.pack import Batch, collate
from tuoling.kernels.install import FastModel
from tuoling.kernels.loss import Extras
from tuoling.language import tr
from tuoling.models.load import load_model
from tuoling.train.checkpoint import load_random_state
from tuoling.train.finish import finish
from tuoling.train.forward import batch_loss, can_share_head, evaluate_loss, last_rows, probe
from tuoling.train.interrupt import Interrupt
from tuoling.train.memory import quantization_of
from tuoling.train.optim import make_optimizer, set_learning_rate
from tuoling.train.parallel import Engine, StepResult, make_engine
from tuoling.train.prepare import Setup, prepare
from tuoling.train.progress import (
    Progress,
    improved,
    log_evaluation,
    log_step,
    not_finite,
    note_evaluation,
    note_forecast,
    note_step,
)
from tuoling.train.ranks import Ranks, join
from tuoling.train.resume import Start, check_probe, optimizer_state, source_of
from tuoling.train.rows import Rows, store_notes
from tuoling.train.run_folder import RunFolder, claim, folder_of, manifest, reserved
from tuoling.train.run_lock import locked
from tuoling.train.saving import Saves
from tuoling.train.steps import Steps, rows_come
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
    start: Start | None = None,
) -> RunResult:
    """Train as `config` says and leave a run folder. Everything checkable is checked before the first step.

    start: where the run goes on that this is, or whose schedule it follows.
    Raises TuolingError; a run folder that was begun then says `"status": "failed"` and why.
    """
    start = start or Start()
    first = environment.place().rank == 0
    with console.silent(not first):
        with reserved(config, notes, wanted=first and start.run is None) as config:
            setup = prepare(  # rows are tokenised before the processes meet
                config, say=say, notes=notes, laid_for=start.laid_for, offset=start.offset
            )
            start.verify(setup, say)
            if not config.ignore_memory_plan:
                setup.plan.require_memory()
            if first:
                setup.plan.require_disk(Path(str(config.output_dir)), config.disk_reserve_mib)
        return train_prepared(setup, say=say, show_plan=show_plan, start=start)


def train_prepared(
    setup: Setup,
    *,
    say: Callable[[str], None],
    show_plan: Callable[[Setup], None] | None = None,
    start: Start | None = None,
) -> RunResult:
    """Train what `prepare` found, with the other processes where a launcher started several."""
    start = start or Start()
    with join(setup.device, setup.config.timeout_s) as ranks:
        if not ranks.first:
            say, show_plan = _say_nothing, None
        ranks.require_same(setup.fingerprint(), tr("config or rows", "配置或数据"))
        folder = ranks.decide(lambda: start.run or begin(setup, say))
        if show_plan:
            show_plan(setup)
        with locked(folder, wanted=ranks.first):
            record = start.record_of(
                setup, lambda: manifest(setup, environment.versions(), environment.machine())
            )
            run = RunFolder(folder, record, writes=ranks.first)
            start.open(run, say)
            return _train_in(run, setup, ranks, start, say)


def _train_in(
    run: RunFolder, setup: Setup, ranks: Ranks, start: Start, say: Callable[[str], None]
) -> RunResult:
    """All of a run that writes into its folder."""
    try:
        parts = assemble(setup, run, run.record, say, ranks, start)
        run.set_status("running", kernels=parts.fast.facts())
        if start.checkpoint:
            check_probe(start, probe(parts, setup, start.position["probe"]["rows"])["loss"], setup, say)
        with Interrupt() as interrupt:
            done = fit(setup, run, parts, interrupt, start)
            parts.fast.uninstall()
            if setup.streamed is not None and not setup.plan.rows_known:
                for line in store_notes(setup.report):
                    say(line)
            whole = is_whole(done, setup)
            status = "finished" if whole else "interrupted"
            results = _finish(run, setup, parts, done, status, say)
            parts.engine.finish()
    except BaseException as error:
        run.fail(error)
        raise
    return RunResult(run.path, status, results)


def begin(setup: Setup, say: Callable[[str], None]) -> Path:
    """Make the run folder; say what became of an old one."""
    config = setup.config
    folder = folder_of(config)
    setup.plan.require_disk(folder, config.disk_reserve_mib)
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
    start: Start | None = None,
) -> Parts:
    """Load the model, make its trained weights trainable, put the fast step on it, make the optimizer.

    start: whose weights and state are put back.
    """
    config, start = setup.config, start or Start()
    source, position = source_of(setup, start.checkpoint), start.position
    engine = make_engine(
        config,
        ranks or Ranks(),
        device=setup.device,
        dtype=setup.dtype,
        hidden=setup.hidden,
        folder=run.path,
        manifest=record,
        trackers=position.get("trackers"),
    )
    if config.deterministic:
        environment.only_deterministic_kernels()
    torch.manual_seed(config.seed)
    with engine.loading():
        model = load_model(
            source,
            dtype="fp32" if config.finetuning_type == "full" else setup.dtype,
            device=engine.loads_on or setup.device,
            for_training=True,
            allow_remote_code=config.allow_remote_code,
            quantization=quantization_of(config),
        )
        model = make_trainable(model, setup, new=not source.is_adapter)
    fast, optimizer = engine.build(model, lambda: make_optimizer(model, config), say)
    fast.extras = Extras(config.label_smoothing_factor, config.z_loss)
    if state := start.checkpoint or start.optimizer:
        engine.load_optimizer(model, optimizer, optimizer_state(state, model))
        engine.load_scaler(position.get("scaler"))
    if not engine.ranks.first:  # so that ranks drop different activations
        torch.manual_seed(config.seed + engine.ranks.rank)
    share_head = config.share_head and can_share_head(fast, setup.device, say)
    return Parts(engine, model, fast, optimizer, WeightSaver(model, setup), share_head)


def fit(
    setup: Setup, run: RunFolder, parts: Parts, interrupt: Interrupt, start: Start | None = None
) -> Progress:
    """Step until the plan is done or the user interrupts; evaluate, log and save on the way.

    Raises KeyboardInterrupt where nothing has been trained yet that could be saved.
    """
    config, plan, start = setup.config, setup.plan, start or Start()
    done, ranks = start.progress(), parts.engine.ranks
    began_at = done.step
    steps = setup.steps(ranks.world_size)

    def stop() -> bool:
        return ranks.any(interrupt.asked)

    parts.model.train()
    if setup.watched and done.watch_loss_before is None:
        done.watch_loss_before = watch(parts, setup, setup.watched)
    if start.checkpoint:
        load_random_state(start.checkpoint, ranks.rank)
    with (
        run.metrics() as metrics,
        console.progress() as bar,
        Saves(run, setup, parts.engine, parts.model, parts.saver) as saves,
    ):
        task = bar.add_task(tr("training", "训练中"), total=plan.total_steps, completed=done.step, detail="")
        if done.eval_due is not None:
            row = evaluated(parts, setup, done, done.eval_due, stop)
            files.append_jsonl(metrics, row)
            log_evaluation(run, row)
            note_evaluation(done, config, row)
            improved(done, config, row)
        while done.step < plan.total_steps and not done.stopped_early and not stop():
            if setup.streamed is not None and not rows_come(steps, done.step, ranks, stop):
                break
            began = time.perf_counter()
            rate = plan.learning_rate(done.step, config)
            set_learning_rate(parts.optimizer, rate)
            batches = batches_of_step(setup.train, steps, done.step, ranks.rank, share_head=parts.share_head)
            step = train_step(parts.fast, parts.optimizer, parts.engine, batches, config.max_grad_norm)
            row = note_step(done, setup, step, rate, time.perf_counter() - began)
            if not step_is_finite(parts.engine, step.loss, step.grad_norm):
                rows = ranks.gather([row for batch in batches for row in batch.rows])
                raise not_finite(run, setup, [each for share in rows for each in share], row)
            note_forecast(run, done, plan)
            shown = f"loss {step.loss:.4f} · {row['tokens_per_s']:,.0f} tokens/s"
            bar.update(task, completed=done.step, detail=shown)
            last = done.step == plan.total_steps
            if setup.held_out and (last or done.step % plan.eval_steps == 0):
                row = evaluated(parts, setup, done, row, stop)
            files.append_jsonl(metrics, row)
            log_step(run, parts.engine.accelerator, row, config.logging_steps, last)
            note_evaluation(done, config, row)
            if improved(done, config, row) or (done.step % plan.save_steps == 0 and not last):
                saves.save(done, parts.optimizer, probe(parts, setup, last_rows(steps, done.step)))
            saves.poll()
        whole = is_whole(done, setup)
        if setup.watched and whole:
            done.watch_loss_after = watch(parts, setup, setup.watched)
        if not whole and done.step not in (began_at, saves.last_step):
            saves.save(done, parts.optimizer, probe(parts, setup, last_rows(steps, done.step)))
    done.stall_s += saves.stall_s
    if done.step == setup.offset.step:
        raise KeyboardInterrupt
    return done


def is_whole(done: Progress, setup: Setup) -> bool:
    """Whether nothing of the run is left to do."""
    return (done.step == setup.plan.total_steps or done.stopped_early) and done.eval_due is None


def watch(parts: Parts, setup: Setup, rows: Rows) -> float:
    """The loss of rows that are not trained, said."""
    loss = evaluate_loss(parts, setup, rows)
    assert loss is not None
    console.note(tr(f"watched rows: loss {loss:.4f}", f"监测数据：损失 {loss:.4f}"))
    return loss


def evaluated(
    parts: Parts, setup: Setup, done: Progress, row: dict[str, Any], stop: Callable[[], bool]
) -> dict[str, Any]:
    """The step's row with the held-out loss in it; as it was, and noted as due, where `stop` came first."""
    assert setup.held_out is not None
    loss = evaluate_loss(parts, setup, setup.held_out, stop)
    done.eval_due = row if loss is None else None
    if loss is None:
        return row
    done.eval_loss = loss
    return {**row, "eval_loss": loss}


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


def _say_nothing(message: str) -> None:
    """What the ranks that do not print say."""
