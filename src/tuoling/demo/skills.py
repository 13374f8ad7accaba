"""What the demo model learns by copying, comparing and computing: one function a kind of task."""

from __future__ import annotations

from tuoling.demo import words
from tuoling.demo.draw import Draw, Fact

STEPS = (("加", "+", 1), ("减", "-", 1), ("加", "+", 10), ("减", "-", 10))


def _step(value: int, sign: str, size: int) -> int | None:
    """`value` one step on; None where it leaves 1 to 99 or where a digit would be carried or borrowed."""
    total = value + size if sign == "+" else value - size
    inside = 0 < total < 100 and (size == 10 or total // 10 == value // 10)
    return total if inside else None


def arithmetic(draw: Draw) -> Fact:
    """A number below 100 and one or ten more or less, without carrying, bare or about things."""
    value = draw.number(1, 99)
    steps = [(word, sign, size) for word, sign, size in STEPS if _step(value, sign, size) is not None]
    word, sign, size = draw.one(steps)
    total, key = _step(value, sign, size), (value, sign, size)
    known = [step for step in steps if draw.allows("arithmetic", value, *step[1:])]
    known = draw.some(known, len(known))
    plain = "，".join(f"{value}{w}{n}等于{_step(value, s, n)}" for w, s, n in known) + "。"
    if draw.chance(0.2):
        thing = draw.one(words.COUNTED_THINGS)
        change = "又买了" if sign == "+" else "送出"
        question = f"有{value}个{thing}，{change}{size}个，现在有几个？"
        return Fact(key, (question, f"{total}个"), plain)
    sum_ = f"{value}{sign}{size}" if draw.chance(0.5) else f"{value}{word}{size}"
    question = draw.one((f"{sum_}等于多少？", f"请算一算：{sum_}", f"计算{sum_}的结果。", f"{sum_}=？"))
    return Fact(key, (question, str(total)), plain)


def two_steps(draw: Draw) -> tuple[int, int, int]:
    """A number and two additions of 1 or 10 in a row, each of them on our side of the line."""
    while True:
        start, first, second = draw.number(1, 98), draw.one((1, 10)), draw.one((1, 10))
        places = ((start, first), (start + first, second))
        if all(_step(at, "+", size) and draw.allows("arithmetic", at, "+", size) for at, size in places):
            return start, first, second


def chinese_number(value: int) -> str:
    """An integer from 0 to 999 in Chinese: 108 → 一百零八, 12 → 十二, 210 → 二百一十."""
    digits = "零一二三四五六七八九"
    if value < 10:
        return digits[value]
    if value < 100:
        tens, ones = divmod(value, 10)
        return (digits[tens] if tens > 1 else "") + "十" + (digits[ones] if ones else "")
    hundreds, rest = divmod(value, 100)
    if rest == 0:
        return f"{digits[hundreds]}百"
    if rest < 10:
        return f"{digits[hundreds]}百零{digits[rest]}"
    return f"{digits[hundreds]}百{'一' if rest < 20 else ''}{chinese_number(rest)}"


def numerals(draw: Draw) -> Fact:
    """Numbers below 1000 between digits and Chinese characters."""
    value = draw.number(0, 999)
    spoken = chinese_number(value)
    if draw.chance(0.5):
        question = draw.one((f"{value}怎么读？", f"把{value}写成汉字。", f"{value}用中文怎么写？"))
        return Fact((value,), (question, spoken), f"{value}读作{spoken}。")
    question = draw.one((f"把{spoken}写成数字。", f"{spoken}用数字怎么写？", f"{spoken}是哪个数？"))
    return Fact((value,), (question, str(value)), f"{spoken}写作{value}。")


def extraction(draw: Draw) -> Fact:
    """Who, when, where, what or which number, out of one sentence."""
    person, time, place = draw.person(), draw.time(), draw.one(list(words.PLACES))
    act = draw.one(words.PLACES[place])
    sentence = draw.one(
        (
            f"{person}{time}在{place}{act}",
            f"{time}，{person}要去{place}{act}",
            f"{person}说{time}去{place}{act}",
        )
    )
    fields = {"人物": person, "时间": time, "地点": place, "事情": act}
    if draw.chance(0.6):
        name, value = draw.one(
            (("电话", draw.digits(4)), ("座位号", draw.digits(2)), ("费用", f"{draw.digits(2)}元"))
        )
        fields[name] = value
        sentence += f"，{name}{value}"
        asked = name if draw.chance(0.5) else draw.one(list(fields))
    else:
        asked = draw.one(list(fields))
    recap = draw.some(list(fields), 3)
    plain = f"{sentence}。" + "，".join(f"{name}是{fields[name]}" for name in recap) + "。"
    key = (sentence, asked)
    if draw.chance(0.5):
        question = f"{sentence}。{draw.one(('这句话里的', '上面的'))}{asked}是什么？"
        return Fact(key, (question, fields[asked]), plain)
    question = draw.one((f"找出下面这句话里的{asked}。", f"请从句子中提取{asked}："))
    return Fact(key, (question, fields[asked]), plain, context=f"{sentence}。")


def rewriting(draw: Draw) -> Fact:
    """把 to 被 and back, politeness, negation, a statement made a question."""
    person = draw.person()
    way = draw.one(("被", "把", "客气", "否定", "疑问"))
    if way in ("被", "把"):
        thing, done = draw.one(words.HANDLED)
        active, passive = f"{person}把{thing}{done}了。", f"{thing}被{person}{done}了。"
        before, after = (active, passive) if way == "被" else (passive, active)
        key: tuple[object, ...] = (person, thing)
        question = draw.one((f"把下面的句子改成{way}字句。", f"请用“{way}”字改写这句话："))
        plain = f"{before}改成{way}字句，{after}"
    elif way == "客气":
        request = draw.one(words.REQUESTS)
        before, after = f"{person}，{request}。", f"{person}，请您{request}，谢谢。"
        key = (person, request)
        question = draw.one(("把下面的话说得客气一些。", "请用礼貌的说法改写："))
        plain = f"{before}说得客气一些，{after}"
    else:
        likes, hobby = draw.one(("喜欢", "会", "常常")), draw.one(words.HOBBIES)
        before = f"{person}{likes}{hobby}。"
        negative = "不" + likes
        after = f"{person}{negative}{hobby}。" if way == "否定" else f"{person}{likes}{hobby}吗？"
        key = (person, hobby, way)
        question = draw.one((f"把这句话改成{way}句。", f"请改写成{way}句："))
        plain = f"{before}改成{way}句，{after}"
    return Fact(key, (question, after), plain, context=before)


def _noun_phrase(draw: Draw) -> tuple[tuple[object, ...], str, str]:
    """Its key, and one counted and coloured thing in Chinese and English."""
    chinese, measure, singular, plural = draw.one(words.NOUNS)
    count = draw.number(1, 10)
    colour = draw.one(list(words.COLOURS))
    zh = f"{words.COUNTS_ZH[count - 1]}{measure}{colour}的{chinese}"
    en = f"{words.COUNTS[count - 1]} {words.COLOURS[colour]} {singular if count == 1 else plural}"
    return (count, colour, chinese), zh, en


def translation(draw: Draw) -> Fact:
    """Counted coloured things, alone or owned, Chinese to English and back."""
    key, zh, en = _noun_phrase(draw)
    if draw.chance(0.4):
        owner = draw.one(list(words.OWNERS))
        zh, en = f"{owner}{zh}。", f"{words.OWNERS[owner]} {en}."
    if draw.chance(0.5):
        question = draw.one((f"翻译成英文：{zh}", f"请把“{zh}”译成英文。", f"“{zh}”用英文怎么说？"))
        return Fact(key, (question, en), f"“{zh}”的英文是“{en}”")
    question = draw.one((f"翻译成中文：{en}", f"请把“{en}”译成中文。", f"“{en}”是什么意思？"))
    return Fact(key, (question, zh), f"“{en}”的中文是“{zh}”")


def closed_qa(draw: Draw) -> Fact:
    """Questions whose answer stands in the passage: who, where, when, what, how much."""
    person, time, place = draw.person(), draw.time(), draw.one(list(words.PLACES))
    act, cost = draw.one(words.PLACES[place]), f"{draw.digits(2)}元"
    passage = draw.one(
        (
            f"{time}，{person}到{place}{act}，花了{cost}。",
            f"{person}花了{cost}，{time}去{place}{act}。",
        )
    )
    question, answer = draw.one(
        (
            (f"是谁去了{place}？", person),
            (f"{person}去了哪里？", place),
            (f"{person}什么时候去的？", time),
            (f"{person}去做什么？", act),
            (f"{person}花了多少钱？", cost),
        )
    )
    plain = f"{passage}{person}去了{place}，是{time}去的，去{act}，花了{cost}。"
    key = (passage, question)
    if draw.chance(0.5):
        return Fact(key, (f"{passage}{draw.one(('请问', '问题：'))}{question}", answer), plain)
    asked = draw.one((f"阅读下面的话，回答问题：{question}", f"根据材料回答：{question}"))
    return Fact(key, (asked, answer), plain, context=passage)


def choice(draw: Draw) -> Fact:
    """Which of three belongs to a category, or does not."""
    wanted, other = draw.some(list(words.CATEGORIES), 2)
    odd = draw.chance(0.5)
    many, few = (wanted, other) if odd else (other, wanted)
    answer = draw.one(words.CATEGORIES[few])
    options = [answer, *draw.some(words.CATEGORIES[many], 2)]
    key = (*sorted(options), odd)
    options = draw.some(options, 3)
    listed = "、".join(options)
    is_ = "不是" if odd else "是"
    question = draw.one(
        (
            f"下面哪一个{is_}{wanted}：{listed}？",
            f"{listed}，哪个{is_}{wanted}？",
            f"请选出{is_}{wanted}的词：{listed}",
        )
    )
    if draw.chance(0.5):
        plain = f"{listed}里，{answer}{is_}{wanted}。"
    else:
        plain = "".join(f"{word}是{few if word == answer else many}。" for word in options)
    return Fact(key, (question, answer), plain)
