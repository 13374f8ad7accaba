"""A written GGUF file against the weights it was made of: llama.cpp answers the parity gate's probes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tuoling import environment
from tuoling.errors import MissingPackage
from tuoling.files import write_json
from tuoling.infer.llamacpp import LlamaModel, llama_library
from tuoling.language import tr
from tuoling.models.source import ModelSource
from tuoling.weights.parity import Beside, Bound, Parity, Weights, gate, record_of

if TYPE_CHECKING:
    from collections.abc import Mapping

_BOUNDS: Mapping[str, Bound] = {
    "q4": Bound(perplexity=2.0, top1=0.3),
    "q3": Bound(perplexity=3.0, top1=0.3),
    "q2": Bound(perplexity=10.0, top1=0.1),
}
"""What the lowest types may cost; the others keep the gate's usual bound. Small models with many words of nearly the
same likelihood change their best word often: the figures are shown, the bound only catches what is broken."""


@dataclass
class GgufLogits:
    """A GGUF file as a side of the parity gate. It is opened in the gate's child, on first use."""

    path: Path
    _model: LlamaModel | None = None

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits [T, V] behind each of the T ids, with keys and values in float32."""
        if self._model is None:
            self._model = LlamaModel(self.path, exact=True, threads=environment.compute_threads())
        return np.stack(self._model.logits_of(ids, range(len(ids))))


def verify(
    source: ModelSource, out: Path, outtype: str, *, allow_remote_code: bool = False
) -> tuple[Parity | None, list[str]]:
    """Compare, and write the figures beside `out`; without llama-cpp-python that is written down and told.

    f32 must agree as closely as another engine can; lower types within a bound on perplexity and best words.
    """
    try:
        llama_library()
    except MissingPackage as error:
        write_json(record_of(out), {"verified": False, "why": error.problem})
        said = error.problem
        return None, [tr(f"not verified: {said}", f"未验证：{said}")]
    adapters = (Beside(source.path, lora_alpha=source.lora_alpha),) if source.is_adapter else ()
    before = Weights(source.weights_path, adapters)
    lossless = outtype == "f32"
    bound = None if lossless else _BOUNDS.get(outtype[:2], Bound())
    parity = gate(
        before,
        GgufLogits(out),
        lossless=lossless,
        bound=bound,
        record=record_of(out),
        allow_remote_code=allow_remote_code,
    )
    return parity, []
