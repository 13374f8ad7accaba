"""Every row format: one file each, found by looking; and which of them a record is."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping

from tuoling.data.row import Record, RowFormat
from tuoling.errors import DataError
from tuoling.language import tr


@functools.cache
def formats() -> Mapping[str, RowFormat]:
    """Name → format, in the order in which they are asked."""
    found = [
        importlib.import_module(f"{__name__}.{module.name}").FORMAT
        for module in pkgutil.iter_modules(__path__)
    ]
    return {format.name: format for format in sorted(found, key=lambda f: (f.rank, f.name))}


def get_format(name: str) -> RowFormat:
    """The format of that name. Raises DataError with the names there are."""
    try:
        return formats()[name]
    except KeyError:
        raise DataError(
            tr(f"no row format is called {name!r}", f"没有名为 {name!r} 的数据格式"),
            remedy=tr("formats: ", "可用格式：") + ", ".join(formats()),
        ) from None


class Detector:
    """Which format a record is, remembered by its shape (keys and types of values)."""

    def __init__(self) -> None:
        self._by_shape: dict[tuple[object, ...], tuple[RowFormat, ...]] = {}

    def candidates(self, record: Record) -> tuple[RowFormat, ...]:
        """Formats to ask for records of this shape: those that look at content, then the one that fits by shape."""
        shape = (*record, *map(type, record.values()))
        known = self._by_shape.get(shape)
        if known is None:
            asked: list[RowFormat] = []
            for format in formats().values():
                if not format.by_shape:
                    asked.append(format)
                elif format.matches(record):
                    asked.append(format)
                    break
            if len(self._by_shape) > 4096:  # rows with free keys: remember the recent shapes only
                self._by_shape.clear()
            known = self._by_shape[shape] = tuple(asked)
        return known

    def __call__(self, record: Record) -> RowFormat | None:
        """The record's format, or None."""
        for format in self.candidates(record):
            if format.by_shape or format.matches(record):
                return format
        return None
