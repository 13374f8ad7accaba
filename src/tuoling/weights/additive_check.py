"""What tells whether an additive diff came out right: a record, the sum of all weights, or sense."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tuoling.errors import ModelError
from tuoling.language import tr

ALPACA_7B_SUM = 50637.1836
SUM_TOLERANCE = 0.01
PART = 1 << 20
"""Numbers at once where torch would copy a whole tensor into another type."""


class Recovered:
    """Sums over the recovered weights, and how far they are from the target."""

    def __init__(self) -> None:
        self.total = 0.0
        self._total_float32 = torch.zeros(())
        self.base_square = 0.0
        self.difference_square = 0.0
        self._unlike: dict[str, float] = {}

    def add(self, made: torch.Tensor) -> None:
        """Add up as Stanford's script does (float32, tensor by tensor, in their order), and exactly."""
        self._total_float32 = self._total_float32 + made.sum()
        self.total += sum(float(part.sum(dtype=torch.float64)) for part in made.flatten().split(PART))

    def compare(self, name: str, made: torch.Tensor, wanted: torch.Tensor) -> None:
        """Remember where adding does not undo the subtraction."""
        if not torch.equal(made, wanted):
            pairs = zip(made.flatten().split(PART), wanted.flatten().split(PART), strict=True)
            self._unlike[name] = max(float((a.float() - b.float()).abs().max()) for a, b in pairs)

    def adds_up_to(self, expected: float) -> bool:
        """Whether either sum is the published one; float32 loses up to some hundredths on the way."""
        return any(
            abs(total - expected) <= SUM_TOLERANCE for total in (self.total, float(self._total_float32))
        )

    def sum_note(self) -> str:
        """The sum, and whose it is."""
        text = tr(f"all weights add up to {self.total:.4f}", f"全部权重之和为 {self.total:.4f}")
        if self.adds_up_to(ALPACA_7B_SUM):
            text += tr(", as Stanford published of Alpaca-7B", "，与斯坦福公布的 Alpaca-7B 一致")
        return text

    def loss_notes(self) -> list[str]:
        """What an additive diff loses."""
        if not self._unlike:
            return []
        count, most = len(self._unlike), max(self._unlike.values())
        return [
            tr(
                f"{count} tensors come back rounded, by {most:.3g} at most; --format tuoling loses nothing",
                f"{count} 个张量还原后有舍入误差，最大 {most:.3g}；--format tuoling 没有损失",
            )
        ]


def judge(
    recovered: Recovered, expected_sum: float | None, record: Mapping[str, Any] | None, diff: Path
) -> tuple[str, list[str]]:
    """What proves the result, and what to note. Raises ModelError where something proves the contrary."""
    if expected_sum is not None and not recovered.adds_up_to(expected_sum):
        raise wrong(
            diff,
            tr(
                f"all weights add up to {recovered.total:.4f}, not to {expected_sum:.4f}",
                f"全部权重之和为 {recovered.total:.4f}，不是 {expected_sum:.4f}",
            ),
        )
    if record is not None:
        return tr("SHA-256 of every tensor", "每个张量的 SHA-256"), []
    if expected_sum is not None or recovered.adds_up_to(ALPACA_7B_SUM):
        return tr("the sum of all weights", "全部权重之和"), []
    if recovered.difference_square > recovered.base_square / 4:
        raise ModelError(
            tr(
                "this looks like a whole model, not like a difference: its weights are as large as the base's",
                "这看起来是完整的模型而不是差分：其权重与基础模型一样大",
            ),
            where=str(diff),
            remedy=tr(
                "if it is one, give the sum that was published: --sum",
                "若确是差分，请用 --sum 给出公布的权重之和",
            ),
        )
    return "", [
        tr(
            "nothing says what the result should be; compare the sum with the published one, or give it: --sum",
            "没有任何依据可以校验结果；请与公布的权重之和比对，或用 --sum 给出",
        )
    ]


def wrong(path: Path, problem: str) -> ModelError:
    return ModelError(
        tr(f"the result is wrong: {problem}", f"结果不对：{problem}"),
        where=str(path),
        remedy=tr(
            "either this is not the base of the diff, or the diff is cut or damaged",
            "或者基础模型不对，或者差分被截断、损坏",
        ),
    )
