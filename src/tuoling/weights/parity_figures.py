"""What the parity gate measured, how far apart two sides may be, and the table that a person reads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.cells import cell_len

from tuoling.language import tr

ENGINE_TOLERANCE = 0.02
"""Spreads, for an engine that rounds activations as well as weights: llama.cpp keeps float16 keys and values and
differs by 1e-3 of logits whose spread is about 1 (random models in float32)."""


@dataclass(frozen=True, slots=True)
class Bound:
    """What a lossy step may cost. perplexity: largest ratio after/before. top1: smallest agreement."""

    perplexity: float = 1.5
    top1: float = 0.5


@dataclass(frozen=True, slots=True)
class Greedy:
    """Greedy text after the beginning of one probe, on both sides."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Parity:
    """What was measured, and the verdict. Logits are compared at every position of every probe.

    tolerance:   largest `max_logit_difference` that passes; None for a lossy step (`bound` counts there).
    spread:      standard deviation of the logits before over the vocabulary, so that differences can be judged.
    rounding_difference: largest difference that merging and storing in a narrower type make; None where there is none.
    columns:     words of the vocabulary that were compared (fewer than all after pruning).
    streamed:    by side, whether it ran layer by layer; else why not.
    peak_gib:    private memory of the child above the level after its imports (clean mapped pages not counted).
    resident_peak_gib: the same with mapped weight files, which the system drops when memory is needed.
    """

    passed: bool
    lossless: bool
    max_logit_difference: float
    tolerance: float | None
    spread: float
    top1_agreement: float
    perplexity_before: float
    perplexity_after: float
    greedy_equal: bool
    greedy: tuple[Greedy, ...]
    positions: int
    columns: int
    peak_gib: float | None
    resident_peak_gib: float | None
    seconds: float
    bound: Bound | None = None
    rounding_difference: float | None = None
    streamed: dict[str, str] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()


def judge(measured: Mapping[str, Any], *, lossless: bool, bound: Bound | None, seconds: float) -> Parity:
    """The verdict on the child's figures."""
    found = dict(measured)
    route, layers, stored_as = found.pop("route"), found.pop("layers"), found.pop("stored_as")
    found["greedy"] = tuple(Greedy(**text) for text in found["greedy"])
    tolerance = None
    if lossless:
        rule = {"same": lambda *_: 0.0, "merged": merge_tolerance, "other": rounding_tolerance}[route]
        tolerance, bound = rule(stored_as, layers) * found["spread"], None
    else:
        bound = bound or Bound()
    reasons = tuple(_reasons(found, tolerance, bound))
    return Parity(
        passed=not reasons,
        lossless=lossless,
        tolerance=tolerance,
        bound=bound,
        reasons=reasons,
        seconds=round(seconds, 1),
        **found,
    )


UNITS = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Half of each type's eps: the largest relative error of rounding to it."""

SUMS = 2.0**-17
"""Relative error of float32 sums in another order: sqrt(4096) terms x 2^-24 is 2^-18."""


def rounding_tolerance(stored_as: str | None, layers: int) -> float:
    """Largest difference, in spreads, between weights and their rounding; None: an engine computed one side.

    Each matmul adds a relative error of about 0.4 u (u: see `UNITS`), four such in each layer, added in the square:
    0.8 u sqrt(layers); of ten million logits the largest lies 5.3 deviations out: 4.2 u sqrt(layers). Layers amplify
    what comes in: measured 10 and 16 u sqrt(layers) on small random models in bf16 and fp16. So 24.
    """
    if stored_as is None:
        return ENGINE_TOLERANCE
    return (24 * UNITS.get(stored_as, UNITS["float32"]) + SUMS) * math.sqrt(layers + 1)


def merge_tolerance(stored_as: str | None, layers: int) -> float:
    """Largest difference, in spreads, between two merges that add in another order.

    Sums that differ by 2^-24 fall on two sides of a rounding point with a chance of about 2^-24 / u, at most 2^-13
    for fp16 and 2^-16 for bf16, so that the error is at most 2^-6.5 of that of rounding all weights.
    """
    return 2.0**-6 * rounding_tolerance(stored_as or "float32", layers) + SUMS * math.sqrt(layers + 1)


