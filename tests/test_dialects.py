"""Configs of other tools, as their examples have them: recognised, translated, and every translation said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tuoling.config import Loaded, load_config
from tuoling.errors import ConfigError

# The shapes of LLaMA-Factory's examples, keys and values as there, in the order they are written there.
HEAD = "model_name_or_path: some/model\ntrust_remote_code: true\nstage: sft\ndo_train: true\n"
TAIL = (
    "logging_steps: 10\nsave_steps: 500\nplot_loss: true\noverwrite_output_dir: true\n"
    "per_device_train_batch_size: 1\nlearning_rate: 1.0e-4\nnum_train_epochs: 3.0\nlr_scheduler_type: cosine\n"
    "warmup_ratio: 0.1\nbf16: true\nddp_timeout: 180000000\n"
)
ROWS = (
    "dataset: identity,alpaca_en_demo\ncutoff_len: 2048\nmax_samples: 1000\npreprocessing_num_workers: 16\n"
)
LORA_SFT = (
    HEAD
    + "finetuning_type: lora\nlora_rank: 8\nlora_target: all\ntemplate: qwen3_nothink\ndataloader_num_workers: 4\n"
    + ROWS
    + "output_dir: saves/q/lora/sft\nsave_only_model: false\nreport_to: none  # choices: [none, wandb]\n"
    + "gradient_accumulation_steps: 8\nresume_from_checkpoint: null\n"
    + TAIL
)
LORA_SFT_ZERO3 = (
    HEAD
    + "finetuning_type: lora\nlora_target: all\ndeepspeed: examples/deepspeed/ds_z3_config.json\ntemplate: llama3\n"
    + ROWS
    + "overwrite_cache: true\noutput_dir: saves/l/lora/sft\ngradient_accumulation_steps: 2\n"
    + TAIL
    + "val_size: 0.1\nper_device_eval_batch_size: 1\neval_strategy: steps\neval_steps: 500\n"
)
PRETRAIN = (
    HEAD.replace("sft", "pt")
    + "finetuning_type: lora\nlora_rank: 8\nlora_target: all\noutput_dir: saves/q/lora/pretrain\n"
    + ROWS
    + "gradient_accumulation_steps: 8\n"
    + TAIL
)
FULL_SFT = (
    HEAD
    + "finetuning_type: full\ndeepspeed: examples/deepspeed/ds_z3_config.json\ntemplate: llama3\n"
    + ROWS
    + "output_dir: saves/l/full/sft\ngradient_accumulation_steps: 2\n"
    + TAIL.replace("1.0e-4", "1.0e-5")
)
QLORA_SFT = (
    "model_name_or_path: some/model\nquantization_bit: 4\nstage: sft\ndo_train: true\nfinetuning_type: lora\n"
    "lora_target: q_proj,v_proj\ntemplate: llama3\noutput_dir: saves/l/lora/sft\ngradient_accumulation_steps: 8\n"
    + ROWS
    + TAIL.replace("bf16", "fp16")
    + "eval_dataset: held_out\n"
)
RAY_SFT = (
    LORA_SFT
    + "ray_run_name: x\nray_num_workers: 4\nplacement_strategy: PACK\nresources_per_worker:\n  GPU: 1\n"
)

DOMAIN = """{
    # 修改模型路径
    "model_type": "bloom",
    "model_name_or_path": "/xx/bloomz-3b",
    "data_path": "data_dir/domain.train.json",
    "output_dir": "trained_models/out",
    "batch_size": 5,
    "per_device_train_batch_size": 5,
    "num_epochs": 25,
    "learning_rate": 1e-4,
    "cutoff_len": 512,
    "val_set_size": 1000,
    "val_set_rate": 0.1,
    "save_steps": 500,
    "eval_steps":100,
    "warmup_steps":10,
    "logging_steps":10,
    "gradient_accumulation_steps":1
}
"""
DOMAIN_LORA = {
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "lora_target_modules": ["dense", "dense_h_to_4h", "dense_4h_to_h", "query_key_value"],
}
BELLE_LLAMA = {
    **json.loads("\n".join(line for line in DOMAIN.splitlines() if "#" not in line)),
    **{
        "model_type": "Llama",
        "batch_size": 8,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 16,
    },
    **{"num_epochs": 2, "learning_rate": 2e-5, "cutoff_len": 1024},
}


def load(folder: Path, text: str, *words: str) -> Loaded:
    file = folder / "lf.yaml"
    file.write_text(text, encoding="utf-8")
    return load_config([file], words)


def said(loaded: Loaded, *parts: str) -> bool:
    return all(any(part in note for note in loaded.notes) for part in parts)


def test_lora_sft(tmp_path: Path) -> None:
    loaded = load(tmp_path, LORA_SFT)
    config = loaded.config
    assert (config.stage, config.finetuning_type, config.lora_rank, config.lora_alpha) == (
        "sft",
        "lora",
        8,
        16,
    )
    assert (config.lora_dropout, config.lora_target, config.template) == (0.0, ("all",), "lf/qwen3_nothink")
    assert (config.dataset, config.dataset_dir, config.max_samples) == (
        ("identity", "alpaca_en_demo"),
        "data",
        1000,
    )
    assert (config.max_seq_len, config.overlong, config.dtype) == (2048, "drop", "bf16")
    assert (config.learning_rate, config.lr_scheduler_type, config.warmup_ratio) == (1e-4, "cosine", 0.1)
    assert (config.per_device_train_batch_size, config.accumulation()) == (1, 8)
    assert (config.allow_remote_code, config.overwrite_output_dir, config.report_to) == (False, True, ())
    assert said(loaded, "read as a LLaMA-Factory config", "not obeyed", "dropped and counted", "moved aside")
    assert said(loaded, "lora_dropout=0.0", "lora_alpha=16", "preprocessing_num_workers")
    assert config.timeout_s == 180000000 and said(loaded, "ddp_timeout → timeout_s")


def test_lora_sft_zero3_and_validation(tmp_path: Path) -> None:
    loaded = load(tmp_path, LORA_SFT_ZERO3)
    config = loaded.config
    assert (config.val_size, config.eval_steps, config.per_device_eval_batch_size) == (0.1, 500, 1)
    assert config.template == "lf/llama3"
    assert config.deepspeed == "examples/deepspeed/ds_z3_config.json" and said(loaded, "overwrite_cache")


def test_pretraining_splits_long_texts(tmp_path: Path) -> None:
    loaded = load(tmp_path, PRETRAIN)
    assert (loaded.config.stage, loaded.config.overlong, loaded.config.template) == ("pt", "split", None)


def test_full_sft(tmp_path: Path) -> None:
    loaded = load(tmp_path, FULL_SFT)
    assert (loaded.config.finetuning_type, loaded.config.learning_rate) == ("full", 1e-5)
    assert not said(loaded, "lora_dropout")


def test_qlora(tmp_path: Path) -> None:
    bits = "quantization_bit: 4\n"
    asked = f"{bits}quantization_method: bnb\ndouble_quantization: false\nquantization_type: fp4\n"
    config = load(tmp_path, QLORA_SFT.replace(bits, asked)).config
    assert (config.quantization_bit, config.quantization_type, config.double_quantization) == (
        4,
        "fp4",
        False,
    )
    config = load(tmp_path, QLORA_SFT).config
    assert (config.quantization_bit, config.quantization_type, config.double_quantization) == (4, "nf4", True)
    with pytest.raises(
        ConfigError, match="quantization_method=hqq: quantised bases are kept by bitsandbytes"
    ):
        load(tmp_path, QLORA_SFT.replace(bits, "quantization_bit: 4\nquantization_method: hqq\n"))
    loaded = load(tmp_path, QLORA_SFT, "quantization_bit=null")
    assert loaded.config.quantization_bit is None
    assert (loaded.config.lora_target, loaded.config.dtype) == (("q_proj", "v_proj"), "fp16")
    assert loaded.config.eval_dataset == ("held_out",)
    assert said(loaded, "taken away on the command line: quantization_bit")


def test_ray_keys_are_answered(tmp_path: Path) -> None:
    assert said(load(tmp_path, RAY_SFT), "ray_run_name", "placement_strategy")


def test_other_defaults_than_ours_are_taken_over(tmp_path: Path) -> None:
    config = load(tmp_path, "model_name_or_path: m\nstage: sft\ndataset: d\nlora_rank: 4\n").config
    assert (config.lora_alpha, config.per_device_train_batch_size, config.max_seq_len) == (8, 8, 2048)
    assert (config.learning_rate, config.warmup_ratio, config.save_total_limit) == (5e-5, 0.0, None)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("finetuning_type: lora", "finetuning_type: freeze"), "finetuning_type=freeze: not supported"),
        (("stage: sft", "stage: dpo"), "stage=dpo: must be one of sft, pt"),
        (("lora_rank: 8", "lora_rank: 8\nuse_dora: true"), "use_dora=True: not supported"),
        (("lora_rank: 8", "lora_rank: 8\nneftune_noise_alpha: 5"), "neftune_noise_alpha=5: not supported"),
        (("lora_rank: 8", "lora_rank: 8\npissa_init: true"), "pissa_init=True: not supported"),
        (("lora_rank: 8", "lora_rank: 8\nloraplus_lr_ratio: 16.0"), "loraplus_lr_ratio=16.0: not supported"),
        (("lora_rank: 8", "lora_rank: 8\ndataset_dir: REMOTE:x/y"), "dataset_dir=REMOTE:x/y"),
        (("lora_rank: 8", "lora_rank: 8\nmix_strategy: interleave_over"), "mix_strategy=interleave_over"),
        (
            ("resume_from_checkpoint: null", "resume_from_checkpoint: true"),
            "does not go on with a stopped run",
        ),
        (("lora_rank: 8", "lora_rnak: 8"), "unknown key: lora_rnak"),
        (("bf16: true", "bf16: true\nfp16: true"), "dtype is given twice"),
    ],
)
def test_what_would_change_the_result_is_an_error(tmp_path: Path, change: tuple[str, str], says: str) -> None:
    assert change[0] in LORA_SFT
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, LORA_SFT.replace(*change))
    assert says in str(caught.value)


def test_datasets_that_are_interleaved(tmp_path: Path) -> None:
    mixed = LORA_SFT + "mix_strategy: interleave_under\n"
    loaded = load(tmp_path, mixed + "interleave_probs: 0.7,0.3\n")
    assert loaded.config.mix == {"identity": 0.7, "alpaca_en_demo": 0.3}
    assert said(loaded, "interleave_under: mix")
    assert load(tmp_path, mixed).config.mix == {"identity": 1.0, "alpaca_en_demo": 1.0}
    with pytest.raises(ConfigError, match="3 numbers for 2 datasets"):
        load(tmp_path, mixed + "interleave_probs: 0.5,0.3,0.2\n")


@pytest.mark.parametrize(
    "line",
    [
        "use_dora: false",
        "neftune_noise_alpha: 0",
        "deepspeed: ''",
        "packing: true",
        "neat_packing: true",
        "flash_attn: fa2",
        "enable_liger_kernel: true",
        "optim: adamw_torch",
        "mix_strategy: concat",
    ],
)
def test_what_changes_nothing_passes(tmp_path: Path, line: str) -> None:
    assert load(tmp_path, LORA_SFT + line + "\n").config.lora_rank == 8


@pytest.mark.parametrize("key", ["packing", "neat_packing", "sample_packing", "group_by_length"])
def test_packing_and_grouping_are_answered(tmp_path: Path, key: str) -> None:
    loaded = load(tmp_path, LORA_SFT + f"{key}: true\n")
    assert loaded.config == load(tmp_path, LORA_SFT).config
    assert said(loaded, key, "packed without padding and never see each other")
    assert said(loaded, key, "max_tokens_per_batch=N and no batch size") == (key != "group_by_length")


def test_steps_of_tokens_in_a_llama_factory_config(tmp_path: Path) -> None:
    text = LORA_SFT.replace("gradient_accumulation_steps: 8\n", "")
    text = text.replace("per_device_train_batch_size: 1\n", "")
    assert (
        load(tmp_path, text, "max_tokens_per_batch=2048").config.rows_per_step() == 8
    )  # that tool's default
    config = load(tmp_path, text, "max_tokens_per_batch=2048", "per_device_train_batch_size=null").config
    assert (config.rows_per_step(), config.gradient_accumulation_steps) == (None, 1)


def test_words_speak_our_own_dialect_over_such_a_file(tmp_path: Path) -> None:
    loaded = load(tmp_path, LORA_SFT, "template=alpaca", "data=rows.json", "cutoff_len=99", "overlong=error")
    config = loaded.config
    assert (config.template, config.max_seq_len, config.overlong) == ("alpaca", 99, "error")
    assert (config.data, config.dataset) == (("rows.json",), ())


def test_our_own_policy_in_such_a_file_is_kept(tmp_path: Path) -> None:
    config = load(tmp_path, LORA_SFT + "overlong: cut_prompt\n").config
    assert (config.template, config.overlong) == ("lf/qwen3_nothink", "cut_prompt")


def test_a_file_of_ours_is_not_taken_for_theirs(tmp_path: Path) -> None:
    config = load(
        tmp_path, "model_name_or_path: m\nstage: sft\ndata: d.json\ntemplate: alpaca\nlora_target: all\n"
    ).config
    assert (config.template, config.overlong, config.lora_dropout) == ("alpaca", "error", 0.05)


def write_pair(folder: Path, config: object, lora: object | None) -> list[Path]:
    files = [folder / "Bloom_config.json", folder / "lora_hyperparams_bloom.json"]
    files[0].write_text(config if isinstance(config, str) else json.dumps(config), encoding="utf-8")
    if lora is None:
        return files[:1]
    files[1].write_text(json.dumps(lora), encoding="utf-8")
    return files


@pytest.mark.parametrize("swapped", [False, True])
def test_domain_bloom_pair_in_either_order(tmp_path: Path, swapped: bool) -> None:
    files = write_pair(tmp_path, DOMAIN, DOMAIN_LORA)
    loaded = load_config(files[::-1] if swapped else files)
    config = loaded.config
    assert (config.template, config.finetuning_type, config.overlong) == ("domain_bloom", "lora", "drop")
    assert (config.lora_rank, config.lora_alpha, config.lora_dropout) == (8, 16, 0.1)
    assert set(config.lora_target) == {"dense", "dense_h_to_4h", "dense_4h_to_h", "query_key_value"}
    assert (config.data, config.num_train_epochs, config.max_seq_len) == (
        ("data_dir/domain.train.json",),
        25,
        512,
    )
    assert (config.warmup_steps, config.save_total_limit, config.eval_steps) == (10, 6, 100)
    assert config.per_device_train_batch_size * config.accumulation() == 5
    assert config.val_rows(1666) == 166
    assert said(
        loaded, "taken for a domain-bloom config", "warmup_steps=10 is obeyed", "group_by_length", "8 bits"
    )
    assert loaded.origin["learning_rate"] == f"{files[0]}:10"


def test_domain_bloom_without_its_lora_file_still_trains_lora(tmp_path: Path) -> None:
    config = load_config(write_pair(tmp_path, DOMAIN, None)).config
    assert (config.finetuning_type, config.lora_dropout, len(config.lora_target)) == ("lora", 0.1, 4)


def test_it_equals_the_recipe(tmp_path: Path) -> None:
    ours = load_config([], ["recipe=domain-bloom"]).config.model_dump()
    theirs = load_config(write_pair(tmp_path, DOMAIN, DOMAIN_LORA)).config.model_dump()
    different = {key for key in ours if ours[key] != theirs[key]}
    names_the_run = {"recipe", "model_name_or_path", "data", "output_dir"}
    assert different == names_the_run | {"lora_target", "overlong"}, (
        "the order of targets, and a stricter default"
    )
    assert set(ours["lora_target"]) == set(theirs["lora_target"])


@pytest.mark.parametrize(
    ("config", "lora"),
    [
        (BELLE_LLAMA, {**DOMAIN_LORA, "lora_target_modules": ["q_proj", "v_proj"]}),
        ({**BELLE_LLAMA, "model_type": "bloom"}, {**DOMAIN_LORA, "lora_target_modules": ["query_key_value"]}),
        ({**BELLE_LLAMA, "model_type": "bloom", "fp16": False}, DOMAIN_LORA),
        ({**BELLE_LLAMA, "model_type": "bloom", "data_path": "Belle_open_source_1M.json"}, DOMAIN_LORA),
    ],
)
def test_belle_of_april_2023(tmp_path: Path, config: dict[str, object], lora: dict[str, object]) -> None:
    loaded = load_config(write_pair(tmp_path, config, lora))
    assert (loaded.config.template, loaded.config.save_total_limit) == ("belle_apr", 3)
    assert list(loaded.config.lora_target) == lora["lora_target_modules"]
    # with accumulation given, their script does not read batch_size: a step is 16 rows, not 8
    assert loaded.config.per_device_train_batch_size * loaded.config.accumulation() == 16
    assert said(loaded, "taken for a BELLE config of April 2023", "batch_size=8 is not read")


def test_belle_without_a_lora_file_trains_everything(tmp_path: Path) -> None:
    config = load_config(write_pair(tmp_path, {**BELLE_LLAMA, "fp16": True}, None)).config
    assert (config.finetuning_type, config.dtype) == ("full", "fp16")


def test_the_guess_can_be_overridden(tmp_path: Path) -> None:
    files = write_pair(tmp_path, DOMAIN, DOMAIN_LORA)
    assert load_config(files, ["template=belle_apr"]).config.template == "belle_apr"


def test_batch_size_alone_is_the_total(tmp_path: Path) -> None:
    plain = {key: value for key, value in BELLE_LLAMA.items() if key != "gradient_accumulation_steps"}
    config = load_config(write_pair(tmp_path, {**plain, "batch_size": 64}, None)).config
    assert (config.batch_size, config.accumulation(), config.accumulation(2)) == (64, 64, 32)
