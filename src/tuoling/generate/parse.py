"""What models write when they are asked for labelled or numbered items: read tolerantly, never guessed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tuoling.generate.request import Unparsable
from tuoling.language import tr

Labels = Mapping[str, Sequence[str]]
"""Field → its labels, in the order in which they follow each other in an item."""

_NOTHING = re.compile(r"^[<（(\[]?(?:无输入|无|空|noinput|no input|none|n/a)[>）)\]]?[。.]?$", re.IGNORECASE)
_BETWEEN = re.compile(r"(?:\s*\n[ \t]*(?:#{2,}|-{3,}|={3,}|\*{3,}|\d+[ \t]*[.、．)）]?)[ \t]*)+\s*$")
_NUMBERED = re.compile(
    r"^[ \t>*-]*(?:续写|问题|第)?[ \t]*(?:\d{1,4}[ \t]*(?:[.、．)）]|[题个条]?[:：])|Q\d+[:：.])[ \t]*(.+?)[ \t]*$",
    re.MULTILINE,
)
_FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*?)```", re.DOTALL)


def labelled(text: str, labels: Labels) -> list[dict[str, str]]:
    """Items of labelled fields, the first field beginning each; or the same as JSON.

    `指令：…`, `1. 指令: …`, `**指令**：…` all count. A label that comes out of order is text. A field without a value
    is "". Raises Unparsable where there is no item at all.
    """
    fields = list(labels)
    found = _from_json(text, labels)
    if found is None:
        found = _from_labels(text, labels, fields)
    if not found:
        raise Unparsable(
            tr(
                f"no item that begins with {labels[fields[0]][0]}",
                f"没有以“{labels[fields[0]][0]}”开头的条目",
            )
        )
    return found


def _from_labels(text: str, labels: Labels, fields: list[str]) -> list[dict[str, str]]:
    place_of = {word.casefold(): place for place, name in enumerate(fields) for word in labels[name]}
    words = "|".join(sorted(map(re.escape, place_of), key=len, reverse=True))
    pattern = re.compile(
        rf"^[ \t>#*\-]*(?:第?\d+[题个条]?[ \t]*[.、．)）:：]?[ \t]*)?\**({words})[ \t]*\d*\**[ \t]*[:：][ \t]*\**[ \t]*",
        re.MULTILINE | re.IGNORECASE,
    )
    items: list[dict[str, str]] = []
    current, begin = -1, 0
    for match in pattern.finditer(text):
        place = place_of[match[1].casefold()]
        if place and (place <= current or current < 0):
            continue  # inside a value, or before any item
        if current >= 0:
            items[-1][fields[current]] = _value(text[begin : match.start()])
        if place == 0:
            items.append(dict.fromkeys(fields, ""))
        current, begin = place, match.end()
    if current >= 0:
        items[-1][fields[current]] = _value(text[begin:])
    return items


def _value(text: str) -> str:
    value = _BETWEEN.sub("", text).strip()
    return "" if _NOTHING.match(value) else value


def _from_json(text: str, labels: Labels) -> list[dict[str, str]] | None:
    """Objects with the fields or their labels as keys; None where the text is no JSON."""
    fenced = _FENCE.search(text)
    body = (fenced[1] if fenced else text).strip()
    if body[:1] not in ("[", "{"):
        return None
    try:
        value = json.loads(body)
    except ValueError:
        try:
            value = [json.loads(line) for line in body.splitlines() if line.strip()]
        except ValueError:
            return None
    if isinstance(value, dict):
        value = next((one for one in value.values() if isinstance(one, list)), [value])
    return [item for entry in value if isinstance(entry, dict) and (item := _fields_of(entry, labels))]


def _fields_of(entry: Mapping[str, Any], labels: Labels) -> dict[str, str] | None:
    folded = {str(key).casefold(): value for key, value in entry.items()}
    item = {}
    for name, words in labels.items():
        value = next((folded[key] for key in (name, *map(str.casefold, words)) if key in folded), "")
        text = (
            value
            if isinstance(value, str)
            else ""
            if value is None
            else json.dumps(value, ensure_ascii=False)
        )
        item[name] = _value(text)
    return item if item[next(iter(labels))] else None


def numbered(text: str) -> list[str]:
    """`1. …`, `续写3. …`, `2）…`: one item a line. Raises Unparsable where no line is numbered."""
    found = [match[1].strip('*"“” ') for match in _NUMBERED.finditer(text)]
    if not found:
        raise Unparsable(tr("no numbered line", "没有带编号的行"))
    return found
