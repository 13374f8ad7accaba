"""Adapters from disk, in any layout: tensors under today's names, memory-mapped, with the config they need."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tuoling.errors import DataError, ModelError
from tuoling.files import read_json
from tuoling.language import tr
from tuoling.models.adapter_files import (
    ADAPTER_WEIGHTS,
    adapter_config_file,
    adapter_weights_file,
    names_lora,
)
from tuoling.models.old_adapters import expand_grouped, infer_config, is_grouped, todays_names


@dataclass(frozen=True)
class Adapter:
    """An adapter as it was read; the files are left as they are.

    tensors: by the names that PEFT writes today. Memory-mapped: pages are read when they are used.
    config:  adapter_config.json as today's PEFT reads it, inferred where there is none.
    notes:   what was inferred or expanded, in words.
    """

    folder: Path
    weights_file: Path
    tensors: Mapping[str, torch.Tensor]
    config: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Numbers in all of its tensors."""
        return sum(tensor.numel() for tensor in self.tensors.values())


def read_adapter(folder: Path, *, lora_alpha: float | None = None) -> Adapter:
    """Read the adapter in `folder`. lora_alpha: for one whose files do not say it.

    Raises ModelError for a file that is empty, cut, not plain tensors, holds NaN, or disagrees with its config.
    """
    file = adapter_weights_file(folder)
    if file is None:
        raise ModelError(
            tr("the adapter has no weights", "适配器没有权重文件"),
            where=str(folder),
            remedy=tr(f"expected {ADAPTER_WEIGHTS[0]}", f"应当有 {ADAPTER_WEIGHTS[0]}"),
        )
    tensors = todays_names(_load(file))
    if not tensors:
        raise _empty(folder, file)
    _require_numbers(tensors, file)
    config_file = adapter_config_file(folder)
    notes = []
    if config_file is None:
        config = infer_config(tensors, lora_alpha, str(file))
        notes.append(_inferred(config))
    else:
        config, more = _read_config(config_file, lora_alpha)
        notes += more
    if is_grouped(tensors):
        tensors, config = expand_grouped(tensors, config, str(file))
        notes.append(
            tr(
                f"the grouped layout of PEFT 0.2 (enable_lora) became plain LoRA of rank {config['r']}, alpha "
                f"{config['lora_alpha']}: the same outputs",
                f"PEFT 0.2 的分组布局（enable_lora）已展开为普通 LoRA，rank {config['r']}，alpha "
                f"{config['lora_alpha']}：输出不变",
            )
        )
    elif config.get("enable_lora") and any(config["enable_lora"]):
        raise ModelError(
            tr(
                f"enable_lora={config['enable_lora']}, and lora_B is not grouped",
                f"enable_lora={config['enable_lora']}，但 lora_B 不是分组的",
            ),
            where=str(config_file),
        )
    _require_rank(tensors, config, config_file or file)
    return Adapter(folder, file, tensors, config, tuple(notes))


def _load(file: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file, memory-mapped where its format allows; a pickle as plain tensors or not at all."""
    from safetensors import SafetensorError, safe_open

    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        import zipfile

        # files of torch before 1.6 are no archives, and cannot be mapped
        with warnings.catch_warnings():  # on a pickle by another tool torch asks for an issue to be filed
            warnings.simplefilter("ignore")
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise ModelError(
            tr(
                f"not a file of plain tensors: {_reason(error)}. Nothing in it was executed",
                f"这不是纯张量文件：{_reason(error)}。其中的代码没有被执行",
            ),
            where=str(file),
            remedy=tr("take it from a source you trust, as safetensors", "请从可信来源获取 safetensors 文件"),
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ModelError(
            tr(
                f"the file is damaged or cut short: {_reason(error)}",
                f"文件损坏或不完整：{_reason(error)}",
            ),
            where=str(file),
        ) from error
    strange = {} if not isinstance(state, dict) else {k: v for k, v in state.items() if not _is_tensor(v)}
    if not isinstance(state, dict) or strange:
        kind = type(next(iter(strange.values()))).__name__ if strange else type(state).__name__
        raise ModelError(
            tr(f"not a table of tensors: it holds a {kind}", f"这不是张量表：里面有 {kind}"), where=str(file)
        )
    return state


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _reason(error: BaseException) -> str:
    """The line of an error that says why; torch's own stand around advice on how to load without protection."""
    advice = ("Weights only load failed", "Please file an issue", "Check the documentation")
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if not line.startswith(advice)), type(error).__name__)


