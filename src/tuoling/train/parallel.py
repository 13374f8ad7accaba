"""The engine a run computes on: one process, or several that hold the same weights (DDP).

What is sharded stands beside this: train/fsdp.py and train/zero.py.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from tuoling import environment
from tuoling.data.pack import Batch, nothing_learned
from tuoling.errors import TrainingError
from tuoling.kernels.install import FastModel, install
from tuoling.language import tr
from tuoling.train.checkpoint import optimizer_tensors, put_optimizer
from tuoling.train.ranks import Ranks

if TYPE_CHECKING:
    from accelerate import Accelerator

    from tuoling.config import RunConfig

_PRECISION = {"bf16": "bf16", "fp16": "fp16", "fp32": "no"}

MakeOptimizer = Callable[[], torch.optim.Optimizer]


class Counts(NamedTuple):
    """Of a step, over all ranks."""

    learned: int
    tokens: int
    rows: int


class StepResult(NamedTuple):
    """loss: mean nats per learned token of all ranks. grad_norm: before clipping."""

    loss: float
    grad_norm: float
    counts: Counts


class Engine:
    """One process alone: the model as it is, on accelerate's device and in its precision."""

    equal_forwards = False
    """Whether the ranks must call the model equally often."""
    loads_on: str | None = None
    """Where the weights are read to, if not to the run's device."""

    def __init__(self, accelerator: Accelerator, ranks: Ranks) -> None:
        self.accelerator = accelerator
        self.ranks = ranks

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    @property
    def scales_loss(self) -> bool:
        """Whether a gradient that overflows is the scaler's to skip."""
        return self.accelerator.scaler is not None

    def loading(self) -> AbstractContextManager[Any]:
        """Weights are loaded inside."""
        return nullcontext()

    def build(
        self, model: Any, make_optimizer: MakeOptimizer, say: Callable[[str], None]
    ) -> tuple[FastModel, Any]:
        """The fast step on the model, what connects the ranks around it, and the optimizer."""
        fast = install(model, say=say)
        self._connect(fast)
        return fast, self.accelerator.prepare_optimizer(make_optimizer())

    def _connect(self, fast: FastModel) -> None:
        """Put what connects the ranks between the step and the model."""

    def share(self, batches: Sequence[Batch]) -> tuple[Sequence[Batch], Counts]:
        """This rank's batches of a step, and what the batches of all ranks hold together."""
        mine = Counts(
            sum(batch.num_learned for batch in batches),
            sum(batch.input_ids.numel() for batch in batches),
            sum(len(batch.rows) for batch in batches),
        )
        if self.ranks.world_size == 1:
            return batches, mine
        rows = self.ranks.table([*mine, len(batches)])
        total = Counts(*(int(sum(column)) for column in zip(*(row[:3] for row in rows), strict=True)))
        # every rank takes part in each sum of gradients, and where it gathers weights in each forward
        wanted = int(max(row[3] for row in rows)) if self.equal_forwards else 1
        return [*batches, *(nothing_learned() for _ in range(wanted - len(batches)))], total

    def forwards(self, wanted: int) -> int:
        """How often this rank calls the model, that has something for so many calls."""
        if self.ranks.world_size == 1 or not self.equal_forwards:
            return wanted
        return int(max(row[0] for row in self.ranks.table([wanted])))

    def autocast(self) -> AbstractContextManager[Any]:
        """The run's precision inside."""
        autocast: AbstractContextManager[Any] = self.accelerator.autocast()
        return autocast

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        """Around a micro-batch: gradients need not meet those of other ranks before the last one."""
        return nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of a part of the step's loss."""
        self.accelerator.backward(loss)

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float) -> float:
        """The norm of the whole gradient before it is clipped; max_norm 0: not clipped."""
        return float(self.accelerator.clip_grad_norm_(parameters, max_norm if max_norm > 0 else math.inf))

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Change the weights."""
        optimizer.step()

    def whole_weights(self, model: nn.Module) -> dict[str, Tensor] | None:
        """The trained weights in one piece, in the first rank; None where the model has them so. Asked in all ranks."""
        return None

    def optimizer_tensors(self, model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
        """The optimizer's state in one piece, by the parameters' names, in the first rank. Asked in all ranks."""
        return optimizer_tensors(model, optimizer.optimizer)

    def load_optimizer(self, model: nn.Module, optimizer: Any, saved: dict[str, Tensor]) -> None:
        """Put back what `optimizer_tensors` gave, in any number of ranks. Asked in all ranks."""
        put_optimizer(saved, model=model, optimizer=optimizer.optimizer)

    def scaler_state(self) -> dict[str, Any] | None:
        """Of the loss scaling of fp16; None in other precisions."""
        scaler = self.accelerator.scaler
        return None if scaler is None else dict(scaler.state_dict())

    def load_scaler(self, saved: dict[str, Any] | None) -> None:
        """Put back what `scaler_state` gave."""
        if saved and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved)

    def tracker_state(self) -> dict[str, str]:
        """The trackers' own names of this run, so that they go on with it."""
        found = {}
        for tracker in self.accelerator.trackers:
            identity = getattr(getattr(tracker, "run", None), "id", None)
            if isinstance(identity, str):
                found[str(tracker.name)] = identity
        return found

    def finish(self) -> None:
        """Close the trackers."""
        for tracker in self.accelerator.trackers:  # end_training would end the process group too
            tracker.finish()


