"""Small questions put to the actual model before its fast paths are trusted.

Everything is asked with two documents of 7 and 9 tokens, in eval mode, and leaves no trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FIRST, SECOND = 7, 9
"""Lengths of the two documents."""


@dataclass(frozen=True, slots=True)
class Documents:
    """Two documents and a third that only replaces the first: [7], [9], [7] ids."""

    first: Tensor
    second: Tensor
    other: Tensor

    @staticmethod
    def make(vocab_rows: int, device: torch.device) -> Documents:
        """Spread over the vocabulary, never twice the same id in a row, and the same every time."""
        step = max(1, vocab_rows // 37)
        ids = [(3 + step * (5 * i + i // 7)) % vocab_rows for i in range(2 * FIRST + SECOND)]
        tensor = torch.tensor(ids, device=device)
        return Documents(tensor[:FIRST], tensor[FIRST : FIRST + SECOND], tensor[FIRST + SECOND :])


def next_tokens(ids: Tensor) -> Tensor:
    """Labels of a document whose every token is learned: the next id, and nothing after the last."""
    return torch.cat([ids[1:], ids.new_full((1,), -100)])


def tolerance(dtype: torch.dtype) -> float:
    """Relative difference that order of summation alone explains."""
    return {torch.float64: 1e-9, torch.float32: 2e-5}.get(dtype, 3e-2)


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Relative distance of two tensors of one shape; infinite where one is not finite."""
    ours, theirs = ours.float(), theirs.float()
    if ours.shape != theirs.shape or not bool(ours.isfinite().all()):
        return float("inf")
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-12))


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode, no autocast; modes of all modules and random states are put back."""
    modes = [(module, module.training) for module in model.modules()]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.autocast(device.type, enabled=False):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


@torch.no_grad()
def is_causal(logits_of: Callable[[Tensor], Tensor], documents: Documents) -> bool:
    """True when a later token does not change what comes before it. logits_of: [T] ids → [T, V]."""
    changed = documents.second.clone()
    changed[-1] = documents.other[0]
    before, after = logits_of(documents.second), logits_of(changed)
    return apart(after[:-1], before[:-1]) <= tolerance(before.dtype) and not torch.equal(
        before[-1], after[-1]
    )


def stock_loss(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """Summed cross entropy in nats the plain way, softmax in float32, over learned positions only."""
    learned = labels_T != -100
    return F.cross_entropy(logits_TV[learned].float(), labels_T[learned], reduction="sum")


def leak(embedding: nn.Module, run: Callable[[], Tensor]) -> float:
    """How far the second document's outputs depend on the first one's embeddings: exactly 0 when packed right.

    run: forward of the pack → [T, *] outputs. Asked of the gradient, so that no rounding hides it.
    """
    seen: list[Tensor] = []

    def watch(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        seen.append(leaf)
        return leaf

    handle = embedding.register_forward_hook(watch)
    try:
        with torch.enable_grad():
            second = run()[FIRST:].float()
            weights = torch.linspace(-1.0, 1.0, second.numel(), device=second.device).view_as(second)
            (gradient,) = torch.autograd.grad((second * weights).sum(), seen[0])
    finally:
        handle.remove()
    gradient = gradient.reshape(-1, gradient.shape[-1])[:FIRST]
    return float(gradient.abs().max())


def head_scale(run: Callable[[Tensor], Tensor], vocab_rows: int, like: Tensor) -> float | None:
    """Factor between what the head returns and the logits that come out; None when it is no constant.

    run: forward of one document with the head's output replaced by the argument → the logits that come out.
    Values up to 60 show a soft cap that small random weights would hide.
    """
    planted = (
        torch.linspace(-60.0, 60.0, SECOND * vocab_rows, device=like.device).to(like.dtype).view(SECOND, -1)
    )
    came = run(planted)
    if came.shape != planted.shape:
        return None
    planted, came = planted.float(), came.float()
    scale = float((came * planted).sum() / (planted * planted).sum())
    return scale if apart(came, planted * scale) <= (1e-6 if like.dtype == torch.float32 else 6e-3) else None
