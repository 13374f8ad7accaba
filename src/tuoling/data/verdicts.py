"""What makes a conversation bad, and what is only pointed at.

Bad: nothing to ask or to learn, turns out of order, text broken by a wrong encoding.
Flagged: unfilled placeholders, literal `\\n` and `\\"` left by escaping twice, columns that are not trained.
"""

from __future__ import annotations

import re

from tuoling.data.row import Problem, Record, RowFormat
from tuoling.language import tr
from tuoling.text.conversation import Conversation, Turn

_BLANK = " \t\n\r\f\v\u3000\u00a0\u200b\u200c\u200d\u2060\ufeff"
_PLACEHOLDER = re.compile(r"\[[^\[\]\n]{1,8}代号\]|\{\{ ?(?:name|author|NAME|AUTHOR) ?\}\}|<(?:NAME|AUTHOR)>")
_UTF8_LEADS = "äåæçèé"  # UTF-8's first bytes of Chinese characters, read as Latin-1
_UTF8_AS_LATIN = re.compile(
    r"(?:[\u00e2-\u00e9ï][\u0080-\u00ff\u0152-\u0192\u02c6-\u02dc\u2013-\u203a\u20ac\u2122]{2})+"
)
_GBK_AS_LATIN = re.compile(r"[\u00a1-\u00f7\u00f8-\u00fe]{8,}")
_UTF8_AS_GBK_SIGNS = ("锛", "銆", "鐨", "鎴", "浣犲")  # ，。的我你 in UTF-8, read as GBK
_CJK = re.compile(r"[\u4e00-\u9fff\u3000-\u303f\uff00-\uffef]")
_CJK_RUN = re.compile(r"[\u3400-\u9fff\ue000-\uf8ff€]{4,}")
_ESCAPED = re.compile(r'\\\\?n|\\+"')
_CODE = re.compile(r"```|[{}]|;\s*(?:\n|$)|print|printf|正则|转义|换行符|regex|\\[dws]|\\begin|\$")
_MODALITIES = ("images", "image", "videos", "audios", "audio")


def is_blank(text: str) -> bool:
    """True where the text is empty, or holds nothing but spaces, zero-width ones among them."""
    return not text or (text[0] in _BLANK and not text.strip(_BLANK))


def mojibake(text: str) -> str | None:
    """The piece of the text that a wrong encoding broke, or None.

    U+FFFD and `锟斤拷` (U+FFFD read as GBK) tell by themselves, unless the text speaks of garbled text;
    other debris counts only when turning the wrong decoding round gives Chinese.
    """
    if "\ufffd" in text or "锟斤拷" in text:
        if "乱码" in text or "mojibake" in text.lower():
            return None
        at = text.find("\ufffd")
        at = text.find("锟斤拷") if at < 0 else at
        return text[max(0, at - 6) : at + 6]
    if text.isascii():
        return None
    if any(lead in text for lead in _UTF8_LEADS) or "ï¿½" in text or "â€" in text:
        for match in _UTF8_AS_LATIN.finditer(text):
            if _repaired(match[0], "cp1252", "utf-8") or _repaired(match[0], "latin-1", "utf-8"):
                return match[0][:12]
    if _may_be_gbk_as_latin(text):
        for match in _GBK_AS_LATIN.finditer(text):
            if len(set(match[0])) >= 5 and _repaired(match[0][: len(match[0]) // 2 * 2], "latin-1", "gbk"):
                return match[0][:12]
    if any(sign in text for sign in _UTF8_AS_GBK_SIGNS):
        for match in _CJK_RUN.finditer(text):
            if _repaired(match[0], "gb18030", "utf-8", lenient=True):
                return match[0][:12]
    return None


def _may_be_gbk_as_latin(text: str) -> bool:
    """A cheap first look: GBK's commonest lead bytes (0xB5, 0xC4, 0xCE, 0xD2, 0xCA) as Latin-1 characters."""
    return "Ä" in text or "Ê" in text or "Ò" in text or "µ" in text or "Î" in text


def _repaired(debris: str, wrong: str, right: str, *, lenient: bool = False) -> bool:
    """True where encoding with the wrong codec and decoding with the right one gives Chinese (or its punctuation).

    cp1252 leaves five bytes undefined; those pass as Latin-1. `lenient` allows three characters of ten to be lost.
    """
    encoded = bytearray()
    for character in debris:
        try:
            encoded += character.encode(wrong)
        except UnicodeEncodeError:
            if ord(character) > 0xFF:
                return False
            encoded.append(ord(character))
    try:
        text = bytes(encoded).decode(right, "replace" if lenient else "strict")
    except UnicodeDecodeError:
        return False
    good = len(_CJK.findall(text)) + text.count("\ufffd") * (not lenient)
    typographic = sum(c in "‘’“”—–…•" for c in text)
    if right == "gbk":  # level-1 hanzi only: any two Latin letters are some rare hanzi
        return all("\u4e00" <= c <= "\u9fff" or c in "，。：；！？、“”（）" for c in text) and _common_hanzi(
            text
        )
    return good + typographic >= max(1, 0.7 * len(text))


def _common_hanzi(text: str) -> bool:
    """True where at least one character of three is among the commonest of modern Chinese."""
    common = "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里，。：、？"
    return sum(c in common for c in text) * 3 >= len(text)


def text_flags(text: str) -> list[tuple[str, str]]:
    """(code, message) of what a good text should be looked at for."""
    flags = []
    if "代号]" in text or "{{" in text or "<NAME>" in text or "<AUTHOR>" in text:
        match = _PLACEHOLDER.search(text)
        if match:
            flags.append(
                ("placeholder", tr(f"unfilled placeholder {match[0]}", f"占位符 {match[0]} 没有填写"))
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
        offset = len(turns) - len(entries) if isinstance(entries, list) else 0
        return f"{format.turns_field}[{max(0, index - offset)}]" if 0 <= offset <= 1 else format.turns_field
    if role == "system":
        return "system"
    last = {"assistant": format.answer_field, "user": format.question_field, "text": format.answer_field}[
        role
    ]
    return last if not any(turn.role == role for turn in turns[index + 1 :]) else "history"


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
                    f"`{field}` is a {role} turn, want {expected}",
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
        texts = (turn.text, turn.context) if turn.context else (turn.text,)
        if is_blank(turn.text):
            problems.append(_empty(turn, field_of(format, turns, index, record)))
        for text in texts:
            broken = mojibake(text)
            if broken:
                field = field_of(format, turns, index, record)
                problems.append(
                    Problem(
                        field,
                        "mojibake",
                        tr(f"`{field}` is garbled: {broken!r}", f"`{field}` 有乱码：{broken!r}"),
                    )
                )
            if "\\" in text or "{{" in text or "代号]" in text or "<NAME>" in text or "<AUTHOR>" in text:
                field = field_of(format, turns, index, record)
                flags += [Problem(field, code, f"`{field}`: {message}") for code, message in text_flags(text)]
    return tuple(problems), tuple(flags)


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
