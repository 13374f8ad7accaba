"""A new run from old weights: a run of ours, anybody's adapter or model, a Trainer checkpoint; on rows of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuoling.config import Loaded, RunConfig, load_config
from tuoling.errors import ConfigError, TrainingError, UsageError
from tuoling.files import read_json
from tuoling.language import tr
from tuoling.models.source import find_model
from tuoling.train.checkpoint import POSITION, pick_checkpoint
from tuoling.train.prepare import prepare
from tuoling.train.resume import Start, changes, read_position
from tuoling.train.steps import Offset
from tuoling.train.trainer_checkpoint import Schedule, is_trainer_checkpoint, trainer_schedule

if TYPE_CHECKING:
    from tuoling.models.source import ModelSource

NOT_TAKEN_OVER = (
    *("data", "dataset", "dataset_dir", "data_format", "columns", "max_samples", "max_steps", "recipe"),
    *("model_name_or_path", "adapter_name_or_path", "model_revision", "output_dir", "overwrite_output_dir"),
    *("run_name", "device", "quantization_bit", "streaming_start"),
)
"""Keys of an older run that are not those of one that continues it: they belong to its rows, its place, its machine."""


@dataclass(frozen=True)
class Continuation:
    """A config that begins from old weights, and the schedule it goes on along, where it keeps one."""

    loaded: Loaded
    source: ModelSource
    checkpoint: Path | None = None
    schedule: Schedule | None = None
    rows_seen: int | None = None
    """Rows the old run had taken; None: so many as its steps would take now."""
    record: dict[str, Any] | None = None


def from_weights(
    asked: str, words: Sequence[str], flags: dict[str, Any], *, base: str | None, keep_schedule: bool
) -> Continuation:
    """What a run that begins from `asked` (run, checkpoint, adapter, model; folder or hub id) is made of.

    words: key=value, over the older run's own config. Raises ModelError, ConfigError, and TrainingError where the
    schedule is to be kept and is not there.
    """
    checkpoint = _checkpoint(Path(asked)) if keep_schedule else None
    source = find_model(str(checkpoint or asked), base=base)
    values: dict[str, Any] = {}
    if source.run is not None and isinstance(source.run.get("config"), dict):
        defaults = RunConfig().model_dump(mode="json")
        values = {
            key: value
            for key, value in source.run["config"].items()
            if key not in NOT_TAKEN_OVER and key in defaults and value != defaults[key]
        }
    if source.is_adapter:
        values |= {"model_name_or_path": _base_name(source, base), "adapter_name_or_path": str(source.path)}
        values |= {"finetuning_type": "lora"}
    else:
        values |= {"model_name_or_path": str(source.path)}
    schedule, seen = (None, None) if checkpoint is None else _schedule(checkpoint)
    if schedule is not None:
        values |= {
            "learning_rate": schedule.learning_rate,
            "lr_scheduler_type": schedule.kind,
            "warmup_steps": schedule.warmup_steps,
        }
        values.pop("warmup_ratio", None)
    loaded = load_config((), words, flags, older=values)
    return Continuation(loaded, source, checkpoint, schedule, seen, source.run)


def _base_name(source: ModelSource, base: str | None) -> str:
    assert source.base is not None
    return base or str(source.base.path)


def _checkpoint(folder: Path) -> Path:
    """The checkpoint whose schedule is kept: of a run the newest, else the folder itself."""
    if (folder / "run.json").is_file():
        found = pick_checkpoint(folder)
        if found is not None:
            return found
    elif (folder / POSITION).is_file():
        found = pick_checkpoint(folder.parent, named=folder.name)
        assert found is not None
        return found
    elif is_trainer_checkpoint(folder):
        return folder
    raise TrainingError(
        tr(
            "no checkpoint with an optimizer's state: there is no schedule to keep",
            "没有带优化器状态的检查点：没有可延续的学习率计划",
        ),
        where=str(folder),
        remedy=tr(
            "without --keep-schedule its weights begin a new schedule",
            "去掉 --keep-schedule，用它的权重开始新的计划",
        ),
    )


def _schedule(checkpoint: Path) -> tuple[Schedule, int | None]:
    if not (checkpoint / POSITION).is_file():
        return trainer_schedule(checkpoint), None
    position = read_position(checkpoint)
    line = position["scheduler"]
    found = Schedule(
        position["step"], line["total_steps"], line["learning_rate"], line["warmup_steps"], line["type"]
    )
    return found, int(position["next_row"])


def along_schedule(
    found: Continuation,
    *,
    say: Callable[[str], None],
    from_data_beginning: bool | None,
    epochs: float | None,
    agreed: Callable[[str], bool],
    world_size: int | None = None,
) -> Start:
    """The learning-rate line goes on as if the new rows had been appended to the old ones.

    Its end is the old one's, or that of the new rows' own plan where that is later. from_data_beginning: None means
    from the first row, unless these are the old run's own rows. epochs: stop after so many passes over the new rows.
    agreed: asked where more passes are left than `num_train_epochs` says. world_size: processes that will train, where
    they are still to be started. Raises TrainingError where no step is left.
    """
    assert found.schedule is not None and found.checkpoint is not None
    config, step = found.loaded.config, found.schedule.step
    if config.streaming_start:
        raise ConfigError(
            tr(
                "--keep-schedule counts the passes over the new rows, which streaming_start does not wait for",
                "--keep-schedule 要数清在新数据上训练多少轮，而 streaming_start 不等全部数据",
            ),
            where="streaming_start=true",
            remedy="streaming_start=false",
        )
    if found.schedule.away is not None:
        say(_found_in_the_log(found.schedule))
    alone = prepare(config, say=say, world_size=world_size)
    total = max(found.schedule.total_steps, alone.plan.total_steps)
    same_rows = found.record is not None and "data" in found.record and not changes(found.record, alone)
    beginning = not same_rows if from_data_beginning is None else from_data_beginning
    assert alone.plan.epochs is not None
    per_epoch = alone.plan.total_steps / alone.plan.epochs
    stop = None if epochs is None else min(total, step + math.ceil(epochs * per_epoch))
    left = (stop or total) - step
    if left <= 0:
        raise TrainingError(
            tr(
                f"no step is left: the schedule ends at {total:,}, and {step:,} are done",
                f"没有剩余的步数：计划共 {total:,} 步，已完成 {step:,} 步",
            ),
            where=str(found.checkpoint),
            remedy=tr(
                "a longer one: num_train_epochs=N; or without --keep-schedule a new one",
                "延长：num_train_epochs=N；或去掉 --keep-schedule 开始新的计划",
            ),
        )
    rows_per_step = alone.plan.total_rows / alone.plan.total_steps
    seen = found.rows_seen if found.rows_seen is not None else round(step * rows_per_step)
    offset = Offset(step, 0 if beginning else seen, total, stop)
    passes = left / per_epoch
    said = tr(
        f"steps {step + 1:,} to {stop or total:,} of {total:,}: {passes:,.1f} passes over {alone.plan.rows:,} rows, "
        + ("from the first row" if beginning else f"passing over {offset.row:,} rows that were seen"),
        f"第 {step + 1:,} 到 {stop or total:,} 步（共 {total:,} 步）：在 {alone.plan.rows:,} 条数据上训练 {passes:,.1f} 轮，"
        + ("从第一条开始" if beginning else f"跳过已看过的 {offset.row:,} 条"),
    )
    say(said)
    if epochs is None and passes > config.num_train_epochs and not agreed(said):
        raise UsageError(
            tr(
                f"{passes:,.1f} passes over the new rows are more than num_train_epochs={config.num_train_epochs:g}",
                f"在新数据上训练 {passes:,.1f} 轮，超过了 num_train_epochs={config.num_train_epochs:g}",
            ),
            remedy=tr(
                "--epochs 3 stops after three; --yes means it",
                "--epochs 3 表示三轮后停止；--yes 表示就是要这样",
            ),
        )
    return Start(
        optimizer=found.checkpoint, offset=offset, continues={**lineage(found), "offset": asdict(offset)}
    )


def _found_in_the_log(line: Schedule) -> str:
    """What a Trainer checkpoint, which does not name its schedule, was taken to follow."""
    away = f"{line.away or 0.0:.1%}"
    return tr(
        f"the logged rates are those of: {line.kind}, {line.warmup_steps:,} steps of warm-up, up to "
        f"{line.learning_rate:g} ({away} away on average); other ones: lr_scheduler_type= warmup_steps=",
        f"日志中的学习率符合：{line.kind}，预热 {line.warmup_steps:,} 步，最高 {line.learning_rate:g}"
        f"（平均偏差 {away}）；不对时可指定 lr_scheduler_type= 和 warmup_steps=",
    )


def lineage(found: Continuation) -> dict[str, Any]:
    """What run.json says of where the weights came from."""
    source = found.source
    run = source.run_folder / "run.json" if source.run is not None else None
    return {
        "from": str(source.path.resolve()),
        "named": source.name,
        "keep_schedule": found.schedule is not None,
        "optimizer": str(found.checkpoint.resolve()) if found.checkpoint else None,
        "data": read_json(run).get("data", {}).get("key") if run is not None and run.is_file() else None,
    }


def fresh(found: Continuation) -> Start:
    """A new optimizer and a new schedule on the old weights."""
    return Start(continues=lineage(found))
