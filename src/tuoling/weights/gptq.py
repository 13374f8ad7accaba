"""`tuoling quantize`: 2, 3, 4 or 8 bits by gptqmodel, calibrated on the user's rows, and what it cost.

The work lies in a hidden folder beside the output until it is done: there an interrupted call goes on.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tuoling import environment
from tuoling.errors import DataError, ModelError, OutputError, UsageError
from tuoling.files import atomic_folder, read_json, require_writable, sha256_text, write_json
from tuoling.language import tr
from tuoling.models.gptq_packages import require_gptqmodel
from tuoling.models.shape import linear_shapes, meta_model
from tuoling.models.source import ModelSource, find_model
from tuoling.weights.gptq_folder import plain_folder, write_quantised
from tuoling.weights.gptq_job import Say, run_job
from tuoling.weights.gptq_options import QuantizeOptions, QuantizeReport
from tuoling.weights.gptq_rows import CalibrationRows, choose_rows, rows_to_json
from tuoling.weights.parity import Bound, gate, skipped
from tuoling.weights.tensors import open_weights

RESUMABLE = ("llama", "qwen2", "bloom")
"""`model_type`s whose interrupted quantisation is tested to go on to the very bytes of a straight run."""

NO_AWQ = ("bloom",)
"""`model_type`s whose attention gptqmodel cannot call alone, as it does to find what AWQ scales."""

RECORD = "quantization.json"

BOUNDS = {8: Bound(1.1, 0.9), 4: Bound(1.5, 0.5), 3: Bound(4.0, 0.2), 2: Bound(math.inf, 0.0)}
"""What a width may cost on the parity gate's fixed probes; 2 bits cost what they cost, and it is told."""


