"""`tuoling doctor`: facts of this machine, and the pairs known to go wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tuoling import environment
from tuoling.cli import doctor
from tuoling.cli.main import app
from tuoling.errors import UsageError

INSTALLED = {"gptqmodel": "7.6.0", "numpy": "2.3.0"}


@pytest.mark.slow
def test_facts_as_json() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json", "--no-test"])
    found = json.loads(result.stdout)
    assert found["machine"]["cores"] == environment.cpu_count()
    assert found["versions"]["torch"].startswith("2.")
    assert found["device"] in ("cpu", "cuda", "mps") and found["dtype"] in ("bf16", "fp16", "fp32")
    assert "fp32" in found["precisions"]["cpu"] and "fp16" not in found["precisions"]["cpu"]
    assert found["disk_free_gib"] > 0 < found["memory_available_gib"]
    assert result.exit_code == (1 if found["problems"] else 0)


@pytest.mark.slow
def test_facts_for_people() -> None:
    result = CliRunner().invoke(app, ["doctor", "--no-test"])
    assert all(word in result.stdout for word in ("versions", "device", "memory", "Chinese font", "hub"))


def test_a_known_bad_pair_is_named_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", INSTALLED.get)
    assert doctor.bad_pairs() == ["gptqmodel needs numpy==2.2.6; installed is 2.3.0"]
    result = CliRunner().invoke(app, ["doctor", "--no-test"])
    assert result.exit_code == 1 and "gptqmodel needs numpy==2.2.6" in result.stderr
    monkeypatch.setattr(doctor, "_version", {**INSTALLED, "numpy": "2.2.6"}.get)
    assert doctor.bad_pairs() == []


def test_a_torch_that_cannot_be_imported_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(asked: str = "auto") -> str:
        raise ImportError("libcudart.so is missing")

    monkeypatch.setattr(environment, "pick_device", broken)
    result = CliRunner().invoke(app, ["doctor", "--no-test"])
    assert "torch cannot be used: libcudart.so is missing" in result.stdout


def test_a_device_that_is_not_there_is_a_wrong_call() -> None:
    with pytest.raises(UsageError, match="no device cuda:99"):
        environment.pick_device("cuda:99")


def test_the_hub_the_user_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://hf-mirror.com/")
    assert doctor.facts()["hub"] == "https://hf-mirror.com"


@pytest.mark.slow
def test_the_self_test_names_what_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """One path works, one crashes, one is wrong by more than its precision, one never ends."""
    from tuoling.demo import self_test

    said = {
        "good": "print(json.dumps({'loss': 6.0, 'said': 'fine'}))",
        "crashes": "import os; os.kill(os.getpid(), 11)",
        "refuses": "import sys; sys.exit('Error: no kernel image')",
        "wrong": "print(json.dumps({'loss': 6.4, 'said': 'fine'}))",
        "endless": "import threading; threading.Event().wait()",
    }
    ways = [self_test.Way(name, "train", {}) for name in said]
    monkeypatch.setattr(self_test, "write_files", lambda folder: None)
    monkeypatch.setattr(self_test, "paths", lambda device, dtype: ways)
    monkeypatch.setattr(self_test, "TIMEOUT_S", 1)
    script = f"import json, sys; exec(list({list(said.values())!r})[json.loads(sys.argv[2])['number']])"
    monkeypatch.setattr(self_test, "CHILD", (sys.executable, "-c", script))
    result = CliRunner().invoke(app, ["doctor", "--json"])
    tests = {test["name"]: test["problem"] for test in json.loads(result.stdout)["tests"]}
    assert tests["good"] is None and tests["crashes"] == "ended by signal 11"
    assert tests["refuses"] == "Error: no kernel image"
    assert tests["wrong"] == "the first loss is 6.4000, on the CPU in fp32 6.0000"
    assert tests["endless"] == "not done after 1 s"
    assert result.exit_code == 1


def test_the_paths_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    from tuoling.demo import self_test

    monkeypatch.setattr(environment, "cpu_has_bf16", lambda: False)
    monkeypatch.setattr(self_test, "_there", lambda package: False)
    names = [way.name for way in self_test.paths("cpu", "fp32")]
    assert names == ["training, CPU, fp32", "two processes, ddp", "two processes, fsdp", "chat, transformers"]
    monkeypatch.setattr(environment, "cpu_has_bf16", lambda: True)
    monkeypatch.setattr(self_test, "_there", lambda package: True)
    names = [way.name for way in self_test.paths("cuda", "bf16")]
    assert {"training, CPU, bf16", "training, cuda, bf16", "two processes, zero2"} < set(names)
    assert {"training on a base in 4 bits", "chat, GGUF in llama.cpp"} < set(names)


@pytest.mark.slow
@pytest.mark.long
def test_every_path_of_this_machine_works(tmp_path: Path) -> None:
    from tuoling.demo.self_test import self_test

    found = list(self_test(tmp_path, "cpu", environment.pick_dtype("auto", "cpu")))
    assert [finding.problem for finding in found] == [None] * len(found) and len(found) >= 4
