"""The token store on disk: examples as ids and learned spans, memory-mapped, written as a stream."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tuoling.errors import DataError
from tuoling.files import MANIFEST, manifest_problems, read_json, write_json

META = "meta.json"
_FLUSH_TOKENS = 1 << 20
_HASH_BELOW_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Example:
    """input_ids: uint32 [L]. spans: int64 [S, 2], half-open token ranges that are learned. row: index in the store.

    extra_labels: int64 [E, 2], (place, id) pairs that are learned as well: `id` is to follow the tokens before `place`,
    whatever stands there. They come from rows that begin like this one (prefixes.py).
    """

    input_ids: np.ndarray
    spans: np.ndarray
    row: int
    extra_labels: np.ndarray | None = None


class TokenStore:
    """Examples of a store folder. Opening it reads a few numbers; pages come in as they are used."""

    def __init__(self, path: Path, paths: list[str] | None = None) -> None:
        self.path = path
        self.meta: dict[str, Any] = read_json(path / META)
        self.key: str = self.meta["key"]
        self._paths = paths if paths is not None else list(self.meta["paths"])
        self._tokens = np.memmap(path / "tokens.bin", dtype=np.uint32, mode="r")
        self._offsets = np.fromfile(path / "offsets.bin", dtype=np.int64)
        self._spans = np.memmap(path / "spans.bin", dtype=np.int32, mode="r").reshape(-1, 2)
        self._span_offsets = np.fromfile(path / "span_offsets.bin", dtype=np.int64)
        self._files = np.fromfile(path / "files.bin", dtype=np.uint32)
        self._lines = np.fromfile(path / "lines.bin", dtype=np.uint32)
        self.lengths = np.diff(self._offsets).astype(np.int32)
        """int32 [N]: tokens of each example."""
        self.learned = np.fromfile(path / "learned.bin", dtype=np.int32)
        """int32 [N]: learned tokens of each example."""

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        begin, end = self._offsets[index], self._offsets[index + 1]
        first, last = self._span_offsets[index], self._span_offsets[index + 1]
        return Example(
            np.asarray(self._tokens[begin:end]), self._spans[first:last].astype(np.int64), int(index)
        )

    @property
    def paths(self) -> list[str]:
        """Files and hub datasets that the rows were read from."""
        return list(self._paths)

    @property
    def learned_ends(self) -> np.ndarray:
        """int64 [N]: where the last learned span of each example ends."""
        return self._spans[self._span_offsets[1:] - 1, 1].astype(np.int64)

    def place(self, index: int) -> str:
        """`file:line` of the row an example was made from."""
        return f"{self._paths[self._files[index]]}:{self._lines[index]}"


class StoreWriter:
    """Appends examples to the files of a store folder; holds about 4 MB of tokens and 40 bytes a row."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tokens = array("I")
        self._spans = array("i")
        self._offsets = array("q", [0])
        self._span_offsets = array("q", [0])
        self._files = array("I")
        self._lines = array("I")
        self._learned = array("i")
        self._token_file = (folder / "tokens.bin").open("wb")
        self._span_file = (folder / "spans.bin").open("wb")
        self.tokens = 0
        self.learned = 0
        self.max_len = 0

    def __len__(self) -> int:
        return len(self._learned)

    def add(self, ids: list[int], spans: list[tuple[int, int]], file: int, line: int) -> None:
        """Append one example. Spans begin at token 1 or later, and hold at least one token together."""
        learned = 0
        for span in spans:
            self._spans.extend(span)
            learned += span[1] - span[0]
        self._tokens.extend(ids)
        self.tokens += len(ids)
        self.learned += learned
        self.max_len = max(self.max_len, len(ids))
        self._offsets.append(self.tokens)
        self._span_offsets.append(self._span_offsets[-1] + len(spans))
        self._files.append(file)
        self._lines.append(line)
        self._learned.append(learned)
        if len(self._tokens) >= _FLUSH_TOKENS:
            self._flush()

    def _flush(self) -> None:
        self._tokens.tofile(self._token_file)
        self._spans.tofile(self._span_file)
        del self._tokens[:], self._spans[:]

    def close(self) -> None:
        """Close the two streams (also after an error)."""
        self._token_file.close()
        self._span_file.close()

    def finish(self, meta: dict[str, Any]) -> None:
        """Write what is left, and the meta file."""
        self._flush()
        self.close()
        columns = {
            "offsets": self._offsets,
            "span_offsets": self._span_offsets,
            "files": self._files,
            "lines": self._lines,
            "learned": self._learned,
        }
        for name, values in columns.items():
            with (self._folder / f"{name}.bin").open("wb") as file:
                values.tofile(file)
        write_json(self._folder / META, meta)


def open_store(path: Path, *, key: str, paths: list[str]) -> TokenStore | None:
    """The store at `path` if it is whole and of this key; None if there is none, or a damaged one."""
    if not (path / MANIFEST).is_file():
        return None
    try:
        manifest = read_json(path / MANIFEST)
        total = sum(entry["size_bytes"] for entry in manifest.values())
        if total < _HASH_BELOW_BYTES:
            whole = not manifest_problems(path)
        else:  # hashing tens of gigabytes on every start would cost minutes
            whole = all(
                (path / name).stat().st_size == entry["size_bytes"] for name, entry in manifest.items()
            )
        store = TokenStore(path, paths) if whole else None
    except (DataError, OSError, KeyError, ValueError):
        return None
    return store if store is not None and store.key == key else None
