"""The engine over transformers: greedy, sampling and beams on CPU, CUDA and MPS."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from tuoling import console
from tuoling.infer.engine import (
    GenerationSettings,
    Piece,
    PromptTooLong,
    Reply,
    Score,
    TemplatePrompts,
    unknown_adapter,
)
from tuoling.infer.stops import StopFilter, cut_at_stop, reply_of
from tuoling.language import tr
from tuoling.models.adapter_switch import AdapterSwitch
from tuoling.text.conversation import IGNORE_INDEX, Conversation
from tuoling.text.templates import Template
from tuoling.text.tokenizer import StreamDecoder, TextTokenizer

if TYPE_CHECKING:
    from collections.abc import Iterable

_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")


class TorchEngine(TemplatePrompts):
    """Implements `Engine` with a transformers model (or a PEFT model on one)."""

    name = "torch"

    def __init__(
        self,
        model: Any,
        tokenizer: TextTokenizer,
        template: Template,
        *,
        defaults: GenerationSettings | None = None,
        stops: Iterable[str] = (),
        end_ids: Iterable[int] = (),
        system: str | None = None,
        fingerprint: str = "",
        adapter: str | None = None,
        layers: str | None = None,
        beside: TorchEngine | None = None,
    ) -> None:
        """stops, end_ids: what ends a reply besides the template's stops and the tokenizer's end token.

        adapter: its name for `using`; None for a model without adapters. layers: PEFT's name of its layers; None: the
        bare base answers. beside: an engine on the same model, which knows this one by `adapter` from now on.
        """
        if beside is None:
            # else transformers fills what our settings leave at its own defaults from the folder's file
            for part in (model, _generating(model)):
                part.generation_config = GenerationConfig()
        self.model = model.eval()
        self.adapter = adapter
        self._layers = layers
        self._family: dict[str, TorchEngine] = beside._family if beside else {}
        self._switch: AdapterSwitch | None = beside._switch if beside else None
        if adapter is not None:
            self._family[adapter] = self
            self._switch = self._switch or AdapterSwitch(model, layers)
        self.tokenizer = tokenizer
        self.template = template
        self.defaults = defaults or GenerationSettings()
        self.system = system
        self.fingerprint = fingerprint
        self.stops = tuple(dict.fromkeys((*template.stops, *stops)))
        as_tokens = [tokenizer.special_id(stop) for stop in self.stops]
        self.end_ids = {
            token_id for token_id in (tokenizer.eos_id, *end_ids, *as_tokens) if token_id is not None
        }
        self.context_tokens = _context_tokens(model.config)
        self._said_beams = False

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names for `using`, the one that was opened first in front."""
        return tuple(self._family)

    def using(self, adapter: str) -> TorchEngine:
        """The engine of another adapter on the same weights."""
        if adapter not in self._family:
            raise unknown_adapter(adapter, self.adapters)
        return self._family[adapter]

    @contextmanager
    def selected(self) -> Iterator[None]:
        """Within, forwards of this thread run with this engine's adapter; those of other threads with theirs."""
        if self._switch is None:
            yield
            return
        with self._switch.using(self._layers):
            yield

    @property
    def device(self) -> torch.device:
        """Where the prompt goes."""
        return self.model.get_input_embeddings().weight.device

    def close(self) -> None:
        """Free the model's memory, for all adapters on it."""
        on_cuda = self.device.type == "cuda"
        for engine in (self, *self._family.values()):
            engine.model = engine._switch = None
        self._family.clear()
        gc.collect()  # hooks and PEFT's wrappers refer to each other
        if on_cuda:
            torch.cuda.empty_cache()

    # -- answers -----------------------------------------------------------------------------------------------

    def generate(
        self,
        conversations: Sequence[Conversation],
        settings: GenerationSettings,
        *,
        cancel: Event | None = None,
    ) -> list[Reply]:
        """Answer a batch, padded on the left. Raises PromptTooLong."""
        if not conversations:
            return []
        prompts = [self.prompt_ids(conversation) for conversation in conversations]
        replies = self._run(prompts, settings, cancel=cancel or Event())
        return [
            self._reply(ids, len(prompt), settings, cancel)
            for ids, prompt in zip(replies, prompts, strict=True)
        ]

    def stream(
        self, conversation: Conversation, settings: GenerationSettings, *, cancel: Event | None = None
    ) -> Iterator[Piece]:
        """Answer piece by piece. Beams are searched to the end first and come as one piece."""
        if settings.num_beams > 1:
            if not self._said_beams:
                console.note(tr("beams: the answer comes whole", "束搜索：答案会一次性给出"))
                self._said_beams = True
            reply = self.generate([conversation], settings, cancel=cancel)[0]
            yield Piece(reply.text, reply)
            return
        prompt = self.prompt_ids(conversation)
        self._require_room(len(prompt), settings)
        yield from self._stream_tokens(prompt, settings, cancel or Event())

    def _stream_tokens(
        self, prompt: list[int], settings: GenerationSettings, cancel: Event
    ) -> Iterator[Piece]:
        """transformers runs in a thread of its own and hands tokens over; leaving the iterator stops it."""
        inbox: SimpleQueue[int | Exception | None] = SimpleQueue()
        finished: list[list[int]] = []

        def work() -> None:
            try:
                finished.extend(self._run([prompt], settings, cancel=cancel, on_token=inbox.put))
                inbox.put(None)
            except Exception as error:
                inbox.put(error)

        worker = Thread(target=work, name="tuoling-generate", daemon=True)
        worker.start()
        decoder = StreamDecoder(self.tokenizer)
        gate = StopFilter((*self.stops, *settings.stop))
        ended = False
        try:
            while (token := inbox.get()) is not None:
                if isinstance(token, Exception):
                    raise token
                ended = ended or token in self.end_ids
                text = "" if ended else gate.push(decoder.push(token))
                if text:
                    yield Piece(text)
            rest = gate.push(decoder.flush()) + gate.flush()
            yield Piece(rest, self._reply(finished[0], len(prompt), settings, cancel))
        finally:
            cancel.set()
            worker.join()

    def _run(
        self,
        prompts: Sequence[list[int]],
        settings: GenerationSettings,
        *,
        cancel: Event,
        on_token: Callable[[int], None] | None = None,
    ) -> list[list[int]]:
        """Generated ids per prompt, end tokens and padding still behind them."""
        longest = max(map(len, prompts))
        room = self._require_room(longest, settings)
        pad = self._pad_id()
        width = [longest - len(prompt) for prompt in prompts]
        device = self.device
        input_ids = torch.tensor([[pad] * n + p for n, p in zip(width, prompts, strict=True)], device=device)
        mask = torch.tensor(
            [[0] * n + [1] * len(p) for n, p in zip(width, prompts, strict=True)], device=device
        )
        stop = _StopStrings(self.tokenizer, (*self.stops, *settings.stop), longest, cancel)
        with torch.inference_mode(), _seeded(settings, device), self.selected():
            out = _generating(self.model).generate(
                input_ids=input_ids,
                attention_mask=mask,
                generation_config=self._config(settings, min(room, settings.max_new_tokens), pad),
                logits_processor=_reply_processors(settings, longest),
                stopping_criteria=StoppingCriteriaList([stop]),
                streamer=_TokenStreamer(on_token) if on_token else None,
            )
        return [row[longest:] for row in out.tolist()]

    def _config(self, settings: GenerationSettings, max_new_tokens: int, pad: int) -> GenerationConfig:
        sampling: dict[str, Any] = {"do_sample": False}
        if settings.samples:
            sampling = {
                "do_sample": True,
                "temperature": settings.temperature,
                "top_p": settings.top_p,
                "top_k": settings.top_k,
            }
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            min_new_tokens=min(settings.min_new_tokens, max_new_tokens) or None,
            num_beams=settings.num_beams,
            eos_token_id=sorted(self.end_ids) or None,
            pad_token_id=pad,
            bos_token_id=self.tokenizer.bos_id,
            use_cache=True,
            **sampling,
        )

    def _require_room(self, prompt_tokens: int, settings: GenerationSettings) -> int:
        """Tokens that an answer may have behind this prompt. Raises PromptTooLong where that is none."""
        if self.context_tokens is None:
            return settings.max_new_tokens
        room = self.context_tokens - prompt_tokens
        if room < 1:
            raise PromptTooLong(prompt_tokens, self.context_tokens - 1)
        return room

    def _pad_id(self) -> int:
        """Any id will do under the attention mask; an end token is the usual one."""
        if self.tokenizer.pad_id is not None:
            return self.tokenizer.pad_id
        return min(self.end_ids, default=0)

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
            labels = [IGNORE_INDEX] * len(ids)
            for begin, end in spans:
                labels[begin:end] = ids[begin:end]
            with torch.inference_mode(), self.selected():
                logits = self.model(
                    input_ids=torch.tensor([ids], device=self.device), use_cache=False
                ).logits[0]
                targets = torch.tensor(labels[1:], device=logits.device)
                nats = torch.nn.functional.cross_entropy(
                    logits[:-1].float(), targets, ignore_index=IGNORE_INDEX, reduction="sum"
                )
            scores.append(Score(float(nats), sum(label != IGNORE_INDEX for label in labels[1:])))
        return scores


