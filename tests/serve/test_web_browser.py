"""The page in headless Chromium: typed into, stopped, reloaded, compared, on a phone's width; nothing leaves."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from tests.serve.scripted_engine import WAIT, ScriptedEngine
from typer.testing import CliRunner

from tuoling.cli.main import app
from tuoling.language import speaking
from tuoling.serve.web import address, page_server, web_app
from tuoling.serve.web_answer import WebModels
from tuoling.text.conversation import Conversation

# Looked for, not imported: gradio takes four seconds, also of a run that leaves these tests out.
for package in ("gradio", "fastapi", "uvicorn", "playwright"):
    if find_spec(package) is None:
        pytest.skip(f"needs {package} (extras serve and dev)", allow_module_level=True)

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.slow

PATIENCE_MS = 120_000
"""A machine may be busy. What does not come at all fails the test all the same."""

ENDLESS = "说个没完"
MARKDOWN = """前面 <b id="bold">不是标签</b> <script>document.title = "broken in"</script>

```python
print("<i>你好</i>")
```

| 方法 | 显存 |
|---|---|
| lora | 9 GB |

![外面](https://elsewhere.example/x.png)"""


def tuned(conversation: Conversation) -> str:
    question = conversation.turns[-1].text
    if question == ENDLESS:
        return "很很很" + WAIT + "不该有的"
    return MARKDOWN if question == "写个表格" else f"第{len(conversation.turns)}句：{question}"


@dataclass
class Served:
    """The page's server, and a browser. elsewhere: addresses that pages asked for and should not have."""

    url: str
    browser: Any
    tuned: ScriptedEngine
    base: ScriptedEngine
    elsewhere: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def visit(self, *, phone: bool = False, language: str = "zh-CN") -> Any:
        """A page of somebody who was never here before."""
        context = self.browser.new_context(
            viewport={"width": 390, "height": 844} if phone else {"width": 1280, "height": 800},
            has_touch=phone,
            is_mobile=phone,
            locale=language,
        )
        context.set_default_timeout(PATIENCE_MS)
        context.on("request", self._notice)
        context.on("requestfailed", self._kept_in)
        page = context.new_page()
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on(
            "console",
            lambda said: said.type == "error" and self.complaints.append(f"{said.text} {said.location}"),
        )
        page.goto(self.url)
        page.wait_for_selector("html.ready")
        return page

    def _kept_in(self, request: Any) -> None:
        if request.failure == "csp":  # the page's own rules stopped it before it left
            self.elsewhere.remove(request.url)

    def _notice(self, request: Any) -> None:
        """Every request that a page makes. (A route would do as well and turn the browser's cache off: twice as slow.)"""
        if not request.url.startswith((self.url + "/", "data:", f"blob:{self.url}/")):
            self.elsewhere.append(request.url)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    mine = ScriptedEngine(tuned)
    theirs = ScriptedEngine(lambda conversation: "不知道", fingerprint="base")
    from playwright.sync_api import sync_playwright

    from tuoling.serve import server

    found = server.listen(server.Address(port=0))
    with speaking("en"):
        page = web_app(WebModels({"tuned": mine, "base": theirs}), title="tuned")
    running = page_server(page)
    thread = Thread(target=running.run, kwargs={"sockets": [found]})
    thread.start()
    try:
        with sync_playwright() as tools:
            browser = tools.chromium.launch(
                executable_path=CHROMIUM,
                args=["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"],
                timeout=PATIENCE_MS,
            )
            served = Served(address(found), browser, mine, theirs)
            yield served
            browser.close()
            assert served.elsewhere == []
    finally:
        running.should_exit = True
        thread.join()


def ask(page: Any, question: str) -> None:
    page.fill("#box textarea", question)
    page.press("#box textarea", "Enter")


def settled(page: Any, *questions: str) -> list[str]:
    """Wait until these are the questions in the first box and nobody is answering; what the model said to them."""
    page.wait_for_function(
        """questions => JSON.stringify([...document.querySelectorAll('#chat-0 .message.user')]
             .map(box => box.innerText.trim())) === JSON.stringify(questions)
           && document.querySelector("[data-busy='0']") && document.querySelector('#send')""",
        arg=list(questions),
        polling=100,
    )
    return said(page)


def said(page: Any, column: int = 0) -> list[str]:
    return [text.strip() for text in page.locator(f"#chat-{column} .message.bot").all_inner_texts()]


def test_a_talk_from_its_first_word_to_its_last(served: Served) -> None:
    page = served.visit()
    ask(page, ENDLESS)
    page.wait_for_selector("#chat-0 .message.bot >> text=很很很")  # it grows while it is made
    assert page.is_visible("#stop") and not page.is_visible("#send")
    assert page.is_disabled("#retry") and page.is_disabled("#undo") and page.is_disabled("#clear")
    page.click("#stop")
    [stopped] = settled(page, ENDLESS)
    assert stopped == "很很很" and "已停止" in page.inner_text("#status") and served.tuned.at_once == 0

    ask(page, "你好")
    assert settled(page, ENDLESS, "你好") == [stopped, "第3句：你好"]
    history = served.tuned.asked[-1][0]
    assert [turn.text for turn in history.turns] == [ENDLESS, stopped, "你好"]
    used = len("\n".join([ENDLESS, stopped, "你好"])) + len("第3句：你好")
    assert f"{used:,} / 1,000 tokens" in page.inner_text("#meter")

    served.tuned.say = lambda conversation: "重新说"
    page.click("#retry")
    page.wait_for_selector("#chat-0 .message.bot >> text=重新说")
    served.tuned.say = tuned
    assert settled(page, ENDLESS, "你好") == [stopped, "重新说"]

    page.reload()
    page.wait_for_selector("html.ready")
    assert settled(page, ENDLESS, "你好") == [stopped, "重新说"]

    with page.expect_download() as download:
        page.click("#save")
    assert re.fullmatch(r"tuoling-[\d-]+\.jsonl", download.value.suggested_filename)
    [row] = map(json.loads, Path(download.value.path()).read_text(encoding="utf-8").splitlines())
    assert [message["content"] for message in row["messages"]] == [ENDLESS, stopped, "你好", "重新说"]

    page.click("#undo")
    assert settled(page, ENDLESS) == [stopped]
    page.wait_for_function("() => document.querySelector('#box textarea').value === '你好'")
    page.click("#clear")
    assert settled(page) == [] and served.complaints == []
    assert page.evaluate("() => Object.keys(localStorage).filter(key => !key.startsWith('tuoling-'))") == []
    page.context.close()


def correct(page: Any, kind: str, number: int, text: str) -> None:
    """Edit a question or an answer: the pencil, the new text, the tick."""
    buttons = page.locator(f"#chat-0 .message-buttons-{'right' if kind == 'user' else 'left'}").nth(number)
    buttons.locator("button").nth(1).click()
    page.locator("#chat-0 textarea").fill(text)
    buttons.locator("button").nth(0).click()


def test_messages_are_edited_and_markdown_is_drawn(served: Served) -> None:
    page = served.visit()
    ask(page, "一")
    assert settled(page, "一") == ["第1句：一"]
    ask(page, "二")
    assert settled(page, "一", "二") == ["第1句：一", "第3句：二"]

    correct(page, "bot", 0, "我改过的 <b>回答</b>")  # the model is told what now stands there
    page.wait_for_selector("#chat-0 .message.bot >> text=我改过的 <b>回答")
    ask(page, "三")
    settled(page, "一", "二", "三")
    assert [turn.text for turn in served.tuned.asked[-1][0].turns][1] == "我改过的 <b>回答</b>"

    correct(page, "user", 1, "写个表格")  # asked anew, and what came after it is forgotten
    settled(page, "一", "写个表格")
    box = page.locator("#chat-0 .message.bot").nth(1)
    assert box.locator("td").all_inner_texts() == ["lora", "9 GB"]
    assert 'print("<i>你好</i>")' in box.locator("pre code").inner_text()
    assert page.locator("#bold").count() == 0 and "<b id=" in box.inner_text()
    assert page.title() == "tuned · Tuoling"
    assert page.evaluate("document.documentElement.scrollWidth") == 1280
    page.context.close()


def knob(page: Any, name: str) -> Any:
    return page.locator(f"#knob-{name} input").first


def test_settings_reach_the_model_and_come_back(served: Served) -> None:
    page = served.visit(language="en-US")
    assert knob(page, "temperature").is_disabled() and page.is_disabled("#knob-show_beams input")
    page.check("#knob-do_sample input")
    page.wait_for_function("() => !document.querySelector('#knob-temperature input').disabled")
    for name, value in {"temperature": "0.3", "seed": "7", "num_beams": "3"}.items():
        knob(page, name).fill(value)
        knob(page, name).press("Tab")
    page.fill("#knob-system textarea", "You are brief.")
    page.wait_for_function("() => !document.querySelector('#knob-show_beams input').disabled")
    page.check("#knob-show_beams input")
    ask(page, "hello")
    page.wait_for_selector("#chat-0 >> text=Other beams (2)")
    settled(page, "hello")
    conversation, settings = served.tuned.asked[-1]
    assert [turn.text for turn in conversation.turns] == ["You are brief.", "hello"]
    assert (settings.samples, settings.temperature, settings.seed, settings.num_beams) == (True, 0.3, 7, 3)
    beams = page.locator("#chat-0 .message.bot").nth(1)
    assert "第2句：hello2" in beams.inner_text() and "第2句：hello3" in beams.inner_text()

    page.reload()
    page.wait_for_selector("html.ready")
    assert knob(page, "temperature").input_value() == "0.3" and not knob(page, "temperature").is_disabled()
    assert page.input_value("#knob-system textarea") == "You are brief."
    page.click("#reset")
    page.wait_for_function("() => document.querySelector('#knob-num_beams input').value === '1'")
    page.wait_for_function("() => document.querySelector('#knob-temperature input').disabled")
    ask(page, "again")
    settled(page, "hello", "again")
    assert served.tuned.asked[-1][1] == served.tuned.defaults

    ask(page, "long " * 300)
    page.wait_for_selector("#chat-0 >> text=the prompt has 1499 tokens")
    page.wait_for_selector("#chat-0 >> text=shorten the question")
    page.context.close()


ENGLISH_WORDS = {"tuned", "base", "Tuoling", "token", "tokens", "Top", "p", "k", "Enter", "English", "s"}
"""Latin words that a Chinese reader meets on the page."""


def test_two_models_side_by_side_on_a_phone_in_chinese(served: Served) -> None:
    page = served.visit(phone=True)  # the server speaks English
    page.click("#toggle-panel")
    seen = page.inner_text("body")
    assert set(re.findall("[A-Za-z]+", seen)) <= ENGLISH_WORDS
    assert page.get_attribute("html", "lang") == "zh-CN"
    page.click("#knob-other input")
    page.get_by_role("option", name="base").click()
    page.wait_for_selector("#chat-1")
    page.touchscreen.tap(380, 400)
    page.wait_for_function("() => !document.documentElement.classList.contains('panel-open')")
    ask(page, "你好")
    settled(page, "你好")
    assert said(page, 0) == ["第1句：你好"] and said(page, 1) == ["不知道"]
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    for name in ("send", "retry", "undo", "clear", "save", "speak", "dark", "meter"):
        box = page.locator(f"#{name}").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["y"] + box["height"] <= 844, name
    with page.expect_download() as download:
        page.click("#save")
    rows = [json.loads(line) for line in Path(download.value.path()).read_text(encoding="utf-8").splitlines()]
    assert [row["model"] for row in rows] == ["tuned", "base"]

    page.click("#speak")
    page.wait_for_selector("#send >> text=Send")
    assert not re.search("[\u4e00-\u9fff]", page.inner_text("#composer"))
    assert page.get_attribute("html", "lang") == "en"
    page.reload()  # it stays what was chosen
    page.wait_for_selector("html.ready")
    page.wait_for_selector("#send >> text=Send")
    page.context.close()


def test_two_people_at_once_see_only_their_own(served: Served) -> None:
    first, second = served.visit(), served.visit(language="en-US")
    ask(first, ENDLESS)
    first.wait_for_selector("#chat-0 .message.bot >> text=很很很")
    ask(second, "秘密乙")
    second.wait_for_selector("#status >> text=waiting: 1 before you")
    first.click("#stop")
    settled(first, ENDLESS)
    assert settled(second, "秘密乙") == ["第1句：秘密乙"]
    ask(first, "秘密甲")
    assert settled(first, ENDLESS, "秘密甲")[1] == "第3句：秘密甲"
    assert served.tuned.most_at_once == 1
    for page, others in ((first, "秘密乙"), (second, "秘密甲")):
        assert others not in page.content()
        page.context.close()
    assert [turn.text for turn in served.tuned.asked[-1][0].turns] == [ENDLESS, "很很很", "秘密甲"]


def test_a_page_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    def say(*words: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["web", *words])
        assert "Traceback" not in result.output
        return result.exit_code, " ".join(result.output.split())

    assert say()[0] == 2  # no model
    code, words = say(str(tmp_path / "nowhere"), "--port", "0")
    assert code == 1 and "nowhere" in words
    from tuoling.serve import server

    with server.listen(server.Address(port=0)) as taken:
        port = taken.getsockname()[1]
        code, words = say(str(tmp_path), "--port", str(port))
    assert code == 2 and f"127.0.0.1:{port}" in words and "--port" in words
    code, words = say(str(tmp_path), "--host", "300.1.1.1")
    assert code == 2 and "300.1.1.1" in words
    code, words = say(str(tmp_path), "--adapter", "a=x", "--adapter", "a=y")
    assert code == 2 and "--adapter" in words
