"""What can be wrong with a tokenizer before a single step is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tuoling.language import tr
from tuoling.text.templates import Template
from tuoling.text.tokenizer import TextTokenizer


@dataclass(frozen=True, slots=True)
class Finding:
    """error: training or chat would go wrong. repaired: we do the right thing and say so. note: worth knowing."""

    level: Literal["error", "repaired", "note"]
    message: str


def check_tokenizer(
    tokenizer: TextTokenizer,
    *,
    vocab_rows: int | None,
    config: Mapping[str, Any] | None,
    generation_config: Mapping[str, Any] | None,
) -> list[Finding]:
    """Compare the tokenizer with the model's config, generation_config and embedding.

    vocab_rows: rows of the input embedding; None if not known yet.
    """
    findings = [*_check_ids(tokenizer, config or {}, generation_config or {})]
    if tokenizer.eos_id is None:
        findings.append(
            Finding(
                "error",
                tr(
                    "the tokenizer has no end token (eos): trained replies would never stop",
                    "分词器没有结束符（eos）：训练出的回答不会停止",
                ),
            )
        )
    elif tokenizer.eos_id == tokenizer.bos_id:
        findings.append(
            Finding(
                "note",
                tr(
                    f"begin and end token are the same id {tokenizer.eos_id}",
                    f"开始符与结束符是同一个编号 {tokenizer.eos_id}",
                ),
            )
        )
    findings += _check_pad(tokenizer)
    findings += _check_size(tokenizer, vocab_rows)
    return findings


def _check_ids(
    tokenizer: TextTokenizer, config: Mapping[str, Any], generation_config: Mapping[str, Any]
) -> list[Finding]:
    """P1: folders of 2023 say 0 and 1 in the config where the vocabulary says 1 and 2; the vocabulary is right."""
    findings = []
    for key, own in (("bos_token_id", tokenizer.bos_id), ("eos_token_id", tokenizer.eos_id)):
        for name, values in (("config.json", config), ("generation_config.json", generation_config)):
            said = values.get(key)
            if said is None or own is None:
                continue
            allowed = said if isinstance(said, list) else [said]
            if own not in allowed:
                findings.append(
                    Finding(
                        "repaired",
                        tr(
                            f"{name} says {key}={said}, the tokenizer says {own}: the tokenizer's is used",
                            f"{name} 中 {key}={said}，分词器中是 {own}：以分词器为准",
                        ),
                    )
                )
    return findings


def _check_pad(tokenizer: TextTokenizer) -> list[Finding]:
    """P2: where padding is masked by its id, pad = eos means the end token is never learned. Not here."""
    if tokenizer.pad_id is None or tokenizer.pad_id != tokenizer.eos_id:
        return []
    return [
        Finding(
            "repaired",
            tr(
                f"pad and end token are the same id {tokenizer.pad_id}: harmless here, labels come from the rows "
                "and not from ids, so the end token is learned",
                f"填充符与结束符是同一个编号 {tokenizer.pad_id}：在这里无害，标签来自样本而不是编号，结束符照样会学到",
            ),
        )
    ]


def _check_size(tokenizer: TextTokenizer, vocab_rows: int | None) -> list[Finding]:
    """P40: an id beyond the embedding crashes; spare rows in the embedding are usual."""
    if vocab_rows is None:
        return []
    highest = tokenizer.highest_id
    if highest < vocab_rows:
        if len(tokenizer) >= vocab_rows - max(1024, vocab_rows // 10):
            return []
        return [
            Finding(
                "note",
                tr(
                    f"the model has {vocab_rows} embedding rows and the tokenizer {len(tokenizer)} tokens: "
                    "is it this model's tokenizer?",
                    f"模型词向量有 {vocab_rows} 行，分词器有 {len(tokenizer)} 个词：这是该模型的分词器吗？",
                ),
            )
        ]
    beyond = tokenizer.added_beyond(vocab_rows)
    if beyond is not None:
        names = ", ".join(beyond[:5])
        return [
            Finding(
                "note",
                tr(
                    f"added tokens {names} have no embedding row (the model has {vocab_rows}); "
                    "they must not occur in rows",
                    f"附加词 {names} 没有对应的词向量（模型只有 {vocab_rows} 行）；样本中不能出现它们",
                ),
            )
        ]
    return [
        Finding(
            "error",
            tr(
                f"the tokenizer has ids up to {highest}, the model only {vocab_rows} embedding rows: "
                "it is not this model's tokenizer",
                f"分词器的编号最大到 {highest}，模型的词向量只有 {vocab_rows} 行：这不是该模型的分词器",
            ),
        )
    ]


def check_template(template: Template, tokenizer: TextTokenizer) -> list[Finding]:
    """Marks of the template, such as <|im_end|>, that this tokenizer spells out instead of having as one token."""
    spelled = [
        stop for stop in template.stops if stop.startswith("<|") and tokenizer.special_id(stop) is None
    ]
    if not spelled:
        return []
    names = ", ".join(spelled)
    return [
        Finding(
            "note",
            tr(
                f"template {template.id} ends replies with {names}, which this tokenizer spells in several tokens; "
                "a template made of plain text fits it better",
                f"模板 {template.id} 用 {names} 结束回答，而该分词器会把它拆成多个词；改用纯文本的模板更合适",
            ),
        )
    ]