def _generating(model: Any) -> Any:
    """The transformers model whose `generate` runs: PEFT's own swaps a method of it for as long as it generates, and
    two answers at once would swap it for each other."""
    plain = hasattr(model, "get_base_model") and not model.active_peft_config.is_prompt_learning
    return model.get_base_model() if plain else model


def _context_tokens(config: Any) -> int | None:
    """The longest sequence a model was made for; None where its config says nothing (ALiBi has no hard end)."""
    config = config.get_text_config()
    for key in _CONTEXT_KEYS:
        value = getattr(config, key, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


@contextmanager
def _seeded(settings: GenerationSettings, device: torch.device) -> Iterator[None]:
    """Draw from the settings' seed and leave the process's own random state as it was."""
    if settings.seed is None or not settings.samples:
        yield
        return
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(settings.seed)
        yield


def _reply_processors(settings: GenerationSettings, prompt_tokens: int) -> LogitsProcessorList:
    """The repetition knobs, blind to the prompt: a question's own words may be used in the answer."""
    processors: list[LogitsProcessor] = []
    if settings.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty, prompt_tokens))
    if settings.no_repeat_ngram_size:
        processors.append(_NoRepeatInReply(settings.no_repeat_ngram_size, prompt_tokens))
    return LogitsProcessorList(processors)


