"""What a step moves over the network under each engine, on paper, for 8 GPUs of one machine and for 64 machines.

    python benchmarks/scaling.py            # prints the tables
    python benchmarks/scaling.py --write    # into docs/scaling.md and docs/scaling.en.md, between their comments

`benchmarks/two_machines.py` counts the bytes on the cable between two machines beside these figures.

All bytes are those that one process sends in one optimizer step (it receives as many). A sum over all ranks (all-reduce)
of S bytes goes round a ring twice and costs each of N processes 2 (N - 1) / N of S; collecting parts (all-gather) and
handing summed parts out (reduce-scatter) cost (N - 1) / N each.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ENGINES = ("ddp", "fsdp", "zero2", "zero3")
START, END = "<!-- figures -->", "<!-- /figures -->"
PAGES = {"zh": "scaling.md", "en": "scaling.en.md"}

COMPUTE_FLOPS = 400e12
"""Of a card, bf16: 40 % of an H100's 989 TFLOP/s."""
TOKENS = 8192
"""Of a step in one process."""
NETWORKS = (
    ("NVLink", 8, 1, 300e9),
    ("InfiniBand 8 × 400 Gb/s", 8, 64, 8 * 50e9),
    ("Ethernet 100 Gb/s", 8, 64, 12.5e9),
)
"""(name, processes of a machine, machines, bytes/s). Of one machine: what a card sends; of several: what a machine sends."""


@dataclass(frozen=True, slots=True)
class Run:
    """parameters: of the model, adapter included; trained: of them. outside: of them in no block (embeddings, head).

    micro_batches: of a step in each process.

    weight_bytes: of a frozen weight. Trained weights are float32 masters; with DeepSpeed in bf16 or fp16 (half) what is
    sent of them, and their gradients, has two bytes.
    """

    parameters: int
    trained: int
    processes: int
    outside: int = 0
    micro_batches: int = 1
    weight_bytes: int = 2
    half: bool = True


def all_reduce_bytes(size_bytes: float, processes: int) -> float:
    """Sent by each process."""
    return 2 * (processes - 1) / processes * size_bytes


def all_gather_bytes(size_bytes: float, processes: int) -> float:
    """Sent by each process; a reduce-scatter of as much costs the same."""
    return (processes - 1) / processes * size_bytes


def sent_bytes(engine: str, run: Run) -> float:
    """By one process in one step.

    ddp: gradients are summed once a step, in float32. fsdp: every micro-batch collects all weights for the forward and
    those of the blocks again for the backward, and hands out summed float32 gradients. zero2: gradients are handed out
    every micro-batch, and the changed weights collected once. zero3: as fsdp, in DeepSpeed's precision, and at most:
    DeepSpeed keeps small weights whole, and those that are used again soon.
    """
    n, each = run.processes, run.micro_batches
    frozen = run.parameters - run.trained
    full = not frozen
    if engine == "ddp":
        return all_reduce_bytes(4 * run.trained, n)
    if engine == "fsdp":
        weights = run.weight_bytes * frozen + 4 * run.trained
        once = (4 if full else run.weight_bytes) * run.outside
        return each * all_gather_bytes(2 * weights - once + 4 * run.trained, n)
    size = 2 if run.half else 4
    if engine == "zero2":
        return all_gather_bytes((each + 1) * size * run.trained, n)
    if engine == "zero3":
        weights = (2 if run.half else run.weight_bytes) * frozen + size * run.trained
        return each * all_gather_bytes(2 * weights + size * run.trained, n)
    raise ValueError(engine)


def compute_s(run: Run, tokens: int) -> float:
    """Of a step in one process: 2 FLOP a weight and token forward, as many for the gradient of the inputs, and as many
    again for the gradient of the trained weights."""
    return (4 * run.parameters + 2 * run.trained) * tokens / COMPUTE_FLOPS


