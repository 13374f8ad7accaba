"""Keys of other tools that are not ours: another name for one of ours, answered in a word, or refused.

A key may be *answered* only where leaving it alone cannot change what is learned. A key that would change the result
is *refused* while its value asks for something: `KEY=null` on the command line is the way past, and is recorded.
"""

from __future__ import annotations

from tuoling.language import tr


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


ALIASES = {
    "model": "model_name_or_path",
    "model_path": "model_name_or_path",
    "base_model": "model_name_or_path",
    "adapter": "adapter_name_or_path",
    "lora_weights": "adapter_name_or_path",
    "data_path": "data",
    "train_file": "data",
    "train_files": "data",
    "train_data": "data",
    "eval_file": "eval_data",
    "validation_file": "eval_data",
    "dev_file": "eval_data",
    "val_set_size": "val_size",
    "test_size": "val_size",
    "val_set_rate": "val_max_share",
    "cutoff_len": "max_seq_len",
    "max_length": "max_seq_len",
    "max_seq_length": "max_seq_len",
    "model_max_length": "max_seq_len",
    "train_on_prompt": "train_on_inputs",
    "lora_r": "lora_rank",
    "r": "lora_rank",
    "target_modules": "lora_target",
    "lora_target_modules": "lora_target",
    "micro_batch_size": "per_device_train_batch_size",
    "micro_batch": "per_device_train_batch_size",
    "total_batch": "batch_size",
    "total_batch_size": "batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "num_epochs": "num_train_epochs",
    "num_epoch": "num_train_epochs",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    "warmup_rate": "warmup_ratio",
    "log_steps": "logging_steps",
    "torch_dtype": "dtype",
    "quant_bits": "quantization_bit",
    "bnb_4bit_quant_type": "quantization_type",
    "quant_type": "quantization_type",
    "bnb_4bit_use_double_quant": "double_quantization",
    "use_bnb_nested_quant": "double_quantization",
    "double_quant": "double_quantization",
    "output": "output_dir",
    "output_path": "output_dir",
    "out": "output_dir",
    "ddp_timeout": "timeout_s",
    "full_determinism": "deterministic",
    "early_stopping_steps": "early_stopping_patience",
}
"""Other names → ours."""

AUTOMATIC = _names(
    """preprocessing_num_workers preprocessing_batch_size dataloader_num_workers dataloader_pin_memory
    dataloader_persistent_workers overwrite_cache tokenized_path streaming buffer_size data_shared_file_system
    low_cpu_mem_usage use_fast_tokenizer cache_dir use_cache ignore_pad_token_for_loss remove_unused_columns
    data_seed"""
)
FAST_PATH = _names(
    """flash_attn attn_implementation enable_liger_kernel use_unsloth use_unsloth_gc use_v1_kernels group_by_length
    length_column_name padding_free batch_flattening pad_to_sequence_len pad_to_max_length use_reentrant_gc
    torch_compile tf32 auto_find_batch_size"""
)
PACKING = _names(
    """packing neat_packing sample_packing eval_packing eval_sample_packing packing_strategy packing_length
    packing_num_proc sample_packing_bin_size sample_packing_group_size sample_packing_sequentially"""
)
LAUNCH = _names(
    """fsdp_config ddp_find_unused_parameters ddp_backend local_rank
    placement_strategy resources_per_worker ray_run_name ray_storage_path ray_num_workers ray_init_kwargs"""
)
LOGGING = _names(
    """logging_strategy logging_first_step logging_dir logging_nan_inf_filter log_level disable_tqdm
    include_num_input_tokens_seen include_tokens_per_second print_param_status include_effective_tokens_per_second
    compute_accuracy save_only_model save_safetensors do_train eval_on_each_dataset"""
)
OTHER_VERBS = _names(
    """do_predict do_eval predict_with_generate eval_num_beams infer_backend infer_dtype use_kv_cache max_length_infer
    media_dir tool_format enable_thinking quantization_device_map pissa_iter pissa_convert loraplus_lr_embedding freeze_trainable_layers
    freeze_trainable_modules freeze_extra_modules ref_model reward_model pref_beta pref_loss pref_ftx
    fp8_backend fp8_enable_fsdp_float8_all_gather"""
)
QUANTIZED_COMPUTE = _names("bnb_4bit_compute_dtype bnb_4bit_quant_storage")
OTHER_VERB_PREFIXES = (
    *("vllm_", "sglang_", "export_", "swanlab_", "image_", "video_", "audio_", "galore_", "apollo_"),
    *("badam_", "ppo_", "kto_", "dpo_", "ref_model_", "reward_model_", "oft_", "kt_"),
)
REFUSED = _names(
    """llm_int8_skip_modules llm_int8_has_fp16_weight llm_int8_enable_fp32_cpu_offload use_dora use_rslora use_qalora pissa_init loraplus_lr_ratio
    additional_target modules_to_save create_new_adapter use_galore use_apollo use_badam use_adam_mini
    use_llama_pro neftune_noise_alpha resize_vocab add_tokens add_special_tokens
    new_special_tokens_config rope_scaling shift_attn mixture_of_depths moe_aux_loss_coef train_from_scratch
    interleave_probs default_system disable_shuffling use_dft_loss use_asft_loss use_eaft_loss
    fp8 enable_fp8_training lr_scheduler_kwargs optim_args push_to_hub split_special_tokens use_mca
    resume_from_checkpoint ignore_data_skip"""
)


