"""Our own diff: one safetensors file that turns a base's tensors into a model's files, bit for bit.

Every file of the model is a row of parts: of a safetensors file its head and then each tensor, of any other file the
whole. A part is coded (`delta_code`) against the base's tensor of the same name, where there is one, and lies in the
diff as a U8 tensor, named `<file>` or `<file>/<tensor>`. The metadata hold the record: of each part the SHA-256 of its
code and of the base's tensor, of each file its SHA-256. So base, diff and result are checked, each by itself; and the
base may lie in other files or shards, or in a pickle, as long as its tensors are the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from tuoling.errors import ModelError
from tuoling.language import tr
from tuoling.models.weight_files import SafetensorsHeader, damaged, read_header

FORMAT = "tuoling-diff"
VERSION = 1
LARGEST_HEAD_BYTES = 100_000_000
"""The limit of safetensors' own library."""

_HASH_LENGTH = 64
_LARGEST = 10**15
"""Longer than any offset, so that the head is not longer than the room left for it."""


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive bytes of a file.

    name:        its tensor's name in the diff.
    item_bytes:  size of its numbers.
    base:        name of the base's tensor it is coded against; None: alone.
    base_dtype:  what that tensor is cast to first (safetensors' name); None: taken as it is.
    base_sha256: of the base's tensor as the base has it.
    sha256:      of the code.
    """

    name: str
    size_bytes: int
    item_bytes: int = 1
    base: str | None = None
    base_dtype: str | None = None
    base_sha256: str | None = None
    sha256: str = "0" * _HASH_LENGTH


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file of the model."""

    name: str
    size_bytes: int
    parts: tuple[Part, ...]
    sha256: str = "0" * _HASH_LENGTH


@dataclass(frozen=True, slots=True)
class Record:
    """What a diff says of itself. one_file: the model was given as a file, not as a folder."""

    base_name: str
    one_file: bool
    files: tuple[FileRecord, ...]

    def to_text(self) -> str:
        """As it lies in the metadata."""
        return json.dumps({"version": VERSION, **asdict(self)}, separators=(",", ":"))


def head_bytes(record: Record, sizes: Mapping[str, int], room: int = 0) -> bytes:
    """The head of a diff whose codes have these sizes, padded to `room` bytes or to a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "record": record.to_text()}}
    end = 0
    for name, size in sizes.items():
        start, end = end, end + size
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    length = max(room - 8, len(text) + -len(text) % 8)
    return length.to_bytes(8, "little") + text.ljust(length)


class DiffWriter:
    """Leaves room for the head, takes the codes one after another, and writes the head when all is known."""

    def __init__(self, file: IO[bytes], planned: Record) -> None:
        """planned: the record before the work; every hash in it has its final length."""
        self._file = file
        longest = [
            FileRecord(one.name, one.size_bytes, tuple(_longest(part) for part in one.parts))
            for one in planned.files
        ]
        names = [part.name for one in longest for part in one.parts]
        record = Record(planned.base_name, planned.one_file, tuple(longest))
        self._room = len(head_bytes(record, dict.fromkeys(names, _LARGEST)))
        self._sizes: dict[str, int] = {}
        file.seek(self._room)

    def write(self, name: str, code: Sequence[bytes]) -> None:
        """The code of the next part."""
        self._sizes[name] = sum(map(len, code))
        self._file.writelines(code)

    def finish(self, record: Record) -> None:
        """Write the head."""
        head = head_bytes(record, self._sizes, self._room)
        if len(head) != self._room:
            raise AssertionError(f"the head takes {len(head)} bytes, {self._room} were left for it")
        self._file.seek(0)
        self._file.write(head)


def _longest(part: Part) -> Part:
    """A part whose text is at least as long as it will be."""
    known = "0" * _HASH_LENGTH if part.base else None
    return Part(part.name, part.size_bytes, part.item_bytes, part.base, part.base_dtype, known)


def is_tensor_diff(path: Path) -> bool:
    """Whether a file says that it is one of ours; cheap, whatever the file is."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LARGEST_HEAD_BYTES or file.read(1) != b"{":
            return False
    try:
        return read_header(path).metadata.get("format") == FORMAT
    except ModelError:
        return False


def read_record(path: Path) -> tuple[Record, SafetensorsHeader]:
    """What a diff says. Raises ModelError where it is damaged, or asks for what a diff must not ask for."""
    head = read_header(path)
    try:
        said = json.loads(head.metadata["record"])
        if said["version"] != VERSION:
            raise _other_version(path, said["version"])
        files = tuple(
            FileRecord(
                one["name"], one["size_bytes"], tuple(Part(**part) for part in one["parts"]), one["sha256"]
            )
            for one in said["files"]
        )
        record = Record(said["base_name"], said["one_file"], files)
        problem = next(_problems(record, head), None)
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(path, tr("its record cannot be read", "无法读取其中的记录")) from error
    if problem:
        raise damaged(path, problem)
    return record, head


def _other_version(path: Path, version: object) -> ModelError:
    return ModelError(
        tr(f"a diff of version {version}, newer than this program", f"差分的版本为 {version}，比本程序新"),
        where=str(path),
        remedy="pip install -U tuoling",
    )


def _problems(record: Record, head: SafetensorsHeader) -> Iterator[str]:
    """What is wrong with a record; nothing in it may lead out of the output folder."""
    seen = set()
    for one in record.files:
        place = PurePosixPath(one.name)
        if (
            place.is_absolute()
            or ".." in place.parts
            or not place.name
            or "\\" in one.name
            or one.name in seen
        ):
            yield tr(f"it would write to {one.name!r}", f"它要写到 {one.name!r}")
        seen.add(one.name)
        if sum(part.size_bytes for part in one.parts) != one.size_bytes:
            yield tr(f"the parts of {one.name} are not its size", f"{one.name} 各部分之和与其大小不符")
        for part in one.parts:
            if (
                part.item_bytes not in (1, 2, 4, 8)
                or part.size_bytes < 0
                or part.size_bytes % part.item_bytes
            ):
                yield tr(f"{part.name} has an impossible size", f"{part.name} 的大小不可能")
            if part.name not in head.entries:
                yield tr(f"{part.name} is missing", f"缺少 {part.name}")
