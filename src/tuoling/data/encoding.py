"""Bytes to text: compression and encoding are read from the content, never from the name."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TextIO, cast

from tuoling.errors import DataError
from tuoling.language import tr

HEAD_BYTES = 1 << 18
READ_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile)
"""What a cut or broken .gz raises in the middle of reading."""

_GZIP = b"\x1f\x8b"
_PARQUET = b"PAR1"
_BOMS = (
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_MAGIC = {
    b"PK\x03\x04": "zip",
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"%PDF": "PDF",
    b"SQLite format 3": "SQLite",
    b"GGUF": "GGUF",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"Rar!": "rar",
    b"7z\xbc\xaf": "7z",
    b"ARROW1": "Arrow",
}


@dataclass(frozen=True, slots=True)
class Encoding:
    """How a file's bytes are to be read. name: a Python codec, or "parquet"."""

    name: str
    gzip: bool

    @property
    def words(self) -> str:
        """For the printed guess."""
        plain = {"utf-8-sig": "UTF-8 with BOM"}.get(self.name, self.name.upper())
        return f"{plain}, gzip" if self.gzip else plain


@contextmanager
def open_bytes(path: str, *, gz: bool) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed. Raises DataError where it cannot be opened."""
    try:
        file = cast(IO[bytes], gzip.open(path, "rb") if gz else Path(path).open("rb"))  # noqa: SIM115
    except OSError as error:
        raise DataError(
            tr(f"cannot read: {error.strerror}", f"无法读取：{error.strerror}"), where=path
        ) from error
    with file:
        yield file


def detect_encoding(path: str) -> Encoding:
    """Look at the file's bytes. Raises DataError for a missing, empty or binary file."""
    if not Path(path).is_file():
        raise missing_file(path)
    with open_bytes(path, gz=False) as file:
        gz = file.read(2) == _GZIP
    with open_bytes(path, gz=gz) as file:
        head, broken = _head_of(file)
        while head.isascii() and b"\0" not in head and not head.startswith(_PARQUET) and not broken:
            more, broken = _head_of(file)  # \uXXXX or English so far: the first other byte decides
            if not more:
                break
            head = head[-4:] + more
    if broken and not head:
        raise DataError(
            tr("broken gzip: nothing can be read", "gzip 文件已损坏：什么都读不出来"),
            where=path,
            remedy=tr("download or pack it again", "重新下载或重新压缩"),
        )
    if not head.strip():
        raise DataError(
            tr("the file is empty", "文件是空的"),
            where=path,
            remedy=tr("check that it was written or downloaded whole", "请确认它已完整写出或下载"),
        )
    return Encoding(_codec_of(path, head), gz)


def _head_of(file: IO[bytes]) -> tuple[bytes, bool]:
    """The next bytes of a file, and whether its compression breaks off in them."""
    pieces, size = [], 0
    try:
        while size < HEAD_BYTES and (piece := file.read(1 << 13)):
            pieces.append(piece)
            size += len(piece)
    except READ_ERRORS:
        return b"".join(pieces), True
    return b"".join(pieces), False


def missing_file(path: str) -> DataError:
    """The error for a path that is not there, with the nearest names beside it."""
    import difflib

    folder = Path(path).parent
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    near = difflib.get_close_matches(Path(path).name, names, n=3)
    remedy = tr("there is: ", "那里有：") + ", ".join(near) if near else tr("check the path", "请检查路径")
    if not folder.is_dir():
        remedy = tr(f"the folder {folder} is not there either", f"文件夹 {folder} 也不存在")
    return DataError(tr("no such file or folder", "没有这个文件或文件夹"), where=path, remedy=remedy)


def _codec_of(path: str, head: bytes) -> str:
    if head.startswith(_PARQUET):
        return "parquet"
    for bom, codec in _BOMS:
        if head.startswith(bom):
            return codec
    kind = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)
    if kind is None:
        wide = ("utf-16-le", "utf-16-be") if b"\0" in head else ()
        for codec in (*wide, "utf-8", "gb18030"):
            if _reads_as_text(head[: len(head) // 2 * 2] if codec in wide else head, codec):
                return codec
    raise DataError(
        tr(
            f"binary file{f' ({kind})' if kind else ''}, not rows",
            f"二进制文件{f'（{kind}）' if kind else ''}，不是数据行",
        ),
        where=path,
        remedy=tr(
            "give JSON, JSONL, CSV, TSV, text or Parquet (.gz of any is read; unpack other archives first)",
            "请给 JSON、JSONL、CSV、TSV、文本或 Parquet 文件（.gz 可直接读；其他压缩包请先解压）",
        ),
    )


def _reads_as_text(head: bytes, codec: str) -> bool:
    """True where nearly every character outside ASCII decodes, and control characters are rare.

    Not every one: a file with one broken character is still in its encoding, and its row is named later.
    The head may end in the middle of a character.
    """
    text = head.decode(codec, "replace")
    if text.endswith("\ufffd"):
        text = text[:-1]
    lost = text.count("\ufffd")
    foreign = sum(not c.isascii() for c in text) if lost else 1
    control = sum(text.count(chr(code)) for code in (*range(9), *range(14, 27)))
    if codec.startswith("utf-16"):
        usual = sum(c.isascii() or "\u3000" <= c <= "\u9fff" or "\uff00" <= c <= "\uffef" for c in text)
        return lost == 0 and control == 0 and usual >= 0.95 * len(text)
    few = 3 if codec == "utf-8" and not lost else 0  # a stray NUL in a small file: its row is named later
    return lost <= 0.1 * foreign and control <= max(few, 0.002 * len(text))


@contextmanager
def open_text(path: str, encoding: Encoding) -> Iterator[TextIO]:
    """The file as text: line ends become `\\n`, bytes that are no character become U+FFFD."""
    with open_bytes(path, gz=encoding.gzip) as file:
        yield io.TextIOWrapper(file, encoding=encoding.name, errors="replace")


def read_head(path: str, encoding: Encoding, characters: int = HEAD_BYTES) -> str:
    """The first characters of a file, as far as its compression holds."""
    pieces, size = [], 0
    with open_text(path, encoding) as file:
        try:
            while size < characters and (piece := file.read(1 << 12)):
                pieces.append(piece)
                size += len(piece)
        except READ_ERRORS:
            pass
    return "".join(pieces)
