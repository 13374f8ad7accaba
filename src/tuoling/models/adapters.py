"""LoRA adapters on a model: which modules they go to, and loading them strictly."""

from __future__ import annotations

import difflib
import pickle
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tuoling.errors import ConfigError, ModelError
from tuoling.files import read_json
from tuoling.language import tr
from tuoling.models.source import ADAPTER_CONFIG, ADAPTER_WEIGHTS

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def lora_target_names(model: PreTrainedModel, wanted: Sequence[str] | str = ("all",)) -> list[str]:
    """Names for PEFT's `target_modules`.

    "all" (or "all-linear"): every linear layer inside the blocks, found by type, the head left out. Other names
    are matched against the end of module names, as PEFT does. Raises ConfigError for a name that matches nothing.
    """
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    linear = _linear_modules(model)
    inside = [name for name in linear if any(part.isdigit() for part in name.split("."))]
    if any(name in ("all", "all-linear") for name in names):
        if not inside:
            raise ModelError(
                tr(
                    "no linear layer inside the blocks: LoRA has nowhere to go",
                    "各层内没有线性层：无处放置 LoRA",
                ),
                where=type(model).__name__,
            )
        return _short_names(inside, linear)
    for name in names:
        if not any(module == name or module.endswith(f".{name}") for module in linear):
            have = _short_names(inside, linear)
            close = difflib.get_close_matches(name, have, n=1)
            hint = tr(f" (did you mean {close[0]}?)", f"（是不是 {close[0]}？）") if close else ""
            raise ConfigError(
                tr(f"no linear layer is called {name}{hint}", f"没有名为 {name} 的线性层{hint}"),
                where="lora_target",
                remedy=tr(
                    f"this model has: {', '.join(have)}; or all", f"该模型有：{', '.join(have)}；或写 all"
                ),
            )
    return names


def _linear_modules(model: PreTrainedModel) -> list[str]:
    """Full names of linear layers (GPT-2's Conv1D too), without input and output embeddings."""
    from transformers.pytorch_utils import Conv1D

    outside = {id(model.get_output_embeddings()), id(model.get_input_embeddings())}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and id(module) not in outside
    ]


def _short_names(inside: Iterable[str], linear: Iterable[str]) -> list[str]:
    """Last names where they mean only modules inside the blocks, else full names."""
    inside, outside = set(inside), set(linear) - set(inside)
    short = sorted({name.rsplit(".", 1)[-1] for name in inside})
    clash = {name.rsplit(".", 1)[-1] for name in outside} & set(short)
    if not clash:
        return short
    return sorted(name for name in short if name not in clash) + sorted(
        name for name in inside if name.rsplit(".", 1)[-1] in clash
    )


def attach_adapter(model: PreTrainedModel, folder: Path, *, trainable: bool) -> PeftModel:
    """Put the adapter in `folder` onto its base, strictly: every tensor is named, shaped and used.

    Raises ModelError for another base, another shape, or a file that holds too much or too little.
    """
    from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

    config = _adapter_config(folder)
    config.inference_mode = not trainable
    state = read_adapter_tensors(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = PeftModel(model, config) if config.task_type is None else _typed(model, config)
    except ValueError as error:
        raise _does_not_fit(folder, str(error).split("\n")[0]) from error
    expected = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    _compare(folder, expected, state)
    set_peft_model_state_dict(wrapped, state)
    return wrapped


def _typed(model: PreTrainedModel, config: Any) -> PeftModel:
    from peft import PeftModel, PeftModelForCausalLM

    return (
        PeftModelForCausalLM(model, config) if config.task_type == "CAUSAL_LM" else PeftModel(model, config)
    )


def _adapter_config(folder: Path) -> Any:
    from peft import PeftConfig

    raw = read_json(folder / ADAPTER_CONFIG)
    if raw.get("enable_lora"):
        raise ModelError(
            tr(
                "an adapter of PEFT 0.2 with enable_lora cannot be read yet",
                "暂不支持带 enable_lora 的 PEFT 0.2 适配器",
            ),
            where=str(folder / ADAPTER_CONFIG),
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PeftConfig.from_pretrained(str(folder))
    except (TypeError, ValueError, KeyError) as error:
        raise ModelError(
            tr(f"not a usable adapter config: {error}", f"适配器配置不可用：{error}"),
            where=str(folder / ADAPTER_CONFIG),
        ) from error


def read_adapter_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The adapter's tensors by their names on disk: safetensors first, else a pickle read with weights_only."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = next((folder / name for name in ADAPTER_WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise ModelError(
            tr("the adapter has no weights", "适配器没有权重文件"),
            where=str(folder),
            remedy=tr(f"expected {ADAPTER_WEIGHTS[0]}", f"应当有 {ADAPTER_WEIGHTS[0]}"),
        )
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ModelError(
            tr(f"the file is damaged or cut short: {error}", f"文件损坏或不完整：{error}"), where=str(path)
        ) from error
    if not state:
        raise ModelError(
            tr("the adapter file is empty: it holds no tensor", "适配器文件是空的：没有任何张量"),
            where=str(path),
            remedy=tr(
                "saved by a tool that filtered the weights twice; take them from a checkpoint of the same training",
                "保存它的工具把权重过滤了两次；请从同一次训练的检查点中取权重",
            ),
        )
    return dict(state)


def _compare(folder: Path, expected: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or extra:
        parts = []
        if missing:
            parts.append(
                tr(f"{len(missing)} missing: {some(missing)}", f"缺少 {len(missing)} 个：{some(missing)}")
            )
        if extra:
            parts.append(tr(f"{len(extra)} unknown: {some(extra)}", f"多出 {len(extra)} 个：{some(extra)}"))
        raise _does_not_fit(folder, "; ".join(parts))
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            got, want = list(tensor.shape), list(expected[name].shape)
            raise _does_not_fit(
                folder,
                tr(f"{name} is {got}, the base needs {want}", f"{name} 的形状是 {got}，基座需要 {want}"),
            )


def some(names: Sequence[str], limit: int = 3) -> str:
    """The first names, and how many more."""
    shown = ", ".join(names[:limit])
    more = len(names) - limit
    return shown if more <= 0 else shown + tr(f" and {more} more", f" 等，另有 {more} 个")


def _does_not_fit(folder: Path, detail: str) -> ModelError:
    return ModelError(
        tr(f"the adapter does not fit this base: {detail}", f"适配器与该基座不匹配：{detail}"),
        where=str(folder),
        remedy=tr(
            "name the base it was trained on: --base PATH_OR_ID", "请指定训练时的基座：--base 路径或编号"
        ),
    )
