"""A tokenizer that keeps rows and templates apart, and decodes without half characters.

Two rules that plain `tokenizer(text)` does not keep:

- Special tokens count only where the template wrote them. `<|im_end|>` or `</s>` typed into a row is text.
  (Added tokens that are not special, such as `<think>`, are words like any other.)
- No spaces out of nothing. Sentencepiece-like tokenizers put a word mark (a space) in front of every text they
  are given. Here only the first text of an example and the text after a begin token get it; text after another
  special token follows the tokenizer's own habit; an answer that continues its prompt never gets it.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from tuoling.errors import ModelError
from tuoling.files import sha256_text
from tuoling.language import tr
from tuoling.text.stream import StreamDecoder

if TYPE_CHECKING:
    import tokenizers

    from tuoling.text.render import Segment

__all__ = ["Encoded", "Span", "StreamDecoder", "TextTokenizer"]

Span = tuple[int, int]
Encoded = tuple[list[int], list[Span]]

_PROBE = "a"
_GUARD = "\n"


class TextTokenizer:
    """Wraps a transformers tokenizer, fast or not. `hf` is the wrapped one; it is never changed for good."""

    def __init__(self, hf: Any) -> None:
        self.hf = hf
        self.bos_id: int | None = hf.bos_token_id
        self.eos_id: int | None = hf.eos_token_id
        self.pad_id: int | None = hf.pad_token_id
        self._unk_id: int | None = hf.unk_token_id
        backend = getattr(hf, "backend_tokenizer", None) if getattr(hf, "is_fast", False) else None
        self._fast: tokenizers.Tokenizer | None = backend
        self._inside: tokenizers.Tokenizer | None = backend
        self._json = ""
        self._lock = threading.Lock()
        if backend is not None:
            with self._lock:
                backend.no_padding()
                backend.no_truncation()
            self._json = backend.to_str()
            self._inside = _without_word_mark(self._json, backend)
        specials = _special_tokens(hf)
        self._special_ids = {text: token_id for text, (token_id, _, _) in specials.items()}
        self._special_numbers = frozenset(self._special_ids.values())
        self._special_re = _special_pattern(specials)
        self._parts: dict[str, list[str | int]] = {}
        self.marks_words = self._encode_start([_PROBE]) != self._encode_inside([_PROBE])
        self._mark_after_special = self.marks_words and self._marks_after_special()
        self.adds_bos = self.bos_id is not None and list(hf("")["input_ids"][:1]) == [self.bos_id]

    # -- to other processes ------------------------------------------------------------------------------------

    @property
    def portable(self) -> bool:
        """Whether it can be pickled. What comes out encodes rows alike, and has no `hf`."""
        return self._json != ""

    @property
    def size_bytes(self) -> int:
        """Of a portable one, as JSON."""
        return len(self._json)

    def __getstate__(self) -> dict[str, Any]:
        if not self.portable:
            raise TypeError("a tokenizer that is not a fast one stays in its process")
        return {
            name: value
            for name, value in vars(self).items()
            if name not in ("hf", "_lock", "_fast", "_inside")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        import tokenizers

        vars(self).update(state)
        self.hf = None
        self._lock = threading.Lock()
        self._fast = tokenizers.Tokenizer.from_str(self._json)
        self._inside = _without_word_mark(self._json, self._fast)

    # -- facts -------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.hf)

    @property
    def chat_template(self) -> str | None:
        """The jinja chat template that came with the tokenizer."""
        template = getattr(self.hf, "chat_template", None)
        return template if isinstance(template, str) and template else None

    def fingerprint(self) -> str:
        """Hash of everything that decides ids: part of the key of a token store."""
        body = self._json or json.dumps(self.hf.get_vocab(), sort_keys=True)
        facts = [
            type(self.hf).__name__ if not self._json else "fast",
            self.bos_id,
            self.eos_id,
            self.adds_bos,
        ]
        return sha256_text(json.dumps(facts) + body)

    @property
    def highest_id(self) -> int:
        """The largest id the tokenizer can give."""
        return max(self.hf.get_vocab().values(), default=-1)

    def added_beyond(self, rows: int) -> list[str] | None:
        """Special tokens with ids from `rows` on, if nothing else lies there; None if ordinary words do."""
        beyond = [text for text, token_id in self.hf.get_vocab().items() if token_id >= rows]
        return sorted(beyond) if all(text in self._special_ids for text in beyond) else None

    @property
    def marks_after_special(self) -> bool:
        """Whether text behind a special token begins with a word mark."""
        return self._mark_after_special

    def is_special(self, token_id: int) -> bool:
        """True for ids of special tokens."""
        return token_id in self._special_numbers

    def special_id(self, text: str) -> int | None:
        """The id of a special token, if `text` is exactly one."""
        return self._special_ids.get(text)

    # -- encoding ----------------------------------------------------------------------------------------------

    def encode_segments(self, segments: Sequence[Segment]) -> Encoded:
        """Ids of one example, and the half-open spans of the learned ones."""
        return self.encode_batch([segments])[0]

    def encode_batch(self, batch: Sequence[Sequence[Segment]]) -> list[Encoded]:
        """Ids and learned spans of many examples; all their text goes through one tokenizer call.

        Raises ModelError where an end token must be learned and the tokenizer has none.
        """
        pieces = _Pieces()
        plans = [self._plan(segments, pieces) for segments in batch]
        start, inside = self._encode_start(pieces.start), self._encode_inside(pieces.inside)
        out = []
        for plan in plans:
            ids: list[int] = []
            spans: list[Span] = []
            for where, index, learned in plan:
                begin = len(ids)
                if where == _ID:
                    ids.append(index)
                elif begin:
                    ids += start[index] if where == _START else inside[index]
                else:
                    ids = start[index] if where == _START else inside[index]  # nobody else has it
                end = len(ids)
                if learned and end > begin:
                    if spans and spans[-1][1] == begin:
                        spans[-1] = (spans[-1][0], end)
                    else:
                        spans.append((begin, end))
            out.append((ids, spans))
        return out

    def count(self, segments: Sequence[Segment]) -> int:
        """Number of tokens of one example."""
        return len(self.encode_segments(segments)[0])

    def _plan(self, segments: Sequence[Segment], pieces: _Pieces) -> list[tuple[int, int, bool]]:
        """What one example is made of: (where, index or id, learned), texts being put into `pieces`."""
        plan: list[tuple[int, int, bool]] = []
        buffer: list[str] = []
        marked = True  # whether the text in the buffer begins like a new text
        before: Segment | None = None

        def flush() -> None:
            text = "".join(buffer)
            buffer.clear()
            if text and before is not None:
                texts = pieces.start if marked else pieces.inside
                plan.append((_START if marked else _INSIDE, len(texts), before.learned))
                texts.append(text)

        for segment in segments:
            if segment.kind != "text":
                flush()
                token_id = self._token_id(segment)
                if token_id is not None:
                    plan.append((_ID, token_id, segment.learned))
                    marked = segment.kind in ("bos", "start") or self._mark_after_special
                elif segment.kind == "token":  # not in the vocabulary: spelled out
                    before = segment
                    buffer.append(segment.text)
                    continue
                before = None
                continue
            apart = before is not None and (segment.reply, segment.learned) != (before.reply, before.learned)
            if apart and buffer:
                flush()
                marked = False
            if segment.fresh:
                flush()
                marked = True
            before = segment
            if segment.row:
                buffer.append(segment.text)
                continue
            for part in self._split(segment.text):
                if isinstance(part, str):
                    buffer.append(part)
                else:
                    flush()
                    plan.append((_ID, part, segment.learned))
                    marked = self._mark_after_special
        flush()
        return plan

    def _token_id(self, segment: Segment) -> int | None:
        if segment.kind == "bos":
            return self.bos_id
        if segment.kind == "start":
            return self.bos_id if self.adds_bos else None
        if segment.kind == "token":
            found = (self._fast.token_to_id if self._fast else self.hf.convert_tokens_to_ids)(segment.text)
            return found if found is not None and found != self._unk_id else None
        if self.eos_id is None and segment.learned:
            raise ModelError(
                tr(
                    "the tokenizer has no end token (eos): a model trained with it would never stop",
                    "分词器没有结束符（eos）：这样训练出的模型不会停止",
                ),
                remedy=tr(
                    'set "eos_token" in tokenizer_config.json, or choose a template that ends replies with a '
                    "token of its own (chatml, qwen, llama3)",
                    "在 tokenizer_config.json 中设置 eos_token，或选用自带结束标记的模板（chatml、qwen、llama3）",
                ),
            )
        return self.eos_id

    def _split(self, text: str) -> list[str | int]:
        """A template's text, cut at the special tokens this tokenizer has."""
        parts = self._parts.get(text)
        if parts is None:
            parts = []
            position = 0
            for match in self._special_re.finditer(text) if self._special_re else ():
                if match.start() > position:
                    parts.append(text[position : match.start()])
                parts.append(self._special_ids[match.group().strip()])
                position = match.end()
            if position < len(text):
                parts.append(text[position:])
            self._parts[text] = parts
        return parts

    def split_special(self, text: str) -> list[str]:
        """A text cut at the special tokens this tokenizer has; the tokens are parts of their own."""
        if self._special_re is None:
            return [text]
        parts, position = [], 0
        for match in self._special_re.finditer(text):
            parts += [text[position : match.start()], match.group()]
            position = match.end()
        return [part for part in (*parts, text[position:]) if part]

    def _marks_after_special(self) -> bool:
        if self._fast is None or not self._special_ids:
            return False
        known = [token for token in (self.hf.eos_token, self.hf.bos_token) if token in self._special_ids]
        token = (known or list(self._special_ids))[0]
        with self._lock:
            self._fast.encode_special_tokens = False
            ids = self._fast.encode(_PROBE + token + _PROBE, add_special_tokens=False).ids
        marked = self._encode_start([_PROBE])[0]
        return ids[-len(marked) :] == marked

    def _encode_start(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts as the tokenizer begins a text; special tokens in them are plain text."""
        if self._fast is None:
            return [self._slow(text) for text in texts]
        return self._run(self._fast, texts)

    def _encode_inside(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts that continue another one: no word mark in front."""
        if self._inside is None:
            guard = self._slow(_GUARD)
            return [self._slow(_GUARD + text)[len(guard) :] for text in texts]
        return self._run(self._inside, texts)

    def _run(self, backend: tokenizers.Tokenizer, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        with self._lock:  # transformers sets these on every call of its own
            backend.no_padding()
            backend.no_truncation()
            backend.encode_special_tokens = True
            return [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _slow(self, text: str) -> list[int]:
        return list(self.hf.encode(text, add_special_tokens=False, split_special_tokens=True))

    # -- decoding ----------------------------------------------------------------------------------------------

    def decode(self, ids: Iterable[int], *, keep_special: bool = False) -> str:
        """Text of ids. What a StreamDecoder says piece by piece is this text, always."""
        stream = StreamDecoder(self, keep_special=keep_special)
        ids = list(ids)
        text = self.raw_decode(ids, keep_special=keep_special)
        if "\ufffd" not in text:
            return text
        return "".join([*(stream.push(token_id) for token_id in ids), stream.flush()])

    def raw_decode(self, ids: list[int], *, keep_special: bool = False) -> str:
        """The library's own decoding, without "cleaning up" spaces."""
        if self._fast is not None:
            return self._fast.decode(ids, skip_special_tokens=not keep_special)
        return self.hf.decode(ids, skip_special_tokens=not keep_special, clean_up_tokenization_spaces=False)


_ID, _START, _INSIDE = 0, 1, 2


class _Pieces:
    """The texts of a batch: those that begin a text, and those that continue one."""

    def __init__(self) -> None:
        self.start: list[str] = []
        self.inside: list[str] = []


def _without_word_mark(body: str, backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A copy of the tokenizer that puts nothing in front of a text; the same one if it never does."""
    import tokenizers

    state = json.loads(body)
    changed = False
    for key, inner in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        part = state.get(key)
        steps = part.get(inner, [part]) if part else []
        kept = []
        for step in steps:
            if step["type"] == "Prepend":
                changed = True
                continue
            if step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never":
                step, changed = {**step, "prepend_scheme": "never"}, True
                step.pop("add_prefix_space", None)
            if step["type"] == "ByteLevel" and step.get("add_prefix_space"):
                step, changed = {**step, "add_prefix_space": False}, True
            kept.append(step)
        if part:
            state[key] = {"type": "Sequence", inner: kept}
    return tokenizers.Tokenizer.from_str(json.dumps(state)) if changed else backend


def _special_tokens(hf: Any) -> dict[str, tuple[int, bool, bool]]:
    """Special tokens by text: (id, takes the space on its left, ... on its right)."""
    found = {}
    for token_id, token in getattr(hf, "added_tokens_decoder", {}).items():
        if token.special:
            found[token.content] = (int(token_id), bool(token.lstrip), bool(token.rstrip))
    for text in hf.all_special_tokens:
        token_id = hf.convert_tokens_to_ids(text)
        if text not in found and token_id is not None:
            found[text] = (int(token_id), False, False)
    return found


def _special_pattern(specials: dict[str, tuple[int, bool, bool]]) -> re.Pattern[str] | None:
    """Matches any special token, the longest first, with the white space it takes."""
    parts = [
        (r"\s*" if left else "") + re.escape(text) + (r"\s*" if right else "")
        for text, (_, left, right) in sorted(specials.items(), key=lambda item: -len(item[0]))
    ]
    return re.compile("|".join(parts)) if parts else None
