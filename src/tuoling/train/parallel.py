"""The accelerate engine a run computes on."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuoling import environment
from tuoling.errors import TrainingError
from tuoling.language import tr

if TYPE_CHECKING:
    from collections.abc import Sequence

    from accelerate import Accelerator

_PRECISION = {"bf16": "bf16", "fp16": "fp16", "fp32": "no"}


def make_accelerator(
    *, device: str, dtype: str, trackers: Sequence[str], folder: Path, manifest: dict[str, Any]
) -> Accelerator:
    """One process on `device`, autocast to `dtype`, with the trackers the user asked for (none by default).

    Raises TrainingError when a launcher has started several processes: their runs would write over each other.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    if environment.world_size() > 1:
        raise TrainingError(
            tr(
                f"started as {environment.world_size()} processes, and one is what trains here",
                f"启动了 {environment.world_size()} 个进程，而目前只支持单进程训练",
            ),
            remedy=tr(
                "start `tuoling train` without a launcher", "不要用 torchrun 等启动器，直接运行 tuoling train"
            ),
        )
    # accelerate keeps its precision in a singleton; a second run in one process may ask for another.
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    accelerator = Accelerator(
        mixed_precision=_PRECISION[dtype],
        cpu=device == "cpu",
        log_with=list(trackers) or None,
        project_dir=str(folder) if trackers else None,
    )
    if trackers:
        accelerator.init_trackers(
            "tuoling", config={k: v for k, v in manifest.items() if isinstance(v, str | int | float)}
        )
    return accelerator


def require_trackers(trackers: Sequence[str]) -> None:
    """Raise TrainingError for a tracker whose package is not installed."""
    for name in trackers:
        if importlib.util.find_spec(name) is None:
            raise TrainingError(
                tr(f"the tracker {name} is not installed", f"没有安装记录工具 {name}"),
                where=f"report_to={name}",
                remedy=f"pip install {name}",
            )
