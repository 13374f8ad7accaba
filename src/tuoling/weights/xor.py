"""XOR diffs as point-alpaca and BELLE publish them, byte for byte.

A file is 32 bytes, the SHA-256 of the plain file, and then the plain file XOR a stream made from the base (the "key":
Meta's consolidated.00.pth, also where the model has more shards). Its name is `<plain name>.<that hash in hex>.enc`.

The stream comes in blocks of 10 MiB: block i is the base's block i mod n, of n in all, and the base's last, shorter
block is repeated until its 10 MiB are full. So it is a plain repetition of the base only where the base's size is a
multiple of 10 MiB.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from tuoling.errors import ModelError
from tuoling.language import tr
from tuoling.weights.checksums import Checksums, algorithm_of
from tuoling.weights.diff_options import MadeFile
from tuoling.weights.workers import Digests, Hash, Workers

BLOCK_BYTES = 10 << 20
HEADER_BYTES = 32
CHUNK_BYTES = 1 << 20
"""What is read, mixed, hashed and written at once: it stays in a core's cache from the first to the last."""

ENCRYPTED_NAME = re.compile(r"(?P<plain>.+)\.(?P<sha256>[0-9a-f]{64})\.enc", re.IGNORECASE)

LLAMA_7B_MD5 = "6efc8dab194ab59e49cd24be5574d85e"
"""Of LLaMA-7B's consolidated.00.pth, the base of most published diffs."""


@dataclass(frozen=True, slots=True)
class XorFile:
    """A file to be mixed. `plain_name` is its path in the folder; `output_name`, where the user chose it, the result's."""

    source: Path
    plain_name: str
    size_bytes: int
    output_name: str | None = None


@dataclass(frozen=True, slots=True)
class Mixer:
    """What all files of one call have in common."""

    base: Path
    threads: Workers
    lists: Checksums | None = None
    came: Callable[[int], None] = lambda count: None
    block_bytes: int = BLOCK_BYTES


