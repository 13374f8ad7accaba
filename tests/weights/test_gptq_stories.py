"""GPTQ on weights that were really trained: stories260K's perplexity on its own stories, beside float32."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.stories260k import build_stories260k
from tests.tiny import write_rows
from tests.weights.test_gptq import needs_gptqmodel

from tuoling.models.load import load_model, load_tokenizer
from tuoling.models.source import find_model

ROOT = Path(__file__).resolve().parents[2]


def own_stories(folder: Path, count: int) -> list[dict[str, str]]:
    """Stories the model tells, drawn at temperature 1."""
    source = find_model(folder)
    model: Any = load_model(source, device="cpu", dtype="fp32")
    tokenizer = load_tokenizer(source, for_training=False)
    torch.manual_seed(0)
    ids = model.generate(
        torch.ones(count, 1, dtype=torch.long), do_sample=True, top_k=0, max_new_tokens=160, pad_token_id=0
    )
    return [{"text": tokenizer.decode([token for token in row if token > 2])} for row in ids.tolist()]


@pytest.mark.long
def test_eight_bits_cost_nothing_and_four_little(shared_data: Path, tmp_path: Path) -> None:
    needs_gptqmodel()
    folder = build_stories260k(shared_data, tmp_path / "stories")
    data = write_rows(tmp_path / "rows.jsonl", own_stories(folder, 80))
    found = {}
    for bits in (8, 4):
        words = [str(folder), str(tmp_path / f"gptq{bits}"), "--bits", str(bits), "--group-size", "32"]
        words += ["--data", str(data), "--rows", "64", "--device", "cpu", "--dtype", "fp32", "--json"]
        done = subprocess.run(
            [sys.executable, "-m", "tuoling", "quantize", *words],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found[bits] = json.loads(done.stdout)
        print(
            {key: found[bits][key] for key in ("before", "rtn", "after", "size_before_bytes", "size_bytes")}
        )
    before = found[8]["before"]
    assert 2 < before < 8  # it knows its own stories
    assert found[8]["after"] == pytest.approx(before, rel=0.01)
    assert found[4]["after"] == pytest.approx(before, rel=0.15)
    assert found[4]["after"] < found[4]["rtn"]
    assert found[4]["size_bytes"] < found[8]["size_bytes"] < found[8]["size_before_bytes"]
