"""Plots: the series that are drawn, the language of the labels, and no boxes where characters should be."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest

from tuoling import environment, plots
from tuoling.errors import DataError

PNG = b"\x89PNG\r\n\x1a\n"
ROWS = [{"step": step, "loss": 3.0 / step, "learning_rate": 1e-4 * step} for step in range(1, 31)]


@pytest.fixture
def chinese(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "language", lambda: "zh")


@pytest.fixture
def labels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text of the figures that are saved."""
    from matplotlib.text import Text

    seen: list[str] = []
    save = plots._save

    def spy(figure: Any, path: Path) -> Path:
        saved = save(figure, path)
        seen.extend(text.get_text() for text in figure.findobj(Text) if text.get_text())
        return saved

    monkeypatch.setattr(plots, "_save", spy)
    return seen


def test_series_of_a_finished_resumed_run() -> None:
    rows = [
        {"step": 10, "loss": 3.0, "learning_rate": 1e-4, "epoch": 0.1},
        {"step": 20, "loss": 9.0, "learning_rate": 9e-5},
        {"step": 20, "loss": 2.0, "learning_rate": 9e-5},  # the run was resumed at 10: the last word counts
        {"step": 20, "eval_loss": 2.5, "eval_runtime": 1.0},
        {"step": 30, "loss": math.nan},
        {"step": 30, "train_loss": 2.2, "train_runtime": 7.0},
        {"loss": 1.0},
        {"step": True, "loss": 1.0},
    ]
    found = plots.history(rows)
    assert found.loss == [(10, 3.0), (20, 2.0)]
    assert found.eval_loss == [(20, 2.5)]
    assert found.learning_rate == [(10, 1e-4), (20, 9e-5)]


def test_smoothing_keeps_constants_lines_and_the_first_value() -> None:
    assert plots.smooth([2.0] * 9) == [2.0] * 9
    assert plots.smooth([0, 3, 6, 9, 12, 15, 18], 1) == [0, 3, 6, 9, 12, 15, 16.5]
    assert plots.smooth([5.0]) == [5.0] and plots.smooth([]) == []


@pytest.mark.slow
def test_english_labels(tmp_path: Path, labels: list[str]) -> None:
    path = plots.loss_plot([*ROWS, {"step": 30, "eval_loss": 0.5}], tmp_path / "loss.png")
    assert path.read_bytes().startswith(PNG)
    assert {"Training loss", "train loss (smoothed)", "eval loss", "learning rate", "step"} <= set(labels)


@pytest.mark.slow
@pytest.mark.usefixtures("chinese")
def test_chinese_labels_where_there_is_a_font(tmp_path: Path, labels: list[str]) -> None:
    if plots.cjk_font() is None:
        pytest.skip("no CJK font on this machine (apt-get install fonts-noto-cjk)")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of every glyph it cannot draw
        plots.loss_plot([*ROWS, {"step": 30, "eval_loss": 0.5}], tmp_path / "loss.png")
        plots.accuracy_plot({"算术": 0.0}, {"算术": 0.9, "翻译": 0.5}, tmp_path / "accuracy.png")
    assert {"训练损失", "训练损失（平滑）", "验证损失", "学习率", "步数", "算术", "微调前"} <= set(labels)


@pytest.mark.slow
@pytest.mark.usefixtures("chinese")
def test_english_labels_where_there_is_no_font(
    tmp_path: Path, labels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "cjk_font", lambda: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.loss_plot(ROWS, tmp_path / "loss.png", title="我的训练")
        plots.accuracy_plot({}, {"算术": 0.9, "add": 0.5}, tmp_path / "accuracy.png", title="准确率")
    assert {"train loss (smoothed)", "task 1", "add", "before"} <= set(labels)
    assert all(text.isascii() for text in labels)


@pytest.mark.slow
def test_the_font_really_has_chinese() -> None:
    font = plots.cjk_font()
    if font is None:
        pytest.skip("no CJK font on this machine")
    import matplotlib

    latin = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    assert plots._has_chinese(font) and not plots._has_chinese(str(latin))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [[{"step": 1, "eval_loss": 2.0}], [{"step": 1, "loss": 2.0}], ROWS[:3]])
def test_few_points_and_eval_only(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    assert plots.loss_plot(rows, tmp_path / "loss.png").is_file()


def test_nothing_to_draw_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no loss to draw"):
        plots.loss_plot([{"step": 1}], tmp_path / "loss.png")
    with pytest.raises(DataError, match="no scores"):
        plots.accuracy_plot({}, {}, tmp_path / "accuracy.png")
    assert list(tmp_path.iterdir()) == []


def test_reading_runs_logs_and_other_peoples_states(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no metrics\.jsonl"):
        plots.read_history(tmp_path)
    state = tmp_path / "trainer_state.json"
    state.write_text('{"log_history": [{"step": 1, "loss": NaN}, {"step": 2, "loss": 1.5}]}')
    assert plots.history(plots.read_history(tmp_path)).loss == [(2, 1.5)]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:2]) + '{"step": 3, "lo')
    assert [row["step"] for row in plots.read_history(tmp_path)] == [1, 2], "a torn last line is left out"
    state.write_text('{"best": 1}')
    with pytest.raises(DataError, match="no log_history"):
        plots.read_history(state)
    with pytest.raises(DataError, match="no such file"):
        plots.read_history(tmp_path / "no.json")
