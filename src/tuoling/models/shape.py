"""Sizes and module names from a model's shape alone: nothing is loaded, nothing is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from tuoling.errors import ModelError
from tuoling.families import own_code_refused
from tuoling.language import tr


@dataclass(frozen=True, slots=True)
class Shape:
    """parameters: tied ones once. layers, hidden: of the blocks."""

    parameters: int
    layers: int
    hidden: int


def meta_model(folder: Path, *, allow_remote_code: bool = False) -> Any:
    """The model of `folder`'s config.json on the meta device (shapes without memory).

    Raises ModelError where transformers has no causal language model for it.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=allow_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=allow_remote_code)
    except (ValueError, KeyError, OSError) as error:
        if "trust_remote_code" in str(error):
            raise own_code_refused(folder) from error
        raise ModelError(
            tr(
                "transformers cannot build a causal language model from it",
                "transformers 无法据此构建因果语言模型",
            ),
            where=f"{folder}/config.json",
            remedy=str(error).splitlines()[0],
        ) from error


def shape_of(model: Any) -> Shape:
    """Count a model's parameters and read its width and depth from its config."""
    config = model.config.get_text_config()
    return Shape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
    )


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """[outputs, inputs] of every linear layer, the head too."""
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def linear_weights(model: Any) -> int:
    """Weights of the linear layers that 8 or 4 bits would shrink: all but the head's and the embeddings'."""
    outside = {id(model.get_output_embeddings()), id(model.get_input_embeddings())}
    return sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module) not in outside
    )


def lora_parameters(model: nn.Module, targets: Sequence[str], rank: int) -> int:
    """Parameters LoRA of `rank` adds on `targets`: rank x (inputs + outputs) a module."""
    total = 0
    for name, module in model.named_modules():
        linear = isinstance(module, nn.Linear | Conv1D)
        if linear and any(name == target or name.endswith(f".{target}") for target in targets):
            total += rank * sum(module.weight.shape)
    return total
