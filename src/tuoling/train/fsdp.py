"""FSDP2: each rank holds a part of every weight, and has a block's weights whole only while it computes the block."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tuoling.errors import TrainingError
from tuoling.kernels.install import FastModel, install
from tuoling.language import tr
from tuoling.train.checkpoint import optimizer_tensors
from tuoling.train.parallel import Engine, MakeOptimizer, require_packing, whole_weights

if TYPE_CHECKING:
    from accelerate import Accelerator

    from tuoling.train.ranks import Ranks


class FullyShardedDataParallel(Engine):
    """torch's fully_shard over the model's blocks, embeddings and head together as the last part."""

    equal_forwards = True
    loads_on = "cpu"  # blocks go to the card one by one, as parts: whole, the model might not fit there

    def __init__(self, accelerator: Accelerator, ranks: Ranks) -> None:
        super().__init__(accelerator, ranks)
        if self.scales_loss:
            raise TrainingError(
                tr("fp16 is not trained with parallel=fsdp", "parallel=fsdp 不支持 fp16 训练"),
                where="dtype=fp16",
                remedy=tr(
                    "dtype=bf16, or dtype=fp32; parallel=zero3 has fp16",
                    "改用 dtype=bf16 或 fp32；parallel=zero3 支持 fp16",
                ),
            )

    def build(
        self, model: Any, make_optimizer: MakeOptimizer, say: Callable[[str], None]
    ) -> tuple[FastModel, Any]:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        # of the one number that comes out in place of the logits, which nobody changes in place
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        mesh = init_device_mesh(self.device.type, (self.ranks.world_size,))
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        for block in blocks_of(base):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        fast = install(model, say=say)
        require_packing(fast, "fsdp")
        self._cut(
            model
        )  # else the optimizer would be given whole weights of the last part, which come and go
        return fast, self.accelerator.prepare_optimizer(make_optimizer())

    def backward(self, loss: Tensor, last: bool) -> None:
        # the mean over the ranks is taken, and the loss is divided already by what all of them learn
        self.accelerator.backward(loss * self.ranks.world_size)

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float) -> float:
        norm: Any = nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else float("inf"))
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def whole_weights(self, model: nn.Module) -> dict[str, Tensor] | None:
        self._cut(model)
        return whole_weights(model, self._whole)

    def optimizer_tensors(self, model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
        self._cut(model)
        return optimizer_tensors(model, optimizer.optimizer, self._whole)

    def _whole(self, tensor: Tensor) -> Tensor:
        """A copy in one piece on the CPU, in the first rank; empty elsewhere. All ranks send their parts."""
        gathered: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()
        return gathered.cpu() if self.ranks.first else torch.empty(0)

    @staticmethod
    def _cut(model: nn.Module) -> None:
        """After a forward without gradients the last part may still be whole."""
        for module in model.modules():
            reshard: Any = getattr(module, "reshard", None)
            if reshard is not None:
                reshard()


def blocks_of(base: Any) -> Iterator[nn.Module]:
    """The model's blocks: by the class names its family says must not be split, else the members of its longest list."""
    names = set(getattr(base, "_no_split_modules", None) or ())
    found = [module for module in base.modules() if type(module).__name__ in names]
    if not found:
        lists = [module for module in base.modules() if isinstance(module, nn.ModuleList)]
        found = list(max(lists, key=len, default=[]))
    yield from found
