"""A pruned model against the full one: logits, files, what is refused, and the way back."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import TEXT, sum_rows, tiny_model, write_rows

from tuoling.errors import ModelError, OutputError, UsageError
from tuoling.models.load import find_model, load_model, load_tokenizer
from tuoling.text.render import Segment
from tuoling.weights import prune_score
from tuoling.weights.parity import Weights
from tuoling.weights.prune import prune_vocab
from tuoling.weights.prune_report import PruneOptions, PruneReport
from tuoling.weights.prune_restore import restore_vocab
from tuoling.weights.vocabulary_map import MAP_FILE, VocabularyMap, renumber_config

FAMILIES = ("bloom", "llama", "qwen2")


def quiet(_: str) -> None:
    """What is said to the user is not looked at here."""


def prune(folder: Path, model: Path, *, verify: bool = False, **options: Any) -> PruneReport:
    rows = write_rows(folder / "rows.jsonl", sum_rows(30))
    chosen = PruneOptions([str(rows)], base="ascii", verify=verify, **options)
    return prune_vocab(model, folder / "small", chosen, say=quiet)


def logits(folder: Path, ids: list[int]) -> torch.Tensor:
    model = load_model(find_model(folder), dtype="fp32", device="cpu")
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_on_kept_words_are_the_full_models(family: str, tmp_path: Path) -> None:
    full = tiny_model(tmp_path / "full", family)
    report = prune(tmp_path, full)
    found = VocabularyMap.read(tmp_path / "small")
    assert report.rows_after == len(found) < report.rows_before == 320
    text = "3 加 4 等于多少？"
    old = load_tokenizer(full, for_training=False).hf(text)["input_ids"]
    new = load_tokenizer(tmp_path / "small", for_training=False).hf(text)["input_ids"]
    assert found.old_ids[new].tolist() == old
    small_TV, full_TV = logits(tmp_path / "small", new), logits(full, old)
    # the same dot products; a matrix product of another width may sum them in another order
    torch.testing.assert_close(small_TV, full_TV[:, torch.from_numpy(found.old_ids)], rtol=0, atol=2e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("gate_here")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gate_finds_no_difference_at_all(family: str, tmp_path: Path) -> None:
    full = tiny_model(tmp_path / "full", family)
    report = prune(tmp_path, full, verify=True)
    assert report.parity.passed
    assert report.parity.max_logit_difference == 0.0
    assert report.parity.columns == report.rows_after
    assert report.parity.perplexity_after < report.parity.perplexity_before, (
        "fewer words share the probability"
    )
    assert report.before is not None
    assert report.after is not None
    assert report.after.tokens == report.before.tokens
    assert report.after.nats < report.before.nats
    assert (tmp_path / "small" / "parity.json").is_file()


@pytest.mark.parametrize(
    "place", [pytest.param("gate_here", id="here"), pytest.param(None, id="apart", marks=pytest.mark.long)]
)
def test_scores_are_the_models_own(place: str | None, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Here, and in a process of their own as every command computes them."""
    if place:
        request.getfixturevalue(place)
    full = tiny_model(tmp_path / "full", "llama")
    tokenizer = load_tokenizer(full, for_training=False)
    texts = [[Segment("", False, "start"), Segment(text, False)] for text in TEXT]
    found = prune_score.score(Weights(full), tokenizer, texts, kept=np.arange(200))
    rows = [ids for ids, _ in tokenizer.encode_batch(texts)]
    nats, outside, best, places = 0.0, 0.0, 0, 0
    for ids in rows:
        share_TV = logits(full, ids)[:-1].softmax(-1)
        nats -= float(share_TV.gather(1, torch.tensor(ids[1:])[:, None]).log().double().sum())
        outside += float(share_TV[:, 200:].double().sum())
        best += int((share_TV.argmax(-1) >= 200).sum())
        places += len(share_TV)
    assert (found.tokens, found.characters) == (places, sum(map(len, TEXT)))
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert found.outside == pytest.approx(outside / places, rel=1e-5)
    assert found.outside_best == best / places


