"""A smaller tokenizer against the full one: real tokenizers of four kinds, and sentencepiece's own library."""

from __future__ import annotations

import itertools
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tests.real_tokenizers import NAMES, load
from tests.tiny import TEXT

from tuoling.errors import ModelError, UsageError
from tuoling.text.render import Segment
from tuoling.text.tokenizer import TextTokenizer
from tuoling.weights.prune_bpe import BytePairs
from tuoling.weights.prune_choice import choose
from tuoling.weights.prune_spm import pruned_proto, read_proto
from tuoling.weights.prune_tokenizer import TokenizerState

WORDS = [
    *TEXT,
    "驼铃声声，the camel bells ring in the desert!  print('x')\n\tif a == b:",
    "１２３ABC…“引号”　全角",
]
CHOSEN = WORDS[2:]


def ids_of(tokenizer: TextTokenizer, text: str) -> list[int]:
    return tokenizer.encode_segments([Segment(text, False, row=True)])[0]


def state_of(tokenizer: TextTokenizer) -> TokenizerState:
    return TokenizerState(tokenizer.hf.backend_tokenizer.to_str())


def smaller_of(state: TokenizerState, old_ids: np.ndarray, full: TextTokenizer) -> TextTokenizer:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    names = {name: getattr(full.hf, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    backend = Tokenizer.from_str(state.restricted(old_ids.tolist()))
    named = {name: token for name, token in names.items() if token is not None}
    return TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, **named))


def pruned(tokenizer: TextTokenizer, texts: list[str]) -> tuple[TextTokenizer, np.ndarray]:
    """A tokenizer that keeps what these texts need, and its ids' old numbers."""
    state = state_of(tokenizer)
    counts = np.zeros(max(state.tokens) + 1, dtype=np.int64)
    for text in texts:
        np.add.at(counts, ids_of(tokenizer, text), 1)
    old_ids = choose(state, counts, ()).old_ids
    return smaller_of(state, old_ids, tokenizer), old_ids


_made: dict[str, tuple[TextTokenizer, TextTokenizer, np.ndarray]] = {}


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> tuple[TextTokenizer, TextTokenizer, np.ndarray]:
    """(full, smaller, old ids) of the tokenizer that the test is parametrised with."""
    name = request.param
    if name not in _made:
        full = load(name, request) if name != "unigram" else unigram()
        _made[name] = (full, *pruned(full, CHOSEN))
    return _made[name]


@cache
def unigram() -> TextTokenizer:
    """A sentencepiece unigram model trained on a few sentences, read as models are."""
    import tempfile

    return read_spm(train_spm(Path(tempfile.mkdtemp()), "unigram", vocab_size=400))


def read_spm(path: Path) -> TextTokenizer:
    """A sentencepiece file as models with one are read (transformers' own LLaMA class orders its merges otherwise)."""
    from transformers import PreTrainedTokenizerFast

    from tuoling.models.spm import tokenizer_from_spm

    backend, own = tokenizer_from_spm(path)
    return TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, **own))


def train_spm(folder: Path, kind: str, vocab_size: int, texts: list[str] | None = None) -> Path:
    """Train a small sentencepiece model."""
    import sentencepiece

    lines = texts or [text for text in WORDS for _ in range(3)] + sentences(200)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / kind),
        model_type=kind,
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    return folder / f"{kind}.model"


def sentences(count: int) -> list[str]:
    draw = random.Random(7)
    words = [
        "今天",
        "天气",
        "很好",
        "我们",
        "一起",
        "去",
        "沙漠",
        "听",
        "驼铃",
        "the",
        "camel",
        "walks",
        "slowly",
        "in",
        "deep",
        "sand",
        "和",
        "朋友",
        "说话",
        "three",
        "four",
    ]
    return [" ".join(draw.choices(words, k=8)).replace(" 一起", "一起") for _ in range(count)]


KINDS = (*NAMES, "unigram")


@pytest.mark.slow
@pytest.mark.parametrize("pair", KINDS, indirect=True)
def test_texts_that_chose_come_out_the_same(pair: Any) -> None:
    full, smaller, old_ids = pair
    assert len(smaller) == len(old_ids) < len(full)
    for text in CHOSEN:
        assert [old_ids[index] for index in ids_of(smaller, text)] == ids_of(full, text)
        assert smaller.decode(ids_of(smaller, text)) == full.decode(ids_of(full, text))


