"""The Python interface: light to import, and the same names before and after training."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.tiny import sum_rows, tiny_model, write_rows

import tuoling

LIGHT = "import sys, tuoling; sys.exit(int(any(name in sys.modules for name in ('torch', 'transformers'))))"


def test_importing_the_package_is_light() -> None:
    assert subprocess.run([sys.executable, "-c", LIGHT], check=False).returncode == 0


@pytest.mark.slow
def test_train_twice_then_load_and_ask(tmp_path: Path) -> None:
    keys = {
        "model_name_or_path": str(tiny_model(tmp_path / "base")),
        "data": str(write_rows(tmp_path / "rows.jsonl", sum_rows(8))),
        "device": "cpu",
        "dtype": "fp32",
        "max_steps": 1,
        "plot_loss": False,
    }
    first = tuoling.train(**keys, output_dir=str(tmp_path / "a"), say=lambda _: None)
    again = tuoling.train(**keys, output_dir=str(tmp_path / "b"), say=lambda _: None)
    assert first.results["train_loss_first"] == again.results["train_loss_first"]
    with tuoling.load(first.path) as model:
        reply = model.reply("1 加 2 等于多少？", max_new_tokens=4)
        assert reply.completion_tokens <= 4
        (prediction,) = model.predict([{"instruction": "1 加 2 等于多少？", "output": "3"}], max_new_tokens=4)
        assert prediction["target"] == "3" and prediction["predict"] == reply.text