def quantize(
    model: str,
    out: Path,
    options: QuantizeOptions,
    *,
    data: Sequence[str] = (),
    base: str | None = None,
    revision: str | None = None,
    template: str | None = None,
    say: Say = lambda message: None,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> QuantizeReport:
    """Write `out`, a folder that transformers and vLLM read, from a model, run or adapter (merged first).

    step: called with the layers done and their number. Raises UsageError where there are no rows to calibrate on,
    ModelError where the weights are quantised already or gptqmodel fails.
    """
    options.check()
    environment.quiet_libraries()
    if options.method != "rtn":
        require_gptqmodel(
            tr("quantising", "量化"),
            tr("or round to nearest without it: --method rtn", "或不用它，直接取最近值：--method rtn"),
        )
    elif options.verify:
        require_gptqmodel(
            tr("running the result", "运行量化结果"),
            tr("or write it unproven: --no-verify", "或不经验证直接写出：--no-verify"),
        )
    if out.exists():
        raise OutputError(
            tr("already exists", "已经存在"), where=str(out), remedy=tr("choose another place", "换一个位置")
        )
    require_writable(out.absolute().parent)
    source = find_model(model, revision=revision, base=base)
    _require_unquantised(source)
    _require_awq(source, options)
    rows = _rows(source, options, data, template, say)
    work = _Work.open(source, out, options, rows)
    if work.goes_on:
        say(tr(f"going on with the work in {work.folder}", f"继续 {work.folder} 中未完成的工作"))
    try:
        report = _quantize(source, out, options, work, say, step)
    except BaseException:
        if options.method == "rtn":  # else there may be layers to go on from, and the log of what went wrong
            shutil.rmtree(work.folder, ignore_errors=True)
        raise
    shutil.rmtree(work.folder, ignore_errors=True)
    return report


def _rows(
    source: ModelSource, options: QuantizeOptions, data: Sequence[str], template: str | None, say: Say
) -> CalibrationRows | None:
    """The rows; None where rounding to nearest needs none and none can be had."""
    try:
        rows = choose_rows(source, data, count=options.rows, seed=options.seed, template=template, say=say)
    except (UsageError, DataError):
        if options.method != "rtn" or data:
            raise
        return None
    for note in rows.notes:
        say(note)
    return rows


def _quantize(
    source: ModelSource,
    out: Path,
    options: QuantizeOptions,
    work: _Work,
    say: Say,
    step: Callable[[int, int], None],
) -> QuantizeReport:
    plain = plain_folder(source, work.folder, allow_remote_code=options.allow_remote_code, say=say)
    layers = linear_names(plain, allow_remote_code=options.allow_remote_code)
    _require_widths(layers, options)
    report = QuantizeReport(out, options, len(layers), 0, _size(plain))
    report.notes += _width_notes(layers, options)
    made = None if options.method == "rtn" else _run_gptqmodel(work, plain, layers, options, report, step)
    with atomic_folder(out) as folder:
        write_quantised(plain, folder, options, layers=list(layers), made=made)
        report.size_bytes = _size(folder)
        if options.verify:
            if work.rows is not None:
                _measure(work, plain, folder, options, list(layers), report)
            gate(
                plain,
                folder,
                lossless=False,
                bound=BOUNDS[options.bits],
                allow_remote_code=options.allow_remote_code,
                say=say,
            )
        else:
            skipped(folder)
        facts = work.rows.facts if work.rows else None
        record = report.to_json() | {"calibration": facts, "verified": options.verify}
        write_json(folder / RECORD, record | {"versions": environment.versions()})
    return report


def linear_names(folder: Path, *, allow_remote_code: bool = False) -> dict[str, tuple[int, int]]:
    """The linear layers of the blocks, [outputs, inputs] each: what is quantised. The head and embeddings stay."""
    model = meta_model(folder, allow_remote_code=allow_remote_code)
    head = model.get_output_embeddings()
    return {
        name: shape for name, shape in linear_shapes(model).items() if model.get_submodule(name) is not head
    }


def _require_widths(layers: Mapping[str, tuple[int, int]], options: QuantizeOptions) -> None:
    """gptqmodel packs 32 inputs at a time where a number lies across words, and ends at a width that is no multiple;
    for AWQ it cuts inputs into whole groups and outputs into 64s."""
    group = max(options.group_size, 1)
    odd = [(name, shape) for name, shape in layers.items() if shape[1] % group or shape[0] % 64]
    if options.method == "awq" and odd:
        name, (outputs, inputs) = odd[0]
        raise ModelError(
            tr(
                f"{len(odd)} layers do not fit AWQ in groups of {group}: {name} has {inputs} inputs, {outputs} outputs",
                f"有 {len(odd)} 层无法按每组 {group} 做 AWQ：{name} 的输入宽度 {inputs}，输出宽度 {outputs}",
            ),
            remedy="--group-size 32 | --group-size 16 | --group-size -1 | --method gptq",
        )
    wrong = [(name, inputs) for name, (_, inputs) in layers.items() if inputs % 32]
    if options.bits == 3 and options.method == "gptq" and wrong:
        name, inputs = wrong[0]
        raise ModelError(
            tr(
                f"{len(wrong)} layers cannot be packed in 3 bits: {name} has {inputs} inputs, no multiple of 32",
                f"有 {len(wrong)} 层无法按 3 位打包：{name} 的输入宽度 {inputs} 不是 32 的倍数",
            ),
            remedy="--bits 4 | --bits 2 | --bits 3 --method rtn",
        )


def _require_unquantised(source: ModelSource) -> None:
    if source.config.get("quantization_config"):
        raise ModelError(
            tr("these weights are quantised already", "这些权重已经量化过"),
            where=str(source.weights_path / "config.json"),
            remedy=tr(
                "take the model they were made from; or multiply them out first: tuoling convert",
                "请用量化之前的模型；或先还原：tuoling convert",
            ),
        )


def _require_awq(source: ModelSource, options: QuantizeOptions) -> None:
    family = source.config.get("model_type")
    if options.method == "awq" and family in NO_AWQ:
        raise UsageError(
            tr(f"gptqmodel cannot make AWQ of a {family}", f"gptqmodel 无法对 {family} 做 AWQ 量化"),
            where="--method awq",
            remedy="--method gptq",
        )


@dataclass(frozen=True)
class _Work:
    """The folder an unfinished quantisation lies in. goes_on: it held one of the same model, rows and options."""

    folder: Path
    goes_on: bool
    rows: CalibrationRows | None

    @staticmethod
    def open(source: ModelSource, out: Path, options: QuantizeOptions, rows: CalibrationRows | None) -> _Work:
        folder = out.absolute().with_name(f".{out.name}.quantizing")
        chosen = rows_to_json(rows.calibration) if rows else []
        deciding = replace(options, verify=True, dtype="auto")  # the others change what is measured
        key = sha256_text(f"{source.fingerprint()}\n{deciding}\n{chosen}")
        there = folder / "key.json"
        goes_on = there.is_file() and read_json(there) == key and (folder / "checkpoints").is_dir()
        if not goes_on:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_json(folder / "calibration.json", chosen)
            write_json(folder / "held_out.json", rows_to_json(rows.held_out) if rows else [])
            write_json(there, key)
        return _Work(folder, goes_on, rows)


def _run_gptqmodel(
    work: _Work,
    plain: Path,
    layers: dict[str, tuple[int, int]],
    options: QuantizeOptions,
    report: QuantizeReport,
    step: Callable[[int, int], None],
) -> Path:
    """The folder that gptqmodel wrote."""
    made = work.folder / "made"
    shutil.rmtree(made, ignore_errors=True)
    config = read_json(plain / "config.json")
    resumable = options.method == "gptq" and options.true_sequential and config.get("model_type") in RESUMABLE
    if not resumable:
        report.notes.append(
            tr(
                "interrupted, this would begin anew: gptqmodel goes on only for "
                f"{', '.join(RESUMABLE)}, layer after layer in their order",
                f"若被打断将从头开始：gptqmodel 只支持 {'、'.join(RESUMABLE)} 按层顺序续做",
            )
        )
    answer = run_job(
        {
            "task": "quantize",
            "model": str(plain),
            "rows": str(work.folder / "calibration.json"),
            "config": _library_config(options, work.folder / "offload"),
            "method": options.method,
            "device": environment.pick_device(options.device),
            "dtype": _compute_dtype(config, environment.pick_device(options.device)),
            "resumable": resumable,
            "checkpoints": str(work.folder / "checkpoints"),
            "made": str(made),
            "allow_remote_code": options.allow_remote_code,
        },
        work.folder,
        watch=lambda: step(_done(work.folder, layers), len(layers)),
        remedy=tr(
            "the same call goes on after the last whole layer", "再次运行同一命令会从最后完成的一层继续"
        )
        if resumable
        else None,
    )
    report.seconds, report.peak_gib = answer["seconds"], answer["peak_rss_gib"]
    return made


def _library_config(options: QuantizeOptions, offload: Path) -> dict[str, Any]:
    config: dict[str, Any] = {
        "bits": options.bits,
        "group_size": options.group_size,
        "sym": options.symmetric,
        "offload_to_disk": True,
        "offload_to_disk_path": str(offload),
    }
    if options.method == "gptq":
        config |= {
            "desc_act": options.act_order,
            "true_sequential": options.true_sequential,
            # a zero point of 0 has no place in the layout `gptq`
            "format": "gptq" if options.symmetric else "gptq_v2",
        }
    return config


def _compute_dtype(config: dict[str, Any], device: str) -> str:
    """What layers compute in while they are quantised: their own type, unless the machine is slow in it."""
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if device == "cpu" and (stored == "float16" or (stored == "bfloat16" and not environment.cpu_has_bf16())):
        return "float32"
    return stored


def _done(work: Path, layers: dict[str, tuple[int, int]]) -> int:
    """Layers that gptqmodel has packed so far: it puts each into a folder under its name."""
    found = {path.parent.name for path in work.glob("**/module.safetensors")}
    return len(found & layers.keys())


def _width_notes(layers: dict[str, tuple[int, int]], options: QuantizeOptions) -> list[str]:
    size = options.group_size if options.group_size > 0 else 32
    odd = [name for name, (outputs, inputs) in layers.items() if inputs % size or outputs % 32]
    if not odd:
        return []
    return [
        tr(
            f"{len(odd)} of {len(layers)} layers are no multiple of {size} wide (such as {odd[0]}): "
            "transformers reads them, vLLM does not",
            f"{len(layers)} 层中有 {len(odd)} 层的宽度不是 {size} 的倍数（如 {odd[0]}）：transformers 能读，vLLM 不能",
        )
    ]


def _size(folder: Path) -> int:
    return sum(info.size_bytes for info in open_weights(folder).infos.values())


def _measure(
    work: _Work,
    plain: Path,
    folder: Path,
    options: QuantizeOptions,
    layers: list[str],
    report: QuantizeReport,
) -> None:
    """Perplexity, rate and memory before and after, and of rounding to nearest beside it, one process each."""
    rounded = {
        "layers": layers,
        "bits": options.bits,
        "group_size": options.group_size,
        "symmetric": options.symmetric,
    }
    job = {
        "task": "measure",
        "rows": str(work.folder / "held_out.json"),
        "device": options.device,
        "dtype": options.dtype,
        "allow_remote_code": options.allow_remote_code,
    }
    before = run_job(job | {"model": str(plain), "rtn": rounded}, work.folder)
    report.before, report.rtn = before["perplexity"], before["rtn_perplexity"]
    report.tokens_per_s_before, report.memory_before_gib = before["tokens_per_s"], before["memory_gib"]
    after = run_job(job | {"model": str(folder.absolute()), "rtn": None}, work.folder)
    report.after, report.tokens_per_s = after["perplexity"], after["tokens_per_s"]
    report.memory_gib = after["memory_gib"]
