"""`tuoling chat` from the outside."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import tiny_model
from typer.testing import CliRunner

from tuoling.cli.main import app
from tuoling.files import sha256_file, write_json


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("chat") / "base", "llama")


@pytest.fixture(scope="module")
def run(model: Path) -> Path:
    """A run folder whose adapter changes nothing much, tuned with domain_bloom."""
    from peft import LoraConfig, get_peft_model

    from tuoling.models.load import find_model, load_model, load_tokenizer
    from tuoling.models.save import save_adapter

    base: Any = load_model(find_model(model), dtype="fp32", device="cpu", for_training=True)
    tuned = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    folder = model.parent / "run"
    record = {
        "template": "domain_bloom",
        "stops": ["\n用户:"],
        "base": {
            "path": str(model),
            "named": str(model),
            "config_sha256": sha256_file(model / "config.json"),
        },
    }
    save_adapter(tuned, folder, tokenizer=load_tokenizer(model), template=record)
    write_json(folder / "run.json", {"config": {}})
    return folder


def chat(*words: object, lines: str = "你好\n") -> Any:
    words = ("chat", *map(str, words), "--device", "cpu", "--dtype", "fp32", "--max-new-tokens", "8")
    return CliRunner().invoke(app, list(words), input=lines)


@pytest.mark.slow
def test_a_run_alone_is_enough(run: Path) -> None:
    result = chat(run, lines="你好\n再见\n")
    assert result.exit_code == 0, result.output
    assert "template domain_bloom, saved with the model" in result.stderr
    assert result.stdout.endswith("\n") and result.stdout.count("\n") >= 2


@pytest.mark.slow
def test_answers_are_the_engines_and_nothing_else_is_on_stdout(run: Path) -> None:
    from tuoling.api import load

    with load(run, device="cpu", dtype="fp32") as model:
        expected = model.chat("你好", max_new_tokens=8)
        assert "".join(model.stream("你好", max_new_tokens=8)) == expected
        talk = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": expected}]
        second = model.chat([*talk, {"role": "user", "content": "再见"}], max_new_tokens=8)
    assert chat(run, lines="你好\n再见\n/exit\n").stdout == f"{expected}\n{second}\n"


@pytest.mark.slow
def test_another_template_needs_a_flag_and_warns(run: Path) -> None:
    result = chat(run, "--template", "alpaca")
    assert result.exit_code == 0
    assert "! template alpaca, as asked; what is saved here was made with domain_bloom" in result.stderr


@pytest.mark.slow
def test_a_plain_model_folder(model: Path) -> None:
    result = chat(model)
    assert result.exit_code == 0 and "the model names none" in result.stderr


@pytest.mark.parametrize(
    ("words", "said", "code"),
    [
        (("./nowhere",), "no such model folder", 1),
        (("{model}", "--template", "alpacca"), "unknown template", 1),
        (("{model}", "--temperature", "-1"), "temperature=-1.0 is out of range", 2),
        (("{model}", "--temperature", "hot"), "--temperature", 2),
        (("{model}", "--dtype", "fp16"), "float16 on a CPU", 1),
    ],
)
def test_bad_calls(model: Path, words: tuple[str, ...], said: str, code: int) -> None:
    filled = [word.format(model=model) for word in words]
    result = CliRunner().invoke(app, ["chat", *filled, "--device", "cpu"], input="你好\n")
    assert said in result.stderr and result.exit_code == code, result.output
    assert result.stdout == "" and "Traceback" not in result.stderr


@pytest.mark.slow
def test_an_adapter_whose_base_is_gone(run: Path, tmp_path: Path) -> None:
    import shutil

    from tuoling.files import read_json

    adapter = tmp_path / "adapter"
    shutil.copytree(run, adapter)
    record = read_json(adapter / "template.json")
    record["base"] = {"path": "/gone/base", "named": "/gone/base"}
    write_json(adapter / "template.json", record)
    result = chat(adapter)
    assert result.exit_code == 1 and "/gone/base" in result.stderr and "--base" in result.stderr
    assert chat(adapter, "--base", run.parent / "base").exit_code == 0


@pytest.mark.slow
def test_piped_through_a_process(run: Path) -> None:
    """UTF-8 in and out whatever the locale says, and no half characters."""
    done = subprocess.run(
        [sys.executable, "-m", "tuoling", "chat", str(run), "--max-new-tokens", "4", "--device", "cpu"],
        input="你好\n/bogus\n".encode(),
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 1 and b"no such command: /bogus" in done.stderr
    done.stdout.decode("utf-8")
