"""The two sides of a comparison, each in shared words: word k is `columns[k]` among the side's own ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from tuoling.families import own_code_refused
from tuoling.language import tr
from tuoling.models.adapter_reading import read_adapter
from tuoling.models.adapters import wrap
from tuoling.models.shape import meta_model
from tuoling.weights.parity import LogitsModel, Weights
from tuoling.weights.streamed import CannotStream, StreamedModel, column_order
from tuoling.weights.tensors import TensorSource, open_weights

STREAMED = "streamed"
OUTSIDE = ("embed_tokens", "word_embeddings", "wte", "lm_head", "embed_out")
"""Modules outside the layers, by their last names."""


class Side(Protocol):
    """One set of weights. how: "streamed", or in words how it ran instead."""

    how: str

    def logits(self, words_NT: torch.Tensor) -> torch.Tensor:
        """[N, T, V] in float32: shared words first, in their order, then the side's own."""
        ...

    def greedy(self, words_NT: torch.Tensor, count: int, shared: int) -> torch.Tensor:
        """[N, count]: after each row, the best of the first `shared` words, again and again."""
        ...


class FolderSide:
    """A model folder: layer by layer, or whole where that cannot be."""

    def __init__(
        self,
        weights: Weights,
        columns: torch.Tensor | None,
        rounded: Mapping[str, torch.dtype],
        *,
        merge: bool = False,
        tick: Callable[[], None],
        before_drop: Callable[[], None],
    ) -> None:
        """rounded, merge: see `StreamedModel`; not possible for a model that is loaded whole."""
        self._weights, self._columns, self._tick = weights, columns, tick
        self._whole: Any = None
        self.how = STREAMED
        try:
            self._streamed = build(
                weights, rounded=rounded, columns=columns, merge=merge, before_drop=before_drop
            )
        except CannotStream as error:
            self._load_whole(str(error))

    def logits(self, words_NT: torch.Tensor) -> torch.Tensor:
        logits_NTV: torch.Tensor = self._forward(words_NT).logits
        return logits_NTV

    def greedy(self, words_NT: torch.Tensor, count: int, shared: int) -> torch.Tensor:
        out = self._forward(words_NT, use_cache=True)
        found = [out.logits[:, -1, :shared].argmax(-1)]
        while len(found) < count:
            past = getattr(out, "past_key_values", None)  # Mamba has none and reads its text again
            newest_NT = torch.stack(found, dim=1) if past is None else found[-1][:, None]
            given_NT = torch.cat([words_NT, newest_NT], dim=1) if past is None else newest_NT
            out = self._forward(given_NT, past, use_cache=True)
            found.append(out.logits[:, -1, :shared].argmax(-1))
        return torch.stack(found, dim=1)

    def _forward(self, words_NT: torch.Tensor, past: Any = None, *, use_cache: bool = False) -> Any:
        self._tick()
        ids_NT = words_NT if self._columns is None else self._columns[words_NT]
        if self._whole is None:
            try:
                return self._streamed.forward(ids_NT, past, use_cache=use_cache)
            except (RuntimeError, NotImplementedError, TypeError, IndexError) as error:
                # a model that reaches into another layer's weights finds none there
                line = (str(error).splitlines() or [type(error).__name__])[0]
                self._load_whole(tr(f"its layers do not run alone: {line}", f"各层无法单独运行：{line}"))
        given = {} if past is None else {"past_key_values": past}
        with torch.no_grad():
            out = self._whole(input_ids=ids_NT, use_cache=use_cache, **given)
        order, _ = column_order(self._columns, out.logits.shape[-1])
        out.logits = out.logits.float() if self._columns is None else out.logits.float()[..., order]
        return out

    def _load_whole(self, why: str) -> None:
        from tuoling.models.load import find_model, load_model
        from tuoling.models.quantization import Quantization

        weights = self._weights
        model = load_model(
            find_model(weights.folder),
            dtype="fp32",
            device="cpu",
            quantization=Quantization(),
            allow_remote_code=weights.allow_remote_code,
        )
        self._whole = attach_adapters(model, weights).eval()
        self.how = tr(f"loaded whole: {why}", f"整体载入：{why}")


class EngineSide:
    """Any object that gives logits, asked row by row."""

    def __init__(self, model: LogitsModel, columns: torch.Tensor | None, *, tick: Callable[[], None]) -> None:
        self._model, self._columns, self._tick = model, columns, tick
        self.how = tr("asked through its engine", "通过推理引擎提问")

    def logits(self, words_NT: torch.Tensor) -> torch.Tensor:
        self._tick()
        rows = words_NT if self._columns is None else self._columns[words_NT]
        logits_NTV = torch.stack([torch.as_tensor(self._model.logits(row.tolist())).float() for row in rows])
        order, _ = column_order(self._columns, logits_NTV.shape[-1])
        return logits_NTV if self._columns is None else logits_NTV[..., order]

    def greedy(self, words_NT: torch.Tensor, count: int, shared: int) -> torch.Tensor:
        words = words_NT
        for _ in range(count):
            words = torch.cat([words, self.logits(words)[:, -1, :shared].argmax(-1)[:, None]], dim=1)
        return words[:, words_NT.shape[1] :]


