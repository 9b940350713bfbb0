"""A progress bar on a terminal, and ten plain lines where there is none (a pipe, CI)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINES = 10


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Yields a function to call after each of `total` equal parts with what has just been done."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.description}"), console=console) as bar:
            task = bar.add_task("compiling", total=total)
            yield lambda text: bar.update(task, advance=1, description=text)
        return

    done = 0

    def advance(text: str) -> None:
        nonlocal done
        done += 1
        if done * LINES // total > (done - 1) * LINES // total:
            console.print(f"{done}/{total}  {text}", highlight=False)

    yield advance
