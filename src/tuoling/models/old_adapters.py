"""Adapters as PEFT 0.2 and the Trainers of 2023 left them, made into what PEFT writes today."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tuoling.errors import ModelError
from tuoling.language import tr

PREFIX = "base_model.model."
_KIND = re.compile(r"\.(lora_A\.weight|lora_embedding_A)$")
_LEFT_OUT = ("enable_lora", "merge_weights")
"""Keys of adapter_config.json that PEFT no longer knows and that say nothing once the tensors are expanded."""


def todays_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors under the names that PEFT writes: no adapter name in them, no wrapper before them."""
    renamed = {}
    for name, tensor in tensors.items():
        new = name.removeprefix("module.")
        new = re.sub(r"\.(lora_[A-Za-z_]+|trainable_tokens_delta)\.default(?=\.|$)", r".\1", new)
        new = new.replace(".modules_to_save.default.", ".")
        new = re.sub(r"\.lora_magnitude_vector\.weight$", ".lora_magnitude_vector", new)
        renamed[new if new.startswith(PREFIX) else PREFIX + new] = tensor
    return renamed


def is_grouped(tensors: Mapping[str, torch.Tensor]) -> bool:
    """True for the layout of PEFT 0.2 with `enable_lora`: lora_A a matrix, lora_B a convolution over groups."""
    return any(
        tensor.ndim == 3 and tensors[_partner(name)].ndim == 2
        for name, tensor in tensors.items()
        if name.endswith(".lora_B.weight") and _partner(name) in tensors
    )


def _partner(lora_b: str) -> str:
    return lora_b.removesuffix(".lora_B.weight") + ".lora_A.weight"


def expand_grouped(
    tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], where: str
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """PEFT 0.2's grouped LoRA as plain LoRA with the very same outputs: (tensors, config).

    There, n of the N equal parts of a fused layer's output had an adapter each (`enable_lora`, by default the first
    and the last of three). lora_A [n·r, in] feeds all of them; lora_B [out·n/N, r, 1] is a convolution one position
    wide in which group g sees only its own r rows of lora_A. Here lora_B becomes [out, n·r]: a block for each group
    and zeros elsewhere. The rank grows n times, and alpha with it, so that alpha/r stays what it was.
    """
    enabled = [bool(value) for value in config.get("enable_lora") or (True, False, True)]
    parts = sum(enabled)
    expanded = dict(tensors)
    for name, lora_b in tensors.items():
        if not name.endswith(".lora_B.weight"):
            continue
        rank_all = tensors[_partner(name)].shape[0] if _partner(name) in tensors else 0
        if lora_b.ndim != 3 or lora_b.shape[2] != 1 or not _divides(rank_all, lora_b, parts):
            raise ModelError(
                tr(
                    f"{name} {list(lora_b.shape)} beside lora_A with {rank_all} rows is no grouped LoRA of "
                    f"enable_lora={enabled}",
                    f"{name} {list(lora_b.shape)} 与 {rank_all} 行的 lora_A 不符合 enable_lora={enabled} 的分组 LoRA",
                ),
                where=where,
            )
        expanded[name] = _block_diagonal(lora_b[:, :, 0], rank_all, enabled)
    if config["r"] * parts != _ranks(expanded).most_common(1)[0][0]:
        raise ModelError(
            tr(
                f"adapter_config.json says r={config['r']} for {parts} groups, and lora_A has "
                f"{_ranks(expanded).most_common(1)[0][0]} rows",
                f"adapter_config.json 写的是 {parts} 组、r={config['r']}，而 lora_A 有 "
                f"{_ranks(expanded).most_common(1)[0][0]} 行",
            ),
            where=where,
        )
    plain = {key: value for key, value in config.items() if key not in _LEFT_OUT}
    plain |= {"r": config["r"] * parts, "lora_alpha": config["lora_alpha"] * parts, "fan_in_fan_out": False}
    return expanded, plain


