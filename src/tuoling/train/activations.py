"""What a forward pass keeps for the backward pass, counted on a model that has no memory.

The model's own code runs on fake tensors (shapes and dtypes, no storage) with our packed attention and fused
LoRA on it, and every storage that autograd saves is counted once: each family answers for itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tuoling.kernels.attention import Pack
from tuoling.kernels.forwards import replace_forward
from tuoling.kernels.head import Head, find_linear
from tuoling.kernels.install import PackedAttention
from tuoling.kernels.interface import active_pack
from tuoling.kernels.lora import lora_linear
from tuoling.models.adapters import lora_target_names

if TYPE_CHECKING:
    from tuoling.config import RunConfig

PLACE_BYTES = 8
"""Dropout of LoRA keeps the places it sets to zero, int64 each (drawing them needs numbers: not done here)."""
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def saved_bytes(model_config: Any, config: RunConfig, lengths: Sequence[int], dtype: str) -> int:
    """Bytes one forward over documents of these lengths leaves to its backward, head and loss left out.

    Copies that autocast makes of float32 weights are in it. With gradient checkpointing: the input of every
    block and the inside of one.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModelForCausalLM

    full = config.finetuning_type == "full"
    with FakeTensorMode(allow_non_fake_inputs=True):
        model: Any = AutoModelForCausalLM.from_config(
            model_config,
            dtype=torch.float32 if full else TORCH_DTYPES[dtype],
            trust_remote_code=config.allow_remote_code,
        )
        model.train()
        places = 0.0 if full else _add_lora(model, config) * sum(lengths) * PLACE_BYTES
        PackedAttention(model).replace()
        storages = _saved_storages(model, lengths, dtype)
    inside = sum(storages) + int(places)
    if not config.gradient_checkpointing:
        return inside
    text = model_config.get_text_config()
    width = 4 if dtype == "fp32" else 2
    return text.num_hidden_layers * sum(lengths) * text.hidden_size * width + inside // text.num_hidden_layers


def _add_lora(model: Any, config: RunConfig) -> float:
    """Stand-ins for PEFT's modules on a fake model. Returns dropped input elements per token."""
    model.requires_grad_(False)
    targets = lora_target_names(model, config.lora_target)
    dropped = 0.0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and any(name == t or name.endswith(f".{t}") for t in targets):
            outputs, inputs = module.weight.shape
            a_RI = nn.Parameter(torch.empty(config.lora_rank, inputs, dtype=torch.float32))
            b_OR = nn.Parameter(torch.empty(outputs, config.lora_rank, dtype=torch.float32))
            replace_forward(module, _lora_forward(a_RI, b_OR))
            dropped += inputs * config.lora_dropout
    return dropped


def _lora_forward(a_RI: Tensor, b_OR: Tensor) -> Any:
    def forward(module: nn.Linear, x: Tensor) -> Tensor:
        return lora_linear(x, module.weight, module.bias, a_RI, b_OR, scaling=1.0)

    return forward


def _saved_storages(model: Any, lengths: Sequence[int], dtype: str) -> list[int]:
    """Sizes of the storages saved by a forward, each once, the parameters' own left out."""
    linear = find_linear(model)
    head = None if linear is None else Head(linear)
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    pack = Pack(tuple(lengths), ends, readable=False)
    ids_1T = torch.zeros(1, sum(lengths), dtype=torch.long)
    own = [parameter.untyped_storage() for parameter in model.parameters()]
    known = {storage._cdata for storage in own}
    saved: dict[int, Any] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = storage  # kept alive: another one may not get its address
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", TORCH_DTYPES[dtype], enabled=dtype != "fp32"),
        active_pack(pack),
        _FlashAttention(),
    ):
        if head is None:
            model(input_ids=ids_1T, use_cache=False)
        else:
            with head.answering(lambda hidden: hidden.sum().view(1, 1, 1)):
                model(input_ids=ids_1T, use_cache=False)
    return [storage.nbytes() for storage in saved.values()]


class _FlashAttention(TorchFunctionMode):
    """SDPA saves what its flash kernels do: on fake tensors torch takes the plain matmuls, which keep L x L."""

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _SavedByFlash.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _SavedByFlash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BNLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor) -> Tensor:
        out = q_BNLD.new_empty(*q_BNLD.shape[:-1], v_BKLD.shape[-1])
        log_sum_BNL = q_BNLD.new_empty(q_BNLD.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q_BNLD, k_BKLD, v_BKLD, out, log_sum_BNL)
        return out
