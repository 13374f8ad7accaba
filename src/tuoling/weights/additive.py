"""Additive diffs as Stanford published Alpaca-7B: a model folder that holds target minus base, in float32.

Stanford's script has no hash: it compares the sum of all recovered weights (50637.1836 for Alpaca-7B) within 0.01. Ours
writes the same kind of folder, which that script reads too, and a record beside it with a hash of every tensor of base
and result. Where the model has more rows than the base (Alpaca's [PAD]), the base's new rows are the mean of the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tuoling import console
from tuoling.errors import ModelError, UsageError
from tuoling.files import atomic_files, read_json, refuse_existing, write_json
from tuoling.language import tr
from tuoling.models.licence import of_folder, write_lineage
from tuoling.weights.additive_check import Recovered, judge, wrong
from tuoling.weights.checksums import require_listed_files, write_md5_of
from tuoling.weights.companions import copy_companions
from tuoling.weights.diff_options import DiffOptions, DiffReport, MadeFile
from tuoling.weights.safetensors_writer import SafetensorsWriter, tensor_bytes
from tuoling.weights.tensor_diff_files import check_base_file
from tuoling.weights.tensors import TensorInfo, TensorSource, non_finite, open_weights

RECORD = "tuoling_diff.json"
INV_FREQ = "rotary_emb.inv_freq"
"""A buffer that LLaMA's weights held in 2023. It is in the sum; today's models make it themselves."""


def make_additive_diff(base: Path, target: Path, out: Path, options: DiffOptions) -> DiffReport:
    """Write the folder `out` with target minus base, in float32, and the record."""
    _require_folder(base, target)
    if not options.replace:
        refuse_existing([*_filled(out), *([options.checksums_out] if options.checksums_out else [])])
    report = DiffReport("additive", out, base)
    report.base_checked_by = check_base_file(base, options)
    weights, known = open_weights(target), _Base(base)
    infos = {name: TensorInfo(torch.float32, info.shape) for name, info in weights.infos.items()}
    recovered = Recovered()
    record: dict[str, Any] = {"format": "additive", "base": known.digests, "result": {}}
    with atomic_files(out, replace=options.replace) as staging:
        with SafetensorsWriter(staging, infos) as writer, _progress(infos) as came:
            for name, info in weights.infos.items():
                wanted = weights.read(name)
                difference, made = _subtract(name, wanted, known, target)
                writer.write(name, difference)
                del difference
                recovered.add(made)
                made = made.to(info.dtype)
                record["result"][name] = {"dtype": _short(info.dtype), "sha256": _sha256(made)}
                recovered.compare(name, made, wanted)
                del made, wanted  # nothing of this tensor lives while the next one is made
                came(infos[name].size_bytes)
        record["integrity_sum"] = recovered.total
        _write_config(target, staging, torch.float32)
        copy_companions(target, staging)
        write_json(staging / RECORD, record)
        made_files = _files(staging)
    report.files = made_files
    report.notes = [recovered.sum_note(), *recovered.loss_notes()]
    if options.checksums_out:
        write_md5_of(options.checksums_out, {one.name: out / one.name for one in made_files})
    return report


def apply_additive_diff(base: Path, diff: Path, out: Path, options: DiffOptions) -> DiffReport:
    """Write the folder `out` with base plus diff: in float32, or in the type that the record gives.

    Raises ModelError, and leaves nothing, where the result is not what record, `expected_sum` or sense say.
    """
    _require_folder(base, diff)
    weights = open_weights(diff)
    record = read_json(diff / RECORD) if (diff / RECORD).is_file() else None
    said = _said_of_result(record, weights, diff)
    listed = {file.name: file for file in sorted(diff.iterdir()) if file.is_file()}
    require_listed_files(listed, options.lists, tr("the diff", "差分文件"))
    if not options.replace:
        refuse_existing(_filled(out))
    report = DiffReport("additive", out, base)
    report.base_checked_by = check_base_file(base, options)
    known = _Base(base, record["base"] if record else None)
    infos = {
        name: TensorInfo(said[name].dtype if said else torch.float32, info.shape)
        for name, info in weights.infos.items()
        if not name.endswith(INV_FREQ)
    }
    recovered = Recovered()
    with atomic_files(out, replace=options.replace) as staging:
        with SafetensorsWriter(staging, infos) as writer, _progress(infos) as came:
            for name in weights.infos:
                made = _add(name, weights.read(name), known, recovered)
                if name not in infos:
                    continue
                made = made.to(infos[name].dtype)
                if said and _sha256(made) != said[name].sha256:
                    raise wrong(diff, tr(f"{name} has another hash", f"{name} 的哈希不符"))
                writer.write(name, made)
                del made
                came(infos[name].size_bytes)
        report.proof, note = judge(recovered, options.expected_sum, record, diff)
        _write_config(diff, staging, next(iter(infos.values())).dtype)
        write_lineage(staging, of_folder(base))
        copy_companions(diff, staging)
        report.files = _files(staging)
    report.notes = [recovered.sum_note(), *note, *known.unused_notes(weights.infos)]
    return report


class _Base:
    """The base in float32, with the rows it lacks; each tensor's hash is kept, or compared."""

    def __init__(self, path: Path, expected: Mapping[str, str] | None = None) -> None:
        self.path = path
        self._source: TensorSource = open_weights(path)
        self._expected = expected
        self.digests: dict[str, str] = {}

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor as float32, in memory of its own. Raises ModelError where there is none, or of another shape."""
        if name.endswith(INV_FREQ) and name not in self._source.infos:
            return _inv_freq(self.path, shape)
        if name not in self._source.infos:
            raise ModelError(
                tr(f"the base has no tensor {name}", f"基础模型没有张量 {name}"), where=str(self.path)
            )
        tensor = self._source.read(name)
        self.digests[name] = _sha256(tensor)
        if self._expected is not None and self._expected.get(name) != self.digests[name]:
            raise ModelError(
                tr(
                    f"not the base of the diff: {name} has another hash",
                    f"不是该差分的基础模型：{name} 的哈希不符",
                ),
                where=str(self.path),
            )
        made = tensor.to(torch.float32, copy=True)
        rows = shape[0] - made.shape[0] if shape and made.dim() == len(shape) else 0
        if rows > 0 and made.dim() == 2:
            total = torch.stack([part.sum(dim=0, dtype=torch.float64) for part in made.split(1024)]).sum(
                dim=0
            )
            mean = (total / made.shape[0]).to(torch.float32)
            made = torch.cat([made, mean.expand(rows, -1)])
        if tuple(made.shape) != tuple(shape):
            raise ModelError(
                tr(
                    f"{name} is {list(shape)} in the diff and {list(tensor.shape)} in the base",
                    f"{name} 在差分中为 {list(shape)}，在基础模型中为 {list(tensor.shape)}",
                ),
                where=str(self.path),
            )
        return made

    def unused_notes(self, used: Mapping[str, TensorInfo]) -> list[str]:
        """Tensors of the base that the result does not have."""
        unused = [name for name in self._source.infos if name not in used and not name.endswith(INV_FREQ)]
        if not unused:
            return []
        return [
            tr(
                f"{len(unused)} tensors of the base are not in the diff, nor in the result, such as {unused[0]}",
                f"基础模型有 {len(unused)} 个张量不在差分中，结果里也没有，例如 {unused[0]}",
            )
        ]


@dataclass(frozen=True, slots=True)
class _Said:
    """What a record says of a tensor of the result."""

    dtype: torch.dtype
    sha256: str


def _subtract(
    name: str, wanted: torch.Tensor, known: _Base, target: Path
) -> tuple[torch.Tensor, torch.Tensor]:
    """Target minus base, and what adding the base again makes of it; both float32."""
    if not wanted.is_floating_point():
        raise ModelError(
            tr(f"{name} is not of floating-point numbers", f"{name} 不是浮点数"),
            where=str(target),
            remedy=tr("--format tuoling takes any numbers", "--format tuoling 适用于任何数值"),
        )
    base = known.read(name, tuple(wanted.shape))
    difference = wanted.to(torch.float32, copy=True).sub_(base)
    if non_finite(difference):
        raise ModelError(
            tr(
                f"{name} holds NaN or infinity, here or in the base",
                f"{name} 含有 NaN 或无穷大（目标或基础模型）",
            ),
            where=str(target),
            remedy=tr(
                "the weights are broken; to publish them all the same: --format tuoling --allow-nan",
                "权重已损坏；若仍要发布：--format tuoling --allow-nan",
            ),
        )
    return difference, base.add_(difference)


def _add(name: str, difference: torch.Tensor, known: _Base, recovered: Recovered) -> torch.Tensor:
    """Base plus difference, in float32."""
    made = known.read(name, tuple(difference.shape))
    recovered.base_square += float(made.norm()) ** 2
    recovered.difference_square += float(difference.float().norm()) ** 2
    made.add_(difference)
    if non_finite(made):
        raise wrong(known.path, tr(f"{name} holds NaN or infinity", f"{name} 含有 NaN 或无穷大"))
    recovered.add(made)
    return made


def _said_of_result(
    record: Mapping[str, Any] | None, weights: TensorSource, diff: Path
) -> dict[str, _Said] | None:
    """The record's part on the result. Raises ModelError where it is not of these tensors."""
    if record is None:
        return None
    try:
        said = {
            name: _Said(getattr(torch, one["dtype"]), one["sha256"]) for name, one in record["result"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise wrong(diff, tr(f"{RECORD} cannot be read", f"无法读取 {RECORD}")) from error
    if said.keys() != weights.infos.keys() or not isinstance(record.get("base"), dict):
        raise wrong(diff, tr(f"{RECORD} is of other tensors", f"{RECORD} 与张量不符"))
    return said


def _inv_freq(base: Path, shape: tuple[int, ...]) -> torch.Tensor:
    """The rotary frequencies that LLaMA's weights of 2023 held, for a base that was converted later."""
    config = read_json(base / "config.json") if (base / "config.json").is_file() else {}
    theta = float(
        (config.get("rope_parameters") or {}).get("rope_theta") or config.get("rope_theta") or 10000.0
    )
    steps = torch.arange(0, 2 * shape[0], 2).float() / (2 * shape[0])
    return 1.0 / (theta**steps)


def _filled(out: Path) -> list[Path]:
    """The output folder, if there is something in it."""
    return [out] if out.exists() and (not out.is_dir() or any(out.iterdir())) else []


def _require_folder(*paths: Path) -> None:
    for path in paths:
        if not path.is_dir():
            raise UsageError(
                tr(
                    f"{path} is not a folder: an additive diff is of model folders",
                    f"{path} 不是目录：加法差分针对模型目录",
                )
            )


def _write_config(source: Path, out: Path, dtype: torch.dtype) -> None:
    """The config with the number type that the weights have now."""
    if (source / "config.json").is_file():
        config = read_json(source / "config.json")
        config.pop("torch_dtype", None)
        write_json(out / "config.json", {**config, "dtype": _short(dtype)})


def _files(folder: Path) -> list[MadeFile]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return [
        MadeFile(file.relative_to(folder).as_posix(), file.name, file.stat().st_size, "") for file in files
    ]


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def _progress(infos: Mapping[str, TensorInfo]) -> Iterator[Any]:
    total = sum(info.size_bytes for info in infos.values()) >> 20
    with console.progress() as bar:
        task = bar.add_task("MiB", total=total, detail="")
        yield lambda size: bar.update(task, advance=size / 2**20)
