"""What a path holds, and which function turns it into something else. A new conversion is one entry in a table."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from zipfile import BadZipFile, ZipFile

from tuoling.errors import ModelError, OutputError, UsageError
from tuoling.files import read_json
from tuoling.language import tr
from tuoling.models.adapter_files import is_adapter_folder

if TYPE_CHECKING:
    from tuoling.weights.parity import Parity, Side

CONVERSIONS: dict[tuple[str, str], str] = {
    ("hf", "hf"): "tuoling.weights.rewrite:convert_huggingface",
    ("hf", "gguf"): "tuoling.weights.gguf:convert_to_gguf",
    ("adapter", "gguf"): "tuoling.weights.gguf:convert_to_gguf",
    ("adapter", "gguf-lora"): "tuoling.weights.gguf_lora:convert_adapter",
    ("hf", "meta"): "tuoling.weights.meta:convert_to_meta",
    ("meta", "hf"): "tuoling.weights.meta:convert_to_huggingface",
    ("meta", "meta"): "tuoling.weights.meta:reshard",
    ("gguf", "hf"): "tuoling.weights.from_ggml:convert_gguf",
    ("ggml", "hf"): "tuoling.weights.from_ggml:convert_old_ggml",
    ("adapter", "adapter"): "tuoling.weights.adapter_convert:convert_adapter",
    ("old-gptq", "hf"): "tuoling.weights.gptq_convert:convert_old_gptq",
    ("gptq", "hf"): "tuoling.weights.gptq_dense:convert_gptq",
}
"""(what lies there, what is wanted) → "module:function", imported when it is asked for."""

USUAL_TARGET = {
    "meta": "hf",
    "adapter": "adapter",
    "gguf": "hf",
    "ggml": "hf",
    "gptq": "hf",
    "old-gptq": "hf",
}
"""`--to` where it is not given and OUT does not end in .gguf. A Hugging Face folder has no usual target."""


@dataclass(frozen=True)
class ConvertOptions:
    """What the user may choose. A conversion refuses by `UsageError` what it cannot do.

    outtype:    number type of the result (f32, f16, bf16, q8_0, ...); None: as the source has it.
    shards:     how many files; None: as usual for the format.
    verify:     prove the result by `parity.gate`; off is recorded beside the output.
    allow_nan:  write tensors that hold NaN or infinity, which are refused otherwise.
    unchecked:  go on where a checksum list beside the source is wrong, zero points of an old GPTQ file are lost, or
                a vocabulary has no byte tokens for llama.cpp.
    lora_alpha: of an adapter whose files do not say it.
    base:       the model that an adapter stands on, or an old GPTQ file was made from, where its files do not say it.
    pre_tokenizer: llama.cpp's name for how a byte-level tokenizer cuts words, where the file does not tell it.
    allow_remote_code: a model's own Python code may be run, where transformers has none for it.
    """

    outtype: str | None = None
    shards: int | None = None
    verify: bool = True
    allow_nan: bool = False
    unchecked: bool = False
    lora_alpha: float | None = None
    base: str | None = None
    pre_tokenizer: str | None = None
    allow_remote_code: bool = False


@dataclass
class Report:
    """What was done. notes: sentences for the user, already in their language."""

    out: Path
    kind: str = ""
    to: str = ""
    tensors: int = 0
    size_bytes: int = 0
    notes: list[str] = field(default_factory=list)
    parity: Parity | None = None


def prove(
    before: Side, after: Side, folder: Path, options: ConvertOptions, *, lossless: bool = True
) -> Parity | None:
    """Compare what both compute, in a process of its own, and leave the figures in `folder`, where `after` lies.

    Call it before the output is put in its place, so that nothing is left where it does not pass. With
    `--no-verify` that is written down instead.
    """
    from tuoling.weights import parity

    if options.verify:
        return parity.gate(before, after, lossless=lossless, allow_remote_code=options.allow_remote_code)
    parity.skipped(folder)
    return None


class Conversion(Protocol):
    """Writes `out` (which does not exist yet) whole or not at all."""

    def __call__(self, source: Path, out: Path, options: ConvertOptions) -> Report: ...


@dataclass(frozen=True)
class Kind:
    """One layout of weights. looks: cheap, reads names, small JSON files and magic numbers only."""

    name: str
    en: str
    zh: str
    looks: Callable[[Path], bool]


def _starts_with(*magics: bytes) -> Callable[[Path], bool]:
    def looks(path: Path) -> bool:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(4) in magics

    return looks


def _is_meta(path: Path) -> bool:
    if path.is_file():
        return path.name.startswith("consolidated.") and path.suffix == ".pth"
    return any(path.glob("consolidated.*.pth"))


def _is_adapter(path: Path) -> bool:
    """PEFT's files, or a Trainer's checkpoint that has weights and no model's config."""
    if path.is_file():
        return path.name.startswith("adapter_model.")
    bare = (path / "pytorch_model.bin").is_file() and not (path / "config.json").is_file()
    return bare or is_adapter_folder(path)


