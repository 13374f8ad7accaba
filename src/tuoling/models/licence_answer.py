"""May this be used commercially, may its weights be published: the plain answer to what went in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tuoling.environment import Language
from tuoling.language import tr
from tuoling.models.licence import Part
from tuoling.models.licence_table import BY_ID, Licence, Permission

_WORST_FIRST: tuple[Permission, ...] = ("no", "unknown", "diff", "conditions", "yes")
Question = Literal["commercial", "publish"]

_WORDS: dict[Permission, tuple[str, str]] = {
    "yes": ("yes", "可以"),
    "conditions": ("yes, if conditions are kept", "可以，须遵守条件"),
    "diff": ("only as a diff or an adapter", "只能以差分或适配器形式"),
    "no": ("no", "不可以"),
    "unknown": ("unknown", "未知"),
}


@dataclass(frozen=True)
class Answer:
    """Both answers over all parts: the worst of them counts, and what is not known is not allowed."""

    parts: tuple[Part, ...]
    commercial: Permission
    publish: Permission

    @property
    def unknown(self) -> tuple[Part, ...]:
        """Parts that nobody gave a licence which is known here."""
        return tuple(part for part in self.parts if permission(part, "commercial") == "unknown")

    def because(self, question: Question) -> tuple[Part, ...]:
        """The parts that decide."""
        decided: Permission = getattr(self, question)
        return tuple(part for part in self.parts if permission(part, question) == decided)


def terms(part: Part) -> list[Licence | None]:
    """The table's rows for a part's licences; None for one that is not there."""
    return [BY_ID.get(one) for one in part.licences]


def permission(part: Part, question: Question) -> Permission:
    """The worst of a part's licences. Of a generator only its answers went in: its licence's word on outputs counts."""
    found = terms(part)
    if not found or None in found:
        known: list[Permission] = [_of(part, one, question) for one in found if one is not None]
        return "no" if "no" in known else "unknown"
    return worst([_of(part, one, question) for one in found if one is not None])


def _of(part: Part, licence: Licence, question: Question) -> Permission:
    if part.kind != "generator":
        return licence.commercial if question == "commercial" else licence.publish
    return "conditions" if question == "publish" and licence.outputs == "no" else licence.outputs


def worst(permissions: Sequence[Permission]) -> Permission:
    """The one that counts where all have to be kept; nothing at all is unknown."""
    return min(permissions, key=_WORST_FIRST.index, default="unknown")


def answer(parts: Sequence[Part]) -> Answer:
    """What all parts together allow."""
    return Answer(
        tuple(parts),
        worst([permission(part, "commercial") for part in parts]),
        worst([permission(part, "publish") for part in parts]),
    )


def word(permission: Permission, language: Language) -> str:
    """yes, no, unknown and what lies between, for people."""
    return _WORDS[permission][language == "zh"]


def names(parts: Sequence[Part], language: Language) -> str:
    """`rows.json (cc-by-nc-4.0)`, one after another."""
    unknown = "未知" if language == "zh" else "unknown"
    shown = [f"{part.named} ({' + '.join(part.licences) or unknown})" for part in parts]
    more = len(shown) - 5
    if more > 0:
        shown = [*shown[:5], f"等，另有 {more} 项" if language == "zh" else f"and {more} more"]
    return ("、" if language == "zh" else ", ").join(shown)


def sentences(found: Answer, language: Language) -> list[str]:
    """The answer in two or more sentences."""
    zh = language == "zh"
    lines = []
    for question, en_label, zh_label in (
        ("commercial", "Commercial use", "能否商用"),
        ("publish", "Publishing the weights", "能否发布权重"),
    ):
        decided: Permission = getattr(found, question)
        line = f"{zh_label}：{word(decided, 'zh')}" if zh else f"{en_label}: {word(decided, 'en')}"
        parts = found.because(question)  # type: ignore[arg-type]
        if decided != "yes" and parts:
            line += f"，因为 {names(parts, 'zh')}" if zh else f", because of {names(parts, 'en')}"
        lines.append(line + ("。" if zh else "."))
    if found.unknown:
        lines.append(
            f"不知道许可的：{names(found.unknown, 'zh')}。未知不等于允许。"
            if zh
            else f"Not known: {names(found.unknown, 'en')}. Unknown does not mean allowed."
        )
    lines += conditions(found, language)
    return lines


def conditions(found: Answer, language: Language) -> list[str]:
    """What the licences ask, one line each, with where they stand."""
    rows = {row.id: row for part in found.parts for row in terms(part) if row is not None}
    said = [(row, row.zh if language == "zh" else row.en) for row in rows.values()]
    return [f"{row.id}: {text}" + (f" ({row.source})" if row.source else "") for row, text in said if text]


def short(found: Answer) -> str:
    """One line for a table, in the user's language."""
    return tr(
        f"commercial use: {word(found.commercial, 'en')}; publish weights: {word(found.publish, 'en')}",
        f"商用：{word(found.commercial, 'zh')}；发布权重：{word(found.publish, 'zh')}",
    )


def warning(found: Answer) -> str | None:
    """What is said before a run starts that mixes in parts which are not for commercial use."""
    if found.commercial != "no":
        return None
    parts = found.because("commercial")
    return tr(
        f"what is trained here may not be used commercially: {names(parts, 'en')}. `tuoling licence RUN` says more",
        f"训练结果不能商用：{names(parts, 'zh')}。详见 tuoling licence 运行目录",
    )


# -- for cards ----------------------------------------------------------------------------------------------------


_KINDS = {
    "model": ("model", "模型"),
    "adapter": ("adapter", "适配器"),
    "data": ("data", "数据"),
    "generator": ("generator", "生成模型"),
}
_SAID = {
    "user": ("the user", "用户"),
    "card": ("its card", "模型卡"),
    "file": ("its licence file", "许可文件"),
    "name": ("its name", "名称"),
    "family": ("its family", "模型系列"),
    "nobody": ("nobody", "无"),
}


def kind_word(kind: str, language: Language) -> str:
    return _KINDS[kind][language == "zh"]


def said_word(said_by: str, language: Language) -> str:
    return _SAID[said_by][language == "zh"]


def card_section(parts: Sequence[Part]) -> str:
    """What a model card says, in both languages."""
    found = answer(parts)
    rows = "\n".join(
        f"| {kind_word(part.kind, 'zh')} {part.kind} | `{part.named}` "
        f"| {' + '.join(part.licences) or '未知 unknown'} "
        f"| {said_word(part.said_by, 'zh')} {said_word(part.said_by, 'en')} |"
        for part in parts
    )
    said = "\n\n".join(
        "\n".join(f"- {line}" for line in sentences(found, language)) for language in ("zh", "en")
    )
    return f"""## 许可 Licences

| 种类 kind | 名称 name | 许可 licence | 由谁说明 said by |
|---|---|---|---|
{rows}

{said}
"""


def one_licence(parts: Sequence[Part]) -> str | None:
    """The hub's `license:`: that of the models, or `other` where there are several or other parts forbid more."""
    weights = [part for part in parts if part.kind in ("model", "adapter") and part.licences]
    ids = {one for part in weights for one in part.licences}
    if not ids:
        return None
    forbids_more = answer(parts).commercial == "no" and answer(weights).commercial != "no"
    return "other" if len(ids) > 1 or forbids_more else ids.pop()


def of_models(parts: Sequence[Part]) -> str | None:
    """The licences of the models alone, for a line of a table."""
    ids = dict.fromkeys(one for part in parts if part.kind == "model" for one in part.licences)
    return " + ".join(ids) or None