class _NoRepeatInReply(NoRepeatNGramLogitsProcessor):
    def __init__(self, ngram_size: int, prompt_tokens: int) -> None:
        super().__init__(ngram_size)
        self._prompt_tokens = prompt_tokens

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return super().__call__(input_ids[:, self._prompt_tokens :], scores)


class _StopStrings(StoppingCriteria):
    """Ends a row whose newest text holds a stop string; ends every row when cancelled.

    It keeps nothing between steps, so that it is right for beams too, whose rows change places.
    """

    def __init__(
        self, tokenizer: TextTokenizer, stops: Sequence[str], prompt_tokens: int, cancel: Event
    ) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._prompt_tokens = prompt_tokens
        self._cancel = cancel
        # a token holds a byte at least; a few more for tokens that show nothing
        self._tail = max((len(stop.encode()) for stop in stops), default=0) + 4

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        rows = input_ids.shape[0]
        if self._cancel.is_set():
            done = [True] * rows
        elif not self._stops:
            done = [False] * rows
        else:
            tails = input_ids[:, max(self._prompt_tokens, input_ids.shape[1] - self._tail) :].tolist()
            done = [cut_at_stop(self._tokenizer.raw_decode(tail), self._stops) is not None for tail in tails]
        return torch.tensor(done, device=input_ids.device, dtype=torch.bool)  # type: ignore[return-value]


class _TokenStreamer(BaseStreamer):
    """Hands every generated token on; transformers puts the prompt first."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self._on_token = on_token
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for token in value.flatten().tolist():
            self._on_token(token)

    def end(self) -> None:
        """The worker itself says when it is done."""
