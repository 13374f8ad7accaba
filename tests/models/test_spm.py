"""sentencepiece's own ids are the oracle for what we make of its models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tuoling.errors import ModelError
from tuoling.models.spm import BYTE, CONTROL, NORMAL, UNKNOWN, bpe_from_pieces, tokenizer_from_spm
from tuoling.models.tokenizers import load_tokenizer

TEXTS = [
    "Hello 你好，世界！ two  spaces\nline",
    "  lead 𠮷",
    "   ",
    "",
    "a\t b\r\n",
    "x" * 40,
    "　全角　空格",
    "\U0001f600🐫",
]


@pytest.mark.slow
def test_same_ids_and_text_as_sentencepiece(shared_data: Path) -> None:
    import sentencepiece

    path = shared_data / "tokenizers/mistral-v1/tokenizer.model"
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ours, names = tokenizer_from_spm(path)
    rows = (shared_data / "domain/domain.train.json").read_text(encoding="utf-8").splitlines()[:200]
    texts = TEXTS + [json.loads(row)["output"] for row in rows]
    for text in texts:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == oracle.encode(text), text
        assert ours.decode(ids) == oracle.decode(ids), text
    assert names == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def test_merges_follow_scores_not_ids() -> None:
    # "ab" has the lower id, "bc" the better score: sentencepiece joins "bc" first
    pieces = ["<unk>", "<s>", "ab", "bc", "a", "b", "c", "▁"]
    scores = [0.0, 0.0, -2.0, -1.0, -3.0, -4.0, -5.0, -6.0]
    types = [UNKNOWN, CONTROL] + [NORMAL] * 6
    tokenizer = bpe_from_pieces(pieces, scores, types, add_dummy_prefix=False)
    assert tokenizer.encode("abc").tokens == ["a", "bc"]


def test_byte_pieces_hold_what_the_vocabulary_does_not() -> None:
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "你"]
    tokenizer = bpe_from_pieces(pieces, [0.0] * 258, [UNKNOWN, *[BYTE] * 256, NORMAL], add_dummy_prefix=False)
    encoded = tokenizer.encode("你好")
    assert encoded.tokens == ["你", "<0xE5>", "<0xA5>", "<0xBD>"]
    assert tokenizer.decode(encoded.ids) == "你好"


def test_a_file_that_is_no_sentencepiece_model(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x00\x01version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ModelError, match="not a sentencepiece model"):
        load_tokenizer(tmp_path)
