"""One answer while it grows: its tokens, its text, and where it ends."""

from __future__ import annotations

import time
from typing import Any

from tuoling.infer.stops import StopFilter, reply_of
from tuoling.serve.jobs import Delta, Job, TokenLog
from tuoling.serve.sampling import Chooser
from tuoling.text.tokenizer import StreamDecoder

_SEED_STEP = 0x9E3779B97F4A7C15
"""Between the seeds of a request's choices: the same request gives the same choices, and they differ. The first one
is the engine's own answer."""


class Answer:
    """A choice of a job that the model works on. Its slot holds all its tokens but the newest."""

    def __init__(self, job: Job, choice: int, *, prompt_tokens: int, room: int) -> None:
        """room: tokens it may have."""
        settings = job.order.settings
        engine: Any = job.order.engine
        self.job = job
        self.choice = choice
        self.prompt_tokens = prompt_tokens
        self.layers = engine.layers
        self.started_at = time.monotonic()
        self.spoiled = False
        seed = None if settings.seed is None else (settings.seed + choice * _SEED_STEP) % 2**63
        self.chooser = Chooser(settings, engine.end_ids, seed, job.order.logprobs)
        self.need_tokens = prompt_tokens + settings.max_new_tokens
        self._engine = engine
        self._room = room
        self._stops = (*engine.stops, *settings.stop)
        self._decoder = StreamDecoder(engine.tokenizer)
        self._gate = StopFilter(self._stops)
        self._unsaid: list[TokenLog] = []

    @property
    def ids(self) -> list[int]:
        """What it has said."""
        return self.chooser.ids

    @property
    def length(self) -> int:
        """Tokens in its slot: the newest one gets there with the next step."""
        return self.prompt_tokens + len(self.ids) - 1

    def grow(self, token: int, log: TokenLog | None) -> bool:
        """Take its next token and hand on what text is certain. True where the answer is whole with it."""
        self.ids.append(token)
        ended = token in self._engine.end_ids
        text = "" if ended else self._gate.push(self._decoder.push(token))
        if log is not None and not ended:
            self._unsaid.append(log)
        whole = ended or self._gate.stopped or len(self.ids) >= self._room
        if whole and not self._gate.stopped:
            text += self._gate.push(self._decoder.flush()) + self._gate.flush()
        if text or (whole and self._unsaid):
            self.job.on_event(Delta(self.choice, text, tuple(self._unsaid)))
            self._unsaid.clear()
        if whole:
            reply = reply_of(
                self.ids,
                self.prompt_tokens,
                self._engine.tokenizer,
                self._engine.end_ids,
                self._stops,
                cancelled=False,
            )
            self.job.finish(self.choice, reply)
        return whole
