"""Configs of other tools, read as they are: LLaMA-Factory's YAML, and the JSON pair of domain-bloom and BELLE (April 2023).

How a file is told apart:

- Two JSON files, one holding only `lora_*` keys, or one JSON with `model_type`: the family of April 2023. It is
  BELLE's if `model_type` is llama, or a key `fp16` stands in it (domain-bloom's has none), or the LoRA targets lack
  BLOOM's `dense` layers, or its data path says Belle; else it is domain-bloom's. `template=` overrides the guess.
- A file that names `dataset`s, or holds a key only LLaMA-Factory has, and no rows or length in our words
  (`OURS_ONLY`), is LLaMA-Factory's.
- Everything else is ours; other names for our keys (`ALIASES`) are read in it too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tuoling.config_files import ConfigFile
from tuoling.config_settle import Issue, Settled, settle
from tuoling.language import tr

LORA_JSON_KEYS = {"lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"}
LLAMA_FACTORY_MARKS = frozenset(
    (
        "dataset",
        "do_train",
        "do_predict",
        "overwrite_cache",
        "preprocessing_num_workers",
        "ddp_timeout",
        "neat_packing",
    )
)
OURS_ONLY = frozenset(("data", "data_path", "eval_data", "max_seq_len", "recipe"))
LLAMA_FACTORY_DEFAULTS = {
    "finetuning_type": "lora",
    "max_seq_len": 2048,
    "lora_rank": 8,
    "lora_dropout": 0.0,
    "per_device_train_batch_size": 8,
    "learning_rate": 5e-5,
    "warmup_ratio": 0.0,
    "save_total_limit": None,
}
APRIL_2023_DEFAULTS = {"lr_scheduler_type": "linear", "warmup_ratio": 0.1, "overlong": "drop"}
DOMAIN_BLOOM_LORA = {
    "lora_rank": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "lora_target": ["dense", "dense_h_to_4h", "dense_4h_to_h", "query_key_value"],
}


# ---- recognising ----


def _is_lora_json(file: ConfigFile) -> bool:
    return bool(file.values) and set(file.values) <= LORA_JSON_KEYS


def _is_april_2023(file: ConfigFile) -> bool:
    return (
        "model_type" in file.values and {"num_epochs", "cutoff_len", "data_path"} & set(file.values) != set()
    )


def _is_llama_factory(values: Mapping[str, Any]) -> bool:
    return bool(LLAMA_FACTORY_MARKS & set(values)) and not OURS_ONLY & set(values)


def group_files(files: Sequence[ConfigFile]) -> list[list[ConfigFile]]:
    """Files that only mean something together stand together; the order of the rest is kept."""
    models = [file for file in files if _is_april_2023(file)]
    adapters = [file for file in files if _is_lora_json(file)]
    if len(models) == 1 and len(adapters) == 1:
        rest = [[file] for file in files if file not in (models[0], adapters[0])]
        return [[models[0], adapters[0]], *rest]
    return [[file] for file in files]


def translate(files: Sequence[ConfigFile]) -> Settled:
    """One group of files → our keys."""
    if _is_april_2023(files[0]):
        return _april_2023(files[0], files[1] if len(files) > 1 else None)
    (file,) = files
    return _llama_factory(file) if _is_llama_factory(file.values) else settle(file.values, file.places)


# ---- LLaMA-Factory ----


def _llama_factory(file: ConfigFile) -> Settled:
    done = settle(file.values, file.places)
    where = str(file.path)
    done.notes.insert(
        0, tr(f"{where}: read as a LLaMA-Factory config", f"{where}：按 LLaMA-Factory 配置读取")
    )
    template = done.values.get("template")
    if isinstance(template, str) and not template.startswith("lf/"):
        done.values["template"] = f"lf/{template}"
        done.notes.append(
            tr(
                f"template {template} is LLaMA-Factory's: lf/{template}",
                f"模板 {template} 是 LLaMA-Factory 的：lf/{template}",
            )
        )
    if "overlong" not in done.values:
        _llama_factory_overlong(done, where)
    full = done.values.get("finetuning_type") == "full"
    rank = done.values.get("lora_rank", LLAMA_FACTORY_DEFAULTS["lora_rank"])
    defaults: dict[str, Any] = dict(LLAMA_FACTORY_DEFAULTS)
    if isinstance(rank, int):
        defaults["lora_alpha"] = 2 * rank
    if "dataset" in done.values:
        defaults["dataset_dir"] = "data"
    unless = {"lora_rank", "lora_alpha", "lora_dropout"} if full else set()
    done.default(
        defaults, where, unless=unless | ({"warmup_ratio"} if "warmup_steps" in done.values else set())
    )
    _check_llama_factory(done, where)
    return done


def _llama_factory_overlong(done: Settled, where: str) -> None:
    plain = done.values.get("stage") == "pt"
    done.put("overlong", "split" if plain else "drop", where)
    done.notes.append(
        tr(
            "texts longer than cutoff_len are split into pieces, as there",
            "超过 cutoff_len 的文本切成多段，与原工具相同",
        )
        if plain
        else tr(
            "rows longer than cutoff_len are dropped and counted (that tool cuts them in silence); overlong= changes it",
            "超过 cutoff_len 的样本会丢弃并计数（原工具会悄悄截断）；可用 overlong= 更改",
        )
    )


def _check_llama_factory(done: Settled, where: str) -> None:
    folder = str(done.values.get("dataset_dir", ""))
    if folder.startswith("REMOTE:") or folder == "ONLINE":
        problem = tr(
            f"dataset_dir={folder}: rows are not fetched this way",
            f"dataset_dir={folder}：不支持这种取数据的方式",
        )
        remedy = tr("download the folder and give its path", "请先下载该目录，再给出路径")
        done.issues.append(Issue(problem, done.where["dataset_dir"], remedy))
    if done.values.get("finetuning_type") in ("freeze", "oft"):
        kind = done.values.pop("finetuning_type")
        problem = tr(f"finetuning_type={kind}: not supported", f"finetuning_type={kind}：不支持")
        remedy = tr(
            "finetuning_type=lora or finetuning_type=full",
            "改用 finetuning_type=lora 或 finetuning_type=full",
        )
        done.issues.append(Issue(problem, done.where.pop("finetuning_type", where), remedy))
    if done.values.get("overwrite_output_dir"):
        done.notes.append(
            tr(
                "overwrite_output_dir: an old folder is moved aside, not overwritten",
                "overwrite_output_dir：旧目录会改名保留，不会被覆盖",
            )
        )


# ---- domain-bloom, and BELLE in April 2023 ----


def _belle_marks(values: Mapping[str, Any]) -> str | None:
    """Why a config of this family is BELLE's, or None for domain-bloom's."""
    targets = values.get("lora_target_modules")
    if str(values.get("model_type", "")).lower() == "llama":
        return f"model_type={values['model_type']}"
    if "fp16" in values:
        return "fp16"
    if isinstance(targets, list) and "dense" not in targets:
        return f"lora_target_modules={','.join(map(str, targets))}"
    return "data_path" if "belle" in str(values.get("data_path", "")).lower() else None


def _april_2023(model: ConfigFile, adapter: ConfigFile | None) -> Settled:
    values = {**model.values, **(adapter.values if adapter else {})}
    places = {**model.places, **(adapter.places if adapter else {})}
    where = str(model.path)
    mark = _belle_marks(values)
    values.pop("model_type")
    notes = _april_batch(values) + _april_warmup(values)
    done = settle(values, places)
    done.notes = [_april_guess(where, mark), *notes, *done.notes]
    defaults: dict[str, Any] = dict(APRIL_2023_DEFAULTS)
    if mark is None:
        defaults |= {"template": "domain_bloom", "save_total_limit": 6, **DOMAIN_BLOOM_LORA}
    else:
        defaults |= {"template": "belle_apr", "save_total_limit": 3}
    done.default(defaults, where, unless={"warmup_ratio"} if "warmup_steps" in values else ())
    done.put("finetuning_type", "lora" if adapter or mark is None else "full", where)
    if done.values["finetuning_type"] == "full":
        done.notes.append(
            tr(
                "no LoRA file: every weight is trained, as BELLE's script does",
                "没有 LoRA 文件：与 BELLE 的脚本一样训练全部权重",
            )
        )
    done.notes += [
        tr(
            "rows longer than cutoff_len are dropped and counted (that script cuts the answer and puts an end token there); overlong= changes it",
            "超过 cutoff_len 的样本会丢弃并计数（原脚本会截断答案再补结束符）；可用 overlong= 更改",
        ),
        tr(
            "group_by_length of that script: rows are packed without padding here",
            "原脚本的 group_by_length：这里用无填充打包代替",
        ),
    ]
    if done.values["finetuning_type"] == "lora":
        done.notes.append(
            tr(
                "that script keeps the base in 8 bits; here it stays in the machine's dtype unless you add quantization_bit=8",
                "原脚本的基座权重为 8 位；这里按机器的精度保存，要 8 位请加 quantization_bit=8",
            )
        )
    return done


def _april_guess(where: str, mark: str | None) -> str:
    if mark is None:
        return tr(
            f"{where}: taken for a domain-bloom config; template=belle_apr if it is BELLE's",
            f"{where}：按 domain-bloom 的配置读取；如果是 BELLE 的，请加 template=belle_apr",
        )
    return tr(
        f"{where}: taken for a BELLE config of April 2023 (because of {mark}); template=domain_bloom if it is domain-bloom's",
        f"{where}：按 BELLE 2023 年 4 月的配置读取（依据 {mark}）；如果是 domain-bloom 的，请加 template=domain_bloom",
    )


def _april_batch(values: dict[str, Any]) -> list[str]:
    """Where accumulation is given, that script does not read `batch_size`."""
    steps, micro, total = (
        values.get(key)
        for key in ("gradient_accumulation_steps", "per_device_train_batch_size", "batch_size")
    )
    if steps is None or total is None:
        return []
    del values["batch_size"]
    if isinstance(steps, int) and isinstance(micro, int) and steps * micro != total:
        return [
            tr(
                f"batch_size={total} is not read where gradient_accumulation_steps is given, as there: "
                f"a step is {micro} × {steps} = {micro * steps} rows",
                f"给出 gradient_accumulation_steps 时，原脚本不读 batch_size={total}：每步 {micro} × {steps} = {micro * steps} 行",
            )
        ]
    return []


def _april_warmup(values: dict[str, Any]) -> list[str]:
    """`warmup_steps` is obeyed as its author meant, though that script never reads it."""
    if "warmup_steps" not in values:
        return []
    values.pop("warmup_rate", None)
    return [
        tr(
            f"warmup_steps={values['warmup_steps']} is obeyed, as meant (that script ignores it for warmup_rate, 0.1)",
            f"warmup_steps={values['warmup_steps']} 会生效（原脚本忽略它，改用 warmup_rate 0.1）",
        )
    ]
