"""The table of families is consistent, and true of transformers' own classes."""

from __future__ import annotations

import pytest

from tuoling.families import FAMILIES, OTHER, Family, family_of
from tuoling.text.templates import TEMPLATES

WITH_TARGETS = [
    family for family in FAMILIES if family.lora_targets != "all" and "own_code" not in family.quirks
]


def test_every_type_and_name_stands_once_and_templates_exist() -> None:
    types = [model_type for family in FAMILIES for model_type in family.model_types]
    names = [family.name for family in FAMILIES]
    assert len(types) == len(set(types)) and len(names) == len(set(names)) and len(FAMILIES) >= 25
    assert {family.template for family in FAMILIES} - {None} <= set(TEMPLATES)


def test_looking_up() -> None:
    assert family_of("bloom").licence == "bigscience-bloom-rail-1.0" and "alibi" in family_of("bloom").quirks
    assert family_of("qwen3").template == "qwen3"
    assert family_of("never-heard-of") is family_of(None) is OTHER


@pytest.mark.parametrize("family", WITH_TARGETS, ids=lambda family: family.name)
def test_named_targets_are_all_there_is(family: Family) -> None:
    """The names in the table are what "all" finds by module type in transformers' model of the family."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tuoling.models.adapters import lora_target_names

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 16}
    config = AutoConfig.for_model(family.model_types[0], **sizes, intermediate_size=64, pad_token_id=0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert set(lora_target_names(model)) == set(family.lora_targets)
