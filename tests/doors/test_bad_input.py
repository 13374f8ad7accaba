"""Bad input through the door: the problem, the place, a way out; no traceback; nothing half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import sum_rows, tiny_model, write_rows
from typer.testing import CliRunner

from tuoling.cli.main import app


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base"))


Make = Callable[[Path, Path], list[str]]


def with_data(content: bytes | None) -> Make:
    """A call whose data file holds `content` (None: is not there)."""

    def make(folder: Path, model: Path) -> list[str]:
        if content is not None:
            (folder / "rows.json").write_bytes(content)
        return ["--model", str(model), "--data", str(folder / "rows.json")]

    return make


def with_keys(*words: str) -> Make:
    def make(folder: Path, model: Path) -> list[str]:
        data = write_rows(folder / "rows.json", sum_rows(8))
        return ["--model", str(model), "--data", str(data), *words]

    return make


def without_tokenizer(folder: Path, model: Path) -> list[str]:
    copy = folder / "bare"
    copy.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model / name, copy / name)
    return ["--model", str(copy), "--data", str(write_rows(folder / "rows.json", sum_rows(8)))]


def without_end_token(folder: Path, model: Path) -> list[str]:
    copy = folder / "endless"
    shutil.copytree(model, copy)
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] != "</s>"]
    tokenizer["model"]["vocab"]["<gone>"] = tokenizer["model"]["vocab"].pop("</s>")
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    for name in ("config.json", "generation_config.json"):
        values = json.loads((copy / name).read_text())
        values.pop("eos_token_id", None)
        (copy / name).write_text(json.dumps(values))
    return ["--model", str(copy), "--data", str(write_rows(folder / "rows.json", sum_rows(8)))]


def not_empty(folder: Path, model: Path) -> list[str]:
    (folder / "run").mkdir()
    (folder / "run" / "mine.txt").write_text("precious")
    return with_keys()(folder, model)


def a_file_in_the_way(folder: Path, model: Path) -> list[str]:
    (folder / "run").write_text("a file")
    return with_keys()(folder, model)


LIST_ANSWER = json.dumps([{"instruction": "一加一", "output": ["二"]}], ensure_ascii=False).encode()

CASES: list[Any] = [
    pytest.param(with_data(None), 1, ["rows.json"], id="missing file"),
    pytest.param(with_data(b""), 1, ["rows.json", "empty"], id="empty file"),
    pytest.param(with_data(bytes(range(256)) * 64), 1, ["rows.json"], id="binary file"),
    pytest.param(with_data(LIST_ANSWER), 1, ["rows.json:1", "output", "list"], id="answer is a list"),
    pytest.param(without_tokenizer, 1, ["bare", "tokenizer"], id="no tokenizer"),
    pytest.param(without_end_token, 1, ["endless", "end token"], id="no end token"),
    pytest.param(with_keys("template=alpacca"), 1, ["alpacca", "alpaca"], id="unknown template"),
    pytest.param(with_keys("lora_rnak=8"), 2, ["lora_rnak", "lora_rank"], id="misspelt key"),
    pytest.param(with_keys("lora_rank=many"), 2, ["lora_rank=many", "whole number"], id="wrong value"),
    pytest.param(not_empty, 1, ["run", "not empty", "overwrite_output_dir"], id="output not empty"),
    pytest.param(a_file_in_the_way, 1, ["run", "file"], id="output is a file"),
    pytest.param(with_keys("val_size=8"), 2, ["val_size", "8 rows"], id="held out more than there is"),
    pytest.param(with_keys("max_seq_len=3"), 1, ["max_seq_len=3"], id="max_seq_len below every prompt"),
    pytest.param(
        with_keys("max_seq_len=3", "overlong=cut_prompt"), 1, ["max_seq_len"], id="nothing is left to cut"
    ),
    pytest.param(with_keys("model_name_or_path=./nowhere"), 1, ["nowhere"], id="model folder is not there"),
    pytest.param(with_keys("device=cpu", "dtype=fp16"), 2, ["fp16"], id="fp16 on a CPU"),
    pytest.param(with_keys("recipe=domian-bloom"), 2, ["domain-bloom"], id="misspelt recipe"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("make", "code", "words"), CASES)
def test_bad_input_is_told_and_nothing_is_written(
    tmp_path: Path, model: Path, make: Make, code: int, words: list[str]
) -> None:
    arguments = make(tmp_path, model)
    if any(word.startswith("model_name_or_path=") for word in arguments):
        arguments = arguments[2:]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    usual = ["--out", str(tmp_path / "run"), "device=cpu", "dtype=fp32"]
    result = CliRunner().invoke(app, ["train", *usual, *arguments])
    said = result.output + result.stderr
    assert result.exit_code == code, said
    for word in words:
        assert word in said, said
    assert "Traceback" not in said
    for path, content in before.items():
        assert path.read_bytes() == content
    made = {path for path in tmp_path.rglob("*") if path.is_file()} - set(before)
    assert not [path for path in made if "tuoling-cache" not in path.parts]


def test_a_place_that_cannot_be_written_to(tmp_path: Path, model: Path) -> None:
    arguments = with_keys()(tmp_path, model)
    out = "/proc/tuoling-run"  # even root cannot make a folder there
    result = CliRunner().invoke(app, ["train", *arguments, "--out", out, "device=cpu"])
    assert result.exit_code == 1 and "cannot write" in result.stderr and out in result.stderr
