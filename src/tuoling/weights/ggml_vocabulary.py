"""The word lists of GGUF and old ggml files as a tokenizer in Hugging Face's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuoling.errors import ModelError
from tuoling.files import write_json
from tuoling.infer import gguf_keys
from tuoling.language import tr
from tuoling.models.spm import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, USER_DEFINED, bpe_from_pieces
from tuoling.weights.gguf_tokenizer import PRE_TOKENIZERS, UNUSED, WHOLE_WORDS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_PATTERNS = {name: pattern for pattern, name in PRE_TOKENIZERS.items()}
_NORMAL_FORM = ("qwen2",)
"""Pre-tokenizers whose tokenizers bring text into normal form C, where the file does not say."""
_NAMES = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}


@dataclass
class WrittenVocabulary:
    """ids: bos_token_id and others for the configs. notes: what is not certain, in words."""

    ids: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def write_gguf_vocabulary(metadata: Mapping[str, Any], words: int, folder: Path) -> WrittenVocabulary:
    """Write the tokenizer, the stops and the chat template of a GGUF file's metadata into `folder`.

    Raises ModelError where its lists do not fit each other or the `words` rows of the embedding.
    """
    said = {
        key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items() if "tokenizer" in key
    }
    tokens, kind = said.get("tokens"), said.get("model")
    written = WrittenVocabulary()
    if not isinstance(tokens, list) or kind not in ("llama", "gpt2"):
        written.notes.append(
            tr(
                f"its tokenizer (kind {kind}) is not written: copy the model's own tokenizer.json into the folder",
                f"未写出其分词器（类型 {kind}）：请把该模型的 tokenizer.json 复制到目录中",
            )
        )
        return written
    types = said.get("token_type") or [NORMAL] * len(tokens)
    scores = said.get("scores") or [0.0] * len(tokens)
    if not len(tokens) == len(types) == len(scores) or len(tokens) > words or len(set(tokens)) < len(tokens):
        raise ModelError(
            tr(
                f"{len(tokens)} tokens ({len(set(tokens))} different), {len(types)} types, {len(scores)} scores, "
                f"{words} embeddings: they do not fit each other",
                f"{len(tokens)} 个词（{len(set(tokens))} 个不同）、{len(types)} 个类型、{len(scores)} 个分数、"
                f"{words} 行嵌入：彼此不符",
            )
        )
    if kind == "llama":
        backend = _sentencepiece(tokens, scores, types, said)
    else:
        backend = _byte_level(tokens, types, said, metadata, written)
    named = {}
    for name, short in _NAMES.items():
        index = said.get(f"{short}_token_id")
        if isinstance(index, int) and 0 <= index < len(tokens):
            named[name] = tokens[index]
            written.ids[f"{name}_id"] = index
    begins = said.get("add_bos_token", kind == "llama")
    save_tokenizer(backend, folder, named, begins=bool(begins))
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str) and template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return written


def save_tokenizer(backend: Tokenizer, folder: Path, named: Mapping[str, str], *, begins: bool) -> None:
    """tokenizer.json and its config. begins: every text begins with the begin token."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    begin = named.get("bos_token")
    if begins and begin is not None:
        ids = [(begin, backend.token_to_id(begin))]
        backend.post_processor = TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=ids
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        add_bos_token=begins and begin is not None,
        add_eos_token=False,
        **named,
    )
    tokenizer.save_pretrained(folder)


def write_generation_config(folder: Path, ids: Mapping[str, int], more: Mapping[str, Any]) -> None:
    """Token ids and settings, the stops among them."""
    settings = {name: value for name, value in ids.items() if name != "unk_token_id"}
    if settings or more:
        write_json(folder / "generation_config.json", {**more, **settings})


def _sentencepiece(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], said: Mapping[str, Any]
) -> Tokenizer:
    """Rows that nobody has a piece for stay out; they are the last ones."""
    used = len(tokens)
    while used and types[used - 1] == UNUSED:
        used -= 1
    prefix = bool(said.get("add_space_prefix", True))
    return bpe_from_pieces(tokens[:used], scores[:used], types[:used], add_dummy_prefix=prefix)


def _byte_level(
    tokens: Sequence[str],
    types: Sequence[int],
    said: Mapping[str, Any],
    metadata: Mapping[str, Any],
    written: WrittenVocabulary,
) -> Tokenizer:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    vocab = {
        token: index for index, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != UNUSED
    }
    pairs = [tuple(merge.split(" ", 1)) for merge in said.get("merges") or []]
    merges = [(pair[0], pair[1]) for pair in pairs if len(pair) == 2 and "".join(pair) in vocab]
    pre = said.get("pre", "gpt-2")
    backend = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=pre in WHOLE_WORDS))
    steps: list[Any] = []
    if pre in _PATTERNS:
        steps = [pre_tokenizers.Split(Regex(_PATTERNS[pre]), behavior="isolated", invert=False)]
    elif pre == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True)]
    elif pre not in ("gpt-2", "default"):
        written.notes.append(
            tr(
                f"how {pre} cuts words is not known here and GPT-2's way is taken: copy the model's own tokenizer.json "
                "into the folder",
                f"不知道 {pre} 的切词方式，按 GPT-2 处理：请把该模型自己的 tokenizer.json 复制到目录中",
            )
        )
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in _PATTERNS)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, last]) if steps else last
    if metadata.get(gguf_keys.NORMAL_FORM, pre in _NORMAL_FORM):
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    for special, wanted in ((True, CONTROL), (False, USER_DEFINED)):
        added = [token for token, kind in zip(tokens, types, strict=True) if kind == wanted]
        made = [AddedToken(token, normalized=False, special=special) for token in added]
        (backend.add_special_tokens if special else backend.add_tokens)(made)
    return backend


def pieces_of_old_ggml(
    strings: Sequence[bytes],
) -> tuple[list[str], list[float], list[int]]:
    """Sentencepiece's pieces, scores and types from the bare strings of an old ggml file.

    The file keeps no scores. LLaMA's are minus the place among the ordinary pieces, but for runs of spaces, which
    come last of all.
    """
    bytes_from = next(
        (
            start
            for start in range(len(strings) - 255)
            if all(strings[start + byte] == bytes([byte]) for byte in range(256))
        ),
        None,
    )
    pieces, scores, types = [], [], []
    for index, string in enumerate(strings):
        byte = index - bytes_from if bytes_from is not None else -1
        if index == 0 and string == " ⁇ ".encode():
            piece, kind = "<unk>", UNKNOWN
        elif not string:
            piece, kind = {1: "<s>", 2: "</s>"}.get(index, f"<control_{index}>"), CONTROL
        elif 0 <= byte < 256:
            piece, kind = f"<0x{byte:02X}>", BYTE
        else:
            piece, kind = string.decode("utf-8", "replace").replace(" ", SPACE), NORMAL
        run = kind == NORMAL and len(piece) > 1 and not piece.strip(SPACE)
        pieces.append(piece)
        scores.append(-1e9 if run else -float(index) if kind == NORMAL else 0.0)
        types.append(kind)
    return pieces, scores, types
