"""From a config to everything a run needs, checked before the first weight is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tuoling import environment
from tuoling.data.mix import Mix
from tuoling.data.store import StoreReport, TokenStore
from tuoling.errors import ConfigError, ModelError
from tuoling.language import tr
from tuoling.models import quantization as low_bit
from tuoling.models.adapter_reading import read_adapter
from tuoling.models.adapters import lora_target_names
from tuoling.models.licence import Part, as_said, of_data, of_model, union
from tuoling.models.load import load_tokenizer
from tuoling.models.shape import linear_weights, lora_parameters, meta_model, shape_of
from tuoling.models.source import find_model
from tuoling.text.checks import check_template
from tuoling.text.templates import Template, choose_template
from tuoling.train.memory import (
    WARN_ABOVE,
    MemoryEstimate,
    ModelSize,
    estimate_memory,
    quantization_of,
    what_fits,
)
from tuoling.train.optim import require_optimizer
from tuoling.train.parallel import require_engine, require_trackers
from tuoling.train.plan import Plan
from tuoling.train.planning import make_plan
from tuoling.train.rows import Rows, Say, begin_rows, compile_rows, hold_out, mix_of, sharing_note
from tuoling.train.steps import FROM_THE_BEGINNING, Offset, Steps, make_steps

if TYPE_CHECKING:
    from tuoling.config import RunConfig
    from tuoling.models.source import ModelSource
    from tuoling.text.tokenizer import TextTokenizer


@dataclass(frozen=True)
class Setup:
    """A run that is ready to start: nothing of it is on disk yet but the token store's cache."""

    config: RunConfig
    source: ModelSource
    tokenizer: TextTokenizer
    template: Template
    template_reason: str
    train: Rows
    held_out: Rows | None
    report: StoreReport
    plan: Plan
    device: str
    dtype: str
    hidden: int = 0
    """Of the model."""
    world_size: int = 1
    laid_for: int = 1
    """Processes the steps were laid for: another number than world_size where a run goes on with more or fewer."""
    offset: Offset = FROM_THE_BEGINNING
    mix: Mix | None = None
    watched: Rows | None = None
    """Rows whose loss is measured before and after, and that are not trained."""
    notes: list[str] = field(default_factory=list)

    @property
    def streamed(self) -> TokenStore | None:
        """The training rows' store where the run began before all of them were there."""
        return self.train.store if self.config.streaming_start else None

    def steps(self, world_size: int) -> Steps:
        """The rows of every step, for so many processes."""
        return make_steps(
            self.config,
            self.train.lengths,
            world_size,
            self.laid_for,
            self.offset,
            self.mix,
            store=self.streamed,
        )

    def epochs(self, rows_seen: int) -> float | None:
        """How many epochs so many rows are; None while nobody knows how long one is."""
        if self.plan.rows_known:
            return round(rows_seen / self.plan.rows, 4)
        return round(rows_seen / len(self.train), 4) if self.train.store.whole else None

    def fingerprint(self) -> str:
        """The same in all processes that may train together."""
        stores = [rows.store.key if rows else None for rows in (self.train, self.held_out, self.watched)]
        return f"{self.config.model_dump_json(exclude={'output_dir'})} {stores} {self.dtype}"


