"""Messages in English and Chinese, side by side where they are used."""

from __future__ import annotations

from tuoling import environment


def tr(en: str, zh: str) -> str:
    """Return the message in the user's language: `TUOLING_LANG`, else the locale.

    Both texts are written at the place of use, so that a change to one is made in sight of the other.
    """
    return zh if environment.language() == "zh" else en
