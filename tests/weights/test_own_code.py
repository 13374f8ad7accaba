"""Models that bring their own Python code: refused by every command on weights, and carried along where allowed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.gguf_files import adapter_of
from tests.tiny import sum_rows, tiny_model, write_rows

from tuoling.errors import ModelError
from tuoling.files import read_json
from tuoling.models.source import find_model
from tuoling.weights.convert import ConvertOptions, convert
from tuoling.weights.gptq import quantize
from tuoling.weights.gptq_options import QuantizeOptions
from tuoling.weights.merge import merge
from tuoling.weights.merged import Weighted
from tuoling.weights.prune import prune_vocab
from tuoling.weights.prune_report import PruneOptions

CODE = """from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({mark!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A LLaMA under another name, with the code for it beside its weights and an adapter beside its folder."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tiny_model(tmp_path / "own", "llama", hidden=64)
    adapter_of(folder, tmp_path / "adapter", ["q_proj", "down_proj"])
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnModel"]}
    config["auto_map"] = {
        "AutoConfig": "modeling_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnModel",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_own.py").write_text(CODE.format(mark=str(tmp_path / "ran")))
    return folder


def _convert(own: Path, out: Path, allowed: bool) -> None:
    convert(own, out, to="hf", options=ConvertOptions(outtype="bf16", allow_remote_code=allowed))


def _merge(own: Path, out: Path, allowed: bool) -> None:
    source = find_model(own.parent / "adapter", base=str(own))
    merge([Weighted(source)], out, allow_remote_code=allowed, say=lambda _: None)


def _prune(own: Path, out: Path, allowed: bool) -> None:
    rows = write_rows(own.parent / "rows.jsonl", sum_rows(8))
    options = PruneOptions([str(rows)], base="ascii", allow_remote_code=allowed)
    prune_vocab(own, out, options, say=lambda _: None)


def _quantize(own: Path, out: Path, allowed: bool) -> None:
    options = QuantizeOptions(
        bits=8, group_size=32, method="rtn", device="cpu", verify=False, allow_remote_code=allowed
    )
    quantize(str(own), out, options)


@pytest.mark.slow
@pytest.mark.usefixtures("gate_here")
@pytest.mark.parametrize("step", [_convert, _merge, _prune, _quantize])
def test_code_runs_only_where_it_is_allowed(
    own: Path, tmp_path: Path, step: Callable[[Path, Path, bool], None]
) -> None:
    with pytest.raises(ModelError) as refused:
        step(own, tmp_path / "out", False)
    assert "--allow-remote-code" in (refused.value.remedy or "")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()
    step(own, tmp_path / "out", True)
    assert (tmp_path / "ran").exists()
    assert (tmp_path / "out" / "modeling_own.py").read_bytes() == (own / "modeling_own.py").read_bytes()
    parity = read_json(tmp_path / "out" / "parity.json")
    assert step is _quantize or (parity["verified"] and parity["passed"])
