"""`tuoling licence`, and lineage carried from training through every way that weights take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import sum_rows, tiny_model, write_rows
from typer.testing import CliRunner

from tuoling.cli.main import app
from tuoling.models.licence import LINEAGE, Part, read_lineage, write_lineage

LLAMA_1 = "---\nlicense: other\nlicense_name: llama-1\n---\n"


def call(*words: object) -> Any:
    return CliRunner().invoke(app, list(map(str, words)))


def parts_of(folder: Path) -> dict[str, tuple[str, ...]]:
    return {Path(part.named).name: part.licences for part in read_lineage(folder / LINEAGE)}


BELLE = ("odc-by", "research-only", "openai-outputs")
WANTED = {"base": ("llama-1",), "train_0.5M_CN.json": BELLE}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA whose card says LLaMA 1."""
    folder = tiny_model(tmp_path_factory.mktemp("licence") / "base", "llama")
    (folder / "README.md").write_text(LLAMA_1)
    return folder


@pytest.fixture(scope="module")
def run(base: Path) -> Path:
    """One step of LoRA on rows named as BELLE's."""
    rows = write_rows(base.parent / "train_0.5M_CN.json", sum_rows(8))
    words = ["template=domain_bloom", "max_steps=1", "device=cpu", "plot_loss=false", "lora_rank=2"]
    result = call("train", "--model", base, "--data", rows, "--out", base.parent / "run", *words)
    assert result.exit_code == 0, result.output
    said = " ".join(result.stderr.split())
    assert "may not be used commercially" in said and "train_0.5M_CN.json (odc-by + research-only" in said
    assert said.index("may not be used") < said.index("loss ")  # before it starts
    return base.parent / "run"


def test_rows_that_were_made_bring_their_generator_along(tmp_path: Path) -> None:
    """Of the rows of a folder that we wrote, what went into them counts, not the file."""
    rows = write_rows(tmp_path / "rows.jsonl", sum_rows(2))
    write_lineage(tmp_path, [Part("generator", "gpt-4o", ("openai-outputs",), "name", "api.openai.com")])
    found = json.loads(call("licence", rows, "--json").stdout)
    assert [(part["kind"], part["named"]) for part in found["parts"]] == [("generator", "gpt-4o")]
    assert found["commercial"] == "conditions"


@pytest.mark.slow
def test_a_run_says_what_went_in(run: Path) -> None:
    assert parts_of(run) == WANTED
    manifest = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert [part["kind"] for part in manifest["lineage"]["parts"]] == ["model", "data"]
    card = (run / "README.md").read_text(encoding="utf-8")
    assert "能否发布权重：只能以差分或适配器形式" in card and "Commercial use: no" in card
    result = call("licence", run, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["commercial"], found["publish"]) == ("no", "diff")
    assert call("licence", run).stdout.count("\n") > 5


@pytest.mark.slow
def test_carried_through_merge_prune_quantise_convert_diff_and_patch(
    run: Path, base: Path, tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    rows = base.parent / "train_0.5M_CN.json"
    for words in (
        ("merge", run, merged, "--no-verify"),
        ("convert", merged, tmp_path / "hf", "--to", "hf", "--no-verify"),
        ("convert", merged, tmp_path / "meta", "--to", "meta", "--no-verify"),
        ("convert", tmp_path / "meta", tmp_path / "back", "--no-verify"),
        ("prune-vocab", merged, tmp_path / "small", "--keep", rows, "--no-verify"),
        ("quantize", merged, tmp_path / "quantised", "--method", "rtn", "--group-size", 16, "--no-verify"),
        ("diff", base, merged, tmp_path / "diff"),
        ("patch", base, tmp_path / "diff", tmp_path / "patched"),
    ):
        result = call(*words)
        assert result.exit_code == 0, (words, result.output)
    for name in ("merged", "hf", "meta", "back", "small", "quantised", "patched"):
        assert parts_of(tmp_path / name) == WANTED, name
    card = (merged / "README.md").read_text(encoding="utf-8")
    assert "license: other" in card or "license: llama-1" in card


@pytest.mark.slow
def test_carried_into_a_gguf_file_and_out_of_it(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs the extra gguf")
    file = tmp_path / "m.gguf"
    assert call("convert", run, file, "--outtype", "f16", "--no-verify").exit_code == 0
    assert json.loads(call("licence", file, "--json").stdout)["publish"] == "diff"
    assert call("convert", file, tmp_path / "out", "--no-verify").exit_code == 0
    assert parts_of(tmp_path / "out") == WANTED
    lora = tmp_path / "lora.gguf"
    assert call("convert", run, lora, "--to", "gguf-lora").exit_code == 0
    found = json.loads(call("licence", lora, "--json").stdout)
    assert {
        part["named"]: tuple(part["licences"]) for part in found["parts"]
    } == WANTED  # and no path of this disk


def test_the_users_word_is_kept_and_a_wrong_name_refused(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(b"")
    unknown = call("licence", folder)
    assert "Commercial use: unknown" in unknown.stdout and "Unknown does not mean allowed" in unknown.stdout
    assert call("licence", folder, "--licence", "m=apache", "--write").exit_code == 0
    again = json.loads(call("licence", folder, "--json").stdout)
    assert again["commercial"] == "yes"
    assert (again["parts"][0]["said_by"], again["parts"][0]["licences"]) == ("user", ["apache-2.0"])
    wrong = call("licence", folder, "--licence", "n=mit")
    assert wrong.exit_code == 1 and "nothing that goes in is called n" in wrong.stderr
    assert call("licence", folder, "--licence", "mit").exit_code == 2
