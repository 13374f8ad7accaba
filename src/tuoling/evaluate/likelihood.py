"""How likely a model finds continuations of a text, counted as lm-eval counts them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from tuoling.errors import ModelError
from tuoling.infer.engine import Engine
from tuoling.language import tr

if TYPE_CHECKING:
    from tuoling.infer.torch_engine import TorchEngine

Ids = list[int]


def split_ids(encode: Callable[[str], Ids], context: str, continuation: str) -> tuple[Ids, Ids]:
    """Ids of both parts of one text: where the context's own ids end, the rest is the continuation's. Spaces at the
    context's end go to the continuation, where the tokenizer joins them to its first word."""
    bare = context.rstrip()
    whole = encode(context + continuation)
    return encode(bare), whole[len(encode(bare)) :]


def log_likelihoods(
    engine: Engine,
    asked: Sequence[tuple[str, Sequence[str]]],
    *,
    batch_size: int = 8,
    step: Callable[[int], None] = lambda done: None,
) -> list[list[float]]:
    """Summed log probability (nats) of each continuation of each context, in order.

    A context that is too long loses its beginning. Continuations of one token each share one forward pass.
    Raises ModelError for an engine that gives no logits.
    """
    if engine.name != "torch":
        raise ModelError(
            tr(
                f"the engine {engine.name} gives no likelihoods of choices",
                f"引擎 {engine.name} 不能给出选项的似然",
            ),
            remedy=tr("evaluate the model folder it was made from", "请评测它转换之前的模型目录"),
        )
    torch_engine = cast("TorchEngine", engine)
    hf: Any = torch_engine.tokenizer.hf
    jobs: list[_Job] = []
    for index, (context, continuations) in enumerate(asked):
        pairs = [split_ids(hf.encode, context, continuation) for continuation in continuations]
        jobs += _jobs(index, pairs, torch_engine.context_tokens)
    scores: list[list[float]] = [[0.0] * len(continuations) for _, continuations in asked]
    left = [sum(1 for job in jobs if job.index == index) for index in range(len(asked))]
    jobs.sort(key=lambda job: -len(job.ids))
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        done = 0
        for job, found in zip(batch, _forward(torch_engine, batch), strict=True):
            for place, value in found.items():
                scores[job.index][place] = value
            left[job.index] -= 1
            done += left[job.index] == 0
        step(done)
    return scores


class _Job:
    """One forward pass: ids, and for each continuation (by its place) where its tokens are predicted."""

    __slots__ = ("ids", "index", "targets")

    def __init__(self, index: int, ids: Ids, targets: dict[int, tuple[int, Ids]]) -> None:
        self.index = index
        self.ids = ids
        self.targets = targets


def _jobs(index: int, pairs: Sequence[tuple[Ids, Ids]], limit: int | None) -> list[_Job]:
    contexts = {tuple(context) for context, _ in pairs}
    if len(contexts) == 1 and all(len(continuation) == 1 for _, continuation in pairs):
        context = pairs[0][0][-limit:] if limit else pairs[0][0]
        last = len(context) - 1
        return [_Job(index, context, {place: (last, ids) for place, (_, ids) in enumerate(pairs)})]
    jobs = []
    for place, (context, continuation) in enumerate(pairs):
        ids = (context + continuation)[-(limit + 1) :] if limit else context + continuation
        first = len(ids) - 1 - len(continuation)
        jobs.append(_Job(index, ids[:-1], {place: (first, continuation)}))
    return jobs


def _forward(engine: TorchEngine, batch: Sequence[_Job]) -> list[dict[int, float]]:
    """Padded on the right: what comes behind a token changes nothing before it."""
    import torch

    longest = max(len(job.ids) for job in batch)
    device = engine.device
    ids = torch.tensor([job.ids + [0] * (longest - len(job.ids)) for job in batch], device=device)
    mask = torch.tensor([[1] * len(job.ids) + [0] * (longest - len(job.ids)) for job in batch], device=device)
    found = []
    with torch.inference_mode():
        logits = engine.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for row, job in enumerate(batch):
            begin = min(start for start, _ in job.targets.values())
            end = max(start + len(tokens) for start, tokens in job.targets.values())
            logs = torch.log_softmax(logits[row, begin:end].float(), dim=-1)
            found.append(
                {
                    place: sum(float(logs[start - begin + step, token]) for step, token in enumerate(tokens))
                    for place, (start, tokens) in job.targets.items()
                }
            )
    return found
