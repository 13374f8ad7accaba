"""What a model makes of some texts, and how much of its probability falls on words that were taken out."""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tuoling import environment
from tuoling.errors import ModelError
from tuoling.language import tr
from tuoling.text.render import Segment
from tuoling.text.tokenizer import TextTokenizer
from tuoling.weights.parity import Weights
from tuoling.weights.parity_child import padded
from tuoling.weights.parity_sides import FolderSide, read_config

CHILD = (sys.executable, "-m", "tuoling.weights.prune_score")

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
    """Run the model over the texts, layer by layer, in float32, in a process of its own.

    kept: ids of the words that count as inside. Raises ModelError where the model cannot be run.
    """
    rows = [ids for ids, _ in tokenizer.encode_batch(texts)]
    characters = sum(len(tokenizer.decode(ids)) for ids in rows)
    measured = _measure_apart(weights, rows, None if kept is None else kept.tolist())
    return TextScore(characters=characters, **measured)


def _measure_apart(weights: Weights, rows: list[list[int]], kept: list[int] | None) -> dict[str, Any]:
    """`measure` in the child."""
    request = pickle.dumps(sys.path) + pickle.dumps((weights, rows, kept))
    done = subprocess.run(CHILD, input=request, capture_output=True, check=False)
    if done.returncode:
        last = (done.stderr.decode("utf-8", "replace").strip().splitlines() or [str(done.returncode)])[-1]
        raise ModelError(
            tr(f"the model could not be measured: {last}", f"无法测量该模型：{last}"),
            where=str(weights.folder),
            remedy=tr("--no-verify goes on without", "--no-verify 可跳过"),
        )
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def measure(weights: Weights, rows: Sequence[list[int]], kept: Sequence[int] | None) -> dict[str, float]:
    """The figures of `TextScore` that need the model."""
    nothing = lambda: None  # noqa: E731
    side = FolderSide(weights, None, {}, tick=nothing, before_drop=nothing)
    words = read_config(weights).get_text_config().vocab_size
    outside_V = torch.zeros(words, dtype=torch.bool)
    if kept is not None:
        outside_V[:] = True
        outside_V[list(kept)] = False
    tokens, nats, outside, best = 0, 0.0, 0.0, 0
    for part in _parts(rows, words):
        for ids, logits_TV in zip(part, side.logits(padded(part)), strict=True):
            log_TV = logits_TV[: len(ids) - 1].log_softmax(-1)
            nats -= float(log_TV.gather(1, torch.tensor(ids[1:])[:, None]).double().sum())
            tokens += len(ids) - 1
            outside += float(log_TV[:, outside_V].exp().double().sum())
            best += int(outside_V[log_TV.argmax(-1)].sum())
    places = max(tokens, 1)
    return {"tokens": tokens, "nats": nats, "outside": outside / places, "outside_best": best / places}


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


def main() -> None:
    """Answer the pickled request on stdin with one line of JSON; whatever else is printed goes to stderr."""
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    environment.quiet_libraries()
    sys.path[:] = pickle.load(sys.stdin.buffer)
    answer.write(json.dumps(measure(*pickle.load(sys.stdin.buffer))) + "\n")
    answer.flush()


if __name__ == "__main__":
    main()
