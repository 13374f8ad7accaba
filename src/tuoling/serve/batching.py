"""Continuous batching: one thread steps the model; callers join and leave between steps.

A step takes every answer that grows one token further, and a bounded number of prompt tokens of those that join, so
that a long prompt does not hold up the others. What an answer says does not depend on who shares its steps: no
padding, its own slot of keys and values, its own random numbers.
"""

from __future__ import annotations

import threading
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tuoling import console, environment
from tuoling.errors import TuolingError
from tuoling.infer.engine import PromptTooLong
from tuoling.infer.torch_engine import TorchEngine
from tuoling.language import tr
from tuoling.serve.growth import Answer
from tuoling.serve.jobs import Ask, Busy, Closing, FairQueue, Impossible, Job, TimedOut, TooManyTokens
from tuoling.serve.sampling import choose, logs_of
from tuoling.serve.stepper import Filling, Growing, Stepper

MEMORY_SHARE = 0.5
"""Of the free memory at the start, keys and values may take this much."""


@dataclass(eq=False)
class _Joining:
    """A prompt whose first `done` tokens are in `slot`."""

    ask: Ask
    slot: int
    done: int = 0


class Batcher:
    """Answers many jobs at once with a TorchEngine's model. Raises Unbatchable where that is not exact.

    rows:           answers that grow at the same time. waiting: prompts that may wait besides.
    prompt_tokens:  of prompts that join, at most so many in one step.
    memory_tokens:  rows x (prompt + answer) tokens that may be kept at once; measured from free memory by default.
    """

    logprobs = True

    def __init__(
        self,
        engine: TorchEngine,
        *,
        rows: int = 16,
        waiting: int = 64,
        prompt_tokens: int = 256,
        memory_tokens: int | None = None,
    ) -> None:
        self.engine = engine
        self.rows = rows
        self._limit = waiting
        self._prompt_tokens = prompt_tokens
        self.stepper = Stepper(engine.model, slots=rows)
        self.memory_tokens = memory_tokens or self._free_tokens()
        self.steps = 0
        self._answers: list[Answer] = []
        self._joining: _Joining | None = None
        self._taken: set[Job] = set()
        self._queue = FairQueue()
        self._wake = threading.Condition()
        self._closing = False
        self._deadline = float("inf")
        self._answer_s = 1.0
        self._thread = threading.Thread(target=self._work, name="tuoling-batching", daemon=True)
        self._thread.start()

    def _free_tokens(self) -> int:
        device = str(self.engine.device)
        free = environment.memory_available_bytes(device if device.startswith("cuda") else "cpu")
        return max(int(free * MEMORY_SHARE) // max(self.stepper.bytes_per_token, 1), 1)

    # -- what callers call -------------------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Queue a job. Raises Busy, Closing, PromptTooLong or Impossible."""
        asks = [self._ask(job, number) for number in range(len(job.order.prompts))]
        job.prompt_ids = [ask.ids for ask in asks]
        with self._wake:
            if self._closing:
                raise Closing
            if len(self._queue) + len(asks) > self._limit + self._free_rows():
                raise Busy(len(self._queue), self._retry_after_s())
            for ask in asks:
                self._queue.put(ask)
            self._wake.notify()

    def _ask(self, job: Job, number: int) -> Ask:
        order, prompt = job.order, job.order.prompts[number]
        engine: Any = order.engine
        ids = list(prompt) if isinstance(prompt, tuple) else engine.prompt_ids(prompt)
        limit = engine.context_tokens
        if not ids:
            raise Impossible(tr("the prompt has no tokens", "提示中没有 token"))
        words = self.stepper.words
        if not all(0 <= token < words for token in ids):
            raise Impossible(tr(f"token ids are 0 to {words - 1}", f"token 编号的范围是 0 到 {words - 1}"))
        if limit is not None and len(ids) + 1 > limit:
            raise PromptTooLong(len(ids), limit - 1)
        if limit is not None and order.whole_room and len(ids) + order.settings.max_new_tokens > limit:
            raise TooManyTokens(len(ids), order.settings.max_new_tokens, limit)
        ask = Ask(job, number, ids)
        if order.choices > self.rows:
            raise Impossible(
                tr(
                    f"n={order.choices}, this server answers {self.rows} at once",
                    f"n={order.choices}，本服务器同时最多回答 {self.rows} 个",
                )
            )
        need = order.choices * ask.need_tokens
        if need > self.memory_tokens:
            raise Impossible(
                tr(
                    f"needs memory for {need} tokens, there is memory for {self.memory_tokens}",
                    f"需要 {need} 个 token 的内存，只有 {self.memory_tokens} 个",
                ),
                remedy=tr("ask for fewer tokens", "减少 max_tokens"),
            )
        return ask

    def cancel(self, job: Job) -> None:
        """It stops within one token, or never starts."""
        job.cancelled.set()
        with self._wake:
            self._wake.notify()

    def load(self) -> tuple[int, int]:
        """Answers that grow now, and those that wait."""
        with self._wake:
            joining = 0 if self._joining is None else len(self._joining.ask.choices)
            return len(self._answers) + joining, len(self._queue)

    def close(self, drain_s: float = 0.0) -> None:
        """Refuse new jobs, let those that are in finish for `drain_s` seconds, fail the rest, put the model back."""
        with self._wake:
            self._closing = True
            self._deadline = min(self._deadline, time.monotonic() + drain_s)
            self._wake.notify()
        self._thread.join()
        with self._wake:  # two may close at once: the signal's thread and the server's end
            self.stepper.close()

    def _free_rows(self) -> int:
        joining = 0 if self._joining is None else len(self._joining.ask.choices)
        return max(self.rows - len(self._answers) - joining, 0)

    def _retry_after_s(self) -> int:
        """When a place should be free: the line's length in rounds of the mean time an answer took of late."""
        return max(1, min(600, round(self._answer_s * (1 + len(self._queue) / self.rows))))

    # -- the thread --------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._wake:
                while not (self._busy or self._closing):
                    self._wake.wait()
                if self._closing and not self._busy:
                    return
            self._drop_gone()
            try:
                self._step()
            except Exception as error:
                self._fail_all(error)

    @property
    def _busy(self) -> bool:
        return bool(self._answers or self._joining or len(self._queue))

    def _drop_gone(self) -> None:
        """Forget what was cancelled, is overdue, or outlives the server."""
        ending = time.monotonic() > self._deadline
        with self._wake:
            jobs = self._queue.jobs()
        jobs |= {answer.job for answer in self._answers}
        if self._joining is not None:
            jobs.add(self._joining.ask.job)
        for job in jobs:
            if ending:
                job.fail(Closing())
            elif job.overdue:
                job.fail(TimedOut(job.order.timeout_s or 0.0))
        with self._wake:
            self._queue.keep(lambda ask: not ask.job.gone)
        if self._joining is not None and self._joining.ask.job.gone:
            self._joining = None
        self._leave([answer for answer in self._answers if answer.job.gone])

    def _leave(self, leaving: list[Answer]) -> None:
        """Take answers out; the last one moves into each gap, so that those that grow lie without gaps."""
        cache = self.stepper.cache
        for answer in leaving:
            at, last = self._answers.index(answer), len(self._answers) - 1
            if answer.spoiled:
                cache.wipe(at)
            moved = self._answers.pop()
            if at != last:
                cache.copy(last, at, moved.length)
                self._answers[at] = moved
        joining = self._joining
        if joining is not None and joining.slot != len(self._answers):
            cache.copy(joining.slot, len(self._answers), joining.done)
            joining.slot = len(self._answers)
        if not self._busy:
            cache.free()

    def _step(self) -> None:
        """One forward: a token for each answer, and pieces of prompts."""
        self._taken.clear()
        growing = [Growing(answer.length, answer.ids[-1], answer.layers) for answer in self._answers]
        pieces, joined = self._join()
        if not growing and not pieces:
            return
        with self._selected([joining.ask for joining, _ in pieces]):
            logits = self.stepper.step(growing, [piece for _, piece in pieces])
        self.steps += 1
        at = len(growing)
        answers = list(self._answers)
        rows = list(range(at))
        for number, (joining, piece) in enumerate(pieces):
            joining.done += len(piece.ids)
            if joining in joined:
                made = [self._answer(joining, choice) for choice in joining.ask.choices]
                for extra in range(1, len(made)):
                    self.stepper.cache.copy(joining.slot, joining.slot + extra, joining.done)
                answers += made
                rows += [at + number] * len(made)
        self._answers = answers
        if answers:
            self._say(logits if rows == list(range(len(logits))) else logits[rows], answers)

    def _join(self) -> tuple[list[tuple[_Joining, Filling]], list[_Joining]]:
        """Pieces of prompts for this step, and those that are whole with it; at most one prompt stays unfinished."""
        budget, slot = self._prompt_tokens, len(self._answers)
        pieces: list[tuple[_Joining, Filling]] = []
        whole: list[_Joining] = []
        while budget > 0:
            joining = self._joining or self._admit(slot, [one.ask for one in whole])
            if joining is None:
                break
            ids = joining.ask.ids[joining.done : joining.done + budget]
            piece = Filling(joining.slot, joining.done, ids, _layers(joining.ask))
            pieces.append((joining, piece))
            budget -= len(ids)
            if joining.done + len(ids) < len(joining.ask.ids):
                self._joining = joining
                break
            self._joining = None
            whole.append(joining)
            slot += len(joining.ask.choices)
        return pieces, whole

    def _admit(self, slot: int, others: list[Ask]) -> _Joining | None:
        """The next prompt in the line, if there is a row and memory for it."""
        with self._wake:
            ask = self._queue.first()
            if ask is None or slot + len(ask.choices) > self.rows:
                return None
            if not self.stepper.adapters.mixed and self._other_adapter(ask, others):
                return None
            needs = [answer.need_tokens for answer in self._answers] + [other.need_tokens for other in others]
            tallest = max([*needs, ask.need_tokens])
            if (slot + len(ask.choices)) * tallest > self.memory_tokens and slot:
                return None
            self._taken.add(self._queue.pop().job)
        return _Joining(ask, slot)

    def _selected(self, asks: list[Ask]) -> AbstractContextManager[None]:
        """Where adapters cannot share a step, the one of this step is set in the model."""
        if self.stepper.adapters.mixed:
            return nullcontext()
        engine: Any = self._answers[0].job.order.engine if self._answers else asks[0].job.order.engine
        chosen: AbstractContextManager[None] = engine.selected()
        return chosen

    def _other_adapter(self, ask: Ask, others: list[Ask]) -> bool:
        """Where adapters cannot share a step, a batch of one is answered before the next one begins."""
        orders = [answer.job.order for answer in self._answers] + [other.job.order for other in others]
        return any(order.engine is not ask.job.order.engine for order in orders)

    def _answer(self, joining: _Joining, choice: int) -> Answer:
        ask = joining.ask
        room = ask.job.order.settings.max_new_tokens
        context = ask.job.order.engine.context_tokens
        if context is not None:
            room = min(room, context - len(ask.ids))
        return Answer(ask.job, choice, prompt_tokens=len(ask.ids), room=room)

    def _say(self, logits_RV: Tensor, answers: list[Answer]) -> None:
        """Choose each answer's token, hand on its text, and let those that are whole leave."""
        choosers = [answer.chooser for answer in answers]
        tokens = choose(logits_RV, choosers)
        logs = logs_of(logits_RV, tokens, choosers)
        chosen = logits_RV.gather(1, torch.tensor(tokens, device=logits_RV.device).unsqueeze(1))
        finite = chosen.squeeze(1).isfinite().tolist()
        leaving = []
        for answer, token, log, good in zip(answers, tokens, logs, finite, strict=True):
            if not good:
                answer.spoiled = True
                answer.job.fail(Impossible(tr("the model's numbers are not finite", "模型给出了非有限数值")))
            elif answer.job.gone or answer.grow(token, log):
                pass
            else:
                continue
            leaving.append(answer)
        for answer in leaving:
            self._answer_s += 0.1 * (time.monotonic() - answer.started_at - self._answer_s)
        self._leave(leaving)

    def _fail_all(self, error: Exception) -> None:
        """A step that could not be computed ends everybody in it; the server goes on."""
        known = error if isinstance(error, TuolingError) else None
        message = tr(
            f"a step failed: {type(error).__name__}: {error}", f"计算失败：{type(error).__name__}：{error}"
        )
        console.warn(message)
        jobs = {answer.job for answer in self._answers}
        if self._joining is not None:
            jobs.add(self._joining.ask.job)
        with self._wake:  # what was taken out of the line in this step has no answer yet
            jobs |= self._taken
        for job in jobs:
            job.fail(known or TuolingError(message))
        self._answers, self._joining = [], None
        self.stepper.cache.free()


def _layers(ask: Ask) -> str | None:
    """PEFT's name of the adapter that answers."""
    engine: Any = ask.job.order.engine
    layers: str | None = engine.layers
    return layers
