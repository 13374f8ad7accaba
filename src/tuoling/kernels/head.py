"""The output head, asked from inside the model's own forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from tuoling.kernels.forwards import put_back, replace_forward

Answer = Callable[[Tensor], Tensor]
"""What is returned instead of logits for hidden states [1, T, D]."""


class Head:
    """A plain linear head whose forward another function can answer for, for a while.

    The module itself is called, so the hooks of sharded engines (ZeRO-3, FSDP) gather its weight first.
    Outside of `answering` it is what it was.
    """

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear
        self._plain = linear.forward
        self._answer: Answer | None = None
        replace_forward(linear, self._answered)

    def _answered(self, module: nn.Module, hidden: Tensor) -> Tensor:
        return self.plain(hidden) if self._answer is None else self._answer(hidden)

    def plain(self, hidden: Tensor) -> Tensor:
        """Logits, as ever."""
        return self._plain(hidden)

    @contextmanager
    def answering(self, answer: Answer) -> Iterator[None]:
        """`answer` is what the head returns inside."""
        self._answer = answer
        try:
            yield
        finally:
            self._answer = None

    def remove(self) -> None:
        """Put the module's own forward back."""
        put_back([self.linear])


def find_linear(base: Any) -> nn.Linear | None:
    """The plain floating-point linear layer that makes the logits, inside PEFT's full copy of it if it has one."""
    module = base.get_output_embeddings()
    copies = getattr(module, "modules_to_save", None)
    if copies is not None:
        active = getattr(module, "active_adapters", None) or ["default"]
        module = copies[active[0]] if len(active) == 1 and active[0] in copies else None
    if (
        not isinstance(module, nn.Linear)
        or not module.weight.is_floating_point()
        or hasattr(module, "base_layer")
    ):
        return None
    return module if "forward" not in module.__dict__ and type(module).forward is nn.Linear.forward else None
