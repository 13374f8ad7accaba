"""Cross entropy of a linear head without ever holding its logits.

Shapes: T supervised positions, D hidden size, V vocabulary rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 128 * 2**20
"""Budget for one chunk of logits. 250,880 words in bf16: 256 positions a chunk, where the whole of a
4,096-token step would take 2 GB, and 4 GB more for its softmax in float32."""

CACHED_BYTES = 30 * 2**20
CACHED_ROWS = 256
"""Budget on a CPU for a head that is not trained: a chunk near its cache's size, of at least so many positions. The
peak of a LoRA step of LLaMA 8 x 512 with 50,432 words fell from 1.62 to 1.49 GiB, its losses and CPU time stayed the
same. A trained head adds up its gradient once a chunk, which many chunks would make dear."""

ROWS_MULTIPLE = 32
"""Chunks are whole tiles of the matmul: with 267 rows it ran at 296 GF/s, with 256 at 350 (BLOOM's head, bf16)."""

BLOCK_BYTES = 8 * 2**20
"""Float32 rows worked on at once on a CPU: few enough to stay near, enough to share a launch's cost."""

SLAB_ROWS = 16384
"""Rows of the head whose gradient is added up at once: a temporary of 16 MB at D = 512, not of 257 MB."""

SMALLEST_SHARE = 1e-30


@dataclass(frozen=True, slots=True)
class Extras:
    """What is added to the cross entropy of a position; with both 0 nothing is, and nothing is paid for it.

    label_smoothing: this share of the label's weight is spread over all words, the label's own among them
    (Szegedy et al. 2016, as torch and transformers count it). z_loss: times the squared log-sum-exp of the logits,
    which holds them near 0 (PaLM, Chowdhery et al. 2022: 1e-4).
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.label_smoothing or self.z_loss)


PLAIN = Extras()


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    bias_V: Tensor | None = None,
    *,
    scale: float = 1.0,
    extras: Extras = PLAIN,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, int]:
    """Sum in nats of the cross entropy of `scale * (hidden @ weight.T + bias)`, and the number of positions.

    Every position is supervised: choose them before (see `supervised`). Never divides. The gradient is made
    while the logits are at hand, so nothing of size V is kept for the backward pass; a head that asks for no
    gradient costs none. Matmuls run in the dtype that `F.linear` would use here (autocast included), the
    softmax and all sums in float32. With no positions the sum is a zero that stays attached to both inputs.
    """
    count = labels_T.numel()
    if count == 0:
        zero = hidden_TD.sum() * 0.0 + weight_VD.sum() * 0.0
        return (zero if bias_V is None else zero + bias_V.sum() * 0.0).float(), 0
    total: Tensor = _LinearCrossEntropy.apply(
        hidden_TD, weight_VD, bias_V, labels_T, scale, extras, chunk_bytes
    )
    return total, count


def supervised(labels_T: Tensor, ignore_index: int = -100) -> Tensor:
    """Indices of the positions that are learned."""
    return torch.nonzero(labels_T != ignore_index).squeeze(1)


def reference_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    bias_V: Tensor | None = None,
    *,
    scale: float = 1.0,
    extras: Extras = PLAIN,
) -> Tensor:
    """The same sum, plainly and in float64: the oracle of the tests and benchmarks."""
    logits_TV = F.linear(hidden_TD.double(), weight_VD.double(), None if bias_V is None else bias_V.double())
    return loss_of_logits(logits_TV * scale, labels_T, extras)


def loss_of_logits(logits_TV: Tensor, labels_T: Tensor, extras: Extras = PLAIN) -> Tensor:
    """The sum where logits are at hand anyway, in their own dtype."""
    total = F.cross_entropy(logits_TV, labels_T, reduction="sum", label_smoothing=extras.label_smoothing)
    return total + extras.z_loss * logits_TV.logsumexp(1).square().sum() if extras.z_loss else total


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_T: Tensor,
        scale: float,
        extras: Extras,
        chunk_bytes: int,
    ) -> Tensor:
        device = hidden_TD.device.type
        dtype = hidden_TD.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        with torch.autocast(device, enabled=False):
            head_VD = weight_VD.to(dtype)
            shift_V = None if bias_V is None else bias_V.to(dtype)
            grads = _Gradients(
                torch.empty_like(hidden_TD) if needs_hidden else None,
                torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None,
                torch.zeros_like(bias_V, dtype=torch.float32) if needs_bias and bias_V is not None else None,
            )
            if device == "cpu" and not needs_weight:
                chunk_bytes = min(chunk_bytes, cached_chunk_bytes(head_VD.shape[0] * head_VD.element_size()))
            scratch = _Scratch(head_VD, min(_rows_of_chunk(head_VD, chunk_bytes), labels_T.numel()))
            total = torch.zeros((), dtype=torch.float64, device=hidden_TD.device)
            for start in range(0, labels_T.numel(), scratch.rows):
                part_TD = hidden_TD[start : start + scratch.rows].to(dtype)
                logits_TV = scratch.logits(part_TD, head_VD, shift_V)
                labels = labels_T[start : start + scratch.rows]
                total += _softmax_gradient_(logits_TV, labels, scale, extras, grads.wanted, scratch)
                grads.add(logits_TV, part_TD, head_VD, start)
        ctx.grads = grads
        ctx.dtypes = (weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        return total.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads: _Gradients = ctx.grads
        ctx.grads = None  # handed over once: the head's gradient is too large to keep a second copy of
        if grads is None:
            raise RuntimeError(
                "linear_cross_entropy: backward a second time; its gradient was already handed over"
            )
        weight_dtype, bias_dtype = ctx.dtypes
        hidden = grads.hidden
        if (
            hidden is not None and hidden.dtype == torch.float16
        ):  # the scale of fp16's loss may be above its range
            hidden = hidden.float().mul_(grad).to(torch.float16)
        elif hidden is not None:
            hidden.mul_(grad.to(hidden.dtype))
        weight = None if grads.weight is None else grads.weight.mul_(grad).to(weight_dtype)
        bias = None if grads.bias is None else grads.bias.mul_(grad).to(bias_dtype)
        return hidden, weight, bias, None, None, None, None


def cached_chunk_bytes(row_bytes: int) -> int:
    """The budget for logits whose gradient goes into no head, on a CPU. row_bytes: logits of one position."""
    return min(CHUNK_BYTES, max(CACHED_BYTES, CACHED_ROWS * row_bytes))


def _rows_of_chunk(head_VD: Tensor, chunk_bytes: int) -> int:
    rows = max(1, chunk_bytes // (head_VD.shape[0] * head_VD.element_size()))
    return rows - rows % ROWS_MULTIPLE if rows > ROWS_MULTIPLE else rows


class _Scratch:
    """Memory every chunk uses again: fresh pages for each chunk's logits cost a third of their matmul on a CPU."""

    def __init__(self, head_VD: Tensor, rows: int) -> None:
        words = head_VD.shape[0]
        self.rows = rows
        self._logits_TV = head_VD.new_empty(rows, words)
        block = rows
        if head_VD.device.type == "cpu":
            block = min(rows, max(1, BLOCK_BYTES // (4 * words)))
        self.scores_TV = head_VD.new_empty(block, words, dtype=torch.float32)
        self.shares_TV = torch.empty_like(self.scores_TV)

    def logits(self, part_TD: Tensor, head_VD: Tensor, shift_V: Tensor | None) -> Tensor:
        """part @ head.T + shift, written over the last chunk's."""
        out = self._logits_TV[: len(part_TD)]
        if shift_V is None:
            return torch.mm(part_TD, head_VD.T, out=out)
        return torch.addmm(shift_V, part_TD, head_VD.T, out=out)


class _Gradients:
    """What the inputs asked for, filled chunk by chunk. Weight and bias are summed in float32."""

    def __init__(self, hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias

    @property
    def wanted(self) -> bool:
        return self.hidden is not None or self.weight is not None or self.bias is not None

    def add(self, slope_TV: Tensor, part_TD: Tensor, head_VD: Tensor, start: int) -> None:
        """Add a chunk's part; slope_TV is d(sum)/d(logits) in the matmul's dtype."""
        if self.hidden is not None:
            self.hidden[start : start + len(part_TD)] = slope_TV @ head_VD
        if self.weight is not None:
            for slab_SD, slope_TS in zip(
                self.weight.split(SLAB_ROWS), slope_TV.split(SLAB_ROWS, dim=1), strict=True
            ):
                if slope_TV.dtype == slab_SD.dtype:
                    slab_SD.addmm_(slope_TS.T, part_TD)
                else:
                    slab_SD += slope_TS.T @ part_TD
        if self.bias is not None:
            self.bias += slope_TV.sum(0, dtype=torch.float32)


def _softmax_gradient_(
    logits_TV: Tensor, labels_T: Tensor, scale: float, extras: Extras, gradient: bool, scratch: _Scratch
) -> Tensor:
    """Cross entropy of the rows, summed in float64; logits_TV becomes its gradient, in place.

    One softmax in float32 serves both: the loss is -log of the label's share. Written out (max, subtract,
    exp, sum, divide) it took twice as long on two busy cores. A share under 1e-30 (a loss over 69 nats) is
    near the end of float32, so such a block's loss is taken from a log-softmax instead.
    """
    total = torch.zeros((), dtype=torch.float64, device=logits_TV.device)
    rows = len(scratch.scores_TV)
    for block_TV, labels in zip(logits_TV.split(rows), labels_T.split(rows), strict=True):
        scores = scratch.scores_TV[: len(block_TV)].copy_(block_TV)
        if scale != 1.0:
            scores *= scale
        index = labels.unsqueeze(1)
        shares = torch.softmax(scores, 1, out=scratch.shares_TV[: len(block_TV)])
        picked = shares.gather(1, index)
        if extras:
            total += _extras_(scores, shares, index, extras)
        elif bool((picked < SMALLEST_SHARE).any()):
            total += F.cross_entropy(scores, labels, reduction="none").sum(dtype=torch.float64)
        else:
            total -= picked.log().sum(dtype=torch.float64)
        if gradient:
            shares.scatter_add_(1, index, torch.full_like(picked, extras.label_smoothing - 1.0))
            block_TV.copy_(shares if scale == 1.0 else shares.mul_(scale))
    return total


def _extras_(scores_TV: Tensor, shares_TV: Tensor, index_T1: Tensor, extras: Extras) -> Tensor:
    """Sum of the whole loss of a block; shares_TV becomes its gradient but for what the label itself takes off."""
    logsumexp_T1 = scores_TV.logsumexp(1, keepdim=True)
    smoothing, z_loss = extras.label_smoothing, extras.z_loss
    label_T1 = scores_TV.gather(1, index_T1)
    expected_T1 = (1.0 - smoothing) * label_T1 + smoothing * scores_TV.mean(1, keepdim=True)
    if z_loss:
        shares_TV *= 1.0 + 2.0 * z_loss * logsumexp_T1
    if smoothing:
        shares_TV -= smoothing / scores_TV.shape[1]
    return (logsumexp_T1 - expected_T1 + z_loss * logsumexp_T1.square()).sum(dtype=torch.float64)
