"""Questions alone (`{"question"}`, `{"prompt"}`, `{"query"}`): for generating and predicting, nothing to learn."""

from __future__ import annotations

from tuoling.data.row import Record, RowError, RowFormat, text_of
from tuoling.data.turns import with_system
from tuoling.language import tr
from tuoling.text.conversation import Conversation, Turn

_NAMES = ("question", "prompt", "query", "问题")


def _name(record: Record) -> str | None:
    return next((name for name in _NAMES if name in record), None)


def _matches(record: Record) -> bool:
    return _name(record) is not None


def _reads(record: Record) -> tuple[str, ...]:
    return (_name(record) or "question",)


def _parse(record: Record) -> Conversation:
    name = _name(record)
    if name is None:
        raise RowError("question", "missing_field", tr("`question` is not there", "缺少字段 `question`"))
    return Conversation(with_system(record, (Turn("user", text_of(record, name)),)))


FORMAT = RowFormat(
    name="question",
    matches=_matches,
    parse=_parse,
    question_field="question",
    answer_field="question",
    trainable=False,
    answered=False,
    rank=90,
    reads=_reads,
)
