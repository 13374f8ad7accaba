"""The files of a run: run.json, metrics.jsonl, trainer_state.json, all_results.json."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuoling import environment, files
from tuoling.errors import DataError, OutputError
from tuoling.language import tr
from tuoling.models.licence import to_json
from tuoling.models.source import weight_files
from tuoling.train.run_lock import LOCK

if TYPE_CHECKING:
    from tuoling.config import RunConfig
    from tuoling.train.prepare import Setup


def now() -> str:
    """The time, in UTC, as run.json says it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


PREPARING = "preparing"
"""The status of a run whose rows are being tokenised: run.json holds its config and nothing else yet."""


def folder_of(config: RunConfig) -> Path:
    """Where a run goes: as the config says, else a new name."""
    if config.output_dir:
        return Path(config.output_dir)
    return default_run_folder(str(config.adapter_name_or_path or config.model_name_or_path))


@contextmanager
def reserved(config: RunConfig, notes: Sequence[str] = (), *, wanted: bool = True) -> Iterator[RunConfig]:
    """The config with its run folder named; that is there with run.json in it, so that a run killed inside can go on.

    wanted: whether this process makes it. After an error inside nothing is left of it. A folder that is full is
    refused here, or left alone until the run begins where it is to be moved aside.
    """
    config = config.model_copy(update={"output_dir": str(folder_of(config))})
    folder = Path(str(config.output_dir))
    if not wanted or (config.overwrite_output_dir and _holds_something(folder)):
        yield config
        return
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    claim(folder, overwrite=False)
    record = {
        "status": PREPARING,
        "started": now(),
        "config": config.model_dump(mode="json"),
        "notes": list(notes),
    }
    try:
        files.write_json(folder / "run.json", record)
        yield config
    except BaseException:
        with suppress(OSError):
            (folder / "run.json").unlink(missing_ok=True)
            for parent in made:
                parent.rmdir()
        raise


def _holds_something(folder: Path) -> bool:
    """Whether a folder holds more than the name of a run that never began."""
    if not folder.is_dir():
        return False
    there = [path for path in folder.iterdir() if path.name != LOCK]
    if [path.name for path in there] != ["run.json"]:
        return bool(there)
    with suppress(DataError):
        found = files.read_json(there[0])
        return not (isinstance(found, dict) and found.get("status") == PREPARING)
    return True


