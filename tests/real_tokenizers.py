"""Tokenizers of four kinds, wrapped: real ones from the test data folder, and a tiny one that is always there."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from tests.tiny import tiny_tokenizer

from tuoling.text.tokenizer import TextTokenizer

NAMES = ("tiny", "neox", "openllama", "minimind", "mistral")


@cache
def _load(name: str, folder: Path) -> TextTokenizer:
    from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

    if name == "neox":  # byte-level BPE without a begin token
        file = folder / "gpt-neox-20b" / "20B_tokenizer.json"
        return TextTokenizer(PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|endoftext|>"))
    if (
        name == "openllama"
    ):  # sentencepiece BPE with byte fallback; puts a word mark after every special token
        file = folder / "openllama-zh-en" / "tokenizer.json"
        return TextTokenizer(
            PreTrainedTokenizerFast(tokenizer_file=str(file), bos_token="<s>", eos_token="</s>")
        )
    if name == "minimind":  # byte-level BPE with chat tokens and a chat template
        return TextTokenizer(AutoTokenizer.from_pretrained(folder / "minimind"))
    # a sentencepiece model; puts a word mark in front of a text only
    return TextTokenizer(LlamaTokenizer.from_pretrained(folder / "mistral-v1"))


def load(name: str, request: pytest.FixtureRequest) -> TextTokenizer:
    """The tokenizer of this name; skips the test where the data folder is absent."""
    if name == "tiny":
        return _tiny()
    return _load(name, request.getfixturevalue("shared_data") / "tokenizers")


@cache
def _tiny() -> TextTokenizer:
    return TextTokenizer(tiny_tokenizer())
