"""LoRA adapters on a model: which modules they go to, and loading them strictly."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tuoling import console
from tuoling.errors import ConfigError, ModelError
from tuoling.language import tr
from tuoling.models.adapter_files import ADAPTER_CONFIG
from tuoling.models.adapter_reading import Adapter, read_adapter
from tuoling.models.placement import follow_base, is_spread

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


def attach_adapter(
    model: PreTrainedModel,
    folder: Path,
    *,
    trainable: bool,
    lora_alpha: float | None = None,
    name: str = "default",
) -> PeftModel:
    """Put the adapter in `folder` onto its base, strictly: every tensor is named, shaped and used.

    lora_alpha: for an adapter whose files do not say it. name: PEFT's for its layers. Raises ModelError for another
    base, another shape, or a file that holds too much or too little.
    """
    adapter = read_adapter(folder, lora_alpha=lora_alpha)
    for line in adapter.notes:
        console.note(line)
    wrapped = wrap(model, adapter, trainable=trainable, name=name)
    _fill(wrapped, adapter, name)
    return wrapped


def _fill(model: PeftModel, adapter: Adapter, name: str) -> None:
    """Put the tensors in."""
    from peft import set_peft_model_state_dict

    spread = is_spread(model)
    if spread:
        follow_base(model, name)
    on_meta = next(model.parameters()).is_meta and not spread
    set_peft_model_state_dict(model, dict(adapter.tensors), adapter_name=name, low_cpu_mem_usage=on_meta)


def add_adapter(model: PeftModel, name: str, folder: Path, *, lora_alpha: float | None = None) -> None:
    """Put one more adapter beside those that a model has, for answers only; strictly, as `attach_adapter`.

    name: PEFT's for its layers. Raises ModelError, also where PEFT cannot have the two kinds in one model.
    """
    from peft import get_peft_model_state_dict

    adapter = read_adapter(folder, lora_alpha=lora_alpha)
    for line in adapter.notes:
        console.note(line)
    config = peft_config(adapter)
    config.inference_mode = True
    inner: Any = model.get_base_model()
    rows, saved = inner.get_input_embeddings().weight.shape[0], _saved_rows(adapter)
    if len(saved) == 1 and saved != {rows}:
        own = saved.pop()
        raise _does_not_fit(
            folder,
            tr(
                f"it was saved with {own} rows of embeddings, the loaded model has {rows}",
                f"保存时词嵌入有 {own} 行，已载入的模型有 {rows} 行",
            ),
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.add_adapter(name, config)
            expected = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
            embeddings = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=True)
    except ValueError as error:
        raise _does_not_fit(folder, str(error).split("\n")[0]) from error
    saved_too = {key: tensor for key, tensor in embeddings.items() if key in adapter.tensors}
    _compare(folder, {**expected, **saved_too}, adapter.tensors)
    _fill(model, adapter, name)
    model.requires_grad_(False)


def wrap(
    model: PreTrainedModel, adapter: Adapter, *, trainable: bool = False, name: str = "default"
) -> PeftModel:
    """The model with empty adapter layers that `adapter`'s tensors fill exactly; a model on meta stays there.

    An adapter that was saved with embeddings of more or fewer rows brings the model to its size. Raises ModelError
    where names or shapes differ.
    """
    from peft import PeftModel, PeftModelForCausalLM, get_peft_model_state_dict

    config = peft_config(adapter)
    config.inference_mode = not trainable
    _fit_vocabulary(model, adapter)
    on_meta = next(model.parameters()).is_meta and not is_spread(model)
    kind = PeftModelForCausalLM if config.task_type == "CAUSAL_LM" else PeftModel
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = kind(model, config, adapter_name=name, low_cpu_mem_usage=on_meta)
            expected = get_peft_model_state_dict(wrapped, adapter_name=name, save_embedding_layers=False)
            embeddings = get_peft_model_state_dict(wrapped, adapter_name=name, save_embedding_layers=True)
    except ValueError as error:
        raise _does_not_fit(adapter.folder, str(error).split("\n")[0]) from error
    saved_too = {name: tensor for name, tensor in embeddings.items() if name in adapter.tensors}
    _compare(adapter.folder, {**expected, **saved_too}, adapter.tensors)
    return wrapped


def _fit_vocabulary(model: PreTrainedModel, adapter: Adapter) -> None:
    """Resize the embeddings to the rows that the adapter was saved with, where it holds whole ones."""
    embedding: Any = model.get_input_embeddings()
    rows, saved = embedding.weight.shape[0], _saved_rows(adapter)
    if len(saved) == 1 and saved != {rows}:
        model.resize_token_embeddings(saved.pop(), mean_resizing=False)


def _saved_rows(adapter: Adapter) -> set[int]:
    """Rows of the whole embeddings and heads that an adapter was saved with."""
    ends = ("embed_tokens", "word_embeddings", "wte", "lm_head", "embed_in", "embed_out")
    return {
        tensor.shape[0]
        for name, tensor in adapter.tensors.items()
        if name.removesuffix(".weight").removesuffix(".base_layer").endswith(ends) and tensor.ndim == 2
    }


def peft_config(adapter: Adapter) -> Any:
    """The adapter's config as PEFT's own object. Raises ModelError where PEFT does not take it."""
    from peft import PeftConfig

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PeftConfig.from_peft_type(**adapter.config)
    except (TypeError, ValueError, KeyError) as error:
        raise ModelError(
            tr(f"not a usable adapter config: {error}", f"适配器配置不可用：{error}"),
            where=str(adapter.folder / ADAPTER_CONFIG),
        ) from error


def _compare(folder: Path, expected: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
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
