"""A Hugging Face tokenizer as GGUF's lists: byte-level BPE with its pre-tokenizer's name, or sentencepiece's pieces."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tuoling.errors import ModelError
from tuoling.infer import gguf_keys
from tuoling.language import tr
from tuoling.models.adapters import some
from tuoling.models.spm import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, USER_DEFINED

if TYPE_CHECKING:
    from tuoling.text.tokenizer import TextTokenizer

UNUSED = 5
"""The sixth of sentencepiece's piece types: a row of the embedding that no token has."""

BYTES = 256
"""Tokens <0x00> to <0xFF>, in which sentencepiece spells what it has no piece for."""

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {
    r" ?[^(\s|[.,!?…。，、।۔،])]+": "bloom",
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}": "qwen2",
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?"
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+": "tekken",
}
"""Regular expressions in tokenizer.json → llama.cpp's name for the same splitting, for a byte-level BPE."""

WHOLE_WORDS = ("llama-bpe", "tekken")
"""Pre-tokenizers with which llama.cpp takes a word that is in the vocabulary whole (`ignore_merges`)."""


@dataclass
class Vocabulary:
    """What goes under `tokenizer.ggml`, and two facts that llama.cpp has no key for.

    model:        "gpt2" (byte-level BPE) or "llama" (sentencepiece).
    marks_spaces: a text that begins with a space gets a word mark in front of it too.
    normal_form:  text is brought into Unicode's normal form C.
    """

    model: str
    tokens: list[str]
    types: list[int]
    pre: str = "default"
    scores: list[float] | None = None
    merges: list[str] | None = None
    add_space_prefix: bool = False
    marks_spaces: bool = True
    normal_form: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def lacks_bytes(self) -> bool:
        """Whether llama.cpp would end the process at a character that no token holds."""
        return self.model == "llama" and self.types.count(BYTE) < BYTES


def read_vocabulary(
    tokenizer: TextTokenizer,
    rows: int,
    *,
    pre_tokenizer: str | None = None,
    unchecked: bool = False,
) -> Vocabulary:
    """The tokenizer's lists, padded to the `rows` of the embedding.

    pre_tokenizer: llama.cpp's name for it, where it cannot be told by the file.
    unchecked:     take a sentencepiece vocabulary without a token for every byte.
    Raises ModelError for a tokenizer that llama.cpp has no kind for, one with more tokens than rows, or one without
    those byte tokens.
    """
    backend = getattr(tokenizer.hf, "backend_tokenizer", None)
    if backend is None:
        raise _no_kind(type(tokenizer.hf).__name__)
    state = json.loads(backend.to_str())
    tokens, types, notes = _tokens(tokenizer, rows)
    model = state["model"]
    if model["type"] != "BPE":
        raise _no_kind(model["type"])
    if "ByteLevel" in {step["type"] for step in _steps(state, "pre_tokenizer")}:
        vocabulary = Vocabulary("gpt2", tokens, types, notes=notes)
        _byte_level(vocabulary, state, pre_tokenizer)
    else:
        vocabulary = Vocabulary("llama", tokens, types, notes=notes)
        _sentencepiece(vocabulary, state)
        if vocabulary.lacks_bytes:
            vocabulary.notes.append(_without_bytes(vocabulary, unchecked=unchecked))
    return vocabulary


def _no_kind(kind: str) -> ModelError:
    return ModelError(
        tr(f"llama.cpp has no tokenizer of the kind {kind}", f"llama.cpp 没有 {kind} 类型的分词器"),
        remedy=tr(
            "byte-level BPE and sentencepiece BPE can be written", "可以写出字节级 BPE 与 sentencepiece BPE"
        ),
    )


