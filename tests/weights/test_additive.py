"""Additive diffs against Stanford's procedure, written down again with transformers' own classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import tiny_model

from tuoling.errors import ModelError, OutputError, TuolingError, UsageError
from tuoling.weights import additive_check
from tuoling.weights.additive import RECORD, apply_additive_diff, make_additive_diff
from tuoling.weights.checksums import read_checksums, write_checksums
from tuoling.weights.diff import apply_diff, make_diff
from tuoling.weights.diff_options import DiffOptions


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file() and "tuoling-cache" not in p.parts
    }


def resized(folder: Path, rows: int) -> Any:
    """A model in float32 whose new rows are the mean of the old ones, as Stanford's script makes them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    old = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(rows, mean_resizing=False)
    if rows > old:
        for part in (model.get_input_embeddings(), model.get_output_embeddings()):
            part.weight.data[old:] = part.weight.data[:old].mean(dim=0, keepdim=True)
    return model


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A tiny LLaMA and one trained from it with one row more, both bf16."""
    from transformers import AutoModelForCausalLM

    base = tiny_model(tmp_path / "base", "llama")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    rows = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight.shape[0]
    model = resized(base, rows + 1)
    torch.manual_seed(3)
    for weight in model.parameters():
        weight.data += torch.randn(weight.shape) * 1e-2
    model.to(torch.bfloat16).save_pretrained(tmp_path / "tuned")
    return base, tmp_path / "tuned"


@pytest.fixture
def stanford(tmp_path: Path, pair: tuple[Path, Path]) -> tuple[Path, dict[str, torch.Tensor], float]:
    """The diff folder that their script makes, the weights that it recovers, and their sum."""
    from transformers import AutoModelForCausalLM

    base, tuned = pair
    made = AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32)
    raw = resized(base, made.get_input_embeddings().weight.shape[0]).state_dict()
    state = made.state_dict()
    for name in state:
        state[name].add_(-raw[name])
    made.save_pretrained(tmp_path / "stanford")
    recovered = {name: tensor + raw[name] for name, tensor in made.state_dict().items()}
    return tmp_path / "stanford", recovered, float(sum(tensor.sum() for tensor in recovered.values()))


@pytest.mark.slow
def test_their_diff_is_applied(
    tmp_path: Path, pair: tuple[Path, Path], stanford: tuple[Path, dict[str, torch.Tensor], float]
) -> None:
    diff, recovered, total = stanford
    report = apply_diff(pair[0], diff, tmp_path / "out", DiffOptions(expected_sum=total))
    assert report.kind == "additive" and report.proof == "the sum of all weights"
    made = tensors(tmp_path / "out")
    assert made.keys() == recovered.keys()
    assert all(torch.equal(made[name], recovered[name]) for name in made)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.slow
def test_our_diff_is_theirs_and_gives_the_model_back(
    tmp_path: Path, pair: tuple[Path, Path], stanford: tuple[Path, dict[str, torch.Tensor], float]
) -> None:
    base, tuned = pair
    report = make_diff(base, tuned, tmp_path / "diff", DiffOptions(), "additive")
    ours, theirs = tensors(tmp_path / "diff"), tensors(stanford[0])
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-9)
    assert f"{stanford[2]:.2f}"[:-1] in report.notes[0]
    done = apply_diff(base, tmp_path / "diff", tmp_path / "out", DiffOptions())
    assert done.proof == "SHA-256 of every tensor"
    made, wanted = tensors(tmp_path / "out"), tensors(tuned)
    assert made.keys() == wanted.keys()
    assert all(torch.equal(made[name], wanted[name]) for name in made), "bf16 comes back exactly"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.slow
def test_what_it_loses_is_told(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, _ = pair
    tuned = {name: tensor.float() * 1e-6 for name, tensor in tensors(base).items()}
    folder = tmp_path / "small"
    folder.mkdir()
    save_file(tuned, folder / "model.safetensors")
    (folder / "config.json").write_text((base / "config.json").read_text())
    report = make_additive_diff(base, folder, tmp_path / "diff", DiffOptions())
    assert "come back rounded" in report.notes[1] and "--format tuoling" in report.notes[1]
    apply_additive_diff(base, tmp_path / "diff", tmp_path / "out", DiffOptions())


def test_the_sum_counts_the_buffers_of_2023(tmp_path: Path) -> None:
    """inv_freq lay in the diffs (as zeros) and is in the published sum; a base of today has it no more."""
    for folder in ("base", "diff"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}")
    inner = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({"w": torch.ones(3, 4)}, tmp_path / "base" / "model.safetensors")
    save_file({"w": torch.full((3, 4), 0.25), inner: torch.zeros(4)}, tmp_path / "diff" / "model.safetensors")
    total = 12 * 1.25 + 1 + 0.1 + 0.01 + 0.001  # 10000^(-2i/8)
    report = apply_additive_diff(
        tmp_path / "base", tmp_path / "diff", tmp_path / "out", DiffOptions(expected_sum=total)
    )
    assert f"{total:.4f}" in report.notes[0]
    assert tensors(tmp_path / "out").keys() == {"w"}


def refused(tmp_path: Path, error: type[TuolingError], said: str, *call: Path, **options: object) -> None:
    before = contents(tmp_path)
    folders = {path for path in tmp_path.rglob("*") if path.is_dir()}
    with pytest.raises(error, match=said):
        apply_diff(*call, DiffOptions(**options))  # type: ignore[arg-type]
    assert contents(tmp_path) == before
    assert {path for path in tmp_path.rglob("*") if path.is_dir()} == folders


@pytest.mark.slow
def test_what_is_refused(
    tmp_path: Path, pair: tuple[Path, Path], stanford: tuple[Path, dict[str, torch.Tensor], float]
) -> None:
    base, tuned = pair
    diff, _, total = stanford
    out = tmp_path / "a" / "out"
    refused(tmp_path, ModelError, "add up to", base, diff, out, expected_sum=total + 0.02)
    refused(tmp_path, ModelError, "looks like a whole model", base, tuned, out)
    refused(
        tmp_path, ModelError, "has no tensor|in the diff and", tiny_model(tmp_path / "b", "bloom"), diff, out
    )
    refused(
        tmp_path, ModelError, "in the diff and", tiny_model(tmp_path / "wide", "llama", hidden=16), diff, out
    )
    refused(tmp_path, UsageError, "is not a folder", base / "model.safetensors", diff, out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    refused(tmp_path, OutputError, "already exists", base, diff, tmp_path / "full")
    report = apply_diff(base, diff, out, DiffOptions())
    assert report.proof == "" and "nothing says what the result should be" in report.notes[1]


@pytest.mark.slow
def test_our_record_finds_a_wrong_base_and_a_changed_diff(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, tuned = pair
    make_additive_diff(base, tuned, tmp_path / "diff", DiffOptions())
    other = tiny_model(tmp_path / "other", "llama", seed=5)
    refused(tmp_path, ModelError, "not the base of the diff", other, tmp_path / "diff", tmp_path / "out")
    changed = tensors(tmp_path / "diff")
    changed["model.norm.weight"][0] += 1
    save_file(changed, tmp_path / "diff" / "model.safetensors")
    refused(
        tmp_path, ModelError, "model.norm.weight has another hash", base, tmp_path / "diff", tmp_path / "out"
    )
    changed["model.norm.weight"][0] = float("nan")
    save_file(changed, tmp_path / "diff" / "model.safetensors")
    refused(tmp_path, ModelError, "NaN or infinity", base, tmp_path / "diff", tmp_path / "out")
    (tmp_path / "diff" / RECORD).write_text("{}")
    refused(tmp_path, ModelError, "cannot be read", base, tmp_path / "diff", tmp_path / "out")


@pytest.mark.slow
def test_numbers_that_cannot_be_subtracted(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, _ = pair
    for number, value in enumerate((torch.tensor([float("inf")]), torch.tensor([3]))):
        folder = tmp_path / f"bad{number}"
        folder.mkdir()
        save_file({"model.norm.weight": value.expand(32).contiguous()}, folder / "model.safetensors")
        with pytest.raises(ModelError, match=r"NaN or infinity|not of floating-point"):
            make_additive_diff(base, folder, tmp_path / "diff", DiffOptions())
        assert not (tmp_path / "diff").exists()


@pytest.mark.slow
def test_lists(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    base, tuned = pair
    listed = tmp_path / "md5.txt"
    make_additive_diff(base, tuned, tmp_path / "diff", DiffOptions(checksums_out=listed))
    lists = read_checksums(listed)
    assert "model.safetensors" in lists.digests and RECORD in lists.digests
    apply_additive_diff(base, tmp_path / "diff", tmp_path / "out", DiffOptions(lists=lists))
    write_checksums(listed, {"model.safetensors": "0" * 32})
    bad = read_checksums(listed)
    refused(
        tmp_path, ModelError, "the diff has the checksum", base, tmp_path / "diff", tmp_path / "o", lists=bad
    )


def test_both_sums_are_accepted() -> None:
    """Adding 1 in float32 to 2^24 changes nothing; the exact sum is right all the same."""
    recovered = additive_check.Recovered()
    recovered.add(torch.tensor([2.0**24]))
    for _ in range(3):
        recovered.add(torch.tensor([1.0]))
    assert recovered.adds_up_to(2.0**24 + 3) and recovered.adds_up_to(2.0**24)
    assert not recovered.adds_up_to(2.0**24 + 1)


def test_all_parts_of_a_tensor_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large tensors are summed and compared in parts: neither sum nor difference may stop at the first."""
    monkeypatch.setattr(additive_check, "PART", 4)
    recovered, made = additive_check.Recovered(), torch.arange(11, dtype=torch.float32)
    recovered.add(made)
    assert recovered.total == 55
    recovered.compare("w", made, made + 0.5 * (torch.arange(11) == 10))
    assert "0.5" in recovered.loss_notes()[0]
