"""One config out of files, words and flags: layers, names, ranges, and what is said when something is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tuoling.config import RunConfig, load_config, sort_words
from tuoling.config_files import read_config_file, strip_json_comments
from tuoling.errors import ConfigError


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_layers_win_in_order(tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", "recipe: belle-2023\nlora_rank: 1\nlora_alpha: 1\nseed: 1\n")
    second = write(tmp_path / "b.yaml", "lora_alpha: 2\nseed: 2\n")
    loaded = load_config([first, second], ["seed=3"], {"seed": 4, "template": None})
    config = loaded.config
    assert (config.lora_rank, config.lora_alpha, config.seed) == (1, 2, 4)
    assert (config.learning_rate, config.template, config.recipe) == (1e-5, "belle_apr", "belle-2023")
    assert loaded.origin["lora_alpha"] == f"{second}:1"
    assert loaded.origin["learning_rate"] == "recipe belle-2023"
    assert loaded.origin["seed"] == "command line: seed"


def test_aliases_become_our_names_and_are_noted() -> None:
    words = [
        "lora_r=3",
        "cutoff_len=77",
        "target_modules=a,b",
        "micro_batch_size=2",
        "data_path=x.json",
        "test_size=9",
    ]
    loaded = load_config([], words)
    config = loaded.config
    assert (config.lora_rank, config.max_seq_len, config.lora_target) == (3, 77, ("a", "b"))
    assert (config.per_device_train_batch_size, config.data, config.val_size) == (2, ("x.json",), 9)
    assert any("lora_r → lora_rank" in note for note in loaded.notes)


def test_two_names_with_two_values_are_an_error(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "lora_rank: 4\nlora_r: 8\n")
    with pytest.raises(ConfigError, match=r"lora_rank is given twice: 4 \(.*c\.yaml:1\) and 8"):
        load_config([file])


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("lora_rank=0", "lora_rank=0: must be greater than 0"),
        ("lora_rank=true", "lora_rank=True: must be a number"),
        ("lora_rank=2.5", "lora_rank=2.5: must be a whole number"),
        ("lora_dropout=1", "lora_dropout=1: must be less than 1"),
        ("lora_dropout=-0.1", "lora_dropout=-0.1: must be at least 0"),
        ("learning_rate=nan", "learning_rate=nan: must be a number"),
        ("learning_rate=fast", "learning_rate=fast: must be a number"),
        ("overlong=cut", "overlong=cut: must be one of error, drop, cut_prompt, split"),
        ("lr_scheduler_type=polynomial", "must be one of linear, cosine, constant"),
        ("dtype=int8", "dtype=int8: must be one of auto, bf16, fp16, fp32"),
        ("bf16=perhaps", "bf16=perhaps: must be true or false"),
        ("plot_loss=7", "plot_loss=7: must be true or false"),
        ("device=gpu", "device=gpu: must be auto, cpu, cuda"),
        ("val_size=1.5", "val_size=1.5: below 1 it is a share"),
        ("stage=dpo", "stage=dpo: must be one of sft, pt"),
        ("report_to=mlflow", "must be one of tensorboard, wandb, swanlab"),
        ("columns=ask", "columns=ask: must be pairs"),
        ("quantization_bit=3", "quantization_bit=3: must be one of 0, 4, 8"),
        ("quantization_bit=true", "quantization_bit=True: must be a number"),
        ("quantization_type=int4", "quantization_type=int4: must be one of nf4, fp4"),
        ("load_in_4bit=maybe", "load_in_4bit=maybe: must be true or false"),
        ("quantization_method=hqq", "kept by bitsandbytes here"),
        ("llm_int8_threshold=0.0", "its own threshold of 6.0"),
        ("llm_int8_skip_modules=lm_head", "not supported, and leaving it out would change the result"),
        ("optim=adafactor", "optim=adafactor: must be one of adamw, adamw_8bit, muon"),
        ("max_seq_len=1", "max_seq_len=1: must be greater than 1"),
    ],
)
def test_wrong_values_are_named_with_their_key(word: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([], [word])
    assert says in str(caught.value)
    assert caught.value.exit_code == 2


def test_all_problems_are_raised_at_once(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "lora_rnk: 8\nlora_dropout: 2\nseed: x\n")
    with pytest.raises(ConfigError) as caught:
        load_config([file], ["batch_size=7", "per_device_train_batch_size=4"])
    text = caught.value.problem
    assert text.startswith("4 problems")
    assert f"{file}:1: unknown key: lora_rnk (did you mean lora_rank" in text
    assert f"{file}:2: lora_dropout=2: must be less than 1" in text
    assert f"{file}:3: seed=x: must be a whole number" in text
    assert "batch_size=7 is not a multiple of per_device_train_batch_size=4" in text


def test_total_batch_decides_accumulation() -> None:
    config = load_config([], ["batch_size=128", "per_device_train_batch_size=4"]).config
    assert config.gradient_accumulation_steps == 32
    assert [config.accumulation(world) for world in (1, 2, 8)] == [32, 16, 4]
    with pytest.raises(ConfigError, match="128 is not a multiple") as caught:
        config.accumulation(3)
    assert caught.value.remedy == "batch_size=120 / batch_size=132"
    assert load_config([], ["batch_size=6"]).config.per_device_train_batch_size == 3
    assert load_config([], ["gradient_accumulation_steps=5"]).config.accumulation(2) == 5
    with pytest.raises(ConfigError, match="4 × gradient_accumulation_steps=2 = 8"):
        load_config([], ["batch_size=16", "per_device_train_batch_size=4", "gradient_accumulation_steps=2"])


def test_a_token_budget_alone_makes_steps_of_tokens(tmp_path: Path) -> None:
    alone = load_config([], ["max_tokens_per_batch=4096", "gradient_accumulation_steps=2"]).config
    assert (alone.per_device_train_batch_size, alone.rows_per_step()) == (None, None)
    assert alone.accumulation() == 2
    config = load_config([], ["max_tokens_per_batch=4096", "batch_size=6"]).config
    assert (config.per_device_train_batch_size, config.rows_per_step(), config.rows_per_step(2)) == (3, 6, 6)
    assert load_config([], ["per_device_train_batch_size=2"]).config.rows_per_step(world_size=3) == 6
    for ran in (alone, config):  # what run.json says is the same run
        file = write(tmp_path / "run.json", json.dumps(ran.model_dump(mode="json")))
        assert load_config([file]).config == ran


def test_a_token_budget_over_batch_sizes_of_a_recipe(tmp_path: Path) -> None:
    words = ["recipe=domain-bloom", "max_tokens_per_batch=2048"]
    rows = load_config([], ["recipe=domain-bloom"]).config.rows_per_step()
    assert rows and load_config([], words).config.rows_per_step() == rows
    without = ["batch_size=null", "per_device_train_batch_size=null"]
    assert load_config([], [*words, *without]).config.rows_per_step() is None


@pytest.mark.parametrize("value", ["0", "-1", "true", "1.5", "many"])
def test_a_token_budget_is_a_positive_whole_number(value: str) -> None:
    with pytest.raises(ConfigError, match="max_tokens_per_batch"):
        load_config([], [f"max_tokens_per_batch={value}"])


def test_fairseqs_name_is_answered_with_ours() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([], ["max_tokens=4096"])
    assert "max_tokens_per_batch" in str(caught.value)


def test_a_later_layer_sets_aside_what_says_the_same() -> None:
    loaded = load_config([], ["recipe=chinese-vicuna", "gradient_accumulation_steps=2", "warmup_ratio=0.5"])
    config = loaded.config
    assert (config.batch_size, config.gradient_accumulation_steps) == (None, 2)
    assert (config.warmup_steps, config.warmup_ratio) == (None, 0.5)
    assert sum("is set aside" in note for note in loaded.notes) == 2


def test_held_out_rows() -> None:
    def rows(total: int, **keys: Any) -> int:
        return RunConfig(**keys).val_rows(total)

    assert rows(1666, val_size=1000, val_max_share=0.1) == 166
    assert rows(1666, val_size=0.25) == 416
    assert rows(1666, val_size=100) == 100
    assert rows(0, val_size=5) == 5
    with pytest.raises(ConfigError, match="val_size=2000 leaves nothing to train on: there are 1666 rows"):
        rows(1666, val_size=2000)


@pytest.mark.parametrize(
    ("words", "bits", "kind", "double"),
    [
        ((), None, "nf4", True),
        (("quantization_bit=8",), 8, "nf4", True),
        (("load_in_8bit=true", "load_in_4bit=false"), 8, "nf4", True),
        (("load_in_4bit=true", "bnb_4bit_quant_type=fp4", "use_bnb_nested_quant=false"), 4, "fp4", False),
        (("quant_bits=4", "quant_method=bnb", "bnb_4bit_use_double_quant=false"), 4, "nf4", False),
        (
            ("quantization_bit=4", "quantization_method=BNB", "bnb_4bit_compute_dtype=bfloat16"),
            4,
            "nf4",
            True,
        ),
        (("quantization_bit=0", "llm_int8_threshold=6.0", "finetuning_type=full"), 0, "nf4", True),
    ],
)
def test_quantised_bases_by_every_name(
    words: tuple[str, ...], bits: int | None, kind: str, double: bool
) -> None:
    config = load_config([], words).config
    asked = (config.quantization_bit, config.quantization_type, config.double_quantization)
    assert asked == (bits, kind, double)


def test_what_4_bits_mean_is_said() -> None:
    (note,) = (note for note in load_config([], ["load_in_4bit=true"]).notes if "load_in_4bit" in note)
    assert "quantization_type=nf4, double_quantization=true" in note
    with pytest.raises(ConfigError, match="quantization_bit is given twice: 4"):
        load_config([], ["load_in_4bit=true", "load_in_8bit=true"])


def test_whole_models_are_not_trained_quantised() -> None:
    with pytest.raises(ConfigError, match="quantization_bit=4 with finetuning_type=full") as caught:
        load_config([], ["quantization_bit=4", "finetuning_type=full"])
    remedy = str(caught.value.remedy)
    assert "finetuning_type=lora" in remedy and "quantization_bit=0" in remedy


def test_null_takes_a_key_away(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "quantization_bit: 4\nlora_rank: 2\nmax_samples: 5\n")
    loaded = load_config([file], ["quantization_bit=null", "max_samples=null"])
    assert (loaded.config.lora_rank, loaded.config.max_samples) == (2, None)
    assert "taken away on the command line: max_samples, quantization_bit" in loaded.notes


def test_numbers_as_people_write_them() -> None:
    assert load_config([], ["learning_rate=1e-4"]).config.learning_rate == 1e-4
    assert load_config([], ["learning_rate='1.0e-4'"]).config.learning_rate == 1e-4
    assert load_config([], ["dtype=torch.bfloat16"]).config.dtype == "bf16"
    assert load_config([], ["fp16=true"]).config.dtype == "fp16"
    assert load_config([], ["fp16=false", "bf16=false"]).config.dtype == "auto"
    assert load_config([], ["report_to=none"]).config.report_to == ()
    assert load_config([], ["report_to=[wandb, tensorboard]"]).config.report_to == ("wandb", "tensorboard")
    assert load_config([], ["save_strategy=epoch", "eval_strategy=steps"]).config.save_steps is None
    assert load_config([], ["save_strategy=no"]).config.save_steps == 0
    assert load_config([], ["mask_history=true"]).config.learn == "last"


def test_learning_rate_default_follows_what_is_trained() -> None:
    assert load_config().config.learning_rate == RunConfig().learning_rate == 2e-4
    assert load_config([], ["finetuning_type=full"]).config.learning_rate == 2e-5


def test_json_with_comments_keeps_strings_and_lines(tmp_path: Path) -> None:
    text = """{
    # the model
    "model_name_or_path": "http://x/#1", // a comment with "quotes"
    "data": ["a,]", "b//c",],  /* two
    lines */ "output_dir": "say \\"hi\\" # not a comment",
}
"""
    assert len(strip_json_comments(text)) == len(text)
    file = read_config_file(write(tmp_path / "c.json", text))
    assert file.values == {
        "model_name_or_path": "http://x/#1",
        "data": ["a,]", "b//c"],
        "output_dir": 'say "hi" # not a comment',
    }
    assert file.lines == {"model_name_or_path": 3, "data": 4, "output_dir": 5}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("c.yaml", b"", "no keys"),
        ("c.yaml", b"# nothing\n", "no keys"),
        ("c.yaml", b"- a\n- b\n", "key: value"),
        ("c.yaml", b"a: 1\nb: [\n", "c.yaml:3:1"),
        ("c.yaml", b"lora_rank: 1\nseed: 2\nlora_rank: 3\n", "c.yaml:3"),
        ("c.json", b'{"a": 1,\n "b" 2}', "c.json:2:6"),
        ("c.json", b'{"seed": 1, "seed": 2}', "seed is given twice"),
        ("c.yaml", b"\x00\x01\x02", "binary"),
        ("c.yaml", b"\xff\xff\xff", "neither UTF-8 nor GB18030"),
    ],
)
def test_bad_files_are_errors_with_their_place(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config([file])
    assert says in str(caught.value) and str(file) in str(caught.value)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the config file"):
        load_config([tmp_path / "no.yaml"])


def test_gb18030_and_bom(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes("output_dir: 结果 # 注释\n".encode("gb18030"))
    assert load_config([file]).config.output_dir == "结果"
    file.write_bytes("output_dir: 结果\n".encode("utf-8-sig"))
    assert load_config([file]).config.output_dir == "结果"


def test_paths_are_as_typed_then_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, here = tmp_path / "configs", tmp_path / "here"
    folder.mkdir()
    here.mkdir()
    for place in (folder, here):
        write(place / "both.json", "[]")
    write(folder / "only.json", "[]")
    file = write(folder / "c.yaml", "data: [both.json, only.json#50]\nmodel_name_or_path: some/model\n")
    monkeypatch.chdir(here)
    loaded = load_config([file])
    assert loaded.config.data == ("both.json", f"{folder / 'only.json'}#50")
    assert loaded.config.model_name_or_path == "some/model"
    assert [note for note in loaded.notes if "beside the config file" in note and "only.json" in note]


def test_files_with_and_without_commas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("a,b.json"), "[]")
    assert load_config([], ["data=a,b.json"]).config.data == ("a,b.json",)
    assert load_config([], ["data=a.json, c.json"]).config.data == ("a.json", "c.json")
    assert load_config([], ["data=[a.json, 'c,d.json']"]).config.data == ("a.json", "c,d.json")


def test_config_is_frozen_and_closed() -> None:
    config = RunConfig()
    with pytest.raises(Exception, match="frozen"):
        config.seed = 1  # type: ignore[misc]
    with pytest.raises(Exception, match="Extra inputs"):
        RunConfig(nonsense=1)  # type: ignore[call-arg]


def test_require_names_what_is_missing() -> None:
    with pytest.raises(ConfigError, match="missing: model_name_or_path, data"):
        RunConfig().require("model_name_or_path", "data", "seed")
    RunConfig(dataset=("x",), model_name_or_path="m").require("model_name_or_path", "data")


def test_words_of_a_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    odd = write(Path("a=b.yaml"), "seed: 1\n")
    assert sort_words(["a=b.yaml", "seed=2", "domain-bloom"]) == ([odd], ["seed=2", "recipe=domain-bloom"])
    for word, says in (
        ("no.yaml", "no such config file\nno.yaml"),
        ("domain-blom", "did you mean domain-bloom?"),
        ("qqq", "recipes: alpaca-full, "),
    ):
        with pytest.raises(ConfigError) as caught:
            sort_words([word])
        assert says in str(caught.value)


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no such recipe: domain-blom") as caught:
        load_config([], ["recipe=domain-blom"])
    assert "domain-bloom" in (caught.value.remedy or "")


@pytest.mark.parametrize("word, value", [("5%", 0.05), ("1.5%", 0.015), ("0.05", 0.05)])
def test_a_share_may_be_written_in_percent(word: str, value: float) -> None:
    """The README and our own remedies write it so."""
    config = load_config(overrides=[f"val_size={word}", f"allow_bad={word}", f"warmup_ratio={word}"]).config
    assert (config.val_size, config.allow_bad, config.warmup_ratio) == pytest.approx((value,) * 3, rel=1e-12)


def test_a_hundred_percent_is_refused() -> None:
    """As a number it would be 1, which means one row."""
    with pytest.raises(ConfigError, match="val_size=100%"):
        load_config(overrides=["val_size=100%"])
