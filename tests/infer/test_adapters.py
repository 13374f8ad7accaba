"""Several adapters on one base: each answers as it does alone, at the same time too, and in its own words."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import tiny_model

from tuoling.api import load
from tuoling.errors import ModelError, UsageError
from tuoling.files import sha256_file
from tuoling.infer.engine import BASE, GenerationSettings
from tuoling.infer.open_engine import parse_adapters
from tuoling.infer.torch_engine import TorchEngine
from tuoling.text.conversation import Conversation, Turn

GREEDY = GenerationSettings(max_new_tokens=16)
ASKED = Conversation((Turn("user", "你好"),))
PLAIN: dict[str, Any] = {"device": "cpu", "dtype": "fp32"}


def save_adapter_on(base: Path, folder: Path, *, seed: int, template: str, targets: list[str]) -> Path:
    """An adapter whose both halves are random, so that it changes what the base says."""
    from peft import LoraConfig, get_peft_model

    from tuoling.models.load import find_model, load_model, load_tokenizer
    from tuoling.models.save import save_adapter

    model: Any = load_model(find_model(base), dtype="fp32", device="cpu", for_training=True)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=4, lora_alpha=32, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    record = {
        "template": template,
        "base": {
            "path": str(base),
            "named": str(base),
            "config_sha256": sha256_file(base / "config.json"),
        },
    }
    save_adapter(get_peft_model(model, config), folder, tokenizer=load_tokenizer(base), template=record)
    return folder


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    base = tiny_model(root / "llama", "llama")
    query = ["q_proj", "v_proj"]
    return {
        "llama": base,
        "law": save_adapter_on(base, root / "law", seed=1, template="domain_bloom", targets=query),
        "med": save_adapter_on(base, root / "med", seed=2, template="alpaca", targets=["up_proj", "q_proj"]),
    }


@pytest.fixture(scope="module")
def alone(places: dict[str, Path]) -> dict[str, str]:
    """What each says when nothing else is loaded; the base is asked in law's words."""
    texts = {}
    for name in ("law", "med"):
        with load(places[name], **PLAIN) as model:
            texts[name] = model.engine.generate([ASKED], GREEDY)[0].text
    with load(places["llama"], template="domain_bloom", **PLAIN) as model:
        texts[BASE] = model.engine.generate([ASKED], GREEDY)[0].text
    assert len(set(texts.values())) == 3
    return texts


@pytest.fixture
def law(places: dict[str, Path]) -> Any:
    with load(places["law"], adapters={"med": str(places["med"])}, **PLAIN) as model:
        yield model.engine


def say(engine: Any) -> str:
    text: str = engine.generate([ASKED], GREEDY)[0].text
    return text


@pytest.mark.slow
def test_each_adapter_answers_as_it_does_alone(law: TorchEngine, alone: dict[str, str]) -> None:
    assert law.adapters == ("law", BASE, "med") and law.adapter == "law"
    for name in ("law", "med", BASE, "law", BASE, "med", "med", "law"):
        engine = law.using(name)
        assert (say(engine), engine.adapter) == (alone[name], name)
    assert law.using("med").template.id == "alpaca" and law.using(BASE).template.id == "domain_bloom"
    prints = {law.using(name).fingerprint for name in law.adapters}
    assert len(prints) == 3, "predictions of one are never taken for another's"
    with pytest.raises(UsageError, match="no adapter is called tax"):
        law.using("tax")


@pytest.mark.slow
def test_adapters_answer_at_the_same_time(law: TorchEngine, alone: dict[str, str]) -> None:
    """Streams take turns forward by forward; whoever is asked, nobody gets another's layers."""
    said: dict[str, set[str]] = {name: set() for name in law.adapters}

    def ask(name: str) -> None:
        for _ in range(3):
            pieces = law.using(name).stream(ASKED, GREEDY)
            said[name].add("".join(piece.text for piece in pieces))

    threads = [threading.Thread(target=ask, args=(name,)) for name in law.adapters]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == {name: {alone[name]} for name in law.adapters}