def build(weights: Weights, **options: Any) -> StreamedModel:
    """The model without its weights. options: as `StreamedModel` has them. Raises CannotStream."""
    return StreamedModel(
        streamable_config(weights),
        open_side(weights),
        allow_remote_code=weights.allow_remote_code,
        attach=lambda model: attach_adapters(model, weights),
        **options,
    )


def open_side(weights: Weights) -> TensorSource:
    """A folder's tensors, or a GGUF, old ggml or old GPTQ file's, under Hugging Face's names."""
    path = weights.folder
    if path.is_file():
        with path.open("rb") as file:
            magic = file.read(4)
        if magic == b"GGUF":
            from tuoling.weights.gguf_models import GgufModel

            return GgufModel(path)
        if magic == b"lmgg":
            from tuoling.weights.old_ggml import OldGgmlModel

            return OldGgmlModel(path)
    if weights.multiply_out:
        from tuoling.weights.gptq_format import QuantizedWeights, quantized_format
        from tuoling.weights.gptq_old import OldQuantizedWeights

        form = quantized_format(path) if path.is_dir() else None
        if form is not None:
            return QuantizedWeights(path, form)
        assert weights.described_by is not None
        return OldQuantizedWeights(
            path, meta_model(weights.described_by, allow_remote_code=weights.allow_remote_code)
        )
    return open_weights(path)


def read_config(weights: Weights) -> Any:
    """The model's config. Raises ModelError where only code that was not allowed can read it."""
    from transformers import AutoConfig

    folder = weights.described_by or weights.folder
    try:
        return AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=weights.allow_remote_code
        )
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise own_code_refused(folder) from error
        raise


def streamable_config(weights: Weights) -> Any:
    """The model's config. Raises CannotStream where transformers has none, or the weights are stored quantised."""
    try:
        config = read_config(weights)
    except (ValueError, KeyError, OSError) as error:
        raise CannotStream(str(error).splitlines()[0]) from error
    if getattr(config, "quantization_config", None) is not None:
        if not weights.multiply_out:
            raise CannotStream(tr("its weights are quantised", "权重已量化"))
        del config.quantization_config
    return config


def attach_adapters(model: Any, weights: Weights) -> Any:
    """The model with its adapters beside it, unmerged, each with its weight; the base may have no weights yet."""
    from peft import PeftConfig
    from peft.tuners.lora import LoraLayer

    names = [f"adapter_{number}" if number else "default" for number in range(len(weights.adapters))]
    for name, (folder, weight, lora_alpha) in zip(names, weights.adapters, strict=True):
        adapter = read_adapter(folder, lora_alpha=lora_alpha)
        if name == "default":
            model = wrap(model, adapter)
        else:
            model.add_adapter(name, PeftConfig.from_peft_type(**adapter.config))
        _fill(model, name, adapter.tensors)
        for module in model.modules():
            if isinstance(module, LoraLayer) and name in module.scaling:
                module.scaling[name] *= weight
    if len(names) > 1:
        model.base_model.set_adapter(names)
    return model


def can_merge(weights: Weights) -> bool:
    """Whether the adapters are plain LoRA inside the layers, which is added to one weight each."""
    configs = [read_adapter(folder, lora_alpha=alpha).config for folder, _, alpha in weights.adapters]
    return bool(configs) and not any(
        config.get("use_dora") or config.get("modules_to_save") or _outside(config) for config in configs
    )


def _outside(config: Mapping[str, Any]) -> bool:
    """Whether an adapter may touch the embeddings or the head."""
    targets = config.get("target_modules") or ()
    names = [targets] if isinstance(targets, str) else targets
    return any(name.endswith(OUTSIDE) or name.startswith("all") for name in names)


def _fill(model: Any, adapter_name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give an adapter's layers their tensors. PEFT itself would move them to where their base is: to no memory."""
    state = {}
    for name, _ in model.named_parameters():
        plain = name.replace(f".modules_to_save.{adapter_name}.", ".")
        plain = plain.replace(f".{adapter_name}.", ".").removesuffix(f".{adapter_name}")
        key = next((key for key in (plain, plain.removesuffix(".weight")) if key in tensors), None)
        if key is not None and plain != name:
            state[name] = tensors[key].float()
    if len(state) != len(tensors):
        raise CannotStream(tr("its adapter has tensors of another kind", "其适配器含有其他类型的张量"))
    model.load_state_dict(state, strict=False, assign=True)
