"""Tokenizer trouble of the field: wrong ids in the config, pad equal to eos, sizes that do not fit."""

from __future__ import annotations

import json

import pytest
from tests.real_tokenizers import load
from tests.tiny import tiny_tokenizer

from tuoling.text.checks import check_template, check_tokenizer
from tuoling.text.templates import TEMPLATES
from tuoling.text.tokenizer import TextTokenizer


def levels(tokenizer: TextTokenizer, **facts: object) -> list[tuple[str, str]]:
    given = {"vocab_rows": None, "config": None, "generation_config": None, **facts}
    return [(found.level, found.message) for found in check_tokenizer(tokenizer, **given)]  # type: ignore[arg-type]


def tiny(**special: str | None) -> TextTokenizer:
    hf = tiny_tokenizer()
    for name, value in special.items():
        setattr(hf, name, value)
    return TextTokenizer(hf)


def test_a_sound_tokenizer_has_no_findings() -> None:
    own = tiny()
    facts = {"bos_token_id": 1, "eos_token_id": 2}
    assert levels(own, vocab_rows=len(own), config=facts, generation_config=facts) == []


def test_config_of_2023_says_other_ids() -> None:
    found = levels(tiny(), config={"bos_token_id": 0, "eos_token_id": 1})
    assert [level for level, _ in found] == ["repaired", "repaired"]
    assert "bos_token_id=0" in found[0][1] and "eos_token_id=1" in found[1][1] and "2" in found[1][1]


def test_generation_config_may_list_several_ends() -> None:
    assert levels(tiny(), generation_config={"eos_token_id": [2, 5]}) == []
    assert levels(tiny(), generation_config={"eos_token_id": [5]})[0][0] == "repaired"


def test_no_end_token_is_an_error() -> None:
    found = levels(tiny(eos_token=None))
    assert found[0][0] == "error" and "end token" in found[0][1]


def test_pad_equal_to_end_is_repaired_and_said() -> None:
    found = levels(tiny(pad_token="</s>"))
    assert found[0][0] == "repaired" and "harmless" in found[0][1]


def test_more_ids_than_embedding_rows() -> None:
    own = tiny()
    found = levels(own, vocab_rows=len(own) - 1)
    assert found[0][0] == "error" and str(len(own) - 1) in found[0][1]


@pytest.mark.slow
def test_an_added_pad_beyond_the_embedding_is_only_noted(request: pytest.FixtureRequest) -> None:
    own = load("openllama", request)  # 32,000 words and [PAD] 32000
    found = levels(own, vocab_rows=32000)
    assert found[0][0] == "note" and "[PAD]" in found[0][1]
    assert levels(own, vocab_rows=31999)[0][0] == "error"


@pytest.mark.slow
def test_a_real_folder_that_contradicts_itself(request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue("shared_data") / "tokenizers" / "openllama-zh-en"
    names = json.loads((folder / "special_tokens_map.json").read_text())
    assert names["bos_token"] == "</s>"  # while tokenizer_config.json says <s>
    from transformers import PreTrainedTokenizerFast

    hf = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **names)
    found = levels(TextTokenizer(hf), config={"bos_token_id": 1, "eos_token_id": 2})
    assert any("same id 2" in message for _, message in found)
    assert any("bos_token_id=1" in message for _, message in found)


def test_marks_the_tokenizer_spells_out_are_noted(request: pytest.FixtureRequest) -> None:
    assert "<|im_end|>" in check_template(TEMPLATES["chatml"], tiny())[0].message
    assert check_template(TEMPLATES["alpaca"], tiny()) == []
    assert check_template(TEMPLATES["chatml"], load("minimind", request)) == []