def _empty(folder: Path, file: Path) -> ModelError:
    """The 443 bytes of 2023: the tensors were filtered by name twice, and the second time none was left."""
    checkpoints = sorted(
        (entry for entry in folder.glob("checkpoint-*") if entry.name.rsplit("-", 1)[-1].isdigit()),
        key=lambda entry: int(entry.name.rsplit("-", 1)[-1]),
    )
    whole = [entry for entry in checkpoints if (found := adapter_weights_file(entry)) and names_lora(found)]
    remedy = tr(
        "saved by a tool that filtered the weights twice; take them from a checkpoint of the same training",
        "保存它的工具把权重过滤了两次；请从同一次训练的检查点中取权重",
    )
    if whole:
        remedy += f"\n{whole[-1]}"
    return ModelError(
        tr(
            f"the adapter file is empty: it holds no tensor ({file.stat().st_size} bytes)",
            f"适配器文件是空的：没有任何张量（{file.stat().st_size} 字节）",
        ),
        where=str(file),
        remedy=remedy,
    )


def _require_numbers(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ModelError(
                tr(f"{name} holds NaN or infinity", f"{name} 含有 NaN 或无穷大"),
                where=str(file),
                remedy=tr("take an earlier checkpoint", "请用更早的检查点"),
            )


def _read_config(file: Path, lora_alpha: float | None) -> tuple[dict[str, Any], list[str]]:
    """The config, and what to say of an alpha that was given beside it: the file's own is used."""
    try:
        config = read_json(file)
    except DataError as error:
        raise ModelError(error.problem, where=error.where) from error
    if not isinstance(config, dict):
        raise ModelError(tr("not a JSON object", "不是 JSON 对象"), where=str(file))
    said = config.get("lora_alpha")
    if lora_alpha is None or said == lora_alpha:
        return config, []
    if said is None:
        return {**config, "lora_alpha": lora_alpha}, []
    return config, [
        tr(
            f"{file.name} says lora_alpha={said}: that is used, not {lora_alpha:g}",
            f"{file.name} 写的是 lora_alpha={said}：以它为准，不用 {lora_alpha:g}",
        )
    ]


def _inferred(config: Mapping[str, Any]) -> str:
    targets = ", ".join(config["target_modules"][:8])
    return tr(
        f"no adapter_config.json: rank {config['r']} and targets ({targets}) are read from the tensors, alpha "
        f"{config['lora_alpha']} is as given",
        f"没有 adapter_config.json：rank {config['r']} 和目标层（{targets}）由张量得出，alpha "
        f"{config['lora_alpha']} 按给定值",
    )


def _require_rank(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], file: Path) -> None:
    """A config from another training is noticed by its rank, where it states one for all."""
    rank = config.get("r")
    if config.get("rank_pattern") or not isinstance(rank, int) or config.get("peft_type") != "LORA":
        return
    ranks = {name: tensor.shape[0] for name, tensor in tensors.items() if name.endswith(".lora_A.weight")}
    if ranks and rank not in ranks.values():
        name, other = next(iter(ranks.items()))
        raise ModelError(
            tr(
                f"the config says r={rank}, and {name} has rank {other}: they do not belong together",
                f"配置写的是 r={rank}，而 {name} 的 rank 是 {other}：两者不是一套",
            ),
            where=str(file),
        )
