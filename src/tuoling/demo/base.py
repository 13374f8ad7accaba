"""A tokenizer and a small model from nothing: random weights in a folder like any other model's."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

FamilyName = Literal["bloom", "llama"]

SPECIALS = ("<unk>", "<s>", "</s>", "<pad>")
UNK, BOS, EOS, PAD = range(4)

_NUMERALS = "零一二两三四五六七八九十百"
PIECES = rf"[0-9{_NUMERALS}]| ?[A-Za-z]+|\n*(?:(?![{_NUMERALS}])[\u4e00-\u9fff])+:?|.|\n"
"""Digits and Chinese numerals stand alone, so that 37 + 25 is computed from 3, 7, 2 and 5, never looked up."""


@dataclass(frozen=True, slots=True)
class Size:
    """Shape of the demo model. `spread`: standard deviation of its first weights, about 1/sqrt(hidden)."""

    hidden: int = 128
    layers: int = 3
    heads: int = 8
    vocabulary: int = 1024
    spread: float = 0.08


def train_tokenizer(texts: Iterable[str], alphabet: str, *, vocabulary: int) -> Any:
    """A BPE tokenizer (of `tokenizers`) over whole characters: a few hundred of them, then frequent words."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=SPECIALS[UNK], fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
    tokenizer.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(set(alphabet)),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def as_sentencepiece(trained: Any) -> Any:
    """The same words in the one form that llama.cpp has for them: ▁ for spaces, no cutting before merging, and 256 bytes
    for characters it does not know (where it would end the process)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    state = json.loads(trained.to_str())["model"]
    vocab = {token.replace(" ", "▁"): index for token, index in state["vocab"].items()}
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    merges = [(left.replace(" ", "▁"), right.replace(" ", "▁")) for left, right in state["merges"]]
    model = models.BPE(vocab, merges, unk_token=SPECIALS[UNK], fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIALS])
    return tokenizer


def write_blank_model(folder: Path, tokenizer: Any, *, family: FamilyName, size: Size, seed: int) -> int:
    """Write tokenizer, config and random weights; returns the number of parameters."""
    import torch
    from transformers import BloomConfig, BloomForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

    words = tokenizer.get_vocab_size()
    ids: dict[str, Any] = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    torch.manual_seed(seed)
    model: Any
    if family == "bloom":
        model = BloomForCausalLM(
            BloomConfig(
                vocab_size=words,
                hidden_size=size.hidden,
                n_layer=size.layers,
                n_head=size.heads,
                initializer_range=size.spread,
                hidden_dropout=0.0,
                attention_dropout=0.0,
                **ids,
            )
        )
    else:
        model = LlamaForCausalLM(_llama_config(words, size, ids))
        with (
            torch.no_grad()
        ):  # blocks that begin near the identity: 0.76 instead of 0.78 nats after pre-training
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight *= 0.25
                layer.mlp.down_proj.weight *= 0.25
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), SPECIALS, strict=True)),
    ).save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def _llama_config(words: int, size: Size, ids: dict[str, Any]) -> Any:
    """Heads twice as wide as BLOOM's and a narrower feed-forward: rotary positions use up numbers of a head that
    ALiBi leaves to its content (heads of 16 numbers: 72 % of the demo's questions, of 32: 88 %). The bias lets
    a head look at the token before, whatever it is."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=words,
        hidden_size=size.hidden,
        intermediate_size=2 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        head_dim=2 * size.hidden // size.heads,
        attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        max_position_embeddings=512,
        initializer_range=size.spread,
        tie_word_embeddings=True,
        **ids,
    )
