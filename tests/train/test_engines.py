"""Engines that cut the model into parts train what one process does: the same losses, weights and optimizer's state."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.train.parallel_runs import apart, run, run_series, tiny

from tuoling.models.load import load_model
from tuoling.models.source import find_model

pytestmark = pytest.mark.slow

FULL, LORA = ("bloom", "full"), ("llama", "lora")
ENGINES = ("fsdp", "zero2", "zero3", "zero2_offload", "zero3_offload")
USUAL = [("fsdp", FULL), ("zero2", FULL), ("zero3", LORA)]
SERIES = [
    USUAL,
    *(
        pytest.param(
            [(engine, kind) for engine in ENGINES if (engine, kind) not in USUAL], marks=pytest.mark.long
        )
        for kind in (FULL, LORA)
    ),
]


@pytest.mark.parametrize("wanted", SERIES, ids=["usual", "full", "lora"])
def test_engines_that_cut_the_model_train_the_same(
    tmp_path: Path, wanted: Sequence[tuple[str, tuple[str, str]]]
) -> None:
    if importlib.util.find_spec("deepspeed") is None:  # extra `dist`
        wanted = [(engine, kind) for engine, kind in wanted if not engine.startswith("zero")]
    if not wanted:
        pytest.skip("extra `dist`")
    shared = {"val_size": 3, "eval_steps": 10, "save_steps": 12}
    kinds = dict.fromkeys(kind for _, kind in wanted)
    models = {kind: tiny(tmp_path, kind[0]) for kind in kinds}
    ones = {
        kind: run(tmp_path / "-".join(kind), models[kind], 1, finetuning_type=kind[1], **shared)
        for kind in kinds
    }
    runs = {
        engine: (models[kind], {"finetuning_type": kind[1], "parallel": engine, **shared})
        for engine, kind in wanted
    }
    for engine, two in run_series(tmp_path, runs).items():
        kind = dict(wanted)[engine]
        one = ones[kind]
        losses, weights = apart(one, two, models[kind])
        assert losses <= 1e-5 and weights <= 1e-5, (engine, losses, weights)
        assert two.results["eval_loss"] == pytest.approx(one.results["eval_loss"], rel=1e-5), engine
        saved = [load_file(curve.path / "checkpoint-12" / "optimizer.safetensors") for curve in (one, two)]
        for name, tensor in saved[0].items():
            if not name.endswith(".step"):
                assert torch.allclose(tensor, saved[1][name], rtol=1e-4, atol=1e-7), (engine, name)
        load_model(
            find_model(str(two.path)), device="cpu"
        )  # refuses what is missing, cut or of another shape