@pytest.mark.slow
def test_tensors_are_the_full_ones_or_their_kept_rows(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    full = tiny_model(tmp_path / "full", "llama")
    prune(tmp_path, full)
    rows = torch.from_numpy(VocabularyMap.read(tmp_path / "small").old_ids)
    before = load_file(full / "model.safetensors")
    after = load_file(tmp_path / "small" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        by_word = name in ("model.embed_tokens.weight", "lm_head.weight")
        assert torch.equal(after[name], tensor[rows] if by_word else tensor), name


@pytest.mark.slow
def test_config_and_generation_follow(tmp_path: Path) -> None:
    full = tiny_model(tmp_path / "full", "qwen2")
    settings = {"eos_token_id": [2, 1], "pad_token_id": 3, "suppress_tokens": [2, 300], "temperature": 0.5}
    (full / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    prune(tmp_path, full)
    new_of = VocabularyMap.read(tmp_path / "small").new_of()
    config = json.loads((tmp_path / "small" / "config.json").read_text(encoding="utf-8"))
    assert config["vocab_size"] == len(new_of)
    assert config["eos_token_id"] == new_of[2]
    generation = json.loads((tmp_path / "small" / "generation_config.json").read_text(encoding="utf-8"))
    assert generation["eos_token_id"] == [new_of[2], new_of[1]]
    assert generation["suppress_tokens"] == [new_of[i] for i in (2, 300) if i in new_of]
    assert generation["temperature"] == 0.5


def test_ids_inside_a_config() -> None:
    config = {
        "vocab_size": 9,
        "bos_token_id": -1,
        "eos_token_id": [4, 5],
        "pad_token_id": None,
        "bad_words_ids": [[4], [5, 6]],
        "text_config": {"vocab_size": 9, "eos_token_id": 4},
        "hidden_size": 4,
    }
    assert renumber_config(config, {4: 1, 5: 2}, 3) == {
        "vocab_size": 3,
        "bos_token_id": -1,
        "eos_token_id": [1, 2],
        "pad_token_id": None,
        "bad_words_ids": [[1]],
        "text_config": {"vocab_size": 3, "eos_token_id": 1},
        "hidden_size": 4,
    }


@pytest.mark.slow
def test_held_out_text_is_told_honestly(tmp_path: Path) -> None:
    full = tiny_model(tmp_path / "full", "bloom")
    other = tmp_path / "other.txt"
    other.write_text("\n".join(TEXT), encoding="utf-8")
    report = prune(tmp_path, full, held_out=[str(other)])
    assert not report.estimated
    assert report.corpus.rows == report.corpus.rows_same == report.corpus.texts_same == 30
    assert report.held_out.rows > report.held_out.rows_same
    assert report.held_out.texts_same == report.held_out.rows, "bytes can write anything"
    assert report.held_out.tokens_after > report.held_out.tokens
    small = load_tokenizer(tmp_path / "small", for_training=False)
    assert all(small.decode(small.hf(text)["input_ids"]) == text for text in TEXT)


@pytest.mark.slow
def test_rare_words_can_be_left_out_and_rows_then_differ(tmp_path: Path) -> None:
    full = tiny_model(tmp_path / "full", "bloom")
    report = prune(tmp_path, full, min_count=50)
    assert report.choice["dropped"] > 0
    assert report.corpus.rows_same < report.corpus.rows == report.corpus.texts_same


@pytest.mark.slow
def test_bloom_rows_beyond_the_tokenizer_go(tmp_path: Path) -> None:
    """BLOOM has 250,880 rows for 250,680 tokens, and its published files lack the base model's prefix."""
    from safetensors.torch import load_file, save_file

    full = tiny_model(tmp_path / "full", "bloom")
    tensors = load_file(full / "model.safetensors")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    padding = torch.zeros(64, 32)
    tensors["word_embeddings.weight"] = torch.cat([tensors["word_embeddings.weight"], padding])
    save_file(tensors, full / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((full / "config.json").read_text(encoding="utf-8"))
    (full / "config.json").write_text(json.dumps({**config, "vocab_size": 384}), encoding="utf-8")
    report = prune(tmp_path, full)
    assert report.rows_before == 384
    small = load_file(tmp_path / "small" / "model.safetensors")
    assert small.keys() == tensors.keys()
    assert len(small["word_embeddings.weight"]) == report.rows_after < 320
    load_model(find_model(tmp_path / "small"), dtype="fp32", device="cpu")


def test_what_cannot_be_pruned_is_refused_and_nothing_stays(tmp_path: Path) -> None:
    full = tiny_model(tmp_path / "full", "bloom")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UsageError, match="no rows"):
        prune_vocab(full, tmp_path / "small", PruneOptions([]), say=quiet)
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="already exists"):
        prune_vocab(full, tmp_path / "there", PruneOptions(["x"]), say=quiet)
    (tmp_path / "there").rmdir()
    with pytest.raises(UsageError, match="base alone"):
        prune(tmp_path, full, size=10)
    (tmp_path / "rows.jsonl").unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.slow
def test_weights_that_hold_nan_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    full = tiny_model(tmp_path / "full", "bloom")
    tensors = load_file(full / "model.safetensors")
    tensors["transformer.ln_f.bias"][3] = float("nan")
    save_file(tensors, full / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="NaN"):
        prune(tmp_path, full)
    assert not (tmp_path / "small").exists()
    prune(tmp_path, full, allow_nan=True)


def test_a_damaged_map_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=MAP_FILE):
        VocabularyMap.read(tmp_path)
    record = {"format": "tuoling-vocabulary-map", "rows": 2, "full_rows": 4, "full": {}, "old_ids": [3, 1]}
    (tmp_path / MAP_FILE).write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ModelError, match="damaged"):
        VocabularyMap.read(tmp_path)


