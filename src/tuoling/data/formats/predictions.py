"""What a model answered: `{"input", "predict", "target"}` (ours, domain-bloom's), LLaMA-Factory's `prompt/predict/label`.

Read and checked, never taken for training rows unless asked for by name (then the target is learned).
"""

from __future__ import annotations

from tuoling.data.row import Record, RowFormat, text_of
from tuoling.text.conversation import Conversation, Turn

_NAMES = (("input", "target"), ("prompt", "label"))


def _matches(record: Record) -> bool:
    return "predict" in record and any(question in record and target in record for question, target in _NAMES)


def _reads(record: Record) -> tuple[str, ...]:
    return next((pair for pair in _NAMES if pair[0] in record), _NAMES[0])


def _parse(record: Record) -> Conversation:
    question, target = _reads(record)
    text_of(record, "predict")
    return Conversation((Turn("user", text_of(record, question)), Turn("assistant", text_of(record, target))))


FORMAT = RowFormat(
    name="predictions",
    matches=_matches,
    parse=_parse,
    question_field="input",
    answer_field="target",
    trainable=False,
    rank=5,
    reads=_reads,
)
