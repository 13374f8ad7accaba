"""The demo through the door, small: every file is there, and the scores are those of the predictions."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tuoling.cli import quickstart as door
from tuoling.cli.main import app
from tuoling.demo import quickstart as demo
from tuoling.demo.base import Size
from tuoling.errors import MissingPackage


def make_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A course of seconds; the model learns a little."""
    usual, few = demo.Course(), {"per_device_train_batch_size": 8, "num_train_epochs": 1}
    small = demo.Course(
        corpus=800,
        rows=600,
        held_out_per_kind=3,
        pretrain={**usual.pretrain, **few},
        tune={**usual.tune, **few},
        size=Size(hidden=32, layers=2, heads=4),
    )
    monkeypatch.setattr(demo, "Course", lambda: small)


def it_chats_from(file: Path, found: dict[str, Any]) -> None:
    """The last act: `found` tells answers of the GGUF file, the same that `tuoling chat FILE` gives."""
    assert file.suffix == ".gguf" and found["asked"] == str(file)
    assert list(found["answers"]) == list(door.TURNS) and any(found["answers"].values())
    for question, answer in found["answers"].items():
        said = CliRunner().invoke(app, ["chat", str(file), "--max-new-tokens", "48"], input=f"{question}\n")
        assert said.exit_code == 0 and said.stdout.strip() == answer.strip(), said.output


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bloom", "llama"])
def test_a_small_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    make_small(monkeypatch)
    out = tmp_path / "demo"
    call = ["quickstart", "--out", str(out), "--family", family, "--seed", "1"]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.output
    assert "tuoling chat" in result.stdout
    assert all(question in result.stdout for question in door.TURNS)
    done = json.loads((out / "run" / "all_results.json").read_text())
    assert done["train_loss_last"] < done["train_loss_first"] - 0.1  # a few steps: it has begun to learn
    predictions = json.loads((out / "run" / "predictions.json").read_text())
    right = [row["predict"].strip() == row["target"].strip() for row in predictions]
    kinds = len(done["accuracy_by_kind"])
    assert len(right) == 3 * kinds
    assert done["accuracy_after"] == pytest.approx(sum(right) / len(right))
    assert done["accuracy_before"] < 0.05
    for name in ("training_loss.png", "accuracy_by_kind.png", "adapter_model.safetensors", "README.md"):
        assert (out / "run" / name).is_file(), name
    again = CliRunner().invoke(app, call)
    assert again.exit_code == 1 and "--overwrite" in again.stderr


def test_an_unknown_family_is_a_wrong_call(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["quickstart", "--family", "gpt", "--out", str(tmp_path / "x")])
    assert result.exit_code == 2 and "--family" in result.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_the_whole_way_without_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there is made and asked; what is missing is told and left out."""

    def missing(*given: object, **options: object) -> None:
        raise MissingPackage("gptqmodel", extra="gptq", purpose="GPTQ")

    make_small(monkeypatch)
    monkeypatch.setattr("tuoling.weights.gptq.quantize", missing)
    out = tmp_path / "demo"
    result = CliRunner().invoke(app, ["quickstart", "--full", "--json", "--out", str(out), "--seed", "1"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    forms = {form["name"]: form for form in found["forms"]}
    assert "merged" in forms and len(forms) == 2 and "gptqmodel" in found["left_out"][0]
    assert not (out / "gptq-4bit").exists()
    assert found["asked"] == (str(out / "demo-q4_0.gguf") if find_spec("llama_cpp") else found["run"])
    assert list(found["answers"]) == list(door.TURNS)
    assert forms["merged"]["accuracy"] == pytest.approx(sum(found["after"].values()) / len(found["after"]))


@pytest.mark.long
@pytest.mark.parametrize("family", ["bloom", "llama"])
def test_the_whole_way_to_a_file_for_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Merged, quantised and as GGUF, which chats; what an extra is missing for is told and left out."""
    make_small(monkeypatch)
    out = tmp_path / "demo"
    call = ["quickstart", "--full", "--json", "--out", str(out), "--family", family, "--seed", "1"]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])  # DeepSpeed, where it is installed, greets on stdout
    forms = {form["name"]: form for form in found["forms"]}
    wanted = {"merged": True, "GPTQ 4 bit": find_spec("gptqmodel"), "GGUF q4_0": find_spec("llama_cpp")}
    assert {name for name, there in wanted.items() if there} <= forms.keys()
    assert len(forms) + len(found["left_out"]) == 3
    for form in forms.values():
        assert Path(form["path"]).exists() and form["size_bytes"] > 10_000
    assert json.loads((out / "merged" / "parity.json").read_text())["passed"]
    assert forms["merged"]["accuracy"] == pytest.approx(sum(found["after"].values()) / len(found["after"]))
    if find_spec("llama_cpp"):
        it_chats_from(Path(forms["GGUF q4_0"]["path"]), found)
