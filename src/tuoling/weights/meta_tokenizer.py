"""Meta's tokenizer.model (sentencepiece, or LLaMA 3's list of byte strings) as Hugging Face's files."""

from __future__ import annotations

import base64
import binascii
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuoling.errors import ModelError
from tuoling.files import write_json
from tuoling.language import tr
from tuoling.models.spm import tokenizer_from_spm

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.model"

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How LLaMA 3 cuts text before byte pairs are merged."""

_LLAMA3_SPECIAL = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
"""After the byte pairs, as LLaMA 3.1 names them. LLaMA 3 left 4, 8 and 10 reserved and never used them."""


def find_tokenizer(folder: Path) -> Path | None:
    """tokenizer.model in the folder; one above, where Meta kept one for all sizes; or where Hugging Face keeps it."""
    above = [folder.parent] if any(folder.glob("consolidated.*")) else []
    places = [folder, folder / "original", *above]
    return next((place / TOKENIZER for place in places if (place / TOKENIZER).is_file()), None)


def write_tokenizer(path: Path, folder: Path, words: int) -> dict[str, Any]:
    """Write the tokenizer of `path` into a Hugging Face folder and return config.json's token ids.

    words: rows of the embedding; a tokenizer with more is of another model and refused.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    listed = _byte_strings(path)
    if listed is None:
        backend, special = tokenizer_from_spm(path)
    else:
        backend, special = tokenizer_from_byte_strings(listed, words)
    if backend.get_vocab_size() > words:
        raise ModelError(
            tr(
                f"the tokenizer has {backend.get_vocab_size()} words, the embedding {words} rows",
                f"分词器有 {backend.get_vocab_size()} 个词，而词嵌入只有 {words} 行",
            ),
            where=str(path),
            remedy=tr("take the tokenizer.model of the same model", "请使用同一模型的 tokenizer.model"),
        )
    ids = {name: backend.token_to_id(token) for name, token in special.items()}
    begin = special["bos_token"]
    backend.post_processor = TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, ids["bos_token"])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        add_bos_token=True,
        add_eos_token=False,
        **special,
    )
    tokenizer.save_pretrained(folder)
    place = folder / TOKENIZER if listed is None else folder / "original" / TOKENIZER
    place.parent.mkdir(exist_ok=True)
    shutil.copyfile(path, place)
    ends = [ids["eos_token"]]
    if listed is not None:  # chat models end a turn with these, and nothing says whether this is one
        ends += [backend.token_to_id(token) for token in ("<|eom_id|>", "<|eot_id|>")]
    named = {f"{name}_id": ids[name] for name in ("bos_token", "eos_token", "pad_token") if name in ids}
    end = ends[0] if len(ends) == 1 else ends
    write_json(folder / "generation_config.json", {**named, "eos_token_id": end})
    return named


def _byte_strings(path: Path) -> list[bytes] | None:
    """The lines of tiktoken's format, `base64 rank`, in order of rank; None where the file is something else."""
    ranks: dict[int, bytes] = {}
    try:
        for line in path.read_bytes().split(b"\n"):
            if line:
                token, rank = line.split(b" ")
                ranks[int(rank)] = base64.b64decode(token, validate=True)
    except (ValueError, binascii.Error):
        return None
    if not ranks or sorted(ranks) != list(range(len(ranks))):
        return None
    return [ranks[rank] for rank in range(len(ranks))]


def tokenizer_from_byte_strings(strings: list[bytes], words: int) -> tuple[Tokenizer, dict[str, str]]:
    """LLaMA 3's tokenizer: byte pairs merged in the order of their ranks, then the special tokens up to `words`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    letters = _byte_letters()
    vocab = {"".join(letters[byte] for byte in token): rank for rank, token in enumerate(strings)}
    backend = Tokenizer(BPE(vocab=vocab, merges=_merges(vocab), ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    special = _special_names(words - len(strings))
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return backend, {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>",
        "pad_token": "<|finetune_right_pad_id|>",
    }


def _special_names(count: int) -> list[str]:
    """`count` names: the used ones at their places, the reserved ones numbered through the gaps."""
    if count <= max(_LLAMA3_SPECIAL):
        raise ModelError(
            tr(
                f"the embedding leaves room for {max(count, 0)} special tokens; LLaMA 3 has 256",
                f"词嵌入只为特殊词留了 {max(count, 0)} 个位置；LLaMA 3 有 256 个",
            ),
            where=TOKENIZER,
        )
    names, reserved = [], 0
    for place in range(count):
        name = _LLAMA3_SPECIAL.get(place)
        if name is None:
            name, reserved = f"<|reserved_special_token_{reserved}|>", reserved + 1
        names.append(name)
    return names


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    table |= {byte: chr(0x100 + place) for place, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]


def _merges(vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every split of a token into two others, by the token's rank, then by those of its parts."""
    found = []
    for token, rank in vocab.items():
        for cut in range(1, len(token)):
            left, right = vocab.get(token[:cut]), vocab.get(token[cut:])
            if left is not None and right is not None:
                found.append((rank, left, right, (token[:cut], token[cut:])))
    return [pair for *_, pair in sorted(found)]
