"""A transformers model that holds the weights of one decoder layer at a time.

The model is built without weights and its own forward runs; hooks read a layer's weights from the files when it is
called and drop them when it returns. Of the input embeddings only the rows of the words asked for are read, and the
head is multiplied in pieces. All arithmetic is float32, whatever the files hold: equal weights give equal logits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from tuoling.errors import ModelError
from tuoling.kernels.forwards import replace_forward
from tuoling.language import tr
from tuoling.weights.tensors import TensorSource

HEAD_ROWS = 16384
"""Rows of the head at once: 256 MiB in float32 at hidden size 4096, instead of 3.8 GiB for 250,880 words."""

COMPUTED = ("rotary_emb.inv_freq", "rope.freqs", "masked_bias", "attn.bias", "attention.bias")
"""Ends of names that old files carry and every model computes for itself (`attn.bias`: GPT-2's triangle)."""


class CannotStream(Exception):
    """This model does not run layer by layer; the text says why."""


class StreamedModel:
    """One side of a comparison."""

    def __init__(
        self,
        config: Any,
        source: TensorSource,
        *,
        rounded: Mapping[str, torch.dtype] | None = None,
        columns: torch.Tensor | None = None,
        attach: Callable[[Any], Any] = lambda model: model,
        merge: bool = False,
        before_drop: Callable[[], None] = lambda: None,
        allow_remote_code: bool = False,
    ) -> None:
        """rounded: types to round tensors to after reading, by their name in the files.
        columns: ids of words whose logits come first, in this order; the other words follow.
        attach: puts adapters on the model, which has no weights yet.
        merge: add the adapters to their base weights, in float32 before rounding, instead of running beside them.
        before_drop: called when a layer has run and still holds its weights.
        allow_remote_code: the model's own Python code may be run.
        Raises CannotStream, before anything large is read.
        """
        self._source = source
        self._rounded = dict(rounded or {})
        self._before_drop = before_drop
        self._columns = columns
        model = _empty_model(config, allow_remote_code)
        # by the parameter itself: adapters move modules to other names, and tied weights have several
        self._names = _names_in_files(model, source)
        self.model = attach(model).eval()
        self._merge = merge
        self._hook()
        if merge:
            self.model.base_model.disable_adapter_layers()

    def forward(self, ids_NT: torch.Tensor, past: Any = None, *, use_cache: bool = False) -> Any:
        """transformers' own output: `logits` [N, T, V] in the order of `columns`, and `past_key_values`."""
        with torch.no_grad():
            given = {} if past is None else {"past_key_values": past}
            return self.model(input_ids=ids_NT, use_cache=use_cache, **given)

    def _hook(self) -> None:
        embedding = _plain(self.model.get_input_embeddings())
        head = _plain(self.model.get_output_embeddings())
        for module, whole in _parts(self.model):
            own = {
                (owner, name): parameter
                for owner in (module.modules() if whole else (module,))
                for name, parameter in owner._parameters.items()
                if parameter is not None and parameter.is_meta
            }
            if not own:
                continue
            if any(id(parameter) not in self._names for parameter in own.values()):
                raise CannotStream(
                    tr("its adapter changes the size of the vocabulary", "其适配器改变了词表大小")
                )
            if module is head and isinstance(head, nn.Linear):
                self._run_in_pieces(head, own)
            elif module is embedding and isinstance(embedding, nn.Embedding):
                self._read_rows(embedding)
            else:
                self._read_when_called(module, own)

    def _read(
        self,
        parameter: nn.Parameter,
        rows: torch.Tensor | slice | None = None,
        delta: Callable[[], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        name = self._names[id(parameter)]
        tensor = self._source.read(name)
        if tensor.shape != parameter.shape:
            got, want = list(tensor.shape), list(parameter.shape)
            raise ModelError(
                tr(
                    f"{name} has the shape {got}, the model needs {want}",
                    f"{name} 的形状是 {got}，模型需要 {want}",
                )
            )
        if rows is not None:
            tensor = tensor[rows]
        rounded = self._rounded.get(name, tensor.dtype)
        if delta is not None:
            tensor = tensor.to(torch.float32) + delta()
        return tensor.to(rounded).to(torch.float32)

    def _read_when_called(self, module: nn.Module, own: Mapping[tuple[nn.Module, str], nn.Parameter]) -> None:
        deltas = _deltas(module) if self._merge else {}

        def load(*_: Any) -> None:
            read: dict[int, nn.Parameter] = {}
            for (owner, name), parameter in own.items():
                if id(parameter) not in read:
                    values = self._read(parameter, delta=deltas.get((owner, name)))
                    read[id(parameter)] = nn.Parameter(values, requires_grad=False)
                owner._parameters[name] = read[id(parameter)]

        def drop(*_: Any) -> None:
            self._before_drop()
            for (owner, name), parameter in own.items():
                owner._parameters[name] = parameter

        module.register_forward_pre_hook(load)
        module.register_forward_hook(drop, always_call=True)

    def _read_rows(self, embedding: nn.Embedding) -> None:
        """Only the rows of the words that occur are read, and the ids are their places among those rows."""
        whole = embedding._parameters["weight"]
        assert whole is not None
        embedding.padding_idx = (
            None  # says where no gradient goes, and is checked against the rows that are there
        )

        def load(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            words, places = torch.unique(inputs[0], return_inverse=True)
            embedding._parameters["weight"] = nn.Parameter(self._read(whole, words), requires_grad=False)
            return (places, *inputs[1:])

        def drop(*_: Any) -> None:
            embedding._parameters["weight"] = whole

        embedding.register_forward_pre_hook(load)
        embedding.register_forward_hook(drop, always_call=True)

    def _run_in_pieces(self, head: nn.Linear, own: Mapping[tuple[nn.Module, str], nn.Parameter]) -> None:
        weight, bias = own[head, "weight"], own.get((head, "bias"))
        order, first = column_order(self._columns, len(weight))
        starts = [*range(0, first, HEAD_ROWS), *range(first, len(order), HEAD_ROWS), len(order)]

        def forward(_: nn.Module, hidden_NTD: torch.Tensor) -> torch.Tensor:
            logits_NTV = hidden_NTD.new_empty(*hidden_NTD.shape[:-1], len(order))
            for start, end in itertools.pairwise(starts):
                rows = order[start:end] if self._columns is not None else slice(start, end)
                added = None if bias is None else self._read(bias, rows)
                logits_NTV[..., start:end] = nn.functional.linear(hidden_NTD, self._read(weight, rows), added)
                self._before_drop()
            return logits_NTV

        replace_forward(head, forward)


def column_order(columns: torch.Tensor | None, words: int) -> tuple[torch.Tensor, int]:
    """All ids, `columns` first, and how many those are."""
    if columns is None:
        return torch.arange(words), words
    others = torch.ones(words, dtype=torch.bool)
    others[columns] = False
    return torch.cat([columns, others.nonzero()[:, 0]]), len(columns)


def _empty_model(config: Any, allow_remote_code: bool) -> Any:
    """The model without weights. Buffers are real: those are computed from the config, not read."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=allow_remote_code
        )


def _names_in_files(model: Any, source: TensorSource) -> dict[int, str]:
    """Parameter (by id) → its name in the files; buffers that files hold are read at once.

    Published folders leave out the base model's prefix (`h.0…` for `transformer.h.0…`), and write tied weights once.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    prefix = f"{model.base_model_prefix}."
    found: dict[str, str] = {}
    held = model.state_dict(keep_vars=True)
    for name in held:
        candidates = [name, tied.get(name, name)]
        candidates += [other.removeprefix(prefix) for other in candidates] + [prefix + name]
        there = next((other for other in candidates if other in source.infos), None)
        if there is not None:
            found[name] = there
    names = {id(held[name]): there for name, there in found.items()}
    lacking = [name for name, tensor in held.items() if id(tensor) not in names]
    unused = source.infos.keys() - set(found.values())
    unknown = [*lacking, *sorted(name for name in unused if not name.endswith(COMPUTED))]
    if unknown:
        raise CannotStream(
            tr(
                f"the files name their tensors otherwise than the model does ({unknown[0]})",
                f"文件中的张量名与模型不同（{unknown[0]}）",
            )
        )
    for name, there in found.items():
        if not held[name].is_meta:
            held[name].copy_(source.read(there))
    return names


def _parts(model: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
    """Modules that get weights when called: decoder layers whole (members of the outermost lists), others alone."""
    if isinstance(model, nn.ModuleList):
        for layer in model:
            yield layer, True
        return
    yield model, False
    for child in model.children():
        yield from _parts(child)


def _deltas(module: nn.Module) -> dict[tuple[nn.Module, str], Callable[[], torch.Tensor]]:
    """What the adapters inside a part add to each of its weights."""
    from peft.tuners.lora import Linear

    found: dict[tuple[nn.Module, str], Callable[[], torch.Tensor]] = {}
    for layer in module.modules():
        if isinstance(layer, Linear):

            def delta(layer: Any = layer) -> torch.Tensor:
                total: torch.Tensor = sum(layer.get_delta_weight(name) for name in layer.active_adapters)
                return total

            found[layer.get_base_layer(), "weight"] = delta
    return found


def _plain(module: Any) -> Any:
    """The module itself below an adapter's wrapper."""
    return getattr(module, "base_layer", module)
