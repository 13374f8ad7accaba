"""The parity gate: after every step that writes weights, proof that the result computes the same.

Both sides answer fixed Chinese and English probes in one child process, by one route: float32 arithmetic on the
stored values, decoder layer by decoder layer, each read from the files, used and dropped (`weights/streamed.py`).
Equal weights therefore give logits that are equal to the last bit, and the tolerance of a lossless step is 0:

- same type, or a wider one (bf16 → fp32):   exactly 0.
- a narrower one (fp32 → bf16, bf16 → fp16): exactly 0 against the weights before, rounded to the type after;
  what the rounding itself costs is shown beside it (`rounding_difference`).
- an adapter merged into its base:           W x + s B A x against (W + s B A) x. The sum is rounded to the type it
  is stored in, with a relative error of at most u = 2^-24, 2^-11, 2^-8 (fp32, fp16, bf16) a weight: see `rounding_tolerance`.
- another engine (llama.cpp):                its activations are rounded too: see `ENGINE_TOLERANCE`.

Differences are in units of the logits' own spread (their standard deviation over the vocabulary), where a rule
needs a number that holds for every model.
"""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tuoling import console
from tuoling.errors import ModelError
from tuoling.files import write_json
from tuoling.language import tr

if TYPE_CHECKING:
    import numpy as np

CHILD = (sys.executable, "-m", "tuoling.weights.parity_child")
RECORD = "parity.json"

PROBES = (
    "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。这首诗写的是春天的早晨，诗人醒来时听见了鸟叫。",
    "北京是中国的首都，位于华北平原的北部，人口超过两千万，有三千多年的建城历史。",
    "问：三加五等于几？答：三加五等于八。问：十二减四等于几？答：",
    "用户：请用一句话介绍你自己。\n\n助手：你好，我是一个语言模型，可以回答问题、翻译句子、写短文。",
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her dog.",
    "The capital of France is Paris, and the river that runs through the city is called the Seine. In 1889,",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))  # 5\nfor i in range(10):\n    print(i * i)\n",
)
"""Asked of every model on both sides: Chinese poetry, prose, sums and dialogue; English stories, facts, orders; code."""

PROBE_TOKENS = 32
"""Of each probe, the begin token included. 8 x 32 positions of 250,880 words are 245 MiB of float32 logits a side."""

GREEDY_TOKENS = 16
"""Greedy tokens after the first `PROMPT_TOKENS` of every probe. Each costs one pass over the weights before: of a
7B model 13.5 GB are read for each, so the count is small. The other side needs one pass to confirm them all."""

PROMPT_TOKENS = 8

ENGINE_TOLERANCE = 0.02
"""Spreads, for an engine that rounds activations as well as weights: llama.cpp keeps float16 keys and values and
differs by 1e-3 of logits whose spread is about 1 (random models in float32)."""


class ParityError(ModelError):
    """What was written does not compute the same as what it was made from."""


class LogitsModel(Protocol):
    """A side that is no folder of weights: any picklable object. It is sent to the child, and used only there."""

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """[T, V] for one sequence of T ids: what comes after each of them."""
        ...


@dataclass(frozen=True, slots=True)
class Weights:
    """A model folder, and adapters on top of it, each with its weight (1.0: as it was trained)."""

    folder: Path
    adapters: tuple[tuple[Path, float], ...] = ()


Side = Path | str | Weights | LogitsModel
"""A model, run or adapter folder (an adapter with its base), `Weights`, or an engine."""


@dataclass(frozen=True, slots=True)
class Bound:
    """What a lossy step may cost. perplexity: largest ratio after/before. top1: smallest agreement."""

    perplexity: float = 1.5
    top1: float = 0.5


@dataclass(frozen=True, slots=True)
class Greedy:
    """Greedy text after the beginning of one probe, on both sides."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Parity:
    """What was measured, and the verdict. Logits are compared at every position of every probe.

    tolerance:   largest `max_logit_difference` that passes; None for a lossy step (`bound` counts there).
    spread:      standard deviation of the logits before over the vocabulary, so that differences can be judged.
    rounding_difference: largest difference that storing in a narrower type makes; None where it is not narrower.
    columns:     words of the vocabulary that were compared (fewer than all after pruning).
    streamed:    by side, whether it ran layer by layer; else why not.
    peak_gib:    private memory of the child above the level after its imports (clean mapped pages not counted).
    resident_peak_gib: the same with mapped weight files, which the system drops when memory is needed.
    """

    passed: bool
    lossless: bool
    max_logit_difference: float
    tolerance: float | None
    spread: float
    top1_agreement: float
    perplexity_before: float
    perplexity_after: float
    greedy_equal: bool
    greedy: tuple[Greedy, ...]
    positions: int
    columns: int
    peak_gib: float | None
    resident_peak_gib: float | None
    seconds: float
    bound: Bound | None = None
    rounding_difference: float | None = None
    streamed: dict[str, str] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()


def gate(
    before: Side,
    after: Side,
    *,
    lossless: bool,
    probes: Sequence[str] | None = None,
    vocabulary: Sequence[int] | None = None,
    bound: Bound | None = None,
    record: Path | None = None,
    say: Callable[[str], None] = console.note,
) -> Parity:
    """Compare what two sets of weights compute; write parity.json beside the output and return the figures.

    vocabulary: where ids differ: the id before of every id after, -1 for a new one. Shared words are compared.
    bound:      what a lossy step may cost; not read for a lossless one.
    record:     where the figures are written: by default in the folder `after`, or beside the file `after`.
    Raises ParityError, with the figures, where it does not pass (nothing is written then).
    """
    raise NotImplementedError


def skipped(after: Path, *, record: Path | None = None) -> None:
    """Write down that nothing was compared, because the user said `--no-verify`."""
    write_json(record or record_of(after), {"passed": None, "why": "--no-verify"})


def record_of(after: Path) -> Path:
    """Where the figures about `after` lie: inside a folder, beside a file under its name."""
    return after / RECORD if after.is_dir() else after.with_name(f"{after.name}.{RECORD}")
