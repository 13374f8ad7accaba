"""Meta's checkpoints ↔ Hugging Face folders, and other numbers of Meta's files: tensor by tensor."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from tuoling.errors import ModelError, UsageError
from tuoling.files import atomic_folder, read_json, write_json
from tuoling.language import tr
from tuoling.models.adapters import some
from tuoling.models.source import weight_files
from tuoling.weights.checklists import verify_checksums
from tuoling.weights.companions import copy_companions
from tuoling.weights.convert import ConvertOptions, Report, prove
from tuoling.weights.meta_layout import (
    COMPUTED,
    EMBEDDING,
    HEAD,
    HUGGINGFACE_CONFIG,
    MetaCheckpoint,
    llama_shapes,
    pairs_together,
    parts_of,
    rotary_heads,
    shard_files,
)
from tuoling.weights.meta_params import LLAMA3_WORDS, PARAMS, from_config
from tuoling.weights.meta_tokenizer import TOKENIZER, find_tokenizer, write_tokenizer
from tuoling.weights.parity import Weights
from tuoling.weights.rewrite import cast, number_type, with_dtype
from tuoling.weights.safetensors_writer import SafetensorsWriter
from tuoling.weights.tensors import TensorInfo, TensorSource, open_weights
from tuoling.weights.torch_zip import TorchZipWriter


def _verified(folder: Path, options: ConvertOptions) -> list[str]:
    """Compare the files, and the tokenizer above them, with the checksum lists beside them."""
    notes = verify_checksums(
        folder, {path.name for path in shard_files(folder)} | {PARAMS, TOKENIZER}, options
    )
    tokenizer = find_tokenizer(folder)
    if tokenizer is not None and tokenizer.parent != folder:
        notes += verify_checksums(tokenizer.parent, {TOKENIZER}, options)
    return notes


def convert_to_huggingface(source: Path, out: Path, options: ConvertOptions) -> Report:
    """Meta's folder (or one of its files) → a Hugging Face folder with config, tokenizer and token ids."""
    meta = source.parent if source.is_file() else source
    dtype = number_type(options.outtype)
    _require_probes(meta, options)
    notes = _verified(meta, options)
    weights = MetaCheckpoint(meta)
    infos = _typed(weights.infos, dtype)
    size = sum(info.size_bytes for info in infos.values())
    with atomic_folder(out) as folder:
        config = with_dtype(weights.config, dtype)
        ids = _tokenizer_back(meta, folder, int(config["vocab_size"]), notes)
        write_json(folder / "config.json", config if weights.kept else {**config, **ids})
        with SafetensorsWriter(folder, infos, shards=options.shards) as writer:
            for name in infos:
                tensor = weights.read(name)
                writer.write(name, cast(name, tensor, dtype, allow_nan=options.allow_nan, where=meta))
        parity = prove(Weights(meta, described_by=folder), folder, folder, options)
    return Report(out, tensors=len(infos), size_bytes=size, notes=weights.notes + notes, parity=parity)


def _typed(infos: Mapping[str, TensorInfo], dtype: torch.dtype | None) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(dtype, info.shape) if dtype and info.dtype.is_floating_point else info
        for name, info in infos.items()
    }


def _tokenizer_back(meta: Path, folder: Path, words: int, notes: list[str]) -> dict[str, Any]:
    """Put a tokenizer into the Hugging Face folder; returns config.json's token ids where it was made anew."""
    copied = copy_companions(meta, folder)
    if "tokenizer.json" in copied:  # the folder was one of Hugging Face's before
        return {}
    path = find_tokenizer(meta)
    if path is None:
        notes.append(
            tr(
                f"no {TOKENIZER} in the folder or above it: the model has no tokenizer until one is copied in",
                f"目录及其上级没有 {TOKENIZER}：复制一份之前，模型没有分词器",
            )
        )
        return {}
    (folder / TOKENIZER).unlink(missing_ok=True)
    return write_tokenizer(path, folder, words)


def convert_to_meta(source: Path, out: Path, options: ConvertOptions) -> Report:
    """A Hugging Face folder of a LLaMA → Meta's files, one or `--shards` of them."""
    config = read_json(source / "config.json")
    params = from_config(config, str(source / "config.json"))
    notes = verify_checksums(source, {path.name for path in weight_files(source)}, options)
    weights = open_weights(source)
    _require_tensors(weights, llama_shapes(config), config, source)
    report = _write_meta(weights, config, params, Weights(source), out, options)
    report.notes[:0] = notes
    return report


def _require_tensors(
    weights: TensorSource, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], source: Path
) -> None:
    """Every tensor that config.json asks for is there with its shape, and none that Meta's layout has no place for."""
    have = {name for name in weights.infos if not COMPUTED.search(name)}
    optional = {HEAD} if config.get("tie_word_embeddings") else set()
    missing, over = sorted(shapes.keys() - have - optional), sorted(have - shapes.keys())
    wrong = sorted(name for name in have & shapes.keys() if weights.infos[name].shape != shapes[name])
    for names, en, zh in (
        (missing, "tensors are missing", "缺少张量"),
        (over, "tensors have no place in Meta's layout", "Meta 格式中没有这些张量的位置"),
        (wrong, "tensors have another shape than config.json says", "张量形状与 config.json 不符"),
    ):
        if names:
            raise ModelError(tr(f"{en}: {some(names)}", f"{zh}：{some(names)}"), where=str(source))


