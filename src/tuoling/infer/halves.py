"""A batch that does not fit in the device's memory, in halves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tuoling import console
from tuoling.errors import ModelError
from tuoling.language import tr

Rows = list[list[int]]


def in_halves(run: Callable[[Sequence[list[int]]], Rows], prompts: Sequence[list[int]]) -> Rows:
    """`run(prompts)`, in halves where all at once run out of memory. Raises ModelError where one alone does."""
    try:
        return run(prompts)
    except torch.OutOfMemoryError as error:
        if len(prompts) == 1:
            raise ModelError(
                tr(
                    f"the card's memory does not hold one answer to a prompt of {len(prompts[0])} tokens",
                    f"显存放不下对 {len(prompts[0])} 个 token 的提示的一个回答",
                ),
                remedy=tr(
                    "--max-new-tokens N, fewer beams, --quantization-bit 4, --max-memory 0=8GiB",
                    "调小 --max-new-tokens、减少束数，或用 --quantization-bit 4、--max-memory 0=8GiB",
                ),
            ) from error
    torch.cuda.empty_cache()
    console.warn(
        tr(
            f"the card's memory does not hold {len(prompts)} answers at once: in halves (--batch-size sets how many)",
            f"显存放不下 {len(prompts)} 个同时生成的回答：分成两半（--batch-size 设定个数）",
        )
    )
    middle = len(prompts) // 2
    return in_halves(run, prompts[:middle]) + in_halves(run, prompts[middle:])
