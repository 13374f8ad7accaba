"""A LoRA step on a real pretrained model lowers its loss on text it has not been shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.stories260k import build_stories260k
from tests.tiny import write_rows

from tuoling import train

SHOWN = [
    "The red dragon lived on top of the hill. The red dragon loved to eat red apples from the big red tree.",
    "One day, the red dragon saw a little green frog. The red dragon gave the frog a red apple.",
    "The red dragon and the green frog sat on the hill and ate red apples until the sun went down.",
]
HELD = [
    "The green frog said to the red dragon, I love your red apples. The red dragon was happy on the hill."
]


@pytest.mark.slow
def test_one_lora_step_lowers_the_loss_on_held_text(tmp_path: Path, shared_data: Path) -> None:
    model = build_stories260k(shared_data, tmp_path / "model")
    losses = []
    for steps, rate in ((1, 1e-12), (1, 1e-2)):
        result = train(
            model_name_or_path=str(model),
            data=str(write_rows(tmp_path / "shown.jsonl", [{"text": text} for text in SHOWN])),
            eval_data=str(write_rows(tmp_path / "held.jsonl", [{"text": text} for text in HELD])),
            stage="pt",
            output_dir=str(tmp_path / f"run-{rate}"),
            max_steps=steps,
            warmup_steps=0,
            learning_rate=rate,
            lora_dropout=0.0,
            dtype="fp32",
            device="cpu",
            plot_loss=False,
            say=lambda _: None,
        )
        losses.append(json.loads((result.path / "all_results.json").read_text())["eval_loss"])
    before, after = losses
    assert before == pytest.approx(
        2.1, abs=0.9
    )  # a pretrained model, far below ln(512) = 6.24 of a random one
    assert after < before - 0.02
