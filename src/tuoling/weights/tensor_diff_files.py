"""Our own diff made and applied: tensor by tensor, its chunks on all threads, all files or none."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from tuoling import console
from tuoling.errors import ModelError, UsageError
from tuoling.files import atomic_files, refuse_existing
from tuoling.language import tr
from tuoling.models.weight_files import SafetensorsHeader, damaged, read_header
from tuoling.weights.checksums import check_base, require_listed_files, write_md5_of
from tuoling.weights.delta_code import CHUNK_BYTES, DamagedCode, decode, encode, split_codes
from tuoling.weights.diff_options import DiffOptions, DiffReport, MadeFile
from tuoling.weights.safetensors_writer import tensor_bytes
from tuoling.weights.tensor_diff import DiffWriter, FileRecord, Part, Record, is_tensor_diff, read_record
from tuoling.weights.tensors import DTYPE_NAMES, TensorSource, open_weights
from tuoling.weights.workers import Workers, workers
from tuoling.weights.xor_folder import require_file, require_space, visible_files

SUFFIX = ".diff.safetensors"
_PICKLES = (".bin", ".pth", ".pt", ".ckpt")
_PREFIXES = ("model.", "transformer.")


def make_tensor_diff(base: Path, target: Path, out: Path, options: DiffOptions) -> DiffReport:
    """Write the diff that turns `base` into `target`, a safetensors file or a folder with such files.

    out: the file to write, or a folder that is there. Raises ModelError where the two have no tensor in common.
    """
    sources, left_out = _model_files(target)
    place = out / f"{target.resolve().name}{SUFFIX}" if out.is_dir() else out
    if not options.replace:
        refuse_existing([place, *([options.checksums_out] if options.checksums_out else [])])
    known = BaseTensors(base)
    planned = _plan(known, not target.is_dir(), sources)
    report = DiffReport("tuoling", place, base, left_out=left_out)
    report.base_checked_by = check_base_file(base, options)
    with atomic_files(place.parent, replace=options.replace) as staging:
        with (staging / place.name).open("wb") as file, working(options.workers, planned) as (threads, came):
            writer = DiffWriter(file, planned)
            files = [
                _code_file(one, sources[one.name], known, writer, threads, came) for one in planned.files
            ]
            writer.finish(replace(planned, files=tuple(files)))
        size = (staging / place.name).stat().st_size
    report.files = [MadeFile(place.name, one.name, one.size_bytes, one.sha256) for one in files]
    total = sum(one.size_bytes for one in files)
    share = f"{size / 2**20:,.1f} MiB, {size / max(1, total):.0%}"
    report.notes.append(tr(f"the diff takes {share} of the model's size", f"差分占 {share}（相对模型大小）"))
    report.notes += known.unlike_notes()
    if options.checksums_out:
        write_md5_of(options.checksums_out, {**sources, place.name: place})
    return report


def apply_tensor_diff(base: Path, diff: Path, out: Path, options: DiffOptions) -> DiffReport:
    """Write the files that `diff` makes of `base`: into the folder `out`, or as the file `out` where it is of one file.

    Raises ModelError, and leaves nothing, where the base has other tensors or the diff is damaged.
    """
    diff = find_tensor_diff(diff)
    record, head = read_record(diff)
    names = {one.name: one.name for one in record.files}
    folder = out
    if record.one_file and not out.is_dir():
        folder, names = out.parent, {record.files[0].name: out.name}
    if not options.replace:
        refuse_existing(folder / name for name in names.values())
    require_listed_files({diff.name: diff}, options.lists, tr("the diff", "差分文件"))
    report = DiffReport("tuoling", out, base)
    report.base_checked_by = check_base_file(base, options)
    known = BaseTensors(base)
    with atomic_files(folder, replace=options.replace) as staging:
        require_space(staging, sum(one.size_bytes for one in record.files))
        with diff.open("rb", buffering=0) as file, working(options.workers, record) as (threads, came):
            reader = _Codes(file, diff, head)
            for one in record.files:
                place = staging / names[one.name]
                place.parent.mkdir(parents=True, exist_ok=True)
                with place.open("wb") as sink:
                    _decode_file(one, sink, known, reader, threads, came)
        made = {one.name: staging / names[one.name] for one in record.files}
        require_listed_files(made, options.lists, tr("the result", "结果"))
    report.files = [MadeFile(names[one.name], one.name, one.size_bytes, one.sha256) for one in record.files]
    report.proof = tr("SHA-256 of every file", "每个文件的 SHA-256")
    return report


class BaseTensors:
    """The base's tensors as bytes, and which of them a model's tensor is coded against."""

    def __init__(self, base: Path) -> None:
        self.path = base
        self._source: TensorSource = open_weights(base)
        self._unlike: list[str] = []
        self.met = 0

    def partner(self, name: str, dtype: str, shape: Sequence[int]) -> tuple[str, str | None] | None:
        """The base's name for a tensor, and what to cast it to; None where it has none of this width."""
        other = [name.removeprefix(prefix) for prefix in _PREFIXES] + [prefix + name for prefix in _PREFIXES]
        for candidate in (name, *other):
            info = self._source.infos.get(candidate)
            # more or fewer rows (a vocabulary that grew) are met as far as they go
            if info is None or list(info.shape[1:]) != list(shape[1:]) or len(info.shape) != len(shape):
                continue
            wanted = DTYPE_NAMES[dtype]
            if wanted == info.dtype or (wanted.is_floating_point and info.dtype.is_floating_point):
                self.met += 1
                return candidate, None if wanted == info.dtype else dtype
        self._unlike.append(name)
        return None

    def unlike_notes(self) -> list[str]:
        """Tensors that are in the diff as they are, without a base."""
        if not self._unlike:
            return []
        count, first = len(self._unlike), self._unlike[0]
        return [
            tr(
                f"{count} tensors have no like in the base and are in the diff as they are, such as {first}",
                f"{count} 个张量在基础模型中没有对应，原样放入差分，例如 {first}",
            )
        ]

    def read(self, part: Part) -> tuple[np.ndarray | None, str | None]:
        """The bytes a part is coded against, cut or filled with zeros to its size, and the base's own SHA-256."""
        if part.base is None:
            return None, None
        if part.base not in self._source.infos:
            raise ModelError(
                tr(f"the base has no tensor {part.base}", f"基础模型没有张量 {part.base}"),
                where=str(self.path),
                remedy=tr("this is not the base of the diff", "这不是该差分的基础模型"),
            )
        tensor = self._source.read(part.base)
        digest = hashlib.sha256(tensor_bytes(tensor)).hexdigest()
        if part.base_sha256 not in (None, digest):
            raise ModelError(
                tr(
                    f"not the base of the diff: {part.base} has the SHA-256 {digest}, should be {part.base_sha256}",
                    f"不是该差分的基础模型：{part.base} 的 SHA-256 为 {digest}，应为 {part.base_sha256}",
                ),
                where=str(self.path),
            )
        if part.base_dtype is not None:
            tensor = tensor.to(DTYPE_NAMES[part.base_dtype])
        data = np.frombuffer(tensor_bytes(tensor), np.uint8)
        if len(data) < part.size_bytes:
            data = np.concatenate([data, np.zeros(part.size_bytes - len(data), np.uint8)])
        return data[: part.size_bytes], digest


