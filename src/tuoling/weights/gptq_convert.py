"""Old GPTQ files written as folders of today. Nothing is quantised again: the integers are the same."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from tuoling.errors import ModelError, OutputError, UsageError
from tuoling.files import atomic_folder, read_json, write_json
from tuoling.language import tr
from tuoling.models.adapters import some
from tuoling.models.shape import linear_shapes, meta_model
from tuoling.models.source import find_model
from tuoling.weights.companions import copy_code, copy_companions
from tuoling.weights.convert import ConvertOptions, Report, prove
from tuoling.weights.gptq_format import PARTS, QUANTIZE_CONFIG, QuantizedFormat, QuantizedWeights
from tuoling.weights.gptq_old import OldLayer, OldQuantizedWeights, Survey, Unpacked, layers_of, read_layer
from tuoling.weights.gptq_packing import PackedLinear, pack_zeros
from tuoling.weights.parity import Weights
from tuoling.weights.rewrite import cast, number_type
from tuoling.weights.safetensors_writer import SafetensorsWriter
from tuoling.weights.tensors import TensorInfo, TensorSource, open_weights

COMPUTED = ("rotary_emb.inv_freq", "masked_bias", "attention.bias")
"""Buffers that old files carry and that are computed now."""


def convert_old_gptq(source: Path, out: Path, options: ConvertOptions) -> Report:
    """Write an old GPTQ file as a folder of today: safetensors, config.json, quantize_config.json, tokenizer.

    Nothing is quantised again: the integers are the same. Raises UsageError without --base, ModelError for tensors
    that do not fit the base's config, for code in a pickle, and for zero points that the old packing bug has lost
    (`--unchecked` goes on).
    """
    base = _base_folder(options.base)
    tensors = open_weights(source)
    model = meta_model(base, allow_remote_code=options.allow_remote_code)
    layers = layers_of(tensors, linear_shapes(model), source)
    plain = _plain_names(tensors, layers, model, source)
    survey = Survey()
    for layer in layers:
        survey.add(layer, read_layer(tensors, layer, source), source)
    if survey.lost and not options.unchecked:
        raise _lost_zeros(survey.lost, source)
    form = QuantizedFormat(
        "gptq",
        layers[0].bits,
        layers[0].group_size,
        desc_act=survey.act_order,
        sym=survey.symmetric,
        minus_one=not survey.noughts,
    )
    dtype = number_type(options.outtype)
    infos = _infos(tensors, plain, layers, form, dtype)
    size = sum(info.size_bytes for info in infos.values())
    with atomic_folder(out) as folder:
        with SafetensorsWriter(folder, infos, shards=options.shards) as writer:
            for name in plain:
                kept = cast(name, tensors.read(name), dtype, allow_nan=options.allow_nan, where=source)
                writer.write(name, kept)
            for layer in layers:
                parts = _repack(tensors, layer, read_layer(tensors, layer, source), form)
                for part in PARTS:
                    writer.write(f"{layer.name}.{part}", getattr(parts, part))
        _write_configs(base, folder, form, dtype)
        copy_companions(base, folder)
        if options.allow_remote_code:
            copy_code(base, folder)
        _compare(OldQuantizedWeights(source, model), QuantizedWeights(folder, form), folder)
        before = Weights(source, described_by=folder, multiply_out=True)
        parity = prove(before, Weights(folder, multiply_out=True), folder, options)
    return Report(out, tensors=len(infos), size_bytes=size, notes=_notes(form, survey), parity=parity)


def _base_folder(base: str | None) -> Path:
    """The folder with the config.json that says the sizes: a folder, its config.json, or a hub id."""
    if base is None:
        raise UsageError(
            tr(
                "an old GPTQ file does not say which model it is",
                "旧 GPTQ 文件没有写明它是什么模型",
            ),
            where="--base",
            remedy=tr(
                "name the model it was made from, or its config.json: --base MODEL",
                "请给出它的原始模型或 config.json：--base MODEL",
            ),
        )
    path = Path(base).expanduser()
    if path.is_file():
        return path.parent
    if (path / "config.json").is_file():  # weights are not needed
        return path
    return find_model(base).weights_path


def _plain_names(tensors: TensorSource, layers: Iterable[OldLayer], model: Any, where: Path) -> list[str]:
    """Tensors that are kept as they are: all that the model has, and no other. Raises ModelError otherwise."""
    quantised = {layer.name for layer in layers}
    parts = {f"{name}.{part}" for name in quantised for part in (*PARTS, "zeros")}
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    kept: list[str] = []
    strange: list[str] = []
    for name, info in tensors.infos.items():
        if name in parts or name.endswith(COMPUTED):
            continue
        layer, _, part = name.rpartition(".")
        if part == "bias" and layer in quantised and name not in wanted:
            if bool(tensors.read(name).any()):
                strange.append(name)
            continue  # the old code gave every layer a bias, zero where the model has none
        (kept if wanted.get(name) == info.shape else strange).append(name)
    tied = (
        set(getattr(model, "_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else set()
    )
    kept = [name for name in kept if name not in tied]
    due = wanted.keys() - tied - {f"{name}.weight" for name in quantised}
    missing = sorted(name for name in due - set(kept) if not name.endswith(COMPUTED))
    for names, en, zh in (
        (strange, "tensors that the model of --base does not have", "--base 的模型中没有这些张量"),
        (missing, "tensors of the model are missing", "缺少模型的张量"),
    ):
        if names:
            raise ModelError(
                tr(f"{en}: {some(names)}", f"{zh}：{some(names)}"),
                where=str(where),
                remedy=tr("name the model it was made from", "请给出它的原始模型"),
            )
    return kept


def _lost_zeros(lost: int, where: Path) -> ModelError:
    return ModelError(
        tr(
            f"{lost:,} zero points were destroyed when the file was packed (a zero point of 0 overwrote its neighbours)",
            f"文件打包时有 {lost:,} 个零点被破坏（零点 0 覆盖了相邻的值）",
        ),
        where=str(where),
        remedy=tr(
            "quantise the model again: tuoling quantize MODEL OUT\nor guess them (the layer's median): --unchecked",
            "请重新量化：tuoling quantize MODEL OUT\n或用该层的中位数代替：--unchecked",
        ),
    )


def _infos(
    tensors: TensorSource,
    plain: Iterable[str],
    layers: Iterable[OldLayer],
    form: QuantizedFormat,
    dtype: torch.dtype | None,
) -> dict[str, TensorInfo]:
    infos = {}
    for name in plain:
        info = tensors.infos[name]
        infos[name] = TensorInfo(dtype, info.shape) if dtype and info.dtype.is_floating_point else info
    for layer in layers:
        groups = -(-layer.inputs // (layer.inputs if form.group_size == -1 else form.group_size))
        infos |= {
            f"{layer.name}.qweight": TensorInfo(
                torch.int32, (-(-layer.inputs * layer.bits // 32), layer.outputs)
            ),
            f"{layer.name}.qzeros": TensorInfo(torch.int32, (groups, -(-layer.outputs * layer.bits // 32))),
            f"{layer.name}.scales": TensorInfo(torch.float16, (groups, layer.outputs)),
            f"{layer.name}.g_idx": TensorInfo(torch.int32, (layer.inputs,)),
        }
    return infos


def _repack(tensors: TensorSource, layer: OldLayer, found: Unpacked, form: QuantizedFormat) -> PackedLinear:
    qzeros = pack_zeros(found.zero_GN, layer.bits, minus_one=form.minus_one)
    qweight = tensors.read(f"{layer.name}.qweight")
    return PackedLinear(qweight, qzeros, found.scale_GN.half(), found.g_idx, layer.bits, form.minus_one)


def _write_configs(base: Path, folder: Path, form: QuantizedFormat, dtype: torch.dtype | None) -> None:
    config = read_json(base / "config.json")
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype or torch.float16).removeprefix("torch.")
    config["quantization_config"] = form.to_config()
    write_json(folder / "config.json", config)
    write_json(folder / QUANTIZE_CONFIG, form.to_config())


def _compare(old: OldQuantizedWeights, written: QuantizedWeights, folder: Path) -> None:
    """Read every layer back as today's readers do: it must be the old one to the rounding of its scales."""
    for layer in written.layers:
        if not torch.equal(written.read(f"{layer}.weight"), old.read(f"{layer}.weight")):
            raise OutputError(
                tr(f"{layer} does not read back the same", f"{layer} 读回后不一致"), where=str(folder)
            )


