"""What is learned, read off the batch that meets the loss: the answers and their end tokens, nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.real_tokenizers import NAMES, load
from tests.tiny import sum_rows, write_rows

from tuoling.data.pack import collate
from tuoling.data.read import Source
from tuoling.data.store import StoreSettings, compile_store
from tuoling.data.token_store import Example
from tuoling.text.conversation import IGNORE_INDEX, Conversation, Turn
from tuoling.text.templates import TEMPLATES

TWO = Conversation(
    (
        Turn("user", "一加一？"),
        Turn("assistant", "等于二。"),
        Turn("user", "再加一？"),
        Turn("assistant", "三。"),
    )
)
NO_END_TOKEN = {"lf/empty"}  # as LLaMA-Factory has it
TEXT_AROUND_REPLY = {
    "lf/atom",
    "lf/deepseekcoder",
    "lf/falcon",
    "lf/fewshot",
    "lf/mistral",
    "llama2",
    "llama2_zh",
}


def example(tokenizer, segments, row: int = 0) -> Example:  # type: ignore[no-untyped-def]
    ids, spans = tokenizer.encode_segments(segments)
    return Example(np.array(ids, np.uint32), np.array(spans, np.int64).reshape(-1, 2), row)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_learned_is_answer_and_end(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = load(name, request)
    for template in TEMPLATES.values():
        batch = collate([example(tokenizer, template.render(TWO, learn="last"))])
        learned = batch.labels[batch.labels != IGNORE_INDEX].tolist()
        assert len(learned) == batch.num_learned
        end = template.forms.end  # type: ignore[attr-defined]
        end_text = tokenizer.decode([tokenizer.eos_id], keep_special=True) if end == "{eos}" else end
        said = tokenizer.decode(learned, keep_special=True)
        assert said.endswith(end_text), template.id
        reply = said.removesuffix(end_text) if end_text else said
        if template.forms.think:  # type: ignore[attr-defined]
            reply = reply.removeprefix("<think>\n\n</think>\n\n").removeprefix("<think>\n\n</think>\n\n")
        assert reply.strip() == "三。", template.id
        if template.id not in TEXT_AROUND_REPLY and not reply.startswith("\n"):
            assert reply == "三。" or template.id == "chatglm3", template.id
        if end == "{eos}":
            assert learned[-1] == tokenizer.eos_id


def test_learn_all_learns_every_reply_in_order(request: pytest.FixtureRequest) -> None:
    tokenizer = load("tiny", request)
    batch = collate([example(tokenizer, TEMPLATES["belle_v2"].render(TWO))])
    learned = batch.labels[batch.labels != IGNORE_INDEX].tolist()
    assert tokenizer.decode(learned, keep_special=True) == "等于二。</s>三。</s>"


def test_train_on_inputs_learns_all_but_the_first(request: pytest.FixtureRequest) -> None:
    tokenizer = load("tiny", request)
    whole = example(tokenizer, TEMPLATES["domain_bloom"].render(TWO, train_on_inputs=True))
    batch = collate([whole])
    assert batch.labels.tolist() == [*whole.input_ids[1:].tolist(), IGNORE_INDEX]


def test_from_file_to_batch(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    tokenizer = load("tiny", request)
    rows = sum_rows(5)
    store, _ = compile_store(
        [Source(str(write_rows(tmp_path / "rows.jsonl", rows)))],
        tokenizer=tokenizer,
        template=TEMPLATES["alpaca"],
        settings=StoreSettings(),
        cache_dir=tmp_path / "cache",
    )
    batch = collate([store[index] for index in (3, 0, 4)])
    for number, index in enumerate((3, 0, 4)):
        part = slice(int(batch.cu_seqlens[number]), int(batch.cu_seqlens[number + 1]))
        labels = batch.labels[part]
        assert tokenizer.decode(labels[labels != IGNORE_INDEX].tolist(), keep_special=True) == (
            rows[index]["output"] + "</s>"
        )
        assert tokenizer.decode(batch.input_ids[part].tolist()).endswith(rows[index]["output"])
        assert batch.position_ids[part].tolist() == list(range(part.stop - part.start))
    assert batch.rows == [3, 0, 4]


@st.composite
def examples(draw: st.DrawFn) -> Example:
    length = draw(st.integers(1, 12))
    ids = draw(st.lists(st.integers(0, 99), min_size=length, max_size=length))
    cuts = sorted(draw(st.sets(st.integers(0, length), max_size=6)))
    spans = list(zip(cuts[::2], cuts[1::2], strict=False))
    return Example(
        np.array(ids, np.uint32), np.array(spans, np.int64).reshape(-1, 2), draw(st.integers(0, 9))
    )


@pytest.mark.slow
@given(st.lists(examples(), min_size=1, max_size=5))
def test_labels_are_the_next_learned_token_of_the_same_example(packed: list[Example]) -> None:
    batch = collate(packed)
    expected: list[int] = []
    for one in packed:
        learned = {t for begin, end in one.spans.tolist() for t in range(begin, end)}
        ids = one.input_ids.tolist()
        expected += [ids[t + 1] if t + 1 in learned else IGNORE_INDEX for t in range(len(ids))]
    assert batch.labels.tolist() == expected
    assert batch.num_learned == sum(label != IGNORE_INDEX for label in expected)
    assert batch.input_ids.tolist() == [token for one in packed for token in one.input_ids.tolist()]
    assert batch.position_ids.tolist() == [t for one in packed for t in range(len(one.input_ids))]
    assert batch.cu_seqlens.tolist() == np.cumsum([0] + [len(one.input_ids) for one in packed]).tolist()
    assert batch.rows == [one.row for one in packed]
