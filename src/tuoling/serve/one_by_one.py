"""Engines that answer one question at a time (GGUF, an endpoint, a model that cannot be batched): callers take turns."""

from __future__ import annotations

import threading
import time
from contextlib import closing
from dataclasses import replace

from tuoling import console
from tuoling.errors import TuolingError
from tuoling.infer.engine import append_only
from tuoling.language import tr
from tuoling.serve.jobs import Ask, Busy, Closing, Delta, FairQueue, Impossible, Job, TimedOut, TooManyTokens
from tuoling.text.conversation import Conversation


class OneByOne:
    """Implements `Backend` over any engine's own stream."""

    logprobs = False
    rows = 1

    def __init__(self, *, waiting: int = 64) -> None:
        self._limit = waiting
        self._queue = FairQueue()
        self._wake = threading.Condition()
        self._running: Job | None = None
        self._closing = False
        self._deadline = float("inf")
        self._answer_s = 1.0
        self._thread = threading.Thread(target=self._work, name="tuoling-one-by-one", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job. Raises Busy, Closing, TooManyTokens or Impossible."""
        order = job.order
        for prompt in order.prompts:
            if not isinstance(prompt, Conversation):
                raise Impossible(
                    tr("this engine takes texts, no token ids", "该引擎只接受文本，不接受 token 编号")
                )
            if order.whole_room and order.engine.context_tokens is not None:
                tokens, room = order.engine.count_tokens(prompt), order.settings.max_new_tokens
                if tokens + room > order.engine.context_tokens:
                    raise TooManyTokens(tokens, room, order.engine.context_tokens)
        with self._wake:
            if self._closing:
                raise Closing
            if len(self._queue) + len(order.prompts) > self._limit + (self._running is None):
                raise Busy(len(self._queue), max(1, min(600, round(self._answer_s * (1 + len(self._queue))))))
            for number in range(len(order.prompts)):
                self._queue.put(Ask(job, number, []))
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """It stops within one token, or never starts."""
        job.cancelled.set()
        with self._wake:
            self._queue.keep(lambda ask: not ask.job.gone)

    def load(self) -> tuple[int, int]:
        """Answers that grow now, and those that wait."""
        with self._wake:
            return int(self._running is not None), len(self._queue)

    def close(self, drain_s: float = 0.0) -> None:
        """Refuse new jobs, let those that are in finish for `drain_s` seconds, fail the rest."""
        with self._wake:
            self._closing = True
            self._deadline = min(self._deadline, time.monotonic() + drain_s)
            self._wake.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._wake:
                self._running = None
                while not len(self._queue):
                    if self._closing:
                        return
                    self._wake.wait()
                ask = self._queue.pop()
                self._running = ask.job
            begun = time.monotonic()
            try:
                for choice in ask.choices:
                    if not self._over(ask.job):
                        self._answer(ask, choice)
            except Exception as error:
                if not isinstance(error, TuolingError):
                    console.warn(f"{type(error).__name__}: {error}")
                    error = TuolingError(tr("the engine failed", "引擎出错"))
                ask.job.fail(error)
            self._answer_s += 0.1 * (time.monotonic() - begun - self._answer_s)

    def _over(self, job: Job) -> bool:
        """Whether nobody waits for it, or it has had its time."""
        if time.monotonic() > self._deadline:
            job.fail(Closing())
        elif job.overdue:
            job.fail(TimedOut(job.order.timeout_s or 0.0))
        return job.gone

    def _answer(self, ask: Ask, choice: int) -> None:
        order = ask.job.order
        settings = order.settings
        if settings.seed is not None:
            settings = replace(settings, seed=(settings.seed + choice) % 2**63)
        prompt = order.prompts[ask.number]
        assert isinstance(prompt, Conversation)
        with closing(order.engine.stream(prompt, settings)) as pieces:
            for piece in append_only(pieces):
                if self._over(ask.job):
                    return  # leaving the stream stops it within a token
                if piece.text:
                    ask.job.on_event(Delta(choice, piece.text))
                if piece.reply is not None:
                    ask.job.finish(choice, piece.reply)
