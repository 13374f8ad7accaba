"""Several adapters on one base in memory, and which of them computes: chosen by the thread that asks, forward by forward."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftModel


class AdapterSwitch:
    """Sets a PEFT model to one of its adapters, or to none, for each forward that a thread asks for.

    PEFT keeps "the active adapter" in every layer of the model. Two answers at the same time want two adapters: so a
    forward has the layers to itself, from before they are set until its logits are there. Setting costs a walk over
    the layers, and only where the adapter is another one than that of the forward before.
    """

    def __init__(self, model: PeftModel, standard: str | None) -> None:
        """standard: PEFT's name of the adapter for threads that ask for none; None: the bare base."""
        self._tuner: Any = model.base_model
        self._turn = threading.RLock()
        self._wanted = threading.local()
        self._standard = standard
        self._active: str | None = model.active_adapter
        inner: Any = model.get_base_model()
        inner.register_forward_pre_hook(self._before)
        inner.register_forward_hook(self._after, always_call=True)

    @contextmanager
    def using(self, layers: str | None) -> Iterator[None]:
        """Within, this thread's forwards run with the adapter of this name; None: with the bare base."""
        before = getattr(self._wanted, "layers", self._standard)
        self._wanted.layers = layers
        try:
            yield
        finally:
            self._wanted.layers = before

    def _before(self, module: Any, args: Any) -> None:
        self._turn.acquire()
        self._set(getattr(self._wanted, "layers", self._standard))

    def _after(self, module: Any, args: Any, output: Any) -> None:
        self._turn.release()

    def _set(self, layers: str | None) -> None:
        if layers == self._active:
            return
        if layers is None:
            self._tuner.disable_adapter_layers()
        else:
            if self._active is None:
                self._tuner.enable_adapter_layers()
            self._tuner.set_adapter(layers, inference_mode=True)
        self._active = layers
