"""Rows whose question nearly repeats an earlier one, taken out of a file; the others stay byte for byte what they say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tuoling.data.json_stream import json_line
from tuoling.data.near_instructions import ABOVE, near_duplicates
from tuoling.data.read import read_rows
from tuoling.data.row import Row
from tuoling.data.sources import Source
from tuoling.errors import DataError, UsageError
from tuoling.files import atomic_write
from tuoling.language import tr
from tuoling.text.conversation import Conversation


@dataclass
class DedupReport:
    """rows = written + removed + bad. against: of the removed, those that repeat a row of another file."""

    out: Path
    rows: int = 0
    written: int = 0
    removed: int = 0
    against: int = 0
    bad: int = 0


def asked(conversation: Conversation) -> str:
    """What a row asks, over all its turns; of plain text the text."""
    if conversation.is_plain_text:
        return conversation.turns[0].text
    return "\n".join(turn.full_text for turn in conversation.exchanges if turn.role == "user")


def dedup(
    sources: Sequence[Source],
    out: Path,
    *,
    against: Sequence[Source] = (),
    above: float = ABOVE,
    removed: Path | None = None,
    force: bool = False,
    threads: int = 2,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> DedupReport:
    """Write the rows that repeat none before them (ROUGE-L of what is asked at most `above`), nor one of `against`.

    removed: JSON lines `{"like": place, "row": …}` of the others. A name that ends in .json gets an array.
    Raises UsageError for a file that is there already, DataError where nothing would be left.
    """
    for place in (out, removed):
        if place is not None and place.exists() and not force:
            raise UsageError(
                tr("the file is there already", "文件已经存在"),
                where=str(place),
                remedy=tr("choose another place, or --force", "换一个位置，或用 --force"),
            )
    texts = [asked(conversation) for _, conversation in _good(against)]
    first = len(texts)
    texts += [asked(conversation) for _, conversation in _good(sources)]
    found = near_duplicates(texts, above=above, threads=threads, step=step)
    del texts  # a million of them; the rows are read again
    kept, like = found.kept[first:].tolist(), found.like[first:].tolist()
    report = DedupReport(out, against=sum(place < first for place in like))
    if True not in kept:
        raise DataError(
            tr("no row would be left", "没有可以留下的数据"), where=", ".join(one.path for one in sources)
        )
    _write_kept(sources, kept, report)
    if removed is not None:
        _write_removed(against, sources, like, removed)
    return report


def _good(sources: Sequence[Source]) -> Iterator[tuple[Row, Conversation]]:
    for source in sources:
        for row in read_rows(source):
            if row.conversation is not None and not row.problems:
                yield row, row.conversation


def _write_kept(sources: Sequence[Source], kept: Sequence[bool], report: DedupReport) -> None:
    stays = iter(kept)
    array = report.out.suffix == ".json"
    with atomic_write(report.out) as file:
        for source in sources:
            for row in read_rows(source):
                report.rows += 1
                if row.conversation is None or row.problems:
                    report.bad += 1
                elif next(stays):
                    begin = (",\n" if report.written else "[\n") if array else ""
                    file.write(
                        begin + (json_line(row.record).rstrip("\n") if array else json_line(row.record))
                    )
                    report.written += 1
                else:
                    report.removed += 1
        if array:
            file.write("\n]\n")


def _write_removed(
    against: Sequence[Source], sources: Sequence[Source], like: Sequence[int], removed: Path
) -> None:
    """Each row that went, with the place of the one it repeats, which always came before."""
    places = [str(row.place) for row, _ in _good(against)]
    first = len(places)
    with atomic_write(removed) as file:
        for number, (row, _) in enumerate(_good(sources)):
            places.append(str(row.place))
            if like[number] != first + number:
                value = {"row": row.record, "place": places[-1], "repeats": places[like[number]]}
                file.write(json_line(value))
