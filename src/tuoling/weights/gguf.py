"""A model folder, run or adapter as a GGUF file for llama.cpp: `tuoling convert MODEL OUT.gguf --outtype q4_k_m`.

f32, f16, bf16 and q8_0 are written here, with no compiler and no checkout of llama.cpp. Lower types are made of such
a file by llama.cpp's own quantiser (`gguf_quantize.py`). An adapter is merged into its base first.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tuoling import console, environment
from tuoling.errors import TuolingError, UsageError
from tuoling.files import cannot_write, read_json, require_writable
from tuoling.infer import gguf_keys
from tuoling.language import tr
from tuoling.models.licence import of_model, to_json, without_places
from tuoling.models.licence_answer import one_licence
from tuoling.models.source import ModelSource, find_model
from tuoling.models.tokenizers import load_tokenizer
from tuoling.text.templates import Template, choose_template
from tuoling.weights.convert import ConvertOptions, Report
from tuoling.weights.gguf_families import gguf_family, plan_tensors, read_sizes, write_sizes
from tuoling.weights.gguf_file import write_gguf
from tuoling.weights.gguf_quantize import FILE_TYPES, fallback_note, quantize_file
from tuoling.weights.gguf_tokenizer import read_vocabulary, write_vocabulary
from tuoling.weights.gguf_verify import verify
from tuoling.weights.merged import Merged, open_merged
from tuoling.weights.parity import skipped
from tuoling.weights.tensors import TensorSource, open_weights

if TYPE_CHECKING:
    from tuoling.text.tokenizer import TextTokenizer

OWN_TYPES = ("f32", "f16", "bf16", "q8_0")
"""What is written here; the others are made by llama.cpp."""


def convert_to_gguf(source: Path, out: Path, options: ConvertOptions) -> Report:
    """The entry of `tuoling convert` for models and adapters; an adapter is merged into its base first.

    The result is read by llama.cpp and compared with the weights it was made of, where llama.cpp is installed.
    """
    if out.suffix != ".gguf":
        raise UsageError(
            tr("a GGUF file's name ends in .gguf", "GGUF 文件名应以 .gguf 结尾"),
            where=str(out),
            remedy=f"{out}.gguf",
        )
    if options.shards not in (None, 1):
        raise UsageError(tr("one file is written", "只写出一个文件"), where="--shards")
    asked = find_model(source, base=options.base, lora_alpha=options.lora_alpha)
    found, weights = open_model(asked, options.outtype)
    made = write_model(
        found,
        out,
        options.outtype or _lossless(weights),
        weights=weights,
        options=GgufOptions(options.pre_tokenizer, options.allow_nan, options.unchecked),
    )
    report = Report(out, tensors=made.tensors, size_bytes=made.size_bytes, notes=made.notes)
    if isinstance(weights, Merged):
        report.notes += weights.notes
    if not options.verify:
        skipped(out)
        return report
    try:
        report.parity, notes = verify(found, out, made.outtype, allow_remote_code=options.allow_remote_code)
    except TuolingError:
        out.unlink()
        raise
    report.notes += notes
    return report


def open_model(source: ModelSource, outtype: str | None) -> tuple[ModelSource, TensorSource]:
    """A model and its tensors. An adapter is merged while they are read, in float32 where f32 is written."""
    if not source.is_adapter:
        return source, open_weights(source.weights_path)
    merged = open_merged(source, dtype=torch.float32 if outtype == "f32" else None)
    return replace(source, config=merged.config), merged


@dataclass(frozen=True)
class GgufOptions:
    """pre_tokenizer, unchecked: see `read_vocabulary`. threads: of llama.cpp's quantiser, else as elsewhere."""

    pre_tokenizer: str | None = None
    allow_nan: bool = False
    unchecked: bool = False
    threads: int | None = None


@dataclass
class GgufReport:
    """fell_back: tensors whose rows are no multiple of the block → the type they were written in."""

    outtype: str
    tensors: int
    size_bytes: int
    notes: list[str] = field(default_factory=list)
    fell_back: dict[str, str] = field(default_factory=dict)


