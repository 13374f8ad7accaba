"""params.json of every era: the widths Meta published, the way back, and what cannot be said in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuoling.errors import ModelError
from tuoling.weights.meta_params import feed_forward_size, from_config, rule_for, to_config

ONE = {"multiple_of": 256, "norm_eps": 1e-6, "vocab_size": -1}
THREE = {"multiple_of": 1024, "ffn_dim_multiplier": 1.3, "norm_eps": 1e-5, "rope_theta": 500000.0}
SMALL = {
    "multiple_of": 256,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
    "n_kv_heads": 8,
}

ERAS: list[Any] = [
    # params.json, feed-forward width, words, positions
    pytest.param({**ONE, "dim": 4096, "n_heads": 32, "n_layers": 32}, 11008, 32000, 2048, id="1-7B"),
    pytest.param({**ONE, "dim": 5120, "n_heads": 40, "n_layers": 40}, 13824, 32000, 2048, id="1-13B"),
    pytest.param({**ONE, "dim": 6656, "n_heads": 52, "n_layers": 60}, 17920, 32000, 2048, id="1-30B"),
    pytest.param(
        {**ONE, "dim": 8192, "n_heads": 64, "n_layers": 80, "norm_eps": 1e-5}, 22016, 32000, 2048, id="1-65B"
    ),
    pytest.param(
        {**ONE, "dim": 4096, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-5}, 11008, 32000, 4096, id="2-7B"
    ),
    pytest.param(
        {
            **{"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8},
            **{"n_layers": 80, "norm_eps": 1e-5, "vocab_size": -1},
        },
        28672,
        32000,
        4096,
        id="2-70B",
    ),
    pytest.param(
        {**THREE, "dim": 4096, "n_heads": 32, "n_kv_heads": 8, "n_layers": 32, "vocab_size": 128256},
        14336,
        128256,
        8192,
        id="3-8B",
    ),
    pytest.param(
        {**THREE, "dim": 4096, "n_heads": 32, "n_kv_heads": 8, "n_layers": 32, "use_scaled_rope": True},
        14336,
        128256,
        131072,
        id="3.1-8B",
    ),
    pytest.param(
        {**SMALL, "dim": 2048, "n_heads": 32, "n_layers": 16, "ffn_dim_multiplier": 1.5},
        8192,
        128256,
        131072,
        id="3.2-1B",
    ),
    pytest.param(
        {**SMALL, "dim": 3072, "n_heads": 24, "n_layers": 28, "ffn_dim_multiplier": 1.0},
        8192,
        128256,
        131072,
        id="3.2-3B",
    ),
    pytest.param(
        {**ONE, "dim": 4096, "n_heads": 32, "n_layers": 32, "ffn_dim_multiplier": 1.0, "rope_theta": 1e6},
        11008,
        32016,
        16384,
        id="code-7B",
    ),
]


@pytest.mark.parametrize(("params", "wide", "words", "positions"), ERAS)
def test_published_sizes(params: dict[str, Any], wide: int, words: int, positions: int) -> None:
    config = to_config(params, Path("folder"), words=words, feed_forward=wide)
    assert config["max_position_embeddings"] == positions
    assert config["num_key_value_heads"] == params.get("n_kv_heads", params["n_heads"])
    assert config["rms_norm_eps"] == params["norm_eps"]
    again = from_config(config, "config.json")
    for key in ("dim", "n_heads", "n_layers", "norm_eps"):
        assert again[key] == params[key]
    for key in ("n_kv_heads", "rope_theta", "use_scaled_rope"):
        assert again.get(key) == params.get(key)
    assert feed_forward_size(again["dim"], again["multiple_of"], again.get("ffn_dim_multiplier")) == wide
    if params.get("use_scaled_rope"):
        assert config["rope_scaling"]["factor"] == (8.0 if params["dim"] == 4096 else 32.0)


def test_the_rule_is_metas() -> None:
    """LLaMA's own lines: hidden = 4 * dim; hidden = int(2 * hidden / 3); times the multiplier; rounded up."""
    assert feed_forward_size(4096, 256) == 11008
    assert feed_forward_size(64, 4) == 172
    assert rule_for(4096, 11008) == (256, None)
    assert rule_for(4096, 14336) == (256, 1.3)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(dim=st.integers(8, 9000), size=st.integers(1, 40000))
def test_every_width_can_be_said(dim: int, size: int) -> None:
    assert feed_forward_size(dim, *rule_for(dim, size)) == size


def test_a_wrong_width_is_refused_with_both_numbers() -> None:
    params = {"dim": 64, "n_heads": 2, "n_layers": 1, "multiple_of": 4}
    with pytest.raises(ModelError, match=r"172.*180"):
        to_config(params, Path("folder"), words=9, feed_forward=180)
