"""Loss and score plots from plain numbers. Chinese labels where the machine can draw them, English elsewhere."""

from __future__ import annotations

import functools
import io
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuoling import environment
from tuoling.errors import DataError
from tuoling.files import atomic_write, read_json, read_jsonl
from tuoling.language import tr

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CJK_FONTS = (
    *("notosanscjk", "notosanssc", "sourcehansans", "pingfang", "msyh", "microsoftyahei", "hiraginosansgb"),
    *("wqy-microhei", "wqy-zenhei", "wenquanyi", "simhei", "deng", "droidsansfallback", "uming", "ukai"),
    *("arphic", "stheiti", "heiti", "songti", "simsun", "notoserifcjk", "sourcehanserif", "arialuni"),
)
"""File names (without case, spaces or underscores) of fonts with Chinese, the better-looking first."""

PROBE = "训练损失验证学习率步数准确率微调前后轮"
TRAIN, EVAL, RATE, BEFORE = "#1f6fb2", "#d1495b", "#8a8f98", "#b9c2cc"


@dataclass(frozen=True)
class History:
    """Series of a run: each a list of (step, value), steps rising."""

    loss: list[tuple[int, float]]
    eval_loss: list[tuple[int, float]]
    learning_rate: list[tuple[int, float]]


def read_history(path: Path) -> list[dict[str, Any]]:
    """Rows of a run folder, a metrics.jsonl, or anybody's trainer_state.json. Raises DataError."""
    if path.is_dir():
        for name in ("metrics.jsonl", "trainer_state.json"):
            if (path / name).is_file():
                return read_history(path / name)
        raise DataError(
            tr(
                "no metrics.jsonl and no trainer_state.json here",
                "这里没有 metrics.jsonl，也没有 trainer_state.json",
            ),
            where=str(path),
            remedy=tr("give a run folder or a trainer_state.json", "请给出训练目录或 trainer_state.json"),
        )
    if not path.is_file():
        raise DataError(tr("no such file or folder", "没有这个文件或目录"), where=str(path))
    if path.suffix == ".jsonl":
        return [row for _, row in read_jsonl(path) if isinstance(row, dict)]
    value = read_json(path)
    rows = value.get("log_history") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise DataError(tr("no log_history in it", "其中没有 log_history"), where=str(path))
    return [row for row in rows if isinstance(row, dict)]


def history(rows: Iterable[Mapping[str, Any]]) -> History:
    """Pick the series out of log rows. A step logged again (a resumed run) counts as it was last logged.

    Rows without a step, rows of other kinds (`train_runtime` of a finished run) and values that are not finite are
    left out.
    """
    series: dict[str, dict[int, float]] = {"loss": {}, "eval_loss": {}, "learning_rate": {}}
    for row in rows:
        step = row.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            continue
        for name, points in series.items():
            value = row.get(name)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                points[step] = float(value)
    return History(**{name: sorted(points.items()) for name, points in series.items()})


