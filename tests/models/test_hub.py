"""Downloads against fake hubs on localhost: what is fetched, resumed, verified, and found again without a network."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from tests.fake_hubs import MODEL_ID, FakeHub, serve
from tests.tiny import tiny_model

from tuoling.errors import ModelError
from tuoling.models.hub import RemoteFile, choose_files, fetch
from tuoling.models.modelscope import fetch_modelscope
from tuoling.models.source import find_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("hub") / "m", "llama")


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Both hubs on one port; an empty cache; no pickles asked for."""
    shutil.copytree(model, tmp_path / "remote")
    (tmp_path / "remote" / "pytorch_model.bin").write_bytes(b"a pickle nobody needs")
    (tmp_path / "remote" / "flax_model.msgpack").write_bytes(b"nor this")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf-cache"))
    monkeypatch.delenv("TUOLING_HUB", raising=False)
    monkeypatch.delenv("USE_MODELSCOPE_HUB", raising=False)
    with serve(tmp_path / "remote") as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", running.url)
        yield running


def same_files(folder: Path, hub: FakeHub) -> bool:
    names = [name for name in hub.files() if not name.endswith((".bin", ".msgpack"))]
    return all((folder / name).read_bytes() == (hub.folder / name).read_bytes() for name in names)


def test_what_a_model_needs() -> None:
    def chosen(*names: str, weights: bool = True) -> list[str]:
        return [file.path for file in choose_files([RemoteFile(name, 1) for name in names], weights=weights)]

    both = (
        "config.json",
        "tokenizer.model",
        "model.safetensors",
        "pytorch_model.bin",
        "tf_model.h5",
        "onnx/model.onnx",
    )
    assert chosen(*both) == ["config.json", "tokenizer.model", "model.safetensors"]
    assert chosen("config.json", "pytorch_model.bin", "training_args.bin") == [
        "config.json",
        "pytorch_model.bin",
        "training_args.bin",
    ]
    assert chosen(*both, weights=False) == ["config.json", "tokenizer.model"]
    assert chosen("config.json", "checkpoint-5/model.safetensors", "pytorch_model.bin") == [
        "config.json",
        "pytorch_model.bin",
    ]