def _reasons(found: Mapping[str, Any], tolerance: float | None, bound: Bound | None) -> Iterator[str]:
    """Why it does not pass; nothing where it does."""
    difference = found["max_logit_difference"]
    if tolerance is not None and not difference <= tolerance:  # NaN is no proof
        yield tr(
            f"logits differ by {difference:.3g}, allowed {tolerance:.3g}",
            f"logits 相差 {difference:.3g}，允许 {tolerance:.3g}",
        )
    if bound is None:
        return
    ratio, agreement = found["perplexity_after"] / found["perplexity_before"], found["top1_agreement"]
    if not ratio <= bound.perplexity:
        yield tr(
            f"perplexity x {ratio:.3g}, allowed x {bound.perplexity:.3g}",
            f"困惑度变为 {ratio:.3g} 倍，允许 {bound.perplexity:.3g} 倍",
        )
    if agreement < bound.top1:
        yield tr(
            f"the best next word agrees at {agreement:.1%} of positions, {bound.top1:.0%} needed",
            f"首选词在 {agreement:.1%} 的位置一致，至少应为 {bound.top1:.0%}",
        )


def table(parity: Parity) -> list[str]:
    """The figures for a person, one line each."""
    change = parity.perplexity_after / parity.perplexity_before - 1
    allowed = (
        tr(f"allowed {parity.tolerance:.3g}", f"允许 {parity.tolerance:.3g}")
        if parity.tolerance is not None
        else tr("the price of this step", "这一步的代价")
    )
    unequal = sum(text.before != text.after for text in parity.greedy)
    rows = [
        (
            tr("largest logit difference", "logits 最大差"),
            f"{parity.max_logit_difference:.3g} ({allowed}; "
            + tr(f"spread {parity.spread:.3g})", f"标准差 {parity.spread:.3g}）").replace("）", ")"),
        ),
        (tr("best next word agrees", "首选词一致"), f"{parity.top1_agreement:.2%}"),
        (
            tr("perplexity", "困惑度"),
            f"{parity.perplexity_before:.4f} → {parity.perplexity_after:.4f} ({change:+.2%})",
        ),
        (
            tr("greedy text", "贪心文本"),
            tr("equal", "相同")
            if parity.greedy_equal
            else tr(
                f"differs on {unequal} of {len(parity.greedy)}",
                f"{len(parity.greedy)} 条中有 {unequal} 条不同",
            ),
        ),
    ]
    if parity.rounding_difference is not None:
        rows.insert(
            1, (tr("of merging, rounding", "合并与舍入带来的差"), f"{parity.rounding_difference:.3g}")
        )
    rows += [
        (tr(f"{side} ran", {"before": "转换前", "after": "转换后"}[side]), how)
        for side, how in parity.streamed.items()
        if how != "streamed"
    ]
    memory = "" if parity.peak_gib is None else f"{parity.peak_gib:.2f} GiB, "
    rows.append((tr("memory, time", "内存、用时"), f"{memory}{parity.seconds:.0f} s"))
    verdict = tr("passed", "通过") if parity.passed else tr("NOT passed", "未通过")
    positions = tr(
        f"{parity.positions} positions of {len(parity.greedy)} probes, {parity.columns} words",
        f"{len(parity.greedy)} 条探针 {parity.positions} 个位置，{parity.columns} 个词",
    )
    width = max(cell_len(label) for label, _ in rows)
    lines = [f"  {label}{' ' * (width - cell_len(label))}  {value}" for label, value in rows]
    return [tr(f"parity {verdict}: {positions}", f"一致性检查{verdict}：{positions}"), *lines]


def as_record(parity: Parity) -> dict[str, Any]:
    """What parity.json holds: the verdict first."""
    return {**asdict(parity), "verified": True}
