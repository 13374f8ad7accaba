"""Every key of a run: its type, its default, its range, and what is said when it is wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from tuoling.config_mix import data_of, mix_issues, read_mix, stopping_issues, streaming_issues
from tuoling.errors import ConfigError
from tuoling.language import tr

DTYPES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"}
OPTIMIZERS = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf"), "adamw"),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw8bit"), "adamw_8bit"),
}
LEARNING_RATES = {"lora": 2e-4, "full": 2e-5}
"""Defaults that suit adapters and whole models; written into the resolved config like any other value."""


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("number", "a number")
    return value


def _percent(value: Any) -> Any:
    """`5%` is 0.05. From 100 % on it stays a text, which is an error: 1 would be read as one row."""
    if isinstance(value, str) and value.endswith("%") and value[:-1].replace(".", "", 1).isdigit():
        return share if (share := float(value[:-1]) / 100) < 1 else value
    return _not_bool(value)


def _words(value: Any) -> Any:
    """A list may be written as one text with commas."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, list) else value


def _files(value: Any) -> Any:
    """As `_words`, and a file whose name holds a comma is one file."""
    return (value,) if isinstance(value, str) and Path(value).exists() else _words(value)


def _trackers(value: Any) -> Any:
    words = _words(value)
    return tuple(word for word in words if word != "none") if isinstance(words, tuple) else words


def _dtype(value: Any) -> Any:
    return DTYPES.get(value.removeprefix("torch."), value) if isinstance(value, str) else value


def _optimizer(value: Any) -> Any:
    return OPTIMIZERS.get(value, value) if isinstance(value, str) else value


Number = Annotated[float, BeforeValidator(_not_bool)]
Share = Annotated[float, BeforeValidator(_percent)]
Shares = Annotated[tuple[Annotated[Share, Field(gt=0, le=1)], ...], BeforeValidator(_words)]
Whole = Annotated[int, BeforeValidator(_not_bool)]
Words = Annotated[tuple[str, ...], BeforeValidator(_words)]
Files = Annotated[tuple[str, ...], BeforeValidator(_files)]
Tracker = Literal["tensorboard", "wandb", "swanlab"]


