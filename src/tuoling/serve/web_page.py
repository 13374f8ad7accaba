"""The web page: its parts and where they stand. What they do is in web_events.py, how they look in web.css."""

from __future__ import annotations

from typing import Any

from tuoling import environment
from tuoling.environment import Language
from tuoling.files import sha256_text
from tuoling.serve import web_look
from tuoling.serve.web_answer import WebModels
from tuoling.serve.web_controls import build_panel
from tuoling.serve.web_events import Events
from tuoling.serve.web_parts import Parts
from tuoling.serve.web_talk import COLUMNS
from tuoling.serve.web_texts import page_texts


def build_page(models: WebModels, *, title: str) -> Any:
    """The page as gradio Blocks. title: the model's name, shown beside ours."""
    import gradio as gr

    language = environment.language()
    with gr.Blocks(title=f"{title} · Tuoling", analytics_enabled=False, fill_height=True) as page:
        parts = _lay_out(models, language, title)
        Events(models, parts).connect(page)
    return page


def _lay_out(models: WebModels, language: Language, title: str) -> Parts:
    import gradio as gr

    texts = page_texts(language)
    mark = sha256_text("\n".join(engine.fingerprint for engine in models.engines.values()))[:12]
    with gr.Row(elem_id="top"):
        toggle = gr.Button("☰", elem_id="toggle-panel", size="sm")
        brand = gr.HTML(web_look.brand(title), elem_id="brand")
        speak = gr.Button(texts.language, elem_id="speak", size="sm")
        dark = gr.Button("◐", elem_id="dark", size="sm")
    with gr.Row(elem_id="frame"):
        with gr.Column(elem_id="panel", scale=0, min_width=300):
            controls = build_panel(models, texts)
        with gr.Column(elem_id="main", scale=1, min_width=320):
            with gr.Row(elem_id="chats"):
                chats = [_chat_box(column, texts.placeholder) for column in range(COLUMNS)]
            with gr.Column(elem_id="composer"):
                with gr.Row(elem_id="ask"):
                    box = gr.Textbox(
                        placeholder=texts.ask,
                        label=texts.question,
                        show_label=False,
                        container=False,
                        lines=1,
                        max_lines=8,
                        autofocus=True,
                        elem_id="box",
                        scale=1,
                    )
                    send = gr.Button(texts.send, variant="primary", elem_id="send", scale=0, min_width=84)
                    stop = gr.Button(
                        texts.stop, variant="stop", elem_id="stop", scale=0, min_width=84, visible=False
                    )
                with gr.Row(elem_id="below"):
                    buttons = {
                        name: gr.Button(getattr(texts, name), elem_id=name, size="sm", scale=0, min_width=48)
                        for name in ("retry", "undo", "clear", "save")
                    }
                    status = gr.HTML("", elem_id="status")
                    meter = gr.HTML("", elem_id="meter")
    toggle.click(None, js=web_look.TOGGLE_PANEL)
    dark.click(None, js=web_look.TOGGLE_DARK)
    return Parts(
        **buttons,
        chats=chats,
        box=box,
        send=send,
        stop=stop,
        saved_rows=gr.Textbox(visible=False),
        status=status,
        meter=meter,
        speak=speak,
        brand=brand,
        controls=controls,
        talk=gr.BrowserState([], storage_key=f"tuoling-talk-{mark}", secret="tuoling"),
        settings=gr.BrowserState({}, storage_key=f"tuoling-settings-{mark}", secret="tuoling"),
        language=gr.BrowserState("", storage_key="tuoling-language", secret="tuoling"),
    )


def _chat_box(column: int, placeholder: str) -> Any:
    import gradio as gr

    return gr.Chatbot(
        elem_id=f"chat-{column}",
        elem_classes="chat",
        show_label=False,
        visible=column == 0,
        editable="all",
        buttons=["copy"],
        layout="bubble",
        height="100%",
        placeholder=placeholder,
        group_consecutive_messages=False,
        latex_delimiters=[
            {"left": "$$", "right": "$$", "display": True},
            {"left": "\\[", "right": "\\]", "display": True},
            {"left": "\\(", "right": "\\)", "display": False},
        ],
    )
