"""Which models a page offers, and what they are called there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tuoling.infer.engine import Engine
from tuoling.serve.web_answer import WebModels


def short_name(path: str) -> str:
    """A path's last part that says something: `runs/first` and `runs/first/checkpoint-20` by two."""
    parts = [part for part in Path(path).parts if part not in ("/", ".", "..")]
    last = parts[-1:] or [path]
    return "/".join(parts[-2:]) if last[0].startswith("checkpoint-") else last[0]


def web_models(engines: Mapping[str, Engine]) -> WebModels:
    """path → engine, as they were opened, into the names of the page: an engine's adapters and its base, or itself."""
    named: dict[str, Engine] = {}
    for path, engine in engines.items():
        own = {name: engine.using(name) for name in engine.adapters} or {short_name(path): engine}
        for name, one in own.items():
            free = name
            if name in named:
                free = f"{short_name(path)}/{name}"
            number = 2
            while free in named:
                free, number = f"{name} ({number})", number + 1
            named[free] = one
    return WebModels(named)
