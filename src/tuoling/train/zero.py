"""DeepSpeed ZeRO: gradients and optimizer (stage 2), or the weights too (stage 3), cut into parts over the ranks."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tuoling import files
from tuoling.errors import ConfigError, MissingPackage
from tuoling.kernels.install import FastModel, install
from tuoling.language import tr
from tuoling.train.checkpoint import require_same_model
from tuoling.train.parallel import Engine, MakeOptimizer, require_packing, whole_weights

if TYPE_CHECKING:
    from collections.abc import Iterator

    from accelerate import Accelerator

    from tuoling.config import RunConfig
    from tuoling.train.ranks import Ranks

LLAMA_FACTORY_FILES = {
    "ds_z2_config.json": "zero2",
    "ds_z3_config.json": "zero3",
    "ds_z2_offload_config.json": "zero2_offload",
    "ds_z3_offload_config.json": "zero3_offload",
}
"""Files that come with LLaMA-Factory, by the name a config of it gives: ours of the same kind where they are missing."""

OURS_TO_SAY = (
    "optimizer",
    "scheduler",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "fp16",
    "bf16",
    "amp",
)
"""What a DeepSpeed file may say too, and the run's own config decides."""


def zero_config(config: RunConfig) -> dict[str, Any]:
    """The DeepSpeed config of `parallel`, or the file's that `deepspeed` names, as it stands there."""
    if config.deepspeed is None:
        return preset(str(config.parallel))
    path = Path(config.deepspeed)
    if not path.is_file() and path.name in LLAMA_FACTORY_FILES:
        return preset(LLAMA_FACTORY_FILES[path.name])
    if not path.is_file():
        raise ConfigError(
            tr("no such DeepSpeed config", "没有这个 DeepSpeed 配置文件"),
            where=f"deepspeed={path}",
            remedy="parallel=zero2 | zero3 | zero2_offload | zero3_offload",
        )
    found = files.read_json(path)
    stage = found.get("zero_optimization", {}).get("stage") if isinstance(found, dict) else None
    if stage not in (0, 1, 2, 3):
        raise ConfigError(
            tr(
                "no zero_optimization.stage in the DeepSpeed config",
                "DeepSpeed 配置中没有 zero_optimization.stage",
            ),
            where=str(path),
            remedy='{"zero_optimization": {"stage": 2}}',
        )
    return dict(found)


def preset(kind: str) -> dict[str, Any]:
    """zero2, zero3, zero2_offload or zero3_offload."""
    stage = 3 if kind.startswith("zero3") else 2
    zero: dict[str, Any] = {"stage": stage, "contiguous_gradients": True, "reduce_bucket_size": "auto"}
    if stage == 3:
        zero |= {"stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"}
    if kind.endswith("_offload"):
        zero["offload_optimizer"] = {"device": "cpu"}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    return {"zero_optimization": zero}


def filled(
    found: dict[str, Any], *, dtype: str, device: str, world_size: int, max_grad_norm: float, hidden: int
) -> dict[str, Any]:
    """A DeepSpeed config with every `auto` filled in and what the run decides put in.

    hidden: of the model. Buckets of hidden squared are what transformers fills in for `auto`; 500 million elements,
    DeepSpeed's own, would be 2 GB beside a tiny model.
    """
    zero = dict(found["zero_optimization"])
    autos = {
        "reduce_bucket_size": hidden * hidden,
        "allgather_bucket_size": hidden * hidden,
        "stage3_prefetch_bucket_size": int(0.9 * hidden * hidden),
        "stage3_param_persistence_threshold": 10 * hidden,
    }
    zero |= {key: value for key, value in autos.items() if zero.get(key) == "auto"}
    cuda = device.startswith("cuda")
    zero.setdefault("overlap_comm", cuda)
    if not cuda:
        zero["overlap_comm"] = False  # streams of a card, which a CPU has not
    for name in ("offload_optimizer", "offload_param"):
        if name in zero:
            zero[name] = {"pin_memory": cuda, **zero[name]}
    kept = {key: value for key, value in found.items() if key not in OURS_TO_SAY and value != "auto"}
    precision = {"bf16": {"bf16": {"enabled": True}}, "fp16": {"fp16": {"enabled": True}}}.get(dtype, {})
    return {
        "steps_per_print": 10**9,
        "zero_force_ds_cpu_optimizer": False,  # ours is torch's, whose fused AdamW runs where its weights are
        **kept,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # every micro-batch is another number of rows; the step divides its loss itself
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world_size,
        "gradient_clipping": max_grad_norm,
        **precision,
    }


def set_aside(found: dict[str, Any]) -> list[str]:
    """Keys of a DeepSpeed file that say something else than "auto", and are not obeyed."""
    said = []
    for key in OURS_TO_SAY:
        value = found.get(key, "auto")
        enabled = (
            value.get("enabled", "auto")
            if key in ("fp16", "bf16", "amp") and isinstance(value, dict)
            else value
        )
        if enabled not in ("auto", False):
            said.append(key)
    return said