def _is_old_gptq(path: Path) -> bool:
    """One file of tensors with `.qweight` names; they are looked for in its bytes, nothing is unpickled."""
    if not path.is_file() or path.suffix not in (".pt", ".pth", ".bin", ".safetensors"):
        return False
    with path.open("rb") as file:
        magic = file.read(8)
        if path.suffix == ".safetensors":
            return b'.qweight"' in file.read(min(int.from_bytes(magic, "little"), 100 << 20))
    try:
        with ZipFile(path) as archive:
            pickled = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
            return pickled is not None and b".qweight" in archive.read(pickled)
    except (BadZipFile, OSError):
        return False


def _is_quantised(path: Path) -> bool:
    config = path / "config.json"
    if not path.is_dir() or not config.is_file():
        return False
    value = read_json(config)
    said = value.get("quantization_config") if isinstance(value, dict) else None
    return (path / "quantize_config.json").is_file() or (said or {}).get("quant_method") in ("gptq", "awq")


def _is_huggingface(path: Path) -> bool:
    return path.is_dir() and (path / "config.json").is_file()


_LATER_GGML = (b"fmgg", b"tjgg", b"algg")
"""ggmf, ggjt and ggla, little-endian: the kinds of file that came after; their reader refuses them by name."""

KINDS: tuple[Kind, ...] = (
    Kind("gguf", "GGUF file", "GGUF 文件", _starts_with(b"GGUF")),
    Kind("ggml", "old ggml file", "旧 ggml 文件", _starts_with(b"lmgg", *_LATER_GGML)),
    Kind("meta", "Meta checkpoint", "Meta 权重", _is_meta),
    Kind("old-gptq", "GPTQ file of 2023", "2023 年的 GPTQ 文件", _is_old_gptq),
    Kind("adapter", "adapter", "适配器", _is_adapter),
    Kind("gptq", "GPTQ or AWQ model", "GPTQ 或 AWQ 模型", _is_quantised),
    Kind("hf", "Hugging Face folder", "Hugging Face 目录", _is_huggingface),
)
"""The first that fits is what a path is called."""


def recognise(path: Path) -> Kind:
    """What lies at `path`. Raises ModelError where nothing is there, or nothing that is known."""
    if not path.exists():
        raise ModelError(tr("nothing is there", "路径不存在"), where=str(path))
    for kind in KINDS:
        if kind.looks(path):
            return kind
    known = tr(", ".join(kind.en for kind in KINDS), "、".join(kind.zh for kind in KINDS))
    raise ModelError(
        tr("no weights of a known layout", "没有已知格式的权重"),
        where=str(path),
        remedy=tr(f"known: {known}", f"已知格式：{known}"),
    )


def target_of(kind: Kind, out: Path, to: str | None) -> str:
    """What is to be written: as asked, else by the name of `out`, else as usual for the kind."""
    reachable = [target for source, target in CONVERSIONS if source == kind.name]
    wanted = to or ("gguf" if out.suffix == ".gguf" else USUAL_TARGET.get(kind.name))
    if wanted is None:
        raise UsageError(
            tr("a Hugging Face folder into what?", "要把 Hugging Face 目录转换成什么？"),
            remedy=f"--to {' | '.join(reachable)}",
        )
    if wanted not in reachable:
        raise UsageError(
            tr(f"a {kind.en} cannot be written as {wanted}", f"{kind.zh}无法转换为 {wanted}"),
            remedy=f"--to {' | '.join(reachable)}" if reachable else None,
        )
    return wanted


def convert(source: Path, out: Path, *, to: str | None = None, options: ConvertOptions) -> Report:
    """Turn what lies at `source` into `out`. Raises UsageError for a pair that has no entry."""
    kind = recognise(source)
    target = target_of(kind, out, to)
    if out.exists():
        raise OutputError(
            tr("already exists", "已经存在"), where=str(out), remedy=tr("choose another place", "换一个位置")
        )
    module, _, function = CONVERSIONS[kind.name, target].partition(":")
    run: Conversion = getattr(importlib.import_module(module), function)
    report = run(source, out, options)
    report.kind, report.to = kind.name, target
    return report
