"""Progress with the time left, on stderr, and only where a person watches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(title: str, unit: str = "", shown: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """A function of (what, done, total) that draws a bar with elapsed and remaining time."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not shown or not console.is_terminal:
        yield lambda what, done, total: None
        return
    columns = [
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}% " + unit),
        TimeElapsedColumn(), TextColumn("elapsed,"), TimeRemainingColumn(), TextColumn("left  [dim]{task.fields[what]}"),
    ]  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=None, what="")

        def advance(what: str, done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, what=what)

        yield advance
