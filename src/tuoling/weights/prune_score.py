"""What a model makes of some texts, and how much of its probability falls on words that were taken out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tuoling.text.render import Segment
from tuoling.text.tokenizer import TextTokenizer
from tuoling.weights.parity import Weights
from tuoling.weights.parity_child import padded
from tuoling.weights.parity_sides import FolderSide, read_config

SCORED_ROWS = 8
SCORED_TOKENS = 64
LOGITS_BYTES = 128 << 20
"""8 rows of 64 tokens over 250,880 words would be 514 MB of float32 logits at once; they go in parts."""


@dataclass(frozen=True)
class TextScore:
    """nats: of all tokens but each row's first. characters: of all texts.

    outside:      mean probability that falls on words beyond the kept ones (0 where none are).
    outside_best: share of places whose most probable word is one of those.
    """

    tokens: int
    characters: int
    nats: float
    outside: float
    outside_best: float

    @property
    def bits_per_character(self) -> float:
        """The same measure for every vocabulary."""
        return self.nats / math.log(2) / max(self.characters, 1)

    def to_json(self) -> dict[str, Any]:
        """The figures, and the two that people compare."""
        perplexity = math.exp(min(self.nats / max(self.tokens, 1), 700.0))
        return {**self.__dict__, "perplexity": perplexity, "bits_per_character": self.bits_per_character}


def short_rows(batches: Iterable[list[list[Segment]]], tokenizer: TextTokenizer) -> list[list[Segment]]:
    """The first few different rows that are short enough to be scored whole; else the shortest there are."""
    fitting: dict[tuple[int, ...], list[Segment]] = {}
    longer: list[tuple[int, list[Segment]]] = []
    for batch in batches:
        for segments, (ids, _) in zip(batch, tokenizer.encode_batch(batch), strict=True):
            if 1 < len(ids) <= SCORED_TOKENS:
                fitting.setdefault(tuple(ids), segments)
            elif len(ids) > 1:
                longer.append((len(ids), segments))
            if len(fitting) == SCORED_ROWS:
                return list(fitting.values())
        longer = sorted(longer, key=lambda entry: entry[0])[:SCORED_ROWS]
    return [*fitting.values(), *(segments for _, segments in longer)][:SCORED_ROWS]


def score(
    weights: Weights,
    tokenizer: TextTokenizer,
    texts: Sequence[list[Segment]],
    *,
    kept: np.ndarray | None = None,
) -> TextScore:
    """Run the model over the texts, layer by layer, in float32. kept: ids of the words that count as inside."""
    rows = [ids for ids, _ in tokenizer.encode_batch(texts)]
    characters = sum(len(tokenizer.decode(ids)) for ids in rows)
    columns = None if kept is None else torch.from_numpy(kept)
    nothing = lambda: None  # noqa: E731
    side = FolderSide(weights, None, {}, tick=nothing, before_drop=nothing)
    tokens, nats, outside, best = 0, 0.0, 0.0, 0
    for part in _parts(rows, read_config(weights).get_text_config().vocab_size):
        logits_NTV = side.logits(padded(part))
        for ids, logits_TV in zip(part, logits_NTV, strict=True):
            log_TV = logits_TV[: len(ids) - 1].log_softmax(-1)
            nats -= float(log_TV.gather(1, torch.tensor(ids[1:])[:, None]).double().sum())
            tokens += len(ids) - 1
            if columns is not None:
                inside = torch.zeros(log_TV.shape[-1], dtype=torch.bool)
                inside[columns] = True
                outside += float(log_TV[:, ~inside].exp().double().sum())
                best += int((~inside[log_TV.argmax(-1)]).sum())
    return TextScore(tokens, characters, nats, outside / max(tokens, 1), best / max(tokens, 1))


def _parts(rows: Sequence[list[int]], words: int) -> Iterable[list[list[int]]]:
    """Rows in groups whose logits fit the budget; at least one row each."""
    room = max(1, LOGITS_BYTES // (4 * words))
    part: list[list[int]] = []
    for row in rows:
        longest = max([len(row), *map(len, part)])
        if part and longest * (len(part) + 1) > room:
            yield part
            part = []
        part.append(row)
    if part:
        yield part
