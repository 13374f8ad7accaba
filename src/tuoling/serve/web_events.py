"""What happens on the web page when a person does something.

Everything that belongs to one person (the talk, the settings, the language) lies in that person's browser and comes
along with each event, so the events here are functions of what they are given. The one thing kept on this side is
which answers are being made, so that Stop finds them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from threading import Event
from typing import Any

from tuoling.environment import Language
from tuoling.errors import TuolingError
from tuoling.language import speaking, spoken, tr
from tuoling.serve import web_controls, web_look
from tuoling.serve.web_answer import Frame, WebModels, answer, context_used, summary
from tuoling.serve.web_controls import KNOBS, idle_knobs, wish_of
from tuoling.serve.web_messages import from_markdown, messages
from tuoling.serve.web_parts import Changes, Parts, known, known_edit, known_now
from tuoling.serve.web_talk import COLUMNS, Talk
from tuoling.serve.web_texts import page_texts

KEEP_EVERY = 25
"""Pictures between two copies of a growing answer in the browser: a second of it at most is lost by a reload."""


class Events:
    """What a person can do. Methods take the page's name, the talk, the language and the panel's values, in this order."""

    def __init__(self, models: WebModels, parts: Parts) -> None:
        self._models = models
        self._parts = parts
        self._running: dict[str, Event] = {}

    def connect(self, page: Any) -> None:
        """Join the components to the methods below."""
        import gradio as gr

        parts = self._parts
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        now = {**quiet, "queue": False}
        # people wait in our own line, which tells them how long it is; gradio's would hold one event at a time
        long: dict[str, Any] = {**quiet, "concurrency_limit": None}
        given, changed, knobs = parts.inputs, parts.of_an_answer, parts.controls.inputs
        gr.on([parts.box.submit, parts.send.click], known(self.ask), [parts.box, *given], changed, **long)
        parts.retry.click(known(self.retry), given, changed, **long)
        for column, chat in enumerate(parts.chats):
            chat.edit(known_edit(self.edit, column), given, changed, **long)
        parts.stop.click(known_now(self.stop), None, None, **now)
        page.unload(known_now(self.stop))
        parts.undo.click(known_now(self.undo), given, changed, **now)
        parts.clear.click(known_now(self.clear), given, changed, **now)
        parts.save.click(self.rows, given, parts.saved_rows, **now).then(
            None, parts.saved_rows, None, js=web_look.DOWNLOAD, **quiet
        )
        parts.controls.reset.click(self.reset, None, knobs, **now)
        for name in ("do_sample", "temperature", "num_beams"):
            parts.controls.knobs[name].change(self.grey, knobs, knobs, **now)
        for name in ("model", "other"):
            parts.controls.knobs[name].change(known_now(self.show), given, changed, **now)
        gr.on(
            [knob.change for knob in knobs], None, knobs, parts.settings, js=web_look.remember(KNOBS), **quiet
        )
        spoken_parts = [parts.language, *self._labelled(), *changed]
        said = {"fn": None, "inputs": parts.language, "outputs": None, **quiet}
        parts.speak.click(known_now(self.speak), given, spoken_parts, **now).then(
            js=web_look.speaks(), **said
        )
        kept = [parts.talk, parts.language, parts.settings]
        page.load(self.restore, kept, spoken_parts, js=web_look.ARRIVE, **now).then(
            js=web_look.speaks(), **said
        ).then(None, js=web_look.READY, **quiet)

    # -- answers -------------------------------------------------------------------------------------------------

    def ask(self, session: str, question: str, talk: Any, language: Language, *values: Any) -> Iterator[Any]:
        """A new question."""
        if not question.strip():
            return
        yield from self._answer(session, Talk.from_json(talk), question.strip(), language, values)

    def retry(self, session: str, talk: Any, language: Language, *values: Any) -> Iterator[Any]:
        """The last question again."""
        before, question = Talk.from_json(talk).taken_back()
        if question is not None:
            yield from self._answer(session, before, question, language, values)

    def edit(
        self, session: str, place: tuple[int, int, str], talk: Any, language: Language, *values: Any
    ) -> Iterator[Any]:
        """A question changed is asked anew, what came after it is forgotten; an answer changed is kept as it is now.

        place: column, number of the message in it, its new text.
        """
        column, number, text = place
        now = Talk.from_json(talk)
        _, places = messages(now, column, beams=False)
        where = places[number] if number < len(places) else None
        text = from_markdown(text).strip()
        if where is None or not text:
            yield self._show(now, language, values)
        elif where.is_question:
            yield from self._answer(session, now.before(where.exchange), text, language, values)
        elif session in self._running:
            yield self._wait(language)
        else:
            yield self._show(now.corrected(where.exchange, column, text), language, values)

    def stop(self, session: str) -> None:
        """End the answers that this page is waiting for."""
        if (cancel := self._running.get(session)) is not None:
            cancel.set()

    def _answer(
        self, session: str, talk: Talk, question: str, language: Language, values: Sequence[Any]
    ) -> Iterator[Changes]:
        """Everything an answer changes, from the moment it is asked for."""
        import gradio as gr

        if session in self._running:
            yield self._wait(language)
            return
        try:
            with speaking(language):
                wish = wish_of(values, self._models)
        except TuolingError as error:
            raise gr.Error(str(error)) from error
        cancel = self._running[session] = Event()
        beams = bool(values[KNOBS.index("show_beams")])
        frames = spoken(language, answer(self._models, talk, question, wish, cancel))
        try:
            with closing(frames):
                for number, frame in enumerate(frames):
                    changes = self._frame(frame, language, len(wish.models), beams)
                    if number == 0:
                        changes |= {self._parts.box: "", **self._buttons(language, answering=True)}
                    if number % KEEP_EVERY == 0:
                        changes[self._parts.talk] = frame.talk.to_json()
                    yield changes
        finally:
            cancel.set()
            if self._running.get(session) is cancel:
                del self._running[session]

    def _frame(self, frame: Frame, language: Language, columns: int, beams: bool) -> Changes:
        parts = self._parts
        with speaking(language):
            changes: Changes = {parts.status: web_look.status(frame.said, busy=not frame.done)}
            for column in range(COLUMNS if frame.done else columns):
                if frame.answering in (None, column):
                    shown, _ = messages(frame.talk, column, answering=frame.answering, beams=beams)
                    changes[parts.chats[column]] = shown
        if frame.done:
            changes |= {
                **self._buttons(language, answering=False),
                parts.meter: self._meter(frame.talk),
                parts.talk: frame.talk.to_json(),
            }
        return changes

    def _buttons(self, language: Language, *, answering: bool) -> Changes:
        """What can be pressed: while an answer grows it can be stopped, and nothing else can happen to the talk."""
        import gradio as gr

        parts, texts = self._parts, page_texts(language)
        return {
            parts.send: gr.update(value=texts.send, visible=not answering),
            parts.stop: gr.update(value=texts.stop, visible=answering),
            **{
                button: gr.update(value=getattr(texts, name), interactive=not answering)
                for name, button in parts.others.items()
            },
        }

    def _wait(self, language: Language) -> Changes:
        """Something was asked for while an answer grows."""
        import gradio as gr

        with speaking(language):
            gr.Info(tr("an answer is being made: stop it first", "正在回答，请先停止"))
        return self._buttons(language, answering=True)

    # -- the talk ------------------------------------------------------------------------------------------------

    def undo(self, session: str, talk: Any, language: Language, *values: Any) -> Changes:
        """Take back the last exchange; its question goes back into the box."""
        if session in self._running:
            return self._wait(language)
        before, question = Talk.from_json(talk).taken_back()
        changes = self._show(before, language, values)
        if question is not None:
            changes[self._parts.box] = question
        return changes

    def clear(self, session: str, talk: Any, language: Language, *values: Any) -> Changes:
        """Forget the talk; the settings stay."""
        if session in self._running:
            return self._wait(language)
        return self._show(Talk(), language, values)

    def show(self, session: str, talk: Any, language: Language, *values: Any) -> Changes:
        """The talk as it is, after another model was chosen. An answer that grows meanwhile stays its columns' own."""
        if session in self._running:
            return self._columns(language, values)
        return self._show(Talk.from_json(talk), language, values)

    def rows(self, talk: Any, language: Language, *values: Any) -> str:
        """The talk as training rows, for the browser to keep as a file."""
        import gradio as gr

        with speaking(language):
            rows = Talk.from_json(talk).jsonl(str(values[KNOBS.index("system")] or "").strip())
            if not rows:
                gr.Info(tr("there is nothing to save yet", "还没有可保存的对话"))
        return rows

    def _show(self, talk: Talk, language: Language, values: Sequence[Any]) -> Changes:
        """A talk that nobody is answering just now."""
        parts = self._parts
        changes = self._columns(language, values)
        with speaking(language):
            for column, chat in enumerate(parts.chats):
                changes[chat]["value"] = messages(talk, column)[0]
            return {
                **changes,
                **self._buttons(language, answering=False),
                parts.talk: talk.to_json(),
                parts.status: web_look.status(summary(talk)),
                parts.meter: self._meter(talk),
            }

    def _columns(self, language: Language, values: Sequence[Any]) -> Changes:
        """Which chat boxes are seen, and their headings."""
        import gradio as gr

        given = dict(zip(KNOBS, values, strict=True))
        columns = 2 if given["other"] and given["other"] != given["model"] else 1
        return {
            chat: gr.update(
                visible=column < columns,
                label=given["other"] if column else given["model"],
                show_label=columns > 1,
                placeholder=page_texts(language).placeholder,
            )
            for column, chat in enumerate(self._parts.chats)
        }

    def _meter(self, talk: Talk) -> str:
        limit = web_controls.limit_tokens(self._models.first)
        return web_look.meter(context_used(talk), limit)

    # -- the panel -----------------------------------------------------------------------------------------------

    def reset(self) -> list[Any]:
        """The model's own settings."""
        values = web_controls.defaults(self._models)
        return [values[name] for name in KNOBS]

    def grey(self, *values: Any) -> list[Any]:
        """Knobs that change nothing just now are grey."""
        import gradio as gr

        idle = idle_knobs(dict(zip(KNOBS, values, strict=True)))
        return [gr.update(interactive=name not in idle) for name in KNOBS]

    def speak(self, session: str, talk: Any, language: Language, *values: Any) -> Changes:
        """The other language. An answer that grows meanwhile ends in the one it began in."""
        if session in self._running:
            return self._wait(language)
        other: Language = "en" if language == "zh" else "zh"
        return self._labels(other) | self._show(Talk.from_json(talk), other, values)

    def restore(self, talk: Any, language: Any, settings: Any) -> Changes:
        """The page as it was when it was left; on the first visit, in the browser's language."""
        import gradio as gr

        language = language if language in ("zh", "en") else "en"
        values = web_controls.defaults(self._models)
        known = settings if isinstance(settings, dict) else {}
        values |= {name: known[name] for name in KNOBS if name in known}
        for name in ("model", "other"):
            if values[name] not in self._models.engines:
                values[name] = web_controls.defaults(self._models)[name]
        idle = idle_knobs(values)
        changes = self._labels(language)
        for name, knob in self._parts.controls.knobs.items():
            words = changes[knob]
            changes[knob] = gr.update(**{**words, "value": values[name], "interactive": name not in idle})
        return changes | self._show(Talk.from_json(talk), language, [values[name] for name in KNOBS])

    def _labelled(self) -> list[Any]:
        """Components with words on them, besides those an answer changes."""
        parts = self._parts
        return [parts.save, parts.speak, parts.controls.reset, *parts.controls.inputs]

    def _labels(self, language: Language) -> Changes:
        import gradio as gr

        parts, texts = self._parts, page_texts(language)
        changes: Changes = {
            parts.language: language,
            parts.save: texts.save,
            parts.speak: texts.language,
            parts.controls.reset: texts.reset,
            parts.box: gr.update(placeholder=texts.ask, label=texts.question),
        }
        for name, knob in parts.controls.knobs.items():
            label, info = texts.knobs[name]
            changes[knob] = gr.update(label=label, info=info or None)
        return changes
