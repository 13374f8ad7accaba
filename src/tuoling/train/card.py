"""README.md of a run: the model card, in Chinese and English."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tuoling.models.licence_answer import card_section, of_models, one_licence
from tuoling.train.memory import quantization_of

if TYPE_CHECKING:
    from tuoling.train.plan import Plan
    from tuoling.train.prepare import Setup


def model_card(setup: Setup, results: dict[str, Any]) -> str:
    """A card with the hub's front matter: what was trained on what, how, the result, and how to use it."""
    config, plan = setup.config, setup.plan
    lineage = plan.lineage
    eval_loss = results.get("eval_loss")
    so_far = "" if plan.rows_known else " 起（边训练边编译）and more"
    epochs = f" ({results['epochs']:g} epochs)" if results["epochs"] is not None else ""
    facts = [
        ("基座 base", f"`{config.model_name_or_path}` ({setup.source.family.name})"),
        ("基座许可 licence of the base", of_models(lineage) or "未知 unknown"),
        ("数据 data", ", ".join(f"`{name}`" for name in (*config.data, *(config.dataset or ())))),
        ("条数 rows", f"{plan.rows:,}{so_far} + {plan.eval_rows:,} held out"),
        ("token", f"{plan.tokens:,}{so_far} (learned {plan.learned_tokens:,})"),
        ("模板 template", f"`{setup.template.id}`"),
        ("方法 method", _method(config)),
        (
            "学习率 learning rate",
            f"{config.learning_rate:g} ({config.lr_scheduler_type}, warm-up {plan.warmup_steps})",
        ),
        ("每步 each step", _step(plan)),
        ("步数 steps", f"{results['steps']:,}{epochs}"),
        ("精度 precision", _precision(setup)),
        ("训练损失 training loss", f"{results['train_loss_first']:.4f} → {results['train_loss_last']:.4f}"),
        ("验证损失 held-out loss", f"{eval_loss:.4f}" if eval_loss is not None else "–"),
        ("随机种子 seed", f"{config.seed}"),
        ("用时 time", f"{results['seconds']:,.0f} s, {results['tokens_per_s'] or 0:,.0f} token/s"),
        ("内存峰值 peak memory", _peak(results)),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in facts)
    return f"""{_front_matter(setup, one_licence(lineage))}
# {setup.source.path.name} · Tuoling

用 Tuoling 微调得到。Fine-tuned with Tuoling.

| | |
|---|---|
{table}

## 使用 Use

```
tuoling chat RUN
tuoling predict RUN --data test.json --out predictions.json
```

把 RUN 换成本目录；基座、模板、停止符都从这里读取。
RUN is this folder; base, template and stop sequences are read from it.

## 用途 Intended use

按训练数据那样的提问方式作答；其他用途请先用自己的题目评测（`tuoling evaluate RUN rows.json`，`tuoling report RUN`）。
Answers questions of the kind it was trained on; for anything else evaluate it first on rows of your own
(`tuoling evaluate RUN rows.json`, `tuoling report RUN`).

## 局限 Limits

模型会编造内容，也会重复训练数据里的错误；请勿不加核实地用于医疗、法律、财务等决定。
The model makes things up and repeats the mistakes of its rows; do not use it unchecked for medical, legal or
financial decisions.

{card_section(lineage)}
完整的配置、数据摘要与版本见 `run.json`。The whole configuration, hashes and versions are in `run.json`.
"""


def _step(plan: Plan) -> str:
    tokens = f"约 about {plan.tokens_per_step:,.0f} token"
    return tokens if plan.rows_per_step is None else f"{plan.rows_per_step} 条 rows, {tokens}"


def _method(config: Any) -> str:
    if config.finetuning_type == "full":
        return f"full, {config.stage}"
    return (
        f"LoRA r={config.lora_rank} alpha={config.lora_alpha} dropout={config.lora_dropout:g}, {config.stage}"
    )


def _peak(results: dict[str, Any]) -> str:
    cuda = results.get("peak_cuda_gib")
    return f"{cuda:.2f} GiB (cuda)" if cuda else f"{results.get('peak_rss_gib') or 0:.2f} GiB"


def _precision(setup: Setup) -> str:
    quantization = quantization_of(setup.config)
    return f"{setup.dtype}, 量化基座 quantised base {quantization}" if quantization else setup.dtype


def _front_matter(setup: Setup, licence: str | None) -> str:
    lines = ["---", "language:", "- zh", "pipeline_tag: text-generation", "tags:", "- tuoling"]
    if setup.config.finetuning_type == "lora":
        lines += ["library_name: peft", f"base_model: {setup.config.model_name_or_path}"]
        lines += ["base_model_relation: adapter"]
    else:
        lines += ["library_name: transformers", f"base_model: {setup.config.model_name_or_path}"]
        lines += ["base_model_relation: finetune"]
    lines += [f"license: {licence}"] if licence else []
    return "\n".join([*lines, "---"])