@pytest.mark.slow
def test_adapters_on_a_plain_base(places: dict[str, Path], alone: dict[str, str]) -> None:
    more = {"law": str(places["law"]), "b": str(places["med"])}
    with load(places["llama"], template="domain_bloom", adapters=more, **PLAIN) as model:
        engine: Any = model.engine
        assert engine.adapters == (BASE, "law", "b")
        assert (say(engine), say(engine.using("law"))) == (alone[BASE], alone["law"])
        assert engine.using("b").template.id == "domain_bloom", "--template is for all"


@pytest.mark.slow
def test_a_plain_model_has_nothing_to_choose(places: dict[str, Path]) -> None:
    with load(places["llama"], **PLAIN) as model:
        assert (model.engine.adapters, model.engine.adapter) == ((), None)
        with pytest.raises(UsageError, match="--adapter"):
            model.engine.using(BASE)


@pytest.mark.slow
def test_merged_says_what_applied_says(places: dict[str, Path], alone: dict[str, str]) -> None:
    from peft import PeftModel

    with load(places["law"], merge=True, **PLAIN) as model:
        engine: Any = model.engine
        assert engine.adapters == () and not isinstance(engine.model, PeftModel)
        assert say(engine) == alone["law"]


@pytest.mark.parametrize(
    ("path", "options", "said"),
    [
        ("llama", {"merge": True}, "no adapter to merge"),
        ("law", {"merge": True, "adapters": {"med": "{med}"}}, "no other adapters"),
        ("law", {"adapters": {"law": "{med}"}}, "two adapters are called law"),
        ("law", {"adapters": {"base": "{med}"}}, "two adapters are called base"),
        ("law", {"adapters": {"x": "{llama}"}}, "whole model, not an adapter"),
        ("law", {"adapters": {"x": "./nowhere"}}, "no such model folder"),
    ],
)
def test_what_does_not_go_together(
    places: dict[str, Path], path: str, options: dict[str, Any], said: str
) -> None:
    more = {name: place.format(**places) for name, place in options.get("adapters", {}).items()}
    with pytest.raises((UsageError, ModelError), match=said):
        load(places[path], **{**options, "adapters": more}, **PLAIN)


@pytest.mark.slow
def test_an_adapter_of_another_base_is_refused_and_base_is_the_way_past(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_model(tmp_path / "deeper", "llama", layers=3)
    query = ["q_proj", "v_proj"]
    tax = save_adapter_on(other, tmp_path / "tax", seed=3, template="domain_bloom", targets=query)
    with pytest.raises(ModelError, match="another base") as refused:
        load(places["law"], adapters={"tax": str(tax)}, **PLAIN)
    assert f"--base {places['llama']}" in str(refused.value.remedy)
    with pytest.raises(ModelError, match="does not fit this base"):
        load(places["law"], adapters={"tax": str(tax)}, base=str(places["llama"]), **PLAIN)
    assert "config.json differs" in capsys.readouterr().err
    copied = tmp_path / "copy"
    copied.mkdir()
    for file in places["llama"].iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    twin = save_adapter_on(copied, tmp_path / "twin", seed=2, template="domain_bloom", targets=query)
    with load(places["law"], adapters={"twin": str(twin)}, **PLAIN) as model:
        assert "twin" in model.engine.adapters, "a copy of the base is the base"


def test_names_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "a=b").mkdir()
    words = ["law=runs/one", "runs/two", str(tmp_path / "a=b")]
    assert parse_adapters(words) == {"law": "runs/one", "two": "runs/two", "a=b": str(tmp_path / "a=b")}
    for bad, said in ((["x=1", "x=2"], "two adapters are called x"), (["=2"], "is not NAME=PATH")):
        with pytest.raises(UsageError, match=said):
            parse_adapters(bad)