def reshard(source: Path, out: Path, options: ConvertOptions) -> Report:
    """Meta's files → as many files as `--shards` says."""
    meta = source.parent if source.is_file() else source
    if options.shards is None:
        raise UsageError(tr("into how many files?", "要分成几个文件？"), remedy="--shards 1 | 2 | 4 | 8")
    _require_probes(meta, options)
    notes = _verified(meta, options)
    weights = MetaCheckpoint(meta)
    with tempfile.TemporaryDirectory() as described:  # the check wants a config and a tokenizer it can load
        write_json(Path(described) / "config.json", weights.config)
        if options.verify:
            _tokenizer_back(meta, Path(described), int(weights.config["vocab_size"]), [])
        before = Weights(meta, described_by=Path(described))
        report = _write_meta(weights, weights.config, weights.params, before, out, options)
    report.notes[:0] = weights.notes + notes
    return report


def _require_probes(meta: Path, options: ConvertOptions) -> None:
    """Without a tokenizer nothing can be asked of the model afterwards; said before the work."""
    if options.verify and find_tokenizer(meta) is None and not (meta / "tokenizer.json").is_file():
        raise ModelError(
            tr(
                f"no {TOKENIZER}, so that the result cannot be compared with what it came from",
                f"没有 {TOKENIZER}，无法对比转换前后的计算结果",
            ),
            where=str(meta),
            remedy=tr(
                f"copy {TOKENIZER} into the folder or above it, or --no-verify",
                f"把 {TOKENIZER} 复制到该目录或其上级，或用 --no-verify",
            ),
        )


def _write_meta(
    weights: TensorSource,
    config: Mapping[str, Any],
    params: Mapping[str, Any],
    before: Weights,
    out: Path,
    options: ConvertOptions,
) -> Report:
    """Cut every tensor and fill all files side by side. before: where `weights` lie, for the check afterwards."""
    source, described_by = before.folder, before.described_by or before.folder
    dtype, count = number_type(options.outtype), options.shards or 1
    heads = int(config["num_attention_heads"])
    sizes = {**config, "num_key_value_heads": int(config.get("num_key_value_heads") or heads)}
    _require_divisible(sizes, count)
    tied = bool(config.get("tie_word_embeddings"))
    parts = parts_of(int(config["num_hidden_layers"]), by_word=int(config["vocab_size"]) >= LLAMA3_WORDS)
    sources = {part.meta: EMBEDDING if tied and part.hf == HEAD else part.hf for part in parts}
    whole = _typed({part.meta: weights.infos[sources[part.meta]] for part in parts}, dtype)
    cut = {part.meta: _cut(whole[part.meta], part.axis, count) for part in parts}
    with atomic_folder(out) as folder:
        with ExitStack() as stack:
            writers = [
                stack.enter_context(TorchZipWriter(folder / f"consolidated.{number:02d}.pth", cut))
                for number in range(count)
            ]
            for part in parts:
                tensor = weights.read(sources[part.meta])
                tensor = cast(part.meta, tensor, dtype, allow_nan=options.allow_nan, where=source)
                turned = rotary_heads(part.hf, sizes)
                if turned is not None:
                    tensor = pairs_together(tensor, turned)
                slices = [tensor] * count if part.axis is None else tensor.chunk(count, dim=part.axis)
                for writer, piece in zip(writers, slices, strict=True):
                    writer.write(part.meta, piece)
        write_json(folder / PARAMS, dict(params))
        write_json(folder / HUGGINGFACE_CONFIG, with_dtype(config, dtype))
        notes = _tokenizer_there(source, folder)
        parity = prove(before, Weights(folder, described_by=described_by), folder, options)
    size = count * sum(info.size_bytes for info in cut.values())
    return Report(out, tensors=len(parts), size_bytes=size, notes=notes, parity=parity)


def _tokenizer_there(source: Path, folder: Path) -> list[str]:
    """Put the tokenizer beside Meta's files: its tokenizer.model, and Hugging Face's files for the way back."""
    copy_companions(source, folder)
    found = find_tokenizer(source)
    if found is not None:
        shutil.copyfile(found, folder / TOKENIZER)
        return []
    return [
        tr(
            f"the source has no {TOKENIZER}, which Meta's own programs read",
            f"源目录没有 {TOKENIZER}，而 Meta 自己的程序需要它",
        )
    ]


def _require_divisible(config: Mapping[str, Any], count: int) -> None:
    """Every file gets whole heads and equal slices."""
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size", "hidden_size")
    sizes = {name: int(config[name]) for name in names}
    wrong = [f"{name} {size}" for name, size in sizes.items() if size % count]
    if wrong:
        raise UsageError(
            tr(
                f"--shards {count}: {', '.join(wrong)} cannot be cut into equal parts",
                f"--shards {count}：{'、'.join(wrong)} 无法等分",
            ),
            remedy="--shards 1 | 2 | 4 | 8",
        )


def _cut(info: TensorInfo, axis: int | None, count: int) -> TensorInfo:
    """One file's share of a tensor."""
    if axis is None:
        return info
    shape = list(info.shape)
    shape[axis] //= count
    return TensorInfo(info.dtype, tuple(shape))
