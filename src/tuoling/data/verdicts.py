"""What makes a conversation bad, and what is only pointed at.

Bad: nothing to ask or to learn, turns out of order, text broken by a wrong encoding.
Flagged: unfilled placeholders, control characters, literal `\\n` and `\\"` left by escaping twice, columns that are not trained, and (by
the reader, `read.py`) a last turn that nobody answered.
"""

from __future__ import annotations

import re

from tuoling.data.row import Problem, Record, RowFormat
from tuoling.language import tr
from tuoling.text.conversation import Conversation, Turn

_BLANK = " \t\n\r\f\v\u3000\u00a0\u200b\u200c\u200d\u2060\ufeff"
_PLACEHOLDER = re.compile(r"\[[^\[\]\n]{1,8}代号\]|\{\{ ?(?:name|author|NAME|AUTHOR) ?\}\}|<(?:NAME|AUTHOR)>")
_SUSPECT = re.compile("[\ud800-\udfff\ufffd锟äåæçèéïâÄÊÒµÎ锛銆鐨鎴浣\\\\{\\]<\x00-\x08\x0e-\x1f\x7f]")
"""One cheap look (about 1.8 µs for 270 characters): no hit, nothing broken and nothing to flag. It holds U+FFFD, the
first bytes of Chinese in UTF-8 as Latin-1, GBK's commonest lead bytes as Latin-1, marks of UTF-8 read as GBK, and
control characters."""
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
_HALF = re.compile("[\ud800-\udfff]")  # a lone surrogate: half an emoji, which no tokenizer takes
_UTF8_LEADS = re.compile("[äåæçèé]|ï¿½|â€")
_GBK_LEADS = re.compile("[ÄÊÒµÎ]")
_UTF8_AS_LATIN = re.compile(
    r"(?:[\u00e2-\u00e9ï][\u0080-\u00ff\u0152-\u0192\u02c6-\u02dc\u2013-\u203a\u20ac\u2122]{2})+"
)
_GBK_AS_LATIN = re.compile(r"[\u00a1-\u00f7\u00f8-\u00fe]{8,}")
_LONE_DEBRIS = re.compile(
    "[äåæç][\u0080-\u009f\u00a1-\u00b7\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u20ac\u2122]"
)
_UTF8_AS_GBK_SIGNS = ("锛", "銆", "鐨", "鎴", "浣犲")  # ，。的我你 in UTF-8, read as GBK
_CJK = re.compile(r"[\u4e00-\u9fff\u3000-\u303f\uff00-\uffef]")
_FOREIGN_RUN = re.compile(r"[^\x00-\x7f]{4,}")
_ESCAPED = re.compile(r'\\\\?n|\\+"')
_CODE = re.compile(r"```|[{}]|;\s*(?:\n|$)|print|printf|正则|转义|换行符|regex|\\[dws]|\\begin|\$")
_MODALITIES = ("images", "image", "videos", "audios", "audio")


