"""`tuoling doctor`: facts of this machine, and the pairs known to go wrong."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from tuoling import environment
from tuoling.cli import doctor
from tuoling.cli.main import app
from tuoling.errors import UsageError

INSTALLED = {"gptqmodel": "7.6.0", "numpy": "2.3.0"}


def test_facts_as_json() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    found = json.loads(result.stdout)
    assert found["machine"]["cores"] == environment.cpu_count()
    assert found["versions"]["torch"].startswith("2.")
    assert found["device"] in ("cpu", "cuda", "mps") and found["dtype"] in ("bf16", "fp16", "fp32")
    assert found["disk_free_gib"] > 0 < found["memory_available_gib"]
    assert result.exit_code == (1 if found["problems"] else 0)


def test_facts_for_people() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert all(word in result.stdout for word in ("versions", "device", "memory", "Chinese font", "hub"))


def test_a_known_bad_pair_is_named_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", INSTALLED.get)
    assert doctor.bad_pairs() == ["gptqmodel needs numpy==2.2.6; installed is 2.3.0"]
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1 and "gptqmodel needs numpy==2.2.6" in result.stderr
    monkeypatch.setattr(doctor, "_version", {**INSTALLED, "numpy": "2.2.6"}.get)
    assert doctor.bad_pairs() == []


def test_a_torch_that_cannot_be_imported_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(asked: str = "auto") -> str:
        raise ImportError("libcudart.so is missing")

    monkeypatch.setattr(environment, "pick_device", broken)
    result = CliRunner().invoke(app, ["doctor"])
    assert "torch cannot be used: libcudart.so is missing" in result.stdout


def test_a_device_that_is_not_there_is_a_wrong_call() -> None:
    with pytest.raises(UsageError, match="no device cuda:99"):
        environment.pick_device("cuda:99")


def test_the_hub_the_user_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://hf-mirror.com/")
    assert doctor.facts()["hub"] == "https://hf-mirror.com"