@pytest.mark.slow
def test_hugging_face_into_the_cache_and_found_without_a_network(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch(MODEL_ID)
    assert same_files(folder, hub)
    assert {name for name, _ in hub.fetched} & {"pytorch_model.bin", "flax_model.msgpack"} == set()
    assert find_model(MODEL_ID).path == folder
    hub.requests.clear()
    assert fetch(MODEL_ID) == folder and hub.requests == [], "what is whole is used without asking"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert find_model(MODEL_ID).path == folder


@pytest.mark.slow
def test_only_config_and_tokenizer(hub: FakeHub) -> None:
    from tuoling.models.tokenizers import load_tokenizer

    assert len(load_tokenizer(MODEL_ID)) == 320
    assert "model.safetensors" not in {name for name, _ in hub.fetched}
    assert same_files(fetch(MODEL_ID), hub), "and the weights come when they are needed"


@pytest.mark.slow
@pytest.mark.parametrize("into_cache", [True, False])
def test_hugging_face_resumes_what_was_cut(hub: FakeHub, tmp_path: Path, into_cache: bool) -> None:
    hub.cut["model.safetensors"] = 5000
    folder = fetch(MODEL_ID, to=None if into_cache else tmp_path / "to")
    assert same_files(folder, hub) and not list(folder.rglob("*.part*"))
    ranges = [asked for name, asked in hub.fetched if name == "model.safetensors"]
    assert ranges == [None, "bytes=5000-"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_hugging_face_wrong_checksum_is_removed(hub: FakeHub, name: str) -> None:
    hub.spoil.add(name)
    with pytest.raises(ModelError, match=f"{name} came with a wrong checksum and was removed") as caught:
        fetch(MODEL_ID)
    assert not Path(str(caught.value.where)).exists()
    hub.spoil.clear()
    folder = fetch(MODEL_ID)
    assert same_files(folder, hub)
    assert [n for n, _ in hub.fetched].count(name) == 2 and all(
        [n for n, _ in hub.fetched].count(other) == 1 for other in ("tokenizer.json",)
    )


@pytest.mark.slow
def test_tokens_stay_with_the_hub_and_off_its_cdn(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(hub.folder) as cdn:
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        hub.redirect = {"model.safetensors": cdn.url}
        assert same_files(fetch(MODEL_ID, to=tmp_path / "to"), hub)
        assert "model.safetensors" in {name for name, _ in cdn.fetched}
        assert set(cdn.tokens) == {None} and "Bearer hf_secret" in hub.tokens


@pytest.mark.slow
def test_damage_in_the_cache_is_found_when_asked_again(hub: FakeHub) -> None:
    folder = fetch(MODEL_ID)
    blob = (folder / "model.safetensors").resolve()
    data = blob.read_bytes()
    blob.write_bytes(data[:-1] + b"\x00")
    with pytest.raises(ModelError, match="wrong checksum"):
        fetch(MODEL_ID, again=True)
    assert same_files(fetch(MODEL_ID, again=True), hub)


@pytest.mark.parametrize("source", ["hf", "modelscope"])
def test_an_unknown_id(hub: FakeHub, source: str) -> None:
    with pytest.raises(ModelError, match="no such model") as caught:
        fetch("tuoling/nothing", source=source)  # type: ignore[arg-type]
    assert caught.value.where == "tuoling/nothing"


@pytest.mark.parametrize("source", ["hf", "modelscope"])
def test_a_hub_that_is_not_there(hub: FakeHub, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match="cannot be reached"):
        fetch(MODEL_ID, source=source)  # type: ignore[arg-type]


def test_offline_and_nothing_cached(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="cannot be reached"):
        find_model(MODEL_ID)


def test_modelscope_whole_resumed_and_used_again(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUOLING_HUB", "modelscope")
    hub.cut["model.safetensors"] = 4000
    folder = fetch(MODEL_ID)
    assert same_files(folder, hub) and not list(folder.rglob("*.part"))
    ranges = [asked for name, asked in hub.fetched if name == "model.safetensors"]
    assert ranges == [None, "bytes=4000-"]
    hub.requests.clear()
    assert find_model(MODEL_ID).path == folder and hub.requests == []


def test_modelscope_killed_midway_goes_on(hub: FakeHub, tmp_path: Path) -> None:
    to = tmp_path / "to"
    to.mkdir()
    data = (hub.folder / "model.safetensors").read_bytes()
    (to / "model.safetensors.part").write_bytes(data[:3000])
    shutil.copy(hub.folder / "tokenizer.json", to)
    assert same_files(fetch_modelscope(MODEL_ID, to=to), hub)
    assert ("model.safetensors", "bytes=3000-") in hub.fetched
    assert "tokenizer.json" not in {name for name, _ in hub.fetched}, "what is whole is not fetched twice"


def test_modelscope_wrong_checksum_is_removed(hub: FakeHub, tmp_path: Path) -> None:
    hub.spoil.add("model.safetensors")
    with pytest.raises(ModelError, match="wrong checksum"):
        fetch_modelscope(MODEL_ID, to=tmp_path / "to")
    assert not list((tmp_path / "to").glob("model.safetensors*"))
    hub.spoil.clear()
    assert same_files(fetch_modelscope(MODEL_ID, to=tmp_path / "to"), hub)


def test_modelscope_may_not_write_elsewhere() -> None:
    from tuoling.models.modelscope import _inside

    assert _inside("a/b.json") == "a/b.json"
    for path in ("../x", "/etc/passwd", "a/../../x", ""):
        with pytest.raises(ModelError, match="forbidden path"):
            _inside(path)
