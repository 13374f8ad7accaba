"""llama.cpp's C interface, as much of it as a chat needs: a model file, its vocabulary, and logits of a token list."""

from __future__ import annotations

import ctypes
import functools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tuoling.errors import MissingPackage, ModelError
from tuoling.language import tr

_ERROR = 4
"""llama.cpp's log level of errors."""

_SPM = 1
"""llama.cpp's number of the sentencepiece kind of vocabulary."""

_CONTROL, _UNKNOWN = 1 << 3, 1 << 0
"""Token attributes."""

_BATCH_TOKENS = 512
_OUTPUT_BYTES = 64 << 20
"""Logits kept at once where more than the last are asked for."""

_NO_LAYER, _ALL_LAYERS = 0, 1 << 10
_F32, _F16 = 0, 1
_FLASH_OFF, _FLASH_AUTO = 0, -1
_errors: deque[str] = deque(maxlen=8)
_kept_alive: list[Any] = []


@functools.cache
def llama_library() -> Any:
    """The package llama_cpp, its log kept for error messages. Raises MissingPackage where it is not installed."""
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:  # a broken build fails while its library is loaded
        raise MissingPackage(
            "llama-cpp-python",
            extra="gguf",
            purpose=tr(
                "llama.cpp (chatting with GGUF files, and types below q8_0)",
                "llama.cpp（与 GGUF 对话，以及 q8_0 以下的类型）",
            ),
            otherwise=tr(
                "it is compiled while it is installed: a C++ compiler is needed",
                "安装时需要编译：请先装好 C++ 编译器",
            ),
        ) from error

    @llama_cpp.llama_log_callback
    def keep(level: int, text: bytes, user_data: Any) -> None:
        if level == _ERROR:
            _errors.append(text.decode("utf-8", "replace").strip())

    llama_cpp.llama_log_set(keep, ctypes.c_void_p(0))
    _kept_alive.append(keep)  # C holds no reference of its own
    return llama_cpp


def last_error() -> str:
    """The newest error line of llama.cpp, and forget it."""
    text = next((line.partition(": ")[2] or line for line in reversed(_errors) if line), "")
    _errors.clear()
    return text