class Keystream(AbstractContextManager["Keystream"]):
    """The bytes that a plain file is mixed with."""

    def __init__(self, base: Path, block_bytes: int = BLOCK_BYTES) -> None:
        self._path = base
        self._file = base.open("rb", buffering=0)
        self._size = os.fstat(self._file.fileno()).st_size
        self._block_bytes = block_bytes
        self._blocks = -(-self._size // block_bytes)
        self._tile: np.ndarray | None = None
        if not self._size:
            self._file.close()
            raise ModelError(tr("the base is empty", "基础文件是空的"), where=str(base))

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def read_into(self, position: int, out: np.ndarray) -> None:
        """Fill `out` (uint8) with the stream from `position` on."""
        done = 0
        while done < len(out):
            block, offset = divmod(position + done, self._block_bytes)
            start = block % self._blocks * self._block_bytes
            length = min(self._block_bytes, self._size - start)
            within = offset % length
            if length < min(
                CHUNK_BYTES, self._block_bytes
            ):  # a block of one byte would be a million reads a chunk
                source = self._tiled(start, length)[within:]
                count = min(len(source), self._block_bytes - offset, len(out) - done)
                out[done : done + count] = source[:count]
            else:
                count = min(length - within, self._block_bytes - offset, len(out) - done)
                self._file.seek(start + within)
                fill(self._file, out[done : done + count], self._path)
            done += count

    def _tiled(self, start: int, length: int) -> np.ndarray:
        """The short last block, repeated."""
        if self._tile is None:
            last = np.empty(length, np.uint8)
            self._file.seek(start)
            fill(self._file, last, self._path)
            self._tile = np.resize(last, length + CHUNK_BYTES)
        return self._tile


def fill(file: IO[bytes], out: np.ndarray, path: Path) -> None:
    """Read exactly len(out) bytes. Raises ModelError where the file ends before."""
    view = out.data
    while view:
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise ModelError(
                tr("the file became shorter while it was read", "读取过程中文件变短了"), where=str(path)
            )
        view = view[count:]


def mix(
    source: IO[bytes], path: Path, sink: IO[bytes], mixer: Mixer, hashes: Mapping[str, list[Hash]]
) -> None:
    """Write `source`, from where it stands to its end, XOR the keystream. hashes: of what is `read` and `written`."""
    size = os.fstat(source.fileno()).st_size - source.tell()
    read_digests = Digests(mixer.threads, hashes["read"])
    written_digests = Digests(mixer.threads, hashes["written"])
    buffers = np.empty(
        (2, 2, min(CHUNK_BYTES, size)), np.uint8
    )  # two of each: one is hashed while one is filled
    with Keystream(mixer.base, mixer.block_bytes) as key:
        for index, position in enumerate(range(0, size, CHUNK_BYTES)):
            mixer.threads.check()
            count = min(CHUNK_BYTES, size - position)
            read, mixed = buffers[index % 2, 0, :count], buffers[index % 2, 1, :count]
            fill(source, read, path)
            key.read_into(position, mixed)
            np.bitwise_xor(read, mixed, out=mixed)
            read_digests.update(read)
            written_digests.update(mixed)
            sink.write(mixed.data)
            mixer.came(count)
    read_digests.finish()
    written_digests.finish()


def encrypt_file(item: XorFile, mixer: Mixer, *, staging: Path) -> MadeFile:
    """Make one `.enc` file in `staging`; the plain file is read once, for its hash and for its content."""
    digest = hashlib.sha256()
    part = staging / f"{item.plain_name}.part"
    part.parent.mkdir(parents=True, exist_ok=True)
    with item.source.open("rb", buffering=0) as source, part.open("wb") as sink:
        sink.write(bytes(HEADER_BYTES))
        mix(source, item.source, sink, mixer, {"read": [digest], "written": []})
        sink.seek(0)
        sink.write(digest.digest())
        sink.flush()
        os.fsync(sink.fileno())
    name = item.output_name or f"{item.plain_name}.{digest.hexdigest()}.enc"
    part.replace(staging / name)
    return MadeFile(name, item.plain_name, item.size_bytes, digest.hexdigest())


def decrypt_file(item: XorFile, mixer: Mixer, *, staging: Path) -> MadeFile:
    """Make one plain file in `staging`. Raises ModelError where it is not what the diff was made from."""
    name = item.output_name or item.plain_name
    place = staging / name
    place.parent.mkdir(parents=True, exist_ok=True)
    lists = mixer.lists
    encrypted = Expected.of(lists, item.source.name)
    plain = Expected.of(lists, item.plain_name)
    digest = hashlib.sha256()
    with item.source.open("rb", buffering=0) as source, place.open("wb") as sink:
        header = source.read(HEADER_BYTES)
        require_header(item.source, header)
        encrypted.update(header)
        mix(source, item.source, sink, mixer, {"read": encrypted.hashes, "written": [digest, *plain.hashes]})
        encrypted.require(item.source, tr("the diff", "差分文件"))
        if digest.digest() != header:
            raise wrong_result(item, digest.hexdigest(), header.hex())
        plain.require(item.source, tr("the result", "结果"))
        sink.flush()
        os.fsync(sink.fileno())
    return MadeFile(name, item.plain_name, item.size_bytes, digest.hexdigest())


class Expected:
    """What a list says of one file, and the hash that grows to be compared with it."""

    def __init__(self, digest: str | None, said_by: str) -> None:
        self._digest, self._said_by = digest, said_by
        self.hashes: list[Hash] = [hashlib.new(algorithm_of(digest))] if digest else []

    @classmethod
    def of(cls, lists: Checksums | None, name: str) -> Expected:
        """What `lists`, if there are any, say of `name`."""
        return cls(lists.expected(name) if lists else None, str(lists.path) if lists else "")

    def update(self, block: bytes) -> None:
        """Hash what does not go through `mix`."""
        for one in self.hashes:
            one.update(block)

    def require(self, path: Path, what: str) -> None:
        """Raise ModelError where the list says otherwise."""
        for one in self.hashes:
            if one.hexdigest() != self._digest:
                got = one.hexdigest()
                raise ModelError(
                    tr(
                        f"{what} has the checksum {got}; {self._said_by} says {self._digest}",
                        f"{what}的校验和为 {got}，而 {self._said_by} 给出 {self._digest}",
                    ),
                    where=str(path),
                    remedy=tr("fetch the file again", "请重新下载该文件"),
                )


def require_header(path: Path, header: bytes) -> None:
    """Raise ModelError where the file is cut, or is not the one that its name says."""
    if len(header) < HEADER_BYTES:
        raise ModelError(
            tr(
                f"an XOR diff begins with {HEADER_BYTES} bytes of hash; this file has {len(header)}",
                f"XOR 差分文件以 {HEADER_BYTES} 字节的哈希开头，而此文件只有 {len(header)} 字节",
            ),
            where=str(path),
            remedy=tr("fetch the file again", "请重新下载该文件"),
        )
    named = ENCRYPTED_NAME.fullmatch(path.name)
    if named and named["sha256"].lower() != header.hex():
        raise ModelError(
            tr(
                f"the hash in the file is {header.hex()}, and its name says another",
                f"文件里的哈希为 {header.hex()}，与文件名不符",
            ),
            where=str(path),
            remedy=tr(
                "fetch the file again, or give it its own name back", "请重新下载该文件，或恢复其原文件名"
            ),
        )


def wrong_result(item: XorFile, got: str, want: str) -> ModelError:
    """What is said where base and diff do not make what the diff was made from."""
    return ModelError(
        tr(
            f"the result is wrong: its SHA-256 is {got}, the diff says {want}",
            f"结果不对：SHA-256 为 {got}，而差分文件给出 {want}",
        ),
        where=str(item.source),
        remedy=tr(
            "either this is not the base of the diff (it is the original consolidated.00.pth, for LLaMA-7B with the MD5"
            f" {LLAMA_7B_MD5}), or the diff is cut or damaged (--checksums tells, with the MD5 list of its page)",
            "或者基础文件不对（应为原始的 consolidated.00.pth，LLaMA-7B 的 MD5 为"
            f" {LLAMA_7B_MD5}），或者差分文件被截断、损坏（用 --checksums 和发布页的 MD5 列表可以判断）",
        ),
    )
