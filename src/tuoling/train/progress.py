"""What a run has done so far, and what is noted of each step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from tuoling import console, environment, files
from tuoling.errors import TrainingError
from tuoling.language import tr

if TYPE_CHECKING:
    from accelerate import Accelerator

    from tuoling.config import RunConfig
    from tuoling.train.parallel import StepResult
    from tuoling.train.plan import Plan
    from tuoling.train.prepare import Setup
    from tuoling.train.run_folder import RunFolder


FORECAST_STEPS = 20


@dataclass
class Progress:
    """What the loop has done so far."""

    step: int = 0
    rows_seen: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    timed_tokens: int = 0
    seconds: float = 0.0
    first_loss: float | None = None
    last_loss: float | None = None
    eval_loss: float | None = None
    best: dict[str, Any] | None = None
    lowest_eval_loss: float | None = None
    evaluations_since_lowest: int = 0
    stopped_early: bool = False
    """early_stopping_patience is used up: no step comes after this one."""
    watch_loss_before: float | None = None
    watch_loss_after: float | None = None
    """Of the rows of watch_data, with the weights before the first step and after the last."""
    eval_due: dict[str, Any] | None = None
    """The step's row, where its evaluation was broken off by Ctrl-C: a run that goes on makes it first."""
    stall_s: float = 0.0
    """How long training stood still for its checkpoints."""
    peaks_gib: list[float] = field(default_factory=list)
    """Of every rank, at the end."""


def note_step(done: Progress, setup: Setup, step: StepResult, rate: float, took: float) -> dict[str, Any]:
    """Count a step. Returns its row of metrics.jsonl."""
    loss, tokens, learned = step.loss, step.counts.tokens, step.counts.learned
    if done.step > setup.plan.first_step:  # the first step pays for warm-up: allocators, kernels, caches
        done.seconds += took
        done.timed_tokens += tokens
    done.step += 1
    done.rows_seen += step.counts.rows
    done.tokens += tokens
    done.learned_tokens += learned
    done.first_loss = loss if done.first_loss is None else done.first_loss
    done.last_loss = loss
    return {
        "step": done.step,
        "epoch": setup.epochs(done.rows_seen),
        "loss": loss,
        "learning_rate": rate,
        "grad_norm": step.grad_norm,
        "tokens": tokens,
        "learned_tokens": learned,
        "seconds": round(took, 4),
        "tokens_per_s": round(tokens / took, 1),
        "peak_rss_gib": round(environment.peak_rss_gib(), 3),
    }


def note_forecast(run: RunFolder, done: Progress, plan: Plan) -> None:
    """After the first steps: write into run.json how long all of them will take, and say it."""
    found = forecast(done, plan)
    if found is None:
        return
    run.set_status("running", forecast=found)
    time, step = console.seconds_words(found["seconds"]), found["at_step"]
    if not console.err.is_terminal:  # the bar says it there
        console.note(
            tr(
                f"step {step}  the whole run will take about {time}, by the last {found['timed_steps']} steps",
                f"步 {step}  按最近 {found['timed_steps']} 步推算，整个训练约需 {time}",
            )
        )


