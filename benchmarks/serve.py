"""Time to first token and tokens/s, alone and with many callers at once, beside other servers of the same weights.

    python benchmarks/serve.py MODEL_FOLDER [--callers 16] [--tokens 48] [--limit 75] [--write]
        [--peers transformers llama.cpp=PYTHON llamafactory=PYTHON]

Engines run one after the other, each in a process of its own, on the machine's own threads (OMP_NUM_THREADS is
passed on). PYTHON is the interpreter that has `llama_cpp.server` or LLaMA-Factory with its API; ours runs in this one.
The prompts are different from their first character, so that no server answers from a prompt it has kept. Every
caller asks for --tokens tokens, greedily, and the tokens are counted by the server; whoever has no whole answer
after --limit seconds counts as none. transformers has no server: its many callers are one padded batch, all there
at the beginning, which is the most its `generate` can do. The GGUF files are written by `tuoling convert`.

Afterwards one step of the model is timed for 1 to --callers answers, with the time of its parts, beside what the
machine itself can read and multiply. --write writes serve.md and serve.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from servers import Running, Speaks, all_at_once, answered_tokens, first_text_s, median, serving

WORKER = Path(__file__).with_name("serve_worker.py")
TEXT = "个问题：请把下面的句子翻译成英文，再说说它的语法。今天天气很好，我们一起去公园散步吧。"
QUANTIZED = "q4_k_m"


def prompt_of(number: int) -> str:
    """About forty tokens, another one for each number from its first character on."""
    return f"{number * 7919 % 9973:04d}，第{number}{TEXT}"


def measure_server(
    server: Running, speaks: Speaks, callers: int, tokens: int, limit_s: float
) -> dict[str, Any]:
    """One server: a warm-up, then alone, then everybody at once."""
    url, numbers = server.url, iter(range(1, 10_000))
    first_text_s(url, speaks, prompt_of(next(numbers)), limit_s)
    alone_first = [first_text_s(url, speaks, prompt_of(next(numbers)), limit_s) for _ in range(3)]
    rates = []
    for _ in range(2):
        begun = time.monotonic()
        made = answered_tokens(url, speaks, prompt_of(next(numbers)), tokens, limit_s)
        rates.append(made / (time.monotonic() - begun))
    firsts = all_at_once(
        [partial(first_text_s, url, speaks, prompt_of(next(numbers)), limit_s) for _ in range(callers)]
    )
    resident = server.resident_mb()
    begun = time.monotonic()
    made_many = all_at_once(
        [partial(_timed, url, speaks, prompt_of(next(numbers)), tokens, limit_s) for _ in range(callers)]
    )
    finished = [(made, at) for made, at in made_many if made]
    last = max((at for _, at in finished), default=begun + limit_s)
    return {
        "opened_s": round(server.opened_s, 1),
        "first_token_alone_s": median(alone_first),
        "tokens_per_s_alone": max(rates),
        "first_token_many_s": median(firsts),
        "first_token_last_s": max((one for one in firsts if one is not None), default=None),
        "tokens_per_s_many": sum(made for made, _ in finished) / (last - begun),
        "answered_of_many": len(finished),
        "resident_mb": round(resident),
    }


def _timed(*asked: Any) -> tuple[int, float]:
    return answered_tokens(*asked), time.monotonic()


def engines(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Name → how to measure it, ours first."""
    model, name = args.model, Path(args.model).name
    measure = partial(measure_server, callers=args.callers, tokens=args.tokens, limit_s=args.limit)
    peers = dict([*word.split("=", 1), sys.executable][:2] for word in args.peers)
    own = [sys.executable, "-m", "tuoling", "serve"]

    def run(words: list[str], speaks: Speaks, ready: str, **variables: str) -> dict[str, Any]:
        with serving(words, folder / "server.log", ready=ready, variables=variables) as server:
            return measure(server, speaks)

    def ours(weights: str, called: str) -> dict[str, Any]:
        words = [*own, weights, "--port", "{port}", "--max-running", str(args.callers)]
        return run(words, Speaks(called, more={"min_tokens": 1}), "/health")

    def llama_cpp(file: Path) -> dict[str, Any]:
        words = [peers["llama.cpp"], "-m", "llama_cpp.server", "--model", str(file), "--port", "{port}"]
        # by default a new request cuts off the one that is answered
        words += ["--interrupt_requests", "false", "--n_ctx", "2048", "--n_threads", str(threads())]
        return run([*words, "--verbose", "false"], Speaks("any"), "/v1/models")

    def llamafactory() -> dict[str, Any]:
        words = [peers["llamafactory"], "-c", "from llamafactory.api.app import run_api; run_api()"]
        words += ["--model_name_or_path", model, "--template", "default", "--infer_dtype", "bfloat16"]
        variables = {"API_PORT": "{port}", "API_HOST": "127.0.0.1", "DISABLE_VERSION_CHECK": "1"}
        return run(words, Speaks("any", chat=True), "/v1/models", **variables)

    half, quantized = folder / "half.gguf", folder / f"{QUANTIZED}.gguf"
    found: dict[str, Any] = {"tuoling serve, bf16": partial(ours, model, name)}
    if "transformers" in peers:
        found["transformers generate, bf16"] = partial(worker, "transformers", args)
    if "llama.cpp" in peers:
        found["llama_cpp.server, bf16"] = partial(llama_cpp, half)
    if "llamafactory" in peers:
        found["LLaMA-Factory api, bf16"] = llamafactory
    if "llama.cpp" in peers:
        found[f"tuoling serve, {QUANTIZED}"] = partial(ours, str(quantized), quantized.name)
        found[f"llama_cpp.server, {QUANTIZED}"] = partial(llama_cpp, quantized)
        write_gguf(args.model, half, "bf16")
        write_gguf(args.model, quantized, QUANTIZED)
    return found


