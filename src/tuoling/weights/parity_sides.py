"""The two sides of a comparison, each in shared words: word k is `columns[k]` among the side's own ids."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from tuoling.errors import ModelError
from tuoling.language import tr
from tuoling.models.adapters import attach_adapter, read_adapter_tensors
from tuoling.weights.parity import LogitsModel, Weights
from tuoling.weights.streamed import CannotStream, StreamedModel, column_order
from tuoling.weights.tensors import open_weights

STREAMED = "streamed"


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
        tick: Callable[[], None],
        before_drop: Callable[[], None],
    ) -> None:
        self._weights, self._columns, self._tick = weights, columns, tick
        self._whole: Any = None
        self.how = STREAMED
        try:
            self._streamed = StreamedModel(
                streamable_config(weights),
                open_weights(weights.folder),
                rounded=rounded,
                columns=columns,
                attach=lambda model: attach_adapters(model, weights),
                before_drop=before_drop,
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

        source = find_model(self._weights.folder)
        model = load_model(source, dtype="fp32", device="cpu", quantization=Quantization())
        self._whole = attach_adapters(model, self._weights).eval()
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


def read_config(weights: Weights) -> Any:
    """The model's config."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(weights.described_by or weights.folder, local_files_only=True)


def streamable_config(weights: Weights) -> Any:
    """The model's config. Raises CannotStream where transformers has none, or the weights are stored quantised."""
    try:
        config = read_config(weights)
    except (ValueError, KeyError, OSError) as error:
        raise CannotStream(str(error).splitlines()[0]) from error
    if getattr(config, "quantization_config", None) is not None:
        raise CannotStream(tr("its weights are quantised", "权重已量化"))
    return config


def attach_adapters(model: Any, weights: Weights) -> Any:
    """The model with its adapters beside it, unmerged, each with its weight."""
    from peft import PeftConfig, set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    names = [f"adapter_{number}" if number else "default" for number in range(len(weights.adapters))]
    for name, (folder, weight) in zip(names, weights.adapters, strict=True):
        state = {key: tensor.float() for key, tensor in read_adapter_tensors(folder).items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on a model without weights the first has none to copy to
            if name == "default":
                model = attach_adapter(model, folder, trainable=False)
            else:
                model.add_adapter(name, PeftConfig.from_pretrained(str(folder)))
            set_peft_model_state_dict(model, state, adapter_name=name, low_cpu_mem_usage=True)
        for module in model.modules():
            if isinstance(module, LoraLayer) and name in module.scaling:
                module.scaling[name] *= weight
    if len(names) > 1:
        model.base_model.set_adapter(names)
    return model