def write_model(
    source: ModelSource,
    out: Path,
    outtype: str = "f16",
    *,
    weights: TensorSource,
    options: GgufOptions = GgufOptions(),
) -> GgufReport:
    """Write `out` from a model's files and `weights`, which are a merged adapter's where it is one.

    Raises ModelError for a family or tokenizer that llama.cpp lacks, UsageError for an unknown type.
    """
    if outtype not in FILE_TYPES:
        raise UsageError(
            tr(f"no type is called {outtype}", f"没有名为 {outtype} 的类型"),
            where="outtype",
            remedy=" | ".join(FILE_TYPES),
        )
    require_writable(out.absolute().parent)
    if outtype in OWN_TYPES:
        return _write_own(source, out, outtype, weights, options)
    try:
        scratch = tempfile.TemporaryDirectory(
            dir=out.absolute().parent, prefix=f".{out.name}.", suffix=".part"
        )
    except OSError as error:
        raise cannot_write(out.parent, error) from error
    with scratch as folder:
        full = Path(folder) / "full.gguf"
        report = _write_own(source, full, _lossless(weights), weights, options)
        threads = options.threads or environment.compute_threads()
        report.fell_back = quantize_file(full, out, outtype, threads=threads)
    report.outtype, report.size_bytes = outtype, out.stat().st_size
    report.notes += fallback_note(report.fell_back)
    return report


def _lossless(weights: TensorSource) -> str:
    """The smallest type that holds every weight as it is."""
    kinds = {str(info.dtype).removeprefix("torch.") for info in weights.infos.values() if len(info.shape) > 1}
    return (
        {"bfloat16": "bf16", "float16": "f16"}[kinds.pop()] if kinds in ({"bfloat16"}, {"float16"}) else "f32"
    )


def _write_own(
    source: ModelSource,
    out: Path,
    outtype: str,
    weights: TensorSource,
    options: GgufOptions,
) -> GgufReport:
    where = str(source.weights_path)
    family = gguf_family(source.config, where)
    tokenizer = load_tokenizer(source, for_training=False)
    plans = plan_tensors(family, source.config, weights.infos, outtype, where)
    sizes = read_sizes(source.config, family)
    rows = next(plan.shape[0] for plan in plans if plan.name == "token_embd.weight")
    vocabulary = read_vocabulary(
        tokenizer, rows, pre_tokenizer=options.pre_tokenizer, unchecked=options.unchecked
    )
    template = _template(source, tokenizer)
    report = GgufReport(outtype, len(plans), 0, list(vocabulary.notes))
    report.fell_back = {
        plan.name: plan.type for plan in plans if len(plan.shape) > 1 and plan.type != outtype
    }

    def metadata(writer: Any) -> None:
        _write_general(writer, source, outtype, lacks_bytes=vocabulary.lacks_bytes)
        write_sizes(sizes, family.arch)(writer)
        writer.add_uint32(f"{family.arch}.vocab_size", rows)
        write_vocabulary(writer, vocabulary)
        _write_special(writer, tokenizer)
        report.notes += _write_template(writer, source, tokenizer, template)

    with console.progress() as bar:
        total = sum(plan.size_bytes for plan in plans)
        task = bar.add_task(tr("writing", "写入"), total=total, detail="")
        report.size_bytes = write_gguf(
            out,
            family.arch,
            metadata,
            plans,
            weights,
            allow_nan=options.allow_nan,
            step=lambda size_bytes: bar.update(task, advance=size_bytes),
        )
    report.notes += fallback_note(report.fell_back) if outtype == "q8_0" else []
    return report


# -- metadata ----------------------------------------------------------------------------------------------------