def forecast(done: Progress, plan: Plan) -> dict[str, Any] | None:
    """The seconds all steps will take, made once: after a tenth of them, FORECAST_STEPS at most, the first apart.

    In the measure of all_results.json: without the first step, evaluations and checkpoints. None at any other step, and
    in runs too short for one.
    """
    steps = plan.total_steps - plan.first_step
    timed = min(FORECAST_STEPS, steps // 10)
    if timed == 0 or done.step - plan.first_step != 1 + timed:
        return None
    return {
        "at_step": done.step,
        "timed_steps": timed,
        "seconds": round((steps - 1) * done.seconds / timed, 3),
        "tokens_per_s": round(done.timed_tokens / done.seconds, 1),
    }


def log_step(run: RunFolder, accelerator: Accelerator, row: dict[str, Any], every: int, last: bool) -> None:
    """Add the step to trainer_state's history and the trackers; print a line where no bar can be drawn."""
    step, epoch = row["step"], row["epoch"]
    due = step == 1 or step % every == 0 or last
    if due:
        shown = ("loss", "learning_rate", "grad_norm")
        run.log_history.append({"epoch": epoch, **{key: row[key] for key in shown}, "step": step})
        if not console.err.is_terminal:
            console.note(
                tr("step", "步") + f" {step}  loss {row['loss']:.4f}  lr {row['learning_rate']:.2e}"
                f"  {row['tokens_per_s']:,.0f} tokens/s"
            )
    log_evaluation(run, row)
    if accelerator.log_with:
        accelerator.log({key: row[key] for key in row if key not in ("step", "seconds")}, step=step)


def log_evaluation(run: RunFolder, row: dict[str, Any]) -> None:
    """Add the held-out loss of a step to trainer_state's history, and say it."""
    if "eval_loss" not in row:
        return
    step = row["step"]
    run.log_history.append({"epoch": row["epoch"], "eval_loss": row["eval_loss"], "step": step})
    console.note(tr("step", "步") + f" {step}  eval loss {row['eval_loss']:.4f}")


def note_evaluation(done: Progress, config: RunConfig, row: dict[str, Any]) -> None:
    """Count evaluations without a new lowest held-out loss, where the run is to stop early by them."""
    if config.early_stopping_patience is None or "eval_loss" not in row:
        return
    loss, lowest = row["eval_loss"], done.lowest_eval_loss
    if lowest is None or loss < lowest:
        done.lowest_eval_loss, done.evaluations_since_lowest = loss, 0
        return
    done.evaluations_since_lowest += 1
    done.stopped_early = done.evaluations_since_lowest >= config.early_stopping_patience
    if done.stopped_early:
        count, step = done.evaluations_since_lowest, row["step"]
        console.note(
            tr(
                f"step {step}: {count} evaluations without a lower held-out loss than {lowest:.4f}: the run ends here",
                f"第 {step} 步：连续 {count} 次评估的验证损失都没有低于 {lowest:.4f}，训练到此结束",
            )
        )


def improved(done: Progress, config: RunConfig, row: dict[str, Any]) -> bool:
    """Note a new lowest held-out loss, if the best weights are wanted at the end."""
    if not config.load_best_model_at_end or "eval_loss" not in row:
        return False
    if done.best is not None and row["eval_loss"] >= done.best["eval_loss"]:
        return False
    done.best = {"eval_loss": row["eval_loss"], "step": done.step, "checkpoint": f"checkpoint-{done.step}"}
    return True


def trainer_state(run: RunFolder, setup: Setup, done: Progress) -> str:
    return run.trainer_state(
        step=done.step,
        total_steps=setup.plan.schedule_steps,
        epoch=setup.epochs(done.rows_seen),
        best=done.best,
    )


def results_of(done: Progress, setup: Setup) -> dict[str, Any]:
    cuda = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    return {
        "train_loss_first": done.first_loss,
        "train_loss_last": done.last_loss,
        "eval_loss": done.eval_loss,
        "best_eval_loss": done.best["eval_loss"] if done.best else None,
        "rows": len(setup.train),
        "tokens": done.tokens,
        "learned_tokens": done.learned_tokens,
        "steps": done.step,
        **({"stopped_early": True} if done.stopped_early else {}),
        **watched(done),
        "epochs": setup.epochs(done.rows_seen),
        "seconds": round(done.seconds, 3),
        "checkpoint_stall_s": round(done.stall_s, 3),
        "tokens_per_s": round(done.timed_tokens / done.seconds, 1) if done.seconds else None,
        "peak_rss_gib": round(environment.peak_rss_gib(), 3),
        "peak_cuda_gib": round(cuda, 3),
        **({"peak_rss_gib_of_ranks": done.peaks_gib} if len(done.peaks_gib) > 1 else {}),
    }


def watched(done: Progress) -> dict[str, float]:
    """The watched rows' loss before and after, and how much of it training added, as far as they were measured."""
    before, after = done.watch_loss_before, done.watch_loss_after
    found = {"watch_loss_before": before, "watch_loss_after": after}
    if before is not None and after is not None:
        found["watch_loss_change"] = after / before - 1
    return {name: value for name, value in found.items() if value is not None}


def not_finite(run: RunFolder, setup: Setup, rows: Sequence[int], row: dict[str, Any]) -> TrainingError:
    """Save the rows of the step whose loss or gradient is not a number, and say where they are."""
    path = run.path / "nonfinite_rows.json"
    places = [place for each in rows for place in setup.train.places(each)]
    found = {"loss": str(row["loss"]), "grad_norm": str(row["grad_norm"])}
    if run.writes:
        files.write_json(path, {"step": row["step"], **found, "rows": places})
    if math.isfinite(row["loss"]):
        what, was = tr("gradient", "梯度"), row["grad_norm"]
    else:
        what, was = tr("loss", "损失"), row["loss"]
    return TrainingError(
        tr(
            f"the {what} of step {row['step']} is {was}: the run stops before it spoils the weights",
            f"第 {row['step']} 步的{what}是 {was}：在权重被破坏之前停止训练",
        ),
        where=str(path),
        remedy=tr(
            "look at these rows; lower learning_rate, or set dtype=fp32",
            "检查这些数据；调小 learning_rate，或设 dtype=fp32",
        ),
    )
