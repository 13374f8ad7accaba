"""The report card as one HTML file: both languages in it, no request to anywhere, made to be printed too."""

from __future__ import annotations

from html import escape
from pathlib import Path

from tuoling import environment, files
from tuoling.evaluate.report_card import scores, sections
from tuoling.evaluate.report_card.contents import Report
from tuoling.evaluate.report_card.html import both
from tuoling.evaluate.report_card.style import SCRIPT, STYLE


def write_page(report: Report, path: Path) -> Path:
    """Write the page, whole or not at all."""
    with files.atomic_write(path) as file:
        file.write(page(report))
    return path


def page(report: Report) -> str:
    """HTML of the whole card; it opens in the language of the person who made it, a button changes it."""
    language = environment.language()
    name = escape(report.name)
    parts = [
        sections.summary(report),
        sections.what_was_trained(report),
        sections.plan_and_fact(report),
        sections.curves(report),
        *(scores.suite_section(suite) for suite in report.suites),
        sections.no_scores(report),
        scores.examples_section(report),
        sections.data_section(report),
        sections.licence_section(report),
        sections.reproduce(report),
    ]
    body = "\n".join(part for part in parts if part)
    return f"""<!doctype html>
<html lang="{language}" data-language="{language}">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{name} · Tuoling</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<div class="brand">{both("驼铃 · 成绩单", "Tuoling · report card")}</div>
<button id="language" type="button">中文 / English</button>
</header>
<main>
{body}
</main>
<footer>{both("由 tuoling report 生成，离线可读。", "Made by tuoling report; reads offline.")}</footer>
<script>{SCRIPT}</script>
</body>
</html>
"""
