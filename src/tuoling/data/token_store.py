"""The token store on disk: examples as ids and learned spans, memory-mapped, written shard by shard."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
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

    whole = True
    """Whether all examples are there: growing_store.py has one that is read while it is made."""

    def __init__(self, path: Path, paths: list[str] | None = None) -> None:
        self.path = path
        self.meta: dict[str, Any] = read_json(path / META)
        self.key: str = self.meta["key"]
        self._paths = paths if paths is not None else list(self.meta["paths"])
        self._part_starts = np.fromfile(path / "parts.bin", dtype=np.int64)
        self._parts: dict[int, np.ndarray] = {}  # mapped when the first of their examples is asked for
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
        first, last = self._span_offsets[index], self._span_offsets[index + 1]
        return Example(self.input_ids(index), self._spans[first:last].astype(np.int64), int(index))

    def ready(self, count: int) -> bool:
        """Whether the first `count` examples are there, or all there will be."""
        return True

    def wait(self, count: int) -> None:
        """Until they are."""

    @property
    def shard_starts(self) -> np.ndarray:
        """int64 [shards]: the first example of each shard."""
        return np.searchsorted(self._offsets, self._part_starts)

    def input_ids(self, index: int) -> np.ndarray:
        """uint32 [L] of an example."""
        begin, end = int(self._offsets[index]), int(self._offsets[index + 1])
        part = int(np.searchsorted(self._part_starts, begin, side="right")) - 1
        if part not in self._parts:
            self._parts[part] = np.memmap(self.path / token_file(part), dtype=np.uint32, mode="r")
        start = int(self._part_starts[part])
        return np.asarray(self._parts[part][begin - start : end - start])

    @property
    def paths(self) -> list[str]:
        """Files and hub datasets that the rows were read from."""
        return list(self._paths)

    @property
    def learned_ends(self) -> np.ndarray:
        """int64 [N]: where the last learned span of each example ends."""
        return self._spans[self._span_offsets[1:] - 1, 1].astype(np.int64)

    @property
    def sources(self) -> np.ndarray:
        """uint32 [N]: which of the sources each example came from."""
        return self._files

    def place(self, index: int) -> str:
        """`file:line` of the row an example was made from."""
        return f"{self._paths[self._files[index]]}:{self._lines[index]}"


def token_file(shard: int) -> str:
    """Where the ids of a shard's examples stand."""
    return f"tokens-{shard:05d}.bin"


_COLUMNS = {
    "lengths": np.int32,
    "learned": np.int32,
    "span_counts": np.int32,
    "spans": np.int32,
    "files": np.uint32,
    "lines": np.uint32,
    "row_lengths": np.int32,
}


class ShardWriter:
    """Appends examples to a shard's files; holds about 4 MB of tokens and 30 bytes an example.

    Whole only after `finish`: the tokens come to their name then.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self._folder, self._number = folder, number
        self._temporary = folder / f".{token_file(number)}.{os.getpid()}.part"
        self._tokens = array("I")
        self._columns = {name: array("i" if kind == np.int32 else "I") for name, kind in _COLUMNS.items()}
        self._file = self._temporary.open("wb")
        self._hash = hashlib.sha256()
        self.tokens = 0
        self.learned = 0
        self.max_len = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._columns["lengths"])

    def add(self, ids: list[int], spans: Sequence[tuple[int, int]], file: int, line: int) -> None:
        """Append one example. Spans begin at token 1 or later, and hold at least one token together."""
        columns = self._columns
        learned = 0
        for span in spans:
            columns["spans"].extend(span)
            learned += span[1] - span[0]
        self._tokens.extend(ids)
        length = len(ids)
        columns["lengths"].append(length)
        columns["span_counts"].append(len(spans))
        columns["files"].append(file)
        columns["lines"].append(line)
        columns["learned"].append(learned)
        self.tokens += length
        self.learned += learned
        self.max_len = max(self.max_len, length)
        if len(self._tokens) >= _FLUSH_TOKENS:
            self._flush()

    def _flush(self) -> None:
        self._hash.update(self._tokens)
        self._tokens.tofile(self._file)
        del self._tokens[:]

    def finish(self, row_lengths: array[int]) -> str:
        """Put the files in their places; returns the SHA-256 of the tokens."""
        self._flush()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._columns["row_lengths"] = row_lengths
        columns = {name: np.array(self._columns[name], dtype=kind) for name, kind in _COLUMNS.items()}
        place = self._folder / f"rows-{self._number:05d}.npz"
        temporary = place.with_name(f".{place.name}.{os.getpid()}.part")
        with temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **columns)
        temporary.replace(place)
        self._temporary.replace(self._folder / token_file(self._number))
        return self._hash.hexdigest()


def join_columns(folder: Path, first_lines: Sequence[Mapping[int, int]]) -> np.ndarray:
    """Write the columns of all shards as those of one store. first_lines: for each shard, lines of the sources before it.

    Returns int32 [rows], the tokens of every row before it was made to fit.
    """
    parts = [columns_of(folder, number, lines) for number, lines in enumerate(first_lines)]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in _COLUMNS}
    tokens = np.array([part["lengths"].sum(dtype=np.int64) for part in parts], dtype=np.int64)
    del parts
    files = {
        "parts": _starts(tokens)[:-1],
        "offsets": _starts(joined["lengths"]),
        "span_offsets": _starts(joined["span_counts"]),
        **{name: joined[name] for name in ("spans", "files", "lines", "learned")},
    }
    for name, values in files.items():
        with (folder / f"{name}.bin").open("wb") as file:
            values.tofile(file)
    return joined["row_lengths"]


def columns_of(folder: Path, number: int, first_lines: Mapping[int, int]) -> dict[str, np.ndarray]:
    """What a shard's file says of its examples. first_lines: lines of the sources before it."""
    with np.load(folder / f"rows-{number:05d}.npz", allow_pickle=False) as found:
        columns = {name: found[name] for name in _COLUMNS}
    for source, lines in first_lines.items():
        columns["lines"][columns["files"] == source] += np.uint32(lines)
    return columns


def _starts(counts: np.ndarray) -> np.ndarray:
    """int64 [N + 1]: where each begins when they stand one after another, and where the last ends."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def leftovers(folder: Path) -> Iterator[Path]:
    """What a finished store does not need of its shards."""
    for pattern in ("rows-*.npz", "rejected-*.jsonl", "shard-*.json", ".*.part"):
        yield from folder.glob(pattern)


def write_meta(folder: Path, meta: Mapping[str, Any]) -> None:
    """The facts of a store, its key among them."""
    write_json(folder / META, meta)


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
