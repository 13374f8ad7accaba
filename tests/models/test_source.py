"""What lies at a path: runs, adapters, models, and every way in which it may not be there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import tiny_model

from tuoling.errors import ModelError
from tuoling.files import sha256_file, write_json, write_manifest
from tuoling.models.source import find_model, is_hub_id


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("source") / "base", "llama")


def make_adapter(folder: Path, named: str, **record: Any) -> Path:
    """The files that finding looks at; the weights are not read."""
    folder.mkdir(parents=True)
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": named})
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    if record:
        write_json(folder / "template.json", record)
    return folder


def test_a_model_folder(model: Path) -> None:
    source = find_model(model)
    assert (source.kind, source.path, source.base, source.run) == ("model", model, None, None)
    assert source.family.name == "llama" and source.config["hidden_size"] == 32


def test_an_adapter_brings_its_base_template_and_stops(model: Path, tmp_path: Path) -> None:
    record = {"template": "domain_bloom", "stops": ["\n用户:"], "system": "你是驼铃", "max_seq_len": 77}
    source = find_model(make_adapter(tmp_path / "a", str(model), **record))
    assert source.kind == "adapter" and source.base is not None and source.base.path == model
    assert (source.template, source.stops, source.system, source.max_seq_len) == (
        "domain_bloom",
        ("\n用户:",),
        "你是驼铃",
        77,
    )
    assert source.weights_path == model and source.config["model_type"] == "llama"


def test_a_run_that_is_done_and_one_that_is_not(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    for step in (9, 10, 100):
        write_manifest(make_adapter(run / f"checkpoint-{step}", str(model), template="alpaca"))
    write_json(run / "run.json", {"config": {}})
    (run / "checkpoint-100" / "adapter_model.safetensors").write_bytes(
        b"torn"
    )  # its manifest no longer holds
    source = find_model(run)
    assert source.path == run / "checkpoint-10" and source.kind == "run" and source.run_folder == run
    assert "checkpoint-10" in capsys.readouterr().err
    for file in (run / "checkpoint-10").iterdir():
        shutil.copy(file, run)
    assert find_model(run).path == run


def test_a_run_without_weights(tmp_path: Path) -> None:
    write_json(tmp_path / "run" / "run.json", {})
    with pytest.raises(ModelError, match="no whole checkpoint") as caught:
        find_model(tmp_path / "run")
    assert "save_steps" in str(caught.value)


def test_a_moved_base_needs_to_be_named(model: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", "/gone/base", template="alpaca")
    with pytest.raises(ModelError, match="base model is not there: /gone/base") as caught:
        find_model(adapter)
    assert "--base" in str(caught.value.remedy)
    source = find_model(adapter, base=str(model))
    assert source.base is not None and source.base.path == model


def test_run_and_base_moved_together_find_each_other(model: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(model, home / "base")
    digest = sha256_file(home / "base" / "config.json")
    make_adapter(
        home / "run", "x", template="alpaca", base={"path": str(home / "base"), "config_sha256": digest}
    )
    home.rename(tmp_path / "elsewhere")
    source = find_model(tmp_path / "elsewhere" / "run")
    assert source.base is not None and source.base.path == tmp_path / "elsewhere" / "base"


@pytest.mark.parametrize(
    ("path", "named", "asked_hub"),
    [
        ("/gone/hub/models--o--n/snapshots/0123", "o/n", "o/n"),
        ("/gone/base", "base", None),
        ("/gone/models/base", "models/base", None),
        ("/gone/base", "./base", None),
    ],
)
def test_only_a_base_that_came_from_the_hub_is_asked_of_the_hub(
    path: str, named: str, asked_hub: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def fetch(model_id: str, **options: Any) -> Path:
        asked.append(model_id)
        raise ModelError("offline")

    monkeypatch.setattr("tuoling.models.hub.fetch", fetch)
    record = {"path": path, "named": named, "config_sha256": "0" * 64}
    with pytest.raises(ModelError, match="base model is not there"):
        find_model(make_adapter(tmp_path / "run", "x", template="alpaca", base=record))
    assert asked == ([asked_hub] if asked_hub else [])


def test_another_base_beside_the_run_is_not_taken(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "base")
    record = {"path": "/gone/base", "config_sha256": "0" * 64}
    with pytest.raises(ModelError, match="base model is not there"):
        find_model(make_adapter(tmp_path / "run", "x", template="alpaca", base=record))


def test_a_base_relative_to_the_adapter(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "base")
    source = find_model(make_adapter(tmp_path / "a", "../base"))
    assert source.base is not None and source.base.config["hidden_size"] == 32


def test_a_changed_base_is_refused_unless_it_is_asked_for(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {"path": str(model), "config_sha256": "0" * 64}
    adapter = make_adapter(tmp_path / "a", "x", template="alpaca", base=record)
    with pytest.raises(ModelError, match="not the one this adapter was trained on") as caught:
        find_model(adapter)
    assert f"--base {model}" in str(caught.value.remedy)
    assert find_model(adapter, base=str(model)).weights_path == model
    assert "not the one this adapter was trained on" in capsys.readouterr().err


def test_an_adapter_on_an_adapter(model: Path, tmp_path: Path) -> None:
    first = make_adapter(tmp_path / "first", str(model))
    with pytest.raises(ModelError, match="base is itself an adapter"):
        find_model(make_adapter(tmp_path / "second", str(first)))


@pytest.mark.parametrize(
    "name", ["./nothing", "/no/such/place", "~/nothing-here", "a/b/c", "模型/驼铃", "a b/c"]
)
def test_a_path_that_is_not_there_is_never_a_hub_id(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuoling.models.hub.fetch", lambda *a, **k: pytest.fail("the hub was asked"))
    with pytest.raises(ModelError, match="no such model folder") as caught:
        find_model(name)
    assert caught.value.where == name


def test_a_misspelt_folder_under_one_that_exists(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent.parent)
    monkeypatch.setattr("tuoling.models.hub.fetch", lambda *a, **k: pytest.fail("the hub was asked"))
    name = f"{model.parent.name}/bse"
    with pytest.raises(ModelError) as caught:
        find_model(name)
    assert caught.value.remedy == f"did you mean {model.parent.name}/base?"


def test_hub_ids() -> None:
    assert is_hub_id("bigscience/bloomz-560m") and is_hub_id("gpt2")
    assert not any(map(is_hub_id, ("", "./gpt2", "a/b/c", "/a", "~a", "a/", "é", ".hidden", "a\\b")))


def test_folders_that_are_no_model(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json") as caught:
        find_model(tmp_path)
    assert str(caught.value.remedy).startswith("the folder is empty: give one")
    (tmp_path / "inner").mkdir()
    shutil.copy(model / "config.json", tmp_path / "inner")
    with pytest.raises(ModelError) as caught:
        find_model(tmp_path)
    assert caught.value.remedy == f"did you mean {tmp_path / 'inner'}?"
    with pytest.raises(ModelError, match="no weights"):
        find_model(tmp_path / "inner")
    with pytest.raises(ModelError, match="this is a file"):
        find_model(tmp_path / "inner" / "config.json")
    (tmp_path / "inner" / "config.json").write_text(json.dumps([]), encoding="utf-8")
    with pytest.raises(ModelError, match="not a JSON object"):
        find_model(tmp_path / "inner")


def test_the_fingerprint_changes_with_the_weights(model: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", str(model))
    before = find_model(adapter).fingerprint()
    assert find_model(adapter).fingerprint() == before
    (adapter / "adapter_model.safetensors").write_bytes(b"other")
    assert find_model(adapter).fingerprint() != before