def _tokens(tokenizer: TextTokenizer, rows: int) -> tuple[list[str], list[int], list[str]]:
    """Text and type of every row. Rows without a token get names that nobody has: llama.cpp aborts on doubles."""
    notes = []
    by_id: dict[int, str] = {}
    for text, index in tokenizer.hf.get_vocab().items():
        by_id[index] = text
    beyond = sorted(index for index in by_id if index >= rows)
    if beyond:
        special = tokenizer.added_beyond(rows)
        if special is None:
            raise ModelError(
                tr(
                    f"the tokenizer has {max(by_id) + 1} tokens, the embedding {rows} rows",
                    f"分词器有 {max(by_id) + 1} 个词，而嵌入只有 {rows} 行",
                ),
                remedy=tr(
                    "the tokenizer belongs to another model: copy the right one into the folder",
                    "分词器属于另一个模型：请把正确的分词器复制到该目录",
                ),
            )
        notes.append(
            tr(
                f"left out, they have no embedding: {some(special)}",
                f"未写入以下没有嵌入的特殊词：{some(special)}",
            )
        )
    added = tokenizer.hf.backend_tokenizer.get_added_tokens_decoder()
    taken = set(by_id.values())
    tokens, types, padded = [], [], 0
    for index in range(rows):
        text = by_id.get(index)
        if text is None:
            name = f"[PAD{index}]"
            tokens.append(name if name not in taken else f"[UNUSED_ROW_{index}]")
            types.append(UNUSED)
            padded += 1
            continue
        tokens.append(text)
        if tokenizer.is_special(index):
            types.append(CONTROL)
        else:
            types.append(USER_DEFINED if index in added else NORMAL)
    if padded:
        notes.append(
            tr(
                f"{padded} rows of the embedding have no token: named [PAD…]",
                f"嵌入中有 {padded} 行没有对应的词：以 [PAD…] 命名",
            )
        )
    return tokens, types, notes


def _steps(state: dict[str, Any], key: str) -> list[dict[str, Any]]:
    part = state.get(key)
    inner = {"pre_tokenizer": "pretokenizers", "normalizer": "normalizers"}[key]
    return part.get(inner, [part]) if part else []


# -- byte-level BPE ----------------------------------------------------------------------------------------------


