"""Tuoling 驼铃: make a Chinese-capable language model your own.

`tuoling.load`, `tuoling.train` and `tuoling.resume` are the Python interface (see `tuoling.api`); importing the package
is light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuoling.api import Model, load, resume, train

__all__ = ["Model", "load", "resume", "train"]


def __getattr__(name: str) -> Any:
    """Import the interface when it is first used. (`tuoling.train` is a package that can be called.)"""
    if name == "train":
        return importlib.import_module("tuoling.train")
    if name in __all__:
        from tuoling import api

        return getattr(api, name)
    raise AttributeError(f"module 'tuoling' has no attribute {name!r}")