def require_deepspeed() -> None:
    """Raise MissingPackage where DeepSpeed is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise MissingPackage(
            "deepspeed",
            extra="dist",
            purpose="ZeRO",
            otherwise=tr("or without it: parallel=fsdp", "或改用 parallel=fsdp，无需安装"),
        )


class Zero(Engine):
    """DeepSpeed's engine around the model and the optimizer."""

    def __init__(
        self,
        accelerator: Accelerator,
        ranks: Ranks,
        config: RunConfig,
        *,
        dtype: str,
        device: str,
        hidden: int,
    ) -> None:
        super().__init__(accelerator, ranks)
        self._config = filled(
            zero_config(config),
            dtype=dtype,
            device=device,
            world_size=ranks.world_size,
            max_grad_norm=config.max_grad_norm,
            hidden=hidden,
        )
        self.stage = int(self._config["zero_optimization"]["stage"])
        self.equal_forwards = self.stage == 3
        self.loads_on = "cpu" if self.stage == 3 else None  # zero.Init puts the parts where they belong
        self._half = dtype != "fp32"
        self._engine: Any = None
        self._init_distributed()

    @property
    def scales_loss(self) -> bool:
        return "fp16" in self._config

    def _init_distributed(self) -> None:
        import deepspeed
        from deepspeed.utils import logger

        logger.setLevel("ERROR")
        # before the weights are read: zero.Init, which transformers calls then, would see one process only
        deepspeed.init_distributed(
            dist_backend="nccl" if self.device.type == "cuda" else "gloo", verbose=False
        )

    @contextmanager
    def loading(self) -> Iterator[None]:
        """transformers cuts weights into parts as it reads them, while it finds such a config alive."""
        from transformers.integrations import HfDeepSpeedConfig

        self._seen_by_transformers = HfDeepSpeedConfig(self._config) if self.stage == 3 else None
        yield

    def autocast(self) -> AbstractContextManager[Any]:
        return (
            nullcontext() if self._half else super().autocast()
        )  # DeepSpeed holds the weights in that precision

    def build(
        self, model: Any, make_optimizer: MakeOptimizer, say: Callable[[str], None]
    ) -> tuple[FastModel, Any]:
        import deepspeed

        fast = (
            install(model, say=say) if self.stage < 3 else None
        )  # in parts the model answers as an engine only
        self._engine, optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=make_optimizer(), config=self._config
        )
        if fast is None:
            fast = install(model, say=say, called=self._engine)
            require_packing(fast, "zero3")
            if hasattr(model, "peft_config"):
                say(
                    tr(
                        "LoRA: PEFT's own path, because ZeRO-3 gathers a base layer's weights for that layer's own forward",
                        "LoRA：使用 PEFT 自己的实现，因为 ZeRO-3 只在基座层自己的前向中汇集它的权重",
                    )
                )
        fast.model = self._engine
        return fast, optimizer

    def backward(self, loss: Tensor, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        # the mean over the ranks is taken, and the loss is divided already by what all of them learn
        self._engine.backward(loss * self.ranks.world_size)

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float) -> float:
        """DeepSpeed clips within its step, and knows the norm only then: a gradient that is not finite is seen after."""
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return math.nan if norm is None else float(norm)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Done with `clip`."""

    def whole_weights(self, model: nn.Module) -> dict[str, Tensor] | None:
        return whole_weights(model, self._whole) if self.stage == 3 or self._half else None

    def _whole(self, tensor: Tensor) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        gathered = safe_get_full_fp32_param(tensor)
        if gathered is None:
            gathered = tensor.detach().clone()
        return gathered.cpu() if self.ranks.first else torch.empty(0)

    def load_optimizer(self, model: nn.Module, optimizer: Any, saved: dict[str, Tensor]) -> None:
        """As Engine.load_optimizer. Each rank keeps the part of each state that belongs to its part of the weights."""
        from deepspeed.utils import safe_set_full_optimizer_state

        require_same_model(saved, {name: _whole_shape(p) for name, p in _trained(model)})
        for flat in self._flat_parts():
            step = next((value for name, value in saved.items() if name.endswith(".step")), torch.zeros(()))
            states = {key: torch.zeros_like(flat) for key in _STATES}
            self._engine.optimizer.optimizer.state[flat] = {"step": step.clone(), **states}
        self._link_states()
        for name, parameter in _trained(model):
            for key in _STATES:
                value = saved.get(f"{name}.{key}")
                if value is not None:
                    safe_set_full_optimizer_state(parameter, value.to(self.device), key)

    def _flat_parts(self) -> list[nn.Parameter]:
        """What DeepSpeed gives the optimizer: this rank's part of the weights of each group, one after another."""
        inner = self._engine.optimizer
        parts = (
            inner.fp32_partitioned_groups_flat if self.stage == 3 else inner.single_partition_of_fp32_groups
        )
        return list(parts)

    def _link_states(self) -> None:
        """Let each parameter find its part of the states; DeepSpeed 0.19 does that once, after the first group's step."""
        inner = self._engine.optimizer
        if hasattr(inner, "_lazy_init_hp_params_optimizer_state"):
            inner._hp_optimizer_states_linked = False
            inner._lazy_init_hp_params_optimizer_state()

    def optimizer_tensors(self, model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link_states()
        steps = [
            state["step"] for state in self._engine.optimizer.optimizer.state.values() if "step" in state
        ]
        found: dict[str, Tensor] = {}
        for name, parameter in _trained(model):
            for key in _STATES:
                state = safe_get_full_optimizer_state(parameter, key)
                if state is not None and self.ranks.first:
                    found[f"{name}.{key}"] = state.detach().cpu().contiguous()
            if steps and self.ranks.first:
                found[f"{name}.step"] = torch.as_tensor(steps[0], dtype=torch.float32).detach().cpu().clone()
        return found


_STATES = ("exp_avg", "exp_avg_sq")


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Of a weight that may be in parts."""
    whole: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return whole
