"""Beam search as a stream. transformers refuses a streamer with beams; here its own search is watched from within.

A logits processor is called with the running sequences, the best first; a stopping criterion with the candidates
that may have ended. Nothing of the search is changed, so the last frame is what `generate` returns without a stream.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor

from tuoling.infer.engine import Piece, Reply
from tuoling.infer.stops import StopFilter
from tuoling.text.tokenizer import StreamDecoder, TextTokenizer


def alike(sequences: Sequence[Sequence[object]]) -> int:
    """How many items all of them begin with alike."""
    together = zip(*sequences, strict=False)
    return next(
        (place for place, (first, *others) in enumerate(together) if any(item != first for item in others)),
        min(map(len, sequences)),
    )


@dataclass(frozen=True, slots=True)
class Frame:
    """Ids behind the prompt after one step.

    running: of the beams that go on, the best first. common: how many ids they and every answer that has ended so
    far (and may still be chosen) begin with alike.
    """

    running: list[list[int]]
    common: int


class BeamWatch(LogitsProcessor):
    """Looks on while one conversation is searched, and hands a frame on after every step."""

    def __init__(
        self,
        prompt_tokens: int,
        num_beams: int,
        end_ids: Collection[int],
        on_frame: Callable[[Frame], None],
    ) -> None:
        self._prompt_tokens = prompt_tokens
        self._num_beams = num_beams
        self._end_ids = end_ids
        self._on_frame = on_frame
        self._ended: list[int] | None = None
        """What all ended answers begin with; None while there are none."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        running = input_ids[:, self._prompt_tokens :].tolist()
        if running[0]:
            beginnings = running if self._ended is None else [*running, self._ended]
            self._on_frame(Frame(running, alike(beginnings)))
        return scores

    def candidates(self, input_ids: torch.Tensor, stopped: Sequence[bool]) -> None:
        """Sequences [K, T] that a step has led to, the best `num_beams` in front: only these may end."""
        rows = input_ids[: self._num_beams, self._prompt_tokens :].tolist()
        for ids, at_stop in zip(rows, stopped, strict=False):
            if at_stop or ids[-1] in self._end_ids:
                ids = ids if at_stop else ids[:-1]
                self._ended = ids if self._ended is None else ids[: alike([self._ended, ids])]


class BeamText:
    """Frames as pieces of text. What all running beams share is decoded once, the rest of each anew."""

    def __init__(self, tokenizer: TextTokenizer, stops: Sequence[str]) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._gate = StopFilter(stops)
        self._shared = ""
        self._lengths = [0]
        """Characters that are certain after so many shared ids."""
        self._shown = ""

    def show(self, frame: Frame) -> Piece:
        """What to take back and append for the best running beam."""
        first = frame.running[0]
        for token in first[len(self._lengths) - 1 : alike(frame.running)]:
            self._shared += self._gate.push(self._decoder.push(token))
            self._lengths.append(len(self._shared))
        texts = tuple(self._text(ids[len(self._lengths) - 1 :]) for ids in frame.running)
        return self._piece(texts[0], texts, self._lengths[min(frame.common, len(self._lengths) - 1)], None)

    def last(self, reply: Reply) -> Piece:
        """The piece that ends at the reply."""
        return self._piece(reply.text, reply.beams, None, reply)

    def _text(self, rest: Sequence[int]) -> str:
        decoder, gate = self._decoder.fork(), self._gate.fork()
        return self._shared + "".join(gate.push(decoder.push(token)) for token in rest)

    def _piece(self, text: str, beams: tuple[str, ...], settled: int | None, reply: Reply | None) -> Piece:
        same = alike([self._shown, text])
        back, self._shown = len(self._shown) - same, text
        return Piece(text[same:], reply, back=back, settled=settled, beams=beams)
