"""A job of generation: asks until there are rows enough, resumes after a kill, never pays twice for an answer it has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from tuoling.data.rouge_l import SimilarTexts
from tuoling.errors import DataError
from tuoling.generate.asker import Asker
from tuoling.generate.book import REJECTED, ROWS, UNPARSABLE, Book
from tuoling.generate.log import Failure, ResponseLog, replay
from tuoling.generate.request import Answer, Candidate, Request, Task, Unparsable
from tuoling.generate.tally import Limits, Tally
from tuoling.infer.openai_answers import estimate_tokens
from tuoling.language import tr

_LEARN = 5
"""Answers of a stage after which what they gave counts, and no longer what was asked for."""


class Job:
    """An iterator of the requests to send now: StopIteration means none now; more may follow when answers have come.

    stamp:      what every row's provenance says. again_lost: ask again what was under way when a run was killed.
    step:       called after every answer.
    """

    def __init__(
        self,
        folder: Path,
        task: Task,
        limits: Limits,
        stamp: dict[str, Any],
        *,
        again_lost: bool = False,
        step: Callable[[Tally], None] = lambda tally: None,
    ) -> None:
        self.tally = Tally(limits)
        self._task = task
        self._stamp = stamp
        self.step = step
        self._seen = SimilarTexts(task.limit)
        self._seen.extend(task.known())
        self._pending: dict[str, Request] = {}
        self._settled: set[str] = set()
        """Keys not to be asked (again)."""
        self._failed: set[str] = set()
        self._given: Counter[str] = Counter()
        self._answers: Counter[str] = Counter()
        self._barren = self._failing = 0
        self.log = ResponseLog(folder)
        try:
            self._book = Book(folder)
        except BaseException:
            self.log.close()
            raise
        try:
            self._replay(folder, again_lost)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._book.close()
        self.log.close()

    # -- what was done before -----------------------------------------------------------------------------------

    def _replay(self, folder: Path, again_lost: bool) -> None:
        for event in replay(folder):
            if isinstance(event, Request):
                if event.key in self._pending:  # --again-lost: the first time may have been paid for too
                    self._lose(event)
                self._pending[event.key] = event
                self.tally.asked += 1
            elif event[0] in self._pending:
                self._event(*event)
            else:
                raise DataError(
                    tr(
                        f"an answer to a question that was not asked: {event[0]}",
                        f"有回答却没有对应的问题：{event[0]}",
                    ),
                    where=str(self.log.path),
                    remedy=tr("begin anew in another --out", "换一个 --out 重新开始"),
                )
        for request in self._pending.values():
            self._lose(request)
        if not again_lost:
            self._settled.update(self._pending)
        self._pending.clear()
        self._barren = self._failing = 0
        self._book.keep()

    def _lose(self, request: Request) -> None:
        """It was under way at a kill: nobody knows whether it was paid for."""
        self.tally.lost += 1
        tokens_in, tokens_out = _at_most(request)
        self.tally.lost_in += tokens_in
        self.tally.lost_out += tokens_out

    # -- asking ---------------------------------------------------------------------------------------------------

    def run(self, asker: Asker) -> Tally:
        """Until the rows are there, nothing is left to ask, or a limit is reached (`tally.stopped`).

        Raises EndpointError where the endpoint is down for good; what came before is kept, here and at any exception.
        """
        try:
            for _ in asker.send(self):
                self._take()
        finally:
            self._take()
        return self.tally

    def __iter__(self) -> Iterator[Request]:
        return self

    def __next__(self) -> Request:
        """Not a finished iterator when it raises StopIteration: asked again after an answer it may go on."""
        tally = self.tally
        self._take()
        if tally.done or tally.stopped or not self._room():
            raise StopIteration
        request = self._held or self._fresh()
        self._held = request
        if request is None:
            raise StopIteration
        if why := self._too_dear(request):
            if not self._pending:
                tally.stopped = why
            raise StopIteration
        self._held = None
        self._settled.add(request.key)
        self._pending[request.key] = request
        self.log.asked(request)
        tally.asked += 1
        return request

    _held: Request | None = None
    """What was too dear with so much under way; it may fit when that is settled."""

    def _fresh(self) -> Request | None:
        while (request := self._task.next()) is not None:
            if request.key not in self._settled:
                return request
        return None

    def _room(self) -> bool:
        """Whether what is under way will probably not do."""
        wanted = self.tally.limits.rows
        if wanted is None:
            return True
        coming = sum(self._expected(request.stage) for request in self._pending.values())
        return self.tally.rows + coming < wanted

    def _expected(self, stage: str) -> float:
        count = self._answers[stage]
        return self._given[stage] / count if count >= _LEARN else self._task.nominal(stage)

    def _too_dear(self, request: Request) -> str:
        """Which limit this request could break, with all that is under way taking as much as it may."""
        limits, tally = self.tally.limits, self.tally
        most = [_at_most(one) for one in (*self._pending.values(), request)]
        tokens_in, tokens_out = (sum(numbers) for numbers in zip(*most, strict=True))
        if limits.tokens is not None and tally.tokens + tokens_in + tokens_out > limits.tokens:
            return tr(
                f"the budget of {limits.tokens:,} tokens leaves no room for another request",
                f"{limits.tokens:,} token 的预算已不够再发一个请求",
            )
        if limits.cost is not None and tally.cost + limits.price(tokens_in, tokens_out) > limits.cost:
            return tr(
                f"the budget of {limits.cost:g} leaves no room for another request",
                f"{limits.cost:g} 的费用预算已不够再发一个请求",
            )
        return ""

    # -- answers --------------------------------------------------------------------------------------------------

    def _take(self) -> None:
        for key, event in self.log.take_new():
            self._event(key, event)
            self.step(self.tally)

    def _event(self, key: str, event: Answer | Failure) -> None:
        request = self._pending.pop(key)
        if isinstance(event, Failure):
            self._failed.add(key)
            self.tally.failed = len(self._failed)
            if not event.again:
                self._settled.add(key)
            self._count_failing(event)
            return
        self._settled.add(key)
        self._failed.discard(key)
        self.tally.failed = len(self._failed)
        self._failing = 0
        self.tally.pay(event)
        before = self.tally.rows + self.tally.steps
        try:
            candidates = self._task.read(request, event)
        except Unparsable as why:
            self.tally.unparsable += 1
            self._book.write(UNPARSABLE, {"key": key, "why": str(why), "text": event.text})
            candidates = ()
        for candidate in candidates:
            self._judge(candidate, key, event)
        gained = self.tally.rows + self.tally.steps - before
        self._answers[request.stage] += 1
        self._given[request.stage] += gained
        self._count_barren(gained)

    def _judge(self, candidate: Candidate, key: str, answer: Answer) -> None:
        reason = self._task.verdict(candidate)
        like = None
        if reason is None and candidate.text is not None:
            like = self._seen.like(candidate.text)
            reason = "near_duplicate" if like else None
        if reason is not None:
            self.tally.rejected[reason] += 1
            more = {"like": self._seen.text(like[0]), "rouge_l": round(like[1], 4)} if like else {}
            self._book.write(REJECTED, {"reason": reason, "rejected": candidate.row, "key": key, **more})
            return
        if candidate.text is not None:
            self._seen.add(candidate.text)
        self._task.accepted(candidate)
        if not candidate.kept:
            self.tally.steps += 1
            return
        self.tally.rows += 1
        provenance = {**self._stamp, "model": answer.model, "request": key, **candidate.about}
        self._book.write(ROWS, {**candidate.row, "provenance": provenance})

    def _count_barren(self, gained: int) -> None:
        self._barren = 0 if gained else self._barren + 1
        if self._barren >= self.tally.limits.give_up_after:
            self.tally.stopped = tr(
                f"the last {self._barren} answers gave no row: look at {REJECTED} and {UNPARSABLE}",
                f"最近 {self._barren} 个回答都没有产出数据，请查看 {REJECTED} 和 {UNPARSABLE}",
            )

    def _count_failing(self, failure: Failure) -> None:
        self._failing += 1
        if self._failing >= self.tally.limits.give_up_after:
            self.tally.stopped = tr(
                f"the last {self._failing} requests failed: {failure.problem}",
                f"最近 {self._failing} 个请求都失败了：{failure.problem}",
            )


def _at_most(request: Request) -> tuple[int, int]:
    """Tokens of the prompt, by estimate, and of the longest answer asked for."""
    longest = int(request.options.get("max_tokens") or 0)
    prompt = estimate_tokens({"messages": request.messages}, {"max_tokens": 1}) - 1
    return prompt, longest
