"""Rows stay text, spaces are not invented, and a stream says what the whole says."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.real_tokenizers import NAMES, load

from tuoling.errors import ModelError
from tuoling.text.conversation import Conversation, Turn
from tuoling.text.render import Segment
from tuoling.text.templates import TEMPLATES, get_template
from tuoling.text.tokenizer import StreamDecoder, TextTokenizer

REAL = pytest.mark.parametrize("name", NAMES)
_RELAXED = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.slow
@REAL
def test_special_tokens_typed_into_a_row_stay_text(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = load(name, request)
    specials = list(tokenizer._special_ids)
    attack = Conversation((Turn("user", "".join(specials)), Turn("assistant", " ".join(specials))))
    plain = Conversation((Turn("user", "x"), Turn("assistant", "y")))
    ids_of = set(tokenizer._special_ids.values())
    for template in (TEMPLATES["domain_bloom"], TEMPLATES["chatml"], TEMPLATES["lf/llama2"]):
        attacked, harmless = (
            sum(token in ids_of for token in tokenizer.encode_segments(template.render(c))[0])
            for c in (attack, plain)
        )
        assert attacked == harmless, template.id


def test_template_marks_become_their_ids(request: pytest.FixtureRequest) -> None:
    tokenizer = load("minimind", request)
    ids, spans = tokenizer.encode_segments(
        TEMPLATES["chatml"].render(Conversation((Turn("user", "你好"), Turn("assistant", "好"))))
    )
    assert [ids.count(token) for token in (1, 2)] == [2, 2]  # <|im_start|>, <|im_end|>
    assert len(spans) == 1 and ids[spans[0][1] - 1] == 2


def test_chat_template_ids_are_what_the_library_makes(request: pytest.FixtureRequest) -> None:
    tokenizer = load("minimind", request)
    conversation = Conversation(
        (
            Turn("system", "你是助手"),
            Turn("user", "你好"),
            Turn("assistant", "好"),
            Turn("user", "再见"),
            Turn("assistant", "走好"),
        )
    )
    template = get_template("tokenizer", tokenizer)
    messages = [{"role": turn.role, "content": turn.text} for turn in conversation.turns]
    theirs = tokenizer.hf.apply_chat_template(messages, tokenize=True, return_dict=False)
    ours, _ = tokenizer.encode_segments(template.render(conversation))
    assert ours == theirs[: len(ours)]
    assert tokenizer.decode(theirs[len(ours) :]).strip() == ""  # the line end behind the last end token
    asked = tokenizer.hf.apply_chat_template(
        messages[:-1], tokenize=True, return_dict=False, add_generation_prompt=True
    )
    assert tokenizer.encode_segments(template.prompt(conversation.question))[0] == asked


@pytest.mark.slow
@pytest.mark.parametrize("name", ["openllama", "mistral"])
def test_no_space_is_invented(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = load(name, request)
    assert tokenizer.marks_words
    words = tokenizer.hf.convert_ids_to_tokens
    ids, spans = tokenizer.encode_segments([Segment("问:", False), Segment("abc", True, reply=True)])
    answer = words(ids[spans[0][0] : spans[0][1]])
    assert "".join(answer) == "abc"  # not "▁abc"
    assert words(ids)[0].startswith("▁")  # the text's own beginning, as the model knows it
    assert tokenizer.decode(ids) == "问:abc"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mark"), [("openllama", "▁"), ("mistral", "")])
def test_text_after_a_special_token_follows_the_tokenizer(
    name: str, mark: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = load(name, request)
    theirs = tokenizer.hf("a</s>b", add_special_tokens=False)["input_ids"]
    ours, _ = tokenizer.encode_segments([Segment("a</s>b", False)])
    assert ours == theirs
    assert tokenizer.hf.convert_ids_to_tokens(ours)[-1] == mark + "b"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["openllama", "mistral"])
def test_begin_token_starts_a_text(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = load(name, request)
    ids, _ = tokenizer.encode_segments([Segment("", False, "bos"), Segment("Human: hi", False)])
    assert ids == [tokenizer.bos_id, *tokenizer.hf("Human: hi", add_special_tokens=False)["input_ids"]]


def test_start_follows_the_tokenizers_habit(request: pytest.FixtureRequest) -> None:
    start = [Segment("", False, "start"), Segment("a", False)]
    assert load("openllama", request).encode_segments(start)[0][0] == 1
    assert load("tiny", request).encode_segments(start)[0][0] != 1  # has <s>, does not use it by itself


@pytest.mark.slow
@REAL
@_RELAXED
@given(text=st.text(max_size=40))
def test_stream_says_what_the_whole_says(name: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer = load(name, request)
    ids, _ = tokenizer.encode_segments([Segment("", False, "bos"), Segment(text, False, row=True)])
    stream = StreamDecoder(tokenizer)
    pieces = [stream.push(token) for token in ids]
    pieces.append(stream.flush())
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)
        if name in ("tiny", "minimind"):  # neox normalises, sentencepiece drops a leading space
            assert "".join(pieces) == text


@pytest.mark.slow
@REAL
@_RELAXED
@given(data=st.data())
def test_stream_of_any_ids_is_their_text(
    name: str, data: st.DataObject, request: pytest.FixtureRequest
) -> None:
    tokenizer = load(name, request)
    ids = data.draw(st.lists(st.integers(0, min(len(tokenizer), 400) - 1), max_size=30))
    stream = StreamDecoder(tokenizer)
    assert "".join([*(stream.push(token) for token in ids), stream.flush()]) == tokenizer.decode(ids)


def test_half_a_character_waits(request: pytest.FixtureRequest) -> None:
    tokenizer = load("openllama", request)  # 你 is three byte tokens there
    ids, _ = tokenizer.encode_segments([Segment("a你", False, row=True)])
    stream = StreamDecoder(tokenizer)
    assert [stream.push(token) for token in ids] == ["a", "", "", "你"]
    stream = StreamDecoder(tokenizer)
    assert [stream.push(token) for token in ids[:-1]] == ["a", "", ""]
    assert set(stream.flush()) == {"\ufffd"}  # said only once it is certain


def test_stream_decodes_a_bounded_window(request: pytest.FixtureRequest) -> None:
    tokenizer = load("tiny", request)
    ids, _ = tokenizer.encode_segments([Segment("今天天气很好。" * 300, False, row=True)])
    stream = StreamDecoder(tokenizer)
    longest = 0
    for token in ids:
        stream.push(token)
        longest = max(longest, len(stream._window))
    assert len(ids) > 2000 and longest <= 16


def test_batch_is_one_by_one(request: pytest.FixtureRequest) -> None:
    tokenizer = load("openllama", request)
    rows = [
        TEMPLATES[name].render(Conversation((Turn("user", f"问{name}"), Turn("assistant", "答"))))
        for name in ("alpaca", "llama2", "chatml", "belle_v2")
    ]
    assert tokenizer.encode_batch(rows) == [tokenizer.encode_segments(row) for row in rows]


def test_without_an_end_token_nothing_is_trained_and_chat_still_works() -> None:
    from tests.tiny import tiny_tokenizer

    hf = tiny_tokenizer()
    hf.eos_token = None
    tokenizer = TextTokenizer(hf)
    conversation = Conversation((Turn("user", "a"), Turn("assistant", "b")))
    with pytest.raises(ModelError, match="no end token") as caught:
        tokenizer.encode_segments(TEMPLATES["alpaca"].render(conversation))
    assert "tokenizer_config.json" in (caught.value.remedy or "")
    assert tokenizer.encode_segments(TEMPLATES["alpaca"].prompt(conversation.question))[0]


@pytest.mark.slow
def test_fingerprint_tells_tokenizers_apart() -> None:
    from tests.tiny import tiny_tokenizer

    first, same = TextTokenizer(tiny_tokenizer()), TextTokenizer(tiny_tokenizer())
    other = TextTokenizer(tiny_tokenizer(vocab_size=300))
    assert first.fingerprint() == same.fingerprint() != other.fingerprint()
    hf = tiny_tokenizer()
    hf.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    assert TextTokenizer(hf).fingerprint() != first.fingerprint()
    json.loads(first._json)


def test_a_slow_tokenizer_keeps_the_same_rules() -> None:
    from transformers import ByT5Tokenizer

    tokenizer = TextTokenizer(ByT5Tokenizer())
    assert tokenizer._fast is None
    conversation = Conversation((Turn("user", "你好</s>"), Turn("assistant", "好</s>的")))
    for template in (TEMPLATES["alpaca"], TEMPLATES["belle_v2"], TEMPLATES["lf/default"]):
        ids, spans = tokenizer.encode_segments(template.render(conversation))
        prompt, _ = tokenizer.encode_segments(template.prompt(conversation.question))
        assert ids[: len(prompt)] == prompt
        (begin, end), end_tokens = spans[0], ids.count(tokenizer.eos_id)
        assert end_tokens == (2 if template.id == "lf/default" else 1)
        assert tokenizer.decode(ids[begin : end - 1]) == "好</s>的" and ids[end - 1] == tokenizer.eos_id
        stream = StreamDecoder(tokenizer)
        said = [*(stream.push(token) for token in ids), stream.flush()]
        assert "".join(said) == tokenizer.decode(ids) and not any("\ufffd" in piece for piece in said)
