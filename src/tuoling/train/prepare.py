"""From a config to everything a run needs, checked before the first weight is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tuoling import console, environment, files
from tuoling.data.sources import resolve_sources
from tuoling.data.store import StoreReport, StoreSettings, TokenStore, compile_store
from tuoling.errors import ConfigError, DataError, ModelError
from tuoling.language import tr
from tuoling.models.adapters import lora_target_names
from tuoling.models.load import load_tokenizer
from tuoling.models.shape import lora_parameters, meta_model, shape_of
from tuoling.models.source import find_model
from tuoling.text.checks import check_template
from tuoling.text.templates import Template, choose_template
from tuoling.train.parallel import require_trackers
from tuoling.train.plan import ModelSize, Plan, make_plan

if TYPE_CHECKING:
    from tuoling.config import RunConfig
    from tuoling.models.source import ModelSource
    from tuoling.text.tokenizer import TextTokenizer

Say = Callable[[str], None]


@dataclass(frozen=True)
class Rows:
    """Some rows of a token store, in the store's order."""

    store: TokenStore
    index: np.ndarray  # int64 [rows]

    def __len__(self) -> int:
        return len(self.index)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, [rows]."""
        return np.asarray(self.store.lengths)[self.index]

    @property
    def learned(self) -> np.ndarray:
        """Learned tokens of each row, [rows]."""
        return np.asarray(self.store.learned)[self.index]


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
    notes: list[str] = field(default_factory=list)


def prepare(config: RunConfig, *, say: Say, notes: Sequence[str] = ()) -> Setup:
    """Resolve model, template, rows, precision and plan.

    Raises a TuolingError for whatever would stop the run later: missing or bad rows, an unknown template,
    a tokenizer without an end token, a held-out part larger than the data.
    """
    kept = list(notes)

    def tell(message: str) -> None:
        kept.append(message)
        say(message)

    config.require("model_name_or_path", "data")
    device = environment.pick_device(config.device)
    dtype = environment.pick_dtype(config.dtype, device)
    if dtype == "fp16" and device == "cpu":
        raise ConfigError(
            tr(
                "fp16 is not trained on a CPU: it is slow and overflows there",
                "CPU 上不用 fp16 训练：又慢又容易溢出",
            ),
            where="dtype=fp16",
            remedy="dtype=auto",
        )
    require_trackers(config.report_to)
    source = _find_source(config)
    if source.is_adapter:
        tell(
            tr(
                f"training goes on from the adapter {source.path}: rank, alpha, dropout and targets are its own",
                f"从适配器 {source.path} 开始训练：rank、alpha、dropout 和目标层以它为准",
            )
        )
    tokenizer = load_tokenizer(source)
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
        tell(finding.message)
    store, report = _compile(config, config.data, config.dataset, tokenizer, template, tell)
    held_out: Rows | None
    if config.eval_data or config.eval_dataset:
        eval_store, _ = _compile(config, config.eval_data, config.eval_dataset, tokenizer, template, tell)
        train, held_out = Rows(store, np.arange(len(store))), Rows(eval_store, np.arange(len(eval_store)))
    else:
        train, held_out = hold_out(store, config.val_rows(len(store)), config.seed)
    size = model_size(source, config)
    plan = make_plan(
        config,
        lengths=train.lengths,
        learned=train.learned,
        eval_rows=len(held_out) if held_out else 0,
        size=size,
        dtype=dtype,
        device=device,
    )
    return Setup(
        config=config,
        source=source,
        tokenizer=tokenizer,
        template=template,
        template_reason=reason,
        train=train,
        held_out=held_out,
        report=report,
        plan=plan,
        device=device,
        dtype=dtype,
        notes=kept,
    )


def _find_source(config: RunConfig) -> ModelSource:
    """The model to start from, with an adapter on it where one is named."""
    named = str(config.model_name_or_path)
    if config.adapter_name_or_path:
        source = find_model(config.adapter_name_or_path, base=named, revision=config.model_revision)
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


def model_size(source: ModelSource, config: RunConfig) -> ModelSize:
    """Parameters, and those that will be trained, from the shapes alone."""
    model = meta_model(source.weights_path, allow_remote_code=config.allow_remote_code)
    shape = shape_of(model)
    trainable = shape.parameters
    if source.is_adapter:
        adapter = files.read_json(source.path / "adapter_config.json")
        trainable = lora_parameters(model, adapter["target_modules"], adapter["r"])
    elif config.finetuning_type == "lora":
        targets = lora_target_names(model, config.lora_target)
        trainable = lora_parameters(model, targets, config.lora_rank)
    added = trainable if config.finetuning_type == "lora" else 0
    return ModelSize(shape.parameters + added, trainable, shape.layers, shape.hidden)


def _compile(
    config: RunConfig,
    data: Sequence[str],
    names: Sequence[str],
    tokenizer: TextTokenizer,
    template: Template,
    say: Say,
) -> tuple[TokenStore, StoreReport]:
    sources = resolve_sources(
        data,
        dataset_dir=config.dataset_dir,
        dataset_names=names,
        format=config.data_format,
        columns=config.columns,
        seed=config.seed,
    )
    settings = StoreSettings(
        stage=config.stage,
        max_seq_len=config.max_seq_len,
        overlong=config.overlong,
        learn=config.learn,
        train_on_inputs=config.train_on_inputs,
        learn_cut_answers=config.learn_cut_answers,
        allow_bad=config.allow_bad,
        max_samples=config.max_samples,
    )
    cache = environment.cache_dir() / "tokens"
    files.require_writable(cache)
    with console.progress() as bar:
        task = bar.add_task(tr("reading rows", "读取数据"), total=None, detail="")
        store, report = compile_store(
            sources,
            tokenizer=tokenizer,
            template=template,
            settings=settings,
            cache_dir=cache,
            progress=lambda rows: bar.update(task, completed=rows),
        )
    for line in _store_notes(report):
        say(line)
    if len(store) == 0:
        raise DataError(
            tr("no row can be trained on", "没有一条数据可以训练"), where=", ".join([*data, *names])
        )
    return store, report


def _store_notes(report: StoreReport) -> list[str]:
    """What became of the rows: formats, what was dropped or cut, whether the store was there already."""
    formats = ", ".join(f"{name} {count:,}" for name, count in report.formats.items())
    lines = [tr(f"rows: {report.rows:,} ({formats})", f"数据：{report.rows:,} 条（{formats}）")]
    if report.bad:
        lines.append(
            tr(
                f"{report.bad:,} bad rows left out: {report.ledger}",
                f"去掉 {report.bad:,} 条坏数据：{report.ledger}",
            )
        )
    if report.dropped_overlong:
        lines.append(
            tr(
                f"{report.dropped_overlong:,} over-long rows dropped",
                f"去掉 {report.dropped_overlong:,} 条超长数据",
            )
        )
    if report.cut:
        lines.append(tr(f"{report.cut:,} prompts cut to fit", f"{report.cut:,} 条的提示被截短"))
    if report.split:
        lines.append(tr(f"{report.split:,} over-long rows split", f"{report.split:,} 条超长数据被切分"))
    if report.flagged:
        lines.append(
            tr(
                f"{report.flagged:,} rows are flagged (unfilled placeholders and the like): tuoling data check shows them",
                f"{report.flagged:,} 条有可疑之处（如未填的占位符）：用 tuoling data check 查看",
            )
        )
    if report.left_out:
        lines.append(
            tr(
                f"{report.left_out:,} examples left out: their answer does not fit",
                f"去掉 {report.left_out:,} 个样本：回答放不下",
            )
        )
    if report.reused:
        lines.append(tr("tokens: the store made earlier is used again", "token：沿用以前编译好的结果"))
    return lines


def hold_out(store: TokenStore, count: int, seed: int) -> tuple[Rows, Rows | None]:
    """Keep about `count` seeded rows for validation, never more; rows with equal tokens stay on one side."""
    rows = len(store)
    if count == 0:
        return Rows(store, np.arange(rows)), None
    groups: dict[bytes, list[int]] = {}
    for row in range(rows):
        groups.setdefault(store[row].input_ids.tobytes(), []).append(row)
    members = list(groups.values())
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(members))
    chosen: list[int] = []
    for group in order:
        if len(chosen) >= count:
            break
        if len(chosen) + len(members[group]) <= count:
            chosen.extend(members[group])
    out = np.zeros(rows, dtype=bool)
    out[chosen] = True
    return Rows(store, np.flatnonzero(~out)), Rows(store, np.flatnonzero(out)) if chosen else None


def manifest(setup: Setup, versions: dict[str, str], machine: dict[str, Any]) -> dict[str, Any]:
    """What `run.json` says: everything that decides the result, and nothing secret."""
    config_file = setup.source.weights_path / "config.json"
    return {
        "config": setup.config.model_dump(mode="json"),
        "stage": setup.config.stage,
        "base": {
            "path": str(setup.source.weights_path),
            "adapter": str(setup.source.path) if setup.source.is_adapter else None,
            "named": setup.config.model_name_or_path,
            "config_sha256": files.sha256_file(config_file) if config_file.is_file() else None,
            "family": setup.source.family.name,
            "licence": setup.source.family.licence,
        },
        "template": {
            "id": setup.template.id,
            "why": setup.template_reason,
            "stops": list(setup.template.stops),
        },
        "data": {"key": setup.train.store.key, **setup.report.facts()},
        "held_out": None
        if setup.held_out is None
        else {"key": setup.held_out.store.key, "rows": len(setup.held_out)},
        "plan": setup.plan.to_json(),
        "device": setup.device,
        "dtype": setup.dtype,
        "seed": setup.config.seed,
        "versions": versions,
        "machine": machine,
        "notes": setup.notes,
    }
