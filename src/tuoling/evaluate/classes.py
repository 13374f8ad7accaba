"""Names of classes: BELLE's ten and the older translation, however they are spelled."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Mapping

ALL = "all"
"""The class of rows that have none."""

BELLE_CLASSES: Mapping[str, str] = {
    "open qa": "开放问答",
    "closed qa": "封闭问答",
    "brainstorming": "头脑风暴",
    "generation": "生成",
    "rewrite": "改写",
    "summarization": "总结",
    "classification": "分类",
    "extract": "提取",
    "math": "数学",
    "code": "代码",
    "translation": "翻译",
}
"""Class → its Chinese name, in the order of reports."""

_OTHER_SPELLINGS = {
    "openqa": "open qa",
    "open question answering": "open qa",
    "closedqa": "closed qa",
    "extraction": "extract",
    "information extraction": "extract",
    "summarisation": "summarization",
    "summary": "summarization",
    "rewriting": "rewrite",
    "classify": "classification",
    "brainstorm": "brainstorming",
    "creative generation": "generation",
    "translate": "translation",
    "coding": "code",
    "mathematics": "math",
    **{chinese: name for name, chinese in BELLE_CLASSES.items()},
}

WITHOUT_REFERENCE = frozenset(("generation", "brainstorming", "rewrite"))
"""Classes whose judge sees no reference answer, even where the row has one."""


def normal_class(name: str) -> str:
    """The class in one spelling: NFKC (a no-break space is a space), lower case, single spaces, `_` and `-` as one."""
    plain = unicodedata.normalize("NFKC", name).casefold().replace("_", " ").replace("-", " ")
    plain = " ".join(plain.split())
    return _OTHER_SPELLINGS.get(plain, plain)


def nearest_class(name: str) -> str | None:
    """The BELLE class that an unknown name may mean."""
    near = difflib.get_close_matches(normal_class(name), BELLE_CLASSES, n=1)
    return near[0] if near else None
