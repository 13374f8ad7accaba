"""What lies at a path or hub id: a run, an adapter with its base, or a plain model. Nothing heavy is imported."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tuoling import console
from tuoling.errors import DataError, ModelError
from tuoling.families import OTHER, Family, family_of
from tuoling.files import manifest_problems, read_json, sha256_file, sha256_text
from tuoling.language import tr
from tuoling.models.adapter_files import (
    ADAPTER_WEIGHTS,
    adapter_config_file,
    is_adapter_folder,
)
from tuoling.models.quantization import PLAIN, Quantization

TEMPLATE_FILE = "template.json"
"""Beside every model and adapter we save: {"template", "stops", "system", "max_seq_len"} and for an adapter "base":
{"path", "named" (as the user gave it), "config_sha256"} and, where it was trained on a quantised base, "quantization":
{"quantization_bit", "quantization_type", "double_quantization"}."""

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$", re.ASCII)


@dataclass(frozen=True)
class ModelSource:
    """A model that was found, and all that its files say of how to use it.

    path:     folder with the adapter or model files (for an unfinished run: its newest checkpoint).
    base:     what an adapter stands on; None for a whole model.
    template: id the weights were tuned with; None where the files do not say.
    stops:    strings that end a reply besides the end token.
    config:   config.json of the model (of the base, for an adapter).
    run:      run.json, where the folder is a run.
    quantization: how the base was kept in memory when an adapter was trained.
    lora_alpha: as the user gave it, for an adapter whose files do not say.
    """

    kind: Literal["run", "adapter", "model"]
    path: Path
    base: ModelSource | None = None
    template: str | None = None
    stops: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    family: Family = OTHER
    run: dict[str, Any] | None = None
    system: str | None = None
    max_seq_len: int | None = None
    name: str = ""
    quantization: Quantization = PLAIN
    lora_alpha: float | None = None

    @property
    def is_adapter(self) -> bool:
        """True where `path` holds an adapter and `base` the weights below it."""
        return self.base is not None

    @property
    def weights_path(self) -> Path:
        """The folder with the whole model's weights: the base's, for an adapter."""
        return self.base.weights_path if self.base else self.path

    def fingerprint(self) -> str:
        """Changes whenever the weights may have: names, sizes and times of the weight files, the base's too."""
        entries = [
            f"{file.name}:{file.stat().st_size}:{file.stat().st_mtime_ns}"
            for file in (*weight_files(self.path), *(self.path / name for name in ADAPTER_WEIGHTS))
            if file.is_file()
        ]
        alpha = "" if self.lora_alpha is None else f"\nalpha {self.lora_alpha}"
        return sha256_text("\n".join([*entries, (self.base.fingerprint() if self.base else "") + alpha]))

    @property
    def run_folder(self) -> Path:
        """The run that `path` belongs to (`path` itself where it is no checkpoint of a run)."""
        parent = self.path.parent
        return parent if self.run is not None and (parent / "run.json").is_file() else self.path


def find_model(
    path_or_id: str | Path,
    *,
    revision: str | None = None,
    base: str | None = None,
    lora_alpha: float | None = None,
) -> ModelSource:
    """Find a run, an adapter or a model: a local path first, then a hub id.

    base: use this base instead of the one that an adapter names. lora_alpha: of an adapter that does not say it.
    Raises ModelError where nothing is there; a string that looks like a path is never tried as a hub id.
    """
    asked = str(path_or_id)
    local = Path(asked).expanduser()
    if local.exists():
        return replace(_read(local, name=asked, base=base), lora_alpha=lora_alpha)
    if not is_hub_id(asked):
        raise _no_such_path(asked, local)
    from tuoling.models.hub import fetch

    found = _read(fetch(asked, revision=revision), name=asked, base=base)
    return replace(found, lora_alpha=lora_alpha)


def is_hub_id(asked: str) -> bool:
    """True for `name` or `owner/name`; False for whatever a person would call a path."""
    if not _HUB_ID.match(asked) or asked.startswith((".", "/", "~")):
        return False
    first = asked.split("/")[0]
    return not ("/" in asked and Path(first).exists())


def _no_such_path(asked: str, local: Path) -> ModelError:
    parent = local.parent
    nearby = sorted(entry.name for entry in parent.iterdir() if entry.is_dir()) if parent.is_dir() else []
    close = difflib.get_close_matches(local.name, nearby, n=3)
    remedy = tr("a hub id has the form owner/name", "模型库编号的形式是 owner/name")
    if close:
        names = ", ".join(str(parent / name) for name in close)
        remedy = tr(f"did you mean {names}?", f"是不是想写 {names}？")
    return ModelError(tr("no such model folder", "没有这个模型目录"), where=asked, remedy=remedy)


