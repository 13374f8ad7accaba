"""Tokens a second of our engine on a GGUF file, beside llama.cpp's own rate.

    python benchmarks/gguf_rate.py MODEL.gguf [--prompt-tokens 64] [--tokens 64] [--threads N] [--rounds 5] [--write]

Three ways to the same greedy answer of exactly `--tokens` tokens to the same prompt, in turn, each from an empty
context, with as many threads, key-value cache in float16 and flash attention as llama.cpp chooses:

    bare    llama_decode and llama.cpp's greedy sampler, nothing else: the rate of the library itself
    python  llama-cpp-python's own `eval` and `sample`
    ours    a stream of the engine behind `tuoling chat`: stops, whole characters, knobs, text

Told: the median of `--rounds` of the tokens a second behind the first one, and of the seconds up to the first one.
`--write` leaves gguf_rate.json and gguf_rate.md here. Small models measure Python, not llama.cpp: take 0.5 B or more.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from tuoling import environment
from tuoling.files import write_json
from tuoling.infer.engine import GenerationSettings
from tuoling.infer.llamacpp import llama_library
from tuoling.infer.llamacpp_engine import LlamaCppEngine
from tuoling.infer.open_engine import open_gguf
from tuoling.text.conversation import Conversation, Turn

HERE = Path(__file__).parent
CONTEXT_TOKENS = 1024
TEXT = "请用几句话介绍一下中国的首都，以及它的历史、文化和著名的景点。"


class Bare:
    """llama.cpp through ctypes."""

    def __init__(self, file: Path, threads: int) -> None:
        self.c = llama_library()
        params = self.c.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = self.c.llama_model_load_from_file(str(file).encode(), params)
        context = self.c.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = CONTEXT_TOKENS, 512, 512
        context.n_threads = context.n_threads_batch = threads
        context.no_perf = True
        self.context = self.c.llama_init_from_model(self.model, context)
        self.sampler = self.c.llama_sampler_init_greedy()

    def tokens(self, prompt: list[int], count: int) -> Iterator[int]:
        """Greedy tokens behind a prompt, end tokens too."""
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)
        ids = (self.c.llama_token * len(prompt))(*prompt)
        for _ in range(count):
            if self.c.llama_decode(self.context, self.c.llama_batch_get_one(ids, len(ids))):
                raise SystemExit("llama_decode failed")
            token = self.c.llama_sampler_sample(self.sampler, self.context, -1)
            yield token
            ids = (self.c.llama_token * 1)(token)


class Python:
    """llama-cpp-python's `Llama`."""

    def __init__(self, file: Path, threads: int) -> None:
        self.llama = llama_library().Llama(
            str(file),
            n_ctx=CONTEXT_TOKENS,
            n_threads=threads,
            n_threads_batch=threads,
            n_gpu_layers=0,
            verbose=False,
        )

    def tokens(self, prompt: list[int], count: int) -> Iterator[int]:
        """Greedy tokens behind a prompt."""
        self.llama.reset()
        ids = prompt
        for _ in range(count):
            self.llama.eval(ids)
            ids = [int(self.llama.sample(temp=0.0))]
            yield ids[0]


class Ours:
    """A stream of the engine. Told by its pieces when they come; the ids stand in the reply."""

    def __init__(self, file: Path) -> None:
        engine = open_gguf(file, template="belle_card", dtype="auto", device="cpu")
        assert isinstance(engine, LlamaCppEngine)
        self.engine = engine

    def prompt(self, tokens: int) -> Conversation:
        """A question whose prompt has about so many tokens."""
        text = TEXT
        while self.engine.count_tokens(Conversation((Turn("user", text),))) < tokens:
            text += TEXT
        return Conversation((Turn("user", text),))


def timed(tokens: Iterable[int]) -> tuple[float, float, list[int]]:
    """Seconds to the first token, seconds for the others, the tokens."""
    start = time.perf_counter()
    found, first = [], 0.0
    for token in tokens:
        found.append(token)
        first = first or time.perf_counter() - start
    return first, time.perf_counter() - start - first, found


def timed_stream(
    ours: Ours, asked: Conversation, settings: GenerationSettings
) -> tuple[float, float, list[int]]:
    """As `timed`. A piece of text may be behind its token; the first token is told by the engine itself."""
    engine = ours.engine
    engine.model.forget()
    start = time.perf_counter()
    marks: list[float] = []
    choose = engine._next

    def marked(*call: Any) -> int:
        token = choose(*call)
        if not marks:
            marks.append(time.perf_counter() - start)
        return token

    engine._next = marked  # type: ignore[method-assign]
    reply = [piece.reply for piece in engine.stream(asked, settings)][-1]
    engine._next = choose  # type: ignore[method-assign]
    assert reply is not None
    return marks[0], time.perf_counter() - start - marks[0], list(reply.token_ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=environment.compute_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    ours, bare, python = (
        Ours(asked.model),
        Bare(asked.model, asked.threads),
        Python(asked.model, asked.threads),
    )
    ours.engine.model._threads = asked.threads
    ours.engine.model.require_context(CONTEXT_TOKENS)
    question = ours.prompt(asked.prompt_tokens)
    prompt = ours.engine.prompt_ids(question)
    ours.engine.stops, ours.engine.end_ids = (), set()  # an answer of exactly so many tokens
    settings = replace(GenerationSettings(), max_new_tokens=asked.tokens)
    ways = {
        "bare": lambda: timed(bare.tokens(prompt, asked.tokens)),
        "python": lambda: timed(python.tokens(prompt, asked.tokens)),
        "ours": lambda: timed_stream(ours, question, settings),
    }
    taken: dict[str, list[tuple[float, float, list[int]]]] = {way: [] for way in ways}
    for number in range(asked.rounds + 1):
        for way, run in ways.items():
            result = run()
            if number:  # the first round reads the weights from the disk
                taken[way].append(result)
    rates = {way: median((asked.tokens - 1) / rest for _, rest, _ in of) for way, of in taken.items()}
    found = {
        "model": asked.model.name,
        "bytes": asked.model.stat().st_size,
        "prompt_tokens": len(prompt),
        "tokens": asked.tokens,
        "threads": asked.threads,
        "tokens_per_s": rates,
        "first_s": {way: median(first for first, _, _ in of) for way, of in taken.items()},
        "ours_of_bare": rates["ours"] / rates["bare"],
        "ours_of_python": rates["ours"] / rates["python"],
        "same_tokens": len({tuple(of[-1][2]) for of in taken.values()}) == 1,
        "machine": environment.machine(),
    }
    text = report(found)
    print(text)
    print(json.dumps(found))
    if asked.write:
        write_json(HERE / "gguf_rate.json", found, indent=2)
        (HERE / "gguf_rate.md").write_text(
            f"# GGUF: our engine beside llama.cpp\n\n{text}\n", encoding="utf-8"
        )


def report(found: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"{found['model']} ({found['bytes'] / 1e6:,.0f} MB), prompt of {found['prompt_tokens']} tokens, "
        f"{found['tokens']} generated, {found['threads']} threads; the same tokens: {found['same_tokens']}",
        "",
        "| | tokens/s | first token, s |",
        "|---|---|---|",
    ]
    lines += [
        f"| {way} | {rate:.2f} | {found['first_s'][way]:.3f} |" for way, rate in found["tokens_per_s"].items()
    ]
    lines += ["", f"ours / bare: {found['ours_of_bare']:.3f}; ours / python: {found['ours_of_python']:.3f}"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