@pytest.mark.slow
@pytest.mark.parametrize("pair", KINDS, indirect=True)
def test_every_id_is_the_same_token(pair: Any) -> None:
    full, smaller, old_ids = pair
    for new, old in enumerate(old_ids):
        assert smaller.hf.convert_ids_to_tokens(new) == full.hf.convert_ids_to_tokens(int(old))


@pytest.mark.slow
@pytest.mark.parametrize("pair", KINDS, indirect=True)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_text_of_kept_tokens_comes_out_the_same(pair: Any, data: st.DataObject) -> None:
    full, smaller, old_ids = pair
    kept = st.lists(st.integers(0, len(old_ids) - 1), min_size=1, max_size=30)
    text = smaller.decode(data.draw(kept))
    before = ids_of(full, text)
    if set(before) <= set(old_ids.tolist()):
        assert [old_ids[index] for index in ids_of(smaller, text)] == before
    elif "\ufffd" not in text:  # pieces put side by side may make a dropped one
        assert smaller.decode(ids_of(smaller, text)) == full.decode(before)


@pytest.mark.slow
@pytest.mark.parametrize("pair", KINDS, indirect=True)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(min_size=1, max_size=40))
def test_any_text_can_still_be_written(pair: Any, text: str) -> None:
    full, smaller, _ = pair
    assume("\ufffd" not in text)
    assert smaller.decode(ids_of(smaller, text)) == full.decode(ids_of(full, text))


@pytest.mark.slow
@pytest.mark.parametrize("pair", KINDS, indirect=True)
def test_closed_over_what_makes_each_token(pair: Any) -> None:
    """Every kept token comes out of its own characters with the kept merges alone (an independent BPE)."""
    full, _, old_ids = pair
    state = json.loads(state_of(full).restricted(old_ids.tolist()))
    if state["model"]["type"] != "BPE":
        return
    vocab = state["model"]["vocab"]
    added = {entry["content"] for entry in state["added_tokens"]}
    assert sorted(vocab.values()) == [
        index for index in range(len(vocab) + len(added)) if index in vocab.values()
    ]
    rank = {tuple(pair): number for number, pair in enumerate(state["model"]["merges"])}
    for left, right in rank:
        assert {left, right, left + right} <= vocab.keys()
    for token in vocab:
        if token in added or (len(token) == 6 and token.startswith("<0x")):
            continue
        parts = list(token)
        while len(parts) > 1:
            numbered = [(rank.get((a, b), 10**9), at) for at, (a, b) in enumerate(itertools.pairwise(parts))]
            best, at = min(numbered)
            assert best < 10**9, f"{token!r} stays {parts}"
            parts[at : at + 2] = [parts[at] + parts[at + 1]]


def test_a_token_is_made_by_the_best_merges_not_by_the_shortest() -> None:
    """abc may be a+bc or ab+c; a+b comes first, so ab is needed and bc is not."""
    vocab = {token: index for index, token in enumerate(["a", "b", "c", "ab", "bc", "abc", "cc"])}
    pairs = BytePairs(vocab, [("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c")])
    assert pairs.needs("abc") == ["a", "ab", "abc", "b", "c"]
    assert pairs.needs("cc") is None
    assert pairs.among({"a", "b", "c", "ab", "abc"}) == [("a", "b"), ("ab", "c")]
    assert BytePairs(vocab, ["a b"]).merges == [("a", "b")]


@pytest.mark.slow
def test_special_tokens_and_the_frame_are_renumbered(request: pytest.FixtureRequest) -> None:
    full = load("openllama", request)
    smaller, old_ids = pruned(full, ["你好"])
    assert smaller.hf("你好")["input_ids"][0] == smaller.bos_id, "the post-processor's own id"
    assert [old_ids[index] for index in smaller.hf("你好")["input_ids"]] == full.hf("你好")["input_ids"]
    assert smaller.hf.convert_tokens_to_ids("[PAD]") == len(old_ids) - 1
    everything = {
        entry["content"] for entry in json.loads(full.hf.backend_tokenizer.to_str())["added_tokens"]
    }
    assert everything <= set(smaller.hf.get_vocab())


