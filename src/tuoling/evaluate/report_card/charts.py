"""Charts as inline SVG: they print sharp, follow the page's colours, and need nothing from outside."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 760
LEFT, RIGHT, TOP, BOTTOM = 52, 52, 14, 34
MOST_POINTS = 600
"""Points a line keeps: more than one a pixel only make the file large."""


@dataclass(frozen=True, slots=True)
class Line:
    """points: (x, y), x rising. style: a class of the page's style sheet. right: on the axis at the right."""

    points: Sequence[tuple[float, float]]
    style: str
    dots: bool = False
    right: bool = False


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from low to high, about `count` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS, each the mean of as many neighbours; the last one stays as it is."""
    if len(points) <= MOST_POINTS:
        return list(points)
    size = math.ceil(len(points) / MOST_POINTS)
    blocks = [points[start : start + size] for start in range(0, len(points), size)]
    means = [
        (sum(x for x, _ in block) / len(block), sum(y for _, y in block) / len(block)) for block in blocks
    ]
    return [*means, points[-1]]


def line_chart(
    lines: Sequence[Line],
    *,
    height: int = 250,
    left_label: Callable[[float], str] = lambda value: f"{value:g}",
    right_label: Callable[[float], str] = lambda value: f"{value:g}",
    from_zero: bool = True,
) -> str:
    """Lines over steps; `right` ones have their own axis."""
    shown = [line for line in lines if line.points]
    xs = [x for line in shown for x, _ in line.points]
    low_x, high_x = min(xs), max(max(xs), min(xs) + 1)
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img">']

    def place_x(x: float) -> float:
        return LEFT + (x - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)

    for tick in nice_ticks(low_x, high_x, 8):
        parts.append(
            f'<text class="tick" x="{place_x(tick):.1f}" y="{height - 12}" text-anchor="middle">{tick:g}</text>'
        )
    for right in (False, True):
        group = [line for line in shown if line.right is right]
        if not group:
            continue
        ys = [y for line in group for _, y in line.points]
        low_y, high_y = (0.0 if from_zero and min(ys) >= 0 else min(ys)), max(ys)
        high_y = high_y + (high_y - low_y) * 0.06 if high_y > low_y else low_y + 1

        def place_y(y: float, low: float = low_y, high: float = high_y) -> float:
            return height - BOTTOM - (y - low) / (high - low) * (height - TOP - BOTTOM)

        for tick in nice_ticks(low_y, high_y, 4):
            y = place_y(tick)
            if not right:
                parts.append(
                    f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                )
            x, anchor = (WIDTH - RIGHT + 7, "start") if right else (LEFT - 7, "end")
            label = escape((right_label if right else left_label)(tick))
            parts.append(
                f'<text class="tick" x="{x}" y="{y + 3.5:.1f}" text-anchor="{anchor}">{label}</text>'
            )
        for line in group:
            path = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in thinned(line.points))
            parts.append(f'<polyline class="{line.style}" points="{path}"/>')
            if line.dots:
                parts += [
                    f'<circle class="{line.style}" cx="{place_x(x):.1f}" cy="{place_y(y):.1f}" r="3.5"/>'
                    for x, y in line.points
                ]
    return "".join([*parts, "</svg>"])


@dataclass(frozen=True, slots=True)
class Bar:
    """One class: its label as HTML, and a (mean, low, high) a side, None where a side has none."""

    label: str
    sides: Sequence[tuple[float, float, float] | None]


COLOURS = ("before", "after", "third", "fourth")


def colour_of(number: int, count: int) -> str:
    """The style of a side's bars: the base pale, the tuned one strong, further ones in colours of their own."""
    return "after" if count == 1 else COLOURS[min(number, len(COLOURS) - 1)]


def bar_chart(bars: Sequence[Bar], *, highest: float = 1.0) -> str:
    """Bars a class with the interval as a whisker, the first side pale, the last strong. Labels are HTML beside them."""
    rows = []
    for bar in bars:
        count = len(bar.sides)
        lane = 15
        height = lane * count + 4
        parts = [f'<svg class="bars" viewBox="0 0 520 {height}" preserveAspectRatio="none" role="img">']
        for quarter in range(5):
            x = 4 + quarter * 128 - 0.5
            parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="0" y2="{height}"/>')
        for number, side in enumerate(bar.sides):
            if side is None:
                continue
            mean, low, high = (4 + 512 * max(0.0, min(1.0, value / highest)) for value in side)
            y = 2 + lane * number
            style = colour_of(number, count)
            parts.append(
                f'<rect class="{style}" x="4" y="{y + 2}" width="{max(1.0, mean - 4):.1f}" height="{lane - 4}" rx="2"/>'
            )
            middle = y + lane / 2
            parts.append(
                f'<path class="whisker" d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 3}v6M{high:.1f} {middle - 3}v6"/>'
            )
        rows.append(f'<div class="barlabel">{bar.label}</div>{"".join([*parts, "</svg>"])}')
    return f'<div class="bargrid">{"".join(rows)}</div>'


def histogram(counts: Sequence[tuple[str, int]]) -> str:
    """Columns with their labels below; the height is the count."""
    most = max((count for _, count in counts), default=0) or 1
    height, width = 150, max(28, min(64, 700 // max(1, len(counts))))
    wide = width * len(counts) + 10
    parts = [f'<svg class="chart small" viewBox="0 0 {wide} {height}" style="max-width:{wide}px" role="img">']
    for number, (label, count) in enumerate(counts):
        tall = (height - 40) * count / most
        x = 5 + number * width
        parts.append(
            f'<rect class="after" x="{x + 3}" y="{height - 22 - tall:.1f}" width="{width - 6}" height="{tall:.1f}" rx="2"/>'
        )
        parts.append(
            f'<text class="tick" x="{x + width / 2}" y="{height - 8}" text-anchor="middle">{escape(label)}</text>'
        )
        parts.append(
            f'<text class="tick" x="{x + width / 2}" y="{height - 26 - tall:.1f}" text-anchor="middle">{count:,}</text>'
        )
    return "".join([*parts, "</svg>"])
