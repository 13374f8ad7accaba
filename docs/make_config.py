"""Writes docs/config.md (Chinese) and docs/config.en.md (English): every key of a run, from the config itself.

The guides' table of recipes, between two comments, is written here too, from the packaged YAML.

Types, ranges and defaults are read from RunConfig, other names from foreign_keys; only the meanings stand here.
Run `python docs/make_config.py` after changing a key; a test fails while a meaning is missing or a page is stale.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

from tuoling import foreign_keys
from tuoling.config import load_config, recipe_names, recipe_path
from tuoling.config_keys import LEARNING_RATES, RunConfig
from tuoling.language import tr

PAGES = {"zh": "config.md", "en": "config.en.md"}
GUIDES = {"zh": "guide.zh.md", "en": "guide.en.md"}
RECIPES_START, RECIPES_END = "<!-- recipes -->", "<!-- /recipes -->"

Meanings = dict[str, tuple[str, str]]

SECTIONS: list[tuple[tuple[str, str], Meanings]] = [
    (
        ("Model", "模型"),
        {
            "model_name_or_path": (
                "The base model: a folder or a hub id. On the command line also `--model`.",
                "基座模型：目录或模型库编号。命令行上也可写 `--model`。",
            ),
            "adapter_name_or_path": (
                "Read so that configs of other tools load; a run starts from a whole model, and an adapter here is refused.",
                "为读取其他工具的配置而保留；训练从完整模型开始，这里写了适配器会被拒绝。",
            ),
            "model_revision": ("Branch, tag or commit on the hub.", "模型库上的分支、标签或提交。"),
            "template": (
                "Id of the prompt template; unset: what the model says (see the guide).",
                "提示模板的名字；不写则由模型决定（见使用指南）。",
            ),
            "allow_remote_code": (
                "Kept in run.json. Training uses transformers' own classes only; Python code of a model folder runs "
                "in `tuoling chat` and `predict` with `--allow-remote-code`.",
                "只记入 run.json。训练只用 transformers 自己的模型类；模型目录自带的 Python 代码只能在 "
                "`tuoling chat` 和 `predict` 中用 `--allow-remote-code` 运行。",
            ),
            "quantization_bit": (
                "Keep the base's linear layers in 8 bits (LLM.int8) or 4, with LoRA on top; 0: not quantised. Unset: as "
                "the adapter was trained that the run starts from, else not. Needs bitsandbytes (extra `quant`).",
                "基座的线性层以 8 位（LLM.int8）或 4 位保存，在上面训练 LoRA；0 为不量化。不写：从适配器开始时与它训练时相同，"
                "否则不量化。需要 bitsandbytes（附加包 `quant`）。",
            ),
            "quantization_type": ("The numbers of 4 bits.", "4 位所用的数值类型。"),
            "double_quantization": (
                "4 bits: quantise their scales too (0.52 bytes a weight instead of 0.56).",
                "4 位时把缩放系数也量化（每个权重 0.52 字节，否则 0.56）。",
            ),
        },
    ),
    (
        ("What is trained", "训练什么"),
        {
            "stage": (
                "sft: rows with questions and answers. pt: plain text, all of it learned.",
                "sft：问答数据。pt：纯文本，全部都学（继续预训练）。",
            ),
            "finetuning_type": (
                "lora: an adapter on the frozen base. full: every weight.",
                "lora：冻结基座，训练适配器。full：训练全部权重。",
            ),
            "recipe": (
                "A packaged recipe, or a YAML file, under everything else. On the command line also `--recipe`.",
                "内置配方名或一个 YAML 文件，作为最底层的默认值。命令行上也可写 `--recipe`。",
            ),
        },
    ),
    (
        ("Rows", "数据"),
        {
            "data": (
                "Files, folders, `path#500`, hub ids. On the command line also `--data`, which may be repeated.",
                "文件、目录、`path#500`、hub 数据集。命令行上也可写 `--data`，可重复。",
            ),
            "dataset_dir": (
                "Folder that holds dataset_info.json.",
                "dataset_info.json 所在的目录。",
            ),
            "dataset": ("Names in that dataset_info.json.", "dataset_info.json 里登记的名字。"),
            "eval_data": ("Rows to validate on.", "验证数据。"),
            "eval_dataset": (
                "The same, by names of dataset_info.json.",
                "同上，按 dataset_info.json 里的名字。",
            ),
            "val_size": (
                "Hold rows out of the training data: below 1 (or `5%`) a share, from 1 on a number of rows.",
                "从训练数据中留出验证集：小于 1（或写 `5%`）是比例，大于等于 1 是条数。",
            ),
            "val_max_share": (
                "Never hold out more than this share, whatever `val_size` says.",
                "无论 `val_size` 是多少，留出的都不超过这个比例。",
            ),
            "mix": (
                "Files, folders or datasets and their weights: `{domain.json: 0.7, general.json: 0.3}`, on the command "
                "line `mix=domain.json=70%,general.json=30%`. By these shares of rows they are seen, whatever their "
                "sizes; an epoch ends where the first one would repeat a row. Stands for `data` too.",
                "数据文件、目录或数据集及其权重：`{domain.json: 0.7, general.json: 0.3}`，命令行写 "
                "`mix=domain.json=70%,general.json=30%`。不论各自大小，都按此行数比例出现；任一来源用完一遍即为一轮。"
                "写了它就不必再写 `data`。",
            ),
            "watch_data": (
                "Rows that are not trained: their loss is measured before the first step and after the last "
                "(all_results.json: watch_loss_before, watch_loss_after). What the model could do and may forget.",
                "不参与训练的数据：训练前后各测一次损失（all_results.json 中的 watch_loss_before、watch_loss_after），"
                "用来看模型原有的能力忘了多少。",
            ),
            "data_format": (
                "Read every row as this format instead of by content.",
                "按此格式读取所有数据，而不按内容判断。",
            ),
            "columns": (
                "Our field → the file's column, in YAML `{instruction: ask, output: answer}`.",
                "我们的字段 → 文件中的列名，YAML 写法 `{instruction: ask, output: answer}`。",
            ),
            "licences": (
                "Your word on what goes in: name or path (or `model`, `adapter`, `data`) → licence; `own` for your own "
                "rows. YAML `{rows.json: own}`. See `tuoling licence`.",
                "由你声明的许可：名字或路径（或 `model`、`adapter`、`data`）→ 许可；自己的数据写 `own`。"
                "YAML 写法 `{rows.json: own}`。见 `tuoling licence`。",
            ),
            "max_samples": (
                "At most the first so many rows of each file or dataset.",
                "每个文件或数据集最多取前多少条。",
            ),
            "data_shares": (
                "Shares of the rows that `tuoling study` trains on, one run each: `[0.25, 0.5, 1.0]`.",
                "`tuoling study` 各训练一次所用的数据比例：`[0.25, 0.5, 1.0]`。",
            ),
            "data_workers": (
                "Processes that compile rows into tokens; by default one a core where there is enough to do. "
                "The tokens do not depend on it.",
                "编译数据（转成 token）的进程数；默认在数据够多时每核一个。结果与进程数无关。",
            ),
            "max_seq_len": ("Longest example in tokens.", "每条样本最多多少个 token。"),
            "overlong": (
                "What becomes of longer rows: stop and say how many; leave them out; cut the prompt from the left; "
                "split dialogues between turns. In stage pt long text is always split, unless drop is said.",
                "更长的数据怎么办：报错并说明数量；丢弃；从左边截短提示；把对话按轮切开。"
                "pt 阶段的长文本总是切成多段，除非写 drop。",
            ),
            "learn": (
                "Of a conversation: every reply, or only the last one.",
                "多轮对话学习每一个回答，还是只学最后一个。",
            ),
            "learn_cut_answers": (
                "Learn the kept part of an answer that had to be cut (it never gets an end token).",
                "被截断的回答，保留的那部分是否学习（它不会带结束符）。",
            ),
            "train_on_inputs": ("Learn the prompt as well.", "提示部分也一起学习。"),
            "streaming_start": (
                "Begin to train as soon as the first rows are compiled, while a process beside compiles the rest; wants "
                "`max_steps`. The first epoch goes through the rows in pieces of some 4 MB as they stand in the files, "
                "each piece shuffled; later epochs are shuffled as a whole. Bad rows are judged by what has been read.",
                "第一批数据编译好就开始训练，其余由旁边的进程继续编译；需要 `max_steps`。第一轮按文件顺序逐段（每段约 4 MB）进行，"
                "段内打乱；之后各轮整体打乱。坏数据按已读到的部分判断。",
            ),
            "share_prefixes": (
                "Compute rows that begin another row (a dialogue so far, then the same with one more turn) inside it. "
                "Loss and gradient of each row stay the same; a step holds more of the data, an epoch has fewer steps.",
                "某条数据是另一条的开头时（对话的前几轮与多一轮的同一段对话），放在那一条里一起计算。"
                "每条数据的损失和梯度不变；但一步会包含更多数据，一轮的步数变少。",
            ),
            "share_head": (
                "Compute what all rows of a batch begin with (a template's fixed words) once in it, on a CPU. Loss and "
                "gradient are the same; with dropout the head has one draw for all rows.",
                "一批数据共同的开头（模板的固定文字）只算一次，限 CPU。损失和梯度不变；有 dropout 时，开头部分各条共用一次随机。",
            ),
            "allow_bad": (
                "Share of rows that may be bad (`1%`, 0.01) before the run is refused; bad rows are left out.",
                "可容忍的坏数据比例（`1%` 或 0.01），超过则不开始训练；坏数据不参与训练。",
            ),
        },
    ),
    (
        ("Adapter", "适配器"),
        {
            "lora_rank": ("Rank of the LoRA matrices.", "LoRA 矩阵的秩。"),
            "lora_alpha": (
                "The adapter is scaled by lora_alpha ÷ lora_rank.",
                "适配器的缩放是 lora_alpha ÷ lora_rank。",
            ),
            "lora_dropout": ("Dropout before the adapter.", "适配器之前的 dropout。"),
            "lora_target": (
                "Linear layers that get an adapter, by the end of their names; `all`: each one inside the blocks.",
                "哪些线性层加适配器，按名字结尾匹配；`all` 表示各层内的全部线性层。",
            ),
        },
    ),
    (
        ("Steps", "步数与优化"),
        {
            "per_device_train_batch_size": (
                "Rows that share one forward and backward pass; memory grows with it. With `max_tokens_per_batch` "
                "tokens decide what shares a pass, and this only how many rows a step has.",
                "一次前向和反向一起计算的条数；显存（内存）随它增长。写了 `max_tokens_per_batch` 时，一次算哪些由 token 数决定，"
                "这个键只决定每步多少条。",
            ),
            "per_device_eval_batch_size": (
                "The same for validation, within `max_tokens_per_batch` if that is given.",
                "验证时一次计算的条数；写了 `max_tokens_per_batch` 时也不超过它。",
            ),
            "gradient_accumulation_steps": (
                "Passes that are added up before the weights change.",
                "累积多少次再更新权重。",
            ),
            "batch_size": (
                "Rows of one step in all; the two keys above follow from it. It is met exactly or refused.",
                "每步总共多少条；上面两个键由它推出。要么精确满足，要么报错。",
            ),
            "max_tokens_per_batch": (
                "Most tokens of one pass, so that memory is bounded by tokens. The rows of a step stay those of the "
                "batch sizes, in as few passes as hold them. Without `batch_size` and "
                "`per_device_train_batch_size` a step is `gradient_accumulation_steps` full packs of so many "
                "tokens. A row that is longer runs alone; none is dropped.",
                "一次前向和反向最多多少个 token，内存（显存）由它限定。每步的数据仍由批大小决定，装进尽量少的几次计算。"
                "`batch_size` 和 `per_device_train_batch_size` 都不写时，每步是 `gradient_accumulation_steps` 个装满的包，"
                "每包至多这么多 token。更长的一条单独计算，不会丢弃。",
            ),
            "num_train_epochs": (
                "How often each row is seen; fractions are kept exactly, or to a whole pack where steps are packs.",
                "每条数据看几遍；可以是小数，按条数精确执行（每步按包计时，精确到整包）。",
            ),
            "max_steps": ("Above 0 it decides instead of the epochs.", "大于 0 时代替轮数。"),
            "learning_rate": (
                "Highest learning rate.",
                "最高学习率。",
            ),
            "lr_scheduler_type": (
                "How the rate falls after the warm-up.",
                "预热之后学习率如何下降。",
            ),
            "warmup_steps": (
                "Steps over which the rate rises; decides over `warmup_ratio`.",
                "预热步数；写了就不看 `warmup_ratio`。",
            ),
            "warmup_ratio": ("The same as a share of all steps.", "预热占总步数的比例。"),
            "optim": (
                "adamw; adamw_8bit: its states in 8 bits (bitsandbytes, extra `quant`); muon for whole models: Muon's steps for the weight matrices inside the blocks, AdamW's for "
                "everything else, at one learning rate.",
                "adamw；adamw_8bit：优化器状态只占 8 位（需要 bitsandbytes，附加包 `quant`）；全参数训练也可用 muon：各层内部的权重矩阵用 Muon 更新，其余用 AdamW，两者共用一个学习率。",
            ),
            "weight_decay": (
                "AdamW's decay; biases and norms are left out.",
                "AdamW 的权重衰减；不作用于偏置和归一化参数。",
            ),
            "adam_beta1": ("AdamW.", "AdamW 参数。"),
            "adam_beta2": ("AdamW.", "AdamW 参数。"),
            "adam_epsilon": ("AdamW.", "AdamW 参数。"),
            "label_smoothing_factor": (
                "Share of a label's weight that is spread over all words while training; validation is without it.",
                "训练时把标签权重的这个比例平摊到全部词上；验证不加。",
            ),
            "z_loss": (
                "While training, this times the squared log-sum-exp of the logits is added to a token's loss (PaLM: 1e-4).",
                "训练时每个 token 的损失加上它乘以 logits 的 log-sum-exp 的平方（PaLM 用 1e-4）。",
            ),
            "max_grad_norm": (
                "Gradients are clipped to this norm; 0 switches it off.",
                "梯度裁剪到这个范数；0 表示不裁剪。",
            ),
            "seed": (
                "Order of the rows, start of the adapter, dropout, the held-out part, samples of `#500`.",
                "决定数据顺序、适配器初值、dropout、留出的验证集和 `#500` 抽样。",
            ),
        },
    ),
    (
        ("Validate, save, log", "验证、保存、日志"),
        {
            "eval_steps": (
                "Steps between validations. Unset: once an epoch. 0: only at the end.",
                "每多少步验证一次。不写：每轮一次；0：只在结束时。",
            ),
            "save_steps": (
                "Steps between checkpoints. 0: none on the way. The end is always saved.",
                "每多少步存一个检查点。0：中途不存。结束时总会保存。",
            ),
            "save_total_limit": (
                "Checkpoints that are kept; the newest and the best are never deleted.",
                "最多保留几个检查点；最新的和最好的不会删除。",
            ),
            "save_keep_every": (
                "Checkpoints whose step is a multiple of this are kept for good, beside the newest "
                "`save_total_limit` and the best.",
                "步数是它的倍数的检查点永久保留（在最新的 `save_total_limit` 个和最好的之外）。",
            ),
            "disk_reserve_mib": (
                "MiB of the disk that stay free. Asked before the run and before every save: a save that would not "
                "leave so much stops the run, its last checkpoint whole, and says how much is missing.",
                "磁盘上始终留出的空间（MiB）。训练前和每次保存前都会检查：放不下时停止训练，上一个检查点完好，并说明还差多少。",
            ),
            "logging_steps": (
                "Steps between points of trainer_state.json; metrics.jsonl has every step.",
                "trainer_state.json 中每多少步一个点；metrics.jsonl 每步都有。",
            ),
            "early_stopping_patience": (
                "End the run after so many evaluations in a row without a new lowest validation loss.",
                "连续这么多次评估的验证损失都没有创新低时，结束训练。",
            ),
            "load_best_model_at_end": (
                "Keep the weights of the lowest validation loss instead of the last.",
                "最后保留验证损失最低的权重，而不是最后一步的。",
            ),
        },
    ),
    (
        ("Machine", "机器"),
        {
            "dtype": (
                "Precision of computation. auto: what the chip does well. fp16 is refused on a CPU.",
                "计算精度。auto：按芯片选择。CPU 上不允许 fp16。",
            ),
            "device": (
                "Where to compute: auto, cpu, mps, cuda or cuda:N.",
                "在哪里计算：auto、cpu、mps、cuda 或 cuda:N。",
            ),
            "gradient_checkpointing": (
                "Compute activations twice to save memory.",
                "用重复计算换显存（内存）。",
            ),
            "deterministic": (
                "Only kernels whose sums have one order, so that two runs are equal bit for bit on a GPU too; some are "
                "slower, and an operation that has none is refused. One process on a CPU is so without it.",
                "只用求和顺序固定的算子，GPU 上两次训练也逐位相同；有些会变慢，没有这种算子的操作会报错。单进程 CPU 不需要它。",
            ),
            "parallel": (
                "How several processes (`--nproc 2`, torchrun, SLURM) share the run. `ddp`: each holds the whole model. "
                "`fsdp` (FSDP2) and `zero3`: weights, gradients and optimizer are cut into parts; `zero2`: gradients and "
                "optimizer are; `..._offload`: the optimizer (zero3: and the weights) wait in the machine's memory. The "
                "`zero` ones need DeepSpeed (extra `dist`). Unset: `ddp`.",
                "多个进程（`--nproc 2`、torchrun、SLURM）如何分担训练。`ddp`：每个进程都有完整模型；`fsdp`（FSDP2）和 "
                "`zero3`：权重、梯度和优化器都切分；`zero2`：切分梯度和优化器；`…_offload`：优化器（zero3 还有权重）放在内存里。"
                "`zero…` 需要 DeepSpeed（附加包 `dist`）。不写则为 `ddp`。",
            ),
            "deepspeed": (
                "A DeepSpeed config of your own (JSON), in place of `parallel`; `auto` values are filled in, batch sizes, "
                "precision, optimizer and schedule stay those of this config.",
                "你自己的 DeepSpeed 配置（JSON），代替 `parallel`；`auto` 会自动填好，批大小、精度、优化器和学习率计划以本配置为准。",
            ),
            "timeout_s": (
                "Seconds a process waits for the others; then the run ends and says which one did not answer.",
                "一个进程最多等待其他进程多少秒；超过后训练结束，并说明是哪个进程没有响应。",
            ),
            "ignore_memory_plan": (
                "Begin even where the plan needs more than 1.5 times the free memory; otherwise that is refused.",
                "即使计划所需内存超过可用内存的 1.5 倍也照样开始；默认会拒绝。",
            ),
        },
    ),
    (
        ("Output", "输出"),
        {
            "output_dir": (
                "The run folder; must be new or empty. On the command line also `--out`. Unset: `runs/<model>-<time>`.",
                "运行目录，应为新目录或空目录。命令行上也可写 `--out`。不写：`runs/<模型>-<时间>`。",
            ),
            "overwrite_output_dir": (
                "Move an old folder aside (`NAME.old-1`); nothing is deleted.",
                "把旧目录改名为 `名字.old-1`；不会删除任何东西。",
            ),
            "plot_loss": ("Draw training_loss.png at the end.", "结束时画 training_loss.png。"),
            "report_to": (
                "Trackers: tensorboard, wandb, swanlab; none by default. Each needs its own package.",
                "实验跟踪：tensorboard、wandb、swanlab；默认不用。需要另装各自的包。",
            ),
            "run_name": (
                "Kept in run.json; nothing else uses it.",
                "只记入 run.json，没有其他作用。",
            ),
        },
    ),
    (
        ("Generation", "生成"),
        dict.fromkeys(
            (
                "max_new_tokens",
                "temperature",
                "top_p",
                "top_k",
                "num_beams",
                "do_sample",
                "repetition_penalty",
            ),
            (
                "Read so that configs of other tools load; kept in run.json. Training does not generate: "
                "give it to `tuoling chat` or `predict`.",
                "为读取其他工具的配置而保留，记入 run.json。训练不生成文本：请在 `tuoling chat` 或 `predict` 时给出。",
            ),
        ),
    ),
]

CONVERTED: dict[str, tuple[tuple[str, Any], ...]] = {
    "quantization_bit": (("load_in_8bit", True), ("load_in_4bit", True)),
    "dtype": (("bf16", True), ("fp16", True), ("pure_bf16", True)),
    "learn": (("mask_history", True),),
    "gradient_checkpointing": (("disable_gradient_checkpointing", True),),
    "eval_steps": (("eval_strategy", "epoch"), ("evaluation_strategy", "no")),
    "save_steps": (("save_strategy", "epoch"),),
    "report_to": (("use_swanlab", True),),
}
"""Our key → keys of other tools whose value is turned into ours (config_settle.py), each with a value it may have."""


def page() -> str:
    """All keys in the language of this process, as Markdown."""
    parts = [
        tr("# Config keys", "# 配置键"),
        tr(
            "Generated by `python docs/make_config.py`. [中文](config.md) · [Guide](guide.en.md)",
            "由 `python docs/make_config.py` 生成。[English](config.en.md) · [使用指南](guide.zh.md)",
        ),
        tr(
            "The same keys stand in YAML, on the command line as `key=value`, in Python as keyword arguments and in "
            "run.json. `key=null` takes a key of a file away. Lists may be written `a,b`. An unknown key is an error "
            "that names the nearest one.",
            "同样的键用在 YAML、命令行的 `键=值`、Python 的关键字参数和 run.json 里。`键=null` 去掉文件里的这个键；"
            "列表可以写成 `a,b`。不认识的键会报错，并给出最接近的名字。",
        ),
    ]
    properties = RunConfig.model_json_schema()["properties"]
    head = tr("| key | type | default | also read as | meaning |", "| 键 | 类型 | 默认 | 也可写作 | 含义 |")
    for title, meanings in SECTIONS:
        rows = [_row(key, properties[key], tr(*meanings[key])) for key in meanings]
        parts.append(f"## {tr(*title)}\n\n" + "\n".join([head, "|---|---|---|---|---|", *rows]))
    return "\n\n".join([*parts, *_of_other_tools()]) + "\n"


def _row(key: str, schema: dict[str, Any], meaning: str) -> str:
    others = [name for name, ours in foreign_keys.ALIASES.items() if ours == key]
    others += [name for name, _ in CONVERTED.get(key, ())]
    shown = ", ".join(f"`{name}`" for name in others)
    cells = (f"`{key}`", _type(key, schema), _default(key), shown, meaning)
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def _type(key: str, schema: dict[str, Any]) -> str:
    """A key's type in words, with its range."""
    (one,) = [option for option in schema.get("anyOf", [schema]) if option.get("type") != "null"]
    if "enum" in one:
        return " | ".join(map(str, one["enum"]))
    names = {
        "string": tr("text", "文本"),
        "boolean": "true | false",
        "integer": tr("whole number", "整数"),
        "number": tr("number", "数字"),
        "array": tr("list", "列表"),
        "object": tr("pairs", "键值对"),
    }
    field = RunConfig.model_fields[key]
    marks = [*field.metadata, *(mark for part in get_args(field.annotation) for mark in _marks(part))]
    bounds = [
        f"{sign} {getattr(mark, name):g}"
        for mark in marks
        for name, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))
        if hasattr(mark, name)
    ]
    return " ".join([names[one["type"]], ", ".join(bounds)]).strip()


