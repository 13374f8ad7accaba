"""Going on: which run and checkpoint, whether data, template, base and config are still its own, and its state put back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tuoling import environment, files
from tuoling.config_keys import RunConfig
from tuoling.errors import ConfigError, TrainingError
from tuoling.language import tr
from tuoling.train.checkpoint import POSITION, pick_checkpoint, put_aside, sweep
from tuoling.train.progress import Progress
from tuoling.train.run_folder import RunFolder, data_hashes, now, weights_sampled_sha256
from tuoling.train.saving import CHANGEABLE, config_sha256
from tuoling.train.steps import FROM_THE_BEGINNING, Offset
from tuoling.train.trainer_checkpoint import trainer_optimizer

if TYPE_CHECKING:
    from tuoling.kernels.install import FastModel
    from tuoling.models.source import ModelSource
    from tuoling.train.prepare import Setup

Say = Callable[[str], None]

LOSS_TOLERANCE = 2e-2
"""Relative, of the replayed batch on another number of processes, device or library: bf16 keeps 8 bits. Where nothing
of that has changed the loss must be the same number."""


@dataclass(frozen=True)
class Start:
    """Where a run begins: at step 0 (all defaults), in the middle of itself, or along another run's schedule.

    run, record: the folder that goes on, and its run.json. checkpoint: whose state it takes; None: from its first step.
    optimizer: of a new run along an old schedule, the checkpoint whose optimizer's state it takes.
    continues: what run.json says of the older run.
    """

    run: Path | None = None
    record: dict[str, Any] | None = None
    checkpoint: Path | None = None
    optimizer: Path | None = None
    offset: Offset = FROM_THE_BEGINNING
    laid_for: int | None = None
    accept_changes: bool = False
    continues: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """For the processes of a launcher; `from_json` reads it."""
        return {**vars(self), "offset": asdict(self.offset)}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Start:
        paths = {key: Path(found[key]) for key in ("run", "checkpoint", "optimizer") if found[key]}
        return cls(**{**found, **paths, "offset": Offset(**found["offset"])})

    @property
    def position(self) -> dict[str, Any]:
        """position.json of the checkpoint; empty without one."""
        return read_position(self.checkpoint) if self.checkpoint else {}

    def progress(self) -> Progress:
        """What the run has done up to here."""
        known = {field.name for field in fields(Progress)}
        saved = {key: value for key, value in self.position.get("progress", {}).items() if key in known}
        return Progress(**saved) if saved else Progress(step=self.offset.step)

    def verify(self, setup: Setup, say: Say) -> None:
        """Raise TrainingError where data, template, base or config are not the run's; with accept_changes, say so."""
        if self.record is None or "data" not in self.record:
            return
        found = list(changes(self.record, setup))
        saved = self.position.get("config_sha256")
        if saved and saved != config_sha256(self.record["config"]):
            found.append(
                ("config", tr("run.json has been edited since the checkpoint", "run.json 在检查点之后被改过"))
            )
        if not found:
            return
        listed = "\n".join(f"  {name}: {what}" for name, what in found)
        if not self.accept_changes:
            raise TrainingError(
                tr(f"this is not the run that was begun:\n{listed}", f"与开始时的训练不一致：\n{listed}"),
                where=str(self.run),
                remedy=tr(
                    "put back what was changed; new rows: tuoling continue RUN --data NEW\n"
                    "to go on all the same: --accept-changes",
                    "恢复被改动的内容；要换新数据：tuoling continue RUN --data 新数据\n仍要继续：--accept-changes",
                ),
            )
        say(tr(f"going on in spite of changes:\n{listed}", f"尽管有改动，仍继续：\n{listed}"))

    def record_of(self, setup: Setup, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What run.json says from now on: a new one, or the old one with this resumption in it."""
        if self.record is None or "data" not in self.record:
            return {**make(), **({"continues": self.continues} if self.continues else {})}
        fresh = make()
        differ = [
            key
            for key in ("versions", "machine", "device", "dtype", "processes", "threads")
            if fresh[key] != self.record.get(key)
        ]
        here = {
            "at": now(),
            "checkpoint": self.checkpoint.name if self.checkpoint else None,
            "step": self.progress().step,
            "config": {
                k: fresh["config"][k]
                for k in CHANGEABLE
                if fresh["config"][k] != self.record["config"].get(k)
            },
            "accept_changes": self.accept_changes,
            "changed": [f"{name}: {what}" for name, what in changes(self.record, setup)],
            **{key: fresh[key] for key in differ},
        }
        kept = {key: value for key, value in self.record.items() if key not in ("error", "results")}
        return {**kept, "config": fresh["config"], "resumed": [*self.record.get("resumed", []), here]}

    def open(self, run: RunFolder, say: Say) -> None:
        """Make the folder what it was at the checkpoint: later rows of metrics.jsonl and later checkpoints are put aside."""
        if self.run is None or not run.writes:
            return
        sweep(run.path)
        step = self.progress().step
        moved = put_aside(run.path, after=step)
        run.log_history = _history(self.checkpoint)
        due = self.progress().eval_due is not None  # the row is written again, with what was due
        dropped = run.cut_metrics(after=step - due)
        if self.checkpoint:
            say(
                tr(
                    f"going on after step {step:,}, from {self.checkpoint.name}",
                    f"从 {self.checkpoint.name} 继续，已完成 {step:,} 步",
                )
            )
        else:
            say(tr("no checkpoint yet: from the first step again", "还没有检查点：从第一步重新开始"))
        if dropped:
            say(
                tr(
                    f"{dropped:,} steps after it were logged and are made again",
                    f"其后已记录的 {dropped:,} 步将重做",
                )
            )
        for line in moved:
            say(tr(f"put aside: {line}", f"已移开：{line}"))


def open_run(
    run: Path, *, named: str | None = None, skip_damaged: bool = False, accept_changes: bool = False
) -> Start:
    """Where a run folder goes on. Raises TrainingError for a folder that is no run of ours, or one that is finished."""
    record = read_run(run)
    if record.get("status") == "finished":
        results = record.get("results") or {}
        raise TrainingError(
            tr(
                f"the run is finished: {results.get('steps', '?')} steps of {results.get('steps', '?')}",
                f"该训练已经完成：{results.get('steps', '?')} / {results.get('steps', '?')} 步",
            ),
            where=str(run),
            remedy=tr(
                f"on new rows: tuoling continue {run} --data ROWS",
                f"用新数据继续：tuoling continue {run} --data 数据",
            ),
        )
    checkpoint = pick_checkpoint(run, named=named, skip_damaged=skip_damaged)
    return replace(start_of(run, record, checkpoint), accept_changes=accept_changes)


def read_run(run: Path) -> dict[str, Any]:
    """run.json. Raises TrainingError for a folder that is no run of ours."""
    path = run / "run.json"
    if not path.is_file():
        raise TrainingError(
            tr(
                "no run.json: this is not a run folder of tuoling's",
                "没有 run.json：这不是 tuoling 的运行目录",
            ),
            where=str(run),
            remedy=tr(
                "weights of other tools, and their checkpoints: tuoling continue FOLDER --data ROWS",
                "其他工具的权重或检查点：tuoling continue 目录 --data 数据",
            ),
        )
    record = files.read_json(path)
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise TrainingError(
            tr("run.json holds no config of a run", "run.json 中没有训练配置"), where=str(path)
        )
    return record


def start_of(run: Path, record: dict[str, Any], checkpoint: Path | None) -> Start:
    """Where a run stands at one of its checkpoints, or at its beginning."""
    continues = record.get("continues") or {}
    old = continues.get("optimizer")
    return Start(
        run=run,
        record=record,
        checkpoint=checkpoint,
        optimizer=Path(old) if old and checkpoint is None else None,
        offset=Offset(**continues.get("offset", {})),
        laid_for=record.get("laid_for") or record.get("processes"),
        continues=continues or None,
    )


def config_of(start: Start, changed: Mapping[str, Any]) -> RunConfig:
    """The run's own config, with other values of keys that do not change what is learned. Raises ConfigError for others."""
    assert start.record is not None
    for key in changed:
        if key not in CHANGEABLE:
            raise ConfigError(
                tr(
                    f"a run goes on with the config it has: {key} cannot be changed",
                    f"继续训练时配置不变：不能修改 {key}",
                ),
                where=f"{key}={changed[key]}",
                remedy=tr(
                    f"these can: {', '.join(CHANGEABLE)}\nwith other settings: tuoling continue RUN --data ROWS",
                    f"可以修改：{'、'.join(CHANGEABLE)}\n要用别的设置：tuoling continue RUN --data 数据",
                ),
            )
    values = {
        **start.record["config"],
        **changed,
        "output_dir": str(start.run),
        "overwrite_output_dir": False,
    }
    return RunConfig.model_validate(values)


def read_position(checkpoint: Path) -> dict[str, Any]:
    """position.json of a checkpoint of ours."""
    found = files.read_json(checkpoint / POSITION)
    return found if isinstance(found, dict) else {}


def _history(checkpoint: Path | None) -> list[dict[str, Any]]:
    if checkpoint is None:
        return []
    found: list[dict[str, Any]] = files.read_json(checkpoint / "trainer_state.json").get("log_history", [])
    return found


def changes(record: Mapping[str, Any], setup: Setup) -> list[tuple[str, str]]:
    """(what, how) of data, template and base that is no longer as run.json says."""
    found: list[tuple[str, str]] = []
    then, now_ = record["data"], data_hashes(setup)
    hashes = then.get("examples_sha256"), now_["examples_sha256"]
    same = then.get("parts") == now_["parts"] if None in hashes else hashes[0] == hashes[1]
    if not same:
        parts = [name for name, value in now_["parts"].items() if then.get("parts", {}).get(name) != value]
        rows = [name for name, value in now_["files"].items() if then.get("files", {}).get(name) != value]
        gone = [name for name in then.get("files", {}) if name not in now_["files"]]
        named = ", ".join([*rows, *gone]) or ", ".join(parts)
        found.append(("data", tr(f"other examples: {named}", f"样本不同：{named}")))
    if (record.get("held_out") or {}).get("rows", 0) != len(setup.held_out or ()):
        found.append(("held_out", tr("other held-out rows", "验证集不同")))
    if record["template"]["id"] != setup.template.id:
        found.append(("template", f"{record['template']['id']} → {setup.template.id}"))
    base, weights = record["base"], setup.source.weights_path
    if base.get("config_sha256") != files.sha256_file(weights / "config.json"):
        found.append(("base", tr(f"{weights}: another config.json", f"{weights}：config.json 不同")))
    elif base.get("weights_sampled_sha256") not in (None, weights_sampled_sha256(weights)):
        found.append(("base", tr(f"{weights}: other weights", f"{weights}：权重不同")))
    return found


def source_of(setup: Setup, checkpoint: Path | None) -> ModelSource:
    """Where the weights come from: the checkpoint, on the run's own base where it holds an adapter."""
    if checkpoint is None:
        return setup.source
    from tuoling.models.source import find_model

    adapter = setup.config.finetuning_type == "lora"
    return find_model(checkpoint, base=str(setup.source.weights_path) if adapter else None)


def optimizer_state(checkpoint: Path, model: nn.Module) -> dict[str, torch.Tensor]:
    """The optimizer's state of a checkpoint, `parameter's name.key` → tensor."""
    from safetensors.torch import load_file

    if not (checkpoint / "optimizer.safetensors").is_file():
        return trainer_optimizer(checkpoint, model)
    return load_file(checkpoint / "optimizer.safetensors")


def check_probe(start: Start, loss: float, setup: Setup, say: Say) -> None:
    """Compare the loss of the last logged batch with the one the checkpoint says.

    Raises TrainingError where the two are further apart than another machine explains.
    """
    saved = start.position["probe"]["loss"]
    apart = abs(loss - saved) / max(abs(saved), 1e-12)
    if loss == saved:
        say(
            tr(
                f"the last batch gives the same loss again: {loss:.6f}",
                f"最后一批的损失与当时相同：{loss:.6f}",
            )
        )
        return
    reasons = differences(start.record or {}, setup)
    words = tr(
        f"the last batch gives {loss:.6f}, and gave {saved:.6f}",
        f"最后一批的损失是 {loss:.6f}，当时是 {saved:.6f}",
    )
    if not math.isfinite(loss) or (apart > (LOSS_TOLERANCE if reasons else 0.0) and not start.accept_changes):
        raise TrainingError(
            words,
            where=str(start.checkpoint),
            remedy=tr("to go on all the same: --accept-changes", "仍要继续：--accept-changes"),
        )
    why = ", ".join(reasons) or "--accept-changes"
    say(f"{words} ({why})")


def differences(record: Mapping[str, Any], setup: Setup, fast: FastModel | None = None) -> list[str]:
    """What of libraries, machine, device and kernels is not as it was, and may change the last bits of a sum."""
    here: dict[str, Any] = {
        "versions": environment.versions(),
        "machine": environment.machine(),
        "device": setup.device,
        "dtype": setup.dtype,
        "processes": setup.world_size,
        "threads": environment.compute_threads(),
        **({"kernels": fast.facts()} if fast is not None else {}),
    }
    found = []
    for key, value in here.items():
        then = record.get(key)
        if then == value or then is None:
            continue
        if isinstance(value, dict) and isinstance(then, dict):
            names = [name for name in {**then, **value} if then.get(name) != value.get(name)]
            found += [f"{key}: {name} {then.get(name)} → {value.get(name)}" for name in names]
        else:
            found.append(f"{key}: {then} → {value}")
    if setup.device.startswith("cuda") and not setup.config.deterministic:
        found.append(tr("kernels: deterministic=true was not asked for", "算子：没有设 deterministic=true"))
    return found
