"""Notes and progress on stderr; stdout belongs to results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from rich.progress import Progress

    from tuoling.errors import TuolingError

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def note(message: str) -> None:
    """Something the user should know and need not act on."""
    err.print(escape(message))


def warn(message: str) -> None:
    """Something that may not be what the user meant."""
    err.print(f"[yellow]![/yellow] {escape(message)}")


def show_error(error: TuolingError) -> None:
    """Problem, where, remedy: each on its own line."""
    from tuoling.language import tr

    err.print(f"[bold red]{tr('Error', '错误')}[/bold red] {escape(error.problem)}")
    if error.where:
        err.print(f"  [dim]{tr('where', '位置')}[/dim]  {escape(error.where)}")
    for number, line in enumerate((error.remedy or "").splitlines()):
        label = tr("try", "办法")
        label = label if number == 0 else " " * cell_len(label)
        err.print(f"  [dim]{label}[/dim]  {escape(line)}")


def seconds_words(seconds: float | None) -> str:
    """2 h 05 min, 3 min 20 s, 12.5 s."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"


@contextmanager
def silent(wanted: bool = True) -> Iterator[None]:
    """Nothing is printed inside: of several processes that train together one speaks."""
    before = out.quiet, err.quiet
    if wanted:
        out.quiet = err.quiet = True
    try:
        yield
    finally:
        out.quiet, err.quiet = before


@contextmanager
def progress(*, transient: bool = True) -> Iterator[Progress]:
    """A progress bar with rate and time left; silent where stderr is not a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeRemainingColumn(compact=True),
        console=err,
        transient=transient,
        disable=not err.is_terminal,
    )
    with bar:
        yield bar