def default_run_folder(model: str) -> Path:
    """`runs/<model>-<date>-<time>`: never the same twice, so nothing is overwritten."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{Path(model).name or 'model'}-{stamp}"


def claim(folder: Path, *, overwrite: bool, switch: str = "overwrite_output_dir=true") -> str | None:
    """Make sure `folder` can be a new run; returns what was done with an old one.

    A folder that holds anything is refused; `overwrite` (what the user types for it: `switch`) moves it aside
    (`NAME.old-1`), never deletes it.
    """
    moved = None
    if _holds_something(folder):
        if not overwrite:
            raise OutputError(
                tr("the output folder is not empty", "输出目录不是空的"),
                where=str(folder),
                remedy=tr(
                    f"choose another folder, or give {switch} (the old one is moved aside)",
                    f"换一个目录，或加上 {switch}（旧目录会被改名保留）",
                ),
            )
        number = 1
        while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
            number += 1
        folder.rename(aside)
        moved = tr(f"the old {folder} is now {aside}", f"原来的 {folder} 已改名为 {aside}")
    elif folder.exists() and not folder.is_dir():
        raise OutputError(tr("the output folder is a file", "输出目录是一个文件"), where=str(folder))
    files.require_writable(folder)
    return moved


def manifest(setup: Setup, versions: dict[str, str], machine: dict[str, Any]) -> dict[str, Any]:
    """What `run.json` says: everything that decides the result, and nothing secret."""
    config_file = setup.source.weights_path / "config.json"
    return {
        "config": setup.config.model_dump(mode="json"),
        "stage": setup.config.stage,
        "base": {
            "path": str(setup.source.weights_path),
            "adapter": str(setup.source.path) if setup.source.is_adapter else None,
            "named": setup.config.model_name_or_path,
            "config_sha256": files.sha256_file(config_file) if config_file.is_file() else None,
            "weights_sampled_sha256": weights_sampled_sha256(setup.source.weights_path),
            "family": setup.source.family.name,
            "licence": setup.source.family.licence,
        },
        "lineage": to_json(setup.plan.lineage),
        "template": {
            "id": setup.template.id,
            "why": setup.template_reason,
            "stops": list(setup.template.stops),
        },
        "data": data_record(setup),
        "held_out": None
        if setup.held_out is None
        else {"key": setup.held_out.store.key, "rows": len(setup.held_out)},
        "plan": setup.plan.to_json(),
        "device": setup.device,
        "dtype": setup.dtype,
        "seed": setup.config.seed,
        "processes": setup.world_size,
        "laid_for": setup.laid_for,
        "threads": environment.compute_threads(),
        "versions": versions,
        "machine": machine,
        "notes": setup.notes,
    }


def data_record(setup: Setup) -> dict[str, Any]:
    """What run.json says of the rows; `whole`: whether all of them have been counted."""
    store = setup.train.store
    return {"key": store.key, **setup.report.facts(), "whole": store.whole, **data_hashes(setup)}


def data_hashes(setup: Setup) -> dict[str, Any]:
    """What decides the examples, by name; every file of rows; and the examples themselves, whatever made them.

    Of rows that are still being made the last is None: what decides them tells them apart.
    """
    store = setup.train.store
    made = files.read_json(store.path / files.MANIFEST) if store.whole else {}
    contents = {name: entry["sha256"] for name, entry in sorted(made.items()) if name.endswith(".bin")}
    places = {str(Path(path).resolve()): path for path in store.meta["paths"]}
    return {
        "parts": store.meta["parts"],
        "files": {name: files.sampled_sha256(path) for name, path in places.items() if Path(path).is_file()},
        "examples_sha256": files.sha256_text(repr(contents)) if store.whole else None,
    }


def weights_sampled_sha256(model: Path) -> str:
    """Of the weight files of a base model: enough to see that they are others, whatever their size."""
    found = {file.name: files.sampled_sha256(file) for file in weight_files(model)}
    return files.sha256_text(repr(sorted(found.items())))


class RunFolder:
    """Writes a run's records. Metrics are appended and flushed a step at a time; the rest is written whole.

    writes: whether this process does; of several that train together one does.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], *, writes: bool = True) -> None:
        self.path = path
        self.writes = writes
        self.record = manifest
        self.log_history: list[dict[str, Any]] = []
        self.set_status("running", started=manifest.get("started") or now())

    def set_status(self, status: str, **more: Any) -> None:
        """Write run.json again with its state: running, finished, interrupted or failed."""
        self.record = {**self.record, "status": status, **more}
        if self.writes:
            files.write_json(self.path / "run.json", self.record)

    def fail(self, error: BaseException) -> None:
        """Say in run.json why the run ended. On a full disk the file stays as it was: the error itself matters more."""
        why = str(error) or type(error).__name__
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            why = tr("stopped before it was saved", "保存之前被中断")
        with suppress(OutputError):
            self.set_status("failed", error=why)

    def cut_metrics(self, after: int) -> int:
        """Leave only the rows up to step `after` in metrics.jsonl. Returns how many there were behind them."""
        path = self.path / "metrics.jsonl"
        rows = [row for _, row in files.read_jsonl(path)] if path.is_file() else []
        kept = [row for row in rows if row["step"] <= after]
        with files.atomic_write(path) as file:
            for row in kept:
                files.append_jsonl(file, row)
        return len(rows) - len(kept)

    @contextmanager
    def metrics(self) -> Iterator[Any]:
        """Open metrics.jsonl for appending."""
        path = self.path / "metrics.jsonl" if self.writes else Path(os.devnull)
        with files.told(path), path.open("a", encoding="utf-8") as file:
            yield file

    def trainer_state(
        self, *, step: int, total_steps: int, epoch: float | None, best: dict[str, Any] | None
    ) -> str:
        """transformers' trainer_state.json, as text, so that other people's plotters work."""
        state = {
            "best_metric": best["eval_loss"] if best else None,
            "best_model_checkpoint": best["checkpoint"] if best else None,
            "epoch": epoch,
            "global_step": step,
            "max_steps": total_steps,
            "num_train_epochs": epoch,
            "is_local_process_zero": True,
            "is_world_process_zero": True,
            "log_history": self.log_history,
        }
        return json.dumps(state, ensure_ascii=False, indent=2) + "\n"

    def write_trainer_state(self, text: str, folder: Path | None = None) -> None:
        """Write trainer_state.json at the top of the run, or into a checkpoint being built."""
        with files.atomic_write((folder or self.path) / "trainer_state.json") as file:
            file.write(text)

    def add_results(self, results: dict[str, Any]) -> dict[str, Any]:
        """Merge `results` into all_results.json and return the whole."""
        return add_results(self.path, results)


def add_results(run: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Merge `results` into a run folder's all_results.json and return the whole."""
    path = run / "all_results.json"
    merged = {**(files.read_json(path) if path.is_file() else {}), **results}
    files.write_json(path, merged)
    return merged