def _write_general(writer: Any, source: ModelSource, outtype: str, *, lacks_bytes: bool) -> None:
    """Name, licence, and what the model was made of: nothing that says where it lay."""
    writer.add_type("model")
    writer.add_name(Path(source.name).name or source.run_folder.name)
    writer.add_file_type(FILE_TYPES[outtype])
    writer.add_quantization_version(2)
    parts = of_model(source)
    licence = one_licence(parts)
    if licence:
        writer.add_license(licence)
    run = source.run or {}
    base, data = run.get("base") or {}, run.get("data") or {}
    if base.get("named"):
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, Path(str(base["named"])).name)
    record = {
        "tuoling": environment.versions().get("tuoling"),
        "base": {key: base.get(key) for key in ("config_sha256", "family", "licence") if base.get(key)},
        "data_key": data.get("key"),
        "seed": run.get("seed"),
        "unchecked": "no byte tokens" if lacks_bytes else None,
        "lineage": to_json(without_places(parts)),
    }
    writer.add_string(
        gguf_keys.PROVENANCE, json.dumps({k: v for k, v in record.items() if v}, ensure_ascii=False)
    )


def _write_special(writer: Any, tokenizer: TextTokenizer) -> None:
    hf = tokenizer.hf
    for write, index in (
        (writer.add_bos_token_id, tokenizer.bos_id),
        (writer.add_eos_token_id, tokenizer.eos_id),
        (writer.add_pad_token_id, tokenizer.pad_id),
        (writer.add_unk_token_id, hf.unk_token_id),
    ):
        if index is not None:
            write(index)
    writer.add_add_bos_token(tokenizer.adds_bos)
    writer.add_add_eos_token(False)
    writer.add_bool(gguf_keys.MARKS_AFTER_SPECIAL, tokenizer.marks_after_special)


def _template(source: ModelSource, tokenizer: TextTokenizer) -> Template | None:
    """What the weights were tuned with; None where nothing says it, and then the file says nothing either."""
    if source.template is None and not tokenizer.chat_template:
        return None
    chosen, _ = choose_template(
        requested=None, saved=source.template, tokenizer=tokenizer, family_default=None
    )
    return chosen


def _write_template(
    writer: Any, source: ModelSource, tokenizer: TextTokenizer, template: Template | None
) -> list[str]:
    """Our template by its id, and as jinja for other programs; what ends a reply; the folder's own settings."""
    generation = _generation_config(source)
    ends = generation.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    texts = [tokenizer.hf.convert_ids_to_tokens(end) for end in ends if isinstance(end, int)]
    extra = [text for text in texts if text and text != tokenizer.hf.eos_token]
    stops = list(dict.fromkeys((*(template.stops if template else ()), *source.stops, *extra)))
    single = [tokenizer.special_id(stop) for stop in stops]
    end_of_turn = next((index for index in single if index not in (None, tokenizer.eos_id)), None)
    if end_of_turn is not None:
        writer.add_eot_token_id(end_of_turn)
    writer.add_string(gguf_keys.STOPS, json.dumps(stops, ensure_ascii=False))
    writer.add_string(gguf_keys.SYSTEM, source.system or "")
    writer.add_string(gguf_keys.GENERATION, json.dumps(_settings(generation)))
    if template is None:
        return []
    writer.add_string(gguf_keys.TEMPLATE, template.id)
    jinja = template.to_jinja(tokenizer)
    if jinja is None:
        return [
            tr(
                f"the template {template.id} cannot be written for other programs; Tuoling itself knows it",
                f"模板 {template.id} 无法写给其他程序使用；Tuoling 自己认识它",
            )
        ]
    writer.add_chat_template(jinja)
    return []


def _generation_config(source: ModelSource) -> dict[str, Any]:
    for folder in (source.path, source.run_folder, source.weights_path):
        if (folder / "generation_config.json").is_file():
            return dict(read_json(folder / "generation_config.json"))
    return {}


def _settings(generation: Mapping[str, Any]) -> dict[str, Any]:
    """What `settings_from_config` reads, without tokens and versions."""
    return {key: value for key, value in generation.items() if key in gguf_keys.SETTINGS}
