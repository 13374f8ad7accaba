"""Weights into memory: safetensors first, pickles only as plain tensors, nothing missing in silence."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tuoling import environment
from tuoling.errors import ModelError
from tuoling.families import own_code_refused
from tuoling.kernels import quantized
from tuoling.language import tr
from tuoling.models import gptq_packages, placement
from tuoling.models import quantization as low_bit
from tuoling.models.adapters import add_adapter, attach_adapter, some
from tuoling.models.quantization import Quantization
from tuoling.models.source import ModelSource, find_model, weight_files
from tuoling.models.tokenizers import load_tokenizer
from tuoling.models.weight_files import damaged, read_header, require_shards

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["find_model", "load_model", "load_tokenizer", "resolve_dtype"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_dtype(dtype: str | torch.dtype, device: str) -> torch.dtype:
    """`auto`, `bf16`, `fp16`, `fp32` or a torch dtype → the torch dtype. fp16 on a CPU is refused."""
    chosen = dtype if isinstance(dtype, torch.dtype) else _DTYPES.get(environment.pick_dtype(dtype, device))
    if chosen is None:
        raise ModelError(
            tr(f"no dtype is called {dtype}", f"没有名为 {dtype} 的精度"),
            where="dtype",
            remedy="auto | bf16 | fp16 | fp32",
        )
    if chosen is torch.float16 and device == "cpu":
        raise ModelError(
            tr("float16 on a CPU is slow and loses precision", "在 CPU 上用 float16 既慢又损失精度"),
            where="dtype",
            remedy=tr("use bf16 or fp32 (or auto)", "请用 bf16 或 fp32（或 auto）"),
        )
    return chosen


def load_model(
    source: ModelSource,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    for_training: bool = False,
    allow_remote_code: bool = False,
    quantization: Quantization | None = None,
    max_memory: Mapping[int | str, str] | None = None,
) -> PreTrainedModel | PeftModel:
    """The model, with its adapter on top where `source` is one.

    for_training: adapter weights ask for gradients and no key-value cache is kept; else eval mode, no gradients.
    quantization: of the base's linear layers; None: as an adapter was trained, `Quantization()`: not at all.
    max_memory: of cards (0, 1, …) and "cpu", for answers: what fits in none of them stays on the disk. None: one
    device, or for a model larger than the card, all cards, then memory, then the disk.
    Raises ModelError for a folder whose weights are cut, missing, too many, or of another shape.
    """
    environment.quiet_libraries()
    device = environment.pick_device(device)
    bits = source.quantization if quantization is None else quantization
    low_bit.require(bits, device)
    weights = source.weights_path
    config = _config(weights, source, allow_remote_code)
    packed = gptq_packages.require_for(config, for_training=for_training, where=str(weights / "config.json"))
    if packed:
        gptq_packages.choose_kernel(config, weights, device)
    with gptq_packages.quiet() if packed else nullcontext():
        chosen = resolve_dtype(dtype, device)
        if for_training or (bits and max_memory is None):
            placed: dict[str, Any] = {} if device == "cpu" and not bits else {"device_map": {"": device}}
        else:
            placed = placement.keywords(device, _bytes_in_memory(weights, config, chosen), max_memory)
        model = _load_base(weights, config, chosen, placed, allow_remote_code, bits)
    spread = placement.is_spread(model)
    if spread:
        placement.say_where(model)
    if bits:
        quantized.settle(model, for_training=for_training)
    loaded: PreTrainedModel | PeftModel = model
    if source.is_adapter:
        alpha = source.lora_alpha
        with gptq_packages.hidden_from_peft():
            loaded = attach_adapter(model, source.path, trainable=for_training, lora_alpha=alpha)
        if (
            not bits and not spread
        ):  # else PEFT has put the adapter where its layers are, and quantised ones do not move
            loaded.to(device)
    if for_training:
        model.config.use_cache = False
        return loaded.train()
    return loaded.requires_grad_(False).eval()


def load_adapter(model: PreTrainedModel | PeftModel, source: ModelSource, name: str) -> PeftModel:
    """Put one more adapter onto a loaded model, for answers; `name` is PEFT's for its layers."""
    from peft import PeftModel

    with gptq_packages.hidden_from_peft():
        if not isinstance(model, PeftModel):
            wrapped = attach_adapter(
                model, source.path, trainable=False, lora_alpha=source.lora_alpha, name=name
            )
            return wrapped.requires_grad_(False).eval()
        add_adapter(model, name, source.path, lora_alpha=source.lora_alpha)
    return model.eval()


