"""Saving on the way: a copy of the state is taken between two steps and written while the next ones are computed."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tuoling import console, environment, files
from tuoling.errors import OutputError
from tuoling.language import tr
from tuoling.train.checkpoint import checkpoints, prune_checkpoints, random_state, save_checkpoint
from tuoling.train.parallel import whole_weights
from tuoling.train.plan import require_disk
from tuoling.train.progress import Progress, trainer_state

if TYPE_CHECKING:
    from tuoling.train.parallel import Engine
    from tuoling.train.prepare import Setup
    from tuoling.train.run_folder import RunFolder
    from tuoling.train.weights import WeightSaver

COPY_SHARE = 0.5
"""Of the free memory: a state that takes less is copied and written beside the training, a larger one at once."""


CHANGEABLE = (
    "disk_reserve_mib",
    "ignore_memory_plan",
    "logging_steps",
    "plot_loss",
    "report_to",
    "save_keep_every",
    "save_total_limit",
    "timeout_s",
)
"""Keys that a run which goes on may be given another value of: none of them changes what is learned."""


class Saves:
    """Writes the checkpoints of a run, one at a time, in the first rank. All ranks must call `save` together.

    stall_s: how long training stood still for them.
    """

    def __init__(self, run: RunFolder, setup: Setup, engine: Engine, model: Any, saver: WeightSaver) -> None:
        self._run, self._setup, self._engine, self._model, self._saver = run, setup, engine, model, saver
        self._writing: threading.Thread | None = None
        self._error: BaseException | None = None
        self._said = False
        self.stall_s = 0.0
        self.count = 0
        self.last_step = -1

    def save(self, done: Progress, optimizer: Any, probe: dict[str, Any]) -> None:
        """Take the state and begin to write it. Raises OutputError where the last one could not be written.

        probe: the loss of a batch with these weights, which a run that goes on must find again.
        """
        began = time.perf_counter()
        self.finish()
        engine = self._engine
        weights = engine.whole_weights(self._model)
        copied = weights is not None  # gathered from the ranks: nobody else's already
        states = engine.optimizer_tensors(self._model, optimizer)
        random = engine.ranks.gather(random_state())
        self.last_step = done.step
        if engine.ranks.first:
            behind = self._write_behind(weights, states)
            if behind:
                if not copied:
                    weights = whole_weights(self._model, _copy)
                states = {name: tensor if copied else _copy(tensor) for name, tensor in states.items()}
            position = {**self._position(done), "probe": probe}
            keys = {"optimizer": states, "random": random, "position": position}
            state = trainer_state(self._run, self._setup, done)
            best = done.best["checkpoint"] if done.best else None
            self._begin(behind, done.step, weights, {**keys, "trainer_state": state}, best)
        self.count += 1
        self.stall_s += time.perf_counter() - began

    def poll(self) -> None:
        """Raise what went wrong with the checkpoint that is being written, as soon as it is known."""
        if self._writing is not None and not self._writing.is_alive():
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written. Raises OutputError where it could not be."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def __enter__(self) -> Saves:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """The end of the steps. After an error the last checkpoint still becomes whole; after Ctrl-C nobody waits."""
        if kind is None:
            began = time.perf_counter()
            self.finish()
            self.stall_s += time.perf_counter() - began
        elif self._writing is not None and not issubclass(kind, KeyboardInterrupt):
            self._writing.join()

    def _begin(
        self,
        behind: bool,
        step: int,
        weights: dict[str, torch.Tensor] | None,
        keys: dict[str, Any],
        best: str | None,
    ) -> None:
        if not behind:
            self._write(step, weights, keys, best)
            return

        def write() -> None:
            try:
                self._write(step, weights, keys, best)
            except BaseException as error:
                self._error = error

        # a daemon: after a second Ctrl-C nobody waits for it
        self._writing = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._writing.start()

    def _write(
        self, step: int, weights: dict[str, torch.Tensor] | None, keys: dict[str, Any], best: str | None
    ) -> None:
        """One checkpoint, and then the end of those it replaces: they go only when it has been read back."""
        run, config = self._run.path, self._setup.config
        folder = run / f"checkpoint-{step}"
        needed = self._price()
        require_disk(run, needed, config.disk_reserve_mib, remedy=_remedy(run))
        try:
            save_checkpoint(folder, save_weights=lambda place: self._saver.save(place, weights), **keys)
        except OutputError as error:
            raise _told(error, needed, run) from error
        problems = files.manifest_problems(folder)
        if problems:
            raise OutputError(
                tr(
                    f"the disk gave back something else than was written: {'; '.join(problems)}",
                    f"磁盘读回的内容与写入的不同：{'；'.join(problems)}",
                ),
                where=str(folder),
                remedy=tr("the checkpoints before it are whole", "之前的检查点完好"),
            )
        prune_checkpoints(run, keep=config.save_total_limit, best=best, every=config.save_keep_every)

    def _price(self) -> int:
        """Bytes of the next checkpoint: those of the last one, before the first one what the plan says."""
        for checkpoint in reversed(checkpoints(self._run.path)):
            return sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
        return self._setup.plan.checkpoint_bytes

    def _write_behind(self, weights: dict[str, torch.Tensor] | None, states: dict[str, torch.Tensor]) -> bool:
        """Whether a copy of the state fits into memory beside the training; says so once where it does not."""
        if weights is not None:  # gathered: a copy already
            return True
        mine = sum(tensor.numel() * tensor.element_size() for tensor in states.values())
        mine += 4 * self._setup.plan.trainable
        fits = mine <= COPY_SHARE * environment.memory_available_bytes()
        if not fits and not self._said:
            self._said = True
            console.note(
                tr(
                    f"checkpoints are written between steps: a copy of {mine / 2**30:.1f} GiB does not fit into memory",
                    f"检查点在两步之间写入：内存放不下 {mine / 2**30:.1f} GiB 的副本",
                )
            )
        return fits

    def _position(self, done: Progress) -> dict[str, Any]:
        setup, plan = self._setup, self._setup.plan
        config = setup.config
        return {
            "step": done.step,
            "rows_seen": done.rows_seen,
            "next_row": setup.offset.row + done.rows_seen,
            "seed": config.seed,
            "config_sha256": config_sha256(config.model_dump(mode="json")),
            "processes": setup.world_size,
            "scheduler": {
                "type": config.lr_scheduler_type,
                "learning_rate": config.learning_rate,
                "warmup_steps": plan.warmup_steps,
                "total_steps": plan.schedule_steps,
                "last_learning_rate": plan.learning_rate(max(0, done.step - 1), config),
            },
            "scaler": self._engine.scaler_state(),
            "trackers": self._engine.tracker_state(),
            "progress": {name: value for name, value in asdict(done).items() if name != "peaks_gib"},
        }


def config_sha256(config: dict[str, Any]) -> str:
    """Of everything in a resolved config that decides what is learned."""
    kept = {
        key: config[key]
        for key in sorted(config)
        if key not in (*CHANGEABLE, "output_dir", "overwrite_output_dir")
    }
    return files.sha256_text(repr(kept))


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _remedy(run: Path) -> str:
    return tr(
        f"free the disk, then: tuoling resume {run}\nor let it take the reserve: tuoling resume {run} disk_reserve_mib=0",
        f"清理磁盘后：tuoling resume {run}\n或动用预留空间：tuoling resume {run} disk_reserve_mib=0",
    )


def _told(error: OutputError, needed: int, run: Path) -> OutputError:
    """A write that failed, with what is missing where the disk is full. Whatever was half-written is gone already."""
    if not (error.__cause__ is not None and files.disk_full(error.__cause__)):
        return error
    missing = needed - environment.disk_free_bytes(run)
    lack = (
        tr(f": {missing / 2**20:,.2f} MiB are missing", f"：还差 {missing / 2**20:,.2f} MiB")
        if missing > 0
        else ""
    )
    last = checkpoints(run)
    kept = tr(f"; {last[-1].name} is whole", f"；{last[-1].name} 完好") if last else ""
    return OutputError(f"{error.problem}{lack}{kept}", where=error.where, remedy=_remedy(run))
