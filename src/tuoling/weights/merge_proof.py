"""What a merge cost: the merged weights against the adapter beside its base, and against the base as trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuoling.errors import TuolingError
from tuoling.language import tr
from tuoling.weights.parity import Beside, Bound, Weights, gate, skipped

if TYPE_CHECKING:
    import numpy as np

    from tuoling.weights.merged import Weighted

LOW_BIT_RECORD = "parity_low_bit.json"

_ANY_LOSS = Bound(perplexity=1e9, top1=0.0)
"""The low-bit base is not what is merged into: its loss is told, and nothing is refused for it."""


@dataclass(frozen=True)
class AsTrained:
    """The adapter on its quantised base, as it was trained: loaded whole, in the process that asks for logits."""

    adapter: str
    base: str
    lora_alpha: float | None = None
    allow_remote_code: bool = False

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """[T, V] of one sequence."""
        import torch

        model = _load(self)
        with torch.no_grad():
            logits_TV = model(
                input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False
            ).logits[0]
        array: np.ndarray = logits_TV.float().cpu().numpy()
        return array


@lru_cache(maxsize=1)
def _load(side: AsTrained) -> Any:
    from tuoling.models.load import load_model
    from tuoling.models.source import find_model

    source = find_model(side.adapter, base=side.base, lora_alpha=side.lora_alpha)
    return load_model(source, dtype="fp32", allow_remote_code=side.allow_remote_code)


def prove(
    adapters: Sequence[Weighted],
    merged: Path,
    *,
    verify: bool,
    allow_remote_code: bool = False,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Compare the folder `merged` with its adapters unmerged; returns what its record says of it.

    Raises ParityError where the merged weights do not compute what the adapters do.
    """
    if not verify:
        skipped(merged)
        return {"verified": False}
    source = adapters[0].source
    parts = tuple(Beside(one.source.path.resolve(), one.weight, one.source.lora_alpha) for one in adapters)
    before = Weights(source.weights_path.resolve(), parts)
    parity = gate(before, merged, lossless=True, allow_remote_code=allow_remote_code, say=say)
    found: dict[str, Any] = {
        "verified": True,
        "max_logit_difference": parity.max_logit_difference,
        "perplexity": parity.perplexity_after,
    }
    if source.quantization and len(adapters) == 1:
        found["low_bit_route"] = _low_bit_route(adapters[0], merged, allow_remote_code, say)
    return found


def _low_bit_route(
    one: Weighted, merged: Path, allow_remote_code: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    """Loss of the adapter on the base it was trained on (8 or 4 bits) beside that of the merged 16-bit weights."""
    source = one.source
    places = str(source.path.resolve()), str(source.weights_path.resolve())
    side = AsTrained(*places, source.lora_alpha, allow_remote_code)
    found: dict[str, Any] = {"trained_on": str(source.quantization)}
    try:
        parity = gate(
            side,
            merged,
            lossless=False,
            bound=_ANY_LOSS,
            record=merged / LOW_BIT_RECORD,
            allow_remote_code=allow_remote_code,
            say=lambda line: None,
        )
    except TuolingError as error:
        say(
            tr(
                f"trained on a base in {source.quantization}; its loss could not be measured: {error.problem}",
                f"训练时基座为 {source.quantization}；未能测得该路线的损失：{error.problem}",
            )
        )
        return {**found, "not_measured": error.problem}
    as_trained, after = math.log(parity.perplexity_before), math.log(parity.perplexity_after)
    say(
        tr(
            f"loss on the probe texts: {as_trained:.4f} on the base in {source.quantization} as trained, "
            f"{after:.4f} merged into the unquantised base ({after - as_trained:+.4f})",
            f"探针文本上的损失：训练时的 {source.quantization} 基座 {as_trained:.4f}，"
            f"合并进未量化基座 {after:.4f}（{after - as_trained:+.4f}）",
        )
    )
    return {**found, "loss_as_trained": as_trained, "loss_merged": after}
