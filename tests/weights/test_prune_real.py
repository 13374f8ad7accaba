"""Whole prunings with real tokenizers on real Chinese rows: every row comes out the same, in every file that is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tests.weights.test_prune_tokenizer import ids_of

from tuoling.models.load import load_tokenizer
from tuoling.weights.prune import prune_vocab
from tuoling.weights.prune_report import PruneOptions
from tuoling.weights.vocabulary_map import VocabularyMap

KINDS = {
    "gpt-neox-20b": ("bloom", 50304, 0),
    "minimind": ("qwen2", 6400, 2),
    "openllama-zh-en": ("llama", 32001, 2),
    "mistral-v1": ("llama", 32000, 2),
}
"""Tokenizer → (family, rows of the model, end token)."""


def tiny_with(tokenizer: Path, folder: Path, family: str, rows: int, eos: int) -> Path:
    """A model of one small layer with the files of a real tokenizer."""
    from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig, Qwen2Config

    small = {"hidden_size": 16, "num_attention_heads": 2, "vocab_size": rows, "eos_token_id": eos}
    small |= {"bos_token_id": 1, "pad_token_id": eos}
    config = {
        "bloom": lambda: BloomConfig(n_layer=1, n_head=2, **small),
        "llama": lambda: LlamaConfig(num_hidden_layers=1, intermediate_size=32, **small),
        "qwen2": lambda: Qwen2Config(
            num_hidden_layers=1,
            num_key_value_heads=2,
            intermediate_size=32,
            tie_word_embeddings=True,
            **small,
        ),
    }[family]()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in tokenizer.iterdir():
        shutil.copyfile(file, folder / file.name.replace("20B_", ""))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "minimind" else pytest.mark.long) for name in KINDS]
)
def test_every_real_row_comes_out_the_same(name: str, shared_data: Path, tmp_path: Path) -> None:
    full = tiny_with(shared_data / "tokenizers" / name, tmp_path / "full", *KINDS[name])
    data = shared_data / "alpaca" / "alpaca_zh_demo.json"
    held_out = shared_data / "domain" / "domain.test.json"
    options = PruneOptions([str(data)], held_out=[str(held_out)], base="common", verify=False)
    report = prune_vocab(full, tmp_path / "small", options, say=lambda _: None)
    assert report.corpus.rows == report.corpus.rows_same == 1000
    assert report.corpus.tokens == report.corpus.tokens_same == report.corpus.tokens_after
    assert report.rows_after < report.rows_before
    assert report.held_out.rows == 13 == report.held_out.texts_same
    assert report.held_out.tokens_same > 0.9 * report.held_out.tokens
    old, new = (
        load_tokenizer(full, for_training=False),
        load_tokenizer(tmp_path / "small", for_training=False),
    )
    found = VocabularyMap.read(tmp_path / "small")
    for row in json.loads(data.read_text(encoding="utf-8"))[:100]:
        text = row["instruction"] + row["output"]
        if set(before := ids_of(old, text)) <= set(found.old_ids.tolist()):
            assert found.old_ids[ids_of(new, text)].tolist() == before
    config = json.loads((tmp_path / "small" / "config.json").read_text(encoding="utf-8"))
    assert new.eos_id == config["eos_token_id"]
    assert old.hf.eos_token == new.hf.eos_token


@pytest.mark.long
def test_the_sentencepiece_file_beside_a_pruned_model(shared_data: Path, tmp_path: Path) -> None:
    """sentencepiece itself reads tokenizer.model; it and tokenizer.json must give the same ids."""
    import sentencepiece

    full = tiny_with(shared_data / "tokenizers" / "mistral-v1", tmp_path / "full", *KINDS["mistral-v1"])
    data = shared_data / "alpaca" / "identity.json"
    options = PruneOptions([str(data)], verify=False, template="alpaca")
    prune_vocab(full, tmp_path / "small", options, say=lambda _: None)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "small" / "tokenizer.model"))
    ours = load_tokenizer(tmp_path / "small", for_training=False)
    assert len(ours) == theirs.get_piece_size() == VocabularyMap.read(tmp_path / "small").old_ids.size
    texts = [row["output"] for row in json.loads(data.read_text(encoding="utf-8"))]
    texts += ["def add(a, b):\n    return a + b", "生僻字：龘靐，还有  两个空格", "日本語とไทย"]
    for text in texts:
        assert theirs.encode(text) == ids_of(ours, text)
    assert (theirs.bos_id(), theirs.eos_id()) == (ours.bos_id, ours.eos_id)
    assert ours.adds_bos