def answers(key: str) -> str | None:
    """What is said of a key that is read and needs nothing done; None for a key that is not one of these."""
    if key in AUTOMATIC:
        return tr(
            "automatic here (the token store is keyed by content, made once and mapped)",
            "这里自动完成（数据按内容编译一次，之后直接复用）",
        )
    if key in FAST_PATH:
        return tr(
            "not needed: rows are always packed without padding and never see each other; the fastest safe path is chosen",
            "不需要：样本总是无填充打包且互不可见，最快的安全路径自动选择",
        )
    if key in PACKING:
        return tr(
            "not needed: rows are always packed without padding and never see each other. Batch sizes count rows here, "
            "not packs: for steps of full packs give max_tokens_per_batch=N and no batch size",
            "不需要：样本总是无填充打包且互不可见。这里的批大小按条数计，不按打包后的段数计：想让每步由装满的包组成，"
            "写 max_tokens_per_batch=N，不写批大小",
        )
    if key in LAUNCH:
        return tr(
            "not used: processes are started by --nproc or a launcher, and parallel= says how they share the run",
            "未使用：进程由 --nproc 或启动器启动，parallel= 决定它们如何分担训练",
        )
    if key in QUANTIZED_COMPUTE:
        return tr(
            "quantised layers compute in the run's own precision (dtype=), and are stored as bytes",
            "量化层按本次训练的精度（dtype=）计算，按字节存放",
        )
    if key in LOGGING:
        return tr("always on here, or decided by other keys", "这里始终开启，或由其他键决定")
    if key in OTHER_VERBS or key.startswith(OTHER_VERB_PREFIXES):
        return tr("for other commands or methods; not used in training", "属于其他命令或方法，训练时不使用")
    return None


def refusal(key: str) -> str:
    """Why a key that would change the result is not obeyed."""
    if key in ("resume_from_checkpoint", "ignore_data_skip"):
        return tr(
            "a key does not go on with a stopped run, a command does: tuoling resume RUN; from another tool's checkpoint: "
            "tuoling continue FOLDER --data ROWS --keep-schedule",
            "继续中断的训练不用这个键，用命令：tuoling resume 运行目录；从其他工具的检查点继续："
            "tuoling continue 目录 --data 数据 --keep-schedule",
        )
    if key in ("quantization_method", "llm_int8_threshold"):
        return tr(
            "quantised bases are kept by bitsandbytes here (bnb), with its own threshold of 6.0",
            "这里的量化基座由 bitsandbytes（bnb）保存，阈值为它默认的 6.0",
        )
    if key == "push_to_hub":
        return tr("nothing is uploaded from here", "这里不上传任何东西")
    return tr("not supported, and leaving it out would change the result", "不支持，而忽略它会改变训练结果")


def default_notice(values: dict[str, object]) -> str:
    """Names the defaults taken over from another tool, with their values."""
    listed = ", ".join(f"{key}={value}" for key, value in values.items())
    return tr(f"not in the file, so as in that tool: {listed}", f"文件中没有写，按原工具的默认值：{listed}")