def smooth(values: Sequence[float], half_width: int | None = None) -> list[float]:
    """Average over a window centred on each point, so that the curve does not lag.

    The window narrows towards the start, which is steep, and looks back only at the end, which is flat.

    half_width: points on either side; by default a fortieth of the series.
    """
    if half_width is None:
        half_width = max(2, len(values) // 40)
    result = []
    for place in range(len(values)):
        reach = min(half_width, place)
        window = values[place - reach : place + reach + 1]
        result.append(sum(window) / len(window))
    return result


def loss_plot(rows: Iterable[Mapping[str, Any]], path: Path | str, *, title: str | None = None) -> Path:
    """Train and eval loss over steps, learning rate on a second axis, as a PNG. Raises DataError when there is none."""
    found = history(rows)
    if not found.loss and not found.eval_loss:
        raise DataError(
            tr(
                "no loss to draw: no row has a step and a loss", "没有可画的损失：没有一行同时有 step 和 loss"
            ),
            where=str(path),
        )
    with _style() as say:
        figure, axes = _figure()
        lines = _draw_losses(axes, found, say)
        if found.learning_rate:
            lines += _draw_learning_rate(axes, found.learning_rate, say)
        axes.legend(handles=lines, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False)
        axes.set_title(
            _drawable(title or say("Training loss", "训练损失"), ""), loc="left", fontsize=12, pad=12
        )
        return _save(figure, Path(path))


def accuracy_plot(
    before: Mapping[str, float], after: Mapping[str, float], path: Path | str, *, title: str | None = None
) -> Path:
    """Bars of accuracy (0 to 1) by kind of task, before and after, best first, as a PNG."""
    kinds = sorted(after, key=lambda kind: (-after[kind], kind))
    if not kinds:
        raise DataError(tr("no scores to draw", "没有可画的分数"), where=str(path))
    with _style() as say:
        figure, axes = _figure(height=max(2.6, 0.48 * len(kinds) + 1.4))
        places = range(len(kinds))
        bars = [
            axes.barh(
                [place - 0.19 for place in places],
                [100 * before.get(kind, 0.0) for kind in kinds],
                0.36,
                color=BEFORE,
            ),
            axes.barh(
                [place + 0.19 for place in places], [100 * after[kind] for kind in kinds], 0.36, color=TRAIN
            ),
        ]
        for container in bars:
            axes.bar_label(container, fmt="%.0f", padding=3, fontsize=8, color="#444c56")
        axes.set_yticks(
            list(places), [_drawable(kind, f"task {number}") for number, kind in enumerate(kinds, 1)]
        )
        axes.invert_yaxis()
        axes.set_xlim(0, 108)
        axes.set_xlabel(say("exact match, %", "完全一致的比例（%）"))
        axes.grid(axis="y", visible=False)
        names = [say("before", "微调前"), say("after", "微调后")]
        axes.legend(bars, names, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
        axes.set_title(
            _drawable(title or say("Accuracy by task", "各类任务的准确率"), ""),
            loc="left",
            fontsize=12,
            pad=12,
        )
        return _save(figure, Path(path))


def score_plot(
    curves: Mapping[tuple[str, str], Sequence[tuple[int, float]]],
    path: Path | str,
    *,
    label: tuple[str, str],
    strong: tuple[str, str] | None = None,
) -> Path:
    """Score against rows trained on, a line a class, as a PNG. Names and label are (Chinese, English).

    Rows stand on a logarithmic axis where the largest run has 8 times the smallest or more; 0 rows (the base) has its
    place at the left. strong: the line drawn thick.
    """
    with _style() as say:
        figure, axes = _figure()
        rows = sorted({count for points in curves.values() for count, _ in points})
        few = [count for count in rows if count > 0]
        wide = bool(few) and few[-1] >= 8 * few[0]
        if wide:
            axes.set_xscale("symlog", linthresh=few[0], linscale=0.5)
        for number, (names, points) in enumerate(curves.items()):
            name = _drawable(say(names[1], names[0]), f"class {number + 1}")
            thick = names == strong
            look = {"color": "#24292f", "linewidth": 2.6} if thick else {"linewidth": 1.5}
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name, **look)
        axes.set_xticks(rows, [f"{count:,}" for count in rows])
        axes.minorticks_off()
        axes.set_xlabel(say("rows trained on", "训练条数"))
        axes.set_ylabel(say(label[1], label[0]))
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
        axes.set_title(
            say("Score by class against rows", "各类得分随训练条数的变化"), loc="left", fontsize=12, pad=12
        )
        return _save(figure, Path(path))


@functools.cache
def cjk_font() -> str | None:
    """Path of a font of this machine that has Chinese, or None."""
    from matplotlib import font_manager

    found = []
    for name in {
        *font_manager.findSystemFonts(),
        *(entry.fname for entry in font_manager.fontManager.ttflist),
    }:
        plain = Path(name).name.lower().replace(" ", "").replace("_", "")
        rank = next((place for place, known in enumerate(CJK_FONTS) if plain.startswith(known)), None)
        if rank is not None:
            found.append(
                (rank, "bold" in plain or "light" in plain or "black" in plain, "regular" not in plain, name)
            )
    return next((name for *_, name in sorted(found) if _has_chinese(name)), None)


def _has_chinese(path: str) -> bool:
    from matplotlib.ft2font import FT2Font

    try:
        characters = FT2Font(path).get_charmap()
    except (OSError, RuntimeError):
        return False
    return all(ord(character) in characters for character in PROBE)


def _drawable(text: str, instead: str) -> str:
    """The text, or something else where it would come out as boxes."""
    return text if cjk_font() is not None or text.isascii() else instead


class _style:
    """Fonts and looks for one figure; yields the function that picks the language of a label."""

    def __enter__(self) -> Any:
        import matplotlib
        from matplotlib import font_manager

        font = cjk_font()
        families = ["DejaVu Sans"]
        if font is not None:
            known = [entry.name for entry in font_manager.fontManager.ttflist if entry.fname == font]
            if not known:
                font_manager.fontManager.addfont(font)
            families.append(font_manager.FontProperties(fname=font).get_name())
        chinese = font is not None and environment.language() == "zh"
        self._context = matplotlib.rc_context(
            {
                "font.family": families[::-1] if chinese else families,
                "font.size": 10,
                "axes.unicode_minus": False,
                "axes.edgecolor": "#c8ced6",
                "axes.labelcolor": "#444c56",
                "xtick.color": "#6b7480",
                "ytick.color": "#6b7480",
                "text.color": "#24292f",
            }
        )
        self._quiet = warnings.catch_warnings()
        self._context.__enter__()
        self._quiet.__enter__()
        warnings.filterwarnings("ignore", module="matplotlib.font_manager")
        return lambda en, zh: zh if chinese else en

    def __exit__(self, *error: Any) -> None:
        self._quiet.__exit__(*error)
        self._context.__exit__(*error)


def _figure(height: float = 5.2) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(color="#eceff2", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _draw_losses(axes: Axes, found: History, say: Any) -> list[Any]:
    from matplotlib.ticker import MaxNLocator

    lines: list[Any] = []
    if found.loss:
        steps, values = zip(*found.loss, strict=True)
        many = len(values) >= 12
        if many:
            axes.plot(steps, values, color=TRAIN, alpha=0.25, linewidth=1)
        shown = smooth(values) if many else values
        name = say("train loss", "训练损失") + (say(" (smoothed)", "（平滑）") if many else "")
        lines += axes.plot(
            steps, shown, color=TRAIN, linewidth=1.8, marker="" if many else "o", markersize=4, label=name
        )
    if found.eval_loss:
        steps, values = zip(*found.eval_loss, strict=True)
        style: dict[str, Any] = {
            "color": EVAL,
            "linewidth": 1.4,
            "marker": "o",
            "markersize": 4.5,
            "markeredgecolor": "white",
        }
        lines += axes.plot(steps, values, label=say("eval loss", "验证损失"), **style)
    axes.set_xlabel(say("step", "步数"))
    axes.set_ylabel(say("loss (nats per token)", "损失（每个 token，nat）"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return lines


def _draw_learning_rate(axes: Axes, points: list[tuple[int, float]], say: Any) -> list[Any]:
    right = axes.twinx()
    right.spines["top"].set_visible(False)
    steps, values = zip(*points, strict=True)
    name = say("learning rate", "学习率")
    lines = right.plot(steps, values, color=RATE, linewidth=1.2, linestyle=(0, (4, 3)), label=name)
    right.set_ylim(bottom=0, top=max(values) * 1.12 or 1)
    right.set_ylabel(name)
    right.yaxis.set_major_formatter(lambda value, _: f"{value:.1e}".replace("e-0", "e-") if value else "0")
    axes.set_zorder(right.get_zorder() + 1)  # losses above the learning rate
    axes.patch.set_visible(False)
    return list(lines)


def _save(figure: Figure, path: Path) -> Path:
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    with atomic_write(path, binary=True) as file:
        file.write(picture.getvalue())
    return path
