"""One forward of the model for many answers: each growing one gets a token further, prompts come in pieces.

The tokens of all answers lie in one row without padding; the attention knows whose they are (kernels.decode).
Before it is trusted it is compared with the model's own forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tuoling.kernels import probe
from tuoling.kernels.attention import Unpackable
from tuoling.kernels.decode import Chunk, DecodeStep, SlotCache
from tuoling.kernels.install import PackedAttention
from tuoling.kernels.interface import active_pack
from tuoling.kernels.packed_linear import PackedLinears
from tuoling.language import tr
from tuoling.serve.lora_rows import LoraRows

_LAYERS = {"full_attention", "sliding_attention"}


class Unbatchable(Exception):
    """This model's answers cannot share a forward; the message says why."""


@dataclass(frozen=True, slots=True)
class Filling:
    """The next tokens of a prompt: they go on behind `start` tokens that the slot has already."""

    slot: int
    start: int
    ids: Sequence[int]
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class Growing:
    """An answer whose newest token is not in its slot yet. Answers that grow lie in slots 0, 1, ... in order."""

    length: int
    token: int
    adapter: str | None = None


class Stepper:
    """The model, called step by step over `slots` answers. Raises Unbatchable where it is not exact for it."""

    def __init__(self, model: nn.Module, *, slots: int) -> None:
        self.model = model
        unwrap: Any = getattr(model, "get_base_model", None)
        base: Any = model if unwrap is None else unwrap()
        self.cache = SlotCache(slots)
        self.adapters = LoraRows(model)
        self._base = base
        self._attention = PackedAttention(base)
        takes = inspect.signature(base.forward).parameters
        self._takes_positions = "position_ids" in takes
        embedding = base.get_input_embeddings().weight
        self.words: int = embedding.shape[0]
        """Token ids end before this."""
        self.bytes_per_token = 0
        """Keys and values of one token in all layers."""
        self._device = embedding.device
        if "logits_to_keep" not in takes:
            raise Unbatchable(
                tr("its forward gives logits of all tokens only", "它的 forward 只能给出全部 token 的 logits")
            )
        self.linears: PackedLinears | None = None
        self._attention.replace()
        try:
            self._examine(slots)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Leave the model as it was found."""
        self.cache.free()
        if self.linears is not None:
            self.linears.undo()
        self.adapters.remove()
        self._attention.restore()

    @torch.no_grad()
    def step(self, growing: Sequence[Growing], filling: Sequence[Filling]) -> Tensor:
        """Logits of the newest token of each: first those that grow, then the prompts' pieces, [answers, V]."""
        ids = [row.token for row in growing]
        last = list(range(len(growing)))
        owners = [row.adapter for row in growing]
        chunks = []
        for piece in filling:
            ids += piece.ids
            owners += [piece.adapter] * len(piece.ids)
            last.append(len(ids) - 1)
            chunks.append(Chunk(piece.slot, piece.start, len(piece.ids)))
        ends = [row.length + 1 for row in growing] + [chunk.start + chunk.count for chunk in chunks]
        slots = [len(growing), *(chunk.slot + 1 for chunk in chunks)]
        self.cache.reserve(max(ends), max(slots))
        step = DecodeStep(self.cache, [row.length for row in growing], chunks, self._device)
        options: dict[str, Any] = {"use_cache": False, "logits_to_keep": self._tensor(last)}
        if self._takes_positions:
            options["position_ids"] = self._tensor(step.positions).unsqueeze(0)
        with active_pack(step), self.adapters.of_tokens(owners, self._device):
            logits: Tensor = self.model(input_ids=self._tensor(ids).unsqueeze(0), **options).logits
        return logits[0]

    def _tensor(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, device=self._device)

    # -- whether it may be used --------------------------------------------------------------------------------

    def _examine(self, slots: int) -> None:
        """Answer two small documents side by side and compare with the model's own forward.

        The linear layers are laid out for it; where the answers are not the model's then (something reads their
        weights past their forward), they are put back and the answers compared again.
        """
        reason = self._unlike()
        if reason is None:
            with probe.undisturbed(self.model, self._device):
                reason = self._differs_laid_out(slots)
        if reason is not None:
            raise Unbatchable(reason)
        self.bytes_per_token = self.cache.bytes_per_token
        self.cache.free()

    def _unlike(self) -> str | None:
        """Why a model of this kind cannot be stepped, whatever its numbers are."""
        kinds = self._layer_kinds()
        if not kinds <= _LAYERS or getattr(self._base.config, "is_encoder_decoder", False):
            return tr("it has layers of another kind than attention", "它含有注意力以外的层")
        if getattr(getattr(self.model, "active_peft_config", None), "is_prompt_learning", False):
            return tr("its adapter adds tokens of its own", "它的适配器会添加自己的 token")
        return None

    def _layer_kinds(self) -> set[str]:
        return set(getattr(self._base.config.get_text_config(), "layer_types", None) or ())

    def _differs_laid_out(self, slots: int) -> str | None:
        words = min(self.words, self._base.config.get_text_config().vocab_size)
        documents = probe.Documents.make(words, self._device)
        try:
            first, second = self._own(documents.first), self._own(documents.second)
        except Exception as error:
            return _own_code(error)
        wanted = second[5], second[-1], first[-1]
        self.linears = PackedLinears(self._base)
        reason = self._differs(documents, wanted, slots)
        if reason is not None and len(self.linears):
            self.linears.undo()
            reason = self._differs(documents, wanted, slots)
        return reason

    def _differs(self, documents: probe.Documents, wanted: Sequence[Tensor], slots: int) -> str | None:
        try:
            got = self._stepped(documents.first.tolist(), documents.second.tolist(), slots)
        except Unpackable as error:
            return str(error)
        except Exception as error:  # whatever a forward of another shape than ours runs into
            return _own_code(error)
        near = probe.tolerance(wanted[0].dtype)
        if any(probe.apart(mine, theirs) > near for mine, theirs in zip(got, wanted, strict=False)):
            return tr("its steps differ from its own forward", "分步计算与它自己的 forward 结果不一致")
        if "sliding_attention" in self._layer_kinds() and not any(self.cache.windows.values()):
            return tr("its layers do not tell their window", "它的层没有说明滑动窗口")
        return None

    def _stepped(self, first: list[int], second: list[int], slots: int) -> list[Tensor]:
        """Logits behind the sixth and the last id of the second document, and the last of the first, if there is a
        slot for it: in pieces, and while the other one joins and grows."""
        own = self.adapters.first
        self.step([], [Filling(0, 0, second[:4], own)])
        got = [self.step([], [Filling(0, 4, second[4:6], own)])[0]]
        if slots == 1:
            for at in range(6, probe.SECOND):
                logits = self.step([Growing(at, second[at], own)], [])
            return [*got, logits[0]]
        logits = self.step([Growing(6, second[6], own)], [Filling(1, 0, first[:5], own)])
        for at in range(7, probe.SECOND):
            logits = self.step([Growing(at, second[at], own), Growing(at - 2, first[at - 2], own)], [])
        return [*got, logits[0], logits[1]]

    @torch.no_grad()
    def _own(self, ids_T: Tensor) -> Tensor:
        """Logits behind each of `ids_T`, from transformers alone: [T, V]."""
        logits: Tensor = self.model(input_ids=ids_T.unsqueeze(0), use_cache=False).logits
        return logits[0]


def _own_code(error: Exception) -> str:
    return tr(
        f"its attention is code of its own ({type(error).__name__})",
        f"它的注意力是自己的实现（{type(error).__name__}）",
    )