def _read(folder: Path, *, name: str, base: str | None) -> ModelSource:
    if folder.is_file():
        raise ModelError(
            tr("this is a file; a model is a folder", "这是一个文件；模型应当是一个目录"),
            where=str(folder),
            remedy=tr(f"give the folder: {folder.parent}", f"请给出目录：{folder.parent}"),
        )
    run = _read_object(folder / "run.json") if (folder / "run.json").is_file() else None
    place = folder if run is None else _weights_of_run(folder)
    if run is None and (folder.parent / "run.json").is_file() and folder.name.startswith("checkpoint-"):
        run = _read_object(folder.parent / "run.json")
    if is_adapter_folder(place):
        return _adapter(place, name=name, run=run, base=base)
    return _model(place, name=name, run=run)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except DataError as error:
        raise ModelError(error.problem, where=error.where) from error
    if not isinstance(value, dict):
        raise ModelError(tr("not a JSON object", "不是 JSON 对象"), where=str(path))
    return value


def has_weights(folder: Path) -> bool:
    """True where a folder holds a whole model's weights or an adapter's."""
    return any((folder / name).is_file() for name in ADAPTER_WEIGHTS) or bool(weight_files(folder))


def weight_files(folder: Path) -> list[Path]:
    """The whole model's weight files: safetensors where there are any, else `pytorch_model*.bin`."""
    safetensors = sorted(folder.glob("model*.safetensors"))
    return safetensors or sorted(folder.glob("pytorch_model*.bin"))


def newest_checkpoint(run_folder: Path) -> Path | None:
    """The newest `checkpoint-N` whose manifest holds; None where there is none."""
    numbered = []
    for entry in run_folder.glob("checkpoint-*"):
        number = entry.name.removeprefix("checkpoint-")
        if entry.is_dir() and number.isdigit():
            numbered.append((int(number), entry))
    return next((entry for _, entry in sorted(numbered, reverse=True) if not manifest_problems(entry)), None)


def _weights_of_run(folder: Path) -> Path:
    if has_weights(folder):
        return folder
    checkpoint = newest_checkpoint(folder)
    if checkpoint is None:
        raise ModelError(
            tr("the run has no weights and no whole checkpoint yet", "该运行还没有权重，也没有完整的检查点"),
            where=str(folder),
            remedy=tr(
                "train again; a smaller save_steps makes checkpoints sooner",
                "请重新训练；调小 save_steps 可以更早得到检查点",
            ),
        )
    console.note(
        tr(f"the run is not finished: using {checkpoint.name}", f"该运行尚未完成：使用 {checkpoint.name}")
    )
    return checkpoint


def _template_record(place: Path) -> dict[str, Any]:
    for folder in (place, place.parent):
        if (folder / TEMPLATE_FILE).is_file() and (folder is place or place.name.startswith("checkpoint-")):
            return _read_object(folder / TEMPLATE_FILE)
    return {}


def _adapter(place: Path, *, name: str, run: dict[str, Any] | None, base: str | None) -> ModelSource:
    record = _template_record(place)
    base_source = _find_base(place, record, asked=base)
    return ModelSource(
        kind="run" if run is not None else "adapter",
        path=place,
        base=base_source,
        template=record.get("template") or base_source.template,
        stops=tuple(record.get("stops") or base_source.stops),
        config=base_source.config,
        family=base_source.family,
        run=run,
        system=record.get("system"),
        max_seq_len=record.get("max_seq_len"),
        name=name,
        quantization=Quantization.from_record(record.get("quantization") or {}, str(place / TEMPLATE_FILE)),
    )


def _model(place: Path, *, name: str, run: dict[str, Any] | None) -> ModelSource:
    if not (place / "config.json").is_file():
        raise ModelError(
            tr("no config.json: this is not a model folder", "缺少 config.json：这不是模型目录"),
            where=str(place),
            remedy=_what_is_there(place),
        )
    config = _read_object(place / "config.json")
    if not weight_files(place):
        raise ModelError(
            tr("the model folder has no weights", "模型目录中没有权重文件"),
            where=str(place),
            remedy=tr(
                "expected model.safetensors (or shards with an index), or pytorch_model.bin",
                "应当有 model.safetensors（或带索引的分片），或 pytorch_model.bin",
            ),
        )
    record = _template_record(place)
    return ModelSource(
        kind="run" if run is not None else "model",
        path=place,
        template=record.get("template"),
        stops=tuple(record.get("stops") or ()),
        config=config,
        family=family_of(config.get("model_type")),
        run=run,
        system=record.get("system"),
        max_seq_len=record.get("max_seq_len"),
        name=name,
    )


