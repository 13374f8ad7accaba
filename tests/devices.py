"""Where a test runs: on the CPU always, on a card where there is one."""

from __future__ import annotations

import pytest
import torch

NEEDS_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
"""For what has no counterpart on a CPU."""
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_A_GPU)]
"""The values of a test's `device`."""


def forget_determinism() -> None:
    """What a run with `deterministic=true` set for its process, so that other tests meet torch as it is."""
    torch.use_deterministic_algorithms(False)
