"""The words on the web page. A function, so that one server can make them in both languages."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from tuoling.environment import Language
from tuoling.language import speaking, tr

OTHER: dict[Language, str] = {"zh": "English", "en": "中文"}
"""What the switch says: the language one would change to, in its own words."""


@dataclass(frozen=True, slots=True)
class PageTexts:
    """Labels by where they stand. knobs: setting → (label, what it does)."""

    placeholder: str
    ask: str
    question: str
    send: str
    stop: str
    retry: str
    undo: str
    clear: str
    save: str
    reset: str
    settings: str
    light: str
    copy: str
    language: str
    knobs: dict[str, tuple[str, str]]


@cache
def page_texts(language: Language) -> PageTexts:
    """All words in one language."""
    with speaking(language):
        return PageTexts(
            placeholder=tr("What would you like to know?", "有什么想问的？"),
            ask=tr("Ask something, Enter sends", "输入问题，按 Enter 发送"),
            question=tr("Question", "问题"),
            send=tr("Send", "发送"),
            stop=tr("Stop", "停止"),
            retry=tr("Retry", "重答"),
            undo=tr("Undo", "撤回"),
            clear=tr("Clear", "清空"),
            save=tr("Save", "保存"),
            reset=tr("Reset parameters", "恢复默认参数"),
            settings=tr("Settings", "设置"),
            light=tr("Light or dark", "浅色或深色"),
            copy=tr("Copy", "复制"),
            language=OTHER[language],
            knobs=_knobs(),
        )


def _knobs() -> dict[str, tuple[str, str]]:
    return {
        "model": (tr("Model", "模型"), ""),
        "other": (tr("Compare with", "对比"), tr("both answer, side by side", "两个模型并排回答")),
        "system": (
            tr("System prompt", "系统提示"),
            tr("who the model is and how it speaks; empty: none", "设定模型的身份与口吻；留空则不用"),
        ),
        "max_new_tokens": (
            tr("Longest answer", "最长回答"),
            tr("in tokens", "以 token 计"),
        ),
        "min_new_tokens": (
            tr("Shortest answer", "最短回答"),
            tr("in tokens", "以 token 计"),
        ),
        "do_sample": (
            tr("Sample", "随机采样"),
            tr("draw words by chance; off: always the likeliest", "按概率抽词；关闭则总取最可能的词"),
        ),
        "temperature": (
            tr("Temperature", "温度"),
            tr("higher: bolder, 0: never by chance", "越高越发散，0 为不随机"),
        ),
        "top_p": (
            tr("Top-p", "Top-p"),
            tr("the likeliest words up to this share", "只在累计概率以内的词里选"),
        ),
        "top_k": (
            tr("Top-k", "Top-k"),
            tr("the k likeliest words, 0: all", "只在最可能的 k 个词里选，0 为不限"),
        ),
        "seed": (
            tr("Seed", "随机种子"),
            tr("the same seed gives the same answer; empty: by chance", "种子相同则回答相同；留空为随机"),
        ),
        "num_beams": (
            tr("Beams", "束数"),
            tr("candidates searched side by side, 1: off", "同时搜索的候选数，1 为关闭"),
        ),
        "show_beams": (tr("Show the other beams", "显示其它束"), ""),
        "repetition_penalty": (
            tr("Repetition penalty", "重复惩罚"),
            tr("on the answer only, 1: off", "只作用于回答，1 为关闭"),
        ),
        "no_repeat_ngram_size": (
            tr("No repeated n-gram", "禁止重复片段"),
            tr("words in a row that may not come twice, 0: off", "连续几个词不得重复出现，0 为关闭"),
        ),
        "memory_tokens": (
            tr("Memory", "记忆长度"),
            tr(
                "tokens of talk and answer together; older turns are left out",
                "对话与回答合计的 token 数，更早的轮次会被略去",
            ),
        ),
    }
