"""The kinds of diff, how one is told from the others, and who makes and applies it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import cast

from tuoling.errors import ModelError, UsageError
from tuoling.language import tr
from tuoling.models.licence import LINEAGE, of_folder, write_lineage
from tuoling.weights.diff_options import DiffOptions, DiffReport

KINDS = {
    "tuoling": (
        "tuoling.weights.tensor_diff_files:make_tensor_diff",
        "tuoling.weights.tensor_diff_files:apply_tensor_diff",
    ),
    "xor": ("tuoling.weights.xor_folder:make_xor_diff", "tuoling.weights.xor_folder:apply_xor_diff"),
    "additive": (
        "tuoling.weights.additive:make_additive_diff",
        "tuoling.weights.additive:apply_additive_diff",
    ),
}
"""Kind → who makes it and who applies it, as "module:function", imported when it is asked for."""


def make_diff(base: Path, target: Path, out: Path, options: DiffOptions, kind: str | None) -> DiffReport:
    """Write the diff that turns `base` into `target`. kind: None for the one that fits what lies there."""
    require_there(base, target)
    if kind is not None and kind not in KINDS:
        raise UsageError(
            tr(f"--format {kind}: no such kind of diff", f"--format {kind}：没有这种差分"),
            remedy=" | ".join(KINDS),
        )
    kind = kind or usual_kind(base, target)
    _require_whole(target)
    if kind == "tuoling" and not options.allow_nan:  # additive sees it as it goes; XOR knows bytes only
        _require_finite(target)
    return _function(kind, 0)(base, target, out, options)


def _require_whole(target: Path) -> None:
    """Raise ModelError where a folder lacks a shard that its index or its files' numbers name."""
    if not any(target.glob("*.index.json")) and not any(target.glob("*-of-*")):
        return
    # these bring torch: 1.7 s that other targets have no use for
    from tuoling.models.source import weight_files
    from tuoling.models.weight_files import require_shards

    if files := weight_files(target):
        require_shards(target, files)


def _require_finite(target: Path) -> None:
    """Raise ModelError where a model to be published holds NaN or infinity: 14 GB/s from memory."""
    from tuoling.weights.tensors import SafetensorsFile, require_finite

    paths = sorted(target.glob("*.safetensors")) if target.is_dir() else [target]
    for path in paths:
        if path.suffix == ".safetensors":
            weights = SafetensorsFile(path)
            for name in weights.infos:
                require_finite(name, weights.read(name), allow_nan=False, where=path)


def apply_diff(base: Path, diff: Path, out: Path, options: DiffOptions) -> DiffReport:
    """Write what `diff` turns `base` into."""
    require_there(base, diff)
    report = _function(recognise(diff), 1)(base, diff, out, options)
    if out.is_dir() and not (out / LINEAGE).is_file():  # published by others: neither side's files tell
        write_lineage(out, of_folder(_folder_of(base)), of_folder(_folder_of(diff)), of_folder(out))
    return report


def _folder_of(path: Path) -> Path:
    return path if path.is_dir() else path.resolve().parent


def _function(kind: str, which: int) -> Callable[..., DiffReport]:
    module, _, name = KINDS[kind][which].partition(":")
    return cast(Callable[..., DiffReport], getattr(importlib.import_module(module), name))


def require_there(*paths: Path) -> None:
    """Raise UsageError where nothing lies at a path."""
    for path in paths:
        if not path.exists():
            raise UsageError(tr(f"no such file or folder: {path}", f"没有这个文件或目录：{path}"))


def usual_kind(base: Path, target: Path) -> str:
    """Our own where both have tensors, XOR against Meta's files and whatever else is only bytes."""
    meta = (base / "consolidated.00.pth").is_file() or (base.is_file() and base.suffix != ".safetensors")
    tensors = any(target.glob("*.safetensors")) if target.is_dir() else target.suffix == ".safetensors"
    return "tuoling" if tensors and not meta else "xor"


def recognise(diff: Path) -> str:
    """Which kind of diff lies there. Raises ModelError where it is none."""
    if diff.name.endswith(".enc") or (diff.is_dir() and any(diff.rglob("*.enc"))):
        return "xor"
    # brings torch: 1.7 s that an XOR patch has no use for
    from tuoling.weights.tensor_diff import is_tensor_diff

    if not diff.is_dir():
        if is_tensor_diff(diff):
            return "tuoling"
    elif any(is_tensor_diff(file) for file in diff.glob("*.safetensors")):
        return "tuoling"
    elif (diff / "config.json").is_file() and any(
        file.suffix in (".safetensors", ".bin") for file in diff.iterdir()
    ):
        return "additive"
    raise ModelError(
        tr("this is no diff that is known", "不是已知的差分"),
        where=str(diff),
        remedy=tr(
            "known: .enc files (point-alpaca, BELLE), a model folder with differences (Stanford), our own",
            "已知：.enc 文件（point-alpaca、BELLE）、存放差值的模型目录（斯坦福）、驼铃自己的格式",
        ),
    )