def mojibake(text: str) -> str | None:
    """The piece of the text that a wrong encoding broke, or None.

    U+FFFD and `锟斤拷` (U+FFFD read as GBK) tell by themselves, unless the text speaks of garbled text;
    other debris counts only when turning the wrong decoding round gives Chinese.
    """
    if half := _HALF.search(text):
        return text[max(0, half.start() - 6) : half.end()]
    if "\ufffd" in text or "锟斤拷" in text:
        if "乱码" in text or "mojibake" in text.lower():
            return None
        at = text.find("\ufffd")
        at = text.find("锟斤拷") if at < 0 else at
        return text[max(0, at - 6) : at + 6]
    if text.isascii():
        return None
    if _UTF8_LEADS.search(text):
        for match in _UTF8_AS_LATIN.finditer(text):
            if _repaired(match[0], "cp1252", "utf-8") or _repaired(match[0], "latin-1", "utf-8"):
                return match[0][:12]
        if lone := _LONE_DEBRIS.search(text):
            return text[lone.start() : lone.start() + 6]
    if _GBK_LEADS.search(text):
        for match in _GBK_AS_LATIN.finditer(text):
            if len(set(match[0])) >= 5 and _is_common_gbk(match[0][: len(match[0]) // 2 * 2]):
                return match[0][:12]
    if any(sign in text for sign in _UTF8_AS_GBK_SIGNS):
        for match in _FOREIGN_RUN.finditer(text):
            if _repaired(match[0], "gb18030", "utf-8"):
                return match[0][:12]
    return None


def _repaired(debris: str, wrong: str, right: str) -> bool:
    """True where encoding with the wrong codec and decoding with the right one gives Chinese (or its punctuation).

    cp1252 leaves five bytes undefined; those pass as Latin-1. Three characters of ten may be lost.
    """
    encoded = bytearray()
    for character in debris:
        try:
            encoded += character.encode(wrong)
        except UnicodeEncodeError:
            if ord(character) > 0xFF:
                return False
            encoded.append(ord(character))
    text = bytes(encoded).decode(right, "replace")
    good = len(_CJK.findall(text)) + sum(c in "‘’“”—–…•" for c in text)
    return good >= max(1, 0.7 * len(text))


def _is_common_gbk(debris: str) -> bool:
    """True where Latin-1 characters, as bytes, are GBK's level-1 hanzi or its punctuation throughout.

    Any two high bytes are some rare hanzi; level 1 (leads 0xB0 to 0xD7) holds the 3,755 in daily use.
    """
    leads = debris.encode("latin-1")[0::2]
    trails = debris.encode("latin-1")[1::2]
    return all(0xB0 <= lead <= 0xD7 or lead in (0xA1, 0xA3) for lead in leads) and min(trails) >= 0xA1


def text_flags(text: str) -> list[tuple[str, str]]:
    """(code, message) of what a good text should be looked at for."""
    flags = []
    if "代号]" in text or "{{" in text or "<NAME>" in text or "<AUTHOR>" in text:
        match = _PLACEHOLDER.search(text)
        if match:
            flags.append(
                ("placeholder", tr(f"unfilled placeholder {match[0]}", f"占位符 {match[0]} 没有填写"))
            )
    if control := _CONTROL.search(text):
        flags.append(
            ("control_character", tr(f"control character {control[0]!r}", f"控制字符 {control[0]!r}"))
        )
    if "\\" in text and _ESCAPED.search(text) and not _CODE.search(text):
        flags.append(
            (
                "escaped_twice",
                tr(
                    'literal \\n or \\" in the text: escaped twice?',
                    '文本里有字面的 \\n 或 \\"：是否转义了两次？',
                ),
            )
        )
    return flags


def field_of(format: RowFormat, turns: tuple[Turn, ...], index: int, record: Record) -> str:
    """The name of the field a turn came from, as the user's file spells it."""
    role = turns[index].role
    if format.turns_field:
        entries = record.get(format.turns_field)
        offset = (
            max(0, len(turns) - len(entries)) if isinstance(entries, list) else 0
        )  # a system text beside them
        return f"{format.turns_field}[{max(0, index - offset)}]"
    if role == "system":
        return "system"
    names = format.reads(record) if format.reads else (format.question_field, format.answer_field)
    name = names[0] if role == "user" else names[-1]
    pair = sum(turn.role == role for turn in turns[:index])
    texts = record.get(name)
    if isinstance(texts, list) and isinstance(
        texts[0], str
    ):  # Chinese-Vicuna's lists of questions and of answers
        return f"{name}[{pair}]"
    if not any(turn.role == role for turn in turns[index + 1 :]):
        return name
    if record.get("history"):
        return f"history[{pair}]"
    return f"{names[0]}[{index - (turns[0].role == 'system')}]"  # a turn of a dialogue written as text


def _empty(turn: Turn, field: str) -> Problem:
    text = turn.text
    if text:
        return Problem(
            field, "only_whitespace", tr(f"`{field}` holds only whitespace", f"`{field}` 只有空白字符")
        )
    if turn.role == "assistant":
        return Problem(
            field,
            "empty_answer",
            tr(f"`{field}` is empty: no answer to learn", f"`{field}` 为空：没有可学的回答"),
        )
    if turn.role == "text":
        return Problem(field, "empty_text", tr(f"`{field}` is empty", f"`{field}` 为空"))
    return Problem(
        field, "empty_question", tr(f"`{field}` is empty: nothing is asked", f"`{field}` 为空：没有提问")
    )


def _order_problem(format: RowFormat, turns: tuple[Turn, ...], record: Record) -> Problem | None:
    """The first turn that stands where another speaker should, or None."""
    start = 1 if turns and turns[0].role == "system" else 0
    for index in range(start, len(turns)):
        expected = "user" if (index - start) % 2 == 0 else "assistant"
        role = turns[index].role
        if role != expected:
            field = field_of(format, turns, index, record)
            return Problem(
                field,
                "roles_out_of_order",
                tr(
                    f"`{field}` is from the {role}, want the {expected}",
                    f"`{field}` 是 {role} 的话，这里应为 {expected}",
                ),
            )
    if len(turns) == start or (format.answered and turns[-1].role != "assistant"):
        field = format.turns_field or format.answer_field
        if len(turns) == start:
            return Problem(field, "empty_question", tr(f"`{field}` has no turns", f"`{field}` 没有任何对话"))
        if not format.turns_field:
            return Problem(field, "empty_answer", tr(f"`{field}` is not there", f"缺少字段 `{field}`"))
        return Problem(
            field,
            "roles_out_of_order",
            tr(
                f"`{field}` ends with the user: no answer to learn",
                f"`{field}` 以用户的话结尾：没有可学的回答",
            ),
        )
    return None


def judge(
    format: RowFormat, conversation: Conversation, record: Record
) -> tuple[tuple[Problem, ...], tuple[Problem, ...]]:
    """(problems, flags) of a conversation that was read from `record`."""
    turns = conversation.turns
    problems: list[Problem] = []
    flags: list[Problem] = []
    plain_order = len(turns) == 2 and turns[0].role == "user" and turns[1].role == "assistant"
    if not plain_order and not conversation.is_plain_text:
        wrong = _order_problem(format, turns, record)
        if wrong:
            problems.append(wrong)
    for index, turn in enumerate(turns):
        text = turn.text
        if not text or (text[0] in _BLANK and not text.strip(_BLANK)):
            problems.append(_empty(turn, field_of(format, turns, index, record)))
        if _SUSPECT.search(text):
            _inspect(text, field_of(format, turns, index, record), problems, flags)
        if turn.context and _SUSPECT.search(turn.context):
            _inspect(turn.context, "input", problems, flags)
    return tuple(problems), tuple(flags)


def _inspect(text: str, field: str, problems: list[Problem], flags: list[Problem]) -> None:
    """The slow look at a text in which something was seen."""
    broken = mojibake(text)
    if broken:
        message = tr(f"`{field}` is garbled: {broken!r}", f"`{field}` 有乱码：{broken!r}")
        problems.append(Problem(field, "mojibake", message))
    flags += [Problem(field, code, f"`{field}`: {message}") for code, message in text_flags(text)]


def column_verdicts(record: Record) -> tuple[tuple[Problem, ...], tuple[Problem, ...]]:
    """(problems, flags) of columns beside the conversation: pictures and sounds cannot be trained, tools are not."""
    problems, flags = [], []
    for name in _MODALITIES:
        if record.get(name):
            message = tr(f"`{name}`: only text is trained here", f"`{name}`：这里只训练文本")
            problems.append(Problem(name, "not_text", message))
    if record.get("tools"):
        flags.append(
            Problem(
                "tools", "ignored_column", tr("`tools` is not part of what is trained", "`tools` 不参与训练")
            )
        )
    return tuple(problems), tuple(flags)
