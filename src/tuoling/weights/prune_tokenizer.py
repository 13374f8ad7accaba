"""A tokenizer.json as data: what its tokens need, and the same tokenizer with fewer of them.

Ids are given anew in the order of the old ones. Everything that decides how text is cut before the model sees it
(normaliser, pre-tokeniser, added tokens, decoder) stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from tuoling.errors import ModelError
from tuoling.language import tr
from tuoling.weights.prune_bpe import BytePairs

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


class TokenizerState:
    """A tokenizer of kind BPE (byte-level or sentencepiece's) or Unigram.

    tokens: id → token as the model writes it (byte-level ones in their own alphabet), added tokens included.
    """

    def __init__(self, text: str) -> None:
        """text: tokenizer.json, as the tokenizers library writes it. Raises ModelError for a kind that is not known."""
        self._state: dict[str, Any] = json.loads(text)
        self._model: dict[str, Any] = self._state["model"]
        self.kind: str = self._model["type"]
        self.added: dict[int, dict[str, Any]] = {
            entry["id"]: entry for entry in self._state.get("added_tokens") or ()
        }
        if self.kind == "BPE":
            self._ids: dict[str, int] = dict(self._model["vocab"])
            self._pairs = self._byte_pairs()
        elif self.kind == "Unigram":
            self._ids = {piece: index for index, (piece, _) in enumerate(self._model["vocab"])}
        else:
            raise _not_prunable(self.kind)
        self.tokens: dict[int, str] = {index: token for token, index in self._ids.items()}
        self.tokens.update({index: entry["content"] for index, entry in self.added.items()})

    def _byte_pairs(self) -> BytePairs:
        for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
            if self._model.get(name):
                raise _not_prunable(f"BPE + {name}")
        return BytePairs(self._ids, self._model["merges"])

    @property
    def byte_level(self) -> bool:
        """True where text becomes bytes first (GPT-2, BLOOM, Qwen), so that 256 tokens can write anything."""
        return '"ByteLevel"' in json.dumps([self._state.get("pre_tokenizer"), self._state.get("decoder")])

    def token_id(self, token: str) -> int | None:
        """The id of a token as the model writes it; None where there is none."""
        return self._ids.get(token)

    def needs(self, index: int) -> frozenset[int] | None:
        """All ids that must be kept for this one to come out, itself among them; None where it never comes out."""
        token = self.tokens.get(index)
        if token is None:
            return None
        if self.kind == "BPE":
            made = self._pairs.needs(token) if token in self._ids else None
            if made is not None:
                return frozenset(self._ids[symbol] for symbol in made)
            alone = index in self.added or self._model.get("ignore_merges") or self._is_byte(token)
            return frozenset((index,)) if alone else None
        if index in self.added:
            return frozenset((index,))
        # Unigram: a character that has no piece of its own is "unknown" there, with a score of its own
        return frozenset((index, *(self._ids[char] for char in token if char in self._ids)))

    @cache  # noqa: B019 (a state lives as long as one command)
    def always(self) -> frozenset[int]:
        """Ids that any smaller tokenizer keeps: special tokens, bytes, the unknown token, those of the frame.

        Of a Unigram also the pieces with the lowest and the highest score, which the scores of unknown characters
        and of user-defined pieces are counted from. Of the added tokens that are not special those in ASCII.
        """
        kept = {
            index for index, entry in self.added.items() if entry["special"] or entry["content"].isascii()
        }
        if self.byte_level:
            from tokenizers.pre_tokenizers import ByteLevel

            kept |= {self._ids[char] for char in ByteLevel.alphabet() if char in self._ids}
        kept |= {self._ids[token] for token in self._ids if self._is_byte(token)}
        kept |= set(_post_processor_ids(self._state.get("post_processor")))
        if self.kind == "Unigram":
            scores = [score for _, score in self._model["vocab"]]
            kept |= {scores.index(min(scores)), scores.index(max(scores))}
            kept |= {self._model["unk_id"]} if self._model.get("unk_id") is not None else set()
        elif self._model.get("unk_token"):
            kept.add(self._ids[self._model["unk_token"]])
        return frozenset(kept)

    def _is_byte(self, token: str) -> bool:
        """`<0x0A>` of a tokenizer that falls back to bytes."""
        return bool(self._model.get("byte_fallback")) and len(token) == 6 and token.startswith("<0x")

    def restricted(self, old_ids: Sequence[int]) -> str:
        """tokenizer.json with these tokens only; the new id of each is its place in `old_ids`, which ascends."""
        new_of = {old: new for new, old in enumerate(old_ids)}
        model = dict(self._model)
        if self.kind == "BPE":
            vocab = {token: new_of[index] for token, index in self._ids.items() if index in new_of}
            model["vocab"] = dict(sorted(vocab.items(), key=lambda item: item[1]))
            model["merges"] = [list(pair) for pair in self._pairs.among(vocab)]
        else:
            pieces = self._model["vocab"]
            model["vocab"] = [pieces[index] for index in old_ids if index < len(pieces)]
            if model.get("unk_id") is not None:
                model["unk_id"] = new_of[model["unk_id"]]
        added = [
            {**entry, "id": new_of[index]} for index, entry in sorted(self.added.items()) if index in new_of
        ]
        return self._written(model, added, new_of)

    @property
    def merges(self) -> list[tuple[str, str]]:
        """The merges of a BPE, the best first."""
        return self._pairs.merges

    def extended(self, tokens: Sequence[str], merges: Iterable[tuple[str, str]]) -> str:
        """tokenizer.json of a BPE with more tokens behind its own, merged after its own; added tokens move behind."""
        first = len(self._ids)
        new_of = {index: index if index < first else index + len(tokens) for index in self.tokens}
        vocab = {**self._ids, **{token: first + place for place, token in enumerate(tokens)}}
        joined = [list(pair) for pair in (*self.merges, *merges)]
        added = [{**entry, "id": new_of[index]} for index, entry in sorted(self.added.items())]
        return self._written({**self._model, "vocab": vocab, "merges": joined}, added, new_of)

    def _written(self, model: dict[str, Any], added: list[dict[str, Any]], new_of: Mapping[int, int]) -> str:
        state = {**self._state, "model": model, "added_tokens": added, "padding": None, "truncation": None}
        state["post_processor"] = _renumbered(self._state.get("post_processor"), new_of)
        return json.dumps(state, ensure_ascii=False, indent=2)


def _not_prunable(kind: str) -> ModelError:
    return ModelError(
        tr(
            f"a tokenizer of kind {kind} cannot be made smaller: only BPE and Unigram can",
            f"{kind} 类型的分词器无法缩小：只支持 BPE 与 Unigram",
        )
    )


def _post_processor_ids(part: Any) -> Iterable[int]:
    """Ids inside a post-processor: templates, BERT's and RoBERTa's `sep` and `cls`, sequences of them."""
    if not isinstance(part, Mapping):
        return
    for entry in (part.get("special_tokens") or {}).values():
        yield from entry["ids"]
    for name in ("sep", "cls"):
        if name in part:
            yield part[name][1]
    for inner in part.get("processors") or ():
        yield from _post_processor_ids(inner)


def _renumbered(part: Any, new_of: Mapping[int, int]) -> Any:
    """A post-processor with new ids."""
    if not isinstance(part, Mapping):
        return part
    changed = dict(part)
    if "special_tokens" in part:
        changed["special_tokens"] = {
            token: {**entry, "ids": [new_of[index] for index in entry["ids"]]}
            for token, entry in part["special_tokens"].items()
        }
    for name in ("sep", "cls"):
        if name in part:
            changed[name] = [part[name][0], new_of[part[name][1]]]
    if "processors" in part:
        changed["processors"] = [_renumbered(inner, new_of) for inner in part["processors"]]
    return changed


def closed(state: TokenizerState, ids: Iterable[int]) -> tuple[set[int], list[int]]:
    """`ids` with everything they need, and those among them that merges never make (they are left out)."""
    kept: set[int] = set()
    unreachable = []
    for index in ids:
        if index in kept and index not in state.added:
            continue
        needed = state.needs(index)
        if needed is None:
            unreachable.append(index)
        else:
            kept |= needed
    return kept, unreachable


def token_names(state: TokenizerState, ids: Collection[int], limit: int = 5) -> str:
    """The first tokens of some ids, for messages."""
    shown = ", ".join(repr(state.tokens.get(index, index)) for index in sorted(ids)[:limit])
    return shown + (" …" if len(ids) > limit else "")