class LlamaModel:
    """A GGUF file opened by llama.cpp: memory-mapped weights, vocabulary, metadata, and a context on demand.

    The context grows with what is asked, up to `context_limit`: a key-value cache of the model's whole length would
    often be larger than its weights.
    """

    def __init__(
        self,
        path: Path,
        *,
        vocab_only: bool = False,
        gpu: bool = False,
        exact: bool = False,
        threads: int = 1,
        overrides: Mapping[str, bool] | None = None,
    ) -> None:
        """exact: float32 keys and values and no flash attention. overrides: metadata read as if it said so.

        Raises ModelError where llama.cpp cannot use the file.
        """
        self._c = llama_library()
        self.path = path
        self._exact, self._threads = exact, threads
        params = self._c.llama_model_default_params()
        params.n_gpu_layers = _ALL_LAYERS if gpu else _NO_LAYER
        params.vocab_only = vocab_only
        self._overrides = _override_array(self._c, overrides or {})
        if overrides:
            params.kv_overrides = self._overrides
        _errors.clear()
        self._model = self._c.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            detail = last_error()
            raise ModelError(
                tr(f"llama.cpp cannot use the file: {detail}", f"llama.cpp 无法使用该文件：{detail}"),
                where=str(path),
                remedy=tr("write or download it again", "请重新转换或下载"),
            )
        self._vocab = self._c.llama_model_get_vocab(self._model)
        self.metadata = self._read_metadata()
        self.tokens = int(self._c.llama_vocab_n_tokens(self._vocab))
        self.trained_context = int(self._c.llama_model_n_ctx_train(self._model))
        self.is_spm = self._c.llama_vocab_type(self._vocab) == _SPM
        self._pieces: dict[int, bytes] = {}
        self._special: list[int] | None = None
        self.context: Any = None
        self._context_tokens = 0
        self.cached: list[int] = []
        """Tokens whose keys and values the context holds."""

    def close(self) -> None:
        """Free everything. Calling it twice does nothing."""
        self._drop_context()
        if self._model:
            self._c.llama_model_free(self._model)
        self._model = None

    def _read_metadata(self) -> dict[str, str]:
        count = self._c.llama_model_meta_count(self._model)
        buffer = ctypes.create_string_buffer(1 << 10)
        found = {}
        for number in range(count):
            self._c.llama_model_meta_key_by_index(self._model, number, buffer, len(buffer))
            key = buffer.value
            size = self._c.llama_model_meta_val_str_by_index(self._model, number, buffer, len(buffer))
            if size >= len(buffer):
                large = ctypes.create_string_buffer(size + 1)
                self._c.llama_model_meta_val_str_by_index(self._model, number, large, len(large))
                found[key.decode()] = large.value.decode("utf-8", "replace")
            else:
                found[key.decode()] = buffer.value.decode("utf-8", "replace")
        return found

    # -- vocabulary --------------------------------------------------------------------------------------------

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of a text, without begin token. special: special tokens spelled in it count as such."""
        data = text.encode("utf-8", "replace")
        size = len(data) + 8
        while True:
            ids = (self._c.llama_token * size)()
            count = self._c.llama_tokenize(self._vocab, data, len(data), ids, size, False, special)
            if count >= 0:
                return list(ids[:count])
            size = -count

    def piece(self, token: int) -> bytes:
        """The bytes a token stands for, special tokens spelled out."""
        found = self._pieces.get(token)
        if found is None:
            size = 64
            while True:
                buffer = ctypes.create_string_buffer(size)
                count = self._c.llama_token_to_piece(self._vocab, token, buffer, size, 0, True)
                if count >= 0:
                    break
                size = -count
            found = self._pieces[token] = buffer.raw[:count]
        return found

    def token_text(self, token: int) -> str:
        """The token as the vocabulary spells it."""
        return bytes(self._c.llama_vocab_get_text(self._vocab, token)).decode("utf-8", "replace")

    def special_ids(self) -> list[int]:
        """Control tokens and the unknown token."""
        if self._special is None:
            attribute, vocab = self._c.llama_vocab_get_attr, self._vocab
            wanted = _CONTROL | _UNKNOWN
            self._special = [token for token in range(self.tokens) if attribute(vocab, token) & wanted]
        return self._special

    def end_ids(self) -> set[int]:
        """Tokens that llama.cpp itself takes for the end of an answer."""
        return {token for token in self.special_ids() if self._c.llama_vocab_is_eog(self._vocab, token)}

    def special_id(self, name: str) -> int | None:
        """bos, eos, pad or unk; None where the file names none."""
        said = self.metadata.get(f"tokenizer.ggml.{_ID_KEYS[name]}_token_id")
        if said is not None:
            return int(said)
        usual = {"bos": self._c.llama_vocab_bos, "eos": self._c.llama_vocab_eos}.get(name)
        token = usual(self._vocab) if usual and self.is_spm else -1
        return int(token) if token >= 0 else None

    def adds_bos(self) -> bool:
        """Whether a text begins with the begin token."""
        return bool(self._c.llama_vocab_get_add_bos(self._vocab))

    # -- logits ------------------------------------------------------------------------------------------------

    def require_context(self, tokens: int) -> None:
        """Make sure that a sequence of this length fits; growing (to powers of two) forgets what was cached."""
        if tokens <= self._context_tokens:
            return
        size = min(max(self.trained_context, tokens), max(1024, 1 << (tokens - 1).bit_length()))
        self._drop_context()
        params = self._c.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = size, _BATCH_TOKENS, _BATCH_TOKENS
        params.n_threads = params.n_threads_batch = self._threads
        params.no_perf = True
        params.type_k = params.type_v = _F32 if self._exact else _F16
        params.flash_attn_type = _FLASH_OFF if self._exact else _FLASH_AUTO
        _errors.clear()
        self.context = self._c.llama_init_from_model(self._model, params)
        if not self.context:
            detail = last_error()
            raise ModelError(
                tr(
                    f"no memory for a context of {size} tokens: {detail}",
                    f"内存不足以容纳 {size} 个 token 的上下文：{detail}",
                ),
                where=str(self.path),
                remedy=tr(
                    "ask for less: --max-new-tokens, --memory-tokens",
                    "请调小 --max-new-tokens 或 --memory-tokens",
                ),
            )
        self._context_tokens = size

    def _drop_context(self) -> None:
        if self.context:
            self._c.llama_free(self.context)
        self.context, self._context_tokens, self.cached = None, 0, []

    def forget(self, keep: int = 0) -> None:
        """Drop cached tokens from position `keep` on."""
        if len(self.cached) > keep:
            self._c.llama_memory_seq_rm(self._c.llama_get_memory(self.context), 0, keep, -1)
            del self.cached[keep:]

    def append(self, ids: Sequence[int], cancelled: Callable[[], bool] = lambda: False) -> bool:
        """Compute tokens behind the cached ones; their last logits are then `logits()`. False where cancelled.

        A prompt is cancelled inside its computation, a single token is awaited.
        """
        for begin in range(0, len(ids), _BATCH_TOKENS):
            part = list(ids[begin : begin + _BATCH_TOKENS])
            if cancelled():
                return False
            code = self._decode(part, cancelled if len(part) > 1 else None)
            if code == _ABORTED:
                keep, self.cached = len(self.cached), [*self.cached, *part]
                self.forget(keep)
                return False
            if code:
                raise ModelError(
                    tr(f"llama.cpp stopped with code {code}", f"llama.cpp 出错，代码 {code}"),
                    where=str(self.path),
                )
            self.cached += part
        return True

    def _decode(self, part: list[int], cancelled: Callable[[], bool] | None) -> int:
        tokens = (self._c.llama_token * len(part))(*part)
        batch = self._c.llama_batch_get_one(tokens, len(part))
        if cancelled is None:
            return int(self._c.llama_decode(self.context, batch))
        check = self._c.ggml_abort_callback(lambda data: cancelled())
        self._c.llama_set_abort_callback(self.context, check, None)
        try:
            return int(self._c.llama_decode(self.context, batch))
        finally:
            self._c.llama_set_abort_callback(self.context, self._c.ggml_abort_callback(0), None)

    def logits(self) -> np.ndarray:
        """Logits [V] of the token computed last, as a view: writing into it changes what a sampler sees."""
        return self._view(-1)

    def _view(self, index: int) -> np.ndarray:
        pointer = self._c.llama_get_logits_ith(self.context, index)
        return np.ctypeslib.as_array(pointer, shape=(self.tokens,))

    def logits_of(self, ids: Sequence[int], wanted: Sequence[int]) -> list[np.ndarray]:
        """Copies of the logits [V] at the wanted positions of a sequence that is computed from its start."""
        self.require_context(len(ids))
        self.forget()
        asked = set(wanted)
        found: dict[int, np.ndarray] = {}
        size = max(1, min(_BATCH_TOKENS, _OUTPUT_BYTES // (4 * self.tokens)))
        batch = self._c.llama_batch_init(size, 0, 1)
        try:
            for begin in range(0, len(ids), size):
                part = ids[begin : begin + size]
                batch.n_tokens = len(part)
                for row, token in enumerate(part):
                    batch.token[row], batch.pos[row] = token, begin + row
                    batch.n_seq_id[row], batch.seq_id[row][0] = 1, 0
                    batch.logits[row] = begin + row in asked
                if self._c.llama_decode(self.context, batch):
                    raise ModelError(
                        tr("llama.cpp could not compute", "llama.cpp 计算失败"), where=str(self.path)
                    )
                self.cached += part
                for row in range(len(part)):
                    if begin + row in asked:
                        found[begin + row] = self._view(row).copy()
        finally:
            self._c.llama_batch_free(batch)
        return [found[position] for position in wanted]


_ID_KEYS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
_ABORTED = 2


def _override_array(library: Any, overrides: Mapping[str, bool]) -> Any:
    """Booleans only; the entry behind the last one is empty, which ends the list."""
    array = (library.llama_model_kv_override * (len(overrides) + 1))()
    for entry, (key, value) in zip(array, overrides.items(), strict=False):
        entry.tag = library.LLAMA_KV_OVERRIDE_TYPE_BOOL
        entry.key = key.encode()
        entry.value.val_bool = value
    return array
