"""`tuoling convert OLD_ADAPTER NEW`: an adapter of any layout as today's PEFT writes it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuoling import files
from tuoling.errors import UsageError
from tuoling.language import tr
from tuoling.models.adapter_files import ADAPTER_CONFIG
from tuoling.models.adapter_reading import Adapter, read_adapter
from tuoling.weights.companions import copy_companions
from tuoling.weights.convert import ConvertOptions, Report
from tuoling.weights.safetensors_writer import SafetensorsWriter
from tuoling.weights.tensors import TensorInfo

if TYPE_CHECKING:
    from tuoling.models.source import ModelSource


def convert_adapter(source: Path, out: Path, options: ConvertOptions) -> Report:
    """Write adapter_model.safetensors and adapter_config.json; the tensors keep their dtype.

    With a base (named by the files, or `options.base`) every tensor is checked against its shapes first.
    """
    if options.outtype is not None or options.shards is not None:
        raise UsageError(
            tr("an adapter is written as it is, in one file", "适配器按原样写成一个文件"),
            where="--outtype, --shards",
        )
    folder = source.parent if source.is_file() else source
    adapter = read_adapter(folder, lora_alpha=options.lora_alpha)
    notes = list(adapter.notes)
    base = _check_against_base(adapter, options, notes)
    tensors = {name: tensor.contiguous() for name, tensor in adapter.tensors.items()}
    infos = {name: TensorInfo.of(tensor) for name, tensor in tensors.items()}
    with files.atomic_folder(out) as place:
        with SafetensorsWriter(place, infos, shard_size_bytes=1 << 62, stem="adapter_model") as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
        files.write_json(place / ADAPTER_CONFIG, _todays_config(adapter, base))
        copy_companions(folder, place)
    size = sum(info.size_bytes for info in infos.values())
    return Report(out, tensors=len(infos), size_bytes=size, notes=notes)


def _check_against_base(adapter: Adapter, options: ConvertOptions, notes: list[str]) -> ModelSource | None:
    """The base whose shapes the adapter fits; None where it names none, or one that is not here (both noted)."""
    from tuoling.models.adapters import wrap
    from tuoling.models.shape import meta_model
    from tuoling.models.source import find_model

    named = options.base or adapter.config.get("base_model_name_or_path")
    if options.base is None and not (named and Path(str(named)).exists()):
        notes.append(
            tr(
                f"not checked against its base ({named or 'none is named'}); to do so: --base PATH_OR_ID",
                f"未与基座核对（{named or '未写明基座'}）；如需核对：--base 路径或编号",
            )
        )
        return None
    source = find_model(str(named))
    wrap(meta_model(source.weights_path, allow_remote_code=options.allow_remote_code), adapter)
    notes.append(
        tr(
            f"every tensor fits the base {source.weights_path}",
            f"全部张量与基座 {source.weights_path} 相符",
        )
    )
    return source if options.base is not None else None


def _todays_config(adapter: Adapter, base: ModelSource | None) -> dict[str, Any]:
    """All keys of today's PEFT, in one order."""
    from tuoling.models.adapters import peft_config

    config = peft_config(adapter)
    config.inference_mode = True
    if base is not None:
        config.base_model_name_or_path = (
            base.name if not Path(base.name).exists() else str(base.path.resolve())
        )
    values = config.to_dict()
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}
    return dict(sorted(plain.items()))
