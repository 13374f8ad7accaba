"""A GGUF file's own vocabulary behind the rules of `TextTokenizer`: special tokens only where the template wrote them,
no spaces out of nothing, no half characters."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from tuoling.files import sha256_text
from tuoling.infer.gguf_keys import MARKS_AFTER_SPECIAL, MARKS_SPACES, NORMAL_FORM
from tuoling.infer.llamacpp import LlamaModel
from tuoling.text.tokenizer import TextTokenizer

_SPACES = (" ", "▁")
_PREFIX = "tokenizer.ggml.add_space_prefix"


class GgufTokenizer(TextTokenizer):
    """llama.cpp's tokenizer. `close` frees the second copy of the vocabulary, where there is one."""

    def __init__(self, model: LlamaModel) -> None:
        self._model = model
        self._unmarked = model
        if model.is_spm and model.metadata.get(_PREFIX, "true") == "true":
            # the same vocabulary, but nothing is put in front of a text
            self._unmarked = LlamaModel(model.path, vocab_only=True, overrides={_PREFIX: False})
        self._marks_spaces = model.metadata.get(MARKS_SPACES, "true") == "true"
        self._normal_form = model.metadata.get(NORMAL_FORM) == "true"
        super().__init__(_Vocabulary(model))

    def close(self) -> None:
        """Free the second copy."""
        if self._unmarked is not self._model:
            self._unmarked.close()

    def _encode_start(self, texts: list[str]) -> list[list[int]]:
        if self._marks_spaces:
            return [self._model.tokenize(self._normal(text)) for text in texts]
        return [
            (self._unmarked if text[:1] in _SPACES else self._model).tokenize(self._normal(text))
            for text in texts
        ]

    def _encode_inside(self, texts: list[str]) -> list[list[int]]:
        return [self._unmarked.tokenize(self._normal(text)) for text in texts]

    def _normal(self, text: str) -> str:
        return unicodedata.normalize("NFC", text) if self._normal_form else text

    def _marks_after_special(self) -> bool:
        """As it was while training, where the file says; llama.cpp itself always marks."""
        return self._model.metadata.get(MARKS_AFTER_SPECIAL, "true") == "true"

    def fingerprint(self) -> str:
        """Hash of what the file is."""
        stat = self._model.path.stat()
        return sha256_text(f"{self._model.path}:{stat.st_size}:{stat.st_mtime_ns}")

    def raw_decode(self, ids: list[int], *, keep_special: bool = False) -> str:
        """Pieces joined; the word mark that begins a text is no space."""
        data = b"".join(
            self._model.piece(token) for token in ids if keep_special or not self.is_special(token)
        )
        if self._unmarked is not self._model:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")


class _Vocabulary:
    """What TextTokenizer asks of a Hugging Face tokenizer, answered by llama.cpp."""

    is_fast = False

    def __init__(self, model: LlamaModel) -> None:
        self._model = model
        self.bos_token_id = model.special_id("bos")
        self.eos_token_id = model.special_id("eos")
        self.pad_token_id = model.special_id("pad")
        self.unk_token_id = model.special_id("unk")
        self.bos_token = self._text(self.bos_token_id)
        self.eos_token = self._text(self.eos_token_id)
        self.unk_token = self._text(self.unk_token_id)
        self.added_tokens_decoder = {
            token: SimpleNamespace(content=model.token_text(token), special=True, lstrip=False, rstrip=False)
            for token in model.special_ids()
        }
        self.all_special_tokens = [
            text for text in (self.bos_token, self.eos_token, self.unk_token) if text is not None
        ]
        self.chat_template = model.metadata.get("tokenizer.chat_template")
        self._ids: dict[str, int] = {}

    def _text(self, token: int | None) -> str | None:
        return None if token is None else self._model.token_text(token)

    def __len__(self) -> int:
        return self._model.tokens

    def __call__(self, text: str) -> dict[str, list[int]]:
        begin = [self.bos_token_id] if self._model.adds_bos() and self.bos_token_id is not None else []
        return {"input_ids": [*begin, *self._model.tokenize(text)]}

    def get_vocab(self) -> dict[str, int]:
        """Every token by its text."""
        if not self._ids:
            self._ids = {self._model.token_text(token): token for token in range(len(self))}
        return self._ids

    def convert_tokens_to_ids(self, text: str) -> int | None:
        """The id of a token, the unknown token's where there is none."""
        return self.get_vocab().get(text, self.unk_token_id)

    def apply_chat_template(
        self, messages: Iterable[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        """transformers' own rendering of the file's chat template."""
        from transformers.utils.chat_template_utils import render_jinja_template

        assert not tokenize
        rendered: Any = render_jinja_template(
            conversations=[list(messages)],
            chat_template=self.chat_template,
            add_generation_prompt=add_generation_prompt,
            bos_token=self.bos_token or "",
            eos_token=self.eos_token or "",
            unk_token=self.unk_token or "",
        )
        return str(rendered[0][0])
