"""Fixtures every test may use. The caches and the language of the person who runs them are left alone."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["TUOLING_LANG"] = "en"
# Tiny tensors on two threads spend their time waiting for each other, the more so with two test processes.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# torch looks once, at a process's first matmul on a GPU, which a test with deterministic=true comes after.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
from hypothesis import HealthCheck, settings

from tuoling import environment

environment.quiet_libraries()
# How long an example takes says how busy the machine is.
settings.register_profile("any-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-machine")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUOLING_CACHE", str(tmp_path / "tuoling-cache"))


@pytest.fixture
def gate_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parity gate and pruning's scores are computed in this process: each child would import torch and
    transformers anew, 6 s of a CPU. tests/weights/test_parity.py and test_prune.py run the children themselves."""
    import pickle

    from tuoling.weights import parity, prune_score
    from tuoling.weights.parity_child import Comparison

    monkeypatch.setattr(
        parity, "_measure", lambda request: Comparison(pickle.loads(pickle.dumps(request))).measure()
    )
    monkeypatch.setattr(prune_score, "_measure_apart", prune_score.measure)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real rows, tokenizers and one real tiny model, where the machine has them."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("TUOLING_TEST_DATA") or default)
    if not folder.is_dir():
        pytest.skip(f"needs the test data folder (set TUOLING_TEST_DATA); {folder} is not there")
    return folder