def _what_is_there(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    if not names:
        return tr(
            "the folder is empty: give one that holds a model, an adapter or a run",
            "目录是空的：请给出存放模型、适配器或训练结果的目录",
        )
    if any(folder.glob("consolidated.*.pth")):
        return tr(
            f"these are Meta's files: tuoling convert {folder} OUT",
            f"这是 Meta 格式的权重：tuoling convert {folder} 输出目录",
        )
    inner = [name for name in names if (folder / name / "config.json").is_file()]
    inner += [
        name for name in reversed(names) if (folder / name).is_dir() and is_adapter_folder(folder / name)
    ]
    if inner:
        return tr(f"did you mean {folder / inner[0]}?", f"是不是想写 {folder / inner[0]}？")
    shown = ", ".join(names[:8]) + (" …" if len(names) > 8 else "")
    return tr(f"give a model folder; this one holds: {shown}", f"请给出模型目录；这个目录里有：{shown}")


def _find_base(place: Path, record: dict[str, Any], *, asked: str | None) -> ModelSource:
    said = record.get("base") or {}
    config_file = adapter_config_file(place)
    in_config = {} if config_file is None else _read_object(config_file)
    named = asked or said.get("path") or in_config.get("base_model_name_or_path")
    if not named:
        raise ModelError(
            tr("the adapter does not say which base model it belongs to", "该适配器没有写明它的基座模型"),
            where=str(config_file or place),
            remedy=tr(
                "name it: --base PATH_OR_ID (train: --model BASE adapter_name_or_path=ADAPTER)",
                "请指定：--base 路径或编号（train：--model 基座 adapter_name_or_path=适配器）",
            ),
        )
    wanted_hash = said.get("config_sha256")
    found = asked or _moved_base(place, str(named), wanted_hash)
    if not asked and not Path(found).exists():
        found = hub_name(said) or found  # the cache was cleared, or the adapter came from another machine
    try:
        base = find_model(found)
    except ModelError as error:
        raise ModelError(
            tr(f"the adapter's base model is not there: {named}", f"找不到该适配器的基座模型：{named}"),
            where=str(place),
            remedy=tr(
                f"if it was moved, name it: --base PATH_OR_ID\n({error.problem})",
                f"如果已移动，请指定：--base 路径或编号\n（{error.problem}）",
            ),
        ) from error
    if base.is_adapter:
        raise ModelError(
            tr("the base is itself an adapter", "基座本身是一个适配器"),
            where=str(base.path),
            remedy=tr("merge it into its own base first", "请先把它合并进自己的基座"),
        )
    if wanted_hash and sha256_file(base.path / "config.json") != wanted_hash:
        differs = tr(
            f"the base at {base.path} is not the one this adapter was trained on: its config.json differs",
            f"{base.path} 不是训练该适配器时的基座：config.json 不同",
        )
        if not asked:
            raise ModelError(
                differs,
                where=str(place),
                remedy=tr(
                    f"name the right one: --base PATH_OR_ID; to use this one all the same: --base {base.path}",
                    f"请指定正确的基座：--base 路径或编号；仍要用它：--base {base.path}",
                ),
            )
        console.warn(differs)
    return base


def hub_name(base: Mapping[str, Any]) -> str | None:
    """The hub id that a base was given by; None where it was a local folder (whose path ends as it was given)."""
    named, path = str(base.get("named") or ""), Path(str(base.get("path") or ""))
    return named if is_hub_id(named) and path.name != Path(named).name else None


def _moved_base(place: Path, named: str, config_sha256: str | None) -> str:
    """`named` as it is, or from the adapter's side, or beside the run if folders were moved together."""
    if Path(named).expanduser().exists():
        return named
    beside = [place / named] if not Path(named).is_absolute() else []
    for candidate in beside:
        if (candidate / "config.json").is_file():
            return str(candidate)
    if config_sha256:  # only the very same model is taken from a place that nobody named
        for parent in list(place.absolute().parents)[:3]:
            candidate = parent / Path(named).name
            if (candidate / "config.json").is_file() and sha256_file(
                candidate / "config.json"
            ) == config_sha256:
                console.note(tr(f"base model found at {candidate}", f"在 {candidate} 找到基座模型"))
                return str(candidate)
    return named
