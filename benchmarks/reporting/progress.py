"""Progress bars on a terminal; plain lines in a pipe or in CI."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINES = 10
SILENCE = 60.0  # seconds, the longest without a line where there are no bars


@contextmanager
def show_progress(total: int) -> Iterator[Callable[[str], None]]:
    """Yields a function to call after each of `total` equal parts, with a text about the part."""
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


class Overall:
    """Two bars on a terminal, for all runs and for the present one; lines without a terminal.

    `total` is the number of epochs of all runs, `done` that of the runs which had been finished before.
    """

    def __init__(self, console: Console, total: int, done: int):
        self.total, self.done, self._before = total, done, done
        self._start = self._said = time.monotonic()
        self._name = ""
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bars = Progress(
            *columns,
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._all = self.bars.add_task("epochs of all runs", total=total, completed=done)
        self._run = self.bars.add_task("compiling", total=None)

    def update(self, run: str, text: str, epoch: int, epochs: int, done: int) -> None:
        """`done`: epochs of all finished runs and of the present run."""
        if run != self._name:  # epochs from a checkpoint took no time here
            self._name, self._before = run, self._before + epoch - 1
        self.done = done
        self.bars.update(self._all, completed=done)
        self.bars.update(self._run, completed=epoch, total=epochs, description=f"{text}  {run}")
        if self.bars.disable and time.monotonic() - self._said >= SILENCE and epoch < epochs:
            self._say(f"{run}: epoch {epoch}/{epochs}, {text}; {self.estimate_left()} left")

    def report_finished(self, text: str, done: int) -> None:
        self.done = done
        self._say(f"{text}; {self.estimate_left()} left")

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        self.bars.console.print(text, highlight=False, soft_wrap=True)

    def estimate_left(self) -> str:
        """The time for the remaining epochs, if they take as long as those so far."""
        here = self.done - self._before
        if not here:
            return "unknown"
        seconds = (time.monotonic() - self._start) * (self.total - self.done) / here
        return f"about {timedelta(seconds=round(seconds))}"
