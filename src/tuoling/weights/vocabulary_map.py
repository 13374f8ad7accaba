"""Which row of a large vocabulary each row of a smaller one is: `vocabulary_map.json` beside a pruned model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tuoling.errors import ModelError
from tuoling.files import atomic_write, read_json
from tuoling.language import tr

MAP_FILE = "vocabulary_map.json"
_FORMAT = "tuoling-vocabulary-map"

_LISTS = ("suppress_tokens", "begin_suppress_tokens")


@dataclass(frozen=True)
class VocabularyMap:
    """old_ids: int64 [rows], ascending: the row in the full model of each row. full_rows: rows of the full one.

    full: what the full model was: "path", "named" (as the user gave it), "config_sha256", "embedding_sha256".
    """

    old_ids: np.ndarray
    full_rows: int
    full: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.old_ids)

    @property
    def new_ids(self) -> np.ndarray:
        """int64 [full_rows]: the row here of each row of the full model, -1 where it was dropped."""
        table = np.full(self.full_rows, -1, dtype=np.int64)
        table[self.old_ids] = np.arange(len(self.old_ids))
        return table

    def new_of(self) -> dict[int, int]:
        """Full id → id here."""
        return {int(old): new for new, old in enumerate(self.old_ids)}

    def old_of(self) -> dict[int, int]:
        """Id here → full id."""
        return {new: int(old) for new, old in enumerate(self.old_ids)}

    def write(self, folder: Path) -> None:
        """Into `folder`, as one line of numbers."""
        record = {
            "format": _FORMAT,
            "rows": len(self),
            "full_rows": self.full_rows,
            "full": dict(self.full),
            "old_ids": self.old_ids.tolist(),
        }
        with atomic_write(folder / MAP_FILE) as file:  # one line: a quarter of a million numbers
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, folder: Path) -> VocabularyMap:
        """Of a pruned model. Raises ModelError where there is none, or one that contradicts itself."""
        path = folder / MAP_FILE
        if not path.is_file():
            raise ModelError(
                tr(
                    f"no {MAP_FILE}: this is no model that prune-vocab made",
                    f"没有 {MAP_FILE}：这不是 prune-vocab 生成的模型",
                ),
                where=str(folder),
            )
        record = read_json(path)
        try:
            old_ids = np.asarray(record["old_ids"], dtype=np.int64)
            rows, full_rows = int(record["rows"]), int(record["full_rows"])
            sound = old_ids.ndim == 1 and len(old_ids) == rows and bool((np.diff(old_ids) > 0).all())
            sound = sound and rows > 0 and old_ids[0] >= 0 and old_ids[-1] < full_rows
            full = dict(record["full"])
        except (KeyError, TypeError, ValueError) as error:
            raise _unsound(path) from error
        if record.get("format") != _FORMAT or not sound:
            raise _unsound(path)
        return cls(old_ids, full_rows, full)


def _unsound(path: Path) -> ModelError:
    return ModelError(
        tr("the vocabulary map is damaged", "词表对应关系文件已损坏"),
        where=str(path),
        remedy=tr("prune again", "请重新裁剪"),
    )


def renumber_config(config: Mapping[str, Any], new_of: Mapping[int, int], rows: int) -> dict[str, Any]:
    """A config.json or generation_config.json with other ids: `vocab_size`, `*_token_id`, lists of suppressed tokens.

    Ids that have no number any more are taken out; -1 (LLaMA's "none") stays.
    """
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key == "vocab_size":
            changed[key] = rows
        elif key.endswith("_token_id") or key.endswith("_token_ids") or key in _LISTS:
            changed[key] = _renumbered(value, new_of)
        elif key == "bad_words_ids" and isinstance(value, list):
            words = [_renumbered(word, new_of) for word in value]
            changed[key] = [new for new, old in zip(words, value, strict=True) if len(new) == len(old)]
        elif isinstance(value, Mapping) and "vocab_size" in value:  # a text model inside another's config
            changed[key] = renumber_config(value, new_of, rows)
        else:
            changed[key] = value
    return changed


def _renumbered(value: Any, new_of: Mapping[int, int]) -> Any:
    if isinstance(value, list):
        return [new_of[entry] for entry in value if entry in new_of]
    return new_of.get(value) if isinstance(value, int) and value >= 0 else value


def token_ids_of(config: Mapping[str, Any]) -> Iterable[int]:
    """The special ids that a config names, in whatever depth `renumber_config` changes them."""
    for key, value in config.items():
        if key.endswith("_token_id"):
            yield from (entry for entry in (value if isinstance(value, list) else [value]) if _is_id(entry))
        elif isinstance(value, Mapping) and "vocab_size" in value:
            yield from token_ids_of(value)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