class RunConfig(BaseModel):
    """What a run was asked to do, resolved. The same keys in YAML, on the command line, here and in run.json."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    # model
    model_name_or_path: str | None = None
    adapter_name_or_path: str | None = None
    model_revision: str | None = None
    template: str | None = None
    allow_remote_code: bool = False
    quantization_bit: Annotated[Literal[0, 4, 8], BeforeValidator(_not_bool)] | None = None
    """None: as the adapter it starts from was trained, and not quantised without one. 0: not quantised."""
    quantization_type: Literal["nf4", "fp4"] = "nf4"
    double_quantization: bool = True
    """The last two are for 4 bits."""

    # what is trained
    stage: Literal["sft", "pt"] = "sft"
    finetuning_type: Literal["lora", "full"] = "lora"
    recipe: str | None = None

    # rows
    data: Files = ()
    dataset_dir: str | None = None
    dataset: Words = ()
    """Names in `dataset_dir`/dataset_info.json."""
    eval_data: Files = ()
    eval_dataset: Words = ()
    val_size: Annotated[Share, Field(ge=0)] = 0.0
    """Held-out rows: below 1 a share, from 1 on a count."""
    mix: Annotated[dict[str, Number], BeforeValidator(read_mix)] | None = None
    """Source → weight: by what shares the rows of each file, folder or dataset are seen."""
    watch_data: Files = ()
    """Rows whose loss is measured before the first step and after the last, and that are not trained."""
    val_max_share: Annotated[Share, Field(gt=0, lt=1)] | None = None
    """Never hold out more than this share, whatever `val_size` says."""
    data_format: str | None = None
    columns: dict[str, str] | None = None
    licences: dict[str, str] | None = None
    """Name or path of what goes in (or model, adapter, data) → its licence, by the user's own word."""
    max_samples: Annotated[Whole, Field(gt=0)] | None = None
    """At most the first so many rows of each file or dataset."""
    data_shares: Shares | None = None
    """Parts of the rows that `tuoling study` trains on, one run each."""
    data_workers: Annotated[Whole, Field(gt=0)] | None = None
    """Processes that compile rows into tokens; None: one a core where there is enough to do. The result is the same."""
    streaming_start: bool = False
    """Train on the first rows while the rest is compiled; wants max_steps. The first epoch goes shard by shard."""
    max_seq_len: Annotated[Whole, Field(gt=1)] = 1024
    overlong: Literal["error", "drop", "cut_prompt", "split"] = "error"
    learn: Literal["all", "last"] = "all"
    learn_cut_answers: bool = False
    train_on_inputs: bool = False
    share_prefixes: bool = False
    share_head: bool = False
    """What all rows of a batch begin with is computed once in it. Packed rows on a CPU only; exact without dropout."""
    """Off: with it a step holds more of the data, and an epoch has fewer steps."""
    allow_bad: Annotated[Share, Field(ge=0, lt=1)] = 0.0
    """Share of rows that may be bad before the run is refused."""

    # adapter
    lora_rank: Annotated[Whole, Field(gt=0)] = 8
    lora_alpha: Annotated[Whole, Field(gt=0)] = 16
    lora_dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.05
    lora_target: Words = ("all",)

    # steps
    per_device_train_batch_size: Annotated[Whole, Field(gt=0)] | None = 4
    """None, where only `max_tokens_per_batch` is given: as many rows as that holds."""
    per_device_eval_batch_size: Annotated[Whole, Field(gt=0)] = 8
    gradient_accumulation_steps: Annotated[Whole, Field(gt=0)] = 1
    batch_size: Annotated[Whole, Field(gt=0)] | None = None
    """Rows of one optimizer step over all devices; accumulation follows from it (`accumulation`)."""
    max_tokens_per_batch: Annotated[Whole, Field(gt=0)] | None = None
    """Tokens that share a forward at most; a longer row runs alone. The rows of a step do not change by it."""
    num_train_epochs: Annotated[Number, Field(gt=0)] = 3.0
    max_steps: Annotated[Whole, Field(ge=-1)] = -1
    """Above 0 it decides instead of `num_train_epochs`."""
    learning_rate: Annotated[Number, Field(gt=0)] = LEARNING_RATES["lora"]
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: Annotated[Whole, Field(ge=0)] | None = None
    """When given it decides instead of `warmup_ratio`."""
    warmup_ratio: Annotated[Share, Field(ge=0, lt=1)] = 0.03
    optim: Annotated[Literal["adamw", "adamw_8bit", "muon"], BeforeValidator(_optimizer)] = "adamw"
    """muon: for the weight matrices of whole models; the rest, and adapters, take AdamW's steps."""
    weight_decay: Annotated[Number, Field(ge=0)] = 0.0
    adam_beta1: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[Number, Field(ge=0, lt=1)] = 0.999
    adam_epsilon: Annotated[Number, Field(gt=0)] = 1e-8
    label_smoothing_factor: Annotated[Share, Field(ge=0, lt=1)] = 0.0
    z_loss: Annotated[Number, Field(ge=0)] = 0.0
    """Times the squared log-sum-exp of the logits, added to the loss of a token."""
    max_grad_norm: Annotated[Number, Field(ge=0)] = 1.0
    """0 switches clipping off."""
    seed: Annotated[Whole, Field(ge=0)] = 42

    # evaluate, save, log
    eval_steps: Annotated[Whole, Field(ge=0)] | None = None
    """None: at the end of each epoch. 0: only at the end."""
    save_steps: Annotated[Whole, Field(ge=0)] | None = 500
    """None: at the end of each epoch. 0: only at the end (the end is always saved)."""
    save_total_limit: Annotated[Whole, Field(gt=0)] | None = 3
    save_keep_every: Annotated[Whole, Field(gt=0)] | None = None
    """Checkpoints of these steps (its multiples) are kept beside the newest `save_total_limit`."""
    disk_reserve_mib: Annotated[Whole, Field(ge=0)] = 256
    """Stays free on the run's disk: a save that would reach into it stops the run instead."""
    logging_steps: Annotated[Whole, Field(gt=0)] = 10
    load_best_model_at_end: bool = False
    early_stopping_patience: Annotated[Whole, Field(gt=0)] | None = None
    """The run ends after so many evaluations in a row without a new lowest held-out loss."""

    # machine
    dtype: Annotated[Literal["auto", "bf16", "fp16", "fp32"], BeforeValidator(_dtype)] = "auto"
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    gradient_checkpointing: bool = False
    deterministic: bool = False
    """Only kernels whose sums have one order: equal runs on a GPU too, some of them slower."""
    parallel: Literal["ddp", "fsdp", "zero2", "zero3", "zero2_offload", "zero3_offload"] | None = None
    """How several processes share a run (`--nproc`, torchrun); None: ddp."""
    deepspeed: str | None = None
    """A DeepSpeed config of the user's own, JSON."""
    timeout_s: Annotated[Whole, Field(gt=0)] = 1800
    """How long a process waits for the others before the run ends."""
    ignore_memory_plan: bool = False
    """Begin even where the plan says that the run needs more than 1.5 times the free memory."""

    # output
    output_dir: str | None = None
    overwrite_output_dir: bool = False
    """The old folder is moved aside, never deleted."""
    plot_loss: bool = True
    report_to: Annotated[tuple[Tracker, ...], BeforeValidator(_trackers)] = ()
    run_name: str | None = None

    # generation, for the commands that generate
    max_new_tokens: Annotated[Whole, Field(gt=0)] | None = None
    temperature: Annotated[Number, Field(ge=0)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=0)] | None = None
    num_beams: Annotated[Whole, Field(gt=0)] | None = None
    do_sample: bool | None = None
    repetition_penalty: Annotated[Number, Field(gt=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """Values that follow from other values, put in before anything is frozen."""
        if not isinstance(values, dict):
            return values
        values = {**values, **data_of(values)}
        kind = values.get("finetuning_type", "lora")
        values.setdefault(
            "learning_rate", LEARNING_RATES.get(kind if isinstance(kind, str) else "lora", 2e-4)
        )
        total = values.get("batch_size")
        if values.get("per_device_train_batch_size") is None:
            values.pop("per_device_train_batch_size", None)
            if total is None and values.get("max_tokens_per_batch") is not None:
                values["per_device_train_batch_size"] = None
        if isinstance(total, int) and total > 0:
            if "per_device_train_batch_size" not in values:
                fitting = [size for size in (4, 3, 2, 1) if total % size == 0]
                values["per_device_train_batch_size"] = fitting[0]
            per_device = values["per_device_train_batch_size"]
            fits = isinstance(per_device, int) and per_device > 0 and total % per_device == 0
            if fits and "gradient_accumulation_steps" not in values:
                values["gradient_accumulation_steps"] = total // per_device
        return values

    @model_validator(mode="after")
    def _agree(self) -> RunConfig:
        found = list(cross_issues(self.model_dump()))
        if found:
            raise PydanticCustomError("run_config", "keys that disagree", {"issues": found})
        return self

    def require(self, *keys: str) -> None:
        """Raise ConfigError for the keys among these that have no value."""
        names = {"data": ("data", "dataset")}
        missing = [key for key in keys if not any(getattr(self, name) for name in names.get(key, (key,)))]
        if missing:
            listed = ", ".join(missing)
            raise ConfigError(
                tr(f"missing: {listed}", f"缺少：{listed}"),
                remedy=tr(f"for example {missing[0]}=PATH", f"例如 {missing[0]}=路径"),
            )

    def accumulation(self, world_size: int = 1) -> int:
        """Micro-batches a device adds up before a step. Raises ConfigError where `batch_size` cannot be met exactly."""
        if self.batch_size is None or self.per_device_train_batch_size is None:
            return self.gradient_accumulation_steps
        at_once = self.per_device_train_batch_size * world_size
        if self.batch_size % at_once:
            below, above = self.batch_size // at_once * at_once, -(-self.batch_size // at_once) * at_once
            near = " / ".join(f"batch_size={size}" for size in (below, above) if size)
            raise ConfigError(
                tr(
                    f"batch_size={self.batch_size} is not a multiple of per_device_train_batch_size="
                    f"{self.per_device_train_batch_size} × {world_size} devices",
                    f"batch_size={self.batch_size} 不是 per_device_train_batch_size="
                    f"{self.per_device_train_batch_size} × {world_size} 个设备的整数倍",
                ),
                remedy=near,
            )
        return self.batch_size // at_once

    def rows_per_step(self, world_size: int = 1) -> int | None:
        """Rows of an optimizer step over all devices; None where it is `accumulation` packs a device instead."""
        if self.per_device_train_batch_size is None:
            return None
        return self.per_device_train_batch_size * self.accumulation(world_size) * world_size

    def val_rows(self, rows: int) -> int:
        """How many of `rows` are held out. Raises ConfigError when nothing would be left to train on."""
        if self.val_size < 1:
            held_out = int(rows * self.val_size)
        else:
            held_out = int(self.val_size)
        if self.val_max_share is not None:
            held_out = min(held_out, int(rows * self.val_max_share))
        if held_out >= rows > 0:
            raise ConfigError(
                tr(
                    f"val_size={self.val_size:g} leaves nothing to train on: there are {rows} rows",
                    f"val_size={self.val_size:g} 会让训练集为空：一共只有 {rows} 行",
                ),
                where="val_size",
                remedy="val_size=0.1",
            )
        return held_out


def cross_issues(values: Mapping[str, Any]) -> Iterator[tuple[str, str, str | None]]:
    """(key, problem, remedy) where two keys do not go together. Values of the wrong type are left to their own checks."""
    total, per_device, steps = (
        values.get(key)
        for key in ("batch_size", "per_device_train_batch_size", "gradient_accumulation_steps")
    )
    if isinstance(total, int) and isinstance(per_device, int) and per_device > 0:
        if total % per_device:
            near = (
                max(size for size in range(1, min(total, per_device) + 1) if total % size == 0)
                if total > 0
                else 1
            )
            yield (
                "batch_size",
                tr(
                    f"batch_size={total} is not a multiple of per_device_train_batch_size={per_device}",
                    f"batch_size={total} 不是 per_device_train_batch_size={per_device} 的整数倍",
                ),
                f"per_device_train_batch_size={near}",
            )
        elif isinstance(steps, int) and per_device * steps != total:
            yield (
                "batch_size",
                tr(
                    f"batch_size={total}, but per_device_train_batch_size={per_device} × "
                    f"gradient_accumulation_steps={steps} = {per_device * steps}",
                    f"batch_size={total}，但 per_device_train_batch_size={per_device} × "
                    f"gradient_accumulation_steps={steps} = {per_device * steps}",
                ),
                tr("give batch_size or gradient_accumulation_steps, not both", "二者只给一个即可"),
            )
    val_size = values.get("val_size") or 0
    if isinstance(val_size, (int, float)) and val_size >= 1 and val_size != math.floor(val_size):
        yield (
            "val_size",
            tr(
                f"val_size={val_size}: below 1 it is a share, from 1 on a whole number of rows",
                f"val_size={val_size}：小于 1 表示比例，大于等于 1 必须是整数行数",
            ),
            None,
        )
    if val_size and (values.get("eval_data") or values.get("eval_dataset")):
        name = "eval_data" if values.get("eval_data") else "eval_dataset"
        yield (
            "val_size",
            tr(f"val_size and {name} are both given", f"val_size 和 {name} 同时给出了"),
            tr("keep one of the two: val_size=0 keeps the file", "保留其中一个：val_size=0 则使用文件"),
        )
    if values.get("quantization_bit") and values.get("finetuning_type", "lora") == "full":
        bits = values["quantization_bit"]
        yield (
            "quantization_bit",
            tr(
                f"quantization_bit={bits} with finetuning_type=full: quantised weights cannot be trained themselves",
                f"quantization_bit={bits} 与 finetuning_type=full 冲突：量化后的权重本身不能训练",
            ),
            tr(
                f"finetuning_type=lora trains an adapter on {bits} bits; quantization_bit=0 trains every weight",
                f"finetuning_type=lora 在 {bits} 位基座上训练适配器；quantization_bit=0 训练全部权重",
            ),
        )
    yield from _parallel_issues(values)
    yield from mix_issues(values)
    yield from stopping_issues(values)
    yield from streaming_issues(values)
    if values.get("dataset") and values.get("data"):
        yield (
            "dataset",
            tr("data (files) and dataset (names) are both given", "data（文件）和 dataset（名称）同时给出了"),
            tr("keep one of the two", "保留其中一个"),
        )


def _parallel_issues(values: Mapping[str, Any]) -> Iterator[tuple[str, str, str | None]]:
    """What cannot be cut into parts over processes."""
    parallel, file = values.get("parallel"), values.get("deepspeed")
    if file and parallel:
        yield (
            "deepspeed",
            tr(
                f"parallel={parallel} and deepspeed={file} are both given",
                f"parallel={parallel} 和 deepspeed={file} 同时给出了",
            ),
            tr("keep one of the two", "保留其中一个"),
        )
    name = f"deepspeed={file}" if file else f"parallel={parallel}"
    if parallel in (None, "ddp") and not file:
        return
    if values.get("quantization_bit"):
        yield (
            "quantization_bit",
            tr(
                f"quantization_bit={values['quantization_bit']} with {name}: quantised weights cannot be cut into parts",
                f"quantization_bit={values['quantization_bit']} 与 {name} 冲突：量化后的权重不能切分",
            ),
            tr(
                "parallel=ddp keeps a quantised base whole in each process; quantization_bit=0 cuts it unquantised",
                "parallel=ddp 让每个进程各有一份完整的量化基座；quantization_bit=0 则不量化、可切分",
            ),
        )
    if values.get("optim") == "muon":
        yield (
            "optim",
            tr(
                f"optim=muon with {name}: Muon needs whole matrices",
                f"optim=muon 与 {name} 冲突：Muon 需要完整的矩阵",
            ),
            tr("optim=adamw, or parallel=ddp", "改用 optim=adamw，或 parallel=ddp"),
        )


def explain(error: ValidationError) -> Iterator[tuple[str, str, str | None]]:
    """(key, problem with the value in it, remedy) for each thing pydantic found."""
    for item in error.errors():
        if item["type"] == "run_config":
            yield from item["ctx"]["issues"]
            continue
        key = str(item["loc"][0]) if item["loc"] else ""
        value = item.get("input")
        shown = f"{key}={value}" if not isinstance(value, dict) else key
        if item["type"] == "extra_forbidden":
            yield key, tr(f"unknown key: {key}", f"未知的键：{key}"), None
            continue
        yield key, f"{shown}: {_expected(item['type'], item.get('ctx') or {}, key)}", _remedy(key, value)


def _expected(kind: str, context: Mapping[str, Any], key: str) -> str:
    """What should have stood there."""
    if kind == "literal_error":
        choices = str(context["expected"]).replace("'", "").replace(" or ", ", ")
        return tr(f"must be one of {choices}", f"只能是 {choices} 之一")
    for name, text in (
        ("gt", tr("must be greater than", "必须大于")),
        ("ge", tr("must be at least", "不能小于")),
        ("lt", tr("must be less than", "必须小于")),
        ("le", tr("must be at most", "不能大于")),
    ):
        if name in context:
            return f"{text} {context[name]:g}"
    if kind == "string_pattern_mismatch":
        return tr("must be auto, cpu, cuda, cuda:N or mps", "只能是 auto、cpu、cuda、cuda:N 或 mps")
    if kind.startswith("int"):
        return tr("must be a whole number", "必须是整数")
    if kind.startswith(("float", "number", "finite")):
        return tr("must be a number", "必须是数字")
    if kind.startswith("bool"):
        return tr("must be true or false", "只能是 true 或 false")
    if kind.startswith("dict"):
        return tr("must be pairs, such as {instruction: ask}", "必须是键值对，例如 {instruction: ask}")
    if kind.startswith("tuple"):
        return tr("must be a list", "必须是列表")
    return tr("must be a text", "必须是文本")


def _remedy(key: str, value: Any) -> str | None:
    if key == "finetuning_type":
        return tr("full trains every weight, lora an adapter", "full 训练全部权重，lora 训练适配器")
    if key == "stage":
        return tr(
            f"stage {value} is not trained here; sft (instruction rows) and pt (plain text) are",
            f"这里不支持 {value} 阶段；支持 sft（指令数据）和 pt（纯文本）",
        )
    return None
