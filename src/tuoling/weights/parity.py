"""The parity gate: after every step that writes weights, proof that the result computes the same.

Both sides answer fixed Chinese and English probes in one child process, by one route: float32 arithmetic on the
stored values, decoder layer by decoder layer, each read from the files, used and dropped (`weights/streamed.py`).
Equal weights therefore give logits that are equal to the last bit, and the tolerance of a lossless step is 0:

- same type, or a wider one (bf16 → fp32):   exactly 0.
- a narrower one (fp32 → bf16, bf16 → fp16): exactly 0 against the weights before, rounded to the type after;
  what the rounding itself costs is shown beside it (`rounding_difference`).
- an adapter merged into its base:           against W + s B A added in float32 here and rounded to the type after.
  The two sums may end in different last bits, and a few weights then round the other way: see `merge_tolerance`.
  What merging costs against the adapter beside its base, W x + s B A x, is shown as `rounding_difference`.
- another engine, or a model that is no sum of such layers: see `rounding_tolerance` and `ENGINE_TOLERANCE`.

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
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Protocol

from tuoling import console
from tuoling.errors import ModelError
from tuoling.files import write_json
from tuoling.language import tr
from tuoling.models.source import find_model
from tuoling.weights.parity_figures import Bound, Parity, as_record, judge, table

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Beside", "Bound", "Parity", "ParityError", "Weights", "as_record", "gate", "record_of", "skipped"]

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


class ParityError(ModelError):
    """What was written does not compute the same as what it was made from."""


class LogitsModel(Protocol):
    """A side that is no folder of weights: any picklable object. It is sent to the child, and used only there."""

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """[T, V] for one sequence of T ids: what comes after each of them."""
        ...


class Beside(NamedTuple):
    """An adapter beside its base, and how much of it counts (1.0: as it was trained).

    lora_alpha: of an adapter whose files do not say it.
    """

    folder: Path
    weight: float = 1.0
    lora_alpha: float | None = None


@dataclass(frozen=True, slots=True)
class Weights:
    """A model folder or file, and adapters on top of it.

    described_by:      folder with config.json and tokenizer, where `folder` has none (Meta's layout).
    multiply_out:      quantised layers are read as the plain weights they stand for, not run by gptqmodel.
    allow_remote_code: the model's own Python code may be run.
    """

    folder: Path
    adapters: tuple[Beside, ...] = ()
    described_by: Path | None = None
    multiply_out: bool = False
    allow_remote_code: bool = False


Side = Path | str | Weights | LogitsModel
"""A model, run or adapter folder (an adapter with its base), `Weights`, or an engine."""


@dataclass(frozen=True, slots=True)
class Request:
    """What the child is asked."""

    before: Weights | LogitsModel
    after: Weights | LogitsModel
    probes: tuple[str, ...]
    lossless: bool
    vocabulary: Sequence[int] | None = None


def gate(
    before: Side,
    after: Side,
    *,
    lossless: bool,
    probes: Sequence[str] | None = None,
    vocabulary: Sequence[int] | None = None,
    bound: Bound | None = None,
    record: Path | None = None,
    allow_remote_code: bool = False,
    say: Callable[[str], None] = console.note,
) -> Parity:
    """Compare what two sets of weights compute; write parity.json beside the output and return the figures.

    vocabulary: where ids differ: the id before of every id after, -1 for a new one. Shared words are compared.
    bound:      what a lossy step may cost; not read for a lossless one.
    record:     where the figures are written: by default in the folder `after`, or beside the file `after`.
    allow_remote_code: Python code in the folders may be run.
    Raises ParityError, with the figures, where it does not pass (nothing is written then).
    """
    old, new = (_weights(side, allow_remote_code) for side in (before, after))
    request = Request(old, new, tuple(probes or PROBES), lossless, vocabulary)
    began = time.perf_counter()
    measured = _measure(request)
    parity = judge(measured, lossless=lossless, bound=bound, seconds=time.perf_counter() - began)
    for line in table(parity):
        say(line)
    where = record or _record_of_side(after)
    if not parity.passed:
        raise ParityError(
            tr("what was written does not compute the same: ", "写出的权重与原来的计算结果不同：")
            + "; ".join(parity.reasons),
            where=str(where.parent) if where else None,
            remedy=tr("to keep it all the same: --no-verify", "若仍要保留：--no-verify"),
        )
    if where is not None:
        write_json(where, as_record(parity))
    return parity


def _weights(side: Side, allow_remote_code: bool) -> Weights | LogitsModel:
    """A folder's weights with the adapters that its files name; an engine as it is."""
    if isinstance(side, Weights):
        return replace(side, allow_remote_code=side.allow_remote_code or allow_remote_code)
    if not isinstance(side, Path | str):
        return side
    path = Path(side)
    if path.is_dir() and (path / "config.json").is_file() and not (path / "run.json").is_file():
        return Weights(path, allow_remote_code=allow_remote_code)
    source = find_model(side)
    adapters = (Beside(source.path),) if source.is_adapter else ()
    return Weights(source.weights_path, adapters, allow_remote_code=allow_remote_code)


def _measure(request: Request) -> dict[str, Any]:
    """Run the child. Raises what it raised, or ParityError where it ended without an answer."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as notes:
        child = subprocess.Popen(CHILD, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=notes)
        try:
            assert child.stdin is not None and child.stdout is not None
            with suppress(BrokenPipeError):  # it has ended: what it said is read below
                child.stdin.write(pickle.dumps(sys.path) + pickle.dumps(request))
                child.stdin.close()
            answer = _follow(child.stdout)
            code = child.wait()
        finally:
            child.kill()
            child.wait()
        notes.seek(0)
        last = (notes.read().strip().splitlines() or [""])[-1]
    if "measured" in answer:
        measured: dict[str, Any] = answer["measured"]
        return measured
    if "error" in answer:
        said = answer["error"]
        raise ParityError(said["problem"], where=said["where"], remedy=said["remedy"] or _without_check())
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        last = tr("the system killed it for its memory", "系统因内存不足将其终止")
    raise ParityError(
        tr(f"the check itself failed: {last or code}", f"检查本身失败：{last or code}"),
        remedy=_without_check(),
    )


def _follow(lines: IO[bytes]) -> dict[str, Any]:
    """Show a bar while passes are reported; the last line is the answer."""
    answer: dict[str, Any] = {}
    with console.progress() as bar:
        task = bar.add_task(tr("parity", "一致性检查"), total=GREEDY_TOKENS + 3, detail="")
        for line in lines:
            answer = json.loads(line)
            if "pass" in answer:
                bar.update(task, completed=answer["pass"])
    return answer


def _without_check() -> str:
    return tr("to go on without it: --no-verify", "跳过检查：--no-verify")


def _record_of_side(after: Side) -> Path | None:
    if isinstance(after, Weights):
        return record_of(after.folder)
    return record_of(Path(after)) if isinstance(after, Path | str) else None


def skipped(after: Path, *, record: Path | None = None) -> None:
    """Write down that nothing was compared, because the user said `--no-verify`."""
    write_json(record or record_of(after), {"verified": False, "why": "--no-verify"})


def record_of(after: Path) -> Path:
    """Where the figures about `after` lie: inside a folder, beside a file under its name."""
    return after / RECORD if after.is_dir() else after.with_name(f"{after.name}.{RECORD}")
