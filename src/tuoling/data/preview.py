"""What a row becomes, to be looked at: rendered text with learned tokens in colour, in the terminal or as HTML.

Shown is what the ids say, decoded token by token, not what the row says: a space that tokenisation adds, or a token
that is missing, can be seen. Without a tokenizer the template's text is shown, counted in characters.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from tuoling.data.row import Row
from tuoling.errors import TemplateError
from tuoling.language import tr
from tuoling.text.render import Learn, Segment
from tuoling.text.templates import Template
from tuoling.text.tokenizer import StreamDecoder, TextTokenizer

if TYPE_CHECKING:
    from rich.text import Text

Kind = Literal["text", "special"]


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring tokens of one kind. ids: empty where no tokenizer was given."""

    text: str
    learned: bool
    kind: Kind
    ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Preview:
    """One row as it will be trained.

    Where `unit` is "characters", tokens and learned count characters of text, and `ends` is empty.
    """

    place: str
    format: str
    runs: tuple[Run, ...]
    unit: Literal["tokens", "characters"]
    tokens: int = 0
    learned: int = 0
    ends: tuple[int, ...] = ()
    """Positions of learned end tokens (special ones), counted from 0."""
    over: int = 0
    """Tokens beyond max_seq_len."""
    problems: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The preview as plain values."""
        return asdict(self)


def preview(
    row: Row,
    *,
    template: Template,
    tokenizer: TextTokenizer | None,
    learn: Learn = "all",
    train_on_inputs: bool = False,
    max_seq_len: int | None = None,
) -> Preview:
    """What becomes of a row; a bad one shows its problems instead of text."""
    problems = tuple(problem.message for problem in row.problems)
    flags = tuple(flag.message for flag in row.flags)
    unit: Literal["tokens", "characters"] = "tokens" if tokenizer else "characters"
    if problems or row.conversation is None:
        return Preview(str(row.place), row.format, (), unit, problems=problems, flags=flags)
    try:
        if row.conversation.answer is None and not row.conversation.is_plain_text:
            segments = template.prompt(row.conversation)  # a question alone: what a model is asked
        else:
            segments = template.render(row.conversation, learn=learn, train_on_inputs=train_on_inputs)
    except TemplateError as error:
        return Preview(str(row.place), row.format, (), unit, problems=(error.problem,), flags=flags)
    runs = _token_runs(segments, tokenizer) if tokenizer else _character_runs(segments)
    sizes = [len(run.ids) if tokenizer else len(run.text) * (run.kind == "text") for run in runs]
    ends, position = [], 0
    for run, size in zip(runs, sizes, strict=True):
        position += size
        if tokenizer and run.kind == "special" and run.learned:
            ends.append(position - 1)
    learned = sum(size for run, size in zip(runs, sizes, strict=True) if run.learned)
    return Preview(
        place=str(row.place),
        format=row.format,
        runs=tuple(runs),
        unit=unit,
        tokens=position,
        learned=learned,
        ends=tuple(ends),
        over=max(0, position - max_seq_len) if max_seq_len and tokenizer else 0,
        flags=flags,
    )


def _token_runs(segments: Sequence[Segment], tokenizer: TextTokenizer) -> list[Run]:
    """Tokens decoded one by one and grouped. Half characters join the token that completes them."""
    ids, spans = tokenizer.encode_segments(segments)
    learned = [False] * len(ids)
    for begin, end in spans:
        learned[begin:end] = [True] * (end - begin)
    runs: list[Run] = []
    texts: list[str] = []
    held: list[int] = []
    stream = StreamDecoder(tokenizer, keep_special=True)

    def close(like: int, kind: Kind) -> None:
        texts.append(stream.flush())
        if held:
            runs.append(Run("".join(texts), learned[like], kind, tuple(held)))
        texts.clear()
        held.clear()

    for index, token_id in enumerate(ids):
        special = tokenizer.is_special(token_id)
        if held and (special or tokenizer.is_special(held[-1]) or learned[index] != learned[index - 1]):
            close(index - 1, "special" if tokenizer.is_special(held[-1]) else "text")
        texts.append(stream.push(token_id))
        held.append(token_id)
    if held:
        close(len(ids) - 1, "special" if tokenizer.is_special(held[-1]) else "text")
    return runs


def _character_runs(segments: Sequence[Segment]) -> list[Run]:
    runs: list[Run] = []
    for segment in segments:
        kind: Kind = "text" if segment.kind == "text" else "special"
        text = segment.text or f"‹{'bos' if segment.kind == 'start' else segment.kind}›"
        if segment.kind == "text" and not segment.text:
            continue
        if runs and kind == "text" and (runs[-1].kind, runs[-1].learned) == (kind, segment.learned):
            text = runs.pop().text + text
        runs.append(Run(text, segment.learned, kind))
    return runs


def summary(shown: Preview) -> str:
    """Counts and the place of the end tokens, in one line."""
    unit = tr(shown.unit, {"tokens": "个 token", "characters": "个字符"}[shown.unit])
    parts = [
        tr(
            f"{shown.tokens} {unit}, {shown.learned} learned",
            f"{shown.tokens} {unit}，学习 {shown.learned} 个",
        )
    ]
    if shown.ends:
        places = ", ".join(str(end) for end in shown.ends)
        parts.append(tr(f"end token at {places}", f"结束符位于 {places}"))
    elif shown.unit == "tokens":
        parts.append(tr("no end token of its own is learned", "没有学习单独的结束符"))
    if shown.over:
        parts.append(tr(f"{shown.over} over max_seq_len", f"超出 max_seq_len {shown.over} 个"))
    return tr("; ", "；").join(parts)


def to_rich(shown: Preview, *, ids: bool = False, marks: bool = False) -> Text:
    """For the terminal: learned text is green, end and other special tokens are boxed in, the rest is dim.

    marks: put ⟦ ⟧ around learned text too, for where there are no colours. ids: list every run's ids.
    """
    from rich.text import Text

    text = Text()
    text.append(f"{shown.place}", "bold")
    text.append(f"  {shown.format}\n", "dim")
    for problem in shown.problems:
        text.append(f"✗ {problem}\n", "red")
    for flag in shown.flags:
        text.append(f"! {flag}\n", "yellow")
    inside = False
    for run in shown.runs:
        if marks and run.learned != inside:
            text.append("⟦" if run.learned else "⟧")
        inside = run.learned
        style = {
            (True, "text"): "green",
            (True, "special"): "bold white on dark_green",
            (False, "text"): "dim",
            (False, "special"): "magenta",
        }[run.learned, run.kind]
        text.append(run.text, style)
        if ids and run.ids:
            text.append(f" {list(run.ids)} ", "cyan")
    if marks and inside:
        text.append("⟧")
    if shown.runs:
        text.append("\n" + summary(shown) + "\n", "italic")
    return text


_STYLE = """
:root { color-scheme: light dark; --back: #fbfaf7; --card: #ffffff; --line: #e2ded4; --text: #23211d; --dim: #77726a;
  --learned: #0b6b3a; --learned-back: #dff3e6; --special: #8b2f8f; --bad: #b3261e; --flag: #8a5a00; }
@media (prefers-color-scheme: dark) { :root { --back: #16171a; --card: #1e2024; --line: #34373d; --text: #e8e6e1;
  --dim: #9a958c; --learned: #8fe0ae; --learned-back: #17402a; --special: #dd9be0; --bad: #ff8a80; --flag: #ffca66; } }
body { background: var(--back); color: var(--text); margin: 0 auto; max-width: 52rem; padding: 2rem 1rem;
  font: 16px/1.7 "PingFang SC", "Hiragino Sans GB", "Noto Sans CJK SC", "Source Han Sans SC", "Microsoft YaHei",
  "WenQuanYi Micro Hei", system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .5rem; }
h2 { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 1rem; font-size: .95rem;
  font-weight: 600; margin: 0 0 .75rem; padding-bottom: .5rem; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; }
h2 small, footer, .legend { color: var(--dim); font-weight: 400; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; align-items: baseline; margin: 0; }
.legend strong { color: var(--text); font-weight: 600; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin: 1.25rem 0;
  padding: .75rem 1.25rem; }
.rendered { white-space: pre-wrap; overflow-wrap: anywhere; color: var(--dim); }
.learned, .key { background: var(--learned-back); color: var(--learned); border-radius: 4px; padding: .1em 0;
  box-decoration-break: clone; -webkit-box-decoration-break: clone; }
.key { padding: 0 .5em; }
.special { color: var(--special); font-family: ui-monospace, Consolas, monospace; font-size: .85em;
  border: 1px solid currentColor; border-radius: 3px; padding: 0 .25em; margin: 0 .1em; }
.learned.special { color: var(--learned); font-weight: 600; }
.ids { color: var(--dim); font: .75em ui-monospace, Consolas, monospace; }
.bad { color: var(--bad); } .flag { color: var(--flag); }
footer { display: flex; align-items: center; gap: .75rem; font-size: .85rem; margin-top: .75rem; }
.share { flex: 0 0 7rem; height: .4rem; border-radius: .2rem; background: var(--line); overflow: hidden; }
.share i { display: block; height: 100%; background: var(--learned); }
"""


def to_html(previews: Sequence[Preview], *, template: str, ids: bool = False) -> str:
    """One page that opens offline, in light and dark."""
    title = tr("What is learned", "模型学到的是什么")
    legend = (
        f"<span>{tr('template', '模板')} <strong>{html.escape(template)}</strong></span>"
        f'<span class="key">{tr("learned", "会被学习")}</span>'
        f"<span>{tr('only read', '只读不学')}</span>"
        f'<span><span class="special">&lt;s&gt;</span> {tr("a special token", "特殊 token")}</span>'
    )
    sections = "\n".join(_section(shown, ids) for shown in previews)
    language = tr("en", "zh-CN")
    return (
        f'<!doctype html>\n<html lang="{language}">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{title}</h1>\n<p class="legend">{legend}</p>\n{sections}\n</body>\n</html>\n'
    )


def _section(shown: Preview, ids: bool) -> str:
    runs = []
    for run in shown.runs:
        names = " ".join(
            name for name, on in (("learned", run.learned), ("special", run.kind == "special")) if on
        )
        body = html.escape(run.text)
        runs.append(f'<span class="{names}">{body}</span>' if names else body)
        if ids and run.ids:
            runs.append(f'<span class="ids"> {list(run.ids)} </span>')
    notes = [f'<p class="bad">{html.escape(problem)}</p>' for problem in shown.problems]
    notes += [f'<p class="flag">{html.escape(flag)}</p>' for flag in shown.flags]
    place, format_ = html.escape(shown.place), html.escape(shown.format)
    share = f"{shown.learned / max(1, shown.tokens):.1%}"
    bar = f'<span class="share" title="{share}"><i style="width:{share}"></i></span>'
    footer = f"<footer>{bar}<span>{html.escape(summary(shown))}</span></footer>" if shown.runs else ""
    return (
        f"<section>\n<h2>{place} <small>{format_}</small></h2>\n{''.join(notes)}"
        f'<div class="rendered">{"".join(runs)}</div>\n{footer}\n</section>'
    )
