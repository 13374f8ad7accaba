"""Running the steps of a run again, without writing anything: equal, or where it parts and why."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuoling import console, files
from tuoling.config_keys import RunConfig
from tuoling.errors import TrainingError
from tuoling.language import tr
from tuoling.train.checkpoint import load_random_state, pick_checkpoint
from tuoling.train.loop import Parts, assemble, batches_of_step, train_step
from tuoling.train.optim import set_learning_rate
from tuoling.train.prepare import Setup, prepare
from tuoling.train.resume import Start, changes, differences, read_run, start_of
from tuoling.train.run_folder import RunFolder

if TYPE_CHECKING:
    from collections.abc import Sequence

COMPARED = ("loss", "grad_norm", "learning_rate", "tokens", "learned_tokens")


@dataclass(frozen=True, slots=True)
class Replay:
    """What came of it. steps: replayed, from `first` on; those of them that were logged are compared.

    parted: the first step that is another one: (step, name of the number, logged, replayed); None where all are equal.
    weights: whether those of the checkpoint at the end, where there is one, are equal too.
    why: what is not as run.json says, the likely causes; empty where all of it is the same.
    """

    first: int
    steps: int
    parted: tuple[int, str, float, float] | None
    weights: bool | None
    why: tuple[str, ...]

    @property
    def equal(self) -> bool:
        return self.parted is None and self.weights is not False


def replay(
    run: Path, *, steps: int, named: str | None = None, say: Callable[[str], None] = console.note
) -> Replay:
    """Run `steps` steps of a run again, from its beginning or from a checkpoint, and compare them with what was logged.

    Raises TrainingError for a folder that is no run, or one that logged none of these steps.
    """
    record = read_run(run)
    checkpoint = pick_checkpoint(run, named=named) if named else None
    start = start_of(run, record, checkpoint)
    logged = {row["step"]: row for _, row in files.read_jsonl(run / "metrics.jsonl")}
    first = start.progress().step
    wanted = [step for step in range(first + 1, first + steps + 1) if step in logged]
    if not wanted:
        raise TrainingError(
            tr(f"no step after {first} is logged", f"第 {first} 步之后没有记录"),
            where=str(run / "metrics.jsonl"),
        )
    config = RunConfig.model_validate(
        {**record["config"], "output_dir": str(run), "report_to": (), "plot_loss": False}
    )
    setup = prepare(config, say=lambda _: None, laid_for=start.laid_for, offset=start.offset)
    parts = assemble(setup, RunFolder(run, record, writes=False), record, say, start=start)
    if start.checkpoint:
        load_random_state(start.checkpoint)
    parted = _steps(setup, parts, start, logged, wanted)
    last = wanted[-1] if parted is None else parted[0]
    weights = _same_weights(parts, run / f"checkpoint-{last}") if parted is None else None
    why = [f"{name}: {what}" for name, what in changes(record, setup)]
    return Replay(first + 1, last - first, parted, weights, (*why, *differences(record, setup, parts.fast)))


def _steps(
    setup: Setup, parts: Parts, start: Start, logged: Mapping[int, Mapping[str, Any]], wanted: Sequence[int]
) -> tuple[int, str, float, float] | None:
    """Take the steps up to the last wanted one. Returns the first difference."""
    steps = setup.steps(1)
    parts.model.train()
    with console.progress() as bar:
        task = bar.add_task(tr("replaying", "重放中"), total=len(wanted), detail="")
        for step in range(start.progress().step, wanted[-1]):
            rate = setup.plan.learning_rate(step, setup.config)
            set_learning_rate(parts.optimizer, rate)
            batches = batches_of_step(setup.train, steps, step, share_head=parts.share_head)
            found = train_step(parts.fast, parts.optimizer, parts.engine, batches, setup.config.max_grad_norm)
            bar.update(task, advance=1, detail=f"loss {found.loss:.4f}")
            row = {
                "loss": found.loss,
                "grad_norm": found.grad_norm,
                "learning_rate": rate,
                "tokens": found.counts.tokens,
                "learned_tokens": found.counts.learned,
            }
            for name in COMPARED if step + 1 in logged else ():
                if logged[step + 1][name] != row[name]:
                    return step + 1, name, logged[step + 1][name], row[name]
    return None


def _same_weights(parts: Parts, checkpoint: Path) -> bool | None:
    """Whether the weights now are the bytes of a checkpoint; None where there is none of this step."""
    if not (checkpoint / files.MANIFEST).is_file():
        return None
    then = files.read_json(checkpoint / files.MANIFEST)
    with tempfile.TemporaryDirectory(prefix="tuoling-") as folder:
        parts.saver.save(Path(folder))
        made = {path.name: files.sha256_file(path) for path in Path(folder).glob("*.safetensors")}
    return all(then.get(name, {}).get("sha256") == value for name, value in made.items())
