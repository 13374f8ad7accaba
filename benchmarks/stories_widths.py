"""What every width costs a model that was really trained: stories260K on the text it tells itself.

    python benchmarks/stories_widths.py DATA            print
    python benchmarks/stories_widths.py DATA --write    and leave stories_widths.json and .md beside this file

DATA/weights/stories260K holds stories260K.bin and vocabulary.json, of which the tests' folder is built, and
expected_greedy_200.txt, the 200 tokens that the model says greedily: on these the perplexity is measured. GGUF types are computed by llama.cpp, keys and values in float32; GPTQ's and rounding's numbers are
multiplied out by our own reader, written as plain float32 weights and computed by transformers. GPTQ is calibrated on
64 stories that the model tells at temperature 1, groups of 32. Rows of 172 numbers are no multiple of a block of 32:
those tensors fall back to F16 in GGUF, and GPTQ gives them a last group that is short.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.stories260k import build_stories260k

from tuoling import environment
from tuoling.models.load import load_model, load_tokenizer
from tuoling.models.source import find_model
from tuoling.weights.convert import ConvertOptions, convert
from tuoling.weights.gguf import open_model, write_model
from tuoling.weights.gguf_verify import GgufLogits
from tuoling.weights.gptq import quantize
from tuoling.weights.gptq_options import QuantizeOptions

SAID = "weights/stories260K/expected_greedy_200.txt"
GGUF_TYPES = ("f32", "f16", "q8_0", "q6_k", "q5_k_m", "q4_0", "q4_k_m", "q3_k_m", "q2_k")
BITS = (8, 4, 3)
STORIES = 64
UNPROVEN = ConvertOptions(outtype="f32", verify=False)


def perplexity(logits_TV: np.ndarray, ids: list[int]) -> float:
    """exp of the mean loss of every token after the first."""
    logits_TV = logits_TV.astype(np.float64)
    logits_TV -= logits_TV.max(-1, keepdims=True)
    logits_TV -= np.log(np.exp(logits_TV).sum(-1, keepdims=True))
    return math.exp(-logits_TV[np.arange(len(ids) - 1), ids[1:]].mean())


def by_transformers(folder: Path, ids: list[int]) -> float:
    model: Any = load_model(find_model(folder), dtype="fp32", device="cpu")
    with torch.no_grad():
        return perplexity(model(torch.tensor([ids]), use_cache=False).logits[0].numpy(), ids)


def tell_stories(folder: Path, out: Path) -> Path:
    """Rows to calibrate on: what the model says at temperature 1."""
    source = find_model(folder)
    model: Any = load_model(source, device="cpu", dtype="fp32")
    tokenizer = load_tokenizer(source, for_training=False)
    torch.manual_seed(0)
    start = torch.ones(STORIES + STORIES // 4, 1, dtype=torch.long)  # a part is held out
    rows = model.generate(start, do_sample=True, top_k=0, max_new_tokens=160, pad_token_id=0).tolist()
    texts = [tokenizer.decode([token for token in row if token > 2]) for row in rows]
    out.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return out


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def measure(data: Path, place: Path, show: Callable[[dict[str, Any]], None]) -> list[dict[str, Any]]:
    """A row for every width: type, who computed it, perplexity, bytes, tensors that fell back."""
    folder, rows = place / "model", []
    build_stories260k(data, folder)
    tokenizer = load_tokenizer(find_model(folder), for_training=False)
    said = (data / SAID).read_text(encoding="utf-8")
    ids = [1, *tokenizer.hf.encode(said, add_special_tokens=False)]

    def add(width: str, engine: str, value: float, size_bytes: int, fell_back: int = 0) -> None:
        rows.append(
            {
                "width": width,
                "engine": engine,
                "perplexity": round(value, 4),
                "size_bytes": size_bytes,
                "fell_back": fell_back,
            }
        )
        show(rows[-1])

    add("float32", "transformers", by_transformers(folder, ids), folder_bytes(folder))
    for outtype in GGUF_TYPES:
        source, weights = open_model(find_model(folder), outtype)
        file = place / f"{outtype}.gguf"
        report = write_model(source, file, outtype, weights=weights)
        value = perplexity(GgufLogits(file).logits(ids), ids)
        add(f"GGUF {outtype}", "llama.cpp", value, report.size_bytes, len(report.fell_back))
    stories = tell_stories(folder, place / "stories.jsonl")
    for bits in BITS:
        for method in ("gptq", "rtn"):
            out, plain = place / f"{method}-{bits}", place / f"{method}-{bits}-plain"
            options = QuantizeOptions(
                bits=bits,
                group_size=32,
                method=method,
                rows=STORIES,
                device="cpu",
                dtype="fp32",
                verify=False,
            )
            quantize(str(folder), out, options, data=[str(stories)])
            convert(out, plain, options=UNPROVEN)
            named = "GPTQ" if method == "gptq" else "to nearest"
            add(f"{named}, {bits} bit", "our reader", by_transformers(plain, ids), folder_bytes(out))
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| width | computed by | perplexity | loss | bytes | tensors that fell back |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['width']} | {row['engine']} | {row['perplexity']:.4f} | {math.log(row['perplexity']):.4f} "
        f"| {row['size_bytes']:,} | {row['fell_back']} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    environment.quiet_libraries()
    with tempfile.TemporaryDirectory() as place:
        rows = measure(asked.data.absolute(), Path(place), lambda row: print(json.dumps(row), flush=True))
    print(table(rows))
    if asked.write:
        here = Path(__file__)
        here.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        title = "# stories260K in every width\n\nPrinted by `python benchmarks/stories_widths.py DATA`.\n\n"
        here.with_suffix(".md").write_text(title + table(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
