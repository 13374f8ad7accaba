"""Rows cut into shards, each compiled by itself: a function of the files alone, whoever compiles them.

A plain file of JSON lines is cut into ranges of bytes, which the process that compiles a shard reads itself; of
everything else the rows are read here, one after another, and handed out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tuoling.data.containers import sniff
from tuoling.data.json_stream import Raw
from tuoling.data.read import numbered_rows
from tuoling.data.sources import Source

SHARD_BYTES = 4 << 20
"""Of input: some 4,000 rows, half a second of tokenising."""
MOST_RANGES = 256
"""A shard's tokens stay a file of their own, which is mapped while training: larger input makes larger shards."""
SHARD_ROWS, GROWS_AFTER, MOST_SHARD_ROWS = 4096, 64, 65536
"""Of rows that are read here: twice as many from each 64th shard on, so that there are few hundred of them, too."""
SHARD_CHARACTERS = 16 << 20

_RANGES = ("utf-8", "utf-8-sig", "gb18030")  # where a byte 0x0a is a line end and nothing else


@dataclass(frozen=True, slots=True)
class Piece:
    """Whole lines of a file of JSON lines, bytes [begin, end). file: its number among the sources."""

    file: int
    begin: int
    end: int
    encoding: str


@dataclass(frozen=True, slots=True)
class Shard:
    """Pieces of files, or records as (number of the source, number of the row, what was read)."""

    number: int
    pieces: tuple[Piece, ...] = ()
    records: tuple[tuple[int, int, Raw], ...] = ()

    @property
    def name(self) -> str:
        return f"{self.number:05d}"

    def identity(self) -> list[list[Any]]:
        """What tells a shard of the same number and of other rows apart."""
        ends = self.records[:1] + self.records[-1:]
        pieces: list[list[Any]] = [[piece.file, piece.begin, piece.end] for piece in self.pieces]
        return pieces + [[file, number, len(self.records)] for file, number, _ in ends]


def cut_into_shards(sources: Sequence[Source], max_samples: int | None) -> Iterator[Shard]:
    """All rows of the sources, in their order. Raises DataError as `read_rows` does."""
    wanted = max(SHARD_BYTES, -(-size_bytes(sources) // MOST_RANGES))
    number = 0
    pieces: list[Piece] = []
    for file, source in enumerate(sources):
        encoding = _range_encoding(source, max_samples)
        if encoding is None:
            if pieces:
                yield Shard(number, tuple(pieces))
                number, pieces = number + 1, []
            for records in _record_groups(file, source, max_samples, number):
                yield Shard(number, (), records)
                number += 1
            continue
        for begin, end in _line_ranges(source.path, wanted, sum(piece.end - piece.begin for piece in pieces)):
            pieces.append(Piece(file, begin, end, encoding))
            if sum(piece.end - piece.begin for piece in pieces) >= wanted:
                yield Shard(number, tuple(pieces))
                number, pieces = number + 1, []
    if pieces:
        yield Shard(number, tuple(pieces))


def size_bytes(sources: Sequence[Source]) -> int:
    """Of the files; a dataset of the hub counts nothing."""
    return sum(Path(source.path).stat().st_size for source in sources if source.hub is None)


def _range_encoding(source: Source, max_samples: int | None) -> str | None:
    """How the bytes are read where any line of the file can be begun at; None where it must be read as a whole."""
    if source.hub is not None or source.sample is not None or max_samples is not None:
        return None
    found = sniff(source.path, format=source.format, columns=source.columns)
    plain = found.kind == "json_lines" and not found.encoding.gzip and found.encoding.name in _RANGES
    return found.encoding.name if plain else None


def _line_ranges(path: str, wanted: int, taken: int) -> Iterator[tuple[int, int]]:
    """Ranges of about `wanted` bytes that end behind a line; the first fills up a shard that has `taken` already."""
    size, begin = Path(path).stat().st_size, 0
    with Path(path).open("rb") as file:
        while begin < size:
            end = begin + max(1, wanted - taken)
            if end < size:
                file.seek(end)
                end += len(file.readline())
            end = min(end, size)
            yield begin, end
            begin, taken = end, 0


def _record_groups(
    file: int, source: Source, max_samples: int | None, number: int
) -> Iterator[tuple[tuple[int, int, Raw], ...]]:
    group: list[tuple[int, int, Raw]] = []
    size = 0
    for row, raw in islice(numbered_rows(source), max_samples):
        group.append((file, row, raw))
        size += _characters(raw[1])
        if len(group) >= _rows_of(number) or size >= SHARD_CHARACTERS:
            yield tuple(group)
            group, size, number = [], 0, number + 1
    if group:
        yield tuple(group)


def _rows_of(number: int) -> int:
    return min(MOST_SHARD_ROWS, SHARD_ROWS << min(10, number // GROWS_AFTER))


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list | tuple) else 1
