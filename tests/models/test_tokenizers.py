"""Tokenizers by the files that lie there, in the shapes that folders of 2023 have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.tiny import tiny_tokenizer

from tuoling.errors import ModelError
from tuoling.models.tokenizers import load_tokenizer


def write(folder: Path, name: str, value: object) -> None:
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Only tokenizer.json: <unk> 0, <s> 1, </s> 2, <pad> 3."""
    tiny_tokenizer().backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.mark.slow
def test_usual_special_tokens_are_found_in_a_bare_file(folder: Path) -> None:
    for place in (folder, folder / "tokenizer.json"):
        tokenizer = load_tokenizer(place)
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 3)


@pytest.mark.parametrize("name", ["LLaMATokenizer", "BloomTokenizer", "NoSuchClass"])
def test_class_names_are_not_read(folder: Path, name: str) -> None:
    write(
        folder,
        "tokenizer_config.json",
        {"tokenizer_class": name, "bos_token": "", "eos_token": "", "unk_token": ""},
    )
    assert load_tokenizer(folder).eos_id == 2


def test_tokenizer_config_comes_before_special_tokens_map(folder: Path) -> None:
    write(folder, "tokenizer_config.json", {"bos_token": {"content": "<s>"}, "pad_token": None})
    write(
        folder,
        "special_tokens_map.json",
        {"bos_token": "</s>", "pad_token": "<unk>", "eos_token": {"content": "</s>"}},
    )
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 0)


def test_a_token_without_an_id_is_not_added(folder: Path) -> None:
    write(folder, "tokenizer_config.json", {"eos_token": "<|endoftext|>", "pad_token": "[PAD]"})
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer) == 320
    assert tokenizer.eos_id == 2, "the vocabulary has no <|endoftext|>: its </s> is the end token"


def test_ids_of_config_name_tokens_that_no_file_names(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    Tokenizer(WordLevel({"一": 0, "终": 1}, unk_token="一")).save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "config.json", {"eos_token_id": 1, "vocab_size": 2})
    assert load_tokenizer(tmp_path).eos_id == 1


def test_padding_and_cutting_left_in_a_file_are_dropped(folder: Path) -> None:
    from tokenizers import Tokenizer

    inner = Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.enable_truncation(4)
    inner.enable_padding(length=64)
    inner.save(str(folder / "tokenizer.json"))
    ids = load_tokenizer(folder).hf("今天天气很好 abcdefg")["input_ids"]
    assert 4 < len(ids) < 64


def test_begin_token_as_the_config_says(folder: Path) -> None:
    write(folder, "tokenizer_config.json", {"add_bos_token": True, "bos_token": "<s>"})
    assert load_tokenizer(folder).adds_bos
    write(folder, "tokenizer_config.json", {"add_bos_token": False, "bos_token": "<s>"})
    assert not load_tokenizer(folder).adds_bos


def test_chat_template_from_either_place(folder: Path) -> None:
    write(folder, "tokenizer_config.json", {"chat_template": [{"name": "default", "template": "{{ 1 }}"}]})
    assert load_tokenizer(folder).chat_template == "{{ 1 }}"
    (folder / "chat_template.jinja").write_text("{{ 2 }}", encoding="utf-8")
    assert load_tokenizer(folder).chat_template == "{{ 2 }}"


@pytest.mark.slow
def test_real_folders(shared_data: Path) -> None:
    found = {}
    for name in ("gpt-neox-20b", "mistral-v1", "openllama-zh-en", "minimind"):
        tokenizer = load_tokenizer(shared_data / "tokenizers" / name)
        found[name] = (
            len(tokenizer),
            tokenizer.bos_id,
            tokenizer.eos_id,
            tokenizer.pad_id,
            tokenizer.adds_bos,
        )
    assert found == {
        "gpt-neox-20b": (50277, None, 0, 1, False),
        "mistral-v1": (32000, 1, 2, None, True),
        "openllama-zh-en": (32001, 1, 2, 32000, True),
        "minimind": (6400, 1, 2, 0, False),
    }


def test_no_tokenizer_is_said_with_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert caught.value.where == str(tmp_path)


def test_a_broken_tokenizer_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model"', encoding="utf-8")
    with pytest.raises(ModelError, match="not a usable tokenizer file"):
        load_tokenizer(tmp_path)


def test_without_an_end_token_training_is_refused_and_chat_warned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    Tokenizer(WordLevel({"一": 0}, unk_token="一")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelError, match="no end token"):
        load_tokenizer(tmp_path)
    load_tokenizer(tmp_path, for_training=False)
    assert "no end token" in capsys.readouterr().err
