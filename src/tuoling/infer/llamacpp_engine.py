"""The engine over llama.cpp: GGUF files, made for a CPU. Template, stops and settings are read from the file."""

from __future__ import annotations

import random
from collections.abc import Generator, Iterable, Iterator, Sequence
from threading import Event, Lock

import numpy as np

from tuoling.errors import UsageError
from tuoling.infer.engine import (
    GenerationSettings,
    OneModel,
    Piece,
    PromptTooLong,
    Reply,
    Score,
    TemplatePrompts,
)
from tuoling.infer.llamacpp import LlamaModel
from tuoling.infer.llamacpp_sampler import Sampler
from tuoling.infer.llamacpp_tokenizer import GgufTokenizer
from tuoling.infer.stops import StopFilter, cut_at_stop, reply_of
from tuoling.language import tr
from tuoling.text.conversation import Conversation
from tuoling.text.templates import Template
from tuoling.text.tokenizer import StreamDecoder

_SEEDS = 0xFFFFFFFF
"""llama.cpp's seeds have 32 bits, and the last of them means any."""


class LlamaCppEngine(TemplatePrompts, OneModel):
    """Implements `Engine` with llama.cpp. One answer at a time; others wait for it."""

    name = "llama.cpp"

    tokenizer: GgufTokenizer

    def __init__(
        self,
        model: LlamaModel,
        tokenizer: GgufTokenizer,
        template: Template,
        *,
        defaults: GenerationSettings | None = None,
        stops: Iterable[str] = (),
        system: str | None = None,
        fingerprint: str = "",
    ) -> None:
        """stops: what ends a reply besides the template's stops and the file's end tokens."""
        self.model = model
        self.tokenizer = tokenizer
        self.template = template
        self.defaults = defaults or GenerationSettings()
        self.system = system
        self.fingerprint = fingerprint
        self.stops = tuple(dict.fromkeys((*template.stops, *stops)))
        as_tokens = [tokenizer.special_id(stop) for stop in self.stops]
        self.end_ids = model.end_ids() | {
            token for token in (tokenizer.eos_id, *as_tokens) if token is not None
        }
        self.context_tokens: int | None = model.trained_context
        self._turn = Lock()
        self._owner: list[int] | None = None
        """The answer that the context belongs to."""
        self._read_from, self._read_to = 0, 0
        """Where the last prompt began to be computed, and its length."""

    def close(self) -> None:
        """Free the model's memory."""
        self.tokenizer.close()
        self.model.close()

    # -- answers -----------------------------------------------------------------------------------------------

    def generate(
        self,
        conversations: Sequence[Conversation],
        settings: GenerationSettings,
        *,
        cancel: Event | None = None,
    ) -> list[Reply]:
        """Answer one after another, each from an empty context. Raises PromptTooLong."""
        prompts = [self.prompt_ids(conversation) for conversation in conversations]
        for prompt in prompts:
            self._require_room(len(prompt))
        replies = []
        for prompt in prompts:
            ids = list(self._tokens(prompt, settings, cancel or Event(), reuse=False))
            replies.append(self._reply(ids, len(prompt), settings, cancel))
        return replies

    def stream(
        self, conversation: Conversation, settings: GenerationSettings, *, cancel: Event | None = None
    ) -> Generator[Piece]:
        """Answer piece by piece; what the context still holds of the talk is not computed again."""
        prompt = self.prompt_ids(conversation)
        self._require_room(len(prompt))
        cancel = cancel or Event()
        decoder = StreamDecoder(self.tokenizer)
        gate = StopFilter((*self.stops, *settings.stop))
        ids: list[int] = []
        for token in self._tokens(prompt, settings, cancel, reuse=True):
            ids.append(token)
            text = "" if token in self.end_ids else gate.push(decoder.push(token))
            if text:
                yield Piece(text)
        rest = gate.push(decoder.flush()) + gate.flush()
        yield Piece(rest, self._reply(ids, len(prompt), settings, cancel))

    def _require_room(self, prompt_tokens: int) -> int:
        """Tokens that an answer may have behind this prompt. Raises PromptTooLong where that is none."""
        if self.context_tokens is None:
            return _SEEDS
        room = self.context_tokens - prompt_tokens
        if room < 1:
            raise PromptTooLong(prompt_tokens, self.context_tokens - 1)
        return room

    def _tokens(
        self, prompt: list[int], settings: GenerationSettings, cancel: Event, *, reuse: bool
    ) -> Iterator[int]:
        """Generated tokens up to an end token (given too), a stop string, a limit, or `cancel`."""
        if settings.num_beams > 1:
            raise UsageError(
                tr("llama.cpp has no beam search", "llama.cpp 没有束搜索"),
                where="num_beams",
                remedy=tr("num_beams=1, or use the model folder", "用 num_beams=1，或改用模型目录"),
            )
        limit = min(self._require_room(len(prompt)), settings.max_new_tokens)
        sampler = self._sampler(settings)
        reply: list[int] = []
        try:
            while len(reply) < limit:
                with self._turn:
                    if not self._compute(prompt, reply, limit, cancel, reuse=reuse):
                        return
                    token = self._next(reply, settings, sampler)
                reply.append(token)
                yield token
                if token in self.end_ids or self._stopped(reply, settings):
                    return
        finally:
            if sampler is not None:
                sampler.close()

    def _compute(
        self, prompt: list[int], reply: list[int], limit: int, cancel: Event, *, reuse: bool
    ) -> bool:
        """Bring the context to the end of prompt and reply; False where cancelled.

        Between two tokens another answer may have taken the context: then all of it is computed again.
        """
        if reply and self._owner is reply:
            return self.model.append(reply[-1:], cancel.is_set)
        self._owner = reply
        return self._read([*prompt, *reply], limit - len(reply), cancel, reuse=reuse)

    def _read(self, ids: list[int], limit: int, cancel: Event, *, reuse: bool) -> bool:
        """Compute what the context does not hold of `ids`; False where cancelled.

        The last token is always computed: its logits are needed. The same prompt asked again is computed from where
        it began the first time, so that with the same seed it gets the same answer to the bit.
        """
        model = self.model
        model.require_context(len(ids) + limit)
        same = 0
        if reuse:
            pairs = enumerate(zip(ids[:-1], model.cached, strict=False))
            same = next((place for place, (a, b) in pairs if a != b), min(len(ids) - 1, len(model.cached)))
            if same < self._read_to:
                same = min(same, self._read_from)
        model.forget(same)
        self._read_from, self._read_to = same, len(ids)
        return model.append(ids[same:], cancel.is_set)

    def _sampler(self, settings: GenerationSettings) -> Sampler | None:
        if not settings.samples:
            return None
        seed = random.getrandbits(31) if settings.seed is None else settings.seed % _SEEDS
        return Sampler(
            temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p, seed=seed
        )

    def _next(self, reply: list[int], settings: GenerationSettings, sampler: Sampler | None) -> int:
        """The next token. The knobs are transformers', and see the answer only."""
        logits_V = self.model.logits()
        adjust_logits(logits_V, reply, settings, self.end_ids)
        return int(logits_V.argmax()) if sampler is None else sampler.draw(self.model)

    def _stopped(self, reply: list[int], settings: GenerationSettings) -> bool:
        """Whether the newest text holds a stop string."""
        stops = (*self.stops, *settings.stop)
        if not stops:
            return False
        # a token holds a byte at least; a few more for tokens that show nothing
        tail = max(len(stop.encode()) for stop in stops) + 4
        return cut_at_stop(self.tokenizer.raw_decode(reply[-tail:]), stops) is not None

    def _reply(
        self, ids: list[int], prompt_tokens: int, settings: GenerationSettings, cancel: Event | None
    ) -> Reply:
        stops = (*self.stops, *settings.stop)
        cancelled = cancel is not None and cancel.is_set()
        return reply_of(ids, prompt_tokens, self.tokenizer, self.end_ids, stops, cancelled=cancelled)

    # -- likelihood --------------------------------------------------------------------------------------------

    def score(self, conversations: Sequence[Conversation]) -> list[Score]:
        """Cross entropy of the learned tokens of each conversation, one after another."""
        scores = []
        for conversation in conversations:
            ids, spans = self.tokenizer.encode_segments(self.template.render(conversation))
            if self.context_tokens is not None and len(ids) > self.context_tokens:
                raise PromptTooLong(len(ids), self.context_tokens)
            learned = [place for begin, end in spans for place in range(max(begin, 1), end)]
            with self._turn:
                rows = self.model.logits_of(ids, [place - 1 for place in learned])
            nats = sum(_nats(logits_V, ids[place]) for logits_V, place in zip(rows, learned, strict=True))
            scores.append(Score(nats, len(learned)))
        return scores


def _nats(logits_V: np.ndarray, token: int) -> float:
    values_V = logits_V.astype(np.float64)
    top = values_V.max()
    return float(np.log(np.exp(values_V - top).sum()) + top - values_V[token])


def adjust_logits(
    logits_V: np.ndarray, reply: Sequence[int], settings: GenerationSettings, end_ids: Iterable[int]
) -> None:
    """Change logits in place as transformers' processors do: penalty, n-grams, shortest answer."""
    if settings.repetition_penalty != 1.0 and reply:
        seen = np.unique(reply)
        scores = logits_V[seen]
        penalty = settings.repetition_penalty
        logits_V[seen] = np.where(scores < 0, scores * penalty, scores / penalty)
    size = settings.no_repeat_ngram_size
    if size and len(reply) >= size:
        before = tuple(reply[len(reply) - size + 1 :])
        for begin in range(len(reply) - size + 1):
            if tuple(reply[begin : begin + size - 1]) == before:
                logits_V[reply[begin + size - 1]] = -np.inf
    if len(reply) < settings.min_new_tokens:
        logits_V[list(end_ids)] = -np.inf
