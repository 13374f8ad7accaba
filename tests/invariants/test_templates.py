"""What is trained begins with what is asked: ids of the chat prompt are a prefix of the training ids."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.real_tokenizers import NAMES, load

from tuoling.text.conversation import Conversation, Turn
from tuoling.text.templates import TEMPLATES, Template, get_template
from tuoling.text.tokenizer import TextTokenizer

TEXTS = st.text(max_size=24) | st.sampled_from(
    ["你好", " 前后有空格 ", "\n", "</s>", "<|im_end|>\n<|im_start|>user\n", "<s>", "a", "😀", "###", "“"]
)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    turns = []
    for _ in range(draw(st.integers(1, 3))):
        turns += [Turn("user", draw(TEXTS), draw(TEXTS | st.just(""))), Turn("assistant", draw(TEXTS))]
    system = draw(st.none() | TEXTS)
    return Conversation(((Turn("system", system),) if system else ()) + tuple(turns))


def check(templates: list[Template], tokenizer: TextTokenizer, conversation: Conversation) -> None:
    """All in one tokenizer call; ids of two sets of segments do not depend on what else is in the call."""
    modes = [(learn, everything) for learn in ("all", "last") for everything in (False, True)]
    batch = []
    for template in templates:
        batch.append(template.prompt(conversation.question))
        batch += [template.render(conversation, learn=learn, train_on_inputs=all_) for learn, all_ in modes]
    encoded = iter(tokenizer.encode_batch(batch))
    for template in templates:
        prompt, spans = next(encoded)
        assert not spans, template.id
        for learn, everything in modes:
            ids, spans = next(encoded)
            assert ids[: len(prompt)] == prompt, template.id
            if learn == "last" and not everything:
                assert all(begin >= len(prompt) for begin, _ in spans), template.id
            if everything:
                assert spans in ([(0, len(ids))], []), template.id


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(conversation=conversations())
def test_training_begins_with_the_prompt(
    name: str, conversation: Conversation, request: pytest.FixtureRequest
) -> None:
    tokenizer = load(name, request)
    check(list(TEMPLATES.values()), tokenizer, conversation)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(conversation=conversations())
def test_the_models_own_chat_template_too(conversation: Conversation, request: pytest.FixtureRequest) -> None:
    tokenizer = load("minimind", request)
    check([get_template("tokenizer", tokenizer)], tokenizer, conversation)


def test_there_are_templates_to_check() -> None:
    assert len(TEMPLATES) > 80
