"""Self-instruct seed tasks: `{"instruction", "instances": [{"input", "output"}]}`, exactly one instance each.

They are hand-written rows, so they may be trained; a task with more instances would be more than one row.
"""

from __future__ import annotations

from collections.abc import Mapping

from tuoling.data.formats.alpaca import question_turn
from tuoling.data.row import Record, RowError, RowFormat, text_of, wrong_type
from tuoling.language import tr
from tuoling.text.conversation import Conversation, Turn


def _matches(record: Record) -> bool:
    return "instruction" in record and "instances" in record


def _parse(record: Record) -> Conversation:
    instances = record.get("instances")
    if not isinstance(instances, list) or not all(isinstance(entry, Mapping) for entry in instances):
        raise wrong_type("instances", instances, tr("a list of objects", "对象列表"))
    if len(instances) != 1:
        message = tr(
            f"`instances` has {len(instances)} entries, want 1",
            f"`instances` 有 {len(instances)} 项，应为 1 项",
        )
        raise RowError("instances", "wrong_count", message)
    task = {"instruction": text_of(record, "instruction"), "input": instances[0].get("input")}
    return Conversation((question_turn(task), Turn("assistant", text_of(instances[0], "output"))))


FORMAT = RowFormat(
    name="seed_task",
    matches=_matches,
    parse=_parse,
    question_field="instruction",
    answer_field="instances[0].output",
    rank=15,
)