def test_size_is_kept_and_counts_decide() -> None:
    full = load_tiny()
    state = state_of(full)
    counts = np.zeros(len(full), dtype=np.int64)
    base = len(choose(state, counts, ()).old_ids)
    wanted = ids_of(full, "The weather is nice")
    counts[wanted] = np.arange(len(wanted), 0, -1)
    chosen = choose(state, counts, (), size=base + 1)
    assert len(chosen.old_ids) == base + 1 or base + 1 < len(full)
    assert len(choose(state, counts, (), size=300).old_ids) == 300, "filled up with the vocabulary's own"
    assert len(choose(state, counts, ()).old_ids) < 300
    fewer = choose(state, counts, (), min_count=len(wanted))
    assert len(fewer.old_ids) <= base + 3
    assert fewer.dropped > 0
    with pytest.raises(UsageError, match=str(base)):
        choose(state, counts, (), size=base - 1)


def load_tiny() -> TextTokenizer:
    from tests.real_tokenizers import _tiny

    return _tiny()


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_sentencepiece_file_agrees_with_its_own_library(kind: str, tmp_path: Path) -> None:
    """tokenizer.model after pruning, read by sentencepiece itself: same pieces for texts of kept pieces."""
    import sentencepiece

    path = train_spm(tmp_path, kind, vocab_size=410)
    full = read_spm(path)
    smaller, old_ids = pruned(full, sentences(12))
    assert len(old_ids) < len(full)
    content = pruned_proto(path, old_ids.tolist(), state_of(full).tokens)
    assert content is not None
    theirs = sentencepiece.SentencePieceProcessor(model_proto=content)
    whole = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert theirs.get_piece_size() == len(old_ids)
    for text in sentences(200):
        wanted = whole.encode(text)
        if set(wanted) <= set(old_ids.tolist()):
            assert [int(old_ids[index]) for index in theirs.encode(text)] == wanted
            assert [int(old_ids[index]) for index in ids_of(smaller, text)] == wanted
    assert theirs.unk_id() == old_ids.tolist().index(whole.unk_id())
    assert theirs.bos_id() == old_ids.tolist().index(whole.bos_id())
    assert read_proto(path).trainer_spec.pad_id == -1 == theirs.pad_id()


@pytest.mark.slow
def test_the_real_sentencepiece_model_agrees_with_its_own_library(shared_data: Path) -> None:
    import sentencepiece

    path = shared_data / "tokenizers" / "mistral-v1" / "tokenizer.model"
    full = read_spm(path)
    _, old_ids = pruned(full, WORDS)
    theirs = sentencepiece.SentencePieceProcessor(
        model_proto=pruned_proto(path, old_ids.tolist(), state_of(full).tokens)
    )
    whole = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in WORDS:
        assert [int(old_ids[index]) for index in theirs.encode(text)] == whole.encode(text)


@pytest.mark.slow
def test_a_file_of_other_pieces_is_not_cut(shared_data: Path, request: pytest.FixtureRequest) -> None:
    path = shared_data / "tokenizers" / "mistral-v1" / "tokenizer.model"
    other = state_of(load("openllama", request))
    assert pruned_proto(path, sorted(other.tokens)[:1000], other.tokens) is None


def test_other_kinds_are_refused() -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    with pytest.raises(ModelError, match="WordLevel"):
        TokenizerState(Tokenizer(WordLevel({"a": 0}, unk_token="a")).to_str())


def test_an_unknown_character_costs_what_it_did() -> None:
    """Unigram scores unknown characters ten below its lowest piece: that piece stays, or "xp" + unknown would win."""
    from tokenizers import Tokenizer
    from tokenizers.models import Unigram

    pieces = [
        ("<unk>", 0.0),
        ("x", -39.0),
        ("p", -30.0),
        ("pc", -15.0),
        ("xp", -1.0),
        ("z", -60.0),
        ("y", -59.0),
    ]
    full = Tokenizer(Unigram(pieces, 0, False))
    state = TokenizerState(full.to_str())
    counts = np.zeros(len(pieces), dtype=np.int64)
    for text in ("xpc", "xp"):
        counts[full.encode(text).ids] += 1
    old_ids = choose(state, counts, ()).old_ids
    smaller = Tokenizer.from_str(state.restricted(old_ids.tolist()))
    assert full.encode("xpc").tokens == smaller.encode("xpc").tokens == ["x", "pc"]
    assert state.tokens[5] == "z"
    assert old_ids.tolist() == [0, 1, 2, 3, 4, 5], "y is not needed"
