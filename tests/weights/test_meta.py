"""Meta's checkpoints ↔ Hugging Face: against a naive oracle, against Meta's way to compute, and there and back."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import tiny_tokenizer
from tests.weights import meta_style
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from tuoling.cli.main import app
from tuoling.errors import ModelError, TuolingError, UsageError
from tuoling.models.source import find_model
from tuoling.weights import meta_layout
from tuoling.weights.convert import ConvertOptions, convert
from tuoling.weights.meta_layout import MetaCheckpoint, pairs_apart, pairs_together
from tuoling.weights.parity import ParityError
from tuoling.weights.safetensors_writer import SafetensorsWriter
from tuoling.weights.tensors import open_weights

OURS = ("manifest.json", "parity.json", "lineage.json")
SIZES = {"dim": 64, "layers": 2, "heads": 8, "kv_heads": 8, "wide": 192, "words": 96}
PARAMS = {"dim": 64, "multiple_of": 64, "n_heads": 8, "n_layers": 2, "norm_eps": 1e-6, "vocab_size": -1}
GROUPED = {**SIZES, "kv_heads": 2}
GROUPED_PARAMS = {**PARAMS, "n_kv_heads": 2, "norm_eps": 1e-5, "rope_theta": 500000.0, "vocab_size": 96}


def options(**values: Any) -> ConvertOptions:
    return ConvertOptions(verify=False, **values)


def convert_files(source: Path, out: Path, to: str, **values: Any) -> Path:
    convert(source, out, to=to, options=options(**values))
    return out


def test_rotary_rows_move_as_written_on_paper() -> None:
    rows = torch.arange(4.0)[:, None]
    assert pairs_apart(rows, 1)[:, 0].tolist() == [0, 2, 1, 3]
    heads, size = 3, 8
    rows = torch.arange(float(heads * size))[:, None].expand(-1, 2).contiguous()
    wanted = []
    for head in range(heads):
        wanted += [head * size + 2 * pair for pair in range(size // 2)]
        wanted += [head * size + 2 * pair + 1 for pair in range(size // 2)]
    assert pairs_apart(rows, heads)[:, 1].tolist() == wanted
    assert torch.equal(pairs_together(pairs_apart(rows, heads), heads), rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "params", "count", "by_word"),
    [
        (SIZES, PARAMS, 1, False),
        (SIZES, PARAMS, 2, False),
        (SIZES, PARAMS, 8, False),
        (GROUPED, GROUPED_PARAMS, 1, False),
        (GROUPED, GROUPED_PARAMS, 2, False),
        (GROUPED, GROUPED_PARAMS, 2, True),
    ],
)
def test_transformers_computes_what_metas_code_computes(
    tmp_path: Path, sizes: dict[str, int], params: dict[str, Any], count: int, by_word: bool
) -> None:
    tensors = meta_style.random_tensors(**sizes)
    tensors["rope.freqs"] = torch.arange(4.0)
    source = meta_style.save_shards(tmp_path / "meta", tensors, params, count, by_word=by_word)
    out = convert_files(source, tmp_path / "hf", "hf")
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float64)
    ids = [1, 17, 3, 95, 42, 42, 7]
    ours = model(torch.tensor([ids])).logits[0]
    wanted = meta_style.logits(tensors, params, ids)
    assert wanted.std() > 0.5
    # transformers keeps its rotary tables in float32, whatever the weights are
    assert torch.allclose(ours, wanted, atol=2e-5, rtol=0), float((ours - wanted).abs().max())


def huggingface_folder(folder: Path, **values: Any) -> Path:
    """A random LLaMA with a tokenizer, as transformers saves it."""
    tokenizer = tiny_tokenizer(vocab_size=320)
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 172,
        "vocab_size": 320,
        "max_position_embeddings": 777,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **values})).to(values.get("dtype", torch.float32))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


SCALED = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "shards"),
    [
        ({}, 1),
        ({}, 4),
        ({"num_key_value_heads": 8, "intermediate_size": 176}, 8),
        ({"tie_word_embeddings": True}, 2),
        ({"dtype": torch.bfloat16, "rms_norm_eps": 1e-5}, 2),
        ({"rope_parameters": SCALED, "num_key_value_heads": 8}, 2),
    ],
)
def test_there_and_back_every_byte_is_the_same(tmp_path: Path, values: dict[str, Any], shards: int) -> None:
    source = huggingface_folder(tmp_path / "hf", **values)
    meta = convert_files(source, tmp_path / "meta", "meta", shards=shards)
    assert len(list(meta.glob("consolidated.*.pth"))) == shards
    back = convert_files(meta, tmp_path / "back", "hf")
    names = sorted(path.name for path in source.iterdir())
    assert "model.safetensors" in names
    for name in names:
        if name == "config.json":
            assert json.loads((back / name).read_text()) == json.loads((source / name).read_text())
        else:
            assert (back / name).read_bytes() == (source / name).read_bytes(), name
    assert names == sorted(path.name for path in back.iterdir() if path.name not in OURS)


@pytest.mark.slow
def test_what_we_write_is_what_metas_code_computes(tmp_path: Path) -> None:
    source = huggingface_folder(tmp_path / "hf", tie_word_embeddings=True)
    meta = convert_files(source, tmp_path / "meta", "meta", shards=2)
    tensors = meta_style.load_shards(meta)
    params = json.loads((meta / "params.json").read_text())
    assert params["multiple_of"] == 4 and params["n_kv_heads"] == 4  # 170 rounded up to 172
    ids = [1, 300, 5, 5, 19]
    wanted = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64)(torch.tensor([ids])).logits[0]
    assert torch.allclose(meta_style.logits(tensors, params, ids), wanted, atol=2e-5, rtol=0)
    assert torch.equal(tensors["output.weight"], tensors["tok_embeddings.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("first", [1, 2, 4, 8])
@pytest.mark.parametrize("second", [1, 2, 4, 8])
def test_other_numbers_of_files_and_back(tmp_path: Path, first: int, second: int) -> None:
    tensors = {name: tensor.half() for name, tensor in meta_style.random_tensors(**SIZES).items()}
    source = meta_style.save_shards(tmp_path / "source", tensors, PARAMS, first)
    middle = convert_files(source, tmp_path / "middle", "meta", shards=second)
    back = convert_files(middle, tmp_path / "back", "meta", shards=first)
    assert json.loads((back / "params.json").read_text()) == PARAMS
    assert len(list(middle.glob("*.pth"))) == second
    for name, tensor in meta_style.load_shards(middle).items():
        assert torch.equal(tensor, tensors[name]), name
    for path in sorted(source.glob("*.pth")):
        wanted, got = (torch.load(folder / path.name, weights_only=True) for folder in (source, back))
        assert list(wanted) == list(got)
        assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def test_a_new_config_keeps_no_head_that_is_the_embedding(tmp_path: Path) -> None:
    tensors = meta_style.random_tensors(**SIZES)
    tensors["output.weight"] = tensors["tok_embeddings.weight"].clone()
    for count in (1, 2):
        source = meta_style.save_shards(tmp_path / f"{count}", tensors, PARAMS, count)
        checkpoint = MetaCheckpoint(source)
        assert checkpoint.config["tie_word_embeddings"] and "lm_head.weight" not in checkpoint.infos
    tensors["output.weight"][95, 63] += 1
    assert not MetaCheckpoint(meta_style.save_shards(tmp_path / "two", tensors, PARAMS, 2)).config[
        "tie_word_embeddings"
    ]


def test_a_meta_folder_opens_with_huggingface_names(tmp_path: Path) -> None:
    tensors = meta_style.random_tensors(**SIZES)
    source = open_weights(meta_style.save_shards(tmp_path / "meta", tensors, PARAMS, 2))
    assert torch.equal(source.read("model.embed_tokens.weight"), tensors["tok_embeddings.weight"])
    assert source.infos["model.layers.1.mlp.down_proj.weight"].shape == (64, 192)


def test_a_meta_folder_given_as_a_model_is_told_what_to_do(tmp_path: Path) -> None:
    source = meta_style.save_shards(tmp_path / "meta", meta_style.random_tensors(**SIZES), PARAMS, 1)
    with pytest.raises(ModelError) as refused:
        find_model(source)
    assert f"tuoling convert {source}" in str(refused.value)


@pytest.mark.slow
def test_another_number_type(tmp_path: Path) -> None:
    tensors = meta_style.random_tensors(**SIZES)
    source = meta_style.save_shards(tmp_path / "meta", tensors, PARAMS, 2)
    out = convert_files(source, tmp_path / "hf", "hf", outtype="bf16")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16 == model.lm_head.weight.dtype
    assert torch.equal(model.lm_head.weight, tensors["output.weight"].bfloat16())
    meta = convert_files(out, tmp_path / "again", "meta", outtype="f16")
    assert torch.load(meta / "consolidated.00.pth", weights_only=True)["output.weight"].dtype == torch.float16
    assert json.loads((meta / "huggingface_config.json").read_text())["dtype"] == "float16"


@pytest.mark.slow
def test_a_kept_config_that_no_longer_fits_is_not_used(tmp_path: Path) -> None:
    source = huggingface_folder(tmp_path / "hf")
    meta = convert_files(source, tmp_path / "meta", "meta")
    kept = json.loads((meta / "huggingface_config.json").read_text())
    (meta / "huggingface_config.json").write_text(json.dumps({**kept, "num_attention_heads": 4}))
    report = convert(meta, tmp_path / "back", options=options())
    assert any("does not fit" in note for note in report.notes)
    assert json.loads((tmp_path / "back/config.json").read_text())["num_attention_heads"] == 8


def checklist(folder: Path, names: list[str]) -> None:
    lines = [f"{hashlib.md5((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "checklist.chk").write_text("".join(lines))


def test_a_right_checklist_is_told(tmp_path: Path) -> None:
    source = meta_style.save_shards(tmp_path / "meta", meta_style.random_tensors(**SIZES), PARAMS, 2)
    checklist(source, ["consolidated.00.pth", "consolidated.01.pth", "params.json"])
    report = convert(source, tmp_path / "out", options=options())
    assert any("consolidated.01.pth" in note and "right" in note for note in report.notes)


@pytest.mark.slow
@pytest.mark.usefixtures("gate_here")
def test_every_direction_is_proven_and_the_figures_lie_beside(tmp_path: Path) -> None:
    source = huggingface_folder(tmp_path / "hf", dtype=torch.float16)
    for before, out, to, shards in (
        (source, tmp_path / "meta", "meta", 2),
        (tmp_path / "meta", tmp_path / "resharded", "meta", 4),
        (tmp_path / "resharded", tmp_path / "back", "hf", None),
    ):
        report = convert(before, out, to=to, options=ConvertOptions(shards=shards))
        assert report.parity is not None and report.parity.passed
        assert report.parity.max_logit_difference == 0 and report.parity.greedy_equal
        record = json.loads((out / "parity.json").read_text())
        assert record["verified"] and record["positions"] > 50
        assert "parity.json" in json.loads((out / "manifest.json").read_text())


@pytest.mark.slow
@pytest.mark.usefixtures("gate_here")
def test_a_wrong_conversion_does_not_pass_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta = convert_files(huggingface_folder(tmp_path / "hf"), tmp_path / "meta", "meta")
    usual = SafetensorsWriter.write

    def wrong(writer: SafetensorsWriter, name: str, tensor: torch.Tensor) -> None:
        """Rotary pairs put apart once too often."""
        usual(writer, name, meta_layout.pairs_apart(tensor, 4) if "q_proj" in name else tensor)

    monkeypatch.setattr(SafetensorsWriter, "write", wrong)
    with pytest.raises(ParityError, match="logits differ"):
        convert(meta, tmp_path / "back", options=ConvertOptions())
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "meta"}
    convert(meta, tmp_path / "back", options=options())
    assert json.loads((tmp_path / "back/parity.json").read_text()) == {
        "verified": False,
        "why": "--no-verify",
    }


def test_without_a_tokenizer_the_proof_is_refused_before_the_work(tmp_path: Path) -> None:
    source = meta_style.save_shards(tmp_path / "meta", meta_style.random_tensors(**SIZES), PARAMS, 1)
    with pytest.raises(ModelError) as refused:
        convert(source, tmp_path / "out", options=ConvertOptions())
    assert "tokenizer.model" in str(refused.value) and "--no-verify" in str(refused.value)


@pytest.mark.slow
@pytest.mark.usefixtures("gate_here")
def test_a_damaged_tokenizer_is_not_taken_for_none(tmp_path: Path) -> None:
    """Without one any ids compare the weights; half of one would be copied into the output beside a passed proof."""
    source = huggingface_folder(tmp_path / "hf")
    text = (source / "tokenizer.json").read_text()
    (source / "tokenizer.json").write_text(text[: len(text) // 2])
    for to in ("meta", "hf"):
        with pytest.raises(ModelError, match="not a usable tokenizer file"):
            convert(source, tmp_path / "out", to=to, options=ConvertOptions())
        assert [path.name for path in tmp_path.iterdir()] == ["hf"]


# ---- bad input


def wrong_checklist(folder: Path) -> None:
    checklist(folder, ["consolidated.00.pth", "consolidated.01.pth"])
    text = (folder / "checklist.chk").read_text()
    (folder / "checklist.chk").write_text(
        text[:32].translate(str.maketrans("0123456789", "1234567890")) + text[32:]
    )


def listed_shard_missing(folder: Path) -> None:
    checklist(folder, ["consolidated.00.pth", "consolidated.01.pth"])
    (folder / "checklist.chk").write_text(
        (folder / "checklist.chk").read_text() + f"{'0' * 32}  consolidated.02.pth\n"
    )


def change(
    folder: Path, name: str, edit: Callable[[torch.Tensor], torch.Tensor | None], shard: int = 0
) -> None:
    path = folder / f"consolidated.{shard:02d}.pth"
    tensors = torch.load(path, weights_only=True)
    made = edit(tensors.pop(name))
    torch.save(tensors if made is None else {**tensors, name: made}, path)


def change_params(folder: Path, **values: Any) -> None:
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps({**params, **values}))


def not_a_number(tensor: torch.Tensor) -> torch.Tensor:
    tensor[1, 2] = float("nan")
    return tensor


BAD: list[Any] = [
    pytest.param(wrong_checklist, ["consolidated.00.pth", "checksum", "--unchecked"], id="wrong checklist"),
    pytest.param(listed_shard_missing, ["consolidated.02.pth"], id="the checklist names a missing file"),
    pytest.param(
        lambda folder: (folder / "consolidated.00.pth").unlink(),
        ["consolidated.00.pth"],
        id="first file missing",
    ),
    pytest.param(
        lambda folder: (folder / "consolidated.01.pth").unlink(),
        ["cut for 2 files", "1"],
        id="last file missing",
    ),
    pytest.param(
        lambda folder: (folder / "consolidated.01.pth").write_bytes(
            (folder / "consolidated.01.pth").read_bytes()[:-500]
        ),
        ["consolidated.01.pth", "cut short"],
        id="cut",
    ),
    pytest.param(
        lambda folder: (folder / "consolidated.01.pth").write_bytes(b"<html>not found</html>"),
        ["consolidated.01.pth", "not a zip"],
        id="a web page",
    ),
    pytest.param(lambda folder: (folder / "params.json").unlink(), ["params.json"], id="no params.json"),
    pytest.param(lambda folder: (folder / "params.json").write_text("{"), ["params.json:1"], id="params cut"),
    pytest.param(
        lambda folder: change_params(folder, n_heads=0), ["params.json", "n_heads is 0"], id="no heads"
    ),
    pytest.param(lambda folder: change_params(folder, dim="64"), ["dim is '64'"], id="a dim in words"),
    pytest.param(lambda folder: change_params(folder, dim=128), ["dim 128", "64"], id="another dim"),
    pytest.param(
        lambda folder: change_params(folder, n_layers=3), ["n_layers 3", "layers.2."], id="more layers"
    ),
    pytest.param(
        lambda folder: change_params(folder, n_layers=1), ["n_layers 1", "layers.1."], id="fewer layers"
    ),
    pytest.param(lambda folder: change_params(folder, multiple_of=256), ["256", "192"], id="another width"),
    pytest.param(lambda folder: change_params(folder, n_kv_heads=4), ["attention.wk"], id="other groups"),
    pytest.param(lambda folder: change_params(folder, vocab_size=100), ["100", "96"], id="other vocabulary"),
    pytest.param(lambda folder: change_params(folder, moe={"n": 8}), ["moe"], id="a key that is not LLaMA's"),
    pytest.param(
        lambda folder: change(folder, "layers.1.attention.wv.weight", not_a_number, 1),
        ["v_proj", "NaN", "--allow-nan"],
        id="NaN",
    ),
    pytest.param(
        lambda folder: change(folder, "layers.1.ffn_norm.weight", lambda tensor: None, 1),
        ["layers.1.ffn_norm.weight", "consolidated.01.pth"],
        id="a tensor missing",
    ),
    pytest.param(
        lambda folder: change(folder, "norm.weight", lambda tensor: tensor * 2, 1),
        ["norm.weight differs"],
        id="files of two models",
    ),
    pytest.param(
        lambda folder: change(folder, "layers.0.feed_forward.w2.weight", lambda tensor: tensor[:, 1:], 1),
        ["layers.0.feed_forward.w2.weight"],
        id="another shape",
    ),
]


@pytest.mark.parametrize(("spoil", "words"), BAD)
def test_bad_input_is_refused_and_nothing_is_left(
    tmp_path: Path, spoil: Callable[[Path], None], words: list[str]
) -> None:
    source = meta_style.save_shards(tmp_path / "meta", meta_style.random_tensors(**SIZES), PARAMS, 2)
    spoil(source)
    result = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "out"), "--no-verify"])
    said = result.output + result.stderr
    assert result.exit_code == 1, said
    for word in words:
        assert word in said, said
    assert "defect" not in said
    assert {path.name for path in tmp_path.iterdir()} - {"tuoling-cache"} == {"meta"}


def test_one_flag_goes_past_a_wrong_checklist_and_past_nan(tmp_path: Path) -> None:
    source = meta_style.save_shards(tmp_path / "meta", meta_style.random_tensors(**SIZES), PARAMS, 2)
    wrong_checklist(source)
    change(source, "layers.1.attention.wv.weight", not_a_number, 1)
    convert(source, tmp_path / "out", options=options(unchecked=True, allow_nan=True))
    assert open_weights(tmp_path / "out").read("model.layers.1.self_attn.v_proj.weight").isnan().sum() == 1


class _Trap:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.write_text, (self.proof, "executed")


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    source = meta_style.save_shards(tmp_path / "meta", meta_style.random_tensors(**SIZES), PARAMS, 1)
    path = source / "consolidated.00.pth"
    torch.save({**torch.load(path, weights_only=True), "extra": _Trap(tmp_path / "proof")}, path)
    result = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "out"), "--no-verify"])
    assert result.exit_code == 1 and "code" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} - {"tuoling-cache"} == {"meta"}
    torch.load(path, weights_only=False)
    assert (tmp_path / "proof").exists(), "the trap would have worked"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"attention_bias": True}, "bias"),
        ({"model_type": "qwen2"}, "qwen2"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"head_dim": 32}, "head_dim"),
    ],
)
def test_what_meta_cannot_compute_is_refused(tmp_path: Path, values: dict[str, Any], word: str) -> None:
    source = huggingface_folder(tmp_path / "hf")
    config = json.loads((source / "config.json").read_text())
    config.pop("rope_parameters", None)
    (source / "config.json").write_text(json.dumps({**config, **values}))
    with pytest.raises(ModelError, match=word):
        convert(source, tmp_path / "out", to="meta", options=options())
    assert not (tmp_path / "out").exists()


def test_heads_that_cannot_be_cut_and_targets_that_are_not_said(tmp_path: Path) -> None:
    source = huggingface_folder(tmp_path / "hf")
    with pytest.raises(UsageError, match="num_key_value_heads 4"):
        convert(source, tmp_path / "out", to="meta", options=options(shards=8))
    with pytest.raises(UsageError, match="f16"):
        convert(source, tmp_path / "out", to="meta", options=options(outtype="q4_0"))
    with pytest.raises(UsageError, match="how many files"):
        meta = convert_files(source, tmp_path / "meta", "meta")
        convert(meta, tmp_path / "out", to="meta", options=options())
    assert not (tmp_path / "out").exists()


def test_a_missing_or_unknown_tensor_is_named(tmp_path: Path) -> None:
    source = huggingface_folder(tmp_path / "hf")
    tensors = {
        name: tensor.clone() for name, tensor in LlamaForCausalLM.from_pretrained(source).state_dict().items()
    }
    (source / "model.safetensors").unlink()
    for change, word in (
        ({"model.norm.weight": None}, "model.norm.weight"),
        ({"extra": torch.ones(1)}, "extra"),
    ):
        made = {name: value for name, value in {**tensors, **change}.items() if value is not None}
        torch.save(made, source / "pytorch_model.bin")
        with pytest.raises(TuolingError, match=word):
            convert(source, tmp_path / "out", to="meta", options=options())


def test_the_old_exporters_table_of_sizes_is_understood(tmp_path: Path) -> None:
    table = {"7B": {**PARAMS, "dim": 4096}, "tiny": PARAMS, "13B": {**PARAMS, "dim": 5120}}
    source = meta_style.save_shards(tmp_path / "meta", meta_style.random_tensors(**SIZES), table, 1)
    assert MetaCheckpoint(source).config["hidden_size"] == 64


def test_one_file_of_a_checkpoint_means_its_folder(tmp_path: Path) -> None:
    source = meta_style.save_shards(tmp_path / "meta", meta_style.random_tensors(**SIZES), PARAMS, 2)
    report = convert(source / "consolidated.00.pth", tmp_path / "out", options=options())
    assert (report.kind, report.to, report.tensors) == ("meta", "hf", 21)
    shutil.rmtree(tmp_path / "out")
