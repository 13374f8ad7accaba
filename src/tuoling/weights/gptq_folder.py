"""The folder a quantiser starts from, and the folder that is written. What is not quantised comes from the source,
byte for byte."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tuoling import environment
from tuoling.errors import ModelError
from tuoling.files import read_json, write_json
from tuoling.language import tr
from tuoling.models.adapters import some
from tuoling.models.load import load_tokenizer
from tuoling.models.source import ModelSource, weight_files
from tuoling.weights.companions import copy_code, copy_companions
from tuoling.weights.convert import ConvertOptions
from tuoling.weights.gptq_format import (
    PARTS,
    QUANTIZE_CONFIG,
    QuantizedFormat,
    QuantizedWeights,
    quantized_format,
)
from tuoling.weights.gptq_options import QuantizeOptions
from tuoling.weights.rewrite import convert_huggingface
from tuoling.weights.rtn import quantise
from tuoling.weights.safetensors_writer import SafetensorsWriter
from tuoling.weights.tensors import TensorInfo, TensorSource, open_weights


def plain_folder(
    source: ModelSource, work: Path, *, allow_remote_code: bool = False, say: Callable[[str], None]
) -> Path:
    """A model folder of safetensors with a tokenizer.json, below `work`: adapters merged, pickles written anew.

    Where the source is one already, its files are linked, not copied.
    """
    folder = work / "plain"
    if source.is_adapter:
        if not folder.exists():
            from tuoling.weights.merge import merge
            from tuoling.weights.merged import Weighted

            say(tr("merging the adapter into its base", "正在把适配器合并进基座"))
            merge((Weighted(source),), folder, allow_remote_code=allow_remote_code, say=say)
        return folder
    weights = source.weights_path
    if folder.exists():  # an interrupted call made it
        pass
    elif weight_files(weights)[0].suffix != ".safetensors":
        convert_huggingface(weights, folder, ConvertOptions(verify=False))
    else:
        making = work / "linking"
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir()
        for file in (*weight_files(weights), *weights.glob("*.safetensors.index.json")):
            _link(file, making / file.name)
        shutil.copyfile(weights / "config.json", making / "config.json")
        making.rename(folder)
    for place in (source.path, source.run_folder, weights):
        copy_companions(place, folder)
    if allow_remote_code:
        copy_code(weights, folder)
    load_tokenizer(source, for_training=False).hf.save_pretrained(folder)
    return folder


def _link(file: Path, place: Path) -> None:
    """A second name for the same bytes (gptqmodel does not follow symbolic links); a copy on another disk."""
    try:
        os.link(file.resolve(), place)
    except OSError:
        shutil.copyfile(file, place)


def write_quantised(
    plain: Path, folder: Path, options: QuantizeOptions, *, layers: Sequence[str], made: Path | None
) -> QuantizedFormat:
    """Write weights, configs, tokenizer and template record into `folder`.

    made: what gptqmodel wrote; None: every layer of `layers` is rounded to nearest here. Raises ModelError where
    gptqmodel left a layer as it was.
    """
    source = open_weights(plain)
    form = _format(options, made)
    quantised: QuantizedWeights | None = None
    if made is not None:
        quantised = QuantizedWeights(made, form)
        left = sorted(set(layers) - set(quantised.layers))
        if left:
            raise ModelError(
                tr(
                    f"{len(left)} layers were not quantised, such as {left[0]}",
                    f"有 {len(left)} 层没有量化，如 {left[0]}",
                ),
                where=str(made),
            )
    stored = open_weights(made) if made is not None else None
    names = _names(source, layers, stored, rescaled=form.method == "awq")
    infos = {
        **{name: where.infos[there] for name, (where, there) in names.items()},
        **{
            f"{layer}.{part}": info
            for layer in layers
            for part, info in _part_infos(source, layer, form, stored).items()
        },
    }
    with SafetensorsWriter(folder, infos) as writer:
        for name, (where, there) in names.items():
            writer.write(name, where.read(there))
        for layer in layers:
            for part, tensor in _parts(source, layer, form, stored):
                writer.write(f"{layer}.{part}", tensor)
    config = read_json(plain / "config.json")
    config["quantization_config"] = form.to_config() | _how(options)
    write_json(folder / "config.json", config)
    write_json(folder / QUANTIZE_CONFIG, config["quantization_config"])
    copy_companions(plain, folder)
    if options.allow_remote_code:
        copy_code(plain, folder)
    return form


def _format(options: QuantizeOptions, made: Path | None) -> QuantizedFormat:
    if made is None:
        return QuantizedFormat(
            "gptq",
            options.bits,
            options.group_size,
            sym=options.symmetric,
            minus_one=options.symmetric,
        )
    form = quantized_format(made)
    if form is None:
        raise ModelError(
            tr("gptqmodel wrote no quantised model", "gptqmodel 没有写出量化模型"), where=str(made)
        )
    return replace(form, desc_act=options.act_order) if form.method == "gptq" else form


def _names(
    source: TensorSource, layers: Sequence[str], stored: TensorSource | None, *, rescaled: bool
) -> dict[str, tuple[TensorSource, str]]:
    """Tensors that are kept: name in the result → where they are read.

    stored: what gptqmodel wrote: a tensor that only it has (none that we know of) is kept too.
    rescaled: the blocks' norms and biases are gptqmodel's: AWQ multiplies inputs of a layer and divides what comes
    before it, so the source's own would no longer fit.
    """
    prefix = _missing_prefix(source, layers)
    quantised = {f"{layer}.weight".removeprefix(prefix) for layer in layers}
    kept = {
        name if name == "lm_head.weight" else prefix + name: (source, name)
        for name in source.infos
        if name not in quantised
    }
    if stored is not None:
        parts = {f"{layer}.{part}" for layer in layers for part in PARTS}
        blocks = tuple({found[0] for layer in layers if (found := re.match(r".*?\.\d+\.", layer))})
        for name in stored.infos:
            new = name not in kept and name not in parts and name != "lm_head.weight"  # tied to the embedding
            if new or (rescaled and name in kept and name.startswith(blocks)):
                kept[name] = (stored, name)
    return kept


def _missing_prefix(source: TensorSource, layers: Sequence[str]) -> str:
    """What the model's names begin with and the files' do not: `transformer.` of published BLOOM folders, else "".

    Raises ModelError where the files lack a layer under either name.
    """
    prefix = "" if f"{layers[0]}.weight" in source.infos else layers[0].partition(".")[0] + "."
    missing = [name for name in layers if f"{name}.weight".removeprefix(prefix) not in source.infos]
    if missing:
        raise ModelError(tr(f"tensors are missing: {some(missing)}", f"缺少张量：{some(missing)}"))
    return prefix


def _part_infos(
    source: TensorSource, layer: str, form: QuantizedFormat, stored: TensorSource | None
) -> dict[str, TensorInfo]:
    if stored is not None:
        return {part: stored.infos[f"{layer}.{part}"] for part in PARTS if f"{layer}.{part}" in stored.infos}
    name = f"{layer}.weight".removeprefix(_missing_prefix(source, [layer]))
    outputs, inputs = source.infos[name].shape
    groups = 1 if form.group_size == -1 else -(-inputs // form.group_size)
    return {
        "qweight": TensorInfo(torch.int32, (-(-inputs * form.bits // 32), outputs)),
        "qzeros": TensorInfo(torch.int32, (groups, -(-outputs * form.bits // 32))),
        "scales": TensorInfo(torch.float16, (groups, outputs)),
        "g_idx": TensorInfo(torch.int32, (inputs,)),
    }


def _parts(
    source: TensorSource, layer: str, form: QuantizedFormat, stored: TensorSource | None
) -> Iterator[tuple[str, torch.Tensor]]:
    if stored is not None:
        for part in PARTS:
            if f"{layer}.{part}" in stored.infos:
                yield part, stored.read(f"{layer}.{part}")
        return
    weight_ON = source.read(f"{layer}.weight".removeprefix(_missing_prefix(source, [layer])))
    packed = quantise(weight_ON, form.bits, form.group_size, symmetric=form.sym, minus_one=form.minus_one)
    for part in PARTS:
        yield part, getattr(packed, part)


def _how(options: QuantizeOptions) -> dict[str, Any]:
    """What readers do not need and people may want to know."""
    quantizer = (
        "tuoling:rtn" if options.method == "rtn" else f"gptqmodel:{environment.versions().get('gptqmodel')}"
    )
    meta: dict[str, Any] = {"quantizer": [quantizer]}
    if options.method == "gptq":
        meta["true_sequential"] = options.true_sequential
    return {"meta": meta}
