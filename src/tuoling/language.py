"""Messages in English and Chinese, side by side where they are used."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from contextvars import ContextVar
from typing import TypeVar

from tuoling import environment
from tuoling.environment import Language

T = TypeVar("T")
_SPOKEN: ContextVar[Language | None] = ContextVar("spoken", default=None)


def tr(en: str, zh: str) -> str:
    """Return the message in the user's language: what `speaking` says, else `TUOLING_LANG`, else the locale.

    Both texts are written at the place of use, so that a change to one is made in sight of the other.
    """
    return zh if (_SPOKEN.get() or environment.language()) == "zh" else en


@contextmanager
def speaking(language: Language) -> Iterator[None]:
    """Messages made inside are in this language: one server speaks with people of both.

    It holds for the thread it is entered in. A generator enters it anew for every piece (`spoken`).
    """
    token = _SPOKEN.set(language)
    try:
        yield
    finally:
        _SPOKEN.reset(token)


def spoken(language: Language, items: Generator[T]) -> Generator[T]:
    """The same items, each made in this language; two such generators may take turns in one thread."""
    with closing(items):
        while True:
            with speaking(language):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item
