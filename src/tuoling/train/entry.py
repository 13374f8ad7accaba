"""Training from Python: a config file, a config, or just keys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuoling import console, environment

if TYPE_CHECKING:
    from tuoling.config import Loaded
    from tuoling.train.launch import Launch
    from tuoling.train.loop import RunResult
    from tuoling.train.prepare import Setup


def train(
    config: str | Path | Loaded | None = None,
    *,
    say: Callable[[str], None] | None = None,
    show_plan: Callable[[Setup], None] | None = None,
    launch: Launch | None = None,
    nproc: int = 1,
    **keys: Any,
) -> RunResult:
    """Fine-tune, and leave a run folder: `tuoling.train(model_name_or_path="MODEL", data="rows.json")`.

    config: a config file (ours or another tool's) over which `keys` are set; or a config read already.
    nproc: processes to start, that train together; launch: the same with more to say, such as the machines.
    Returns the run's folder, its status and what all_results.json says. Raises TuolingError.
    """
    environment.quiet_libraries()
    from tuoling.config import Loaded, load_config
    from tuoling.train.launch import Launch, train_on
    from tuoling.train.loop import train as run

    if isinstance(config, Loaded):
        loaded = config
    else:
        loaded = load_config([Path(config)] if config is not None else [], flags=keys)
    launch = launch or Launch(nproc=nproc)
    if launch.alone:
        return run(loaded.config, notes=loaded.notes, say=say or console.note, show_plan=show_plan)
    return train_on(launch, loaded.config, notes=loaded.notes, say=say or console.note, show_plan=show_plan)
