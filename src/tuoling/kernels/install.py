"""Put the fast paths on a transformers model, and say what was done and why not."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tuoling import console
from tuoling.errors import ModelError
from tuoling.kernels import bloom, lora, norm, probe
from tuoling.kernels.attention import Pack, Unpackable
from tuoling.kernels.forwards import put_back
from tuoling.kernels.head import Head, find_linear
from tuoling.kernels.interface import active_pack, register
from tuoling.kernels.loss import PLAIN, Extras, linear_cross_entropy, loss_of_logits, supervised
from tuoling.kernels.quantized import multiplied_out
from tuoling.language import tr


def install(
    model: nn.Module, *, say: Callable[[str], None] = console.note, called: nn.Module | None = None
) -> FastModel:
    """Give `model` (a causal language model of transformers, or a PeftModel around one) the fast step.

    Each fast path is tried on the model itself first; one that is not exact is left out, with the reason in
    `FastModel.reasons` and through `say`. The model is the same for everybody else: generation and ordinary
    forwards give what they gave. ModelError: it cannot be trained as a causal language model at all.
    called: what stands around the model and is called in its place, where it holds only parts of its weights.
    """
    fast = FastModel(model, say=say)
    if called is not None:
        fast.model = called
    try:
        fast.examine()
    except BaseException:
        fast.uninstall()
        raise
    return fast


class FastModel:
    """The training step's view of a model: packed documents in, a summed loss out.

    model:      what is called; a wrapper (DDP) may be put here after `install`.
    packed:     documents share one forward; otherwise they run one by one.
    fused_loss: the loss never holds logits; otherwise transformers' own logits are used.
    reasons:    one sentence for each fast path that is not used.
    extras:     label smoothing and z-loss while the model is in training mode; validation has the cross entropy alone.
    """

    def __init__(self, model: nn.Module, *, say: Callable[[str], None] = console.note) -> None:
        self.model = model
        self.packed = False
        self.fused_loss = False
        self.reasons: list[str] = []
        self.extras = PLAIN
        self._say = say
        unwrap: Any = getattr(model, "get_base_model", None)  # of a PeftModel
        self._base: Any = model if unwrap is None else unwrap()
        self._takes = inspect.signature(self._base.forward).parameters
        self._attention = PackedAttention(self._base)
        linear = find_linear(self._base)
        self._head = None if linear is None else Head(linear)
        self._lora = [] if unwrap is None else lora.install(self._base)
        self._norms = norm.install(self._base)
        self._scale = 1.0
        self._select = False  # the stock loss asks the head for learned positions only

    def loss_sum(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        extra_labels: Tensor | None = None,
        head: int = 0,
    ) -> Tensor:
        """Sum of cross entropy in nats over labels [T] != -100 of the documents input_ids [T]; never divides.

        labels are shifted already: labels[t] is what follows input_ids[t] in its document. cu_seqlens [B+1]
        are the documents' bounds. With nothing learned: a zero attached to the graph.
        extra_labels [E, 2]: further (t, label) pairs of the sum; a position may have many.
        head: above 0, the first document has so many tokens, learns nothing, and every other goes on after it.
        """
        pack = Pack.of(cu_seqlens, head)
        where = supervised(labels)
        labels = labels[where]
        if extra_labels is not None:
            where, labels = torch.cat([where, extra_labels[:, 0]]), torch.cat([labels, extra_labels[:, 1]])
        if self.packed:
            try:
                return self._loss(input_ids, where, labels, position_ids, pack)
            except Unpackable as error:  # a mask that shows its true shape only in documents this long
                self._refuse_packing(str(error))
        losses, start = [], head
        for ids in input_ids[head:].split(pack.lengths[bool(head) :]):
            mine = (where >= start) & (where < start + len(ids))
            if bool(mine.any()) or not len(where):
                whole = torch.cat([input_ids[:head], ids])
                losses.append(self._loss(whole, where[mine] - start + head, labels[mine]))
            start += len(ids)
        return torch.stack(losses).sum()

    def facts(self) -> dict[str, Any]:
        """Which paths are used, for run.json."""
        return {"packed": self.packed, "fused_loss": self.fused_loss, "not_used": list(self.reasons)}

    def uninstall(self) -> None:
        """Leave the model as it was found."""
        self._attention.restore()
        put_back([*self._lora, *self._norms])
        if self._head is not None:
            self._head.remove()
            self._head = None
        self.packed = self.fused_loss = self._select = False

    # --- one forward ---------------------------------------------------------------------------------------

    def _forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None, pack: Pack | None = None
    ) -> Tensor:
        """What comes out as logits, [T, V] or what the head answered."""
        options: dict[str, Any] = {}
        if "use_cache" in self._takes:
            options["use_cache"] = False  # with a cache transformers ignores where documents begin
        if pack is not None and position_ids is not None and "position_ids" in self._takes:
            options["position_ids"] = position_ids.unsqueeze(0)
        with active_pack(pack):
            logits: Tensor = self.model(input_ids=input_ids.unsqueeze(0), **options).logits
        return logits[0]

    def _loss(
        self, ids: Tensor, where: Tensor, labels: Tensor, at: Tensor | None = None, pack: Pack | None = None
    ) -> Tensor:
        """The sum over positions where [S] of ids [T] with labels [S]; at [T]: position ids."""
        answer: AbstractContextManager[None] = nullcontext()
        if self.fused_loss or self._select:
            assert self._head is not None
            answer = self._head.answering(
                self._fused(labels, where) if self.fused_loss else self._selected(where)
            )
        with answer:
            out = self._forward(ids, at, pack)
        if self.fused_loss:
            return out.float().sum()
        if not len(where):
            return out.float().sum() * 0.0
        return loss_of_logits((out if self._select else out[where]).float(), labels, self._extras_now)

    @property
    def _extras_now(self) -> Extras:
        return self.extras if self._base.training else PLAIN

    def _fused(self, labels: Tensor, where: Tensor) -> Callable[[Tensor], Tensor]:
        """The head's answer [1, 1, 1]: the loss, divided by what the model will multiply it with."""

        def answer(hidden: Tensor) -> Tensor:
            assert self._head is not None
            head = self._head.linear
            hidden_TD = hidden[0].index_select(0, where)
            total, _ = linear_cross_entropy(
                hidden_TD, head.weight, labels, head.bias, scale=self._scale, extras=self._extras_now
            )
            return (total / self._scale).view(1, 1, 1)

        return answer

    def _selected(self, where: Tensor) -> Callable[[Tensor], Tensor]:
        """The head's answer [1, S, V]: logits of the learned positions (of the first where none is learned)."""

        def answer(hidden: Tensor) -> Tensor:
            assert self._head is not None
            return self._head.plain(hidden[:, where] if len(where) else hidden[:, :1])

        return answer

    # --- what may be used ----------------------------------------------------------------------------------

    def examine(self) -> None:
        """Ask the model, with two tiny documents, which fast paths are exact for it."""
        embedding = self._base.get_input_embeddings()
        device = embedding.weight.device
        documents = probe.Documents.make(_vocab_rows(self._base), device)
        with probe.undisturbed(self.model, device), multiplied_out(self._base):
            logits = self._examine_trainable(documents, embedding)
            self._examine_head(documents, logits)
            self._examine_packing(documents, embedding)

    def _examine_trainable(self, documents: probe.Documents, embedding: nn.Module) -> Tensor:
        """Logits of the second document, from transformers alone. ModelError unless it is a causal model."""
        name = _family(self._base)
        try:
            with torch.no_grad():
                logits = self._forward(documents.second)
            causal = probe.is_causal(self._forward, documents)
            gradient = probe.leak(
                embedding, lambda: self._forward(torch.cat([documents.first, documents.second]))
            )
        except Exception as error:
            raise ModelError(
                tr(f"{name} cannot be trained: {_brief(error)}", f"{name} 无法训练：{_brief(error)}"),
                remedy=tr(
                    "choose a causal language model (…ForCausalLM)", "请选择因果语言模型（…ForCausalLM）"
                ),
            ) from error
        if not causal or gradient == 0.0:
            raise ModelError(
                tr(
                    f"{name} is no causal language model: its predictions {'see later tokens' if not causal else 'do not depend on its past'}",
                    f"{name} 不是因果语言模型：它的预测{'能看到后面的 token' if not causal else '与前文无关'}",
                ),
                remedy=tr(
                    "choose a causal language model (…ForCausalLM)", "请选择因果语言模型（…ForCausalLM）"
                ),
            )
        return logits

    @torch.no_grad()
    def _examine_head(self, documents: probe.Documents, logits: Tensor) -> None:
        reason = self._try_head(documents, logits)
        if reason:
            self._note(
                tr(
                    f"loss: transformers' own logits, because {reason}",
                    f"损失：使用 transformers 自己的 logits，因为{reason}",
                )
            )

    def _try_head(self, documents: probe.Documents, logits: Tensor) -> str | None:
        """Set fused_loss, or _select, or neither; the reason when it is not fused."""
        if self._head is None:
            return tr("its head is no plain linear layer", "它的输出头不是普通线性层")
        ids, labels = documents.second, probe.next_tokens(documents.second)
        expected = probe.stock_loss(logits, labels)
        tolerance = probe.tolerance(logits.dtype)

        def planted(values: Tensor) -> Tensor:
            assert self._head is not None
            with self._head.answering(lambda hidden: values.unsqueeze(0)):
                return self._forward(ids)

        def exact() -> bool:
            try:
                return probe.apart(self._loss(ids, supervised(labels), ids[1:]), expected) <= tolerance
            except Exception:
                return False

        scale = probe.head_scale(planted, logits.shape[-1], logits)
        if scale is not None:
            self._scale, self.fused_loss = scale, True
            if exact():
                return None
            self.fused_loss = False
        self._select = True
        self._select = exact()
        if scale is None:
            return tr("it changes its logits after the head", "它在输出头之后还会改变 logits")
        return tr("the fused loss differs from its own", "融合损失与它自己的损失不一致")

    def _examine_packing(self, documents: probe.Documents, embedding: nn.Module) -> None:
        try:
            reason = self._try_packing(documents, embedding)
        except Unpackable as error:
            reason = str(error)
        except (
            Exception
        ):  # shapes that do not fit, arguments it does not know: whatever its own code runs into
            reason = tr("its attention is code of its own", "它的注意力是自己的实现")
        if reason is None:
            self.packed = True
        else:
            self._refuse_packing(reason)

    def _try_packing(self, documents: probe.Documents, embedding: nn.Module) -> str | None:
        """Replace the attention and compare; the reason when packing is not exact."""
        if getattr(getattr(self.model, "active_peft_config", None), "is_prompt_learning", False):
            return tr("its adapter adds tokens of its own", "它的适配器会添加自己的 token")
        first, second = documents.first, documents.second
        bounds = torch.tensor(
            [0, probe.FIRST, probe.FIRST + probe.SECOND], dtype=torch.int32, device=first.device
        )
        pack = Pack.of(bounds)
        positions = torch.cat([torch.arange(n, device=first.device) for n in pack.lengths])
        both = torch.cat([first, second])
        with torch.no_grad():
            alone = torch.cat([self._outputs(first), self._outputs(second)])
        tolerance = probe.tolerance(alone.dtype)
        self._attention.replace()
        if probe.leak(embedding, lambda: self._outputs(both, positions, pack)) != 0.0:
            return tr("its documents would see each other", "打包后样本之间会互相看见")
        with torch.no_grad():
            packed = self._outputs(both, positions, pack)
            swapped = self._outputs(torch.cat([documents.other, second]), positions, pack)
            again = self._outputs(second)
        if probe.apart(swapped[probe.FIRST :], packed[probe.FIRST :]) > tolerance:
            return tr("its documents would see each other", "打包后样本之间会互相看见")
        if probe.apart(packed, alone) > tolerance:
            return tr(
                "a packed document differs from the same one alone", "打包后的样本与单独计算的结果不一致"
            )
        if probe.apart(again, alone[probe.FIRST :]) > tolerance:
            return tr("it could not be used unpacked any more", "替换之后它不能再按原样使用")
        return None

    def _outputs(
        self, input_ids: Tensor, position_ids: Tensor | None = None, pack: Pack | None = None
    ) -> Tensor:
        """Hidden states as they meet the head, [T, D], where the head can be asked; else logits [T, V]."""
        if not self.fused_loss or self._head is None:
            return self._forward(input_ids, position_ids, pack)
        with self._head.answering(lambda hidden: hidden):
            return self._forward(input_ids, position_ids, pack)

    def _refuse_packing(self, reason: str) -> None:
        self._attention.restore()
        self.packed = False
        self._note(
            tr(
                f"packing: off, rows run one by one, because {reason}",
                f"打包：关闭，样本逐条计算，因为{reason}",
            )
        )

    def _note(self, reason: str) -> None:
        self.reasons.append(reason)
        self._say(reason)


class PackedAttention:
    """The model's attention, replaced and put back."""

    def __init__(self, base: nn.Module) -> None:
        self._base = base
        self._configs: list[tuple[Any, str]] = []
        self._changed: list[nn.Module] = []

    def replace(self) -> None:
        """Every config in the model names our attention, which is the old one whenever no pack is active."""
        seen: dict[int, Any] = {}
        for module in self._base.modules():
            config = getattr(module, "config", None)
            if config is not None and getattr(config, "_attn_implementation", None):
                seen[id(config)] = config
        self._configs = [(config, config._attn_implementation) for config in seen.values()]
        for config, original in self._configs:
            config._attn_implementation = register(original)
        self._changed = bloom.install(self._base)

    def restore(self) -> None:
        for config, original in self._configs:
            config._attn_implementation = original
        put_back(self._changed)
        self._configs, self._changed = [], []


def _family(base: Any) -> str:
    return f"{type(base).__name__} ({getattr(base.config, 'model_type', '?')})"


def _vocab_rows(base: Any) -> int:
    config = base.config.get_text_config()
    return int(getattr(config, "vocab_size", None) or base.get_input_embeddings().weight.shape[0])


def _brief(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return text if len(text) <= 120 else text[:117] + "..."
