"""Every packaged recipe against the table of published hyper-parameters."""

from __future__ import annotations

import pytest

from tuoling.config import RECIPES, RunConfig, load_config, recipe_names

SEVEN = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
BLOOM_FOUR = "query_key_value dense dense_h_to_4h dense_4h_to_h"
# name: rank, alpha, dropout, targets, learning rate, rows of a step on one device, length, epochs
LORA = {
    "chinese-vicuna": (8, 16, 0.05, "q_proj v_proj", 3e-4, 128, 256, 3),
    "chinese-vicuna-chat": (8, 16, 0.05, SEVEN, 3e-4, 128, 2048, 3),
    "chinese-vicuna-legal": (8, 16, 0.05, SEVEN, 3e-4, 32, 2048, 6),
    "chinese-vicuna-medical": (8, 16, 0.05, "q_proj v_proj", 3e-4, 128, 256, 3.5),
    "belle-2023": (8, 16, 0.05, "query_key_value", 1e-5, 8, 1024, 2),
    "belle-2023-llama": (8, 16, 0.05, "q_proj v_proj", 2e-5, 16, 1024, 2),
    "belle-lora": (16, 32, 0.05, "query_key_value", 3e-4, 8, 1024, 10),
    "belle-lora-llama": (16, 32, 0.05, SEVEN, 3e-4, 8, 1024, 10),
    "belle-dschat": (16, 16, 0.05, SEVEN, 3e-4, 16, 1024, 1),
    "domain-bloom": (8, 16, 0.1, BLOOM_FOUR, 1e-4, 5, 512, 25),
    "alpaca-lora": (8, 16, 0.05, "q_proj v_proj", 3e-4, 128, 256, 3),
    "alpaca-lora-official": (16, 16, 0.05, "q_proj k_proj v_proj o_proj", 3e-4, 128, 512, 10),
    "data_size_study": (16, 32, 0.05, "all", 2e-4, 16, 1024, 3),
    "tuoling": (16, 32, 0.05, "all", 2e-4, 16, 1024, 3),
}
# name: learning rate, rows of a step, epochs, schedule, warm-up share, weight decay
FULL = {
    "belle-full": (3e-6, 64, 3, "linear", 0.1, 1e-3),
    "belle-full-13b": (2e-5, 16, 3, "cosine", 0.03, 0.0),
    "alpaca-full": (2e-5, 128, 3, "cosine", 0.03, 0.0),
    "alpaca-full-13b": (1e-5, 128, 5, "cosine", 0.03, 0.0),
    "zero-nlp": (2e-5, 8, 3, "linear", 0.03, 0.0),
}


def load(name: str) -> RunConfig:
    loaded = load_config([], [f"recipe={name}"])
    assert loaded.notes == [], "a recipe speaks our own keys"
    return loaded.config


def test_every_recipe_is_in_the_tables() -> None:
    assert recipe_names() == sorted({**LORA, **FULL})


@pytest.mark.parametrize("name", LORA)
def test_lora_recipe(name: str) -> None:
    config = load(name)
    rank, alpha, dropout, targets, rate, rows, length, epochs = LORA[name]
    assert config.finetuning_type == "lora"
    assert (config.lora_rank, config.lora_alpha, config.lora_dropout) == (rank, alpha, dropout)
    assert sorted(config.lora_target) == sorted(targets.split())
    assert (config.learning_rate, config.max_seq_len, config.num_train_epochs) == (rate, length, epochs)
    assert config.per_device_train_batch_size * config.accumulation() == rows


@pytest.mark.parametrize("name", FULL)
def test_full_recipe(name: str) -> None:
    config = load(name)
    rate, rows, epochs, schedule, warmup, decay = FULL[name]
    assert config.finetuning_type == "full"
    assert (config.learning_rate, config.num_train_epochs, config.lr_scheduler_type) == (
        rate,
        epochs,
        schedule,
    )
    assert (config.warmup_ratio, config.weight_decay) == (warmup, decay)
    assert config.per_device_train_batch_size * config.accumulation() == rows


@pytest.mark.parametrize("name", [*LORA, *FULL])
def test_recipe_says_where_it_comes_from(name: str) -> None:
    head = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[:2]
    assert all(line.startswith("# ") for line in head)


@pytest.mark.parametrize("name", [*LORA, *FULL])
def test_recipe_names_a_template_that_exists(name: str) -> None:
    from tuoling.text.templates import TEMPLATES

    assert load(name).template in {*TEMPLATES, None}


def test_a_recipe_can_be_overridden() -> None:
    config = load_config([], ["recipe=domain-bloom", "max_seq_len=1024", "max_steps=50"]).config
    assert (config.max_seq_len, config.max_steps, config.lora_dropout, config.template) == (
        1024,
        50,
        0.1,
        "domain_bloom",
    )
