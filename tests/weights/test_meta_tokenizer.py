"""tokenizer.model of both kinds, against sentencepiece itself and against a naive merger of byte pairs."""

from __future__ import annotations

import base64
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from tuoling.errors import ModelError
from tuoling.models.tokenizers import load_tokenizer
from tuoling.weights.meta_tokenizer import find_tokenizer, tokenizer_from_byte_strings, write_tokenizer

TEXT = "Once upon a time  there were 3 rabbits, 12345 of them!\n\n今天天气很好，我们去公园玩。 don't  \t🙂"


@pytest.mark.slow
def test_sentencepiece_gives_its_own_ids_and_the_right_ends(shared_data: Path, tmp_path: Path) -> None:
    import sentencepiece
    from transformers import AutoTokenizer

    path = shared_data / "tokenizers/mistral-v1/tokenizer.model"
    ids = write_tokenizer(path, tmp_path, words=32000)
    assert ids == {
        "bos_token_id": 1,
        "eos_token_id": 2,
    }  # no pad: a pad that is the end token is never learned
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path)).encode(TEXT)
    assert AutoTokenizer.from_pretrained(tmp_path)(TEXT)["input_ids"] == [1, *theirs]
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.hf.encode(TEXT) == [1, *theirs]
    assert json.loads((tmp_path / "generation_config.json").read_text()) == ids
    assert (tmp_path / "tokenizer.model").read_bytes() == path.read_bytes()


def byte_strings(count: int) -> list[bytes]:
    """A small list in LLaMA 3's way: all bytes, then pairs that occur in some text, most frequent first."""
    text = (TEXT * 3 + "the rabbits upon the park then there were other times").encode()
    tokens = [bytes([byte]) for byte in range(256)]
    parts = [bytes([byte]) for byte in text]
    while len(tokens) < count:
        pairs: dict[bytes, int] = {}
        for left, right in pairwise(parts):
            if not (left[-1:].isalpha() and right[:1] == b" "):
                pairs[left + right] = pairs.get(left + right, 0) + 1
        fresh = {pair: n for pair, n in pairs.items() if pair not in tokens}
        best = max(fresh, key=lambda pair: (fresh[pair], pair))
        tokens.append(best)
        merged: list[bytes] = []
        for part in parts:
            if merged and merged[-1] + part == best:
                merged[-1] = best
            else:
                merged.append(part)
        parts = merged
    return tokens


def naive_encode(text: str, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's rule: cut by the pattern, then always merge the neighbours whose union has the lowest rank."""
    pattern = re.compile(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\w]?[^\W\d_]+|\d{1,3}| ?[^\s\w]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    ids = []
    for piece in pattern.findall(text):
        parts = [bytes([byte]) for byte in piece.encode()]
        while len(parts) > 1:
            best = min(range(len(parts) - 1), key=lambda k: (ranks.get(parts[k] + parts[k + 1], 1 << 30), k))
            if parts[best] + parts[best + 1] not in ranks:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def write_list(path: Path, tokens: list[bytes]) -> Path:
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    path.write_text("".join(lines))
    return path


def test_llama3s_list_gives_what_merging_by_rank_gives(tmp_path: Path) -> None:
    tokens = byte_strings(330)
    path = write_list(tmp_path / "tokenizer.model", tokens)
    out = tmp_path / "out"
    out.mkdir()
    ids = write_tokenizer(path, out, words=330 + 256)
    assert ids == {"bos_token_id": 330, "eos_token_id": 331, "pad_token_id": 334}
    tokenizer = load_tokenizer(out)
    wanted = naive_encode(TEXT, {token: rank for rank, token in enumerate(tokens)})
    assert max(wanted) > 300 and tokenizer.hf.encode(TEXT) == [330, *wanted]
    assert tokenizer.hf.decode(wanted) == TEXT
    assert len(tokenizer.hf) == 330 + 256
    settings = json.loads((out / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [331, 338, 339]
    assert tokenizer.hf.convert_ids_to_tokens([336, 337, 338, 339, 340]) == [
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
        "<|python_tag|>",
    ]
    assert (out / "original/tokenizer.model").is_file() and not (out / "tokenizer.model").exists()


def test_the_lower_rank_is_merged_first() -> None:
    letters = [bytes([byte]) for byte in range(256)]
    for pairs, wanted in (([b"ab", b"bc"], [256, ord("c")]), ([b"bc", b"ab"], [ord("a"), 256])):
        backend, _ = tokenizer_from_byte_strings([*letters, *pairs], words=258 + 256)
        assert backend.encode("abc", add_special_tokens=False).ids == wanted


@pytest.mark.slow
def test_a_tokenizer_of_another_model_is_refused(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "tokenizers/mistral-v1/tokenizer.model"
    with pytest.raises(ModelError, match=r"32000 words.*31999 rows"):
        write_tokenizer(path, tmp_path, words=31999)
    listed = write_list(tmp_path / "tokenizer.model", byte_strings(260))
    with pytest.raises(ModelError, match="256"):
        write_tokenizer(listed, tmp_path / "out", words=262)


@pytest.mark.parametrize("content", [b"", b"not a tokenizer", b"aGk= 0\naGk= 2\n", bytes(range(256))])
def test_a_damaged_tokenizer_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="sentencepiece"):
        write_tokenizer(path, tmp_path, words=32000)


def test_where_tokenizers_are_looked_for(tmp_path: Path) -> None:
    folder = tmp_path / "7B"
    folder.mkdir()
    (tmp_path / "tokenizer.model").write_text("one for all sizes")
    assert find_tokenizer(folder) is None
    (folder / "consolidated.00.pth").write_text("")
    assert find_tokenizer(folder) == tmp_path / "tokenizer.model"
    (folder / "original").mkdir()
    (folder / "original/tokenizer.model").write_text("Hugging Face's place")
    assert find_tokenizer(folder) == folder / "original/tokenizer.model"
