"""The kinds of diff, how one is told from the others, and who makes and applies it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import cast

from tuoling.errors import ModelError, UsageError
from tuoling.language import tr
from tuoling.weights.diff_options import DiffOptions, DiffReport

KINDS = {
    "xor": ("tuoling.weights.xor_folder:make_xor_diff", "tuoling.weights.xor_folder:apply_xor_diff"),
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
    return _function(kind or usual_kind(base, target), 0)(base, target, out, options)


def apply_diff(base: Path, diff: Path, out: Path, options: DiffOptions) -> DiffReport:
    """Write what `diff` turns `base` into."""
    require_there(base, diff)
    return _function(recognise(diff), 1)(base, diff, out, options)


def _function(kind: str, which: int) -> Callable[..., DiffReport]:
    module, _, name = KINDS[kind][which].partition(":")
    return cast(Callable[..., DiffReport], getattr(importlib.import_module(module), name))


def require_there(*paths: Path) -> None:
    """Raise UsageError where nothing lies at a path."""
    for path in paths:
        if not path.exists():
            raise UsageError(tr(f"no such file or folder: {path}", f"没有这个文件或目录：{path}"))


def usual_kind(base: Path, target: Path) -> str:
    """XOR."""
    return "xor"


def recognise(diff: Path) -> str:
    """Which kind of diff lies there. Raises ModelError where it is none."""
    if diff.name.endswith(".enc") or (diff.is_dir() and any(diff.rglob("*.enc"))):
        return "xor"
    raise ModelError(
        tr("this is no diff that is known", "不是已知的差分"),
        where=str(diff),
        remedy=tr(
            "known: .enc files (point-alpaca, BELLE)",
            "已知：.enc 文件（point-alpaca、BELLE）",
        ),
    )
