"""Models that no one place holds: limits, what is told, and answers that stay the same."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.devices import NEEDS_A_GPU
from tests.tiny import tiny_model

from tuoling.api import load
from tuoling.errors import ModelError, UsageError
from tuoling.infer.halves import in_halves
from tuoling.models import placement

QUESTIONS = ["你好", "三加五等于多少？", "1 2 3 4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("placement") / "m", "llama")


def answers(path: Path, device: str = "cpu", **options: Any) -> tuple[list[str], dict[str, Any]]:
    with load(path, device=device, template="domain_bloom", **options) as loaded:
        engine: Any = loaded.engine
        where = dict(getattr(engine.model, "hf_device_map", {}))
        assert engine.device.type == device
        streamed = "".join(loaded.stream(QUESTIONS[0], max_new_tokens=12))
        said = [loaded.chat(question, max_new_tokens=12) for question in QUESTIONS]
        assert streamed == said[0]
        return said, where


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_memory_does_not_hold_lies_on_the_disk_and_says_the_same(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    dtype: str,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    whole, nowhere = answers(model, dtype=dtype)
    assert nowhere == {}
    weights = next(model.glob("*.safetensors")).stat().st_size // (1 if dtype == "fp32" else 2)
    spread, where = answers(model, dtype=dtype, max_memory=f"cpu={weights * 7 // 8000}KB")
    assert {"cpu", "disk"} == set(where.values()), where
    assert spread == whole
    assert "the model's parts lie on memory: " in capsys.readouterr().err.replace("\n", " ")
    assert not list(tmp_path.glob("tuoling/offload-*")), "the weights on the disk go with the model"


@NEEDS_A_GPU
def test_what_a_card_does_not_hold_lies_in_memory_and_says_the_same(model: Path) -> None:
    """The embeddings are first on the card; some of the layers behind them find no room there."""
    whole, _ = answers(model, "cuda", dtype="fp32")
    weights = next(model.glob("*.safetensors")).stat().st_size
    spread, where = answers(model, "cuda", dtype="fp32", max_memory=f"0={weights * 3 // 4000}KB,cpu=1GB")
    assert set(where.values()) == {0, "cpu"}, where
    assert spread == whole


@NEEDS_A_GPU
def test_a_closed_engine_leaves_the_card_as_it_was(model: Path) -> None:
    torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")  # cuBLAS keeps its workspace
    before = torch.cuda.memory_allocated()
    with load(model, device="cuda", template="domain_bloom", dtype="fp32") as loaded:
        loaded.chat("你好", max_new_tokens=4)
        assert torch.cuda.memory_allocated() > before
    assert torch.cuda.memory_allocated() == before


@pytest.mark.slow
def test_adapters_on_a_base_that_is_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.infer.test_adapters import save_adapter_on

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    base = tiny_model(tmp_path / "m", "llama")
    first, second = (
        save_adapter_on(
            base, tmp_path / name, seed=seed, template="domain_bloom", targets=["q_proj", "down_proj"]
        )
        for seed, name in enumerate(("law", "tax"))
    )
    limit = f"cpu={next(base.glob('*.safetensors')).stat().st_size * 7 // 8000}KB"
    options: dict[str, Any] = {"device": "cpu", "dtype": "fp32", "adapters": {"tax": str(second)}}
    said = []
    for more in ({}, {"max_memory": limit}):
        with load(first, **options, **more) as loaded:
            assert placement.is_spread(loaded.engine.model) == bool(more)  # type: ignore[attr-defined]
            engines = [loaded.engine, loaded.engine.using("tax"), loaded.engine.using("base")]
            said.append([type(loaded)(engine).chat("你好", max_new_tokens=12) for engine in engines])
    assert said[0] == said[1] and len(set(said[0])) == 3
    with pytest.raises(UsageError, match="spread are not merged into"):
        load(first, merge=True, max_memory=limit)


@pytest.mark.parametrize("words", ["10GiB", "gpu=10GiB", "0=much", "0=10GiB;cpu=2GiB", "cpu=-1GB"])
def test_limits_that_are_none(model: Path, words: str) -> None:
    with pytest.raises(UsageError, match="is no limit"):
        load(model, max_memory=words)


def test_limits() -> None:
    assert placement.parse_limits("0=10GiB, 1=10.5GB,cpu=20GiB") == {0: "10GiB", 1: "10.5GB", "cpu": "20GiB"}
    assert placement.parse_limits(None) is None


def test_one_device_unless_the_card_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuoling.environment.memory_available_bytes", lambda device: 1000)
    assert placement.keywords("cpu", 5000, None) == {}
    assert placement.keywords("cuda", 900, None) == {"device_map": {"": "cuda"}}
    assert placement.keywords("cuda", 901, None) == {"device_map": "auto"}
    assert placement.keywords("cuda:1", 901, None) == {"device_map": {"": "cuda:1"}}, (
        "that card was asked for"
    )
    assert placement.keywords("cpu", 1, {"cpu": "1GB"}) == {
        "device_map": "auto",
        "max_memory": {"cpu": "1GB"},
    }


def test_where_a_prompt_goes() -> None:
    def embeddings(weight: torch.Tensor, hook: Any) -> Any:
        module = SimpleNamespace(weight=weight, _hf_hook=hook)
        return SimpleNamespace(get_input_embeddings=lambda: module)

    meta, here = torch.empty(1, device="meta"), torch.empty(1)
    on_card = SimpleNamespace(execution_device="cuda:0")
    several = SimpleNamespace(hooks=(SimpleNamespace(), on_card))
    assert placement.first_device(embeddings(here, None)) == torch.device("cpu")
    assert placement.first_device(embeddings(meta, on_card)) == torch.device("cuda:0")
    assert placement.first_device(embeddings(meta, several)) == torch.device("cuda:0")


def test_a_batch_that_runs_out_of_memory_is_halved(capsys: pytest.CaptureFixture[str]) -> None:
    sizes: list[int] = []

    def run(prompts: Any) -> list[list[int]]:
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [[*prompt, 9] for prompt in prompts]

    assert in_halves(run, [[number] for number in range(7)]) == [[number, 9] for number in range(7)]
    assert sizes == [7, 3, 1, 2, 4, 2, 2] and "does not hold 7 answers at once" in capsys.readouterr().err

    def never(prompts: Any) -> list[list[int]]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ModelError, match="one answer to a prompt of 3 tokens"):
        in_halves(never, [[1, 2, 3]])
