"""Training from Python: a config file, a config, or just keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def resume(
    run: str | Path,
    *,
    from_checkpoint: str | None = None,
    skip_damaged: bool = False,
    accept_changes: bool = False,
    say: Callable[[str], None] | None = None,
    show_plan: Callable[[Setup], None] | None = None,
    launch: Launch | None = None,
    **keys: Any,
) -> RunResult:
    """Go on with a run that was stopped or killed, exactly where it was: `tuoling.resume("RUN")`.

    from_checkpoint: another one than the newest. skip_damaged: the newest whole one where the last is damaged.
    accept_changes: also on changed rows, template, base or config. launch: as many processes as before where None.
    keys: config keys that do not change what is learned. Raises TuolingError.
    """
    environment.quiet_libraries()
    from tuoling.train.launch import Launch, train_on
    from tuoling.train.loop import train as go_on
    from tuoling.train.resume import config_of, open_run

    start = open_run(
        Path(run), named=from_checkpoint, skip_damaged=skip_damaged, accept_changes=accept_changes
    )
    assert start.record is not None
    config, notes = config_of(start, keys), start.record.get("notes", ())
    say = say or console.note
    if launch is None:  # a launcher of somebody else's has started its processes already
        launch = Launch(nproc=1 if environment.world_size() > 1 else int(start.record.get("processes", 1)))
    if launch.alone:
        return go_on(config, notes=notes, say=say, show_plan=show_plan, start=start)
    return train_on(launch, config, notes=notes, say=say, show_plan=show_plan, start=start)


def continue_from(
    source: str | Path,
    words: Sequence[str],
    flags: dict[str, Any],
    *,
    base: str | None = None,
    keep_schedule: bool = False,
    from_data_beginning: bool | None = None,
    epochs: float | None = None,
    agreed: Callable[[str], bool] = lambda said: False,
    say: Callable[[str], None] | None = None,
    show_plan: Callable[[Setup], None] | None = None,
    launch: Launch | None = None,
) -> RunResult:
    """Begin a new run from old weights on rows of its own (`tuoling continue`). words: key=value; flags: config keys.

    keep_schedule and the arguments below it: see `continuing.along_schedule`. launch: what is to be started.
    Raises TuolingError.
    """
    environment.quiet_libraries()
    from tuoling.train.continuing import along_schedule, fresh, from_weights
    from tuoling.train.launch import Launch, train_on
    from tuoling.train.loop import train as run

    say = say or console.note
    found = from_weights(str(source), words, flags, base=base, keep_schedule=keep_schedule)
    for line in found.loaded.notes:
        say(line)
    launch = (launch or Launch()).checked()
    start = fresh(found)
    if keep_schedule:
        start = along_schedule(
            found,
            say=say,
            from_data_beginning=from_data_beginning,
            epochs=epochs,
            agreed=agreed,
            world_size=None if launch.alone else launch.world_size,
        )
    config, notes = found.loaded.config, found.loaded.notes
    if launch.alone:
        return run(config, notes=notes, say=say, show_plan=show_plan, start=start)
    return train_on(launch, config, notes=notes, say=say, show_plan=show_plan, start=start)
