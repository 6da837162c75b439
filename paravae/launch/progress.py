"""A progress bar on the terminal, for work of more than one step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from paravae.vae.parallel import Progress as Report


@contextmanager
def progress_bar(label: str, shown: bool) -> Iterator[Report | None]:
    """Give what ``decode`` and ``encode`` tell their progress to. Nothing is drawn where stderr is no terminal."""
    console = Console(stderr=True)
    if not (shown and console.is_terminal):
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=None, visible=False)

        def report(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, visible=total > 1)

        yield report
