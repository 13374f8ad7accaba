"""A really trained model through every conversion: at each stop its 200 greedy tokens are the published ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.stories260k import build_stories260k
from tests.weights import meta_style

from tuoling.api import load
from tuoling.models.tokenizers import load_tokenizer
from tuoling.text.conversation import Conversation, Turn
from tuoling.weights.convert import ConvertOptions, convert

OPTIONS = ConvertOptions(verify=False)


def greedy_by_tuoling(folder: Path) -> str:
    model = load(folder, dtype="fp32", device="cpu")
    settings = model.settings(max_new_tokens=200, do_sample=False)
    return model.engine.generate([Conversation((Turn("text", ""),))], settings)[0].text


def greedy_by_metas_rule(folder: Path, expected: str) -> str:
    """One pass over the expected text: where every best next word is the expected one, greedy text is that text."""
    tensors = meta_style.load_shards(folder)
    params = json.loads((folder / "params.json").read_text())
    tokenizer = load_tokenizer(folder)
    ids = [1, *tokenizer.hf.encode(expected, add_special_tokens=False)]
    assert len(ids) == 201
    return tokenizer.decode(meta_style.logits(tensors, params, ids[:-1]).argmax(-1).tolist())


@pytest.mark.slow
def test_every_stop_says_the_same(shared_data: Path, tmp_path: Path) -> None:
    expected = (shared_data / "weights/stories260K/expected_greedy_200.txt").read_text(encoding="utf-8")
    folder = build_stories260k(shared_data, tmp_path / "hf")
    for shards in (1, 2):
        meta = tmp_path / f"meta{shards}"
        convert(folder, meta, to="meta", options=ConvertOptions(verify=False, shards=shards))
        assert greedy_by_metas_rule(meta, expected) == expected
        back = tmp_path / f"back{shards}"
        convert(meta, back, options=OPTIONS)
        name = "model.safetensors"
        assert (back / name).read_bytes() == (folder / name).read_bytes()
    assert greedy_by_tuoling(tmp_path / "back2") == expected


@pytest.mark.slow
def test_without_the_record_of_where_it_came_from(shared_data: Path, tmp_path: Path) -> None:
    """params.json alone gives the same model: the tied head is found, the context is what its era had."""
    folder = build_stories260k(shared_data, tmp_path / "hf")
    convert(folder, tmp_path / "meta", to="meta", options=OPTIONS)
    (tmp_path / "meta/huggingface_config.json").unlink()
    convert(tmp_path / "meta", tmp_path / "back", options=OPTIONS)
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config["tie_word_embeddings"] and config["intermediate_size"] == 172
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (8, 4)
    first = load(folder, dtype="fp32", device="cpu").engine.model
    second = load(tmp_path / "back", dtype="fp32", device="cpu").engine.model
    ids = torch.tensor([[1, 403, 407, 261]])
    assert torch.equal(first(ids).logits, second(ids).logits)