class DataParallel(Engine):
    """Every rank holds the whole model and computes other rows; gradients meet in the last backward of a step."""

    _model: nn.Module

    def _connect(self, fast: FastModel) -> None:
        cuda = self.device.type == "cuda"
        ignore_all_but_trained(fast.model)
        fast.model = self._model = nn.parallel.DistributedDataParallel(
            fast.model,
            device_ids=[self.device.index] if cuda else None,
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,
        )

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        if last:
            return nullcontext()
        waiting: AbstractContextManager[Any] = self._model.no_sync()  # type: ignore[operator]
        return waiting

    def backward(self, loss: Tensor, last: bool) -> None:
        # the mean over the ranks is taken, and the loss is divided already by what all of them learn
        self.accelerator.backward(loss * self.ranks.world_size)


def ignore_all_but_trained(model: nn.Module) -> None:
    """DDP sends the first rank's weights to the others: only the trained ones, the rest was read from one file."""
    kept: Iterable[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        model, [name for name, tensor in kept if not tensor.requires_grad]
    )


def make_engine(
    config: RunConfig,
    ranks: Ranks,
    *,
    device: str,
    dtype: str,
    hidden: int,
    folder: Path,
    manifest: dict[str, Any],
    trackers: dict[str, str] | None = None,
) -> Engine:
    """The engine the config names, if several processes were started (DDP where it names none). hidden: the model's size.

    trackers: `tracker_state` of a run that goes on.
    """
    zero = uses_zero(config) and ranks.world_size > 1
    precision = "no" if zero and dtype != "fp32" else _PRECISION[dtype]  # DeepSpeed has its own way to either
    reported = config.report_to if ranks.first else ()
    accelerator = _accelerator(device, precision, reported, folder, manifest, trackers or {})
    if ranks.world_size == 1:
        return Engine(accelerator, ranks)
    if zero:
        from tuoling.train.zero import Zero

        return Zero(accelerator, ranks, config, dtype=dtype, device=device, hidden=hidden)
    if config.parallel == "fsdp":
        from tuoling.train.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel(accelerator, ranks)
    return DataParallel(accelerator, ranks)


def uses_zero(config: RunConfig) -> bool:
    """Whether DeepSpeed is asked for."""
    return config.deepspeed is not None or (config.parallel or "").startswith("zero")


def require_engine(config: RunConfig, world_size: int, say: Callable[[str], None]) -> None:
    """Say what a single process does not use. Raises a TuolingError for what several ones will miss."""
    if world_size > 1 and uses_zero(config):
        from tuoling.train.zero import require_deepspeed, set_aside, zero_config

        found = zero_config(config)
        require_deepspeed()
        if names := set_aside(found):
            say(
                tr(
                    f"{config.deepspeed}: {', '.join(names)} are those of this run's own config",
                    f"{config.deepspeed}：{'、'.join(names)} 以本次训练自己的配置为准",
                )
            )
    elif world_size == 1 and (config.parallel not in (None, "ddp") or config.deepspeed):
        name = f"deepspeed={config.deepspeed}" if config.deepspeed else f"parallel={config.parallel}"
        say(
            tr(
                f"{name}: not used, there is one process (--nproc 2 starts two)",
                f"{name}：未使用，只有一个进程（--nproc 2 启动两个）",
            )
        )


def whole_weights(model: nn.Module, whole: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The trained weights by their names (of a whole model: its buffers too). whole: puts the parts of one together."""
    adapter = any(not parameter.requires_grad for parameter in model.parameters())
    seen: dict[int, Tensor] = {}
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if adapter and not tensor.requires_grad:
            continue
        if id(tensor) not in seen:  # tied weights are one
            seen[id(tensor)] = whole(tensor).detach()
        found[name] = seen[id(tensor)]
    return found


def require_packing(fast: FastModel, kind: str) -> None:
    """Raise TrainingError where documents run one by one: ranks that gather weights must call the model equally often."""
    if not fast.packed:
        raise TrainingError(
            tr(
                f"parallel={kind} needs packed rows, and this model cannot be packed: {'; '.join(fast.reasons)}",
                f"parallel={kind} 需要打包，而该模型不能打包：{'；'.join(fast.reasons)}",
            ),
            remedy="parallel=ddp",
        )


def _accelerator(
    device: str,
    precision: str,
    trackers: Sequence[str],
    folder: Path,
    manifest: dict[str, Any],
    known: dict[str, str],
) -> Accelerator:
    """accelerate on `device`, autocast to `precision`, with the trackers the user asked for (none by default)."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    environment.use_card(device)
    # accelerate keeps its precision in a singleton; a second run in one process may ask for another.
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    accelerator = Accelerator(
        mixed_precision=precision,
        cpu=device == "cpu",
        log_with=list(trackers) or None,
        project_dir=str(folder) if trackers else None,
    )
    if trackers:
        accelerator.init_trackers(
            "tuoling",
            config={k: v for k, v in manifest.items() if isinstance(v, str | int | float)},
            init_kwargs={name: {"id": identity, "resume": "allow"} for name, identity in known.items()},
        )
    return accelerator


def require_trackers(trackers: Sequence[str]) -> None:
    """Raise TrainingError for a tracker whose package is not installed."""
    for name in trackers:
        if importlib.util.find_spec(name) is None:
            raise TrainingError(
                tr(f"the tracker {name} is not installed", f"没有安装记录工具 {name}"),
                where=f"report_to={name}",
                remedy=f"pip install {name}",
            )
