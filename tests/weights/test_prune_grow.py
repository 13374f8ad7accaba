"""A LLaMA-like model with more words: the old ones stay, the new ones begin as what they were written with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tests.tiny import tiny_model
from tests.weights.test_prune_tokenizer import ids_of, read_spm, sentences, train_spm

from tuoling.errors import ModelError
from tuoling.models.load import find_model, load_model, load_tokenizer
from tuoling.weights.grow import grow_vocab, plan_growth
from tuoling.weights.prune_spm import read_proto

ENGLISH = [
    "the camel walks slowly in deep sand",
    "three four and the sand is deep",
    "print(x) if a == b: 1234567890",
] * 9


def quiet(_: str) -> None:
    """What is said to the user is not looked at here."""


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A tiny LLaMA with an English sentencepiece vocabulary that falls back to bytes, and a [PAD] behind it."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    spm = train_spm(tmp_path, "bpe", 330, ENGLISH)
    folder = tmp_path / "llama"
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=331,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=330,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    shutil.copy(spm, folder / "tokenizer.model")
    (folder / "added_tokens.json").write_text(json.dumps({"[PAD]": 330}), encoding="utf-8")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "[PAD]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    return folder


@pytest.fixture
def chinese(tmp_path: Path) -> Path:
    """A sentencepiece vocabulary with Chinese words."""
    (tmp_path / "zh").mkdir()
    return train_spm(tmp_path / "zh", "bpe", 400, sentences(300))


@pytest.mark.slow
def test_new_rows_are_the_mean_of_what_the_word_was(llama: Path, chinese: Path, tmp_path: Path) -> None:
    report = grow_vocab(llama, tmp_path / "big", chinese, verify=False, say=quiet)
    assert report.rows_before == 331
    assert report.rows_after == 331 + report.added
    before = load_model(find_model(llama), dtype="fp32", device="cpu").state_dict()
    after = load_model(find_model(tmp_path / "big"), dtype="fp32", device="cpu").state_dict()
    old, new = load_tokenizer(llama), load_tokenizer(tmp_path / "big")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(after[name][:330], before[name][:330])
        assert torch.equal(after[name][-1], before[name][330]), "[PAD] moved to the end"
        for word in ("天气", "驼铃"):
            at = new.hf.convert_tokens_to_ids(f"▁{word}")
            assert at >= 330, "a new word"
            pieces = old.hf.convert_tokens_to_ids(["▁", *(f"<0x{byte:02X}>" for byte in word.encode())])
            mean = before[name][pieces].double().mean(0).float()
            torch.testing.assert_close(after[name][at], mean, rtol=0, atol=1e-7)
    config = json.loads((tmp_path / "big" / "config.json").read_text(encoding="utf-8"))
    assert config["vocab_size"] == report.rows_after
    assert config["pad_token_id"] == report.rows_after - 1 == new.pad_id
    assert config["eos_token_id"] == 2


@pytest.mark.slow
def test_old_text_stays_and_new_text_gets_shorter(llama: Path, chinese: Path, tmp_path: Path) -> None:
    import sentencepiece

    grow_vocab(llama, tmp_path / "big", chinese, verify=False, say=quiet)
    old, new = load_tokenizer(llama), load_tokenizer(tmp_path / "big")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "big" / "tokenizer.model"))
    for text in sentences(60):
        ids = ids_of(new, text)
        assert len(ids) < len(ids_of(old, text))
        assert new.decode(ids) == text
        assert theirs.encode(text) == ids, "tokenizer.model and tokenizer.json agree"
    words = "1234 567890"  # nothing of it is in a new word
    assert ids_of(new, words) == ids_of(old, words)


@pytest.mark.slow
@pytest.mark.usefixtures("gate_here")
def test_the_gate_compares_the_words_that_were_there(llama: Path, chinese: Path, tmp_path: Path) -> None:
    report = grow_vocab(llama, tmp_path / "big", chinese, say=quiet)
    assert report.parity.passed
    assert report.parity.max_logit_difference == 0.0
    assert report.parity.columns == 331


def test_pieces_that_never_come_out_are_left_out(llama: Path, chinese: Path) -> None:
    proto = read_proto(chinese)
    piece = proto.pieces.add()
    piece.piece, piece.score, piece.type = "沙漠骆驼", -1.0, 1  # nothing makes 骆驼, nor 漠骆
    growth = plan_growth(load_tokenizer(llama), proto, llama, 331)
    assert "沙漠骆驼" not in growth.pieces
    assert growth.unreachable >= 1
    assert growth.old_ids.count(-1) == len(growth.pieces) == len(growth.made_of)


@pytest.mark.slow
def test_what_cannot_grow_is_refused(llama: Path, chinese: Path, tmp_path: Path) -> None:
    bloom = tiny_model(tmp_path / "bloom", "bloom")
    with pytest.raises(ModelError, match="sentencepiece BPE"):
        grow_vocab(bloom, tmp_path / "big", chinese, verify=False, say=quiet)
    with pytest.raises(ModelError, match="no new word"):
        grow_vocab(llama, tmp_path / "big", llama / "tokenizer.model", verify=False, say=quiet)
    (tmp_path / "cut.model").write_bytes(chinese.read_bytes()[:1001])
    with pytest.raises(ModelError, match="sentencepiece"):
        grow_vocab(llama, tmp_path / "big", tmp_path / "cut.model", verify=False, say=quiet)
    assert not (tmp_path / "big").exists()
    assert read_spm(chinese) is not None
