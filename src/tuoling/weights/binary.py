"""A binary file read in order, every length checked against what is left of it before it is believed."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from tuoling.errors import ModelError
from tuoling.language import tr


class BinaryReader:
    """The bytes of a file, mapped, and a place in them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        empty = path.stat().st_size == 0
        self.data = np.empty(0, np.uint8) if empty else np.memmap(path, dtype=np.uint8, mode="c")
        self.position = 0

    @property
    def left(self) -> int:
        return len(self.data) - self.position

    def take(self, size: int, what: str) -> bytes:
        """The next `size` bytes. Raises ModelError where the file does not have them."""
        return self.view(size, what).tobytes()

    def view(self, size: int, what: str) -> np.ndarray:
        """The same without a copy."""
        if size < 0 or size > self.left:
            raise self.refuse(
                tr(
                    f"{what} should have {size} bytes and {self.left} are left: cut short, or damaged",
                    f"{what}应有 {size} 字节，只剩 {self.left} 字节：文件不完整或已损坏",
                )
            )
        found = self.data[self.position : self.position + size]
        self.position += size
        return found

    def numbers(self, form: str, what: str) -> tuple[int, ...]:
        """Little-endian numbers by a format of `struct`."""
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}"), what))

    def number(self, form: str, what: str) -> int:
        return self.numbers(form, what)[0]

    def refuse(self, problem: str, remedy: str | None = None) -> ModelError:
        """The error for this file."""
        return ModelError(
            problem,
            where=str(self.path),
            remedy=remedy or tr("copy or download it again", "请重新复制或下载"),
        )

    def require_count(self, count: int, least_bytes: int, what: str) -> int:
        """`count` things of at least so many bytes each fit into what is left of the file."""
        if count < 0 or count * least_bytes > self.left:
            raise self.refuse(
                tr(
                    f"{count} {what} cannot lie in the {self.left} bytes that are left: damaged",
                    f"剩余 {self.left} 字节放不下 {count} 个{what}：文件已损坏",
                )
            )
        return count