def _code_file(
    planned: FileRecord,
    path: Path,
    known: BaseTensors,
    writer: DiffWriter,
    threads: Workers,
    came: Callable[[int], None],
) -> FileRecord:
    """Write the codes of one file's parts; its record with all hashes."""
    data = np.memmap(path, np.uint8, "r") if planned.size_bytes else np.empty(0, np.uint8)
    whole = hashlib.sha256()
    parts = []
    start = 0
    for part in planned.parts:
        target = data[start : start + part.size_bytes]
        start += part.size_bytes
        base, digest = known.read(part)

        def work(place: int, part: Part = part, target: np.ndarray = target, base: Any = base) -> bytes:
            if place < 0:
                whole.update(target.data)
                return b""
            end = place + CHUNK_BYTES
            code = encode(target[place:end], None if base is None else base[place:end], part.item_bytes)
            came(len(target[place:end]))
            return code

        code = threads.each(work, (-1, *range(0, part.size_bytes, CHUNK_BYTES)))  # -1: hash beside the coding
        writer.write(part.name, code)
        sha256 = hashlib.sha256()
        for piece in code:
            sha256.update(piece)
        parts.append(replace(part, base_sha256=digest, sha256=sha256.hexdigest()))
    return replace(planned, parts=tuple(parts), sha256=whole.hexdigest())


class _Codes:
    """The codes in a diff, each compared with its hash."""

    def __init__(self, file: IO[bytes], path: Path, head: SafetensorsHeader) -> None:
        self._file, self.path, self._head = file, path, head

    def read(self, part: Part) -> memoryview:
        start, end = self._head.entries[part.name]["data_offsets"]
        self._file.seek(self._head.data_start + start)
        code = self._file.read(end - start)
        if len(code) != end - start or hashlib.sha256(code).hexdigest() != part.sha256:
            raise damaged(self.path, tr(f"{part.name} has another hash", f"{part.name} 的哈希不符"))
        return memoryview(code)


