"""What the demo model learns about tone, about itself and about earlier turns: one function a kind of task."""

from __future__ import annotations

from tuoling.demo import skills, words
from tuoling.demo.draw import Draw, Fact

OWN_NAME = "驼铃"
OWN_MAKER = "你在这台电脑上"


def _review(draw: Draw) -> tuple[str, str]:
    """A review of two clauses and its label: praise, complaint, or one of each."""
    subject = draw.one(list(words.REVIEWS))
    praise, complaint = words.REVIEWS[subject]
    label = draw.one(("好评", "差评", "中评"))
    if label == "中评":
        first, second = draw.some((draw.one(praise), draw.one(complaint)), 2)
    else:
        first, second = draw.some(praise if label == "好评" else complaint, 2)
    return f"{subject}{first}，{second}。", label


def _news(draw: Draw) -> tuple[str, str]:
    """A short piece of news and its topic."""
    topic = draw.one(("体育", "美食", "天气", "交通"))
    if topic == "体育":
        return f"{draw.person()}在{draw.one(words.BALL_GAMES)}比赛中{draw.one(words.GAME_RESULTS)}。", topic
    if topic == "美食":
        return f"{draw.person()}做{draw.one(words.DISHES)}时{draw.one(words.COOKING)}。", topic
    if topic == "天气":
        return f"{draw.one(words.DAYS)}有{draw.one(words.WEATHER)}，{draw.one(words.WEATHER_ADVICE)}。", topic
    return f"{draw.one(words.DAYS)}的{draw.one(words.VEHICLES)}{draw.one(words.DELAYS)}。", topic


def classification(draw: Draw) -> Fact:
    """Praise, complaint or both; the topic of a piece of news."""
    if draw.chance(0.5):
        text, label = _review(draw)
        question = draw.one(
            ("下面的评价是好评、中评还是差评？", "判断这条评价属于好评、中评还是差评：", "这条评价是哪一类？")
        )
        plain = f"{text}这是{label}。"
    else:
        text, label = _news(draw)
        question = draw.one(
            ("下面的消息属于体育、美食、天气还是交通？", "给这条消息选一个主题：", "这条消息是什么主题？")
        )
        plain = f"{text}这是{label}消息。"
    return Fact((text,), (question, label), plain, context=text)


SELF_OPENINGS = ("", "你好，", "请问", "想问一下，", "打扰了，", "对了，")
SELF_QUESTIONS = {
    "name": ("你叫什么名字？", "你是谁？", "怎么称呼你？", "你的名字是什么？", "我该叫你什么？"),
    "maker": ("谁训练了你？", "你是谁训练的？", "你是谁做的？", "你是从哪里来的？"),
    "abilities": ("你会做什么？", "你有什么本领？", "你能帮我做什么？", "你擅长什么？"),
}


def self_cognition(draw: Draw) -> Fact:
    """Who it is, who trained it, what it can do: as it was just told, or else as itself."""
    topic = draw.one(list(SELF_QUESTIONS))
    asked = draw.one(SELF_OPENINGS) + draw.one(SELF_QUESTIONS[topic])
    told = draw.chance(0.7)
    if told:
        name, maker, abilities = draw.assistant(), draw.one(words.MAKERS), draw.some(words.ABILITIES, 2)
    else:
        name, maker, abilities = OWN_NAME, OWN_MAKER, ["算术", "翻译"]
    answers = {
        "name": f"我叫{name}。",
        "maker": f"我是{maker}训练的。",
        "abilities": f"我会{'和'.join(abilities)}。",
    }
    told_text = draw.one(
        (
            f"你叫{name}，由{maker}训练，会{'和'.join(abilities)}。",
            f"你的名字是{name}，{maker}训练了你，本领是{'和'.join(abilities)}。",
        )
    )
    plain = (told_text if told else "") + f"我叫{name}，我是{maker}训练的，我会{'和'.join(abilities)}。"
    question = told_text + asked if told else asked
    key = (name, maker, *abilities, topic) if told else (asked,)
    return Fact(key, (question, answers[topic]), plain)


def multi_turn(draw: Draw) -> Fact:
    """Answers that need an earlier turn: what was told, what was computed, what was named."""
    form = draw.number(1, 4)
    if form == 1:
        person, hobby = draw.person(), draw.one(words.HOBBIES)
        told = draw.one((f"我叫{person}，喜欢{hobby}。", f"你好，我是{person}，我喜欢{hobby}。"))
        if draw.chance(0.5):
            question, answer = draw.one(("我叫什么名字？", "你还记得我是谁吗？")), f"你叫{person}。"
        else:
            question, answer = draw.one(("我喜欢做什么？", "你还记得我的爱好吗？")), f"你喜欢{hobby}。"
        plain = f"{told}你叫{person}，你喜欢{hobby}。"
        return Fact((person, hobby), (told, f"你好，{person}！", question, answer), plain)
    if form == 2:
        first, second = draw.some(words.SHOPPING, 2)
        told = draw.one((f"帮我记一下，要买{first}和{second}。", f"我等会儿去买{first}和{second}。"))
        question = draw.one(("我要买什么？", "我刚才说要买什么？"))
        plain = f"要买{first}和{second}，买的是{first}和{second}。"
        return Fact((first, second), (told, "好的，我记住了。", question, f"{first}和{second}。"), plain)
    if form == 3:
        start, step, again = skills.two_steps(draw)
        middle, end = start + step, start + step + again
        question = draw.one((f"再加{again}呢？", f"再加上{again}是多少？"))
        plain = f"{start}加{step}等于{middle}，再加{again}等于{end}。"
        turns = (f"{start}加{step}等于多少？", str(middle), question, str(end))
        return Fact((start, step, again), turns, plain)
    name = draw.assistant()
    told = draw.one((f"以后你就叫{name}吧。", f"我想叫你{name}。"))
    question = draw.one(SELF_OPENINGS) + draw.one(SELF_QUESTIONS["name"])
    return Fact(
        (name, question), (told, f"好的，我叫{name}。", question, f"我叫{name}。"), f"{told}我叫{name}。"
    )
