"""A template as a jinja chat template, so that transformers, vLLM and others ask a saved model as we do.

Chat templates know messages and no `input` field: a question's context is on the line below it there. They cannot
keep special tokens typed by a user apart from the template's own; everything else is the same text, byte for byte.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from tuoling.text.render import MARK, Forms

_THINK_TEST = "'<think>' in content or '</think>' in content"


def forms_to_jinja(forms: Forms, *, bos: str, eos: str, start: str) -> str | None:
    """The chat template, or None where the format cannot be written as one (earlier turns inside the question).

    bos, eos: the texts of these tokens, "" for none. start: the text of {start}.
    """
    if forms.later is not None:
        return None
    tokens = {"bos": bos, "eos": eos, "start": start}
    content = "content | trim" if forms.strip else "content"
    names = {"user": content, "reply": content, "context": '""', "round": "loop.index0 // 2"}

    def say(form: str, **more: str) -> str:
        return _expression(form, tokens, {**names, **more})

    system_inside = "{system}" in forms.user
    block = say(forms.system, system="system")
    user = _statement(say(forms.user, system="ns.block"))
    if system_inside:
        user += "{%- set ns.block = '' -%}"
    if forms.history is not None:
        earlier = _statement(say(forms.history, system="ns.block"))
        user = f"{{%- if loop.index0 + 2 < loop.length -%}}{earlier}{{%- else -%}}{user}{{%- endif -%}}"
    between = forms.end if forms.end_between is None else forms.end_between
    end = _statement(say(forms.end))
    if between != forms.end:
        end = f"{{%- if loop.last -%}}{end}{{%- else -%}}{_statement(say(between))}{{%- endif -%}}"
    think = ""
    if forms.think:
        think = f"{{%- if not ({_THINK_TEST}) -%}}{_statement(_quote(forms.think))}{{%- endif -%}}"
    return "".join(
        (
            f"{{%- set system = {_quote(forms.default_system or '')} -%}}{{%- set turns = messages -%}}",
            "{%- if messages[0]['role'] == 'system' -%}{%- set turns = messages[1:] -%}",
            "{%- if messages[0]['content'] -%}{%- set system = messages[0]['content'] -%}{%- endif -%}{%- endif -%}",
            f"{{%- set ns = namespace(block='') -%}}{{%- if system -%}}{{%- set ns.block = {block} -%}}{{%- endif -%}}",
            _statement(say(forms.head)),
            "" if system_inside else "{{- ns.block -}}",
            "{%- for message in turns -%}{%- set content = message['content'] -%}",
            "{%- if message['role'] == 'user' -%}",
            f"{{%- if not loop.first -%}}{_statement(say(forms.after))}{{%- endif -%}}"
            if forms.after
            else "",
            user,
            "{%- elif message['role'] == 'assistant' -%}",
            think + _statement(say(forms.reply)) + end,
            "{%- endif -%}{%- endfor -%}",
        )
    )


def _expression(form: str, tokens: Mapping[str, str], names: Mapping[str, str]) -> str:
    """A form as a jinja expression that gives its text."""
    parts = []
    for index, piece in enumerate(re.split(MARK, form)):
        if index % 2 == 0:
            parts.append(_quote(piece) if piece else "")
        elif piece in tokens:
            parts.append(_quote(tokens[piece]) if tokens[piece] else "")
        elif piece.startswith("token:"):
            parts.append(_quote(piece[6:]))
        else:
            parts.append(f"({names[piece]})")
    return " ~ ".join(part for part in parts if part) or "''"


def _statement(expression: str) -> str:
    return "" if expression == "''" else f"{{{{- {expression} -}}}}"


def _quote(text: str) -> str:
    """A jinja string. Its escapes are those of JSON, but for braces that jinja would take for its own."""
    return json.dumps(text, ensure_ascii=False).replace("{", "\\x7b").replace("}", "\\x7d")