def shapes() -> dict[str, tuple[int, int, int]]:
    """Parameters of each model, those of a LoRA of rank 8 on all its linear layers, and those in no block."""

    def bloom(hidden: int, layers: int, words: int) -> tuple[int, int, int]:
        block = 12 * hidden * hidden + 13 * hidden
        lora = 8 * ((hidden + 3 * hidden) + (hidden + hidden) + 2 * (hidden + 4 * hidden))
        outside = words * hidden + 4 * hidden
        return outside + layers * block, layers * lora, outside

    def llama(hidden: int, inner: int, layers: int, words: int) -> tuple[int, int, int]:
        block = 4 * hidden * hidden + 3 * hidden * inner + 2 * hidden
        lora = 8 * (4 * 2 * hidden + 3 * (hidden + inner))
        outside = 2 * words * hidden + hidden
        return outside + layers * block, layers * lora, outside

    return {
        "bloomz-560m": bloom(1024, 24, 250_880),
        "bloomz-7b1": bloom(4096, 30, 250_880),
        "Llama-2-13b": llama(5120, 13_824, 40, 32_000),
    }


def runs(processes: int) -> list[tuple[str, str, Run]]:
    """(model, what is trained, run)."""
    found = []
    for name, (parameters, lora, outside) in shapes().items():
        found.append((name, "LoRA", Run(parameters + lora, lora, processes, outside)))
        found.append((name, "full", Run(parameters, parameters, processes, outside)))
    return found


def bytes_table(zh: bool) -> str:
    head = ["模型", "训练", "进程数"] if zh else ["model", "trained", "processes"]
    lines = [f"| {' | '.join((*head, *ENGINES))} |", "|---" * (len(head) + len(ENGINES)) + "|"]
    for processes in (8, 512):
        for name, kind, run in runs(processes):
            cells = [shown(sent_bytes(engine, run)) for engine in ENGINES]
            lines.append(f"| {name} | {kind} | {processes} | {' | '.join(cells)} |")
    return "\n".join(lines)


def share_table(zh: bool) -> str:
    head = ["模型", "训练", "网络"] if zh else ["model", "trained", "network"]
    lines = [f"| {' | '.join((*head, *ENGINES))} |", "|---" * (len(head) + len(ENGINES)) + "|"]
    for network, local, machines, rate in NETWORKS:
        for name, kind, run in runs(local * machines):
            work = compute_s(run, TOKENS)
            # between machines the ring leaves each of them once, whatever it has inside: the bytes of one process
            shares = [sent_bytes(engine, run) / rate / work for engine in ENGINES]
            cells = [f"{share:.1%}" if share < 0.1 else f"{share:.0%}" for share in shares]
            lines.append(f"| {name} | {kind} | {network} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"


def figures(language: str) -> str:
    """Both tables, as they stand in the pages."""
    zh = language == "zh"
    first = "每个进程每步发送的字节数：" if zh else "Bytes one process sends in a step:"
    second = (
        f"传输时间与计算时间之比（每进程每步 {TOKENS:,} 个 token，传输与计算完全不重叠的最坏情况）："
        if zh
        else f"Time on the network to time of computing ({TOKENS:,} tokens a step in each process; at worst, that is with "
        "nothing sent while anything is computed):"
    )
    return f"{first}\n\n{bytes_table(zh)}\n\n{second}\n\n{share_table(zh)}"


def page_with_figures(text: str, language: str) -> str:
    """A page of the documents with the figures put in."""
    pattern = f"{re.escape(START)}.*{re.escape(END)}"
    return re.sub(pattern, lambda _: f"{START}\n\n{figures(language)}\n\n{END}", text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    for language, name in PAGES.items():
        page = HERE.parent / "docs" / name
        if args.write:
            page.write_text(page_with_figures(page.read_text(encoding="utf-8"), language), encoding="utf-8")
        elif language == "en":
            sys.stdout.write(figures(language) + "\n")


if __name__ == "__main__":
    main()