def _marks(annotation: Any) -> list[Any]:
    """What `Annotated` says of one member of a union, pydantic's Field opened."""
    return [
        part for mark in getattr(annotation, "__metadata__", ()) for part in getattr(mark, "metadata", [mark])
    ]


def _default(key: str) -> str:
    if key == "learning_rate":
        return ", ".join(f"`{rate:g}` ({kind})" for kind, rate in LEARNING_RATES.items())
    if key == "gradient_accumulation_steps":
        return tr("`1`, or from `batch_size`", "`1`，或由 `batch_size` 推出")
    value = RunConfig.model_fields[key].default
    if value is None or value == ():
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{','.join(value)}`" if isinstance(value, tuple) else f"`{value}`"


def _of_other_tools() -> list[str]:
    """What is done with keys that are not ours and have no other name here."""
    answered = [
        (foreign_keys.AUTOMATIC, None),
        (foreign_keys.FAST_PATH, None),
        (foreign_keys.PACKING, None),
        (foreign_keys.LAUNCH, None),
        (foreign_keys.QUANTIZED_COMPUTE, None),
        (foreign_keys.LOGGING, None),
        (foreign_keys.OTHER_VERBS, foreign_keys.OTHER_VERB_PREFIXES),
    ]
    rows = []
    for names, prefixes in answered:
        listed = ", ".join(f"`{name}`" for name in sorted(names))
        listed += "".join(f", `{prefix}…`" for prefix in prefixes or ())
        rows.append(f"| {listed} | {foreign_keys.answers(min(names))} |")
    refused: dict[str, list[str]] = {}
    for name in sorted(foreign_keys.REFUSED):
        refused.setdefault(foreign_keys.refusal(name), []).append(f"`{name}`")
    return [
        tr("## Keys of other tools", "## 其他工具的键"),
        tr(
            "Read and answered, because leaving them alone cannot change what is learned:",
            "读到后只作说明，因为不理会它们也不会改变训练结果：",
        ),
        "\n".join([tr("| keys | what is said |", "| 键 | 说明 |"), "|---|---|", *rows]),
        tr(
            "Refused while their value asks for something, because leaving them out would change the result. "
            "`key=null` on the command line trains without them, and is recorded:",
            "只要它们的值有所要求就会报错，因为忽略会改变结果。在命令行加 `键=null` 则不使用它继续训练，并会记录下来：",
        ),
        "\n".join(
            [
                tr("| keys | why |", "| 键 | 原因 |"),
                "|---|---|",
                *(f"| {', '.join(names)} | {why} |" for why, names in refused.items()),
            ]
        ),
        tr(
            "`optim`, `optimizer`: any spelling of AdamW is read, others are refused. `mix_strategy`: `concat`, and "
            "`interleave_under` with its `interleave_probs` as `mix`. "
            "`quantization_method`, `quant_method`: only bnb. `llm_int8_threshold`: only 6.0. "
            "`trust_remote_code`: noted, not obeyed.",
            "`optim`、`optimizer`：AdamW 的各种写法都接受，其他报错。`mix_strategy`：接受 `concat`；"
            "`interleave_under` 连同 `interleave_probs` 按 `mix` 处理。"
            "`quantization_method`、`quant_method`：只接受 bnb。`llm_int8_threshold`：只接受 6.0。"
            "`trust_remote_code`：读到但不执行。",
        ),
    ]


def recipes() -> str:
    """The packaged recipes as a table: where each is from, and its main figures."""
    lines = [
        tr(
            "| recipe | from | kind | template | LoRA rank/alpha, targets | learning rate | rows a step | epochs | max_seq_len |",
            "| 配方 | 出处 | 方式 | 模板 | LoRA 秩/alpha、目标层 | 学习率 | 每步条数 | 轮数 | max_seq_len |",
        ),
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in recipe_names():
        config = load_config(overrides=[f"recipe={name}"]).config
        lora = f"{config.lora_rank}/{config.lora_alpha}, {' '.join(config.lora_target)}"
        rows = config.rows_per_step()
        cells = (
            f"`{name}`",
            _source(name),
            config.finetuning_type,
            f"`{config.template}`" if config.template else "",
            lora if config.finetuning_type == "lora" else "",
            f"{config.learning_rate:g} {config.lr_scheduler_type}",
            str(rows),
            f"{config.num_train_epochs:g}",
            str(config.max_seq_len),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _source(name: str) -> str:
    """The repository or model card that a recipe's comment names."""
    for line in recipe_path(name).read_text(encoding="utf-8").splitlines():
        if line.startswith("# From: "):
            words = line.removeprefix("# From: ").removeprefix("the ")
            return re.split(r"[,.] |[,.]$| chinese_bloom| train/", words)[0]
    return "Tuoling"


def with_recipes(guide: str, table: str) -> str:
    """The guide with its table of recipes replaced."""
    before, rest = guide.split(RECIPES_START)
    _, after = rest.split(RECIPES_END)
    return f"{before}{RECIPES_START}\n{table}\n{RECIPES_END}{after}"


def write() -> None:
    """Make each page in a process of its own: the language is read once."""
    folder = Path(__file__).parent
    for language, name in PAGES.items():
        (folder / name).write_text(_in(language, "page"), encoding="utf-8")
        guide = folder / GUIDES[language]
        guide.write_text(
            with_recipes(guide.read_text(encoding="utf-8"), _in(language, "recipes")), encoding="utf-8"
        )


def _in(language: str, function: str) -> str:
    code = f"import runpy; print(runpy.run_path({str(Path(__file__))!r})[{function!r}](), end='')"
    environ = {**os.environ, "TUOLING_LANG": language, "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, check=True, encoding="utf-8"
    ).stdout


if __name__ == "__main__":
    write()
