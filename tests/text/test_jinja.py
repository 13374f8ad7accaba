"""A template written as a jinja chat template gives the same text, read by transformers itself."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.real_tokenizers import load
from tests.tiny import tiny_tokenizer

from tuoling.text.conversation import Conversation, Turn
from tuoling.text.render import Forms, FormTemplate
from tuoling.text.templates import TEMPLATES, get_template
from tuoling.text.tokenizer import TextTokenizer

TEXTS = st.sampled_from(
    ["你好", " 两边 ", "引号\"和'", "{{ x }}{% y %}", "\\n\n", "<think>\n想\n</think>\n\n答", ""]
)
HF = tiny_tokenizer()
OWN = TextTokenizer(HF)


def text_of(segments: list, tokenizer: TextTokenizer) -> str:  # type: ignore[type-arg]
    texts = {"bos": tokenizer.hf.bos_token, "eos": tokenizer.hf.eos_token, "start": ""}
    return "".join(texts.get(segment.kind, segment.text) or "" for segment in segments)


def theirs(chat_template: str, conversation: Conversation, opened: bool) -> str:
    messages = [{"role": turn.role, "content": turn.full_text} for turn in conversation.turns]
    return HF.apply_chat_template(
        messages, chat_template=chat_template, tokenize=False, add_generation_prompt=opened
    )


@pytest.mark.slow
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.none() | TEXTS, st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3))
def test_same_text_as_ours(system: str | None, pairs: list[tuple[str, str]]) -> None:
    turns = [
        Turn(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)
    ]  # type: ignore[arg-type]
    head = (Turn("system", system),) if system is not None else ()
    conversation = Conversation((*head, *turns))
    for template in TEMPLATES.values():
        chat_template = template.to_jinja(OWN)
        if chat_template is not None:
            assert theirs(chat_template, conversation, False) == text_of(
                template.render(conversation), OWN
            ), template.id
            asked = conversation.question
            assert theirs(chat_template, asked, True) == text_of(template.prompt(asked), OWN), template.id


def test_nearly_all_can_be_written() -> None:
    missing = {name for name, template in TEMPLATES.items() if template.to_jinja(OWN) is None}
    assert missing == {"vicuna_interaction", "vicuna_instruct_prompt_py"}  # history inside the question


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chatml", "domain_bloom", "alpaca", "belle_v2"])
def test_read_back_as_the_models_own_template_it_gives_the_same_ids(name: str) -> None:
    hf = tiny_tokenizer()
    hf.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    hf.chat_template = TEMPLATES[name].to_jinja(TextTokenizer(hf))
    own = TextTokenizer(hf)
    conversation = Conversation(
        (Turn("user", "甲"), Turn("assistant", "乙"), Turn("user", "丙"), Turn("assistant", "丁"))
    )
    again = get_template("tokenizer", own)
    assert own.encode_segments(again.render(conversation)) == own.encode_segments(
        TEMPLATES[name].render(conversation)
    )


def test_begin_token_where_the_tokenizer_adds_one(request: pytest.FixtureRequest) -> None:
    chat_template = TEMPLATES["alpaca"].to_jinja(load("openllama", request)) or ""
    assert theirs(chat_template, Conversation((Turn("user", "x"),)), True).startswith("<s>Below")
    assert theirs(
        TEMPLATES["alpaca"].to_jinja(OWN) or "", Conversation((Turn("user", "x"),)), True
    ).startswith("Below")


def test_braces_and_quotes_of_a_template_survive() -> None:
    forms = Forms(id="x", user="{{ '{user}' }} {% \"\\ %}\n{# #}", default_system="}}'")
    template = FormTemplate(forms)
    conversation = Conversation((Turn("user", "q"), Turn("assistant", "a")))
    assert theirs(template.to_jinja(OWN) or "", conversation, False) == text_of(
        template.render(conversation), OWN
    )