def with_cache(model: Path, folder: Path) -> Path:
    """The same model, said to be used with a cache: a folder that training wrote says it is not, and some obey."""
    made = folder / model.name
    made.mkdir()
    for file in model.iterdir():
        if file.name in ("config.json", "generation_config.json"):
            values = json.loads(file.read_text("utf-8")) | {"use_cache": True}
            (made / file.name).write_text(json.dumps(values), "utf-8")
        elif file.is_file():
            (made / file.name).symlink_to(file.resolve())
    return made


def threads() -> int:
    """What OMP_NUM_THREADS says, else the processors."""
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


def write_gguf(model: str, out: Path, outtype: str) -> None:
    """In this process: nothing is timed yet."""
    from tuoling.models.source import find_model
    from tuoling.weights.gguf import open_model, write_model

    source, weights = open_model(find_model(model), outtype)
    write_model(source, out, outtype, weights=weights)


def worker(what: str, args: argparse.Namespace) -> dict[str, Any]:
    """What serve_worker.py measures in a process of its own."""
    words = [sys.executable, str(WORKER), what, args.model, str(args.callers), str(args.tokens)]
    done = subprocess.run(
        [*words, str(args.limit)], capture_output=True, text=True, check=False, timeout=args.limit * 6 + 120
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(measured: dict[str, Any]) -> str:
    """Markdown."""
    callers, rows = measured["callers"], measured["engines"]
    lines = [
        f"{measured['model']}: {measured['tokens']} tokens an answer, {measured['threads']} threads, "
        f"{callers} callers at once.",
        "",
        "| engine | first token, alone | tokens/s, alone | first token, many: median | last | tokens/s, many "
        "| many ÷ alone | resident MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, one in rows.items():
        if "failed" in one:
            lines.append(f"| {name} | failed: {one['failed']} |" + " |" * 6)
            continue
        late = callers - one["answered_of_many"]
        lines.append(
            f"| {name} | {_ms(one['first_token_alone_s'])} | {one['tokens_per_s_alone']:.1f} "
            f"| {_ms(one['first_token_many_s'])} | {_ms(one['first_token_last_s'])} "
            f"| {one['tokens_per_s_many']:.1f}{f' ({late} without answer)' if late else ''} "
            f"| {one['tokens_per_s_many'] / one['tokens_per_s_alone']:.2f} | {one['resident_mb']:,} |"
        )
    lines += ["", "| ours ÷ the other, same weights | tokens/s, alone | tokens/s, many |", "|---|---|---|"]
    for name, one in rows.items():
        weights = name.split(", ")[-1]
        base = rows.get(f"tuoling serve, {weights}", {})
        if name.startswith("tuoling") or "failed" in one or "tokens_per_s_alone" not in base:
            continue
        ratios = [base[key] / one[key] for key in ("tokens_per_s_alone", "tokens_per_s_many")]
        lines.append(f"| {name} | {ratios[0]:.2f} | {ratios[1]:.2f} |")
    return "\n".join([*lines, "", *step_table(measured["step"])]) + "\n"


def step_table(step: dict[str, Any]) -> list[str]:
    """What one forward of our server costs, by the number of answers that share it."""
    if "failed" in step:
        return [f"The step could not be timed: {step['failed']}"]
    machine = step["machine"]
    lines = [
        f"One step of our server. The machine itself reads {machine['read_gb_per_s']:.1f} GB/s and multiplies "
        f"{machine['matmul_gflop_per_s']:.0f} GFLOP/s in {step['dtype']}; the step's layers weigh {step['weights_mb']:.0f} MB.",
        "",
        "| answers | ms a step | tokens/s | linear layers and head ms | attention ms | choosing tokens ms | GB/s read "
        "| GFLOP/s | ms, linear layers not laid out |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in step["rows"]:
        lines.append(
            f"| {row['answers']} | {row['step_ms']:.1f} | {1000 * row['answers'] / row['step_ms']:.1f} "
            f"| {row['linear_ms']:.1f} | {row['attention_ms']:.1f} | {row['choose_ms']:.2f} "
            f"| {step['weights_mb'] / row['step_ms']:.1f} "
            f"| {2e-3 * step['weights'] * row['answers'] / row['step_ms'] / 1e3:.0f} | {row['plain_ms']:.1f} |"
        )
    return lines


def _ms(seconds: float | None) -> str:
    return "none in time" if seconds is None else f"{1000 * seconds:,.0f} ms"


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--peers", nargs="*", default=["transformers", "llama.cpp"])
    parser.add_argument("--callers", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--limit", type=float, default=75.0)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    measured: dict[str, Any] = {
        "model": Path(args.model).name,
        "callers": args.callers,
        "tokens": args.tokens,
        "threads": threads(),
        "engines": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        args.model = str(with_cache(Path(args.model).resolve(), Path(folder)))
        for name, measure in engines(args, Path(folder)).items():
            begun = time.monotonic()
            measured["engines"][name] = _or_reason(measure)
            seconds = time.monotonic() - begun
            print(f"{seconds:5.0f} s  {name}: {measured['engines'][name]}", file=sys.stderr, flush=True)
        measured["step"] = _or_reason(partial(worker, "step", args))
    text = table(measured)
    print(text)
    if args.write:
        here = Path(__file__)
        here.with_suffix(".json").write_text(
            json.dumps(measured, ensure_ascii=False, indent=1) + "\n", "utf-8"
        )
        here.with_suffix(".md").write_text(f"# Serving, alone and with many callers\n\n{text}", "utf-8")


def _or_reason(measure: Any) -> dict[str, Any]:
    """A peer that fails is said to have failed; the others are measured all the same."""
    try:
        found: dict[str, Any] = measure()
        return found
    except Exception as error:
        print(error, file=sys.stderr)
        return {
            "failed": str(error).strip().splitlines()[-1][:200]
            if str(error).strip()
            else type(error).__name__
        }


if __name__ == "__main__":
    main()
