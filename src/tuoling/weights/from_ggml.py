"""GGUF (versions 1, 2, 3) and old ggml files → Hugging Face folders, tensor by tensor."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tuoling import console
from tuoling.files import atomic_folder, write_json
from tuoling.infer import gguf_keys
from tuoling.language import tr
from tuoling.models.licence import Part, from_json, write_lineage
from tuoling.models.source import TEMPLATE_FILE
from tuoling.weights import parity
from tuoling.weights.convert import ConvertOptions, Report
from tuoling.weights.ggml_vocabulary import (
    pieces_of_old_ggml,
    save_tokenizer,
    write_generation_config,
    write_gguf_vocabulary,
)
from tuoling.weights.gguf_models import GgufModel
from tuoling.weights.gguf_reading import PLAIN
from tuoling.weights.meta_tokenizer import write_tokenizer
from tuoling.weights.old_ggml import OldGgmlModel, sentencepiece_beside
from tuoling.weights.rewrite import cast, number_type, with_dtype
from tuoling.weights.safetensors_writer import SafetensorsWriter
from tuoling.weights.tensors import TensorInfo, TensorSource

BLOCKS_AS = torch.float16
"""What blocks of 4 to 8 bits become unless `--outtype` says otherwise: the type of their own scales."""


def convert_gguf(source: Path, out: Path, options: ConvertOptions) -> Report:
    """A GGUF file → a folder with config, tokenizer, chat template and stops."""
    model = GgufModel(source)
    dtype = number_type(options.outtype) or _usual_type(model.file.stored.values())
    notes: list[str] = []
    with atomic_folder(out) as folder:
        words = int(model.config["vocab_size"])
        written = write_gguf_vocabulary(model.file.metadata, words, folder)
        notes += written.notes
        write_generation_config(folder, written.ids, _settings(model.file.metadata))
        _write_records(model.file.metadata, folder)
        report = _write(model, model.config, dtype, source, folder, options)
    report.out, report.notes = out, notes + report.notes
    return report


def convert_old_ggml(source: Path, out: Path, options: ConvertOptions) -> Report:
    """An old ggml file and its parts → a folder with config and tokenizer."""
    model = OldGgmlModel(source)
    kinds = {info.dtype for info in model.infos.values() if len(info.shape) > 1}
    dtype = number_type(options.outtype) or (BLOCKS_AS if model.from_blocks else max(kinds, key=str))
    notes: list[str] = []
    with atomic_folder(out) as folder:
        beside = sentencepiece_beside(source)
        if beside is not None:
            ids = write_tokenizer(beside, folder, len(model.strings))
        else:
            ids = _tokenizer_of_strings(model, folder)
            notes.append(
                tr(
                    "the file keeps no scores of its words; they are taken as LLaMA's are, falling with the number. "
                    "With the model's tokenizer.model beside the file, that is read instead",
                    "该文件不含词的分数，这里按 LLaMA 的规则（随编号递减）补上。若把该模型的 tokenizer.model 放在文件旁，则改用它",
                )
            )
        report = _write(model, {**model.config, **ids}, dtype, source, folder, options)
    report.out, report.notes = out, notes + report.notes
    return report


def _write(
    model: TensorSource,
    config: Mapping[str, Any],
    dtype: torch.dtype,
    source: Path,
    folder: Path,
    options: ConvertOptions,
) -> Report:
    """Weights and config, and the proof: the folder's against the file's, read again."""
    infos = {name: TensorInfo(dtype, info.shape) for name, info in model.infos.items()}
    size = sum(info.size_bytes for info in infos.values())
    write_json(folder / "config.json", with_dtype(config, dtype))
    with SafetensorsWriter(folder, infos, shards=options.shards) as writer:
        for name in infos:
            tensor = cast(name, model.read(name), dtype, allow_nan=options.allow_nan, where=source)
            writer.write(name, tensor.contiguous())
            del tensor
    report = Report(folder, tensors=len(infos), size_bytes=size)
    if not options.verify:
        parity.skipped(folder)
    else:
        before = parity.Weights(source, described_by=folder)
        report.parity = parity.gate(before, folder, lossless=True, say=console.note)
    return report


def _usual_type(stored: Any) -> torch.dtype:
    """The type of most of the file's numbers."""
    counts: Counter[torch.dtype] = Counter()
    for tensor in stored:
        counts[PLAIN.get(tensor.kind, BLOCKS_AS)] += tensor.size_bytes
    return counts.most_common(1)[0][0]


def _tokenizer_of_strings(model: OldGgmlModel, folder: Path) -> dict[str, int]:
    from tuoling.models.spm import bpe_from_pieces

    pieces, scores, types = pieces_of_old_ggml(model.strings)
    places = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    named = {name: piece for name, piece in places.items() if piece in pieces}
    save_tokenizer(bpe_from_pieces(pieces, scores, types), folder, named, begins=True)
    ids = {f"{name}_id": pieces.index(piece) for name, piece in named.items() if name != "unk_token"}
    write_generation_config(folder, ids, {})
    return ids


def _settings(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Generation settings that we wrote ourselves."""
    said = metadata.get(gguf_keys.GENERATION)
    settings: dict[str, Any] = json.loads(said) if isinstance(said, str) else {}
    return settings


def _write_records(metadata: Mapping[str, Any], folder: Path) -> None:
    """The template that the model was tuned with, and the licence, where the file says them."""
    template = metadata.get(gguf_keys.TEMPLATE)
    if isinstance(template, str):
        stops = metadata.get(gguf_keys.STOPS)
        record = {
            "template": template,
            "stops": json.loads(stops) if isinstance(stops, str) else [],
            "system": metadata.get(gguf_keys.SYSTEM),
        }
        write_json(folder / TEMPLATE_FILE, record)
    licence = metadata.get("general.license")
    if isinstance(licence, str) and "\n" not in licence:
        (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n", encoding="utf-8")
    recorded = lineage_of_gguf(metadata)
    if recorded:
        write_lineage(folder, recorded)


def lineage_of_gguf(metadata: Mapping[str, Any]) -> tuple[Part, ...]:
    """What went into a GGUF file, by its own record; nothing where it has none."""
    said = metadata.get(gguf_keys.PROVENANCE)
    try:
        record = json.loads(said) if isinstance(said, str) else {}
    except ValueError:
        return ()
    lineage = record.get("lineage") if isinstance(record, dict) else None
    return from_json(lineage, gguf_keys.PROVENANCE) if lineage else ()