def _decode_file(
    record: FileRecord,
    sink: IO[bytes],
    known: BaseTensors,
    codes: _Codes,
    threads: Workers,
    came: Callable[[int], None],
) -> None:
    """Write one file of the model. Raises ModelError where it is not what the record says."""
    whole = hashlib.sha256()
    for part in record.parts:
        base, _ = known.read(part)
        starts = range(0, part.size_bytes, CHUNK_BYTES)
        try:
            pieces = split_codes(codes.read(part), len(starts), part.item_bytes)

            def work(item: tuple[int, memoryview], part: Part = part, base: Any = base) -> np.ndarray:
                place, code = item
                size = min(CHUNK_BYTES, part.size_bytes - place)
                against = None if base is None else base[place : place + size]
                made = decode(code, against, size, part.item_bytes)
                came(size)
                return made

            for chunk in threads.each(work, zip(starts, pieces, strict=True)):
                whole.update(chunk.data)
                sink.write(chunk.data)
        except DamagedCode as error:
            raise damaged(codes.path, tr(f"{part.name} cannot be read", f"无法读取 {part.name}")) from error
    if whole.hexdigest() != record.sha256:
        raise ModelError(
            tr(f"{record.name} came out wrong", f"{record.name} 的结果不对"),
            where=str(codes.path),
            remedy=tr("fetch the diff again", "请重新下载差分"),
        )


def _model_files(target: Path) -> tuple[dict[str, Path], list[str]]:
    """Name → file of the model, and what is left out: pickles, which would lie in the diff whole."""
    if not target.is_dir():
        require_file(target)
        sources = {target.name: target}
        left_out: list[str] = []
    else:
        items, left_out = visible_files(target)
        sources = {item.plain_name: item.source for item in items if item.source.suffix not in _PICKLES}
        left_out = left_out + [item.plain_name for item in items if item.source.suffix in _PICKLES]
    if not any(path.suffix == ".safetensors" for path in sources.values()):
        raise ModelError(
            tr(
                "no safetensors files: this kind of diff goes by tensors",
                "没有 safetensors 文件：这种差分按张量制作",
            ),
            where=str(target),
            remedy=tr(
                "write it as safetensors first: tuoling convert TARGET NEW --to hf; or take --format xor",
                "先转成 safetensors：tuoling convert TARGET NEW --to hf；或用 --format xor",
            ),
        )
    return sources, left_out


def _plan(known: BaseTensors, one_file: bool, sources: Mapping[str, Path]) -> Record:
    """The record before the work. Raises ModelError where the base is like the model in nothing."""
    files = []
    for name, path in sources.items():
        parts = tuple(_parts(known, name, path))
        files.append(FileRecord(name, sum(part.size_bytes for part in parts), parts))
    if not known.met:
        raise ModelError(
            tr("base and target have no tensor in common", "两个模型没有共同的张量"),
            where=str(known.path),
            remedy=tr("is this the model it was trained from?", "它是由这个模型训练来的吗？"),
        )
    return Record(known.path.resolve().name, one_file, tuple(files))


def _parts(known: BaseTensors, name: str, path: Path) -> Iterator[Part]:
    """The parts of one file, in the order of its bytes."""
    if path.suffix != ".safetensors":
        yield Part(name, path.stat().st_size)
        return
    head = read_header(path)
    yield Part(name, head.data_start)
    end = 0
    for tensor, entry in head.entries.items():
        start, past = end, entry["data_offsets"][1]
        end = past
        if entry["data_offsets"][0] != start or entry["dtype"] not in DTYPE_NAMES:
            raise damaged(path, tr(f"{tensor} is not where it should be", f"{tensor} 的位置不对"))
        partner = known.partner(tensor, entry["dtype"], entry["shape"]) if past > start else None
        against, cast = partner or (None, None)
        item_bytes = DTYPE_NAMES[entry["dtype"]].itemsize
        yield Part(f"{name}/{tensor}", past - start, item_bytes, against, cast)


def find_tensor_diff(path: Path) -> Path:
    """The diff itself, where its folder is named."""
    if not path.is_dir():
        return path
    found = sorted(file for file in path.glob("*.safetensors") if is_tensor_diff(file))
    if len(found) != 1:
        raise ModelError(
            tr(f"{len(found)} diffs in this folder", f"目录里有 {len(found)} 个差分"),
            where=str(path),
            remedy=tr("name the file", "请直接给出该文件"),
        )
    return found[0]


def check_base_file(base: Path, options: DiffOptions) -> str | None:
    """Compare a base that is one file with what is said of it; of a folder there is no such hash."""
    if not options.check_base or (base.is_dir() and not options.base_hash):
        return None
    if base.is_dir():
        raise UsageError(
            tr(
                "--base-hash is that of one file, and BASE is a folder",
                "--base-hash 针对一个文件，而 BASE 是目录",
            ),
            remedy=tr("leave it out: each tensor is compared", "去掉它即可：每个张量都会比对"),
        )
    return check_base(base, options.base_hash, None)


@contextmanager
def working(count: int, record: Record) -> Iterator[tuple[Workers, Callable[[int], None]]]:
    """Threads, and what to call when bytes are done."""
    total = sum(one.size_bytes for one in record.files) >> 20
    with workers(count) as threads, console.progress() as bar:
        task = bar.add_task("MiB", total=total, detail="")
        yield threads, lambda size: bar.update(task, advance=size / 2**20)