def prepare(
    config: RunConfig,
    *,
    say: Say,
    notes: Sequence[str] = (),
    world_size: int | None = None,
    laid_for: int | None = None,
    offset: Offset = FROM_THE_BEGINNING,
) -> Setup:
    """Resolve model, template, rows, precision and plan.

    world_size: processes that will train; what a launcher says that has started them. laid_for, offset: of a run that
    goes on (steps.py).
    Raises a TuolingError for whatever would stop the run later: missing or bad rows, an unknown template,
    a tokenizer without an end token, a held-out part larger than the data.
    """
    kept = list(notes)

    def tell(message: str) -> None:
        kept.append(message)
        say(message)

    config.require("model_name_or_path", "data")
    world_size = environment.world_size() if world_size is None else world_size
    laid_for = world_size if laid_for is None else laid_for
    device = environment.pick_device(config.device)
    dtype = _pick_dtype(config, device, tell)
    require_trackers(config.report_to)
    require_optimizer(config.optim)
    require_engine(config, world_size, tell)
    source = _find_source(config)
    config = _as_its_adapter(config, source, tell)
    low_bit.require(quantization_of(config), device)
    if source.is_adapter:
        tell(
            tr(
                f"training goes on from the adapter {source.path}: rank, alpha, dropout and targets are its own",
                f"从适配器 {source.path} 开始训练：rank、alpha、dropout 和目标层以它为准",
            )
        )
    tokenizer = load_tokenizer(source)
    template, reason = _template_of(config, source, tokenizer, tell)
    rows = _read_rows(config, tokenizer, template, tell)
    train = rows.train
    shape = meta_model(source.weights_path, allow_remote_code=config.allow_remote_code)
    size = model_size(shape, source, config)
    memory = estimate_memory(config, model_config=shape.config, lengths=train.lengths, size=size, dtype=dtype)
    plan = make_plan(
        config,
        lengths=train.lengths,
        learned=train.learned,
        eval_rows=len(rows.held_out) if rows.held_out else 0,
        shared_rows=len(rows.alone) - len(train),
        shared_tokens=int(rows.alone.lengths.sum() - train.lengths.sum()),
        size=size,
        memory=memory,
        device=device,
        world_size=world_size,
        lineage=_lineage(config, source, rows.alone.store),
        laid_for=laid_for,
        offset=offset,
        mix=rows.mix,
        store=train.store if config.streaming_start else None,
        fitting=_fitting(config, memory, shape, train.lengths, size, source, dtype, device),
    )
    return Setup(
        config=config,
        source=source,
        tokenizer=tokenizer,
        template=template,
        template_reason=reason,
        train=train,
        held_out=rows.held_out,
        report=rows.report,
        plan=plan,
        device=device,
        dtype=dtype,
        hidden=size.hidden,
        world_size=world_size,
        laid_for=laid_for,
        offset=offset,
        mix=rows.mix,
        watched=rows.watched,
        notes=kept,
    )


def _template_of(
    config: RunConfig, source: ModelSource, tokenizer: TextTokenizer, say: Say
) -> tuple[Template, str]:
    """The template and why it is this one. Refuses a tokenizer that cannot end an answer."""
    template, reason = choose_template(
        requested=config.template,
        saved=source.template,
        tokenizer=tokenizer,
        family_default=source.family.template,
    )
    if tokenizer.eos_id is None:
        raise ModelError(
            tr(
                "the tokenizer has no end token: the model could never stop",
                "分词器没有结束符：模型将永远停不下来",
            ),
            where=str(source.path),
            remedy=tr(
                'name one in tokenizer_config.json: {"eos_token": "</s>"}',
                '在 tokenizer_config.json 中指定：{"eos_token": "</s>"}',
            ),
        )
    for finding in check_template(template, tokenizer):
        say(finding.message)
    return template, reason


@dataclass(frozen=True)
class _RunRows:
    """Rows of a run. alone: those that are trained, one by one; train: the same, with shared prefixes laid together."""

    alone: Rows
    train: Rows
    held_out: Rows | None
    watched: Rows | None
    mix: Mix | None
    report: StoreReport


def _read_rows(config: RunConfig, tokenizer: TextTokenizer, template: Template, say: Say) -> _RunRows:
    """Compile every file the config names, and hold some rows out where it asks for that."""

    def all_of(files: Sequence[str], names: Sequence[str]) -> tuple[Rows, StoreReport]:
        store, report = compile_rows(config, files, names, tokenizer, template, say)
        return Rows(store, np.arange(len(store))), report

    alone: Rows
    held_out: Rows | None
    if config.streaming_start:
        alone, report = begin_rows(config, tokenizer, template, say)
    else:
        alone, report = all_of(config.data, config.dataset)
    if config.eval_data or config.eval_dataset:
        held_out, _ = all_of(config.eval_data, config.eval_dataset)
    elif config.streaming_start:
        held_out = None
    else:
        alone, held_out = hold_out(alone.store, config.val_rows(len(alone)), config.seed)
    watched = all_of(config.watch_data, ())[0] if config.watch_data else None
    mix = mix_of(config, alone)
    train = alone
    if config.share_prefixes:
        train = alone.sharing_prefixes()
        say(sharing_note(alone, train))
    return _RunRows(alone, train, held_out, watched, mix, report)


def _lineage(config: RunConfig, source: ModelSource, store: TokenStore) -> tuple[Part, ...]:
    """What goes into the weights: the model, what an adapter was trained on before, and the files of rows.

    Files of held-out rows are left out: nothing is learned from them.
    """
    data = [part for path in store.paths for part in of_data(path)]
    return as_said(union(of_model(source), data), config.licences or {})


