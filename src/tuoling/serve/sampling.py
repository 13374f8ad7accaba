"""The next token of many answers at once, each by its own settings and its own seed.

A seed gives the tokens that `infer.sampling` gives it: the same numbers, laid against the same running sums in the
order of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LogitsProcessorList

from tuoling.infer.engine import GenerationSettings
from tuoling.infer.sampling import generator, reply_processors
from tuoling.serve.jobs import TokenLog

CANDIDATES = 256
"""Most likely tokens that are looked at first. Sorting a vocabulary of 250,880 words for top_p takes 15 ms an answer;
these nearly always hold the whole share, and where they do not, the vocabulary is sorted after all."""
BLOCK = 512
"""Words of a block."""


@dataclass(eq=False)
class Chooser:
    """How one answer chooses: its settings, its own random numbers, and what it has said."""

    settings: GenerationSettings
    end_ids: Collection[int]
    seed: int | None
    logprobs: int | None = None
    ids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._generator = generator(self.seed)
        self._processors: LogitsProcessorList = reply_processors(self.settings, 0)

    @property
    def plain(self) -> bool:
        """Greedy and nothing else to do."""
        return not self.settings.samples and not self._processors and not self._no_end

    @property
    def _no_end(self) -> bool:
        return len(self.ids) < self.settings.min_new_tokens

    def process(self, scores_V: Tensor) -> Tensor:
        """The answer's own rules on its logits: transformers' processors, on what it has said alone."""
        if self._no_end and self.end_ids:
            scores_V = scores_V.index_fill(
                0, torch.tensor(sorted(self.end_ids), device=scores_V.device), float("-inf")
            )
        if self._processors:
            said = torch.tensor([self.ids], dtype=torch.long, device=scores_V.device)
            scores_V = self._processors(said, scores_V.unsqueeze(0))[0]
        return scores_V

    def draw(self) -> float:
        """A number from [0, 1), one a token: what others draw does not move it."""
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))


def choose(logits_RV: Tensor, choosers: Sequence[Chooser]) -> list[int]:
    """The next token id of each row. Rows do not see each other."""
    scores_RV = logits_RV.float()
    chosen = [0] * len(choosers)
    if any(chooser.plain for chooser in choosers):
        chosen = [int(token) for token in scores_RV.argmax(-1).tolist()]
    if all(chooser.plain for chooser in choosers):
        return chosen
    if scores_RV.data_ptr() == logits_RV.data_ptr():  # float32 already, and the caller's own
        scores_RV = scores_RV.clone()
    sampled: list[int] = []
    for at, chooser in enumerate(choosers):
        if chooser.plain:
            continue
        scores_V = chooser.process(scores_RV[at])
        if chooser.settings.samples:
            scores_RV[at] = scores_V / chooser.settings.temperature
            sampled.append(at)
        else:
            chosen[at] = int(scores_V.argmax())
    whole = [at for at in sampled if _unfiltered(choosers[at].settings)]
    cut = [at for at in sampled if not _unfiltered(choosers[at].settings)]
    for rows, draw in ((whole, _draw_whole), (cut, _draw_cut)):
        if rows:
            mine = scores_RV if len(rows) == len(choosers) else scores_RV[rows]
            for at, token in zip(rows, draw(mine, [choosers[at] for at in rows]), strict=True):
                chosen[at] = token
    return chosen


def _unfiltered(settings: GenerationSettings) -> bool:
    return settings.top_k == 0 and settings.top_p >= 1.0


def _uniform(choosers: Sequence[Chooser], device: torch.device) -> Tensor:
    numbers = [chooser.draw() for chooser in choosers]
    return torch.tensor(
        numbers, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device
    )


def _pick(shares_RV: Tensor, mass_R: Tensor) -> Tensor:
    """Index [R] at which the running sum of shares passes each row's mass; never one whose share is zero."""
    running_RV = shares_RV.to(mass_R.dtype).cumsum(-1)
    found = torch.searchsorted(running_RV, mass_R.unsqueeze(1), right=True).squeeze(1)
    # rounding of the mass may point behind the last share that is not zero
    places = torch.arange(1, shares_RV.shape[1] + 1, device=found.device)
    last = ((shares_RV > 0) * places).amax(-1) - 1
    return torch.minimum(found, last).clamp_min(0)


