"""Items read out of what models write."""

from __future__ import annotations

import pytest

from tuoling.generate.filters import of_answer, of_task, repetitive, without_gpt
from tuoling.generate.from_text import find_quote
from tuoling.generate.parse import labelled, numbered
from tuoling.generate.request import Unparsable
from tuoling.generate.seeds import spans

TASK = {"instruction": ("指令", "Instruction"), "input": ("输入", "Input"), "output": ("输出", "Output")}


def item(instruction: str, context: str, output: str) -> dict[str, str]:
    return {"instruction": instruction, "input": context, "output": output}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            "好的：\n###\n4. 指令：写诗\n4. 输入：<无输入>\n4. 输出：春眠\n不觉晓\n###\n5. 指令: 翻译\n5. 输入：你好\n5. 输出：Hello\n",
            [item("写诗", "", "春眠\n不觉晓"), item("翻译", "你好", "Hello")],
        ),
        (
            "**指令**：写程序\n**输出**：先读数\n输入：3\n再打印\n---\n**指令：** 问好\n**输出：** 您好",
            [item("写程序", "", "先读数\n输入：3\n再打印"), item("问好", "", "您好")],  # a label out of order is text
        ),
        ("1、指令：写诗\n1、输入：无\n1、输出：\n2、指令：", [item("写诗", "", ""), item("", "", "")]),
        ('```json\n[{"instruction": "写诗", "input": null, "output": "春"}]\n```', [item("写诗", "", "春")]),
        ('{"tasks": [{"指令": "写诗", "输入": "", "输出": "春"}, {"输出": "x"}]}', [item("写诗", "", "春")]),
        ('{"instruction": "写诗", "output": "春"}\n{"instruction": "问好", "output": "好"}', [item("写诗", "", "春"), item("问好", "", "好")]),
    ],
)  # fmt: skip
def test_labelled_items(text: str, wanted: list[dict[str, str]]) -> None:
    assert labelled(text, TASK) == wanted


@pytest.mark.parametrize("text", ["", "%$#@", "当然可以！", "输出：没有指令", "[]", '{"a": 1}'])
def test_no_item_is_no_row(text: str) -> None:
    with pytest.raises(Unparsable):
        labelled(text, TASK)


def test_numbered_lines() -> None:
    text = (
        "好的，以下是问题：\n续写4. 孩子挑食怎么办？\n5、“怎样陪读？”\n  6) 几岁分房睡\n问题7：如何立规矩？\n"
    )
    assert numbered(text) == ["孩子挑食怎么办？", "怎样陪读？", "几岁分房睡", "如何立规矩？"]
    with pytest.raises(Unparsable):
        numbered("我不知道")


@pytest.mark.parametrize(
    ("instruction", "context", "reason"),
    [
        ("写首诗", "", "short_instruction"),
        ("描述这张图片", "", "banned_word"),
        ("打开链接并总结", "", "banned_word"),
        ("介绍一下 ChatGPT", "", "banned_word"),
        ("你觉得GPT怎么样", "", "asks_gpt"),
        ("天" * 100, "材料", "long_instruction"),
        ("天" * 100, "", None),  # only beside an input
        ("例如" + "天" * 140, "材料", None),
        ("例如" + "天" * 148, "材料", "long_instruction"),
        ("把下面的句子改成被动句", "猫追老鼠", None),
    ],
)
def test_what_belle_drops(instruction: str, context: str, reason: str | None) -> None:
    assert of_task(instruction, context) == reason


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (" \n", "no_answer"),
        ("作为一个AI语言模型，我无法回答。", "refusal"),
        ("抱歉，我无法完成", "refusal"),
        ("As an AI language model, I", "refusal"),
        ("我是[名字代号]", "placeholder"),
        ("写一首诗", "echo"),
        ("我们要好好学习，天天向上。" * 20, "repetitive"),
        ("很抱歉听到这个消息，你可以先陪陪他。", None),
    ],
)
def test_what_no_answer_may_be(answer: str, reason: str | None) -> None:
    assert of_answer("写一首诗", answer) == reason


def test_gpt_is_taken_out_of_the_order() -> None:
    assert without_gpt("请让GPT模型写一首诗") == "写一首诗"
    assert without_gpt("要求GPT能够写一首诗") == "写一首诗"
    assert without_gpt("写一首诗") == "写一首诗"
    assert not repetitive("一二三四五六七八" * 9)  # too short to say


def test_quotations_are_found_where_they_stand() -> None:
    text = "第一段。\n驼铃由  骆驼队\n发明。完。"
    span = find_quote("“驼铃由骆驼队发明。”", text)
    assert span is not None and text[span[0] : span[1]] == "驼铃由  骆驼队\n发明。"
    assert find_quote("驼铃由马队发明", text) is None and find_quote("", text) is None


def test_passages_cover_the_document() -> None:
    text = "一。" * 30 + "\n\n" + "二" * 130 + "\n\n  \n三！"
    found = spans(text, 50)
    assert all(end - start <= 50 for start, end in found)
    assert "".join("".join(text[start:end] for start, end in found).split()) == "".join(text.split())
    assert [text[start] for start, _ in found][:1] == ["一"] and spans(" \n", 10) == []