def _pick_dtype(config: RunConfig, device: str, say: Say) -> str:
    """The precision of the run. fp16 in a config written for a GPU gives way on a CPU, and that is said."""
    if config.dtype != "fp16" or device != "cpu":
        return environment.pick_dtype(config.dtype, device)
    if config.device == "cpu":
        raise ConfigError(
            tr(
                "fp16 is not trained on a CPU: it is slow and overflows there",
                "CPU 上不用 fp16 训练：又慢又容易溢出",
            ),
            where="dtype=fp16",
            remedy="dtype=auto",
        )
    dtype = environment.pick_dtype("auto", device)
    say(
        tr(
            f"fp16 is for a GPU and there is none here: training in {dtype}",
            f"fp16 用于显卡，这里没有显卡：改用 {dtype} 训练",
        )
    )
    return dtype


def _find_source(config: RunConfig) -> ModelSource:
    """The model to start from, with an adapter on it where one is named."""
    named = str(config.model_name_or_path)
    if config.adapter_name_or_path:
        alpha = float(config.lora_alpha) if "lora_alpha" in config.model_fields_set else None
        source = find_model(
            config.adapter_name_or_path, base=named, revision=config.model_revision, lora_alpha=alpha
        )
    else:
        source = find_model(named, revision=config.model_revision)
    if source.is_adapter and config.finetuning_type != "lora":
        raise ConfigError(
            tr("an adapter is trained with finetuning_type=lora", "适配器只能用 finetuning_type=lora 训练"),
            where=f"finetuning_type={config.finetuning_type}",
            remedy=tr(
                f"or start from its base: --model {source.weights_path}",
                f"或从它的基座开始：--model {source.weights_path}",
            ),
        )
    return source


def _as_its_adapter(config: RunConfig, source: ModelSource, say: Say) -> RunConfig:
    """Where the config does not say: the base quantised as it was when the adapter it starts from was trained."""
    saved = source.quantization
    if not saved or config.quantization_bit is not None:
        return config
    say(
        tr(
            f"the adapter was trained on a base in {saved}: so is this run (quantization_bit=0: unquantised)",
            f"该适配器是在 {saved} 基座上训练的，这次也一样（quantization_bit=0 则不量化）",
        )
    )
    return config.model_copy(update=saved.to_record())


def _fitting(
    config: RunConfig,
    memory: MemoryEstimate,
    shape: Any,
    lengths: np.ndarray,
    size: ModelSize,
    source: ModelSource,
    dtype: str,
    device: str,
) -> list[str]:
    """What would fit, where the run may not."""
    free = environment.memory_available_bytes(device)
    if memory.total <= WARN_ABOVE * free:
        return []
    lora = model_size(shape, source, config.model_copy(update={"finetuning_type": "lora"}))
    return what_fits(
        config,
        int(WARN_ABOVE * free),
        model_config=shape.config,
        lengths=lengths,
        size=size,
        lora_size=lora,
        dtype=dtype,
    )


def model_size(model: Any, source: ModelSource, config: RunConfig) -> ModelSize:
    """Parameters, and those that will be trained, from the shapes alone. model: on the meta device."""
    if not source.is_adapter:
        return shape_size(model, config)
    return shape_size(model, config, read_adapter(source.path, lora_alpha=source.lora_alpha).parameters)


def shape_size(model: Any, config: RunConfig, adapter: int | None = None) -> ModelSize:
    """The same for a model without an adapter, or with one of `adapter` parameters."""
    shape = shape_of(model)
    lora = config.finetuning_type == "lora"
    trainable = shape.parameters if adapter is None else adapter
    if lora and adapter is None:
        targets = lora_target_names(model, config.lora_target)
        trainable = lora_parameters(model, targets, config.lora_rank)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    vocabulary = {
        id(module.weight): module.weight for module in (embedding, head) if hasattr(module, "weight")
    }
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2) - sum(
        p.numel() for p in vocabulary.values()
    )
    return ModelSize(
        parameters=shape.parameters + (trainable if lora else 0),
        trainable=trainable,
        layers=shape.layers,
        hidden=shape.hidden,
        vocab=0 if weight is None else weight.shape[0],
        head=0 if weight is None else weight.numel(),
        matrices=trainable if lora else matrices,
        linear=linear_weights(model),
        tied=weight is not None and weight is embedding.weight,
    )
