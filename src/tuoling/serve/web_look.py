"""How the web page looks: theme, small pieces of HTML, and what runs in the browser itself."""

from __future__ import annotations

import json
from html import escape
from importlib import resources
from typing import Any, get_args

from tuoling.environment import Language
from tuoling.serve.web_texts import page_texts

LANGUAGES: tuple[Language, ...] = get_args(Language)

FONTS = (
    "system-ui",
    "-apple-system",
    "Segoe UI",
    "PingFang SC",
    "Microsoft YaHei",
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "sans-serif",
)
"""What the reader's machine has: nothing is fetched."""

MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "Noto Sans Mono CJK SC", "monospace")

TOGGLE_PANEL = """() => {
  const narrow = window.matchMedia('(max-width: 860px)').matches;
  document.documentElement.classList.toggle(narrow ? 'panel-open' : 'panel-shut');
}"""

TOGGLE_DARK = """() => {
  const dark = document.body.classList.toggle('dark');
  localStorage.setItem('tuoling-dark', dark ? '1' : '0');
}"""

ARRIVE = """(talk, language, settings) => {
  const own = (navigator.language || '').toLowerCase().startsWith('zh') ? 'zh' : 'en';
  return [talk, language === 'zh' || language === 'en' ? language : own, settings];
}"""
"""On the first visit the page speaks the browser's language: a server's locale says nothing about its readers."""

COPY = '[title="Copy message"]'
"""gradio's own button, which knows one language."""

READY = "() => document.documentElement.classList.add('ready')"
"""The page has become what it was when it was left: what is done from now on stays."""

_SCRIPT = """<script>
(() => {
  const kept = localStorage.getItem('tuoling-dark');
  const dark = kept === null ? matchMedia('(prefers-color-scheme: dark)').matches : kept === '1';
  const apply = () => document.body && document.body.classList.toggle('dark', dark);
  document.addEventListener('DOMContentLoaded', apply);
  window.addEventListener('load', () => setTimeout(apply, 0));
  document.addEventListener('click', (event) => {   // a tap beside the drawer shuts it
    const root = document.documentElement;
    if (!root.classList.contains('panel-open')) return;
    if (event.target.closest('#panel, #toggle-panel, .options')) return;
    root.classList.remove('panel-open');
  });
  document.addEventListener('pointerover', (event) => {   // gradio has no other word for it
    const button = event.target.closest('[title="Copy message"]');
    const word = document.documentElement.dataset.copy;
    if (button && word) { button.title = word; button.setAttribute('aria-label', word); }
  });
})();
</script>"""

DOWNLOAD = """(rows) => {
  if (!rows) return;
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([rows], {type: 'application/jsonl'}));
  link.download = 'tuoling-' + new Date().toISOString().slice(0, 19).replace(/[T:]/g, '-') + '.jsonl';
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}"""

BELL = (
    '<svg viewBox="0 0 24 24" width="22" height="22" fill="none" stroke="currentColor" stroke-width="1.7" '
    'stroke-linecap="round" stroke-linejoin="round" aria-hidden="true"><path d="M9 4.5a3 3 0 0 1 6 0"/>'
    '<path d="M12 4.5c-3.6 0-5 2.7-5.3 6.2L6 17.5h12l-.7-6.8C17 7.2 15.6 4.5 12 4.5z"/><path d="M4.8 17.5h14.4"/>'
    '<circle cx="12" cy="19.8" r="1.5"/></svg>'
)


def speaks() -> str:
    """Tells the browser which language the page speaks now, and gives a name to what only shows a sign.

    Fonts then draw Chinese characters the Chinese way, and screen readers read them so.
    """
    words = {
        language: {"#toggle-panel": texts.settings, "#dark": texts.light, COPY: texts.copy}
        for language in LANGUAGES
        for texts in [page_texts(language)]
    }
    return f"""(language) => {{
      const root = document.documentElement, words = ({json.dumps(words, ensure_ascii=False)})[language];
      root.lang = language === 'zh' ? 'zh-CN' : language;
      root.dataset.copy = words['{COPY}'];
      for (const [name, word] of Object.entries(words))
        for (const element of document.querySelectorAll(name)) {{
          element.title = word;
          element.setAttribute('aria-label', word);
        }}
    }}"""


def remember(knobs: tuple[str, ...]) -> str:
    """Keeps the panel's values in the browser, without asking the server."""
    names = ", ".join(f'"{name}"' for name in knobs)
    return f"(...values) => [Object.fromEntries([{names}].map((name, i) => [name, values[i]]))]"


def head() -> str:
    """The page's style sheet and script. gradio's own `css` would put every rule below its frame, out of reach of
    the classes that the script sets on the root."""
    sheet = resources.files("tuoling.serve").joinpath("web.css").read_text(encoding="utf-8")
    return f"<style>\n{sheet}</style>\n{_SCRIPT}"


def brand(title: str) -> str:
    """Our mark and the model's name."""
    return f'<span class="bell">{BELL}</span><span class="name">驼铃</span><span class="model">{escape(title)}</span>'


def status(said: str, *, busy: bool = False) -> str:
    """The line about the newest answer. It is read out where somebody listens to the page."""
    dots = '<span class="busy" aria-hidden="true"></span>' if busy else ""
    return f'<div class="status" role="status" data-busy="{int(busy)}">{dots}{escape(said)}</div>'


def meter(used_tokens: int, limit_tokens: int) -> str:
    """How full the model's context is."""
    share = min(1.0, used_tokens / max(limit_tokens, 1))
    level = "full" if share > 0.9 else "high" if share > 0.7 else "low"
    label = f"{used_tokens:,} / {limit_tokens:,}"
    return (
        f'<div class="meter {level}" role="meter" aria-valuemin="0" aria-valuemax="{limit_tokens}" '
        f'aria-valuenow="{used_tokens}" title="{label} tokens"><span class="bar">'
        f'<span style="width:{share:.1%}"></span></span><span class="label">{label}<span class="unit"> tokens</span></span></div>'
    )


def theme() -> Any:
    """Sand and bronze, quiet; both lights."""
    import gradio as gr
    from gradio.themes import Color, Font

    bronze = Color(
        "#faf6ef", "#f3eadb", "#e8d6b8", "#dabd8c", "#c9a062", "#a97f42",
        "#8f6834", "#74522b", "#5b4124", "#44311c", "#2e2114",
    )  # fmt: skip
    stone = Color(
        "#fafaf8", "#f4f3ef", "#e8e6df", "#d5d2c8", "#a8a498", "#78746a",
        "#57544c", "#42403a", "#2a2925", "#1d1c19", "#131210",
    )  # fmt: skip
    return gr.themes.Base(
        primary_hue=bronze,
        secondary_hue=bronze,
        neutral_hue=stone,
        font=[Font(name) for name in FONTS],
        font_mono=[Font(name) for name in MONO],
        radius_size="lg",
        text_size="md",
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_border_width="0px",
        block_shadow="none",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        input_background_fill="white",
        input_background_fill_dark="*neutral_900",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_500",
        button_primary_text_color="white",
        slider_color="*primary_500",
        slider_color_dark="*primary_400",
    )
