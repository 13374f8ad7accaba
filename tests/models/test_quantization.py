"""What quantisation asks of a machine, and how it is written down and read again."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from tuoling.errors import MissingPackage, ModelError, UsageError
from tuoling.models.quantization import Quantization, chosen, require


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


def card(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


@pytest.mark.parametrize("quantization", [Quantization(8), Quantization(4), Quantization(4, "fp4", False)])
def test_record_and_back(quantization: Quantization) -> None:
    assert Quantization.from_record(quantization.to_record(), "x") == quantization


def test_no_record_is_not_quantised() -> None:
    assert not Quantization.from_record({}, "x") and str(Quantization()) == ""


@pytest.mark.parametrize(
    "record", [{"quantization_bit": 3}, {"quantization_bit": 4, "quantization_type": "hqq"}]
)
def test_an_unknown_record_is_an_error(record: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="unknown here") as caught:
        Quantization.from_record(record, "run/template.json")
    assert caught.value.where == "run/template.json"


def test_the_switch() -> None:
    saved = Quantization(4, "fp4", double=False)
    assert chosen(None, saved) == chosen(4, saved) == saved
    assert chosen(0, saved) == Quantization() and chosen(8, saved) == Quantization(8)
    assert chosen(4, Quantization()) == Quantization(4, "nf4", double=True)
    with pytest.raises(UsageError, match="quantization_bit=2: must be 0, 4 or 8"):
        chosen(2, saved)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    require(Quantization(), "cpu")
    with pytest.raises(MissingPackage, match="4 bits needs the package bitsandbytes") as caught:
        require(Quantization(4), "cpu")
    assert 'pip install "tuoling[quant]"' in str(caught.value)
    assert "quantization_bit=0" in str(caught.value) and "--quantization-bit 0" in str(caught.value)


def test_int8_on_an_old_card(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, (7, 0))
    with pytest.raises(
        ModelError, match=r"compute capability 7\.5 or more \(Turing\); this one has 7\.0"
    ) as caught:
        require(Quantization(8), "cuda")
    assert "quantization_bit=4" in str(caught.value) and "quantization_bit=0" in str(caught.value)
    require(Quantization(4), "cuda:1")
    card(monkeypatch, (7, 5))
    require(Quantization(8), "cuda")


def test_other_devices(installed: None) -> None:
    require(Quantization(8), "cpu")
    with pytest.raises(ModelError, match="not for mps"):
        require(Quantization(4), "mps")


def test_bytes_of_a_weight_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(512, 512)
    for double in (False, True):
        quantised, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
        held = quantised.nbytes + state.absmax.nbytes + (state.state2.absmax.nbytes if double else 0)
        assert Quantization(4, "nf4", double).bytes_per_weight == pytest.approx(
            held / weight.numel(), rel=1e-12
        )
    assert Quantization(8).bytes_per_weight == 1.0