def _draw_whole(scores_RV: Tensor, choosers: Sequence[Chooser]) -> list[int]:
    """From the whole distribution: first a block of words, then a word in it (running sums of 250,880 words in
    float64 cost 100 ms for 16 answers, sums of blocks 10)."""
    uniform_R = _uniform(choosers, scores_RV.device)
    words = scores_RV.shape[1]
    shares_RBW = F.pad(scores_RV.softmax(-1), (0, -words % BLOCK)).unflatten(1, (-1, BLOCK))
    blocks_RB = shares_RBW.sum(-1, dtype=uniform_R.dtype)
    mass_R = uniform_R * blocks_RB.sum(-1)
    block_R = _pick(blocks_RB, mass_R)
    rows = torch.arange(len(choosers), device=scores_RV.device)
    below_R = (blocks_RB.cumsum(-1) - blocks_RB)[rows, block_R]
    word_R = _pick(shares_RBW[rows, block_R], mass_R - below_R)
    return [int(token) for token in (block_R * BLOCK + word_R).tolist()]


def _draw_cut(scores_RV: Tensor, choosers: Sequence[Chooser]) -> list[int]:
    """top_k, then the smallest set of tokens that holds a share of top_p (transformers' order and bounds)."""
    uniform_R = _uniform(choosers, scores_RV.device)
    words = scores_RV.shape[1]
    settings = [chooser.settings for chooser in choosers]
    top_k = [min(one.top_k or words, words) for one in settings]
    some = min(words, CANDIDATES)
    values_RC, ids_RC = scores_RV.topk(some)
    total_R = scores_RV.logsumexp(-1)
    tokens = [0] * len(choosers)
    short = []
    kept_RC = _kept(values_RC, total_R, top_k, settings)
    enough = (kept_RC[:, -1] == 0).tolist()
    for at, token in enumerate(_pick_in_order(kept_RC, ids_RC, uniform_R)):
        tokens[at] = token
        if some < words and not enough[at] and top_k[at] > some:
            short.append(at)
    for at in short:  # a flat distribution
        values, ids = scores_RV[at].sort(descending=True)
        kept = _kept(values[None], total_R[at : at + 1], [top_k[at]], [settings[at]])
        tokens[at] = _pick_in_order(kept, ids[None], uniform_R[at : at + 1])[0]
    return tokens


def _pick_in_order(shares_RC: Tensor, ids_RC: Tensor, uniform_R: Tensor) -> list[int]:
    """Token ids drawn from candidates in any order."""
    ids_RC, order_RC = ids_RC.sort(-1)
    shares_RC = shares_RC.gather(1, order_RC)
    place_R = _pick(shares_RC, uniform_R * shares_RC.sum(-1, dtype=uniform_R.dtype))
    return [int(token) for token in ids_RC.gather(1, place_R.unsqueeze(1)).squeeze(1).tolist()]


def _kept(
    values_RC: Tensor, total_R: Tensor, top_k: Sequence[int], settings: Sequence[GenerationSettings]
) -> Tensor:
    """Shares of sorted candidates, zero for those that top_k or top_p leave out. The best one always stays."""
    place_C = torch.arange(values_RC.shape[1], device=values_RC.device)
    k_R1 = torch.tensor(top_k, device=values_RC.device).unsqueeze(1)
    inside = values_RC.masked_fill(place_C >= k_R1, float("-inf"))
    # a top_k within the candidates is a distribution of its own
    whole_R1 = torch.where(
        k_R1 <= values_RC.shape[1], inside.logsumexp(-1, keepdim=True), total_R.unsqueeze(1)
    )
    shares = (inside - whole_R1).exp()
    p_R1 = torch.tensor([one.top_p for one in settings], device=values_RC.device).unsqueeze(1)
    before = shares.cumsum(-1) - shares
    return shares.masked_fill((before >= p_R1) & (place_C > 0), 0.0)


def logs_of(logits_RV: Tensor, tokens: Sequence[int], choosers: Sequence[Chooser]) -> list[TokenLog | None]:
    """What rows that asked for it want to know of their token: natural logarithms under the model alone."""
    found: list[TokenLog | None] = []
    for logits_V, token, chooser in zip(logits_RV, tokens, choosers, strict=True):
        if chooser.logprobs is None:
            found.append(None)
            continue
        logs_V = logits_V.float().log_softmax(-1)
        values, ids = logs_V.topk(min(chooser.logprobs, len(logs_V)))
        best = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        found.append(TokenLog(token, float(logs_V[token]), best))
    return found
