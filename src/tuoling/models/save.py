"""Writing models and adapters, and reading back what was written before it is believed.

The folder is the caller's: call these inside `files.atomic_folder` so that a half-written one is never seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tuoling.errors import OutputError
from tuoling.files import write_json
from tuoling.language import tr
from tuoling.models.source import TEMPLATE_FILE, hub_name, weight_files

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from tuoling.text.tokenizer import TextTokenizer


def save_adapter(
    model: PeftModel,
    folder: Path,
    *,
    tokenizer: TextTokenizer | None = None,
    template: Mapping[str, Any] | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> int:
    """Write the adapter in PEFT's layout and return the bytes of its weights.

    template: what goes to `template.json` (see `source.TEMPLATE_FILE`); its stops that are single tokens join the
    end tokens in generation_config.json. state_dict: gathered weights, where the model's own are sharded.
    Raises OutputError if what was read back is not, bit for bit, what is in memory.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    state = get_peft_model_state_dict(
        model, state_dict=dict(state_dict) if state_dict is not None else None, save_embedding_layers=False
    )
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "adapter_model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    _write_adapter_config(model, folder, template or {})
    _verify(tensors, [path])
    _save_beside(model.get_base_model(), folder, tokenizer, template)
    return path.stat().st_size


def _write_adapter_config(model: PeftModel, folder: Path, template: Mapping[str, Any]) -> None:
    """PEFT's adapter_config.json, marked for inference as PEFT itself saves it, with keys in one order."""
    import copy

    config = copy.copy(model.peft_config[model.active_adapter])
    config.inference_mode = True
    base = template.get("base") or {}
    if base:
        config.base_model_name_or_path = hub_name(base) or base["path"]
    values = config.to_dict()
    if isinstance(values.get("target_modules"), set):
        values["target_modules"] = sorted(values["target_modules"])
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}
    write_json(folder / "adapter_config.json", dict(sorted(plain.items())))


def save_model(
    model: PreTrainedModel,
    folder: Path,
    *,
    tokenizer: TextTokenizer | None = None,
    template: Mapping[str, Any] | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    max_shard_size: str = "5GB",
) -> int:
    """Write a whole model as safetensors and return the bytes of its weights. Verified as `save_adapter` is."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    cached = model.config.use_cache
    model.config.use_cache = True  # switched off for training only
    try:
        model.save_pretrained(
            folder,
            state_dict=dict(state_dict) if state_dict is not None else None,
            max_shard_size=max_shard_size,
        )
    finally:
        model.config.use_cache = cached
    files = weight_files(folder)
    _verify(dict(state_dict if state_dict is not None else model.state_dict()), files, tied=True)
    _save_beside(model, folder, tokenizer, template)
    return sum(file.stat().st_size for file in files)


def _verify(tensors: Mapping[str, torch.Tensor], files: Iterable[Path], *, tied: bool = False) -> None:
    """Read every tensor back: all there, finite, equal, and not all zero.

    tied: names that share storage are written once, so that some may be absent.
    """
    from safetensors import safe_open

    seen: set[str] = set()
    stored: set[int] = set()
    norm = 0.0
    where = ""
    for file in files:
        where = str(file)
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (safe_open is no mapping)
                tensor = opened.get_tensor(name)
                if not torch.isfinite(tensor).all():
                    raise _bad(where, tr(f"{name} holds NaN or infinity", f"{name} 含有 NaN 或无穷大"))
                if name in tensors and not torch.equal(tensor, tensors[name].detach().cpu()):
                    raise _bad(where, tr(f"{name} differs from memory", f"{name} 与内存中不同"))
                norm += float(tensor.float().norm())
                seen.add(name)
                if name in tensors:
                    stored.add(tensors[name].data_ptr())
    missing = [n for n in tensors.keys() - seen if not (tied and tensors[n].data_ptr() in stored)]
    renamed = tied and bool(seen - tensors.keys())  # some families are written under their published names
    if not seen or (missing and not renamed):
        raise _bad(
            where, tr(f"tensors are missing: {sorted(missing)[:3]}", f"缺少张量：{sorted(missing)[:3]}")
        )
    if norm == 0.0:
        raise _bad(where, tr("every tensor is zero", "所有张量都是零"))


def _bad(where: str, detail: str) -> OutputError:
    return OutputError(
        tr(f"what was written is not what was trained: {detail}", f"写出的内容与训练结果不符：{detail}"),
        where=where,
    )


def _save_beside(
    model: Any,
    folder: Path,
    tokenizer: TextTokenizer | None,
    template: Mapping[str, Any] | None,
) -> None:
    if tokenizer is not None:
        tokenizer.hf.save_pretrained(folder)
        write_json(
            folder / "generation_config.json",
            generation_defaults(model, tokenizer, (template or {}).get("stops") or ()),
        )
    if template is not None:
        write_json(folder / TEMPLATE_FILE, dict(template))


def generation_defaults(model: Any, tokenizer: TextTokenizer, stops: Iterable[str]) -> dict[str, Any]:
    """generation_config.json: the model's own settings, with every stop that is one token."""
    settings = {} if model.generation_config is None else model.generation_config.to_diff_dict()
    ends = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    for stop in stops:
        index = tokenizer.special_id(stop)
        if index is not None and index not in ends:
            ends.append(index)
    settings["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    for name, value in (("bos_token_id", tokenizer.bos_id), ("pad_token_id", tokenizer.pad_id)):
        if value is not None:
            settings[name] = value
    return {name: value for name, value in settings.items() if value not in (None, [])}
