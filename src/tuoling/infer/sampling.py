"""Between logits and the next token, on top of transformers' own processors: knobs that see the reply only, and draws
that belong to one answer alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tuoling.infer.engine import GenerationSettings


def reply_processors(settings: GenerationSettings, prompt_tokens: int) -> LogitsProcessorList:
    """The repetition knobs, blind to the prompt: a question's own words may be used in the answer."""
    processors: list[LogitsProcessor] = []
    if settings.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty, prompt_tokens))
    if settings.no_repeat_ngram_size:
        processors.append(NoRepeatInReply(settings.no_repeat_ngram_size, prompt_tokens))
    return LogitsProcessorList(processors)


class NoRepeatInReply(NoRepeatNGramLogitsProcessor):
    """transformers' ban on repeated n-grams, behind the prompt."""

    def __init__(self, ngram_size: int, prompt_tokens: int) -> None:
        super().__init__(ngram_size)
        self._prompt_tokens = prompt_tokens

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return super().__call__(input_ids[:, self._prompt_tokens :], scores)


def warpers(settings: GenerationSettings) -> LogitsProcessorList:
    """Temperature, top-k and top-p, in transformers' order; those that are off are left out."""
    steps: list[LogitsProcessor] = []
    if settings.temperature != 1.0:
        steps.append(TemperatureLogitsWarper(float(settings.temperature)))
    if settings.top_k:
        steps.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1.0:
        steps.append(TopPLogitsWarper(settings.top_p))
    return LogitsProcessorList(steps)


def generator(seed: int | None) -> torch.Generator:
    """Random numbers of one answer, on the CPU: the same on every device. None: other ones each time."""
    return torch.Generator().manual_seed(random.getrandbits(63) if seed is None else seed)


def draw(scores_BV: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """One token a row [B], drawn from softmax(scores) with one number of the row's own generator.

    torch.multinomial draws for the whole batch from one stream of numbers, so that an answer depends on its place
    among the others. Here row i is where its number falls in the running sum of its own probabilities.
    """
    exact = torch.float32 if scores_BV.device.type == "mps" else torch.float64  # MPS has no float64
    sums_BV = scores_BV.to(exact).softmax(-1).cumsum(-1)
    numbers = [torch.rand((), generator=one, dtype=torch.float64) for one in generators]
    places_B1 = torch.stack(numbers).to(sums_BV.device, exact).unsqueeze(-1) * sums_BV[:, -1:]
    # a number below 1 times the sum may round up to the sum, behind the last token that can be drawn
    below = torch.nextafter(sums_BV[:, -1:], torch.zeros_like(sums_BV[:, -1:]))
    return torch.searchsorted(sums_BV, torch.minimum(places_B1, below), right=True).squeeze(-1)


_PROCESS_DRAWS = Lock()
"""Whoever draws from the process's own random state: what others draw meanwhile would be missing."""


@contextmanager
def seeded(settings: GenerationSettings, device: torch.device) -> Iterator[None]:
    """For beams that transformers draws: from the settings' seed, and the process's own random state stays as it was."""
    if settings.seed is None or not settings.samples or settings.num_beams == 1:
        yield
        return
    devices = [device] if device.type == "cuda" else []
    with _PROCESS_DRAWS, torch.random.fork_rng(devices):
        torch.manual_seed(settings.seed)
        yield


class Draws(LogitsProcessor):
    """Draws every row's token and leaves it as the only one, for transformers' greedy choice to take.

    Each row begins at the settings' seed: an answer is the same alone, in any batch, and as a stream.
    """

    def __init__(self, settings: GenerationSettings, rows: int) -> None:
        self._warpers = warpers(settings)
        self._generators = [generator(settings.seed) for _ in range(rows)]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        tokens_B = draw(self._warpers(input_ids, scores), self._generators)
        only = torch.full_like(scores, -torch.inf)
        return only.scatter_(-1, tokens_B.unsqueeze(-1), 0.0)  # type: ignore[return-value]
