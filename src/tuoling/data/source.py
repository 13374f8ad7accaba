"""One file (or hub dataset) of rows, and how it is read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from tuoling.files import sha256_file

REGISTRY = "dataset_info.json"
"""LLaMA-Factory's table of datasets."""

SAMPLE = re.compile(r"(.+)#(\d+)$")
"""`path#500`."""


@dataclass(frozen=True)
class Source:
    """One file (or hub dataset) of rows and how to read it.

    format: a row format's name, None for by content; `text_blocks`: plain text by blank lines.
    columns: our field → the file's column; `optional_columns` of them may be missing.
    tags: LLaMA-Factory's names of keys and speakers inside messages.
    sample: keep so many rows, drawn with `seed`. hub, subset, split: a dataset of the hub instead of a file.
    """

    path: str
    format: str | None = None
    columns: Mapping[str, str] | None = None
    sample: int | None = None
    seed: int = 42
    tags: Mapping[str, str] | None = None
    optional_columns: frozenset[str] = frozenset()
    hub: str | None = None
    subset: str | None = None
    split: str = "train"
    skipped: tuple[str, ...] = field(default=(), compare=False)

    def content_key(self) -> str:
        """Hex SHA-256 over the source's bytes and how they are read: equal keys give equal rows."""
        how = {
            "format": self.format,
            "columns": dict(self.columns or {}),
            "sample": self.sample,
            "seed": self.seed if self.sample is not None else None,
            "tags": dict(self.tags or {}),
            "subset": self.subset,
            "split": self.split if self.hub else None,
        }
        if self.hub is not None:
            from tuoling.data.hub import hub_fingerprint

            content = hub_fingerprint(self)
        else:
            content = sha256_file(self.path)
        return hashlib.sha256(f"{content}\n{json.dumps(how, sort_keys=True)}".encode()).hexdigest()