def adapter_on(folder: Path, out: Path, *, words: bool) -> Path:
    """A LoRA adapter of small random numbers on a model; words: on the embedding and a whole head copy too."""
    from peft import LoraConfig, get_peft_model

    model = load_model(find_model(folder), dtype="fp32", device="cpu")
    targets = ["q_proj", "embed_tokens"] if words else ["q_proj"]
    config = LoraConfig(
        r=2, target_modules=targets, modules_to_save=["lm_head"] if words else None, task_type="CAUSAL_LM"
    )
    torch.manual_seed(1)
    wrapped = get_peft_model(model, config)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    wrapped.save_pretrained(str(out), save_embedding_layers=False)
    config_file = out / "adapter_config.json"
    values = json.loads(config_file.read_text(encoding="utf-8"))
    values["base_model_name_or_path"] = str(folder)
    config_file.write_text(json.dumps(values), encoding="utf-8")
    return out


@pytest.mark.slow
@pytest.mark.usefixtures("gate_here")
@pytest.mark.parametrize("words", [False, True])
def test_an_adapter_goes_back_on_the_full_model(words: bool, tmp_path: Path) -> None:
    full = tiny_model(tmp_path / "full", "llama")
    prune(tmp_path, full)
    adapter = adapter_on(tmp_path / "small", tmp_path / "adapter", words=words)
    report = restore_vocab(adapter, full, tmp_path / "back", say=quiet)
    old_ids = VocabularyMap.read(tmp_path / "small").old_ids
    rows = torch.from_numpy(old_ids)
    new = list(range(5, 40))
    small_TV = logits(adapter, new)
    full_TV = logits(tmp_path / "back", old_ids[new].tolist())
    torch.testing.assert_close(full_TV[:, rows], small_TV, rtol=0, atol=2e-6)
    assert report.kind == "adapter"
    assert report.before is not None
    assert report.after is not None
    ids = load_tokenizer(full, for_training=False).hf("The capital of France")["input_ids"]
    mass_T = torch.softmax(logits(tmp_path / "back", ids), -1)
    mass_T[:, rows] = 0.0
    assert 0 < float(mass_T.sum(-1).mean()) < 1
    assert 0 < report.after.outside < 1
    assert report.after.outside != report.before.outside


@pytest.mark.slow
@pytest.mark.usefixtures("gate_here")
@pytest.mark.parametrize("family", ["bloom", "llama"])
def test_a_trained_model_goes_back_on_the_full_one(family: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    full = tiny_model(tmp_path / "full", family)
    prune(tmp_path, full)
    small = tmp_path / "small"
    trained = {name: tensor + 0.01 for name, tensor in load_file(small / "model.safetensors").items()}
    save_file(trained, small / "model.safetensors", metadata={"format": "pt"})
    restore_vocab(small, full, tmp_path / "back", say=quiet)
    old_ids = VocabularyMap.read(small).old_ids
    rows = torch.from_numpy(old_ids)
    back, before = load_file(tmp_path / "back" / "model.safetensors"), load_file(full / "model.safetensors")
    assert back.keys() == before.keys()
    dropped = torch.ones(320, dtype=torch.bool)
    dropped[rows] = False
    for name, tensor in back.items():
        if len(tensor) == 320:
            assert torch.equal(tensor[rows], trained[name])
            assert torch.equal(tensor[dropped], before[name][dropped])
        else:
            assert torch.equal(tensor, trained[name])
    config = [
        json.loads((place / "config.json").read_text(encoding="utf-8")) for place in (full, tmp_path / "back")
    ]
    assert config[0] == config[1]
    same = hashlib.sha256((full / "tokenizer.json").read_bytes()).digest()
    assert hashlib.sha256((tmp_path / "back" / "tokenizer.json").read_bytes()).digest() == same


@pytest.mark.slow
def test_another_model_is_not_taken_for_the_full_one(tmp_path: Path) -> None:
    full = tiny_model(tmp_path / "full", "llama")
    other = tiny_model(tmp_path / "other", "llama", seed=1)
    prune(tmp_path, full)
    with pytest.raises(ModelError, match="not the model that was pruned"):
        restore_vocab(tmp_path / "small", other, tmp_path / "back", say=quiet)
    assert not (tmp_path / "back").exists()