def _divides(rank_all: int, lora_b: torch.Tensor, parts: int) -> bool:
    out_enabled, rank_group = lora_b.shape[0], lora_b.shape[1]
    if not (parts and rank_group and rank_all) or rank_all % rank_group or out_enabled % parts:
        return False
    return out_enabled % (rank_all // rank_group) == 0


def _block_diagonal(b_OR: torch.Tensor, rank_all: int, enabled: Sequence[bool]) -> torch.Tensor:
    """[enabled outputs, r] → [all outputs, all ranks]."""
    out_enabled, rank = b_OR.shape
    groups = rank_all // rank
    blocks = torch.block_diag(*b_OR.reshape(groups, out_enabled // groups, rank))
    full = b_OR.new_zeros(out_enabled // sum(enabled) * len(enabled), rank_all)
    full.view(len(enabled), -1, rank_all)[torch.tensor(enabled)] = blocks.view(sum(enabled), -1, rank_all)
    return full


def _ranks(tensors: Mapping[str, torch.Tensor]) -> Counter[int]:
    """How often each rank occurs."""
    return Counter(tensor.shape[0] for name, tensor in tensors.items() if _KIND.search(name))


def infer_config(tensors: Mapping[str, torch.Tensor], lora_alpha: float | None, where: str) -> dict[str, Any]:
    """adapter_config.json of a checkpoint that has none: rank and targets from the tensors, alpha as given.

    Raises ModelError without an alpha: nothing in the tensors tells it, and a wrong one changes every answer.
    """
    ranks = {
        _KIND.sub("", name).removeprefix(PREFIX): tensor.shape[0]
        for name, tensor in tensors.items()
        if _KIND.search(name)
    }
    if not ranks:
        raise ModelError(tr("no LoRA tensor in it", "里面没有 LoRA 张量"), where=where)
    rank = _ranks(tensors).most_common(1)[0][0]
    grouped = is_grouped(tensors)
    if lora_alpha is None:
        raise ModelError(
            tr(
                f"no adapter_config.json here: r={rank // 2 if grouped else rank} and the targets follow from the "
                "tensors, lora_alpha does not",
                f"这里没有 adapter_config.json：r={rank // 2 if grouped else rank} 和目标层可由张量得出，"
                "lora_alpha 则不能",
            ),
            where=where,
            remedy=tr(
                "give the one it was trained with: --lora-alpha 16 (train: lora_alpha=16)\n"
                "alpaca-lora, Chinese-Vicuna and BELLE of April 2023 used 16, BELLE's later recipe 32",
                "请给出训练时的值：--lora-alpha 16（train 中写 lora_alpha=16）\n"
                "alpaca-lora、Chinese-Vicuna 和 BELLE 2023 年 4 月用 16，BELLE 之后的配方用 32",
            ),
        )
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "bias": "none",
        "lora_dropout": 0.0,
        "r": rank // 2 if grouped else rank,
        "lora_alpha": _plain_number(lora_alpha),
        "target_modules": _targets(list(ranks)),
        "rank_pattern": {module: other for module, other in ranks.items() if other != rank},
        **({"enable_lora": [True, False, True]} if grouped else {}),
    }


def _plain_number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def _targets(modules: Sequence[str]) -> list[str]:
    """Last names where each stands in the same place of every layer from 0 on, else full names."""
    places: dict[str, set[str]] = {}
    layers: dict[str, set[int]] = {}
    for module in modules:
        last = module.rsplit(".", 1)[-1]
        numbers = re.findall(r"\.(\d+)\.", f".{module}.")
        places.setdefault(last, set()).add(re.sub(r"(?<=\.)\d+(?=\.)", "*", f".{module}."))
        layers.setdefault(last, set()).update(int(number) for number in numbers[:1])
    every = set().union(*layers.values())
    regular = every == set(range(len(every))) and all(
        len(places[last]) == 1 and layers[last] == every for last in places
    )
    return sorted(places) if regular else sorted(modules)
