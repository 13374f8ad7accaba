"""The parts of serve.py that run in a process of their own, without a server: they print one line of JSON.

python benchmarks/serve_worker.py transformers|step MODEL CALLERS TOKENS LIMIT_S
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

LENGTH = 96
"""Tokens each answer has when a step of ours is timed."""
LINEAR = (
    "mkldnn::_linear_pointwise",
    "aten::mkldnn_linear",
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::linear",
)
ATTENTION = ("aten::_scaled_dot_product_flash_attention_for_cpu", "aten::scaled_dot_product_attention")


def transformers_alone_and_batched(
    model_path: str, callers: int, tokens: int, limit_s: float
) -> dict[str, Any]:
    """`generate` as it comes: one prompt, then all prompts as one batch."""
    import psutil
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.generation.streamers import BaseStreamer

    from serve import prompt_of

    begun = time.monotonic()
    tokenizer: Any = AutoTokenizer.from_pretrained(model_path, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16).eval()
    opened = time.monotonic() - begun
    numbers = iter(range(1, 10_000))

    class Clock(BaseStreamer):
        """Notes when the first new tokens come; the prompt is put first."""

        def __init__(self) -> None:
            self.puts: list[float] = []

        def put(self, value: Any) -> None:
            self.puts.append(time.monotonic())

        def end(self) -> None:
            """Nothing is left."""

    def run(rows: int, count: int, clock: Clock | None = None) -> float:
        """Seconds."""
        inputs = tokenizer([prompt_of(next(numbers)) for _ in range(rows)], padding=True, return_tensors="pt")
        start = time.monotonic()
        model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id or 0,
            streamer=clock,
        )
        return time.monotonic() - start

    run(1, 2)
    firsts = []
    for _ in range(3):
        clock, start = Clock(), time.monotonic()
        run(1, 2, clock)
        firsts.append(clock.puts[1] - start)
    alone = max(tokens / run(1, tokens) for _ in range(2))
    first_many = run(callers, 1)
    many = callers * tokens / run(callers, tokens)
    return {
        "opened_s": round(opened, 1),
        "first_token_alone_s": statistics.median(firsts),
        "tokens_per_s_alone": alone,
        "first_token_many_s": first_many,
        "first_token_last_s": first_many,
        "tokens_per_s_many": many,
        "answered_of_many": callers,
        "resident_mb": round(psutil.Process().memory_info().rss / 1e6),
    }


def step_by_answers(model_path: str, callers: int, tokens: int, limit_s: float) -> dict[str, Any]:
    """One forward of the server for 1 to `callers` answers: its time, its parts, and the machine's own rates."""
    from tuoling.api import load
    from tuoling.infer.engine import GenerationSettings
    from tuoling.serve.sampling import Chooser, choose
    from tuoling.serve.stepper import Growing, Stepper

    engine: Any = load(model_path, device="cpu").engine
    stepper = Stepper(engine.model, slots=callers)
    dtype = next(engine.model.parameters()).dtype
    counts = [count for count in (1, 2, 4, 8, 16, 32, 64) if count < callers] + [callers]
    rows = []
    for answers in counts:
        growing = [Growing(LENGTH, 5 + at) for at in range(answers)]

        def step(growing: list[Growing] = growing) -> Any:
            return stepper.step(growing, [])

        step_s = timed(step)
        linear_s, attention_s = parts(step)
        logits = step()
        choosers = [Chooser(GenerationSettings(), (), at) for at in range(answers)]
        choose_s = timed(lambda logits=logits, choosers=choosers: choose(logits, choosers))
        rows.append(
            {
                "answers": answers,
                "step_ms": 1e3 * step_s,
                "linear_ms": 1e3 * linear_s,
                "attention_ms": 1e3 * attention_s,
                "choose_ms": 1e3 * choose_s,
            }
        )
    if stepper.linears is not None:
        stepper.linears.undo()
    for row in rows:
        growing = [Growing(LENGTH, 5 + at) for at in range(row["answers"])]
        row["plain_ms"] = 1e3 * timed(lambda growing=growing: stepper.step(growing, []))
    weights = multiplied(engine.model)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "weights": weights,
        "weights_mb": weights * dtype.itemsize / 1e6,
        "rows": rows,
        "machine": machine(dtype),
    }


def timed(run: Callable[[], Any], repeats: int = 7) -> float:
    """Median seconds after one call that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def parts(run: Callable[[], Any], repeats: int = 3) -> tuple[float, float]:
    """Seconds of one call in linear layers and in attention, by torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(repeats):
            run()
    spent = {event.key: event.self_cpu_time_total * 1e-6 / repeats for event in profile.key_averages()}
    return sum(spent.get(name, 0.0) for name in LINEAR), sum(spent.get(name, 0.0) for name in ATTENTION)


def multiplied(model: Any) -> int:
    """Numbers that every token is multiplied with: linear layers and the head."""
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    return sum(module.in_features * module.out_features for module in linears)


def machine(dtype: torch.dtype) -> dict[str, float]:
    """What a plain sum reads and what a large product multiplies here."""
    numbers = torch.ones(64 << 20)
    a = torch.randn(2048, 2048).to(dtype)
    return {
        "read_gb_per_s": numbers.numel() * 4 / timed(lambda: numbers.sum()) / 1e9,
        "matmul_gflop_per_s": 2 * 2048**3 / timed(lambda: a @ a) / 1e9,
    }


def main() -> None:
    """Measure what is asked for."""
    what, model, callers, tokens, limit_s = sys.argv[1:6]
    measure = {"transformers": transformers_alone_and_batched, "step": step_by_answers}[what]
    print(json.dumps(measure(model, int(callers), int(tokens), float(limit_s))))


if __name__ == "__main__":
    main()
