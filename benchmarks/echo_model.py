"""A model that says again and again what its prompt ends with: whose words an answer has is seen at a glance.

Its one attention layer looks BACK tokens back, by position alone, and what it finds there is the next token. So an
answer repeats the last BACK + 1 tokens of its prompt, as long as the keys and values it reads are its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

BACK = 31
ECHOED_BYTES = BACK + 1
"""So many bytes at a prompt's end are its answer, over and over: the tokenizer has a token for each byte."""

HIDDEN = 256
SHARPNESS = 40.0
"""Attention to the neighbours of the place looked at is below e^-40."""


def write_echo_model(folder: Path) -> Path:
    """Write the model and its tokenizer as a Hugging Face folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    words = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE({word: at for at, word in enumerate(words)}, [], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    config = Qwen2Config(
        vocab_size=len(words),
        hidden_size=HIDDEN,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model: Any = Qwen2ForCausalLM(config)
    with torch.no_grad():
        vectors_VH = torch.randn(len(words), HIDDEN)
        model.model.embed_tokens.weight.copy_(vectors_VH)
        model.lm_head.weight.copy_(vectors_VH)
        layer = model.model.layers[0]
        layer.mlp.down_proj.weight.zero_()
        attention = layer.self_attn
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            linear.weight.zero_()
            linear.bias.zero_()
        attention.v_proj.weight.copy_(torch.eye(HIDDEN))
        attention.o_proj.weight.copy_(8 * torch.eye(HIDDEN))  # louder than the token it stands on
        _look_back(attention)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def _look_back(attention: Any) -> None:
    """Queries and keys that are the same everywhere; rotary positions make them meet at BACK."""
    import torch

    half = HIDDEN // 2
    angle = BACK * 10000.0 ** -(torch.arange(half) / half)
    # scores are divided by the root of HIDDEN, and one step beside the place costs about half of all frequencies' sum
    size = (SHARPNESS * HIDDEN**0.5) ** 0.5
    attention.k_proj.bias.copy_(size * torch.cat([torch.ones(half), torch.zeros(half)]))
    attention.q_proj.bias.copy_(size * torch.cat([angle.cos(), -angle.sin()]))