def _config(folder: Path, source: ModelSource, allow_remote_code: bool) -> PretrainedConfig:
    from transformers import AutoConfig, AutoModelForCausalLM

    _refuse_by_family(source, allow_remote_code)
    try:
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=allow_remote_code, local_files_only=True
        )
    except (ValueError, KeyError, OSError) as error:
        if "trust_remote_code" in str(error):
            raise own_code_refused(folder) from error
        kind = source.config.get("model_type")
        raise ModelError(
            tr(
                f"transformers cannot use model_type {kind!r}: {_first_line(error)}",
                f"transformers 无法使用 model_type {kind!r}：{_first_line(error)}",
            ),
            where=str(folder / "config.json"),
        ) from error
    known = type(config) in AutoModelForCausalLM._model_mapping
    if not known and not (allow_remote_code and "auto_map" in source.config):
        raise ModelError(
            tr(
                f"{config.model_type} is not a causal language model", f"{config.model_type} 不是因果语言模型"
            ),
            where=str(folder / "config.json"),
            remedy=tr("choose a text generation model", "请选择文本生成模型"),
        )
    return config


def _refuse_by_family(source: ModelSource, allow_remote_code: bool) -> None:
    if "not_causal" in source.family.quirks:
        raise ModelError(
            tr(
                f"{source.family.name} models do not predict the next token",
                f"{source.family.name} 模型不做下一词预测",
            ),
            where=str(source.path),
            remedy=tr("choose a text generation model", "请选择文本生成模型"),
        )
    if "own_code" in source.family.quirks and not allow_remote_code:
        raise own_code_refused(source.path)


def _load_base(
    folder: Path,
    config: PretrainedConfig,
    dtype: torch.dtype,
    placed: dict[str, Any],
    allow_remote_code: bool,
    quantization: Quantization,
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    if quantization:
        _require_plain(folder, config)
        placed["quantization_config"] = low_bit.transformers_config(quantization, dtype)
    files = weight_files(folder)
    _require_whole(folder, files)
    offload = placement.OffloadFolder() if placed.get("device_map") == "auto" else None
    if offload is not None:
        placed["offload_folder"] = offload.name
    with _weight_errors(folder):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=files[0].suffix == ".safetensors",
            weights_only=True,
            trust_remote_code=allow_remote_code,
            local_files_only=True,
            output_loading_info=True,
            **placed,
        )
    model, info = loaded
    _require_all_used(folder, info)
    model.offload_folder = offload
    return model


def _bytes_in_memory(folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Of the weights in the number type they are loaded in."""
    on_disk = sum(file.stat().st_size for file in weight_files(folder))
    saved = getattr(config, "dtype", None) or dtype
    return on_disk * dtype.itemsize // saved.itemsize


def _require_plain(folder: Path, config: PretrainedConfig) -> None:
    """Weights that were saved quantised are not quantised again."""
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            tr("these weights are quantised already", "这些权重已经量化过"),
            where=str(folder / "config.json"),
            remedy=tr(
                "load them as they are: quantization_bit=0, --quantization-bit 0",
                "按原样载入：quantization_bit=0，--quantization-bit 0",
            ),
        )


def _require_whole(folder: Path, files: list[Path]) -> None:
    """Every shard that the index names is there, and no safetensors file is shorter than its header says."""
    if not files:
        raise ModelError(tr("the model folder has no weights", "模型目录中没有权重文件"), where=str(folder))
    require_shards(folder, files)
    for file in files:
        if file.suffix == ".safetensors":
            read_header(file)


@contextmanager
def _weight_errors(folder: Path) -> Iterator[None]:
    """What transformers, safetensors and torch raise over bad weights, as one of ours."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, pickle.UnpicklingError, EOFError) as error:
        raise damaged(folder, _first_line(error)) from error
    except (RuntimeError, ValueError, OSError, ImportError) as error:
        if isinstance(error, RuntimeError) and "out of memory" in str(error).lower():
            raise ModelError(
                tr("not enough memory for the weights", "内存不足，装不下权重"),
                where=str(folder),
                remedy=tr("use a smaller model or dtype=bf16", "换更小的模型，或用 dtype=bf16"),
            ) from error
        raise ModelError(
            tr(f"the weights cannot be loaded: {_first_line(error)}", f"无法载入权重：{_first_line(error)}"),
            where=str(folder),
        ) from error


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _require_all_used(folder: Path, info: dict[str, Any]) -> None:
    """Missing, unknown and mis-shaped tensors are errors with their names: a model must not be half random."""
    mismatched = sorted(
        str(entry[0]) if isinstance(entry, tuple) else str(entry) for entry in info["mismatched_keys"]
    )
    # buffers that old files carry and that are computed now
    unknown = sorted(
        name for name in info["unexpected_keys"] if not name.endswith(("rotary_emb.inv_freq", "masked_bias"))
    )
    for names, en, zh in (
        (sorted(info["missing_keys"]), "tensors are missing from the weights", "权重中缺少张量"),
        (mismatched, "tensors have another shape than config.json says", "张量形状与 config.json 不符"),
        (unknown, "tensors in the weights belong to no part of the model", "权重中有模型没有的张量"),
    ):
        if names:
            raise ModelError(
                tr(f"{len(names)} {en}: {some(names)}", f"{len(names)} 个{zh}：{some(names)}"),
                where=str(folder),
                remedy=tr(
                    "the folder mixes files of different models, or a file is missing",
                    "目录里混有不同模型的文件，或缺少文件",
                ),
            )
