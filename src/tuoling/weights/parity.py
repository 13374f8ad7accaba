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
import math
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from rich.cells import cell_len

from tuoling import console
from tuoling.errors import ModelError
from tuoling.files import write_json
from tuoling.language import tr
from tuoling.models.source import find_model

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
    """A model folder, and adapters on top of it, each with its weight (1.0: as it was trained).

    described_by: folder with config.json and tokenizer, where `folder` has none (Meta's layout).
    """

    folder: Path
    adapters: tuple[tuple[Path, float], ...] = ()
    described_by: Path | None = None


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
    request = Request(_weights(before), _weights(after), tuple(probes or PROBES), lossless, vocabulary)
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


def judge(measured: Mapping[str, Any], *, lossless: bool, bound: Bound | None, seconds: float) -> Parity:
    """The verdict on the child's figures."""
    found = dict(measured)
    exact, layers, stored_as = found.pop("exact"), found.pop("layers"), found.pop("stored_as")
    found["greedy"] = tuple(Greedy(**text) for text in found["greedy"])
    tolerance = None
    if lossless:
        relative = 0.0 if exact else rounding_tolerance(stored_as, layers)
        tolerance, bound = relative * found["spread"], None
    else:
        bound = bound or Bound()
    reasons = tuple(_reasons(found, tolerance, bound))
    return Parity(
        passed=not reasons,
        lossless=lossless,
        tolerance=tolerance,
        bound=bound,
        reasons=reasons,
        seconds=round(seconds, 1),
        **found,
    )


def rounding_tolerance(stored_as: str | None, layers: int) -> float:
    """Largest difference, in spreads, that rounding explains; `stored_as` None: an engine computed one side.

    Every number after a matmul carries a relative error of about 0.4 u (u: half the type's eps, uniform rounding of
    each weight), four such in a row in each layer, added in the square: 0.8 u sqrt(layers), of which the largest of
    ten million logits lies 5.3 deviations out: 4.2 u sqrt(layers). Twice that is allowed, and 2^-17 for sums of
    float32 in another order (4096 terms: sqrt(4096) x 2^-24 = 2^-18).
    """
    if stored_as is None:
        return ENGINE_TOLERANCE
    unit = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}.get(stored_as, 2.0**-24)
    return (8 * unit + 2.0**-17) * math.sqrt(layers + 1)


def _reasons(found: Mapping[str, Any], tolerance: float | None, bound: Bound | None) -> Iterator[str]:
    """Why it does not pass; nothing where it does."""
    difference = found["max_logit_difference"]
    if tolerance is not None and difference > tolerance:
        yield tr(
            f"logits differ by {difference:.3g}, allowed {tolerance:.3g}",
            f"logits 相差 {difference:.3g}，允许 {tolerance:.3g}",
        )
    if bound is None:
        return
    ratio, agreement = found["perplexity_after"] / found["perplexity_before"], found["top1_agreement"]
    if ratio > bound.perplexity:
        yield tr(
            f"perplexity x {ratio:.3g}, allowed x {bound.perplexity:.3g}",
            f"困惑度变为 {ratio:.3g} 倍，允许 {bound.perplexity:.3g} 倍",
        )
    if agreement < bound.top1:
        yield tr(
            f"the best next word agrees at {agreement:.1%} of positions, {bound.top1:.0%} needed",
            f"首选词在 {agreement:.1%} 的位置一致，至少应为 {bound.top1:.0%}",
        )


def table(parity: Parity) -> list[str]:
    """The figures for a person, one line each."""
    change = parity.perplexity_after / parity.perplexity_before - 1
    allowed = (
        tr(f"allowed {parity.tolerance:.3g}", f"允许 {parity.tolerance:.3g}")
        if parity.tolerance is not None
        else tr("the price of this step", "这一步的代价")
    )
    unequal = sum(text.before != text.after for text in parity.greedy)
    rows = [
        (
            tr("largest logit difference", "logits 最大差"),
            f"{parity.max_logit_difference:.3g} ({allowed}; "
            + tr(f"spread {parity.spread:.3g})", f"标准差 {parity.spread:.3g}）").replace("）", ")"),
        ),
        (tr("best next word agrees", "首选词一致"), f"{parity.top1_agreement:.2%}"),
        (
            tr("perplexity", "困惑度"),
            f"{parity.perplexity_before:.4f} → {parity.perplexity_after:.4f} ({change:+.2%})",
        ),
        (
            tr("greedy text", "贪心文本"),
            tr("equal", "相同")
            if parity.greedy_equal
            else tr(f"differs on {unequal} of {len(parity.greedy)}", f"{len(parity.greedy)} 条中有 {unequal} 条不同"),
        ),
    ]
    if parity.rounding_difference is not None:
        rows.insert(
            1, (tr("of rounding to the new type", "换成新类型的舍入"), f"{parity.rounding_difference:.3g}")
        )
    rows += [
        (tr(f"{side} ran", {"before": "转换前", "after": "转换后"}[side]), how)
        for side, how in parity.streamed.items()
        if how != "streamed"
    ]
    memory = "" if parity.peak_gib is None else f"{parity.peak_gib:.2f} GiB, "
    rows.append((tr("memory, time", "内存、用时"), f"{memory}{parity.seconds:.0f} s"))
    verdict = tr("passed", "通过") if parity.passed else tr("NOT passed", "未通过")
    positions = tr(
        f"{parity.positions} positions of {len(parity.greedy)} probes, {parity.columns} words",
        f"{len(parity.greedy)} 条探针 {parity.positions} 个位置，{parity.columns} 个词",
    )
    width = max(cell_len(label) for label, _ in rows)
    lines = [f"  {label}{' ' * (width - cell_len(label))}  {value}" for label, value in rows]
    return [tr(f"parity {verdict}: {positions}", f"一致性检查{verdict}：{positions}"), *lines]


def as_record(parity: Parity) -> dict[str, Any]:
    """What parity.json holds: the verdict first."""
    return {**asdict(parity), "verified": True}


def _weights(side: Side) -> Weights | LogitsModel:
    """A folder's weights with the adapters that its files name; anything else as it is."""
    if not isinstance(side, Path | str):
        return side
    path = Path(side)
    if path.is_dir() and (path / "config.json").is_file() and not (path / "run.json").is_file():
        return Weights(path)
    source = find_model(side)
    return Weights(source.weights_path, ((source.path, 1.0),) if source.is_adapter else ())


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
        raise ParityError(said["problem"], where=said["where"], remedy=said["remedy"] or _way_past())
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        last = tr("the system killed it for its memory", "系统因内存不足将其终止")
    raise ParityError(
        tr(f"the check itself failed: {last or code}", f"检查本身失败：{last or code}"), remedy=_way_past()
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


def _way_past() -> str:
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