def _byte_level(vocabulary: Vocabulary, state: dict[str, Any], asked: str | None) -> None:
    vocabulary.pre = asked or _pre_tokenizer(_steps(state, "pre_tokenizer"))
    model = state["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    vocabulary.merges = merges
    whole = bool(model.get("ignore_merges"))
    if whole != (vocabulary.pre in WHOLE_WORDS) and _unreachable(vocabulary, model["merges"]):
        vocabulary.notes.append(
            tr(
                "some words that are tokens may be cut otherwise by llama.cpp (ignore_merges)",
                "个别整词在 llama.cpp 中可能切分不同（ignore_merges）",
            )
        )
    steps = [step["type"] for step in _steps(state, "normalizer")]
    vocabulary.normal_form = "NFC" in steps
    other = [step for step in steps if step != "NFC"]
    if other:
        vocabulary.notes.append(
            tr(
                f"llama.cpp does not normalise text as this tokenizer does ({', '.join(other)})",
                f"llama.cpp 不做该分词器的文本规范化（{'、'.join(other)}）",
            )
        )


def _unreachable(vocabulary: Vocabulary, merges: Sequence[Any]) -> bool:
    """Whether some token of several characters is made by no merge."""
    made = {pair.replace(" ", "", 1) if isinstance(pair, str) else "".join(pair) for pair in merges}
    return any(
        len(text) > 1 and kind == NORMAL and text not in made
        for text, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
    )


def _pre_tokenizer(steps: Sequence[dict[str, Any]]) -> str:
    """llama.cpp's name for how a text is cut into words. Raises ModelError where it has none."""
    last = steps[-1]
    before = list(steps[:-1])
    if not last.get("add_prefix_space") and last["type"] == "ByteLevel":
        if last.get("use_regex", True):
            if not before:
                return "gpt-2"
            if len(before) == 1 and before[0] == {"type": "Digits", "individual_digits": True}:
                return "smollm"
        elif len(before) == 1 and before[0]["type"] == "Split" and not before[0].get("invert"):
            pattern = before[0]["pattern"].get("Regex", "")
            if before[0].get("behavior") in ("Isolated", "Removed") and pattern in PRE_TOKENIZERS:
                return PRE_TOKENIZERS[pattern]
    shown = json.dumps([*before, last], ensure_ascii=False)
    raise ModelError(
        tr(
            f"llama.cpp's name for this way of cutting words is not known: {shown:.200}",
            f"不知道 llama.cpp 对这种切词方式的名称：{shown:.200}",
        ),
        remedy=tr(
            "name the nearest: --pre-tokenizer gpt-2 | qwen2 | llama-bpe | bloom | …",
            "请指定最接近的一种：--pre-tokenizer gpt-2 | qwen2 | llama-bpe | bloom | …",
        ),
    )


# -- sentencepiece -----------------------------------------------------------------------------------------------


def _sentencepiece(vocabulary: Vocabulary, state: dict[str, Any]) -> None:
    model = state["model"]
    unknown = model.get("unk_token")
    for index, text in enumerate(vocabulary.tokens):
        if text == unknown:
            vocabulary.types[index] = UNKNOWN
        elif len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            vocabulary.types[index] = BYTE
    normalizer, pre = _steps(state, "normalizer"), _steps(state, "pre_tokenizer")
    prepends = any(step["type"] == "Prepend" for step in normalizer)
    metaspace = any(
        step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never" for step in pre
    )
    vocabulary.add_space_prefix = prepends or metaspace
    vocabulary.marks_spaces = prepends
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    vocabulary.scores = _scores_of_merges(vocabulary, pairs)


def _without_bytes(vocabulary: Vocabulary, *, unchecked: bool) -> str:
    """What to tell of a vocabulary with which llama.cpp ends the process (an exception that nothing catches) at the
    first character that no token holds. Raises ModelError unless `unchecked`."""
    lacking = BYTES - vocabulary.types.count(BYTE)
    said = tr(
        f"{lacking} of the 256 byte tokens (<0x00> to <0xFF>) are missing: llama.cpp ends the whole program at the first "
        "character that is in no token",
        f"256 个字节词（<0x00> 至 <0xFF>）缺 {lacking} 个：llama.cpp 一遇到词表外的字符，整个程序就会中止",
    )
    if unchecked:
        return said
    raise ModelError(
        said,
        remedy=tr(
            "train with a tokenizer that has them (sentencepiece: byte_fallback), or use the model as it is\n"
            "where every text is known beforehand: --unchecked, which the file then says",
            "请改用带字节回退的分词器（sentencepiece 的 byte_fallback），或不转换、直接使用该模型\n"
            "若能保证文本都在词表内：--unchecked，文件中会注明",
        ),
    )


def _scores_of_merges(vocabulary: Vocabulary, pairs: Sequence[tuple[str, ...]]) -> list[float]:
    """Scores that make llama.cpp merge in the order of the merges: minus the rank of the first that makes a piece.

    llama.cpp merges any two pieces whose sum is a piece, whatever the list says, so that a list which does not
    hold every such pair, or ranks two ways to one piece far apart, is followed only nearly; both are counted.
    """
    rank: dict[str, int] = {}
    apart = 0
    before = ""
    for number, pair in enumerate(pairs):
        piece = "".join(pair)
        if piece in rank:
            apart += piece != before
        else:
            rank[piece] = number
        before = piece
    known = set(pairs)
    index = {text: n for n, text in enumerate(vocabulary.tokens) if vocabulary.types[n] == NORMAL}
    absent = sum(
        (piece[:cut], piece[cut:]) not in known
        for piece in index
        for cut in range(1, len(piece))
        if piece[:cut] in index and piece[cut:] in index
    )
    if apart or absent:
        vocabulary.notes.append(
            tr(
                f"not sentencepiece's own merges ({absent} pairs absent, {apart} out of order): llama.cpp may cut rare "
                "words otherwise",
                f"合并表并非 sentencepiece 原有（缺 {absent} 对，{apart} 对次序不同）：llama.cpp 对个别词的切分可能不同",
            )
        )
    lowest = float(-len(pairs) - 1)
    return [
        float(-rank[text])
        if text in rank
        else (lowest if kind == NORMAL and len(text.strip(SPACE)) > 1 else 0.0)
        for text, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
    ]


def write_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """Put the lists into a gguf.GGUFWriter."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    writer.add_bool(gguf_keys.MARKS_SPACES, vocabulary.marks_spaces)
    writer.add_bool(gguf_keys.NORMAL_FORM, vocabulary.normal_form)
