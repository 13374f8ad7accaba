"""The engine over transformers: greedy, sampling and beams on CPU, CUDA and MPS."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from threading import Event
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList

from tuoling.infer.beams import BeamText, BeamWatch
from tuoling.infer.engine import (
    GenerationSettings,
    Piece,
    PromptTooLong,
    Reply,
    Score,
    TemplatePrompts,
    unknown_adapter,
)
from tuoling.infer.halves import in_halves
from tuoling.infer.hooks import StopStrings, TokenStreamer, give_head_whole_rows, in_thread
from tuoling.infer.sampling import Draws, reply_processors, seeded
from tuoling.infer.stops import StopFilter, reply_of
from tuoling.models.adapter_switch import AdapterSwitch
from tuoling.models.placement import first_device
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
            give_head_whole_rows(model)
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

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names for `using`, the one that was opened first in front."""
        return tuple(self._family)

    def using(self, adapter: str) -> TorchEngine:
        """The engine of another adapter on the same weights."""
        if adapter not in self._family:
            raise unknown_adapter(adapter, self.adapters)
        return self._family[adapter]

    @property
    def layers(self) -> str | None:
        """PEFT's name of this engine's adapter in the model; None: the bare base answers."""
        return self._layers

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
        return first_device(self.model)

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
        cancel = cancel or Event()
        beams = settings.num_beams
        replies: dict[int, Reply] = {}
        for batch in self._batches(prompts, settings):
            run = partial(self._run, settings=settings, cancel=cancel)
            rows = in_halves(run, [prompts[place] for place in batch])
            for number, place in enumerate(batch):
                of_row = rows[number * beams : (number + 1) * beams]
                replies[place] = self._reply(of_row, prompts[place], settings, cancel)
        return [replies[place] for place in range(len(prompts))]

    def _batches(self, prompts: Sequence[list[int]], settings: GenerationSettings) -> list[list[int]]:
        """Places of the prompts that may run together: their answers have the same room, or one would cut another.

        Drawn beams run alone: transformers draws them for a whole batch from one stream of numbers.
        """
        if settings.samples and settings.num_beams > 1:
            return [[place] for place in range(len(prompts))]
        of_limit: dict[int, list[int]] = {}
        for place, prompt in enumerate(prompts):
            limit = min(self._require_room(len(prompt), settings), settings.max_new_tokens)
            of_limit.setdefault(limit, []).append(place)
        return list(of_limit.values())

    def stream(
        self, conversation: Conversation, settings: GenerationSettings, *, cancel: Event | None = None
    ) -> Generator[Piece]:
        """Answer piece by piece. With beams the best running one is shown, and taken back where another overtakes it."""
        prompt = self.prompt_ids(conversation)
        self._require_room(len(prompt), settings)
        cancel = cancel or Event()
        watch = self._beams if settings.num_beams > 1 else self._tokens
        yield from watch(prompt, settings, cancel)

    def _tokens(self, prompt: list[int], settings: GenerationSettings, cancel: Event) -> Generator[Piece]:
        decoder = StreamDecoder(self.tokenizer)
        gate = StopFilter((*self.stops, *settings.stop))
        ended = False
        finished: list[list[int]] = []

        def work(put: Callable[[Any], None]) -> None:
            finished.extend(self._run([prompt], settings, cancel=cancel, on_token=put))

        with closing(in_thread(work, cancel)) as tokens:
            for token in tokens:
                ended = ended or token in self.end_ids
                text = "" if ended else gate.push(decoder.push(token))
                if text:
                    yield Piece(text)
        rest = gate.push(decoder.flush()) + gate.flush()
        yield Piece(rest, self._reply(finished, prompt, settings, cancel))

    def _beams(self, prompt: list[int], settings: GenerationSettings, cancel: Event) -> Generator[Piece]:
        text = BeamText(self.tokenizer, (*self.stops, *settings.stop))
        finished: list[list[int]] = []

        def work(put: Callable[[Any], None]) -> None:
            watch = BeamWatch(len(prompt), settings.num_beams, self.end_ids, put)
            finished.extend(self._run([prompt], settings, cancel=cancel, watch=watch))

        with closing(in_thread(work, cancel)) as frames:
            for frame in frames:
                yield text.show(frame)
        yield text.last(self._reply(finished, prompt, settings, cancel))

    def _run(
        self,
        prompts: Sequence[list[int]],
        settings: GenerationSettings,
        *,
        cancel: Event,
        on_token: Callable[[int], None] | None = None,
        watch: BeamWatch | None = None,
    ) -> list[list[int]]:
        """Generated ids, `num_beams` rows a prompt, the best first; end tokens and padding still behind them."""
        longest = max(map(len, prompts))
        room = self._require_room(longest, settings)
        pad = self._pad_id()
        width = [longest - len(prompt) for prompt in prompts]
        device = self.device
        input_ids = torch.tensor([[pad] * n + p for n, p in zip(width, prompts, strict=True)], device=device)
        mask = torch.tensor(
            [[0] * n + [1] * len(p) for n, p in zip(width, prompts, strict=True)], device=device
        )
        stop = StopStrings(self.tokenizer, (*self.stops, *settings.stop), longest, cancel, watch)
        processors = reply_processors(settings, longest)
        if settings.samples and settings.num_beams == 1:
            processors.append(Draws(settings, len(prompts)))
        if watch is not None:
            processors.append(watch)
        with torch.inference_mode(), seeded(settings, device), self.selected():
            out = _generating(self.model).generate(
                input_ids=input_ids,
                attention_mask=mask,
                generation_config=self._config(settings, min(room, settings.max_new_tokens), pad),
                logits_processor=processors,
                stopping_criteria=StoppingCriteriaList([stop]),
                streamer=TokenStreamer(on_token) if on_token else None,
            )
        return [row[longest:] for row in out.tolist()]

    def _config(self, settings: GenerationSettings, max_new_tokens: int, pad: int) -> GenerationConfig:
        """Alone, tokens are drawn by `Draws`, and transformers takes the one that is left; beams it draws itself."""
        sampling: dict[str, Any] = {"do_sample": False}
        if settings.samples and settings.num_beams > 1:
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
            num_return_sequences=settings.num_beams,
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
        self, rows: list[list[int]], prompt: list[int], settings: GenerationSettings, cancel: Event
    ) -> Reply:
        """The reply of one prompt's rows: the best beam's, with the texts of all."""
        stops, cancelled = (*self.stops, *settings.stop), cancel.is_set()
        replies = [
            reply_of(ids, len(prompt), self.tokenizer, self.end_ids, stops, cancelled=cancelled)
            for ids in rows
        ]
        if len(replies) == 1:
            return replies[0]
        return replace(replies[0], beams=tuple(reply.text for reply in replies))

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