def _notes(form: QuantizedFormat, survey: Survey) -> list[str]:
    """What was found in the file, in sentences."""
    size = (
        tr("one group", "不分组")
        if form.group_size == -1
        else tr(f"groups of {form.group_size}", f"每组 {form.group_size}")
    )
    kind = tr("symmetric", "对称") if form.sym else tr("asymmetric", "非对称")
    order = tr(", act-order", "，act-order") if form.desc_act else ""
    notes = [
        tr(
            f"found: {form.bits} bits, {size}, {kind}{order}",
            f"识别为：{form.bits} 位，{size}，{kind}{order}",
        ),
        tr(
            f"the integers are the same; scales in float16 now differ by at most {survey.scale_rounding:.1e} of themselves",
            f"整数不变；缩放系数改为 float16，相对变化不超过 {survey.scale_rounding:.1e}",
        ),
    ]
    if survey.repaired:
        notes.append(
            tr(
                f"{survey.repaired:,} zero points of 0 that the old packer wrote wrong were repaired",
                f"修复了旧打包程序写错的 {survey.repaired:,} 个零点（值为 0）",
            )
        )
    if survey.lost:
        notes.append(
            tr(
                f"{survey.lost:,} zero points were lost and are guesses: expect damage",
                f"有 {survey.lost:,} 个零点已丢失，用猜测值代替：质量会受损",
            )
        )
    if not form.minus_one:
        notes.append(
            tr(
                "zero points of 0 exist, so the layout is gptq_v2, which keeps them as they are",
                "存在值为 0 的零点，因此采用 gptq_v2 格式，零点按原值保存",
            )
        )
    return notes
